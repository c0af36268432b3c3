"""What stands for rounding while the grids are trained.

Each function takes grid values and gives values of the same shape, near to integers, that gradients pass through.
"""

from __future__ import annotations

import math

import torch


def add_uniform_noise(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Values plus noise over one quantisation step, as in the paper (III-D)."""
    return values + torch.rand(values.shape, generator=generator, device=values.device) - 0.5


def soft_round_with_noise(
    values: torch.Tensor, temperature: float, sigma: float, generator: torch.Generator
) -> torch.Tensor:
    """Soft rounding, Gaussian noise of deviation `sigma`, soft rounding again (Cool-Chic 5, after C3)."""
    noise = torch.randn(values.shape, generator=generator, device=values.device)
    return soft_round(soft_round(values, temperature) + sigma * noise, temperature)


def soft_round(values: torch.Tensor, temperature: float) -> torch.Tensor:
    """A smooth staircase: the identity for high temperatures, rounding for low ones (Agustsson and Theis, 2020)."""
    floor = values.floor()
    slope = torch.tanh((values - floor - 0.5) / temperature)
    return floor + 0.5 + slope * (0.5 / math.tanh(0.5 / temperature))


def round_straight_through(values: torch.Tensor) -> torch.Tensor:
    """Rounding whose gradient is taken to be 1."""
    return values + (values.round() - values).detach()
