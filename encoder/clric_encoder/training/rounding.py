"""Differentiable surrogates for rounding while the grids are trained; soft rounding is a backend's.

Each function takes grid values, and gives values of the same shape that are near to integers, and their slope: what
gradients are multiplied by on their way back, None for one.
"""

from __future__ import annotations

import torch

Rounded = tuple[torch.Tensor, torch.Tensor | None]


def add_uniform_noise(values: torch.Tensor, noise: torch.Tensor) -> Rounded:
    """Values plus noise over one quantisation step, as in the paper (III-D). noise: uniform in [0, 1)."""
    return (values + noise).sub_(0.5), None


def round_straight_through(values: torch.Tensor) -> Rounded:
    """Rounding whose slope is taken to be 1."""
    return values.round(), None
