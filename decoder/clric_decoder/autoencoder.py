"""The image decoder of an autoencoder, in ONNX: latent -> RGB image, on any onnxruntime provider.

Images of any size pass through in bounded memory: a large latent is decoded in overlapping tiles, of which
the parts that the missing surroundings reach are dropped. onnxruntime is imported when the first decoder is
opened.
"""

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from .bitstream import MAX_PIXELS, Header, read_header
from .cpus import thread_count
from .errors import ModelError, one_line
from .latent import decode_latent
from .models import check_space, find_decoder, find_registered_decoder

if TYPE_CHECKING:
    import onnxruntime

# The decoder of a latent space that is taken where none is named: the smallest there is.
DEFAULT_DECODERS = {
    "sd1": "lite",
    "sdxl": "taesdxl",
    "sd3": "taesd3",
    "flux1": "taef1",
    "flux2": "taef2",
    "clric": "small",
}

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
}

# Pixels per latent position in each direction.
FACTOR = 8

# Positions of a latent in one run of a decoder of finite reach. TAESD's takes 67 kB for each, so 0.85 GB at
# the most.
TILE_POSITIONS = 12_288

# The same for a small file, whose network is narrow: `small` takes 4 kB for each. Fewer tiles have fewer halos.
SMALL_FILE, SMALL_TILE_POSITIONS = 1_000_000, 49_152

# The same for a decoder whose attention sees the whole latent. A tile of it is another image than the whole,
# so it is cut only above 1024 x 1024 pixels, the size at which such models are made to work ...
GLOBAL_TILE_POSITIONS = 16_384

# ... and neighbours fade into each other over twice this many positions.
GLOBAL_HALO = 16


@dataclass(frozen=True)
class OnnxDecoder:
    """An opened image decoder.

    ``halo`` is how many latent positions away a value can reach a pixel; None for global attention.
    ``tile_positions`` is how many positions it decodes in one run at most.
    """

    session: "onnxruntime.InferenceSession"
    manifest: dict[str, Any]
    halo: int | None
    tile_positions: int


