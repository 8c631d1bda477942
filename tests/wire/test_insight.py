"""Looking into a workspace: how its sessions hang together, its files, what was changed, and what apps report."""

from __future__ import annotations

import json
import os
import stat
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.phone import Phone, quote
from tests.support.server import Server

from .rig import Chat, Rig, eventually, rig_with

WS404 = (404, {"error": "Workspace not found"})
SE404 = (404, {"error": "Session not found"})
PATH400 = (400, {"error": "path parameter required"})
FILE404 = (404, {"error": "File not found"})
OUTSIDE = (403, {"error": "Path outside workspace"})
SECRET = (403, {"error": "Access denied: sensitive file"})
NO_FILE = (400, {"error": "Not a file"})
TIME = "2026-01-02T03:04:05.678Z"
TIME_MS = 1767323045678
CANARY = "canary-7f3a"
ANSWER = {"role": "assistant", "provider": "fake", "model": "m", "timestamp": 2}


@pytest.fixture(params=["1.0", "1.1"])
def phone(rig: Rig, request: pytest.FixtureRequest) -> Phone:
    return rig.phone(request.param)


def session_file(rig: Rig, messages: Sequence[Any] = (), entries: Sequence[Any] = (), **header: Any) -> Path:
    """A session as pi leaves it: a header, a question, and these messages; `entries` go between, without a message."""
    key = str(header.pop("id", uuid.uuid4()))
    folder = rig.server.agent_dir / "sessions" / "--work--"
    folder.mkdir(parents=True, exist_ok=True)
    head = {"type": "session", "version": 3, "id": key, "timestamp": TIME, "cwd": str(rig.server.workspace), **header}
    lines, parent = [head], None
    user = {"role": "user", "content": [{"type": "text", "text": "begun in the terminal"}], "timestamp": 1}
    for number, item in enumerate([user, *messages, {**ANSWER, "content": "fine"}, *entries]):
        made = item if "type" in item else {"type": "message", "message": item}
        lines.append({"id": f"{number:08x}", "parentId": parent, "timestamp": TIME, **made})
        parent = str(lines[-1]["id"])
    path = folder / f"2026-01-02T03-04-05-678Z_{key}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def bring(rig: Rig, path: Path, wid: str = "") -> tuple[str, str]:
    """(workspace id, session id) of a session that was begun in the terminal."""
    wid = wid or rig.workspace()
    session = rig.phone().call("POST", f"/workspaces/{wid}/sessions", {"piSessionFile": str(path)}, expect=201)["session"]
    rig.made.append((wid, session["id"]))
    return wid, session["id"]


def new_workspace(rig: Rig, mount: Path | None = None) -> str:
    folder = {"hostMount": str(mount)} if mount else {}
    return str(rig.phone("1.0").create_workspace("Other", policyPreset="host", **folder)["id"])


