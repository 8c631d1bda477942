"""The shell grammar: recognised exactly, or not at all.  `test_bash` compares these tables with the real bash."""

from __future__ import annotations

import re
import shlex
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import oppi

from .support import many

MARKS = {"\0": "‹%s›", "\1": "«%s»"}


def shown(word: str) -> str:
    """A word as the tables write it: ‹x› one word of a variable, «x» any number of them, ✱ a glob."""
    text = oppi.MARK.sub(lambda mark: MARKS[mark.group(1)] % mark.group(2) if mark.group(1) else "✱", word)
    return text if re.fullmatch(r"[^\s'|]+", text) else repr(text)


def commands_of(text: str) -> list[oppi.Command]:
    script = oppi.parse_shell(text)
    assert script is not None, text
    return script.commands


def words_of(text: str) -> str:
    """The commands of a text as the tables write them; those without a program are left out."""
    return " ; ".join(" ".join(map(shown, command.words)) for command in commands_of(text) if command.words)


WORDS: list[tuple[str, str]] = [
    # lists and pipes
    ("ls", "ls"),
    ("  git  push\torigin ", "git push origin"),
    ("a && b || c; d\ne", "a ; b ; c ; d ; e"),
    ("a; \n\n b;", "a ; b"),
    ("a | b |& c", "a ; b ; c"),
    ("a |\n\n b &&\n c || # why\n d", "a ; b ; c ; d"),
    ("a & b &", "a ; b"),
    ("a&b&&c;d|e", "a ; b ; c ; d ; e"),
    ("! a; ! ! b && time c; time -p d", "a ; b ; c ; d"),
    ("time ! a", "a"),
    ("!a b", "!a b"),
    # comments and lines that go on
    ("# don't panic", ""),
    ("# a\n\n  # b\nls # c `d` $(e)\n#f", "ls"),
    ("ls a#b #c", "ls a#b"),
    ("ls \\\n -la \\\n  x", "ls -la x"),
    ("a && \\\n b | \\\n c", "a ; b ; c"),
    ("su\\\ndo i\\\n\\\nd; a\\\n b\\\n", "sudo id ; a b"),
    ("é ü\\\nx 名", "é üx 名"),
    ("a |\\\nb &&\\\n c; \\\nd", "a ; b ; c ; d"),
    ("a 'x\\\ny'", "a 'x\\\\\\ny'"),
    ("", ""),
    (" \n\t\n", ""),
    # quotes
    ("xx 'a b' \"c  d\" ''", "xx 'a b' 'c  d' ''"),
    ("xx '$x `y` \\ \"q\"'", "xx '$x `y` \\\\ \"q\"'"),
    ("\"su\"'do' i\\d", "sudo id"),
    ("s\\udo \\-\\- a\\ b \\; \\| \\$x \\*", "sudo -- 'a b' ; '|' $x *"),
    ('xx "\\"\\$\\`\\\\ \\a"', "xx '\"$`\\\\ \\\\a'"),
    ("xx \"it's\" 'a\nb' \"a\nb\"", 'xx "it\'s" \'a\\nb\' \'a\\nb\''),
    ("xx $'a\\tb\\n\\\\\\'\\\"' $'\\x41\\101\\x7a' $'a'b", "xx 'a\\tb\\n\\\\\\'\"' AAz ab"),
    ("xx \"é\" 'ü\u2028\u00a0'", "xx é 'ü\\u2028\\xa0'"),
    ("xx \"\" '' \"\"'' a\"\"", "xx '' '' '' a"),
    ("'if' a; \\then; \"{\" b; i\\f", "if a ; then ; { b ; if"),
    # words that are keywords elsewhere
    ("xx if then fi do done case esac in { } ! [[ ]] time function",
        "xx if then fi do done case esac in { } ! ✱ ]] time function"),
    ("ifx a; dox b; }c d; {e f", "ifx a ; dox b ; }c d ; {e f"),
    ("xx a=b --c=d =e a=", "xx a=b --c=d =e a="),
    ("xx $ a$ $% \"$\" $: a=$", "xx $ a$ $% $ $: a=$"),
    ("[ -f a ] && test b = c", "[ -f a ] ; test b = c"),
    ("x=a; [ $x = a ]; x=ls; $x a", "[ «x» = a ] ; «x» a"),
    # braces
    ("xx {a,b} {a,b}{c,d} x{,y}z {a,{b,c}d}e", "xx a b ac ad bc bd xz xyz ae bde cde"),
    ("xx {1..3} {3..1} {-1..1} a{2..2}b {1..2}{a,b}", "xx 1 2 3 3 2 1 -1 0 1 a2b 1a 1b 2a 2b"),
    ("xx {a} {} { } {a, b} a,b {a\\,b} '{a,b}' \"{a,b}\"", "xx {a} {} { } {a, b} a,b {a,b} {a,b} {a,b}"),
    ("xx {'a b',\"c\",d} {,}", "xx 'a b' c d"),
    ("{ls,-la} | {a,b}c", "ls -la ; ac bc"),
    ('xx "$x"{a,b} ${x}{a,b} a{b,"$x"}', "xx ‹x›a ‹x›b «x»a «x»b ab a‹x›"),
    ("xx {a,b}} {{a,b} a}{b,c", "xx a} b} {a {b a}{b,c"),
    ("xx a={b,c}", "xx a=b a=c"),
    # tildes and globs
    ("xx ~ ~/a a~ a/~ \\~ '~' \"~\" a=~/b a=b:~", "xx ‹HOME› ‹HOME›/a a~ a/~ ~ ~ ~ a=‹HOME›/b a=b:‹HOME›"),
    ("xx * a*.py a?b [a-z]x \\* '*' \"[a]\" a[ [", "xx ✱ a✱.py a✱b ✱ * * [a] a✱ ["),
    ("xx ~/*.py */[!a]/b", "xx ‹HOME›/✱.py ✱/✱/b"),
    # variables
    ("xx $x ${x} \"$x\" \"${x}\" a$x\"b\"", "xx «x» «x» ‹x› ‹x› a«x»b"),
    ("$x a; \"$x\" b", "«x» a ; ‹x› b"),
    ("xx $1 \"$2\" $@ $* \"$*\" $- \"$-\" ${10} \"${1}\"", "xx «» ‹› «» «» ‹› «» ‹› «» ‹›"),
    ("xx $# $? $$ \"$?\" ${#x} ${#x[@]} ${#x[*]}", "xx ‹#› ‹#› ‹#› ‹#› ‹#› ‹#› ‹#›"),
    ("xx ${x:-a b} \"${x:-a b}\" ${x-} ${x:+y} ${x+y}", "xx «» ‹› «» «» «»"),
    ("xx ${x%.py} ${x%%/*} ${x#*/} ${x##*/} ${x/a/b} ${x//a/b}", "xx «» «» «» «» «» «»"),
    ("xx ${x^} ${x^^} ${x,} ${x,,} ${x:1} \"${x:1:2}\"", "xx «» «» «» «» «» ‹›"),
    ("xx ${x[0]} \"${x[*]}\" ${x[@]}", "xx «» ‹› «»"),
    ("xx $_ $RANDOM \"$BASH_VERSION\" $LINENO $REPLY", "xx «» «» ‹› «» «»"),
    ("xx $((1 + 2)) \"$((x * 2))\" a$((1))b", "xx ‹#› ‹#› a‹#›b"),
    ("((x = 1)); (( x < 2 )) && a", "a"),
    # assignments
    ("A=1 B='c d' xx; C=2", "xx"),
    ("A=1", ""),
    ("A=(a $(b) 'c d'\n e # f\n) D=()", "b"),
    ("A=$(b)", "b"),
    ("A+=b; A+=(c)", ""),
    ("export A=1 B; readonly C=2; typeset -r D=3; declare -x E=5",
        "export A=1 B ; readonly C=2 ; typeset -r D=3 ; declare -x E=5"),
    # redirections: no words of the command
    ("a >b 2>>c <d 2>&1 >&2 1>&- 3<&0 <>e >|f &>g &>>h >& i 2>&1-", "a"),
    ("> b a c", "a c"),
    ("a 2>'b c' \"2\">d 3 >e f2>g", "a 2 3 f2"),
    ("a <<< 'b c' d; <<< x", "a d"),
    ("xx >(a) <(b | c) <(d)e", "a ; b ; c ; d ; xx /dev/fd/‹#› /dev/fd/‹#› /dev/fd/‹#›e"),
    # heredocs
    ("a <<E b\nit's $x\nE\nc", "a b ; c"),
    ("a <<'E'\n$(b)\nE", "a"),
    ("a <<\\E; b\n$(c)\nE\nd", "a ; b ; d"),
    ("a <<E\n$(b) `c` $((1)) \"${x}\n'$(e)'\" \\$(f) \\`g \\\\\nE", "a ; b ; c ; e"),
    ("a <<-E | b\n\tc\n\t\tE\nd", "a ; b ; d"),
    ('a << "E.1-x" &&\n E\nE.1-x\nb', "a ; b"),
    ("a <<E\nE", "a"),
    ("(a <<E)\nb\nE\nc", "a ; c"),
    ("a <<E\n E\nEE\nE \n\nE\nb", "a ; b"),
    ('xx "$(cat <<\'E\'\na b\n\nE\n)"', "cat ; xx 'a b'"),
    ('xx "$(cat <<E\na\nE\n)" "$(cat -n <<\'E\'\na\nE\n)" $(cat <<\'E\'\na\nE\n)', "cat ; cat -n ; cat ; xx ‹› ‹› «»"),
    # substitutions
    ("xx $(a b) \"$(c \"d e\")\" x$(f)", "a b ; c 'd e' ; f ; xx «» ‹› x«»"),
    ("xx `a b` \"`c`\" x`d`", "a b ; c ; d ; xx «» ‹› x«»"),
    ("xx \"`a 'b c'`\" `d \"e\" $x`", "a 'b c' ; d e «x» ; xx ‹› «»"),
    ("xx $(a # )\n) $(b\n) $( (c) )", "a ; b ; c ; xx «» «» «»"),
    ("xx $(<a) $(case a in b) c ;; esac)", "c ; xx «» «»"),
    # groups and control structures
    ("(a; b) | { c; d; } && ( (e) )", "a ; b ; c ; d ; e"),
    ("{ a\n}\n(b\n)", "a ; b"),
    ("if a; then b; elif c; then d; else e; fi", "a ; b ; c ; d ; e"),
    ("if a\nthen # x\n b\nfi >c", "a ; b"),
    ("if ! a && b; then c & fi", "a ; b ; c"),
    ("while no; do b; done; until a\ndo\n b\ndone", "no ; b ; a ; b"),
    ("for x in a b; do c $x; done", "c «x»"),
    ("for x in *.py\ndo c \"$x\"\ndone", "c ‹x›"),
    ("for x; do a; done; for x do b; done; for x\nin 1; do c; done; for x in; do d; done", "a ; b ; c ; d"),
    ("for ((i = 0; i < 3; i++)); do a $i; done; for ((i=0;i<1;i++)) do b; done", "a «i» ; b"),
    ("case $x in a) b;; (c|d) e\n;; *) f; esac", "b ; e ; f"),
    ("case a\nin esac; case x in 'a b'|\"c\") ;; [a-z]*) g;; esac", "g"),
    ("case $(a) in $(b)) c ;; esac", "a ; b ; c"),
    ("f() { a; }; f; g ( ) ( b )\ng-h.i:j ()\n{ c\n}", "a ; f ; b ; c"),
    ("f() { a; } >b; f", "a ; f"),
    ("a | while read x; do b; done < c", "a ; read x ; b"),
    ("if [[ -f a && $x == b* || ! c < d ]]; then e; fi", "e"),
    ("[[ $x =~ ^[0-9]+$ ]] && [[ 1 -lt 2 ]] && [[ $? -eq 0 ]] && [[ \"$x\" == $(a) ]]", "a"),
    ("(a) >b & { c; } 2>&1", "a ; c"),
]  # fmt: skip

