"""pi's session files as the apps draw them, on recordings of both versions and on broken files."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import oppi

from .support import FIXTURES, SESSION_FILES, VERSIONS, few, session_entries

TYPES = {"user", "assistant", "toolCall", "toolResult", "thinking", "system", "compaction"}


def entry(key: str, parent: str | None, kind: str = "message", **more: Any) -> dict[str, Any]:
    return {"type": kind, "id": key, "parentId": parent, "timestamp": "2026-01-02T03:04:05.678Z", **more}


def said(name: str, parent: str | None, text: str, role: str = "user", **more: Any) -> dict[str, Any]:
    return entry(name, parent, message={"role": role, "content": [{"type": "text", "text": text}], **more})


def parse(*entries: Any, version: Any = 3) -> list[dict[str, Any]]:
    header = {"type": "session", "id": "s", **({"version": version} if version else {})}
    return oppi.parse_entries(json.dumps(e).encode() for e in (header, *entries))


def trace(*entries: Any, view: str = "full") -> list[dict[str, Any]]:
    return oppi.build_trace(parse(*entries), view)


def short(events: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """(type, the one text that matters) of each event."""
    return [(e["type"], e.get("text") or e.get("thinking") or e.get("output") or e.get("args")) for e in events]


@pytest.mark.parametrize(("version", "name"), SESSION_FILES)
@pytest.mark.parametrize("view", ["full", "context"])
def test_every_recorded_file_decodes_in_both_apps(version: str, name: str, view: str) -> None:
    events = oppi.build_trace(session_entries(version, name), view)
    assert events
    assert len({event["id"] for event in events}) == len(events)
    for event in events:
        assert event["type"] in TYPES
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event["timestamp"])
        assert isinstance(event.get("args", {}), dict)
        assert all(isinstance(event.get(key, ""), str) for key in ("text", "thinking", "output", "toolCallId", "tool"))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_trace_follows_the_branch_that_is_current(version: str) -> None:
    events = oppi.build_trace(session_entries(version, "session-tree"), "full")
    summary = next(text for kind, text in short(events) if str(text).startswith("Branch context: "))
    assert short(events) == [
        ("system", "Model: mock-1"),
        ("system", "Thinking level: medium"),
        ("user", "!think 2\n!say reply 0"),
        ("thinking", "t0 t1 "),
        ("assistant", "reply 0"),
        ("user", "!think 2\n!say reply 1"),
        ("thinking", "t0 t1 "),
        ("assistant", "reply 1"),
        ("system", summary),
        ("user", "!say after summary"),
        ("assistant", "after summary"),
        ("system", "Model: mock-2"),
        ("system", "Thinking level: off"),
        ("toolCall", events[-2]["args"]),
        ("toolResult", events[-1]["output"]),
    ]
    assert events[-2]["tool"] == "bash"
    assert events[-1]["toolCallId"] == events[-2]["id"]


@pytest.mark.parametrize("version", VERSIONS)
def test_ids_lead_back_to_the_entry_to_fork_from(version: str) -> None:
    entries = session_entries(version, "session-tree")
    users = {e["id"] for e in entries if (e.get("message") or {}).get("role") == "user"}
    events = oppi.build_trace(entries, "full")
    assert {event["id"] for event in events if event["type"] == "user"} <= users
    assistants = [event["id"] for event in events if event["type"] in ("assistant", "thinking")]
    known = {e["id"] for e in entries}
    assert all(re.sub(r"-(text|think)-\d+$", "", name) in known and "-t" in name for name in assistants)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_compacted_session_in_both_views(version: str) -> None:
    entries = session_entries(version, "session-compacted")
    full, context = (short(oppi.build_trace(entries, view)) for view in ("full", "context"))
    asked = [str(text)[:10] for kind, text in full if kind == "user"]
    assert asked == ["question 0", "question 1", "question 2", "question 3", "!say after"]
    assert context[0][0] == "compaction"
    assert re.match(r"Context compacted \(\d+ tokens\): answer 0answer 1", str(context[0][1]))
    assert [str(text)[:10] for kind, text in context if kind == "user"] == ["question 2", "question 3", "!say after"]
    assert [kind for kind, _ in full].count("compaction") == 1


@pytest.mark.parametrize("version", VERSIONS)
def test_tool_calls_and_results_belong_together(version: str) -> None:
    events = oppi.build_trace(session_entries(version, "session-tool-edit"), "full")
    calls = [event["id"] for event in events if event["type"] == "toolCall"]
    results = [event for event in events if event["type"] == "toolResult"]
    assert calls == [event["toolCallId"] for event in results] != []
    assert all(event["id"].startswith("result-") for event in results)
    assert any("diff" in event.get("details", {}) for event in results)


@pytest.mark.parametrize("version", VERSIONS)
def test_images_are_shown_as_data_lines(version: str) -> None:
    events = oppi.build_trace(session_entries(version, "session-image"), "full")
    user = next(event for event in events if event["type"] == "user")
    assert re.search(r"(^|\n)data:image/png;base64,[A-Za-z0-9+/=]+(\n|$)", user["text"])


@pytest.mark.parametrize("version", VERSIONS)
def test_a_fork_repeats_the_history_of_its_parent(version: str) -> None:
    parent, fork = (
        [event["id"] for event in oppi.build_trace(session_entries(version, f"session-fork-{name}"), "full")]
        for name in ("parent", "fork")
    )
    assert set(parent) & set(fork)


def test_the_system_prompt_is_not_part_of_a_conversation() -> None:
    assert any((e.get("message") or {}).get("role") == "system" for e in session_entries("0.87", "session-tree"))
    assert trace(said("a", None, "secret instructions", "system")) == []


ASSISTANT = [
    ("plain", [("e", "assistant", "plain")]),
    ("", []),
    (None, []),
    ([{"type": "text", "text": ""}, {"type": "output_text", "text": "x"}], [("e-text-1", "assistant", "x")]),
    ([{"type": "thinking", "thinking": "t"}, {"type": "thinking", "thinking": ""}], [("e-think-0", "thinking", "t")]),
    (["junk", {"type": "text", "text": "x"}], [("e-text-0", "assistant", "x")]),
    ([{"type": "toolCall", "id": "c", "name": "ls", "arguments": {"p": 1}}], [("c", "toolCall", {"p": 1})]),
    ([{"type": "toolCall", "name": "ls", "arguments": {}}], [("e-tool-0", "toolCall", {})]),
    ([{"type": "tool_call", "id": "c", "tool_name": "ls", "partialJson": '{"p":1}'}], [("c", "toolCall", {"p": 1})]),
    ([{"type": "toolCall", "id": "c", "partialJson": '{"p":'}], [("c", "toolCall", {})]),
    ([{"type": "toolCall", "id": "c", "partialJson": "[1]"}], [("c", "toolCall", {})]),
    ([{"type": "unheard of"}], []),
]


@pytest.mark.parametrize(("content", "wanted"), ASSISTANT)
def test_blocks_of_an_answer(content: Any, wanted: list[Any]) -> None:
    events = trace(entry("e", None, message={"role": "assistant", "content": content}))
    shown = [
        (e["id"], e["type"], e["args"] if e["type"] == "toolCall" else e.get("text") or e.get("thinking"))
        for e in events
    ]
    assert shown == wanted


OTHERS: list[tuple[dict[str, Any], list[tuple[str, str]]]] = [
    (entry("e", None, "model_change", modelId="m"), [("system", "Model: m")]),
    (entry("e", None, "thinking_level_change", thinkingLevel="low"), [("system", "Thinking level: low")]),
    (entry("e", None, "branch_summary", summary="s"), [("system", "Branch context: s")]),
    (entry("e", None, "custom_message", content="note", display=True), [("system", "note")]),
    (entry("e", None, "custom_message", content=[{"type": "text", "text": "n"}]), [("system", "n")]),
    (entry("e", None, "custom_message", content="note", display=False), []),
    (entry("e", None, "custom_message", content=""), []),
    (entry("e", None, "compaction", summary="s", tokensBefore=7), [("compaction", "Context compacted (7 tokens): s")]),
    (entry("e", None, "compaction"), [("compaction", "Context compacted: ")]),
    (entry("e", None, "custom", data={}), []),
    (entry("e", None, "label", targetId="x"), []),
    (entry("e", None, "session_info", name="n"), []),
    (entry("e", None, "context_edit", targetId="x"), []),
    (entry("e", None, "usage"), []),
    (entry("e", None, "surprise"), []),
    (entry("e", None, message="junk"), []),
    (said("e", None, ""), []),
]


@pytest.mark.parametrize(("given_entry", "wanted"), OTHERS)
def test_other_entries(given_entry: dict[str, Any], wanted: list[tuple[str, str]]) -> None:
    assert short(trace(given_entry)) == wanted


def test_a_tool_result_carries_everything_the_apps_show() -> None:
    image = {"type": "image", "data": "AAAA"}
    message = {"toolCallId": "c", "toolName": "read", "isError": True, "details": {"ui": 1}}
    result = said("e", None, "out", "toolResult", **message)
    result["message"]["content"].append(image)
    (event,) = trace(result)
    wanted = {"id": "result-e", "type": "toolResult", "toolCallId": "c", "toolName": "read", "isError": True}
    output = "out\ndata:image/png;base64,AAAA"
    assert event == {**wanted, "output": output, "details": {"ui": 1}, "timestamp": "2026-01-02T03:04:05.678Z"}
    assert "details" not in trace(said("e", None, "out", "toolResult"))[0]


@pytest.mark.parametrize(("code", "failed"), [(0, False), (3, True), (None, False)])
def test_a_command_the_person_ran_is_shown_like_a_tool(code: Any, failed: bool) -> None:
    message = {"role": "bashExecution", "command": "ls", "output": "a\n", "exitCode": code}
    call, result = trace(entry("e", None, message=message))
    assert (call["type"], call["tool"], call["args"]) == ("toolCall", "bash", {"command": "ls"})
    assert (result["toolCallId"], result["output"], result["isError"]) == (call["id"], "a\n", failed)


@pytest.mark.parametrize(
    ("stamp", "shown"),
    [
        ("2026-01-02T03:04:05Z", "2026-01-02T03:04:05.000Z"),
        ("2026-01-02T03:04:05.6Z", "2026-01-02T03:04:05.600Z"),
        ("2026-01-02T03:04:05.678901Z", "2026-01-02T03:04:05.678Z"),
        (None, "1970-01-01T00:00:00.000Z"),
        (5, "1970-01-01T00:00:00.000Z"),
    ],
)
def test_times_always_have_milliseconds(stamp: Any, shown: str) -> None:
    assert trace({**said("a", None, "x"), "timestamp": stamp})[0]["timestamp"] == shown


def test_a_missing_parent_is_where_the_branch_begins() -> None:
    assert short(trace(said("a", None, "lost"), said("c", "gone", "one"), said("d", "c", "two"))) == [
        ("user", "one"),
        ("user", "two"),
    ]


def test_a_cycle_ends() -> None:
    assert short(trace(said("a", "b", "one"), said("b", "a", "two"))) == [("user", "one"), ("user", "two")]
    assert short(trace(said("a", "a", "self"))) == [("user", "self")]


def test_a_compaction_that_kept_nothing_or_an_entry_elsewhere() -> None:
    for kept in ("k", "nowhere", None):
        chain = [said("a", None, "old"), entry("k", "a", "compaction", summary="s", firstKeptEntryId=kept)]
        assert [kind for kind, _ in short(trace(*chain, said("b", "k", "new"), view="context"))] == [
            "compaction",
            "user",
        ]
    first = entry("k", "a", "compaction", summary="1", firstKeptEntryId="a")
    second = entry("l", "b", "compaction", summary="2", firstKeptEntryId="b")
    chain = [said("a", None, "one"), first, said("b", "k", "two"), second, said("c", "l", "three")]
    shown = short(trace(*chain, view="context"))
    assert shown == [("compaction", "Context compacted: 2"), ("user", "two"), ("user", "three")]


def test_version_1_files_are_a_chain_without_ids() -> None:
    old = [{"type": "message", "message": {"role": "user", "content": str(number)}} for number in range(3)]
    entries = parse(*old, version=None)
    events = oppi.build_trace(entries, "full")
    assert [event["text"] for event in events] == ["0", "1", "2"]
    assert len({event["id"] for event in events}) == 3
    assert events == oppi.build_trace(parse(*old, version=None), "full")


def test_broken_lines_are_skipped() -> None:
    good = [json.dumps(e).encode() for e in (said("a", None, "one"), said("b", "a", "two"))]
    header = b'{"type":"session","version":3,"id":"s"}\n'
    lines = [
        header,
        b"\n",
        good[0] + b"\r\n",
        b'{"type":"mess',
        b"[1]",
        b"\xff\xfe",
        b'{"id":"x"}',
        b'{"type":5}',
        b"[" * 99_999,
    ]
    entries = oppi.parse_entries([*lines, good[1] + b"\n"])
    assert short(oppi.build_trace(entries, "full")) == [("user", "one"), ("user", "two")]


@pytest.mark.parametrize(
    "entries", [[], [{"type": "session", "version": 3}], [{"type": "label", "id": 5, "version": 3}]]
)
def test_a_file_without_conversation_is_an_empty_trace(entries: list[dict[str, Any]]) -> None:
    assert oppi.build_trace(entries) == []


@few
@given(st.lists(st.tuples(st.integers(0, 8), st.none() | st.integers(0, 9)), max_size=9))
def test_any_tree_gives_the_path_of_its_last_entry(links: list[tuple[int, int | None]]) -> None:
    entries = [said(str(name), None if parent is None else str(parent), str(name)) for name, parent in links]
    path = [event["text"] for event in trace(*entries)]
    parents = {str(name): None if parent is None else str(parent) for name, parent in links}
    assert len(path) == len(set(path))
    assert all(parents[child] == parent for parent, child in zip(path, path[1:])) or len(parents) < len(links)
    assert path[-1:] == [str(name) for name, _ in links[-1:]]


@pytest.mark.parametrize(
    ("text", "ms"),
    [("2023-11-14T22:13:20.123Z", 1_700_000_000_123), ("2023-11-14T22:13:20Z", 1_700_000_000_000), ("soon", 0), (None, 0)],
)
def test_iso_times_are_read_and_written(text: Any, ms: int) -> None:
    assert oppi.iso_ms(text) == ms
    if ms % 1000:
        assert oppi.iso_time(ms) == text


def attempt(key: str, parent: str, text: str = "503 busy", reason: str = "error") -> dict[str, Any]:
    message = {"role": "assistant", "content": [], "stopReason": reason, "errorMessage": text, "timestamp": 1}
    return {"type": "message", "id": key, "parentId": parent, "message": message}


def asked(key: str, parent: str | None) -> dict[str, Any]:
    return {"type": "message", "id": key, "parentId": parent, "message": {"role": "user", "content": key}}


def test_of_several_failed_attempts_the_last_error_is_shown_once() -> None:
    entries = [asked("a", None), attempt("b", "a"), attempt("c", "b", "504 slow"), asked("d", "c"), attempt("e", "d")]
    shown = [(event["type"], event["text"]) for event in oppi.build_trace(entries, "full")]
    assert shown == [("user", "a"), ("system", "Error: 504 slow"), ("user", "d"), ("system", "Error: 503 busy")]


def test_an_attempt_that_was_followed_by_a_good_one_or_stopped_by_a_person_is_no_error() -> None:
    good = {**attempt("c", "b", "", "stop")}
    good["message"] = {**good["message"], "content": "fine"}
    stopped = attempt("e", "d", "This operation was aborted")
    entries = [asked("a", None), attempt("b", "a"), good, asked("d", "c"), stopped]
    assert [event["text"] for event in oppi.build_trace(entries, "full")] == ["a", "fine", "d"]


@pytest.mark.parametrize(("version", "name"), SESSION_FILES)
def test_an_outline_says_what_the_tree_needs_without_parsing_messages(version: str, name: str) -> None:
    for line in (FIXTURES / f"pi-{version}" / "sessions" / f"{name}.jsonl").read_bytes().split(b"\n"):
        entry, found = oppi.parse_entry(line), oppi.outline(line)
        assert found == (entry and {key: entry[key] for key in oppi.OUTLINED if key in entry})


def test_the_outline_of_a_broken_line() -> None:
    assert oppi.outline(b'{"type":"label","id":') is None
    broken = b'{"type":"message","id":"a","parentId":"b","message":{"ro'
    assert oppi.outline(broken) == {"type": "message", "id": "a", "parentId": "b"}
