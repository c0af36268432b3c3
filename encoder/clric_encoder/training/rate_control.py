"""Rate control: lambda moves while a function is trained, so that its file comes to a size that was asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from clric_decoder.networks import Parameters, encode_networks

# A file may have this share of its target at least, and aims at a little less than all of it.
MIN_FILL, GOAL = 0.97, 0.987

# Between these lambda moves: below, distortion is beyond what a VAE shows; above, grids are empty.
LOWEST, HIGHEST = 2e-3, 1e3

# The start is the same for all lambdas below.
FINEST = 1e-4


@dataclass(frozen=True)
class Dynamics:
    """How grids' bits follow lambda in the course of a stage.

    elasticity: the power of lambda by which bits fall. response: the share of a stage in which they follow.
    What grids cost more, in the course of a stage, than they will at its end, as measured at constant lambda, is
    exp(start exp(-iteration / start_iterations) + excess exp(-decay position)), position in the stage from 0 to 1.
    first, last: the positions between which lambda moves: before, bits say too little; after, they follow too slowly.
    max_change: how many times its first value lambda may come to, up or down, in one training. dense: bits for each
    place of the latent (8 x 8 pixels) above which the excess falls in inverse proportion to them.
    """

    elasticity: float
    response: float
    start: float
    start_iterations: float
    excess: float
    decay: float
    first: float
    last: float
    max_change: float
    dense: float


# LATENT is fitted to presets fast and default; IMAGE to default, through small and lite, two crops at three lambdas.
# Grids that are few stay near their start whatever lambda is, and the networks would be all that follows it.
LATENT = Dynamics(0.55, 0.12, 0.83, 46, 0.15, 4.3, 0.1, 0.7, 8, math.inf)
IMAGE = Dynamics(0.55, 0.1, 0.0, 1, 0.36, 2.5, 0.03, 0.75, 4, 3.0)

# In the few iterations that correct a file's size, lambda has this many times less power, and sometimes much less: it
# moves twice as far again where a size has not come half of its way, up to this much in its logarithm.
WEAKNESS, FARTHEST = 5, 0.7

# What is known before the networks are quantised: header and table of segments, and a parameter's bits.
HEADER_BITS, PARAMETER_BITS, OTHERS_SHARE = 8 * 22, 4.2, 0.3

# The bits of trained grids as a multiple of the entropy of residuals (`_estimated_bits`): fitted to four Kodak images
# at three lambdas, where it is within 14 %.
ESTIMATE_FACTOR, ESTIMATE_STEP = 1.15, 1.9


class RateControl:
    """The lambdas of a batch of functions, each with a target: bytes of its file."""

    def __init__(
        self,
        sizes: Sequence[int],
        dynamics: Dynamics,
        others: torch.Tensor | None = None,
        starts: torch.Tensor | None = None,
        at_most: bool = False,
    ) -> None:
        """others: (batch,), bits of all but the grids, where that is known. starts: (batch,), bits of grids that the
        first lambdas are to be those of, where that is not what is left of the sizes. at_most: whether files may be
        smaller than their sizes; lambda then never falls."""
        self._sizes, self._dynamics, self._others, self._starts = np.array(sizes), dynamics, others, starts
        self._at_most = at_most
        self._powers = torch.full((len(sizes),), WEAKNESS / dynamics.elasticity)
        self._excess = torch.zeros(len(sizes))

    def first_lambdas(
        self, lmbdas: torch.Tensor, latents: torch.Tensor, pixels: torch.Tensor, parameters: int
    ) -> torch.Tensor:
        """Where to start, (batch,). lmbdas: (batch,), good for the training on images, which starts from functions.
        latents: (batch, C, h, w). pixels: (batch,), of the images."""
        self._places = latents[0, 0].numel()
        if self._dynamics is IMAGE:
            self._first = lmbdas.clone()
            return lmbdas
        if self._others is None:
            known = torch.full((len(latents),), HEADER_BITS + PARAMETER_BITS * parameters, device=latents.device)
            # Small files have small networks: what is not worth its bits is left at its default
            self._others = torch.minimum(known, OTHERS_SHARE * self._goals(known))
        if self._starts is None:
            self._starts = self._grid_goals()
        lambdas = np.geomspace(LOWEST, HIGHEST, 60)
        result = []
        for latent, count, goal in zip(latents.cpu(), pixels.tolist(), self._starts.tolist(), strict=True):
            residuals = _residuals(latent)
            bits = [_estimated_bits(residuals, principal_step(lmbda, latent.numel(), count)) for lmbda in lambdas]
            result.append(np.interp(-math.log(goal), -np.log(np.array(bits) + 1), np.log(lambdas)))
        self._first = torch.tensor(result, dtype=torch.float32).exp().clamp(LOWEST, HIGHEST).to(latents.device)
        return self._first.clone()

    def next_lambdas(
        self, lambdas: torch.Tensor, bits: torch.Tensor, owners: list[int], iteration: int, iterations: int, pause: int
    ) -> torch.Tensor:
        """In the course of a stage.

        bits: (batch,), what the grids would cost if they were rounded now. iterations: of the stage. pause: iterations
        since lambda moved last.
        """
        own, position = self._dynamics, iteration / iterations
        if not own.first <= position <= own.last:
            return lambdas
        start = own.start * math.exp(-iteration / own.start_iterations)
        excess = own.excess * math.exp(-own.decay * position) / (bits / (own.dense * self._places)).clamp_min(1)
        final = bits * torch.exp(-start - excess)
        excess = torch.log((final + 1) / self._grid_goals()[owners]).clamp(-1, 1)
        if self._at_most:
            excess = excess.clamp_min(0)
        moved = lambdas * torch.exp(excess * (pause / iterations / own.response / own.elasticity))
        first = self._first[owners]
        lowest, highest = first / own.max_change, first * own.max_change
        return moved.maximum(lowest).minimum(highest).clamp(LOWEST, HIGHEST)

    def know_networks(self, networks: Sequence[list[Parameters]]) -> None:
        """What the networks cost, about: more is saved on them in the end."""
        self._others = _other_bits(networks).to(self._first)

    def restart(self, indices: list[int], networks: Sequence[list[Parameters]], sizes: Sequence[int]) -> RateControl:
        """For some of the functions, from the start, with what is known of their networks and files (bytes).

        Networks follow lambda: the mean of what was expected and what they came to is between two misses. Grids stay
        near to what they start with, where they are small: the start is as much larger as they came out too small.
        """
        assert self._others is not None
        assert self._starts is not None
        own = _other_bits(networks)
        goals = self._goals(own)[indices]
        ratios = (goals - own).clamp_min(1) / (8 * torch.tensor(sizes) - own).clamp_min(1)
        others = (self._others[indices] + own.to(self._others)) / 2
        starts = self._starts[indices] * ratios.clamp(0.5, 2).to(self._starts)
        return RateControl(self._sizes[indices].tolist(), self._dynamics, others, starts)

    def missed(self, sizes: Sequence[int], lambdas: torch.Tensor) -> list[int]:
        """The numbers of the functions whose files (sizes in bytes) miss their targets while lambda can still move."""
        shares = np.array(sizes) / self._sizes
        limits = lambdas.cpu().numpy()
        wrong = (shares > 1) & (limits < HIGHEST)
        if not self._at_most:
            wrong |= (shares < MIN_FILL) & (limits > LOWEST)
        return np.flatnonzero(wrong).tolist()

    def last_lambdas(self, lambdas: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Lambdas for files that have these sizes in bytes, to be trained a little further."""
        excess = torch.from_numpy(np.log(np.array(sizes) / (GOAL * self._sizes))).float()
        could_move = (self._excess * self._powers).abs() < FARTHEST
        self._powers[(excess * self._excess > 0.5 * self._excess**2) & could_move] *= 2
        self._powers[excess * self._excess < 0] /= 2
        self._excess = excess
        moves = (excess * self._powers).clamp(-FARTHEST, FARTHEST).to(lambdas)
        return (lambdas * torch.exp(moves)).clamp(LOWEST, HIGHEST)

    def _goals(self, like: torch.Tensor) -> torch.Tensor:
        return 8 * GOAL * torch.from_numpy(self._sizes).to(like)

    def _grid_goals(self) -> torch.Tensor:
        assert self._others is not None
        goals = self._goals(self._others)
        return torch.maximum(goals - self._others, 0.1 * goals)


