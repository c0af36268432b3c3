"""An autoencoder trained with the rate in the loss: encoder, image decoder and causal prior together.

    photo crop -> encoder -> latent y -> quantised with a random step d -> decoder -> image, compared with the crop
                                         `-> prior -> bits

There is no teacher: the photos are the target. Training starts from `lite` of 1.0: its decoder, widened to more
channels, and an encoder that has learned to give lite's latents. From random weights the rate collapses the latent
before the decoder has learned to use it. Runs are seeded, checkpointed and resumed where they were stopped. The
learning rate is constant after a warm-up, and what is measured and exported is a moving average of the weights: a run
can be stopped at any time. A separate decay at the end brings the last of the gain. A GPU computes LPIPS-VGG in every
iteration, and prepares crops in other processes.

The mesh. A decoder with pixel shuffles has separate weights for each pixel of an 8 x 8 block, so nothing makes its
response to a constant latent constant. The difference is a pattern of period 8, some grey levels strong, which other
losses hardly see: MS-SSIM's constants hide it, and the features sample every second pixel of a fixed raster. Two losses
see it: `mesh_loss`, of what decoded crops have at multiples of 1/8 cycle per pixel, and `ripple_loss`, of the response
to constant latents, computed exactly and without noise.
"""

import contextlib
import copy
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from clric_decoder.cpus import available_cpus
from clric_decoder.errors import ClricError, ModelError, brief
from clric_decoder.models import find_registered_decoder
from clric_encoder.autoencoder import fast_dtype
from clric_encoder.networks import (
    Network,
    SmallBlock,
    SmallDecoder,
    SmallEncoder,
    load_decoder_network,
    load_encoder_network,
    receptive_halo,
)
from clric_encoder.training.distortion import flat_areas, flatness_loss, ms_ssim, structure
from clric_encoder.training.features import LpipsVgg, PerceptualDistance, load_features
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .crops import Crops
from .losses import Lpips
from .muon import Muon
from .onnx import write_network
from .prior import Prior

# Range of the quantiser step; the rates are 0.02 to 0.4 bpp.
MIN_STEP, MAX_STEP = 0.06, 2.2

# Its upper end to begin with, and the iterations over which it rises to the last. Noise of coarse steps drowns the
# channels that the decoder does not use yet, and the rate takes them away before it has learned to.
FIRST_MAX_STEP, RISE = 0.1, 2500

# Weight of the bits per pixel at step 0.5. It grows with the square of the step, as the squared error does.
RATE_WEIGHT = 0.25

# Weights of the losses: pixels and means of 8 x 8 pixels (both L1), MS-SSIM, flat areas, perceptual distance, mesh,
# ripple.
PIXELS_WEIGHT, COLOUR_WEIGHT, STRUCTURE_WEIGHT, FLATNESS_WEIGHT = 1.0, 0.5, 0.2, 1.0
PERCEPTUAL_WEIGHT, MESH_WEIGHT, RIPPLE_WEIGHT = 0.3, 5.0, 10.0

# The period of the decoder's raster, and the windows in which the mesh is measured: their side and distance.
PERIOD, MESH_WINDOW, MESH_STRIDE = 8, 64, 32

# Mean difference of neighbouring pixels below which an area counts as flat, and the weight of the mesh elsewhere: under
# features alone, textures become a hatching of the raster's period.
FLAT, TEXTURE_SHARE = 0.02, 0.2

# Latents of a batch whose ripple is measured; half of them from flat areas, if there are as many.
RIPPLE_LATENTS = 48

# Share of crops whose latents are rounded, with a straight-through gradient; the others get uniform noise.
ROUNDED_SHARE = 0.5

# LPIPS-VGG, where it is given, takes the place of its student once in so many iterations, with this weight and on a
# window of half of the crops' side: it costs sixty times as much, and a decoder that is trained on the student alone
# finds what the student does not see. On a GPU it is cheap, and the student is not used at all.
LPIPS_EVERY, LPIPS_WEIGHT, LPIPS_WEIGHT_ALONE = 4, 0.6, 0.5

# SqueezeNet's LPIPS, where it is given, has another of these iterations, on windows like the student's. It sees other
# errors: 500 iterations with it brought DISTS, which no loss has, from 8 % fewer bytes to 14 (`lite`, decoder alone).
SQUEEZENET_WEIGHT = 0.6

# Crops are shifted by up to this many pixels before features are computed: their raster has this period.
FEATURE_RASTER = 16

