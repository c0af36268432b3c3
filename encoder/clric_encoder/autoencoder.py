"""Image to latent, and latent to image with gradients: the halves of a pretrained VAE, ready to run.

Takes the name of an autoencoder (`networks` finds its weights). Gives an ImageEncoder whose `encode` turns uint8 RGB
into the scaled latent that the codec represents, big images in tiles, in bounded memory; and an ImageDecoder for
training (`training.distortion`).
"""

import os
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from .networks import load_decoder_network, load_encoder_network
from .tiling import ImageEncoder, in_tiles
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


def load_encoder(name: str, models: str | os.PathLike[str] | None = None, device: str = "cpu") -> ImageEncoder:
    """The encoder of the autoencoder of this name, alias or path, float32 on `device`.

    It is found as `networks.load_encoder_network` says. Raises ModelError for missing or damaged weights.
    """
    network = load_encoder_network(name, models)
    module = network.module.to(device)
    if isinstance(module, nn.Sequential):
        run = _tiny_run(module, device)
    elif network.halo is not None:
        run = partial(in_tiles, _on_arrays(module, device), halo=network.halo, limit=_SMALL_PIXELS, blend=False)
    else:
        run = partial(in_tiles, _on_arrays(module, device), halo=_KL_HALO, limit=_KL_PIXELS, blend=True)
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

    return ImageDecoder(network.name, network.space, run, network.halo, network.number)


def fast_dtype(device: str) -> torch.dtype:
    """bfloat16 where the processor multiplies it, else float32."""
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    # torch has no public name for this question
    has_bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def _on_arrays(module: nn.Module, device: str) -> Callable[[np.ndarray], np.ndarray]:
    @torch.inference_mode()
    def run(values: np.ndarray) -> np.ndarray:
        result: Tensor = module(torch.from_numpy(values).to(device))
        return result.float().cpu().numpy()

    return run


def _tiny_run(layers: nn.Sequential, device: str) -> Callable[[np.ndarray], np.ndarray]:
    """Padded image -> latent by a network of the TAESD family (input [0, 1], latent already scaled).

    The head runs in tiles whose halo covers its receptive field, the rest at 1/8 of the size in one piece:
    this is exact, also for TAEF2, whose GroupNorm looks at the whole image at that size.
    """
    for module in layers.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True  # less memory, the same numbers
    strides = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2)]
    head, tail = (_on_arrays(part, device) for part in (layers[: strides[-1] + 1], layers[strides[-1] + 1 :]))
    return lambda image: tail(in_tiles(head, image, _TINY_HALO, _TINY_PIXELS, blend=False))
