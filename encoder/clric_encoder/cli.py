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
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import click
from clric_decoder.bitstream import Metadata, read_header
from clric_decoder.errors import ClricError, one_line
from clric_decoder.files import STANDARD, check_output, read_input, write_output
from clric_decoder.terminal import (
    IMAGE_SUFFIXES,
    check_new,
    choose_outputs,
    list_inputs,
    print_error,
    printable,
    run_command,
    split_output,
)

from .compilation import on_compilation
from .instant import INSTANT
from .libraries import libraries
from .rate import Rate, choose_rate
from .stream import check_image, check_latent
from .training.presets import PRESETS
from .up_to_date import Records

if TYPE_CHECKING:
    import numpy as np

    from .encoding import Tuning
    from .stream import Encoded
    from .tiling import ImageEncoder
    from .training.loop import Progress

NAME = "clric-enc"

# No image file within the limit of pixels is longer: 4 channels of 16 bits, uncompressed.
INPUT_LIMIT = 8 << 28

# Parameters of the command that do not change what is in a stream; those of the rate are in `Rate`.
NO_SETTINGS = {
    "images", "output", "quality", "lmbda", "bpp", "size", "device", "force", "ray", "json", "quiet", "verbose",
}  # fmt: skip

# Latents that wait for others of their size to be trained with.
MAX_WAITING = 256


