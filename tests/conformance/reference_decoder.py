"""An independent reference decoder of the clric image stream, version 0.

Written from the specification (bitstream_spec.md) alone, to be read beside it: one function or class per
section, plain Python integers from the bytes to the grids, numpy in float64 from the grids to the latent. It
is made to be simple, not fast. It imports nothing from the product.

Command line: python reference_decoder.py STREAM [--grids OUT] [--latent OUT]
"""

from __future__ import annotations

import argparse
import itertools
import json
import struct
import sys
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from operator import mul
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Grid = list[list[int]]  # [row][column]
Level = list[Grid]  # [channel][row][column]; empty for a level without channels
Array = NDArray[np.float64]

ERRORS = ("magic", "truncated", "version", "checksum", "unsupported", "field", "limit", "payload")

MAGIC = b"\xc7\x4c\x52"
SPACES = {  # section 3.1
    1: ("sd1", 4), 2: ("sdxl", 4), 3: ("sd3", 16), 4: ("flux1", 16), 5: ("flux2", 32), 6: ("clric", 8),
}  # fmt: skip
ARCHITECTURES = {  # section 10
    1: bytes.fromhex("0504010101010800220803040008090405"),
    2: bytes.fromhex("070101010101010108000208042808040004090405"),
    3: bytes.fromhex("0510010101010800220803100010191004"),
    4: bytes.fromhex("0520010101010800220803200020192004"),
    5: bytes.fromhex("070101010101010108000208042808100010191015"),
    6: bytes.fromhex("070101010101010108000208042808200020192015"),
    7: bytes.fromhex("0508010101010800220803080008190804"),
    8: bytes.fromhex("01080803220803080008190804"),
}
NETWORK_SETS = Path(__file__).parents[2] / "decoder/clric_decoder/weights/network_sets.json"  # section 6.3
UPSAMPLER_DEFAULT = (-0.03515625, 0.26171875, 0.87890625, -0.10546875)  # section 6.2
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
        start = fields.position
        architecture = read_architecture(fields, channels)
        description = fields.data[start : fields.position]
    elif number in ARCHITECTURES:
        description = ARCHITECTURES[number]
        architecture = read_architecture(Fields(description), channels)
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
    if flags >> 5:
        networks = network_set(description, flags >> 5)
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

BIT = (0, 32768, 65536)  # section 5.1: a bit of equal probability


@cache
def powers(scale: int) -> list[int]:
    """Section 4: P[0 ... 520] of a scale index."""
    result = [1 << 31]
    for _ in range(520):
        result.append((result[-1] * D[scale] + (1 << 30)) >> 31)
    return result


@cache
def table(scale: int, fraction: int) -> tuple[int, ...]:
    """Section 4: cum[0 ... 64] of T(s, f)."""
    power = powers(scale)
    cum = [0]
    for j in range(1, 64):
        z = 16 * (j - 32) + 8 - fraction
        distribution = (1 << 32) - power[z] if z >= 0 else power[-z]
        cum.append(j + ((distribution * 65472) >> 32))
    cum.append(65536)
    return tuple(cum)


# ---- section 5: the range coder


class RangeDecoder:
    """Decodes the symbols of one segment (section 5)."""

    def __init__(self, segment: bytes) -> None:
        """Start on the first byte of ``segment``."""
        self.segment = segment
        self.position = 0
        self.range = (1 << 64) - 1
        self.value = self.next_bytes(8)

    def next_bytes(self, count: int) -> int:
        """The next bytes as a big-endian integer; zeros follow the segment."""
        piece = self.segment[self.position : self.position + count]
        self.position += count
        return int.from_bytes(piece, "big") << (8 * (count - len(piece)))

    def symbol(self, cum: Sequence[int]) -> int:
        """Section 5.1: one symbol."""
        unit = (self.range >> 24) * 256
        q = self.value // unit
        if q >= 65536:
            raise StreamError("payload", "the range coder's value is outside of its range")
        k = bisect_right(cum, q) - 1  # cum[k] <= q < cum[k + 1]
        self.value -= unit * cum[k]
        self.range = unit * (cum[k + 1] - cum[k])
        if self.range < 1 << 32:
            self.range <<= 32
            self.value = (self.value << 32) + self.next_bytes(4)
        return k

    def bits(self, count: int) -> int:
        """Section 5.1: a number of ``count`` bits, the most significant first."""
        result = 0
        for _ in range(count):
            result = 2 * result + self.symbol(BIT)
        return result

    def excess(self) -> int:
        """Section 5.2: the excess of an escape."""
        n = 0
        while self.symbol(BIT) == 0:
            n += 1
            if n > MAX_ESCAPE_BITS:
                raise StreamError("payload", f"an escape has more than {MAX_ESCAPE_BITS} bits")
        return (1 << n) + self.bits(n) - 1

    def batch(self, models: Sequence[tuple[int, Sequence[int]]]) -> list[int]:
        """Section 5.2: integers of known means m and tables: all the symbols, then all the excesses."""
        symbols = [self.symbol(cum) for _, cum in models]
        values: list[int] = []
        for (m, _), k in zip(models, symbols, strict=False):
            if k == 0:
                values.append(m - 31 - self.excess())
            elif k == 63:
                values.append(m + 32 + self.excess())
            else:
                values.append(m + k - 31)
        return values


