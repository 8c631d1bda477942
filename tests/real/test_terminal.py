"""Conversations that were begun in the terminal: listed, imported once and only from where they belong, continued."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.phone import Phone

from .conftest import LONG, Chat, Place, clone

WAITING = '!tool bash {"command": "touch marker"}\n!say after the tool'
OPEN_ELSEWHERE = "This pi session is open in another session: "


def questions(chat: Chat) -> list[str]:
    return [event["text"] for event in chat.trace() if event["type"] == "user"]


def by_hand(command: list[str], place: Place, folder: Path, text: str = "") -> subprocess.CompletedProcess[str]:
    environment = place.server.env
    return subprocess.run(command, input=text, cwd=folder, env=environment, capture_output=True, text=True, timeout=99)


def terminal(place: Place, folder: Path, *prompts: str, name: str = "") -> Path:
    """Talk to pi by hand in a folder, without any server; the session file it left in its own place."""
    folder.mkdir(parents=True, exist_ok=True)
    sessions = place.server.agent_dir / "sessions"
    known, more = set(sessions.glob("*/*.jsonl")), list[str]()
    for prompt in prompts:
        command = [str(place.server.pi), *more, "--provider", "mock", "--model", "mock-1", "-p", prompt]
        done = by_hand(command, place, folder)
        assert done.returncode == 0, done.stderr
        more = ["--continue"]
    [file] = set(sessions.glob("*/*.jsonl")) - known
    if name:
        rename(place, folder, file, name)
    return file


def rename(place: Place, folder: Path, file: Path, name: str) -> None:
    command = [str(place.server.pi), "--mode", "rpc", "--session", str(file)]
    lines = json.dumps({"type": "set_session_name", "name": name, "id": "n"}) + "\n"
    done = by_hand(command, place, folder, lines)
    assert '"success":true' in done.stdout, done.stderr


@pytest.fixture
def desk(shared: Place, phones: dict[str, Phone], tmp_path: Path) -> Iterator[Chat]:
    """A workspace on the folder of a person who also works in the terminal; its `sid` is nothing that runs."""
    found = Chat(shared, clone(phones["1.1"]), (tmp_path / "project").resolve())
    yield found
    found.phone.drop()
    for session in found.phone.sessions(found.wid):
        found.phone.stop(found.wid, session["id"])
    found.phone.raise_errors()


def take(desk: Chat, file: Path | str, **fields: Any) -> tuple[int, Any]:
    """Ask for the import of a file: status and body."""
    return desk.phone.request("POST", f"/workspaces/{desk.wid}/sessions", {"piSessionFile": str(file), **fields})


def taken(desk: Chat, file: Path, **fields: Any) -> dict[str, Any]:
    """Import a file, which has to work, and look at it from now on."""
    session: dict[str, Any] = desk.phone.create_session(desk.wid, piSessionFile=str(file), **fields)
    desk.sid = session["id"]
    return session


def listed(desk: Chat) -> dict[str, dict[str, Any]]:
    """The sessions of the terminal, by path."""
    return {session["path"]: session for session in desk.phone.call("GET", "/local-sessions")["sessions"]}


def header(file: Path) -> dict[str, Any]:
    with file.open() as lines:
        return dict(json.loads(next(lines)))


def test_a_conversation_of_the_terminal_goes_on_from_the_phone(desk: Chat) -> None:
    file = terminal(desk.place, desk.folder, "!say remember the cheese", "!say and the wine")
    content = file.read_bytes()
    shown = listed(desk)[str(file)]
    assert shown["piSessionId"] == header(file)["id"] and shown["cwd"] == str(desk.folder)
    assert shown["messageCount"] == 4 and shown["firstMessage"] == "!say remember the cheese"
    assert "mock-1" in shown["model"] and not shown.get("name")
    assert abs(shown["lastModified"] - file.stat().st_mtime * 1000) < 1000
    assert 0 <= shown["lastModified"] - shown["createdAt"] < 120_000

    session = taken(desk, file)
    assert session["workspaceId"] == desk.wid and session["name"] == "!say remember the cheese"
    texts = ["!say remember the cheese", "remember the cheese", "!say and the wine", "and the wine"]
    assert [event["text"] for event in desk.trace()] == texts, "it can be read before anything is started"
    assert str(file) not in listed(desk) and file.read_bytes() == content
    desk.connect()
    assert file.read_bytes() == content, "a look at it changes nothing"
    assert desk.turn("!say on the phone now") == "on the phone now"
    assert [m["content"] for m in desk.place.sees() if m["role"] == "assistant"] == texts[1::2]
    assert [event["text"] for event in desk.trace()] == [*texts, "!say on the phone now", "on the phone now"]
    assert Path(desk.session()["piSessionFile"]) == file and file.read_bytes().startswith(content)
    desk.ask(WAITING)
    asked = desk.approve("deny")
    assert asked["sessionId"] == desk.sid, "its commands are asked for like those of any session"
    desk.ready()
    assert not (desk.folder / "marker").exists()


def test_the_newest_conversation_of_the_terminal_is_first(desk: Chat) -> None:
    files = [terminal(desk.place, desk.folder, f"!say {word}") for word in ("old", "middle", "new")]
    for age, file in zip((300, 200, 100), files):
        os.utime(file, (file.stat().st_mtime - age,) * 2)
    wanted = [str(file) for file in reversed(files)]
    assert [path for path in listed(desk) if path in wanted] == wanted
    order = [session["lastModified"] for session in listed(desk).values()]
    assert order == sorted(order, reverse=True)


def test_an_imported_session_is_named(desk: Chat) -> None:
    long = "!say " + "a very long story " * 10
    plain, named = terminal(desk.place, desk.folder, long), terminal(desk.place, desk.folder, "!say x", name="Cheese")
    assert listed(desk)[str(named)]["name"] == "Cheese"
    assert taken(desk, plain)["name"] == long[:80].strip()
    assert taken(desk, named)["name"] == "Cheese"
    third = terminal(desk.place, desk.folder, "!say y", name="Wine")
    assert taken(desk, third, name="My own")["name"] == "My own"
    desk.connect()
    desk.turn("!say z")
    assert desk.session()["name"] == "My own"


def test_a_conversation_is_imported_once(desk: Chat) -> None:
    file = terminal(desk.place, desk.folder, "!say remember the cheese")
    link = file.with_name("link.jsonl")
    link.symlink_to(file)
    session = taken(desk, file, name="Cheese")
    refusal = (409, {"error": OPEN_ELSEWHERE + "Cheese"})
    assert take(desk, file) == refusal, "it is not started yet, but it is somebody's"
    desk.connect()
    desk.turn("!say on the phone now")
    assert take(desk, file) == refusal and take(desk, link) == refusal
    assert take(desk, file.parent / ".." / file.parent.name / file.name) == refusal
    desk.phone.stop(desk.wid, desk.sid)
    assert take(desk, file) == refusal
    assert str(file) not in listed(desk)
    desk.phone.delete(desk.wid, session["id"])
    assert str(file) in listed(desk) and "on the phone now" in file.read_text(), "the file stays the terminal's"
    again = taken(desk, file)
    assert again["id"] != session["id"] and questions(desk) == ["!say remember the cheese", "!say on the phone now"]


def test_of_two_imports_at_the_same_moment_one_wins(desk: Chat) -> None:
    file = terminal(desk.place, desk.folder, "!say remember the cheese")
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(take(desk, file)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert sorted(found) == [201, 409, 409, 409]


def test_what_is_no_session_of_the_terminal_is_not_imported(desk: Chat) -> None:
    """Nothing outside of pi's own folder may be read, and nothing at all be written, for such a request."""
    good = terminal(desk.place, desk.folder, "!say remember the cheese")
    folder = good.parent
    outside = desk.folder / "stolen.jsonl"
    outside.write_bytes(good.read_bytes())
    bad: dict[str, Path] = {}
    contents = {
        "text.jsonl": "just text\n", "empty.jsonl": "", "other.jsonl": '{"type":"message","id":"a"}\n',
        "half.jsonl": good.read_text()[:40], "list.jsonl": "[1]\n", "session.txt": good.read_text(),
        "anonymous.jsonl": json.dumps({**header(good), "id": 5}) + "\n",
    }  # fmt: skip
    for name, text in contents.items():
        bad[name] = folder / name
        bad[name].write_text(text)
    (folder / "escape.jsonl").symlink_to(outside)
    (folder / "escape").symlink_to(desk.folder)
    (folder / "folder.jsonl").mkdir()
    before = {path: path.read_bytes() for path in (*bad.values(), outside, good)}
    count = len(desk.phone.sessions(desk.wid))
    others = [outside, folder / "escape.jsonl", folder / "escape" / "stolen.jsonl", folder / "folder.jsonl"]
    others += [folder / ".." / ".." / ".." / ".." / ".." / "project" / "stolen.jsonl", folder / "missing.jsonl"]
    for path in (*bad.values(), *others, Path("relative.jsonl"), Path("/etc/passwd"), folder):
        status, body = take(desk, path)
        assert status == 400 and re.match("Invalid session file: .", body["error"]), (path, status, body)
    assert {path: path.read_bytes() for path in before} == before
    assert len(desk.phone.sessions(desk.wid)) == count
    paths = set(listed(desk))
    assert str(good) in paths
    assert not paths & {str(path) for path in (*bad.values(), *others)}, "what cannot be imported is not offered"


