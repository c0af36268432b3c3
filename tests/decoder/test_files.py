"""Bytes from and to files: in little memory, and what a file is replaced by is as private as it was."""

import subprocess
import sys
from pathlib import Path

import pytest
from clric_decoder.errors import ClricError
from clric_decoder.files import read_input


@pytest.mark.parametrize("source", ["-", "input"])
def test_a_large_limit_takes_no_memory(tmp_path: Path, source: str) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "input").write_bytes(data)
    code = (
        "import resource, sys; from clric_decoder.files import read_input\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)\n"
        "sys.stdout.buffer.write(read_input(sys.argv[1], 1 << 31))"
    )
    command = [sys.executable, "-c", code, source]
    assert subprocess.run(command, cwd=tmp_path, input=data, capture_output=True, check=True).stdout == data


def test_the_limit_counts(tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(bytes(3 << 20))
    assert len(read_input(tmp_path / "input", 3 << 20)) == 3 << 20
    with pytest.raises(ClricError, match="input: longer than the limit of 3145727 bytes"):
        read_input(tmp_path / "input", (3 << 20) - 1)
