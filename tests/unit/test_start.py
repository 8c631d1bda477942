"""How `python3 oppi.py serve` starts over as a module before it does anything else."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import oppi

from .support import ROOT

FILE = str(ROOT / "oppi.py")


@pytest.mark.parametrize("command", ["serve", "start"])
def test_a_server_starts_over_before_anything_else_of_the_file_has_run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    def execv(program: str, argv: list[str]) -> None:
        started.append((program, argv, set(sys._getframe(1).f_globals)))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(sys, "argv", [FILE, command, "--port", "0"])
    with pytest.raises(SystemExit):
        runpy.run_path(FILE, run_name="__main__")
    ((program, argv, names),) = started
    assert (program, argv[:3], argv[4:]) == (sys.executable, [sys.executable, "-S", "-c"], [command, "--port", "0"])
    assert not names & {"json", "re", "OppiError", "main"}


def test_without_room_for_a_file_it_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    monkeypatch.setattr(sys, "argv", [FILE, "serve", "--help"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(FILE, run_name="__main__")
    assert done.value.code == 0 and "oppi serve" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "archive", "wanted"),
    [("oppi.pyz", "/a/b/oppi.pyz", "python3 oppi.pyz"), ("/usr/bin/oppi", "/a/b/oppi.pyz", "oppi"),
     ("-c", "/a/b/c/oppi.pyz", "python3 c/oppi.pyz"), ("x", "/c d/oppi.pyz", "python3 '/c d/oppi.pyz'")],
)  # fmt: skip
def test_hints_name_the_program_as_it_can_be_called_here(
    argv: str, archive: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [argv])
    monkeypatch.setattr(oppi, "ARCHIVE", archive)
    monkeypatch.setattr("os.getcwd", lambda: "/a/b")
    assert oppi.called() == wanted


@pytest.mark.parametrize("command", ["serve", "start", "status"])
def test_modules_in_the_folder_it_is_started_in_are_not_its_own(command: str, tmp_path: Path) -> None:
    for name in ("types", "argparse", "asyncio", "shutil", "websockets"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('somebody else')")
    done = subprocess.run([sys.executable, FILE, command, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and "usage: oppi s" in done.stdout
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".py"]


def test_it_finds_its_packages_where_the_first_process_did(tmp_path: Path) -> None:
    """Also when only a search path that is no longer there after the start names them."""
    (tmp_path / "argparse.py").write_text("print('found'); raise SystemExit(0)")
    code = f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv[:] = [{FILE!r}, 'serve']; "
    code += f"runpy.run_path({FILE!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "found\n")
