"""The command clric-enc: images -> streams, with a live view of the training on a terminal.

torch is imported with the first image, so that ``--help`` and mistakes on the command line answer at once.
"""

import contextlib
import io
import json as json_format
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
from clric_decoder import numpy_start  # noqa: F401, before all that imports numpy
from clric_decoder.bitstream import MAX_SIDE, read_header
from clric_decoder.errors import ClricError
from clric_decoder.files import STANDARD, check_output, read_input, write_output
from clric_decoder.models import search_folders
from clric_decoder.terminal import (
    IMAGE_SUFFIXES,
    choose_outputs,
    end_process,
    list_inputs,
    print_error,
    print_existing,
    printable,
    run_command,
    split_output,
)

from .instant import INSTANT
from .libraries import libraries
from .rate import choose_rate
from .training.presets import PRESETS
from .up_to_date import Records

if TYPE_CHECKING:
    from .batch_encoder import BatchEncoder, Picture
    from .stream import Encoded
    from .training.loop import Progress

NAME = "clric-enc"

# No image file within the limit of pixels is longer: 4 channels of 16 bits, uncompressed.
INPUT_LIMIT = 8 << 28


class _Bytes(click.ParamType):
    """A number of bytes: 5000, 8kB, 8KiB, 1.5MB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([kMGT])(i?))?B?", str(value), re.IGNORECASE)
        if not match:
            self.fail(
                f"{value!r} is not a size; examples: 5000, 8kB (8000 bytes), 8KiB (8192 bytes), 1.5MB", param, ctx
            )
        base = 1024 if match[3] else 1000
        number = float(match[1]) * base ** " kmgt".index((match[2] or " ").lower())
        if not 1 <= number <= 10**9:
            self.fail(f"{value} is out of range; the limits are 1 byte and 1000MB", param, ctx)
        return round(number)


@click.command()
@click.argument("images", metavar="IN... [OUT]", nargs=-1, required=True)
@click.option(
    "-o", "--output", metavar="OUT", help="Output stream, or folder for several inputs; - for standard output."
)
@click.option(
    "--quality",
    type=click.FloatRange(0, 100),
    help="0 (smallest) to 100 (best): lambda is 0.5 * 10^((50 - quality) / 40).  [default: 75]",
)
@click.option("--lambda", "lmbda", type=float, help="Lagrangian weight of the rate: loss = latent MSE + lambda * bpp.")
@click.option(
    "--bpp",
    type=float,
    help="Target rate in bits per pixel: at most this, and at most 3 % below it (preset instant: 15 %).",
)
@click.option(
    "--bytes",
    "size",
    type=_Bytes(),
    help="Target file size in bytes (5000, 8kB, 8KiB, 1.5MB): at most this, and at most 3 % below it (preset instant:"
    " 15 %).",
)
@click.option(
    "--vae",
    metavar="NAME",
    default="small",
    show_default=True,
    help="Autoencoder: a name, or the path of an encoder's .onnx file.",
)
@click.option(
    "--preset",
    type=click.Choice([INSTANT, *PRESETS]),
    default="default",
    show_default=True,
    help="Speed against compression; paper is the paper's configuration, instant needs no training.",
)
@click.option(
    "--tune",
    metavar="NAME|none",
    default="auto",
    show_default=True,
    help="Image decoder to optimise the image for: auto (small or lite by latent space, else none), none, a name, or"
    " the path of an .onnx file.",
)
@click.option(
    "--lpips",
    metavar="FILE",
    help="LPIPS-VGG weights (vgg16_lpips.npz) for the perceptual loss, instead of clric's own network.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Device to train on; auto takes a CUDA GPU if there is one.",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Random seed.")
@click.option("--models", metavar="DIR", help="Folder to search for weights first.")
@click.option("--strip", is_flag=True, help="Leave out EXIF, XMP and colour profile; convert colours to sRGB.")
@click.option("-f", "--force", is_flag=True, help="Overwrite existing outputs, and accept any output suffix.")
@click.option(
    "--ray",
    metavar="[ADDRESS]",
    is_flag=False,
    flag_value="local",
    help="Encode with Ray on all CPUs or GPUs of this machine, or of a running cluster (auto, or host:port). Images and"
    " -o may be folders such as s3://bucket/folder; see docs/cluster.md.",
)
@click.option("--json", is_flag=True, help="Print one line of JSON per image to standard output.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only, no warnings.")
@click.option("-v", "--verbose", is_flag=True, help="Print the time that each stage took.")
@click.version_option(package_name="clric", prog_name=NAME, message="%(prog)s %(version)s")
def command(
    images: Sequence[str],
    output: str | None,
    quality: float | None,
    lmbda: float | None,
    bpp: float | None,
    size: int | None,
    vae: str,
    preset: str,
    tune: str,
    lpips: str | None,
    device: str,
    seed: int,
    models: str | None,
    strip: bool,
    force: bool,
    ray: str | None,
    json: bool,
    quiet: bool,
    verbose: bool,
) -> int:
    """Encode images to .clric streams: IN OUT, or several inputs with -o FOLDER. The default output is IN.clric.

    IN may be a folder (all images in it) or - for standard input. Images of one size are trained together, which takes
    less time per image. An existing file is overwritten if you named it, or with --force. In folders, streams that are
    up to date with image and settings are skipped, so that a run that was stopped goes on.
    """
    if sum(value is not None for value in (lmbda, quality, size, bpp)) > 1:
        raise click.UsageError("--lambda, --quality, --bytes and --bpp are mutually exclusive")
    try:
        rate = choose_rate(lmbda, quality, size, bpp)
    except ClricError as error:  # it begins with the option's name
        raise click.UsageError(f"--{error}") from None
    if preset == INSTANT and (tune not in ("auto", "none") or lpips is not None or device == "cuda"):
        raise click.UsageError(
            "--tune, --lpips and --device cuda cannot be used with --preset instant, which trains nothing"
        )
    if tune == "none" and lpips is not None:
        raise click.UsageError("--lpips cannot be used with --tune none")
    if models is not None and ray is None:  # with Ray it is a folder of each node
        search_folders(models)  # says where there is no such folder, which some presets do not look into
    if quiet and verbose:
        raise click.UsageError("--quiet and --verbose are mutually exclusive")
    if ray is not None:
        if output is None or output == STANDARD:
            raise click.UsageError("--ray needs a folder for the streams: -o DIR")
        if verbose:
            raise click.UsageError("--verbose cannot be used with --ray, whose manifest.jsonl has the times")
        if not re.fullmatch(r"local|auto|[^/]+:[0-9]+", ray):
            raise click.UsageError(f"--ray {ray}: expected auto or host:port; write --ray alone after the images")
        return _encode_with_ray(
            images,
            output,
            address=None if ray == "local" else ray,
            lmbda=rate.lmbda,
            size=rate.size,
            bpp=rate.bpp,
            vae=vae,
            preset=preset,
            tune=tune,
            lpips=lpips,
            device=device,
            seed=seed,
            models=models,
            strip=strip,
            force=force,
            json_lines=json,
            quiet=quiet,
        )
    images, output = split_output(images, output, IMAGE_SUFFIXES, (".clric",))
    to_folder = any(map(os.path.isdir, images))
    images = list(dict.fromkeys(list_inputs(images, IMAGE_SUFFIXES)))  # one that was named twice is encoded once
    outputs = choose_outputs(images, output, ".clric", to_folder=to_folder, any_suffix=force)
    if json and STANDARD in outputs.places:
        raise click.UsageError("--json and the stream would both be written to standard output; name a file with -o")

    from .batch_encoder import BatchEncoder, Settings

    settings = Settings(rate, vae, preset, tune, lpips, device, seed, models, strip)
    failures = list(outputs.clashes.items())
    jobs = [job for job in zip(images, outputs.places, strict=True) if job[0] not in outputs.clashes]
    existing: list[tuple[str, str]] = []
    records = None
    if not outputs.named:
        records = Records(settings.of_streams(), create=to_folder or len(images) > 1 or output is not None)
        to_do, unknown, skipped = _to_do(jobs, records)  # with --force too: the records learn what streams are made of
        if not force:
            jobs, existing = to_do, unknown
            if skipped and not quiet:
                print_error(NAME, f"skipped {skipped} up-to-date file{'s' * (skipped > 1)}; --force re-encodes")
    with _live_view(len(jobs), show=bool(jobs) and not quiet, verbose=verbose) as view:
        try:
            _Run(BatchEncoder(settings), records, view, failures, json, quiet).encode(jobs)
            code = 1 if failures or existing else 0
        except KeyboardInterrupt:
            code = 130
        except BrokenPipeError:  # nobody reads standard output any more, as after `| head`
            code = 1
        finally:
            unwritten = records and records.last_write()
    print_existing(NAME, existing)
    for source, message in failures:
        print_error(NAME, message, source)
    if unwritten:
        print_error(NAME, unwritten)
    return max(code, 1) if unwritten else code


def _encode_with_ray(images: Sequence[str], output: str, **arguments: Any) -> int:
    try:
        with libraries():
            from .farm_command import encode_for_command
    except ClricError as error:
        print_error(NAME, str(error))
        return 1
    return encode_for_command(NAME, images, output, **arguments)


def _to_do(jobs: list[tuple[str, str]], records: Records) -> tuple[list[tuple[str, str]], list[tuple[str, str]], int]:
    """Of images and places of their streams: those to encode, those with another file there, and how many are up to
    date."""
    to_do, existing, skipped = [], [], 0
    for source, place in jobs:
        state = records.state(source, place)
        if state == "up to date":
            skipped += 1
        elif state == "unknown":
            existing.append((source, place))
        else:
            to_do.append((source, place))
    return to_do, existing, skipped


@dataclass
class _Run:
    """Images on their way to streams, and what is said of them.

    records: what streams were made of, where that is kept. failures: gets images with what is wrong with them.
    """

    encoder: "BatchEncoder"
    records: Records | None
    view: "_View"
    failures: list[tuple[str, str]]
    json: bool
    quiet: bool

    def encode(self, jobs: Sequence[tuple[str, str]]) -> None:
        """jobs: images, and where their streams are to be."""
        encoded = self.encoder.encode(
            self._read(jobs),
            progress=lambda pictures, progress: self.view.move([picture.key[0] for picture in pictures], progress),
            warn=self._warn,
            compiling=self.view.compile,
        )
        for picture, result in encoded:
            source, place = picture.key
            try:
                if isinstance(result, ClricError):
                    raise result
                self._write(source, place, result)
            except ClricError as error:
                self.failures.append((source, str(error)))
            self.view.finish()

    def _read(self, jobs: Sequence[tuple[str, str]]) -> Iterator["Picture"]:
        from clric_decoder.image import read_image, take_over_pillow

        from .batch_encoder import Picture

        take_over_pillow()
        for source, place in jobs:
            try:
                check_output(place)
                file = io.BytesIO(read_input(STANDARD, INPUT_LIMIT)) if source == STANDARD else source
                pixels, notes, metadata = read_image(file, strip=self.encoder.settings.strip)
            except (ClricError, MemoryError) as error:
                reason = "not enough memory" if isinstance(error, MemoryError) else str(error)
                self.failures.append((source, reason))
                self.view.finish()
                continue
            for note in notes:
                self._warn(note, source)
            self.view.start(source, "encoding" if self.encoder.settings.preset == INSTANT else "autoencoder")
            yield Picture((source, place), pixels, metadata)

    def _warn(self, message: str, source: str | None = None) -> None:
        if not self.quiet:
            print_error(NAME, message, source)

    def _write(self, source: str, place: str, encoded: "Encoded") -> None:
        write_output(place, encoded.data)
        if self.records is not None:
            self.records.add(place, encoded.data)
        facts = _facts(source, place, encoded)
        if encoded.note and (encoded.too_large or not self.quiet):
            print_error(NAME, encoded.note, source)
        if self.json:
            write_output(STANDARD, f"{json_format.dumps(facts)}\n".encode())
        elif not self.quiet and sys.stderr is not None:
            shown, output = "stdin" if source == STANDARD else source, "stdout" if place == STANDARD else place
            print(
                f"{printable(shown)} -> {printable(output)}: {facts['bytes']:,} bytes, {facts['bpp']:.4f} bpp, "
                f"latent MSE {facts['latent_mse']:.4f}",
                file=sys.stderr,
            )


def _facts(source: str, place: str, encoded: "Encoded") -> dict[str, Any]:
    """What --json prints; ``latent_mse`` is the mean squared error of the decoded latent, ``note`` null as a rule."""
    header = read_header(encoded.data, max_pixels=MAX_SIDE**2)
    return {
        "file": source,
        "output": place,
        "width": header.width,
        "height": header.height,
        "latent_space": header.space,
        "bytes": header.total_bytes,
        "bpp": header.bpp,
        "lambda": encoded.lmbda,
        "latent_mse": encoded.latent_mse,
        "note": encoded.note,
    }


class _View:
    """What a run shows of its progress: nothing, as it stands."""

    def start(self, source: str, stage: str) -> None:
        """An image is read, and its first stage begins: its latent is computed, or it is encoded at once."""

    def compile(self) -> None:
        """The loops of the training are compiled."""

    def move(self, sources: list[str], progress: "Progress") -> None:
        """A batch is trained."""

    def finish(self) -> None:
        """An image is done, or has failed."""


class _Bar(_View):
    """A bar on a terminal: images done, what is being done, estimates, time left."""

    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task, self._done, self._name = bar, task, 0, ""

    def start(self, source: str, stage: str) -> None:
        self._name = self._escape(source)
        self._bar.update(self._task, description=f"{self._name}  {stage}", estimate="")

    def compile(self) -> None:
        self._bar.update(self._task, description=f"{self._name}  compiling (once on this machine)", estimate="")

    def move(self, sources: list[str], progress: "Progress") -> None:
        self._name = self._escape(sources[0]) + (f" and {len(sources) - 1} more" if len(sources) > 1 else "")
        self._bar.update(
            self._task,
            description=f"{self._name}  {progress.stage}",
            completed=self._done + len(sources) * progress.iteration / progress.iterations,
            done=self._done,
            estimate=f"about {progress.bpp:.4f} bpp, latent MSE {progress.distortion:.4f}",
        )

    def finish(self) -> None:
        self._done += 1
        self._bar.update(self._task, completed=self._done, done=self._done)

    @staticmethod
    def _escape(source: str) -> str:
        from rich.markup import escape

        return escape(printable(source))


class _Timings(_View):
    """Another view, and a line about each batch when it is done: the seconds that each stage took."""

    def __init__(self, view: _View) -> None:
        self._view, self._seconds, self._stage, self._since = view, dict[str, float](), "", time.monotonic()

    def start(self, source: str, stage: str) -> None:
        self._enter(stage)
        self._view.start(source, stage)

    def compile(self) -> None:
        self._enter("compiling")
        self._view.compile()

    def move(self, sources: list[str], progress: "Progress") -> None:
        self._enter(progress.stage)
        self._view.move(sources, progress)

    def finish(self) -> None:
        self._enter("")
        if self._seconds and sys.stderr is not None:
            stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self._seconds.items())
            print(f"{NAME}: {stages}", file=sys.stderr)
        self._seconds.clear()
        self._view.finish()

    def _enter(self, stage: str) -> None:
        now = time.monotonic()
        if self._stage:
            self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage, now


@contextlib.contextmanager
def _live_view(images: int, show: bool, verbose: bool) -> Iterator[_View]:
    """A bar on standard error, if that is a terminal; with timings if they are wanted."""
    with _bar(images, show) as view:
        yield _Timings(view) if verbose else view


@contextlib.contextmanager
def _bar(images: int, show: bool) -> Iterator[_View]:
    if not (show and sys.stderr is not None and sys.stderr.isatty()):
        yield _View()
        return
    try:
        import rich.progress
        from rich.console import Console
    except ImportError:  # the bar alone needs rich
        yield _View()
        return
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.fields[done]} of {task.total}"),
        rich.progress.TextColumn("{task.fields[estimate]}"),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Bar(bar, bar.add_task("", total=images, estimate="", done=0))


def main() -> None:
    """Runs the command line, and ends the process with its exit code."""
    end_process(run_command(command, NAME))
