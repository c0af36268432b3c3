"""One image, one codec, one setting -> one row of results.csv; and the crop that the report shows.

Runs in a worker, which keeps what it has opened for its next row. torch is imported here and not above, for a fresh
process that measures memory passes through the modules above only.
"""

import hashlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from clric_decoder import ClricError, decode_latent, read_header
from clric_decoder.files import write_output
from clric_decoder.image import read_image, take_over_pillow, write_image
from clric_decoder.networks import mac_per_pixel
from PIL import Image

from .codecs import Codec
from .fid import fid_features
from .results import COLUMNS, Row, row_id
from .workers import timed, timed_alone

# The side of the crops in the report, which are shown pixel by pixel.
CROP = 300
_CROP_STEP = 20

# Folders beside results.csv that hold the features of patches.
FID, FD_VGG16 = "fid", "fd_vgg16"


@dataclass(frozen=True)
class Photo:
    """An image of the benchmark. name: unique, for people. sha256: of the file, 16 digits."""

    path: str
    name: str
    sha256: str
    width: int
    height: int


@dataclass(frozen=True)
class Metrics:
    """Which measures can be taken, by their files.

    lpips: networks, each with its own and its heads. inception: the network of FID. vgg: VGG16 with the heads of LPIPS,
    for LPIPS-VGG and FD-VGG16, and with dists, the weights of that, for DISTS. ssimulacra2: its package is there.
    """

    lpips: tuple[tuple[str, Path, Path], ...]
    inception: Path | None
    vgg: Path | None = None
    dists: Path | None = None
    ssimulacra2: bool = False

    @property
    def names(self) -> str:
        """For a row's id."""
        names = [f"lpips_{network}" for network, _, _ in self.lpips] + ["fid"] * bool(self.inception)
        if self.vgg:
            names += ["lpips_vgg", "fd_vgg16"] + ["dists"] * bool(self.dists)
        return " ".join(names + ["ssimulacra2"] * self.ssimulacra2)


@dataclass(frozen=True)
class Task:
    """A row to be measured. folder: of results. alone: in fresh processes, for their memory. keep_crop: for the report.

    The decoder's MAC/pixel depend on the codec's VAE and the image's size alone, and are given.
    """

    photo: Photo
    codec: Codec
    setting: str
    metrics: Metrics
    folder: Path
    decoder_mac: float | None = None
    alone: bool = False
    keep_crop: bool = False

    @property
    def id(self) -> str:
        return row_id(self.photo.sha256, self.codec.name, self.setting, self.codec.version, self.metrics.names)


def list_images(places: Sequence[Path]) -> list[tuple[Path, str]]:
    """The files named, and those in the folders named whose suffix is an image's, with a unique name for each.

    Raises ClricError where there are none.
    """
    Image.init()
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            inside = sorted(path for path in place.iterdir() if path.suffix.lower() in Image.registered_extensions())
            if not inside:
                raise ClricError(f"{place}: contains no images")
            found += inside
        else:
            found.append(place)
    found = list(dict.fromkeys(found))
    bare = [path.name for path in found]
    return [(path, path.name if bare.count(path.name) == 1 else str(path)) for path in found]


