"""RGB images from and to files: whatever Pillow reads comes in as H x W x 3 uint8, and goes out by suffix.

Colours are sRGB unless a profile is kept: else one of another colour space is applied on reading.
"""

import io
import itertools
import os
import re
import warnings
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

from .bitstream import Metadata
from .errors import ImageError, one_line
from .files import STANDARD, check_output, write_output

# How each suffix is written, by the names that Pillow has for format and options: as near to lossless as the format
# allows. (Asked for the format of a suffix, Pillow loads all that it knows.)
_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {"compress_level": 4}),  # a third of the time of Pillow's 6, and 1 % more bytes
    ".jpg": ("JPEG", {"quality": 95}),
    ".jpeg": ("JPEG", {"quality": 95}),
    ".webp": ("WEBP", {"lossless": True}),
    ".tif": ("TIFF", {"compression": "tiff_deflate"}),
    ".tiff": ("TIFF", {"compression": "tiff_deflate"}),
    ".bmp": ("BMP", {}),
    ".ppm": ("PPM", {}),
}

# What stands before EXIF in a JPEG file, but not in a stream; and the tag of XMP in a TIFF file.
EXIF_PREFIX, _TIFF_XMP = b"Exif\0\0", 700

# Of a TIFF file's tags, those that say something of the picture; the others say how its pixels are stored.
_TIFF_EXIF = {
    *(ExifTags.Base.ImageDescription, ExifTags.Base.Make, ExifTags.Base.Model),
    *(ExifTags.Base.XResolution, ExifTags.Base.YResolution, ExifTags.Base.ResolutionUnit, ExifTags.Base.Software),
    *(ExifTags.Base.DateTime, ExifTags.Base.Artist, ExifTags.Base.HostComputer, ExifTags.Base.Copyright),
    *(ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo),
}

# XMP's orientation, as an attribute and as an element, by the prefix of its namespace, and what binds prefixes to that.
# All runs are short: they are tried from each place where one may begin, and hostile metadata has megabytes.
_XMP_ORIENTATION = (
    rb"""\s%(p)s:Orientation\s{0,9}=\s{0,9}("[^"]{0,99}"|'[^']{0,99}')"""
    rb"""|<%(p)s:Orientation(\s[^<>]{0,99})?>[^<]{0,99}(<!--[^<>]{0,99}-->[^<]{0,99})?</%(p)s:Orientation\s{0,9}>"""
)
_XMP_PREFIX = re.compile(rb"""\sxmlns:([\w.-]{1,99})\s{0,9}=\s{0,9}["']http://ns\.adobe\.com/tiff/1\.0/["']""")
_XMP_PREFIXES = 9

# The most pixels of an image to encode, unless the caller says otherwise.
MAX_SOURCE_PIXELS = 1 << 28


class Picture(NamedTuple):
    """An image: pixels H x W x 3 uint8 RGB, sRGB unless the metadata has a profile; and warnings for the user."""

    pixels: np.ndarray
    notes: list[str]
    metadata: Metadata


def read_image(
    source: str | os.PathLike[str] | BinaryIO, *, max_pixels: int = MAX_SOURCE_PIXELS, strip: bool = True
) -> Picture:
    """An image file, or a seekable stream of one.

    The orientation of EXIF is applied. Grey, palette and CMYK become RGB, 16 bits are scaled to 8,
    transparency is flattened on white (with a warning), of several frames the first is taken (with a
    warning). strip: no metadata is kept, and colours are converted to sRGB by the profile; else an RGB profile
    that is not sRGB's is kept with the pixels as they are, and so are EXIF (without its thumbnail) and XMP.
    Raises ImageError, one line that starts with the file's name, for a file that is missing,
    damaged, no image, or of more than ``max_pixels`` pixels; the last before any pixel is decoded. Pillow's
    own limit (PIL.Image.MAX_IMAGE_PIXELS) counts too.
    """
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else str(getattr(source, "name", "-"))
    try:
        with Image.open(source) as image:
            picture = _to_rgb(image, name, max_pixels, strip)
            if getattr(image, "is_animated", False):
                picture.notes.insert(0, f"{name}: has several frames; only the first is taken")
            return picture
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{name}: exceeds Pillow's limit of pixels; make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: unsupported or unrecognised image format") from error
    except OSError as error:
        raise ImageError(f"{name}: {error.strerror or one_line(error)}") from error
    except Exception as error:
        # Pillow's readers let all kinds escape on damaged files: SyntaxError, ValueError, struct.error, ...
        raise ImageError(f"{name}: damaged image ({one_line(error)})") from error


