"""What is large is cut, refused in words, or waited for; it never breaks a phone."""

from __future__ import annotations

import http.client
import time

from tests.bench.common import open_session, probed_server
from tests.bench.sessions import History
from tests.wire.rig import Rig


def test_a_large_paste_does_not_break_the_phones(rig: Rig):
    """stream 1: frames must stay below 1 MiB."""
    chat = rig.chat()
    chat.play("x" * 1_500_000)


def test_a_413_is_readable_by_who_sends_the_body_first(rig: Rig):
    connection = http.client.HTTPConnection("127.0.0.1", rig.server.port, timeout=20)
    connection.request("POST", "/workspaces", b" " * (30 << 20), {"Authorization": "Bearer " + rig.phone().token})
    assert connection.getresponse().status == 413


def test_a_question_too_large_to_show_is_refused_and_says_so(rig: Rig):
    chat = rig.chat(preset="host_standard")
    frames = chat.play('!tool write {"path": "/elsewhere/a", "content": "%s"}\n!say done' % ("x" * 1_200_000))
    assert "permission_request" not in [f["type"] for f in frames]
    assert "Too large to be shown" in chat.output()


def test_a_session_of_50_mb_holds_up_nobody_when_it_is_opened() -> None:
    """Neither its loop for 20 ms: what else this machine does can only make a timer later, so the best of some counts."""
    with probed_server() as (server, lag):
        phone = server.pair("1.1")
        wid, sid = open_session(phone, server)
        phone.open()
        phone.subscribe(sid)
        phone.prompt(sid, "!say a short answer")
        phone.wait("agent_end", 20)
        phone.stop(wid, sid)
        history = History(next((server.data / "pi" / sid).glob("*.jsonl")))
        history.fill(50_000_000)
        found: list[float] = []
        while len(found) < 8 and min(found, default=99) >= 20:
            begin = time.monotonic()
            answer = phone.raw("GET", f"/workspaces/{wid}/sessions/{sid}?view=full", timeout=120)
            end = time.monotonic()
            assert answer.status == 200 and len(answer.json()["trace"]) > 10_000
            lags = lag.between(begin, end)
            found.append(min(max(lags.late), max(lags.used)))
        assert min(found) < 20, found
        phone.drop()