REST: list[tuple[str, dict[str, Any]]] = [
    # what is written and read
    ("a > b 2>>'c d' < e <>f", {"writes": ("b", "c d", "f"), "reads": ("e", "f")}),
    ("a &>b >|c >&d &>>e", {"writes": ("b", "c", "d", "e")}),
    ("a >/dev/null 2>/dev/stderr >/dev/stdout </dev/null", {"reads": ("/dev/null",)}),
    ("a >~/b >$x >\"$x\" >c* 2>&1 >&-", {"writes": ("\0HOME\0/b", "\1x\0", "\0x\0", "c\2")}),
    ("> a", {"words": (), "writes": ("a",)}),
    ("a < <(b)", {"words": ("a",), "reads": ("/dev/fd/\0#\0",), "fed": True}),
    ("a > >(b)", {"words": ("a",), "writes": ("/dev/fd/\0#\0",), "fed": False}),
    ("{ a; } >b <c", {"words": (), "writes": ("b",), "reads": ("c",)}),
    # the assignments before a program, or instead of one
    ("A=1 B= C+=c D=$x E=~/e:~ F=(g) h", {"words": ("h",), "sets": (
        ("A", "1"), ("B", ""), ("C", "\0\0"), ("D", "\1x\0"), ("E", "\0HOME\0/e:\0HOME\0"), ("F", "\0\0"))}),
    ("A={b,c} B=*", {"words": (), "sets": (("A", "{b,c}"), ("B", "\2"))}),
    # fed: its input is what another command prints, or text of the script
    ("a | b", {"words": ("b",), "fed": True}),
    ("a |& b", {"words": ("b",), "fed": True}),
    ("a | b && c", {"words": ("c",), "fed": False}),
    ("a | { b; c; }", {"words": ("c",), "fed": True}),
    ("a | if b; then c; fi", {"words": ("c",), "fed": True}),
    ("a | (b); c", {"words": ("c",), "fed": False}),
    ("a <<< b", {"fed": True}),
    ("a <<E\nE", {"fed": True}),
    ("(a) <<E\nE", {"words": ("a",), "fed": True}),
    ("while no; do b; done <<< c", {"words": ("b",), "fed": True}),
    ("a >(b)", {"words": ("a", "/dev/fd/\0#\0"), "fed": False}),
    ("a | b <(c) >(d)", {"words": ("b", "/dev/fd/\0#\0", "/dev/fd/\0#\0"), "fed": True}),
    ("f() { a; }", {"words": ("a",), "fed": True}),
    # within: the functions and loops it is part of
    ("f() { g() { a; }; }", {"within": ("f", "g")}),
    ("while no; do for x in 1; do b; done; done", {"words": ("b",), "within": ("while", "for")}),
    ("while no; do b; done; c", {"words": ("c",), "within": ()}),
    ("f() { a; }; f", {"words": ("f",), "within": ()}),
    # text: the literal heredoc that it reads
    ("a <<'E'\nb\n\tc\nE", {"text": "b\n\tc\n"}),
    ("a <<-'E'\n\tb\n\t\tc\n\tE", {"text": "b\nc\n"}),
    ("a <<\\E\n$x\nE", {"text": "$x\n"}),
    ("a <<E\nb\nE", {"text": ""}),
    ("a $(b) <<'E' | c\nd\nE", {"words": ("c",), "text": ""}),
    ("(a) <<'E'\nb\nE", {"text": ""}),
    # then: whatever stands behind it runs only if it worked
    ("a && b", {"words": ("b",), "then": True}),
    ("a", {"then": True}),
    ("a && b | c", {"words": ("b",), "then": False}),
    ("! a", {"then": False}),
    ("a && { b; }", {"words": ("b",), "then": False}),
    ("a\nb", {"words": ("b",), "then": False}),
    ("a || b", {"words": ("b",), "then": False}),
    ("a && b & c", {"words": ("c",), "then": False}),
]  # fmt: skip

