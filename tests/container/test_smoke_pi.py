"""What the real pi of both versions needs in a locked container, without oppi: the ground on which oppi chooses mounts."""

from __future__ import annotations

import json
import os
import select
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import oppi
from tests.container.rig import Apple, forwarder
from tests.support.mock_llm import MockLLM
from tests.support.tools import PI_PACKAGES

IMAGE, GATEWAY = "oppi-test:local", "10.202.0.1"
LOCKED = ("--init", "--read-only", "--tmpfs", "/tmp", "-u", "1001:1001", "--cap-drop", "ALL", "--ulimit", "nproc=1024")
ARGUMENTS = ("--mode", "rpc", "--no-extensions", "--no-skills", "--session-dir", "/sessions", "--extension", "/gate/gate.js")
MODEL = ("--provider", "mock", "--model", "mock-1")
NO_CACHES = {"JITI_FS_CACHE": "false", "NODE_DISABLE_COMPILE_CACHE": "1"}
# pi makes lock folders beside its files, so that their folder has to be writable; the files need not be.
LINKED = 'mkdir "$PI_CODING_AGENT_DIR" && ln -s /agent/*.json "$PI_CODING_AGENT_DIR" && exec pi "$@"'


class Pi:
    """A running `exec` of pi whose gate allows everything."""

    def __init__(self, apple: Apple, *arguments: str, agent: str = "/tmp/agent", script: str = LINKED, **env: str) -> None:
        given = {"PI_OFFLINE": "1", "PI_CODING_AGENT_DIR": agent, **env}
        options = [word for name, value in given.items() for word in ("-e", f"{name}={value}")]
        self.cli = apple.open("exec", "-i", *options, "box", "sh", "-c", script, "sh", *ARGUMENTS, *arguments)
        assert self.cli.stdin and self.cli.stdout and self.cli.stderr
        self.stdin, self.stdout, self.stderr = self.cli.stdin, self.cli.stdout, self.cli.stderr
        self.asked: list[dict[str, Any]] = []  # by the gate
        self.data = b""

    def send(self, **line: Any) -> None:
        self.stdin.write(json.dumps(line).encode() + b"\n")
        self.stdin.flush()

    def line(self, deadline: float) -> dict[str, Any]:
        """The next line, with the gate's questions answered."""
        while b"\n" not in self.data:
            assert select.select([self.stdout], [], [], max(0.0, deadline - time.monotonic()))[0], "pi says nothing"
            more = os.read(self.stdout.fileno(), 65536)
            assert more, self.stderr.read().decode()
            self.data += more
        raw, _, self.data = self.data.partition(b"\n")
        line: dict[str, Any] = json.loads(raw)
        if line.get("title") == "oppi-gate":
            question = json.loads(line["placeholder"])
            self.asked.append(question)
            answer = json.dumps({"verdict": "allow", "toolCallId": question.get("toolCallId")})
            self.send(type="extension_ui_response", id=line["id"], value=answer)
        return line

    def wait(self, **fields: Any) -> dict[str, Any]:
        deadline = time.monotonic() + 30
        while True:
            line = self.line(deadline)
            if all(line.get(name) == value for name, value in fields.items()):
                return line

    def command(self, kind: str, **fields: Any) -> dict[str, Any]:
        self.send(type=kind, id=kind, **fields)
        return self.wait(type="response", id=kind)

    def turn(self, prompt: str) -> dict[str, Any]:
        """The end of a whole turn."""
        answer = self.command("prompt", message=prompt)
        assert answer["success"], answer
        return self.wait(type="agent_end")

    def end(self) -> str:
        """Closes stdin, at which pi has to end; what it wrote to stderr."""
        self.stdin.close()
        assert self.cli.wait(20) == 0
        return self.stderr.read().decode()


@pytest.fixture(scope="module", params=PI_PACKAGES)
def place(request: pytest.FixtureRequest) -> Iterator[Apple]:
    """A network, an image of one version of pi, and the folders that the containers mount."""
    with Apple() as apple:
        apple.build(request.param)
        apple.ok("network", "create", "--subnet", "10.202.0.0/24", "oppi")
        for name in ("work", "sessions", "agent", "gate"):
            (apple.home / name).mkdir()
        (apple.home / "gate" / "gate.js").write_text(oppi.GATE_EXTENSION)
        yield apple