def read_photo(path: Path, name: str) -> tuple[Photo, list[str]]:
    """A photo and the warnings about it. Raises ClricError where it is no image, or damaged."""
    image, notes, _ = read_image(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return Photo(str(path), name, digest, image.shape[1], image.shape[0]), notes


def measure(task: Task) -> Row:
    """The row of a task. Raises whatever the codec raises."""
    take_over_pillow()  # a worker's process is the command's, and is started by "spawn"
    image = _image(task.photo.path)
    encode_mb = decode_mb = None
    if task.alone:
        data, encode_s, encode_mb = timed_alone(task.codec.open_encoder, image, task.setting)
        decoded, decode_s, decode_mb = timed_alone(task.codec.open_decoder, data)
    else:
        data, encode_s = timed(_opened(task.codec, "encoder"), image, task.setting)
        decoded, decode_s = timed(_opened(task.codec, "decoder"), data)
    if decoded.shape != image.shape:
        raise ClricError(f"{task.codec.name} gives {decoded.shape} for an image of {image.shape}")
    from .metrics import compare

    measures, notes = compare(image, decoded, dict(_lpips(task.metrics)), task.metrics.ssimulacra2)
    if task.metrics.vgg:
        values, why = _by_vgg(task, image, decoded)
        measures |= values
        notes += why
    measures |= {"encode_s": encode_s, "decode_s": decode_s}
    if encode_mb is not None and decode_mb is not None:
        measures |= {"encode_mb": encode_mb, "decode_mb": decode_mb}
    if task.codec.coded:
        measures |= {"bytes": len(data), "bpp": 8 * len(data) / (image.shape[0] * image.shape[1])}
    if task.decoder_mac is not None:
        measures["decoder_mac"] = task.decoder_mac
    if task.codec.vae and task.codec.coded:
        measures |= _of_stream(task, data, image)
    _keep(task, decoded)
    return {
        **dict.fromkeys(COLUMNS, ""),
        "id": task.id,
        "image": task.photo.name,
        "image_sha256": task.photo.sha256,
        "width": str(task.photo.width),
        "height": str(task.photo.height),
        "codec": task.codec.name,
        "setting": task.setting,
        "version": task.codec.version,
        "tune": task.codec.tune or "",
        "measured": task.metrics.names,
        **{name: f"{value:.7g}" for name, value in measures.items()},
        "notes": "; ".join(notes),
    }


def _of_stream(task: Task, data: bytes, image: np.ndarray) -> dict[str, float]:
    """What only a stream of clric has: its parts, its function's MAC/pixel, and the error of its latent."""
    from .codecs import load_latent_encoder

    assert task.codec.vae is not None
    encoder = _once(("vae", task.codec.vae), partial(load_latent_encoder, task.codec.vae, task.codec.models))
    header = read_header(data)
    return {
        "latent_mse": float(np.square(encoder.encode(image) - decode_latent(data)).mean()),
        "header_bytes": header.header_bytes,
        "network_bytes": header.network_bytes,
        "grid_bytes": sum(header.level_bytes),
        "function_mac": sum(mac_per_pixel(header).values()),
    }


def _by_vgg(task: Task, image: np.ndarray, decoded: np.ndarray) -> tuple[dict[str, float], list[str]]:
    """The measures by VGG16's features and notes; writes both images' features for FD-VGG16 beside results.csv."""
    from .metrics import LPIPS_SIDES
    from .vgg import VggJudge

    metrics = task.metrics
    assert metrics.vgg is not None
    if min(image.shape[:2]) < LPIPS_SIDES["vgg"]:
        return {}, [f"too small for LPIPS vgg and DISTS (sides of {LPIPS_SIDES['vgg']})"]
    judge = _once(("vgg", f"{metrics.vgg} {metrics.dists}"), partial(VggJudge, metrics.vgg, metrics.dists))
    result = judge.compare(image, decoded)
    for name, features in ((task.photo.sha256, result.original_patches), (task.id, result.patches)):
        file = io.BytesIO()
        np.save(file, features)
        (task.folder / FD_VGG16).mkdir(exist_ok=True)
        # Several processes may write an original's, each the whole file.
        write_output(task.folder / FD_VGG16 / f"{name}.npy", file.getvalue())
    return result.values, []


def _keep(task: Task, decoded: np.ndarray) -> None:
    """What the report needs of the decoded image, beside results.csv: a crop, and the features for FID."""
    if task.keep_crop:
        keep_crop(task.folder, task.id, decoded, crop_place(_image(task.photo.path)))
    if task.metrics.inception:
        keep_features(task.folder, task.id, decoded, task.metrics.inception)


def keep_crop(folder: Path, name: str, image: np.ndarray, place: tuple[int, int]) -> None:
    """Writes crops/NAME.png, the `CROP` square at (top, left)."""
    top, left = place
    (folder / "crops").mkdir(exist_ok=True)
    write_image(folder / "crops" / f"{name}.png", image[top : top + CROP, left : left + CROP])


def keep_features(folder: Path, name: str, image: np.ndarray, inception: Path) -> None:
    """Writes fid/NAME.npy, the features of the image's patches."""
    import torch

    network = _once(("inception", str(inception)), lambda: torch.jit.load(str(inception)).eval())
    (folder / FID).mkdir(exist_ok=True)
    file = io.BytesIO()
    np.save(file, fid_features(image, network).astype(np.float32))
    write_output(folder / FID / f"{name}.npy", file.getvalue())


def crop_place(image: np.ndarray) -> tuple[int, int]:
    """(top, left) of the crop: where brightness varies most, so that nobody chose it."""
    height, width, _ = image.shape
    grey = image.astype(np.float64).mean(2)
    places = [
        (top, left)
        for top in range(0, max(1, height - CROP + 1), _CROP_STEP)
        for left in range(0, max(1, width - CROP + 1), _CROP_STEP)
    ]
    return max(places, key=lambda place: grey[place[0] : place[0] + CROP, place[1] : place[1] + CROP].var())


@lru_cache(maxsize=2)
def _image(path: str) -> np.ndarray:
    return read_image(path).pixels


_open: dict[tuple[str, str], Any] = {}


def _once(key: tuple[str, str], load: Callable[[], Any]) -> Any:
    """load(), or what it gave for this key before."""
    if key not in _open:
        _open[key] = load()
    return _open[key]


def _opened(codec: Codec, half: str) -> Callable[..., Any]:
    function: Callable[..., Any] = _once(
        (half, codec.name), codec.open_encoder if half == "encoder" else codec.open_decoder
    )
    return function


def _lpips(metrics: Metrics) -> list[tuple[str, Any]]:
    from .metrics import Lpips

    return [(files[0], _once(("lpips", files[0]), partial(Lpips, *files))) for files in metrics.lpips]


def decoder_mac_per_pixel(path: Path, channels: int, width: int, height: int) -> float | None:
    """Multiply-accumulates per image pixel of an ONNX image decoder, for an image of one size, in one piece.

    Counts the convolutions and matrix products. None where the shape of one of them is not known from the graph.
    """
    import onnx

    model = onnx.load(path)
    latent = (1, channels, math.ceil(height / 8), math.ceil(width / 8))
    for dimension, size in zip(model.graph.input[0].type.tensor_type.shape.dim, latent, strict=True):
        dimension.dim_value = size
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {
        value.name: [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in [*graph.value_info, *graph.input]
    }
    shapes |= {weight.name: list(weight.dims) for weight in graph.initializer}
    total = 0
    for node in graph.node:
        if node.op_type in ("Conv", "MatMul", "Gemm"):
            first, second, result = (shapes.get(name) for name in (*node.input[:2], node.output[0]))
            if not (first and second and result and all(first + second + result)):
                return None
            taps = math.prod(second[1:]) if node.op_type == "Conv" else first[-1]
            total += math.prod(result) * taps
    return total / (width * height)
