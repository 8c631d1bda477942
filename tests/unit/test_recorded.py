"""Everything pi was recorded saying, told again: what a phone gets is what the table of the stream spec (6.1) demands.

The table stands here a second time, as a plain function of whole events, and is compared with what the fast reader and
the translator make of the bytes.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

import oppi
from tests.support.phone import Decoder

from .support import SCENARIOS, read_all, recorded

Message = dict[str, Any]
GOES_ON = {"auto_retry_start", "compaction_start"}  # what says after an agent_end that the turn is not over
NOTES = {"notify", "setStatus", "setWidget", "setTitle", "set_editor_text"}
DELTAS = {"text_delta", "thinking_delta"}
ALLOWED = {"tool_start": {"callSegments"}, "tool_end": {"resultSegments"}}  # may be added, for app 1.1 only
FRAME = 1 << 20  # bytes a phone takes at once

every = pytest.mark.parametrize(("version", "scenario"), SCENARIOS)


@functools.cache
def events_of(version: str, scenario: str) -> list[Message]:
    return [json.loads(line) for line in recorded(version, scenario).split(b"\n") if line]


def over(event: Message, following: Message | None) -> bool:
    """Whether the turn is over after this event, and what went wrong in it is final."""
    kind = event["type"]
    if kind == "agent_end" and "willRetry" not in event:  # the older pi does not say so itself
        return (following or {}).get("type") not in GOES_ON
    failed = kind == "auto_retry_end" and not event["success"]
    return kind == "agent_settled" or failed or (kind == "compaction_end" and not event["willRetry"])


def replayed(version: str, scenario: str) -> Iterator[Message]:
    """What oppi tells a phone about a recording, tool calls that are still being written included."""
    translator, items = oppi.Translator(), read_all(recorded(version, scenario))
    idle = ("nothing", "message_update", "response")
    plain = [item for item in items if isinstance(item, dict) and item["type"] not in idle]
    following = {id(event): after for event, after in zip(plain, plain[1:])}
    for item in items:
        if isinstance(item, oppi.Delta):
            text = translator.delta(item)
            if item.kind != "toolcall":
                yield {"type": f"{item.kind}_delta", "delta": text}
            else:
                yield from translator.preview(item.block)
            continue
        yield from translator.messages(item)
        if over(item, following.get(id(item))):
            yield from translator.final_failure()


@functools.cache
def told(version: str, scenario: str) -> list[Message]:
    return list(replayed(version, scenario))


def joined(messages: list[Message]) -> list[Message]:
    """Adjacent deltas of one kind as one, tool output left out, for how either is cut is nobody's business."""
    found: list[Message] = []
    for message in messages:
        if message["type"] in DELTAS and found and found[-1]["type"] == message["type"]:
            found[-1] = {**message, "delta": found[-1]["delta"] + message["delta"]}
        elif message["type"] != "tool_output" and not message.get("preview"):
            found.append(message)
    halves = [m for m in found if m["type"] in DELTAS]
    for message in halves:  # a character that pi cut in two
        message["delta"] = message["delta"].encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    return [message for message in found if message.get("delta") != ""]


def text_of(content: Any) -> str:
    return content if isinstance(content, str) else "".join(b.get("text", "") for b in content if b["type"] == "text")


