"""The packages: the dependencies between them run one way, and a client needs no more than the base distribution."""

import ast
import json
import os
import signal
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from clric_decoder import decode_latent
from commands import POSIX, hear_interrupts
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "clric": ROOT / "decoder/clric",
    "clric_decoder": ROOT / "decoder/clric_decoder",
    "clric_encoder": ROOT / "encoder/clric_encoder",
    "clric_export": ROOT / "export/clric_export",
}

COMMANDS = ["clric-enc", "clric-dec", "clric-bench", "clric-export"]

# What each package must not import, at the top of a file or anywhere in it.
SERVER = {"torch", "torchvision", "diffusers", "onnx", "scipy"}
FORBIDDEN = {
    "clric": SERVER | {"clric_export"},
    "clric_decoder": SERVER | {"clric", "clric_encoder", "clric_export"},
    "clric_encoder": {"clric", "clric_export"},
    "clric_export": {"clric"},
}

# What a client has: the base dependencies, and onnxruntime (extras cpu and gpu) inside a function.
CLIENT = {"numpy", "PIL", "click", "platformdirs", "constriction", "onnxruntime"}

# What is imported where it is used, and not with the file. The face is one package for clients and servers, so
# `clric.encode` calls the encoder; a client that never encodes must not pay for it, nor need it.
LAZY = {"onnxruntime", "clric_encoder"}


def imports(package: str) -> Iterator[tuple[str, str, bool]]:
    """(file and line, top-level module, whether it is imported with the file) of every absolute import."""
    files = list(PACKAGES[package].rglob("*.py"))
    assert files
    for file in files:
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                where = f"{file.relative_to(ROOT)}:{node.lineno}"
                yield where, name.split(".")[0], node in tree.body


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_run_one_way(package: str) -> None:
    assert [(where, module) for where, module, _ in imports(package) if module in FORBIDDEN[package]] == []


@pytest.mark.parametrize(
    ("package", "others"), [("clric_decoder", {"clric_decoder"}), ("clric", {"clric_decoder", "clric_encoder"})]
)
def test_clients_packages_import_what_a_client_has(package: str, others: set[str]) -> None:
    for where, module, at_once in imports(package):
        assert module in CLIENT | others | set(sys.stdlib_module_names), where
        assert not (at_once and module in LAZY), f"{where}: {module} is imported where it is used"


@pytest.mark.parametrize("package", ["clric", "clric_decoder"])
def test_importing_what_a_client_has_is_light(package: str) -> None:
    code = f"import sys, {package}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "diffusers", "onnx", "onnxruntime", "click", "PIL", "clric_encoder", "clric_export"}
    assert heavy & set(result.stdout.split()) == set()


