"""Latents and photos through the whole encoder, and back."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from clric_decoder import ClricError, StreamError, decode_latent, read_header
from clric_decoder.latent import decode_grids
from clric_decoder.networks import mac_per_pixel
from clric_encoder import encode, encode_latent, torch_threads
from clric_encoder.encoding import encode_latents
from clric_encoder.model import backends
from clric_encoder.model.function import Packing
from clric_encoder.model.grid_layout import GridLayout
from clric_encoder.network_quantization import quantize_networks
from clric_encoder.rate import Rate, quality_to_lambda
from clric_encoder.stream import MAX_LATENT
from clric_encoder.training import loop, process_pool
from clric_encoder.training.distortion import LatentError
from clric_encoder.training.optimizers import Adam
from clric_encoder.training.presets import PRESETS, WarmUp
from clric_encoder.training.rate_control import principal_step

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick_presets(monkeypatch) -> None:
    """The real presets with a part of their iterations, as `quick` and `quick-paper`."""
    for name, preset, part in (("quick", PRESETS["default"], 10), ("quick-paper", PRESETS["paper"], 50)):
        stages = tuple(replace(stage, iterations=stage.iterations // part) for stage in preset.stages)
        warm_up = tuple(replace(warm_up, iterations=warm_up.iterations // part) for warm_up in preset.warm_up)
        monkeypatch.setitem(PRESETS, name, replace(preset, stages=stages, warm_up=warm_up))


def smooth_latent(channels: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise with the spectrum of a photo's latent: (channels, height, width) float32 of deviation 0.8."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)) + 1 / max(height, width)
    spectrum = np.fft.fft2(rng.normal(size=(channels, height, width))) / frequency
    values = np.fft.ifft2(spectrum).real
    return (0.8 * (values - values.mean()) / (values.std() + 1e-9)).astype(np.float32)


def coded(latent: np.ndarray, lmbda: float | None = 0.5, **options) -> bytes:
    height, width = (8 * side for side in latent.shape[1:])
    options = {"space": "sd1", "preset": "quick"} | options
    return encode_latent(latent, width=width, height=height, lmbda=lmbda, **options)


def error(data: bytes, latent: np.ndarray) -> float:
    return float(np.square(decode_latent(data) - latent).mean())


def test_smaller_lambda_buys_a_closer_latent_with_more_bytes() -> None:
    latent = smooth_latent(4, 24, 32)
    streams = [coded(latent, lmbda) for lmbda in (4.0, 0.5, 0.06)]
    assert len(streams[0]) < len(streams[1]) < len(streams[2])
    errors = [error(data, latent) for data in streams]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02 * latent.var()


def test_quality_is_monotone_in_size() -> None:
    latent = smooth_latent(4, 24, 32)
    sizes = [len(coded(latent, quality_to_lambda(quality))) for quality in range(0, 101, 10)]
    assert sizes == sorted(sizes)
    assert quality_to_lambda(90) == pytest.approx(0.05)


def test_sizes_that_are_asked_for() -> None:
    latent = smooth_latent(4, 32, 40)
    pixels = 64 * 32 * 40
    for bpp in (0.1, 0.3):
        data = coded(latent, None, bpp=bpp, preset="fast")
        assert 0.97 * bpp * pixels / 8 <= len(data) <= bpp * pixels / 8
    with pytest.warns(UserWarning, match="target of 10 bytes not reached: the minimum size is"):
        assert len(coded(latent, None, size=10)) < 200
    with pytest.warns(UserWarning, match="target of 100000 bytes not reached: quality saturates at"):
        assert error(coded(latent, None, size=100_000), latent) < 0.01


def test_neighbours_in_a_batch_change_nothing_but_float_noise() -> None:
    """Three latents of images of different sizes, together and alone."""
    latents = np.stack([smooth_latent(4, 12, 16, seed) for seed in range(3)])
    sizes = [(128, 96), (121, 90), (128, 89)]
    together = encode_latents(latents, sizes, "sd1", Rate(0.5), preset="quick")
    for latent, (width, height), encoded in zip(latents, sizes, together, strict=True):
        alone = encode_latent(latent, width=width, height=height, space="sd1", lmbda=0.5, preset="quick")
        assert (read_header(encoded.data).width, read_header(encoded.data).height) == (width, height)
        assert len(encoded.data) == pytest.approx(len(alone), rel=0.05)
        assert error(encoded.data, latent) == pytest.approx(error(alone, latent), rel=0.1)
        assert encoded.latent_mse == pytest.approx(error(encoded.data, latent))


def test_networks_are_quantised_in_a_batch_as_one_by_one() -> None:
    architecture = PRESETS["default"].architecture(4)
    layout, packing = GridLayout(architecture, 12, 16, CPU), Packing(architecture, CPU)
    torch.manual_seed(0)
    packed = (2 * torch.randn(3, layout.rows, layout.stride)).round() * layout.mask
    scales = torch.tensor([0.01, 0.3, 3.0])[:, None]
    networks = packing.split(packing.defaults + scales * 0.1 * torch.randn(3, len(packing.defaults)))
    latents, weights = torch.randn(3, 4, 12, 16), torch.tensor([1e-3, 1e-4, 1e-5])
    together = quantize_networks(networks, packed, latents, architecture, layout, weights, lambda: None)
    for i in range(3):
        one = slice(i, i + 1)
        own = {name: values[one] for name, values in networks.items()}
        (alone,) = quantize_networks(own, packed[one], latents[one], architecture, layout, weights[one], lambda: None)
        for a, b in zip(together[i], alone, strict=True):
            assert a.exponent == b.exponent
            np.testing.assert_array_equal(a.integers, b.integers)


def test_the_pure_torch_way_of_other_devices(monkeypatch) -> None:
    """What runs on a GPU, here on a CPU: the whole of it, a target included."""
    latent = smooth_latent(4, 24, 32)
    compiled = coded(latent)
    monkeypatch.setattr(backends, "COMPILED", None)
    assert len(coded(latent)) == pytest.approx(len(compiled), rel=0.05)
    assert error(coded(latent), latent) == pytest.approx(error(compiled, latent), rel=0.1)
    assert 0.97 * 700 <= len(coded(latent, None, size=700, preset="fast")) <= 700


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two parts of a batch, whatever the tests' own number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("rate", [Rate(0.3), Rate(bpp=0.3)])
def test_processes_share_a_batch(rate) -> None:
    """Three latents on two cores: each stream is of its own latent, and of its own size."""
    latents = np.stack([smooth_latent(4, 16, 16, seed) for seed in range(3)])
    sizes = [(128, 128), (128, 121), (121, 121)]
    for encoded, latent, size in zip(
        encode_latents(latents, sizes, "sd1", rate, preset="fast"), latents, sizes, strict=True
    ):
        header = read_header(encoded.data)
        assert (header.width, header.height) == size
        assert error(encoded.data, latent) < 0.5 * latent.var()
        if rate.bpp is not None:
            limit = int(rate.bpp * size[0] * size[1] / 8)
            assert 0.97 * limit <= len(encoded.data) <= limit


@pytest.mark.usefixtures("two_threads")
def test_trainings_in_threads_change_nothing_for_other_threads() -> None:
    """Two overlap; torch's number of threads is looked at from a new thread, and the bytes are those of one alone."""
    latents, streams, seen = [smooth_latent(4, 8, 10, seed) for seed in range(2)], {}, []
    together = threading.Barrier(2)

    def new_thread() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    def train(number: int) -> None:
        def look(progress) -> None:
            if progress.iteration < 30:
                together.wait(timeout=60)
                seen.append(new_thread())

        streams[number] = coded(latents[number], progress=look)
        seen.append(torch.get_num_threads())

    threads = [threading.Thread(target=train, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) > 4
    assert {*seen, new_thread()} == {2}
    assert [streams[number] for number in range(2)] == [coded(latent) for latent in latents]


@pytest.mark.usefixtures("two_threads")
def test_a_thread_that_begins_to_encode_takes_no_other_s_number_of_threads() -> None:
    seen, done = [], threading.Event()

    def begin() -> None:
        torch_threads.settle()
        seen.append(torch.get_num_threads())

    def change() -> None:
        while not done.is_set():
            with torch_threads.torch_threads(1):
                pass

    changing = threading.Thread(target=change)
    changing.start()
    for _ in range(300):
        beginning = threading.Thread(target=begin)
        beginning.start()
        beginning.join()
    done.set()
    changing.join()
    assert seen == [2] * 300


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("fault", [KeyboardInterrupt, MemoryError])
def test_a_fault_stops_all_parts_of_a_batch(fault, monkeypatch) -> None:
    """The other part would go on for a long time. Ctrl-C comes in the first, too little memory in the second."""
    long = replace(PRESETS["quick"].stages[0], iterations=300_000)
    monkeypatch.setitem(PRESETS, "quick", replace(PRESETS["quick"], stages=(long,)))
    seen = []

    def interrupt(progress) -> None:
        seen.append(progress.iteration)
        if fault is KeyboardInterrupt and progress.iteration > 100:
            raise fault

    move, first = Adam.move, os.getpid()

    def fail(*arguments) -> None:
        if fault is MemoryError and os.getpid() != first:
            raise fault
        move(*arguments)

    monkeypatch.setattr(Adam, "move", fail)
    latents = np.stack([smooth_latent(4, 8, 8, seed) for seed in range(2)])
    with pytest.raises(fault):
        encode_latents(latents, [(64, 64)] * 2, "sd1", Rate(0.5), preset="quick", progress=interrupt)
    assert max(seen, default=0) < 30_000
    assert not multiprocessing.active_children()


@pytest.mark.skipif(not process_pool.possible(), reason="a batch has but one process here")
@pytest.mark.usefixtures("two_threads")
def test_a_part_that_is_killed_is_too_little_memory(monkeypatch) -> None:
    move, first = Adam.move, os.getpid()

    def die(*arguments) -> None:
        if os.getpid() != first:
            os.kill(os.getpid(), signal.SIGKILL)
        move(*arguments)

    monkeypatch.setattr(Adam, "move", die)
    latents = np.stack([smooth_latent(4, 8, 8, seed) for seed in range(2)])
    with pytest.raises(MemoryError, match="killed"):
        encode_latents(latents, [(64, 64)] * 2, "sd1", Rate(0.5), preset="quick")


class LibraryError(Exception):
    """As many libraries have them: its arguments are not those that it is made of."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{text} ({code})")


@pytest.mark.skipif(not process_pool.possible(), reason="a batch has but one process here")
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (StreamError("limit", "the stream is too long"), StreamError),
        (LibraryError(7, "the stream is too long"), RuntimeError),
        (ClricError("the stream is too long", lambda: None), RuntimeError),
    ],
)
def test_an_error_in_a_part_keeps_its_text(error, expected) -> None:
    def train(part, check):
        if part:
            raise error
        while True:
            time.sleep(0.01)
            check()

    with pytest.raises(expected, match="the stream is too long") as caught:
        process_pool.run(train, 2)
    assert getattr(caught.value, "kind", None) == getattr(error, "kind", None)


@pytest.mark.skipif(not process_pool.possible(), reason="a batch has but one process here")
def test_no_part_outlives_a_killed_command() -> None:
    """Its output ends when the last process has."""
    script = """
import os, time
from clric_encoder.training import process_pool
def train(part, check):
    os.write(1, b"%d\\n" % part)  # in one piece, which print does not promise
    while True:
        time.sleep(0.01)
        check()
process_pool.run(train, 2)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as command:
        assert command.stdout is not None
        lines = sorted(command.stdout.readline() for _ in range(2))
        command.kill()
        assert lines == [b"0\n", b"1\n"]
        assert command.communicate(timeout=30)[0] == b""


@pytest.mark.parametrize(("side", "limit"), [(8, 120), (16, 60), (16, 330)])
def test_small_images_meet_sizes_too(side, limit) -> None:
    """Networks are most of such a file, and follow lambda."""
    latents = np.stack([smooth_latent(4, side, side, seed) for seed in range(2)])
    for encoded in encode_latents(latents, [(8 * side, 8 * side)] * 2, "sd1", Rate(size=limit), preset="fast"):
        assert 0.97 * limit <= len(encoded.data) <= limit
        assert encoded.note is None


def test_same_seed_same_bytes() -> None:
    latent = smooth_latent(4, 12, 16)
    assert coded(latent, seed=3) == coded(latent, seed=3)
    assert coded(latent, seed=3) != coded(latent, seed=4)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (5, 3)])