class TestGraph:
    @pytest.fixture
    def wid(self, rig: Rig) -> str:
        """A workspace with no sessions yet."""
        return new_workspace(rig, rig.server.workspace)

    def graph(self, phone: Phone, wid: str, query: str = "") -> Any:
        found = phone.call("GET", f"/workspaces/{wid}/graph{query}")
        assert found["workspaceId"] == wid and isinstance(found["generatedAt"], int)
        return found

    def test_a_workspace_without_sessions(self, rig: Rig, wid: str) -> None:
        found = self.graph(rig.phone("1.0"), wid)
        assert found["sessionGraph"] == {"nodes": [], "edges": [], "roots": []}
        assert "current" not in found and "entryGraph" not in found

    def test_a_session_that_never_ran_is_no_node(self, rig: Rig, wid: str) -> None:
        sid = rig.phone().create_session(wid)["id"]
        rig.made.append((wid, sid))
        assert self.graph(rig.phone("1.0"), wid)["sessionGraph"]["nodes"] == []
        assert self.graph(rig.phone("1.0"), wid, f"?sessionId={sid}&include=entry")["current"] == {"sessionId": sid}

    def test_unknown_ones(self, rig: Rig, phone: Phone, wid: str) -> None:
        assert phone.request("GET", "/workspaces/nothere1/graph") == WS404
        assert phone.request("GET", f"/workspaces/{wid}/graph?sessionId=nothere1") == SE404
        _, elsewhere = rig.session()
        assert phone.request("GET", f"/workspaces/{wid}/graph?sessionId={elsewhere}") == SE404

    def test_a_running_session_and_its_fork(self, both: Rig) -> None:
        chat = both.chat()
        chat.play("first")
        chat.play("second")
        users = eventually(lambda: [e for e in trace(chat) if e["type"] == "user"][1:])
        forked = chat.phone.fork(chat.wid, chat.sid, users[0]["id"])
        both.made.append((chat.wid, forked["id"]))
        other = both.join(chat.wid, forked["id"])
        other.play("another way")
        nodes = eventually(lambda: self.attached(both, chat.wid, chat.sid, forked["id"]))
        source, fork = nodes[chat.sid], nodes[forked["id"]]
        assert source["activeSessionIds"] == [chat.sid] and fork["activeSessionIds"] == [forked["id"]]
        found = self.graph(both.phone("1.0"), chat.wid)["sessionGraph"]
        assert {"from": source["id"], "to": fork["id"], "type": "fork"} in found["edges"]
        assert fork["parentId"] == source["id"] and source["id"] in found["roots"] and fork["id"] not in found["roots"]
        chat.stop()
        nodes = eventually(lambda: self.attached(both, chat.wid, chat.sid, forked["id"]))
        assert nodes[chat.sid]["activeSessionIds"] == [] and nodes[chat.sid]["attachedSessionIds"] == [chat.sid]

    def attached(self, rig: Rig, wid: str, *sids: str) -> Any:
        """Nodes by the one session they belong to, once all have one."""
        nodes = self.graph(rig.phone("1.0"), wid)["sessionGraph"]["nodes"]
        found = {node["attachedSessionIds"][0]: node for node in nodes if len(node["attachedSessionIds"]) == 1}
        return found if set(sids) <= set(found) else None

    def test_parents_that_belong_to_no_session_are_shown_too(self, rig: Rig, wid: str) -> None:
        oldest = session_file(rig, id="aaaa", timestamp="2026-01-01T00:00:00.000Z")
        middle = session_file(rig, id="bbbb", parentSession=str(oldest))
        newest = session_file(rig, id="cccc", parentSession=str(middle))
        _, sid = bring(rig, newest, wid)
        found = self.graph(rig.phone("1.0"), wid)["sessionGraph"]
        assert [(node["id"], node.get("parentId"), node["attachedSessionIds"]) for node in found["nodes"]] == [
            ("aaaa", None, []), ("bbbb", "aaaa", []), ("cccc", "bbbb", [sid]),
        ]  # fmt: skip
        assert found["roots"] == ["aaaa"] and found["nodes"][1]["createdAt"] == TIME_MS
        assert found["edges"] == [{"from": a, "to": b, "type": "fork"} for a, b in (("aaaa", "bbbb"), ("bbbb", "cccc"))]

    def test_a_parent_that_is_gone_is_known_by_its_name(self, rig: Rig, wid: str) -> None:
        key = str(uuid.uuid4())
        bring(rig, session_file(rig, id="dddd", parentSession=f"/gone/2026-01-01T00-00-00-000Z_{key}.jsonl"), wid)
        found = self.graph(rig.phone("1.0"), wid)["sessionGraph"]
        assert found["nodes"][0]["parentId"] == key and found["roots"] == ["dddd"] and found["edges"] == []

    @pytest.mark.parametrize("parent", ["cycle", "fifo", "folder", "text", "foreign", "missing", "number", "nul"])
    def test_a_parent_may_be_anything(self, rig: Rig, wid: str, tmp_path: Path, parent: str) -> None:
        (tmp_path / "text").write_text(f"{CANARY}\n")
        (tmp_path / "foreign").write_text(json.dumps({"type": "message", "id": CANARY}) + "\n")
        os.mkfifo(tmp_path / "fifo")
        own = rig.server.agent_dir / "sessions" / "--work--" / "2026-01-02T03-04-05-678Z_eeee.jsonl"
        source = {"cycle": str(own), "folder": str(tmp_path), "number": 7, "nul": "a\0b"}.get(parent, str(tmp_path / parent))
        bring(rig, session_file(rig, id="eeee", parentSession=source), wid)
        found = self.graph(rig.phone("1.0"), wid, "?includePaths=true")
        assert [node["id"] for node in found["sessionGraph"]["nodes"]] == found["sessionGraph"]["roots"] == ["eeee"]
        assert CANARY not in json.dumps(found)
        own.unlink()

    def test_two_files_of_one_conversation_are_one_node(self, rig: Rig, wid: str) -> None:
        first, second = session_file(rig, id="ffff"), session_file(rig, id="other")
        lines = second.read_text().splitlines()
        _, sid = bring(rig, first, wid)
        _, other = bring(rig, second, wid)
        second.write_text("\n".join([lines[0].replace('"other"', '"ffff"'), *lines[1:]]) + "\n")
        nodes = self.graph(rig.phone("1.0"), wid)["sessionGraph"]["nodes"]
        assert [node["id"] for node in nodes] == ["ffff"] and nodes[0]["attachedSessionIds"] == sorted([sid, other])

    def test_where_one_is_and_its_entries(self, rig: Rig, wid: str) -> None:
        long, exact = "x" * 161, "y" * 160
        said = [{**ANSWER, "content": [{"type": "text", "text": text}]} for text in (long, exact)]
        path = session_file(rig, said, id="gggg")
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines, lines[2], "{broken", "[]"]) + "\n")  # an entry twice, and junk
        _, sid = bring(rig, path, wid)
        phone = rig.phone("1.0")
        found = self.graph(phone, wid, f"?sessionId={sid}&include=entry")
        assert found["current"] == {"sessionId": sid, "nodeId": "gggg"}
        entries = found["entryGraph"]
        assert entries["piSessionId"] == "gggg"
        assert (entries["rootEntryId"], entries["leafEntryId"]) == ("00000000", "00000003")
        shown = [(node["id"], node.get("parentId"), node["role"], node["preview"]) for node in entries["nodes"]]
        assert shown == [
            ("00000000", None, "user", "begun in the terminal"), ("00000001", "00000000", "assistant", "x" * 159 + "…"),
            ("00000002", "00000001", "assistant", exact), ("00000003", "00000002", "assistant", "fine"),
        ]  # fmt: skip
        assert all(node["timestamp"] == TIME_MS and node["type"] == "message" for node in entries["nodes"])
        assert entries["edges"] == [
            {"from": f"{n:08x}", "to": f"{n + 1:08x}", "type": "parent"} for n in range(3)
        ]  # fmt: skip
        assert self.graph(phone, wid, "?include=entry&entrySessionId=gggg")["entryGraph"] == entries
        for query in (
            "?include=entry",
            f"?sessionId={sid}",
            "?include=entry&entrySessionId=nope",
            "?include=all&entrySessionId=gggg",
        ):
            assert "entryGraph" not in self.graph(phone, wid, query)
        assert "current" not in self.graph(phone, wid, "?include=entry&entrySessionId=gggg")

    def test_paths_only_if_they_are_asked_for(self, rig: Rig, wid: str) -> None:
        parent = session_file(rig, id="hhhh")
        child = session_file(rig, id="iiii", parentSession=str(parent))
        bring(rig, child, wid)
        phone = rig.phone("1.0")
        for query in ("", "?includePaths=false", "?includePaths=1"):
            assert ".jsonl" not in json.dumps(self.graph(phone, wid, query))
        nodes = {n["id"]: n for n in self.graph(phone, wid, "?includePaths=true")["sessionGraph"]["nodes"]}
        assert nodes["hhhh"]["sessionFile"] == str(parent) and "parentSessionFile" not in nodes["hhhh"]
        assert nodes["iiii"]["sessionFile"] == str(child) and nodes["iiii"]["parentSessionFile"] == str(parent)

    def test_only_the_sessions_of_this_workspace(self, rig: Rig, wid: str) -> None:
        bring(rig, session_file(rig, id="jjjj"))
        assert self.graph(rig.phone("1.0"), wid)["sessionGraph"]["nodes"] == []


