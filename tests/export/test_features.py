"""The distillation of a feature network, with a teacher of the real shape and random weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from clric_decoder import ClricError
from clric_encoder.networks import load_decoder_network, load_encoder_network
from clric_encoder.training.features import load_features
from clric_export import feature_distillation
from clric_export.crops import HELD_OUT, Crops
from clric_export.feature_distillation import distill_features
from PIL import Image

WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random, arrays, inputs = np.random.default_rng(0), {}, 3
    for number, width in enumerate(WIDTHS):
        scale = np.sqrt(2 / (9 * inputs))
        weight = random.standard_normal((width, inputs, 3, 3), np.float32) * scale
        arrays[f"conv{number}.weight"] = weight.astype(np.float16)
        arrays[f"conv{number}.bias"] = np.zeros(width, np.float16)
        inputs = width
    for number, width in enumerate((64, 128, 256, 512, 512)):
        arrays[f"lin{number}.weight"] = np.full((1, width, 1, 1), 0.1, np.float32)
    path = tmp_path_factory.mktemp("vgg") / "vgg16_lpips.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(HELD_OUT + 4):
        small = random.integers(0, 255, (10, 12, 3), np.uint8)
        Image.fromarray(small).resize((180, 150), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def distill(photos: Path, vgg: Path, folder: Path) -> bytes:
    encoder, decoder = load_encoder_network("lite").module, load_decoder_network("lite").module.train()
    return distill_features(
        photos, vgg, folder, encoder=encoder, decoder=decoder, rounds=2, pool_size=8, iterations=2
    ).read_bytes()


def test_a_run_that_was_stopped_gives_what_an_unbroken_one_gives(
    photos: Path, vgg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_distillation, "VALIDATION", 8)
    whole = distill(photos, vgg, tmp_path / "whole")
    train, rounds = feature_distillation._train, []

    def stop(*arguments) -> None:
        rounds.append(1)
        if len(rounds) == 2:
            raise KeyboardInterrupt
        train(*arguments)

    monkeypatch.setattr(feature_distillation, "_train", stop)
    with pytest.raises(KeyboardInterrupt):
        distill(photos, vgg, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "features.safetensors").exists()
    monkeypatch.setattr(feature_distillation, "_train", train)
    assert distill(photos, vgg, tmp_path / "stopped") == whole
    network = load_features(tmp_path / "stopped" / "features.safetensors")
    assert all(parameter.isfinite().all() for parameter in network.parameters())


def test_the_gradients_of_a_pool_are_the_teachers(photos: Path, vgg: Path) -> None:
    """Of the first example, beside autograd through decoder and teacher in one go."""
    from clric_encoder.training.features import LpipsVgg

    teacher, decoder = LpipsVgg(vgg), load_decoder_network("lite").module.train()
    encoder, crops = load_encoder_network("lite").module, Crops(photos, feature_distillation.CROP, 0)
    maker = feature_distillation._PoolMaker(crops, teacher, encoder, decoder, torch.device("cpu"))
    pool = maker.pool(None, 8, (0, 0), held_out=False)
    latent = pool.latents[:1].clone().requires_grad_(True)
    image = feature_distillation._cut(decoder(latent), pool.places[:1])
    original = feature_distillation._cut(pool.photos[:1].float() / 255, pool.places[:1])
    value = teacher.distance(image, teacher.reference(original))
    (gradient,) = torch.autograd.grad(value.sum(), latent, retain_graph=True)
    (of_pool,) = torch.autograd.grad(image, latent, pool.gradients[:1])
    assert value.item() == pytest.approx(pool.values[0].item(), rel=1e-3)
    torch.testing.assert_close(of_pool, gradient, rtol=1e-2, atol=1e-2 * gradient.abs().max().item())


def test_a_network_that_equals_the_teacher_has_no_error_however_examples_are_turned_and_shifted(
    photos: Path, vgg: Path
) -> None:
    """With a distance that is the same for turned and mirrored images: the squared error of pixels."""

    class Pixels:
        def reference(self, original: torch.Tensor) -> torch.Tensor:
            return original

        def distance(self, image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
            return (image - reference).square().mean((1, 2, 3))

    decoder = load_decoder_network("lite").module.train()
    encoder, crops = load_encoder_network("lite").module, Crops(photos, feature_distillation.CROP, 0)
    maker = feature_distillation._PoolMaker(crops, Pixels(), encoder, decoder, torch.device("cpu"))
    pool = maker.pool(None, 8, (0, 0), held_out=False)
    random = np.random.default_rng(1)
    for _ in range(4):
        errors, cosine = feature_distillation._errors(Pixels(), pool, np.arange(8), decoder, random)
        assert errors[1:].max() < 1e-6
        assert cosine == pytest.approx(1, abs=1e-5)


def test_few_photos_are_refused(vgg: Path, tmp_path: Path) -> None:
    Image.new("RGB", (150, 150)).save(tmp_path / "one.png")
    with pytest.raises(ClricError, match="hundreds are needed"):
        distill(tmp_path, vgg, tmp_path / "out")
