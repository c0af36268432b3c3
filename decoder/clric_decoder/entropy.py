"""Integer probability tables and the range coder (bitstream_spec.md, "Probability tables" and "The range coder").

A coded integer has a Laplace distribution, given by a mean in 1/16 and one of 80 scales, eight an octave. All
arithmetic is on integers, so that every machine builds the same tables and decodes the same values. The wire
format is that of constriction's 64-bit range coder; where constriction has no wheel, `PythonRangeDecoder`
decodes the same bytes to the same values.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from typing import Protocol

import numpy as np

from .errors import StreamError

try:
    import constriction
except ImportError:  # Linux on ARM has no wheel
    constriction = None

SCALES = 80
SCALE_ZERO = 32  # scale index of b = 1; b = 2 ** ((index - SCALE_ZERO) / 8)
FRACTIONS = 16  # the mean is given in 1/16
SYMBOLS = 64
SYMBOL_ZERO = 31  # symbol of a value that equals the mean's integer part
ESCAPE_LOW, ESCAPE_HIGH = 0, SYMBOLS - 1
MAX_SYMBOLS_PER_BYTE = 1000  # of a segment: bounds the time that a small file can take
MAX_ESCAPE_BITS = 15

# round(2^31 * exp(-1 / (16 b))) for each of the 80 scales b; made by tests/conformance/make_tables.py
DECAY = (
    790015084, 858380948, 926260603, 993214474, 1058856952, 1122857733, 1184941259, 1244884674,
    1302514674, 1357703594, 1410365023, 1460449192, 1507938324, 1552842111, 1595193398, 1635044183,
    1672461947, 1707526359, 1740326356, 1770957582, 1799520184, 1826116930, 1850851625, 1873827806,
    1895147668, 1914911208, 1933215558, 1950154468, 1965817939, 1980291960, 1993658346, 2005994659,
    2017374191, 2027865998, 2037534981, 2046441993, 2054643979, 2062194123, 2069142020, 2075533842,
    2081412522, 2086817930, 2091787048, 2096354149, 2100550963, 2104406842, 2107948921, 2111202261,
    2114190000, 2116933485, 2119452401, 2121764891, 2123887672, 2125836137, 2127624459, 2129265679,
    2130771798, 2132153851, 2133421987, 2134585536, 2135653073, 2136632477, 2137530990, 2138355262,
    2139111403, 2139805021, 2140441270, 2141024879, 2141560191, 2142051191, 2142501540, 2142914595,
    2143293437, 2143640897, 2143959568, 2144251832, 2144519874, 2144765700, 2144991148, 2145197905,
)  # fmt: skip


@lru_cache(maxsize=1)
def cumulative_tables() -> np.ndarray:
    """All tables, (80 * 16, 65) int32: row 16 * scale + fraction holds cum[0] = 0 ... cum[64] = 65,536.

    Symbol k stands for the value m + k - 31, where the mean is m + fraction / 16; the first and the last
    symbol are escapes. (Specification, "Probability tables".)
    """
    decay = np.array(DECAY, np.int64)
    power = np.empty((16 * 32 + 8 + 1, SCALES), np.int64)  # power[k] = 2^31 exp(-k / 16 b)
    power[0] = 1 << 31
    for k in range(1, len(power)):
        power[k] = (power[k - 1] * decay + (1 << 30)) >> 31
    # Boundary j lies at m + (j - 1 - 31) + 1/2, that is distance/16 above the mean
    distance = 16 * (np.arange(1, SYMBOLS) - 1 - SYMBOL_ZERO) + 8 - np.arange(FRACTIONS)[:, None]  # (16, 63)
    tail = power[np.abs(distance)]  # (16, 63, 80), in units of 2^-32
    below = np.where(distance[..., None] >= 0, (1 << 32) - tail, tail)
    cumulative = np.zeros((SCALES, FRACTIONS, SYMBOLS + 1), np.int32)
    # A frequency of at least 1 for each symbol is set aside; the rest is shared out
    cumulative[..., 1:-1] = ((below * (65536 - SYMBOLS)) >> 32).transpose(2, 0, 1) + np.arange(1, SYMBOLS)
    cumulative[..., -1] = 65536
    return cumulative.reshape(SCALES * FRACTIONS, SYMBOLS + 1)


class RangeDecoder(Protocol):
    """Decodes symbols, each with a table of `cumulative_tables`, and bits of equal probability."""

    def symbols(self, tables: Sequence[int]) -> list[int]: ...

    def bits(self, count: int) -> int: ...


class PythonRangeDecoder:
    """The range decoder in plain Python: the same result as `ConstrictionRangeDecoder`, some ms slower."""

    def __init__(self, data: bytes):
        self._data = data
        self._position = 8
        self._range = (1 << 64) - 1
        self._value = int.from_bytes(data[:8].ljust(8, b"\0"), "big")

    def symbols(self, tables: Sequence[int]) -> list[int]:
        """One symbol for each table index (int), in order."""
        return self._decode(map(_cumulative_list, tables))

    def bits(self, count: int) -> int:
        """`count` bits of equal probability, the most significant first."""
        value = 0
        for bit in self._decode([_BIT] * count):
            value = value << 1 | bit
        return value

    def _decode(self, tables: Iterable[Sequence[int]]) -> list[int]:
        """One symbol for each cumulative table. The state is kept in local names: this loop is all of the time."""
        width, value = self._range, self._value
        search, decoded = bisect.bisect_right, []
        for cumulative in tables:
            unit = width >> 24 << 8
            quantile = value // unit
            if quantile >= 65536:
                raise StreamError("payload", "the entropy-coded data is invalid; the file is damaged")
            symbol = search(cumulative, quantile) - 1
            decoded.append(symbol)
            start = cumulative[symbol]
            value -= unit * start
            width = unit * (cumulative[symbol + 1] - start)
            if width < 1 << 32:
                # Past the end of the segment follow zeros
                word = self._data[self._position : self._position + 4].ljust(4, b"\0")
                self._position += 4
                value = value << 32 | int.from_bytes(word, "big")
                width <<= 32
        self._range, self._value = width, value
        return decoded


_BIT = (0, 32768, 65536)


@cache
def _cumulative_list(table: int) -> list[int]:
    return cumulative_tables()[table].tolist()


class ConstrictionRangeDecoder:
    """The same through constriction, whose compiled coder takes 0.15 us a symbol."""

    def __init__(self, data: bytes):
        padded = data.ljust(-(-max(len(data), 8) // 4) * 4, b"\0")
        words = np.frombuffer(padded, ">u4").astype(np.uint32)
        self._decoder = constriction.stream.queue.RangeDecoder(words)
        self._models, self._bit = _constriction_models()

    def symbols(self, tables: Sequence[int]) -> list[int]:
        """One symbol for each table index (int), in order."""
        decode, models = self._decoder.decode, self._models
        try:
            return [decode(models[index]) for index in tables]
        except (AssertionError, ValueError) as error:
            raise StreamError("payload", "the entropy-coded data is invalid; the file is damaged") from error

    def bits(self, count: int) -> int:
        """`count` bits of equal probability, the most significant first."""
        value = 0
        for _ in range(count):
            try:
                value = value << 1 | self._decoder.decode(self._bit)
            except (AssertionError, ValueError) as error:
                raise StreamError("payload", "the entropy-coded data is invalid; the file is damaged") from error
        return value


@lru_cache(maxsize=1)
def _constriction_models() -> tuple[list, object]:
    categorical = constriction.stream.model.Categorical
    # Weights of (frequency << 8) - 1 make Categorical code exactly frequency << 8 out of 2^24, in floats
    weights = (np.diff(cumulative_tables()).astype(np.int64) << 8) - 1.0
    bit = categorical(np.full(2, (32768 << 8) - 1.0), perfect=False)
    return [categorical(row, perfect=False) for row in np.ascontiguousarray(weights)], bit


def range_decoder(data: bytes) -> RangeDecoder:
    """The fastest range decoder that this machine has, at the start of `data`."""
    return PythonRangeDecoder(data) if constriction is None else ConstrictionRangeDecoder(data)


class RangeEncoder:
    """The range encoder; its output is what both decoders read."""

    def __init__(self) -> None:
        self._low = 0
        self._range = (1 << 64) - 1
        self._words: list[int] = []

    def symbols(self, tables: Iterable[int], symbols: Iterable[int]) -> None:
        """Code symbols, each with the table of this index."""
        self._encode((_cumulative_list(table), symbol) for table, symbol in zip(tables, symbols, strict=True))

    def bits(self, value: int, count: int) -> None:
        """The lowest `count` bits of `value`, each of equal probability, the most significant first."""
        self._encode((_BIT, value >> shift & 1) for shift in range(count - 1, -1, -1))

    def _encode(self, symbols: Iterable[tuple[Sequence[int], int]]) -> None:
        """Symbols, each after its cumulative table. The state is kept in local names: this loop is all of the time."""
        low, width, words = self._low, self._range, self._words
        for cumulative, symbol in symbols:
            start = cumulative[symbol]
            unit = width >> 24 << 8
            low += unit * start
            width = unit * (cumulative[symbol + 1] - start)
            if width < 1 << 32:
                low = self._carry(low)
                words.append(low >> 32)
                low = (low & 0xFFFFFFFF) << 32
                width <<= 32
        self._low, self._range = low, width

    def _carry(self, low: int) -> int:
        """The lower 64 bits, after the bit above them is added to the words."""
        if low >> 64:
            position = len(self._words) - 1
            while self._words[position] == 0xFFFFFFFF:
                self._words[position] = 0
                position -= 1
            self._words[position] += 1
        return low & (1 << 64) - 1

    def finish(self) -> bytes:
        """The shortest bytes that decode, when followed by zeros, to what was coded."""
        # Any value in [low, low + range) will do: take the one with the most trailing zero bits
        for zeros in range(64, -1, -1):
            last = -(-self._low >> zeros) << zeros
            if last < self._low + self._range:
                break
        last = self._carry(last)
        head = b"".join(word.to_bytes(4, "big") for word in self._words)
        return (head + last.to_bytes(8, "big")).rstrip(b"\0")


def encode_integers(coder: RangeEncoder, values: np.ndarray, means: np.ndarray, tables: np.ndarray) -> None:
    """Code a batch of values (n,), each with the integer part of its mean (n,) and its table (n,).

    All symbols come first, then the excess of each escape (specification, "Integers").
    """
    wanted = values.astype(np.int64) - means + SYMBOL_ZERO
    symbols = wanted.clip(ESCAPE_LOW, ESCAPE_HIGH)
    coder.symbols(tables.tolist(), symbols.tolist())
    for excess in np.abs(wanted - symbols)[(symbols == ESCAPE_LOW) | (symbols == ESCAPE_HIGH)].tolist():
        length = (excess + 1).bit_length() - 1
        coder.bits(1, length + 1)  # `length` zeros, then a one
        coder.bits(excess + 1, length)


def decode_integers(decoder: RangeDecoder, means: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """The batch of values (n,) int64 that `encode_integers` coded with the same means and tables."""
    symbols = decoder.symbols(tables.tolist())
    if ESCAPE_LOW in symbols or ESCAPE_HIGH in symbols:
        symbols = [symbol + _excess(decoder, symbol) for symbol in symbols]
    return np.array(symbols, np.int64) + (means - SYMBOL_ZERO)


def _excess(decoder: RangeDecoder, symbol: int) -> int:
    """How far beyond an escape's symbol the value lies; 0 for other symbols, which have none in the stream."""
    if ESCAPE_LOW < symbol < ESCAPE_HIGH:
        return 0
    length = 0
    while not decoder.bits(1):
        length += 1
        if length > MAX_ESCAPE_BITS:
            raise StreamError("payload", f"an escape of over {MAX_ESCAPE_BITS} bits; the file is damaged")
    excess = (1 << length | decoder.bits(length)) - 1
    return excess if symbol == ESCAPE_HIGH else -excess


def ideal_bits(values: np.ndarray, means: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """The tables' code length in bits of each value (n,), escapes included: what coding would cost at best.

    tables: (n,), or (several, 1) for all values with each of several tables; gives their shape with n values.
    """
    symbols = values.astype(np.int64) - means + SYMBOL_ZERO
    clipped = np.clip(symbols, ESCAPE_LOW, ESCAPE_HIGH)
    frequencies = cumulative_tables()[tables, clipped + 1] - cumulative_tables()[tables, clipped]
    bits = 16 - np.log2(frequencies)
    escaped = (clipped == ESCAPE_LOW) | (clipped == ESCAPE_HIGH)
    excess = np.abs(symbols - clipped)[escaped] + 1
    bits[..., escaped] += 2 * np.floor(np.log2(excess)) + 1
    return bits
