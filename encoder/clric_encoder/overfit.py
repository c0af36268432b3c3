"""The training loop: a latent becomes a function under distortion + lambda * rate (paper, III-D and IV-A3)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from clric_decoder.bitstream import Architecture
from clric_decoder.context import MAX_VALUE
from clric_decoder.networks import Parameters

from . import parts
from .canvas import Canvas
from .control import RateControl, principal_step
from .function import GridBits, Networks, Packing, add_gradients, compiled, kernels
from .optimizer import Adam, Soap
from .parameters import as_networks, quantize_networks
from .presets import Preset, Stage
from .quantizer import add_uniform_noise, round_straight_through, soft_round_with_noise

REPORT_EVERY = 10  # iterations between two reports: each waits for the device
CONTROLS = 100  # corrections of lambda in a stage, for a target
LOOK = 0.35  # when in a stage the cost of the networks is looked at, for a target

# What brings a file to its target in the end: the grids alone, at rates that move some of them over a rounding boundary
FINISHING = Stage(20, "soft", (0.0, 0.0), (0.004, 0.0008), (0.06, 0.04), (0.16, 0.15), fixed=True)
FINISHING_ROUNDS = 10

# Times that a latent is trained at most, to meet its target.
CHANCES = 6


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
    """An overfitted function, quantised: grids (channels, height, width) int32, the finest first, and networks.

    lmbda: what its training ended with, before its size was brought to a target.
    """

    architecture: Architecture
    grids: list[np.ndarray]
    networks: list[Parameters]
    lmbda: float


@dataclass(frozen=True)
class Targets:
    """Sizes of files that training aims at instead of a given lambda.

    sizes: bytes, one for each latent. measure: the size in bytes of the file of a function, by the latent's number.
    """

    sizes: Sequence[int]
    measure: Callable[[Function, int], int]

    def pick(self, indices: list[int]) -> Targets:
        """Those of some of the latents."""
        return Targets([self.sizes[i] for i in indices], lambda function, i: self.measure(function, indices[i]))


@dataclass
class _State:
    """Functions in training: grids and parameters, their optimisers, and a stream of random numbers each.

    canvas: (batch, rows, stride). vectors: (batch, parameters). owners: the number of the latent that each is of.
    losses: (batch,), the last.
    """

    canvas: torch.Tensor
    vectors: torch.Tensor
    generators: list[torch.Generator]
    owners: list[int]
    losses: torch.Tensor
    grid_optimizer: Adam
    network_optimizer: Adam

    def pick(self, indices: list[int]) -> _State:
        """Some of the functions, as they are."""
        return _State(
            self.canvas[indices],
            self.vectors[indices],
            [self.generators[i] for i in indices],
            [self.owners[i] for i in indices],
            self.losses[indices],
            self.grid_optimizer.pick(indices),
            self.network_optimizer.pick(indices),
        )


def overfit(
    latents: np.ndarray,
    lmbdas: Sequence[float],
    pixels: Sequence[int],
    preset: Preset,
    *,
    targets: Targets | None = None,
    seed: int = 0,
    device: str = "cpu",
    report: Report | None = None,
) -> list[Function]:
    """The functions of latents (batch, C, h, w) float32 that are lowest in latent MSE + lmbda * bits / pixels.

    lmbdas: one for each latent, not used with ``targets``. pixels: of each image, for the rate.
    A latent's function depends on its neighbours in the batch no further than by the order of float summation. The
    same arguments give the same functions on the same CPU, versions and number of threads.
    """
    if not compiled(torch.device(device)):
        return _overfit(latents, lmbdas, pixels, preset, targets, seed, device, report)
    threads = torch.get_num_threads()
    count = min(threads, len(latents)) if parts.possible() else 1
    bounds = [-(-len(latents) * part // count) for part in range(count + 1)]  # the first, which reports, has most

    def train(part: int, check: Callable[[], None]) -> list[Function]:
        own = list(range(bounds[part], bounds[part + 1]))

        def tell(progress: Progress) -> None:
            check()
            if part == 0 and report is not None:
                report(progress)

        own_targets = targets and targets.pick(own)
        own_lmbdas, own_pixels = [lmbdas[i] for i in own], [pixels[i] for i in own]
        with kernels.own_threads(threads // count + (part < threads % count)):
            return _overfit(latents[own], own_lmbdas, own_pixels, preset, own_targets, seed, device, tell)

    with kernels.without_torch_threads():
        return parts.run(train, count)


def _overfit(
    latents: np.ndarray,
    lmbdas: Sequence[float],
    pixels: Sequence[int],
    preset: Preset,
    targets: Targets | None,
    seed: int,
    device: str,
    report: Report | None,
) -> list[Function]:
    if targets is None:
        trainer = _Trainer(latents, lmbdas, pixels, preset, None, device, report)
        return trainer.functions(*trainer.run(seed, None))
    # More than one chance for targets that are missed, each with what the networks cost in the one before
    functions: list[Function] = []
    missed, control = list(range(len(latents))), RateControl(targets.sizes)
    for _ in range(CHANCES):
        part = targets.pick(missed)
        own_lmbdas, own_pixels = [lmbdas[i] for i in missed], [pixels[i] for i in missed]
        trainer = _Trainer(latents[missed], own_lmbdas, own_pixels, preset, control, device, report)
        trainer.done = preset.iterations if functions else 0  # a second chance is not foreseen
        latest = trainer.functions(*trainer.run(seed, part))
        functions = functions or list(latest)
        sizes = [part.measure(function, i) for i, function in enumerate(latest)]
        for i, function, size in zip(missed, latest, sizes, strict=True):
            if _is_nearer(size, targets.measure(functions[i], i), targets.sizes[i]):
                functions[i] = function
        again = control.missed(sizes, trainer.first_lmbdas)
        if not again:
            break
        control = control.restart(again, [latest[i].networks for i in again], [sizes[i] for i in again])
        missed = [missed[i] for i in again]
    return functions


def _is_nearer(size: int, other: int, limit: int) -> bool:
    """Whether a size is better than another: within the limit the larger one, beyond it the smaller one."""
    return (size > other) if max(size, other) <= limit else (size < other)


class _Trainer:
    """What stays the same over all candidates and stages of one encode, and the lambdas, which may move."""

    def __init__(
        self,
        latents: np.ndarray,
        lmbdas: Sequence[float],
        pixels: Sequence[int],
        preset: Preset,
        control: RateControl | None,
        device: str,
        report: Report | None,
    ):
        self.device = torch.device(device)
        self.latents = torch.from_numpy(latents).to(self.device)
        self.lmbdas = torch.tensor(lmbdas, device=self.device)
        self.pixels = torch.tensor(pixels, device=self.device)
        self.preset = preset
        self.architecture = preset.architecture(latents.shape[1])
        self.layout = Canvas(self.architecture, latents.shape[2], latents.shape[3], self.device)
        self.packing = Packing(self.architecture, self.device)
        self.control = control
        if control is not None:
            self.lmbdas = control.first_lambdas(self.latents, self.pixels, sum(self.packing.sizes))
        self.first_lmbdas = self.lmbdas.clone()
        self.trained_lmbdas = self.lmbdas  # those of `finish` are of a few iterations only
        self.report = report or (lambda progress: None)
        self.done = 0
        self.last = Progress("start", 0, preset.iterations, 0.0, 0.0)

    def run(self, seed: int, targets: Targets | None) -> tuple[_State, list[list[Parameters]]]:
        """The whole training: functions with rounded networks, and these as integers."""
        state = self.best_start(seed)
        networks: list[list[Parameters]] = []
        for number, stage in enumerate(self.preset.stages):
            if stage.fixed and not networks:
                networks = self.quantize(state)
                if self.control is not None:
                    self.control.know_networks(networks)
                state.vectors = self.packing.join(as_networks(networks, self.device))
                state.grid_optimizer = Adam(state.canvas, self.preset.betas)
            self.train(state, stage, f"stage {number + 1} of {len(self.preset.stages)}", stage.iterations)
        networks = networks or self.quantize(state)
        if targets is not None:
            state.vectors = self.packing.join(as_networks(networks, self.device))
            self.finish(state, networks, targets)
        return state, networks

    def best_start(self, seed: int) -> _State:
        """The state that the main training begins with: for each latent, the winner of the warm-up's candidates."""
        rounds = self.preset.warm_up
        count = max([warm_up.candidates for warm_up in rounds], default=1)
        owners = [owner for owner in range(len(self.latents)) for _ in range(count)]
        state = self.start(owners, [seed * 1000 + number for _ in self.latents for number in range(count)])
        for number, warm_up in enumerate(rounds):
            state = self.best(state, warm_up.candidates)
            self.train(state, self.preset.stages[0], f"warm-up {number + 1} of {len(rounds)}", warm_up.iterations)
        return self.best(state, 1)

    def best(self, state: _State, count: int) -> _State:
        """The `count` functions of lowest loss of each latent."""
        losses = state.losses.tolist()
        kept = []
        for owner in range(len(self.latents)):
            own = [i for i in range(len(losses)) if state.owners[i] == owner]
            kept += sorted(own, key=losses.__getitem__)[:count]
        return state.pick(kept)

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
                    self.lmbdas[owner].item(),
                    int(self.pixels[owner]),
                )
        betas = self.preset.betas
        by_group = self.preset.network_optimizer == "soap"
        network_optimizer = Soap(vectors, betas, self.packing.groups) if by_group else Adam(vectors, betas)
        return _State(
            canvas, vectors, generators, owners, torch.zeros(len(owners)), Adam(canvas, betas), network_optimizer
        )

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

    def train(self, state: _State, stage: Stage, name: str, iterations: int) -> None:
        """Some iterations of a stage; `state` is changed in place."""
        targets, pixels = self.latents[state.owners], self.pixels[state.owners]
        noise = _Noise(state, stage.rounding, self.layout.mask.shape)
        to_canvas, to_vectors = torch.empty_like(state.canvas), torch.empty_like(state.vectors)
        networks, to_networks = self.packing.split(state.vectors), self.packing.split(to_vectors)
        pause = max(1, stage.iterations // CONTROLS)
        for iteration in range(iterations):
            position = iteration / stage.iterations
            if self.control is not None and iteration % pause == 0:
                self.steer(state, networks, stage, iteration, pause)
            if self.control is not None and iteration == int(LOOK * stage.iterations) and not stage.fixed:
                self.control.know_networks(self.quantize(state, refined=False))
            prices = self.lmbdas[state.owners] / pixels
            if stage.rounding == "hard":
                rounded, slope = round_straight_through(state.canvas)
            elif stage.rounding == "uniform":
                rounded, slope = add_uniform_noise(state.canvas, noise.draw())
            else:
                temperature, sigma = _linear(stage.temperature, position), _linear(stage.sigma, position)
                soft_round = kernels.soft_round_with_noise if compiled(self.device) else soft_round_with_noise
                rounded, slope = soft_round(state.canvas, noise.draw(), temperature, sigma)
            rounded *= self.layout.mask
            torch.mul(self.packing.bits_gradient(state.vectors), prices[:, None], out=to_vectors)
            to_canvas.zero_()
            distortions, bits = add_gradients(
                rounded, networks, self.architecture, self.layout, targets, prices, to_networks, to_canvas
            )
            to_canvas *= self.layout.mask
            if slope is not None:
                to_canvas *= slope
            state.grid_optimizer.step(state.canvas, to_canvas, _cosine(stage.grid_rate, position))
            if not stage.fixed:
                state.network_optimizer.step(state.vectors, to_vectors, _cosine(stage.network_rate, position))
            if iteration % REPORT_EVERY == 0 or iteration + 1 == iterations:
                state.losses = (distortions + prices * bits).cpu()
                self.last = Progress(
                    name,
                    min(self.done + (iteration + 1) * self.share(state), self.preset.iterations),
                    self.preset.iterations,
                    (bits / pixels).mean().item(),
                    distortions.mean().item(),
                )
                self.report(self.last)
        self.done += iterations * self.share(state)

    def share(self, state: _State) -> int:
        """Candidates that are trained for each latent."""
        return len(state.canvas) // len(self.latents)

    def steer(self, state: _State, networks: Networks, stage: Stage, iteration: int, pause: int) -> None:
        """Move the lambdas by what the grids would cost if they were rounded now. pause: iterations since the last."""
        assert self.control is not None
        bits = GridBits(state.canvas.round(), networks, self.architecture, self.layout).bits
        lambdas = self.lmbdas[state.owners]
        self.lmbdas[state.owners] = self.control.next_lambdas(
            lambdas, bits, state.owners, iteration, stage.iterations, pause
        )

    def quantize(self, state: _State, refined: bool = True) -> list[list[Parameters]]:
        """The networks as integers, for the grids as they round now."""
        return quantize_networks(
            self.packing.split(state.vectors),
            state.canvas.round(),
            self.latents,
            self.architecture,
            self.layout,
            self.lmbdas / self.pixels,
            lambda: self.report(replace(self.last, stage="networks")),
            refined,
        )

    def functions(self, state: _State, networks: list[list[Parameters]]) -> list[Function]:
        canvas = state.canvas.round().clamp(-MAX_VALUE, MAX_VALUE)
        grids = [grid.cpu().numpy().astype(np.int32) for grid in self.layout.split(canvas)]
        return [
            Function(self.architecture, [grid[i] for grid in grids], networks[owner], self.trained_lmbdas[owner].item())
            for i, owner in enumerate(state.owners)
        ]

    def finish(self, state: _State, networks: list[list[Parameters]], targets: Targets) -> None:
        """Train the grids of files that miss their targets a little further, until they meet them."""
        control, self.control = self.control, None
        assert control is not None
        self.trained_lmbdas = self.lmbdas.clone()
        kept, best = state.canvas.clone(), [0] * len(state.canvas)
        for number in range(FINISHING_ROUNDS + 1):
            sizes = [targets.measure(function, i) for i, function in enumerate(self.functions(state, networks))]
            for i, size in enumerate(sizes):
                if not number or _is_nearer(size, best[i], targets.sizes[i]):
                    best[i], kept[i] = size, state.canvas[i]
            missed = control.missed(sizes, self.lmbdas)
            if not missed or number == FINISHING_ROUNDS:
                break
            self.lmbdas[missed] = control.last_lambdas(self.lmbdas, sizes)[missed]
            picked = state.pick(missed)
            picked.grid_optimizer = Adam(picked.canvas, self.preset.betas)
            self.train(picked, FINISHING, "size", FINISHING.iterations)
            state.canvas[missed] = picked.canvas
        state.canvas = kept


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
        self._random = random.Random(0)

    def draw(self) -> torch.Tensor:
        """(batch, *shape)."""
        start = self._random.randrange((self.POOL - 1) * self._shape.numel())
        return self._pool[:, start : start + self._shape.numel()].unflatten(1, self._shape)


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
    step = principal_step(lmbda, latent.numel(), pixels)

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
