"""CPUs: by affinity and by the quotas of both versions of cgroups."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from clric_decoder.cpus import available_cpus

MANY = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, MANY),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, MANY),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "20000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense\n"}, MANY),
        # a limit of a cgroup above, as Kubernetes gives it to a pod
        (
            {
                "proc/self/cgroup": "0::/pod/box\n",
                "sys/fs/cgroup/pod/cpu.max": "100000 100000\n",
                "sys/fs/cgroup/pod/box/cpu.max": "max 100000\n",
            },
            1,
        ),
        # version 1, with the host's path in a container that sees its own cgroup as the root
        (
            {
                "proc/self/cgroup": "3:cpuset:/docker/1\n2:cpu,cpuacct:/docker/1\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "100000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            MANY,
        ),
    ],
)
def test_quotas(tmp_path: Path, files: dict[str, str], cpus: int) -> None:
    write(tmp_path, files)
    assert available_cpus(tmp_path) == cpus


def test_more_than_there_are_is_no_limit(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000000 100000\n"})
    assert available_cpus(tmp_path) == MANY


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity can be set on Linux alone")
def test_affinity() -> None:
    code = (
        "import os; os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])\n"
        "from clric_decoder.cpus import available_cpus; print(available_cpus())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "1\n"


@pytest.mark.skipif(MANY < 2, reason="one CPU cannot be limited further")
def test_a_command_uses_the_cpus_that_it_was_given() -> None:
    """The number of threads that torch takes in a process of clric-enc, whose quota is set to one CPU."""
    pytest.importorskip("torch")
    code = (
        "import sys, click\n"
        "from clric_decoder import cpus, terminal\n"
        "cpus._quotas = lambda root: [1.0]\n"
        "@click.command()\n"
        "def command(): import torch; print(torch.get_num_threads())\n"
        "sys.argv = ['command']; terminal.run_command(command, 'command')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout == "1\n"
