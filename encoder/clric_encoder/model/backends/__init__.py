"""The operations of a training step, in two implementations behind one interface.

`compiled` is loops for CPUs (numba), `torch_operations` is for all else; each module has the functions and classes that
`Backend` names. `backend_for` chooses. What both share stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from clric_decoder.context import MAX_ACTIVATION, UNIT
from clric_decoder.entropy import SCALE_ZERO, SCALES

from ..grid_layout import GridLayout

Networks = dict[str, torch.Tensor]

# A number that changes from one iteration to the next, as a backend's `scalars` gives it
Scalar = float | torch.Tensor

LOG_SCALE_LOW = -SCALE_ZERO / 8
LOG_SCALE_HIGH = (SCALES - 1 - SCALE_ZERO) / 8
SMALLEST_PROBABILITY = 2.0**-16
LARGEST_ACTIVATION = MAX_ACTIVATION / UNIT


class GridBits(Protocol):
    """Bits of all grids by the ARM."""

    @property
    def bits(self) -> torch.Tensor:
        """(batch,)."""

    def backward(self, grad_networks: Networks, grad_grids: torch.Tensor) -> None:
        """Adds the gradients of the bits, each function's multiplied by its rate weight."""


class Upsampled(Protocol):
    """All grids at the size of the finest level: outputs (batch, grids, h, w)."""

    outputs: torch.Tensor

    def backward(self, gradient: torch.Tensor, grad_grids: torch.Tensor) -> torch.Tensor:
        """Of the outputs -> of the taps; that of the grids is added."""


class Convolved(Protocol):
    """A convolution: outputs (batch, channels, h, w)."""

    outputs: torch.Tensor

    def backward(self, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the outputs -> of inputs, weight and bias."""


@dataclass
class SoapState:
    """What SOAP keeps for vectors (batch, parameters).

    mean, square: moments, as the vectors. covariances, bases: (batch, all matrices'). table: for each group its first
    parameter, rows, columns, and where its left and right matrices begin; -1 for a side without.
    """

    mean: torch.Tensor
    square: torch.Tensor
    covariances: torch.Tensor
    bases: torch.Tensor
    table: Sequence[tuple[int, int, int, int, int]]

    @staticmethod
    def matrix(matrices: torch.Tensor, place: int, side: int) -> torch.Tensor | None:
        """(batch, side, side), a view; None for a side without."""
        return matrices[:, place : place + side * side].unflatten(1, (side, side)) if place >= 0 else None


class Backend(Protocol):
    """What a backend's module has; see `torch_operations` for what each does."""

    GridBits: Callable[..., GridBits]
    Upsampled: Callable[[torch.Tensor, torch.Tensor, GridLayout], Upsampled]
    Convolved: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Convolved]
    scalars: Callable[[Sequence[float], torch.device], Any]
    soft_round_with_noise: Callable[[torch.Tensor, torch.Tensor, Scalar, Scalar], tuple[torch.Tensor, torch.Tensor]]
    adam: Callable[..., None]
    soap: Callable[..., None]
    threads: Callable[..., AbstractContextManager[None]]


def backend_for(device: torch.device) -> Backend:
    """Compiled loops on a CPU where numba is installed, torch's operations elsewhere."""
    return COMPILED if device.type == "cpu" and COMPILED is not None else TORCH


def arm_matrices(networks: Networks, layers: int) -> list[torch.Tensor]:
    """What each layer of the ARM multiplies its inputs with, (batch, outputs, inputs)."""
    matrices = [networks[f"arm.weight{layer}"].clone() for layer in range(layers)]
    for matrix in matrices[:-1]:
        matrix.diagonal(dim1=1, dim2=2).add_(1)  # hidden layers add to their inputs (specification, "Layers")
    return matrices


def depthwise_as_batch(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A depthwise convolution as one for each channel, with a batch axis of them all; any other as it is."""
    if weight.shape[2] == inputs.shape[1]:
        return inputs, weight, bias
    return inputs.flatten(0, 1)[:, None], weight.flatten(0, 1)[:, None], bias.reshape(-1, 1)


from . import torch_operations  # noqa: E402  (the backends build on what stands above)

TORCH = cast(Backend, torch_operations)
COMPILED: Backend | None
try:
    from . import compiled

    COMPILED = cast(Backend, compiled)
except ImportError:  # numba has no wheel for this machine: torch alone gives the same results in more time
    COMPILED = None
