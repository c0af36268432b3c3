"""Images in and out: what a user's files look like once they are RGB, and what is said of bad ones."""

import io
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from clric_decoder.errors import ClricError, ImageError
from clric_decoder.image import read_image, take_over_pillow, write_image
from PIL import Image, ImageCms


def gradient(height: int = 12, width: int = 20) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 12, y * 20, 255 - x * 5], -1).astype(np.uint8)


def write_png16(path: Path, values: np.ndarray) -> None:
    """A PNG of 16 bits per channel, which Pillow reads but does not write in colour."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    kind = 2 if values.ndim == 3 else 0
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks:
        data += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    path.write_bytes(data)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".TIFF", ".bmp", ".ppm"])
def test_lossless_formats_return_the_same_pixels(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image{suffix}"
    write_image(path, gradient())
    image, notes, _ = read_image(path)
    np.testing.assert_array_equal(image, gradient())
    assert image.dtype == np.uint8
    assert notes == []
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_jpeg_is_close(tmp_path: Path) -> None:
    write_image(tmp_path / "image.jpg", gradient())
    assert np.abs(read_image(tmp_path / "image.jpg").pixels.astype(int) - gradient()).mean() < 4


def test_a_new_file_is_readable_by_others_as_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_image(tmp_path / "image.png", gradient())
    assert (tmp_path / "image.png").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "folder" / "real.png")
    write_image(tmp_path / "link.png", gradient())
    assert (tmp_path / "link.png").is_symlink()
    np.testing.assert_array_equal(read_image(tmp_path / "folder" / "real.png").pixels, gradient())


def test_unknown_suffix_names_those_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"image\.xyz: unknown image suffix '\.xyz'; use one of \.png"):
        write_image(tmp_path / "image.xyz", gradient())


def test_failed_write_keeps_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "image.webp"
    write_image(path, gradient())
    with pytest.raises(ImageError, match="cannot be made"):
        write_image(path, np.zeros((1, 20000, 3), np.uint8))  # WebP ends at 16383
    np.testing.assert_array_equal(read_image(path).pixels, gradient())


def test_missing_folder_and_full_disk_are_one_line() -> None:
    with pytest.raises(ClricError, match=r"^/nowhere/image\.png: cannot be written \(No such file or directory\)$"):
        write_image("/nowhere/image.png", gradient())


def test_stream_of_bytes() -> None:
    encoded = io.BytesIO()
    Image.fromarray(gradient()).save(encoded, "png")
    np.testing.assert_array_equal(read_image(encoded).pixels, gradient())


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    Image.fromarray(gradient()).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png").pixels, np.rot90(gradient(), -1))


def test_grey_and_palette_and_one_bit(tmp_path: Path) -> None:
    grey = gradient()[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png").pixels, np.repeat(grey[..., None], 3, -1))
    palette = Image.fromarray(gradient()).quantize(16)
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png").pixels, np.asarray(palette.convert("RGB")))
    Image.fromarray(grey).convert("1").save(tmp_path / "bit.png")
    assert set(read_image(tmp_path / "bit.png").pixels.ravel()) <= {0, 255}


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 3)])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = np.linspace(0, 65535, int(np.prod(shape))).reshape(shape)
    write_png16(tmp_path / "deep.png", values.astype(np.uint16))
    image, notes, _ = read_image(tmp_path / "deep.png")
    expected = values / 257 if len(shape) == 3 else np.repeat(values[..., None], 3, -1) / 257
    assert np.abs(image - expected).max() <= 1
    assert (image.min(), image.max(), notes) == (0, 255, [])


def test_values_without_a_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ImageError, match=r"float\.tif: 32-bit samples .* convert"):
        read_image(tmp_path / "float.tif")


def test_cmyk_is_converted(tmp_path: Path) -> None:
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "red.tif")
    image = read_image(tmp_path / "red.tif").pixels
    np.testing.assert_array_equal(image, np.broadcast_to([255, 0, 0], (4, 4, 3)))


def test_transparency_is_flattened_on_white_with_a_warning(tmp_path: Path) -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = 200, 100, 0, 255
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    image, notes, _ = read_image(tmp_path / "clear.png")
    assert image[0, 0].tolist() == [200, 100, 0]
    assert image[1, 1].tolist() == [255, 255, 255]
    assert notes == [f"{tmp_path / 'clear.png'}: transparency is flattened on white"]


def test_opaque_alpha_needs_no_warning(tmp_path: Path) -> None:
    Image.fromarray(gradient()).convert("RGBA").save(tmp_path / "opaque.png")
    image, notes, _ = read_image(tmp_path / "opaque.png")
    np.testing.assert_array_equal(image, gradient())
    assert notes == []


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    image, notes, _ = read_image(tmp_path / "moving.gif")
    assert image[0, 0].tolist() == [255, 0, 0]
    assert notes == [f"{tmp_path / 'moving.gif'}: has several frames; only the first is taken"]


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def renamed(profile: bytes) -> bytes:
    assert "sRGB".encode("utf-16-be") in profile
    return profile.replace("sRGB".encode("utf-16-be"), "abcd".encode("utf-16-be"))


@pytest.mark.parametrize("profile", [SRGB, renamed(SRGB)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_srgb_profile_changes_nothing_whatever_its_name(tmp_path: Path, profile: bytes, mode: str) -> None:
    image = Image.fromarray(gradient()).convert(mode)
    image.save(tmp_path / "srgb.png", icc_profile=profile)
    np.testing.assert_array_equal(read_image(tmp_path / "srgb.png").pixels, np.asarray(image.convert("RGB")))


def test_another_profile_is_applied(tmp_path: Path) -> None:
    """sRGB's own with the columns of red and green exchanged: a colour space in which red is green."""
    exchanged = SRGB.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "other.png", icc_profile=exchanged)
    image, notes, _ = read_image(tmp_path / "other.png")
    assert image[0, 0, 1] > 250 > 5 > image[0, 0, 0]
    assert notes == []


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_linear_profile_is_applied_though_its_name_says_srgb(tmp_path: Path, mode: str) -> None:
    curve = SRGB.index(b"para")
    # ICC.1, parametricCurveType: function 0 is a power, and this one's exponent is 1.
    linear = SRGB.replace(SRGB[curve : curve + 16], b"para\0\0\0\0\0\0\0\0\0\1\0\0")
    assert "sRGB" in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(linear)))
    grey = np.arange(256, dtype=np.uint8)[None]
    Image.fromarray(grey).convert(mode).save(tmp_path / "linear.png", icc_profile=linear)
    image, notes, _ = read_image(tmp_path / "linear.png")
    light = grey[0] / 255
    encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    assert np.abs(image[0] - 255 * encoded[:, None]).max() <= 1
    assert notes == []


