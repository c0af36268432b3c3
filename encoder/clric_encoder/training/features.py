"""Perceptual features of an image: a small network, distilled from LPIPS-VGG, whose distance is a part of the loss.

LPIPS (Zhang et al., 2018) compares the features of a large classification network. It is a good judge and costs 300,000
multiply-accumulates per pixel. `FeatureNetwork` costs 4,800 and was trained to have the same value and, since it is
descended on, the same gradient (clric_export/feature_distillation.py). `LpipsVgg` is the original, for its training and
for who has the weights. `Textured` adds to the student's distance how much rougher or smoother textures are: where a
network cannot tell what a texture is, the distance alone makes it smooth.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from clric_decoder.errors import ModelError, brief
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent.parent / "weights" / "features.safetensors"

# Kernel, stride and outputs of the student's convolutions; the features that each gives are compared.
_LAYERS = ((6, 2, 32), (3, 2, 64), (3, 2, 96), (3, 1, 80), (3, 2, 112), (3, 1, 128))

# VGG16's convolutions before which the size is halved, and those whose results LPIPS compares.
_VGG_POOLS, _VGG_TAPS = (2, 4, 7, 10), (1, 3, 6, 9, 12)

# Keeps the length of features that are all zero, and its gradient, finite.
_SMALL = 1e-10

# Of an original: for each layer that is compared, its features of unit length times the weights of their channels,
# [N, C, h, w] in the type that the layer computes in, and the sum of their squares by these weights, [N, h, w]; and
# what else a distance needs.
Reference = list[tuple[Tensor, ...]]

# The weight of textures; the layers whose deviations are compared, and the side of the windows in which they are taken
# (the others change little, and cost ten times as much); and what is added to variances: a share of an image's mean,
# and what keeps roots and quotients of nothing finite.
_TEXTURE_WEIGHT, _TEXTURE_LAYERS, _SIDE, _FLOOR, _TINY = 0.06, (3, 4, 5), 4, 0.1, 1e-6


class PerceptualDistance(Protocol):
    """A distance of images from an original, of which all that does not change is computed once.

    Images are [N, 3, H, W] RGB in [0, 1], sides of at least 32.
    """

    def reference(self, original: Tensor) -> Reference:
        """What `distance` needs of the original."""

    def distance(self, image: Tensor, reference: Reference) -> Tensor:
        """[N], 0 for the original."""


class _Lpips(nn.Module):
    """LPIPS' distance: of features of unit length at each position, squared and weighted by channel."""

    def features(self, image: Tensor) -> list[Tensor]:
        """[N, C, h, w] for each layer that is compared, channels last in memory."""
        raise NotImplementedError

    def weights(self) -> list[Tensor]:
        """Of the channels of each."""
        raise NotImplementedError

    def reference(self, original: Tensor) -> Reference:
        return self.reference_of(self.features(original))

    def distance(self, image: Tensor, reference: Reference) -> Tensor:
        return self.compare(self.features(image), reference)

    def reference_of(self, features: list[Tensor]) -> Reference:
        """`reference` of an original with these features."""
        result: Reference = []
        for x, weights in zip(features, self.weights(), strict=True):
            dtype, x = x.dtype, x.float()
            unit = x * (x.square().sum(1, keepdim=True) + _SMALL).rsqrt()
            weighted = unit * weights[:, None, None]
            result.append((weighted.to(dtype), (weighted * unit).sum(1)))
        return result

    def compare(self, features: list[Tensor], reference: Reference) -> Tensor:
        """`distance` of an image with these features."""
        result = features[0].new_zeros(len(features[0]), dtype=torch.float32)
        for x, weights, (original, constant, *_) in zip(features, self.weights(), reference, strict=True):
            # The squared difference multiplied out: a third of the time, as most of it is that of memory
            x = x.float()
            sums = x.square().movedim(1, 3) @ torch.stack([torch.ones_like(weights), weights], 1)
            length, weighted = sums.unbind(3)
            scale = (length + _SMALL).rsqrt()
            product = (x * original).sum(1)
            result = result + (scale * (scale * weighted - 2 * product) + constant).mean((1, 2))
        return result


