"""The integer auto-regressive model (ARM) and the coding of grids with it (specification, "Grids").

Activations are integers in 1/32, weights are integers of eight bits; every accumulator stays below 2^24, so that
float32 holds it exactly and the result does not depend on the order of summation. Grids are coded along a
wavefront, on which no value needs another of the same step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from .bitstream import MAX_NEIGHBOURS, Architecture
from .entropy import (
    FRACTIONS,
    MAX_SYMBOLS_PER_BYTE,
    SCALE_ZERO,
    SCALES,
    RangeEncoder,
    decode_integers,
    encode_integers,
    range_decoder,
)
from .errors import StreamError
from .networks import ARM_MAX_BIAS_EXPONENT, GRID_SCALE_MAX_EXPONENT, Parameters

# (dy, dx) of the neighbours, the most useful first (Cool-Chic's)
NEIGHBOURS = ((0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0), (-3, 0), (0, -3))
REACH = 3  # how far a neighbour lies above or to the left; to the right it is less
UNIT = 32  # an activation of 1.0
MAX_ACTIVATION = 2047
MAX_CONTEXT = 63  # grid values are clipped to +- this where they are inputs of the ARM
MAX_MEAN = 1023 * FRACTIONS
MAX_VALUE = 32767


@dataclass(frozen=True)
class _Layer:
    """One linear layer in float32 that holds integers: outputs = floor(weight @ inputs + bias).

    The shift that section 7.3 ends a layer with is part of the weights: a power of two changes no digit of any sum.
    """

    weight: np.ndarray  # (outputs, inputs), the residual's identity included
    bias: np.ndarray  # (outputs, 1), half of the divisor included, so that the floor rounds

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """(inputs, n) -> (outputs, n). Values lie in rows: NumPy's loops run along them."""
        outputs: np.ndarray = np.dot(self.weight, inputs)
        outputs += self.bias
        return np.floor(outputs, out=outputs)


