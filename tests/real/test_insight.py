"""What a workspace lists is what the real pi has, and what pi writes down is what the phone can look into."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.phone import Phone

from .conftest import Chat, Place, eventually, opened

EXTENSION = """
export default function (pi) {
  pi.registerCommand("from-%s", { description: "an extension", handler: async () => {} });
}
"""


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def skill(folder: Path, name: str) -> None:
    put(folder / name / "SKILL.md", f"---\nname: {name}\ndescription: The purpose of {name}\n---\nBody of {name}\n")


@pytest.fixture
def equipped(shared: Place, phones: dict[str, Phone], tmp_path: Path) -> Iterator[Chat]:
    """A session whose workspace lists some of the skills and extensions that there are."""
    server = shared.server
    for name in ("chosen-of-pi", "left-of-pi"):
        skill(server.agent_dir / "skills", name)
    for name in ("chosen-of-agents", "left-of-agents"):
        skill(server.home / ".agents" / "skills", name)
    for name in ("chosen-own", "left-own", "chosen-of-pi"):  # the last hides the one of pi
        text = f"---\ndescription: Made for {name}\n---\n"
        phones["1.0"].call("PUT", f"/me/skills/{name}", {"content": text})
    put(server.agent_dir / "extensions" / "listed.js", EXTENSION % "listed")
    put(server.agent_dir / "extensions" / "folder" / "index.js", EXTENSION % "folder")
    put(server.agent_dir / "extensions" / "unlisted.js", EXTENSION % "unlisted")
    fields: dict[str, Any] = {"skills": ["chosen-of-pi", "chosen-of-agents", "chosen-own"]}
    fields.update(extensions=["listed.js", " folder ", "missing"], systemPrompt="Answer in as few words as there are")
    yield from opened(shared, phones["1.1"], tmp_path, **fields)


def test_the_model_is_told_of_the_chosen_skills_and_of_no_other(equipped: Chat) -> None:
    equipped.turn("!say hello")
    prompt = json.dumps([m for m in equipped.place.sees() if m["role"] in ("system", "developer")])
    assert "Made for chosen-of-pi" in prompt and "The purpose of chosen-of-pi" not in prompt
    assert "The purpose of chosen-of-agents" in prompt and "Made for chosen-own" in prompt
    assert "left-" not in prompt
    assert "Answer in as few words as there are" in prompt  # what the workspace says itself


def test_the_listed_extensions_are_loaded_and_no_other(equipped: Chat) -> None:
    commands = {command["name"] for command in equipped.command("get_commands")["data"]["commands"]}
    assert {"from-listed", "from-folder"} <= commands and "from-unlisted" not in commands


def diff_of(chat: Chat, path: str) -> Any:
    route = f"/workspaces/{chat.wid}/sessions/{chat.sid}/overall-diff?path={path}"
    return eventually(lambda: chat.phone.request("GET", route)[0] == 200, "a difference") and chat.phone.call("GET", route)


def test_a_difference_is_what_pi_did_to_the_file(chat: Chat) -> None:
    """Several edits at once, a removed line, an edit that fails, and a file that is made."""
    before = "".join(f"line {number}\n" for number in range(1, 21))
    (chat.folder / "a.txt").write_text(before)
    steps: list[tuple[str, Any]] = [
        ("edit", {"path": "a.txt", "edits": [{"oldText": f"line {n}\n", "newText": f"LINE {n}\nmore\n"} for n in (3, 17)]}),
        ("edit", {"path": str(chat.folder / "a.txt"), "edits": [{"oldText": "line 9\n", "newText": ""}]}),
        ("edit", {"path": "a.txt", "edits": [{"oldText": "not in there", "newText": "x"}]}),
        ("write", {"path": "new.txt", "content": "fresh\n"}),
    ]
    for tool, arguments in steps:
        chat.turn(f"!tool {tool} {json.dumps(arguments)}\n!say done")
    now = (chat.folder / "a.txt").read_text()
    assert now != before and "line 9\n" not in now
    found = diff_of(chat, "a.txt")
    assert (found["baselineText"], found["currentText"], found["revisionCount"]) == (before, now, 2)
    assert (found["addedLines"], found["removedLines"]) == (4, 3)
    made = diff_of(chat, "new.txt")
    assert (made["baselineText"], made["currentText"], made["addedLines"]) == ("", "fresh\n", 1)


def test_a_fork_is_drawn_where_it_was_made(chat: Chat) -> None:
    for word in ("one", "two"):
        chat.turn(f"!say {word}")
    entry = [event["id"] for event in chat.trace() if event["type"] == "user"][1]
    forked = chat.phone.fork(chat.wid, chat.sid, entry)["id"]

    def graph() -> Any:
        found = chat.phone.call("GET", f"/workspaces/{chat.wid}/graph?sessionId={forked}&include=entry")
        return found if len(found["sessionGraph"]["nodes"]) == 2 and "entryGraph" in found else None

    chat.phone.resume(chat.wid, forked)
    found = eventually(graph, "both nodes")
    nodes = {node["attachedSessionIds"][0]: node for node in found["sessionGraph"]["nodes"]}
    assert found["sessionGraph"]["edges"] == [{"from": nodes[chat.sid]["id"], "to": nodes[forked]["id"], "type": "fork"}]
    assert found["sessionGraph"]["roots"] == [nodes[chat.sid]["id"]]
    assert found["current"] == {"sessionId": forked, "nodeId": nodes[forked]["id"]}
    assert all(node["activeSessionIds"] == [sid] and node["createdAt"] > 1e12 for sid, node in nodes.items())
    previews = [node.get("preview") for node in found["entryGraph"]["nodes"]]
    assert "!say one" in previews and "one" in previews and "!say two" not in previews
    chat.phone.stop(chat.wid, forked)
