"""Optimisers of functions that are trained side by side: each entry of a batch has its own state."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from clric_decoder.networks import Group

from ..model.backends import Scalar, SoapState, backend_for

if TYPE_CHECKING:
    from typing_extensions import Self

EPSILON = 1e-8

# SOAP: how long covariances remember, iterations between two turns of the bases, iterations in which the learning rate
# rises to what it is, and the largest side of a matrix that gets a basis.
COVARIANCE_BETA, TURN_EVERY, RISE, LARGEST_SIDE = 0.95, 25, 50, 128


class Adam:
    """Adam (Kingma and Ba, 2015) on tensors (batch, ...) of float32, in place."""

    def __init__(self, values: torch.Tensor, betas: tuple[float, float]) -> None:
        self._betas, self._steps = betas, 0
        self._state = [torch.zeros_like(values), torch.zeros_like(values)]  # first and second moments

    def pick(self, indices: list[int]) -> Self:
        """One with a copy of the state of some entries of the batch."""
        picked = copy.copy(self)
        picked._state = [tensor[indices] for tensor in self._state]
        return picked

    def step(self, values: torch.Tensor, gradient: torch.Tensor, rate: float) -> None:
        """Moves the values against the gradient."""
        self.move(values, gradient, *self.advance(rate))

    def advance(self, rate: float) -> tuple[float, float]:
        """The part of a step that a CUDA graph cannot replay: counts it, and gives what `move` needs to know of it."""
        self._steps += 1
        return self._scales(rate)

    def move(self, values: torch.Tensor, gradient: torch.Tensor, length: Scalar, epsilon: Scalar) -> None:
        """The other part, on tensors that stay where they are."""
        mean, square = self._state
        backend_for(values.device).adam(values, gradient, mean, square, self._betas, length, epsilon)

    def _scales(self, rate: float) -> tuple[float, float]:
        """Step length and epsilon, both with the correction for moments that start at zero."""
        scale = math.sqrt(1 - self._betas[1] ** self._steps)
        return rate * scale / (1 - self._betas[0] ** self._steps), EPSILON * scale


class Soap(Adam):
    """Adam in the eigenbases of each weight's covariances of gradients (SOAP, Vyas et al., 2024).

    On vectors (batch, parameters) of the groups, in their order. A weight is a matrix of outputs by all else; its
    gradients G have the covariances G G^T and G^T G, averaged over time, and Adam's second moments are those of the
    gradient turned into both eigenbases. Groups that are no weights are left to Adam.
    """

    def __init__(self, values: torch.Tensor, betas: tuple[float, float], groups: Sequence[Group]) -> None:
        super().__init__(values, betas)
        # For each group: first parameter, rows, columns, and where its two square matrices begin; -1 for none
        self._table: list[tuple[int, int, int, int, int]] = []
        first = size = 0
        for group in groups:
            rows, columns = (
                (group.shape[0], group.size // group.shape[0]) if ".weight" in group.name else (1, group.size)
            )
            places: list[int] = []
            for side in (rows, columns):
                turned = ".weight" in group.name and 1 < side <= LARGEST_SIDE
                places.append(size if turned else -1)
                size += side * side if turned else 0
            if group.size:
                self._table.append((first, rows, columns, places[0], places[1]))
            first += group.size
        covariances, bases = values.new_zeros(len(values), size), values.new_zeros(len(values), size)
        self._state += [covariances, bases]
        for place, side in self._sides():
            basis = SoapState.matrix(bases, place, side)
            assert basis is not None
            basis.diagonal(dim1=1, dim2=2).fill_(1)

    def advance(self, rate: float) -> tuple[float, float]:
        """As `Adam.advance`; turns the bases after every so many steps."""
        if self._steps and self._steps % TURN_EVERY == 0:
            for place, side in self._sides():
                covariance, basis = (SoapState.matrix(matrices, place, side) for matrices in self._state[2:])
                assert covariance is not None
                assert basis is not None
                basis.copy_(torch.linalg.eigh(covariance.double()).eigenvectors)
        self._steps += 1
        return self._scales(rate * min(1, self._steps / RISE))

    def move(self, values: torch.Tensor, gradient: torch.Tensor, length: Scalar, epsilon: Scalar) -> None:
        """As `Adam.move`."""
        mean, square, covariances, bases = self._state
        state = SoapState(mean, square, covariances, bases, self._table)
        backend_for(values.device).soap(values, gradient, state, self._betas, COVARIANCE_BETA, length, epsilon)

    def _sides(self) -> Iterator[tuple[int, int]]:
        """Where each square matrix begins, and its side."""
        for _, rows, columns, left, right in self._table:
            if left >= 0:
                yield left, rows
            if right >= 0:
                yield right, columns
