"""The integer auto-regressive model (ARM) and the coding of grids with it (specification, "Grids").

Activations are integers in 1/32, weights are integers of eight bits; every accumulator stays below 2^24, so that
float32 holds it exactly and the result does not depend on the order of summation. Grids are coded along a
wavefront, on which no value needs another of the same step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

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

# (dy, dx) of the neighbours, the most useful first: Cool-Chic's first eight, then more that the wavefront has passed
NEIGHBOURS = (
    (0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0), (-3, 0), (0, -3),
    (-1, -2), (-2, -1), (-2, 1), (-2, 2), (-1, -3), (-2, -2), (-3, 1), (-3, -1),
)  # fmt: skip
REACH = 3  # how far a neighbour lies above, left or right
UNIT = 32  # an activation of 1.0
MAX_ACTIVATION = 2047
MAX_CONTEXT = 63  # grid values are clipped to +- this where they are inputs of the ARM
MAX_MEAN = 1023 * FRACTIONS
MAX_VALUE = 32767


@dataclass(frozen=True)
class _Layer:
    """One linear layer in float32 that holds integers: outputs = floor((inputs @ weight + bias) / divisor)."""

    weight: np.ndarray  # (inputs, outputs), the residual's identity included
    bias: np.ndarray  # (outputs,), half of the divisor included, so that the floor rounds
    factor: np.ndarray  # (outputs,), 1 / divisor, powers of two


@dataclass(frozen=True)
class Arm:
    """The ARM of one level, ready to run.

    hidden, last: its layers; the last one's outputs are mean and scale index. scales: what is added to the scale
    index in each of the level's grids, (channels,) float32.
    """

    hidden: tuple[_Layer, ...]
    last: _Layer
    scales: np.ndarray

    def __call__(self, activations: np.ndarray, channels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Integer parts of the means (n,) int64 and tables (n,) int64.

        activations: (n, inputs) float32. channels: (n,) the grid of each within its level.
        """
        for layer in self.hidden:
            activations = activations @ layer.weight
            activations += layer.bias
            activations *= layer.factor
            np.floor(activations, out=activations)
            np.maximum(activations, 0, out=activations)
            np.minimum(activations, MAX_ACTIVATION, out=activations)
        outputs = activations @ self.last.weight
        outputs += self.last.bias
        outputs *= self.last.factor
        np.floor(outputs, out=outputs)
        outputs[:, 1] += self.scales[channels]
        np.maximum(outputs, _OUTPUT_LOW, out=outputs)
        np.minimum(outputs, _OUTPUT_HIGH, out=outputs)
        mean, scale = outputs.astype(np.int64).T
        return mean >> 4, scale * FRACTIONS + (mean & 15)


_OUTPUT_LOW = np.array([-MAX_MEAN, 0], np.float32)
_OUTPUT_HIGH = np.array([MAX_MEAN, SCALES - 1], np.float32)


def build_arms(networks: list[Parameters], architecture: Architecture) -> list[Arm]:
    """The ARM of each level, the finest first."""
    groups = {parameters.group.name: parameters for parameters in networks}
    layers = [_layers(groups, number, architecture.hidden_layers + 1) for number in range(1 + architecture.two_arms)]
    scales = np.zeros(sum(architecture.channels), np.float32)
    if architecture.grid_scales:
        shift = GRID_SCALE_MAX_EXPONENT - groups["grid_scales"].exponent
        scales = (groups["grid_scales"].integers << shift).astype(np.float32)
    arms = []
    for level, own in enumerate(np.split(scales, np.cumsum(architecture.channels)[:-1])):
        *hidden, last = layers[-1 if level == 0 else 0]  # the finest level has the last ARM, all others the first
        arms.append(Arm(tuple(hidden), last, own))
    return arms


def _layers(groups: dict[str, Parameters], number: int, count: int) -> list[_Layer]:
    """The layers of one set of ARM parameters."""
    biases = groups[f"arm{number}.bias"]
    layers = []
    start = 0
    for index in range(count):
        parameters = groups[f"arm{number}.weight{index}"]
        weight = parameters.integers.T.astype(np.int64)
        inputs, outputs = weight.shape
        bias = biases.integers[start : start + outputs].astype(np.int64)
        bias = bias << (ARM_MAX_BIAS_EXPONENT - biases.exponent + parameters.exponent)
        start += outputs
        if index == count - 1:
            # Mean in 1/16: one bit less than an activation. Scale in eighths of an octave: two bits less
            bias = bias + (np.array([0, SCALE_ZERO * 4]) << parameters.exponent)
            drop = parameters.exponent + np.array([1, 2])
        else:
            weight = weight + (np.eye(inputs, outputs, dtype=np.int64) << parameters.exponent)
            drop = np.full(outputs, parameters.exponent)
        half = (1 << drop) >> 1
        layers.append(
            _Layer(weight.astype(np.float32), (bias + half).astype(np.float32), (2.0**-drop).astype(np.float32))
        )
    return layers


