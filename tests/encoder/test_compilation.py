"""What numba compiles, when, and Ctrl-C in the middle."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from clric_encoder.compilation import compilation
from commands import POSIX


@pytest.fixture(autouse=True)
def hear_interrupts() -> Iterator[None]:
    """A shell's background jobs, and what they start, would ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@POSIX
def test_an_interrupt_waits_until_numba_has_left_llvm() -> None:
    # LLVM calls Python back, where an exception would end the process with a segmentation fault.
    numba = pytest.importorskip("numba")
    compiler_lock = pytest.importorskip("numba.core.compiler_lock")
    before = signal.getsignal(signal.SIGINT)
    reached = 0

    def interrupt() -> None:
        nonlocal reached
        with compiler_lock.global_compiler_lock:
            with compiler_lock.global_compiler_lock:
                os.kill(os.getpid(), signal.SIGINT)
                numba.njit(lambda x: x + 1)(1)
            reached = 1
        reached = 2

    with pytest.raises(KeyboardInterrupt), compilation(lambda: None):
        interrupt()
    assert reached == 1
    assert not compiler_lock.global_compiler_lock.is_locked()
    assert signal.getsignal(signal.SIGINT) is before


@POSIX
def test_an_interrupt_at_other_times_is_heard_at_once() -> None:
    reached = False

    def interrupt() -> None:
        nonlocal reached
        os.kill(os.getpid(), signal.SIGINT)
        reached = True

    with pytest.raises(KeyboardInterrupt), compilation(lambda: None):
        interrupt()
    assert not reached


def test_compiled_loops_are_told_and_cached_ones_are_not() -> None:
    numba = pytest.importorskip("numba")
    told: list[None] = []
    loop = numba.njit(lambda x: x + 2)
    with compilation(lambda: told.append(None)):
        loop(1)
        loop(2)
    loop(0.5)
    assert len(told) == 1


@pytest.mark.slow  # it compiles all loops, which takes half a minute
def test_what_is_compiled_ahead_serves_all_presets(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-m", "clric_encoder.compilation"], env=environment, check=True)
    code = (
        "import numpy as np\n"
        "from clric_encoder import compilation, encoding\n"
        "image = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)\n"
        "with compilation.compilation(lambda: print('compiling')):\n"
        "    encoding.encode(image, preset='fast', bpp=1)\n"
        "    encoding.encode(image, preset='default', tune='none')\n"
        "    encoding.encode(image, preset='paper', vae='lite')\n"
        "print('done')"
    )
    result = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert result.stdout == "done\n"
