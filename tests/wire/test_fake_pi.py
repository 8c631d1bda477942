"""The fake pi must speak like the recorded one, or the tests that use it prove nothing."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAKE = ROOT / "tests" / "support" / "fake_pi.py"
FIXTURES = ROOT / "tests" / "fixtures"
DIALECTS = ("0.73", "0.87")
Event = dict[str, Any]


class Pi:
    """A running fake, driven directly over its pipes."""

    def __init__(self, home: Path, dialect: str, *arguments: str, **env: str) -> None:
        home.mkdir(exist_ok=True)
        environment = {"PATH": os.environ["PATH"], "HOME": str(home), "FAKE_PI_DIALECT": dialect, **env}
        self.dialect = dialect
        self.process = subprocess.Popen(
            [sys.executable, str(FAKE), "--mode", "rpc", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=home,
        )
        self.lines: queue.Queue[bytes | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.events: list[Event] = []

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def send(self, **message: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream:
                with contextlib.suppress(OSError):
                    stream.close()

    def raw(self, timeout: float = 20.0) -> bytes | None:
        """The next line of stdout; None at its end."""
        return self.lines.get(timeout=timeout)

    def read(self) -> Event:
        line = self.raw()
        assert line is not None, "the fake ended"
        event: Event = json.loads(line)
        self.events.append(event)
        return event

    def until(self, kind: str, **fields: Any) -> Event:
        while True:
            event = self.read()
            if event["type"] == kind and all(event.get(key) == value for key, value in fields.items()):
                return event

    def idle(self) -> Event:
        return self.until("agent_settled" if self.dialect == "0.87" else "agent_end")

    def ask(self, kind: str, **fields: Any) -> Event:
        self.send(type=kind, id=kind, **fields)
        return self.until("response", id=kind)

    def prompt(self, text: str) -> list[Event]:
        """Play a prompt to its end; the events of the run."""
        start = len(self.events)
        self.send(type="prompt", id="p", message=text)
        self.idle()
        return self.events[start:]

    def question(self) -> Event:
        """The gate's next question, decoded."""
        event = self.until("extension_ui_request", method="input", title="oppi-gate")
        return {"id": event["id"], **json.loads(event["placeholder"])}

    def verdict(self, dialog_id: str, **verdict: Any) -> None:
        self.send(type="extension_ui_response", id=dialog_id, value=json.dumps(verdict))


