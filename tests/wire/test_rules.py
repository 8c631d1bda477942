"""Stored rules, the fallback and the audit, over REST and from the command line, while a server runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.phone import Phone

from .rig import Chat, Rig, bash, eventually, rig_with

WS404 = (404, {"error": "Workspace not found"})
SE404 = (404, {"error": "Session not found"})


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Rig]:
    """A server of one's own, as rules are for everybody."""
    with rig_with(tmp_path) as rig:
        yield rig


def add(phone: Phone, **fields: Any) -> dict[str, Any]:
    rule = phone.call("POST", "/policy/rules", {"decision": "deny", "tool": "bash", **fields}, expect=201)["rule"]
    assert isinstance(rule, dict)
    return rule


def rules(phone: Phone, query: str = "") -> list[str]:
    return [rule["id"] for rule in phone.call("GET", f"/policy/rules{query}")["rules"]]


def runs(chat: Chat, command: str) -> bool:
    """Whether a command runs without a question."""
    frames = chat.play(bash(command))
    return f"ran: {command}" in chat.output() and "permission_request" not in [frame["type"] for frame in frames]


class TestRules:
    def test_a_rule_holds_from_its_making_to_its_end(self, own: Rig) -> None:
        phone, chat = own.phone(), own.chat()
        assert runs(chat, "make ready")
        rule = add(phone, executable="make", label="No make")
        assert not runs(chat, "make ready") and "No make" in chat.output()
        assert phone.call("PATCH", f"/policy/rules/{rule['id']}", {"decision": "allow"})["rule"]["effect"] == "allow"
        assert runs(chat, "make ready")
        phone.call("PATCH", f"/policy/rules/{rule['id']}", {"decision": "deny"})
        assert not runs(chat, "make ready")
        assert phone.call("DELETE", f"/policy/rules/{rule['id']}") == {"ok": True, "deleted": rule["id"]}
        assert runs(chat, "make ready")

    def test_they_survive_a_restart_and_are_for_the_owner_only(self, own: Rig) -> None:
        rule = add(own.phone(), executable="make")
        own.server.restart()
        assert rules(own.phone()) == [rule["id"]]
        assert (own.server.data / "rules.json").stat().st_mode & 0o777 == 0o600

    def test_both_apps_can_decode_them(self, own: Rig) -> None:
        add(own.phone(), pattern="git *", executable="git", label="")
        for generation in ("1.0", "1.1"):
            (rule,) = own.phone(generation).call("GET", "/policy/rules")["rules"]
            assert (rule["effect"], rule["decision"], rule["risk"], rule["source"]) == ("deny", "deny", "medium", "manual")
            assert rule["match"] == {"executable": "git", "commandPattern": "git *"} and isinstance(rule["label"], str)

    def test_which_are_listed(self, own: Rig) -> None:
        phone = own.phone()
        wid, sid = own.session()
        other = own.workspace("host_standard")
        everybody = add(phone, executable="a")["id"]
        here = add(phone, executable="b", scope="workspace", workspaceId=wid)["id"]
        there = add(phone, executable="c", scope="workspace", workspaceId=other)["id"]
        now = add(phone, executable="d", scope="session", sessionId=sid)["id"]
        assert set(rules(phone)) == {everybody, here, there, now}
        assert set(rules(phone, f"?workspaceId={wid}")) == {everybody, here, now}
        assert rules(phone, "?scope=session") == [now]
        assert phone.request("GET", "/policy/rules?workspaceId=nope") == WS404
        assert phone.request("GET", "/policy/rules?scope=once")[0] == 400
        phone.delete(wid, sid)
        own.made.clear()
        assert now not in rules(phone)
        assert eventually(lambda: there in own.stored_rules()) and now not in own.stored_rules()

    @pytest.mark.parametrize(
        ("body", "error"),
        [
            ({}, 'decision must be one of "allow", "ask", "deny"'),
            ({"decision": "maybe", "tool": "bash"}, 'decision must be one of "allow", "ask", "deny"'),
            ({"decision": "allow"}, "rule must specify tool, pattern, or executable"),
            ({"decision": "allow", "tool": "*"}, "rule must specify tool, pattern, or executable"),
            ({"decision": "allow", "tool": ""}, "tool cannot be empty"),
            ({"decision": "allow", "tool": 5}, "tool must be a string or null"),
            ({"decision": "allow", "tool": "bash", "pattern": []}, "pattern must be a string or null"),
            ({"decision": "allow", "tool": "bash", "scope": "once"}, 'scope must be one of: "session", "workspace", "global"'),
            ({"decision": "allow", "tool": "bash", "source": "x"}, 'source must be one of: "preset", "learned", "manual"'),
            ({"decision": "allow", "tool": "bash", "expiresAt": "x"}, "expiresAt must be a number or null"),
            ({"decision": "allow", "tool": "bash", "expiresAt": -1}, "expiresAt must be a positive timestamp"),
            ({"decision": "allow", "tool": "bash", "scope": "workspace"}, "workspaceId is required for workspace scope"),
            ({"decision": "allow", "tool": "bash", "scope": "session"}, "sessionId is required for session scope"),
        ],
        ids=str,
    )
    def test_what_is_refused(self, rig: Rig, body: dict[str, Any], error: str) -> None:
        assert rig.phone().request("POST", "/policy/rules", body) == (400, {"error": error})

    def test_unknown_places(self, rig: Rig) -> None:
        body = {"decision": "allow", "tool": "bash"}
        assert rig.phone().request("POST", "/policy/rules", {**body, "scope": "workspace", "workspaceId": "x"}) == WS404
        status, answer = rig.phone().request("POST", "/policy/rules", {**body, "scope": "session", "sessionId": "x"})
        assert status == 404 and "Session not found" in answer["error"]

    def test_the_same_again_is_the_same_and_the_contrary_is_refused(self, own: Rig) -> None:
        phone = own.phone()
        rule = add(phone, executable="make")
        assert add(phone, executable="make")["id"] == rule["id"] and rules(phone) == [rule["id"]]
        status, answer = phone.request("POST", "/policy/rules", {"decision": "allow", "tool": "bash", "executable": "make"})
        assert status == 400
        assert answer["error"] == "Conflicting decision for bash rule (global scope): existing deny, requested allow"

    def test_changes_are_checked(self, own: Rig) -> None:
        phone = own.phone()
        path = f"/policy/rules/{add(phone, executable='make')['id']}"
        assert phone.request("PATCH", path, {}) == (400, {"error": "At least one patch field is required"})
        assert phone.request("PATCH", path, {"tool": ""}) == (400, {"error": "tool cannot be empty"})
        assert phone.request("PATCH", path, {"decision": 5})[0] == 400
        for method in ("PATCH", "DELETE"):
            body = {"decision": "ask"} if method == "PATCH" else None
            assert phone.request(method, "/policy/rules/nope", body) == (404, {"error": "Rule not found"})
        cleared = phone.call("PATCH", path, {"label": "", "expiresAt": 4_000_000_000_000})["rule"]
        assert cleared["label"] and cleared["expiresAt"] == 4_000_000_000_000
        assert "expiresAt" not in phone.call("PATCH", path, {"expiresAt": None})["rule"]

    def test_widening_an_exact_answer_is_a_choice(self, own: Rig) -> None:
        """A star of an approved command is a star; one that a person writes into the pattern is any text."""
        chat = own.chat(preset="host_standard")
        chat.phone.answer(chat.ask("build *")["id"], "allow", "workspace")
        chat.settled()
        (rule,) = chat.phone.call("GET", "/policy/rules")["rules"]
        chat.phone.call("PATCH", f"/policy/rules/{rule['id']}", {"label": "mine", "pattern": rule["pattern"]})
        chat.phone.answer(chat.ask("build all")["id"], "deny")
        chat.settled()
        chat.phone.call("PATCH", f"/policy/rules/{rule['id']}", {"pattern": "build a*"})
        assert runs(chat, "build all")

    def test_a_broken_file_asks_everything_and_is_read_again_when_repaired(self, own: Rig) -> None:
        phone, chat = own.phone(), own.chat()
        path = own.server.data / "rules.json"
        path.write_text("[{")
        asked = chat.ask("echo hello")
        assert "cannot be read" in asked["reason"]
        chat.phone.answer(asked["id"], "allow")
        chat.settled()
        status, answer = phone.request("POST", "/policy/rules", {"decision": "deny", "tool": "bash"})
        assert status == 409 and "rules.json" in answer["error"] and path.read_text() == "[{"
        path.write_text("[]")
        assert runs(chat, "echo hello")

    def test_the_command_line_changes_what_a_server_does(self, own: Rig) -> None:
        chat = own.chat()
        rule = add(own.phone(), executable="make", label="No make")
        (listed,) = json.loads(own.server.cli("policy", "rules", "--json").stdout)["rules"]
        assert listed["id"] == rule["id"] and "No make" in own.server.cli("policy", "rules").stdout
        assert not runs(chat, "make x")
        assert own.server.cli("policy", "edit", rule["id"], "--decision", "allow").returncode == 0
        assert runs(chat, "make x")
        assert own.server.cli("policy", "remove", rule["id"]).returncode == 0
        assert rules(own.phone()) == [] and "No stored rules" in own.server.cli("policy", "rules").stdout
        for words in (("remove", rule["id"]), ("edit", "nope", "--decision", "ask"), ("remove",), ("edit", rule["id"])):
            done = own.server.cli("policy", *words)
            assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, words


