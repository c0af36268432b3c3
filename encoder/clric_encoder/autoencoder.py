"""Image to latent: the encoder half of a pretrained VAE.

Takes the name of an autoencoder (clric_decoder/models.py) and finds its weights locally or on the Hugging
Face hub; gives an ImageEncoder whose `encode` turns uint8 RGB into the scaled latent that the codec
represents. Big images are encoded in tiles, in bounded memory.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from clric_decoder.errors import ModelError, brief
from clric_decoder.models import (
    DIFFUSERS_FILES,
    ENCODER_SHAPES,
    LATENT_SPACES,
    Autoencoder,
    find_autoencoder,
    find_weights,
    missing_weights,
)
from torch import Tensor, nn

# diffusers and huggingface_hub take seconds to import, and are imported where they are needed: the encoders of TAESD's
# kind, what comes with clric among them, go without.
if TYPE_CHECKING:
    from diffusers import AutoencoderKL

# The layers up to the last stride bring the image to an eighth of its size; only they work at sizes where memory
# matters. With the TAESD family, backwards from a feature at 1/8: stride 2 (1 at 1/4), three blocks of three 3x3
# convolutions (10), stride 2 (21 at 1/2), three blocks (30), stride 2 (61 pixels), a block and a convolution (65
# pixels). The lite encoder sees less.
_TINY_HALO = 9  # latents, 72 pixels: the multiple of 8 from 65 up

# What comes with clric: the encoder of the autoencoder ``lite``.
_WEIGHTS = Path(__file__).parent / "weights"

# An AutoencoderKL normalises and attends over the whole image: tiles are an approximation, blended over twice
# this many latents.
_KL_HALO = 16

# The most pixels that go through a network at once, and with them the peak memory: 64 and 128 channels of
# float32 at full size, several of them alive at a time.
_TINY_PIXELS = 768 * 768
_KL_PIXELS = 1024 * 1024


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
    """The encoder of the autoencoder of this name or alias, float32 on `device`.

    Weights are looked for as clric_decoder.models.find_weights does (``models`` is the first folder), then among
    those that come with clric, in the cache of the Hugging Face hub, and on the hub. ``name`` may also be the path
    of an encoder that clric-export distill made (.safetensors). Raises ModelError for missing or damaged ones.
    """
    if name.endswith(".safetensors"):
        space, layers = _load_distilled(Path(name))
        return ImageEncoder(Path(name).stem, space, _tiny_run(layers.to(device), device))
    autoencoder = find_autoencoder(name)
    if autoencoder.kind != "kl":
        run = _tiny_run(_load_tiny(autoencoder, models).to(device), device)
    else:
        run = _kl_run(_load_kl(autoencoder, models).to(device), autoencoder, device)
    return ImageEncoder(autoencoder.name, autoencoder.space, run)


def _tiny_run(layers: nn.Sequential, device: str) -> Callable[[np.ndarray], Tensor]:
    """Padded image -> latent by a network of the TAESD family (input [0, 1], latent already scaled).

    The head runs in tiles whose halo covers its receptive field, the rest at 1/8 of the size in one piece:
    this is exact, also for TAEF2, whose GroupNorm looks at the whole image at that size.
    """
    strides = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2)]
    head, tail = layers[: strides[-1] + 1], layers[strides[-1] + 1 :]
    return lambda image: tail(_in_tiles(head, image, _TINY_HALO, _TINY_PIXELS, blend=False, device=device))


def _kl_run(vae: "AutoencoderKL", autoencoder: Autoencoder, device: str) -> Callable[[np.ndarray], Tensor]:
    """Padded image -> latent by an AutoencoderKL (input [-1, 1]): its posterior's mean, scaled."""

    def network(pixels: Tensor) -> Tensor:
        mean = vae.encode(pixels * 2 - 1).latent_dist.mean
        return (mean - autoencoder.shift) * autoencoder.scaling

    return lambda image: _in_tiles(network, image, _KL_HALO, _KL_PIXELS, blend=True, device=device)


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


