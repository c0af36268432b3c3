"""The container of a stream: header, segments, checksum (bitstream_spec.md, "The file").

Takes and gives bytes; knows nothing of what the segments hold. Every field is checked against its limits before
anything is allocated for it.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import cached_property

from .errors import StreamError
from .models import LATENT_SPACES

MAGIC = b"\xc7LR"
VERSION = 1
MAX_SIDE = 65535
MAX_PIXELS = 89_478_485  # what a decoder accepts unless it is told otherwise: Pillow's limit
MAX_PIXELS_PER_BYTE = 1 << 14  # of the file: bounds what a small file can make a decoder do
MAX_SYNTHESIS_WEIGHTS = 1 << 15
MAX_LEVELS = 16
MAX_CHANNELS = 64
MAX_TOTAL_CHANNELS = 128
MAX_NEIGHBOURS = 8
MAX_HIDDEN_LAYERS = 4
MAX_WIDTH = 48
MAX_SYNTHESIS_LAYERS = 8
CHECKSUM_BYTES = 4

# Types of metadata (specification, "Metadata"), and the first of those that a decoder must know.
Metadata = dict[str, bytes]
METADATA = {1: "icc_profile", 2: "exif", 3: "xmp"}
CRITICAL_METADATA = 128


@dataclass(frozen=True)
class SynthesisLayer:
    """One convolution of the synthesis, with replicated borders.

    ``residual`` is 0 for none, n for adding the input of the n-th layer back, this one counted.
    """

    channels: int
    kernel: int = 1
    residual: int = 0
    relu: bool = False
    depthwise: bool = False


@dataclass(frozen=True)
class Architecture:
    """The shape of the function, as the header gives it (specification, "Architecture description").

    channels: grids of each level, the finest (level 0) first.
    neighbours: inputs of the ARM, decoded values of the same grid.
    hidden_layers, width: the ARM's layers before its last.
    grid_scales: each grid has an offset of its own to the scale that the ARM gives.
    """

    channels: tuple[int, ...]
    neighbours: int
    hidden_layers: int
    width: int
    grid_scales: bool
    synthesis: tuple[SynthesisLayer, ...]

    def to_bytes(self) -> bytes:
        """The explicit description, as a header holds it."""
        parts = [len(self.channels), *self.channels, self.neighbours]
        parts += [self.hidden_layers | self.grid_scales << 4, self.width, len(self.synthesis)]
        for layer in self.synthesis:
            kernel = layer.kernel == 3
            parts += [layer.channels, kernel | layer.residual << 1 | layer.relu << 3 | layer.depthwise << 4]
        return bytes(parts)

    def describe(self) -> str:
        """One line for people."""
        arm = " -> ".join(map(str, (self.neighbours, *(self.width,) * self.hidden_layers, 2)))
        layers = ", ".join(
            f"{layer.channels} {layer.kernel}x{layer.kernel}"
            + " depthwise" * layer.depthwise
            + f" + residual over {layer.residual}" * bool(layer.residual)
            + " ReLU" * layer.relu
            for layer in self.synthesis
        )
        return (
            f"channels {'+'.join(map(str, self.channels))}; ARM {arm}"
            + ", a scale for each grid" * self.grid_scales
            + f"; synthesis {layers}"
        )


def registered_architecture(number: int) -> Architecture:
    """The architecture of one of `REGISTERED_FUNCTIONS`. Raises StreamError for a number that is not registered."""
    if number not in REGISTERED_FUNCTIONS:
        raise StreamError("unsupported", f"function {number} is not known; a newer decoder may know it")
    return _read_architecture(_Reader(REGISTERED_FUNCTIONS[number]))


# Functions that a header names with one byte instead of describing them (specification, "Registered functions"), by
# their descriptions, and the numbers of those that come with networks (registered_networks.py).
WITH_NETWORKS = range(8, 15)
REGISTERED_FUNCTIONS = {
    1: bytes.fromhex("05040101010108120803040008090405"),  # preset default, 4 channels
    2: bytes.fromhex("0701010101010101080208042808040004090405"),  # preset paper, 4 channels
    3: bytes.fromhex("05100101010108120803100010191004"),  # preset default, 16 channels
    4: bytes.fromhex("05200101010108120803200020192004"),  # preset default, 32 channels
    5: bytes.fromhex("0701010101010101080208042808100010191015"),  # preset paper, 16 channels
    6: bytes.fromhex("0701010101010101080208042808200020192015"),  # preset paper, 32 channels
    7: bytes.fromhex("05080101010108120803080008190804"),  # preset default, 8 channels
    **dict.fromkeys(WITH_NETWORKS, bytes.fromhex("010808120803080008190804")),  # preset instant, 8 channels
}


@dataclass(frozen=True)
class Header:
    """All that a stream says of itself before its payload."""

    version: int
    width: int
    height: int
    space: str
    channels: int
    architecture: Architecture
    function: int  # its number among `REGISTERED_FUNCTIONS`; 0 where the stream describes it
    image_decoder: int  # number of the image decoder that it was trained for, within the latent space; 0: not said
    metadata: Metadata  # by the names in `METADATA`; those of other types are left out
    header_bytes: int  # everything that is neither metadata, networks nor grids: the checksum too
    metadata_bytes: int
    network_bytes: int
    level_bytes: tuple[int, ...]  # the finest level first

    @property
    def latent_height(self) -> int:
        return -(-self.height // 8)

    @property
    def latent_width(self) -> int:
        return -(-self.width // 8)

    @cached_property
    def grid_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(channels, height, width) of each level's grids, the finest first."""
        return grid_shapes(self.architecture.channels, self.latent_height, self.latent_width)

    @property
    def total_bytes(self) -> int:
        return self.header_bytes + self.network_bytes + sum(self.level_bytes) + self.metadata_bytes

    @property
    def bpp(self) -> float:
        """Bits of the whole file over image pixels."""
        return 8 * self.total_bytes / (self.width * self.height)


