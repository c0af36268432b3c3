"""clric-export: makes ONNX image decoders for clric-dec, of pretrained autoencoders, and trains small autoencoders."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from clric_decoder.errors import ClricError, one_line
from clric_decoder.models import AUTOENCODERS, LATENT_SPACES, cache_folder, find_autoencoder
from clric_decoder.terminal import for_each, printable, run_command

if TYPE_CHECKING:
    from .onnx import Precision

NAME = "clric-export"

Report = Callable[[str], None]

EXPORTABLE = [name for name, autoencoder in AUTOENCODERS.items() if autoencoder.kind not in ("lite", "small")]

_photos = click.option(
    "--photos", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True, help="Folder of photos."
)


class _Group(click.Group):
    """`clric-export NAME` is short for `clric-export onnx NAME`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        is_short = bool(args) and args[0] not in {*self.commands, *ctx.help_option_names, "--version"}
        return super().parse_args(ctx, ["onnx", *args] if is_short else args)


@click.group(cls=_Group)
@click.version_option(package_name="clric", prog_name=NAME, message="%(prog)s %(version)s")
def command() -> None:
    """Export and train image decoders for clric-dec. `clric-export NAME` is short for `clric-export onnx NAME`."""


@command.command(epilog=f"NAME is one of {', '.join(EXPORTABLE)}.")
@click.argument("name")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Output folder.  [default: the user's cache, where clric-dec looks]",
)
@click.option(
    "--models",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to search for weights first, before $CLRIC_MODELS, the user's cache and the Hugging Face hub.",
)
@click.option("--fp32/--fp16", "only_fp32", default=None, help="Write only this precision.  [default: both]")
def onnx(name: str, output: Path | None, models: Path | None, only_fp32: bool | None) -> int:
    """Export the image decoder NAME to ONNX: NAME.onnx (fp32) and NAME.fp16.onnx, with their manifests.

    Each is compared with torch, and the maximum difference printed (images are in [0, 1]).
    """
    both: tuple[Precision, Precision] = ("fp32", "fp16")
    precisions = both if only_fp32 is None else both[:1] if only_fp32 else both[1:]

    def export(name: str) -> None:
        for line in _export(name, output or cache_folder(), models, precisions):
            click.echo(printable(line))

    return for_each(NAME, [(name,)], export)


@command.command()
@click.argument("teacher")
@_photos
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Output folder; resumes a run that was stopped.",
)
@click.option(
    "--streams",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the photos' streams by clric-enc, to train the decoder on coded latents too.",
)
@click.option(
    "--lpips",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of LPIPS weights. Without it, the decoder is trained on pixels and structure only.",
)
@click.option(
    "--start",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of an earlier run whose weights to start from, instead of random ones. Checkpoints in the output"
    " folder take precedence; give it again to resume a run.",
)
@click.option(
    "--iterations",
    type=click.IntRange(100),
    default=10500,
    show_default=True,
    help="Training iterations of the decoder.",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Random seed.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Device to train on."
)
@click.option("--models", type=click.Path(file_okay=False, path_type=Path), help="Folder to search for weights first.")
def distill(
    teacher: str,
    photos: Path,
    output: Path,
    streams: Path | None,
    lpips: Path | None,
    start: Path | None,
    iterations: int,
    seed: int,
    device: str,
    models: Path | None,
) -> int:
    """Train a small autoencoder for the latent space of TEACHER: a decoder as ONNX, an encoder as safetensors.

    It is trained on a folder of photos and TEACHER's reconstructions of them, from random weights or those of --start.
    Takes hours on a CPU.
    """

    def run(report: Report) -> list[Path]:
        with _libraries():
            from .distill import distill  # torch takes seconds to import, --help should not
        return distill(
            teacher,
            photos,
            output,
            streams=streams,
            lpips=lpips,
            start=start,
            iterations=iterations,
            seed=seed,
            device=device,
            models=models,
            report=report,
        )

    return _train(output, run)


