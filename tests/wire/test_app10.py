"""The per-session socket of app 1.0."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.phone import CommandFailed

from .rig import PUSH, Rig, bash, kinds, rig_with, status_is

ONLY_11 = {"queue_state", "queue_item_started", "session_deleted", "command_result", "stream_connected", "git_status"}


class TestOpening:
    def test_connected_comes_before_pi_starts(self, both: Rig) -> None:
        wid, sid = both.session()
        phone = both.phone("1.0")
        first = phone.open_session(wid, sid)
        assert first["session"]["id"] == sid and first["session"]["status"] == "starting"
        assert phone.wait("state")["session"]["status"] == "ready"
        assert phone.types(0)[:2] == ["connected", "state"]

    def test_a_second_phone_joins(self, both: Rig) -> None:
        chat = both.chat("1.0")
        chat.play("hello")
        phone = both.phone("1.0")
        assert phone.open_session(chat.wid, chat.sid)["currentSeq"] == chat.phone.last_seq[chat.sid]
        phone.wait("state")
        chat.play("!say again")
        phone.wait("agent_end")
        assert phone.text() == "again"

    @pytest.mark.parametrize("case", ["workspace", "session", "both"])
    def test_the_address_must_be_right(self, rig: Rig, case: str) -> None:
        wid, sid = rig.session()
        other = rig.workspace("host_locked")
        path = {"workspace": f"/workspaces/{other}/sessions/{sid}", "session": f"/workspaces/{wid}/sessions/nope1234"}
        with pytest.raises(Exception, match="404"):
            rig.phone("1.0").connect_raw(path.get(case, "/workspaces/x/sessions/y") + "/stream")

    def test_it_starts_a_stopped_session_again(self, both: Rig) -> None:
        chat = both.chat("1.0")
        chat.play("one")
        chat.stop()
        chat.phone.wait("session_ended")
        chat.phone.drop()
        again = both.join(chat.wid, chat.sid, "1.0")
        again.play("!say two")
        users = [e["text"] for e in again.phone.session_detail(chat.wid, chat.sid)["trace"] if e["type"] == "user"]
        assert users == ["one", "!say two"]


class TestMessages:
    def test_a_turn_in_order(self, both: Rig) -> None:
        chat = both.chat("1.0")
        frames = chat.play("!think 2\n!say hi\n" + bash("echo hi"))
        assert kinds(frames) == [
            *("turn_ack", "rpc_result", "agent_start", "turn_ack", "state", "message_end", "state"),
            *("thinking_delta", "text_delta", "message_end", "state", "tool_start", "state", "tool_output", "tool_end"),
            *("state", "text_delta", "message_end", "state", "agent_end", "state"),
        ]
        assert chat.phone.text() == "hidone" and chat.output() == "ran: echo hi\n"

    def test_nothing_of_the_other_app_is_sent(self, rig: Rig) -> None:
        chat = rig.chat("1.0")
        chat.say("!toolwait 1000\n" + '!tool read {"path":"a"}')
        chat.phone.wait("tool_start")
        chat.phone.prompt(chat.sid, "!say more", kind="steer")
        chat.phone.command("get_queue")
        chat.settled()
        assert not ONLY_11 & {f["type"] for f in chat.phone.frames + chat.phone.unknown}

    def test_a_failed_tool_is_seen_in_its_output(self, both: Rig) -> None:
        chat = both.chat("1.0")
        frames = chat.play("!tool nosuch {}")
        failed = [f["type"] for f in frames if f.get("isError")]
        assert failed[0] == "tool_output"

    def test_errors(self, rig: Rig) -> None:
        chat = rig.chat("1.0")
        for text, problem in (
            ("{", "Invalid JSON payload"),
            ("[]", "Message payload must be a JSON object"),
            ('{"type":"subscribe"}', "Stream subscriptions are only supported on /stream (received subscribe)"),
            ('{"type":"unsubscribe"}', "Stream subscriptions are only supported on /stream (received unsubscribe)"),
            ('{"type":"dance"}', "Unsupported command type: dance"),
        ):
            chat.phone.mark()
            chat.phone.send_text(text)
            assert chat.phone.wait(lambda f: bool(f.get("error")))["error"] == problem

    def test_the_session_of_the_socket_is_meant_whatever_the_message_says(self, rig: Rig) -> None:
        chat, other = rig.chat("1.0"), rig.chat("1.1")
        chat.phone.mark()
        chat.phone.send("prompt", sessionId=other.sid, message="!say mine")
        chat.settled()
        assert chat.answer_of() == "mine" and "agent_start" not in other.phone.types(0)

    def test_after_the_end_commands_fail_and_the_socket_stays(self, both: Rig) -> None:
        chat = both.chat("1.0")
        chat.stop()
        chat.phone.wait("session_ended")
        with pytest.raises(CommandFailed, match=f"Session not active: {chat.sid}"):
            chat.phone.prompt(chat.sid, "x")
        chat.phone.resume(chat.wid, chat.sid)
        chat.play("!say back")
        assert chat.answer_of() == "back"

    def test_stopping(self, both: Rig) -> None:
        chat = both.chat("1.0")
        chat.say("!slow 20\n!text 100000")
        chat.phone.wait("text_delta")
        chat.phone.send("stop")
        types = [f["type"] for f in chat.settled() if f["type"] in ("stop_requested", "agent_end", "stop_confirmed")]
        assert types == ["stop_requested", "agent_end", "stop_confirmed"]
        chat.phone.mark()
        chat.phone.send("stop_session")
        assert chat.phone.wait("session_ended")["reason"] == "stopped"


class TestSlowStart:
    def test_what_is_sent_meanwhile_is_done_in_order(self, tmp_path: Path) -> None:
        with rig_with(tmp_path, fake={"START_DELAY": "0.5"}) as rig:
            wid, sid = rig.session()
            phone = rig.phone("1.0")
            phone.open_session(wid, sid)
            phone.send("set_session_name", name="early", requestId="n")
            phone.send("prompt", message="!say early bird", requestId="p", clientTurnId="t")
            assert phone.result("set_session_name", "n")["success"] and phone.result("prompt", "p")["success"]
            phone.wait("agent_end")
            assert phone.text() == "early bird"
            bootstrap = [kind for kind in phone.types(0) if kind not in ("turn_ack", "rpc_result")]  # held at once
            assert bootstrap[:2] == ["connected", "state"]
            assert phone.wait(status_is("ready"))["session"].get("name") in (None, "early")

    def test_a_question_that_comes_meanwhile_is_told_once(self, tmp_path: Path) -> None:
        """The app may have answered it before it would see it again, and nobody would then take that back."""
        with rig_with(tmp_path, fake={"START_DELAY": "2"}) as rig:
            asking = rig.chat("1.1")
            wid, sid = rig.session()
            phone = rig.phone("1.0")
            phone.open_session(wid, sid)
            asking.say(bash(PUSH))
            phone.wait("permission_request", since=0)
            assert "state" not in phone.types(0), "the session has not begun yet"
            phone.wait("state", since=0)
            phone.command("get_session_stats", sid)
            assert phone.types(0).count("permission_request") == 1

    def test_a_failed_start_keeps_the_socket(self, tmp_path: Path) -> None:
        with rig_with(tmp_path) as rig:
            gone = tmp_path / "gone"
            wid = rig.phone("1.0").create_workspace("gone", hostMount=str(gone), policyPreset="host")["id"]
            sid = rig.phone("1.0").create_session(wid)["id"]
            phone = rig.phone("1.0")
            assert phone.open_session(wid, sid)["session"]["id"] == sid
            error = phone.wait("error")
            assert error["fatal"] is True and error["error"] == f"Host workspace path not found: {gone}"
            with pytest.raises(CommandFailed, match=f"Session not active: {sid}"):
                phone.prompt(sid, "x")
            assert phone.closed is None
            new = rig.stream()
            assert new.command("subscribe", sid)["error"] == f"Host workspace path not found: {gone}"
            status, answer = new.request("POST", f"/workspaces/{wid}/sessions/{sid}/resume", {})
            assert (status, answer["error"]) == (500, f"Host workspace path not found: {gone}")
            gone.mkdir()
            rig.phone().resume(wid, sid)

    def test_a_pi_that_ends_at_once_is_explained(self, tmp_path: Path) -> None:
        with rig_with(tmp_path) as rig:
            other = tmp_path / "pi"  # a file that is just being run cannot be written
            other.write_text("#!/bin/sh\necho 'no api key found' >&2\nexit 3\n")
            other.chmod(0o755)
            other.replace(rig.server.pi)
            wid, sid = rig.session()
            phone = rig.phone("1.0")
            phone.open_session(wid, sid)
            error = phone.wait("error")
            assert error["error"].startswith(f"pi exited before ready: {sid}") and "no api key found" in error["error"]
            assert rig.phone().session_detail(wid, sid)["session"]["status"] == "stopped"
