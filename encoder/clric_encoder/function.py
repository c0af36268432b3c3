"""The function f_theta as torch code: grids and parameters in, latent and bits out, and the gradients of both.

The same arithmetic as the decoder's integer and numpy code (clric_decoder.context and clric_decoder.synthesis), in
floats, so that what is trained here is what is coded there. Everything carries a batch axis: functions of one
architecture and size, trained together. Grids lie in a `Canvas`; parameters live in a dict keyed by the names of
`clric_decoder.networks.parameter_groups`, each (batch, *shape).

Tensors are small (some 30,000 values for 768x512), so that time goes by the number of operations and by the memory that
they touch, rather than by arithmetic. Operations are therefore few and large, and gradients are written out instead of
left to autograd: `GridBits` and `Synthesis` compute on construction and keep what their `backward` needs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from clric_decoder.bitstream import Architecture, SynthesisLayer
from clric_decoder.context import MAX_ACTIVATION, MAX_CONTEXT, UNIT
from clric_decoder.entropy import SCALE_ZERO, SCALES
from clric_decoder.networks import arm_sizes, parameter_groups

from .canvas import Canvas, Doubling

try:
    from . import kernels
except ImportError:  # numba has no wheel for this machine: torch alone gives the same results in more time
    kernels = None  # type: ignore[assignment]

Networks = dict[str, torch.Tensor]

LOG_SCALE_LOW = -SCALE_ZERO / 8
LOG_SCALE_HIGH = (SCALES - 1 - SCALE_ZERO) / 8
SMALLEST_PROBABILITY = 2.0**-16
LARGEST_ACTIVATION = MAX_ACTIVATION / UNIT


def add_gradients(
    canvas: torch.Tensor,
    networks: Networks,
    architecture: Architecture,
    layout: Canvas,
    targets: torch.Tensor,
    prices: torch.Tensor,
    to_networks: Networks,
    to_canvas: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latent MSE and bits of functions, each (batch,); adds the gradients of latent MSE + price * bits.

    canvas, to_canvas: (batch, rows, stride). targets: (batch, C, h, w) latents. prices: (batch,).
    """
    grid_bits = GridBits(canvas, networks, architecture, layout, prices)
    synthesis = Synthesis(canvas, networks, architecture, layout)
    errors = synthesis.latents - targets
    distortions = errors.square().mean((1, 2, 3))
    synthesis.backward(errors.mul_(2 / errors[0].numel()), to_networks, to_canvas)
    grid_bits.backward(to_networks, to_canvas)  # last, as it may have been computed meanwhile
    return distortions, grid_bits.bits


