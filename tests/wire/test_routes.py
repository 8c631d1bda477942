"""Every route there is: who is refused, what an unknown place is called, and what a request leaves behind."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import oppi
from tests.bench.common import cpu_seconds
from tests.bench.sessions import stored_session
from tests.support.phone import Phone

from .rig import Rig, eventually, rig_with

ROUTES = [(method if method != "*" else "GET", path) for path, row in oppi.ROUTES.items() for method in row]
OPEN = {("GET", "/health"), ("POST", "/pair")}
WORKSPACE, SESSION = "Workspace not found", "Session not found"
ASKED_FOR = {"/files": "?path=a", "/overall-diff": "?path=a", "/events": "?since=0"}
BODIES: dict[str, Any] = {"/fork": {"entryId": "e1"}, "/client-logs": {"entries": [{"message": "x"}]}}
BELONGS = ("/resume", "/fork")  # which say of a session in another workspace that it belongs elsewhere


def filled(path: str, **ids: str) -> str:
    return re.sub(r":(\w+)", lambda found: ids.get(found[1], "nope1234"), path)


def ask(phone: Phone, method: str, path: str, **ids: str) -> tuple[int, Any]:
    end = "/" + path.rpartition("/")[2]
    body = BODIES.get(end, {}) if method in ("POST", "PUT", "PATCH") else None
    return phone.request(method, filled(path, **ids) + ASKED_FOR.get(end, ""), body)


@pytest.mark.parametrize(("method", "path"), [route for route in ROUTES if route not in OPEN])
def test_nobody_without_a_token_is_let_in(rig: Rig, method: str, path: str) -> None:
    for token in ("", "dt_" + "x" * 24, "ab" * 32):
        phone = Phone(rig.server.base_url, token)
        assert ask(phone, method, path) == (401, {"error": "Unauthorized"})


@pytest.mark.parametrize(("method", "path"), [route for route in ROUTES if ":wid" in route[1]])
def test_an_unknown_place_is_called_what_the_app_expects(rig: Rig, method: str, path: str) -> None:
    phone, (wid, sid) = rig.phone(), rig.session()
    other = rig.workspace("host_locked")
    if (method, path) == ("DELETE", "/workspaces/:wid"):
        assert ask(phone, method, path) == (200, {"ok": True})  # also when it is not there
    elif ":sid" not in path:
        assert ask(phone, method, path) == (404, {"error": WORKSPACE})
    else:
        first = WORKSPACE if path.endswith(BELONGS) else SESSION
        assert ask(phone, method, path, sid=sid) == (404, {"error": first})
        assert ask(phone, method, path, wid=wid) == (404, {"error": SESSION})
        elsewhere = (400, {"error": "Session does not belong to this workspace"})
        wanted = elsewhere if path.endswith(BELONGS) else (404, {"error": SESSION})
        assert ask(phone, method, path, wid=other, sid=sid) == wanted
    assert phone.session_detail(wid, sid)["session"]["status"] == "starting"  # and nothing has happened to it


@pytest.mark.parametrize("path", [path for path, row in oppi.ROUTES.items() if "*" not in row])
def test_no_other_method_is_known(rig: Rig, path: str) -> None:
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE"} - set(oppi.ROUTES[path]):
        twin = [name for name in oppi.ROUTES if method in oppi.ROUTES[name] and fits(name, path)]
        if not twin:  # "/skills/rescan" is a name of a skill too
            answer = rig.phone().raw(method, filled(path), {} if method != "GET" else None)
            assert (answer.status, answer.json()) == (404, {"error": "Not found"}), method


def fits(pattern: str, path: str) -> bool:
    return re.fullmatch(re.sub(r":\w+", "[^/]+", pattern), filled(path)) is not None


class TestWhatIsLeft:
    """Side effects that no answer shows."""

    def test_deleting_a_session_leaves_its_conversation(self, rig: Rig) -> None:
        chat = rig.chat()
        chat.play("hello")
        [file] = [Path(f) for f in json.loads(stored(rig, chat.sid).read_text())["session"]["piSessionFiles"]]
        chat.phone.delete(chat.wid, chat.sid)
        eventually(lambda: not stored(rig, chat.sid).exists())
        assert "hello" in file.read_text()

    def test_a_fork_that_fails_leaves_no_session(self, rig: Rig) -> None:
        chat = rig.chat()
        chat.play("hello")
        before = {session["id"] for session in chat.phone.sessions()}
        assert chat.phone.request("POST", f"{chat.path}/fork", {"entryId": "nope"})[0] == 500
        assert {session["id"] for session in chat.phone.sessions()} == before

    def test_stopping_what_does_not_run_is_an_activity(self, rig: Rig) -> None:
        wid, sid = rig.session()
        before = rig.phone().session_detail(wid, sid)["session"]["lastActivity"]
        after = rig.phone().stop(wid, sid)["session"]
        assert after["status"] == "stopped" and after["lastActivity"] >= before
        eventually(lambda: json.loads(stored(rig, sid).read_text())["session"]["status"] == "stopped")

    def test_a_changed_workspace_leaves_what_runs_as_it_is(self, rig: Rig) -> None:
        chat = rig.chat()
        phone = rig.phone("1.0")
        phone.call("PUT", f"/workspaces/{chat.wid}", {"systemPrompt": "Be brief"})
        chat.play("hello")
        assert chat.phone.session_detail(chat.wid, chat.sid)["session"]["status"] == "ready"
        phone.call("PUT", f"/workspaces/{chat.wid}", {"systemPrompt": None})

    def test_the_counts_follow_the_sessions(self, rig: Rig) -> None:
        def counts() -> tuple[int, int]:
            stats = rig.phone().server_info()["stats"]
            return stats["activeSessionCount"], stats["totalSessionCount"]

        active, every = counts()
        chat = rig.chat()
        assert counts() == (active + 1, every + 1)
        chat.stop()
        assert counts() == (active, every + 1)


def stored(rig: Rig, sid: str) -> Path:
    return rig.server.data / "sessions" / f"{sid}.json"


def test_models_stay_when_pi_cannot_list_them_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    pi = tmp_path / "pi"

    def write(text: str, code: int = 0) -> None:
        pi.write_text(f"#!/bin/sh\ncat <<'E'\n{text}\nE\nexit {code}\n")
        pi.chmod(0o755)

    async def listed() -> list[str]:
        info._models_at -= info.MODELS_AGE_S + 1  # they have become old
        await info.known_models()
        if info._listing:
            await info._listing
        return [model["id"] for model in info.models]

    info = oppi.PiInfo(lambda: {"PATH": f"{tmp_path}:/usr/bin:/bin", "OPPI_PI_BIN": str(pi)})
    monkeypatch.setattr(info, "path", lambda: str(pi))
    write("provider  model   context  max-out  thinking  images\nmock      mock-1  200K     16.4K    yes       no")
    assert asyncio.run(listed()) == ["mock/mock-1"]
    write("something went wrong", 1)
    assert asyncio.run(listed()) == ["mock/mock-1"]
    write("No models available. Log in first.")
    assert asyncio.run(listed()) == []


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rig, str]]:
    """A server with 1,000 sessions of one workspace."""
    with rig_with(tmp_path_factory.mktemp("crowded")) as rig:
        wid = rig.workspace()
        rig.server.stop()
        for number in range(1000):
            record = stored_session(number, wid)
            stored(rig, record["session"]["id"]).write_text(json.dumps(record))
        rig.server.start()
        yield rig, wid


def test_a_list_of_a_thousand_sessions_is_fast(crowded: tuple[Rig, str]) -> None:
    """The original took 7.9 ms for 200 of them."""
    rig, wid = crowded
    phone = rig.phone("1.0")
    for path in ("/sessions", f"/workspaces/{wid}/sessions"):
        ids = [session["id"] for session in phone.call("GET", path)["sessions"]]
        assert ids == [f"L{number:07}" for number in reversed(range(1000))]
        costs = []
        for _ in range(5):
            used = cpu_seconds(rig.server.pid)
            for _ in range(10):
                assert phone.raw("GET", path).status == 200
            costs.append((cpu_seconds(rig.server.pid) - used) / 10)
        assert min(costs) < 0.008, costs
