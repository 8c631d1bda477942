"""Time of a verdict: everyday commands, and hostile texts of growing size, which must cost no more than their length."""

from __future__ import annotations

import time
from collections.abc import Iterator

import oppi

from .common import Figure

HOME = "/Users/u"
EVERYDAY = (
    "git status --short && git diff --stat HEAD~1 -- src tests docs | tail -40",
    'cd /Users/u/work && npm test -- --watch=false --reporter=dot 2>&1 | grep -E "passed|failed" | tail -20',
    "rg -n 'def evaluate' src tests | sort | head -50; sed -n '120,180p' src/policy/engine.py; wc -l src/policy/*.py",
    'git add -A && git commit -m "$(cat <<\'EOF\'\nfix: read the whole line\n\nElse its end is lost.\nEOF\n)" && git log',
)
HOSTILE = {
    "words": "a ", "words of rm": "rm -rf ./x ", "quotes": "'a' ", "expansions": "$x ", "substitutions": "$(", "braces": "{a,b}",
    "backticks": "`a` ", "heredocs": "<<a ", "separators": "a;", "globs": "*/.s*/ ", "escapes": "\\a", "assignments": "a=b ",
    "find": "find . -exec ", "env": "env ", "paths": "/.config/", "stars": "*", "parentheses": "(", "operators": "&&",
}  # fmt: skip


def context() -> oppi.Context:
    return oppi.Context(
        "s", "w", "host", "allow", (), HOME, HOME + "/work", data_dir=HOME + "/.config/oppi", agent_dir=HOME + "/.pi/agent",
        real_path=oppi.path_resolver(), port=7749,
    )  # fmt: skip


def milliseconds(command: str, times: int) -> float:
    """CPU of one verdict, the best of three rounds."""
    call, best = oppi.Call("bash", {"command": command}), float("inf")
    for _ in range(3):
        begin = time.process_time()
        for _ in range(times):
            oppi.evaluate(call, context())
        best = min(best, (time.process_time() - begin) / times)
    return best * 1000


def figures() -> Iterator[Figure]:
    oppi.log = lambda tag, text: None
    for command in EVERYDAY:
        padded = command[:200].ljust(200)
        yield Figure(f"verdict on 200 characters: {command[:40]}…", milliseconds(padded, 300), "ms", 0.5)
    for name, piece in HOSTILE.items():
        for size in (10_000, 100_000):
            text = "cat " + piece * (size // len(piece))
            quoted = "echo '" + text.replace("'", "") + "'"
            for form, command in (("", text), ("quoted ", quoted)):
                yield Figure(f"verdict on {size:,} characters of {form}{name}", milliseconds(command, 1), "ms", 50)
