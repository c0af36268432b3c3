"""The measures, held to formulas written out here and to values that others measured."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from clric_decoder import ModelError
from clric_decoder.image import read_image
from clric_encoder.autoencoder import load_encoder
from clric_encoder.bench import fid, metrics
from clric_encoder.bench.codecs import make_codecs
from clric_encoder.networks import load_decoder_network
from PIL import Image

RANDOM = np.random.default_rng(0)


def noisy(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A smooth picture, and the same with noise."""
    y, x = np.mgrid[:height, :width]
    picture = np.stack([128 + 100 * np.sin(x / 9), 128 + 100 * np.cos(y / 7), (x + y) % 256], -1)
    return picture.astype(np.uint8), np.clip(picture + RANDOM.normal(0, 20, picture.shape), 0, 255).astype(np.uint8)


def plain_ms_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang, Simoncelli and Bovik (2003), for each channel, averaged."""
    window = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def blur(image: np.ndarray) -> np.ndarray:
        rows = sum(weight * image[i : image.shape[0] - 10 + i] for i, weight in enumerate(window))
        return sum(weight * rows[:, i : rows.shape[1] - 10 + i] for i, weight in enumerate(window))

    results = []
    for channel in range(3):
        x, y = a[..., channel].astype(float), b[..., channel].astype(float)
        result = 1.0
        for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
            mx, my = blur(x), blur(y)
            vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
            similarity = (2 * cov + (0.03 * 255) ** 2) / (vx + vy + (0.03 * 255) ** 2)
            if scale == 4:
                similarity *= (2 * mx * my + (0.01 * 255) ** 2) / (mx**2 + my**2 + (0.01 * 255) ** 2)
            result *= max(similarity.mean(), 0) ** weight
            x, y = (z.reshape(z.shape[0] // 2, 2, z.shape[1] // 2, 2).mean((1, 3)) for z in (x, y))
        results.append(result)
    return float(np.mean(results))


def test_psnr_and_ms_ssim_are_the_formulas() -> None:
    a, b = noisy(192, 224)
    measures, notes = metrics.compare(a, b, {})
    error = ((a.astype(float) - b.astype(float)) ** 2).mean()
    assert measures["psnr"] == pytest.approx(10 * np.log10(255**2 / error))
    assert measures["ms_ssim"] == pytest.approx(plain_ms_ssim(a, b), abs=1e-4)
    assert 0 < measures["ssim"] < 1
    assert notes == []


def test_equal_images() -> None:
    image, _ = noisy(161, 161)
    measures, _ = metrics.compare(image, image, {})
    assert measures["psnr"] == np.inf
    assert measures["ms_ssim"] == pytest.approx(1)


def test_what_an_image_is_too_small_for_is_said() -> None:
    a, b = noisy(160, 300)
    measures, notes = metrics.compare(a, b, {})
    assert set(measures) == {"psnr", "ssim"}
    assert notes == ["too small for MS-SSIM (sides of 161)"]
    assert set(metrics.compare(a[:4], b[:4], {})[0]) == {"psnr"}
    assert metrics.compare(a, b, {}, True)[1][1] == "too small for SSIMULACRA2 (sides of 225)"


def test_ssimulacra2_falls_with_noise() -> None:
    a, b = noisy(225, 240)
    halfway = ((a.astype(int) + b) // 2).astype(np.uint8)
    same, near, far = (metrics.compare(a, image, {}, True)[0]["ssimulacra2"] for image in (a, halfway, b))
    assert same == 100
    assert 100 > near > far + 5


@pytest.mark.parametrize(
    ("name", "lpips", "psnr"),
    [("kodim23", 0.0505, 27.7), pytest.param("kodim01", 0.088, 22.1, marks=pytest.mark.slow)],
)
def test_lpips_agrees_with_what_others_measured(shared: Path, name: str, lpips: float, psnr: float) -> None:
    """TAESD's own reconstructions, latents not coded: measured with another implementation of LPIPS (SqueezeNet)."""
    distance = metrics.Lpips("squeeze", *metrics.find_lpips(shared / "metrics")["squeeze"])
    image = read_image(shared / "data/kodak" / f"{name}.png").pixels
    latent = load_encoder("taesd", models=shared / "models").encode(image)
    decoder = load_decoder_network("taesd", shared / "models").module.eval()
    with torch.inference_mode():
        pixels = decoder(torch.from_numpy(latent)[None])[0].clamp(0, 1)
    decoded = (pixels * 255).round().byte().permute(1, 2, 0).numpy()
    measures, _ = metrics.compare(image, decoded, {"squeeze": distance})
    assert measures["lpips_squeeze"] == pytest.approx(lpips, abs=0.001)
    assert measures["psnr"] == pytest.approx(psnr, abs=0.06)


# The convolutions of torchvision's networks, by name and shape, and the channels of the features that are compared.
TORCHVISION = {
    "alex": (
        "alexnet-owt-7be5be79.pth",
        {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)},
        (64, 192, 384, 256, 256),
    ),
    "vgg": (
        "vgg16-397923af.pth",
        {
            0: (64, 3, 3), 2: (64, 64, 3), 5: (128, 64, 3), 7: (128, 128, 3), 10: (256, 128, 3), 12: (256, 256, 3),
            14: (256, 256, 3), 17: (512, 256, 3), 19: (512, 512, 3), 21: (512, 512, 3), 24: (512, 512, 3),
            26: (512, 512, 3), 28: (512, 512, 3),
        },
        (64, 128, 256, 512, 512),
    ),
}  # fmt: skip


