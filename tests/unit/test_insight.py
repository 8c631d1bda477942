"""What a phone may look into, as pure functions: graphs of sessions, what changed in a file, which files are secret,
and from where a phone may speak plain HTTP."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import oppi

from .support import SESSION_FILES, few, many, session_entries

TIME = "2026-01-02T03:04:05.678Z"
TIME_MS = 1767323045678
NODE = {"id", "createdAt", "workspaceId", "attachedSessionIds", "activeSessionIds"}  # what app 1.0 requires
LONG_ID = "0199aaaa-bbbb-7ccc-8ddd-eeeeffff0000"


def test_a_requirement_that_is_not_met_is_the_callers_fault() -> None:
    oppi.require([1], "no")
    with pytest.raises(oppi.BadRequest, match="^no$"):
        oppi.require([], "no")


def test_only_none_does_not_exist() -> None:
    assert oppi.existing(0, "no") == 0
    with pytest.raises(oppi.NotFound, match="^no$"):
        oppi.existing(None, "no")


# ---- how sessions were forked ----------------------------------------------------------------------------------------


def head(key: str, parent: str = "", stamp: Any = TIME) -> dict[str, Any]:
    return {"type": "session", "id": key, "timestamp": stamp, **({"parentSession": parent} if parent else {})}


def graph(headers: dict[str, Any], *records: Any, running: tuple[str, ...] = (), paths: bool = False) -> Any:
    return oppi.session_graph("w1", headers, records, set(running), paths)


def links(found: Any) -> set[tuple[str, str]]:
    assert all(edge["type"] == "fork" for edge in found["edges"])
    return {(edge["from"], edge["to"]) for edge in found["edges"]}


def test_no_sessions_make_an_empty_graph() -> None:
    assert graph({}) == {"nodes": [], "edges": [], "roots": []}


def test_a_session_alone_is_a_root() -> None:
    record = {"id": "S1", "piSessionFile": "/a.jsonl", "piSessionId": "a"}
    found = graph({"/a.jsonl": head("a")}, record)
    assert found["nodes"] == [
        {"id": "a", "createdAt": TIME_MS, "workspaceId": "w1", "attachedSessionIds": ["S1"], "activeSessionIds": []}
    ]
    assert found["edges"] == [] and found["roots"] == ["a"]


def test_forks_of_forks_hang_together_by_the_file_they_came_from() -> None:
    headers = {"/c": head("c", "/b"), "/b": head("b", "/a"), "/a": head("a"), "/d": head("d", "/a")}
    found = graph(headers)
    assert links(found) == {("a", "b"), ("b", "c"), ("a", "d")}
    assert found["roots"] == ["a"]
    assert {node["id"]: node.get("parentId") for node in found["nodes"]} == {"a": None, "b": "a", "c": "b", "d": "a"}


def test_a_parent_whose_file_is_gone_is_known_by_its_name() -> None:
    found = graph({"/a": head("a", f"/gone/2026-01-02T03-04-05-678Z_{LONG_ID}.jsonl"), "/b": head("b", "/gone/x.jsonl")})
    parents = {node["id"]: node.get("parentId") for node in found["nodes"]}
    assert parents == {"a": LONG_ID, "b": None}
    assert found["edges"] == [] and sorted(found["roots"]) == ["a", "b"]


def test_no_edge_leads_to_a_node_that_is_not_there_or_to_itself() -> None:
    found = graph({"/a": head("a", "/a"), "/b": head("b", "/c"), "/c": head("c", "/b")})
    assert links(found) == {("c", "b"), ("b", "c")}
    assert found["roots"] == ["a"]


def test_nodes_are_sorted_by_time_and_then_by_id() -> None:
    stamps = {"z": "2026-01-01T00:00:00.000Z", "b": TIME, "a": TIME, "q": None, "p": "yesterday"}
    found = graph({f"/{key}": head(key, stamp=stamp) for key, stamp in stamps.items()})
    assert [node["id"] for node in found["nodes"]] == ["p", "q", "z", "a", "b"]
    assert [node["createdAt"] for node in found["nodes"]][:2] == [0, 0]


def test_a_conversation_in_two_files_is_one_node() -> None:
    headers = {"/1": head("a"), "/2": head("a", "/p"), "/p": head("p")}
    records = [{"id": "S1", "piSessionFile": "/1"}, {"id": "S2", "piSessionFile": "/2"}]
    found = graph(headers, *records, running=("S1", "S2"))
    [node] = [node for node in found["nodes"] if node["id"] == "a"]
    assert node["attachedSessionIds"] == node["activeSessionIds"] == ["S1", "S2"]
    assert len(found["nodes"]) == 2


@pytest.mark.parametrize(
    ("record", "running", "attached", "active"),
    [
        ({"piSessionId": "a"}, False, True, False),
        ({"piSessionFiles": ["/a", "/b"], "piSessionFile": "/b"}, True, True, False),
        ({"piSessionFiles": ["/a"], "piSessionFile": "/a"}, False, True, False),
        ({"piSessionFiles": ["/a"], "piSessionFile": "/a"}, True, True, True),
        ({"piSessionFile": "/a", "piSessionId": "a"}, True, True, True),
        ({"piSessionFiles": "/a", "piSessionFile": None, "piSessionId": 7}, True, False, False),
    ],
)
def test_attached_by_any_file_active_by_the_current_one(record: Any, running: bool, attached: bool, active: bool) -> None:
    headers = {"/a": head("a"), "/b": head("b")}
    [node] = [n for n in graph(headers, {"id": "S1", **record}, running=("S1",) * running)["nodes"] if n["id"] == "a"]
    assert node["attachedSessionIds"] == ["S1"] * attached
    assert node["activeSessionIds"] == ["S1"] * active


def test_paths_are_told_only_if_they_are_asked_for() -> None:
    headers = {"/secret/a": head("a"), "/secret/b": head("b", "/secret/a")}
    assert "/secret" not in json.dumps(graph(headers))
    nodes = {node["id"]: node for node in graph(headers, paths=True)["nodes"]}
    assert nodes["b"]["sessionFile"] == "/secret/b" and nodes["b"]["parentSessionFile"] == "/secret/a"
    assert nodes["a"]["sessionFile"] == "/secret/a" and "parentSessionFile" not in nodes["a"]


FILES = st.sampled_from([f"/{letter}" for letter in "abcdef"])


@few
@given(st.dictionaries(FILES, st.tuples(st.sampled_from("uvwxy"), FILES | st.just(""), st.sampled_from([TIME, None, 3]))))
def test_any_headers_make_a_graph_the_app_can_draw(headers: dict[str, Any]) -> None:
    found = graph({path: head(key, parent, stamp) for path, (key, parent, stamp) in headers.items()})
    ids = [node["id"] for node in found["nodes"]]
    assert len(set(ids)) == len(ids) and set(ids) == {key for key, _, _ in headers.values()}
    assert all(set(node) >= NODE for node in found["nodes"])
    assert all(edge["from"] in ids and edge["to"] in ids and edge["from"] != edge["to"] for edge in found["edges"])
    assert set(found["roots"]) == set(ids) - {edge["to"] for edge in found["edges"]}


# ---- the entries of one conversation ---------------------------------------------------------------------------------


def test_an_entry_as_the_graph_shows_it() -> None:
    entry = {"type": "message", "id": "b", "parentId": "a", "timestamp": TIME}
    message = {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "image"}, {"type": "text", "text": "two"}]}
    assert oppi.entry_node({**entry, "message": message}) == {
        "id": "b", "type": "message", "parentId": "a", "timestamp": TIME_MS, "role": "user", "preview": "one\ntwo",
    }  # fmt: skip
    assert oppi.entry_node({"type": "label", "id": "c", "parentId": None, "timestamp": "never", "message": "x"}) == {
        "id": "c", "type": "label",
    }  # fmt: skip


@pytest.mark.parametrize("length", [0, 1, 159, 160, 161, 1000])
def test_a_long_text_is_cut(length: int) -> None:
    text = "äx" * length
    text = text[:length]
    node = oppi.entry_node({"type": "message", "id": "a", "message": {"role": "user", "content": text}})
    assert node.get("preview", "") == (text if length <= 160 else text[:159] + "…")


def test_the_tree_of_a_conversation() -> None:
    nodes = [{"id": "a", "type": "x"}, {"id": "b", "type": "x", "parentId": "a"}, {"id": "c", "type": "x", "parentId": "lost"}]
    assert oppi.entry_graph("s", nodes) == {
        "piSessionId": "s", "nodes": nodes, "edges": [{"from": "a", "to": "b", "type": "parent"}],
        "rootEntryId": "a", "leafEntryId": "c",
    }  # fmt: skip
    assert oppi.entry_graph("s", []) == {"piSessionId": "s", "nodes": [], "edges": []}


@pytest.mark.parametrize(("version", "name"), SESSION_FILES)
def test_every_recorded_conversation_can_be_drawn(version: str, name: str) -> None:
    nodes = [oppi.entry_node(entry) for entry in session_entries(version, name) if entry["type"] != "session"]
    found = oppi.entry_graph("s", nodes)
    ids = [node["id"] for node in found["nodes"]]
    assert len(set(ids)) == len(ids) and found["leafEntryId"] == ids[-1]
    assert len(found["edges"]) == sum("parentId" in node for node in nodes)
    assert all(len(node.get("preview", "")) <= 160 and isinstance(node.get("timestamp", 0), int) for node in nodes)


# ---- what was done to a file -----------------------------------------------------------------------------------------


def call(key: str, tool: str = "edit", **args: Any) -> dict[str, Any]:
    return {"type": "toolCall", "id": key, "tool": tool, "args": args}


def result(key: str, failed: bool = False, **details: Any) -> dict[str, Any]:
    return {"type": "toolResult", "toolCallId": key, "isError": failed, **({"details": details} if details else {})}


def changed(*events: Any, path: str = "a.txt", cwd: str = "/work") -> list[str]:
    return [found["id"] for found in oppi.file_changes(events, path, cwd)]


@pytest.mark.parametrize(
    ("asked", "given_path", "same"),
    [
        ("a.txt", "a.txt", True), ("a.txt", "/work/a.txt", True), ("/work/a.txt", "a.txt", True), ("a.txt", "./a.txt", True),
        ("src/../a.txt", "a.txt", True), ("a.txt", "src/../a.txt", True), ("a.txt", "b.txt", False), ("a.txt", "A.txt", False),
        ("a.txt", "src/a.txt", False), ("/other/a.txt", "/other/a.txt", True), ("/other/a.txt", "a.txt", False),
        ("a b+c.txt", "a b+c.txt", True), ("a.txt", "", False), ("a.txt", None, False), ("a.txt", 7, False),
    ],
)  # fmt: skip
def test_a_path_means_the_same_relative_or_absolute(asked: str, given_path: Any, same: bool) -> None:
    assert changed(call("1", path=given_path), result("1"), path=asked) == ["1"] * same


@pytest.mark.parametrize(
    ("tool", "counts"),
    [("edit", True), ("write", True), ("Edit", True), ("functions.write", True), ("a.b.WRITE", True)]
    + [("read", False), ("bash", False), ("rewrite", False), ("edit.read", False), ("", False)],
)
def test_which_tools_change_files(tool: str, counts: bool) -> None:
    assert changed(call("1", tool, path="a.txt"), result("1")) == ["1"] * counts


def test_a_call_that_failed_changed_nothing_and_others_count_in_order() -> None:
    events = [call("1", path="a.txt"), call("2", "write", path="a.txt"), call("3", path="b.txt"), call("4", file_path="a.txt")]
    events += [result("2", failed=True), result("1"), result("3"), result("4"), result("5", failed=True), {"type": "user"}]
    assert changed(*events) == ["1", "4"]


def test_what_the_result_told_is_kept() -> None:
    [found] = oppi.file_changes([call("1", path="a.txt"), result("1", firstChangedLine=3)], "a.txt", "/work")
    assert found["details"] == {"firstChangedLine": 3}
    assert oppi.file_changes([{**call("1"), "args": None}], "a.txt", "/work") == []


def edits(*pairs: tuple[str, str], **details: Any) -> dict[str, Any]:
    made = call("1", path="a", edits=[{"oldText": old, "newText": new} for old, new in pairs])
    return {**made, "details": details} if details else made


@pytest.mark.parametrize(
    ("text", "calls", "before"),
    [
        ("one TWO", [call("1", oldText="two", newText="TWO")], "one two"),
        ("ONE TWO", [edits(("one", "ONE"), ("two", "TWO"))], "one two"),
        ("c", [call("1", oldText="a", newText="b"), call("2", oldText="b", newText="c")], "a"),
        ("text", [call("1", "write", content="text")], ""),
        ("B", [call("1", "write", content="b"), call("2", oldText="b", newText="B")], ""),
        ("old", [call("1", oldText="a", newText="b"), call("2", "write", content="old")], ""),
        ("somebody else", [call("1", oldText="a", newText="gone")], "somebody else"),
        ("a\nc\n", [edits(("b\n", ""), firstChangedLine=2)], "a\nb\nc\n"),
        ("a\nb\n", [edits(("c\n", ""), firstChangedLine=3)], "a\nb\nc\n"),
        ("b\n", [edits(("a\n", ""), firstChangedLine=1)], "a\nb\n"),
        ("b\n", [edits(("a\n", ""))], "a\nb\n"),
        ("x", [call("1", edits=["?", None, {}])], "x"),
        ("x", [call("1", edits="?")], "x"),
        ("x", [{"id": "1", "tool": "edit", "args": None}], "x"),
        ("x", [], "x"),
    ],
)
def test_changes_are_undone_from_the_last_to_the_first(text: str, calls: list[Any], before: str) -> None:
    assert oppi.before_changes(text, calls) == before


@st.composite
def edited(draw: st.DrawFn) -> tuple[str, str, list[Any]]:
    """A text, what edits in pi's way made of it, and the calls; every piece of text is there only once."""
    fresh = iter(f"<{number}>" + draw(st.sampled_from(["", "\n", " ", "ä"])) for number in range(1000))
    pieces = [next(fresh) for _ in range(draw(st.integers(1, 12)))]
    first, calls = "".join(pieces), []
    for number in range(draw(st.integers(0, 5))):
        made: list[dict[str, str]] = []
        position, after = 0, []
        while position < len(pieces):  # all of a call's edits are found in the text as it was before the call
            length = draw(st.integers(0, 3))
            old = pieces[position : position + length]
            new = [next(fresh) for _ in range(draw(st.integers(1, 3)))] if old else []
            keep = pieces[position + length : position + length + 1]
            made += [{"oldText": "".join(old), "newText": "".join(new)}] if old else []
            after += new + keep
            position += length + 1
        pieces = after
        made = draw(st.permutations(made))
        single = len(made) == 1 and draw(st.booleans())  # the old form
        calls.append(call(str(number), path="a", **(made[0] if single else {"edits": made})))
    return first, "".join(pieces), calls


