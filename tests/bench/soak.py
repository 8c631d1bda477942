"""A minute of five streaming sessions, each with three phones: one reads, one reconnects every second, one has stopped
reading.

Measured is what the readers feel (latency, completeness), what the others may not cost (memory), and that all of them
end up with the same chat: the reconnecting phones by catching up as the app does, the stalled ones by reading at last,
or by catching up if the server has closed their sockets.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from tests.support.server import Server

from .common import Figure, Lag, cpu_seconds, memory_mb, open_session, percentile, probed_server
from .follower import STAMP, Follower

SESSIONS, RATE, SECONDS, SIZE = 5, 200, 60, 24
ROUND = 2  # s of text between two calls of a tool, as an agent works
SETTLED = 10  # s after which memory has to stay as it is
LIMITS = {"maxSessionsPerWorkspace": 20, "maxSessionsGlobal": 40}
STREAM = f"!timestamp\n!stream {RATE * ROUND} {SIZE} {RATE}\n"
PROMPT = (STREAM + '!tool bash {"command": "git status"}\n') * (SECONDS // ROUND) + "!say end"


class Soak:
    """The phones, and what was seen while the sessions ran."""

    def __init__(self, server: Server, lag: Lag) -> None:
        self.server, self.lag = server, lag
        phone = server.pair("1.1")
        places = [open_session(phone, server) for _ in range(SESSIONS)]
        self.readers, self.hoppers, self.stalled = (self._phones(places, narrow=kind == 2) for kind in range(3))
        self.memory: list[float] = []  # MB, one for every second from SETTLED on
        self.lags: Any = None  # the Lags of that minute
        self.cpu = 0.0

    def _phones(self, places: Sequence[tuple[str, str]], *, narrow: bool) -> list[Follower]:
        """One device with a socket in every session."""
        phone = self.server.pair("1.1")
        found = [Follower(self.server, phone, wid, sid, narrow=narrow) for wid, sid in places]
        for follower in found:
            follower.connect()
        return found

    def run(self) -> None:
        for follower in self.stalled:
            follower.wire.reading.clear()
        for follower in self.readers:
            follower.wire.prompt(follower.sid, PROMPT)
        begin, used = time.monotonic(), cpu_seconds(self.server.pid)
        for step in range(SECONDS * SESSIONS):  # every phone once a second, evenly spread
            time.sleep(max(0.0, begin + step / SESSIONS - time.monotonic()))
            self.hoppers[step % SESSIONS].leave()
            self.hoppers[step % SESSIONS].connect()
            if step % SESSIONS == 0 and step >= SETTLED * SESSIONS:
                self.memory.append(memory_mb(self.server.pid))
        self.memory.append(memory_mb(self.server.pid))
        self.cpu = cpu_seconds(self.server.pid) - used
        self.lags = self.lag.between(begin, time.monotonic())

    def finish(self) -> int:
        """Let every phone see the end; how many of the stalled ones had been cut off."""
        for follower in (*self.readers, *self.hoppers):
            follower.finish()
        closed = 0
        for follower in self.stalled:
            follower.wire.reading.set()
            try:
                follower.finish()
            except RuntimeError:
                closed += 1
                follower.leave()
                follower.connect()
        return closed

    def latencies(self) -> list[float]:
        """ms from the write in pi to the frame at a reading phone, of every delta."""
        found = []
        for follower in self.readers:
            for when, text in follower.wire.frames:
                if b'"text_delta"' in text:
                    found += [(when - int(stamp)) / 1e6 for stamp in STAMP.findall(text.decode())]
        return found


def figures() -> Iterator[Figure]:
    with probed_server(config=LIMITS) as (server, lag):
        soak = Soak(server, lag)
        soak.run()
        closed = soak.finish()
        found = soak.latencies()
        name = f"{SESSIONS} sessions × {RATE} deltas/s, 3 phones each"
        yield Figure(f"latency p50, {name}", percentile(found, 50), "ms")
        yield Figure(f"latency p99, {name}", percentile(found, 99), "ms", 10)
        yield Figure(f"latency max, {name}", max(found), "ms")
        for percent in (50, 99, 99.9):
            yield Figure(f"loop lag p{percent:g} meanwhile", percentile(soak.lags.late, percent), "ms")
        yield Figure("loop lag max meanwhile", max(soak.lags.late), "ms")
        yield Figure("most CPU of the server between two timers of 1 ms", max(soak.lags.used), "ms")
        yield Figure("server's CPU per second of it, its probe included", soak.cpu / SECONDS, "s")
        start = soak.memory[0]
        yield Figure(f"memory at second {SETTLED}", start, "MB")
        change = max(abs(now - start) for now in soak.memory)
        yield Figure(f"memory, largest change from second {SETTLED} to {SECONDS}", change, "MB", 5)
        lost = SESSIONS * RATE * SECONDS - len(found)
        yield Figure(f"deltas of {SESSIONS * RATE * SECONDS:,} that the reading phones lack", lost, "", 0)
        yield Figure("answers whose deltas are not the answer", sum(f.broken for f in soak.readers), "", 0)
        for kind, followers in (("reading", soak.readers), ("reconnecting", soak.hoppers), ("stalled", soak.stalled)):
            wrong = sum(follower.differs() for follower in followers)
            yield Figure(f"{kind} phones of {SESSIONS} that end up with another chat", wrong, "", 0)
        yield Figure("stalled phones that were cut off", closed, "")
        yield Figure("times a reconnecting phone had to load the whole chat", sum(f.reloaded for f in soak.hoppers), "")
