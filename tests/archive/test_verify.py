"""The archive can be checked by whoever has it, and shows a whole turn with nothing but Python."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tools import find_pythons

from .test_archive import archive, home, rewrite  # noqa: F401
from .test_archive import start as run_archive

PYTHON_HERE = sys.version_info[:2]
PYTHONS = [python for python, version in find_pythons().items() if version >= (3, 9, 2)]


def folder_of(home: Path) -> Path:  # noqa: F811
    (folder,) = (home / ".cache" / "oppi").iterdir()
    return folder


def verified(archive: Path, home: Path, *words: str) -> subprocess.CompletedProcess[str]:  # noqa: F811
    done = run_archive(archive, home, "verify", *words)
    assert done.stderr == ""
    return done


@pytest.fixture
def used(archive: Path, home: Path) -> Path:  # noqa: F811
    """The unpacked folder of an archive whose every module has been compiled and native code loaded."""
    assert run_archive(archive, home, "pair", "--host", "h.local").returncode == 0
    return folder_of(home)


def test_what_is_untouched_is_good_and_every_wheel_is_named(archive: Path, home: Path, used: Path) -> None:  # noqa: F811
    done = verified(archive, home, "--json")
    facts = json.loads(done.stdout)
    assert (done.returncode, facts["valid"], facts["problems"]) == (0, True, [])
    assert list(used.glob("**/*.pyc")) and list(used.glob("native/**/*.so"))
    version = json.loads(run_archive(archive, home, "version", "--json").stdout)
    assert version["build"] == facts["build"] and version["wheels"].items() <= facts["hashes"].items()
    assert facts["hashes"]["oppi.py"] == version["oppi"] and len(facts["hashes"][str(archive)]) == 64
    assert "as recorded" in verified(archive, home).stdout


def test_the_source_that_runs_is_the_one_in_the_archive(archive: Path, home: Path) -> None:  # noqa: F811
    root = Path(__file__).resolve().parent.parent.parent
    assert run_archive(archive, home, "source").stdout == (root / "oppi.py").read_text("utf-8")


@pytest.mark.parametrize("pattern", ["oppi.py", "websockets/frames.py", "native/**/*.so", "__pycache__/oppi.*.pyc"])
def test_a_changed_byte_is_noticed(archive: Path, home: Path, used: Path, pattern: str) -> None:  # noqa: F811
    path = sorted(used.glob(pattern))[0]
    data = bytearray(path.read_bytes())
    where = data.index(b"in one sitting") if path.suffix == ".pyc" else len(data) // 2  # not every byte of it matters
    data[where] ^= 1
    path.write_bytes(data)
    done = verified(archive, home)
    assert done.returncode == 1 and f"✗ {path} is " in done.stdout


@pytest.mark.parametrize("what", ["version", "time", "size", "name of the source", "room on the stack"])
def test_compiled_code_is_compared_to_the_byte(archive: Path, home: Path, used: Path, what: str) -> None:  # noqa: F811
    """Also what Python leaves out when it compares code."""
    (path,) = (used / "qrcode" / "__pycache__").glob("main.*.pyc")
    data = bytearray(path.read_bytes())
    places = {"version": 0, "time": 9, "size": 13, "name of the source": data.index(b"/qrcode/main.py") + 1}
    old = PYTHON_HERE < (3, 11)  # which has the number of local variables before it
    data[places.get(what, 16 + 1 + 4 * (4 if old else 3))] ^= 2
    path.write_bytes(data)
    done = verified(archive, home)
    assert done.returncode == 1 and f"✗ {path} is not what its source compiles to" in done.stdout


def test_a_file_that_was_put_there_or_taken_away_is_noticed(archive: Path, home: Path, used: Path) -> None:  # noqa: F811
    (used / "socket.py").write_text("print('somebody else')")
    (used / "qrcode" / "main.py").unlink()
    done = verified(archive, home)
    assert done.returncode == 1 and "somebody else" not in done.stdout
    assert "socket.py is not listed" in done.stdout and "main.py is missing" in done.stdout


def test_code_that_was_compiled_from_something_else_is_noticed(archive: Path, home: Path, used: Path) -> None:  # noqa: F811
    """Python itself looks at the time and size of the source only."""
    import marshal

    (path,) = (used / "qrcode" / "__pycache__").glob("main.*.pyc")
    head = path.read_bytes()[:16]
    path.write_bytes(head + marshal.dumps(compile("print('somebody else')", "main.py", "exec")))
    done = verified(archive, home)
    assert done.returncode == 1 and f"✗ {path} is not what its source compiles to" in done.stdout


@pytest.mark.parametrize("name", ["oppi.py", "__main__.py", "manifest.json"])
def test_an_archive_that_was_changed_is_noticed(archive: Path, home: Path, tmp_path: Path, name: str) -> None:  # noqa: F811
    import zipfile

    data = zipfile.ZipFile(archive).read(name)
    change = {
        "manifest.json": (b'"websockets"', b'"websocketz"'),
        "oppi.py": (b"oppi", b"Oppi"),
        "__main__.py": (b"0o077", b"0o000"),
    }
    assert change[name][0] in data
    other = rewrite(archive, tmp_path / "other.pyz", {name: data.replace(*change[name], 1)})
    done = run_archive(other, home, "verify")
    assert done.returncode == 1 and "✗" in done.stdout


@pytest.mark.parametrize("name", ["oppi.py", "__main__.py", "qrcode/main.py"])
def test_two_entries_of_one_name_are_refused(archive: Path, home: Path, tmp_path: Path, name: str) -> None:  # noqa: F811
    """Of which one reader may run the first and another one check the last."""
    import warnings
    import zipfile

    other = tmp_path / "other.pyz"
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(other, "w") as new, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = next(entry for entry in old.namelist() if entry.endswith(name))
        new.writestr(found, "print('somebody else')")
        for info in old.infolist():
            new.writestr(info, old.read(info))
    done = run_archive(other, home, "verify")
    assert done.returncode == 1 and "two entries of one name" in done.stderr, done


ALONE = """import fcntl, os, socket, struct, sys
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh", b"lo", 1))  # loopback is up
os.execv(sys.argv[1], sys.argv[1:])
"""


def without_network() -> list[str]:
    """The words before a command that has no network but loopback, where this system lets us have that."""
    words = ["unshare", "-n" if os.geteuid() == 0 else "-rn", sys.executable, "-c", ALONE]
    works = shutil.which("unshare") and subprocess.run([*words, "/bin/true"], capture_output=True).returncode == 0
    return words if works else []


def children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("python", PYTHONS)
def test_a_whole_turn_with_nothing_but_python(archive: Path, home: Path, tmp_path: Path, python: str) -> None:  # noqa: F811
    before = children_cpu()
    done = run_archive(archive, home, "demo", "--yes", python=python, before=without_network(), TMPDIR=str(tmp_path))
    assert children_cpu() - before < 15  # s; of 30 that it may take, when nothing else runs here
    assert done.returncode == 0, done
    assert "Allowed once" in done.stdout and "Audit: bash allow by user" in done.stdout
    assert sorted(os.listdir(home)) == [".cache"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("oppi-")]
