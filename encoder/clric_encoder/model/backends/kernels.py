"""A training step, from rounding to the optimisers, as compiled loops for CPUs.

The same results as `torch_operations`, in half of its time and less: a block of grid values goes through
all layers and back while it is in the processor's first caches, where torch writes every intermediate value to memory.
numba compiles these functions at their first use on a machine, and keeps the result beside them or in the user's cache.

Arrays and tensors are of float32 where nothing else is said.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from clric_decoder.context import REACH
from clric_decoder.cpus import available_cpus
from numba import njit

# Values of a block at most: with its activations it fits the second cache of a core.
_BLOCK = 1024

# What is kept of a line of a tile of a convolution, at most, and columns of such a tile.
_ROOM, _COLUMNS = 2048, 128

# Multiply-accumulates for which it pays to wake a thread. The loops of a 768x512 image with four channels have fewer:
# another thread would save a seventh of its time on quiet cores, and double it on cores that others use too.
_LEAST_WORK = 16_000_000

_LOG2_E = np.float32(1 / math.log(2))
_LN_2 = np.float32(math.log(2))

# The compiler turns a loop into vector instructions if it has to check at most eight pairs of arrays, one of each
# written to, for overlap. Rows of one array count as one where it knows how long they are: the
# loops that cost most work on arrays whose rows have a constant length, in the function that makes them (what stands
# in functions of their own is inlined) or below that limit. A number without a type (float64) is kept away, and so are
# indices that might be negative, and divisions that look for a zero.


def _compiled(function: Callable[..., Any], **more: Any) -> Any:
    options: dict[str, Any] = {"fastmath": True, "nogil": True, "error_model": "numpy", **more}
    try:
        return njit(function, cache=True, **options)
    except RuntimeError:  # no folder to keep the result in can be written to
        return njit(function, **options)


def _inlined(function: Callable[..., Any]) -> Any:
    return _compiled(function, inline="always")


class ArmBits:
    """Bits of planes of an array by an ARM, and their gradients; started here, and joined where they are asked for.

    packed: (batch, rows, stride). planes: first row, height and width of each. neighbours: (inputs, 2) int64, how far
    down and right each input stands. scales: (batch, planes), added to the logarithm of the scale. weights, biases:
    (batch, all layers'), a layer's weights (outputs, inputs). sizes: widths from the inputs to the two outputs.
    limits: largest context and activation, range of the logarithm of the scale, smallest probability. rate_weights:
    (batch,), what gradients are multiplied by; None where they are not wanted.
    """

    def __init__(
        self,
        packed: torch.Tensor,
        planes: tuple[tuple[int, int, int], ...],
        neighbours: np.ndarray,
        scales: torch.Tensor,
        weights: torch.Tensor,
        biases: torch.Tensor,
        sizes: Sequence[int],
        limits: Sequence[float],
        rate_weights: torch.Tensor | None,
    ) -> None:
        batch, stride = len(packed), packed.shape[2]
        blocks, count = _blocks(planes, stride)
        self._bits = torch.empty(batch, len(blocks))
        wanted = 0 if rate_weights is None else batch
        self._grad_mean, self._grad_inputs = torch.empty(wanted, count), torch.empty(wanted, len(neighbours), count)
        self._grad_scales = torch.empty(wanted, len(blocks))
        self._grad_weights = torch.empty(wanted, len(blocks), weights.shape[1])
        self._grad_biases = torch.empty(wanted, len(blocks), biases.shape[1])
        self._packed, self._blocks, self._neighbours = packed, blocks, neighbours
        self._planes = torch.from_numpy(blocks[:, _PLANE])
        self._limits = np.array(limits, np.float32)
        self._work = (1 if rate_weights is None else 3) * batch * count * weights.shape[1]
        arrays = _arrays(packed, scales, weights, biases, torch.empty(0) if rate_weights is None else rate_weights)
        arrays += _arrays(self._bits, self._grad_mean, self._grad_inputs, self._grad_scales)
        arrays += _arrays(self._grad_weights, self._grad_biases)
        arrays += [blocks, neighbours, np.array(sizes), self._limits]
        if rate_weights is None:  # the bits are asked for at once
            _spread(_arm_bits, batch * len(blocks), self._work, *arrays)
            self._wait = _nothing
        else:
            self._wait = _start(_arm_bits, batch * len(blocks), self._work, *arrays)

    @property
    def bits(self) -> torch.Tensor:
        """(batch,)."""
        self._wait()
        return self._bits.sum(1)

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """By scales, weights and biases."""
        self._wait()
        grad_scales = self._grad_scales.new_zeros(len(self._grad_scales), int(self._blocks[-1, _PLANE]) + 1)
        grad_scales.index_add_(1, self._planes, self._grad_scales)
        return grad_scales, self._grad_weights.sum(1), self._grad_biases.sum(1)

    def add_to(self, grad_packed: torch.Tensor) -> None:
        """Adds the gradients by the values of the packed, themselves and as neighbours."""
        self._wait()
        arrays = _arrays(self._grad_mean, self._grad_inputs, self._packed)
        tables = self._blocks, self._neighbours, self._limits
        with _in_place(grad_packed) as changed:
            tasks, work = len(grad_packed) * len(self._blocks), 2 * self._grad_inputs.numel()
            _spread(_scatter, tasks, work, *arrays, *changed, *tables)


# Columns of a table of blocks: the plane's number, where the block's first value stands in the flattened array and
# among the values of all planes (row by row, without what is around them), rows and columns of the block, its place in
# the plane, and the plane's size.
_PLANE, _PLACE, _FIRST, _ROWS, _WIDE, _TOP, _LEFT, _HEIGHT, _WIDTH = range(9)


@functools.lru_cache(maxsize=64)
def _blocks(planes: tuple[tuple[int, int, int], ...], stride: int) -> tuple[np.ndarray, int]:
    """The blocks that planes are worked on in, none of them empty, and how many values all of them have."""
    blocks, count = [], 0
    for plane, (row, height, width) in enumerate(planes):
        for top, left, rows, columns in _tiles(height, width, _BLOCK, _BLOCK, 0).tolist():
            place = (row + top) * stride + REACH + left
            first = count + top * width + left
            blocks.append((plane, place, first, rows, columns, top, left, height, width))
        count += height * width
    return np.array(blocks, np.int64).reshape(-1, 9), count


@functools.lru_cache(maxsize=64)
def _tiles(height: int, width: int, room: int, columns: int, margin: int) -> np.ndarray:
    """Tiles of a plane, (tiles, 4) int64: top, left, rows and columns. With margins they have `room` values at most."""
    across = -(-width // columns)
    columns = -(-width // max(across, 1))
    down = -(-height // max(1, min(room // (columns + margin) - margin, height)))
    rows = -(-height // max(down, 1))
    tiles = [
        (top, left, min(rows, height - top), min(columns, width - left))
        for top in range(0, height, rows)
        for left in range(0, width, columns)
    ]
    return np.array(tiles, np.int64).reshape(-1, 4)


def convolve(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A convolution of 1x1, or one of 3x3 with replicated borders.

    inputs (batch, in, h, w), weight (batch, out, in, k, k), bias (batch, out) -> (batch, out, h, w).
    """
    outputs = torch.empty(*weight.shape[:2], *inputs.shape[2:])
    arrays = _arrays(inputs, weight.flatten(3), bias, outputs)
    work = weight.numel() * inputs[0, 0].numel()
    if weight.shape[3] == 1:
        _spread(_conv1x1, len(inputs) * -(-inputs[0, 0].numel() // _BLOCK), work, *arrays)
    else:
        tiles = _tiles(*inputs.shape[2:], _ROOM - 2, _COLUMNS, 2)
        _spread(_convolve, len(inputs) * len(tiles), work, *arrays, tiles)
    return outputs


def convolve_backward(
    gradient: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient of `convolve` by its outputs -> by inputs, weight and bias."""
    batch, outputs = weight.shape[:2]
    tiles = _tiles(*inputs.shape[2:], _ROOM - 2, _COLUMNS, 4)
    parts = len(tiles) if weight.shape[3] > 1 else -(-inputs[0, 0].numel() // _BLOCK)
    grad_inputs = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    grad_weight, grad_bias = torch.empty(batch, parts, weight[0].numel()), torch.empty(batch, parts, outputs)
    work = 2 * weight.numel() * inputs[0, 0].numel()
    arrays = _arrays(gradient, inputs, weight.flatten(3), grad_inputs, grad_weight, grad_bias)
    if weight.shape[3] == 1:
        _spread(_conv1x1_backward, batch * parts, work, *arrays)
    else:
        _spread(_convolve_backward, batch * parts, work, *arrays, tiles)
    return grad_inputs, grad_weight.sum(1).view_as(weight), grad_bias.sum(1)


class Upsampled:
    """All planes of an array (batch, rows, stride) at the size of the finest, (batch, planes, h, w).

    taps: (batch, levels - 1, 4), those of the doubling to each level. places: (planes, 2) int64, the level and the
    first row of each. sizes, ends: (levels, 2) and (levels,) int64, of each level's planes, and of their values when
    the levels lie behind each other.
    """

    def __init__(
        self, packed: torch.Tensor, taps: torch.Tensor, places: np.ndarray, sizes: np.ndarray, ends: np.ndarray
    ) -> None:
        # What each level's plane becomes on its way to the finest: the levels between lie behind each other
        self._geometry = (places, sizes, ends)
        self._taps, self._between = taps, torch.empty(len(packed), len(places), int(ends[-1] - ends[0]))
        self.outputs = torch.empty(len(packed), len(places), *sizes[0].tolist())
        self._tasks, self._work = len(packed) * len(places), 8 * self.outputs.numel()
        arrays = _arrays(packed, taps, self._between, self.outputs)
        _spread(_upsample, self._tasks, self._work, *arrays, *self._geometry)

    def backward(self, gradient: torch.Tensor, grad_packed: torch.Tensor) -> torch.Tensor:
        """Of the outputs -> of taps; that of the packed is added to `grad_packed`."""
        grad_taps = torch.zeros(*gradient.shape[:2], *self._taps.shape[1:])
        arrays = _arrays(gradient, self._taps, self._between)
        with _in_place(grad_packed) as changed:
            arrays += [*changed, grad_taps.numpy()]
            _spread(_upsample_backward, self._tasks, 3 * self._work, *arrays, *self._geometry)
        return grad_taps.sum(1)


def soft_round_with_noise(
    values: torch.Tensor, noise: torch.Tensor, temperature: float, sigma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `torch_operations.soft_round_with_noise`."""
    rounded, slope = torch.empty(values.shape), torch.empty(values.shape)
    arrays = [array.reshape(-1) for array in _arrays(values, noise, rounded, slope)]
    tasks = -(-values.numel() // _BLOCK)
    _spread(_soft_round, tasks, 40 * values.numel(), *arrays, np.float32(temperature), np.float32(sigma))
    return rounded, slope


def adam(
    values: torch.Tensor,
    gradient: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    betas: tuple[float, float],
    length: float,
    epsilon: float,
) -> None:
    """A step of `training.optimizers.Adam`: moments and values change in place."""
    (slopes,) = _arrays(gradient)
    with _in_place(values, mean, square) as changed:
        flat, *moments = (array.reshape(-1) for array in changed)
        _adam(flat, slopes.reshape(-1), *moments, np.array([*betas, length, epsilon], np.float32))


def soap(
    values: torch.Tensor,
    gradient: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    covariances: torch.Tensor,
    bases: torch.Tensor,
    table: Sequence[tuple[int, int, int, int, int]],
    betas: tuple[float, float],
    covariance_beta: float,
    length: float,
    epsilon: float,
) -> None:
    """A step of `training.optimizers.Soap`: moments, covariances and values change in place."""
    slopes, turns = _arrays(gradient, bases)
    numbers = np.array([*betas, length, epsilon, covariance_beta], np.float32)
    with _in_place(values, mean, square, covariances) as (own, *state):
        _soap(own, slopes, *state, turns, np.array(table), numbers)


def _arrays(*tensors: torch.Tensor) -> list[np.ndarray]:
    """For loops that read them, or write to those that this module has made: what is not contiguous is copied."""
    return [tensor.contiguous().numpy() for tensor in tensors]


@contextlib.contextmanager
def _in_place(*tensors: torch.Tensor) -> Iterator[list[np.ndarray]]:
    """For loops that change a caller's tensors, such as slices of others: copies are copied back."""
    contiguous = [tensor.contiguous() for tensor in tensors]
    yield [tensor.numpy() for tensor in contiguous]
    for tensor, changed in zip(tensors, contiguous, strict=True):
        if changed is not tensor:
            tensor.copy_(changed)


_pools: list[ThreadPoolExecutor] = []
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_pools.clear)  # a child has none of its parent's threads

_threads = threading.local()


@contextlib.contextmanager
def own_threads(count: int) -> Iterator[None]:
    """Gives so many threads to the loops that are called from this one while it lasts."""
    _threads.count, _threads.begun = count, []
    try:
        yield
    finally:
        del _threads.count, _threads.begun


def _free() -> int:
    """This thread, and those of its own that have done what they began."""
    begun = getattr(_threads, "begun", [])
    begun[:] = [future for future in begun if not future.done()]
    return getattr(_threads, "count", 1) - len(begun)


def _nothing() -> None:
    pass


def _start(function: Any, tasks: int, work: int, *arguments: Any) -> Callable[[], None]:
    """Begins function(first, last, *arguments) for all tasks on half of the free threads; what it gives waits.

    Where there is but one thread, or too little work for another one, all is done at once.
    """
    threads = min(_free() // 2, tasks, work // _LEAST_WORK)
    if threads == 0:
        function(0, tasks, *arguments)
        return _nothing
    futures = _submit(function, tasks, threads, 0, arguments)
    _threads.begun += futures

    def wait() -> None:
        for future in futures:
            future.result()

    return wait


def _spread(function: Any, tasks: int, work: int, *arguments: Any) -> None:
    """Calls function(first, last, *arguments) for all tasks, on as many threads as are free and the work is worth."""
    threads = min(_free(), tasks, 1 + work // _LEAST_WORK)
    futures = _submit(function, tasks, threads, 1, arguments)
    function(0, tasks // threads, *arguments)
    for future in futures:
        future.result()


def _submit(function: Any, tasks: int, parts: int, first: int, arguments: tuple[Any, ...]) -> list[Future[None]]:
    if first < parts and not _pools:
        _pools.append(ThreadPoolExecutor(available_cpus(), thread_name_prefix="clric"))
    bounds = [tasks * i // parts for i in range(parts + 1)]
    return [_pools[0].submit(function, bounds[i], bounds[i + 1], *arguments) for i in range(first, parts)]


@_compiled
def _exp2(values: np.ndarray, scratch: np.ndarray) -> None:
    """2^x in place, for x in [-126, 126]: 1e-7 of the result off at most. scratch: int32, at least as many."""
    for i in range(len(values)):
        x = min(max(values[i], np.float32(-126)), np.float32(126))
        floor = np.floor(x)
        scratch[i] = (np.int32(floor) + np.int32(127)) << np.int32(23)
        x = (x - floor) * _LN_2
        # e^x for x in [0, ln 2)
        y = np.float32(1 / 5040) + x * np.float32(1 / 40320)
        y = np.float32(1 / 720) + x * y
        y = np.float32(1 / 120) + x * y
        y = np.float32(1 / 24) + x * y
        y = np.float32(1 / 6) + x * y
        y = np.float32(0.5) + x * y
        y = np.float32(1) + x * y
        values[i] = np.float32(1) + x * y
    powers = scratch.view(np.float32)
    for i in range(len(values)):
        values[i] *= powers[i]


@_compiled
def _soft_round(
    first_task: int,
    last_task: int,
    values: np.ndarray,
    noise: np.ndarray,
    rounded: np.ndarray,
    slope: np.ndarray,
    temperature: np.floating,
    sigma: np.floating,
) -> None:
    one, half = np.float32(1), np.float32(0.5)
    height = one / np.float32(math.tanh(half / temperature))
    sharpness, steepest = np.float32(2) / temperature * _LOG2_E, (np.float32(2) * height / temperature) ** 2
    offset = half - half * height
    first, second = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    floor, whole = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.int32)
    for task in range(first_task, last_task):
        own = slice(task * _BLOCK, min((task + 1) * _BLOCK, len(values)))
        x, y, rise = values[own], rounded[own], slope[own]
        n = len(x)
        for i in range(n):
            floor[i] = np.floor(x[i])
            first[i] = (floor[i] + half - x[i]) * sharpness
        _exp2(first[:n], whole)
        shift = noise[own]
        for i in range(n):
            first[i] = one / (one + first[i])
            y[i] = floor[i] + height * first[i] + offset + sigma * shift[i]
        for i in range(n):
            floor[i] = np.floor(y[i])
            second[i] = (floor[i] + half - y[i]) * sharpness
        _exp2(second[:n], whole)
        for i in range(n):
            second[i] = one / (one + second[i])
            y[i] = floor[i] + height * second[i] + offset
        for i in range(n):
            rise[i] = first[i] * (one - first[i]) * second[i] * (one - second[i]) * steepest


@_compiled
def _adam(values: np.ndarray, gradient: np.ndarray, mean: np.ndarray, square: np.ndarray, numbers: np.ndarray) -> None:
    beta, other_beta, length, epsilon = numbers[0], numbers[1], numbers[2], numbers[3]
    share, other_share = np.float32(1) - beta, np.float32(1) - other_beta
    for i in range(len(values)):
        mean[i] += share * (gradient[i] - mean[i])
        square[i] = other_beta * square[i] + other_share * gradient[i] * gradient[i]
        values[i] -= length * mean[i] / (np.sqrt(square[i]) + epsilon)


@_compiled
def _add_row(target: np.ndarray, weight: np.floating, source: np.ndarray) -> None:
    for i in range(len(target)):
        target[i] += weight * source[i]


@_compiled
def _rotate(matrix: np.ndarray, left: np.ndarray, right: np.ndarray, scratch: np.ndarray, result: np.ndarray) -> None:
    """result = left^T matrix right, for square matrices of eigenvectors; one without rows leaves its side as it is."""
    rows = len(matrix)
    if len(left):
        scratch[:] = 0
        for i in range(rows):
            for k in range(rows):
                _add_row(scratch[i], left[k, i], matrix[k])
    else:
        scratch[:] = matrix
    if not len(right):
        result[:] = scratch
        return
    result[:] = 0
    for i in range(rows):
        for k in range(len(right)):
            _add_row(result[i], scratch[i, k], right[k])


@_compiled
def _square(matrices: np.ndarray, place: int, side: int) -> np.ndarray:
    """The matrix that begins at a place, one without rows where that is -1."""
    side = 0 if place < 0 else side
    return matrices[max(place, 0) : max(place, 0) + side * side].reshape((side, side))


@_compiled
def _soap(
    values: np.ndarray,
    gradient: np.ndarray,
    mean: np.ndarray,
    square: np.ndarray,
    covariances: np.ndarray,
    bases: np.ndarray,
    table: np.ndarray,
    numbers: np.ndarray,
) -> None:
    beta, other_beta, length, epsilon, keep = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
    share, other_share, learnt = np.float32(1) - beta, np.float32(1) - other_beta, np.float32(1) - keep
    for b in range(len(values)):
        for g in range(len(table)):
            rows, columns = table[g, 1], table[g, 2]
            own = slice(table[g, 0], table[g, 0] + rows * columns)
            flat, flat_mean = gradient[b, own], mean[b, own]
            _add_row(flat_mean, -share, flat_mean)
            _add_row(flat_mean, share, flat)
            slopes, moments = flat.reshape((rows, columns)), square[b, own].reshape((rows, columns))
            left, right = _square(bases[b], table[g, 3], rows), _square(bases[b], table[g, 4], columns)
            scratch, turned = np.empty((rows, columns), np.float32), np.empty((rows, columns), np.float32)
            moved = np.empty((rows, columns), np.float32)
            _rotate(slopes, left, right, scratch, turned)
            _rotate(flat_mean.reshape((rows, columns)), left, right, scratch, moved)
            for i in range(rows):
                for j in range(columns):
                    moments[i, j] = other_beta * moments[i, j] + other_share * turned[i, j] * turned[i, j]
                    moved[i, j] *= length / (np.sqrt(moments[i, j]) + epsilon)
            # Back: left moved right^T
            _rotate(moved, np.ascontiguousarray(left.T), np.ascontiguousarray(right.T), scratch, turned)
            _add_row(values[b, own], np.float32(-1), turned.reshape(-1))

            by_row, by_column = (
                _square(covariances[b], table[g, 3], rows),
                _square(covariances[b], table[g, 4], columns),
            )
            for i in range(len(by_row)):
                for j in range(rows):
                    by_row[i, j] += learnt * (_dot(slopes[i], slopes[j]) - by_row[i, j])
            for i in range(len(by_column)):
                _add_row(by_column[i], -learnt, by_column[i])
                for k in range(rows):
                    _add_row(by_column[i], learnt * slopes[k, i], slopes[k])


@_compiled
def _sum_of_log2(values: np.ndarray, mantissas: np.ndarray) -> np.floating:
    """The sum of log2(x) for positive, normal x, each 1e-7 off at most. mantissas: int32, at least as many, to use."""
    # x = 2^e * m with m in [sqrt(1/2), sqrt(2)), and log(m) = 2 artanh((m - 1) / (m + 1))
    whole = values.view(np.int32)
    total = np.float32(0)
    for i in range(len(values)):
        exponent = (whole[i] - np.int32(0x3F3504F3)) >> np.int32(23)
        mantissas[i] = whole[i] - (exponent << np.int32(23))
        total += np.float32(exponent)
    m = mantissas.view(np.float32)
    for i in range(len(values)):
        s = (m[i] - np.float32(1)) / (m[i] + np.float32(1))
        q = s * s
        y = np.float32(1 / 7) + q * np.float32(1 / 9)
        y = np.float32(1 / 5) + q * y
        y = np.float32(1 / 3) + q * y
        y = np.float32(1) + q * y
        total += np.float32(2) * _LOG2_E * s * y
    return total


@_inlined
def _weighted_sums(
    result: np.ndarray,
    to: int,
    other: int,
    biases: tuple[np.floating, np.floating],
    rows: np.ndarray,
    at: int,
    count: int,
    weights: np.ndarray,
    first: int,
    second: int,
    step: int,
    n: int,
) -> None:
    """result[to] = biases[0] + the sum over k < count of weights[first + k * step] * rows[at + k], and
    result[other] the same from biases[1] and weights[second] on; n values of each. Both may be one."""
    k = 0
    if count >= 8:
        a0, a1, a2, a3 = weights[first], weights[first + step], weights[first + 2 * step], weights[first + 3 * step]
        b0, b1, b2, b3 = weights[second], weights[second + step], weights[second + 2 * step], weights[second + 3 * step]
        p, q = first + 4 * step, second + 4 * step
        a4, a5, a6, a7 = weights[p], weights[p + step], weights[p + 2 * step], weights[p + 3 * step]
        b4, b5, b6, b7 = weights[q], weights[q + step], weights[q + 2 * step], weights[q + 3 * step]
        for i in range(n):
            x0, x1, x2, x3 = rows[at, i], rows[at + 1, i], rows[at + 2, i], rows[at + 3, i]
            x4, x5, x6, x7 = rows[at + 4, i], rows[at + 5, i], rows[at + 6, i], rows[at + 7, i]
            left = biases[0] + (a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3) + (a4 * x4 + a5 * x5 + a6 * x6 + a7 * x7)
            right = biases[1] + (b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3) + (b4 * x4 + b5 * x5 + b6 * x6 + b7 * x7)
            result[to, i] = left
            result[other, i] = right
        k = 8
    elif count >= 2:
        a0, a1, b0, b1 = weights[first], weights[first + step], weights[second], weights[second + step]
        for i in range(n):
            x0, x1 = rows[at, i], rows[at + 1, i]
            left, right = biases[0] + a0 * x0 + a1 * x1, biases[1] + b0 * x0 + b1 * x1
            result[to, i] = left
            result[other, i] = right
        k = 2
    else:
        result[to, :n] = biases[0]
        result[other, :n] = biases[1]
    while k < count:
        a0, b0 = weights[first + k * step], weights[second + k * step]
        for i in range(n):
            x0 = rows[at + k, i]
            left, right = result[to, i] + a0 * x0, result[other, i] + b0 * x0
            result[to, i] = left
            result[other, i] = right
        k += 1


@_inlined
def _dots(
    above: np.ndarray,
    at: int,
    outputs: int,
    below: np.ndarray,
    to: int,
    inputs: int,
    n: int,
    result: np.ndarray,
    w: int,
) -> None:
    """result[w + j * inputs + k] = the sum over i < n of above[at + j, i] * below[to + k, i]."""
    for j in range(0, outputs, 2):
        other = min(j + 1, outputs - 1)
        x, y, left, right = at + j, at + other, w + j * inputs, w + other * inputs
        k = 0
        while k + 4 <= inputs:
            p = to + k
            a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
            for i in range(n):
                a, b = above[x, i], above[y, i]
                v0, v1, v2, v3 = below[p, i], below[p + 1, i], below[p + 2, i], below[p + 3, i]
                a0, a1, a2, a3 = a0 + a * v0, a1 + a * v1, a2 + a * v2, a3 + a * v3
                b0, b1, b2, b3 = b0 + b * v0, b1 + b * v1, b2 + b * v2, b3 + b * v3
            q = right + k
            result[q], result[q + 1], result[q + 2], result[q + 3] = b0, b1, b2, b3
            q = left + k
            result[q], result[q + 1], result[q + 2], result[q + 3] = a0, a1, a2, a3
            k += 4
        while k < inputs:
            a0 = b0 = np.float32(0)
            for i in range(n):
                v0 = below[to + k, i]
                a0, b0 = a0 + above[x, i] * v0, b0 + above[y, i] * v0
            result[right + k], result[left + k] = b0, a0
            k += 1


@_compiled
def _dot(a: np.ndarray, b: np.ndarray) -> np.floating:
    total = np.float32(0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@_compiled
def _arm_bits(
    first_task: int,
    last_task: int,
    packed: np.ndarray,
    scales: np.ndarray,
    weights: np.ndarray,
    biases: np.ndarray,
    rate_weights: np.ndarray,
    bits: np.ndarray,
    grad_mean: np.ndarray,
    grad_inputs: np.ndarray,
    grad_scales: np.ndarray,
    grad_weights: np.ndarray,
    grad_biases: np.ndarray,
    blocks: np.ndarray,
    neighbours: np.ndarray,
    sizes: np.ndarray,
    limits: np.ndarray,
) -> None:
    layers, height, stride = len(sizes) - 1, sizes.sum(), packed.shape[2]
    widest, largest, low, high, least = limits[0], limits[1], limits[2], limits[3], limits[4]
    activations = np.empty((height, _BLOCK), np.float32)
    gradients = np.empty((height, _BLOCK), np.float32)
    own = np.empty(_BLOCK, np.float32)
    whole = np.empty(_BLOCK, np.int32)
    rate, inner = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    near, far = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    probability = np.empty(_BLOCK, np.float32)
    for task in range(first_task, last_task):
        b, c = task // len(blocks), task % len(blocks)
        block = blocks[c]
        place, first, rows, wide, width = block[_PLACE], block[_FIRST], block[_ROWS], block[_WIDE], block[_WIDTH]
        n = rows * wide
        flat = packed[b].reshape(-1)
        for y in range(rows):
            own[y * wide : (y + 1) * wide] = flat[place + y * stride : place + y * stride + wide]
        for k in range(sizes[0]):
            for y in range(rows):
                at = place + (y + neighbours[k, 0]) * stride + neighbours[k, 1]
                source, target = flat[at : at + wide], activations[k, y * wide : (y + 1) * wide]
                for i in range(wide):
                    target[i] = min(max(source[i], -widest), widest)
        at, w, v = 0, 0, 0
        for layer in range(layers):
            inputs, outputs, own_weights = sizes[layer], sizes[layer + 1], weights[b]
            for j in range(0, outputs, 2):
                other = min(j + 1, outputs - 1)
                to, pair = at + inputs, (biases[b, v + j], biases[b, v + other])
                _weighted_sums(
                    activations, to + j, to + other, pair, activations, at, inputs, own_weights, w + j * inputs,
                    w + other * inputs, 1, n,
                )  # fmt: skip
            if layer < layers - 1:
                for j in range(at + inputs, at + inputs + outputs):
                    for i in range(n):
                        activations[j, i] = min(max(activations[j, i], np.float32(0)), largest)
            at, w, v = at + inputs, w + inputs * outputs, v + outputs

        # Laplace, as in torch_operations
        mean, log_scale = activations[at], activations[at + 1]
        shift = scales[b, block[_PLANE]]
        for i in range(n):
            log_scale[i] += shift
        for i in range(n):
            rate[i] = -min(max(log_scale[i], low), high)
        _exp2(rate[:n], whole)
        for i in range(n):
            inner[i] = np.float32(0.5) - abs(own[i] - mean[i])
        for i in range(n):
            near[i] = -abs(inner[i]) * rate[i] * _LOG2_E
        for i in range(n):
            far[i] = (inner[i] - np.float32(1)) * rate[i] * _LOG2_E
        _exp2(near[:n], whole)
        _exp2(far[:n], whole)
        for i in range(n):
            opposite = np.float32(1) - near[i]
            both = np.float32(1) - far[i] + (opposite if inner[i] > 0 else -opposite)
            probability[i] = max(np.float32(0.5) * both, least)
        bits[b, c] = -_sum_of_log2(probability[:n], whole)
        if not len(rate_weights):
            continue

        to_mean, to_scale = gradients[at], gradients[at + 1]
        bit_weight = np.float32(-0.5) * _LOG2_E * rate_weights[b]
        for i in range(n):
            slope = bit_weight * rate[i] / probability[i]
            rate[i] = slope if probability[i] > least else np.float32(0)
        for i in range(n):
            side = rate[i] if own[i] > mean[i] else -rate[i]
            to_mean[i] = (near[i] - far[i]) * side
        for i in range(n):
            by = (inner[i] * near[i] + (np.float32(1) - inner[i]) * far[i]) * rate[i] * -_LN_2
            to_scale[i] = by if low < log_scale[i] < high else np.float32(0)
        grad_scales[b, c] = to_scale[:n].sum()
        for y in range(rows):
            start = first + y * width
            grad_mean[b, start : start + wide] = to_mean[y * wide : (y + 1) * wide]
        for layer in range(layers - 1, -1, -1):
            inputs, outputs = sizes[layer], sizes[layer + 1]
            at, w, v = at - inputs, w - inputs * outputs, v - outputs
            own_result = grad_weights[b, c]
            _dots(gradients, at + inputs, outputs, activations, at, inputs, n, own_result, w)
            for j in range(outputs):
                total = np.float32(0)
                for i in range(n):
                    total += gradients[at + inputs + j, i]
                grad_biases[b, c, v + j] = total
            own_weights = weights[b]
            for k in range(0, inputs, 2):
                other = min(k + 1, inputs - 1)
                _weighted_sums(
                    gradients, at + k, at + other, (np.float32(0), np.float32(0)), gradients, at + inputs, outputs,
                    own_weights, w + k, w + other, inputs, n,
                )  # fmt: skip
            for k in range(at, at + inputs if layer else at):
                for i in range(n):
                    inside = np.float32(0) < activations[k, i] < largest
                    gradients[k, i] = gradients[k, i] if inside else np.float32(0)
        for k in range(sizes[0]):
            for y in range(rows):
                start = first + y * width
                grad_inputs[b, k, start : start + wide] = gradients[k, y * wide : (y + 1) * wide]


@_compiled
def _scatter(
    first_task: int,
    last_task: int,
    grad_mean: np.ndarray,
    grad_inputs: np.ndarray,
    packed: np.ndarray,
    grad_packed: np.ndarray,
    blocks: np.ndarray,
    neighbours: np.ndarray,
    limits: np.ndarray,
) -> None:
    """Gradients by inputs, added where the inputs stand, and that by the mean, taken from the value's own."""
    stride, widest = packed.shape[2], limits[0]
    sums = np.empty(_BLOCK, np.float32)
    for task in range(first_task, last_task):
        b, block = task // len(blocks), blocks[task % len(blocks)]
        place, first, rows, wide = block[_PLACE], block[_FIRST], block[_ROWS], block[_WIDE]
        top, left, height, width = block[_TOP], block[_LEFT], block[_HEIGHT], block[_WIDTH]
        for y in range(rows):
            sums[:wide] = 0
            for k in range(len(neighbours)):
                # The values of the row that look here with their k-th input
                down, right = -neighbours[k, 0], -neighbours[k, 1]
                if top + y + down >= height:
                    continue
                begin, end = max(0, -right - left), min(wide, width - right - left)
                start = first + (y + down) * width + right
                if begin < end:
                    target, source = sums[begin:end], grad_inputs[b, k, start + begin : start + end]
                    for i in range(end - begin):
                        target[i] += source[i]
            at = place + y * stride
            values, result = packed[b].reshape(-1)[at : at + wide], grad_packed[b].reshape(-1)[at : at + wide]
            source = grad_mean[b, first + y * width : first + y * width + wide]
            for i in range(wide):
                result[i] += (sums[i] if -widest < values[i] < widest else np.float32(0)) - source[i]


@_compiled
def _conv1x1(
    first_task: int, last_task: int, inputs: np.ndarray, weights: np.ndarray, biases: np.ndarray, result: np.ndarray
) -> None:
    batch, channels = inputs.shape[:2]
    outputs, size = result.shape[1], inputs.shape[2] * inputs.shape[3]
    parts = (size + _BLOCK - 1) // _BLOCK
    planes, results = inputs.reshape((batch, channels, size)), result.reshape((batch, outputs, size))
    rows, sums = np.empty((channels, _BLOCK), np.float32), np.empty((2, _BLOCK), np.float32)
    for task in range(first_task, last_task):
        b, start = task // parts, task % parts * _BLOCK
        n = min(_BLOCK, size - start)
        own_weights = weights[b].reshape(-1)
        for k in range(channels):
            rows[k, :n] = planes[b, k, start : start + n]
        for j in range(0, outputs, 2):
            other = min(j + 1, outputs - 1)
            pair = (biases[b, j], biases[b, other])
            _weighted_sums(sums, 0, 1, pair, rows, 0, channels, own_weights, j * channels, other * channels, 1, n)
            results[b, j, start : start + n] = sums[0, :n]
            results[b, other, start : start + n] = sums[other - j, :n]


@_compiled
def _conv1x1_backward(
    first_task: int,
    last_task: int,
    gradient: np.ndarray,
    inputs: np.ndarray,
    weights: np.ndarray,
    grad_inputs: np.ndarray,
    grad_weights: np.ndarray,
    grad_biases: np.ndarray,
) -> None:
    batch, channels = inputs.shape[:2]
    outputs, size = gradient.shape[1], inputs.shape[2] * inputs.shape[3]
    parts = (size + _BLOCK - 1) // _BLOCK
    planes, slopes = inputs.reshape((batch, channels, size)), gradient.reshape((batch, outputs, size))
    results = grad_inputs.reshape((batch, channels, size))
    rows, above = np.empty((channels, _BLOCK), np.float32), np.empty((outputs, _BLOCK), np.float32)
    sums = np.empty((2, _BLOCK), np.float32)
    for task in range(first_task, last_task):
        b, part = task // parts, task % parts
        start = part * _BLOCK
        n = min(_BLOCK, size - start)
        own_weights, own_result = weights[b].reshape(-1), grad_weights[b, part]
        for k in range(channels):
            rows[k, :n] = planes[b, k, start : start + n]
        for j in range(outputs):
            above[j, :n] = slopes[b, j, start : start + n]
            grad_biases[b, part, j] = above[j, :n].sum()
        _dots(above, 0, outputs, rows, 0, channels, n, own_result, 0)
        for k in range(0, channels, 2):
            other = min(k + 1, channels - 1)
            none = (np.float32(0), np.float32(0))
            _weighted_sums(sums, 0, 1, none, above, 0, outputs, own_weights, k, other, channels, n)
            results[b, k, start : start + n] = sums[0, :n]
            results[b, other, start : start + n] = sums[other - k, :n]


@_compiled
def _lines(plane: np.ndarray, top: int, left: int, rows: int, columns: int, lines: np.ndarray) -> None:
    """A tile of a plane and a row and a column more at each side, flat; the outermost values go on."""
    height, width = plane.shape
    stride = columns + 2
    for y in range(rows + 2):
        source, line = plane[min(max(top - 1 + y, 0), height - 1)], lines[y * stride : (y + 1) * stride]
        line[1 : 1 + columns] = source[left : left + columns]
        line[0] = source[max(left - 1, 0)]
        line[1 + columns] = source[min(left + columns, width - 1)]


@_inlined
def _add_neighbours(
    sums: np.ndarray,
    to: int,
    other: int,
    a: np.ndarray,
    b: np.ndarray,
    lines: np.ndarray,
    c: int,
    step: np.uint64,
    n: np.uint64,
) -> None:
    """Adds 3x3 neighbours in lines[c], whose rows are a step apart: to sums[to] weighted by a, to sums[other] by b."""
    a0, a1, a2, a3, a4, a5, a6, a7, a8 = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8]
    b0, b1, b2, b3, b4, b5, b6, b7, b8 = b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7], b[8]
    one, two, twice = np.uint64(1), np.uint64(2), step + step
    for i in range(n):
        x0, x1, x2 = lines[c, i], lines[c, i + one], lines[c, i + two]
        x3, x4, x5 = lines[c, i + step], lines[c, i + step + one], lines[c, i + step + two]
        x6, x7, x8 = lines[c, i + twice], lines[c, i + twice + one], lines[c, i + twice + two]
        left = (a0 * x0 + a1 * x1 + a2 * x2) + (a3 * x3 + a4 * x4 + a5 * x5) + (a6 * x6 + a7 * x7 + a8 * x8)
        right = (b0 * x0 + b1 * x1 + b2 * x2) + (b3 * x3 + b4 * x4 + b5 * x5) + (b6 * x6 + b7 * x7 + b8 * x8)
        sums[to, i] += left
        sums[other, i] += right


@_compiled
def _convolve(
    first_task: int,
    last_task: int,
    inputs: np.ndarray,
    weights: np.ndarray,
    biases: np.ndarray,
    result: np.ndarray,
    tiles: np.ndarray,
) -> None:
    channels, outputs = inputs.shape[1], result.shape[1]
    lines = np.zeros((channels, _ROOM), np.float32)
    sums = np.empty((2, _ROOM), np.float32)  # the second one is nobody's for the last of an odd number of outputs
    for task in range(first_task, last_task):
        b, tile = task // len(tiles), tiles[task % len(tiles)]
        top, left, rows, columns = tile[0], tile[1], tile[2], tile[3]
        stride = columns + 2
        step, n = np.uint64(stride), np.uint64(rows * stride)
        for c in range(channels):
            _lines(inputs[b, c], top, left, rows, columns, lines[c])
        for o in range(0, outputs, 2):
            other = min(o + 1, outputs - 1)
            sums[0], sums[1] = biases[b, o], biases[b, other]
            for c in range(channels):
                _add_neighbours(sums, 0, 1, weights[b, o, c], weights[b, other, c], lines, c, step, n)
            for k in range(1 + other - o):
                for y in range(rows):
                    result[b, o + k, top + y, left : left + columns] = sums[k, y * stride : y * stride + columns]


@_compiled
def _convolve_backward(
    first_task: int,
    last_task: int,
    gradient: np.ndarray,
    inputs: np.ndarray,
    weights: np.ndarray,
    grad_inputs: np.ndarray,
    grad_weights: np.ndarray,
    grad_biases: np.ndarray,
    tiles: np.ndarray,
) -> None:
    channels, height, width = inputs.shape[1:]
    outputs = gradient.shape[1]
    one, two = np.uint64(1), np.uint64(2)
    lines = np.zeros((channels, _ROOM), np.float32)
    # The outputs' gradients of a tile, and with two rows and columns more around it, zero outside of the plane
    own = np.empty((outputs, _ROOM), np.float32)
    around = np.empty((outputs, _ROOM), np.float32)
    sums = np.empty((2, _ROOM), np.float32)
    backwards = np.empty((2, 9), np.float32)
    for task in range(first_task, last_task):
        b, t = task // len(tiles), task % len(tiles)
        top, left, rows, columns = tiles[t, 0], tiles[t, 1], tiles[t, 2], tiles[t, 3]
        stride, wide = columns + 2, columns + 4
        step, n = np.uint64(stride), np.uint64(rows * stride)
        for c in range(channels):
            _lines(inputs[b, c], top, left, rows, columns, lines[c])
        own[:] = 0
        around[:] = 0
        first, last = max(left - 2, 0), min(left + columns + 2, width)
        for o in range(outputs):
            for y in range(max(top - 2, 0), min(top + rows + 2, height)):
                start = (y - top + 2) * wide + 2 + first - left
                around[o, start : start + last - first] = gradient[b, o, y, first:last]
            for y in range(rows):
                own[o, y * stride : y * stride + columns] = gradient[b, o, top + y, left : left + columns]
            grad_biases[b, t, o] = own[o].sum()

        # Weights: the sums of products with 3x3 neighbours
        twice = step + step
        for o in range(0, outputs, 2):
            other = min(o + 1, outputs - 1)
            for c in range(channels):
                a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = a8 = np.float32(0)
                b0 = b1 = b2 = b3 = b4 = b5 = b6 = b7 = b8 = np.float32(0)
                for i in range(n):
                    x, y = own[o, i], own[other, i]
                    x0, x1, x2 = lines[c, i], lines[c, i + one], lines[c, i + two]
                    x3, x4, x5 = lines[c, i + step], lines[c, i + step + one], lines[c, i + step + two]
                    x6, x7, x8 = lines[c, i + twice], lines[c, i + twice + one], lines[c, i + twice + two]
                    a0, a1, a2 = a0 + x * x0, a1 + x * x1, a2 + x * x2
                    a3, a4, a5 = a3 + x * x3, a4 + x * x4, a5 + x * x5
                    a6, a7, a8 = a6 + x * x6, a7 + x * x7, a8 + x * x8
                    b0, b1, b2 = b0 + y * x0, b1 + y * x1, b2 + y * x2
                    b3, b4, b5 = b3 + y * x3, b4 + y * x4, b5 + y * x5
                    b6, b7, b8 = b6 + y * x6, b7 + y * x7, b8 + y * x8
                place = (other * channels + c) * 9
                to = grad_weights[b, t, place : place + 9]
                to[0], to[1], to[2], to[3], to[4], to[5], to[6], to[7], to[8] = b0, b1, b2, b3, b4, b5, b6, b7, b8
                place = (o * channels + c) * 9
                to = grad_weights[b, t, place : place + 9]
                to[0], to[1], to[2], to[3], to[4], to[5], to[6], to[7], to[8] = a0, a1, a2, a3, a4, a5, a6, a7, a8

        # What padded inputs give to the outputs around them: padded rows top - 1 to bottom and columns left - 1 to
        # right, of which those beyond the plane's edges belong to its outermost values
        step, n = np.uint64(wide), np.uint64((rows + 2) * wide)
        for c in range(0, channels, 2):
            sums[:] = 0
            other = min(c + 1, channels - 1)
            for o in range(outputs):
                for s in range(9):
                    backwards[0, s], backwards[1, s] = weights[b, o, c, 8 - s], weights[b, o, other, 8 - s]
                _add_neighbours(sums, 0, 1, backwards[0], backwards[1], around, o, step, n)
            for k in range(1 + other - c):
                result = grad_inputs[b, c + k]
                result[top : top + rows, left : left + columns] = 0
                for y in range(top - 1 if top == 0 else top, top + rows + (top + rows == height)):
                    start = (y - top + 1) * wide
                    source, target = sums[k, start : start + wide], result[min(max(y, 0), height - 1)]
                    inner = target[left : left + columns]
                    for x in range(columns):
                        inner[x] += source[x + 1]
                    if left == 0:
                        target[0] += source[0]
                    if left + columns == width:
                        target[width - 1] += source[columns + 1]


@_compiled
def _tall(plane: np.ndarray, taps: np.ndarray, height: int) -> np.ndarray:
    """A plane (h, w) upsampled along its columns, (height, w).

    Even rows weigh rows from two before to one after theirs with taps 0 to 3, odd ones from two after to one before.
    """
    last = plane.shape[0] - 1
    result = np.zeros((height, plane.shape[1]), np.float32)
    for y in range(height):
        for tap in range(4):
            source, weight = plane[_neighbour(y, tap, last)], taps[tap]
            row = result[y]
            for x in range(len(row)):
                row[x] += weight * source[x]
    return result


@_compiled
def _pad_edge(row: np.ndarray, line: np.ndarray) -> None:
    """A row into a line that is longer by two at each end, where the outermost values go on."""
    line[2:-2] = row
    line[:2] = row[0]
    line[-2:] = row[-1]


@_compiled
def _neighbour(place: int, tap: int, last: int) -> int:
    offset = tap - 2 if place % 2 == 0 else 2 - tap
    return min(max(place // 2 + offset, 0), last)


@_compiled
def _double(plane: np.ndarray, taps: np.ndarray, result: np.ndarray) -> None:
    """A plane (h, w) upsampled by 2, cut to the size of `result`."""
    height, width = result.shape
    narrow = plane.shape[1]
    tall = _tall(plane, taps, height)
    t0, t1, t2, t3 = taps[0], taps[1], taps[2], taps[3]
    line = np.empty(narrow + 4, np.float32)
    for y in range(height):
        _pad_edge(tall[y], line)
        row = result[y]
        for x in range((width + 1) // 2):
            row[2 * x] = t0 * line[x] + t1 * line[x + 1] + t2 * line[x + 2] + t3 * line[x + 3]
        for x in range(width // 2):
            row[2 * x + 1] = t0 * line[x + 4] + t1 * line[x + 3] + t2 * line[x + 2] + t3 * line[x + 1]


@_compiled
def _double_backward(
    gradient: np.ndarray, plane: np.ndarray, taps: np.ndarray, to_plane: np.ndarray, grad_taps: np.ndarray
) -> None:
    """The gradient of `_double` by its result, added to those by plane and taps."""
    height, width = gradient.shape
    short, narrow = plane.shape
    tall = _tall(plane, taps, height)
    t0, t1, t2, t3 = taps[0], taps[1], taps[2], taps[3]
    line, to_line = np.empty(narrow + 4, np.float32), np.empty(narrow + 4, np.float32)
    even, odd = np.zeros(narrow, np.float32), np.zeros(narrow, np.float32)
    for y in range(height):
        _pad_edge(tall[y], line)
        row = gradient[y]
        for x in range((width + 1) // 2):
            even[x] = row[2 * x]
        for x in range(width // 2):
            odd[x] = row[2 * x + 1]
        grad_taps[0] += _dot(even, line[:narrow]) + _dot(odd, line[4:])
        grad_taps[1] += _dot(even, line[1 : narrow + 1]) + _dot(odd, line[3 : narrow + 3])
        grad_taps[2] += _dot(even, line[2 : narrow + 2]) + _dot(odd, line[2 : narrow + 2])
        grad_taps[3] += _dot(even, line[3 : narrow + 3]) + _dot(odd, line[1 : narrow + 1])
        to_line[:] = 0
        for x in range(narrow):
            to_line[x] += t0 * even[x]
        for x in range(narrow):
            to_line[x + 1] += t1 * even[x] + t3 * odd[x]
        for x in range(narrow):
            to_line[x + 2] += t2 * (even[x] + odd[x])
        for x in range(narrow):
            to_line[x + 3] += t3 * even[x] + t1 * odd[x]
        for x in range(narrow):
            to_line[x + 4] += t0 * odd[x]
        to_line[2] += to_line[0] + to_line[1]
        to_line[narrow + 1] += to_line[narrow + 2] + to_line[narrow + 3]
        for tap in range(4):
            place, weight = _neighbour(y, tap, short - 1), taps[tap]
            target, source = to_plane[place], plane[place]
            total = np.float32(0)
            for x in range(narrow):
                target[x] += weight * to_line[x + 2]
                total += to_line[x + 2] * source[x]
            grad_taps[tap] += total


@_compiled
def _plane(between: np.ndarray, level: int, sizes: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """That of a level between the finest and a plane's own, or its own."""
    return between[ends[level - 1] - ends[0] : ends[level] - ends[0]].reshape((sizes[level, 0], sizes[level, 1]))


@_compiled
def _upsample(
    first_task: int,
    last_task: int,
    packed: np.ndarray,
    taps: np.ndarray,
    between: np.ndarray,
    outputs: np.ndarray,
    places: np.ndarray,
    sizes: np.ndarray,
    ends: np.ndarray,
) -> None:
    count = len(places)
    margin = packed.shape[2] - outputs.shape[3]
    for task in range(first_task, last_task):
        b, p = task // count, task % count
        level, top = places[p]
        height, width = sizes[level]
        grid = packed[b, top : top + height, margin : margin + width]
        if level == 0:
            outputs[b, p] = grid
            continue
        plane = _plane(between[b, p], level, sizes, ends)
        plane[:] = grid
        for finer in range(level - 1, 0, -1):
            wide = _plane(between[b, p], finer, sizes, ends)
            _double(plane, taps[b, finer], wide)
            plane = wide
        _double(plane, taps[b, 0], outputs[b, p])


@_compiled
def _upsample_backward(
    first_task: int,
    last_task: int,
    gradient: np.ndarray,
    taps: np.ndarray,
    between: np.ndarray,
    grad_packed: np.ndarray,
    grad_taps: np.ndarray,
    places: np.ndarray,
    sizes: np.ndarray,
    ends: np.ndarray,
) -> None:
    count = len(places)
    margin = grad_packed.shape[2] - gradient.shape[3]
    for task in range(first_task, last_task):
        b, p = task // count, task % count
        level, top = places[p]
        height, width = sizes[level]
        own = gradient[b, p]
        for coarser in range(1, level + 1):
            plane = _plane(between[b, p], coarser, sizes, ends)
            to_plane = np.zeros(plane.shape, np.float32)
            _double_backward(own, plane, taps[b, coarser - 1], to_plane, grad_taps[b, p, coarser - 1])
            own = to_plane
        grad_packed[b, top : top + height, margin : margin + width] += own
