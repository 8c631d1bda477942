"""Runs an oppi command with a clock in its loop: `probe.py REPORT COMMAND…`.

oppi is imported as a module and runs as it is; only Server.run is preceded by a timer that goes off every millisecond
and notes how late it was.  The report is triples of doubles, all in seconds: when the timer was due, by
time.monotonic(), how late it was, and the CPU that all threads of the process used since the timer before it.
"""

from __future__ import annotations

import array
import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])  # not tests/bench, where `commands` and others would be modules

import oppi  # noqa: E402

TICK = 0.001
BATCH = 200  # timers between two writes, about 0.3 s


class Clock:
    """The timer.  What it noted is written in pieces, so that its own memory does not grow."""

    def __init__(self, report: str) -> None:
        self.loop = asyncio.get_running_loop()
        self.file = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.found = array.array("d")
        self.due, self.used = self.loop.time(), time.process_time()

    def tick(self) -> None:
        now, used = self.loop.time(), time.process_time()
        self.found.extend((self.due, now - self.due, used - self.used))
        if len(self.found) >= 3 * BATCH:
            os.write(self.file, self.found.tobytes())
            del self.found[:]
        self.due, self.used = now + TICK, used
        self.loop.call_at(self.due, self.tick)


def main() -> int:
    report, arguments = sys.argv[1], sys.argv[2:]
    run = oppi.Server.run

    async def probed(server: oppi.Server, *parameters: Any) -> None:
        Clock(report).tick()
        await run(server, *parameters)

    setattr(oppi.Server, "run", probed)  # noqa: B010 – what mypy would rather not see
    return oppi.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
