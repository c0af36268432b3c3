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
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from clric_encoder.autoencoder import fast_dtype
from clric_encoder.training.distortion import ms_ssim, structure
from clric_encoder.training.features import FeatureNetwork, LpipsVgg, PerceptualDistance, Reference, load_features
from torch import Tensor, nn

from .crops import Crops

# A crop in pixels, and the part of it that is compared, at a place that does not follow the decoder's raster of 8.
CROP, COMPARED = 128, 112

# Examples in each pool of validation, of photos that are held out from training.
VALIDATION = 96

# The share of descents that begin with latents of streams, where there are any: smooth ones, as the codec makes them of
# few bits. Quantised ones are what the finer changes of a training look like.
CODED_SHARE = 0.7

# Quantisation steps of latents, and of the descents from those of streams.
STEPS, CODED_STEPS = (0.25, 2.2), (0.1, 0.6)

# A descent: steps at most by the student and by the teacher, whose steps take ten times as long; crops side by side;
# and the learning rate as a share of the quantisation step.
LONGEST, TEACHERS_LONGEST, SIDE_BY_SIDE, DESCENT_RATE = 10, 3, 8, 0.2

# Descents that the teacher leads, of those of a pool that has a student.
BY_TEACHER = 0.125

# Weights of squared error, MS-SSIM and features in a descent, as the encoder has them; a share of them goes by the
# features alone, which lead astray the soonest.
PIXELS, STRUCTURE, FEATURES, ALONE = 10.0, 0.25, (0.2, 0.6), 0.2

# A crop is compared without up to so many of its first rows and columns: strides of the student are 16 together.
SHIFTS = 16

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
    encode: Callable[[np.ndarray], np.ndarray],
    decoder: nn.Module,
    rounds: int = 4,
    pool_size: int = 3000,
    iterations: int = 1300,
    start: Path | None = None,
    seed: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Trains a `FeatureNetwork` in ``folder``, or goes on with the round that was stopped; gives its file (float16).

    vgg: the .npz of LPIPS-VGG. streams: a folder of streams of the photos (`Crops`), of many rates. start: a file of
    features to begin with, random ones without. encode: H x W x 3 uint8 -> C x h x w float32. decoder: [N, C, h, w] ->
    [N, 3, 8h, 8w] RGB, with frozen weights and without a clamp. Raises ClricError and OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    crops = Crops(photos, CROP, seed, streams)
    # Half of an iteration is the decoder's, and gradients through it bear the rounding of bfloat16
    decoder = copy.deepcopy(decoder).to(fast_dtype("cpu"))
    maker = _PoolMaker(crops, LpipsVgg(vgg, torch.bfloat16), encode, decoder)

    def pool(name: str, student: FeatureNetwork | None, number: int, size: int, held_out: bool = False) -> Pool:
        def make() -> dict[str, Tensor]:
            report(f"making {name}")
            return maker.pool(student, size, np.random.default_rng((seed, number)), held_out).__dict__

        return Pool(**_saved(folder / f"{name}.pt", make))

    torch.manual_seed(seed)
    student = FeatureNetwork() if start is None else load_features(start).requires_grad_(True)
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
        _train(student, pools, decoder, rates, np.random.default_rng((seed, 2000 + number)), report)
        figures = [_validate(student, own, decoder) for own in validation]
        report(json.dumps({"round": number, "validation": figures}))
        _write(student.state_dict(), checkpoint)
    result = folder / "features.safetensors"
    _write({name: tensor.half() for name, tensor in student.state_dict().items()}, result)
    return result


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
    """Learning rates of a round: one rise and one half cosine over all rounds."""
    total = rounds * iterations
    for done in range(number * iterations, (number + 1) * iterations):
        yield 2e-3 * min(1, (done + 1) / 100) * 0.5 * (1 + float(np.cos(np.pi * done / total)))


