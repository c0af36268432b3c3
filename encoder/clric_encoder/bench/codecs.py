"""What is compared: each codec's name, its settings, and how to open its two halves.

Opening loads what a half needs (libraries, networks) and gives the function that is then timed. A codec can be sent
to another process. Nothing heavy is imported before a half is opened: a process that decodes a JPEG must not hold
torch when its memory is measured.
"""

import hashlib
import io
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import version as installed
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import clric_decoder
import numpy as np
from clric_decoder.errors import ModelError, one_line
from clric_decoder.models import find_autoencoder, find_decoder
from clric_decoder.registered_networks import FILE as REGISTERED_NETWORKS
from PIL import Image, features

Encode = Callable[[np.ndarray, str], bytes]
Decode = Callable[[bytes], np.ndarray]


@dataclass(frozen=True)
class Codec:
    """One line of the comparison.

    name: what a reader sees; unique. settings: from the lowest rate to the highest. version: of everything that
    decides on what comes out.
    open_encoder: gives the function (H x W x 3 uint8, setting) -> bytes; open_decoder: bytes -> H x W x 3 uint8.
    vae, models: of clric, and where its weights are. tune: of clric's streams, the image decoder that they are trained
    through, or none. coded: False where the bytes are a latent as it is, no rate.
    seconds: roughly what an encode of 768 x 512 takes, for the time left. unavailable: why it cannot run, or None.
    """

    name: str
    settings: tuple[str, ...]
    version: str
    open_encoder: Callable[[], Encode]
    open_decoder: Callable[[], Decode]
    vae: str | None = None
    models: str | None = None
    tune: str | None = None
    coded: bool = True
    seconds: float = 0.5
    unavailable: str | None = None


# --- Formats that Pillow writes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Format:
    """A format by Pillow's name for it, with the options of its slow setting.

    qualities: from the lowest there is to about 2 bpp on Kodak's images. One thread, so that seconds compare.
    """

    name: str
    pillow: str
    qualities: tuple[int, ...]
    options: dict[str, int | bool]
    seconds: float


_FORMATS = {
    # Speed 0 takes three times as long as 2, for 0.1 dB at the same rate.
    "avif": _Format("AVIF", "AVIF", (0, 6, 14, 22, 32, 42, 54, 68), {"speed": 2, "max_threads": 1}, 10.0),
    "jxl": _Format("JPEG XL", "JXL", (0, 5, 15, 30, 50, 70, 85), {"effort": 9, "num_threads": 1}, 2.0),
    "webp": _Format("WebP", "WEBP", (0, 1, 3, 6, 14, 30, 55, 80), {"method": 6}, 0.5),
    "jpeg": _Format("JPEG", "JPEG", (1, 4, 6, 10, 18, 35, 60, 80), {"optimize": True, "progressive": True}, 0.5),
}


def _pillow_codec(family: str) -> Codec:
    entry = _FORMATS[family]
    missing = None
    library = f"Pillow {installed('Pillow')}"
    if family == "jxl":
        if find_spec("pillow_jxl"):
            library = f"pillow-jxl-plugin {installed('pillow-jxl-plugin')}"
        else:
            missing = "pillow-jxl-plugin is not installed; run: pip install 'clric[bench]'"
    else:
        feature = "jpg" if family == "jpeg" else family
        if features.check(feature):
            part = "libjpeg_turbo" if family == "jpeg" and features.check("libjpeg_turbo") else feature
            library += f" with {part} {features.version(part)}"
        else:
            missing = f"{library} is built without {entry.name}"
    version = ", ".join([library, *(f"{key}={value}" for key, value in entry.options.items())])
    return Codec(
        entry.name,
        tuple(f"quality {quality}" for quality in entry.qualities),
        version,
        partial(_open_pillow_encoder, family),
        _open_pillow_decoder,
        seconds=entry.seconds,
        unavailable=missing,
    )


