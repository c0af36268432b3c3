"""Preset instant: encoding without training and without torch.

    image -> ONNX encoder -> latent -> integers of one level -> stream that names its networks

The networks are one of the sets that come with the decoder (clric_decoder/network_sets.py), each trained on many
latents at one lambda. The first layer of their synthesis, turned round, says which real numbers the grids should hold.
They are rounded in coding order, each to the neighbour of lowest squared error + price * bits: the table of a value is
known when its turn comes, as it is to a decoder.
"""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from clric_decoder.bitstream import Architecture, registered_architecture
from clric_decoder.context import Arm, build_arms, choose_level, predict
from clric_decoder.entropy import ESCAPE_HIGH, ESCAPE_LOW, FRACTIONS, SYMBOL_ZERO, cumulative_tables, ideal_bits
from clric_decoder.errors import ClricError, one_line
from clric_decoder.network_sets import network_sets
from clric_decoder.networks import Parameters, decode_networks
from clric_decoder.synthesis import synthesize

from .encoder_file import find_encoder
from .rate import Rate, choose_rate
from .stream import Encoded, check_image, check_latent, decode_checked, write_stream
from .tiling import ImageEncoder, in_tiles

# The preset's name; the others are in training/presets.py.
INSTANT = "instant"

# The architecture of the sets, and the lambda that each was trained at, set 1 first.
ARCHITECTURE = 8
LAMBDAS = (4.0, 2.0, 1.0, 0.5, 0.22, 0.1, 0.045)

# Lambda beyond the sets' own: coarser rounding with the coarsest, up to so much, for small files.
HIGHEST = 400.0

# What a bit counts for in rounding, as a share of its price. Values are chosen one after another, and what they do to
# the contexts of later ones is not seen: at the full price too many become zero. Tried at four photos.
PRICE_SHARE = 0.5

# Tries to meet a size. A file may be smaller by as much as one set's are than the next one's at the same lambda.
TRIES, MIN_FILL = 12, 0.85

# Pixels that go through the encoder at once, at most.
TILE_PIXELS = 2048 * 2048

_SPACE = "clric"


@dataclass(frozen=True)
class _Set:
    """One set, ready to use.

    inverse: (C, C) from latents to what the grids should hold. bias: (C,), taken from the latent before. errors: (C,),
    squared error of the latent, summed over its channels, for one of a channel's integers being off by 1.
    """

    number: int
    networks: list[Parameters]
    arm: Arm
    inverse: np.ndarray
    bias: np.ndarray
    errors: np.ndarray


