"""clric-enc as a user meets it: outputs, the live view, one-line errors, exit codes, no half-written file."""

import io
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from clric_decoder import decode_latent, read_header
from commands import assert_one_line
from PIL import Image

Run = Callable[..., "subprocess.CompletedProcess[bytes]"]


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
    assert result.stderr.decode().startswith(f"- -> -: {len(result.stdout)} bytes, ")
    assert result.stderr.count(b"\n") == 1


def test_control_characters_in_names_do_not_reach_the_terminal(run: Run, tmp_path: Path) -> None:
    write_photo(tmp_path / "a\x1b[31m.png", 8, 8)
    result = run("clric-enc", "a\x1b[31m.png", "b\nc.png", "--preset", "fast")
    lines = result.stderr.decode().splitlines()
    assert lines[0].startswith("a\\x1b[31m.png -> a\\x1b[31m.clric: ")
    assert lines[1:] == ["clric-enc: b\\x0ac.png: No such file or directory"]


def test_a_bad_image_stops_no_other_and_the_outputs_are_beside(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("just some text\n")
    write_photo(tmp_path / "photo.png")
    result = run("clric-enc", "text.png", "photo.png", "--json", "--quality", "20")
    assert_one_line(result, 1, "text.png: not an image")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["photo.clric", "photo.png", "text.png"]
    facts = json.loads(result.stdout)
    data = (tmp_path / "photo.clric").read_bytes()
    assert (facts["file"], facts["output"]) == ("photo.png", "photo.clric")
    assert (facts["width"], facts["height"], facts["latent_space"]) == (24, 16, "clric")
    assert facts["bytes"] == len(data)
    assert facts["bpp"] == pytest.approx(8 * len(data) / (24 * 16))
    assert facts["lambda"] == pytest.approx(0.5 * 10**0.75)
    assert 0 <= facts["latent_mse"] < 1
    assert decode_latent(data).shape == (8, 2, 3)


def hear_interrupts() -> None:
    """In a child: a shell's background jobs, and what they start, would ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_control_c_ends_the_live_view_quietly_and_leaves_no_file(tmp_path: Path) -> None:
    photo = write_photo(tmp_path / "photo\a.png", 64, 64)
    terminal, side = pty.openpty()
    command = Path(sys.executable).with_name("clric-enc")
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "150"}
    process = subprocess.Popen(
        [command, photo], stdin=side, stdout=side, stderr=side, env=environment, preexec_fn=hear_interrupts
    )
    os.close(side)
    seen = b""
    deadline = time.monotonic() + 120
    while b"bpp, latent MSE" not in seen:
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


def test_a_folder_is_encoded_once_and_what_is_new_again(run: Run, tmp_path: Path) -> None:
    """Images of two sizes and one that is none: streams of their own, the error last; then nothing is left to do."""
    for number in range(3):
        write_photo(tmp_path / f"{number}.png", 16 + 8 * (number == 1))
    (tmp_path / "bad.png").write_text("text")
    names = ["0.png", "bad.png", "1.png", "2.png"]
    result = run("clric-enc", *names, "-o", "out/", "--preset", "fast")
    lines = result.stderr.decode().splitlines()
    assert result.returncode == 1
    assert lines[-1].startswith("clric-enc: bad.png: not an image")
    assert [line.split(" -> ")[0] for line in lines[:-1]] == ["0.png", "2.png", "1.png"]
    streams = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert sorted(streams) == ["0.clric", "1.clric", "2.clric"]
    assert read_header(streams["1.clric"]).height == 24

    later = time.time() + 10
    os.utime(tmp_path / "2.png", (later, later))
    result = run("clric-enc", *names, "-o", "out/", "--preset", "fast", "--json", "--lambda", "9")
    assert result.stderr.decode().splitlines()[0] == (
        "clric-enc: left as they are: 2, newer than their images; --force encodes all"
    )
    assert [json.loads(line)["file"] for line in result.stdout.splitlines()] == ["2.png"]
    assert (tmp_path / "out/0.clric").read_bytes() == streams["0.clric"]
    result = run("clric-enc", "0.png", "1.png", "-o", "out/", "--preset", "fast", "--force", "-q", "--lambda", "9")
    assert (result.returncode, result.stderr) == (0, b"")
    assert len((tmp_path / "out/0.clric").read_bytes()) < len(streams["0.clric"])


def test_a_size_that_is_asked_for(run: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = np.kron(rng.integers(0, 256, (20, 24, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    result = run("clric-enc", "photo.png", "--bytes", "0.7kB", "--preset", "fast", "--json")
    assert (result.returncode, result.stderr) == (0, b"")
    assert 0.97 * 700 <= json.loads(result.stdout)["bytes"] <= 700
    assert (tmp_path / "photo.clric").stat().st_size == json.loads(result.stdout)["bytes"]
    for target, words in (("10", "no stream of 10 bytes"), ("1MB", "no use was found")):
        result = run("clric-enc", "photo.png", "--bytes", target, "--preset", "fast", "--json")
        assert_one_line(result, 0, "photo.png: ", words)
        assert json.loads(result.stdout)["bytes"] > 10


def test_help_does_not_load_torch(tmp_path: Path) -> None:
    code = (
        "import atexit, sys; sys.argv = ['clric-enc', '--help']\n"
        "atexit.register(lambda: print(sorted({'torch', 'diffusers', 'rich', 'PIL'} & set(sys.modules))))\n"
        "from clric_encoder.cli import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert result.stdout.endswith(b"[]\n")


def bad_images(folder: Path) -> dict[str, str]:
    """Bad inputs by name, each with what must be said of it."""
    whole = write_photo(folder / "whole.png", 64, 64).read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("just some text\n")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "folder.png").mkdir()
    Image.new("1", (70000, 1)).save(folder / "wide.png")
    # Pillow by itself warns of the first, and refuses the second.
    for name, width in (("large.png", 10_000), ("larger.png", 20_000)):
        header = b"IHDR" + struct.pack(">IIBBBBB", width, 10_000, 1, 0, 0, 0, 0)
        (folder / name).write_bytes(whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT")
    return {
        "large.png": "truncated",
        "larger.png": "truncated",
        "cut.png": "truncated",
        "text.png": "not an image",
        "empty.jpg": "not an image",
        "folder.png": "directory",
        "wide.png": "70000",
        "missing.png": "No such file or directory",
    }


def test_bad_images(run: Run, tmp_path: Path) -> None:
    for name, reason in bad_images(tmp_path).items():
        assert_one_line(run("clric-enc", name), 1, f"clric-enc: {name}: ", reason)
    assert not list(tmp_path.rglob("*.clric*"))
    assert_one_line(run("clric-enc", "-", "-o", "x.clric", input=b"text"), 1, "-: not an image")


def test_bad_command_lines(run: Run, tmp_path: Path) -> None:
    photo = write_photo(tmp_path / "photo.png")
    before = photo.read_bytes()
    assert_one_line(run("clric-enc"), 2, "IMAGE...")
    assert_one_line(run("clric-enc", photo.name, "--quality", "101"), 2, "--quality", "101")
    assert_one_line(run("clric-enc", photo.name, "--quality", "5", "--lambda", "1"), 2, "give one of them")
    assert_one_line(run("clric-enc", photo.name, "--bpp", "1", "--bytes", "9"), 2, "give one of them")
    for value in ("0", "-1", "nan", "101"):
        assert_one_line(run("clric-enc", photo.name, "--bpp", value), 2, "bpp cannot be", "at most 100")
    for value in ("0", "-5", "8kb8", "many"):
        assert_one_line(run("clric-enc", photo.name, "--bytes", value), 2, "--bytes", value)
    for value in ("0", "-1", "nan", "1e7"):
        assert_one_line(run("clric-enc", photo.name, "--lambda", value), 2, "within 1e-06 to 1e+06")
    assert_one_line(run("clric-enc", photo.name, "--seed", "9" * 20), 2, "--seed", "4294967295")
    assert_one_line(run("clric-enc", photo.name, "--preset", "nonsense"), 2, "nonsense", "default", "paper")
    assert_one_line(run("clric-enc", photo.name, "--device", "tpu"), 2, "tpu", "cuda")
    assert_one_line(run("clric-enc", photo.name, "-o", "photo.png"), 2, "is an input")
    assert_one_line(run("clric-enc", photo.name, "-o", "./photo.png"), 2, "is an input")
    assert_one_line(run("clric-enc", photo.name, "-o", "-", "--json"), 2, "standard output")
    write_photo(tmp_path / "photo.jpg")
    assert_one_line(run("clric-enc", "photo.png", "photo.jpg"), 2, "photo.clric", "output of photo.png already")
    assert photo.read_bytes() == before
    assert not list(tmp_path.rglob("*.clric*"))


def test_missing_weights_and_unknown_autoencoder(run: Run, tmp_path: Path) -> None:
    write_photo(tmp_path / "photo.png")
    assert_one_line(run("clric-enc", "photo.png", "--vae", "taesd"), 1, "photo.png: ", "taesd_encoder.safetensors")
    assert_one_line(run("clric-enc", "photo.png", "--vae", "nonsense"), 1, "photo.png: ", "nonsense")
    assert_one_line(run("clric-enc", "photo.png", "--models", "gone"), 1, "gone")


def test_outputs_that_cannot_be_written_are_said_before_the_training(run: Run, tmp_path: Path) -> None:
    write_photo(tmp_path / "photo.png")
    result = run("clric-enc", "photo.png", "-o", "gone/x.clric", timeout=20)
    assert_one_line(result, 1, "gone/x.clric: cannot be written (No such file or directory)")
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


def test_full_disk(run: Run, tmp_path: Path) -> None:
    write_photo(tmp_path / "photo.png", 8, 8)
    result = run("clric-enc", "photo.png", "-o", "/dev/full")
    assert_one_line(result, 1, "photo.png: /dev/full: cannot be written (No space left on device)")


def test_transparency_is_warned_of(run: Run, tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (10, 20, 30, 40)).save(tmp_path / "clear.png")
    lines = run("clric-enc", "clear.png").stderr.decode().splitlines()
    assert lines[0] == "clric-enc: clear.png: transparency is flattened on white"
