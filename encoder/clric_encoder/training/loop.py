"""The training loop: a latent becomes a function under distortion + lambda * rate (paper, III-D and IV-A3).

Training has two parts. The first fits functions to the latents of a VAE. The second, where an image decoder is given,
goes on with them on the loss of the image that this decoder paints (`distortion.ImageDistortion`), at the size in bytes
that the first has come to or that was asked for.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from clric_decoder.bitstream import Architecture
from clric_decoder.context import MAX_VALUE
from clric_decoder.networks import Parameters

from ..model.backends import TORCH, Networks, Scalar, backend_for
from ..model.function import Packing, Synthesis, grid_bits
from ..model.grid_layout import GridLayout
from ..network_quantization import as_networks, quantize_networks
from . import process_pool
from .cuda_graph import CudaGraph
from .distortion import Distortion, ImageDistortion, LatentError
from .optimizers import Adam, Soap
from .presets import Preset, Stage
from .rate_control import GOAL, IMAGE, LATENT, MIN_FILL, RateControl, can_move, principal_step
from .rounding import add_uniform_noise, round_straight_through

REPORT_EVERY = 10  # iterations between two reports: each waits for the device
CAPTURED_FROM = 50  # the fewest iterations that are worth the capture of a CUDA graph
CONTROLS = 100  # corrections of lambda in a stage, for a target
NETWORK_BITS_CHECK_AT = 0.35  # when in a stage the cost of the networks is looked at, for a target

# What brings a file to its target in the end: the grids alone, at rates that move some of them over a rounding boundary
# (higher ones bring in values that it takes hundreds of iterations to be rid of)
FINISHING = Stage(20, "soft", (0.0, 0.0), (0.004, 0.0008), (0.06, 0.04), (0.16, 0.15), fixed=True)
FINISHING_ROUNDS = 10
BISECTIONS = 10  # between grids that are too small and those that are too large

# Lambda of the training on images as a multiple of that on latents, and what it leaves of a file, about: more than that
# at rates above 0.2 bpp. Where a size is missed, all starts again with what it left.
TUNING_LAMBDA, TUNING_GAIN, TUNING_RETRIES = 1.5, 0.95, 3

# Seeds of candidates are below.
TUNING_SEED = 500

# Times that a latent is trained at most, to meet its target.
MAX_RETRIES = 6


@dataclass(frozen=True)
class Progress:
    """Where an encode stands: bpp and distortion (latent MSE, or its equivalent) are estimates."""

    stage: str
    iteration: int
    iterations: int
    bpp: float
    distortion: float


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Function:
    """An overfitted function, quantised: grids (channels, height, width) int32, the finest first, and networks.

    lmbda: what its training on the latent ended with, before its size was brought to a target.
    """

    architecture: Architecture
    grids: list[np.ndarray]
    networks: list[Parameters]
    lmbda: float


# The size in bytes of the file of a function, by the latent's number.
Measure = Callable[[Function, int], int]


@dataclass(frozen=True)
class _Trained:
    """A function as the training on the latent leaves it.

    packed: (rows, stride), not rounded. vector: (parameters,), not quantised.
    """

    function: Function
    packed: np.ndarray
    vector: np.ndarray


@dataclass
class _State:
    """Functions in training: grids and parameters, their optimisers, and a stream of random numbers each.

    packed: (batch, rows, stride). vectors: (batch, parameters). owners: the number of the latent that each is of.
    losses: (batch,), the last.
    """

    packed: torch.Tensor
    vectors: torch.Tensor
    generators: list[torch.Generator]
    owners: list[int]
    losses: torch.Tensor
    grid_optimizer: Adam
    network_optimizer: Adam

    def pick(self, indices: list[int]) -> _State:
        """Some of the functions, as they are."""
        return _State(
            self.packed[indices],
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
    measure: Measure,
    sizes: Sequence[int] | None = None,
    image: ImageDistortion | None = None,
    seed: int = 0,
    device: str = "cpu",
    report: Report | None = None,
) -> list[Function]:
    """The functions of latents (batch, C, h, w) float32 that are lowest in distortion + lambda * bits / pixels.

    lmbdas: one for each latent, for latent MSE; not used with ``sizes``. pixels: of each image, for the rate. sizes:
    bytes of each file, which training aims at instead of a given lambda. image: the loss of the images, on which the
    functions are trained after the latents are met, to files that are no larger than before (or of the sizes).
    A latent's function depends on its neighbours in the batch no further than by the order of float summation. The
    same arguments give the same functions on the same CPU, versions and number of threads.
    """
    everything = range(len(latents))
    if image is not None:
        preset = preset.shortened()

    def on_latents(numbers: Sequence[int], goals: Sequence[int] | None) -> list[_Trained]:
        """goals: sizes in bytes of these numbers' files."""
        problem = (
            latents[list(numbers)],
            [lmbdas[i] for i in numbers],
            [pixels[i] for i in numbers],
            lambda function, i: measure(function, numbers[i]),
            goals,
        )
        return _train_side_by_side(*problem, preset, seed, device, tell)

    total = preset.iterations + (0 if image is None else preset.tuning.iterations)
    furthest = 0

    def tell(progress: Progress) -> None:
        nonlocal furthest
        furthest = max(furthest, progress.iteration)  # trainings that are made again are not foreseen
        if report is not None:
            report(replace(progress, iteration=furthest, iterations=total))

    if image is None:
        return [own.function for own in on_latents(everything, sizes)]
    results: list[Function | None] = [None for _ in everything]
    gains, missed = [TUNING_GAIN for _ in everything], list(everything)
    for _ in range(TUNING_RETRIES):
        goals = None if sizes is None else [round(sizes[i] / gains[i]) for i in missed]
        trained = on_latents(missed, goals)
        limits = [
            measure(own.function, i) if sizes is None else sizes[i] for own, i in zip(trained, missed, strict=True)
        ]
        control = RateControl(limits, IMAGE, at_most=sizes is None)
        numbers = missed

        def own_measure(function: Function, i: int, numbers: Sequence[int] = numbers) -> int:
            return measure(function, numbers[i])

        own_pixels = [pixels[i] for i in missed]
        with backend_for(torch.device(device)).threads(torch.get_num_threads()):
            tuned, left = _train_on_images(
                trained, image.pick(missed), own_pixels, preset, control, limits, own_measure, seed, device, tell
            )
        lmbda_can_move = []
        for i, before, after, own_left, limit in zip(missed, trained, tuned, left, limits, strict=True):
            size, best = measure(after, i), results[i]
            if sizes is None:
                # What was asked for is met by the function that was there before
                results[i] = after if size <= limit else before.function
                continue
            if best is None or _is_nearer(size, measure(best, i), limit):
                results[i] = after
            gains[i] = own_left / measure(before.function, i)
            if not MIN_FILL * limit <= size <= limit and can_move(before.function.lmbda):
                lmbda_can_move.append(i)
        missed = lmbda_can_move
        if not missed:
            break
    return [result for result in results if result is not None]


