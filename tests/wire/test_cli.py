"""The command line: what a person types, what they read, and what is on disk afterwards."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import resource
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.phone import Phone, bootstrap_10, bootstrap_11, parse_invite_v2, parse_invite_v3
from tests.support.server import ROOT, Server, default_program

from .rig import eventually

COMMANDS = ("serve", "pair", "init", "status", "doctor", "devices", "token", "config", "env", "version")
INSTALL = "npm install -g @earendil-works/pi-coding-agent"
FACTS = (  # commands that print facts, and work on an empty data directory
    ("status",), ("devices",), ("devices", "add", "backup"), ("config", "show"), ("config", "show", "--default"),
    ("config", "get", "port"), ("config", "get", "host"), ("config", "get", "invite"), ("config", "set", "port", "7800"),
    ("env", "init"), ("env", "show"), ("init", "--force"), ("pair", "--host", "oppi.local"), ("version",),
)  # fmt: skip


COMPLETED = {
    "oppi st": "start status",
    "oppi pair --p": "--png --port",
    "oppi config va": "validate",
    "oppi start --h": "--help --host",
}


class Shell:
    """A person's shell: one home, one data directory (named by OPPI_DATA_DIR), and `oppi`."""

    def __init__(self, server: Server) -> None:
        self.server, self.data, self.home = server, server.data, server.home

    def run(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """One command as it is, without a terminal; only the buffering of a pipe is that of everyday life."""
        env = {"PYTHONUNBUFFERED": "", **options.pop("env", {})}
        return self.server.cli(*words, env=env, **options)

    def __call__(self, *words: str, **options: Any) -> str:
        """What a command says that must succeed, and complain about nothing."""
        done = self.run(*words, **options)
        assert (done.returncode, done.stderr) == (0, ""), f"oppi {' '.join(words)}: {done}"
        return done.stdout

    def facts(self, *words: str, **options: Any) -> Any:
        """The JSON of a command: all that is on its stdout."""
        return json.loads(self(*words, "--json", **options))

    def refuses(self, *words: str, **options: Any) -> str:
        """The one line on stderr of a command that must fail."""
        done = self.run(*words, **options)
        assert (done.returncode, done.stdout) == (1, ""), f"oppi {' '.join(words)}: {done}"
        return one_line(done.stderr)

    @property
    def config(self) -> Any:
        return json.loads((self.data / "config.json").read_text("utf-8"))

    @property
    def token(self) -> str:
        return str(self.config["token"])

    def write_config(self, text: str | bytes | Any) -> bytes:
        """Make config.json by hand; its bytes."""
        data = text if isinstance(text, bytes) else (text if isinstance(text, str) else json.dumps(text)).encode()
        (self.data / "config.json").write_bytes(data)
        return data

    def config_bytes(self) -> bytes:
        return (self.data / "config.json").read_bytes()


def one_line(text: str) -> str:
    assert text.endswith("\n") and len(text.splitlines()) == 1 and text.strip(), f"not one line: {text!r}"
    return text.strip()


@pytest.fixture
def oppi() -> Iterator[Shell]:
    """A shell with an empty data directory."""
    with Server(start=False) as server:
        yield Shell(server)


@pytest.fixture(scope="class")
def class_set_up() -> Iterator[Shell]:
    with Server(start=False) as server:
        shell = Shell(server)
        shell("init", "--yes")
        yield shell


@pytest.fixture
def ready(class_set_up: Shell) -> Iterator[Shell]:
    """A shell whose data directory is set up; shared, for commands that must change nothing."""
    before = tree(class_set_up.data)
    yield class_set_up
    assert tree(class_set_up.data) == before


@pytest.fixture
def running() -> Iterator[Shell]:
    """A shell beside a running server."""
    with Server() as server:
        yield Shell(server)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder with its bytes, locks left out."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in (".lock", "serve.lock")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


class Terminal:
    """A terminal with a program in it; `stdout` may go elsewhere, as in `oppi init > file`."""

    def __init__(self, argv: list[str], env: Mapping[str, str], stdout: Any = None) -> None:
        self.master, slave = pty.openpty()
        self.text = ""
        self.process = subprocess.Popen(
            argv,
            stdin=slave,
            stdout=slave if stdout is None else stdout,
            stderr=slave,
            env={**env, "TERM": "xterm"},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            start_new_session=True,
        )
        os.close(slave)

    def _read(self, deadline: float) -> bool:
        """Whether there was more; False at the end."""
        left = deadline - time.monotonic()
        assert left > 0, f"the terminal shows only {self.text!r}"
        if select.select([self.master], [], [], left)[0]:
            try:
                data = os.read(self.master, 65536)
            except OSError:  # how Linux says that the other end was closed
                return False
            self.text += data.decode("utf-8", "replace").replace("\r\n", "\n")
            return bool(data)
        return True

    def sees(self, text: str) -> None:
        """Wait until it shows this, then forget what came before."""
        deadline = time.monotonic() + 20
        while text not in self.text:
            assert self._read(deadline), f"it ended with {self.text!r}"
        self.text = self.text.partition(text)[2]

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def answer(self, question: str, text: str) -> None:
        self.sees(f"{question}: ")
        self.type(text + "\n")

    def interrupt(self) -> None:
        """Ctrl+C, and again if the first one came between the question and the waiting for an answer."""
        for _ in range(10):
            self.type("\x03")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(2)
                return

    def ends(self) -> tuple[int, str]:
        """(exit code, what it showed since the last question)."""
        deadline = time.monotonic() + 20
        while self._read(deadline):
            pass
        return self.process.wait(20), self.text

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)


@contextlib.contextmanager
def terminal(shell: Shell, *words: str, stdout: Any = None, **env: str) -> Iterator[Terminal]:
    shown = Terminal(shell.server.command(*words), {**shell.server.env, "OPPI_DATA_DIR": str(shell.data), **env}, stdout)
    try:
        yield shown
    finally:
        shown.close()


class Serving:
    """`oppi serve` as a person starts it; its output so far."""

    def __init__(self, shell: Shell, *words: str, **env: str) -> None:
        self.path = shell.server.folder / f"serve-{time.monotonic_ns()}.txt"
        command = words if words[:1] == ("start",) else ("serve", *words)
        surroundings = {**shell.server.env, "OPPI_DATA_DIR": str(shell.data), "PYTHONUNBUFFERED": "", **env}
        with open(self.path, "wb") as file:
            self.process = subprocess.Popen(
                shell.server.command(*command), stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=surroundings
            )

    @property
    def text(self) -> str:
        return self.path.read_text("utf-8")

    def shows(self, text: str) -> str:
        """Everything it said, once it said this."""
        eventually(lambda: text in self.text or self.process.poll() is not None, 20, text)
        assert text in self.text, self.text
        return self.text

    def links(self) -> tuple[str, str]:
        """The links below the two codes."""
        found = self.shows("connect?v=2&invite=")
        eventually(lambda: self.text.endswith("\n"))
        new, old = [line.strip() for line in found.splitlines() if "oppi://connect" in line]
        return new, old

    def ends(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)


@contextlib.contextmanager
def serving(shell: Shell, *words: str, **env: str) -> Iterator[Serving]:
    server = Serving(shell, *words, **env)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def as_a_person() -> None:
    """In a child: obey file modes, even where the tests run as root."""
    import ctypes

    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def modes_bind() -> bool:
    """Whether `as_a_person` can be one here."""
    code = "import os; os.mkdir('d', 0); os.listdir('d')"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, preexec_fn=as_a_person, capture_output=True, check=False)
    return b"PermissionError" in done.stderr


