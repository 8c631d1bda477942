"""What the shell grammar recognises, the real bash reads in the same way: scripts made at random, run with nothing to run.

Bash gets an empty folder, an empty PATH and a handler that notes every program it looks for.  Whatever it looks for has to be
among the commands that were recognised; where nothing is conditional, all of them are looked for, in their order.
`OPPI_LONG=1` makes it 100,000 scripts.  `python3 -m tests.unit.test_bash FIRST COUNT` runs some of them and prints what differs.
"""

from __future__ import annotations

import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from typing import Callable, NamedTuple

import pytest

import oppi

from . import test_shell
from .support import ROOT

SEED = 20240607
BASH = shutil.which("bash") or "/bin/bash"
LONG = os.environ.get("OPPI_LONG") == "1"
SCRIPTS = 100_000 if LONG else 3_000
WORKERS = 2
NOTES = 200  # the descriptor to which bash writes what it would run
OUTSIDE = {"x": "environ", "y": "environ", "n": "7"}  # variables from before the script
NOTE = "() { builtin printf '%%s\\0' %s \"${@//$'\\n'/$'\\1'}\" >&200; %s; }"  # in one piece: a line end would cut it
HANDLER = NOTE % ('"$#"', "case $1 in no*) return 1;; esac")
ECHO = NOTE % ('"$(($# + 1))" echo', 'builtin echo "$@"')
CAT = NOTE % ('"$(($# + 1))" cat', "builtin printf '%s\\n' \"$(</dev/stdin)\"")
NATIVE = frozenset(
    ". : [ command test true false printf cd read export declare local readonly typeset unset set let wait".split()
)
SYNTAX_ERROR = re.compile(
    "syntax error (near|in conditional)|unexpected (EOF|end of file|argument|token)|delimited by end-of-file"
)
UNSAFE = re.compile(r"(?<![a-z~])/|\b(kill|exec|ulimit|trap|enable)\b")


class Ran(NamedTuple):
    """What bash did with a script."""

    commands: list[tuple[str, ...]]
    files: list[str]
    errors: str
    ended: bool


