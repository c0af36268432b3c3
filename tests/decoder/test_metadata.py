"""EXIF, XMP and colour profile: from image files into streams, and out of streams into image files."""

import functools
import io
from pathlib import Path

import clric
import clric.pillow  # registers the format
import numpy as np
import pytest
from clric_decoder.image import read_image, write_image
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

XMP = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description tiff:Orientation="6" dc:title="A title" xmlns:tiff="http://ns.adobe.com/tiff/1.0/"
xmlns:dc="http://purl.org/dc/elements/1.1/"/></rdf:RDF></x:xmpmeta>"""
DATE = "2024:05:06 07:08:09"


def picture() -> Image.Image:
    ramp = np.linspace(0, 255, 48 * 40 * 3).reshape(40, 48, 3)
    return Image.fromarray(ramp.astype(np.uint8))


def exif(orientation: int = 6) -> Image.Exif:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    tags[ExifTags.Base.Make] = "A maker"
    tags.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = DATE
    return tags


@functools.cache
def linear_profile() -> bytes:
    """sRGB's profile with the tone curves of another gamma: not sRGB by what it does. One, for it has a date."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    at = profile.index(b"para")
    profile[at + 12 : at + 16] = (0x00010000).to_bytes(4, "big")  # gamma 1.0, in 1/65536
    return bytes(profile)


def saved(image: Image.Image, suffix: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, Image.registered_extensions()[suffix], **options)
    file.seek(0)
    return file


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_a_turned_photo_comes_upright_with_its_exif(suffix) -> None:
    data = clric.encode(Image.open(saved(picture(), suffix, exif=exif())), preset="instant")
    header = clric.read_header(data)
    assert (header.width, header.height) == (40, 48)  # turned
    tags = Image.Exif()
    tags.load(header.metadata["exif"])
    assert tags[ExifTags.Base.Make] == "A maker"
    assert tags.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] == DATE
    assert tags.get(ExifTags.Base.Orientation, 1) == 1


def test_xmp_loses_its_orientation_where_it_is_applied() -> None:
    data = clric.encode(Image.open(saved(picture(), ".jpg", exif=exif(), xmp=XMP)), preset="instant")
    xmp = clric.read_header(data).metadata["xmp"]
    assert b"A title" in xmp
    assert b"Orientation" not in xmp


ELEMENT = b"<rdf:Description><tiff:Orientation>6</tiff:Orientation><dc:title>A title</dc:title></rdf:Description>"


OTHER_PREFIX = b'<x xmlns:t.1="http://ns.adobe.com/tiff/1.0/" t.1:Orientation="6" dc:title="A title"/>'
COMMENT = ELEMENT.replace(b">6<", b' rdf:datatype="x">6<!-- turned --><')


@pytest.mark.parametrize("xmp", [XMP, XMP.replace(b'="6"', b" = '6'"), ELEMENT, OTHER_PREFIX, COMMENT])
def test_orientation_is_taken_from_metadata_that_does_not_apply(xmp) -> None:
    """EXIF, which says that the photo is upright, counts; and who gives an array gives it upright."""
    photo = Image.open(saved(picture(), ".jpg", exif=exif(1), xmp=xmp))
    file = io.BytesIO()
    picture().save(file, "CLRIC", preset="instant", xmp=xmp.decode(), exif=exif(6))
    array = clric.encode(np.asarray(picture()), preset="instant", metadata={"xmp": xmp, "exif": exif(6).tobytes()})
    for data in (clric.encode(photo, preset="instant"), file.getvalue(), array):
        header = clric.read_header(data)
        assert (header.width, header.height) == (48, 40)
        assert b"A title" in header.metadata["xmp"]
        assert b"Orientation" not in header.metadata["xmp"]
        tags = Image.Exif()
        tags.load(header.metadata["exif"])
        assert ExifTags.Base.Orientation not in tags


def test_megabytes_of_spaces_in_xmp_take_no_time_to_speak_of(tmp_path: Path) -> None:
    """Tried from each of its places, a run of so many would take hours."""
    xmp = b" " * 4_000_000 + b"<x/>" + b" tiff:Orientation" * 100_000
    notes = write_image(tmp_path / "out.png", np.asarray(picture()), {"xmp": xmp})
    assert notes == []
    with Image.open(tmp_path / "out.png") as image:
        image.load()
        assert image.info["xmp"] == xmp


def test_metadata_that_a_format_cannot_hold_costs_no_other(tmp_path: Path) -> None:
    notes = write_image(tmp_path / "out.png", np.asarray(picture()), {"exif": b"garbage", "xmp": b"<x/>"})
    assert len(notes) == 1
    assert notes[0].startswith("exif is left out")
    with Image.open(tmp_path / "out.png") as image:
        image.load()
        assert image.info["xmp"] == b"<x/>"


