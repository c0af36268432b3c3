"""Latents to images: tiles are invisible, memory is bounded, and wrong decoders or providers are refused."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from clric_decoder import autoencoder, decode, decode_latent
from clric_decoder.autoencoder import decode_image, decode_tiled, open_decoder
from clric_decoder.errors import ModelError

UNTILED = 1 << 40


@pytest.fixture(scope="session")
def taesd_models(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with TAESD's decoder, exported from the real weights."""
    folder = tmp_path_factory.mktemp("models")
    command = Path(sys.executable).with_name("clric-export")
    subprocess.run([command, "taesd", "-o", folder, "--models", shared / "models", "--fp32"], check=True)
    return folder


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(4, height, width)).astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 1), (40, 57), (16, 300), (300, 5), (101, 97)])
def test_tiles_are_invisible(toy_models: Path, shape: tuple[int, int]) -> None:
    decoder = open_decoder("toy", "sd1", models=toy_models)
    latent = noise(*shape)
    whole = decode_tiled(decoder, latent, UNTILED)
    assert whole.shape == (3, 8 * shape[0], 8 * shape[1])
    for positions in (1, 300, 1000):
        np.testing.assert_allclose(decode_tiled(decoder, latent, positions), whole, atol=1e-5)


def test_a_smaller_halo_than_the_reach_would_show(toy_models: Path) -> None:
    """The test above would notice a wrong halo."""
    decoder = dataclasses.replace(open_decoder("toy", "sd1", models=toy_models), halo=2)
    latent = noise(101, 97)
    difference = np.abs(decode_tiled(decoder, latent, 1000) - decode_tiled(decoder, latent, UNTILED))
    assert difference.max() > 1e-3


def test_global_attention_is_blended_without_seams(toy_models: Path) -> None:
    """Without a finite halo the tiles fade: what they agree on comes out whole, at every pixel."""
    decoder = dataclasses.replace(open_decoder("toy", "sd1", models=toy_models), halo=None)
    latent = noise(150, 170)
    whole = decode_tiled(decoder, latent, UNTILED)
    tiled = decode_tiled(decoder, latent, 5000)
    # The toy's reach is 3, and a tile's outermost pixels weigh next to nothing.
    assert np.abs(tiled - whole).max() < 0.1
    constant = decode_tiled(decoder, np.zeros((4, 150, 170), np.float32), 5000)
    np.testing.assert_allclose(constant, 0.5, atol=1e-6)


def test_tiles_stay_under_the_limit_and_cover_everything() -> None:
    for height, width in [(171, 256), (64, 96), (3, 8192), (8192, 1), (500, 500), (64, 1000)]:
        for halo in (0, 3, 19):
            rows, columns = autoencoder._tiling(height, width, halo, 12_288)
            tile = autoencoder._strip_length(height, rows, halo) * autoencoder._strip_length(width, columns, halo)
            assert tile <= 12_288
            for length, count in ((height, rows), (width, columns)):
                total = np.zeros(8 * length)
                for start, stop, weight in autoencoder._strips(length, count, halo, blend=False):
                    total[8 * start : 8 * stop] += weight
                assert (total == 1).all()


def test_image_is_cut_to_its_size_and_rounded(toy_models: Path, make_stream: Callable[..., bytes]) -> None:
    data = make_stream(width=45, height=33)
    image = decode(data, vae="toy", models=toy_models)
    assert image.shape == (33, 45, 3)
    assert image.dtype == np.uint8
    decoder = open_decoder("toy", "sd1", models=toy_models)
    whole = decode_tiled(decoder, decode_latent(data))
    np.testing.assert_array_equal(image, np.rint(whole * 255)[:, :33, :45].transpose(1, 2, 0))
    np.testing.assert_array_equal(image, decode_image(decoder, decode_latent(data), 45, 33))


def test_decoder_of_another_space_is_refused(toy_models: Path, make_stream: Callable[..., bytes]) -> None:
    with pytest.raises(ModelError, match="toy is of latent space sd1, the stream is of sdxl"):
        decode(make_stream(space="sdxl"), vae="toy", models=toy_models)


def test_custom_space_has_no_default_decoder() -> None:
    data = (Path(__file__).parents[1] / "conformance/valid/function-7-in-custom-space.clric").read_bytes()
    with pytest.raises(ModelError, match="no default decoder for the latent space custom-0"):
        decode(data)


@pytest.mark.parametrize("provider", ["cuda", "openvino", "warp"])
def test_missing_provider_names_those_that_are_there(toy_models: Path, provider: str) -> None:
    import onnxruntime

    if autoencoder.PROVIDERS.get(provider) in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime has {provider}")
    with pytest.raises(ModelError, match=f"provider '{provider}' is not available in .*available: auto, cpu"):
        open_decoder("toy", "sd1", models=toy_models, provider=provider)


def test_file_that_is_no_network_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"this is no network")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = {"name": "broken", "latent_space": "sd1", "channels": 4, "halo": 3, "sha256": digest}
    path.with_suffix(".json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match="onnxruntime cannot open it") as caught:
        open_decoder(path, "sd1")
    assert "\n" not in str(caught.value)


def test_image_that_is_not_finite_is_refused(toy_models: Path) -> None:
    decoder = open_decoder("toy", "sd1", models=toy_models)
    with pytest.raises(ModelError, match="NaN or infinite"):
        decode_image(decoder, np.full((4, 2, 2), np.nan, np.float32), 16, 16)


def test_latent_of_the_wrong_channels_is_one_line(toy_models: Path) -> None:
    decoder = open_decoder("toy", "sd1", models=toy_models)
    with pytest.raises(ModelError, match="the image decoder failed") as caught:
        decode_tiled(decoder, np.zeros((16, 4, 4), np.float32))
    assert "\n" not in str(caught.value)


def test_taesd_in_tiles_is_taesd(taesd_models: Path) -> None:
    """Its reach is 18.1 latents: with the manifest's halo the tiles must not show at all."""
    decoder = open_decoder("taesd", "sd1", models=taesd_models)
    latent = noise(50, 140)
    tiles = decode_tiled(decoder, latent, 5776)
    assert autoencoder._tiling(50, 140, 19, 5776) != (1, 1)
    assert np.abs(tiles - decode_tiled(decoder, latent, UNTILED)).max() < 1e-4


# VmHWM, not getrusage: the latter begins with the peak of the process that started it
PEAK = """
import sys
import numpy as np
from clric_decoder.autoencoder import decode_image, open_decoder
latent = np.random.default_rng(1).normal(size=(4, 171, 256)).astype(np.float32)
image = decode_image(open_decoder("taesd", "sd1", models=sys.argv[1]), latent, 2048, 1363)
assert image.shape == (1363, 2048, 3)
print(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024)
"""


@pytest.mark.slow
def test_peak_memory_of_a_large_image(taesd_models: Path) -> None:
    result = subprocess.run([sys.executable, "-c", PEAK, taesd_models], check=True, capture_output=True)
    assert float(result.stdout) < 1200  # MB of the whole process; 3000 in one piece
