"""Integer grids -> latent: upsampling and synthesis in float32 (specification, "Upsampling" and "Synthesis").

The order of summation is free here: the specification gives the tolerance within which decoders agree. All is done
tile by tile, so that it needs little memory beside the grids and the latent.
"""

from __future__ import annotations

import math

import numpy as np

from .bitstream import Architecture, SynthesisLayer
from .errors import StreamError
from .networks import Parameters

TILE_VALUES = 1 << 17  # of the widest layer, synthesised at once

_NOT_FINITE = "the latent is not finite; the file was made by a faulty encoder"


def synthesize(grids: list[np.ndarray], networks: list[Parameters], architecture: Architecture) -> np.ndarray:
    """The latent (channels, height, width) float32 of integer grids, each (channels, height, width), finest first.

    Raises StreamError where it is not finite, as only a faulty encoder can make it.
    """
    groups = {parameters.group.name: parameters.values for parameters in networks}
    taps = groups.get("upsampler", np.empty((0, 4), np.float32))
    layers = architecture.synthesis
    weights = [groups[f"synthesis.weight{i}"] for i in range(len(layers))]
    biases = np.split(groups["synthesis.bias"], np.cumsum([layer.channels for layer in layers])[:-1])

    height, width = grids[0].shape[1:]
    halo = sum(layer.kernel == 3 for layer in layers)  # how far the 3x3 layers reach
    positions = TILE_VALUES // max(sum(architecture.channels), *(layer.channels for layer in layers))
    rows, columns = _tile_size(width, halo, positions)
    latent = np.empty((layers[-1].channels, height, width), np.float32)
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            above, before = min(top, halo), min(left, halo)
            stack = _stack(
                grids,
                taps,
                0,
                slice(top - above, min(top + rows + halo, height)),
                slice(left - before, min(left + columns + halo, width)),
            )
            with np.errstate(over="ignore", invalid="ignore"):
                tile = _layers(stack, weights, biases, layers)[:, above : above + rows, before : before + columns]
            if not np.isfinite(tile).all():
                raise StreamError("payload", _NOT_FINITE)
            latent[:, top : top + rows, left : left + columns] = tile
    return latent


def _tile_size(width: int, halo: int, positions: int) -> tuple[int, int]:
    """Rows and columns of a tile that has at most so many positions with its halo: as wide as the image if need be."""
    columns = width if width * (4 * halo + 1) <= positions else math.isqrt(positions) - 2 * halo
    return positions // min(width, columns + 2 * halo) - 2 * halo, columns


def _stack(grids: list[np.ndarray], taps: np.ndarray, level: int, rows: slice, columns: slice) -> np.ndarray:
    """The stack (channels, rows, columns) float32 of this level and all coarser ones, over a part of this level."""
    own = grids[level][:, rows, columns].astype(np.float32)
    if level == len(grids) - 1:
        return own
    # What reaches this part of the next level, and of that what lies inside
    reached = [(side.start // 2 - 2, (side.stop - 1) // 2 + 3) for side in (rows, columns)]
    inside = [
        slice(max(start, 0), min(stop, length))
        for (start, stop), length in zip(reached, grids[level + 1].shape[1:], strict=True)
    ]
    coarser = _stack(grids, taps, level + 1, *inside)
    outside = [(part.start - start, stop - part.stop) for (start, stop), part in zip(reached, inside, strict=True)]
    padded = np.pad(coarser, ((0, 0), *outside), mode="edge")
    doubled = _double(_double(padded, taps[level]).swapaxes(1, 2), taps[level]).swapaxes(1, 2)
    odd_row, odd_column = rows.start % 2, columns.start % 2
    height, width = own.shape[1:]
    return np.concatenate([own, doubled[:, odd_row : odd_row + height, odd_column : odd_column + width]])


def _double(padded: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """Twice the rows of (c, h + 4, w), of which two at each end are only looked at: (c, 2 h, w).

    taps (4,): weights of the samples at distances 1 3/4, 3/4, 1/4 and 1 1/4; together with their mirror image they
    are a symmetric transposed convolution of length 8 and stride 2.
    """
    channels, height, width = padded.shape
    height -= 4
    window = [padded[:, i : i + height] for i in range(5)]
    doubled = np.empty((channels, 2 * height, width), np.float32)
    doubled[:, ::2] = taps[0] * window[0] + taps[1] * window[1] + taps[2] * window[2] + taps[3] * window[3]
    doubled[:, 1::2] = taps[3] * window[1] + taps[2] * window[2] + taps[1] * window[3] + taps[0] * window[4]
    return doubled


def _layers(
    stack: np.ndarray,
    weights: list[np.ndarray],
    biases: list[np.ndarray],
    layers: tuple[SynthesisLayer, ...],
) -> np.ndarray:
    """The latent of a tile: its stack (channels, h, w) through all layers."""
    inputs = [stack]
    for layer, weight, bias in zip(layers, weights, biases, strict=True):
        outputs = convolve(inputs[-1], weight, layer.depthwise)
        outputs += bias[:, None, None]
        if layer.residual:
            outputs += inputs[-layer.residual]
        if layer.relu:
            if not np.isfinite(outputs.min()):
                raise StreamError("payload", _NOT_FINITE)  # which ReLU would hide
            np.maximum(outputs, 0, out=outputs)
        inputs = [*inputs[-2:], outputs]  # a residual reaches back three layers
    return inputs[-1]


def convolve(inputs: np.ndarray, weight: np.ndarray, depthwise: bool) -> np.ndarray:
    """Convolution of inputs (c, h, w) with weight (o, c or 1, k, k), borders replicated: (o, h, w) float32."""
    channels, height, width = inputs.shape
    outputs, _, kernel, _ = weight.shape
    if kernel == 1:
        if depthwise:
            return inputs * weight[:, 0]
        return (weight[:, :, 0, 0] @ inputs.reshape(channels, -1)).reshape(outputs, height, width)
    padded = np.pad(inputs, ((0, 0), (1, 1), (1, 1)), mode="edge")
    taps = [(dy, dx, padded[:, dy : dy + height, dx : dx + width]) for dy in range(3) for dx in range(3)]
    if depthwise:
        result, product = np.zeros_like(inputs), np.empty_like(inputs)
        for dy, dx, view in taps:
            result += np.multiply(view, weight[:, :, dy, dx, None], out=product)
        return result
    columns = np.stack([view for _, _, view in taps], 1).reshape(channels * 9, -1)
    return (weight.reshape(outputs, -1) @ columns).reshape(outputs, height, width)
