"""The package clric: what encode and decode take, what they refuse, and what they need."""

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import clric
import clric_encoder
import matplotlib
import numpy as np
import pytest
from PIL import Image

MakeStream = Callable[..., bytes]


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A face, 64 x 48, as Pillow has it."""
    with Image.open(Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")) as image:
        return image.crop((200, 60, 264, 108))


def encode_instantly(image: "np.ndarray | Image.Image | str | Path") -> bytes:
    return clric.encode(image, preset="instant")


def test_array_pillow_image_and_path_are_one_image(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.png")
    streams = {
        encode_instantly(image)
        for image in (np.asarray(photo), photo, tmp_path / "photo.png", str(tmp_path / "photo.png"))
    }
    (data,) = streams
    header = clric.read_header(data)
    assert (header.width, header.height, header.space) == (64, 48, "clric")
    assert np.corrcoef(clric.decode(data).ravel(), np.asarray(photo).ravel())[0, 1] > 0.85


def test_rate_is_said_in_four_ways(photo: Image.Image) -> None:
    finest, coarsest = (clric.encode(photo, preset="instant", quality=quality) for quality in (90, 10))
    assert len(coarsest) < len(finest)
    by_lambda = clric.encode(photo, preset="instant", lmbda=0.5)
    by_quality = clric.encode(photo, preset="instant", quality=50)
    assert by_lambda == by_quality
    assert len(clric.encode(photo, preset="instant", size=120)) <= 120
    assert clric.read_header(clric.encode(photo, preset="instant", bpp=0.3)).bpp <= 0.3
    with pytest.raises(clric.ClricError, match="give one of them"):
        clric.encode(photo, preset="instant", quality=50, bpp=0.3)


def test_training_takes_its_options(photo: Image.Image) -> None:
    seen: list[object] = []
    data = clric.encode(photo, preset="fast", tune="none", seed=1, device="cpu", progress=seen.append)
    assert seen
    assert clric.decode(data).shape == (48, 64, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_other_modes_are_what_the_command_makes_of_their_files(mode: str, photo: Image.Image, tmp_path: Path) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    elif mode == "P":
        image = photo.quantize(16)
    else:
        image = photo.convert(mode)
    assert image.mode == mode
    path = tmp_path / "image.tif"
    image.save(path)
    assert encode_instantly(image) == encode_instantly(path)
    assert image.mode == mode


def test_transparency_is_flattened_on_white_with_a_warning(photo: Image.Image) -> None:
    clear = photo.copy()
    clear.putalpha(0)
    with pytest.warns(UserWarning, match="transparency is flattened on white"):
        data = encode_instantly(clear)
    assert data == encode_instantly(Image.new("RGB", photo.size, "white"))


def test_image_is_turned_as_exif_says_and_left_as_it_is(photo: Image.Image) -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(file, "png", exif=exif)
    with Image.open(file) as image:
        assert encode_instantly(image) == encode_instantly(photo.rotate(-90, expand=True))
        assert (image.size, image.getexif()[0x0112]) == (photo.size, 6)


def test_modes_and_sizes_that_cannot_be_are_refused(photo: Image.Image) -> None:
    with pytest.raises(clric.ImageError, match=r"the image: 32-bit samples .* convert"):
        encode_instantly(photo.convert("F"))
    with pytest.raises(clric.ImageError, match=r"the image: 30000 x 10000 exceeds the limit of \d+ pixels"):
        encode_instantly(Image.new("1", (30000, 10000)))
    with pytest.raises(clric.ClricError, match=r"the image is \(48, 64\) uint8; it must be \(height, width, 3\) uint8"):
        encode_instantly(np.asarray(photo.convert("L")))


def test_stream_is_bytes_or_a_path(make_stream: MakeStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_stream(space="clric")
    (tmp_path / "image.clric").write_bytes(data)
    (tmp_path / "-").write_bytes(data)  # a file of this name, and not standard input
    monkeypatch.chdir(tmp_path)
    image, latent = clric.decode(data), clric.decode_latent(data)
    assert (image.shape, latent.shape) == ((40, 48, 3), (8, 5, 6))
    for stream in (bytearray(data), memoryview(data), tmp_path / "image.clric", "image.clric", "-"):
        np.testing.assert_array_equal(clric.decode(stream), image)
        np.testing.assert_array_equal(clric.decode_latent(stream), latent)
        assert clric.read_header(stream) == clric.read_header(data)


def test_options_of_decoding(make_stream: MakeStream, toy_models: Path) -> None:
    data = make_stream()
    assert clric.decode(data, vae="toy", models=toy_models, provider="cpu").shape == (40, 48, 3)
    for function in (clric.decode, clric.decode_latent, clric.read_header):
        with pytest.raises(clric.StreamError, match="over the limit of 100"):
            function(data, max_pixels=100)
    with pytest.raises(clric.ModelError, match="the stream is of sd1"):
        clric.decode(data, vae="small")


def test_other_types_are_refused_by_name(photo: Image.Image) -> None:
    for image, name in ((b"\x89PNG", "bytes"), (None, "NoneType"), (io.BytesIO(), "BytesIO")):
        with pytest.raises(TypeError, match=f"an image must be an array, a Pillow image or a path, not {name}"):
            encode_instantly(image)
    for function in (clric.decode, clric.decode_latent, clric.read_header):
        with pytest.raises(TypeError, match="a stream must be bytes, a memoryview or a path, not ndarray"):
            function(np.zeros(8, np.uint8))
    for name, value, message in (
        ("size", "8kB", "size must be a number, not str"),
        ("vae", 5, "vae must be a name or a path, not int"),
        ("tune", None, "tune must be a name or a path, not NoneType"),
        ("models", 5, "models must be a path, not int"),
        ("preset", ["fast"], "preset must be a string, not list"),
        ("device", 0, "device must be a string, not int"),
        ("seed", "1", "seed must be an integer, not str"),
        ("metadata", [1], "metadata must be a dict, not list"),
    ):
        with pytest.raises(TypeError, match=message):
            clric.encode(photo, **{name: value})
    with pytest.raises(TypeError, match="metadata 'exif' must be bytes, not str"):
        clric.encode(np.asarray(photo), metadata={"exif": "text"})
    with pytest.raises(clric.ClricError, match="metadata 'foo' is not known; use icc_profile, exif, xmp"):
        clric.encode(np.asarray(photo), metadata={"foo": b""})
    for name, value, message in (
        ("vae", 5, "vae must be a name or a path, not int"),
        ("models", 5, "models must be a path, not int"),
        ("provider", None, "provider must be a string, not NoneType"),
        ("max_pixels", "x", "max_pixels must be an integer, not str"),
    ):
        with pytest.raises(TypeError, match=message):
            clric.decode(b"", **{name: value})
    with pytest.raises(TypeError, match="size must be an integer, not str"):
        clric.read_header(b"", size="1")


def test_an_autoencoder_by_path(photo: Image.Image) -> None:
    path = Path(clric_encoder.__file__).parent / "weights" / "small_encoder.onnx"
    assert clric.encode(photo, preset="instant", vae=path) == encode_instantly(photo)


def test_errors_name_the_file(make_stream: MakeStream, tmp_path: Path) -> None:
    path = tmp_path / "cut.clric"
    path.write_bytes(make_stream()[:-1])
    for function in (clric.decode, clric.decode_latent, clric.read_header):
        with pytest.raises(clric.StreamError) as caught:
            function(path)
        assert caught.value.kind == "checksum"
        assert str(caught.value).startswith(f"{path}: checksum mismatch")
        with pytest.raises(clric.ClricError, match=r"gone\.clric: No such file or directory"):
            function(tmp_path / "gone.clric")
    with pytest.raises(clric.ImageError, match=r"gone\.png: No such file or directory"):
        encode_instantly(tmp_path / "gone.png")


def python(code: str, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """A fresh process."""
    return subprocess.run([sys.executable, "-c", code, *arguments], check=False, capture_output=True, text=True)


def test_preset_instant_needs_no_torch_and_others_say_what_to_install(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.png")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import clric; sys.stdout.buffer.write(clric.encode(sys.argv[1], preset=sys.argv[2]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "photo.png", "instant"], check=True, capture_output=True
    )
    assert result.stdout == encode_instantly(photo)
    failed = python(code, tmp_path / "photo.png", "default")
    message = failed.stderr.splitlines()[-1]
    assert "ClricError: torch is not installed; run: pip install 'clric[encoder]'" in message
    assert "preset instant needs 'clric[cpu]' only" in message


def test_library_that_one_autoencoder_needs_is_named(photo: Image.Image, tmp_path: Path) -> None:
    """diffusers, for an AutoencoderKL."""
    photo.save(tmp_path / "photo.png")
    (tmp_path / "sd14").mkdir()
    (tmp_path / "sd14" / "config.json").write_text("{}")
    (tmp_path / "sd14" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "import clric; clric.encode(sys.argv[1] + '/photo.png', vae='sd14', models=sys.argv[1])"
    )
    message = python(code, tmp_path).stderr.splitlines()[-1]
    assert "ClricError: diffusers is not installed; run: pip install 'clric[vae]'" in message


def test_a_preset_that_is_not_known_is_said_with_all_that_are(photo: Image.Image) -> None:
    message = "preset 'nope' is not known; use one of instant, fast, default, slow, paper"
    with pytest.raises(clric.ClricError, match=message):
        clric.encode(photo, preset="nope")


def test_preset_instant_refuses_what_it_would_ignore(photo: Image.Image) -> None:
    with pytest.raises(
        clric.ClricError, match="preset instant trains nothing: tune='small' goes with the other presets"
    ):
        clric.encode(photo, preset="instant", tune="small")


# A process whose path has the decoder and not the encoder.
CLIENT = "import os, sys; sys.path = [p for p in sys.path if not os.path.isdir(os.path.join(p, 'clric_encoder'))]\n"


def test_client_without_the_encoder_decodes_and_says_how_to_encode(make_stream: MakeStream, tmp_path: Path) -> None:
    (tmp_path / "image.clric").write_bytes(make_stream(space="clric"))
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    assert python(CLIENT + "import clric; clric.decode(sys.argv[1])", tmp_path / "image.clric").returncode == 0
    for preset in ("instant", "default"):
        code = CLIENT + f"import clric; clric.encode(sys.argv[1], preset={preset!r})"
        failed = python(code, tmp_path / "image.png")
        message = "ClricError: encoding needs the package clric_encoder, which is not installed; run: pip install"
        assert message in failed.stderr.splitlines()[-1]
    command = CLIENT + "import runpy; sys.argv[1:] = ['enc', 'x.png']; runpy.run_module('clric', run_name='__main__')"
    failed = python(command)
    assert failed.returncode == 1
    assert failed.stderr.startswith("clric: encoding needs the package clric_encoder")
    assert failed.stderr.count("\n") == 1


def test_module_runs_the_commands(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.png")

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "clric", *arguments], check=False, capture_output=True, text=True, cwd=tmp_path
        )

    assert run("enc", "photo.png", "--preset", "instant", "-q").returncode == 0
    assert (tmp_path / "photo.clric").read_bytes() == encode_instantly(photo)
    assert run("dec", "photo.clric", "-o", "back.png").returncode == 0
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "back.png")), clric.decode(tmp_path / "photo.clric"))
    assert run("--version").stdout == f"clric {clric.__version__}\n"
    assert run().stdout.startswith("usage: python -m clric enc")
    unknown = run("decode", "photo.clric")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr.startswith("clric: unknown command 'decode' (use enc or dec)")
