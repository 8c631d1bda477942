"""`oppi policy check`: the verdict on a command, a tool call, or a whole file of cases, as scripts run it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import Server

from .test_cli import Shell, as_a_person, modes_bind, one_line, tree

CASES = Path(__file__).resolve().parents[1] / "fixtures" / "policy.jsonl"
ACTIONS = ("allow", "ask", "deny")
# Answered more strictly than the release that the case was taken from; the reasons are in docs/permissions.md.
STRICTER = {
    "p10-approvals-1-0-016": ("ask", "deny"),  # a write to the system's files
    "p10-path-bounds-017": ("ask", "deny"),  # a write to the system's files
    "p11-default-seeds-files-007": ("ask", "deny"),  # the server's own credentials
    "p11-tests-policy-tmux-myapp-001": ("allow", "ask"),  # what tmux types into another shell
    "p11-tests-stress-misc-021": ("allow", "ask"),  # not recognised as commands
}


@pytest.fixture
def oppi() -> Iterator[Shell]:
    """A shell whose data directory has nothing in it, and gets nothing."""
    with Server(start=False) as server:
        shell = Shell(server)
        yield shell
        assert not list(shell.data.iterdir())
        assert sorted(path.name for path in shell.home.iterdir()) in ([], [".pi"])


def given() -> list[dict[str, Any]]:
    return [json.loads(line) for line in CASES.read_text("utf-8").splitlines()]


def check(shell: Shell, path: Path | str, *words: str, **options: Any) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, the object of each case, and the summary line."""
    done = shell.run("policy", "check", "--cases", str(path), *words, **options)
    assert done.stderr == "", done.stderr
    *lines, summary = done.stdout.splitlines()
    return done.returncode, [json.loads(line) for line in lines], summary


def cases(shell: Shell, *many: Any) -> Path:
    """A file of cases in the folder where the command is run."""
    path = shell.server.folder / "cases.jsonl"
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in many), "utf-8")
    return path


def case(command: str = "ls", expect: str = "allow", preset: str = "host", **context: Any) -> dict[str, Any]:
    return {
        "id": command, "source": "review", "preset_or_mode": preset, "tool": "bash", "input": {"command": command},
        "context": context, "expect": expect,
    }  # fmt: skip


