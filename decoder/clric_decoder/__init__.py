"""The decoder: a stream becomes a latent, and a latent an image. Light: numpy, and onnxruntime for the image.

Importing this package loads neither onnxruntime nor torch.
"""

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
