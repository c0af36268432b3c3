"""The operations of a training step in torch, for GPUs and for CPUs that numba has no wheel for.

Tensors are small (some 30,000 values for 768x512), so that time goes by the number of operations and by the memory that
they touch, rather than by arithmetic. Operations are therefore few and large, and gradients are written out instead of
left to autograd: classes compute on construction and keep what their `backward` needs.

A CUDA device replays an iteration as a graph (`training.cuda_graph`), which repeats the Python numbers that it was
captured with. What changes from one iteration to the next is therefore a tensor (`scalars`), and nothing here may wait
for the device or have a shape that depends on its values.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from clric_decoder.bitstream import Architecture
from clric_decoder.context import MAX_CONTEXT
from clric_decoder.networks import arm_sizes

from ..grid_layout import Doubling, GridLayout
from . import (
    LARGEST_ACTIVATION,
    LOG_SCALE_HIGH,
    LOG_SCALE_LOW,
    SMALLEST_PROBABILITY,
    Networks,
    Scalar,
    SoapState,
    arm_matrices,
    depthwise_as_batch,
)


class Upsampled:
    """All grids of an array at the size of the finest, (batch, grids, h, w)."""

    def __init__(self, packed: torch.Tensor, taps: torch.Tensor, layout: GridLayout) -> None:
        """taps: (batch, levels - 1, 4), those of the doubling to each level."""
        self._layout, self._batch = layout, len(packed)
        grids = layout.split(packed)
        self._doubled: list[_Doubled] = []
        self.outputs = grids[-1]
        for level in range(len(grids) - 2, -1, -1):
            self._doubled.insert(0, _Doubled(self.outputs, taps[:, level], *layout.doublings[level]))
            self.outputs = torch.cat([grids[level], self._doubled[0].outputs], 1)

    def backward(self, gradient: torch.Tensor, grad_packed: torch.Tensor) -> torch.Tensor:
        """Of the outputs -> of taps; that of the packed is added to `grad_packed`."""
        grad_taps = [gradient.new_zeros(self._batch, 0, 4)]
        for level, place in enumerate(self._layout.split(grad_packed)):
            channels = place.shape[1]
            place += gradient[:, :channels]
            if level < len(self._doubled):
                gradient, grad_level_taps = self._doubled[level].backward(gradient[:, channels:])
                grad_taps.append(grad_level_taps[:, None])
        return torch.cat(grad_taps, 1)


class _Doubled:
    """Inputs (batch, channels, h, w) with taps (batch, 4) as outputs (batch, channels, rows.fine, columns.fine)."""

    def __init__(self, inputs: torch.Tensor, taps: torch.Tensor, rows: Doubling, columns: Doubling) -> None:
        batch, channels, _, width = inputs.shape
        by_row, by_column = (
            (taps @ axis.basis.flatten(1)).view(batch, *axis.basis.shape[1:]) for axis in (rows, columns)
        )
        upright = rows.cut(inputs.transpose(2, 3).reshape(batch, -1, rows.coarse))
        tall = torch.bmm(upright, by_row.transpose(1, 2)).view(batch, channels, width, -1)[..., : rows.fine]
        lines = columns.cut(tall.transpose(2, 3).reshape(batch, -1, columns.coarse))
        outputs = torch.bmm(lines, by_column.transpose(1, 2))
        self._channels = channels
        self._axes = (columns, lines, by_column), (rows, upright, by_row)
        self.outputs = outputs.view(batch, channels, rows.fine, -1)[..., : columns.fine]

    def backward(self, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the outputs -> of inputs and taps."""
        batch = len(gradient)
        grad_taps = gradient.new_zeros(batch, 4)
        for axis, inputs, matrix in self._axes:
            outputs = axis.basis.shape[1]
            if axis.blocks * outputs > axis.fine:
                gradient = F.pad(gradient, (0, axis.blocks * outputs - axis.fine))
            gradient = gradient.reshape(batch, -1, outputs)
            grad_matrix = torch.bmm(gradient.transpose(1, 2), inputs)
            grad_taps.addmm_(grad_matrix.flatten(1), axis.basis.flatten(1).T)
            gradient = axis.glue(torch.bmm(gradient, matrix)).view(batch, self._channels, -1, axis.coarse)
            gradient = gradient.transpose(2, 3)  # the lines of the other axis
        return gradient, grad_taps


