"""Makes the conformance suite: valid and invalid streams, the expected results, and the manifest.

The valid streams hold random networks and grids, not images: what they are for is to reach every corner of the
specification. The expected grids are those that were put in, and the expected latents come from the reference
decoder; the product only writes the bytes. Run it after a change of the format:

    python tests/conformance/make_vectors.py
"""

from __future__ import annotations

import hashlib
import json
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from clric_decoder import bitstream
from clric_decoder.bitstream import (
    Architecture,
    Segments,
    SynthesisLayer,
    grid_shapes,
    registered_architecture,
)
from clric_decoder.context import build_arms, encode_level
from clric_decoder.entropy import ESCAPE_HIGH, RangeEncoder
from clric_decoder.latent import encode_grids
from clric_decoder.models import LATENT_SPACES
from clric_decoder.network_sets import network_set
from clric_decoder.networks import Parameters, decode_networks, encode_networks, parameter_groups

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import reference_decoder  # noqa: E402

DEFAULT = registered_architecture(1)


@dataclass(frozen=True)
class Case:
    """One valid stream: an architecture, a size, and how large its grid values and parameters are."""

    name: str
    width: int = 48
    height: int = 40
    space: str = "sd1"
    architecture: Architecture = DEFAULT
    grid_scale: float = 1.5
    parameter_scale: float = 6.0
    metadata: bytes = b""
    exponents: tuple[int, int] = (3, 8)
    network_set: int = 0
    edit: Callable[[list[np.ndarray]], None] = field(default=lambda grids: None)


def with_synthesis(architecture: Architecture, channels: int, *layers: SynthesisLayer) -> Architecture:
    return replace(architecture, synthesis=(*layers, SynthesisLayer(channels)))


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
        "space-custom",
        space="custom-00c1e2f3a4b5968f",
        architecture=with_synthesis(replace(DEFAULT, channels=(3, 1)), 3),
    ),
    Case("arm-two", architecture=replace(DEFAULT, two_arms=True, grid_scales=False)),
    Case(
        "arm-two-everything",
        architecture=replace(DEFAULT, two_arms=True, neighbours=16, earlier=7, coarser=4, width=48),
    ),
    Case("arm-linear", architecture=replace(DEFAULT, hidden_layers=0)),
    Case("arm-deep-narrow", architecture=replace(DEFAULT, hidden_layers=4, width=1)),
    Case("arm-no-neighbours", architecture=replace(DEFAULT, neighbours=0, earlier=1)),
    Case("arm-coarser-only", architecture=replace(DEFAULT, neighbours=0, coarser=4)),
    Case("arm-earlier", architecture=replace(DEFAULT, earlier=2, coarser=1, channels=(4, 2, 0, 3))),
    Case("arm-saturated", parameter_scale=90.0, grid_scale=30.0),
    Case("exponents-0", exponents=(0, 0), parameter_scale=1.0),
    Case("exponents-2", exponents=(2, 2)),
    Case("exponents-15", exponents=(15, 15), parameter_scale=1000.0),
    Case("coarser-samples-clipped", 72, 64, architecture=replace(DEFAULT, coarser=4, channels=(2, 2, 2))),
    Case("grids-paper", architecture=replace(DEFAULT, channels=(1,) * 7, grid_scales=False)),
    Case("grids-sixteen-levels", architecture=replace(DEFAULT, channels=(1,) * 16)),
    Case("grids-single-level", architecture=replace(DEFAULT, channels=(4,))),
    Case("grids-none-at-finest", architecture=replace(DEFAULT, channels=(0, 0, 2, 1))),
    Case("grids-gap", architecture=replace(DEFAULT, channels=(2, 0, 3))),
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
    Case("networks-default", parameter_scale=0.0),
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
        "worked-example",
        16,
        8,
        architecture=Architecture(
            channels=(1,),
            neighbours=2,
            earlier=0,
            coarser=0,
            hidden_layers=0,
            width=1,
            two_arms=False,
            grid_scales=False,
            synthesis=(SynthesisLayer(4),),
        ),
        parameter_scale=3.0,
        exponents=(3, 4),
        edit=_worked_example,
    ),
    Case("metadata", metadata=b"\x01\x03ICC\xc8\x00"),
    Case("metadata-malformed", metadata=b"\x02\xff"),
    Case("space-clric", space="clric", architecture=registered_architecture(7)),
    Case("network-set-1", space="clric", architecture=registered_architecture(8), network_set=1),
    Case("network-set-7", space="clric", architecture=registered_architecture(8), network_set=7, grid_scale=6.0),
    Case("network-set-blank", 256, 256, "clric", registered_architecture(8), network_set=2, edit=_all_zero),
]


