"""What the benchmarks share: figures, CPU and memory of a process, and a socket client that costs next to nothing."""

from __future__ import annotations

import array
import base64
import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.phone import Phone
from tests.support.server import ROOT, Server

PROBE = Path(__file__).with_name("probe.py")
MSS = 1400  # bytes: what a packet holds on the way to a phone; loopback's 64 KiB would let the kernel hide a stall
RECEIVE_BUFFER = 64 * 1024
HEADER = "| figure | measured | limit | original | |\n|---|---:|---:|---:|---|"


@dataclass(frozen=True)
class Figure:
    """One row: `limit` and `original` (the server this one replaces) in the same unit, None if there is none."""

    name: str
    value: float
    unit: str
    limit: float | None = None
    original: float | None = None

    def __str__(self) -> str:
        cells = [self._cell(number) for number in (self.value, self.limit, self.original)]
        missed = self.limit is not None and self.value > self.limit
        return f"| {self.name} | {' | '.join(cells)} | {'missed' if missed else ''} |"

    def _cell(self, number: float | None) -> str:
        if number is None:
            return "–"
        digits = 0 if number >= 100 else 1 if number >= 10 else 2
        return f"{number:.{digits}f} {self.unit}".rstrip()


def cpu_seconds(pid: int) -> float:
    """CPU time a running process has used, all its threads, without its children."""
    if sys.platform == "linux":
        return time.clock_gettime((~pid << 3) | 2)  # what clock_getcpuclockid(3) makes of a process id
    text = subprocess.run(["ps", "-o", "cputime=", "-p", str(pid)], capture_output=True, text=True, check=True).stdout
    minutes, seconds = text.strip().rsplit(":", 1)
    hours, _, minutes = minutes.rpartition(":")
    return int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds)


def memory_mb(pid: int) -> float:
    """Resident memory of a process in MB."""
    text = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True).stdout
    return int(text) * 1024 / 1e6


def peak_memory_mb(pid: int) -> float:
    """The most resident memory a process has had, in MB; where the system does not keep that, what it has now."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        found = None
    return int(found.group(1)) * 1024 / 1e6 if found else memory_mb(pid)


def child_cpu(command: Sequence[str], env: dict[str, str], cwd: Path) -> float:
    """CPU time in seconds of a command that has to end with 0."""
    process = subprocess.Popen(
        command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    complaint = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command}: exit {process.returncode}: {complaint.decode()}")
    return usage.ru_utime + usage.ru_stime


@contextlib.contextmanager
def programs() -> Iterator[list[tuple[str, list[str]]]]:
    """(name, command) of the file as it is and of the archive, whose copy is unpacked at its first start."""
    with tempfile.TemporaryDirectory() as folder:
        archive, file = Path(folder) / "oppi.pyz", ROOT / "oppi.py"
        subprocess.run([sys.executable, "build_zipapp.py", "-o", str(archive)], cwd=ROOT, check=True, capture_output=True)
        yield [("`oppi.py`", [sys.executable, str(file)]), ("archive", [sys.executable, str(archive)])]


def bench_server(**options: Any) -> Server:
    """A server like a person's: Python may keep the bytecode it compiled."""
    server = Server(**options)
    del server.env["PYTHONDONTWRITEBYTECODE"]
    return server


@contextlib.contextmanager
def probed_server(**options: Any) -> Iterator[tuple[Server, Lag]]:
    """A running server with a clock in its loop, and what that clock says."""
    with bench_server(start=False, **options) as server:
        report = server.folder / "lag"
        server.program = [sys.executable, "-X", f"pycache_prefix={server.folder}/pycache", str(PROBE), str(report)]
        server.cli("version")  # compiles oppi.py, so that the syntax tree does not count as the server's memory
        server.start()
        yield server, Lag(report)


