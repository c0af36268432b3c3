"""An independent reference decoder of the clric image stream, version 0.

Written from the specification (bitstream_spec.md) alone, to be read beside it: one function or class per
section, plain Python integers from the bytes to the grids, numpy in float64 from the grids to the latent. It
is made to be simple, not fast. It imports nothing from the product.

Command line: python reference_decoder.py STREAM [--grids OUT] [--latent OUT]
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Grid = list[list[int]]  # [row][column]
Level = list[Grid]  # [channel][row][column]; empty for a level without channels
Array = NDArray[np.float64]

ERRORS = ("magic", "truncated", "version", "checksum", "unsupported", "field", "limit", "payload")

MAGIC = b"\xc7\x4c\x52"
SPACES = {1: ("sd1", 4), 2: ("sdxl", 4), 3: ("sd3", 16), 4: ("flux1", 16), 5: ("flux2", 32)}  # section 3.1
ARCHITECTURES = {  # section 10
    1: bytes.fromhex("0504010101010800220803040008090405"),
    2: bytes.fromhex("070101010101010108000208042808040004090405"),
    3: bytes.fromhex("0510010101010800220803100010191004"),
    4: bytes.fromhex("0520010101010800220803200020192004"),
    5: bytes.fromhex("070101010101010108000208042808100010191015"),
    6: bytes.fromhex("070101010101010108000208042808200020192015"),
}
UPSAMPLER_DEFAULT = (-0.03515625, 0.26171875, 0.87890625, -0.10546875)  # section 6.2, default set 0
NEIGHBOURS = (  # section 7.2: (dy, dx)
    (0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0), (-3, 0), (0, -3),
    (-1, -2), (-2, -1), (-2, 1), (-2, 2), (-1, -3), (-2, -2), (-3, 1), (-3, -1),
)  # fmt: skip
MAX_VALUES_PER_BYTE = 1000  # section 7
MAX_PIXELS_PER_BYTE = 16384  # section 11
MAX_SYNTHESIS_WEIGHTS = 32768  # section 3.2
MAX_GRID_VALUE = 32767  # section 7
MAX_ESCAPE_BITS = 15  # section 5.2


class StreamError(ValueError):
    """The stream is not valid, or beyond a limit; ``kind`` is one of the error names of section 12."""

    def __init__(self, kind: str, message: str) -> None:
        """Keep the error's name beside its message."""
        assert kind in ERRORS
        super().__init__(message)
        self.kind = kind


# ---- section 3: the header


@dataclass(frozen=True)
class Layer:
    """A synthesis layer (section 3.2)."""

    inputs: int
    outputs: int
    kernel: int
    residual: int
    relu: bool
    depthwise: bool


@dataclass(frozen=True)
class Architecture:
    """An architecture description (section 3.2)."""

    channels: tuple[int, ...]  # of each level, the finest first
    neighbours: int
    earlier: int
    coarser: int
    hidden: int
    two_arms: bool
    grid_scales: bool
    width: int
    layers: tuple[Layer, ...]

    @property
    def levels(self) -> int:
        """The number of levels, L."""
        return len(self.channels)

    @property
    def arm_widths(self) -> list[int]:
        """Inputs of the ARM, then outputs of its layers (section 6.1)."""
        return [self.neighbours + self.earlier + self.coarser, *[self.width] * self.hidden, 2]


