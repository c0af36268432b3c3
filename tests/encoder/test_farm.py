"""Encoding with Ray, on real clusters of this machine: two nodes, workers and nodes that are lost, an S3 server."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clric_decoder import read_header
from PIL import Image

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'clric[ray]'")
pytest.importorskip("ray.data", reason="ray[data] is not installed: pip install 'clric[ray]'")
pytestmark = pytest.mark.slow  # a cluster takes ten seconds to start

STORE = 100_000_000  # bytes of a node's object store
COMMAND = Path(sys.executable).with_name("clric-enc")
FAST = ("--preset", "fast", "--tune", "none")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As actors have; bytes depend on it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")


def write_photos(folder: Path, count: int) -> list[str]:
    """Photos of as many sizes as there are pairs of them; their paths."""
    random = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        height, width = 24 + 8 * (number // 2 % 4), 24 + 8 * (number // 8)
        small = random.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number:02d}.png")
    return sorted(map(str, folder.iterdir()))


def encode(*arguments: str | Path, **options: Any) -> "subprocess.CompletedProcess[str]":
    command = [COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=280, **options)


def streams(folder: Path) -> dict[str, bytes]:
    return {place.name: place.read_bytes() for place in folder.glob("*.clric")}


def manifest(folder: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    found = {Path(line["source"]).name: line for line in lines}
    assert len(found) == len(lines)
    return found


def workers(node: str | None = None) -> list[int]:
    """Processes of actors that encode, of this test's clusters; of the node with this id."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            if not (place / "cmdline").read_bytes().startswith(b"ray::MapWorker"):
                continue
            if node is None or node.encode() in (place / "environ").read_bytes() + _cmdline(_parent(place)):
                found.append(int(place.name))
    return [pid for pid in found if os.getpid() in _ancestors(pid)]


def _parent(place: Path) -> Path:
    (line,) = [line for line in (place / "status").read_text().splitlines() if line.startswith("PPid:")]
    return Path("/proc", line.split()[1])


def _cmdline(place: Path) -> bytes:
    return (place / "cmdline").read_bytes()


def _ancestors(pid: int) -> Iterator[int]:
    place = Path("/proc", str(pid))
    while place.name not in ("0", "1"):
        place = _parent(place)
        yield int(place.name)


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)
    return found


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two nodes of a CPU each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    cluster.add_node(num_cpus=1, object_store_memory=STORE, include_dashboard=False)
    cluster.add_node(num_cpus=1, object_store_memory=STORE)
    try:
        yield cluster
    finally:
        cluster.shutdown()


def test_a_killed_worker_and_a_lost_node_cost_nothing_else(cluster: Any, tmp_path: Path) -> None:
    """24 images complete, with the bytes of the local command, though a worker is killed and a node removed."""
    photos = write_photos(tmp_path / "in", 24)
    assert encode(*photos, "-o", f"{tmp_path}/local/", *FAST).returncode == 0
    command = [COMMAND, tmp_path / "in", "-o", tmp_path / "out", *FAST, "--ray", cluster.address]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        wait_for(lambda: len(workers()) == 2 and streams(tmp_path / "out"))
        os.kill(workers(cluster.head_node.node_id)[0], signal.SIGKILL)
        wait_for(lambda: len(streams(tmp_path / "out")) >= 8)
        cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
        message = process.stderr.read()
    assert (process.returncode, message) == (0, f"clric-enc: 24 images encoded; see {tmp_path}/out/manifest.jsonl\n")
    assert streams(tmp_path / "out") == streams(tmp_path / "local")
    lines = manifest(tmp_path / "out")
    assert len(lines) == 24
    for name, line in lines.items():
        data = (tmp_path / "out" / Path(name).with_suffix(".clric")).read_bytes()
        assert line["error"] is None
        assert (line["bytes"], line["bpp"]) == (len(data), read_header(data).bpp)
        assert line["latent_mse"] > 0
        assert line["image_mse"] > 0
        assert line["seconds"] > 0
        assert line["node"]
    assert not list((tmp_path / "out").glob(".*"))
    assert not list((tmp_path / "out").glob("manifest-*"))