@pytest.fixture(params=DIALECTS)
def dialect(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def start(tmp_path: Path, dialect: str) -> Iterator[Any]:
    started: list[Pi] = []

    def begin(*arguments: str, **env: str) -> Pi:
        started.append(Pi(tmp_path / "home", dialect, *arguments, **env))
        return started[-1]

    yield begin
    for pi in started:
        pi.close()


@pytest.fixture
def gate(tmp_path: Path) -> str:
    path = tmp_path / "oppi-gate.js"
    path.write_text("export default () => {}")
    return str(path)


def order(events: list[Event]) -> list[str]:
    """What happened, with runs of the same thing collapsed: their number depends on timing."""
    result: list[str] = []
    for event in events:
        label = event["type"]
        if label == "message_update":
            label += " " + event["assistantMessageEvent"]["type"]
        elif label in ("message_start", "message_end"):
            label += " " + event["message"]["role"]
        elif label == "response":
            label += f" {event['command']} {event['success']}"
        elif label == "queue_update":
            label += f" {len(event['steering'])} {len(event['followUp'])}"
        if label != "extension_ui_request" and (not result or result[-1] != label):
            result.append(label)
    return result


def recorded(dialect: str, scenario: str) -> list[Event]:
    path = FIXTURES / f"pi-{dialect}" / f"{scenario}.jsonl"
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def without_deltas(labels: list[str]) -> list[str]:
    """The deltas between two queue commands are a matter of timing."""
    kept = [label for label in labels if "message_update" not in label]
    return [label for index, label in enumerate(kept) if index == 0 or kept[index - 1] != label]


def test_text_turn(start: Any, dialect: str) -> None:
    assert order(start().prompt("!slow 1\n!text 40")) == order(recorded(dialect, "text_turn"))


def test_tool_bash(start: Any, dialect: str) -> None:
    script = '!slow 1\n!say Let me look.\n!tool bash {"command": "echo a long enough command line"}\n!text 6'
    assert order(start().prompt(script)) == order(recorded(dialect, "tool_bash"))


def test_follow_up(start: Any, dialect: str) -> None:
    pi = start()
    pi.send(type="prompt", id="p0", message="!slow 30\n!text 12")
    pi.until("message_update")
    pi.send(type="follow_up", id="f1", message="!say follow-up answer")
    pi.send(type="prompt", id="f2", message="!say queued via prompt", streamingBehavior="followUp")
    pi.send(type="prompt", id="f3", message="no behaviour given")
    pi.idle()
    assert without_deltas(order(pi.events)) == without_deltas(order(recorded(dialect, "follow_up")))
    assert [event for event in pi.events if event.get("id") == "f3"][0]["error"] == [
        event for event in recorded(dialect, "follow_up") if event.get("id") == "f3"
    ][0]["error"]


def test_steer_and_queue_left_over_by_abort(start: Any, dialect: str) -> None:
    pi = start()
    pi.send(type="prompt", id="p0", message="!slow 60\n!text 100")
    pi.until("message_update")
    pi.send(type="steer", id="s1", message="!say queued steer")
    pi.send(type="follow_up", id="f1", message="!say queued follow-up")
    pi.until("response", id="f1")
    pi.ask("abort")
    assert pi.ask("get_state")["data"]["pendingMessageCount"] == 2
    pi.prompt("!say next prompt")
    assert without_deltas(order(pi.events)) == without_deltas(order(recorded(dialect, "abort_with_queue")))


def test_abort_streaming(start: Any, dialect: str) -> None:
    pi = start()
    pi.send(type="prompt", id="p0", message="!slow 20\n!text 200")
    pi.until("message_update")
    pi.send(type="abort", id="ab")
    pi.until("response", id="ab")
    pi.send(type="abort", id="ab2")
    pi.until("response", id="ab2")
    assert order(pi.events) == order(recorded(dialect, "abort_streaming"))
    end = [event for event in pi.events if event["type"] == "message_end"][-1]["message"]
    assert (end["stopReason"], end["errorMessage"]) == ("aborted", "Request was aborted")


def test_abort_in_a_tool(start: Any, dialect: str) -> None:
    pi = start()
    pi.send(type="prompt", id="p0", message='!toolwait 30000\n!tool bash {"command": "sleep"}\n!say never')
    pi.until("tool_execution_start")
    pi.until("tool_execution_update")
    pi.ask("abort")
    assert without_deltas(order(pi.events)) == without_deltas(order(recorded(dialect, "abort_bash_tool")))


def keys(value: Any, depth: int = 3) -> Any:
    """The key order of nested objects."""
    if not isinstance(value, dict) or not depth:
        return None
    return [(key, keys(item, depth - 1)) for key, item in value.items() if key not in ("compat", "rawStopReason")]


@pytest.mark.parametrize("kind", ["text_start", "text_delta", "text_end", "toolcall_start", "toolcall_delta"])
def test_key_order_of_updates(start: Any, dialect: str, kind: str) -> None:
    pi = start()
    pi.prompt('!say some words\n!tool bash {"command": "x"}')

    def first(events: list[Event]) -> Any:
        return keys(next(event for event in events if event.get("assistantMessageEvent", {}).get("type") == kind))

    expected = first(recorded(dialect, "tool_bash"))
    assert [name for name, _ in first(pi.events)] == [name for name, _ in expected]
    assert [name for name, _ in dict(first(pi.events))["assistantMessageEvent"]] == [
        name for name, _ in dict(expected)["assistantMessageEvent"]
    ]


def test_stream_lines_start_as_recorded(start: Any, dialect: str) -> None:
    pi = start()
    pi.send(type="prompt", id="p", message="!say intro \n!timestamp\n!stream 5 40 0")
    pi.until("message_update")
    start_of_line = {
        "0.73": b'{"type":"message_update","assistantMessageEvent":{"type":"text_delta","contentIndex":0,"delta":"',
        "0.87": b'{"type":"message_update","usage":{"input":0,',
    }[dialect]
    seen, text = 0, "intro"
    while seen < 5:
        line = pi.raw()
        assert line is not None
        event = json.loads(line)["assistantMessageEvent"]
        if event["delta"][:1].isdigit():
            seen, text = seen + 1, text + event["delta"]
            assert line.startswith(start_of_line)
            assert abs(time.monotonic_ns() - int(event["delta"].split()[0])) < 60e9
            assert len(event["delta"]) == 40
    end = pi.until("message_end")
    assert end["message"]["content"][0]["text"].replace(" ", "") == text.replace(" ", "")


def test_gate_lets_only_a_matching_allow_through(start: Any, gate: str) -> None:
    pi = start("-e", gate)
    assert pi.question()["hello"] == 1
    pi.send(
        type="prompt", id="p", message='!tool bash {"command": "a"}\n!tool write {"path": "b"}\n!tool bash {}\n!say x'
    )
    first = pi.question()
    assert (first["tool"], first["input"]) == ("bash", {"command": "a"})
    pi.verdict(first["id"], verdict="allow", toolCallId=first["toolCallId"])
    second = pi.question()
    pi.verdict(second["id"], verdict="allow", toolCallId=first["toolCallId"])
    third = pi.question()
    pi.verdict(third["id"], verdict="deny", toolCallId=third["toolCallId"], reason="because")
    pi.idle()
    ends = [event for event in pi.events if event["type"] == "tool_execution_end"]
    outcome = {event["toolCallId"]: (event["isError"], event["result"]["content"][0]["text"]) for event in ends}
    assert outcome[first["toolCallId"]] == (False, "ran: a\n")
    assert outcome[second["toolCallId"]][0]
    assert outcome[third["toolCallId"]] == (True, "because")


@pytest.mark.parametrize("answer", [{"value": "junk"}, {"value": 7}, {"value": "[]"}, {"cancelled": True}])
def test_gate_blocks_on_junk(start: Any, gate: str, answer: dict[str, Any]) -> None:
    pi = start("-e", gate)
    pi.question()
    pi.send(type="prompt", id="p", message='!tool bash {"command": "a"}')
    pi.send(type="extension_ui_response", id=pi.question()["id"], **answer)
    assert pi.until("tool_execution_end")["isError"]


def test_gate_waits_heed_an_abort(start: Any, gate: str) -> None:
    pi = start("-e", gate)
    pi.question()
    pi.send(type="prompt", id="p", message='!tool bash {"command": "a"}')
    pi.question()
    pi.ask("abort")
    assert [event["isError"] for event in pi.events if event["type"] == "tool_execution_end"] == [True]


def test_ungated_and_missing_gate(start: Any, gate: str) -> None:
    pi = start("-e", gate)
    pi.question()
    events = pi.prompt('!ungated bash {"command": "evil"}')
    assert [event["isError"] for event in events if event["type"] == "tool_execution_end"] == [False]
    assert not [event for event in events if event["type"] == "extension_ui_request"]
    silent = start("-e", gate, FAKE_PI_NO_GATE="1")
    silent.ask("get_state")
    assert [event["type"] for event in silent.events] == ["response"]


def test_session_file(start: Any, dialect: str) -> None:
    pi = start()
    path = Path(pi.ask("get_state")["data"]["sessionFile"])
    assert not path.exists()
    pi.prompt("!say one")
    pi.ask("get_state")
    pi.prompt("!say two")
    pi.ask("get_state")
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    types = [line["type"] for line in lines]
    assert types[:3] == ["session", "model_change", "thinking_level_change"]
    assert types.count("message") == (5 if dialect == "0.87" else 4)
    assert [line["parentId"] for line in lines[1:]] == [None, *[line["id"] for line in lines[1:-1]]]
    forks = pi.ask("get_fork_messages")["data"]["messages"]
    assert [item["text"] for item in forks] == ["!say one", "!say two"]
    assert pi.ask("fork", entryId=forks[1]["entryId"])["data"] == {"text": "!say two", "cancelled": False}
    forked = Path(pi.ask("get_state")["data"]["sessionFile"])
    assert json.loads(forked.read_text("utf-8").splitlines()[0])["parentSession"] == str(path)
    again = start("--session", str(path))
    assert len(again.ask("get_messages")["data"]["messages"]) == types.count("message")
    assert again.ask("get_state")["data"]["sessionId"] == lines[0]["id"]


def test_state_commands_answer_as_recorded(start: Any, dialect: str) -> None:
    pi, skip = start(), {"get_tree"}
    pi.prompt("!say hello there")
    timeline = (FIXTURES / f"pi-{dialect}" / "state_commands.io").read_text("utf-8").split("\n")
    sent = [json.loads(line.split(" < ")[1]) for line in timeline if " < {" in line]
    answers = {event["id"]: event for event in recorded(dialect, "state_commands") if "id" in event}
    for request in sent:
        if request["type"] in skip or request["type"] == "prompt" or request["id"] not in answers:
            continue
        expected = answers[request["id"]]
        pi.send(**request)
        answer = pi.until("response", id=request["id"])
        assert (list(answer), answer["success"]) == (list(expected), expected["success"]), request
        if isinstance(expected.get("data"), dict) and request["id"] != "c0":
            assert list(answer["data"]) == list(expected["data"]), request


def test_new_session_while_running(start: Any, dialect: str) -> None:
    pi = start()
    pi.send(type="prompt", id="p0", message="!slow 50\n!text 60")
    pi.until("message_update")
    pi.ask("new_session")
    assert ("agent_end" in order(pi.events)) is (dialect == "0.87")
    assert not pi.ask("get_state")["data"]["isStreaming"]
    assert "done" not in json.dumps(pi.prompt("!say fresh")[-2])


def test_dialog(start: Any) -> None:
    pi = start()
    pi.send(type="prompt", id="p", message="!dialog notify\n!dialog select\n!dialog confirm 50")
    pi.until("extension_ui_request", method="notify")
    request = pi.until("extension_ui_request", method="select")
    pi.send(type="extension_ui_response", id=request["id"], value="green")
    assert pi.until("extension_ui_request", method="confirm")["timeout"] == 50
    text = pi.until("message_end")["message"]["content"][0]["text"]
    assert text == 'select: {"value":"green"}confirm: null'


@pytest.mark.parametrize(
    ("script", "code", "last"),
    [("!crash 3", 3, b"message_start"), ("!say a\n!halfline", 1, b'"text_del')],
)
def test_faults_that_end_the_process(start: Any, script: str, code: int, last: bytes) -> None:
    pi = start()
    pi.send(type="prompt", id="p", message=script)
    lines = []
    while True:
        line = pi.raw()
        if line is None:
            break
        lines.append(line)
    assert pi.process.wait(10) == code
    assert last in lines[-1]


def test_faults_on_the_line(start: Any) -> None:
    pi = start()
    pi.send(type="prompt", id="p", message="!garbage\n!bigline 3000000\n!say x\n!badutf8\n!error 529 Overloaded")
    seen: list[bytes] = []
    while not seen or b'"type":"agent_end"' not in seen[-1]:
        line = pi.raw()
        assert line is not None
        seen.append(line)
    assert b"this is not json\n" in seen
    assert max(len(line) for line in seen) == 3000000
    assert any(b"\xff\xfe" in line for line in seen)
    assert any(b'"stopReason":"error"' in line and b"529 Overloaded" in line for line in seen)


def test_hang_and_endings(start: Any, dialect: str) -> None:
    pi = start()
    pi.send(type="prompt", id="p", message="!say x\n!hang")
    pi.until("message_update")
    pi.process.send_signal(signal.SIGTERM)
    assert pi.process.wait(10) == 143
    pi = start()
    pi.ask("get_state")
    pi.process.stdin.close()
    assert pi.process.wait(10) == 0


def test_bash_command(start: Any, dialect: str) -> None:
    pi = start()
    assert pi.ask("bash", command="echo out")["data"]["exitCode"] == 0
    pi.send(type="bash", id="slow", command="sleep 30")
    pi.ask("abort_bash")
    assert pi.until("response", id="slow")["data"]["cancelled"]
    assert ("bash_execution_update" in order(pi.events)) is (dialect == "0.87")


def run(dialect: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "FAKE_PI_DIALECT": dialect, "HOME": "/nonexistent"}
    command = [sys.executable, str(FAKE), *arguments]
    return subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=False
    )


def test_information(dialect: str) -> None:
    version, models = run(dialect, "--version"), run(dialect, "--list-models")
    assert (version.stderr if dialect == "0.73" else version.stdout) == dialect + ".1\n"
    table = (models.stderr if dialect == "0.73" else models.stdout).splitlines()
    assert table[0].split() == ["provider", "model", "context", "max-out", "thinking", "images"]
    assert table[1].split() == ["mock", "mock-1", "200K", "32K", "yes", "yes"]


def test_bad_arguments_end_the_process(dialect: str) -> None:
    assert "Unknown option: --bogus" in run(dialect, "--mode", "rpc", "--bogus").stderr
    assert run(dialect, "--mode", "rpc", "-e", "/nonexistent.js").returncode == 1
    assert (run(dialect, "--mode", "rpc", "--no-approve").returncode == 1) is (dialect == "0.73")
