"""What a person sees of one turn: text, thinking, tools and the approvals they need, in the right order."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from .conftest import Chat

PIXEL = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010804000000b51c0c020000000b4944415478da6364f80f00010501012718e3660000000049454e44ae426082"
    )
).decode()


def positions(chat: Chat, *wanted: Any) -> list[int]:
    """Where each of these frames (a type, or a type and a condition) first stands since the mark."""
    frames = chat.phone.since()
    found = []
    for item in wanted:
        kind, test = item if isinstance(item, tuple) else (item, lambda frame: True)
        found.append(next(i for i, frame in enumerate(frames) if frame["type"] == kind and test(frame)))
    return found


def status(value: str) -> Any:
    return ("state", lambda frame: frame["session"]["status"] == value)


def role(value: str) -> Any:
    return ("message_end", lambda frame: frame["role"] == value)


def test_text_streams_as_it_is_written(chat: Chat) -> None:
    text = chat.turn("!slow 40\n!text 40")
    assert text == "".join(f"w{number} " for number in range(40))
    assert chat.phone.types().count("text_delta") >= 10
    assert chat.wait("message_end", role="assistant")["content"] == text
    started = ("turn_ack", lambda frame: frame["stage"] == "started")
    order = positions(
        chat, "agent_start", started, status("busy"), role("user"), "text_delta", role("assistant"), "agent_end", status("ready")
    )
    assert order == sorted(order)
    session = chat.session()
    assert session["status"] == "ready" and session["messageCount"] == 2
    assert session["lastMessage"].startswith("w0 w1") and session["tokens"]["output"] > 0


def test_unusual_characters_arrive_as_they_were_written(chat: Chat) -> None:
    wanted = 'tab\\t "quotes" \u2028 \u0085 \u00e9 \U0001f600\U0001f469\u200d\U0001f680 end'
    assert chat.turn(f"!chunk 1\n!say {wanted}") == wanted
    assert chat.wait("message_end", role="assistant")["content"] == wanted


def test_thinking_is_shown_once_and_apart_from_the_answer(chat: Chat) -> None:
    chat.turn("!think 12\n!say so it is")
    thought = "".join(frame["delta"] for frame in chat.phone.since() if frame["type"] == "thinking_delta")
    assert thought == "".join(f"t{number} " for number in range(12))
    assert chat.wait("message_end", role="assistant")["content"] == "so it is"


def test_an_image_reaches_the_model(chat: Chat) -> None:
    chat.ask("!say seen", images=[{"data": PIXEL, "mimeType": "image/png"}])
    chat.ready()
    assert PIXEL in str(chat.place.sees()[-1])


def test_an_approved_command_runs_and_shows_its_output_in_order(chat: Chat) -> None:
    chat.ask('!say I will.\n!tool bash {"command": "echo one; touch marker; sleep 0.3; echo two"}\n!say finished')
    asked = chat.wait("permission_request")
    assert asked["tool"] == "bash" and "touch marker" in asked["displaySummary"] and "touch marker" in asked["input"]["command"]
    assert not (chat.folder / "marker").exists(), "it ran before it was approved"
    chat.phone.answer(asked["id"], "allow")
    chat.ready()
    assert (chat.folder / "marker").exists()
    start = chat.wait("tool_start", tool="bash")
    outputs = [frame for frame in chat.phone.since() if frame["type"] == "tool_output"]
    assert "".join(frame["output"] for frame in outputs).strip() == "one\ntwo"
    assert {frame["toolCallId"] for frame in outputs} == {start["toolCallId"]}
    assert not chat.wait("tool_end", toolCallId=start["toolCallId"]).get("isError")
    final = ("message_end", lambda frame: frame["content"] == "finished")
    order = positions(chat, "tool_start", "permission_request", "tool_output", "tool_end", final, "agent_end", status("ready"))
    assert order == sorted(order)
    types = chat.phone.types()
    last_output = len(types) - 1 - types[::-1].index("tool_output")
    assert last_output < types.index("tool_end")
    assert chat.place.tool_results()[-1].strip() == "one\ntwo"


def test_a_denied_command_does_not_run_and_the_model_is_told(chat: Chat) -> None:
    chat.ask('!tool bash {"command": "touch marker"}\n!say understood')
    chat.approve("deny")
    chat.ready()
    assert not (chat.folder / "marker").exists()
    assert chat.wait("tool_end")["isError"] is True
    assert "Denied by user" in chat.place.tool_results()[-1]
    assert chat.phone.text() == "understood"


def test_parallel_calls_are_asked_about_one_by_one(chat: Chat) -> None:
    chat.ask('!tool bash {"command": "touch first"}\n!tool bash {"command": "touch second"}\n!say both done')
    first = chat.wait("permission_request")
    assert "first" in first["displaySummary"]
    chat.phone.answer(first["id"], "deny")
    second = chat.wait(lambda f: f["type"] == "permission_request" and f["id"] != first["id"])
    assert "second" in second["displaySummary"]
    assert not (chat.folder / "second").exists(), "the answer to the first counted for the second"
    chat.phone.answer(second["id"], "allow")
    chat.ready()
    assert [(chat.folder / name).exists() for name in ("first", "second")] == [False, True]
    starts = [frame["toolCallId"] for frame in chat.phone.since() if frame["type"] == "tool_start"]
    ends = [frame["toolCallId"] for frame in chat.phone.since() if frame["type"] == "tool_end"]
    assert len(set(starts)) == 2 and set(ends) == set(starts)
    for call in starts:
        order = [f["type"] for f in chat.phone.since() if f.get("toolCallId") == call]
        assert order[0] == "tool_start" and order[-1] == "tool_end"
    assert "Denied by user" in "".join(chat.place.tool_results()) and len(chat.place.tool_results()) == 2


def test_a_written_file_is_counted_as_a_change(chat: Chat) -> None:
    chat.turn('!tool write {"path": "notes.txt", "content": "one\\ntwo\\n"}\n!say written')
    assert (chat.folder / "notes.txt").read_text() == "one\ntwo\n"
    assert "permission_request" not in chat.phone.types(), "inside the workspace nobody needs to be asked"
    stats = chat.session()["changeStats"]
    assert stats["mutatingToolCalls"] == 1 and stats["filesChanged"] == 1 and stats["addedLines"] >= 2


def test_a_file_outside_of_the_workspace_is_asked_about(chat: Chat) -> None:
    outside = chat.folder.parent / "outside.txt"
    chat.ask(f'!tool write {{"path": "{outside}", "content": "x"}}\n!say ok')
    asked = chat.approve("deny")
    assert asked["tool"] == "write" and asked["displaySummary"] == f"Write {outside}"
    chat.ready()
    assert not outside.exists()


def test_a_failing_command_is_marked_as_failed(chat: Chat) -> None:
    chat.ask('!tool bash {"command": "echo oops; exit 3"}\n!say noted')
    chat.approve()
    chat.ready()
    assert chat.wait("tool_end")["isError"] is True
    assert "oops" in "".join(frame["output"] for frame in chat.phone.since() if frame["type"] == "tool_output")


def test_a_refusing_provider_shows_one_error_and_the_session_goes_on(chat: Chat) -> None:
    chat.ask("!error 400 the model is not amused")
    chat.ready()
    errors = [frame["error"] for frame in chat.phone.since() if frame["type"] == "error"]
    assert len(errors) == 1 and "the model is not amused" in errors[0]
    assert chat.turn("!say better now") == "better now"


def test_app_10_lives_a_turn_with_an_approval(chat10: Chat) -> None:
    chat10.ask('!think 5\n!say I will.\n!tool bash {"command": "echo hello; touch marker; exit 2"}\n!say finished')
    asked = chat10.approve()
    assert asked["risk"] in ("low", "medium", "high", "critical") and asked["resolutionOptions"]["allowSession"] is True
    chat10.ready()
    assert (chat10.folder / "marker").exists()
    thought = "".join(frame["delta"] for frame in chat10.phone.since() if frame["type"] == "thinking_delta")
    assert thought == "".join(f"t{number} " for number in range(5))
    outputs = [frame for frame in chat10.phone.since() if frame["type"] == "tool_output"]
    assert outputs[0]["output"].startswith("hello") and outputs[-1].get("isError") is True
    final = ("message_end", lambda frame: frame["content"] == "finished")
    order = positions(chat10, "agent_start", "tool_start", "tool_output", "tool_end", final, "agent_end", status("ready"))
    assert order == sorted(order)


@pytest.mark.parametrize("preset", ["host", "host_standard"])
def test_a_push_is_asked_about_in_every_preset(chat: Chat, preset: str) -> None:
    chat.phone.call("PUT", f"/workspaces/{chat.wid}", {"policyPreset": preset})
    chat.ask('!tool bash {"command": "git push origin main"}\n!say ok')
    assert chat.approve("deny")["displaySummary"] == "git push origin main"
    chat.ready()
    assert "Denied by user" in chat.place.tool_results()[-1]


def test_a_read_only_command_needs_nobody(chat: Chat) -> None:
    (chat.folder / "here.txt").write_text("x")
    chat.turn('!tool bash {"command": "ls"}\n!say listed')
    assert "permission_request" not in chat.phone.types()
    assert "here.txt" in chat.place.tool_results()[-1]
