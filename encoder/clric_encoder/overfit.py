"""The training loop: a latent becomes a function under distortion + lambda * rate (paper, III-D and IV-A3)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from clric_decoder.bitstream import Architecture
from clric_decoder.context import MAX_VALUE
from clric_decoder.networks import Parameters

from .canvas import Canvas
from .function import GridBits, Networks, Packing, Synthesis
from .parameters import as_networks, quantize_networks
from .presets import Preset, Stage
from .quantizer import add_uniform_noise, round_straight_through, soft_round_with_noise

BETAS = (0.9, 0.99)  # of Adam
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
    """Functions in training: grids and parameters, their moments for Adam, and a stream of random numbers each.

    canvas: (batch, rows, stride). vectors: (batch, parameters). losses: (batch,), the last.
    """

    canvas: torch.Tensor
    vectors: torch.Tensor
    generators: list[torch.Generator]
    losses: torch.Tensor
    moments: list[torch.Tensor] = field(default_factory=list)
    steps: int = 0

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forgets what the optimiser has seen."""
        self.moments = [torch.zeros_like(x) for x in (self.canvas, self.canvas, self.vectors, self.vectors)]
        self.steps = 0

    def pick(self, indices: list[int]) -> _State:
        """Some of the functions, as they are."""
        state = replace(
            self,
            canvas=self.canvas[indices],
            vectors=self.vectors[indices],
            generators=[self.generators[i] for i in indices],
            losses=self.losses[indices],
        )
        state.moments, state.steps = [moment[indices] for moment in self.moments], self.steps
        return state


def overfit(
    latents: np.ndarray,
    lmbdas: Sequence[float],
    pixels: int,
    preset: Preset,
    *,
    seed: int = 0,
    device: str = "cpu",
    report: Report | None = None,
) -> list[Function]:
    """The functions of latents (batch, C, h, w) float32 that are lowest in latent MSE + lmbda * bits / pixels.

    lmbdas: one for each latent. pixels: of each image, for the rate. A latent's function depends on its neighbours in
    the batch no further than by the order of float summation. The same arguments give the same functions on the same
    device, versions and number of threads.
    """
    trainer = _Trainer(latents, lmbdas, pixels, preset, device, report)
    state = trainer.best_start(seed)
    networks: list[list[Parameters]] = []
    for number, stage in enumerate(preset.stages):
        if stage.rounding == "hard" and not networks:
            # From here on the networks are what the stream holds, and the grids adapt to them
            networks = trainer.quantize(state)
            state.vectors = torch.stack([trainer.packing.join(as_networks(p, trainer.device))[0] for p in networks])
            state.restart()
        fixed = bool(networks)
        trainer.train(state, stage, f"stage {number + 1} of {len(preset.stages)}", stage.iterations, fixed=fixed)
    networks = networks or trainer.quantize(state)
    canvas = state.canvas.round().clamp(-MAX_VALUE, MAX_VALUE)
    grids = [
        [grid[i].cpu().numpy().astype(np.int32) for grid in trainer.layout.split(canvas)] for i in range(len(canvas))
    ]
    return [Function(trainer.architecture, *parts) for parts in zip(grids, networks, strict=True)]