class TestHelp:
    @pytest.mark.parametrize("words", [(), ("help",), ("--help",), ("-h",)])
    def test_it_names_every_command(self, oppi: Shell, words: tuple[str, ...]) -> None:
        text = oppi(*words)
        for name in COMMANDS:
            assert f"\n    {name}" in text
        assert not list(oppi.data.iterdir())

    @pytest.mark.parametrize("command", COMMANDS)
    def test_help_of_a_command_does_not_run_it(self, oppi: Shell, command: str) -> None:
        text = oppi(command, "--help")
        assert f"oppi {command}" in text and "--data-dir" in text
        assert not list(oppi.data.iterdir())

    def test_the_version(self, oppi: Shell) -> None:
        line = oppi("--version")
        name, number = line.split()
        assert (name, line) == ("oppi", oppi("version"))
        assert oppi.facts("version")["version"] == number

    @pytest.mark.parametrize(
        "words",
        [
            ("bogus",), ("--bogus",), ("status", "--bogus"), ("status", "-y"), ("pair", "--jso"), ("pair", "--host"),
            ("pair", "--ttl", "soon"), ("pair", "--port", "x"), ("serve", "--port", "x"), ("serve", "--host"), ("token",),
            ("token", "show"), ("devices", "bogus"), ("devices", "add"), ("devices", "revoke"), ("config", "bogus"),
            ("config", "get"), ("init", "--port"), ("status", "--data-dir"),
        ],
    )  # fmt: skip
    def test_a_slip_of_the_hand_is_one_line_and_creates_nothing(self, ready: Shell, words: tuple[str, ...]) -> None:
        ready.refuses(*words)

    def test_json_takes_no_value(self, oppi: Shell) -> None:
        assert json.loads(oppi("pair", "--json", "Studio", "--host", "mac.local"))["name"] == "Studio"

    def test_an_option_may_be_one_word_or_two(self, oppi: Shell) -> None:
        assert oppi.facts("pair", "--host=a.local", "--port=8001")["port"] == 8001
        assert oppi.facts("pair", "--host", "a.local", "--port", "8001")["port"] == 8001


class TestDataDirectory:
    def test_the_option_goes_before_the_variable_before_the_default(self, oppi: Shell) -> None:
        default, by_variable, by_option = oppi.home / ".config/oppi", oppi.home / "variable", oppi.home / "option"

        def place(*words: str, variable: str) -> Path:
            return Path(oppi.facts("status", *words, env={"OPPI_DATA_DIR": variable})["dataDir"])

        assert place(variable="") == default
        assert place(variable=str(by_variable)) == by_variable
        assert place("--data-dir", str(by_option), variable=str(by_variable)) == by_option
        assert place(f"--data-dir={by_option}", variable=str(by_variable)) == by_option
        assert place("--data-dir", "", variable=str(by_variable)) == by_variable
        assert all((folder / "config.json").exists() for folder in (default, by_variable, by_option))

    def test_the_home_folder_may_be_short(self, oppi: Shell) -> None:
        assert oppi.facts("status", "--data-dir", "~/a")["dataDir"] == str(oppi.home / "a")
        assert oppi.facts("status", env={"OPPI_DATA_DIR": "~/b"})["dataDir"] == str(oppi.home / "b")
        assert {p.name for p in oppi.home.iterdir()} == {".pi", "a", "b"}

    def test_a_relative_one_is_told_in_full(self, oppi: Shell) -> None:
        assert oppi.facts("status", "--data-dir", "here/there")["dataDir"] == str(oppi.server.folder / "here/there")

    @pytest.mark.parametrize("words", [w for w in FACTS if w[0] != "version"], ids=" ".join)
    def test_every_command_takes_it_and_prints_pure_json(self, oppi: Shell, words: tuple[str, ...]) -> None:
        oppi.facts(*words, "--data-dir", str(oppi.home / "elsewhere"))
        assert not list(oppi.data.iterdir())

    @pytest.mark.parametrize("words", [("status",), ("init", "--yes"), ("pair", "--host", "h"), ("serve",)])
    def test_what_cannot_be_one_is_refused(self, oppi: Shell, words: tuple[str, ...]) -> None:
        file = oppi.home / "file"
        file.write_text("precious")
        for path in (file, file / "below"):
            assert str(file) in oppi.refuses(*words, "--data-dir", str(path))
        assert file.read_text() == "precious"

    @pytest.mark.skipif(not modes_bind(), reason="file modes do not bind this user")
    @pytest.mark.parametrize("words", [("status",), ("init", "--yes"), ("pair", "--host", "h"), ("serve",), ("env", "init")])
    def test_a_folder_that_may_not_be_written_is_named(self, oppi: Shell, words: tuple[str, ...]) -> None:
        oppi.data.chmod(0o500)
        done = person(oppi, *words)
        assert (done.returncode, done.stdout) == (1, "")
        assert str(oppi.data) in one_line(done.stderr)
        assert not list(oppi.data.iterdir())

    @pytest.mark.skipif(not modes_bind(), reason="file modes do not bind this user")
    def test_a_read_only_one_can_be_read(self, oppi: Shell) -> None:
        oppi("init", "--yes")
        before = tree(oppi.data)
        for path in [*oppi.data.rglob("*"), oppi.data]:
            path.chmod(0o500 if path.is_dir() else 0o400)
        for words in (("status",), ("config", "get", "port"), ("config", "show"), ("devices",), ("env", "show")):
            assert person(oppi, *words).returncode == 0
        for line in ("config set port 1", "pair --host h", "devices add x", "token rotate", "serve"):
            words = tuple(line.split())
            done = person(oppi, *words)
            assert (done.returncode, done.stdout) == (1, "") and "Permission denied" in one_line(done.stderr)
        assert tree(oppi.data) == before


def person(shell: Shell, *words: str) -> subprocess.CompletedProcess[str]:
    """A command of somebody who may not do everything."""
    env = {**shell.server.env, "OPPI_DATA_DIR": str(shell.data)}
    options: Any = {"env": env, "stdin": subprocess.DEVNULL, "capture_output": True, "preexec_fn": as_a_person}
    return subprocess.run(shell.server.command(*words), text=True, timeout=30, check=False, **options)


@pytest.mark.parametrize("umask", ["000", "077"])
def test_nobody_else_may_read_what_is_made(umask: str) -> None:
    program = ["sh", "-c", f'umask {umask}; exec "$0" "$@"', *default_program()]
    with Server(program=program, start=False) as server:
        shell = Shell(server)
        new = str(server.folder / "deep" / "data")
        server.data = Path(new)
        shell.data = server.data
        for words in FACTS:
            shell(*words)
        server.start()
        phone = server.pair("1.0")
        workspace = phone.create_workspace(hostMount=str(server.workspace), systemPrompt="Be brief.", policyPreset="host")
        session = phone.create_session(workspace["id"])
        phone.open_session(workspace["id"], session["id"])
        phone.wait("state")
        phone.prompt(session["id"], '!tool bash {"command":"true"}')
        phone.wait("agent_end")
        phone.close()
        server.stop()
        found = [server.folder / "deep", *sorted((server.folder / "deep").rglob("*"))]
        assert {"config.json", "devices.json", "identity_ed25519", "audit.jsonl", "env", "serve.lock"} <= {p.name for p in found}
        for path in found:
            mode = stat.S_IMODE(path.stat().st_mode)
            if path.is_dir():
                assert mode == 0o700, path
            elif path.name == "identity_ed25519.pub":
                assert mode in (0o600, 0o644), path
            elif path.parent.parent.name != "pi":  # pi writes its own files below its own closed folder
                assert mode == 0o600, path


