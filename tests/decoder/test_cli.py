"""clric-dec as a user meets it: outputs, one-line errors, exit codes, and no half-written file."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from clric_decoder import decode, decode_latent, read_header
from clric_decoder.networks import count_parameters, mac_per_pixel
from commands import IS_ROOT, LINUX, POSIX, assert_one_line, hear_interrupts, loaded_modules
from PIL import Image

Run = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture(scope="module")
def stream(make_stream: Callable[..., bytes]) -> bytes:
    return make_stream(width=45, height=33)


@pytest.fixture
def file(tmp_path: Path, stream: bytes) -> Path:
    path = tmp_path / "photo.clric"
    path.write_bytes(stream)
    return path


@pytest.fixture
def toy(toy_models: Path) -> list[str]:
    """Options that name the toy decoder."""
    return ["--vae", "toy", "--models", str(toy_models)]


def test_decoding_leaves_nothing_in_the_cache(run: Run, tmp_path: Path, file: Path, toy: list[str]) -> None:
    """onnxruntime's telemetry would put a device's identifier there, and send it away."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    assert run("clric-dec", file.name, *toy, env=environment).returncode == 0
    assert not (tmp_path / "cache").exists()


def pixels(source: Path | bytes) -> np.ndarray:
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return np.asarray(image)


def test_image_beside_the_stream(run: Run, file: Path, stream: bytes, toy: list[str], toy_models: Path) -> None:
    result = run("clric-dec", file.name, *toy)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    image = pixels(file.with_suffix(".png"))
    np.testing.assert_array_equal(image, decode(stream, vae="toy", models=toy_models))
    assert sorted(entry.name for entry in file.parent.iterdir()) == ["photo.clric", "photo.png"]


def test_a_name_that_nobody_gave_replaces_no_file(run: Run, file: Path, toy: list[str]) -> None:
    original = file.with_suffix(".png")
    original.write_bytes(b"the only copy")
    exists = "photo.png exists; overwrite it with --force, or name the output with -o"
    assert_one_line(run("clric-dec", file.name, *toy), 1, exists)
    assert_one_line(run("clric-dec", file.name, "-o", ".", *toy), 1, exists)
    assert original.read_bytes() == b"the only copy"
    for options in (["-o", "photo.png"], ["--force"], ["-o", ".", "--force"]):
        original.write_bytes(b"another")
        assert run("clric-dec", file.name, *options, *toy).returncode == 0
        assert pixels(original).shape == (33, 45, 3)


def test_a_folder_of_streams(run: Run, tmp_path: Path, file: Path, stream: bytes, toy: list[str]) -> None:
    (tmp_path / "in").mkdir()
    for name in ("b.clric", "a.clric", "c.txt"):
        (tmp_path / "in" / name).write_bytes(stream)
    lines = run("clric-dec", "--json", "in", file.name).stdout.splitlines()
    assert [json.loads(line)["file"] for line in lines] == ["in/a.clric", "in/b.clric", "photo.clric"]
    assert run("clric-dec", "in", "-o", "out", *toy).returncode == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["a.png", "b.png"]
    assert_one_line(run("clric-dec", "in", "out/", *toy), 1, "2 outputs exist; overwrite them with --force")
    assert run("clric-dec", "in", "out/", "--force", *toy).returncode == 0
    (tmp_path / "one").mkdir()
    (tmp_path / "one/d.clric").write_bytes(stream)
    assert run("clric-dec", "one", "-o", "more", *toy).returncode == 0
    assert os.listdir(tmp_path / "more") == ["d.png"]


def test_a_latent_replaces_nothing_of_another_suffix(run: Run, tmp_path: Path, file: Path) -> None:
    (tmp_path / "keep.png").write_bytes(b"the only copy")
    result = run("clric-dec", file.name, "--latent", "keep.png")
    assert_one_line(result, 2, "keep.png: the output does not end in .npy", "--force")
    assert (tmp_path / "keep.png").read_bytes() == b"the only copy"
    assert run("clric-dec", file.name, "--latent", "keep.png", "--force").returncode == 0
    assert np.load(tmp_path / "keep.png").shape == (4, 5, 6)


