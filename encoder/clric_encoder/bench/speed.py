"""Milliseconds of a training iteration, and images a minute, by how many images are trained together."""

import csv
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from clric_decoder.errors import ClricError
from clric_decoder.image import read_image

from ..autoencoder import load_encoder
from ..encoding import encode_latents, find_device, load_tuning
from ..rate import Rate
from ..training.loop import REPORT_EVERY, Progress
from .processor import processor_name


@dataclass(frozen=True)
class Speed:
    """One batch of images. latent_ms, image_ms: means of an iteration of the whole batch in the two parts of the
    training; the second has its looks at the images. images_per_minute: of the batch, networks already loaded."""

    device: str
    torch: str
    threads: int
    preset: str
    vae: str
    width: int
    height: int
    batch: int
    latent_ms: float
    image_ms: float | None
    seconds: float
    images_per_minute: float


def measure_speed(
    files: Sequence[Path],
    batches: Sequence[int],
    presets: Sequence[str],
    *,
    vae: str = "small",
    lmbda: float = 1.0,
    device: str = "auto",
    models: str | None = None,
    report: Callable[[Speed], None] = lambda speed: None,
) -> list[Speed]:
    """Encodes the first images of a list, as many as each batch has, all of the first one's size.

    Raises ClricError where there are fewer, and for what cannot be read or loaded.
    """
    device = find_device(device)
    encoder = load_encoder(vae, models, device)
    images: list[np.ndarray] = []
    for file in files:
        pixels = read_image(file).pixels
        if images and pixels.shape != images[0].shape and pixels.shape[:2] == images[0].shape[1::-1]:
            pixels = np.rot90(pixels).copy()
        if not images or pixels.shape == images[0].shape:
            images.append(pixels)
    if len(images) < max(batches):
        raise ClricError(f"only {len(images)} images of one size are given; a batch of {max(batches)} needs more")
    latents = [encoder.encode(pixels) for pixels in images[: max(batches)]]
    height, width, _ = images[0].shape

    def encode(count: int, preset: str, progress: Callable[[Progress], None]) -> None:
        encode_latents(
            np.stack(latents[:count]),
            [(width, height)] * count,
            encoder.space,
            Rate(lmbda),
            preset=preset,
            tuning=load_tuning("auto", encoder.space, preset, models=models, device=device),
            images=images[:count],
            device=device,
            progress=progress,
        )

    encode(1, "fast", lambda progress: None)  # compiles what is not compiled yet
    speeds = []
    for preset in presets:
        for count in batches:
            times: dict[str, list[float]] = {}
            begin = time.perf_counter()

            def note(progress: Progress, times: dict[str, list[float]] = times) -> None:
                times.setdefault(progress.stage.split()[0], []).append(time.perf_counter())

            encode(count, preset, note)
            seconds = time.perf_counter() - begin
            speed = Speed(
                torch.cuda.get_device_name() if device == "cuda" else processor_name(),
                torch.__version__,
                torch.get_num_threads(),
                preset,
                vae,
                width,
                height,
                count,
                _milliseconds(times["training"]),
                _milliseconds(times["tuning"]) if "tuning" in times else None,
                round(seconds, 2),
                round(60 * count / seconds, 2),
            )
            speeds.append(speed)
            report(speed)
    return speeds


def write_speeds(speeds: Sequence[Speed], path: Path) -> None:
    """As CSV; replaces the file in one step. Raises OSError."""
    scratch = path.with_suffix(".tmp")
    with open(scratch, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(speeds[0])))
        writer.writeheader()
        writer.writerows(asdict(speed) for speed in speeds)
    os.replace(scratch, path)


def _milliseconds(times: Sequence[float]) -> float:
    """The mean of an iteration, looks at the image included, of the moments at which every `REPORT_EVERY`th reported.

    A median would leave the looks out, which most intervals have none of.
    """
    return round(1000 * (times[-1] - times[0]) / (REPORT_EVERY * (len(times) - 1)), 3)