@dataclass(frozen=True)
class Segments:
    """The payload: each part as the bytes that its decoder takes."""

    networks: bytes
    levels: tuple[bytes, ...]  # the finest level first


def grid_shapes(channels: tuple[int, ...], height: int, width: int) -> tuple[tuple[int, int, int], ...]:
    """(channels, height, width) of each level's grids over a latent of height x width."""
    return tuple((c, -(-height >> i), -(-width >> i)) for i, c in enumerate(channels))


class _Reader:
    """Takes fields off the front of the header; a field that runs past the end is an error."""

    def __init__(self, data: bytes | memoryview):
        self._data = data
        self.position = 0

    def bytes(self, count: int) -> bytes:
        if count > len(self._data) - self.position:
            raise StreamError("truncated", "the file ends within its header or a segment; fetch it again")
        self.position += count
        return bytes(self._data[self.position - count : self.position])

    def integer(self, count: int = 1) -> int:
        return int.from_bytes(self.bytes(count), "big")

    def length(self) -> int:
        """A length in LEB128: seven bits a byte, the lowest first, in as few bytes as it needs."""
        value = 0
        for shift in range(0, 35, 7):
            byte = self.integer()
            value |= (byte & 127) << shift
            if byte < 128:
                if byte == 0 and shift:
                    break
                return value
        raise StreamError("field", "a length is not written in its shortest form; the file is not valid")