def test_any_size(size) -> None:
    latent = smooth_latent(4, *size)
    assert decode_latent(coded(latent)).shape == latent.shape


@pytest.mark.parametrize(("space", "channels"), [("sd1", 4), ("sdxl", 4), ("sd3", 16), ("flux1", 16), ("flux2", 32)])
@pytest.mark.parametrize("preset", ["quick", "quick-paper"])
def test_every_latent_space_and_preset(space, channels, preset) -> None:
    latent = smooth_latent(channels, 8, 10)
    data = coded(latent, 0.1, space=space, preset=preset)
    header = read_header(data)
    assert header.space == space
    assert header.header_bytes <= 24
    assert error(data, latent) < latent.var()


def test_report_and_file_agree() -> None:
    """The estimate that training ends with is the file's rate, and the networks cost below 5 bits a parameter."""
    latent = smooth_latent(4, 48, 64)
    reports = []
    data = coded(latent, 0.2, progress=reports.append)
    header, networks, _ = decode_grids(data)
    grids = 8 * sum(header.level_bytes) / (header.width * header.height)
    assert grids == pytest.approx(reports[-1].bpp, rel=0.05)
    assert 8 * header.network_bytes < 5 * sum(parameters.integers.size for parameters in networks)
    assert reports[-1].iteration == reports[-1].iterations
    assert sum(mac_per_pixel(header).values()) <= 26


