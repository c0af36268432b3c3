"""Image -> bytes: autoencoder, overfitting, bitstream, and the check that the bytes decode to what was trained."""

from __future__ import annotations

import os
import re

import numpy as np
import torch
from clric_decoder import bitstream
from clric_decoder.errors import ClricError
from clric_decoder.latent import decode_grids, encode_grids
from clric_decoder.models import LATENT_SPACES
from clric_decoder.synthesis import synthesize

from .autoencoder import load_encoder
from .overfit import Function, Report, overfit
from .presets import MAX_LAMBDA, MIN_LAMBDA, PRESETS

DEFAULT_QUALITY = 50.0
MAX_LATENT = 1e4  # real ones have a deviation near 1
CUSTOM_SPACE = re.compile(r"custom-[0-9a-f]{16}")


def quality_to_lambda(quality: float) -> float:
    """Lambda of a quality from 0 to 100: 0.5 at 50, a tenth of it 40 points higher."""
    if not 0 <= quality <= 100:
        raise ClricError(f"quality {quality:g} is not within 0 to 100")
    return 0.5 * 10 ** ((50 - quality) / 40)


def encode(
    image: np.ndarray,
    *,
    vae: str = "lite",
    lmbda: float | None = None,
    quality: float | None = None,
    preset: str = "default",
    device: str = "auto",
    seed: int = 0,
    models: str | os.PathLike[str] | None = None,
    progress: Report | None = None,
) -> bytes:
    """The stream of an image (H, W, 3) uint8 RGB.

    lmbda: weight of the rate in latent MSE + lmbda * bpp; or quality, 0 to 100 (50 where neither is given).
    vae, models: the autoencoder by name, and a folder to look for its weights in first.
    preset: a name in `presets.PRESETS`. device: auto, cpu or cuda. progress: called with `overfit.Progress`.
    Raises ClricError and its subclasses.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ClricError(f"the image is {image.shape} {image.dtype}; it must be (height, width, 3) uint8")
    height, width = image.shape[:2]
    if not 1 <= min(height, width) <= max(height, width) <= bitstream.MAX_SIDE:
        raise ClricError(f"the image is {width} x {height}; a side must be within 1 to {bitstream.MAX_SIDE}")
    if lmbda is not None and quality is not None:
        raise ClricError("lambda and quality are two names for one thing; give one of them")
    device = _device(device)
    encoder = load_encoder(vae, models=models, device=device)
    latent = encoder.encode(image)
    return encode_latent(
        latent,
        width=width,
        height=height,
        space=encoder.space,
        lmbda=quality_to_lambda(DEFAULT_QUALITY if quality is None else quality) if lmbda is None else lmbda,
        preset=preset,
        device=device,
        seed=seed,
        progress=progress,
    )


def encode_latent(
    latent: np.ndarray,
    *,
    width: int,
    height: int,
    space: str,
    lmbda: float,
    preset: str = "default",
    device: str = "cpu",
    seed: int = 0,
    progress: Report | None = None,
) -> bytes:
    """The stream of a latent (C, ceil(height / 8), ceil(width / 8)) float32 of an image of width x height pixels.

    The other arguments are those of `encode`.
    """
    if preset not in PRESETS:
        raise ClricError(f"preset {preset!r} is not known; use one of {', '.join(PRESETS)}")
    if not MIN_LAMBDA <= lmbda <= MAX_LAMBDA:
        raise ClricError(f"lambda is {lmbda:g}; it must be within {MIN_LAMBDA:g} to {MAX_LAMBDA:g}")
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
    if not (np.abs(latent) <= MAX_LATENT).all():
        raise ClricError(f"the latent has values beyond +-{MAX_LATENT:g}; the autoencoder's weights do not suit it")
    (function,) = overfit(
        latent[None], [lmbda], width * height, PRESETS[preset], seed=seed, device=_device(device), report=progress
    )
    data = bitstream.write(
        width=width,
        height=height,
        space=space,
        channels=latent.shape[0],
        architecture=function.architecture,
        segments=encode_grids(function.networks, function.grids, function.architecture),
    )
    _check(data, function)
    return data


def _check(data: bytes, function: Function) -> None:
    """Decode what was written and compare: grids and networks to the integer, and a latent that is finite."""
    _, networks, grids = decode_grids(data, max_pixels=bitstream.MAX_SIDE**2)
    same = all(map(np.array_equal, grids, function.grids)) and all(
        decoded.exponent == coded.exponent and np.array_equal(decoded.integers, coded.integers)
        for decoded, coded in zip(networks, function.networks, strict=True)
    )
    if not same:
        raise ClricError("the stream does not decode to what was encoded; nothing was written; please report this")
    synthesize(grids, networks, function.architecture)


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ClricError(f"device {name!r} is not known; use auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ClricError("no CUDA device is available; use --device cpu")
    return name
