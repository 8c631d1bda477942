"""The phone in the terminal, and the demo that plays a turn with it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.screen import Screen
from tests.support.server import Server

from .rig import PUSH, Rig, bash, eventually
from .test_cli import Shell
from .test_screen import show


@pytest.fixture
def oppi() -> Iterator[Shell]:
    with Server(start=False) as server:
        yield Shell(server)


def can_listen(host: str) -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return True
    return False


HOSTS = [host for host in ("127.0.0.2", "0.0.0.0", "::1", "::") if can_listen(host)]  # a machine may lack IPv6


def left_alone(shell: Shell, temporary: Path) -> None:
    """The demo has touched neither the home nor the folder for temporary files."""
    assert list(temporary.iterdir()) == []
    assert not shell.data.exists() or list(shell.data.iterdir()) == []
    assert shell.server.wait_no_orphans() == []


class TestDemo:
    def test_it_plays_a_whole_turn_by_itself(self, oppi: Shell, tmp_path: Path) -> None:
        before = sorted(oppi.home.rglob("*"))
        text = oppi("demo", "--yes", env={"TMPDIR": str(tmp_path)})
        parts = ["private server", "paired", "What is in this folder?", "rm -f draft.txt", "Allowed once", "note.txt"]
        parts += ["the draft is gone now", "Audit: bash allow by user"]
        places = [text.index(part) for part in parts]
        assert places == sorted(places)
        left_alone(oppi, tmp_path)
        assert sorted(oppi.home.rglob("*")) == before

    @pytest.mark.parametrize(("key", "said"), [("y", "the draft is gone now"), ("n", "You said no")])
    def test_one_key_answers(self, oppi: Shell, tmp_path: Path, key: str, said: str) -> None:
        with show(oppi, "demo", TMPDIR=str(tmp_path)) as shown:
            text = shown.shows("y allow once   n deny")
            assert "ls -l && rm -f draft.txt" in text and "risk)" in text
            shown.keys(key)
            decision = {"y": "allow", "n": "deny"}[key]
            shown.shows(said, f"Audit: bash {decision} by user", "ended with 0")
        left_alone(oppi, tmp_path)

    def test_without_a_terminal_nobody_says_yes(self, oppi: Shell, tmp_path: Path) -> None:
        text = oppi("demo", env={"TMPDIR": str(tmp_path)})
        assert "You said no" in text and "Audit: bash deny by user" in text

    def test_ctrl_c_leaves_nothing(self, oppi: Shell, tmp_path: Path) -> None:
        with show(oppi, "demo", TMPDIR=str(tmp_path)) as shown:
            shown.shows("y allow once   n deny")
            shown.keys("C-c")  # ends the turn, as for any session
            shown.shows("ended with")
            assert "Traceback" not in shown.text()
        left_alone(oppi, tmp_path)


    @pytest.mark.parametrize("how", ["closed window", "kill"])
    def test_neither_does_any_other_end(self, oppi: Shell, tmp_path: Path, how: str) -> None:
        with show(oppi, "demo", TMPDIR=str(tmp_path)) as shown:
            shown.shows("y allow once   n deny")
            if how == "kill":
                demo = [pid for pid in Path("/proc").iterdir() if pid.name.isdigit() and is_demo(pid, tmp_path)]
                assert len(demo) == 1
                os.kill(int(demo[0].name), signal.SIGTERM)
                shown.shows("ended with 1")
        eventually(lambda: list(tmp_path.iterdir()) == [])
        left_alone(oppi, tmp_path)


def is_demo(pid: Path, temporary: Path) -> bool:
    """Whether a process is `oppi demo` itself: the server and the agent that it starts have other words."""
    with contextlib.suppress(OSError):
        words = (pid / "cmdline").read_bytes().split(b"\0")
        return words[-2:] == [b"demo", b""] and str(temporary).encode() in (pid / "environ").read_bytes() and b"env" not in words
    return False


def devices(shell: Shell) -> list[Any]:
    return list(json.loads((shell.data / "devices.json").read_text())["devices"])


class TestChat:
    def test_without_a_server_it_says_how_to_start_one(self, oppi: Shell) -> None:
        assert " serve" in oppi.refuses("chat")

    def test_there_is_no_yes_to_everything(self, oppi: Shell) -> None:
        assert "--yes" in oppi.refuses("chat", "--yes")

    def test_a_turn_with_an_approval(self, rig: Rig) -> None:
        """The phone in the terminal answers; a phone of the app sees the same, and may answer instead."""
        shell, chat = Shell(rig.server), rig.chat(preset="host_standard")
        before = len(devices(shell))
        with show(shell, "chat", chat.sid[:6]) as shown:
            shown.shows("Type a message")
            assert len(devices(shell)) == before + 1
            type_line(shown, bash(PUSH))
            shown.shows("? bash", f"    {PUSH}", "y allow once   n deny")
            chat.phone.wait("permission_request")
            shown.keys("x")  # is no answer
            shown.keys("n")
            shown.shows("Denied")
            chat.settled()
            assert rig.verdicts_of_pi()[-1] == "deny"
            chat.play("!say from the phone")
            shown.shows("from the phone")
            chat.phone.mark()
            type_line(shown, bash("git push origin other"))
            shown.shows("    git push origin other")
            question = chat.phone.wait("permission_request")
            chat.phone.answer(question["id"], "deny", "once")
            shown.shows("answered elsewhere")
            chat.settled()
            type_line(shown, "/quit")
            shown.shows("ended with 0")
        assert len(devices(shell)) == before

    def test_its_device_goes_with_the_window(self, rig: Rig) -> None:
        shell, chat = Shell(rig.server), rig.chat()
        before = len(devices(shell))
        with show(shell, "chat", chat.sid) as shown:
            shown.shows("Type a message")
            assert len(devices(shell)) == before + 1
        eventually(lambda: len(devices(shell)) == before)

    def test_what_could_move_the_cursor_is_shown(self, rig: Rig) -> None:
        shell, chat = Shell(rig.server), rig.chat()
        with show(shell, "chat", chat.sid) as shown:
            shown.shows("Type a message")
            chat.play("!say evil \033[2J\u202e text")
            text = shown.shows("evil", " text")
            assert "\\u{1b}[2J\\u{202e}" in text and "Type a message" in text
            shown.keys("C-c")
            shown.shows("ended with 0")

    def test_ctrl_c_stops_a_turn_and_the_session_goes_on(self, rig: Rig) -> None:
        shell, chat = Shell(rig.server), rig.chat()
        with show(shell, "chat", chat.sid) as shown:
            shown.shows("Type a message")
            chat.say("!slow 50\n!text 4000")
            shown.shows("w3 w4")
            shown.keys("C-c")
            chat.phone.wait("stop_confirmed")
            chat.settled()
            type_line(shown, "!say still here")
            shown.shows("still here")
            shown.keys("C-d")
            shown.shows("ended with 0")

    def test_a_pipe_gets_an_answer_and_no_approval(self, rig: Rig) -> None:
        shell, chat = Shell(rig.server), rig.chat(preset="host_standard")
        text = shell("chat", chat.sid, input=f"{bash(PUSH)}\n")
        assert "? bash" in text and "Denied" in text
        assert rig.verdicts_of_pi()[-1] == "deny"

    @pytest.mark.parametrize("host", HOSTS)
    def test_it_finds_the_server_where_it_listens(self, oppi: Shell, host: str) -> None:
        oppi.server.start("--host", host)
        text = oppi("chat", input=f"!say here on {host}\n")
        assert f"here on {host}" in text.partition("Type a message")[2]
        assert devices(oppi) == []

    def test_a_session_that_was_stopped_goes_on_with_what_was_said(self, rig: Rig) -> None:
        shell, chat = Shell(rig.server), rig.chat()
        chat.play("!say remember me")
        chat.stop()
        text = shell("chat", chat.sid, input="!say and more\n")
        assert text.index("remember me") < text.index("Type a message") < text.rindex("and more")

    def test_a_session_that_is_not_there(self, rig: Rig) -> None:
        shell = Shell(rig.server)
        before = len(devices(shell))
        assert "No session nowhere" in shell.run("chat", "nowhere").stderr
        assert len(devices(shell)) == before


def type_line(shown: Screen, text: str) -> None:
    shown.keys("-l", text)
    shown.keys("Enter")
