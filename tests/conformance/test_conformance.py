"""The product and the reference decoder on every vector, and the runner on both good and bad decoders."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from clric_decoder import StreamError, bitstream, decode_latent, entropy, read_header
from clric_decoder.bitstream import METADATA, Segments
from clric_decoder.latent import decode_grids
from clric_decoder.probe import decode_stages
from conformance import make_vectors, reference_decoder
from conftest import Run

SUITE = Path(__file__).parent
SPECIFICATION = (SUITE.parents[1] / "bitstream_spec.md").read_text()
MANIFEST = json.loads((SUITE / "manifest.json").read_text())


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


def without_latent_hash(entry: dict) -> dict:
    """What two right decoders agree on; their latents may differ within the tolerance."""
    return {key: value for key, value in entry.items() if key not in ("latent", "latent_sha256")}


@pytest.mark.parametrize("python_coder", [False, True])
@pytest.mark.parametrize("name", MANIFEST["valid"])
def test_product_decodes_every_valid_stream(name, python_coder, monkeypatch) -> None:
    if python_coder:
        monkeypatch.setattr(entropy, "constriction", None)
    entry, data = MANIFEST["valid"][name], (SUITE / name).read_bytes()
    stages = decode_stages(data)
    assert without_latent_hash(stages) == without_latent_hash(entry)
    latent = decode_latent(data)
    assert_latents_agree(latent, expected_latent(entry))
    assert hashlib.sha256(latent.astype("<f4").tobytes()).hexdigest() == stages["latent_sha256"]


def test_probe_prints_the_manifests_entry(run: Run) -> None:
    name = "valid/metadata-all.clric"
    result = run("clric-dec", "--probe", SUITE / name)
    assert (result.returncode, result.stderr) == (0, b"")
    printed = json.loads(result.stdout)
    assert printed.pop("file") == str(SUITE / name)
    assert without_latent_hash(printed) == without_latent_hash(MANIFEST["valid"][name])


@pytest.mark.parametrize("name", MANIFEST["valid"])
def test_the_header_is_read_from_the_first_bytes(name) -> None:
    data = (SUITE / name).read_bytes()
    header = read_header(data)
    needed = header.header_bytes - bitstream.CHECKSUM_BYTES + header.metadata_bytes
    assert read_header(data[:needed], size=len(data)) == header
    with pytest.raises(StreamError) as error:
        read_header(data[: needed - 1], size=len(data))
    assert error.value.kind == "truncated"


def test_product_writes_the_vectors() -> None:
    """Of what it would write: it describes no function that is registered, and knows three types of metadata."""
    written = 0
    for case in make_vectors.CASES:
        entries = case.metadata or ()
        if case.name.endswith("-described") or case.metadata == () or not {kind for kind, _ in entries} <= {1, 2, 3}:
            continue
        if sorted(set(entries)) != list(entries):
            continue
        data = (SUITE / f"valid/{case.name}.clric").read_bytes()
        _, segments = bitstream.read(data)
        # Without the zeros at its end, which the writer adds where they are needed
        shortest = segments.networks if case.stored_networks is not None else segments.networks.rstrip(b"\0")
        again = bitstream.write(
            width=case.width,
            height=case.height,
            space=case.space,
            channels=case.channels,
            architecture=case.architecture,
            segments=Segments(shortest, segments.levels),
            metadata={METADATA[kind]: content for kind, content in entries},
            function=case.function or 0,
            image_decoder=case.image_decoder,
        )
        assert again == data, case.name
        written += 1
    assert written > 75


@pytest.mark.parametrize("name", MANIFEST["invalid"])
def test_product_refuses_every_invalid_stream(name) -> None:
    with pytest.raises(StreamError) as error:
        decode_latent((SUITE / name).read_bytes())
    assert error.value.kind == MANIFEST["invalid"][name]["error"]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", MANIFEST["valid"])
def test_reference_decoder_agrees_on_valid_streams(name) -> None:
    entry = MANIFEST["valid"][name]
    decoded = reference_decoder.decode((SUITE / name).read_bytes())
    networks = [np.array([exponent, *integers]) for _, exponent, integers in decoded.networks]
    assert make_vectors.sha256_of_integers(networks) == entry["networks_sha256"]
    levels = [{"shape": list(grid.shape), "sha256": make_vectors.sha256_of_integers([grid])} for grid in decoded.grids]
    assert levels == entry["levels"]
    assert_latents_agree(decoded.latent, expected_latent(entry))
    header, expected = decoded.header, entry["header"]
    for field in ("width", "height", "channels", "function", "image_decoder"):
        assert getattr(header, field) == expected[field]
    metadata = {METADATA[kind]: hashlib.sha256(content).hexdigest() for kind, content in header.metadata.items()}
    assert metadata == expected["metadata_sha256"]


@pytest.mark.parametrize("name", MANIFEST["invalid"])
def test_reference_decoder_agrees_on_invalid_streams(name) -> None:
    with pytest.raises(reference_decoder.StreamError) as error:
        reference_decoder.decode((SUITE / name).read_bytes())
    assert error.value.kind == MANIFEST["invalid"][name]["error"]


def test_the_specification_names_the_registered_networks() -> None:
    digest = hashlib.sha256(reference_decoder.REGISTERED_NETWORKS.read_bytes()).hexdigest()
    assert digest in SPECIFICATION


def test_worked_example_of_the_specification_is_a_vector() -> None:
    section = SPECIFICATION.split("## 14.")[1].split("## Appendix")[0]
    rows = [row.split("|") for row in section.splitlines() if row.startswith("| ")]
    data = bytes.fromhex("".join(row[2] for row in rows if row[1].strip().isdigit()))
    assert data == (SUITE / "valid/worked-example.clric").read_bytes()
    _, networks, grids = decode_grids(data)
    assert f"values {grids[0].reshape(-1).tolist()}" in section
    for parameters in networks:
        assert f"`{parameters.group.name}`" in section
        assert f"| {parameters.integers.reshape(-1).tolist()} |" in section
    latent = decode_latent(data)
    assert f"channel 0 is {latent[0].reshape(-1).tolist()}" in section


def test_reference_decoder_does_not_know_the_product() -> None:
    assert "clric" not in "".join(
        line for line in (SUITE / "reference_decoder.py").read_text().splitlines() if "import" in line
    )


def test_vectors_are_what_their_maker_makes() -> None:
    for case in make_vectors.CASES:
        assert make_vectors.make_valid(case).data == (SUITE / f"valid/{case.name}.clric").read_bytes()
    invalid = {f"invalid/{name}.clric": data for name, (_, data) in make_vectors.make_invalid().items()}
    assert set(invalid) == set(MANIFEST["invalid"])
    for name, data in invalid.items():
        assert data == (SUITE / name).read_bytes()


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


def test_runner_names_the_level_that_is_wrong(small_suite, tmp_path) -> None:
    """Of a decoder that is wrong in one value."""
    bad = tmp_path / "bad.py"
    bad.write_text(
        "import sys; from clric_decoder.latent import decode_grids\n"
        "grids = decode_grids(open(sys.argv[1], 'rb').read())[2]\n"
        "grids[1][0, 0, 0] += 1\n"
        "open(sys.argv[2], 'wb').write(b''.join(grid.astype('>i4').tobytes() for grid in grids))\n"
    )
    run = run_suite(small_suite, f"{sys.executable} {bad} {{stream}} {{grids}}")
    assert "FAIL valid/size-7x5.clric: the grids of level 1 are not the expected ones" in run.stdout
