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
from clric_encoder.model import backends
from clric_encoder.model.backends import kernels, torch_operations
from clric_encoder.model.function import Packing, Synthesis, grid_bits
from clric_encoder.model.grid_layout import GridLayout
from clric_encoder.network_quantization import as_networks
from clric_encoder.torch_threads import torch_threads
from conformance import make_vectors

from encoder import plain_function

ARCHITECTURES = {case.name: case.architecture for case in make_vectors.CASES if case.space == "sd1"}
NAMES = (
    "size-7x5",
    "arm-one-neighbour",
    "arm-linear",
    "arm-narrower-than-its-inputs",
    "grids-paper",
    "grids-gap",
    "grids-single-level",
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


CPU = torch.device("cpu")


def batched(grids: list[np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(grid)[None].float() for grid in grids]


def join(layout: GridLayout, grids: list[torch.Tensor]) -> torch.Tensor:
    """The packed that splits into grids."""
    packed = torch.zeros(len(grids[0]), layout.rows, layout.stride)
    for place, grid in zip(layout.split(packed), grids, strict=True):
        place.copy_(grid)
    return packed


@pytest.mark.parametrize("name", NAMES)
def test_latent_is_the_decoders(name) -> None:
    architecture = ARCHITECTURES[name]
    grids, networks = random_function(architecture, 13, 22)
    layout = GridLayout(architecture, 13, 22, CPU)
    ours = (
        Synthesis(join(layout, batched(grids)), as_networks([networks], CPU), architecture, layout).latents[0].numpy()
    )
    np.testing.assert_allclose(ours, decode(grids, networks, architecture), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_bits_are_those_of_the_integer_model(name) -> None:
    architecture = ARCHITECTURES[name]
    grids, networks = random_function(architecture, 40, 56)
    layout = GridLayout(architecture, 40, 56, CPU)
    trained = grid_bits(join(layout, batched(grids)), as_networks([networks], CPU), architecture, layout).bits.item()
    coded = 0.0
    for grid, arm in zip(grids, build_arms(networks, architecture), strict=True):
        coded += ideal_bits(*predict(grid, arm, architecture)).sum()
    assert coded == pytest.approx(trained, rel=0.01)


@pytest.fixture(params=["compiled", "torch"])
def backend(request, monkeypatch) -> None:
    """The compiled loops of CPUs, and the torch code of all other devices, here on a CPU too."""
    assert backends.COMPILED is not None
    if request.param == "torch":
        monkeypatch.setattr(backends, "COMPILED", None)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("size", [(21, 34), (41, 60), (4, 1100)])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_what_plain_functions_are_one_by_one(name, size) -> None:
    """Values and gradients, of unrounded grids and networks that differ within the batch."""
    architecture = ARCHITECTURES[name]
    torch.manual_seed(1)  # others may fall on a kink of the ARM
    layout, packing = GridLayout(architecture, *size, CPU), Packing(architecture, CPU)
    grids = [3 * torch.randn(2, *shape) for shape in layout.shapes]
    grids[0].view(-1)[:5] = 70  # beyond what the ARM sees
    packed = join(layout, grids)
    vectors = packing.defaults + 0.1 * torch.randn(2, len(packing.defaults))
    networks = packing.split(vectors)
    counted = grid_bits(packed, networks, architecture, layout, torch.full((2,), 1 / 1000))
    synthesis = Synthesis(packed, networks, architecture, layout)
    bits, latents = counted.bits, synthesis.latents
    grad_packed, grad_vectors = torch.zeros_like(packed), packing.bits_gradient(vectors) / 1000
    counted.backward(packing.split(grad_vectors), grad_packed)
    synthesis.backward(2 * latents / latents[0].numel(), packing.split(grad_vectors), grad_packed)
    got = layout.split(grad_packed)
    wide, others = torch.zeros(2, layout.rows, layout.stride, 2), torch.zeros_like(grad_vectors)
    counted.backward(packing.split(others), wide[..., 0])  # to what is not contiguous
    synthesis.backward(2 * latents / latents[0].numel(), packing.split(others), wide[..., 0])
    torch.testing.assert_close(wide[..., 0], grad_packed, rtol=1e-6, atol=1e-8)

    for i in range(2):
        own = [grid[i].clone().requires_grad_() for grid in grids]
        values = {key: value[i].detach().clone().requires_grad_() for key, value in networks.items()}
        defaults = {key: value[0] for key, value in packing.split(packing.defaults[None]).items()}
        plain_bits = plain_function.grid_bits(own, values, architecture)
        plain_latent = plain_function.synthesize(own, values, architecture)
        plain_estimate = plain_function.network_bits(values, defaults)
        (plain_bits / 1000 + plain_latent.square().mean() + plain_estimate / 1000).backward()
        torch.testing.assert_close(bits[i], plain_bits, rtol=1e-4, atol=0)
        torch.testing.assert_close(latents[i], plain_latent, rtol=1e-4, atol=1e-4)
        for grid, plain in zip(got, own, strict=True):
            if plain.numel():
                torch.testing.assert_close(grid[i], plain.grad, rtol=1e-3, atol=1e-5)
        for key, gradient in packing.split(grad_vectors).items():
            if values[key].numel():
                torch.testing.assert_close(gradient[i], values[key].grad, rtol=2e-3, atol=1e-4)


def test_the_number_of_threads_changes_nothing(monkeypatch) -> None:
    """Every loop is split, and the ARM has threads of its own beside the synthesis."""
    monkeypatch.setattr(kernels, "_LEAST_WORK", 1)
    architecture = ARCHITECTURES["size-7x5"]
    layout, packing = GridLayout(architecture, 96, 128, CPU), Packing(architecture, CPU)
    packed = join(layout, [2 * torch.randn(3, *shape) for shape in layout.shapes])
    networks = packing.split(packing.defaults + 0.1 * torch.randn(3, len(packing.defaults)))
    results = []
    for threads in (1, 2, 5):
        with torch_threads(1), kernels.own_threads(threads):
            grad_packed, grad_vectors = torch.zeros_like(packed), torch.zeros(3, len(packing.defaults))
            grad_networks, targets = packing.split(grad_vectors), torch.zeros(3, 4, 96, 128)
            counted = grid_bits(packed, networks, architecture, layout, torch.ones(3))
            errors = Synthesis(packed, networks, architecture, layout)
            errors.backward(errors.latents - targets, grad_networks, grad_packed)
            counted.backward(grad_networks, grad_packed)
            losses = errors.latents, counted.bits
            rounded, slope = kernels.soft_round_with_noise(packed, packed.flip(0), 0.1, 0.15)
            bits = grid_bits(packed, networks, architecture, layout).bits
            results.append((*losses, grad_packed, grad_vectors, bits, rounded, slope))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("soft_round", [torch_operations.soft_round_with_noise, kernels.soft_round_with_noise])
def test_soft_rounding_and_its_gradient(soft_round) -> None:
    values = torch.linspace(-3.3, 3.4, 2000, requires_grad=True)
    noise = torch.randn(2000, generator=torch.Generator().manual_seed(0))

    def step(x: torch.Tensor) -> torch.Tensor:
        floor = x.floor()
        return floor + 0.5 + torch.tanh((x - floor - 0.5) / 0.2) * (0.5 / np.tanh(0.5 / 0.2))

    expected = step(step(values) + 0.15 * noise)
    (slope,) = torch.autograd.grad(expected.sum(), values)
    for shape in ((1, 2000), (50, 40)):
        turned, turned_noise = (tensor.detach().view(shape).T.contiguous().T for tensor in (values, noise))
        rounded, own_slope = soft_round(turned, turned_noise, 0.2, 0.15)
        torch.testing.assert_close(rounded.reshape(-1), expected)
        torch.testing.assert_close(own_slope.reshape(-1), slope, rtol=1e-3, atol=1e-4)


def test_laplace_bits_by_hand() -> None:
    """Through the function: one grid value, an ARM without weights, whose bias is the scale."""
    architecture = replace(ARCHITECTURES["size-7x5"], channels=(1,), neighbours=1, hidden_layers=0, grid_scales=False)
    layout, packing = GridLayout(architecture, 1, 1, CPU), Packing(architecture, CPU)
    # b = 1: P(0) = 1 - e^-1/2, P(2) = (e^-3/2 - e^-5/2) / 2
    expected = [-np.log2(1 - np.exp(-0.5)), *[-np.log2((np.exp(-1.5) - np.exp(-2.5)) / 2)] * 2, 16]
    for value, bits in zip([0.0, 2.0, -2.0, 500.0], expected, strict=True):
        packed = join(layout, [torch.full((1, 1, 1, 1), value)])
        got = grid_bits(packed, packing.split(packing.defaults[None]), architecture, layout).bits
        assert got.item() == pytest.approx(bits, rel=1e-5)
