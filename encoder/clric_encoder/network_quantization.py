"""Rate-distortion-optimised quantisation of the networks.

Takes trained parameters and rounded grids; gives the integers and exponents that the stream holds. Every choice is
made on distortion + lambda * bits / pixels: the distortion of the real latent, the networks' bits by the stream's own
tables, and the grids' bits by the float ARM, which the integer one follows to within 1 %.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from clric_decoder.bitstream import Architecture
from clric_decoder.networks import Group, Parameters, integer_bits, parameter_groups

from .model.function import Networks, Synthesis, grid_bits
from .model.grid_layout import GridLayout

GROUP_BITS = 8  # exponent and scale code
IDLE = 4  # exponents without a further gain after which finer ones are not tried


def as_networks(functions: Sequence[Sequence[Parameters]], device: torch.device) -> Networks:
    """What a decoder makes of the quantised parameters of a batch of functions, each (batch, *shape)."""
    return {
        group[0].group.name: torch.from_numpy(np.stack([p.values for p in group])).to(device)
        for group in zip(*functions, strict=True)
    }


def quantize_networks(
    networks: Networks,
    packed: torch.Tensor,
    latents: torch.Tensor,
    architecture: Architecture,
    layout: GridLayout,
    weights: torch.Tensor,
    tick: Callable[[], None],
    refined: bool = True,
) -> list[list[Parameters]]:
    """Integers for every group of parameters of each function of a batch, in the order of `parameter_groups`.

    packed: (batch, rows, stride), rounded. latents: (batch, C, h, w). weights: (batch,), what a bit costs in units of
    distortion: lambda / pixels. tick: called before the work on each group. refined: false for a quick look, with each
    group's exponent alone chosen.
    """
    current = dict(networks)
    rate_weights = weights.cpu().double().numpy()

    def costs(trials: list[Parameters]) -> np.ndarray:
        """What the group itself and the grids (for the ARM) or the latent (for the rest) cost, (batch,)."""
        group = trials[0].group
        own = rate_weights * [GROUP_BITS + integer_bits(trial.integers) for trial in trials]
        values = {**current, **as_networks([[trial] for trial in trials], packed.device)}
        if group.name.startswith("arm") or group.name == "grid_scales":
            return own + rate_weights * grid_bits(packed, values, architecture, layout).bits.cpu().double().numpy()
        layer = int(group.name[-1]) if group.name.startswith("synthesis.weight") else 0
        errors = Synthesis(packed, values, architecture, layout, synthesis, layer).latents - latents
        return own + errors.square().mean((1, 2, 3)).cpu().double().numpy()

    quantized: list[list[Parameters]] = []
    for refine in (False, True) if refined else (False,):
        for number, group in enumerate(parameter_groups(architecture)):
            tick()
            # What comes before the group's layer is the same in all trials
            of_synthesis = group.name.startswith("synthesis")
            synthesis = Synthesis(packed, current, architecture, layout) if of_synthesis else None
            if refine:
                quantized[number] = _shrink(quantized[number], costs)
            else:
                quantized.append(_best_exponents(group, networks[group.name].cpu().numpy(), costs))
            current.update(as_networks([[parameters] for parameters in quantized[number]], packed.device))
    return [list(parameters) for parameters in zip(*quantized, strict=True)]


Costs = Callable[[list[Parameters]], np.ndarray]


def _best_exponents(group: Group, values: np.ndarray, costs: Costs) -> list[Parameters]:
    """A group of each function rounded with the exponent of lowest cost, or left at its default.

    values: (batch, *shape).
    """
    differences = values - np.broadcast_to(np.array(group.default, np.float32), group.shape)
    best = [Parameters(group, 0, np.zeros(group.shape, np.int32)) for _ in values]
    lowest = costs(best)
    gained, idle = np.zeros(len(values), bool), np.zeros(len(values), int)
    for exponent in range(group.max_exponent + 1):
        done = gained & (idle >= IDLE)
        if done.all():
            break
        limit = group.limit(exponent)
        integers = np.clip(np.rint(differences * 2.0**exponent), -limit, limit).astype(np.int32)
        trials = [best[i] if done[i] else Parameters(group, exponent, integers[i]) for i in range(len(values))]
        before = lowest
        best, lowest = _better(best, lowest, trials, costs)
        gained |= lowest < before
        idle = np.where(lowest < before, 0, idle + 1)
    return best


def _shrink(best: list[Parameters], costs: Costs) -> list[Parameters]:
    """Move single integers towards zero where the bits saved are worth the harm, the small ones first."""
    lowest = costs(best)
    orders = []
    for parameters in best:
        order = np.argsort(np.abs(parameters.integers.reshape(-1)), kind="stable")
        orders.append(order[parameters.integers.reshape(-1)[order] != 0])
    for turn in range(max(map(len, orders))):
        trials = list(best)
        for i, (parameters, order) in enumerate(zip(best, orders, strict=True)):
            if turn < len(order):
                integers = parameters.integers.copy()
                integers.reshape(-1)[order[turn]] -= np.sign(integers.reshape(-1)[order[turn]])
                trials[i] = Parameters(parameters.group, parameters.exponent, integers)
        best, lowest = _better(best, lowest, trials, costs)
    return best


def _better(
    best: list[Parameters], lowest: np.ndarray, trials: list[Parameters], costs: Costs
) -> tuple[list[Parameters], np.ndarray]:
    """Of two choices for each function the one of lower cost."""
    totals = costs(trials)
    pairs = zip(best, trials, totals < lowest, strict=True)
    return [trial if lower else kept for kept, trial, lower in pairs], np.minimum(totals, lowest)
