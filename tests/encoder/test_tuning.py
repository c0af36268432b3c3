"""Functions that are trained through an image decoder: the loss and its gradient, sizes of files, and what it gives."""

from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from clric_decoder import ClricError, decode, decode_latent
from clric_decoder.image import read_image
from clric_encoder import encode
from clric_encoder.autoencoder import load_decoder, load_encoder
from clric_encoder.encoding import encode_latents, load_tuning
from clric_encoder.networks import load_decoder_network
from clric_encoder.rate import Rate
from clric_encoder.training import distortion
from clric_encoder.training.distortion import ImageDecoder, ImageDistortion, ms_ssim, structure
from clric_encoder.training.features import WEIGHTS, FeatureNetwork, PerceptualDistance, Textured, load_features
from clric_encoder.training.loop import Progress
from clric_encoder.training.presets import PRESETS


@pytest.fixture(scope="module")
def face() -> np.ndarray:
    """192 x 200 pixels of matplotlib's sample photo: a face."""
    image = read_image(Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")).pixels
    return np.ascontiguousarray(image[40:232, 150:350])


@pytest.fixture(autouse=True)
def quick_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset `fast` with a third of its iterations, as `quick`."""
    fast = PRESETS["fast"]
    (stage,) = fast.stages
    monkeypatch.setitem(PRESETS, "quick", replace(fast, stages=(replace(stage, iterations=stage.iterations // 3),)))


@pytest.fixture(scope="module")
def lite() -> ImageDecoder:
    """In float32, whatever this processor has."""
    network = load_decoder_network("lite")
    return ImageDecoder("lite", network.space, network.module.train(), network.halo)


def psnr(image: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(image.astype(float) - other).mean()))


def test_the_network_of_lite_is_the_one_that_clients_run(face: np.ndarray, lite: ImageDecoder) -> None:
    data = encode(face, vae="lite", preset="quick", tune="none")
    with torch.inference_mode():
        image = lite.run(torch.from_numpy(decode_latent(data))[None]).clamp(0, 1)[0, :, :192, :200]
    difference = decode(data) - 255.0 * image.permute(1, 2, 0).numpy()
    assert np.abs(difference).max() < 1


def test_the_target_moves_against_the_gradient_of_the_loss(face: np.ndarray, lite: ImageDecoder) -> None:
    """Beside the difference of losses along a random direction; over larger steps the decoder bends."""
    latent = torch.from_numpy(load_encoder("lite").encode(face))[None]
    image = ImageDistortion([face], latent, lite, load_features())
    direction = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    image.look(latent, [0])
    gradient = (latent - image.targets) * (2 * lite.curvature / latent.numel())
    losses = []
    for step in (-1e-4, 1e-4):
        image._looks = 0  # each look reads features at another offset
        image.look(latent + step * direction, [0])
        losses.append(image.losses.double().item())
    assert (losses[1] - losses[0]) / 2e-4 == pytest.approx((gradient * direction).sum().item(), rel=0.1)
    # And the first part of the way to the target is downhill
    image._looks = 0
    image.look(latent, [0])
    before, target = image.losses.item(), image.targets.clone()
    image._looks = 0
    image.look(latent + 0.03 * (target - latent), [0])
    assert image.losses.item() < before


def test_tiles_see_what_the_whole_sees(face: np.ndarray, lite: ImageDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Squared errors: windows, features and differences end at a tile's edge."""
    for weight in ("STRUCTURE_WEIGHT", "FLATNESS_WEIGHT"):
        monkeypatch.setattr(distortion, weight, 0.0)
    latent = torch.from_numpy(load_encoder("lite").encode(face))[None]
    whole = ImageDistortion([face], latent, lite, None)
    assert lite.halo is not None
    monkeypatch.setattr(distortion, "TILE_PIXELS", (8 * (2 * lite.halo + 10)) ** 2)
    monkeypatch.setattr(distortion, "_spans", lambda length, count: [(0, 9), (9, length)])
    tiled = ImageDistortion([face], latent, lite, None)
    assert len(tiled._tiles[0]) == 4
    for image in (whole, tiled):
        image.look(latent + 0.1, [0])
    torch.testing.assert_close(tiled.targets, whole.targets, rtol=1e-3, atol=1e-4)
    assert tiled.losses.item() == pytest.approx(whole.losses.item(), rel=1e-4)


def test_images_that_are_looked_at_together_count_each_alone(
    face: np.ndarray, lite: ImageDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; the last has a row less, and another shape with it."""
    monkeypatch.setattr(distortion, "_spans", lambda length, count: [(0, 9), (9, length)])
    images = [face, face[::-1].copy(), face[:, ::-1].copy(), face[:-1]]
    encoder = load_encoder("lite")
    latents = torch.from_numpy(np.stack([encoder.encode(image) for image in images]))
    alone, together = (ImageDistortion(images, latents, lite, load_features()) for _ in range(2))
    assert len(alone._tiles[0]) == 4
    together._together = 2
    for image in (alone, together):
        image.look(latents + 0.1, range(4))
    torch.testing.assert_close(together.losses, alone.losses, rtol=1e-2, atol=0)
    moves = alone.targets - latents
    assert (together.targets - alone.targets).norm() < 0.05 * moves.norm()


def test_a_tuned_file_is_no_larger_and_its_picture_better(face: np.ndarray) -> None:
    plain, tuned = (encode(face, vae="lite", preset="fast", tune=tune, quality=60) for tune in ("none", "auto"))
    assert len(tuned) <= len(plain)
    assert psnr(decode(tuned), face) > psnr(decode(plain), face) + 0.5
    a, b, original = (
        torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255 for image in (decode(tuned), decode(plain), face)
    )
    assert ms_ssim(a, structure(original)) > ms_ssim(b, structure(original)) + 0.01


def test_smaller_lambda_gives_larger_tuned_files(face: np.ndarray) -> None:
    sizes = [len(encode(face, vae="lite", preset="quick", lmbda=lmbda)) for lmbda in (4.0, 1.0, 0.3, 0.1)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


@pytest.mark.parametrize("bpp", [0.04, 0.1, 0.25])
def test_sizes_that_are_asked_for(face: np.ndarray, bpp: float) -> None:
    """At 0.04 corrections of the size overshoot; at 0.25 training on the image adds to it."""
    limit = bpp * face.shape[0] * face.shape[1] / 8
    assert 0.97 * limit <= len(encode(face, vae="lite", preset="fast", bpp=bpp)) <= limit


def test_same_seed_same_bytes(face: np.ndarray) -> None:
    streams = [encode(face, vae="lite", preset="quick", seed=seed) for seed in (3, 3, 4)]
    assert streams[0] == streams[1] != streams[2]


def test_progress_goes_on_to_its_end_and_never_back(face: np.ndarray) -> None:
    encoder, tuning = load_encoder("lite"), load_tuning("auto", "sd1")
    latents, sizes = encoder.encode(face)[None], [(face.shape[1], face.shape[0])]
    for rate in (Rate(0.5), Rate(size=1200)):
        reports: list[Progress] = []
        encode_latents(
            latents, sizes, "sd1", rate, preset="quick", tuning=tuning, images=[face], progress=reports.append
        )
        iterations = [report.iteration for report in reports]
        assert iterations == sorted(iterations)
        assert iterations[-1] == reports[-1].iterations
        assert len({report.iteration for report in reports if report.stage == "tuning"}) > 1


def test_each_of_a_batch_is_trained_on_its_own_image(face: np.ndarray) -> None:
    images = [face, np.ascontiguousarray(face[::-1, :195])]
    encoder, tuning = load_encoder("lite"), load_tuning("auto", "sd1")
    latents = np.stack([encoder.encode(image) for image in images])
    sizes = [(image.shape[1], image.shape[0]) for image in images]
    streams = encode_latents(latents, sizes, "sd1", Rate(0.5), preset="quick", tuning=tuning, images=images)
    for image, encoded in zip(images, streams, strict=True):
        alone = encode(image, vae="lite", lmbda=0.5, preset="quick")
        assert len(encoded.data) == pytest.approx(len(alone), rel=0.1)
        assert psnr(decode(encoded.data), image) == pytest.approx(psnr(decode(alone), image), abs=0.5)


@pytest.mark.parametrize("size", [(1, 1), (9, 30), (20, 33), (40, 70)])
def test_images_too_small_for_windows_and_features(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    assert decode(encode(image, preset="quick")).shape == image.shape


def test_what_auto_is() -> None:
    tuning = load_tuning("auto", "sd1")
    assert tuning is not None
    assert tuning.decoder.name == "lite"
    assert load_tuning("none", "sd1") is None
    assert load_tuning("auto", "sd1", "paper") is None
    assert load_tuning("auto", "sd3") is None


def test_what_cannot_be_trained_through(tmp_path: Path, toy_models: Path) -> None:
    with pytest.raises(ClricError, match="decodes the latent space sd1, but the latent space is sd3"):
        load_tuning("lite", "sd3")
    with pytest.raises(ClricError, match="'best' is not known"):
        load_tuning("best", "sd1")
    with pytest.raises(ClricError, match="does not exist"):
        load_tuning(str(tmp_path / "none.onnx"), "sd1")
    with pytest.raises(ClricError, match="was not made by clric-export"):
        load_tuning(str(toy_models / "toy.onnx"), "sd1")
    with pytest.raises(ClricError, match="does not contain LPIPS-VGG weights"):
        load_tuning("auto", "sd1", lpips=tmp_path / "vgg.npz")


def test_a_path_of_an_onnx_file_is_a_decoder(face: np.ndarray) -> None:
    from clric_decoder.models import find_decoder

    path, _ = find_decoder("lite")
    assert encode(face, vae="lite", preset="quick", tune=str(path)) == encode(
        face, vae="lite", preset="quick", tune="lite"
    )


def test_the_feature_network_keeps_its_limits() -> None:
    assert WEIGHTS.stat().st_size < 1_000_000
    network, multiplications, scale = load_features(), 0.0, 1
    for layer in network.layers:
        scale *= layer.stride[0]
        multiplications += layer.weight.numel() / scale**2
    assert multiplications <= 5000


@pytest.mark.parametrize("network", [load_features(), Textured(load_features())], ids=["plain", "textured"])
def test_features_have_a_gradient_where_nothing_is(network: PerceptualDistance) -> None:
    black = torch.zeros(1, 3, 48, 40, requires_grad=True)
    other = torch.rand(1, 3, 48, 40, generator=torch.Generator().manual_seed(0))
    reference = network.reference(other)
    distance = network.distance(black, reference)
    (gradient,) = torch.autograd.grad(distance.sum(), black)
    assert distance.item() > 0
    assert gradient.isfinite().all()
    assert network.distance(other, reference).item() == pytest.approx(0, abs=1e-6)


def test_the_distance_is_that_of_features_of_unit_length(face: np.ndarray) -> None:
    """LPIPS as its paper writes it, with the first convolution as it is stored; an image of odd sides."""
    network = load_features()
    pixels = torch.from_numpy(face.copy()).permute(2, 0, 1)[None] / 255
    noisy = pixels + 0.05 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    pixels, noisy = pixels[..., :63, :71], noisy[..., :63, :71]
    expected = torch.zeros(1)
    pair = torch.cat([noisy, pixels])[..., :62, :70]  # the last of an odd number of rows is left out
    x = (pair - 0.45) * 4
    for layer, head in zip(network.layers, network.heads, strict=True):
        x = torch.nn.functional.silu(layer(x))
        a, b = torch.nn.functional.normalize(x, dim=1)
        expected += (head.square()[:, None, None] * (a - b).square()).sum(0).mean()
    distance = network.distance(noisy, network.reference(pixels))
    torch.testing.assert_close(distance, expected, rtol=1e-4, atol=0)


def test_blur_is_farther_than_a_shade(face: np.ndarray) -> None:
    """What squared error gets wrong: a slightly darker picture is nearer than a blurred one of less error."""
    network = load_features()
    pixels = torch.from_numpy(face.copy()).permute(2, 0, 1)[None] / 255
    blurred = torch.nn.functional.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False)
    darker = pixels - 0.08
    assert (darker - pixels).square().mean() > (blurred - pixels).square().mean()
    reference = network.reference(pixels)
    distances = [network.distance(image, reference).item() for image in (darker, blurred)]
    assert distances[0] < distances[1]


def test_another_texture_of_one_kind_is_nearer_than_none() -> None:
    """By textures alone, since point by point noise is farther from other noise than from grey."""
    network = load_features()
    textured = Textured(network)
    noise = [torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    smooth = torch.nn.functional.avg_pool2d(noise[0], 5, 1, 2, count_include_pad=False)
    reference, plain = textured.reference(noise[0]), network.reference(noise[0])
    other, none = (
        (textured.distance(image, reference) - network.distance(image, plain)).item() for image in (noise[1], smooth)
    )
    assert 0 < 4 * other < none


def test_a_damaged_feature_network_is_named(tmp_path: Path) -> None:
    place = tmp_path / "features.safetensors"
    place.write_bytes(b"12345678")
    with pytest.raises(ClricError, match="does not contain the feature network"):
        load_features(place)


def test_bfloat16_weights_give_nearly_the_same(face: np.ndarray) -> None:
    pixels = torch.from_numpy(face.copy()).permute(2, 0, 1)[None] / 255
    noisy = pixels + 0.05 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    distances = []
    for dtype in (torch.float32, torch.bfloat16):
        network: FeatureNetwork = load_features()
        network.set_dtype(dtype)
        distances.append(network.distance(noisy, network.reference(pixels)).item())
    assert distances[0] == pytest.approx(distances[1], rel=0.03)


def test_a_long_training_is_announced(face: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clric_encoder.encoding.LONG", 0)
    with pytest.warns(UserWarning, match="through the image decoder lite takes about"):
        encode(face[:32, :32].copy(), vae="lite", preset="quick")


def test_a_file_of_a_size_is_as_good_as_one_of_its_lambda(face: np.ndarray) -> None:
    """Where lambda is steered badly while the function is tuned, the last corrections meet the size at any price."""

    def similarity(data: bytes) -> float:
        pixels, shown = (
            torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 for image in (face, decode(data))
        )
        return float(ms_ssim(shown, structure(pixels)))

    data = encode(face, vae="lite", lmbda=1.0)
    same_size = encode(face, vae="lite", size=len(data))
    assert 0.97 * len(data) <= len(same_size) <= len(data)
    assert similarity(same_size) > similarity(data) - 0.015


def test_taesd_as_the_decoder(shared: Path, face: np.ndarray) -> None:
    """A stream for TAESD, which shows it better than one that was made for its latent alone."""
    small = np.ascontiguousarray(face[:96, :96])
    decoder = load_decoder("taesd", shared / "models")
    pictures: list[np.ndarray] = []
    sizes = []
    for tune in ("none", "taesd"):
        data = encode(small, vae="taesd", bpp=0.3, preset="fast", tune=tune, models=shared / "models")
        sizes.append(len(data))
        with torch.inference_mode():
            image = decoder.run(torch.from_numpy(decode_latent(data))[None])[0].clamp(0, 1)
        pictures.append((255 * image).permute(1, 2, 0).numpy())
    assert max(sizes) <= 0.3 * 96 * 96 / 8
    assert psnr(small, pictures[1]) > psnr(small, pictures[0]) + 0.5