def can_move(lmbda: float) -> bool:
    """Whether a lambda, which training keeps as float32, is within its limits and not at one of them."""
    return bool(np.float32(LOWEST) < np.float32(lmbda) < np.float32(HIGHEST))


def principal_step(lmbda: float, values: int, pixels: int) -> float:
    """The step between integers that uniform quantisation at high rate would choose.

    A step s costs s^2 / 12 in distortion and saves log2(s) bits a value, so that s^2 = 6 lambda values / (pixels ln 2).
    Not for the smallest lambdas: weights of the size of such steps would be lost in the first iterations.
    """
    return math.sqrt(6 * max(lmbda, FINEST) * values / (pixels * math.log(2)))


def _other_bits(networks: Sequence[list[Parameters]]) -> torch.Tensor:
    """What files cost besides their grids, (batch,)."""
    return torch.tensor([HEADER_BITS + 8.0 * len(encode_networks(parameters)) for parameters in networks])


def _residuals(latent: torch.Tensor) -> torch.Tensor:
    """The principal components of a latent (C, h, w) without the mean of their left and upper neighbours."""
    flat = latent.flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    components = (torch.linalg.eigh((flat @ flat.T).double()).eigenvectors.float().T @ flat).view_as(latent)
    padded = F.pad(components, (1, 0, 1, 0), mode="replicate")
    return components - (padded[:, 1:, :-1] + padded[:, :-1, 1:]) / 2


def _estimated_bits(residuals: torch.Tensor, step: float) -> float:
    """What the grids of a latent will cost, about.

    The entropy of its residuals, quantised with more than the step of the start (small values train to zero), a
    two-sided geometric distribution for each component.
    """
    mean = (residuals / (ESTIMATE_STEP * step)).round().abs().mean((1, 2)).double().clamp_min(1e-6)
    ratio = mean / (1 + (1 + mean * mean).sqrt())
    entropy = torch.log2((1 + ratio) / (1 - ratio)) - mean * torch.log2(ratio)
    return float(ESTIMATE_FACTOR * residuals[0].numel() * entropy.sum())
