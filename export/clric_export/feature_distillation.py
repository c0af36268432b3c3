"""A small feature network that stands in for LPIPS-VGG in the encoder's loss, by values and by gradients.

    photo crop -> its stream's latent, or the encoder's, quantised -> steps of a descent on the image loss -> a latent
    latent -> image decoder -> image -> LPIPS-VGG: a value and its gradient (computed once, kept in pools)
    the student learns both: the gradient in pixels, and what is left of it behind the image decoder, in the latent

A network that is descended on is soon asked about images that only its own mistakes could lead to. Training therefore
goes in rounds: every round adds a pool of latents that were reached by descending on the student of the round before.
The student has more weights than a pool has crops of a few hundred: what it learns of those alone it learns by heart.
So every descent gives one example of a crop of its own, and each is shown turned, mirrored and shifted.
"""

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from clric_decoder.cpus import available_cpus
from clric_decoder.errors import ClricError
from clric_decoder.files import write_output
from clric_encoder.autoencoder import fast_dtype
from clric_encoder.training.distortion import ms_ssim, structure
from clric_encoder.training.features import FeatureNetwork, LpipsVgg, PerceptualDistance, Reference, load_features
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .crops import Crops
from .muon import Muon

# A crop in pixels, and the part of it that is compared, at a place that does not follow the decoder's raster of 8.
CROP, COMPARED = 128, 112

# Examples in each pool of validation, of photos that are held out from training.
VALIDATION = 96

# The share of examples that begin with latents of streams, where there are any: smooth ones, as the codec makes them of
# few bits. Quantised ones are what the finer changes of a training look like.
CODED_SHARE = 0.7

# Quantisation steps of latents, and of the descents from those of streams.
STEPS, CODED_STEPS = (0.25, 2.2), (0.1, 0.6)

# A descent: steps at most by the student and by the teacher, whose steps take ten times as long; crops side by side
# on a CPU and on a GPU; and the learning rate as a share of the quantisation step.
LONGEST, TEACHERS_LONGEST, SIDE_BY_SIDE, SIDE_BY_SIDE_ON_GPU, DESCENT_RATE = 10, 3, 8, 128, 0.2

# Descents that the teacher leads, of those of a pool that has a student.
BY_TEACHER = 0.125

# Weights of squared error, MS-SSIM and features in a descent, as the encoder has them; a share of them goes by the
# features alone, which lead astray the soonest.
PIXELS, STRUCTURE, FEATURES, ALONE = 10.0, 0.25, (0.2, 0.6), 0.2

# A crop is compared without up to so many of its first rows and columns: strides of the student are 16 together.
SHIFTS = 16

# The learning rate of convolutions, which Muon trains; that of all else as a share of it; and the shares of the
# iterations in which it rises and falls.
LEARNING_RATE, OTHERS_SHARE, RISE, FALL = 8e-3, 0.25, 0.02, 0.7

# Iterations between two lines about the losses.
REPORT_EVERY = 100

# What a training step weighs: the logarithm of the value, the gradient in pixels, the gradient in the latent.
LOSS_WEIGHTS = (0.5, 0.3, 1.0)


@dataclass
class Pool:
    """Examples.

    photos [N, 3, CROP, CROP] uint8; latents [N, C, h, w]; places [N, 2] of the compared part; values [N], LPIPS-VGG of
    the decoded latents; gradients [N, 3, COMPARED, COMPARED] by the image.
    """

    photos: Tensor
    latents: Tensor
    places: Tensor
    values: Tensor
    gradients: Tensor

    def __len__(self) -> int:
        return len(self.values)