@many
@given(edited())
def test_undoing_gives_what_was_there_before(case: tuple[str, str, list[Any]]) -> None:
    before, after, calls = case
    assert oppi.before_changes(after, calls) == before


# ---- differences -----------------------------------------------------------------------------------------------------


def lines_of(text: str) -> list[str]:
    """What a person calls the lines: what follows the last newline is one only if there is something."""
    return text.split("\n")[:-1] if text.endswith("\n") else text.split("\n") if text else []


def side(rows: list[Any], kind: str) -> list[str]:
    return [row["text"] for row in rows if row["kind"] in ("context", kind)]


def short(rows: list[Any]) -> str:
    return "|".join({"context": " ", "added": "+", "removed": "-"}[row["kind"]] + row["text"] for row in rows)


@pytest.mark.parametrize(
    ("output", "text", "shown"),
    [
        ("", "", ""),
        ("", "a", " a"),
        ("", "a\n", " a"),
        ("", "a\n\n", " a| "),
        ("--- x\n+++ y\n@@ -1 +1 @@\n-a\n+b\n", "b\n", "-a|+b"),
        ("--- x\n+++ y\n@@ -1,2 +1,2 @@\n \n-a\n+b\n", "\nb\n", " |-a|+b"),
        ("--- x\n+++ y\n@@ -1,2 +1 @@\n a\n-\n", "a\n", " a|-"),
        ("--- x\n+++ y\n@@ -1 +1 @@\n-a\n\\ No newline at end of file\n+a\n", "a\n", "-a|+a"),
        ("--- x\n+++ y\n@@ -0,0 +1,2 @@\n+@@ -1 +1 @@\n++++ z\n", "", "+@@ -1 +1 @@|++++ z"),
    ],
)
def test_rows_of_a_unified_difference(output: str, text: str, shown: str) -> None:
    assert short(oppi.unified_rows(output, text)) == shown


