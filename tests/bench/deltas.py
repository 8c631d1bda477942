"""CPU of 40,000 deltas of one answer in the dialect of pi 0.73, whose lines grow with the answer (4.9 GB in all).

Three readers get the same bytes from the same scripted pi: one that only reads and discards, one that also looks for
the ends of lines, and the server with a phone subscribed.  The answer pauses after the first and before the last
1,000 deltas, so that their CPU can be told from that of the rest.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator

import oppi
from tests.support.server import Server

from .common import Figure, Wire, bench_server, cpu_seconds, median, open_session

DELTAS, EDGE, SIZE, RUNS = 40_000, 1_000, 3, 3
PAUSE = 400  # ms
PARTS = (EDGE, DELTAS - 2 * EDGE, EDGE)
PROMPT = "".join(f"!stream {part} {SIZE} 0\n!wait {PAUSE}\n" for part in PARTS) + "!say end"
BUFFER, PIPE, F_SETPIPE_SZ = 256 * 1024, 1024 * 1024, 1031


def apart(reader: int, writers: list[int]) -> None:
    """Give reader and writer a core each: whether they share one would decide what reading costs."""
    if sys.platform == "linux" and (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(reader, {1})
        for pid in writers:
            os.sched_setaffinity(pid, {0})


def read_alone(server: Server, *, lines: bool) -> list[float]:
    """CPU seconds of the three parts for a loop that reads and discards, or also looks for the ends of lines."""
    process = subprocess.Popen([str(server.pi), "--mode", "rpc"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=server.env)
    assert process.stdin is not None and process.stdout is not None
    descriptor, buffer = process.stdout.fileno(), bytearray(BUFFER)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, F_SETPIPE_SZ, PIPE)
    process.stdin.write(b'{"type":"get_state","id":"1"}\n')
    process.stdin.flush()
    while b'"id":"1"' not in buffer:
        os.readv(descriptor, [buffer])
    apart(0, [process.pid])
    process.stdin.write(json.dumps({"type": "prompt", "message": PROMPT}).encode() + b"\n")
    process.stdin.flush()
    samples, last = [time.thread_time()], time.monotonic()
    while len(samples) < 4:
        size = os.readv(descriptor, [buffer])
        now = time.monotonic()
        if now - last > PAUSE / 2000:
            samples.append(time.thread_time())
        last = now
        if lines:
            position = buffer.find(b"\n", 0, size)
            while position >= 0:
                position = buffer.find(b"\n", position + 1, size)
    process.kill()
    process.wait()
    return [after - before for before, after in zip(samples, samples[1:])]


def read_by_server(server: Server) -> list[float]:
    """CPU seconds of the three parts for the server, a phone being subscribed."""
    phone = server.pair("1.1")
    wire = Wire(server.port, phone.token)
    wid, sid = open_session(phone, server)
    wire.subscribe(sid)
    apart(server.pid, [pid for pid, _ in server.orphans()])
    samples, begin = [cpu_seconds(server.pid)], len(wire.frames)
    wire.prompt(sid, PROMPT)
    got = [0, begin]  # characters so far, frames looked at

    def received(count: int) -> bool:
        for _, data in wire.frames[got[1] :]:
            match = re.search(rb'"text_delta".*"delta":\s*"(x*)"', data) or re.search(rb'"delta":\s*"(x*)".*"text_delta"', data)
            got[0], got[1] = got[0] + len(match.group(1) if match else b""), got[1] + 1
        return got[0] >= count

    for count in (EDGE, DELTAS - EDGE, DELTAS):
        deadline = time.monotonic() + 120
        while not received(count * SIZE):
            with wire.news:
                if not wire.news.wait(deadline - time.monotonic()):
                    raise RuntimeError(f"{got[0] // SIZE} deltas arrived")
        samples.append(cpu_seconds(server.pid))
    wire.close()
    phone.stop(wid, sid)
    return [after - before for before, after in zip(samples, samples[1:])]


def by_reader(length: int) -> float:
    """µs per delta that the server's reader needs more than looking for the ends of lines, in an answer of this length.

    Both get the same bytes from memory, as much at a time as the server reads, because reading a pipe costs ten times
    as much as this and is never the same twice.
    """
    message = b'{"role":"assistant","content":[{"type":"text","text":"' + b"x" * length + b'"}],"provider":"mock"}'
    event = b'{"type":"message_update","assistantMessageEvent":{"type":"text_delta","contentIndex":0,"delta":"xxx","partial":'
    line = event + message + b'},"message":' + message + b"}\n"
    count = max(200, 4_000_000 // len(line))
    source, chunk = memoryview(line * count), bytearray(BUFFER)
    reader, costs, items = oppi.PiReader(), [0.0, 0.0], 0
    for _ in range(30):
        for way in (0, 1):
            position, begin = 0, time.process_time()
            while position < len(source):
                size = min(BUFFER if way == 0 or reader.skipping else oppi.READ_SIZE, len(source) - position)
                chunk[:size] = source[position : position + size]
                position += size
                if way == 1:
                    items += len(reader.feed(chunk, size))
                    continue
                found = chunk.find(b"\n", 0, size)
                while found >= 0:
                    found = chunk.find(b"\n", found + 1, size)
            costs[way] += time.process_time() - begin
    assert items == 30 * count
    return (costs[1] - costs[0]) / items * 1e6


def figures() -> Iterator[Figure]:
    with bench_server(dialect="0.73") as server:
        runs = [
            (read_alone(server, lines=False), read_alone(server, lines=True), read_by_server(server)) for _ in range(RUNS)
        ]
    drain, search, served = ([median(column) for column in zip(*samples)] for samples in zip(*runs))
    name = f"{DELTAS:,} deltas in one answer"
    yield Figure(f"CPU of {name}, read and discarded", sum(drain), "s")
    yield Figure(f"CPU of {name}, ends of lines looked for", sum(search), "s")
    yield Figure(f"CPU of {name}, server", sum(served), "s", None, 71)
    yield Figure("server to reading and discarding", sum(served) / sum(drain), "×", 1.5)
    first, last = served[0] / EDGE * 1e6, served[2] / EDGE * 1e6
    yield Figure(f"CPU per delta, first {EDGE:,}, all", first, "µs", None, 238)
    yield Figure(f"CPU per delta, last {EDGE:,}, all", last, "µs", None, 3042)
    # What the end costs apart from draining is a few µs beside 110 µs of draining, which vary by more than that.
    # Only the reader sees how long a line is, so its growth is measured by itself and added to what the start costs.
    start = (served[0] - search[0]) / EDGE * 1e6
    growth = by_reader((DELTAS - EDGE // 2) * SIZE) - by_reader(EDGE * SIZE // 2)
    yield Figure(f"CPU per delta, first {EDGE:,}, apart from draining", start, "µs")
    yield Figure(f"CPU per delta, last {EDGE:,}, apart from draining", start + growth, "µs", start * 1.2)