def _open_pillow_encoder(family: str) -> Encode:
    entry = _FORMATS[family]
    _register_jpeg_xl()

    def encode(image: np.ndarray, setting: str) -> bytes:
        file = io.BytesIO()
        quality = int(setting.removeprefix("quality "))
        Image.fromarray(image).save(file, entry.pillow, quality=quality, **entry.options)
        return file.getvalue()

    return encode


def _open_pillow_decoder() -> Decode:
    _register_jpeg_xl()
    return lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _register_jpeg_xl() -> None:
    if find_spec("pillow_jxl"):
        import pillow_jxl  # noqa: F401  # importing it teaches Pillow the format


# --- clric ----------------------------------------------------------------------------------------------------------


def _clric_codecs(
    vae: str, presets: Sequence[str], lambdas: Sequence[float], models: str | None, tunes: Sequence[str]
) -> list[Codec]:
    """One codec for each preset and each way of tuning, and the VAE's ceiling: its latent, not coded.

    Raises ModelError for a VAE that clric does not know; one whose weights are missing is unavailable.
    """
    vae = find_autoencoder(vae).name
    version, missing = "", None
    try:
        version = f"clric {installed('clric')} {_source_hash()}, {vae} {_vae_hash(vae, models)}"
    except ModelError as error:
        missing = str(error)
    codecs: dict[str, Codec] = {}
    for preset in presets:
        for tune in tunes:
            tune = _decoder_of_auto(tune, vae, preset)
            label, tuned_version, why = tune, version, missing
            if tune != "none" and not missing:
                try:
                    label, digest = _tuning_hash(tune, find_autoencoder(vae).space, models)
                    tuned_version += f", tuned through {label} {digest}"
                except ModelError as error:
                    why = str(error)
            # The name says what is measured: a default of clric-enc may become another one.
            suffix = "untuned" if label == "none" else "tuned" if label == vae else f"tuned through {label}"
            name = f"clric {vae} {preset} {suffix}"
            codecs[name] = Codec(
                name,
                tuple(f"lambda {lmbda:g}" for lmbda in sorted(lambdas, reverse=True)),
                tuned_version,
                partial(_open_clric_encoder, vae, preset, models, tune),
                partial(_open_clric_decoder, vae, models),
                vae,
                models,
                label,
                seconds=_training_seconds(preset, tune != "none"),
                unavailable=why,
            )
    ceiling = Codec(
        f"{vae} ceiling",
        ("latent not coded",),
        version,
        partial(_open_ceiling_encoder, vae, models),
        partial(_open_ceiling_decoder, vae, models),
        vae,
        models,
        coded=False,
        seconds=2.0,
        unavailable=missing,
    )
    return [*codecs.values(), ceiling]


def _decoder_of_auto(tune: str, vae: str, preset: str) -> str:
    """What `clric_encoder.encoding.load_tuning` takes for ``auto``, so that two ways to say the same are one codec.

    Raises ModelError for a name that is not known.
    """
    from ..encoding import DEFAULT_TUNE
    from ..instant import INSTANT

    if tune not in ("auto", "none") and not tune.endswith(".onnx"):
        return find_autoencoder(tune).name
    if tune != "auto":
        return tune
    return "none" if preset in ("paper", INSTANT) else DEFAULT_TUNE.get(find_autoencoder(vae).space, "none")


def _training_seconds(preset: str, tuned: bool) -> float:
    from ..training.presets import PRESETS

    if preset not in PRESETS:
        return 1.0
    return 3 + 0.005 * PRESETS[preset].iterations + 0.15 * PRESETS[preset].tuning.looks * tuned


def _source_hash() -> str:
    """Of the code that encodes and decodes: a change of it makes old rows stale, whatever the version says."""
    packages = [Path(clric_decoder.__file__).parent, Path(__file__).parent.parent]
    digest = hashlib.sha256()
    for package in packages:
        # Not this bench, nor the command line.
        for file in sorted(package.rglob("*.py")):
            if file.name not in ("cli.py", "terminal.py") and file.parent != Path(__file__).parent:
                digest.update(file.read_bytes())
    digest.update(REGISTERED_NETWORKS.read_bytes())
    return digest.hexdigest()[:8]


