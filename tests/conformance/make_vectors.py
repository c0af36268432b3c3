"""Makes the conformance suite: valid and invalid streams, the expected results, and the manifest.

The valid streams hold random networks and grids, not images: what they are for is to reach every corner of the
specification. The expected networks and grids are those that were put in, and the expected latents come from the
reference decoder; the product only codes the segments. Run it after a change of the format or of the registered
networks:

    python tests/conformance/make_vectors.py
"""

from __future__ import annotations

import hashlib
import json
import sys
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from clric_decoder.bitstream import (
    METADATA,
    REGISTERED_FUNCTIONS,
    WITH_NETWORKS,
    Architecture,
    SynthesisLayer,
    grid_shapes,
    registered_architecture,
)
from clric_decoder.context import build_arms, encode_level
from clric_decoder.entropy import ESCAPE_HIGH, RangeEncoder
from clric_decoder.models import LATENT_SPACES
from clric_decoder.networks import Parameters, decode_networks, encode_networks, parameter_groups
from clric_decoder.registered_networks import registered_networks

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import reference_decoder  # noqa: E402

DEFAULT = registered_architecture(1)
INSTANT = registered_architecture(WITH_NETWORKS[0])
MAX_PIXELS_PER_BYTE = 1 << 14  # section 12


@dataclass(frozen=True)
class Case:
    """One valid stream: an architecture, a size, and how large its grid values and parameters are.

    function: by which the header names the architecture; None for the number that is registered for it, or 0.
    metadata: types and contents of the entries; None for a header without. stored_networks: what stands where the
    networks are, other than these. edit, edit_networks: change the grids, and the networks.
    """

    name: str
    width: int = 48
    height: int = 40
    space: str = "sd1"
    architecture: Architecture = DEFAULT
    grid_scale: float = 1.5
    parameter_scale: float = 6.0
    exponents: tuple[int, int] = (3, 8)
    function: int | None = None
    image_decoder: int = 0
    metadata: tuple[tuple[int, bytes], ...] | None = None
    stored_networks: bytes | None = None
    edit: Callable[[list[np.ndarray]], None] = field(default=lambda grids: None)
    edit_networks: Callable[[list[Parameters]], None] = field(default=lambda networks: None)

    @property
    def channels(self) -> int:
        """Of the latent."""
        return self.architecture.synthesis[-1].channels

    @property
    def number(self) -> int:
        """Of the function."""
        if self.function is not None:
            return self.function
        description = self.architecture.to_bytes()
        numbers = [number for number, known in REGISTERED_FUNCTIONS.items() if known == description]
        return numbers[0] if numbers else 0


@dataclass(frozen=True)
class Made:
    """A valid stream and what was put into it.

    header: what it says, by the names of `clric-dec --probe`. networks: those that a decoder must use. grids: the
    finest first.
    """

    data: bytes
    header: dict[str, Any]
    networks: list[Parameters]
    grids: list[np.ndarray]


