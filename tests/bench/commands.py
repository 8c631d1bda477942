"""CPU of the commands that need neither pi nor a key, from the file and from the unpacked archive."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from .common import Figure, bench_server, child_cpu, median, programs

RUNS = 15
COMMANDS = (("status", ("status",)), ("config get", ("config", "get", "port")))


def figures() -> Iterator[Figure]:
    with programs() as found:
        for kind, program in found:
            with bench_server(program=program) as server:
                env = {**server.env, "OPPI_DATA_DIR": str(server.data)}
                if program is found[0][1]:  # what no command can be cheaper than, at this moment
                    used = [child_cpu([sys.executable, "-c", "pass"], env, server.folder) for _ in range(RUNS)]
                    yield Figure("CPU of a Python that does nothing", median(used), "s")
                for name, words in COMMANDS:
                    used = [child_cpu(server.command(*words), env, server.folder) for _ in range(RUNS)]
                    original = 0.20 if name == "status" else None
                    yield Figure(f"CPU of `{name}`, {kind}", median(used), "s", 0.08, original)