def row(text: str) -> dict[str, str]:
    return {"kind": {" ": "context", "+": "added", "-": "removed"}[text[0]], "text": text[1:]}


def hunks(*rows: str) -> list[Any]:
    return oppi.diff_hunks([row(text) for text in rows])


def numbers(hunk: Any) -> tuple[int, ...]:
    return tuple(hunk[name] for name in ("oldStart", "oldCount", "newStart", "newCount"))


def test_equal_texts_have_no_hunks() -> None:
    assert hunks() == hunks(" a", " b") == []


def test_a_hunk_has_three_lines_around_the_change() -> None:
    [hunk] = hunks(*(f" {n}" for n in range(10)), "-old", "+new", *(f" {n}" for n in range(10)))
    assert numbers(hunk) == (8, 7, 8, 7)
    assert short(hunk["lines"]) == " 7| 8| 9|-old|+new| 0| 1| 2"
    assert [(line["oldLine"], line["newLine"]) for line in hunk["lines"]] == [
        *((8, 8), (9, 9), (10, 10)), *((11, None), (None, 11)), *((12, 12), (13, 13), (14, 14)),
    ]  # fmt: skip


@pytest.mark.parametrize(("between", "count"), [(0, 1), (5, 1), (6, 1), (7, 2), (20, 2)])
def test_hunks_that_touch_are_one(between: int, count: int) -> None:
    assert len(hunks("+a", *[" x"] * between, "-b")) == count


