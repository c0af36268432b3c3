"""A whole run: photos x codecs x settings, less what results.csv holds already, by several processes."""

import contextlib
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from clric_decoder.cpus import available_cpus
from clric_decoder.errors import ClricError
from clric_decoder.models import LATENT_SPACES, find_autoencoder, find_decoder

from .codecs import Codec
from .fid import FID_WEIGHTS
from .measure import (
    Metrics,
    Photo,
    Task,
    crop_place,
    decoder_mac_per_pixel,
    keep_crop,
    keep_features,
    measure,
    read_photo,
)
from .metrics import LPIPS_BACKBONES, VGG_FILE, find_lpips
from .processor import processor_name
from .report import Run
from .results import ResultsFile, Row, read_rows
from .vgg import find_dists
from .workers import TaskError, do_all

# Photos of which the report shows crops: the first ones.
_SHOWN = 3

_KODAK_PIXELS = 768 * 512


@dataclass(frozen=True)
class Watcher:
    """What is told while the work goes on. total: of rows and of seconds, both before the first of them starts."""

    total: Callable[[int, float], None]
    started: Callable[[Task], None]
    done: Callable[[Task, float, Row | None], None]
    failed: Callable[[str, str], None]
    warned: Callable[[str], None]


def find_metrics(folder: Path | None) -> tuple[Metrics, dict[str, str]]:
    """What the weights in a folder can measure, and why the rest cannot be."""
    lpips = find_lpips(folder)
    where = f"in {folder}" if folder else "given (--metrics DIR)"
    vgg = folder / VGG_FILE if folder and (folder / VGG_FILE).is_file() else None
    if vgg:
        lpips.pop("vgg", None)
    missing = {
        f"LPIPS {network}": f"no {backbone}*.pth with {network}.pth (its weights) is {where}"
        for network, backbone in LPIPS_BACKBONES.items()
        if network not in lpips and not (vgg and network == "vgg")
    }
    dists = find_dists()
    if not vgg:
        missing["DISTS"] = missing["FD-VGG16"] = f"no {VGG_FILE} (VGG16 with the heads of LPIPS) is {where}"
    elif not dists:
        missing["DISTS"] = "dists-pytorch is not installed; run: pip install 'clric[bench]'"
    ssimulacra2 = find_spec("ssimulacra2") is not None
    if not ssimulacra2:
        missing["SSIMULACRA2"] = "ssimulacra2 is not installed; run: pip install 'clric[bench]'"
    missing["butteraugli"] = "no package on PyPI has it"
    inception = folder / FID_WEIGHTS if folder and (folder / FID_WEIGHTS).is_file() else None
    if not inception:
        missing["FID"] = f"no {FID_WEIGHTS} (Inception as TorchScript) is {where}"
    files = tuple((network, *paths) for network, paths in lpips.items())
    return Metrics(files, inception, vgg, dists if vgg else None, ssimulacra2), missing