def test_pipes(run: Run, stream: bytes, toy: list[str], toy_models: Path) -> None:
    result = run("clric-dec", "-", *toy, input=stream)
    assert (result.returncode, result.stderr) == (0, b"")
    np.testing.assert_array_equal(pixels(result.stdout), decode(stream, vae="toy", models=toy_models))


def test_a_stream_that_another_decoder_shows_is_said(
    run: Run, file: Path, make_stream: Callable[..., bytes], toy: list[str]
) -> None:
    file.write_bytes(make_stream(45, 33, image_decoder=2))
    result = run("clric-dec", file.name, *toy)
    assert (result.returncode, file.with_suffix(".png").exists()) == (0, True)
    assert result.stderr == (
        b"clric-dec: photo.clric: note: the stream was tuned for image decoder lite, decoding with toy\n"
    )
    file.with_suffix(".png").unlink()
    result = run("clric-dec", file.name)  # lite, which comes with clric
    assert (result.returncode, result.stderr) == (0, b"")


def test_other_weights_by_the_name_of_a_streams_decoder_are_not_taken_for_it(
    run: Run, file: Path, make_stream: Callable[..., bytes], toy_models: Path
) -> None:
    file.write_bytes(make_stream(45, 33, image_decoder=2))
    models = file.parent / "models"
    models.mkdir()
    shutil.copy(toy_models / "toy.onnx", models / "lite.onnx")
    manifest = json.loads((toy_models / "toy.json").read_text())
    (models / "lite.json").write_text(json.dumps({**manifest, "name": "lite"}))
    result = run("clric-dec", file.name, "by_default.png", "--models", "models")
    assert (result.returncode, result.stderr) == (0, b"")
    result = run("clric-dec", file.name, "by_name.png", "--models", "models", "--vae", "lite")
    assert result.returncode == 0
    weights = f"other weights of it (SHA-256 {manifest['sha256'][:16]})"
    note = f"note: the stream was tuned for image decoder lite, decoding with {weights}"
    assert result.stderr.decode() == f"clric-dec: photo.clric: {note}\n"
    shown = [pixels((file.parent / name).read_bytes()) for name in ("by_default.png", "by_name.png")]
    np.testing.assert_array_equal(shown[0], decode(file.read_bytes(), vae="lite"))
    np.testing.assert_array_equal(shown[1], decode(file.read_bytes(), vae=str(toy_models / "toy.onnx")))


def test_several_inputs_go_to_a_folder_and_a_bad_one_stops_none(
    run: Run, tmp_path: Path, file: Path, stream: bytes, toy: list[str]
) -> None:
    (tmp_path / "bad.clric").write_bytes(stream[:-1])
    (tmp_path / "more.clric").write_bytes(stream)
    result = run("clric-dec", "bad.clric", "photo.clric", "gone.clric", "more.clric", "-o", "out", *toy)
    assert result.returncode == 1
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["more.png", "photo.png"]
    lines = result.stderr.decode().splitlines()
    assert lines[0].startswith("clric-dec: bad.clric: ")
    assert lines[1:] == ["clric-dec: gone.clric: No such file or directory"]


def test_latent_alone_needs_no_image_decoder(run: Run, tmp_path: Path, file: Path, stream: bytes) -> None:
    result = run("clric-dec", file.name, "--latent", "latent.npy")
    assert (result.returncode, result.stderr) == (0, b"")
    latent = np.load(tmp_path / "latent.npy")
    assert (latent.dtype, latent.shape) == (np.float32, (4, 5, 6))
    np.testing.assert_array_equal(latent, decode_latent(stream))
    assert not (tmp_path / "photo.png").exists()


def test_latent_and_image(run: Run, tmp_path: Path, file: Path, toy: list[str]) -> None:
    assert run("clric-dec", file.name, "--latent", "l.npy", "-o", "i.webp", *toy).returncode == 0
    assert np.load(tmp_path / "l.npy").shape == (4, 5, 6)
    assert pixels(tmp_path / "i.webp").shape == (33, 45, 3)