class TestBrokenConfig:
    """config.json holds the owner token: it is neither guessed at nor replaced."""

    BROKEN = [b"", b"{", b'{"port": 7749,}', b"[]", b"null", b'"text"', b"\xff\xfe", b'{"token": NaN}', b"[" * 100_000]
    WORDS = [
        ("status",), ("devices",), ("devices", "add", "x"), ("devices", "revoke", "x"), ("config", "show"),
        ("config", "get", "port"), ("config", "set", "port", "1"), ("pair", "--host", "h"), ("token", "rotate"),
        ("init", "--yes"), ("init", "--yes", "--force"), ("serve",), ("env", "show"),
    ]  # fmt: skip

    @pytest.mark.parametrize("text", BROKEN, ids=lambda text: repr(text[:12]))
    def test_every_kind_of_damage_is_named(self, oppi: Shell, text: bytes) -> None:
        oppi.write_config(text)
        line = oppi.refuses("status")
        assert str(oppi.data / "config.json") in line and len(line) < 400
        assert tree(oppi.data) == {"config.json": text}

    @pytest.mark.parametrize("words", WORDS, ids=" ".join)
    def test_no_command_overwrites_it(self, oppi: Shell, words: tuple[str, ...]) -> None:
        text = oppi.write_config('{"token": "sk_precious", "port": 7749,}')
        assert str(oppi.data / "config.json") in oppi.refuses(*words)
        assert tree(oppi.data) == {"config.json": text}

    def test_validate_says_where(self, oppi: Shell) -> None:
        oppi.write_config('{"port": 7749,}')
        done = oppi.run("config", "validate")
        assert done.returncode == 1 and "config.json: not valid JSON: " in done.stdout + done.stderr

    def test_a_wrong_value_is_told_at_the_start_and_left_in_the_file(self, oppi: Shell) -> None:
        text = oppi.write_config({"approvalTimeoutMs": "soon", "port": 7749, "mine": 1, "token": "sk_" + "a" * 24})
        oppi.server.start()
        oppi.server.stop()
        warnings = [line for line in oppi.server.stderr if "config." in line]
        assert warnings == ["config.approvalTimeoutMs: expected number; using the default"]
        kept, wrote = json.loads(text), oppi.config
        assert {name: wrote[name] for name in kept} == kept


class TestInit:
    def test_without_questions(self, oppi: Shell) -> None:
        text = oppi("init", "--yes", "--port", "7801", "--model", "anthropic/claude-x", "--max-sessions", "9")
        assert str(oppi.data / "config.json") in text and oppi.config["identity"]["fingerprint"] in text
        assert " serve" in text and " pair, " in text
        chosen = {name: oppi.config[name] for name in ("port", "defaultModel", "maxSessionsGlobal", "dataDir")}
        assert chosen == {"port": 7801, "defaultModel": "anthropic/claude-x", "maxSessionsGlobal": 9, "dataDir": str(oppi.data)}
        assert oppi.token.startswith("sk_") and oppi.token not in text
        assert (oppi.data / "identity_ed25519").read_text().startswith("-----BEGIN PRIVATE KEY-----\n")

    @pytest.mark.parametrize("words", [("--port", "7802"), ("--port=7802",), ("--port", "7802x")])
    def test_the_port_in_every_spelling(self, oppi: Shell, words: tuple[str, ...]) -> None:
        facts = oppi.facts("init", "--yes", *words)
        assert facts["port"] == oppi.config["port"] == 7802
        assert facts["dataDir"] == str(oppi.data) and facts["fingerprint"].startswith("sha256:")

    @pytest.mark.parametrize("words", [(), ("--port", "0"), ("--port", "none")])
    def test_no_port_is_the_usual_one(self, oppi: Shell, words: tuple[str, ...]) -> None:
        oppi("init", "--y", *words)
        assert (oppi.config["port"], oppi.config["maxSessionsGlobal"]) == (7749, 40)

    def test_a_port_that_cannot_be_is_refused(self, oppi: Shell) -> None:
        oppi("init", "--yes")
        before = tree(oppi.data)
        assert "port" in oppi.refuses("init", "--yes", "--force", "--port", "70000")
        assert tree(oppi.data) == before

    def test_a_second_time_needs_force(self, oppi: Shell) -> None:
        oppi("init", "--yes")
        before = tree(oppi.data)
        line = oppi.refuses("init", "--port", "7803")
        assert str(oppi.data / "config.json") in line and "--force" in line
        assert tree(oppi.data) == before

    def test_force_keeps_everything_it_does_not_ask_about(self, oppi: Shell) -> None:
        oppi("init", "--yes")
        config = {**oppi.config, "approvalTimeoutMs": 5, "mine": {"kept": True}}
        oppi.write_config(config)
        key = (oppi.data / "identity_ed25519").read_bytes()
        oppi("init", "--force", "--yes", "--port", "7804")
        assert oppi.config == {**config, "port": 7804}
        assert (oppi.data / "identity_ed25519").read_bytes() == key

    def test_the_questions(self, oppi: Shell) -> None:
        with terminal(oppi, "init") as shown:
            shown.answer("Port [7749]", "7805")
            shown.sees("anthropic/")
            shown.answer("Default model [openai-codex/gpt-5.3-codex]", "google/gemini-x")
            shown.answer("Max concurrent sessions [40]", "3")
            code, text = shown.ends()
        assert code == 0 and " serve" in text
        assert [oppi.config[n] for n in ("port", "defaultModel", "maxSessionsGlobal")] == [7805, "google/gemini-x", 3]

    def test_enter_takes_what_is_offered(self, oppi: Shell) -> None:
        with terminal(oppi, "init", "--port", "7806") as shown:
            shown.answer("Port [7806]", "")
            shown.answer("Default model [openai-codex/gpt-5.3-codex]", "")
            shown.answer("Max concurrent sessions [40]", " ")
            assert shown.ends()[0] == 0
        assert oppi.config["port"] == 7806

    def test_the_end_of_input_takes_the_rest_as_offered(self, oppi: Shell) -> None:
        with terminal(oppi, "init") as shown:
            shown.answer("Port [7749]", "7807")
            shown.sees("Default model [openai-codex/gpt-5.3-codex]: ")
            shown.type("\x04\x04\x04")
            assert shown.ends()[0] == 0
        assert oppi.config["port"] == 7807

    @pytest.mark.parametrize("answer", ["", "n", "no", "yes please"])
    def test_a_second_time_asks_and_may_be_declined(self, oppi: Shell, answer: str) -> None:
        oppi("init", "--yes")
        before = tree(oppi.data)
        with terminal(oppi, "init") as shown:
            shown.answer("Continue anyway? (y/N) [n]", answer)
            assert shown.ends()[0] == 0
        assert tree(oppi.data) == before

    @pytest.mark.parametrize("answer", ["y", "Y"])
    def test_and_may_be_wanted(self, oppi: Shell, answer: str) -> None:
        oppi("init", "--yes")
        token = oppi.token
        with terminal(oppi, "init") as shown:
            shown.answer("Continue anyway? (y/N) [n]", answer)
            shown.answer("Port [7749]", "7808")
            shown.answer("Default model [openai-codex/gpt-5.3-codex]", "")
            shown.answer("Max concurrent sessions [40]", "")
            assert shown.ends()[0] == 0
        assert (oppi.config["port"], oppi.token) == (7808, token)

    def test_a_refused_one_leaves_nothing_behind(self, oppi: Shell) -> None:
        oppi.refuses("init", "--yes", "--port", "70000")
        oppi("init", "--yes", "--port", "7000")

    def test_ctrl_c_is_no_traceback_and_sets_nothing_up(self, oppi: Shell) -> None:
        with terminal(oppi, "init") as shown:
            shown.sees("Port [7749]: ")
            shown.interrupt()
            code, text = shown.ends()
        assert code not in (0, None) and "Traceback" not in text
        assert "config.json" not in tree(oppi.data)

    def test_json_asks_no_questions_on_stdout(self, oppi: Shell) -> None:
        out = oppi.server.folder / "out.json"
        with open(out, "w") as file, terminal(oppi, "init", "--json", stdout=file) as shown:
            shown.type("\n" * 3)
            assert shown.ends()[0] == 0
        assert json.loads(out.read_text())["port"] == 7749


