"""Strangers, odd files, stolen tokens and bad moments: nobody else waits, and nothing is kept that should be gone."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import pytest

import oppi
from tests.abuse.conftest import MEMORY, memory
from tests.abuse.test_http import dial, exchange, head, raise_limit
from tests.support.phone import Phone, Response, parse_invite_v2
from tests.support.server import FAKE_PI, Server, default_program
from tests.wire.rig import Rig, eventually, rig_with, status_is

MB = 1_000_000
HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"


@contextlib.contextmanager
def in_time(rig: Rig) -> Iterator[None]:
    """A server that does not answer is not left to eat the machine."""
    try:
        yield
    except OSError:
        rig.server.kill()
        raise


def ask(rig: Rig, method: str, path: str, body: Any = None) -> Response:
    """The answer to a request, which has to come soon."""
    with in_time(rig):
        return rig.phone().raw(method, path, body, timeout=5)


def pids_of(rig: Rig, sid: str) -> list[int]:
    """The processes of a session: its id stands in their command line."""
    return [pid for pid, line in rig.server.orphans() if sid in line]


def own_pi(folder: Path, *lines: str) -> Path:
    """A pi that obeys these lines of shell before it is the fake one."""
    path = folder / "pi"
    log = f'export FAKE_PI_LOG="{folder}/stdin.log"'
    path.write_text("\n".join(["#!/bin/sh", log, f'cd "{folder}"', *lines, f'exec "{sys.executable}" "{FAKE_PI}" "$@"', ""]))
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(("end", "status"), [(b"\x01", 400), (b"", 200)])
def test_a_header_of_white_space_stops_nobody(rig: Rig, end: bytes, status: int):
    """One request of a stranger would stop the server for minutes."""
    request = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\nx:" + b" " * 30_000 + end + b"\r\n\r\n"
    with in_time(rig):
        assert exchange(rig, request)[0] == status


@pytest.mark.parametrize("reads", [False, True])
def test_endless_requests_in_one_connection_fill_no_memory(rig: Rig, reads: bool):
    """A stranger who sends faster than he is answered would fill the memory of the server."""
    with dial(rig) as sock, sock.dup() as reader:
        thread = threading.Thread(target=lambda: all(iter(lambda: reader.recv(65536), b"")))
        if reads:
            thread.start()
        sock.settimeout(0.5)
        sent, until = 0, time.monotonic() + 5
        with contextlib.suppress(TimeoutError):  # he has to wait: that is how it should be
            while sent < 300 * MB and time.monotonic() < until:
                sent += sock.send(HEALTH * 2000)
        assert ask(rig, "GET", "/me").status == 200
        used = memory(rig.server.pid)
        sock.shutdown(socket.SHUT_RDWR)
        if reads:
            thread.join()
    assert used < MEMORY, f"{used} MB after {sent / MB} MB of requests"


def test_pings_whose_answers_nobody_reads_end_the_connection(rig: Rig):
    """A stolen token would fill the memory of the server."""
    upgrade = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13")
    pings = (b"\x89\xfd\0\0\0\0" + b"x" * 125) * 1000
    with dial(rig) as sock, pytest.raises(ConnectionError):
        sock.sendall(head(rig, "GET /stream HTTP/1.1", *upgrade, "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="))
        assert sock.recv(12).endswith(b"101")
        for _ in range(60 * MB // len(pings)):
            sock.sendall(pings)


def test_a_burst_of_strangers_takes_no_more_connections_than_allowed(tmp_path: Path):
    """The server would run out of files: no phone gets in, no session starts."""
    raise_limit(3000)
    program = ["sh", "-c", 'ulimit -n 1000; exec "$0" "$@"', *default_program()]
    with rig_with(tmp_path, program=program) as rig, contextlib.ExitStack() as strangers:
        chat = rig.chat()
        for _ in range(12):
            os.kill(rig.server.pid, signal.SIGSTOP)  # so that it finds all of them at once
            try:
                for _ in range(100):
                    strangers.enter_context(dial(rig))
            finally:
                os.kill(rig.server.pid, signal.SIGCONT)
            assert ask(rig, "GET", "/me").status == 200
        chat.play("!say still here")
        rig.chat().play("!say newly come")


def test_what_a_stranger_writes_into_the_log_is_short(rig: Rig):
    """A stranger would fill the disk with lines of 32 kB."""
    upgrade = ("Upgrade: websocket", "Connection: Upgrade")
    for path, more in (("/plain", ()), ("/socket", upgrade)):
        request = head(rig, f"GET {path}{'a' * 20_000} HTTP/1.1", "Connection: close", *more, token=False)
        assert exchange(rig, request)[0] == 401
        assert len(rig.server.wait_stderr(path)) < 300


def test_a_push_token_is_no_place_to_store_things(rig: Rig):
    """A stolen token would make config.json grow by 20 MB with each request, and every read of it slow."""
    assert ask(rig, "POST", "/me/device-token", {"deviceToken": "a" * 200}).status == 200
    assert ask(rig, "POST", "/me/device-token", {"deviceToken": "b" * 201}).status == 400
    assert "b" * 201 not in (rig.server.data / "config.json").read_text()


@pytest.mark.parametrize("name", ["model", "thinking"])
@pytest.mark.parametrize("text", ["a\0b", "a\nb", "\x1b[2J", "\ud800"])
def test_a_model_with_control_characters_is_refused(rig: Rig, name: str, text: str):
    """Such a session could never be started, and each try would lose open files."""
    answer = ask(rig, "POST", f"/workspaces/{rig.workspace()}/sessions", {name: text})
    assert answer.status == 400 and "plain text" in answer.json()["error"]


@contextlib.contextmanager
def processor_time(seconds: float) -> Iterator[None]:
    """Fail what computes longer than that, however busy the machine is."""

    def late(*_: object) -> None:
        pytest.fail(f"still computing after {seconds} s of processor time")

    signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL)


@pytest.mark.parametrize(
    "command",
    ["echo " + "QUJD" * 50_000 + " | base64 -d > x.png", "a" * 200_000, ":" * 200_000, ":(){" * 50_000, ":(){ " * 40_000],
    ids=lambda command: command[:10],
)
def test_a_long_command_is_judged_at_once(command: str):
    """A picture written as base64 would stop the server for good."""
    context = oppi.Context("s", "w", "host", "allow", (), "/home/u", "/home/u/p", data_dir="/home/u/.oppi", now=1000)
    with processor_time(2):
        assert oppi.evaluate(oppi.Call("bash", {"command": command}), context).action in oppi.ACTIONS


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def newlines(path: Path) -> None:
    path.write_text("---\n" + "\n" * 100_000)


@pytest.mark.parametrize("bait", [os.mkfifo, newlines])
def test_an_odd_skill_hides_no_others_and_stops_nobody(rig: Rig, bait: Callable[[Path], None]):
    """Whoever opens the list of skills would stop the server."""
    odd, good = (rig.server.agent_dir / "skills" / name for name in ("odd", "sound"))
    try:
        odd.mkdir(parents=True)
        good.mkdir()
        (good / "SKILL.md").write_text("---\nname: sound\ndescription: as it should be\n---\n")
        bait(odd / "SKILL.md")
        assert "sound" in [skill["name"] for skill in ask(rig, "GET", "/skills").json()["skills"]]
    finally:
        shutil.rmtree(odd.parent)


@pytest.mark.parametrize("bait", [os.mkfifo, zeros])
def test_odd_settings_in_a_repository_stop_nobody(tmp_path: Path, bait: Callable[[Path], None]):
    """Starting a session in a cloned repository would stop the server, or fill its memory."""
    with rig_with(tmp_path, "0.73") as rig:
        wid, sid = rig.session()
        settings = rig.server.workspace / ".pi" / "settings.json"
        settings.parent.mkdir()
        bait(settings)
        answer = ask(rig, "POST", f"/workspaces/{wid}/sessions/{sid}/resume", {})
        assert answer.status == 500 and ".pi/settings.json" in answer.json()["error"]
        settings.unlink()
        rig.join(wid, sid).play("!say plain again")


def test_a_session_that_is_being_deleted_is_not_resumed(rig: Rig):
    """It would come back without a record: its pi runs on, and no other session can be started."""
    chat = rig.chat()
    chat.say("!hang")  # which makes its end take a while
    with ThreadPoolExecutor() as pool:
        deletion = pool.submit(rig.phone().raw, "DELETE", chat.path)
        chat.phone.wait(status_is("stopping"))
        assert rig.phone().raw("POST", chat.path + "/resume", {}).status == 404
        assert deletion.result().status == 200
    eventually(lambda: not pids_of(rig, chat.sid))
    assert ask(rig, "GET", chat.path).status == 404
    assert chat.sid not in [session["id"] for session in rig.phone().sessions()]
    rig.chat().play("!say there is room")


def test_a_prompt_to_a_session_that_is_ending_is_refused(rig: Rig):
    """The phone would show it as sent, and it would be lost."""
    chat = rig.chat()
    chat.say("!hang hard")
    chat.phone.send("stop_session", sessionId=chat.sid)
    chat.phone.wait(status_is("stopping"))
    mark = chat.phone.mark()
    result = chat.phone.command("prompt", chat.sid, message="precious", clientTurnId="t")
    assert result["success"] is False and "not active" in result["error"]
    assert "turn_ack" not in chat.phone.types(mark)
    for pid in pids_of(rig, chat.sid):
        os.kill(pid, signal.SIGKILL)
    chat.phone.wait("session_ended")
    assert "precious" not in rig.prompts_of_pi()


@pytest.mark.parametrize("generation", ["1.0", "1.1"])
def test_what_a_revoked_phone_sent_before_is_not_carried_out(tmp_path: Path, generation: str):
    """The thief's prompt, sent while pi starts, would be played after his phone was locked out."""

    def devices() -> set[str]:
        return {device["id"] for device in json.loads(rig.server.cli("devices", "list", "--json").stdout)["devices"]}

    pi = own_pi(tmp_path, 'case "$*" in *--mode*) while [ ! -e go ]; do sleep 0.05; done;; esac')
    with rig_with(tmp_path, pi=pi) as rig:
        wid, sid = rig.session()
        known = devices()
        thief = rig.server.pair(generation)
        if generation == "1.0":
            thief.open_session(wid, sid)
        else:
            thief.open()
            thief.send("subscribe", sessionId=sid, requestId="s")
        thief.prompt(sid, "!say from the thief", wait=None)
        assert thief.socket is not None and thief.socket.ping().wait(10)  # all before it has arrived
        (lost,) = devices() - known
        assert rig.server.cli("devices", "revoke", lost).returncode == 0
        thief.wait_closed()
        (tmp_path / "go").touch()
        rig.join(wid, sid).play("!say from the owner")
        assert rig.prompts_of_pi() == ["!say from the owner"]
        thief.drop()