VALUES: list[tuple[str, dict[str, list[str]]]] = [
    ("x=1", {"x": ["1"]}),
    ("x=1\\\n2", {"x": ["12"]}),
    ('x=1; x=2; y=$x"$z"', {"x": ["1", "2"], "y": ["\0x\0\0z\0"]}),
    ("x=a y=b", {"x": ["a"], "y": ["b"]}),
    ("x=", {"x": [""]}),
    ("x=1 a", {}),
    ("x=1; x+=2", {"x": ["1", "\0\0"]}),
    ("x=(a b)", {"x": ["\0\0"]}),
    ("x=$(a)", {"x": ["\0\0"]}),
    ("x=$((1))", {"x": ["\0#\0"]}),
    ("x='a b'\"c\"$'\\n'", {"x": ["a bc\n"]}),
    ("export x=1 y; readonly z=$y; declare -r w+=2", {"x": ["1"], "z": ["\0y\0"], "w": ["\0\0"]}),
    ("for x in a $y {1..2}; do :; done", {"x": ["a", "\0\0", "1", "2"]}),
    ("for x; do :; done", {"x": ["\0\0"]}),
    # not sure: the environment's value stays possible
    ("a && x=1", {"x": ["\0x\0", "1"]}),
    ("a || x=1", {"x": ["\0x\0", "1"]}),
    ("x=1 && a", {"x": ["1"]}),
    ("if a; then x=1; fi", {"x": ["\0x\0", "1"]}),
    ("(x=1)", {"x": ["\0x\0", "1"]}),
    ("{ x=1; }", {"x": ["\0x\0", "1"]}),
    ("f() { x=1; }", {"x": ["\0x\0", "1"]}),
    ("a $(x=1)", {"x": ["\0x\0", "1"]}),
    ("a $x; x=1", {"x": ["\0x\0", "1"]}),
    ("a ~; HOME=1", {"HOME": ["\0HOME\0", "1"]}),
    ("x=1 | a", {"x": ["1", "\0x\0"]}),
    ("a | x=1", {"x": ["1", "\0x\0"]}),
    ("x=1 & a", {"x": ["1", "\0x\0"]}),
    ("x=1 > a", {"x": ["\0x\0", "1"]}),
    ("x=1; a && x=2", {"x": ["1", "2"]}),
    ("for x in; do :; done", {"x": ["\0x\0", ""]}),
    ("for ((i = 0; i < 3; i++)); do :; done", {"i": ["\0i\0", "\0#\0"]}),
    ("read -r x; unset y", {"x": ["\0x\0", "\0\0"], "y": ["\0y\0", ""]}),
    ("i=0; ((i++)); a $((i + 1))", {"i": ["0", "\0#\0"]}),
    ("i=-3; [[ $i -lt 5 ]]", {"i": ["-3"]}),
]

