"""Headless Chromium for the tests that look at a page as a reader would."""

import functools
import json
import os
import re
import shutil
import subprocess
import tempfile
from html import unescape
from pathlib import Path

INSTALL = "apt-get update && apt-get install -y chromium"
NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
# Without these Chromium opens connections of its own at every start.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


@functools.cache
def chromium() -> str:
    """Path of Chromium; installed where the tests run as root on a Debian machine."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "chromium"]):
            subprocess.run(command, env=environment, capture_output=True, timeout=300, check=False)
        found = shutil.which("chromium")
    if found is None:
        raise AssertionError(f"Chromium was not found, the report's page cannot be looked at; install it with: {INSTALL}")
    return found


def _start(*arguments: str) -> str:
    with tempfile.TemporaryDirectory() as profile:
        command = [chromium(), *FLAGS, f"--user-data-dir={profile}", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def screenshot(page: Path, picture: Path, width: int, height: int, *flags: str) -> None:
    """Write a PNG of the page's first `height` pixels at a window `width` pixels wide."""
    _start(f"--window-size={width},{height}", f"--screenshot={picture}", *flags, page.resolve().as_uri())


def evaluate(page: str, script: str, widths: tuple[int, ...], folder: Path) -> dict[int, object]:
    """Run a script's `probe()` inside the page at each width and return its values, all in one start.

    NOTE: a headless window is at least 500 pixels wide when the DOM is dumped, so each width is a frame of its own.
    """
    inner = page.replace("</body>", f"<script>{script}\nparent.postMessage([innerWidth, probe()], '*')</script></body>")
    frames = "".join(f'<iframe width="{width}" height="900" style="border:0"></iframe>' for width in widths)
    outer = f"""<!doctype html><body>{frames}<script>
    const found = {{}};
    addEventListener("message", (event) => {{
      found[event.data[0]] = event.data[1];
      document.body.dataset.found = JSON.stringify(found);
    }});
    const text = {json.dumps(inner).replace("</", "<" + chr(92) + "/")};
    for (const frame of document.querySelectorAll("iframe")) frame.srcdoc = text;
    </script></body>"""
    path = folder / "probe.html"
    path.write_text(outer, encoding="utf-8")
    dom = _start("--virtual-time-budget=10000", "--window-size=1600,900", "--dump-dom", path.resolve().as_uri())
    match = re.search(r'data-found="([^"]*)"', dom)
    assert match, "the probe did not report"
    return {int(width): value for width, value in json.loads(unescape(match[1])).items()}