@dataclass(frozen=True)
class Arm:
    """The ARM of one level, ready to run.

    hidden, last: its layers; the last one's outputs are mean and scale index. scales: what is added to the scale
    index in each of the level's grids, (channels, 1) float32.
    """

    hidden: tuple[_Layer, ...]
    last: _Layer
    scales: np.ndarray

    def __call__(self, contexts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Integer parts of the means (channels * n,) int64 and tables (channels * n,) int64.

        contexts: (inputs, channels, n) float32, for n values of each of the level's grids.
        """
        inputs, channels, count = contexts.shape
        activations = contexts.reshape(inputs, channels * count)
        for layer in self.hidden:
            activations = layer(activations)
            np.maximum(activations, 0, out=activations)
            np.minimum(activations, MAX_ACTIVATION, out=activations)
        outputs = self.last(activations)
        outputs[1].reshape(channels, count)[:] += self.scales
        np.maximum(outputs, _OUTPUT_LOW, out=outputs)
        np.minimum(outputs, _OUTPUT_HIGH, out=outputs)
        mean, scale = outputs.astype(np.int64)
        return mean >> 4, scale * FRACTIONS + (mean & 15)


_OUTPUT_LOW = np.array([[-MAX_MEAN], [0]], np.float32)
_OUTPUT_HIGH = np.array([[MAX_MEAN], [SCALES - 1]], np.float32)


def build_arms(networks: list[Parameters], architecture: Architecture) -> list[Arm]:
    """The ARM of each level, the finest first: they differ in their grids' scales."""
    groups = {parameters.group.name: parameters for parameters in networks}
    *hidden, last = _layers(groups, architecture.hidden_layers + 1)
    scales = np.zeros(sum(architecture.channels), np.float32)
    if architecture.grid_scales:
        shift = GRID_SCALE_MAX_EXPONENT - groups["grid_scales"].exponent
        scales = (groups["grid_scales"].integers << shift).astype(np.float32)
    own = np.split(scales[:, None], np.cumsum(architecture.channels)[:-1])
    return [Arm(tuple(hidden), last, level_scales) for level_scales in own]


def _layers(groups: dict[str, Parameters], count: int) -> list[_Layer]:
    biases = groups["arm.bias"]
    layers = []
    start = 0
    for index in range(count):
        parameters = groups[f"arm.weight{index}"]
        weight = parameters.integers.astype(np.int64)
        outputs, inputs = weight.shape
        bias = biases.integers[start : start + outputs].astype(np.int64)
        bias = bias << (ARM_MAX_BIAS_EXPONENT - biases.exponent + parameters.exponent)
        start += outputs
        if index == count - 1:
            # Mean in 1/16: one bit less than an activation. Scale in eighths of an octave: two bits less
            bias = bias + (np.array([0, SCALE_ZERO * 4]) << parameters.exponent)
            drop = parameters.exponent + np.array([1, 2])
        else:
            weight = weight + (np.eye(outputs, inputs, dtype=np.int64) << parameters.exponent)
            drop = np.full(outputs, parameters.exponent)
        half = (1 << drop) >> 1
        if index == 0:
            weight = weight * UNIT  # contexts are grid values; their products are what they would be of activations
        factor = 2.0 ** -drop[:, None]
        bias = (bias + half)[:, None]
        layers.append(_Layer((weight * factor).astype(np.float32), (bias * factor).astype(np.float32)))
    return layers


class _Level:
    """One level's values with zeros above each grid and between its rows, and the order in which they are coded.

    Flat, a neighbour is always the same distance away, and the values that a step codes of a grid, at (y, t - 2 y), lie
    ``pitch`` - 2 apart: a slice says where they are, and one table of distances from its start where their neighbours
    are.
    """

    def __init__(self, shape: tuple[int, int, int], architecture: Architecture, dtype: type = np.int32):
        self._channels, self._height, self._width = shape
        self._pitch = self._width + REACH
        self._flat: np.ndarray = np.zeros((self._channels, (self._height + REACH) * self._pitch), dtype)
        offsets = [dy * self._pitch + dx for dy, dx in NEIGHBOURS[: architecture.neighbours]]
        longest = min(self._height, (self._width + 1) // 2)
        self._neighbours = np.array(offsets)[:, None] + np.arange(longest) * (self._pitch - 2)

    @property
    def values(self) -> np.ndarray:
        """The values (channels, height, width), a view."""
        padded = self._flat.reshape(self._channels, self._height + REACH, self._pitch)
        return padded[:, REACH:, REACH:]

    def steps(self) -> Iterator[slice]:
        """The steps in coding order, each as what it codes of a flat grid."""
        origin, distance = REACH * self._pitch + REACH, self._pitch - 2
        for t in range(self._width + 2 * self._height - 2):
            top, end = max(0, (t - self._width) // 2 + 1), min(self._height, t // 2 + 1)
            if top < end:  # a grid of one column has nothing in every second step
                first = origin + t + top * distance
                yield slice(first, first + (end - 1 - top) * distance + 1, distance)

    def contexts(self, step: slice) -> np.ndarray:
        """(inputs, channels, n) float32: what the ARM sees of a step's values."""
        count = len(range(step.start, step.stop, step.step))
        neighbours = self._flat.take(self._neighbours[:, :count] + step.start, 1)
        np.maximum(neighbours, -MAX_CONTEXT, out=neighbours)
        np.minimum(neighbours, MAX_CONTEXT, out=neighbours)
        return neighbours.transpose(1, 0, 2).astype(np.float32, order="C")

    def take(self, step: slice) -> np.ndarray:
        """A step's values (channels * n,) in coding order."""
        return self._flat[:, step].reshape(-1)

    def put(self, step: slice, values: np.ndarray) -> None:
        """The inverse of `take`."""
        self._flat[:, step] = values.reshape(self._channels, -1)


def _filled(values: np.ndarray, architecture: Architecture) -> _Level:
    """A level whose values (channels, height, width) are all known."""
    level = _Level(values.shape, architecture, values.dtype.type)
    level.values[:] = values
    return level


def predict(values: np.ndarray, arm: Arm, architecture: Architecture) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the ARM gives for a level whose values (channels, height, width) are all known.

    Returns values, means' integer parts and tables, each (n,) in coding order.
    """
    level = _filled(values, architecture)
    steps = [(level.take(step), *arm(level.contexts(step))) for step in level.steps()]
    in_order, means, tables = (np.concatenate(parts) for parts in zip(*steps, strict=True))
    return in_order, means, tables


def encode_level(values: np.ndarray, arm: Arm, architecture: Architecture) -> bytes:
    """The segment of one level; empty when all values are zero."""
    if not values.any():
        return b""
    level = _filled(values, architecture)
    coder = RangeEncoder()
    for step in level.steps():
        encode_integers(coder, level.take(step), *arm(level.contexts(step)))
    least = -(-values.size // MAX_SYMBOLS_PER_BYTE)
    return coder.finish().ljust(least, b"\0")


def choose_level(
    wanted: np.ndarray,
    arm: Arm,
    architecture: Architecture,
    choose: Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:
    """The integers (channels, height, width) int32 of a level for real numbers, chosen in coding order.

    wanted: the real numbers. choose: takes those of a step (n,), the channel of each, its mean's integer part and its
    table, all of which depend on what was chosen before; gives integers (n,).
    """
    real, level = _filled(wanted, architecture), _Level(wanted.shape, architecture)
    channels = np.arange(len(wanted))
    for step in level.steps():
        numbers = real.take(step)
        means, tables = arm(level.contexts(step))
        level.put(step, choose(numbers, channels.repeat(len(numbers) // len(channels)), means, tables))
    return level.values


def decode_level(data: bytes, shape: tuple[int, int, int], arm: Arm, architecture: Architecture) -> np.ndarray:
    """The values (channels, height, width) int32 of one level; the inverse of `encode_level`."""
    if data and math.prod(shape) > len(data) * MAX_SYMBOLS_PER_BYTE:
        raise StreamError("payload", f"{len(data)} bytes cannot hold a level of {math.prod(shape)} values")
    level = _Level(shape, architecture)
    if not data:
        return level.values
    decoder = range_decoder(data)
    for step in level.steps():
        level.put(step, decode_integers(decoder, *arm(level.contexts(step))))
    if not -MAX_VALUE <= level.values.min() <= level.values.max() <= MAX_VALUE:
        raise StreamError("payload", f"a grid value is beyond +-{MAX_VALUE}; the file is damaged")
    return level.values


assert len(NEIGHBOURS) == MAX_NEIGHBOURS