class TestCaseFile:
    def test_no_case_is_answered_less_strictly_and_few_are_more(self, oppi: Shell) -> None:
        wanted = {each["id"]: each for each in given()}
        code, answers, summary = check(oppi, CASES)
        assert code == 1  # some differ
        assert [answer["id"] for answer in answers] == [each["id"] for each in given()]
        stricter = {}
        for answer in answers:
            assert set(answer) == {"id", "expect", "got", "ok", "layer", "reason"}
            each = wanted[answer["id"]]
            accepted = (each["expect"], *each.get("also_accept", ()))
            assert answer["expect"] == each["expect"] and answer["got"] in ACTIONS
            assert answer["ok"] is (answer["got"] in accepted), answer
            assert isinstance(answer["layer"], str) and answer["layer"] and answer["reason"], answer
            if not answer["ok"]:
                assert ACTIONS.index(answer["got"]) > max(map(ACTIONS.index, accepted)), f"weaker: {answer}"
                stricter[answer["id"]] = (answer["expect"], answer["got"])
        assert stricter == STRICTER
        assert not [name for name in stricter if wanted[name]["source"] == "review"]
        assert re.findall(r"\d+", summary) == [str(len(answers)), str(len(answers) - len(STRICTER)), str(len(STRICTER)), "0"]

    def test_the_same_as_json(self, oppi: Shell) -> None:
        code, answers, summary = check(oppi, CASES, "--json")
        count = len(given())
        assert (code, len(answers)) == (1, count)
        assert json.loads(summary) == {"cases": count, "ok": count - len(STRICTER), "stricter": len(STRICTER), "weaker": 0}
        assert check(oppi, CASES)[1] == answers

    def test_the_file_is_the_whole_one(self) -> None:
        assert len(given()) == len({each["id"] for each in given()}) == 978
        assert Counter(each["source"] for each in given()).keys() == {"1.0", "1.1", "review"}

    def test_nothing_differs(self, oppi: Shell) -> None:
        good = case("sudo id", "deny"), case("ls"), {**case("git push", "allow"), "also_accept": ["ask"]}
        code, answers, summary = check(oppi, cases(oppi, *good, ""))
        assert (code, [answer["ok"] for answer in answers]) == (0, [True] * 3)
        assert "3 cases" in summary

    def test_something_differs(self, oppi: Shell) -> None:
        code, answers, summary = check(oppi, cases(oppi, case("ls"), case("ls", "deny"), case("ls", "ask")), "--json")
        assert (code, [answer["ok"] for answer in answers]) == (1, [True, False, False])
        assert json.loads(summary) == {"cases": 3, "ok": 1, "stricter": 0, "weaker": 2}

    def test_a_verdict_that_is_not_accepted_although_it_lies_between(self, oppi: Shell) -> None:
        weaker = {**case("ls", "ask"), "also_accept": ["deny"]}
        assert json.loads(check(oppi, cases(oppi, weaker), "--json")[2])["weaker"] == 1

    def test_no_cases_are_no_difference(self, oppi: Shell) -> None:
        assert check(oppi, cases(oppi))[:2] == (0, [])

    def test_the_folder_of_a_case_is_its_own(self, oppi: Shell) -> None:
        """$TMP is there with what the case asks for, and another one in the next case."""
        inside = case("cat $TMP/ws/a", preset="host_locked", cwd="$TMP/ws", dirs=["$TMP/ws"], files={"$TMP/ws/a": "x"})
        links = {"dirs": ["$TMP/ws", "$TMP/o"], "symlinks": {"$TMP/ws/l": "$TMP/o"}}
        link = case("cat $TMP/ws/l/a", "ask", "host_locked", cwd="$TMP/ws", **links)
        assert check(oppi, cases(oppi, inside, link, inside, link))[0] == 0

    @pytest.mark.parametrize("preset", ["host", "host_standard", "host_locked", "container", "default", "rules-only", "custom"])
    def test_every_mode(self, oppi: Shell, preset: str) -> None:
        assert check(oppi, cases(oppi, case("sudo id", "deny", preset)))[0] == 0

    @pytest.mark.parametrize("line", ["{", "[]", "5", "null", "{}", '"x"'])
    def test_a_line_that_is_no_case_is_one_line(self, oppi: Shell, line: str) -> None:
        oppi.refuses("policy", "check", "--cases", str(cases(oppi, line)))

    @pytest.mark.parametrize("wanted", ["maybe", None, ["allow"], 5])
    def test_a_verdict_that_there_is_not_is_one_line(self, oppi: Shell, wanted: Any) -> None:
        oppi.refuses("policy", "check", "--cases", str(cases(oppi, {**case(), "expect": wanted})))

    @pytest.mark.parametrize(
        "context",
        [
            {"allowedPaths": [{}]}, {"allowedPaths": ["x"]}, {"dirs": [5]}, {"dirs": ["$TMP/a\0b"]}, {"files": {"$TMP/x": 5}},
            {"files": {"$TMP/x/y": "", "$TMP/x": ""}}, {"symlinks": {"$TMP/x": None}}, {"dirs": ["$TMP/" + "x" * 300]},
            {"prior_approvals": [{}]}, {"prior_approvals": ["x"]}, {"domainAllowlist": [5]}, {"fallback": "perhaps"}, {"home": 5},
            {"cwd": "relative"}, {"files": {"$TMP/x": "\ud800"}}, {"rules": [5]}, {"policy": []}, {"allowedExecutables": 5},
        ],
    )  # fmt: skip
    def test_a_broken_context_is_one_line(self, oppi: Shell, context: dict[str, Any]) -> None:
        """Or is understood as something harmless; never a traceback."""
        done = oppi.run("policy", "check", "--cases", str(cases(oppi, case(**context))))
        assert "Traceback" not in done.stderr
        assert done.returncode in (0, 1)
        if done.stderr:
            one_line(done.stderr)
            assert done.returncode == 1

    def test_an_unknown_mode_is_not_taken_for_another(self, oppi: Shell) -> None:
        """Otherwise a slip of the pen in a file of cases would go unnoticed."""
        assert oppi.run("policy", "check", "--cases", str(cases(oppi, case(preset="hosst_locked")))).returncode == 1

    def test_a_file_that_is_not_there(self, oppi: Shell) -> None:
        assert "nowhere.jsonl" in oppi.refuses("policy", "check", "--cases", "nowhere.jsonl")
        assert oppi.refuses("policy", "check", "--cases", str(oppi.home))

    def test_a_file_that_is_no_text(self, oppi: Shell) -> None:
        path = oppi.server.folder / "cases.jsonl"
        path.write_bytes(b"\xff\xfe\x00")
        oppi.refuses("policy", "check", "--cases", str(path))