# At first the encoder learns lite's latents, then the prior trains alone, then the learning rate of all rises.
IMITATION, PRIOR_ALONE, WARM_UP = 800, 400, 500
IMITATION_LEARNING_RATE, PRIOR_LEARNING_RATE = 2e-3, 2e-3

# The deviation of the channels that lite does not have, to begin with.
NEW_DEVIATION = 0.7

# Of the decoder's last layer, as a share of the others': each step of its 12 outputs is a mesh of its own.
LAST_LAYER_SHARE = 0.2

# Decay of the moving average of weights per iteration, and the largest norm of the gradient.
AVERAGE_DECAY, MAX_GRADIENT = 0.999, 5.0

# Where streams of the photos are given, the decoder alone trains on their latents once in so many iterations.
CODED_EVERY = 3

# Iterations between two checkpoints with figures of held-out photos: some minutes of a CPU, and a minute of a GPU.
CHECKPOINT_EVERY, CHECKPOINT_EVERY_ON_GPU = 500, 2000

# Channels and blocks of decoders (`SmallDecoder`): small has 17,000 MAC/pixel, large 86,000.
DECODERS = {"small": ((96, 32, 16), (4, 2, 1)), "large": ((192, 64, 32), (4, 4, 3))}

# Steps at which held-out photos are measured; 0 stands for no quantisation.
VALIDATION_STEPS = (1.2, 0.8, 0.5, 0.25, 0.0)


@dataclass(frozen=True)
class Settings:
    """What a run must keep to be resumed: see `train`."""

    channels: int
    seed: int
    crop: int
    crops: int
    learning_rate: float
    decoder: str = "small"
    latents: tuple[str, ...] = ()