NOT_RECOGNISED: list[tuple[str, list[str]]] = [
    ("bash reports a syntax error", [
        "; a", "a ;; b", "&& a", "a &&", "a || || b", "| a", "a |", "a | | b", "(a", "a)", "( )", "{ }", "{ a; ", "a; }", "} a",
        "if a; then b", "if a; fi", "then a", "fi", "do a", "done", "esac", "while a; done", "for x in a; b",
        "case a in b) c", "case a b", "case a in b c) d ;; esac", "a > ", "a > > b", "a <<", "f() a; }", "(a) b", "{ a; } b",
        "a (b)",
        "if a; then b; fi c", "'a", '"a', "$'a", "a `b", "a $(b", "a ${x", "[[ a", "((1", "! | a", "x=(a", "a & ; b",
        "if; then a; fi",
        "a <<E\nb", "$(", "a (", "x=(a > b)", "for x in a > b; do c; done", "case > in a) b;; esac",
    ]),
    ("it names what runs, or what words mean, in ways that are not looked into", [
        "function f { a; }", "function f() { a; }", "coproc a", "select x in a; do b; done", "f() a", "f() if a; then b; fi",
        "a {x}>b", "a {x}<b", "a <&$x", "a <& b", "echo a}>b", "case a in b) c ;& d) e ;; esac", "case a in b) c ;;& esac",
        "for 1 in a; do b; done", "for ((;;)) { a; }", "for x in a { b; }",
    ]),
    ("an expansion can run or set something, or its text counts as an expression", [
        "a ${x:=b}", "a ${x=b}", "a ${x:?b}", "a ${!x}", "a ${x@P}", "a ${x[i]}", "a ${x[$(b)]}", "a ${x:y}", "a ${x:-$(b)}",
        'a "${x:-"b"}"', "a ${x:-'b'}", "a $[1]", "a $((x[1]))", "a $(((1)))", "a $((`b`))", "a $(($(b)))", "a ${x/$y/z}",
        "x=$(a); b $((x))", "x='a[$(b)]'; c $((x))", "read x; ((x))", "x=a; [[ $x -eq 1 ]]", "[[ a -eq 1 ]]", "[[ $(a) -eq 1 ]]",
        "[[ -v x ]]", "[[ ! -R x ]]", "[[ ( a ) ]]", "[[ a b ]]", "[[ ! ]]", "[[ && ]]", "declare -i x=1", "declare -n x=y",
        "declare -a x", "local -A x", "typeset -u x=a",
        "for x in a; do ((x)); done", "x=1; x+=2; ((x))", "[[ $1 -gt 0 ]]", "declare -xi x=a",
    ]),
    ("bash sets the variable itself, or it decides how bash reads what follows", [
        "IFS=,", "for IFS in a; do b; done", "read IFS", "unset IFS", "export IFS=,", "((IFS=1))", "PS4='$(a)'", "BASH_ENV=a",
        "BASHPID=1", "_=a", "RANDOM=1", "REPLY=a", "OPTIND=1", "OLDPWD=a",
    ]),
    ("a variable is set by a name that is not certain, or of an array", [
        "read $x", "read 'x[0]'", "export $x", 'declare "$x"=a', "declare 'x[0]=a'", "local x[0]", "unset 'x[0]'",
        "export x={a,b}",
        "printf -v x a", "command read x", "builtin export x=a", "x=a export x", "a=(b)c", "declare $x=a", "unset $x",
        "f=1 unset x",
        "command printf -v x a", "a[0]=b", "a[1 2]=3", "a=([0]=b)", "a=(b ['c']=d)",
    ]),
    ("a variable holds the name of a command that sets variables", [
        "x=read; $x y", "x=printf; $x -v y a", "x=export; $x y=a", "x=test; $x -v y",
    ]),
    ("a test evaluates subscripts", [
        "x='-v y[1]'; [ $x ]", "x='a b'; test $x = a", "[ $(a) ]", "x=*; [ $x ]", "x=$(a); test $x",
        "[ -v 'x[$(a)]' ]", "test -v x", "[ $x y ]", "test -R x", "command test -v x", "builtin [ -v x ]",
    ]),
    ("it is somebody else's home directory, or none", [
        "a ~user", "a ~:b", "a ~,b", "a ~user/b", "a ~+", "a ~-", "x=~user", "a x=~user", "x=a:~b",
    ]),
    ("characters that are, or could be taken for, something else", [
        "a\x00", "a\rb", "a\r\nb", "a 'b\x01'", 'a "\x02"', "a\x1b", "a\x7f", "a\ud800", "a\u00a0b", "a\u2028b", "a \u200bb",
        "a\u3000b", "a\x0bb", "a\x0cb", "a \\é", "a \\\t", "$é", "if\u00a0a; then b; fi", "a；b", "a “b”", "a \uff04x",
    ]),
    ("escapes that are not in the table", [
        "a $'\\u0041'", "a $'\\cA'", "a $'\\e'", "a $'\\a'", "a $'\\0'", "a $'\\x'", "a $'\\xff'", "a $'\\777'", "a $'\\8'",
        "a $'\\²'",
        "a $'\\?'", "a $'b\\\nc'", 'a "$\'b\'"', 'a "$x$[1]"',
    ]),
    ("the line goes on in the middle of something", [
        "a$\\\nx", "a $x\\\ny", "a $\\\nx","a $xy\\\nz", 'a "b\\\nc"', "a |\\\n| b", "a &\\\n& b", "a >\\\n> b", "a <\\\n<E\nE",
        "!\\\n a",
        "if\\\n a; then b; fi", "coproc\\\n a", "time\\\n a", "(\\\n(a))", "a <<E\nb\\\nE\nE", "a <<E\nb\\\nc\nE", "a 2\\\n>b",
        "x=\\\n2", "x\\\n=1", "i\\\nf a", "a=b\\\n=c", "!\\\n",
    ]),
    ("braces that bash may expand otherwise", [
        "a {1..100000}", "a {01..3}", "a {a..c}", "a {1..9..2}", "a {1..200}", "a {a},b}", "a $x{b,c}", "a {$x,b}c",
        "a {$,b}HOME",
        "a {1..3}~{b,c}=~/d", "a " + "{b,c}" * 9, "a " + "{1..50}" * 2, "a {b,c}=~/d",
    ]),
    ("a dollar sign before quotation marks translates", ['a $"b"', '$"su"do', 'a b$"c"']),
    ("a heredoc that ends elsewhere, or has a delimiter that bash reads otherwise", [
        "a <<E $(b)\nE", "a <<E `b`\nE", "a <<E (b)\nE", "a $(b <<E)\nE", "a <<$x\n$x", "a <<E$x\nE", "a <<'E F'\nE F",
        "a <<E'F'\nEF", 'a <<""\n\n', "a <<E\n$x`\nE", "a <<E\n${x:=b}\nE", "{ a <<E; }\nb",
    ]),
    ("it is too much", [
        "a ;" * 3_001, "(" * 40 + "a" + ")" * 40, "a $(" * 40 + ")" * 40, "{ " * 40 + "a; " + "}; " * 40, "a " + "b " * 3_001,
        "a <<E\n" + "$x " * 3_001 + "\nE", "\n" * 3_001,
    ]),
    ("a function of the name makes the text of a heredoc doubtful", ["cat() { a; }; b \"$(cat <<'E'\nc\nE\n)\""]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), WORDS)
