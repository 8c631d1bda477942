"""Connections that are half closed, silent, or cut into crumbs harm nobody else."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time

from websockets.sync.client import connect

from tests.abuse.test_http import dial, head, raise_limit
from tests.wire.rig import Rig, bash, rig_with


def half_closed(rig, sid):
    """A phone that stopped reading, then half-closed its connection."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", rig.server.port))
    ws = connect(
        rig.server.base_url.replace("http", "ws") + "/stream",
        sock=sock,
        max_queue=1,
        compression=None,
        additional_headers={"Authorization": "Bearer " + rig.phone().token},
        proxy=None,
    )
    ws.recv()
    ws.send(json.dumps({"type": "subscribe", "sessionId": sid, "requestId": "s"}))
    while json.loads(ws.recv())["type"] != "command_result":
        pass
    return ws


def fill(chat):
    for _ in range(4):
        chat.play("!stream 1500 500 0", 60)


def test_a_half_closed_phone_costs_the_others_nothing(rig: Rig):
    chat = rig.chat()
    phones = [rig.join(chat.wid, chat.sid).phone for _ in range(6)]
    ws = half_closed(rig, chat.sid)
    fill(chat)
    ws.socket.shutdown(socket.SHUT_WR)
    for phone in phones:
        phone.mark()
    chat.play("!say to all\n" + bash("echo hi"))
    for phone in phones:
        phone.wait("agent_end")
        assert phone.text() == "to alldone"
    ws.socket.close()


def test_a_half_closed_phone_does_not_spoil_the_end(tmp_path):
    with rig_with(tmp_path) as rig:
        chat = rig.chat()
        ws = half_closed(rig, chat.sid)
        fill(chat)
        ws.socket.shutdown(socket.SHUT_WR)
        chat.play("!say more")
        rig.phones.clear()
        rig.made.clear()
        rig.server.stop()


def test_revoking_reaches_everyone_beside_a_half_closed_phone(tmp_path):
    with rig_with(tmp_path) as rig:
        chat = rig.chat()
        ws = half_closed(rig, chat.sid)
        others = [rig.stream() for _ in range(6)]
        fill(chat)
        ws.socket.shutdown(socket.SHUT_WR)
        rig.server.cli("token", "rotate")
        for phone in others:
            phone.wait_closed(4)
        ws.socket.close()
        rig.phones.clear()
        rig.made.clear()


def test_head_sends_no_body(rig: Rig):
    with dial(rig) as sock:
        sock.sendall(head(rig, "HEAD /health HTTP/1.1") + head(rig, "GET /me HTTP/1.1"))
        reader = sock.makefile("rb")
        assert reader.readline().startswith(b"HTTP/1.1 200")
        while reader.readline() != b"\r\n":
            pass
        assert reader.readline().startswith(b"HTTP/1.1 200"), "a body follows"


def test_six_hundred_idle_strangers_lock_nobody_out(rig: Rig):
    raise_limit(1500)
    with contextlib.ExitStack() as stack:
        for _ in range(600):
            with contextlib.suppress(ConnectionError):
                stack.enter_context(dial(rig))
        assert rig.phone().raw("GET", "/me").status == 200


def test_a_message_in_tiny_frames_delays_nobody(rig: Rig):
    rig.chat()
    attacker = rig.phone().connect_raw("/stream", compression=None)
    attacker.recv()
    from tests.abuse.test_frames import frame

    data = frame(1, b" " * 16, fin=False) + frame(0, b" " * 16, fin=False) * 400_000
    sender = threading.Thread(
        target=lambda: contextlib.suppress(OSError).__enter__() or attacker.socket.sendall(data), daemon=True
    )
    sender.start()
    slowest, began = 0.0, time.monotonic()
    while sender.is_alive():
        begin = time.monotonic()
        assert rig.phone().me()
        slowest = max(slowest, time.monotonic() - begin)
    attacker.socket.close()
    assert slowest < max(1, (time.monotonic() - began) / 4), slowest  # and not as long as all of it takes a busy machine


def test_a_mac_lets_a_process_have_256_files_at_first(tmp_path):
    from tests.support.server import default_program

    program = ["sh", "-c", 'ulimit -Sn 256; exec "$0" "$@"', *default_program()]
    with rig_with(tmp_path, program=program) as rig:
        chat = rig.chat()
        socks = [socket.create_connection(("127.0.0.1", rig.server.port)) for _ in range(300)]
        chat.play("!say hi")
        rig.phone().call("GET", "/me")  # by now it has taken all of them
        chat.play("!say hi")
        other = rig.chat()
        other.play("!say hi")
        for s in socks:
            s.close()
