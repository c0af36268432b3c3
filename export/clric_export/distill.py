"""Small autoencoders for a latent space, trained from a teacher's latents and a folder of photos.

    photos -> teacher's encoder -> latents -> teacher's decoder -> teacher's images (both computed once and cached)
    latents, streams -> SmallDecoder -> image, compared with the photo and the teacher's image
    photo -> small encoder -> latent, compared with the teacher's, and through both decoders with the photo

A run starts from random weights or those of an earlier run. Training is seeded, checkpointed and resumed where it
was stopped.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from clric_decoder.errors import ClricError, ModelError, brief
from clric_decoder.image import read_image
from clric_encoder.networks import (
    SmallDecoder,
    lite_encoder,
    load_decoder_network,
    load_encoder_network,
    receptive_halo,
)
from clric_encoder.training.distortion import flat_areas, flatness_loss, ms_ssim, structure
from PIL import Image
from torch import Tensor, nn

from .crops import list_photos, read_streams
from .losses import Lpips
from .muon import Muon
from .onnx import write_network

# Larger photos are reduced to this long side: downscaled photos are sharp, and what is coded most is of this size.
LONG_SIDE = 768

# Latents on a side of a crop, and the least side of a photo in pixels: a crop's (the five scales of MS-SSIM need 176).
CROP, LEAST_SIDE = 24, 192

# Photos kept from training, on which the log's validation figures are measured.
HELD_OUT = 8

# Sides of the squares over which the decoder's pixels are averaged, to compare their colours.
COLOUR_SCALES = (4, 16)

CHECKPOINT_EVERY = 500

# Weights of the decoder's pixels (L1) and structure (MS-SSIM), against the photo and against the teacher's image. The
# photo holds detail that no decoder can know from the latent, which is noise in the gradient. The teacher's image is
# a function of the latent: all of it can be learnt. The photo says what is better than the teacher.
PHOTO_PIXELS_WEIGHT, TEACHER_PIXELS_WEIGHT = 0.4, 1.0
PHOTO_STRUCTURE_WEIGHT, TEACHER_STRUCTURE_WEIGHT = 0.05, 0.1

# Weights of the losses against the photo alone: the decoder's, that of both, and the encoder's, which stands beside its
# latent (mean squared error).
FLATNESS_WEIGHT, FEATURES_WEIGHT, PIXELS_WEIGHT = 2.0, 0.3, 1.0


@dataclass(frozen=True)
class Settings:
    """What determines a training run, apart from photos, streams, teacher and the weights that it starts from.

    ``crops`` of `CROP` x `CROP` latents make a batch. The learning rate rises over the first 2 % of the
    iterations and falls linearly to zero. The costly losses (features for the decoder, pixels for the encoder) start
    after ``plain`` of the iterations: before, they find nothing to improve.
    """

    iterations: int
    seed: int = 0
    crops: int = 4
    learning_rate: float = 2e-3
    plain: float = 0.25


def distill(
    teacher: str,
    photos: Path,
    folder: Path,
    *,
    streams: Path | None = None,
    lpips: Path | None = None,
    start: Path | None = None,
    iterations: int = 10500,
    seed: int = 0,
    device: str = "cpu",
    models: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Trains a small autoencoder for the teacher's latent space in ``folder``, or goes on with it.

    teacher, models: the autoencoder to learn from, and a folder to look for its weights in first.
    photos, streams: see `Photos`. lpips: a folder for `Lpips`; without, features are no part of the loss.
    start: the folder of an earlier run; its weights, in decoder/checkpoint.pt and encoder/checkpoint.pt, are what this
    run begins with instead of random ones, all else is new. A checkpoint in ``folder`` has precedence; a run that was
    stopped before its encoder had one needs ``start`` again.
    iterations: the decoder's; the encoder's are half as many. report: called with lines about the progress.
    Gives the paths of the decoder (ONNX with its manifest, the weights stored in int8) and of the encoder
    (safetensors, float16). Raises ClricError and OSError.
    """
    source = load_decoder_network(teacher, models)
    teacher_decoder = source.module.to(device)
    teacher_encoder = load_encoder_network(teacher, models).module.to(device)

    def encode(image: np.ndarray) -> np.ndarray:
        height, width, _ = image.shape
        padded = np.pad(image, ((0, -height % 8), (0, -width % 8), (0, 0)), mode="edge")
        pixels = torch.from_numpy(padded).to(device).permute(2, 0, 1)[None].float() / 255
        with torch.inference_mode():
            return teacher_encoder(pixels)[0].cpu().numpy()

    def decode(latent: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            pixels = teacher_decoder(torch.from_numpy(latent).to(device)[None])[0]
            return (255 * pixels).round().byte().permute(1, 2, 0).cpu().numpy()

    torch.manual_seed(seed)
    decoder, encoder = SmallDecoder(source.channels).to(device), lite_encoder(source.channels).to(device)
    if start is not None:
        # Both now: who named a wrong folder should not learn it after hours of training.
        _load_start(decoder, start, folder, "decoder")
        _load_start(encoder, start, folder, "encoder")

    data = Photos(photos, source.name, encode, decode, folder / "latents", streams, source.space, seed)
    report(f"{len(data.images)} photos ({sum(len(latents) - 1 for latents in data.latents)} with streams)")
    name = "lite" if source.space == "sd1" else f"lite-{source.space}"

    settings = Settings(iterations, seed)
    features = None if lpips is None else Lpips(lpips).to(device)
    train_decoder(decoder, data, settings, folder / "decoder", features, device, report)
    decoder.eval().cpu()
    result = replace(
        source, name=name, halo=receptive_halo(decoder.layers), licence="BSD-3-Clause",
        source=f"clric-export distill {source.name}", module=decoder,
    )  # fmt: skip
    onnx = folder / str(write_network(result, folder, "int8", stem=name)["file"])

    settings = Settings(iterations // 2, seed, plain=0.6)
    frozen_decoders = decoder.to(device).train().requires_grad_(False), teacher_decoder.requires_grad_(False)
    train_encoder(encoder, data, settings, folder / "encoder", frozen_decoders, features, device, report)
    weights = folder / f"{name}_encoder.safetensors"
    save_encoder(encoder, source.space, weights)
    return [onnx, onnx.with_suffix(".json"), weights]


def save_encoder(encoder: nn.Module, space: str, path: Path) -> None:
    """Writes an encoder's weights in float16, with the name of its latent space as metadata."""
    state = {key: tensor.cpu().half().contiguous() for key, tensor in encoder.state_dict().items()}
    scratch = path.with_suffix(".tmp")
    scratch.write_bytes(safetensors.torch.save(state, {"latent_space": space}))
    os.replace(scratch, path)


class Photos:
    """Photos in memory, each with its latents (the teacher's, and those of streams) and the teacher's image."""

    def __init__(
        self,
        folder: Path,
        teacher: str,
        encode: Callable[[np.ndarray], np.ndarray],
        decode: Callable[[np.ndarray], np.ndarray],
        cache: Path,
        streams: Path | None,
        space: str,
        seed: int,
    ) -> None:
        """encode: H x W x 3 uint8 -> C x h x w float32, called for photos whose latent is not in ``cache`` yet.

        decode: C x h x w float32 -> 8h x 8w x 3 uint8, called for the teacher's latents whose image is not there yet.
        streams: a folder with encodings of the photos by clric-enc (`read_streams`), those of other sizes left out; of
        the latent space ``space``.
        """
        cache.mkdir(parents=True, exist_ok=True)
        self.images: list[Tensor] = []
        self.taught: list[Tensor] = []
        self.latents: list[list[Tensor]] = []
        files = list_photos(folder)
        for i in np.random.default_rng(seed).permutation(len(files)):
            file = files[i]
            image = _reduced(read_image(file).pixels)
            if min(image.shape[:2]) < LEAST_SIDE:
                continue
            latent, taught = _cached_teaching(file, image, teacher, encode, decode, cache)
            latents = [latent]
            if streams is not None:
                for _, header, coded in read_streams(streams, file, len(latent), space):
                    if (header.height, header.width) == image.shape[:2]:
                        latents.append(coded.half().numpy())
            self.images.append(torch.from_numpy(np.array(image)))
            self.taught.append(torch.from_numpy(taught))
            self.latents.append([torch.from_numpy(latent) for latent in latents])
        if len(self.images) <= HELD_OUT:
            raise ClricError(
                f"{folder} contains only {len(self.images)} photos with sides of at least {LEAST_SIDE};"
                " hundreds are needed"
            )
        self.coded = [i for i, latents in enumerate(self.latents) if len(latents) > 1 and i >= HELD_OUT]

    def batch(self, random: np.random.Generator, crops: int, coded: float) -> tuple[Tensor, Tensor, Tensor]:
        """Random crops: latents [N, C, s, s], the photos' pixels and the teacher's [N, 3, 8s, 8s] in [0, 1].

        A share ``coded`` of the latents are of streams, if there are any; the teacher's pixels are of its own latent.
        """
        latents, pixels, taught = [], [], []
        for _ in range(crops):
            is_coded = self.coded and random.random() < coded
            i = int(random.choice(self.coded)) if is_coded else int(random.integers(HELD_OUT, len(self.images)))
            k = int(random.integers(1, len(self.latents[i]))) if is_coded else 0
            # Whole latents only: what continues the last row and column of an image is no photo.
            h, w = self.images[i].shape[0] // 8, self.images[i].shape[1] // 8
            y, x = (int(random.integers(0, side - CROP + 1)) for side in (h, w))
            latents.append(self.latents[i][k][:, y : y + CROP, x : x + CROP].float())
            crop = slice(8 * y, 8 * (y + CROP)), slice(8 * x, 8 * (x + CROP))
            pixels.append(self.images[i][crop].permute(2, 0, 1).float() / 255)
            taught.append(self.taught[i][crop].permute(2, 0, 1).float() / 255)
        return torch.stack(latents), torch.stack(pixels), torch.stack(taught)

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Whole photos that `batch` never gives: latent [1, C, h, w] of the teacher, pixels [1, 3, 8h, 8w]."""
        for image, (latent, *_) in zip(self.images[:HELD_OUT], self.latents, strict=False):
            h, w = image.shape[0] // 8, image.shape[1] // 8
            yield latent[None, :, :h, :w].float(), image[None, : 8 * h, : 8 * w].permute(0, 3, 1, 2).float() / 255


def train_decoder(
    decoder: SmallDecoder,
    photos: Photos,
    settings: Settings,
    folder: Path,
    lpips: Lpips | None,
    device: str,
    report: Callable[[str], None],
) -> None:
    """Trains a decoder in place, in ``folder``: see `_train`."""

    def loss(iteration: int, random: np.random.Generator) -> Tensor:
        latent, pixels, taught = (x.to(device) for x in photos.batch(random, settings.crops, coded=0.35))
        # A third of the clean and coded latents alike get noise of a random strength.
        strength = random.uniform(0, 0.25, (len(latent), 1, 1, 1)) * (random.random((len(latent), 1, 1, 1)) < 1 / 3)
        noise = torch.from_numpy(random.standard_normal(latent.shape, np.float32) * strength.astype(np.float32))
        image = decoder(latent + noise.to(device))
        # Neither structure nor features see a wrong colour of a whole area: scales that see little else.
        total = sum(F.l1_loss(F.avg_pool2d(image, side), F.avg_pool2d(pixels, side)) for side in COLOUR_SCALES)
        total = total + PHOTO_PIXELS_WEIGHT * F.l1_loss(image, pixels)
        total = total + TEACHER_PIXELS_WEIGHT * F.l1_loss(image, taught)
        total = total + PHOTO_STRUCTURE_WEIGHT * (1 - ms_ssim(image, structure(pixels, scales=4)).mean())
        total = total + TEACHER_STRUCTURE_WEIGHT * (1 - ms_ssim(image, structure(taught, scales=4)).mean())
        total = total + FLATNESS_WEIGHT * flatness_loss(image, flat_areas(pixels)).mean()
        if lpips is not None and iteration >= settings.plain * settings.iterations:
            # Half of the batch: LPIPS of a crop costs as much as its decoding, and more crops teach more.
            half = len(image) // 2
            total = total + FEATURES_WEIGHT * lpips(*_resampled(image[:half], pixels[:half], random))
        return total

    def validate() -> dict[str, float]:
        figures: dict[str, list[float]] = {"psnr": [], "ms_ssim": [], "lpips": []}
        for latent, pixels in photos.held_out():
            latent, pixels = latent.to(device), pixels.to(device)
            image = decoder(latent).clamp(0, 1)
            figures["psnr"].append(-10 * math.log10(F.mse_loss(image, pixels).item()))
            figures["ms_ssim"].append(ms_ssim(image, structure(pixels)).item())
            if lpips is not None:
                figures["lpips"].append(lpips(image, pixels).item())
        return {name: round(float(np.mean(values)), 4) for name, values in figures.items() if values}

    _train(decoder, loss, validate, settings, folder, report)


def train_encoder(
    encoder: nn.Module,
    photos: Photos,
    settings: Settings,
    folder: Path,
    decoders: Sequence[nn.Module],
    lpips: Lpips | None,
    device: str,
    report: Callable[[str], None],
) -> None:
    """Trains an encoder in place, in ``folder``: see `_train`.

    decoders: what its latents are for, the small one and the teacher's, with frozen weights. Each iteration looks
    through one of them, mostly through the first: the teacher's costs many times as much.
    """

    def loss(iteration: int, random: np.random.Generator) -> Tensor:
        target, pixels, _ = (x.to(device) for x in photos.batch(random, settings.crops, coded=0))
        latent = encoder(pixels)
        # What lies beyond the crop is seen by the teacher and not by the student.
        inner = slice(2, -2)
        total = F.mse_loss(latent[..., inner, inner], target[..., inner, inner])
        if iteration >= settings.plain * settings.iterations:
            teacher = iteration % 8 == 7
            few = slice(2 if teacher else None)
            image = decoders[teacher](latent[few])
            total = total + PIXELS_WEIGHT * F.l1_loss(image, pixels[few])
            if lpips is not None and not teacher:
                half = slice(len(image) // 2)
                total = total + FEATURES_WEIGHT * lpips(*_resampled(image[half], pixels[half], random))
        return total

    def validate() -> dict[str, float]:
        errors, psnr = [], []
        for target, pixels in photos.held_out():
            latent = encoder(pixels.to(device))
            errors.append(F.mse_loss(latent, target.to(device)).item())
            image = decoders[0](latent).clamp(0, 1)
            psnr.append(-10 * math.log10(F.mse_loss(image, pixels.to(device)).item()))
        return {"latent_mse": round(float(np.mean(errors)), 5), "psnr": round(float(np.mean(psnr)), 3)}

    _train(encoder, loss, validate, settings, folder, report)


def _resampled(image: Tensor, pixels: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Both batches shifted by up to 3 pixels, every second time at another scale too.

    SqueezeNet's first layer samples every second pixel: against a fixed raster a decoder learns mesh textures
    that fall between its samples. Against a moving one they are seen.
    """
    y, x = (int(random.integers(0, 4)) for _ in range(2))
    image, pixels = image[..., y:, x:], pixels[..., y:, x:]
    if random.random() < 0.5:
        scale = random.uniform(0.7, 1.4)
        image, pixels = (F.interpolate(x, scale_factor=scale, mode="bilinear", antialias=True) for x in (image, pixels))
    return image, pixels


def _train(
    model: nn.Module,
    loss: Callable[[int, np.random.Generator], Tensor],
    validate: Callable[[], dict[str, float]],
    settings: Settings,
    folder: Path,
    report: Callable[[str], None],
) -> None:
    """Trains a model in place, from ``folder``/checkpoint.pt if that is there, and appends to ``folder``/log.jsonl.

    Every `CHECKPOINT_EVERY` iterations, and at the end, a line with the mean loss since the last and the figures of
    ``validate`` is logged and the checkpoint is written anew, beside its name and then renamed. The random
    numbers of an iteration depend on the seed and its number alone, so that a resumed run goes on as if it had
    not been stopped. Raises ModelError for a checkpoint of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # an eighth faster on a CPU
    optimizer = Muon(model.parameters(), lr=settings.learning_rate)
    start = 0
    if checkpoint.exists():
        try:
            state = torch.load(checkpoint, weights_only=True)
        except Exception as error:  # torch, zipfile and pickle share no base class for a damaged file
            raise ModelError(f"{checkpoint} cannot be read ({brief(error)}); delete it to start over") from error
        if state["settings"] != asdict(settings):
            raise ModelError(f"{checkpoint} was made with different settings; choose another folder")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["iteration"]
    losses, begin = [], time.monotonic()
    for iteration in range(start, settings.iterations):
        warm_up, left = (iteration + 1) / (0.02 * settings.iterations), 1 - iteration / settings.iterations
        optimizer.param_groups[0]["lr"] = settings.learning_rate * min(warm_up, left)
        optimizer.zero_grad(set_to_none=True)
        value = loss(iteration, np.random.default_rng((settings.seed, iteration)))
        value.backward()
        optimizer.step()
        losses.append(value.item())
        done = iteration + 1
        if done % CHECKPOINT_EVERY == 0 or done == settings.iterations:
            with torch.inference_mode():
                line: dict[str, Any] = {"iteration": done, "loss": round(float(np.mean(losses)), 5), **validate()}
            line["seconds"] = round((time.monotonic() - begin) / len(losses), 4)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            scratch = checkpoint.with_suffix(".tmp")
            torch.save({**state, "iteration": done, "settings": asdict(settings)}, scratch)
            os.replace(scratch, checkpoint)
            with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            report(f"{folder.name}: {json.dumps(line)} of {settings.iterations}")
            losses, begin = [], time.monotonic()


def _load_start(model: nn.Module, start: Path, folder: Path, half: str) -> None:
    """The weights of an earlier run into a model, unless ``folder`` has a checkpoint of its own to go on from."""
    if (folder / half / "checkpoint.pt").exists():
        return
    path = start / half / "checkpoint.pt"
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["model"])
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or brief(error)}; give the folder of an earlier run") from error
    except Exception as error:  # torch, zipfile and pickle share no base class for a damaged file
        raise ModelError(f"{path} contains no {half} to start from: {brief(error)}") from error


def _reduced(image: np.ndarray) -> np.ndarray:
    height, width, _ = image.shape
    scale = LONG_SIDE / max(height, width)
    if scale >= 1:
        return image
    size = round(width * scale), round(height * scale)
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def _cached_teaching(
    file: Path,
    image: np.ndarray,
    teacher: str,
    encode: Callable[[np.ndarray], np.ndarray],
    decode: Callable[[np.ndarray], np.ndarray],
    cache: Path,
) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's latent, C x h x w float16, and its image of that, H x W x 3 uint8 of the photo's size.

    The names of their files hold a hash of the teacher's name and the photo's bytes.
    """
    digest = hashlib.sha256(teacher.encode() + b"\0" + file.read_bytes()).hexdigest()[:16]
    latent = _cached(cache / f"{file.stem}-{digest}.npy", lambda: encode(image).astype(np.float16))
    height, width, _ = image.shape
    taught = _cached(
        cache / f"{file.stem}-{digest}-image.npy", lambda: decode(latent.astype(np.float32))[:height, :width]
    )
    return latent, taught


def _cached(place: Path, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """What the file holds; computed where there is none, and written beside its name and then renamed."""
    if not place.exists():
        scratch = place.with_suffix(".tmp.npy")
        np.save(scratch, compute())
        os.replace(scratch, place)
    return np.load(place)
