"""What a stream decodes to, stage by stage, as hashes: by them an implementer sees where his decoder departs.

The names and hashes are those of the conformance suite's manifest (tests/conformance/README.md, "Stage by stage").
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from .bitstream import MAX_PIXELS
from .latent import decode_grids
from .synthesis import synthesize


def decode_stages(data: bytes, max_pixels: int = MAX_PIXELS) -> dict[str, Any]:
    """The header's fields and the hash of every stage of a stream, as JSON knows them. Raises StreamError."""
    header, networks, grids = decode_grids(data, max_pixels)
    latent = synthesize(grids, networks, header.architecture).astype("<f4")
    coded = [np.append(parameters.exponent, parameters.integers) for parameters in networks]
    return {
        "header": {
            "version": header.version,
            "width": header.width,
            "height": header.height,
            "latent_space": header.space,
            "channels": header.channels,
            "function": header.function,
            "architecture": header.architecture.to_bytes().hex(),
            "image_decoder": header.image_decoder,
            "metadata_sha256": {name: hashlib.sha256(content).hexdigest() for name, content in header.metadata.items()},
            "bytes": {
                "header": header.header_bytes,
                "metadata": header.metadata_bytes,
                "networks": header.network_bytes,
                "levels": list(header.level_bytes),
            },
        },
        "networks_sha256": _sha256_of_integers(coded),
        "levels": [{"shape": list(grid.shape), "sha256": _sha256_of_integers([grid])} for grid in grids],
        "grids_sha256": _sha256_of_integers(grids),
        "latent_shape": list(latent.shape),
        "latent_sha256": hashlib.sha256(latent.tobytes()).hexdigest(),
    }


def _sha256_of_integers(arrays: list[np.ndarray]) -> str:
    """Of arrays one after another, each in row-major order, each integer as four bytes, big-endian."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.astype(">i4").tobytes())
    return digest.hexdigest()
