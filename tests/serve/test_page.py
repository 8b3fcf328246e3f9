"""Page at `/` in a real browser: Chromium, driven by playwright-core from npm in a temporary folder."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.makers import save_images
from tests.serve.makers import RunningServer, small_vlm

CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="module")
def playwright(tmp_path_factory) -> Path:
    """The folder that playwright-core is installed in."""
    if not CHROMIUM.exists() or not shutil.which("node") or not shutil.which("npm"):
        pytest.skip(f"the page is tested with node, npm and {CHROMIUM}")
    folder = tmp_path_factory.mktemp("playwright")
    command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), "playwright-core@1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        pytest.skip(f"npm has no playwright-core here: {done.stderr.strip()[:200]}")
    return folder


@pytest.mark.nightly
def test_the_page_asks_streams_stops_and_is_usable_by_keyboard_and_on_a_phone(playwright, tmp_path):
    save_images(tmp_path, ["red", "blue"])
    with RunningServer(small_vlm(), max_images=4) as server:
        command = ["node", str(Path(__file__).with_name("browser.mjs")), server.url, str(tmp_path), str(playwright)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