def trace(chat: Chat) -> list[Any]:
    return list(chat.phone.session_detail(chat.wid, chat.sid)["trace"])


class TestFiles:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        folder = tmp_path / "project"
        folder.mkdir()
        return folder

    @pytest.fixture
    def path(self, rig: Rig, root: Path) -> Iterator[str]:
        """The route for a session whose workspace is `root`; the server's pi never runs there."""
        wid = new_workspace(rig, root)
        sid = rig.phone().create_session(wid)["id"]
        yield f"/workspaces/{wid}/sessions/{sid}/files?path="
        rig.phone().delete(wid, sid)
        rig.phone().call("DELETE", f"/workspaces/{wid}")

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("a.txt", "text/plain"), ("a.png", "image/png"), ("a.JPG", "image/jpeg"), ("a.json", "application/json"),
            ("a.pdf", "application/pdf"), ("a.svg", "image/svg+xml"), ("a.html", "text/html"), ("a.css", "text/css"),
            ("a", "application/octet-stream"), ("a.unknown", "application/octet-stream"), ("a.mp4", "video/mp4"),
        ],
    )  # fmt: skip
    def test_the_bytes_as_they_are(self, phone: Phone, root: Path, path: str, name: str, kind: str) -> None:
        data = bytes(range(256)) * 5
        (root / name).write_bytes(data)
        answer = phone.raw("GET", path + name)
        assert (answer.status, answer.body) == (200, data)
        assert answer.headers["content-type"].partition(";")[0] == kind
        assert answer.headers["content-length"] == str(len(data)) and answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["x-oppi-protocol"] == "2"
        assert "sandbox" in answer.headers["content-security-policy"]  # a page of the project runs no script

    def test_an_empty_file(self, phone: Phone, root: Path, path: str) -> None:
        (root / "empty.txt").write_bytes(b"")
        answer = phone.raw("GET", path + "empty.txt")
        assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", "0")

    @pytest.mark.parametrize(
        "name",
        ["a b.txt", "a+b.txt", "a&b=c.txt", "x?y.txt", "50%.txt", "50%25.txt", "größe.txt", "path=x.txt", "#1.txt", "日/本.txt"],
    )
    def test_names_as_the_apps_send_them(self, rig: Rig, root: Path, path: str, name: str) -> None:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(name)
        old = quote(name).replace("%3F", "?").replace("%2F", "/").replace("%26", "&").replace("%3D", "=")
        new = quote(name).replace("+", "%2B")
        for generation, sent in (("1.0", old), ("1.1", new)):
            answer = rig.phone(generation).raw("GET", path + sent)
            assert (answer.status, answer.body.decode()) == (200, name)

    def test_a_plus_is_first_taken_as_it_is_and_then_as_a_space(self, phone: Phone, root: Path, path: str) -> None:
        (root / "a b.txt").write_text("space")
        assert phone.raw("GET", path + "a+b.txt").body == b"space"
        (root / "a+b.txt").write_text("plus")
        assert phone.raw("GET", path + "a+b.txt").body == b"plus"

    def test_paths_that_mean_a_file_inside(self, phone: Phone, root: Path, path: str) -> None:
        (root / "sub").mkdir()
        (root / "sub" / "a.txt").write_text("inside")
        (root / "link.txt").symlink_to(root / "sub" / "a.txt")
        (root / "folder").symlink_to("sub")
        (root / "chain").symlink_to("folder")
        for name in ("sub/a.txt", "./sub/a.txt", "sub/../sub/a.txt", "sub//a.txt", "link.txt", "folder/a.txt", "chain/a.txt"):
            assert phone.raw("GET", path + name).body == b"inside", name
        for name in (str(root / "sub/a.txt"), str(root / "link.txt"), quote(str(root)).replace("/", "%2F") + "%2Fsub%2Fa.txt"):
            assert phone.raw("GET", path + name).body == b"inside", name

    def test_paths_that_lead_outside(self, phone: Phone, root: Path, path: str, tmp_path: Path) -> None:
        (tmp_path / "secret.txt").write_text(CANARY)
        sibling = tmp_path / "project-two"
        sibling.mkdir()
        (sibling / "x.txt").write_text(CANARY)
        (root / "link.txt").symlink_to(tmp_path / "secret.txt")
        (root / "up").symlink_to("..")
        (root / "top").symlink_to("/")
        for name in (
            *(
                "..",
                "../secret.txt",
                "../project-two/x.txt",
                "link.txt",
                "up",
                "up/secret.txt",
                "top/etc/passwd",
                "sub/../../secret.txt",
            ),
            *("/etc/passwd", "/", str(tmp_path / "secret.txt"), str(root) + "-two/x.txt", "%2e%2e/secret.txt", "..%2Fsecret.txt"),
            *("up/nothing-there", "../nothing-there", "/proc/self/environ"),
        ):
            status, answer = phone.request("GET", path + name)
            assert (status, answer) == OUTSIDE, name

    def test_what_is_no_file(self, phone: Phone, root: Path, path: str) -> None:
        (root / "sub").mkdir()
        (root / "file").write_text("x")
        (root / "broken").symlink_to("nowhere")
        (root / "loop").symlink_to("loop")
        os.mkfifo(root / "pipe")
        for name in ("sub", ".", "sub/", str(root), "pipe"):
            assert phone.request("GET", path + name) == NO_FILE, name
        for name in ("nope", "sub/nope", "file/x", "broken", "loop", "a%00b", "%00", "a" * 300, "%2e%2e%2fx%00", "%252e%252e/x"):
            assert phone.request("GET", path + name) == FILE404, name

    def test_a_path_is_required(self, phone: Phone, path: str) -> None:
        bare = path.partition("?")[0]
        for query in ("", "?", "?path=", "?name=x", "?PATH=x"):
            assert phone.request("GET", bare + query) == PATH400

    @pytest.mark.parametrize(
        "name",
        [
            *(
                ".env",
                ".ENV",
                ".env.local",
                ".git/config",
                "sub/.Git/HEAD",
                "server.pem",
                "SERVER.KEY",
                "id_rsa",
                "id_ed25519.pub",
            ),
            *("id_ecdsa", "id_dsa", ".netrc", ".npmrc", ".pypirc", ".htpasswd", ".ssh/config", ".aws/credentials"),
        ],
    )
    def test_secrets_are_refused_however_they_are_reached(self, phone: Phone, root: Path, path: str, name: str) -> None:
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_text(CANARY)
        (root / "harmless.txt").symlink_to(name)
        (root / "harmless").symlink_to(Path(name).parent)
        (root / "notes.txt").write_text("good")
        if not (root / "link.pem").exists():
            (root / "link.pem").symlink_to("notes.txt")
        for asked in (name, str(root / name), f"./{name}", f"sub/../{name}", "harmless.txt", f"harmless/{Path(name).name}"):
            (root / "sub").mkdir(exist_ok=True)
            assert phone.request("GET", path + asked) == SECRET, asked
        assert phone.request("GET", path + "link.pem") == SECRET
        assert phone.raw("GET", path + "notes.txt").body == b"good"

    def test_what_belongs_to_the_server_is_refused_even_inside(self, rig: Rig, phone: Phone) -> None:
        wid = new_workspace(rig, rig.server.folder)
        sid = rig.phone().create_session(wid)["id"]
        rig.made.append((wid, sid))
        (rig.server.folder / "config.json").write_text("{}")
        path = f"/workspaces/{wid}/sessions/{sid}/files?path="
        for name in ("config.json", "devices.json", "identity_ed25519", f"sessions/{sid}.json", "themes/x.json"):
            (rig.server.data / name).parent.mkdir(exist_ok=True)
            assert phone.request("GET", path + f"data/{name}") in (SECRET, FILE404), name
        assert phone.request("GET", path + "data/config.json") == SECRET
        assert phone.raw("GET", path + "config.json").body == b"{}"  # a project may have one, too

    def test_it_is_refused_by_each_of_its_paths(self, tmp_path: Path) -> None:
        """A data directory below a link, as when `~/.config` lies among somebody's dotfiles."""
        with Server(start=False) as server:
            server.data.rename(server.folder / "dotfiles")
            server.data.symlink_to("dotfiles")
            server.start()
            rig = Rig(server, tmp_path / "stdin.log")
            wid = new_workspace(rig, server.folder)
            sid = rig.phone().create_session(wid)["id"]
            for folder in ("data", "dotfiles"):
                for name in ("config.json", "devices.json", "identity_ed25519", f"workspaces/{wid}.json"):
                    answer = rig.phone().request("GET", f"/workspaces/{wid}/sessions/{sid}/files?path={folder}/{name}")
                    assert answer == SECRET, (folder, name)

    def test_the_keys_of_pi_are_refused_wherever_they_are(self, tmp_path: Path) -> None:
        for name in ("auth.json", "notes.json"):
            (tmp_path / name).write_text("{}")
        with Server(env={"PI_CODING_AGENT_DIR": str(tmp_path)}) as server:
            rig = Rig(server, tmp_path / "stdin.log")
            wid = new_workspace(rig, tmp_path)
            path = f"/workspaces/{wid}/sessions/{rig.phone().create_session(wid)['id']}/files?path="
            assert rig.phone().request("GET", path + "auth.json") == SECRET
            assert rig.phone().raw("GET", path + "notes.json").body == b"{}"

    def test_size(self, phone: Phone, root: Path, path: str) -> None:
        for name, size in (("most.bin", 10 << 20), ("more.bin", (10 << 20) + 1)):
            with (root / name).open("wb") as file:
                file.truncate(size)
        answer = phone.raw("GET", path + "most.bin")
        assert answer.status == 200 and len(answer.body) == 10 << 20
        assert phone.request("GET", path + "more.bin") == (413, {"error": "File too large (max 10MB)"})

    def test_the_session_must_be_in_the_workspace(self, rig: Rig, phone: Phone) -> None:
        _, sid = rig.session()
        other = rig.workspace("host_locked")
        for wid, key in ((other, sid), ("nothere1", sid), (rig.workspace(), "nothere1"), ("..", sid)):
            assert phone.request("GET", f"/workspaces/{wid}/sessions/{key}/files?path=x")[0] == 404
        assert phone.request("GET", f"/workspaces/{other}/sessions/{sid}/files?path=x") == SE404
        assert phone.request("GET", f"/workspaces/{rig.workspace()}/sessions/nothere1/files?path=x") == SE404

    def test_a_workspace_whose_folder_is_gone(self, phone: Phone, root: Path, path: str) -> None:
        root.rename(root.with_name("moved"))
        assert phone.request("GET", path + "x") == (404, {"error": "No workspace root for session"})
        root.symlink_to("moved")  # a root may be a link
        (root / "x").write_text("there again")
        assert phone.raw("GET", path + "x").body == b"there again"

    def test_without_a_folder_the_home_is_meant(self, rig: Rig, phone: Phone) -> None:
        (rig.server.home / "in-home.txt").write_text("home")
        (rig.server.home / "mount").mkdir(exist_ok=True)
        (rig.server.home / "mount" / "x.txt").write_text("mount")
        for mount, name, text in ((None, "in-home.txt", b"home"), (Path("~/mount"), "x.txt", b"mount")):
            wid = new_workspace(rig, mount)
            sid = rig.phone().create_session(wid)["id"]
            rig.made.append((wid, sid))
            assert phone.raw("GET", f"/workspaces/{wid}/sessions/{sid}/files?path={name}").body == text
        assert phone.request("GET", f"/workspaces/{wid}/sessions/{sid}/files?path=../in-home.txt") == OUTSIDE

    def test_no_other_method(self, phone: Phone, path: str) -> None:
        for method in ("POST", "PUT", "DELETE", "HEAD"):
            assert phone.raw(method, path + "x").status == 404


