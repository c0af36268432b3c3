"""A minute of fuzzing."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_minute_of_fuzzing_finds_nothing(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="fuzzing needs atheris (tests/fuzz/README.md)")
    script = Path(__file__).with_name("fuzz_decoder.py")
    command = [sys.executable, script, "-max_total_time=60"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert list(tmp_path.iterdir()) == []
