"""Libraries that the encoder needs beyond the base distribution: one clear error where they are missing or broken."""

import contextlib
import os
from collections.abc import Iterator

from clric_decoder.errors import ClricError, one_line


@contextlib.contextmanager
def libraries() -> Iterator[None]:
    """Around imports: ClricError where what the encoder depends on is missing or broken."""
    # diffusers warns of harmless fields in its own models' configuration; it reads this when it is imported.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it tells of every try to reach the hub
    try:
        yield
    except ModuleNotFoundError as error:
        raise not_installed(error) from error
    except (ImportError, OSError) as error:  # a library of torch's that is missing, or of another machine
        raise ClricError(f"the encoder's libraries cannot be loaded ({one_line(error)}); install them again") from error


def not_installed(error: ModuleNotFoundError) -> ClricError:
    """What to say of a library that is missing: how to install it."""
    extra = "vae" if error.name in ("diffusers", "huggingface_hub") else "encoder"
    without = " (preset instant needs 'clric[cpu]' only)" if error.name == "torch" else ""
    return ClricError(f"{error.name} is not installed; run: pip install 'clric[{extra}]'{without}")
