"""An image encoder: images of any size through its network, large ones in tiles, in bounded memory. Without torch."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ImageEncoder:
    """The encoder half of an autoencoder, ready to run: see `autoencoder.load_encoder` and `instant.load_encoder`."""

    name: str
    space: str
    _encode: Callable[[np.ndarray], np.ndarray]

    def encode(self, image: np.ndarray) -> np.ndarray:
        """The scaled latent of an image.

        image: H x W x 3, uint8 RGB, H and W at least 1. Sides that are no multiple of 8 are continued at the
        bottom and at the right by their last row and column.
        Returns C x ceil(H/8) x ceil(W/8), float32. Raises ValueError for another shape or dtype.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ValueError(f"an image is H x W x 3 uint8, got {image.shape} {image.dtype}")
        height, width, _ = image.shape
        return self._encode(np.pad(image, ((0, -height % 8), (0, -width % 8), (0, 0)), mode="edge"))[0]


def in_tiles(
    network: Callable[[np.ndarray], np.ndarray], image: np.ndarray, halo: int, limit: int, *, blend: bool
) -> np.ndarray:
    """network(image), with at most about `limit` pixels going through the network at once.

    network: [1, 3, H, W] float32 in [0, 1] -> [1, C, H/8, W/8] float32. image: H x W x 3 uint8, sides multiples of 8.
    Each tile is a core with `halo` latents around it, cut off at the image's edges (which the network pads
    as it does for the whole). The core is kept, or, with `blend`, tiles fade into each other linearly across
    the 2 * halo latents that they share.
    """
    h, w = image.shape[0] // 8, image.shape[1] // 8
    rows, columns = _grid(h, w, halo, limit // 64)
    result = weights = np.empty(0, np.float32)
    for top, bottom in _spans(h, rows):
        for left, right in _spans(w, columns):
            y0, y1 = max(0, top - halo), min(h, bottom + halo)
            x0, x1 = max(0, left - halo), min(w, right + halo)
            pixels = image[8 * y0 : 8 * y1, 8 * x0 : 8 * x1].transpose(2, 0, 1)[None]
            tile = network(np.ascontiguousarray(pixels, np.float32) / 255)
            if rows == columns == 1:
                return tile
            if not result.size:
                result = np.zeros((1, tile.shape[1], h, w), np.float32)
                weights = np.zeros((h, w), np.float32)
            if blend:
                # Only what fades is faded: an edge of the image is no edge of a tile.
                weight = _fade(y0, y1, h, halo)[:, None] * _fade(x0, x1, w, halo)
                result[..., y0:y1, x0:x1] += tile * weight
                weights[y0:y1, x0:x1] += weight
            else:
                result[..., top:bottom, left:right] = tile[..., top - y0 : bottom - y0, left - x0 : right - x0]
    return result / weights if blend else result


def _grid(h: int, w: int, halo: int, limit: int) -> tuple[int, int]:
    """The rows and columns of tiles that cover h x w latents with the least work.

    A tile with its halo has at most `limit` latents, which must be more than a halo needs by itself.
    """
    best = (math.inf, 1, 1)
    for rows in range(1, h + 1):
        tile_height = min(h, math.ceil(h / rows) + 2 * halo)
        widest = limit // tile_height
        columns = 1 if widest >= w else math.ceil(w / max(1, widest - 2 * halo))
        tile_width = min(w, math.ceil(w / columns) + 2 * halo)
        if tile_height * tile_width <= limit:
            best = min(best, (rows * columns * tile_height * tile_width, rows, columns))
    return best[1], best[2]


def _spans(length: int, count: int) -> Iterator[tuple[int, int]]:
    """(start, end) of `count` pieces of nearly the same length."""
    for index in range(count):
        yield length * index // count, length * (index + 1) // count


def _fade(start: int, end: int, length: int, halo: int) -> np.ndarray:
    """A tile's weight at each latent from start to end: it rises over 2 * halo latents from inner edges."""
    at = np.arange(start, end, dtype=np.float32) + np.float32(0.5)
    rise = np.ones_like(at) if start == 0 else (at - start) / (2 * halo)
    fall = np.ones_like(at) if end == length else (end - at) / (2 * halo)
    return np.minimum(np.minimum(rise, fall), 1)
