"""The function as plain torch code, one function at a time: what clric_encoder.model.function is compared with.

Grids are (channels, height, width) each, the finest first; parameters live in a dict keyed by the names of
`clric_decoder.networks.parameter_groups`. Nothing is fused, and autograd finds every gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from clric_decoder.bitstream import Architecture
from clric_decoder.context import MAX_ACTIVATION, MAX_CONTEXT, NEIGHBOURS, REACH, UNIT
from clric_decoder.entropy import SCALE_ZERO, SCALES
from clric_decoder.networks import arm_sizes

Grids = list[torch.Tensor]
Networks = dict[str, torch.Tensor]

LOG_SCALE_LOW = -SCALE_ZERO / 8
LOG_SCALE_HIGH = (SCALES - 1 - SCALE_ZERO) / 8
SMALLEST_PROBABILITY = 2.0**-16


def synthesize(grids: Grids, networks: Networks, architecture: Architecture) -> torch.Tensor:
    """The latent (C, h, w) of grids, each (channels, height, width), the finest first."""
    stack = grids[-1]
    for level in range(len(grids) - 2, -1, -1):
        height, width = grids[level].shape[1:]
        taps = networks["upsampler"][level]
        stack = _double(stack.transpose(1, 2), taps)[..., :height].transpose(1, 2)
        stack = torch.cat([grids[level], _double(stack, taps)[..., :width]])

    biases = networks["synthesis.bias"].split([layer.channels for layer in architecture.synthesis])
    inputs = [stack]
    for number, (layer, bias) in enumerate(zip(architecture.synthesis, biases, strict=True)):
        weight = networks[f"synthesis.weight{number}"]
        if layer.kernel == 1 and not layer.depthwise:
            # A matrix product: oneDNN's 1x1 convolutions are slow at so few channels
            flat = torch.addmm(bias[:, None], weight[:, :, 0, 0], inputs[-1].flatten(1))
            outputs = flat.view(layer.channels, *stack.shape[1:])
        else:
            margin = layer.kernel // 2
            padded = F.pad(inputs[-1][None], (margin,) * 4, mode="replicate") if margin else inputs[-1][None]
            outputs = F.conv2d(padded, weight, bias, groups=layer.channels if layer.depthwise else 1)[0]
        if layer.residual:
            outputs = outputs + inputs[-layer.residual]
        inputs.append(F.relu(outputs) if layer.relu else outputs)
    return inputs[-1]


def _double(inputs: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """Upsampling by 2 along the last axis; see clric_decoder.synthesis.upsample."""
    length = inputs.shape[-1]
    first, last = inputs[..., :1], inputs[..., -1:]
    padded = torch.cat([first, first, inputs, last, last], -1)
    window = [padded[..., i : i + length] for i in range(5)]
    even = taps[0] * window[0] + taps[1] * window[1] + taps[2] * window[2] + taps[3] * window[3]
    odd = taps[3] * window[1] + taps[2] * window[2] + taps[1] * window[3] + taps[0] * window[4]
    return torch.stack([even, odd], -1).flatten(-2)


def grid_bits(grids: Grids, networks: Networks, architecture: Architecture) -> torch.Tensor:
    """Bits that the ARM gives to all grid values together, a scalar."""
    coded = [level for level, grid in enumerate(grids) if grid.numel()]
    inputs = torch.cat([_contexts(grids[level], architecture) for level in coded], 1)
    values = torch.cat([grids[level].flatten() for level in coded])
    mean, log_scale = _arm(inputs, networks, architecture)
    if architecture.grid_scales:
        offsets = networks["grid_scales"].split(architecture.channels)
        repeats = [grids[level][0].numel() for level in coded for _ in grids[level]]
        own = torch.cat([offsets[level] for level in coded])
        log_scale = log_scale + own.repeat_interleave(torch.tensor(repeats, device=own.device))
    log_scale = log_scale.clamp(LOG_SCALE_LOW, LOG_SCALE_HIGH)
    return laplace_bits(values - mean, log_scale).sum()


def _contexts(grid: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """(inputs, channels * height * width): what the ARM sees of each value of a level (channels, height, width)."""
    _, height, width = grid.shape
    padded = F.pad(grid.clamp(-MAX_CONTEXT, MAX_CONTEXT), (REACH, REACH, REACH, 0))
    inputs = [
        padded[:, REACH + dy : REACH + dy + height, REACH + dx : REACH + dx + width]
        for dy, dx in NEIGHBOURS[: architecture.neighbours]
    ]
    return torch.stack(inputs).flatten(1)


def _arm(inputs: torch.Tensor, networks: Networks, architecture: Architecture) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and base-2 logarithm of the scale, each (n,), for inputs (inputs, n)."""
    sizes = arm_sizes(architecture)[1:]
    *hidden, last = networks["arm.bias"].split(sizes)
    activations = inputs
    for layer, bias in enumerate(hidden):
        weight = networks[f"arm.weight{layer}"]
        residual = torch.eye(*weight.shape, device=weight.device)
        activations = torch.addmm(bias[:, None], weight + residual, activations)
        activations = activations.clamp(0, MAX_ACTIVATION / UNIT)
    mean, log_scale = torch.addmm(last[:, None], networks[f"arm.weight{len(hidden)}"], activations)
    return mean, log_scale


def laplace_bits(distance: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """Bits of a unit interval around `distance` from the mean of a Laplace distribution of scale 2^log_scale."""
    rate = torch.exp2(-log_scale)
    distance = distance.abs()
    near = torch.exp(-(distance - 0.5).abs() * rate)
    far = torch.exp(-(distance + 0.5) * rate)
    probability = torch.where(distance < 0.5, 1 - 0.5 * (near + far), 0.5 * (near - far))
    return -torch.log2(probability.clamp_min(SMALLEST_PROBABILITY))


def network_bits(networks: Networks, defaults: Networks) -> torch.Tensor:
    """A differentiable estimate of the networks' bits, up to a constant: Laplace, one scale a group.

    n values of mean magnitude m, quantised with a fine step s, cost about n log2(2 e m / s) bits; a step of 2^-6
    is added to the magnitude where the values are near zero.
    """
    total = torch.zeros((), device=next(iter(networks.values())).device)
    for name, values in networks.items():
        magnitude = (values - defaults[name]).abs().mean()
        total = total + values.numel() * torch.log2(magnitude * 64 + 1)
    return total