def test_words_are_those_of_bash(text: str, words: str) -> None:
    assert words_of(text) == words


@pytest.mark.parametrize(("text", "expected"), REST)
def test_commands_say_what_belongs_to_them(text: str, expected: dict[str, Any]) -> None:
    wanted = expected.get("words")
    command = next(c for c in reversed(commands_of(text)) if wanted is None or c.words == wanted)
    assert {key: getattr(command, key) for key in expected} == expected


@pytest.mark.parametrize(("text", "values"), VALUES)
def test_variables_have_every_value_they_may_hold(text: str, values: dict[str, list[str]]) -> None:
    script = oppi.parse_shell(text)
    assert script is not None
    assert {name: list(dict.fromkeys(held)) for name, held in script.values.items()} == values


@pytest.mark.parametrize("text", [pytest.param(text, id=text[:40]) for _, texts in NOT_RECOGNISED for text in texts])
def test_what_is_not_certain_is_not_recognised(text: str) -> None:
    assert oppi.parse_shell(text) is None


@pytest.mark.parametrize(
    "piece",
    [
        *"a'\"`$({[~#\\\n*;&|<>=!x ",
        "$(",
        "((",
        "<<E\n",
        "a<<E;",
        "{a,",
        "${x",
        "a(){",
        "[[ ",
        "a=(",
        "\\\n",
        "{1..",
        "$((",
        "a=~:",
    ],
)
def test_long_texts_are_read_quickly(piece: str) -> None:
    for text in (piece * 20_000, "a " + piece * 20_000, "a '" + piece * 20_000 + "'", 'a "' + piece * 20_000 + '"'):
        begin = time.process_time()
        oppi.parse_shell(text)
        assert time.process_time() - begin < 1


