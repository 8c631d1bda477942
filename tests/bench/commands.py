"""CPU of the commands that need neither pi nor a key."""

from __future__ import annotations

from collections.abc import Iterator

from tests.support.server import Server

from .common import Figure, child_cpu, median

RUNS = 15
COMMANDS = (("status", ("status",)), ("config get", ("config", "get", "port")))


def figures() -> Iterator[Figure]:
    with Server() as server:
        env = {**server.env, "OPPI_DATA_DIR": str(server.data)}
        env.pop("PYTHONDONTWRITEBYTECODE")
        for name, words in COMMANDS:
            used = [child_cpu(server.command(*words), env, server.folder) for _ in range(RUNS)]
            yield Figure(f"CPU of `{name}`", median(used), "s", 0.08, 0.20 if name == "status" else None)