def test_a_side_without_lines_starts_at_0() -> None:
    assert numbers(hunks("+a", "+b")[0]) == (0, 0, 1, 2)
    assert numbers(hunks("-a", "-b")[0]) == (1, 2, 0, 0)


LINE = st.sampled_from(
    ["", " ", "a", "b", "  a", "@@ -1 +1 @@", "--- x", "+++ y", "\\ No newline at end of file", "a\r", "\f", "é"]
)
TEXT = st.tuples(st.lists(LINE, max_size=25), st.booleans()).map(lambda t: "\n".join(t[0]) + "\n" * (t[1] and bool(t[0])))


@few
@given(TEXT, TEXT)
def test_hunks_applied_to_the_old_text_give_the_new_one(old: str, new: str) -> None:
    rows = oppi.line_difference(old, new)
    assert side(rows, "removed") == lines_of(old) and side(rows, "added") == lines_of(new)
    before, made, position = lines_of(old), [], 0
    for hunk in oppi.diff_hunks(rows):
        begin = hunk["oldStart"] - 1 if hunk["oldCount"] else position + hunk["newStart"] - 1 - len(made)
        made += before[position:begin]
        assert before[begin : begin + hunk["oldCount"]] == side(hunk["lines"], "removed")
        assert hunk["newStart"] == (len(made) + 1 if hunk["newCount"] else 0)
        made += side(hunk["lines"], "added")
        assert hunk["newCount"] == len(side(hunk["lines"], "added"))
        position = begin + hunk["oldCount"]
    assert made + before[position:] == lines_of(new)


