"""Adam beside torch's own, SOAP beside a plain one written from its paper; compiled loops and torch code alike."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from clric_decoder.networks import parameter_groups
from clric_encoder.model import backends
from clric_encoder.training.optimizers import COVARIANCE_BETA, LARGEST_SIDE, RISE, TURN_EVERY, Adam, Soap
from clric_encoder.training.presets import default_architecture

BETAS = (0.9, 0.95)


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(backends, "COMPILED", None)


def test_adam_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5, 7, generator=generator)
    expected = values.clone().requires_grad_()
    peer = torch.optim.Adam([expected], lr=1, betas=BETAS)
    adam = Adam(values, BETAS)
    for rate in np.linspace(0.1, 0.01, 20):
        gradient = torch.randn(3, 5, 7, generator=generator) * 10.0 ** torch.arange(-4, 3)
        peer.param_groups[0]["lr"] = rate
        expected.grad = gradient
        peer.step()
        adam.step(values, gradient, rate)
    torch.testing.assert_close(values, expected.detach())


def test_tensors_that_are_not_contiguous_are_changed_too() -> None:
    """A slice and a transposed tensor move as copies of them do, and what is between the slice's values stays."""
    groups = parameter_groups(default_architecture(4))
    count = sum(group.size for group in groups)
    for make in (lambda values: Adam(values, BETAS), lambda values: Soap(values, BETAS, groups)):
        whole, turned = torch.randn(3, 2 * count), torch.randn(count, 3)
        for values in (whole[:, ::2], turned.T):
            before, copied, between = values.clone(), values.contiguous(), whole[:, 1::2].clone()
            assert not values.is_contiguous()
            here, there = make(values), make(copied)
            for _ in range(3):
                gradient = torch.randn(count, 3).T
                here.step(values, gradient, 0.01)
                there.step(copied, gradient.contiguous(), 0.01)
            assert torch.equal(values, copied)
            assert not torch.equal(values, before)
            assert torch.equal(whole[:, 1::2], between)


def plain_soap(matrix: np.ndarray, gradients: list[np.ndarray], rate: float) -> np.ndarray:
    """Algorithm 3 of Vyas et al., in float64: bases are turned from time to time, momentum stays in the given basis."""
    mean, square = np.zeros_like(matrix), np.zeros_like(matrix)
    covariances = [np.zeros((side, side)) for side in matrix.shape]
    left, right = (np.eye(side) for side in matrix.shape)
    for t, gradient in enumerate(gradients, 1):
        mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
        square = BETAS[1] * square + (1 - BETAS[1]) * (left.T @ gradient @ right) ** 2
        corrected_mean, corrected_square = mean / (1 - BETAS[0] ** t), square / (1 - BETAS[1] ** t)
        step = left.T @ corrected_mean @ right / (np.sqrt(corrected_square) + 1e-8)
        matrix = matrix - rate * min(1, t / RISE) * left @ step @ right.T
        for covariance, product in zip(covariances, (gradient @ gradient.T, gradient.T @ gradient), strict=True):
            covariance *= COVARIANCE_BETA
            covariance += (1 - COVARIANCE_BETA) * product
        if t % TURN_EVERY == 0:
            left, right = (np.linalg.eigh(covariance)[1] for covariance in covariances)
    return matrix


@pytest.mark.parametrize("channels", [4, 16])
def test_soap_is_the_plain_one(channels: int) -> None:
    """Each weight of each function for itself; what is no weight as Adam has it."""
    groups = parameter_groups(default_architecture(channels))
    rng = np.random.default_rng(channels)
    count, steps = sum(group.size for group in groups), 2 * TURN_EVERY + 10
    start = rng.normal(size=(2, count))
    gradients = [rng.normal(size=(2, count)) for _ in range(steps)]
    values = torch.tensor(start, dtype=torch.float32)
    soap = Soap(values, BETAS, groups)
    for gradient in gradients:
        soap.step(values, torch.tensor(gradient, dtype=torch.float32), 0.01)
    first = 0
    for group in groups:
        own = slice(first, first + group.size)
        first += group.size
        for i in range(2):
            if ".weight" in group.name:
                shape = (group.shape[0], -1)
                own_gradients = [gradient[i, own].reshape(shape) for gradient in gradients]
                expected = plain_soap(start[i, own].reshape(shape), own_gradients, 0.01)
                np.testing.assert_allclose(values[i, own].numpy(), expected.reshape(-1), atol=1e-3)
            else:
                alone = torch.tensor(start[i : i + 1, own], dtype=torch.float32)
                adam = Adam(alone, BETAS)
                for t, gradient in enumerate(gradients, 1):
                    part = torch.tensor(gradient[i : i + 1, own], dtype=torch.float32)
                    adam.step(alone, part, 0.01 * min(1, t / RISE))
                torch.testing.assert_close(values[i : i + 1, own], alone)


def test_a_large_side_keeps_its_basis() -> None:
    """What a wide custom latent would cost in eigenvectors is left out; its weights are trained all the same."""
    wide = default_architecture(LARGEST_SIDE + 1)
    groups = parameter_groups(replace(wide, channels=(1,)))
    values = torch.zeros(1, sum(group.size for group in groups))
    soap = Soap(values, BETAS, groups)
    first, last = next(
        (sum(other.size for other in groups[:i]), group.size)
        for i, group in enumerate(groups)
        if group.shape[:2] == (LARGEST_SIDE + 1,) * 2
    )
    own = slice(first, first + last)
    alone = values[:, own].clone()
    adam = Adam(alone, BETAS)
    for t in range(1, TURN_EVERY + 6):
        gradient = torch.randn_like(values)
        soap.step(values, gradient, 0.01)
        adam.step(alone, gradient[:, own].contiguous(), 0.01 * min(1, t / RISE))
    torch.testing.assert_close(values[:, own], alone)
    assert alone.abs().min() > 0


def test_picked_functions_go_on_as_before() -> None:
    groups = parameter_groups(default_architecture(4))
    gradients = torch.randn(TURN_EVERY + 5, 3, sum(group.size for group in groups))
    results = []
    for picked in (None, [2, 0]):
        values = torch.zeros_like(gradients[0])
        soap = Soap(values, BETAS, groups)
        for t, gradient in enumerate(gradients):
            if t == 12 and picked:
                soap, values = soap.pick(picked), values[picked]
            soap.step(values, gradient[picked] if t >= 12 and picked else gradient, 0.01)
        results.append(values)
    torch.testing.assert_close(results[1], results[0][[2, 0]])
