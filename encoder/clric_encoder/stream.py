"""What every way of encoding shares: what can be encoded, and the stream of a function, checked by decoding it.

Without torch: preset `instant` needs none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from clric_decoder import bitstream
from clric_decoder.bitstream import Architecture, Metadata
from clric_decoder.errors import ClricError
from clric_decoder.latent import decode_grids, encode_grids
from clric_decoder.models import LATENT_SPACES
from clric_decoder.networks import Parameters
from clric_decoder.synthesis import synthesize

# Published latents have a standard deviation near 1 and stay within +-5. Grids hold integers of up to 32,767, and a
# principal component of a latent within +-50 is at most 27,200 at the finest step that training starts with
# (`training.rate_control.principal_step` of lambdas of 1e-4 and less). Latents of +-400 are clipped there, and larger
# ones make training diverge at other lambdas too.
MAX_LATENT = 50.0
CUSTOM_SPACE = re.compile(r"custom-[0-9a-f]{16}")


@dataclass(frozen=True)
class Encoded:
    """A stream, with what it was made with and came to.

    lmbda: at the end of training. latent_mse: of the decoded latent. note: where the size that was asked for could not
    be met, a sentence about what was done instead. too_large: whether the stream is larger than that.
    """

    data: bytes
    lmbda: float
    latent_mse: float
    note: str | None
    too_large: bool = False


def check_image(image: np.ndarray) -> tuple[int, int]:
    """Height and width of an image that can be coded. Raises ClricError for any other."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ClricError(f"the image is {image.shape} {image.dtype}; it must be (height, width, 3) uint8")
    height, width, _ = image.shape
    if not 1 <= min(height, width) <= max(height, width) <= bitstream.MAX_SIDE:
        raise ClricError(f"the image is {width} x {height}; width and height must be 1 to {bitstream.MAX_SIDE}")
    return height, width


def check_latent(latent: np.ndarray, width: int, height: int, space: str) -> None:
    """Raises ClricError for a latent that cannot be coded."""
    if space in LATENT_SPACES:
        channels = LATENT_SPACES[space].channels
    elif CUSTOM_SPACE.fullmatch(space):
        channels = latent.shape[0]
    else:
        raise ClricError(
            f"latent space {space!r} is not known; use {', '.join(LATENT_SPACES)} or custom-<16 hex digits>"
        )
    expected = (channels, -(-height // 8), -(-width // 8))
    if latent.dtype != np.float32 or latent.shape != expected:
        raise ClricError(
            f"the latent is {latent.shape} {latent.dtype}; for {width} x {height} pixels in the space {space} "
            f"it must be {expected} float32"
        )
    largest = float(np.abs(latent).max(initial=0))
    if not np.isfinite(largest):
        raise ClricError("the latent contains NaN or infinite values; check the autoencoder's weights")
    if largest > MAX_LATENT:
        raise ClricError(
            f"the latent has values of up to +-{largest:.4g}, the limit is +-{MAX_LATENT:g}; "
            "scale its space to a standard deviation near 1"
        )


def write_stream(
    architecture: Architecture,
    networks: list[Parameters],
    grids: list[np.ndarray],
    *,
    width: int,
    height: int,
    space: str,
    function: int = 0,
    image_decoder: int = 0,
    metadata: Metadata | None = None,
) -> bytes:
    """The stream of a function: grids (channels, rows, columns) int32 each, the finest first, and networks.

    function: the number of the registered function whose networks these are; they are then no part of the stream.
    image_decoder, metadata: see `clric_decoder.bitstream.Header`.
    """
    segments = encode_grids(networks, grids, architecture)
    return bitstream.write(
        width=width,
        height=height,
        space=space,
        channels=architecture.synthesis[-1].channels,
        architecture=architecture,
        segments=replace(segments, networks=b"") if function else segments,
        metadata=metadata,
        function=function,
        image_decoder=image_decoder,
    )


def decode_checked(data: bytes, networks: Sequence[Parameters], grids: Sequence[np.ndarray]) -> np.ndarray:
    """The latent that a stream decodes to. Raises ClricError where its grids or networks differ by a single integer."""
    header, decoded_networks, decoded_grids = decode_grids(data, max_pixels=bitstream.MAX_SIDE**2)
    same = all(map(np.array_equal, decoded_grids, grids)) and all(
        decoded.exponent == coded.exponent and np.array_equal(decoded.integers, coded.integers)
        for decoded, coded in zip(decoded_networks, networks, strict=True)
    )
    if not same:
        raise ClricError(
            "internal error: the stream does not decode to what was encoded; no file was written; please report this"
        )
    return synthesize(decoded_grids, decoded_networks, header.architecture)
