"""What sessions cost: many streams at once, long lists, long histories, coming back, stopping."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable

from tests.support.phone import Phone
from tests.support.server import Server

from .common import (
    Figure,
    Wire,
    bench_server,
    cpu_seconds,
    median,
    memory_mb,
    open_session,
    peak_memory_mb,
    percentile,
    probed_server,
)
from .follower import Follower

LIMITS = {"maxSessionsPerWorkspace": 20, "maxSessionsGlobal": 40}
END = '"type":"agent_end"'

# ---- many streams ----------------------------------------------------------------------------------------------------

SESSIONS, PHONES, DELTAS, SIZE = 5, 2, 10_000, 24
RATE = 500  # deltas/s of each session; slow enough that they do not share frames, which would save most of the CPU
BURST = 40_000


def streams() -> Iterator[Figure]:
    with bench_server(config=LIMITS) as server:
        phone = server.pair("1.1")
        places = [open_session(phone, server) for _ in range(SESSIONS)]
        wires = [Wire(server.port, phone.token) for _ in range(PHONES)]
        for wire in wires:
            for _, sid in places:
                wire.subscribe(sid)
        used = cpu_seconds(server.pid)
        for _, sid in places:
            wires[0].prompt(sid, f"!stream {DELTAS} {SIZE} {RATE}")
        for wire in wires:
            wire.wait(END, 120, count=SESSIONS)
        used = cpu_seconds(server.pid) - used
        name = f"{SESSIONS} sessions × {DELTAS:,} deltas at {RATE}/s, {PHONES} phones"
        yield Figure(f"CPU of {name}", used, "s", 3, 22)
        yield Figure("frames of text that a phone gets of it", text_frames(wires[0]), "")
        for wire in wires:
            wire.close()


def text_frames(wire: Wire) -> int:
    return sum(b'"text_delta"' in text for _, text in wire.frames)


def burst() -> Iterator[Figure]:
    """One message as fast as pi can write it."""
    with bench_server(config=LIMITS) as server:
        phone = server.pair("1.1")
        _, sid = open_session(phone, server)
        wires = [Wire(server.port, phone.token) for _ in range(PHONES)]
        for wire in wires:
            wire.subscribe(sid)
        used, begin = cpu_seconds(server.pid), time.monotonic()
        wires[0].prompt(sid, f"!stream {BURST} {SIZE // 2} 0")
        for wire in wires:
            wire.wait(END, 60)
        name = f"{BURST:,} deltas at once, {PHONES} phones"
        yield Figure(f"CPU of {name}", cpu_seconds(server.pid) - used, "s")
        yield Figure(f"time of {name}", time.monotonic() - begin, "s")
        yield Figure("frames of text that a phone gets of them", text_frames(wires[0]), "")
        for wire in wires:
            wire.close()


# ---- lists and histories ---------------------------------------------------------------------------------------------

LISTED, REQUESTS, ROUNDS = 200, 25, 4
BIG, HUGE = 20_000_000, 50_000_000  # bytes of a session file
OPENED = {BIG: 5, HUGE: 3}  # times; the best counts, because whatever else the machine does can only add to a lag
TIME = "2026-03-04T05:06:07.089Z"
WORDS = (Path(__file__).resolve().parents[2] / "README.md").read_text("utf-8").split()


def stored_session(number: int, wid: str) -> dict[str, Any]:
    """A session as it lies on the disk after some work."""
    record: dict[str, Any] = {"id": f"L{number:07}", "workspaceId": wid, "workspaceName": "Test", "status": "stopped"}
    record.update(name=f"Session about subject {number}", model="anthropic/claude-sonnet-4-0", thinkingLevel="medium")
    record.update(createdAt=1760000000000 + number, lastActivity=1760000009000 + number, messageCount=2 * number)
    record.update(tokens={"input": 1200, "output": 340, "cacheRead": 9000, "cacheWrite": 700}, cost=0.0123 * number)
    record.update(contextTokens=15400, contextWindow=200000, runtime="host", piSessionFile=f"/nowhere/{number}.jsonl")
    record.update(firstMessage="Please repair the tests. " * 8, lastMessage="Done: the tests pass. " * 4)
    files = [f"src/part{i}/module_{number}.py" for i in range(12)]
    stats = {"mutatingToolCalls": 30, "filesChanged": 12, "changedFiles": files, "addedLines": 900, "removedLines": 30}
    record.update(piSessionFiles=[record["piSessionFile"]], changeStats=stats)
    return {"session": record}


def listing() -> Iterator[Figure]:
    with bench_server(config=LIMITS) as server:
        phone = server.pair("1.1")
        wid = phone.create_workspace(hostMount=str(server.workspace), policyPreset="host")["id"]
        server.stop()
        folder = server.data / "sessions"
        for number in range(LISTED):
            record = stored_session(number, wid)
            (folder / f"{record['session']['id']}.json").write_text(json.dumps(record, indent=2), "utf-8")
        server.start()
        assert len(phone.sessions()) == LISTED
        for name, path in (("/sessions", "/sessions"), ("/workspaces/:wid/sessions", f"/workspaces/{wid}/sessions")):
            for encoding in ("gzip", "identity"):  # the apps take gzip
                used = min(request_cpu(server, phone, path, encoding) for _ in range(ROUNDS))
                yield Figure(f"CPU of `GET {name}`, {LISTED} sessions, {encoding}", used, "ms", 0.8, 7.9)


def request_cpu(server: Server, phone: Phone, path: str, encoding: str) -> float:
    """ms of the server's CPU for one request on a connection that is kept."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    used = cpu_seconds(server.pid)
    for _ in range(REQUESTS):
        connection.request("GET", path, headers={"Authorization": f"Bearer {phone.token}", "Accept-Encoding": encoding})
        answer = connection.getresponse()
        assert answer.status == 200 and len(answer.read()) > 1000
    connection.close()
    return (cpu_seconds(server.pid) - used) / REQUESTS * 1000


