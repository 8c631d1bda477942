"""CPU of the commands that need neither pi nor a key, from the file and from the unpacked archive.

What they are measured by is a Python that imports three modules: the archive is to need at most 1.5 times that.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from .common import Figure, bench_server, child_cpu, median, programs

RUNS = 15
SMALL = "import argparse, json, zipfile"
COMMANDS = (("status", ("status",)), ("config get", ("config", "get", "port")))


def figures() -> Iterator[Figure]:
    with programs() as found:
        for kind, program in found:
            with bench_server(program=program) as server:
                env = {**server.env, "OPPI_DATA_DIR": str(server.data)}
                commands = {name: server.command(*words) for name, words in COMMANDS}
                commands.update({code: [sys.executable, "-c", code] for code in ("pass", SMALL)})
                used: dict[str, list[float]] = {name: [] for name in commands}
                for _ in range(RUNS):  # by turns, so that all see the same machine
                    for name, command in commands.items():
                        used[name].append(child_cpu(command, env, server.folder))
                small = median(used[SMALL])
                if program is found[0][1]:  # what no command can be cheaper than, at this moment
                    yield Figure("CPU of a Python that does nothing", median(used["pass"]), "s")
                    yield Figure(f"CPU of `{SMALL}`", small, "s")
                for name, _ in COMMANDS:
                    original = 0.20 if name == "status" else None
                    yield Figure(f"CPU of `{name}`, {kind}", median(used[name]), "s", 0.08, original)
                    if program is not found[0][1]:
                        yield Figure(f"CPU of `{name}`, {kind}, to that of `{SMALL}`", median(used[name]) / small, "", 1.5)