class TestServe:
    def test_what_a_person_sees_first(self, oppi: Shell) -> None:
        port = free_port()
        with serving(oppi, "--host", "127.0.0.1", "--port", str(port)) as server:
            new, old = server.links()
            text = server.text
            assert f"127.0.0.1:{port}" in text and str(oppi.data) in text
            assert oppi.config["identity"]["fingerprint"] in text
            assert "Ctrl+C" in text and "Oppi app 1.1" in text and "Oppi app 1.0" in text
            assert text.count("█▀▀▀▀▀█") >= 4  # the finders of two codes
            assert "\033" not in text and "sk_" not in text
            assert parse_invite_v3(new).port == parse_invite_v2(old).port == port
            assert bootstrap_11(new).me() and bootstrap_10(old).me()
            assert server.ends(signal.SIGINT) == 0

    def test_the_port_of_the_file_is_used(self, oppi: Shell) -> None:
        port = free_port()
        oppi("init", "--yes", "--port", str(port))
        oppi("config", "set", "host", "127.0.0.1")
        with serving(oppi) as server:
            assert parse_invite_v3(server.links()[0]).port == port
            Phone(f"http://127.0.0.1:{port}").health()
            assert server.ends(signal.SIGTERM) == 0
        assert oppi.config["port"] == port

    def test_start_is_the_same(self, oppi: Shell) -> None:
        with serving(oppi, "start", "--host=127.0.0.1", "--port=0") as server:
            server.links()
            assert server.ends(signal.SIGTERM) == 0
        assert oppi.config["port"] == 7749

    def test_no_codes_once_a_device_is_paired(self, oppi: Shell) -> None:
        oppi("devices", "add", "script")
        with serving(oppi, "--host", "127.0.0.1", "--port", "0") as server:
            text = server.shows("Ctrl+C")
            Phone(f"http://127.0.0.1:{oppi_port(text)}").health()
            assert server.ends(signal.SIGTERM) == 0
            assert "1 paired" in text and " pair" in text
            assert "oppi://" not in server.text and "█" not in server.text

    def test_a_missing_pi_is_told_with_the_command_that_brings_it(self, oppi: Shell) -> None:
        oppi("devices", "add", "script")
        usual = [Path(folder, "pi") for folder in ("/usr/local/bin", "/usr/bin", "/bin", "/opt/homebrew/bin")]
        if any(path.exists() for path in usual):
            pytest.skip("a pi is installed for everybody here")
        with serving(oppi, "--host=127.0.0.1", "--port=0", OPPI_PI_BIN="", PATH="/usr/bin:/bin") as server:
            assert f"Missing: pi, the coding agent. Install it with: {INSTALL}\n" in server.shows("Ctrl+C")
            phone = Phone(f"http://127.0.0.1:{oppi_port(server.text)}", oppi.token)
            assert phone.me() and phone.models() == []
            assert server.ends(signal.SIGTERM) == 0

    def test_a_missing_login_is_told_too(self, oppi: Shell) -> None:
        oppi("devices", "add", "script")
        words = ("--host=127.0.0.1", "--port=0")
        with serving(oppi, *words) as server:
            assert "Missing: a model provider. Log in with: pi" in server.shows("Ctrl+C")
            assert server.ends(signal.SIGTERM) == 0
        with serving(oppi, *words, ANTHROPIC_API_KEY="k-secret") as server:
            assert "Missing" not in server.shows("Ctrl+C")
            assert server.ends(signal.SIGTERM) == 0
            assert "k-secret" not in server.text
        (oppi.server.agent_dir / "auth.json").write_text("{}")
        with serving(oppi, *words) as server:
            assert "Missing" not in server.shows("Ctrl+C")
            assert server.ends(signal.SIGTERM) == 0

    def test_one_data_directory_has_one_server(self, running: Shell) -> None:
        line = running.refuses("serve", "--host", "127.0.0.1", "--port", "0")
        assert str(running.data) in line
        assert Phone(running.server.base_url, running.token).me()

    def test_a_port_that_is_taken_is_named(self, running: Shell) -> None:
        port = str(running.server.port)
        words = ("serve", "--host", "127.0.0.1", "--port", port, "--data-dir", "~/other")
        line = running.refuses(*words)
        assert port in line and "in use" in line
        assert one_line(running.run(*words, "--json").stderr) == line

    @pytest.mark.parametrize("words", [("--port", "99999"), ("--port", "-5"), ("--host", "no such host")])
    def test_an_address_that_cannot_be(self, oppi: Shell, words: tuple[str, ...]) -> None:
        oppi.refuses("serve", "--port", "0", *words)

    def test_nothing_is_left_running(self, oppi: Shell) -> None:
        with serving(oppi, "--host", "127.0.0.1", "--port", "0") as server:
            server.links()
            assert server.ends(signal.SIGTERM) == 0
        assert oppi.server.wait_no_orphans() == []


class TestWhatRuns:
    @pytest.fixture
    def oppi(self) -> Iterator[Shell]:
        """From the source."""
        with Server(program=[sys.executable, str(ROOT / "oppi.py")], start=False) as server:
            yield Shell(server)

    def test_source_is_the_file_itself(self, oppi: Shell) -> None:
        assert oppi("source").encode() == (ROOT / "oppi.py").read_bytes()

    def test_without_an_archive_there_is_a_hash_to_compare(self, oppi: Shell) -> None:
        digest = hashlib.sha256((ROOT / "oppi.py").read_bytes()).hexdigest()
        assert f"{digest}  oppi.py" in oppi("verify") and "not an archive" in oppi("verify")
        facts = oppi.facts("verify")
        assert (facts["valid"], facts["hashes"], facts["problems"]) == (True, {"oppi.py": digest}, [])

    def test_version_names_what_matters(self, oppi: Shell, tmp_path: Path) -> None:
        pi = tmp_path / "pi"
        pi.write_text("#!/bin/sh\necho 0.87.1\n")
        pi.chmod(0o755)
        facts = oppi.facts("version", env={"PATH": f"{tmp_path}:{oppi.server.env['PATH']}"})
        assert (facts["pi"], facts["build"], facts["archive"], facts["wheels"]) == ("0.87.1", None, None, {})
        assert facts["oppi"] == oppi.facts("verify")["hashes"]["oppi.py"]

    @pytest.mark.parametrize(("command", "said"), [("verify", "comparing every file"), ("version", "asking pi")])
    def test_what_takes_time_is_told_to_a_person(self, oppi: Shell, command: str, said: str, tmp_path: Path) -> None:
        """On stderr, so that the facts can be read by a program all the same."""
        with (tmp_path / "facts").open("w") as facts, terminal(oppi, command, "--json", stdout=facts) as shown:
            shown.sees(f"oppi: {said}...\n")
            assert shown.ends()[0] == 0
        assert json.loads((tmp_path / "facts").read_text())

    @pytest.mark.parametrize(("typed", "found"), COMPLETED.items())
    def test_a_shell_completes_commands_and_options(self, oppi: Shell, typed: str, found: str) -> None:
        words = typed.split()
        script = f"{oppi('completion')}\nCOMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _oppi; echo ${{COMPREPLY[@]}}"
        done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True)
        assert sorted(done.stdout.split()) == sorted(found.split())


