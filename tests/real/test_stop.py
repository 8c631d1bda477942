"""Stopping a turn at every point of it; the session goes on afterwards."""

from __future__ import annotations

from .conftest import Chat, eventually


def stop(chat: Chat) -> None:
    """What the stop button does, and what the app must see then."""
    chat.phone.send("stop", **({"sessionId": chat.sid} if chat.phone.generation == "1.1" else {}))
    chat.wait("stop_requested", source="user")
    confirmed = chat.wait("stop_confirmed", source="user")
    start = chat.phone.frames.index(confirmed)
    chat.wait(lambda f: f["type"] == "state" and f["session"]["status"] == "ready", since=start)
    assert "error" not in chat.phone.types(), "a stop is not an error"


def test_stop_in_the_middle_of_an_answer_keeps_what_was_said(chat: Chat) -> None:
    chat.ask("!slow 30\n!text 2000")
    chat.wait(lambda f: f["type"] == "text_delta" and "w20 " in f["delta"])
    stop(chat)
    kept = chat.wait("message_end", role="assistant")["content"]
    assert kept.startswith("w0 w1 ") and "w1000" not in kept and kept == chat.phone.text()
    answers = [event["text"] for event in chat.trace() if event["type"] == "assistant"]
    assert answers == [kept]
    assert chat.turn("!say go on") == "go on"


def test_stop_while_thinking(chat: Chat) -> None:
    chat.ask("!slow 30\n!think 2000\n!say never")
    chat.wait("thinking_delta")
    stop(chat)
    assert chat.turn("!say go on") == "go on"


def test_stop_before_the_model_answers(chat: Chat) -> None:
    chat.ask("!wait 20000\n!say never")
    eventually(lambda: any("!wait 20000" in str(request) for request in chat.llm.requests), "the request to the model")
    stop(chat)
    assert chat.turn("!say go on") == "go on"


def test_stop_while_an_approval_is_awaited(chat: Chat) -> None:
    chat.ask('!tool bash {"command": "touch marker"}\n!say never')
    asked = chat.wait("permission_request")
    stop(chat)
    chat.wait("permission_cancelled", id=asked["id"])
    assert chat.phone.pending() == []
    chat.phone.answer(asked["id"], "allow")
    chat.wait("error", error=f"Permission request not found: {asked['id']}")
    assert chat.turn("!say go on") == "go on"
    assert not (chat.folder / "marker").exists()


def test_stop_while_a_command_runs_ends_the_command(chat: Chat) -> None:
    chat.ask('!tool bash {"command": "touch marker; sleep 31.25"}\n!say never')
    chat.approve()
    eventually((chat.folder / "marker").exists, "the command to run")
    assert chat.place.running("sleep 31.25")
    stop(chat)
    eventually(lambda: not chat.place.running("sleep 31.25"), "the command to end", 15)
    assert chat.turn("!say go on") == "go on"


def test_stop_of_an_idle_session_says_so(chat: Chat) -> None:
    chat.phone.mark()
    chat.phone.send("stop", sessionId=chat.sid)
    assert "idle" in chat.wait("stop_confirmed")["reason"]
    assert chat.turn("!say still here") == "still here"


def test_stop_of_a_turn_takes_its_queued_messages_with_it(chat: Chat) -> None:
    chat.ask("!slow 30\n!text 2000")
    chat.wait("text_delta")
    chat.ask("!say queued message", kind="follow_up")
    queued = chat.wait(lambda f: f["type"] == "queue_state" and f["queue"]["followUp"])
    stop(chat)
    emptied = chat.wait(lambda f: f["type"] == "queue_state" and not f["queue"]["followUp"])
    assert emptied["queue"]["version"] > queued["queue"]["version"]
    chat.turn("!say go on")
    assert "queued message" not in str(chat.place.sees())


def test_app_10_stops_its_turn(chat10: Chat) -> None:
    chat10.ask("!slow 30\n!text 2000")
    chat10.wait("text_delta")
    stop(chat10)
    assert chat10.turn("!say go on") == "go on"