def leb128(value: int) -> bytes:
    """Section 3."""
    parts = [value >> shift & 127 | 128 for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([*parts[:-1], parts[-1] & 127])


def sealed(body: bytes) -> bytes:
    """A body with its right checksum, so that only a planted fault is wrong."""
    return body + zlib.crc32(body).to_bytes(4, "big")


def metadata_segment(entries: Iterable[tuple[int, bytes]]) -> bytes:
    """Section 3.4."""
    return b"".join(bytes([kind]) + leb128(len(content)) + content for kind, content in entries)


def header_fields(case: Case, metadata: bytes | None, networks: bytes, levels: list[bytes]) -> bytes:
    """The header of a case (section 3). levels: the finest first."""
    space = LATENT_SPACES.get(case.space)
    flags = (space.number if space else 0) | (metadata is not None) << 4 | case.image_decoder << 5
    parts = [b"\xc7LR", bytes([1, flags]), case.width.to_bytes(2, "big"), case.height.to_bytes(2, "big")]
    if space is None:
        parts += [bytes([case.channels]), bytes.fromhex(case.space.removeprefix("custom-"))]
    parts += [bytes([case.number]), b"" if case.number else case.architecture.to_bytes()]
    parts += [] if metadata is None else [leb128(len(metadata))]
    coarse = [level for c, level in zip(case.architecture.channels, levels, strict=True) if c]
    if case.architecture.channels[0]:
        del coarse[0]
    return b"".join([*parts, leb128(len(networks)), *(leb128(len(level)) for level in coarse[::-1])])


def container(case: Case, networks: bytes, levels: list[bytes], metadata: bytes | None = None) -> bytes:
    """A whole stream (section 2)."""
    return sealed(b"".join([header_fields(case, metadata, networks, levels), metadata or b"", networks, *levels[::-1]]))


def padded(case: Case, networks: bytes, levels: list[bytes], metadata: bytes | None = None) -> bytes:
    """The networks segment with the zeros that an image of many pixels may need (section 12)."""
    payload = len(metadata or b"") + len(networks) + sum(map(len, levels))
    return networks + bytes(max(0, -(-case.width * case.height // MAX_PIXELS_PER_BYTE) - payload))


def with_synthesis(architecture: Architecture, channels: int, *layers: SynthesisLayer) -> Architecture:
    return replace(architecture, synthesis=(*layers, SynthesisLayer(channels)))


ICC = 1, b"an ICC profile"
EXIF = 2, b"II*\0\x08\0\0\0\0\0\0\0\0\0"
XMP = 3, b'<x:xmpmeta xmlns:x="adobe:ns:meta/"/>'


def _extremes(grids: list[np.ndarray]) -> None:
    grids[0].reshape(-1)[:8] = [32767, -32767, 64, -64, 31, -32, 1000, -1000]


def _empty_levels(grids: list[np.ndarray]) -> None:
    for grid in grids[1::2]:
        grid[:] = 0


def _all_zero(grids: list[np.ndarray]) -> None:
    for grid in grids:
        grid[:] = 0


def _one_value(grids: list[np.ndarray]) -> None:
    _all_zero(grids)
    grids[0][0, -1, -1] = 1


def _one_value_first(grids: list[np.ndarray]) -> None:
    _all_zero(grids)
    grids[0][0, 0, 0] = 1


def _far_escape(grids: list[np.ndarray]) -> None:
    grids[0][0, 0, 0] = -32767


def _worked_example(grids: list[np.ndarray]) -> None:
    grids[0][:] = [[[2, -1]]]


def _largest_sums(networks: list[Parameters]) -> None:
    """The largest accumulators that section 7.3 allows: all weights and biases at one end of what is legal."""
    for parameters in networks:
        if parameters.group.name.startswith("arm."):
            parameters.integers[:] = parameters.group.limit(parameters.exponent)
    # The mean goes to its lower end, the scale to its upper one
    last = [parameters for parameters in networks if parameters.group.name.startswith("arm.weight")][-1]
    last.integers[0] *= -1


ONE_LEVEL = replace(DEFAULT, channels=(4,))
WIDEST_ARM = replace(ONE_LEVEL, channels=(1,), hidden_layers=4, width=48)
DEEP = SynthesisLayer(8, kernel=3, relu=True, depthwise=True)
CASES = [
    Case("size-1x1", 1, 1),
    Case("size-7x5", 7, 5),
    Case("size-8x8", 8, 8),
    Case("size-9x8", 9, 8),
    Case("size-odd-131x77", 131, 77),
    Case("size-portrait-40x200", 40, 200),
    Case("size-line-65535x1", 65535, 1, grid_scale=0.4),
    Case("size-line-1x2049", 1, 2049),
    Case("space-sdxl", space="sdxl"),
    Case("space-sd3", space="sd3", architecture=with_synthesis(DEFAULT, 16, SynthesisLayer(12, relu=True))),
    Case(
        "space-flux1",
        space="flux1",
        architecture=with_synthesis(replace(DEFAULT, channels=(16, 1, 1)), 16, SynthesisLayer(24, relu=True)),
    ),
    Case(
        "space-flux2",
        space="flux2",
        architecture=with_synthesis(
            replace(DEFAULT, channels=(32, 2)), 32, SynthesisLayer(34, kernel=3, depthwise=True)
        ),
    ),
    Case(
        "space-clric",
        space="clric",
        architecture=with_synthesis(replace(DEFAULT, channels=(8, 1)), 8, SynthesisLayer(9, depthwise=True)),
    ),
    Case(
        "space-custom",
        space="custom-00c1e2f3a4b5968f",
        architecture=with_synthesis(replace(DEFAULT, channels=(3, 1)), 3),
    ),
    Case("space-custom-1", space="custom-0000000000000000", architecture=with_synthesis(ONE_LEVEL, 1)),
    Case("space-custom-64", 17, 9, space="custom-ffffffffffffffff", architecture=with_synthesis(ONE_LEVEL, 64)),
    Case("function-2", architecture=registered_architecture(2)),
    Case("function-3", space="sd3", architecture=registered_architecture(3)),
    Case("function-4", 24, 24, space="flux2", architecture=registered_architecture(4)),
    Case("function-5", space="flux1", architecture=registered_architecture(5)),
    Case("function-6", 24, 24, space="flux2", architecture=registered_architecture(6)),
    Case("function-7", space="clric", architecture=registered_architecture(7)),
    Case("function-7-in-custom-space", space="custom-0123456789abcdef", architecture=registered_architecture(7)),
    Case("function-1-described", function=0),
    *(Case(f"function-{number}", space="clric", architecture=INSTANT, function=number) for number in WITH_NETWORKS),
    Case("function-8-wide", space="clric", architecture=INSTANT, function=8, grid_scale=40.0),
    Case(
        "function-9-padded",
        space="clric",
        architecture=INSTANT,
        function=9,
        stored_networks=bytes(20),  # zeros, which would decode to other networks were they read
    ),
    Case("function-10-skipped", space="clric", architecture=INSTANT, function=10, stored_networks=b"\xff" * 20),
    Case("function-11-blank", 128, 128, "clric", INSTANT, function=11, edit=_all_zero),
    Case("function-8-described", space="clric", architecture=INSTANT, function=0),
    Case("image-decoder-sd1-1", image_decoder=1),
    Case("image-decoder-clric-1", space="clric", architecture=INSTANT, function=12, image_decoder=1),
    Case("image-decoder-unknown", space="sdxl", image_decoder=7),
    Case("image-decoder-custom", 9, 9, "custom-00c1e2f3a4b5968f", with_synthesis(ONE_LEVEL, 3), image_decoder=4),
    Case("metadata-none", metadata=()),
    Case("metadata-icc", metadata=(ICC,)),
    Case("metadata-exif", metadata=(EXIF,)),
    Case("metadata-xmp", metadata=(XMP,)),
    Case("metadata-all", metadata=(ICC, EXIF, XMP), image_decoder=1),
    Case("metadata-reversed", metadata=(XMP, EXIF, ICC)),
    Case("metadata-empty-entry", metadata=((3, b""),)),
    Case("metadata-unknown", metadata=((0, b"zero"), XMP, (4, b""), (127, b"\xff" * 200))),
    Case("metadata-repeated", metadata=(XMP, ICC, (3, b"the second, which does not count"), ICC)),
    Case("metadata-of-16384-bytes", metadata=((1, b"profile." * 2048),)),
    Case("metadata-and-function-10", space="clric", architecture=INSTANT, function=10, metadata=(ICC, (9, b""))),
    Case("arm-one-neighbour", architecture=replace(DEFAULT, neighbours=1)),
    *(Case(f"arm-{n}-neighbours", 56, 40, architecture=replace(ONE_LEVEL, neighbours=n)) for n in range(2, 8)),
    Case("arm-linear", architecture=replace(DEFAULT, hidden_layers=0)),
    Case("arm-linear-no-scales", architecture=replace(DEFAULT, hidden_layers=0, width=48, grid_scales=False)),
    Case("arm-deep-narrow", architecture=replace(DEFAULT, hidden_layers=4, width=1)),
    Case("arm-narrower-than-its-inputs", architecture=replace(DEFAULT, width=3)),
    Case("arm-widest", 24, 24, architecture=WIDEST_ARM),
    Case("arm-saturated", parameter_scale=90.0, grid_scale=30.0),
    Case(
        "arm-largest-sums-exponent-8",
        40,
        40,
        architecture=WIDEST_ARM,
        exponents=(8, 8),
        grid_scale=90.0,
        edit_networks=_largest_sums,
    ),
    Case(
        "arm-largest-sums-exponent-0",
        40,
        40,
        architecture=WIDEST_ARM,
        exponents=(0, 0),
        grid_scale=90.0,
        parameter_scale=1.0,
        edit_networks=_largest_sums,
    ),
    Case("exponents-0", exponents=(0, 0), parameter_scale=1.0),
    Case("exponents-2", exponents=(2, 2)),
    Case("exponents-15", exponents=(15, 15), parameter_scale=1000.0),
    Case("grids-paper", architecture=replace(DEFAULT, channels=(1,) * 7, grid_scales=False)),
    Case("grids-sixteen-levels", architecture=replace(DEFAULT, channels=(1,) * 16)),
    Case("grids-single-level", architecture=ONE_LEVEL),
    Case("grids-none-at-finest", architecture=replace(DEFAULT, channels=(0, 0, 2, 1))),
    Case("grids-gap", architecture=replace(DEFAULT, channels=(2, 0, 3))),
    Case("grids-128-channels", 24, 24, architecture=replace(DEFAULT, channels=(64, 63, 0, 1))),
    Case("values-extreme", edit=_extremes),
    Case("values-wide", grid_scale=300.0),
    Case(
        "values-far-escape",
        architecture=replace(DEFAULT, channels=(1,)),
        edit=_far_escape,
        parameter_scale=0.0,
    ),
    Case("values-1000-a-byte", 80, 800, architecture=replace(DEFAULT, channels=(1,)), edit=_one_value_first),
    Case("values-empty-levels", edit=_empty_levels),
    Case("values-all-zero", edit=_all_zero),
    Case("values-single-one", width=256, height=256, parameter_scale=0.0, edit=_one_value),
    Case(
        "values-blank-and-padded",
        1024,
        1024,
        "custom-00c1e2f3a4b5968f",
        with_synthesis(ONE_LEVEL, 1),
        parameter_scale=0.0,
        edit=_all_zero,
    ),
    Case("networks-default", parameter_scale=0.0),
    Case("networks-empty", parameter_scale=0.0, exponents=(0, 0), stored_networks=b""),
    Case("networks-with-zeros-after", parameter_scale=0.0, exponents=(0, 0), stored_networks=bytes(100)),
    Case("synthesis-linear", architecture=with_synthesis(DEFAULT, 4)),
    Case(
        "synthesis-eight-layers",
        architecture=replace(
            DEFAULT,
            synthesis=(
                SynthesisLayer(8, relu=True),
                DEEP,
                SynthesisLayer(8, residual=2),
                SynthesisLayer(8, kernel=3, residual=3),
                SynthesisLayer(8, kernel=3, residual=1, relu=True),
                SynthesisLayer(8, depthwise=True, residual=1),
                SynthesisLayer(4),
                SynthesisLayer(4, kernel=3, residual=1),
            ),
        ),
    ),
    Case(
        "synthesis-residual-before-relu",
        architecture=with_synthesis(ONE_LEVEL, 4, SynthesisLayer(4, residual=1, relu=True), SynthesisLayer(9, 3)),
    ),
    Case("synthesis-ends-with-relu", architecture=replace(ONE_LEVEL, synthesis=(SynthesisLayer(4, 3, relu=True),))),
    Case(
        "synthesis-32768-weights",
        16,
        16,
        "custom-00c1e2f3a4b5968f",
        replace(ONE_LEVEL, channels=(64,), synthesis=(SynthesisLayer(64),) * 8),
        parameter_scale=1.0,
        exponents=(5, 5),
    ),
    Case(
        "worked-example",
        16,
        8,
        architecture=Architecture(
            channels=(1,),
            neighbours=2,
            hidden_layers=0,
            width=1,
            grid_scales=False,
            synthesis=(SynthesisLayer(4),),
        ),
        parameter_scale=3.0,
        exponents=(3, 4),
        edit=_worked_example,
    ),
]


def make_valid(case: Case) -> Made:
    """The stream of a case; what is random in it depends on the case's name."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    networks = []
    for group in parameter_groups(case.architecture):
        low, high = (min(exponent, group.max_exponent) for exponent in case.exponents)
        exponent = int(rng.integers(low, high + 1))
        integers = np.rint(rng.laplace(scale=max(case.parameter_scale, 1e-9), size=group.shape))
        limit = group.limit(exponent)
        networks.append(Parameters(group, exponent, np.clip(integers, -limit, limit).astype(np.int32)))
    case.edit_networks(networks)
    if case.number in WITH_NETWORKS:
        networks = decode_networks(registered_networks()[case.number], case.architecture)
    shapes = grid_shapes(case.architecture.channels, -(-case.height // 8), -(-case.width // 8))
    grids = [np.rint(rng.laplace(scale=case.grid_scale, size=shape)).astype(np.int32) for shape in shapes]
    case.edit(grids)
    arms = build_arms(networks, case.architecture)
    levels = [encode_level(grid, arm, case.architecture) for grid, arm in zip(grids, arms, strict=True)]
    metadata = None if case.metadata is None else metadata_segment(case.metadata)
    segment = case.stored_networks
    if segment is None:
        segment = b"" if case.number in WITH_NETWORKS else encode_networks(networks)
    segment = padded(case, segment, levels, metadata)
    header = {
        "version": 1,
        "width": case.width,
        "height": case.height,
        "latent_space": case.space,
        "channels": case.channels,
        "function": case.number,
        "architecture": case.architecture.to_bytes().hex(),
        "image_decoder": case.image_decoder,
        # Reversed, so that the first of several of one type is what stays
        "metadata_sha256": {
            METADATA[kind]: hashlib.sha256(content).hexdigest()
            for kind, content in reversed(case.metadata or ())
            if kind in METADATA
        },
        "bytes": {
            "header": len(header_fields(case, metadata, segment, levels)) + 4,
            "metadata": len(metadata or b""),
            "networks": len(segment),
            "levels": [len(level) for level in levels],
        },
    }
    return Made(container(case, segment, levels, metadata), header, networks, grids)


def make_invalid() -> dict[str, tuple[str, bytes]]:
    """Faulty streams by name: the error that the specification asks for, and the bytes."""
    described = replace(DEFAULT, width=7)
    example = make_valid(Case("example", 24, 16, architecture=described)).data
    body = example[:-4]
    # Where the fields of the description lie
    levels = 10
    neighbours = levels + 1 + body[levels]
    flags, width, layers = range(neighbours + 1, neighbours + 4)
    kind = layers + 2
    lengths = layers + 1 + 2 * body[layers]

    def patched(at: int, *values: int) -> bytes:
        return sealed(body[:at] + bytes(values) + body[at + len(values) :])

    def patched_data(data: bytes, at: int, *values: int) -> bytes:
        return sealed(data[:at] + bytes(values) + data[at + len(values) : -4])

    # A small function, of whose segments each may be faulty
    small = replace(DEFAULT, channels=(1, 1), width=7, synthesis=(SynthesisLayer(4),))
    groups = parameter_groups(small)
    zeros = [Parameters(g, 0, np.zeros(g.shape, np.int32)) for g in groups]

    def with_segments(networks: bytes = b"", finest: bytes = b"", size: int = 8, coarse: bytes = b"") -> bytes:
        case, levels = Case("small", size, size, architecture=small), [finest, coarse]
        return container(case, padded(case, networks, levels), levels)

    def with_metadata(segment: bytes) -> bytes:
        return container(Case("metadata", 8, 8, architecture=small), b"", [b"", b""], segment)

    def networks(name: str, exponent: int, integer: int) -> bytes:
        return encode_networks(
            [
                Parameters(g, exponent * (g.name == name), np.full(g.shape, integer * (g.name == name), np.int32))
                for g in groups
            ]
        )

    def first_group(last_bits: int, escapes: int) -> bytes:
        """Networks whose first integers are escapes, and 17 bits of their excess."""
        coder = RangeEncoder()
        coder.bits(0, 4)
        coder.bits(1, 4)
        symbols = [ESCAPE_HIGH if number < escapes else 31 for number in range(groups[0].size)]
        coder.symbols([8 * 16] * len(symbols), symbols)
        coder.bits(last_bits, 17)
        return coder.finish()

    def level(value: int) -> bytes:
        return encode_level(np.full((1, 1, 1), value, np.int32), build_arms(zeros, small)[0], small)

    def not_finite(sign: int) -> bytes:
        """The largest weights in as many layers as there may be; the last layer's have a sign."""
        deep = Case("deep", 8, 8, architecture=replace(ONE_LEVEL, channels=(1,), synthesis=(SynthesisLayer(4),) * 8))
        huge = []
        for group in parameter_groups(deep.architecture):
            value = {"synthesis.weight": 32767, "synthesis.weight7": sign * 32767}
            size = value.get(group.name, value.get(group.name.rstrip("0123456789"), 0))
            huge.append(Parameters(group, 0, np.full(group.shape, size, np.int32)))
        finest = encode_level(
            np.full((1, 1, 1), 9, np.int32), build_arms(huge, deep.architecture)[0], deep.architecture
        )
        return container(deep, encode_networks(huge), [finest])

    def overflow_before_relu() -> bytes:
        """ReLU(-a + 3 c) with a just over the largest single-precision number and c just below it: some 6.8e38, where
        infinity in the place of a would give 0."""
        layers = (*(SynthesisLayer(8),) * 6, SynthesisLayer(4), SynthesisLayer(1, relu=True))
        architecture = replace(ONE_LEVEL, channels=(2,), synthesis=layers)
        case = Case("overflow", 8, 8, "custom-0011223344556677", architecture)
        of_a, of_c, gain, last_gain = slice(0, 4), slice(4, 8), 32767, 4094
        huge = []
        for group in parameter_groups(architecture):
            integers = np.zeros(group.shape, np.int32)
            if group.name == "synthesis.weight0":
                integers[of_a, 0] = integers[of_c, 1] = gain
            elif group.name == "synthesis.weight6":
                integers[0, of_a] = integers[1:, of_c] = last_gain
            elif group.name == "synthesis.weight7":
                integers[0, :, 0, 0] = -1, 1, 1, 1
            elif group.name.startswith("synthesis.weight"):
                integers[of_a, of_a] = integers[of_c, of_c] = gain
            huge.append(Parameters(group, 0, integers))
        below = int(np.finfo(np.float32).max) // (gain * (4 * gain) ** 5 * 4 * last_gain)
        grids = np.array([below + 1, below], np.int32).reshape(2, 1, 1)
        return container(
            case, encode_networks(huge), [encode_level(grids, build_arms(huge, architecture)[0], architecture)]
        )

    no_finest = make_valid(Case("no-finest", 24, 16, architecture=replace(DEFAULT, channels=(0, 1)))).data
    custom = make_valid(Case("custom", 8, 8, "custom-0011223344556677", with_synthesis(ONE_LEVEL, 3))).data
    paper = make_valid(Case("paper", 24, 16, architecture=registered_architecture(2))).data
    instant = make_valid(Case("instant", 24, 16, "clric", INSTANT, function=8)).data
    known = metadata_segment([ICC, EXIF])
    short_metadata = with_metadata(known)
    at = levels + len(small.to_bytes())
    assert short_metadata[at] == len(known)
    short_metadata = short_metadata[:at] + leb128(len(known) + 1) + short_metadata[at + 1 : -4]

    return {
        "magic-empty": ("magic", b""),
        "magic-text": ("magic", b"just some text\n"),
        "magic-png": ("magic", b"\x89PNG\r\n\x1a\n" + bytes(30)),
        "magic-second-byte": ("magic", b"\xc7M"),
        "magic-lower-case": ("magic", b"\xc7lr" + example[3:]),
        "truncated-in-magic": ("truncated", example[:2]),
        "truncated-before-version": ("truncated", example[:3]),
        "version-0": ("version", patched(3, 0)),
        "version-2": ("version", patched(3, 2)),
        "version-255": ("version", patched(3, 255)),
        "version-2-without-more": ("version", b"\xc7LR\x02"),
        "checksum-missing": ("checksum", example[:4]),
        "checksum-7-bytes": ("checksum", example[:7]),
        "checksum-cut": ("checksum", example[:-1]),
        "checksum-cut-in-header": ("checksum", example[:20]),
        "checksum-flip-in-flags": ("checksum", example[:4] + bytes([body[4] ^ 16]) + example[5:]),
        "checksum-flip-in-payload": ("checksum", example[:-6] + bytes([example[-6] ^ 1]) + example[-5:]),
        "checksum-flip-in-checksum": ("checksum", example[:-1] + bytes([example[-1] ^ 128])),
        "checksum-trailing-byte": ("checksum", example + b"\0"),
        "checksum-little-endian": ("checksum", body + example[:-5:-1]),
        "truncated-after-version": ("truncated", sealed(body[:4])),
        "truncated-in-height": ("truncated", sealed(body[:8])),
        "truncated-in-fingerprint": ("truncated", sealed(custom[:14])),
        "truncated-in-description": ("truncated", sealed(body[:levels])),
        "truncated-header": ("truncated", sealed(body[:lengths])),
        "truncated-in-length": ("truncated", sealed(body[:lengths] + b"\x80")),
        "truncated-networks": ("truncated", sealed(body[: lengths + 12])),
        "truncated-huge-length": ("truncated", patched(lengths, 255, 255, 255, 255, 15)),
        "truncated-largest-length": ("truncated", patched(lengths, 255, 255, 255, 255, 127)),
        "truncated-coarse-level": ("truncated", patched(lengths + 2, 127)),
        "truncated-metadata": ("truncated", sealed(short_metadata)),
        "unsupported-space-7": ("unsupported", patched(4, 7)),
        "unsupported-space-15": ("unsupported", patched(4, 15)),
        "unsupported-function-15": ("unsupported", patched(9, 15)),
        "unsupported-function-255": ("unsupported", patched(9, 255)),
        "unsupported-arm-flag-5": ("unsupported", patched(flags, body[flags] | 32)),
        "unsupported-arm-flag-6": ("unsupported", patched(flags, body[flags] | 64)),
        "unsupported-arm-flag-7": ("unsupported", patched(flags, body[flags] | 128)),
        "unsupported-layer-kind-5": ("unsupported", patched(kind, body[kind] | 32)),
        "unsupported-layer-kind-6": ("unsupported", patched(kind, body[kind] | 64)),
        "unsupported-layer-kind-7": ("unsupported", patched(kind, body[kind] | 128)),
        "unsupported-metadata-128": ("unsupported", with_metadata(metadata_segment([(128, b"")]))),
        "unsupported-metadata-255": ("unsupported", with_metadata(metadata_segment([(255, b"critical")]))),
        "unsupported-metadata-after-known": (
            "unsupported",
            with_metadata(known + metadata_segment([(5, b"skipped"), (200, b"x")])),
        ),
        "field-width-0": ("field", patched(5, 0, 0)),
        "field-height-0": ("field", patched(7, 0, 0)),
        "field-no-levels": ("field", patched(levels, 0)),
        "field-17-levels": ("field", patched(levels, 17)),
        "field-65-channels": ("field", patched(levels + 1, 65)),
        "field-129-channels-in-all": ("field", patched(levels + 1, 64, 64, 0, 0, 1)),
        "field-no-channels-at-coarsest": ("field", patched(neighbours - 1, 0)),
        "field-0-neighbours": ("field", patched(neighbours, 0)),
        "field-9-neighbours": ("field", patched(neighbours, 9)),
        "field-5-hidden-layers": ("field", patched(flags, 5)),
        "field-15-hidden-layers": ("field", patched(flags, 15)),
        "field-arm-width-0": ("field", patched(width, 0)),
        "field-arm-width-0-without-hidden-layers": ("field", patched(flags, 0, 0)),
        "field-arm-width-49": ("field", patched(width, 49)),
        "field-no-layers": ("field", patched(layers, 0)),
        "field-9-layers": ("field", patched(layers, 9)),
        "field-layer-channels-0": ("field", patched(layers + 1, 0)),
        "field-layer-channels-65": ("field", patched(layers + 1, 65)),
        "field-residual-before-first": ("field", patched(kind, 4)),
        "field-residual-before-second": ("field", patched(kind + 2, 6)),
        "field-residual-of-other-width": ("field", patched(kind, 2)),
        "field-depthwise-of-other-width": ("field", patched(kind, 16)),
        "field-last-layer-not-latent": ("field", patched(layers + 5, 5, 1)),
        "field-too-many-weights": ("field", patched(layers, 2, 64, 1, 64, 1)),
        "field-length-not-shortest": ("field", patched(lengths, 128, 0)),
        "field-length-of-6-bytes": ("field", patched(lengths, 128, 128, 128, 128, 128, 1)),
        "field-level-length-not-shortest": ("field", patched(lengths + 2, 129, 0)),
        "field-custom-0-channels": ("field", patched_data(custom, 9, 0)),
        "field-custom-65-channels": ("field", patched_data(custom, 9, 65)),
        "field-custom-other-channels": ("field", patched_data(custom, 9, 4)),
        "field-bytes-for-no-grids": ("field", sealed(no_finest[:-4] + b"\1")),
        "field-function-2-for-16-channels": ("field", patched_data(paper, 4, 3)),
        "field-function-8-for-4-channels": ("field", patched_data(instant, 4, 1)),
        "field-too-few-bytes-for-pixels": ("field", patched(5, 16, 0, 16, 0)),
        "field-metadata-type-alone": ("field", with_metadata(known + b"\3")),
        "field-metadata-past-segment": ("field", with_metadata(known + b"\3\6hello")),
        "field-metadata-unknown-past-segment": ("field", with_metadata(b"\x40\x80\x80\x01")),
        "field-metadata-length-not-shortest": ("field", with_metadata(b"\3\x85\0hello" + known)),
        "field-metadata-length-of-6-bytes": ("field", with_metadata(b"\3\x80\x80\x80\x80\x80\1" + known)),
        "limit-too-many-pixels": ("limit", patched(5, 255, 255, 255, 255)),
        "limit-just-over": ("limit", sealed(b"\xc7LR\1\1" + bytes([39, 16, 35, 0x44]) + b"\1" + bytes(5800))),
        "payload-networks-invalid": ("payload", with_segments(b"\xff" * 8)),
        "payload-exponent-without-integers": ("payload", with_segments(networks("arm.weight0", 9, 0))),
        "payload-arm-weight-exponent": ("payload", with_segments(networks("arm.weight1", 9, 1))),
        "payload-arm-weight": ("payload", with_segments(networks("arm.weight0", 0, 128))),
        "payload-arm-weight-negative": ("payload", with_segments(networks("arm.weight2", 8, -128))),
        "payload-arm-bias": ("payload", with_segments(networks("arm.bias", 0, 64))),
        "payload-arm-bias-exponent-5": ("payload", with_segments(networks("arm.bias", 5, -2048))),
        "payload-arm-bias-exponent-6": ("payload", with_segments(networks("arm.bias", 6, 0))),
        "payload-grid-scale": ("payload", with_segments(networks("grid_scales", 0, 16))),
        "payload-grid-scale-exponent-3": ("payload", with_segments(networks("grid_scales", 3, 128))),
        "payload-grid-scale-exponent-4": ("payload", with_segments(networks("grid_scales", 4, 0))),
        "payload-upsampler": ("payload", with_segments(networks("upsampler", 15, -32768))),
        "payload-synthesis-weight": ("payload", with_segments(networks("synthesis.weight0", 0, 32768))),
        "payload-synthesis-bias": ("payload", with_segments(networks("synthesis.bias", 0, 32768))),
        "payload-endless-escape": ("payload", with_segments(first_group(0, groups[0].size))),
        "payload-long-escape": ("payload", with_segments(first_group(1, 1))),
        "payload-level-invalid": ("payload", with_segments(finest=b"\xff" * 8)),
        "payload-level-of-zeros": ("payload", with_segments(finest=bytes(4))),
        "payload-coarse-level-invalid": ("payload", with_segments(coarse=b"\xff" * 8, size=16)),
        "payload-too-few-bytes": ("payload", with_segments(finest=b"\x80", size=2048)),
        "payload-one-value-too-many": ("payload", with_segments(finest=b"\x80" * 15, size=1000)),
        "payload-value-32768": ("payload", with_segments(finest=level(32768))),
        "payload-value-minus-32768": ("payload", with_segments(finest=level(-32768))),
        "payload-latent-infinite": ("payload", not_finite(1)),
        "payload-latent-infinite-negative": ("payload", not_finite(-1)),
        "payload-overflow-before-relu": ("payload", overflow_before_relu()),
    }


def sha256_of_integers(arrays: list[np.ndarray]) -> str:
    """Of arrays of integers one after another, each integer as four bytes, big-endian."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(array, ">i4").tobytes() for array in arrays)).hexdigest()


def sha256_of_networks(networks: list[Parameters]) -> str:
    """Of each group's exponent and its integers, in coding order."""
    return sha256_of_integers([np.append(parameters.exponent, parameters.integers) for parameters in networks])


def main() -> None:
    for folder in ("valid", "invalid"):
        (HERE / folder).mkdir(exist_ok=True)
        for old in (HERE / folder).iterdir():
            old.unlink()
    manifest: dict[str, dict] = {"valid": {}, "invalid": {}}
    for case in CASES:
        made = make_valid(case)
        name = f"valid/{case.name}.clric"
        (HERE / name).write_bytes(made.data)
        latent = np.ascontiguousarray(reference_decoder.decode(made.data).latent, "<f4")
        expected = f"valid/{case.name}.latent"
        (HERE / expected).write_bytes(latent.tobytes())
        manifest["valid"][name] = {
            "header": made.header,
            "networks_sha256": sha256_of_networks(made.networks),
            "levels": [{"shape": list(grid.shape), "sha256": sha256_of_integers([grid])} for grid in made.grids],
            "grids_sha256": sha256_of_integers(made.grids),
            "latent": expected,
            "latent_shape": list(latent.shape),
            "latent_sha256": hashlib.sha256(latent.tobytes()).hexdigest(),
        }
    for label, (kind, data) in make_invalid().items():
        name = f"invalid/{label}.clric"
        (HERE / name).write_bytes(data)
        manifest["invalid"][name] = {"error": kind}
    (HERE / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"{len(CASES)} valid and {len(manifest['invalid'])} invalid streams in {HERE}")


if __name__ == "__main__":
    main()