def edit(*pairs: tuple[str, str], path: str = "a.txt") -> dict[str, Any]:
    return {"name": "edit", "arguments": {"path": path, "edits": [{"oldText": old, "newText": new} for old, new in pairs]}}


def old_edit(old: str, new: str, path: str = "a.txt") -> dict[str, Any]:
    return {"name": "edit", "arguments": {"path": path, "oldText": old, "newText": new}}


def write(text: str, path: str = "a.txt") -> dict[str, Any]:
    return {"name": "write", "arguments": {"path": path, "content": text}}


def calls(*made: dict[str, Any], failed: Sequence[int] = ()) -> list[Any]:
    """The messages of calls and their results, one round each; ids are call-0, call-1 …"""
    found: list[Any] = []
    for number, block in enumerate(made):
        key = f"call-{number}"
        result = {"role": "toolResult", "toolCallId": key, "toolName": block["name"], "isError": number in failed}
        found.append({**ANSWER, "content": [{"type": "toolCall", "id": key, **block}], "stopReason": "toolUse"})
        found.append(
            {**result, "content": [{"type": "text", "text": "done"}], "timestamp": 3, "details": {"firstChangedLine": 1}}
        )
    return found


def rows(diff: Any) -> str:
    return "|".join({"context": " ", "added": "+", "removed": "-"}[row["kind"]] + row["text"] for row in diff["diffLines"])