class _Level:
    """One level's grids with their borders, and the order in which their values are coded.

    ``activations`` is what the ARM sees: grid values clipped and in 1/32, with zeros around each grid and before the
    first channel, flat, so that each of the ARM's inputs lies at a fixed distance.
    """

    def __init__(self, shape: tuple[int, int, int], architecture: Architecture, coarser: np.ndarray | None):
        channels, height, width = shape
        pitch = width + 2 * REACH
        plane = pitch * (height + REACH)
        self._view = np.s_[architecture.earlier :, REACH:, REACH : REACH + width]
        self._padded = (architecture.earlier + channels, height + REACH, pitch)
        self.activations = np.zeros(self._padded[0] * plane, np.float32)
        self.values = np.zeros(shape, np.int32)
        offsets = [dy * pitch + dx for dy, dx in NEIGHBOURS[: architecture.neighbours]]
        offsets += [-plane * channel for channel in range(1, architecture.earlier + 1)]
        self._offsets = np.array(offsets, np.int64)

        channel, y, x = np.indices(shape, np.int32).reshape(3, -1)
        step = x + 2 * y + channel
        self._order = np.argsort(step, kind="stable")
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(step))]).tolist()
        position = (architecture.earlier + channel.astype(np.int64)) * plane + (REACH + y) * pitch + REACH + x
        self._positions = position[self._order]
        self.channels = channel[self._order]
        self._coarser = None
        if architecture.coarser:
            samples = _coarser_samples(shape, architecture.coarser, coarser)
            self._coarser = samples.reshape(-1, architecture.coarser)[self._order]

    def fill(self, values: np.ndarray) -> None:
        """Set all values (channels, height, width) at once, as the encoder can."""
        self.values = values
        self.activations.reshape(self._padded)[self._view] = as_activation(values)

    def walk(self, arm: Arm, values: Callable[[slice, np.ndarray, np.ndarray], np.ndarray | None]) -> None:
        """Goes through the wavefront's steps in coding order.

        values: takes a step's place in coding order, and for each of its values the mean's integer part and the table;
        gives the values (n,), or None where they are known already.
        """
        for start, end in pairwise(self._starts):
            step = slice(start, end)
            given = values(step, *arm(self.inputs(start, end), self.channels[step]))
            if given is not None:
                self._put(step, given)

    def inputs(self, start: int, end: int) -> np.ndarray:
        """(n, inputs) float32 activations for the values start to end in coding order."""
        context = self.activations[self._positions[start:end, None] + self._offsets]
        if self._coarser is not None:
            context = np.concatenate([context, self._coarser[start:end]], 1)
        return context

    def _put(self, step: slice, values: np.ndarray) -> None:
        self.activations[self._positions[step]] = as_activation(values)
        self.values.reshape(-1)[self._order[step]] = values

    def in_order(self, values: np.ndarray) -> np.ndarray:
        """Values (channels, height, width) in coding order, (n,)."""
        return values.reshape(-1)[self._order]


def as_activation(values: np.ndarray) -> np.ndarray:
    """What the ARM sees of grid values: clipped, in 1/32."""
    return np.minimum(np.maximum(values, -MAX_CONTEXT), MAX_CONTEXT) * UNIT


def _coarser_samples(shape: tuple[int, int, int], count: int, coarser: np.ndarray | None) -> np.ndarray:
    """(channels, height, width, count) float32 activations: the next coarser level's values around each position.

    In order: the value above the position, its horizontal, vertical and diagonal neighbour on the side to which the
    position lies. Zeros where there is no coarser level or it has no grids.
    """
    channels, height, width = shape
    if coarser is None or not coarser.shape[0]:
        return np.zeros((*shape, count), np.float32)
    rows, columns = np.arange(height), np.arange(width)
    row, column = rows >> 1, columns >> 1
    next_row = np.clip(row + 2 * (rows & 1) - 1, 0, coarser.shape[1] - 1)
    next_column = np.clip(column + 2 * (columns & 1) - 1, 0, coarser.shape[2] - 1)
    picks = [(row, column), (row, next_column), (next_row, column), (next_row, next_column)][:count]
    source = as_activation(coarser[np.minimum(np.arange(channels), coarser.shape[0] - 1)])
    return np.stack([source[:, a][:, :, b] for a, b in picks], -1).astype(np.float32)


def predict(
    values: np.ndarray, arm: Arm, architecture: Architecture, coarser: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the ARM gives for a level whose values (channels, height, width) are all known.

    coarser: the next coarser level's values, None for the coarsest level. Returns values, means' integer parts and
    tables, each (n,) in coding order.
    """
    level = _Level(values.shape, architecture, coarser)
    level.fill(values)
    means, tables = arm(level.inputs(0, values.size), level.channels)
    return level.in_order(values), means, tables


def encode_level(values: np.ndarray, arm: Arm, architecture: Architecture, coarser: np.ndarray | None) -> bytes:
    """The segment of one level; empty when all values are zero."""
    if not values.any():
        return b""
    level = _Level(values.shape, architecture, coarser)
    level.fill(values)
    coder = RangeEncoder()
    ordered = level.in_order(values)

    def encode(step: slice, means: np.ndarray, tables: np.ndarray) -> None:
        encode_integers(coder, ordered[step], means, tables)

    level.walk(arm, encode)
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
    level = _Level(wanted.shape, architecture, None)
    ordered = level.in_order(wanted)
    level.walk(arm, lambda step, means, tables: choose(ordered[step], level.channels[step], means, tables))
    return level.values


def decode_level(
    data: bytes,
    shape: tuple[int, int, int],
    arm: Arm,
    architecture: Architecture,
    coarser: np.ndarray | None,
) -> np.ndarray:
    """The values (channels, height, width) int32 of one level; the inverse of `encode_level`."""
    values = np.zeros(shape, np.int32)
    if not data:
        return values
    if values.size > len(data) * MAX_SYMBOLS_PER_BYTE:
        raise StreamError("payload", f"{len(data)} bytes cannot hold a level of {values.size} values")
    level = _Level(shape, architecture, coarser)
    decoder = range_decoder(data)
    level.walk(arm, lambda step, means, tables: decode_integers(decoder, means, tables))
    if np.abs(level.values).max() > MAX_VALUE:
        raise StreamError("payload", f"a grid value is beyond +-{MAX_VALUE}; the file is damaged")
    return level.values


assert len(NEIGHBOURS) == MAX_NEIGHBOURS
