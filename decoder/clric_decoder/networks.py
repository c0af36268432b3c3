"""The function's parameters: their shapes, their coding, and what they cost (specification, "Networks").

Each group of parameters is coded as integers: a value is its default plus integer * 2^-exponent, with one
exponent a group. The ARM computes with the integers themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .bitstream import Architecture, Header
from .entropy import (
    FRACTIONS,
    SCALE_ZERO,
    RangeEncoder,
    decode_integers,
    encode_integers,
    ideal_bits,
    range_decoder,
)
from .errors import StreamError

# Bicubic interpolation (a = -3/4) half-way between samples, as taps of one of the two phases
BICUBIC = (-0.03515625, 0.26171875, 0.87890625, -0.10546875)
MAX_INTEGER = 32767
ARM_MAX_WEIGHT = 127
ARM_MAX_WEIGHT_EXPONENT = 8
ARM_MAX_BIAS = 2047
ARM_MAX_BIAS_EXPONENT = 5
GRID_SCALE_MAX = 127
GRID_SCALE_MAX_EXPONENT = 3


@dataclass(frozen=True)
class Group:
    """Parameters that share an exponent.

    max_integer: limit of the integers' magnitude; where ``fixed_point`` is set, only at the largest exponent, and
    half of it for each exponent less, so that the limit is one of the value. default: values of integers 0.
    """

    name: str
    shape: tuple[int, ...]
    max_integer: int = MAX_INTEGER
    max_exponent: int = 15
    fixed_point: bool = False
    default: float | tuple[float, ...] = 0.0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def limit(self, exponent: int) -> int:
        """Largest magnitude of an integer with this exponent."""
        return self.max_integer >> (self.max_exponent - exponent) if self.fixed_point else self.max_integer


@dataclass(frozen=True)
class Parameters:
    """The coded values of one group: integers (shape of the group) int32."""

    group: Group
    exponent: int
    integers: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """The parameters, (shape of the group) float32."""
        default = np.broadcast_to(np.array(self.group.default, np.float32), self.group.shape)
        return (default + self.integers * 2.0**-self.exponent).astype(np.float32)


def arm_sizes(architecture: Architecture) -> tuple[int, ...]:
    """Widths of the ARM's activations, from its inputs to its two outputs."""
    return (architecture.neighbours, *(architecture.width,) * architecture.hidden_layers, 2)


def parameter_groups(architecture: Architecture) -> tuple[Group, ...]:
    """All groups in coding order (specification, "Groups")."""
    groups = []
    sizes = arm_sizes(architecture)
    for number, (inputs, outputs) in enumerate(pairwise(sizes)):
        groups.append(Group(f"arm.weight{number}", (outputs, inputs), ARM_MAX_WEIGHT, ARM_MAX_WEIGHT_EXPONENT))
    groups.append(Group("arm.bias", (sum(sizes[1:]),), ARM_MAX_BIAS, ARM_MAX_BIAS_EXPONENT, True))
    if architecture.grid_scales:
        grids = (sum(architecture.channels),)
        groups.append(Group("grid_scales", grids, GRID_SCALE_MAX, GRID_SCALE_MAX_EXPONENT, True))
    if len(architecture.channels) > 1:
        groups.append(Group("upsampler", (len(architecture.channels) - 1, 4), default=BICUBIC))
    inputs = sum(architecture.channels)
    for number, layer in enumerate(architecture.synthesis):
        shape = (layer.channels, 1 if layer.depthwise else inputs, layer.kernel, layer.kernel)
        groups.append(Group(f"synthesis.weight{number}", shape))
        inputs = layer.channels
    groups.append(Group("synthesis.bias", (sum(layer.channels for layer in architecture.synthesis),)))
    return tuple(groups)


def count_parameters(header: Header) -> int:
    """Number of parameters of the networks."""
    return sum(group.size for group in parameter_groups(header.architecture))


def mac_per_pixel(header: Header) -> dict[str, float]:
    """Multiply-accumulates of the function per image pixel: ``arm``, ``upsampler``, ``synthesis``.

    Exact: one evaluation of the ARM for each value of a level that is not empty, four taps for each row- and each
    column-upsampled sample, one for each weight of a synthesis layer and latent position.
    """
    architecture = header.architecture
    sizes = arm_sizes(architecture)
    shapes = header.grid_shapes
    values = sum(math.prod(shape) for shape, size in zip(shapes, header.level_bytes, strict=True) if size)
    arm = values * sum(a * b for a, b in pairwise(sizes))
    upsampler = 0
    for level in range(1, len(shapes)):
        stacked = sum(architecture.channels[level:])
        (_, height, width), (_, _, coarse_width) = shapes[level - 1], shapes[level]
        upsampler += 4 * stacked * height * (coarse_width + width)
    weights = sum(g.size for g in parameter_groups(architecture) if g.name.startswith("synthesis.weight"))
    synthesis = weights * header.latent_height * header.latent_width
    pixels = header.width * header.height
    return {"arm": arm / pixels, "upsampler": upsampler / pixels, "synthesis": synthesis / pixels}


def _table(scale_code: int) -> int:
    """Table of a group's scale code, 1 to 15: half octaves from b = 2^-3 to b = 2^4."""
    return (SCALE_ZERO - 24 + 4 * (scale_code - 1)) * FRACTIONS


def _bits_by_scale(integers: np.ndarray) -> np.ndarray:
    """Bits that a group's integers cost with each of the scale codes from 1 on, (15,) float64."""
    tables = np.array([[_table(code)] for code in range(1, 16)])
    return ideal_bits(integers.reshape(-1), np.zeros(integers.size, np.int64), tables).sum(1)


def _scale_code(integers: np.ndarray) -> int:
    """The scale code that codes a group's integers in the fewest bits; 0 says that all are zero."""
    return 1 + int(np.argmin(_bits_by_scale(integers))) if integers.any() else 0


def integer_bits(integers: np.ndarray) -> float:
    """Bits that a group's integers cost in the stream, without the group's 8 bits."""
    return float(_bits_by_scale(integers).min()) if integers.any() else 0.0


def encode_networks(networks: list[Parameters]) -> bytes:
    """The networks segment: for each group 4 bits of exponent, 4 bits of scale code, then its integers."""
    coder = RangeEncoder()
    for parameters in networks:
        integers = parameters.integers.reshape(-1).astype(np.int64)
        code = _scale_code(integers)
        coder.bits(parameters.exponent, 4)
        coder.bits(code, 4)
        if code:
            means = np.zeros_like(integers)
            encode_integers(coder, integers, means, means + _table(code))
    return coder.finish()


def decode_networks(data: bytes, architecture: Architecture) -> list[Parameters]:
    """The parameters of every group, in the order of `parameter_groups`.

    Raises StreamError where an integer or an exponent is over its group's limit.
    """
    decoder = range_decoder(data)
    networks = []
    for group in parameter_groups(architecture):
        exponent, code = decoder.bits(4), decoder.bits(4)
        if exponent > group.max_exponent:
            raise StreamError("payload", f"{group.name} has exponent {exponent}, over {group.max_exponent}")
        integers = np.zeros(group.size, np.int64)
        if code:
            integers = decode_integers(decoder, integers, integers + _table(code))
        if np.abs(integers).max() > group.limit(exponent):
            raise StreamError("payload", f"{group.name} has an integer over {group.limit(exponent)}")
        networks.append(Parameters(group, exponent, integers.astype(np.int32).reshape(group.shape)))
    return networks