class TestDiff:
    @pytest.fixture
    def root(self, rig: Rig) -> Path:
        for path in rig.server.workspace.iterdir():
            path.unlink()
        return rig.server.workspace

    def diff(self, rig: Rig, place: tuple[str, str], path: str = "a.txt") -> Any:
        """What both apps make of the difference."""
        route = f"/workspaces/{place[0]}/sessions/{place[1]}/overall-diff?path={path}"
        found = [rig.phone(generation).call("GET", route) for generation in ("1.0", "1.1")]
        assert found[0] == found[1] and found[0]["workspaceId"] == place[0]
        for side in ("added", "removed"):
            assert found[0][f"{side}Lines"] == sum(row["kind"] == side for row in found[0]["diffLines"])
        lines = [line for hunk in found[0]["hunks"] for line in hunk["lines"] if line["kind"] != "context"]
        assert [(x["kind"], x["text"]) for x in lines] == [
            (x["kind"], x["text"]) for x in found[0]["diffLines"] if x["kind"] != "context"
        ]
        return found[0]

    @pytest.mark.parametrize(
        ("made", "failed", "now", "before", "count", "shown"),
        [
            ([edit(("two", "TWO"))], (), "one\nTWO\n", "one\ntwo\n", 1, " one|-two|+TWO"),
            ([old_edit("two", "TWO")], (), "one\nTWO\n", "one\ntwo\n", 1, " one|-two|+TWO"),
            ([edit(("one", "ONE"), ("two", "TWO"))], (), "ONE\nTWO\n", "one\ntwo\n", 1, "-one|-two|+ONE|+TWO"),
            ([edit(("a", "b")), old_edit("b", "c"), edit(("c", "d"))], (), "d\n", "a\n", 3, "-a|+d"),
            ([write("new\n")], (), "new\n", "", 1, "+new"),
            ([write("draft\n"), edit(("draft", "done"))], (), "done\n", "", 2, "+done"),
            ([edit(("x", "y")), write("all\n")], (), "all\n", "", 2, "+all"),
            ([edit(("two", "TWO")), edit(("zzz", "yyy"))], (1,), "one\nTWO\n", "one\ntwo\n", 1, " one|-two|+TWO"),
            ([write("never\n"), edit(("two", "TWO"))], (0,), "one\nTWO\n", "one\ntwo\n", 1, " one|-two|+TWO"),
            ([edit(("\ttwo", "  two"))], (), "one\n  two\n", "one\n\ttwo\n", 1, " one|-\ttwo|+  two"),
            ([edit(("two\n", ""))], (), "one\n", "two\none\n", 1, "-two| one"),
            ([edit(("two", "TWO"))], (), "somebody else wrote\n", "somebody else wrote\n", 1, " somebody else wrote"),
            ([write("gone\n")], (), None, "", 1, ""),
            ([edit(("é", "ü")), edit(("one", "two"), path="b.txt")], (), "ü", "é", 1, "-é|+ü"),
        ],
    )
    def test_what_was_done(
        self, rig: Rig, root: Path, made: Any, failed: Any, now: str | None, before: str, count: int, shown: str
    ) -> None:
        if now is not None:
            (root / "a.txt").write_text(now)
        place = bring(rig, session_file(rig, calls(*made, failed=failed)))
        found = self.diff(rig, place)
        assert (found["baselineText"], found["currentText"]) == (before, now or "")
        assert (found["path"], found["revisionCount"], rows(found)) == ("a.txt", count, shown)
        last = max(n for n, block in enumerate(made) if n not in failed and block["arguments"]["path"] == "a.txt")
        assert found["cacheKey"] == f"{place[1]}:a.txt:call-{last}"

    def test_hunks_are_numbered_and_have_three_lines_around(self, rig: Rig, root: Path) -> None:
        old = [f"line {n}" for n in range(1, 31)]
        new = [*old[:9], "changed", *old[10:27], *old[28:]]
        (root / "a.txt").write_text("\n".join(new) + "\n")
        pairs = [("line 10\n", "changed\n"), ("line 27\nline 28\n", "line 27\n")]
        hunks = self.diff(rig, bring(rig, session_file(rig, calls(edit(*pairs)))))["hunks"]
        shapes = [tuple(hunk[key] for key in ("oldStart", "oldCount", "newStart", "newCount")) for hunk in hunks]
        assert shapes == [(7, 7, 7, 7), (25, 6, 25, 5)]
        changed = [line for hunk in hunks for line in hunk["lines"] if line["kind"] != "context"]
        assert [(x["kind"], x["text"], x["oldLine"], x["newLine"]) for x in changed] == [
            ("removed", "line 10", 10, None), ("added", "changed", None, 10), ("removed", "line 28", 28, None),
        ]  # fmt: skip

    @pytest.mark.parametrize("called", ["src/x.txt", "./src/x.txt", "{root}/src/x.txt", "src/../src/x.txt"])
    @pytest.mark.parametrize("asked", ["src/x.txt", "{root}/src/x.txt", "%20src/x.txt%20"])
    def test_relative_and_absolute_paths_are_the_same(self, rig: Rig, tmp_path: Path, called: str, asked: str) -> None:
        (tmp_path / "src").mkdir()
        (tmp_path / "src" / "x.txt").write_text("new\n")
        wid = new_workspace(rig, tmp_path)
        path = called.replace("{root}", str(tmp_path))
        place = bring(rig, session_file(rig, calls(old_edit("old", "new", path)), cwd=str(tmp_path)), wid)
        found = self.diff(rig, place, asked.replace("{root}", str(tmp_path)))
        assert rows(found) == "-old|+new" and found["path"] == asked.replace("{root}", str(tmp_path)).replace("%20", "")

    def test_changes_before_a_compaction_count(self, rig: Rig, root: Path) -> None:
        (root / "a.txt").write_text("three\n")
        messages = calls(edit(("one", "two")), edit(("two", "three")))
        compaction = {"type": "compaction", "summary": "s", "firstKeptEntryId": "00000003", "tokensBefore": 9}
        found = self.diff(rig, bring(rig, session_file(rig, messages, [compaction, {**ANSWER, "content": "more"}])))
        assert (rows(found), found["revisionCount"]) == ("-one|+three", 2)

    def test_a_turn_as_it_happens(self, both: Rig) -> None:
        work = both.server.workspace
        (work / "live.txt").write_text("after\n")
        chat = both.chat()
        made = {"path": str(work / "live.txt"), "edits": [{"oldText": "before", "newText": "after"}]}
        chat.play("!tool edit " + json.dumps(made) + "\n!tool write " + json.dumps({"path": "new.txt", "content": "x"}))
        found = eventually(lambda: both.phone().request("GET", f"{chat.path}/overall-diff?path=live.txt"))
        assert found[0] == 200 and rows(found[1]) == "-before|+after"
        changed = chat.phone.session_detail(chat.wid, chat.sid)["session"]["changeStats"]["changedFiles"]
        for path in changed:  # what the app can tap on
            assert both.phone("1.0").request("GET", f"{chat.path}/overall-diff?path={path}")[0] == 200

    @pytest.mark.parametrize("name", ["a b.txt", "a+b.txt", "a&b=c.txt", "50%.txt", "größe.txt"])
    def test_names_as_the_apps_send_them(self, rig: Rig, root: Path, name: str) -> None:
        (root / name).write_text("new\n")
        place = bring(rig, session_file(rig, calls(old_edit("old", "new", name))))
        assert rows(self.diff(rig, place, quote(name).replace("%26", "&").replace("%3D", "="))) == "-old|+new"

    def test_what_may_not_be_read_counts_as_empty(self, rig: Rig, root: Path, tmp_path: Path) -> None:
        (tmp_path / "secret.txt").write_text(CANARY)
        (root / ".env").write_text(CANARY)
        (root / "link.txt").symlink_to(tmp_path / "secret.txt")
        os.mkfifo(root / "pipe")
        with (root / "huge").open("w") as file:
            file.write(CANARY)
            file.truncate((10 << 20) + 1)
        paths = (".env", "link.txt", "pipe", "huge", str(tmp_path / "secret.txt"), "../secret.txt")
        place = bring(rig, session_file(rig, calls(*(write("x", path) for path in paths))))
        for path in paths:
            assert self.diff(rig, place, path)["currentText"] == "", path

    def test_a_file_that_is_no_text(self, rig: Rig, root: Path) -> None:
        (root / "a.txt").write_bytes(b"a\0b\xff\r\nsecond\x0cline\x1b[31m\n")
        found = self.diff(rig, bring(rig, session_file(rig, calls(write("x")))))
        assert found["currentText"] == "a\0b\ufffd\r\nsecond\x0cline\x1b[31m\n"
        assert rows(found) == "+a\0b\ufffd\r|+second\x0cline\x1b[31m"

    def test_refusals(self, rig: Rig, phone: Phone) -> None:
        wid, sid = rig.session()
        base = f"/workspaces/{wid}/sessions/{sid}/overall-diff"
        for query in ("", "?", "?path=", "?path=%20%20", "?x=y"):
            assert phone.request("GET", base + query) == PATH400, query
        assert phone.request("GET", base + "?path=a.txt") == (404, {"error": "Session trace not found"})
        other = rig.workspace("host_locked")
        assert phone.request("GET", f"/workspaces/{other}/sessions/{sid}/overall-diff?path=x") == SE404
        assert phone.request("GET", f"/workspaces/{wid}/sessions/nothere1/overall-diff?path=x") == SE404
        place = bring(rig, session_file(rig, calls(edit(("a", "b")), write("x", "b.txt"), failed=(1,))))
        for path in ("b.txt", "c.txt", "A.txt", "a.txt/", "..", "%00"):
            answer = phone.request("GET", f"/workspaces/{place[0]}/sessions/{place[1]}/overall-diff?path={path}")
            assert answer == (404, {"error": "No file mutations found for path"}) or path == "a.txt/", path


