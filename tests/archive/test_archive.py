"""The archive and its bootstrap: what people download first has to start, or to say on one line why not."""

from __future__ import annotations

import ast
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from packaging import tags

import build_zipapp
from tests.bench.common import child_cpu, cpu_seconds
from tests.support.phone import Phone
from tests.support.tools import find_pythons

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = find_pythons()
SUPPORTED = {python: version for python, version in PYTHONS.items() if version >= (3, 9, 2)}
TOO_OLD = {python: version for python, version in PYTHONS.items() if version < (3, 9, 2)}
STAND_IN = """import sys
def main(argv=None):
    if "wait" in sys.argv:
        print("ready", flush=True)
        sys.stdin.read()
    if "packages" in sys.argv:
        import cryptography.x509, qrcode, websockets.server
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        Ed25519PrivateKey.generate().sign(b"")
        print(websockets.__file__, qrcode.__file__, cryptography.__file__, sep="\\n")
    else:
        print(sys.argv, ARCHIVE, UNPACKED, __file__)
    return 7
"""
HERE = ("macos-" if sys.platform == "darwin" else "linux-") + os.uname().machine
MACHO, LC_CODE_SIGNATURE = 0xFEEDFACF, 0x1D


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of the real oppi.py for every platform."""
    path = tmp_path_factory.mktemp("archive") / "oppi.pyz"
    assert build_zipapp.main(["-o", str(path)]) == 0
    return path


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of a stand-in for oppi.py that tells what it was given; only for this platform."""
    return build_stand_in(tmp_path_factory.mktemp("small"), HERE)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty home folder."""
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture
def umask() -> Iterator[None]:
    """Puts the umask back that a test changes."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def build_stand_in(folder: Path, platform: str, variant: str = "") -> Path:
    """Builds an archive of the stand-in for one platform; another `variant` is another build."""
    source, path = folder / f"oppi{variant}.py", folder / f"small{variant}.pyz"
    source.write_text(STAND_IN + f"# {variant}\n")
    assert build_zipapp.main(["-o", str(path), "--source", str(source), "--platform", platform]) == 0
    return path