class _Block(nn.Module):
    """ReLU(x + three convolutions of x), the block of TAESD's kind, by the names of its weights.

    pooled: for TAEF2's lowest resolution, where a pooling branch is added to the input (clric_export/sources.py has the
    same few lines: neither wing may import the other, nor the decoder torch).
    """

    def __init__(self, width: int, pooled: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        self.conv = nn.Sequential(*layers[:-1])
        self.fuse = nn.ReLU()
        self.pool = None
        if pooled:
            self.pool = nn.Sequential(
                nn.Conv2d(width, 4 * width, 1, bias=False),
                nn.GroupNorm(4, 4 * width),
                nn.ReLU(),
                nn.Conv2d(4 * width, width, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return self.fuse(self.conv(x) + x)


def _load_tiny(autoencoder: Autoencoder, models: str | os.PathLike[str] | None) -> nn.Sequential:
    """The encoder's layers, [1, 3, H, W] in [0, 1] -> [1, C, H/8, W/8], float32."""
    path = find_weights(autoencoder, "encoder", models) or _packaged(autoencoder) or _hub_folder(autoencoder, models)
    if path.is_dir():
        from diffusers import AutoencoderTiny

        # AutoencoderTiny maps [-1, 1] to [0, 1] before these layers and leaves the latent as it is.
        layers = _load_diffusers(AutoencoderTiny, autoencoder, path).encoder.layers
    else:
        channels = LATENT_SPACES[autoencoder.space].channels
        layers = _tiny_layers(autoencoder.kind, channels, path, f"encoder of {autoencoder.name}")
    return _frugal(layers)


def _load_distilled(path: Path) -> tuple[str, nn.Sequential]:
    """The latent space and the layers of a small encoder, whose file names its space in its metadata."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            space = LATENT_SPACES[(file.metadata() or {})["latent_space"]]
    except FileNotFoundError as error:
        raise ModelError(f"encoder file {path} does not exist") from error
    except Exception as error:  # safetensors' own, OSError, KeyError
        raise ModelError(f"{path} is no encoder of clric-export distill: {brief(error)}") from error
    return space.name, _frugal(_tiny_layers("lite", space.channels, path, "encoder of clric-export distill"))


def _tiny_layers(kind: str, channels: int, path: Path, what: str) -> nn.Sequential:
    state = _read_weights(path)
    blocks, width = ENCODER_SHAPES[kind]
    layers = nn.Sequential(nn.Conv2d(3, width, 3, padding=1))
    for number, count in enumerate(blocks):
        if number:
            layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False))
        for _ in range(count):
            layers.append(_Block(width, pooled=f"{len(layers)}.pool.0.weight" in state))
    layers.append(nn.Conv2d(width, channels, 3, padding=1))
    try:
        layers.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"{path} holds no {what}: {brief(error)}") from error
    return layers


def _frugal(layers: nn.Sequential) -> nn.Sequential:
    """In eval mode, with activations in place: less memory, the same numbers."""
    for module in layers.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    return layers.eval()


def _load_kl(autoencoder: Autoencoder, models: str | os.PathLike[str] | None) -> "AutoencoderKL":
    from diffusers import AutoencoderKL

    path = find_weights(autoencoder, "encoder", models) or _hub_folder(autoencoder, models)
    vae = _load_diffusers(AutoencoderKL, autoencoder, path)
    vae.decoder = None  # more than half of the weights, of no use here
    return vae.eval()


def _packaged(autoencoder: Autoencoder) -> Path | None:
    path = _WEIGHTS / f"{autoencoder.encoder_stem}.safetensors"
    return path if path.is_file() else None


def _hub_folder(autoencoder: Autoencoder, models: str | os.PathLike[str] | None) -> Path:
    """The folder in diffusers layout from the hub's cache, or else the hub; ModelError without."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo, subfolder = autoencoder.hub_repo, autoencoder.hub_subfolder
    if repo is None:
        raise missing_weights(autoencoder, "encoder", models, None)
    get = partial(hf_hub_download, repo, subfolder=subfolder)
    try:
        paths = [get(file, local_files_only=True) for file in DIFFUSERS_FILES]
    except LocalEntryNotFoundError:
        try:
            paths = [get(file) for file in DIFFUSERS_FILES]
        except LocalEntryNotFoundError as error:
            raise missing_weights(autoencoder, "encoder", models, "which cannot be reached") from error
        except OSError as error:  # no such repository, no permission, no space left
            raise missing_weights(autoencoder, "encoder", models, brief(error)) from error
    return Path(paths[0]).parent


def _load_diffusers(kind: Any, autoencoder: Autoencoder, folder: Path) -> Any:
    """A float32 model from a folder in diffusers layout. Raises ModelError for a damaged one."""
    try:
        vae = kind.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False).float()
    except Exception as error:  # diffusers and safetensors share no base class for what a damaged file does
        raise ModelError(f"{folder} holds no {autoencoder.name} in diffusers layout: {brief(error)}") from error
    channels = LATENT_SPACES[autoencoder.space].channels
    if vae.config.latent_channels != channels:
        raise ModelError(
            f"{folder} has {vae.config.latent_channels} latent channels, {autoencoder.name} has {channels}:"
            " it is another model"
        )
    return vae


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file as float32. Raises ModelError for a damaged file."""
    try:
        if path.suffix == ".pth":
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            state = safetensors.torch.load_file(path)
        return {key: tensor.float() for key, tensor in state.items()}
    except Exception as error:  # the two readers share no base class for what a damaged file does to them
        raise ModelError(f"{path} cannot be read as weights: {brief(error)}; download it again") from error