def to_rgb(image: Image.Image, *, max_pixels: int = MAX_SOURCE_PIXELS, strip: bool = True) -> Picture:
    """A Pillow image, which stays as it is, as what `read_image` makes of a file; of several frames the current one.

    Raises ImageError for one that cannot be loaded or has no RGB form, and for more than ``max_pixels`` pixels.
    """
    name = os.fsdecode(getattr(image, "filename", "") or "the image")
    try:
        return _to_rgb(image, name, max_pixels, strip)
    except ImageError:
        raise
    except Exception as error:  # of a damaged file, as in `read_image`, or of a mode that Pillow does not convert
        raise ImageError(f"{name}: cannot be read as RGB ({one_line(error)})") from error


def take_over_pillow() -> None:
    """For the process of a command, before its first image: lifts Pillow's own limit, and silences its warnings.

    Both are the whole process's, and a program that uses clric as a library has its own ideas of them: `read_image`
    leaves them alone. Commands have max_pixels instead, and Pillow's warnings are about metadata.
    """
    Image.MAX_IMAGE_PIXELS = None
    warnings.filterwarnings("ignore", module=r"PIL\.")


def check_image_output(path: str | os.PathLike[str]) -> None:
    """Raises the errors of `write_image` that are known from the path alone, before work is done in vain."""
    _suffix(path)
    check_output(path)


def write_image(path: str | os.PathLike[str], image: np.ndarray, metadata: Metadata | None = None) -> list[str]:
    """Writes an H x W x 3 uint8 array in the format that the suffix names; ``-`` is a PNG to standard output.

    metadata: goes into formats that have a place for it, all but BMP and PPM. A file appears whole or not at all.
    Gives warnings for the user, of metadata that the format cannot hold: the image is written without it.
    Raises ImageError for an unknown suffix or an image that the format cannot hold, ClricError where the file cannot
    be written.
    """
    suffix, notes = _suffix(path), []
    metadata = dict(metadata or {})
    if suffix in (".bmp", ".ppm"):
        if "icc_profile" in metadata:
            notes.append(f"{suffix} holds no colour profile, without which colours are not what they were")
        metadata = {}
    for name, content in list(metadata.items()):
        if reason := _why_not_held(suffix, {name: content}):
            notes.append(f"{name} is left out, {suffix} cannot hold it ({reason})")
            del metadata[name]
    try:
        encoded = _encoded(suffix, image, metadata)
    except (OSError, ValueError) as error:
        raise ImageError(f"{os.fspath(path)}: cannot be made ({one_line(error)})") from error
    write_output(path, encoded)
    return notes


def _why_not_held(suffix: str, metadata: Metadata) -> str | None:
    """What is wrong with metadata for the format of a suffix, tried on one pixel; None if nothing is."""
    try:
        _encoded(suffix, np.zeros((1, 1, 3), np.uint8), metadata)
    except Exception as error:  # what a stream calls EXIF may be anything, and so is what Pillow raises then
        return one_line(error)
    return None


def _encoded(suffix: str, image: np.ndarray, metadata: Metadata) -> bytes:
    file = io.BytesIO()
    name, options = _FORMATS[suffix]
    Image.fromarray(image).save(file, name, **options | _metadata_options(suffix, metadata))
    return file.getvalue()


def _metadata_options(suffix: str, metadata: Metadata) -> dict[str, Any]:
    """Pillow's names for metadata in the format of a suffix, without orientations: pixels are upright."""
    options: dict[str, Any] = {}
    if "icc_profile" in metadata:
        options["icc_profile"] = metadata["icc_profile"]
    if "exif" in metadata and (exif := _upright_exif(metadata["exif"])):
        options["exif"] = EXIF_PREFIX + exif
    xmp = _upright_xmp(metadata.get("xmp", b""))
    if xmp and suffix == ".png":
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", xmp.decode(errors="replace"))
        options["pnginfo"] = text
    elif xmp and suffix in (".tif", ".tiff"):
        tags = Image.Exif()
        if "exif" in options:
            tags.load(options["exif"])
        tags[_TIFF_XMP] = xmp
        options["exif"] = tags
    elif xmp:
        options["xmp"] = xmp
    if suffix in (".tif", ".tiff") and "exif" in options:
        options["compression"] = None  # libtiff cannot write EXIF's own directory, and Pillow cannot compress
    return options


