"""Encoding with Ray, on real clusters of this machine: two nodes, workers and nodes that are lost, an S3 server."""

import contextlib
import hashlib
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
from clric_decoder import ClricError, read_header
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


def workers(task: str = "") -> list[int]:
    """Processes of actors that encode, of this test's clusters; those that are at a task of this name."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            title = (place / "cmdline").read_text()
            if title.startswith("ray::MapWorker") and task in title and os.getpid() in _ancestors(place):
                found.append(int(place.name))
    return found


def _ancestors(place: Path) -> Iterator[int]:
    while place.name not in ("0", "1"):
        (line,) = [line for line in (place / "status").read_text().splitlines() if line.startswith("PPid:")]
        place = place.with_name(line.split()[1])
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
        os.kill(workers()[0], signal.SIGKILL)
        wait_for(lambda: len(streams(tmp_path / "out")) >= 8)
        cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
        message = process.stderr.read()
    assert (process.returncode, message) == (
        0,
        f"clric-enc: 24 encoded, 0 skipped (up to date), 0 failed; see {tmp_path}/out/manifest.jsonl\n",
    )
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


def test_an_image_that_kills_its_worker_is_listed_after_three_times(cluster: Any, tmp_path: Path) -> None:
    """The image takes long, and its worker is killed while it works on it."""
    write_photos(tmp_path / "in", 4)
    large = tmp_path / "in" / "large.png"
    Image.linear_gradient("L").resize((1600, 1600)).save(large)
    command = [COMMAND, tmp_path / "in", "-o", tmp_path / "out", *FAST, "--ray", cluster.address]
    kills = 0
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        wait_for(lambda: len(streams(tmp_path / "out")) == 4)
        while process.poll() is None:
            busy = set(workers("submit"))
            time.sleep(1)
            for pid in busy & set(workers("submit")):
                os.kill(pid, signal.SIGKILL)
                kills += 1
        message = process.stderr.read()
    assert (process.returncode, kills) == (1, 3)
    reason = "its worker was lost 3 times (killed, out of memory, or with its node)"
    assert message.splitlines()[-2:] == [
        f"clric-enc: {large}: {reason}",
        f"clric-enc: 4 encoded, 0 skipped (up to date), 1 failed; see {tmp_path}/out/manifest.jsonl",
    ]
    errors = {name: line["error"] for name, line in manifest(tmp_path / "out").items()}
    assert errors == {f"{number:02d}.png": None for number in range(4)} | {"large.png": reason}
    assert len(streams(tmp_path / "out")) == 4


def test_on_this_machine_what_is_up_to_date_is_skipped_and_what_is_bad_is_listed(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", 4)
    (tmp_path / "in" / "deep").mkdir()
    (tmp_path / "in" / "deep" / "text.jpg").write_text("no image")
    (tmp_path / "in" / "notes.txt").write_text("not listed")
    command = (tmp_path / "in", "-o", tmp_path / "out", "--preset", "instant", "--json", "--ray")
    end = f"see {tmp_path}/out/manifest.jsonl"
    bad = f"clric-enc: {tmp_path}/in/deep/text.jpg: unsupported or unrecognised image format"

    first = encode(*command)
    assert first.returncode == 1
    assert first.stderr.splitlines() == [bad, f"clric-enc: 4 encoded, 0 skipped (up to date), 1 failed; {end}"]
    lines = {Path(line["source"]).name: line for line in map(json.loads, first.stdout.splitlines())}
    assert lines == manifest(tmp_path / "out")
    assert lines["text.jpg"]["error"] == "unsupported or unrecognised image format"
    before = streams(tmp_path / "out")
    assert set(before) == {f"{number:02d}.clric" for number in range(4)}
    assert lines["00.png"]["sha256"] == hashlib.sha256((tmp_path / "in/00.png").read_bytes()).hexdigest()

    # One stream is gone, one image is new, and the bad one is mended: it goes where it is in the folder.
    (tmp_path / "out" / "00.clric").unlink()
    (tmp_path / "in" / "01.png").write_bytes((tmp_path / "in" / "03.png").read_bytes())
    Image.new("RGB", (16, 16)).save(tmp_path / "in" / "deep" / "text.jpg")
    second = encode(*command)
    message = f"clric-enc: 3 encoded, 2 skipped (up to date), 0 failed; {end}\n"
    assert (second.returncode, second.stderr) == (0, message)
    after = streams(tmp_path / "out")
    assert after == before | {"01.clric": before["03.clric"]}
    assert (tmp_path / "out" / "deep" / "text.clric").is_file()

    third = encode(*command)
    message = f"clric-enc: 0 encoded, 5 skipped (up to date), 0 failed; {end}\n"
    assert (third.returncode, third.stdout, third.stderr) == (0, "", message)
    fourth = encode(*command[:-1], "--quality", "20", "--ray")
    assert (fourth.returncode, fourth.stderr) == (0, f"clric-enc: 5 encoded, 0 skipped (up to date), 0 failed; {end}\n")
    assert streams(tmp_path / "out") != after


def test_after_ctrl_c_a_second_run_goes_on(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", 24)
    command = [COMMAND, tmp_path / "in", "-o", tmp_path / "out", *FAST, "--json", "--ray"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(4):
            process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        started = time.monotonic()
        message = process.stderr.read()
    assert time.monotonic() - started < 30
    assert process.returncode == 130
    known = len(manifest(tmp_path / "out"))
    assert message == (f"clric-enc: stopped after {known} images; re-run the same command to resume\n")
    assert not workers()
    assert 4 <= known < 24
    second = encode(*command[1:])
    assert (second.returncode, second.stderr) == (
        0,
        f"clric-enc: {24 - known} encoded, {known} skipped (up to date), 0 failed; see {tmp_path}/out/manifest.jsonl\n",
    )
    assert len(streams(tmp_path / "out")) == len(manifest(tmp_path / "out")) == 24


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of an S3 server on this machine, which commands find by their environment; with the bucket photos."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install s3fs")
    moto = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'moto[server]'")
    import boto3

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    try:
        client = boto3.client("s3")
        client.create_bucket(Bucket="photos")
        yield client
    finally:
        server.stop()


def test_from_s3_to_s3(s3: Any, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "in", 4)
    for photo in photos:
        s3.upload_file(photo, "photos", f"holiday/{Path(photo).name}")
    s3.put_object(Bucket="photos", Key="holiday/bad.png", Body=b"no image")
    command = ("s3://photos/holiday", "-o", "s3://photos/out", *FAST, "--ray")
    first = encode(*command)
    assert first.returncode == 1
    assert first.stderr.splitlines() == [
        "clric-enc: s3://photos/holiday/bad.png: unsupported or unrecognised image format",
        "clric-enc: 4 encoded, 0 skipped (up to date), 1 failed; see s3://photos/out/manifest.jsonl",
    ]
    assert encode(*photos, "-o", f"{tmp_path}/local/", *FAST).returncode == 0
    names = [content["Key"] for content in s3.list_objects_v2(Bucket="photos", Prefix="out/")["Contents"]]
    assert names == [*(f"out/{number:02d}.clric" for number in range(4)), "out/manifest.jsonl"]
    for name, data in streams(tmp_path / "local").items():
        assert s3.get_object(Bucket="photos", Key=f"out/{name}")["Body"].read() == data
    s3.put_object(Bucket="photos", Key="holiday/00.png", Body=Path(photos[3]).read_bytes())
    s3.delete_object(Bucket="photos", Key="holiday/bad.png")
    second = encode(*command)
    assert second.stderr == (
        "clric-enc: 1 encoded, 3 skipped (up to date), 0 failed; see s3://photos/out/manifest.jsonl\n"
    )
    assert second.returncode == 0


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", 2)
    for arguments, code, message in (
        (("in", "--ray"), 2, "--ray needs a folder for the streams: -o DIR"),
        (("-o", "out", "in", "--ray", "in"), 2, "--ray in: expected auto or host:port"),
        (("in", "-o", "out", "--ray", "127.0.0.1:1"), 1, "the cluster 127.0.0.1:1 cannot be reached"),
        (("in", "-o", "in/00.png", "--ray"), 1, "in/00.png"),
        (("in", "-o", "out", "--vae", "nonsense", "--ray"), 1, "nonsense"),
        (("in", "-o", "nonsense://out", "--ray"), 1, "nonsense"),
        (("in", "-o", "out", "--device", "cuda", "--ray"), 1, "no node with room has a GPU; use --device cpu"),
    ):
        result = encode(*arguments, cwd=tmp_path)
        assert (result.returncode, result.stderr.count("\n")) == (code, 1), result.stderr
        assert message in result.stderr


def test_in_a_pipeline_of_ones_own(tmp_path: Path) -> None:
    """`EncodeImages` makes the same streams of files and of arrays, and they are those of `encode`."""
    from clric_encoder import encode as encode_one
    from clric_encoder.farm import EncodeImages

    photos = write_photos(tmp_path / "in", 3)
    (tmp_path / "in" / "bad.png").write_text("no image")
    ray.init("local", num_cpus=2, object_store_memory=STORE, include_dashboard=False)
    try:
        settings = {"fn_constructor_kwargs": {"preset": "instant", "quality": 30}, "batch_size": 2, "concurrency": 1}
        files = ray.data.read_binary_files(str(tmp_path / "in"), include_paths=True)
        rows = {Path(row["path"]).name: row for row in files.map_batches(EncodeImages, **settings).take_all()}
        images = ray.data.from_items([{"name": Path(p).name, "image": np.asarray(Image.open(p))} for p in photos])
        arrays = {row["name"]: row for row in images.map_batches(EncodeImages, **settings).take_all()}
    finally:
        ray.shutdown()
    assert rows["bad.png"]["error"] == "unsupported or unrecognised image format"
    assert (rows["bad.png"]["stream"], np.isnan(rows["bad.png"]["bpp"])) == (b"", True)
    for photo in photos:
        row = rows[Path(photo).name]
        assert row["stream"] == encode_one(np.asarray(Image.open(photo)), preset="instant", quality=30)
        assert row["bpp"] == read_header(row["stream"]).bpp
        assert row["error"] == ""
        assert arrays[Path(photo).name]["stream"] == row["stream"]


@pytest.mark.parametrize(
    ("cpus", "gpus", "threads", "resources", "count"),
    [
        (8, 0, 1, {"num_cpus": 1}, 8),
        (8, 0, 4, {"num_cpus": 4}, 2),
        (8, 2, 1, {"num_cpus": 1, "num_gpus": 0.25}, 8),
        (4, 2, 1, {"num_cpus": 1, "num_gpus": 0.5}, 4),
        (2, 1, 2, {"num_cpus": 2, "num_gpus": 1}, 1),
    ],
)
def test_what_an_actor_gets(
    monkeypatch: pytest.MonkeyPatch, cpus: int, gpus: int, threads: int, resources: dict[str, float], count: int
) -> None:
    """No GPU is here: what Ray says of its nodes is given."""
    from clric_encoder import farm
    from clric_encoder.batch_encoder import Settings
    from clric_encoder.rate import Rate

    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": cpus, "GPU": gpus}}])
    actors = farm._plan_actors(Settings(Rate(1.0)), threads, None)
    assert (actors.resources, actors.count) == (resources, count)
    assert actors.settings.device == ("cuda" if gpus else "cpu")
    assert farm._plan_actors(Settings(Rate(1.0), device="cpu"), 1, None).resources == {"num_cpus": 1}


@pytest.mark.parametrize(
    ("threads", "memory", "message"),
    [(3, None, "no node of the cluster has 3 CPUs for an actor"), (1, 1 << 40, "1 CPUs and 1099511627776 bytes")],
)
def test_actors_that_fit_nowhere(
    monkeypatch: pytest.MonkeyPatch, threads: int, memory: int | None, message: str
) -> None:
    """Ray would wait for a node that has room, for ever."""
    from clric_encoder import farm
    from clric_encoder.batch_encoder import Settings
    from clric_encoder.rate import Rate

    node = {"Alive": True, "Resources": {"CPU": 2, "GPU": 1, "memory": 1e9}}
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    with pytest.raises(ClricError, match=message):
        farm._plan_actors(Settings(Rate(1.0)), threads, memory)


def test_storage_without_credentials_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install s3fs")
    write_photos(tmp_path / "in", 1)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    for arguments in (("s3://photos/in", "-o", "out", "--ray"), ("in", "-o", "s3://photos/out", "--ray")):
        result = encode(*arguments, cwd=tmp_path)
        assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
        assert "s3://photos" in result.stderr
        assert "redentials" in result.stderr


def test_parts_of_a_manifest_are_read_in_any_folder(tmp_path: Path) -> None:
    from clric_encoder.farm_storage import Manifest

    folder = tmp_path / "photos [2026]?*"
    manifest = Manifest(str(folder))
    manifest._written -= 1000
    manifest.add({"source": "a.png", "error": None})  # and then the process is killed
    again = Manifest(str(folder))
    assert list(again._lines) == ["a.png"]
    assert [path.name for path in folder.iterdir()] == ["manifest.jsonl"]


def test_lines_of_runs_that_go_on_at_once_are_all_kept(tmp_path: Path) -> None:
    from clric_encoder.farm_storage import Manifest

    first = Manifest(str(tmp_path))
    first.add({"source": "a.png", "error": None})
    second = Manifest(str(tmp_path))
    second._written -= 1000
    second.add({"source": "b.png", "error": None})  # in a part
    first.add({"source": "c.png", "error": None})
    first.close()
    second.close()
    assert sorted(Manifest(str(tmp_path))._lines) == ["a.png", "b.png", "c.png"]


def test_images_of_one_name_are_left_out_and_told(tmp_path: Path) -> None:
    from clric_encoder.farm_storage import list_files

    for name in ("a.jpg", "a.png", "b.png"):
        (tmp_path / name).touch()
    files, clashes = list_files([str(tmp_path)], str(tmp_path / "out"))
    assert [Path(file["source"]).name for file in files] == ["b.png"]
    assert {Path(source).name for source in clashes} == {"a.jpg", "a.png"}
    assert all("a.clric too" in message for message in clashes.values())