class _Trainer:
    """What stays the same over all candidates and stages of one encode."""

    def __init__(
        self,
        latents: np.ndarray,
        lmbdas: Sequence[float],
        pixels: int,
        preset: Preset,
        device: str,
        report: Report | None,
    ):
        self.device = torch.device(device)
        self.latents = torch.from_numpy(latents).to(self.device)
        self.lmbdas = list(lmbdas)
        self.pixels = pixels
        self.preset = preset
        self.architecture = preset.architecture(latents.shape[1])
        self.layout = Canvas(self.architecture, latents.shape[2], latents.shape[3], self.device)
        self.packing = Packing(self.architecture, self.device)
        self.report = report or (lambda progress: None)
        self.done = 0
        self.last = Progress("start", 0, preset.iterations, 0.0, 0.0)

    def best_start(self, seed: int) -> _State:
        """The state that the main training begins with: for each latent, the winner of the warm-up's candidates."""
        rounds = self.preset.warm_up
        count = max([warm_up.candidates for warm_up in rounds], default=1)
        owners = [owner for owner in range(len(self.latents)) for _ in range(count)]
        state = self.start(owners, [seed * 1000 + number for _ in self.latents for number in range(count)])
        for number, warm_up in enumerate(rounds):
            state, owners = self.best(state, owners, warm_up.candidates)
            name = f"warm-up {number + 1} of {len(rounds)}"
            self.train(state, self.preset.stages[0], name, warm_up.iterations, owners)
        return self.best(state, owners, 1)[0]

    def best(self, state: _State, owners: list[int], count: int) -> tuple[_State, list[int]]:
        """The `count` functions of lowest loss of each latent, and whose they are."""
        losses = state.losses.tolist()
        kept = []
        for owner in range(len(self.latents)):
            kept += sorted((i for i in range(len(owners)) if owners[i] == owner), key=losses.__getitem__)[:count]
        return state.pick(kept), [owners[i] for i in kept]

    def start(self, owners: list[int], seeds: list[int]) -> _State:
        generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        vectors = torch.stack([self.random_vector(generator) for generator in generators])
        canvas = torch.zeros(len(owners), self.layout.rows, self.layout.stride, device=self.device)
        if self.preset.start == "principal":
            for number, owner in enumerate(owners):
                _start_from_principal_components(
                    self.latents[owner],
                    self.layout.split(canvas[number : number + 1])[0][0],
                    {name: values[0] for name, values in self.packing.split(vectors[number : number + 1]).items()},
                    self.architecture,
                    self.lmbdas[owner],
                    self.pixels,
                )
        return _State(canvas, vectors, generators, torch.zeros(len(owners)))

    def random_vector(self, generator: torch.Generator) -> torch.Tensor:
        """Near-zero ARM weights, bicubic upsampling, and a synthesis whose layers keep the variance of their inputs."""
        vector = self.packing.defaults.clone()
        for group, part in zip(self.packing.groups, vector.split(self.packing.sizes), strict=True):
            if ".weight" not in group.name:
                continue
            layer = int(group.name[-1])
            scale = 1 / math.sqrt(math.prod(group.shape[1:]))
            if group.name.startswith("arm"):
                scale *= 0.1
            elif self.architecture.synthesis[layer].residual:
                scale *= 0.01  # a residual branch starts near nothing
            part.normal_(0, scale, generator=generator)
        return vector

    def train(
        self,
        state: _State,
        stage: Stage,
        name: str,
        iterations: int,
        owners: list[int] | None = None,
        fixed: bool = False,
    ) -> None:
        """Some iterations of a stage; `state` is changed in place.

        owners: the latent that each function is of, by default one each. fixed: the grids alone are trained.
        """
        targets = self.latents if owners is None else self.latents[owners]
        lmbdas = [self.lmbdas[owner] for owner in owners or range(len(self.lmbdas))]
        prices = torch.tensor(lmbdas, device=self.device) / self.pixels
        noise = _Noise(state, stage.rounding, self.layout.mask.shape)
        to_canvas, to_vectors = torch.empty_like(state.canvas), torch.empty_like(state.vectors)
        networks, to_networks = self.packing.split(state.vectors), self.packing.split(to_vectors)
        for iteration in range(iterations):
            position = iteration / stage.iterations
            if stage.rounding == "hard":
                rounded, slope = round_straight_through(state.canvas)
            elif stage.rounding == "uniform":
                rounded, slope = add_uniform_noise(state.canvas, noise.draw())
            else:
                temperature, sigma = _linear(stage.temperature, position), _linear(stage.sigma, position)
                rounded, slope = soft_round_with_noise(state.canvas, noise.draw(), temperature, sigma)
            rounded *= self.layout.mask
            grid_bits = GridBits(rounded, networks, self.architecture, self.layout)
            synthesis = Synthesis(rounded, networks, self.architecture, self.layout)
            errors = synthesis.latents - targets
            distortions = errors.square().mean((1, 2, 3))
            losses = distortions + prices * grid_bits.bits

            torch.mul(self.packing.bits_gradient(state.vectors), prices[:, None], out=to_vectors)
            to_canvas.zero_()
            grid_bits.backward(prices, to_networks, to_canvas)
            synthesis.backward(errors.mul_(2 / errors[0].numel()), to_networks, to_canvas)
            to_canvas *= self.layout.mask
            if slope is not None:
                to_canvas *= slope
            state.steps += 1
            _adam(state.canvas, to_canvas, state.moments[:2], state.steps, _cosine(stage.grid_rate, position))
            if not fixed:
                _adam(state.vectors, to_vectors, state.moments[2:], state.steps, _cosine(stage.network_rate, position))
            if iteration % REPORT_EVERY == 0 or iteration + 1 == iterations:
                state.losses = losses.cpu()
                self.last = Progress(
                    name,
                    self.done + (iteration + 1) * self.share(state),
                    self.preset.iterations,
                    grid_bits.bits.mean().item() / self.pixels,
                    distortions.mean().item(),
                )
                self.report(self.last)
        self.done += iterations * self.share(state)

    def share(self, state: _State) -> int:
        """Candidates that are trained for each latent."""
        return len(state.canvas) // len(self.latents)

    def quantize(self, state: _State) -> list[list[Parameters]]:
        """The networks as integers, for the grids as they round now."""
        return [
            quantize_networks(
                {name: values[i : i + 1] for name, values in self.packing.split(state.vectors).items()},
                state.canvas[i : i + 1].round(),
                self.latents[i : i + 1],
                self.architecture,
                self.layout,
                self.lmbdas[i] / self.pixels,
                lambda: self.report(replace(self.last, stage="networks")),
            )
            for i in range(len(self.latents))
        ]


