"""A small feature network that stands in for LPIPS-VGG in the encoder's loss, by values and by gradients.

    photo crop -> encoder -> quantised latent -> steps of a descent on the image loss -> latents as training meets them
    latent -> image decoder -> image -> LPIPS-VGG: a value and its gradient (computed once, kept in pools)
    the student learns both: the gradient in pixels, and what is left of it behind the image decoder, in the latent

A network that is descended on is soon asked about images that only its own mistakes could lead to. Training therefore
goes in rounds: every round adds a pool of latents that were reached by descending on the student of the round before.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from clric_decoder.errors import ClricError
from clric_decoder.image import read_image
from clric_encoder.training.distortion import ms_ssim, structure
from clric_encoder.training.features import FeatureNetwork, LpipsVgg, PerceptualDistance
from PIL import Image
from torch import Tensor, nn

from .crops import list_photos

# A crop in pixels, and the part of it that is compared, at a place that does not follow the decoder's raster of 8.
CROP, COMPARED = 128, 112

# Photos that validation alone sees, and examples that it has of them in each pool.
HELD_OUT, VALIDATION = 12, 96

# A descent: steps that are kept, crops side by side, and the learning rate as a share of the quantisation step.
STEPS, SIDE_BY_SIDE, DESCENT_RATE = 5, 8, 0.2

# Weights of squared error, MS-SSIM and features in a descent, as the encoder has them; a share of them goes by the
# features alone, which lead astray the soonest.
PIXELS, STRUCTURE, FEATURES, ALONE = 10.0, 0.25, (0.2, 0.6), 0.2

# What a training step weighs: the logarithm of the value, the gradient in pixels, the gradient in the latent.
LOSS_WEIGHTS = (0.5, 0.3, 1.0)


@dataclass
class Pool:
    """Examples.

    photos [N, 3, CROP, CROP] uint8; latents [N, C, h, w]; places [N, 2] of the compared part; values [N], LPIPS-VGG of
    the decoded latents; gradients [N, 3, COMPARED, COMPARED] by the image, and latent_gradients by the latents.
    """

    photos: Tensor
    latents: Tensor
    places: Tensor
    values: Tensor
    gradients: Tensor
    latent_gradients: Tensor

    def __len__(self) -> int:
        return len(self.values)


def distill_features(
    photos: Path,
    vgg: Path,
    folder: Path,
    *,
    encode: Callable[[np.ndarray], np.ndarray],
    decoder: nn.Module,
    rounds: int = 4,
    pool_size: int = 3000,
    iterations: int = 1300,
    seed: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Trains a `FeatureNetwork` in ``folder``, or goes on with the round that was stopped; gives its file (float16).

    vgg: the .npz of LPIPS-VGG. encode: H x W x 3 uint8 -> C x h x w float32. decoder: [N, C, h, w] -> [N, 3, 8h, 8w]
    RGB, with frozen weights and without a clamp. Raises ClricError and OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = list_photos(photos)
    if len(files) <= 2 * HELD_OUT:
        raise ClricError(f"{photos} contains only {len(files)} photos; hundreds are needed")
    files = [files[i] for i in np.random.default_rng(seed).permutation(len(files))]
    maker = _PoolMaker(LpipsVgg(vgg, torch.bfloat16), encode, decoder)

    def pool(name: str, own: list[Path], student: FeatureNetwork | None, size: int, number: int) -> Pool:
        def make() -> dict[str, Tensor]:
            report(f"making {name}")
            return maker.pool(own, student, size, np.random.default_rng((seed, number))).__dict__

        return Pool(**_saved(folder / f"{name}.pt", make))

    torch.manual_seed(seed)
    student = FeatureNetwork()
    validation = [pool("validation-teacher", files[:HELD_OUT], None, VALIDATION, 1000)]
    pools: list[Pool] = []
    for number in range(rounds):
        pools.append(pool(f"pool-{number}", files[HELD_OUT:], student if number else None, pool_size, number))
        if number:
            validation[1:] = [pool(f"validation-{number}", files[:HELD_OUT], student, VALIDATION, 1000 + number)]
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
    def __init__(self, teacher: LpipsVgg, encode: Callable[[np.ndarray], np.ndarray], decoder: nn.Module) -> None:
        self._teacher, self._encode, self._decoder = teacher, encode, decoder

    def pool(
        self, files: list[Path], student: PerceptualDistance | None, size: int, random: np.random.Generator
    ) -> Pool:
        """student: whose descents three quarters of the examples are of; the others are the teacher's."""
        parts: list[tuple] = []
        while len(parts) * SIDE_BY_SIDE < size:
            leader = student if student is not None and random.random() < 0.75 else self._teacher
            parts += self._descend(*self._start(files, random), leader, random)
        return Pool(*(torch.cat(tensors)[:size] for tensors in zip(*parts, strict=True)))

    def _start(self, files: list[Path], random: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Crops of photos, their latents, and a quantisation step for each."""
        crops = [_crop(files[int(random.integers(len(files)))], random) for _ in range(SIDE_BY_SIDE)]
        photos = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
        start = torch.from_numpy(np.stack([self._encode(crop) for crop in crops]))
        step = np.exp(random.uniform(np.log(0.2), np.log(1.6), (len(crops), 1, 1, 1)))
        return photos, start, torch.from_numpy(step.astype(np.float32))

    def _descend(
        self, photos: Tensor, start: Tensor, step: Tensor, leader: PerceptualDistance, random: np.random.Generator
    ) -> list[tuple]:
        """Examples along one descent: the fields of a `Pool` for each step."""
        originals = photos.float() / 255
        offset = torch.from_numpy(random.random(start.shape, np.float32))
        integers = ((start / step + offset).round() - offset).requires_grad_(True)
        optimizer = torch.optim.Adam([integers], lr=DESCENT_RATE, betas=(0.8, 0.95))
        weight, alone = float(random.uniform(*FEATURES)), random.random() < ALONE
        places = torch.from_numpy(random.integers(0, CROP - COMPARED + 1, (len(photos), 2)))
        with torch.no_grad():
            reference = self._teacher.features(_cut(originals, places))
            own_reference = reference if leader is self._teacher else leader.features(_cut(originals, places))
        result = []
        for _ in range(STEPS):
            noise = torch.from_numpy(random.uniform(-0.35, 0.35, start.shape).astype(np.float32))
            latents = ((integers + noise) * step).detach().requires_grad_(True)
            image = self._decoder(latents)
            shown = _cut(image, places).detach().requires_grad_(True)
            value = self._teacher.distance(self._teacher.features(shown), reference)
            (gradient,) = torch.autograd.grad(value.sum(), shown)
            (to_latents,) = torch.autograd.grad(_cut(image, places), latents, gradient, retain_graph=True)
            result.append((photos, latents.detach(), places, value.detach(), gradient, to_latents))
            if leader is not self._teacher:
                value = leader.distance(leader.features(shown), own_reference)
                (gradient,) = torch.autograd.grad(value.sum(), shown)
            loss = weight * (_cut(image, places) * gradient).sum()
            if not alone:
                errors = PIXELS * F.mse_loss(image, originals) + STRUCTURE * (
                    1 - ms_ssim(image, structure(originals, scales=4))
                )
                loss = loss + len(photos) * errors
            (to_latents,) = torch.autograd.grad(loss, latents)
            integers.grad = to_latents * step
            optimizer.step()
        return result


def _crop(file: Path, random: np.random.Generator) -> np.ndarray:
    """A square of `CROP` from a photo at a random scale, flipped or not."""
    image = Image.fromarray(read_image(file).pixels)
    smallest = CROP / min(image.size)
    largest = max(smallest, min(1.0, 1024 / max(image.size)))
    scale = float(np.exp(random.uniform(np.log(max(smallest, 0.35 * largest)), np.log(largest))))
    width, height = (max(CROP, round(side * scale)) for side in image.size)
    x, y = int(random.integers(width - CROP + 1)), int(random.integers(height - CROP + 1))
    box = (x / scale, y / scale, min(image.width, (x + CROP) / scale), min(image.height, (y + CROP) / scale))
    crop = np.array(image.resize((CROP, CROP), Image.Resampling.LANCZOS, box=box))
    return crop[:, ::-1] if random.random() < 0.5 else crop


def _cut(images: Tensor, places: Tensor) -> Tensor:
    parts = [
        image[:, y : y + COMPARED, x : x + COMPARED] for image, (y, x) in zip(images, places.tolist(), strict=True)
    ]
    return torch.stack(parts)


def _relative(a: Tensor, b: Tensor) -> Tensor:
    """The mean over a batch of the squared error of a relative to b."""
    return ((a - b).square().flatten(1).sum(1) / b.square().flatten(1).sum(1).clamp_min(1e-20)).mean()


def _errors(
    student: FeatureNetwork, pool: Pool, indices: np.ndarray, decoder: nn.Module, training: bool
) -> tuple[Tensor, Tensor]:
    """The errors that `LOSS_WEIGHTS` weighs, [3], and the cosine of both gradients in the latent."""
    places = pool.places[indices]
    latents = pool.latents[indices].clone().requires_grad_(True)
    image = _cut(decoder(latents), places)
    shown = image.detach().requires_grad_(True)
    originals = student.features(_cut(pool.photos[indices].float() / 255, places))
    value = student.distance(student.features(shown), originals)
    (gradient,) = torch.autograd.grad(value.sum(), shown, create_graph=training, retain_graph=True)
    (latent_gradient,) = torch.autograd.grad(image, latents, gradient, create_graph=training)
    goal = pool.latent_gradients[indices]
    errors = [
        (value.clamp_min(1e-6).log() - pool.values[indices].log()).square().mean(),
        _relative(
            F.avg_pool2d(gradient, 4), F.avg_pool2d(pool.gradients[indices], 4)
        ),  # no decoder paints single pixels
        _relative(latent_gradient, goal),
    ]
    return torch.stack(errors), F.cosine_similarity(latent_gradient.flatten(1), goal.flatten(1)).mean().detach()


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
        errors, _ = _errors(student, pool, random.integers(len(pool), size=8), decoder, training=True)
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
        errors, cosine = _errors(student, pool, np.arange(first, min(first + 8, len(pool))), decoder, training=False)
        figures.append([*errors.tolist(), float(cosine)])
    return [round(float(value), 4) for value in np.mean(figures, 0)]
