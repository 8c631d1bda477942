"""What notifications say, and when they are sent (skills-push parts C and D)."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import oppi

from .support import many

COMMAND = "curl -H 'Authorization: canary' https://example.com"
TEXT = "Open app to review full command details"


def wire(risk: str = "medium", key: str = "perm00000001", session: str = "s1", **fields: Any) -> dict[str, Any]:
    found = {"id": key, "sessionId": session, "tool": "bash", "displaySummary": COMMAND, "risk": risk}
    return {**found, "timeoutAt": 1_800_000_000_999, "expires": True, **fields}


class TestPermission:
    @pytest.mark.parametrize(
        ("risk", "level", "relevance", "sound", "priority", "category"),
        [
            ("critical", "time-sensitive", 1.0, "default", (10, 5), "PERMISSION_BIOMETRIC"),
            ("high", "time-sensitive", 0.9, "default", (10, 5), "PERMISSION_BIOMETRIC"),
            ("medium", "active", 0.7, "default", (10, 4), "PERMISSION_BIOMETRIC"),
            ("low", "passive", 0.4, None, (5, 3), "PERMISSION_BIOMETRIC"),
            ("odd", "active", 0.5, "default", (10, 4), "PERMISSION_BIOMETRIC"),
        ],
    )
    def test_how_loud_it_is(
        self, risk: str, level: str, relevance: float, sound: str | None, priority: tuple[int, int], category: str
    ) -> None:
        note = oppi.permission_note([wire(risk)], "Work", False)
        aps = note.payload["aps"]
        assert (aps["interruption-level"], aps["relevance-score"], aps.get("sound"), aps["category"]) == (
            level,
            relevance,
            sound,
            category,
        )
        assert note.priority == priority and note.expires == 1_800_000_000_999
        assert COMMAND not in json.dumps(note.payload) and aps["alert"]["body"] == f"bash: {TEXT}"

    @pytest.mark.parametrize(
        ("risk", "shown"), [("low", True), ("medium", True), ("high", False), ("critical", False), ("odd", False)]
    )
    def test_details_are_a_choice_and_never_for_the_grave(self, risk: str, shown: bool) -> None:
        note = oppi.permission_note([wire(risk)], "Work", True)
        assert (COMMAND in note.payload["summary"]) == shown == (COMMAND in note.payload["aps"]["alert"]["body"])

    @pytest.mark.parametrize(("command", "category"), [("ls", "PERMISSION_REQUEST"), ("ls " * 60, "PERMISSION_BIOMETRIC")])
    def test_only_what_is_shown_in_full_can_be_allowed_from_a_locked_screen(self, command: str, category: str) -> None:
        note = oppi.permission_note([wire("low", displaySummary=command)], "Work", True)
        assert note.payload["aps"]["category"] == category

    def test_a_token_in_a_command_is_cut(self) -> None:
        note = oppi.permission_note([wire("low", displaySummary="curl -H dt_canarycanarycanary")], "Work", True)
        assert "canary" not in json.dumps(note.payload) and note.payload["aps"]["category"] == "PERMISSION_BIOMETRIC"

    def test_several_are_one_as_loud_as_the_gravest(self) -> None:
        note = oppi.permission_note([wire("critical", "a"), wire("low", "b")], "Work", True)
        assert (
            note.key == note.payload["permissionId"] == "b" and note.payload["aps"]["alert"]["body"] == f"2 requests wait. {TEXT}"
        )
        assert note.priority == (10, 5) and COMMAND not in json.dumps(note.payload)

    def test_one_that_waits_for_ever_never_expires(self) -> None:
        note = oppi.permission_note([wire(expires=False)], "Work", False)
        assert note.expires == 0 and "apns-expiration" not in oppi.apns_headers(note, "b")

    @many
    @given(st.text(max_size=5000), st.text(max_size=5000), st.text(max_size=5000))
    def test_whatever_the_texts_it_fits_and_shows_what_is_hidden(self, name: str, tool: str, summary: str) -> None:
        note = oppi.permission_note([wire("low", tool=tool, displaySummary=summary)], name, True)
        payload = oppi.dumps(note.payload)
        assert len(payload.encode("utf-8", "replace")) <= 4096 and not oppi.re.search(oppi.INVISIBLE, payload)
        headers, text = oppi.webhook_message(note)
        assert all(value.isascii() and value.isprintable() for value in headers.values()) and "\n" not in text


class TestEvents:
    @pytest.mark.parametrize(
        ("kind", "title", "category", "level", "sound", "apns", "ntfy"),
        [
            ("ended", "Session Ended", "SESSION_DONE", "passive", None, 5, 3),
            ("error", "Session Error", "SESSION_ERROR", "active", "default", 10, 4),
            ("question", "Input Needed", "SESSION_DONE", "active", "default", 10, 4),
            ("answered", "Permission Request", "SESSION_DONE", "passive", None, 5, 1),
        ],
    )
    def test_each_kind(self, kind: str, title: str, category: str, level: str, sound: str | None, apns: int, ntfy: int) -> None:
        note = oppi.event_note(kind, "s1", "Work")
        aps = note.payload["aps"]
        assert (aps["alert"]["title"], aps["category"], aps["interruption-level"], aps.get("sound")) == (
            title,
            category,
            level,
            sound,
        )
        assert note.priority == (apns, ntfy) and note.payload.get("event") == (kind if kind in ("ended", "error") else None)
        assert oppi.apns_headers(note, "b")["apns-collapse-id"] == f"{kind}-s1"

    def test_one_takes_the_place_of_another(self) -> None:
        assert oppi.event_note("answered", "s1", "Work", "perm00000001").key == "perm00000001"

    def test_a_webhook_gets_a_title_it_can_read_and_a_link(self) -> None:
        headers, text = oppi.webhook_message(oppi.event_note("ended", "s1", "Work"))
        assert headers == {
            "Title": "Session Ended: Work",
            "Priority": "3",
            "Tags": "white_check_mark",
            "Click": "oppi://session/s1",
        }
        assert text == "The agent has finished its turn."
        assert oppi.webhook_message(oppi.event_note("test", "", ""))[0]["Title"] == "oppi"
        assert oppi.webhook_message(oppi.event_note("test", "", ""))[0]["Click"] == "oppi://"


def session(key: str, status: str, **fields: Any) -> dict[str, Any]:
    return {"id": key, "status": status, "createdAt": 978_307_200_000, "lastActivity": 1, **fields}


class TestActivity:
    def test_without_a_session_there_is_none(self) -> None:
        assert oppi.activity_state("1.0", [session("a", "stopped")], [], 0) is None

    def test_app_10(self) -> None:
        sessions = [session("a", "ready", lastActivity=9), session("b", "busy")]
        assert oppi.activity_state("1.0", sessions, [], 978_307_205_999) == {
            "status": "busy", "pendingPermissions": 0, "lastEvent": "Working", "elapsedSeconds": 5,
        }  # fmt: skip
        asked = oppi.activity_state("1.0", [session("a", "starting")], [wire()], 0)
        assert asked == {
            "status": "ready", "activeTool": "bash", "pendingPermissions": 1, "lastEvent": "Permission required",
            "elapsedSeconds": 0,
        }  # fmt: skip

    def test_app_11(self) -> None:
        sessions = [session("a", "ready", lastActivity=9, name="Work"), session("b", "stopped"), session("c", "error")]
        state = oppi.activity_state("1.1", sessions, [], 0)
        assert state == {
            "primaryPhase": "awaitingReply", "primarySessionId": "a", "primarySessionName": "Work", "totalActiveSessions": 2,
            "sessionsAwaitingReply": 1, "sessionsWorking": 0, "pendingApprovalCount": 0, "sessionStartDate": 0.0,
        }  # fmt: skip
        state = oppi.activity_state("1.1", [session("a", "busy")], [wire()], 0)
        assert state and state["primaryPhase"] == "needsApproval" and state["topPermissionId"] == "perm00000001"

    def test_update_and_end(self) -> None:
        assert oppi.activity_payload({"a": 1}, 1000)["aps"] == {
            "timestamp": 1000, "event": "update", "content-state": {"a": 1}, "stale-date": 1120,
        }  # fmt: skip
        assert oppi.activity_payload({}, 1000, True)["aps"] == {
            "timestamp": 1000, "event": "end", "content-state": {}, "dismissal-date": 1300,
        }  # fmt: skip


def test_curl_reads_its_options_as_they_were_meant() -> None:
    assert oppi.curl_config([("url", 'a"b\\c')]) == b'url = "a\\"b\\\\c"\n'
    for text in ("a\nurl = x", "a\rb", "a\0b", "a\x7fb"):
        with pytest.raises(ValueError, match="control character in header"):
            oppi.curl_config([("header", text)])


# ---- when ------------------------------------------------------------------------------------------------------------


class Stub(SimpleNamespace):
    __hash__ = object.__hash__  # type: ignore[assignment]


class World:
    """A notifier with a clock of its own, whose notes are collected instead of sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
        self.now, self.sent = 1000.0, []
        monkeypatch.setattr(oppi.time, "monotonic", lambda: self.now)
        store = oppi.Store(str(tmp_path))
        store.sessions = {"s1": {"id": "s1", "name": "Work"}}
        self.hub = oppi.Hub()
        settings = oppi.Settings({"push": {"webhook": "https://example.com/x"}})
        self.notifier = oppi.Notifier(store, lambda: settings, lambda changes: None, self.hub, set)
        monkeypatch.setattr(self.notifier, "send", self.sent.append)
        self.live = SimpleNamespace(id="s1", record=store.sessions["s1"], running=False, questions=lambda: self.dialogs)
        self.dialogs: list[dict[str, Any]] = []
        self.pending: dict[str, Any] = {}

    def ask(self, *keys: str) -> None:
        self.pending = {key: SimpleNamespace(wire=wire(key=key), session=self.live) for key in keys}

    def phone(self, level: str = "full") -> Any:
        pings: list[float] = []
        client = Stub(
            open=True, heard=self.now, asked=0.0, level=lambda key: level, ping=lambda: pings.append(self.now), pings=pings
        )
        self.hub.clients.add(client)  # type: ignore[arg-type]
        return client

    def look(self, after: float = 0.5) -> list[Any]:
        self.now += after
        before = len(self.sent)
        self.notifier.look({"s1": self.live}, self.pending)  # type: ignore[dict-item]
        return self.sent[before:]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[World]:
    world = World(monkeypatch, tmp_path)
    yield world
    monkeypatch.undo()