def make_valid(case: Case, seed: int) -> tuple[bytes, list[np.ndarray]]:
    """The bytes of a case and the grids in it."""
    rng = np.random.default_rng(seed)
    channels = LATENT_SPACES[case.space].channels if case.space in LATENT_SPACES else 3
    architecture = case.architecture
    networks = []
    for group in parameter_groups(architecture):
        low, high = (min(exponent, group.max_exponent) for exponent in case.exponents)
        exponent = int(rng.integers(low, high + 1))
        integers = np.rint(rng.laplace(scale=max(case.parameter_scale, 1e-9), size=group.shape))
        limit = group.limit(exponent)
        networks.append(Parameters(group, exponent, np.clip(integers, -limit, limit).astype(np.int32)))
    if case.network_set:
        networks = decode_networks(network_set(architecture, case.network_set), architecture)
    shapes = grid_shapes(architecture.channels, -(-case.height // 8), -(-case.width // 8))
    grids = [np.rint(rng.laplace(scale=case.grid_scale, size=shape)).astype(np.int32) for shape in shapes]
    case.edit(grids)
    segments = encode_grids(networks, grids, architecture, case.metadata)
    data = bitstream.write(
        width=case.width,
        height=case.height,
        space=case.space,
        channels=channels,
        architecture=architecture,
        segments=replace(segments, networks=b"") if case.network_set else segments,
        network_set=case.network_set,
    )
    return data, grids


def sealed(body: bytes) -> bytes:
    """A body with its right checksum, so that only the planted fault is wrong."""
    return body + zlib.crc32(body).to_bytes(4, "big")


def make_invalid() -> dict[str, tuple[str, bytes]]:
    """Faulty streams by name: the error that the specification asks for, and the bytes."""
    example, _ = make_valid(Case("example", 24, 16, architecture=replace(DEFAULT, width=7)), 1000)
    body = example[:-4]
    # Where the fields of an explicit description in the space sd1 lie
    levels = 10
    neighbours = levels + 1 + body[levels]
    others, flags, width, layers = range(neighbours + 1, neighbours + 5)
    kind = layers + 2
    lengths = layers + 1 + 2 * body[layers]

    def patched(at: int, *values: int) -> bytes:
        return sealed(body[:at] + bytes(values) + body[at + len(values) :])

    small = replace(DEFAULT, channels=(1,), width=7, synthesis=(SynthesisLayer(4),))
    groups = parameter_groups(small)

    def with_networks(networks: bytes, finest: bytes = b"", size: int = 8) -> bytes:
        fields = bitstream.write(
            width=size,
            height=size,
            space="sd1",
            channels=4,
            architecture=small,
            segments=Segments(networks, (finest,)),
        )
        return fields

    def networks(name: str, exponent: int, integer: int) -> bytes:
        return encode_networks(
            [
                Parameters(g, exponent * (g.name == name), np.full(g.shape, integer * (g.name == name), np.int32))
                for g in groups
            ]
        )

    coder = RangeEncoder()
    coder.bits(0, 4)
    coder.bits(1, 4)
    for _ in range(groups[0].size):
        coder.symbol(8 * 16, ESCAPE_HIGH)
    coder.bits(0, 17)
    endless_escape = coder.finish()
    coder = RangeEncoder()
    coder.bits(0, 4)
    coder.bits(1, 4)
    for number in range(groups[0].size):
        coder.symbol(8 * 16, ESCAPE_HIGH if number == 0 else 31)
    coder.bits(1, 17)
    long_escape = coder.finish()
    zeros = [Parameters(g, 0, np.zeros(g.shape, np.int32)) for g in groups]

    def level(value: int) -> bytes:
        return encode_level(np.full((1, 1, 1), value, np.int32), build_arms(zeros, small)[0], small, None)

    no_finest, _ = make_valid(Case("no-finest", 24, 16, architecture=replace(DEFAULT, channels=(0, 1))), 1001)
    custom, _ = make_valid(Case("custom", 8, 8, "custom-0011223344556677", with_synthesis(DEFAULT, 3)), 1002)
    paper, _ = make_valid(Case("paper", 24, 16, architecture=registered_architecture(2)), 1003)

    def resealed(data: bytes, at: int, *values: int) -> bytes:
        return sealed(data[:at] + bytes(values) + data[at + len(values) : -4])

    deep = replace(small, synthesis=(SynthesisLayer(4),) * 8)
    huge = [
        Parameters(g, 0, np.full(g.shape, 32767 * ("synthesis" in g.name), np.int32)) for g in parameter_groups(deep)
    ]
    not_finite = bitstream.write(
        width=8,
        height=8,
        space="sd1",
        channels=4,
        architecture=deep,
        segments=Segments(encode_networks(huge), (level(9),)),
    )

    return {
        "magic-empty": ("magic", b""),
        "magic-text": ("magic", b"just some text\n"),
        "magic-png": ("magic", b"\x89PNG\r\n\x1a\n" + bytes(30)),
        "truncated-in-magic": ("truncated", example[:2]),
        "truncated-before-version": ("truncated", example[:3]),
        "version-1": ("version", patched(3, 1)),
        "version-255": ("version", patched(3, 255)),
        "checksum-missing": ("checksum", example[:6]),
        "checksum-cut": ("checksum", example[:-1]),
        "checksum-flip-in-payload": ("checksum", example[:-6] + bytes([example[-6] ^ 1]) + example[-5:]),
        "checksum-flip-in-checksum": ("checksum", example[:-1] + bytes([example[-1] ^ 128])),
        "checksum-trailing-byte": ("checksum", example + b"\0"),
        "truncated-header": ("truncated", sealed(body[:lengths])),
        "truncated-networks": ("truncated", sealed(body[: lengths + 12])),
        "truncated-huge-length": ("truncated", patched(lengths, 255, 255, 255, 255, 15)),
        "unsupported-space": ("unsupported", patched(4, 15)),
        "unsupported-architecture": ("unsupported", patched(9, 255)),
        "unsupported-network-set": ("unsupported", patched(4, body[4] | 0x20)),
        "unsupported-arm-flag": ("unsupported", patched(flags, body[flags] | 128)),
        "unsupported-layer-kind": ("unsupported", patched(kind, body[kind] | 128)),
        "field-width-0": ("field", patched(5, 0, 0)),
        "field-height-0": ("field", patched(7, 0, 0)),
        "field-no-levels": ("field", patched(levels, 0)),
        "field-17-levels": ("field", patched(levels, 17)),
        "field-65-channels": ("field", patched(levels + 1, 65)),
        "field-129-channels-in-all": ("field", patched(levels + 1, 64, 64, 1)),
        "field-no-channels-at-coarsest": ("field", patched(neighbours - 1, 0)),
        "field-17-neighbours": ("field", patched(neighbours, 17)),
        "field-8-earlier-channels": ("field", patched(others, 8)),
        "field-5-coarser-samples": ("field", patched(others, 0x50)),
        "field-no-inputs": ("field", patched(neighbours, 0, 0)),
        "field-5-hidden-layers": ("field", patched(flags, 5)),
        "field-arm-width-0": ("field", patched(width, 0)),
        "field-arm-width-49": ("field", patched(width, 49)),
        "field-no-layers": ("field", patched(layers, 0)),
        "field-9-layers": ("field", patched(layers, 9)),
        "field-layer-channels-0": ("field", patched(layers + 1, 0)),
        "field-residual-before-first": ("field", patched(kind, 4)),
        "field-residual-of-other-width": ("field", patched(kind, 2)),
        "field-depthwise-of-other-width": ("field", patched(kind, 16)),
        "field-last-layer-not-latent": ("field", patched(layers + 5, 5, 1)),
        "field-length-not-shortest": ("field", patched(lengths, 128, 0)),
        "limit-too-many-pixels": ("limit", patched(5, 255, 255, 255, 255)),
        "payload-exponent": ("payload", with_networks(networks("arm0.weight0", 9, 0))),
        "payload-arm-weight": ("payload", with_networks(networks("arm0.weight0", 0, 128))),
        "payload-arm-bias": ("payload", with_networks(networks("arm0.bias", 0, 64))),
        "payload-grid-scale": ("payload", with_networks(networks("grid_scales", 0, 16))),
        "payload-synthesis-weight": ("payload", with_networks(networks("synthesis.weight0", 0, 32768))),
        "payload-endless-escape": ("payload", with_networks(endless_escape)),
        "payload-invalid-quantile": ("payload", with_networks(b"\xff" * 8)),
        "payload-too-few-bytes": ("payload", with_networks(b"", b"\x80", size=2048)),
        "payload-one-value-too-many": ("payload", with_networks(b"", b"\x80" * 15, size=1000)),
        "payload-value-32768": ("payload", with_networks(b"", level(32768))),
        "payload-value-minus-32768": ("payload", with_networks(b"", level(-32768))),
        "payload-long-escape": ("payload", with_networks(long_escape)),
        "payload-synthesis-bias": ("payload", with_networks(networks("synthesis.bias", 0, 32768))),
        "payload-latent-not-finite": ("payload", not_finite),
        "unsupported-arm-flag-6": ("unsupported", patched(flags, body[flags] | 64)),
        "unsupported-layer-kind-5": ("unsupported", patched(kind, body[kind] | 32)),
        "unsupported-layer-kind-6": ("unsupported", patched(kind, body[kind] | 64)),
        "field-custom-0-channels": ("field", resealed(custom, 9, 0)),
        "field-custom-65-channels": ("field", resealed(custom, 9, 65)),
        "field-length-of-6-bytes": ("field", patched(lengths, 128, 128, 128, 128, 128, 1)),
        "field-bytes-for-no-grids": ("field", sealed(no_finest[:-4] + b"\1")),
        "field-registered-for-other-channels": ("field", resealed(paper, 4, 3)),
        "field-too-many-weights": ("field", patched(layers, 2, 64, 1, 64, 1)),
        "field-too-few-bytes-for-pixels": ("field", patched(5, 16, 0, 16, 0)),
    }


def main() -> None:
    for folder in ("valid", "invalid"):
        (HERE / folder).mkdir(exist_ok=True)
        for old in (HERE / folder).iterdir():
            old.unlink()
    manifest: dict[str, dict] = {"valid": {}, "invalid": {}}
    for seed, case in enumerate(CASES):
        data, grids = make_valid(case, seed)
        name = f"valid/{case.name}.clric"
        (HERE / name).write_bytes(data)
        latent = np.float32(reference_decoder.decode(data).latent)
        expected = f"valid/{case.name}.latent"
        (HERE / expected).write_bytes(latent.astype("<f4").tobytes())
        manifest["valid"][name] = {
            "grids_sha256": hashlib.sha256(b"".join(g.astype(">i4").tobytes() for g in grids)).hexdigest(),
            "latent": expected,
            "latent_shape": list(latent.shape),
        }
    for label, (kind, data) in make_invalid().items():
        name = f"invalid/{label}.clric"
        (HERE / name).write_bytes(data)
        manifest["invalid"][name] = {"error": kind}
    (HERE / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"{len(CASES)} valid and {len(manifest['invalid'])} invalid streams in {HERE}")


if __name__ == "__main__":
    main()
