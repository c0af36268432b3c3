"""The pictures that an autoencoder is trained on: augmented crops of photos, and rendered text and line art.

Photos are kept whole in memory. Every crop is a function of the random generator that it is given, so that a run that
was stopped goes on with the crops that it would have had.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from clric_decoder.bitstream import Header, read_header
from clric_decoder.errors import ClricError
from clric_decoder.image import read_image
from clric_decoder.latent import decode_latent
from clric_decoder.terminal import IMAGE_SUFFIXES, list_inputs
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# Photos kept from training, on which the log's figures are measured. They are reduced to this long side, and at least
# by this factor: the 8 x 8 blocks of a JPEG file would be taken for a mesh of the decoder.
HELD_OUT, HELD_OUT_LONG_SIDE, HELD_OUT_SCALE = 8, 768, 0.9

# The strongest reduction of a photo, and the shares of crops that are rendered and that are the flattest of four: skies
# and walls, on which a mesh can be seen, are few.
MIN_SCALE, RENDERED_SHARE, FLAT_SHARE, FLAT_CANDIDATES = 0.4, 0.1, 0.25, 4

# Shares of crops whose colours are changed, that are mirrored, and that are turned upside down.
COLOUR_SHARE, MIRROR_SHARE, FLIP_SHARE = 0.5, 0.5, 0.1

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?-+()&%$@#/"


def list_photos(folder: Path) -> list[Path]:
    """The image files of a folder, by their suffixes; streams and notes may lie beside them.

    Raises ClricError where there are none.
    """
    return [Path(file) for file in list_inputs([str(folder)], IMAGE_SUFFIXES)]


def read_streams(folder: Path, photo: Path, channels: int, space: str | None) -> Iterator[tuple[Path, Header, Tensor]]:
    """The streams of a photo in a folder or one folder down, each named as the photo with the suffix .clric.

    Gives their paths, headers and latents [C, h, w] float32. channels, space: what the latents must be of; any space
    for None. Raises ClricError, with the stream's path, for one of others and for one that cannot be read.
    """
    name = f"{photo.stem}.clric"
    for path in sorted([*folder.glob(name), *folder.glob(f"*/{name}")]):
        try:
            data = path.read_bytes()
            header, latent = read_header(data), torch.from_numpy(decode_latent(data))
        except ClricError as error:
            raise ClricError(f"{path}: {error}") from error
        if space not in (None, header.space) or len(latent) != channels:
            wanted = f"{channels} channels" if space is None else f"the latent space {space}"
            raise ClricError(f"{path} has the latent space {header.space} of {len(latent)} channels, not {wanted}")
        yield path, header, latent


class Crops:
    """Augmented crops of the photos of a folder, and crops of their streams.

    images: H x W x 3 uint8. coded: numbers of images that are not held out, with latents [C, h, w] of their streams;
    held_out_coded: of those that are.
    """

    def __init__(
        self,
        folder: Path,
        side: int,
        seed: int,
        streams: Path | None = None,
        channels: int = 0,
        space: str | None = None,
    ) -> None:
        """side: of the crops, in pixels. seed: decides which photos are held out. streams, channels, space: see
        `read_streams`.

        Raises ClricError where too few photos of at least this size are there, and as `read_streams` does.
        """
        self.side = side
        self.images: list[np.ndarray] = []
        self.coded: list[tuple[int, Tensor]] = []
        self.held_out_coded: list[tuple[int, Tensor]] = []
        files = list_photos(folder)
        for i in np.random.default_rng(seed).permutation(len(files)):
            image = read_image(files[i]).pixels
            if min(image.shape[:2]) < side:
                continue
            if streams is not None:
                coded = self.coded if len(self.images) >= HELD_OUT else self.held_out_coded
                for path, header, latent in read_streams(streams, files[i], channels, space):
                    if (header.height, header.width) != image.shape[:2]:
                        raise ClricError(f"{path} is not a stream of {files[i]}")
                    coded.append((len(self.images), latent))
            self.images.append(image)
        if len(self.images) <= HELD_OUT:
            raise ClricError(
                f"{folder} contains only {len(self.images)} photos with sides of at least {side} pixels;"
                " hundreds are needed"
            )
        self._fonts = sorted(Path("/usr/share/fonts").rglob("*.ttf"))

    def batch(self, random: np.random.Generator, count: int, held_out: bool = False) -> Tensor:
        """Crops [count, 3, side, side] in [0, 1]. held_out: of the photos that are held out."""
        crops = [
            self._rendered(random, held_out) if random.random() < RENDERED_SHARE else self._photo(random, held_out)
            for _ in range(count)
        ]
        return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()

    def coded_batch(self, random: np.random.Generator, count: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Crops of latents of streams, [count, C, side / 8, side / 8], and of their photos, as `batch` gives them."""
        latents, crops = [], []
        coded = self.held_out_coded if held_out else self.coded
        for _ in range(count):
            number, latent = coded[int(random.integers(len(coded)))]
            image = self.images[number]
            # Whole latents only: what continues the last row and column of an image is no photo
            y, x = (int(random.integers(0, (length - self.side) // 8 + 1)) for length in image.shape[:2])
            latents.append(latent[:, y : y + self.side // 8, x : x + self.side // 8])
            crops.append(np.array(image[8 * y : 8 * y + self.side, 8 * x : 8 * x + self.side], np.float32) / 255)
        return torch.stack(latents), torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()

    def held_out(self) -> Iterator[np.ndarray]:
        """The photos that are held out: H x W x 3 uint8, sides multiples of 8."""
        for image in self.images[:HELD_OUT]:
            height, width, _ = image.shape
            scale = min(HELD_OUT_SCALE, HELD_OUT_LONG_SIDE / max(height, width))
            size = 8 * round(scale * width / 8), 8 * round(scale * height / 8)
            yield np.array(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))

    def _photo(self, random: np.random.Generator, held_out: bool) -> np.ndarray:
        """A crop of a photo at a random scale, mirrored and with other colours at random: side x side x 3 float32."""
        photos = (0, HELD_OUT) if held_out else (HELD_OUT, len(self.images))
        image = self.images[int(random.integers(*photos))]
        height, width, _ = image.shape
        smallest = max(MIN_SCALE, self.side / min(height, width))
        window = min(round(self.side / smallest ** random.random()), height, width)
        places = [
            (int(random.integers(0, height - window + 1)), int(random.integers(0, width - window + 1)))
            for _ in range(FLAT_CANDIDATES if random.random() < FLAT_SHARE else 1)
        ]
        y, x = (
            min(places, key=lambda place: _activity(image, place[0], place[1], window))
            if len(places) > 1
            else places[0]
        )
        picture = Image.fromarray(image[y : y + window, x : x + window])
        if window != self.side:
            picture = picture.resize((self.side, self.side), Image.Resampling.LANCZOS)
        crop = np.asarray(picture, np.float32) / 255
        if random.random() < MIRROR_SHARE:
            crop = crop[:, ::-1]
        if random.random() < FLIP_SHARE:
            crop = crop[::-1]
        return _other_colours(crop, random) if random.random() < COLOUR_SHARE else crop

    def _rendered(self, random: np.random.Generator, held_out: bool) -> np.ndarray:
        """Lines of random text and some shapes, on a plain colour or on a photo; drawn at twice the size."""
        side = 2 * self.side
        if random.random() < 0.3:
            picture = Image.fromarray((255 * self._photo(random, held_out).clip(0, 1)).astype(np.uint8)).resize(
                (side, side)
            )
        elif random.random() < 0.5:
            picture = Image.new("RGB", (side, side), (255, 255, 255))
        else:
            picture = Image.new("RGB", (side, side), _colour(random))
        draw = ImageDraw.Draw(picture)
        for _ in range(int(random.integers(0, 5))):
            ends = sorted(random.integers(0, side, 2)), sorted(random.integers(0, side, 2))
            box = [int(ends[0][0]), int(ends[1][0]), int(ends[0][1]), int(ends[1][1])]
            line_width = int(random.integers(1, 8))
            kind = random.integers(0, 4)
            if kind == 0:
                draw.rectangle(box, outline=_colour(random), width=line_width)
            elif kind == 1:
                draw.rectangle(box, fill=_colour(random))
            elif kind == 2:
                draw.ellipse(box, outline=_colour(random), width=line_width)
            else:
                draw.line(box, fill=_colour(random), width=line_width)
        size = 2 * float(np.exp(random.uniform(np.log(9), np.log(48))))
        ink = (0, 0, 0) if random.random() < 0.5 else _colour(random)
        font = self._font(random, size)
        y = float(random.uniform(0, size))
        while y < side - size / 2:
            words = ["".join(random.choice(list(_LETTERS), random.integers(1, 10))) for _ in range(8)]
            draw.text((float(random.uniform(-size, 2 * size)), y), " ".join(words), fill=ink, font=font)
            y += size * float(random.uniform(1.1, 1.6))
        small = picture.resize((self.side, self.side), Image.Resampling.LANCZOS)
        return np.asarray(small, np.float32) / 255

    def _font(self, random: np.random.Generator, size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        choice = int(random.integers(0, 1 << 16))
        if self._fonts:
            return ImageFont.truetype(str(self._fonts[choice % len(self._fonts)]), size)
        return ImageFont.load_default(size)


def _activity(image: np.ndarray, y: int, x: int, window: int) -> float:
    """The mean difference of neighbouring pixels, in green and at every second row."""
    green = image[y : y + window : 2, x : x + window, 1].astype(np.int16)
    return float(np.abs(np.diff(green, axis=1)).mean() + np.abs(np.diff(green, axis=0)).mean())


def _other_colours(crop: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Slightly other saturation, contrast, brightness and white balance."""
    grey = crop @ np.array([0.299, 0.587, 0.114], np.float32)
    crop = grey[..., None] + (crop - grey[..., None]) * np.float32(random.uniform(0.7, 1.3))
    gain = random.uniform(0.8, 1.1) * random.uniform(0.95, 1.05, 3)
    mean = crop.mean()
    return ((crop - mean) * gain + mean + random.uniform(-0.05, 0.05)).clip(0, 1).astype(np.float32)


def _colour(random: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in random.integers(0, 256, 3))
    return red, green, blue
