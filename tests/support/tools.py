"""What tests need from outside: other Pythons of this machine, and the real pi from npm."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

NODE = "22.23.3"  # pi 0.87 needs 22.19; pi 0.73 runs on it too, so that one Node serves both
PI_PACKAGES = {
    "0.73.1": ("@mariozechner/pi-coding-agent", "dist/cli.js"),
    "0.87.1": ("@earendil-works/pi-coding-agent", "dist/bundle/cli.js"),
}
PROBE = "import sys; print(sys.executable); print('%d.%d.%d' % sys.version_info[:3])"


def cache_folder() -> Path:
    """Returns a private folder outside the work tree for what is slow to install."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    folder = folder / "oppi-tests"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Keeps other test processes out while one installs; the lock goes with the process."""
    with open(cache_folder() / f"{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(command: list[str], **options: object) -> str:
    """Runs an installer and returns what it printed, which becomes the error's text if it fails."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )  # type: ignore[call-overload]
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}:\n{done.stdout}")
    return str(done.stdout)


def apt_install(*packages: str) -> None:
    """Installs Debian packages, where that is possible; elsewhere the next step says what is missing."""
    if os.geteuid() == 0 and shutil.which("apt-get"):
        run(["apt-get", "update", "-qq"])
        run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages])


def npm_install(package: str, version: str) -> Path:
    """Installs one npm package with its dependencies, once; returns the folder of the package."""
    home = cache_folder() / f"{package.replace('/', '-').strip('@')}-{version}"
    installed = home / "node_modules" / package
    with locked("npm"):
        if not installed.is_dir():
            if not shutil.which("npm"):
                apt_install("nodejs", "npm")
            temporary = Path(tempfile.mkdtemp(prefix=f"{home.name}.", suffix=".tmp", dir=home.parent))
            try:
                options = ["--no-audit", "--no-fund", "--no-save", "--ignore-scripts", "--engine-strict=false"]
                run(["npm", "install", *options, "--prefix", str(temporary), f"{package}@{version}"])
                temporary.rename(home)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return installed


def node_package() -> str:
    """Returns the npm package that holds a Node executable for this machine."""
    system = {"darwin": "darwin"}.get(sys.platform, "linux")
    machine = "arm64" if platform.machine() in ("arm64", "aarch64") else "x64"
    return f"node-{system}-{machine}"


def install_pi(version: str) -> Path:
    """Installs the real pi of this version, once, and returns a `pi` executable that needs nothing from PATH."""
    package, script = PI_PACKAGES[version]
    node = npm_install(node_package(), NODE) / "bin" / "node"
    script_path = npm_install(package, version) / script
    launcher = cache_folder() / f"pi-{version}" / "pi"
    text = f'#!/bin/sh\nexec "{node}" "{script_path}" "$@"\n'
    with locked("npm"):
        if not launcher.exists() or launcher.read_text() != text:
            launcher.parent.mkdir(exist_ok=True)
            temporary = launcher.with_suffix(".tmp")
            temporary.write_text(text)
            temporary.chmod(0o755)
            temporary.rename(launcher)
    return launcher


def find_pythons() -> dict[str, tuple[int, ...]]:
    """Returns every distinct CPython of this machine with its version: those on PATH and those pyenv built."""
    names = ["python3", "python2.7", *(f"python3.{minor}" for minor in range(6, 16))]
    folders = os.environ.get("PATH", "").split(os.pathsep)
    found = [path for name in names for folder in folders if (path := shutil.which(name, path=folder))]
    pyenv = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
    found += glob.glob(os.path.join(glob.escape(pyenv), "versions", "*", "bin", "python"))
    pythons: dict[str, tuple[int, ...]] = {}
    for path in [sys.executable, *dict.fromkeys(found)]:
        with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
            done = subprocess.run([path, "-c", PROBE], capture_output=True, text=True, timeout=20)
            executable, version = done.stdout.split("\n")[:2]
            pythons.setdefault(os.path.realpath(executable), tuple(map(int, version.split("."))))
    return dict(sorted(pythons.items(), key=lambda item: item[1]))
