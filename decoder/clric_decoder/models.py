"""Latent spaces, the autoencoders that serve each, and where their files lie.

Takes names and folders, gives paths and manifests. Imports neither torch nor onnxruntime: the encoder and
export packages build on the same tables and the same search. Files are looked at with os.path, not pathlib, whose
answer to a folder without permission is an exception.

Files are searched for in the folder given by ``--models``, in the folders of ``$CLRIC_MODELS`` (separated as
``$PATH`` is), in the user's cache, and in what comes with this package, in this order; each folder directly and one
folder level down.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import platformdirs

from .errors import ModelError


@dataclass(frozen=True)
class LatentSpace:
    """What a family of autoencoders shares: the channel count and the meaning of each channel.

    ``number`` is the space's number in a stream's header. Every space has one latent for 8 x 8 pixels.
    """

    name: str
    number: int
    channels: int


LATENT_SPACES: dict[str, LatentSpace] = {
    space.name: space
    for space in (
        LatentSpace("sd1", 1, 4),  # Stable Diffusion 1.x and 2.x: the raw latent times 0.18215
        LatentSpace("sdxl", 2, 4),  # Stable Diffusion XL: the raw latent times 0.13025
        LatentSpace("sd3", 3, 16),  # Stable Diffusion 3: (raw - 0.0609) * 1.5305
        LatentSpace("flux1", 4, 16),  # FLUX.1: (raw - 0.1159) * 0.3611
        LatentSpace("flux2", 5, 32),  # FLUX.2: normalised for its diffusion model, not in patches
        LatentSpace("clric", 6, 8),  # clric's own, of the autoencoder `small`
    )
}


@dataclass(frozen=True)
class Autoencoder:
    """A published VAE: its latent space, its files and its licence.

    ``kind``: ``tiny`` is the TAESD family, ``kl`` is diffusers' AutoencoderKL. ``lite``, an encoder of TAESD's kind and
        a decoder that exists as ONNX only, and ``small``, both of whose halves are ONNX, come with clric.
    ``encoder_stem``, ``decoder_stem``: names of the local weights of each half, without .safetensors or .pth;
        None where a model comes as one diffusers folder or as ONNX only.
    ``hub_repo``, ``hub_subfolder``: where the diffusers layout lies on the Hugging Face hub; None where there
        is none.
    ``hub_revision``, ``hub_sha256``: the commit of the repository that is taken, and the sha256 of its weights; None
        where that is not known.
    ``scaling``, ``shift``: latent = (posterior mean - shift) * scaling.
    ``source``: where a person gets the weights.
    ``aliases``: other names that a command accepts.
    """

    name: str
    space: str
    kind: Literal["tiny", "kl", "lite", "small"]
    encoder_stem: str | None
    decoder_stem: str | None
    hub_repo: str | None
    hub_subfolder: str | None
    hub_revision: str | None
    hub_sha256: str | None
    scaling: float
    shift: float
    licence: str
    source: str
    aliases: tuple[str, ...] = ()


def _kl(
    name: str, space: str, repo: str, revision: str, sha256: str | None, scaling: float, licence: str
) -> Autoencoder:
    return Autoencoder(
        name, space, "kl", None, None, repo, "vae", revision, sha256, scaling, 0.0, licence,
        f"https://huggingface.co/{repo}", (repo, repo.split("/")[1]),
    )  # fmt: skip


def _tiny(name: str, space: str, revision: str, sha256: str) -> Autoencoder:
    repo = f"madebyollin/{name}"
    return Autoencoder(
        name, space, "tiny", f"{name}_encoder", f"{name}_decoder", repo, None, revision, sha256, 1.0, 0.0, "MIT",
        f"https://huggingface.co/{repo}", (repo,),
    )  # fmt: skip


# Commits and sums are those that several public projects pin: this was written where the hub could not be reached. The
# sums of sd14's and sdxl-refiner's weights are not known: from the hub they are loaded as NAME@REVISION alone.
AUTOENCODERS: dict[str, Autoencoder] = {
    autoencoder.name: autoencoder
    for autoencoder in (
        Autoencoder(
            "small", "clric", "small", None, None, None, None, None, None, 1.0, 0.0, "BSD-3-Clause", "comes with clric"
        ),
        Autoencoder(
            "lite", "sd1", "lite", "lite_encoder", None, None, None, None, None, 1.0, 0.0, "BSD-3-Clause",
            "comes with clric",
        ),
        _kl(
            "sd14", "sd1", "CompVis/stable-diffusion-v1-4", "133a221b8aa7292a167afc5127cb63fb5005638b", None,
            0.18215, "OpenRAIL-M",
        ),
        _kl(
            "sdxl-refiner", "sdxl", "stabilityai/stable-diffusion-xl-refiner-1.0",
            "5d4cfe854c9a9a87939ff3653551c2b3c99a4356", None, 0.13025, "OpenRAIL++-M",
        ),
        # stabilityai withdrew its repositories of Stable Diffusion 2 in November 2025; this is a mirror.
        _kl(
            "sd2-inpainting", "sd1", "sd2-community/stable-diffusion-2-inpainting",
            "5f74973cbb64c8568780732c17f43eb269d63a0d",
            "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815", 0.18215, "OpenRAIL++-M",
        ),
        _tiny(
            "taesd", "sd1", "614f76814bbe30edbe2e627ace1c2234c81a2c0e",
            "db169d69145ec4ff064e49d99c95fa05d3eb04ee453de35824a6d0f325513549",
        ),
        _tiny(
            "taesdxl", "sdxl", "b20258aaef75ef61e659c1e0f14f251cf0ad153e",
            "ff4824aca94dd6111e0340fa749347fb74101060d9712cb5ef1ca8f1cf17502f",
        ),
        _tiny(
            "taesd3", "sd3", "d58dcaccd2b36fcb7a6b9e93c1cc507acab5a778",
            "6f79c1397cb9ce1dac363722dbe70147aee0ccca75e28338f8482fe515891399",
        ),
        _tiny(
            "taef1", "flux1", "b1b2d00e9e440cfbf3dedb34266864da86016ceb",
            "47a6c2bff850da04b267cab70fe3553fef57255eb9a8e76852baa0a87850e54d",
        ),
        # TAEF2 has pooling branches that diffusers' AutoencoderTiny lacks, so there is no diffusers layout of
        # it to load from the hub: its weights are two .pth files in the GitHub repository (January 2026).
        Autoencoder(
            "taef2", "flux2", "tiny", "taef2_encoder", "taef2_decoder", None, None, None, None, 1.0, 0.0, "MIT",
            "https://github.com/madebyollin/taesd",
        ),
    )
}  # fmt: skip

# Image decoders that a stream can name as the one it was trained for (specification, "The image decoder"): by latent
# space and number, the name and the SHA-256 of the ONNX file. New weights get a new number.
IMAGE_DECODERS: dict[str, dict[int, tuple[str, str]]] = {
    "sd1": {
        1: ("lite", "e184c717f4daafb03bcfbad44cdcc2d9f13ee2ffe6aa2d230933f34c330c0a45"),  # in weights/1.0
        2: ("lite", "98486452a57ca0980c670bdd9d45087fe5a06aa10f00b6d0cc27202568e0e7e0"),
    },
    "clric": {
        1: ("small", "4dbbc28b086a2b5a667d7c5292041ac6349f970b6d7744133c50a0c236803bdb"),  # in weights/1.0
        2: ("small", "8250fc3a5e1e3c8dfe5756ad4a925f03efe982d1077c7ca5744714635e528d51"),
    },
}

# The encoders of kind tiny and lite: residual blocks at 1/1, 1/2, 1/4 and 1/8 of the image's size, and channels.
ENCODER_SHAPES: dict[str, tuple[tuple[int, ...], int]] = {"tiny": ((1, 3, 3, 3), 64), "lite": ((0, 1, 2, 3), 48)}

# What comes with clric: the decoders of the autoencoders ``small`` and ``lite``.
WEIGHTS = Path(__file__).parent / "weights"

Half = Literal["encoder", "decoder"]
WEIGHT_SUFFIXES = (".safetensors", ".pth")
DIFFUSERS_FILES = ("config.json", "diffusion_pytorch_model.safetensors")

_MANIFEST_FIELDS: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "latent_space": str,
    "channels": int,
    "halo": (int, type(None)),
    "sha256": str,
}
_MANIFEST_LIMIT = 1 << 16
_HALO_LIMIT = 1024


def find_autoencoder(name: str, called: str = "autoencoder") -> Autoencoder:
    """The table's entry for a name or an alias. Raises ModelError for others, in which the half wanted is called so."""
    for autoencoder in AUTOENCODERS.values():
        if name == autoencoder.name or name in autoencoder.aliases:
            return autoencoder
    raise ModelError(f"{called} {name!r} is not known; use one of {', '.join(AUTOENCODERS)}")