LATE = r"""
import json, os, sys
def out(**fields):
    print(json.dumps(fields), flush=True)
def gate(**body):
    out(type="extension_ui_request", id="gate", method="input", title="oppi-gate", placeholder=json.dumps(body))
gate(hello=1)
for line in sys.stdin:
    message = json.loads(line)
    with open(os.environ["FAKE_PI_LOG"], "a") as log:
        log.write(line)
    if message["type"] == "abort":
        gate(tool="bash", toolCallId="late", input={"command": "ls"})
    if "id" in message:
        out(type="response", id=message["id"], command=message["type"], success=True, data={})
    if message["type"] == "prompt":
        out(type="agent_start")
"""


@pytest.mark.parametrize("stop", ["stop", "stop_session"])
def test_a_tool_asked_for_after_the_stop_is_denied(tmp_path: Path, stop: str):
    """A command would still run after the stop button was pressed."""
    (tmp_path / "late.py").write_text(LATE)
    pi = own_pi(tmp_path, f'case "$*" in *--mode*) exec "{sys.executable}" late.py;; esac')
    with rig_with(tmp_path, pi=pi) as rig:
        chat = rig.chat()
        chat.say("go on")
        chat.phone.wait("agent_start")
        chat.phone.send(stop, sessionId=chat.sid)
        assert eventually(rig.verdicts_of_pi)[0] == "deny"


