"""Distillation: its losses against independent computation, runs that stop and go on, and what it leaves."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from clric_decoder.autoencoder import decode_image, decode_tiled, open_decoder
from clric_decoder.errors import ClricError, ModelError
from clric_encoder.autoencoder import load_encoder
from clric_export import distill as distillation
from clric_export.distill import distill
from clric_export.losses import Lpips, flatness_loss, ms_ssim
from clric_export.muon import Muon
from clric_export.small import SmallDecoder, small_encoder
from clric_export.sources import load_decoder
from diffusers import AutoencoderTiny
from PIL import Image


def mac_per_pixel(network: torch.nn.Module, example: torch.Tensor, pixels: int) -> float:
    """Multiply-accumulates of the convolutions over the image's pixels."""
    total = 0

    def count(layer: torch.nn.Conv2d, _: object, output: torch.Tensor) -> None:
        nonlocal total
        total += layer.weight.numel() * output.shape[2] * output.shape[3]

    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(count)
    with torch.inference_mode():
        network(example)
    return total / pixels


def test_complexity() -> None:
    decoder, encoder = SmallDecoder(4), small_encoder(4)
    assert mac_per_pixel(decoder, torch.zeros(1, 4, 8, 8), 64 * 64) <= 20_000
    assert mac_per_pixel(encoder, torch.zeros(1, 3, 64, 64), 64 * 64) <= 60_000
    assert sum(p.numel() for p in decoder.parameters()) < 950_000


def test_ms_ssim_is_the_published_measure() -> None:
    """Against the definition, computed window by window in float64."""
    random = np.random.default_rng(0)
    a = random.random((2, 3, 192, 224))
    b = np.clip(a + 0.2 * random.standard_normal(a.shape), 0, 1)
    b[0] = a[0] * 0.7
    window = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2

    def blur(x: np.ndarray) -> np.ndarray:
        return np.einsum("nchwij,ij->nchw", np.lib.stride_tricks.sliding_window_view(x, (11, 11), (2, 3)), window)

    result, x, y = np.ones((2, 3)), a, b
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        mx, my = blur(x), blur(y)
        sx, sy, sxy = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
        contrast = (2 * sxy + 0.03**2) / (sx + sy + 0.03**2)
        luminance = (2 * mx * my + 0.01**2) / (mx**2 + my**2 + 0.01**2)
        result *= ((contrast * luminance) if scale == 4 else contrast).mean((2, 3)) ** weight
        x, y = (z.reshape(2, 3, z.shape[2] // 2, 2, z.shape[3] // 2, 2).mean((3, 5)) for z in (x, y))
    measured = ms_ssim(torch.from_numpy(a).float(), torch.from_numpy(b).float()).item()
    assert measured == pytest.approx(result.mean(), abs=1e-5)


def test_a_mesh_costs_where_the_photo_is_flat() -> None:
    flat, busy = torch.full((1, 3, 64, 64), 0.5), torch.rand(1, 3, 64, 64)
    mesh = 0.01 * (torch.arange(64) % 2 * 2 - 1).expand(64, 64)
    assert flatness_loss(flat, flat) == 0
    assert flatness_loss(flat + mesh, flat) == pytest.approx(0.02, rel=1e-3)  # along one axis
    assert flatness_loss(busy + mesh, busy) < 1e-6


def test_lpips_of_a_known_pair(shared: Path) -> None:
    """TAESD's kodim23, measured with another implementation (design/facts.md): 0.050."""
    lpips = Lpips(shared / "metrics")
    photo = np.asarray(Image.open(shared / "data/kodak/kodim23.png").convert("RGB"))
    latent = load_encoder("taesd", shared / "models").encode(photo)
    pixels = torch.from_numpy(photo.copy()).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        image = load_decoder("taesd", shared / "models").module(torch.from_numpy(latent)[None])
        assert lpips(image, pixels).item() == pytest.approx(0.050, abs=0.002)
        assert lpips(pixels, pixels).item() == 0


def test_lpips_without_its_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no LPIPS weights"):
        Lpips(tmp_path)


def test_muon_steps_are_orthogonal() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(16, 24, 3)
    before = layer.weight.detach().clone()
    layer(torch.randn(2, 16, 8, 8)).square().sum().backward()
    Muon(layer.parameters(), lr=0.1).step()
    step = (before - layer.weight.detach()).flatten(1) / (0.1 * 0.2 * 144**0.5)
    singular = torch.linalg.svdvals(step)
    assert singular.min() > 0.5
    assert singular.max() < 1.5


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random TAESD."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher")
    AutoencoderTiny().save_pretrained(folder / "taesd")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ten smooth images, one larger than what training uses."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for i in range(10):
        pixels = Image.fromarray(random.integers(0, 256, (6, 6, 3), np.uint8))
        pixels.resize((820, 240) if i == 0 else (200, 184), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    teacher: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "CHECKPOINT_EVERY", 2)

    def stop(line: str) -> None:
        if line.startswith('decoder: {"iteration": 2'):
            raise KeyboardInterrupt

    straight = distill("taesd", photos, tmp_path / "straight", iterations=4, models=teacher)
    with pytest.raises(KeyboardInterrupt):
        distill("taesd", photos, tmp_path / "stopped", iterations=4, models=teacher, report=stop)
    resumed = distill("taesd", photos, tmp_path / "stopped", iterations=4, models=teacher)
    for one, other in zip(straight, resumed, strict=True):
        if one.suffix != ".json":
            assert one.read_bytes() == other.read_bytes()
    log = [json.loads(line) for line in (tmp_path / "stopped/decoder/log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in log] == [2, 4]
    with pytest.raises(ModelError, match=r"checkpoint\.pt is of a run with other settings"):
        distill("taesd", photos, tmp_path / "stopped", iterations=6, models=teacher)

    # What it leaves is what the commands take, and stored in a quarter of the bytes.
    decoder, description, encoder = straight
    assert json.loads(description.read_text())["precision"] == "int8"
    assert decoder.stat().st_size < 0.3 * 4 * sum(p.numel() for p in SmallDecoder(4).parameters())
    image = np.asarray(Image.open(photos / "1.png"))
    latent = load_encoder(str(encoder)).encode(image)
    assert latent.shape == (4, 23, 25)
    painter = open_decoder(decoder, "sd1")
    assert decode_image(painter, latent, 200, 184).shape == (184, 200, 3)
    # Tiles with the manifest's halo are exact.
    latent = np.random.default_rng(0).standard_normal((4, 70, 40)).astype(np.float32)
    whole = decode_tiled(painter, latent, 70 * 40)
    np.testing.assert_allclose(decode_tiled(painter, latent, 1), whole, atol=1e-5)


def test_streams_of_the_photos_are_used(teacher: Path, photos: Path, tmp_path: Path, make_stream) -> None:
    (tmp_path / "coded").mkdir()
    for i in range(10):
        (tmp_path / f"coded/{i}.clric").write_bytes(make_stream(width=200, height=184))
    lines: list[str] = []
    arguments = {"streams": tmp_path, "iterations": 2, "models": teacher}
    distill("taesd", photos, tmp_path / "out", **arguments, report=lines.append)
    assert lines[0] == "10 photos, 9 streams of them"  # the large photo was reduced, its stream was not


def test_too_few_photos_is_one_clear_error(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ClricError, match="holds 0 photos with sides of at least 176: hundreds are needed"):
        distill("taesd", teacher, tmp_path, models=teacher)
