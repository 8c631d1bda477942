#!/usr/bin/env python3
"""A scripted `pi --mode rpc`: the protocol of pi 0.73 or 0.87 without a model, for load and fault tests.

Which dialect is spoken is chosen by the environment variable FAKE_PI_DIALECT (0.73 or 0.87, default 0.87).  Every
line of a prompt that begins with one of these directives is obeyed; without any the answer is `ok: <prompt>`.

    !text N                stream N short words          !say TEXT              stream TEXT in pieces
    !think [N]             stream N words of thinking    !chunk N               characters per piece (default 24)
    !slow MS               wait before every delta       !wait MS               wait once
    !usage IN OUT          token counts to report        !error TEXT            end the answer with a provider error
    !tool NAME {json}      call a tool (it runs nothing) !toolwait MS           every tool takes that long
    !ungated NAME {json}   call a tool WITHOUT asking    !toollines N           lines of output of every tool
    !stream N BYTES RATE   N deltas of BYTES at RATE/s   !timestamp             deltas of !stream carry the clock
    !dialog METHOD [MS]    an extension dialog, then say the answer; the fire-and-forget methods work too
    !large BYTES           the texts of the dialogs to come are so long
    !crash CODE            exit at once                  !garbage               a line that is not JSON
    !bigline BYTES         one huge line                 !badutf8               a delta that is not UTF-8
    !halfline              half a line, then exit 1      !hang [hard]           answer nothing more; hard: nor end
    !orphan SECONDS        start a child that outlives a careless server

A run of `!tool` lines ends a round; the next round is played when the tools are done, past the last one the answer
is `done`.  RATE 0 is as fast as possible.  Further environment: FAKE_PI_NO_GATE=1 behaves as if the gate extension
did not load, FAKE_PI_START_DELAY=seconds delays the first line, FAKE_PI_LOG=file records stdin for the test,
FAKE_PI_STARTS=file gets a line with the name of the session folder from each process that is to serve.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
import uuid
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Callable

# ---- the gate's protocol: adapt here ---------------------------------------------------------------------------------
GATE_MARK = "oppi-gate"  # in the name or the text of the -e file that is the gate
GATE_TITLE = "oppi-gate"  # title of every dialog the gate opens
GATE_HELLO: dict[str, Any] = {"hello": 1}  # placeholder of the dialog that proves it is loaded
GATE_ALLOW = "allow"  # the one verdict that lets a tool run
GATE_DEFAULT_REASON = "Blocked: the gate got no valid verdict"


def gate_question(tool: str, call_id: str, arguments: Any) -> dict[str, Any]:
    """What the gate asks before a tool runs."""
    return {"tool": tool, "toolCallId": call_id, "input": arguments}


def gate_reason(value: Any, call_id: str) -> str | None:
    """None if this answer lets the call run, else the reason to block it."""
    try:
        verdict = json.loads(value)
    except (TypeError, ValueError):
        return GATE_DEFAULT_REASON
    if not isinstance(verdict, dict):
        return GATE_DEFAULT_REASON
    if verdict.get("verdict") == GATE_ALLOW and verdict.get("toolCallId") == call_id:
        return None
    return str(verdict.get("reason") or GATE_DEFAULT_REASON)


# ---- fixed data ------------------------------------------------------------------------------------------------------
DIALECT = os.environ.get("FAKE_PI_DIALECT", "0.87")
NEW = DIALECT == "0.87"
VERSION = {"0.73": "0.73.1", "0.87": "0.87.1"}[DIALECT]
PROVIDERS = {"mock", "anthropic", "openai", "openai-codex", "openrouter", "google"}
LEVELS = ["off", "minimal", "low", "medium", "high"]
DIRECTIVES = {
    *("!text", "!say", "!think", "!chunk", "!slow", "!wait", "!usage", "!error", "!tool", "!toolwait", "!ungated"),
    *("!toollines", "!stream", "!timestamp", "!dialog", "!crash", "!garbage", "!bigline", "!badutf8", "!halfline"),
    *("!hang", "!orphan", "!large"),
}
NO_DIALOG = {"notify", "setStatus", "setWidget", "setTitle", "set_editor_text"}
DIALOGS: dict[str, dict[str, Any]] = {
    "select": {"title": "Pick one", "options": ["red", "green"]},
    "confirm": {"title": "Sure?", "message": "really?"},
    "input": {"title": "Name?", "placeholder": "type here"},
    "editor": {"title": "Edit", "prefill": "line1\nline2"},
    "notify": {"message": "hello", "notifyType": "warning"},
    "setStatus": {"statusKey": "fake", "statusText": "working"},
    "setWidget": {"widgetKey": "fake", "widgetLines": ["line 1", "line 2"]},
    "setTitle": {"title": "fake title"},
    "set_editor_text": {"text": "prefilled"},
}
FLAGS_WITH_VALUE = {
    *("--mode", "--provider", "--model", "--models", "--thinking", "--session", "--fork", "--session-dir", "--skill"),
    *("--extension", "-e", "--prompt-template", "--theme", "--tools", "-t", "--system-prompt", "--api-key"),
    "--append-system-prompt",
}
FLAGS_ALONE = {
    *("--version", "-v", "--help", "-h", "--continue", "-c", "--no-session", "--no-extensions", "-ne", "--no-skills"),
    *("-ns", "--no-prompt-templates", "-np", "--no-themes", "--no-context-files", "-nc", "--no-tools", "-nt"),
    *("--no-builtin-tools", "-nbt", "--offline", "--list-models", "--verbose", "--print", "-p"),
}
if NEW:
    FLAGS_WITH_VALUE |= {"--session-id", "--name", "-n", "--exclude-tools", "-xt"}
    FLAGS_ALONE |= {"--approve", "-a", "--no-approve", "-na"}


def model_object(model_id: str, name: str, *, provider: str = "mock", rich: bool = False, window: int = 128000) -> Any:
    """A model as pi describes it, keys in pi's order."""
    rates = (3, 15, 0.3, 3.75) if rich else (0, 0, 0, 0)
    return {
        "id": model_id,
        "name": name,
        "api": "openai-completions",
        "provider": provider,
        "baseUrl": "http://127.0.0.1:9/v1",
        "reasoning": rich,
        "input": ["text", "image"] if rich else ["text"],
        "cost": dict(zip(("input", "output", "cacheRead", "cacheWrite"), rates)),
        "contextWindow": window,
        "maxTokens": 32000 if rich else 16384,
        "compat": {"supportsDeveloperRole": False, "supportsReasoningEffort": False},
    }


