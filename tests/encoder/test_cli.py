"""clric-enc as a user meets it: outputs, the live view, one-line errors, exit codes, no half-written file."""

import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from clric_decoder import ClricError, decode_latent, read_header
from clric_encoder import batch_encoder, cli
from clric_encoder.batch_encoder import Settings
from clric_encoder.rate import Rate
from clric_encoder.up_to_date import Records, made_of
from commands import LINUX, POSIX, assert_one_line, hear_interrupts, loaded_modules
from conftest import MakeStream, Run
from PIL import Image


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images this small gain nothing from a second thread, and other tests run beside these."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def write_photo(path: Path, height: int = 16, width: int = 24) -> Path:
    y, x = np.mgrid[:height, :width]
    Image.fromarray(np.stack([x * 9, y * 13, 255 - x * 5], -1).astype(np.uint8)).save(path)
    return path


def test_one_pixel_through_pipes(run: Run) -> None:
    photo = io.BytesIO()
    Image.new("RGB", (1, 1), "teal").save(photo, "png")
    result = run("clric-enc", "-", input=photo.getvalue())
    assert result.returncode == 0, result.stderr
    header = read_header(result.stdout)
    assert (header.width, header.height, header.space) == (1, 1, "clric")
    assert np.isfinite(decode_latent(result.stdout)).all()
    assert result.stderr.decode().startswith(f"stdin -> stdout: {len(result.stdout)} bytes, ")
    assert result.stderr.count(b"\n") == 1


def test_control_characters_in_names_do_not_reach_the_terminal(run: Run, tmp_path: Path) -> None:
    write_photo(tmp_path / "a\x1b[31m.png", 8, 8)
    (tmp_path / "b\nc.png").write_text("text")
    result = run("clric-enc", "a\x1b[31m.png", "b\nc.png", "--preset", "fast")
    lines = result.stderr.decode().splitlines()
    assert lines[0].startswith("a\\x1b[31m.png -> a\\x1b[31m.clric: ")
    assert lines[1:] == ["clric-enc: b\\x0ac.png: unsupported or unrecognised image format"]


def test_a_bad_image_stops_no_other_and_the_outputs_are_beside(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("just some text\n")
    write_photo(tmp_path / "photo.png")
    result = run("clric-enc", "text.png", "photo.png", "--json", "--quality", "20")
    assert_one_line(result, 1, "text.png: unsupported or unrec")
    names = sorted(entry.name for entry in tmp_path.iterdir())
    assert names == [".clric-settings.json", "photo.clric", "photo.png", "text.png"]
    facts = json.loads(result.stdout)
    data = (tmp_path / "photo.clric").read_bytes()
    assert (facts["file"], facts["output"]) == ("photo.png", "photo.clric")
    assert (facts["width"], facts["height"], facts["latent_space"]) == (24, 16, "clric")
    assert facts["bytes"] == len(data)
    assert facts["bpp"] == pytest.approx(8 * len(data) / (24 * 16))
    assert facts["lambda"] == pytest.approx(0.5 * 10**0.75)
    assert 0 <= facts["latent_mse"] < 10
    assert decode_latent(data).shape == (8, 2, 3)


@pytest.mark.parametrize("text", [b"bpp, latent MSE", b"compiling (once on this machine)"])
@POSIX
def test_control_c_ends_the_live_view_quietly_and_leaves_no_file(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, text: bytes
) -> None:
    import pty

    photo = write_photo(tmp_path / "photo\a.png", 64, 64)
    terminal, side = pty.openpty()
    command = Path(sys.executable).with_name("clric-enc")
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "150"}
    if b"compiling" in text:  # as on a machine where nothing has been compiled
        environment["NUMBA_CACHE_DIR"] = str(tmp_path_factory.mktemp("numba"))
    process = subprocess.Popen(
        [command, photo], stdin=side, stdout=side, stderr=side, env=environment, preexec_fn=hear_interrupts
    )
    os.close(side)
    seen = b""
    deadline = time.monotonic() + 120
    while text not in seen:
        assert time.monotonic() < deadline, seen
        seen += os.read(terminal, 4096)
    process.send_signal(signal.SIGINT)
    try:
        while rest := os.read(terminal, 4096):
            seen += rest
    except OSError:  # Linux: the other side is closed
        pass
    os.close(terminal)
    assert process.wait(timeout=60) == 130
    assert b"photo\\x07.png" in seen
    assert b"\a" not in seen
    assert b"Traceback" not in seen
    assert [entry.name for entry in tmp_path.iterdir()] == [photo.name]


