"""clric-export: makes the ONNX image decoder of a pretrained autoencoder, for clric-dec."""

from pathlib import Path

import click
from clric_decoder.errors import ClricError
from clric_decoder.models import AUTOENCODERS, cache_folder


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
def main(name: str, output: Path | None, models: Path | None, only_fp32: bool | None) -> None:
    """Export the image decoder NAME to ONNX: NAME.onnx (fp32) and NAME.fp16.onnx, with their manifests.

    Each is compared with torch, and the largest difference printed (the image's range is 0 to 1).
    """
    from .onnx import write_decoder  # torch takes seconds to import, --help should not
    from .sources import load_decoder

    folder = output or cache_folder()
    try:
        decoder = load_decoder(name, models)
        for precision in ("fp32", "fp16"):
            if only_fp32 is None or only_fp32 == (precision == "fp32"):
                manifest = write_decoder(decoder, folder, precision)
                path = folder / manifest["file"]
                megabytes = path.stat().st_size / 1e6
                click.echo(f"{path}  {megabytes:.1f} MB, differs from torch by at most {manifest['parity']:.2g}")
    except (ClricError, OSError) as error:
        raise click.ClickException(" ".join(str(error).split())) from error
