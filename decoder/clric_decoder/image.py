"""RGB images from and to files: whatever Pillow reads comes in as H x W x 3 uint8, and goes out by suffix.

Colours are taken as sRGB: an embedded profile of another colour space is applied on reading.
"""

import io
import itertools
import os
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from .bitstream import MAX_PIXELS
from .errors import ImageError, one_line
from .files import STANDARD, check_output, write_output

# How each suffix is written: as near to lossless as the format allows.
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    ".png": {"compress_level": 4},  # a third of the time of Pillow's 6, and 1 % more bytes
    ".jpg": {"quality": 95},
    ".jpeg": {"quality": 95},
    ".webp": {"lossless": True},
    ".tif": {"compression": "tiff_deflate"},
    ".tiff": {"compression": "tiff_deflate"},
    ".bmp": {},
    ".ppm": {},
}


def read_image(
    source: str | os.PathLike[str] | BinaryIO, *, max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, list[str]]:
    """An image file, or a seekable stream of one, as (H x W x 3 uint8 sRGB array, warnings for the user).

    The orientation of EXIF is applied. Grey, palette and CMYK become RGB, 16 bits are scaled to 8,
    transparency is flattened on white (with a warning), of several frames the first is taken (with a
    warning). Raises ImageError, one line that starts with the file's name, for a file that is missing,
    damaged, no image, or of more than ``max_pixels`` pixels; the last before any pixel is decoded. Pillow's
    own limit (PIL.Image.MAX_IMAGE_PIXELS) counts too.
    """
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else str(getattr(source, "name", "-"))
    try:
        with Image.open(source) as image:
            if image.width * image.height > max_pixels:
                raise ImageError(
                    f"{name}: {image.width} x {image.height} exceeds the limit of {max_pixels} pixels; make it smaller"
                )
            return _to_rgb(image, name)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{name}: exceeds Pillow's limit of pixels; make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not an image in a format that Pillow reads") from error
    except OSError as error:
        raise ImageError(f"{name}: {error.strerror or one_line(error)}") from error
    except Exception as error:
        # Pillow's readers let all kinds escape on damaged files: SyntaxError, ValueError, struct.error, ...
        raise ImageError(f"{name}: damaged image ({one_line(error)})") from error


def take_over_pillow() -> None:
    """For the process of a command, before its first image: lifts Pillow's own limit, and silences its warnings.

    Both are the whole process's, and a program that uses clric as a library has its own ideas of them: `read_image`
    leaves them alone. Commands have max_pixels instead, and Pillow's warnings are about metadata that is dropped.
    """
    Image.MAX_IMAGE_PIXELS = None
    warnings.filterwarnings("ignore", module=r"PIL\.")


def check_image_output(path: str | os.PathLike[str]) -> None:
    """Raises the errors of `write_image` that are known from the path alone, before work is done in vain."""
    _suffix(path)
    check_output(path)


def write_image(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Writes an H x W x 3 uint8 array in the format that the suffix names; ``-`` is a PNG to standard output.

    A file appears whole or not at all. Raises ImageError for an unknown suffix or an image that the
    format cannot hold, ClricError where the file cannot be written.
    """
    suffix = _suffix(path)
    encoded = io.BytesIO()
    try:
        Image.fromarray(image).save(encoded, Image.registered_extensions()[suffix], **_SAVE_OPTIONS[suffix])
    except (OSError, ValueError) as error:
        raise ImageError(f"{os.fspath(path)}: cannot be made ({one_line(error)})") from error
    write_output(path, encoded.getvalue())


def _suffix(path: str | os.PathLike[str]) -> str:
    """The suffix that names the format of an image to write. Raises ImageError for an unknown one."""
    suffix = ".png" if os.fspath(path) == STANDARD else Path(path).suffix.lower()
    if suffix not in _SAVE_OPTIONS:
        known = ", ".join(_SAVE_OPTIONS)
        raise ImageError(f"{os.fspath(path)}: unknown image suffix {suffix!r}; use one of {known}")
    return suffix


def _to_rgb(image: Image.Image, name: str) -> tuple[np.ndarray, list[str]]:
    """The first frame of an opened image as (H x W x 3 uint8, warnings)."""
    notes = []
    if getattr(image, "is_animated", False):
        notes.append(f"{name}: has several frames; only the first is taken")
    profile = image.info.get("icc_profile")
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image, name)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            notes.append(f"{name}: transparency is flattened on white")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if profile:
        image, note = _to_srgb(image, profile)
        notes += [f"{name}: {note}"] if note else []
    return np.asarray(image.convert("RGB")), notes


def _to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """A grey image of 16 bits (or of 32 that hold no more) as one of 8: v / 257, rounded."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ImageError(
            f"{name}: 32-bit samples (Pillow mode {image.mode}) are not supported; convert the image to 8 or 16 bits"
        )
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes) -> tuple[Image.Image, str | None]:
    """The image in sRGB by its embedded profile, and a warning where that cannot be."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode not in ("RGB", "CMYK", "L") or (image.mode == "L" and source.profile.xcolor_space == "RGB "):
            image = image.convert("RGB")
        if image.mode == "RGB" and _is_srgb(source):
            return image, None  # most files are, and are left exactly as they are
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        return image, f"the embedded colour profile is not applied ({one_line(error)})"
    return converted if converted is not None else image, None


def _is_srgb(profile: ImageCms.ImageCmsProfile) -> bool:
    """Whether a profile leaves colours in sRGB as they are, within rounding. Names say little: "linear sRGB" is none.

    Colorimetric, since the perceptual tables of some profiles of sRGB change its contrast.
    """
    samples = np.array(list(itertools.product((0, 16, 64, 128, 192, 255), repeat=3)), np.uint8)
    shown = ImageCms.profileToProfile(
        Image.fromarray(samples[None]),
        profile,
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        outputMode="RGB",
    )
    return bool(np.abs(np.asarray(shown)[0].astype(int) - samples).max() <= 1)