def test_measuring_speed_needs_no_library_of_the_benchmark() -> None:
    code = "import sys, clric_encoder.bench.speed; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"pytorch_msssim", "matplotlib", "bjontegaard"} & set(result.stdout.split()) == set()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_has_all_packages_with_their_types(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for package, folder in PACKAGES.items():
        files = {file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
        assert {f"{package}/{file.relative_to(folder).as_posix()}" for file in files} <= names
        assert f"{package}/py.typed" in names


@pytest.fixture(scope="module")
def client(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an empty virtual environment with the built wheel and what it requires."""
    folder = tmp_path_factory.mktemp("client")
    venv.create(folder / "venv", with_pip=True)
    programs = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    install = subprocess.run(
        [programs / "python", "-m", "pip", "install", "--quiet", wheel],
        check=False,
        capture_output=True,
        text=True,
    )
    if "Failed to establish a new connection" in install.stderr:
        pytest.skip("no network: pip cannot fetch the base dependencies")
    assert install.returncode == 0, install.stderr
    return programs


def call(*command: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_base_wheel_decodes_a_latent(client: Path, tmp_path: Path, make_stream: Callable[..., bytes]) -> None:
    data = make_stream(width=131, height=77)
    (tmp_path / "photo.clric").write_bytes(data)
    result = call(client / "clric-dec", tmp_path / "photo.clric", "--latent", tmp_path / "latent.npy")
    assert (result.returncode, result.stderr) == (0, "")
    # Synthesis is in floats: another numpy may sum in another order.
    np.testing.assert_allclose(np.load(tmp_path / "latent.npy"), decode_latent(data), atol=1e-4)


def test_base_wheel_decodes_the_conformance_streams(client: Path, tmp_path: Path) -> None:
    streams = sorted((ROOT / "tests/conformance/valid").glob("*.clric"))
    if not streams:
        pytest.skip("tests/conformance/valid holds no streams yet")
    result = call(client / "clric-dec", *streams, "--latent", f"{tmp_path}/out/")
    assert (result.returncode, result.stderr) == (0, "")
    assert len(list((tmp_path / "out").iterdir())) == len(streams)


def test_base_wheel_is_light_and_whole(client: Path) -> None:
    result = call(client / "python", "-m", "pip", "list", "--format", "json")
    packages = {package["name"].lower() for package in json.loads(result.stdout)}
    assert packages <= {
        "clric",
        "numpy",
        "pillow",
        "click",
        "platformdirs",
        "constriction",
        "pip",
        "setuptools",
    }
    code = "import clric.pillow, clric_decoder, clric_encoder, clric_export; print(clric_decoder.__file__)"
    result = call(client / "python", "-I", "-c", code)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).is_relative_to(client.parent)
    code = "import clric, importlib.metadata as m; print(clric.__version__ == m.version('clric'))"
    assert call(client / "python", "-I", "-c", code).stdout == "True\n"


def test_what_the_base_wheel_lacks_is_named(
    client: Path, tmp_path: Path, toy_models: Path, make_stream: Callable[..., bytes]
) -> None:
    stream, photo = tmp_path / "photo.clric", tmp_path / "photo.png"
    stream.write_bytes(make_stream())
    Image.new("RGB", (8, 8)).save(photo)
    for extra, result in {
        "clric[cpu]": call(client / "clric-dec", stream, "-o", "x.png", "--vae", "toy", "--models", toy_models),
        "clric[encoder]": call(client / "clric-enc", photo, "-o", tmp_path / "y.clric"),
    }.items():
        assert result.returncode == 1
        assert f"pip install '{extra}'" in result.stderr
        assert result.stderr.count("\n") == 1


def test_what_the_base_wheel_lacks_is_named_in_python(
    client: Path, tmp_path: Path, make_stream: Callable[..., bytes]
) -> None:
    stream, photo = tmp_path / "photo.clric", tmp_path / "photo.png"
    stream.write_bytes(make_stream(space="clric"))
    Image.new("RGB", (8, 8)).save(photo)
    for code, error, extra in (
        (f"clric.decode({str(stream)!r})", "ModelError", "clric[cpu]"),
        (f"Image.open({str(stream)!r}).load()", "OSError", "clric[cpu]"),
        (f"clric.encode({str(photo)!r}, preset='instant')", "ModelError", "clric[cpu]"),
        (f"clric.encode({str(photo)!r})", "ClricError", "clric[encoder]"),
        (f"Image.open({str(photo)!r}).save({str(tmp_path / 'new.clric')!r})", "OSError", "clric[encoder]"),
    ):
        result = call(client / "python", "-I", "-c", f"import clric, clric.pillow; from PIL import Image; {code}")
        message = result.stderr.splitlines()[-1]
        assert message.split(": ")[0].endswith(error)
        assert f"pip install '{extra}'" in message
    assert not (tmp_path / "new.clric").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_its_version(run: Callable[..., "subprocess.CompletedProcess[bytes]"], command: str) -> None:
    result = run(command, "--version")
    assert (result.returncode, result.stdout.decode()) == (0, f"{command} {version('clric')}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_a_short_name(run: Callable[..., "subprocess.CompletedProcess[bytes]"], command: str) -> None:
    result = run(command, "-h")
    assert (result.returncode, result.stdout) == (0, run(command, "--help").stdout)


@pytest.mark.parametrize("command", ["clric-bench", "clric-export"])
def test_a_group_without_a_command_prints_its_help(
    run: Callable[..., "subprocess.CompletedProcess[bytes]"], command: str
) -> None:
    result = run(command)
    assert (result.returncode, result.stdout) == (2, b"")
    assert result.stderr == run(command, "--help").stdout


@pytest.mark.parametrize(
    "command",
    [[Path(sys.executable).with_name(name)] for name in COMMANDS]
    + [[sys.executable, "-m", "clric", half] for half in ("enc", "dec")],
)
@POSIX
def test_control_c_is_quiet_while_a_command_is_still_importing(command: list[str | Path], tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [*command, "--version"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=hear_interrupts,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=30)
    assert (process.returncode, message) == (130, b"")
