"""Network sets: one function's networks for many images, at one lambda each (clric_decoder/registered_networks.py).

Trained on crops of the latents of photos as functions are, under latent MSE + lambda * bpp with soft rounding, but for
what stands for the training of grids: they are the latent, turned by the inverse of the first synthesis layer. At last
the networks alone are trained, on integers that preset `instant` has rounded.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from clric_decoder.bitstream import Architecture, registered_architecture
from clric_decoder.errors import ClricError
from clric_decoder.image import read_image
from clric_decoder.networks import Parameters, encode_networks
from clric_encoder.autoencoder import load_encoder
from clric_encoder.instant import FUNCTIONS, LAMBDAS, SPACE, make_set, round_by_rate
from clric_encoder.model.backends import backend_for
from clric_encoder.model.function import Packing, Synthesis, grid_bits
from clric_encoder.model.grid_layout import GridLayout
from PIL import Image
from torch import Tensor

from .crops import list_photos

# Photos are reduced to this long side.
LONG_SIDE = 768

# Side of crops in latents, and how many make a batch.
CROP, CROPS = 32, 8

# Iterations with soft rounding, and with the integers of so many batches. Learning rates fall along half cosines.
SOFT, HARD, HARD_BATCHES = 2400, 800, 40
LEARNING_RATE, HARD_LEARNING_RATE = 4e-3, 1e-3

# First and last temperature and noise of soft rounding, as of the presets.
TEMPERATURES, SIGMAS = (0.25, 0.04), (0.22, 0.15)

_CPU = torch.device("cpu")


def train_network_sets(
    photos: Path, output: Path, *, vae: str = "small", seed: int = 0, report: Callable[[str], None] = lambda line: None
) -> Path:
    """Trains the sets of all lambdas on the latents of a folder of photos, and writes registered_networks.json.

    Raises ClricError and OSError.
    """
    encoder = load_encoder(vae)
    architecture = registered_architecture(FUNCTIONS[0])
    if encoder.space != SPACE:
        raise ClricError(f"the networks of preset instant are for the latent space {SPACE}, not for {encoder.space}")
    latents = []
    for file in list_photos(photos):
        image = Image.fromarray(read_image(file).pixels)
        image.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
        latent = torch.from_numpy(encoder.encode(np.asarray(image)))
        if min(latent.shape[1:]) >= CROP:
            latents.append(latent)
    if not latents:
        raise ClricError(f"{photos} contains no photos with sides of at least {8 * CROP} pixels")
    segments = []
    for lmbda in LAMBDAS:
        training = _Training(latents, architecture, lmbda, seed)
        training.soft()
        loss = training.hard()
        networks = training.networks()
        segments.append(encode_networks(networks))
        report(f"lambda {lmbda:g}: loss {loss:.4f}, {len(segments[-1])} bytes")
    scratch = output.with_suffix(".tmp")
    table = {str(number): segment.hex() for number, segment in zip(FUNCTIONS, segments, strict=True)}
    scratch.write_text(json.dumps(table, indent=0) + "\n")
    os.replace(scratch, output)
    return output


class _Training:
    """The networks of one set in training: a vector that all crops share."""

    def __init__(self, latents: Sequence[Tensor], architecture: Architecture, lmbda: float, seed: int) -> None:
        self.latents, self.architecture, self.lmbda = latents, architecture, lmbda
        self.layout, self.packing = GridLayout(architecture, CROP, CROP, _CPU), Packing(architecture, _CPU)
        self.random = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.price = lmbda / (64 * CROP * CROP)
        step = 1.1 * math.sqrt(0.35 * lmbda)
        vector = self.packing.defaults.clone()
        for group, part in zip(self.packing.groups, vector.split(self.packing.sizes), strict=True):
            if ".weight" not in group.name:
                continue
            part.normal_(0, 0.3 / math.sqrt(math.prod(group.shape[1:])), generator=self.generator)
            if group.name == "synthesis.weight0":
                part.copy_(step * torch.eye(*group.shape[:2]).flatten())
            elif group.name.startswith("synthesis") and architecture.synthesis[int(group.name[-1])].residual:
                part *= 0.1  # a residual branch starts near nothing
        self.vector = vector.requires_grad_(True)

    def soft(self) -> None:
        """The first part: soft rounding, whose gradients reach the grids and, through them, the first layer."""
        backend = backend_for(_CPU)
        optimizer = torch.optim.Adam([self.vector], betas=(0.9, 0.98))
        for iteration in range(SOFT):
            position = iteration / SOFT
            latents = self.crops()
            grids = torch.zeros(CROPS, self.layout.rows, self.layout.stride)
            self.layout.split(grids)[0].copy_(self.wanted(latents))
            noise = torch.randn(grids.shape, generator=self.generator)
            temperature, sigma = (a + (b - a) * position for a, b in (TEMPERATURES, SIGMAS))
            rounded, slope = backend.soft_round_with_noise(grids.detach().clone(), noise, temperature, sigma)
            _, grad_vectors, grad_grids = self.gradients(rounded * self.layout.mask, latents)
            self.step(optimizer, _falling(LEARNING_RATE, position), grad_vectors, (grids, grad_grids * slope))

    def hard(self) -> float:
        """The second part, on integers; gives the loss."""
        batches = []
        for _ in range(HARD_BATCHES):
            latents = self.crops()
            batches.append((latents, self.rounded(latents)))
        optimizer = torch.optim.Adam([self.vector], betas=(0.9, 0.98))
        losses = []
        for iteration in range(HARD):
            latents, grids = batches[iteration % HARD_BATCHES]
            loss, grad_vectors, _ = self.gradients(grids, latents)
            losses.append(loss)
            self.step(optimizer, _falling(HARD_LEARNING_RATE, iteration / HARD), grad_vectors)
        return float(np.mean(losses[-HARD_BATCHES:]))

    def crops(self) -> Tensor:
        """A batch [n, C, side, side]."""
        crops = []
        for _ in range(CROPS):
            latent = self.latents[int(self.random.integers(len(self.latents)))]
            top, left = (int(self.random.integers(side - CROP + 1)) for side in latent.shape[1:])
            crops.append(latent[:, top : top + CROP, left : left + CROP])
        return torch.stack(crops)

    def wanted(self, latents: Tensor) -> Tensor:
        """The real numbers of the grids: the first layer, turned round."""
        parameters = self.packing.split(self.vector[None])
        weight = parameters["synthesis.weight0"][0, :, :, 0, 0]
        bias = parameters["synthesis.bias"][0, : len(weight)]
        return torch.einsum("ij,njyx->niyx", torch.linalg.inv(weight), latents - bias[:, None, None])

    def rounded(self, latents: Tensor) -> Tensor:
        """The grids of latents by preset instant, as the layout packs them."""
        networks = make_set(0, self.networks(), self.architecture)
        grids = torch.zeros(len(latents), self.layout.rows, self.layout.stride)
        for place, latent in zip(self.layout.split(grids)[0], latents.numpy(), strict=True):
            grid = round_by_rate(latent, networks, self.architecture, self.price * latent.size)
            place.copy_(torch.from_numpy(grid))
        return grids

    def gradients(self, grids: Tensor, latents: Tensor) -> tuple[float, Tensor, Tensor]:
        """The mean loss of a batch, and its gradients by the networks of each crop and by the grids."""
        vectors = self.vector.detach().expand(len(latents), -1).contiguous()
        grad_vectors, grad_grids = torch.zeros_like(vectors), torch.zeros_like(grids)
        networks, grad_networks = self.packing.split(vectors), self.packing.split(grad_vectors)
        prices = torch.full((len(latents),), self.price)
        bits = grid_bits(grids, networks, self.architecture, self.layout, prices)
        synthesis = Synthesis(grids, networks, self.architecture, self.layout)
        errors = synthesis.latents - latents
        synthesis.backward(errors * (2 / errors[0].numel()), grad_networks, grad_grids)
        bits.backward(grad_networks, grad_grids)
        loss = errors.square().mean() + self.price * bits.bits.mean()
        return loss.item(), grad_vectors / len(latents), grad_grids * self.layout.mask / len(latents)

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        learning_rate: float,
        grad_vectors: Tensor,
        *others: tuple[Tensor, Tensor],
    ) -> None:
        """others: tensors that depend on the vector, with their gradients."""
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.zero_grad()
        self.vector.grad = grad_vectors.sum(0)
        for tensor, gradient in others:
            tensor.backward(gradient)
        torch.nn.utils.clip_grad_norm_([self.vector], 1.0)
        optimizer.step()

    def networks(self) -> list[Parameters]:
        """The parameters as integers: bits cost nothing here, so each group has the finest exponent that holds it."""
        result = []
        vectors = self.packing.split(self.vector.detach()[None])
        for group in self.packing.groups:
            values = vectors[group.name][0].numpy() - np.broadcast_to(np.array(group.default, np.float32), group.shape)
            exponent = group.max_exponent
            while exponent and np.abs(np.rint(values * 2.0**exponent)).max() > group.limit(exponent):
                exponent -= 1
            limit = group.limit(exponent)
            integers = np.clip(np.rint(values * 2.0**exponent), -limit, limit).astype(np.int32)
            result.append(Parameters(group, exponent, integers))
        return result


def _falling(rate: float, position: float) -> float:
    return rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * position)))