class TestAttention:
    def test_what_is_answered_at_once_is_not_told(self, world: World) -> None:
        world.ask("a")
        assert world.look() == []
        world.ask()
        assert world.look() == []

    def test_several_questions_are_told_together_and_once(self, world: World) -> None:
        world.ask("a", "b")
        world.look()
        [note] = world.look(oppi.PATIENCE_S)
        assert note.key == "b" and "2 requests wait" in note.payload["aps"]["alert"]["body"]
        assert world.look(60) == []

    def test_it_is_withdrawn_when_the_last_of_them_is_answered(self, world: World) -> None:
        world.ask("a", "b")
        world.look()
        world.look(2)
        world.ask("b")
        assert world.look() == []
        world.ask()
        [note] = world.look()
        assert (note.kind, note.key) == ("answered", "b")

    def test_a_phone_that_is_there_is_enough(self, world: World) -> None:
        world.phone()
        world.ask("a")
        world.look()
        assert world.look(5) == []

    def test_when_it_goes_the_question_is_told(self, world: World) -> None:
        phone = world.phone()
        world.ask("a")
        world.look()
        phone.open = False
        assert [note.kind for note in world.look(2)] == ["permission"]

    def test_a_phone_that_sleeps_is_asked_for_a_sign_and_then_counts_no_longer(self, world: World) -> None:
        phone = world.phone()
        world.ask("a")
        world.look()
        assert world.look(11) == [] and len(phone.pings) == 1
        assert world.look(5) == [] and len(phone.pings) == 1
        assert [note.kind for note in world.look(6)] == ["permission"]

    def test_one_that_gives_a_sign_is_there(self, world: World) -> None:
        phone = world.phone()
        world.ask("a")
        world.look()
        world.look(11)
        phone.heard = world.now
        assert world.look(9) == []

    def test_a_dialog_is_told_without_its_text(self, world: World) -> None:
        world.dialogs = [{"id": "d1", "title": "canary"}]
        world.look()
        [note] = world.look(2)
        assert note.kind == "question" and "canary" not in json.dumps(note.payload)

    @pytest.mark.parametrize(
        ("kind", "level", "told"), [("ended", "full", []), ("ended", "", ["ended"]), ("error", "", ["error"])]
    )
    def test_the_end_of_a_turn_is_told_to_who_did_not_see_it(self, world: World, kind: str, level: str, told: list[str]) -> None:
        world.phone(level)
        world.hub.ended["s1"] = kind
        assert [note.kind for note in world.look()] == told

    def test_a_turn_that_is_tried_again_has_not_ended(self, world: World) -> None:
        world.hub.ended["s1"], world.live.running = "ended", True
        assert world.look() == []
        world.live.running = False
        assert [note.kind for note in world.look()] == ["ended"]


def test_a_flood_of_notes_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    done: list[int] = []

    async def work(gate: asyncio.Event) -> None:
        await gate.wait()
        done.append(1)

    async def main() -> None:
        gate = asyncio.Event()
        for _ in range(100):
            world.notifier._spawn(work(gate))
        assert len(world.notifier.tasks) == oppi.NOTES_AT_ONCE
        await world.notifier.close()

    asyncio.run(main())
    assert done == [] and time.monotonic() > 0