def oppi_port(text: str) -> int:
    """The port in the first line of `serve`."""
    return int(text.splitlines()[0].rpartition(":")[2])


class TestPair:
    def test_json_is_what_the_desktop_app_reads(self, oppi: Shell) -> None:
        facts = oppi.facts("pair", "My Mac", "--host", "studio.local", "--port", "7809")
        names = ["host", "port", "scheme", "name", "pairingToken", "fingerprint", "inviteURL", "inviteURLv2"]
        assert list(facts) == names
        assert (facts["host"], facts["port"], facts["scheme"], facts["name"]) == ("studio.local", 7809, "http", "My Mac")
        new, old = parse_invite_v3(facts["inviteURL"]), parse_invite_v2(facts["inviteURLv2"])
        for invite in (new, old):
            assert (invite.host, invite.port, invite.name) == ("studio.local", 7809, "My Mac")
            assert invite.fingerprint == facts["fingerprint"] == oppi.config["identity"]["fingerprint"]
        assert new.pairing_token == facts["pairingToken"] != old.token
        assert oppi.token not in json.dumps([facts, new.envelope, old.envelope])

    def test_json_is_indented_by_two(self, oppi: Shell) -> None:
        text = oppi("pair", "Jörgs Mac", "--json", "--host", "h.local")
        assert text == json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n"

    @pytest.mark.parametrize("host, name", [("192.168.1.9", "192.168.1.9"), ("my-mac.tail1.ts.net", "my-mac")])
    def test_a_phone_shows_the_first_part_of_the_host(self, oppi: Shell, host: str, name: str) -> None:
        assert oppi.facts("pair", "--host", f" {host} ")["name"] == name

    def test_what_a_person_sees(self, oppi: Shell) -> None:
        text = oppi("pair", "--host", "studio.local", "--ttl", "45")
        assert "studio.local:7749" in text and oppi.config["identity"]["fingerprint"] in text
        assert "45 seconds" in text and "600 seconds" in text
        assert text.index("app 1.1") < text.index("connect?v=3") < text.index("app 1.0") < text.index("connect?v=2")
        assert "\033" not in text and "sk_" not in text

    def test_a_terminal_shows_dark_on_light(self, oppi: Shell) -> None:
        with terminal(oppi, "pair", "--host", "h.local", COLUMNS="200") as shown:
            code, text = shown.ends()
        assert code == 0 and "\033[30;107m" in text and "too small" not in text
        with terminal(oppi, "pair", "--host", "h.local", COLUMNS="200", NO_COLOR="1") as shown:
            assert "\033" not in shown.ends()[1]

    def test_a_narrow_terminal_is_told_how_wide_it_must_be(self, oppi: Shell) -> None:
        with terminal(oppi, "pair", "--host", "h.local", COLUMNS="20", NO_COLOR="1") as shown:
            code, text = shown.ends()
        assert code == 0 and text.count("too small") == 2 and "█▀" not in text
        assert "connect?v=3" in text and "connect?v=2" in text

    def test_it_counts_at_once_and_needs_no_server(self, oppi: Shell) -> None:
        before = oppi.facts("pair", "--host", "127.0.0.1")
        oppi.server.start()
        after = oppi.facts("pair", "--host", "127.0.0.1", "--port", str(oppi.server.port))
        phones = [Phone(oppi.server.base_url), Phone(oppi.server.base_url)]
        for phone, invite in zip(phones, (before, after)):
            phone.pair(invite["pairingToken"])
            assert phone.me()
        assert bootstrap_10(after["inviteURLv2"]).me()
        assert len(oppi.facts("devices")["devices"]) == 3

    def test_the_time_it_lives(self, oppi: Shell) -> None:
        before = time.time()
        invite = parse_invite_v2(oppi.facts("pair", "--host", "h", "--ttl", "20")["inviteURLv2"])
        assert invite.envelope["exp"] - invite.envelope["iat"] == 600 and invite.envelope["iat"] >= int(before)
        kept = json.loads((oppi.data / "devices.json").read_text())["invites"]
        lives = {i["kind"]: i["expiresAt"] / 1000 - before for i in kept}
        assert 19 < lives["v3"] < 40 and 599 < lives["v2"] < 620
        oppi("config", "set", "invite.maxAgeSeconds", "30")
        invite = parse_invite_v2(oppi.facts("pair", "--host", "h")["inviteURLv2"])
        assert invite.envelope["exp"] - invite.envelope["iat"] == 30

    def test_a_port_that_is_not_known_is_asked_for(self, oppi: Shell) -> None:
        oppi("config", "set", "port", "0")
        assert "--port" in oppi.refuses("pair", "--host", "h")

    @pytest.mark.parametrize("host", ["a\nb", "a\tb", "a\x7fb"])
    def test_a_control_character_is_refused(self, oppi: Shell, host: str) -> None:
        oppi.refuses("pair", "--host", host)
        oppi.refuses("pair", host, "--host", "h")

    def test_the_option_that_the_original_promised_for_a_picture(self, oppi: Shell, tmp_path: Path) -> None:
        assert str(tmp_path / "code.png") in oppi("pair", "--host", "h.local", "--save", str(tmp_path / "code.png"))
        assert (tmp_path / "code.png").read_bytes().startswith(b"\x89PNG")

    def test_no_secret_is_kept_in_clear(self, oppi: Shell) -> None:
        facts = oppi.facts("pair", "--host", "h")
        secrets = [facts["pairingToken"], parse_invite_v2(facts["inviteURLv2"]).token]
        kept = b"".join(tree(oppi.data).values()).decode()
        assert not [s for s in secrets if s in kept]

    def test_another_key_than_the_phones_know_is_never_made(self, oppi: Shell) -> None:
        oppi("init", "--yes")
        (oppi.data / "identity_ed25519").unlink()
        for words in (("pair", "--host", "h"), ("serve", "--port", "0"), ("init", "--force", "--yes")):
            assert "identity_ed25519" in oppi.refuses(*words)
        assert not (oppi.data / "identity_ed25519").exists()

    @pytest.mark.parametrize("ttl", ["0", "-5"])
    def test_a_code_that_is_dead_from_the_start_is_refused(self, oppi: Shell, ttl: str) -> None:
        assert "ttl" in oppi.refuses("pair", "--host", "h", "--ttl", ttl)

    @pytest.mark.parametrize("port", ["0", "-1", "65536"])
    def test_a_port_that_no_phone_can_use_is_refused(self, oppi: Shell, port: str) -> None:
        assert "port" in oppi.refuses("pair", "--host", "h", "--port", port)


