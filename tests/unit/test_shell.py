"""The shell grammar: recognised exactly, or not at all."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import oppi

from .support import many

C = oppi.Command
RECOGNISED: list[tuple[str, list[oppi.Command]]] = [
    ("ls", [C(("ls",))]),
    ("  git  push\torigin ", [C(("git", "push", "origin"))]),
    ("a && b || c; d\ne", [C(("a",)), C(("b",)), C(("c",)), C(("d",)), C(("e",))]),
    ("a | b | c", [C(("a",)), C(("b",), joint="|"), C(("c",), joint="|")]),
    ("a|b && c", [C(("a",)), C(("b",), joint="|"), C(("c",))]),
    ("a; \n\n b;", [C(("a",)), C(("b",))]),
    ("echo 'a b' \"c  d\"", [C(("echo", "a b", "c  d"))]),
    ("echo '$x `y` \\ \"q\"'", [C(("echo", '$x `y` \\ "q"'))]),
    ("\"su\"'do' id", [C(("sudo", "id"))]),
    ("echo '' x", [C(("echo", "", "x"))]),
    ("grep -E 'bash|sh' Makefile", [C(("grep", "-E", "bash|sh", "Makefile"))]),
    ("ls -la 2>/dev/null || true", [C(("ls", "-la")), C(("true",))]),
    ("make 2>&1 >&2 1>&2", [C(("make",))]),
    ("make > log 2>> 'err log' < in", [C(("make",), ("log", "err log"), ("in",))]),
    ("> out echo x", [C(("echo", "x"), ("out",))]),
    ("cat ~/a ~", [C(("cat", "~/a", "~"))]),
    ("npm run x -- --y=1", [C(("npm", "run", "x", "--", "--y=1"))]),
    ("echo if then", [C(("echo", "if", "then"))]),
    ("x --a=b c=d", [C(("x", "--a=b", "c=d"))]),
]
NOT_RECOGNISED = r"""
echo $HOME ¦ echo "$HOME" ¦ echo ${x} ¦ echo $(id) ¦ echo `id` ¦ echo "`id`" ¦ echo $'x' ¦ cat <(id) ¦ cat >(id)
ls * ¦ ls ? ¦ ls [a] ¦ ls {a,b} ¦ ls \* ¦ a\ b ¦ a "\"" ¦ 'unclosed ¦ "unclosed ¦ echo !x ¦ echo "!x" ¦ é ¦ a é
a & b ¦ a & ¦ a |& b ¦ a >| b ¦ a &> b ¦ a >& b ¦ a <> b ¦ a <<E ¦ a <<< b ¦ a 2>&3 ¦ a >&1x ¦ a <&0
(a) ¦ { a; } ¦ ! a ¦ [[ a ]] ¦ if a; then b; fi ¦ for i in 1; do a; done ¦ while a; do b; done ¦ until a ¦ done
case a in b ¦ function f ¦ f() { a; } ¦ time a ¦ coproc a ¦ select x ¦ A=1 a ¦ A=1 ¦ A+=1 a ¦ # a ¦ a # b
a ~user ¦ a ~user/x ¦ a b=~/x ¦ a b:~/x ¦ a && ¦ && a ¦ a || ¦ || a ¦ a | ¦ | a ¦ a || || b ¦ a && && b ¦ a ;; b
; ¦ a > ¦ a > > b ¦ > a ¦ 2>&1
"""
MORE = ["", "  ", "\n", "a\x00", "a\rb", "a && \n b", "a" * 10_001, "ls \\\n-la", "a\u2028b"]
MORE += ["cat <<EOF\nit's\nEOF\nsudo id", "# don't panic\nsudo id"]


@pytest.mark.parametrize(("text", "commands"), RECOGNISED)
def test_simple_commands_are_recognised(text: str, commands: list[oppi.Command]) -> None:
    parsed = oppi.parse_shell(text) or []
    assert [c._replace(joint="|" if c.joint == "|" else "\n") for c in parsed] == commands


@pytest.mark.parametrize("text", [*(cell.strip() for cell in re.split("[¦\n]", NOT_RECOGNISED.strip())), *MORE])
def test_what_bash_might_read_otherwise_is_not_recognised(text: str) -> None:
    assert oppi.parse_shell(text) is None


def test_the_longest_command_is_recognised_quickly() -> None:
    assert oppi.parse_shell("a" * 10_000) == [C(("a" * 10_000,))]
    assert oppi.parse_shell("'" * 9_999) is None


words = st.text(alphabet="abcXYZ09 _-./$`'\"\\*?[]{}()!#&|;<>=~@%+:,^é\t", min_size=1, max_size=8)


@many
@given(st.lists(words, min_size=1, max_size=5))
def test_quoted_words_come_back_or_are_not_recognised(given_words: list[str]) -> None:
    parsed = oppi.parse_shell(" ".join(map(shlex.quote, given_words)))
    assert parsed is None or parsed == [C(tuple(given_words))]


def reference(text: str) -> list[str]:
    """The words of a text as the standard library splits them, without operators."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, "#"
    return sorted(token for token in lexer if not set(token) <= set("();<>|&"))


@many
@given(st.text(alphabet="ab-=/.~ '\"\\$`*#;|&<>\n", max_size=24))
def test_recognised_commands_have_the_words_another_parser_finds(text: str) -> None:
    parsed: Any = oppi.parse_shell(text)
    if parsed is not None:
        assert sorted(word for c in parsed for word in (*c.words, *c.writes, *c.reads) if word) == [
            word for word in reference(text) if word
        ]