class _Bytes(click.ParamType):
    """A number of bytes: 5000, 8kB, 8KiB, 1.5MB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([kM])(i?))?B?", str(value), re.IGNORECASE)
        if not match:
            self.fail(
                f"{value!r} is not a size; examples: 5000, 8kB (8000 bytes), 8KiB (8192 bytes), 1.5MB", param, ctx
            )
        base = 1024 if match[3] else 1000
        number = float(match[1]) * base ** " km".index((match[2] or " ").lower())
        if not 1 <= number <= 10**9:
            self.fail(f"{value} is out of range; the limits are 1 byte and 1000MB", param, ctx)
        return round(number)


@click.command()
@click.argument("images", metavar="IN... [OUT]", nargs=-1, required=True)
@click.option("-o", "--output", metavar="OUT", help="Output stream, or folder for several images; - for stdout.")
@click.option(
    "--quality",
    type=click.FloatRange(0, 100),
    help="0 (smallest) to 100 (best): lambda is 0.5 * 10^((50 - quality) / 40).  [default: 75]",
)
@click.option("--lambda", "lmbda", type=float, help="Lagrangian weight of the rate: loss = latent MSE + lambda * bpp.")
@click.option("--bpp", type=float, help="Target rate in bits per pixel; files are at most 3 % smaller (instant: 15 %).")
@click.option(
    "--bytes", "size", type=_Bytes(), help="Target file size, such as 5000, 8kB or 8KiB; likewise at most 3 % smaller."
)
@click.option(
    "--vae", metavar="NAME", default="small", show_default=True, help="Autoencoder: a name or an encoder's file."
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
    " an .onnx file.",
)
@click.option(
    "--lpips", metavar="FILE", help="vgg16_lpips.npz, to train with LPIPS-VGG instead of clric's own features."
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
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
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
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
    try:
        rate = choose_rate(lmbda, quality, size, bpp)
    except ClricError as error:
        raise click.UsageError(str(error)) from None
    if preset == INSTANT and (tune not in ("auto", "none") or lpips is not None):
        raise click.UsageError("--tune and --lpips cannot be used with --preset instant, which trains nothing")
    if quiet and verbose:
        raise click.UsageError("--quiet and --verbose are mutually exclusive")
    if ray is not None:
        if output is None or output == STANDARD:
            raise click.UsageError("--ray needs a folder for the streams: -o DIR")
        if verbose:
            raise click.UsageError("--verbose cannot be used with --ray, whose manifest.jsonl has the times")
        if not re.fullmatch(r"local|auto|[^/]+:[0-9]+", ray):
            raise click.UsageError(f"--ray {ray}: an address is auto or host:port; write --ray alone after the images")
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
    images, output = split_output(images, output, (".clric",))
    to_folder = any(map(os.path.isdir, images))
    images = list_inputs(images, IMAGE_SUFFIXES)
    outputs = choose_outputs(images, output, ".clric", to_folder=to_folder, any_suffix=force)
    if json and STANDARD in outputs.places:
        raise click.UsageError("--json and the stream would both be written to standard output; name a file with -o")

    jobs = list(zip(images, outputs.places, strict=True))
    failures: list[tuple[str, str]] = []
    records = None
    if not outputs.named:
        settings = {key: value for key, value in click.get_current_context().params.items() if key not in NO_SETTINGS}
        records = Records(settings | asdict(rate), create=to_folder or len(images) > 1 or output is not None)
        if not force:
            jobs, failures, skipped = _to_do(jobs, records)
            if skipped and not quiet:
                print_error(NAME, f"skipped {skipped} up-to-date file{'s' * (skipped > 1)}; --force re-encodes")
    if jobs:
        from clric_decoder.image import take_over_pillow

        take_over_pillow()
    with _live_view(len(jobs), show=bool(jobs) and not quiet, verbose=verbose) as view:
        batches = _Batches(rate, vae, preset, tune, lpips, device, seed, models, strip, json, quiet, view)
        batches.failures, batches.records = failures, records
        try:
            for source, place in jobs:
                batches.add(source, place)
            batches.flush()
            code = 1 if batches.failures else 0
        except KeyboardInterrupt:
            code = 130
        except BrokenPipeError:  # nobody reads standard output any more, as after `| head`
            code = 1
    for source, message in batches.failures:
        print_error(NAME, message, source)
    return code


def _encode_with_ray(images: Sequence[str], output: str, **arguments: Any) -> int:
    try:
        with libraries():
            from .farm_command import encode_for_command
    except ClricError as error:
        print_error(NAME, str(error))
        return 1
    return encode_for_command(NAME, images, output, **arguments)


def _to_do(jobs: list[tuple[str, str]], records: Records) -> tuple[list[tuple[str, str]], list[tuple[str, str]], int]:
    """Of images and places of their streams: those to encode, images with an error, and how many are up to date."""
    to_do, failures, skipped = [], [], 0
    for source, place in jobs:
        state = records.state(source, place)
        if state == "up to date":
            skipped += 1
            continue
        try:
            if state == "unknown":
                check_new(place)
            to_do.append((source, place))
        except ClricError as error:
            failures.append((source, str(error)))
    return to_do, failures, skipped


@dataclass
class _Waiting:
    """An image whose latent waits for others of its size."""

    source: str
    place: str
    latent: "np.ndarray"
    pixels: "np.ndarray"
    metadata: Metadata


@dataclass
class _Batches:
    """Reads images, and encodes those of one latent size together.

    failures: images with what is wrong with them. records: what streams were made of, where that is kept.
    """

    rate: Rate
    vae: str
    preset: str
    tune: str
    lpips: str | None
    device: str
    seed: int
    models: str | None
    strip: bool
    json: bool
    quiet: bool
    view: "_View"
    failures: list[tuple[str, str]] = field(default_factory=list)
    records: Records | None = None
    _waiting: dict[tuple[int, ...], list[_Waiting]] = field(default_factory=dict)
    _encoder: "ImageEncoder | None" = None
    _tuning: "Tuning | None" = None
    _instant: "ImageEncoder | None" = None

    def add(self, source: str, place: str) -> None:
        """Reads an image and encodes it, as soon as there are enough of its size."""
        with self._failing(source):
            check_output(place)
            from clric_decoder.image import read_image

            file = io.BytesIO(read_input(STANDARD, INPUT_LIMIT)) if source == STANDARD else source
            image, notes, metadata = read_image(file, strip=self.strip)
            for note in notes if not self.quiet else ():
                print_error(NAME, note, source)
            if self.preset == INSTANT:
                self._encode_instantly(source, place, image, metadata)
                return
            with libraries():
                from . import encoding
                from .autoencoder import load_encoder
            self.view.start(source)
            with _torch(), libraries():
                height, width = check_image(image)
                device = encoding.find_device(self.device)
                if self._encoder is None:
                    self._encoder = load_encoder(self.vae, models=self.models, device=device)
                    self._tuning = encoding.load_tuning(
                        self.tune, self._encoder.space, self.preset, models=self.models, lpips=self.lpips, device=device
                    )
                latent = self._encoder.encode(image)
                check_latent(latent, width, height, self._encoder.space)
                limit = encoding.batch_size(latent.shape, PRESETS[self.preset], device)
            group = self._waiting.setdefault(latent.shape, [])
            group.append(_Waiting(source, place, latent, image, metadata))
            if len(group) >= limit:
                self._encode(self._waiting.pop(latent.shape))
            elif sum(map(len, self._waiting.values())) >= MAX_WAITING:
                self._encode(self._waiting.pop(max(self._waiting, key=lambda shape: len(self._waiting[shape]))))

    def flush(self) -> None:
        """Encodes what still waits."""
        while self._waiting:
            self._encode(self._waiting.pop(next(iter(self._waiting))))

    def _encode_instantly(self, source: str, place: str, image: "np.ndarray", metadata: Metadata) -> None:
        from . import instant

        if self._instant is None:
            self._instant = instant.load_encoder(self.vae)
        self._write(source, place, instant.encode_image(image, self._instant, self.rate, metadata))
        self.view.finish(1)

    def _encode(self, group: list[_Waiting]) -> None:
        import numpy as np

        from .encoding import encode_latents, find_device

        assert self._encoder is not None
        results: list[Encoded] = []
        try:
            with _torch(), on_compilation(self.view.compile):
                results = encode_latents(
                    np.stack([image.latent for image in group]),
                    [(image.pixels.shape[1], image.pixels.shape[0]) for image in group],
                    self._encoder.space,
                    self.rate,
                    preset=self.preset,
                    tuning=self._tuning,
                    images=[image.pixels for image in group],
                    metadata=[image.metadata for image in group],
                    device=find_device(self.device),
                    seed=self.seed,
                    warn=self._warn,
                    progress=lambda progress: self.view.move([image.source for image in group], progress),
                )
        except (ClricError, MemoryError) as error:
            if len(group) > 1:  # one of them may be to blame, or their number
                for image in group:
                    self._encode([image])
                return
            self._failed(group[0].source, error)
        for image, encoded in zip(group, results, strict=False):
            try:
                self._write(image.source, image.place, encoded)
            except ClricError as error:
                self._failed(image.source, error)
        self.view.finish(len(group))

    def _warn(self, message: str) -> None:
        if not self.quiet:
            print_error(NAME, message)

    def _write(self, source: str, place: str, encoded: "Encoded") -> None:
        write_output(place, encoded.data)
        if self.records is not None:
            self.records.add(place, encoded.data)
        facts = _facts(source, place, encoded)
        if encoded.note:
            print_error(NAME, encoded.note, source)
        if self.json:
            write_output(STANDARD, f"{json_format.dumps(facts)}\n".encode())
        elif not self.quiet and sys.stderr is not None:
            print(
                f"{printable(source)} -> {printable(place)}: {facts['bytes']:,} bytes, {facts['bpp']:.4f} bpp, "
                f"latent MSE {facts['latent_mse']:.4f}",
                file=sys.stderr,
            )

    @contextlib.contextmanager
    def _failing(self, source: str) -> Iterator[None]:
        """Around reading an image: what goes wrong is kept for the end, and the others go on."""
        try:
            yield
        except (ClricError, MemoryError) as error:
            self._failed(source, error)
            self.view.finish(1)

    def _failed(self, source: str, error: Exception) -> None:
        reason = "not enough memory" if isinstance(error, MemoryError) else str(error)
        self.failures.append((source, reason))


@contextlib.contextmanager
def _torch() -> Iterator[None]:
    """Around computation: ClricError for torch's errors, of a device or of memory, and for a full disk."""
    try:
        yield
    except RuntimeError as error:
        raise _torch_failed(error) from error
    except OSError as error:  # of numba, which keeps compiled loops
        reason = one_line(error)
        raise ClricError(
            f"the cache of compiled loops cannot be written ({reason}); free disk space, or set NUMBA_CACHE_DIR"
        ) from error