@dataclass(frozen=True)
class Header:
    """The header (section 3), and the segments that its lengths cut from the file (section 2)."""

    width: int
    height: int
    space: str
    channels: int
    architecture: Architecture
    networks: bytes
    levels: tuple[bytes, ...]  # the finest first; empty for a level without channels
    metadata: bytes

    def size(self, level: int) -> tuple[int, int]:
        """Rows and columns of a level's grids (section 1)."""
        rows, columns = -(-self.height // 8), -(-self.width // 8)
        return -(-rows >> level), -(-columns >> level)


class Fields:
    """Reads fields one after another from bytes."""

    def __init__(self, data: bytes) -> None:
        """Start at the first byte of ``data``."""
        self.data = data
        self.position = 0

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        if count > len(self.data) - self.position:
            raise StreamError("truncated", f"{count} bytes wanted at {self.position} run past the end")
        self.position += count
        return self.data[self.position - count : self.position]

    def number(self, count: int) -> int:
        """A big-endian integer of ``count`` bytes."""
        return int.from_bytes(self.take(count), "big")

    def limited(self, name: str, low: int, high: int, count: int = 1) -> int:
        """An integer that must lie within ``low`` ... ``high``."""
        return within(name, self.number(count), low, high)

    def leb128(self) -> int:
        """A length (section 3): seven bits a byte, lowest first, shortest form, five bytes at most."""
        result = 0
        for index in range(5):
            byte = self.number(1)
            result |= (byte & 127) << (7 * index)
            if byte < 128:
                if byte == 0 and index > 0:
                    raise StreamError("field", "a length is not in its shortest form")
                return result
        raise StreamError("field", "a length has more than 5 bytes")


def within(name: str, value: int, low: int, high: int) -> int:
    """``value``, which must lie within ``low`` ... ``high``."""
    if not low <= value <= high:
        raise StreamError("field", f"{name} is {value}, not within {low} ... {high}")
    return value


def check_container(data: bytes) -> None:
    """Sections 2 and 12: magic, version, checksum, in this order."""
    if not data or data[:3] != MAGIC[: len(data)]:
        raise StreamError("magic", "not a clric stream")
    if len(data) < 4:
        raise StreamError("truncated", "the file ends within magic or version")
    if data[3] != 0:
        raise StreamError("version", f"version {data[3]} is not known")
    if len(data) < 8:
        raise StreamError("checksum", "the file is too short for a checksum")
    if zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "big"):
        raise StreamError("checksum", "the checksum does not match")


def read_header(data: bytes, max_pixels: int) -> Header:
    """Sections 2 and 3, of a file whose magic, version and checksum are right."""
    fields = Fields(data[:-4])  # neither a field nor a segment may reach into the checksum
    fields.take(4)
    flags = fields.number(1)
    if flags >> 5:
        raise StreamError("unsupported", f"default set {flags >> 5} is not known")
    space = flags & 15
    if space != 0 and space not in SPACES:
        raise StreamError("unsupported", f"latent space {space} is not known")
    width = fields.limited("width", 1, 65535, 2)
    height = fields.limited("height", 1, 65535, 2)
    if width * height > max_pixels:
        raise StreamError("limit", f"{width} x {height} pixels are more than {max_pixels}")
    if width * height > MAX_PIXELS_PER_BYTE * len(data):
        raise StreamError("field", f"{len(data)} bytes are too few for {width} x {height} pixels")
    if space == 0:
        channels = fields.limited("latent channels", 1, 64)
        name = "custom-" + fields.take(8).hex()
    else:
        name, channels = SPACES[space]

    number = fields.number(1)
    if number == 0:
        architecture = read_architecture(fields, channels)
    elif number in ARCHITECTURES:
        architecture = read_architecture(Fields(ARCHITECTURES[number]), channels)
    else:
        raise StreamError("unsupported", f"architecture {number} is not known")

    networks_length = fields.leb128()
    lengths = [0] * architecture.levels
    for level in range(architecture.levels - 1, 0, -1):
        if architecture.channels[level]:
            lengths[level] = fields.leb128()
    metadata_length = fields.leb128() if flags & 16 else 0

    left = len(fields.data) - fields.position - networks_length - sum(lengths) - metadata_length
    if left < 0:
        raise StreamError("truncated", "the lengths add up to more than the file holds")
    if left > 0 and architecture.channels[0] == 0:
        raise StreamError("field", "bytes are left for level 0, which has no channels")
    lengths[0] = left
    networks = fields.take(networks_length)
    levels = [fields.take(length) for length in reversed(lengths)][::-1]
    metadata = fields.take(metadata_length)  # section 3.3: a decoder may ignore what it holds
    return Header(width, height, name, channels, architecture, networks, tuple(levels), metadata)


