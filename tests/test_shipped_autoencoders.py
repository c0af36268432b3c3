"""The autoencoders that come with clric, small and lite: a fresh machine without a network needs nothing else."""

import os
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from clric_decoder import decode, read_header
from clric_decoder.autoencoder import decode_tiled, open_decoder
from clric_decoder.models import LATENT_SPACES, find_decoder, find_registered_decoder, image_decoder_number
from clric_encoder import encode, instant
from clric_encoder.autoencoder import load_encoder
from clric_encoder.networks import load_decoder_network, load_encoder_network
from clric_encoder.training.distortion import ms_ssim, structure
from clric_export.losses import Lpips
from PIL import Image

# Crops with what small decoders fail at: saturated colours, a face, text, an edge against the sky.
CROPS = {
    "kodim23": (400, 60, 656, 316),
    "kodim15": (200, 60, 456, 316),
    "kodim08": (200, 200, 456, 456),
    "kodim20": (200, 160, 456, 416),
}


def to_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def test_they_are_small() -> None:
    for name, encoder in (("small", "small_encoder.onnx"), ("lite", "lite_encoder.safetensors")):
        assert files("clric_decoder").joinpath(f"weights/{name}.onnx").stat().st_size <= 1_000_000
        assert files("clric_encoder").joinpath(f"weights/{encoder}").stat().st_size <= 2_000_000


def test_networks_of_small_cost_what_they_may() -> None:
    """Multiply-accumulates per pixel, counted from the shapes of what each convolution computes."""

    def macs(network: torch.nn.Module, example: torch.Tensor, pixels: int) -> float:
        counts = []

        def count(layer: torch.nn.Module, _: object, output: torch.Tensor) -> None:
            counts.append(layer.weight[0].numel() * output.numel())

        for layer in network.modules():
            if isinstance(layer, torch.nn.Conv2d):
                layer.register_forward_hook(count)
        network(example)
        return sum(counts) / pixels

    decoder, encoder = load_decoder_network("small").module, load_encoder_network("small").module
    assert macs(decoder, torch.zeros(1, 8, 16, 16), 128 * 128) <= 20_000
    assert macs(encoder, torch.zeros(1, 3, 128, 128), 128 * 128) <= 40_000


def test_torch_and_onnx_give_the_same_latents() -> None:
    image = np.random.default_rng(0).integers(0, 256, (70, 93, 3), np.uint8)
    latent = load_encoder("small").encode(image)
    assert latent.shape == (8, 9, 12)
    np.testing.assert_allclose(instant.load_encoder("small").encode(image), latent, atol=1e-3)


def test_a_fresh_machine_without_a_network(run, tmp_path: Path) -> None:
    y, x = np.mgrid[:96, :128]
    photo = np.stack([x * 1.9, 120 + 100 * np.sin(x / 12) * np.cos(y / 9), 250 - y * 2], -1).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    for command in (("clric-enc", "photo.png"), ("clric-dec", "photo.clric", "-o", "back.png")):
        done = run(*command)
        assert done.returncode == 0, done.stderr
    assert read_header((tmp_path / "photo.clric").read_bytes()).space == "clric"
    back = np.asarray(Image.open(tmp_path / "back.png"))
    assert back.shape == photo.shape
    assert 10 * np.log10(255**2 / np.mean((back - photo.astype(float)) ** 2)) > 20


def test_a_folder_given_by_the_user_comes_first(toy_models: Path, make_stream, tmp_path: Path) -> None:
    for suffix in (".onnx", ".json"):
        os.link(toy_models / f"toy{suffix}", tmp_path / f"lite{suffix}")
    data = make_stream()
    own = decode(data, models=tmp_path)
    assert np.array_equal(own, decode(data, vae="toy", models=toy_models))
    assert not np.array_equal(own, decode(data))


@pytest.mark.parametrize(("space", "number", "name"), [("sd1", 2, "lite"), ("clric", 2, "small")])
def test_streams_can_name_the_decoders_by_the_weights_that_the_specification_has(
    space: str, number: int, name: str
) -> None:
    _, manifest = find_decoder(name)
    assert image_decoder_number(manifest) == number
    row = f"| `{space}` | {number} | `{name}`, `{manifest['sha256']}` |"
    assert row in Path(__file__).parent.parent.joinpath("bitstream_spec.md").read_text()


