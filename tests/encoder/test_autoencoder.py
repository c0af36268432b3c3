"""Image to latent: real weights of the TAESD family, AutoencoderKL with seeded random ones."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from clric_decoder.errors import ModelError
from clric_decoder.models import AUTOENCODERS, LATENT_SPACES, file_sha256
from clric_encoder import autoencoder, networks, tiling
from clric_encoder.autoencoder import load_encoder
from clric_encoder.tiling import in_tiles
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image

TINY = [name for name, entry in AUTOENCODERS.items() if entry.kind == "tiny"]
REDUCED_KL = {
    "block_out_channels": [64, 64, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 1,
}


@pytest.fixture(scope="module")
def photo(shared: Path) -> np.ndarray:
    """A Kodak photo, 512 x 768 x 3."""
    return np.array(Image.open(next((shared / "data/kodak").glob("*23*"))).convert("RGB"))


@pytest.fixture(scope="module")
def kl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random AutoencoderKL as sd14."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    AutoencoderKL(**REDUCED_KL).save_pretrained(folder / "sd14")
    return folder


@pytest.mark.parametrize("name", TINY)
def test_latent_has_the_space_s_shape_and_spread(name: str, shared: Path, photo: np.ndarray) -> None:
    encoder = load_encoder(name, shared / "models")
    latent = encoder.encode(photo[:256, :384])
    assert (encoder.name, encoder.space) == (name, AUTOENCODERS[name].space)
    assert latent.shape == (LATENT_SPACES[encoder.space].channels, 32, 48)
    assert latent.dtype == np.float32
    assert 0.4 < latent.std() < 1.6


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (8, 17), (1, 100)])
def test_odd_sizes_are_continued_by_their_edges(size: tuple[int, int], shared: Path, photo: np.ndarray) -> None:
    encoder = load_encoder("taesd", shared / "models")
    height, width = size
    latent = encoder.encode(photo[:height, :width])
    rows = np.minimum(np.arange(latent.shape[1] * 8), height - 1)
    columns = np.minimum(np.arange(latent.shape[2] * 8), width - 1)
    assert latent.shape[1:] == (-(-height // 8), -(-width // 8))
    np.testing.assert_array_equal(latent, encoder.encode(photo[rows][:, columns]))


def test_diffusers_layout_gives_the_same_latent(shared: Path, photo: np.ndarray, tmp_path: Path) -> None:
    """The files of the hub and the family's own ones differ in layout and input range, not in the latent."""
    weights = networks._read_weights(shared / "models/taesd/taesd_encoder.safetensors")
    vae = AutoencoderTiny()
    vae.encoder.layers.load_state_dict(weights)
    vae.save_pretrained(tmp_path / "taesd")
    image = photo[:64, :96]
    latent = load_encoder("taesd", tmp_path).encode(image)
    np.testing.assert_array_equal(latent, load_encoder("taesd", shared / "models").encode(image))
    with torch.inference_mode():
        theirs = vae.encode(torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1).latents[0]
    np.testing.assert_allclose(latent, theirs, atol=1e-4)