def read_architecture(fields: Fields, latent_channels: int) -> Architecture:
    """Section 3.2."""
    levels = fields.limited("levels", 1, 16)
    channels = tuple(fields.limited(f"channels of level {i}", 0, 64) for i in range(levels))
    if channels[-1] == 0:
        raise StreamError("field", "the coarsest level has no channels")
    within("channels of all levels", sum(channels), 1, 128)

    neighbours = fields.limited("neighbours", 0, 16)
    byte = fields.number(1)
    earlier = within("earlier channels", byte & 15, 0, 7)
    coarser = within("coarser samples", byte >> 4, 0, 4)
    if neighbours + earlier + coarser == 0:
        raise StreamError("field", "the ARM has no inputs")
    byte = fields.number(1)
    if byte >> 6:
        raise StreamError("unsupported", "a reserved bit of the ARM is set")
    hidden = within("hidden layers", byte & 15, 0, 4)
    two_arms, grid_scales = bool(byte & 16), bool(byte & 32)
    width = fields.limited("width of the ARM", 1, 48)

    count = fields.limited("synthesis layers", 1, 8)
    layers: list[Layer] = []
    weights = 0
    inputs = sum(channels)
    for index in range(count):
        outputs = fields.limited(f"channels of layer {index}", 1, 64)
        kind = fields.number(1)
        if kind >> 5:
            raise StreamError("unsupported", f"a reserved bit of layer {index} is set")
        residual = kind >> 1 & 3
        layer = Layer(inputs, outputs, 3 if kind & 1 else 1, residual, bool(kind & 8), bool(kind & 16))
        layers.append(layer)
        weights += outputs * (1 if layer.depthwise else inputs) * layer.kernel**2
        within("synthesis weights", weights, 1, MAX_SYNTHESIS_WEIGHTS)
        if residual:
            within(f"layer that layer {index} adds the input of", index - residual + 1, 0, index)
            if layers[index - residual + 1].inputs != outputs:
                raise StreamError("field", f"layer {index} adds an input of another number of channels")
        if layer.depthwise and inputs != outputs:
            raise StreamError("field", f"layer {index} is depthwise and changes the number of channels")
        inputs = outputs
    if inputs != latent_channels:
        raise StreamError("field", f"the last layer has {inputs} channels, the latent {latent_channels}")
    return Architecture(channels, neighbours, earlier, coarser, hidden, two_arms, grid_scales, width, tuple(layers))


# ---- section 4: probability tables

D_TEXT = """
    790015084 858380948 926260603 993214474 1058856952 1122857733 1184941259 1244884674
    1302514674 1357703594 1410365023 1460449192 1507938324 1552842111 1595193398 1635044183
    1672461947 1707526359 1740326356 1770957582 1799520184 1826116930 1850851625 1873827806
    1895147668 1914911208 1933215558 1950154468 1965817939 1980291960 1993658346 2005994659
    2017374191 2027865998 2037534981 2046441993 2054643979 2062194123 2069142020 2075533842
    2081412522 2086817930 2091787048 2096354149 2100550963 2104406842 2107948921 2111202261
    2114190000 2116933485 2119452401 2121764891 2123887672 2125836137 2127624459 2129265679
    2130771798 2132153851 2133421987 2134585536 2135653073 2136632477 2137530990 2138355262
    2139111403 2139805021 2140441270 2141024879 2141560191 2142051191 2142501540 2142914595
    2143293437 2143640897 2143959568 2144251832 2144519874 2144765700 2144991148 2145197905
"""  # appendix A
D = [int(number) for number in D_TEXT.split()]