def _train_side_by_side(
    latents: np.ndarray,
    lmbdas: Sequence[float],
    pixels: Sequence[int],
    measure: Measure,
    sizes: Sequence[int] | None,
    preset: Preset,
    seed: int,
    device: str,
    report: Report,
) -> list[_Trained]:
    """`_train_on_latents` of parts of a batch. Not on a GPU, which works on all of it at once."""
    backend = backend_for(torch.device(device))
    threads = torch.get_num_threads()
    count = min(threads, len(latents)) if backend is not TORCH and process_pool.possible() else 1
    bounds = [-(-len(latents) * part // count) for part in range(count + 1)]  # the first, which reports, has most

    def train(part: int, check: Callable[[], None]) -> list[_Trained]:
        own = list(range(bounds[part], bounds[part + 1]))

        def tell(progress: Progress) -> None:
            check()
            if part == 0:
                report(progress)

        with backend.threads(threads // count + (part < threads % count)):
            return _train_on_latents(
                latents[own],
                [lmbdas[i] for i in own],
                [pixels[i] for i in own],
                preset,
                lambda function, i: measure(function, own[i]),
                None if sizes is None else [sizes[i] for i in own],
                seed,
                device,
                tell,
            )

    return process_pool.run(train, count)


def _train_on_latents(
    latents: np.ndarray,
    lmbdas: Sequence[float],
    pixels: Sequence[int],
    preset: Preset,
    measure: Measure,
    sizes: Sequence[int] | None,
    seed: int,
    device: str,
    report: Report | None,
) -> list[_Trained]:
    distortion = LatentError(torch.from_numpy(latents).to(device))
    if sizes is None:
        trainer = _Trainer(distortion, lmbdas, pixels, preset, None, device, report)
        return trainer.results(*trainer.run(seed, None, None))
    # More than one chance for targets that are missed, each with what the networks cost in the one before
    results: list[_Trained] = []
    missed, control = list(range(len(latents))), RateControl(sizes, LATENT)
    for _ in range(MAX_RETRIES):
        own_lmbdas, own_pixels = [lmbdas[i] for i in missed], [pixels[i] for i in missed]
        own_sizes, numbers = [sizes[i] for i in missed], missed

        def own_measure(function: Function, i: int, numbers: list[int] = numbers) -> int:
            return measure(function, numbers[i])

        own_distortion = LatentError(distortion.targets[missed])
        trainer = _Trainer(own_distortion, own_lmbdas, own_pixels, preset, control, device, report)
        trainer.done = preset.iterations if results else 0  # a second chance is not foreseen
        latest = trainer.results(*trainer.run(seed, own_sizes, own_measure))
        results = results or list(latest)
        latest_sizes = [own_measure(result.function, i) for i, result in enumerate(latest)]
        for i, result, size in zip(missed, latest, latest_sizes, strict=True):
            if _is_nearer(size, measure(results[i].function, i), sizes[i]):
                results[i] = result
        again = control.missed(latest_sizes, trainer.first_lmbdas)
        if not again:
            break
        networks = [latest[i].function.networks for i in again]
        control = control.restart(again, networks, [latest_sizes[i] for i in again])
        missed = [missed[i] for i in again]
    return results


def _train_on_images(
    trained: Sequence[_Trained],
    image: ImageDistortion,
    pixels: Sequence[int],
    preset: Preset,
    control: RateControl,
    sizes: Sequence[int],
    measure: Measure,
    seed: int,
    device: str,
    report: Report,
) -> tuple[list[Function], list[int]]:
    """Goes on with functions on the loss of their images: new ones, and their bytes before these were corrected."""
    lmbdas = [own.function.lmbda for own in trained]
    trainer = _Trainer(image, [TUNING_LAMBDA * lmbda for lmbda in lmbdas], pixels, preset, control, device, report)
    control.know_networks([own.function.networks for own in trained])
    packed, vectors = (
        torch.from_numpy(np.stack(arrays)).to(device)
        for arrays in ([own.packed for own in trained], [own.vector for own in trained])
    )
    generators = [torch.Generator(trainer.device).manual_seed(seed * 1000 + TUNING_SEED) for _ in trained]
    state = trainer.state(packed, vectors, list(range(len(trained))), generators)
    trainer.done, trainer.total = preset.iterations, preset.iterations + preset.tuning.iterations
    trainer.train(state, preset.tuning, "tuning", preset.tuning.iterations)
    # Networks are quantised against what they give. Against the moved target they would be fitted to one gradient
    image.targets = trainer.latents(state)
    networks = trainer.quantize(state)
    state.vectors = trainer.packing.join(as_networks(networks, trainer.device))
    left = trainer.finish(state, networks, sizes, measure)
    functions = trainer.functions(state, networks)
    return [replace(function, lmbda=lmbda) for function, lmbda in zip(functions, lmbdas, strict=True)], left


def _is_nearer(size: int, other: int, limit: int) -> bool:
    """Whether a size is better than another: within the limit the larger one, beyond it the smaller one."""
    return (size > other) if max(size, other) <= limit else (size < other)


class _Trainer:
    """What stays the same over all candidates and stages of one encode, and the lambdas, which may move."""

    def __init__(
        self,
        distortion: Distortion,
        lmbdas: Sequence[float],
        pixels: Sequence[int],
        preset: Preset,
        control: RateControl | None,
        device: str,
        report: Report | None,
    ):
        self.device = torch.device(device)
        self.backend = backend_for(self.device)
        self.distortion = distortion
        self.lmbdas = torch.tensor(lmbdas, device=self.device)
        self.pixels = torch.tensor(pixels, device=self.device)
        self.preset = preset
        _, channels, height, width = distortion.targets.shape
        self.architecture = preset.architecture(channels)
        self.layout = GridLayout(self.architecture, height, width, self.device)
        self.packing = Packing(self.architecture, self.device)
        self.control = control
        if control is not None:
            parameters = sum(self.packing.sizes)
            self.lmbdas = control.first_lambdas(self.lmbdas, distortion.targets, self.pixels, parameters)
        self.first_lmbdas = self.lmbdas.clone()
        self.trained_lmbdas = self.lmbdas  # those of `finish` are of a few iterations only
        self.report = report or (lambda progress: None)
        self.done, self.total = 0, preset.iterations
        self.last = Progress("start", 0, self.total, 0.0, 0.0)

    def run(
        self, seed: int, sizes: Sequence[int] | None, measure: Measure | None
    ) -> tuple[_State, list[list[Parameters]]]:
        """The whole training on latents: functions, and their networks as integers. sizes: to be met in the end."""
        state = self.best_start(seed)
        networks: list[list[Parameters]] = []
        for number, stage in enumerate(self.preset.stages):
            if stage.fixed and not networks:
                networks = self.quantize(state)
                if self.control is not None:
                    self.control.know_networks(networks)
                state.vectors = self.packing.join(as_networks(networks, self.device))
                state.grid_optimizer = Adam(state.packed, self.preset.betas)
            self.train(state, stage, f"training {number + 1}/{len(self.preset.stages)}", stage.iterations)
        networks = networks or self.quantize(state)
        if sizes is not None and measure is not None:
            state.vectors = self.packing.join(as_networks(networks, self.device))
            self.finish(state, networks, sizes, measure)
        return state, networks

    def best_start(self, seed: int) -> _State:
        """The state that the main training begins with: for each latent, the winner of the warm-up's candidates."""
        rounds = self.preset.warm_up
        count = max([warm_up.candidates for warm_up in rounds], default=1)
        owners = [owner for owner in range(len(self.distortion.targets)) for _ in range(count)]
        state = self.start(owners, [seed * 1000 + number for _ in self.pixels for number in range(count)])
        for number, warm_up in enumerate(rounds):
            state = self.best(state, warm_up.candidates)
            self.train(state, self.preset.stages[0], f"warm-up {number + 1}/{len(rounds)}", warm_up.iterations)
        return self.best(state, 1)

    def best(self, state: _State, count: int) -> _State:
        """The `count` functions of lowest loss of each latent."""
        losses = state.losses.tolist()
        kept = []
        for owner in range(len(self.distortion.targets)):
            own = [i for i in range(len(losses)) if state.owners[i] == owner]
            kept += sorted(own, key=losses.__getitem__)[:count]
        return state.pick(kept)

    def start(self, owners: list[int], seeds: list[int]) -> _State:
        generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        vectors = torch.stack([self.random_vector(generator) for generator in generators])
        packed = torch.zeros(len(owners), self.layout.rows, self.layout.stride, device=self.device)
        if self.preset.start == "principal":
            for number, owner in enumerate(owners):
                _start_from_principal_components(
                    self.distortion.targets[owner],
                    self.layout.split(packed[number : number + 1])[0][0],
                    {name: values[0] for name, values in self.packing.split(vectors[number : number + 1]).items()},
                    self.architecture,
                    self.lmbdas[owner].item(),
                    int(self.pixels[owner]),
                )
        return self.state(packed, vectors, owners, generators)

    def state(
        self, packed: torch.Tensor, vectors: torch.Tensor, owners: list[int], generators: list[torch.Generator]
    ) -> _State:
        """Functions with new optimisers."""
        betas = self.preset.betas
        by_group = self.preset.network_optimizer == "soap"
        network_optimizer = Soap(vectors, betas, self.packing.groups) if by_group else Adam(vectors, betas)
        losses = torch.zeros(len(owners))
        return _State(packed, vectors, generators, owners, losses, Adam(packed, betas), network_optimizer)

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
        owners = torch.tensor(state.owners, device=self.device)
        pixels = self.pixels[owners]
        noise = _Noise(state, stage.rounding, self.layout.mask.shape)
        networks = self.packing.split(state.vectors)
        eager = self.iteration(state, stage, owners)
        iterate = CudaGraph(eager) if self.device.type == "cuda" and iterations >= CAPTURED_FROM else eager
        pause = max(1, stage.iterations // CONTROLS)
        for iteration in range(iterations):
            position = iteration / stage.iterations
            if self.control is not None and iteration % pause == 0:
                self.steer(state, networks, stage, iteration, pause)
            check_networks = int(NETWORK_BITS_CHECK_AT * stage.iterations)
            if self.control is not None and iteration == check_networks and not stage.fixed:
                self.control.know_networks(self.quantize(state, refined=False))
            rate_weights = self.lmbdas[owners] / pixels
            scalars = [_linear(stage.temperature, position), _linear(stage.sigma, position)]
            scalars += state.grid_optimizer.advance(_cosine(stage.grid_rate, position))
            if not stage.fixed:
                scalars += state.network_optimizer.advance(_cosine(stage.network_rate, position))
            changing = rate_weights, noise.draw(), self.backend.scalars(scalars, self.device)
            if stage.look_every and iteration % stage.look_every == 0:
                distortions, bits = eager(*changing, look=True)
            else:
                distortions, bits = iterate(*changing)
            if iteration % REPORT_EVERY == 0 or iteration + 1 == iterations:
                state.losses = (distortions + rate_weights * bits).cpu()
                self.last = Progress(
                    name,
                    min(self.done + (iteration + 1) * self.share(state), self.total),
                    self.total,
                    (bits / pixels).mean().item(),
                    distortions.mean().item(),
                )
                self.report(self.last)
        self.done += iterations * self.share(state)

    def iteration(self, state: _State, stage: Stage, owners: torch.Tensor) -> Callable[..., tuple[torch.Tensor, ...]]:
        """What an iteration does to `state`, as a function of what changes from one to the next.

        All else that it reads and writes are tensors that stay where they are, so that `CudaGraph` can replay it.
        """
        grad_packed, grad_vectors = torch.empty_like(state.packed), torch.empty_like(state.vectors)
        networks, grad_networks = self.packing.split(state.vectors), self.packing.split(grad_vectors)

        def iterate(
            rate_weights: torch.Tensor, noise: torch.Tensor, scalars: Iterable[Scalar], look: bool = False
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """scalars: temperature, sigma, and the optimisers' lengths and epsilons. Gives distortions and bits."""
            temperature, sigma, *steps = scalars
            if stage.rounding == "hard":
                rounded, slope = round_straight_through(state.packed)
            elif stage.rounding == "uniform":
                rounded, slope = add_uniform_noise(state.packed, noise)
            else:
                rounded, slope = self.backend.soft_round_with_noise(state.packed, noise, temperature, sigma)
            rounded *= self.layout.mask
            torch.mul(self.packing.bits_gradient(state.vectors), rate_weights[:, None], out=grad_vectors)
            grad_packed.zero_()
            counted = grid_bits(rounded, networks, self.architecture, self.layout, rate_weights)
            synthesis = Synthesis(rounded, networks, self.architecture, self.layout)
            if look:
                self.distortion.look(synthesis.latents, state.owners)
            errors = synthesis.latents - self.distortion.targets[owners]
            distortions = errors.square().mean((1, 2, 3))
            synthesis.backward(errors.mul_(2 / errors[0].numel()), grad_networks, grad_packed)
            counted.backward(grad_networks, grad_packed)  # last, as it may have been computed meanwhile
            grad_packed.mul_(self.layout.mask)
            if slope is not None:
                grad_packed.mul_(slope)
            state.grid_optimizer.move(state.packed, grad_packed, *steps[:2])
            if not stage.fixed:
                state.network_optimizer.move(state.vectors, grad_vectors, *steps[2:])
            return distortions, counted.bits

        return iterate

    def share(self, state: _State) -> int:
        """Candidates that are trained for each latent."""
        return len(state.packed) // len(self.distortion.targets)

    def steer(self, state: _State, networks: Networks, stage: Stage, iteration: int, pause: int) -> None:
        """Move the lambdas by what the grids would cost if they were rounded now. pause: iterations since the last."""
        assert self.control is not None
        bits = grid_bits(state.packed.round(), networks, self.architecture, self.layout).bits
        lambdas = self.lmbdas[state.owners]
        self.lmbdas[state.owners] = self.control.next_lambdas(
            lambdas, bits, state.owners, iteration, stage.iterations, pause
        )

    def latents(self, state: _State) -> torch.Tensor:
        """What functions give with rounded grids, (batch, C, h, w)."""
        networks = self.packing.split(state.vectors)
        return Synthesis(state.packed.round(), networks, self.architecture, self.layout).latents.clone()

    def quantize(self, state: _State, refined: bool = True) -> list[list[Parameters]]:
        """The networks as integers, for the grids as they round now."""
        return quantize_networks(
            self.packing.split(state.vectors),
            state.packed.round(),
            self.distortion.targets,
            self.architecture,
            self.layout,
            self.lmbdas / self.pixels,
            lambda: self.report(replace(self.last, stage="quantising networks")),
            refined,
        )

    def functions(self, state: _State, networks: list[list[Parameters]]) -> list[Function]:
        packed = state.packed.round().clamp(-MAX_VALUE, MAX_VALUE)
        grids = [grid.cpu().numpy().astype(np.int32) for grid in self.layout.split(packed)]
        return [
            Function(self.architecture, [grid[i] for grid in grids], networks[owner], self.trained_lmbdas[owner].item())
            for i, owner in enumerate(state.owners)
        ]

    def results(self, state: _State, networks: list[list[Parameters]]) -> list[_Trained]:
        """Functions of all latents, one each."""
        packed, vectors = state.packed.cpu().numpy(), state.vectors.cpu().numpy()
        return [_Trained(*own) for own in zip(self.functions(state, networks), packed, vectors, strict=True)]

    def finish(
        self, state: _State, networks: list[list[Parameters]], sizes: Sequence[int], measure: Measure
    ) -> list[int]:
        """Train the grids of files that miss their targets a little further, until they meet them.

        Gives the files' bytes before that.
        """
        control, self.control = self.control, None
        assert control is not None
        self.trained_lmbdas = self.lmbdas.clone()
        current = [measure(function, i) for i, function in enumerate(self.functions(state, networks))]
        first, best, kept = current, list(current), state.packed.clone()
        sides: list[dict[bool, torch.Tensor]] = [{} for _ in best]  # the last grids that were too large, and too small
        stage = replace(FINISHING, look_every=FINISHING.iterations if self.distortion.moves else 0)  # one a round
        for number in range(FINISHING_ROUNDS + 1):
            if number:
                current = [measure(function, i) for i, function in enumerate(self.functions(state, networks))]
            for i, size in enumerate(current):
                if _is_nearer(size, best[i], sizes[i]):
                    best[i], kept[i] = size, state.packed[i]
            missed = control.missed(current, self.lmbdas)
            for i in list(missed):
                sides[i][current[i] > sizes[i]] = state.packed[i].clone()
                if len(sides[i]) == 2:
                    packed, size = self.between(state.pick([i]), sides[i], networks, sizes[i], measure)
                    if _is_nearer(size, best[i], sizes[i]):
                        best[i], kept[i] = size, packed
                    if MIN_FILL * sizes[i] <= size <= sizes[i]:
                        state.packed[i] = packed
                        missed.remove(i)
            if not missed or number == FINISHING_ROUNDS:
                break
            self.lmbdas[missed] = control.last_lambdas(self.lmbdas, current)[missed]
            picked = state.pick(missed)
            picked.grid_optimizer = Adam(picked.packed, self.preset.betas)
            self.train(picked, stage, "rate control", stage.iterations)
            state.packed[missed] = picked.packed
        state.packed = kept
        return first

    def between(
        self,
        state: _State,
        sides: dict[bool, torch.Tensor],
        networks: list[list[Parameters]],
        limit: int,
        measure: Measure,
    ) -> tuple[torch.Tensor, int]:
        """Grids on the line from those that are too small to those that are too large, and the size of their file.

        Values round to other integers one by one along it, so that a size near to the limit is on it.
        """
        share, found, best = 0.0, sides[False], 0
        for number in range(BISECTIONS):
            state.packed = torch.lerp(sides[False], sides[True], share)[None]
            size = measure(self.functions(state, networks)[0], state.owners[0])
            if best < size <= limit:
                found, best = state.packed[0], size
            if GOAL * limit <= size <= limit:
                break
            share += 0.5 ** (number + 1) if size <= limit else -(0.5 ** (number + 1))
        return found, best


class _Noise:
    """Random numbers for the functions of a state: windows of a pool that is drawn once, as drawing takes long.

    Zeros for hard rounding.
    """

    POOL = 16  # packed grids

    def __init__(self, state: _State, rounding: str, shape: torch.Size) -> None:
        count = self.POOL * shape.numel()
        if rounding == "hard":
            self._pool = state.packed.new_zeros(()).expand(len(state.packed), count)
        else:
            draw = torch.rand if rounding == "uniform" else torch.randn
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
