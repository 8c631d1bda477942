"""The real pi of both versions behind a running server, and a phone in a fresh session of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from tests.support.mock_llm import MockLLM
from tests.support.phone import CommandFailed, Frame, Phone
from tests.support.server import Server
from tests.support.tools import install_pi

VERSIONS = ("0.73.1", "0.87.1")
__all__ = ["LONG", "Chat", "CommandFailed", "Place", "clone", "eventually", "opened"]
LONG = 30.0  # s a real pi may take for anything; no test waits that long when all is well
LIMITS = {"maxSessionsPerWorkspace": 50, "maxSessionsGlobal": 100}


class Place:
    """A server with a real pi and a scripted model."""

    def __init__(self, version: str, llm: MockLLM, **config: Any) -> None:
        self.version, self.llm = version, llm
        self.new = not version.startswith("0.73")  # speaks the newer protocol
        self.server = Server(pi=install_pi(version), start=False, config={**LIMITS, **config})
        (self.server.agent_dir / "models.json").write_text(llm.models_json())
        (self.server.agent_dir / "settings.json").write_text('{"retry": {"baseDelayMs": 300}}')

    def sees(self) -> list[dict[str, Any]]:
        """The messages of the last request to the model."""
        found: list[dict[str, Any]] = self.llm.requests[-1]["messages"]
        return found

    def tool_results(self) -> list[str]:
        """The tool results in the last request to the model."""
        return [str(message["content"]) for message in self.sees() if message["role"] == "tool"]

    def running(self, word: str) -> list[int]:
        """Processes of this server with a word in their command line."""
        return [pid for pid, line in self.server.orphans() if word in line]


class Chat:
    """One phone in one session; `folder` is the directory pi works in."""

    def __init__(self, place: Place, phone: Phone, folder: Path, **workspace: Any) -> None:
        self.place, self.phone, self.folder = place, phone, folder
        self.llm, self.server = place.llm, place.server
        folder.mkdir(exist_ok=True)
        fields = {"policyPreset": "host_standard", "hostMount": str(folder), **workspace}
        self.wid = phone.create_workspace("Real", **fields)["id"]
        self.sid = phone.create_session(self.wid, model="mock/mock-1")["id"]

    def connect(self) -> None:
        if self.phone.generation == "1.1":
            self.phone.open()
            self.phone.subscribe(self.sid)
        else:
            self.phone.open_session(self.wid, self.sid)
            self.phone.wait("state", LONG, since=0)  # pi runs now

    def reconnect(self, phone: Phone | None = None) -> None:
        self.phone = phone or self.phone
        self.connect()

    def ask(self, text: str, **options: Any) -> None:
        """Send a prompt; what comes after it can be awaited from its mark."""
        self.phone.prompt(self.sid, text, **{"timeout": LONG, **options})

    def wait(self, what: str | Callable[[Frame], bool], timeout: float = LONG, **fields: Any) -> Frame:
        return self.phone.wait(what, timeout, **fields)

    def turn(self, text: str) -> str:
        """A whole turn that needs nobody; the text that streamed."""
        self.ask(text)
        self.ready()
        return self.phone.text()

    def ready(self) -> None:
        """Wait until the turn has ended and the session says that it is ready."""
        ended = self.wait("agent_end")
        start = self.phone.frames.index(ended)
        self.wait(lambda f: f["type"] == "state" and f["session"]["status"] == "ready", since=start)

    def approve(self, action: str = "allow", **fields: Any) -> Frame:
        """Wait for an approval to be asked for and answer it."""
        asked = self.wait("permission_request", sessionId=self.sid)
        self.phone.answer(asked["id"], action, **fields)
        return asked

    def command(self, kind: str, **fields: Any) -> Frame:
        """The result of a command that has to succeed."""
        return self.phone.command(kind, self.sid, timeout=LONG, check=True, **fields)

    def session(self) -> dict[str, Any]:
        return dict(self.phone.session_detail(self.wid, self.sid)["session"])

    def trace(self, view: str = "full") -> list[dict[str, Any]]:
        """What is read back, without the notes about model and thinking level."""
        events = self.phone.session_detail(self.wid, self.sid, view)["trace"]
        return [e for e in events if e["type"] != "system" or not e["text"].startswith(("Model: ", "Thinking level: "))]


def eventually(condition: Callable[[], Any], what: str, timeout: float = LONG) -> Any:
    """The first true value of a condition that no frame announces."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {timeout} s for {what}"
        time.sleep(0.02)


@pytest.fixture(scope="session", params=VERSIONS)
def shared(request: pytest.FixtureRequest) -> Iterator[Place]:
    """One server for all tests that do not end it; each has its own workspace and session."""
    with MockLLM() as llm:
        place = Place(request.param, llm)
        with place.server:
            place.server.start()
            yield place


@pytest.fixture(scope="session")
def phones(shared: Place) -> dict[str, Phone]:
    return {generation: shared.server.pair(generation) for generation in ("1.0", "1.1")}


def clone(phone: Phone) -> Phone:
    """The same device with an empty memory."""
    return Phone(phone.base_url, phone.token, phone.generation)


@pytest.fixture
def chat(shared: Place, phones: dict[str, Phone], tmp_path: Path) -> Iterator[Chat]:
    """App 1.1 in a new, running session; every command that is not read-only needs its approval."""
    yield from opened(shared, phones["1.1"], tmp_path)


@pytest.fixture
def chat10(shared: Place, phones: dict[str, Phone], tmp_path: Path) -> Iterator[Chat]:
    """The same as app 1.0."""
    yield from opened(shared, phones["1.0"], tmp_path)


def opened(place: Place, phone: Phone, folder: Path, **workspace: Any) -> Iterator[Chat]:
    found = Chat(place, clone(phone), folder / "project", **workspace)
    try:
        found.connect()
        yield found
        found.phone.raise_errors()
    finally:
        found.phone.drop()
        found.phone.stop(found.wid, found.sid)


@pytest.fixture(params=VERSIONS)
def own(request: pytest.FixtureRequest) -> Iterator[Place]:
    """A server of its own, for a test that ends or configures it; not started yet."""
    with MockLLM() as llm:
        place = Place(request.param, llm)
        with place.server:
            yield place
