"""Both halves of pretrained autoencoders as torch modules, and where their weights come from.

Takes the name of an autoencoder (clric_decoder/models.py) and finds its weights locally or on the Hugging Face hub.
Whatever a VAE's own conventions, the modules have these:

    encoder: image [N, 3, 8h, 8w] float32, RGB in [0, 1]  ->  latent [N, C, h, w] float32, scaled as the codec's
    decoder: latent -> image; in training mode not clamped to [0, 1], since a gradient would end there

Networks that exist as ONNX only are those of clric-export's making, whose layers are known here.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from clric_decoder.errors import ModelError, brief
from clric_decoder.models import (
    DIFFUSERS_FILES,
    ENCODER_SHAPES,
    LATENT_SPACES,
    Autoencoder,
    Half,
    file_sha256,
    find_autoencoder,
    find_decoder,
    find_weights,
    image_decoder_number,
    missing_weights,
)
from torch import Tensor, nn

from .encoder_file import WEIGHTS, find_encoder

# diffusers, huggingface_hub and onnx take a third of a second to four seconds to import, and are imported where they
# are needed.
if TYPE_CHECKING:
    from diffusers import AutoencoderKL


@dataclass(frozen=True)
class Network:
    """One half of an autoencoder in eval mode, its weights frozen: see `load_encoder_network`, `load_decoder_network`.

    halo: how many latents around a tile what it gives depends on; None where it depends on all, or the tiles are not
    the network's but its first layers'. number: of an image decoder that streams can name, see
    `clric_decoder.models.IMAGE_DECODERS`.
    """

    half: Half
    name: str
    space: str
    channels: int
    halo: int | None
    licence: str
    source: str
    module: nn.Module
    number: int = 0


def load_encoder_network(name: str, models: str | os.PathLike[str] | None = None) -> Network:
    """The encoder of the autoencoder of this name or alias, float32 on the CPU.

    ``name`` may also be the path of an encoder that clric-export train (.onnx) or distill (.safetensors) made. Other
    weights are looked for as clric_decoder.models.find_weights does (``models`` is the first folder), then among those
    that come with clric, in the cache of the Hugging Face hub, and on the hub. From the hub the table's commit of a
    repository is taken, and its weights' sha256 compared; ``NAME@REVISION`` (a branch, tag or commit) takes another
    one, from the hub or its cache alone, and compares nothing: the way to names whose sha256 is not known. Weights in
    the user's own folders are taken as they are. Raises ModelError for missing or damaged ones. The module of kinds
    tiny and lite is an nn.Sequential of the layers of TAESD's encoder.
    """
    if name.endswith(".safetensors"):
        return _load_distilled_encoder(Path(name))
    if name.endswith(".onnx"):
        return _load_onnx_encoder(name)
    autoencoder, from_hub = _find(name)
    if autoencoder.kind == "small":
        return _load_onnx_encoder(name)
    path = None if from_hub else find_weights(autoencoder, "encoder", models) or _packaged(autoencoder)
    path = path or _hub_folder(autoencoder, "encoder", models, unchecked=from_hub)
    channels = LATENT_SPACES[autoencoder.space].channels
    module: nn.Module
    if autoencoder.kind == "kl":
        vae = _load_kl(autoencoder, path)
        vae.decoder = None  # more than half of the weights, of no use here
        module = KLEncoder(vae, autoencoder.scaling, autoencoder.shift)
    elif path.is_dir():
        module = _tiny_vae(autoencoder, path).encoder.layers
    else:
        module = _tiny_encoder(autoencoder.kind, channels, path, f"encoder of {autoencoder.name}")
    return _of_autoencoder(autoencoder, "encoder", None, module)


def load_decoder_network(name: str, models: str | os.PathLike[str] | None = None) -> Network:
    """The image decoder of this name, alias or path of an ONNX file, float32 on the CPU.

    Weights of the TAESD family and of diffusers' AutoencoderKL are looked for as `load_encoder_network` does. Decoders
    that exist as ONNX, `small` and `lite` among them, are found by clric_decoder.models.find_decoder; they must be of
    clric-export's making. Raises ModelError for missing, damaged and unknown ones.
    """
    if name.endswith(".onnx"):
        return _load_onnx_decoder(name, models)
    autoencoder, from_hub = _find(name, "image decoder")
    if autoencoder.kind in ("small", "lite"):
        return _load_onnx_decoder(name, models)
    path = None if from_hub else find_weights(autoencoder, "decoder", models)
    path = path or _hub_folder(autoencoder, "decoder", models, unchecked=from_hub)
    halo: int | None
    if autoencoder.kind == "kl":
        vae = _load_kl(autoencoder, path)
        module: nn.Module = KLDecoder(vae, autoencoder.scaling, autoencoder.shift)
        halo = None  # GroupNorm and attention look at the whole image
    else:
        channels = LATENT_SPACES[autoencoder.space].channels
        if path.is_dir():
            layers = _tiny_vae(autoencoder, path).decoder.layers
        else:
            state = {_without_clamp(key): tensor for key, tensor in _read_weights(path).items()}
            layers = _tiny_decoder(channels, state, f"{path} is not a valid decoder of {autoencoder.name}")
        module, halo = TinyDecoder(layers), receptive_halo(layers)
    return _of_autoencoder(autoencoder, "decoder", halo, module)


class TinyBlock(nn.Module):
    """ReLU(x + three convolutions of x), the block of TAESD's kind, by the names of its weights.

    pooled: for TAEF2's lowest resolution, where a pooling branch is added to the input.
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
    """A decoder of the TAESD family; `layers` as in its own files but for the clamp."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, latent: Tensor) -> Tensor:
        image = self.layers(3 * torch.tanh(latent / 3))
        return image if self.training else image.clamp(0, 1)


class KLDecoder(nn.Module):
    """The decoder of an AutoencoderKL, which takes latent / scaling + shift and gives [-1, 1]."""

    def __init__(self, vae: Any, scaling: float, shift: float) -> None:
        super().__init__()
        self.post_quant_conv = vae.post_quant_conv if vae.config.use_post_quant_conv else nn.Identity()
        self.decoder = vae.decoder
        self.scaling = scaling
        self.shift = shift

    def forward(self, latent: Tensor) -> Tensor:
        image = self.decoder(self.post_quant_conv(latent / self.scaling + self.shift)) / 2 + 0.5
        return image if self.training else image.clamp(0, 1)


class SmallBlock(nn.Module):
    """x + conv(ReLU(conv(x))), 3 x 3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        for parameter in self.second.parameters():
            nn.init.zeros_(parameter)  # the identity at first

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


