"""The shape of oppi.py: what the pure half may import, how long functions are, and the promised order."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterable

from .support import ROOT

SOURCE = (ROOT / "oppi.py").read_text("utf-8")
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)
BANNERS = [(number, line.strip("# ═")) for number, line in enumerate(LINES, 1) if re.match(r"# ═+ .+ ═+$", line)]
BOUNDARY = next(number for number, title in BANNERS if title == "I/O starts here")
IMPURE = {"asyncio", "os", "socket", "subprocess", "ssl", "importlib"}


def imported(node: ast.AST) -> set[str]:
    """Top-level names of the modules an import statement brings in."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    return {(node.module or "").split(".")[0]} if isinstance(node, ast.ImportFrom) else set()


def is_start(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).startswith("__name__ == '__main__' and ")


def pure_nodes() -> list[ast.AST]:
    """Everything in the pure half but the one block that starts a server over as a module."""
    pure = [node for node in TREE.body if node.lineno < BOUNDARY and not is_start(node)]
    return [inner for node in pure for inner in ast.walk(node)]


def called(nodes: Iterable[ast.AST]) -> set[str]:
    return {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}


def test_the_pure_half_imports_nothing_that_does_io() -> None:
    assert not [name for node in pure_nodes() for name in imported(node) & IMPURE]


def test_the_pure_half_calls_nothing_that_does_io() -> None:
    assert not called(pure_nodes()) & {"open", "exec", "eval", "__import__", "input", "print"}


def test_the_one_exception_starts_over_and_does_nothing_else() -> None:
    (block,) = [node for node in TREE.body if is_start(node)]
    assert isinstance(block, ast.If)
    assert ast.unparse(block.test) == "__name__ == '__main__' and sys.argv[1:2] in (['serve'], ['start'])"
    assert (block.end_lineno or BOUNDARY) < BANNERS[0][0] and not block.orelse
    inside = list(ast.walk(block))
    assert {name for node in inside for name in imported(node)} == {"marshal", "os"}
    assert called(inside) == {
        "os.environ.get", "os.urandom", "os.urandom(16).hex", "os.open", "open", "os.unlink", "marshal.dumps",
        "sys._getframe", "_code_file.write", "_code_file.seek", "_code_file.fileno", "os.set_inheritable",
        "os.path.abspath", "os.execv",
    }  # fmt: skip


def test_functions_are_short() -> None:
    functions = [n for n in ast.walk(TREE) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lengths = {f"{n.name}:{n.lineno}": (n.end_lineno or 0) - n.lineno + 1 for n in functions}
    assert {name for name, length in lengths.items() if length > 60} == set()
    assert statistics.median(lengths.values()) <= 8
    assert sum(length <= 30 for length in lengths.values()) >= 0.9 * len(lengths)


def test_sections_stand_in_the_order_of_the_map() -> None:
    text = " ".join((ast.get_docstring(TREE) or "").partition("Map: ")[2].split()).rstrip(".")
    mapped = [part.strip().lower() for part in re.split(r"[,|]", text)]
    titles = [re.sub(r"^(\d+)\. ", r"\1 ", title).lower() for _, title in BANNERS]
    assert len(titles) == len(mapped)
    assert [title for title, name in zip(titles, mapped) if not title.startswith(name)] == []


def test_banners_are_full_width_and_explained() -> None:
    for number, title in BANNERS:
        assert 85 <= len(LINES[number - 1]) <= 95, title
        assert LINES[number].startswith("# "), title


def test_the_file_can_be_read_in_one_sitting() -> None:
    assert len(LINES) <= 12000


def test_nothing_is_left_to_do() -> None:
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", SOURCE)


def test_no_name_means_two_things() -> None:
    """A table of one section must not take the place of another section's of the same name."""
    names = [
        target.id for node in TREE.body if isinstance(node, ast.Assign) for target in node.targets if isinstance(target, ast.Name)
    ]
    names += [node.target.id for node in TREE.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    names += [node.name for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
    assert sorted({name for name in names if names.count(name) > 1}) == []
