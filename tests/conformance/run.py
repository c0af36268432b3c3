"""The conformance runner: points any decoder of clric streams at the vectors of a suite.

    python run.py --command 'mydecoder {stream} --grids {grids} --latent {latent}'

The command is split like a shell's words (without a shell), then the placeholders are replaced. A decoder
that cannot write grids leaves {grids} out and is checked on its latents alone; likewise for latents. See
README.md beside this file for the formats. Prints one line for each failure and a closing count; exits 1 if
there was any.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TOLERANCE = 1e-4  # section 9 of the specification


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    command: tuple[str, ...]
    suite: Path
    timeout: float
    error_names: bool

    def gives(self, output: str) -> bool:
        """Whether the decoder's command writes this output ("grids" or "latent")."""
        return any("{" + output + "}" in word for word in self.command)


@dataclass(frozen=True)
class Outcome:
    """What a run of the decoder did; ``status`` is None when it was stopped for its time."""

    status: int | None
    stderr: str


def run_decoder(options: Options, stream: Path, folder: Path) -> Outcome:
    """Run the decoder on a copy of ``stream``, named so that its name gives no error's name away."""
    paths = {name: str(folder / name) for name in ("grids", "latent")}
    paths["stream"] = str(folder / "stream.clric")
    shutil.copyfile(stream, paths["stream"])
    words = [re.sub(r"\{(stream|grids|latent)\}", lambda m: paths[m[1]], word) for word in options.command]
    with (folder / "stderr").open("w+b") as errors:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
        )
        status: int | None
        try:
            status = process.wait(options.timeout)
        except subprocess.TimeoutExpired:
            status = None
            if hasattr(os, "killpg"):  # what the command started goes with it
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
        errors.seek(0)
        text = errors.read(65536).decode("utf-8", "replace")
    return Outcome(status, text)


def first_line(text: str) -> str:
    """The first line of what a decoder printed."""
    return (text.splitlines() or [""])[0]


def check_valid(options: Options, entry: dict[str, Any], stream: Path, folder: Path) -> list[str]:
    """The faults of a decoder on a valid stream."""
    outcome = run_decoder(options, stream, folder)
    if outcome.status is None:
        return [f"not done after {options.timeout:g} s"]
    if outcome.status != 0:
        return [f"exit status {outcome.status}: {first_line(outcome.stderr)}"]
    faults: list[str] = []
    if options.gives("grids"):
        faults += check_grids(folder / "grids", entry)
    if options.gives("latent"):
        faults += check_latent(folder / "latent", options.suite / entry["latent"], entry["latent_shape"])
    return faults


def check_grids(path: Path, entry: dict[str, Any]) -> list[str]:
    """Grids must be the same integers."""
    if not path.is_file():
        return ["no grids were written"]
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() == entry["grids_sha256"]:
        return []
    wrong, start = [], 0
    for number, level in enumerate(entry["levels"]):
        end = start + 4 * math.prod(level["shape"])
        if hashlib.sha256(data[start:end]).hexdigest() != level["sha256"]:
            wrong.append(str(number))
        start = end
    if len(data) != start:
        return [f"the grids have {len(data)} bytes, not {start}"]
    return [f"the grids of level {', '.join(wrong)} are not the expected ones"]


def check_latent(path: Path, expected_path: Path, shape: Sequence[int]) -> list[str]:
    """Latents must lie within the tolerance of section 9."""
    if not path.is_file():
        return ["no latent was written"]
    expected = np.fromfile(expected_path, dtype="<f4").astype(np.float64)
    if expected.size != int(np.prod(shape)):
        return [f"the suite is damaged: {expected_path} does not have the shape {list(shape)}"]
    if path.stat().st_size != 4 * expected.size:
        return [f"the latent has {path.stat().st_size} bytes, not {4 * expected.size}"]
    difference = np.abs(np.fromfile(path, dtype="<f4").astype(np.float64) - expected)
    tolerance = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    if not bool((difference <= tolerance).all()):  # also for NaN
        return [f"the latent differs by {difference.max():.3g}, over {tolerance:.3g}"]
    return []


def check_invalid(options: Options, entry: dict[str, Any], stream: Path, folder: Path) -> list[str]:
    """The faults of a decoder on an invalid stream."""
    outcome = run_decoder(options, stream, folder)
    if outcome.status is None:
        return [f"not done after {options.timeout:g} s"]
    faults: list[str] = []
    line = first_line(outcome.stderr)
    if outcome.status == 0:
        faults.append(f"exit status 0 instead of the error {entry['error']}")
    elif outcome.status < 0:
        faults.append(f"ended by signal {-outcome.status} instead of the error {entry['error']}")
    elif options.error_names and not re.search(rf"\b{re.escape(entry['error'])}\b", line):
        faults.append(f"the error {entry['error']} is not named in: {line!r}")
    left = sorted({path.name for path in folder.iterdir()} - {"stream.clric", "stderr"})
    if left:
        faults.append(f"output is left: {', '.join(left)}")
    return faults


Check = Callable[[Options, dict[str, Any], Path, Path], list[str]]


def run_one(options: Options, check: Check, name: str, entry: dict[str, Any]) -> list[str]:
    """The faults on one stream, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="clric-conformance-") as folder:
        return check(options, entry, options.suite / name, Path(folder))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Check a decoder of clric streams against the suite.")
    parser.add_argument("--command", required=True, help="with {stream}, and {grids}, {latent} or both")
    here = Path(__file__).resolve().parent
    parser.add_argument("--suite", type=Path, default=here, help="its folder (default: that of run.py)")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for each stream (default: 60)")
    parser.add_argument("--jobs", type=int, default=1, help="streams at the same time (default: 1)")
    parser.add_argument("--no-error-names", action="store_true", help="check only that invalid streams fail")
    given = parser.parse_args(arguments)
    options = Options(tuple(shlex.split(given.command)), given.suite, given.timeout, not given.no_error_names)
    if not options.gives("stream"):
        parser.error("--command has no {stream}")
    if not options.gives("grids") and not options.gives("latent"):
        parser.error("--command has neither {grids} nor {latent}: nothing could be checked")
    if shutil.which(options.command[0]) is None:
        parser.error(f"no such command: {options.command[0]}")

    manifest = json.loads((options.suite / "manifest.json").read_text(encoding="utf-8"))
    work: list[tuple[Check, str, dict[str, Any]]] = []
    work += [(check_valid, name, entry) for name, entry in manifest["valid"].items()]
    work += [(check_invalid, name, entry) for name, entry in manifest["invalid"].items()]
    failures = 0
    with ThreadPoolExecutor(max(1, given.jobs)) as pool:
        for (_, name, _), faults in zip(work, pool.map(lambda item: run_one(options, *item), work), strict=True):
            if faults:
                failures += 1
                print(f"FAIL {name}: {'; '.join(faults)}", flush=True)
    checked = " and ".join(output for output in ("grids", "latent") if options.gives(output))
    print(
        f"{len(work) - failures} of {len(work)} streams passed"
        f" ({len(manifest['valid'])} valid: {checked}; {len(manifest['invalid'])} invalid)"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