def test_a_pi_that_dies_before_its_gate_is_there_is_no_ready_session(tmp_path: Path):
    """The phone would show a session as ready whose pi is gone, and not say why."""
    pi = own_pi(
        tmp_path,
        'case "$*" in *--mode*) if [ ! -e once ]; then touch once; read line',
        """id=$(printf %s "$line" | sed 's/.*"id":"\\([^"]*\\)".*/\\1/')""",
        'echo \'{"type":"response","id":"\'$id\'","command":"get_state","success":true,"data":{}}\'',
        "echo the extension is broken >&2; exit 3; fi;; esac",
    )
    with rig_with(tmp_path, pi=pi) as rig:
        wid, sid = rig.session()
        status, answer = rig.phone().request("POST", f"/workspaces/{wid}/sessions/{sid}/resume", {})
        assert status == 500 and "pi exited before ready" in answer["error"] and "is broken" in answer["error"]
        assert [session["status"] for session in rig.phone().sessions(wid)] == ["stopped"]
        assert not pids_of(rig, sid)
        rig.join(wid, sid).play("!say well again")


def test_a_version_that_could_not_be_told_is_asked_for_again(tmp_path: Path):
    """A pi that was being updated at that moment would be treated as an old one until the server restarts."""
    pi = own_pi(tmp_path, 'case "$*" in *--version*) if [ ! -e once ]; then touch once; exit 1; fi;; esac')
    with rig_with(tmp_path, pi=pi) as rig:
        eventually((tmp_path / "once").exists)
        for _ in range(2):
            rig.chat().play("!say modern")
        assert rig.phone().server_info()["piVersion"] == "0.87.1"


def test_an_invite_is_redeemed_on_disk_or_not_at_all():
    """With a full disk the phone would be paired until the server restarts, and then locked out for good."""
    with Server(config={"invite": {"maxAgeSeconds": 600}}) as server:
        phone = Phone(server.base_url, parse_invite_v2(server.invite()["inviteURLv2"]).token, "1.0")
        lock = server.data / ".lock"
        lock.unlink()
        lock.mkdir()  # nothing can be changed now, not even by root
        assert [phone.raw("GET", "/me").status for _ in range(3)] == [401] * 3
        lock.rmdir()
        assert phone.raw("GET", "/me").status == 200
        server.restart()
        assert phone.raw("GET", "/me").status == 200


def test_a_deleted_workspace_does_not_come_back(tmp_path: Path):
    """Choosing a model in a session of it would bring it back after the next start."""
    with rig_with(tmp_path) as rig:
        chat = rig.chat()
        rig.phone().call("DELETE", f"/workspaces/{chat.wid}")
        chat.phone.command("set_model", chat.sid, provider="mock", modelId="mock-2", check=True)
        rig.server.restart()
        assert chat.wid not in [workspace["id"] for workspace in rig.phone().workspaces()]
