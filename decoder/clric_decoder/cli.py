"""The command clric-dec: streams -> images, latents, or what their headers say.

Imports are made where they are needed, so that ``--help`` and ``--info`` answer at once.
"""

import io
import json as json_format
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from . import numpy_start  # noqa: F401, before all that imports numpy
from .bitstream import MAX_PIXELS, MAX_SIDE
from .files import STANDARD, check_output, read_input, stream_limit, write_output
from .models import IMAGE_DECODERS, image_decoder_number
from .terminal import (
    IMAGE_SUFFIXES,
    Outputs,
    choose_outputs,
    end_process,
    for_each,
    list_inputs,
    print_error,
    print_existing,
    printable,
    run_command,
    split_output,
)

if TYPE_CHECKING:
    from .bitstream import Header

NAME = "clric-dec"


@click.command()
@click.argument("inputs", metavar="IN... [OUT]", nargs=-1, required=True)
@click.option(
    "-o", "--output", metavar="OUT", help="Output image, or folder for several inputs; - for standard output."
)
@click.option(
    "--vae", metavar="NAME", help="Image decoder: a name, or the path of an .onnx file.  [default: by latent space]"
)
@click.option("--models", metavar="DIR", help="Folder to search for image decoders first.")
@click.option("--provider", default="auto", show_default=True, help="onnxruntime provider: auto, cpu, cuda, ...")
@click.option(
    "--latent",
    metavar="OUT.npy",
    help="Write the latent, float32 (C, h, w); no image unless -o is given. --force accepts any suffix.",
)
@click.option("--info", is_flag=True, help="Print the header and exit.")
@click.option("--json", is_flag=True, help="Print the header as JSON, one line per input, and exit.")
@click.option("--probe", is_flag=True, help="Decode to the latent, and print the hash of every stage as JSON.")
@click.option("-f", "--force", is_flag=True, help="Overwrite existing outputs.")
@click.option(
    "--max-pixels",
    type=click.IntRange(1, MAX_SIDE**2),
    default=MAX_PIXELS,
    show_default=True,
    help="Reject larger images, before memory is allocated.",
)
@click.version_option(package_name="clric", prog_name=NAME, message="%(prog)s %(version)s")
def command(
    inputs: Sequence[str],
    output: str | None,
    vae: str | None,
    models: str | None,
    provider: str,
    latent: str | None,
    info: bool,
    json: bool,
    probe: bool,
    force: bool,
    max_pixels: int,
) -> int:
    """Decode .clric streams to images: IN OUT, or several inputs with -o FOLDER. The default output is IN.png.

    IN may be a folder (all .clric files in it) or - for standard input. The suffix of OUT selects the image format. An
    existing file is overwritten if you named it, or with --force.
    """
    names: Sequence[str] = inputs
    if not (info or json or probe):
        names, output = split_output(names, output, (".clric",), IMAGE_SUFFIXES)
    to_folder = any(map(os.path.isdir, names))
    inputs = list_inputs(names, (".clric",))

    def read(source: str) -> bytes:
        return read_input(source, stream_limit(max_pixels))

    if info or json or probe:
        if output is not None or latent is not None:
            raise click.UsageError("--info, --json and --probe write no file; remove -o and --latent")

        def show(source: str) -> None:
            if probe:
                from .probe import decode_stages

                text = json_format.dumps({"file": source, **decode_stages(read(source), max_pixels)}, indent=1)
            else:
                from .bitstream import read_header

                facts = describe(read_header(read(source), max_pixels=max_pixels))
                text = json_format.dumps({"file": source, **facts}) if json else _as_text(printable(source), facts)
            write_output(STANDARD, f"{text}\n".encode(errors="surrogateescape"))

        return for_each(NAME, ((source,) for source in inputs), show)

    inputs = list(dict.fromkeys(inputs))  # one that was named twice is decoded once
    nothing = Outputs([""] * len(inputs), named=True, clashes={})
    latents = images = nothing
    if latent is not None:
        latents = choose_outputs(inputs, latent, ".npy", to_folder=to_folder, any_suffix=force)
    if latent is None or output is not None:
        images = choose_outputs(inputs, output, ".png", to_folder=to_folder, any_suffix=True)
    for image_place, latent_place in zip(images.places, latents.places, strict=True):
        if image_place and latent_place and os.path.realpath(image_place) == os.path.realpath(latent_place):
            raise click.UsageError(
                f"the image and the latent would both be written to {image_place}; choose another name"
            )

    def convert(source: str, image_place: str, latent_place: str) -> None:
        import numpy as np

        from .bitstream import read_header
        from .latent import decode_latent

        if image_place:
            from .image import check_image_output

            check_image_output(image_place)
        if latent_place:
            check_output(latent_place)
        data = read(source)
        header = read_header(data, max_pixels=max_pixels)
        decoder = None
        if image_place:
            from .autoencoder import default_decoder, open_decoder

            name = vae or default_decoder(header, models)
            decoder = open_decoder(name, header.space, provider=provider, models=models)
            trained_for = IMAGE_DECODERS.get(header.space, {}).get(header.image_decoder)
            if trained_for and image_decoder_number(decoder.manifest) != header.image_decoder:
                name, digest = decoder.manifest["name"], decoder.manifest["sha256"]
                shown = f"other weights of it (SHA-256 {digest[:16]})" if name == trained_for[0] else name
                tuned = f"the stream was tuned for image decoder {trained_for[0]}"
                print_error(NAME, f"note: {tuned}, decoding with {shown}", source)
        latent_values = decode_latent(data, max_pixels=max_pixels)
        if latent_place:
            encoded = io.BytesIO()
            np.save(encoded, latent_values)
            write_output(latent_place, encoded.getvalue())
        if decoder is not None:
            from .autoencoder import decode_image
            from .image import write_image

            pixels = decode_image(decoder, latent_values, header.width, header.height)
            for note in write_image(image_place, pixels, header.metadata):
                print_error(NAME, f"note: {note}", source)

    jobs, existing = [], []
    clashes = images.clashes | latents.clashes
    for source, image_place, latent_place in zip(inputs, images.places, latents.places, strict=True):
        unnamed = [place for place, named in ((image_place, images.named), (latent_place, latents.named)) if not named]
        taken = [place for place in unnamed if place != STANDARD and os.path.exists(place)]
        if source in clashes:
            print_error(NAME, clashes[source], source)
        elif taken and not force:
            existing.append((source, taken[0]))
        else:
            jobs.append((source, image_place, latent_place))
    print_existing(NAME, existing)
    return max(for_each(NAME, jobs, convert), 1 if existing or clashes else 0)