class TestStatus:
    def test_the_address_in_a_tailnet_is_found(self, oppi: Shell, tmp_path: Path) -> None:
        tailscale = tmp_path / "tailscale"
        status = json.dumps({"Self": {"DNSName": "mac.tail1.ts.net."}})
        tailscale.write_text(f"#!/bin/sh\ncase $1 in status) echo '{status}';; ip) echo 100.100.1.2; echo fd7a::1;; esac\n")
        tailscale.chmod(0o755)
        env = {"PATH": f"{tmp_path}:{oppi.server.env['PATH']}"}
        facts = oppi.facts("status", env=env)
        assert (facts["tailscaleName"], facts["tailscaleIp"]) == ("mac.tail1.ts.net", "100.100.1.2")
        assert "Hostname      mac.tail1.ts.net" in oppi("status", env=env)
        tailscale.write_text("#!/bin/sh\nsleep 60\n")  # it hangs
        assert oppi.facts("status", env=env)["tailscaleName"] == ""

    def test_before_and_after(self, oppi: Shell) -> None:
        facts = oppi.facts("status")
        assert (facts["port"], facts["host"], facts["dataDir"]) == (7749, "0.0.0.0", str(oppi.data))
        assert (facts["running"], facts["devices"], facts["sessions"]) == (False, 0, 0)
        oppi.server.start()
        phone = oppi.server.pair("1.1")
        phone.create_session(phone.create_workspace()["id"])
        facts = eventually(lambda: (f := oppi.facts("status"))["sessions"] and f)
        assert (facts["running"], facts["pid"], facts["devices"], facts["sessions"]) == (True, oppi.server.pid, 1, 1)
        assert facts["fingerprint"] == oppi.server.listening["fingerprint"]
        oppi.server.stop()
        assert oppi.facts("status")["running"] is False

    def test_what_a_person_sees(self, oppi: Shell) -> None:
        text = oppi("status")
        for word in ("Server Configuration", "7749", str(oppi.data), "Tailscale", "Local Network", "Pairing", " pair"):
            assert word in text
        oppi("devices", "add", "x")
        assert "not paired" not in oppi("status")

    def test_after_a_kill_it_says_that_nothing_runs(self, running: Shell) -> None:
        running.server.kill()
        assert running.facts("status")["running"] is False


class TestDevices:
    def test_from_nobody_to_somebody_and_back(self, running: Shell) -> None:
        assert running.facts("devices") == {"devices": []}
        assert " pair" in running("devices")
        token = running("devices", "add", "nightly backup").strip()
        assert token.startswith("dt_") and len(token) == 27
        assert Phone(running.server.base_url, token).me()
        added = running.facts("devices", "add", "second")
        assert set(added) == {"id", "name", "token"}
        for text in (running("devices"), running("devices", "list"), running("devices", "--json")):
            assert "nightly backup" in text and "second" in text
            assert token not in text and added["token"] not in text and "sha256" not in text
        assert running("devices", "revoke", "nightly backup")
        running("devices", "revoke", added["id"])
        assert running.facts("devices") == {"devices": []}
        assert Phone(running.server.base_url, token).raw("GET", "/me").status == 401

    def test_a_terminal_says_that_it_is_shown_once(self, oppi: Shell) -> None:
        with terminal(oppi, "devices", "add", "mine") as shown:
            shown.sees("shown only now:")
            code, text = shown.ends()
        assert code == 0 and text.strip().startswith("dt_")

    def test_the_list_tells_phones_apart(self, running: Shell) -> None:
        for generation in ("1.0", "1.1"):
            running.server.pair(generation)
        running("devices", "add", "script")
        rows = running.facts("devices")["devices"]
        assert [row["kind"] for row in rows] == ["v2", "v3", "script"] and len({row["id"] for row in rows}) == 3
        assert all(row["createdAt"] > 1.7e12 for row in rows)
        text = running("devices")
        assert "app 1.0" in text and "app 1.1" in text

    def test_an_unknown_name_is_repeated(self, oppi: Shell) -> None:
        oppi("devices", "add", "somebody")
        assert "nobody" in oppi.refuses("devices", "revoke", "nobody")
        assert len(oppi.facts("devices")["devices"]) == 1

    def test_an_unreadable_list_is_set_aside_and_said_so(self, oppi: Shell) -> None:
        oppi("init", "--yes")
        (oppi.data / "devices.json").write_text('{"devices": [')
        done = oppi.run("devices", "--json")
        assert done.returncode == 0 and json.loads(done.stdout) == {"devices": []}
        assert "devices.json" in one_line(done.stderr)
        (aside,) = oppi.data.glob("devices.json.unreadable-*")
        assert aside.read_text() == '{"devices": ['

    @pytest.mark.parametrize(
        "content",
        [
            '{"devices": "x"}', '{"devices": {"a": 1}}', '{"devices": [7, {"hash": "x"}]}', '{"invites": [{"hash": "x"}]}',
            '{"invites": 7}', '{"devices": [{"hash": 5, "id": "i", "name": "n", "createdAt": "x", "lastUsedAt": []}]}',
        ],
    )  # fmt: skip
    def test_a_damaged_list_of_devices_stops_nothing(self, oppi: Shell, content: str) -> None:
        oppi("init", "--yes")
        for words in (("status",), ("devices",), ("devices", "add", "x"), ("devices", "revoke", "x"), ("pair", "--host", "h")):
            (oppi.data / "devices.json").write_text(content)
            done = oppi.run(*words)
            assert "Traceback" not in done.stderr and done.returncode in (0, 1), done.stderr


class TestToken:
    def test_there_is_nothing_to_rotate_before_pairing(self, oppi: Shell) -> None:
        assert "Not paired" in oppi.refuses("token", "rotate")

    def test_it_tells_to_pair_again_and_not_the_token(self, running: Shell) -> None:
        old, phone = running.token, running.server.pair("1.0")
        text = running("token", "rotate")
        assert "pair" in text and running.token not in text and running.token != old
        assert Phone(running.server.base_url, running.token).me()
        assert [Phone(running.server.base_url, token).raw("GET", "/me").status for token in (old, phone.token)] == [401, 401]
        assert running.facts("devices") == {"devices": []}

    def test_devices_may_be_kept(self, running: Shell) -> None:
        phone = running.server.pair("1.1")
        pending = running.server.invite()["pairingToken"]
        assert running.facts("token", "rotate", "--keep-devices") == {"rotated": True, "devicesKept": True}
        assert phone.me() and len(running.facts("devices")["devices"]) == 1
        assert Phone(running.server.base_url).raw("POST", "/pair", {"pairingToken": pending}).status == 401