def write_folder(folder: Path) -> None:
    """Images of two sizes, one that is none, and another file."""
    folder.mkdir()
    for number in range(3):
        write_photo(folder / f"{number}.png", 16 + 8 * (number == 1))
    (folder / "bad.png").write_text("text")
    (folder / "notes.txt").write_text("no image by its suffix")


def test_images_of_one_size_are_trained_together_and_the_error_is_last(run: Run, tmp_path: Path) -> None:
    write_folder(tmp_path / "in")
    result = run("clric-enc", "in", "-o", "out", "--preset", "fast")
    lines = result.stderr.decode().splitlines()
    assert result.returncode == 1
    assert lines[-1].startswith("clric-enc: in/bad.png: unsupported or unrec")
    assert [line.split(" -> ")[0] for line in lines[:-1]] == ["in/0.png", "in/2.png", "in/1.png"]
    streams = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.clric")}
    assert sorted(streams) == ["0.clric", "1.clric", "2.clric"]
    assert read_header(streams["1.clric"]).height == 24


def test_a_folder_is_encoded_once_and_what_has_changed_again(run: Run, tmp_path: Path) -> None:
    write_folder(tmp_path / "in")
    arguments = ["in", "-o", "out", "--preset", "instant"]

    def encoded(*options: str) -> list[str]:
        result = run("clric-enc", *arguments, *options, "--json")
        lines = result.stderr.decode().splitlines()
        names = [json.loads(line)["file"] for line in result.stdout.splitlines()]
        assert (result.returncode, len(lines)) == (1, 2 if len(names) < 3 else 1)
        if len(names) < 3:
            files = "1 up-to-date file" if len(names) == 2 else f"{3 - len(names)} up-to-date files"
            assert lines[0] == f"clric-enc: skipped {files}; --force re-encodes"
        return names

    assert encoded() == ["in/0.png", "in/1.png", "in/2.png"]
    size = (tmp_path / "out/0.clric").stat().st_size
    assert encoded() == encoded("--quality", "75") == encoded("--lambda", str(0.5 * 10 ** (-25 / 40))) == []
    earlier = time.time() - 1000
    os.utime(tmp_path / "in/2.png", (earlier, earlier))  # another image, older than the stream
    assert encoded() == ["in/2.png"]
    assert len(encoded("--lambda", "9")) == 3
    assert (tmp_path / "out/0.clric").stat().st_size < size
    assert encoded("--lambda", "9") == []
    assert len(encoded("--lambda", "3", "--force")) == 3
    assert encoded("--lambda", "3") == []

    (tmp_path / "out/0.clric").write_bytes(b"the only copy")
    result = run("clric-enc", *arguments)
    lines = result.stderr.decode().splitlines()
    assert lines[-2] == (
        "clric-enc: in/0.png: out/0.clric exists; overwrite it with --force, or name the output with -o"
    )
    assert (tmp_path / "out/0.clric").read_bytes() == b"the only copy"
    (tmp_path / "out/1.clric").write_bytes(b"the only copy")
    result = run("clric-enc", *arguments)
    lines = result.stderr.decode().splitlines()
    assert (result.returncode, lines[-2]) == (
        1,
        "clric-enc: 2 outputs exist; overwrite them with --force, or choose a folder with -o",
    )


