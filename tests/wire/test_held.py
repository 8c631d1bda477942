"""Turns that were accepted are not lost: they are on disk before they are acknowledged, shown until pi has them,
offered after a crash, and never run twice or by themselves."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.phone import CommandFailed, Frame
from tests.support.server import ROOT

from .rig import DIALECTS, FORCED, PUSH, Chat, Rig, bash, eventually, rig_with

OFFER = "extension_ui_request"
ENDLESS = "!slow 50\n!text 2000"


@pytest.fixture(params=DIALECTS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    """A server of its own, because it is killed; its fake pi writes a file like the real one."""
    with rig_with(tmp_path, request.param) as rig:
        yield rig


def held(rig: Rig, sid: str) -> list[str]:
    """The texts of the turns that are on disk for this session."""
    path = rig.server.data / "turns" / f"{sid}.json"
    turns = json.loads(path.read_text("utf-8"))["turns"] if path.exists() else []
    return [turn["text"] for turn in turns if turn["payload"] is not None]


def trace(chat: Chat) -> list[tuple[str, str]]:
    """(id, text) of the user rows a phone would draw."""
    events = chat.phone.session_detail(chat.wid, chat.sid)["trace"]
    return [(event["id"], event["text"]) for event in events if event["type"] == "user"]


def crash(chat: Chat, text: str = ENDLESS, **fields: Any) -> Chat:
    """Kill the server while the first answer is being written, start it again, and look at the session."""
    rig = chat.rig
    chat.phone.prompt(chat.sid, text, **fields)
    chat.phone.wait("text_delta")
    rig.server.restart(graceful=False)
    return Chat(rig, rig.phone(), chat.wid, chat.sid)


def offer(chat: Chat) -> Frame:
    chat.phone.open()
    chat.phone.subscribe(chat.sid)
    return chat.phone.wait(OFFER, since=0)


def test_a_turn_is_on_disk_before_it_is_acknowledged(place: Rig) -> None:
    chat = place.chat()
    chat.phone.send("prompt", sessionId=chat.sid, message=ENDLESS, clientTurnId="one")
    chat.phone.wait("turn_ack", stage="accepted", clientTurnId="one")
    assert held(place, chat.sid) == [ENDLESS]


def test_what_pi_has_written_down_is_held_no_longer(place: Rig) -> None:
    chat = place.chat()
    chat.play("hello", client_turn_id="one")
    eventually(lambda: held(place, chat.sid) == [], what="release")
    assert trace(chat)[0][1] == "hello"
    assert len(trace(chat)) == 1


def test_a_prompt_without_an_answer_survives_a_killed_server(place: Rig) -> None:
    chat = crash(place.chat(), client_turn_id="one")
    assert trace(chat) == [("held-one", ENDLESS)]
    assert place.prompts_of_pi() == [ENDLESS]


def test_it_is_offered_and_sent_again_once_by_a_person(place: Rig) -> None:
    text = "remember the milk\n" + ENDLESS
    chat = crash(place.chat(), text, client_turn_id="one")
    dialog = offer(chat)
    assert (dialog["id"], dialog["method"], dialog["options"]) == ("held-one", "select", ["Send again", "Discard"])
    assert "remember the milk" in dialog["title"]
    assert place.prompts_of_pi() == [text]  # never by itself
    chat.phone.answer_dialog("held-one", chat.sid, value="Send again")
    chat.phone.wait("text_delta", since=0)
    assert place.prompts_of_pi() == [text, text]
    chat.phone.answer_dialog("held-one", chat.sid, value="Send again")
    assert chat.phone.wait("error", since=0)["error"] == "UI request not found: held-one"
    assert place.prompts_of_pi() == [text, text]
    assert [text for _, text in trace(chat)] == [text]


def test_it_can_be_discarded(place: Rig) -> None:
    chat = crash(place.chat(), client_turn_id="one")
    offer(chat)
    chat.phone.answer_dialog("held-one", chat.sid, value="Discard")
    eventually(lambda: held(place, chat.sid) == [])
    assert trace(chat) == []
    again = place.join(chat.wid, chat.sid).phone
    again.command("get_session_stats", chat.sid)  # what follows the bootstrap
    assert OFFER not in again.types(0)


def test_closing_the_dialog_keeps_the_message(place: Rig) -> None:
    chat = crash(place.chat(), client_turn_id="one")
    offer(chat)
    chat.phone.answer_dialog("held-one", chat.sid, cancelled=True)
    chat.play("something else")
    assert {text for _, text in trace(chat)} == {ENDLESS, "something else"}
    eventually(lambda: held(place, chat.sid) == [ENDLESS])


def test_a_message_that_is_sent_again_in_vain_is_held_at_every_moment(tmp_path: Path) -> None:
    """pi dies before it takes it, and the server could do so between any two of its writes."""
    copies = tmp_path / "copies"
    copying = """if True:
        import sys
        sys.path.insert(0, sys.argv.pop(1))
        copies = sys.argv.pop(1)
        import oppi
        write_file = oppi.write_file
        def write_and_copy(path, data):
            write_file(path, data)
            if "/turns/" in path:
                with open(copies, "ab") as file:
                    file.write(data + bytes([10]))
        oppi.write_file = write_and_copy
        oppi.run()
    """
    with rig_with(tmp_path, program=[sys.executable, "-c", copying, str(ROOT), str(copies)]) as rig:
        chat = crash(rig.chat(), client_turn_id="one")
        offer(chat)
        witness = rig.join(chat.wid, chat.sid).phone
        pis = [pid for pid, line in rig.server.orphans() if f"/pi/{chat.sid}" in line and "--mode" in line]
        before = len(copies.read_bytes().splitlines())
        for pid in pis:
            os.kill(pid, signal.SIGSTOP)
        chat.phone.answer_dialog("held-one", chat.sid, value="Send again")
        witness.wait("extension_ui_notification", id="held-one", since=0)
        for pid in pis:
            os.kill(pid, signal.SIGKILL)
        witness.wait("session_ended", since=0)
        rig.server.stop()
        written = [json.loads(line)["turns"] for line in copies.read_bytes().splitlines()[before:]]
        texts = [[turn["text"] for turn in turns if turn["payload"] is not None] for turns in written]
        assert texts == [[ENDLESS]] * max(2, len(texts))


def test_several_are_offered_one_after_the_other(place: Rig) -> None:
    chat = place.chat()
    chat.phone.prompt(chat.sid, ENDLESS, client_turn_id="one")
    chat.phone.wait("text_delta")
    chat.phone.prompt(chat.sid, "and then?", client_turn_id="two")
    place.server.restart(graceful=False)
    chat = Chat(place, place.phone(), chat.wid, chat.sid)
    assert [key for key, _ in trace(chat)] == ["held-one", "held-two"]
    assert offer(chat)["id"] == "held-one"
    chat.phone.answer_dialog("held-one", chat.sid, value="Discard")
    assert chat.phone.wait(OFFER, id="held-two", since=0)["title"].endswith("and then?")


def test_a_repeated_turn_runs_nothing_after_a_restart(place: Rig) -> None:
    chat = crash(place.chat(), client_turn_id="one")
    offer(chat)
    request = chat.phone.mark()
    chat.phone.send("prompt", sessionId=chat.sid, message=ENDLESS, clientTurnId="one", requestId="r")
    assert chat.phone.wait("turn_ack", since=request, clientTurnId="one")["duplicate"] is True
    assert chat.phone.result("prompt", "r", since=request)["success"] is True
    chat.phone.send("prompt", sessionId=chat.sid, message="other", clientTurnId="one", requestId="s")
    assert chat.phone.result("prompt", "s", since=request)["error"] == "clientTurnId conflict: one"
    assert place.prompts_of_pi() == [ENDLESS]


def test_a_repeated_turn_runs_nothing_after_stop_and_resume(place: Rig) -> None:
    chat = place.chat()
    chat.play("hello", client_turn_id="one")
    chat.stop()
    chat = place.join(chat.wid, chat.sid)
    chat.phone.send("prompt", sessionId=chat.sid, message="hello", clientTurnId="one", requestId="r")
    assert chat.phone.wait("turn_ack", clientTurnId="one")["duplicate"] is True
    assert place.prompts_of_pi() == ["hello"]


def test_a_prompt_survives_the_death_of_pi(place: Rig) -> None:
    chat = place.chat()
    text = "!text 3\n!wait 100\n!crash 3"
    chat.phone.prompt(chat.sid, text, client_turn_id="one")
    chat.phone.wait("session_ended")
    assert trace(chat) == [("held-one", text)]


def test_a_refused_turn_is_not_held(place: Rig) -> None:
    chat = place.chat()
    with pytest.raises(CommandFailed):
        chat.phone.prompt(chat.sid, "nobody listens", "one", kind="steer")
    assert trace(chat) == []
    assert held(place, chat.sid) == []


def test_a_command_of_an_extension_is_not_held(place: Rig) -> None:
    chat = place.chat()
    chat.phone.prompt(chat.sid, "/hello", client_turn_id="one")
    eventually(lambda: held(place, chat.sid) == [], what="release")


def test_a_prompt_that_cannot_be_stored_is_refused(place: Rig) -> None:
    chat = place.chat()
    folder = place.server.data / "turns"
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.write_text("in the way")
    with pytest.raises(CommandFailed, match="cannot be kept safe"):
        chat.phone.prompt(chat.sid, "hello", "one")
    assert place.prompts_of_pi() == []


def test_a_queued_message_that_begins_while_the_queue_is_changed_runs_once(tmp_path: Path) -> None:
    """pi takes it between the last look at its queue and the command that empties the queue."""
    go = tmp_path / "go"
    late = """if True:
        import asyncio, os, sys
        sys.path.insert(0, sys.argv.pop(1))
        go = sys.argv.pop(1)
        import oppi
        request = oppi.PiProcess.request
        async def request_late(self, command, *more):
            while command["type"] == "clear_queue" and not os.path.exists(go):
                await asyncio.sleep(0.01)
            return await request(self, command, *more)
        oppi.PiProcess.request = request_late
        oppi.run()
    """
    with rig_with(tmp_path, program=[sys.executable, "-c", late, str(ROOT), str(go)]) as rig:
        chat = rig.chat()
        first = chat.ask()
        asking = bash(FORCED)
        for text in (asking, "two"):
            chat.phone.prompt(chat.sid, text, kind="follow_up")
        queue = chat.phone.command("get_queue", chat.sid)["data"]
        drafts = [{"message": "three"}, *({"id": i["id"], "message": i["message"]} for i in queue["followUp"])]
        fields = {"baseVersion": queue["version"], "steering": [], "followUp": drafts, "requestId": "change"}
        chat.phone.send("set_queue", sessionId=chat.sid, **fields)
        chat.phone.answer(first["id"], "deny")
        second = chat.phone.wait("permission_request", displaySummary=FORCED, since=0)
        go.touch()
        result = chat.phone.result("set_queue", "change", since=0)
        assert [item["message"] for item in result["data"]["followUp"]] == ["three", "two"]
        chat.phone.answer(second["id"], "deny")
        chat.phone.wait("message_end", role="assistant", content="ok: two", since=0)
        eventually(lambda: held(rig, chat.sid) == [])
        assert [text for _, text in trace(chat)] == [bash(PUSH), asking, "three", "two"]


@pytest.mark.parametrize("repeat", [False, True])
def test_a_prompt_of_app_10_is_safe_while_pi_starts(tmp_path: Path, repeat: bool) -> None:
    with rig_with(tmp_path, "0.87", {"START_DELAY": "3"}) as rig:
        wid, sid = rig.session()
        phone = rig.phone("1.0")
        phone.open_session(wid, sid)
        phone.send("prompt", message="early", clientTurnId="one", requestId="r")
        phone.wait("turn_ack", stage="dispatched", since=0)
        assert held(rig, sid) == ["early"]
        assert rig.prompts_of_pi() == []
        if repeat:
            phone.drop()
            phone = rig.phone("1.0")
            phone.open_session(wid, sid)
            phone.send("prompt", message="early", clientTurnId="one", requestId="r")
            assert phone.wait("turn_ack", since=0)["duplicate"] is True
        phone.wait("agent_end", since=0)
        assert rig.prompts_of_pi() == ["early"]
        eventually(lambda: held(rig, sid) == [])


@pytest.mark.parametrize("dialect", DIALECTS)
def test_of_several_turns_that_wait_the_one_that_began_is_called_started(tmp_path: Path, dialect: str) -> None:
    """While pi starts all are called dispatched, though it has none of them yet."""
    with rig_with(tmp_path, dialect, {"START_DELAY": "2"}) as rig:
        wid, sid = rig.session()
        phone = rig.phone("1.0")
        phone.open_session(wid, sid)
        words = ("one", "two", "three")
        for word in words:
            phone.send("prompt", message=f"!wait 100\n!say {word}", clientTurnId=word, requestId=word)
        for word in words:
            phone.wait("turn_ack", clientTurnId=word, stage="dispatched", since=0)
        assert rig.prompts_of_pi() == []
        for word in words:
            answer = phone.wait("message_end", role="assistant", content=word, since=0)
            told = phone.frames[: phone.frames.index(answer)]
            started = [frame["clientTurnId"] for frame in told if frame["type"] == "turn_ack" and frame["stage"] == "started"]
            assert started == list(words[: words.index(word) + 1])


def test_a_pi_that_does_not_react_is_told_of(tmp_path: Path) -> None:
    """With a patience of less than the 30 s that a person gets to see."""
    impatient = "import sys; sys.path.insert(0, sys.argv.pop(1)); import oppi; oppi.DEAF_S = 0.2; oppi.run()"
    with rig_with(tmp_path, program=[sys.executable, "-c", impatient, str(ROOT)]) as rig:
        chat = rig.chat()
        chat.phone.prompt(chat.sid, "!hang", wait=None)
        chat.phone.wait("message_end")
        for number in range(5):  # the first may still meet a pi that listens
            chat.phone.send("prompt", sessionId=chat.sid, message=f"anybody there? {number}")
        assert "has not reacted" in chat.phone.wait("error")["error"]
        chat.stop()
        assert chat.phone.session_detail(chat.wid, chat.sid)["session"]["status"] == "stopped"
