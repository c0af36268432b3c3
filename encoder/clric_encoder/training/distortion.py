"""What training minimises beside the rate: the error of the latent, or that of the image that a decoder paints of it.

Both are squared errors to a target latent, so that one training loop and one quantiser of networks serve both. For
`LatentError` the target is the VAE's latent. For `ImageDistortion` it moves: from time to time the image is decoded,
and the gradient G of the image's loss D by the n values of the latent f gives the target t = f - n G / (2 c):

    D(f + d) = D(f) + G d + c mean(d^2) = c mean((f + d - t)^2) + constant

to second order, c being the curvature. A step on the function costs a fiftieth of a look at the image, and twenty or
more follow on each.

The image's loss is 6 MSE + 0.25 (1 - MS-SSIM) + p (perceptual distance + 0.06 textures) + 2 flatness, p being 0.5, and
1.5 through `lite` (docs/tuning.md has the reasons).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..torch_threads import torch_threads
from .features import PerceptualDistance, Reference

# Weights of the parts of the image's loss, for RGB in [0, 1].
PIXELS_WEIGHT, STRUCTURE_WEIGHT, FLATNESS_WEIGHT = 6.0, 0.25, 2.0

# That of the perceptual distance, by image decoder. Tuning through lite gains so much by measures of pixels that
# features can weigh more.
PERCEPTUAL_WEIGHT, PERCEPTUAL_WEIGHTS = 0.5, {"lite": 1.5}

# Differences of neighbouring pixels, on average over 9 x 9 pixels, below which an area is flat.
FLAT, FLAT_WINDOW = 0.02, 9

# The same, below which features do not count.
FEATURELESS = 0.008

# D's curvature in units of the latent's mean squared error, by image decoder. Of random changes of the latent of
# deviation 0.3 it is 0.8 to 1.3 with lite and 0.2 to 0.6 with small; along G it is larger. Measured for each image, the
# smaller ones let functions overshoot: files grew, and were brought down at the picture's cost. These are by trial.
CURVATURE, CURVATURES = 2.0, {"small": 1.2}

# Pixels that are decoded at once, at most: 512 x 512 and what is around them, for some 0.4 GB.
TILE_PIXELS = 640 * 640

# The side of the corner by which the time of a look is estimated.
CORNER_SIDE = 256

# Tiles of one shape that are decoded together on a GPU, where launches of small kernels take longer than their work.
TILES_ON_GPU = 8

# Where the perceptual distance begins to read the image, in turns: features are of every 2nd to 16th pixel,
# and a raster that never moved would be filled with what it does not see, a mesh in flat areas.
FEATURE_OFFSETS = ((0, 0), (5, 11), (10, 6), (15, 1), (3, 14), (13, 9), (8, 4))

# The least sides that the perceptual distance and a scale of MS-SSIM (a window of 11 pixels) make sense for.
PERCEPTUAL_SIDE, WINDOW = 48, 11

# Wang, Simoncelli and Bovik, "Multi-scale structural similarity for image quality assessment", 2003.
_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


class Distortion(Protocol):
    """targets: (latents, C, h, w), to which the squared error is minimised; owners say which of them each function
    of a batch is for."""

    targets: Tensor
    moves: bool

    def look(self, latents: Tensor, owners: Sequence[int]) -> None:
        """Moves the targets in place, where they move, for the latents (batch, C, h, w) that functions have come to."""


class LatentError:
    """Mean squared error to given latents."""

    moves = False

    def __init__(self, latents: Tensor) -> None:
        self.targets = latents

    def look(self, latents: Tensor, owners: Sequence[int]) -> None:
        """These targets do not move."""


@dataclass(frozen=True)
class ImageDecoder:
    """An image decoder that gradients pass through.

    run: latents [N, C, h, w] float32 -> images [N, 3, 8h, 8w] RGB, not clamped. halo: latents around a tile that its
    pixels depend on; None where all depend on all. number: by which streams name it; 0 for one that they cannot.
    """

    name: str
    space: str
    run: Callable[[Tensor], Tensor]
    halo: int | None
    number: int = 0

    @property
    def curvature(self) -> float:
        """How fast the loss rises along its gradient: what a look's step is divided by."""
        return CURVATURES.get(self.name, CURVATURE)

    @property
    def perceptual_weight(self) -> float:
        """Of the perceptual distance in the loss."""
        return PERCEPTUAL_WEIGHTS.get(self.name, PERCEPTUAL_WEIGHT)