OUTSIDE = [
    "/", "/etc/x", "$OUT/x", "$TMP/../x", "$TMP/a/../../x", "$TMPx/y", "~/x", "x", "", "../x", "$TMP/../$TMP/../x",
    "/proc/self/cwd/x",
]  # fmt: skip


class TestHostileCaseFile:
    """Whoever wrote the file: nothing outside the temporary folder of a case is written, made or deleted."""

    @pytest.fixture
    def out(self, oppi: Shell) -> Iterator[Path]:
        """A folder that a case may not touch."""
        out = oppi.server.folder / "out"
        out.mkdir()
        (out / "kept").write_text("precious")
        before = tree(oppi.server.folder)
        yield out
        after = {name: data for name, data in tree(oppi.server.folder).items() if name != "cases.jsonl"}
        assert after == before
        assert sorted(path.name for path in out.iterdir()) == ["kept"]

    def run(self, shell: Shell, out: Path, **context: Any) -> None:
        temporary = shell.server.folder / "tmp"
        temporary.mkdir(exist_ok=True)
        text = json.dumps(case("ls", **context)).replace("$OUT", str(out))
        done = shell.run("policy", "check", "--cases", str(cases(shell, text)), env={"TMPDIR": str(temporary)})
        assert "Traceback" not in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) <= 1
        assert not list(temporary.iterdir())  # nothing stays behind either
        temporary.rmdir()

    @pytest.mark.parametrize("path", OUTSIDE)
    def test_a_path_outside(self, oppi: Shell, out: Path, path: str) -> None:
        self.run(oppi, out, dirs=[path])
        self.run(oppi, out, files={path: "x"})
        self.run(oppi, out, symlinks={path: "/etc"})

    def test_a_file_through_a_symlink(self, oppi: Shell, out: Path) -> None:
        self.run(oppi, out, symlinks={"$TMP/l": "$OUT"}, files={"$TMP/l/x": "x"})
        self.run(oppi, out, symlinks={"$TMP/l": "$OUT/kept"}, files={"$TMP/l": "x"})
        self.run(oppi, out, symlinks={"$TMP/l": "$OUT/new"}, files={"$TMP/l": "x"})
        self.run(oppi, out, dirs=["$TMP/d"], symlinks={"$TMP/d/l": "$OUT"}, files={"$TMP/d/l/x": "x"})

    def test_a_folder_through_a_symlink(self, oppi: Shell, out: Path) -> None:
        self.run(oppi, out, symlinks={"$TMP/l": "$OUT"}, dirs=["$TMP/l/x"])
        self.run(oppi, out, symlinks={"$TMP/l": "$OUT", "$TMP/l/x": "/etc"})
        self.run(oppi, out, symlinks={"$TMP/l": "$OUT", "$TMP/l/../x": "/etc"})
        self.run(oppi, out, symlinks={"$TMP/a": "$TMP/b", "$TMP/b": "$OUT", "$TMP/a/x": "/etc"})

    def test_names_that_change_on_the_way(self, oppi: Shell, out: Path) -> None:
        self.run(oppi, out, files={"$TMP/a/../../../../../../../../../../../../$OUT/x": "x"})
        self.run(oppi, out, files={"$TMP/$TMP/x": "x"})
        self.run(oppi, out, dirs=["$TMP/a\u0000/../$OUT/x"])

    def test_a_symlink_to_a_folder_is_not_emptied_with_the_folder(self, oppi: Shell, out: Path) -> None:
        self.run(oppi, out, symlinks={"$TMP/l": "$OUT", "$TMP/m": "/"})

    def test_paths_of_the_context_are_only_compared(self, oppi: Shell, out: Path) -> None:
        roots = [{"path": "$OUT/x", "access": "readwrite"}]
        self.run(oppi, out, home="$OUT/home", cwd="$OUT/cwd", allowedPaths=roots, protectedPaths=["$OUT/y"])

    def test_no_command_is_run(self, oppi: Shell, out: Path) -> None:
        for command in (f"touch {out}/x", f"echo x > {out}/x", f"$(touch {out}/x)", f"`touch {out}/x`", f"rm {out}/kept"):
            oppi.run("policy", "check", "--", command)
            oppi.run("policy", "check", "--cases", str(cases(oppi, case(command))))

    def test_what_comes_out_is_safe_to_look_at(self, oppi: Shell, out: Path) -> None:
        """A reason or an id cannot move the cursor of a terminal."""
        odd = {**case("ls"), "id": "\x1b[2J\u202e"}
        rule = {"decision": "deny", "tool": "bash", "scope": "global", "label": "\x1b[2J\r\n", "pattern": "ls"}
        done = oppi.run("policy", "check", "--cases", str(cases(oppi, odd, case("ls", "deny", rules=[rule]))))
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", done.stdout), done.stdout
        assert len(done.stdout.splitlines()) == 3


