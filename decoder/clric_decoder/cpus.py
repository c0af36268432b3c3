"""How many CPUs this process was given. A container shows those of its host, and limits their use by a quota."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def available_cpus(root: Path = Path("/")) -> int:
    """The CPUs that this process may keep busy: those of its affinity mask, within the CPU quota of its cgroups.

    A quota of part of a CPU counts as one, and 2.5 CPUs count as 2. root: where the system's files are.
    """
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        count = os.cpu_count() or 1
    return max(1, int(min([count, *_quotas(root)])))


def thread_count() -> int:
    """Threads for a library that would otherwise count the machine's CPUs: OMP_NUM_THREADS, or the available CPUs.

    0, which leaves the choice to the library, where all CPUs of the machine are available: it may know better, such as
    one thread per physical core.
    """
    with contextlib.suppress(KeyError, ValueError):
        return max(0, int(os.environ["OMP_NUM_THREADS"]))
    available = available_cpus()
    return available if available < (os.cpu_count() or 1) else 0


def _quotas(root: Path) -> Iterator[float]:
    """CPUs by the quotas of this process's cgroup and of those above it, of cgroups version 1 and 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not on Linux
        return
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # A container may see its own cgroup as the root, and the host's path: directories that are missing are passed.
        for cgroup in (PurePosixPath(own), *PurePosixPath(own).parents):
            place = root / "sys/fs/cgroup" / controllers / str(cgroup).lstrip("/")
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                if controllers:
                    quota, period = ((place / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    quota, period = (place / "cpu.max").read_text().split()
                if float(quota) > 0:  # -1 and "max" are no limit
                    yield float(quota) / float(period)