class _Noise:
    """Random numbers for the functions of a state: windows of a pool that is drawn once, as drawing takes long."""

    POOL = 16  # canvases

    def __init__(self, state: _State, rounding: str, shape: torch.Size) -> None:
        if rounding != "hard":
            draw = torch.rand if rounding == "uniform" else torch.randn
            count = self.POOL * shape.numel()
            pools = [draw(count, generator=generator, device=generator.device) for generator in state.generators]
            self._pool = torch.stack(pools)
        self._shape = shape
        self._random = random.Random(state.steps)

    def draw(self) -> torch.Tensor:
        """(batch, *shape)."""
        start = self._random.randrange((self.POOL - 1) * self._shape.numel())
        return self._pool[:, start : start + self._shape.numel()].unflatten(1, self._shape)


def _adam(values: torch.Tensor, gradient: torch.Tensor, moments: list[torch.Tensor], steps: int, rate: float) -> None:
    """One step of Adam (Kingma and Ba, 2015), in place."""
    mean, square = moments
    mean.lerp_(gradient, 1 - BETAS[0])
    square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    scale = math.sqrt(1 - BETAS[1] ** steps)
    values.addcdiv_(mean, square.sqrt().add_(1e-8 * scale), value=-rate * scale / (1 - BETAS[0] ** steps))


def _cosine(rates: tuple[float, float], position: float) -> float:
    return rates[1] + (rates[0] - rates[1]) * 0.5 * (1 + math.cos(math.pi * position))


def _linear(values: tuple[float, float], position: float) -> float:
    return values[0] + (values[1] - values[0]) * position


def _start_from_principal_components(
    latent: torch.Tensor,
    finest_grids: torch.Tensor,
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
    finest = min(len(finest_grids), channels, first.channels)
    finest_grids[:finest] = (components[:, :finest].T @ (flat - mean) / step).view(finest, height, width)
    centre = first.kernel // 2
    for number in range(weight.shape[1]):
        component = number if number < len(finest_grids) else (number - len(finest_grids)) % channels
        if component < channels:
            weight[:channels, number, centre, centre] = components[: len(weight), component] * step
    networks["synthesis.bias"][:channels] = mean[:, 0]
