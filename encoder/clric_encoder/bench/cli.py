"""The command clric-bench: images -> results.csv, summary.md and report.html.

Imports are made where they are needed, so that ``--help`` and mistakes on the command line answer at once.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
from clric_decoder.cpus import available_cpus
from clric_decoder.errors import ClricError, one_line
from clric_decoder.image import take_over_pillow
from clric_decoder.terminal import print_error, printable, run_command

from ..instant import INSTANT
from ..rate import Rate
from ..training.presets import PRESETS
from .codecs import CODECS, make_codecs
from .measure import list_images

if TYPE_CHECKING:
    from .measure import Task
    from .results import Row
    from .run import Watcher

NAME = "clric-bench"

DEFAULT_LAMBDAS = (4.0, 1.5, 0.5, 0.15, 0.04)

_Folder = click.Path(file_okay=False, path_type=Path)
_output = click.option(
    "-o", "--output", type=_Folder, default=Path("results"), show_default=True, help="Output folder."
)


@click.group()
@click.version_option(package_name="clric", prog_name=NAME, message="%(prog)s %(version)s")
def command() -> None:
    """Compare clric with other codecs on your images."""


@command.command("run")
@click.argument("images", metavar="IMAGES...", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@_output
@click.option(
    "--codec",
    "names",
    type=click.Choice(CODECS),
    multiple=True,
    metavar="NAME",
    help=f"Codec, one of {', '.join(CODECS)}; repeatable.  [default: all]",
)
@click.option(
    "--vae",
    "vaes",
    metavar="NAME",
    multiple=True,
    default=("small",),
    show_default=True,
    help="clric: autoencoder; repeatable.",
)
@click.option(
    "--preset",
    "presets",
    type=click.Choice([INSTANT, *PRESETS]),
    multiple=True,
    default=("default",),
    show_default=True,
    help="clric: preset; repeatable.",
)
@click.option(
    "--lambda",
    "lambdas",
    type=float,
    multiple=True,
    default=DEFAULT_LAMBDAS,
    show_default=True,
    help="clric: lambda; repeatable.",
)
@click.option(
    "--tune",
    "tunes",
    metavar="NAME|none",
    multiple=True,
    default=("auto",),
    show_default=True,
    help="clric: image decoder to optimise the image for; repeatable, as in --tune auto --tune none.",
)
@click.option("--models", type=_Folder, help="Folder to search for weights first.")
@click.option(
    "--metrics",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with the weights of LPIPS, DISTS and FID.",
)
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=available_cpus,
    show_default="available CPUs",
    help="Number of processes, one thread each.",
)
def run_bench(
    images: tuple[Path, ...],
    output: Path,
    names: tuple[str, ...],
    vaes: tuple[str, ...],
    presets: tuple[str, ...],
    lambdas: tuple[float, ...],
    tunes: tuple[str, ...],
    models: Path | None,
    metrics: Path | None,
    jobs: int,
) -> int:
    """Measure IMAGES (files or folders) and write the report.

    Results that are in the output folder already are not measured again, so that a run that was stopped goes on.
    """
    for lmbda in lambdas:
        try:
            Rate(lmbda)
        except ClricError as error:
            raise click.UsageError(f"--{error}") from None

    def work() -> bool:
        take_over_pillow()
        found = list_images(images)
        with _libraries():
            codecs = make_codecs(names or CODECS, vaes, presets, lambdas, str(models) if models else None, tunes)
            from .report import write_report
            from .run import find_metrics, run
        failures: list[tuple[str, str]] = []
        with _progress(failures) as watcher:
            fine = run(found, codecs, output, find_metrics(metrics), jobs, watcher)
        for what, why in failures:
            print_error(NAME, why, what)
        write_report(output)
        click.echo(printable(str(output / "report.html")))
        return fine

    return _attempt(work)


@command.command("speed")
@click.argument("images", metavar="IMAGES...", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="CSV file to write.")
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(1),
    multiple=True,
    default=(1,),
    show_default=True,
    help="Number of images to train together; repeatable.",
)
@click.option(
    "--preset",
    "presets",
    type=click.Choice(list(PRESETS)),
    multiple=True,
    default=("default",),
    show_default=True,
    help="Preset; repeatable.",
)
@click.option("--vae", metavar="NAME", default="small", show_default=True, help="Autoencoder.")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Device to train on.",
)
@click.option("--models", type=_Folder, help="Folder to search for weights first.")
def speed(
    images: tuple[Path, ...],
    output: Path | None,
    batches: tuple[int, ...],
    presets: tuple[str, ...],
    vae: str,
    device: str,
    models: Path | None,
) -> int:
    """Measure how fast clric encodes IMAGES (files or folders) of one size: milliseconds an iteration, images a minute.

    The time of loading networks and of compiling is not counted.
    """  # fmt: skip

    def work() -> bool:
        take_over_pillow()
        found = [path for path, _ in list_images(images)]
        with _libraries():
            from .speed import Speed, measure_speed, write_speeds

        def show(speed: Speed) -> None:
            image = "" if speed.image_ms is None else f", {speed.image_ms:.2f} ms on the image"
            click.echo(
                f"{speed.device}: {speed.preset}, batch of {speed.batch}: {speed.latent_ms:.2f} ms an iteration on the"
                f" latent{image}; {speed.seconds:.1f} s, {speed.images_per_minute:.1f} images/min"
            )

        folder = str(models) if models else None
        speeds = measure_speed(found, batches, presets, vae=vae, device=device, models=folder, report=show)
        if output is not None:
            write_speeds(speeds, output)
        return True

    return _attempt(work)


@command.command("report")
@_output
def report(output: Path) -> int:
    """Regenerate summary.md, report.html and plots."""

    def work() -> bool:
        with _libraries():
            from .report import write_report
        write_report(output)
        click.echo(printable(str(output / "report.html")))
        return True

    return _attempt(work)


def _attempt(work: Callable[[], bool]) -> int:
    try:
        return 0 if work() else 1
    except ClricError as error:
        print_error(NAME, str(error))
        return 1
    except OSError as error:  # of a crop or a plot on a full disk
        print_error(NAME, f"{error.filename or 'output'}: {error.strerror or one_line(error)}")
        return 1


@contextlib.contextmanager
def _libraries() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ClricError(f"{error.name} is not installed; run: pip install 'clric[bench]'") from error


@contextlib.contextmanager
def _progress(failures: list[tuple[str, str]]) -> "Iterator[Watcher]":
    """A bar on a terminal, or else a line for each row, on standard error. Failures are collected for the end."""
    import rich.progress
    from rich.console import Console
    from rich.markup import escape

    from .run import Watcher

    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.fields[rows]}"),
        rich.progress.TimeRemainingColumn(),
    )
    live = sys.stderr is not None and sys.stderr.isatty()
    bar = rich.progress.Progress(
        *columns, console=Console(stderr=True), transient=True, speed_estimate_period=600, disable=not live
    )
    counts = {"done": 0, "of": 0}
    current: list[Task] = []
    with bar:
        task_id = bar.add_task("", total=None, rows="")

        def show() -> None:
            text = f"{current[0].photo.name}  {current[0].codec.name}, {current[0].setting}" if current else ""
            bar.update(task_id, description=escape(printable(text)), rows=f"{counts['done']}/{counts['of']}")

        def total(rows: int, seconds: float) -> None:
            counts["of"] = rows
            bar.update(task_id, total=seconds)
            show()

        def started(task: "Task") -> None:
            current.append(task)
            show()

        def done(task: "Task", seconds: float, row: "Row | None") -> None:
            counts["done"] += 1
            current.remove(task)
            bar.advance(task_id, seconds)
            show()
            if row and not live and sys.stderr is not None:
                rate = f"{float(row['bpp']):.4f} bpp, " if row["bpp"] else ""
                print(
                    f"{counts['done']}/{counts['of']} {printable(task.photo.name)}  {task.codec.name}, {task.setting}: "
                    f"{rate}{float(row['psnr']):.2f} dB, {float(row['encode_s']):.1f} s",
                    file=sys.stderr,
                    flush=True,
                )

        yield Watcher(
            total,
            started,
            done,
            failed=lambda what, why: failures.append((what, why)),
            warned=lambda message: print_error(NAME, message),  # before the bar begins to move
        )


def main() -> None:
    """Runs the command line, and ends the process with its exit code."""
    sys.exit(run_command(command, NAME))