class TestClientLogs:
    def path(self, rig: Rig, place: tuple[str, str]) -> str:
        return f"/workspaces/{place[0]}/sessions/{place[1]}/client-logs"

    def stored(self, rig: Rig, sid: str) -> list[Any]:
        return [json.loads(line) for line in (rig.server.data / "client-logs" / f"{sid}.jsonl").read_text().split("\n")[:-1]]

    def test_an_upload_is_one_line(self, rig: Rig, phone: Phone) -> None:
        place = rig.session()
        entry = {"timestamp": 5, "level": "warning", "category": "ws", "message": "closed", "metadata": {"code": "1006"}}
        body = {
            "generatedAt": 7, "trigger": "manual", "appVersion": "1.0", "buildNumber": "12", "osVersion": "18.1",
            "deviceModel": "iPhone17,1", "entries": [entry, {**entry, "level": "error"}],
        }  # fmt: skip
        for _ in range(2):
            assert phone.call("POST", self.path(rig, place), body) == {"ok": True, "accepted": 2}
        first, second = self.stored(rig, place[1])
        assert {**first, "receivedAt": 0} == {**body, "receivedAt": 0, "sessionId": place[1], "workspaceId": place[0]}
        assert second["receivedAt"] >= first["receivedAt"] > 1e12
        folder = rig.server.data / "client-logs"
        modes = [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / f"{place[1]}.jsonl")]
        assert modes == [0o700, 0o600]

    def test_what_is_too_long_is_cut_and_what_is_odd_made_good(self, rig: Rig, phone: Phone) -> None:
        place = rig.session()
        entries: list[Any] = [{"message": f"old {n}"} for n in range(1000)]
        entries += [
            {"message": "m" * 4001, "category": "c" * 65, "level": "loud", "metadata": {"k" * 65: "v" * 513, "n": 7}},
            {"message": "x\ny\u2028", "level": "debug", "timestamp": "yesterday", "metadata": ["?"], "category": None},
            {"level": "info"}, "text", None, {"message": 7},
        ]  # fmt: skip
        accepted = phone.call("POST", self.path(rig, place), {"entries": entries})["accepted"]
        [line] = self.stored(rig, place[1])
        assert accepted == len(line["entries"]) <= 1000
        long, odd = line["entries"][-2:]
        assert (long["message"], long["category"], long["level"]) == ("m" * 4000, "c" * 64, "info")
        assert long["metadata"] == {"k" * 64: "v" * 512, "n": "7"}
        assert (odd["message"], odd["level"], odd["category"], odd["metadata"]) == ("x\ny\u2028", "debug", "", {})
        assert isinstance(odd["timestamp"], (int, float))
        assert "old 0" not in json.dumps(line) and "old 999" in json.dumps(line)

    @pytest.mark.parametrize(
        ("body", "problem"),
        [
            ({}, "entries array required"), ({"entries": None}, "entries array required"),
            ({"entries": {"message": "x"}}, "entries array required"), ({"entries": []}, "No valid log entries"),
            ({"entries": [{}, "x", {"message": 7}, None]}, "No valid log entries"),
        ],
    )  # fmt: skip
    def test_refusals(self, rig: Rig, phone: Phone, body: Any, problem: str) -> None:
        place = rig.session()
        assert phone.request("POST", self.path(rig, place), body) == (400, {"error": problem})
        assert not (rig.server.data / "client-logs" / f"{place[1]}.jsonl").exists()

    def test_the_session_must_exist(self, rig: Rig, phone: Phone) -> None:
        wid, sid = rig.session()
        body = {"entries": [{"message": "x"}]}
        for place in ((wid, "nothere1"), (rig.workspace("host_locked"), sid), (wid, "..%2F..%2Fx"), (wid, ".")):
            assert phone.request("POST", self.path(rig, place), body) == SE404
        assert not list(rig.server.data.rglob("nothere1*"))

    def test_a_log_does_not_grow_for_ever(self, rig: Rig) -> None:
        place = rig.session()
        phone, path = rig.phone("1.0"), rig.server.data / "client-logs" / f"{place[1]}.jsonl"
        body = {"entries": [{"message": "m" * 4000}] * 250}
        for _ in range(12):  # 12 MB
            phone.call("POST", self.path(rig, place), body)
        kept = [file for file in path.parent.iterdir() if file.name.startswith(path.name)]
        assert sum(file.stat().st_size for file in kept) < 11 << 20
        assert all(len(json.loads(line)["entries"]) == 250 for file in kept for line in file.read_text().splitlines())
        assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in kept)

    def test_a_link_in_its_place_is_not_followed(self, rig: Rig, tmp_path: Path) -> None:
        place = rig.session()
        folder = rig.server.data / "client-logs"
        folder.mkdir(exist_ok=True, mode=0o700)
        (tmp_path / "target").write_text("before")
        (folder / f"{place[1]}.jsonl").symlink_to(tmp_path / "target")
        rig.phone().request("POST", self.path(rig, place), {"entries": [{"message": "x"}]})
        assert (tmp_path / "target").read_text() == "before"


