"""All grids of a function in one plane, so that one operation serves them all.

The planes of all levels and channels lie below each other, the finest level first, each under rows of zeros and
between columns of zeros as wide as the ARM's neighbourhood reaches. A neighbour is then the same distance away
wherever it is in the flattened array, and values outside of a grid are zeros as the specification wants them.

    0 0 0 0 0 0 0      one row of zeros for each row that the ARM looks back
    0 0 0 a a a a      a plane of level 0, full width
    0 0 0 a a a a
    0 0 0 0 0 0 0
    0 0 0 b b 0 0      a plane of level 1; the columns at the right are nobody's
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from clric_decoder.bitstream import Architecture, grid_shapes
from clric_decoder.context import NEIGHBOURS, REACH


class GridLayout:
    """The places of the grids of an architecture for latents of one size, on one device.

    shapes: (channels, height, width) of each level. rows, stride: the array's size. mask: (rows, stride) float32, one
    where a grid value is. planes: first row, height and width of each plane, over all levels. plane_numbers: (rows,)
    which of them a row belongs to.
    lead: zeros that stand before the flattened array where neighbours are looked up.
    offsets: (neighbours, 2) int64 array, how far down and right of a value each neighbour stands.
    neighbours: how far on each is in the flattened array.
    places: (planes, 2) int64 array, the level and the first row of each plane. sizes: (levels, 2) int64 array.
    ends: (levels,) int64 array, where the planes of each level would end if one of each lay behind each other.
    doublings: for each level but the last, the `Doubling` that leads to it along rows and along columns.
    """

    def __init__(self, architecture: Architecture, height: int, width: int, device: torch.device) -> None:
        self.shapes = grid_shapes(architecture.channels, height, width)
        self.stride = width + REACH
        self.tops: list[int] = []
        rows = 0
        for channels, level_height, _ in self.shapes:
            self.tops.append(rows)
            rows += channels * (REACH + level_height)
        self.rows = rows
        self.lead = REACH * self.stride + REACH
        self.offsets = np.array(NEIGHBOURS[: architecture.neighbours], np.int64).reshape(-1, 2)
        self.neighbours = [dy * self.stride + dx for dy, dx in self.offsets.tolist()]
        mask = torch.zeros(1, rows, self.stride, device=device)
        for grid in self.split(mask):
            grid.fill_(1)
        self.mask = mask[0]
        heights = [REACH + level_height for channels, level_height, _ in self.shapes for _ in range(channels)]
        planes = torch.arange(len(heights)).repeat_interleave(torch.tensor(heights, dtype=torch.int64))
        self.plane_numbers = planes.to(device)
        self.sizes = np.array([size for _, *size in self.shapes], np.int64)
        self.ends = np.cumsum(self.sizes.prod(1))
        tops = zip(self.tops, self.shapes, strict=True)
        self.places = np.array(
            [
                (level, top + number * (REACH + height) + REACH)
                for level, (top, (channels, height, _)) in enumerate(tops)
                for number in range(channels)
            ],
            np.int64,
        ).reshape(-1, 2)
        self.planes = tuple((top, *self.shapes[level][1:]) for level, top in self.places.tolist())
        self.doublings = [
            tuple(Doubling(coarse, fine, device) for coarse, fine in zip(coarser[1:], finer[1:], strict=True))
            for finer, coarser in pairwise(self.shapes)
        ]

    def split(self, packed: torch.Tensor) -> list[torch.Tensor]:
        """(batch, rows, stride) -> views (batch, channels, height, width), the finest level first."""
        grids = []
        for top, (channels, height, width) in zip(self.tops, self.shapes, strict=True):
            block = packed[:, top : top + channels * (REACH + height)]
            block = block.view(len(packed), channels, REACH + height, self.stride)
            grids.append(block[:, :, REACH:, REACH : REACH + width])
        return grids


class Doubling:
    """Upsampling by 2 of lines of one length as a product with a small matrix.

    Even outputs weigh the inputs from two before to one after theirs with taps 0 to 3, odd ones from two after to one
    before; beyond the ends the outermost inputs go on (specification, "Upsampling"). Long lines are cut into blocks
    that overlap, so that the matrix stays small.

    basis: (4, outputs, inputs) what each tap adds to the matrix.
    """

    BLOCK, HALO = 64, 2

    def __init__(self, coarse: int, fine: int, device: torch.device) -> None:
        self.coarse, self.fine = coarse, fine
        self.blocks = 1 if coarse <= self.BLOCK else -(-coarse // self.BLOCK)
        self.margins = (0, 0) if self.blocks == 1 else (self.HALO, self.HALO + self.blocks * self.BLOCK - coarse)
        outputs = torch.arange(fine if self.blocks == 1 else 2 * self.BLOCK)
        inputs = coarse if self.blocks == 1 else self.BLOCK + 2 * self.HALO
        basis = torch.zeros(4, len(outputs), inputs)
        for tap in range(4):
            offsets = torch.where(outputs % 2 == 0, tap - 2, 2 - tap)
            basis[tap, outputs, (outputs // 2 + self.margins[0] + offsets).clamp(0, inputs - 1)] += 1
        self.basis = basis.to(device)

    def cut(self, lines: torch.Tensor) -> torch.Tensor:
        """(batch, lines, coarse) -> (batch, lines * blocks, inputs)."""
        if self.blocks == 1:
            return lines
        size = self.BLOCK + 2 * self.HALO
        return F.pad(lines, self.margins, mode="replicate").unfold(2, size, self.BLOCK).flatten(1, 2)

    def glue(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of `cut`: (batch, lines * blocks, inputs) -> (batch, lines, coarse)."""
        if self.blocks == 1:
            return gradient
        blocks = gradient.unflatten(1, (-1, self.blocks))
        batch, lines = blocks.shape[:2]
        padded = gradient.new_zeros(batch, lines, self.blocks + 1, self.BLOCK)
        padded[:, :, :-1] = blocks[..., : self.BLOCK]
        padded[:, :, 1:, : 2 * self.HALO] += blocks[..., self.BLOCK :]
        padded = padded.flatten(2)[..., : self.coarse + sum(self.margins)]
        inner = padded[..., self.margins[0] : self.margins[0] + self.coarse].clone()
        inner[..., 0] += padded[..., : self.margins[0]].sum(2)
        inner[..., -1] += padded[..., self.margins[0] + self.coarse :].sum(2)
        return inner
