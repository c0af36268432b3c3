"""The name of the processor that figures were measured on."""

import contextlib
import platform
from pathlib import Path


def processor_name() -> str:
    """What the system calls the processor."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()
