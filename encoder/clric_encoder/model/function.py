"""The function f_theta: grids and parameters in, latent and bits out, and the gradients of both.

The same arithmetic as the decoder's integer and numpy code (clric_decoder.context and clric_decoder.synthesis), in
floats, so that what is trained here is what is coded there. Everything carries a batch axis: functions of one
architecture and size, trained together. Grids lie in one plane (`GridLayout`); parameters live in a dict keyed by the
names of `clric_decoder.networks.parameter_groups`, each (batch, *shape).

`grid_bits` and `Synthesis` compute at once and keep what their `backward` needs.
"""

from __future__ import annotations

import math

import torch
from clric_decoder.bitstream import Architecture, SynthesisLayer
from clric_decoder.networks import parameter_groups

from .backends import Convolved, GridBits, Networks, Upsampled, backend_for
from .grid_layout import GridLayout


class Synthesis:
    """The latents (batch, C, h, w) of grids in a plane (batch, rows, stride): upsampler and synthesis network.

    like, layer: another one of the same grids and parameters, but for those of this layer and later ones.
    """

    def __init__(
        self,
        packed: torch.Tensor,
        networks: Networks,
        architecture: Architecture,
        layout: GridLayout,
        like: Synthesis | None = None,
        layer: int = 0,
    ) -> None:
        backend = backend_for(packed.device)
        if like is None:
            taps = networks["upsampler"] if len(layout.shapes) > 1 else packed.new_zeros(len(packed), 0, 4)
            self._upsampled: Upsampled = backend.Upsampled(packed, taps, layout)
        else:
            self._upsampled = like._upsampled
        biases = networks["synthesis.bias"].split([shape.channels for shape in architecture.synthesis], 1)
        inputs: list[torch.Tensor] = [self._upsampled.outputs] if like is None else like._inputs[: layer + 1]
        self._layers: list[tuple[SynthesisLayer, Convolved]]
        self._layers = [] if like is None else like._layers[:layer]
        for number, shape in enumerate(architecture.synthesis[layer:], layer):
            convolved = backend.Convolved(inputs[-1], networks[f"synthesis.weight{number}"], biases[number])
            self._layers.append((shape, convolved))
            outputs = convolved.outputs
            if shape.residual:
                outputs = outputs + inputs[-shape.residual]
            inputs.append(outputs.relu_() if shape.relu else outputs)
        self._inputs: list[torch.Tensor] = inputs
        self.latents = inputs[-1]

    def backward(self, gradient: torch.Tensor, grad_networks: Networks, grad_packed: torch.Tensor) -> None:
        """Adds the gradients of a loss, whose gradient by the latents is given; `grad_packed` is as `packed`."""
        gradients: list[torch.Tensor | None] = [None] * len(self._layers) + [gradient]
        grad_biases = []
        for number in range(len(self._layers) - 1, -1, -1):
            shape, convolved = self._layers[number]
            own = gradients[number + 1]
            assert own is not None  # every layer leads to the next
            if shape.relu:
                own = own * self._inputs[number + 1].sign()  # some ten times faster than threshold_backward
            grad_input, grad_weight, grad_bias = convolved.backward(own)
            grad_networks[f"synthesis.weight{number}"] += grad_weight
            grad_biases.append(grad_bias)
            parts = [(number, grad_input)]
            if shape.residual:
                parts.append((number + 1 - shape.residual, own))
            for earlier, part in parts:
                other = gradients[earlier]
                gradients[earlier] = part if other is None else part + other
        grad_networks["synthesis.bias"] += torch.cat(grad_biases[::-1], 1)

        assert gradients[0] is not None
        grad_taps = self._upsampled.backward(gradients[0], grad_packed)
        if "upsampler" in grad_networks:
            grad_networks["upsampler"] += grad_taps


def grid_bits(
    packed: torch.Tensor,
    networks: Networks,
    architecture: Architecture,
    layout: GridLayout,
    rate_weights: torch.Tensor | None = None,
) -> GridBits:
    """Bits that the ARM gives to all grid values of each function. Starts asynchronously on a CPU; `bits` joins.

    packed: (batch, rows, stride), zero where the layout's mask is. rate_weights: (batch,), what `backward`
    multiplies the gradients by; None where they are not wanted.
    """
    return backend_for(packed.device).GridBits(packed, rate_weights, networks, architecture, layout)


class Packing:
    """All parameters of a function as one vector, in the order of `parameter_groups`.

    defaults: (parameters,).
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