def test_a_stream_names_the_decoder_that_it_was_trained_through() -> None:
    photo = np.random.default_rng(0).integers(0, 255, (40, 48, 3), np.uint8)
    assert read_header(encode(photo, preset="fast")).image_decoder == 2
    assert read_header(encode(photo, preset="fast", tune="none")).image_decoder == 0


@pytest.mark.parametrize("space", ["sd1", "clric"])
def test_files_of_1_0_are_shown_by_the_weights_that_they_were_trained_for(space: str, make_stream) -> None:
    before = find_registered_decoder(space, 1)
    assert before is not None
    data = make_stream(space=space, image_decoder=1)
    assert np.array_equal(decode(data), decode(data, vae=str(before)))
    assert not np.array_equal(decode(data), decode(make_stream(space=space, image_decoder=2)))


@pytest.mark.parametrize(("space", "name"), [("sd1", "lite"), ("clric", "small")])
def test_tiles_are_exact(space: str, name: str) -> None:
    decoder = open_decoder(name, space)
    channels = LATENT_SPACES[space].channels
    latent = np.random.default_rng(0).standard_normal((channels, 75, 33)).astype(np.float32)
    whole = decode_tiled(decoder, latent, 75 * 33)
    np.testing.assert_allclose(decode_tiled(decoder, latent, 1), whole, atol=1e-5)


@pytest.fixture(scope="module")
def figures(shared: Path) -> dict[tuple[str, str], np.ndarray]:
    """(encoder, decoder) -> mean PSNR, MS-SSIM and LPIPS of the crops."""
    lpips = Lpips(shared / "metrics")
    taesd = load_decoder_network("taesd", shared / "models").module
    lite = open_decoder("lite", "sd1")
    rows: dict[tuple[str, str], list[list[float]]] = {}
    for name, box in CROPS.items():
        photo = np.asarray(Image.open(shared / f"data/kodak/{name}.png").convert("RGB").crop(box))
        pixels = to_tensor(photo)
        for encoder in ("taesd", "lite"):
            latent = load_encoder(encoder, shared / "models").encode(photo)
            with torch.inference_mode():
                images = {"taesd": taesd(torch.from_numpy(latent)[None])}
                images["lite"] = torch.from_numpy(decode_tiled(lite, latent))[None]
                for decoder, image in images.items():
                    psnr = -10 * (image - pixels).square().mean().log10()
                    row = [float(psnr), float(ms_ssim(image, structure(pixels))), float(lpips(image, pixels))]
                    rows.setdefault((encoder, decoder), []).append(row)
    return {pair: np.mean(row, 0) for pair, row in rows.items()}


def test_the_decoder_comes_near_its_teacher(figures: dict[tuple[str, str], np.ndarray]) -> None:
    """A bound on regressions; the figures on all of Kodak are in the model card."""
    psnr, structure, lpips = figures["taesd", "lite"] - figures["taesd", "taesd"]
    assert psnr > -1.2
    assert structure > -0.05
    assert lpips < 0.08


def test_other_decoders_show_what_the_encoder_gives(figures: dict[tuple[str, str], np.ndarray]) -> None:
    psnr, structure, _ = figures["lite", "taesd"] - figures["taesd", "taesd"]
    assert psnr > -0.8
    assert structure > -0.04


def test_the_picture_of_small_before_coding(shared: Path) -> None:
    """A bound on regressions; the figures on all of Kodak are in the model card."""
    rows = []
    for name, box in CROPS.items():
        photo = np.asarray(Image.open(shared / f"data/kodak/{name}.png").convert("RGB").crop(box))
        image = decode_tiled(open_decoder("small", "clric"), load_encoder("small").encode(photo))
        pixels, decoded = to_tensor(photo), torch.from_numpy(image)[None]
        psnr = -10 * (decoded - pixels).square().mean().log10()
        rows.append((float(psnr), float(ms_ssim(decoded, structure(pixels)))))
    psnr, structural = np.mean(rows, 0)
    assert psnr > 24.2
    assert structural > 0.92