def test_broken_profile_is_a_warning(tmp_path: Path) -> None:
    Image.fromarray(gradient()).save(tmp_path / "broken.png", icc_profile=b"nonsense")
    image, notes, _ = read_image(tmp_path / "broken.png")
    np.testing.assert_array_equal(image, gradient())
    assert len(notes) == 1
    assert "colour profile is not applied" in notes[0]


def bad_files(folder: Path) -> dict[str, str]:
    """Bad files by name, each with what must be said of it."""
    Image.fromarray(gradient(200, 200)).save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(gradient(64, 64)).save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "flipped.png").write_bytes(whole[:20] + bytes([whole[20] ^ 255]) + whole[21:])
    (folder / "text.png").write_text("just some text\n")
    (folder / "empty.png").write_bytes(b"")
    bomb = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + bomb + struct.pack(">I", zlib.crc32(b"IHDR" + bomb))
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT" + bytes(16))
    return {
        "cut.jpg": "truncated",
        "cut.png": "truncated",
        "flipped.png": "",
        "text.png": "unsupported or unrecognised image format",
        "empty.png": "unsupported or unrecognised image format",
        "bomb.png": "limit",
        "missing.png": "No such file or directory",
    }


def test_bad_files_are_one_line_that_names_the_file(tmp_path: Path) -> None:
    for name, reason in bad_files(tmp_path).items():
        with pytest.raises(ImageError) as caught:
            read_image(tmp_path / name)
        message = str(caught.value)
        assert message.startswith(f"{tmp_path / name}: "), message
        assert reason in message
        assert "\n" not in message


def test_what_is_pillows_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its limit and Python's filters of warnings are the whole process's: other threads see them too."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    write_image(tmp_path / "image.png", gradient())
    seen = []

    class Watched(io.BytesIO):
        def read(self, *arguments: int) -> bytes:
            seen.append((Image.MAX_IMAGE_PIXELS, list(warnings.filters)))
            return super().read(*arguments)

    before = list(warnings.filters)
    read_image(Watched((tmp_path / "image.png").read_bytes()))
    assert seen
    assert all(now == (1000, before) for now in seen)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9)
    with pytest.raises(ImageError, match=r"image\.png: exceeds Pillow's limit .* raise PIL\.Image\.MAX_IMAGE_PIXELS"):
        read_image(tmp_path / "image.png")


def test_in_a_command_only_our_own_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9)
    write_image(tmp_path / "image.png", gradient())
    take_over_pillow()
    np.testing.assert_array_equal(read_image(tmp_path / "image.png").pixels, gradient())


def test_limit_of_pixels(tmp_path: Path) -> None:
    write_image(tmp_path / "image.png", gradient())
    with pytest.raises(ImageError, match="20 x 12 exceeds the limit of 100 pixels"):
        read_image(tmp_path / "image.png", max_pixels=100)


def test_threads_leave_pillows_limit_as_it_was(tmp_path: Path) -> None:
    """The first reader ends while the second one still reads."""
    write_image(tmp_path / "image.png", gradient())
    data, limit = (tmp_path / "image.png").read_bytes(), Image.MAX_IMAGE_PIXELS
    second_reads, first_ended = threading.Event(), threading.Event()

    class Slow(io.BytesIO):
        """Waits for the other reader, unless that one is not let in."""

        def __init__(self, begins: threading.Event | None, awaited: threading.Event) -> None:
            super().__init__(data)
            self._begins, self._awaited = begins, awaited

        def read(self, count: int | None = -1) -> bytes:
            if self._begins is not None:
                self._begins.set()
            self._awaited.wait(0.2)
            return super().read(count)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(read_image, Slow(None, second_reads))
        first.add_done_callback(lambda _: first_ended.set())
        second = pool.submit(read_image, Slow(second_reads, first_ended))
        first.result(), second.result()
    assert limit == Image.MAX_IMAGE_PIXELS
