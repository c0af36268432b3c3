"""A slow, plain decoder of the clric stream, version 1, written from bitstream_spec.md alone.

It takes the bytes of a stream and gives its header, networks, integer grids and latent; it shares no code with any
other decoder. Comments name the sections of the specification. From bytes to grids everything is a Python integer;
the latent is computed in float64 and stands for the exact arithmetic of section 9.

    python reference_decoder.py STREAM [--grids FILE] [--latent FILE]
    python reference_decoder.py --self-check
"""

from __future__ import annotations

import argparse
import hashlib
import json
import struct
import sys
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from operator import mul
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAGIC = bytes.fromhex("c74c52")
VERSION = 1
PIXEL_LIMIT = 89_478_485  # section 12: a decoder's limit unless its user raises it
PIXELS_PER_BYTE = 16_384  # section 12
VALUES_PER_BYTE = 1_000  # section 7
REGISTERED_NETWORKS = Path(__file__).parents[2] / "decoder" / "clric_decoder" / "weights" / "registered_networks.json"


class StreamError(Exception):
    """An error of section 13. `kind` is its name; the message names the field, its value and the limit."""

    def __init__(self, kind: str, message: str):
        super().__init__(f"{kind}: {message}")
        self.kind = kind


# --- What decoding gives ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One synthesis layer (section 3.2). `residual` is r: 0 none; r > 0 adds the input of the layer r - 1 before."""

    inputs: int
    channels: int
    kernel: int
    residual: int
    relu: bool
    depthwise: bool

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.channels, 1 if self.depthwise else self.inputs, self.kernel, self.kernel)


@dataclass(frozen=True)
class Architecture:
    """An architecture description (section 3.2). `level_channels` has the finest level first."""

    level_channels: tuple[int, ...]
    neighbours: int
    hidden_layers: int
    has_grid_scales: bool
    hidden_width: int
    layers: tuple[Layer, ...]

    @property
    def levels(self) -> int:
        return len(self.level_channels)

    @property
    def arm_widths(self) -> list[int]:
        return [self.neighbours, *[self.hidden_width] * self.hidden_layers, 2]