def describe(header: "Header") -> dict[str, Any]:
    """What a header says and what follows from it, as JSON knows it.

    Shapes are [channels, height, width]; levels go from finest to coarsest; ``mac_per_pixel`` counts the
    multiply-accumulates of the function, not of the image decoder, per image pixel.
    """
    from .networks import count_parameters, mac_per_pixel

    complexity = mac_per_pixel(header)
    return {
        "version": header.version,
        "width": header.width,
        "height": header.height,
        "latent_space": header.space,
        "image_decoder": IMAGE_DECODERS.get(header.space, {}).get(header.image_decoder, (None,))[0],
        "image_decoder_number": header.image_decoder,
        "latent": [header.channels, header.latent_height, header.latent_width],
        "grids": [list(shape) for shape in header.grid_shapes],
        "function": header.function,
        "architecture": header.architecture.describe(),
        "parameters": count_parameters(header),
        "bytes": {
            "header": header.header_bytes,
            "networks": header.network_bytes,
            "levels": list(header.level_bytes),
            "metadata": header.metadata_bytes,
            "total": header.total_bytes,
        },
        "metadata": list(header.metadata),
        "bpp": header.bpp,
        "mac_per_pixel": {**complexity, "total": sum(complexity.values())},
    }


def _as_text(source: str, facts: dict[str, Any]) -> str:
    """`describe` for people."""
    parts, complexity = facts["bytes"], facts["mac_per_pixel"]
    channels, *size = facts["latent"]
    trained_for, number = facts["image_decoder"] or "unknown", facts["image_decoder_number"]
    levels = [
        (f"level {level}", f"{size:,} bytes, {shape[0]} x {shape[1]} x {shape[2]}")
        for level, (shape, size) in enumerate(zip(facts["grids"], parts["levels"], strict=True))
    ]
    rows = [
        ("image", f"{facts['width']} x {facts['height']}"),
        ("rate", f"{facts['bpp']:.4f} bpp, {parts['total']:,} bytes"),
        ("format", f"version {facts['version']}"),
        ("latent", f"{facts['latent_space']}, {channels} x {size[0]} x {size[1]}"),
        ("trained for", f"{trained_for} (number {number})" if number else "none"),
        ("function", f"{facts['function'] or 'of its own'}: {facts['architecture']}"),
        ("parameters", f"{facts['parameters']:,}"),
        ("header", f"{parts['header']:,} bytes"),
        ("networks", f"{parts['networks']:,} bytes"),
        *levels,
        ("metadata", ", ".join([f"{parts['metadata']:,} bytes", *facts["metadata"]])),
        ("MAC/pixel", ", ".join(f"{part} {value:.2f}" for part, value in complexity.items())),
    ]
    return "\n".join([source, *(f"  {label:<12}{value}" for label, value in rows)])


def main() -> None:
    """Runs the command line, and ends the process with its exit code."""
    end_process(run_command(command, NAME))