@pytest.mark.parametrize("network", TORCHVISION)
def test_lpips_takes_torchvisions_files(network: str, tmp_path: Path) -> None:
    file, convolutions, channels = TORCHVISION[network]
    state = {"classifier.1.weight": torch.zeros(1)}
    for layer, (outputs, inputs, kernel) in convolutions.items():
        state[f"features.{layer}.weight"] = torch.randn(outputs, inputs, kernel, kernel) / (kernel * inputs**0.5)
        state[f"features.{layer}.bias"] = torch.zeros(outputs)
    torch.save(state, tmp_path / file)
    heads = {f"lin{i}.model.1.weight": torch.full((1, count, 1, 1), 0.1) for i, count in enumerate(channels)}
    torch.save(heads, tmp_path / f"{network}.pth")
    ((found, files),) = metrics.find_lpips(tmp_path).items()
    lpips = metrics.Lpips(found, *files)
    side = metrics.LPIPS_SIDES[network]
    a, b = noisy(side, side)
    assert metrics.compare(a, a, {network: lpips})[0][f"lpips_{network}"] == 0
    assert metrics.compare(a, b, {network: lpips})[0][f"lpips_{network}"] > 0.01
    (tmp_path / file).write_bytes(b"no weights")
    with pytest.raises(ModelError, match=f"are not LPIPS {network} weights"):
        metrics.Lpips(network, *files)


class _Brightness(torch.nn.Module):
    """In the place of Inception: mean, and first pixel of each patch."""

    def forward(self, patches: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features
        return torch.stack([patches.float().mean((1, 2, 3)), patches[:, 0, 0, 0].float()], 1)


def test_fid_features_are_of_whole_patches_from_the_corner() -> None:
    image = np.zeros((300, 600, 3), np.uint8)
    image[:, 256:512] = 10
    image[:, 512:] = 200  # no whole patch
    features = fid.fid_features(image, torch.jit.script(_Brightness()))
    assert features.tolist() == [[0, 0], [10, 10]]
    assert len(fid.fid_features(image[:255], torch.jit.script(_Brightness()))) == 0


@pytest.mark.parametrize("count", [5, 50])
def test_frechet_distance_of_gaussians_with_a_known_one(count: int) -> None:
    """Y = 2 X + 3: covariances A and 4 A have the root 2 A, so that the distance is |means' difference|^2 + trace A."""
    x = RANDOM.normal(size=(count, 20))
    y = 2 * x + 3
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + x.var(0, ddof=1).sum()
    assert fid.frechet_distance(x, y) == pytest.approx(expected)
    assert fid.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


COMPRESSAI = """
import torch

class Model:
    def __init__(self, quality, metric, pretrained, progress):
        assert 1 <= quality <= 8 and metric == "mse" and pretrained
    def eval(self):
        return self
    def compress(self, x):
        self.seen = x.shape
        assert x.shape[2] % 64 == 0 and x.shape[3] % 64 == 0
        pixels = (x * 255).round().byte()
        return {"strings": [[bytes(pixels.flatten().tolist())], [b"hyper"]], "shape": (x.shape[2], x.shape[3])}
    def decompress(self, strings, shape):
        assert strings[1] == [b"hyper"]
        x = torch.frombuffer(bytearray(strings[0][0]), dtype=torch.uint8).view(1, 3, *shape)
        return {"x_hat": x.float() / 255}

image_models = {"mbt2018": Model}
"""


def test_the_zoo_by_a_stand_in_of_the_same_interface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """compressai itself needs torchvision; what is tested is that a file holds all that a decoder needs."""
    (tmp_path / "compressai").mkdir()
    (tmp_path / "compressai/__init__.py").touch()
    (tmp_path / "compressai/zoo.py").write_text(COMPRESSAI)
    (tmp_path / "compressai-9.9.dist-info").mkdir()
    (tmp_path / "compressai-9.9.dist-info/METADATA").write_text("Name: compressai\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    for module in [name for name in sys.modules if name.split(".")[0] == "compressai"]:
        monkeypatch.delitem(sys.modules, module)
    works, lacks = make_codecs(["mbt2018", "cheng2020-attn"], [], [], [], None)
    assert works.unavailable is None
    assert "9.9" in works.version
    assert works.settings == tuple(f"quality {quality}" for quality in range(1, 9))
    assert lacks.unavailable is not None
    assert "weights cannot be had" in lacks.unavailable
    image, _ = noisy(70, 65)
    data = works.open_encoder()(image, "quality 3")
    assert len(data) == 10 + 4 + 128 * 128 * 3 + 4 + 5
    np.testing.assert_array_equal(works.open_decoder()(data), image)


@pytest.mark.parametrize("family", ["avif", "jxl", "webp", "jpeg"])
def test_formats_get_better_with_every_setting(family: str) -> None:
    (codec,) = make_codecs([family], [], [], [], None)
    if codec.unavailable:
        pytest.skip(codec.unavailable)
    image = np.asarray(Image.fromarray(noisy(64, 80)[1]).resize((160, 128)))
    encode, decode = codec.open_encoder(), codec.open_decoder()
    files = [encode(image, setting) for setting in (codec.settings[0], codec.settings[-1])]
    errors = [np.square(decode(data).astype(float) - image).mean() for data in files]
    assert len(files[0]) < len(files[1])
    assert errors[0] > errors[1]
