"""Network sets: networks that streams name instead of holding them (bitstream_spec.md, section 6.3).

They were trained on many images, for preset `instant`, which encodes without training. The table is the file
network_sets.json: for each architecture, by its description, the networks segments of sets 1, 2, ...
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING

from .errors import StreamError
from .models import WEIGHTS

if TYPE_CHECKING:
    from .bitstream import Architecture

FILE = WEIGHTS / "network_sets.json"
MAX_SETS = 7  # three bits of the header name them; 0 stands for networks of the stream's own


@lru_cache(maxsize=1)
def _table() -> dict[str, list[str]]:
    table: dict[str, list[str]] = json.loads(FILE.read_text(encoding="ascii"))
    return table


def network_sets(architecture: Architecture) -> list[bytes]:
    """The networks segments of the registered sets of an architecture, set 1 first."""
    return [bytes.fromhex(segment) for segment in _table().get(architecture.to_bytes().hex(), [])]


def network_set(architecture: Architecture, number: int) -> bytes:
    """The networks segment of one set. Raises StreamError for a number that is not registered."""
    segments = network_sets(architecture)
    if not 1 <= number <= len(segments):
        raise StreamError("unsupported", f"network set {number} is not known; a newer decoder may know it")
    return segments[number - 1]