class SmallDecoder(nn.Module):
    """Latent [N, C, h, w] -> image [N, 3, 8h, 8w], RGB in [0, 1] (in training mode about that); 17,000 MAC/pixel.

    ``widths``, ``blocks``: channels and residual blocks at 1/8, 1/4 and 1/2 of the image's size. Convolutions to
    four times the channels and pixel shuffles lead from one size to the next, and from the last to the pixels.
    """

    def __init__(
        self, channels: int, widths: tuple[int, ...] = (96, 32, 16), blocks: tuple[int, ...] = (4, 2, 1)
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1), nn.ReLU()]
        for width, count, following in zip(widths, blocks, [*widths[1:], 3], strict=True):
            layers += [SmallBlock(width) for _ in range(count)]
            layers += [nn.Conv2d(width, 4 * following, 3, padding=1), nn.PixelShuffle(2), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, latent: Tensor) -> Tensor:
        image = self.layers(latent) + 0.5
        return image if self.training else image.clamp(0, 1)  # beyond the clamp there is no gradient


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


class SmallEncoder(nn.Module):
    """Image [N, 3, 8h, 8w], RGB in [0, 1] -> latent [N, C, h, w]; 39,000 MAC/pixel.

    Blocks of 4 x 4 pixels are the channels of the first convolution: all the work is at 1/4 and 1/8 of the image's
    size, where channels are wide. ``widths``, ``blocks``: channels and residual blocks at these two.
    """

    def __init__(self, channels: int, widths: tuple[int, int] = (80, 128), blocks: tuple[int, int] = (3, 3)) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(3 * 16, widths[0], 3, padding=1),
            *(SmallBlock(widths[0]) for _ in range(blocks[0])),
            nn.Conv2d(widths[0], widths[1], 3, stride=2, padding=1),
            *(SmallBlock(widths[1]) for _ in range(blocks[1])),
            nn.ReLU(),
            nn.Conv2d(widths[1], channels, 3, padding=1),
        )

    def forward(self, image: Tensor) -> Tensor:
        latent: Tensor = self.layers(2 * image - 1)
        return latent

    @property
    def halo(self) -> int:
        """The latents on each side on whose pixels one latent depends."""
        reach = 0
        for layer in reversed(list(self.layers)):
            if isinstance(layer, nn.PixelUnshuffle):
                reach = 4 * reach + 3
            elif isinstance(layer, nn.Conv2d) and layer.stride == (2, 2):
                reach = 2 * reach + 1
            else:
                reach += sum(module.kernel_size[0] // 2 for module in layer.modules() if isinstance(module, nn.Conv2d))
        return -(-reach // 8)


def lite_encoder(channels: int) -> nn.Sequential:
    """Image [N, 3, 8h, 8w], RGB in [0, 1] -> latent [N, C, h, w], with random weights; 34,000 MAC/pixel."""
    return _encoder_layers("lite", channels, pooled=())


def _encoder_layers(kind: str, channels: int, pooled: Collection[int]) -> nn.Sequential:
    """An encoder of the TAESD family, with random weights. pooled: numbers of the layers that are pooled blocks."""
    blocks, width = ENCODER_SHAPES[kind]
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1)]
    for number, count in enumerate(blocks):
        if number:
            layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False))
        for _ in range(count):
            layers.append(TinyBlock(width, pooled=len(layers) in pooled))
    return nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1))


