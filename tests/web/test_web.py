"""The browser decoder in decoder/web: its own tests, in Node and in Chromium, as a part of this suite."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

WEB = Path(__file__).resolve().parents[2] / "decoder" / "web"
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")


def node_tests(*files: str) -> None:
    """Runs test files with Node; their output is shown where they fail."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node is missing: apt-get install nodejs npm (18 or later)")
    done = subprocess.run([node, "--test", *files], cwd=WEB, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_bytes_to_latent_in_node() -> None:
    node_tests("test/stream.test.mjs")


def need_packages() -> None:
    if not (WEB / "node_modules").exists():
        pytest.skip(f"{WEB / 'node_modules'} is missing: npm ci --ignore-scripts in {WEB}")


def test_the_package_with_a_bundler_and_typescript() -> None:
    need_packages()
    node_tests("test/package.test.mjs")


def test_the_package_in_chromium() -> None:
    if not Path(CHROMIUM).exists():
        pytest.skip(f"{CHROMIUM} is missing: apt-get install chromium, or set CHROMIUM")
    need_packages()
    node_tests("test/browser.test.mjs")
