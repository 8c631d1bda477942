"""Forks, and sessions begun in the terminal: who may have which of pi's files, and what is refused with which text."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from .rig import Chat, Rig, eventually


def write_session(rig: Rig, name: str = "one", cwd: str = "", header: Any = None, **more: Any) -> Path:
    """A session as pi leaves it in the terminal."""
    folder = rig.server.agent_dir / "sessions" / "--work--"
    folder.mkdir(parents=True, exist_ok=True)
    head = {"type": "session", "version": 3, "id": f"id-{name}", "timestamp": "2026-01-02T03:04:05.678Z"}
    head.update(cwd=cwd or str(rig.server.workspace), **more)
    user = {"role": "user", "content": [{"type": "text", "text": f"begun in the terminal: {name}"}], "timestamp": 1}
    answer = {"role": "assistant", "content": "fine", "provider": "fake", "model": "m", "timestamp": 2}
    lines = [
        head if header is None else header,
        {"type": "message", "id": "aaaaaaaa", "parentId": None, "timestamp": "2026-01-02T03:04:06.000Z", "message": user},
        {"type": "message", "id": "bbbbbbbb", "parentId": "aaaaaaaa", "timestamp": "2026-01-02T03:04:07.000Z", "message": answer},
    ]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def bring(rig: Rig, path: Any, expect: int = 201, wid: str = "", **more: Any) -> Any:
    """Import a session file; the session, or the error."""
    body = {"piSessionFile": str(path), **more}
    answer = rig.phone().call("POST", f"/workspaces/{wid or rig.workspace()}/sessions", body, expect=expect)
    return answer["session"] if expect == 201 else answer["error"]


def users(chat: Chat) -> list[str]:
    trace = chat.phone.session_detail(chat.wid, chat.sid)["trace"]
    return [event["text"] for event in trace if event["type"] == "user"]


class TestLocalSessions:
    def test_a_session_of_the_terminal_is_listed_as_the_app_reads_it(self, rig: Rig) -> None:
        path = write_session(rig, "listed")
        (found,) = [s for s in rig.phone().call("GET", "/local-sessions")["sessions"] if s["piSessionId"] == "id-listed"]
        assert found["path"] == str(path)
        assert found["cwd"] == str(rig.server.workspace)
        assert (found["messageCount"], found["createdAt"]) == (2, 1767323045678)
        assert found["lastModified"] == int(path.stat().st_mtime * 1000)
        assert (found["firstMessage"], found["model"]) == ("begun in the terminal: listed", "fake/m")

    def test_the_newest_comes_first_and_junk_is_left_out(self, rig: Rig) -> None:
        for number, name in enumerate(("old", "new")):
            os.utime(write_session(rig, name), (2_000_000_000 + number, 2_000_000_000 + number))
        write_session(rig, "headless", header={"type": "message"})
        (rig.server.agent_dir / "sessions" / "noise.jsonl").write_bytes(b"\xff\x00 not a session")
        (rig.server.agent_dir / "sessions" / "loop.jsonl").symlink_to("loop.jsonl")
        os.mkfifo(rig.server.agent_dir / "sessions" / "pipe.jsonl")
        listed = [s["piSessionId"] for s in rig.phone().call("GET", "/local-sessions")["sessions"]]
        assert listed[:2] == ["id-new", "id-old"]
        assert not {"id-headless"} & set(listed)

    def test_the_count_of_a_long_session_is_an_estimate(self, rig: Rig) -> None:
        path = write_session(rig, "long")
        line = path.read_text().splitlines()[-1] + "\n"
        path.write_text(path.read_text() + line * 1000)
        (found,) = [s for s in rig.phone().call("GET", "/local-sessions")["sessions"] if s["piSessionId"] == "id-long"]
        assert 500 < found["messageCount"] < 2000


class TestImport:
    def test_an_imported_session_goes_on_where_the_terminal_stopped(self, rig: Rig) -> None:
        session = bring(rig, write_session(rig, "taken"))
        assert session["name"] == "begun in the terminal: taken"
        chat = rig.join(session["workspaceId"], session["id"])
        rig.made.append((chat.wid, chat.sid))
        assert users(chat) == ["begun in the terminal: taken"]
        chat.play("and on the phone")
        eventually(lambda: users(chat) == ["begun in the terminal: taken", "and on the phone"])
        listed = [s["piSessionId"] for s in rig.phone().call("GET", "/local-sessions")["sessions"]]
        assert "id-taken" not in listed

    def test_a_file_belongs_to_one_session(self, rig: Rig) -> None:
        path = write_session(rig, "twice")
        first = bring(rig, path, name="Mine")
        assert bring(rig, path, 409) == "This pi session is open in another session: Mine"
        rig.phone().delete(first["workspaceId"], first["id"])
        assert path.exists()
        second = bring(rig, path)
        rig.phone().delete(second["workspaceId"], second["id"])

    @pytest.mark.parametrize("kind", ["missing", "outside", "symlink", "name", "header", "folder"])
    def test_what_is_no_session_of_pi_is_refused(self, rig: Rig, tmp_path: Path, kind: str) -> None:
        folder = rig.server.agent_dir / "sessions"
        outside = tmp_path / "x.jsonl"
        outside.write_text(write_session(rig, "model").read_text())
        (folder / "link.jsonl").unlink(missing_ok=True)
        (folder / "link.jsonl").symlink_to(outside)
        (folder / "folder.jsonl").mkdir(exist_ok=True)
        (folder / "name.txt").write_text(outside.read_text())
        path = {
            "missing": folder / "none.jsonl",
            "outside": outside,
            "symlink": folder / "link.jsonl",
            "name": folder / "name.txt",
            "header": write_session(rig, "bad", header={"type": "message"}),
            "folder": folder / "folder.jsonl",
        }[kind]
        assert bring(rig, path, 400).startswith("Invalid session file: ")

    def test_only_sessions_of_the_workspaces_folder_come_in(self, rig: Rig) -> None:
        elsewhere = write_session(rig, "elsewhere", cwd="/usr")
        mount = rig.server.workspace
        assert bring(rig, elsewhere, 400) == f"Session CWD (/usr) is not within workspace path ({mount})"
        nowhere = write_session(rig, "nowhere", header={"type": "session", "id": "x"})
        assert bring(rig, nowhere, 400) == "Cannot read session CWD from file"
        bare = rig.phone("1.0").create_workspace("Bare", policyPreset="host", runtime="host")["id"]
        assert bring(rig, elsewhere, 400, bare) == "Workspace has no hostMount configured"

    @pytest.mark.parametrize("body", [{"piSessionFile": 5}, {"piSessionFile": "/x.jsonl", "prompt": "go"}])
    def test_odd_bodies_are_refused(self, rig: Rig, body: Any) -> None:
        rig.phone().call("POST", f"/workspaces/{rig.workspace()}/sessions", body, expect=400)


class TestFork:
    def test_a_fork_has_what_came_before_and_leaves_the_original_alone(self, both: Rig) -> None:
        chat = both.chat()
        chat.play("first")
        chat.play("second")
        eventually(lambda: len(users(chat)) == 2)
        events = chat.phone.session_detail(chat.wid, chat.sid)["trace"]
        second = [event["id"] for event in events if event["type"] == "user"][1]
        forked = chat.phone.fork(chat.wid, chat.sid, second)
        session = forked.get("session", forked)
        both.made.append((chat.wid, session["id"]))
        assert session["name"].startswith("Fork: ")
        assert session["status"] == "ready"
        other = both.join(chat.wid, session["id"])
        assert users(other) == ["first"]
        other.play("another way")
        eventually(lambda: users(other) == ["first", "another way"])
        assert users(chat) == ["first", "second"]
        chat.play("third")
        eventually(lambda: users(chat) == ["first", "second", "third"])

    def test_what_cannot_be_forked(self, rig: Rig) -> None:
        wid, sid = rig.session()
        fork = f"/workspaces/{wid}/sessions/{sid}/fork"
        call = rig.phone().call
        assert call("POST", fork, {"entryId": "x"}, expect=409)["error"] == "Source session has no trace file to fork from"
        for body in ({}, {"entryId": ""}, {"entryId": 5}):
            assert call("POST", fork, body, expect=400)["error"] == "entryId required"
        other = rig.workspace("container")
        path = f"/workspaces/{other}/sessions/{sid}/fork"
        assert call("POST", path, {"entryId": "x"}, expect=400)["error"] == "Session does not belong to this workspace"
        call("POST", f"/workspaces/{wid}/sessions/nothere1/fork", {"entryId": "x"}, expect=404)

    def test_a_fork_that_pi_refuses_leaves_nothing_behind(self, rig: Rig) -> None:
        chat = rig.chat()
        chat.play("first")
        before = {s["id"] for s in chat.phone.sessions(chat.wid)}
        path = f"/workspaces/{chat.wid}/sessions/{chat.sid}/fork"
        assert "ntry" in rig.phone().call("POST", path, {"entryId": "nonsense"}, expect=500)["error"]
        assert {s["id"] for s in chat.phone.sessions(chat.wid)} == before