def train(
    photos: Path,
    folder: Path,
    *,
    name: str = "custom",
    space: str | None = None,
    channels: int = 8,
    iterations: int = 50_000,
    decay: int = 0,
    seed: int = 0,
    crop: int = 192,
    crops: int = 4,
    learning_rate: float = 7e-4,
    lpips: Path | None = None,
    squeezenet: Path | None = None,
    streams: Path | None = None,
    decoder: str = "small",
    latents: Sequence[str] = (),
    start: Path | None = None,
    device: str = "cpu",
    report: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Trains an autoencoder in ``folder``, or goes on with it, and writes its files there.

    photos: a folder of hundreds of photos. name: of the files. space: their latent space; None for a custom one.
    channels: of the latents, at least 4. iterations: at a constant learning rate, from the beginning of the first run;
    nothing is trained if the checkpoint has as many. decay: iterations that follow, in which the learning rate falls to
    zero; they have a checkpoint of their own, and a later run goes on from before the decay. crop, crops: side of crops
    in pixels, and how many make a batch. lpips: vgg16_lpips.npz, for LPIPS-VGG in some iterations and in the log;
    without, its student alone is used. squeezenet: a folder for `Lpips`, SqueezeNet's, in others. streams: a folder of
    streams of the photos by clric-enc with this autoencoder as it was when they were made, each named as its photo: the
    decoder learns what coded latents are like. start: the checkpoint of another run, whose weights to begin with; those
    of `lite` without. decoder: "small", or "large" for a larger decoder of the latents of `start`, whose encoder and
    prior stay as they are. latents: autoencoders of one space, for whose latents a decoder alone is trained, batches
    being of each in turn; `channels` is then that of their space, and so is `space`. device: cpu or cuda. report:
    called with lines about the progress.

    Gives the paths of the decoder and, unless it is for `latents`, of the encoder (ONNX, the weights stored in int8)
    and of their manifests.
    Raises ClricError and OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if decoder == "large" and start is None:
        raise ClricError("a large decoder is trained for the latents of another run; name its checkpoint (--start)")
    encoders = [load_encoder_network(other) for other in latents]
    if encoders:
        if decoder != "small":
            raise ClricError("a decoder for the latents of other autoencoders is small")
        spaces = {encoder.space for encoder in encoders}
        if len(spaces) > 1:
            raise ClricError(f"the latents are of more than one space: {', '.join(sorted(spaces))}")
        if space not in (None, *spaces):
            raise ClricError(f"the latents are of the space {encoders[0].space}, not {space}")
        space, channels = encoders[0].space, encoders[0].channels
    settings = Settings(channels, seed, crop, crops, learning_rate, decoder, tuple(latents))
    others = [encoder.module for encoder in encoders]
    data = Crops(photos, crop, seed, streams, channels, space if encoders else None)
    run = _Run(settings, data, lpips, squeezenet, torch.device(device), others)
    report(f"{len(run.data.images)} photos ({len(run.data.coded)} with streams), {run.dtype} on {device}")
    checkpoint = folder / "checkpoint.pt"
    if start is not None:
        run.start_from(start)
    elif not (iterations or decay or checkpoint.exists()):
        raise ClricError(f"{checkpoint} does not exist; there is nothing to export")
    run.load(checkpoint)
    run.advance(iterations, lambda iteration: 1.0, checkpoint, folder / "log.jsonl", report)
    if decay:
        begin = run.iteration
        run.load(folder / f"decay-{begin}-{decay}.pt")
        run.advance(
            begin + decay,
            lambda iteration: 1 - (iteration - begin) / decay,
            folder / f"decay-{begin}-{decay}.pt",
            folder / "log.jsonl",
            report,
        )
    return write_networks(run.average.cpu(), channels, name, space, folder)


def write_networks(model: nn.ModuleDict, channels: int, name: str, space: str | None, folder: Path) -> list[Path]:
    """Writes the decoder as ``name``.onnx and the encoder, if there is one, as ``name``_encoder.onnx, with manifests.

    space: their latent space; None for one of their own, custom-<the first 16 digits of the decoder's SHA-256>.
    """
    decoder = copy.deepcopy(model["decoder"]).eval()
    assert isinstance(decoder, SmallDecoder)
    network = Network(
        "decoder", name, space or "custom", channels, receptive_halo(decoder.layers), "BSD-3-Clause",
        "clric-export train", decoder,
    )  # fmt: skip
    if space is None:
        with tempfile.TemporaryDirectory() as scratch:
            digest = write_network(network, Path(scratch), "int8", stem=name)["sha256"]
        network = replace(network, space=f"custom-{digest[:16]}")
    write_network(network, folder, "int8", stem=name)
    stems = [name]
    if "encoder" in model:
        encoder = copy.deepcopy(model["encoder"]).eval()
        assert isinstance(encoder, SmallEncoder)
        network = replace(network, half="encoder", halo=encoder.halo, module=encoder)
        stems.append(f"{name}_encoder")
        write_network(network, folder, "int8", stem=stems[1])
    return [folder / f"{stem}{suffix}" for stem in stems for suffix in (".onnx", ".json")]


def start_networks(channels: int, size: str = "small") -> nn.ModuleDict:
    """A random encoder and prior, and a decoder of one of the sizes: a small one is `lite` of 1.0, widened.

    The new weights of its first layer have 0.3 of the old ones' deviation. channels: at least 4.
    """
    decoder = SmallDecoder(channels, *DECODERS[size])
    networks = nn.ModuleDict({"encoder": SmallEncoder(channels), "decoder": decoder, "prior": Prior(channels)})
    if size != "small":
        return networks
    state = decoder.state_dict()
    for name, old in load_decoder_network(str(find_registered_decoder("sd1", 1))).module.state_dict().items():
        new = state[name]
        if new.shape == old.shape:
            new.copy_(old)
        else:
            new.normal_(0, 0.3 * float(old.std()))
            new[:, : old.shape[1]].copy_(old)
    return networks


@torch.no_grad()
def grow(decoder: SmallDecoder, small: SmallDecoder) -> None:
    """Gives a decoder the function of one with at most as many channels and blocks.

    What it has more keeps its weights, and nothing yet leads from there into what the small one has. Its further blocks
    must be the identity, which new ones are.
    """
    pairs = []
    stages = [_stages(network) for network in (decoder, small)]
    for (blocks, convolution), (small_blocks, small_convolution) in zip(*stages, strict=True):
        pairs.append((convolution, small_convolution))
        for block, small_block in zip(blocks, small_blocks, strict=False):
            pairs += [(block.first, small_block.first), (block.second, small_block.second)]
    for new, old in pairs:
        outputs, inputs = old.weight.shape[:2]
        new.weight[:outputs, inputs:] = 0
        new.weight[:outputs, :inputs] = old.weight
        new.bias[:outputs] = old.bias


def _stages(decoder: SmallDecoder) -> list[tuple[list[SmallBlock], nn.Conv2d]]:
    """The blocks at each size, and the convolution that follows on them."""
    result, blocks = [], []
    for layer in decoder.layers:
        if isinstance(layer, SmallBlock):
            blocks.append(layer)
        elif isinstance(layer, nn.Conv2d):
            result.append((blocks, layer))
            blocks = []
    return result


def _read(checkpoint: Path) -> dict[str, Any]:
    """What `_Run.save` wrote. Raises ModelError for a damaged file."""
    try:
        state: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle share no base class for a damaged file
        raise ModelError(f"{checkpoint} cannot be read ({brief(error)}); delete it to start over") from error
    if not {"settings", "iteration", "model", "average"} <= state.keys():
        raise ModelError(f"{checkpoint} is not a checkpoint of clric-export train")
    return state


class _Run:
    """The state of a run: networks, their moving average, the optimiser and the number of iterations done."""

    def __init__(
        self,
        settings: Settings,
        data: Crops,
        lpips: Path | None,
        squeezenet: Path | None,
        device: torch.device,
        others: Sequence[nn.Module],
    ) -> None:
        """others: frozen encoders for whose latents a decoder alone is trained; none for all networks together."""
        torch.manual_seed(settings.seed)
        self.settings, self.data, self.device, self.iteration = settings, data, device, 0
        self.dtype = fast_dtype(device.type)
        self.student = load_features().to(device)
        self.student.set_dtype(self.dtype)
        self.teacher = None if lpips is None else LpipsVgg(lpips, self.dtype).to(device)
        self.squeezenet = None if squeezenet is None else Lpips(squeezenet).to(device)
        self.model = start_networks(settings.channels, settings.decoder)
        self.lite = load_encoder_network("lite").module
        if others:
            del self.model["encoder"], self.model["prior"]
        self.encoders = list(others) or [self.model["encoder"]]
        for network in (self.lite, self.model, *others):  # channels last: faster on a CPU, and on a GPU in bfloat16
            network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.only_decoder = bool(others) or settings.decoder == "large"
        prior = self.model["prior"].parameters() if "prior" in self.model else ()
        if self.only_decoder:
            self.model.requires_grad_(False)
            self._decoder.requires_grad_(True)
        last = list(self._decoder.layers[-2].parameters())
        apart = {id(parameter) for parameter in (*prior, *last)}
        self.optimizer = Muon([own for own in self.model.parameters() if id(own) not in apart], lr=0.0)
        self.optimizer.add_param_group({"params": last, "lr": 0.0})
        self.prior_optimizer = torch.optim.Adam([{"params": list(prior)}], PRIOR_LEARNING_RATE)

    def start_from(self, checkpoint: Path) -> None:
        """Takes the averaged weights of another run, and the number of its iterations if all is trained on.

        A decoder for other autoencoders' latents takes those of its decoder, and a large one begins as the small one.
        Raises ModelError for a checkpoint that does not fit.
        """
        state = _read(checkpoint)
        weights = {name: value.float() for name, value in state["average"].items()}
        try:
            if "encoder" not in self.model:
                weights = {name: value for name, value in weights.items() if name.startswith("decoder.")}
            elif self.only_decoder:
                networks = start_networks(self.settings.channels)
                networks.load_state_dict(weights)
                small, decoder = networks["decoder"], copy.deepcopy(self._decoder).cpu()
                assert isinstance(small, SmallDecoder)
                grow(decoder, small)
                networks["decoder"] = decoder
                weights = networks.state_dict()
            else:
                self.iteration = state["iteration"]
            for network in (self.model, self.average):
                network.load_state_dict(weights)
        except RuntimeError as error:
            raise ModelError(f"{checkpoint} does not match this architecture ({brief(error)})") from error

    def load(self, checkpoint: Path) -> None:
        """Goes on from a checkpoint, if it is there. Raises ModelError for a damaged one and one of other settings."""
        if not checkpoint.exists():
            return
        state = _read(checkpoint)
        if state["settings"] != asdict(self.settings):
            raise ModelError(f"{checkpoint} was made with different settings; choose another folder")
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.prior_optimizer.load_state_dict(state["prior_optimizer"])
        self.iteration = state["iteration"]

    def save(self, checkpoint: Path) -> None:
        """Writes a checkpoint beside its name and renames it."""
        state = {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "prior_optimizer": self.prior_optimizer.state_dict(),
            "iteration": self.iteration,
        }
        scratch = checkpoint.with_suffix(".tmp")
        torch.save(state, scratch)
        os.replace(scratch, checkpoint)

    def advance(
        self,
        until: int,
        rate: Callable[[int], float],
        checkpoint: Path,
        log: Path,
        report: Callable[[str], None],
    ) -> None:
        """Trains until this many iterations are done. rate: factor of the learning rate by the iteration's number.

        Every `CHECKPOINT_EVERY` iterations, and at the end, a line with the means of the losses since the last and the
        figures of held-out photos is logged, and the checkpoint is written.
        """
        sums: dict[str, Tensor] = {}
        count, begin = 0, time.monotonic()
        on_gpu = self.device.type == "cuda"
        every = CHECKPOINT_EVERY_ON_GPU if on_gpu else CHECKPOINT_EVERY
        batches = DataLoader(
            _Batches(self.data, self.settings),
            batch_size=None,
            sampler=range(self.iteration, until),
            num_workers=max(1, available_cpus() - 2) if on_gpu else 0,
            pin_memory=on_gpu,
        )
        for latents, pixels in batches:
            learning_rate = self.settings.learning_rate * rate(self.iteration)
            learning_rate *= min(1.0, (self.iteration - self._begin + 1) / WARM_UP)
            if self.iteration < IMITATION and not self.only_decoder:
                learning_rate = IMITATION_LEARNING_RATE * (1 - self.iteration / IMITATION)
            for group, share in zip(self.optimizer.param_groups, (1.0, LAST_LAYER_SHARE), strict=True):
                group["lr"] = learning_rate * share
            self.prior_optimizer.param_groups[0]["lr"] = PRIOR_LEARNING_RATE * rate(self.iteration)
            for name, value in self._step(latents, pixels).items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value
            self.iteration += 1
            count += 1
            if self.iteration % every == 0 or self.iteration == until:
                losses = {name: round(value.item() / count, 5) for name, value in sums.items()}
                seconds = (time.monotonic() - begin) / count
                line: dict[str, Any] = {"iteration": self.iteration, "seconds": round(seconds, 3), "losses": losses}
                encoder = self.average["encoder"] if "encoder" in self.average else self.encoders[0]
                held_out = list(self.data.held_out())
                line.update(validate(self.average, encoder, held_out, self.teacher, self.device))
                self.save(checkpoint)
                with open(log, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                report(json.dumps(line))
                sums, count, begin = {}, 0, time.monotonic()

    def _step(self, latents: Tensor | None, pixels: Tensor) -> dict[str, Tensor]:
        """One iteration of the optimiser; gives the losses by name. latents: of streams, for the decoder alone."""
        random = np.random.default_rng((self.settings.seed, self.iteration))
        pixels = pixels.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        if latents is not None and self.iteration >= self._begin:
            parts = self._image_losses(latents.to(self.device), pixels, random)
        elif self.iteration >= self._begin:
            parts = self._losses(pixels, random)
        elif self.iteration >= IMITATION:
            parts = self._rate_loss(pixels, random)
        else:
            parts = self._imitation_loss(pixels)
        total = torch.stack(list(parts.values())).sum()
        total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT)
        self.optimizer.step()  # of the parameters that have a gradient
        self.prior_optimizer.step()
        self.model.zero_grad(set_to_none=True)
        with torch.no_grad():
            new = 1 - min(AVERAGE_DECAY, (1 + self.iteration) / (10 + self.iteration))
            for average, parameter in zip(self.average.parameters(), self.model.parameters(), strict=True):
                average.lerp_(parameter, new)
        return {name: value.detach() for name, value in parts.items()}

    def _imitation_loss(self, pixels: Tensor) -> dict[str, Tensor]:
        """The error of the encoder's first channels to lite's latents, and of the deviation of the others."""
        with self._autocast():
            target = self.lite(pixels).float()
            latent = self.model["encoder"](pixels).float()
        new = latent[:, target.shape[1] :].transpose(0, 1).flatten(1)
        parts = {"imitation": F.mse_loss(latent[:, : target.shape[1]], target)}
        if len(new):
            parts["deviation"] = (new.std(1) - NEW_DEVIATION).square().mean()
        return parts

    def _rate_loss(self, pixels: Tensor, random: np.random.Generator) -> dict[str, Tensor]:
        """The prior alone: its bits, all steps alike."""
        with torch.no_grad(), self._autocast():
            latent = self.model["encoder"](pixels).float()
        step = _random_steps(random, len(pixels), MAX_STEP).to(self.device)
        noise = self._uniform(random, latent.shape)
        bits = self.model["prior"](latent / step[:, None, None, None] + noise, step)
        return {"rate": bits.sum() / pixels[:, 0].numel()}

    def _losses(self, pixels: Tensor, random: np.random.Generator) -> dict[str, Tensor]:
        encoder = self.encoders[_turn(self.iteration, len(self.encoders))]
        with self._autocast():
            latent = encoder(pixels).float()
        step = _random_steps(random, len(pixels), self._max_step()).to(self.device)
        scale = step[:, None, None, None]
        values = latent / scale
        noisy = values + self._uniform(random, latent.shape)
        rounded = values + (values.round() - values).detach()
        is_rounded = torch.from_numpy(random.random(len(pixels)) < ROUNDED_SHARE).to(self.device)[:, None, None, None]
        quantised = torch.where(is_rounded, rounded, noisy)
        parts = self._image_losses(quantised * scale, pixels, random)
        if not self.only_decoder:
            bits = self.model["prior"](noisy, step).sum((1, 2, 3)) / pixels[0, 0].numel()
            parts["rate"] = RATE_WEIGHT * (bits * (step / 0.5).square()).mean()
        return parts

    def _image_losses(self, latents: Tensor, pixels: Tensor, random: np.random.Generator) -> dict[str, Tensor]:
        image = self._decode(latents)
        vectors = _ripple_vectors(latents.detach(), pixels, random)
        return {
            "pixels": PIXELS_WEIGHT * F.l1_loss(image, pixels),
            "colour": COLOUR_WEIGHT * F.l1_loss(F.avg_pool2d(image, 8), F.avg_pool2d(pixels, 8)),
            "structure": STRUCTURE_WEIGHT * (1 - ms_ssim(image, structure(pixels)).mean()),
            "flatness": FLATNESS_WEIGHT * flatness_loss(image, flat_areas(pixels)).mean(),
            "perceptual": self._perceptual(image, pixels, random),
            "mesh": MESH_WEIGHT * mesh_loss(image, pixels),
            "ripple": RIPPLE_WEIGHT * ripple_loss(self._decoder, vectors),
        }

    def _perceptual(self, image: Tensor, pixels: Tensor, random: np.random.Generator) -> Tensor:
        network: PerceptualDistance = self.student
        weight, raster = PERCEPTUAL_WEIGHT, FEATURE_RASTER
        turn = self.iteration % LPIPS_EVERY
        if self.teacher is not None and self.device.type == "cuda":
            network, weight = self.teacher, LPIPS_WEIGHT_ALONE
        elif self.teacher is not None and turn == LPIPS_EVERY - 1:
            network, weight, raster = self.teacher, LPIPS_WEIGHT, self.settings.crop // 2
        y, x = (int(shift) for shift in random.integers(0, raster, 2))
        window = slice(y, y + self.settings.crop - raster), slice(x, x + self.settings.crop - raster)
        if self.squeezenet is not None and turn == 1:
            return SQUEEZENET_WEIGHT * self.squeezenet(image[(..., *window)], pixels[(..., *window)])
        with torch.no_grad():
            reference = network.reference(pixels[(..., *window)])
        return weight * network.distance(image[(..., *window)], reference).mean()

    def _max_step(self) -> float:
        if self.only_decoder:
            return MAX_STEP
        position = min(1.0, max(0, self.iteration - self._begin) / RISE)
        return FIRST_MAX_STEP * (MAX_STEP / FIRST_MAX_STEP) ** position

    def _uniform(self, random: np.random.Generator, shape: Sequence[int]) -> Tensor:
        """Noise of quantisation."""
        return torch.from_numpy(random.uniform(-0.5, 0.5, shape).astype(np.float32)).to(self.device)

    @property
    def _begin(self) -> int:
        """The first iteration in which the decoder is trained."""
        return 0 if self.only_decoder else IMITATION + PRIOR_ALONE

    @property
    def _decoder(self) -> SmallDecoder:
        decoder = self.model["decoder"]
        assert isinstance(decoder, SmallDecoder)
        return decoder

    def _decode(self, latent: Tensor) -> Tensor:
        """The last layer in float32: bfloat16 has half a grey level between its numbers."""
        layers = list(self._decoder.layers)
        with self._autocast():
            x = nn.Sequential(*layers[:-2])(latent.contiguous(memory_format=torch.channels_last))
        return nn.Sequential(*layers[-2:])(x.float()) + 0.5

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


def _turn(iteration: int, count: int) -> int:
    """Which of so many encoders an iteration is for: each for as long as batches of photos and streams, and networks of
    features, take turns, so that it gets all of them."""
    return iteration // (CODED_EVERY * LPIPS_EVERY) % count


class _Batches(Dataset[tuple[Tensor | None, Tensor]]):
    """The crops of each iteration, [N, 3, side, side], with latents if they are of streams."""

    def __init__(self, data: Crops, settings: Settings) -> None:
        self._data, self._settings = data, settings

    def __getitem__(self, iteration: int) -> tuple[Tensor | None, Tensor]:
        random = np.random.default_rng((self._settings.seed, iteration, 0))
        if self._data.coded and iteration % CODED_EVERY == CODED_EVERY - 1:
            return self._data.coded_batch(random, self._settings.crops)
        return None, self._data.batch(random, self._settings.crops)


def mesh_loss(image: Tensor, reference: Tensor) -> Tensor:
    """The error's part of period 8 in flat areas of images [N, 3, H, W]: its root mean square, in [0, 1].

    In windows of 64 x 64 pixels the error is weighted with a Hann window and folded: all pixels at the same place of
    their 8 x 8 block are averaged. What differs between the places is the error at multiples of 1/8 cycle per pixel;
    of white noise it has a 28th of the power. Windows count fully where the reference is flat, and for
    `TEXTURE_SHARE` elsewhere.
    """
    blocks = MESH_WINDOW // PERIOD
    hann = torch.hann_window(MESH_WINDOW, device=image.device).view(blocks, PERIOD) / (blocks / 2)
    # [8 * 8 places, 1, blocks, blocks]
    window = torch.einsum("ai,bj->ijab", hann, hann).reshape(PERIOD * PERIOD, 1, blocks, blocks)
    error = F.pixel_unshuffle(image - reference, PERIOD)
    stride = MESH_STRIDE // PERIOD
    folded = F.conv2d(error, window.repeat(3, 1, 1, 1), stride=stride, groups=error.shape[1])
    folded = folded.unflatten(1, (3, PERIOD * PERIOD))
    power = (folded - folded.mean(2, keepdim=True)).square().mean((1, 2))
    flatness = torch.exp(-(_activity(reference, MESH_WINDOW, MESH_STRIDE) / FLAT).square())
    return ((TEXTURE_SHARE + (1 - TEXTURE_SHARE) * flatness) * (power + 1e-9).sqrt()).mean()


def ripple_loss(decoder: SmallDecoder, vectors: Tensor) -> Tensor:
    """How much the images of constant latents differ from a constant colour: root mean square, in [0, 1].

    vectors: [n, C]. With circular padding one latent stands for a plane of equal ones, and its 8 x 8 pixels are the
    period of the decoder's response.
    """
    if not len(vectors):
        return vectors.new_zeros(())
    with circular_padding(decoder):
        image = decoder.layers(vectors[:, :, None, None])
    power = (image - image.mean((2, 3), keepdim=True)).square().mean((1, 2, 3))
    return (power + 1e-9).sqrt().mean()


@contextlib.contextmanager
def circular_padding(network: nn.Module) -> Iterator[None]:
    """Every convolution of the network pads circularly, for as long as this lasts."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    before = [layer.padding_mode for layer in layers]
    try:
        for layer in layers:
            layer.padding_mode = "circular"
        yield
    finally:
        for layer, mode in zip(layers, before, strict=True):
            layer.padding_mode = mode


def flat_latents(latents: Tensor, pixels: Tensor) -> Tensor:
    """The latents [n, C] around which the photo is flat: of [N, C, h, w] and pixels [N, 3, 8h, 8w]."""
    activity = F.pad(_activity(pixels, 3 * PERIOD, PERIOD), (1, 1, 1, 1), value=1.0)
    return latents.permute(0, 2, 3, 1)[activity < FLAT]


def _ripple_vectors(latents: Tensor, pixels: Tensor, random: np.random.Generator) -> Tensor:
    """Latents [n, C] for `ripple_loss`: some of flat areas, and others of anywhere."""
    flat = flat_latents(latents, pixels)
    flat = flat[random.permutation(len(flat))[: RIPPLE_LATENTS // 2]]
    all_latents = latents.permute(0, 2, 3, 1).flatten(0, 2)
    others = all_latents[random.permutation(len(all_latents))[: RIPPLE_LATENTS - len(flat)]]
    return torch.cat([flat, others])


def _activity(image: Tensor, window: int, stride: int) -> Tensor:
    """Mean difference of neighbouring pixels in windows, of both axes together: [N, rows, columns]."""
    across = F.pad(image.diff(dim=3).abs().mean(1, keepdim=True), (0, 1))
    down = F.pad(image.diff(dim=2).abs().mean(1, keepdim=True), (0, 0, 0, 1))
    return F.avg_pool2d((across + down) / 2, window, stride)[:, 0]


def _random_steps(random: np.random.Generator, count: int, largest: float) -> Tensor:
    steps = np.exp(random.uniform(math.log(MIN_STEP), math.log(largest), count))
    return torch.from_numpy(steps.astype(np.float32))


@torch.inference_mode()
def validate(
    model: nn.ModuleDict, encoder: nn.Module, images: Sequence[np.ndarray], lpips: LpipsVgg | None, device: torch.device
) -> dict[str, dict[str, float]]:
    """Figures of photos coded with rounded latents, by step: bpp of the prior if there is one, PSNR, MS-SSIM, mesh.

    images: H x W x 3 uint8, sides multiples of 8. mesh: the largest peak and the geometric mean of `mesh_peaks`;
    texture: those of what is not flat. lpips: measured on 256 x 256 pixels in the middle.
    """
    result: dict[str, dict[str, float]] = {}
    pixels = [torch.from_numpy(image).to(device).permute(2, 0, 1)[None].float() / 255 for image in images]
    latents = [encoder(x) for x in pixels]
    for step in VALIDATION_STEPS:
        figures: dict[str, list[float]] = {}
        decoded = []
        for x, latent in zip(pixels, latents, strict=True):
            if step:
                values = (latent / step).round()
                if "prior" in model:
                    bits = model["prior"](values, torch.tensor([step], device=device)).sum().item()
                    figures.setdefault("bpp", []).append(bits / x[0, 0].numel())
                latent = values * step
            image = (255 * model["decoder"](latent)).round() / 255
            decoded.append((255 * image[0]).round().byte().permute(1, 2, 0).cpu().numpy())
            figures.setdefault("psnr", []).append(-10 * math.log10(F.mse_loss(image, x).item() + 1e-10))
            figures.setdefault("ms_ssim", []).append(ms_ssim(image, structure(x)).item())
            if lpips is not None and step == 0.5:
                top, left = (max(0, side - 256) // 2 for side in x.shape[2:])
                a, b = (y[..., top : top + 256, left : left + 256] for y in (image, x))
                figures.setdefault("lpips", []).append(lpips.distance(a, lpips.reference(b)).item())
        result[f"{step:g}"] = {name: round(float(np.mean(values)), 4) for name, values in figures.items()}
        for name, is_flat in (("mesh", True), ("texture", False)):
            peaks = mesh_peaks(images, decoded, is_flat)
            if len(peaks):
                mean = float(np.exp(np.log(peaks).mean()))
                result[f"{step:g}"].update(
                    {f"{name}_max": round(float(peaks.max()), 2), f"{name}_mean": round(mean, 3)}
                )
    return result


def mesh_peaks(originals: Sequence[np.ndarray], decoded: Sequence[np.ndarray], is_flat: bool = True) -> np.ndarray:
    """Power of the error at multiples of 1/8 cycle per pixel, over the median of what is around each in the spectrum.

    Of the luma, over all windows of 64 x 64 pixels in which the original is flat, or over all others; 1 is no mesh.
    Empty without such windows.
    The lowest frequencies are left out: errors of photos are strong there.
    """
    n, power = MESH_WINDOW, np.zeros((MESH_WINDOW, MESH_WINDOW))
    window = np.outer(np.hanning(n), np.hanning(n))
    for original, image in zip(originals, decoded, strict=True):
        x, y = (a.astype(np.float64) @ [0.299, 0.587, 0.114] for a in (original, image))
        for top in range(0, x.shape[0] - n + 1, n // 2):
            for left in range(0, x.shape[1] - n + 1, n // 2):
                patch = slice(top, top + n), slice(left, left + n)
                if (max(np.abs(np.diff(x[patch], axis=axis)).mean() for axis in (0, 1)) < 2) == is_flat:
                    error = y[patch] - x[patch]
                    power += np.abs(np.fft.fft2((error - error.mean()) * window)) ** 2
    if not power.any():
        return np.empty(0)
    peaks = []
    lowest, ring = (0, n // 8, n - n // 8), range(-3, 4)
    for u in range(0, n, n // 8):
        for v in range(0, n, n // 8):
            if u not in lowest or v not in lowest:
                around = [power[(u + a) % n, (v + b) % n] for a in ring for b in ring if max(abs(a), abs(b)) == 3]
                peaks.append(power[u, v] / np.median(around))
    return np.array(peaks)
