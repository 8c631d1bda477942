"""The record of a session: what the apps are sent of it, and what it counts."""

from __future__ import annotations

from typing import Any

import pytest

import oppi

STATS = {"mutatingToolCalls": 1, "filesChanged": 1, "changedFiles": ["a"], "addedLines": 1, "removedLines": 0}
NO_TOKENS = {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0}


def test_the_smallest_record_has_every_field_the_apps_insist_on() -> None:
    assert oppi.session_wire({"id": "s"}) == {
        "id": "s", "status": "stopped", "createdAt": 0, "lastActivity": 0, "messageCount": 0, "cost": 0,
        "tokens": NO_TOKENS, "contextWindow": 200_000,
    }  # fmt: skip


def test_a_full_record_is_sent_without_what_is_the_servers_own() -> None:
    record = {
        "id": "s", "workspaceId": "w", "name": "n", "status": "busy", "createdAt": 1, "lastActivity": 2,
        "model": "p/m",
        "messageCount": 3, "tokens": {"input": 4, "output": 5}, "cost": 0.5, "contextWindow": 1000,
        "thinkingLevel": "low",
        "changeStats": {**STATS, "_fileLineCounts": {}}, "oppi": {"seq": 9}, "firstMessage": None,
    }  # fmt: skip
    wire = oppi.session_wire(record)
    unchanged = ("id", "workspaceId", "name", "status", "createdAt", "lastActivity", "model", "cost", "contextWindow")
    assert {name: wire[name] for name in unchanged} == {name: record[name] for name in unchanged}
    assert wire["tokens"] == {"input": 4, "output": 5, "cacheRead": 0, "cacheWrite": 0}
    assert wire["changeStats"] == STATS
    assert not {"oppi", "firstMessage"} & set(wire)


@pytest.mark.parametrize(
    ("field", "stored", "sent"),
    [
        ("status", "dreaming", "stopped"), ("tokens", "x", NO_TOKENS), ("cost", "free", 0), ("createdAt", 1.5, 1),
        ("messageCount", "x", 0), ("lastActivity", 1e300, 0), ("thinkingLevel", "max", None),
        ("changeStats", "x", None),
    ],
)  # fmt: skip
def test_a_field_no_app_could_decode_is_mended(field: str, stored: Any, sent: Any) -> None:
    record = {"id": "s", field: stored}
    assert oppi.session_wire(record).get(field) == sent


@pytest.mark.parametrize(
    ("model", "tokens"),
    [("p/model-128k", 128_000), ("p/m-32k-chat", 32_000), ("p/m", 200_000), ("p/5k", 200_000), ("", 200_000)],
)
def test_the_context_window_is_guessed_from_the_name(model: str, tokens: int) -> None:
    assert oppi.session_wire({"id": "s", "model": model})["contextWindow"] == tokens


def test_a_prompt_counts_and_gives_previews() -> None:
    record: dict[str, Any] = {}
    oppi.count_prompt(record, "a" * 300, 5)
    oppi.count_prompt(record, "b" * 300, 6)
    assert record == {"messageCount": 2, "lastMessage": "b" * 100, "firstMessage": "a" * 200, "lastActivity": 6}


def answer(text: str = "", **usage: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}], "usage": usage}


def test_an_answer_counts_with_its_usage() -> None:
    record: dict[str, Any] = {"messageCount": 1}
    usage = {"input": 1, "output": 2, "cacheRead": 3, "cacheWrite": 4, "cost": {"total": 0.5}}
    oppi.count_answer(record, answer("x" * 150, **usage))
    oppi.count_answer(record, answer("", **usage))
    assert (record["messageCount"], record["lastMessage"]) == (2, "x" * 100)
    assert record["tokens"] == {"input": 2, "output": 4, "cacheRead": 6, "cacheWrite": 8}
    assert (record["cost"], record["contextTokens"]) == (1.0, 10)


def test_an_answer_without_usage_leaves_the_context_as_it_was() -> None:
    record: dict[str, Any] = {"contextTokens": 7, "tokens": "junk"}
    for message in (answer("a"), answer("b", cost={"total": "x"}), {"role": "assistant", "content": "c", "usage": 5}):
        oppi.count_answer(record, message)
    assert (record["contextTokens"], record["messageCount"], record["tokens"], record["cost"]) == (7, 3, NO_TOKENS, 0)
    oppi.count_answer(record, {"role": "user", "content": "d"})
    assert record["messageCount"] == 3


CHANGES: list[tuple[list[tuple[str, dict[str, Any]]], dict[str, Any]]] = [
    ([("write", {"path": "a", "content": "1\n2"})], {"addedLines": 2, "removedLines": 0, "changedFiles": ["a"]}),
    ([("write", {"path": "a", "content": "1\n2"}), ("write", {"path": "a", "content": "1"})],
     {"addedLines": 2, "removedLines": 1, "mutatingToolCalls": 2, "filesChanged": 1}),
    ([("edit", {"path": "a", "oldText": "1", "newText": "1\n2\n3"})], {"addedLines": 2, "removedLines": 0}),
    ([("Edit", {"file_path": " a ", "oldText": "1\n2", "newText": ""})], {"removedLines": 2, "changedFiles": ["a"]}),
    ([("edit", {"path": "a", "edits": [{"oldText": "1", "newText": "1\n2"}, {"oldText": "1\n2", "newText": "1"}, 5]})],
     {"addedLines": 1, "removedLines": 1, "mutatingToolCalls": 1}),
    ([("write", {"path": "/w/a", "content": "x"}), ("write", {"path": "a", "content": "x"})], {"changedFiles": ["a"]}),
    ([("write", {"path": "/elsewhere/a"}), ("write", {"path": "/w"})], {"changedFiles": ["/elsewhere/a", "/w"]}),
]  # fmt: skip


@pytest.mark.parametrize(("calls", "wanted"), CHANGES)
def test_what_edits_count(calls: list[tuple[str, dict[str, Any]]], wanted: dict[str, Any]) -> None:
    record: dict[str, Any] = {}
    for tool, args in calls:
        oppi.count_change(record, {"toolName": tool, "args": args}, "/w")
    stats = record["changeStats"]
    assert {name: stats[name] for name in wanted} == wanted
    assert {"mutatingToolCalls", "filesChanged", "changedFiles", "addedLines", "removedLines"} <= set(stats)


@pytest.mark.parametrize(
    ("tool", "args"), [("read", {"path": "a"}), ("write", {}), ("write", {"path": 5}), ("edit", {"path": " "})]
)
def test_what_changes_nothing(tool: str, args: dict[str, Any]) -> None:
    record: dict[str, Any] = {}
    oppi.count_change(record, {"toolName": tool, "args": args}, "/w")
    assert record == {}


def test_a_hundred_files_are_named_and_the_rest_is_a_number() -> None:
    record: dict[str, Any] = {}
    for number in range(103):
        oppi.count_change(record, {"toolName": "write", "args": {"path": str(number), "content": "x"}}, "/w")
    stats = record["changeStats"]
    assert (len(stats["changedFiles"]), stats["changedFilesOverflow"], stats["filesChanged"]) == (100, 3, 103)
