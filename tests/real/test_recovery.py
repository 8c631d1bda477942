"""What survives when something is killed: prompts that were accepted, and whole conversations."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.support.mock_llm import last_prompt
from tests.support.phone import Frame, Turn

from .conftest import LONG, Chat, Place, clone, eventually

SLOW = "Remember the cheese please\n!wait 1500\n!say the answer"  # there is no answer when whatever it is gets killed
WAITING = '!tool bash {"command": "touch marker"}\n!say after the tool'
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
AGAIN, DISCARD = {"value": "Send again"}, {"value": "Discard"}
OPEN_ELSEWHERE = "This pi session is open in another session: "


def begin(place: Place, folder: Path, generation: str = "1.1") -> Chat:
    """A running session on a server of its own."""
    if not place.server.alive:
        place.server.start()
    chat = Chat(place, place.server.pair(generation), folder / "project")
    chat.connect()
    return chat


def back(chat: Chat) -> None:
    """Kill the server without a warning and start it again; the phone has forgotten everything and is not connected."""
    chat.server.kill()
    chat.phone.drop()
    left = set(chat.server.orphans())
    chat.server.start()
    eventually(lambda: not left & set(chat.server.orphans()), "the pi of the killed server to end")
    chat.phone = clone(chat.phone)


def runs(place: Place, text: str) -> int:
    """How often the model was given this prompt."""
    found = [last_prompt(request["messages"]) for request in place.llm.requests]  # type: ignore[no-untyped-call]
    return sum((said.rstrip("\n"), answers) == (text, 0) for said, answers in found)  # a picture adds an empty line


def handed_over(chat: Chat, text: str = SLOW, **options: Any) -> Turn:
    """Send a prompt and wait until the model has it; it has not answered yet."""
    turn = chat.phone.prompt(chat.sid, text, timeout=LONG, **options)
    eventually(lambda: runs(chat.place, text) == 1, "the prompt to reach the model")
    return turn


def questions(chat: Chat) -> list[str]:
    return [event["text"] for event in chat.trace() if event["type"] == "user"]


def held(chat: Chat) -> list[tuple[str, str]]:
    """(id, text) of the messages at the end of the chat which pi does not have."""
    trace = chat.trace()
    found = [event for event in trace if event["id"].startswith("held-")]
    assert trace[len(trace) - len(found) :] == found, "they stand at the end"
    assert {event["type"] for event in found} <= {"user"}
    return [(event["id"], event["text"]) for event in found]


def is_offer(frame: Frame) -> bool:
    return frame["type"] == "extension_ui_request" and str(frame["id"]).startswith("held-")


def offered(chat: Chat, turn: Turn, text: str = SLOW) -> str:
    """Wait for the question what is to become of a turn; its id."""
    chat.wait(is_offer, since=0, id=f"held-{turn.client_turn_id}")
    frame = next(f for f in chat.phone.frames if is_offer(f) and f["id"] == f"held-{turn.client_turn_id}")
    assert frame["method"] == "select" and frame["options"] == ["Send again", "Discard"]
    assert frame["sessionId"] == chat.sid and text.split("\n")[0][:20] in frame["title"]
    before = [f["type"] for f in chat.phone.frames[: chat.phone.frames.index(frame)]]
    assert "state" in before, "the app clears a dialog that comes earlier"
    return str(frame["id"])


def nothing_offered(chat: Chat) -> None:
    """Reconnect, and let a whole turn pass, in which an offer would have come."""
    chat.phone.drop()
    chat.phone = clone(chat.phone)
    chat.connect()
    assert chat.turn("!say nothing else") == "nothing else"
    assert [frame for frame in chat.phone.frames if is_offer(frame)] == []


def answered(chat: Chat, text: str) -> None:
    chat.wait("message_end", role="assistant", content=text)
    chat.wait(lambda f: f["type"] == "state" and f["session"]["status"] == "ready")


def reply(chat: Chat, dialog: str, answer: dict[str, Any]) -> None:
    chat.phone.mark()
    chat.phone.answer_dialog(dialog, chat.sid, **answer)


def unknown(chat: Chat, dialog: str, answer: dict[str, Any]) -> None:
    """Answer a question that somebody has answered."""
    reply(chat, dialog, answer)
    chat.wait("error", error=f"UI request not found: {dialog}")


def kill_pi(place: Place) -> None:
    """As if the machine took it; the server has only this one, once it has asked pi for its version and models."""
    [(pid, _)] = eventually(lambda: len(place.server.orphans()) == 1 and place.server.orphans(), "one pi to be left")
    os.kill(pid, signal.SIGKILL)


def private(path: Path) -> bool:
    return stat.S_IMODE(path.stat().st_mode) & 0o077 == 0


# ---- prompts that pi does not have -----------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", ["1.0", "1.1"])
def test_a_prompt_that_a_killed_server_had_accepted_is_offered_and_runs_once(
    own: Place, tmp_path: Path, generation: str
) -> None:
    """pi writes no file before its first answer, so nobody but the server can still know of this prompt."""
    chat = begin(own, tmp_path, generation)
    turn = handed_over(chat)
    assert questions(chat) == [SLOW], "shown once while it runs"
    back(chat)
    assert chat.session()["status"] == "stopped"
    assert held(chat) == [(f"held-{turn.client_turn_id}", SLOW)] and len(chat.trace()) == 1
    chat.connect()
    dialog = offered(chat, turn)
    assert runs(own, SLOW) == 1, "nothing is sent again by itself"
    reply(chat, dialog, AGAIN)
    answered(chat, "the answer")
    assert runs(own, SLOW) == 2 and questions(chat) == [SLOW] and held(chat) == []
    assert chat.phone.types().count("agent_start") == 1
    unknown(chat, dialog, AGAIN)
    nothing_offered(chat)
    assert runs(own, SLOW) == 2 and questions(chat) == [SLOW, "!say nothing else"]
    chat.phone.close()


def test_a_prompt_whose_pi_was_killed_is_offered_with_its_picture(own: Place, tmp_path: Path) -> None:
    chat = begin(own, tmp_path)
    turn = handed_over(chat, images=[{"data": PIXEL, "mimeType": "image/png"}])
    kill_pi(own)
    chat.wait("session_ended", sessionId=chat.sid)
    eventually(lambda: chat.session()["status"] == "stopped", "the session to be stopped")
    [(key, text)] = held(chat)
    assert key == f"held-{turn.client_turn_id}" and text.startswith(SLOW.split("\n")[0])
    chat.phone.resume(chat.wid, chat.sid)
    nobody = chat.phone = clone(chat.phone)
    chat.connect()
    dialog = offered(chat, turn)
    assert runs(own, SLOW) == 1
    reply(chat, dialog, AGAIN)
    answered(chat, "the answer")
    assert runs(own, SLOW) == 2 and held(chat) == [] and len(questions(chat)) == 1
    assert PIXEL in str(own.sees()), "the picture is part of the message"
    nobody.close()


@pytest.mark.parametrize("answer", [DISCARD, {"cancelled": True}], ids=["discarded", "cancelled"])
def test_a_prompt_is_forgotten_only_when_the_person_says_so(own: Place, tmp_path: Path, answer: dict[str, Any]) -> None:
    chat = begin(own, tmp_path)
    turn = handed_over(chat)
    file = own.server.data / "turns" / f"{chat.sid}.json"
    assert private(file) and private(file.parent)
    back(chat)
    chat.connect()
    reply(chat, offered(chat, turn), answer)
    assert chat.turn("!say next") == "next"
    assert runs(own, SLOW) == 1 and SLOW not in str(own.sees())
    if answer is DISCARD:
        assert held(chat) == [] and questions(chat) == ["!say next"]
        nothing_offered(chat)
    else:
        assert questions(chat) == ["!say next", SLOW] and len(held(chat)) == 1
        chat.phone.drop()
        chat.phone = clone(chat.phone)
        chat.connect()
        reply(chat, offered(chat, turn), DISCARD)
        eventually(lambda: held(chat) == [], "it to be forgotten")
    eventually(lambda: '"payload":{' not in "".join(file.read_text("utf-8").split()), "it to be forgotten on disk")
    back(chat)
    assert held(chat) == []
    nothing_offered(chat)
    assert runs(own, SLOW) == 1
    chat.phone.delete(chat.wid, chat.sid)
    eventually(lambda: not file.exists(), "what belongs to a deleted session to go with it")
    chat.phone.close()


def test_the_first_phone_that_answers_decides(own: Place, tmp_path: Path) -> None:
    chat = begin(own, tmp_path)
    turn = handed_over(chat)
    back(chat)
    chat.connect()
    other = own.server.pair("1.0")
    other.open_session(chat.wid, chat.sid)
    dialog = offered(chat, turn)
    other.wait(is_offer, LONG, since=0, id=dialog)
    reply(chat, dialog, AGAIN)
    chat.wait("agent_start")
    other.mark()
    other.answer_dialog(dialog, chat.sid, **AGAIN)
    other.wait("error", error=f"UI request not found: {dialog}")
    answered(chat, "the answer")
    assert runs(own, SLOW) == 2 and questions(chat) == [SLOW]
    other.close()
    chat.phone.close()


def test_a_prompt_that_the_file_of_pi_holds_is_shown_once_and_not_offered(own: Place, tmp_path: Path) -> None:
    chat = begin(own, tmp_path)
    assert chat.turn("!say one") == "one"
    handed_over(chat)
    file = Path(chat.session()["piSessionFile"])
    eventually(lambda: "Remember the cheese" in file.read_text(), "pi to write the prompt down")
    assert questions(chat) == ["!say one", SLOW]
    back(chat)
    assert questions(chat) == ["!say one", SLOW] and held(chat) == []
    nothing_offered(chat)
    assert runs(own, SLOW) == 1 and questions(chat) == ["!say one", SLOW, "!say nothing else"]
    chat.phone.close()


def test_messages_that_were_queued_are_offered_one_by_one(own: Place, tmp_path: Path) -> None:
    chat = begin(own, tmp_path)
    chat.ask(WAITING)
    chat.wait("permission_request", sessionId=chat.sid)
    turns = {}
    for kind, word in (("steer", "steered"), ("follow_up", "followed")):
        turns[word] = chat.phone.prompt(chat.sid, f"!say {word}", kind=kind, timeout=LONG)
    back(chat)
    assert questions(chat) == [WAITING, "!say steered", "!say followed"]
    assert held(chat) == [(f"held-{turn.client_turn_id}", f"!say {word}") for word, turn in turns.items()]
    chat.connect()
    for word, turn in turns.items():
        dialog = offered(chat, turn, f"!say {word}")
        reply(chat, dialog, AGAIN)
        answered(chat, word)
    assert [runs(own, f"!say {word}") for word in turns] == [1, 1]
    assert questions(chat) == [WAITING, "!say steered", "!say followed"] and held(chat) == []
    assert not (chat.folder / "marker").exists(), "the call that waited for an approval is not run"
    chat.phone.close()


def test_the_same_words_again_are_another_message(own: Place, tmp_path: Path) -> None:
    """`continue`, said once more a moment later, must not pass for the one that pi has written down."""
    chat = begin(own, tmp_path)
    chat.turn("!say same")
    chat.ask(WAITING)
    chat.wait("permission_request", sessionId=chat.sid)
    turns = [chat.phone.prompt(chat.sid, "!say same", kind="follow_up", timeout=LONG) for _ in range(2)]
    back(chat)
    assert held(chat) == [(f"held-{turn.client_turn_id}", "!say same") for turn in turns]
    assert questions(chat) == ["!say same", WAITING, "!say same", "!say same"]
    chat.connect()
    reply(chat, offered(chat, turns[0], "!say same"), AGAIN)
    answered(chat, "same")
    reply(chat, offered(chat, turns[1], "!say same"), DISCARD)
    eventually(lambda: held(chat) == [], "it to be forgotten")
    nothing_offered(chat)
    assert questions(chat) == ["!say same", WAITING, "!say same", "!say nothing else"]
    chat.phone.close()


def test_a_prompt_that_waited_for_a_compaction_is_offered(own: Place, tmp_path: Path) -> None:
    chat = begin(own, tmp_path)
    for number in range(3):
        chat.turn(f"!say answer {number}\n" + "hello " * 8000)
    chat.phone.mark()
    chat.phone.send("compact", sessionId=chat.sid, customInstructions="Mind this:\n!wait 20000\n!say it", requestId="c")
    chat.wait("compaction_start")
    turn = chat.phone.prompt(chat.sid, "!say not lost", timeout=LONG)
    back(chat)
    assert held(chat) == [(f"held-{turn.client_turn_id}", "!say not lost")] and len(questions(chat)) == 4
    chat.connect()
    dialog = offered(chat, turn, "!say not lost")
    assert runs(own, "!say not lost") == 0
    reply(chat, dialog, AGAIN)
    answered(chat, "not lost")
    assert runs(own, "!say not lost") == 1 and "answer 2" in str(own.sees())
    assert questions(chat)[3:] == ["!say not lost"]
    chat.phone.close()


def test_a_prompt_that_was_sent_again_and_lost_again_is_offered_as_one(own: Place, tmp_path: Path) -> None:
    chat = begin(own, tmp_path)
    turn = handed_over(chat)
    back(chat)
    chat.connect()
    reply(chat, offered(chat, turn), AGAIN)
    eventually(lambda: runs(own, SLOW) == 2, "it to reach the model again")
    back(chat)
    [(key, text)] = held(chat)
    assert text == SLOW and questions(chat) == [SLOW]
    chat.connect()
    chat.wait(is_offer, since=0, id=key)
    reply(chat, key, AGAIN)
    answered(chat, "the answer")
    nothing_offered(chat)
    assert runs(own, SLOW) == 3 and questions(chat) == [SLOW, "!say nothing else"]
    chat.phone.close()


def test_the_first_prompt_of_a_session_that_is_made_with_it_is_kept(own: Place, tmp_path: Path) -> None:
    chat = begin(own, tmp_path)
    made = chat.phone.call(
        "POST", f"/workspaces/{chat.wid}/sessions", {"model": "mock/mock-1", "prompt": SLOW}, expect=201, timeout=LONG
    )
    assert made["prompted"] is True
    chat.sid = made["session"]["id"]
    eventually(lambda: runs(own, SLOW) == 1, "the prompt to reach the model")
    back(chat)
    [(key, text)] = held(chat)
    assert text == SLOW
    chat.connect()
    chat.wait(is_offer, since=0, id=key)
    reply(chat, key, AGAIN)
    answered(chat, "the answer")
    assert runs(own, SLOW) == 2 and questions(chat) == [SLOW]
    chat.phone.close()


@pytest.mark.parametrize("way", ["server", "session"])
def test_a_first_answer_that_was_stopped_in_order_loses_no_question(own: Place, tmp_path: Path, way: str) -> None:
    chat = begin(own, tmp_path)
    handed_over(chat)
    if way == "server":
        own.server.restart()
    else:
        chat.phone.stop(chat.wid, chat.sid)
    chat.phone.drop()
    chat.phone = clone(chat.phone)
    assert questions(chat) == [SLOW]
    chat.connect()
    assert chat.turn("!say next") == "next"
    assert runs(own, SLOW) == 1 and sorted(questions(chat)) == sorted([SLOW, "!say next"])
    assert bool(held(chat)) == any(is_offer(frame) for frame in chat.phone.frames)
    chat.phone.close()


def test_a_prompt_that_pi_refuses_is_not_kept(own: Place, tmp_path: Path) -> None:
    (own.server.agent_dir / "models.json").unlink()  # then pi starts, but has no model to ask
    own.server.start()
    chat = Chat(own, own.server.pair("1.1"), tmp_path / "project")
    chat.sid = chat.phone.create_session(chat.wid)["id"]
    chat.connect()
    told = chat.phone.command("prompt", chat.sid, timeout=LONG, message="!say never", clientTurnId="t1")
    assert told["success"] is False and told["error"]
    assert chat.trace() == []
    back(chat)
    assert chat.trace() == []
    chat.connect()
    chat.command("get_commands")
    assert [frame for frame in chat.phone.frames if is_offer(frame)] == []
    chat.phone.close()


# ---- the same turn twice ---------------------------------------------------------------------------------------------


def repeat(chat: Chat, turn: Turn, text: str, **more: Any) -> list[Frame]:
    """Send a turn again as an app does that saw no acknowledgement; the frames up to its result."""
    start, request = chat.phone.mark(), f"again-{len(chat.phone.frames)}"
    address = {"sessionId": chat.sid} if chat.phone.generation == "1.1" else {}
    ids = {"requestId": request, "clientTurnId": turn.client_turn_id}
    chat.phone.send("prompt", message=text, **address, **ids, **more)
    chat.phone.result("prompt", request, LONG, since=start)
    return [frame for frame in chat.phone.since(start) if frame["type"] in ("turn_ack", "command_result", "rpc_result")]


@pytest.mark.parametrize("way", ["stopped", "killed"])
def test_a_repeated_prompt_runs_nothing_after_a_new_start(own: Place, tmp_path: Path, way: str) -> None:
    chat = begin(own, tmp_path)
    turn = chat.phone.prompt(chat.sid, "!say once", timeout=LONG)
    chat.ready()
    if way == "killed":
        back(chat)
    else:
        chat.phone.stop(chat.wid, chat.sid)
        chat.phone.resume(chat.wid, chat.sid)
    chat.connect()
    ack, result = repeat(chat, turn, "!say once")
    assert ack["type"] == "turn_ack" and ack["duplicate"] is True and ack["clientTurnId"] == turn.client_turn_id
    assert result["success"] is True
    [conflict] = repeat(chat, turn, "!say something else")
    assert (conflict["success"], conflict["error"]) == (False, f"clientTurnId conflict: {turn.client_turn_id}")
    assert chat.turn("!say next") == "next"
    assert runs(own, "!say once") == 1 and runs(own, "!say something else") == 0
    assert questions(chat) == ["!say once", "!say next"]
    chat.phone.close()


def test_a_repeat_of_a_prompt_that_is_offered_runs_nothing(own: Place, tmp_path: Path) -> None:
    chat = begin(own, tmp_path)
    turn = handed_over(chat)
    back(chat)
    chat.connect()
    dialog = offered(chat, turn)
    ack, result = repeat(chat, turn, SLOW)
    assert ack["duplicate"] is True and result["success"] is True
    assert chat.turn("!say next") == "next"
    assert runs(own, SLOW) == 1 and len(held(chat)) == 1
    reply(chat, dialog, AGAIN)
    answered(chat, "the answer")
    assert runs(own, SLOW) == 2 and sorted(questions(chat)) == sorted(["!say next", SLOW])
    chat.phone.close()


# ---- a prompt while pi starts ----------------------------------------------------------------------------------------


def test_app_10_may_prompt_before_pi_is_there(own: Place, tmp_path: Path) -> None:
    """This app gives up after 4 s and says so; its prompt must be safe long before pi is."""
    own.server.start()
    chat = Chat(own, own.server.pair("1.0"), tmp_path / "project")
    chat.phone.open_session(chat.wid, chat.sid)
    turn = chat.phone.prompt(chat.sid, "!say early")
    kinds = [frame["type"] for frame in chat.phone.frames]
    assert "state" not in kinds, "pi is not there yet"
    stages = [frame["stage"] for frame in chat.phone.frames if frame["type"] == "turn_ack"]
    assert stages == ["accepted", "dispatched"]
    chat.phone.drop()  # and again, as after a change of the network
    chat.phone.open_session(chat.wid, chat.sid)
    acks = [frame for frame in repeat(chat, turn, "!say early") if frame["type"] == "turn_ack"]
    assert [ack["duplicate"] for ack in acks if ack.get("requestId") != turn.request_id] == [True]
    chat.wait("agent_end", since=0)  # pi's file has the answer earlier, and the next turn waits for its own end
    assert [event["type"] for event in chat.trace()] == ["user", "assistant"]
    assert chat.turn("!say next") == "next"
    assert runs(own, "!say early") == 1 and questions(chat) == ["!say early", "!say next"]
    chat.phone.close()


def test_a_prompt_for_a_pi_that_never_came_is_offered(own: Place, tmp_path: Path) -> None:
    own.server.start()
    chat = Chat(own, own.server.pair("1.0"), tmp_path / "project")
    chat.phone.open_session(chat.wid, chat.sid)
    turn = chat.phone.prompt(chat.sid, "!say early", wait="accepted")
    assert "state" not in chat.phone.types(0), "pi is not there yet"
    back(chat)
    assert held(chat) == [(f"held-{turn.client_turn_id}", "!say early")] and runs(own, "!say early") == 0
    chat.connect()
    reply(chat, offered(chat, turn, "!say early"), AGAIN)
    answered(chat, "early")
    assert runs(own, "!say early") == 1 and questions(chat) == ["!say early"]
    chat.phone.close()


# ---- conversations that are over -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["stopped", "killed", "terminated", "pi killed"])
def test_a_session_goes_on_in_the_same_file(own: Place, tmp_path: Path, way: str) -> None:
    chat = begin(own, tmp_path)
    chat.turn("!say one")
    chat.turn('!tool bash {"command": "echo two"}\n!say two')
    file, trace, before = Path(chat.session()["piSessionFile"]), chat.trace(), chat.session()
    content = eventually(lambda: b'"text":"two"' in file.read_bytes() and file.read_bytes(), "the answer to be written")
    if way == "stopped":
        chat.phone.stop(chat.wid, chat.sid)
    elif way == "pi killed":
        kill_pi(own)
        chat.wait("session_ended", reason="error")
        eventually(lambda: chat.session()["status"] == "stopped", "the session to be stopped")
    elif way == "killed":
        back(chat)
    else:
        own.server.restart()
    chat.phone.drop()
    chat.phone = clone(chat.phone)
    after = chat.session()
    assert chat.trace() == trace and after["status"] == "stopped"
    for name in ("messageCount", "tokens", "cost", "lastMessage", "firstMessage", "model", "createdAt"):
        assert after[name] == before[name], name
    chat.connect()
    assert chat.turn("!say three") == "three"
    assert chat.trace()[: len(trace)] == trace and Path(chat.session()["piSessionFile"]) == file
    assert file.read_bytes().startswith(content)
    seen = str(own.sees())
    assert "!say one" in seen and "echo two" in seen
    chat.phone.close()


def test_two_sessions_that_share_a_file_do_not_run_at_once(own: Place, tmp_path: Path) -> None:
    """Data of an older server may hold such sessions; two pis on one file would spoil it."""
    chat = begin(own, tmp_path)
    chat.command("set_session_name", name="Cheese")
    chat.turn("!say remember the cheese")
    file = Path(chat.session()["piSessionFile"])
    chat.phone.close()
    own.server.stop()
    stored = own.server.data / "sessions" / f"{chat.sid}.json"
    twin = stored.with_name("Twin0000.json")
    twin.write_text(stored.read_text().replace(f'"{chat.sid}"', '"Twin0000"'))
    own.server.start()
    chat.connect()
    path = f"/workspaces/{chat.wid}/sessions/Twin0000/resume"
    refusal = OPEN_ELSEWHERE + "Cheese"
    status, body = chat.phone.request("POST", path, {}, timeout=LONG)
    assert (status, body["error"]) == (409, refusal)
    told = chat.phone.command("subscribe", "Twin0000", timeout=LONG, level="full")
    assert told["success"] is False and told["error"] == refusal
    assert chat.turn("!say here") == "here"
    content = file.read_bytes()
    chat.phone.stop(chat.wid, chat.sid)
    chat.sid = "Twin0000"
    chat.connect()
    assert chat.turn("!say there") == "there"
    assert questions(chat) == ["!say remember the cheese", "!say here", "!say there"]
    assert file.read_bytes().startswith(content)
    chat.phone.close()
