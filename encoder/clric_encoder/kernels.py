"""The two costly parts of a training step, the ARM and the convolutions, as compiled loops for CPUs.

The same results as the torch code in `function`, in a third of its time and less: a block of grid values goes through
all layers and back while it is in the processor's first caches, where torch writes every intermediate value to memory.
numba compiles these functions at their first use on a machine, and keeps the result beside them or in the user's cache.

Arrays and tensors are of float32 where nothing else is said.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange

# Values of a block, about: with its activations it fits the second cache of a core.
_BLOCK = 1024

# numba's threads serve one caller at a time.
_lock = threading.Lock()
_most_threads = numba.get_num_threads()

_LOG2_E = np.float32(1 / math.log(2))
_LN_2 = np.float32(math.log(2))


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
    arrays = [x.contiguous().numpy() for x in (seen, flat, mask, scales, weights, biases, prices)]
    return _call(_arm_bits, *arrays, np.array(places), np.array(sizes), np.array(limits, np.float32))


def convolve(
    flat: torch.Tensor, shifts: Sequence[int], weight: torch.Tensor, bias: torch.Tensor, count: int
) -> torch.Tensor:
    """outputs[b, o, p] = bias[b, o] + sum over c and s of weight[b, o, c, s] * flat[b, c, p + shifts[s]].

    flat: (batch, in, n). shifts: one, or a multiple of three. weight: (batch, out, in, shifts). Gives (batch, out,
    count).
    """
    arrays = [x.contiguous().numpy() for x in (flat, weight, bias)]
    (outputs,) = _call(_convolve, *arrays, np.array(shifts), count)
    return outputs


def convolve_weights(flat: torch.Tensor, shifts: Sequence[int], gradient: torch.Tensor) -> torch.Tensor:
    """The gradient of `convolve` by its weight: that by its outputs (batch, out, count) -> (batch, out, in, shifts)."""
    (result,) = _call(_convolve_weights, flat.contiguous().numpy(), gradient.contiguous().numpy(), np.array(shifts))
    return result


def fold(padded: torch.Tensor, margin: int, width: int) -> torch.Tensor:
    """The gradient of padding with the outermost values: (batch, C, h + 2 margin, stride) -> (batch, C, h, width).

    Of each row the first width + 2 margin values count.
    """
    (result,) = _call(_fold, padded.contiguous().numpy(), margin, width)
    return result


def double(inputs: torch.Tensor, taps: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """inputs (batch, C, h, w) upsampled by 2 with taps (batch, 4), cut to (batch, C, height, width)."""
    (outputs,) = _call(_double, inputs.contiguous().numpy(), taps.contiguous().numpy(), height, width)
    return outputs


def double_backward(
    gradient: torch.Tensor, inputs: torch.Tensor, taps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of `double` by its outputs -> by inputs and taps."""
    arrays = [x.contiguous().numpy() for x in (gradient, inputs, taps)]
    to_inputs, to_taps = _call(_double_backward, *arrays)
    return to_inputs, to_taps


def _call(function: Any, *arguments: Any) -> list[torch.Tensor]:
    """A compiled function on as many threads as torch uses."""
    with _lock:
        numba.set_num_threads(min(torch.get_num_threads(), _most_threads))
        return [torch.from_numpy(array) for array in function(*arguments)]


@njit(fastmath=True, cache=True)
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


@njit(fastmath=True, cache=True)
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


@njit(fastmath=True, cache=True)
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


