"""CPU from the start of the process to its first healthy answer, from the file and from the unpacked archive."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.support.phone import Phone
from tests.support.server import ROOT, Server

from .common import Figure, cpu_seconds, median

RUNS = 7


def start_cpu(server: Server) -> float:
    """Start a server, ask for its health and stop it again."""
    server.start()
    Phone(server.base_url).health()
    used = cpu_seconds(server.pid)
    server.stop()
    return used


def measure(program: list[str] | None) -> float:
    with Server(program=program, start=False) as server:
        server.env["OPPI_CACHE_DIR"] = str(server.folder / "cache")
        del server.env["PYTHONDONTWRITEBYTECODE"]
        start_cpu(server)  # makes the identity and, of the archive, the unpacked copy
        return median([start_cpu(server) for _ in range(RUNS)])


def figures() -> Iterator[Figure]:
    yield Figure("CPU of start to first healthy answer, `oppi.py`", measure(None), "s", 0.20, 0.20)
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "oppi.pyz"
        subprocess.run([sys.executable, "build_zipapp.py", "-o", str(archive)], cwd=ROOT, check=True, capture_output=True)
        yield Figure("the same, unpacked archive", measure([sys.executable, str(archive)]), "s", 0.25)