def _tiny_encoder(kind: str, channels: int, path: Path, what: str) -> nn.Sequential:
    state = _read_weights(path)
    layers = _encoder_layers(kind, channels, _pooled(state))
    try:
        layers.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"{path} is not a valid {what}: {brief(error)}") from error
    return layers


def _tiny_decoder(channels: int, state: dict[str, Tensor], wrong: str) -> nn.Sequential:
    """The layers of the TAESD family's decoders behind the clamp. wrong: how an error's message begins."""
    pooled, width = _pooled(state), 64
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
    for blocks in (3, 3, 3):
        for _ in range(blocks):
            layers.append(TinyBlock(width, pooled=len(layers) in pooled))
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
    layers += [TinyBlock(width, pooled=False), nn.Conv2d(width, 3, 3, padding=1)]
    result = nn.Sequential(*layers)
    try:
        result.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"{wrong}: {brief(error)}") from error
    return result


def _pooled(state: dict[str, Tensor]) -> set[int]:
    return {int(key.split(".")[0]) for key in state if key.split(".")[1:2] == ["pool"]}


def _of_autoencoder(autoencoder: Autoencoder, half: Half, halo: int | None, module: nn.Module) -> Network:
    return Network(
        half,
        autoencoder.name,
        autoencoder.space,
        LATENT_SPACES[autoencoder.space].channels,
        halo,
        autoencoder.licence,
        autoencoder.source,
        module.eval().requires_grad_(False),
    )


def _of_manifest(manifest: dict[str, Any], half: Half, module: nn.Module) -> Network:
    licence, source = (str(manifest.get(field, "")) for field in ("licence", "source"))
    return Network(
        half,
        manifest["name"],
        manifest["latent_space"],
        manifest["channels"],
        manifest["halo"],
        licence,
        source,
        module.eval().requires_grad_(False),
        image_decoder_number(manifest) if half == "decoder" else 0,
    )


