"""Renewing the pins, with a stand-in for pip that knows the wheels pinned now."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import build_zipapp
from tests.support.screen import screen

ROOT = Path(__file__).resolve().parents[2]
PIP = """import os, sys
sys.path.insert(0, os.environ["ROOT"])
import build_zipapp

words = dict(zip(sys.argv[1:], sys.argv[2:]))
if "-r" in words:  # a pinned one
    pinned = open(words["-r"]).read()
    wheel = next(w for w in build_zipapp.WHEELS if w.sha256 in pinned)
    with open(os.path.join(words["--dest"], wheel.stem + ".whl"), "wb") as target:
        target.write(build_zipapp.fetch(wheel))
    sys.exit()
name, version = sys.argv[-1], words["--python-version"]
platform = [p for p, (s, _) in build_zipapp.PLATFORMS.items() if s.split(".")[0] == words["--platform"]]
wheel = build_zipapp.wheel_for(name, "cp3" + version.split(".")[1], (platform or list(build_zipapp.PLATFORMS))[0])
if name == os.environ.get("BROKEN"):
    sys.exit("ERROR: there is no such thing")
changed, _, into = os.environ.get("CHANGED", "=").partition("=")
file = wheel.stem.replace(wheel.version, into) if name == changed else wheel.stem
tag = os.environ.get("TAG")
file = file.replace(*tag.split("=")) if tag else file
with open(os.path.join(words["--dest"], file + ".whl"), "wb") as target:
    target.write(b"new" if name == changed else build_zipapp.fetch(wheel))
"""


@pytest.fixture
def builder(tmp_path: Path) -> Path:
    """A copy of the builder, beside a pip that needs no network."""
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").write_text("")  # without it, the installed one would be found first
    (tmp_path / "pip" / "__main__.py").write_text(PIP)
    for wheel in build_zipapp.WHEELS:
        build_zipapp.fetch(wheel)
    return Path(shutil.copy(ROOT / "build_zipapp.py", tmp_path))


def update(builder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs `--update`; the stand-in reads the cache of this user, and what it gives goes there only if it is pinned."""
    cache = builder.parent / "cache"
    if not cache.exists():
        shutil.copytree(build_zipapp.cache_folder(), cache / "oppi-build")
    environment = {**os.environ, "PYTHONPATH": str(builder.parent), "ROOT": str(ROOT), "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, str(builder), "--update"]
    return subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, timeout=120)


def test_with_the_same_versions_nothing_changes(builder: Path) -> None:
    before = builder.stat()
    done = update(builder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert builder.read_bytes() == (ROOT / "build_zipapp.py").read_bytes()
    assert builder.stat().st_mtime_ns == before.st_mtime_ns


def test_the_table_is_written_anew_from_nothing(builder: Path) -> None:
    good = builder.read_text()
    begin, end = good.index("WHEELS: list[Wheel] = [\n"), good.index("\n]\n", good.index("WHEELS: list[Wheel] = [\n"))
    text = good[:begin] + "WHEELS: list[Wheel] = [" + good[end:]
    builder.write_text(text.replace('WEBSOCKETS = {"cp39"', 'WEBSOCKETS = {"cp38"'))
    done = update(builder)
    assert (done.returncode, done.stderr) == (0, "")
    assert builder.read_text() == good


def test_a_newer_release_is_pinned_and_shown(builder: Path) -> None:
    done = update(builder, CHANGED="cryptography=99.1")
    assert (done.returncode, done.stderr) == (0, "")
    old, new = (ROOT / "build_zipapp.py").read_text(), builder.read_text()
    ast.parse(new)
    pinned = [wheel for wheel in build_zipapp.WHEELS if wheel.name == "cryptography"]
    for wheel in pinned:
        old = old.replace(wheel.sha256, build_zipapp.sha256(b"new")).replace(f'"{wheel.version}"', '"99.1"')
    assert new == old
    for sign, version in (("-", pinned[0].version), ("+", "99.1")):
        assert done.stdout.count(f'\n{sign}    *pinned("cryptography", "{version}"') == len(pinned)


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({"BROKEN": "qrcode"}, "ERROR: there is no such thing"),
        ({"TAG": "manylinux_2_17_aarch64=manylinux_2_28_aarch64"}, "is tagged otherwise than the table of platforms says"),
    ],
)
def test_what_cannot_be_pinned_changes_nothing(builder: Path, variables: dict[str, str], why: str) -> None:
    done = update(builder, **variables)
    assert done.returncode == 1
    assert why in done.stderr
    assert builder.read_bytes() == (ROOT / "build_zipapp.py").read_bytes()


def test_a_person_sees_what_takes_time(builder: Path, tmp_path: Path) -> None:
    for name in ("oppi.py", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    pinned = builder.read_text()
    builder.write_text(pinned.replace('os.path.join(base, "oppi-build")', 'os.environ["WHEELS"]'))
    command = [sys.executable, str(builder), "--platform", "macos-arm64"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "ROOT": str(ROOT), "WHEELS": str(tmp_path / "wheels")}
    with screen(command, environment, 200, 60) as shown:
        text = shown.shows("ended with")
    wheels = build_zipapp.wheels_for(["macos-arm64"])
    assert "ended with 0" in text and all(f"build_zipapp: downloading {wheel.stem}\n" in text for wheel in wheels)
    assert text.index(" downloading ") < text.index("build_zipapp: packing\n")