def test_json_is_the_header(run: Run, file: Path, stream: bytes) -> None:
    result = run("clric-dec", "--json", file.name, file.name)
    assert result.returncode == 0
    first, second = map(json.loads, result.stdout.splitlines())
    assert first == second
    header = read_header(stream)
    assert (first["file"], first["width"], first["height"]) == ("photo.clric", 45, 33)
    assert (first["latent_space"], first["latent"]) == ("sd1", [4, 5, 6])
    parts = first["bytes"]
    assert parts["total"] == len(stream)
    assert parts["header"] + parts["networks"] + sum(parts["levels"]) + parts["metadata"] == len(stream)
    assert first["bpp"] == pytest.approx(8 * len(stream) / (45 * 33))
    assert first["parameters"] == count_parameters(header)
    complexity = mac_per_pixel(header)
    assert first["mac_per_pixel"] == {**complexity, "total": sum(complexity.values())}


def test_info_says_what_json_says(run: Run, file: Path, stream: bytes) -> None:
    facts = json.loads(run("clric-dec", "--json", file.name).stdout)
    text = run("clric-dec", "--info", file.name).stdout.decode()
    assert "45 x 33" in text
    assert f"{facts['bpp']:.4f} bpp, {len(stream):,} bytes" in text
    assert "sd1, 4 x 5 x 6" in text
    assert f"total {facts['mac_per_pixel']['total']:.2f}" in text


@pytest.mark.parametrize(
    ("number", "name", "said"), [(0, None, "none"), (1, "lite", "lite (number 1)"), (7, None, "unknown (number 7)")]
)
def test_info_says_what_a_stream_was_trained_for(
    run: Run, file: Path, make_stream: Callable[..., bytes], number: int, name: str | None, said: str
) -> None:
    file.write_bytes(make_stream(image_decoder=number))
    facts = json.loads(run("clric-dec", "--json", file.name).stdout)
    assert (facts["image_decoder"], facts["image_decoder_number"]) == (name, number)
    lines = run("clric-dec", "--info", file.name).stdout.decode().splitlines()
    assert [line.removeprefix("  trained for").strip() for line in lines if "trained for" in line] == [said]


def test_info_of_a_name_that_is_no_utf8(run: Run, tmp_path: Path, stream: bytes) -> None:
    name = os.fsdecode(b"caf\xe9.clric")
    (tmp_path / name).write_bytes(stream)
    result = run("clric-dec", "--info", name)
    assert (result.returncode, result.stdout.splitlines()[0]) == (0, b"caf\xe9.clric")
    assert json.loads(run("clric-dec", "--json", name).stdout)["file"] == name


def test_control_characters_in_names_do_not_reach_the_terminal(run: Run, tmp_path: Path, stream: bytes) -> None:
    name, shown = "a\x1b[31m\n\x9b\u202eb.clric", "a\\x1b[31m\\x0a\\x9b\\u202eb.clric"
    assert_one_line(run("clric-dec", name), 1, f"clric-dec: {shown}: No such file or directory")
    assert_one_line(run("clric-dec", name, "-o", name), 2, "output a\\x1b[31m ", " is also an input")
    (tmp_path / name).write_bytes(b"text")
    assert_one_line(run("clric-dec", name), 1, f"clric-dec: {shown}: ")
    (tmp_path / name).write_bytes(stream)
    assert run("clric-dec", "--info", name).stdout.decode().splitlines()[0] == shown


@POSIX
def test_standard_streams_that_are_closed_or_not_read(run: Run, file: Path, toy: list[str]) -> None:
    name = file.name
    assert_one_line(run("clric-dec", "-", "--info", preexec_fn=lambda: os.close(0)), 1, "-: standard input is closed")
    closed = {"stdout": None, "preexec_fn": lambda: os.close(1)}
    assert_one_line(run("clric-dec", name, *toy, "-o", "-", **closed), 1, "standard output is closed")
    assert_one_line(run("clric-dec", name, "--info", **closed), 1, "standard output is closed")
    reader, writer = os.pipe()
    os.close(reader)
    result = run("clric-dec", "--json", name, name, stdout=writer)
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, b"")


