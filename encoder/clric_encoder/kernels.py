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
from concurrent.futures import ThreadPoolExecutor
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


def _compiled(function: Callable[..., Any]) -> Any:
    options: dict[str, Any] = {"fastmath": True, "nogil": True}
    try:
        return njit(function, cache=True, **options)
    except RuntimeError:  # no folder to keep the result in can be written to
        return njit(function, **options)


def arm_bits(
    seen: torch.Tensor,
    flat: torch.Tensor,
    mask: torch.Tensor,
    places: Sequence[int],
    scales: torch.Tensor,
    weights: torch.Tensor,
    biases: torch.Tensor,
    sizes: Sequence[int],
    limits: Sequence[float],
    prices: torch.Tensor,
) -> list[torch.Tensor]:
    """Bits of rows of a canvas by an ARM, (batch,), and their gradients, those multiplied by `prices` (batch,).

    seen: (batch, n) what neighbours see. places: where in it each input of the first value stands. flat: (batch, rows *
    stride) the values. mask: (rows * stride,). scales: (batch, rows), added to the logarithm of the scale. weights,
    biases: (batch, all layers'), a layer's weights (outputs, inputs). sizes: widths from the inputs to the two outputs.
    limits: largest activation, range of the logarithm of the scale, smallest probability.
    The gradients are by the mean (batch, rows * stride), by what neighbours see, by scales, weights and biases.
    """
    batch, count = flat.shape
    stride = count // scales.shape[1]
    block = max(1, _BLOCK // stride) * stride
    blocks = -(-count // block)
    bits = torch.empty(batch, blocks)
    by_mean, by_scales, by_seen = torch.empty_like(flat), torch.empty_like(scales), torch.zeros_like(seen)
    by_inputs = torch.empty(batch, len(places), count)
    by_weights, by_biases = torch.empty(batch, blocks, weights.shape[1]), torch.empty(batch, blocks, biases.shape[1])
    where, limit = np.array(places), np.array(limits, np.float32)
    results = (bits, by_mean, by_inputs, by_scales, by_weights, by_biases)
    arrays = _arrays(seen, flat, mask, scales, weights, biases, prices, *results)
    work = batch * count * weights.shape[1]
    _spread(_arm_bits, batch * blocks, work, *arrays, where, np.array(sizes), limit, block)
    parts = -(-seen.shape[1] // _BLOCK)
    _spread(_scatter, batch * parts, work, *_arrays(by_inputs, by_seen), where)
    return [bits.sum(1), by_mean, by_seen, by_scales, by_weights.sum(1), by_biases.sum(1)]


def convolve(
    flat: torch.Tensor, shifts: Sequence[int], weight: torch.Tensor, bias: torch.Tensor, count: int
) -> torch.Tensor:
    """outputs[b, o, p] = bias[b, o] + sum over c and s of weight[b, o, c, s] * flat[b, c, p + shifts[s]].

    flat: (batch, in, n). shifts: a multiple of three. weight: (batch, out, in, shifts). Gives (batch, out, count).
    """
    outputs = torch.empty(*weight.shape[:2], count)
    tasks = len(flat) * -(-count // _BLOCK)
    _spread(_convolve, tasks, weight.numel() * count, *_arrays(flat, weight, bias, outputs), np.array(shifts))
    return outputs


def convolve_weights(flat: torch.Tensor, shifts: Sequence[int], gradient: torch.Tensor) -> torch.Tensor:
    """The gradient of `convolve` by its weight: that by its outputs (batch, out, count) -> (batch, out, in, shifts)."""
    (batch, channels, _), (_, outputs, count) = flat.shape, gradient.shape
    blocks = -(-count // _BLOCK)
    parts = torch.empty(batch, blocks, outputs, channels, len(shifts))
    work = parts[:, 0].numel() * count
    _spread(_convolve_weights, batch * blocks, work, *_arrays(flat, gradient, parts), np.array(shifts))
    return parts.sum(1)


def fold(padded: torch.Tensor, margin: int, width: int) -> torch.Tensor:
    """The gradient of padding with the outermost values: (batch, C, h + 2 margin, stride) -> (batch, C, h, width).

    Of each row the first width + 2 margin values count.
    """
    batch, channels, rows, _ = padded.shape
    result = torch.zeros(batch, channels, rows - 2 * margin, width)
    _spread(_fold, batch * channels, padded.numel(), *_arrays(padded, result), margin)
    return result


def double(inputs: torch.Tensor, taps: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """inputs (batch, C, h, w) upsampled by 2 with taps (batch, 4), cut to (batch, C, height, width)."""
    outputs = torch.empty(*inputs.shape[:2], height, width)
    _spread(_double, inputs.shape[:2].numel(), 16 * inputs.numel(), *_arrays(inputs, taps, outputs))
    return outputs


def double_backward(
    gradient: torch.Tensor, inputs: torch.Tensor, taps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of `double` by its outputs -> by inputs and taps."""
    to_inputs, to_taps = torch.zeros_like(inputs), torch.zeros(*inputs.shape[:2], 4)
    arrays = _arrays(gradient, inputs, taps, to_inputs, to_taps)
    _spread(_double_backward, inputs.shape[:2].numel(), 48 * inputs.numel(), *arrays)
    return to_inputs, to_taps.sum(1)


def _arrays(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [tensor.contiguous().numpy() for tensor in tensors]


_pools: list[ThreadPoolExecutor] = []
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_pools.clear)  # a child has none of its parent's threads

_threads = threading.local()


@contextlib.contextmanager
def own_threads() -> Iterator[None]:
    """Gives torch's threads to the loops here while it lasts.

    Between torch's operations its threads wait in a busy loop; and tensors of this size are too small for them.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    _threads.count = count
    try:
        yield
    finally:
        del _threads.count
        torch.set_num_threads(count)


def _spread(function: Any, tasks: int, work: int, *arguments: Any) -> None:
    """Calls function(first, last, *arguments) for all tasks, on as many threads as there are and the work is worth."""
    threads = min(getattr(_threads, "count", 1), tasks, 1 + work // _LEAST_WORK)
    if threads == 1:
        function(0, tasks, *arguments)
        return
    if not _pools:
        _pools.append(ThreadPoolExecutor(thread_name_prefix="clric"))
    bounds = [tasks * i // threads for i in range(threads + 1)]
    futures = [_pools[0].submit(function, bounds[i], bounds[i + 1], *arguments) for i in range(1, threads)]
    function(bounds[0], bounds[1], *arguments)
    for future in futures:
        future.result()


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
        total += mask[i] * (2 * _LOG2_E * s * y)
    return total


@_compiled
def _add_products(out: np.ndarray, weights: np.ndarray, first: int, step: int, rows: np.ndarray, count: int) -> None:
    """out += sum over k < count of weights[first + k * step] * rows[k]."""
    k = 0
    while k + 4 <= count:
        a, b = weights[first + k * step], weights[first + (k + 1) * step]
        c, d = weights[first + (k + 2) * step], weights[first + (k + 3) * step]
        row_a, row_b, row_c, row_d = rows[k], rows[k + 1], rows[k + 2], rows[k + 3]
        for i in range(len(out)):
            out[i] += a * row_a[i] + b * row_b[i] + c * row_c[i] + d * row_d[i]
        k += 4
    while k < count:
        a, row_a = weights[first + k * step], rows[k]
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
def _arm_bits(
    first_task: int,
    last_task: int,
    seen: np.ndarray,
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
    places: np.ndarray,
    sizes: np.ndarray,
    limits: np.ndarray,
    block: int,
) -> None:
    count, blocks = flat.shape[1], bits.shape[1]
    stride = count // scales.shape[1]
    layers = len(sizes) - 1
    height = sizes.sum()
    largest, low, high, least = limits[0], limits[1], limits[2], limits[3]
    for task in range(first_task, last_task):
        b, c = task // blocks, task % blocks
        start, stop = c * block, min(count, (c + 1) * block)
        n = stop - start
        activations = np.empty((height, n), np.float32)
        for k in range(sizes[0]):
            activations[k] = seen[b, places[k] + start : places[k] + stop]
        at, w, v = 0, 0, 0
        for layer in range(layers):
            inputs, outputs = sizes[layer], sizes[layer + 1]
            for j in range(outputs):
                row = activations[at + inputs + j]
                row[:] = biases[b, v + j]
                _add_products(row, weights[b], w + j * inputs, 1, activations[at : at + inputs], inputs)
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
        values, own = flat[b, start:stop], mask[start:stop]
        for r in range(n // stride):
            shift = scales[b, start // stride + r]
            for i in range(r * stride, (r + 1) * stride):
                log_scale[i] += shift
        for i in range(n):
            rate[i] = -min(max(log_scale[i], low), high)
        _exp2(rate, scratch)
        for i in range(n):
            distance = abs(values[i] - mean[i])
            inner[i] = np.float32(0.5) - distance
            near[i] = -abs(inner[i]) * rate[i] * _LOG2_E
            far[i] = -(np.float32(0.5) + distance) * rate[i] * _LOG2_E
        _exp2(near, scratch)
        _exp2(far, scratch)
        for i in range(n):
            other = np.float32(1) - near[i]
            both = np.float32(1) - far[i] + (other if inner[i] > 0 else -other)
            probability[i] = max(np.float32(0.5) * both, least)
        bits[b, c] = -_sum_of_log2(probability, own)

        gradients = np.empty((height, n), np.float32)
        to_mean, to_scale = gradients[at], gradients[at + 1]
        price = np.float32(-0.5) * _LOG2_E * prices[b]
        for i in range(n):
            slope = price * own[i] * rate[i] / probability[i]
            slope = slope if probability[i] > least else np.float32(0)
            side = np.float32(1) if values[i] > mean[i] else np.float32(-1)
            to_mean[i] = (near[i] - far[i]) * side * slope
            outer = np.float32(1) - inner[i]
            by = (inner[i] * near[i] + outer * far[i]) * slope * -_LN_2
            to_scale[i] = by if low < log_scale[i] < high else np.float32(0)
        by_mean[b, start:stop] = to_mean
        for r in range(n // stride):
            by_scales[b, start // stride + r] = to_scale[r * stride : (r + 1) * stride].sum()
        for layer in range(layers - 1, -1, -1):
            inputs, outputs = sizes[layer], sizes[layer + 1]
            at, w, v = at - inputs, w - inputs * outputs, v - outputs
            for j in range(outputs):
                above = gradients[at + inputs + j]
                by_biases[b, c, v + j] = above.sum()
                for k in range(inputs):
                    by_weights[b, c, w + j * inputs + k] = _dot(above, activations[at + k])
            for k in range(inputs):
                below = gradients[at + k]
                below[:] = 0
                _add_products(below, weights[b], w + k, inputs, gradients[at + inputs : at + inputs + outputs], outputs)
                if layer:
                    row = activations[at + k]
                    for i in range(n):
                        below[i] = below[i] if np.float32(0) < row[i] < largest else np.float32(0)
        by_inputs[b, :, start:stop] = gradients[: sizes[0]]


@_compiled
def _scatter(first_task: int, last_task: int, by_inputs: np.ndarray, by_seen: np.ndarray, places: np.ndarray) -> None:
    """Gradients by inputs, added where the inputs stand."""
    count, size = by_inputs.shape[2], by_seen.shape[1]
    parts = (size + _BLOCK - 1) // _BLOCK
    for task in range(first_task, last_task):
        b, start = task // parts, task % parts * _BLOCK
        for k in range(len(places)):
            # Values whose k-th input lies in this part
            first = max(0, start - places[k])
            last = min(count, min(size, start + _BLOCK) - places[k])
            if first < last:
                target, source = by_seen[b, places[k] + first : places[k] + last], by_inputs[b, k, first:last]
                for i in range(last - first):
                    target[i] += source[i]


@_compiled
def _convolve(
    first_task: int,
    last_task: int,
    flat: np.ndarray,
    weights: np.ndarray,
    biases: np.ndarray,
    result: np.ndarray,
    shifts: np.ndarray,
) -> None:
    channels = flat.shape[1]
    _, outputs, count = result.shape
    blocks = (count + _BLOCK - 1) // _BLOCK
    for task in range(first_task, last_task):
        b, start = task // blocks, task % blocks * _BLOCK
        n = min(count, start + _BLOCK) - start
        for o in range(outputs):
            row = result[b, o, start : start + n]
            row[:] = biases[b, o]
            for c in range(channels):
                source, weight = flat[b, c], weights[b, o, c]
                for s in range(0, len(shifts), 3):
                    x, y, z = weight[s], weight[s + 1], weight[s + 2]
                    first, second, third = start + shifts[s], start + shifts[s + 1], start + shifts[s + 2]
                    u, v, w = source[first : first + n], source[second : second + n], source[third : third + n]
                    for i in range(n):
                        row[i] += x * u[i] + y * v[i] + z * w[i]


@_compiled
def _convolve_weights(
    first_task: int, last_task: int, flat: np.ndarray, gradient: np.ndarray, parts: np.ndarray, shifts: np.ndarray
) -> None:
    channels = flat.shape[1]
    _, outputs, count = gradient.shape
    blocks = parts.shape[1]
    for task in range(first_task, last_task):
        b, block = task // blocks, task % blocks
        start, stop = block * _BLOCK, min(count, block * _BLOCK + _BLOCK)
        for o in range(outputs):
            own = gradient[b, o, start:stop]
            for c in range(channels):
                for s in range(len(shifts)):
                    parts[b, block, o, c, s] = _dot(own, flat[b, c, start + shifts[s] : stop + shifts[s]])


@_compiled
def _fold(first_task: int, last_task: int, padded: np.ndarray, result: np.ndarray, margin: int) -> None:
    _, channels, rows, _ = padded.shape
    height, width = result.shape[2:]
    for task in range(first_task, last_task):
        b, c = task // channels, task % channels
        for y in range(rows):
            source, target = padded[b, c, y], result[b, c, min(max(y - margin, 0), height - 1)]
            for x in range(width):
                target[x] += source[margin + x]
            for x in range(margin):
                target[0] += source[x]
                target[width - 1] += source[margin + width + x]


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
def _double(first_task: int, last_task: int, inputs: np.ndarray, taps: np.ndarray, result: np.ndarray) -> None:
    _, channels, _, narrow = inputs.shape
    height, width = result.shape[2:]
    for task in range(first_task, last_task):
        b, c = task // channels, task % channels
        tall = _tall(inputs[b, c], taps[b], height)
        t0, t1, t2, t3 = taps[b, 0], taps[b, 1], taps[b, 2], taps[b, 3]
        line = np.empty(narrow + 4, np.float32)
        for y in range(height):
            _continue(tall[y], line)
            row = result[b, c, y]
            for x in range((width + 1) // 2):
                row[2 * x] = t0 * line[x] + t1 * line[x + 1] + t2 * line[x + 2] + t3 * line[x + 3]
            for x in range(width // 2):
                row[2 * x + 1] = t0 * line[x + 4] + t1 * line[x + 3] + t2 * line[x + 2] + t3 * line[x + 1]


@_compiled
def _double_backward(
    first_task: int,
    last_task: int,
    gradient: np.ndarray,
    inputs: np.ndarray,
    taps: np.ndarray,
    to_inputs: np.ndarray,
    to_taps: np.ndarray,
) -> None:
    _, channels, short, narrow = inputs.shape
    height, width = gradient.shape[2:]
    for task in range(first_task, last_task):
        b, c = task // channels, task % channels
        tall = _tall(inputs[b, c], taps[b], height)
        t0, t1, t2, t3 = taps[b, 0], taps[b, 1], taps[b, 2], taps[b, 3]
        own = to_taps[b, c]
        line, to_line = np.empty(narrow + 4, np.float32), np.empty(narrow + 4, np.float32)
        even, odd = np.zeros(narrow, np.float32), np.zeros(narrow, np.float32)
        for y in range(height):
            _continue(tall[y], line)
            row = gradient[b, c, y]
            for x in range((width + 1) // 2):
                even[x] = row[2 * x]
            for x in range(width // 2):
                odd[x] = row[2 * x + 1]
            own[0] += _dot(even, line[:narrow]) + _dot(odd, line[4:])
            own[1] += _dot(even, line[1 : narrow + 1]) + _dot(odd, line[3 : narrow + 3])
            own[2] += _dot(even, line[2 : narrow + 2]) + _dot(odd, line[2 : narrow + 2])
            own[3] += _dot(even, line[3 : narrow + 3]) + _dot(odd, line[1 : narrow + 1])
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
                place, weight = _neighbour(y, tap, short - 1), taps[b, tap]
                target, source = to_inputs[b, c, place], inputs[b, c, place]
                total = np.float32(0)
                for x in range(narrow):
                    target[x] += weight * to_line[x + 2]
                    total += to_line[x + 2] * source[x]
                own[tap] += total