class Bash:
    """Runs scripts with nothing to run."""

    def __init__(self, folder: str) -> None:
        self.folder, self.home, self.nothing = folder + "/work", folder + "/home", folder + "/nothing"
        for name in (self.folder, self.home, self.nothing):
            os.mkdir(name)
        self.errors = open(folder + "/errors", "a+b")  # noqa: SIM115 - closed with the process

    def environment(self, text: str) -> dict[str, str]:
        functions = {"BASH_FUNC_command_not_found_handle%%": HANDLER, "BASH_FUNC_echo%%": ECHO, "BASH_FUNC_cat%%": CAT}
        own = {"HOME": self.home, "PATH": self.nothing, "FUNCNEST": "5"}
        return {**functions, **own, **OUTSIDE, **({"LC_ALL": "C.UTF-8"} if len(text) % 2 else {})}

    def run(self, text: str) -> Ran:
        reading, writing = os.pipe()
        os.dup2(writing, NOTES)
        os.close(writing)
        self.errors.truncate(0)
        bash = subprocess.Popen(
            [BASH, "-c", "--", text, "shell"],
            env=self.environment(text),
            cwd=self.folder,
            pass_fds=(NOTES,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            start_new_session=True,
        )
        os.close(NOTES)
        data, ended = self.read(reading)
        if not ended:
            os.killpg(bash.pid, signal.SIGKILL)
        bash.wait()
        os.close(reading)
        notes, commands = data.decode("utf-8", "surrogateescape").replace("\1", "\n").split("\0")[:-1], []
        while ended and notes:
            count = int(notes[0])
            commands.append(tuple(notes[1 : count + 1]))
            del notes[: count + 1]
        return Ran(commands, self.emptied(), os.pread(self.errors.fileno(), 5000, 0).decode("utf-8", "replace"), ended)

    @staticmethod
    def read(reading: int) -> tuple[bytes, bool]:
        """What was noted until nobody is left who could note more; False if that does not end."""
        data, deadline = b"", time.monotonic() + 5
        while len(data) < 1_000_000 and select.select([reading], [], [], max(0, deadline - time.monotonic()))[0]:
            piece = os.read(reading, 65_536)
            data += piece
            if not piece:
                return data, True
        return data, False

    def emptied(self) -> list[str]:
        """The names of the files in the folder, which are deleted."""
        names = os.listdir(self.folder)
        for name in names:
            os.unlink(f"{self.folder}/{name}")
        return names


# What was recognised


class Reader:
    """Makes regular expressions of words with marks; in them, every word has a NUL behind it."""

    def __init__(self, script: oppi.Script, home: str) -> None:
        self.values, self.outside = script.values, {**OUTSIDE, "HOME": home}

    def words(self, words: tuple[str, ...]) -> str:
        return "".join(map(self.word, words))

    def word(self, word: str) -> str:
        found = self.text(word)
        if "\2" in word:  # a glob may find several
            return rf"(?:{found}\x00)+"
        if "\1\0" in word and re.fullmatch("(?:\1[^\0]*\0)+", word):
            return rf"(?:{found}\x00)?"
        return rf"(?:(?!\x00){found}\x00)?" if re.fullmatch("(?:\1[^\0]*\0)+", word) else found + r"\x00"

    def text(self, text: str, active: tuple[str, ...] = ()) -> str:
        found, last = "", 0
        for mark in oppi.MARK.finditer(text):
            found, last = (
                found + re.escape(text[last : mark.start()]) + self.mark(mark.group(1), mark.group(2), active),
                mark.end(),
            )
        return found + re.escape(text[last:])

    def mark(self, kind: str | None, name: str | None, active: tuple[str, ...]) -> str:
        if kind is None:
            return r"[^/\x00]*"
        if name == "#":
            return "-?[0-9]+"
        anything = r"[\s\S]*" if kind == "\1" else r"[^\x00]*"
        if not name or name in active:
            return anything
        values = [
            re.escape(self.outside.get(name, "")) if value == f"\0{name}\0" else self.text(value, (*active, name))
            for value in self.values.get(name, [f"\0{name}\0"])
        ]
        if kind == "\1" and any(re.search(r"\\?[\s*?\[]|\\x00", value) for value in values):  # split, or a glob
            return anything
        return "(?:%s)" % "|".join(values)


class Claim(NamedTuple):
    """A command that was recognised; `noted`: it is if it runs."""

    words: re.Pattern[str]
    noted: bool

    def covers(self, words: tuple[str, ...]) -> bool:
        return self.words.fullmatch("".join(word + "\0" for word in words)) is not None


def claims_of(script: oppi.Script, text: str, home: str) -> tuple[list[Claim], re.Pattern[str]]:
    """The commands of a script, and the files it may write, with the values its variables may have."""
    reader = Reader(script, home)
    functions = set(re.findall(r"([\w.:-]+)[ \t]*\([ \t]*\)", text))
    claims = []
    for command in script.commands:
        first = command.words[:1]
        noted = bool(first) and first[0] not in NATIVE | functions and not re.search("^%|[/\0\1\2]", first[0])
        words = command.words[1:] if first == ("command",) else command.words
        claims.append(Claim(re.compile(reader.words(words) if first else "(?!)"), noted))
    writes = [reader.word(word) for command in script.commands for word in command.writes]
    return claims, re.compile("|".join(writes) or "(?!)")


def all_covered(claims: list[Claim], ran: list[tuple[str, ...]]) -> bool:
    """Whether every claim that is noted can be given to a command of its own, and every command to a claim."""
    covering = [[i for i, words in enumerate(ran) if claim.covers(words)] for claim in claims]
    owner: dict[int, int] = {}

    def give(claim: int, tried: set[int]) -> bool:
        for place in covering[claim]:
            if place not in tried:
                tried.add(place)
                if place not in owner or give(owner[place], tried):
                    owner[place] = claim
                    return True
        return False

    certain = all(give(i, set()) for i, claim in enumerate(claims) if claim.noted)
    for i, claim in enumerate(claims):
        if not claim.noted:
            give(i, set())
    return certain and len(owner) == len(ran)


def difference(bash: Bash, text: str, straight: bool = False, ordered: bool = False) -> str | None:
    """What bash does otherwise than was recognised: "" for nothing, None if the text was not recognised."""
    try:
        script = oppi.parse_shell(text)
    except Exception as error:
        return f"raised {error!r}"
    if script is None:
        return None
    ran = bash.run(text)
    if not ran.ended:
        return ""  # a loop that never ends
    if SYNTAX_ERROR.search(ran.errors):
        return f"syntax error: {ran.errors[:300]}"
    claims, writes = claims_of(script, text, bash.home)
    claimed = f"recognised {[command.words for command in script.commands]} {script.values}"
    strange = [words for words in ran.commands if not any(claim.covers(words) for claim in claims)]
    if strange:
        return f"ran {strange}, {claimed}"
    files = [name for name in ran.files if not writes.fullmatch(name + "\0")]
    if files:
        return f"wrote {files}, {claimed}"
    if straight and not all_covered(claims, ran.commands):
        return f"ran {ran.commands} only or too often, {claimed}"
    noted = [claim for claim in claims if claim.noted]
    comparable = straight and ordered and len(noted) == len(ran.commands)
    if comparable and not all(claim.covers(words) for claim, words in zip(noted, ran.commands)):
        return f"ran {ran.commands} in another order, {claimed}"
    return ""


# Scripts made at random

PROGRAMS = (
    "git ls sudo x1 xx g++ a.b a-b _q 1a -x +x a,b }x x} {x =x ]x ^x @x :x a:b !x ~x if then do done fi for in esac".split()
)
PROGRAMS += [
    "no", "no1", "a b", "", "é", "a\tb", "x=1", "$x", "*", "a\nb", "#x", "[[x", "time", "function", "!", "{", "coproc",
    "\u00a0", "a;b", "f(x)",
]
TEXTS = r"""
a b -x --long=y a/b a=b a:b x.py {a,b} {a {1..3} {a..c} [a] * ? ~ ~/a a~ $x ${x} $(ls) `ls` $((1)) ! # a#b \ \n ' " ''
& && | || ; ;; < > << <<E >& 2>&1 ( ) () {} if then fi do done case esac in time [[ ]] coproc a%s 1 0 -1 08 @(a) !(a)
+(b) a+=b ,a} }{ x,y
""".split()
TEXTS += [
    "", " ", "a b", "a  b ", "\t", "\n", "a\nb", "é", "“a”", "a\u00a0b", "\u2028", "；", "ｌｓ", "a\\\nb", "-e\n", "$", "a$",
    "\U0001f600",
]
ODD = ["\r", "\x01", "\x7f", "\x1b", "\u00a0", "é", "；", "\u2003", "\x0b", "“"]
VALUES = [
    "sudo", "ls", "a", "a b", "", "*", "-x", "a/b", "x", "'a'", "$y", "~", "a[0]", "1", "2 3", " a", "é", "a*b", "no", "echo",
    "if", "x=1", "\\", "a\nb",
]
NAMES = ["x", "y", "z", "xy", "HOME", "ls", "_a1"]
SOUP = r"""
; ; && || | |& & ( ) { } < > >> >& <& &> << <<- <<< <( >( $( $(( (( )) ` ' " \ # ! = += * ? [ ] [[ ]] ~ $ ${ , .. { }
{a,b} - 1 2 2>&1 $x ${x} "$x" ${x:-a} $# $@ $! x= y= x=a a b c git sudo no
x1 if then else elif fi while until do done for in case esac ;;
time x() EOF E 'a' "b"
""".split()
SOUP += ["\\\n", "\n", "\n"]
SOUP += [" "] * 45 + ["\n"] * 6 + [";"] * 5 + ["a", "git", "sudo", "xx"] * 3


class Maker:
    """Makes one script.  `straight`: everything in it runs, once."""

    def __init__(self, seed: str, straight: bool) -> None:
        self.random, self.straight, self.ordered = random.Random(seed), straight, True
        self.depth, self.functions = 0, 0
        self.pending: list[str] = []  # bodies of heredocs

    def some(self, *makers: Callable[[], str]) -> str:
        return self.random.choice(makers)()

    def often(self, chance: float) -> bool:
        return self.random.random() < chance

    def blank(self) -> str:
        joining = 0 if self.straight else 0.4
        return self.random.choices([" ", "  ", "\t", " \\\n", " \\\n  ", "\\\n ", "\\\n"], [60, 5, 3, 3, 3, 2, joining])[0]

    def line(self) -> str:
        """The end of a line, and the heredocs that it calls for."""
        bodies, self.pending = self.pending, []
        return self.random.choice(["\n", "\n", "\n\n", " # a 'b\n", "\n#x\n"]) + "".join(bodies)

    def separator(self) -> str:
        if self.pending or self.often(0.3):
            return self.line()
        if self.often(0.15):
            self.ordered = False
            return " & "
        return self.random.choice([";", "; ", " ;", ";;" if self.often(0.02) else ";"])

    # Words

    def quoted(self, text: str) -> str:
        """Text as bash reads it back, in forms that change in the middle of it."""
        pieces, at = [], 0
        while at < len(text):
            piece = text[at : at + self.random.choice((1, 2, 3, 9, 9))]
            at += len(piece)
            form = self.random.randrange(8)
            if form == 0 and "'" not in piece:
                pieces.append(f"'{piece}'")
            elif form == 1:
                pieces.append('"%s"' % re.sub(r'(["\\$`])', r"\\\1", piece))
            elif form == 2:
                pieces.append(
                    "$'%s'"
                    % "".join(
                        f"\\x{ord(c):02x}" if c < "\x7f" and self.often(0.4) else re.sub(r"(['\\])", r"\\\1", c) for c in piece
                    )
                )
            elif form == 3 and "\n" not in piece:
                pieces.append("".join("\\" + c if c < "\x7f" and not (c.isalnum() and self.often(0.8)) else c for c in piece))
            elif form == 4 and self.often(0.3) and not self.straight:
                pieces.append(piece)  # as it is: bash reads something else
            elif re.fullmatch(r"[\w@%+=:,./-]+", piece, re.A):
                pieces.append(piece)
            elif "'" not in piece:
                pieces.append(f"'{piece}'")
            else:
                pieces.append('"%s"' % re.sub(r'(["\\$`])', r"\\\1", piece))
            if self.often(0.04):
                pieces.append(self.random.choice(["''", '""', "$''"]))
        return "".join(pieces) or "''"

    def program(self) -> str:
        name = self.random.choice(PROGRAMS[:8] if self.often(0.7) else PROGRAMS)
        if self.straight and name.startswith("no"):
            name = "git"
        return name if re.fullmatch(r"[\w.+-]+", name, re.A) and self.often(0.7) else self.quoted(name)

    def variable(self) -> str:
        name = self.random.choice(NAMES)
        forms = [
            f"${name}", f"${{{name}}}", f'"${name}"', f'"${{{name}}}"', f'a"${name}"', f"${name}b", f"${{{name}}}b",
            f'"a ${name} b"', f'${name}"c"',
        ]
        odd = f'${{{name}:-a b}} ${{{name}%a}} ${{#{name}}} "${{{name}:-}}" ${{{name}//a/b}} ${{{name}^^}} ${{{name}[0]}}'.split(
            " $"
        )
        special = [
            "$#", "$?", "$@", '"$@"', "$*", '"$*"', "$1", '"$1"', "$!", "$-", "$0", f"[${name}", f"~${name}", f"${name}*",
            f"${name}${name}",
        ]
        if self.straight:
            special = ["$#", "$?", "$1"]
        return self.random.choice(forms * 3 + ["$" + form.lstrip("$") if form[0] != '"' else form for form in odd] + special)

    def braces(self) -> str:
        inner = partial(
            self.random.choice,
            ["a", "b", "", "c d", "$x", '"e"', "1..3", "a..c", "{f,g}", "h}", "~", "3..1", "01..3", "''", "$", "x=1", "*"]
        )
        parts = ",".join(
            self.quoted(part) if part == "c d" else part for part in (inner() for _ in range(self.random.choice((1, 2, 2, 3))))
        )
        around = self.random.choice(
            ["%s", "a%s", "%sb", "%s{c,d}", "$x%s", '"$x"%s', "%sy", "{%s", "%s}", "x=%s", "%s$x", "-%s'e'", "${x}%s"]
        )
        return around.replace("%s", "{%s}") % parts

    def substitution(self) -> str:
        if self.pending or self.depth > 3:
            return "$(ls)"
        inner = self.lines(self.random.choice((1, 1, 2)), "")
        form = self.random.randrange(5)
        if form == 0:
            return '"$(%s)"' % inner
        if form in (1, 2) and "`" not in inner and "\\" not in inner:
            return ("`%s`" if form == 1 else '"`%s`"') % (inner.replace('"', '\\"') if form == 2 and self.often(0.5) else inner)
        if form == 3:
            self.ordered = False
            return self.random.choice(["<(%s)", "<(%s)", ">(%s)", "a<(%s)" if self.often(0.3) else "<(%s)"]) % inner
        return "$(%s)" % inner

    def arithmetic(self) -> str:
        inner = self.random.choice(
            ["1", "1 + 2", "n", "n + 1", "$n * 2", "n++", "n = 3", "$#", "x", "$1", "a$n", "2 > 1 ? 3 : 4", "1,2", "-5", "z"]
        )
        return self.random.choice(["$((%s))", '"$((%s))"', "a$((%s))b", "$(( %s ))"]) % inner

    def tilde(self) -> str:
        return self.random.choice(
            [
                "~", "~/a", "a~", "x=~/a", "a:~/b", "x=a:~", "~b", "\\~/a", '~"/a"', "--x=~/a", "~/*", "~/a{b,c}", 'x=a":"~',
                "~\\/a", "~''",
            ]
        )

    def glob(self) -> str:
        return self.random.choice(
            ["*", "a*", "*.py", "?", "[ab]", "[!a]*", "a[", "[]", "[a", "*/a*", "[[:alpha:]]", "\\*", "a]", "[$x]", '["a"]', "**"]
        )

    def word(self) -> str:
        if self.depth > 4 or self.often(0.5):
            return self.quoted(self.random.choice(TEXTS))
        kinds = [self.variable, self.variable, self.braces, self.tilde, self.glob, self.arithmetic, self.substitution]
        found = self.some(*kinds)
        return found + self.quoted(self.random.choice(TEXTS)) if self.often(0.1) else found

    def redirection(self) -> str:
        if self.often(0.12) and not self.depth > 3:
            return self.heredoc()
        forms = [
            ">f", "> f1", ">>f2", "2>f", "2>&1", ">&2", "</dev/null", "2>/dev/null", "&>f3", ">|f", "<<< a", '<<<"$x"', "3>f",
            "<>f", "3>&1", '>"f g"',
        ]
        wild = [
            ">&f", ">$z", "<no", "2>&9", "2>&-", "> {f,g}", ">f*", "{fd}>f", "<&0", "> 2", "<<< $(ls)", "&>> f", "> >(ls)",
            "< <(ls)", "<<<~", ">&1f",
        ]
        return self.random.choice(forms if self.straight or self.often(0.6) else wild)

    def heredoc(self) -> str:
        """An operator; its text comes with the end of the line."""
        self.ordered = False
        delimiter = self.random.choice(["E", "EOF", "E.1", "end-x"])
        tabs, literal = self.often(0.3), self.often(0.4)
        lines = self.random.choices(
            [
                "it's", "a $x", "$(ls a)", "`git b`", '"$(xx "c d")"', '`xx \\"a b\\"`', "\\$(ls)", " E", "E E", "", "\tE F",
                "$((1))", '"', "'", "a\\", "\\`", "${x:-b}", "$", "# c", "; sudo id",
            ],
            k=self.random.choice((0, 1, 2, 3)),
        )
        tab = "\t" * self.random.choice((0, 1, 2)) if tabs else ""
        self.pending.append("".join(f"{tab}{line}\n" for line in lines) + f"{tab}{delimiter}\n")
        quoted = self.random.choice([f"'{delimiter}'", f'"{delimiter}"', f"\\{delimiter}"]) if literal else delimiter
        return "<<" + ("-" if tabs else "") + self.random.choice(["", "", " ", "\t"]) + quoted

    # Commands

    def simple(self) -> str:
        parts = [f"{self.random.choice(NAMES)}={self.value()}"] if self.often(0.06) else []
        self.ordered = self.ordered and not parts
        kinds = [self.program] if self.straight else [self.program] * 42 + [self.variable] * 6 + [self.substitution, self.braces]
        first = self.some(*kinds)
        parts += [first, *(self.word() for _ in range(self.random.choice((0, 1, 1, 2, 3))))]
        if self.often(0.15):
            self.ordered = False
            parts.insert(self.random.randrange(len(parts) + 1), self.redirection())
        return "".join(self.blank() + part for part in parts).lstrip(" \t") if self.often(0.9) else " ".join(parts)

    def value(self) -> str:
        if self.often(0.7):
            return self.quoted(self.random.choice(VALUES)) if self.often(0.9) else ""
        return self.some(self.variable, self.arithmetic, self.tilde, self.substitution, self.glob, self.braces)

    def assignment(self) -> str:
        name = self.random.choice(NAMES)
        forms = [f"{name}={self.value()}"] * 6 + [
            f"{name}={self.value()} z={self.value()}", f"{name}+={self.value()}", f"n={self.random.randrange(9)}",
        ]
        forms += [
            f"{word} {name}={self.value()}"
            for word in ("export", "declare", "readonly", "typeset", "command export", "export z=a")
            if word != "readonly" or (self.often(0.2) and not self.straight)
        ]
        forms += [
            f"{name}=({self.word()} {self.word()})", f"read -r {name} <<< {self.value()}",
            f"unset {'z' if name == 'HOME' else name}",
        ]
        forms += [
            f"export {name}", f"declare {self.word()}", f"printf -v {name} sudo", f"{name}[0]={self.value()}",
            f"export ${name}", f"{name}={self.value()} export {name}",
        ] * (self.often(0.3) and not self.straight)
        return self.random.choice(forms)

    def pipeline(self) -> str:
        self.ordered = False
        return self.random.choice([" | ", "|", " |& ", " |\n" if not self.pending else " | "]).join(
            self.statement() for _ in range(2)
        )

    def chain(self) -> str:
        operator = "&&" if self.straight else self.random.choice(["&&", "||"])
        return f"{self.statement()}{self.random.choice([' ', ''])}{operator}{self.blank()}{self.statement()}"

    def group(self) -> str:
        after = self.random.choice(["", "", "", " >f", " 2>&1", "</dev/null"])
        return self.random.choice(["{ %s}", "(%s)", "( %s )"]) % self.lines(self.random.choice((1, 2)), ";") + after

    def prefixed(self) -> str:
        if self.straight:
            return "time " + self.statement()
        return self.random.choice(["! ", "time ", "time -p ", "! ! ", "!", "time ! "]) + self.statement()

    def condition(self) -> str:
        if self.often(0.4):
            operand = partial(self.random.choice, ["a", "$x", '"$x"', "1", "$n", "'('", "*", "a*", "$(ls)", "~"])
            operator = self.random.choice(["==", "=", "!=", "=~", "<", ">", "-eq", "-lt", "-nt"])
            forms = [
                f"{operand()} {operator} {operand()}", f"-n {operand()}",
                operand(),
                f"! {operand()} && {operand()}", f"( {operand()} || {operand()} )",
            ]
            return f"[[ {self.random.choice(forms)} ]]"
        return self.some(
            self.simple,
            lambda: "(( %s ))" % self.random.choice(["n", "1", "n > 2", "n = 1", "0", "x"]),
            lambda: "no a",
            self.chain,
        )

    def control(self) -> str:
        do, done = self.random.choice([("; do ", "; "), (" ; do\n" if not self.pending else "; do ", ";")])
        kind = self.random.randrange(7)
        if kind == 0:
            middle = self.random.choice(
                ["", "else " + self.lines(1, ";"), "elif " + self.condition() + "; then " + self.lines(1, ";")]
            )
            return f"if {self.condition()}; then {self.lines(1, ';')}{middle} fi"
        if kind == 1:
            return f"while no{self.random.choice(['', ' a', ' $(ls)'])}{do}{self.lines(1, ';')}done"
        if kind == 2:
            return f"while read -r {self.random.choice(NAMES)}{do}{self.lines(1, ';')}done <<< {self.value()}"
        if kind == 3:
            words = " ".join(self.word() for _ in range(self.random.choice((0, 1, 2, 3))))
            body = f"{self.simple()} {self.variable()} {self.variable()};{self.lines(1, ';')}"
            return f"for {self.random.choice(NAMES)} in {words}{do}{body}done"
        if kind == 4:
            return f"for ((n = 0; n < 2; n++)){do}{self.lines(1, ';')}done"
        if kind == 5:
            patterns = [
                self.random.choice(["a", "*", "'b c'", "$x", "x|y", "(a", "[ab]", "no", '""', "~", "a\\)", "if", "(esac"])
                for _ in range(2)
            ]
            clauses = "".join(f"{p}) {self.lines(1, '')}{self.random.choice([';; ', ' ;;'])}" for p in patterns)
            return f"case {self.word()} in {clauses} esac"
        self.functions += 1
        name, local = (
            f"f{self.functions}",
            self.random.choice(["", "", "local x; ", "local x=a; ", "local z=$x; ", 'x="$1"; ', '"$@"; ', "shift; "]),
        )
        call = self.random.choice(
            [name, f"{name} {self.word()}", f"x={self.value()} {name} a", f"{name} {self.word()} {self.word()}"]
        )
        return f"{name}{self.random.choice(['()', ' ()', '( )'])} {{ {local}{self.lines(1, ';')}}}{self.separator()}{call}"

    def statement(self) -> str:
        self.depth += 1
        kinds = [self.simple] * 8 + [self.assignment] * 3
        if self.depth < 4:
            kinds += [self.pipeline, self.chain, self.group, self.prefixed] + (
                [] if self.straight else [self.control] * 4 + [self.condition]
            )
        text = self.some(*kinds)
        self.depth -= 1
        return text

    def lines(self, count: int, end: str) -> str:
        """Commands in a level of their own, with `end` or a new line behind the last."""
        self.depth += 1
        outer, self.pending = self.pending, []
        text = ""
        for at in range(count):
            text += self.statement() + (self.separator() if at < count - 1 else "")
        text += self.line() if self.pending else end and self.random.choice([end + " ", "\n"])
        self.pending, self.depth = outer, self.depth - 1
        return text

    def script(self) -> str:
        if not self.straight and self.often(0.2):
            return "".join(self.random.choice(SOUP) for _ in range(self.random.randrange(2, 30)))
        text = self.lines(self.random.choice((1, 1, 2, 3, 4)), "")
        for _ in range(0 if self.straight else self.random.choice((0, 0, 0, 1, 2))):
            at = self.random.randrange(len(text) + 1)
            insert = self.random.choice([*"'\"\\$`(){}[]<>|&;#!~*?=,\n \t", "\\\n", *ODD, "", "", "", text[at : at + 1] * 2])
            text = text[:at] + insert + text[at + 1 - self.random.randrange(2) :]
        return text


class Outcome(NamedTuple):
    """Of some scripts: how many were recognised, how many ran straight, and what differed."""

    recognised: int
    straight: int
    different: list[tuple[int, str, str]]


def compare(first: int, count: int) -> Outcome:
    """Scripts `first` and those after it: every third runs straight."""
    recognised = straight = 0
    different = []
    with tempfile.TemporaryDirectory() as folder:
        bash = Bash(folder)
        for number in range(first, first + count):
            maker = Maker(f"{SEED}:{number}", number % 3 == 0)
            text = maker.script()
            if UNSAFE.search(text.replace("/dev/null", "")):
                continue
            found = difference(bash, text, maker.straight, maker.ordered)
            recognised += found is not None
            straight += found is not None and maker.straight
            if found:
                different.append((number, text, found))
    return Outcome(recognised, straight, different)


# Texts that are easily misread: as bash does, or not at all

TRAPS = r"""
xx "`git "{a,b}"`" ¦ xx "`git "{a..c}"`" ¦ xx "`git {a,b}`" ¦ xx `git "{a,b}"` ¦ xx "$(git "{a,b}")" ¦ xx $${a,b}
xx \${a,b} ¦ xx '$'{a,b} ¦ xx "$"{a,b} ¦ xx $?{a,b} ¦ xx "${x}"{a,b} ¦ xx "`git "~" "*" "$x"`" ¦ xx a;\⏎&>f ¦ [[\⏎
xx {a,"`git "{b,c}"`"}
xx {a,$(git {b,c})} ¦ xx $#{a,b} ¦ xx {a,`git {b,c}`} ¦ xx {a,$((1,2))} ¦ xx {a,<(git {b,c})} ¦ xx {a,'b,c'} ¦ xx {a,"b,c"}
xx {a,$'b,c'}
xx {a,\,} ¦ xx {a,${x:-b,c}} ¦ xx {a,"$(git ",")"}
x=-v; printf "$x" z sudo; $z id ¦ c=printf; command $c -v z sudo; $z id ¦ c=command; $c printf -v z sudo; $z id
c=printf; builtin "$c" -v z sudo; $z id ¦ x=-vz; printf $x sudo; $z id
x="$(case x in (esac) git '$(sudo id)';; esac)" ¦ xx "$(case x in y) ls;; (esac|z) git '`sudo id`';; esac)" ¦ xx $(>&2 ! sudo id)
ls >(2>f ! sudo id) ¦ xx "$(<<< a time -p ! sudo id)" ¦ xx `>f ! git` ¦ z=$(f() { >f ! sudo id; }; f) ¦ x() {a,b} ¦ xx $(>f { git)
xx "$(<<E ! sudo id⏎E⏎)" ¦ xx $(>f x=1 ! git) ¦ xx $(>f [[ -v 'a[$(sudo id)]' ]]) ¦ xx "$(a <<'E' | b⏎)'$(sudo id)⏎E⏎)"
xx "$(f() { a <<'E'; b; }⏎$(sudo id)⏎E⏎f)" ¦ xx "$(a <<'E' || b <<'F'⏎$(sudo id)⏎E⏎$(sudo id)⏎F⏎)"
xx "$(a $'x\'y' '$(sudo id)')"
xx "$(a \' '$(sudo id)')" ¦ xx "$(case a in a) b <<'E';; esac⏎$(sudo id)⏎E⏎)" ¦ xx "$([[ $'\'' == '$(sudo id)' ]] && b)"
$"sudo" id ¦ $"su"do id ¦ xx {$,a}"b" ¦ xx {$,a}'b' ¦ xx a$"b" ¦ su\⏎do id ¦ !\⏎ sudo id ¦ coproc\⏎ sudo id ¦ time\⏎ls
xx 2\⏎>f ¦ (\⏎(x)) ¦ xx $HO\⏎ME ¦ xx a\⏎b\⏎ c ¦ x=1\⏎2; xx $x ¦ xx a \⏎\⏎b ¦ xx a\⏎\⏎b ¦ if\⏎ xx; then xx; fi ¦ xx |\⏎| git
xx &\⏎& git ¦ xx \⏎#a ¦ xx a\⏎#b ¦ xx <<E\⏎OF⏎EOF ¦ xx "a\⏎b" ¦ xx 'a\⏎b' ¦ #\⏎sudo id ¦ xx \⏎⏎git ¦ xx {b..d} ¦ xx {01..3}
xx {1..9..4} ¦ xx {-0..2} ¦ xx {1..10000}x ¦ xx {a},b} ¦ xx {a,b}} ¦ xx {a,{b} ¦ xx {a,b}{c ¦ xx {,} ¦ xx {"",,a}
xx a{b,c{d,e}f ¦ xx {a,b ¦ xx }{a,b} ¦ xx {{a,b},c} ¦ xx {{a},b} ¦ xx {a{b,c},d} ¦ xx {a,b}{1..2} ¦ xx {1..3,a} ¦ xx {{1..2},a}
xx {a..b,c} ¦ xy=sudo; xz=git; x=ls; $x{y,z} id ¦ xy=sudo; {$x,git}y id ¦ xx {$,a}HOME ¦ xx {~,a}/b ¦ xx ~{/a,b} ¦ xx x={~,a}
xx {x,y}=~/a ¦ xx {"a","b c"} ¦ x={a,b}; xx $x ¦ export x={a,b}; xx $x ¦ declare z={a,~}; xx $z ¦ xx x={a,b} ¦ {xx,a} b
{x=1,xx} a ¦ xx a{b,c}"{d,e}" ¦ xx '{a,b}'{c,d} ¦ z=ls; printf -v z sudo; $z id ¦ z=ls; command export z=sudo; $z id
z=ls; builtin declare z=sudo; $z id ¦ z=ls; z=sudo export z; $z id ¦ z=ls; ls=z; read $ls <<< sudo; $z id
z=ls; read 'z[0]' <<< sudo; $z id ¦ z=ls; declare 'z[0]=sudo'; $z id ¦ z=ls; ls=z=sudo; export $ls; $z id
z=git; f() { local z; $z sudo id; }; f ¦ z=ls; f() { $z id; }; z=sudo f ¦ local z=ls; xx $z ¦ z=ls; z[0]=sudo; $z id
z=ls; z+=x; $z id ¦ z=ls; unset z; $z id a ¦ z=ls; (z=sudo); $z id ¦ z=ls; { z=sudo; }; $z id ¦ z='-v a[$(sudo)]'; [ $z ]
z='-v a[$(sudo)]'; test $z ¦ command test -v 'a[$(sudo id)]' ¦ z=ls; command printf -v z sudo; $z id ¦ xx a\:~ z=a\:~/b; xx $z
z=ls | xx; $z id ¦ z=ls & $z id ¦ z=ls >nowhere/f; $z id ¦ z=ls >f; $z id ¦ z=ls 2>&9; $z id ¦ z=ls; z=$z$z; $z id
z="sudo ls"; for x in $z; do "$x" id; done ¦ for x in a "b c" $y; do "$x" $x; done ¦ for x in $(echo a b); do "$x" id; done
for z; do :; done; xx $z ¦ PWD=a; cd .; xx $PWD ¦ xx ~; HOME=a ¦ HOME=a; xx ~ ¦ HOME=a xx ~ ¦ GROUPS=ls; $GROUPS id
UID=ls; $UID id ¦ xx "$PPID$UID$SHLVL" ¦ BASH_ARGV0=a; xx $0 ¦ xx "$(cat <<'E' <<< 'a'⏎b⏎E⏎)"
xx "$(cat >/dev/null <<'E'⏎a⏎E⏎)" ¦ xx "$(cat 3<<'E'⏎a⏎E⏎)" ¦ cat() { xx; }; xx "$(cat <<'E'⏎a⏎E⏎)"
cat <<E⏎`ls \"; sudo id; \"`⏎E ¦ xx "`ls \"; sudo id; \"`" ¦ xx `ls \"; sudo id; \"` ¦ xx "`ls \\"a b\\"`" ¦ xx `ls '\`'`
xx `ls "\$x" \$x '\$x'` ¦ cat <<E⏎"$(ls ")⏎E ¦ xx <<E⏎a\⏎E⏎sudo id⏎E ¦ xx <<'E'⏎a\⏎E⏎git⏎E ¦ xx <<-E⏎	$(ls)⏎	E⏎git
xx <<E; git⏎$(ls)⏎E⏎sudo ¦ xx <<E⏎${x:-`ls`}⏎E ¦ xx <<E⏎$(ls⏎E⏎)⏎E ¦ xx "$(git <<E⏎a⏎E⏎)" ¦ { xx <<E⏎}⏎E⏎}
(xx <<E)⏎$(ls)⏎E⏎git ¦ xx <<A <<B⏎$(ls)⏎A⏎$(git)⏎B⏎sudo ¦ if xx <<E; then⏎a⏎E⏎git; fi ¦ xx x<(ls) ¦ xx 2<(ls) ¦ xx <(ls)x
xx >(ls)<(git) ¦ xx < <(ls) ¦ xx <(ls; git) a ¦ xx "<(ls)" ¦ xx x=<(ls) ¦ xx 99999999999999999999>f ¦ xx 2>f 3 >g ¦ 2>f xx 2
xx a2>f ¦ xx \2>f ¦ xx "2">f ¦ xx 2>>f ¦ xx 2&>f ¦ > 2>f ¦ xx >&f ¦ xx &>f; git ¦ xx >& 1 ¦ xx >&-a ¦ {xx}>f ¦ xx {x}>f
xx a}>f ¦ >f if a ¦ >f if ¦ x=1 if ¦ f() { xx $(($1)); }; f 'a[$(sudo id)]' ¦ : 'a[$(sudo id)]'; xx $((_))
read <<< 'a[$(sudo id)]'; xx $((REPLY)) ¦ z='a[$(sudo id)]'; xx $((z)) ¦ z=ls; y=; z=sudo $y; $z id ¦ z=ls; z=sudo $(:); $z id
z=; xx $z'' ¦ xx $nothing"" a ¦ xx $(x=(\; sudo id)) ¦ xx $(x=(\|\| git)) ¦ xx <(x=('|' git)) ¦ a1='z[$(sudo id)]'; xx $((a$n))
x='z[$(sudo id)]'; ((x)) ¦ z=-i; declare "$z" y='a[$(sudo id)]' ¦ z='a[$(sudo id)]'; [[ $z -eq 1 ]]
[[ 'a[$(sudo id)]' -eq 1 ]] ¦ z=(['a[$(sudo id)]']=1) ¦ z=([$(sudo id)]=1) ¦ a['b[$(sudo id)]']=1 ¦ z='a[$(sudo id)]'; xx ${y:z}
z='a[$(sudo id)]'; xx "${#y[z]}" ¦ ((z='a[$(sudo id)]')) ¦ z='a[$(sudo id)]'; for ((n = z; n < 1; n++)); do :; done
z=y; y='a[$(sudo id)]'; xx $((z)) ¦ z='a[$(sudo id)]' f; f() { xx $((z)); }; z='a[$(sudo id)]' f ¦ [ -v 'a[$(sudo id)]' ]
test -v 'a[$(sudo id)]' ¦ printf -v 'a[$(sudo id)]' b ¦ read 'a[$(sudo id)]' <<< b ¦ xx "$@" a ¦ xx "${z[@]}" a ¦ xx $! a
xx "$!" ¦ f() { xx "$@"; }; f a 'b c' ¦ f() { xx $* "$*"; }; f a 'b c' ¦ xx [$x ¦ z='a b'; xx [$z ¦ z='a]/../b'; xx [a$z
a[ # ] ; sudo id⏎] ¦ x=1 a[ # ] ; sudo id⏎] ¦ export a[ # ] ; sudo id⏎] ¦ z=(a[ # ] ) ; sudo id⏎) ¦ z=([a ";") ¦ l[s; sudo id ]
a[1 2]=3 xx ¦ [[ a[ # ] ]] ; sudo id ¦ xx ~"/x" ¦ xx ~\/x ¦ xx ~'' ¦ xx a":"~/x ¦ z="a:"~/x; xx $z ¦ z=a:~/x; xx $z ¦ xx z=~/x
xx --z=~/x ¦ xx a:~ ¦ z=~; xx "$z" ¦ z="~"; xx $z ¦ z='*'; xx "$z" $z ¦ a=(1)b c ¦ a=(1 2)#x ¦ z= (ls) ¦ z=() xx ¦ z=(a b) xx $z
a=(b)c=d xx ¦ z=$(ls)xx; $z ¦ z=a xx=b git ¦ =a xx ¦ a =b ¦ 1a=b xx ¦ "a"=b xx ¦ a\=b xx ¦ a+=b xx ¦ time -p ! sudo id
time -p xx ¦ time ! xx ¦ ! time xx ¦ xx | ! git ¦ xx | time git ¦ ! ¦ ! ! xx ¦ !xx ¦ time ¦ time; xx ¦ !; xx ¦ time -- xx
time -p -- xx ¦ ! { xx; } ¦ if() { xx; } ¦ time() { xx; } ¦ in() { xx; }; in ¦ !() { xx; } ¦ f() { xx; }; \f ¦ f()(xx); f
f() { xx; } >g; f ¦ f() { xx; }; f >g ¦ f() { xx $1; }; f sudo ¦ f () ( xx ) ¦ xx a;&>f ¦ (xx);&>f ¦ xx ;;git
case a in a) xx;& b) git;; esac ¦ case a in a) xx;;& b) git;; esac ¦ case if in if) xx;; esac ¦ case a in (a) xx esac
case a in (a) xx;esac ¦ xx #a⏎git ¦ xx a#b ¦ xx ''#b ¦ xx "a"#b ¦ (xx)#a ¦ {xx;}#a ¦ { xx; }#a ¦ xx;#a ¦ xx $#a ¦ xx ${#x}#a
xx $x#a ¦ xx `ls #a` b ¦ xx $(ls #a⏎) b ¦ xx {#,a} ¦ xx <<< #a ¦ xx ]] ¦ ]] ¦ [[ ]] ¦ [[ a ]]b ¦ [[ a == [[ ]]
[[ a =~ (b|c) ]] ¦ [[ a<b ]] ¦ [[ -f a && b ]] ¦ [[ a⏎== b ]] ¦ [[ ! a ]] ¦ [[ (a) ]] ¦ [[ a = ] ]] ¦ [[ $(sudo id) ]]
[[ ! > $n ]] ¦ ((ls)) ¦ ((ls); xx) ¦ ( (ls); xx) ¦ $((ls); xx) ¦ $( (ls); xx) ¦ xx $((1)) $(( 2 )) ¦ ((1)) && xx ¦ (((1)))
((n=1)); xx $n ¦ xx $[1] ¦ ((x)) >f ¦ for ((n=0;n<1;n++)) do xx; done ¦ xx $'\8' ¦ xx $'\x' ¦ xx $'\x412' ¦ xx $'\1011'
xx $'a\'b' ¦ xx "$'a'" ¦ xx $'a'$'b' ¦ xx $'\x24x' ¦ xx $ ¦ xx a$ b ¦ xx "$" ¦ xx "$ " ¦ xx $= ¦ xx $: ¦ xx $$a ¦ xx $% ¦ %x a
'' a ¦ \x x ¦ "" ¦ 'a b' c ¦ $z xx ¦ "$z" xx ¦ ${z}xx ¦ $z$z xx ¦ `:` xx ¦ $(echo xx) a ¦ "$(echo xx a)" ¦ \!xx ¦ xx !$ ¦ xx !!
xx ^a^b ¦ xx "!x" ¦ *xx ¦ [xx] ¦ ~xx ¦ for z in a b⏎do xx $z⏎done ¦ for z in a; do xx; done; xx $z ¦ while no; do xx; done
until xx; do git; done ¦ for do in a; do xx $do; done ¦ { xx; } ¦ {xx; } ¦ { xx;} ¦ {⏎xx⏎}
"""
HIDDEN = r"""
eval 'sudo id' ¦ trap 'sudo id' EXIT ¦ . /dev/stdin <<< 'sudo id' ¦ mapfile -C 'sudo id' -c 1 <<< a ¦ compgen -C 'sudo id'
jobs -x sudo id ¦ shopt -s expand_aliases⏎alias ls='sudo id'⏎ls ¦ let 'a[$(sudo id)]' ¦ z=ls; mapfile -t z <<< sudo; $z id
compgen -W '$(sudo id)' ¦ z=ls; getopts s z -s; $z id ¦ z=ls; let z=5; $z id ¦ z=ls; eval z=sudo; $z id
ls=read; z=ls; $ls z <<< sudo; $z id ¦ ls=printf; z=ls; $ls -v z sudo; $z id ¦ ls=export; z=ls; $ls z=sudo; $z id
f() { z=sudo; }; z=ls; f; $z id ¦ z=sudo; "$z" id ¦ set +B; {sudo,id} ¦ source <(echo sudo id) ¦ z='sudo id'; $z
z=sudo; ${z} id ¦ command sudo id ¦ builtin eval 'sudo id' ¦ command -p sudo id
"""
ROWS = [*test_shell.WORDS, *test_shell.REST, *test_shell.VALUES]


def cells(table: str) -> list[str]:
    return [cell.replace("⏎", "\n") for row in table.strip().split("\n") for cell in row.split(" ¦ ")]


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory) -> Bash:
    return Bash(str(tmp_path_factory.mktemp("bash")))