def cache_folder() -> Path:
    """The user's folder of models: where clric-export writes."""
    return Path(platformdirs.user_cache_dir("clric")) / "models"


def search_folders(models: str | os.PathLike[str] | None = None) -> list[Path]:
    """The folders in which models are searched for, first to last.

    ``models`` is the user's folder, and must exist (ModelError); those of ``$CLRIC_MODELS`` need not.
    """
    folders = []
    if models is not None:
        if not os.path.isdir(models):
            raise ModelError(f"{os.fspath(models)}: no such folder (--models)")
        folders.append(Path(models))
    folders += [Path(folder) for folder in os.environ.get("CLRIC_MODELS", "").split(os.pathsep) if folder]
    return [*folders, cache_folder(), WEIGHTS]


def find_weights(autoencoder: Autoencoder, half: Half, models: str | os.PathLike[str] | None = None) -> Path | None:
    """The local weights of one half of an autoencoder, or None where there are none.

    A file (``taesd_encoder.safetensors``) or a folder ``<name>/`` in diffusers layout (config.json with
    diffusion_pytorch_model.safetensors).
    """
    stem = autoencoder.encoder_stem if half == "encoder" else autoencoder.decoder_stem
    for folder in search_folders(models):
        for place in _places(folder):
            for suffix in WEIGHT_SUFFIXES if stem else ():
                if os.path.isfile(place / f"{stem}{suffix}"):
                    return place / f"{stem}{suffix}"
            # TAEF2 has no diffusers layout (see AUTOENCODERS), and one level down is `place` itself.
            is_layout = all(os.path.isfile(place / file) for file in DIFFUSERS_FILES)
            if autoencoder.hub_repo and place.name == autoencoder.name and is_layout:
                return place
    return None