class TestFallback:
    def test_it_counts_at_once_and_is_kept(self, own: Rig) -> None:
        phone = own.phone()
        assert phone.call("GET", "/policy/fallback") == {"fallback": "allow"}
        for wanted, got in (("ask", "ask"), ("block", "deny"), ("denied", "deny"), ("allow", "allow"), ("deny", "deny")):
            assert phone.call("PATCH", "/policy/fallback", {"fallback": wanted}) == {"fallback": got}
        own.server.restart()
        assert own.phone().call("GET", "/policy/fallback") == {"fallback": "deny"}
        assert json.loads((own.server.data / "config.json").read_text())["policy"]["fallback"] == "block"

    @pytest.mark.parametrize("wanted", ["perhaps", None, 5, ["ask"]])
    def test_what_is_refused(self, rig: Rig, wanted: Any) -> None:
        error = {"error": 'fallback must be one of "allow", "ask", "deny"'}
        assert rig.phone().request("PATCH", "/policy/fallback", {"fallback": wanted}) == (400, error)

    def test_guardrails_of_a_configuration_of_11_are_kept(self, tmp_path: Path) -> None:
        guard = {"id": "no-make", "decision": "block", "label": "No make", "match": {"tool": "bash", "executable": "make"}}
        with rig_with(tmp_path, config={"policy": {"schemaVersion": 1, "fallback": "allow", "guardrails": [guard]}}) as own:
            chat = own.chat()
            assert not runs(chat, "make x") and "No make" in chat.output()