def run(
    images: Sequence[tuple[Path, str]],
    codecs: Sequence[Codec],
    folder: Path,
    metrics: tuple[Metrics, dict[str, str]],
    jobs: int,
    watcher: Watcher,
) -> bool:
    """Measures what is missing in the results of a folder; whether nothing failed.

    Raises ClricError where nothing can be done at all. Rows are in results.csv as soon as they are measured.
    """
    usable = [codec for codec in codecs if not codec.unavailable]
    if not any(codec.coded for codec in usable):
        raise ClricError(f"no codec is available: {'; '.join(f'{c.name}: {c.unavailable}' for c in codecs)}")
    failures: list[str] = []

    def fail(what: str, why: str) -> None:
        failures.append(f"{what}: {why}" if not why.startswith(what) else why)
        watcher.failed(what, why)

    photos: list[Photo] = []
    for path, name in images:
        try:
            photo, notes = read_photo(path, name)
        except ClricError as error:
            fail(str(path), str(error))
            continue
        twin = next((other.name for other in photos if other.sha256 == photo.sha256), None)
        if twin:
            watcher.warned(f"{name}: the same file as {twin}; left out")
            continue
        photos.append(photo)
        for note in notes:
            watcher.warned(note)
    if not photos:
        raise ClricError("none of the images can be read")
    for codec in codecs:
        if codec.unavailable:
            watcher.warned(f"{codec.name}: not measured: {codec.unavailable}")

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ClricError(f"{folder}: cannot be created ({error.strerror})") from error
    have = {row["id"] for row in read_rows(folder)}
    machines = _machines(folder) if have else []
    tasks = _tasks(photos, usable, folder, metrics[0])
    missing = [task for task in tasks if task.id not in have]
    results = ResultsFile(folder)
    unavailable = {codec.name: codec.unavailable for codec in codecs if codec.unavailable}

    if missing and (machine := _machine(jobs)) not in machines:
        machines.append(machine)

    def leave() -> None:
        Run(machines, photos, unavailable, metrics[1], failures).write(folder)

    leave()
    for number, photo in enumerate(photos):
        _keep_original(photo, folder, metrics[0], crop=number < _SHOWN)
    watcher.total(len(missing), sum(map(_seconds, missing)))
    # One thread for each process; what is started by this one takes its environment over.
    os.environ["OMP_NUM_THREADS"] = "1"
    with contextlib.closing(results), contextlib.closing(do_all(measure, missing, jobs, watcher.started)) as outcomes:
        for task, outcome in outcomes:
            if isinstance(outcome, TaskError):
                watcher.done(task, _seconds(task), None)
                fail(f"{task.photo.name}: {task.codec.name}, {task.setting}", str(outcome))
            else:
                results.append(outcome)
                watcher.done(task, _seconds(task), outcome)
    leave()
    return not failures


def _tasks(photos: Sequence[Photo], codecs: Sequence[Codec], folder: Path, metrics: Metrics) -> list[Task]:
    """All rows of a run, photo by photo. The first of a codec and a number of pixels runs alone, for its memory."""
    tasks = []
    sizes: set[tuple[str, int]] = set()
    macs: dict[tuple[str, tuple[int, int]], float | None] = {}
    for number, photo in enumerate(photos):
        for codec in codecs:
            size = photo.width, photo.height
            if codec.vae and (codec.vae, size) not in macs:
                macs[codec.vae, size] = _decoder_mac(codec, *size)
            for setting in codec.settings:
                alone = codec.coded and (codec.name, size[0] * size[1]) not in sizes
                sizes.add((codec.name, size[0] * size[1]))
                mac = macs[codec.vae, size] if codec.vae else None
                tasks.append(Task(photo, codec, setting, metrics, folder, mac, alone, number < _SHOWN))
    return tasks


def _decoder_mac(codec: Codec, width: int, height: int) -> float | None:
    assert codec.vae is not None
    path, _ = find_decoder(codec.vae, codec.models)
    channels = LATENT_SPACES[find_autoencoder(codec.vae).space].channels
    return decoder_mac_per_pixel(path, channels, width, height)


def _keep_original(photo: Photo, folder: Path, metrics: Metrics, crop: bool) -> None:
    from clric_decoder.image import read_image

    features = metrics.inception and not (folder / "fid" / f"{photo.sha256}.npy").is_file()
    if features or (crop and not (folder / "crops" / f"{photo.sha256}.png").is_file()):
        image = read_image(photo.path).pixels
        if crop:
            keep_crop(folder, photo.sha256, image, crop_place(image))
        if features and metrics.inception:
            keep_features(folder, photo.sha256, image, metrics.inception)


def _seconds(task: Task) -> float:
    """What a task takes, roughly: for the time left."""
    pixels = task.photo.width * task.photo.height
    return (1 + task.codec.seconds) * pixels / _KODAK_PIXELS + 5 * task.alone


def _machines(folder: Path) -> list[str]:
    """What measured the rows that are there."""
    try:
        return Run.read(folder).machines
    except ClricError:  # run.json is lost, damaged, or of another version
        return ["a machine that is not known"]


def _machine(jobs: int) -> str:
    return "; ".join(
        (
            f"{processor_name()}, {available_cpus()} CPUs",
            f"{jobs} job{'s' * (jobs > 1)} at once",
            f"{platform.system()}, Python {platform.python_version()}, torch {version('torch')}",
            f"{datetime.now(timezone.utc):%Y-%m-%d}",
        )
    )