class TestConfig:
    def test_show_is_the_effective_one(self, oppi: Shell) -> None:
        oppi.write_config({"port": 7810, "maxSessionsGlobal": "many"})
        shown = json.loads(oppi("config", "show"))
        assert (shown["port"], shown["maxSessionsGlobal"], shown["invite"]["maxAgeSeconds"]) == (7810, 40, 600)
        assert json.loads(oppi("config")) == shown
        default = json.loads(oppi("config", "show", "--default"))
        assert default["port"] == 7749 and "token" not in default

    @pytest.mark.parametrize(
        "key, text",
        [
            ("port", "7749"), ("host", "0.0.0.0"), ("invite.maxAgeSeconds", "600"), ("identity.keyId", "srv-default"),
            ("security.requirePinnedServerIdentity", "true"), ("tls", '{\n  "mode": "disabled"\n}'), ("runtimeEnv", "{}"),
        ],
    )  # fmt: skip
    def test_get_prints_the_value_and_nothing_else(self, ready: Shell, key: str, text: str) -> None:
        assert ready("config", "get", key) == text + "\n"
        value = ready.facts("config", "get", key)
        assert value == (text if key in ("host", "identity.keyId") else json.loads(text))

    def test_get_prints_the_token_when_it_is_asked_for(self, ready: Shell) -> None:
        assert ready("config", "get", "token") == ready.token + "\n"

    @pytest.mark.parametrize("key", ["nonsense", "port.number", "invite.nonsense", "tls.certPath", "", ".", "port."])
    def test_get_refuses_what_is_unknown_or_unset(self, ready: Shell, key: str) -> None:
        assert key in ready.refuses("config", "get", key)

    @pytest.mark.parametrize(
        "key, text, value",
        [
            ("port", "7811", 7811), ("port", "0", 0), ("approvalTimeoutMs", "0", 0), ("maxSessionsGlobal", "1e2", 100),
            ("host", "127.0.0.1", "127.0.0.1"), ("host", "7", "7"), ("defaultModel", "a/b c", "a/b c"),
            ("security.profile", "strict", "strict"), ("invite.maxAgeSeconds", "86400", 86400),
            ("security.allowInsecureHttpInTailnet", "false", False), ("runtimeEnv", '{"A": "b"}', {"A": "b"}),
            ("runtimePathEntries", '["~/bin"]', ["~/bin"]), ("identity.fingerprint", "", ""),
            ("autoTitle", '{"enabled": true}', {"enabled": True}),
        ],
    )  # fmt: skip
    def test_set_stores_this_and_only_this(self, oppi: Shell, key: str, text: str, value: Any) -> None:
        oppi.write_config({"port": 7749, "invite": {"later": 1}, "later": [1, 2]})
        assert key in oppi("config", "set", key, text)
        expected: Any = {"port": 7749, "invite": {"later": 1}, "later": [1, 2]}
        *section, last = key.split(".")
        (expected.setdefault(section[0], {}) if section else expected)[last] = value
        assert oppi.config == expected

    def test_set_says_the_fact(self, oppi: Shell) -> None:
        assert oppi.facts("config", "set", "invite.maxAgeSeconds", "30") == {"invite.maxAgeSeconds": 30}

    @pytest.mark.parametrize(
        "key, text",
        [
            ("port", "99999"), ("port", "-1"), ("port", "7749.5"), ("port", "many"), ("port", ""), ("port", "true"),
            ("port", "NaN"), ("port", "1e999"), ("port", '"7749"'), ("port", "[" * 50_000), ("host", "  "),
            ("approvalTimeoutMs", "-1"),
            ("maxSessionsGlobal", "0"), ("invite.maxAgeSeconds", "86401"), ("invite.format", "v1"),
            ("security.profile", "legacy"),
            ("security.requirePinnedServerIdentity", "yes"), ("identity.algorithm", "rsa"), ("tls.mode", "nope"),
            ("tls", '{"mode":"nope"}'), ("tls", "{"), ("tls", "7"), ("tls", '{"bogus":1}'), ("runtimeEnv", '{"A":1}'),
            ("runtimePathEntries", '"~/bin"'), ("runtimePathEntries", '[""]'), ("policy", "[]"), ("nonsense", "1"),
            ("invite.nonsense", "1"), ("port.number", "1"), ("token", "sk_mine"), ("deviceTokens", "[]"),
            ("configVersion", "0"),
        ],
        ids=lambda text: text[:24],
    )  # fmt: skip
    def test_a_bad_value_is_refused_and_changes_no_byte(self, ready: Shell, key: str, text: str) -> None:
        line = ready.refuses("config", "set", key, text)
        assert key in line

    def test_set_without_a_key_tells_the_keys(self, ready: Shell) -> None:
        for words in (("config", "set"), ("config", "set", "port")):
            done = ready.run(*words)
            assert done.returncode == 1 and "config set KEY VALUE" in one_line(done.stderr)
            assert "approvalTimeoutMs" in done.stdout and "120000" in done.stdout

    def test_what_is_set_counts_at_once(self, running: Shell) -> None:
        phone = running.server.pair("1.0")
        running("config", "set", "invite.maxAgeSeconds", "77")
        running("config", "set", "security.profile", "strict")
        profile = phone.security_profile()
        assert (profile["invite"]["maxAgeSeconds"], profile["profile"]) == (77, "strict")

    def test_many_at_once_lose_nothing(self, oppi: Shell) -> None:
        oppi("init", "--yes")
        wanted = {
            "port": 7812, "maxSessionsGlobal": 9, "maxSessionsPerWorkspace": 8, "approvalTimeoutMs": 7,
            "sessionIdleTimeoutMs": 6, "workspaceIdleTimeoutMs": 5,
        }  # fmt: skip
        env = {**oppi.server.env, "OPPI_DATA_DIR": str(oppi.data)}
        at_once = [
            subprocess.Popen(oppi.server.command("config", "set", key, str(value)), env=env, stdout=subprocess.DEVNULL)
            for key, value in wanted.items()
        ]
        assert [process.wait(30) for process in at_once] == [0] * len(wanted)
        assert {key: oppi.config[key] for key in wanted} == wanted

    def test_first_commands_at_once_make_one_identity(self, oppi: Shell) -> None:
        env = {**oppi.server.env, "OPPI_DATA_DIR": str(oppi.data)}
        command = oppi.server.command("pair", "--json", "--host", "h")
        at_once = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE) for _ in range(4)]
        known = {json.loads(process.communicate(timeout=30)[0])["fingerprint"] for process in at_once}
        assert known == {oppi.config["identity"]["fingerprint"]}

    def test_validate(self, oppi: Shell) -> None:
        oppi("init", "--yes")
        assert str(oppi.data / "config.json") in oppi("config", "validate")
        assert oppi.facts("config", "validate") == {"file": str(oppi.data / "config.json"), "valid": True, "errors": []}
        wrong = {"port": 70000, "bogus": 1, "host": " ", "invite": {"maxAgeSeconds": 1.5, "more": 1}, "tls": {"mode": "manual"}}
        text = oppi.write_config(wrong)
        done = oppi.run("config", "validate")
        assert done.returncode == 1 and "Traceback" not in done.stderr
        said = (done.stdout + done.stderr).splitlines()
        path = str(oppi.data / "config.json")
        assert sorted(line.replace(path + ": ", "") for line in said) == [
            "config.bogus: unknown key",
            "config.host: expected non-empty string",
            "config.invite.maxAgeSeconds: expected integer",
            "config.invite.more: unknown key",
            "config.port: expected <= 65535",
            "config.tls.certPath: required when mode=manual",
            "config.tls.keyPath: required when mode=manual",
        ]
        done = oppi.run("config", "validate", "--json")
        assert done.returncode == 1 and len(json.loads(done.stdout)["errors"]) == 7
        assert oppi.config_bytes() == text

    def test_validate_another_file(self, oppi: Shell) -> None:
        other = oppi.home / "other.json"
        other.write_text('{"port": 1}')
        assert "other.json" in oppi("config", "validate", "--config-file", str(other))
        assert "other.json" in oppi("config", "validate", "--config-file", "~/other.json")
        for content in (None, "[]", "{", '{"port": "x"}'):
            other.unlink() if content is None else other.write_text(content)
            assert oppi.run("config", "validate", "--config-file", str(other)).returncode == 1

    def test_a_link_is_followed_by_nobody_else(self, oppi: Shell) -> None:
        """A config.json that is a link is replaced, and what it points to is left alone."""
        oppi("init", "--yes")
        real = oppi.home / "real.json"
        (oppi.data / "config.json").rename(real)
        (oppi.data / "config.json").symlink_to(real)
        before = real.read_bytes()
        oppi("config", "set", "port", "7813")
        assert oppi.config["port"] == 7813
        assert real.read_bytes() == before or json.loads(real.read_text())["port"] == 7813