def start(
    archive: Path, home: Path, *arguments: str, python: str = sys.executable, before: Sequence[str] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    """Starts an archive from an empty folder with nothing but the standard library."""
    folder = home.parent / "empty"
    folder.mkdir(exist_ok=True)
    environment = {"HOME": str(home), "PATH": os.defpath, **variables}
    old = "python2" in os.path.basename(os.path.realpath(python))
    command = [*before, python, *([] if old else ["-I"]), "-S", str(archive), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert os.listdir(folder) == []
    return done


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """Checks that a start failed with one line on stderr, and returns the line."""
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr.strip()


def unpacked(cache: Path) -> Path:
    """Returns the one folder in a cache."""
    folders = list(cache.iterdir())
    assert len(folders) == 1
    return folders[0]


def places(manifest: dict[str, Any], tag: str) -> dict[str, str]:
    """Returns where each file of a target lies below its unpacked folder, and its name in the archive."""
    prefixes = manifest["unpacked"][tag].items()
    return {
        place + name[len(prefix) :]: name
        for name in manifest["files"]
        for prefix, place in prefixes
        if name.startswith(prefix)
    }


def rewrite(source: Path, target: Path, change: dict[str, bytes]) -> Path:
    """Copies an archive with some files replaced."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            new.writestr(info, change.get(info.filename, old.read(info.filename)), zipfile.ZIP_STORED)
    return target


# -- what is inside ----------------------------------------------------------------------------------------------------


def test_contains_the_identical_source_and_says_what_it_is_made_of(archive: Path) -> None:
    with zipfile.ZipFile(archive) as pack:
        assert pack.testzip() is None
        manifest = json.loads(pack.read("manifest.json"))
        assert pack.read("oppi.py") == (ROOT / "oppi.py").read_bytes()
        names = set(pack.namelist()) - {"__main__.py", "manifest.json"}
        assert manifest["files"] == {name: hashlib.sha256(pack.read(name)).hexdigest() for name in names}
        assert manifest["build"] in pack.read("__main__.py").decode("ascii")
    assert {wheel["sha256"] for wheel in manifest["wheels"]} == {wheel.sha256 for wheel in build_zipapp.WHEELS}


def test_leaves_out_what_does_not_run_and_keeps_the_licences(archive: Path) -> None:
    with zipfile.ZipFile(archive) as pack:
        names = pack.namelist()
    assert not [name for name in names if re.search(r"\.pyc$|/tests/|console_scripts|\.pyi$|\.c$", name)]
    for wheel in build_zipapp.WHEELS:
        assert [name for name in names if name.startswith(f"licenses/{wheel.release}/")], wheel.release


def test_is_small_enough(archive: Path, tmp_path: Path) -> None:
    slim = tmp_path / "slim.pyz"
    assert build_zipapp.main(["-o", str(slim), "--platform", "macos-arm64"]) == 0
    assert archive.stat().st_size <= 22_000_000
    assert slim.stat().st_size <= 7_000_000


@pytest.mark.parametrize("platform", build_zipapp.PLATFORMS)
@pytest.mark.parametrize("python", build_zipapp.PYTHONS)
def test_has_what_each_claimed_python_and_platform_imports(archive: Path, python: str, platform: str) -> None:
    with zipfile.ZipFile(archive) as pack:
        files = {name: pack.read(name) for name in pack.namelist()}
    key, words, _ = build_zipapp.make_target(files, python, platform)
    assert f"{key!r}: {words!r}" in files["__main__.py"].decode()
    assert {wheel["sha256"] for wheel in json.loads(files["manifest.json"])["wheels"]} >= {
        importable(build_zipapp.wheel_for(name, python, platform), python, platform).sha256
        for name in build_zipapp.PACKAGES
    }
    tag, *rest = words.split()
    natives = list(zip(rest[::2], rest[1::2]))
    assert tag == f"{python}-{platform}"
    there = {place: files[name] for place, name in places(json.loads(files["manifest.json"]), tag).items()}
    assert {"oppi.py", "qrcode/main.py", "websockets/server.py", "cryptography/__init__.py"} <= set(there)
    assert {name.split(".")[0] for name, _ in natives} == {"_cffi_backend", "cryptography/hazmat/bindings/_rust"}
    for name, expected in natives:
        assert hashlib.sha256(there["native/" + name]).hexdigest() == expected
        check_binary(there["native/" + name], platform)
        assert f"-{python[2:]}-" in name or f"cpython-{python[2:]}" in name or name.endswith(".abi3.so")


def importable(wheel: build_zipapp.Wheel, python: str, platform: str) -> build_zipapp.Wheel:
    """Checks that an installer would take the wheel for this interpreter, on the oldest system the platform stands for."""
    version = (3, int(python[3:]))
    suffixes = build_zipapp.PLATFORMS[platform][0].split(".")
    if platform.startswith("macos"):
        suffixes = list(tags.mac_platforms((11, 0), "arm64"))
    fitting = {*tags.cpython_tags(version, [python], suffixes), *tags.compatible_tags(version, python, suffixes)}
    assert tags.parse_tag(wheel.tag) & fitting
    return wheel


def test_everything_is_as_it_is_in_the_pinned_wheels(archive: Path) -> None:
    ours = {"oppi.py", "oppi_unpack.py", "__main__.py", "manifest.json", "licenses/LICENSE"}
    with zipfile.ZipFile(archive) as pack:
        left = set(pack.namelist()) - ours
        for wheel in build_zipapp.WHEELS:
            data = build_zipapp.fetch(wheel)
            assert hashlib.sha256(data).hexdigest() == wheel.sha256
            with zipfile.ZipFile(io.BytesIO(data)) as original:
                for name in original.namelist():
                    place = build_zipapp.place(wheel, name)
                    if place:
                        assert pack.read(place) == original.read(name)
                        left.discard(place)
                    assert place or not name.endswith(".so")
    assert left == set()


def check_binary(data: bytes, platform: str) -> None:
    """Checks the machine of a native file, on macOS that its signature ends where it does, on Linux which glibc it needs."""
    if platform == "macos-arm64":
        word = [int.from_bytes(data[at : at + 4], "little") for at in range(0, 32, 4)]
        assert word[:2] == [MACHO, 0x0100000C]
        at, commands = 32, {}
        for _ in range(word[4]):
            command, size = (int.from_bytes(data[at + i : at + i + 4], "little") for i in (0, 4))
            commands[command] = data[at : at + size]
            at += size
        begin, length = (int.from_bytes(commands[LC_CODE_SIGNATURE][i : i + 4], "little") for i in (8, 12))
        assert data[begin : begin + 4] == bytes.fromhex("fade0cc0")
        assert begin + length == len(data)
    else:
        machine = {"linux-x86_64": 62, "linux-aarch64": 183}[platform]
        assert data[:5] == b"\x7fELF\x02" and int.from_bytes(data[18:20], "little") == machine
        promised = tuple(map(int, re.findall(r"manylinux_(\d+)_(\d+)_", build_zipapp.PLATFORMS[platform][0])[0]))
        needed = {tuple(map(int, found.split(b"."))) for found in re.findall(rb"\0GLIBC_([0-9.]+)(?=\0)", data)}
        assert needed and max(needed) <= promised


def test_two_builds_are_equal_whatever_surrounds_them(archive: Path, tmp_path: Path, umask: None) -> None:
    os.umask(0o077)
    for name in ("build_zipapp.py", "oppi.py", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    environment = {**os.environ, "TZ": "Pacific/Kiritimati", "LC_ALL": "C", "PYTHONHASHSEED": "99"}
    command = [sys.executable, "build_zipapp.py"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "oppi.pyz").read_bytes() == archive.read_bytes()
    assert (tmp_path / "oppi.pyz").stat().st_mode & 0o777 == 0o755


def test_a_wheel_with_another_hash_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wheel = build_zipapp.WHEELS[0]
    cached = tmp_path / "oppi-build" / f"{wheel.stem}.whl"

    def download(wheel: build_zipapp.Wheel, folder: str) -> None:
        cached.write_bytes(b"something else")

    monkeypatch.setattr(build_zipapp, "download", download)
    with pytest.raises(build_zipapp.BuildError, match=r"does not have the pinned sha256"):
        build_zipapp.fetch(wheel)


# -- starting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("python", SUPPORTED)
def test_starts_with_every_python_of_this_machine(archive: Path, home: Path, python: str) -> None:
    for _ in range(2):  # unpacks, then uses what is there
        done = start(archive, home, "--version", python=python)
        assert (done.returncode, done.stderr) == (0, "")
    cache = home / ("Library/Caches/oppi" if sys.platform == "darwin" else ".cache/oppi")
    assert cache.stat().st_mode & 0o777 == 0o700
    assert [path for path in cache.rglob("*") if path.name != "__pycache__" and path.stat().st_mode & 0o077] == []


@pytest.mark.parametrize("python", SUPPORTED)
def test_the_packages_come_from_the_archive(small: Path, home: Path, tmp_path: Path, python: str) -> None:
    done = start(small, home, "packages", python=python, OPPI_CACHE_DIR=str(tmp_path / "cache"))
    assert (done.returncode, done.stderr) == (7, "")
    folder = str(unpacked(tmp_path / "cache"))
    assert all(line.startswith(folder) for line in done.stdout.splitlines())


def test_oppi_gets_its_arguments_its_archive_and_gives_its_status(small: Path, home: Path, tmp_path: Path) -> None:
    done = start(small, home, "a", "b", OPPI_CACHE_DIR=str(tmp_path / "cache"))
    where = unpacked(tmp_path / "cache")
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout == f"{[str(small), 'a', 'b']} {small} {where} {where / 'oppi.py'}\n"


def test_the_manifest_says_where_each_unpacked_file_comes_from(archive: Path, home: Path, tmp_path: Path) -> None:
    assert start(archive, home, "--version", OPPI_CACHE_DIR=str(tmp_path / "cache")).returncode == 0
    folder = unpacked(tmp_path / "cache")
    with zipfile.ZipFile(archive) as pack:
        manifest = json.loads(pack.read("manifest.json"))
        build, tag = folder.name.split("-", 1)
        assert manifest["build"].startswith(build)
        for place, name in places(manifest, tag).items():
            assert (folder / place).read_bytes() == pack.read(name)
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {name for name in there if not name.endswith(".pyc")} == set(places(manifest, tag))


def test_verify_runs_from_the_archive_and_judges_nothing_itself(small: Path, home: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    variables, inside = {"OPPI_CACHE_DIR": str(cache)}, small / "oppi.py"
    done = start(small, home, "verify", **variables)
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout == f"{[str(small), 'verify']} {small}  {inside}\n"
    assert not cache.exists()
    assert start(small, home, **variables).returncode == 7
    folder = unpacked(cache)
    (folder / "oppi.py").write_text("raise SystemExit('somebody else was here')\n")
    for native in folder.rglob("*.so"):
        native.write_bytes(b"changed")
    before = sorted(folder.rglob("*"))
    done = start(small, home, "verify", "-x", **variables)
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout == f"{[str(small), 'verify', '-x']} {small} {folder} {inside}\n"
    assert sorted(folder.rglob("*")) == before


def test_first_starts_at_once_all_work(archive: Path, home: Path) -> None:
    environment = {"HOME": str(home), "OPPI_CACHE_DIR": str(home / "cache")}
    command = [sys.executable, "-I", "-S", str(archive), "--version"]
    processes = [subprocess.Popen(command, env=environment, stdout=-1, stderr=-1) for _ in range(4)]
    results = [(process.communicate(timeout=120)[1], process.returncode) for process in processes]
    assert results == [(b"", 0)] * 4
    unpacked(home / "cache")


def test_first_starts_of_several_builds_at_once_all_work(variants: list[Path], home: Path) -> None:
    environment = {"HOME": str(home), "OPPI_CACHE_DIR": str(home / "cache")}
    for _ in range(3):
        processes = [
            subprocess.Popen([sys.executable, "-I", "-S", str(path)], env=environment, stdout=-1, stderr=-1)
            for path in variants * 3
        ]
        results = [(process.communicate(timeout=120)[1], process.returncode) for process in processes]
        assert results == [(b"", 7)] * len(processes)
    assert [name for name in os.listdir(home / "cache") if name.endswith(".tmp")] == []


def test_the_loser_of_the_race_uses_the_winners_folder(tmp_path: Path) -> None:
    mine, winner = tmp_path / "x.tmp", tmp_path / "x"
    for folder in (mine, winner):
        folder.mkdir()
        (folder / "who").write_text(folder.name)
    assert not build_zipapp.publish(str(mine), str(winner))
    assert (winner / "who").read_text() == "x"


def test_only_a_first_start_on_a_terminal_says_what_it_does(small: Path, home: Path, tmp_path: Path) -> None:
    environment = {"HOME": str(home), "OPPI_CACHE_DIR": str(tmp_path / "cache")}
    shown = []
    for _ in range(2):
        ours, theirs = os.openpty()
        with open(ours, "rb", 0) as terminal:
            command = [sys.executable, "-I", "-S", str(small)]
            done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=theirs)
            os.write(theirs, b"end\n")  # so that there is something to read in any case
            os.close(theirs)
            text = b""
            while not text.endswith(b"end\r\n"):
                text += terminal.read(1000)
            shown.append(text)
        assert done.returncode == 7
    assert shown == [b"oppi: unpacking for the first start...\r\nend\r\n", b"end\r\n"]


@pytest.mark.parametrize("python", SUPPORTED)
def test_a_command_that_loads_nothing_native_costs_little(archive: Path, home: Path, tmp_path: Path, python: str) -> None:
    """Measured by turns, so that all of them see the same machine; what else it does can only make one dearer."""
    environment = {"HOME": str(home), "PATH": os.defpath, "OPPI_DATA_DIR": str(tmp_path / "data")}
    commands = {
        "python": [python, "-c", "import argparse, json, zipfile"],
        "status": [python, str(archive), "status"],
        "config": [python, str(archive), "config", "get", "port"],
    }
    used: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(10):
        for name, command in commands.items():
            used[name].append(child_cpu(command, environment, tmp_path))
    least = {name: min(seconds[1:]) for name, seconds in used.items()}  # the first one unpacks
    assert least["status"] <= 1.5 * least["python"], least
    assert least["config"] <= 1.5 * least["python"], least


@pytest.mark.parametrize("python", SUPPORTED)
def test_a_server_is_soon_healthy(archive: Path, home: Path, tmp_path: Path, python: str) -> None:
    """CPU from its start to the first healthy answer: with nothing there yet, and then."""
    environment = {"HOME": str(home), "PATH": os.defpath, "OPPI_DATA_DIR": str(tmp_path / "data"), "OPPI_BONJOUR": "0"}
    command = [python, "-I", "-S", str(archive), "serve", "--json", "--port", "0", "--host", "127.0.0.1"]
    used = []
    for _ in range(4):
        with subprocess.Popen(command, env=environment, stdout=-1, stdin=subprocess.DEVNULL) as process:
            try:
                assert process.stdout is not None
                port = json.loads(process.stdout.readline())["port"]
                assert Phone(f"http://127.0.0.1:{port}").health()["ok"] is True
                used.append(cpu_seconds(process.pid))
            finally:
                process.terminate()
    assert used[0] <= 1.0 and min(used[1:]) <= 0.30, used


# -- removing what was unpacked before ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three builds for this platform."""
    folder = tmp_path_factory.mktemp("variants")
    return [build_stand_in(folder, HERE, variant) for variant in "abc"]


@pytest.fixture
def flock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Returns a function that makes something happen once, right before the next lock is taken."""

    def before_next(happens: Callable[[], Any]) -> None:
        def locking(descriptor: int, how: int) -> None:
            monkeypatch.setattr(fcntl, "flock", real)
            happens()
            real(descriptor, how)

        monkeypatch.setattr(fcntl, "flock", locking)

    real = fcntl.flock
    return before_next


def names(cache: Path) -> set[str]:
    """The folders in a cache."""
    return set(os.listdir(cache))


def old_folder(cache: Path, end: str = "") -> Path:
    """Makes a folder like one that another build has left."""
    folder = cache / f"{'0' * 20}-cp311-{HERE}{end}"
    (folder / "native").mkdir(parents=True)
    (folder / "native" / "x.so").write_text("")
    return folder


def test_an_old_build_is_removed_unless_it_is_in_use(variants: list[Path], home: Path, tmp_path: Path) -> None:
    used, first, second = variants
    cache = {"OPPI_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-I", "-S", str(used), "wait"]
    with subprocess.Popen(command, env={"HOME": str(home), **cache}, stdin=-1, stdout=-1) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        kept = unpacked(tmp_path / "cache")
        assert start(first, home, **cache).returncode == 7
        assert len(names(tmp_path / "cache")) == 2
        (old,) = names(tmp_path / "cache") - {kept.name}
        assert start(second, home, **cache).returncode == 7
        assert kept.is_dir() and len(names(tmp_path / "cache")) == 2 and old not in names(tmp_path / "cache")
        process.communicate(timeout=60)
        assert process.returncode == 7
    assert start(second, home, **cache).returncode == 7
    assert kept.is_dir()  # only a first start looks for what is left
    assert start(first, home, **cache).returncode == 7
    assert names(tmp_path / "cache") == {old}


def test_a_server_that_unpacked_itself_holds_its_folder(
    archive: Path, small: Path, home: Path, tmp_path: Path
) -> None:
    """Its first start ends in another one of the same process, where the lock has to be taken anew."""
    cache = {"OPPI_CACHE_DIR": str(tmp_path / "cache")}
    environment = {"HOME": str(home), "PATH": os.defpath, "OPPI_DATA_DIR": str(tmp_path / "data"), **cache}
    command = [sys.executable, str(archive), "serve", "--port", "0", "--host", "127.0.0.1"]
    with subprocess.Popen(command, env=environment, stdout=-1, stdin=subprocess.DEVNULL) as process:
        try:
            assert process.stdout is not None
            assert b"is listening" in process.stdout.readline()
            kept = unpacked(tmp_path / "cache")
            assert len(list(kept.glob("__pycache__/oppi.*.pyc"))) == 1
            assert start(small, home, **cache).returncode == 7
            assert kept.is_dir()
        finally:
            process.terminate()
            process.stdout.read()
    build_zipapp.prune(str(tmp_path / "cache"), "none")
    assert names(tmp_path / "cache") == set()


def test_only_what_nobody_holds_and_what_is_ours_is_removed(tmp_path: Path) -> None:
    kept = {"notes", "0123-cp311-linux-x86_64", f"{'a' * 20}-cp312-{HERE}", f"{'0' * 20}-cp39-{HERE}"}
    for name in kept - {f"{'0' * 20}-cp39-{HERE}"}:
        (tmp_path / name).mkdir()
    (tmp_path / f"{'0' * 20}-cp39-{HERE}").symlink_to(tmp_path / "notes")
    held = build_zipapp.hold(str(old_folder(tmp_path, f".{'1' * 16}.tmp")))  # somebody unpacks it just now
    assert not os.get_inheritable(held)
    old_folder(tmp_path)
    old_folder(tmp_path, f".{'2' * 16}.tmp")
    (tmp_path / f"{'a' * 20}-cp312-{HERE}.{'3' * 16}.tmp").mkdir()
    build_zipapp.prune(str(tmp_path), "a" * 20)
    assert names(tmp_path) == kept | {f"{'0' * 20}-cp311-{HERE}.{'1' * 16}.tmp"}
    os.close(held)
    build_zipapp.prune(str(tmp_path), "a" * 20)
    assert names(tmp_path) == kept


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_is_removed_before_it_is_locked_is_not_held(
    tmp_path: Path, flock: Callable[[Callable[[], Any]], None], again: bool
) -> None:
    folder, moved = old_folder(tmp_path), tmp_path / "moved"

    def remove() -> None:
        folder.rename(moved)
        if again:
            old_folder(tmp_path)

    flock(remove)
    before = len(os.listdir("/dev/fd"))
    assert build_zipapp.hold(str(folder)) == -1
    assert len(os.listdir("/dev/fd")) == before
    assert build_zipapp.hold(str(tmp_path / "nothing")) == -1


def test_a_folder_that_is_made_anew_is_not_removed_for_the_old_one(
    tmp_path: Path, flock: Callable[[Callable[[], Any]], None]
) -> None:
    folder = old_folder(tmp_path)

    def swap() -> None:
        folder.rename(tmp_path / "moved")
        old_folder(tmp_path)

    flock(swap)
    build_zipapp.prune(str(tmp_path), "a" * 20)
    assert names(tmp_path) == {folder.name, "moved"}


def test_nothing_is_removed_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    held = build_zipapp.hold(str(old_folder(tmp_path)))
    build_zipapp.prune(str(tmp_path), "a" * 20)
    assert len(names(tmp_path)) == 1
    os.close(held)


def test_what_is_being_unpacked_is_held_from_the_first_file_to_the_last_use(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag, write, seen = f"cp311-{HERE}", build_zipapp.write_synced, []
    folder = tmp_path / f"{'b' * 20}-{tag}"

    def write_and_prune(path: str, data: bytes) -> None:
        build_zipapp.prune(str(tmp_path), "none")
        seen.append(names(tmp_path))
        write(path, data)

    monkeypatch.setattr(build_zipapp, "write_synced", write_and_prune)
    held = build_zipapp.unpack(str(small), str(folder), tag)
    assert held >= 0 and len(seen) > 100
    assert all(len(found) == 1 and found == seen[0] for found in seen)
    build_zipapp.prune(str(tmp_path), "none")
    assert names(tmp_path) == {folder.name}
    os.close(held)
    build_zipapp.prune(str(tmp_path), "none")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("at", ["before the lock", "after the last file"])
def test_a_first_start_whose_folder_is_removed_starts_over(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flock: Callable[[Callable[[], Any]], None], at: str
) -> None:
    tag, publish, root = f"cp311-{HERE}", build_zipapp.publish, tmp_path / "cache"
    folder = root / f"{'b' * 20}-{tag}"

    def lose(temporary: str, final: str) -> bool:
        """Another start was faster, and what it made is gone before it can be held."""
        monkeypatch.setattr(build_zipapp, "publish", publish)
        return False

    def remove_all() -> None:
        for path in root.iterdir():
            shutil.rmtree(path)

    monkeypatch.setattr(sys, "argv", ["oppi"])
    root.mkdir(mode=0o700)
    if at == "before the lock":
        flock(remove_all)
    else:
        monkeypatch.setattr(build_zipapp, "publish", lose)
    build_zipapp.first_start(str(small), str(root), str(folder), tag)
    assert (folder / "oppi.py").is_file()
    assert names(root) == {folder.name}
    build_zipapp.prune(str(root), "none")
    assert names(root) == {folder.name}  # held


def test_a_first_start_does_not_try_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_zipapp, "unpack", lambda archive, folder, tag: -1)
    with pytest.raises(OSError, match="again and again"):
        build_zipapp.first_start("oppi.pyz", str(tmp_path / "cache"), str(tmp_path / "cache" / "x"), "tag")


# -- refusing ----------------------------------------------------------------------------------------------------------


def test_the_bootstrap_parses_on_every_python(archive: Path) -> None:
    with zipfile.ZipFile(archive) as pack:
        sources = [pack.read(name).decode("ascii") for name in ("__main__.py", "oppi_unpack.py")]
    for source in sources:
        check_syntax(source)


def check_syntax(source: str) -> None:
    """Checks that a source has no syntax that Python 2.7 or an early Python 3 does not know."""
    for version in ((3, 4), (3, 6), (3, 9)):
        ast.parse(source, feature_version=version)
    newer = (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.AsyncFunctionDef, ast.Nonlocal, ast.Starred)
    for node in ast.walk(ast.parse(source)):  # nothing that Python 2.7 has no syntax for
        assert not isinstance(node, newer)
        assert not (isinstance(node, ast.Raise) and node.cause)
        assert not (isinstance(node, ast.FunctionDef) and (node.returns or node.args.kwonlyargs))
        assert not (isinstance(node, ast.arg) and node.annotation)


@pytest.mark.skipif(not TOO_OLD, reason="no Python older than 3.9.2 on this machine")
@pytest.mark.parametrize("python", TOO_OLD)
def test_an_old_python_is_told_what_is_needed(archive: Path, home: Path, python: str) -> None:
    line = refused(start(archive, home, "--version", python=python))
    assert line.startswith("oppi needs Python 3.9.2 or newer; this is Python " + ".".join(map(str, TOO_OLD[python])))
    assert os.listdir(home) == []


def test_a_platform_without_parts_is_told_which_have_some(home: Path, tmp_path: Path) -> None:
    platform = next(name for name in build_zipapp.PLATFORMS if name != HERE)
    line = refused(start(build_stand_in(tmp_path, platform), home))
    assert line.startswith(f"oppi: this archive does not run with {sys.implementation.cache_tag}")
    assert line.endswith(f"it runs with CPython 3.9 to 3.14 on {platform}")


@pytest.mark.parametrize("change", ["first", "last", "longer", "remove"])
def test_a_changed_native_file_is_not_loaded(archive: Path, home: Path, tmp_path: Path, change: str) -> None:
    variables = {"OPPI_CACHE_DIR": str(tmp_path / "cache"), "OPPI_DATA_DIR": str(tmp_path / "data")}
    assert start(archive, home, "--version", **variables).returncode == 0
    folder = unpacked(tmp_path / "cache")
    natives = sorted((folder / "native").rglob("*.so"))
    assert len(natives) == 2
    for native in natives:
        good = native.read_bytes()
        bad = {"first": bytes([good[0] ^ 1]) + good[1:], "last": good[:-1] + bytes([good[-1] ^ 1]), "longer": good + b"x"}
        if change == "remove":
            native.unlink()
        else:
            native.write_bytes(bad[change])
        assert start(archive, home, "config", "get", "port", **variables).returncode == 0  # loads none of them
        for command in (["pair", "--host", "127.0.0.1"], ["serve", "--port", "0"]):
            line = refused(start(archive, home, *command, **variables))
            assert line == f"oppi: {native} is missing or was changed; delete the folder {folder} and start again"
        native.write_bytes(good)
    shutil.rmtree(folder)
    assert start(archive, home, "--version", **variables).returncode == 0


def test_no_native_file_is_found_without_being_checked(small: Path, home: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert start(small, home, "packages", OPPI_CACHE_DIR=str(cache)).returncode == 7
    code = "import sys; sys.path[:0] = [sys.argv[1]]; import {}"
    for module in ("_cffi_backend", "cryptography.hazmat.bindings._rust"):
        command = [sys.executable, "-I", "-S", "-c", code.format(module), str(unpacked(cache))]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stderr.splitlines()[-1] == f"ModuleNotFoundError: No module named '{module}'"


def test_a_damaged_archive_is_refused_and_leaves_nothing(archive: Path, home: Path, tmp_path: Path) -> None:
    native = next(wheel for wheel in build_zipapp.WHEELS if wheel.name == "qrcode")
    change = {f"lib/{native.release}/qrcode/main.py": b"print('somebody else was here')\n"}
    broken = rewrite(archive, tmp_path / "broken.pyz", change)
    line = refused(start(broken, home, "--version", OPPI_CACHE_DIR=str(tmp_path / "cache")))
    assert line == f"oppi: {broken} is damaged; download or build it again"
    assert os.listdir(tmp_path / "cache") == []


@pytest.mark.parametrize("size", [100, 1000, 0.5, -1])
def test_an_incomplete_archive_is_told_apart(archive: Path, home: Path, tmp_path: Path, size: float) -> None:
    data, broken = archive.read_bytes(), tmp_path / "broken.pyz"
    broken.write_bytes(data[: int(len(data) * size) if size == 0.5 else int(size)])
    line = refused(start(broken, home, "--version"))
    assert line.endswith("this-archive-is-incomplete--download-it-again")


def test_a_flipped_byte_inside_the_archive_is_refused(archive: Path, home: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pyz"
    data = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as pack:
        data[pack.getinfo("oppi.py").header_offset + 60] ^= 0xFF
    broken.write_bytes(data)
    assert "is damaged" in refused(start(broken, home, "--version", OPPI_CACHE_DIR=str(tmp_path / "cache")))
    assert os.listdir(tmp_path / "cache") == []


@pytest.mark.parametrize("place", ["file", "below a file", "nowhere"])
def test_a_cache_that_cannot_be_written_is_one_line(archive: Path, home: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    folder = {"file": str(tmp_path / "file"), "below a file": str(tmp_path / "file" / "x"), "nowhere": "/dev/null/x"}
    line = refused(start(archive, home, "--version", OPPI_CACHE_DIR=folder[place]))
    assert line.startswith(f"oppi: cannot unpack into {folder[place]}: ")
    assert "OPPI_CACHE_DIR" in line


def test_a_full_disk_is_one_line_and_leaves_nothing(archive: Path, home: Path, tmp_path: Path) -> None:
    code = (
        "import resource, runpy, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000000, 1000000))\n"  # writing past it fails like a full disk
        f"sys.argv = [{str(archive)!r}]\nrunpy.run_path({str(archive)!r}, run_name='__main__')\n"
    )
    environment = {"HOME": str(home), "OPPI_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], env=environment, capture_output=True, text=True)
    assert "cannot unpack into" in refused(done)
    assert os.listdir(tmp_path / "cache") == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("fails", ["makedirs", "mkdir", "fsync", "rename"])
def test_whatever_the_system_refuses_is_one_line_and_leaves_nothing(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, code: int
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(code, os.strerror(code), "x")

    root = tmp_path / "cache"
    if fails != "makedirs":
        root.mkdir(mode=0o700)
    monkeypatch.setitem(sys.modules, "oppi_unpack", build_zipapp)
    monkeypatch.setattr(os, fails, refuse)
    with pytest.raises(SystemExit) as refused:
        build_zipapp.enter(str(small), str(root), str(root / f"{'b' * 20}-cp311-{HERE}"), f"cp311-{HERE}")
    advice = "free or repair it, or set OPPI_CACHE_DIR to a folder that can be written"
    assert refused.value.code == f"oppi: cannot unpack into {root}: {os.strerror(code)}; {advice}"
    assert not root.exists() or os.listdir(root) == []


def test_a_cache_that_others_can_fill_is_refused(archive: Path, home: Path, tmp_path: Path, umask: None) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    assert "is open to other users" in refused(start(archive, home, "--version", OPPI_CACHE_DIR=str(cache)))
    cache.chmod(0o755)
    assert start(archive, home, "--version", OPPI_CACHE_DIR=str(cache)).returncode == 0
    unpacked(cache).chmod(0o750)
    assert "is open to other users" in refused(start(archive, home, "--version", OPPI_CACHE_DIR=str(cache)))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder that belongs to somebody else")
def test_a_cache_of_somebody_else_is_refused(archive: Path, home: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o700)
    os.chown(tmp_path / "cache", 65534, 65534)
    assert "is open to other users" in refused(start(archive, home, OPPI_CACHE_DIR=str(tmp_path / "cache")))


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = os.path.realpath(tmp_path)
    monkeypatch.setenv("HOME", real)
    monkeypatch.delenv("OPPI_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(build_zipapp.sys, "platform", "linux")
    assert build_zipapp.cache_root() == f"{real}/.cache/oppi"
    monkeypatch.setattr(build_zipapp.sys, "platform", "darwin")
    assert build_zipapp.cache_root() == f"{real}/Library/Caches/oppi"
    monkeypatch.setenv("XDG_CACHE_HOME", f"{real}/xdg")
    assert build_zipapp.cache_root() == f"{real}/xdg/oppi"
    monkeypatch.setenv("OPPI_CACHE_DIR", f"{real}/own")
    assert build_zipapp.cache_root() == f"{real}/own"