def decode(
    data: bytes,
    *,
    vae: str | os.PathLike[str] | None = None,
    provider: str = "auto",
    models: str | os.PathLike[str] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """The image of a stream, H x W x 3 uint8 RGB.

    ``vae`` names the image decoder (or is the path of an .onnx file); None takes `default_decoder`. ``models`` is a
    folder to look for it first. ``provider`` is "auto" or a key of `PROVIDERS`. Raises StreamError for a bad stream,
    ModelError for a decoder that is missing or of another latent space.
    """
    header = read_header(data, max_pixels=max_pixels)
    vae = vae or default_decoder(header, models)
    decoder = open_decoder(vae, header.space, provider=provider, models=models)
    return decode_image(decoder, decode_latent(data, max_pixels=max_pixels), header.width, header.height)


def default_decoder(header: Header, models: str | os.PathLike[str] | None = None) -> str:
    """The image decoder for a stream, by path or name: the one it was trained for, if that is here, or the smallest.

    Raises ModelError for a latent space without one.
    """
    path = find_registered_decoder(header.space, header.image_decoder, models)
    if path is not None:
        return str(path)
    if header.space not in DEFAULT_DECODERS:
        raise ModelError(f"no default decoder for the latent space {header.space}; name its decoder (--vae)")
    return DEFAULT_DECODERS[header.space]


def open_decoder(
    vae: str | os.PathLike[str],
    space: str,
    *,
    provider: str = "auto",
    models: str | os.PathLike[str] | None = None,
) -> OnnxDecoder:
    """Opens the image decoder ``vae`` for latents of ``space``. Arguments and errors: see `decode`."""
    path, manifest = find_decoder(vae, models)
    check_space(manifest, space, models)
    halo, positions = manifest["halo"], TILE_POSITIONS
    if halo is None:
        positions = GLOBAL_TILE_POSITIONS
    elif path.stat().st_size <= SMALL_FILE:
        positions = SMALL_TILE_POSITIONS
    return OnnxDecoder(_session(path, provider), manifest, halo, positions)


def decode_image(decoder: OnnxDecoder, latent: np.ndarray, width: int, height: int) -> np.ndarray:
    """Latent (C, h, w) float32 -> image (height, width, 3) uint8, cut from the 8h x 8w that is decoded."""
    planes = decode_tiled(decoder, latent)[:, :height, :width]
    planes *= 255  # in place, for a large image's sake
    planes += 0.5
    pixels = np.empty((height, width, 3), np.uint8)
    for channel, plane in enumerate(planes):
        pixels[..., channel] = plane  # what Pillow and numpy people expect; the network's order is faster until here
    return pixels


def decode_tiled(decoder: OnnxDecoder, latent: np.ndarray, tile_positions: int | None = None) -> np.ndarray:
    """Latent (C, h, w) float32 -> RGB (3, 8h, 8w) float32 in [0, 1], in tiles of at most ``tile_positions``, the
    decoder's where that is not given.

    All tiles have one size, for onnxruntime keeps memory for each shape that it meets.
    """
    halo = GLOBAL_HALO if decoder.halo is None else decoder.halo
    _, height, width = latent.shape
    rows, columns = _tiling(height, width, halo, tile_positions or decoder.tile_positions)
    if rows == columns == 1:
        return _run(decoder.session, latent)
    image = np.zeros((3, FACTOR * height, FACTOR * width), np.float32)
    for top, bottom, row_weight in _strips(height, rows, halo, blend=decoder.halo is None):
        for left, right, column_weight in _strips(width, columns, halo, blend=decoder.halo is None):
            tile = _run(decoder.session, latent[:, top:bottom, left:right])
            tile *= row_weight[:, None] * column_weight
            image[:, FACTOR * top : FACTOR * bottom, FACTOR * left : FACTOR * right] += tile
    return image


def _run(session: "onnxruntime.InferenceSession", latent: np.ndarray) -> np.ndarray:
    """One tile: (C, h, w) float32 -> (3, 8h, 8w) float32 in [0, 1]. Raises ModelError."""
    _, height, width = latent.shape
    try:
        (image,) = session.run(["image"], {"latent": np.ascontiguousarray(latent[None], np.float32)})
    except Exception as error:  # onnxruntime's exceptions have no common public base class
        raise ModelError(f"the image decoder failed ({one_line(error)})") from error
    if image.shape != (1, 3, FACTOR * height, FACTOR * width):
        raise ModelError(
            f"the image decoder returned shape {list(image.shape)} for a {height} x {width} latent, "
            f"expected [1, 3, {FACTOR * height}, {FACTOR * width}]; export it again with clric-export"
        )
    if not np.isfinite(image).all():
        raise ModelError("the image decoder returned NaN or infinite values; try another --vae or --provider")
    (planes,) = image
    return np.clip(planes, np.float32(0), np.float32(1), out=planes)


def _tiling(height: int, width: int, halo: int, tile_positions: int) -> tuple[int, int]:
    """(rows, columns) of the tiling that computes the fewest positions with no tile above the limit.

    A limit of less than four halos squared is raised to that: below, tiles are hardly more than their halos.
    """
    limit = max(tile_positions, (4 * halo) ** 2, 1)
    best = (height * width, 1, 1) if height * width <= limit else None
    for rows in range(1, height + 1):
        tile_height = _strip_length(height, rows, halo)
        room = limit // tile_height - 2 * halo
        if room <= 0:
            continue
        # The fewest columns that fit beside this many rows; more of them only cost more.
        columns = max(1, -(-(width - 2 * halo) // room))
        cost = rows * columns * tile_height * _strip_length(width, columns, halo)
        best = min(best or (cost, rows, columns), (cost, rows, columns))
    assert best is not None  # rows = height leaves tiles of 2 halo + 1 rows, and room for as many columns
    return best[1:]


def _strip_length(length: int, count: int, halo: int) -> int:
    """The least length of ``count`` equal strips that cover ``length`` with an overlap of twice the halo."""
    return min(length, -(-(length + (count - 1) * 2 * halo) // count))


def _strips(length: int, count: int, halo: int, blend: bool) -> list[tuple[int, int, np.ndarray]]:
    """Equal strips over ``length``, evenly placed: (start, stop, weight of each pixel of the strip, float32).

    The weights of all strips sum to 1 at every pixel (as long as none overlaps its next but one, which the
    limits above rule out). They change from one strip to the next in the middle of the overlap, at once, or
    linearly over all of it with ``blend``:

        strip 0   |----------------\\....|              . at most a halo from an end that is no border
        strip 1              |....\\----------------|
    """
    size = _strip_length(length, count, halo)
    starts = [i * (length - size) // max(count - 1, 1) for i in range(count)]
    strips = []
    for i, start in enumerate(starts):
        position = FACTOR * start + np.arange(FACTOR * size) + 0.5
        weight = np.ones(FACTOR * size, np.float32)
        if i > 0:
            weight *= _rise(position, starts[i], starts[i - 1] + size, blend)
        if i < count - 1:
            weight *= 1 - _rise(position, starts[i + 1], start + size, blend)
        strips.append((start, start + size, weight))
    return strips


def _rise(position: np.ndarray, start: int, stop: int, blend: bool) -> np.ndarray:
    """0 to 1 over the overlap from ``start`` to ``stop`` (latent positions), at pixel positions; float32."""
    if blend:
        return np.clip((position / FACTOR - start) / (stop - start), 0, 1).astype(np.float32)
    middle = (start + stop) // 2
    return (position > FACTOR * middle).astype(np.float32)


def import_onnxruntime() -> ModuleType:
    """The module. Raises ModelError where it is not installed."""
    # Official builds from 1.31 on report their use to Microsoft by default; showing an image should not. This
    # is read when onnxruntime is imported, and a user who sets it otherwise is obeyed.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise ModelError("onnxruntime is not installed; run: pip install 'clric[cpu]' (or 'clric[gpu]')") from error
    module: ModuleType = onnxruntime
    return module


@lru_cache(maxsize=1)  # a command that decodes several streams opens its decoder once
def _session(path: Path, provider: str) -> "onnxruntime.InferenceSession":
    onnxruntime = import_onnxruntime()
    providers = _providers(provider, onnxruntime.get_available_providers())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: they come back as exceptions
    options.intra_op_num_threads = thread_count()
    # Planned memory patterns double the peak (120 against 67 kB a position with TAESD) and are no faster.
    options.enable_mem_pattern = False
    try:
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions have no common public base class
        raise ModelError(f"{path}: onnxruntime cannot open it ({one_line(error)})") from error
    if provider != "auto" and session.get_providers()[0] != providers[0]:
        # onnxruntime goes on with the CPU where a provider's libraries or device are missing.
        raise ModelError(f"provider {provider!r} failed to start; use cpu or auto")
    return session


def _providers(provider: str, available: list[str]) -> list[str]:
    """onnxruntime's names for a provider; raises ModelError where the installed onnxruntime lacks it."""
    cpu = PROVIDERS["cpu"]
    if provider == "auto":
        # CUDA alone is taken unasked: others compile for minutes, or are there without their device.
        return [name for name in (PROVIDERS["cuda"], cpu) if name in available]
    wanted = PROVIDERS.get(provider, "")
    if wanted not in available:
        here = ", ".join(["auto", *(key for key, name in PROVIDERS.items() if name in available)])
        raise ModelError(f"provider {provider!r} is not available in the installed onnxruntime; available: {here}")
    return [wanted] if wanted == cpu else [wanted, cpu]
