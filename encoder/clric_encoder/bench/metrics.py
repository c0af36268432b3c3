"""How near a decoded image is to the original: PSNR, SSIM, MS-SSIM, LPIPS, SSIMULACRA2. See vgg.py for DISTS.

Images come in as H x W x 3 uint8. What an image is too small for, or what no weights are there for, is left out and
said. SSIM and MS-SSIM are pytorch-msssim's, which the published figures of learned codecs were measured with, and
which looks at whole windows only, as their authors do; torchmetrics pads the image first, and differs by up to 0.003.
"""

import io
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from clric_decoder.errors import ModelError, one_line
from PIL import Image
from pytorch_msssim import ms_ssim, ssim
from torch import Tensor, nn

# The Gaussian window of SSIM is 11 pixels wide; the last of MS-SSIM's five scales is a sixteenth of the image.
SSIM_SIDE = 11
MS_SSIM_SIDE = 161

# Of a smaller image SSIMULACRA2 lacks the last of its six scales, and weighs the others by weights of other scales.
SSIMULACRA2_SIDE = 225

# VGG16 with LPIPS' heads in one file (clric_encoder/training/features.py): see vgg.py.
VGG_FILE = "vgg16_lpips.npz"

# The smallest side that LPIPS's networks take; of DISTS, VGG16's.
LPIPS_SIDES = {"alex": 63, "vgg": 32, "squeeze": 32}


def compare(
    original: np.ndarray, decoded: np.ndarray, lpips: Mapping[str, "Lpips"], with_ssimulacra2: bool = False
) -> tuple[dict[str, float], list[str]]:
    """All measures of two images of one size by column name, and notes on those that are left out.

    psnr: dB, of RGB, inf for equal images. ssim, ms_ssim: of RGB, up to 1. lpips_NETWORK: 0 for equal images.
    ssimulacra2: 100 for equal images, negative for bad ones.
    """
    side = min(original.shape[:2])
    difference = original.astype(np.float64) - decoded
    mse = np.square(difference).mean()
    measures = {"psnr": 10 * math.log10(255**2 / mse) if mse else math.inf}
    notes = []
    a, b = (torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() for image in (original, decoded))
    with torch.inference_mode():
        if side >= SSIM_SIDE:
            measures["ssim"] = float(ssim(a, b, data_range=255))
        if side >= MS_SSIM_SIDE:
            measures["ms_ssim"] = float(ms_ssim(a, b, data_range=255))
        else:
            notes.append(f"too small for MS-SSIM (sides of {MS_SSIM_SIDE})")
        for network, distance in lpips.items():
            if side >= LPIPS_SIDES[network]:
                measures[f"lpips_{network}"] = float(distance(a / 255, b / 255))
            else:
                notes.append(f"too small for LPIPS {network} (sides of {LPIPS_SIDES[network]})")
    if with_ssimulacra2:
        if side >= SSIMULACRA2_SIDE:
            measures["ssimulacra2"] = ssimulacra2(original, decoded)
        else:
            notes.append(f"too small for SSIMULACRA2 (sides of {SSIMULACRA2_SIDE})")
    return measures, notes


def ssimulacra2(original: np.ndarray, decoded: np.ndarray) -> float:
    """SSIMULACRA2 2.1 by the package ssimulacra2, a port of the original to numpy, in float64.

    Takes about 550 bytes for each pixel.
    """
    from ssimulacra2 import compute_ssimulacra2  # type: ignore[import-untyped]

    # The package takes whatever Pillow opens, files in memory too.
    files = [io.BytesIO(), io.BytesIO()]
    for file, image in zip(files, (original, decoded), strict=True):
        Image.fromarray(image).save(file, "bmp")
        file.seek(0)
    return float(compute_ssimulacra2(*files))


def _alex() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip


def _vgg() -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for convolutions, width in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers[:-1])


class _Fire(nn.Module):
    def __init__(self, inputs: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], 1))


def _squeeze() -> nn.Sequential:
    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    return nn.Sequential(
        nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool(),
        _Fire(64, 16, 64), _Fire(128, 16, 64), pool(),
        _Fire(128, 32, 128), _Fire(256, 32, 128), pool(),
        _Fire(256, 48, 192), _Fire(384, 48, 192), _Fire(384, 64, 256), _Fire(512, 64, 256),
    )  # fmt: skip


# Each network: torchvision's name of it, its convolutional layers in torchvision's numbering, and those layers after
# which features are compared (richzhang/PerceptualSimilarity, lpips/pretrained_networks.py).
_NETWORKS = {
    "alex": ("alexnet", _alex, (1, 4, 7, 9, 11)),
    "vgg": ("vgg16", _vgg, (3, 8, 15, 22, 29)),
    "squeeze": ("squeezenet1_1", _squeeze, (1, 4, 7, 9, 10, 11, 12)),
}


# What torchvision calls each network.
LPIPS_BACKBONES = {network: backbone for network, (backbone, _, _) in _NETWORKS.items()}


class Lpips(nn.Module):
    """LPIPS v0.1 (Zhang et al., "The unreasonable effectiveness of deep features", 2018) of one network.

    Two batches [N, 3, H, W] float32 RGB in [0, 1] -> their mean distance. See `find_lpips` for the files.
    """

    def __init__(self, network: str, backbone: Path, heads: Path) -> None:
        super().__init__()
        _, layers, self._taps = _NETWORKS[network]
        self._layers = layers()
        try:
            state = {
                name.removeprefix("features."): weight.float()
                for name, weight in _read(backbone).items()
                if name.startswith("features.")
            }
            self._layers.load_state_dict(state)
            linear = _read(heads)
            self._heads = [linear[f"lin{i}.model.1.weight"].float() for i in range(len(self._taps))]
        except Exception as error:  # numpy, zipfile and pickle share no base class for a damaged file
            raise ModelError(f"{backbone} and {heads} are not LPIPS {network} weights: {one_line(error)}") from error
        self._shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
        self._scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
        self.requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        distance = a.new_zeros(())
        x, y = ((2 * image - 1 - self._shift) / self._scale for image in (a, b))
        heads = iter(self._heads)
        for index, layer in enumerate(self._layers):
            x, y = layer(x), layer(y)
            if index in self._taps:
                distance = distance + F.conv2d((unit_length(x) - unit_length(y)).square(), next(heads)).mean()
        return distance


def unit_length(features: Tensor) -> Tensor:
    """Features [N, C, h, w] over their length at each position, as LPIPS compares them."""
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".npz":
        with np.load(path) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}
    weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return weights


def find_lpips(folder: Path | None) -> dict[str, tuple[Path, Path]]:
    """The files (network, heads) of every network whose weights lie in a folder.

    The network is torchvision's, as .pth or .npz (alexnet*, vgg16*, squeezenet1_1*); the heads are those of
    richzhang/PerceptualSimilarity, lpips/weights/v0.1/alex.pth, or named lpips_v0.1_alex_heads.pth. The file that
    holds both of VGG16 is vgg.py's and not among them.
    """
    found: dict[str, tuple[Path, Path]] = {}
    if folder is None:
        return found
    for network, name in LPIPS_BACKBONES.items():
        backbones = sorted(
            path for path in folder.glob(f"{name}*") if path.suffix in (".pth", ".npz") and path.name != VGG_FILE
        )
        heads = [folder / f"lpips_v0.1_{network}_heads.pth", folder / f"{network}.pth"]
        heads = [path for path in heads if path.is_file()]
        if backbones and heads:
            found[network] = backbones[0], heads[0]
    return found