class History:
    """Writes a session file like that of a long day's work: questions, thinking, answers, tools and their output."""

    def __init__(self, path: Path) -> None:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        self.answer = next(line["message"] for line in lines if line.get("message", {}).get("role") == "assistant")
        self.random, self.parent, self.number = random.Random(1), lines[-1]["id"], 0
        self.file = path.open("a", encoding="utf-8")

    def add(self, message: dict[str, Any]) -> int:
        self.number += 1
        entry = {"type": "message", "id": f"{self.number:08x}", "parentId": self.parent, "timestamp": TIME}
        self.parent = entry["id"]
        line = json.dumps({**entry, "message": message}, separators=(",", ":"), ensure_ascii=False)
        return self.file.write(line + "\n")

    def text(self, least: int, most: int) -> str:
        """Words in lines, of a length that is seldom great."""
        size = int(least * (most / least) ** self.random.random() ** 2)
        words = self.random.choices(WORDS, k=size // 6 + 1)
        return "\n".join(" ".join(words[i : i + 12]) for i in range(0, len(words), 12))

    def call(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """A tool call's block and the message with its result."""
        self.number += 1
        name, path = self.random.choice(("bash", "read", "read", "edit", "write")), f"src/module_{self.number % 97}.py"
        arguments: dict[str, Any] = {"path": path}
        if name == "bash":
            arguments = {"command": self.text(20, 400)}
        elif name == "write":
            arguments["content"] = self.text(400, 9000)
        elif name == "edit":
            arguments["edits"] = [{"oldText": self.text(60, 900), "newText": self.text(60, 1200)}]
        output = self.text(200, 30000) if name in ("bash", "read") else f"Successfully changed {path}."
        block = {"type": "toolCall", "id": f"toolu_{self.number:024}", "name": name, "arguments": arguments}
        result: dict[str, Any] = {"role": "toolResult", "toolCallId": block["id"], "toolName": name}
        result["content"] = [{"type": "text", "text": output}]
        if name == "edit":
            result["details"] = {"diff": self.text(100, 2000), "firstChangedLine": 12}
        return block, {**result, "isError": False, "timestamp": 1795332816622}

    def turn(self) -> int:
        """Bytes of a question, its rounds of tools, and the answer."""
        question = [{"type": "text", "text": self.text(40, 1500)}]
        size = self.add({"role": "user", "content": question, "timestamp": 1795332816474})
        for _ in range(self.random.randint(1, 12)):
            calls = [self.call() for _ in range(self.random.choice((1, 1, 1, 2, 3)))]
            thinking = {"type": "thinking", "thinking": self.text(80, 3000), "thinkingSignature": "c2ln" * 100}
            text = [{"type": "text", "text": self.text(40, 400)}] if self.random.random() < 0.5 else []
            content = [thinking, *text, *(block for block, _ in calls)]
            size += self.add({**self.answer, "content": content, "stopReason": "toolUse"})
            size += sum(self.add(result) for _, result in calls)
        return size + self.add({**self.answer, "content": [{"type": "text", "text": self.text(200, 4000)}]})

    def fill(self, size: int) -> None:
        while size > 0:
            size -= self.turn()
        self.file.close()


def opening() -> Iterator[Figure]:
    for size, limits in ((BIG, (150, 458)), (HUGE, ())):
        with probed_server(config=LIMITS) as (server, lag):
            phone = server.pair("1.1")
            wid, sid = open_session(phone, server)
            with playing(server, phone, sid) as wire:
                ask(wire, sid, QUESTION)
            phone.stop(wid, sid)
            history = History(next((server.data / "pi" / sid).glob("*.jsonl")))
            history.fill(size)
            before, lags, times = memory_mb(server.pid), [], []
            for _ in range(OPENED[size]):
                begin = time.monotonic()
                answer = phone.raw("GET", f"/workspaces/{wid}/sessions/{sid}?view=full")
                times.append(time.monotonic() - begin)
                assert answer.status == 200 and len(answer.body) > size / 2
                lags.append(lag.between(begin, begin + times[-1]))
            name = f"a session of {size // 1_000_000} MB and {history.number:,} entries is opened"
            found = [min(max(found.late) for found in lags), min(percentile(found.late, 99) for found in lags)]
            yield Figure(f"loop lag max while {name}", found[0], "ms", 20, *([193] if size == BIG else []))
            yield Figure(f"loop lag p99 while {name}", found[1], "ms")
            busy = min(max(found.used) for found in lags)
            yield Figure("most CPU of the server between two timers of 1 ms meanwhile", busy, "ms", 20)
            yield Figure(f"time until {name}", median(times), "s")
            yield Figure("memory before", before, "MB")
            yield Figure(f"peak memory, opened {OPENED[size]} times", peak_memory_mb(server.pid), "MB", *limits)
            yield Figure("memory afterwards", memory_mb(server.pid), "MB")


# ---- long sessions ---------------------------------------------------------------------------------------------------

SHORT, LONG = 200, 1000  # messages
ASKED = 0.3  # of the messages are questions of a person and their answers, the others calls of tools and their results
MEASURED = 40  # questions to each session
QUESTION, ROUND = "!say a short answer", '!tool read {"path": "src/a.py"}\n!say next\n'


def growing() -> Iterator[Figure]:
    """Questions to a short and to a long session in turn, so that both are measured under the same conditions."""
    with bench_server(config=LIMITS) as server:
        phone = server.pair("1.1")
        sessions = {size: open_session(phone, server)[1] for size in (SHORT, LONG)}
        costs: dict[int, list[float]] = {SHORT: [], LONG: []}
        with playing(server, phone, *sessions.values()) as wire:
            for size, sid in sessions.items():
                ask(wire, sid, ROUND * int(size * (1 - ASKED) / 2))
                for _ in range(int(size * ASKED / 2)):
                    ask(wire, sid, QUESTION)
            for _ in range(MEASURED):
                for size, sid in sessions.items():
                    used = cpu_seconds(server.pid)
                    ask(wire, sid, QUESTION)
                    costs[size].append((cpu_seconds(server.pid) - used) * 1000)
        short, long = (median(costs[size]) / 2 for size in (SHORT, LONG))
        yield Figure(f"CPU per message, session of {SHORT} messages", short, "ms", 2.2, 2.2)
        yield Figure(f"CPU per message, session of {LONG:,} messages", long, "ms", short * 1.2, 11.9)
        begin = time.monotonic()
        server.stop(60)
        yield Figure("time to stop the server after them", time.monotonic() - begin, "s", 2)


def ask(wire: Wire, sid: str, text: str) -> None:
    """One turn."""
    position = len(wire.frames)
    wire.prompt(sid, text)
    wire.wait(END, 120, since=position)


@contextlib.contextmanager
def playing(server: Server, phone: Phone, *sessions: str) -> Iterator[Wire]:
    """A socket that is subscribed to these sessions."""
    wire = Wire(server.port, phone.token)
    for sid in sessions:
        wire.subscribe(sid)
    yield wire
    wire.close()


# ---- coming back -----------------------------------------------------------------------------------------------------

CALL = '!tool read {"path": "src/a.py"}\n'
TEXTS = (300, 1000)  # deltas of the answer during which a phone leaves, and of the one after the tools
LEAVES, BACK = 100, 362  # deltas seen before leaving, and of the second answer before coming back
TOOL_TIME = 4  # ms that a tool takes if the phone is to come back while they run
FEW, MANY = 20, 450  # tool calls meanwhile; the server keeps 500 durable events, of which a call takes two


def absences() -> Iterator[Figure]:
    """A phone leaves in the middle of an answer and comes back while tools run or in the middle of the next one."""
    with bench_server(config=LIMITS) as server:
        phones = [server.pair("1.1") for _ in range(2)]
        for calls, among_tools in ((FEW, False), (MANY, False), (MANY, True)):
            yield from absence(server, phones, calls, among_tools=among_tools)


def absence(server: Server, phones: Sequence[Phone], calls: int, *, among_tools: bool) -> Iterator[Figure]:
    wid, sid = open_session(phones[0], server)
    reader, traveller = (Follower(server, phone, wid, sid) for phone in phones)
    for follower in (reader, traveller):
        follower.connect()
    texts = [f"!timestamp\n!stream {count} {SIZE} {RATE}\n" for count in TEXTS]
    slowly = f"!toolwait {TOOL_TIME}\n" if among_tools else ""
    reader.wire.prompt(sid, texts[0] + slowly + CALL * calls + texts[1])
    traveller.until(lambda: traveller.written() >= LEAVES)
    traveller.leave()
    left = traveller.last_seen or 0
    reader.until(lambda: len(reader.chat.ended) >= (calls // 3 if among_tools else calls))
    if not among_tools:
        reader.until(lambda: reader.written() >= BACK)
    traveller.connect()
    events, way = (traveller.last_seen or 0) - left, "whole chat loaded" if traveller.reloaded else "events caught up"
    reader.apply()
    traveller.wire.wait("", since=len(traveller.wire.frames))  # what the reader has seen has come here, too
    traveller.apply()
    name = f"absence of {events} durable events until {'tools run' if among_tools else 'an answer is written'}, {way}"
    missing = len(reader.chat.stamps() - traveller.chat.stamps())
    yield Figure(f"deltas not shown right after an {name}", missing, "", 0, 362)
    for follower in (reader, traveller):
        follower.finish()
        follower.wire.close()
    yield Figure("deltas, answers, calls and outputs still not shown when the turn has ended", traveller.lost(), "", 0)
    yield Figure("the same for the phone that stayed", reader.lost() + reader.broken, "", 0)


# ---- stopping --------------------------------------------------------------------------------------------------------

STOPS = 7


def stopping() -> Iterator[Figure]:
    with bench_server(config=LIMITS) as server:
        phone = server.pair("1.1")
        times = []
        for _ in range(STOPS):
            wid, sid = open_session(phone, server)
            phone.resume(wid, sid)
            begin = time.monotonic()
            answer = phone.stop(wid, sid)
            times.append(time.monotonic() - begin)
            assert answer["session"]["status"] == "stopped"
        yield Figure("time to stop an idle session", median(times), "s", 0.2, 1.0)


PARTS: tuple[Callable[[], Iterator[Figure]], ...] = (streams, burst, listing, opening, growing, absences, stopping)


def figures() -> Iterator[Figure]:
    for part in PARTS:
        yield from part()
