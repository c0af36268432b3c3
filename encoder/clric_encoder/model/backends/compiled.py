"""The operations of a training step as compiled loops (`kernels`), for CPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from clric_decoder.bitstream import Architecture
from clric_decoder.context import MAX_CONTEXT
from clric_decoder.networks import arm_sizes

from ...torch_threads import torch_threads
from ..grid_layout import GridLayout
from . import (
    LARGEST_ACTIVATION,
    LOG_SCALE_HIGH,
    LOG_SCALE_LOW,
    SMALLEST_PROBABILITY,
    Networks,
    SoapState,
    arm_matrices,
    depthwise_as_batch,
    kernels,
)
from .kernels import adam, soft_round_with_noise

__all__ = ["Convolved", "GridBits", "Upsampled", "adam", "scalars", "soap", "soft_round_with_noise", "threads"]


def Upsampled(packed: torch.Tensor, taps: torch.Tensor, layout: GridLayout) -> kernels.Upsampled:
    """As `torch_operations.Upsampled`."""
    return kernels.Upsampled(packed, taps, layout.places, layout.sizes, layout.ends)


class Convolved:
    """As `torch_operations.Convolved`."""

    def __init__(self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self._shape, self._weight_shape = inputs.shape, weight.shape
        self._inputs, self._weight, bias = depthwise_as_batch(inputs, weight, bias)
        outputs = kernels.convolve(self._inputs, self._weight, bias)
        self.outputs = outputs.view(self._shape[0], -1, *self._shape[2:])

    def backward(self, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `torch_operations.Convolved.backward`."""
        batch, outputs = gradient.shape[:2]
        gradient = gradient.reshape(len(self._weight), -1, *self._shape[2:])
        grad_inputs, grad_weight, grad_bias = kernels.convolve_backward(gradient, self._inputs, self._weight)
        return grad_inputs.view(self._shape), grad_weight.view(self._weight_shape), grad_bias.view(batch, outputs)


class GridBits:
    """As `torch_operations.GridBits`; bits and gradients in one pass, which starts asynchronously."""

    def __init__(
        self,
        packed: torch.Tensor,
        rate_weights: torch.Tensor | None,
        networks: Networks,
        architecture: Architecture,
        layout: GridLayout,
    ) -> None:
        sizes = arm_sizes(architecture)
        matrices = arm_matrices(networks, len(sizes) - 1)
        self._shapes = [matrix.shape for matrix in matrices]
        scales = (
            networks["grid_scales"] if "grid_scales" in networks else packed.new_zeros(len(packed), len(layout.planes))
        )
        self._arm_bits = kernels.ArmBits(
            packed,
            layout.planes,
            layout.offsets,
            scales,
            torch.cat([matrix.flatten(1) for matrix in matrices], 1),
            networks["arm.bias"],
            sizes,
            (MAX_CONTEXT, LARGEST_ACTIVATION, LOG_SCALE_LOW, LOG_SCALE_HIGH, SMALLEST_PROBABILITY),
            rate_weights,
        )

    @property
    def bits(self) -> torch.Tensor:
        """(batch,)."""
        return self._arm_bits.bits

    def backward(self, grad_networks: Networks, grad_packed: torch.Tensor) -> None:
        """As `torch_operations.GridBits.backward`."""
        grad_scales, grad_weights, grad_biases = self._arm_bits.gradients()
        self._arm_bits.add_to(grad_packed)
        if "grid_scales" in grad_networks:
            grad_networks["grid_scales"] += grad_scales
        grad_networks["arm.bias"] += grad_biases
        parts = grad_weights.split([shape[1:].numel() for shape in self._shapes], 1)
        for layer, part in enumerate(parts):
            grad_networks[f"arm.weight{layer}"] += part.view(self._shapes[layer])


def scalars(values: Sequence[float], device: torch.device) -> Sequence[float]:
    """As `torch_operations.scalars`, but Python's numbers as they are: there is no graph to bring them to."""
    return values


def soap(
    values: torch.Tensor,
    gradient: torch.Tensor,
    state: SoapState,
    betas: tuple[float, float],
    covariance_beta: float,
    length: float,
    epsilon: float,
) -> None:
    """As `torch_operations.soap`."""
    tensors = (state.mean, state.square, state.covariances, state.bases)
    kernels.soap(values, gradient, *tensors, state.table, betas, covariance_beta, length, epsilon)


@contextlib.contextmanager
def threads(count: int | None = None) -> Iterator[None]:
    """Gives so many threads (torch's number of them) to the loops that are called from this one, and one to torch.

    Between torch's operations its threads wait in a busy loop; and tensors of this size are too small for them.
    """
    with kernels.own_threads(torch.get_num_threads() if count is None else count), torch_threads(1):
        yield
