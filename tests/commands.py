"""What the tests of the commands share."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Run

POSIX = pytest.mark.skipif(os.name != "posix", reason="needs signals, terminals and limits as POSIX has them")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs what only Linux has: /dev/full, /proc, safe forks")
IS_ROOT = getattr(os, "geteuid", lambda: 0)() == 0  # to whom permissions do not apply; Windows has others


def assert_one_line(result: "subprocess.CompletedProcess[bytes]", code: int, *parts: str) -> None:
    """A command ended with an exit code, and with one line on standard error that begins with its own name."""
    message = result.stderr.decode()
    assert result.returncode == code, message
    assert message.startswith(f"{Path(result.args[0]).name}: "), message
    assert message.count("\n") == 1, message
    assert all(part in message for part in parts), message


def hear_interrupts() -> None:
    """In a child: a shell's background jobs, and what they start, would ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def loaded_modules(run: Run, command: str, *arguments: str | Path) -> set[str]:
    """The Python modules that a command has imported, which succeeds."""
    result = run(command, *arguments, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert result.returncode == 0, result.stderr
    lines = result.stderr.decode().splitlines()
    return {line.split("|")[-1].strip() for line in lines if line.startswith("import time:")}
