"""The decoder: a stream becomes a latent, and a latent an image. Light: numpy, and onnxruntime for the image.

Importing this package loads nothing, not even numpy. What it gives loads with its first use; onnxruntime with the first
image; torch never.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .autoencoder import decode
    from .bitstream import Header, read_header
    from .errors import ClricError, ImageError, ModelError, StreamError
    from .latent import decode_latent

__all__ = [
    "ClricError",
    "Header",
    "ImageError",
    "ModelError",
    "StreamError",
    "decode",
    "decode_latent",
    "read_header",
]

_MODULES = {"decode": "autoencoder", "decode_latent": "latent", "Header": "bitstream", "read_header": "bitstream"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES.get(name, 'errors')}", __name__), name)
