"""Training with the rate: the prior is causal, the losses see a mesh, and a run that stops goes on as if it had not."""

import json
import math
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from clric_decoder.autoencoder import decode
from clric_decoder.errors import ClricError, ModelError
from clric_decoder.image import read_image
from clric_encoder.autoencoder import load_encoder
from clric_encoder.encoding import encode
from clric_encoder.instant import encode_instantly
from clric_encoder.networks import SmallDecoder, load_decoder_network, load_encoder_network
from clric_export import crops as crops_module
from clric_export import train as training
from clric_export.cli import command
from clric_export.crops import Crops, list_photos
from clric_export.prior import Prior, laplace_probability
from clric_export.train import (
    CODED_EVERY,
    LPIPS_EVERY,
    _turn,
    flat_latents,
    mesh_loss,
    mesh_peaks,
    ripple_loss,
    train,
)
from PIL import Image
from torch import nn


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with twelve smooth images."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for i in range(12):
        small = Image.fromarray(random.integers(0, 256, (5, 6, 3), np.uint8))
        small.resize((160, 120), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


def test_prior_is_causal() -> None:
    torch.manual_seed(0)
    prior = Prior(8)
    values = torch.randint(-9, 10, (2, 8, 9, 11)).float()
    step = torch.tensor([0.2, 1.0])
    bits = prior(values, step)
    changed = values.clone()
    changed[:, 3, 4, 5] += 7
    other = prior(changed, step)
    before = torch.zeros(9, 11, dtype=torch.bool)
    before[:4], before[4, :5] = True, True
    assert torch.equal(bits[..., before], other[..., before])
    assert not torch.equal(bits[:, 3, 4, 5], other[:, 3, 4, 5])
    after = ~before
    after[4, 5] = False
    assert not torch.equal(bits[..., after], other[..., after])
    # The other channels of the same place: they are coded at once
    rest = [channel for channel in range(8) if channel != 3]
    assert torch.equal(bits[:, rest, 4, 5], other[:, rest, 4, 5])


def test_probabilities_sum_to_one_and_bits_have_a_ceiling() -> None:
    values = torch.arange(-400, 401, dtype=torch.float64)
    for mean, scale in ((0.3, 1.0), (-2.5, 0.1), (7.0, 30.0)):
        assert laplace_probability(values - mean, torch.tensor(scale)).sum().item() == pytest.approx(1, abs=1e-4)
    torch.manual_seed(0)
    bits = Prior(4)(torch.full((1, 4, 5, 5), 1e6), torch.ones(1))
    assert bits.max().item() <= 16 + 1e-4


def test_mesh_loss_prefers_noise_to_a_mesh_of_the_same_power() -> None:
    random = torch.Generator().manual_seed(0)
    flat = torch.full((1, 3, 192, 192), 0.5)
    tile = torch.randn(1, 3, 8, 8, generator=random)
    mesh = 0.01 * ((tile - tile.mean((2, 3), keepdim=True)) / tile.std()).tile(1, 1, 24, 24)
    noise = torch.randn(flat.shape, generator=random)
    noise = noise * mesh.square().mean().sqrt() / noise.square().mean().sqrt()
    with_mesh, with_noise = mesh_loss(flat + mesh, flat).item(), mesh_loss(flat + noise, flat).item()
    assert with_mesh == pytest.approx(mesh.square().mean().sqrt().item(), rel=1e-2)
    assert with_noise == pytest.approx(with_mesh * math.sqrt(2.25 / 64), rel=0.15)
    # A wrong colour is no mesh; in a busy area a mesh is seen less
    assert mesh_loss(flat + 0.1, flat).item() < 1e-4
    busy = torch.rand(flat.shape, generator=random)
    assert mesh_loss(busy + mesh, busy).item() == pytest.approx(training.TEXTURE_SHARE * with_mesh, rel=1e-2)


def test_mesh_peaks_of_noise_and_of_a_mesh() -> None:
    random = np.random.default_rng(0)
    flat = np.full((256, 256, 3), 128, np.uint8)
    noisy = flat + random.integers(-2, 3, flat.shape[:2])[..., None].astype(np.uint8)
    peaks = mesh_peaks([flat], [noisy])
    assert peaks.max() < 4
    assert np.exp(np.log(peaks).mean()) == pytest.approx(1, abs=0.3)
    tile = random.integers(0, 3, (8, 8)).astype(np.uint8)
    assert mesh_peaks([flat], [noisy + np.tile(tile, (32, 32))[..., None]]).max() > 20
    assert len(mesh_peaks([random.integers(0, 256, flat.shape, np.uint8)], [flat])) == 0
    assert len(mesh_peaks([flat], [noisy], is_flat=False)) == 0


def test_ripple_is_the_response_to_a_constant_latent() -> None:
    torch.manual_seed(0)
    decoder = SmallDecoder(8).train()
    vector = torch.randn(1, 8)
    image = decoder(vector[:, :, None, None].expand(1, 8, 40, 40))
    middle = image[..., 160:168, 160:168]
    expected = (middle - middle.mean((2, 3), keepdim=True)).square().mean().sqrt().item()
    assert ripple_loss(decoder, vector).item() == pytest.approx(expected, rel=1e-3)
    assert all(layer.padding_mode == "zeros" for layer in decoder.modules() if isinstance(layer, torch.nn.Conv2d))
    assert ripple_loss(decoder, vector[:0]).item() == 0


def test_flat_latents_lie_where_the_photo_is_flat() -> None:
    pixels = torch.rand(1, 3, 64, 64)
    pixels[..., 32:] = 0.5
    latents = torch.arange(64.0).view(1, 1, 8, 8)
    expected = {8 * row + column for row in range(1, 7) for column in range(5, 7)}
    assert {int(value) for value in flat_latents(latents, pixels)[:, 0]} == expected


def test_crops_depend_on_their_generator_alone(photos: Path) -> None:
    data = Crops(photos, 64, 0)
    batches = [data.batch(np.random.default_rng(5), 24) for _ in range(2)]
    assert torch.equal(*batches)
    assert batches[0].shape == (24, 3, 64, 64)
    assert batches[0].min() >= 0
    assert batches[0].max() <= 1
    assert all(image.shape == (112, 144, 3) for image in data.held_out())
    with pytest.raises(ClricError, match="contains only 0 photos with sides of at least 192"):
        Crops(photos, 192, 0)


def test_crops_of_streams_lie_where_their_photos_do(photos: Path, tmp_path: Path) -> None:
    for file in sorted(photos.iterdir())[:9]:
        (tmp_path / f"{file.stem}.clric").write_bytes(encode_instantly(read_image(file).pixels))
    data = Crops(photos, 64, 0, tmp_path, 8)
    assert {number for number, _ in data.coded} <= set(range(crops_module.HELD_OUT, 12))
    latents, pixels = data.coded_batch(np.random.default_rng(0), 6)
    assert (latents.shape, pixels.shape) == ((6, 8, 8, 8), (6, 3, 64, 64))
    encoder = load_encoder_network("small").module
    for latent, own in zip(latents, pixels, strict=True):
        # The latent of the photo's crop is nearer than that of any crop 8 pixels away would be
        error = (encoder(own[None])[0] - latent)[:, 2:-2, 2:-2].square().mean()
        moved = (encoder(own.roll(8, 2)[None])[0] - latent)[:, 2:-2, 3:-2].square().mean()
        assert error < moved
    with pytest.raises(ClricError, match=r"\.clric has the latent space clric of 8 channels, not 4 channels"):
        Crops(photos, 64, 0, tmp_path, 4)
    with pytest.raises(ClricError, match=r"\.clric has the latent space clric of 8 channels, not the latent space sd1"):
        Crops(photos, 64, 0, tmp_path, 8, "sd1")
    (tmp_path / "0.clric").write_bytes(encode_instantly(np.zeros((64, 64, 3), np.uint8)))
    names = [file.stem for file in photos.iterdir()]
    for name in names:
        (tmp_path / f"{name}.clric").write_bytes((tmp_path / "0.clric").read_bytes())
    with pytest.raises(ClricError, match="is not a stream of "):
        Crops(photos, 64, 0, tmp_path, 8)
    for name in names:
        (tmp_path / f"{name}.clric").write_bytes(b"\xc7LR\1damaged")
    with pytest.raises(ClricError, match=r"\.clric: checksum mismatch"):
        Crops(photos, 64, 0, tmp_path, 8)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint every two iterations, the third of which trains all, and one step of validation."""
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(training, "IMITATION", 1)
    monkeypatch.setattr(training, "PRIOR_ALONE", 1)
    monkeypatch.setattr(training, "VALIDATION_STEPS", (0.5,))
    monkeypatch.setattr(crops_module, "HELD_OUT", 2)


@pytest.mark.usefixtures("short")
def test_a_resumed_run_gives_the_same_as_an_unbroken_one(photos: Path, tmp_path: Path) -> None:
    def run(name: str, iterations: int, decay: int) -> list[Path]:
        return train(photos, tmp_path / name, iterations=iterations, decay=decay, crop=64, crops=2)

    whole = run("whole", 4, 3)
    run("broken", 2, 0)
    resumed = run("broken", 4, 0)
    decayed = run("broken", 4, 3)
    for file, other in zip(whole, decayed, strict=True):
        assert file.read_bytes() == other.read_bytes()
    assert resumed == decayed

    lines = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").open()] for name in ("whole", "broken")]
    assert [line["iteration"] for line in lines[0]] == [2, 4, 6, 7]
    for line, other in zip(*lines, strict=True):
        assert (line["losses"], line["0.5"]) == (other["losses"], other["0.5"])
    assert {"bpp", "psnr", "ms_ssim", "mesh_max", "mesh_mean"} <= set(lines[0][0]["0.5"])

    # The decay has a checkpoint of its own: training goes on from before it
    assert torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)["iteration"] == 4

    onnx, _, encoder_onnx, _ = whole
    decoder, encoder = load_decoder_network(str(onnx)), load_encoder_network(str(encoder_onnx))
    assert decoder.channels == encoder.channels == 8
    assert decoder.module(torch.zeros(1, 8, 5, 6)).shape == (1, 3, 40, 48)
    # Both halves name a space of their own, so that a stream of one is not shown by another
    assert decoder.space == encoder.space == f"custom-{sha256(onnx.read_bytes()).hexdigest()[:16]}"
    image = np.random.default_rng(0).integers(0, 256, (61, 90, 3), np.uint8)
    stream = encode(image, vae=str(encoder_onnx), tune=str(onnx), preset="fast", quality=20)
    assert decode(stream, vae=onnx).shape == image.shape
    with pytest.raises(ModelError, match="is an image encoder, not an image decoder"):
        decode(stream, vae=encoder_onnx)
    with pytest.raises(ModelError, match="is an image decoder, not an image encoder"):
        load_encoder(str(onnx))

    with pytest.raises(ModelError, match="different settings"):
        train(photos, tmp_path / "whole", iterations=4, crop=64, crops=3)
    (tmp_path / "whole" / "checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ModelError, match="cannot be read"):
        run("whole", 4, 0)


@pytest.mark.usefixtures("short")
def test_runs_that_start_from_another(photos: Path, tmp_path: Path) -> None:
    def run(name: str, iterations: int, **settings: object) -> list[bytes]:
        files = train(photos, tmp_path / name, iterations=iterations, crop=64, crops=2, **settings)  # type: ignore[arg-type]
        return [file.read_bytes() for file in files if file.suffix == ".onnx"]

    first = run("first", 3)
    checkpoint = tmp_path / "first" / "checkpoint.pt"
    assert run("further", 4, start=checkpoint) != first
    large, encoder = run("large", 1, start=checkpoint, decoder="large")
    assert encoder == first[1]
    assert len(large) > 3 * len(first[0])
    with pytest.raises(ClricError, match="name its checkpoint"):
        run("no start", 2, decoder="large")
    with pytest.raises(ModelError, match="does not match this architecture"):
        run("other channels", 4, start=checkpoint, channels=4)


@pytest.mark.usefixtures("short")
def test_features_of_squeezenet(photos: Path, tmp_path: Path, shared: Path) -> None:
    def run(name: str, squeezenet: Path | None) -> bytes:
        options = {"iterations": 2, "crop": 64, "crops": 2, "latents": ["lite"], "squeezenet": squeezenet}
        return train(photos, tmp_path / name, **options)[0].read_bytes()  # type: ignore[arg-type]

    assert run("with", shared / "metrics") != run("without", None)
    with pytest.raises(ModelError, match="does not contain LPIPS weights"):
        run("empty", tmp_path)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_each_of_several_encoders_gets_batches_of_photos_with_both_networks_of_features(count: int) -> None:
    got = {
        (_turn(iteration, count), iteration % LPIPS_EVERY == LPIPS_EVERY - 1)
        for iteration in range(200)
        if iteration % CODED_EVERY != CODED_EVERY - 1
    }
    assert got == {(encoder, lpips) for encoder in range(count) for lpips in (False, True)}


@pytest.mark.usefixtures("short")
def test_a_decoder_for_latents_of_other_encoders(photos: Path, tmp_path: Path) -> None:
    def run(name: str, iterations: int, **settings: object) -> list[Path]:
        options = {"iterations": iterations, "crop": 64, "crops": 2, "latents": ["lite"], **settings}
        return train(photos, tmp_path / name, **options)  # type: ignore[arg-type]

    onnx, manifest = run("whole", 4)
    assert json.loads(manifest.read_text())["latent_space"] == "sd1"
    line = json.loads((tmp_path / "whole" / "log.jsonl").read_text().splitlines()[-1])
    assert "rate" not in line["losses"]
    assert "bpp" not in line["0.5"]

    # It begins as lite, learns, and a resumed run gives the same
    images = [load_decoder_network(name).module(torch.ones(1, 4, 5, 6)) for name in ("lite", str(onnx))]
    assert 1e-5 < (images[0] - images[1]).abs().max() < 0.1
    run("broken", 2)
    assert run("broken", 4)[0].read_bytes() == onnx.read_bytes()

    with pytest.raises(ClricError, match="of more than one space: clric, sd1"):
        train(photos, tmp_path / "spaces", latents=["lite", "small"])
    with pytest.raises(ClricError, match="of the space sd1, not sdxl"):
        train(photos, tmp_path / "spaces", latents=["lite"], space="sdxl")
    with pytest.raises(ClricError, match="of other autoencoders is small"):
        run("large", 1, decoder="large", start=tmp_path / "whole" / "checkpoint.pt")


@pytest.mark.usefixtures("short")
def test_a_decoder_for_latents_of_other_encoders_starts_from_another_run(photos: Path, tmp_path: Path) -> None:
    """From a run of a decoder alone, and from one of all networks, it begins as the decoder of that run."""

    def run(name: str, **settings: object) -> Path:
        options = {"iterations": 2, "crop": 64, "crops": 2, "learning_rate": 0.01, **settings}
        return train(photos, tmp_path / name, **options)[0]  # type: ignore[arg-type]

    for other, settings in (("lite", {"latents": ["lite"]}), ("small", {"space": "clric"})):
        first = run(other, **settings)
        checkpoint = tmp_path / other / "checkpoint.pt"
        same = run(f"{other} again", latents=[other], start=checkpoint, learning_rate=0.0)
        assert same.read_bytes() == first.read_bytes()


def test_a_large_decoder_begins_as_the_small_one() -> None:
    torch.manual_seed(0)
    small, large = SmallDecoder(8), SmallDecoder(8, *training.DECODERS["large"])
    for parameter in small.parameters():
        nn.init.normal_(parameter, 0, 0.05)
    latents = torch.randn(1, 8, 5, 6)
    assert not torch.allclose(large(latents), small(latents), atol=1e-2)
    training.grow(large, small)
    torch.testing.assert_close(large(latents), small(latents))


def test_command_names_what_is_missing(photos: Path, tmp_path: Path) -> None:
    arguments = ["train", "--photos", str(photos), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(command, arguments, standalone_mode=False)
    assert result.return_value == 1
    assert result.output.startswith(f"clric-export: {photos} contains only 0 photos with sides of at least 192")


def test_other_files_may_lie_beside_photos(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.clric", ".clric-settings.json"):
        (folder / name).write_bytes(b"")
    with pytest.raises(ClricError, match="photos: no image files found"):
        list_photos(folder)
    for photo in photos.iterdir():
        (folder / photo.name).symlink_to(photo)
    assert list_photos(folder) == sorted(folder / photo.name for photo in photos.iterdir())
    assert len(Crops(folder, 64, 0).images) == len(Crops(photos, 64, 0).images)
