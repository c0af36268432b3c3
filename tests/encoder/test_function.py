"""What is trained is what is decoded: the torch function beside the decoder's integer and numpy code."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from clric_decoder.bitstream import grid_shapes
from clric_decoder.context import build_arms, predict
from clric_decoder.entropy import ideal_bits
from clric_decoder.networks import Parameters, parameter_groups
from clric_decoder.synthesis import synthesize as decode
from clric_encoder.function import grid_bits, laplace_bits, synthesize
from clric_encoder.parameters import as_networks
from conformance import make_vectors

ARCHITECTURES = {case.name: case.architecture for case in make_vectors.CASES if case.space == "sd1"}
NAMES = (
    "size-7x5",
    "arm-two",
    "arm-earlier",
    "arm-linear",
    "grids-paper",
    "grids-gap",
    "synthesis-eight-layers",
)


def random_function(architecture, height, width) -> tuple[list[np.ndarray], list[Parameters]]:
    """Grids and networks of the size that training gives."""
    rng = np.random.default_rng(0)
    networks = []
    for group in parameter_groups(architecture):
        exponent = min(6, group.max_exponent)
        limit = group.limit(exponent)
        integers = np.rint(rng.normal(scale=8 if exponent == 6 else 2, size=group.shape))
        networks.append(Parameters(group, exponent, np.clip(integers, -limit, limit).astype(np.int32)))
    shapes = grid_shapes(architecture.channels, height, width)
    return [np.rint(rng.laplace(size=shape)).astype(np.int32) for shape in shapes], networks


@pytest.mark.parametrize("name", NAMES)
def test_latent_is_the_decoders(name) -> None:
    architecture = ARCHITECTURES[name]
    grids, networks = random_function(architecture, 13, 22)
    tensors = [torch.from_numpy(grid).float() for grid in grids]
    ours = synthesize(tensors, as_networks(networks, torch.device("cpu")), architecture).numpy()
    np.testing.assert_allclose(ours, decode(grids, networks, architecture), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_bits_are_those_of_the_integer_model(name) -> None:
    architecture = ARCHITECTURES[name]
    grids, networks = random_function(architecture, 40, 56)
    tensors = [torch.from_numpy(grid).float() for grid in grids]
    trained = grid_bits(tensors, as_networks(networks, torch.device("cpu")), architecture).item()
    coded = 0.0
    for grid, coarser, arm in zip(grids, [*grids[1:], None], build_arms(networks, architecture), strict=True):
        coded += ideal_bits(*predict(grid, arm, architecture, coarser)).sum()
    assert coded == pytest.approx(trained, rel=0.01)


def test_laplace_bits_by_hand() -> None:
    # b = 1: P(0) = 1 - e^-1/2, P(2) = (e^-3/2 - e^-5/2) / 2
    bits = laplace_bits(torch.tensor([0.0, 2.0, -2.0, 500.0]), torch.zeros(4))
    expected = [-np.log2(1 - np.exp(-0.5)), *[-np.log2((np.exp(-1.5) - np.exp(-2.5)) / 2)] * 2, 16]
    np.testing.assert_allclose(bits.numpy(), expected, rtol=1e-5)


def test_gradients_reach_every_grid_and_parameter() -> None:
    architecture = replace(ARCHITECTURES["arm-earlier"], two_arms=True)
    grids, networks = random_function(architecture, 13, 22)
    tensors = [torch.from_numpy(grid).float().requires_grad_() for grid in grids]
    values = {name: v.requires_grad_() for name, v in as_networks(networks, torch.device("cpu")).items()}
    loss = grid_bits(tensors, values, architecture) + synthesize(tensors, values, architecture).square().sum()
    loss.backward()
    for tensor in (*tensors, *values.values()):
        assert not tensor.numel() or tensor.grad.abs().sum() > 0
