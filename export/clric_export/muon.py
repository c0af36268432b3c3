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
            # Matrices of one shape together: on a GPU time goes by the number of operations
            matrices: dict[tuple[int, int], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                rows = len(parameter)
                columns = parameter.numel() // rows
                if parameter.ndim > 1 and min(rows, columns) >= _LEAST_SIDE:
                    matrices.setdefault((rows, columns), []).append(parameter)
                else:
                    parameter.sub_(self._adam(parameter), alpha=group["lr"])
            for shape, parameters in matrices.items():
                # 0.2 is about the root mean square of Adam's updates
                length = group["lr"] * 0.2 * math.sqrt(max(shape))
                updates = _orthogonal(torch.stack([self._momentum(parameter) for parameter in parameters]))
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.sub_(update.view_as(parameter), alpha=length)

    def _momentum(self, parameter: Tensor) -> Tensor:
        """Nesterov's, as a matrix of outputs by all else."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        state["momentum"].lerp_(gradient, 1 - _MOMENTUM)
        return gradient.lerp(state["momentum"], _MOMENTUM).flatten(1)

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


def _orthogonal(matrices: Tensor) -> Tensor:
    """The nearest matrices [N, rows, columns] with singular values near 1: five steps of a Newton-Schulz iteration."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if is_tall else x
