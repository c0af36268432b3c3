"""EXIF, XMP and colour profile: from image files into streams, and out of streams into image files."""

import io
from pathlib import Path

import clric
import clric.pillow  # registers the format
import numpy as np
import pytest
from clric_decoder.image import read_image, write_image
from PIL import ExifTags, Image, ImageCms

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


def linear_profile() -> bytes:
    """sRGB's profile with the tone curves of another gamma: not sRGB by what it does."""
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