@pytest.mark.parametrize("name", ["taesd", "taef2"])
@pytest.mark.parametrize("shape", [(280, 360), (136, 640)])
def test_tiles_change_nothing(
    name: str, shape: tuple[int, int], shared: Path, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = photo[: shape[0], : shape[1]]
    encoder = load_encoder(name, shared / "models")
    whole = encoder.encode(image)
    monkeypatch.setattr(autoencoder, "_TINY_PIXELS", 264 * 264)
    assert tiling._grid(shape[0] // 8, shape[1] // 8, 9, 33 * 33) != (1, 1)
    np.testing.assert_allclose(encoder.encode(image), whole, atol=2e-5)


def test_a_halo_one_latent_smaller_would_not_do(
    shared: Path, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exactness above is the halo's doing."""
    whole = load_encoder("taesd", shared / "models").encode(photo[:280, :360])
    monkeypatch.setattr(autoencoder, "_TINY_PIXELS", 264 * 264)
    monkeypatch.setattr(autoencoder, "_TINY_HALO", 4)
    tiled = load_encoder("taesd", shared / "models").encode(photo[:280, :360])
    assert np.abs(tiled - whole).max() > 1e-3


@pytest.mark.parametrize("limit", [60 * 60, 75 * 75, 128 * 128])
@pytest.mark.parametrize("size", [(1, 1), (63, 3750), (3750, 63), (171, 256), (2000, 2000)])
def test_tiles_stay_within_the_limit(size: tuple[int, int], limit: int) -> None:
    h, w = size
    rows, columns = tiling._grid(h, w, 16, limit)
    tallest = min(h, -(-h // rows) + 32)
    widest = min(w, -(-w // columns) + 32)
    assert tallest * widest <= limit
    assert list(tiling._spans(h, rows))[-1][1] == h


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "megabytes"), [((1365, 2048), 900), ((500, 30_000), 1100)])
def test_big_images_take_little_memory(shape: tuple[int, int], megabytes: int, shared: Path) -> None:
    code = (
        "import sys, numpy as np\n"
        "from clric_encoder.autoencoder import load_encoder\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) >> 10\n"
        "encoder = load_encoder('taesd', sys.argv[1])\n"
        "image = np.random.default_rng(0).integers(0, 256, eval(sys.argv[2]) + (3,), dtype=np.uint8)\n"
        "before = peak(); print(encoder.encode(image).shape); print(peak() - before)"
    )
    command = [sys.executable, "-c", code, str(shared / "models"), repr(shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    latent_shape, growth = done.stdout.splitlines()
    assert latent_shape == f"(4, {-(-shape[0] // 8)}, {-(-shape[1] // 8)})"
    assert int(growth) < megabytes


def test_kl_gives_the_scaled_mean(kl_folder: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    encoder = load_encoder("sd14", kl_folder)
    latent = encoder.encode(image)
    vae = AutoencoderKL.from_pretrained(kl_folder / "sd14", low_cpu_mem_usage=False)
    with torch.inference_mode():
        mean = vae.encode(torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1).latent_dist.mean[0]
    assert encoder.space == "sd1"
    np.testing.assert_allclose(latent, mean.numpy() * 0.18215, atol=1e-5)
    assert load_encoder("sd14", kl_folder).encode(image[:1, :1]).shape == (4, 1, 1)


def test_kl_encodes_big_images_in_tiles(kl_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).integers(0, 256, (136, 480, 3), dtype=np.uint8)
    whole = load_encoder("sd14", kl_folder).encode(image)
    monkeypatch.setattr(autoencoder, "_KL_PIXELS", 136 * 384)
    tiled = load_encoder("sd14", kl_folder).encode(image)
    assert not np.array_equal(tiled, whole)
    np.testing.assert_allclose(tiled, whole, atol=0.2 * whole.std())


def means(pixels: np.ndarray) -> np.ndarray:
    """Of 8 x 8 pixels: [1, 3, H, W] -> [1, 3, H / 8, W / 8]."""
    height, width = pixels.shape[2:]
    return pixels.reshape(1, 3, height // 8, 8, width // 8, 8).mean((3, 5))


def test_blended_tiles_are_exact_where_the_network_is_local() -> None:
    image = np.random.default_rng(0).integers(0, 256, (320, 640, 3), dtype=np.uint8)
    result = in_tiles(means, image, 16, 360 * 360, blend=True)
    np.testing.assert_allclose(result, means(image.transpose(2, 0, 1)[None] / 255), atol=1e-6)


def test_blended_tiles_have_no_seams_where_the_network_is_not_local() -> None:
    """As GroupNorm does, this network gives every tile of a ramp a level of its own."""
    ramp = np.linspace(0, 255, 640).astype(np.uint8)
    image = np.broadcast_to(ramp[None, :, None], (320, 640, 3))

    def steepest(blend: bool) -> float:
        result = in_tiles(lambda x: means(x - x.mean()), image, 16, 360 * 360, blend=blend)
        return float(np.abs(np.diff(result, axis=3)).max())

    assert steepest(blend=True) < 0.05
    assert steepest(blend=False) > 0.15


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((0, 8, 3), np.uint8),
    ],
)
def test_what_is_no_image_is_refused(image: np.ndarray, kl_folder: Path) -> None:
    with pytest.raises(ValueError, match="an image is H x W x 3 uint8, got"):
        load_encoder("sd14", kl_folder).encode(image)


@pytest.mark.parametrize("file", ["taesd_encoder.safetensors", "taesd_encoder.pth"])
def test_damaged_weights_are_one_clear_error(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"\x00" * 1000)
    with pytest.raises(ModelError, match=f"{file} cannot be read as weights") as caught:
        load_encoder("taesd", tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_are_refused(shared: Path, kl_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "taesd3_encoder.safetensors").symlink_to(shared / "models/taesd/taesd_encoder.safetensors")
    with pytest.raises(ModelError, match=r"taesd3_encoder\.safetensors is not a valid encoder of taesd3"):
        load_encoder("taesd3", tmp_path)
    AutoencoderKL(**{**REDUCED_KL, "latent_channels": 16}).save_pretrained(tmp_path / "sd14")
    with pytest.raises(ModelError, match="16 latent channels, sd14 has 4"):
        load_encoder("sd14", tmp_path)


def test_missing_weights_that_no_hub_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLRIC_MODELS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        load_encoder("taef2", tmp_path)
    message = str(caught.value)
    for part in (
        "the encoder weights of taef2 are missing",
        "put taef2_encoder.pth from https://github.com/",
    ):
        assert part in message
    assert "Hugging Face" not in message


LOAD_FROM_HUB = """
import dataclasses, sys
from clric_decoder.errors import ModelError
from clric_decoder.models import AUTOENCODERS
from clric_encoder.networks import load_encoder_network

name, expected = sys.argv[1:]
if expected:
    AUTOENCODERS[name] = dataclasses.replace(AUTOENCODERS[name], hub_sha256=expected)
try:
    print(next(load_encoder_network(name).module.parameters()).flatten()[0].item())
except ModelError as error:
    print(error)
"""


def test_the_hub_s_files_are_of_one_commit_and_checked(tmp_path: Path) -> None:
    """The hub's cache stands for the hub. In processes of their own: its client reads the environment on import."""
    repository = tmp_path / "hub/models--madebyollin--taesd"
    first_weights, sums = {}, {}
    pinned, other = str(AUTOENCODERS["taesd"].hub_revision), "0" * 40
    for revision in (pinned, other):
        vae = AutoencoderTiny()
        vae.save_pretrained(repository / "snapshots" / revision)
        first_weights[revision] = f"{next(vae.encoder.layers.parameters()).flatten()[0].item()}\n"
        sums[revision] = file_sha256(repository / "snapshots" / revision / "diffusion_pytorch_model.safetensors")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(other)

    def load(name: str, expected: str = "") -> str:
        environment = {k: v for k, v in os.environ.items() if k != "CLRIC_MODELS"}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        command = [sys.executable, "-c", LOAD_FROM_HUB, name, expected]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    assert load("taesd", sums[pinned]) == first_weights[pinned]
    message = load("taesd")
    assert message.count("\n") == 1
    assert f"does not match madebyollin/taesd at {pinned} (sha256 {sums[pinned][:16]}, expected db169d69" in message
    assert load("taesd@main") == load(f"madebyollin/taesd@{other}") == first_weights[other]
    missing = load("taesd@" + "1" * 40)
    assert missing.startswith("the encoder weights of taesd are missing: ")
    assert missing.endswith(f"--revision {'1' * 40}\n")
    assert load("taesd@").startswith("taesd@ has no revision after the @")
    # Without a sum that is known, only what the user names
    vae.save_pretrained(
        tmp_path / "hub/models--CompVis--stable-diffusion-v1-4/snapshots" / AUTOENCODERS["sd14"].hub_revision / "vae"
    )
    message = load("sd14")
    assert message.startswith("the encoder weights of sd14 are missing: ")
    assert "no SHA-256 of its weights is known: sd14@133a221b" in message
    assert "no SHA-256" not in load("sd14@133a221b8aa7292a167afc5127cb63fb5005638b")
    assert load("taef2@main") == "taef2 is not loaded from the Hugging Face hub, so it has no revision 'main'\n"


def test_missing_weights_are_one_clear_error(tmp_path: Path) -> None:
    """In a process of its own: the hub's client reads its environment when it is imported."""
    code = (
        "import sys\n"
        "from clric_decoder.errors import ModelError\n"
        "from clric_encoder.autoencoder import load_encoder\n"
        "try: load_encoder('sd14', sys.argv[1])\n"
        "except ModelError as error: print(error)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "CLRIC_MODELS"}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith("the encoder weights of sd14 are missing: no sd14/{config.json")
    for part in (
        str(tmp_path),
        "Hugging Face hub",
        "hf download CompVis/stable-diffusion-v1-4 vae/config.json",
        "--revision 133a221b8aa7292a167afc5127cb63fb5005638b",
    ):
        assert part in done.stdout
