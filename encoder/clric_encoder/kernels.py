"""The costly parts of a training step, ARM, upsampling and convolutions, as compiled loops for CPUs.

The same results as the torch code in `function`, in half of its time and less: a block of grid values goes through
all layers and back while it is in the processor's first caches, where torch writes every intermediate value to memory.
numba compiles these functions at their first use on a machine, and keeps the result beside them or in the user's cache.

Arrays and tensors are of float32 where nothing else is said.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import njit

# Values of a block, about: with its activations it fits the second cache of a core.
_BLOCK = 1024

# Multiply-accumulates for which it pays to wake a thread.
_LEAST_WORK = 3_000_000

_LOG2_E = np.float32(1 / math.log(2))
_LN_2 = np.float32(math.log(2))

# The compiler turns a loop into vector instructions if it has to make sure of no more than eight pairs of arrays, one
# of them written to, that they do not overlap. Loops are kept below that, and a number without a type (float64) away.


def _compiled(function: Callable[..., Any]) -> Any:
    options: dict[str, Any] = {"fastmath": True, "nogil": True}
    try:
        return njit(function, cache=True, **options)
    except RuntimeError:  # no folder to keep the result in can be written to
        return njit(function, **options)


class ArmBits:
    """Bits of a part of a canvas by an ARM, and their gradients; begun here, and waited for where asked for.

    flat: (batch, n) a flattened canvas. mask: (n,). span: the part, whole rows. distances: how far back in the canvas
    each input stands. scales: (batch, rows), added to the logarithm of the scale. weights, biases: (batch, all
    layers'), a layer's weights (outputs, inputs). sizes: widths from the inputs to the two outputs. limits: largest
    context and activation, range of the logarithm of the scale, smallest probability. prices: (batch,), what gradients
    are multiplied by; None where they are not wanted.
    """

    def __init__(
        self,
        flat: torch.Tensor,
        mask: torch.Tensor,
        span: slice,
        distances: Sequence[int],
        scales: torch.Tensor,
        weights: torch.Tensor,
        biases: torch.Tensor,
        sizes: Sequence[int],
        limits: Sequence[float],
        prices: torch.Tensor | None,
    ) -> None:
        batch, count = len(flat), span.stop - span.start
        stride = count // scales.shape[1]
        block = max(1, _BLOCK // stride) * stride
        blocks = -(-count // block)
        self._bits = torch.empty(batch, blocks)
        wanted = 0 if prices is None else batch
        self._by_mean, self._by_inputs = torch.empty(wanted, count), torch.empty(wanted, len(distances), count)
        self._by_scales = torch.empty(wanted, scales.shape[1])
        self._by_weights = torch.empty(wanted, blocks, weights.shape[1])
        self._by_biases = torch.empty(wanted, blocks, biases.shape[1])
        self._flat, self._span = flat, span
        self._distances, self._limits = np.array(distances, np.int64), np.array(limits, np.float32)
        self._work = batch * count * weights.shape[1]
        arrays = _arrays(flat, mask, scales, weights, biases, torch.empty(0) if prices is None else prices)
        arrays += _arrays(self._bits, self._by_mean, self._by_inputs, self._by_scales)
        arrays += _arrays(self._by_weights, self._by_biases)
        places = (self._distances, np.array(sizes), self._limits, span.start, count, stride, block)
        if prices is None:  # the bits are asked for at once
            _spread(_arm_bits, batch * blocks, self._work, *arrays, *places)
            self._wait = _nothing
        else:
            self._wait = _start(_arm_bits, batch * blocks, self._work, *arrays, *places)

    @property
    def bits(self) -> torch.Tensor:
        """(batch,)."""
        self._wait()
        return self._bits.sum(1)

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """By scales, weights and biases."""
        self._wait()
        return self._by_scales, self._by_weights.sum(1), self._by_biases.sum(1)

    def add_to(self, to_flat: torch.Tensor) -> None:
        """Adds the gradients by the values of the canvas, themselves and as neighbours."""
        self._wait()
        parts = -(-to_flat.shape[1] // _BLOCK)
        arrays = _arrays(self._by_mean, self._by_inputs, self._flat, to_flat)
        places = (self._distances, self._span.start, self._limits[0])
        _spread(_scatter, len(to_flat) * parts, self._work, *arrays, *places)


def convolve(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A convolution of 3x3 at the edges of which the outermost values go on.

    inputs (batch, in, h, w), weight (batch, out, in, 3, 3), bias (batch, out) -> (batch, out, h, w).
    """
    outputs = torch.empty(*weight.shape[:2], *inputs.shape[2:])
    bands = _bands(inputs)
    work = weight.numel() * inputs[0, 0].numel()
    _spread(_convolve, len(inputs) * bands, work, *_arrays(inputs, weight.flatten(3), bias, outputs), bands)
    return outputs


def convolve_backward(
    gradient: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient of `convolve` by its outputs -> by inputs, weight and bias."""
    batch, outputs, channels = weight.shape[:3]
    bands = _bands(inputs)
    to_inputs = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    to_weight, to_bias = torch.empty(batch, bands, outputs * channels * 9), torch.empty(batch, bands, outputs)
    work = 2 * weight.numel() * inputs[0, 0].numel()
    arrays = _arrays(gradient, inputs, weight.flatten(3), to_inputs, to_weight, to_bias)
    _spread(_convolve_backward, batch * bands, work, *arrays, bands)
    return to_inputs, to_weight.sum(1).view_as(weight), to_bias.sum(1)


def _bands(planes: torch.Tensor) -> int:
    """How many bands of rows planes (batch, channels, h, w) are worked on in, none of them empty."""
    height, width = planes.shape[2:]
    rows = min(height, max(1, _BLOCK // (width + 2)))
    rows = -(-height // -(-height // rows))
    return -(-height // rows)


class Upsampled:
    """All planes of a canvas (batch, rows, stride) at the size of the finest, (batch, planes, h, w).

    taps: (batch, levels - 1, 4), those of the doubling to each level. places: (planes, 2) int64, the level and the
    first row of each. sizes: (levels, 2) int64.
    """

    def __init__(self, canvas: torch.Tensor, taps: torch.Tensor, places: np.ndarray, sizes: np.ndarray) -> None:
        # What each level's plane becomes on its way to the finest: the levels between lie behind each other
        ends = np.cumsum(sizes.prod(1))
        self._geometry = (places, sizes, ends - sizes.prod(1) - ends[0])
        self._taps, self._between = taps, torch.empty(len(canvas), len(places), int(ends[-1] - ends[0]))
        self.outputs = torch.empty(len(canvas), len(places), *map(int, sizes[0]))
        self._tasks, self._work = len(canvas) * len(places), 8 * self.outputs.numel()
        _spread(
            _upsample, self._tasks, self._work, *_arrays(canvas, taps, self._between, self.outputs), *self._geometry
        )

    def backward(self, gradient: torch.Tensor, to_canvas: torch.Tensor) -> torch.Tensor:
        """Of the outputs -> of taps; that of the canvas is added to `to_canvas`."""
        to_taps = torch.zeros(*gradient.shape[:2], *self._taps.shape[1:])
        arrays = _arrays(gradient, self._taps, self._between, to_canvas, to_taps)
        _spread(_upsample_backward, self._tasks, 3 * self._work, *arrays, *self._geometry)
        return to_taps.sum(1)


def _arrays(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [tensor.contiguous().numpy() for tensor in tensors]


_pools: list[ThreadPoolExecutor] = []
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_pools.clear)  # a child has none of its parent's threads

_threads = threading.local()


@contextlib.contextmanager
def without_torch_threads() -> Iterator[None]:
    """Keeps torch to one thread, and those that this one starts to one each, while it lasts.

    Between torch's operations its threads wait in a busy loop; and tensors of this size are too small for them.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


@contextlib.contextmanager
def own_threads(count: int) -> Iterator[None]:
    """Gives so many threads to the loops that are called from this one while it lasts."""
    _threads.free = count
    try:
        yield
    finally:
        del _threads.free


def _nothing() -> None:
    pass


def _start(function: Any, tasks: int, work: int, *arguments: Any) -> Callable[[], None]:
    """Begins function(first, last, *arguments) for all tasks on half of the free threads; what it gives waits.

    Where there is but one thread, or too little work for another one, all is done at once.
    """
    threads = min(getattr(_threads, "free", 1) // 2, tasks, work // _LEAST_WORK)
    if threads == 0:
        function(0, tasks, *arguments)
        return _nothing
    _threads.free -= threads
    futures = _submit(function, tasks, threads, 0, arguments)

    def wait() -> None:
        if futures:
            for future in futures:
                future.result()
            futures.clear()
            _threads.free += threads

    return wait


def _spread(function: Any, tasks: int, work: int, *arguments: Any) -> None:
    """Calls function(first, last, *arguments) for all tasks, on as many threads as are free and the work is worth."""
    threads = min(getattr(_threads, "free", 1), tasks, 1 + work // _LEAST_WORK)
    futures = _submit(function, tasks, threads, 1, arguments)
    function(0, tasks // threads, *arguments)
    for future in futures:
        future.result()


def _submit(function: Any, tasks: int, parts: int, first: int, arguments: tuple[Any, ...]) -> list[Future[None]]:
    if first < parts and not _pools:
        _pools.append(ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="clric"))
    bounds = [tasks * i // parts for i in range(parts + 1)]
    return [_pools[0].submit(function, bounds[i], bounds[i + 1], *arguments) for i in range(first, parts)]


@_compiled
def _exp2(values: np.ndarray, scratch: np.ndarray) -> None:
    """2^x in place, for x in [-126, 126]: 1e-7 of the result off at most. scratch: int32 of the same length."""
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
def _sum_of_log2(values: np.ndarray, mask: np.ndarray) -> np.floating:
    """The sum of mask * log2(x) for positive, normal x, each 1e-7 off at most."""
    # x = 2^e * m with m in [sqrt(1/2), sqrt(2)), and log(m) = 2 artanh((m - 1) / (m + 1))
    whole, mantissas = values.view(np.int32), np.empty(len(values), np.int32)
    total = np.float32(0)
    for i in range(len(values)):
        exponent = (whole[i] - np.int32(0x3F3504F3)) >> np.int32(23)
        mantissas[i] = whole[i] - (exponent << np.int32(23))
        total += mask[i] * np.float32(exponent)
    m = mantissas.view(np.float32)
    for i in range(len(values)):
        s = (m[i] - np.float32(1)) / (m[i] + np.float32(1))
        q = s * s
        y = np.float32(1 / 7) + q * np.float32(1 / 9)
        y = np.float32(1 / 5) + q * y
        y = np.float32(1 / 3) + q * y
        y = np.float32(1) + q * y
        total += mask[i] * (np.float32(2) * _LOG2_E * s * y)
    return total


@_compiled
def _weigh(out: np.ndarray, bias: np.floating, weights: np.ndarray, first: int, step: int, rows: np.ndarray) -> None:
    """out = bias + sum over k of weights[first + k * step] * rows[k]."""
    k = 0
    if len(rows) >= 8:
        a, b, c, d = weights[first], weights[first + step], weights[first + 2 * step], weights[first + 3 * step]
        first += 4 * step
        e, f, g, h = weights[first], weights[first + step], weights[first + 2 * step], weights[first + 3 * step]
        first += 4 * step
        row_a, row_b, row_c, row_d = rows[0], rows[1], rows[2], rows[3]
        row_e, row_f, row_g, row_h = rows[4], rows[5], rows[6], rows[7]
        for i in range(len(out)):
            left = a * row_a[i] + b * row_b[i] + c * row_c[i] + d * row_d[i]
            out[i] = bias + left + (e * row_e[i] + f * row_f[i] + g * row_g[i] + h * row_h[i])
        k = 8
    elif len(rows) >= 2:
        a, b, row_a, row_b = weights[first], weights[first + step], rows[0], rows[1]
        first += 2 * step
        for i in range(len(out)):
            out[i] = bias + a * row_a[i] + b * row_b[i]
        k = 2
    else:
        out[:] = bias
    while k < len(rows):
        a, row_a = weights[first], rows[k]
        first += step
        for i in range(len(out)):
            out[i] += a * row_a[i]
        k += 1


@_compiled
def _dot(a: np.ndarray, b: np.ndarray) -> np.floating:
    total = np.float32(0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@_compiled
def _dots(above: np.ndarray, below: np.ndarray, result: np.ndarray, first: int) -> None:
    """result[first + j * len(below) + k] = sum over i of above[j, i] * below[k, i]."""
    whole, count = len(above) // 2 * 2, len(below) // 4 * 4
    for j in range(0, whole, 2):
        a, b = above[j], above[j + 1]
        for k in range(0, count, 4):
            row_p, row_q, row_r, row_s = below[k], below[k + 1], below[k + 2], below[k + 3]
            ap = aq = ar = as_ = bp = bq = br = bs = np.float32(0)
            for i in range(len(a)):
                x, y = a[i], b[i]
                p, q, r, s = row_p[i], row_q[i], row_r[i], row_s[i]
                ap += x * p
                aq += x * q
                ar += x * r
                as_ += x * s
                bp += y * p
                bq += y * q
                br += y * r
                bs += y * s
            place = first + j * len(below) + k
            result[place], result[place + 1], result[place + 2], result[place + 3] = ap, aq, ar, as_
            place += len(below)
            result[place], result[place + 1], result[place + 2], result[place + 3] = bp, bq, br, bs
    for j in range(len(above)):
        for k in range(count if j < whole else 0, len(below)):
            result[first + j * len(below) + k] = _dot(above[j], below[k])


@_compiled
def _arm_bits(
    first_task: int,
    last_task: int,
    flat: np.ndarray,
    mask: np.ndarray,
    scales: np.ndarray,
    weights: np.ndarray,
    biases: np.ndarray,
    prices: np.ndarray,
    bits: np.ndarray,
    by_mean: np.ndarray,
    by_inputs: np.ndarray,
    by_scales: np.ndarray,
    by_weights: np.ndarray,
    by_biases: np.ndarray,
    distances: np.ndarray,
    sizes: np.ndarray,
    limits: np.ndarray,
    origin: int,
    count: int,
    stride: int,
    block: int,
) -> None:
    blocks, layers = bits.shape[1], len(sizes) - 1
    height = sizes.sum()
    widest, largest, low, high, least = limits[0], limits[1], limits[2], limits[3], limits[4]
    for task in range(first_task, last_task):
        b, c = task // blocks, task % blocks
        start, stop = c * block, min(count, (c + 1) * block)
        n = stop - start
        activations = np.empty((height, n), np.float32)
        for k in range(sizes[0]):
            inputs_row = activations[k]
            place = origin + start + distances[k]
            before = min(max(-place, 0), n)  # beyond the canvas's beginning there are zeros
            inputs_row[:before] = 0
            source = flat[b, place + before : place + n]
            for i in range(n - before):
                inputs_row[before + i] = min(max(source[i], -widest), widest)
        at, w, v = 0, 0, 0
        for layer in range(layers):
            inputs, outputs = sizes[layer], sizes[layer + 1]
            for j in range(outputs):
                row = activations[at + inputs + j]
                _weigh(row, biases[b, v + j], weights[b], w + j * inputs, 1, activations[at : at + inputs])
                if layer < layers - 1:
                    for i in range(n):
                        row[i] = min(max(row[i], np.float32(0)), largest)
            at, w, v = at + inputs, w + inputs * outputs, v + outputs

        # Laplace, as in clric_encoder.function
        mean, log_scale = activations[at], activations[at + 1]
        scratch = np.empty(n, np.int32)
        rate = np.empty(n, np.float32)
        inner = np.empty(n, np.float32)
        near = np.empty(n, np.float32)
        far = np.empty(n, np.float32)
        probability = np.empty(n, np.float32)
        values, own = flat[b, origin + start : origin + stop], mask[origin + start : origin + stop]
        for r in range(n // stride):
            shift = scales[b, start // stride + r]
            for i in range(r * stride, (r + 1) * stride):
                log_scale[i] += shift
        for i in range(n):
            rate[i] = -min(max(log_scale[i], low), high)
        _exp2(rate, scratch)
        for i in range(n):
            inner[i] = np.float32(0.5) - abs(values[i] - mean[i])
        for i in range(n):
            near[i] = -abs(inner[i]) * rate[i] * _LOG2_E
        for i in range(n):
            far[i] = (inner[i] - np.float32(1)) * rate[i] * _LOG2_E
        _exp2(near, scratch)
        _exp2(far, scratch)
        for i in range(n):
            other = np.float32(1) - near[i]
            both = np.float32(1) - far[i] + (other if inner[i] > 0 else -other)
            probability[i] = max(np.float32(0.5) * both, least)
        bits[b, c] = -_sum_of_log2(probability, own)
        if not len(prices):
            continue

        gradients = np.empty((height, n), np.float32)
        to_mean, to_scale = gradients[at], gradients[at + 1]
        price = np.float32(-0.5) * _LOG2_E * prices[b]
        for i in range(n):
            slope = price * own[i] * rate[i] / probability[i]
            rate[i] = slope if probability[i] > least else np.float32(0)
        for i in range(n):
            side = rate[i] if values[i] > mean[i] else -rate[i]
            to_mean[i] = (near[i] - far[i]) * side
        for i in range(n):
            by = (inner[i] * near[i] + (np.float32(1) - inner[i]) * far[i]) * rate[i] * -_LN_2
            to_scale[i] = by if low < log_scale[i] < high else np.float32(0)
        by_mean[b, start:stop] = to_mean
        for r in range(n // stride):
            by_scales[b, start // stride + r] = to_scale[r * stride : (r + 1) * stride].sum()
        for layer in range(layers - 1, -1, -1):
            inputs, outputs = sizes[layer], sizes[layer + 1]
            at, w, v = at - inputs, w - inputs * outputs, v - outputs
            above = gradients[at + inputs : at + inputs + outputs]
            _dots(above, activations[at : at + inputs], by_weights[b, c], w)
            for j in range(outputs):
                by_biases[b, c, v + j] = above[j].sum()
            for k in range(inputs):
                below = gradients[at + k] if layer else by_inputs[b, k, start:stop]
                _weigh(below, np.float32(0), weights[b], w + k, inputs, above)
                if layer:
                    row = activations[at + k]
                    for i in range(n):
                        below[i] = below[i] if np.float32(0) < row[i] < largest else np.float32(0)


@_compiled
def _scatter(
    first_task: int,
    last_task: int,
    by_mean: np.ndarray,
    by_inputs: np.ndarray,
    flat: np.ndarray,
    to_flat: np.ndarray,
    distances: np.ndarray,
    origin: int,
    widest: np.floating,
) -> None:
    """Gradients by inputs, added where the inputs stand, and that by the mean, taken from the value's own."""
    count, size = by_mean.shape[1], to_flat.shape[1]
    parts = (size + _BLOCK - 1) // _BLOCK
    sums = np.empty(_BLOCK, np.float32)
    for task in range(first_task, last_task):
        b, start = task // parts, task % parts * _BLOCK
        stop = min(size, start + _BLOCK)
        sums[:] = 0
        for k in range(len(distances)):
            # Values whose k-th input lies in this part
            shift = origin + distances[k]
            first, last = max(0, start - shift), min(count, stop - shift)
            if first < last:
                target, source = sums[shift + first - start : shift + last - start], by_inputs[b, k, first:last]
                for i in range(last - first):
                    target[i] += source[i]
        values, result = flat[b, start:stop], to_flat[b, start:stop]
        for i in range(stop - start):
            result[i] += sums[i] if -widest < values[i] < widest else np.float32(0)
        first, last = max(0, start - origin), min(count, stop - origin)
        if first < last:
            result, source = to_flat[b, origin + first : origin + last], by_mean[b, first:last]
            for i in range(last - first):
                result[i] -= source[i]


@_compiled
def _lines(plane: np.ndarray, top: int, bottom: int, lines: np.ndarray) -> None:
    """Rows top - 1 to bottom of a plane and a column more at each side, flat; the outermost values go on."""
    height, width = plane.shape
    stride = width + 2
    for y in range(top - 1, bottom + 1):
        start = (y - top + 1) * stride
        source = plane[min(max(y, 0), height - 1)]
        lines[start + 1 : start + 1 + width] = source
        lines[start] = source[0]
        lines[start + 1 + width] = source[width - 1]


@_compiled
def _add_neighbours(
    first: np.ndarray, second: np.ndarray, a: np.ndarray, b: np.ndarray, lines: np.ndarray, stride: int
) -> None:
    """Adds 3x3 neighbours, in lines a stride apart: to the first weighted by a, to the second weighted by b."""
    n = len(first)
    for s in range(0, 9, 3):
        start = s // 3 * stride
        u, v, w = lines[start : start + n], lines[start + 1 : start + 1 + n], lines[start + 2 : start + 2 + n]
        ax, ay, az, bx, by, bz = a[s], a[s + 1], a[s + 2], b[s], b[s + 1], b[s + 2]
        for i in range(n):
            first[i] += ax * u[i] + ay * v[i] + az * w[i]
            second[i] += bx * u[i] + by * v[i] + bz * w[i]


@_compiled
def _convolve(
    first_task: int,
    last_task: int,
    inputs: np.ndarray,
    weights: np.ndarray,
    biases: np.ndarray,
    result: np.ndarray,
    bands: int,
) -> None:
    channels, height, width = inputs.shape[1:]
    outputs = result.shape[1]
    stride, rows = width + 2, -(-height // bands)
    lines = np.zeros((channels, (rows + 2) * stride + 2), np.float32)
    sums = np.empty((outputs + 1, rows * stride), np.float32)  # the last one is nobody's, for an odd number of them
    for task in range(first_task, last_task):
        b, top = task // bands, task % bands * rows
        bottom = min(top + rows, height)
        for c in range(channels):
            _lines(inputs[b, c], top, bottom, lines[c])
        for o in range(0, outputs, 2):
            sums[o], sums[o + 1] = biases[b, o], biases[b, min(o + 1, outputs - 1)]
            for c in range(channels):
                other = weights[b, min(o + 1, outputs - 1), c]
                _add_neighbours(sums[o], sums[o + 1], weights[b, o, c], other, lines[c], stride)
        for o in range(outputs):
            for y in range(top, bottom):
                start = (y - top) * stride
                result[b, o, y] = sums[o, start : start + width]


@_compiled
def _convolve_backward(
    first_task: int,
    last_task: int,
    gradient: np.ndarray,
    inputs: np.ndarray,
    weights: np.ndarray,
    to_inputs: np.ndarray,
    to_weights: np.ndarray,
    to_biases: np.ndarray,
    bands: int,
) -> None:
    channels, height, width = inputs.shape[1:]
    outputs = gradient.shape[1]
    stride, rows = width + 2, -(-height // bands)
    lines = np.zeros((channels, (rows + 2) * stride + 2), np.float32)
    # The outputs' gradients of a band and of two rows and columns more around it, zero outside of the plane
    wide = width + 4
    around = np.zeros((outputs, (rows + 4) * wide + 2), np.float32)
    own = np.zeros((outputs, rows * stride), np.float32)
    sums = np.empty((channels + 1, (rows + 2) * wide), np.float32)
    backwards = np.empty((channels, outputs, 9), np.float32)
    for task in range(first_task, last_task):
        b, band = task // bands, task % bands
        top = band * rows
        bottom = min(top + rows, height)
        for c in range(channels):
            _lines(inputs[b, c], top, bottom, lines[c])
        around[:] = 0
        own[:] = 0
        for o in range(outputs):
            for y in range(max(top - 2, 0), min(bottom + 2, height)):
                start = (y - top + 2) * wide + 2
                around[o, start : start + width] = gradient[b, o, y]
            for y in range(top, bottom):
                own[o, (y - top) * stride : (y - top) * stride + width] = gradient[b, o, y]
            to_biases[b, band, o] = own[o].sum()
        _dots_of_neighbours(own, lines, to_weights[b, band], stride)

        # What padded inputs give to the outputs around them: padded rows top - 1 to bottom, of which those beyond the
        # plane's edges belong to its outermost rows
        for c in range(channels):
            for o in range(outputs):
                for s in range(9):
                    backwards[c, o, s] = weights[b, o, c, 8 - s]
        sums[:] = 0
        for c in range(0, channels, 2):
            for o in range(outputs):
                other = backwards[min(c + 1, channels - 1), o]
                _add_neighbours(sums[c], sums[c + 1], backwards[c, o], other, around[o], wide)
        for c in range(channels):
            to_inputs[b, c, top:bottom] = 0
            first = top - 1 if top == 0 else top
            last = bottom + 1 if bottom == height else bottom
            for y in range(first, last):
                start = (y - top + 1) * wide
                source, target = sums[c, start : start + width + 2], to_inputs[b, c, min(max(y, 0), height - 1)]
                for x in range(width):
                    target[x] += source[x + 1]
                target[0] += source[0]
                target[width - 1] += source[width + 1]


@_compiled
def _dots_of_neighbours(own: np.ndarray, lines: np.ndarray, result: np.ndarray, stride: int) -> None:
    """result[(o * len(lines) + c) * 9 + s] = the sum of own[o] times lines[c] from the s-th of 3x3 places on."""
    outputs, n = own.shape
    channels = len(lines)
    for o in range(0, outputs, 2):
        a, b = own[o], own[min(o + 1, outputs - 1)]
        for c in range(channels):
            for s in range(0, 9, 3):
                start = s // 3 * stride
                row_u, row_v = lines[c, start : start + n], lines[c, start + 1 : start + 1 + n]
                row_w = lines[c, start + 2 : start + 2 + n]
                au = av = aw = bu = bv = bw = np.float32(0)
                for i in range(n):
                    x, y, u, v, w = a[i], b[i], row_u[i], row_v[i], row_w[i]
                    au += x * u
                    av += x * v
                    aw += x * w
                    bu += y * u
                    bv += y * v
                    bw += y * w
                place = (o * channels + c) * 9 + s
                result[place], result[place + 1], result[place + 2] = au, av, aw
                if o + 1 < outputs:
                    place += channels * 9
                    result[place], result[place + 1], result[place + 2] = bu, bv, bw


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
def _continue(row: np.ndarray, line: np.ndarray) -> None:
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
        _continue(tall[y], line)
        row = result[y]
        for x in range((width + 1) // 2):
            row[2 * x] = t0 * line[x] + t1 * line[x + 1] + t2 * line[x + 2] + t3 * line[x + 3]
        for x in range(width // 2):
            row[2 * x + 1] = t0 * line[x + 4] + t1 * line[x + 3] + t2 * line[x + 2] + t3 * line[x + 1]


@_compiled
def _double_backward(
    gradient: np.ndarray, plane: np.ndarray, taps: np.ndarray, to_plane: np.ndarray, to_taps: np.ndarray
) -> None:
    """The gradient of `_double` by its result, added to those by plane and taps."""
    height, width = gradient.shape
    short, narrow = plane.shape
    tall = _tall(plane, taps, height)
    t0, t1, t2, t3 = taps[0], taps[1], taps[2], taps[3]
    line, to_line = np.empty(narrow + 4, np.float32), np.empty(narrow + 4, np.float32)
    even, odd = np.zeros(narrow, np.float32), np.zeros(narrow, np.float32)
    for y in range(height):
        _continue(tall[y], line)
        row = gradient[y]
        for x in range((width + 1) // 2):
            even[x] = row[2 * x]
        for x in range(width // 2):
            odd[x] = row[2 * x + 1]
        to_taps[0] += _dot(even, line[:narrow]) + _dot(odd, line[4:])
        to_taps[1] += _dot(even, line[1 : narrow + 1]) + _dot(odd, line[3 : narrow + 3])
        to_taps[2] += _dot(even, line[2 : narrow + 2]) + _dot(odd, line[2 : narrow + 2])
        to_taps[3] += _dot(even, line[3 : narrow + 3]) + _dot(odd, line[1 : narrow + 1])
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
            to_taps[tap] += total


@_compiled
def _plane(between: np.ndarray, level: int, sizes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    height, width = sizes[level]
    return between[offsets[level] : offsets[level] + height * width].reshape((height, width))


@_compiled
def _upsample(
    first_task: int,
    last_task: int,
    canvas: np.ndarray,
    taps: np.ndarray,
    between: np.ndarray,
    outputs: np.ndarray,
    places: np.ndarray,
    sizes: np.ndarray,
    offsets: np.ndarray,
) -> None:
    count = len(places)
    margin = canvas.shape[2] - outputs.shape[3]
    for task in range(first_task, last_task):
        b, p = task // count, task % count
        level, top = places[p]
        height, width = sizes[level]
        grid = canvas[b, top : top + height, margin : margin + width]
        if level == 0:
            outputs[b, p] = grid
            continue
        plane = _plane(between[b, p], level, sizes, offsets)
        plane[:] = grid
        for finer in range(level - 1, 0, -1):
            wide = _plane(between[b, p], finer, sizes, offsets)
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
    to_canvas: np.ndarray,
    to_taps: np.ndarray,
    places: np.ndarray,
    sizes: np.ndarray,
    offsets: np.ndarray,
) -> None:
    count = len(places)
    margin = to_canvas.shape[2] - gradient.shape[3]
    for task in range(first_task, last_task):
        b, p = task // count, task % count
        level, top = places[p]
        height, width = sizes[level]
        own = gradient[b, p]
        for coarser in range(1, level + 1):
            plane = _plane(between[b, p], coarser, sizes, offsets)
            to_plane = np.zeros(plane.shape, np.float32)
            _double_backward(own, plane, taps[b, coarser - 1], to_plane, to_taps[b, p, coarser - 1])
            own = to_plane
        to_canvas[b, top : top + height, margin : margin + width] += own