def test_long_words_are_words() -> None:
    assert [c.words for c in commands_of("a" * 100_000)] == [("a" * 100_000,)]
    assert [c.words for c in commands_of("a '" + "b" * 100_000 + "'")] == [("a", "b" * 100_000)]


words = st.text(alphabet="abcXYZ09 _-./$`'\"\\*?[]{}()!#&|;<>=~@%+:,^é\t\n", min_size=0, max_size=8)


@many
@given(st.lists(words, min_size=1, max_size=5))
def test_quoted_words_come_back(given_words: list[str]) -> None:
    (command,) = commands_of(" ".join(map(shlex.quote, given_words)))
    unquoted = given_words[0] and shlex.quote(given_words[0]) == given_words[0]
    if not (unquoted and re.match(r"\w+=|[\w@%+=:,./-]*$", given_words[0])):
        assert command.words == tuple(given_words)
    assert not command.writes and not command.reads


OPERATORS = set("();<>|&")


def reference(text: str) -> list[str]:
    """The words of a text as the standard library splits them, without operators."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, "#"
    return sorted(token for token in lexer if not set(token) <= OPERATORS)


@many
@given(st.text(alphabet="ab-/. '\"\\#;|&<>\n", max_size=24))
def test_recognised_commands_have_the_words_another_parser_finds(text: str) -> None:
    parsed = oppi.parse_shell(text)
    if parsed is not None and not re.search("<<|<>|\\\\\n", text) and not re.search(r"[^\s;|&]#", text):
        found = [word for c in parsed.commands for word in (*c.words, *c.writes, *c.reads)]
        assert sorted(word for word in found if not set(word) <= OPERATORS) == reference(text)


@many
@given(st.text(alphabet="ab x=~*[]{},.'\"\\$`()#;|&<>!\n\t", max_size=40))
def test_any_text_is_recognised_or_not(text: str) -> None:
    parsed = oppi.parse_shell(text)
    assert parsed is None or all(not set("\3\4\5\6\7") & set("".join(c.words)) for c in parsed.commands)
