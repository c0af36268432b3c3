"""Ten thousand random and mutated streams: no crash, no hang, no memory."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = r"""
import random, re, sys, time, zlib
from dataclasses import replace
sys.path.insert(0, "tests")
from conformance import make_vectors
from clric_decoder import StreamError, decode_latent

rng = random.Random(0)
names = (
    "size-7x5", "arm-widest", "grids-gap", "networks-default", "synthesis-eight-layers", "space-flux2", "function-8",
    "metadata-unknown",
)
cases = [replace(case, width=24, height=16) for case in make_vectors.CASES if case.name in names]
streams = [make_vectors.make_valid(case).data for case in cases]
outcomes = {}
slowest = 0.0
for number in range(10000):
    body = bytearray(rng.choice(streams)[:-4])
    if number % 4 == 0:
        body[3:] = bytes([1, rng.randrange(256), 0, rng.randrange(256), 0, rng.randrange(256)])
        body += rng.randbytes(rng.randrange(20, 100))
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(4, len(body))
        action = rng.randrange(3)
        if action == 0 or len(body) < 20:
            body[at] = rng.randrange(256)
        elif action == 1:
            body[at : at + rng.randrange(1, 9)] = b""
        else:
            body[at:at] = rng.randbytes(rng.randrange(1, 9))
    # With a right checksum, or nothing behind it would ever be reached
    data = bytes(body) + zlib.crc32(body).to_bytes(4, "big")
    start = time.process_time()
    try:
        decode_latent(data)
        outcome = "decoded"
    except StreamError as error:
        outcome = error.kind
    slowest = max(slowest, time.process_time() - start)
    outcomes[outcome] = outcomes.get(outcome, 0) + 1
print(outcomes)
# Not getrusage's figure, which a child inherits from the process that started it
print(slowest, int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) / 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_mutated_streams_end_cleanly() -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    outcomes, figures = run.stdout.splitlines()
    slowest, megabytes = map(float, figures.split())
    print(outcomes, f"slowest {slowest:.2f} s, {megabytes:.0f} MB")
    # Every layer was reached: the header's checks, the payload's, and whole decodes
    assert all(kind in outcomes for kind in ("field", "unsupported", "truncated", "payload", "decoded"))
    assert slowest < 1
    assert megabytes < 256
