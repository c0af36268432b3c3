"""The training loop: a latent becomes a function under distortion + lambda * rate (paper, III-D and IV-A3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from clric_decoder.bitstream import Architecture, grid_shapes
from clric_decoder.context import MAX_VALUE
from clric_decoder.networks import Parameters, parameter_groups

from .function import Grids, Networks, grid_bits, network_bits, synthesize
from .parameters import as_networks, default_networks, quantize_networks
from .presets import Preset, Stage
from .quantizer import add_uniform_noise, round_straight_through, soft_round_with_noise

REPORT_EVERY = 10  # iterations between two reports: each waits for the device


@dataclass(frozen=True)
class Progress:
    """Where an encode stands: bpp and distortion (latent MSE) are the training's estimates."""

    stage: str
    iteration: int
    iterations: int
    bpp: float
    distortion: float


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Function:
    """An overfitted function, quantised: grids (channels, height, width) int32, the finest first, and networks."""

    architecture: Architecture
    grids: list[np.ndarray]
    networks: list[Parameters]


@dataclass
class _State:
    """A function in training, with its optimiser and its own stream of random numbers."""

    grids: Grids
    networks: Networks
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    loss: float = math.inf


def overfit(
    latent: np.ndarray,
    lmbda: float,
    pixels: int,
    preset: Preset,
    *,
    seed: int = 0,
    device: str = "cpu",
    report: Report | None = None,
) -> Function:
    """The function of a latent (C, h, w) float32 that is lowest in latent MSE + lmbda * bits / pixels.

    pixels: of the image, for the rate. The same arguments give the same function on the same device and versions.
    """
    trainer = _Trainer(latent, lmbda, pixels, preset, device, report)
    state = trainer.best_start(seed)
    networks: list[Parameters] = []
    for number, stage in enumerate(preset.stages):
        if stage.rounding == "hard" and not networks:
            # From here on the networks are what the stream holds, and the grids adapt to them
            networks = trainer.quantize(state)
            state.networks = as_networks(networks, trainer.latent.device)
            state.optimizer = _optimizer(state.grids, {})
        trainer.train(state, stage, f"stage {number + 1} of {len(preset.stages)}", stage.iterations)
    networks = networks or trainer.quantize(state)
    grids = [grid.detach().round().clamp(-MAX_VALUE, MAX_VALUE).cpu().numpy() for grid in state.grids]
    return Function(trainer.architecture, [grid.astype(np.int32) for grid in grids], networks)


class _Trainer:
    """What stays the same over all candidates and stages of one encode."""

    def __init__(
        self,
        latent: np.ndarray,
        lmbda: float,
        pixels: int,
        preset: Preset,
        device: str,
        report: Report | None,
    ):
        self.latent = torch.from_numpy(latent).to(device)
        self.lmbda = lmbda
        self.pixels = pixels
        self.preset = preset
        self.architecture = preset.architecture(latent.shape[0])
        self.shapes = grid_shapes(self.architecture.channels, *latent.shape[1:])
        self.defaults = default_networks(self.architecture, self.latent.device)
        self.report = report or (lambda progress: None)
        self.done = 0
        self.last = Progress("start", 0, preset.iterations, 0.0, 0.0)

    def best_start(self, seed: int) -> _State:
        """The state that the main training begins with: the winner of the warm-up's candidates."""
        candidates = max([w.candidates for w in self.preset.warm_up], default=1)
        states = [self.start(seed * 1000 + number) for number in range(candidates)]
        for number, warm_up in enumerate(self.preset.warm_up):
            states = sorted(states, key=lambda state: state.loss)[: warm_up.candidates]
            for state in states:
                name = f"warm-up {number + 1} of {len(self.preset.warm_up)}"
                self.train(state, self.preset.stages[0], name, warm_up.iterations)
        return min(states, key=lambda state: state.loss)

    def start(self, seed: int) -> _State:
        generator = torch.Generator(self.latent.device).manual_seed(seed)
        networks = _random_networks(self.architecture, self.defaults, generator)
        grids = [torch.zeros(shape, device=self.latent.device) for shape in self.shapes]
        if self.preset.start == "principal":
            _start_from_principal_components(self.latent, grids, networks, self.architecture, self.lmbda, self.pixels)
        for tensor in (*grids, *networks.values()):
            tensor.requires_grad_(True)
        return _State(grids, networks, _optimizer(grids, networks), generator)

    def train(self, state: _State, stage: Stage, name: str, iterations: int) -> None:
        """Some iterations of a stage; `state` is changed in place."""
        for iteration in range(iterations):
            position = iteration / stage.iterations
            for group, rates in zip(state.optimizer.param_groups, (stage.grid_rate, stage.network_rate), strict=False):
                group["lr"] = _cosine(rates, position)
            grids = [self.rounded(grid, stage, position, state.generator) for grid in state.grids]
            bits = grid_bits(grids, state.networks, self.architecture)
            distortion = (synthesize(grids, state.networks, self.architecture) - self.latent).square().mean()
            loss = distortion + self.lmbda / self.pixels * bits
            if len(state.optimizer.param_groups) > 1:
                loss = loss + self.lmbda / self.pixels * network_bits(state.networks, self.defaults)
            state.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            state.optimizer.step()
            if iteration % REPORT_EVERY == 0 or iteration + 1 == iterations:
                state.loss = loss.item()
                self.last = Progress(
                    name,
                    self.done + iteration + 1,
                    self.preset.iterations,
                    bits.item() / self.pixels,
                    distortion.item(),
                )
                self.report(self.last)
        self.done += iterations

    def rounded(self, grid: torch.Tensor, stage: Stage, position: float, generator: torch.Generator) -> torch.Tensor:
        if stage.rounding == "uniform":
            return add_uniform_noise(grid, generator)
        if stage.rounding == "soft":
            temperature, sigma = _linear(stage.temperature, position), _linear(stage.sigma, position)
            return soft_round_with_noise(grid, temperature, sigma, generator)
        return round_straight_through(grid)

    def quantize(self, state: _State) -> list[Parameters]:
        """The networks as integers, for the grids as they round now."""
        return quantize_networks(
            {name: values.detach() for name, values in state.networks.items()},
            [grid.detach().round() for grid in state.grids],
            self.latent,
            self.architecture,
            self.lmbda / self.pixels,
            lambda: self.report(replace(self.last, stage="networks")),
        )