@pytest.fixture
def box(place: Apple) -> Iterator[Apple]:
    """A fresh container as tight as pi allows, and a model that only a forwarder on the gateway leads to."""
    home = place.home
    mounts = ("-v", f"{home}/work:/work", "-v", f"{home}/sessions:/sessions")
    fixed = ("-v", f"{home}/agent:/agent:ro", "-v", f"{home}/gate:/gate:ro")
    command = ("--entrypoint", "sleep", IMAGE, "1000")
    place.ok("run", "-d", "--rm", "--name", "box", "--network", "oppi", *LOCKED, *mounts, *fixed, *command)
    with MockLLM() as llm, forwarder(GATEWAY, llm.port) as port:
        models = llm.models_json().replace(f"127.0.0.1:{llm.port}", f"{GATEWAY}:{port}")
        for name, text in {"models": models, "auth": "{}", "settings": '{"defaultThinkingLevel": "low"}'}.items():
            (home / "agent" / f"{name}.json").write_text(text)
        yield place
    place.ok("delete", "-f", "box")


def session_files(apple: Apple) -> list[Path]:
    return sorted((apple.home / "sessions").glob("*.jsonl"))


def test_a_turn_with_tools_and_its_continuation(box: Apple) -> None:
    before = session_files(box)
    pi = Pi(box, *MODEL)
    state = pi.command("get_state")["data"]
    assert (state["model"]["id"], state["thinkingLevel"]) == ("mock-1", "low")  # models.json and settings.json are read
    prompt = '!tool bash {"command": "id -un; seq 30000"}\n!tool write {"path": "/work/new", "content": "made"}\n!say Done.'
    pi.turn(prompt)
    assert [question.get("tool") for question in pi.asked] == [None, "bash", "write"]
    assert pi.end() == ""
    assert not box.execs("box")
    made = box.home / "work" / "new"
    assert made.read_text() == "made" and made.stat().st_uid == os.geteuid()
    (file,) = set(session_files(box)) - set(before)
    assert "30000" in file.read_text()
    again = Pi(box, *MODEL, "--session", f"/sessions/{file.name}", agent="/tmp/again")
    again.turn("!say More.")
    again.end()
    assert file.read_text().count("Done.") > 1 and "More." in file.read_text()
    assert set(session_files(box)) - set(before) == {file}


def test_a_read_only_agent_folder_is_not_enough(box: Apple) -> None:
    """A newer pi cannot even be prompted; the older one works, but without the settings."""
    pi = Pi(box, *MODEL, agent="/agent", script='exec pi "$@"')
    assert pi.command("get_state")["data"]["thinkingLevel"] != "low"
    answer = pi.command("prompt", message="hello")
    assert answer["success"] or "auth.json.lock" in answer["error"]
    assert "settings.json.lock" in pi.end()


def test_the_agent_cannot_plant_another_gate_in_a_cache(box: Apple) -> None:
    """pi keeps what it compiled of an extension in /tmp and takes it from there, unless it is told not to."""
    for number, environment in enumerate(({}, NO_CACHES)):
        pi = Pi(box, agent=f"/tmp/agent{number}", **environment)
        pi.command("get_state")
        pi.end()
        assert pi.asked == [{"hello": 1}]
        box.ok("exec", "box", "sh", "-c", "sed -i 's/hello: 1/hello: 666/' /tmp/jiti/*gate*")


def test_a_process_that_outlived_its_cli_ends_by_a_second_exec(box: Apple) -> None:
    pi = Pi(box, *MODEL)
    pi.command("get_state")
    pi.cli.kill()
    pi.cli.wait()
    assert [argv[0] for argv in box.execs("box").values()] == ["sh"]
    box.call("exec", "box", "pkill", "-x", "pi")
    deadline = time.monotonic() + 10
    while box.execs("box"):
        assert time.monotonic() < deadline, box.processes("box")
        time.sleep(0.01)