def missing_weights(
    autoencoder: Autoencoder, half: Half, models: str | os.PathLike[str] | None, hub_error: str | None
) -> ModelError:
    """The one message about weights that are neither in the folders nor on the hub.

    ``hub_error``: why the hub gave none, in a few words; None where it was not asked.
    """
    stem = autoencoder.encoder_stem if half == "encoder" else autoencoder.decoder_stem
    wanted = [f"{stem}{suffix}" for suffix in WEIGHT_SUFFIXES] if stem else []
    wanted += [f"{autoencoder.name}/{{{','.join(DIFFUSERS_FILES)}}}"] if autoencoder.hub_repo else []
    hub = f" or on the Hugging Face hub ({hub_error})" if hub_error else ""
    if autoencoder.hub_repo:
        subfolder = f"{autoencoder.hub_subfolder}/" if autoencoder.hub_subfolder else ""
        files = " ".join(subfolder + file for file in DIFFUSERS_FILES)
        revision = f" --revision {autoencoder.hub_revision}" if autoencoder.hub_revision else ""
        advice = f"with a network, run: hf download {autoencoder.hub_repo} {files}{revision}"
    else:
        advice = f"put {stem}.pth from {autoencoder.source} into one of these folders"
    return ModelError(
        f"the {half} weights of {autoencoder.name} are missing: no {' or '.join(wanted)}"
        f" in {_listed(search_folders(models))}{hub}; {advice}"
    )


def find_decoder(
    name_or_path: str | os.PathLike[str], models: str | os.PathLike[str] | None = None
) -> tuple[Path, dict[str, Any]]:
    """The ONNX image decoder of this name or path, and its manifest.

    A path ends with ``.onnx``; its manifest lies beside it with the suffix ``.json``. A name (``taesd``,
    ``taesd.fp16``, or one that clric-export did not make) is searched for in `search_folders`; where there is
    no ``NAME.onnx``, ``NAME.fp16.onnx`` serves. The file is compared with the manifest's sha256.

    Returns (path, manifest as clric-export writes it). Raises ModelError for what is missing or damaged.
    """
    path = _decoder_path(os.fspath(name_or_path), models)
    return path, check_manifest(path, "decoder")


def check_manifest(path: Path, half: Half) -> dict[str, Any]:
    """The manifest of an ONNX file, as clric-export writes it, which is compared with it.

    Raises ModelError for what is missing, damaged, or of the other half of an autoencoder.
    """
    manifest = _read_manifest(path)
    if manifest.get("half", half) != half:
        raise ModelError(f"{path} is an image {manifest['half']}, not an image {half}")
    digest = file_sha256(path)
    if digest != manifest["sha256"]:
        raise ModelError(
            f"{path} does not match {path.with_suffix('.json').name} (sha256 {digest[:16]},"
            f" expected {manifest['sha256'][:16]}); export or download it again"
        )
    return manifest


def image_decoder_number(manifest: dict[str, Any]) -> int:
    """The number of an image decoder among `IMAGE_DECODERS` of its latent space, by its manifest; 0 for others."""
    registered = IMAGE_DECODERS.get(manifest["latent_space"], {})
    return next((number for number, (_, digest) in registered.items() if digest == manifest["sha256"]), 0)


