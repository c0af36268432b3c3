"""What stands for rounding while the grids are trained.

Each function takes grid values and gives values of the same shape, near to integers, that gradients pass through.
"""

from __future__ import annotations

import math
from typing import Any

import torch


def add_uniform_noise(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Values plus noise over one quantisation step, as in the paper (III-D). noise: uniform in [0, 1)."""
    return values + (noise - 0.5)


def soft_round_with_noise(values: torch.Tensor, noise: torch.Tensor, temperature: float, sigma: float) -> torch.Tensor:
    """Soft rounding, Gaussian noise of deviation `sigma`, soft rounding again (Cool-Chic 5, after C3).

    noise: of deviation 1. Soft rounding is a smooth staircase (Agustsson and Theis, 2020): the identity for high
    temperatures, rounding for low ones.
    """
    return _SoftRound.apply(values, noise, temperature, sigma)


class _SoftRound(torch.autograd.Function):
    """floor(x) + 1/2 + tanh((x - floor(x) - 1/2) / temperature) / (2 tanh(1/2 / temperature)), twice."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, noise: torch.Tensor, temperature: float, sigma: float) -> torch.Tensor:
        # tanh(x) as 2 / (1 + e^-2x) - 1: torch's sigmoid is four times as fast
        height = 1 / math.tanh(0.5 / temperature)
        floor = values.floor()
        first = (values - floor).sub_(0.5).mul_(2 / temperature).sigmoid_()
        once = floor.add_(first, alpha=height).add_(0.5 - 0.5 * height).add_(noise, alpha=sigma)
        floor = once.floor()
        second = once.sub_(floor).sub_(0.5).mul_(2 / temperature).sigmoid_()
        ctx.save_for_backward(first, second)
        ctx.slope = 2 * height / temperature
        return floor.add_(second, alpha=height).add_(0.5 - 0.5 * height)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        first, second = ctx.saved_tensors
        slope = first * (1 - first) * second * (1 - second)
        return slope.mul_(gradients[0]).mul_(ctx.slope**2), None, None, None


def round_straight_through(values: torch.Tensor) -> torch.Tensor:
    """Rounding whose gradient is taken to be 1."""
    return values + (values.round() - values).detach()
