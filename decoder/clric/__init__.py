"""clric's public face: images to streams with `encode`, and back with `decode`.

Arrays, Pillow images and paths come in; bytes and arrays go out. Importing this package loads neither torch nor
onnxruntime; the encoder (package clric_encoder) is imported when `encode` is called. ``import clric.pillow`` makes
Pillow read and write streams.
"""

import numbers
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import NoneType
from typing import TYPE_CHECKING, Any

import clric_decoder
import numpy as np
from clric_decoder import ClricError, Header, ImageError, ModelError, StreamError
from clric_decoder.bitstream import MAX_PIXELS, METADATA, Metadata
from clric_decoder.errors import warn
from clric_decoder.files import read_file, stream_limit

if TYPE_CHECKING:
    from PIL import Image

__version__ = "1.0.0"

__all__ = [
    "ClricError",
    "Header",
    "ImageError",
    "ModelError",
    "StreamError",
    "__version__",
    "decode",
    "decode_latent",
    "encode",
    "read_header",
]


_PATH = (str, os.PathLike)


def encode(
    image: "np.ndarray | Image.Image | str | os.PathLike[str]",
    *,
    quality: float | None = None,
    bpp: float | None = None,
    size: float | None = None,
    lmbda: float | None = None,
    preset: str = "default",
    vae: str | os.PathLike[str] = "small",
    tune: str | os.PathLike[str] = "auto",
    device: str = "auto",
    seed: int = 0,
    models: str | os.PathLike[str] | None = None,
    strip: bool = False,
    metadata: Metadata | None = None,
    progress: Callable[[Any], None] | None = None,
) -> bytes:
    """The stream of an image.

    image: H x W x 3 uint8 RGB, a Pillow image, or the path of an image file. Of the latter two, EXIF's orientation is
        applied, and transparency is flattened on white (UserWarning).
    strip: leave out EXIF, XMP and colour profile of a Pillow image or a file; colours are then converted to sRGB.
    metadata: of an array, by the names icc_profile (of the pixels, which stay as they are), exif and xmp. Orientations
        in it are dropped: the array is taken to be upright.
    quality, bpp, size, lmbda: at most one. 0 to 100 (75 where nothing is given); the largest size in bits per pixel,
        or in bytes; the weight of the rate in latent MSE + lmbda * bpp. A UserWarning says what size cannot be met.
    preset: ``instant``, which needs onnxruntime (``pip install 'clric[cpu]'``), or ``fast``, ``default``, ``slow`` or
        ``paper``, which need torch (``pip install 'clric[encoder]'``).
    vae: the autoencoder: a name (``small``, ``lite``, ``taesd``, ...; ``small`` alone with ``instant``), or the path of
        an encoder's .onnx file.
    models, tune, device, seed, progress: of the presets that train. models: a folder to look for weights in first.
        tune: the image decoder to train through: ``auto``, ``none``, a name, or the path of an .onnx file. device:
        ``auto``, ``cpu`` or ``cuda``. seed: random seed. progress: called with
        ``clric_encoder.training.loop.Progress``.

    Raises TypeError for an argument of another type, ImageError for an image that cannot be read, and ClricError for
    values out of range and for what is not installed.
    """
    rate: dict[str, object] = {"quality": quality, "bpp": bpp, "size": size, "lmbda": lmbda}
    for name, value in rate.items():
        check_type(name, value, (numbers.Real, NoneType), "a number")
    for name, text in {"preset": preset, "device": device}.items():
        check_type(name, text, str, "a string")
    check_type("vae", vae, _PATH, "a name or a path")
    check_type("tune", tune, _PATH, "a name or a path")
    check_type("seed", seed, numbers.Integral, "an integer")
    check_type("models", models, (*_PATH, NoneType), "a path")
    vae, tune = os.fspath(vae), os.fspath(tune)
    pixels, notes, metadata = _read_image(image, strip, metadata or {})
    encode_array = _encoder(preset, tune)
    for note in notes:
        warn(note)
    if preset == "instant":
        return encode_array(pixels, vae=vae, metadata=metadata, **rate)
    from clric_encoder.libraries import not_installed

    training = {"preset": preset, "tune": tune, "device": device, "seed": seed, "progress": progress}
    try:
        return encode_array(pixels, vae=vae, models=models, metadata=metadata, **rate, **training)
    except ModuleNotFoundError as error:  # of a library that some autoencoders alone need
        raise not_installed(error) from error


