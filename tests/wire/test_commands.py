"""The commands that are pi's own, from either app: result, who is told, and what follows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.phone import RESULT_TYPE, Frame, Phone

from .rig import Chat, Rig

BOTH_APPS = pytest.mark.parametrize("generation", ["1.0", "1.1"])
SIMPLE: list[tuple[str, dict[str, Any]]] = [
    ("get_messages", {}),
    ("get_session_stats", {}),
    ("get_available_models", {}),
    ("get_fork_messages", {}),
    ("get_commands", {}),
    ("set_auto_compaction", {"enabled": False}),
    ("set_auto_retry", {"enabled": True}),
    ("set_steering_mode", {"mode": "all"}),
    ("set_follow_up_mode", {"mode": "one-at-a-time"}),
    ("abort_retry", {}),
    ("abort_bash", {}),
]
CHANGING: list[tuple[str, dict[str, Any]]] = [
    ("set_model", {"provider": "mock", "modelId": "mock-2"}),
    ("cycle_model", {}),
    ("set_thinking_level", {"level": "high"}),
    ("cycle_thinking_level", {}),
    ("set_session_name", {"name": "A name"}),
]


def pair_of(rig: Rig, generation: str) -> tuple[Chat, Phone]:
    """A chat of one app and a phone of the other one looking on."""
    chat = rig.chat(generation)
    return chat, rig.join(chat.wid, chat.sid, "1.0" if generation == "1.1" else "1.1").phone


def told(phone: Phone, command: str) -> Frame:
    """The result of a command as another phone sees it."""
    return phone.wait(RESULT_TYPE[phone.generation], command=command)


@BOTH_APPS
class TestEveryPhoneIsTold:
    def test_of_what_changes_nothing(self, both: Rig, generation: str) -> None:
        chat, other = pair_of(both, generation)
        chat.play("hello")
        for command, fields in SIMPLE:
            for phone in (chat.phone, other):
                phone.mark()
            result = chat.phone.command(command, chat.sid, check=True, **fields)
            shown = told(other, command)
            assert shown["success"] is True and shown["requestId"] == result["requestId"]
            assert shown.get("data") == result.get("data")

    def test_of_what_changes_the_session(self, both: Rig, generation: str) -> None:
        chat, other = pair_of(both, generation)
        for command, fields in CHANGING:
            for phone in (chat.phone, other):
                phone.mark()
            chat.phone.command(command, chat.sid, check=True, **fields)
            for phone in (chat.phone, other):
                told(phone, command)
                phone.wait("state")
                assert [t for t in phone.types() if t in ("state", RESULT_TYPE[phone.generation])] == [
                    RESULT_TYPE[phone.generation], "state",
                ]  # fmt: skip

    def test_also_without_a_request_id(self, rig: Rig, generation: str) -> None:
        chat, other = pair_of(rig, generation)
        address = {"sessionId": chat.sid} if generation == "1.1" else {}
        for phone in (chat.phone, other):
            phone.mark()
        chat.phone.send("cycle_model", **address)
        assert told(chat.phone, "cycle_model")["success"] and told(other, "cycle_model")["success"]


class TestModel:
    def test_setting_it(self, both: Rig) -> None:
        chat = both.chat()
        chat.phone.mark()
        data = chat.phone.command("set_model", chat.sid, provider="mock", modelId="mock-2", check=True)["data"]
        assert (data["provider"], data["id"]) == ("mock", "mock-2")
        session = chat.phone.wait("state")["session"]
        assert (session["model"], session["contextWindow"]) == ("mock/mock-2", 128_000)
        assert both.phone().create_session(chat.wid)["model"] == "mock/mock-2"

    def test_setting_it_by_its_full_name(self, rig: Rig) -> None:
        chat = rig.chat()
        data = chat.phone.command("set_model", chat.sid, model="mock/mock-tiny", check=True)["data"]
        assert data["id"] == "mock-tiny"

    def test_one_that_does_not_exist(self, both: Rig) -> None:
        chat = both.chat()
        result = chat.phone.command("set_model", chat.sid, provider="mock", modelId="nope")
        assert (result["success"], result["error"]) == (False, "Model not found: mock/nope")

    def test_nothing_private_is_told(self, both: Rig) -> None:
        chat = both.chat()
        for command, fields in [("get_available_models", {}), ("cycle_model", {}), *CHANGING[:1]]:
            assert "baseUrl" not in json.dumps(chat.phone.command(command, chat.sid, **fields))

    def test_the_thinking_level_of_a_model_is_remembered(self, both: Rig) -> None:
        chat = both.chat(model="mock/mock-1")
        chat.phone.command("set_thinking_level", chat.sid, level="low", check=True)
        chat.phone.command("set_model", chat.sid, provider="mock", modelId="mock-2", check=True)
        chat.phone.mark()
        chat.phone.command("set_model", chat.sid, provider="mock", modelId="mock-1", check=True)
        chat.phone.wait(lambda f: f["type"] == "state" and f["session"].get("thinkingLevel") == "low")

    def test_what_pi_made_of_the_level_is_told(self, both: Rig) -> None:
        chat = both.chat(model="mock/mock-2")
        assert chat.phone.command("set_thinking_level", chat.sid, level="high")["data"] == {"level": "off"}


class TestSession:
    def test_the_name(self, both: Rig) -> None:
        chat = both.chat()
        chat.phone.mark()
        chat.phone.command("set_session_name", chat.sid, name="  Tidy up ", check=True)
        assert chat.phone.wait("state")["session"]["name"] == "Tidy up"
        assert chat.phone.session_detail(chat.wid, chat.sid)["session"]["name"] == "Tidy up"
        assert chat.phone.command("set_session_name", chat.sid, name=" ")["success"] is False

    @pytest.mark.parametrize("command", ["new_session", "fork", "switch_session"])
    def test_another_conversation_tells_the_state_first(self, both: Rig, command: str) -> None:
        chat = both.chat()
        chat.play("one")
        chat.play("two")
        entries = chat.phone.command("get_fork_messages", chat.sid)["data"]["messages"]
        file = chat.phone.session_detail(chat.wid, chat.sid)["session"]["piSessionFile"]
        if command == "switch_session":
            chat.phone.command("new_session", chat.sid, check=True)
        fields = {"fork": {"entryId": entries[1]["entryId"]}, "switch_session": {"sessionPath": file}}.get(command, {})
        chat.phone.mark()
        chat.phone.command(command, chat.sid, check=True, **fields)
        assert [t for t in chat.phone.types() if t in ("state", "command_result")] == ["state", "command_result"]
        told = [m["role"] for m in chat.phone.command("get_messages", chat.sid)["data"]["messages"] if m["role"] == "user"]
        assert len(told) == {"new_session": 0, "fork": 1, "switch_session": 2}[command]
        chat.play("!say on")
        assert chat.answer_of() == "on"

    def test_a_fork_takes_the_apps_entry_ids(self, rig: Rig) -> None:
        chat = rig.chat()
        chat.play("one")
        entry = chat.phone.command("get_fork_messages", chat.sid)["data"]["messages"][0]["entryId"]
        assert chat.phone.command("fork", chat.sid, entryId=entry + "-text-0")["success"] is True

    @pytest.mark.parametrize("path", ["/etc/passwd", "../other.jsonl", "/nope.jsonl"])
    def test_a_foreign_file_is_refused(self, rig: Rig, path: str) -> None:
        chat = rig.chat()
        assert chat.phone.command("switch_session", chat.sid, sessionPath=path)["success"] is False

    def test_compaction(self, both: Rig) -> None:
        chat = both.chat()
        chat.play("hello")
        chat.phone.mark()
        chat.phone.command("compact", chat.sid, check=True, customInstructions="short")
        start, end = chat.phone.wait("compaction_start"), chat.phone.wait("compaction_end")
        assert start["reason"] and (end["summary"], end["tokensBefore"]) == ("fake summary", 1400)
        assert chat.phone.command("compact", chat.sid)["error"] == "Already compacted"
        chat.play("!say and on it goes")
        assert chat.answer_of() == "and on it goes"

    def test_statistics_and_commands(self, both: Rig) -> None:
        chat = both.chat()
        chat.play("!usage 10 5\n!say a")
        data = chat.phone.command("get_session_stats", chat.sid)["data"]
        assert (data["tokens"]["input"], data["tokens"]["output"]) == (10, 5)
        for command in chat.phone.command("get_commands", chat.sid)["data"]["commands"]:
            assert command["source"] in ("extension", "prompt", "skill")


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("set_model", {}),
    ("set_model", {"provider": "mock", "modelId": 7}),
    ("set_thinking_level", {"level": "extreme"}),
    ("set_thinking_level", {}),
    ("set_session_name", {"name": None}),
    ("set_session_name", {"name": ["x"]}),
    ("set_auto_compaction", {"enabled": "yes"}),
    ("set_auto_retry", {}),
    ("set_steering_mode", {"mode": "some"}),
    ("set_follow_up_mode", {"mode": 1}),
    ("switch_session", {"sessionPath": 7}),
    ("fork", {"entryId": {}}),
    ("compact", {"customInstructions": 7}),
]


@pytest.mark.parametrize(("command", "fields"), WRONG)
def test_wrong_arguments_fail_and_reach_no_pi(rig: Rig, command: str, fields: dict[str, Any]) -> None:
    chat = rig.chat()
    result = chat.phone.command(command, chat.sid, **fields)
    assert result["success"] is False and result["error"]
    assert command not in [line["type"] for line in rig.stdin_of_pi()[-3:]]


def test_only_known_fields_reach_pi(rig: Rig) -> None:
    chat = rig.chat()
    chat.phone.command("set_session_name", chat.sid, name="n", id="evil", extra={"a": 1}, check=True)
    sent = next(line for line in reversed(rig.stdin_of_pi()) if line["type"] == "set_session_name")
    assert set(sent) == {"type", "name", "id"} and sent["id"] != "evil"


def test_bash_is_for_app_10_only(both: Rig) -> None:
    old = both.chat("1.0")
    data = old.phone.command("bash", command="echo hi", check=True)["data"]
    assert (data["output"], data["exitCode"]) == ("ran: echo hi\n", 0)
    new = both.join(old.wid, old.sid)
    assert new.phone.command("bash", old.sid, command="ls")["error"] == "Unsupported command type: bash"


def test_bash_can_be_ended(both: Rig) -> None:
    chat = both.chat("1.0")
    chat.phone.send("bash", command="sleep 60", requestId="b")
    chat.phone.command("abort_bash", check=True)
    assert chat.phone.result("bash", "b")["data"]["cancelled"] is True