@command.command()
@_photos
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Output folder; resumes a run that was stopped.",
)
@click.option("--name", default="custom", show_default=True, help="Name of the files.")
@click.option("--space", type=click.Choice(list(LATENT_SPACES)), help="Latent space.  [default: a new one]")
@click.option("--channels", type=click.IntRange(4, 64), default=8, show_default=True, help="Latent channels.")
@click.option(
    "--iterations",
    type=click.IntRange(0),
    default=50_000,
    show_default=True,
    help="Training iterations in total, at constant learning rate; 0 exports the last checkpoint.",
)
@click.option(
    "--decay",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Further iterations in which the learning rate decays to zero.",
)
@click.option(
    "--crop", type=click.Choice(["192", "256"]), default="192", show_default=True, help="Crop size in pixels."
)
@click.option("--crops", type=click.IntRange(1), default=4, show_default=True, help="Batch size in crops.")
@click.option("--learning-rate", type=click.FloatRange(0, 0.1), default=7e-4, show_default=True, help="Learning rate.")
@click.option(
    "--lpips",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="vgg16_lpips.npz. Without it, only clric's own feature network is used.",
)
@click.option(
    "--squeezenet",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with SqueezeNet's LPIPS weights, to train on too.",
)
@click.option(
    "--streams",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the photos' streams, made with the autoencoder so far, to train its decoder on coded latents.",
)
@click.option(
    "--start",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Checkpoint of another run whose weights to start from, instead of those of lite 1.0.",
)
@click.option(
    "--decoder",
    type=click.Choice(["small", "large"]),
    default="small",
    show_default=True,
    help='Size of the decoder; "large" trains only a decoder and requires --start.',
)
@click.option(
    "--latents",
    multiple=True,
    metavar="NAME",
    help="Train only a decoder, for latents of this autoencoder; several of one latent space may be named.",
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Device to train on."
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Random seed.")
def train(
    photos: Path,
    output: Path,
    name: str,
    space: str | None,
    channels: int,
    iterations: int,
    decay: int,
    crop: str,
    crops: int,
    learning_rate: float,
    lpips: Path | None,
    squeezenet: Path | None,
    streams: Path | None,
    start: Path | None,
    decoder: str,
    latents: tuple[str, ...],
    device: str,
    seed: int,
) -> int:
    """Train an autoencoder with the rate in the loss: a decoder NAME.onnx and an encoder NAME_encoder.onnx.

    It is trained on a folder of photos, starting from the weights of lite or --start. Takes hours on a CPU; it can be
    stopped at any time, and the same command resumes from the last checkpoint.
    """

    def run(report: Report) -> list[Path]:
        with _libraries():
            from .train import train
        return train(
            photos,
            output,
            name=name,
            space=space,
            channels=channels,
            iterations=iterations,
            decay=decay,
            seed=seed,
            crop=int(crop),
            crops=crops,
            learning_rate=learning_rate,
            lpips=lpips,
            squeezenet=squeezenet,
            streams=streams,
            start=start,
            decoder=decoder,
            latents=latents,
            device=device,
            report=report,
        )

    return _train(output, run)


@command.command()
@_photos
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Output file.")
@click.option("--vae", default="small", show_default=True, help="Autoencoder.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Random seed.")
def networks(photos: Path, output: Path, vae: str, seed: int) -> int:
    """Train the networks that streams of preset instant name: registered_networks.json.

    Takes some minutes on a CPU.
    """

    def run(report: Report) -> list[Path]:
        with _libraries():
            from .network_sets import train_network_sets
        return [train_network_sets(photos, output, vae=vae, seed=seed, report=report)]

    return _train(output, run)


@command.command()
@_photos
@click.option(
    "--lpips",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="vgg16_lpips.npz, LPIPS-VGG's weights.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Output folder; resumes a run that was stopped, from the start of its round.",
)
@click.option(
    "--streams",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the photos' streams by clric-enc --tune none, to learn the distortions of coded latents.",
)
@click.option("--vae", default="small", show_default=True, help="Autoencoder whose distortions to learn.")
@click.option("--rounds", type=click.IntRange(1), default=4, show_default=True, help="Rounds of training.")
@click.option(
    "--pool", type=click.IntRange(8), default=3000, show_default=True, help="Training examples added per round."
)
@click.option(
    "--iterations", type=click.IntRange(1), default=1300, show_default=True, help="Training iterations per round."
)
@click.option("--crops", type=click.IntRange(1), default=8, show_default=True, help="Crops per iteration.")
@click.option(
    "--start", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Features to start from, a file."
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Device to train on."
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Random seed.")
@click.option("--models", type=click.Path(file_okay=False, path_type=Path), help="Folder to search for weights first.")
def features(
    photos: Path,
    lpips: Path,
    output: Path,
    streams: Path | None,
    vae: str,
    rounds: int,
    pool: int,
    iterations: int,
    crops: int,
    start: Path | None,
    device: str,
    seed: int,
    models: Path | None,
) -> int:
    """Distil LPIPS-VGG into the small feature network that clric-enc trains with.

    Takes an hour on two cores.
    """

    def run(report: Report) -> list[Path]:
        with _libraries():
            from clric_encoder.networks import load_decoder_network, load_encoder_network

            from .feature_distillation import distill_features
        file = distill_features(
            photos,
            lpips,
            output,
            streams=streams,
            encoder=load_encoder_network(vae, models).module,
            decoder=load_decoder_network(vae, models).module.train(),
            rounds=rounds,
            pool_size=pool,
            iterations=iterations,
            crops=crops,
            start=start,
            device=device,
            seed=seed,
            report=report,
        )
        return [file]

    return _train(output, run)


def _train(output: Path, run: Callable[[Report], list[Path]]) -> int:
    """A training: its reports go to standard error, the sizes of the files that it gives to standard output."""

    def work(_: str) -> None:
        from clric_decoder.image import take_over_pillow

        take_over_pillow()
        try:
            files = run(lambda line: click.echo(printable(line), err=True))
        except OSError as error:
            raise ClricError(f"{error.filename or output}: {error.strerror or one_line(error)}") from error
        for file in files:
            click.echo(f"{printable(str(file))}  {file.stat().st_size / 1e6:.2f} MB")

    return for_each(NAME, [("",)], work)


def _export(name: str, folder: Path, models: Path | None, precisions: "Sequence[Precision]") -> Iterator[str]:
    """Writes the files, and gives a line about each. Raises ClricError, whatever goes wrong."""
    if find_autoencoder(name.partition("@")[0]).kind in ("lite", "small"):
        raise ClricError(f"the decoder of {name} comes with clric as ONNX; there is nothing to export")
    with _libraries():
        from .onnx import write_network  # torch takes seconds to import, --help should not
    from clric_encoder.networks import load_decoder_network

    decoder = load_decoder_network(name, models)
    for precision in precisions:
        try:
            manifest = write_network(decoder, folder, precision)
            megabytes = (folder / manifest["file"]).stat().st_size / 1e6
        except (ClricError, MemoryError):
            raise
        except OSError as error:
            raise ClricError(f"{folder}: cannot be written ({error.strerror or one_line(error)})") from error
        except Exception as error:  # torch, onnx and onnxruntime share no base class
            raise ClricError(f"the export to ONNX failed ({one_line(error)[:300]})") from error
        yield f"{folder / manifest['file']}  {megabytes:.1f} MB, differs from torch by at most {manifest['parity']:.2g}"


@contextlib.contextmanager
def _libraries() -> Iterator[None]:
    """Around what imports torch and its like: ClricError where they are missing or broken."""
    # Both are read on import; for the first see clric_decoder/autoencoder.py. diffusers warns of harmless fields.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    try:
        yield
    except ModuleNotFoundError as error:
        raise ClricError(f"{error.name} is not installed; run: pip install 'clric[export]'") from error
    except (ImportError, OSError) as error:
        raise ClricError(f"the libraries cannot be loaded ({one_line(error)}); install them again") from error


def main() -> None:
    """Runs the command line, and ends the process with its exit code."""
    sys.exit(run_command(command, NAME))