@pytest.mark.parametrize("odd", [5, ["x.jsonl"], {}, True, "a\0b.jsonl", "~"])
def test_what_is_no_path_is_not_imported(desk: Chat, odd: Any) -> None:
    status, body = desk.phone.request("POST", f"/workspaces/{desk.wid}/sessions", {"piSessionFile": odd})
    assert status == 400 and body["error"]
    assert [session["id"] for session in desk.phone.sessions(desk.wid)] == [desk.sid]


def test_a_conversation_is_imported_only_into_the_workspace_of_its_folder(desk: Chat, tmp_path: Path) -> None:
    root = desk.folder
    for folder in (root.parent, root.with_name("project-2"), tmp_path / "elsewhere"):
        file = terminal(desk.place, folder, "!say remember the cheese")
        wanted = f"Session CWD ({folder.resolve()}) is not within workspace path ({root})"
        assert take(desk, file) == (400, {"error": wanted})
        assert str(file) in listed(desk), "it can still be imported elsewhere"
    nowhere = desk.phone.create_workspace("No folder")["id"]
    path, body = f"/workspaces/{nowhere}/sessions", {"piSessionFile": str(terminal(desk.place, root, "!say hi"))}
    assert desk.phone.request("POST", path, body) == (400, {"error": "Workspace has no hostMount configured"})
    homeless = file.with_name("homeless.jsonl")
    homeless.write_text(json.dumps({k: v for k, v in header(file).items() if k != "cwd"}) + "\n")
    assert take(desk, homeless) == (400, {"error": "Cannot read session CWD from file"})