class Table:
    """The table of 6.1, on events that were parsed whole."""

    def __init__(self, version: str, scenario: str) -> None:
        self.thought, self.failure = False, ""
        self.messages: list[Message] = []
        events = events_of(version, scenario)
        plain = [event for event in events if event["type"] not in ("message_update", "response")]
        following = {id(event): after for event, after in zip(plain, plain[1:])}
        for event in events:
            self.messages += self.of(event)
            if over(event, following.get(id(event))) and self.failure:
                self.messages.append({"type": "error", "error": self.failure})
                self.failure = ""

    def of(self, event: Message) -> list[Message]:
        row = getattr(self, event["type"], None)
        return row(event) if row else []

    def message_start(self, event: Message) -> list[Message]:
        self.thought = False
        return []

    def message_update(self, event: Message) -> list[Message]:
        update = event["assistantMessageEvent"]
        self.thought |= update["type"] == "thinking_delta"
        return [{"type": update["type"], "delta": update["delta"]}] if update["type"] in DELTAS else []

    def message_end(self, event: Message) -> list[Message]:
        message, state = event["message"], {"type": "state"}
        if message["role"] not in ("user", "assistant"):
            return [state]
        end = {"type": "message_end", "role": message["role"], "content": text_of(message["content"])}
        if message["role"] == "user":
            return [end, state]
        thoughts = [b["thinking"] for b in message["content"] if b["type"] == "thinking" and not self.thought]
        if message["stopReason"] == "error":
            self.failure = message["errorMessage"]
        return [*({"type": "thinking_delta", "delta": text} for text in thoughts), end, state]

    def tool_execution_start(self, event: Message) -> list[Message]:
        call = {"toolCallId": event["toolCallId"], "args": event["args"]}
        return [{"type": "tool_start", "tool": event["toolName"], **call}, {"type": "state"}]

    def tool_execution_end(self, event: Message) -> list[Message]:
        end = {"type": "tool_end", "tool": event["toolName"], "toolCallId": event["toolCallId"]}
        details = dict(event["result"].get("details") or {})
        if isinstance(details.get("truncation"), dict):  # the whole text once more
            details["truncation"] = {k: v for k, v in details["truncation"].items() if k != "content"}
        if event["isError"]:
            end["isError"] = True
        return [{**end, "details": details} if details else end]

    def compaction_start(self, event: Message) -> list[Message]:
        return [{"type": "compaction_start", "reason": event["reason"]}]

    def compaction_end(self, event: Message) -> list[Message]:
        end = {"type": "compaction_end", "aborted": event["aborted"], "willRetry": event["willRetry"]}
        result = event.get("result") or {}
        end.update({key: result[key] for key in ("summary", "tokensBefore") if key in result})
        self.failure = "" if event["willRetry"] else self.failure
        wrong = event.get("errorMessage") if event["reason"] != "manual" else None  # else the command's result says it
        return [end, {"type": "error", "error": wrong}] if wrong else [end]

    def auto_retry_start(self, event: Message) -> list[Message]:
        self.failure = ""
        return [{"type": "retry_start", **{k: event[k] for k in ("attempt", "maxAttempts", "delayMs", "errorMessage")}}]

    def auto_retry_end(self, event: Message) -> list[Message]:
        return [{"type": "retry_end", **{k: event[k] for k in ("success", "attempt", "finalError") if k in event}}]

    def extension_ui_request(self, event: Message) -> list[Message]:
        if event["method"] in NOTES:
            said = ("method", "message", "notifyType", "statusKey", "statusText")
            return [{"type": "extension_ui_notification", **{key: event[key] for key in said if key in event}}]
        keys = ("id", "method", "title", "options", "message", "placeholder", "prefill")
        found = {"type": "extension_ui_request", **{key: event[key] for key in keys if key in event}}
        return [{**found, "timeout": max(1, event["timeout"] // 1000)} if "timeout" in event else found]


def bare(messages: list[Message]) -> list[Message]:
    """Without what may be added to a message beyond the table."""
    return [{k: v for k, v in m.items() if k not in ALLOWED.get(m["type"], ())} for m in messages]


@every
def test_a_phone_is_told_what_the_table_demands_in_its_order(version: str, scenario: str) -> None:
    assert bare(joined(told(version, scenario))) == joined(Table(version, scenario).messages)


@every
def test_what_streamed_is_what_the_finished_message_says(version: str, scenario: str) -> None:
    """Both apps replace the streamed text by that of the end, but keep the thinking as it streamed."""
    plain = [e for e in events_of(version, scenario) if e["type"] in ("message_start", "message_end")]
    messages = [e for e in plain if e["message"]["role"] == "assistant"]
    ends = [e["message"] for e in messages if e["type"] == "message_end"]
    cut = sum(e["type"] == "message_start" for e in messages) > len(ends)  # the older pi drops one for a new session
    said, thought = "", ""
    for message in told(version, scenario):
        if message["type"] == "text_delta":
            said += message["delta"]
        elif message["type"] == "thinking_delta":
            thought += message["delta"]
        elif message["type"] == "message_end" and message["role"] == "assistant":
            whole = ends.pop(0)
            assert said == message["content"] == text_of(whole["content"])
            assert thought == "".join(b["thinking"] for b in whole["content"] if b["type"] == "thinking")
            said, thought = "", ""
    assert ends == [] and (cut or said == thought == "")


def plain_text(content: list[Message]) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Zac-ln-z]", "", text_of(content))


@every
def test_the_output_of_each_tool_is_whole_and_comes_before_its_end(version: str, scenario: str) -> None:
    results, slid = {}, set()
    texts: dict[str, str] = {}
    for event in events_of(version, scenario):
        call = event.get("toolCallId", "")
        content = (event.get("partialResult") or event.get("result") or {}).get("content")
        if event["type"] in ("tool_execution_update", "tool_execution_end") and content is not None:
            text = plain_text(content)
            slid |= set() if text.startswith(texts.get(call, "")) else {call}
            texts[call] = text
        if event["type"] == "tool_execution_end":
            pictures = [b for b in content or [] if b["type"] == "image"]
            media = [f"data:{b['mimeType']};base64,{b['data']}" for b in pictures]
            results[call] = (text, media, event["isError"])
    running: dict[str, list[Message]] = {}
    for message in told(version, scenario):
        call = message.get("toolCallId", "")
        if message["type"] == "tool_start" and not message.get("preview"):
            assert call not in running
            running[call] = []
        elif message["type"] == "tool_output":
            running[call].append(message)
        elif message["type"] == "tool_end":
            outputs, (text, media, failed) = running.pop(call), results.pop(call)
            shown, seen = "", []
            for output in outputs:
                if output["output"].startswith("data:"):
                    seen.append(output["output"])
                else:
                    shown = output["output"] if output.get("mode") == "replace" else shown + output["output"]
            assert shown.endswith(text) if call in slid else shown == text
            assert seen == media, "a picture is sent once"
            flagged = [output for output in outputs if output.get("isError")]
            assert [output["output"] for output in flagged] == [""] * failed, "app 1.0 learns of a failure only so"
            assert not failed or outputs[-1] is flagged[0]
    assert results == {}


@every
def test_a_call_is_shown_while_it_is_written_to_app_11_only(version: str, scenario: str) -> None:
    calls = {e["toolCallId"]: e for e in events_of(version, scenario) if e["type"] == "tool_execution_start"}
    begun: set[str] = set()
    for message in told(version, scenario):
        if not message.get("preview"):
            begun |= {message["toolCallId"]} if message["type"] == "tool_start" else set()
            continue
        assert oppi.render(message, "1.0") is None, "it would show every step as another tool"
        assert message["type"] == "tool_start" and message["toolCallId"] not in begun
        final = calls.get(message["toolCallId"])
        if final:  # an abort may come before
            assert message["tool"] == final["toolName"]
            for name, value in message["args"].items():
                told_all = final["args"].get(name)
                assert told_all.startswith(value) if isinstance(value, str) else type(value) is type(told_all)


@every
@pytest.mark.parametrize("dialect", ["1.0", "1.1"])
def test_both_apps_can_decode_all_of_it(version: str, scenario: str, dialect: str) -> None:
    decoder = Decoder(dialect)
    session = oppi.session_wire({"id": "s1", "status": "busy", "workspaceId": "w1"})
    kinds = {"1.0": [], "1.1": []}  # type: dict[str, list[str]]
    for message in told(version, scenario):
        for app, found in kinds.items():
            rendered = oppi.render(message, app)
            if rendered is not None and not rendered.get("preview"):
                found.append(rendered["type"])
        frame = oppi.render(message, dialect)
        if frame is None:
            continue
        whole = {**frame, "sessionId": "s1", **({"session": session} if frame["type"] == "state" else {})}
        assert decoder.message(whole), f"app {dialect} has no decoder for {frame['type']}"
        assert len(oppi.encode(whole)) < FRAME
        if dialect == "1.0":
            assert not {"mode", "truncated"} & set(frame), "this app would append what is to replace"
    assert kinds["1.0"] == kinds["1.1"], "both are told the same"