MODELS = [
    model_object("mock-1", "Mock One", rich=True, window=200000),
    model_object("mock-2", "Mock Two"),
    model_object("mock-tiny", "Mock Tiny", window=8000),
]
SYSTEM_MESSAGE = {"role": "system", "content": "", "sections": {"preamble": "You are an expert coding assistant."}}


def compact(value: Any) -> str:
    """JSON exactly as JSON.stringify writes it: no spaces, non-ASCII raw, lone surrogates escaped."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match.group()):04x}", text)


def now_ms() -> int:
    return int(time.time() * 1000)


def iso_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def fail(message: str) -> None:
    """End the way pi ends on a fatal start-up error."""
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


# ---- output ----------------------------------------------------------------------------------------------------------


class Output:
    """stdout: whole lines, one writer at a time, gone if the reader is gone."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.muted = False

    def raw(self, data: bytes) -> None:
        with self.lock:
            view = memoryview(data)
            try:
                while view:
                    view = view[os.write(1, view) :]
            except OSError:
                os._exit(0)

    def line(self, value: Any) -> None:
        if self.muted:
            return
        self.raw(compact(value).encode("utf-8") + b"\n")

    def event(self, kind: str, **fields: Any) -> None:
        self.line({"type": kind, **fields})


# ---- session file ----------------------------------------------------------------------------------------------------


class Session:
    """One session file; nothing is on disk before the first complete answer."""

    def __init__(self, path: Path | None, session_id: str, cwd: str, parent: str | None = None) -> None:
        self.path, self.id, self.cwd = path, session_id, cwd
        header: dict[str, Any] = {"type": "session", "version": 3, "id": session_id, "timestamp": iso_now(), "cwd": cwd}
        self.lines: list[dict[str, Any]] = [{**header, "parentSession": parent} if parent else header]
        self.saved = 0
        self.leaf: str | None = None
        self.name: str | None = None

    @classmethod
    def load(cls, path: Path) -> Session:
        """Continue a file; a broken last line is dealt with as the dialect does."""
        data = path.read_bytes()
        found = []
        for line in data.split(b"\n"):
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        if not found or found[0].get("type") != "session":
            if NEW and data.strip():
                fail("Error: Session file is not a valid pi session")
            return cls(path, new_session_id(), os.getcwd())
        if not os.path.isdir(found[0]["cwd"]):
            fail(f"Stored session working directory does not exist: {found[0]['cwd']}")
        session = cls(path, found[0]["id"], found[0]["cwd"])
        session.lines, session.saved = found, len(found)
        session.leaf = found[-1].get("id") if len(found) > 1 else None
        for entry in found:
            session.name = entry.get("name") if entry["type"] == "session_info" else session.name
        if NEW and not data.endswith(b"\n"):
            with path.open("ab") as file:
                file.write(b"\n")
        return session

    def add(self, kind: str, **fields: Any) -> str:
        """Append an entry, write it if the file exists or now may exist; returns its id."""
        entry_id = uuid.uuid4().hex[:8]
        self.lines.append({"type": kind, "id": entry_id, "parentId": self.leaf, "timestamp": iso_now(), **fields})
        self.leaf = entry_id
        self.save()
        return entry_id

    def save(self) -> None:
        if self.path is None or not any(is_answer(entry) for entry in self.lines):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            for entry in self.lines[self.saved :]:
                file.write(compact(entry).encode("utf-8") + b"\n")
        self.saved = len(self.lines)

    def branch(self) -> list[dict[str, Any]]:
        """The entries from the root to the leaf."""
        by_id = {entry["id"]: entry for entry in self.lines[1:]}
        path: list[dict[str, Any]] = []
        step = self.leaf
        while step in by_id and len(path) <= len(by_id):
            path.insert(0, by_id[step])
            step = by_id[step].get("parentId")
        return path

    def messages(self) -> list[dict[str, Any]]:
        return [entry["message"] for entry in self.branch() if entry["type"] == "message"]

    def user_entries(self) -> list[dict[str, Any]]:
        return [entry for entry in self.lines if entry.get("message", {}).get("role") == "user"]


def is_answer(entry: dict[str, Any]) -> bool:
    return bool(entry["type"] == "message" and entry["message"]["role"] == "assistant")


def new_session_id() -> str:
    """A UUID of version 7, which sorts by time as pi's do."""
    value = (now_ms() << 80) | (uuid.uuid4().int & ((1 << 80) - 1))
    value = (value & ~(0xF << 76)) | (7 << 76)
    return str(uuid.UUID(int=(value & ~(3 << 62)) | (2 << 62)))


def text_of(message: dict[str, Any]) -> str:
    content = message.get("content", "")
    if isinstance(content, str):
        return content
    return "\n".join(block.get("text", "") for block in content if block.get("type") == "text")


# ---- scripts ---------------------------------------------------------------------------------------------------------


def rounds_of(prompt: str) -> list[list[Any]]:
    """The directives of a prompt, as rounds of (name, argument); a run of tool lines ends a round."""
    rounds: list[list[Any]] = []
    after_tool = False
    for line in prompt.split("\n"):
        name, _, argument = line.strip().partition(" ")
        if name not in DIRECTIVES:
            continue
        is_tool = name in ("!tool", "!ungated")
        if not rounds or (after_tool and not is_tool):
            rounds.append([])
        after_tool = is_tool
        rounds[-1].append((name, argument.strip()))
    return rounds or [[("!say", "ok: " + prompt[:80].replace("\n", " "))]]


class Aborted(Exception):
    """The phone asked to stop the turn."""


class ProviderError(Exception):
    """The script asked for an answer that fails."""


