"""Preset instant: a stream without training, without torch, and without networks of its own."""

import warnings
from functools import partial
from itertools import pairwise
from pathlib import Path

import clric
import matplotlib
import numpy as np
import pytest
from clric_decoder import ClricError, ModelError, decode, decode_latent, read_header
from clric_decoder.bitstream import WITH_NETWORKS, registered_architecture
from clric_decoder.context import predict
from clric_decoder.entropy import ideal_bits
from clric_decoder.synthesis import synthesize
from clric_encoder import instant
from clric_encoder.instant import encode_instantly, load_encoder, round_by_rate
from commands import loaded_modules
from conftest import Run
from PIL import Image


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """A face, 256 x 224."""
    photo = Image.open(Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg"))
    return np.asarray(photo.crop((130, 20, 386, 244)))


def test_more_lambda_is_fewer_bytes_and_more_error(picture: np.ndarray) -> None:
    latent = load_encoder("small").encode(picture)
    points = []
    for lmbda in (0.03, 0.1, 0.3, 1, 3, 10, 100):
        data = encode_instantly(picture, lmbda=lmbda)
        header = read_header(data)
        assert (header.space, header.network_bytes) == ("clric", 0)
        assert header.function in WITH_NETWORKS
        points.append((len(data), float(np.square(decode_latent(data) - latent).mean())))
    for (size, error), (smaller, worse) in pairwise(points):
        assert smaller < size
        assert worse > error
    assert decode(data).shape == picture.shape


def test_sizes_are_met(picture: np.ndarray) -> None:
    for size in (200, 400, 800):
        data = encode_instantly(picture, size=size)
        assert 0.85 * size <= len(data) <= size
    for encode in (encode_instantly, partial(clric.encode, preset="instant")):
        with pytest.warns(UserWarning, match="target of 10 bytes not reached: the minimum size is") as warned:
            encode(picture, size=10.0)
        assert [own.filename for own in warned] == [__file__]
    with pytest.warns(UserWarning, match="target of 100000 bytes not reached: quality saturates at"):
        encode_instantly(picture, size=100_000)


def test_rounding_by_the_rate_costs_less_than_rounding(picture: np.ndarray) -> None:
    """The loss that it is to lower: squared error of the latent + lambda * bits."""
    architecture = registered_architecture(instant.FUNCTIONS[0])
    latent = load_encoder("small").encode(picture)
    for number, lmbda in ((2, 1.0), (5, 0.1)):
        networks = instant._set(instant.FUNCTIONS[number])
        price = lmbda / picture[..., 0].size * latent.size

        def loss(grid: np.ndarray, networks=networks, price=price) -> float:
            error = np.square(synthesize([grid], networks.networks, architecture) - latent).sum()
            return float(error + price * ideal_bits(*predict(grid, networks.arm, architecture)).sum())

        plain = np.einsum("ij,jyx->iyx", networks.inverse, latent - networks.bias[:, None, None])
        by_rate = round_by_rate(latent, networks, architecture, price)
        assert loss(by_rate) < loss(np.rint(plain).astype(np.int32))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 5), (9, 64), (1000, 3)])
def test_every_size_is_coded(width: int, height: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(encode_instantly(image)).shape == image.shape


def test_the_same_bytes_again(picture: np.ndarray) -> None:
    assert encode_instantly(picture, quality=60) == encode_instantly(picture, quality=60)


def test_torch_is_not_loaded(picture: np.ndarray, run: Run, tmp_path: Path) -> None:
    Image.fromarray(picture).save(tmp_path / "photo.png")
    loaded = loaded_modules(run, "clric-enc", "photo.png", "--preset", "instant", "--vae", "small", "photo.clric")
    assert "numpy" in loaded
    assert not {"torch", "numba"} & loaded
    assert decode((tmp_path / "photo.clric").read_bytes()).shape == picture.shape


def test_what_does_not_suit_is_refused(picture: np.ndarray, run: Run, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="preset instant needs the autoencoder small"):
        encode_instantly(picture, vae="taesd")
    with pytest.raises(ModelError, match=r"nothing.onnx does not exist"):
        encode_instantly(picture, vae="nothing.onnx")
    with pytest.raises(ClricError, match="it must be"):
        encode_instantly(picture[..., 0])
    Image.fromarray(picture).save(tmp_path / "photo.png")
    result = run("clric-enc", tmp_path / "photo.png", "--preset", "instant", "--tune", "small")
    assert result.returncode == 2
    assert b"cannot be used with --preset instant" in result.stderr