class TestOneVerdict:
    @pytest.mark.parametrize(
        ("words", "wanted"),
        [
            (("--preset", "host", "--", "git push"), "ask"), (("--", "git", "push"), "ask"), (("git push",), "ask"),
            (("--preset", "host", "--", "ls"), "allow"), (("--preset=host_locked", "--cwd=/w", "--", "ls"), "allow"),
            (("--preset", "host_locked", "--", "make"), "ask"), (("--preset", "host_standard", "--", "make"), "ask"),
            (("--preset", "container", "--", "make"), "allow"), (("--preset", "default", "--", "make"), "allow"),
            (("--", "sudo id"), "deny"), (("--", "(sudo", "id)"), "deny"), (("--", "echo $(unclosed"), "ask"),
            (("--tool", "write", "--input", '{"path": "a"}'), "allow"),
            (("--tool", "write", "--input", '{"path": "/etc/hosts"}'), "deny"),
            (("--tool", "write", "--preset", "host_locked", "--input", '{"path": "a"}', "--cwd", "/w"), "allow"),
            (("--tool", "read", "--preset", "host_locked", "--input", '{"path": "/opt/a"}'), "ask"),
            (("--tool", "read", "--input", '{"path": "~/.ssh/id_rsa"}'), "deny"),
            (("--tool", "search", "--preset", "host_locked", "--input", '{"q": "x"}'), "deny"),
            (("--tool", "bash", "--input", '{"command": "git push"}'), "ask"),
            (("--preset", "host_locked", "--cwd", "/w", "--", "cat /w/a"), "allow"),
            (("--preset", "host_locked", "--cwd", "/w", "--", "cat /v/a"), "ask"),
        ],
    )  # fmt: skip
    def test_what_it_says(self, oppi: Shell, words: tuple[str, ...], wanted: str) -> None:
        text = oppi("policy", "check", *words)
        assert text.split()[0] == wanted
        facts = oppi.facts("policy", "check", *without_rest(words))
        assert facts["action"] == wanted
        assert facts["risk"] in ("low", "medium", "high", "critical")
        assert facts["layer"] and facts["reason"] and facts["reason"] in text

    def test_it_names_every_part(self, oppi: Shell) -> None:
        facts = oppi.facts("policy", "check", "--preset", "host", "ls && (git push; x=$(rm -rf build) > out)")
        parts = {(part["verb"], part["text"]): part["verdict"] for part in facts["actions"]}
        assert facts["action"] == "ask" and facts["risk"] == "high"
        assert parts["run", "git push"] == parts["run", "rm -rf build"] == "ask"
        assert parts["run", "ls"] == "allow"
        assert [verb for verb, _ in parts].count("write") == 1

    def test_a_part_that_is_denied_says_so(self, oppi: Shell) -> None:
        facts = oppi.facts("policy", "check", "ls; sudo id")
        assert {part["text"]: part["verdict"] for part in facts["actions"]} == {"ls": "allow", "sudo id": "deny"}

    def test_the_folder_is_where_it_is_run(self, oppi: Shell) -> None:
        folder = str(oppi.server.folder)
        assert oppi.facts("policy", "check", "--preset", "host_locked", f"cat {folder}/a")["action"] == "allow"
        assert oppi.facts("policy", "check", "--preset", "host_locked", "--cwd", "/w", f"cat {folder}/a")["action"] == "ask"

    def test_a_command_is_shown_as_it_is(self, oppi: Shell) -> None:
        text = oppi("policy", "check", "echo '\u202e' \x1b[2J; ls")
        assert "\u202e" not in text and "\x1b" not in text

    def test_the_exit_code_is_that_of_the_question(self, oppi: Shell) -> None:
        """It was answered, whatever the answer is."""
        for command in ("ls", "git push", "sudo id"):
            assert oppi.run("policy", "check", command).returncode == 0

    @pytest.mark.parametrize(
        "words",
        [
            (), ("check",), ("bogus",), ("check", "--preset", "bogus", "ls"), ("check", "--preset"), ("check", "--input", "{"),
            ("check", "--input", "[]"), ("check", "--tool", "write", "--input", "5"), ("check", "--cases"), ("check", "--bogus"),
            ("check", "--tool", "write"), ("check", "--cases", "x", "--bogus"),
        ],
    )  # fmt: skip
    def test_a_slip_of_the_hand_is_one_line(self, oppi: Shell, words: tuple[str, ...]) -> None:
        oppi.refuses("policy", *words)

    def test_a_command_and_a_tool_of_its_own_are_too_much(self, oppi: Shell) -> None:
        oppi.refuses("policy", "check", "--input", '{"command": "ls"}', "--", "sudo id")
        oppi.refuses("policy", "check", "--cases", str(CASES), "--", "sudo id")
        oppi.refuses("policy", "check", "--tool", "write", "--", "sudo id")

    def test_help(self, oppi: Shell) -> None:
        text = oppi("policy", "--help")
        for word in ("check", "--preset", "--tool", "--input", "--cases", "--json"):
            assert word in text