def _torch_failed(error: RuntimeError) -> ClricError:
    reason = one_line(error)
    # On the CPU only the text says it; on a GPU it is a torch.OutOfMemoryError, whose text says it too.
    if "out of memory" in reason or "can't allocate memory" in reason or "not enough memory" in reason:
        return ClricError("not enough memory; make the image smaller, or try another --device or --vae")
    return ClricError(f"torch failed ({reason[:300]})")


def _facts(source: str, place: str, encoded: "Encoded") -> dict[str, Any]:
    """What --json prints; ``latent_mse`` is the mean squared error of the decoded latent, ``note`` null as a rule."""
    header = read_header(encoded.data)
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

    def start(self, source: str) -> None:
        """An image's latent is computed."""

    def compile(self) -> None:
        """The loops of the training are compiled."""

    def move(self, sources: list[str], progress: "Progress") -> None:
        """A batch is trained."""

    def finish(self, count: int) -> None:
        """A batch of so many images is done, or has failed."""


class _Bar(_View):
    """A bar on a terminal: images done, what is being done, estimates, time left."""

    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task, self._done, self._name = bar, task, 0, ""

    def start(self, source: str) -> None:
        self._name = self._escape(source)
        self._bar.update(self._task, description=f"{self._name}  autoencoder", estimate="")

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

    def finish(self, count: int) -> None:
        self._done += count
        self._bar.update(self._task, completed=self._done, done=self._done)

    @staticmethod
    def _escape(source: str) -> str:
        from rich.markup import escape

        return escape(printable(source))


class _Timings(_View):
    """Another view, and a line about each batch when it is done: the seconds that each stage took."""

    def __init__(self, view: _View) -> None:
        self._view, self._seconds, self._stage, self._since = view, dict[str, float](), "", time.monotonic()

    def start(self, source: str) -> None:
        self._enter("autoencoder")
        self._view.start(source)

    def compile(self) -> None:
        self._enter("compiling")
        self._view.compile()

    def move(self, sources: list[str], progress: "Progress") -> None:
        self._enter(progress.stage)
        self._view.move(sources, progress)

    def finish(self, count: int) -> None:
        self._enter("")
        if self._seconds and sys.stderr is not None:
            stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self._seconds.items())
            print(f"{NAME}: {stages}", file=sys.stderr)
        self._seconds.clear()
        self._view.finish(count)

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
    """Entry point of clric-enc."""
    sys.exit(run_command(command, NAME))
