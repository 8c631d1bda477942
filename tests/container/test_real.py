"""The real pi of both versions in a container: whole turns, ends, forks, restarts, and what never gets inside."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.container.rig import Apple
from tests.real.conftest import LIMITS, VERSIONS, Chat, CommandFailed, Place, eventually
from tests.support.mock_llm import MockLLM
from tests.support.phone import Phone
from tests.support.server import Server
from tests.support.tools import install_pi


class Sealed(Place):
    """A server whose workspaces are in containers of the stand-in, and a model that only the server can reach."""

    def __init__(self, version: str, llm: MockLLM, apple: Apple, env: dict[str, str] | None = None, **config: Any) -> None:
        self.version, self.llm, self.apple = version, llm, apple
        self.new = not version.startswith("0.73")
        self.server = Server(
            pi=install_pi(version), start=False, config={**LIMITS, **config}, env={**apple.env, **(env or {})}
        )
        (self.server.agent_dir / "models.json").write_text(llm.models_json())
        (self.server.agent_dir / "settings.json").write_text('{"retry": {"baseDelayMs": 300}}')

    def chat(self, phone: Phone, folder: Path, **fields: Any) -> Chat:
        chat = Chat(self, phone, folder, runtime="container", **{"policyPreset": "container", **fields})
        eventually(lambda: self._connected(chat), "the image to be built")
        return chat

    def _connected(self, chat: Chat) -> bool:
        try:
            chat.connect()
            return True
        except CommandFailed as error:
            assert "being prepared" in str(error)
            chat.phone.drop()
            return False

    def box(self, chat: Chat) -> str:
        """The container of a chat's workspace."""
        found = self.apple.store.read()["containers"].items()
        (name,) = [name for name, record in found if record["configuration"]["labels"].get("oppi.workspace") == chat.wid]
        return name

    def agents(self, chat: Chat) -> list[int]:
        """pi processes in that container."""
        return [pid for pid, argv in self.apple.execs(self.box(chat)).items() if "rpc" in argv]


@pytest.fixture(params=VERSIONS, scope="module")
def sealed(request: pytest.FixtureRequest) -> Iterator[Sealed]:
    with MockLLM() as llm, Apple() as apple:
        place = Sealed(request.param, llm, apple)
        with place.server:
            place.server.start()
            yield place


@pytest.fixture
def chat(sealed: Sealed, tmp_path: Path) -> Iterator[Chat]:
    phone = sealed.server.pair("1.1")
    chat = sealed.chat(phone, tmp_path / "project")
    yield chat
    phone.raise_errors()
    phone.delete(chat.wid, chat.sid)
    phone.call("DELETE", f"/workspaces/{chat.wid}")
    phone.close()


def texts(chat: Chat) -> list[str]:
    return [event["text"].strip() for event in chat.trace() if event["type"] in ("user", "assistant") and event["text"].strip()]


def test_a_turn_with_an_approval(sealed: Sealed, chat: Chat) -> None:
    """It is asked about, denied, asked about again, allowed, and runs in the container as nobody special."""
    (chat.folder / "build").mkdir()
    chat.ask('!tool bash {"command": "rm -rf build"}\n!say understood')
    asked = chat.approve("deny")
    assert asked["tool"] == "bash" and "rm -rf build" in json.dumps(asked)
    chat.ready()
    assert (chat.folder / "build").exists()
    assert any("denied" in result.lower() for result in sealed.tool_results())
    chat.ask('!tool bash {"command": "rm -rf build && id -u && pwd && cat /proc/1/comm > inside"}\n!say done')
    chat.approve("allow")
    chat.ready()
    assert chat.phone.text() == "done"
    assert not (chat.folder / "build").exists()
    output = "".join(f["output"] for f in chat.phone.since() if f["type"] == "tool_output")
    assert output.split() == ["1001", "/work"]
    assert (chat.folder / "inside").read_text() != Path("/proc/1/comm").read_text()
    assert chat.session()["runtime"] == "container"


def test_files_and_differences_are_found_by_the_names_the_agent_uses(sealed: Sealed, chat: Chat) -> None:
    chat.turn('!tool write {"path": "/work/notes.md", "content": "one\\ntwo\\n"}\n!say done')
    stats = chat.session()["changeStats"]
    assert stats["changedFiles"] == ["notes.md"]
    base = f"/workspaces/{chat.wid}/sessions/{chat.sid}"
    for path in ("notes.md", "/work/notes.md"):
        assert chat.phone.raw("GET", f"{base}/files?path={path}").body == b"one\ntwo\n"
        assert chat.phone.call("GET", f"{base}/overall-diff?path={path}")["currentText"] == "one\ntwo\n"
    chat.phone.call("GET", f"{base}/files?path=/etc/passwd", expect=403)


