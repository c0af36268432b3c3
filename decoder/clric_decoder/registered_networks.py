"""Networks that streams name instead of holding them (specification, "Registered functions").

They were trained on many images, for preset `instant`, which encodes without training. The table is the file
registered_networks.json: the networks segments, in hexadecimal digits, by the function's number.
"""

from __future__ import annotations

import json
from functools import lru_cache

from .models import WEIGHTS

FILE = WEIGHTS / "registered_networks.json"


@lru_cache(maxsize=1)
def registered_networks() -> dict[int, bytes]:
    """The networks segments by the numbers of their functions."""
    return {int(number): bytes.fromhex(segment) for number, segment in json.loads(FILE.read_text("ascii")).items()}
