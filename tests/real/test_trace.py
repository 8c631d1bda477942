"""The conversation as it is read back is the conversation as it streamed."""

from __future__ import annotations

from .conftest import Chat


def test_everything_that_streamed_is_read_back(chat: Chat) -> None:
    calls = ['!tool bash {"command": "echo out; touch marker"}', '!tool bash {"command": "touch denied"}']
    chat.ask("\n".join(["!think 5", "!say first", calls[0], "!say second", calls[1], "!say third"]))
    first = chat.approve("allow")
    denied = chat.wait(lambda f: f["type"] == "permission_request" and f["id"] != first["id"])
    chat.phone.answer(denied["id"], "deny")
    chat.ready()
    frames, trace = chat.phone.since(), chat.trace()
    assert [event["type"] for event in trace] == [
        *("user", "thinking", "assistant", "toolCall", "toolResult"),
        *("assistant", "toolCall", "toolResult", "assistant"),
    ]
    said = [f["content"] for f in frames if f["type"] == "message_end" and f["role"] == "assistant"]
    assert [event["text"] for event in trace if event["type"] == "assistant"] == said == ["first", "second", "third"]
    thought = "".join(f["delta"] for f in frames if f["type"] == "thinking_delta")
    assert [event["thinking"] for event in trace if event["type"] == "thinking"] == [thought]
    starts = [f for f in frames if f["type"] == "tool_start"]
    calls = [event for event in trace if event["type"] == "toolCall"]
    assert [(call["tool"], call["args"]) for call in calls] == [(f["tool"], f["args"]) for f in starts]
    results = [event for event in trace if event["type"] == "toolResult"]
    assert [event["toolCallId"] for event in results] == [f["toolCallId"] for f in starts] == [call["id"] for call in calls]
    assert results[0]["output"].strip() == "out" and results[1]["isError"] is True
    output = chat.phone.call("GET", f"/workspaces/{chat.wid}/sessions/{chat.sid}/tool-output/{starts[0]['toolCallId']}")
    assert output["output"].strip() == "out" and output["isError"] is False
    assert chat.trace("context") == trace


def test_ids_stay_the_same(chat: Chat) -> None:
    chat.turn("!say one")
    first = [event["id"] for event in chat.trace()]
    chat.turn("!say two")
    second = [event["id"] for event in chat.trace()]
    assert second[: len(first)] == first and len(set(second)) == len(second)
    chat.phone.stop(chat.wid, chat.sid)
    assert [event["id"] for event in chat.trace()] == second
    chat.phone.resume(chat.wid, chat.sid)
    assert [event["id"] for event in chat.trace()] == second


def test_a_first_turn_that_is_not_over_yet_is_shown(chat: Chat) -> None:
    """pi writes no file before its first answer is complete; a phone that opens the chat meanwhile sees the question."""
    chat.ask('!tool bash {"command": "touch marker"}\n!say ok')
    chat.wait("permission_request")
    assert chat.trace()[0]["text"].startswith("!tool bash")
    chat.approve("deny")
    chat.ready()


def test_events_since_a_number_are_the_frames_that_had_it(chat: Chat) -> None:
    base = chat.phone.last_seq[chat.sid]
    chat.turn("!say one")
    durable = [frame for frame in chat.phone.since() if frame.get("seq")]
    reply = chat.phone.events(chat.wid, chat.sid, base)
    assert reply["catchUpComplete"] is True and reply["currentSeq"] == durable[-1]["seq"]
    assert [(event["seq"], event["type"]) for event in reply["events"]] == [(frame["seq"], frame["type"]) for frame in durable]
    middle = durable[len(durable) // 2]["seq"]
    assert [event["seq"] for event in chat.phone.events(chat.wid, chat.sid, middle)["events"]] == [
        frame["seq"] for frame in durable if frame["seq"] > middle
    ]


def test_a_failed_attempt_is_not_shown_twice(chat: Chat) -> None:
    text = f"!fail {1 if chat.place.new else 3} 503\n!say recovered {chat.sid}"
    chat.turn(text)
    shown = [event["text"] for event in chat.trace() if event["type"] == "assistant"]
    assert [text for text in shown if text] == [f"recovered {chat.sid}"]


def test_the_search_of_the_app_for_its_session_list(chat: Chat) -> None:
    chat.turn("!say hello")
    [session] = chat.phone.sessions(chat.wid)
    assert session["firstMessage"] == "!say hello" and session["lastMessage"] == "hello" and session["status"] == "ready"