def _vae_hash(vae: str, models: str | None) -> str:
    """Of both halves: the decoder by its file, the encoder by what it makes of a fixed image.

    The encoder may come as a file, as a folder or from the hub's cache; its latent is the same whichever it is.
    """
    _, manifest = find_decoder(vae, models)
    probe = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    latent = load_latent_encoder(vae, models).encode(probe)
    digest = hashlib.sha256(latent.round(2).tobytes() + manifest["sha256"].encode())
    return digest.hexdigest()[:8]


def _tuning_hash(tune: str, space: str, models: str | None) -> tuple[str, str]:
    """The name of the image decoder, and a hash of what decides on the tuning: its weights and the features'.

    Raises ModelError, also for a decoder of another latent space.
    """
    from ..networks import load_decoder_network
    from ..training.features import WEIGHTS

    network = load_decoder_network(tune, models)
    if network.space != space:
        raise ModelError(f"--tune {tune} decodes the latent space {network.space}, but the latent space is {space}")
    digest = hashlib.sha256(WEIGHTS.read_bytes())
    for weight in network.module.state_dict().values():
        digest.update(weight.contiguous().numpy().tobytes())
    return network.name, digest.hexdigest()[:8]


def load_latent_encoder(vae: str, models: str | None) -> Any:
    """clric_encoder's ImageEncoder of a VAE. Raises ModelError."""
    # diffusers warns of harmless fields in its own models' configuration; it reads this when it is imported.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    from ..autoencoder import load_encoder

    return load_encoder(vae, models)


def _open_clric_encoder(vae: str, preset: str, models: str | None, tune: str) -> Encode:
    from ..encoding import encode_latents, load_tuning
    from ..instant import INSTANT, encode_image, load_encoder
    from ..rate import Rate
    from ..stream import check_latent

    if preset == INSTANT:
        instant = load_encoder(vae, threads=1)
        return lambda image, setting: encode_image(image, instant, Rate(float(setting.removeprefix("lambda ")))).data
    encoder = load_latent_encoder(vae, models)
    tuning = load_tuning(tune, encoder.space, preset, models=models)

    def encode(image: np.ndarray, setting: str) -> bytes:
        height, width, _ = image.shape
        rate = Rate(float(setting.removeprefix("lambda ")))
        latent = encoder.encode(image)
        check_latent(latent, width, height, encoder.space)
        (encoded,) = encode_latents(
            latent[None], [(width, height)], encoder.space, rate, preset=preset, tuning=tuning, images=[image]
        )
        return encoded.data

    return encode


def _open_clric_decoder(vae: str, models: str | None) -> Decode:
    from clric_decoder.autoencoder import decode_image, open_decoder

    decoder = open_decoder(vae, find_autoencoder(vae).space, provider="cpu", models=models)

    def decode(data: bytes) -> np.ndarray:
        header = clric_decoder.read_header(data)
        return decode_image(decoder, clric_decoder.decode_latent(data), header.width, header.height)

    return decode


def _open_ceiling_encoder(vae: str, models: str | None) -> Encode:
    encoder = load_latent_encoder(vae, models)

    def encode(image: np.ndarray, setting: str) -> bytes:
        file = io.BytesIO()
        np.savez(file, latent=encoder.encode(image), size=image.shape[:2])
        return file.getvalue()

    return encode


def _open_ceiling_decoder(vae: str, models: str | None) -> Decode:
    from clric_decoder.autoencoder import decode_image, open_decoder

    decoder = open_decoder(vae, find_autoencoder(vae).space, provider="cpu", models=models)

    def decode(data: bytes) -> np.ndarray:
        with np.load(io.BytesIO(data)) as file:
            height, width = file["size"].tolist()
            return decode_image(decoder, file["latent"], width, height)

    return decode