class TestEnv:
    def test_init_keeps_the_path_of_this_shell(self, oppi: Shell) -> None:
        path = f"{oppi.home}/bin:/usr/bin:/bin:/usr/bin::/x y"
        assert str(oppi.data / "env") in oppi("env", "init", env={"PATH": path})
        lines = (oppi.data / "env").read_text().splitlines()
        assert lines[0].startswith("#") and lines[1:] == ["PATH=~/bin:/usr/bin:/bin:/x y"]

    def test_show_tells_where_each_folder_comes_from(self, oppi: Shell) -> None:
        (oppi.home / ".local/bin").mkdir(parents=True)
        facts = oppi.facts("env", "show", env={"PATH": "/usr/bin:/only/here"})
        origins = {row["entry"]: row["from"] for row in facts["path"]}
        assert facts["file"] is None and origins["/only/here"] == "inherited" and origins["/usr/bin"] == "well-known"
        assert origins[str(oppi.home / ".local/bin")] == "well-known"
        (oppi.data / "env").write_text('# mine\n\nPATH="~/tools:/usr/bin"\nAPI_KEY=\'k-secret~x\'\nbroken\n')
        facts = oppi.facts("env", "show", env={"PATH": "/usr/bin:/only/here"})
        assert facts["file"] == str(oppi.data / "env") and facts["overrides"] == ["API_KEY"]
        first = [(row["entry"], row["from"]) for row in facts["path"][:2]]
        assert first == [(f"{oppi.home}/tools", "env file"), ("/usr/bin", "env file")]
        assert len({row["entry"] for row in facts["path"]}) == len(facts["path"])
        text = oppi("env", "show")
        assert str(oppi.data / "env") in text and "API_KEY" in text and "k-secret" not in text

    def test_a_file_elsewhere(self, oppi: Shell) -> None:
        old = oppi.home / ".config/oppi/env"
        old.parent.mkdir(parents=True)
        old.write_text("PATH=/from/the/old/place\n")
        assert oppi.facts("env", "show")["file"] == str(old)
        other = oppi.home / "other.env"
        other.write_text("PATH=/from/another\n")
        facts = oppi.facts("env", "show", env={"OPPI_ENV_FILE": str(other)})
        assert (facts["file"], facts["path"][0]["entry"]) == (str(other), "/from/another")
        oppi("env", "init")
        assert oppi.facts("env", "show")["file"] == str(oppi.data / "env")

    def test_an_empty_path_is_nothing_to_capture(self, oppi: Shell) -> None:
        program = default_program()
        done = subprocess.run(
            [*program, "env", "init"], env={**oppi.server.env, "PATH": "", "OPPI_DATA_DIR": str(oppi.data)}, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 1 and "PATH" in one_line(done.stderr)

    @pytest.mark.parametrize("words", [("env",), ("env", "bogus")])
    def test_without_an_action_it_tells_them(self, oppi: Shell, words: tuple[str, ...]) -> None:
        assert oppi(*words).startswith("Usage: ") and oppi(*words).endswith(" env init|show\n")


class TestOutput:
    def test_a_hint_can_be_typed_as_it_is(self, oppi: Shell) -> None:
        usage = oppi.run("config", "set").stderr.splitlines()[-1]
        hint = usage[len("Usage: ") :].replace("KEY VALUE", "port 7801")
        env = {**oppi.server.env, "OPPI_DATA_DIR": str(oppi.data)}
        subprocess.run(["sh", "-c", hint], cwd=oppi.server.folder, env=env, check=True, stdout=subprocess.DEVNULL)
        assert oppi.config["port"] == 7801

    def test_no_token_where_none_was_asked_for(self, running: Shell) -> None:
        device = running.facts("devices", "add", "x")["token"]
        for phone in ("1.0", "1.1"):
            running.server.pair(phone)
        for words in FACTS:
            if words[0] == "pair" or words[:2] in (("devices", "add"), ("config", "show")):
                continue
            said = running(*words)
            assert running.token not in said and device not in said and "sk_" not in said and "dt_" not in said, words
        assert running.run("token", "rotate").stdout.count("sk_") == 0

    def test_a_name_that_is_no_text_is_no_reason_to_break(self, oppi: Shell) -> None:
        odd = "a\udcff"
        env = {"PYTHONIOENCODING": "utf-8:strict"}
        for words in (("devices", "add", odd), ("devices", "list"), ("devices", "revoke", odd), ("pair", odd, "--host", "h")):
            done = oppi.run(*words, env=env)
            assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 1, done.stderr

    def test_what_it_costs(self, oppi: Shell) -> None:
        """Printed, not judged: how long a processor is busy with the commands that scripts call."""
        oppi("init", "--yes")
        for words in (("status",), ("config", "get", "port")):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            oppi(*words)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            print(f"oppi {' '.join(words)}: {used:.3f} s of CPU")

    @pytest.mark.parametrize("words", [(), ("--version",), ("status", "--help"), ("status",), ("config", "show")], ids=" ".join)
    def test_a_reader_that_leaves_is_no_reason_to_complain(self, oppi: Shell, words: tuple[str, ...]) -> None:
        """`oppi config show | head -1`, when head is faster."""
        reader, writer = os.pipe()
        os.close(reader)
        done = plain(oppi, *words, stdout=writer)
        os.close(writer)
        assert done.stderr == ""

    def test_a_full_disk_is_one_line(self, oppi: Shell) -> None:
        if not Path("/dev/full").exists():
            pytest.skip("no /dev/full here")
        for words in (("help",), ("config", "show"), ("status", "--json")):
            with open("/dev/full", "w") as full:
                done = plain(oppi, *words, stdout=full)
            assert done.returncode == 1
            one_line(done.stderr)

    @pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
    def test_an_old_terminal_gets_what_it_can_show(self, oppi: Shell, encoding: str) -> None:
        env = {"PYTHONIOENCODING": encoding}
        for words in (("init", "--yes"), ("config", "set", "port", "7814"), ("pair", "Anna's Mac", "--host", "h"), ("devices",)):
            oppi(*words, env=env)

    @pytest.mark.parametrize("closed", [0, 1, 2])
    def test_a_closed_stream_is_no_reason_to_break(self, oppi: Shell, closed: int) -> None:
        for words in (("init", "--yes"), ("status",), ("devices", "add", "x"), ("pair", "--host", "h"), ("env", "init")):
            command = ["sh", "-c", f'exec "$0" "$@" {closed}{"<" if closed == 0 else ">"}&-', *oppi.server.command(*words)]
            env = {**oppi.server.env, "OPPI_DATA_DIR": str(oppi.data)}
            done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, ""), words


def plain(shell: Shell, *words: str, stdout: Any, **more: str) -> subprocess.CompletedProcess[str]:
    """A command with this stdout, buffered as usual."""
    env = {**shell.server.env, "OPPI_DATA_DIR": str(shell.data), "PYTHONUNBUFFERED": "", **more}
    options: Any = {"env": env, "stdin": subprocess.DEVNULL, "stdout": stdout, "stderr": subprocess.PIPE}
    return subprocess.run(shell.server.command(*words), text=True, timeout=30, check=False, **options)
