"""A running oppi server for tests: private HOME, data and workspace folders, and proof that it leaves nothing behind.

    with Server() as server:
        phone = server.pair("1.1")

pi is the scripted fake unless another executable is given.  A failure shows the server's stderr, because the reason
usually stands there.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import py_compile
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .phone import Phone, bootstrap_10, bootstrap_11

ROOT = Path(__file__).resolve().parents[2]
FAKE_PI = Path(__file__).with_name("fake_pi.py")
MARK = "OPPI_TEST_MARK"  # environment variable by which every process of one Server is found again
START_TIMEOUT = 20.0  # s until the server must have said that it listens
STOP_TIMEOUT = 12.0  # s a stopping server may take
KEPT = ("PATH", "LANG", "LC_ALL", "TZ", "SYSTEMROOT", "COVERAGE_PROCESS_START", "COVERAGE_FILE", "VIRTUAL_ENV")


class ServerError(AssertionError):
    """The server did not do what was asked; the message ends with its stderr."""


class Server:
    """One data directory and the server process on it.

    `program` is the command that runs oppi (default: this Python and oppi.py of the project, or the words of the
    environment variable OPPI_TEST_PROGRAM).  `pi` is the pi executable; by default the fake in `dialect`, with
    `fake` as its FAKE_PI_* settings (without that prefix).  `env` is added to the server's environment.
    """

    def __init__(
        self,
        *,
        pi: str | Path | None = None,
        dialect: str = "0.87",
        fake: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
        program: Sequence[str] | None = None,
        start: bool = True,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="oppi-test-")).resolve()
        self.home, self.data, self.workspace = (self.folder / name for name in ("home", "data", "workspace"))
        for folder in (self.home, self.data, self.workspace):
            folder.mkdir(mode=0o700)
        self.agent_dir = self.home / ".pi" / "agent"
        self.agent_dir.mkdir(parents=True)
        self.mark = uuid.uuid4().hex
        self.program = list(program or default_program())
        self.pi = self._wrapper([f'exec {shlex.quote(str(pi))} "$@"']) if pi else self._fake(dialect, fake or {})
        self.env = self._environment(env or {})
        self.process: subprocess.Popen[bytes] | None = None
        self.listening: dict[str, Any] = {}
        self.stdout: list[str] = []
        self.stderr: list[str] = []
        self.port = 0
        self._said = threading.Condition()
        self._threads: list[threading.Thread] = []
        if config:
            self.config(**config)
        self._start_on_enter = start

    def _fake(self, dialect: str, settings: Mapping[str, str]) -> Path:
        lines = [f"export FAKE_PI_DIALECT={dialect}"]
        lines += [f"export FAKE_PI_{name}={shlex.quote(str(value))}" for name, value in settings.items()]
        compiled = self.folder / "fake_pi.pyc"  # or each of its starts would compile it
        py_compile.compile(str(FAKE_PI), str(compiled), doraise=True)
        return self._wrapper([*lines, f'exec {shlex.quote(sys.executable)} {shlex.quote(str(compiled))} "$@"'])

    def _wrapper(self, lines: Sequence[str]) -> Path:
        """A `pi`, because the server gives pi a cleaned environment: settings and mark must come from here."""
        path = self.folder / "bin" / "pi"
        path.parent.mkdir()
        path.write_text("\n".join(["#!/bin/sh", f"export {MARK}={self.mark}", *lines]) + "\n")
        path.chmod(0o755)
        return path

    def _environment(self, extra: Mapping[str, str]) -> dict[str, str]:
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        return {
            **kept,
            "HOME": str(self.home),
            "TMPDIR": str(self.folder),
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OPPI_PI_BIN": str(self.pi),
            "OPPI_BONJOUR": "0",
            "PI_CODING_AGENT_DIR": str(self.agent_dir),
            "PI_OFFLINE": "1",
            MARK: self.mark,
            **extra,
        }

    # ---- life --------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Server:
        try:
            if self._start_on_enter:
                self.start()
        except BaseException:
            self._clean()
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if self.alive and kind is None:
                self.stop()
        finally:
            if kind is not None:
                sys.stderr.write(self.report("the test failed"))
            self._clean()

    def _clean(self) -> None:
        """Nothing of this server survives a test, whatever happened."""
        self.kill()
        for pid, _ in self.orphans():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        assert self.process is not None, "the server was never started"
        return self.process.pid

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def config(self, **keys: Any) -> Path:
        """Merge keys into config.json (one level deep for objects), before a start."""
        assert not self.alive, "the server reads its configuration at start"
        path = self.data / "config.json"
        current: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
        for name, value in keys.items():
            merge = isinstance(value, dict) and isinstance(current.get(name), dict)
            current[name] = {**current[name], **value} if merge else value
        path.write_text(json.dumps(current, indent=2), "utf-8")
        path.chmod(0o600)
        return path

    def command(self, *arguments: str) -> list[str]:
        return [*self.program, *arguments]

    def start(self, *extra: str, timeout: float = START_TIMEOUT) -> dict[str, Any]:
        """Start and wait for the line that says it listens; a second start uses the same port again."""
        assert not self.alive, "already running"
        options = ("serve", "--json", "--host", "127.0.0.1", "--port", str(self.port), "--data-dir", str(self.data))
        self.listening = {}
        self.process = subprocess.Popen(
            self.command(*options, *extra),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.env,
            cwd=self.folder,
        )
        self._threads = [
            threading.Thread(target=self._collect, args=(self.process.stdout, self.stdout), daemon=True),
            threading.Thread(target=self._collect, args=(self.process.stderr, self.stderr), daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        self._await_listening(timeout)
        self.port = int(self.listening["port"])
        return self.listening

    def _collect(self, stream: Any, lines: list[str]) -> None:
        for raw in stream:
            line = raw.decode("utf-8", "replace").rstrip("\n")
            with self._said:
                lines.append(line)
                if lines is self.stdout and not self.listening:
                    with contextlib.suppress(ValueError):
                        value = json.loads(line)
                        if isinstance(value, dict) and value.get("event") == "listening":
                            self.listening = value
                self._said.notify_all()

    def _await_listening(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        with self._said:
            while not self.listening:
                if not self.alive or time.monotonic() > deadline:
                    raise ServerError(self.report("the server does not listen"))
                self._said.wait(0.1)

    def wait_stderr(self, text: str, timeout: float = 10.0) -> str:
        """The first line of stderr that contains `text`."""
        deadline = time.monotonic() + timeout
        with self._said:
            while True:
                for line in self.stderr:
                    if text in line:
                        return line
                if time.monotonic() > deadline:
                    raise ServerError(self.report(f"nothing on stderr contains {text!r}"))
                self._said.wait(0.1)

    def _wait(self, timeout: float) -> int:
        assert self.process is not None, "the server was never started"
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ServerError(self.report(f"still running after {timeout} s")) from None
        for thread in self._threads:
            thread.join(2)
        return code

    def stop(self, timeout: float = STOP_TIMEOUT) -> None:
        """SIGTERM; the server must end with 0 in time and leave no process behind."""
        assert self.process is not None, "the server was never started"
        self.process.send_signal(signal.SIGTERM)
        code = self._wait(timeout)
        if code != 0:
            raise ServerError(self.report(f"exit {code} after SIGTERM"))
        left = self.wait_no_orphans()
        if left:
            raise ServerError(self.report(f"processes left behind: {left}"))

    def kill(self) -> None:
        """SIGKILL, as if the machine took it; no complaint if it is already gone."""
        if self.alive:
            assert self.process is not None
            self.process.kill()
            self._wait(STOP_TIMEOUT)

    def restart(self, *extra: str, graceful: bool = True) -> dict[str, Any]:
        """Stop (or kill) if running and start again on the same data and port."""
        if self.alive:
            if graceful:
                self.stop()
            else:
                self.kill()
        return self.start(*extra)

    # ---- around it ---------------------------------------------------------------------------------------------------

    def cli(
        self, *arguments: str, input: str | None = None, timeout: float = 60.0, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run an oppi command in the same surroundings; OPPI_DATA_DIR names the data directory."""
        return subprocess.run(
            self.command(*arguments),
            input=input or "",
            capture_output=True,
            text=True,
            encoding="utf-8",
            env={**self.env, "OPPI_DATA_DIR": str(self.data), **(env or {})},
            cwd=self.folder,
            timeout=timeout,
            check=False,
        )

    def invite(self, *extra: str) -> dict[str, Any]:
        """The answer of `oppi pair --json`, which must be JSON and nothing else on stdout."""
        options = ("--host", "127.0.0.1", "--port", str(self.port), "--data-dir", str(self.data))
        done = self.cli("pair", "--json", *options, *extra)
        if done.returncode != 0:
            raise ServerError(self.report(f"pair: exit {done.returncode}\n{done.stderr}"))
        try:
            value: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            raise ServerError(self.report(f"pair did not print JSON but {done.stdout!r}")) from None
        missing = {"host", "port", "scheme", "name", "pairingToken", "fingerprint", "inviteURL"} - set(value)
        if missing:
            raise ServerError(f"pair --json lacks {sorted(missing)}")
        return value

    def pair(self, generation: str = "1.1") -> Phone:
        """A newly paired phone, by the whole flow of its app."""
        invite = self.invite()
        try:
            return bootstrap_11(invite["inviteURL"]) if generation == "1.1" else bootstrap_10(invite["inviteURLv2"])
        except (AssertionError, OSError, KeyError) as error:
            raise ServerError(self.report(f"pairing as app {generation} failed: {error!r}")) from error

    def orphans(self) -> list[tuple[int, str]]:
        """(pid, command line) of the live processes this server started, itself excepted."""
        own = {os.getpid(), self.process.pid if self.process else 0}
        return [(pid, line) for pid, line in marked_processes(self.mark) if pid not in own]

    def wait_no_orphans(self, timeout: float = 10.0) -> list[tuple[int, str]]:
        """The processes that are still there after `timeout` seconds; returns at once when there are none."""
        deadline = time.monotonic() + timeout
        while True:
            left = self.orphans()
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.02)

    def report(self, problem: str) -> str:
        """`problem` followed by what the server said."""
        code = self.process.poll() if self.process else None
        tail = "\n  ".join(self.stderr[-60:]) or "(nothing)"
        return f"{problem} (exit code {code}, data {self.data})\nserver stderr:\n  {tail}\n"