@njit(fastmath=True, cache=True)
def _dot(a: np.ndarray, b: np.ndarray) -> np.floating:
    total = np.float32(0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@njit(fastmath=True, cache=True, parallel=True)
def _arm_bits(
    seen: np.ndarray,
    flat: np.ndarray,
    mask: np.ndarray,
    scales: np.ndarray,
    weights: np.ndarray,
    biases: np.ndarray,
    prices: np.ndarray,
    places: np.ndarray,
    sizes: np.ndarray,
    limits: np.ndarray,
) -> tuple[np.ndarray, ...]:
    batch, count = flat.shape
    rows = scales.shape[1]
    stride = count // rows
    layers = len(sizes) - 1
    block = max(1, _BLOCK // stride)
    blocks = (rows + block - 1) // block
    height = 0
    for size in sizes:
        height += size
    largest, low, high, least = limits[0], limits[1], limits[2], limits[3]

    bits = np.zeros((batch, blocks), np.float32)
    by_mean = np.empty((batch, count), np.float32)
    by_inputs = np.empty((batch, sizes[0], count), np.float32)
    by_scales = np.empty((batch, rows), np.float32)
    by_weights = np.zeros((batch, blocks, weights.shape[1]), np.float32)
    by_biases = np.zeros((batch, blocks, biases.shape[1]), np.float32)
    for task in prange(batch * blocks):
        b, c = task // blocks, task % blocks
        start = c * block * stride
        stop = min(rows, (c + 1) * block) * stride
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

    by_seen = np.zeros(seen.shape, np.float32)
    parts = (seen.shape[1] + _BLOCK - 1) // _BLOCK
    for task in prange(batch * parts):
        b, start = task // parts, task % parts * _BLOCK
        for k in range(len(places)):
            # Values whose k-th input lies in this block
            first = max(0, start - places[k])
            last = min(count, min(seen.shape[1], start + _BLOCK) - places[k])
            if first < last:
                target, source = by_seen[b, places[k] + first : places[k] + last], by_inputs[b, k, first:last]
                for i in range(last - first):
                    target[i] += source[i]
    return bits.sum(1), by_mean, by_seen, by_scales, by_weights.sum(1), by_biases.sum(1)


@njit(fastmath=True, cache=True, parallel=True)
def _convolve(
    flat: np.ndarray, weights: np.ndarray, biases: np.ndarray, shifts: np.ndarray, count: int
) -> tuple[np.ndarray]:
    batch, channels, _ = flat.shape
    outputs = weights.shape[1]
    blocks = (count + _BLOCK - 1) // _BLOCK
    result = np.empty((batch, outputs, count), np.float32)
    for task in prange(batch * blocks):
        b, start = task // blocks, task % blocks * _BLOCK
        n = min(count, start + _BLOCK) - start
        for o in range(outputs):
            row = result[b, o, start : start + n]
            row[:] = biases[b, o]
            for c in range(channels):
                source, weight = flat[b, c], weights[b, o, c]
                if len(shifts) == 1:
                    x, own = weight[0], source[start + shifts[0] : start + shifts[0] + n]
                    for i in range(n):
                        row[i] += x * own[i]
                else:
                    for s in range(0, len(shifts), 3):
                        x, y, z = weight[s], weight[s + 1], weight[s + 2]
                        first, second, third = start + shifts[s], start + shifts[s + 1], start + shifts[s + 2]
                        u, v, w = source[first : first + n], source[second : second + n], source[third : third + n]
                        for i in range(n):
                            row[i] += x * u[i] + y * v[i] + z * w[i]
    return (result,)


@njit(fastmath=True, cache=True, parallel=True)
def _convolve_weights(flat: np.ndarray, gradient: np.ndarray, shifts: np.ndarray) -> tuple[np.ndarray]:
    batch, channels, _ = flat.shape
    outputs, count = gradient.shape[1:]
    blocks = (count + _BLOCK - 1) // _BLOCK
    parts = np.empty((batch, blocks, outputs, channels, len(shifts)), np.float32)
    for task in prange(batch * blocks):
        b, block = task // blocks, task % blocks
        start, stop = block * _BLOCK, min(count, block * _BLOCK + _BLOCK)
        for o in range(outputs):
            own = gradient[b, o, start:stop]
            for c in range(channels):
                for s in range(len(shifts)):
                    parts[b, block, o, c, s] = _dot(own, flat[b, c, start + shifts[s] : stop + shifts[s]])
    return (parts.sum(1),)


@njit(fastmath=True, cache=True, parallel=True)
def _fold(padded: np.ndarray, margin: int, width: int) -> tuple[np.ndarray]:
    batch, channels, rows, _ = padded.shape
    height = rows - 2 * margin
    result = np.zeros((batch, channels, height, width), np.float32)
    for task in prange(batch * channels):
        b, c = task // channels, task % channels
        for y in range(rows):
            source, target = padded[b, c, y], result[b, c, min(max(y - margin, 0), height - 1)]
            for x in range(width):
                target[x] += source[margin + x]
            for x in range(margin):
                target[0] += source[x]
                target[width - 1] += source[margin + width + x]
    return (result,)


@njit(fastmath=True, cache=True)
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


@njit(fastmath=True, cache=True)
def _neighbour(place: int, tap: int, last: int) -> int:
    offset = tap - 2 if place % 2 == 0 else 2 - tap
    return min(max(place // 2 + offset, 0), last)


@njit(fastmath=True, cache=True, parallel=True)
def _double(inputs: np.ndarray, taps: np.ndarray, height: int, width: int) -> tuple[np.ndarray]:
    batch, channels, _, narrow = inputs.shape
    result = np.empty((batch, channels, height, width), np.float32)
    for task in prange(batch * channels):
        b, c = task // channels, task % channels
        tall = _tall(inputs[b, c], taps[b], height)
        t0, t1, t2, t3 = taps[b, 0], taps[b, 1], taps[b, 2], taps[b, 3]
        line = np.empty(narrow + 4, np.float32)
        for y in range(height):
            line[2:-2] = tall[y]
            line[:2] = tall[y, 0]
            line[-2:] = tall[y, narrow - 1]
            row = result[b, c, y]
            for x in range((width + 1) // 2):
                row[2 * x] = t0 * line[x] + t1 * line[x + 1] + t2 * line[x + 2] + t3 * line[x + 3]
            for x in range(width // 2):
                row[2 * x + 1] = t0 * line[x + 4] + t1 * line[x + 3] + t2 * line[x + 2] + t3 * line[x + 1]
    return (result,)


@njit(fastmath=True, cache=True, parallel=True)
def _double_backward(gradient: np.ndarray, inputs: np.ndarray, taps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    batch, channels, short, narrow = inputs.shape
    height, width = gradient.shape[2:]
    to_inputs = np.zeros(inputs.shape, np.float32)
    to_taps = np.zeros((batch, channels, 4), np.float32)
    for task in prange(batch * channels):
        b, c = task // channels, task % channels
        tall = _tall(inputs[b, c], taps[b], height)
        t0, t1, t2, t3 = taps[b, 0], taps[b, 1], taps[b, 2], taps[b, 3]
        own = to_taps[b, c]
        line, to_line = np.empty(narrow + 4, np.float32), np.empty(narrow + 4, np.float32)
        even, odd = np.zeros(narrow, np.float32), np.zeros(narrow, np.float32)
        for y in range(height):
            line[2:-2] = tall[y]
            line[:2] = tall[y, 0]
            line[-2:] = tall[y, narrow - 1]
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
    return to_inputs, to_taps.sum(1)
