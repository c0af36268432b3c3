"""The container: what is written is read back, small, and refused when it is damaged."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from clric_decoder import StreamError, bitstream, decode_latent, read_header
from clric_decoder.bitstream import REGISTERED_FUNCTIONS, WITH_NETWORKS, Segments
from clric_decoder.networks import count_parameters, mac_per_pixel
from conformance import make_vectors

ROOT = Path(__file__).parents[2]


def written(architecture=make_vectors.DEFAULT, width=768, height=512, levels=(900, 200, 60, 20, 8)) -> bytes:
    segments = Segments(b"n" * 400, tuple(bytes([level % 251]) * level for level in levels))
    return bitstream.write(
        width=width, height=height, space="sd1", channels=4, architecture=architecture, segments=segments
    )


def test_header_says_what_was_written() -> None:
    header = read_header(written())
    assert (header.width, header.height, header.space, header.channels) == (768, 512, "sd1", 4)
    assert header.architecture == make_vectors.DEFAULT
    assert header.level_bytes == (900, 200, 60, 20, 8)
    assert header.network_bytes == 400
    assert header.total_bytes == len(written())
    assert header.bpp == 8 * len(written()) / (768 * 512)


def test_fixed_overhead_is_at_most_24_bytes() -> None:
    assert read_header(written(levels=(20000, 4000, 1000, 300, 100))).header_bytes <= 24
    paper = bitstream.registered_architecture(2)
    assert read_header(written(paper, levels=(3000, 2000, 700, 100, 50, 20, 5))).header_bytes <= 24


@pytest.mark.parametrize("number", REGISTERED_FUNCTIONS)
def test_specification_lists_the_registered_functions(number) -> None:
    row = f"`{REGISTERED_FUNCTIONS[number].hex()}` |"
    assert row in (ROOT / "bitstream_spec.md").read_text()


def macs(number: int, width: int, height: int) -> float:
    architecture = bitstream.registered_architecture(number)
    levels = (100,) * len(architecture.channels)
    return sum(mac_per_pixel(read_header(written(architecture, width, height, levels))).values())


def test_complexity_is_the_papers_or_less() -> None:
    assert macs(1, 768, 512) <= 26
    assert macs(2, 768, 512) <= 25.9
    assert macs(2, 2048, 1363) <= 25.48


def test_complexity_by_hand() -> None:
    # 16 x 8 pixels: two latents. Levels of 2, 1 values; ARM 8 -> 8 -> 8 -> 2; one output sample takes 4 taps a pass
    architecture = replace(make_vectors.DEFAULT, channels=(4, 1), grid_scales=False)
    header = read_header(written(architecture, 16, 8, (30, 5)))
    cost = mac_per_pixel(header)
    assert cost["arm"] * 128 == (4 * 2 + 1) * (64 + 64 + 16)
    assert cost["upsampler"] * 128 == 4 * 1 * 1 * (1 + 2)
    assert cost["synthesis"] * 128 == 2 * (5 * 4 + 4 * 8 * 9 + 8 * 4 * 9)
    assert count_parameters(header) == 144 + 18 + 4 + (20 + 288 + 288) + 16


def test_every_flipped_bit_and_every_truncation_is_an_error() -> None:
    data = make_vectors.make_valid(make_vectors.Case("small", 24, 16, metadata=(make_vectors.XMP,))).data
    for end in range(len(data)):
        with pytest.raises(StreamError):
            decode_latent(data[:end])
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(StreamError):
            decode_latent(bytes(damaged))


def test_blank_image_of_many_pixels_can_be_written() -> None:
    data = bitstream.write(
        width=8192,
        height=8192,
        space="sd1",
        channels=4,
        architecture=make_vectors.DEFAULT,
        segments=Segments(b"", (b"",) * 5),
    )
    assert decode_latent(data).shape == (4, 1024, 1024)


def test_pixels_over_the_limit_are_refused_before_memory_is_taken() -> None:
    data = written(width=65535, height=40000, levels=(200000, 200, 60, 20, 8))
    with pytest.raises(StreamError, match="--max-pixels") as error:
        decode_latent(data)
    assert error.value.kind == "limit"


def test_metadata_is_read_and_changes_no_value() -> None:
    entries = {"icc_profile": bytes(3000), "exif": b"", "xmp": b"<x/>"}
    plain = make_vectors.make_valid(make_vectors.Case("plain")).data
    header, segments = bitstream.read(plain)
    tagged = bitstream.write(
        width=header.width,
        height=header.height,
        space=header.space,
        channels=header.channels,
        architecture=header.architecture,
        segments=segments,
        metadata=entries,
    )
    assert read_header(plain).metadata == {}
    assert read_header(tagged).metadata == entries
    assert read_header(tagged).metadata_bytes == len(tagged) - len(plain) - 2  # its length, of two bytes
    assert np.array_equal(decode_latent(plain), decode_latent(tagged))


def test_metadata_that_the_format_does_not_know_cannot_be_written() -> None:
    with pytest.raises(StreamError, match="does not read back as written"):
        written_with(metadata={"comment": b"hello"})


@pytest.mark.parametrize("number", [0, 1, 7])
def test_the_image_decoder_that_a_function_was_trained_for_is_read(number) -> None:
    assert read_header(written_with(image_decoder=number)).image_decoder == number


def test_numbers_that_the_format_cannot_hold_are_not_written() -> None:
    for image_decoder in (-1, 8):
        with pytest.raises(StreamError, match=f"the number of the image decoder is {image_decoder}, not within 0 to 7"):
            written_with(image_decoder=image_decoder)
    with pytest.raises(StreamError, match="function 15 is not known"):
        written_with(function=15)
    with pytest.raises(StreamError, match="does not read back as written"):
        written_with(function=WITH_NETWORKS[0], space="clric", channels=8)


def written_with(**fields) -> bytes:
    """A stream of function 1 without bits, but for some fields."""
    settings = {
        "width": 48,
        "height": 40,
        "space": "sd1",
        "channels": 4,
        "architecture": make_vectors.DEFAULT,
        "segments": Segments(b"", (b"",) * 5),
    }
    return bitstream.write(**(settings | fields))


@pytest.mark.parametrize("name", ["unsupported-function-15", "unsupported-function-255"])
def test_an_unknown_function_is_refused_with_the_header(name) -> None:
    data = (ROOT / f"tests/conformance/invalid/{name}.clric").read_bytes()
    with pytest.raises(StreamError, match=r"function \d+ is not known; a newer decoder may know it") as error:
        read_header(data)
    assert error.value.kind == "unsupported"


@pytest.mark.parametrize(
    ("name", "advice"),
    [("version-0", "decode it with clric 0.1"), ("version-2", "stream version 2; this decoder knows version 1")],
)
def test_other_versions_are_named(name, advice) -> None:
    with pytest.raises(StreamError, match=advice):
        read_header((ROOT / f"tests/conformance/invalid/{name}.clric").read_bytes())