def _length(value: int) -> bytes:
    parts = []
    while value >= 128:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def _check(field: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise StreamError("field", f"{field} is {value}, not within {low} to {high}; the file is not valid")
    return value


def _reserved(field: str, value: int) -> None:
    if value:
        raise StreamError("unsupported", f"{field} uses a reserved bit; a newer decoder may know it")


def _read_architecture(reader: _Reader) -> Architecture:
    levels = _check("the number of levels", reader.integer(), 1, MAX_LEVELS)
    channels = tuple(_check("a level's channels", reader.integer(), 0, MAX_CHANNELS) for _ in range(levels))
    _check("the coarsest level's channels", channels[-1], 1, MAX_CHANNELS)
    _check("the sum of all levels' channels", sum(channels), 1, MAX_TOTAL_CHANNELS)
    neighbours = _check("the number of neighbours", reader.integer(), 1, MAX_NEIGHBOURS)
    flags = reader.integer()
    hidden_layers = _check("the number of the ARM's hidden layers", flags & 15, 0, MAX_HIDDEN_LAYERS)
    _reserved("the ARM's description", flags >> 5)
    width = _check("the ARM's width", reader.integer(), 1, MAX_WIDTH)
    synthesis: list[SynthesisLayer] = []
    sizes = [sum(channels)]
    weights = 0
    for number in range(_check("the number of synthesis layers", reader.integer(), 1, MAX_SYNTHESIS_LAYERS)):
        out = _check("a synthesis layer's channels", reader.integer(), 1, MAX_CHANNELS)
        bits = reader.integer()
        _reserved("a synthesis layer", bits >> 5)
        residual, depthwise = bits >> 1 & 3, bool(bits & 16)
        _check("a synthesis layer's residual", residual, 0, min(3, number + 1))
        if residual and sizes[-residual] != out:
            raise StreamError("field", "a residual joins layers of different widths; the file is not valid")
        if depthwise and sizes[-1] != out:
            raise StreamError("field", "a depthwise layer changes its width; the file is not valid")
        weights += out * (1 if depthwise else sizes[-1]) * (9 if bits & 1 else 1)
        _check("the number of synthesis weights", weights, 1, MAX_SYNTHESIS_WEIGHTS)
        synthesis.append(SynthesisLayer(out, 3 if bits & 1 else 1, residual, bool(bits & 8), depthwise))
        sizes.append(out)
    return Architecture(
        channels=channels,
        neighbours=neighbours,
        hidden_layers=hidden_layers,
        width=width,
        grid_scales=bool(flags & 16),
        synthesis=tuple(synthesis),
    )


def read(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[Header, Segments]:
    """Header and segments of a stream.

    max_pixels: images of more pixels are refused before memory is taken for them.
    Raises StreamError, whose ``kind`` says what is wrong (specification, "Errors").
    """
    _check_version(data)
    body = memoryview(data)[:-CHECKSUM_BYTES]
    if len(body) < 4 or zlib.crc32(body) != int.from_bytes(data[-CHECKSUM_BYTES:], "big"):
        raise StreamError("checksum", "checksum mismatch: the file is corrupt or truncated; fetch it again")
    reader = _Reader(body)
    header = _read_header(reader, len(data), max_pixels)
    networks = reader.bytes(header.network_bytes)
    levels = [reader.bytes(length) for length in header.level_bytes[::-1]]
    return header, Segments(networks, tuple(levels[::-1]))


def read_header(data: bytes, max_pixels: int = MAX_PIXELS, size: int | None = None) -> Header:
    """What a stream says of itself.

    size: bytes of the whole file, where ``data`` is only its beginning; the checksum is then not looked at.
    Raises StreamError, of kind ``truncated`` where the header or the metadata needs more bytes than ``data`` has.
    """
    if size is None:
        return read(data, max_pixels)[0]
    _check_version(data)
    return _read_header(_Reader(data), size, max_pixels)


def _check_version(data: bytes) -> None:
    if data[: len(MAGIC)] != MAGIC[: len(data)] or not data:
        raise StreamError("magic", "not a clric stream: it does not begin with the bytes C7 4C 52")
    if len(data) < 4:
        raise StreamError("truncated", f"the file ends after {len(data)} bytes; fetch it again")
    if data[3] == 0:
        raise StreamError(
            "version", "pre-release stream version 0: decode it with clric 0.1, or encode its image again"
        )
    if data[3] != VERSION:
        raise StreamError("version", f"stream version {data[3]}; this decoder knows version {VERSION}: get a newer one")


def _read_header(reader: _Reader, size: int, max_pixels: int) -> Header:
    """The header of a file of ``size`` bytes, metadata included."""
    reader.bytes(4)
    flags = reader.integer()
    width = _check("the image's width", reader.integer(2), 1, MAX_SIDE)
    height = _check("the image's height", reader.integer(2), 1, MAX_SIDE)
    if width * height > max_pixels:
        raise StreamError(
            "limit",
            f"the image has {width} x {height} pixels, over the limit of {max_pixels}; raise max_pixels (--max-pixels)",
        )
    if width * height > size * MAX_PIXELS_PER_BYTE:
        raise StreamError("field", f"{size} bytes are too few for an image of {width} x {height} pixels")
    space, channels = _read_space(reader, flags & 15)
    function = reader.integer()
    architecture = registered_architecture(function) if function else _read_architecture(reader)
    _check("the last synthesis layer's channels", architecture.synthesis[-1].channels, channels, channels)
    metadata_bytes = reader.length() if flags & 16 else 0
    network_bytes = reader.length()
    coarse = [reader.length() if c else 0 for c in architecture.channels[:0:-1]][::-1]
    header_bytes = reader.position + CHECKSUM_BYTES
    finest = size - header_bytes - metadata_bytes - network_bytes - sum(coarse)
    if finest < 0:
        raise StreamError("truncated", "the file ends within its header or a segment; fetch it again")
    if finest and not architecture.channels[0]:
        raise StreamError("field", f"{finest} bytes for a finest level without grids; the file is not valid")
    return Header(
        version=VERSION,
        width=width,
        height=height,
        space=space,
        channels=channels,
        architecture=architecture,
        function=function,
        image_decoder=flags >> 5,
        metadata=_read_metadata(reader.bytes(metadata_bytes)),
        header_bytes=header_bytes,
        metadata_bytes=metadata_bytes,
        network_bytes=network_bytes,
        level_bytes=(finest, *coarse),
    )


def _read_metadata(segment: bytes) -> Metadata:
    """The content of the metadata entries whose types are known; of several of one type, of the first."""
    reader, metadata = _Reader(segment), Metadata()
    while reader.position < len(segment):
        try:
            kind = reader.integer()
            if kind >= CRITICAL_METADATA:
                raise StreamError("unsupported", f"metadata of the critical type {kind}; a newer decoder may know it")
            content = reader.bytes(reader.length())
        except StreamError as error:
            if error.kind != "truncated":
                raise
            raise StreamError("field", "a metadata entry reaches past its segment; the file is not valid") from error
        if kind in METADATA:
            metadata.setdefault(METADATA[kind], content)
    return metadata


def _read_space(reader: _Reader, number: int) -> tuple[str, int]:
    """Name and channels of the latent space; a custom one brings its channels and fingerprint along."""
    if number == 0:
        channels = _check("the latent's channels", reader.integer(), 1, MAX_CHANNELS)
        return f"custom-{reader.bytes(8).hex()}", channels
    for space in LATENT_SPACES.values():
        if space.number == number:
            return space.name, space.channels
    raise StreamError("unsupported", f"latent space {number} is not known; a newer decoder may know it")


def write(
    *,
    width: int,
    height: int,
    space: str,
    channels: int,
    architecture: Architecture,
    segments: Segments,
    metadata: Metadata | None = None,
    function: int = 0,
    image_decoder: int = 0,
) -> bytes:
    """The stream of an image; the inverse of `read`.

    metadata: by the names in `METADATA`. function: the number of a registered function whose networks the stream leaves
    out; 0 for networks of its own. image_decoder: see `Header`. Raises StreamError for what the format cannot hold,
    since it reads its own output back.
    """
    metadata = metadata or {}
    entries = [(kind, metadata[name]) for kind, name in METADATA.items() if name in metadata]
    entry_bytes = b"".join(bytes([kind]) + _length(len(content)) + content for kind, content in entries)
    # A blank image may need fewer bytes than the format allows for its pixels: zeros pad its networks
    payload = len(entry_bytes) + len(segments.networks) + sum(map(len, segments.levels))
    padding = -(-width * height // MAX_PIXELS_PER_BYTE) - payload
    segments = replace(segments, networks=segments.networks + bytes(max(0, padding)))
    registered = LATENT_SPACES.get(space)
    flags = (registered.number if registered else 0) | bool(entry_bytes) << 4
    flags |= _check("the number of the image decoder", image_decoder, 0, 7) << 5
    parts = [MAGIC, bytes([VERSION, flags])]
    for name, side in (("width", width), ("height", height)):
        parts.append(_check(f"the image's {name}", side, 1, MAX_SIDE).to_bytes(2, "big"))
    if registered is None:
        parts += [bytes([channels]), bytes.fromhex(space.removeprefix("custom-"))]
    description = architecture.to_bytes()
    numbers = [n for n, known in REGISTERED_FUNCTIONS.items() if known == description and n not in WITH_NETWORKS]
    number = function or (numbers[0] if numbers else 0)
    parts += [bytes([number]), b"" if number else description]
    parts += [_length(len(entry_bytes))] * bool(entry_bytes)
    parts.append(_length(len(segments.networks)))
    coarse = [(c, level) for c, level in zip(architecture.channels, segments.levels, strict=True)][:0:-1]
    parts += [_length(len(level)) for c, level in coarse if c]
    parts += [entry_bytes, segments.networks, *segments.levels[::-1]]
    body = b"".join(parts)
    data = body + zlib.crc32(body).to_bytes(CHECKSUM_BYTES, "big")
    header, back = read(data, max_pixels=MAX_SIDE**2)
    if (back, header.metadata, header.architecture) != (segments, metadata, architecture):
        raise StreamError("field", "the stream does not read back as written")
    return data
