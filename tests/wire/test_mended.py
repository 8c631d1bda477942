"""What once went wrong, from the phone's side."""

from __future__ import annotations

import json
import time
from pathlib import Path

from tests.support.phone import SEND_TIMEOUT, Phone
from tests.support.server import Server
from tests.wire.rig import Chat, Rig, rig_with


def test_nothing_is_told_after_the_tripwire(both: Rig):
    chat = both.chat()
    chat.say('!toolwait 200\n!ungated write {"path":"x","content":"y"}\n!say never said')
    chat.phone.wait("error")
    chat.phone.wait("session_ended")
    assert "never said" not in chat.phone.text()


def test_a_terminated_turn_ends_with_agent_end(both: Rig):
    chat = both.chat()
    chat.say("!slow 20\n!text 1000")
    chat.phone.wait("text_delta")
    chat.phone.send("stop_session", sessionId=chat.sid)
    chat.phone.wait("session_ended")
    assert "agent_end" in chat.phone.types(0)


def test_a_prompt_is_acknowledged_while_pi_starts(tmp_path: Path):
    """stream 2.3: ack once the message is safely held; the app gives up after 4 s."""
    with rig_with(tmp_path, fake={"START_DELAY": "6"}) as rig:
        wid, sid = rig.session()
        phone = rig.phone("1.0")
        phone.open_session(wid, sid)
        phone.prompt(sid, "!say patient", timeout=SEND_TIMEOUT)
        phone.wait("agent_end")
        assert phone.text() == "patient"


def test_stopping_with_a_queue_shows_no_error(both: Rig):
    """0.73 has no clear_queue."""
    chat = both.chat()
    chat.say("!slow 20\n!text 1000")
    chat.phone.wait("text_delta")
    chat.phone.prompt(chat.sid, "queued", kind="follow_up")
    chat.phone.wait("queue_state")
    chat.phone.send("stop", sessionId=chat.sid)
    frames = chat.settled()
    assert "error" not in [f["type"] for f in frames], [f for f in frames if f["type"] == "error"]


def test_replacing_the_queue_works_or_fails_soon(both: Rig):
    chat = both.chat()
    chat.say("!slow 20\n!text 1000")
    chat.phone.wait("text_delta")
    version = chat.phone.command("get_queue", chat.sid)["data"]["version"]
    begin = time.monotonic()
    result = chat.phone.command("set_queue", chat.sid, baseVersion=version, steering=[], followUp=[{"message": "x"}])
    assert time.monotonic() - begin < SEND_TIMEOUT, result
    assert "error" not in chat.phone.types(), [f for f in chat.phone.since() if f["type"] == "error"]


def test_revoking_closes_the_socket_within_a_second():
    took = []
    with Server() as server:
        for name in ("lost", "stolen", "sold"):  # one of three, as the machine may be busy with something else
            token = json.loads(server.cli("devices", "add", name, "--json").stdout)["token"]
            lost = Phone(server.base_url, token)
            lost.open()
            assert server.cli("devices", "revoke", name).returncode == 0
            done = time.monotonic()
            lost.wait_closed()
            took.append(time.monotonic() - done)
    assert min(took) < 1, took


def test_without_ids_a_prompt_is_acknowledged_by_nothing_but_itself(rig: Rig) -> None:
    chat = rig.chat()
    chat.phone.mark()
    chat.phone.send("prompt", sessionId=chat.sid, message="!say plain")
    chat.settled()
    assert "turn_ack" not in chat.phone.types() and "command_result" not in chat.phone.types()
    assert chat.answer_of() == "plain"


def test_messages_of_one_session_are_handled_in_their_order(rig: Rig) -> None:
    """What follows a subscribe on its heels must not overtake it."""
    _, sid = rig.session()
    phone: Phone = rig.stream()
    phone.send("subscribe", sessionId=sid, requestId="s")
    phone.send("prompt", sessionId=sid, requestId="p", clientTurnId="t", message="!say at once")
    phone.result("subscribe", "s")
    assert phone.result("prompt", "p")["success"] is True
    phone.wait("agent_end")
    assert Chat(rig, phone, "", sid).answer_of() == "at once"