# ---- files a phone never reads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        *("/w/.git", "/w/.git/config", "/w/.Git/HEAD", "/w/sub/.GIT/objects/aa", "/w/.env", "/w/.ENV", "/w/.env.local"),
        *("/w/.env.production.bak", "/w/server.pem", "/w/SERVER.PEM", "/w/tls/x.Key", "/w/.key", "/w/id_rsa", "/w/ID_RSA"),
        *("/w/id_rsa.pub", "/w/id_ed25519", "/w/id_ecdsa-sk", "/w/id_dsa.old", "/w/.netrc", "/w/.npmrc", "/w/.PYPIRC"),
        *("/w/.htpasswd", "/home/x/.ssh/config", "/home/x/.aws/credentials", "/home/x/.pi/agent/auth.json"),
        *("/data/config.json", "/data/devices.json", "/data/identity_ed25519", "/data/apns.json", "/data/sessions/S1.json"),
        *("/DATA/Config.json", "/data", "/etc/shadow", "/proc/1/environ"),
    ],
)
def test_a_secret_is_secret_in_any_spelling(path: str) -> None:
    assert oppi.sensitive_file(path, "/data")


@pytest.mark.parametrize(
    "path",
    [
        *("/w/main.py", "/w/.github/workflows/ci.yml", "/w/.gitignore", "/w/env", "/w/env.py", "/w/my.env.txt", "/w/pem"),
        *("/w/keys", "/w/key.txt", "/w/my_id_rsa", "/w/config.json", "/w/identity.txt", "/database/x", "/w/.envrc"),
    ],
)
def test_what_only_looks_like_one_is_not(path: str) -> None:
    assert not oppi.sensitive_file(path, "/data")