# ---- section 6: networks


def network_set(description: bytes, number: int) -> bytes:
    """Section 6.3: the networks segment of a registered set."""
    segments = json.loads(NETWORK_SETS.read_text()).get(description.hex(), [])
    if number > len(segments):
        raise StreamError("unsupported", f"network set {number} is not known")
    return bytes.fromhex(segments[number - 1])


@dataclass(frozen=True)
class Group:
    """The parameters of one group (section 6.1), flat in row-major order."""

    exponent: int
    integers: list[int]

    def values(self, shape: Sequence[int]) -> Array:
        """Section 6.2 for default 0: integer * 2^-k."""
        return np.array(self.integers, dtype=np.float64).reshape(shape) * 2.0**-self.exponent


@dataclass(frozen=True)
class ArmLayer:
    """A layer of the integer ARM (section 7.3)."""

    exponent: int
    weights: list[list[int]]  # [output][input]
    biases: list[int]  # B[o] * 2^(5 - kb + k)


@dataclass(frozen=True)
class Networks:
    """All networks of a stream."""

    arms: list[list[ArmLayer]]
    scale_offsets: list[int]  # G of every grid, the finest level first
    upsampler: Array  # (L - 1, 4)
    weights: list[Array]  # of each synthesis layer: (outputs, inputs or 1, kernel, kernel)
    biases: list[Array]


def read_group(decoder: RangeDecoder, name: str, count: int, limit: int, largest: int, halving: bool = False) -> Group:
    """Section 6.2: one group; with ``halving``, the limit halves for each step below ``largest``."""
    exponent = decoder.bits(4)
    code = decoder.bits(4)
    if exponent > largest:
        raise StreamError("payload", f"the exponent of {name} is {exponent}, over {largest}")
    if code == 0:
        return Group(exponent, [0] * count)
    integers = decoder.batch([(0, table(8 + 4 * (code - 1), 0))] * count)
    if halving:
        limit >>= largest - exponent
    for integer in integers:
        if abs(integer) > limit:
            raise StreamError("payload", f"an integer of {name} is {integer}, over {limit}")
    return Group(exponent, integers)


def read_networks(segment: bytes, architecture: Architecture) -> Networks:
    """Section 6: the groups in their order."""
    decoder = RangeDecoder(segment)
    widths = architecture.arm_widths
    arms: list[list[ArmLayer]] = []
    for a in range(2 if architecture.two_arms else 1):
        weights = [
            read_group(decoder, f"arm{a}.weight{n}", inputs * outputs, 127, 8)
            for n, (inputs, outputs) in enumerate(itertools.pairwise(widths))
        ]
        bias = read_group(decoder, f"arm{a}.bias", sum(widths[1:]), 2047, 5, halving=True)
        arm: list[ArmLayer] = []
        start = 0
        for group, inputs, outputs in zip(weights, widths, widths[1:], strict=False):
            rows = [group.integers[o * inputs : (o + 1) * inputs] for o in range(outputs)]
            shift = 5 - bias.exponent + group.exponent
            arm.append(ArmLayer(group.exponent, rows, [b << shift for b in bias.integers[start : start + outputs]]))
            start += outputs
        arms.append(arm)

    grids = sum(architecture.channels)
    offsets = [0] * grids
    if architecture.grid_scales:
        group = read_group(decoder, "grid_scales", grids, 127, 3, halving=True)
        offsets = [integer << (3 - group.exponent) for integer in group.integers]

    upsampler = np.zeros((0, 4))
    if architecture.levels > 1:
        shape = (architecture.levels - 1, 4)
        group = read_group(decoder, "upsampler", shape[0] * 4, 32767, 15)
        upsampler = group.values(shape) + np.array(UPSAMPLER_DEFAULT)

    synthesis: list[Array] = []
    for n, layer in enumerate(architecture.layers):
        full = (layer.outputs, 1 if layer.depthwise else layer.inputs, layer.kernel, layer.kernel)
        count = full[0] * full[1] * full[2] * full[3]
        synthesis.append(read_group(decoder, f"synthesis.weight{n}", count, 32767, 15).values(full))
    ends = np.cumsum([layer.outputs for layer in architecture.layers])
    group = read_group(decoder, "synthesis.bias", int(ends[-1]), 32767, 15)
    biases = np.split(group.values((int(ends[-1]),)), ends[:-1])
    return Networks(arms, offsets, upsampler, synthesis, list(biases))