@pytest.mark.parametrize("lmbda", [1e-6, 1e6])
def test_extremes_of_lambda(lmbda) -> None:
    latent = smooth_latent(4, 8, 10)
    data = coded(latent, lmbda)
    if lmbda > 1:
        assert len(data) < 50
    else:
        assert error(data, latent) < 0.1 * latent.var()


@pytest.mark.parametrize("channels", [4, 16])
@pytest.mark.parametrize("outlier", [False, True])
def test_the_largest_latents_are_coded_as_closely_as_others(channels, outlier) -> None:
    """One value at the limit, or all values scaled up to it: the error is that of the step of lambda, squared / 12."""
    latent = smooth_latent(channels, 12, 16)
    if outlier:
        latent[0, 5, 7] = MAX_LATENT
    else:
        latent = (latent / np.abs(latent).max() * MAX_LATENT).astype(np.float32)
    space = {4: "sd1", 16: "flux1"}[channels]
    for quality in (50, 100):
        lmbda = quality_to_lambda(quality)
        step = principal_step(lmbda, latent.size, 64 * latent[0].size)
        assert error(coded(latent, lmbda, space=space, preset="fast"), latent) < 3 * step**2 / 12
    decoded = decode_latent(coded(latent, 1e-6, space=space, preset="fast"))
    assert np.abs(decoded - latent).max() < 0.02 * MAX_LATENT