def distill_features(
    photos: Path,
    vgg: Path,
    folder: Path,
    *,
    streams: Path | None = None,
    encoder: nn.Module,
    decoder: nn.Module,
    rounds: int = 4,
    pool_size: int = 3000,
    iterations: int = 1300,
    crops: int = 8,
    start: Path | None = None,
    device: str = "cpu",
    seed: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Trains a `FeatureNetwork` in ``folder``, or goes on with the round that was stopped; gives its file (float16).

    vgg: the .npz of LPIPS-VGG. streams: a folder of streams of the photos (`Crops`), of many rates. encoder:
    [N, 3, 8h, 8w] RGB -> [N, C, h, w]. decoder: back, without a clamp. Both with frozen weights. crops: examples in an
    iteration. start: a file of features to begin with, random ones without. device: cpu or cuda. Raises ClricError and
    OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Half of an iteration is the decoder's, and gradients through it bear the rounding of bfloat16
    decoder = copy.deepcopy(decoder).to(device=device, dtype=fast_dtype(device))
    encoder = copy.deepcopy(encoder).to(device)
    teacher = LpipsVgg(vgg, torch.bfloat16).to(device)
    with torch.inference_mode():
        channels = encoder(torch.zeros(1, 3, CROP, CROP, device=device)).shape[1]
    data = Crops(photos, CROP, seed, streams, channels)
    files = {"photos": photos, "lpips": vgg, "streams": streams, "start": start}
    settings: dict[str, Any] = {name: file and str(file.resolve()) for name, file in files.items()}
    settings |= {"seed": seed, "rounds": rounds, "pool": pool_size, "iterations": iterations, "crops": crops}
    _check_settings(folder / "settings.json", settings | {"autoencoder": _digest(encoder, decoder)})
    maker = _PoolMaker(data, teacher, encoder, decoder, torch.device(device))

    def pool(name: str, student: FeatureNetwork | None, number: int, size: int, held_out: bool = False) -> Pool:
        def make() -> dict[str, Tensor]:
            report(f"making {name}")
            return maker.pool(student, size, (seed, number), held_out).__dict__

        return Pool(**{name: own.to(device) for name, own in _saved(folder / f"{name}.pt", make).items()})

    torch.manual_seed(seed)
    student = (FeatureNetwork() if start is None else load_features(start)).requires_grad_(True).to(device)
    validation = [pool("validation-teacher", None, 1000, VALIDATION, held_out=True)]
    pools: list[Pool] = []
    for number in range(rounds):
        leader = student if number or start is not None else None
        pools.append(pool(f"pool-{number}", leader, number, pool_size))
        if number:
            validation[1:] = [pool(f"validation-{number}", student, 1000 + number, VALIDATION, held_out=True)]
        checkpoint = folder / f"student-{number}.safetensors"
        if checkpoint.exists():
            student.load_state_dict(safetensors.torch.load_file(checkpoint))
            continue
        rates = _rates(number, rounds, iterations)
        _train(student, pools, decoder, rates, crops, np.random.default_rng((seed, 2000 + number)), report)
        figures = [_validate(student, own, decoder) for own in validation]
        report(json.dumps({"round": number, "validation": figures}))
        _write(student.state_dict(), checkpoint)
    result = folder / "features.safetensors"
    _write({name: tensor.half() for name, tensor in student.state_dict().items()}, result)
    return result


def _digest(*networks: nn.Module) -> str:
    """Of weights."""
    digest = hashlib.sha256()
    for network in networks:
        for tensor in network.state_dict().values():
            digest.update(tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_settings(file: Path, settings: dict[str, Any]) -> None:
    """Keeps what a run is made with beside what it makes. Raises ClricError where that was made with something else."""
    if not file.exists():
        write_output(file, f"{json.dumps(settings)}\n".encode())
    elif json.loads(file.read_text()) != settings:
        raise ClricError(f"{file.parent} contains a run with different settings; choose another folder")


def _saved(place: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What a file holds; made where there is none, and written beside its name and then renamed."""
    if not place.exists():
        scratch = place.with_suffix(".tmp")
        torch.save(make(), scratch)
        os.replace(scratch, place)
    result: dict[str, Tensor] = torch.load(place, weights_only=True)
    return result


def _write(state: dict[str, Tensor], path: Path) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_bytes(safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()}))
    os.replace(scratch, path)


def _rates(number: int, rounds: int, iterations: int) -> Iterator[float]:
    """Learning rates of a round: one rise over all rounds, and a fall to zero over most of them."""
    total = rounds * iterations
    for done in range(number * iterations, (number + 1) * iterations):
        yield LEARNING_RATE * min(1.0, (done + 1) / (RISE * total), (total - done) / (FALL * total))


class _Starts(Dataset):
    """What descents begin with, as functions of their numbers: photos [N, 3, CROP, CROP] uint8, quantisation steps
    [N, 1, 1, 1], and latents of streams for the first of them."""

    def __init__(self, crops: Crops, count: int, seed: tuple[int, int], held_out: bool) -> None:
        self._crops, self._count, self._seed, self._held_out = crops, count, seed, held_out

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        random = np.random.default_rng((*self._seed, number))
        streams = self._crops.held_out_coded if self._held_out else self._crops.coded
        coded = int(random.binomial(self._count, CODED_SHARE)) if streams else 0
        photos, steps, latents = [], [], torch.empty(0)
        if coded:
            latents, pixels = self._crops.coded_batch(random, coded, self._held_out)
            photos.append(pixels)
            steps.append(_log_uniform(random, CODED_STEPS, coded))
        if coded < self._count:
            photos.append(self._crops.batch(random, self._count - coded, self._held_out))
            steps.append(_log_uniform(random, STEPS, self._count - coded))
        step = np.concatenate(steps).astype(np.float32)[:, None, None, None]
        return (torch.cat(photos) * 255).round().byte(), torch.from_numpy(step), latents


def _log_uniform(random: np.random.Generator, bounds: tuple[float, float], count: int) -> np.ndarray:
    return np.exp(random.uniform(math.log(bounds[0]), math.log(bounds[1]), count))


class _PoolMaker:
    def __init__(
        self, crops: Crops, teacher: LpipsVgg, encoder: nn.Module, decoder: nn.Module, device: torch.device
    ) -> None:
        self._crops, self._teacher, self._encoder, self._decoder = crops, teacher, encoder, decoder
        self._device = device

    def pool(self, student: PerceptualDistance | None, size: int, seed: tuple[int, int], held_out: bool) -> Pool:
        """student: whose descents most of the examples are of; the others are the teacher's."""
        on_gpu = self._device.type == "cuda"
        count = min(SIDE_BY_SIDE_ON_GPU if on_gpu else SIDE_BY_SIDE, size)
        starts = DataLoader(
            _Starts(self._crops, count, seed, held_out),
            batch_size=None,
            sampler=range(-(-size // count)),
            num_workers=max(1, available_cpus() - 2) if on_gpu else 0,
        )
        random, parts = np.random.default_rng(seed), []
        for photos, step, coded in starts:
            photos, step = photos.to(self._device), step.to(self._device)
            start = coded.to(self._device)
            if len(coded) < len(photos):
                start = torch.cat([start, self._quantised(photos[len(coded) :], step[len(coded) :], random)])
            leader = self._teacher if student is None or random.random() < BY_TEACHER else student
            parts.append(self._descend(photos, start, step, leader, random))
        return Pool(*(torch.cat(tensors)[:size].cpu() for tensors in zip(*parts, strict=True)))

    def _quantised(self, photos: Tensor, step: Tensor, random: np.random.Generator) -> Tensor:
        """Latents of photos."""
        with torch.no_grad():
            latents: Tensor = self._encoder(photos.float() / 255)
        offset = torch.from_numpy(random.random(latents.shape, np.float32)).to(self._device)
        return ((latents / step + offset).round() - offset) * step

    def _descend(
        self, photos: Tensor, start: Tensor, step: Tensor, leader: PerceptualDistance, random: np.random.Generator
    ) -> tuple[Tensor, ...]:
        """What one descent comes to: the fields of a `Pool`."""
        originals = photos.float() / 255
        scaled = (start / step).requires_grad_(True)
        optimizer = torch.optim.Adam([scaled], lr=DESCENT_RATE, betas=(0.8, 0.95))
        weight, alone = float(random.uniform(*FEATURES)), random.random() < ALONE
        places = torch.from_numpy(random.integers(0, CROP - COMPARED + 1, (len(photos), 2))).to(self._device)

        def shown(judge: PerceptualDistance, reference: Reference) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
            """Latents with noise, their image, the compared part, and a judge's value of it and gradient by it."""
            noise = torch.from_numpy(random.uniform(-0.35, 0.35, start.shape).astype(np.float32)).to(self._device)
            latents = ((scaled + noise) * step).detach().requires_grad_(True)
            image = _decode(self._decoder, latents)
            part = _cut(image, places)
            leaf = part.detach().requires_grad_(True)
            value = judge.distance(leaf, reference)
            return latents, image, part, value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

        with torch.no_grad():
            reference = leader.reference(_cut(originals, places))
        for _ in range(int(random.integers((TEACHERS_LONGEST if leader is self._teacher else LONGEST) + 1))):
            latents, image, part, _, gradient = shown(leader, reference)
            loss = weight * (part * gradient).sum()
            if not alone:
                errors = PIXELS * F.mse_loss(image, originals) + STRUCTURE * (
                    1 - ms_ssim(image, structure(originals, scales=4)).mean()
                )
                loss = loss + len(photos) * errors
            (to_latents,) = torch.autograd.grad(loss, latents)
            scaled.grad = to_latents * step
            optimizer.step()
        with torch.no_grad():
            reference = self._teacher.reference(_cut(originals, places))
        latents, _, _, value, gradient = shown(self._teacher, reference)
        return photos, latents.detach(), places, value, gradient


def _cut(images: Tensor, places: Tensor) -> Tensor:
    """The compared parts of images [N, 3, CROP, CROP]."""
    rows, columns = (places[:, i, None] + torch.arange(COMPARED, device=places.device) for i in (0, 1))
    images = images.gather(2, rows[:, None, :, None].expand(-1, 3, -1, CROP))
    return images.gather(3, columns[:, None, None, :].expand(-1, 3, COMPARED, -1))


def _relative(a: Tensor, b: Tensor) -> Tensor:
    """The mean over a batch of the squared error of a relative to b."""
    return ((a - b).square().flatten(1).sum(1) / b.square().flatten(1).sum(1).clamp_min(1e-20)).mean()


def _decode(decoder: nn.Module, latents: Tensor) -> Tensor:
    """In the type of the decoder's weights."""
    image: Tensor = decoder(latents.to(next(decoder.parameters()).dtype)).float()
    return image


def _errors(
    student: FeatureNetwork, pool: Pool, indices: np.ndarray, decoder: nn.Module, random: np.random.Generator | None
) -> tuple[Tensor, Tensor]:
    """The errors that `LOSS_WEIGHTS` weighs, [3], and the cosine of both gradients in the latent.

    random: of training, which shows examples turned, mirrored and without their first rows and columns.
    """
    turns, mirrored, top, left = (0, 0, 0, 0) if random is None else random.integers((4, 2, SHIFTS, SHIFTS)).tolist()

    def change(images: Tensor) -> Tensor:
        images = images[..., top:, left:].rot90(turns, (2, 3))
        return images.flip(3) if mirrored else images

    own = torch.from_numpy(indices).to(pool.values.device)
    places = pool.places[own]
    latents = pool.latents[own].clone().requires_grad_(True)
    image = change(_cut(_decode(decoder, latents), places))
    shown = image.detach().requires_grad_(True)
    originals = student.reference(change(_cut(pool.photos[own].float() / 255, places)))
    value = student.distance(shown, originals)
    training = random is not None
    (gradient,) = torch.autograd.grad(value.sum(), shown, create_graph=training, retain_graph=training)
    # The distance is a mean over positions, here of fewer
    goal = change(pool.gradients[own]) * (COMPARED**2 / math.prod(shown.shape[2:]))
    (latent_goal,) = torch.autograd.grad(image, latents, goal, retain_graph=True)
    (latent_gradient,) = torch.autograd.grad(image, latents, gradient, create_graph=training)
    errors = [
        (value.clamp_min(1e-6).log() - pool.values[own].log()).square().mean(),
        _relative(F.avg_pool2d(gradient, 4), F.avg_pool2d(goal, 4)),  # no decoder paints single pixels
        _relative(latent_gradient, latent_goal),
    ]
    cosine = F.cosine_similarity(latent_gradient.flatten(1), latent_goal.flatten(1)).mean().detach()
    return torch.stack(errors), cosine


def _train(
    student: FeatureNetwork,
    pools: list[Pool],
    decoder: nn.Module,
    rates: Iterator[float],
    crops: int,
    random: np.random.Generator,
    report: Callable[[str], None],
) -> None:
    kernels = [parameter for parameter in student.parameters() if parameter.ndim == 4]
    optimizer = Muon(kernels, lr=0.0)
    optimizer.add_param_group({"params": [parameter for parameter in student.parameters() if parameter.ndim < 4]})
    weights = torch.tensor(LOSS_WEIGHTS, device=pools[0].values.device)
    totals = torch.zeros_like(weights)
    for number, rate in enumerate(rates):
        # Half of the examples are of the newest pool
        pool = pools[-1] if random.random() < 0.5 else pools[int(random.integers(len(pools)))]
        errors, _ = _errors(student, pool, random.integers(len(pool), size=crops), decoder, random)
        optimizer.zero_grad(set_to_none=True)
        (errors * weights).sum().backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for group, share in zip(optimizer.param_groups, (1.0, OTHERS_SHARE), strict=True):
            group["lr"] = rate * share
        optimizer.step()
        totals += errors.detach() / REPORT_EVERY
        if (number + 1) % REPORT_EVERY == 0:
            report(f"{number + 1}: value, pixels, latent {[round(total, 3) for total in totals.tolist()]}")
            totals.zero_()


def _validate(student: FeatureNetwork, pool: Pool, decoder: nn.Module) -> list[float]:
    """The errors over a pool, and the cosine."""
    figures = []
    for first in range(0, len(pool), 8):
        errors, cosine = _errors(student, pool, np.arange(first, min(first + 8, len(pool))), decoder, None)
        figures.append([*errors.tolist(), float(cosine)])
    return [round(float(value), 4) for value in np.mean(figures, 0)]