# ---- section 7: grids


def clip(value: int, low: int, high: int) -> int:
    """``value`` limited to ``low`` ... ``high``."""
    return low if value < low else high if value > high else value


def read_grids(header: Header, networks: Networks) -> list[Level]:
    """Section 7: all levels, the finest first."""
    architecture = header.architecture
    levels: list[Level] = [[] for _ in architecture.channels]
    for i in range(architecture.levels - 1, -1, -1):
        coarser = levels[i + 1] if i + 1 < architecture.levels else []
        arm = networks.arms[1 if architecture.two_arms and i == 0 else 0]  # section 6.1
        first = sum(architecture.channels[:i])
        offsets = networks.scale_offsets[first : first + architecture.channels[i]]
        levels[i] = read_level(header.levels[i], header.size(i), offsets, coarser, architecture, arm)
    return levels


def read_level(
    segment: bytes,
    size: tuple[int, int],
    offsets: Sequence[int],
    coarser: Level,
    architecture: Architecture,
    arm: Sequence[ArmLayer],
) -> Level:
    """Section 7.1: one level; ``offsets`` has G for each of its channels."""
    rows, columns = size
    channels = len(offsets)
    if segment and rows * columns * channels > MAX_VALUES_PER_BYTE * len(segment):
        raise StreamError("payload", f"{len(segment)} bytes code {rows * columns * channels} values")
    level: Level = [[[0] * columns for _ in range(rows)] for _ in range(channels)]
    if not segment:
        return level
    decoder = RangeDecoder(segment)
    for step in range((columns - 1) + 2 * (rows - 1) + (channels - 1) + 1):
        places: list[tuple[int, int, int]] = []
        for c in range(max(0, step - (columns - 1) - 2 * (rows - 1)), min(channels, step + 1)):
            rest = step - c  # = x + 2 y, with 0 <= x < columns
            for y in range(max(0, (rest - columns + 2) // 2), min(rows - 1, rest // 2) + 1):
                places.append((c, y, rest - 2 * y))
        models: list[tuple[int, Sequence[int]]] = []
        for c, y, x in places:
            mean, scale = run_arm(arm, context(level, coarser, architecture, c, y, x))
            models.append((mean >> 4, table(clip(scale + offsets[c], 0, 79), mean & 15)))
        for (c, y, x), value in zip(places, decoder.batch(models), strict=False):
            if abs(value) > MAX_GRID_VALUE:
                raise StreamError("payload", f"a grid value is {value}")
            level[c][y][x] = value
    return level


def context(level: Level, coarser: Level, architecture: Architecture, c: int, y: int, x: int) -> list[int]:
    """Section 7.2: the values that the ARM sees at (y, x) of channel c."""
    grid = level[c]
    columns = len(grid[0])
    values: list[int] = []
    for dy, dx in NEIGHBOURS[: architecture.neighbours]:
        inside = y + dy >= 0 and 0 <= x + dx < columns
        values.append(grid[y + dy][x + dx] if inside else 0)
    for back in range(1, architecture.earlier + 1):
        values.append(level[c - back][y][x] if c >= back else 0)
    if architecture.coarser:
        if coarser:
            source = coarser[min(c, len(coarser) - 1)]
            y0, x0 = y >> 1, x >> 1
            y1 = clip(y0 + 1 if y & 1 else y0 - 1, 0, len(source) - 1)
            x1 = clip(x0 + 1 if x & 1 else x0 - 1, 0, len(source[0]) - 1)
            samples = [source[y0][x0], source[y0][x1], source[y1][x0], source[y1][x1]]
        else:
            samples = [0, 0, 0, 0]
        values += samples[: architecture.coarser]
    return values


def run_arm(arm: Sequence[ArmLayer], values: Sequence[int]) -> tuple[int, int]:
    """Section 7.3: the mean in sixteenths, and the scale index before the grid's offset and its clip."""
    a = [32 * clip(value, -63, 63) for value in values]
    for layer in arm[:-1]:
        k = layer.exponent
        half = (1 << k) >> 1
        sums = [sum(map(mul, row, a), bias) for row, bias in zip(layer.weights, layer.biases, strict=False)]
        a += [0] * (len(sums) - len(a))  # outputs without an input of their number
        a = [clip((total + (own << k) + half) >> k, 0, 2047) for total, own in zip(sums, a, strict=False)]
    layer = arm[-1]
    k = layer.exponent
    first, second = (sum(map(mul, row, a), bias) for row, bias in zip(layer.weights, layer.biases, strict=False))
    mean = clip((first + (1 << k)) >> (k + 1), -16368, 16368)
    scale = (second + (1 << (k + 1)) + ((32 * 4) << k)) >> (k + 2)
    return mean, scale


# ---- sections 8 and 9: grids to latent


def double(stack: Array, taps: Array, axis: int) -> Array:
    """Section 8: doubles one axis; border samples are replicated outside."""
    u0, u1, u2, u3 = taps
    moved = np.moveaxis(stack, axis, -1)
    n = moved.shape[-1]
    padded = np.concatenate([moved[..., :1]] * 2 + [moved] + [moved[..., -1:]] * 2, axis=-1)
    at = [padded[..., shift : shift + n] for shift in range(5)]  # at[2 + d] holds in[n + d]
    out = np.empty((*moved.shape[:-1], 2 * n))
    out[..., 0::2] = u0 * at[0] + u1 * at[1] + u2 * at[2] + u3 * at[3]
    out[..., 1::2] = u3 * at[1] + u2 * at[2] + u1 * at[3] + u0 * at[4]
    return np.moveaxis(out, -1, axis)


def upsample(header: Header, grids: Sequence[Level], upsampler: Array) -> Array:
    """Section 8: the stack of all levels' grids in the size of level 0, the finest level's first."""
    stack = np.array(grids[-1], dtype=np.float64)
    for i in range(len(grids) - 2, -1, -1):
        rows, columns = header.size(i)
        stack = double(double(stack, upsampler[i], 1), upsampler[i], 2)[:, :rows, :columns]
        if grids[i]:
            stack = np.concatenate([np.array(grids[i], dtype=np.float64), stack])
    return stack


def synthesise(stack: Array, layers: Sequence[Layer], networks: Networks) -> Array:
    """Section 9: the latent."""
    rows, columns = stack.shape[1:]
    inputs = [stack]  # of every layer so far
    for n, (layer, weight, bias) in enumerate(zip(layers, networks.weights, networks.biases, strict=False)):
        margin = layer.kernel // 2
        padded = np.pad(inputs[n], ((0, 0), (margin, margin), (margin, margin)), mode="edge")
        out = np.zeros((layer.outputs, rows, columns)) + bias[:, None, None]
        for dy in range(layer.kernel):
            for dx in range(layer.kernel):
                seen = padded[:, dy : dy + rows, dx : dx + columns]
                if layer.depthwise:
                    out += weight[:, 0, dy, dx, None, None] * seen
                else:
                    out += np.tensordot(weight[:, :, dy, dx], seen, axes=1)
        if layer.residual:
            out += inputs[n - (layer.residual - 1)]
        if layer.relu:
            out = np.maximum(out, 0.0)
        inputs.append(out)
    return inputs[-1]


# ---- the whole


@dataclass(frozen=True, eq=False)
class Decoded:
    """A decoded stream."""

    width: int
    height: int
    space: str  # "sd1", ..., or "custom-" and the fingerprint in 16 hexadecimal digits
    channels: int  # of the latent
    grids: list[Level]  # the finest level first, [channel][row][column]; empty for a level without channels
    latent: Array  # (channels, ceil(height / 8), ceil(width / 8))
    metadata: bytes  # the metadata segment as it is


def decode(data: bytes, max_pixels: int = 2**28) -> Decoded:
    """Decode a stream; raises StreamError for one that is not valid or has more than ``max_pixels``."""
    check_container(data)
    header = read_header(data, max_pixels)
    networks = read_networks(header.networks, header.architecture)
    grids = read_grids(header, networks)
    stack = upsample(header, grids, networks.upsampler)
    latent = synthesise(stack, header.architecture.layers, networks)
    if not np.abs(latent).max() <= np.finfo(np.float32).max:
        raise StreamError("payload", "the latent is not finite in single precision")
    return Decoded(header.width, header.height, header.space, header.channels, grids, latent, header.metadata)


def grids_bytes(grids: Sequence[Level]) -> bytes:
    """The grids as the conformance suite hashes them: 4-byte big-endian, level, channel, row, column."""
    return b"".join(struct.pack(f">{len(row)}i", *row) for level in grids for channel in level for row in channel)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Decode a clric stream to its grids and its latent.")
    parser.add_argument("stream", type=Path)
    parser.add_argument("--grids", type=Path, help="file for the grids: 4-byte big-endian signed integers")
    parser.add_argument("--latent", type=Path, help="file for the latent: little-endian float32, (C, h, w)")
    options = parser.parse_args(arguments)
    try:
        decoded = decode(options.stream.read_bytes())
    except StreamError as error:
        print(f"error: {error.kind}: {error}", file=sys.stderr)
        return 1
    if options.grids:
        options.grids.write_bytes(grids_bytes(decoded.grids))
    if options.latent:
        options.latent.write_bytes(decoded.latent.astype("<f4").tobytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
