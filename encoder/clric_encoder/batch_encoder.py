"""Many images through one set of networks, which are loaded once; those of one latent size are trained together.

What is wrong with one image does not touch the others. Without torch until an image needs it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from clric_decoder.autoencoder import decode_image, default_decoder, open_decoder
from clric_decoder.bitstream import Metadata, read_header
from clric_decoder.errors import ClricError, ModelError, one_line
from clric_decoder.latent import decode_latent
from clric_decoder.models import file_sha256

from .instant import INSTANT
from .libraries import libraries
from .rate import Rate
from .stream import Encoded, check_image, check_latent
from .training.presets import PRESETS, find_preset

if TYPE_CHECKING:
    from .encoding import Tuning
    from .tiling import ImageEncoder
    from .training.loop import Progress

# Pictures that wait for others of their size to be trained with.
MAX_WAITING = 256


@dataclass(frozen=True)
class Settings:
    """The arguments of `encoding.encode`, and whether to leave out metadata (`clric_decoder.image.read_image`)."""

    rate: Rate
    vae: str = "small"
    preset: str = "default"
    tune: str = "auto"
    lpips: str | None = None
    device: str = "auto"
    seed: int = 0
    models: str | None = None
    strip: bool = False

    def of_streams(self) -> dict[str, Any]:
        """What a stream depends on, besides its image: options, clric's version, and the contents of files that options
        name by path. Weights that are found by name, in folders, are taken to stay as they are.

        Raises ModelError for a file that cannot be read.
        """
        options = {name: value for name, value in asdict(self).items() if name != "device"}
        paths = [path for path in (self.vae, self.tune, self.lpips) if path is not None and os.path.isfile(path)]
        return options | {"clric": version("clric"), "files": [file_sha256(Path(path)) for path in paths]}


@dataclass
class Picture:
    """An image on its way. key: what tells it from others. seconds: its own, and its share of those of its batch."""

    key: Any
    pixels: np.ndarray
    metadata: Metadata
    seconds: float = 0.0
    latent: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))


class Failure(ClricError):
    """Why an image could not be encoded, in one line. retry: whether it may go well another time, or elsewhere."""

    def __init__(self, reason: str, retry: bool) -> None:
        super().__init__(reason)
        self.retry = retry

    def __reduce__(self) -> tuple[Any, ...]:
        return Failure, (str(self), self.retry)


def _failure(error: Exception) -> Failure:
    """What numba, torch and this package raise while they compute."""
    reason = one_line(error)[:300]
    if isinstance(error, ClricError):
        return Failure(str(error), retry=False)
    # On the CPU only torch's text says it; on a GPU it is a torch.OutOfMemoryError, whose text says it too.
    short = ("out of memory", "can't allocate memory", "not enough memory")
    if isinstance(error, MemoryError) or any(text in reason for text in short):
        return Failure("not enough memory; make the image smaller, or try another --device or --vae", retry=True)
    if isinstance(error, OSError):  # of numba, which keeps compiled loops
        advice = "free disk space, or set NUMBA_CACHE_DIR"
        return Failure(f"the cache of compiled loops cannot be written ({reason}); {advice}", retry=True)
    return Failure(f"torch failed ({reason})", retry=True)


class Batches:
    """Pictures by the height and width of their latents, until there are enough of one to be trained together.

    limit: of a batch, for a height and width. What waits is at most `MAX_WAITING` pictures.
    """

    def __init__(self, limit: Callable[[tuple[int, int]], int]) -> None:
        self._limit, self._waiting, self._count = limit, dict[tuple[int, int], list[Any]](), 0

    def add(self, shape: tuple[int, int], picture: Any) -> list[Any]:
        """The batch that is complete with this picture, or none: an empty list."""
        group = self._waiting.setdefault(shape, [])
        group.append(picture)
        self._count += 1
        if len(group) >= self._limit(shape):
            return self._take(shape)
        if self._count >= MAX_WAITING:
            return self._take(max(self._waiting, key=lambda shape: len(self._waiting[shape])))
        return []

    def rest(self) -> Iterator[list[Any]]:
        while self._waiting:
            yield self._take(next(iter(self._waiting)))

    def _take(self, shape: tuple[int, int]) -> list[Any]:
        group = self._waiting.pop(shape)
        self._count -= len(group)
        return group


class BatchEncoder:
    """Encodes pictures with one set of networks, on the threads that torch has, or on a share of a GPU."""

    def __init__(self, settings: Settings, gpu_share: float = 1) -> None:
        """Loads nothing yet."""
        self.settings, self._gpu_share = settings, gpu_share
        self._encoder: ImageEncoder | None = None
        self._tuning: Tuning | None = None
        self._device = "cpu"

    def load(self) -> ImageEncoder:
        """The networks are loaded, at the first call.

        Raises ClricError for settings that cannot be met: a preset that is not known, weights that are missing.
        """
        if self._encoder is not None:
            return self._encoder
        settings = self.settings
        if settings.preset == INSTANT:
            from . import instant

            self._encoder = instant.load_encoder(settings.vae)
            return self._encoder
        find_preset(settings.preset)
        with libraries():
            from . import autoencoder, encoding
        self._device = encoding.find_device(settings.device)
        with libraries():  # of autoencoders, some of which need more
            encoder = autoencoder.load_encoder(settings.vae, settings.models, self._device)
            self._tuning = encoding.load_tuning(
                settings.tune,
                encoder.space,
                settings.preset,
                models=settings.models,
                lpips=settings.lpips,
                device=self._device,
            )
        self._encoder = encoder
        return encoder

    def encode(
        self,
        pictures: Iterable[Picture],
        *,
        progress: Callable[[list[Picture], Progress], None] = lambda pictures, progress: None,
        warn: Callable[[str], None] = lambda message: None,
        compiling: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[Picture, Encoded | Failure]]:
        """Each picture with what became of it, as soon as it is done.

        progress: called with a batch that is being trained. warn, compiling: see `encoding.encode_latents`.
        """

        def train(batch: list[Picture]) -> Iterator[tuple[Picture, Encoded | Failure]]:
            start = time.perf_counter()
            try:
                results: Sequence[Encoded | Failure] = self._train(batch, progress, warn, compiling)
            except (ClricError, MemoryError, RuntimeError, OSError) as error:
                if len(batch) > 1:  # one of them may be to blame, or their number
                    for picture in batch:
                        yield from train([picture])
                    return
                results = [_failure(error)]
            for picture, result in zip(batch, results, strict=True):
                picture.seconds += (time.perf_counter() - start) / len(batch)
                yield picture, result

        batches = Batches(self.batch_size)
        for picture in pictures:
            start = time.perf_counter()
            result: Encoded | Failure | None = None
            try:
                if self.settings.preset == INSTANT:
                    result = self._encode_instantly(picture)
                else:
                    height, width = check_image(picture.pixels)
                    encoder = self.load()
                    picture.latent = encoder.encode(picture.pixels)
                    check_latent(picture.latent, width, height, encoder.space)
            except (ClricError, MemoryError, RuntimeError, OSError) as error:
                result = _failure(error)
            picture.seconds += time.perf_counter() - start
            if result is not None:
                yield picture, result
            elif batch := batches.add(picture.latent.shape[1:], picture):
                yield from train(batch)
        for batch in batches.rest():
            yield from train(batch)

    def batch_size(self, shape: tuple[int, int]) -> int:
        """How many latents of this height and width to train at once. Raises ClricError as `load` does."""
        from .encoding import batch_size

        size = batch_size((self._channels, *shape), PRESETS[self.settings.preset], self._device)
        return max(1, int(size * self._gpu_share))

    @cached_property
    def _channels(self) -> int:
        """Channels of the latents."""
        return self.load().encode(np.zeros((8, 8, 3), np.uint8)).shape[0]

    def image_mse(self, data: bytes, picture: Picture) -> float | None:
        """Mean squared error of the image that a client's default decoder makes of a stream, of values 0 to 255.

        None where there is no decoder, or no onnxruntime.
        """
        header = read_header(data, max_pixels=picture.pixels.size)
        try:
            name = default_decoder(header, self.settings.models)
            decoder = open_decoder(name, header.space, models=self.settings.models)
            latent = decode_latent(data, max_pixels=picture.pixels.size)
            image = decode_image(decoder, latent, header.width, header.height)
        except ModelError:
            return None
        return float(np.square(np.subtract(image, picture.pixels, dtype=np.float32)).mean(dtype=np.float64))

    def _encode_instantly(self, picture: Picture) -> Encoded:
        from . import instant

        return instant.encode_image(picture.pixels, self.load(), self.settings.rate, picture.metadata)

    def _train(
        self,
        batch: list[Picture],
        progress: Callable[[list[Picture], Progress], None],
        warn: Callable[[str], None],
        compiling: Callable[[], None],
    ) -> list[Encoded]:
        from .encoding import encode_latents

        return encode_latents(
            np.stack([picture.latent for picture in batch]),
            [(picture.pixels.shape[1], picture.pixels.shape[0]) for picture in batch],
            self.load().space,
            self.settings.rate,
            preset=self.settings.preset,
            tuning=self._tuning,
            images=[picture.pixels for picture in batch],
            metadata=[picture.metadata for picture in batch],
            device=self._device,
            seed=self.settings.seed,
            progress=lambda state: progress(batch, state),
            warn=warn,
            compiling=compiling,
        )
