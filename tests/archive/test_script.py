"""oppi.py alone, as a script: its head names the packages it needs, by which uv and pipx start it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = str(ROOT / "oppi.py")
TOOLS = Path(sys.executable).parent  # uv and pipx are installed beside this Python
STARTS = {"uv": ("uv", "run", "--script", SCRIPT), "pipx": ("pipx", "run", SCRIPT)}
KEPT = ("UV_", "PIP_", "SSL_", "HTTP_", "HTTPS_", "NO_PROXY", "ALL_PROXY", "REQUESTS_")  # how this machine gets packages


def empty_home(home: Path) -> dict[str, str]:
    """An environment in which nothing was ever installed."""
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if name.upper().startswith(KEPT)}
    return {**kept, "HOME": str(home), "PATH": os.defpath, "UV_PYTHON": sys.executable, "UV_PYTHON_DOWNLOADS": "never"}


@pytest.fixture(params=STARTS)
def started(request: pytest.FixtureRequest) -> list[str]:
    """The words before the command of oppi."""
    tool, *words = STARTS[request.param]
    return [str(TOOLS / tool), *words]


def test_it_runs_with_the_packages_it_names(started: list[str], tmp_path: Path) -> None:
    environment = empty_home(tmp_path / "home")
    done = subprocess.run(
        [*started, "version", "--json"], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done
    facts = json.loads(done.stdout)
    assert (facts["archive"], facts["wheels"]) == (None, {})
    pair = [*started, "pair", "--json", "--host", "h.local"]  # needs two of the packages
    done = subprocess.run(pair, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done
    assert json.loads(done.stdout)["host"] == "h.local"


def test_it_serves(started: list[str], tmp_path: Path) -> None:
    words = ["serve", "--json", "--host", "127.0.0.1", "--port", "0", "--data-dir", str(tmp_path / "data")]
    process = subprocess.Popen(
        [*started, *words], env=empty_home(tmp_path / "home"), cwd=tmp_path, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        assert told["event"] == "listening"
        with urllib.request.urlopen(f"http://127.0.0.1:{told['port']}/health", timeout=20) as response:
            assert json.load(response)["ok"] is True
        os.kill(told["pid"], signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("words", [("serve", "--port", "0"), ("pair", "--host", "h.local")])
def test_without_the_packages_one_line_says_what_to_do(words: tuple[str, ...], tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path / "home"), "PATH": os.defpath, "OPPI_BONJOUR": "0"}
    command = [sys.executable, "-I", "-S", SCRIPT, *words]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("No module named ")
    assert line.endswith(f"Install it with: {sys.executable} -m pip install websockets cryptography qrcode")