def decode(
    stream: bytes | bytearray | memoryview | str | os.PathLike[str],
    *,
    vae: str | os.PathLike[str] | None = None,
    provider: str = "auto",
    models: str | os.PathLike[str] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """The image of a stream, or of a file of that path, H x W x 3 uint8 RGB.

    Its colours are those of the profile in `read_header`'s metadata, if there is one, and else sRGB.
    vae: the image decoder by name, or the path of an .onnx file; None for the default of the stream's latent space.
    provider: where onnxruntime computes: auto, cpu, cuda, ... models: a folder to look for the image decoder in first.
    max_pixels: larger images are refused before memory is taken for them.

    Raises TypeError for another type of stream, StreamError for a bad one, ModelError for an image decoder that is
    missing or of another latent space, or where onnxruntime is missing, and ClricError for a file that cannot be read.
    """
    check_type("vae", vae, (*_PATH, NoneType), "a name or a path")
    check_type("models", models, (*_PATH, NoneType), "a path")
    check_type("provider", provider, str, "a string")
    data = _read_stream(stream, max_pixels)
    with _naming(stream):
        return clric_decoder.decode(data, vae=vae, provider=provider, models=models, max_pixels=max_pixels)


def decode_latent(
    stream: bytes | bytearray | memoryview | str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """The latent of a stream, (C, ceil(H / 8), ceil(W / 8)) float32. Needs no image decoder; see `decode`."""
    data = _read_stream(stream, max_pixels)
    with _naming(stream):
        return clric_decoder.decode_latent(data, max_pixels)


def read_header(
    stream: bytes | bytearray | memoryview | str | os.PathLike[str],
    *,
    max_pixels: int = MAX_PIXELS,
    size: int | None = None,
) -> Header:
    """What a stream says of itself: size, latent space, bytes by part, bpp. Nothing is decoded; see `decode`.

    size: of the whole file in bytes, where only its beginning is given: some kilobytes, and the metadata if the image
    has any. StreamError of kind ``truncated`` says that more is needed.
    """
    check_type("size", size, (numbers.Integral, NoneType), "an integer")
    data = _read_stream(stream, max_pixels)
    with _naming(stream):
        return clric_decoder.read_header(data, max_pixels, size)


def check_type(name: str, value: object, types: type | tuple[type, ...], expected: str) -> None:
    """Raises TypeError for an argument of another type."""
    if not isinstance(value, types):
        raise TypeError(f"{name} must be {expected}, not {type(value).__name__}")


def _read_stream(stream: object, max_pixels: int) -> bytes:
    check_type("max_pixels", max_pixels, numbers.Integral, "an integer")
    if isinstance(stream, bytes | bytearray | memoryview):
        return bytes(stream)
    if isinstance(stream, str | os.PathLike):
        return read_file(stream, stream_limit(max_pixels))
    raise TypeError(f"a stream must be bytes, a memoryview or a path, not {type(stream).__name__}")


@contextmanager
def _naming(stream: object) -> Iterator[None]:
    """Around the decoding of a stream: errors of one that came from a file start with the file's path."""
    try:
        yield
    except StreamError as error:
        if not isinstance(stream, str | os.PathLike):
            raise
        raise StreamError(error.kind, f"{os.fspath(stream)}: {error}") from error


def _read_image(image: object, strip: bool, metadata: Metadata) -> tuple[np.ndarray, list[str], Metadata]:
    """(H x W x 3 uint8, warnings for the user, metadata) of whatever `encode` takes."""
    from clric_decoder.image import read_image, to_rgb, upright
    from PIL import Image

    check_type("metadata", metadata, dict, "a dict")
    for name, content in metadata.items():
        if name not in METADATA.values():
            raise ClricError(f"metadata {name!r} is not known; use {', '.join(METADATA.values())}")
        check_type(f"metadata {name!r}", content, bytes, "bytes")
    if isinstance(image, np.ndarray):
        return image, [], upright(metadata)
    if metadata:
        raise TypeError("metadata goes with an array; a Pillow image and a file have their own")

    if isinstance(image, Image.Image):
        return to_rgb(image, strip=strip)
    if isinstance(image, str | os.PathLike):
        return read_image(image, strip=strip)
    raise TypeError(f"an image must be an array, a Pillow image or a path, not {type(image).__name__}")


def _encoder(preset: str, tune: str) -> Callable[..., bytes]:
    """The encoder's function for a preset. Raises ClricError, which says how to install what is missing."""
    with encoder_package():
        from clric_encoder.instant import encode_instantly
        from clric_encoder.libraries import libraries
        from clric_encoder.training.presets import find_preset
    if preset == "instant":
        if tune not in ("auto", "none"):
            raise ClricError(f"preset instant trains nothing: tune={tune!r} goes with the other presets")
        return encode_instantly
    find_preset(preset)
    with libraries():
        from clric_encoder import encode

        return encode


@contextmanager
def encoder_package() -> Iterator[None]:
    """Around the import of the encoder, which a client may lack: ClricError where it is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "clric_encoder":
            raise
        raise ClricError(
            "encoding needs the package clric_encoder, which is not installed; run: pip install 'clric[encoder]'"
        ) from error