def _load_distilled_encoder(path: Path) -> Network:
    """An encoder of clric-export distill, whose file names its space in its metadata."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            space = LATENT_SPACES[(file.metadata() or {})["latent_space"]]
    except FileNotFoundError as error:
        raise ModelError(f"encoder file {path} does not exist") from error
    except Exception as error:  # safetensors' own, OSError, KeyError
        raise ModelError(f"{path} is not an encoder made by clric-export distill: {brief(error)}") from error
    module = _tiny_encoder("lite", space.channels, path, "encoder of clric-export distill")
    manifest = {"name": path.stem, "latent_space": space.name, "channels": space.channels, "halo": None}
    return _of_manifest(manifest, "encoder", module)


def _load_onnx_encoder(name: str) -> Network:
    path, manifest = find_encoder(name)
    state = _layer_weights(path)
    module = SmallEncoder(manifest["channels"])
    _load_state(module.layers, state, path)
    return _of_manifest(manifest, "encoder", module)


def _load_onnx_decoder(name: str, models: str | os.PathLike[str] | None) -> Network:
    path, manifest = find_decoder(name, models)
    state = _layer_weights(path)
    if any(".conv." in key for key in state):
        module: nn.Module = TinyDecoder(_tiny_decoder(manifest["channels"], state, _unknown(path)))
    else:
        module = small = SmallDecoder(manifest["channels"], *_small_shape(state))
        _load_state(small.layers, state, path)
    return _of_manifest(manifest, "decoder", module)


def _layer_weights(path: Path) -> dict[str, Tensor]:
    """The weights of an ONNX file, whose initializers keep torch's names (clric_export/onnx.py)."""
    state = {key.removeprefix("layers."): value for key, value in _initializers(path).items()}
    if not state or not all(key[:1].isdigit() for key in state):
        raise ModelError(_unknown(path))
    return state


def _load_state(layers: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        layers.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"{_unknown(path)} ({brief(error)})") from error


def _unknown(path: Path) -> str:
    return f"{path} was not made by clric-export; decoders from elsewhere cannot be trained through"


