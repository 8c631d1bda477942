"""The socket of app 1.1: routing, subscriptions, turns, queue, stop, dialogs, catch-up."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pytest

from tests.support.phone import CommandFailed, new_id

from .rig import Rig, bash, kinds, status_is

BUSY = "!slow 20\n!text 100000"  # goes on until it is stopped


class TestRouting:
    def test_the_first_frame_comes_at_once_and_alone(self, rig: Rig) -> None:
        phone = rig.phone()
        assert phone.open()["userName"]
        phone.send("unsubscribe", sessionId="x", requestId="r1")
        phone.result("unsubscribe", "r1")
        assert phone.types(0) == ["stream_connected", "command_result"]

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("{", "Invalid JSON payload"),
            ('{"type":"prompt","x":NaN}', "Invalid JSON payload"),
            ("[1]", "Message payload must be a JSON object"),
            ('"x"', "Message payload must be a JSON object"),
            ("null", "Message payload must be a JSON object"),
            ("{}", "Message type is required"),
            ('{"type":7}', "Message type is required"),
            ('{"type":"get_state"}', "sessionId is required for get_state on /stream"),
            ('{"type":"prompt","message":"x"}', "sessionId is required for prompt on /stream"),
            ('{"type":"get_state","sessionId":7}', "sessionId is required for get_state on /stream"),
            ('{"type":"get_state","sessionId":"nope1234"}', "Session not found: nope1234"),
        ],
    )
    def test_errors_of_the_envelope(self, rig: Rig, text: str, problem: str) -> None:
        phone = rig.stream()
        phone.send_text(text)
        assert phone.wait("error")["error"] == problem

    @pytest.mark.parametrize("generation", ["1.0", "1.1"])
    def test_a_goodbye_is_answered_and_hung_up_at_once(self, rig: Rig, generation: str) -> None:
        """Both close frames are said: whoever waits for the end of the connection, an app or a stop, need not wait."""
        took = []
        for chat in [rig.chat(generation) for _ in range(3)]:
            begin = time.monotonic()
            chat.phone.close()
            took.append(time.monotonic() - begin)
        assert min(took) < 0.5, took

    def test_a_session_that_is_not_subscribed(self, rig: Rig) -> None:
        _, sid = rig.session()
        phone = rig.stream()
        text = f"Session {sid} is not subscribed at level=full"
        assert phone.command("get_queue", sid)["error"] == text
        error = phone.wait("error")
        assert (error["error"], error["code"], error["sessionId"]) == (text, "stream_not_subscribed_full", sid)
        phone.subscribe(sid, "notifications")
        phone.mark()
        phone.send("prompt", sessionId=sid, message="x")
        assert phone.wait("error")["code"] == "stream_not_subscribed_full"

    def test_an_unknown_type(self, rig: Rig) -> None:
        chat = rig.chat()
        for kind in ("dance", "bash"):
            result = chat.phone.command(kind, chat.sid, command="ls")
            assert (result["success"], result["error"]) == (False, f"Unsupported command type: {kind}")
        chat.phone.mark()
        chat.phone.send("dance", sessionId=chat.sid)
        assert chat.phone.wait(lambda f: f.get("error") == "Unsupported command type: dance")

    def test_a_stopped_session(self, rig: Rig) -> None:
        chat = rig.chat()
        chat.stop()
        with pytest.raises(CommandFailed, match=f"Session not active: {chat.sid}"):
            chat.phone.prompt(chat.sid, "x", wait="result")
        chat.phone.mark()
        chat.phone.send("get_commands", sessionId=chat.sid)
        assert chat.phone.wait("error")["error"] == f"Session not active: {chat.sid}"

    @pytest.mark.parametrize("path", ["/streams", "/stream/", "/", "/workspaces/a/sessions/b/stream", "/me"])
    def test_other_sockets_do_not_exist(self, rig: Rig, path: str) -> None:
        with pytest.raises(Exception, match="404"):
            rig.phone().connect_raw(path)

    def test_a_foreign_origin_is_refused(self, rig: Rig) -> None:
        phone = rig.phone()
        with pytest.raises(Exception, match="403"):
            phone.connect_raw("/stream", additional_headers={"Origin": "http://evil.example"})
        with contextlib.closing(phone.connect_raw("/stream", additional_headers={"Origin": rig.server.base_url})) as own:
            assert json.loads(own.recv())["type"] == "stream_connected"


class TestSubscribe:
    def test_order_of_the_bootstrap(self, both: Rig) -> None:
        wid, sid = both.session()
        phone = both.stream()
        frames = phone.subscribe(sid)
        assert [f["type"] for f in frames] == ["connected", "state", "command_result"]
        assert frames[0]["session"]["status"] == frames[1]["session"]["status"] == "ready"
        data = frames[2]["data"]
        assert data == {"sessionId": sid, "level": "full", "currentSeq": frames[0]["currentSeq"], "catchUpComplete": True}
        assert phone.call("GET", f"/workspaces/{wid}/sessions/{sid}")["session"]["status"] == "ready"

    def test_what_is_pending_comes_between_state_and_result(self, rig: Rig) -> None:
        chat = rig.chat()
        asked = chat.ask()
        frames = rig.stream().subscribe(chat.sid)
        assert [f["type"] for f in frames] == ["connected", "state", "permission_request", "command_result"]
        assert frames[2]["id"] == asked["id"]

    def test_a_full_one_always_tells_everything_again(self, rig: Rig) -> None:
        chat = rig.chat()
        for _ in range(2):
            frames = chat.phone.subscribe(chat.sid)
            assert [f["type"] for f in frames] == ["connected", "state", "command_result"]

    def test_in_the_middle_of_a_turn_nothing_comes_in_between(self, rig: Rig) -> None:
        chat = rig.chat()
        chat.say("!text 30000")
        phone = rig.stream()
        for _ in range(10):
            assert [f["type"] for f in phone.subscribe(chat.sid)][-3:] == ["connected", "state", "command_result"]

    def test_two_sessions_on_one_socket(self, rig: Rig) -> None:
        one, two = rig.chat(), rig.session()
        one.phone.subscribe(two[1])
        both = {one.sid, two[1]}
        for sid in both:
            one.phone.prompt(sid, "!say hello")
            one.phone.wait("agent_end", sessionId=sid)
        assert {f["sessionId"] for f in one.phone.frames if f["type"] == "text_delta"} == both

    def test_notifications_tell_only_the_outline(self, both: Rig) -> None:
        chat = both.chat()
        other = both.stream()
        frames = other.subscribe(chat.sid, "notifications")
        assert [f["type"] for f in frames] == ["state", "command_result"]
        other.mark()
        chat.play("!say hello\n" + bash("echo hi"))
        other.wait("agent_end")
        other.wait(status_is("ready"), since=len(other.frames) - 1)
        assert set(other.types()) == {"agent_start", "state", "agent_end"}

    def test_notifications_start_no_pi(self, rig: Rig) -> None:
        wid, sid = rig.session()
        phone = rig.stream()
        phone.subscribe(sid, "notifications")
        assert phone.session_detail(wid, sid)["session"]["status"] == "starting"

    def test_refusals(self, rig: Rig) -> None:
        _, sid = rig.session()
        phone = rig.stream()
        for value in (-1, "5", 1.5, True, [1]):
            result = phone.command("subscribe", sid, sinceSeq=value)
            assert (result["success"], result["error"]) == (False, "sinceSeq must be a non-negative integer")
        result = phone.command("subscribe", "nope1234")
        assert (result["error"], result["sessionId"]) == ("Session not found: nope1234", "nope1234")
        assert phone.command("subscribe", sid, level="loud")["success"] is False

    def test_too_many_of_them(self, rig: Rig) -> None:
        _, sid = rig.session()
        phone = rig.stream()
        results = [phone.command("subscribe", sid, level="notifications") for _ in range(31)]
        assert all(r["success"] for r in results[:30])
        assert results[30]["error"] == "Subscribe rate limit exceeded — try again later"
        assert rig.stream().subscribe(sid, "notifications")

    def test_unsubscribing_is_always_right(self, rig: Rig) -> None:
        chat = rig.chat()
        for sid in (chat.sid, chat.sid, "nope1234"):
            result = chat.phone.unsubscribe(sid)
            assert result["data"] == {"sessionId": sid}
        other = rig.join(chat.wid, chat.sid)
        other.play("hello")
        assert not [f for f in chat.phone.since() if f.get("sessionId") == chat.sid and f["type"] == "text_delta"]

    def test_a_subscription_outlives_stop_and_resume(self, rig: Rig) -> None:
        chat = rig.chat()
        chat.play("one")
        chat.stop()
        chat.phone.wait("session_ended")
        chat.phone.resume(chat.wid, chat.sid)
        chat.play("!say two")
        assert chat.answer_of() == "two"


class TestCatchUp:
    def test_replay_holds_exactly_what_was_missed(self, both: Rig) -> None:
        chat = both.chat()
        chat.play("first")
        last = chat.phone.last_seq[chat.sid]
        chat.phone.drop()
        other = both.join(chat.wid, chat.sid)
        other.play("!say second\n" + bash("echo hi"))
        missed = [f for f in other.phone.frames if "seq" in f]
        chat.phone.open()
        frames = chat.phone.subscribe(chat.sid, since=last)
        assert [f for f in frames if "seq" in f] == missed
        assert frames[-1]["data"]["catchUpComplete"] is True
        events = chat.phone.events(chat.wid, chat.sid, last)
        assert events["events"] == missed and events["catchUpComplete"] is True
        assert events["currentSeq"] == missed[-1]["seq"] == frames[-1]["data"]["currentSeq"]

    def test_another_epoch_is_never_called_complete(self, both: Rig) -> None:
        chat = both.chat()
        chat.play("first")
        last = chat.phone.last_seq[chat.sid]
        chat.stop()
        chat.phone.resume(chat.wid, chat.sid)
        for since in (0, last - 1):
            events = chat.phone.events(chat.wid, chat.sid, since)
            assert (events["events"], events["catchUpComplete"]) == ([], False)
        assert events["currentSeq"] >= last

    def test_an_old_position_is_not_complete(self, rig: Rig) -> None:
        chat = rig.chat()
        for _ in range(10):
            chat.play("\n".join([bash("true")] * 26))
        assert chat.phone.events(chat.wid, chat.sid, 1)["catchUpComplete"] is False
        last = chat.phone.last_seq[chat.sid]
        events = chat.phone.events(chat.wid, chat.sid, last - 400)
        assert [e["seq"] for e in events["events"]] == list(range(last - 399, last + 1)) and events["catchUpComplete"]

    def test_the_future_is_not_complete(self, rig: Rig) -> None:
        chat = rig.chat()
        assert chat.phone.events(chat.wid, chat.sid, 10**9)["events"] == []

    def test_numbers_go_on_after_stop_and_kill(self, both: Rig) -> None:
        chat = both.chat()
        chat.play("one")
        for graceful in (True, False):
            before = chat.phone.last_seq[chat.sid]
            chat.phone.drop()
            both.server.restart(graceful=graceful)
            chat.phone.open()
            chat.phone.subscribe(chat.sid)  # the phone complains about a number that goes back
            chat.play("more")
            assert chat.phone.last_seq[chat.sid] > before
        assert [m["content"] for m in chat.phone.since() if m["type"] == "message_end"] == ["more", "ok: more"]


class TestTurns:
    def test_frames_of_a_turn_in_order(self, both: Rig) -> None:
        chat = both.chat()
        frames = chat.play("!think 2\n!say hi\n" + bash("echo hi"), request_id="r1", client_turn_id="t1")
        assert kinds(frames) == [
            *("turn_ack", "command_result", "agent_start", "turn_ack", "state", "message_end", "state"),
            *("thinking_delta", "text_delta", "message_end", "state", "tool_start", "state", "tool_output", "tool_end"),
            *("state", "text_delta", "message_end", "state", "agent_end", "state"),
        ]
        acks = [(f["stage"], f.get("requestId")) for f in frames if f["type"] == "turn_ack"]
        assert acks == [("accepted", "r1"), ("dispatched", "r1"), ("started", None)]
        states = [f["session"]["status"] for f in frames if f["type"] == "state"]
        assert set(states[:-1]) == {"busy"} and states[-1] == "ready"
        assert chat.phone.text() == "hidone" and chat.answer_of() == "hi|done"
        calls = {f["toolCallId"] for f in frames if f["type"].startswith("tool_")}
        assert len(calls) == 1 and chat.output() == "ran: echo hi\n"

    def test_counters_and_previews(self, both: Rig) -> None:
        chat = both.chat()
        chat.play("!usage 1000 50\n!say the answer")
        session = chat.phone.session_detail(chat.wid, chat.sid)["session"]
        assert session["messageCount"] == 2 and session["lastMessage"] == "the answer"
        assert (session["tokens"]["input"], session["tokens"]["output"]) == (1000, 50)
        assert session["cost"] > 0 and session["firstMessage"].startswith("!usage")
        chat.play("!tool write " + json.dumps({"path": "new.txt", "content": "a\nb\nc"}))
        stats = chat.phone.session_detail(chat.wid, chat.sid)["session"]["changeStats"]
        assert (stats["mutatingToolCalls"], stats["changedFiles"], stats["addedLines"]) == (1, ["new.txt"], 3)

    def test_a_turn_is_shown_to_every_phone(self, both: Rig) -> None:
        chat = both.chat()
        other, old = both.join(chat.wid, chat.sid), both.join(chat.wid, chat.sid, "1.0")
        chat.play("!say to all")
        for phone in (other.phone, old.phone):
            phone.wait("agent_end")
            assert phone.text(0) == "to all"
            assert [f["stage"] for f in phone.frames if f["type"] == "turn_ack"] == ["accepted", "dispatched", "started"]
        assert "command_result" not in [f["type"] for f in other.phone.since(len(other.phone.frames) - 5)]

    @pytest.mark.parametrize(
        "fields",
        [
            {"message": None}, {"message": 7}, {"message": "x", "images": "no"}, {"message": "x", "images": [1]},
            {"message": "x", "images": [{"data": "aa"}]}, {"message": "x", "streamingBehavior": "later"},
        ],
    )  # fmt: skip
    def test_wrong_types_fail_and_reach_no_pi(self, rig: Rig, fields: Any) -> None:
        chat = rig.chat()
        before = len(rig.prompts_of_pi())
        assert chat.phone.command("prompt", chat.sid, **fields)["success"] is False
        chat.phone.mark()
        chat.phone.send("prompt", sessionId=chat.sid, **fields)
        assert chat.phone.wait("error")["error"]
        assert len(rig.prompts_of_pi()) == before

    def test_images_reach_pi_in_its_form(self, rig: Rig) -> None:
        chat = rig.chat()
        chat.play("look", images=[{"data": "aGk=", "mimeType": "image/png"}])
        sent = next(line for line in reversed(rig.stdin_of_pi()) if line["type"] == "prompt")
        assert sent["images"] == [{"type": "image", "data": "aGk=", "mimeType": "image/png"}]

    def test_the_same_turn_is_run_once(self, both: Rig) -> None:
        chat = both.chat()
        turn = new_id()
        chat.play("once only " + turn, client_turn_id=turn)
        again = chat.phone.prompt(chat.sid, "once only " + turn, turn, wait="result")
        ack = chat.phone.wait("turn_ack", requestId=again.request_id)
        assert (ack["duplicate"], ack["stage"]) == (True, "started")
        assert both.prompts_of_pi().count("once only " + turn) == 1

    def test_one_id_is_not_two_turns(self, rig: Rig) -> None:
        chat = rig.chat()
        chat.play("this", client_turn_id="turn-1")
        with pytest.raises(CommandFailed, match="clientTurnId conflict: turn-1"):
            chat.phone.prompt(chat.sid, "that", "turn-1")
        with pytest.raises(CommandFailed, match="clientTurnId conflict: turn-1"):
            chat.phone.prompt(chat.sid, "this", "turn-1", kind="steer")

    @pytest.mark.parametrize("ending", ["fails", "is stopped"])
    def test_what_waits_behind_a_turn_that_fails_is_played_and_behind_a_stopped_one_not(self, both: Rig, ending: str) -> None:
        chat = both.chat()
        chat.play("!say warm")
        chat.say("!dialog confirm\n!error 400 no")
        dialog = chat.phone.wait("extension_ui_request")["id"]
        for kind, text in (("prompt", "one"), ("steer", "two"), ("follow_up", "three")):
            chat.phone.prompt(chat.sid, text, f"{text} {chat.sid}", kind=kind)
        if ending == "is stopped":
            chat.phone.send("stop", sessionId=chat.sid)
        chat.phone.prompt(chat.sid, "last", f"last {chat.sid}")
        if ending == "fails":
            chat.phone.answer_dialog(dialog, chat.sid, confirmed=True)
        chat.phone.wait("message_end", role="assistant", content="ok: last")
        chat.settled()
        said = [f["content"] for f in chat.phone.frames if f["type"] == "message_end" and f["role"] == "user"]
        wanted = ["two", "one", "three", "last"] if ending == "fails" else ["last"]
        assert said[2:] == wanted
        queue = chat.phone.command("get_queue", chat.sid)["data"]
        assert (queue["steering"], queue["followUp"]) == ([], [])

    def test_what_comes_while_a_queue_is_handed_over_anew_comes_behind_it(self, both: Rig) -> None:
        chat = both.chat()
        chat.play("!say warm")
        for turn in range(8):
            texts = [f"{text} {turn}" for text in ("one", "two", "three")]
            start = chat.phone.mark()
            chat.say("!dialog confirm\n!error 400 no")
            dialog = chat.phone.wait("extension_ui_request")["id"]
            for text in texts[:2]:
                chat.phone.prompt(chat.sid, text, kind="follow_up")
            chat.phone.answer_dialog(dialog, chat.sid, confirmed=True)
            chat.phone.wait("error", since=start)
            chat.phone.prompt(chat.sid, texts[2])
            chat.phone.wait("message_end", role="assistant", content=f"ok: {texts[2]}", since=start)
            chat.phone.wait(status_is("ready"), since=len(chat.phone.frames) - 1)
            said = [f["content"] for f in chat.phone.since(start) if f["type"] == "message_end" and f["role"] == "user"]
            assert said[1:] == texts

    def test_a_failed_answer_is_an_error_and_the_session_goes_on(self, both: Rig) -> None:
        chat = both.chat()
        frames = chat.play("!error 529 Overloaded")
        assert [f["error"] for f in frames if f["type"] == "error"] == ["529 Overloaded"]
        chat.play("!say better")
        assert chat.answer_of() == "better"

    def test_characters_of_all_kinds_survive(self, both: Rig) -> None:
        chat = both.chat()
        text = "ä 日本 👩‍👩‍👧 \u2028 \\u0041 \"quoted\" \\ /"
        chat.play("!chunk 1\n!say " + text)
        assert chat.phone.text() == text == chat.answer_of()


class TestQueue:
    def test_steering_needs_a_running_turn(self, rig: Rig) -> None:
        chat = rig.chat()
        for kind, problem in (("steer", "Steer"), ("follow_up", "Follow-up")):
            with pytest.raises(CommandFailed, match=f"{problem} requires an active streaming turn"):
                chat.phone.prompt(chat.sid, "x", kind=kind)

    @pytest.mark.parametrize(("kind", "queue"), [("steer", "steering"), ("follow_up", "followUp")])
    def test_a_queued_message_is_shown_and_then_taken(self, both: Rig, kind: str, queue: str) -> None:
        chat = both.chat()
        chat.say("!toolwait 1000\n" + '!tool read {"path":"a"}')
        start = chat.phone.mark()
        chat.phone.wait("tool_start", since=0)
        turn = chat.phone.prompt(chat.sid, "!say turned", kind=kind)
        shown = chat.phone.wait(lambda f: f["type"] == "queue_state" and f["queue"][queue], since=start)
        assert [item["id"] for item in shown["queue"][queue]] == [turn.client_turn_id]
        taken = chat.phone.wait("queue_item_started")
        assert (taken["kind"], taken["item"]["message"]) == (kind, "!say turned")
        assert taken["queueVersion"] > shown["queue"]["version"]
        chat.settled()
        assert "turned" in chat.answer_of()
        stages = [f["stage"] for f in chat.phone.since(start) if f["type"] == "turn_ack" and f["command"] == kind]
        assert stages == ["accepted", "dispatched", "started"]

    def test_a_late_retry_of_a_steer_is_a_duplicate_not_an_error(self, rig: Rig) -> None:
        chat = rig.chat()
        chat.say("!wait 1000\n!say a")
        chat.phone.wait("agent_start")
        turn = chat.phone.prompt(chat.sid, "!say b", kind="steer")
        chat.settled()
        again = chat.phone.prompt(chat.sid, "!say b", turn.client_turn_id, "result", kind="steer")
        assert chat.phone.wait("turn_ack", requestId=again.request_id)["duplicate"] is True

    @pytest.mark.parametrize("kind", ["steer", "follow_up"])
    def test_a_template_that_is_queued_just_as_the_run_ends_is_answered(self, both: Rig, kind: str) -> None:
        """pi would keep it until the next prompt; 0.73 says 50 ms late that a run is over, time enough to be accepted."""
        chat = both.chat()
        for number in range(3):
            chat.phone.mark()
            chat.say(f"!say run {number}")
            chat.phone.wait("message_end", role="assistant")
            chat.phone.send(kind, sessionId=chat.sid, message=f"/late {number}", requestId=kind, clientTurnId=f"{kind}{number}")
            done = chat.phone.result(kind, kind)
            if done["success"]:
                chat.phone.wait("message_end", role="assistant", content=f"ok: /late {number}")
            else:
                assert "requires an active streaming turn" in done["error"]
            chat.settled()

    def test_the_queue_is_told_on_request(self, both: Rig) -> None:
        chat = both.chat()
        result = chat.phone.command("get_queue", chat.sid, check=True)
        state = chat.phone.wait("queue_state")
        assert state["queue"] == result["data"]
        assert (result["data"]["steering"], result["data"]["followUp"]) == ([], [])

    def test_the_queue_is_replaced(self, rig: Rig) -> None:
        chat = rig.chat()
        chat.say(BUSY)
        chat.phone.wait("agent_start")
        chat.phone.prompt(chat.sid, "old", kind="follow_up")
        version = chat.phone.command("get_queue", chat.sid)["data"]["version"]
        drafts = [{"message": "new 1"}, {"message": "new 2"}]
        queue = chat.phone.command("set_queue", chat.sid, baseVersion=version, steering=[], followUp=drafts, check=True)["data"]
        assert [item["message"] for item in queue["followUp"]] == ["new 1", "new 2"] and queue["version"] > version
        late = chat.phone.command("set_queue", chat.sid, baseVersion=version, steering=[], followUp=[])
        assert late["error"] == f"Queue version mismatch: expected {queue['version']}, got {version}"
        assert "queue_item_started" not in chat.phone.types(0)

    def test_a_picture_stays_with_its_message_when_the_queue_is_replaced(self, rig: Rig) -> None:
        chat = rig.chat()
        chat.say(BUSY)
        chat.phone.wait("agent_start")
        picture = {"data": "AAAA", "mimeType": "image/png"}
        chat.phone.prompt(chat.sid, "look at it", kind="follow_up", images=[picture])
        queue = chat.phone.command("get_queue", chat.sid)["data"]
        drafts = [{"message": "but first"}, *({"id": item["id"], "message": item["message"]} for item in queue["followUp"])]
        chat.phone.command("set_queue", chat.sid, baseVersion=queue["version"], steering=[], followUp=drafts, check=True)
        sent = [line for line in rig.stdin_of_pi() if line.get("message") in ("look at it", "but first")]
        assert [(line["message"], line.get("images", [])) for line in sent[1:]] == [
            ("but first", []), ("look at it", [{"type": "image", **picture}]),
        ]

    def test_an_idle_session_takes_no_items(self, rig: Rig) -> None:
        chat = rig.chat()
        version = chat.phone.command("get_queue", chat.sid)["data"]["version"]
        items = [{"message": "x"}]
        result = chat.phone.command("set_queue", chat.sid, baseVersion=version, steering=items, followUp=[])
        assert result["error"] == "Message queue can only contain items while a turn is streaming"
        assert chat.phone.command("set_queue", chat.sid, baseVersion=version, steering=7, followUp=[])["success"] is False


class TestStop:
    def test_stopping_a_turn_keeps_the_session(self, both: Rig) -> None:
        chat = both.chat()
        chat.say(BUSY)
        chat.phone.wait("text_delta")
        start = chat.phone.mark()
        chat.phone.send("stop", sessionId=chat.sid)
        frames = chat.settled()
        order = kinds([f for f in frames if f["type"] in ("stop_requested", "agent_end", "stop_confirmed", "error")])
        assert order == ["stop_requested", "agent_end", "stop_confirmed"]
        assert chat.phone.wait("stop_requested", since=start)["source"] == "user"
        states = [f["session"]["status"] for f in frames if f["type"] == "state"]
        assert states[0] == "stopping" and states[-1] == "ready" and "error" not in chat.phone.types(start)
        chat.play("!say still here")
        assert chat.answer_of() == "still here"

    @pytest.mark.parametrize("kind", ["stop", "abort"])
    def test_stopping_an_idle_session(self, rig: Rig, kind: str) -> None:
        chat = rig.chat()
        chat.phone.mark()
        assert chat.phone.command(kind, chat.sid)["success"] is True
        confirmed = chat.phone.wait("stop_confirmed")
        assert (confirmed["source"], confirmed["reason"]) == ("user", "Session already idle")
        assert "state" not in chat.phone.types()

    @pytest.mark.parametrize("turns", [1, 2])
    def test_a_stop_on_the_heels_of_a_prompt_stops_it(self, both: Rig, turns: int) -> None:
        chat = both.chat()
        chat.phone.mark()
        for number in range(turns):
            chat.phone.send("prompt", sessionId=chat.sid, message=f"!slow 20\n!text 5{number}0", clientTurnId=f"{number}")
        chat.phone.send("stop", sessionId=chat.sid)
        chat.phone.wait("stop_requested")
        assert "reason" not in chat.phone.wait("stop_confirmed")
        assert "w400" not in chat.phone.text()

    def test_a_stop_before_any_turn_is_answered_at_once(self, both: Rig) -> None:
        chat = both.chat()
        chat.phone.mark()
        chat.phone.send("stop", sessionId=chat.sid)
        chat.phone.command("get_session_stats", chat.sid, check=True)
        assert [f["reason"] for f in chat.phone.since() if f["type"] == "stop_confirmed"] == ["Session already idle"]

    def test_stopping_twice_is_stopping_once(self, both: Rig) -> None:
        chat = both.chat()
        chat.say(BUSY)
        chat.phone.wait("text_delta")
        chat.phone.mark()
        for _ in range(3):
            chat.phone.send("stop", sessionId=chat.sid)
        assert chat.phone.command("stop", chat.sid)["success"] is True
        chat.settled()
        found = [f for f in chat.phone.since() if f["type"].startswith("stop_")]
        assert (found[0]["type"], found[0]["source"]) == ("stop_requested", "user")
        assert {f["type"] for f in found[1:]} == {"stop_confirmed"}
        assert {f.get("reason") for f in found[2:]} <= {"Session already idle"}, "said of those that came too late"

    def test_stopping_in_a_tool(self, both: Rig) -> None:
        chat = both.chat()
        chat.say("!toolwait 60000\n" + bash("sleep 60"))
        chat.phone.wait("tool_output")
        chat.phone.send("stop", sessionId=chat.sid)
        frames = chat.settled()
        assert [f["isError"] for f in frames if f["type"] == "tool_end"] == [True]
        assert "error" not in [f["type"] for f in frames]
        chat.play("!say on")
        assert chat.answer_of() == "on"

    def test_a_stopped_session_is_not_stopped_again(self, rig: Rig) -> None:
        chat = rig.chat()
        chat.stop()
        chat.phone.wait("session_ended")
        chat.phone.mark()
        for kind in ("stop", "stop_session"):
            assert chat.phone.command(kind, chat.sid)["success"] is True
        assert chat.phone.types() == ["command_result", "command_result"]

    @pytest.mark.parametrize("how", ["socket", "rest", "delete"])
    @pytest.mark.parametrize("busy", [False, True])
    def test_ending_a_session(self, both: Rig, how: str, busy: bool) -> None:
        chat = both.chat()
        chat.phone.mark()
        if busy:
            chat.say(BUSY)
            chat.phone.wait("text_delta")
        if how == "socket":
            assert chat.phone.command("stop_session", chat.sid)["success"] is True
        else:
            (chat.phone.stop if how == "rest" else chat.phone.delete)(chat.wid, chat.sid)
        end = chat.phone.wait("session_ended")
        assert end["reason"] == "stopped"
        frames = chat.phone.since()
        found = [f["type"] for f in frames[: frames.index(end) + 1] if f["type"].startswith(("stop_", "session_"))]
        assert found == ["stop_requested", "stop_confirmed", "session_ended"]
        if how == "delete":
            assert chat.phone.wait("session_deleted")["sessionId"] == chat.sid
        else:
            assert chat.phone.session_detail(chat.wid, chat.sid)["session"]["status"] == "stopped"
        after = chat.phone.frames[chat.phone.frames.index(end) + 1 :]
        assert {f["type"] for f in after} <= {"command_result", "session_deleted"}

    def test_a_pi_that_does_not_stop_is_not_waited_for_for_ever(self, rig: Rig) -> None:
        chat = rig.chat()
        chat.say("!hang hard")
        chat.phone.wait("agent_start")
        chat.phone.stop(chat.wid, chat.sid)
        assert chat.phone.wait("session_ended")["reason"] == "stopped"


class TestDialogs:
    @pytest.mark.parametrize(
        ("method", "answer", "told"),
        [
            ("select", {"value": "green"}, {"value": "green"}),
            ("confirm", {"confirmed": True}, {"confirmed": True}),
            ("confirm", {"cancelled": True}, {"cancelled": True}),
            ("input", {"value": "Ada"}, {"value": "Ada"}),
            ("editor", {"value": "a\nb"}, {"value": "a\nb"}),
            ("input", {"cancelled": True}, {"cancelled": True}),
        ],
    )
    def test_question_and_answer(self, both: Rig, method: str, answer: Any, told: Any) -> None:
        chat = both.chat()
        chat.say(f"!dialog {method}")
        asked = chat.phone.wait("extension_ui_request")
        assert asked["method"] == method and (method != "select" or asked["options"] == ["red", "green"])
        chat.phone.answer_dialog(asked["id"], chat.sid, **answer)
        chat.settled()
        assert json.loads(chat.answer_of().partition(": ")[2]) == told

    @pytest.mark.parametrize("method", ["notify", "setStatus", "setWidget", "setTitle", "set_editor_text"])
    def test_notices_need_no_answer(self, rig: Rig, method: str) -> None:
        chat = rig.chat()
        frames = chat.play(f"!dialog {method}\n!say on")
        assert next(f for f in frames if f["type"] == "extension_ui_notification")["method"] == method
        assert chat.answer_of() == "on"

    def test_an_open_one_is_told_to_whoever_comes(self, rig: Rig) -> None:
        chat = rig.chat()
        chat.say("!dialog input")
        asked = chat.phone.wait("extension_ui_request")
        chat.phone.drop()
        chat.phone.open()
        frames = chat.phone.subscribe(chat.sid)
        assert [f["id"] for f in frames if f["type"] == "extension_ui_request"] == [asked["id"]]
        chat.phone.answer_dialog(asked["id"], chat.sid, value="back")
        chat.phone.wait("agent_end")

    def test_the_other_phones_learn_that_it_was_answered(self, rig: Rig) -> None:
        chat = rig.chat()
        other = rig.join(chat.wid, chat.sid).phone
        chat.say("!dialog input")
        asked = other.wait("extension_ui_request", since=0)
        chat.phone.answer_dialog(asked["id"], chat.sid, value="mine")
        told = other.wait("extension_ui_notification", since=0)
        assert (told["id"], told["message"]) == (asked["id"], "Answered on another phone")
        chat.settled()
        assert "extension_ui_notification" not in chat.phone.types()

    def test_seconds_not_milliseconds(self, rig: Rig) -> None:
        chat = rig.chat()
        chat.say("!dialog input 5000")
        assert chat.phone.wait("extension_ui_request")["timeout"] == 5
        chat.phone.send("stop", sessionId=chat.sid)

    def test_an_unknown_one(self, rig: Rig) -> None:
        chat = rig.chat()
        chat.phone.answer_dialog("nope", chat.sid, value="x")
        assert chat.phone.wait("error")["error"] == "UI request not found: nope"

    @pytest.mark.parametrize("ending", ["timeout", "stop"])
    def test_it_is_gone_with_its_turn(self, both: Rig, ending: str) -> None:
        chat = both.chat()
        chat.say("!dialog input" + (" 50" if ending == "timeout" else ""))
        asked = chat.phone.wait("extension_ui_request")
        if ending == "stop":
            chat.phone.send("stop", sessionId=chat.sid)
        chat.phone.wait("agent_end")
        chat.phone.answer_dialog(asked["id"], chat.sid, value="late")
        assert chat.phone.wait("error")["error"] == f"UI request not found: {asked['id']}"
        assert "extension_ui_request" not in [f["type"] for f in both.join(chat.wid, chat.sid).phone.frames]


class TestComingBack:
    """What was said of an answer while a phone was away, before the answer is complete."""

    @pytest.mark.parametrize("generation", ["1.0", "1.1"])
    def test_in_the_middle_of_an_answer_nothing_of_it_is_missing(self, rig: Rig, generation: str) -> None:
        chat = rig.chat(generation)
        chat.say("!slow 20\n!text 100")
        chat.phone.wait("text_delta")
        chat.phone.drop()
        before = chat.phone.text()
        chat.phone.open() if generation == "1.1" else chat.phone.open_session(chat.wid, chat.sid)
        start = len(chat.phone.frames) - 1
        if generation == "1.1":
            chat.phone.subscribe(chat.sid)
        end = chat.phone.wait("message_end", role="assistant", since=start)
        after = "".join(f["delta"] for f in chat.phone.frames[start:] if f["type"] == "text_delta")
        assert end["content"].startswith(before)
        assert end["content"].endswith(after)
        assert len(before) + len(after) >= len(end["content"])  # what was under way to the lost socket may come again

    def test_a_second_subscribe_repeats_nothing(self, rig: Rig) -> None:
        chat = rig.chat()
        chat.say("!slow 20\n!text 60")
        chat.phone.wait("text_delta")
        chat.phone.subscribe(chat.sid)
        chat.settled()
        assert chat.phone.text() == chat.answer_of()
