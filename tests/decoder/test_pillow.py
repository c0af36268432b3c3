"""The Pillow plugin: streams behave as the files of any format that Pillow reads and writes."""

import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import clric
import clric.pillow
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

CONFORMANCE = Path(__file__).resolve().parent.parent / "conformance"


@pytest.fixture(scope="module")
def data(make_stream: Callable[..., bytes]) -> bytes:
    """A stream of 48 x 40 pixels, of the latent space whose image decoder comes with clric."""
    return make_stream(space="clric")


@pytest.fixture
def file(data: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "image.clric"
    path.write_bytes(data)
    return path


def test_header_is_known_before_anything_is_decoded(data: bytes, file: Path) -> None:
    code = (
        "import sys, clric.pillow; from PIL import Image\n"
        "image = Image.open(sys.argv[1])\n"
        "print(image.format, image.size, image.mode, image.get_format_mimetype(), image.info)\n"
        "print({'onnxruntime', 'torch', 'click', 'clric_encoder'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code, file], check=True, capture_output=True, text=True)
    info = {"bpp": 8 * len(data) / (48 * 40), "latent_space": "clric"}
    assert result.stdout == f"CLRIC (48, 40) RGB image/x-clric {info}\nset()\n"


def test_pixels_are_those_of_decode(data: bytes, file: Path) -> None:
    with Image.open(file) as image:
        np.testing.assert_array_equal(np.asarray(image), clric.decode(data))
        assert image.getpixel((3, 2)) == tuple(clric.decode(data)[2, 3])
        image.putpixel((3, 2), (1, 2, 3))
        assert image.getpixel((3, 2)) == (1, 2, 3)
    np.testing.assert_array_equal(np.asarray(Image.open(file).resize((24, 20))).shape, (20, 24, 3))


@pytest.mark.parametrize(
    "order",
    [
        "import clric.pillow",
        "import clric.pillow; Image.preinit()",
        "import clric.pillow; Image.init()",
        "Image.preinit(); import clric.pillow",
        "Image.init(); import clric.pillow",
        "import clric.pillow; Image.init(); clric.pillow.register(); clric.pillow.register()",
        "import clric.pillow; Image.open('other.tif')",  # which Pillow finds only after init()
        "Image.open('other.tif'); import clric.pillow",
    ],
)
def test_order_of_registration_and_of_pillows_own_does_not_matter(order: str, file: Path) -> None:
    Image.new("RGB", (8, 8)).save(file.with_name("other.tif"))
    file.with_name("no-suffix").write_bytes(file.read_bytes())
    code = (
        f"from PIL import Image\n{order}\n"
        "for name in ('image.clric', 'no-suffix', 'other.tif', 'image.clric'):\n"
        "    with Image.open(name) as image: print(image.format, image.size)\n"
        "Image.open('other.tif').save('new.clric', preset='instant')\n"
        "Image.open('new.clric').load(); Image.open('image.clric', formats=['clric']).load()\n"
        "print(Image.ID.count('CLRIC'), Image.registered_extensions()['.clric'], Image.MIME['CLRIC'])"
    )
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=file.parent)
    assert result.returncode == 0, result.stderr
    opened = ["CLRIC (48, 40)", "CLRIC (48, 40)", "TIFF (8, 8)", "CLRIC (48, 40)"]
    assert result.stdout.splitlines() == [*opened, "1 CLRIC image/x-clric"]


def test_image_decoder_is_named_at_the_first_load(make_stream: Callable[..., bytes], toy_models: Path) -> None:
    data = make_stream()
    image = Image.open(io.BytesIO(data))
    image.load(vae="toy", models=toy_models, provider="cpu")
    np.testing.assert_array_equal(np.asarray(image), clric.decode(data, vae="toy", models=toy_models))
    image = Image.open(io.BytesIO(data))
    with pytest.raises(OSError, match="decoder nothing is missing"):
        image.load(vae="nothing")
    image.load()  # a failure leaves the image as it was


class Unseekable:
    """What the body of an HTTP response is like."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def read(self, count: int = -1) -> bytes:
        return self._file.read(count)


def test_streams_without_seek(data: bytes) -> None:
    image = Image.open(Unseekable(data))
    np.testing.assert_array_equal(np.asarray(image), clric.decode(data))
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as end:
        end.write(data)
    with os.fdopen(reader, "rb") as start, Image.open(start) as image:
        np.testing.assert_array_equal(np.asarray(image), clric.decode(data))


def test_stream_that_arrives_in_parts(data: bytes) -> None:
    parser = ImageFile.Parser()
    for start in range(0, len(data), 100):
        parser.feed(data[start : start + 100])
    np.testing.assert_array_equal(np.asarray(parser.close()), clric.decode(data))


def test_users_file_stays_open_and_pillows_own_is_closed(data: bytes, file: Path) -> None:
    with open(file, "rb") as users:
        Image.open(users).load()
        image = Image.open(users)  # again
        assert not users.closed
    np.testing.assert_array_equal(np.asarray(image), clric.decode(data))  # its bytes were read when it was opened
    image = Image.open(file)
    own = image.fp
    image.load()
    assert own is not None
    assert own.closed


def test_closed_image_is_not_decoded(file: Path) -> None:
    image = Image.open(file)
    image.close()
    with pytest.raises(ValueError, match="closed image"):
        image.load()


def test_copies_and_pickles_keep_the_pixels_and_what_is_known_of_them(data: bytes, file: Path) -> None:
    for image in (Image.open(file).copy(), pickle.loads(pickle.dumps(Image.open(file)))):
        image.load()
        np.testing.assert_array_equal(np.asarray(image), clric.decode(data))
        assert image.info["latent_space"] == "clric"


def test_truncated_files_are_refused_when_they_are_opened(data: bytes, tmp_path: Path) -> None:
    for length in (0, 2, 3, 4, 8, 16, len(data) // 2, len(data) - 1):
        path = tmp_path / f"{length}.clric"
        path.write_bytes(data[:length])
        with pytest.raises(UnidentifiedImageError) as caught:
            Image.open(path)
        if length >= 3:  # where it can be told from other formats
            reason = "checksum mismatch" if length > 3 else "the file ends after 3 bytes"
            assert str(caught.value).startswith(f"{path}: {reason}")
            assert "fetch it again" in str(caught.value)
    with pytest.raises(SyntaxError, match="not a clric stream"):
        clric.pillow.ClricImageFile(io.BytesIO(b"\x89PNG\r\n\x1a\n"))


@pytest.mark.parametrize("name", ["unsupported-space-15", "version-255", "field-width-0", "checksum-flip-in-payload"])
def test_what_is_wrong_with_a_header_is_said_when_it_is_opened(name: str) -> None:
    path = CONFORMANCE / "invalid" / f"{name}.clric"
    with pytest.raises(clric.StreamError) as expected:
        clric.read_header(path)
    with pytest.raises(UnidentifiedImageError) as caught:
        Image.open(path)
    assert str(caught.value) == str(expected.value)


@pytest.mark.parametrize("name", ["payload-value-32768", "payload-latent-infinite", "payload-too-few-bytes"])
def test_what_the_checksum_does_not_tell_is_found_by_verify_and_by_load(name: str) -> None:
    path = CONFORMANCE / "invalid" / f"{name}.clric"
    for method in ("verify", "load"):
        with Image.open(path) as image, pytest.raises(OSError, match=rf"{name}\.clric: "):
            getattr(image, method)()


def test_verify_of_a_whole_file_and_then_it_is_opened_again(file: Path) -> None:
    image = Image.open(file)
    own = image.fp
    image.verify()
    assert own is not None
    assert own.closed
    Image.open(file).load()


def test_pillows_limit_of_pixels_holds(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 40 - 1)
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(data)).load()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(data))


def test_threads(data: bytes, file: Path) -> None:
    expected = clric.decode(data)
    one = Image.open(file)

    def pixels(number: int) -> np.ndarray:
        with Image.open(file) as image:
            return np.asarray(image if number % 2 else one)

    with ThreadPoolExecutor(8) as pool:
        for result in pool.map(pixels, range(32)):
            np.testing.assert_array_equal(result, expected)


def gradient() -> Image.Image:
    return Image.linear_gradient("L").resize((64, 48)).convert("RGB")


def test_save_hands_its_options_to_the_encoder(tmp_path: Path) -> None:
    for options in ({"quality": 70}, {"bpp": 0.14}, {"size": 50}, {"lmbda": 2.0}, {"quality": None, "optimize": True}):
        known = {name: value for name, value in options.items() if name != "optimize"}
        gradient().save(tmp_path / "image.clric", preset="instant", vae="small", **options)
        expected = clric.encode(gradient(), preset="instant", **known)
        assert (tmp_path / "image.clric").read_bytes() == expected
    gradient().save(tmp_path / "trained.clric", preset="fast", tune="none", size=150)
    with Image.open(tmp_path / "trained.clric") as image:
        assert image.size == (64, 48)
        assert os.path.getsize(tmp_path / "trained.clric") <= 150


def test_save_leaves_out_metadata_where_it_is_to(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "somebody"
    gradient().save(tmp_path / "photo.jpg", exif=exif)
    with Image.open(tmp_path / "photo.jpg") as photo:
        for strip in (False, True):
            photo.save(tmp_path / "photo.clric", preset="instant", strip=strip)
            assert ("exif" in clric.read_header(tmp_path / "photo.clric").metadata) is not strip


def test_save_to_streams(file: Path) -> None:
    class Writer:
        data = b""

        def write(self, data: bytes) -> None:
            self.data += data

    output, seekable = Writer(), io.BytesIO()
    gradient().save(output, "clric", preset="instant")
    gradient().save(seekable, "CLRIC", preset="instant")
    assert output.data == seekable.getvalue() == clric.encode(gradient(), preset="instant")
    with Image.open(file) as image:  # of the format itself
        image.save(file, preset="instant")
    assert Image.open(file).size == (48, 40)


def test_save_that_fails_says_why_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "image.clric"
    for options, message in (
        ({"quality": 101}, "quality must be 0 to 100, not 101"),
        ({"quality": 50, "bpp": 0.2}, "give one of them"),
        ({"vae": "nothing"}, "autoencoder 'nothing' is not known"),
    ):
        with pytest.raises(OSError, match=message) as caught:
            gradient().save(path, preset="instant", **options)
        assert str(caught.value).startswith(f"{path}: ")
        assert not path.exists()
    for name, value, message in (
        ("quality", "high", "quality must be a number, not str"),
        ("exif", "text", "exif must be bytes or an Image.Exif, not str"),
        ("icc_profile", 5, "icc_profile must be bytes, not int"),
        ("xmp", 3, "xmp must be bytes or a string, not int"),
    ):
        with pytest.raises(TypeError, match=message):
            gradient().save(path, **{name: value})
    with pytest.warns(UserWarning, match="transparency is flattened on white"):
        Image.new("RGBA", (8, 8)).save(path, preset="instant")


def test_save_without_the_encoder_is_one_message(tmp_path: Path) -> None:
    code = (
        "import os, sys; sys.path = [p for p in sys.path if not os.path.isdir(os.path.join(p, 'clric_encoder'))]\n"
        "import clric.pillow; from PIL import Image; Image.new('RGB', (8, 8)).save('image.clric')"
    )
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=tmp_path)
    assert result.stderr.splitlines()[-1] == (
        "OSError: image.clric: encoding needs the package clric_encoder, which is not installed; "
        "run: pip install 'clric[encoder]'"
    )
    assert list(tmp_path.iterdir()) == []
