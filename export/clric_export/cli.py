"""clric-export: makes the ONNX image decoder of a pretrained autoencoder, for clric-dec."""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from clric_decoder.errors import ClricError, one_line
from clric_decoder.models import AUTOENCODERS, cache_folder
from clric_decoder.terminal import for_each, run_command

if TYPE_CHECKING:
    from .onnx import Precision

NAME = "clric-export"


@click.command(epilog=f"NAME is one of {', '.join(AUTOENCODERS)}.")
@click.argument("name")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write to.  [default: the user's cache, where clric-dec looks]",
)
@click.option(
    "--models",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of weights, searched before $CLRIC_MODELS, the user's cache and the Hugging Face hub.",
)
@click.option("--fp32/--fp16", "only_fp32", default=None, help="Write only this precision.  [default: both]")
def command(name: str, output: Path | None, models: Path | None, only_fp32: bool | None) -> int:
    """Export the image decoder NAME to ONNX: NAME.onnx (fp32) and NAME.fp16.onnx, with their manifests.

    Each is compared with torch, and the largest difference printed (the image's range is 0 to 1).
    """
    both: tuple[Precision, Precision] = ("fp32", "fp16")
    precisions = both if only_fp32 is None else both[:1] if only_fp32 else both[1:]

    def export(name: str) -> None:
        for line in _export(name, output or cache_folder(), models, precisions):
            click.echo(line)

    return for_each(NAME, [(name,)], export)


def _export(name: str, folder: Path, models: Path | None, precisions: "Sequence[Precision]") -> Iterator[str]:
    """Writes the files, and gives a line about each. Raises ClricError, whatever goes wrong."""
    # Both are read on import; for the first see clric_decoder/autoencoder.py. diffusers warns of harmless fields.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    try:
        from .onnx import write_decoder  # torch takes seconds to import, --help should not
        from .sources import load_decoder
    except ModuleNotFoundError as error:
        raise ClricError(f"{error.name} is not installed; run: pip install 'clric[export]'") from error
    except (ImportError, OSError) as error:
        raise ClricError(f"the libraries cannot be loaded ({one_line(error)}); install them again") from error
    decoder = load_decoder(name, models)
    for precision in precisions:
        try:
            manifest = write_decoder(decoder, folder, precision)
            megabytes = (folder / manifest["file"]).stat().st_size / 1e6
        except (ClricError, MemoryError):
            raise
        except OSError as error:
            raise ClricError(f"{folder}: cannot be written ({error.strerror or one_line(error)})") from error
        except Exception as error:  # torch, onnx and onnxruntime share no base class
            raise ClricError(f"the export to ONNX failed ({one_line(error)[:300]})") from error
        yield f"{folder / manifest['file']}  {megabytes:.1f} MB, differs from torch by at most {manifest['parity']:.2g}"


def main() -> None:
    """Entry point of clric-export."""
    sys.exit(run_command(command, NAME))
