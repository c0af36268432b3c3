"""Bytes from and to files: in little memory, and what a file is replaced by is as private as it was."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from clric_decoder.errors import ClricError
from clric_decoder.files import read_input, write_output
from commands import LINUX


@pytest.mark.parametrize("source", ["-", "input"])
@LINUX
def test_a_large_limit_takes_no_memory(tmp_path: Path, source: str) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "input").write_bytes(data)
    code = (
        "import resource, sys; from clric_decoder.files import read_input, write_output\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)\n"
        "sys.stdout.buffer.write(read_input(sys.argv[1], 1 << 31))"
    )
    command = [sys.executable, "-c", code, source]
    assert subprocess.run(command, cwd=tmp_path, input=data, capture_output=True, check=True).stdout == data


def test_the_limit_counts(tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(bytes(3 << 20))
    assert len(read_input(tmp_path / "input", 3 << 20)) == 3 << 20
    with pytest.raises(ClricError, match=r"input: file too large \(limit 3145727 bytes\)"):
        read_input(tmp_path / "input", (3 << 20) - 1)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path: Path, mode: int) -> None:
    place = tmp_path / "output"
    place.write_bytes(b"older")
    place.chmod(mode)
    write_output(place, b"newer")
    assert (place.read_bytes(), stat.S_IMODE(place.stat().st_mode)) == (b"newer", mode)
    assert os.listdir(tmp_path) == ["output"]
