"""From the write of a delta in pi to its frame at the phone: alone, and beside what could hold up the loop.

Each delta of the scripted pi begins with the clock at its write.  Deltas that share a frame count one by one.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Callable

from tests.support.phone import Phone
from tests.support.server import Server

from .common import Figure, Wire, bench_server, open_session, percentile

SESSIONS, RATE, SECONDS, SIZE = 5, 100, 8, 24
BIG = 20_000_000  # bytes of the session file that is opened meanwhile
LIMITS = {"maxSessionsPerWorkspace": 20, "maxSessionsGlobal": 40}
FETCH = """
import sys, urllib.request
request = urllib.request.Request(sys.argv[1], headers={"Authorization": "Bearer " + sys.argv[2]})
print(len(urllib.request.urlopen(request, timeout=60).read()))
"""

Disturb = Callable[[Server, Phone, Wire], None]


def slow_models(server: Server) -> None:
    """Let `--list-models` burn a second of CPU before it answers, as the real one does."""
    script = server.pi.read_text()
    burn = 'case " $* " in *" --list-models "*) i=0; while [ $i -lt 400000 ]; do i=$((i+1)); done;; esac\nexec '
    server.pi.write_text(script.replace("exec ", burn, 1))


def list_models(server: Server, phone: Phone, wire: Wire) -> None:
    phone.models()


def big_session(server: Server, phone: Phone) -> tuple[str, str]:
    """A stopped session with a file of BIG bytes."""
    wid, sid = open_session(phone, server)
    phone.resume(wid, sid)
    wire = Wire(server.port, phone.token)
    wire.subscribe(sid)
    wire.prompt(sid, "!say hello")
    wire.wait('"agent_end"')
    wire.close()
    phone.stop(wid, sid)
    path = next((server.data / "pi" / sid).glob("*.jsonl"))
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    user, answer = (next(x for x in lines if x.get("message", {}).get("role") == role) for role in ("user", "assistant"))
    answer["message"]["content"] = [{"type": "text", "text": "a line of text, as a model writes it\n" * 100}]
    parent, size, number = lines[-1]["id"], 0, 0
    with path.open("a", encoding="utf-8") as file:
        while size < BIG:
            entry = dict(user if number % 2 == 0 else answer, id=f"{number:08x}", parentId=parent)
            parent, number = entry["id"], number + 1
            size += file.write(json.dumps(entry, separators=(",", ":")) + "\n")
    return wid, sid


def run(server: Server, phone: Phone, disturb: Disturb | None) -> list[float]:
    """Latencies in ms of SESSIONS streams at RATE, with something else going on after a second of them."""
    wire = Wire(server.port, phone.token)
    sessions = [open_session(phone, server)[1] for _ in range(SESSIONS)]
    for sid in sessions:
        wire.subscribe(sid)
    begin, count = len(wire.frames), RATE * SECONDS
    for sid in sessions:
        wire.prompt(sid, f"!timestamp\n!stream {count} {SIZE} {RATE}")
    wire.wait(r'"type":\s*"text_delta"', count=SESSIONS * RATE, since=begin)  # all of them run
    start = len(wire.frames)
    if disturb:
        disturb(server, phone, wire)
    wire.wait(r'"type":\s*"agent_end"', SECONDS + 60, count=SESSIONS, since=begin)
    wanted = re.compile('"sessionId":\\s*"(?:' + "|".join(map(re.escape, sessions)) + ')"')
    found = []
    for when, data in wire.frames[start:]:
        text = data.decode()
        if '"text_delta"' in text and wanted.search(text):
            found += [(when - int(stamp)) / 1e6 for stamp in re.findall(r"(\d{10,}) ", json.loads(text)["delta"])]
    wire.close()
    for workspace in phone.workspaces():
        for session in phone.sessions(workspace["id"]):
            phone.stop(workspace["id"], session["id"])
    return found


def fast_stream(server: Server, phone: Phone, wire: Wire) -> None:
    """One more session, which says as much as it can until the others are done."""
    _, sid = open_session(phone, server)
    wire.subscribe(sid)
    wire.prompt(sid, "!stream 40000 4 0")


def open_big(wid: str, sid: str) -> Disturb:
    def disturb(server: Server, phone: Phone, wire: Wire) -> None:
        url = f"{server.base_url}/workspaces/{wid}/sessions/{sid}?view=full"
        for _ in range(3):
            done = subprocess.run([sys.executable, "-c", FETCH, url, phone.token], capture_output=True, text=True, check=True)
            assert int(done.stdout) > BIG / 2, done.stdout

    return disturb


def rows(name: str, found: list[float], p50: tuple[float | None, ...], p99: tuple[float | None, ...]) -> Iterator[Figure]:
    yield Figure(f"latency p50, {name}", percentile(found, 50), "ms", *p50)
    yield Figure(f"latency p99, {name}", percentile(found, 99), "ms", *p99)
    yield Figure(f"latency max, {name}", max(found), "ms")


def figures() -> Iterator[Figure]:
    plain = f"{SESSIONS} sessions × {RATE} deltas/s"
    for dialect in ("0.87", "0.73"):
        with bench_server(dialect=dialect, config=LIMITS) as server:
            phone = server.pair("1.1")
            if dialect == "0.87":
                yield from rows(plain, run(server, phone, None), (0.3, 0.3), (1.5, 1.3))
            yield from rows(f"beside a fast stream of pi {dialect}", run(server, phone, fast_stream), (), (5, 14))
    with bench_server(config=LIMITS, start=False) as server:
        slow_models(server)
        server.start()
        yield from rows("while models are listed", run(server, server.pair("1.1"), list_models), (), (5, 870))
    with bench_server(config=LIMITS) as server:
        phone = server.pair("1.1")
        disturb = open_big(*big_session(server, phone))
        yield from rows("while a session of 20 MB is opened", run(server, phone, disturb), (), (None, 193))
