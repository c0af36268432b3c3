"""The product and the reference decoder on every vector, and the runner on both good and bad decoders."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from clric_decoder import StreamError, decode_latent, entropy
from clric_decoder.latent import decode_grids
from clric_decoder.synthesis import synthesize
from conformance import make_vectors, reference_decoder

SUITE = Path(__file__).parent
MANIFEST = json.loads((SUITE / "manifest.json").read_text())
SLOW_TO_REFERENCE = "valid/size-line-65535x1.clric"


def expected_latent(entry: dict) -> np.ndarray:
    return np.frombuffer((SUITE / entry["latent"]).read_bytes(), "<f4").reshape(entry["latent_shape"])


def assert_latents_agree(latent: np.ndarray, expected: np.ndarray) -> None:
    """The tolerance of section 9."""
    assert np.abs(latent - expected).max() <= 1e-4 * max(1, np.abs(expected).max())


def test_suite_is_large_enough() -> None:
    assert len(MANIFEST["valid"]) >= 20
    assert len(MANIFEST["invalid"]) >= 20
    kinds = {entry["error"] for entry in MANIFEST["invalid"].values()}
    assert kinds == {"magic", "truncated", "version", "checksum", "unsupported", "field", "limit", "payload"}


@pytest.mark.parametrize("python_coder", [False, True])
@pytest.mark.parametrize("name", MANIFEST["valid"])
def test_product_decodes_every_valid_stream(name, python_coder, monkeypatch) -> None:
    if python_coder:
        monkeypatch.setattr(entropy, "constriction", None)
    entry = MANIFEST["valid"][name]
    header, networks, grids = decode_grids((SUITE / name).read_bytes())
    digest = hashlib.sha256(b"".join(grid.astype(">i4").tobytes() for grid in grids)).hexdigest()
    assert digest == entry["grids_sha256"]
    assert_latents_agree(synthesize(grids, networks, header.architecture), expected_latent(entry))


@pytest.mark.parametrize("name", MANIFEST["invalid"])
def test_product_refuses_every_invalid_stream(name) -> None:
    with pytest.raises(StreamError) as error:
        decode_latent((SUITE / name).read_bytes())
    assert error.value.kind == MANIFEST["invalid"][name]["error"]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in MANIFEST["valid"] if name != SLOW_TO_REFERENCE])
def test_reference_decoder_agrees_on_valid_streams(name) -> None:
    entry = MANIFEST["valid"][name]
    decoded = reference_decoder.decode((SUITE / name).read_bytes())
    grids = b"".join(
        value.to_bytes(4, "big", signed=True)
        for level in decoded.grids
        for channel in level
        for row in channel
        for value in row
    )
    assert hashlib.sha256(grids).hexdigest() == entry["grids_sha256"]
    assert_latents_agree(decoded.latent, expected_latent(entry))


@pytest.mark.parametrize("name", MANIFEST["invalid"])
def test_reference_decoder_agrees_on_invalid_streams(name) -> None:
    with pytest.raises(reference_decoder.StreamError) as error:
        reference_decoder.decode((SUITE / name).read_bytes())
    assert error.value.kind == MANIFEST["invalid"][name]["error"]


def test_the_specification_names_the_table_of_network_sets() -> None:
    digest = hashlib.sha256(reference_decoder.NETWORK_SETS.read_bytes()).hexdigest()
    assert digest in (SUITE.parents[1] / "bitstream_spec.md").read_text()


def test_worked_example_of_the_specification_is_a_vector() -> None:
    section = (SUITE.parents[1] / "bitstream_spec.md").read_text().split("## 13.")[1].split("## Appendix")[0]
    rows = [row.split("|") for row in section.splitlines() if row.startswith("| ")]
    data = bytes.fromhex("".join(row[2] for row in rows if row[1].strip().isdigit()))
    assert data == (SUITE / "valid/worked-example.clric").read_bytes()
    _, networks, grids = decode_grids(data)
    assert f"values {grids[0].reshape(-1).tolist()}" in section
    for parameters in networks:
        assert f"`{parameters.group.name}`" in section
        assert f"integers {parameters.integers.reshape(-1).tolist()}" in section
    latent = decode_latent(data)
    assert f"channel 0 is {latent[0].reshape(-1).tolist()}" in section


def test_reference_decoder_does_not_know_the_product() -> None:
    assert "clric" not in "".join(
        line for line in (SUITE / "reference_decoder.py").read_text().splitlines() if "import" in line
    )


def test_vectors_are_what_their_maker_makes() -> None:
    for seed, case in enumerate(make_vectors.CASES):
        if case.width * case.height < 20000:
            assert make_vectors.make_valid(case, seed)[0] == (SUITE / f"valid/{case.name}.clric").read_bytes()


def run_suite(suite: Path, command: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, SUITE / "run.py", "--suite", suite, "--jobs", "2", "--command", command]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def small_suite(tmp_path) -> Path:
    """A few of the vectors, as a suite of their own."""
    names = {
        "valid": ["valid/size-7x5.clric", "valid/space-flux2.clric"],
        "invalid": ["invalid/payload-arm-bias.clric", "invalid/magic-text.clric"],
    }
    for kind, streams in names.items():
        (tmp_path / kind).mkdir()
        for stream in streams:
            (tmp_path / stream).write_bytes((SUITE / stream).read_bytes())
            latent = MANIFEST[kind][stream].get("latent")
            if latent:
                (tmp_path / latent).write_bytes((SUITE / latent).read_bytes())
    manifest = {kind: {name: MANIFEST[kind][name] for name in streams} for kind, streams in names.items()}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


@pytest.mark.parametrize("decoder", ["product.py", "reference_decoder.py"])
def test_runner_passes_a_good_decoder(small_suite, decoder) -> None:
    command = f"{sys.executable} {SUITE / decoder} {{stream}} --grids {{grids}} --latent {{latent}}"
    run = run_suite(small_suite, command)
    assert run.returncode == 0, run.stdout + run.stderr


def test_runner_fails_a_bad_decoder(small_suite, tmp_path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("import sys; open(sys.argv[1], 'wb').write(bytes(4))")
    run = run_suite(small_suite, f"{sys.executable} {bad} {{grids}} {{stream}}")
    assert run.returncode == 1
    for name in ("size-7x5", "space-flux2", "payload-arm-bias", "magic-text"):
        assert name in run.stdout + run.stderr