def _suffix(path: str | os.PathLike[str]) -> str:
    """The suffix that names the format of an image to write. Raises ImageError for an unknown one."""
    suffix = ".png" if os.fspath(path) == STANDARD else Path(path).suffix.lower()
    if suffix not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise ImageError(f"{os.fspath(path)}: unknown image suffix {suffix!r}; use one of {known}")
    return suffix


def _to_rgb(image: Image.Image, name: str, max_pixels: int, strip: bool) -> Picture:
    """The current frame of an opened image."""
    if image.width * image.height > max_pixels:
        raise ImageError(
            f"{name}: {image.width} x {image.height} exceeds the limit of {max_pixels} pixels; make it smaller"
        )
    notes = []
    profile = image.info.get("icc_profile")
    metadata: Metadata = {}
    orientation = 1
    try:
        exif = image.getexif()
        orientation = exif.get(ExifTags.Base.Orientation, 1)
        content = exif.tobytes() if len(exif) and not strip else b""  # while a TIFF file is open
        if content:
            metadata["exif"] = _upright_exif(content, of_tiff=hasattr(image, "tag_v2"))
    except Exception as error:  # as in `read_image`
        notes.append(f"{name}: its EXIF is left out, which cannot be read ({one_line(error)})")
    image.load()
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    if xmp and not strip:
        metadata["xmp"] = _upright_xmp(xmp.encode() if isinstance(xmp, str) else xmp)
    metadata = {key: value for key, value in metadata.items() if value}
    if orientation != 1:  # without the copy that is made where it is 1
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image, name)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            notes.append(f"{name}: transparency is flattened on white")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if profile:
        image, kept, note = _apply_profile(image, profile, strip)
        if kept:
            metadata["icc_profile"] = profile
        notes += [f"{name}: {note}"] if note else []
    return Picture(np.asarray(image.convert("RGB")), notes, metadata)


def upright(metadata: Metadata) -> Metadata:
    """Metadata as streams hold it: EXIF without prefix, orientation and thumbnail, and XMP without orientation.

    What is empty then is left out. Raises ImageError for EXIF that cannot be read.
    """
    result = dict(metadata)
    if "exif" in result:
        try:
            result["exif"] = _upright_exif(result["exif"])
        except Exception as error:  # Pillow's readers let all kinds escape
            raise ImageError(f"the EXIF metadata cannot be read ({one_line(error)})") from error
    if "xmp" in result:
        result["xmp"] = _upright_xmp(result["xmp"])
    return {name: content for name, content in result.items() if content}


def _upright_exif(content: bytes, of_tiff: bool = False) -> bytes:
    """As `upright`; Pillow leaves out the thumbnail, which can be longer than the stream."""
    exif = Image.Exif()
    exif.load(content)
    exif.pop(ExifTags.Base.Orientation, None)
    for tag in set(exif) - _TIFF_EXIF if of_tiff else ():
        del exif[tag]
    return exif.tobytes().removeprefix(EXIF_PREFIX) if len(exif) else b""


def _upright_xmp(content: bytes) -> bytes:
    prefixes = {b"tiff"}
    for match in _XMP_PREFIX.finditer(content):
        if len(prefixes) < _XMP_PREFIXES:
            prefixes.add(match[1])
    for prefix in sorted(prefixes):
        content = re.sub(_XMP_ORIENTATION % {b"p": re.escape(prefix)}, b"", content)
    return content


def _to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """A grey image of 16 bits (or of 32 that hold no more) as one of 8: v / 257, rounded."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ImageError(
            f"{name}: 32-bit samples (Pillow mode {image.mode}) are not supported; convert the image to 8 or 16 bits"
        )
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _apply_profile(image: Image.Image, profile: bytes, strip: bool) -> tuple[Image.Image, bool, str | None]:
    """The image in sRGB by its embedded profile, or as it is if the profile is kept; whether it is; and a warning."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode not in ("RGB", "CMYK", "L") or (image.mode == "L" and source.profile.xcolor_space == "RGB "):
            image = image.convert("RGB")
        if image.mode == "RGB" and _is_srgb(source):
            return image, False, None  # most files are, and are left exactly as they are
        if image.mode == "RGB" and not strip:
            return image, True, None
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        return image, False, f"the embedded colour profile is not applied ({one_line(error)})"
    return image if converted is None else converted, False, None


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