class TestProfile:
    @pytest.mark.parametrize("preset", ["host", "host_standard", "host_locked", "container"])
    def test_what_app_10_shows(self, rig: Rig, preset: str) -> None:
        phone = rig.phone("1.0")
        profile = phone.call("GET", f"/policy/profile?workspaceId={rig.workspace(preset)}")["profile"]
        assert profile["policyPreset"] == preset
        assert profile["supervisionLevel"] == ("high" if preset in ("host_standard", "host_locked") else "standard")
        blocked = {item["id"] for item in profile["alwaysBlocked"]}
        asked = {item["id"] for item in profile["needsApproval"]}
        assert "hard-0" in blocked and ("default-deny" in blocked) is (preset == "host_locked")
        assert {"heuristic-data-egress", "ask-0"} <= asked and ("default-ask" in asked) is (preset == "host_standard")

    def test_without_a_workspace(self, rig: Rig) -> None:
        assert rig.phone("1.0").call("GET", "/policy/profile")["profile"]["policyPreset"] == "host"
        assert rig.phone("1.0").request("GET", "/policy/profile?workspaceId=nope") == WS404


class TestAudit:
    def test_the_newest_come_first(self, own: Rig) -> None:
        chat = own.chat()
        for number in range(3):
            chat.play(bash(f"echo {number}"))
        eventually(lambda: len(chat.phone.call("GET", "/policy/audit")["entries"]) == 3)
        entries = chat.phone.call("GET", f"/policy/audit?limit=2&sessionId={chat.sid}")["entries"]
        assert [entry["displaySummary"] for entry in entries] == ["echo 2", "echo 1"]
        older = chat.phone.call("GET", f"/policy/audit?before={entries[-1]['timestamp']}&workspaceId={chat.wid}")["entries"]
        assert [entry["displaySummary"] for entry in older] == ["echo 0"]

    @pytest.mark.parametrize("query", ["limit=0", "limit=501", "limit=x", "limit=-1", "limit=1.5"])
    def test_limits(self, rig: Rig, query: str) -> None:
        error = {"error": "limit must be an integer between 1 and 500"}
        assert rig.phone().request("GET", f"/policy/audit?{query}") == (400, error)

    @pytest.mark.parametrize("query", ["before=0", "before=x", "before=-1", "before=" + "9" * 30])
    def test_times(self, rig: Rig, query: str) -> None:
        error = {"error": "before must be a positive integer timestamp"}
        assert rig.phone().request("GET", f"/policy/audit?{query}") == (400, error)

    def test_unknown_places(self, rig: Rig) -> None:
        assert rig.phone().request("GET", "/policy/audit?sessionId=x") == SE404
        assert rig.phone().request("GET", "/policy/audit?workspaceId=x") == WS404