# ---- who may speak plain HTTP ----------------------------------------------------------------------------------------

PERMISSIVE, STRICT = "tailscale-permissive", "strict"


@pytest.mark.parametrize(
    ("peer", "local", "profiles"),
    [
        # this machine
        ("127.0.0.1", "127.0.0.1", (PERMISSIVE, STRICT)),
        ("127.8.9.1", "127.0.0.1", (PERMISSIVE, STRICT)),
        ("::1", "::1", (PERMISSIVE, STRICT)),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1", (PERMISSIVE, STRICT)),
        # the tailnet
        ("100.64.0.1", "100.64.0.2", (PERMISSIVE, STRICT)),
        ("100.127.255.255", "100.64.0.2", (PERMISSIVE, STRICT)),
        ("::ffff:100.100.1.1", "::ffff:100.64.0.2", (PERMISSIVE, STRICT)),
        ("fd7a:115c:a1e0::9", "fd7a:115c:a1e0::2", (PERMISSIVE, STRICT)),
        ("fd7a:115c:a1e0:ab12::9", "fd7a:115c:a1e0::2", (PERMISSIVE, STRICT)),
        # the local network
        ("192.168.1.7", "192.168.1.2", (PERMISSIVE,)),
        ("10.1.2.3", "10.200.1.1", (PERMISSIVE,)),
        ("172.31.0.9", "192.168.1.2", (PERMISSIVE,)),
        ("169.254.7.7", "169.254.1.1", (PERMISSIVE,)),
        ("::ffff:192.168.1.7", "::ffff:192.168.1.2", (PERMISSIVE,)),
        ("fe80::1%en0", "fe80::2%en0", (PERMISSIVE,)),
        ("fd00:1::7", "fd00:2::1", (PERMISSIVE,)),
        ("fd7a:115c:a1e1::9", "fd7a:115c:a1e0::2", (PERMISSIVE,)),
        ("8.8.4.7", "8.8.4.200", (PERMISSIVE,)),
        ("2a00:1:2:3::9", "2a00:1:2:3:ffff::1", (PERMISSIVE,)),
        # anywhere else
        ("8.8.5.7", "8.8.4.200", ()),
        ("100.63.255.255", "100.64.0.2", ()),
        ("100.128.0.0", "100.64.0.2", ()),
        ("8.8.8.8", "192.168.1.2", ()),
        ("::ffff:8.8.8.8", "::ffff:192.168.1.2", ()),
        ("2a00:1:2:4::9", "2a00:1:2:3::1", ()),
        ("2001:4860:4860::8888", "::1", ()),
    ],
)
def test_who_may_speak_plain_http(peer: str, local: str, profiles: tuple[str, ...]) -> None:
    assert tuple(name for name in (PERMISSIVE, STRICT) if oppi.plain_http_allowed(peer, local, name)) == profiles