class _PoolMaker:
    def __init__(
        self, crops: Crops, teacher: LpipsVgg, encode: Callable[[np.ndarray], np.ndarray], decoder: nn.Module
    ) -> None:
        self._crops, self._teacher, self._encode, self._decoder = crops, teacher, encode, decoder

    def pool(self, student: PerceptualDistance | None, size: int, random: np.random.Generator, held_out: bool) -> Pool:
        """student: whose descents most of the examples are of; the others are the teacher's."""
        parts: list[tuple] = []
        while len(parts) * SIDE_BY_SIDE < size:
            leader = self._teacher if student is None or random.random() < BY_TEACHER else student
            parts.append(self._descend(*self._start(random, held_out), leader, random))
        return Pool(*(torch.cat(tensors)[:size] for tensors in zip(*parts, strict=True)))

    def _start(self, random: np.random.Generator, held_out: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Crops of photos, their latents, and a quantisation step for each."""
        streams = self._crops.held_out_coded if held_out else self._crops.coded
        coded = bool(streams) and random.random() < CODED_SHARE
        if coded:
            start, crops = self._crops.coded_batch(random, SIDE_BY_SIDE, held_out)
        else:
            crops = self._crops.batch(random, SIDE_BY_SIDE, held_out)
        photos = (crops * 255).round().byte()
        low, high = np.log(CODED_STEPS if coded else STEPS)
        drawn = np.exp(random.uniform(low, high, (len(photos), 1, 1, 1)))
        step = torch.from_numpy(drawn.astype(np.float32))
        if not coded:
            start = torch.from_numpy(np.stack([self._encode(crop) for crop in photos.permute(0, 2, 3, 1).numpy()]))
            offset = torch.from_numpy(random.random(start.shape, np.float32))
            start = ((start / step + offset).round() - offset) * step
        return photos, start, step

    def _descend(
        self, photos: Tensor, start: Tensor, step: Tensor, leader: PerceptualDistance, random: np.random.Generator
    ) -> tuple[Tensor, ...]:
        """What one descent comes to: the fields of a `Pool`."""
        originals = photos.float() / 255
        scaled = (start / step).requires_grad_(True)
        optimizer = torch.optim.Adam([scaled], lr=DESCENT_RATE, betas=(0.8, 0.95))
        weight, alone = float(random.uniform(*FEATURES)), random.random() < ALONE
        places = torch.from_numpy(random.integers(0, CROP - COMPARED + 1, (len(photos), 2)))

        def shown(judge: PerceptualDistance, reference: Reference) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
            """Latents with noise, their image, the compared part, and a judge's value of it and gradient by it."""
            noise = torch.from_numpy(random.uniform(-0.35, 0.35, start.shape).astype(np.float32))
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
                    1 - ms_ssim(image, structure(originals, scales=4))
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
    parts = [
        image[:, y : y + COMPARED, x : x + COMPARED] for image, (y, x) in zip(images, places.tolist(), strict=True)
    ]
    return torch.stack(parts)


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

    places = pool.places[indices]
    latents = pool.latents[indices].clone().requires_grad_(True)
    image = change(_cut(_decode(decoder, latents), places))
    shown = image.detach().requires_grad_(True)
    originals = student.reference(change(_cut(pool.photos[indices].float() / 255, places)))
    value = student.distance(shown, originals)
    training = random is not None
    (gradient,) = torch.autograd.grad(value.sum(), shown, create_graph=training, retain_graph=training)
    # The distance is a mean over positions, here of fewer
    goal = change(pool.gradients[indices]) * (COMPARED**2 / math.prod(shown.shape[2:]))
    (latent_goal,) = torch.autograd.grad(image, latents, goal, retain_graph=True)
    (latent_gradient,) = torch.autograd.grad(image, latents, gradient, create_graph=training)
    errors = [
        (value.clamp_min(1e-6).log() - pool.values[indices].log()).square().mean(),
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
    random: np.random.Generator,
    report: Callable[[str], None],
) -> None:
    optimizer = torch.optim.Adam(student.parameters(), betas=(0.9, 0.98))
    totals: list[np.ndarray] = []
    for number, rate in enumerate(rates):
        # Half of the examples are of the newest pool
        pool = pools[-1] if random.random() < 0.5 else pools[int(random.integers(len(pools)))]
        errors, _ = _errors(student, pool, random.integers(len(pool), size=8), decoder, random)
        optimizer.zero_grad(set_to_none=True)
        (errors * torch.tensor(LOSS_WEIGHTS)).sum().backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        totals.append(errors.detach().numpy())
        if (number + 1) % 100 == 0:
            report(f"{number + 1}: value, pixels, latent {np.mean(totals, 0).round(3).tolist()}")
            totals = []


def _validate(student: FeatureNetwork, pool: Pool, decoder: nn.Module) -> list[float]:
    """The errors over a pool, and the cosine."""
    figures = []
    for first in range(0, len(pool), 8):
        errors, cosine = _errors(student, pool, np.arange(first, min(first + 8, len(pool))), decoder, None)
        figures.append([*errors.tolist(), float(cosine)])
    return [round(float(value), 4) for value in np.mean(figures, 0)]