class FeatureNetwork(_Lpips):
    """Six convolutions, 4,800 MAC/pixel, all compared."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, inputs = nn.ModuleList(), 3
        for kernel, stride, outputs in _LAYERS:
            self.layers.append(nn.Conv2d(inputs, outputs, kernel, stride, padding=(kernel - 1) // 2))
            inputs = outputs
        self.heads = nn.ParameterList([torch.full((outputs,), 0.3) for _, _, outputs in _LAYERS])
        self._dtype = torch.float32

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Of the convolutions; the heads stay as they are."""
        self.layers.to(dtype)
        self._dtype = dtype

    def features(self, image: Tensor) -> list[Tensor]:
        # The first convolution, of 6 x 6 with stride 2, is one of 3 x 3 over blocks of 2 x 2 pixels: half of the time
        height, width = image.shape[2:]
        blocks = F.pixel_unshuffle((image[..., : height // 2 * 2, : width // 2 * 2] - 0.45) * 4, 2)
        x = blocks.to(dtype=self._dtype, memory_format=torch.channels_last)
        first, *others = self.layers
        assert isinstance(first, nn.Conv2d)
        kernel = F.pixel_unshuffle(first.weight, 2).contiguous(memory_format=torch.channels_last)
        result = [F.silu(F.conv2d(x, kernel, first.bias, padding=1))]
        for layer in others:
            result.append(F.silu(layer(result[-1])))
        return result

    def weights(self) -> list[Tensor]:
        return [head.square() for head in self.heads]


class Textured:
    """A feature network's distance, and how much the deviations of its features differ within windows.

    The difference of two deviations a and b is (a - b)^2 / (a^2 + b^2 + c), one minus what SSIM has of contrasts (Wang
    et al., 2004): in [0, 1], c keeping it small where the original has nearly none.
    """

    def __init__(self, network: FeatureNetwork) -> None:
        self._network = network

    def reference(self, original: Tensor) -> Reference:
        features = self._network.features(original)
        result = self._network.reference_of(features)
        for layer in _TEXTURE_LAYERS:
            variance = _variance(features[layer])
            floor = _FLOOR * variance.mean((2, 3), keepdim=True) + _TINY
            result[layer] = (*result[layer], variance.sqrt(), variance + floor)
        return result

    def distance(self, image: Tensor, reference: Reference) -> Tensor:
        features = self._network.features(image)
        result = self._network.compare(features, reference)
        for layer in _TEXTURE_LAYERS:
            *_, deviation, constant = reference[layer]
            variance = _variance(features[layer])
            difference = (variance.sqrt() - deviation).square() / (variance + constant)
            result = result + _TEXTURE_WEIGHT * difference.mean((1, 2, 3))
        return result


def _variance(x: Tensor) -> Tensor:
    """Of features [N, C, h, w] in windows of `_SIDE`, smaller where h or w is, at every half of a window.

    [N, C, rows, columns], above 0.
    """
    x = x.float()
    half = [min(_SIDE // 2, max(1, length // 2)) for length in x.shape[2:]]
    # By halves of windows, of which each is a part of four
    mean, square = (F.avg_pool2d(F.avg_pool2d(values, half), 2, 1) for values in (x, x.square()))
    return (square - mean.square()).clamp_min(0) + _TINY


class LpipsVgg(_Lpips):
    """LPIPS v0.1 of VGG16, from the .npz file that holds both halves (conv0 to conv12, lin0 to lin4)."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        """dtype: of the convolutions; bfloat16 takes half of the time where the processor has it."""
        super().__init__()
        try:
            with np.load(path) as file:
                weights = {name: torch.from_numpy(file[name].astype(np.float32)) for name in file.files}
            self.layers = nn.ModuleList()
            for number in range(13):
                weight, bias = weights[f"conv{number}.weight"], weights[f"conv{number}.bias"]
                layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
                layer.load_state_dict({"weight": weight, "bias": bias})
                self.layers.append(layer)
            self.heads = nn.ParameterList([weights[f"lin{i}.weight"].flatten() for i in range(len(_VGG_TAPS))])
        except Exception as error:  # numpy, zipfile and torch share no base class for a damaged file
            raise ModelError(f"{path} does not contain LPIPS-VGG weights: {brief(error)}") from error
        self.requires_grad_(False)
        self._dtype = dtype
        self.layers.to(dtype)

    def features(self, image: Tensor) -> list[Tensor]:
        shift = torch.tensor([-0.030, -0.088, -0.188], device=image.device)[:, None, None]
        scale = torch.tensor([0.458, 0.448, 0.450], device=image.device)[:, None, None]
        x = ((2 * image - 1 - shift) / scale).to(dtype=self._dtype, memory_format=torch.channels_last)
        result = []
        for number, layer in enumerate(self.layers):
            if number in _VGG_POOLS:
                x = F.max_pool2d(x, 2)
            x = F.relu(layer(x))
            if number in _VGG_TAPS:
                result.append(x)
        return result

    def weights(self) -> list[Tensor]:
        return list(self.heads)


def load_features(path: Path = WEIGHTS) -> FeatureNetwork:
    """The network that comes with the package, with frozen weights. Raises ModelError for a damaged file."""
    network = FeatureNetwork()
    try:
        state = {name: tensor.float() for name, tensor in safetensors.torch.load_file(path).items()}
        network.load_state_dict(state)
    except Exception as error:  # safetensors, OSError and torch share no base class for a damaged file
        raise ModelError(f"{path} does not contain the feature network: {brief(error)}") from error
    return network.requires_grad_(False)
