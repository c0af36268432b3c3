"""The encoder: an image becomes a stream. Needs torch (``pip install 'clric[encoder]'``); runs on servers.

`encode_instantly` alone needs onnxruntime instead (``pip install 'clric[cpu]'``). Importing this package does not load
torch: the command line answers --help, and refuses bad input, without it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .encoding import encode, encode_latent
    from .instant import encode_instantly

__all__ = ["encode", "encode_instantly", "encode_latent"]


def __getattr__(name: str) -> Any:
    if name == "encode_instantly":
        from .instant import encode_instantly

        return encode_instantly
    if name in __all__:
        from . import encoding

        return getattr(encoding, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
