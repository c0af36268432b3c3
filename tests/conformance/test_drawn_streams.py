"""Streams of functions and values that hypothesis draws: what the product writes, it and the reference decoder read.

Some dozens in the suite; any number by hand:

    CLRIC_DRAWN_STREAMS=20000 pytest tests/conformance/test_drawn_streams.py
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from clric_decoder import bitstream, entropy
from clric_decoder.bitstream import (
    METADATA,
    REGISTERED_FUNCTIONS,
    WITH_NETWORKS,
    Architecture,
    SynthesisLayer,
    registered_architecture,
)
from clric_decoder.latent import decode_grids, encode_grids
from clric_decoder.models import LATENT_SPACES
from clric_decoder.networks import BICUBIC, Parameters, decode_networks, parameter_groups
from clric_decoder.registered_networks import registered_networks
from clric_decoder.synthesis import synthesize
from conformance import reference_decoder
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

COUNT = int(os.environ.get("CLRIC_DRAWN_STREAMS", "80"))

# Mostly few, so that streams are small; now and then as many as may be
LEVEL_CHANNELS = st.integers(0, 3) | st.integers(0, 3) | st.integers(0, 3) | st.integers(0, 64)
LAYER_CHANNELS = st.integers(1, 6) | st.integers(1, 6) | st.integers(1, 6) | st.integers(1, 64)


@st.composite
def functions(draw: st.DrawFn, channels: int) -> Architecture:
    """A function of any shape with so many latent channels."""
    finer = draw(st.sampled_from([0, 2, 4, 15]))
    levels = [*draw(st.lists(LEVEL_CHANNELS, max_size=finer)), draw(LEVEL_CHANNELS) or 1]
    assume(sum(levels) <= bitstream.MAX_TOTAL_CHANNELS)
    sizes, layers = [sum(levels)], list[SynthesisLayer]()
    for last in [False] * draw(st.integers(0, bitstream.MAX_SYNTHESIS_LAYERS - 1)) + [True]:
        same = min(sizes[-1], bitstream.MAX_CHANNELS)  # as many as the input has, for residuals and depthwise layers
        size = channels if last else draw(st.just(same) | LAYER_CHANNELS)
        residuals = [0, *(r for r in (1, 2, 3) if sizes[-r:][0] == size and r <= len(sizes))]
        kernel, residual, relu = draw(st.sampled_from([1, 3])), draw(st.sampled_from(residuals)), draw(st.booleans())
        layers.append(SynthesisLayer(size, kernel, residual, relu, size == sizes[-1] and draw(st.booleans())))
        sizes.append(size)
    architecture = Architecture(
        channels=tuple(levels),
        neighbours=draw(st.integers(1, bitstream.MAX_NEIGHBOURS)),
        hidden_layers=draw(st.integers(0, bitstream.MAX_HIDDEN_LAYERS)),
        width=draw(st.integers(1, 9) | st.integers(1, bitstream.MAX_WIDTH)),
        grid_scales=draw(st.booleans()),
        synthesis=tuple(layers),
    )
    weights = sum(g.size for g in parameter_groups(architecture) if g.name.startswith("synthesis.weight"))
    assume(weights <= bitstream.MAX_SYNTHESIS_WEIGHTS)
    return architecture


@st.composite
def integers(draw: st.DrawFn, shape: tuple[int, ...], limit: int, scale: float) -> np.ndarray:
    """Integers of up to a magnitude: of a Laplace distribution, and a few that hypothesis chooses one by one."""
    values = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).laplace(scale=scale, size=shape)
    result = np.clip(np.rint(values), -limit, limit).astype(np.int32)
    if result.size:
        chosen = st.tuples(st.integers(0, result.size - 1), st.integers(-limit, limit))
        for place, value in draw(st.lists(chosen, max_size=3)):
            result.reshape(-1)[place] = value
    return result


@dataclass(frozen=True)
class Stream:
    """What is written, and the bytes."""

    header: dict[str, Any]
    architecture: Architecture
    networks: list[Parameters]
    grids: list[np.ndarray]
    data: bytes


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    """A stream of a described or a registered function, with any metadata."""
    space = draw(st.sampled_from([*LATENT_SPACES, "custom"]))
    if space == "custom":
        space, channels = f"custom-{draw(st.binary(min_size=8, max_size=8)).hex()}", draw(LAYER_CHANNELS)
    else:
        channels = LATENT_SPACES[space].channels
    fitting = [n for n in REGISTERED_FUNCTIONS if registered_architecture(n).synthesis[-1].channels == channels]
    function = draw(st.sampled_from([0, 0, *fitting]))
    architecture = registered_architecture(function) if function else draw(functions(channels))
    if function in WITH_NETWORKS:
        networks = decode_networks(registered_networks()[function], architecture)
    else:
        scale = draw(st.sampled_from([0.0, 1.0, 10.0, 100.0]))
        networks = []
        for group in parameter_groups(architecture):
            exponent = draw(st.integers(0, group.max_exponent))
            # Synthesis: values below 4, so that no layer's outputs grow beyond float32
            limit = group.limit(exponent) if group.max_exponent < 15 else min(group.max_integer, 4 << exponent)
            networks.append(Parameters(group, exponent, draw(integers(group.shape, limit, scale))))
    side = st.integers(1, 64 if sum(architecture.channels) <= 8 else 16)
    width, height = draw(side), draw(side)
    scale = draw(st.sampled_from([0.0, 0.3, 2.0, 50.0]))
    shapes = bitstream.grid_shapes(architecture.channels, -(-height // 8), -(-width // 8))
    grids = [draw(integers(shape, 32767, scale)) for shape in shapes]
    segments = encode_grids(networks, grids, architecture)
    header = {
        "width": width,
        "height": height,
        "space": space,
        "channels": channels,
        "function": function,
        "image_decoder": draw(st.integers(0, 7)),
        "metadata": draw(st.dictionaries(st.sampled_from(list(METADATA.values())), st.binary(max_size=200))),
    }
    data = bitstream.write(
        **(header | {"function": function if function in WITH_NETWORKS else 0}),
        architecture=architecture,
        segments=replace(segments, networks=b"") if function in WITH_NETWORKS else segments,
    )
    return Stream(header, architecture, networks, grids, data)


def largest_sum(expected: reference_decoder.Decoded) -> float:
    """The largest value that the latent would have, were nothing negative: what float32's rounding goes with."""
    groups = {}
    for name, exponent, integers in expected.networks:
        groups[name] = reference_decoder.Group(name, exponent, [abs(integer) for integer in integers])
        if name == "upsampler":
            # What leads from the defaults to the magnitudes of the taps, in 2^-15
            defaults = np.tile(BICUBIC, len(integers) // 4)
            distances = (np.abs(defaults + np.array(integers) / 2**exponent) - defaults) * 2**15
            groups[name] = reference_decoder.Group(name, 15, np.rint(distances).astype(int).tolist())
    grids = [abs(grid) for grid in expected.grids]
    return float(reference_decoder.compute_latent(expected.header.architecture, groups, grids).max())


@settings(
    max_examples=COUNT,
    deadline=None,
    derandomize="CLRIC_DRAWN_STREAMS" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(streams(), st.booleans())
def test_product_and_reference_decode_what_was_drawn(stream: Stream, python_coder: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if python_coder:
            patch.setattr(entropy, "constriction", None)
        header, networks, grids = decode_grids(stream.data)
    for field, value in stream.header.items():
        assert getattr(header, field) == value, field
    assert header.architecture == stream.architecture
    for ours, drawn in zip(networks, stream.networks, strict=True):
        assert (ours.group, ours.exponent) == (drawn.group, drawn.exponent)
        assert np.array_equal(ours.integers, drawn.integers), ours.group.name
    assert all(map(np.array_equal, grids, stream.grids))

    expected = reference_decoder.decode(stream.data)
    described = expected.header
    fingerprint = f"-{described.fingerprint.hex()}" if described.fingerprint else ""
    assert described.space + fingerprint == header.space
    for field in ("width", "height", "channels", "function", "image_decoder"):
        assert getattr(described, field) == getattr(header, field), field
    assert {METADATA[kind]: content for kind, content in described.metadata.items()} == header.metadata
    for theirs, ours in zip(expected.networks, networks, strict=True):
        assert theirs == (ours.group.name, ours.exponent, ours.integers.reshape(-1).tolist())
    assert all(map(np.array_equal, expected.grids, grids))

    # Section 9's tolerance, unless large terms cancel each other, as in no stream of the suite
    tolerance = max(1e-4 * max(1, np.abs(expected.latent).max()), 1e-5 * largest_sum(expected))
    latent = synthesize(grids, networks, header.architecture)
    assert np.abs(latent - expected.latent).max() <= tolerance
