"""LPIPS-VGG, DISTS and FD-VGG16's features, held to the plain formulas over the whole image at once."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clric_decoder import ModelError
from clric_decoder.image import read_image
from clric_encoder.bench import vgg
from clric_encoder.training.features import LpipsVgg


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VGG16's shapes with random weights that keep the size of what goes through."""
    random = np.random.default_rng(1)
    widths = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    arrays = {}
    for number, (inputs, outputs) in enumerate(pairwise(widths)):
        arrays[f"conv{number}.weight"] = random.normal(0, (2 / 9 / inputs) ** 0.5, (outputs, inputs, 3, 3))
        arrays[f"conv{number}.bias"] = random.normal(0, 0.1, outputs)
    for number, width in enumerate((64, 128, 256, 512, 512)):
        arrays[f"lin{number}.weight"] = random.uniform(0, 1, (1, width, 1, 1))
    path = tmp_path_factory.mktemp("vgg") / "vgg16_lpips.npz"
    np.savez(path, **{name: array.astype(np.float16) for name, array in arrays.items()})
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dists") / "weights.pt"
    generator = torch.Generator().manual_seed(2)
    torch.save({name: torch.rand(1, 1475, 1, 1, generator=generator) for name in ("alpha", "beta")}, path)
    return path


def pair(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(height)
    y, x = np.mgrid[:height, :width]
    image = np.stack([128 + 90 * np.sin(x / 9 + y / 31), 128 + 90 * np.cos(y / 7), (3 * x + y) % 256], -1)
    return image.astype(np.uint8), np.clip(image + random.normal(0, 25, image.shape), 0, 255).astype(np.uint8)


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255


def plain_dists(network: LpipsVgg, weights: Path, original: np.ndarray, decoded: np.ndarray) -> float:
    """As the authors' code (dists-pytorch), written out."""
    hann = torch.tensor(np.hanning(5)[1:-1, None] * np.hanning(5)[None, 1:-1]).float()

    def features(image: torch.Tensor) -> list[torch.Tensor]:
        x = (image - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
            :, None, None
        ]
        result = [image]
        for number, layer in enumerate(network.layers):
            if number in (2, 4, 7, 10):
                kernel = (hann / hann.sum()).repeat(x.shape[1], 1, 1, 1)
                x = (F.conv2d(x**2, kernel, stride=2, padding=1, groups=x.shape[1]) + 1e-12).sqrt()
            x = F.relu(layer(x))
            if number in (1, 3, 6, 9, 12):
                result.append(x)
        return result

    stored = torch.load(weights)
    alpha, beta = stored["alpha"].flatten(), stored["beta"].flatten()
    total = alpha.sum() + beta.sum()
    score, at = 1.0, 0
    with torch.inference_mode():
        for a, b in zip(features(tensor(original)), features(tensor(decoded)), strict=True):
            a, b = a[0].double().flatten(1), b[0].double().flatten(1)
            means = a.mean(1), b.mean(1)
            first = (2 * means[0] * means[1] + 1e-6) / (means[0] ** 2 + means[1] ** 2 + 1e-6)
            covariance = ((a - means[0][:, None]) * (b - means[1][:, None])).mean(1)
            second = (2 * covariance + 1e-6) / (a.var(1, correction=0) + b.var(1, correction=0) + 1e-6)
            part = slice(at, at + len(a))
            score -= float((alpha[part] * first + beta[part] * second).sum() / total)
            at += len(a)
    return score


# One tile; tiles of 256 whose edges do not fall together with the pooling's; a last tile of two rows.
@pytest.mark.parametrize(("height", "width", "tile"), [(90, 75, 768), (301, 331, 256), (258, 300, 256)])
def test_tiles_give_what_the_whole_image_gives(
    network: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, height: int, width: int, tile: int
) -> None:
    monkeypatch.setattr(vgg, "_TILE", tile)
    original, decoded = pair(height, width)
    result = vgg.VggJudge(network, weights).compare(original, decoded)
    plain = LpipsVgg(network)
    with torch.inference_mode():
        features = [plain.features(tensor(image)) for image in (original, decoded)]
        lpips = float(plain.distance(tensor(decoded), plain.reference(tensor(original))))
    assert lpips > 0.01
    assert result.values["lpips_vgg"] == pytest.approx(lpips, rel=1e-4)
    dists = plain_dists(plain, weights, original, decoded)
    assert dists > 0.01
    assert result.values["dists"] == pytest.approx(dists, rel=1e-4)
    for patches, deepest in zip((result.original_patches, result.patches), features, strict=True):
        whole = [
            deepest[-1][0, :, y : y + 16, x : x + 16].mean((1, 2)).numpy()
            for y in range(0, 16 * (height // 256), 16)
            for x in range(0, 16 * (width // 256), 16)
        ]
        assert len(patches) == len(whole) == (height // 256) * (width // 256)
        if whole:
            np.testing.assert_allclose(patches, whole, rtol=1e-4, atol=1e-5)


def test_equal_images_and_an_original_that_changes(network: Path, weights: Path) -> None:
    judge = vgg.VggJudge(network, weights)
    (first, first_decoded), (second, second_decoded) = pair(64, 80), pair(80, 64)
    assert judge.compare(first, first).values == {"lpips_vgg": 0, "dists": pytest.approx(0, abs=1e-9)}
    alone = [vgg.VggJudge(network, weights).compare(*images).values for images in (pair(64, 80), pair(80, 64))]
    assert judge.compare(first, first_decoded).values == alone[0]
    assert judge.compare(second, second_decoded).values == alone[1]
    assert set(vgg.VggJudge(network, None).compare(first, second.reshape(64, 80, 3)).values) == {"lpips_vgg"}


def test_damaged_weights_are_named(network: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="does not contain DISTS weights"):
        vgg.VggJudge(network, tmp_path / "weights.pt")


def test_dists_on_a_photo(shared: Path) -> None:
    """With the real weights: blur and noise cost more the stronger they are, and a shift by two pixels very little."""
    weights = vgg.find_dists()
    if weights is None:
        pytest.skip("dists-pytorch is not installed")
    judge = vgg.VggJudge(shared / "metrics/vgg16_lpips.npz", weights)
    image = read_image(shared / "data/kodak/kodim15.png").pixels
    crop = image[100:292, 300:492]

    def blurred(side: int) -> np.ndarray:
        kernel = torch.ones(3, 1, side, side) / side**2
        padded = F.pad(tensor(crop) * 255, (side // 2,) * 4, mode="replicate")
        return F.conv2d(padded, kernel, groups=3)[0].permute(1, 2, 0).round().byte().numpy()

    def noisy(deviation: float) -> np.ndarray:
        noise = np.random.default_rng(0).normal(0, deviation, crop.shape)
        return np.clip(crop + noise, 0, 255).astype(np.uint8)

    def dists(other: np.ndarray) -> float:
        return judge.compare(crop, other).values["dists"]

    assert dists(crop) == pytest.approx(0, abs=1e-9)
    assert 0.03 < dists(blurred(3)) < dists(blurred(7)) < 1
    assert 0.03 < dists(noisy(8)) < dists(noisy(30)) < 1
    shifted = image[102:294, 302:494]
    assert dists(shifted) < dists(blurred(7)) / 2
