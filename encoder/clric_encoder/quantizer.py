"""What stands for rounding while the grids are trained.

Each function takes grid values, and gives values of the same shape that are near to integers, and their slope: what
gradients are multiplied by on their way back, None for one.
"""

from __future__ import annotations

import math

import torch

Rounded = tuple[torch.Tensor, torch.Tensor | None]


def add_uniform_noise(values: torch.Tensor, noise: torch.Tensor) -> Rounded:
    """Values plus noise over one quantisation step, as in the paper (III-D). noise: uniform in [0, 1)."""
    return (values + noise).sub_(0.5), None


def soft_round_with_noise(values: torch.Tensor, noise: torch.Tensor, temperature: float, sigma: float) -> Rounded:
    """Soft rounding, Gaussian noise of deviation `sigma`, soft rounding again (Cool-Chic 5, after C3).

    noise: of deviation 1. Soft rounding is a smooth staircase (Agustsson and Theis, 2020), the identity for high
    temperatures and rounding for low ones: floor(x) + 1/2 + tanh((x - floor(x) - 1/2) / t) / (2 tanh(1 / (2 t))).
    """
    # tanh(x) as 2 / (1 + e^-2x) - 1: torch's sigmoid is four times as fast
    height = 1 / math.tanh(0.5 / temperature)
    floor = values.floor()
    first = (values - floor).sub_(0.5).mul_(2 / temperature).sigmoid_()
    once = floor.add_(first, alpha=height).add_(0.5 - 0.5 * height).add_(noise, alpha=sigma)
    floor = once.floor()
    second = once.sub_(floor).sub_(0.5).mul_(2 / temperature).sigmoid_()
    twice = floor.add_(second, alpha=height).add_(0.5 - 0.5 * height)
    slope = first.mul_(1 - first).mul_(second).mul_(1 - second).mul_((2 * height / temperature) ** 2)
    return twice, slope


def round_straight_through(values: torch.Tensor) -> Rounded:
    """Rounding whose slope is taken to be 1."""
    return values.round(), None