def without_rest(words: tuple[str, ...]) -> tuple[str, ...]:
    """The words with `--` and what follows it as one command, so that another option can come last."""
    return (*words[: words.index("--")], " ".join(words[words.index("--") + 1 :])) if "--" in words else words


class TestNoDataDirectory:
    WORDS = [("--", "git push"), ("--tool", "write", "--input", '{"path": "a"}'), ("--cases", "CASES")]

    @pytest.mark.parametrize("words", WORDS, ids=["command", "tool", "cases"])
    def test_none_is_made(self, oppi: Shell, words: tuple[str, ...]) -> None:
        elsewhere = oppi.home / "no" / "such"
        line = [str(cases(oppi, case())) if word == "CASES" else word for word in words]
        for env in ({"OPPI_DATA_DIR": str(elsewhere)}, {"OPPI_DATA_DIR": ""}):
            assert oppi.run("policy", "check", *line, env=env).returncode == 0
        assert oppi.run("policy", "check", "--data-dir", str(elsewhere), *line).returncode == 0
        assert not elsewhere.parent.exists() and not (oppi.home / ".config").exists()

    @pytest.mark.parametrize("words", WORDS, ids=["command", "tool", "cases"])
    def test_none_is_read(self, oppi: Shell, words: tuple[str, ...]) -> None:
        """Not even one that is there, with rules in it, or that is no directory."""
        line = [str(cases(oppi, case())) if word == "CASES" else word for word in words]
        other, no_folder = oppi.server.folder / "other", oppi.server.folder / "file"
        other.mkdir()
        no_folder.write_text("precious")
        rule = {"id": "r", "decision": "deny", "tool": "*", "scope": "global", "label": "never", "createdAt": 1}
        (other / "rules.json").write_text(json.dumps([rule]))
        (other / "config.json").write_text("{broken")
        before = tree(other)
        for place in (other, no_folder, "/dev/null", "/proc/self"):
            done = oppi.run("policy", "check", "--data-dir", str(place), *line, env={"OPPI_DATA_DIR": str(place)})
            assert (done.returncode, done.stderr) == (0, "")
            assert "never" not in done.stdout
        assert tree(other) == before and no_folder.read_text() == "precious"

    @pytest.mark.skipif(not modes_bind(), reason="file modes do not bind this user")
    def test_one_that_may_not_be_read(self, oppi: Shell) -> None:
        closed = oppi.server.folder / "closed"
        closed.mkdir()
        closed.chmod(0)
        done = subprocess.run(
            oppi.server.command("policy", "check", "git push"),
            env={**oppi.server.env, "OPPI_DATA_DIR": str(closed)}, cwd=oppi.server.folder, preexec_fn=as_a_person,
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        closed.chmod(0o700)
        assert (done.returncode, done.stderr) == (0, "")
        assert not os.listdir(closed)
