"""What the chat of a phone of app 1.1 shows, by the app's own rules for live frames and for catching up."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from typing import Any, Callable

from tests.support.phone import Phone
from tests.support.server import Server

from .common import Wire

STAMP = re.compile(r"(\d{10,}) ")  # the clock with which the scripted pi begins a delta: no other has the same


class Chat:
    """The rows of a chat.  A trace fills it at once, live frames one after the other."""

    def __init__(self, trace: Sequence[dict[str, Any]] = ()) -> None:
        self.answers: list[str] = []
        self.partial = ""  # of the answer that is being written
        self.outputs: dict[str, str] = {}  # tool call id -> output so far
        self.ended: set[str] = set()
        for event in trace:
            if event["type"] == "assistant":
                self.answers.append(event["text"])
            elif event["type"] == "toolCall":
                self.outputs[event["id"]] = ""
            elif event["type"] == "toolResult":
                self.outputs[event["toolCallId"]] = event["output"]
                self.ended.add(event["toolCallId"])

    def show(self, frame: dict[str, Any]) -> None:
        kind, call = frame["type"], frame.get("toolCallId", "")
        if kind == "text_delta":
            self.partial += frame["delta"]
        elif kind == "message_end" and frame["role"] == "assistant":
            self.answers += [frame["content"]] if frame["content"] else []
            self.partial = ""
        elif kind == "tool_start":
            self.outputs.setdefault(call, "")
        elif kind == "tool_output":
            old = "" if frame.get("mode") == "replace" else self.outputs.get(call, "")
            self.outputs[call] = old + frame["output"]
        elif kind == "tool_end":
            self.ended.add(call)

    def stamps(self) -> set[str]:
        """The deltas that are on the screen."""
        return set(STAMP.findall("".join((*self.answers, self.partial))))


class Follower:
    """One phone in one session.  Frames are shown when `apply` is called; until then the phone costs nothing."""

    def __init__(self, server: Server, phone: Phone, wid: str, sid: str, *, narrow: bool = False) -> None:
        self.port, self.phone, self.wid, self.sid, self.narrow = server.port, phone, wid, sid, narrow
        self.chat = Chat()
        self.wire: Any = None  # a Wire while connected
        self.read = 0  # frames of the wire that were applied
        self.last_seen: int | None = None
        self.complete = False  # whether every delta of the answer that is being written must have arrived
        self.over = False  # whether the end of the turn was shown
        self.broken = 0  # answers whose deltas were not what the finished answer says
        self.caught_up = self.reloaded = 0

    def connect(self) -> None:
        """Open a socket, subscribe, and catch up as the app does; what came meanwhile is shown afterwards."""
        self.wire, self.complete = Wire(self.port, self.phone.token, narrow=self.narrow), False
        self.wire.subscribe(self.sid)
        frames = [json.loads(text) for _, text in self.wire.frames]
        self.read = next(i for i, frame in enumerate(frames) if frame["type"] == "connected") + 1
        self._catch_up(frames[self.read - 1]["currentSeq"])
        self.apply()

    def leave(self) -> None:
        """Lose the connection."""
        self.wire.close()
        self.apply()

    def apply(self) -> None:
        """Show the frames that came."""
        while self.read < len(self.wire.frames):
            self._show(json.loads(self.wire.frames[self.read][1]))
            self.read += 1

    def _catch_up(self, current: int) -> None:
        if current == self.last_seen:
            return
        if self.last_seen is not None and current > self.last_seen:
            found = self.phone.events(self.wid, self.sid, self.last_seen)
            if found["catchUpComplete"]:
                self.caught_up += 1
                for event in found["events"]:
                    self._show(event)
                self.last_seen = found["currentSeq"]
                return
        self.reloaded += self.last_seen is not None
        self.chat, self.last_seen = self._stored(), current

    def _stored(self) -> Chat:
        return Chat(self.phone.session_detail(self.wid, self.sid)["trace"])

    def _show(self, frame: dict[str, Any]) -> None:
        if frame.get("sessionId") not in (None, self.sid):
            return
        if "seq" in frame:
            if self.last_seen is not None and frame["seq"] <= self.last_seen:
                return
            self.last_seen = frame["seq"]
        if frame["type"] == "message_end" and frame["role"] == "assistant":
            self.broken += self.complete and self.chat.partial != frame["content"]
            self.complete = True
        self.over = self.over or frame["type"] == "agent_end"
        self.chat.show(frame)

    def until(self, check: Callable[[], bool], timeout: float = 60.0) -> None:
        """Show what comes until something is so.  Raises RuntimeError if that takes too long, or the socket closes."""
        deadline = time.monotonic() + timeout
        self.apply()
        while not check():
            self.wire.wait("", deadline - time.monotonic(), since=self.read)
            self.apply()

    def finish(self) -> None:
        """Show everything up to the end of the turn."""
        self.until(lambda: self.over)

    def written(self) -> int:
        """Deltas of the answer that is being written."""
        return len(STAMP.findall(self.chat.partial))

    def lost(self) -> int:
        """How much of what pi's file holds is not on the screen: deltas, answers, calls and their outputs.

        The output of a call that went by while the phone was away is fetched when a person opens that call.
        """
        stored, shown = self._stored(), self.chat
        count = len(stored.stamps() - shown.stamps()) + sum(text not in shown.answers for text in stored.answers)
        for call, output in stored.outputs.items():
            if call not in shown.ended:
                count += 1
            elif shown.outputs[call] != output:
                path = f"/workspaces/{self.wid}/sessions/{self.sid}/tool-output/{call}"
                count += shown.outputs[call] != "" or self.phone.call("GET", path)["output"] != output
        return count

    def differs(self) -> bool:
        """Whether the chat is not, row by row, what pi's file holds."""
        stored, shown = self._stored(), self.chat
        rows = (shown.answers, shown.partial, list(shown.outputs)) == (stored.answers, "", list(stored.outputs))
        return not rows or self.lost() > 0
