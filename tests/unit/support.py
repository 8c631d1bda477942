"""What the unit tests share: recorded data, and how hypothesis runs (the same examples each time)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

import oppi

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
VERSIONS = ("0.73", "0.87")
SCENARIOS = [(path.parent.name[3:], path.stem) for path in sorted(FIXTURES.glob("pi-*/*.jsonl"))]
SESSION_FILES = [(path.parents[1].name[3:], path.stem) for path in sorted(FIXTURES.glob("pi-*/sessions/*.jsonl"))]

few = settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
many = settings(few, max_examples=400)


def recorded(version: str, scenario: str) -> bytes:
    """The exact stdout of a recorded pi."""
    return (FIXTURES / f"pi-{version}" / f"{scenario}.jsonl").read_bytes()


def session_entries(version: str, name: str) -> list[dict[str, Any]]:
    """The entries of a recorded session file."""
    with open(FIXTURES / f"pi-{version}" / "sessions" / f"{name}.jsonl", "rb") as file:
        return oppi.parse_entries(file)


def load(name: str) -> Any:
    return json.loads((FIXTURES / name).read_text("utf-8"))


def read_all(data: bytes, cuts: tuple[int, ...] = ()) -> list[Any]:
    """Everything a fresh reader makes of `data`, fed in pieces that end at `cuts`."""
    reader, items, start = oppi.PiReader(), [], 0
    for stop in [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]:
        piece = data[start:stop]
        items += reader.feed(piece, len(piece))
        start = stop
    return items
