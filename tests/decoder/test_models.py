"""Names, folders and manifests: what a user sees when a decoder is there, missing, damaged or wrong."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from clric_decoder import models
from clric_decoder.errors import ModelError
from commands import IS_ROOT


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache is an empty folder, and $CLRIC_MODELS is unset."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CLRIC_MODELS", raising=False)
    return models.cache_folder()


def put_decoder(folder: Path, name: str, space: str = "sd1", content: bytes = b"onnx") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.onnx"
    path.write_bytes(content)
    manifest = {
        "name": name,
        "latent_space": space,
        "channels": 4,
        "halo": 19,
        "file": path.name,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    path.with_suffix(".json").write_text(json.dumps(manifest))
    return path


def test_every_autoencoder_is_of_a_known_space() -> None:
    assert {a.space for a in models.AUTOENCODERS.values()} == set(models.LATENT_SPACES)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [("halo", -1, "halo of -1"), ("halo", 10**9, "0 to 1024"), ("channels", 16, "16 channels, sd1 has 4")],
)
def test_manifest_with_impossible_numbers(tmp_path: Path, field: str, value: int, reason: str) -> None:
    path = put_decoder(tmp_path, "taesd").with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ModelError, match=reason):
        models.find_decoder("taesd", tmp_path)


@pytest.mark.skipif(IS_ROOT, reason="root reads what nobody else may")
def test_folders_and_files_without_permission(tmp_path: Path) -> None:
    put_decoder(tmp_path / "a", "taesd")
    (tmp_path / "a").chmod(0o600)
    found = put_decoder(tmp_path / "b", "taesd")
    assert models.find_decoder("taesd", tmp_path)[0] == found
    found.chmod(0)
    with pytest.raises(ModelError, match=r"cannot be read \(Permission denied"):
        models.find_decoder("taesd", tmp_path)
    (tmp_path / "a").chmod(0o700)


def test_aliases_name_the_same_autoencoder() -> None:
    assert models.find_autoencoder("CompVis/stable-diffusion-v1-4").name == "sd14"
    assert models.find_autoencoder("stable-diffusion-2-inpainting").name == "sd2-inpainting"
    with pytest.raises(ModelError, match=r"'taesd4' is not known; use one of small, lite, sd14, .*taef2"):
        models.find_autoencoder("taesd4")


def test_the_models_folder_comes_before_the_environment_before_the_cache(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = put_decoder(cache, "taesd")
    assert models.find_decoder("taesd")[0] == last
    monkeypatch.setenv("CLRIC_MODELS", os.pathsep.join([str(tmp_path / "none"), str(tmp_path / "env")]))
    second = put_decoder(tmp_path / "env" / "nested", "taesd")
    assert models.find_decoder("taesd")[0] == second
    first = put_decoder(tmp_path / "dir", "taesd")
    path, manifest = models.find_decoder("taesd", tmp_path / "dir")
    assert path == first
    assert manifest["latent_space"] == "sd1"


def test_a_hub_name_and_a_path_find_the_same_decoder(tmp_path: Path) -> None:
    path = put_decoder(tmp_path, "taesd")
    assert models.find_decoder("madebyollin/taesd", tmp_path) == models.find_decoder(path)


def test_fp16_serves_where_fp32_is_not(tmp_path: Path) -> None:
    half = put_decoder(tmp_path, "taesd.fp16")
    assert models.find_decoder("taesd", tmp_path)[0] == half
    full = put_decoder(tmp_path, "taesd")
    assert models.find_decoder("taesd", tmp_path)[0] == full
    assert models.find_decoder("taesd.fp16", tmp_path)[0] == half


def test_missing_decoder_names_file_folders_and_command(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ModelError) as caught:
        models.find_decoder("taesd", tmp_path)
    message = str(caught.value)
    for part in ("taesd.onnx", str(tmp_path), str(cache), "clric-export taesd"):
        assert part in message
    assert "\n" not in message


def test_missing_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gone\.onnx does not exist"):
        models.find_decoder(tmp_path / "gone.onnx")
    with pytest.raises(ModelError, match=r"gone: no such folder \(--models\)"):
        models.find_decoder("taesd", tmp_path / "gone")
    with pytest.raises(ModelError, match=r"neither a name nor a path to an \.onnx file"):
        models.find_decoder("some/decoder.pt")


def test_missing_manifest_says_what_to_do(tmp_path: Path) -> None:
    path = put_decoder(tmp_path, "mine")
    path.with_suffix(".json").unlink()
    with pytest.raises(ModelError, match=r"mine\.onnx has no manifest: .*mine\.json does not exist; copy it"):
        models.find_decoder(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is not a JSON object"),
        ("{", "is not a JSON object"),
        ("[" * 50_000, "is not a JSON object"),
        ("{}" + " " * 70_000, "is not a JSON object"),
        ('{"name": "mine"}', "no valid 'latent_space'"),
    ],
)
def test_damaged_manifest_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    path = put_decoder(tmp_path, "mine")
    path.with_suffix(".json").write_text(text)
    with pytest.raises(ModelError, match=message):
        models.find_decoder(path)


def test_tampered_file_is_refused(tmp_path: Path) -> None:
    path = put_decoder(tmp_path, "taesd")
    path.write_bytes(b"ommx")
    with pytest.raises(ModelError, match=r"taesd\.onnx does not match taesd\.json \(sha256 "):
        models.find_decoder("taesd", tmp_path)


def test_wrong_space_is_refused_with_what_would_fit(tmp_path: Path) -> None:
    put_decoder(tmp_path, "small-sdxl", "sdxl")
    _, manifest = models.find_decoder(put_decoder(tmp_path, "taesd"))
    models.check_space(manifest, "sd1")
    with pytest.raises(ModelError) as caught:
        models.check_space(manifest, "sdxl", tmp_path)
    assert "taesd is of latent space sd1, the stream is of sdxl" in str(caught.value)
    assert str(caught.value).endswith("compatible decoders: sdxl-refiner, taesdxl, small-sdxl")
    with pytest.raises(ModelError, match="the stream is of custom-0001020304050607; no compatible decoder is known"):
        models.check_space(manifest, "custom-0001020304050607")


def test_weights_are_found_in_the_shared_folder(shared: Path) -> None:
    for name in ("taesd", "taesdxl", "taesd3", "taef1", "taef2"):
        for half in ("encoder", "decoder"):
            path = models.find_weights(models.AUTOENCODERS[name], half, shared / "models")
            assert path is not None
            assert path.stem == f"{name}_{half}"
    assert models.find_weights(models.AUTOENCODERS["sd14"], "encoder", shared / "models") is None


def test_weights_in_diffusers_layout_need_both_files(tmp_path: Path) -> None:
    folder = tmp_path / "sd14"
    folder.mkdir()
    (folder / "config.json").touch()
    assert models.find_weights(models.AUTOENCODERS["sd14"], "decoder", tmp_path) is None
    (folder / "diffusion_pytorch_model.safetensors").touch()
    assert models.find_weights(models.AUTOENCODERS["sd14"], "decoder", tmp_path) == folder
    assert models.find_weights(models.AUTOENCODERS["sd14"], "decoder", folder) == folder


def test_imports_neither_torch_nor_onnxruntime() -> None:
    code = "import sys, clric_decoder.models; print({'torch', 'onnxruntime', 'diffusers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