class Convolved:
    """Batched convolution with replicate padding and weights of its own for each entry of the batch.

    inputs (batch, in, h, w), weight (batch, out, in, k, k), bias (batch, out) -> outputs (batch, out, h, w); depthwise
    where the weight's `in` is 1. In flattened planes a neighbour is the same distance away everywhere; what wraps
    around at the right edge is cut off, and a row more at the bottom lets the last ones read beyond the end.
    """

    def __init__(self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self._shape = batch, _, height, width = inputs.shape
        inputs, weight, bias = depthwise_as_batch(inputs, weight, bias)
        self._weight, self._margin = weight, weight.shape[3] // 2
        around = (self._margin, self._margin, self._margin, self._margin + 1)
        self._flat = (F.pad(inputs, around, mode="replicate") if self._margin else inputs).flatten(2)
        stride = width + 2 * self._margin
        self._shifts = _shifts(weight.shape[3], stride)
        outputs = _convolve(self._flat, self._shifts, weight.flatten(3), bias, height * stride)
        self.outputs = outputs.view(batch, -1, height, stride)[..., :width]

    def backward(self, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the outputs -> of inputs, weight and bias."""
        batch, outputs, height, width = gradient.shape
        weight, margin = self._weight, self._margin
        gradient = gradient.reshape(len(weight), -1, height, width)
        flat = (F.pad(gradient, (0, 2 * margin)) if margin else gradient).flatten(2)
        grad_weight = torch.bmm(flat, _shifted(self._flat, self._shifts, flat.shape[2]).transpose(1, 2))
        grad_weight = grad_weight.view(batch, outputs, *weight.shape[2:])
        grad_bias = flat.sum(2).view(batch, outputs)
        # The same convolution backwards: what an input gives to the outputs around it, the padding's included
        backwards = weight.flip(3, 4).transpose(1, 2).flatten(3)
        around = F.pad(gradient, (2 * margin, 2 * margin, 2 * margin, 2 * margin + 1)) if margin else gradient
        stride, rows = width + 4 * margin, height + 2 * margin
        none = weight.new_zeros(len(weight), weight.shape[2])
        grad_inputs = _convolve(around.flatten(2), _shifts(weight.shape[3], stride), backwards, none, rows * stride)
        grad_inputs = grad_inputs.view(len(weight), -1, rows, stride)
        return _fold(grad_inputs, margin, width).reshape(self._shape), grad_weight, grad_bias


class GridBits:
    """The bits of all grids by the ARM: neighbours, layers, Laplace distribution."""

    def __init__(
        self,
        packed: torch.Tensor,
        rate_weights: torch.Tensor | None,
        networks: Networks,
        architecture: Architecture,
        layout: GridLayout,
    ) -> None:
        flat = packed.flatten(1)
        self._flat, self._rate_weights, self._layout = flat, rate_weights, layout
        seen = F.pad(flat.clamp(-MAX_CONTEXT, MAX_CONTEXT), (layout.lead, 0))
        biases = networks["arm.bias"].split(arm_sizes(architecture)[1:], 1)
        self._matrices = arm_matrices(networks, len(biases))
        batch, count = flat.shape
        starts = [layout.lead + distance for distance in layout.neighbours]
        self._activations = [torch.stack([seen[:, start : start + count] for start in starts], 1)]
        for matrix, bias in zip(self._matrices[:-1], biases[:-1], strict=True):
            hidden = torch.baddbmm(bias[:, :, None], matrix, self._activations[-1])
            self._activations.append(hidden.clamp_(0, LARGEST_ACTIVATION))
        outputs = torch.baddbmm(biases[-1][:, :, None], self._matrices[-1], self._activations[-1])
        mean, self._log_scale = outputs.unbind(1)
        self._has_scales = "grid_scales" in networks
        if self._has_scales:
            scales = networks["grid_scales"][:, layout.plane_numbers, None]
            self._log_scale = (self._log_scale.view(batch, -1, layout.stride) + scales).flatten(1)

        # Laplace, of scale 2^log_scale: the probability of the unit interval around a value is (1 - far) / 2 on one
        # side of the mean, and (1 - near) / 2 on the other if the mean is in the interval
        self._rate = self._log_scale.clamp(LOG_SCALE_LOW, LOG_SCALE_HIGH).neg_().exp2_()
        self._difference = flat - mean
        self._outer = self._difference.abs()
        self._inner = 0.5 - self._outer
        self._outer += 0.5
        self._near = self._inner.abs().neg_().mul_(self._rate).exp_()
        self._far = (self._outer * self._rate).neg_().exp_()
        self._probability = (1 - self._far).addcmul_(self._inner.sign(), 1 - self._near).mul_(0.5)
        self._probability.clamp_min_(SMALLEST_PROBABILITY)
        self.bits = -(torch.log2(self._probability) @ layout.mask.flatten())

    def backward(self, grad_networks: Networks, grad_packed: torch.Tensor) -> None:
        """Adds gradients."""
        assert self._rate_weights is not None
        grad_flat = grad_packed.flatten(1)
        layout, rate = self._layout, self._rate
        batch, count = grad_flat.shape
        slope = (layout.mask.flatten() * self._rate_weights[:, None]).div_(self._probability).mul_(-0.5 / math.log(2))
        # No gradient from where the probability is at its floor
        slope = torch.ops.aten.threshold_backward(slope, self._probability, SMALLEST_PROBABILITY).mul_(rate)
        grad_scale = (self._inner * self._near).addcmul_(self._outer, self._far).mul_(slope).mul_(-math.log(2))
        grad_scale = torch.ops.aten.hardtanh_backward(grad_scale, self._log_scale, LOG_SCALE_LOW, LOG_SCALE_HIGH)
        grad_mean = (self._near - self._far).mul_(self._difference.sign()).mul_(slope)
        grad_flat -= grad_mean

        if self._has_scales:
            grad_rows = grad_scale.view(batch, -1, layout.stride).sum(2)
            grad_networks["grid_scales"].index_add_(1, layout.plane_numbers, grad_rows)
        grad_biases = []
        gradient = torch.stack([grad_mean, grad_scale], 1)
        for layer in range(len(self._matrices) - 1, -1, -1):
            inputs = self._activations[layer]
            grad_networks[f"arm.weight{layer}"] += torch.bmm(gradient, inputs.transpose(1, 2))
            grad_biases.append(gradient.sum(2))
            gradient = torch.bmm(self._matrices[layer].transpose(1, 2), gradient)
            if layer:
                gradient = torch.ops.aten.hardtanh_backward(gradient, inputs, 0, LARGEST_ACTIVATION)
        grad_networks["arm.bias"] += torch.cat(grad_biases[::-1], 1)

        grad_seen = grad_flat.new_zeros(batch, layout.lead + count)
        for number, distance in enumerate(layout.neighbours):
            start = layout.lead + distance
            grad_seen[:, start : start + count] += gradient[:, number]
        seen = grad_seen[:, layout.lead :]
        grad_flat += torch.ops.aten.hardtanh_backward(seen, self._flat, -MAX_CONTEXT, MAX_CONTEXT)


def _shifts(kernel: int, stride: int) -> list[int]:
    return [y * stride + x for y in range(kernel) for x in range(kernel)]


def _convolve(
    flat: torch.Tensor, shifts: list[int], weight: torch.Tensor, bias: torch.Tensor, count: int
) -> torch.Tensor:
    """flat (batch, in, n), weight (batch, out, in, shifts), bias (batch, out) -> (batch, out, count).

    An output weighs the inputs that are the shifts further on.
    """
    return torch.baddbmm(bias[:, :, None], weight.flatten(2), _shifted(flat, shifts, count))


def _shifted(flat: torch.Tensor, shifts: list[int], count: int) -> torch.Tensor:
    """(batch, in, n) -> (batch, in * shifts, count)."""
    if len(shifts) == 1:
        return flat
    return torch.stack([flat[:, :, shift : shift + count] for shift in shifts], 2).flatten(1, 2)


def _fold(padded: torch.Tensor, margin: int, width: int) -> torch.Tensor:
    """The gradient of padding with the outermost values: (batch, C, h + 2 margin, stride) -> (batch, C, h, width)."""
    if not margin:
        return padded
    padded = padded[..., : width + 2 * margin]
    inner = padded[:, :, margin:-margin, margin:-margin]
    return torch.ops.aten.replication_pad2d_backward(padded, inner, [margin] * 4)


def scalars(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """Numbers as a tensor (count,), to be unpacked to tensors without dimensions."""
    # From pinned memory, the only one that a CUDA device copies from without being waited for
    return torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def soft_round_with_noise(
    values: torch.Tensor, noise: torch.Tensor, temperature: Scalar, sigma: Scalar
) -> tuple[torch.Tensor, torch.Tensor]:
    """Soft rounding, Gaussian noise of deviation `sigma`, soft rounding again (Cool-Chic 5, after C3).

    noise: of deviation 1. Soft rounding is a smooth staircase (Agustsson and Theis, 2020), the identity for high
    temperatures and rounding for low ones: floor(x) + 1/2 + tanh((x - floor(x) - 1/2) / t) / (2 tanh(1 / (2 t))).
    """
    # tanh(x) as 2 / (1 + e^-2x) - 1: torch's sigmoid is four times as fast
    temperature, sigma = (torch.as_tensor(scalar, device=values.device) for scalar in (temperature, sigma))
    height = 1 / torch.tanh(0.5 / temperature)
    floor = values.floor()
    first = (values - floor).sub_(0.5).mul_(2 / temperature).sigmoid_()
    once = floor.addcmul_(first, height).add_(0.5 - 0.5 * height).addcmul_(noise, sigma)
    floor = once.floor()
    second = once.sub_(floor).sub_(0.5).mul_(2 / temperature).sigmoid_()
    twice = floor.addcmul_(second, height).add_(0.5 - 0.5 * height)
    slope = first.mul_(1 - first).mul_(second).mul_(1 - second).mul_((2 * height / temperature) ** 2)
    return twice, slope


def adam(
    values: torch.Tensor,
    gradient: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    betas: tuple[float, float],
    length: Scalar,
    epsilon: Scalar,
) -> None:
    """A step of `training.optimizers.Adam`: moments and values change in place."""
    mean.lerp_(gradient, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    values.sub_((mean / square.sqrt().add_(epsilon)).mul_(length))


def soap(
    values: torch.Tensor,
    gradient: torch.Tensor,
    state: SoapState,
    betas: tuple[float, float],
    covariance_beta: float,
    length: Scalar,
    epsilon: Scalar,
) -> None:
    """A step of `training.optimizers.Soap`: moments, covariances and values change in place."""
    state.mean.lerp_(gradient, 1 - betas[0])
    for first, rows, columns, left, right in state.table:
        own = slice(first, first + rows * columns)
        matrices = gradient[:, own].unflatten(1, (rows, columns))
        left_basis, right_basis = state.matrix(state.bases, left, rows), state.matrix(state.bases, right, columns)
        square = state.square[:, own]
        square.mul_(betas[1]).add_(_rotate(matrices, left_basis, right_basis).square().flatten(1), alpha=1 - betas[1])
        moved = _rotate(state.mean[:, own].unflatten(1, (rows, columns)), left_basis, right_basis)
        moved = moved / square.sqrt().add_(epsilon).view_as(moved)
        if left_basis is not None:
            moved = left_basis @ moved
        if right_basis is not None:
            moved = moved @ right_basis.transpose(1, 2)
        values[:, own].sub_(moved.flatten(1) * length)
        left_covariance = state.matrix(state.covariances, left, rows)
        right_covariance = state.matrix(state.covariances, right, columns)
        if left_covariance is not None:
            left_covariance.lerp_(matrices @ matrices.transpose(1, 2), 1 - covariance_beta)
        if right_covariance is not None:
            right_covariance.lerp_(matrices.transpose(1, 2) @ matrices, 1 - covariance_beta)


def _rotate(matrices: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None) -> torch.Tensor:
    """Matrices (batch, rows, columns) in the eigenbases; None for a side that keeps its basis."""
    if left is not None:
        matrices = left.transpose(1, 2) @ matrices
    return matrices if right is None else matrices @ right


@contextlib.contextmanager
def threads(count: int | None = None) -> Iterator[None]:
    """Nothing to do: torch's operations share the device's threads out by themselves."""
    yield
