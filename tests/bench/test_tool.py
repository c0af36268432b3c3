"""clric-bench as a user meets it: what it measures, how it goes on, what it says of bad input, and its report."""

import base64
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from clric_decoder import decode, decode_latent, read_header
from clric_decoder.image import read_image
from clric_decoder.networks import mac_per_pixel
from clric_encoder import encode
from clric_encoder.autoencoder import load_encoder
from clric_encoder.bench.results import COLUMNS
from commands import POSIX, assert_one_line, hear_interrupts
from diffusers.models.autoencoders.vae import EncoderTiny
from PIL import Image
from safetensors.torch import save_file

Run = Callable[..., "subprocess.CompletedProcess[bytes]"]

CLRIC = ("--codec", "clric", "--vae", "taesd", "--preset", "fast", "--lambda", "1", "--tune", "auto", "--tune", "none")
CLRIC_NAMES = ("clric taesd fast tuned through lite", "clric taesd fast untuned")
JPEG = {"quality": 18, "optimize": True, "progressive": True}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, toy_models: Path) -> Path:
    """A VAE by the name of taesd: an encoder of random weights, and the toy decoder."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    save_file(
        EncoderTiny(3, 4, (1, 3, 3, 3), (64,) * 4, "relu").layers.state_dict(), folder / "taesd_encoder.safetensors"
    )
    for suffix in (".onnx", ".json"):
        shutil.copy(toy_models / f"toy{suffix}", folder / f"taesd{suffix}")
    return folder


def write_photo(path: Path, height: int, width: int) -> None:
    y, x = np.mgrid[:height, :width]
    waves = np.stack([128 + 100 * np.sin(x / 9 + y / 40), 128 + 100 * np.cos(y / 7), (2 * x + y) % 256], -1)
    Image.fromarray(waves.astype(np.uint8)).save(path)


pytestmark = POSIX  # the fixture interrupts a run


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


@dataclass(frozen=True)
class Bench:
    """A run of JPEG over two photos that Ctrl-C stopped, and one that went on, with clric too and a damaged image."""

    images: Path
    models: Path
    folder: Path
    interrupted: int  # exit code
    rows_before: list[str]  # lines of results.csv when it was stopped
    result: "subprocess.CompletedProcess[bytes]"

    def row(self, image: str, codec: str, setting: str | None = None) -> dict[str, str]:
        (row,) = (
            row
            for row in table(self.folder)
            if (row["image"], row["codec"]) == (image, codec) and setting in (None, row["setting"])
        )
        return row


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    images = folder / "images"
    images.mkdir()
    write_photo(images / "a.png", 240, 240)
    write_photo(images / "small.png", 150, 384)  # another size, as many pixels
    program = Path(sys.executable).with_name("clric-bench")
    arguments = [program, "run", images, "-o", folder / "out", "--codec", "jpeg"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*arguments, "--jobs", "2"], env=environment, stderr=subprocess.PIPE, preexec_fn=hear_interrupts
    )
    deadline = time.monotonic() + 120
    while not (folder / "out/results.csv").is_file() or len(table(folder / "out")) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert b"Traceback" not in errors, errors
    before = (folder / "out/results.csv").read_text().splitlines()
    (images / "broken.png").write_bytes((images / "a.png").read_bytes()[:2000])
    (images / "notes.txt").write_text("no image, and not named like one\n")
    shutil.copy(images / "a.png", images / "twin.png")
    with open(folder / "out/results.csv", "a") as file:
        file.write("half a li")  # as a power cut leaves it
    arguments += [*CLRIC, "--models", models, "--jobs", "1"]
    result = subprocess.run(arguments, env=environment, capture_output=True, check=False, timeout=300)
    return Bench(images, models, folder / "out", process.returncode, before, result)


def test_control_c_keeps_what_was_measured_and_the_next_run_adds_what_is_missing(bench: Bench) -> None:
    assert bench.interrupted == 130
    lines = (bench.folder / "results.csv").read_text().splitlines()
    assert lines[: len(bench.rows_before)] == bench.rows_before
    rows = table(bench.folder)
    assert len(rows) == 2 * (2 + 1 + 8)  # photos x (ways of tuning, ceiling, qualities of JPEG)
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({(row["image"], row["codec"], row["setting"]) for row in rows}) == len(rows)
    # A line for each new row, and one about each image that is damaged or there twice
    assert bench.result.stderr.count(b"\n") == len(rows) - (len(bench.rows_before) - 1) + 2
    assert b"twin.png: the same file as a.png" in bench.result.stderr


def test_a_damaged_image_is_reported_at_the_end_and_stops_no_other(bench: Bench) -> None:
    assert bench.result.returncode == 1
    last = bench.result.stderr.decode().splitlines()[-1]
    assert last.startswith("clric-bench: ")
    assert "broken.png: " in last
    assert "truncated" in last
    for name in ("summary.md", "report.html"):
        assert "broken.png" in (bench.folder / name).read_text()


def test_jpeg_rows_are_what_pillow_gives(bench: Bench) -> None:
    for name in ("a.png", "small.png"):
        row = bench.row(name, "JPEG", "quality 18")
        original = read_image(bench.images / name).pixels
        file = io.BytesIO()
        Image.fromarray(original).save(file, "jpeg", **JPEG)
        decoded = np.asarray(Image.open(file), float)
        assert int(row["bytes"]) == len(file.getvalue())
        assert float(row["bpp"]) == pytest.approx(8 * len(file.getvalue()) / original[..., 0].size)
        assert float(row["psnr"]) == pytest.approx(10 * np.log10(255**2 / np.square(decoded - original).mean()))
        assert (int(row["height"]), int(row["width"])) == original.shape[:2]


@pytest.mark.parametrize(("name", "tune"), [("tuned through lite", "lite"), ("untuned", "none")])
def test_clric_rows_are_what_the_library_gives(bench: Bench, name: str, tune: str) -> None:
    row = bench.row("a.png", f"clric taesd fast {name}")
    assert row["tune"] == tune
    original = read_image(bench.images / "a.png").pixels
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data = encode(original, vae="taesd", lmbda=1, preset="fast", tune=tune, device="cpu", models=bench.models)
    torch.set_num_threads(threads)
    header = read_header(data)
    assert int(row["bytes"]) == len(data)
    parts = [header.header_bytes, header.network_bytes, sum(header.level_bytes)]
    assert [int(row[f"{part}_bytes"]) for part in ("header", "network", "grid")] == parts
    latent = load_encoder("taesd", models=bench.models).encode(original)
    assert float(row["latent_mse"]) == pytest.approx(np.square(latent - decode_latent(data)).mean(), rel=1e-4)
    decoded = decode(data, vae="taesd", models=bench.models).astype(float)
    assert float(row["psnr"]) == pytest.approx(10 * np.log10(255**2 / np.square(decoded - original).mean()), rel=1e-4)
    # The toy decoder: three convolutions of 3 x 3 at an eighth of the size
    assert float(row["decoder_mac"]) == pytest.approx((4 * 8 + 8 * 8 + 8 * 3) * 9 / 64)
    assert float(row["function_mac"]) == pytest.approx(sum(mac_per_pixel(header).values()))


def test_time_and_memory(bench: Bench) -> None:
    """Seconds of every row; memory once for each codec and number of pixels, and not of a ceiling."""
    rows = table(bench.folder)
    assert all(float(row["encode_s"]) > 0 and float(row["decode_s"]) > 0 for row in rows)
    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux says how much memory a process held at its peak")
    encode_mb, decode_mb = ({row["codec"]: float(row[c]) for row in rows if row[c]} for c in ("encode_mb", "decode_mb"))
    assert set(encode_mb) == set(decode_mb) == {*CLRIC_NAMES, "JPEG"}
    assert sum(bool(row["encode_mb"]) for row in rows) == 3
    for name in CLRIC_NAMES:
        assert encode_mb[name] > 2 * encode_mb["JPEG"]  # torch
        assert decode_mb[name] < 0.7 * encode_mb[name]  # a client has none
    assert 10 < decode_mb["JPEG"] < 150


def test_an_image_too_small_for_ms_ssim_is_measured_by_the_rest_and_said(bench: Bench) -> None:
    row, whole = bench.row("small.png", "JPEG", "quality 80"), bench.row("a.png", "JPEG", "quality 80")
    assert row["ms_ssim"] == ""
    assert row["notes"].split("; ") == [
        "too small for MS-SSIM (sides of 161)",
        "too small for SSIMULACRA2 (sides of 225)",
    ]
    assert row["ssimulacra2"] == ""
    assert float(whole["ssimulacra2"]) > float(bench.row("a.png", "JPEG", "quality 1")["ssimulacra2"])
    assert float(row["ssim"]) > 0.5
    assert float(whole["ms_ssim"]) > 0.9
    assert "small.png: too small for MS-SSIM" in (bench.folder / "report.html").read_text()


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_report_holds_everything_in_itself(bench: Bench) -> None:
    text = (bench.folder / "report.html").read_text()
    page = _Page()
    page.feed(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "url(" not in text
    pictures = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    # Plots of PSNR and SSIM (the others one photo is too small for), crops of both photos, the strip
    assert len(pictures) == 5
    for source in pictures:
        kind, data = source.split(",", 1)
        content = base64.b64decode(data, validate=True)
        if kind == "data:image/png;base64":
            assert np.asarray(Image.open(io.BytesIO(content))).std() > 10
        else:
            assert kind == "data:image/svg+xml;base64"
            svg = ET.fromstring(content)
            links = [v for element in svg.iter() for k, v in element.attrib.items() if k.endswith("href")]
            assert all(link.startswith("#") for link in links)
    references = [v for _, attributes in page.tags for k, v in attributes.items() if k in ("src", "href", "srcset")]
    assert references == pictures


def test_the_report_says_what_measured_and_what_is_missing_and_why(bench: Bench) -> None:
    for name in ("report.html", "summary.md"):
        text = (bench.folder / name).read_text()
        for measure in ("LPIPS alex", "LPIPS vgg", "LPIPS squeeze", "FID", "DISTS", "FD-VGG16", "butteraugli"):
            assert measure in text
        assert "--metrics DIR" in text
        assert "25.48" in text  # the paper's Table I
        assert "2 jobs at once" in text  # of the run that was stopped
        assert "1 job at once" in text


def test_the_report_can_be_made_again_from_the_results_alone(bench: Bench, run: Run, tmp_path: Path) -> None:
    shutil.copytree(bench.folder, tmp_path / "copy")
    for name in ("report.html", "summary.md", "strip.png"):
        (tmp_path / "copy" / name).unlink()
    shutil.rmtree(tmp_path / "copy/plots")
    result = run("clric-bench", "report", "-o", "copy")
    assert result.returncode == 0, result.stderr
    for name in ("report.html", "summary.md", "plots/psnr.svg"):
        assert (tmp_path / "copy" / name).read_bytes() == (bench.folder / name).read_bytes()


def test_a_report_of_joined_runs_compares_means_over_the_same_images(run: Run, tmp_path: Path) -> None:
    """Two codecs and a ceiling on three photos; another codec and another ceiling on the first of them only."""
    rows = []
    for number, image in enumerate(("a.png", "b.png", "c.png"), 1):
        common = {"image": image, "image_sha256": image, "width": 768, "height": 512, "version": "1"}
        for setting, size in (("lambda 2", 1000), ("lambda 1", 2000)):
            coded = {"setting": setting, "bytes": size * number, "bpp": size * number / 49152, "psnr": 20 + number}
            parts = {"header_bytes": 20, "network_bytes": 180, "grid_bytes": size * number - 200, "function_mac": 19}
            rows.append({**common, "codec": "clric taesd fast", **coded, **parts, "encode_s": number})
            if (image, setting) != ("b.png", "lambda 1"):  # failed, say
                rows.append({**common, "codec": "JPEG", **coded, "encode_s": number})
            if image == "a.png":
                rows.append({**common, "codec": "WebP", **coded, "encode_s": number})
        for vae in ("taesd", "taesd3")[: 2 if image == "a.png" else 1]:
            rows.append({**common, "codec": f"{vae} ceiling", "setting": "latent not coded", "psnr": 30 + number})
    (tmp_path / "results").mkdir()
    with open(tmp_path / "results/results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "results/run.json").write_text(
        json.dumps({"machines": [], "photos": [], "unavailable": {}, "missing": {}, "failures": []})
    )
    result = run("clric-bench", "report")
    assert result.returncode == 0, result.stderr
    summary = (tmp_path / "results/summary.md").read_text()
    for text in (summary, (tmp_path / "results/report.html").read_text()):
        assert "3 images (768 x 512 pixels): a.png, b.png, c.png." in text
        assert "All means, in tables and plots, are over the 3 images." in text
        assert (
            "not among the means: taesd3 ceiling (1 of 3 images), JPEG at lambda 1 (2 of 3 images), "
            "WebP (1 of 3 images)." in text
        )
    sections = {part.split("\n")[0]: part for part in summary.split("\n## ")}
    assert "Means over the same 3 images" in sections["All means"]
    lines = [line.split(" | ")[:2] for line in sections["All means"].splitlines() if line.startswith("| ")][2:]
    assert lines == [
        ["| clric taesd fast", "lambda 2"],
        ["| clric taesd fast", "lambda 1"],
        ["| taesd ceiling", "latent not coded"],
        ["| JPEG", "lambda 2"],
    ]
    assert "| JPEG | lambda 2 | 2,000 | 0.0407 | 22.00 |" in sections["All means"]
    assert "| taesd | latent not coded | 32.00 |" in sections["Ceilings"]
    assert "| taesd3 | not measured on all of them | – |" in sections["Ceilings"]
    shares = "| clric taesd fast | lambda 2 | 0.0407 | 2,000 | 1,800 (90.0 %) | 180 (9.0 %) | 20 (1.0 %) |"
    assert shares in sections["Where a stream's bytes go"]
    assert "| JPEG | 0.39 | 2.00 |" in sections["What it costs"]
    assert "WebP" not in sections["What it costs"]
    # Each image has one PSNR here, whatever its rate
    assert "| clric taesd fast | JPEG | too few points (0/3) |" in sections["BD-rates"]
    plot = (tmp_path / "results/plots/psnr.svg").read_text()
    assert "<!-- JPEG -->" in plot
    assert "<!-- WebP -->" not in plot


def test_measures_by_vgg16_and_its_frechet_distance(run: Run, shared: Path, tmp_path: Path) -> None:
    image = read_image(shared / "data/kodak/kodim15.png").pixels
    Image.fromarray(image[:270, :520]).save(tmp_path / "crop.png")  # two patches of 256 x 256
    result = run("clric-bench", "run", "crop.png", "--codec", "jpeg", "--metrics", str(shared / "metrics"))
    assert result.returncode == 0, result.stderr
    rows = sorted(table(tmp_path / "results"), key=lambda row: float(row["bpp"]))
    assert {row["measured"] for row in rows} == {"lpips_squeeze lpips_vgg fd_vgg16 dists ssimulacra2"}
    for measure, sign in (("lpips_vgg", -1), ("dists", -1), ("ssimulacra2", 1)):
        values = [sign * float(row[measure]) for row in rows]
        assert values == sorted(values)
    for name in (rows[0]["image_sha256"], rows[0]["id"]):
        assert np.load(tmp_path / f"results/fd_vgg16/{name}.npy").shape == (2, 512)
    summary = (tmp_path / "results/summary.md").read_text()
    distances = summary.split("## FD-VGG16 over 256 x 256 patches")[1].split("## ")[0]
    cells = [line.strip("| ").split(" | ") for line in distances.splitlines() if line.startswith("| JPEG")]
    assert {patches for _, _, _, patches, _ in cells} == {"2"}
    values = [float(distance) for *_, distance in cells]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0
    assert "FID over" not in summary
    assert "†" not in summary


def test_speed_of_batches(run: Run, tmp_path: Path) -> None:
    for number, size in enumerate([(48, 64), (64, 48), (72, 48)]):
        write_photo(tmp_path / f"{number}.png", *size)
    command = ("clric-bench", "speed", tmp_path.name, "--preset", "fast", "--device", "cpu")
    result = run(*command, "--batch", "1", "--batch", "2", "-o", "speed.csv", cwd=tmp_path.parent)
    assert result.returncode == 0, result.stderr
    with open(tmp_path.parent / "speed.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["batch"], row["width"], row["height"]) for row in rows] == [("1", "64", "48"), ("2", "64", "48")]
    for row in rows:
        # The parts are within the whole: 300 iterations on the latent and 120 on the image
        parts = 300 * float(row["latent_ms"]) + 120 * float(row["image_ms"])
        assert 0 < parts / 1000 < 1.1 * float(row["seconds"])
        assert float(row["images_per_minute"]) == pytest.approx(60 * int(row["batch"]) / float(row["seconds"]), rel=0.1)
    result = run(*command, "--batch", "3", cwd=tmp_path.parent)
    assert_one_line(result, 1, "only 2 images of one size are given; a batch of 3 needs more")


def test_bad_command_lines(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_photo(tmp_path / "photo.png", 16, 16)
    assert_one_line(run("clric-bench", "run", "empty"), 1, "empty: contains no images")
    assert_one_line(run("clric-bench", "run", "gone"), 2, "gone", "does not exist")
    assert_one_line(run("clric-bench", "run", "photo.png", "--codec", "jpg"), 2, "'jpg'", "jpeg")
    assert_one_line(run("clric-bench", "run", "photo.png", "--lambda", "nan"), 2, "lambda must be", "not nan")
    assert_one_line(run("clric-bench", "run", "photo.png", "--codec", "clric", "--vae", "x"), 1, "'x' is not known")
    assert_one_line(run("clric-bench", "run", "photo.png", "--codec", "clric", "--tune", "y"), 1, "'y' is not known")
    assert not (tmp_path / "results").exists()


def test_results_of_other_columns_are_refused(run: Run, tmp_path: Path) -> None:
    write_photo(tmp_path / "photo.png", 16, 16)
    (tmp_path / "results").mkdir()
    (tmp_path / "results/results.csv").write_text("image,psnr\nphoto.png,3\n")
    (tmp_path / "results/run.json").write_text(
        json.dumps({"machines": [], "photos": [], "unavailable": {}, "missing": {}, "failures": []})
    )
    assert_one_line(run("clric-bench", "report"), 1, "results.csv", "another version")
    assert (tmp_path / "results/results.csv").read_text() == "image,psnr\nphoto.png,3\n"
