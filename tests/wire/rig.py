"""What the suites against a running server share: a server with its log of pi's stdin, phones, and chats."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Callable

from tests.support.phone import Frame, Phone, bootstrap_11, quote
from tests.support.server import Server

DIALECTS = ("0.73", "0.87")
PUSH = "git push origin main"  # asks in every preset; may be allowed for ever
FORCED = "rm -rf build"  # asks, and may never be allowed for ever
MANY = {"maxSessionsPerWorkspace": 100, "maxSessionsGlobal": 100}


def eventually(check: Callable[[], Any], timeout: float = 10.0, what: str = "") -> Any:
    """The first true result of `check`, polled; for what sends no event: files, processes, the REST API."""
    deadline = time.monotonic() + timeout
    while True:
        value = check()
        if value:
            return value
        assert time.monotonic() < deadline, f"did not happen within {timeout} s: {what or check}"
        time.sleep(0.01)


def bash(command: str) -> str:
    """The directive by which the fake pi calls the bash tool."""
    return "!tool bash " + json.dumps({"command": command})


def status_is(*statuses: str) -> Callable[[Frame], bool]:
    return lambda frame: frame["type"] == "state" and frame["session"]["status"] in statuses


class Rig:
    """One server and the phones that talk to it.  Every phone it makes is closed, every session deleted, by `sweep`."""

    def __init__(self, server: Server, log: Path) -> None:
        self.server, self.log = server, log
        self.tokens: dict[str, str] = {}
        self.phones: list[Phone] = []
        self.made: list[tuple[str, str]] = []
        self.workspaces: dict[str, str] = {}

    def phone(self, generation: str = "1.1") -> Phone:
        """Another phone of this generation; those of one generation share a device token."""
        if generation not in self.tokens:
            self.tokens[generation] = self.server.pair(generation).token
        phone = Phone(self.server.base_url, self.tokens[generation], generation)
        self.phones.append(phone)
        return phone

    def stream(self) -> Phone:
        """A phone of app 1.1 with its socket open."""
        phone = self.phone()
        phone.open()
        return phone

    def workspace(self, preset: str = "host") -> str:
        """Id of the workspace of this preset, made once."""
        if preset not in self.workspaces:
            fields = {"policyPreset": preset, "hostMount": str(self.server.workspace), "runtime": "host"}
            self.workspaces[preset] = self.phone("1.0").create_workspace(preset, **fields)["id"]
        return self.workspaces[preset]

    def session(self, preset: str = "host", **fields: Any) -> tuple[str, str]:
        """(workspace id, session id) of a new session, not started."""
        wid = self.workspace(preset)
        sid = self.phone().create_session(wid, **fields)["id"]
        self.made.append((wid, sid))
        return wid, sid

    def chat(self, generation: str = "1.1", preset: str = "host", **fields: Any) -> Chat:
        """A phone in a new running session."""
        return self.join(*self.session(preset, **fields), generation)

    def join(self, wid: str, sid: str, generation: str = "1.1") -> Chat:
        """Another phone in a session, which is started if need be."""
        phone = self.phone(generation)
        if generation == "1.1":
            phone.open()
            phone.subscribe(sid)
        else:
            phone.open_session(wid, sid)
            phone.wait("state")
        return Chat(self, phone, wid, sid)

    def stdin_of_pi(self) -> list[Any]:
        """Every line the server ever wrote to a pi."""
        text = self.log.read_text("utf-8") if self.log.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def prompts_of_pi(self) -> list[str]:
        return [line["message"] for line in self.stdin_of_pi() if line["type"] == "prompt"]

    def verdicts_of_pi(self) -> list[str]:
        """The gate's answers so far: allow or deny."""
        texts = [line.get("value") or "" for line in self.stdin_of_pi() if line["type"] == "extension_ui_response"]
        return [json.loads(text)["verdict"] for text in texts if '"verdict"' in text]

    def audit(self) -> list[Any]:
        path = self.server.data / "audit.jsonl"
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []

    def stored_rules(self) -> str:
        path = self.server.data / "rules.json"
        return path.read_text("utf-8") if path.exists() else ""

    def sweep(self) -> None:
        """After a test: nothing it opened stays open; what its phones complained about is raised."""
        phones, self.phones = self.phones, []
        made, self.made = self.made, []
        for phone in phones:
            phone.drop()  # a closing handshake with each would only cost time
        if made and self.server.alive:
            phone = self.phone()
            for wid, sid in made:
                with contextlib.suppress(AssertionError):
                    phone.delete(wid, sid)
        for phone in phones:
            phone.raise_errors()


class Chat:
    """A phone that looks at one running session."""

    def __init__(self, rig: Rig, phone: Phone, wid: str, sid: str) -> None:
        self.rig, self.phone, self.wid, self.sid = rig, phone, wid, sid

    def say(self, text: str, **fields: Any) -> None:
        """Send a prompt; returns when it is acknowledged."""
        self.phone.prompt(self.sid, text, **fields)

    def settled(self, timeout: float = 20.0) -> list[Frame]:
        """Wait for the end of the turn; the frames since the prompt."""
        self.phone.wait("agent_end", timeout)
        frames = self.phone.since()
        end = self.phone.frames.index(next(f for f in frames if f["type"] == "agent_end"))
        self.phone.wait(status_is("ready"), timeout, since=end)
        return self.phone.since()

    def play(self, text: str, timeout: float = 20.0, **fields: Any) -> list[Frame]:
        """A whole turn that needs no answer; its frames."""
        self.say(text, **fields)
        return self.settled(timeout)

    def ask(self, command: str = PUSH, then: str = "") -> Frame:
        """Make the agent ask for a command; the permission request."""
        self.say(bash(command) + then)
        return self.phone.wait("permission_request", sessionId=self.sid)

    def answer_of(self) -> str:
        """The text of the finished assistant messages since the prompt."""
        return "|".join(f["content"] for f in self.phone.since() if f["type"] == "message_end" and f["role"] == "assistant")

    def output(self) -> str:
        """What the tools have put out since the prompt."""
        return "".join(f["output"] for f in self.phone.since() if f["type"] == "tool_output")

    def stop(self) -> None:
        self.phone.stop(self.wid, self.sid)

    @property
    def path(self) -> str:
        return f"/workspaces/{quote(self.wid)}/sessions/{quote(self.sid)}"


def kinds(frames: list[Frame], *leave_out: str) -> list[str]:
    """The types of frames in order, runs of the same one told once."""
    found: list[str] = []
    for frame in frames:
        if frame["type"] not in leave_out and found[-1:] != [frame["type"]]:
            found.append(frame["type"])
    return found


@contextlib.contextmanager
def rig_with(
    folder: Path,
    dialect: str = "0.87",
    fake: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    **options: Any,
) -> Iterator[Rig]:
    """A rig whose server has these settings of the fake pi and of config.json."""
    log = folder / "stdin.log"
    settings = {"LOG": str(log), **(fake or {})}
    with Server(dialect=dialect, fake=settings, config={**MANY, **(config or {})}, **options) as server:
        rig = Rig(server, log)
        try:
            yield rig
        finally:
            with contextlib.suppress(AssertionError):
                rig.sweep()


def new_phone(server: Server) -> Phone:
    """A phone of app 1.1 with a device token of its own."""
    return bootstrap_11(server.invite()["inviteURL"])
