"""VAE decoders to ONNX: the contract of the file and its manifest, and what a user of clric-export sees."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner, Result
from clric_decoder.errors import ModelError
from clric_decoder.models import AUTOENCODERS, LATENT_SPACES, check_space, find_decoder
from clric_encoder.autoencoder import load_encoder
from clric_encoder.networks import load_decoder_network, receptive_halo
from clric_export.cli import command
from clric_export.onnx import export_onnx, parity, write_network
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image

TINY = [name for name, entry in AUTOENCODERS.items() if entry.kind == "tiny"]

# vae/config.json of each, less what is the same in all: four blocks, three image channels, SiLU.
KL_CONFIGS: dict[str, dict[str, Any]] = {
    "sd14": {"sample_size": 512},
    "sdxl-refiner": {
        "sample_size": 1024,
        "norm_num_groups": 32,
        "scaling_factor": 0.13025,
        "force_upcast": True,
    },
    "sd2-inpainting": {"sample_size": 512, "norm_num_groups": 32},
}
KL_COMMON: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
}
FULL, REDUCED = [128, 256, 512, 512], [32, 32, 64, 64]


def save_kl(folder: Path, name: str, channels: list[int]) -> AutoencoderKL:
    """Saves a seeded random VAE in diffusers layout, as a user's download would lie there."""
    torch.manual_seed(0)
    vae = AutoencoderKL(**KL_COMMON, **KL_CONFIGS[name], block_out_channels=channels).eval()
    vae.save_pretrained(folder / name)
    return vae


def run_onnx(path: Path, latent: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["image"], {"latent": latent})[0]


def invoke(arguments: list[str]) -> Result:
    """clric-export in this process, with the exit code that its process would have."""
    result = CliRunner().invoke(command, arguments, standalone_mode=False)
    if result.exception is None:
        result.exit_code = result.return_value
    return result


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("name", TINY)
def test_export_of_every_tiny_decoder(name: str, shared: Path, tmp_path: Path) -> None:
    result = invoke([name, "-o", str(tmp_path), "--models", str(shared / "models")])
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.output.splitlines()] == [
        str(tmp_path / f"{name}.onnx"),
        str(tmp_path / f"{name}.fp16.onnx"),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}{suffix}" for suffix in (".onnx", ".json", ".fp16.onnx", ".fp16.json")
    )
    entry = AUTOENCODERS[name]
    channels = LATENT_SPACES[entry.space].channels
    for stem, precision in ((name, "fp32"), (f"{name}.fp16", "fp16")):
        path, manifest = find_decoder(stem, tmp_path)
        assert manifest == {
            "name": stem,
            "half": "decoder",
            "latent_space": entry.space,
            "channels": channels,
            # The pooling branch of TAEF2 looks at the whole image.
            "halo": None if name == "taef2" else 19,
            "file": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "licence": "MIT",
            "source": entry.source,
            "precision": precision,
            "parity": manifest["parity"],
            "opset": 17,
            "versions": manifest["versions"],
        }
        assert set(manifest["versions"]) == {"clric", "torch", "diffusers", "onnx"}
        assert manifest["parity"] < 2e-5
        check_space(manifest, entry.space)
        image = run_onnx(path, 3 * normal(2, channels, 5, 3))
        assert image.shape == (2, 3, 40, 24)
        assert image.dtype == np.float32
        assert image.min() >= 0
        assert image.max() <= 1
        assert image.std() > 0.05
    assert (tmp_path / f"{name}.fp16.onnx").stat().st_size < 0.52 * (tmp_path / f"{name}.onnx").stat().st_size


@pytest.mark.parametrize("name", TINY)
def test_a_photo_survives_the_way_there_and_back(name: str, shared: Path, tmp_path: Path) -> None:
    """The encoder's latents are what the exported decoder takes: the same scaling, the same channels."""
    photo = np.asarray(Image.open(next((shared / "data/kodak").glob("*23*"))).convert("RGB"))[:256, :384]
    latent = load_encoder(name, shared / "models").encode(photo)
    export_onnx(load_decoder_network(name, shared / "models"), tmp_path / "x.onnx", "fp16")
    image = run_onnx(tmp_path / "x.onnx", latent[None])[0].transpose(1, 2, 0)
    mse = np.mean((image * 255 - photo) ** 2)
    assert 10 * np.log10(255**2 / mse) > 25


