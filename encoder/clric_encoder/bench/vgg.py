"""Measures by features of VGG16: LPIPS-VGG, DISTS, and those of FD-VGG16, for where Inception's weights are not there.

Images come in as H x W x 3 uint8. A large one goes through the network in tiles, each with so much of the image around
it that its features are those of the whole image. The weights are those of ``vgg16_lpips.npz``
(training/features.py), and DISTS' own come with the package dists-pytorch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from clric_decoder.errors import ModelError, one_line
from torch import Tensor

from ..training.features import LpipsVgg
from .fid import FID_PATCH
from .metrics import unit_length

# Features of the deepest layer see 105 pixels to each side, DISTS' wider pooling included. The multiple of 16 above
# keeps each tile's pooling in step with the whole image's.
_HALO = 112

# The side of a tile without its halo: a multiple of 16, and of FID_PATCH, so that no patch is cut. Such a
# tile takes 1.2 GB, an image of Kodak's size, which is one tile, 0.75 GB.
_TILE = 768

# VGG16's convolutions before which the size is halved, and those whose results are compared (as LpipsVgg's).
_POOLS, _TAPS = (2, 4, 7, 10), (1, 3, 6, 9, 12)

# Of RGB in [0, 1], before the first convolution.
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_DISTS_CHANNELS = (3, 64, 128, 256, 512, 512)
_DISTS_SMALL = 1e-6  # c1 and c2 of DISTS


@dataclass(frozen=True)
class VggMeasures:
    """Of two images. values: by column. patches, original_patches: (count, 512) float32 of the decoded image's and the
    original's whole patches (`FID_PATCH`), in the same order."""

    values: dict[str, float]
    patches: np.ndarray
    original_patches: np.ndarray


@dataclass(frozen=True)
class _Layer:
    """Features [C, h, w] of a tile at 1/stride of its size. lpips, dists: which layer of each measure this is."""

    lpips: int | None
    dists: int | None
    stride: int
    values: Tensor


class VggJudge:
    """Compares images by the features of VGG16. Keeps those of the last original, if that is one tile."""

    def __init__(self, network: Path, dists: Path | None) -> None:
        """network: vgg16_lpips.npz. dists: weights.pt of dists-pytorch, needed for DISTS. Raises ModelError."""
        vgg = LpipsVgg(network)
        self._convolutions = list(vgg.layers)
        self._heads = list(vgg.heads)
        self._dists = None if dists is None else _read_dists(dists)
        self._original: np.ndarray | None = None
        self._kept: list[_Layer] | None = None

    def compare(self, original: np.ndarray, decoded: np.ndarray) -> VggMeasures:
        """The measures of two images of one size, sides of at least 32.

        lpips_vgg, dists: 0 for equal images. DISTS is taken at the images' own size, not reduced to 256 pixels. A
        patch's features are the means of relu5_3 over it, computed with what is around the patch in the image.
        """
        lpips, moments = _Lpips(self._heads), _Moments()
        patches: list[tuple[Tensor, Tensor]] = []
        with torch.inference_mode():
            for tile in _tiles(*original.shape[:2]):
                # Layer by layer, so that no more than one of each image is alive at a time.
                for x, y in zip(self._of_original(tile, original), self._layers(tile, decoded), strict=True):
                    if x.lpips is not None:
                        lpips.add(x.lpips, x.values, y.values)
                    if x.lpips == len(_TAPS) - 1:
                        patches.append((_patch_means(x.values), _patch_means(y.values)))
                    if x.dists is not None:
                        moments.add(x.dists, x.values, y.values)
        values = {"lpips_vgg": lpips.distance()}
        if self._dists:
            values["dists"] = moments.dists(*self._dists)
        originals, decodeds = (torch.cat(features).numpy() for features in zip(*patches, strict=True))
        return VggMeasures(values, decodeds, originals)

    def _of_original(self, tile: "_Tile", original: np.ndarray) -> Iterator[_Layer]:
        if original is not self._original:
            self._original = original
            self._kept = list(self._layers(tile, original)) if tile.is_whole_image else None
        return iter(self._kept) if self._kept else self._layers(tile, original)

    def _layers(self, tile: "_Tile", image: np.ndarray) -> Iterator[_Layer]:
        pixels = torch.from_numpy(image[tile.seen].copy()).permute(2, 0, 1)[None].float() / 255
        mean, deviation = (torch.tensor(values)[:, None, None] for values in (_MEAN, _DEVIATION))
        x = ((pixels - mean) / deviation).to(memory_format=torch.channels_last)
        for convolution in self._convolutions[:2]:
            x = convolution(x).relu_()
        if self._dists:
            yield _Layer(None, 0, 1, tile.crop(pixels, 1))  # DISTS compares the image itself too
        yield _Layer(0, 1 if self._dists else None, 1, tile.crop(x, 1))
        # Both measures have the first two convolutions in common. LPIPS goes on from maxima, DISTS from root mean
        # squares.
        largest, root = F.max_pool2d(x, 2), _l2_pool(x) if self._dists else None
        del x
        for tap, values in self._deeper(largest, lambda x: F.max_pool2d(x, 2)):
            yield _Layer(tap, None, 1 << tap, tile.crop(values, 1 << tap))
        del largest
        if root is not None:
            for tap, values in self._deeper(root, _l2_pool):
                yield _Layer(None, tap + 1, 1 << tap, tile.crop(values, 1 << tap))

    def _deeper(self, x: Tensor, pool: Callable[[Tensor], Tensor]) -> Iterator[tuple[int, Tensor]]:
        """(which of the compared layers, its values) from the third convolution on, for its input."""
        for number in range(2, len(self._convolutions)):
            if number in _POOLS[1:]:
                x = pool(x)
            x = self._convolutions[number](x).relu_()
            if number in _TAPS:
                yield _TAPS.index(number), x


