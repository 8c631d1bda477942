"""All figures, or some: `python3 tests/bench`, `python3 tests/bench latency memory`.

Runs in the private virtual environment of the tests and prints a Markdown table.  A figure that misses its limit is
marked, but nothing fails: how fast a machine is at this moment is not a property of the code.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)
INSIDE = "OPPI_BENCH_INSIDE"  # set once the tools' own Python runs this file
BENCHES = ("deltas", "memory", "start", "commands", "latency", "policy", "soak", "sessions")
BOUNDS = {"soak": 80, "sessions": 115}  # s that a benchmark may take; twice as long, and it is given up


def reexecute(names: list[str]) -> int:
    """Run this file with the Python of the tests' environment."""
    from tests.__main__ import make_environment, tool_python

    python = make_environment(tool_python())
    command = [python, str(Path(__file__).resolve()), *names]
    return subprocess.call(command, cwd=ROOT, env={**os.environ, INSIDE: "1", "PYTHONDONTWRITEBYTECODE": "1"})


def given_up(number: int, frame: object) -> None:
    raise TimeoutError("a benchmark hangs")


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in BENCHES]
    if unknown:
        sys.exit(f"unknown benchmark {unknown[0]}; there are {', '.join(BENCHES)}")
    if INSIDE not in os.environ:
        return reexecute(names)
    import importlib

    from tests.bench.common import HEADER, Figure

    version = ".".join(map(str, sys.version_info[:3]))
    print(f"Python {version}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}\n")
    print(HEADER, flush=True)
    begin = time.monotonic()
    signal.signal(signal.SIGALRM, given_up)
    for name in names or BENCHES:
        start, bound = time.monotonic(), BOUNDS.get(name)
        signal.alarm(2 * bound if bound else 0)  # one that hangs ends, and with it the servers it has started
        for figure in importlib.import_module(f"tests.bench.{name}").figures():
            print(figure, flush=True)
        signal.alarm(0)
        if bound:
            print(Figure(f"time of the benchmark `{name}`", time.monotonic() - start, "s", bound), flush=True)
    print(f"\nin {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
