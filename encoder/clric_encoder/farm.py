"""Encoding with Ray, on all CPUs or GPUs of a machine or a cluster (``pip install 'clric[cpu,ray]'``).

    list of files -> their sizes -> batches of one size -> a pool of actors -> streams and manifest.jsonl

`encode_files` does all of it. `EncodeImages` is the encoder alone, for a Ray Data pipeline of one's own. Paths are
those of fsspec: local ones, s3://, gs:// and others. What a lost worker or node was working on is tried again, `TRIES`
times in all, and costs nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from clric_decoder.bitstream import read_header
from clric_decoder.cpus import available_cpus
from clric_decoder.errors import ClricError, one_line
from clric_decoder.image import read_image, take_over_pillow
from PIL import ExifTags, Image

from .batch_encoder import BatchEncoder, Batches, Failure, Picture, Settings
from .instant import INSTANT
from .rate import choose_rate
from .stream import Encoded
from .up_to_date import made_of

try:
    import ray
    import ray.data
    import ray.exceptions
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from .farm_storage import Manifest, list_files, make_folders, open_system, write
except ModuleNotFoundError as error:
    raise ClricError(f"{error.name} is not installed; run: pip install 'clric[ray]'") from error

# Times that an image is tried, where what went wrong may go well another time.
TRIES = 3

# Pieces of work at most: each costs the driver 1 ms and 6 kB. A piece is what a lost worker leaves to be done again.
MAX_PIECES = 100_000

# Images in a piece of work of preset instant, which has no batches.
INSTANT_IMAGES = 16

# Actors that share a GPU at most, and images that are trained together on a whole one at most.
ACTORS_PER_GPU, GPU_BATCH = 4, 64

# The object store of a local cluster, bytes. It holds lists of files.
OBJECT_STORE = 512 << 20


@dataclass(frozen=True)
class Progress:
    """How far a run has come: images to encode, encoded, and failed; seconds since it began."""

    total: int
    encoded: int
    failed: int
    seconds: float

    @property
    def per_minute(self) -> float:
        return 60 * (self.encoded + self.failed) / max(self.seconds, 1e-3)

    @property
    def seconds_left(self) -> float:
        return (self.total - self.encoded - self.failed) * 60 / max(self.per_minute, 1e-3)


@dataclass(frozen=True)
class Report:
    """What a run did: images that it encoded and skipped, and those that failed, with the reason."""

    encoded: int
    skipped: int
    failed: dict[str, str]


# Called after each image with its line of the manifest.
Watch = Callable[[Progress, dict[str, Any]], None]


def encode_files(
    sources: Sequence[str],
    output: str,
    *,
    address: str | None = None,
    quality: float | None = None,
    lmbda: float | None = None,
    size: int | None = None,
    bpp: float | None = None,
    vae: str = "small",
    preset: str = "default",
    tune: str = "auto",
    lpips: str | None = None,
    device: str = "auto",
    seed: int = 0,
    models: str | None = None,
    strip: bool = False,
    threads: int = 1,
    memory: int | None = None,
    measure: bool | None = None,
    force: bool = False,
    watch: Watch | None = None,
) -> Report:
    """Encodes image files, and those in folders and their subfolders, to streams in the folder `output`.

    sources, output: paths of fsspec that all nodes can reach. A stream has the name of its image with the suffix
        .clric; `output`/manifest.jsonl has a line of JSON for each image. Images whose line says that they were encoded
        as they are, with the same settings, are skipped.
    address: of a running cluster (auto, or host:port); None starts one on this machine, which ends with the call. A
        program that has called ray.init keeps its cluster.
    quality to strip: as of `clric.encode`; models is a folder of each node. auto takes GPUs where the cluster has any.
    threads: of an actor, which takes as many CPUs. One thread encodes the most images in a given time, several take
        less time for each. memory: bytes that Ray reserves for an actor.
    measure: whether streams are decoded for `image_mse` of the manifest; None: for all presets but instant, which would
        take a third longer.
    force: encode what is up to date too.
    Raises ClricError where nothing can be done at all. What is wrong with single images is in the report.
    """
    rate = choose_rate(lmbda, quality, size, bpp)
    settings = Settings(rate, vae, preset, tune, lpips, device, seed, models, strip)
    measure = preset != INSTANT if measure is None else measure
    encoder = BatchEncoder(replace(settings, device="cpu"))
    encoder.load()  # what is wrong with the settings is said at once
    files, failed = list_files(sources, output)
    manifest = Manifest(output)
    for file in files:
        file["made_of"] = made_of(settings.of_streams(), file.pop("version"))
    to_do = files if force else manifest.outdated(files)
    encoded = 0
    if not to_do:
        return Report(0, len(files), failed)
    with contextlib.closing(manifest), _cluster(address):
        make_folders(to_do)
        actors = _plan_actors(settings, threads, memory)
        batches = _plan_batches(to_do, encoder, actors, threads)
        start = time.monotonic()
        for line in _encode(batches, actors, measure):
            manifest.add(line)
            if line["error"] is None:
                encoded += 1
            else:
                failed[line["source"]] = line["error"]
            if watch is not None:
                watch(Progress(len(to_do), encoded, len(failed), time.monotonic() - start), line)
    return Report(encoded, len(files) - len(to_do), failed)


class EncodeImages:
    """A callable class for `ray.data.Dataset.map_batches`: batches of images get a column of streams.

    A batch has a column `bytes` of image files, as `ray.data.read_binary_files` gives them, or `image` of arrays
    (height, width, 3) uint8, as `ray.data.read_images` does. Images of one size in a batch are trained together.
    Columns that are added: stream, empty for an image that failed; bpp, latent_mse and seconds, not a number for it;
    note and error, empty as a rule. Arguments: see `encode_files`.
    """

    def __init__(
        self,
        *,
        quality: float | None = None,
        lmbda: float | None = None,
        size: int | None = None,
        bpp: float | None = None,
        vae: str = "small",
        preset: str = "default",
        tune: str = "auto",
        lpips: str | None = None,
        device: str = "auto",
        seed: int = 0,
        models: str | None = None,
        strip: bool = False,
        threads: int = 1,
    ) -> None:
        rate = choose_rate(lmbda, quality, size, bpp)
        settings = Settings(rate, vae, preset, tune, lpips, device, seed, models, strip)
        _take_over_process(settings, threads)
        self._encoder = BatchEncoder(settings)
        self._encoder.load()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        count = len(next(iter(batch.values())))
        streams, numbers = [b""] * count, np.full((3, count), np.nan)
        notes, errors = [""] * count, [""] * count

        def read() -> Iterator[Picture]:
            for number in range(count):
                start = time.perf_counter()
                try:
                    if "bytes" in batch:
                        content = io.BytesIO(batch["bytes"][number])
                        pixels, warnings, metadata = read_image(content, strip=self._encoder.settings.strip)
                    else:
                        pixels, warnings, metadata = np.asarray(batch["image"][number]), [], {}
                except ClricError as error:
                    errors[number] = str(error).removeprefix("-: ")
                    continue
                notes[number] = "; ".join(warning.removeprefix("-: ") for warning in warnings)
                yield Picture(number, pixels, metadata, time.perf_counter() - start)

        for picture, result in self._encoder.encode(read()):
            if isinstance(result, Failure):
                errors[picture.key] = str(result)
                continue
            streams[picture.key] = result.data
            header = read_header(result.data, max_pixels=picture.pixels.size)
            numbers[:, picture.key] = header.bpp, result.latent_mse, picture.seconds
            notes[picture.key] = "; ".join(filter(None, (notes[picture.key], result.note)))
        texts = {"stream": streams, "note": notes, "error": errors}
        return {
            **batch,
            **{name: np.array(values, dtype=object) for name, values in texts.items()},
            **dict(zip(("bpp", "latent_mse", "seconds"), numbers, strict=True)),
        }


# What runs on the machine of the command.


@contextlib.contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # encoding reports nothing to anybody
    local = {"num_cpus": available_cpus(), "include_dashboard": False, "object_store_memory": OBJECT_STORE}
    try:
        if address not in (None, "auto"):  # Ray would wait for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **({} if address else local))
    except Exception as error:  # of any kind: a cluster that is not there, of another version, ports that are taken
        where = f"the cluster {address} cannot be reached" if address else "no local cluster can be started"
        raise ClricError(f"{where} ({one_line(error)[:300]})") from error
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class _Actors:
    """How actors are made. settings: with the device that the cluster has. count: for which there is room now."""

    settings: Settings
    threads: int
    gpu_share: float
    resources: dict[str, float]
    count: int


def _plan_actors(settings: Settings, threads: int, memory: int | None) -> _Actors:
    """Actors on GPUs, if the cluster has any and they can be used, or else on CPUs."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    reserved = {} if memory is None else {"memory": float(memory)}
    roomy = [node for node in nodes if node.get("CPU", 0) >= threads and node.get("memory", 0) >= (memory or 0)]
    if not roomy:
        room = f"{threads} CPUs" + ("" if memory is None else f" and {memory} bytes of memory")
        raise ClricError(f"no node of the cluster has {room} for an actor; ask for less")
    with_gpus = [node for node in roomy if node.get("GPU", 0) >= 1]
    if settings.device == "cuda" and not with_gpus:
        raise ClricError("no node with room has a GPU; use --device cpu")
    if with_gpus and settings.device != "cpu" and settings.preset != INSTANT:
        gpus, cpus = (sum(node.get(kind, 0) for node in with_gpus) for kind in ("GPU", "CPU"))
        per_gpu = int(max(1, min(ACTORS_PER_GPU, cpus // (gpus * threads))))
        resources = {"num_cpus": threads, "num_gpus": 1 / per_gpu, **reserved}
        return _Actors(replace(settings, device="cuda"), threads, 1 / per_gpu, resources, int(gpus) * per_gpu)
    count = sum(int(node["CPU"] // threads) for node in roomy)
    return _Actors(replace(settings, device="cpu"), threads, 1, {"num_cpus": threads, **reserved}, count)


def _plan_batches(
    files: Sequence[dict[str, Any]], encoder: BatchEncoder, actors: _Actors, threads: int
) -> list[list[dict[str, Any]]]:
    """The batches in which the command would train these images, in this order, on so many threads."""
    if encoder.settings.preset == INSTANT:
        return [list(files[first : first + INSTANT_IMAGES]) for first in range(0, len(files), INSTANT_IMAGES)]
    from .torch_threads import torch_threads

    def limit(shape: tuple[int, int]) -> int:
        if actors.settings.device == "cuda":  # the actor, which knows the memory, divides them further
            return max(1, int(GPU_BATCH * actors.gpu_share))
        return encoder.batch_size(shape)

    rows = [{"number": number, "source": file["source"]} for number, file in enumerate(files)]
    sizes = dict[int, tuple[int, int]]()
    for block in _blocks(ray.data.from_items(rows).map_batches(_read_sizes, batch_size=256)):
        for number, height, width in zip(block["number"], block["height"], block["width"], strict=True):
            sizes[int(number)] = int(height), int(width)
    batches, plan = Batches(limit), []
    with torch_threads(threads):
        for number, file in enumerate(files):
            height, width = sizes.get(number, (0, 0))
            if height == 0:  # it cannot be read, and whoever encodes it says why
                plan.append([file])
            elif batch := batches.add((-(-height // 8), -(-width // 8)), file):
                plan.append(batch)
    return [*plan, *batches.rest()]


def _encode(batches: list[list[dict[str, Any]]], actors: _Actors, measure: bool) -> Iterator[dict[str, Any]]:
    """The line of each image, once it is encoded or has failed for good."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    begun = ray.remote(_Begun).options(num_cpus=0, scheduling_strategy=here).remote()
    for attempt in range(1, TRIES + 1):
        if attempt == TRIES:  # should one image kill its worker, the others of its batch get away
            batches = [[file] for batch in batches for file in batch]
        done = set()
        for line in _run_pool(batches, actors, measure, begun, attempt):
            if line.pop("retry") and attempt < TRIES:
                continue
            done.add(line["source"])
            yield line
        batches = [[file for file in batch if file["source"] not in done] for batch in batches]
        batches = [batch for batch in batches if batch]
        if not batches:
            return
    for (file,) in batches:
        line = _line(file, error=f"its worker was lost {TRIES} times (killed, out of memory, or with its node)")
        yield {key: value for key, value in line.items() if key != "retry"}


def _run_pool(
    batches: list[list[dict[str, Any]]], actors: _Actors, measure: bool, begun: Any, attempt: int
) -> Iterator[dict[str, Any]]:
    """Batches through a pool of actors; lines come as they are done, and none of what lost workers had begun."""
    step = -(-len(batches) // MAX_PIECES)
    pieces = [
        {"piece": f"{attempt}.{first}", "batches": json.dumps(batches[first : first + step])}
        for first in range(0, len(batches), step)
    ]
    data = ray.data.from_items(pieces, override_num_blocks=len(pieces)).map_batches(
        _EncodeFiles,
        batch_size=1,
        fn_constructor_args=(actors.settings, actors.threads, actors.gpu_share, measure, begun),
        compute=ray.data.ActorPoolStrategy(
            min_size=1, initial_size=min(actors.count, len(pieces)), max_tasks_in_flight_per_actor=1
        ),
        **actors.resources,
    )
    # No piece waits for an actor that has a long one. Ray is then to add actors as soon as all have one, not two.
    data.context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    for block in _blocks(data):
        yield from map(json.loads, block["line"])


def _blocks(data: Any) -> Iterator[dict[str, np.ndarray]]:
    """What a Ray dataset gives, as it comes. Raises ClricError."""
    data.context.enable_progress_bars = False
    try:
        yield from data.iter_batches(batch_size=None, prefetch_batches=0)
    except ray.exceptions.RayError as error:
        text = str(error).strip()
        node = re.search(r"\bip=([^,)]+)", text)
        where = f"the node {node[1]}" if node else "the cluster"
        reason = text.splitlines()[-1][:300]
        raise ClricError(f"{where} failed ({reason}); check that clric and its weights are there as here") from error


# What runs on the nodes.


class _Begun:
    """How often each piece of work was begun. Ray gives what a lost worker had begun to the next one without end."""

    def __init__(self) -> None:
        self._counts = Counter[str]()

    def count(self, piece: str) -> int:
        self._counts[piece] += 1
        return self._counts[piece]


class _EncodeFiles:
    """Pieces of work, each batches of files as JSON, become lines of the manifest, with ``retry``."""

    def __init__(self, settings: Settings, threads: int, gpu_share: float, measure: bool, begun: Any) -> None:
        _take_over_process(settings, threads)
        self._encoder, self._measure, self._begun = BatchEncoder(settings, gpu_share), measure, begun
        self._encoder.load()
        self._place = {"host": socket.gethostname(), "node": ray.get_runtime_context().get_node_id()}

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, Any]:
        lines: list[str] = []
        for piece, batches in zip(rows["piece"], rows["batches"], strict=True):
            if ray.get(self._begun.count.remote(piece)) == 1:
                for batch in json.loads(batches):
                    lines += [json.dumps(line | self._place) for line in self._encode(batch)]
        return {"line": np.array(lines, dtype=object)}

    def _encode(self, files: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        unread = []

        def read() -> Iterator[Picture]:
            for file in files:
                start = time.perf_counter()
                try:
                    system, path = open_system(file["source"])
                    content = system.cat_file(path)
                    file["sha256"] = hashlib.sha256(content).hexdigest()
                    pixels, notes, metadata = read_image(
                        _File(content, file["source"]), strip=self._encoder.settings.strip
                    )
                except Exception as error:  # file systems' errors have no common base class
                    unread.append(_failed(file, error))
                    continue
                yield Picture(file | {"notes": notes}, pixels, metadata, time.perf_counter() - start)

        for picture, result in self._encoder.encode(read()):
            yield self._finish(picture, result)
        yield from unread

    def _finish(self, picture: Picture, result: Encoded | Failure) -> dict[str, Any]:
        """Writes a stream; gives its line."""
        file, start = picture.key, time.perf_counter()
        if isinstance(result, Failure):
            return _failed(file, result)
        try:
            image_mse = self._encoder.image_mse(result.data, picture) if self._measure else None
            write(file["output"], result.data)
        except Exception as error:  # as above
            return _failed(file, error)
        header = read_header(result.data, max_pixels=picture.pixels.size)
        notes = [note.removeprefix(f"{file['source']}: ") for note in file["notes"]] + (
            [result.note] if result.note else []
        )
        facts = {
            "width": header.width,
            "height": header.height,
            "bytes": header.total_bytes,
            "bpp": header.bpp,
            "lambda": result.lmbda,
            "latent_mse": result.latent_mse,
            "image_mse": image_mse,
            "seconds": round(picture.seconds + time.perf_counter() - start, 3),
            "note": "; ".join(notes) or None,
        }
        return _line(file | facts)


class _File(io.BytesIO):
    """The content of a file, with its name for messages."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name


def _take_over_process(settings: Settings, threads: int) -> None:
    """The process is an actor's own: it computes on so many threads, and Pillow is as in the command."""
    take_over_pillow()
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of onnxruntime's sessions
    if settings.preset != INSTANT:
        import torch

        torch.set_num_threads(threads)


def _read_sizes(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Heights and widths of image files, as they are shown; 0 where they cannot be read."""
    take_over_pillow()
    sizes = np.zeros((len(rows["source"]), 2), np.int64)
    for number, source in enumerate(rows["source"]):
        system, path = open_system(source)
        # The reader of the whole file says what is wrong. A turned PNG is not worth reading all of it now.
        with contextlib.suppress(Exception), system.open(path, block_size=1 << 16) as file, Image.open(file) as image:
            turned = image.format != "PNG" and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            sizes[number] = image.size if turned else image.size[::-1]
    return {"number": rows["number"], "height": sizes[:, 0], "width": sizes[:, 1]}


def _line(file: dict[str, Any], *, error: str | None = None, retry: bool = False) -> dict[str, Any]:
    """The line of the manifest that has what is known of a file, always with the same keys; and ``retry``."""
    keys = ("source", "output", "sha256", "width", "height", "bytes", "bpp", "lambda", "latent_mse", "image_mse")
    known = {key: file.get(key) for key in (*keys, "seconds", "host", "node", "note")}
    return known | {"error": error, "made_of": file["made_of"], "retry": retry}


def _failed(file: dict[str, Any], error: Exception) -> dict[str, Any]:
    """error: a Failure, or what went wrong with reading or writing."""
    reason = getattr(error, "strerror", None) or one_line(error)
    retry = error.retry if isinstance(error, Failure) else not isinstance(error, ClricError | FileNotFoundError)
    return _line(file, error=reason[:500].removeprefix(f"{file['source']}: "), retry=retry)
