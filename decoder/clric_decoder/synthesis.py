"""Integer grids -> latent: upsampling and synthesis in float32 (specification, "Upsampling" and "Synthesis").

The order of summation is free here: the specification gives the tolerance within which decoders agree.
"""

from __future__ import annotations

import numpy as np

from .bitstream import Architecture, SynthesisLayer
from .errors import StreamError
from .networks import Parameters

BAND_ROWS_TIMES_WIDTH = 1 << 15  # latent positions that are synthesised at once, so that memory stays bounded


def synthesize(grids: list[np.ndarray], networks: list[Parameters], architecture: Architecture) -> np.ndarray:
    """The latent (channels, height, width) float32 of integer grids, each (channels, height, width), finest first.

    Raises StreamError where it is not finite, as only a faulty encoder can make it.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        latent = _latent(grids, networks, architecture)
    if not np.isfinite(latent).all():
        raise StreamError("payload", "the latent is not finite; the file was made by a faulty encoder")
    return latent


def _latent(grids: list[np.ndarray], networks: list[Parameters], architecture: Architecture) -> np.ndarray:
    groups = {parameters.group.name: parameters.values for parameters in networks}
    weights = [groups[f"synthesis.weight{i}"] for i in range(len(architecture.synthesis))]
    splits = np.cumsum([layer.channels for layer in architecture.synthesis])[:-1]
    biases = np.split(groups["synthesis.bias"], splits)

    stack = grids[-1].astype(np.float32)
    for level in range(len(grids) - 2, -1, -1):
        channels, height, width = grids[level].shape
        finer = np.empty((channels + len(stack), height, width), np.float32)
        finer[:channels] = grids[level]
        finer[channels:] = upsample(stack, groups["upsampler"][level], (height, width))
        stack = finer

    # Each band is synthesised with the rows around it that its 3x3 layers reach
    _, height, width = stack.shape
    halo = sum(layer.kernel == 3 for layer in architecture.synthesis)
    rows = max(1, BAND_ROWS_TIMES_WIDTH // width)
    latent = np.empty((architecture.synthesis[-1].channels, height, width), np.float32)
    for top in range(0, height, rows):
        start = max(0, top - halo)
        band = _synthesis(stack[:, start : top + rows + halo], weights, biases, architecture.synthesis)
        latent[:, top : top + rows] = band[:, top - start : top - start + rows]
    return latent


def _synthesis(
    stack: np.ndarray,
    weights: list[np.ndarray],
    biases: list[np.ndarray],
    layers: tuple[SynthesisLayer, ...],
) -> np.ndarray:
    inputs = [stack]
    for layer, weight, bias in zip(layers, weights, biases, strict=True):
        outputs = convolve(inputs[-1], weight, layer.depthwise) + bias[:, None, None]
        if layer.residual:
            outputs += inputs[-layer.residual]
        if layer.relu:
            np.maximum(outputs, 0, out=outputs)
        inputs.append(outputs)
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
        return sum(view * weight[:, :, dy, dx, None] for dy, dx, view in taps)
    columns = np.stack([view for _, _, view in taps], 1).reshape(channels * 9, -1)
    return (weight.reshape(outputs, -1) @ columns).reshape(outputs, height, width)


def upsample(inputs: np.ndarray, taps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Twice the height and width of inputs (c, h, w), cropped to size; separable, borders replicated.

    taps (4,): weights of the samples at distances 1 3/4, 3/4, 1/4 and 1 1/4; together with their mirror image they
    are a symmetric transposed convolution of length 8 and stride 2.
    """
    return _double(_double(inputs, taps, 1, size[0]), taps, 2, size[1])


def _double(inputs: np.ndarray, taps: np.ndarray, axis: int, size: int) -> np.ndarray:
    padding = [(0, 0)] * 3
    padding[axis] = (2, 2)
    padded = np.moveaxis(np.pad(inputs, padding, mode="edge"), axis, 0)
    length = inputs.shape[axis]
    window = [padded[i : i + length] for i in range(5)]
    even = taps[0] * window[0] + taps[1] * window[1] + taps[2] * window[2] + taps[3] * window[3]
    odd = taps[3] * window[1] + taps[2] * window[2] + taps[1] * window[3] + taps[0] * window[4]
    doubled = np.stack([even, odd], 1).reshape(2 * length, *even.shape[1:])[:size]
    return np.moveaxis(doubled, 0, axis)