@dataclass(frozen=True)
class _Tile:
    """A part of an image: rows and columns of latents, those with what is around them, and its pixels' references."""

    core: tuple[slice, slice]
    seen: tuple[slice, slice]
    share: float
    pixels: Tensor
    structure: list[tuple[Tensor, ...]]
    flat: list[tuple[int, Tensor, Tensor]]
    flatness: Tensor
    references: dict[int, Reference]  # by index of FEATURE_OFFSETS, computed on first use


class ImageDistortion:
    """The loss of images through an image decoder, as a squared error to latents that move."""

    moves = True

    def __init__(
        self,
        images: Sequence[np.ndarray],
        latents: Tensor,
        decoder: ImageDecoder,
        perceptual: PerceptualDistance | None,
    ) -> None:
        """images: (H, W, 3) uint8 each, of latents (batch, C, h, w)."""
        self.targets = latents.clone()
        self.losses = latents.new_zeros(len(latents))
        self._decoder, self._perceptual = decoder, perceptual
        self._threads = torch.get_num_threads()
        self._looks = 0
        self._together = TILES_ON_GPU if latents.is_cuda else 1
        with torch.no_grad():
            self._tiles = [self._tiles_of(image, latent) for image, latent in zip(images, latents, strict=True)]
            first = self._tiles[0][0]
            self._part = first, latents[(slice(1), slice(None), *first.seen)]
            # Of an image that is one tile a corner says enough, but not of decoders whose layers see all of it, nor of
            # GPUs, where launches take longer than work
            if len(self._tiles[0]) == 1 and decoder.halo is not None and not latents.is_cuda:
                corner = latents[:1, :, : CORNER_SIDE // 8, : CORNER_SIDE // 8]
                self._part = self._tiles_of(images[0][:CORNER_SIDE, :CORNER_SIDE], corner[0])[0], corner

    def pick(self, indices: Sequence[int]) -> ImageDistortion:
        """Those of some of the images."""
        picked = copy.copy(self)
        picked.targets, picked.losses = self.targets[list(indices)], self.losses[list(indices)]
        picked._tiles = [self._tiles[i] for i in indices]
        return picked

    def look(self, latents: Tensor, owners: Sequence[int]) -> None:
        """Decodes the latents, and moves the targets against the gradients of the images' losses; sets `losses`."""
        with torch_threads(self._threads):  # the training loop keeps torch to one
            shapes = [[tile.pixels.shape for tile in self._tiles[owner]] for owner in owners]
            for numbers in _side_by_side(shapes, self._together):
                own_latents, own_owners = latents[numbers], [owners[i] for i in numbers]
                gradients, losses = torch.zeros_like(own_latents), own_latents.new_zeros(len(numbers))
                for tiles in zip(*(self._tiles[owner] for owner in own_owners), strict=True):
                    seen = (slice(None), slice(None), *tiles[0].seen)
                    part = own_latents[seen].detach().requires_grad_(True)
                    values = self._loss(tiles, part) * tiles[0].share
                    gradients[seen] += torch.autograd.grad(values.sum(), part)[0]
                    losses += values.detach()
                self.losses[own_owners] = losses
                self.targets[own_owners] = own_latents - gradients * (
                    latents[0].numel() / (2 * self._decoder.curvature)
                )
        self._looks += 1

    def seconds(self) -> float:
        """What a look at all images takes on this machine, about: by a part, decoded forward and twice that back."""
        tile, latent = self._part
        took = math.inf
        with torch.no_grad():
            for _ in range(1 if self._decoder.halo is None else 2):  # the first time includes what is done once
                begin = _now(latent.device)
                self._loss([tile], latent)
                took = min(took, _now(latent.device) - begin)  # others may hold one of them up
        pixels = sum(tile.pixels.numel() for tiles in self._tiles for tile in tiles)
        return 3 * took * pixels / tile.pixels.numel()

    def _decode(self, tile: _Tile, latents: Tensor) -> Tensor:
        image = self._decoder.run(latents)
        top, left = (8 * (core.start - seen.start) for core, seen in zip(tile.core, tile.seen, strict=True))
        height, width = tile.pixels.shape[2:]
        return image[..., top : top + height, left : left + width].float()

    def _loss(self, tiles: Sequence[_Tile], latents: Tensor) -> Tensor:
        """[N], of latents [N, C, h, w] of the same tile of several images."""
        image = self._decode(tiles[0], latents)
        pixels, featureless = _cat([(tile.pixels, tile.flatness) for tile in tiles])
        loss = PIXELS_WEIGHT * (image - pixels).square().mean((1, 2, 3))
        if tiles[0].structure:
            scales = [_cat(own) for own in zip(*(tile.structure for tile in tiles), strict=True)]
            loss = loss + STRUCTURE_WEIGHT * (1 - ms_ssim(image, scales))
        areas = [
            (own[0][0], *_cat([area[1:] for area in own])) for own in zip(*(tile.flat for tile in tiles), strict=True)
        ]
        loss = loss + FLATNESS_WEIGHT * flatness_loss(image, areas)
        if self._perceptual is not None and min(pixels.shape[2:]) >= PERCEPTUAL_SIDE:
            number = self._looks % len(FEATURE_OFFSETS)
            top, left = FEATURE_OFFSETS[number]
            shown = torch.lerp(image, pixels, featureless)
            for tile in tiles:
                if number not in tile.references:
                    with torch.no_grad():
                        tile.references[number] = self._perceptual.reference(tile.pixels[..., top:, left:])
            reference = [_cat(own) for own in zip(*(tile.references[number] for tile in tiles), strict=True)]
            distance = self._perceptual.distance(shown[..., top:, left:], reference)
            loss = loss + self._decoder.perceptual_weight * distance
        return loss

    def _tiles_of(self, image: np.ndarray, latent: Tensor) -> list[_Tile]:
        height, width, _ = image.shape
        rows, columns = latent.shape[1:]
        halo = self._decoder.halo
        if halo is None:
            counts = (1, 1)
        else:
            side = math.isqrt(TILE_PIXELS) // 8 - 2 * halo
            counts = (-(-rows // side), -(-columns // side)) if 64 * rows * columns > TILE_PIXELS else (1, 1)
        tiles = []
        for top, bottom in _spans(rows, counts[0]):
            for left, right in _spans(columns, counts[1]):
                around = halo or 0
                seen = (
                    slice(max(0, top - around), min(rows, bottom + around)),
                    slice(max(0, left - around), min(columns, right + around)),
                )
                cut = image[8 * top : min(8 * bottom, height), 8 * left : min(8 * right, width)]
                pixels = torch.from_numpy(np.array(cut)).to(latent.device).permute(2, 0, 1)[None] / 255
                share = cut.size / image.size
                core = (slice(top, bottom), slice(left, right))
                flat = flat_areas(pixels)
                tiles.append(_Tile(core, seen, share, pixels, structure(pixels), flat, flatness(pixels), {}))
        return tiles


def _now(device: torch.device) -> float:
    """Seconds, when a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def _side_by_side(shapes: Sequence[list[torch.Size]], most: int) -> list[list[int]]:
    """Numbers of those that have the same shapes, at most so many together."""
    groups: dict[tuple[torch.Size, ...], list[int]] = {}
    for number, own in enumerate(shapes):
        groups.setdefault(tuple(own), []).append(number)
    return [group[i : i + most] for group in groups.values() for i in range(0, len(group), most)]


def _cat(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Tensors of several images as those of a batch."""
    return parts[0] if len(parts) == 1 else tuple(torch.cat(own) for own in zip(*parts, strict=True))


def _spans(length: int, count: int) -> list[tuple[int, int]]:
    return [(length * i // count, length * (i + 1) // count) for i in range(count)]


def structure(image: Tensor, scales: int = len(_SCALE_WEIGHTS)) -> list[tuple[Tensor, ...]]:
    """What MS-SSIM needs of the original [N, 3, H, W]: for each scale the image, its local means and variances.

    scales: at most; an image with sides below 176 pixels has fewer than five, one below 11 none.
    """
    result: list[tuple[Tensor, ...]] = []
    while len(result) < scales and min(image.shape[2:]) >= WINDOW:
        mean = _blur(image)
        result.append((image, mean, _blur(image * image) - mean * mean))
        image = F.avg_pool2d(image, 2)
    return result


def ms_ssim(image: Tensor, original: list[tuple[Tensor, ...]]) -> Tensor:
    """Multi-scale structural similarity of images [N, 3, H, W] in [0, 1] to originals (`structure`), on RGB: [N].

    With all five scales it is the published measure but for its windows, of which every fourth is looked at; fewer
    scales have their weights normalised.
    """
    weights = torch.tensor(_SCALE_WEIGHTS[: len(original)]).to(image)
    result = image.new_ones(image.shape[:2])
    for scale, (weight, (reference, mean_b, variance_b)) in enumerate(
        zip(weights / weights.sum(), original, strict=True)
    ):
        blurred = _blur(torch.cat([image, image * image, image * reference]))
        mean_a, square_a, product = blurred.chunk(3)
        variance_a, covariance = square_a - mean_a * mean_a, product - mean_a * mean_b
        similarity = (2 * covariance + 0.03**2) / (variance_a + variance_b + 0.03**2)
        if scale == len(original) - 1:
            similarity = similarity * (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
        # Anticorrelated patches have no real power: they count as nothing in common
        result = result * similarity.mean((2, 3)).clamp(min=1e-4) ** weight
        if scale + 1 < len(original):
            image = F.avg_pool2d(image, 2)
    return result.mean(1)


def flat_areas(image: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """What `flatness_loss` needs of the original [N, 3, H, W]: axis, differences, and how flat it is, in [0, 1]."""
    result = []
    for axis in (2, 3):
        if image.shape[axis] > 1:
            differences = image.diff(dim=axis)
            activity = F.avg_pool2d(differences.abs().mean(1, keepdim=True), FLAT_WINDOW, 1, FLAT_WINDOW // 2)
            result.append((axis, differences, torch.exp(-((activity / FLAT) ** 2))))
    return result


def flatness(image: Tensor) -> Tensor:
    """How flat an image [N, 3, H, W] is at each pixel, [N, 1, H, W] in [0, 1]."""
    activity = image.new_zeros(len(image), 1, *image.shape[2:])
    for axis in (2, 3):
        change = image.diff(dim=axis).abs().mean(1, keepdim=True)
        padding = (0, 0, 0, 1) if axis == 2 else (0, 1)
        activity = activity + F.avg_pool2d(F.pad(change, padding), FLAT_WINDOW, 1, FLAT_WINDOW // 2) / 2
    return torch.exp(-((activity / FEATURELESS) ** 2))


def flatness_loss(image: Tensor, original: list[tuple[int, Tensor, Tensor]]) -> Tensor:
    """Mean error of neighbouring pixels' differences where the original (`flat_areas`) is flat, [N].

    A mesh of a few grey levels in a flat area is below what MS-SSIM's constants and LPIPS notice; eyes do.
    """
    loss = image.new_zeros(len(image))
    for axis, differences, flat in original:
        loss = loss + ((image.diff(dim=axis) - differences).abs() * flat).mean((1, 2, 3))
    return loss


def _blur(image: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, ceil((H - 10) / 2), ceil((W - 10) / 2)]: a Gaussian window of 11 pixels of deviation 1.5.

    At every second pixel of each axis: neighbouring windows say the same, and cost four times as much.
    """
    window = torch.exp(-((torch.arange(WINDOW, device=image.device) - WINDOW // 2) ** 2) / (2 * 1.5**2))
    channels = image.shape[0] * image.shape[1]
    window = (window / window.sum()).to(image).expand(channels, 1, 1, -1)
    flat = image.reshape(1, channels, *image.shape[2:])
    flat = F.conv2d(flat, window.transpose(2, 3), stride=(2, 1), groups=channels)
    flat = F.conv2d(flat, window, stride=(1, 2), groups=channels)
    return flat.view(*image.shape[:2], *flat.shape[2:])
