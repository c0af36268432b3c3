"""A real photo through the commands, with real weights: file in, file out, and the same bytes twice."""

from pathlib import Path

import numpy as np
import pytest
from clric_decoder import ModelError, decode, read_header
from clric_encoder.networks import load_decoder_network
from clric_export.onnx import write_network
from diffusers import AutoencoderKL
from PIL import Image

SIDE = 128


@pytest.fixture(scope="module")
def photo(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A crop of a photo."""
    path = tmp_path_factory.mktemp("photo") / "parrot.png"
    image = Image.open(shared / "data/kodak/kodim23.png")
    image.crop((400, 100, 400 + SIDE, 100 + SIDE)).save(path)
    return path


@pytest.fixture(scope="module")
def decoders(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ONNX decoders: TAESD's, TAESDXL's, and one of Stable Diffusion v1.4's shape, random and narrow."""
    folder = tmp_path_factory.mktemp("decoders")
    for name in ("taesd", "taesdxl"):
        write_network(load_decoder_network(name, shared / "models"), folder, "fp32")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=2,
        latent_channels=4,
    ).save_pretrained(folder / "sd14")
    write_network(load_decoder_network("sd14", folder), folder, "fp32")
    return folder


def test_photo_there_and_back(run, photo: Path, decoders: Path, shared: Path, tmp_path: Path) -> None:
    models = ("--models", str(shared / "models"))
    for name in ("first", "second"):
        done = run("clric-enc", photo, "-o", f"{name}.clric", "--vae", "taesd", "--quality", "60", *models)
        assert done.returncode == 0, done.stderr
    data = (tmp_path / "first.clric").read_bytes()
    assert data == (tmp_path / "second.clric").read_bytes()
    assert read_header(data).bpp < 0.5

    done = run("clric-dec", "first.clric", "-o", "back.png", "--models", str(decoders))
    assert done.returncode == 0, done.stderr
    original, back = (np.asarray(Image.open(path).convert("RGB"), float) for path in (photo, tmp_path / "back.png"))
    assert 10 * np.log10(255**2 / np.square(original - back).mean()) > 18

    # The same stream through another decoder of its latent space, and not through one of another space
    assert decode(data, vae="sd14", models=decoders).shape == (SIDE, SIDE, 3)
    with pytest.raises(ModelError, match=r"taesdxl is of latent space sdxl, the stream is of sd1"):
        decode(data, vae="taesdxl", models=decoders)
