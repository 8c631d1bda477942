"""Bytes of pi to events, and events to what a phone is told; on recordings of both versions."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import oppi

from .support import SCENARIOS, VERSIONS, few, many, read_all, recorded

STATE = {"type": "state"}
SMALL = [(version, name) for version, name in SCENARIOS if name not in ("tool_bash_big", "ext_gate")]


def told(items: list[Any]) -> list[dict[str, Any]]:
    """The messages for a phone, deltas merged as the session does."""
    translator, found = oppi.Translator(), []
    for item in items:
        if not isinstance(item, oppi.Delta):
            found += translator.messages(item)
        elif item.kind != "toolcall":
            found.append({"type": f"{item.kind}_delta", "delta": translator.delta(item)})
    return found + translator.final_failure()


def events(*given_events: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(message) for message in told(list(given_events))]


def of_type(messages: list[dict[str, Any]], *types: str) -> list[dict[str, Any]]:
    return [message for message in messages if message["type"] in types]


def parsed(version: str, scenario: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in recorded(version, scenario).split(b"\n") if line]


# the reader


@pytest.mark.parametrize(("version", "scenario"), SCENARIOS)
def test_no_recorded_line_is_lost_or_garbage(version: str, scenario: str) -> None:
    items = read_all(recorded(version, scenario))
    kinds = [item["type"] for item in items if not isinstance(item, oppi.Delta)]
    assert "garbage" not in kinds
    skipped = {"nothing", "message_update"}
    plain = [event for event in parsed(version, scenario) if event["type"] != "message_update"]
    assert [kind for kind in kinds if kind not in skipped] == [event["type"] for event in plain]


@pytest.mark.parametrize(("version", "scenario"), SCENARIOS)
def test_deltas_are_those_of_a_full_parse(version: str, scenario: str) -> None:
    wanted = [
        (update["type"][:-6], update["contentIndex"], update["delta"])
        for event in parsed(version, scenario)
        if event["type"] == "message_update"
        for update in [event["assistantMessageEvent"]]
        if update["type"].endswith("_delta")
    ]
    assert [tuple(item) for item in read_all(recorded(version, scenario)) if isinstance(item, oppi.Delta)] == wanted


@few
@given(st.sampled_from(SMALL), st.lists(st.integers(0, 10**6), max_size=40))
def test_the_pieces_in_which_bytes_arrive_do_not_matter(which: tuple[str, str], cuts: list[int]) -> None:
    data = recorded(*which)
    assert read_all(data, tuple(cuts)) == read_all(data)


def test_bytes_may_arrive_one_by_one() -> None:
    for version in VERSIONS:
        for scenario in ("unicode_text", "retry_success"):
            data = recorded(version, scenario)
            assert read_all(data, tuple(range(len(data)))) == read_all(data)


@pytest.mark.parametrize(("version", "scenario"), SCENARIOS)
def test_streamed_text_is_the_text_of_the_finished_message(version: str, scenario: str) -> None:
    streamed = {"text_delta": "", "thinking_delta": ""}
    translator = oppi.Translator()
    for item in read_all(recorded(version, scenario)):
        if isinstance(item, oppi.Delta):
            if item.kind != "toolcall":
                streamed[f"{item.kind}_delta"] += translator.delta(item)
            continue
        messages = translator.messages(item)
        assert not of_type(messages, "thinking_delta"), "thinking must not be sent twice"
        for end in of_type(messages, "message_end"):
            assert end["role"] == "user" or end["content"] == streamed["text_delta"]
        if item["type"] == "message_end":
            streamed = dict.fromkeys(streamed, "")


@pytest.mark.parametrize("version", VERSIONS)
def test_separators_inside_strings_do_not_end_a_line(version: str) -> None:
    end = of_type(told(read_all(recorded(version, "unicode_text"))), "message_end")[-1]
    assert {"\u2028", "\u2029", "\u0085"} <= set(end["content"])


def delta_line(text: str, kind: str = "text_delta", pad: int = 0) -> bytes:
    """A delta as pi 0.73 writes it, with `pad` bytes of repeated message behind it."""
    update = {"type": kind, "contentIndex": 1, "delta": text, "partial": {"role": "assistant", "x": "y" * pad}}
    line = {"type": "message_update", "assistantMessageEvent": update, "message": update["partial"]}
    return json.dumps(line, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"


@many
@given(st.text(max_size=40), st.sampled_from([0, 3000]), st.lists(st.integers(0, 10**4), max_size=4))
def test_any_delta_text_arrives_as_it_was(text: str, pad: int, cuts: list[int]) -> None:
    assert read_all(delta_line(text, pad=pad), tuple(cuts)) == [oppi.Delta("text", 1, text)]


def test_a_delta_with_its_keys_in_another_order_is_still_a_delta() -> None:
    front = b'{"type":"message_update","assistantMessageEvent":{"type":"text_delta",'
    assert read_all(front + b'"delta":"x","contentIndex":2}}\n') == [oppi.Delta("text", 2, "x")]
    assert read_all(front + b'"delta":5}}\n')[0]["type"] == "message_update"


@pytest.mark.parametrize("size", [2040, 2048, 5000, 300_000])
def test_a_long_delta_is_read_to_its_end(size: int) -> None:
    text = "é\n" * size
    data = delta_line(text) + b'{"type":"agent_start"}\n'
    for cuts in ((), (100,), (2048, 4096, 4100), tuple(range(0, len(data), 997))):
        assert read_all(data, cuts) == [oppi.Delta("text", 1, text), {"type": "agent_start"}]


def test_what_is_repeated_behind_a_delta_is_not_kept() -> None:
    reader, head = oppi.PiReader(), delta_line("hi", pad=3000)[:3000]
    assert reader.feed(head, len(head)) == []
    for _ in range(100):
        reader.feed(b"z" * 65536, 65536)
    held = sum(len(value) for value in vars(reader).values() if isinstance(value, (bytes, bytearray)))
    assert held < 4096
    assert reader.feed(b'"}\n', 3) == [oppi.Delta("text", 1, "hi")]


@pytest.mark.parametrize(("retry", "tail"), [(True, b""), (False, b"\r")])
@pytest.mark.parametrize("pad", [10, 5000])
def test_a_long_agent_end_still_says_whether_pi_goes_on(retry: bool, tail: bytes, pad: int) -> None:
    line = json.dumps(
        {"type": "agent_end", "messages": ["x" * pad], "willRetry": retry}, separators=(",", ":")
    ).encode()
    data = line + tail + b"\n"
    for cuts in ((), (2100,), tuple(range(len(data) - 30, len(data)))):
        assert read_all(data, cuts) == [{"type": "agent_end", "willRetry": retry}]
    old = b'{"type":"agent_end","messages":["' + b"x" * pad + b'"]}\n'
    assert read_all(old) == [{"type": "agent_end"}]


def test_versions_tell_or_leave_open_whether_a_retry_follows() -> None:
    flags = {}
    for version in VERSIONS:
        items = read_all(recorded(version, "retry_success"))
        flags[version] = [
            item.get("willRetry") for item in items if isinstance(item, dict) and item["type"] == "agent_end"
        ]
    assert set(flags["0.73"]) == {None}
    assert flags["0.87"][0] is True
    assert flags["0.87"][-1] is False


@pytest.mark.parametrize("role", ["system", "toolResult", "custom"])
@pytest.mark.parametrize("phase", ["message_start", "message_end"])
def test_bulky_messages_are_recognised_by_their_front(role: str, phase: str) -> None:
    line = json.dumps({"type": phase, "message": {"role": role, "content": "x" * 9000}}, separators=(",", ":"))
    data = line.encode() + b"\n"
    assert read_all(data, (3000,)) == [{"type": phase, "message": {"role": role}}]


@pytest.mark.parametrize(
    ("line", "items"),
    [
        (b"", []),
        (b"\r", []),
        (b'{"type":"agent_start"}\r', [{"type": "agent_start"}]),
        (b'{"id":"c0","type":"response","success":true}', [{"id": "c0", "type": "response", "success": True}]),
        (b"not json", [{"type": "garbage", "line": "not json"}]),
        (b"[1]", [{"type": "garbage", "line": "[1]"}]),
        (b'{"type":5}', [{"type": "garbage", "line": '{"type":5}'}]),
        (b'{"a":1}', [{"type": "garbage", "line": '{"a":1}'}]),
        (b'{"type":"x","n":NaN}', [{"type": "garbage", "line": '{"type":"x","n":NaN}'}]),
        (b"\xff\xfe", [{"type": "garbage", "line": "\ufffd\ufffd"}]),
        (b"z" * 9000, [{"type": "garbage", "line": "z" * 200}]),
        (b"[" * 100_000, [{"type": "garbage", "line": "[" * 200}]),
    ],
)
def test_a_malformed_line_is_one_item_and_the_next_line_is_fine(line: bytes, items: list[Any]) -> None:
    data = line + b'\n{"type":"agent_settled"}\n'
    for cuts in ((), (1,), (len(line),), (len(line) // 2,)):
        assert read_all(data, cuts) == [*items, {"type": "agent_settled"}]


@many
@given(st.binary(max_size=80), st.lists(st.integers(0, 100), max_size=5))
def test_no_bytes_break_the_reader(data: bytes, cuts: list[int]) -> None:
    items = read_all(data + b'\n{"type":"agent_settled"}\n', tuple(cuts))
    assert items[-1] == {"type": "agent_settled"}


def test_an_endless_line_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oppi, "LINE_LIMIT", 10_000)
    reader = oppi.PiReader()
    reader.feed(b'{"type":"response","x":"', 24)
    with pytest.raises(OverflowError):
        for _ in range(10):
            reader.feed(b"x" * 4096, 4096)


def test_only_the_filled_part_of_a_buffer_is_read() -> None:
    buffer = bytearray(b'{"type":"agent_start"}\n{"type":"old rubbish"}\n')
    assert oppi.PiReader().feed(buffer, 23) == [{"type": "agent_start"}]


@pytest.mark.parametrize(
    ("raw", "text"),
    [(b"abc", "abc"), (b"a\\n\\u00e9", "a\né"),
     (b"\\ud83d", "\ud83d"), (b"\\q", "\\q"), (b"\xff", "\ufffd"), (b"a\tb\\n", "a\tb\n")],
)  # fmt: skip
def test_the_text_of_a_json_string(raw: bytes, text: str) -> None:
    assert oppi.json_text(raw) == text


@many
@given(st.text())
def test_any_json_string_can_be_read_back(text: str) -> None:
    assert oppi.json_text(json.dumps(text).encode()[1:-1]) == text
    assert oppi.json_text(json.dumps(text, ensure_ascii=False).encode()[1:-1]) == text


# the gate


def gate(**more: Any) -> dict[str, Any]:
    return {"type": "extension_ui_request", "id": "u", "method": "input", "title": "oppi-gate", **more}


@pytest.mark.parametrize(
    ("event", "question"),
    [
        (gate(placeholder='{"tool":"bash"}'), {"tool": "bash"}),
        (gate(placeholder="{"), {}),
        (gate(placeholder="[1]"), {}),
        (gate(placeholder=5), {}),
        (gate(placeholder=["x"]), {}),
        (gate(), {}),
        (gate(placeholder='{"tool":"bash"}', title="other"), None),
        (gate(placeholder='{"tool":"bash"}', method="select"), None),
    ],
)
def test_the_question_of_the_gate_is_told_from_other_dialogs(event: Any, question: Any) -> None:
    assert oppi.gate_question(event) == question


def test_the_answer_to_the_gate_names_the_call() -> None:
    line = oppi.gate_answer("u1", "call_1", "deny", "Denied by user")
    assert (line["type"], line["id"]) == ("extension_ui_response", "u1")
    assert json.loads(line["value"]) == {"verdict": "deny", "toolCallId": "call_1", "reason": "Denied by user"}


def test_the_extension_lets_nothing_run_but_a_well_formed_allow() -> None:
    assert f'"{oppi.GATE_TITLE}"' in oppi.GATE_EXTENSION
    assert 'answer.verdict === "allow" && answer.toolCallId === event.toolCallId' in oppi.GATE_EXTENSION
    assert oppi.GATE_EXTENSION.count("block: true") == 1
    assert "await ask(ctx, { hello" not in oppi.GATE_EXTENSION  # it would end pi before its stdin is read


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, ""), ({"session_file": "/s/f.jsonl"}, "--session /s/f.jsonl"), ({"thinking": "low"}, "--thinking low"),
        ({"model": "p/m/n"}, "--provider p --model m/n"), ({"model": "m"}, "--model m"),
        ({"model": "/m"}, "--model /m"),
        ({"prompt_file": "/p"}, "--append-system-prompt /p"), ({"version": (0, 87, 1)}, "-na"),
        ({"version": (0, 73, 1)}, ""),
        ({"prompt_file": "/p", "prompt_mode": "replace"}, "--system-prompt /p"),
    ],
)  # fmt: skip
def test_how_pi_is_started(options: dict[str, Any], wanted: str) -> None:
    arguments = oppi.pi_arguments("/gate.js", "/s", **options)
    fixed = "--mode rpc --no-extensions --no-skills --session-dir /s --extension /gate.js"
    assert " ".join(arguments) == f"{fixed} {wanted}".strip()


def test_the_gate_is_the_last_extension() -> None:
    arguments = oppi.pi_arguments("/gate.js", "/s", skills=["/k"], extensions=["/a.ts", "/b.ts"])
    extensions = [value for flag, value in zip(arguments, arguments[1:]) if flag in ("--extension", "-e")]
    assert extensions == ["/a.ts", "/b.ts", "/gate.js"]
    assert arguments[arguments.index("--skill") + 1] == "/k"


# the translator


def text(*parts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": part} for part in parts]


def update(output: str, call: str = "c1") -> dict[str, Any]:
    return {
        "type": "tool_execution_update",
        "toolCallId": call,
        "toolName": "bash",
        "partialResult": {"content": text(output)},
    }


def outcome(output: str, call: str = "c1", **more: Any) -> dict[str, Any]:
    return {
        "type": "tool_execution_end",
        "toolCallId": call,
        "toolName": "bash",
        "result": {"content": text(output)},
        **more,
    }


def assistant(*content: Any, **more: Any) -> dict[str, Any]:
    return {"type": "message_end", "message": {"role": "assistant", "content": list(content), **more}}


IMAGE = {"type": "image", "data": "AAAA", "mimeType": "image/jpeg"}
ERROR = {"stopReason": "error", "errorMessage": "529 Overloaded"}
TABLE: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    ({"type": "turn_start"}, []),
    ({"type": "turn_end"}, []),
    ({"type": "nothing"}, []),
    ({"type": "surprise"}, []),
    ({"type": "extension_error", "error": "x"}, []),
    ({"type": "message_start", "message": {"role": "user"}}, []),
    ({"type": "message_end", "message": {"role": "user", "content": "hi"}},
     [{"type": "message_end", "role": "user", "content": "hi"}, STATE]),
    ({"type": "message_end", "message": {"role": "user", "content": [*text("a", "b"), IMAGE]}},
     [{"type": "message_end", "role": "user", "content": "ab"}, STATE]),
    ({"type": "message_end", "message": {"role": "toolResult"}}, [STATE]),
    ({"type": "message_end", "message": {"role": "custom"}}, [STATE]),
    ({"type": "message_end"}, [STATE]),
    ({"type": "message_end", "message": "x"}, [STATE]),
    (assistant(*text("a", "b"), {"type": "output_text", "text": "c"}, {"type": "toolCall"}),
     [{"type": "message_end", "role": "assistant", "content": "abc"}, STATE]),
    (assistant({"type": "thinking", "thinking": "hm"}, {"type": "thinking", "thinking": ""}, *text("a")),
     [{"type": "thinking_delta", "delta": "hm"}, {"type": "message_end", "role": "assistant", "content": "a"}, STATE]),
    (assistant(**ERROR), [{"type": "message_end", "role": "assistant", "content": ""}, STATE,
                          {"type": "error", "error": "529 Overloaded"}]),
    (assistant(stopReason="error"), [{"type": "message_end", "role": "assistant", "content": ""}, STATE,
                                     {"type": "error", "error": "The model request failed"}]),
    (assistant(stopReason="error", errorMessage="413 {request_too_large}"),
     [{"type": "message_end", "role": "assistant", "content": ""}, STATE,
      {"type": "error", "error": "Request too large - the conversation has exceeded the maximum request size. "
                                 "Start a new session to continue."}]),
    (assistant(*text("cut"), stopReason="aborted"),
     [{"type": "message_end", "role": "assistant", "content": "cut"}, STATE]),
    ({"type": "tool_execution_start", "toolCallId": "c1", "toolName": "bash", "args": {"command": "ls"}},
     [{"type": "tool_start", "tool": "bash", "args": {"command": "ls"}, "toolCallId": "c1"}, STATE]),
    ({"type": "tool_execution_start", "id": "c2", "toolCallId": "", "toolName": "x", "args": None},
     [{"type": "tool_start", "tool": "x", "args": {}, "toolCallId": "c2"}, STATE]),
    ({"type": "tool_execution_start", "toolCallId": 5}, [{"type": "tool_start", "tool": "", "args": {}}, STATE]),
    ({"type": "compaction_end", "errorMessage": 5}, [{"type": "compaction_end", "aborted": False, "willRetry": False}]),
    ({"type": "tool_execution_start"}, [{"type": "tool_start", "tool": "", "args": {}}, STATE]),
    (update(""), []),
    (update("one"), [{"type": "tool_output", "output": "one", "toolCallId": "c1"}]),
    ({"type": "tool_execution_update", "partialResult": None}, []),
    (outcome("out"), [{"type": "tool_output", "output": "out", "toolCallId": "c1"},
                      {"type": "tool_end", "tool": "bash", "toolCallId": "c1"}]),
    (outcome("", isError=True), [{"type": "tool_output", "output": "", "isError": True, "toolCallId": "c1"},
                                 {"type": "tool_end", "tool": "bash", "isError": True, "toolCallId": "c1"}]),
    (outcome("", isError="yes"), [{"type": "tool_end", "tool": "bash", "toolCallId": "c1"}]),
    ({"type": "compaction_start", "reason": "overflow"}, [{"type": "compaction_start", "reason": "overflow"}]),
    ({"type": "auto_compaction_start"}, [{"type": "compaction_start", "reason": "threshold"}]),
    ({"type": "compaction_end", "aborted": False, "willRetry": True, "result": {"summary": "s", "tokensBefore": 5}},
     [{"type": "compaction_end", "aborted": False, "willRetry": True, "summary": "s", "tokensBefore": 5}]),
    ({"type": "auto_compaction_end", "aborted": True},
     [{"type": "compaction_end", "aborted": True, "willRetry": False}]),
    ({"type": "compaction_end", "errorMessage": "no"},
     [{"type": "compaction_end", "aborted": False, "willRetry": False}, {"type": "error", "error": "no"}]),
    ({"type": "auto_retry_start", "attempt": 1, "maxAttempts": 3, "delayMs": 2000.5, "errorMessage": "503"},
     [{"type": "retry_start", "attempt": 1, "maxAttempts": 3, "delayMs": 2000, "errorMessage": "503"}]),
    ({"type": "auto_retry_start", "attempt": "x"},
     [{"type": "retry_start", "attempt": 0, "maxAttempts": 0, "delayMs": 0, "errorMessage": "retry requested"}]),
    ({"type": "auto_retry_end", "success": True, "attempt": 2}, [{"type": "retry_end", "success": True, "attempt": 2}]),
    ({"type": "auto_retry_end", "success": False, "attempt": 3, "finalError": "529"},
     [{"type": "retry_end", "success": False, "attempt": 3, "finalError": "529"}]),
]  # fmt: skip


@pytest.mark.parametrize(("event", "messages"), TABLE)
def test_what_a_phone_is_told_about_an_event(event: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    assert events(event) == messages


def test_thinking_that_was_streamed_is_not_told_again_but_the_next_message_is_fresh() -> None:
    thought = assistant({"type": "thinking", "thinking": "hm"})
    start = {"type": "message_start", "message": {"role": "assistant"}}
    messages = told([start, oppi.Delta("thinking", 0, "hm"), thought, start, thought])
    assert [m["delta"] for m in of_type(messages, "thinking_delta")] == ["hm", "hm"]


def test_a_failure_that_is_retried_is_not_an_error() -> None:
    retry = {"type": "auto_retry_start", "attempt": 1, "maxAttempts": 3, "delayMs": 1}
    assert of_type(events(assistant(**ERROR), retry, assistant(*text("ok"))), "error") == []


def test_a_failure_that_compaction_cured_is_not_an_error() -> None:
    cure = [{"type": "compaction_start", "reason": "overflow"}, {"type": "compaction_end", "willRetry": True}]
    assert of_type(events(assistant(**ERROR), *cure, assistant(*text("ok"))), "error") == []
    assert of_type(events(assistant(**ERROR), {"type": "compaction_end", "aborted": True}), "error") != []


RECORDED_ERRORS = {
    "retry_success": None, "retry_exhausted": "Overloaded", "error_final": "no key",
    "compact_overflow": "maximum context", "text_turn": None, "tool_bash": None,
}  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("scenario", "wanted"), RECORDED_ERRORS.items())
def test_recorded_failures_are_told_once_they_are_final(version: str, scenario: str, wanted: str | None) -> None:
    errors = of_type(told(read_all(recorded(version, scenario)))[-1:], "error")
    assert [wanted in error["error"] for error in errors] == ([True] if wanted else [])


@pytest.mark.parametrize(("version", "scenario"), SCENARIOS)
def test_recorded_tools_start_then_speak_then_end(version: str, scenario: str) -> None:
    stage: dict[str, str] = {}
    for message in of_type(told(read_all(recorded(version, scenario))), "tool_start", "tool_output", "tool_end"):
        call = message["toolCallId"]
        assert stage.get(call) == (None if message["type"] == "tool_start" else "running")
        stage[call] = "done" if message["type"] == "tool_end" else "running"


@pytest.mark.parametrize(("version", "scenario"), [case for case in SCENARIOS if case[1] != "tool_bash_big"])
def test_recorded_output_adds_up_to_the_result(version: str, scenario: str) -> None:
    results = {
        event["toolCallId"]: oppi.block_text(event["result"]["content"])
        for event in parsed(version, scenario)
        if event["type"] == "tool_execution_end"
    }
    shown = dict.fromkeys(results, "")
    for message in of_type(told(read_all(recorded(version, scenario))), "tool_output"):
        if message["toolCallId"] in shown and not message["output"].startswith("data:"):
            shown[message["toolCallId"]] += message["output"]
    assert shown == results


@pytest.mark.parametrize("version", VERSIONS)
def test_failed_tools_are_marked_for_both_apps(version: str) -> None:
    messages = told(read_all(recorded(version, "tool_bash_fail")))
    flags = [m for m in of_type(messages, "tool_output", "tool_end") if m.get("isError")]
    assert [m["type"] for m in flags] == ["tool_output", "tool_end"]
    assert flags[0]["output"] == ""


@pytest.mark.parametrize("version", VERSIONS)
def test_a_window_that_slides_over_long_output_repeats_no_line(version: str) -> None:
    output = "".join(m["output"] for m in of_type(told(read_all(recorded(version, "tool_bash_big"))), "tool_output"))
    output = re.sub(r"\d*\n\[…\]", "", output)  # the line that was cut when the window jumped
    numbers = [line for line in output.split("\n") if re.fullmatch(r"\d+", line)]
    assert len(numbers) > 1900
    assert numbers == sorted(set(numbers), key=int)


@few
@given(st.integers(1, 20), st.lists(st.integers(0, 9), min_size=1, max_size=12))
def test_output_through_a_sliding_window_is_whole_or_marked(window: int, steps: list[int]) -> None:
    translator, shown, total, seen, gaps = oppi.Translator(), "", 0, set(), 0
    for step in steps:
        first, before, total = max(0, total + step - window), total, total + step
        gaps += 0 < before <= first and step > 0
        seen |= set(range(first, total))
        for message in translator.messages(update("".join(f"line {number}\n" for number in range(first, total)))):
            shown += message["output"]
    lines = [line for line in shown.split("\n") if line]
    assert [line for line in lines if line != "[…]"] == [f"line {number}" for number in sorted(seen)]
    assert lines.count("[…]") == gaps


def test_output_of_equal_lines_may_slide_too() -> None:
    outputs = of_type(events(update("a\na\nb\n"), update("a\nb\nc\n"), update("c\nc\n")), "tool_output")
    assert "".join(m["output"] for m in outputs) == "a\na\nb\nc\nc\n"
    assert [m["output"] for m in of_type(events(update("old"), update("new")), "tool_output")] == ["old", "\n[…]\nnew"]


def test_parallel_tools_do_not_mix() -> None:
    messages = events(
        update("a1", "a"), update("b1", "b"), update("a1a2", "a"), outcome("b1b2", "b"), outcome("a1a2", "a")
    )
    outputs = [(m["toolCallId"], m["output"]) for m in of_type(messages, "tool_output")]
    assert outputs == [("a", "a1"), ("b", "b1"), ("a", "a2"), ("b", "b2")]


def test_a_call_id_that_is_used_again_starts_afresh() -> None:
    outputs = of_type(events(update("x"), outcome("x"), update("x"), outcome("x")), "tool_output")
    assert [m["output"] for m in outputs] == ["x", "x"]


def test_media_are_sent_once() -> None:
    partial = {**update("t"), "partialResult": {"content": [*text("t"), IMAGE]}}
    sound = {"type": "audio", "data": "BBBB"}
    end = {**outcome("t"), "result": {"content": [*text("t"), IMAGE, sound, {"type": "image"}]}}
    outputs = [m["output"] for m in of_type(events(partial, partial, end), "tool_output")]
    assert outputs == ["t", "data:image/jpeg;base64,AAAA", "data:audio/wav;base64,BBBB"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_recorded_image_reaches_the_phone_whole(version: str) -> None:
    outputs = of_type(told(read_all(recorded(version, "tool_read_image"))), "tool_output")
    (image,) = [m["output"] for m in outputs if m["output"].startswith("data:")]
    sent = [b["data"] for e in parsed(version, "tool_read_image") if e["type"] == "tool_execution_end"
            for b in e["result"]["content"] if b["type"] == "image"]  # fmt: skip
    assert image == f"data:image/png;base64,{sent[0]}"


def test_no_frame_is_too_big_for_a_phone() -> None:
    big = {
        **outcome("x" * 3_000_000),
        "result": {"content": [*text("x" * 3_000_000), {**IMAGE, "data": "A" * 2_000_000}]},
    }
    outputs = of_type(events(big), "tool_output")
    assert max(len(m["output"]) for m in outputs) <= 512 * 1024
    assert "".join(m["output"] for m in outputs) == "x" * 3_000_000 + "data:image/jpeg;base64," + "A" * 2_000_000


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "\x1b[31mred\x1b[0m"), ("\x1b[2Kx", "x"), ("\x1b]0;title\x07x", "x"),
        ("\x1b[?25lx", "x"), ("\x1bMx", "x"), ("plain", "plain"),
    ],
)  # fmt: skip
def test_only_colours_remain_of_escape_sequences(raw: str, shown: str) -> None:
    assert [m["output"] for m in of_type(events(outcome(raw)), "tool_output")] == [shown]


def test_an_escape_sequence_that_is_cut_repeats_nothing() -> None:
    for whole, shown in (("abc\x1b[2Kdef", "abcdef"), ("abc\x1b[31mdef", "abc\x1b[31mdef"), ("a\x1b]0;t\x07b", "ab")):
        updates = [update(whole[:end]) for end in range(1, len(whole) + 1)]
        assert "".join(m["output"] for m in of_type(events(*updates), "tool_output")) == shown


def test_details_reach_the_phone_without_a_copy_of_the_text() -> None:
    details = {"diff": "+1 a", "truncation": {"content": "x" * 50_000, "truncated": True}}
    end = {**outcome("x"), "result": {"content": text("x"), "details": details}}
    assert events(end)[-1]["details"] == {"diff": "+1 a", "truncation": {"truncated": True}}
    for useless in (None, {}, "x", {"huge": "x" * 2**20}):
        end["result"] = {"content": [], "details": useless}
        assert "details" not in events(end)[-1]


@many
@given(st.text(alphabet="aé😀\U0001f5a5", max_size=12), st.lists(st.integers(0, 40), max_size=8))
def test_characters_that_were_cut_in_two_are_joined(given_text: str, cuts: list[int]) -> None:
    units = given_text.encode("utf-16-le")
    edges = sorted({0, len(units), *(2 * cut % (len(units) + 2) for cut in cuts)})
    parts = [units[a:b].decode("utf-16-le", "surrogatepass") for a, b in zip(edges, edges[1:])]
    translator = oppi.Translator()
    shown = [translator.delta(oppi.Delta("text", 0, part)) for part in parts]
    assert "".join(shown) == given_text
    assert all(part.encode() is not None for part in shown)


def test_a_half_character_waits_only_for_its_own_kind_and_message() -> None:
    translator = oppi.Translator()
    assert translator.delta(oppi.Delta("text", 0, "a\ud83d")) == "a"
    assert translator.delta(oppi.Delta("thinking", 1, "t")) == "t"
    assert translator.delta(oppi.Delta("text", 0, "\ude00")) == "😀"
    assert translator.delta(oppi.Delta("text", 0, "\ud83d")) == ""
    translator.messages({"type": "message_start"})
    assert translator.delta(oppi.Delta("text", 0, "b")) == "b"


# dialogs


def dialog(method: str, **more: Any) -> dict[str, Any]:
    return {"type": "extension_ui_request", "id": "u1", "method": method, **more}


DIALOGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (dialog("select", title="Pick", options=["a", {"label": "b"}, {}]),
     {"type": "extension_ui_request", "id": "u1", "method": "select", "title": "Pick", "options": ["a", "b", ""]}),
    (dialog("confirm", title="Sure?", message="really", timeout=30_500),
     {"type": "extension_ui_request", "id": "u1", "method": "confirm", "title": "Sure?", "message": "really",
      "timeout": 30}),
    (dialog("input", placeholder="p", timeout=300),
     {"type": "extension_ui_request", "id": "u1", "method": "input", "placeholder": "p", "timeout": 1}),
    (dialog("input", timeout=float("inf")),
     {"type": "extension_ui_request", "id": "u1", "method": "input", "timeout": 1}),
    (dialog("editor", prefill="x\ny", title=5),
     {"type": "extension_ui_request", "id": "u1", "method": "editor", "prefill": "x\ny"}),
    (dialog("notify", message="hi", notifyType="warning"),
     {"type": "extension_ui_notification", "method": "notify", "message": "hi", "notifyType": "warning"}),
    (dialog("setStatus", statusKey="k"),
     {"type": "extension_ui_notification", "method": "setStatus", "statusKey": "k"}),
    (dialog("setWidget", widgetKey="k"), {"type": "extension_ui_notification", "method": "setWidget"}),
    (dialog("setTitle", title="t"), {"type": "extension_ui_notification", "method": "setTitle"}),
    (dialog("set_editor_text", text="t"), {"type": "extension_ui_notification", "method": "set_editor_text"}),
]  # fmt: skip


@pytest.mark.parametrize(("event", "message"), DIALOGS)
def test_dialogs_of_extensions(event: dict[str, Any], message: dict[str, Any]) -> None:
    assert events(event) == [message]


@pytest.mark.parametrize("version", VERSIONS)
def test_recorded_dialogs_need_an_answer_or_do_not(version: str) -> None:
    messages = told(read_all(recorded(version, "ext_ui")))
    assert {m["method"] for m in of_type(messages, "extension_ui_request")} == {"select", "confirm", "input", "editor"}
    assert all(isinstance(m["id"], str) and m["id"] for m in of_type(messages, "extension_ui_request"))


# dialects


@pytest.mark.parametrize(
    ("kind", "for_10"),
    [
        ("text_delta", "text_delta"), ("command_result", "rpc_result"), ("queue_state", None), ("git_status", None),
        ("queue_item_started", None), ("session_deleted", None), ("stream_connected", None),
        ("tool_output", "tool_output"),
    ],
)  # fmt: skip
def test_each_app_gets_its_own_spelling(kind: str, for_10: str | None) -> None:
    message = {"type": kind, "x": 1}
    assert oppi.render(message, "1.1") == message
    assert oppi.render(message, "1.0") == (for_10 and {"type": for_10, "x": 1})
    assert message["type"] == kind


def test_durable_and_notification_messages_are_those_of_the_wire() -> None:
    durable = "agent_start agent_end message_end tool_start tool_end stop_requested stop_confirmed stop_failed"
    assert frozenset(f"{durable} session_ended session_deleted error".split()) == oppi.DURABLE
    assert {"state", "permission_request", "permission_expired", "permission_cancelled", "error"} <= oppi.NOTIFY
    assert not {"message_end", "tool_start", "tool_end", "text_delta", "tool_output"} & oppi.NOTIFY


def test_what_does_not_fit_a_frame_is_cut_and_says_so() -> None:
    long = "x" * 2_000_000
    end = of_type(events({"type": "message_end", "message": {"role": "user", "content": long}}), "message_end")[0]
    assert len(oppi.encode(end)) < 1_000_000 and "more characters" in end["content"]
    args = {"path": "a", "content": long, "edits": [{"oldText": long}], "n": 7}
    start = of_type(events({"type": "tool_execution_start", "toolName": "write", "args": args}), "tool_start")[0]
    assert len(oppi.encode(start)) < 1_000_000 and "2000000 characters in all" in start["args"]["content"]
    assert (start["args"]["path"], start["args"]["n"]) == ("a", 7)


@pytest.mark.parametrize("name", ["errorMessage", "finalError", "thinking", "summary"])
def test_no_text_of_pi_is_too_long_for_a_frame(name: str) -> None:
    long = "x" * 2_000_000
    answer = assistant({"type": "thinking", "thinking": long}, stopReason="error", errorMessage=long)
    ends = [{"type": kind, name: long, "result": {"summary": long}} for kind in ("compaction_end", "auto_retry_end")]
    for message in [m for event in (answer, *ends, {"type": "auto_retry_start", name: long}) for m in events(event)]:
        assert len(oppi.encode(message)) < 1_000_000


def test_the_rest_of_a_long_line_is_known_to_be_skipped() -> None:
    reader = oppi.PiReader()
    front = b'{"type":"message_update","assistantMessageEvent":{"type":"text_delta","contentIndex":0,"delta":"x","partial":"'
    chunk = front + b"y" * 4000
    assert reader.feed(chunk, len(chunk)) == [] and reader.skipping
    rest = b'z"}}\n'
    assert reader.feed(rest, len(rest)) == [oppi.Delta("text", 0, "x")] and not reader.skipping


@pytest.mark.parametrize("version", ["0.73", "0.87"])
def test_a_call_can_be_seen_while_it_is_written(version: str) -> None:
    translator, shown = oppi.Translator(), []
    for item in read_all(recorded(version, "tool_write")):
        if isinstance(item, oppi.Delta):
            translator.delta(item)
            shown += translator.preview(item.block) if item.kind == "toolcall" else []
        else:
            translator.messages(item)
    assert len(shown) > 1 and all(m["tool"] == "write" and m["toolCallId"] and m["preview"] for m in shown)
    texts = [m["args"].get("content", "") for m in shown]
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:])) and texts[-1]
    assert oppi.render(shown[0], "1.0") is None and oppi.render(shown[0], "1.1") == shown[0]


def test_a_call_without_a_name_is_not_shown() -> None:
    translator = oppi.Translator()
    update = {"type": "toolcall_start", "contentIndex": 3, "partial": {"content": []}}
    assert translator.messages({"type": "message_update", "assistantMessageEvent": update}) == []
    assert translator.messages({"type": "message_update", "assistantMessageEvent": {"type": "toolcall_end"}}) == []
    translator.delta(oppi.Delta("toolcall", 3, "{}"))
    assert translator.preview(3) == []