def report(number: int, text: str, found: str) -> str:
    return f"seed {SEED}, script {number}\n{text}\n{text!r}\n{found}"


@pytest.mark.parametrize("text", cells(TRAPS))
def test_what_is_easily_misread_is_not_misread(bash: Bash, text: str) -> None:
    assert not difference(bash, text)


@pytest.mark.parametrize("text", cells(HIDDEN))
def test_what_runs_text_or_sets_variables_by_a_name_is_never_allowed(text: str) -> None:
    call = oppi.Call("bash", {"command": text})
    assert oppi.evaluate(call, oppi.Context("", "", preset="host")).action != "allow"


@pytest.mark.parametrize("text", [text for text, _ in ROWS])
def test_the_tables_are_true_of_bash(bash: Bash, text: str) -> None:
    assert difference(bash, text) == ""


@pytest.mark.parametrize("text", next(texts for reason, texts in test_shell.NOT_RECOGNISED if "syntax error" in reason))
def test_bash_does_not_read_what_the_table_calls_a_syntax_error(bash: Bash, text: str) -> None:
    assert SYNTAX_ERROR.search(subprocess.run([BASH, "-n", "-c", text], capture_output=True, text=True).stderr)


def test_what_bash_does_otherwise_is_noticed(bash: Bash, monkeypatch: pytest.MonkeyPatch) -> None:
    recognised = oppi.parse_shell("")
    assert recognised

    def differs(*commands: str, straight: bool = False, **values: list[str]) -> str:
        claimed = recognised._replace(commands=[oppi.Command(tuple(words.split(" "))) for words in commands], values=values)
        monkeypatch.setattr(oppi, "parse_shell", lambda text: claimed)
        return difference(bash, "xx a $x; git '' >f", straight, True) or ""

    assert "wrote ['f']" in differs("xx a environ", "git ")
    assert "ran [('git', '')]" in differs("xx a \1x\0", "git")
    assert "ran [('xx', 'a', 'environ')]" in differs("xx a \1x\0", "git ", x=["b"])
    monkeypatch.setattr(Bash, "emptied", lambda self: [])
    assert differs("xx a \1x\0", "git ", x=["b", "\0x\0"]) == differs("xx \1\0", "git \0\0", straight=True) == ""
    assert "another order" in differs("git ", "xx a environ", straight=True)
    assert "only or too often" in differs("git ", "xx a environ", "xx", straight=True)


def test_scripts_made_at_random_are_read_as_bash_reads_them() -> None:
    share = -(-SCRIPTS // WORKERS)
    command = [sys.executable, "-m", "tests.unit.test_bash"]
    workers = [
        subprocess.Popen([*command, str(share * at), str(share)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for at in range(WORKERS)
    ]
    outcomes = [Outcome(*json.loads(worker.communicate()[0])) for worker in workers]
    different = [report(*row) for outcome in outcomes for row in outcome.different]
    assert not different, "\n\n".join(different[:20])
    assert sum(outcome.recognised for outcome in outcomes) > SCRIPTS // 3
    assert sum(outcome.straight for outcome in outcomes) > SCRIPTS // 8


if __name__ == "__main__":
    print(json.dumps(compare(int(sys.argv[1]), int(sys.argv[2]))))
