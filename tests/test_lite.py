"""The autoencoder that comes with clric: a fresh machine without a network needs nothing else."""

import os
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from clric_decoder import decode, read_header
from clric_decoder.autoencoder import decode_tiled, open_decoder
from clric_encoder.autoencoder import load_encoder
from clric_encoder.networks import load_decoder_network
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


def test_it_is_small() -> None:
    assert files("clric_decoder").joinpath("weights/lite.onnx").stat().st_size <= 1_000_000
    assert files("clric_encoder").joinpath("weights/lite_encoder.safetensors").stat().st_size <= 2_000_000


def test_a_fresh_machine_without_a_network(run, tmp_path: Path) -> None:
    y, x = np.mgrid[:96, :128]
    photo = np.stack([x * 1.9, 120 + 100 * np.sin(x / 12) * np.cos(y / 9), 250 - y * 2], -1).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    for command in (("clric-enc", "photo.png"), ("clric-dec", "photo.clric", "-o", "back.png")):
        done = run(*command)
        assert done.returncode == 0, done.stderr
    assert read_header((tmp_path / "photo.clric").read_bytes()).space == "sd1"
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


def test_tiles_are_exact() -> None:
    decoder = open_decoder(None, "sd1")
    latent = np.random.default_rng(0).standard_normal((4, 75, 33)).astype(np.float32)
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
                images["lite"] = torch.from_numpy(decode_tiled(lite, latent)).permute(2, 0, 1)[None]
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
