"""Sessions that end and begin again: nothing of the conversation is lost and no process is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .conftest import LONG, Chat, Place, clone, eventually


def texts(trace: list[dict[str, Any]]) -> list[str]:
    return [event["text"].strip() for event in trace if event["type"] in ("user", "assistant")]


def conversation(place: Place, tmp_path: Path) -> Chat:
    """A chat with one finished turn on a server of its own."""
    place.server.start()
    chat = Chat(place, place.server.pair("1.1"), tmp_path / "project")
    chat.connect()
    assert chat.turn("!say remember the cheese") == "remember the cheese"
    return chat


@pytest.mark.parametrize("way", ["rest", "socket"])
def test_a_stopped_session_comes_back_with_its_conversation(chat: Chat, way: str) -> None:
    chat.turn("!say remember the cheese")
    before, seq = chat.trace(), chat.phone.last_seq[chat.sid]
    pids = {pid for pid, _ in chat.server.orphans()}
    chat.phone.mark()
    if way == "rest":
        assert chat.phone.stop(chat.wid, chat.sid)["session"]["status"] == "stopped"
    else:
        chat.phone.send("stop_session", sessionId=chat.sid)
    chat.wait("session_ended")
    assert chat.session()["status"] == "stopped"
    assert {pid for pid, _ in chat.server.orphans()} < pids, "its pi is still there"
    assert chat.trace() == before
    chat.phone.send("prompt", sessionId=chat.sid, message="!say nobody hears this", requestId="r1")
    answer = chat.wait("command_result", requestId="r1")
    assert answer["success"] is False and chat.sid in answer["error"]

    assert chat.phone.resume(chat.wid, chat.sid)["status"] == "ready"
    connected = chat.phone.subscribe(chat.sid)[0]
    assert connected["currentSeq"] >= seq
    assert chat.turn("!say I do") == "I do"
    assert "remember the cheese" in str(chat.place.sees())
    after = chat.trace()
    assert after[: len(before)] == before
    assert texts(after) == ["!say remember the cheese", "remember the cheese", "!say I do", "I do"]


def test_stop_session_in_the_middle_of_an_answer(chat: Chat) -> None:
    chat.turn("!say before")
    chat.ask("!slow 30\n!text 2000")
    chat.wait(lambda f: f["type"] == "text_delta" and "w5 " in f["delta"])
    chat.phone.send("stop_session", sessionId=chat.sid)
    chat.wait("stop_requested")
    chat.wait("stop_confirmed")
    ended = chat.wait("session_ended")
    kept = chat.trace()
    assert any("w0 w1 w2 " in text for text in texts(kept)), "the part that was said is lost"
    assert [f for f in chat.phone.frames[chat.phone.frames.index(ended) + 1 :] if f.get("sessionId") == chat.sid] == []


def test_stop_session_while_a_command_runs_leaves_no_process(chat: Chat) -> None:
    chat.ask('!tool bash {"command": "touch marker; sleep 32.25"}\n!say never')
    chat.approve()
    eventually((chat.folder / "marker").exists, "the command to run")
    chat.phone.send("stop_session", sessionId=chat.sid)
    chat.wait("session_ended")
    eventually(lambda: not chat.place.running("sleep 32.25"), "the command to end", 15)


def test_two_sessions_do_not_hear_each_other(chat: Chat) -> None:
    other = chat.phone.create_session(chat.wid, model="mock/mock-2")["id"]
    chat.phone.subscribe(other)
    chat.phone.mark()
    chat.phone.prompt(chat.sid, "!slow 10\n!say the first session speaks here", timeout=LONG)
    chat.phone.prompt(other, "!slow 10\n!say the second one speaks here", timeout=LONG)
    for sid in (chat.sid, other):
        chat.wait("agent_end", sessionId=sid)
    for sid, text in ((chat.sid, "the first session speaks here"), (other, "the second one speaks here")):
        deltas = [frame for frame in chat.phone.since() if frame["type"] == "text_delta" and frame["sessionId"] == sid]
        assert "".join(frame["delta"] for frame in deltas) == text
    chat.phone.stop(chat.wid, other)


def test_a_deleted_session_is_gone(chat: Chat) -> None:
    other = chat.phone.create_session(chat.wid, model="mock/mock-2")["id"]
    chat.phone.subscribe(other)
    count = len(chat.server.orphans())
    chat.phone.delete(chat.wid, other)
    chat.wait("session_deleted", sessionId=other)
    assert other not in [session["id"] for session in chat.phone.sessions(chat.wid)]
    assert len(chat.server.orphans()) < count


def back_with_nothing_left(own: Place) -> None:
    """The server is killed and starts again; then nothing runs of what it ran before."""
    before = {pid for pid, _ in own.server.orphans()}
    own.server.kill()
    own.server.start()
    eventually(lambda: not before & {pid for pid, _ in own.server.orphans()}, "the end of what the server had started")


def test_kill_9_in_the_middle_of_an_answer(own: Place, tmp_path: Path) -> None:
    chat = conversation(own, tmp_path)
    chat.ask("!slow 30\n!text 2000")
    chat.wait("text_delta")
    seq = chat.phone.last_seq[chat.sid]
    back_with_nothing_left(own)
    phone = clone(chat.phone)
    chat.phone = phone
    assert [s["status"] for s in phone.sessions() if s["id"] == chat.sid] == ["stopped"]
    assert texts(chat.trace())[:2] == ["!say remember the cheese", "remember the cheese"]
    phone.open()
    connected = phone.subscribe(chat.sid)[0]
    assert connected["currentSeq"] >= seq
    assert phone.events(chat.wid, chat.sid, seq)["catchUpComplete"] is False
    assert chat.turn("!say I do") == "I do"
    assert phone.last_seq[chat.sid] > seq
    assert "remember the cheese" in str(own.sees())
    phone.raise_errors()
    phone.drop()


def test_kill_9_while_a_command_runs_leaves_no_process(own: Place, tmp_path: Path) -> None:
    chat = conversation(own, tmp_path)
    chat.ask('!tool bash {"command": "touch marker; sleep 33.25"}\n!say never')
    chat.approve()
    eventually((chat.folder / "marker").exists, "the command to run")
    back_with_nothing_left(own)
    chat.phone = clone(chat.phone)
    chat.connect()
    assert chat.turn("!say I do") == "I do"
    assert "remember the cheese" in str(own.sees())
    chat.phone.raise_errors()
    chat.phone.drop()


@pytest.mark.parametrize("graceful", [True, False], ids=["terminated", "killed"])
def test_an_approval_that_was_open_at_a_restart_never_runs_its_tool(own: Place, tmp_path: Path, graceful: bool) -> None:
    chat = conversation(own, tmp_path)
    chat.ask('!tool bash {"command": "touch marker"}\n!say never')
    asked = chat.wait("permission_request")
    own.server.restart(graceful=graceful)
    chat.phone = clone(chat.phone)
    assert chat.phone.pending() == []
    chat.connect()
    chat.phone.answer(asked["id"], "allow")
    chat.wait("error", error=f"Permission request not found: {asked['id']}")
    assert chat.turn("!say I do") == "I do"
    assert not (chat.folder / "marker").exists()
    chat.phone.raise_errors()
    chat.phone.drop()


def test_a_half_written_line_costs_at_most_itself(own: Place, tmp_path: Path) -> None:
    chat = conversation(own, tmp_path)
    chat.phone.stop(chat.wid, chat.sid)
    path = next((own.server.data / "pi" / chat.sid).glob("*.jsonl"))
    with path.open("a") as file:
        file.write(json.dumps({"type": "message", "id": "deadbeef"})[:-9])
    chat.phone.resume(chat.wid, chat.sid)
    chat.phone.subscribe(chat.sid)
    assert chat.turn("!say I do") == "I do"
    assert "remember the cheese" in str(own.sees())
    assert texts(chat.trace()) == ["!say remember the cheese", "remember the cheese", "!say I do", "I do"]
    chat.phone.raise_errors()
    chat.phone.drop()


def test_a_second_server_on_the_same_data_is_refused_and_harms_nothing(own: Place, tmp_path: Path) -> None:
    chat = conversation(own, tmp_path)
    done = own.server.cli("serve", "--host", "127.0.0.1", "--port", "0", "--data-dir", str(own.server.data), timeout=20)
    assert done.returncode != 0 and len(done.stderr.splitlines()) == 1
    assert chat.turn("!say still here") == "still here"
    chat.phone.raise_errors()
    chat.phone.drop()