@dataclass(frozen=True)
class Header:
    """Sections 3 and 3.4.

    `space` is the latent space's name, `image_decoder` the number as it is stored (0 ... 7), and `metadata` the first
    entry of each of the types 1 ... 3. `fingerprint` is empty but for the custom space.
    """

    width: int
    height: int
    space: str
    space_number: int
    channels: int
    fingerprint: bytes
    image_decoder: int
    function: int
    architecture: Architecture
    metadata: dict[int, bytes]

    def level_shape(self, level: int) -> tuple[int, int]:
        """Rows and columns of a level's grids (section 1)."""
        latent_rows, latent_columns = -(-self.height // 8), -(-self.width // 8)
        return -(-latent_rows >> level), -(-latent_columns >> level)


class Group(NamedTuple):
    """A group of parameters as it is coded (section 6)."""

    name: str
    exponent: int
    integers: list[int]


@dataclass(frozen=True)
class Decoded:
    """`grids` has an int32 array (channels, rows, columns) for each level, the finest first; `latent` is float64."""

    header: Header
    networks: list[Group]
    grids: list[np.ndarray]
    latent: np.ndarray


# --- Section 3: the header --------------------------------------------------------------------------------------------

SPACES = {  # section 3.1: number to name and channels
    1: ("sd1", 4),
    2: ("sdxl", 4),
    3: ("sd3", 16),
    4: ("flux1", 16),
    5: ("flux2", 32),
    6: ("clric", 8),
}

INSTANT = "010808120803080008190804"
FUNCTIONS = {  # section 11: number to description
    1: "05040101010108120803040008090405",
    2: "0701010101010101080208042808040004090405",
    3: "05100101010108120803100010191004",
    4: "05200101010108120803200020192004",
    5: "0701010101010101080208042808100010191015",
    6: "0701010101010101080208042808200020192015",
    7: "05080101010108120803080008190804",
    8: INSTANT,
    9: INSTANT,
    10: INSTANT,
    11: INSTANT,
    12: INSTANT,
    13: INSTANT,
    14: INSTANT,
}
FUNCTIONS_WITH_NETWORKS = range(8, 15)


class Reader:
    """Reads a string of bytes from front to back; reading past its end is the error `kind`."""

    def __init__(self, data: bytes, kind: str):
        self.data = data
        self.kind = kind
        self.position = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def take(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise StreamError(
                self.kind, f"{what} needs {count} bytes at byte {self.position}; only {self.left} are left"
            )
        self.position += count
        return self.data[self.position - count : self.position]

    def integer(self, size: int, what: str, lowest: int, highest: int) -> int:
        value = int.from_bytes(self.take(size, what), "big")
        if not lowest <= value <= highest:
            raise StreamError("field", f"{what} is {value}, not in {lowest} ... {highest}")
        return value

    def leb128(self, what: str) -> int:
        """A length: seven bits a byte, the lowest first, in 1 to 5 bytes and in no more than it needs."""
        value = 0
        for i in range(5):
            byte = self.take(1, what)[0]
            value |= (byte & 127) << (7 * i)
            if byte < 128:
                if byte == 0 and i > 0:
                    raise StreamError("field", f"{what} {value} is written in {i + 1} bytes, more than it needs")
                return value
        raise StreamError("field", f"{what} has more than 5 bytes")


def check_reserved(byte: int, mask: int, what: str) -> None:
    if byte & mask:
        raise StreamError("unsupported", f"{what} is {byte:#04x}: a reserved bit is set")


def read_layer(reader: Reader, n: int, inputs: list[int]) -> Layer:
    """Layer n of the synthesis; inputs has the number of input channels of layers 0 ... n."""
    channels = reader.integer(1, f"channels of synthesis layer {n}", 1, 64)
    kind = reader.take(1, f"kind of synthesis layer {n}")[0]
    check_reserved(kind, 0b1110_0000, f"kind of synthesis layer {n}")
    layer = Layer(
        inputs=inputs[n],
        channels=channels,
        kernel=3 if kind & 1 else 1,
        residual=kind >> 1 & 3,
        relu=bool(kind & 8),
        depthwise=bool(kind & 16),
    )
    if layer.residual:
        source = n - (layer.residual - 1)
        if source < 0:
            raise StreamError("field", f"residual of synthesis layer {n} is the input of layer {source}: there is none")
        if inputs[source] != channels:
            raise StreamError("field", f"residual of synthesis layer {n} has {inputs[source]} channels, not {channels}")
    if layer.depthwise and inputs[n] != channels:
        raise StreamError("field", f"depthwise synthesis layer {n} has {channels} channels; its input {inputs[n]}")
    return layer


def read_architecture(reader: Reader) -> Architecture:
    """Section 3.2."""
    levels = reader.integer(1, "levels", 1, 16)
    lowest = [0] * (levels - 1) + [1]
    level_channels = tuple(reader.integer(1, f"channels of level {i}", lowest[i], 64) for i in range(levels))
    if sum(level_channels) > 128:
        raise StreamError("field", f"the levels have {sum(level_channels)} channels, more than 128")
    neighbours = reader.integer(1, "neighbours", 1, 8)
    arm = reader.take(1, "ARM's byte")[0]
    check_reserved(arm, 0b1110_0000, "ARM's byte")
    hidden_layers = arm & 15
    if hidden_layers > 4:
        raise StreamError("field", f"the ARM has {hidden_layers} hidden layers, more than 4")
    hidden_width = reader.integer(1, "width of the ARM's hidden layers", 1, 48)
    layers: list[Layer] = []
    inputs = [sum(level_channels)]
    for n in range(reader.integer(1, "synthesis layers", 1, 8)):
        layers.append(read_layer(reader, n, inputs))
        inputs.append(layers[n].channels)
    weights = sum(prod(layer.weight_shape) for layer in layers)
    if weights > 32_768:
        raise StreamError("field", f"the synthesis has {weights} weights, more than 32768")
    return Architecture(level_channels, neighbours, hidden_layers, bool(arm & 16), hidden_width, tuple(layers))


def read_metadata(segment: bytes) -> dict[int, bytes]:
    """Section 3.4: the first entry of each of the types 1 ... 3."""
    entries: dict[int, bytes] = {}
    reader = Reader(segment, "field")
    while reader.left:
        kind = reader.take(1, "metadata type")[0]
        if kind >= 128:
            raise StreamError("unsupported", f"metadata type {kind} is critical and not known")
        content = reader.take(reader.leb128("length of a metadata entry"), f"metadata entry of type {kind}")
        if kind in (1, 2, 3):
            entries.setdefault(kind, content)
    return entries


def read_stream(data: bytes, max_pixels: int) -> tuple[Header, bytes, dict[int, bytes]]:
    """Sections 2 and 3: header, networks segment, and the segment of each level that has channels."""
    if not data or data[:3] != MAGIC[: len(data)]:
        raise StreamError("magic", f"the file starts with '{data[:3].hex(' ')}', not with 'c7 4c 52'")
    if len(data) < 4:
        raise StreamError("truncated", f"the file ends after {len(data)} bytes, before its version")
    if data[3] != VERSION:
        raise StreamError("version", f"the stream has version {data[3]}; this decoder reads version {VERSION}")
    if len(data) < 8:
        raise StreamError("checksum", f"the file has {len(data)} bytes, too few for a checksum")
    stored, computed = int.from_bytes(data[-4:], "big"), zlib.crc32(data[:-4])
    if stored != computed:
        raise StreamError("checksum", f"the checksum is {stored:08x}, not {computed:08x}: the file is damaged")

    reader = Reader(data[:-4], "truncated")
    reader.take(4, "magic and version")
    flags = reader.take(1, "flags")[0]
    space_number = flags & 15
    if space_number != 0 and space_number not in SPACES:
        raise StreamError("unsupported", f"latent space {space_number} is not known")
    width = reader.integer(2, "width", 1, 65_535)
    height = reader.integer(2, "height", 1, 65_535)
    if width * height > max_pixels:
        raise StreamError("limit", f"the image has {width} x {height} pixels, more than {max_pixels}")
    if width * height > PIXELS_PER_BYTE * len(data):
        raise StreamError("field", f"{width} x {height} pixels are more than 16384 for each of {len(data)} bytes")
    if space_number == 0:
        space = "custom"
        channels = reader.integer(1, "channels of the latent", 1, 64)
        fingerprint = reader.take(8, "fingerprint")
    else:
        space, channels = SPACES[space_number]
        fingerprint = b""

    function = reader.take(1, "function")[0]
    if function == 0:
        architecture = read_architecture(reader)
    elif function in FUNCTIONS:
        architecture = read_architecture(Reader(bytes.fromhex(FUNCTIONS[function]), "field"))
    else:
        raise StreamError("unsupported", f"function {function} is not known")
    if architecture.layers[-1].channels != channels:
        raise StreamError(
            "field", f"the last synthesis layer has {architecture.layers[-1].channels} channels; the latent {channels}"
        )

    metadata_length = reader.leb128("metadata length") if flags & 16 else 0
    networks_length = reader.leb128("networks length")
    coded_levels = [i for i in reversed(range(architecture.levels)) if architecture.level_channels[i] > 0]
    lengths = {i: reader.leb128(f"length of level {i}") for i in coded_levels if i > 0}

    metadata = read_metadata(reader.take(metadata_length, "metadata"))
    networks = reader.take(networks_length, "networks")
    segments = {i: reader.take(length, f"level {i}") for i, length in lengths.items()}
    if architecture.level_channels[0] > 0:
        segments[0] = reader.take(reader.left, "level 0")
    elif reader.left > 0:
        raise StreamError("field", f"{reader.left} bytes are left for level 0, which has no channels")

    header = Header(
        width, height, space, space_number, channels, fingerprint, flags >> 5, function, architecture, metadata
    )
    return header, networks, segments


# --- Section 4: probability tables (the numbers D are in appendix A) --------------------------------------------------

D = [
    *(790015084, 858380948, 926260603, 993214474, 1058856952, 1122857733, 1184941259, 1244884674),
    *(1302514674, 1357703594, 1410365023, 1460449192, 1507938324, 1552842111, 1595193398, 1635044183),
    *(1672461947, 1707526359, 1740326356, 1770957582, 1799520184, 1826116930, 1850851625, 1873827806),
    *(1895147668, 1914911208, 1933215558, 1950154468, 1965817939, 1980291960, 1993658346, 2005994659),
    *(2017374191, 2027865998, 2037534981, 2046441993, 2054643979, 2062194123, 2069142020, 2075533842),
    *(2081412522, 2086817930, 2091787048, 2096354149, 2100550963, 2104406842, 2107948921, 2111202261),
    *(2114190000, 2116933485, 2119452401, 2121764891, 2123887672, 2125836137, 2127624459, 2129265679),
    *(2130771798, 2132153851, 2133421987, 2134585536, 2135653073, 2136632477, 2137530990, 2138355262),
    *(2139111403, 2139805021, 2140441270, 2141024879, 2141560191, 2142051191, 2142501540, 2142914595),
    *(2143293437, 2143640897, 2143959568, 2144251832, 2144519874, 2144765700, 2144991148, 2145197905),
]


def make_tables() -> list[list[list[int]]]:
    """TABLES[s][f] is the list cum[0 ... 64] of T(s, f)."""
    tables: list[list[list[int]]] = []
    for d in D:
        p = [1 << 31]
        for _ in range(504):
            p.append((p[-1] * d + (1 << 30)) >> 31)
        tables.append([])
        for f in range(16):
            cum = [0]
            for j in range(1, 64):
                z = 16 * (j - 32) + 8 - f
                distribution = (1 << 32) - p[z] if z >= 0 else p[-z]
                cum.append(j + ((distribution * 65_472) >> 32))
            tables[-1].append([*cum, 65_536])
    return tables


TABLES = make_tables()
BIT_TABLE = [0, 32_768, 65_536]


SHA256 = {  # appendix A
    "D": "64d2023892120916b88bbe3ad7c85f3420e07acccd845473e73fc807d752754f",
    "all tables": "89a6455576c7adfd5dc2722bd73d538e3d2b86e821a7f20759b8113919220db6",
    "registered_networks.json": "1bc841b3524058e77e1f5ff8f1225db99f5e32291fa49e72456b10713fc713ba",
}


def sha256_fault(name: str, content: bytes) -> str:
    """A line that says how the content differs from what appendix A says of it; empty if it does not."""
    found = hashlib.sha256(content).hexdigest()
    return "" if found == SHA256[name] else f"the SHA-256 of {name} is {found}; appendix A has {SHA256[name]}"


# --- Section 5: the range coder ---------------------------------------------------------------------------------------


class RangeDecoder:
    """Decodes one segment. Past its end the segment goes on with zero bytes."""

    def __init__(self, segment: bytes):
        self.segment = segment
        self.position = 0
        self.value = self.next_bytes(8)
        self.range = 2**64 - 1

    def next_bytes(self, count: int) -> int:
        taken = self.segment[self.position : self.position + count]
        self.position += count
        return int.from_bytes(taken.ljust(count, b"\0"), "big")

    def symbol(self, cum: list[int]) -> int:
        """Section 5.1."""
        unit = (self.range >> 24) * 256
        q = self.value // unit
        if q >= 65_536:
            raise StreamError("payload", f"a segment is damaged before its byte {self.position}: no symbol fits")
        k = bisect_right(cum, q) - 1  # cum[k] <= q < cum[k + 1]
        self.value -= unit * cum[k]
        self.range = unit * (cum[k + 1] - cum[k])
        if self.range < 2**32:
            self.range <<= 32
            self.value = (self.value << 32) + self.next_bytes(4)
        return k

    def number(self, bits: int) -> int:
        value = 0
        for _ in range(bits):
            value = 2 * value + self.symbol(BIT_TABLE)
        return value

    def excess(self) -> int:
        """How far an escaped integer lies beyond the table (section 5.2)."""
        n = 0
        while self.symbol(BIT_TABLE) == 0:
            n += 1
            if n > 15:
                raise StreamError("payload", "an escape has more than 15 zero bits")
        return 2**n + self.number(n) - 1

    def batch(self, means: list[int], tables: list[list[int]]) -> list[int]:
        """Integers whose means m and tables are known (section 5.2): all symbols, then the excess of each escape."""
        symbols = [self.symbol(cum) for cum in tables]
        values = [m + k - 31 for m, k in zip(means, symbols, strict=True)]
        for i, k in enumerate(symbols):
            if k == 0:
                values[i] -= self.excess()
            elif k == 63:
                values[i] += self.excess()
        return values


# --- Section 6: networks ----------------------------------------------------------------------------------------------


class GroupLayout(NamedTuple):
    """What section 6.1 says of a group. limits[k] is the limit of an integer's magnitude for the exponent k."""

    name: str
    shape: tuple[int, ...]
    limits: list[int]


def group_layouts(architecture: Architecture) -> Iterator[GroupLayout]:
    """The groups in coding order (section 6.1)."""
    widths = architecture.arm_widths
    for i in range(len(widths) - 1):
        yield GroupLayout(f"arm.weight{i}", (widths[i + 1], widths[i]), [127] * 9)
    yield GroupLayout("arm.bias", (sum(widths[1:]),), [2_047 >> (5 - k) for k in range(6)])
    if architecture.has_grid_scales:
        yield GroupLayout("grid_scales", (sum(architecture.level_channels),), [127 >> (3 - k) for k in range(4)])
    if architecture.levels > 1:
        yield GroupLayout("upsampler", (architecture.levels - 1, 4), [32_767] * 16)
    for n, layer in enumerate(architecture.layers):
        yield GroupLayout(f"synthesis.weight{n}", layer.weight_shape, [32_767] * 16)
    yield GroupLayout("synthesis.bias", (sum(layer.channels for layer in architecture.layers),), [32_767] * 16)


def decode_networks(segment: bytes, architecture: Architecture) -> list[Group]:
    """Section 6.2."""
    decoder = RangeDecoder(segment)
    groups = []
    for name, shape, limits in group_layouts(architecture):
        count = prod(shape)
        exponent = decoder.number(4)
        if exponent >= len(limits):
            raise StreamError("payload", f"the exponent of {name} is {exponent}, more than {len(limits) - 1}")
        scale_code = decoder.number(4)
        integers = [0] * count
        if scale_code > 0:
            integers = decoder.batch([0] * count, [TABLES[8 + 4 * (scale_code - 1)][0]] * count)
        largest = max(map(abs, integers))
        if largest > limits[exponent]:
            raise StreamError("payload", f"{name} has an integer of magnitude {largest}, more than {limits[exponent]}")
        groups.append(Group(name, exponent, integers))
    return groups


def registered_networks(function: int) -> bytes:
    """The networks segment that comes with a registered function (section 11)."""
    content = REGISTERED_NETWORKS.read_bytes()
    fault = sha256_fault("registered_networks.json", content)
    if fault:
        raise RuntimeError(f"{REGISTERED_NETWORKS} is not the file of this specification: {fault}")
    return bytes.fromhex(json.loads(content)[str(function)])


# --- Section 7: grids -------------------------------------------------------------------------------------------------

NEIGHBOURS = ((0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0), (-3, 0), (0, -3))  # (dy, dx), section 7.2


class ArmLayer(NamedTuple):
    """One layer of the ARM: weights[o][i], biases[o] = B[o] 2^(5 - kb + k), and the exponent k (section 7.3)."""

    weights: list[list[int]]
    biases: list[int]
    exponent: int


def make_arm(groups: dict[str, Group], architecture: Architecture) -> list[ArmLayer]:
    widths = architecture.arm_widths
    bias = groups["arm.bias"]
    layers = []
    first = 0  # of this layer's biases in the group
    for i in range(len(widths) - 1):
        inputs, outputs = widths[i], widths[i + 1]
        weight = groups[f"arm.weight{i}"]
        rows = [weight.integers[o * inputs : (o + 1) * inputs] for o in range(outputs)]
        shift = 5 - bias.exponent + weight.exponent
        layers.append(ArmLayer(rows, [b << shift for b in bias.integers[first : first + outputs]], weight.exponent))
        first += outputs
    return layers


def run_arm(layers: list[ArmLayer], a: list[int]) -> tuple[int, int]:
    """Mean (in 1/16) and scale, before the grid's offset, from the inputs' activations (section 7.3)."""
    for weights, biases, k in layers[:-1]:
        residual = a + [0] * (len(weights) - len(a))
        half = (1 << k) >> 1
        a = [
            min(max((sum(map(mul, row, a)) + bias + (own << k) + half) >> k, 0), 2_047)
            for row, bias, own in zip(weights, biases, residual, strict=False)  # of a longer input the rest has no use
        ]
    weights, biases, k = layers[-1]
    mean = (sum(map(mul, weights[0], a)) + biases[0] + (1 << k)) >> (k + 1)
    scale = (sum(map(mul, weights[1], a)) + biases[1] + (2 << k) + (128 << k)) >> (k + 2)
    return min(max(mean, -16_368), 16_368), scale


def decode_level(
    segment: bytes, shape: tuple[int, int, int], arm: list[ArmLayer], neighbours: int, scale_offsets: list[int]
) -> np.ndarray:
    """The values of a level, int32 of the shape (channels, rows, columns); scale_offsets has G of each channel."""
    channels, rows, columns = shape
    if not segment:
        return np.zeros(shape, np.int32)
    if prod(shape) > VALUES_PER_BYTE * len(segment):
        raise StreamError("payload", f"{prod(shape)} values are more than 1000 for each of {len(segment)} bytes")

    # The ARM's inputs, 32 clip(value, -63, 63), of each grid as one list with a border of zeros above and on both
    # sides, so that a neighbour lies at a fixed distance.
    stride = 3 + columns + 1
    inputs = [[0] * ((3 + rows) * stride) for _ in range(channels)]
    distances = [dy * stride + dx for dy, dx in NEIGHBOURS[:neighbours]]
    values = [[0] * (rows * columns) for _ in range(channels)]

    decoder = RangeDecoder(segment)
    for t in range(columns + 2 * (rows - 1)):  # section 7.1; t = x + 2 y and 0 <= x < columns
        step = [
            (channel, y, t - 2 * y)
            for channel in range(channels)
            for y in range(max(0, (t - columns + 2) // 2), min(rows - 1, t // 2) + 1)
        ]
        means, tables = [], []
        for channel, y, x in step:
            here = (3 + y) * stride + 3 + x
            grid = inputs[channel]
            mean, scale = run_arm(arm, [grid[here + distance] for distance in distances])
            means.append(mean >> 4)
            tables.append(TABLES[min(max(scale + scale_offsets[channel], 0), 79)][mean & 15])
        for (channel, y, x), value in zip(step, decoder.batch(means, tables), strict=True):
            if not -32_767 <= value <= 32_767:
                raise StreamError("payload", f"a grid value is {value}, not in -32767 ... 32767")
            values[channel][y * columns + x] = value
            inputs[channel][(3 + y) * stride + 3 + x] = 32 * min(max(value, -63), 63)
    return np.array(values, np.int32).reshape(shape)


def decode_grids(header: Header, segments: dict[int, bytes], groups: dict[str, Group]) -> list[np.ndarray]:
    """All levels, the finest first (section 7)."""
    architecture = header.architecture
    arm = make_arm(groups, architecture)
    offsets = [0] * sum(architecture.level_channels)
    if architecture.has_grid_scales:
        scales = groups["grid_scales"]
        offsets = [integer << (3 - scales.exponent) for integer in scales.integers]
    grids = []
    first = 0  # of this level's channels among all
    for i, channels in enumerate(architecture.level_channels):
        shape = (channels, *header.level_shape(i))
        level_offsets = offsets[first : first + channels]
        grids.append(decode_level(segments.get(i, b""), shape, arm, architecture.neighbours, level_offsets))
        first += channels
    return grids


# --- Sections 8 and 9: from grids to the latent -----------------------------------------------------------------------

BICUBIC = (-0.03515625, 0.26171875, 0.87890625, -0.10546875)  # section 6.2: the default of an upsampler row


def parameters(group: Group) -> np.ndarray:
    """integer 2^-exponent, in float64."""
    return np.array(group.integers, np.float64) / 2**group.exponent


def shifted(array: np.ndarray, distance: int, axis: int) -> np.ndarray:
    """array[n + distance] along an axis, with the border samples replicated outside."""
    size = array.shape[axis]
    return np.take(array, np.clip(np.arange(size) + distance, 0, size - 1), axis)


def double(stack: np.ndarray, taps: np.ndarray, axis: int) -> np.ndarray:
    """Section 8: twice the samples along an axis."""
    u0, u1, u2, u3 = taps
    before2, before1, after1, after2 = (shifted(stack, distance, axis) for distance in (-2, -1, 1, 2))
    even = u0 * before2 + u1 * before1 + u2 * stack + u3 * after1
    odd = u3 * before1 + u2 * stack + u1 * after1 + u0 * after2
    shape = list(stack.shape)
    shape[axis] *= 2
    return np.stack([even, odd], axis + 1).reshape(shape)


def upsample(grids: list[np.ndarray], taps: np.ndarray) -> np.ndarray:
    """Section 8: one stack of all channels, those of level 0 first; taps has a row for each level but the coarsest."""
    stack = grids[-1].astype(np.float64)
    for i in reversed(range(len(grids) - 1)):
        _, rows, columns = grids[i].shape
        stack = double(double(stack, taps[i], 1), taps[i], 2)[:, :rows, :columns]
        stack = np.concatenate([grids[i].astype(np.float64), stack])
    return stack


def apply_layer(layer: Layer, weight: np.ndarray, bias: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """The correlation of section 9, before the residual and ReLU."""
    output = np.broadcast_to(bias[:, None, None], (layer.channels, *inputs.shape[1:]))
    for dy in range(layer.kernel):
        for dx in range(layer.kernel):
            moved = shifted(shifted(inputs, dy - layer.kernel // 2, 1), dx - layer.kernel // 2, 2)
            tap = weight[:, :, dy, dx]
            output = output + (tap[:, :, None] * moved if layer.depthwise else np.tensordot(tap, moved, 1))
    return output


def synthesize(architecture: Architecture, groups: dict[str, Group], stack: np.ndarray) -> np.ndarray:
    """Section 9: the latent, without the check that it is finite."""
    biases = parameters(groups["synthesis.bias"])
    first = 0  # of this layer's biases among all
    inputs = [stack]  # inputs[n] is the input of layer n, and the output of layer n - 1
    for n, layer in enumerate(architecture.layers):
        weight = parameters(groups[f"synthesis.weight{n}"]).reshape(layer.weight_shape)
        output = apply_layer(layer, weight, biases[first : first + layer.channels], inputs[n])
        if layer.residual:
            output = output + inputs[n - (layer.residual - 1)]
        inputs.append(np.maximum(output, 0) if layer.relu else output)
        first += layer.channels
    return inputs[-1]


def compute_latent(architecture: Architecture, groups: dict[str, Group], grids: list[np.ndarray]) -> np.ndarray:
    """The latent R in float64, (C, h, w). By the limits of the parameters nothing on the way leaves float64's range."""
    taps = np.zeros((0, 4))
    if architecture.levels > 1:
        taps = parameters(groups["upsampler"]).reshape(-1, 4) + BICUBIC
    latent = synthesize(architecture, groups, upsample(grids, taps))
    with np.errstate(over="ignore"):
        finite = np.isfinite(latent.astype(np.float32)).all()
    if not finite:
        raise StreamError("payload", "the latent is not finite in single precision")
    return latent


# --- The whole --------------------------------------------------------------------------------------------------------


def decode(data: bytes, max_pixels: int = PIXEL_LIMIT) -> Decoded:
    """Decode a stream of at most max_pixels pixels. Raises StreamError."""
    header, networks_segment, segments = read_stream(data, max_pixels)
    if header.function in FUNCTIONS_WITH_NETWORKS:
        networks_segment = registered_networks(header.function)
    networks = decode_networks(networks_segment, header.architecture)
    groups = {group.name: group for group in networks}
    grids = decode_grids(header, segments, groups)
    return Decoded(header, networks, grids, compute_latent(header.architecture, groups, grids))


def self_check() -> list[str]:
    """Compares tables and registered networks with the SHA-256s of appendix A; a line for each that differs."""
    cums = [entry for of_scale in TABLES for cum in of_scale for entry in cum]
    faults = [
        sha256_fault("D", struct.pack(f">{len(D)}I", *D)),
        sha256_fault("all tables", struct.pack(f">{len(cums)}I", *cums)),
        sha256_fault("registered_networks.json", REGISTERED_NETWORKS.read_bytes()),
    ]
    return [fault for fault in faults if fault]


def main() -> int:
    parser = argparse.ArgumentParser(description="Reference decoder of the clric stream, version 1.")
    parser.add_argument("stream", type=Path, nargs="?")
    parser.add_argument("--grids", type=Path, help="file for the grids: big-endian int32, the finest level first")
    parser.add_argument("--latent", type=Path, help="file for the latent: little-endian float32")
    parser.add_argument("--self-check", action="store_true", help="compare the tables with appendix A, and end")
    arguments = parser.parse_args()
    if arguments.self_check:
        faults = self_check()
        sys.stderr.writelines(f"{fault}\n" for fault in faults)
        return 1 if faults else 0
    if arguments.stream is None:
        parser.error("the stream to decode is missing")
    try:
        decoded = decode(arguments.stream.read_bytes())
    except StreamError as error:
        print(error, file=sys.stderr)
        return 1
    if arguments.grids:
        arguments.grids.write_bytes(b"".join(grid.astype(">i4").tobytes() for grid in decoded.grids))
    if arguments.latent:
        arguments.latent.write_bytes(decoded.latent.astype("<f4").tobytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
