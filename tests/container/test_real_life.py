"""The real pi in containers of servers that end, die and start again, and what never gets inside."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.container.rig import Apple
from tests.container.test_real import Sealed
from tests.real.conftest import VERSIONS, eventually
from tests.support.mock_llm import MockLLM
from tests.support.phone import Phone

CANARIES = ("models-canary-4711", "header-canary-4712", "auth-canary-4713", "oauth-canary-4714", "environ-canary-4715",
            "command-canary-4716", "refresh-canary-4717")  # fmt: skip


@pytest.fixture
def own(request: pytest.FixtureRequest) -> Iterator[Sealed]:
    """One for a test that ends it; not started yet."""
    with MockLLM() as llm, Apple() as apple:
        place = Sealed(getattr(request, "param", "0.87.1"), llm, apple)
        with place.server:
            yield place


@pytest.mark.parametrize("own", VERSIONS, indirect=True)
def test_a_killed_server_adopts_its_container_and_goes_on(own: Sealed, tmp_path: Path) -> None:
    own.server.start()
    chat = own.chat(own.server.pair("1.1"), tmp_path / "project")
    chat.turn("!say remember the cheese")
    box, record = own.box(chat), own.apple.record(own.box(chat))
    chat.ask('!tool bash {"command": "touch marker; sleep 34.25"}\n!say never')
    eventually((chat.folder / "marker").exists, "the command to run")
    own.server.restart(graceful=False)
    chat.phone = Phone(own.server.base_url, chat.phone.token, "1.1")
    assert chat.session()["status"] == "stopped"
    eventually(lambda: not any("sleep 34.25" in line for line in own.apple.processes(box).values()), "no orphan inside")
    chat.connect()
    assert chat.turn("!say I do") == "I do"
    assert "remember the cheese" in str(own.sees())
    again = own.apple.record(box)
    assert record and again and again["pid"] == record["pid"], "it is another container"
    own.server.stop()
    assert own.apple.running() == []


def test_a_container_that_dies_is_told_of_and_the_next_one_goes_on(own: Sealed, tmp_path: Path) -> None:
    own.server.start()
    chat = own.chat(own.server.pair("1.1"), tmp_path / "project")
    chat.turn("!say remember the cheese")
    chat.ask("!slow 30\n!text 2000")
    chat.wait(lambda f: f["type"] == "text_delta" and "w5 " in f["delta"])
    own.apple.die(own.box(chat))
    error = chat.wait("error")
    assert "The workspace's container has ended" in error["error"]
    chat.wait("session_ended")
    chat.reconnect()
    assert chat.turn("!say I do") == "I do"
    assert "remember the cheese" in str(own.sees())


def test_an_idle_container_is_stopped_and_comes_back(own: Sealed, tmp_path: Path) -> None:
    own.server.config(workspaceIdleTimeoutMs=1500)
    own.server.start()
    chat = own.chat(own.server.pair("1.1"), tmp_path / "project")
    chat.turn("!say remember the cheese")
    chat.phone.stop(chat.wid, chat.sid)
    eventually(lambda: own.apple.running() == [], "the container to be stopped", 20)
    chat.reconnect()
    chat.turn("!say I do")
    assert "remember the cheese" in str(own.sees())


@pytest.mark.parametrize("version", VERSIONS)
def test_no_credential_gets_inside(version: str, tmp_path: Path) -> None:
    """Canaries wherever pi takes credentials from; the model gets the right one, and the agent can find none."""
    with MockLLM() as llm, Apple() as apple:
        place = Sealed(version, llm, apple, env={"GROQ_API_KEY": CANARIES[4], "MY_MODEL_KEY": CANARIES[4]})
        agent = place.server.agent_dir
        models = json.loads(llm.models_json())
        mock = models["providers"]["mock"]
        mock.update(apiKey=CANARIES[0], headers={"X-Secret": CANARIES[1]})
        models["providers"]["other"] = {**mock, "apiKey": f"!echo {CANARIES[5]}", "headers": {}}
        models["providers"]["third"] = {**mock, "apiKey": "MY_MODEL_KEY", "headers": {}}
        (agent / "models.json").write_text(json.dumps(models))
        (agent / "auth.json").write_text(json.dumps({
            "openai": {"type": "api_key", "key": CANARIES[2]},
            "anthropic": {
                "type": "oauth", "access": f"sk-ant-oat01-{CANARIES[3]}", "refresh": CANARIES[6], "expires": 4102444800000,
            },
        }))  # fmt: skip
        (agent / "auth.json").chmod(0o600)
        (agent / "settings.json").write_text(json.dumps({"apiKey": CANARIES[0], "defaultProvider": "mock"}))
        with place.server:
            place.server.start()
            phone = place.server.pair("1.1")
            chat = place.chat(phone, tmp_path / "project")
            chat.turn("!say hello")
            heads = llm.headers[-1]
            assert heads["authorization"] == f"Bearer {CANARIES[0]}" and heads["x-secret"] == CANARIES[1]
            for provider, canary in (("other", CANARIES[5]), ("third", CANARIES[4])):
                chat.command("set_model", provider=provider, modelId="mock-1")
                chat.turn("!say hello again")
                assert llm.headers[-1]["authorization"] == f"Bearer {canary}"
            box = place.box(chat)
            seen = apple.ok(
                "exec", box, "/bin/sh", "-c",
                "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline; env; find /work /oppi /cache /tmp /run /home -type f | xargs cat",
            )  # fmt: skip
            said = seen + apple.spoken() + "\n".join(place.server.stderr)
            assert "mock-1" in seen, "nothing was read"
            assert [canary for canary in CANARIES if canary in said] == []
            base = place.server.data / "sandboxes"
            held = b"".join(p.read_bytes() for p in base.rglob("*") if p.is_file() and not p.is_symlink())
            assert [canary for canary in CANARIES if canary.encode() in held] == []


def test_no_port_of_the_host_answers_an_agent(own: Sealed, tmp_path: Path) -> None:
    """Neither the API for phones, though it listens everywhere, nor the model server on loopback."""
    own.server.start("--host", "0.0.0.0")
    chat = own.chat(own.server.pair("1.1"), tmp_path / "project")
    (shown,) = own.apple.json("inspect", own.box(chat))
    gateway = shown["status"]["networks"][0]["ipv4Gateway"]
    script = (
        "import socket, sys\n"
        "s = socket.socket(); s.settimeout(3)\n"
        "try:\n    s.connect((sys.argv[1], int(sys.argv[2]))); s.sendall(b'GET /health HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n')\n"
        "    print(s.recv(100).decode() or 'closed')\nexcept OSError: print('refused')\n"
    )
    for port in (own.server.port, own.llm.port):
        answer = own.apple.ok("exec", own.box(chat), "/usr/bin/python3", "-c", script, gateway, str(port))
        assert answer in ("refused", "closed") or answer.startswith("HTTP/1.1 403 "), f"port {port} answers a container: {answer}"