def test_diffusers_layout_gives_the_same_decoder(shared: Path, tmp_path: Path) -> None:
    """The files of the hub lack the clamp's number and give [-1, 1]: the decoder is the same."""
    ours = load_decoder_network("taesd", shared / "models")
    vae = AutoencoderTiny().eval()
    vae.decoder.layers.load_state_dict(ours.module.layers.state_dict())
    vae.save_pretrained(tmp_path / "taesd")
    theirs = load_decoder_network("taesd", tmp_path)
    latent = torch.from_numpy(3 * normal(1, 4, 6, 6))
    with torch.inference_mode():
        image = ours.module(latent)
        assert torch.equal(theirs.module(latent), image)
        torch.testing.assert_close((vae.decode(latent).sample / 2 + 0.5).clamp(0, 1), image, atol=1e-5, rtol=0)


def test_the_halo_is_what_a_tile_needs(shared: Path) -> None:
    decoder = load_decoder_network("taesd", shared / "models")
    assert decoder.halo == 19
    latent = torch.from_numpy(normal(1, 4, 50, 12))
    with torch.inference_mode():
        whole = decoder.module(latent)[..., 8 * 20 : 8 * 30, :]
        exact = decoder.module(latent[..., 20 - 19 : 30 + 19, :])[..., 8 * 19 : 8 * 29, :]
        short = decoder.module(latent[..., 20 - 8 : 30 + 8, :])[..., 8 * 8 : 8 * 18, :]
    torch.testing.assert_close(exact, whole, atol=1e-5, rtol=0)
    assert (short - whole).abs().max() > 1e-4


def test_halo_of_one_convolution() -> None:
    conv = torch.nn.Conv2d(1, 1, 3, padding=1)
    up = torch.nn.Upsample(scale_factor=2)
    assert receptive_halo(torch.nn.Sequential(conv, up, up, up)) == 1
    assert receptive_halo(torch.nn.Sequential(up, up, up)) == 0
    assert receptive_halo(torch.nn.Sequential(torch.nn.GroupNorm(1, 1), up, up, up)) is None


@pytest.mark.parametrize("name", KL_CONFIGS)
def test_export_of_reduced_kl_decoders(name: str, tmp_path: Path) -> None:
    vae = save_kl(tmp_path, name, REDUCED)
    result = invoke([name, "-o", str(tmp_path / "out"), "--models", str(tmp_path)])
    assert result.exit_code == 0, result.output
    latent = 0.3 * normal(1, 4, 9, 7)
    with torch.inference_mode():
        raw = torch.from_numpy(latent) / AUTOENCODERS[name].scaling
        expected = (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1).numpy()
    assert expected.std() > 0.02
    for stem, tolerance in ((name, 1e-4), (f"{name}.fp16", 1e-2)):
        path, manifest = find_decoder(stem, tmp_path / "out")
        assert (manifest["halo"], manifest["latent_space"]) == (None, AUTOENCODERS[name].space)
        assert manifest["licence"].startswith("OpenRAIL")
        np.testing.assert_allclose(run_onnx(path, latent), expected, atol=tolerance)


def test_export_of_a_full_size_kl_decoder(tmp_path: Path) -> None:
    save_kl(tmp_path, "sd14", FULL)
    decoder = load_decoder_network("sd14", tmp_path)
    assert sum(p.numel() for p in decoder.module.parameters()) == 49_490_199
    manifest = write_network(decoder, tmp_path, "fp16")
    assert manifest["parity"] < 1e-2
    assert (tmp_path / "sd14.fp16.onnx").stat().st_size < 101e6


