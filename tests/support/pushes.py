"""Stand-ins for the other side of push notifications: Apple's service over HTTP/2 and TLS, and a webhook such as ntfy.

Both are as strict as what they stand for: a request that they would refuse is remembered in `wrong`, and every test
asserts that there is none.  `answers` is what comes next, status by status; then it is 200.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import re
import socket
import ssl
import threading
from collections import deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived, StreamEnded

HANG = 0  # among the answers: none at all
TOPIC = "dev.example.app"


class Told:
    """One request that arrived: `headers` in lower case, and `body`, decoded if it is JSON."""

    def __init__(self, path: str, headers: dict[str, str], body: bytes) -> None:
        self.path, self.headers = path, headers
        self.text = body.decode("utf-8")
        self.body: Any = None
        with contextlib.suppress(ValueError):
            self.body = json.loads(self.text)


class Receiver:
    """What both stand-ins share: what arrived, what comes next, and waiting for it."""

    def __init__(self) -> None:
        self.told: list[Told] = []
        self.wrong: list[str] = []
        self.answers: deque[tuple[int, str]] = deque()
        self.released = threading.Event()  # lets go of requests that hang
        self._changed = threading.Condition()

    def add(self, told: Told) -> tuple[int, str]:
        with self._changed:
            self.told.append(told)
            self._changed.notify_all()
            return self.answers.popleft() if self.answers else (200, "")

    def wait(self, count: int = 1, timeout: float = 20.0) -> list[Told]:
        """The first `count` requests, as soon as they are there."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.told) >= count, timeout), f"{len(self.told)} of {count} arrived"
            return self.told[:count]


class Apple(Receiver):
    """Apple's push service.  `folder` gets the key pair for signing and the certificate that its clients have to trust."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.key_path, self.ca_path = folder / "AuthKey.p8", folder / "apns-ca.pem"
        options = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        self.key_path.write_bytes(self.key.private_bytes(*options))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._certificate(folder))
        context.set_alpn_protocols(["h2"])
        self.listener = context.wrap_socket(socket.create_server(("127.0.0.1", 0)), server_side=True)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _certificate(self, folder: Path) -> Path:
        key, name = (
            ec.generate_private_key(ec.SECP256R1()),
            x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")]),
        )
        now = datetime.datetime.now(datetime.timezone.utc)
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        builder = builder.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
        builder = builder.add_extension(x509.BasicConstraints(True, None), True)
        certificate = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        options = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        self.ca_path.write_bytes(certificate)
        (folder / "apns-server.pem").write_bytes(certificate + key.private_bytes(*options))
        return folder / "apns-server.pem"

    def config(self, **more: Any) -> str:
        """An apns.json for this service."""
        given = {"keyPath": str(self.key_path), "keyId": "KEY1234567", "teamId": "TEAM123456", "bundleId": TOPIC}
        return json.dumps({**given, "host": f"https://localhost:{self.port}", "caFile": str(self.ca_path), **more})

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except ssl.SSLError:
                continue  # a client that does not trust the certificate
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: ssl.SSLSocket) -> None:
        if connection.selected_alpn_protocol() != "h2":
            self.wrong.append("not HTTP/2")
        protocol = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        protocol.initiate_connection()
        requests: dict[int, tuple[dict[str, str], bytearray]] = {}
        with connection, contextlib.suppress(OSError):
            connection.sendall(protocol.data_to_send())
            while data := connection.recv(65536):
                for event in protocol.receive_data(data):
                    if isinstance(event, RequestReceived):
                        requests[event.stream_id] = (dict(event.headers), bytearray())
                    elif isinstance(event, DataReceived):
                        requests[event.stream_id][1].extend(event.data)
                        protocol.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    elif isinstance(event, StreamEnded):
                        self._answer(protocol, event.stream_id, *requests[event.stream_id])
                connection.sendall(protocol.data_to_send())

    def _answer(self, protocol: H2Connection, stream: int, headers: dict[str, str], body: bytearray) -> None:
        told = Told(headers[":path"], headers, bytes(body))
        self._check(told)
        status, reason = self.add(told)
        if status == HANG:
            self.released.wait(60)
            return
        text = json.dumps({"reason": reason}).encode() if reason else b""
        protocol.send_headers(stream, [(":status", str(status))], end_stream=not text)
        if text:
            protocol.send_data(stream, text, end_stream=True)

    def _check(self, told: Told) -> None:
        """What Apple requires of a request (skills-push C3, C4)."""
        headers, activity = told.headers, told.headers.get("apns-push-type") == "liveactivity"
        rules = {
            "method": headers[":method"] == "POST" and headers[":scheme"] == "https",
            "path": re.fullmatch("/3/device/[0-9a-f]{32,200}", told.path),
            "push type": headers.get("apns-push-type") in ("alert", "liveactivity"),
            "topic": headers.get("apns-topic") == (TOPIC + ".push-type.liveactivity" if activity else TOPIC),
            "priority": headers.get("apns-priority") in ("5", "10"),
            "expiration": re.fullmatch(r"\d{10}", headers.get("apns-expiration", "1" * 10)),
            "collapse id": len(headers.get("apns-collapse-id", "").encode()) <= 64,
            "size": len(told.text.encode()) <= 4096,
            "body": isinstance(told.body, dict) and isinstance(told.body.get("aps"), dict) and "null" not in told.text,
            "token": self._signed(headers.get("authorization", "")),
        }
        self.wrong += [f"{name}: {headers} {told.text}" for name, good in rules.items() if not good]

    def _signed(self, authorization: str) -> bool:
        """Whether the bearer token is what Apple accepts: ES256 over header and claims, at most an hour old."""
        kind, _, token = authorization.partition(" ")
        parts = [base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)) for part in token.split(".")]
        if kind != "bearer" or len(parts) != 3 or len(parts[2]) != 64 or "=" in token:
            return False
        numbers = (int.from_bytes(parts[2][at : at + 32], "big") for at in (0, 32))
        text = token.rpartition(".")[0].encode()
        self.key.public_key().verify(encode_dss_signature(*numbers), text, ec.ECDSA(hashes.SHA256()))
        header, claims = json.loads(parts[0]), json.loads(parts[1])
        age = datetime.datetime.now().timestamp() - claims["iat"]
        return header == {"alg": "ES256", "kid": "KEY1234567"} and claims["iss"] == "TEAM123456" and -5 <= age < 3600

    def close(self) -> None:
        self.released.set()
        self.listener.close()


class Webhook(Receiver):
    """A server such as ntfy at `url`."""

    def __init__(self) -> None:
        super().__init__()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                told = Told(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
                if not told.headers.get("title") or told.headers.get("priority") not in "12345" or not told.text:
                    receiver.wrong.append(f"{told.headers} {told.text}")
                status, text = receiver.add(told)
                if status == HANG:
                    receiver.released.wait(60)
                    return
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/my-topic"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


@contextlib.contextmanager
def receiving(receiver: Any) -> Iterator[Any]:
    """The stand-in while a test runs; whatever it found wrong fails the test."""
    try:
        yield receiver
        assert receiver.wrong == []
    finally:
        receiver.close()