def test_exif_of_tiff_and_of_png_from_imagemagick_is_kept_without_how_pixels_are_stored(tmp_path: Path) -> None:
    tiff = saved(picture(), ".tif", exif=exif().tobytes())
    hexadecimal = exif().tobytes().hex()
    raw = PngImagePlugin.PngInfo()
    raw.add_text("Raw profile type exif", f"\nexif\n{len(hexadecimal) // 2:8}\n{hexadecimal}\n")
    for file in (tiff, saved(picture(), ".png", pnginfo=raw)):
        read = read_image(file, strip=False)
        assert read.notes == []
        assert read.pixels.shape == (48, 40, 3)
        tags = Image.Exif()
        tags.load(read.metadata["exif"])
        assert set(tags) == {ExifTags.Base.Make, ExifTags.IFD.Exif}
        assert tags.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] == DATE


def test_exif_that_cannot_be_read_is_left_out_with_a_note() -> None:
    read = read_image(saved(picture(), ".png", exif=b"garbage"), strip=False)
    np.testing.assert_array_equal(read.pixels, np.asarray(picture()))
    assert read.metadata == {}
    assert "EXIF is left out" in read.notes[0]
    with pytest.raises(clric.ImageError, match="EXIF"):
        clric.encode(np.asarray(picture()), preset="instant", metadata={"exif": b"garbage"})


def test_a_file_grows_by_nothing_where_the_image_has_no_metadata() -> None:
    plain = clric.encode(np.asarray(picture()), preset="instant")
    assert clric.encode(Image.open(saved(picture(), ".png")), preset="instant") == plain
    assert clric.read_header(plain).metadata == {}


def test_strip_leaves_all_of_it_out() -> None:
    file = saved(picture(), ".jpg", exif=exif(), xmp=XMP, icc_profile=linear_profile())
    assert clric.read_header(clric.encode(Image.open(file), preset="instant", strip=True)).metadata == {}


def test_a_profile_is_kept_with_its_pixels_and_applied_where_it_is_stripped() -> None:
    file = saved(picture(), ".png", icc_profile=linear_profile())
    kept = read_image(file, strip=False)
    np.testing.assert_array_equal(kept.pixels, np.asarray(picture()))
    assert kept.metadata["icc_profile"] == linear_profile()
    stripped = read_image(file)
    assert stripped.metadata == {}
    # Linear values are darker than sRGB's: converted, the middle is brighter
    assert stripped.pixels[20].mean() > kept.pixels[20].mean() + 30


def test_the_profile_of_srgb_itself_is_left_out() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    read = read_image(saved(picture(), ".png", icc_profile=profile), strip=False)
    assert read.metadata == {}
    np.testing.assert_array_equal(read.pixels, np.asarray(picture()))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".bmp", ".ppm"])
@pytest.mark.parametrize("content", [b"garbage", b"<x/>" * 20_000], ids=["short", "long"])
def test_an_image_is_written_without_metadata_that_its_format_cannot_hold(tmp_path: Path, suffix, content) -> None:
    """A stream may hold anything under these names."""
    pixels = np.asarray(picture())
    metadata = {"icc_profile": linear_profile(), "exif": content, "xmp": content}
    notes = write_image(tmp_path / f"out{suffix}", pixels, metadata)
    with Image.open(tmp_path / f"out{suffix}") as image:
        assert image.size == (48, 40)
        assert ("icc_profile" in image.info) == (suffix not in (".bmp", ".ppm"))
        # What is said to be left out, and nothing else
        assert ("exif" in image.info) == (suffix in (".png", ".jpg", ".webp") and not any("exif" in n for n in notes))
    if suffix in (".bmp", ".ppm"):
        assert len(notes) == 1
        assert "colour profile" in notes[0]
    if suffix == ".jpg" and content != b"garbage":
        assert any("xmp is left out" in note for note in notes)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_what_a_stream_holds_goes_into_the_image_file(tmp_path: Path, suffix) -> None:
    source = read_image(saved(picture(), ".jpg", exif=exif(), xmp=XMP, icc_profile=linear_profile()), strip=False)
    write_image(tmp_path / f"out{suffix}", source.pixels, source.metadata)
    with Image.open(tmp_path / f"out{suffix}") as image:
        image.load()
        assert image.info["icc_profile"] == linear_profile()
        tags = image.getexif()
        assert tags[ExifTags.Base.Make] == "A maker"
        assert tags.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] == DATE
        xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
        assert "A title" in (xmp if isinstance(xmp, str) else xmp.decode())


def test_pillow_keeps_metadata_unless_it_is_told_otherwise(tmp_path: Path) -> None:
    source = Image.open(saved(picture(), ".jpg", exif=exif(), xmp=XMP, icc_profile=linear_profile()))
    source.save(tmp_path / "all.clric", preset="instant")
    with Image.open(tmp_path / "all.clric") as image:
        assert image.info["icc_profile"] == linear_profile()
        assert b"A title" in image.info["xmp"]
        assert image.getexif()[ExifTags.Base.Make] == "A maker"
    source.save(tmp_path / "some.clric", preset="instant", exif=None, xmp="<x/>", icc_profile=None)
    with Image.open(tmp_path / "some.clric") as image:
        assert "exif" not in image.info
        assert "icc_profile" not in image.info
        assert image.info["xmp"] == b"<x/>"
    source.save(tmp_path / "other.clric", preset="instant", exif=exif(3))
    with Image.open(tmp_path / "other.clric") as image:
        assert image.getexif().get(ExifTags.Base.Orientation, 1) == 1
