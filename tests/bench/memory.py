"""Resident memory of the idle server and after ten sessions have streamed."""

from __future__ import annotations

from collections.abc import Iterator

from tests.support.phone import Phone
from tests.support.server import Server

from .common import Figure, Wire, bench_server, memory_mb, open_session, programs

SESSIONS = 10
LIMITS = {"maxSessionsPerWorkspace": 20, "maxSessionsGlobal": 40}


def figures() -> Iterator[Figure]:
    with programs() as found:
        for kind, program in found:
            with bench_server(program=program, dialect="0.73", config=LIMITS, start=False) as server:
                server.start()
                server.restart()  # the first start makes the identity and unpacks the archive
                Phone(server.base_url).health()
                yield Figure(f"idle memory, {kind}", memory_mb(server.pid), "MB", 40, 62)
                stream(server)
                yield Figure(f"memory after ten streamed sessions, {kind}", memory_mb(server.pid), "MB", 50, 100)


def stream(server: Server) -> None:
    """Ten sessions at once, all of them still running when this returns."""
    phone = server.pair("1.1")
    wire = Wire(server.port, phone.token)
    sessions = [open_session(phone, server)[1] for _ in range(SESSIONS)]
    for sid in sessions:
        wire.subscribe(sid)
    for sid in sessions:
        wire.prompt(sid, "!text 4000")
    wire.wait(r'"type":\s*"agent_end"', 120, count=SESSIONS)
    wire.close()