@pytest.fixture
def audited(own: Rig) -> Rig:
    """A server that was stopped after it wrote five decisions."""
    chat = own.chat()
    for number in range(5):
        chat.play(bash(f"echo {number}"))
    eventually(lambda: len(own.audit()) == 5)
    own.sweep()
    own.server.stop()
    return own


def verdict(rig: Rig) -> tuple[bool, str]:
    done = rig.server.cli("audit", "verify")
    facts = json.loads(rig.server.cli("audit", "verify", "--json").stdout)
    assert (done.returncode == 0) is facts["valid"] is (not facts["problems"])
    return facts["valid"], done.stdout


class TestChain:
    def test_it_is_whole_over_restarts(self, audited: Rig) -> None:
        assert verdict(audited) == (True, "✓ 5 lines, none removed, edited or moved\n")
        audited.server.start()
        audited.chat().play(bash("echo again"))
        eventually(lambda: len(audited.audit()) == 6)
        assert verdict(audited)[0]
        shown = audited.server.cli("audit", "show", "--limit", "2").stdout.splitlines()
        assert len(shown) == 2 and shown[1].endswith("echo again") and "allow" in shown[1]

    @pytest.mark.parametrize("line", range(5))
    @pytest.mark.parametrize("how", ["removed", "edited", "moved", "repeated", "added"])
    def test_a_change_of_any_line_shows(self, audited: Rig, how: str, line: int) -> None:
        path = audited.server.data / "audit.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        other = (line + 1) % 5
        if how == "removed":
            del lines[line]
        elif how == "edited":
            lines[line] = lines[line].replace('"allow"', '"deny"')
        elif how == "moved":
            lines[line], lines[other] = lines[other], lines[line]
        else:
            extra = {k: v for k, v in json.loads(lines[line]).items() if k != "prev"}
            lines.insert(line, lines[line] if how == "repeated" else json.dumps(extra) + "\n")
        path.write_text("".join(lines))
        valid, text = verdict(audited)
        assert not valid or (how, line) == ("added", 0), "a line before the chain began was there before this server"
        assert valid or "✗" in text

    def test_the_last_line_is_missed_after_the_server_went_on(self, audited: Rig) -> None:
        path = audited.server.data / "audit.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
        audited.server.start()
        audited.chat().play(bash("echo again"))
        eventually(lambda: "echo again" in path.read_text())
        assert not verdict(audited)[0]

    def test_a_crash_between_a_line_and_its_hash_is_no_change(self, audited: Rig) -> None:
        data = audited.server.data
        lines = (data / "audit.jsonl").read_text().splitlines()
        (data / "audit.head").write_text(json.loads(lines[-1])["prev"])
        assert verdict(audited)[0]
        audited.server.start()
        audited.chat().play(bash("echo again"))
        eventually(lambda: len(audited.audit()) == 6)
        assert verdict(audited)[0]

    def test_half_a_line_shows_and_the_next_one_is_whole(self, audited: Rig) -> None:
        path = audited.server.data / "audit.jsonl"
        path.write_text(path.read_text()[:-20])
        audited.server.start()
        audited.chat().play(bash("echo again"))
        eventually(lambda: "echo again" in path.read_text())
        assert json.loads(path.read_text().splitlines()[-1])["displaySummary"] == "echo again"
        assert not verdict(audited)[0]

    def test_it_goes_on_into_the_next_file(self, audited: Rig) -> None:
        data = audited.server.data
        older = json.dumps({"id": "x", "filler": "x" * 1000}) + "\n"
        (data / "audit.jsonl").write_text(older * (10 * 1024 * 1024 // len(older)))  # almost as large as it may become
        (data / "audit.head").unlink()
        audited.server.start()
        chat = audited.chat()
        for number in range(3):
            chat.play(bash(f"echo next {number}"))
        eventually(lambda: (data / "audit.jsonl.1").exists() and len(audited.audit()) == 2)
        assert verdict(audited)[0]
        first = (data / "audit.jsonl").read_text().splitlines(keepends=True)
        (data / "audit.jsonl").write_text("".join(first[1:]))
        assert not verdict(audited)[0]

    def test_nothing_to_verify(self, own: Rig) -> None:
        assert verdict(own) == (True, "✓ 0 lines, none removed, edited or moved\n")
        (own.server.data / "audit.head").write_text("0" * 64)
        assert not verdict(own)[0]