class Synthesis:
    """The latents (batch, C, h, w) of grids in a canvas (batch, rows, stride): upsampler and synthesis network.

    like, layer: another one of the same canvas and parameters, but for those of this layer and later ones.
    """

    def __init__(
        self,
        canvas: torch.Tensor,
        networks: Networks,
        architecture: Architecture,
        layout: Canvas,
        like: Synthesis | None = None,
        layer: int = 0,
    ) -> None:
        if like is None:
            taps = networks["upsampler"]
            self._upsampled: _Upsampled | kernels.Upsampled = (
                kernels.Upsampled(canvas, taps, layout.places, layout.sizes, layout.ends)
                if compiled(canvas.device)
                else _Upsampled(canvas, taps, layout)
            )
        else:
            self._upsampled = like._upsampled
        biases = networks["synthesis.bias"].split([shape.channels for shape in architecture.synthesis], 1)
        inputs: list[torch.Tensor] = [self._upsampled.outputs] if like is None else like._inputs[: layer + 1]
        self._layers: list[tuple[SynthesisLayer, _Convolved | _CompiledConvolved]]
        self._layers = [] if like is None else like._layers[:layer]
        for number, shape in enumerate(architecture.synthesis[layer:], layer):
            convolution = _CompiledConvolved if compiled(canvas.device) else _Convolved
            convolved = convolution(inputs[-1], networks[f"synthesis.weight{number}"], biases[number])
            self._layers.append((shape, convolved))
            outputs = convolved.outputs
            if shape.residual:
                outputs = outputs + inputs[-shape.residual]
            inputs.append(outputs.relu_() if shape.relu else outputs)
        self._inputs: list[torch.Tensor] = inputs
        self.latents = inputs[-1]

    def backward(self, gradient: torch.Tensor, to_networks: Networks, to_canvas: torch.Tensor) -> None:
        """Adds the gradients of a loss whose gradient by the latents is given; `to_canvas` is (batch, rows, stride)."""
        gradients: list[torch.Tensor | None] = [None] * len(self._layers) + [gradient]
        to_biases = []
        for number in range(len(self._layers) - 1, -1, -1):
            shape, convolved = self._layers[number]
            own = gradients[number + 1]
            assert own is not None  # every layer leads to the next
            if shape.relu:
                own = own * self._inputs[number + 1].sign()  # some ten times faster than threshold_backward
            to_input, to_weight, to_bias = convolved.backward(own)
            to_networks[f"synthesis.weight{number}"] += to_weight
            to_biases.append(to_bias)
            parts = [(number, to_input)]
            if shape.residual:
                parts.append((number + 1 - shape.residual, own))
            for earlier, part in parts:
                other = gradients[earlier]
                gradients[earlier] = part if other is None else part + other
        to_networks["synthesis.bias"] += torch.cat(to_biases[::-1], 1)

        assert gradients[0] is not None
        to_networks["upsampler"] += self._upsampled.backward(gradients[0], to_canvas)


class _Upsampled:
    """All grids of a canvas at the size of the finest, (batch, grids, h, w)."""

    def __init__(self, canvas: torch.Tensor, taps: torch.Tensor, layout: Canvas) -> None:
        """taps: (batch, levels - 1, 4), those of the doubling to each level."""
        self._layout, self._batch = layout, len(canvas)
        grids = layout.split(canvas)
        self._doubled: list[_Doubled] = []
        self.outputs = grids[-1]
        for level in range(len(grids) - 2, -1, -1):
            self._doubled.insert(0, _Doubled(self.outputs, taps[:, level], *layout.doublings[level]))
            self.outputs = torch.cat([grids[level], self._doubled[0].outputs], 1)

    def backward(self, gradient: torch.Tensor, to_canvas: torch.Tensor) -> torch.Tensor:
        """Of the outputs -> of taps; that of the canvas is added to `to_canvas`."""
        to_taps = [gradient.new_zeros(self._batch, 0, 4)]
        for level, place in enumerate(self._layout.split(to_canvas)):
            channels = place.shape[1]
            place += gradient[:, :channels]
            if level < len(self._doubled):
                gradient, to_level_taps = self._doubled[level].backward(gradient[:, channels:])
                to_taps.append(to_level_taps[:, None])
        return torch.cat(to_taps, 1)


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
        to_taps = gradient.new_zeros(batch, 4)
        for axis, inputs, matrix in self._axes:
            outputs = axis.basis.shape[1]
            if axis.blocks * outputs > axis.fine:
                gradient = F.pad(gradient, (0, axis.blocks * outputs - axis.fine))
            gradient = gradient.reshape(batch, -1, outputs)
            to_matrix = torch.bmm(gradient.transpose(1, 2), inputs)
            to_taps.addmm_(to_matrix.flatten(1), axis.basis.flatten(1).T)
            gradient = axis.glue(torch.bmm(gradient, matrix)).view(batch, self._channels, -1, axis.coarse)
            gradient = gradient.transpose(2, 3)  # the lines of the other axis
        return gradient, to_taps


