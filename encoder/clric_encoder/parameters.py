"""Rate-distortion-optimised quantisation of the networks.

Takes trained parameters and rounded grids; gives the integers and exponents that the stream holds. Every choice is
made on distortion + lambda * bits / pixels: the distortion of the real latent, the networks' bits by the stream's own
tables, and the grids' bits by the float ARM, which the integer one follows to within 1 %.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from clric_decoder.bitstream import Architecture
from clric_decoder.networks import Group, Parameters, integer_bits, parameter_groups

from .canvas import Canvas
from .function import GridBits, Networks, Synthesis

GROUP_BITS = 8  # exponent and scale code


def as_networks(parameters: list[Parameters], device: torch.device) -> Networks:
    """What a decoder makes of quantised parameters, each (1, *shape)."""
    return {p.group.name: torch.from_numpy(p.values)[None].to(device) for p in parameters}


def quantize_networks(
    networks: Networks,
    canvas: torch.Tensor,
    latent: torch.Tensor,
    architecture: Architecture,
    layout: Canvas,
    weight: float,
    tick: Callable[[], None],
) -> list[Parameters]:
    """Integers for every group of parameters of one function, in the order of `parameter_groups`.

    networks: of a batch of one. canvas: (1, rows, stride), rounded. latent: (1, C, h, w). weight: what a bit costs, in
    units of distortion: lambda / pixels. tick: called before the work on each group.
    """
    current = dict(networks)
    groups = parameter_groups(architecture)

    def cost(group: Group, values: torch.Tensor) -> float:
        """What the grids (for the ARM) or the latent (for the rest) cost with other values of one group."""
        trial = {**current, group.name: values[None].to(latent.device)}
        if group.name.startswith("arm") or group.name == "grid_scales":
            return weight * GridBits(canvas, trial, architecture, layout).bits.item()
        return (Synthesis(canvas, trial, architecture, layout).latents - latent).square().mean().item()

    quantized = []
    with torch.no_grad():
        for group in groups:
            tick()
            best = _best_exponent(group, networks[group.name][0].cpu().numpy(), cost, weight)
            current[group.name] = torch.from_numpy(best.values)[None].to(latent.device)
            quantized.append(best)
        for number, parameters in enumerate(quantized):
            tick()
            quantized[number] = _shrink(parameters, cost, weight)
            current[parameters.group.name] = torch.from_numpy(quantized[number].values)[None].to(latent.device)
    return quantized


Cost = Callable[[Group, torch.Tensor], float]


def _total(parameters: Parameters, cost: Cost, weight: float) -> float:
    bits = GROUP_BITS + integer_bits(parameters.integers).sum()
    return cost(parameters.group, torch.from_numpy(parameters.values)) + weight * bits


def _best_exponent(group: Group, values: np.ndarray, cost: Cost, weight: float) -> Parameters:
    """All of a group rounded with the exponent of lowest cost, or left at its default."""
    differences = values - np.broadcast_to(np.array(group.default, np.float32), group.shape)
    trials = [Parameters(group, 0, np.zeros(group.shape, np.int32))]
    for exponent in range(group.max_exponent + 1):
        integers = np.rint(differences * 2.0**exponent)
        limit = group.limit(exponent)
        trials.append(Parameters(group, exponent, np.clip(integers, -limit, limit).astype(np.int32)))
    return min(trials, key=lambda trial: _total(trial, cost, weight))


def _shrink(parameters: Parameters, cost: Cost, weight: float) -> Parameters:
    """Move single integers towards zero where the bits saved are worth the harm."""
    best, lowest = parameters, _total(parameters, cost, weight)
    integers = parameters.integers.reshape(-1)
    for position in np.argsort(np.abs(integers), kind="stable").tolist():
        if not integers[position]:
            continue
        trial = best.integers.copy()
        trial.reshape(-1)[position] -= np.sign(integers[position])
        candidate = Parameters(parameters.group, parameters.exponent, trial)
        total = _total(candidate, cost, weight)
        if total < lowest:
            best, lowest = candidate, total
    return best
