"""A panel in a process of its own, and a headless Chromium to look at it."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")


def start(directory: Path, *options: str) -> tuple[subprocess.Popen[bytes], str]:
    """Start a panel over directory/runs; return its process and address once it listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ldm4ts_kernels.cli", "panel", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--runs", str(directory / "runs"), *options],
        env={**os.environ, "LDM4TS_CACHE": str(directory / "cache"), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process, f"http://127.0.0.1:{port}"
        time.sleep(0.1)
    raise AssertionError("the panel does not listen")


@contextmanager
def open_browser() -> Iterator[Any]:
    """Give a browser; playwright brings none along, so it is the machine's own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