class _Convolved:
    """A convolution at the edges of which the outermost values go on, each of a batch with weights of its own.

    inputs (batch, in, h, w), weight (batch, out, in, k, k), bias (batch, out) -> outputs (batch, out, h, w); depthwise
    where the weight's `in` is 1. In flattened planes a neighbour is the same distance away everywhere; what wraps
    around at the right edge is cut off, and a row more at the bottom lets the last ones read beyond the end.
    """

    def __init__(self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self._shape = batch, _, height, width = inputs.shape
        inputs, weight, bias = _dense(inputs, weight, bias)
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
        to_weight = torch.bmm(flat, _shifted(self._flat, self._shifts, flat.shape[2]).transpose(1, 2))
        to_weight = to_weight.view(batch, outputs, *weight.shape[2:])
        to_bias = flat.sum(2).view(batch, outputs)
        # The same convolution backwards: what an input gives to the outputs around it, the padding's included
        backwards = weight.flip(3, 4).transpose(1, 2).flatten(3)
        around = F.pad(gradient, (2 * margin, 2 * margin, 2 * margin, 2 * margin + 1)) if margin else gradient
        stride, rows = width + 4 * margin, height + 2 * margin
        none = weight.new_zeros(len(weight), weight.shape[2])
        to_inputs = _convolve(around.flatten(2), _shifts(weight.shape[3], stride), backwards, none, rows * stride)
        to_inputs = to_inputs.view(len(weight), -1, rows, stride)
        return _fold(to_inputs, margin, width).reshape(self._shape), to_weight, to_bias


class _CompiledConvolved:
    """The same by compiled loops."""

    def __init__(self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self._shape, self._weight_shape = inputs.shape, weight.shape
        self._inputs, self._weight, bias = _dense(inputs, weight, bias)
        outputs = kernels.convolve(self._inputs, self._weight, bias)
        self.outputs = outputs.view(self._shape[0], -1, *self._shape[2:])

    def backward(self, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `_Convolved.backward`."""
        batch, outputs = gradient.shape[:2]
        gradient = gradient.reshape(len(self._weight), -1, *self._shape[2:])
        to_inputs, to_weight, to_bias = kernels.convolve_backward(gradient, self._inputs, self._weight)
        return to_inputs.view(self._shape), to_weight.view(self._weight_shape), to_bias.view(batch, outputs)


def _dense(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A depthwise convolution as one for each channel, with a batch axis of them all; any other as it is."""
    if weight.shape[2] == inputs.shape[1]:
        return inputs, weight, bias
    return inputs.flatten(0, 1)[:, None], weight.flatten(0, 1)[:, None], bias.reshape(-1, 1)


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


def compiled(device: torch.device) -> bool:
    """Whether functions on a device are computed by compiled loops, which share its threads out by themselves."""
    return kernels is not None and device.type == "cpu"


class GridBits:
    """Bits that the ARM gives to all grid values of each function; on a CPU begun here and waited for where asked for.

    canvas: (batch, rows, stride), zero where the layout's mask is. prices: (batch,), what `backward` multiplies the
    gradients by; None where they are not wanted.
    """

    def __init__(
        self,
        canvas: torch.Tensor,
        networks: Networks,
        architecture: Architecture,
        layout: Canvas,
        prices: torch.Tensor | None = None,
    ) -> None:
        self._canvas = canvas
        levels = range(len(layout.shapes))
        groups = (range(1, len(levels)), range(1)) if architecture.two_arms else (levels,)
        # The compiled ARM knows no other inputs than neighbours
        arm_bits = _CompiledArmBits if compiled(canvas.device) and not len(layout.extras) else _ArmBits
        self._parts = [
            arm_bits(canvas, prices, f"arm{number}", networks, architecture, layout, group)
            for number, group in enumerate(groups)
            if layout.planes[layout.planes_of(group)]
        ]

    @property
    def bits(self) -> torch.Tensor:
        """(batch,)."""
        return sum((part.bits for part in self._parts), self._canvas.new_zeros(len(self._canvas)))

    def backward(self, to_networks: Networks, to_canvas: torch.Tensor) -> None:
        """Adds the gradients of the bits, each function's multiplied by its price; `to_canvas` is as the canvas."""
        for part in self._parts:
            part.backward(to_networks, to_canvas)


def _arm_matrices(networks: Networks, name: str, layers: int) -> list[torch.Tensor]:
    """What each layer multiplies its inputs with, (batch, outputs, inputs)."""
    matrices = [networks[f"{name}.weight{layer}"].clone() for layer in range(layers)]
    for matrix in matrices[:-1]:
        matrix.diagonal(dim1=1, dim2=2).add_(1)  # hidden layers add to their inputs (specification, "Layers")
    return matrices


class _ArmBits:
    """The bits of a part of the canvas by one ARM: neighbours, layers, Laplace distribution."""

    def __init__(
        self,
        canvas: torch.Tensor,
        prices: torch.Tensor | None,
        name: str,
        networks: Networks,
        architecture: Architecture,
        layout: Canvas,
        levels: range,
    ) -> None:
        flat, span = canvas.flatten(1), layout.span(levels)
        self._flat, self._prices, self._name, self._layout, self._span = flat, prices, name, layout, span
        seen = F.pad(flat.clamp(-MAX_CONTEXT, MAX_CONTEXT), (layout.lead, 0))
        biases = networks[f"{name}.bias"].split(arm_sizes(architecture)[1:], 1)
        self._matrices = _arm_matrices(networks, name, len(biases))
        batch, first, count = len(flat), layout.lead + span.start, span.stop - span.start
        inputs = [seen[:, first + distance : first + distance + count] for distance in layout.neighbours]
        inputs += [seen[:, layout.lead + index[span]] for index in layout.extras]
        self._activations = [torch.stack(inputs, 1) if inputs else seen.new_zeros(batch, 0, count)]
        for matrix, bias in zip(self._matrices[:-1], biases[:-1], strict=True):
            hidden = torch.baddbmm(bias[:, :, None], matrix, self._activations[-1])
            self._activations.append(hidden.clamp_(0, LARGEST_ACTIVATION))
        outputs = torch.baddbmm(biases[-1][:, :, None], self._matrices[-1], self._activations[-1])
        mean, self._log_scale = outputs.unbind(1)
        self._rows = layout.plane_numbers[span.start // layout.stride : span.stop // layout.stride]
        self._has_scales = "grid_scales" in networks
        if self._has_scales:
            scales = networks["grid_scales"][:, self._rows, None]
            self._log_scale = (self._log_scale.view(batch, -1, layout.stride) + scales).flatten(1)

        # Laplace, of scale 2^log_scale: the probability of the unit interval around a value is (1 - far) / 2 on one
        # side of the mean, and (1 - near) / 2 on the other if the mean is in the interval
        self._rate = self._log_scale.clamp(LOG_SCALE_LOW, LOG_SCALE_HIGH).neg_().exp2_()
        self._difference = flat[:, span] - mean
        self._outer = self._difference.abs()
        self._inner = 0.5 - self._outer
        self._outer += 0.5
        self._near = self._inner.abs().neg_().mul_(self._rate).exp_()
        self._far = (self._outer * self._rate).neg_().exp_()
        self._probability = (1 - self._far).addcmul_(self._inner.sign(), 1 - self._near).mul_(0.5)
        self._probability.clamp_min_(SMALLEST_PROBABILITY)
        self.bits = -(torch.log2(self._probability) @ layout.mask.flatten()[span])

    def backward(self, to_networks: Networks, to_canvas: torch.Tensor) -> None:
        """Adds gradients."""
        assert self._prices is not None
        to_flat = to_canvas.flatten(1)
        layout, span, rate = self._layout, self._span, self._rate
        batch, first, count = len(to_flat), layout.lead + span.start, span.stop - span.start
        slope = (layout.mask.flatten()[span] * self._prices[:, None]).div_(self._probability).mul_(-0.5 / math.log(2))
        # No gradient from where the probability is at its floor
        slope = torch.ops.aten.threshold_backward(slope, self._probability, SMALLEST_PROBABILITY).mul_(rate)
        by_scale = (self._inner * self._near).addcmul_(self._outer, self._far).mul_(slope).mul_(-math.log(2))
        by_scale = torch.ops.aten.hardtanh_backward(by_scale, self._log_scale, LOG_SCALE_LOW, LOG_SCALE_HIGH)
        by_mean = (self._near - self._far).mul_(self._difference.sign()).mul_(slope)
        to_flat[:, span] -= by_mean

        if self._has_scales:
            to_rows = by_scale.view(batch, -1, layout.stride).sum(2)
            to_networks["grid_scales"].index_add_(1, self._rows, to_rows)
        to_biases = []
        gradient = torch.stack([by_mean, by_scale], 1)
        for layer in range(len(self._matrices) - 1, -1, -1):
            inputs = self._activations[layer]
            to_networks[f"{self._name}.weight{layer}"] += torch.bmm(gradient, inputs.transpose(1, 2))
            to_biases.append(gradient.sum(2))
            gradient = torch.bmm(self._matrices[layer].transpose(1, 2), gradient)
            if layer:
                gradient = torch.ops.aten.hardtanh_backward(gradient, inputs, 0, LARGEST_ACTIVATION)
        to_networks[f"{self._name}.bias"] += torch.cat(to_biases[::-1], 1)

        to_seen = to_flat.new_zeros(batch, layout.lead + to_flat.shape[1])
        for number, distance in enumerate(layout.neighbours):
            to_seen[:, first + distance : first + distance + count] += gradient[:, number]
        for number, index in enumerate(layout.extras, len(layout.neighbours)):
            to_seen.index_add_(1, layout.lead + index[span], gradient[:, number])
        seen = to_seen[:, layout.lead :]
        to_flat += torch.ops.aten.hardtanh_backward(seen, self._flat, -MAX_CONTEXT, MAX_CONTEXT)


class _CompiledArmBits:
    """The same by compiled loops, which find bits and gradients in one go."""

    def __init__(
        self,
        canvas: torch.Tensor,
        prices: torch.Tensor | None,
        name: str,
        networks: Networks,
        architecture: Architecture,
        layout: Canvas,
        levels: range,
    ) -> None:
        self._name = name
        sizes = arm_sizes(architecture)
        matrices = _arm_matrices(networks, name, len(sizes) - 1)
        self._shapes = [matrix.shape for matrix in matrices]
        self._planes = layout.planes_of(levels)
        scales = (
            networks["grid_scales"] if "grid_scales" in networks else canvas.new_zeros(len(canvas), len(layout.planes))
        )
        self._arm_bits = kernels.ArmBits(
            canvas,
            layout.planes[self._planes],
            layout.offsets,
            scales[:, self._planes],
            torch.cat([matrix.flatten(1) for matrix in matrices], 1),
            networks[f"{name}.bias"],
            sizes,
            (MAX_CONTEXT, LARGEST_ACTIVATION, LOG_SCALE_LOW, LOG_SCALE_HIGH, SMALLEST_PROBABILITY),
            prices,
        )

    @property
    def bits(self) -> torch.Tensor:
        """(batch,)."""
        return self._arm_bits.bits

    def backward(self, to_networks: Networks, to_canvas: torch.Tensor) -> None:
        """As `_ArmBits.backward`."""
        by_scales, by_weights, by_biases = self._arm_bits.gradients()
        self._arm_bits.add_to(to_canvas)
        if "grid_scales" in to_networks:
            to_networks["grid_scales"][:, self._planes] += by_scales
        to_networks[f"{self._name}.bias"] += by_biases
        parts = by_weights.split([shape[1:].numel() for shape in self._shapes], 1)
        for layer, part in enumerate(parts):
            to_networks[f"{self._name}.weight{layer}"] += part.view(self._shapes[layer])


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

    def bits_gradient(self, vectors: torch.Tensor) -> torch.Tensor:
        """The gradient of an estimate of the networks' bits, as `vectors`: Laplace, one scale a group.

        n values of mean magnitude m, quantised with a fine step s, cost about n log2(2 e m / s) bits; a step of 2^-6
        is added to the magnitude where the values are near zero.
        """
        differences = vectors - self.defaults
        magnitudes = differences.abs() @ self._averages
        return differences.sign() * ((64 * self._counts / math.log(2) / (64 * magnitudes + 1)) @ self._averages.T)