# --- CompressAI's model zoo -----------------------------------------------------------------------------------------

# Models that are trained for MSE, with how many qualities there are of each.
_ZOO = {
    "bmshj2018-factorized": 8,
    "bmshj2018-hyperprior": 8,
    "mbt2018-mean": 8,
    "mbt2018": 8,
    "cheng2020-anchor": 6,
    "cheng2020-attn": 6,
}
_ZOO_MULTIPLE = 64  # of sides that these models take


def _zoo_codec(name: str) -> Codec:
    version, missing = "", None
    if not find_spec("compressai"):
        missing = "compressai is not installed"
    else:
        version = f"compressai {installed('compressai')}, metric=mse"
        try:
            _zoo_model(name, 1)
        except Exception as error:  # of downloading, of unpickling, of imports that fail
            missing = f"its weights cannot be had ({one_line(error)[:200]})"
    return Codec(
        name,
        tuple(f"quality {quality}" for quality in range(1, _ZOO[name] + 1)),
        version,
        partial(_open_zoo_encoder, name),
        partial(_open_zoo_decoder, name),
        seconds=30.0,
        unavailable=missing,
    )


@lru_cache(maxsize=1)  # encoded and decoded one quality after the other; several fill the memory
def _zoo_model(name: str, quality: int) -> Any:
    from compressai.zoo import image_models

    return image_models[name](quality=quality, metric="mse", pretrained=True, progress=False).eval()


def _open_zoo_encoder(name: str) -> Encode:
    """A file is: height, width, the hyper-latent's sides (2 bytes each), quality and number of strings (1 byte each),
    then each string's length (4 bytes) and itself."""
    import torch

    def encode(image: np.ndarray, setting: str) -> bytes:
        quality = int(setting.removeprefix("quality "))
        height, width, _ = image.shape
        pad = ((0, -height % _ZOO_MULTIPLE), (0, -width % _ZOO_MULTIPLE), (0, 0))
        pixels = torch.from_numpy(np.pad(image, pad, mode="edge")).permute(2, 0, 1)[None].float() / 255
        with torch.inference_mode():
            coded = _zoo_model(name, quality).compress(pixels)
        strings = [one for (one,) in coded["strings"]]
        head = struct.pack(">4H2B", height, width, *coded["shape"], quality, len(strings))
        return head + b"".join(struct.pack(">I", len(one)) + one for one in strings)

    return encode


def _open_zoo_decoder(name: str) -> Decode:
    import torch

    def decode(data: bytes) -> np.ndarray:
        height, width, *shape, quality, count = struct.unpack_from(">4H2B", data)
        at, strings = 10, []
        for _ in range(count):
            (length,) = struct.unpack_from(">I", data, at)
            strings.append([data[at + 4 : at + 4 + length]])
            at += 4 + length
        with torch.inference_mode():
            pixels = _zoo_model(name, quality).decompress(strings, tuple(shape))["x_hat"][0]
        image = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        return image[:height, :width]

    return decode


# --- All of them ----------------------------------------------------------------------------------------------------

CODECS = ("clric", *_FORMATS, *_ZOO)


def make_codecs(
    names: Sequence[str],
    vaes: Sequence[str],
    presets: Sequence[str],
    lambdas: Sequence[float],
    models: str | None,
    tunes: Sequence[str] = ("auto",),
) -> list[Codec]:
    """The codecs of these names (of `CODECS`), clric's once for each VAE, preset and tuning. Raises ModelError.

    tunes: each as clric_encoder.encode takes it.
    """
    codecs = []
    for name in dict.fromkeys(names):
        if name == "clric":
            for vae in dict.fromkeys(vaes):
                codecs += _clric_codecs(
                    vae, tuple(dict.fromkeys(presets)), tuple(dict.fromkeys(lambdas)), models, tunes
                )
        else:
            codecs.append(_pillow_codec(name) if name in _FORMATS else _zoo_codec(name))
    return codecs
