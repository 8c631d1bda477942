"""The documents name only tests and files that exist."""

from __future__ import annotations

import ast
import re

import pytest

from tests.support import cli_doc

from .support import ROOT

DOCUMENTS = [(ROOT / "docs" / f"{name}.md").read_text("utf-8") for name in ("security", "parity")]
PROMISES = sorted({found for text in DOCUMENTS for found in re.findall(r"`([\w/]+\.py)::([\w:]+)`", text)})


def names(path: str) -> set[str]:
    """Test functions of a file, those of classes as Class::test."""
    found = set()
    for node in ast.parse((ROOT / "tests" / path).read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


@pytest.mark.parametrize(("path", "test"), PROMISES, ids=lambda value: value)
def test_each_promise_names_the_test_that_proves_it(path: str, test: str) -> None:
    assert test in names(path)


def test_every_row_makes_a_promise_that_is_tested() -> None:
    for text in DOCUMENTS:
        rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| Promise")]
        assert len(rows) > 20 and all(re.search(r"`[\w/]+\.py::", row) for row in rows)


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_links_lead_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", (ROOT / document).read_text("utf-8")):
        assert ((ROOT / document).parent / target).exists(), target


def test_the_command_line_is_documented_as_it_is() -> None:
    """Made anew with: python3 -m tests.support.cli_doc"""
    assert cli_doc.FILE.read_text("utf-8") == cli_doc.text()


def test_every_option_says_what_it_is_for() -> None:
    assert not [line for line in cli_doc.text().splitlines() if line.startswith("| `") and line.endswith("|  |")]