def test_devices_and_pipes_by_name(run: Run, file: Path) -> None:
    assert run("clric-dec", file.name, "--latent", "/dev/null").returncode == 0
    result = run("clric-dec", file.name, "--latent", "/dev/stdout")
    assert (result.returncode, result.stderr) == (0, b"")
    np.testing.assert_array_equal(np.load(io.BytesIO(result.stdout)), decode_latent(file.read_bytes()))


@pytest.mark.parametrize("option", ["--help", "--info", "--json"])
def test_help_and_info_load_nothing_heavy(file: Path, run: Run, option: str) -> None:
    loaded = loaded_modules(run, "clric-dec", option, file)
    assert "clric_decoder" in loaded
    assert not {"torch", "onnxruntime", "PIL", "diffusers", "onnx", "clric_encoder", "clric_export"} & loaded


BAD_STREAMS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", ""),
    "text": (lambda data: b"just some text\n", ""),
    "truncated": (lambda data: data[: len(data) // 2], ""),
    "flipped": (lambda data: data[:-9] + bytes([data[-9] ^ 4]) + data[-8:], "checksum"),
    "newer": (lambda data: data[:3] + b"\xff" + data[4:], "version"),
}


@pytest.mark.parametrize("option", [[], ["--info"], ["--latent", "latent.npy"]])
@pytest.mark.parametrize("name", BAD_STREAMS)
def test_bad_streams(run: Run, file: Path, toy: list[str], name: str, option: list[str]) -> None:
    damage, reason = BAD_STREAMS[name]
    file.write_bytes(damage(file.read_bytes()))
    assert_one_line(run("clric-dec", file.name, *toy, *option), 1, "clric-dec: photo.clric: ", reason)
    assert [entry.name for entry in file.parent.iterdir()] == ["photo.clric"]


def test_bad_inputs(run: Run, tmp_path: Path, toy: list[str]) -> None:
    (tmp_path / "folder").mkdir()
    assert_one_line(run("clric-dec", "folder", *toy), 1, "folder: no .clric files found")
    assert_one_line(run("clric-dec", "gone.clric", *toy), 1, "gone.clric: No such file or directory")
    assert_one_line(
        run("clric-dec", "/dev/zero", "--max-pixels", "99"), 1, "/dev/zero: file too large (limit 1048576 bytes)"
    )


def test_bad_command_lines(run: Run, tmp_path: Path, file: Path) -> None:
    assert_one_line(run("clric-dec"), 2, "IN...")
    assert_one_line(run("clric-dec", file.name, "--nonsense"), 2, "--nonsense")
    assert_one_line(run("clric-dec", file.name, "--max-pixels", "many"), 2, "many")
    assert_one_line(run("clric-dec", file.name, "--max-pixels", "9" * 20), 2, "4294836225")
    assert_one_line(run("clric-dec", file.name, "--info", "-o", "x.png"), 2, "--info")
    assert_one_line(run("clric-dec", file.name, "-o", ""), 2, "the name of the output is empty")
    assert_one_line(run("clric-dec", ""), 2, "'' is not a file name")
    for place in ("-", "out.png"):
        result = run("clric-dec", file.name, "--latent", place, "-o", place, "--force")
        assert_one_line(result, 2, f"the image and the latent would both be written to {place}")
    assert_one_line(run("clric-dec", file.name, "-o", file.name), 2, "output photo.clric is also an input")
    assert_one_line(
        run("clric-dec", file.name, "-", "-o", "-"), 2, "photo.clric and - would both be written to standard output"
    )
    assert_one_line(run("clric-dec", "photo.png"), 2, "photo.png: not a .clric file")
    for options in ([file.name, "x.xyz"], [".", "x.png"], [file.name, file.name, "x.png"]):
        result = run("clric-dec", *options)
        assert_one_line(result, 2, "x.xyz: no such file" if "x.xyz" in options else "need an output folder: -o DIR")
    (tmp_path / "other").mkdir()
    same = run("clric-dec", file.name, f"other/{file.name}", "-o", "out")
    assert (same.returncode, same.stderr.decode().splitlines()) == (
        1,
        [
            f"clric-dec: {one}: {other} would be written to out/photo.png too; name its output with -o"
            for one, other in (("photo.clric", "other/photo.clric"), ("other/photo.clric", "photo.clric"))
        ],
    )
    assert not (tmp_path / "out").exists()


def test_bad_choices(run: Run, file: Path, toy: list[str], make_stream: Callable[..., bytes]) -> None:
    name = file.name
    assert_one_line(run("clric-dec", name, *toy, "--max-pixels", "1000"), 1, "photo.clric: ", "1000")
    assert_one_line(run("clric-dec", name, *toy, "--provider", "warp"), 1, "'warp'", "auto, cpu")
    assert_one_line(run("clric-dec", name, "--vae", "nonsense"), 1, "nonsense")
    assert_one_line(run("clric-dec", name, "--vae", "taesd"), 1, "taesd", "clric-export taesd")
    assert_one_line(run("clric-dec", name, "--vae", "nonsense", "-o", "x.xyz"), 1, "x.xyz: unknown image suffix")
    file.write_bytes(make_stream(space="sdxl"))
    assert_one_line(run("clric-dec", name, *toy), 1, "latent space sd1", "sdxl")
    assert [entry.name for entry in file.parent.iterdir()] == [name]


@LINUX
def test_outputs_that_cannot_be_written(run: Run, tmp_path: Path, file: Path, toy: list[str]) -> None:
    name = file.name
    full = "cannot be written (No space left on device)"
    assert_one_line(run("clric-dec", name, *toy, "-o", "gone/x.png"), 1, "gone/x.png: the output folder does not exist")
    assert_one_line(run("clric-dec", name, "--latent", "/dev/full"), 1, f"/dev/full: {full}")
    assert_one_line(run("clric-dec", name, *toy, "-o", f"{name}/x.png"), 1, f"{name}/x.png: cannot be written")
    assert_one_line(
        run("clric-dec", name, *toy, "-o", f"{name}/"), 1, f"{name}/: the folder cannot be created (File exists)"
    )
    with open("/dev/full", "wb") as device:
        assert_one_line(run("clric-dec", name, *toy, "-o", "-", stdout=device), 1, full)
        assert_one_line(run("clric-dec", name, "--info", stdout=device), 1, full)
        assert_one_line(run("clric-dec", "--help", stdout=device), 1, "No space left on device")
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.skipif(IS_ROOT, reason="root writes where nobody else may")
def test_folder_without_permission(run: Run, tmp_path: Path, file: Path, toy: list[str]) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    result = run("clric-dec", file.name, *toy, "-o", "locked/x.png")
    assert_one_line(result, 1, "locked/x.png: cannot be written (Permission denied)")


@POSIX
def test_disk_that_fills_up_midway(run: Run, tmp_path: Path, file: Path, toy: list[str]) -> None:
    """A limit on the size of files stands in for the disk: writing begins, and fails."""
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    older = tmp_path / "older.png"
    older.write_bytes(b"older")
    result = run("clric-dec", file.name, *toy, "-o", older, preexec_fn=limit)
    assert_one_line(result, 1, "older.png: cannot be written (File too large)")
    assert older.read_bytes() == b"older"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["older.png", "photo.clric"]


@POSIX
def test_control_c_is_quiet_and_leaves_nothing(tmp_path: Path) -> None:
    """Interrupted where it waits for its input."""
    command = Path(sys.executable).with_name("clric-dec")
    process = subprocess.Popen(
        [command, "-", "-o", "x.png"],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=hear_interrupts,
    )
    time.sleep(2)  # until it has started and reads
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=30)
    assert (process.returncode, message) == (130, b"")
    assert list(tmp_path.iterdir()) == []