class Answer:
    """One assistant message while it streams."""

    def __init__(self, agent: Agent, steps: list[Any]) -> None:
        self.agent, self.out, self.steps = agent, agent.out, steps
        self.blocks: list[dict[str, Any]] = []
        self.raw_arguments: dict[int, str] = {}
        self.gated: dict[str, bool] = {}
        self.chunk, self.delay, self.stamped, self.large = 24, 0.0, False, 0
        self.timestamp = now_ms()
        self.tokens: tuple[int, int] | None = None
        self.count = 0

    # message and event shapes

    def usage(self, *, final: bool) -> dict[str, Any]:
        counts = (self.tokens or (1400, self.count)) if final else (0, 0)
        cost = {"input": counts[0] * 3e-6, "output": counts[1] * 1.5e-5, "cacheRead": 0, "cacheWrite": 0}
        cost["total"] = cost["input"] + cost["output"]
        usage: dict[str, Any] = {"input": counts[0], "output": counts[1], "cacheRead": 0, "cacheWrite": 0}
        if final and NEW:
            usage["reasoning"] = 0
        return {**usage, "totalTokens": sum(counts), "cost": cost if final else dict.fromkeys(cost, 0)}

    def message(self, stop: str = "stop", *, final: bool = False, error: str | None = None) -> dict[str, Any]:
        model = self.agent.model
        result: dict[str, Any] = {"role": "assistant", "content": list(self.blocks), "api": model["api"]}
        result.update(provider=model["provider"], model=model["id"], usage=self.usage(final=final and not error))
        result.update(stopReason=stop, timestamp=self.timestamp)
        if self.count:
            result["responseId"] = "chatcmpl-fake"
        if error is not None:
            result["errorMessage"] = error
        elif final and NEW:
            result["rawStopReason"] = "tool_calls" if stop == "toolUse" else "stop"
        return result

    def update(self, event: dict[str, Any], *, final: bool = False) -> None:
        """A message_update in the exact key order of the dialect."""
        if NEW:
            self.out.line({"type": "message_update", "usage": self.usage(final=final), "assistantMessageEvent": event})
            return
        partial = {key: value for key, value in event.items() if key not in ("id", "toolName")}
        message = self.message(final=final)
        partial["partial"] = message
        self.out.line({"type": "message_update", "assistantMessageEvent": partial, "message": message})

    # playing

    def play(self) -> dict[str, Any]:
        """Stream the message; returns it finished."""
        self.out.event("message_start", message=self.message("pending" if NEW else "stop"))
        try:
            for name, argument in self.steps:
                self.agent.check_abort()
                getattr(self, "do_" + name[1:])(argument)
            self.close_blocks()
            tools = any(block["type"] == "toolCall" for block in self.blocks)
            done = self.message("toolUse" if tools else "stop", final=True)
        except Aborted:
            self.close_blocks(final=False)
            done = self.message("aborted", error="Request was aborted")
        except ProviderError as error:
            self.blocks = []
            done = self.message("error", error=str(error))
        self.out.event("message_end", message=done)
        return done

    def close_blocks(self, *, final: bool = True) -> None:
        """The *_end events come after all deltas of the message."""
        for index, block in enumerate(self.blocks):
            event: dict[str, Any] = {"type": block["type"].lower() + "_end", "contentIndex": index}
            if block["type"] == "toolCall":
                event["toolCall"] = block
            else:
                event["content"] = block[block["type"]]
            self.update(event, final=final)

    def block(self, kind: str) -> tuple[int, dict[str, Any]]:
        if not self.blocks or self.blocks[-1]["type"] != kind:
            self.blocks.append({"type": kind, kind: ""})
            self.update({"type": kind + "_start", "contentIndex": len(self.blocks) - 1})
        return len(self.blocks) - 1, self.blocks[-1]

    def delta(self, kind: str, text: str) -> None:
        self.agent.sleep(self.delay)
        index, block = self.block(kind)
        block[kind] += text
        self.count += 1
        self.update({"type": kind + "_delta", "contentIndex": index, "delta": text})

    def pieces(self, text: str) -> list[str]:
        return [text[i : i + self.chunk] for i in range(0, len(text), self.chunk)]

    def do_text(self, argument: str) -> None:
        for number in range(int(argument)):
            self.delta("text", f"w{number} ")

    def do_say(self, argument: str) -> None:
        for piece in self.pieces(argument):
            self.delta("text", piece)

    def do_think(self, argument: str) -> None:
        for number in range(int(argument or 20)):
            self.delta("thinking", f"t{number} ")

    def do_chunk(self, argument: str) -> None:
        self.chunk = int(argument)

    def do_slow(self, argument: str) -> None:
        self.delay = int(argument) / 1000

    def do_wait(self, argument: str) -> None:
        self.agent.sleep(int(argument) / 1000)

    def do_usage(self, argument: str) -> None:
        self.tokens = (int(argument.split()[0]), int(argument.split()[1]))

    def do_error(self, argument: str) -> None:
        raise ProviderError(argument or "529 Overloaded")

    def do_toolwait(self, argument: str) -> None:
        self.agent.tool_wait = int(argument) / 1000

    def do_toollines(self, argument: str) -> None:
        self.agent.tool_lines = int(argument)

    def do_ungated(self, argument: str) -> None:
        self.do_tool(argument, gated=False)

    def do_tool(self, argument: str, *, gated: bool = True) -> None:
        name, _, source = argument.partition(" ")
        call_id = f"call_{time.time_ns() // 1000}_{len(self.gated)}"
        index, text = len(self.blocks), source.strip() or "{}"
        block: dict[str, Any] = {"type": "toolCall", "id": call_id, "name": name, "arguments": {}}
        self.blocks.append(block)
        self.gated[call_id] = gated
        self.count += 1
        self.update({"type": "toolcall_start", "contentIndex": index, "id": call_id, "toolName": name})
        for piece in ["", *self.pieces(text)]:
            self.agent.sleep(self.delay)
            self.update({"type": "toolcall_delta", "contentIndex": index, "delta": piece})
        block["arguments"] = json.loads(text)

    def do_timestamp(self, _: str) -> None:
        self.stamped = True

    def do_stream(self, argument: str) -> None:
        """Many deltas; the line is assembled from encoded parts, so that this side is not the bottleneck."""
        number, size, rate = (int(word) for word in [*argument.split(), "0"][:3])
        index, block = self.block("text")
        start, filler = time.monotonic(), "x" * size
        head, tail = self.stream_parts(index, block)
        encoded, batch = bytearray(compact(block["text"])[1:-1].encode()), []
        try:
            for step in range(number):
                if rate:
                    self.agent.sleep(start + step / rate - time.monotonic())
                text = (f"{time.monotonic_ns()} ".ljust(size, "x") if self.stamped else filler).encode()
                encoded += text
                batch.append(self.stream_line(head, tail, text, encoded))
                if rate or self.stamped or len(batch) >= 64:
                    self.agent.check_abort()
                    self.out.raw(b"".join(batch))
                    batch.clear()
        finally:
            self.out.raw(b"".join(batch))
            self.count += number
            block["text"] = json.loads(b'"' + encoded + b'"')

    def stream_parts(self, index: int, block: dict[str, Any]) -> tuple[bytes, bytes]:
        """What stands before the delta and, in 0.73, around the text of each repeated message."""
        if NEW:
            head = compact({"type": "message_update", "usage": self.usage(final=False)})[:-1]
            head += f',"assistantMessageEvent":{{"type":"text_delta","contentIndex":{index},"delta":"'
            return head.encode(), b'"}}\n'
        text, block["text"] = block["text"], "\x00"
        before, after = compact(self.message()).split("\\u0000")
        block["text"] = text
        return before.encode(), after.encode()

    def stream_line(self, head: bytes, tail: bytes, delta: bytes, text: bytes | bytearray) -> bytes:
        if NEW:
            return head + delta + tail
        message = head + text + tail
        event = b'{"type":"message_update","assistantMessageEvent":{"type":"text_delta","contentIndex":%d,"delta":"'
        return event % (len(self.blocks) - 1) + delta + b'","partial":' + message + b'},"message":' + message + b"}\n"

    def do_large(self, argument: str) -> None:
        self.large = int(argument)

    def do_dialog(self, argument: str) -> None:
        method, _, timeout = argument.partition(" ")
        fields = {key: "x" * self.large if self.large else value for key, value in DIALOGS[method].items()}
        fields.update({"timeout": int(timeout)} if timeout else {})
        if method in NO_DIALOG:
            self.agent.dialog_open(method, fields)
            return
        answer = self.agent.dialog(method, fields, int(timeout) / 1000 if timeout else None)
        kept = {key: answer[key] for key in ("value", "confirmed", "cancelled") if key in answer} if answer else None
        self.do_say(f"{method}: {compact(kept)}")

    # faults

    def do_crash(self, argument: str) -> None:
        os._exit(int(argument or 1))

    def do_garbage(self, _: str) -> None:
        self.out.raw(b"this is not json\n")

    def do_bigline(self, argument: str) -> None:
        frame = b'{"type":"fake_padding","padding":"%s"}\n'
        self.out.raw(frame % (b"x" * max(0, int(argument) - len(frame) + 2)))

    def do_badutf8(self, _: str) -> None:
        index, _block = self.block("text")
        event = compact({"type": "text_delta", "contentIndex": index, "delta": "BAD"}).encode()
        event = event.replace(b"BAD", b"bad \xff\xfe\xc3( utf-8")
        usage = compact(self.usage(final=False)).encode()
        message = compact(self.message()).encode()
        if NEW:
            self.out.raw(b'{"type":"message_update","usage":%s,"assistantMessageEvent":%s}\n' % (usage, event))
        else:
            event = event[:-1] + b',"partial":%s}' % message
            self.out.raw(b'{"type":"message_update","assistantMessageEvent":%s,"message":%s}\n' % (event, message))

    def do_halfline(self, _: str) -> None:
        self.out.raw(b'{"type":"message_update","assistantMessageEvent":{"type":"text_del')
        os._exit(1)

    def do_hang(self, argument: str) -> None:
        if argument == "hard":
            self.agent.hard = True
        self.agent.hung = True
        while True:
            time.sleep(3600)

    def do_orphan(self, argument: str) -> None:
        import subprocess  # not above: every start of a pi would pay for it

        subprocess.Popen(
            ["sleep", argument or "60"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


# ---- the agent -------------------------------------------------------------------------------------------------------


class Agent:
    """State of the process: queues, session, the run in its own thread."""

    def __init__(self, options: Options) -> None:
        self.out = Output()
        self.options = options
        self.model = options.model()
        self.level = options.values.get("--thinking", "medium")
        self.session = options.session()
        self.steering: list[dict[str, Any]] = []
        self.follow_ups: list[dict[str, Any]] = []
        self.modes = {"steering": "one-at-a-time", "followUp": "one-at-a-time"}
        self.auto_compaction = True
        self.running = False
        self.hung = self.hard = False
        self.abort = threading.Event()
        self.abort_ids: list[dict[str, Any]] = []
        self.bash_abort = threading.Event()
        self.lock = threading.RLock()
        self.dialogs: dict[str, Any] = {}
        self.answered = threading.Condition()
        self.tool_wait, self.tool_lines = 0.0, 0
        self.gate = options.gate() and os.environ.get("FAKE_PI_NO_GATE") != "1"
        if len(self.session.lines) == 1:
            self.begin_entries()

    def begin_entries(self) -> None:
        self.session.add("model_change", provider=self.model["provider"], modelId=self.model["id"])
        self.session.add("thinking_level_change", thinkingLevel=self.level)

    # waiting

    def check_abort(self) -> None:
        if self.abort.is_set():
            raise Aborted

    def sleep(self, seconds: float) -> None:
        if (seconds > 0 and self.abort.wait(seconds)) or self.abort.is_set():
            raise Aborted

    def dialog_open(self, method: str, fields: dict[str, Any]) -> str:
        dialog_id = str(uuid.uuid4())
        self.out.line({"type": "extension_ui_request", "id": dialog_id, "method": method, **fields})
        return dialog_id

    def dialog(self, method: str, fields: dict[str, Any], timeout: float | None = None) -> dict[str, Any] | None:
        """Open a dialog and wait; None if it timed out.  An abort ends the wait, as ctx.signal does."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self.answered:
            dialog_id = self.dialog_open(method, fields)
            self.dialogs[dialog_id] = None
            try:
                while self.dialogs[dialog_id] is None:
                    self.check_abort()
                    if deadline is not None and time.monotonic() >= deadline:
                        return None
                    self.answered.wait(0.02)
                return dict(self.dialogs[dialog_id])
            finally:
                del self.dialogs[dialog_id]

    def hello(self, times: int = 1) -> None:
        for _ in range(times if self.gate else 0):
            self.dialog_open("input", {"title": GATE_TITLE, "placeholder": compact(GATE_HELLO)})

    # the run

    def start(self, message: dict[str, Any]) -> None:
        self.running = True
        self.abort.clear()
        threading.Thread(target=self.run, args=([message],), daemon=True).start()

    def run(self, first: list[dict[str, Any]]) -> None:
        """One agent_start … agent_end, however many turns and queued messages it takes."""
        log: list[dict[str, Any]] = []
        self.out.event("agent_start")
        self.out.event("turn_start")
        self.greet(log)
        self.deliver(first, log)
        self.take("steering", log)
        while True:
            self.rounds(log)
            with self.lock:
                if not NEW or self.abort.is_set() or not (self.steering or self.follow_ups):
                    self.finish(log)
                    return
            self.out.event("agent_end", messages=log, willRetry=False)  # 0.87 goes on after an answer that failed
            log = []
            self.out.event("agent_start")
            self.out.event("turn_start")
            if not self.take("steering", log):
                self.take("followUp", log)

    def rounds(self, log: list[dict[str, Any]]) -> None:
        """Answers, until nothing is left to do or one has failed."""
        while True:
            again = self.turn(log)
            if self.abort.is_set() or again is None:
                break
            if not (again or self.steering or self.follow_ups):
                break
            self.out.event("turn_start")
            if not self.take("steering", log) and not again:
                self.take("followUp", log)

    def greet(self, log: list[dict[str, Any]]) -> None:
        """pi 0.87 shows the system message once per session."""
        if NEW and not any(message["role"] == "system" for message in self.session.messages()):
            self.deliver([SYSTEM_MESSAGE], log)

    def finish(self, log: list[dict[str, Any]]) -> None:
        with self.lock:
            self.out.event("agent_end", messages=log, **({"willRetry": False} if NEW else {}))
            if NEW:
                self.out.event("agent_settled")
            self.running = False
            for request in self.abort_ids:
                self.respond(request)
            self.abort_ids.clear()
            self.abort.clear()

    def deliver(self, messages: list[dict[str, Any]], log: list[dict[str, Any]]) -> None:
        for message in messages:
            self.out.event("message_start", message=message)
            self.out.event("message_end", message=message)
            self.record(message, log)

    def record(self, message: dict[str, Any], log: list[dict[str, Any]]) -> None:
        with self.lock:
            log.append(message)
            self.session.add("message", message=message)

    def take(self, queue: str, log: list[dict[str, Any]]) -> bool:
        """Hand queued messages to the model: one, or all of them in mode `all`."""
        with self.lock:
            waiting = self.steering if queue == "steering" else self.follow_ups
            number = len(waiting) if self.modes[queue] == "all" else 1
            taken = waiting[:number]
            del waiting[:number]
            if taken:
                self.queue_update()
        self.deliver(taken, log)
        return bool(taken)

    def queue_update(self) -> None:
        texts = [[text_of(message) for message in queue] for queue in (self.steering, self.follow_ups)]
        self.out.event("queue_update", steering=texts[0], followUp=texts[1])

    def steps(self) -> list[Any]:
        """The round to play: the last user message's script, at the number of answers given since."""
        count = 0
        for message in reversed(self.session.messages()):
            if message["role"] == "user":
                rounds = rounds_of(text_of(message))
                return rounds[count] if count < len(rounds) else [("!say", "done")]
            count += message["role"] == "assistant"
        return [("!say", "done")]

    def turn(self, log: list[dict[str, Any]]) -> bool | None:
        """One answer and its tools; True if tool results need another turn, None after an error."""
        answer = Answer(self, self.steps())
        message = answer.play()
        self.record(message, log)
        results: list[dict[str, Any]] = []
        if message["stopReason"] == "toolUse":
            calls = [block for block in message["content"] if block["type"] == "toolCall"]
            results = self.tools(calls, answer.gated)
            self.deliver(results, log)
        self.out.event("turn_end", message=message, toolResults=results)
        if results and self.abort.is_set():
            self.empty_turn(log)
        return None if message["stopReason"] == "error" else bool(results)

    def empty_turn(self, log: list[dict[str, Any]]) -> None:
        """What pi appends to an abort inside a tool."""
        self.out.event("turn_start")
        answer = Answer(self, [])
        stop, text = ("error", "This operation was aborted") if NEW else ("aborted", "Request was aborted")
        message = answer.message(stop, error=text)
        self.out.event("message_start", message=message)
        self.out.event("message_end", message=message)
        self.record(message, log)
        self.out.event("turn_end", message=message, toolResults=[])

    # tools

    def tools(self, calls: list[dict[str, Any]], gated: dict[str, bool]) -> list[dict[str, Any]]:
        """Gate the calls one after the other, then run the allowed ones; results in call order."""
        results: dict[str, dict[str, Any]] = {}
        allowed = []
        for call in calls:
            self.out.event("tool_execution_start", toolCallId=call["id"], toolName=call["name"], args=call["arguments"])
            reason = self.refusal(call, gated=gated[call["id"]])
            if reason is None:
                allowed.append(call)
            else:
                results[call["id"]] = self.tool_end(call, reason, {}, is_error=True)
        for call in allowed:
            results[call["id"]] = self.execute(call)
        return [results[call["id"]] for call in calls]

    def refusal(self, call: dict[str, Any], *, gated: bool) -> str | None:
        if call["name"].startswith("nosuch"):
            return f"Tool {call['name']} not found"
        if not (gated and self.gate):
            return None
        question = gate_question(call["name"], call["id"], call["arguments"])
        try:
            answer = self.dialog("input", {"title": GATE_TITLE, "placeholder": compact(question)})
        except Aborted:
            return "Operation aborted" if NEW else GATE_DEFAULT_REASON
        return gate_reason((answer or {}).get("value"), call["id"])

    def execute(self, call: dict[str, Any]) -> dict[str, Any]:
        text = self.tool_output(call)
        try:
            if call["name"] == "bash":
                self.tool_update(call, {"content": []})
                self.tool_update(call, {"content": [{"type": "text", "text": text}], "details": {}})
            self.sleep(self.tool_wait)
        except Aborted:
            return self.tool_end(call, text + "\n\nCommand aborted", {}, is_error=True)
        return self.tool_end(call, text, None, is_error=False)

    def tool_output(self, call: dict[str, Any]) -> str:
        extra = "".join(f"line {number}\n" for number in range(self.tool_lines))
        arguments = call["arguments"]
        if call["name"] == "bash":
            return f"ran: {arguments.get('command', '')}\n{extra}"
        return f"did: {call['name']} {arguments.get('path', compact(arguments))}\n{extra}"

    def tool_update(self, call: dict[str, Any], partial: dict[str, Any]) -> None:
        head = {"toolCallId": call["id"], "toolName": call["name"], "args": call["arguments"]}
        self.out.event("tool_execution_update", **head, partialResult=partial)

    def tool_end(self, call: dict[str, Any], text: str, details: Any, *, is_error: bool) -> dict[str, Any]:
        result: dict[str, Any] = {"content": [{"type": "text", "text": text}]}
        if details is not None:
            result["details"] = details
        head = {"toolCallId": call["id"], "toolName": call["name"]}
        self.out.event("tool_execution_end", **head, result=result, isError=is_error)
        return {"role": "toolResult", **head, **result, "isError": is_error, "timestamp": now_ms()}

    # commands

    def respond(self, request: dict[str, Any], data: Any = ..., error: str | None = None) -> None:
        answer: dict[str, Any] = {"id": request["id"]} if "id" in request else {}
        answer["type"] = "response"
        if "type" in request:
            answer["command"] = request["type"]
        answer["success"] = error is None
        if error is not None:
            answer["error"] = error
        elif data is not ...:
            answer["data"] = data
        self.out.line(answer)

    def accept(self, line: bytes) -> None:
        """One line of stdin."""
        try:
            request = json.loads(line)
        except ValueError as error:
            self.respond({"type": "parse"}, error=f"Failed to parse command: {error}")
            return
        if not isinstance(request, dict):
            self.respond({}, error="Unknown command: undefined")
        elif request.get("type") == "extension_ui_response":
            with self.answered:
                if self.dialogs.get(str(request.get("id")), ...) is None:
                    self.dialogs[request["id"]] = request
                    self.answered.notify_all()
        else:
            self.obey(request)

    def obey(self, request: dict[str, Any]) -> None:
        kind = request.get("type", "undefined")
        handler: Callable[[dict[str, Any]], None] | None = getattr(self, "on_" + str(kind), None)
        if handler is None or (not NEW and kind in ONLY_NEW):
            known = request if NEW else {key: value for key, value in request.items() if key != "id"}
            self.respond(known, error=f"Unknown command: {kind}")
            return
        if kind in SWITCHING:
            self.stop_run()
        try:
            with self.lock:
                handler(request)
        except (KeyError, TypeError, AttributeError) as error:
            self.respond(request, error=f"Cannot read properties of undefined (reading '{error}')")

    def user_message(self, request: dict[str, Any]) -> dict[str, Any]:
        content = [{"type": "text", "text": request["message"]}, *request.get("images", [])]
        return {"role": "user", "content": content, "timestamp": now_ms()}

    def enqueue(self, request: dict[str, Any], queue: list[dict[str, Any]]) -> None:
        queue.append(self.user_message(request))
        self.queue_update()
        self.respond(request)

    def on_prompt(self, request: dict[str, Any]) -> None:
        behaviour = request.get("streamingBehavior")
        if not self.running:
            message = self.user_message(request)
            self.respond(request)
            self.start(message)
        elif behaviour in ("steer", "followUp"):
            self.enqueue(request, self.steering if behaviour == "steer" else self.follow_ups)
        else:
            text = (
                "Agent is already processing. Specify streamingBehavior ('steer' or 'followUp') to queue the message."
            )
            self.respond(request, error=text)

    def on_steer(self, request: dict[str, Any]) -> None:
        self.enqueue(request, self.steering)

    def on_follow_up(self, request: dict[str, Any]) -> None:
        self.enqueue(request, self.follow_ups)

    def on_abort(self, request: dict[str, Any]) -> None:
        if not self.running:
            self.respond(request)
            return
        self.abort_ids.append(request)
        self.abort.set()

    def on_clear_queue(self, request: dict[str, Any]) -> None:
        cleared = {"steering": [text_of(m) for m in self.steering], "followUp": [text_of(m) for m in self.follow_ups]}
        self.steering.clear()
        self.follow_ups.clear()
        self.queue_update()
        self.respond(request, cleared)

    def on_get_state(self, request: dict[str, Any]) -> None:
        session = self.session
        data: dict[str, Any] = {"model": self.model, "thinkingLevel": self.level, "isStreaming": self.running}
        data.update(isCompacting=False, steeringMode=self.modes["steering"], followUpMode=self.modes["followUp"])
        if session.path:
            data["sessionFile"] = str(session.path)
        data["sessionId"] = session.id
        if session.name:
            data["sessionName"] = session.name
        data.update(autoCompactionEnabled=self.auto_compaction, messageCount=len(session.messages()))
        data["pendingMessageCount"] = len(self.steering) + len(self.follow_ups)
        self.respond(request, data)

    def on_get_messages(self, request: dict[str, Any]) -> None:
        self.respond(request, {"messages": self.session.messages()})

    def on_get_last_assistant_text(self, request: dict[str, Any]) -> None:
        texts = [text_of(message) for message in self.session.messages() if message["role"] == "assistant"]
        self.respond(request, {"text": texts[-1] if texts else None})

    def on_get_session_stats(self, request: dict[str, Any]) -> None:
        messages = self.session.messages()
        roles = [message["role"] for message in messages]
        usages = [message["usage"] for message in messages if "usage" in message]
        tokens = {key: sum(u[key] for u in usages) for key in ("input", "output", "cacheRead", "cacheWrite")}
        tokens["total"] = sum(tokens.values())
        calls = sum(b["type"] == "toolCall" for m in messages if m["role"] == "assistant" for b in m["content"])
        data = {
            "sessionFile": str(self.session.path),
            "sessionId": self.session.id,
            "userMessages": roles.count("user"),
        }
        data.update(assistantMessages=roles.count("assistant"), toolCalls=calls, toolResults=roles.count("toolResult"))
        window, used = self.model["contextWindow"], usages[-1]["totalTokens"] if usages else 0
        data.update(totalMessages=len(messages), tokens=tokens, cost=sum(u["cost"]["total"] for u in usages))
        data["contextUsage"] = {"tokens": used, "contextWindow": window, "percent": 100 * used / window}
        self.respond(request, data)

    def on_get_commands(self, request: dict[str, Any]) -> None:
        source = {"path": "<inline:llama.cpp>", "source": "inline", "scope": "temporary", "origin": "top-level"}
        entry = {"name": "llama", "description": "Manage router models", "source": "extension", "sourceInfo": source}
        self.respond(request, {"commands": [entry] if NEW else []})

    def on_get_available_models(self, request: dict[str, Any]) -> None:
        self.respond(request, {"models": MODELS})

    def on_get_available_thinking_levels(self, request: dict[str, Any]) -> None:
        self.respond(request, {"levels": LEVELS if self.model["reasoning"] else ["off"]})

    def on_get_entries(self, request: dict[str, Any]) -> None:
        entries, since = self.session.lines[1:], request.get("since")
        ids = [entry["id"] for entry in entries]
        if since is not None and since not in ids:
            self.respond(request, error=f"Entry not found: {since}")
            return
        start = ids.index(since) + 1 if since is not None else 0
        self.respond(request, {"entries": entries[start:], "leafId": self.session.leaf})

    def on_get_fork_messages(self, request: dict[str, Any]) -> None:
        found = [{"entryId": entry["id"], "text": text_of(entry["message"])} for entry in self.session.user_entries()]
        self.respond(request, {"messages": found})

    def set_level(self, level: str) -> None:
        wanted = level if level in LEVELS and self.model["reasoning"] else "off"
        if wanted != self.level:
            self.level = wanted
            self.session.add("thinking_level_change", thinkingLevel=wanted)
            self.out.event("thinking_level_changed", level=wanted)

    def set_model(self, model: dict[str, Any]) -> None:
        self.model = model
        self.session.add("model_change", provider=model["provider"], modelId=model["id"])
        self.set_level(self.level if model["reasoning"] else "off")

    def on_set_model(self, request: dict[str, Any]) -> None:
        wanted = (request["provider"], request["modelId"])
        found = [model for model in MODELS if (model["provider"], model["id"]) == wanted]
        if not found:
            self.respond(request, error="Model not found: {}/{}".format(*wanted))
            return
        self.set_model(found[0])
        self.respond(request, self.model)

    def on_cycle_model(self, request: dict[str, Any]) -> None:
        ids = [model["id"] for model in MODELS]
        index = ids.index(self.model["id"]) if self.model["id"] in ids else -1
        self.set_model(MODELS[(index + 1) % len(MODELS)])
        self.respond(request, {"model": self.model, "thinkingLevel": self.level, "isScoped": False})

    def on_set_thinking_level(self, request: dict[str, Any]) -> None:
        self.set_level(request["level"])
        self.respond(request)

    def on_cycle_thinking_level(self, request: dict[str, Any]) -> None:
        if not self.model["reasoning"]:
            self.respond(request, None)
            return
        self.set_level(LEVELS[(LEVELS.index(self.level) + 1) % len(LEVELS)])
        self.respond(request, {"level": self.level})

    def on_set_steering_mode(self, request: dict[str, Any]) -> None:
        self.modes["steering"] = request["mode"]
        self.respond(request)

    def on_set_follow_up_mode(self, request: dict[str, Any]) -> None:
        self.modes["followUp"] = request["mode"]
        self.respond(request)

    def on_set_auto_compaction(self, request: dict[str, Any]) -> None:
        self.auto_compaction = bool(request["enabled"])
        self.respond(request)

    def on_set_auto_retry(self, request: dict[str, Any]) -> None:
        self.respond(request)

    def on_abort_retry(self, request: dict[str, Any]) -> None:
        self.respond(request)

    def on_set_session_name(self, request: dict[str, Any]) -> None:
        name = request["name"].strip()
        if not name:
            self.respond(request, error="Session name cannot be empty")
            return
        self.session.name = name
        self.session.add("session_info", name=name)
        self.out.event("session_info_changed", name=name)
        self.respond(request)

    def on_compact(self, request: dict[str, Any]) -> None:
        branch = self.session.branch()
        self.out.event("compaction_start", reason="manual")
        if not branch or branch[-1]["type"] == "compaction" or not self.session.messages():
            error = "Already compacted" if branch and branch[-1]["type"] == "compaction" else NOTHING_TO_COMPACT
            fields = {"aborted": False, "willRetry": False, "errorMessage": f"Compaction failed: {error}"}
            self.out.event("compaction_end", reason="manual", **fields)
            self.respond(request, error=error)
            return
        result: dict[str, Any] = {"summary": "fake summary", "firstKeptEntryId": branch[-1]["id"], "tokensBefore": 1400}
        result.update({"estimatedTokensAfter": 100} if NEW else {}, details={"readFiles": [], "modifiedFiles": []})
        self.session.add("compaction", **result, fromHook=False)
        self.out.event("compaction_end", reason="manual", result=result, aborted=False, willRetry=False)
        self.respond(request, result)

    def on_bash(self, request: dict[str, Any]) -> None:
        """Runs nothing; `sleep N` takes that long, so that abort_bash can be tried."""
        self.bash_abort.clear()
        threading.Thread(target=self.bash, args=(request, str(request["command"])), daemon=True).start()

    def bash(self, request: dict[str, Any], command: str) -> None:
        output, match = f"ran: {command}\n", re.search(r"sleep (\d+(?:\.\d+)?)", command)
        if NEW:
            self.out.line({"type": "bash_execution_update", "id": request.get("id"), "delta": output})
        cancelled = self.bash_abort.wait(float(match.group(1))) if match else False
        data: dict[str, Any] = {"output": output, "cancelled": cancelled, "truncated": False}
        if not cancelled:
            data = {"output": output, "exitCode": 0, "cancelled": False, "truncated": False}
        with self.lock:
            message = {"role": "bashExecution", "command": command, **data, "timestamp": now_ms()}
            self.session.add("message", message=message)
            self.respond(request, data)

    def on_abort_bash(self, request: dict[str, Any]) -> None:
        self.respond(request)
        self.bash_abort.set()

    # sessions

    def stop_run(self) -> None:
        """A run does not survive a change of session; 0.73 drops it without a word."""
        self.out.muted = not NEW and self.running
        while self.running:
            self.abort.set()
            time.sleep(0.002)
        self.out.muted = False

    def switch(self, request: dict[str, Any], session: Session, **data: Any) -> None:
        """Make another session current, or the same anew.  The queue belonged to the old one."""
        self.session = session
        self.steering.clear()
        self.follow_ups.clear()
        if len(session.lines) == 1:
            self.begin_entries()
        self.hello(2)
        self.respond(request, {**data, "cancelled": False})

    def on_new_session(self, request: dict[str, Any]) -> None:
        self.switch(request, self.options.fresh(self.session.cwd, request.get("parentSession")))

    def on_switch_session(self, request: dict[str, Any]) -> None:
        path = Path(request["sessionPath"])
        self.switch(request, Session.load(path) if path.exists() else Session(path, new_session_id(), os.getcwd()))

    def on_clone(self, request: dict[str, Any]) -> None:
        self.switch(request, self.copied(self.session.branch()))

    def on_fork(self, request: dict[str, Any]) -> None:
        found = [entry for entry in self.session.user_entries() if entry["id"] == request["entryId"]]
        if not found:
            self.respond(request, error="Invalid entry ID for forking")
            return
        self.session.leaf, leaf = found[0]["parentId"], self.session.leaf
        branch = self.session.branch()
        self.session.leaf = leaf
        self.switch(request, self.copied(branch), text=text_of(found[0]["message"]))

    def copied(self, branch: list[dict[str, Any]]) -> Session:
        """A new session with the same entries, linked to this one."""
        session = self.options.fresh(self.session.cwd, str(self.session.path))
        session.lines += branch
        session.leaf = branch[-1]["id"] if branch else None
        session.save()
        return session


ONLY_NEW = {"clear_queue", "get_entries", "get_available_thinking_levels"}
SWITCHING = {"new_session", "switch_session", "clone", "fork"}
NOTHING_TO_COMPACT = "Nothing to compact (session too small)"


# ---- command line ----------------------------------------------------------------------------------------------------


class Options:
    """The arguments, checked as strictly as pi does."""

    def __init__(self, arguments: list[str]) -> None:
        self.values: dict[str, str] = {}
        self.alone: set[str] = set()
        self.extensions: list[str] = []
        words = iter(arguments)
        for word in words:
            if word in FLAGS_WITH_VALUE:
                value = next(words, "")
                self.values[word] = value
                if word in ("-e", "--extension"):
                    self.extensions.append(value)
            elif word in FLAGS_ALONE:
                self.alone.add(word)
            elif word.startswith("-"):
                fail(f"Error: Unknown option: {word}")
        for path in self.extensions:
            if not os.path.exists(path):
                fail(f'Failed to load extension "{path}": Cannot find module')

    def gate(self) -> bool:
        for path in self.extensions:
            if GATE_MARK in os.path.basename(path):
                return True
            with contextlib.suppress(OSError):
                if GATE_MARK in Path(path).read_text("utf-8", "replace"):
                    return True
        return False

    def model(self) -> dict[str, Any]:
        provider, name = self.values.get("--provider", ""), self.values.get("--model", "")
        if not provider and "/" in name:
            provider, _, name = name.partition("/")
        name = name.partition(":")[0] or "mock-1"
        if provider and provider not in PROVIDERS:
            fail(f'Error: Unknown provider "{provider}"')
        for model in MODELS:
            if model["id"] == name and provider in ("", "mock"):
                return dict(model)
        print(f'Warning: Model "{name}" not found, using it as a custom model', file=sys.stderr)
        return dict(model_object(name, name, provider=provider or "mock"))

    def directory(self, cwd: str) -> Path:
        explicit = self.values.get("--session-dir") or os.environ.get("PI_CODING_AGENT_SESSION_DIR")
        if explicit:
            return Path(explicit)
        agent = os.environ.get("PI_CODING_AGENT_DIR") or os.path.join(os.path.expanduser("~"), ".pi", "agent")
        return Path(agent) / "sessions" / ("--" + re.sub(r"[/\\:]", "-", cwd.lstrip("/")) + "--")

    def fresh(self, cwd: str, parent: str | None = None) -> Session:
        session_id = self.values.pop("--session-id", "") or new_session_id()
        if "--no-session" in self.alone:
            return Session(None, session_id, cwd, parent)
        stamp = iso_now().replace(":", "-").replace(".", "-")
        return Session(self.directory(cwd) / f"{stamp}_{session_id}.jsonl", session_id, cwd, parent)

    def session(self) -> Session:
        wanted = self.values.get("--session")
        if not wanted:
            return self.fresh(os.getcwd())
        if "/" not in wanted and not wanted.endswith(".jsonl"):
            found = sorted(self.directory(os.getcwd()).glob(f"*_{wanted}*.jsonl"))
            if not found:
                fail(f"No session found matching '{wanted}'")
            return Session.load(found[0])
        path = Path(wanted)
        return Session.load(path) if path.exists() else Session(path, new_session_id(), os.getcwd())


def list_models(search: str = "") -> str:
    """The table of --list-models, with pi's rounded numbers."""
    rows = [("provider", "model", "context", "max-out", "thinking", "images")]
    for model in sorted(MODELS, key=lambda m: str(m["id"])):
        window, limit = (f"{model[key] / 1000:g}K" for key in ("contextWindow", "maxTokens"))
        flags = ["yes" if flag else "no" for flag in (model["reasoning"], "image" in model["input"])]
        if search in model["id"]:
            rows.append((model["provider"], model["id"], window, limit, flags[0], flags[1]))
    if len(rows) == 1:
        return f'No models matching "{search}"'
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def information(arguments: list[str]) -> bool:
    """Answer --version and --list-models; 0.73 prints to stderr when stdin is not a terminal."""
    stream = sys.stdout if NEW or sys.stdin.isatty() else sys.stderr
    if "--version" in arguments or "-v" in arguments:
        print(VERSION, file=stream)
        return True
    if "--list-models" in arguments:
        search = arguments[arguments.index("--list-models") + 1 :][:1]
        print(list_models(search[0] if search and not search[0].startswith("-") else ""), file=stream)
        return True
    return False


def serve(agent: Agent) -> None:
    """Obey stdin until it closes."""
    agent.hello()
    log = os.environ.get("FAKE_PI_LOG")
    for line in sys.stdin.buffer:
        if log:
            with open(log, "ab") as file:
                file.write(line)
        if not agent.hung and line.strip():
            agent.accept(line.rstrip(b"\r\n"))
    while agent.hard:
        time.sleep(3600)
    os._exit(0)


def main(arguments: list[str]) -> None:
    if information(arguments):
        return
    options = Options(arguments)
    if options.values.get("--mode") != "rpc":
        fail("Error: the fake speaks only --mode rpc")
    starts = os.environ.get("FAKE_PI_STARTS")
    if starts:
        with open(starts, "a") as file:
            file.write(os.path.basename(options.values.get("--session-dir", "")) + "\n")
    time.sleep(float(os.environ.get("FAKE_PI_START_DELAY", "0")))
    agent = Agent(options)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: None if agent.hard else os._exit(128 + received))
    serve(agent)


if __name__ == "__main__":
    main(sys.argv[1:])