@dataclass(frozen=True)
class _Tile:
    """Rows and columns of an image: those whose features count, and with what is around them. size: the image's."""

    core: tuple[slice, slice]
    seen: tuple[slice, slice]
    size: tuple[int, int]

    @property
    def is_whole_image(self) -> bool:
        return all(core.start == 0 and core.stop == end for core, end in zip(self.core, self.size, strict=True))

    def crop(self, features: Tensor, stride: int) -> Tensor:
        """[1, C, h, w] of what is seen, at 1/stride of its size -> [C, h, w] of the core."""
        rows, columns = (
            # At the image's edge to the last value: LPIPS rounds an odd size down as it halves it, DISTS up.
            slice((core.start - seen.start) // stride, None if core.stop == end else (core.stop - seen.start) // stride)
            for core, seen, end in zip(self.core, self.seen, self.size, strict=True)
        )
        return features[0, :, rows, columns]


def _tiles(height: int, width: int) -> Iterator[_Tile]:
    def spans(end: int) -> list[tuple[slice, slice]]:
        """(core, seen) along a side of the image."""
        return [
            (slice(start, min(end, start + _TILE)), slice(max(0, start - _HALO), min(end, start + _TILE + _HALO)))
            for start in range(0, end, _TILE)
        ]

    for rows, seen_rows in spans(height):
        for columns, seen_columns in spans(width):
            yield _Tile((rows, columns), (seen_rows, seen_columns), (height, width))


class _Lpips:
    """LPIPS of an image from its tiles: each layer's distance is a mean over positions, and the layers' are added."""

    def __init__(self, heads: list[Tensor]) -> None:
        self._heads = heads
        self._sums = [0.0] * len(heads)
        self._counts = [0] * len(heads)

    def add(self, layer: int, x: Tensor, y: Tensor) -> None:
        difference = (unit_length(x[None]) - unit_length(y[None])).square_()[0]
        by_channel = difference.sum((1, 2), dtype=torch.float64)
        self._sums[layer] += float((by_channel * self._heads[layer]).sum())
        self._counts[layer] += x[0].numel()

    def distance(self) -> float:
        return sum(total / count for total, count in zip(self._sums, self._counts, strict=True))


class _Moments:
    """DISTS (Ding, Ma, Wang and Simoncelli, "Image quality assessment: unifying structure and texture similarity",
    2020) of an image from its tiles, which add up the moments of each layer's channels."""

    def __init__(self) -> None:
        self._counts = [0] * len(_DISTS_CHANNELS)
        self._sums = [torch.zeros(5, channels, dtype=torch.float64) for channels in _DISTS_CHANNELS]

    def add(self, layer: int, x: Tensor, y: Tensor) -> None:
        self._counts[layer] += x[0].numel()
        for number, (a, b) in enumerate(((x, None), (y, None), (x, x), (y, y), (x, y))):
            values = a if b is None else a * b
            self._sums[layer][number] += values.sum((1, 2), dtype=torch.float64)

    def dists(self, alpha: list[Tensor], beta: list[Tensor]) -> float:
        similarity = 0.0
        for count, sums, of_means, of_variances in zip(self._counts, self._sums, alpha, beta, strict=True):
            x, y, xx, yy, xy = sums / count
            texture = (2 * x * y + _DISTS_SMALL) / (x * x + y * y + _DISTS_SMALL)
            structure = (2 * (xy - x * y) + _DISTS_SMALL) / ((xx - x * x) + (yy - y * y) + _DISTS_SMALL)
            similarity += float((of_means * texture + of_variances * structure).sum())
        return 1 - similarity


def _l2_pool(x: Tensor) -> Tensor:
    """[N, C, h, w] -> [N, C, ceil(h / 2), ceil(w / 2)]: root of the squares, blurred by a Hann window of 3 x 3."""
    window = torch.tensor([0.25, 0.5, 0.25])
    kernel = (window[:, None] * window).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(x.square(), kernel, stride=2, padding=1, groups=x.shape[1]).add_(1e-12).sqrt_()


def _patch_means(features: Tensor) -> Tensor:
    """relu5_3 of a tile [512, h, w] -> [patches, 512], one for each whole patch."""
    side = FID_PATCH // 16
    if min(features.shape[1:]) < side:
        return features.new_zeros(0, len(features))
    return F.avg_pool2d(features[None], side)[0].flatten(1).T


def _read_dists(path: Path) -> tuple[list[Tensor], list[Tensor]]:
    """alpha (of means) and beta (of variances) by layer, scaled so that all of them together have the sum 1."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        alpha, beta = (weights[name].double().flatten() for name in ("alpha", "beta"))
        total = alpha.sum() + beta.sum()
        by_layer = [list((part / total).split(_DISTS_CHANNELS)) for part in (alpha, beta)]
    except Exception as error:  # pickle, KeyError and torch share no base class for a damaged file
        raise ModelError(f"{path} does not contain DISTS weights: {one_line(error)}") from error
    return by_layer[0], by_layer[1]


def find_dists() -> Path | None:
    """weights.pt of the package dists-pytorch, which itself is not imported: it would import torchvision."""
    spec = find_spec("DISTS_pytorch")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / "weights.pt").is_file():
            return Path(folder) / "weights.pt"
    return None