def load_encoder(name: str, threads: int = 0) -> ImageEncoder:
    """The encoder of an autoencoder of the space `clric`. threads: 0 for as many as onnxruntime takes.

    Raises ClricError where onnxruntime is missing, and ModelError for another or a damaged autoencoder.
    """
    path, manifest = find_encoder(name)
    if manifest["latent_space"] != _SPACE:
        raise ClricError(f"preset instant supports only the latent space {_SPACE}; use another preset")
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise ClricError("onnxruntime is not installed; run: pip install 'clric[cpu]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class
        raise ClricError(f"{path} cannot be loaded ({one_line(error)}); reinstall clric") from error

    def network(pixels: np.ndarray) -> np.ndarray:
        (latent,) = session.run(["latent"], {"image": pixels})
        return latent

    def encode(image: np.ndarray) -> np.ndarray:
        return in_tiles(network, image, manifest["halo"], TILE_PIXELS, blend=False)

    return ImageEncoder(manifest["name"].removesuffix("_encoder"), _SPACE, encode)


def encode_instantly(
    image: np.ndarray,
    *,
    vae: str = "small",
    lmbda: float | None = None,
    quality: float | None = None,
    size: int | None = None,
    bpp: float | None = None,
) -> bytes:
    """The stream of an image (H, W, 3) uint8 RGB by preset instant; needs onnxruntime, and not torch.

    vae: an autoencoder of the space `clric`. The others are those of `encoding.encode`. Raises ClricError.
    """
    rate = choose_rate(lmbda, quality, size, bpp)
    encoded = encode_image(image, load_encoder(vae), rate)
    if encoded.note:
        warnings.warn(encoded.note, stacklevel=2)
    return encoded.data


def encode_image(image: np.ndarray, encoder: ImageEncoder, rate: Rate) -> Encoded:
    """The stream of an image (H, W, 3) uint8 RGB. Raises ClricError."""
    height, width = check_image(image)
    latent = encoder.encode(image)
    check_latent(latent, width, height, encoder.space)
    limit = rate.bytes(width * height)
    if limit is None:
        assert rate.lmbda is not None
        data, error = _encode(latent, width, height, rate.lmbda)
        return Encoded(data, rate.lmbda, error, None)
    return _of_size(latent, width, height, limit)


def _of_size(latent: np.ndarray, width: int, height: int, limit: int) -> Encoded:
    """By bisection of lambda: the largest file of at most so many bytes that was met."""
    low, high = math.log(LAMBDAS[-1] / 4), math.log(HIGHEST)
    best, smallest = None, None
    for _ in range(TRIES):
        middle = (low + high) / 2
        data, error = _encode(latent, width, height, math.exp(middle))
        encoded = Encoded(data, math.exp(middle), error, None)
        if smallest is None or len(data) < len(smallest.data):
            smallest = encoded
        if len(data) > limit:
            low = middle
            continue
        high = middle
        if best is None or len(data) > len(best.data):
            best = encoded
        if len(data) >= MIN_FILL * limit:
            return best
    assert smallest is not None
    if best is None:
        note = f"target of {limit} bytes not reached: the smallest stream has {len(smallest.data)} bytes"
        return Encoded(smallest.data, smallest.lmbda, smallest.latent_mse, note)
    note = f"target of {limit} bytes not reached: quality saturates at {len(best.data)} bytes"
    return Encoded(best.data, best.lmbda, best.latent_mse, note)


def _encode(latent: np.ndarray, width: int, height: int, lmbda: float) -> tuple[bytes, float]:
    """Bytes and the latent's mean squared error, with the better of the two sets whose lambdas are next to this one."""
    architecture = _architecture()
    distances = [abs(math.log(lmbda / own)) for own in LAMBDAS]
    best: tuple[float, _Set, np.ndarray, float] | None = None
    for index in sorted(np.argsort(distances)[:2].tolist()):
        candidate = _sets()[index]
        price = lmbda / (width * height) * latent.size
        grid = round_by_rate(latent, candidate, architecture, price)
        error = float(np.square(synthesize([grid], candidate.networks, architecture) - latent).mean())
        bits = ideal_bits(*predict(grid, candidate.arm, architecture, None)).sum()
        loss = error + lmbda * bits / (width * height)
        if best is None or loss < best[0]:
            best = loss, candidate, grid, error
    assert best is not None
    _, chosen, grid, error = best
    data = write_stream(
        architecture, chosen.networks, [grid], width=width, height=height, space=_SPACE, network_set=chosen.number
    )
    decode_checked(data, chosen.networks, [grid])
    return data, error


def round_by_rate(latent: np.ndarray, networks: _Set, architecture: Architecture, price: float) -> np.ndarray:
    """The grids (C, h, w) int32 of a latent (C, h, w). price: of a bit, in squared error summed over the latent."""
    bits = _bits()
    wanted = np.einsum("ij,jyx->iyx", networks.inverse, latent - networks.bias[:, None, None])

    def choose(real: np.ndarray, channels: np.ndarray, means: np.ndarray, tables: np.ndarray) -> np.ndarray:
        below = np.floor(real).astype(np.int64)
        likely = means + (tables % FRACTIONS >= FRACTIONS // 2)
        candidates = np.stack([below, below + 1, np.clip(likely, below - 1, below + 2)])
        symbols = np.clip(candidates - means + SYMBOL_ZERO, ESCAPE_LOW, ESCAPE_HIGH)
        costs = networks.errors[channels] * np.square(candidates - real) + PRICE_SHARE * price * bits[tables, symbols]
        best: np.ndarray = np.take_along_axis(candidates, costs.argmin(0)[None], 0)[0]
        return best

    return choose_level(wanted, networks.arm, architecture, choose)


def make_set(number: int, networks: list[Parameters], architecture: Architecture) -> _Set:
    """A set's networks with what rounding needs of them. Its first synthesis layer leads from C grids to C channels."""
    values = {parameters.group.name: parameters.values for parameters in networks}
    weight = values["synthesis.weight0"][:, :, 0, 0].astype(np.float64)
    return _Set(
        number,
        networks,
        build_arms(networks, architecture)[0],
        np.linalg.inv(weight).astype(np.float32),
        values["synthesis.bias"][: len(weight)],
        np.square(weight).sum(0),
    )


@lru_cache(maxsize=1)
def _architecture() -> Architecture:
    return registered_architecture(ARCHITECTURE)


@lru_cache(maxsize=1)
def _sets() -> list[_Set]:
    architecture = _architecture()
    return [
        make_set(number, decode_networks(segment, architecture), architecture)
        for number, segment in enumerate(network_sets(architecture), 1)
    ]


@lru_cache(maxsize=1)
def _bits() -> np.ndarray:
    """Bits of each symbol by each table, (tables, symbols); an escape's without its excess."""
    return 16 - np.log2(np.diff(cumulative_tables()).astype(np.float32))
