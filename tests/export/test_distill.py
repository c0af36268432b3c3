"""Distillation: its losses against independent computation, runs that stop and go on, and what it leaves."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from clric_decoder.autoencoder import decode_image, decode_tiled, open_decoder
from clric_decoder.errors import ClricError, ModelError
from clric_encoder.autoencoder import load_encoder
from clric_encoder.networks import SmallDecoder, lite_encoder, load_decoder_network
from clric_encoder.training.distortion import flat_areas, flatness_loss, ms_ssim, structure
from clric_export import distill as distillation
from clric_export.cli import command
from clric_export.distill import Photos, Settings, distill, train_decoder
from clric_export.losses import Lpips
from clric_export.muon import Muon
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
    decoder, encoder = SmallDecoder(4), lite_encoder(4)
    assert mac_per_pixel(decoder, torch.zeros(1, 4, 8, 8), 64 * 64) <= 20_000
    assert mac_per_pixel(encoder, torch.zeros(1, 3, 64, 64), 64 * 64) <= 60_000
    assert sum(p.numel() for p in decoder.parameters()) < 950_000


def test_ms_ssim_is_the_published_measure() -> None:
    """Against the definition, computed window by window in float64; of windows, every second along each axis."""
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
        result *= ((contrast * luminance) if scale == 4 else contrast)[:, :, ::2, ::2].mean((2, 3)) ** weight
        x, y = (z.reshape(2, 3, z.shape[2] // 2, 2, z.shape[3] // 2, 2).mean((3, 5)) for z in (x, y))
    measured = ms_ssim(torch.from_numpy(a).float(), structure(torch.from_numpy(b).float())).numpy()
    assert measured.mean() == pytest.approx(result.mean(), abs=1e-5)
    # Image by image beside weights that add up to 1, which the published ones do but for 0.0001
    assert measured == pytest.approx((result ** (1 / 1.0001)).mean(1), abs=1e-5)


def test_a_mesh_costs_where_the_photo_is_flat() -> None:
    flat, busy = torch.full((1, 3, 64, 64), 0.5), torch.rand(1, 3, 64, 64)
    mesh = 0.01 * (torch.arange(64) % 2 * 2 - 1).expand(64, 64)
    assert flatness_loss(flat, flat_areas(flat)) == 0
    assert flatness_loss(flat + mesh, flat_areas(flat)).item() == pytest.approx(0.02, rel=1e-3)  # along one axis
    assert flatness_loss(busy + mesh, flat_areas(busy)) < 1e-6


def test_lpips_of_a_known_pair(shared: Path) -> None:
    """TAESD's kodim23, measured with another implementation (design/facts.md): 0.050."""
    lpips = Lpips(shared / "metrics")
    photo = np.asarray(Image.open(shared / "data/kodak/kodim23.png").convert("RGB"))
    latent = load_encoder("taesd", shared / "models").encode(photo)
    pixels = torch.from_numpy(photo.copy()).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        image = load_decoder_network("taesd", shared / "models").module(torch.from_numpy(latent)[None])
        assert lpips(image, pixels).item() == pytest.approx(0.050, abs=0.002)
        assert lpips(pixels, pixels).item() == 0