def test_a_peer_without_an_address_is_not_trusted_by_strict() -> None:
    assert not oppi.plain_http_allowed("", "127.0.0.1", STRICT)


@many
@given(st.ip_addresses(), st.ip_addresses())
def test_strict_never_allows_what_permissive_refuses(peer: Any, local: Any) -> None:
    allowed = {name: oppi.plain_http_allowed(str(peer), str(local), name) for name in (PERMISSIVE, STRICT)}
    assert allowed[PERMISSIVE] or not allowed[STRICT]


# ---- devices that are not used ---------------------------------------------------------------------------------------

DAY = 86_400_000
NOW = 1_800_000_000_000


def access(**options: Any) -> oppi.Access:
    return oppi.Access({}, owner="sk_owner", moved=["dt_moved"], **options)


def test_a_device_that_was_not_used_for_so_long_is_forgotten() -> None:
    door = access(unused_ms=90 * DAY)
    token = f"dt_{uuid.UUID(int=1)}"
    door.add("phone", token, "v3", NOW)
    assert door.who(token, NOW + 90 * DAY)[0] == door.devices[0]["id"]
    assert door.who(token, NOW + 90 * DAY + 1) == ("", True)
    assert door.devices == []


def test_use_starts_the_time_again() -> None:
    door = access(unused_ms=90 * DAY)
    door.add("phone", "dt_phone", "v3", NOW)
    door.devices[0]["lastUsedAt"] = NOW + 80 * DAY
    assert door.who("dt_phone", NOW + 169 * DAY)[0]
    assert not door.who("dt_phone", NOW + 171 * DAY)[0]


def test_a_script_that_was_never_used_counts_from_its_making() -> None:
    door = access(unused_ms=90 * DAY)
    door.add("script", "dt_script", "script", NOW)
    assert door.devices[0]["lastUsedAt"] == 0
    assert door.who("dt_script", NOW + 89 * DAY)[0]
    assert not door.expire(NOW + 90 * DAY) and door.expire(NOW + 91 * DAY)


def test_without_a_limit_nothing_is_forgotten_and_neither_is_the_owner() -> None:
    door = access()
    door.add("phone", "dt_phone", "v3", NOW)
    assert door.who("dt_phone", NOW + 9999 * DAY)[0]
    limited = access(unused_ms=1)
    assert limited.who("sk_owner", NOW)[0] == limited.owner_name() and limited.who("dt_moved", NOW)[0]
