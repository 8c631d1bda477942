"""CPU from the start of the process to its first healthy answer, from the file and from the unpacked archive."""

from __future__ import annotations

from collections.abc import Iterator

from tests.support.phone import Phone
from tests.support.server import Server

from .common import Figure, bench_server, cpu_seconds, median, programs

RUNS = 7
LIMITS = (0.20, 0.25)  # s: the file, the archive


def start_cpu(server: Server) -> float:
    """Start a server, ask for its health and stop it again."""
    server.start()
    Phone(server.base_url).health()
    used = cpu_seconds(server.pid)
    server.stop()
    return used


def figures() -> Iterator[Figure]:
    with programs() as found:
        for (kind, program), limit in zip(found, LIMITS):
            with bench_server(program=program, start=False) as server:
                start_cpu(server)  # makes the identity and, of the archive, the unpacked copy
                used = median([start_cpu(server) for _ in range(RUNS)])
            yield Figure(f"CPU of start to first healthy answer, {kind}", used, "s", limit, 0.20)