def _optimizer(grids: Grids, networks: Networks) -> torch.optim.Optimizer:
    groups = [{"params": grids}] + [{"params": list(networks.values())}] * bool(networks)
    return torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.99))


def _cosine(rates: tuple[float, float], position: float) -> float:
    return rates[1] + (rates[0] - rates[1]) * 0.5 * (1 + math.cos(math.pi * position))


def _linear(values: tuple[float, float], position: float) -> float:
    return values[0] + (values[1] - values[0]) * position


def _random_networks(architecture: Architecture, defaults: Networks, generator: torch.Generator) -> Networks:
    """Near-zero ARM weights, bicubic upsampling, and a synthesis whose layers keep the variance of their inputs."""
    networks = {}
    for group in parameter_groups(architecture):
        values = defaults[group.name].clone()
        if group.name.endswith("bias") or group.name in ("upsampler", "grid_scales"):
            networks[group.name] = values
            continue
        fan_in = math.prod(group.shape[1:])
        noise = torch.randn(group.shape, generator=generator, device=values.device) / math.sqrt(fan_in)
        layer = int(group.name[-1])
        if group.name.startswith("arm"):
            noise = 0.1 * noise
        elif architecture.synthesis[layer].residual:
            noise = 0.01 * noise  # a residual branch starts near nothing
        networks[group.name] = noise
    return networks


def _start_from_principal_components(
    latent: torch.Tensor,
    grids: Grids,
    networks: Networks,
    architecture: Architecture,
    lmbda: float,
    pixels: int,
) -> None:
    """Set the finest grids to the latent's principal components, and the first synthesis layer to turn them back.

    The step between integers is the one that uniform quantisation at high rate would choose: a step s costs s^2 / 12
    in distortion and saves log2(s) bits a value, so that s^2 = 6 lambda values / (pixels ln 2).
    Coarser levels start empty, and each adds to one component.
    """
    channels, height, width = latent.shape
    flat = latent.flatten(1)
    mean = flat.mean(1, keepdim=True)
    covariance = (flat - mean) @ (flat - mean).T / flat.shape[1]
    components = torch.linalg.eigh(covariance.double().cpu()).eigenvectors.flip(1).float()
    # The sign of an eigenvector is arbitrary: fix it, so that the start does not depend on the library
    strongest = components.gather(0, components.abs().argmax(0, keepdim=True))
    components = (components * strongest.sign()).to(latent.device)
    step = math.sqrt(6 * lmbda * latent.numel() / (pixels * math.log(2)))

    weight = networks["synthesis.weight0"].zero_()
    first = architecture.synthesis[0]
    finest = min(len(grids[0]), channels, first.channels)
    grids[0][:finest] = (components[:, :finest].T @ (flat - mean) / step).view(finest, height, width)
    centre = first.kernel // 2
    for number in range(weight.shape[1]):
        component = number if number < len(grids[0]) else (number - len(grids[0])) % channels
        if component < channels:
            weight[:channels, number, centre, centre] = components[: len(weight), component] * step
    networks["synthesis.bias"][:channels] = mean[:, 0]
