"""Image -> bytes: autoencoder, overfitting, bitstream, and the check that the bytes decode to what was trained."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from clric_decoder import bitstream
from clric_decoder.bitstream import Metadata
from clric_decoder.errors import ClricError, ModelError, warn

from .autoencoder import fast_dtype, load_decoder, load_encoder
from .compilation import compilation
from .instant import INSTANT, encode_instantly
from .rate import Rate, choose_rate
from .stream import Encoded, check_image, check_latent, decode_checked, write_stream
from .torch_threads import settle
from .training.distortion import ImageDecoder, ImageDistortion
from .training.features import LpipsVgg, PerceptualDistance, Textured, load_features
from .training.loop import Function, Report, overfit
from .training.presets import Preset, find_preset
from .training.rate_control import MIN_FILL, can_move

# The image decoder that functions are trained through where nothing is said, by latent space. Decoders of the others
# cost 15 times as much, or are not there without a network.
DEFAULT_TUNE = {"clric": "small", "sd1": "lite"}

# A training on images that takes longer, in seconds, is announced. What a step on the function takes of it for each
# pixel, about: on one core of an AMD EPYC, and on a GPU next to nothing.
LONG, STEP_SECONDS = 60, 1e-8

# More grid values at once on a CPU's thread gain nothing; a GPU takes what its memory holds at so many bytes each.
THREAD_VALUES, VALUE_BYTES = 125_000, 1000


@dataclass(frozen=True)
class Tuning:
    """What functions are trained through after they have met the latent: see `load_tuning`."""

    decoder: ImageDecoder
    perceptual: PerceptualDistance | None


def encode(
    image: np.ndarray,
    *,
    vae: str = "small",
    lmbda: float | None = None,
    quality: float | None = None,
    size: int | None = None,
    bpp: float | None = None,
    preset: str = "default",
    tune: str = "auto",
    lpips: str | os.PathLike[str] | None = None,
    device: str = "auto",
    seed: int = 0,
    models: str | os.PathLike[str] | None = None,
    metadata: Metadata | None = None,
    progress: Report | None = None,
) -> bytes:
    """The stream of an image (H, W, 3) uint8 RGB, sRGB unless the metadata has an ICC profile.

    lmbda: weight of the rate in latent MSE + lmbda * bpp; or quality, 0 to 100 (75 where nothing is given); or the
    largest size in bytes, or in bits per pixel, which the file comes to within 3 %. A size that cannot be met is warned
    of (UserWarning), and so is a training that takes minutes.
    vae, models: the autoencoder by name, and a folder to look for its weights in first.
    preset: a name in `presets.PRESETS`, or `instant` (`instant.encode_instantly`). tune, lpips: see `load_tuning`.
    device: auto, cpu or cuda. metadata: icc_profile, exif and xmp as `clric_decoder.image.read_image` gives them; they
    count for the size.
    progress: called with `training.loop.Progress`.
    Raises ClricError and its subclasses.
    """
    if preset == INSTANT:
        return encode_instantly(image, vae=vae, lmbda=lmbda, quality=quality, size=size, bpp=bpp, metadata=metadata)
    height, width = check_image(image)
    rate = choose_rate(lmbda, quality, size, bpp)
    settle()
    device = find_device(device)
    encoder = load_encoder(vae, models=models, device=device)
    tuning = load_tuning(tune, encoder.space, preset, models=models, lpips=lpips, device=device)
    latent = encoder.encode(image)
    check_latent(latent, width, height, encoder.space)
    (encoded,) = encode_latents(
        latent[None],
        [(width, height)],
        encoder.space,
        rate,
        preset=preset,
        tuning=tuning,
        images=[image],
        metadata=[metadata or {}],
        device=device,
        seed=seed,
        progress=progress,
        warn=warn,
    )
    if encoded.note:
        warn(encoded.note)
    return encoded.data


def load_tuning(
    tune: str,
    space: str,
    preset: str = "default",
    *,
    models: str | os.PathLike[str] | None = None,
    lpips: str | os.PathLike[str] | None = None,
    device: str = "cpu",
) -> Tuning | None:
    """The image decoder that functions of a latent space are trained through, and the features images are compared by.

    tune: ``auto`` (small for clric, lite for sd1, none for the others and for preset paper), ``none``, the name of an
    autoencoder, or the path of an ONNX file that clric-export made. lpips: the file vgg16_lpips.npz of LPIPS-VGG, for
    its features instead of those of the network that comes with clric. Raises ModelError.
    """
    if tune == "auto":
        tune = "none" if preset == "paper" else DEFAULT_TUNE.get(space, "none")
    if tune == "none":
        return None
    decoder = load_decoder(tune, models, device)
    if decoder.space != space:
        raise ModelError(
            f"--tune {tune} decodes the latent space {decoder.space}, but the latent space is {space};"
            f" use a decoder of {space}, or none"
        )
    perceptual: PerceptualDistance
    if lpips is not None:
        perceptual = LpipsVgg(Path(lpips), fast_dtype(device)).to(device)
    else:
        network = load_features().to(device)
        network.set_dtype(fast_dtype(device))
        perceptual = Textured(network)
    return Tuning(decoder, perceptual)


def encode_latent(
    latent: np.ndarray,
    *,
    width: int,
    height: int,
    space: str,
    lmbda: float | None = None,
    size: int | None = None,
    bpp: float | None = None,
    preset: str = "default",
    device: str = "cpu",
    seed: int = 0,
    progress: Report | None = None,
) -> bytes:
    """The stream of a latent (C, ceil(height / 8), ceil(width / 8)) float32 of an image of width x height pixels.

    One of lmbda, size and bpp is given; these and the other arguments are those of `encode`.
    """
    check_latent(latent, width, height, space)
    (encoded,) = encode_latents(
        latent[None],
        [(width, height)],
        space,
        Rate(lmbda, size, bpp),
        preset=preset,
        device=find_device(device),
        seed=seed,
        progress=progress,
    )
    if encoded.note:
        warn(encoded.note)
    return encoded.data


def encode_latents(
    latents: np.ndarray,
    sizes: Sequence[tuple[int, int]],
    space: str,
    rate: Rate,
    *,
    preset: str = "default",
    tuning: Tuning | None = None,
    images: Sequence[np.ndarray] = (),
    metadata: Sequence[Metadata] = (),
    device: str = "cpu",
    seed: int = 0,
    progress: Report | None = None,
    warn: Callable[[str], None] = lambda message: None,
    compiling: Callable[[], None] = lambda: None,
) -> list[Encoded]:
    """The streams of a batch of latents (batch, C, h, w) float32, trained together, of images (width, height).

    Latents as `check_latent` lets through. tuning, images: what functions are trained through, and the images, each
    (height, width, 3) uint8. metadata: of each image; none where it is empty. device: cpu or cuda. warn: called before
    a training that takes minutes. compiling: called whenever a loop of the training is compiled. Raises ClricError.
    """
    settle()
    schedule = find_preset(preset)
    pixels = [width * height for width, height in sizes]

    def stream(function: Function, number: int) -> bytes:
        width, height = sizes[number]
        return write_stream(
            function.architecture,
            function.networks,
            function.grids,
            width=width,
            height=height,
            space=space,
            image_decoder=0 if tuning is None else tuning.decoder.number,
            metadata=metadata[number] if metadata else None,
        )

    distortion = None
    if tuning is not None:
        schedule = schedule.through(tuning.decoder.name)
        on_device = torch.from_numpy(latents).to(device)
        distortion = ImageDistortion(images, on_device, tuning.decoder, tuning.perceptual)
        seconds = distortion.seconds() * schedule.tuning.looks
        if device == "cpu":
            seconds += STEP_SECONDS * sum(pixels) * schedule.tuning.iterations
        if seconds > LONG:
            warn(
                f"tuning through the image decoder {tuning.decoder.name} takes about {seconds / 60:.0f} min"
                " (--tune none skips it)"
            )
    limits = [rate.bytes(count) for count in pixels]
    with compilation(compiling):
        functions = overfit(
            latents,
            [rate.lmbda or 1.0] * len(latents),
            pixels,
            schedule,
            measure=lambda function, i: len(stream(function, i)),
            sizes=None if rate.lmbda is not None else [limit or 0 for limit in limits],
            image=distortion,
            seed=seed,
            device=device,
            report=progress,
        )
    result = []
    for number, (function, latent, limit) in enumerate(zip(functions, latents, limits, strict=True)):
        data = stream(function, number)
        error = float(np.square(decode_checked(data, function.networks, function.grids) - latent).mean())
        note = None
        if limit is not None and len(data) > limit:
            note = f"target of {limit} bytes not reached: the minimum size is {len(data)} bytes"
        elif limit is not None and len(data) < MIN_FILL * limit:
            why = "the nearest size is" if can_move(function.lmbda) else "quality saturates at"
            note = f"target of {limit} bytes not reached: {why} {len(data)} bytes"
        result.append(Encoded(data, function.lmbda, error, note, limit is not None and len(data) > limit))
    return result


def batch_size(shape: tuple[int, ...], preset: Preset, device: str) -> int:
    """How many latents of this shape (C, h, w) to train at once, by the device's memory."""
    channels, height, width = shape
    shapes = bitstream.grid_shapes(preset.architecture(channels).channels, height, width)
    values = sum(grids * rows * columns for grids, rows, columns in shapes)
    room = THREAD_VALUES * torch.get_num_threads()
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # torch keeps what it has freed
        room = free // VALUE_BYTES // 2
        values *= max([warm_up.candidates for warm_up in preset.warm_up], default=1)
    return max(1, min(64, room // values))


def find_device(name: str) -> str:
    """`cpu` or `cuda`, for a name that may be `auto`. Raises ClricError where there is none."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ClricError(f"device {name!r} is not known; use auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ClricError("no CUDA device is available; use --device cpu")
    return name