def test_custom_space() -> None:
    latent = smooth_latent(7, 8, 10)
    assert read_header(coded(latent, space="custom-00112233445566ff")).space == "custom-00112233445566ff"


def test_flat_latent_costs_almost_nothing() -> None:
    data = coded(np.full((4, 16, 16), 0.3, np.float32))
    assert len(data) < 100
    assert error(data, np.float32(0.3)) < 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lmbda": 0.0}, "lambda must be between 1e-6 and 1e6, not 0"),
        ({"lmbda": float("nan")}, "lambda must be .*, not nan"),
        ({"lmbda": 1e-9}, "between 1e-6 and 1e6"),
        ({"latent": np.full((4, 2, 2), np.inf, np.float32)}, "NaN or infinite"),
        ({"latent": np.full((4, 2, 2), np.nan, np.float32)}, "NaN or infinite"),
        ({"latent": np.full((4, 2, 2), -50.5, np.float32)}, r"up to \+-50.5, the limit is \+-50; scale its space"),
        ({"latent": np.zeros((4, 2, 2))}, "float64"),
        ({"latent": np.zeros((16, 2, 2), np.float32)}, r"must be \(4, 2, 2\)"),
        ({"space": "sd9"}, "'sd9' is not known"),
        ({"space": "custom-12"}, "16 hex digits"),
        ({"preset": "best"}, "use one of instant, fast, default, slow, paper"),
        ({"device": "tpu"}, "use auto, cpu or cuda"),
    ],
)
def test_bad_arguments(change, message) -> None:
    arguments = {"latent": smooth_latent(4, 2, 2), "lmbda": 0.5} | change
    with pytest.raises(ClricError, match=message):
        coded(**arguments)


