"""The command clric-enc: images -> streams, with a live view of the training on a terminal.

torch is imported with the first image, so that ``--help`` and mistakes on the command line answer at once.
"""

import contextlib
import io
import json as json_format
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click
from clric_decoder.bitstream import MAX_PIXELS, read_header
from clric_decoder.errors import ClricError, one_line
from clric_decoder.files import STANDARD, check_output, read_input, write_output
from clric_decoder.terminal import choose_outputs, for_each, print_error, run_command

from .presets import MAX_LAMBDA, MIN_LAMBDA, PRESETS

if TYPE_CHECKING:
    from .overfit import Progress

NAME = "clric-enc"

# No image file within the limit of pixels is longer: 4 channels of 16 bits, uncompressed.
INPUT_LIMIT = 8 * MAX_PIXELS


@click.command()
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.option("-o", "--output", metavar="OUT", help="Stream, or folder for several; - is standard output.")
@click.option("--lambda", "lmbda", type=float, help="Weight of the rate: loss = latent MSE + lambda * bpp.")
@click.option("--quality", type=click.FloatRange(0, 100), help="The same from 0 to 100.  [default: 50]")
@click.option("--vae", metavar="NAME", default="lite", show_default=True, help="Autoencoder, or a distilled encoder.")
@click.option("--preset", type=click.Choice(list(PRESETS)), default="default", show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Of all that is random in the training.",
)
@click.option("--models", metavar="DIR", help="Folder in which to look for weights first.")
@click.option("--json", is_flag=True, help="Print one line of JSON for each image to standard output.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def command(
    images: tuple[str, ...],
    output: str | None,
    lmbda: float | None,
    quality: float | None,
    vae: str,
    preset: str,
    device: str,
    seed: int,
    models: str | None,
    json: bool,
    quiet: bool,
) -> int:
    """Encode images to .clric streams (IMAGE with the suffix .clric where no -o is given).

    IMAGE may be - for standard input.
    """
    if lmbda is not None and quality is not None:
        raise click.UsageError("--lambda and --quality are two names for one thing: give one of them")
    if lmbda is not None and not MIN_LAMBDA <= lmbda <= MAX_LAMBDA:  # not click.FloatRange, which takes nan
        raise click.UsageError(f"--lambda is {lmbda:g}; it must be within {MIN_LAMBDA:g} to {MAX_LAMBDA:g}")
    places = choose_outputs(images, output, ".clric")
    if json and STANDARD in places:
        raise click.UsageError("--json and the stream would both go to standard output: name a file with -o")

    def encode_one(source: str, place: str) -> None:
        check_output(place)
        from clric_decoder.image import read_image

        image, notes = read_image(io.BytesIO(read_input(STANDARD, INPUT_LIMIT)) if source == STANDARD else source)
        for note in notes if not quiet else ():
            print_error(NAME, note, source)
        last: list[Progress] = []
        with _live_view(source, show=not quiet) as view:

            def report(progress: "Progress") -> None:
                last[:] = [progress]
                view(progress)

            encode = _encode()
            try:
                data = encode(
                    image,
                    vae=vae,
                    lmbda=lmbda,
                    quality=quality,
                    preset=preset,
                    device=device,
                    seed=seed,
                    models=models,
                    progress=report,
                )
            except RuntimeError as error:  # torch's, of a device or of memory
                raise _torch_failed(error) from error
        write_output(place, data)
        facts = _facts(source, place, data, last[-1])
        if json:
            write_output(STANDARD, f"{json_format.dumps(facts)}\n".encode())
        elif not quiet and sys.stderr is not None:
            print(
                f"{source} -> {place}: {facts['bytes']:,} bytes, {facts['bpp']:.4f} bpp, "
                f"latent MSE in training {facts['training_distortion']:.4f}",
                file=sys.stderr,
            )

    return for_each(NAME, zip(images, places, strict=True), encode_one)


def _encode() -> Callable[..., bytes]:
    """`encode`, imported now; raises ClricError where what the encoder depends on is missing or broken."""
    # diffusers warns of harmless fields in its own models' configuration; it reads this when it is imported.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    try:
        from .encoding import encode
    except ModuleNotFoundError as error:
        raise _not_installed(error) from error
    except (ImportError, OSError) as error:  # a library of torch's that is missing, or of another machine
        raise ClricError(f"the encoder's libraries cannot be loaded ({one_line(error)}); install them again") from error
    return encode


def _torch_failed(error: RuntimeError) -> ClricError:
    reason = one_line(error)
    # On the CPU only the text says it; on a GPU it is a torch.OutOfMemoryError, whose text says it too.
    if "out of memory" in reason or "can't allocate memory" in reason or "not enough memory" in reason:
        return ClricError("not enough memory; make the image smaller, or try another --device or --vae")
    return ClricError(f"torch failed ({reason[:300]})")


def _not_installed(error: ModuleNotFoundError) -> ClricError:
    return ClricError(f"{error.name} is not installed; run: pip install 'clric[encoder]'")


def _facts(source: str, place: str, data: bytes, last: "Progress") -> dict[str, Any]:
    """What --json prints; ``training_distortion`` is the latent's mean squared error as training ended."""
    header = read_header(data)
    return {
        "file": source,
        "output": place,
        "width": header.width,
        "height": header.height,
        "latent_space": header.space,
        "bytes": header.total_bytes,
        "bpp": header.bpp,
        "training_distortion": last.distortion,
    }


@contextlib.contextmanager
def _live_view(source: str, show: bool) -> "Iterator[Callable[[Progress], None]]":
    """A bar on standard error, if that is a terminal: stage, iterations, estimates, time left.

    Gives the function that moves it.
    """
    if not (show and sys.stderr is not None and sys.stderr.isatty()):
        yield lambda progress: None
        return
    try:
        import rich.progress
        from rich.console import Console
        from rich.markup import escape
    except ModuleNotFoundError as error:
        raise _not_installed(error) from error
    columns = (
        rich.progress.TextColumn(f"{escape(source)}  {{task.description}}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[estimate]}"),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("autoencoder", total=None, estimate="")

        def move(progress: "Progress") -> None:
            bar.update(
                task,
                description=progress.stage,
                completed=progress.iteration,
                total=progress.iterations,
                estimate=f"about {progress.bpp:.4f} bpp, latent MSE {progress.distortion:.4f}",
            )

        yield move


def main() -> None:
    """Entry point of clric-enc."""
    sys.exit(run_command(command, NAME))
