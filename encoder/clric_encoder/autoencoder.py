"""Image to latent, and latent to image with gradients: the halves of a pretrained VAE, ready to run.

Takes the name of an autoencoder (`networks` finds its weights). Gives an ImageEncoder whose `encode` turns uint8 RGB
into the scaled latent that the codec represents, big images in tiles, in bounded memory; and an ImageDecoder for
training (`training.distortion`).
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from .networks import load_decoder_network, load_encoder_network
from .training.distortion import ImageDecoder

# The layers up to the last stride bring the image to an eighth of its size; only they work at sizes where memory
# matters. With the TAESD family, backwards from a feature at 1/8: stride 2 (1 at 1/4), three blocks of three 3x3
# convolutions (10), stride 2 (21 at 1/2), three blocks (30), stride 2 (61 pixels), a block and a convolution (65
# pixels). The lite encoder sees less.
_TINY_HALO = 9  # latents, 72 pixels: the multiple of 8 from 65 up

# An AutoencoderKL normalises and attends over the whole image: tiles are an approximation, blended over twice
# this many latents.
_KL_HALO = 16

# The most pixels that go through a network at once, and with them the peak memory: 64 and 128 channels of
# float32 at full size, several of them alive at a time.
_TINY_PIXELS = 768 * 768
_KL_PIXELS = 1024 * 1024

# A SmallEncoder has 80 channels at a quarter of the size.
_SMALL_PIXELS = 2048 * 2048


@dataclass(frozen=True)
class ImageEncoder:
    """The encoder half of an autoencoder, ready to run: see `load_encoder`."""

    name: str
    space: str
    _encode: Callable[[np.ndarray], Tensor]

    def encode(self, image: np.ndarray) -> np.ndarray:
        """The scaled latent of an image.

        image: H x W x 3, uint8 RGB, H and W at least 1. Sides that are no multiple of 8 are continued at the
        bottom and at the right by their last row and column.
        Returns C x ceil(H/8) x ceil(W/8), float32. Raises ValueError for another shape or dtype.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ValueError(f"an image is H x W x 3 uint8, got {image.shape} {image.dtype}")
        height, width, _ = image.shape
        padded = np.pad(image, ((0, -height % 8), (0, -width % 8), (0, 0)), mode="edge")
        with torch.inference_mode():
            return self._encode(padded)[0].float().cpu().numpy()


def load_encoder(name: str, models: str | os.PathLike[str] | None = None, device: str = "cpu") -> ImageEncoder:
    """The encoder of the autoencoder of this name, alias or path, float32 on `device`.

    It is found as `networks.load_encoder_network` says. Raises ModelError for missing or damaged weights.
    """
    network = load_encoder_network(name, models)
    module = network.module.to(device)
    if isinstance(module, nn.Sequential):
        run = _tiny_run(module, device)
    elif network.halo is not None:
        run = partial(_in_tiles, module, halo=network.halo, limit=_SMALL_PIXELS, blend=False, device=device)
    else:
        run = partial(_in_tiles, module, halo=_KL_HALO, limit=_KL_PIXELS, blend=True, device=device)
    return ImageEncoder(network.name, network.space, run)


def load_decoder(name: str, models: str | os.PathLike[str] | None = None, device: str = "cpu") -> ImageDecoder:
    """The image decoder of this name, alias or path of an ONNX file, for gradients to pass through on `device`.

    In bfloat16 where the processor computes with it, which takes half of the time. Raises ModelError as
    `networks.load_decoder_network` does.
    """
    network = load_decoder_network(name, models)
    dtype = fast_dtype(device)
    module = network.module.train().to(device=device, dtype=dtype)

    def run(latents: Tensor) -> Tensor:
        return module(latents.to(dtype=dtype, memory_format=torch.channels_last)).float()

    return ImageDecoder(network.name, network.space, run, network.halo)


def fast_dtype(device: str) -> torch.dtype:
    """bfloat16 where the processor multiplies it, else float32."""
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    # torch has no public name for this question
    has_bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def _tiny_run(layers: nn.Sequential, device: str) -> Callable[[np.ndarray], Tensor]:
    """Padded image -> latent by a network of the TAESD family (input [0, 1], latent already scaled).

    The head runs in tiles whose halo covers its receptive field, the rest at 1/8 of the size in one piece:
    this is exact, also for TAEF2, whose GroupNorm looks at the whole image at that size.
    """
    for module in layers.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True  # less memory, the same numbers
    strides = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2)]
    head, tail = layers[: strides[-1] + 1], layers[strides[-1] + 1 :]
    return lambda image: tail(_in_tiles(head, image, _TINY_HALO, _TINY_PIXELS, blend=False, device=device))


def _in_tiles(
    network: Callable[[Tensor], Tensor], image: np.ndarray, halo: int, limit: int, *, blend: bool, device: str
) -> Tensor:
    """network(image), with at most about `limit` pixels going through the network at once.

    network: [1, 3, H, W] in [0, 1] -> [1, C, H/8, W/8]. image: H x W x 3 uint8, sides multiples of 8.
    Each tile is a core with `halo` latents around it, cut off at the image's edges (which the network pads
    as it does for the whole). The core is kept, or, with `blend`, tiles fade into each other linearly across
    the 2 * halo latents that they share.
    """
    h, w = image.shape[0] // 8, image.shape[1] // 8
    rows, columns = _grid(h, w, halo, limit // 64)
    result = weights = torch.empty(0)
    for top, bottom in _spans(h, rows):
        for left, right in _spans(w, columns):
            y0, y1 = max(0, top - halo), min(h, bottom + halo)
            x0, x1 = max(0, left - halo), min(w, right + halo)
            pixels = torch.from_numpy(np.ascontiguousarray(image[8 * y0 : 8 * y1, 8 * x0 : 8 * x1])).to(device)
            tile = network(pixels.permute(2, 0, 1)[None].float() / 255)
            if rows == columns == 1:
                return tile
            if not result.numel():
                result = tile.new_zeros(1, tile.shape[1], h, w)
                weights = tile.new_zeros(h, w)
            if blend:
                # Only what fades is faded: an edge of the image is no edge of a tile.
                weight = _fade(y0, y1, h, halo)[:, None] * _fade(x0, x1, w, halo)
                result[..., y0:y1, x0:x1] += tile * weight.to(tile)
                weights[y0:y1, x0:x1] += weight.to(tile)
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


def _fade(start: int, end: int, length: int, halo: int) -> Tensor:
    """A tile's weight at each latent from start to end: it rises over 2 * halo latents from inner edges."""
    at = torch.arange(start, end) + 0.5
    rise = torch.full_like(at, 1.0) if start == 0 else (at - start) / (2 * halo)
    fall = torch.full_like(at, 1.0) if end == length else (end - at) / (2 * halo)
    return torch.minimum(rise, fall).clamp(max=1)