def test_lpips_without_its_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not contain LPIPS weights"):
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
        pixels.resize((820, 240) if i == 0 else (200, 192), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def finished(teacher: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """The folder of a run of four iterations, and the files that it left."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, distill("taesd", photos, folder, iterations=4, models=teacher)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    teacher: Path,
    photos: Path,
    finished: tuple[Path, list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distillation, "CHECKPOINT_EVERY", 2)

    def stop(line: str) -> None:
        if line.startswith('decoder: {"iteration": 2'):
            raise KeyboardInterrupt

    _, straight = finished
    with pytest.raises(KeyboardInterrupt):
        distill("taesd", photos, tmp_path / "stopped", iterations=4, models=teacher, report=stop)
    resumed = distill("taesd", photos, tmp_path / "stopped", iterations=4, models=teacher)
    for one, other in zip(straight, resumed, strict=True):
        if one.suffix != ".json":
            assert one.read_bytes() == other.read_bytes()
    log = [json.loads(line) for line in (tmp_path / "stopped/decoder/log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in log] == [2, 4]
    with pytest.raises(ModelError, match=r"checkpoint\.pt was made with different settings"):
        distill("taesd", photos, tmp_path / "stopped", iterations=6, models=teacher)

    # What it leaves is what the commands take, and stored in a quarter of the bytes.
    decoder, description, encoder = straight
    assert json.loads(description.read_text())["precision"] == "int8"
    assert decoder.stat().st_size < 0.3 * 4 * sum(p.numel() for p in SmallDecoder(4).parameters())
    image = np.asarray(Image.open(photos / "1.png"))
    latent = load_encoder(str(encoder)).encode(image)
    assert latent.shape == (4, 24, 25)
    image_decoder = open_decoder(decoder, "sd1")
    assert decode_image(image_decoder, latent, 200, 192).shape == (192, 200, 3)
    # Tiles with the manifest's halo are exact.
    latent = np.random.default_rng(0).standard_normal((4, 70, 40)).astype(np.float32)
    whole = decode_tiled(image_decoder, latent, 70 * 40)
    np.testing.assert_allclose(decode_tiled(image_decoder, latent, 1), whole, atol=1e-5)


def test_a_run_begins_with_the_weights_of_another(
    teacher: Path, photos: Path, finished: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    folder, files = finished
    before = [file.read_bytes() for file in files]
    # A run that learns nothing leaves what it began with.
    copies = distill("taesd", photos, tmp_path / "out", start=folder, iterations=0, models=teacher)
    assert [file.read_bytes() for file in copies] == before
    # What a folder itself holds goes first.
    again = distill("taesd", photos, folder, start=tmp_path / "nowhere", iterations=4, models=teacher)
    assert [file.read_bytes() for file in again] == before


@pytest.mark.parametrize("half", ["decoder", "encoder"])
@pytest.mark.parametrize("content", [None, b"damaged", {}, {"model": {}}])
def test_a_start_that_cannot_be_read_is_one_line(
    teacher: Path,
    photos: Path,
    finished: tuple[Path, list[Path]],
    half: str,
    content: object,
    tmp_path: Path,
) -> None:
    for part in ("decoder", "encoder"):
        (tmp_path / "start" / part).mkdir(parents=True)
        shutil.copy(finished[0] / part / "checkpoint.pt", tmp_path / "start" / part)
    path = tmp_path / "start" / half / "checkpoint.pt"
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    options = {"--photos": photos, "--output": tmp_path / "out", "--models": teacher, "--start": tmp_path / "start"}
    arguments = [str(argument) for option in options.items() for argument in option]
    result = CliRunner().invoke(command, ["distill", "taesd", *arguments], standalone_mode=False)
    assert result.return_value == 1
    # Before anything was computed, and the only line.
    assert result.output.count("\n") == 1
    assert str(path) in result.output


def test_the_teachers_image_is_kept_beside_the_photo(photos: Path, tmp_path: Path) -> None:
    """With averages of 8 x 8 pixels as latents, and squares of these colours as the teacher's images."""

    def encode(image: np.ndarray) -> np.ndarray:
        padded = np.pad(image, ((0, -image.shape[0] % 8), (0, -image.shape[1] % 8), (0, 0)), mode="edge")
        return padded.reshape(len(padded) // 8, 8, -1, 8, 3).mean((1, 3)).transpose(2, 0, 1).astype(np.float32)

    def decode(latent: np.ndarray) -> np.ndarray:
        return latent.repeat(8, 1).repeat(8, 2).transpose(1, 2, 0).round().astype(np.uint8)

    def never(array: np.ndarray) -> np.ndarray:
        raise AssertionError("it was there already")

    for functions in ((encode, decode), (never, never)):
        data = Photos(photos, "averages", *functions, tmp_path, None, "sd1", 0)
        assert (225, 768, 3) in {tuple(taught.shape) for taught in data.taught}
        assert [taught.shape for taught in data.taught] == [image.shape for image in data.images]
        latents, pixels, taught = data.batch(np.random.default_rng(0), 6, coded=0)
        assert pixels.shape == taught.shape == (6, 3, 192, 192)
        blocks = latents.repeat_interleave(8, 2).repeat_interleave(8, 3) / 255
        np.testing.assert_allclose(taught, blocks, atol=0.51 / 255)
        np.testing.assert_allclose(torch.nn.functional.avg_pool2d(pixels, 8), latents / 255, atol=0.1 / 255)


def test_the_teachers_image_is_its_decoders(teacher: Path, finished: tuple[Path, list[Path]]) -> None:
    image, latent = (np.load(path) for path in sorted((finished[0] / "latents").glob("0-*")))
    assert (image.shape, image.dtype) == ((225, 768, 3), np.uint8)
    with torch.inference_mode():
        painted = load_decoder_network("taesd", teacher).module(torch.from_numpy(latent)[None].float())
    np.testing.assert_allclose(image, 255 * painted[0].permute(1, 2, 0)[:225], atol=0.51)


def test_the_decoder_learns_from_the_photo_and_from_the_teacher(tmp_path: Path) -> None:
    """Photos of noise, of which a decoder can know how bright they are, and a teacher who paints a checkerboard."""
    board = np.indices((192, 192)).sum(0) % 2

    def learn(name: str, darkest: int, taught: np.ndarray) -> np.ndarray:
        random = np.random.default_rng(0)
        folder = tmp_path / name
        folder.mkdir()
        for i in range(9):
            Image.fromarray(random.integers(darkest, darkest + 128, (192, 192, 3), np.uint8)).save(folder / f"{i}.png")
        image = (255 * taught).astype(np.uint8)[..., None].repeat(3, 2)
        latent = np.zeros((4, 24, 24), np.float32)
        data = Photos(folder, name, lambda _: latent, lambda _: image, tmp_path / "latents", None, "sd1", 0)
        torch.manual_seed(0)
        decoder = SmallDecoder(4)
        train_decoder(decoder, data, Settings(4, crops=2), folder / "decoder", None, "cpu", lambda line: None)
        return decoder.eval()(torch.from_numpy(latent)[None]).detach().numpy()

    dark, bright, inverse = learn("dark", 0, board), learn("bright", 128, board), learn("inverse", 0, 1 - board)
    assert bright.mean() > dark.mean() + 0.02
    assert ((dark - inverse) * (2 * board - 1)).mean() > 0.005


def test_streams_of_the_photos_are_used(teacher: Path, photos: Path, tmp_path: Path, make_stream) -> None:
    (tmp_path / "coded").mkdir()
    for i in range(10):
        (tmp_path / f"coded/{i}.clric").write_bytes(make_stream(width=200, height=192))
    lines: list[str] = []
    arguments = {"streams": tmp_path, "iterations": 2, "models": teacher}
    distill("taesd", photos, tmp_path / "out", **arguments, report=lines.append)
    assert lines[0] == "10 photos (9 with streams)"  # the large photo was reduced, its stream was not


def test_too_few_photos_is_one_clear_error(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "small.png")
    with pytest.raises(ClricError, match="contains only 0 photos with sides of at least 192; hundreds are needed"):
        distill("taesd", tmp_path / "photos", tmp_path, models=teacher)