def test_a_conversation_of_a_folder_below_goes_on_there(desk: Chat) -> None:
    below = desk.folder / "packages" / "one"
    taken(desk, terminal(desk.place, below, "!say remember the cheese"))
    desk.connect()
    desk.turn('!tool bash {"command": "pwd"}\n!say ok')
    assert [result.strip() for result in desk.place.tool_results()] == [str(below)]


def test_a_workspace_may_be_named_by_a_link(desk: Chat, tmp_path: Path) -> None:
    """pi writes down where it really is; the person may have given the workspace another name of that place."""
    link = tmp_path / "link"
    link.symlink_to(desk.folder)
    file = terminal(desk.place, link, "!say remember the cheese")
    assert header(file)["cwd"] == str(desk.folder)
    desk.wid = desk.phone.create_workspace("Link", hostMount=str(link), policyPreset="host_standard")["id"]
    taken(desk, file)
    desk.connect()
    assert desk.turn("!say next") == "next"
    assert "remember the cheese" in str(desk.place.sees())


def test_a_conversation_whose_terminal_died_is_imported_whole(desk: Chat) -> None:
    """A half line at the end: pi 0.73 would glue its next entry to it and forget everything before."""
    file = terminal(desk.place, desk.folder, "!say remember the cheese")
    with file.open("a") as lines:
        lines.write('{"type":"message","id":"deadbe')
    assert str(file) in listed(desk)
    taken(desk, file)
    desk.connect()
    assert desk.turn("!say next") == "next"
    assert "remember the cheese" in str(desk.place.sees())
    assert questions(desk) == ["!say remember the cheese", "!say next"]


def test_an_imported_conversation_can_be_forked(desk: Chat) -> None:
    file = terminal(desk.place, desk.folder, "!say one", "!say two")
    taken(desk, file)
    content = file.read_bytes()
    entry = next(event["id"] for event in desk.trace() if event["type"] == "user" and event["text"] == "!say two")
    desk.sid = desk.phone.fork(desk.wid, desk.sid, entry)["id"]
    desk.connect()
    assert desk.turn("!say three") == "three"
    assert questions(desk) == ["!say one", "!say three"] and file.read_bytes() == content


def test_an_imported_conversation_survives_a_killed_server(own: Place, tmp_path: Path) -> None:
    own.server.start()
    chat = Chat(own, own.server.pair("1.1"), (tmp_path / "project").resolve())
    assert listed(chat) == {}, "there is no folder of sessions yet"
    file = terminal(own, chat.folder, "!say remember the cheese")
    taken(chat, file)
    chat.connect()
    chat.turn("!say one")
    own.server.kill()
    chat.phone.drop()
    own.server.start()
    chat.phone = clone(chat.phone)
    assert take(chat, file)[0] == 409 and str(file) not in listed(chat)
    chat.connect()
    assert chat.turn("!say two") == "two"
    assert questions(chat) == ["!say remember the cheese", "!say one", "!say two"]
    assert Path(chat.session()["piSessionFile"]) == file
    chat.phone.stop(chat.wid, chat.sid)
    file.unlink()
    assert listed(chat) == {}
    chat.phone.close()
