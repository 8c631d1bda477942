"""The archive and its bootstrap: what people download first has to start, or to say on one line why not."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import build_zipapp
from tests.support.tools import find_pythons

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = find_pythons()
SUPPORTED = {python: version for python, version in PYTHONS.items() if version >= (3, 9, 2)}
TOO_OLD = {python: version for python, version in PYTHONS.items() if version < (3, 9, 2)}
STAND_IN = """import sys
def main(argv=None):
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


def build_stand_in(folder: Path, platform: str) -> Path:
    """Builds an archive of the stand-in for one platform."""
    source, path = folder / "oppi.py", folder / "small.pyz"
    source.write_text(STAND_IN)
    assert build_zipapp.main(["-o", str(path), "--source", str(source), "--platform", platform]) == 0
    return path


def start(
    archive: Path, home: Path, *arguments: str, python: str = sys.executable, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Starts an archive from an empty folder with nothing but the standard library."""
    folder = home.parent / "empty"
    folder.mkdir(exist_ok=True)
    environment = {"HOME": str(home), "PATH": os.defpath, **variables}
    old = "python2" in os.path.basename(os.path.realpath(python))
    command = [python, *([] if old else ["-I"]), "-S", str(archive), *arguments]
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
    key, (tag, natives), _ = build_zipapp.make_target(files, python, platform)
    assert f"{key!r}: {(tag, natives)!r}" in files["__main__.py"].decode()
    assert tag == f"{python}-{platform}"
    there = {place: files[name] for place, name in places(json.loads(files["manifest.json"]), tag).items()}
    assert {"oppi.py", "qrcode/main.py", "websockets/server.py", "cryptography/__init__.py"} <= set(there)
    assert {name.split(".")[0] for name, _ in natives} == {"_cffi_backend", "cryptography/hazmat/bindings/_rust"}
    for name, expected in natives:
        assert hashlib.sha256(there["native/" + name]).hexdigest() == expected
        check_binary(there["native/" + name], platform)
        assert f"-{python[2:]}-" in name or f"cpython-{python[2:]}" in name or name.endswith(".abi3.so")


def check_binary(data: bytes, platform: str) -> None:
    """Checks the machine of a native file and, on macOS, that its signature ends where the file ends."""
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


def test_two_builds_are_equal_whatever_surrounds_them(archive: Path, tmp_path: Path, umask: None) -> None:
    os.umask(0o077)
    environment = {**os.environ, "TZ": "Pacific/Kiritimati", "LC_ALL": "C", "PYTHONHASHSEED": "99"}
    command = [sys.executable, str(ROOT / "build_zipapp.py")]
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


def test_two_first_starts_at_once_both_work(archive: Path, home: Path) -> None:
    environment = {"HOME": str(home), "OPPI_CACHE_DIR": str(home / "cache")}
    command = [sys.executable, "-I", "-S", str(archive), "--version"]
    processes = [subprocess.Popen(command, env=environment, stdout=-1, stderr=-1) for _ in range(4)]
    results = [(process.communicate(timeout=120)[1], process.returncode) for process in processes]
    assert results == [(b"", 0)] * 4
    unpacked(home / "cache")


def test_the_loser_of_the_race_uses_the_winners_folder(tmp_path: Path) -> None:
    mine, winner = tmp_path / "x.tmp", tmp_path / "x"
    for folder in (mine, winner):
        folder.mkdir()
        (folder / "who").write_text(folder.name)
    build_zipapp.publish(str(mine), str(winner))
    assert (winner / "who").read_text() == "x"


def test_an_old_build_is_left_alone(archive: Path, small: Path, home: Path, tmp_path: Path) -> None:
    cache = {"OPPI_CACHE_DIR": str(tmp_path / "cache")}
    assert start(small, home, **cache).returncode == 7
    assert start(archive, home, "--version", **cache).returncode == 0
    assert len(os.listdir(tmp_path / "cache")) == 2
    assert start(small, home, **cache).returncode == 7


# -- refusing ----------------------------------------------------------------------------------------------------------


def test_the_bootstrap_parses_on_every_python(archive: Path) -> None:
    with zipfile.ZipFile(archive) as pack:
        source = pack.read("__main__.py").decode("ascii")
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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache_is_one_line(archive: Path, home: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o500)
    assert "Permission denied" in refused(start(archive, home, OPPI_CACHE_DIR=str(tmp_path / "cache")))


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
