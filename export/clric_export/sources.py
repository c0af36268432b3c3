"""Where each autoencoder comes from and what it is: the halves of pretrained VAEs as torch modules.

Takes the name of an autoencoder (clric_decoder/models.py) and finds its weights locally or on the Hugging
Face hub; gives a DecoderSource. Whatever the VAE's own conventions, its module has the contract of every
ONNX decoder:

    latent [N, C, h, w] float32, scaled as the codec's  ->  image [N, 3, 8h, 8w] float32, RGB in [0, 1]

The encoder half, which is a teacher's in distillation, has the contract the other way round.
"""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from clric_decoder.errors import ModelError, brief
from clric_decoder.models import (
    DIFFUSERS_FILES,
    ENCODER_SHAPES,
    LATENT_SPACES,
    Autoencoder,
    Half,
    find_autoencoder,
    find_weights,
    missing_weights,
)
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.autoencoders.vae import DecoderTiny, EncoderTiny
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor, nn


@dataclass(frozen=True)
class DecoderSource:
    """An image decoder to export.

    ``halo``: how many latents around a tile its pixels depend on; None where all depend on all.
    ``module``: latent -> image as this module's docstring says, in eval mode.
    """

    name: str
    space: str
    channels: int
    halo: int | None
    licence: str
    source: str
    module: nn.Module


def load_decoder(name: str, models: str | os.PathLike[str] | None = None) -> DecoderSource:
    """The decoder of the autoencoder of this name or alias, float32 on the CPU.

    Weights are looked for as clric_decoder.models.find_weights does (``models`` is the first folder), then
    in the cache of the Hugging Face hub, then on the hub. Raises ModelError for missing or damaged ones.
    """
    autoencoder = find_autoencoder(name)
    if autoencoder.kind == "lite":
        raise ModelError(f"the decoder of {autoencoder.name} comes with clric as ONNX: there is nothing to export")
    path = _find(autoencoder, "decoder", models)
    halo: int | None
    if autoencoder.kind == "tiny":
        layers = _load_tiny(autoencoder, "decoder", path)
        module: nn.Module = TinyDecoder(layers)
        halo = receptive_halo(layers)
    else:
        vae = _load_diffusers(AutoencoderKL, autoencoder, path)
        module = KLDecoder(vae, autoencoder.scaling, autoencoder.shift)
        halo = None  # GroupNorm and attention look at the whole image
    return DecoderSource(
        autoencoder.name,
        autoencoder.space,
        LATENT_SPACES[autoencoder.space].channels,
        halo,
        autoencoder.licence,
        autoencoder.source,
        module.eval(),
    )


def load_encoder(name: str, models: str | os.PathLike[str] | None = None) -> nn.Module:
    """The encoder of the autoencoder of this name or alias: image [N, 3, 8h, 8w] in [0, 1] -> latent [N, C, h, w].

    Float32 on the CPU, in eval mode; weights and errors as `load_decoder`'s.
    """
    autoencoder = find_autoencoder(name)
    if autoencoder.kind == "lite":
        raise ModelError(f"{autoencoder.name} is what distillation makes: name another autoencoder to learn from")
    path = _find(autoencoder, "encoder", models)
    if autoencoder.kind == "tiny":
        return _load_tiny(autoencoder, "encoder", path).eval()
    vae = _load_diffusers(AutoencoderKL, autoencoder, path)
    return KLEncoder(vae, autoencoder.scaling, autoencoder.shift).eval()


class KLEncoder(nn.Module):
    """The encoder of an AutoencoderKL, which takes [-1, 1]: its posterior's mean, scaled."""

    def __init__(self, vae: Any, scaling: float, shift: float) -> None:
        super().__init__()
        self.vae = vae
        self.scaling = scaling
        self.shift = shift

    def forward(self, image: Tensor) -> Tensor:
        return (self.vae.encode(image * 2 - 1).latent_dist.mean - self.shift) * self.scaling