COMPILED = tempfile.TemporaryDirectory(prefix="oppi-")


@functools.lru_cache(1)
def compiled() -> str:
    """oppi.py as Python has it after it was compiled, under the same name; each start from the source takes 0.1 s longer."""
    path = Path(COMPILED.name).resolve() / "oppi.py"
    py_compile.compile(str(ROOT / "oppi.py"), str(path), str(path), doraise=True)
    return str(path)


def default_program() -> list[str]:
    return shlex.split(os.environ.get("OPPI_TEST_PROGRAM", "")) or [sys.executable, compiled()]


def marked_processes(mark: str) -> list[tuple[int, str]]:
    """Live processes whose environment carries the mark, from /proc or, where there is none, from ps."""
    if Path("/proc/self/environ").exists():
        found = [_marked(entry, mark) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return [item for item in found if item]
    listing = subprocess.run(["ps", "axeww", "-o", "pid=,command="], capture_output=True, text=True, check=False)
    lines = [line.split(None, 1) for line in listing.stdout.splitlines() if f"{MARK}={mark}" in line]
    return [(int(pid), command) for pid, command in lines]


def _marked(entry: Path, mark: str) -> tuple[int, str] | None:
    with contextlib.suppress(OSError):
        if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
            return None if state == "Z" else (int(entry.name), line)
    return None