def test_one_precision_alone(shared: Path, tmp_path: Path) -> None:
    arguments = ["taesd", "-o", str(tmp_path), "--models", str(shared / "models")]
    assert invoke([*arguments, "--fp16"]).exit_code == 0
    assert find_decoder("taesd", tmp_path)[0].name == "taesd.fp16.onnx"
    assert invoke([*arguments, "--fp32"]).exit_code == 0
    assert find_decoder("taesd", tmp_path)[0].name == "taesd.onnx"


def test_the_default_folder_is_where_the_decoder_looks(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert invoke(["taesd", "--fp32", "--models", str(shared / "models")]).exit_code == 0
    assert tmp_path in find_decoder("taesd")[0].parents


def test_a_tampered_export_is_refused(shared: Path, tmp_path: Path) -> None:
    write_network(load_decoder_network("taesd", shared / "models"), tmp_path, "fp32")
    path = tmp_path / "taesd.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"taesd\.onnx does not match taesd\.json"):
        find_decoder("taesd", tmp_path)


def test_parity_notices_another_decoder(shared: Path, tmp_path: Path) -> None:
    """And nothing is left behind by an export that fails."""
    decoder = load_decoder_network("taesd", shared / "models")
    export_onnx(decoder, tmp_path / "x.onnx", "fp32")
    other = load_decoder_network("taesdxl", shared / "models")
    assert parity(decoder, tmp_path / "x.onnx") < 2e-5
    assert parity(other, tmp_path / "x.onnx") > 0.1


def test_unknown_names_and_unwritable_folders_are_one_line(shared: Path, tmp_path: Path) -> None:
    result = invoke(["taesd4", "-o", str(tmp_path)])
    assert result.exit_code == 1
    assert result.output.startswith("clric-export: taesd4: autoencoder 'taesd4' is not known; use one of small, lite")
    (tmp_path / "file").touch()
    arguments = ["taesd", "-o", str(tmp_path / "file" / "folder"), "--models", str(shared / "models")]
    result = invoke(arguments)
    assert result.exit_code == 1
    assert result.output.count("\n") == 1
    assert result.output.startswith(f"clric-export: taesd: {tmp_path / 'file' / 'folder'}: cannot be written (")


@pytest.mark.parametrize("name", ["lite", "small"])
def test_what_comes_with_clric_needs_no_export(name: str, tmp_path: Path) -> None:
    result = invoke([name, "-o", str(tmp_path)])
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert "comes with clric as ONNX" in result.output


def test_a_failing_exporter_is_one_line(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Unsupported:\nONNX export of operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    result = invoke(["taesd", "-o", str(tmp_path), "--models", str(shared / "models")])
    line = "clric-export: taesd: the export to ONNX failed (Unsupported: ONNX export of operator)\n"
    assert (result.exit_code, result.output) == (1, line)


def test_a_client_without_torch_is_told_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['onnx'] = None\n"
        "sys.argv[1:] = ['taesd']; from clric_export.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "clric-export: taesd: onnx is not installed; run: pip install 'clric[export]'\n"


def test_missing_weights_are_one_line(tmp_path: Path) -> None:
    """In a process of its own: the hub's client reads its environment when it is imported."""
    environment = {k: v for k, v in os.environ.items() if k != "CLRIC_MODELS"}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    command = [
        sys.executable,
        "-c",
        "from clric_export.cli import main; main()",
        "sdxl-refiner",
        "-o",
        tmp_path,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "clric-export: sdxl-refiner: the decoder weights of sdxl-refiner are missing: no "
    )
    assert "hf download stabilityai/stable-diffusion-xl-refiner-1.0 vae/config.json" in done.stderr
    assert not list(tmp_path.glob("*.onnx"))


def test_manifests_are_readable_json(shared: Path, tmp_path: Path) -> None:
    write_network(load_decoder_network("taesd", shared / "models"), tmp_path, "fp32")
    text = (tmp_path / "taesd.json").read_text()
    assert json.loads(text)["name"] == "taesd"
    assert text.endswith("}\n")
