"""Approvals: from the agent's question to the person's answer and what is kept of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.phone import Frame, Phone

from .rig import FORCED, PUSH, Chat, Rig, bash, eventually, rig_with

BOTH_APPS = pytest.mark.parametrize("generation", ["1.0", "1.1"])


def asked(frames: list[Frame]) -> bool:
    return any(f["type"] == "permission_request" for f in frames)


def answered(chat: Chat, action: str, scope: str | None = None, command: str = PUSH) -> list[Frame]:
    """A turn whose question is answered so; its frames."""
    request = chat.ask(command)
    chat.phone.answer(request["id"], action, scope)
    return chat.settled()


def audited(rig: Rig, chat: Chat) -> Any:
    """The one decision about this session in the audit file, which is written behind."""
    return eventually(lambda: [e for e in rig.audit() if e["sessionId"] == chat.sid])[0]


def stored_rules(rig: Rig) -> str:
    path = rig.server.data / "rules.json"
    return path.read_text() if path.exists() else "[]"


@BOTH_APPS
class TestAnswer:
    def test_the_question_says_it_all(self, both: Rig, generation: str) -> None:
        chat = both.chat(generation)
        request = chat.ask()
        assert (request["tool"], request["input"]) == ("bash", {"command": PUSH})
        assert PUSH in request["displaySummary"] and request["reason"] and request["risk"] in ("low", "medium", "high")
        assert request["expires"] is True and request["timeoutAt"] > 1.7e12 and "seq" not in request
        assert set(request["resolutionOptions"]) >= {"allowSession", "allowAlways", "denyAlways"}
        types = chat.phone.types()
        assert types.index("tool_start") < types.index("permission_request") and "tool_output" not in types

    def test_allow_runs_the_tool(self, both: Rig, generation: str) -> None:
        chat = both.chat(generation)
        answered(chat, "allow")
        assert chat.output() == f"ran: {PUSH}\n" and chat.answer_of().endswith("done")
        entry = audited(both, chat)
        assert (entry["decision"], entry["resolvedBy"], entry["layer"]) == ("allow", "user", "user_response")
        assert entry["userChoice"] == {"action": "allow", "scope": "once"}

    def test_deny_stops_it_and_the_model_is_told(self, both: Rig, generation: str) -> None:
        chat = both.chat(generation)
        answered(chat, "deny")
        assert f"ran: {PUSH}" not in chat.output() and "Denied by user" in chat.output()
        messages = chat.phone.command("get_messages", chat.sid)["data"]["messages"]
        result = next(m for m in messages if m["role"] == "toolResult")
        assert result["isError"] is True and "Denied by user" in json.dumps(result)

    def test_a_second_answer_is_an_error(self, both: Rig, generation: str) -> None:
        chat = both.chat(generation)
        request = chat.ask()
        chat.phone.answer(request["id"], "deny")
        chat.phone.answer(request["id"], "allow")
        assert chat.phone.wait("error")["error"] == f"Permission request not found: {request['id']}"
        chat.settled()
        assert f"ran: {PUSH}" not in chat.output()

    def test_an_unknown_id_is_an_error(self, both: Rig, generation: str) -> None:
        chat = both.chat(generation)
        chat.phone.answer("nope12345678", "allow")
        assert chat.phone.wait("error")["error"] == "Permission request not found: nope12345678"

    @pytest.mark.parametrize("action", ["yes", "ALLOW", "", None, True, {"allow": 1}])
    def test_a_bogus_action_leaves_it_open(self, rig: Rig, generation: str, action: object) -> None:
        chat = rig.chat(generation)
        request = chat.ask()
        chat.phone.answer(request["id"], action)  # type: ignore[arg-type]
        assert "action must be" in chat.phone.wait("error")["error"]
        assert [p["id"] for p in chat.phone.pending()] == [request["id"]]
        assert "tool_output" not in chat.phone.types()

    def test_it_is_asked_again_next_time(self, both: Rig, generation: str) -> None:
        chat = both.chat(generation)
        answered(chat, "allow")
        assert answered(chat, "deny")
        assert "Denied by user" in chat.output()


class TestResult:
    def test_with_a_request_id_there_is_one(self, rig: Rig) -> None:
        chat = rig.chat()
        request = chat.ask()
        assert chat.phone.command("permission_response", id=request["id"], action="allow")["success"] is True
        wrong = chat.phone.command("permission_response", id=request["id"], action="allow")
        assert wrong["error"] == f"Permission request not found: {request['id']}"

    def test_what_is_allowed_by_itself_is_audited_too(self, rig: Rig) -> None:
        chat = rig.chat()
        chat.play(bash("echo audited"))
        entry = eventually(lambda: [e for e in rig.audit() if e["displaySummary"] == "echo audited"])[0]
        assert (entry["decision"], entry["resolvedBy"]) == ("allow", "policy")

    def test_what_is_never_allowed_is_not_asked(self, both: Rig) -> None:
        chat = both.chat()
        frames = chat.play(bash("sudo rm -rf /"))
        assert not asked(frames) and "ran:" not in chat.output() and "Blocked" in chat.output()

    def test_several_questions_at_once(self, both: Rig) -> None:
        chat = both.chat()
        commands = ["git push a", "git push b", "git push c"]
        chat.say("\n".join(map(bash, commands)))
        for command, action in zip(commands, ("allow", "deny", "allow")):
            request = chat.phone.wait(lambda f, c=command: f["type"] == "permission_request" and f["input"]["command"] == c)
            chat.phone.answer(request["id"], action)
        chat.settled()
        output = chat.output()
        assert "ran: git push a\n" in output and "ran: git push c\n" in output and "ran: git push b" not in output


class TestScopes:
    def test_session(self, both: Rig) -> None:
        chat = both.chat()
        answered(chat, "allow", "session")
        assert not asked(chat.play(bash(PUSH))) and chat.output() == f"ran: {PUSH}\n"
        assert asked(answered(chat, "deny", command=PUSH + " --force"))
        other = both.chat()
        assert asked(answered(other, "deny"))
        assert PUSH not in stored_rules(both)

    def test_workspace(self, rig: Rig) -> None:
        command = "make of-workspace"
        chat = rig.chat("1.0", preset="host_standard")
        answered(chat, "allow", "workspace", command)
        assert not asked(rig.chat("1.1", preset="host_standard").play(bash(command)))
        assert asked(answered(rig.chat(preset="host_locked"), "deny", command=command))
        rule = next(r for r in json.loads(stored_rules(rig)) if command in json.dumps(r))
        assert (rule["scope"], rule["workspaceId"]) == ("workspace", chat.wid)

    def test_global_survives_a_restart(self, rig: Rig) -> None:
        command = "make of-all"
        answered(rig.chat(preset="host_standard"), "allow", "global", command)
        rig.sweep()
        rig.server.restart()
        assert not asked(rig.chat(preset="host_locked").play(bash(command)))

    def test_deny_for_ever(self, rig: Rig) -> None:
        command = "git push never"
        answered(rig.chat(), "deny", "global", command)
        chat = rig.chat(preset="host_standard")
        assert not asked(chat.play(bash(command))) and "ran:" not in chat.output()

    def test_deny_for_a_session_is_once(self, rig: Rig) -> None:
        chat = rig.chat()
        for _ in range(2):
            assert asked(answered(chat, "deny", "session", "git push maybe"))

    @pytest.mark.parametrize("scope", ["global", "workspace", "nonsense", 7])
    def test_what_is_not_offered_is_once(self, rig: Rig, scope: str) -> None:
        chat = rig.chat("1.0")
        for _ in range(2):
            assert asked(answered(chat, "allow", scope, FORCED)) and f"ran: {FORCED}" in chat.output()

    def test_a_star_is_a_star(self, rig: Rig) -> None:
        chat = rig.chat()
        answered(chat, "allow", "session", "git push *")
        assert not asked(chat.play(bash("git push *")))
        assert asked(answered(chat, "deny", command="git push origin"))

    def test_it_covers_nothing_wider(self, rig: Rig) -> None:
        chat = rig.chat()
        answered(chat, "allow", "session", "git push one")
        for command in ("git push one two", "git push one; git push two", "git push one && rm -rf x", "git push on"):
            assert asked(answered(chat, "deny", command=command))

    def test_for_a_time(self, rig: Rig) -> None:
        chat = rig.chat()
        request = chat.ask("git push for-now")
        chat.phone.answer(request["id"], "allow", "global", expiresInMs=1)
        chat.settled()
        assert asked(answered(chat, "deny", command="git push for-now"))

    def test_what_is_stored_is_what_was_shown(self, rig: Rig) -> None:
        chat = rig.chat(preset="host_standard")
        shown = chat.ask("make shown")["resolutionOptions"]["alwaysDescription"]
        assert shown.endswith("make shown")


class TestSeveralPhones:
    def test_all_are_asked_one_answers_the_others_are_told(self, both: Rig) -> None:
        chat = both.chat()
        others = [both.join(chat.wid, chat.sid, "1.0").phone, both.stream()]
        request = chat.ask()
        for phone in others:
            assert phone.wait("permission_request", id=request["id"])["sessionId"] == chat.sid
        others[0].answer(request["id"], "allow")
        for phone in (chat.phone, others[1]):
            assert phone.wait("permission_cancelled", id=request["id"])
        chat.settled()
        assert f"ran: {PUSH}" in chat.output()

    def test_it_waits_for_the_phone_to_come_back(self, both: Rig) -> None:
        chat = both.chat()
        request = chat.ask()
        chat.phone.drop()
        old = both.phone("1.0")
        old.open_session(*both.session())
        assert old.wait("permission_request")["id"] == request["id"]
        chat.phone.open()
        chat.phone.subscribe(chat.sid)
        chat.phone.wait("permission_request", id=request["id"])
        chat.phone.answer(request["id"], "allow")
        chat.phone.wait("agent_end")
        assert f"ran: {PUSH}" in chat.output()

    @pytest.mark.parametrize("how", ["stop", "stop_session"])
    def test_stopping_withdraws_it(self, both: Rig, how: str) -> None:
        chat = both.chat()
        request = chat.ask()
        chat.phone.send(how, sessionId=chat.sid)
        assert chat.phone.wait("permission_cancelled")["id"] == request["id"]
        chat.phone.wait("agent_end" if how == "stop" else "session_ended")
        assert "ran:" not in chat.output() and both.phone().pending() == []
        assert audited(both, chat)["decision"] == "deny"


class TestRest:
    def test_pending_and_respond(self, both: Rig) -> None:
        chat = both.chat()
        request = chat.ask()
        other: Phone = both.phone("1.0")
        for query in ({}, {"sessionId": chat.sid}, {"workspaceId": chat.wid}):
            pending = other.pending(**query)
            assert [p["id"] for p in pending] == [request["id"]]
            assert pending[0]["workspaceId"] == chat.wid and pending[0]["timeoutAt"] == request["timeoutAt"]
        assert other.pending(workspaceId=both.workspace("host_locked")) == []
        path = f"/permissions/{request['id']}/respond"
        assert other.request("POST", path, {"action": "perhaps"})[0] == 400
        reply = other.call("POST", path, {"action": "allow", "scope": "session", "expiresInMs": 60_000})
        assert reply == {"ok": True, "id": request["id"], "action": "allow", "scope": "session", "expiresInMs": 60_000}
        assert other.request("POST", path, {"action": "allow"}) == (404, {"error": "Permission request not found"})
        chat.settled()
        assert f"ran: {PUSH}" in chat.output() and "permission_cancelled" in chat.phone.types()


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A server that waits only a moment for an answer."""
    with rig_with(tmp_path_factory.mktemp("hasty"), config={"approvalTimeoutMs": 200}) as rig:
        yield rig


@BOTH_APPS
def test_without_an_answer_the_tool_does_not_run(hasty: Rig, generation: str) -> None:
    chat = hasty.chat(generation)
    request = chat.ask()
    expired = chat.phone.wait("permission_expired")
    assert (expired["id"], expired["reason"], expired["sessionId"]) == (request["id"], "Approval timeout", chat.sid)
    chat.phone.answer(request["id"], "allow")
    assert chat.phone.wait("error")["error"] == f"Permission request not found: {request['id']}"
    chat.settled()
    assert "ran:" not in chat.output() and "Approval timeout" in chat.output()
    entry = audited(hasty, chat)
    assert (entry["decision"], entry["resolvedBy"], entry["layer"]) == ("deny", "timeout", "timeout")
    hasty.sweep()


def test_a_question_may_wait_for_ever(tmp_path: Path) -> None:
    with rig_with(tmp_path, config={"approvalTimeoutMs": 0}) as rig:
        request = rig.chat().ask()
        assert request["expires"] is False and request["timeoutAt"] > 4e12
