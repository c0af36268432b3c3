"""The encoder: an image becomes a stream. Needs torch (``pip install 'clric[encoder]'``); runs on servers."""

from .encoding import encode, encode_latent

__all__ = ["encode", "encode_latent"]