def test_a_session_of_another_generation_of_the_server_can_be_looked_into(tmp_path: Path) -> None:
    """A record that knows its files only by the list, and one whose statistics are not what they should be."""
    with rig_with(tmp_path) as rig:
        (rig.server.workspace / "a.txt").write_text("new\n")
        place = bring(rig, session_file(rig, calls(old_edit("old", "new")), id="kkkk"))
        rig.made.clear()
        rig.server.stop()
        path = rig.server.data / "sessions" / f"{place[1]}.json"
        stored = json.loads(path.read_text())
        stored["session"]["piSessionFiles"] = [stored["session"].pop("piSessionFile")]
        stored["session"].update(changeStats={"mutatingToolCalls": 1, "changedFiles": None})
        stored["session"].pop("piSessionId", None)
        path.write_text(json.dumps(stored))
        rig.server.start()
        base = f"/workspaces/{place[0]}"
        diff = rig.phone("1.0").call("GET", f"{base}/sessions/{place[1]}/overall-diff?path=a.txt")
        assert rows(diff) == "-old|+new"
        nodes = rig.phone("1.0").call("GET", f"{base}/graph")["sessionGraph"]["nodes"]
        assert [(node["id"], node["attachedSessionIds"]) for node in nodes] == [("kkkk", [place[1]])]