def test_images_of_one_name_fail_and_the_others_are_encoded(run: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.jpg", "b.png"):
        write_photo(tmp_path / "in" / name)
    result = run("clric-enc", "in", "in/a.png", "-q", "--preset", "instant")
    assert (result.returncode, result.stderr.decode().splitlines()) == (
        1,
        [
            f"clric-enc: in/{one}: in/{other} would be written to in/b.clric too; name its output with -o"
            for one, other in (("b.jpg", "b.png"), ("b.png", "b.jpg"))
        ],
    )
    assert [path.name for path in (tmp_path / "in").glob("*.clric")] == ["a.clric"]


def test_records_of_commands_that_write_to_one_folder_at_once_are_all_kept(tmp_path: Path) -> None:
    photos = [write_photo(tmp_path / f"{number}.png") for number in range(4)]
    both = [Records({}, create=True) for _ in range(2)]
    for number, photo in enumerate(photos):
        records = both[number % 2]
        place = str(tmp_path / f"{number}.clric")
        assert records.state(str(photo), place) == "new"
        Path(place).write_bytes(b"a stream")
        records.add(place, b"a stream")
    for records in both:
        records.write()
    later = Records({}, create=False)
    assert [later.state(str(photo), str(photo.with_suffix(".clric"))) for photo in photos] == ["up to date"] * 4


def test_a_size_that_is_too_small_is_told_even_when_quiet(run: Run, tmp_path: Path) -> None:
    write_photo(tmp_path / "photo.png")
    for size, told in (("10", "target of 10 bytes not reached: the minimum size is"), ("100kB", "")):
        result = run("clric-enc", "photo.png", "-q", "--force", "--preset", "instant", "--bytes", size)
        assert (result.returncode, told in result.stderr.decode(), bool(result.stderr)) == (0, True, bool(told))


def test_streams_are_out_of_date_when_a_file_that_an_option_names_or_clric_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "decoder.onnx"
    settings = Settings(Rate(1.0), tune=str(file))
    digests = [settings.of_streams()]  # a file that is missing is said when it is used
    for content in (b"one", b"two"):
        file.write_bytes(content)
        digests.append(settings.of_streams())
    monkeypatch.setattr(batch_encoder, "version", lambda name: "0.9")
    digests.append(settings.of_streams())
    assert len({made_of(digest, "") for digest in digests}) == 4


def test_a_name_that_nobody_gave_replaces_no_file(run: Run, tmp_path: Path) -> None:
    write_photo(tmp_path / "photo.png")
    stream = tmp_path / "photo.clric"
    stream.write_bytes(b"the only copy")
    quick = ["photo.png", "--preset", "instant"]
    assert_one_line(run("clric-enc", *quick), 1, "photo.png: photo.clric exists; overwrite it with --force")
    assert stream.read_bytes() == b"the only copy"
    for options in (["--force"], ["-o", "photo.clric"], ["--force", "--quality", "20"]):
        assert run("clric-enc", *quick, *options).returncode == 0
        assert read_header(stream.read_bytes()).height == 16
    assert sorted(os.listdir(tmp_path)) == ["photo.clric", "photo.png"]


def test_a_stream_replaces_nothing_of_another_suffix(run: Run, tmp_path: Path) -> None:
    photo = write_photo(tmp_path / "photo.png")
    keep = write_photo(tmp_path / "keep.png")
    before = keep.read_bytes()
    quick = ["photo.png", "--preset", "instant"]
    assert_one_line(
        run("clric-enc", *quick, "-o", "keep.png"), 2, "keep.png: the output does not end in .clric", "--force"
    )
    assert keep.read_bytes() == before
    assert_one_line(run("clric-enc", *quick, "-o", "photo.png", "--force"), 2, "is also an input")
    assert photo.read_bytes() == before
    assert run("clric-enc", *quick, "-o", "keep.png", "--force").returncode == 0
    assert read_header(keep.read_bytes()).width == 24


def test_input_and_output_as_other_codecs_have_them(run: Run, tmp_path: Path) -> None:
    write_photo(tmp_path / "photo.png")
    write_photo(tmp_path / "other.png")
    sizes = []
    for quality in ("20", "90"):
        result = run("clric-enc", "photo.png", "x.clric", "--preset", "instant", "--quality", quality)
        assert (result.returncode, result.stderr[:22]) == (0, b"photo.png -> x.clric: ")
        sizes.append((tmp_path / "x.clric").stat().st_size)
    assert sizes[0] < sizes[1]
    assert run("clric-dec", "x.clric", "back.webp").returncode == 0
    assert Image.open(tmp_path / "back.webp").size == (24, 16)
    # Two images are two inputs.
    assert run("clric-enc", "photo.png", "other.png", "-q", "--preset", "instant").returncode == 0
    assert {"photo.clric", "other.clric"} < set(os.listdir(tmp_path))


def test_an_output_of_a_wrong_form_writes_nothing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("photo.png", "other.png", "in/third.png"):
        write_photo(tmp_path / name)
    quick = ["--preset", "instant"]
    for name in ("q.png", "new.jxl", "out"):
        result = run("clric-enc", "photo.png", name, *quick)
        assert_one_line(result, 2, f"{name}: no such file; an output must end in .clric (or name it with -o)")
    result = run("clric-enc", "photo.png", "other.png", "one.clric", *quick)
    assert_one_line(result, 2, "several inputs need an output folder: -o DIR")
    for inputs in (["in"], ["photo.png", "other.png", "-o"]):
        result = run("clric-enc", *inputs, "one.clric", *quick)
        assert_one_line(result, 2, "several inputs need an output folder: -o DIR, or one.clric/ for a folder")
    assert_one_line(run("clric-enc", "x.clric", *quick), 2, "x.clric: not an image file")
    assert sorted(os.listdir(tmp_path)) == ["in", "other.png", "photo.png"]
    for _ in range(2):  # a folder that is there already is the output too
        assert run("clric-enc", "photo.png", "out/", *quick).returncode == 0
    (tmp_path / "empty").mkdir()
    assert run("clric-enc", "photo.png", "empty", *quick).returncode == 0
    result = run("clric-enc", "photo.png", "in/", *quick)  # but one of images may be meant as an input
    assert_one_line(result, 2, "in/ contains inputs too; name it with -o in/ to write there")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.clric")) == [
        "empty/photo.clric",
        "out/photo.clric",
    ]
    assert run("clric-enc", "in", "one.clric/", *quick).returncode == 0
    assert (tmp_path / "one.clric/third.clric").is_file()


