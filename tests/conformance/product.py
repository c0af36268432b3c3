"""The product as a command for run.py: STREAM [--grids OUT] [--latent OUT], in the suite's file formats."""

import argparse
import sys
from pathlib import Path

import numpy as np
from clric_decoder import StreamError
from clric_decoder.latent import decode_grids
from clric_decoder.synthesis import synthesize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stream", type=Path)
    parser.add_argument("--grids", type=Path)
    parser.add_argument("--latent", type=Path)
    arguments = parser.parse_args()
    try:
        header, networks, grids = decode_grids(arguments.stream.read_bytes())
        latent = synthesize(grids, networks, header.architecture)
    except StreamError as error:
        sys.exit(f"error: {error.kind}: {error}")
    if arguments.grids:
        arguments.grids.write_bytes(b"".join(grid.astype(">i4").tobytes() for grid in grids))
    if arguments.latent:
        arguments.latent.write_bytes(np.ascontiguousarray(latent, "<f4").tobytes())


if __name__ == "__main__":
    main()