def _small_shape(state: dict[str, Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Widths and numbers of blocks of a SmallDecoder: its layers are a convolution, then blocks and a convolution for
    each size, with a pixel shuffle and a ReLU behind each."""
    widths: list[int] = []
    blocks: list[int] = []
    for number in sorted({int(key.split(".")[0]) for key in state}):
        if f"{number}.first.weight" in state:
            blocks[-1] += 1
        elif number == 0:
            widths.append(len(state["0.bias"]))
            blocks.append(0)
        else:
            widths.append(len(state[f"{number}.bias"]) // 4)
            blocks.append(0)
    return tuple(widths[:-1]), tuple(blocks[:-1])


def _initializers(path: Path) -> dict[str, Tensor]:
    """The weights of an ONNX file as float32, those that are stored in fewer bits widened as its graph does."""
    import onnx

    try:
        graph = onnx.load(path).graph
        stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    except Exception as error:  # onnx, protobuf and OSError share no base class for a damaged file
        raise ModelError(f"{path} cannot be read as ONNX: {brief(error)}") from error
    result = {}
    for name, values in stored.items():
        base, _, kind = name.rpartition(".")
        if kind == "int8":
            result[base] = torch.from_numpy(values.astype(np.float32) * stored[f"{base}.scale"])
        elif kind == "fp16":
            result[base] = torch.from_numpy(values.astype(np.float32))
        elif kind in ("weight", "bias"):
            result[name] = torch.from_numpy(values.astype(np.float32))
    return result


def _without_clamp(key: str) -> str:
    """The family's own decoder files count the clamp as layer 0, and diffusers does not, nor is it one here."""
    number, _, rest = key.partition(".")
    return f"{int(number) - 1 if number.isdigit() else number}.{rest}"


def _packaged(autoencoder: Autoencoder) -> Path | None:
    path = WEIGHTS / f"{autoencoder.encoder_stem}.safetensors"
    return path if path.is_file() else None


def _load_kl(autoencoder: Autoencoder, path: Path) -> "AutoencoderKL":
    from diffusers import AutoencoderKL

    return _load_diffusers(AutoencoderKL, autoencoder, path)


def _tiny_vae(autoencoder: Autoencoder, path: Path) -> Any:
    from diffusers import AutoencoderTiny

    # AutoencoderTiny maps [-1, 1] to [0, 1] before these layers and leaves the latent as it is.
    return _load_diffusers(AutoencoderTiny, autoencoder, path)


def _find(name: str, called: str = "autoencoder") -> tuple[Autoencoder, bool]:
    """The autoencoder of ``NAME``, or that of ``NAME@REVISION`` and True: it is then to come from the hub alone."""
    base, at, revision = name.partition("@")
    autoencoder = find_autoencoder(base, called)
    if not at:
        return autoencoder, False
    if not revision:
        raise ModelError(f"{name} has no revision after the @; use NAME, or NAME@ with a branch, tag or commit")
    if autoencoder.hub_repo is None:
        raise ModelError(f"{base} is not loaded from the Hugging Face hub, so it has no revision {revision!r}")
    return replace(autoencoder, hub_revision=revision, hub_sha256=None), True


def _hub_folder(autoencoder: Autoencoder, half: Half, models: str | os.PathLike[str] | None, unchecked: bool) -> Path:
    """The folder in diffusers layout from the hub's cache, or else the hub; ModelError without.

    unchecked: the user named the revision, and no sha256 is compared.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo, subfolder = autoencoder.hub_repo, autoencoder.hub_subfolder
    if repo is None:
        raise missing_weights(autoencoder, half, models, None)
    if autoencoder.hub_sha256 is None and not unchecked:
        pinned = f"{autoencoder.name}@{autoencoder.hub_revision}"
        reason = f"not tried, as no SHA-256 of its weights is known: {pinned} takes them unchecked"
        raise missing_weights(autoencoder, half, models, reason)
    get = partial(hf_hub_download, repo, subfolder=subfolder, revision=autoencoder.hub_revision)
    try:
        paths = [get(file, local_files_only=True) for file in DIFFUSERS_FILES]
    except LocalEntryNotFoundError:
        try:
            paths = [get(file) for file in DIFFUSERS_FILES]
        except LocalEntryNotFoundError as error:
            raise missing_weights(autoencoder, half, models, "which cannot be reached") from error
        except OSError as error:  # no such repository or revision, no permission, no space left
            raise missing_weights(autoencoder, half, models, brief(error)) from error
    _, weights = map(Path, paths)
    if autoencoder.hub_sha256 is not None and (digest := file_sha256(weights)) != autoencoder.hub_sha256:
        raise ModelError(
            f"{weights} does not match {repo} at {autoencoder.hub_revision} (sha256 {digest[:16]}, expected"
            f" {autoencoder.hub_sha256[:16]}); delete it and download it again"
        )
    return weights.parent


def _load_diffusers(kind: Any, autoencoder: Autoencoder, folder: Path) -> Any:
    """A float32 model from a folder in diffusers layout. Raises ModelError for a damaged one."""
    try:
        vae = kind.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False).float()
    except Exception as error:  # diffusers and safetensors share no base class for what a damaged file does
        raise ModelError(f"{folder} is not a valid {autoencoder.name} in diffusers layout: {brief(error)}") from error
    channels = LATENT_SPACES[autoencoder.space].channels
    if vae.config.latent_channels != channels:
        raise ModelError(
            f"{folder} has {vae.config.latent_channels} latent channels, {autoencoder.name} has {channels}:"
            " it is a different model"
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
