"""What is large is cut, refused in words, or waited for; it never breaks a phone."""

from __future__ import annotations

import http.client

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