def find_registered_decoder(space: str, number: int, models: str | os.PathLike[str] | None = None) -> Path | None:
    """The file of an image decoder in `IMAGE_DECODERS`, by its SHA-256; None where it is in no folder.

    Others of its name are passed over: folders may have older or newer weights.
    """
    name, digest = IMAGE_DECODERS.get(space, {}).get(number, ("", ""))
    for folder in search_folders(models) if name else ():
        for place in _places(folder):
            manifest = _load_json(place / f"{name}.json")
            if manifest and manifest.get("sha256") == digest and os.path.isfile(place / f"{name}.onnx"):
                return place / f"{name}.onnx"
    return None


def check_space(manifest: dict[str, Any], space: str, models: str | os.PathLike[str] | None = None) -> None:
    """Raises ModelError where a decoder is of another latent space than the stream's.

    ``space`` is the stream's, by name. The message names both spaces and the decoders that would fit: those
    of the table, and those that lie in `search_folders`.
    """
    if manifest["latent_space"] == space:
        return
    known = [autoencoder.name for autoencoder in AUTOENCODERS.values() if autoencoder.space == space]
    fitting = list(dict.fromkeys(known + _local_decoders(space, models)))
    advice = f"compatible decoders: {', '.join(fitting)}" if fitting else "no compatible decoder is known"
    raise ModelError(
        f"decoder {manifest['name']} is of latent space {manifest['latent_space']}, the stream is of {space}; {advice}"
    )


def _decoder_path(name: str, models: str | os.PathLike[str] | None) -> Path:
    if name.endswith(".onnx"):
        if not os.path.isfile(name):
            raise ModelError(f"decoder file {name} does not exist")
        return Path(name)
    known = {alias: entry.name for entry in AUTOENCODERS.values() for alias in (entry.name, *entry.aliases)}
    stem = known.get(name, name)
    if "/" in stem or os.sep in stem:
        raise ModelError(f"decoder {name!r} is neither a name nor a path to an .onnx file")
    wanted = (f"{stem}.onnx", f"{stem}.fp16.onnx")
    folders = search_folders(models)
    for file in wanted:
        for folder in folders:
            for place in _places(folder):
                if os.path.isfile(place / file):
                    return place / file
    if name in known or stem.removesuffix(".fp16") in AUTOENCODERS:
        advice = f"make it on a machine with clric[export]: clric-export {stem.removesuffix('.fp16')}"
    else:
        exported = ", ".join(entry.name for entry in AUTOENCODERS.values() if entry.kind in ("tiny", "kl"))
        advice = f"clric-export makes {exported}; of others, give the path to the .onnx file"
    raise ModelError(f"decoder {name} is missing: no {' or '.join(wanted)} in {_listed(folders)}; {advice}")


def _read_manifest(onnx: Path) -> dict[str, Any]:
    path = onnx.with_suffix(".json")
    if not os.path.isfile(path):
        raise ModelError(
            f"decoder {onnx} has no manifest: {path} does not exist; copy it from where the decoder comes"
            " from, or export again with clric-export"
        )
    manifest = _load_json(path)
    if manifest is None:
        raise ModelError(f"manifest {path} is not a JSON object; export the decoder again with clric-export")
    for field, kind in _MANIFEST_FIELDS.items():
        if field not in manifest or not isinstance(manifest[field], kind):
            raise ModelError(f"manifest {path} has no valid {field!r}; export again with clric-export")
    halo, space = manifest["halo"], LATENT_SPACES.get(manifest["latent_space"])
    if halo is not None and not 0 <= halo <= _HALO_LIMIT:
        raise ModelError(f"manifest {path} has a halo of {halo}; it must be 0 to {_HALO_LIMIT}")
    if space is not None and manifest["channels"] != space.channels:
        raise ModelError(f"manifest {path} has {manifest['channels']} channels, {space.name} has {space.channels}")
    return manifest


def _load_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a small file; None where it is anything else."""
    try:
        if path.stat().st_size > _MANIFEST_LIMIT:
            return None
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _local_decoders(space: str, models: str | os.PathLike[str] | None) -> list[str]:
    """Names of the decoders of a latent space that lie in the searched folders."""
    names = []
    for folder in search_folders(models):
        for place in _places(folder):
            for onnx in sorted(place.glob("*.onnx")):
                manifest = _load_json(onnx.with_suffix(".json"))
                if manifest and manifest.get("latent_space") == space:
                    names.append(str(manifest.get("name")))
    return names


def _places(folder: Path) -> list[Path]:
    """A folder itself and the folders in it, by name; none where it cannot be read."""
    try:
        return [folder, *sorted(entry for entry in folder.iterdir() if os.path.isdir(entry))]
    except OSError:
        return []


def _listed(folders: list[Path]) -> str:
    return ", ".join(str(folder) for folder in folders)


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits. Raises ModelError where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror})") from error
    return digest.hexdigest()
