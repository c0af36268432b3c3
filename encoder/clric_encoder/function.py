"""The function f_theta as differentiable torch code: grids and parameters in, latent and bits out.

The same arithmetic as the decoder's integer and numpy code (clric_decoder.context and clric_decoder.synthesis), in
floats, so that what is trained here is what is coded there. Everything carries a batch axis: functions of one
architecture and size, trained together. Grids lie in a `Canvas`; parameters live in a dict keyed by the names of
`clric_decoder.networks.parameter_groups`, each (batch, *shape).

Tensors are small (some 30,000 values for 768x512), so that time goes by the number of operations rather than by
arithmetic: operations here are few and large, and the ARM's gradient is written out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from clric_decoder.bitstream import Architecture
from clric_decoder.context import MAX_ACTIVATION, MAX_CONTEXT, UNIT
from clric_decoder.entropy import SCALE_ZERO, SCALES
from clric_decoder.networks import arm_sizes, parameter_groups

from .canvas import Canvas

Networks = dict[str, torch.Tensor]

LOG_SCALE_LOW = -SCALE_ZERO / 8
LOG_SCALE_HIGH = (SCALES - 1 - SCALE_ZERO) / 8
SMALLEST_PROBABILITY = 2.0**-16
LARGEST_ACTIVATION = MAX_ACTIVATION / UNIT


def synthesize(canvas: torch.Tensor, networks: Networks, architecture: Architecture, layout: Canvas) -> torch.Tensor:
    """The latents (batch, C, h, w) of grids in a canvas (batch, rows, stride)."""
    grids = layout.split(canvas)
    stack = grids[-1]
    for level in range(len(grids) - 2, -1, -1):
        taps = networks["upsampler"][:, level]
        rows, columns = (torch.einsum("bt,tij->bij", taps, basis) for basis in layout.upsampling[level])
        wide = torch.bmm(stack.flatten(1, 2), columns.transpose(1, 2)).view(*stack.shape[:3], -1)
        stack = torch.cat([grids[level], rows[:, None] @ wide], 1)

    biases = networks["synthesis.bias"].split([layer.channels for layer in architecture.synthesis], 1)
    inputs = [stack]
    for number, (layer, bias) in enumerate(zip(architecture.synthesis, biases, strict=True)):
        weight = networks[f"synthesis.weight{number}"]
        convolve = _depthwise if layer.depthwise else _Convolve.apply
        outputs = convolve(inputs[-1], weight, bias)
        if layer.residual:
            outputs = outputs + inputs[-layer.residual]
        inputs.append(F.relu(outputs) if layer.relu else outputs)
    return inputs[-1]


class _Convolve(torch.autograd.Function):
    """Convolution at the edges of which the outermost values go on, each of a batch with weights of its own.

    inputs (batch, in, h, w), weight (batch, out, in, k, k), bias (batch, out) -> (batch, out, h, w). As a matrix
    product with shifted copies: torch's convolutions are slow at so few channels.
    """

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = inputs.shape
        kernel = weight.shape[3]
        margin = kernel // 2
        # Neighbours are at fixed distances in the flattened planes; what wraps around at the right edge is cut off.
        stride = width + 2 * margin
        count = height * stride - 2 * margin
        starts = [y * stride + x for y in range(kernel) for x in range(kernel)]
        flat = F.pad(inputs, (margin,) * 4, mode="replicate").flatten(2)
        patches = flat
        if margin:
            patches = torch.stack([flat[:, :, start : start + count] for start in starts], 2).flatten(1, 2)
        product = torch.baddbmm(bias[:, :, None], weight.flatten(2), patches)
        ctx.save_for_backward(weight, patches)
        ctx.geometry = margin, stride, count, starts
        return F.pad(product, (0, 2 * margin)).view(batch, -1, height, stride)[..., :width]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weight, patches = ctx.saved_tensors
        margin, stride, count, starts = ctx.geometry
        batch, _, channels = weight.shape[:3]
        height = gradients[0].shape[2]
        gradient = F.pad(gradients[0], (0, 2 * margin)).flatten(2)[..., :count]
        to_weight = torch.bmm(gradient, patches.transpose(1, 2)).view_as(weight)
        to_bias = gradient.sum(2)
        to_patches = torch.bmm(weight.flatten(2).transpose(1, 2), gradient)
        if not margin:
            return to_patches.view(batch, channels, height, stride), to_weight, to_bias
        to_patches = to_patches.view(batch, channels, len(starts), count)
        flat = gradient.new_zeros(batch, channels, (height + 2 * margin) * stride)
        for number, start in enumerate(starts):
            flat[:, :, start : start + count] += to_patches[:, :, number]
        padded = flat.view(batch, channels, height + 2 * margin, stride)
        to_inputs = torch.ops.aten.replication_pad2d_backward(
            padded, padded[:, :, margin:-margin, margin:-margin], [margin] * 4
        )
        return to_inputs, to_weight, to_bias


def _depthwise(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The same with one input for each output, weight (batch, out, 1, k, k)."""
    kernel = weight.shape[3]
    padded = F.pad(inputs, (kernel // 2,) * 4, mode="replicate")
    filters = weight.reshape(-1, 1, kernel, kernel)
    outputs = F.conv2d(padded.reshape(1, -1, *padded.shape[2:]), filters, bias.reshape(-1), groups=len(filters))
    return outputs.view_as(inputs)


def grid_bits(canvas: torch.Tensor, networks: Networks, architecture: Architecture, layout: Canvas) -> torch.Tensor:
    """Bits that the ARM gives to all grid values of each function, (batch,).

    canvas: (batch, rows, stride), zero where the layout's mask is.
    """
    levels = range(len(layout.shapes))
    total = canvas.new_zeros(len(canvas))
    for number, group in enumerate((range(1, len(levels)), range(1)) if architecture.two_arms else (levels,)):
        if layout.span(group).start == layout.span(group).stop:
            continue
        sizes = arm_sizes(architecture)[1:]
        biases = networks[f"arm{number}.bias"].split(sizes, 1)
        weights = [networks[f"arm{number}.weight{layer}"] for layer in range(len(sizes))]
        scales = networks.get("grid_scales")
        total = total + _GridBits.apply(canvas, layout, layout.span(group), scales, *weights, *biases)
    return total


class _GridBits(torch.autograd.Function):
    """The bits of a part of the canvas by one ARM: neighbours, layers, Laplace distribution, and their gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        canvas: torch.Tensor,
        layout: Canvas,
        span: slice,
        scales: torch.Tensor | None,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        weights, biases = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
        batch, start, count = len(canvas), span.start, span.stop - span.start
        flat = canvas.flatten(1)
        seen = F.pad(flat.clamp(-MAX_CONTEXT, MAX_CONTEXT), (layout.lead, 0))
        first = layout.lead + start
        inputs = [seen[:, first + distance : first + distance + count] for distance in layout.neighbours]
        inputs += [seen[:, layout.lead + index[span]] for index in layout.extras]
        activations = [torch.stack(inputs, 1) if inputs else seen.new_zeros(batch, 0, count)]
        matrices = [weight + torch.eye(*weight.shape[1:], device=weight.device) for weight in weights[:-1]]
        for matrix, bias in zip(matrices, biases, strict=False):
            hidden = torch.baddbmm(bias[:, :, None], matrix, activations[-1])
            activations.append(hidden.clamp_(0, LARGEST_ACTIVATION))
        mean, log_scale = torch.baddbmm(biases[-1][:, :, None], weights[-1], activations[-1]).unbind(1)
        if scales is not None:
            rows = layout.planes[start // layout.stride : span.stop // layout.stride]
            log_scale = (log_scale.view(batch, -1, layout.stride) + scales[:, rows, None]).flatten(1)
        mask = layout.mask.flatten()[span]
        bits, by_distance, by_scale = _laplace(flat[:, span] - mean, log_scale, mask)
        ctx.save_for_backward(canvas, by_distance, by_scale, scales, *weights[-1:], *matrices, *activations)
        ctx.layout, ctx.span, ctx.layers = layout, span, len(weights)
        return bits.sum(1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        canvas, by_distance, by_scale, scales, last, *rest = ctx.saved_tensors
        layout, span, layers = ctx.layout, ctx.span, ctx.layers
        matrices, activations = [*rest[: layers - 1], last], rest[layers - 1 :]
        batch, start, count = len(canvas), span.start, span.stop - span.start
        by_distance, by_scale = by_distance * gradients[0][:, None], by_scale * gradients[0][:, None]

        to_scales = None
        if scales is not None:
            rows = layout.planes[start // layout.stride : span.stop // layout.stride]
            to_rows = by_scale.view(batch, -1, layout.stride).sum(2)
            to_scales = torch.zeros_like(scales).index_add_(1, rows, to_rows)
        to_weights, to_biases = [], []
        gradient = torch.stack([-by_distance, by_scale], 1)
        for matrix, inputs in zip(reversed(matrices), reversed(activations), strict=True):
            to_weights.append(torch.bmm(gradient, inputs.transpose(1, 2)))
            to_biases.append(gradient.sum(2))
            gradient = torch.bmm(matrix.transpose(1, 2), gradient)
            if inputs is not activations[0]:
                gradient = torch.ops.aten.hardtanh_backward(gradient, inputs, 0, LARGEST_ACTIVATION)

        flat = canvas.flatten(1)
        seen = canvas.new_zeros(batch, layout.lead + flat.shape[1])
        first = layout.lead + start
        for number, distance in enumerate(layout.neighbours):
            seen[:, first + distance : first + distance + count] += gradient[:, number]
        for number, index in enumerate(layout.extras, len(layout.neighbours)):
            seen.index_add_(1, layout.lead + index[span], gradient[:, number])
        to_canvas = torch.ops.aten.hardtanh_backward(seen[:, layout.lead :], flat, -MAX_CONTEXT, MAX_CONTEXT)
        to_canvas[:, span] += by_distance
        to_parameters = [*reversed(to_weights), *reversed(to_biases)]
        return to_canvas.view_as(canvas), None, None, to_scales, *to_parameters


def _laplace(
    difference: torch.Tensor, log_scale: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bits of unit intervals around `difference` from the mean of Laplace distributions of scale 2^log_scale.

    Also their derivatives by the difference and by the logarithm of the scale. All (batch, n), zero where the mask is.
    """
    rate = torch.exp2(-log_scale.clamp(LOG_SCALE_LOW, LOG_SCALE_HIGH))
    distance = difference.abs()
    inner, outer = 0.5 - distance, 0.5 + distance
    near = torch.exp(-inner.abs() * rate)
    far = torch.exp(-outer * rate)
    # (1 - far) / 2 on one side of the mean, and (1 - near) / 2 on the other if the mean is in the interval
    probability = (1 - far).addcmul_(inner.sign(), 1 - near).mul_(0.5).clamp_min_(SMALLEST_PROBABILITY)
    bits = -torch.log2(probability) * mask
    # No gradient from where the probability is at its floor
    slope = torch.ops.aten.threshold_backward(mask / (probability * -math.log(2)), probability, SMALLEST_PROBABILITY)
    slope = slope * rate
    by_distance = slope * (far - near) * difference.sign() * 0.5
    by_scale = slope * (inner * near + outer * far) * (-0.5 * math.log(2))
    by_scale = torch.ops.aten.hardtanh_backward(by_scale, log_scale, LOG_SCALE_LOW, LOG_SCALE_HIGH)
    return bits, by_distance, by_scale


class Packing:
    """All parameters of a function as one vector, in the order of `parameter_groups`.

    defaults: (parameters,) default set 0.
    """

    def __init__(self, architecture: Architecture, device: torch.device) -> None:
        self.groups = parameter_groups(architecture)
        self.sizes = [group.size for group in self.groups]
        values = [torch.tensor(group.default, dtype=torch.float32).expand(group.shape) for group in self.groups]
        self.defaults = torch.cat([value.flatten() for value in values]).to(device)
        members = [torch.full((size, 1), 1 / max(size, 1)) for size in self.sizes]
        self._averages = torch.block_diag(*members).to(device)
        self._counts = torch.tensor(self.sizes, dtype=torch.float32, device=device)

    def split(self, vectors: torch.Tensor) -> Networks:
        """(batch, parameters) -> views by the names of the groups, each (batch, *shape)."""
        parts = vectors.split(self.sizes, 1)
        return {
            group.name: part.view(len(vectors), *group.shape) for group, part in zip(self.groups, parts, strict=True)
        }

    def join(self, networks: Networks) -> torch.Tensor:
        """The inverse of `split`, copied."""
        return torch.cat([networks[group.name].flatten(1) for group in self.groups], 1)

    def bits(self, vectors: torch.Tensor) -> torch.Tensor:
        """A differentiable estimate of the networks' bits, up to a constant, (batch,): Laplace, one scale a group.

        n values of mean magnitude m, quantised with a fine step s, cost about n log2(2 e m / s) bits; a step of 2^-6
        is added to the magnitude where the values are near zero.
        """
        magnitudes = (vectors - self.defaults).abs() @ self._averages
        return torch.log2(magnitudes * 64 + 1) @ self._counts
