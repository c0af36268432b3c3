"""Integer grids -> latent: upsampling and synthesis in float32 (specification, "Upsampling" and "Synthesis").

The order of summation is free here: the specification gives the tolerance within which decoders agree.
"""

from __future__ import annotations

import numpy as np

from .bitstream import Architecture, SynthesisLayer
from .errors import StreamError
from .networks import Parameters

BAND_VALUES = 1 << 19  # of the widest layer, synthesised at once: so that memory stays bounded


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

    # The stack, channel by channel: upsampling needs little memory beside it
    stack = np.empty((sum(architecture.channels), *grids[0].shape[1:]), np.float32)
    channels = iter(stack)
    for level, grid in enumerate(grids):
        for channel in grid:
            plane = channel.astype(np.float32)
            for finer in range(level - 1, -1, -1):
                plane = upsample(plane, groups["upsampler"][finer], grids[finer].shape[1:])
            next(channels)[:] = plane

    # Each band is synthesised with the rows around it that its 3x3 layers reach
    _, height, width = stack.shape
    halo = sum(layer.kernel == 3 for layer in architecture.synthesis)
    rows = max(1, BAND_VALUES // (width * max(len(stack), *(layer.channels for layer in architecture.synthesis))))
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


def upsample(inputs: np.ndarray, taps: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Twice the height and width of inputs (h, w), cropped to size; separable, borders replicated.

    taps (4,): weights of the samples at distances 1 3/4, 3/4, 1/4 and 1 1/4; together with their mirror image they
    are a symmetric transposed convolution of length 8 and stride 2.
    """
    return _double(_double(inputs, taps, size[0]).T, taps, size[1]).T


def _double(inputs: np.ndarray, taps: np.ndarray, size: int) -> np.ndarray:
    """Twice the rows of inputs (h, w), cropped to size."""
    padded = np.pad(inputs, ((2, 2), (0, 0)), mode="edge")
    window = [padded[i : i + len(inputs)] for i in range(5)]
    doubled = np.empty((2 * len(inputs), inputs.shape[1]), np.float32)
    doubled[::2] = taps[0] * window[0] + taps[1] * window[1] + taps[2] * window[2] + taps[3] * window[3]
    doubled[1::2] = taps[3] * window[1] + taps[2] * window[2] + taps[1] * window[3] + taps[0] * window[4]
    return doubled[:size]