@pytest.mark.parametrize(
    ("text", "size"),
    [("5000", 5000), ("8kB", 8000), ("8KiB", 8192), ("8 kib", 8192), ("1.5MB", 1_500_000), ("2Mi", 2 << 20)],
)
def test_sizes_in_all_common_units(text: str, size: int) -> None:
    assert cli._Bytes().convert(text, None, None) == size


def test_verbose_says_how_long_each_stage_took(run: Run, tmp_path: Path) -> None:
    write_photo(tmp_path / "photo.png")
    lines = run("clric-enc", "photo.png", "--preset", "fast", "-v").stderr.decode().splitlines()
    stages = "autoencoder", r"training 1/1", "quantising networks", "tuning"
    assert re.fullmatch("clric-enc: " + ".*".join(f"{stage} [0-9.]+ s" for stage in stages), lines[1])
    lines = run("clric-enc", "photo.png", "--preset", "instant", "-v", "-f").stderr.decode().splitlines()
    assert re.fullmatch("clric-enc: encoding [0-9.]+ s", lines[1])
    assert_one_line(run("clric-enc", "photo.png", "-v", "-q"), 2, "mutually exclusive")


def test_a_size_that_is_asked_for(run: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = np.kron(rng.integers(0, 256, (20, 24, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    result = run("clric-enc", "photo.png", "--bytes", "0.7kB", "--preset", "fast", "--json")
    assert (result.returncode, result.stderr) == (0, b"")
    assert 0.97 * 700 <= json.loads(result.stdout)["bytes"] <= 700
    assert (tmp_path / "photo.clric").stat().st_size == json.loads(result.stdout)["bytes"]
    for target, words in (("10", "target of 10 bytes not reached: the minimum"), ("1MB", "quality saturates at")):
        result = run("clric-enc", "photo.png", "--bytes", target, "--preset", "fast", "--json", "-f")
        assert_one_line(result, 0, "photo.png: ", words)
        assert json.loads(result.stdout)["bytes"] > 10


def test_help_does_not_load_torch(run: Run) -> None:
    loaded = loaded_modules(run, "clric-enc", "--help")
    assert "clric_encoder" in loaded
    assert not {"torch", "diffusers", "rich", "PIL"} & loaded


def test_what_is_said_of_an_image_that_decoders_refuse_by_default(make_stream: MakeStream) -> None:
    """They need --max-pixels for it; the encoder takes more."""
    from clric_encoder.cli import _facts
    from clric_encoder.stream import Encoded

    data = make_stream(width=9600, height=9600, random=False)
    with pytest.raises(ClricError, match="max_pixels"):
        read_header(data)
    facts = _facts("photo.png", "photo.clric", Encoded(data, 1.0, 0.1, None))
    assert (facts["width"], facts["bytes"]) == (9600, len(data))


def bad_images(folder: Path) -> dict[str, str]:
    """Bad inputs by name, each with what must be said of it."""
    whole = write_photo(folder / "whole.png", 64, 64).read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("just some text\n")
    (folder / "empty.jpg").write_bytes(b"")
    Image.new("1", (70000, 1)).save(folder / "wide.png")
    # Pillow by itself warns of the first, and refuses the second.
    for name, width in (("large.png", 10_000), ("larger.png", 20_000)):
        header = b"IHDR" + struct.pack(">IIBBBBB", width, 10_000, 1, 0, 0, 0, 0)
        (folder / name).write_bytes(whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT")
    return {
        "large.png": "truncated",
        "larger.png": "truncated",
        "cut.png": "truncated",
        "text.png": "unsupported or unrecognised image format",
        "empty.jpg": "unsupported or unrecognised image format",
        "wide.png": "70000",
        "missing.png": "No such file or directory",
    }


def test_bad_images(run: Run, tmp_path: Path) -> None:
    for name, reason in bad_images(tmp_path).items():
        assert_one_line(run("clric-enc", name), 1, f"clric-enc: {name}: ", reason)
    (tmp_path / "folder.png").mkdir()
    assert_one_line(run("clric-enc", "folder.png"), 1, "folder.png: no image files found")
    assert not list(tmp_path.rglob("*.clric*"))
    assert_one_line(
        run("clric-enc", "-", "-o", "x.clric", input=b"text"), 1, "-: unsupported or unrecognised image format"
    )


def test_bad_command_lines(run: Run, tmp_path: Path) -> None:
    photo = write_photo(tmp_path / "photo.png")
    before = photo.read_bytes()
    assert_one_line(run("clric-enc"), 2, "IN...")
    assert_one_line(run("clric-enc", photo.name, "--quality", "101"), 2, "--quality", "101")
    exclusive = "--lambda, --quality, --bytes and --bpp are mutually exclusive"
    assert_one_line(run("clric-enc", photo.name, "--quality", "5", "--lambda", "1"), 2, exclusive)
    assert_one_line(run("clric-enc", photo.name, "--bpp", "1", "--bytes", "9"), 2, exclusive)
    for value in ("0", "-1", "nan", "101"):
        assert_one_line(run("clric-enc", photo.name, "--bpp", value), 2, "--bpp must be above 0 and at most 100")
    for value in ("0", "-5", "8kb8", "many"):
        assert_one_line(run("clric-enc", photo.name, "--bytes", value), 2, "--bytes", value)
    assert_one_line(run("clric-enc", photo.name, "--bytes", "5GB"), 2, "5GB is out of range", "1 byte and 1000MB")
    for value in ("0", "-1", "nan", "1e7"):
        assert_one_line(run("clric-enc", photo.name, "--lambda", value), 2, "--lambda must be between 1e-6 and 1e6")
    assert_one_line(run("clric-enc", photo.name, "--seed", "9" * 20), 2, "--seed", "4294967295")
    assert_one_line(run("clric-enc", photo.name, "--preset", "nonsense"), 2, "nonsense", "default", "paper")
    assert_one_line(run("clric-enc", photo.name, "--device", "tpu"), 2, "tpu", "cuda")
    assert_one_line(run("clric-enc", photo.name, "--models", "nowhere"), 1, "nowhere: no such folder (--models)")
    result = run("clric-enc", photo.name, "--tune", "none", "--lpips", "x.npz")
    assert_one_line(result, 2, "--lpips cannot be used with --tune none")
    result = run("clric-enc", photo.name, "--preset", "instant", "--device", "cuda")
    assert_one_line(result, 2, "cannot be used with --preset instant")
    for place in ("photo.png", "./photo.png"):
        assert_one_line(run("clric-enc", photo.name, "-o", place, "--force"), 2, "is also an input")
    assert_one_line(run("clric-enc", photo.name, "-o", "-", "--json"), 2, "standard output")
    assert photo.read_bytes() == before
    assert not list(tmp_path.rglob("*.clric*"))


def test_missing_weights_and_unknown_autoencoder(run: Run, tmp_path: Path) -> None:
    write_photo(tmp_path / "photo.png")
    assert_one_line(run("clric-enc", "photo.png", "--vae", "taesd"), 1, "photo.png: ", "taesd_encoder.safetensors")
    assert_one_line(run("clric-enc", "photo.png", "--vae", "nonsense"), 1, "photo.png: ", "nonsense")
    assert_one_line(run("clric-enc", "photo.png", "--models", "gone"), 1, "gone: no such folder (--models)")
    assert_one_line(run("clric-enc", "photo.png", "--tune", "nonsense"), 1, "image decoder 'nonsense' is not known")
    instant = run("clric-enc", "photo.png", "--preset", "instant", "--vae", "lite")
    assert_one_line(instant, 1, "preset instant needs the autoencoder small or an .onnx encoder (--vae)")


def test_outputs_that_cannot_be_written_are_said_before_the_training(run: Run, tmp_path: Path) -> None:
    write_photo(tmp_path / "photo.png")
    result = run("clric-enc", "photo.png", "-o", "gone/x.clric", timeout=20)
    assert_one_line(result, 1, "gone/x.clric: the output folder does not exist")
    result = run("clric-enc", "photo.png", "-o", "photo.png/x.clric", timeout=20)
    assert_one_line(result, 1, "photo.png/x.clric: cannot be written (Not a directory)")


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("raise OSError('libtorch.so: wrong ELF class')", "cannot be loaded (libtorch.so: wrong ELF class)"),
        ("def find_device(*a): raise RuntimeError('CUDA out of memory.\\nTried')", "not enough memory"),
        ("def find_device(*a): raise RuntimeError('CUDA error:\\nlaunch')", "torch failed (CUDA error: launch)"),
    ],
)
def test_torch_that_fails_is_one_line_for_each_image(tmp_path: Path, module: str, reason: str) -> None:
    """The encoding module is replaced by one that fails as torch does."""
    code = (
        "import sys, clric_encoder, importlib.util\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'clric_encoder.encoding':\n"
        "            return importlib.util.spec_from_file_location(name, 'failing.py')\n"
        "sys.meta_path.insert(0, Finder())\n"
        "sys.argv[0] = 'clric-enc'\n"
        "from clric_encoder.cli import main; main()"
    )
    (tmp_path / "failing.py").write_text(module)
    names = [write_photo(tmp_path / f"{name}.png").name for name in "ab"]
    result = subprocess.run([sys.executable, "-c", code, *names], cwd=tmp_path, capture_output=True, check=False)
    lines = result.stderr.decode().splitlines()
    assert result.returncode == 1
    assert [line[:18] for line in lines] == ["clric-enc: a.png: ", "clric-enc: b.png: "]
    assert all(reason in line for line in lines)


def test_a_library_that_is_missing_is_one_line(tmp_path: Path) -> None:
    """diffusers, which only the encoders of Stable Diffusion's kind need."""
    code = (
        "import sys; sys.modules['diffusers'] = None; sys.argv[0] = 'clric-enc'\n"
        "from clric_encoder.cli import main; main()"
    )
    write_photo(tmp_path / "photo.png")
    folder = tmp_path / "sd14"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    command = [sys.executable, "-c", code, "photo.png", "--vae", "sd14", "--models", str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert result.stderr.decode() == (
        "clric-enc: photo.png: diffusers is not installed; run: pip install 'clric[vae]'\n"
    )
    assert result.returncode == 1


def test_ray_that_is_missing_is_one_line(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['ray'] = None; sys.argv[0] = 'clric-enc'\nfrom clric_encoder.cli import main; main()"
    )
    write_photo(tmp_path / "photo.png")
    command = [sys.executable, "-c", code, "photo.png", "-o", "out", "--ray"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert result.stderr.decode() == "clric-enc: ray is not installed; run: pip install 'clric[ray]'\n"
    assert result.returncode == 1


@LINUX
def test_full_disk(run: Run, tmp_path: Path) -> None:
    write_photo(tmp_path / "photo.png", 8, 8)
    result = run("clric-enc", "photo.png", "-o", "/dev/full")
    assert_one_line(result, 1, "photo.png: /dev/full: cannot be written (No space left on device)")


def test_transparency_is_warned_of(run: Run, tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (10, 20, 30, 40)).save(tmp_path / "clear.png")
    lines = run("clric-enc", "clear.png").stderr.decode().splitlines()
    assert lines[0] == "clric-enc: clear.png: transparency is flattened on white"
