"""Writes docs/cli.md from the parser: `python3 -m tests.support.cli_doc`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import oppi

FILE = Path(__file__).resolve().parent.parent.parent / "docs" / "cli.md"
HEAD = """# Command line

Every command takes `--data-dir DIR` (default: `$OPPI_DATA_DIR`, else `~/.config/oppi`) and `--json`, which prints facts as JSON.
A command that fails prints one line on stderr and exits with 1. Colours and drawing are left out when the output is no terminal
or `NO_COLOR` is set. Variables: `OPPI_DATA_DIR`, `OPPI_PI_BIN` (another pi), `OPPI_ENV_FILE` (environment for pi),
`OPPI_CACHE_DIR` (where the archive unpacks itself), `PI_CODING_AGENT_DIR` (pi's own folder); files: [operations](operations.md).
`oppi` stands for `python3 oppi.pyz` or `python3 oppi.py`; `eval "$(oppi completion)"` completes commands.
"""


def text() -> str:
    """The whole document."""
    known = dict.fromkeys(word for names in oppi.COMMANDS for word in names.split()[:1])
    return HEAD + "".join("\n" + "\n".join(section(name)) + "\n" for name in known)


def section(name: str) -> Iterator[str]:
    """One command: how it is called, what it does, its words and options."""
    parser = oppi.build_parser(name).get_default("commands")[name]
    actions = [a for a in parser._actions if a.dest not in ("help", "data_dir", "json") and a.help != argparse.SUPPRESS]
    yield f"## {' '.join(['oppi', name, *(word(a) for a in actions if not a.option_strings)])}\n"
    aliases = next(names.split()[1:] for names in oppi.COMMANDS if names.split()[0] == name)
    also = "".join(f" Also called `{alias}`." for alias in aliases)
    yield f"{parser.description[:1].upper()}{parser.description[1:]}.{also}"
    rows = [f"| `{form(a)}` | {meaning(a)} |" for a in actions if a.option_strings]
    if rows:
        yield "\n".join(["", "| Option | |", "|---|---|", *rows])


def word(action: argparse.Action) -> str:
    name = "|".join(map(str, action.choices)) if action.choices else str(action.metavar or action.dest.upper())
    return f"[{name}]" if action.nargs == "?" else f"[{name}…]" if action.nargs == "*" else name


def form(action: argparse.Action) -> str:
    value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
    return ", ".join(action.option_strings) + value


def meaning(action: argparse.Action) -> str:
    parts = [action.help or "", "one of " + ", ".join(map(str, action.choices)) if action.choices else ""]
    default = action.default if action.nargs != 0 else None
    parts.append(f"default: {default}" if default not in (None, "") else "")
    return "; ".join(filter(None, parts))


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    sys.exit(0)
