"""Streams in Pillow: ``import clric.pillow``, and Image.open reads them and Image.save writes them.

    im = Image.open("photo.clric")      # reads the file and its header; im.info has bpp and latent_space
    im.load(vae="taesd")                # the image decoder may be named once, before the pixels are first used
    im.save("photo.clric", bpp=0.1)     # with the image's profile, EXIF and XMP; exif=None leaves EXIF out

Whether the file is whole is known when it is opened, for a stream has a checksum. The image is decoded when its pixels
are first used, which needs onnxruntime (``pip install 'clric[cpu]'``).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from clric_decoder.bitstream import MAGIC, MAX_SIDE, METADATA
from clric_decoder.errors import warn
from clric_decoder.image import EXIF_PREFIX, to_rgb
from PIL import Image, ImageFile, UnidentifiedImageError

from . import ClricError, StreamError, check_type, decode, decode_latent, encode, read_header

FORMAT = "CLRIC"

# Pillow has its own limit, Image.MAX_IMAGE_PIXELS, which it applies to what `_open` says of the size.
_NO_LIMIT = MAX_SIDE**2

# What Image.save hands on to `encode`.
_OPTIONS = ("quality", "bpp", "size", "lmbda", "preset", "vae", "tune", "device", "seed", "models")

# What Image.save takes for metadata: types, and their names.
_METADATA_TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "icc_profile": (bytes, "bytes"),
    "exif": ((bytes, Image.Exif), "bytes or an Image.Exif"),
    "xmp": ((bytes, str), "bytes or a string"),
}


class ClricImageFile(ImageFile.ImageFile):
    """A stream that Image.open has opened; its pixels are decoded when they are first used."""

    format = FORMAT
    format_description = "clric learned image codec"

    _stream: bytes | None = None  # until the pixels are decoded

    def _open(self) -> None:
        assert self.fp is not None
        data = self.fp.read()
        try:
            header = read_header(data, max_pixels=_NO_LIMIT)
        except StreamError as error:
            if error.kind == "magic":
                raise SyntaxError(str(error)) from error  # Pillow goes on with its other formats
            raise UnidentifiedImageError(_message(self.filename, error)) from error
        self._stream = data
        self._size = header.width, header.height
        self._mode = "RGB"
        self.tile = []  # until Pillow 11, None means that there is nothing to load
        self.info["bpp"] = header.bpp
        self.info["latent_space"] = header.space
        self.info.update(header.metadata)
        if "exif" in header.metadata:
            self.info["exif"] = EXIF_PREFIX + header.metadata["exif"]  # as Pillow has it of all formats

    def load(
        self,
        *,
        vae: str | os.PathLike[str] | None = None,
        provider: str = "auto",
        models: str | os.PathLike[str] | None = None,
    ) -> "Image.core.PixelAccess | None":
        """Decodes the pixels, once; vae, provider and models are those of `clric.decode`. Raises OSError."""
        stream = self._stream  # another thread may end its own load meanwhile
        if stream is not None:
            with _os_errors(self.filename):
                pixels = decode(stream, vae=vae, provider=provider, models=models, max_pixels=_NO_LIMIT)
            self.im = Image.fromarray(pixels).im
            self.readonly = 0
            self._stream = None
            file, self.fp = self.fp, None
            if self._exclusive_fp and file is not None:
                file.close()
        return super().load()

    def verify(self) -> None:
        """Decodes the latent, which needs no image decoder. Raises OSError where the stream is not valid."""
        if self._stream is not None:
            with _os_errors(self.filename):
                decode_latent(self._stream, max_pixels=_NO_LIMIT)
            self._stream = None
        super().verify()

    def close(self) -> None:
        """Frees what the image holds."""
        self._stream = None
        super().close()


def register() -> None:
    """Makes the format known to Pillow, as importing this module has done; calling it again changes nothing."""
    Image.register_open(FORMAT, ClricImageFile, _accept)
    Image.register_save(FORMAT, _save)
    Image.register_extension(FORMAT, ".clric")
    Image.register_mime(FORMAT, "image/x-clric")


def _accept(prefix: bytes) -> bool:
    return prefix.startswith(MAGIC)


def _save(image: Image.Image, file: IO[bytes], filename: str | bytes) -> None:
    given = image.encoderinfo
    options = {name: given[name] for name in _OPTIONS if given.get(name) is not None}
    with _os_errors(filename):
        pixels, notes, metadata = to_rgb(image, strip=bool(given.get("strip")))
        if "icc_profile" in metadata and not given.get("icc_profile", True):
            pixels = to_rgb(image).pixels  # without its profile it is shown as sRGB
        for name in METADATA.values():
            if name in given:
                metadata.pop(name, None)
                if given[name]:
                    check_type(name, given[name], *_METADATA_TYPES[name])
                    metadata[name] = _to_bytes(given[name])
        for note in notes:
            warn(note)
        data = encode(pixels, metadata=metadata, **options)
    file.write(data)


def _to_bytes(content: bytes | str | Image.Exif) -> bytes:
    if isinstance(content, Image.Exif):
        return content.tobytes()
    return content.encode() if isinstance(content, str) else content


@contextmanager
def _os_errors(filename: str | bytes) -> Iterator[None]:
    """What Pillow's users catch is OSError."""
    try:
        yield
    except ClricError as error:
        raise OSError(_message(filename, error)) from error


def _message(filename: str | bytes, error: ClricError) -> str:
    return f"{os.fsdecode(filename)}: {error}" if filename else str(error)


register()
