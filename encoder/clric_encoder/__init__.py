"""The encoder: an image becomes a stream. Needs torch (``pip install 'clric[encoder]'``); runs on servers.

Importing this package does not load torch: the command line answers --help, and refuses bad input, without it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .encoding import encode, encode_latent

__all__ = ["encode", "encode_latent"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import encoding

        return getattr(encoding, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
