"""How many sessions may run, and for how long."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .rig import PUSH, Chat, Rig, bash, eventually, rig_with

PER_WORKSPACE = ("SESSION_LIMIT_WORKSPACE", "Workspace session limit reached (1)")
IN_ALL = ("SESSION_LIMIT_GLOBAL", "Global session limit reached (2)")


@pytest.fixture
def tight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    config = {"maxSessionsPerWorkspace": 1, "maxSessionsGlobal": 2}
    with rig_with(tmp_path_factory.mktemp("tight"), config=config) as rig:
        yield rig


def test_one_too_many_is_refused_on_every_way_in(tight: Rig) -> None:
    first = tight.chat()
    refused(tight, *tight.session(), *PER_WORKSPACE)
    tight.chat("1.0", "host_standard")
    third = tight.session("host_locked")
    refused(tight, *third, *IN_ALL)
    first.stop()
    Chat(tight, tight.stream(), *third).phone.subscribe(third[1])
    first.phone.mark()
    assert first.phone.command("subscribe", first.sid)["success"] is False


def refused(rig: Rig, wid: str, sid: str, code: str, text: str) -> None:
    new, old = rig.stream(), rig.phone("1.0")
    result = new.command("subscribe", sid)
    assert (result["success"], result["error"]) == (False, text)
    status, body = new.request("POST", f"/workspaces/{wid}/sessions/{sid}/resume", {})
    assert (status, body["error"], body["code"]) == (409, text, code)
    old.open_session(wid, sid)
    error = old.wait("error")
    assert (error["error"], error["code"], error["fatal"]) == (text, code, True)
    assert old.closed is None
    reply = new.call("POST", f"/workspaces/{wid}/sessions", {"prompt": "hello"}, expect=201)
    assert reply["prompted"] is False
    new.delete(wid, reply["session"]["id"])


def test_many_starts_at_once_stay_within_the_limit(tight: Rig) -> None:
    sessions = [tight.session() for _ in range(4)]
    phone = tight.stream()
    for number, (_, sid) in enumerate(sessions):
        phone.send("subscribe", sessionId=sid, requestId=str(number))
    results = [phone.result("subscribe", str(number))["success"] for number in range(4)]
    assert results.count(True) == 1


@pytest.fixture(scope="module")
def restless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig_with(tmp_path_factory.mktemp("restless"), config={"sessionIdleTimeoutMs": 700}) as rig:
        yield rig


def test_only_what_is_idle_is_stopped(restless: Rig) -> None:
    idle, busy, asking, dialog = (restless.chat() for _ in range(4))
    busy.say("!toolwait 60000\n" + bash("sleep 60"))
    asking.ask(PUSH)
    dialog.say("!dialog input")
    dialog.phone.wait("extension_ui_request")
    assert idle.phone.wait("session_ended")["reason"] == "stopped"
    late = restless.chat()
    late.phone.wait("session_ended")
    for chat in (busy, asking, dialog):
        assert "session_ended" not in chat.phone.types(0)
    busy.phone.send("stop", sessionId=busy.sid)
    busy.phone.wait("session_ended")
    statuses = {s["id"]: s["status"] for s in restless.phone().sessions()}
    assert statuses[idle.sid] == "stopped" and statuses[asking.sid] == "busy"
    eventually(lambda: len(restless.server.orphans()) == 2)
    restless.sweep()


def test_a_command_of_the_person_that_runs_is_not_idle(tmp_path: Path) -> None:
    """pi 0.73 says nothing before it has ended."""
    with rig_with(tmp_path, "0.73", config={"sessionIdleTimeoutMs": 700}) as rig:
        chat = rig.chat("1.0")
        result = chat.phone.command("bash", command="sleep 3")
        assert result["success"], result
        chat.phone.wait("session_ended")