class Lag:
    """How late a timer of 1 ms was in the loop of a server, as its probe reports it.

    The system wakes a process up to a millisecond late, so the loop of a server that does nothing lags by up to 1 ms.
    On a machine with other things to do it lags more; the CPU that the server itself used meanwhile does not grow.
    """

    def __init__(self, report: Path) -> None:
        self.report = report

    def between(self, begin: float, end: float, timeout: float = 10.0) -> Lags:
        """What was between two times of time.monotonic(); waits until the probe has reported it."""
        deadline = time.monotonic() + timeout
        while True:
            found, data = array.array("d"), self.report.read_bytes()
            found.frombytes(data[: len(data) // 24 * 24])
            if found and found[-3] >= end:
                rows = [row for row in zip(found[::3], found[1::3], found[2::3]) if begin <= row[0] <= end]
                return Lags([late * 1000 for _, late, _ in rows], [used * 1000 for _, _, used in rows])
            if time.monotonic() > deadline:
                raise RuntimeError("the probe of the loop does not report")
            time.sleep(0.05)


class Lags(NamedTuple):
    """ms, of each timer of the probe: how late it was, and what CPU the server had used since the timer before."""

    late: list[float]
    used: list[float]


def percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def open_session(phone: Phone, server: Server, **fields: Any) -> tuple[str, str]:
    """(workspace id, session id) of a new session in the server's one workspace."""
    found = phone.workspaces()
    workspace = found[0] if found else phone.create_workspace(hostMount=str(server.workspace), policyPreset="host")
    return workspace["id"], phone.create_session(workspace["id"], model="mock/mock-1", **fields)["id"]


class Wire:
    """A bare `/stream` client: blocking reads in one thread, nothing decoded that is not asked for.

    A full phone would spend more on each frame than the server does, and its waiting would be measured as the
    server's.  `frames` holds (time.monotonic_ns() of arrival, text).  With `narrow` the connection is as a phone's:
    packets and buffers are small, and the server soon notices that nothing is read.
    """

    def __init__(self, port: int, token: str, *, narrow: bool = False) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(30)
        if narrow:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, MSS)
        self.socket.connect(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        key = base64.b64encode(os.urandom(16)).decode()
        lines = ["GET /stream HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {token}", "Upgrade: websocket"]
        lines += ["Connection: Upgrade", "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {key}", "", ""]
        self.socket.sendall("\r\n".join(lines).encode())
        self.buffer = bytearray()
        while b"\r\n\r\n" not in self.buffer:
            self.buffer += self.socket.recv(65536)
        head, _, rest = bytes(self.buffer).partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101"):
            raise RuntimeError(head.decode())
        self.buffer = bytearray(rest)
        self.socket.settimeout(None)
        self.frames: list[tuple[int, bytes]] = []
        self.news = threading.Condition()
        self.closed = False
        self.reading = threading.Event()  # cleared: nothing more is read, as by a phone in a tunnel
        self.reading.set()
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, **message: Any) -> None:
        self._send(0x81, json.dumps(message).encode())

    def _send(self, first: int, data: bytes) -> None:
        size = len(data)
        head = bytes([first, 0x80 | size]) if size < 126 else bytes([first, 0xFE]) + size.to_bytes(2, "big")
        with contextlib.suppress(OSError):  # whoever waits for an answer is told that the socket is closed
            self.socket.sendall(head + bytes(4) + data)  # a mask of zeros

    def _read(self) -> None:
        try:
            self._frames()
        finally:
            with self.news:
                self.closed = True
                self.news.notify_all()

    def _frames(self) -> None:
        buffer = self.buffer
        while True:
            now, position, found = time.monotonic_ns(), 0, []
            while True:
                end, start = self._frame(position)
                if not end:
                    break
                if buffer[position] & 0x0F == 1:
                    found.append((now, bytes(buffer[start:end])))
                elif buffer[position] & 0x0F == 9:  # a phone that does not answer pings is taken for gone
                    self._send(0x8A, bytes(buffer[start:end]))
                position = end
            del buffer[:position]
            if found:
                with self.news:
                    self.frames += found
                    self.news.notify_all()
            self.reading.wait()
            try:
                data = self.socket.recv(1 << 20)
            except OSError:
                return
            if not data:
                return
            buffer += data

    def _frame(self, position: int) -> tuple[int, int]:
        """(end, start of the payload) of the frame at `position`; (0, 0) if it is not complete."""
        left = len(self.buffer) - position
        if left < 2:
            return 0, 0
        size, extra = self.buffer[position + 1] & 0x7F, 0
        extra = {126: 2, 127: 8}.get(size, 0)
        start = position + 2 + extra
        if extra:
            size = int.from_bytes(self.buffer[position + 2 : start], "big")
        return (start + size, start) if left >= 2 + extra + size else (0, 0)

    def wait(self, pattern: str, timeout: float = 60.0, *, count: int = 1, since: int = 0) -> None:
        """Wait until `count` frames match a regular expression."""
        wanted, seen, position = re.compile(pattern.encode()), 0, since
        deadline = time.monotonic() + timeout
        with self.news:
            while True:
                for _, text in self.frames[position:]:
                    seen += bool(wanted.search(text))
                position = len(self.frames)
                if seen >= count:
                    return
                if self.closed:
                    raise RuntimeError(f"socket closed after {seen} of {count} frames with {pattern!r}")
                if not self.news.wait(max(0.0, deadline - time.monotonic())):
                    raise RuntimeError(f"{seen} of {count} frames with {pattern!r}; last: {self.frames[-3:]!r:.2000}")

    def subscribe(self, sid: str) -> None:
        self.send(type="subscribe", sessionId=sid, level="full", requestId=f"sub-{sid}")
        self.wait(rf'"requestId":\s*"sub-{sid}"')

    def prompt(self, sid: str, text: str) -> None:
        self.send(type="prompt", sessionId=sid, message=text, requestId=os.urandom(4).hex())

    def close(self) -> None:
        self.reading.set()
        with contextlib.suppress(OSError):  # the server may have been first
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
