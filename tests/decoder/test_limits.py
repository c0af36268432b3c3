"""What a decoder needs at most for a file (specification, "Limits"): the memory of the worst streams that are legal."""

import subprocess
import sys
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
from clric_decoder import bitstream, read_header
from clric_decoder.bitstream import Architecture, Segments, SynthesisLayer
from clric_decoder.entropy import SYMBOL_ZERO, RangeEncoder
from clric_decoder.networks import Parameters, encode_networks, parameter_groups

# MB that do not depend on the image: a tile's layers, a step's contexts, the zeros between a narrow image's rows. And
# how many times the file's bytes are held: the file, the segment, and the segment as words.
CONSTANT = 32
COPIES = 5
TOLERANCE = 1.1

MAX_LEVEL_VALUES = 64 * 362 * 362  # of the streams below

SIMPLE = Architecture((1,), 8, 0, 1, False, (SynthesisLayer(4),))
WIDE_ARM = replace(SIMPLE, channels=(64,), hidden_layers=4, width=48, grid_scales=True)
DEPTHWISE = SynthesisLayer(64, kernel=3, residual=1, relu=True, depthwise=True)
DEEP = (SynthesisLayer(64), *[replace(DEPTHWISE, residual=min(3, i + 1)) for i in range(6)], SynthesisLayer(4, 3))
DENSE = (SynthesisLayer(64, 3), SynthesisLayer(55, 3, relu=True), SynthesisLayer(4))

# Width, height, and the function of each.
WORST = {
    "128 channels of two levels": (2896, 2896, replace(SIMPLE, channels=(64, 64))),
    "128 channels of 16 levels": (4096, 4096, replace(SIMPLE, channels=(8,) * 16)),
    "3x3 layers of 64 channels": (4096, 4096, replace(SIMPLE, synthesis=DENSE)),
    "eight 3x3 layers, lines of 65,535 pixels": (65535, 136, replace(SIMPLE, channels=(8, 56), synthesis=DEEP)),
    "a line of 8 pixels": (65535, 8, replace(SIMPLE, channels=(64, 63, 1), synthesis=DEEP)),
    "a column of 8 pixels": (8, 65535, replace(SIMPLE, channels=(64, 63, 1), synthesis=DEEP)),
    "64 latent channels of one at half the size": (5792, 5792, replace(SIMPLE, channels=(0, 1), synthesis=DENSE[:1])),
    "one latent channel of one at half the size": (
        9456,
        9456,
        replace(SIMPLE, channels=(0, 1), synthesis=(SynthesisLayer(1),)),
    ),
    "the widest ARM": (1600, 1600, WIDE_ARM),
    "a small image in a long file": (16, 8, SIMPLE),
}
LONG = "a small image in a long file"

SCRIPT = """
import re, sys
from clric_decoder import decode_latent

def peak():
    # Not getrusage's figure, which a child inherits from the process that started it
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

tiny, worst = (open(path, "rb").read() for path in sys.argv[1:])
decode_latent(tiny)
before = peak()
decode_latent(worst)
print((peak() - before) / 1000)
"""


@pytest.fixture(scope="module")
def zeros() -> bytes:
    """A segment of so many zeros, and of any number below, with the table of the smallest scale."""
    coder = RangeEncoder()
    coder.symbols(repeat(0, MAX_LEVEL_VALUES), repeat(SYMBOL_ZERO, MAX_LEVEL_VALUES))
    return coder.finish()


def write(width: int, height: int, architecture: Architecture, zeros: bytes, more: int = 0) -> bytes:
    """A stream of few bytes: the ARM gives zeros a high probability wherever it looks. more: bytes after level 0."""
    networks = []
    for group in parameter_groups(architecture):
        integers = np.zeros(group.shape, np.int32)
        if group.name == "arm.bias":
            integers[-1] = -4  # the smallest scale
        networks.append(Parameters(group, 0, integers))
    shapes = bitstream.grid_shapes(architecture.channels, -(-height // 8), -(-width // 8))
    sizes = [int(np.prod(shape)) for shape in shapes]
    channels = architecture.synthesis[-1].channels
    return bitstream.write(
        width=width,
        height=height,
        space="sd1" if channels == 4 else "custom-0000000000000000",
        channels=channels,
        architecture=architecture,
        segments=Segments(
            encode_networks(networks),
            tuple(
                zeros.ljust(-(-size // 1000) + more * (not i), b"\0") if size else b"" for i, size in enumerate(sizes)
            ),
        ),
    )


def bound(data: bytes) -> float:
    """MB by the formula of section 12."""
    header = read_header(data)
    values = sum(int(np.prod(shape)) for shape in header.grid_shapes)
    positions = header.latent_height * header.latent_width
    return (4 * (values + positions * header.channels) + COPIES * len(data)) / 1e6


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("name", WORST)
def test_memory_is_what_the_specification_allows(name: str, zeros: bytes, tmp_path: Path) -> None:
    data = write(*WORST[name], zeros, more=4 * 10**7 if name == LONG else 0)
    (tmp_path / "tiny").write_bytes(write(8, 8, SIMPLE, zeros))
    (tmp_path / "worst").write_bytes(data)
    command = [sys.executable, "-c", SCRIPT, tmp_path / "tiny", tmp_path / "worst"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    used, allowed = float(run.stdout), bound(data)
    print(f"{len(data):,} bytes: {used:.0f} MB, allowed {allowed:.0f} MB + {CONSTANT}")
    assert used <= TOLERANCE * allowed + CONSTANT
