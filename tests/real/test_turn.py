"""Whole turns with the real pi and a scripted model: what a person with a phone lives through."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mock_llm import MockLLM
from tests.support.phone import Phone
from tests.support.server import Server
from tests.support.tools import install_pi

from .conftest import eventually

PUSH = '!say on it\n!tool bash {"command": "git push"}\n!say finished'


@pytest.fixture(scope="module", params=["0.73.1", "0.87.1"])
def place(request: pytest.FixtureRequest) -> Iterator[tuple[Server, MockLLM]]:
    with MockLLM() as llm, Server(pi=install_pi(request.param), start=False) as server:
        Path(server.agent_dir).mkdir(parents=True, exist_ok=True)
        (Path(server.agent_dir) / "models.json").write_text(llm.models_json())
        server.start()
        yield server, llm


def session(server: Server, phone: Phone) -> tuple[str, str]:
    workspace = phone.create_workspace("w", skills=[], hostMount=str(server.workspace), policyPreset="host")["id"]
    return workspace, phone.create_session(workspace, model="mock/mock-1")["id"]


def tool_results(llm: MockLLM) -> str:
    return str([m for m in llm.requests[-1]["messages"] if m["role"] == "tool"])


@pytest.mark.parametrize("action", ["deny", "allow"])
def test_a_call_waits_for_the_phone_and_follows_its_answer(place: tuple[Server, MockLLM], action: str) -> None:
    server, llm = place
    with server.pair("1.1") as phone:
        workspace, sid = session(server, phone)
        phone.open()
        phone.subscribe(sid)
        phone.prompt(sid, PUSH)
        asked = phone.wait("permission_request", timeout=30)
        assert asked["displaySummary"] == "git push"
        phone.answer(asked["id"], action)
        phone.wait("agent_end", timeout=30)
        end = phone.wait("tool_end")
        assert end["isError"] is True  # denied, or not a repository to push from
        assert ("Denied by user" in tool_results(llm)) is (action == "deny")
        order = [t for t in phone.types() if t in ("tool_start", "permission_request", "tool_output", "tool_end", "agent_end")]
        assert order[:2] == ["tool_start", "permission_request"] and order[-2:] == ["tool_end", "agent_end"]
        assert "finished" in phone.text()
        trace = phone.session_detail(workspace, sid)["trace"]
        assert [e["type"] for e in trace if e["type"] in ("user", "toolCall", "toolResult")] == ["user", "toolCall", "toolResult"]
        phone.stop(workspace, sid)
        phone.resume(workspace, sid)
        phone.subscribe(sid)
        phone.prompt(sid, "!say again")
        phone.wait(lambda f: f["type"] == "message_end" and f["content"] == "again", timeout=30)
        assert "on it" in str(llm.requests[-1]["messages"])


def test_app_10_lives_the_same_turn_on_its_own_socket(place: tuple[Server, MockLLM]) -> None:
    server, _ = place
    with server.pair("1.0") as phone:
        workspace, sid = session(server, phone)
        phone.open_session(workspace, sid)
        phone.prompt(sid, PUSH, timeout=30)
        phone.answer(phone.wait("permission_request", timeout=30)["id"], "deny")
        phone.wait("agent_end", timeout=30)
        assert "finished" in phone.text()


def test_a_killed_server_leaves_nothing_behind_and_loses_nothing(place: tuple[Server, MockLLM]) -> None:
    server, llm = place
    with server.pair("1.1") as phone:
        workspace, sid = session(server, phone)
        phone.open()
        phone.subscribe(sid)
        phone.prompt(sid, "!say remembered")
        phone.wait("agent_end", timeout=30)
        phone.prompt(sid, "!slow 200\n!text 500")
        phone.wait("text_delta", timeout=30)
        before = {pid for pid, _ in server.orphans()}
        server.kill()
    server.start()
    eventually(lambda: not before & {pid for pid, _ in server.orphans()}, "the end of what the server had started")
    phone = Phone(server.base_url, phone.token)
    assert phone.session_detail(workspace, sid)["session"]["status"] == "stopped"
    phone.open()
    phone.subscribe(sid)
    phone.prompt(sid, "!say back")
    phone.wait("agent_end", timeout=30)
    assert "remembered" in str(llm.requests[-1]["messages"])
    phone.close()
