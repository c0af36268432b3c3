"""The optimiser of distillation: Muon for the convolutions between hidden layers, Adam for all else.

Keller Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; steps scaled as Adam's
after Liu et al., "Muon is scalable for LLM training", 2025. On the small decoder 300 steps of it reach what
Adam needs thousands for. torch.optim.Muon takes matrices only, and is younger than the oldest torch we allow.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Fewer outputs or inputs than this make no matrix worth orthogonalising: first and last layers go to Adam.
_LEAST_SIDE = 16

_MOMENTUM = 0.95
_BETAS, _EPSILON = (0.9, 0.99), 1e-8


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (weights of hidden convolutions, [out, in * k * k]), or Adam (the others)."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step along the gradients that are there. Takes no closure."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    rows = len(parameter)
                    is_matrix = parameter.ndim > 1 and min(rows, parameter.numel() // rows) >= _LEAST_SIDE
                    update = self._muon(parameter) if is_matrix else self._adam(parameter)
                    parameter.sub_(update, alpha=group["lr"])

    def _muon(self, parameter: Tensor) -> Tensor:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        state["momentum"].lerp_(gradient, 1 - _MOMENTUM)
        update = _orthogonal(gradient.lerp(state["momentum"], _MOMENTUM).flatten(1))
        # 0.2 is about the root mean square of Adam's updates.
        return update.view_as(parameter) * (0.2 * math.sqrt(max(update.shape)))

    def _adam(self, parameter: Tensor) -> Tensor:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["step"], state["mean"], state["square"] = 0, torch.zeros_like(gradient), torch.zeros_like(gradient)
        state["step"] += 1
        state["mean"].lerp_(gradient, 1 - _BETAS[0])
        state["square"].lerp_(gradient.square(), 1 - _BETAS[1])
        mean = state["mean"] / (1 - _BETAS[0] ** state["step"])
        square = state["square"] / (1 - _BETAS[1] ** state["step"])
        return mean / (square.sqrt() + _EPSILON)


def _orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix with singular values near 1: five steps of a quintic Newton-Schulz iteration."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x