class TinyDecoder(nn.Module):
    """A decoder of the TAESD family; `layers` as in diffusers' DecoderTiny, whose output is in [0, 1]."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, latent: Tensor) -> Tensor:
        return self.layers(3 * torch.tanh(latent / 3)).clamp(0, 1)


class KLDecoder(nn.Module):
    """The decoder of an AutoencoderKL, which takes latent / scaling + shift and gives [-1, 1]."""

    def __init__(self, vae: Any, scaling: float, shift: float) -> None:
        super().__init__()
        self.post_quant_conv = vae.post_quant_conv if vae.config.use_post_quant_conv else nn.Identity()
        self.decoder = vae.decoder
        self.scaling = scaling
        self.shift = shift

    def forward(self, latent: Tensor) -> Tensor:
        image = self.decoder(self.post_quant_conv(latent / self.scaling + self.shift))
        return (image / 2 + 0.5).clamp(0, 1)


class PooledBlock(AutoencoderTinyBlock):
    """The block of TAEF2's lowest resolution: a pooling branch is added to its input.

    clric_encoder/autoencoder.py has the same few lines: the wings do not import each other, nor the decoder
    torch.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, "relu")
        self.pool = nn.Sequential(
            nn.Conv2d(channels, 4 * channels, 1, bias=False),
            nn.GroupNorm(4, 4 * channels),
            nn.ReLU(),
            nn.Conv2d(4 * channels, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.pool(x))


def receptive_halo(layers: nn.Sequential) -> int | None:
    """The latents on each side on which the 8 x 8 pixels of one latent depend; None where all do.

    Walks back from the first and last of these pixels: a convolution widens the span by half its kernel,
    doubling the size halves its ends.
    """
    first, last = 0, 7
    for layer in reversed(list(layers)):
        if any(isinstance(module, nn.GroupNorm) for module in layer.modules()):
            return None
        if isinstance(layer, nn.Upsample | nn.PixelShuffle):
            first, last = first // 2, last // 2
        reach = sum(module.kernel_size[0] // 2 for module in layer.modules() if isinstance(module, nn.Conv2d))
        first, last = first - reach, last + reach
    return max(-first, last)


def _load_tiny(autoencoder: Autoencoder, half: Half, path: Path) -> nn.Sequential:
    """One half's layers, float32: [N, 3, 8h, 8w] -> [N, C, h, w], or back from behind the clamp; images in [0, 1]."""
    if path.is_dir():
        vae = _load_diffusers(AutoencoderTiny, autoencoder, path)
        return getattr(vae, half).layers
    channels = LATENT_SPACES[autoencoder.space].channels
    state = _read_weights(path)
    if half == "encoder":
        blocks, width = ENCODER_SHAPES[autoencoder.kind]
        layers = EncoderTiny(3, channels, blocks, (width,) * len(blocks), "relu").layers
    else:
        layers = DecoderTiny(channels, 3, (3, 3, 3, 1), (64, 64, 64, 64), 2, "relu", "nearest").layers
        state = {_without_clamp(key): tensor for key, tensor in state.items()}
    for index in range(len(layers)):
        if f"{index}.pool.0.weight" in state:
            layers[index] = PooledBlock(64)
    try:
        layers.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"{path} holds no {half} of {autoencoder.name}: {brief(error)}") from error
    return layers


def _without_clamp(key: str) -> str:
    """The family's own decoder files count the clamp as layer 0, diffusers does not."""
    number, _, rest = key.partition(".")
    return f"{int(number) - 1 if number.isdigit() else number}.{rest}"


def _find(autoencoder: Autoencoder, half: Half, models: str | os.PathLike[str] | None) -> Path:
    return find_weights(autoencoder, half, models) or _hub_folder(autoencoder, half, models)


def _hub_folder(autoencoder: Autoencoder, half: Half, models: str | os.PathLike[str] | None) -> Path:
    """The folder in diffusers layout from the hub's cache, or else from the hub; ModelError without."""
    repo, subfolder = autoencoder.hub_repo, autoencoder.hub_subfolder
    if repo is None:
        raise missing_weights(autoencoder, half, models, None)
    get = partial(hf_hub_download, repo, subfolder=subfolder)
    try:
        paths = [get(file, local_files_only=True) for file in DIFFUSERS_FILES]
    except LocalEntryNotFoundError:
        try:
            paths = [get(file) for file in DIFFUSERS_FILES]
        except LocalEntryNotFoundError as error:
            raise missing_weights(autoencoder, half, models, "which cannot be reached") from error
        except OSError as error:  # no such repository, no permission, no space left
            raise missing_weights(autoencoder, half, models, brief(error)) from error
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