def test_a_stopped_session_comes_back_with_its_conversation(sealed: Sealed, chat: Chat) -> None:
    chat.turn("!say remember the cheese")
    before = texts(chat)
    box = sealed.box(chat)
    chat.phone.stop(chat.wid, chat.sid)
    eventually(lambda: not sealed.agents(chat), "pi to end inside", 10)
    assert box in sealed.apple.running(), "others may need the container"
    chat.reconnect()
    assert chat.turn("!say I do") == "I do"
    assert "remember the cheese" in str(sealed.sees())
    assert texts(chat) == [*before, "!say I do", "I do"]


def test_a_stop_in_the_middle_of_an_answer_and_of_a_command(sealed: Sealed, chat: Chat) -> None:
    chat.ask("!slow 30\n!text 2000")
    chat.wait(lambda f: f["type"] == "text_delta" and "w5 " in f["delta"])
    chat.phone.send("stop", sessionId=chat.sid)
    chat.wait("stop_confirmed")
    chat.ask('!tool bash {"command": "touch marker; sleep 33.25"}\n!say never')
    eventually((chat.folder / "marker").exists, "the command to run")
    chat.phone.send("stop_session", sessionId=chat.sid)
    chat.wait("session_ended")
    left = lambda: [line for line in sealed.apple.processes(sealed.box(chat)).values() if "sleep 33.25" in line]  # noqa: E731
    eventually(lambda: not left() and not sealed.agents(chat), "everything inside to end", 10)


def test_a_fork_goes_its_own_way(sealed: Sealed, chat: Chat) -> None:
    chat.turn("!say first")
    chat.turn("!say second")
    entries = chat.command("get_fork_messages")["data"]["messages"]
    fork = chat.phone.fork(chat.wid, chat.sid, entries[1]["entryId"])
    other = copy.copy(chat)
    other.sid = fork["id"]
    other.connect()
    assert other.turn("!say third") == "third"
    assert texts(other) == ["!say first", "first", "!say third", "third"]
    assert texts(chat) == ["!say first", "first", "!say second", "second"]
    chat.phone.delete(chat.wid, fork["id"])


def test_two_workspaces_at_once(sealed: Sealed, chat: Chat, tmp_path: Path) -> None:
    phone = sealed.server.pair("1.0")
    other = Chat(sealed, phone, tmp_path / "other", runtime="container", policyPreset="container")
    other.connect()
    assert sealed.box(chat) != sealed.box(other)
    for each in (chat, other):
        each.turn('!tool bash {"command": "ls -A /work; touch mine; ls /oppi/sessions"}\n!say seen')
        output = "".join(f["output"] for f in each.phone.since() if f["type"] == "tool_output")
        assert {each.sid} == set(output.split())
    phone.delete(other.wid, other.sid)
    phone.close()


def test_the_guard_cannot_be_changed_from_inside(sealed: Sealed, chat: Chat) -> None:
    guard, box = "/oppi/guard/oppi-gate.js", sealed.box(chat)
    chat.ask(f'!tool edit {{"path": "{guard}", "oldText": "deny", "newText": "allow"}}\n!say tried')
    chat.approve("allow")  # not even a person can let it
    chat.ready()
    for path in (guard, "/oppi/guard/x", f"/oppi/guard/sessions/{chat.sid}/models.json", "/usr/local/bin/pi", "/etc/x"):
        done = sealed.apple.call("exec", box, "/bin/sh", "-c", f"echo x >> {path}")
        assert done.returncode and re.search("Read-only file system|Permission denied", done.stderr), path
    cached = sealed.apple.ok("exec", box, "/bin/sh", "-c", "find /tmp -name '*.mjs' -o -name '*compile*'")
    assert cached == "", "the next pi would load this copy of the gate"


def test_another_containers_secret_and_a_dead_one_open_nothing(sealed: Sealed, chat: Chat) -> None:
    """The secret a session is given is worth nothing once it has ended."""
    box = sealed.box(chat)
    read = "cat /oppi/guard/sessions/*/models.json /oppi/guard/sessions/*/auth.json"
    held = sealed.apple.ok("exec", box, "/bin/sh", "-c", read)
    url = re.search(r'"baseUrl": "(http://[^"]+)"', held)
    assert url
    script = (
        "import json, sys, urllib.request, urllib.error\n"
        "request = urllib.request.Request(sys.argv[1] + '/chat/completions', b'{}', {'Authorization': 'Bearer ' + sys.argv[2]})\n"
        "try: print(urllib.request.urlopen(request).status)\n"
        "except urllib.error.HTTPError as error: print(error.code)\n"
    )
    secret = re.search(r'"apiKey": "([^"]+)"', held) or re.search(r'"key": "([^"]+)"', held)
    assert secret

    def tries(token: str) -> str:
        return sealed.apple.ok("exec", box, "/usr/bin/python3", "-c", script, url.group(1), token)

    assert tries("wrong") in ("401", "403")
    assert tries(secret.group(1)) == "200"
    chat.phone.stop(chat.wid, chat.sid)
    assert tries(secret.group(1)) in ("401", "403")
    chat.reconnect()
    chat.turn("!say a new one")
