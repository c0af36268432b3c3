"""Bytes -> latent: container, networks, grids and synthesis, in order; and the payload that is its inverse."""

from __future__ import annotations

import numpy as np

from . import bitstream
from .bitstream import MAX_PIXELS, Architecture, Header, Segments
from .context import build_arms, decode_level, encode_level
from .networks import Parameters, decode_networks, encode_networks
from .registered_networks import registered_networks
from .synthesis import synthesize


def decode_grids(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[Header, list[Parameters], list[np.ndarray]]:
    """Header, networks, and the integer grids of every level, each (channels, height, width) int32, finest first.

    Raises StreamError for anything but a valid stream.
    """
    header, segments = bitstream.read(data, max_pixels)
    segment = registered_networks().get(header.function, segments.networks)
    networks = decode_networks(segment, header.architecture)
    arms = build_arms(networks, header.architecture)
    grids = [
        decode_level(data, shape, arm, header.architecture)
        for data, shape, arm in zip(segments.levels, header.grid_shapes, arms, strict=True)
    ]
    return header, networks, grids


def encode_grids(networks: list[Parameters], grids: list[np.ndarray], architecture: Architecture) -> Segments:
    """The payload of networks and grids, the latter (channels, height, width) each, the finest first.

    The inverse of `decode_grids`: the encoder codes with the very functions that the decoder decodes with.
    """
    arms = build_arms(networks, architecture)
    levels = [encode_level(grid, arm, architecture) for grid, arm in zip(grids, arms, strict=True)]
    return Segments(encode_networks(networks), tuple(levels))


def decode_latent(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The latent (channels, height / 8, width / 8) float32 of a stream.

    Raises StreamError for anything but a valid stream, and for images of more than `max_pixels`.
    """
    header, networks, grids = decode_grids(data, max_pixels)
    return synthesize(grids, networks, header.architecture)
