"""Malformed, oversized and too many frames on both sockets, and phones that do not read."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection

from tests.support.phone import RESULT_TYPE
from tests.wire.rig import Chat, Rig

MIB = 1 << 20
BOTH_APPS = pytest.mark.parametrize("generation", ["1.0", "1.1"])


@contextlib.contextmanager
def bare(rig: Rig, generation: str = "1.1") -> Iterator[ClientConnection]:
    """A socket to speak nonsense on, its first frame read."""
    path = "/stream"
    if generation == "1.0":
        path = "/workspaces/{}/sessions/{}/stream".format(*rig.session())
    connection = rig.phone(generation).connect_raw(path, compression=None)
    try:
        assert json.loads(connection.recv(timeout=10))["type"] in ("stream_connected", "connected")
        yield connection
    finally:
        with contextlib.suppress(OSError):
            connection.socket.close()


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, masked: bool = True, rsv: int = 0) -> bytes:
    """One WebSocket frame of up to 64 KiB."""
    size = bytes([len(payload)]) if len(payload) < 126 else b"\x7e" + struct.pack(">H", len(payload))
    first = bytes([opcode | fin << 7 | rsv << 4])
    return first + bytes([size[0] | masked << 7]) + size[1:] + (b"\0\0\0\0" if masked else b"") + payload


def closing(connection: ClientConnection) -> int:
    """The code with which the server closes; whatever it says before does not matter."""
    with pytest.raises(ConnectionClosed) as caught:
        while True:
            connection.recv(timeout=15)
    return caught.value.rcvd.code if caught.value.rcvd else 1006


def errors(connection: ClientConnection) -> str:
    """The next error the server reports."""
    while True:
        message = json.loads(connection.recv(timeout=15))
        if message["type"] == "error":
            return str(message["error"])


@BOTH_APPS
class TestFrames:
    def test_binary(self, rig: Rig, generation: str) -> None:
        with bare(rig, generation) as connection:
            connection.send(b'{"type":"get_state"}')
            assert closing(connection) == 1003

    def test_too_large(self, rig: Rig, generation: str) -> None:
        with bare(rig, generation) as connection:
            with contextlib.suppress(ConnectionClosed):
                connection.send("x" * 17 * MIB)
            assert closing(connection) == 1009

    def test_too_large_in_pieces(self, rig: Rig, generation: str) -> None:
        with bare(rig, generation) as connection:
            with contextlib.suppress(ConnectionClosed):
                connection.send("x" * MIB for _ in range(17))
            assert closing(connection) == 1009

    @pytest.mark.parametrize(
        "data",
        [
            frame(1, b"{}", masked=False), frame(3, b"x"), frame(11, b"x"), frame(1, b"{}", rsv=4), frame(0, b"{}"),
            frame(9, b"x" * 200), frame(9, b"x", fin=False), frame(1, b"a", fin=False) + frame(1, b"b"), frame(8, b"x"),
        ],
    )  # fmt: skip
    def test_what_the_protocol_forbids(self, rig: Rig, generation: str, data: bytes) -> None:
        with bare(rig, generation) as connection:
            connection.socket.sendall(data)
            assert closing(connection) == 1002

    def test_text_that_is_not_utf8(self, rig: Rig, generation: str) -> None:
        with bare(rig, generation) as connection:
            connection.socket.sendall(frame(1, b'{"type":"\xff\xfe"}'))
            try:
                assert errors(connection) == "Invalid JSON payload"
            except ConnectionClosed as error:
                assert error.rcvd is not None and error.rcvd.code == 1007

    def test_a_message_in_many_frames(self, rig: Rig, generation: str) -> None:
        with bare(rig, generation) as connection:
            connection.send(iter('{"type":' + " " * 5000 + '"dance","sessionId":"nope1234"}'))
            assert errors(connection) in ("Session not found: nope1234", "Unsupported command type: dance")

    @pytest.mark.parametrize("depth", [1000, 100_000, 1_000_000])
    def test_bottomless_json(self, rig: Rig, generation: str, depth: int) -> None:
        with bare(rig, generation) as connection:
            for text in ("[" * depth, '{"type":' * depth, '{"type":"prompt","message":' + "[" * depth + "]" * depth + "}"):
                connection.send(text)
                assert errors(connection)

    def test_half_a_frame_and_gone(self, rig: Rig, generation: str) -> None:
        for size in range(1, 12):
            with bare(rig, generation) as connection:
                connection.socket.sendall(frame(1, b"x" * 1000)[:size])

    def test_messages_without_end(self, rig: Rig, generation: str) -> None:
        """Each of three hundred at once is answered, or the socket closed for it."""
        with bare(rig, generation) as connection:
            connection.socket.sendall(frame(1, b'{"type":"dance"}') * 300)
            found = 0
            try:
                while found < 300:
                    found += json.loads(connection.recv(timeout=15))["type"] == "error"
            except ConnectionClosed as error:
                assert error.rcvd is not None and error.rcvd.code == 1008


UPGRADE = "GET /stream HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n{}\r\n\r\n"


@pytest.mark.parametrize(
    "headers",
    [
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
        "Sec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 7",
    ],
)
def test_a_bad_handshake(rig: Rig, headers: str) -> None:
    with socket.create_connection(("127.0.0.1", rig.server.port), timeout=10) as sock:
        sock.sendall(UPGRADE.format(rig.phone().token, headers).encode())
        assert sock.recv(4096).startswith(b"HTTP/1.1 4")


# ---- fuzz ------------------------------------------------------------------------------------------------------------

TYPES = (
    "prompt steer follow_up stop abort get_state get_queue set_queue get_messages get_session_stats set_model cycle_model "
    "get_available_models set_thinking_level cycle_thinking_level new_session switch_session fork get_fork_messages "
    "set_session_name compact set_auto_compaction set_auto_retry set_steering_mode set_follow_up_mode abort_retry "
    "abort_bash get_commands permission_response extension_ui_response get_file_suggestions subscribe dance __class__"
).split()
FIELDS = (
    "message images streamingBehavior clientTurnId provider modelId model level name mode enabled entryId sessionPath id "
    "action scope expiresInMs value confirmed cancelled baseVersion steering followUp sinceSeq customInstructions query"
).split()
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1.5, 10**30, 1e308, "", "x", "all", "off", "allow", "full", "\ud800", "\x00\u202e", "x" * 5000),
    *([], {}, [None], [{}], {"a": {"b": []}}, [[[]]], [{"message": "m"}], [{"data": "x", "mimeType": "y"}], "../../etc/passwd"),
]


def test_five_hundred_random_messages_are_all_answered(rig: Rig) -> None:
    """Every message carries a requestId, so every one gets a frame with it, or the state it asked for."""
    chat = rig.chat()
    dice = random.Random(20260101)
    for number in range(500):
        body = {name: dice.choice(VALUES) for name in dice.sample(FIELDS, dice.randint(0, 8))}
        body.update(type=dice.choice(TYPES), requestId=f"fuzz-{number}", sessionId=chat.sid)
        if body["type"] == "subscribe":
            body["sessionId"] = dice.choice([chat.sid, "nope1234", "x" * 5000, "../x"])
        answered(chat, body)
    chat.phone.send("stop", sessionId=chat.sid)
    assert chat.phone.closed is None


def answered(chat: Chat, body: dict[str, Any]) -> None:
    start = len(chat.phone.frames)
    chat.phone.send_text(json.dumps(body))
    asks_state, key = body["type"] == "get_state", body["requestId"]
    chat.phone.wait(lambda f: f.get("requestId") == key or (asks_state and f["type"] == "state"), since=start)


@BOTH_APPS
def test_random_text_is_always_answered(rig: Rig, generation: str) -> None:
    dice = random.Random(7)
    valid = json.dumps({"type": "dance", "requestId": "r", "message": "x", "list": [1, 2, {"a": None}]})
    with bare(rig, generation) as connection:
        for _ in range(300):
            text = list(valid)
            for _ in range(dice.randint(1, 6)):
                text[dice.randrange(len(text))] = chr(dice.choice([*range(32, 127), 0, 9, 10, 0xE4, 0x202E, 0x1F600]))
            connection.send("".join(text))
            while True:
                message = json.loads(connection.recv(timeout=10))
                if message["type"] == "error" or message["type"] == RESULT_TYPE[generation]:
                    break


# ---- many and slow ---------------------------------------------------------------------------------------------------


ANSWER = 750_000  # bytes of an answer that is long, but not longer than a frame may be


class TestManyAndSlow:
    def test_a_phone_that_does_not_read_delays_no_other(self, rig: Rig) -> None:
        chat = rig.chat()
        stalled = rig.join(chat.wid, chat.sid).phone
        stalled.stall()
        begin = time.monotonic()
        chat.say("\n".join(["!stream 1500 500 0", '!tool read {"path":"a"}'] * 20))
        chat.phone.wait("agent_end", 60)
        assert len(chat.phone.text()) == 20 * ANSWER + len("done")
        assert time.monotonic() - begin < 30
        stalled.unstall()

    def test_a_stalled_phone_sees_it_all_when_it_reads_again(self, rig: Rig) -> None:
        chat = rig.chat()
        slow = rig.join(chat.wid, chat.sid).phone
        slow.stall()
        slow.mark()
        chat.play("\n".join(["!stream 1500 500 0", '!tool read {"path":"a"}'] * 4), 60)
        slow.unstall()
        slow.wait("agent_end", 30)
        assert slow.text() == chat.phone.text()

    def test_phones_that_come_and_go(self, rig: Rig) -> None:
        chat = rig.chat()
        chat.say("!slow 5\n!text 100000")
        for _ in range(30):
            phone = rig.stream()
            phone.subscribe(chat.sid)
            phone.drop()
        chat.phone.send("stop", sessionId=chat.sid)
        chat.settled()

    def test_fifty_phones_in_one_session(self, rig: Rig) -> None:
        chat = rig.chat()
        phones = [rig.join(chat.wid, chat.sid).phone for _ in range(50)]
        chat.play("!say to everyone")
        for phone in phones:
            phone.wait("agent_end")
            assert phone.text(0) == "to everyone"
