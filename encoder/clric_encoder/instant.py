"""Preset instant: encoding without training and without torch.

    image -> ONNX encoder -> latent -> integers of one level -> stream that names its networks

The networks are one of the sets that come with the decoder (clric_decoder/registered_networks.py), each trained on many
latents at one lambda. The first layer of their synthesis, turned round, says which real numbers the grids should hold.
They are rounded in coding order, each to the neighbour of lowest squared error + price * bits: the table of a value is
known when its turn comes, as it is to a decoder.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial

import numpy as np
from clric_decoder.autoencoder import import_onnxruntime
from clric_decoder.bitstream import WITH_NETWORKS, Architecture, Metadata, registered_architecture
from clric_decoder.context import Arm, build_arms, choose_level, predict
from clric_decoder.cpus import thread_count
from clric_decoder.entropy import ESCAPE_HIGH, ESCAPE_LOW, FRACTIONS, SYMBOL_ZERO, cumulative_tables, ideal_bits
from clric_decoder.errors import ClricError, one_line, warn
from clric_decoder.networks import Parameters, decode_networks
from clric_decoder.registered_networks import registered_networks
from clric_decoder.synthesis import synthesize

from .encoder_file import find_encoder
from .rate import Rate, choose_rate
from .stream import Encoded, check_image, check_latent, decode_checked, write_stream
from .tiling import ImageEncoder, in_tiles

# The preset's name; the others are in training/presets.py.
INSTANT = "instant"

# The registered functions with networks, and the lambda that each was trained at.
FUNCTIONS = tuple(WITH_NETWORKS)
LAMBDAS = (4.0, 2.0, 1.0, 0.5, 0.22, 0.1, 0.045)

# Up to so many times its own lambda a set is better than its neighbours (six photos), which are not tried.
ALONE = 1.25

# Lambda beyond the sets' own: coarser rounding with the coarsest, up to so much, for small files.
HIGHEST = 400.0

# What a bit counts for in rounding, as a share of its price. Values are chosen one after another, and what they do to
# the contexts of later ones is not seen: at the full price too many become zero. Tried at four photos.
PRICE_SHARE = 0.5

# Tries to meet a size. A file may be smaller by as much as one set's are than the next one's at the same lambda.
TRIES, MIN_FILL = 12, 0.85

# Pixels that go through the encoder at once, at most.
TILE_PIXELS = 2048 * 2048

SPACE = "clric"


@dataclass(frozen=True)
class _Set:
    """One set, ready to use.

    inverse: (C, C) from latents to what the grids should hold. bias: (C,), taken from the latent before. errors: (C,),
    squared error of the latent, summed over its channels, for one of a channel's integers being off by 1.
    """

    function: int
    networks: list[Parameters]
    arm: Arm
    inverse: np.ndarray
    bias: np.ndarray
    errors: np.ndarray


def load_encoder(name: str, threads: int = 0) -> ImageEncoder:
    """The encoder of an autoencoder of the space `clric`. threads: 0 for `cpus.thread_count`.

    Raises ClricError where onnxruntime is missing, and ModelError for another or a damaged autoencoder.
    """
    path, manifest = find_encoder(name)
    if manifest["latent_space"] != SPACE:
        raise ClricError(f"preset instant supports only the latent space {SPACE}; use another preset")
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or thread_count()
    try:
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class
        raise ClricError(f"{path} cannot be loaded ({one_line(error)}); reinstall clric") from error

    def network(pixels: np.ndarray) -> np.ndarray:
        try:
            (latent,) = session.run(["latent"], {"image": pixels})
        except Exception as error:
            raise ClricError(f"the encoder {path} failed ({one_line(error)})") from error
        return latent

    def encode(image: np.ndarray) -> np.ndarray:
        return in_tiles(network, image, manifest["halo"], TILE_PIXELS, blend=False)

    return ImageEncoder(manifest["name"].removesuffix("_encoder"), SPACE, encode)


def encode_instantly(
    image: np.ndarray,
    *,
    vae: str = "small",
    lmbda: float | None = None,
    quality: float | None = None,
    size: int | None = None,
    bpp: float | None = None,
    metadata: Metadata | None = None,
) -> bytes:
    """The stream of an image (H, W, 3) uint8 RGB by preset instant; needs onnxruntime, and not torch.

    vae: an autoencoder of the space `clric`. The others are those of `encoding.encode`. Raises ClricError.
    """
    rate = choose_rate(lmbda, quality, size, bpp)
    encoded = encode_image(image, load_encoder(vae), rate, metadata)
    if encoded.note:
        warn(encoded.note)
    return encoded.data


def encode_image(image: np.ndarray, encoder: ImageEncoder, rate: Rate, metadata: Metadata | None = None) -> Encoded:
    """The stream of an image (H, W, 3) uint8 RGB. Raises ClricError."""
    height, width = check_image(image)
    latent = encoder.encode(image)
    check_latent(latent, width, height, encoder.space)
    attempt = partial(_attempt, latent, width, height, metadata)
    limit = rate.bytes(width * height)
    if limit is None:
        assert rate.lmbda is not None
        best, note = attempt(rate.lmbda), None
    else:
        best, note = _of_size(attempt, limit)
    decode_checked(best.data, best.chosen.networks, [best.grid])
    return Encoded(best.data, best.lmbda, best.error, note, limit is not None and len(best.data) > limit)


@dataclass(frozen=True)
class _Attempt:
    """A stream at one lambda. error: mean squared error of its latent."""

    lmbda: float
    chosen: _Set
    data: bytes
    error: float
    grid: np.ndarray


def _of_size(attempt: Callable[..., _Attempt], limit: int) -> tuple[_Attempt, str | None]:
    """The largest file met of at most so many bytes, and a note where it is far off.

    By bisection of lambda, with the better of two sets of networks at each. Where it ends between two sets, at one of
    which files are too large and at the other too small, those of the latter are tried at smaller lambdas.
    """
    best = smallest = None
    low, high, chosen = math.log(LAMBDAS[-1] / 4), math.log(HIGHEST), None
    for tries in (TRIES, TRIES // 2):
        for _ in range(tries):
            middle = (low + high) / 2
            tried = attempt(math.exp(middle), chosen)
            size = len(tried.data)
            if smallest is None or size < len(smallest.data):
                smallest = tried
            if size > limit:
                low = middle
                continue
            high = middle
            if best is None or size > len(best.data):
                best = tried
            if size >= MIN_FILL * limit:
                return best, None
        if best is None:
            break
        low, high, chosen = math.log(best.lmbda / 8), math.log(best.lmbda), best.chosen
    assert smallest is not None
    if best is None:
        return smallest, f"target of {limit} bytes not reached: the minimum size is {len(smallest.data)} bytes"
    return best, f"target of {limit} bytes not reached: quality saturates at {len(best.data)} bytes"


def _attempt(
    latent: np.ndarray, width: int, height: int, metadata: Metadata | None, lmbda: float, chosen: _Set | None = None
) -> _Attempt:
    """With a set of networks, or the best of those whose lambdas are next to this one."""
    architecture = _architecture()
    distances = [abs(math.log(lmbda / own)) for own in LAMBDAS]
    count = 1 if any(own <= lmbda <= ALONE * own for own in LAMBDAS) else 2
    nearest = [_set(FUNCTIONS[index]) for index in sorted(np.argsort(distances)[:count].tolist())]
    best: tuple[float, _Set, np.ndarray, float] | None = None
    for candidate in nearest if chosen is None else [chosen]:
        price = lmbda / (width * height) * latent.size
        grid = round_by_rate(latent, candidate, architecture, price)
        error = float(np.square(synthesize([grid], candidate.networks, architecture) - latent).mean())
        bits = ideal_bits(*predict(grid, candidate.arm, architecture)).sum()
        loss = error + lmbda * bits / (width * height)
        if best is None or loss < best[0]:
            best = loss, candidate, grid, error
    assert best is not None
    _, chosen, grid, error = best
    data = write_stream(
        architecture,
        chosen.networks,
        [grid],
        width=width,
        height=height,
        space=SPACE,
        function=chosen.function,
        metadata=metadata,
    )
    return _Attempt(lmbda, chosen, data, error, grid)


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


def make_set(function: int, networks: list[Parameters], architecture: Architecture) -> _Set:
    """A set's networks with what rounding needs of them. Its first synthesis layer leads from C grids to C channels."""
    values = {parameters.group.name: parameters.values for parameters in networks}
    weight = values["synthesis.weight0"][:, :, 0, 0].astype(np.float64)
    return _Set(
        function,
        networks,
        build_arms(networks, architecture)[0],
        np.linalg.inv(weight).astype(np.float32),
        values["synthesis.bias"][: len(weight)],
        np.square(weight).sum(0),
    )


@lru_cache(maxsize=1)
def _architecture() -> Architecture:
    return registered_architecture(FUNCTIONS[0])


@cache
def _set(function: int) -> _Set:
    architecture = _architecture()
    return make_set(function, decode_networks(registered_networks()[function], architecture), architecture)


@lru_cache(maxsize=1)
def _bits() -> np.ndarray:
    """Bits of each symbol by each table, (tables, symbols); an escape's without its excess."""
    return 16 - np.log2(np.diff(cumulative_tables()).astype(np.float32))