def test_bad_images_and_choices() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    for arguments in ({"image": image[..., 0]}, {"image": image, "preset": "best"}):
        with pytest.raises(ClricError):
            encode(**arguments)
    with pytest.raises(ClricError, match="one of them"):
        encode(image, lmbda=1.0, quality=50)
    with pytest.raises(ClricError, match="0 to 100"):
        quality_to_lambda(101)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
def test_cuda() -> None:
    latent = smooth_latent(4, 24, 32)
    assert error(coded(latent, device="cuda"), latent) == pytest.approx(error(coded(latent), latent), rel=0.2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
def test_a_cuda_graph_trains_as_launches_do(monkeypatch) -> None:
    """Candidates, uniform noise and hard rounding with Adam, and soft rounding with SOAP.

    For a few iterations: float sums differ from run to run, and after more of them the functions do.
    """
    targets = torch.from_numpy(np.stack([smooth_latent(4, 24, 32, seed) for seed in range(2)])).cuda()
    paper = tuple(replace(stage, iterations=20) for stage in PRESETS["paper"].stages)
    soft = replace(PRESETS["fast"].stages[0], iterations=20)
    for preset in (
        replace(PRESETS["paper"], warm_up=(WarmUp(2, 10),), stages=paper),
        replace(PRESETS["fast"], stages=(soft,)),
    ):
        results = []
        for captured_from in (10, 10**9):
            monkeypatch.setattr(loop, "CAPTURED_FROM", captured_from)
            trainer = loop._Trainer(LatentError(targets), [0.5, 0.5], [64 * 24 * 32] * 2, preset, None, "cuda", None)
            state = trainer.best_start(0)
            for stage in preset.stages:
                trainer.train(state, stage, "", stage.iterations)
            results.append((state.packed, state.vectors))
        for captured, launched in zip(*results, strict=True):
            assert (captured - launched).square().mean().sqrt() < 1e-3


def test_photo_of_real_size_with_real_weights(shared) -> None:
    """A crop of a photo through TAESD's latent: closer than the latent's own deviation by far, at a low rate."""
    from clric_decoder.image import read_image

    image = read_image(shared / "data/kodak/kodim23.png").pixels
    data = encode(image[100:356, 200:456], vae="taesd", preset="quick", models=shared / "models", quality=50)
    header = read_header(data)
    assert (header.width, header.height, header.space) == (256, 256, "sd1")
    assert header.bpp < 0.25
