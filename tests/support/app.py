"""An app with a memory: what phones keep over disconnects and how they catch up (stream.md 4.3).

`Phone` decodes and sends; `App` adds what makes a chat out of it.  It remembers per session the last seq it has
applied, drops what it knows already, and closes gaps by `events?since=` or, if that is not complete, by reading the
history again.  Frames are applied when `pump` is called, in the order in which they arrived, so that a test decides
when this phone "thinks".  What several apps saw of one session meets in `Truth`, which complains when two of them were
told different things.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Callable

from .phone import RESULT_TYPE, Frame, Phone, PhoneError, new_id

PATIENCE = 10.0  # s for anything that takes the server milliseconds
SUBSCRIBES = 25, 5.0  # an app that would ask more often within this many seconds opens a new socket instead
OUTLINE = frozenset(  # the durable types that reach the level `notifications` (stream.md 3)
    "agent_start agent_end stop_requested stop_confirmed stop_failed session_ended error".split()
)
DURABLE = OUTLINE | {"message_end", "tool_start", "tool_end"}
BOOTSTRAP = ("state", "permission_request", "extension_ui_request")  # what may come between connected and the result


class Lost(AssertionError):
    """An app would not have seen something, or would have seen it twice or in another order."""


def need(condition: object, problem: str) -> None:
    """`assert` for the rules of the stream."""
    if not condition:
        raise Lost(problem)


class Truth:
    """Durable messages of every session by seq, as far as any app saw them, and where an activation was cut off."""

    def __init__(self) -> None:
        self.messages: dict[str, dict[int, Frame]] = {}
        self.cuts: dict[str, set[int]] = {}

    def of(self, sid: str) -> dict[int, Frame]:
        return self.messages.setdefault(sid, {})

    def add(self, sid: str, frame: Frame, who: str) -> None:
        """One seq is one message, whoever is told it and however often."""
        seq = frame["seq"]
        message = {key: value for key, value in frame.items() if key not in ("sessionId", "streamSeq")}
        known = self.of(sid).setdefault(seq, message)
        need(known == message, f"{who}: seq {seq} of {sid} is {message}, another app was told {known}")
        need(frame["type"] in DURABLE, f"{who}: {frame['type']} has a seq")

    def last(self, sid: str) -> int:
        return max(self.of(sid), default=0)

    def cut(self, sid: str) -> None:
        """The server was killed: what was said last may not have reached pi's file."""
        self.cuts.setdefault(sid, set()).add(self.last(sid))

    def activations(self, sid: str) -> Iterator[list[Frame]]:
        """The messages in order, in lists that one pi said."""
        found: list[Frame] = []
        for seq, message in sorted(self.of(sid).items()):
            found.append(message)
            if message["type"] == "session_ended" or seq in self.cuts.get(sid, ()):
                yield found
                found = []
        yield found

    def check(self, sid: str) -> None:
        """The messages come in an order that stream.md allows."""
        grammar = Grammar(sid)
        for seq, message in sorted(self.of(sid).items()):
            grammar.read(message, cut=seq in self.cuts.get(sid, ()))

    def kept(self, sid: str, upto: int | None = None) -> list[Frame]:
        """The messages pi must have written to its file: a later one proves that it went on after writing.

        pi tells a message and then writes it, and writes nothing before the first answer.  So the last message of a
        pi that was killed proves nothing, and neither does a question without any answer after it.
        """
        found: list[Frame] = []
        for messages in self.activations(sid):
            told: list[Frame] = []  # with no answer after them yet
            answered: list[Frame] = []  # up to an answer which may not be written yet
            for message in messages:
                if message["type"] in ("message_end", "tool_start", "agent_end"):
                    found += answered
                    answered = []
                if message["type"] in ("message_end", "tool_end"):
                    told.append(message)
                if message["type"] == "agent_end" or message.get("role") == "assistant":
                    answered, told = told, []
                if message["type"] == "agent_end":
                    found += answered
                    answered = []
        return [message for message in found if upto is None or message["seq"] <= upto]


class Grammar:
    """What may follow what among the durable messages of a session (stream.md 4.4 and 5.3).

    Between two numbers of which one was told to nobody anything may have happened.
    """

    def __init__(self, sid: str) -> None:
        self.sid = sid
        self.seq = 0
        self.known = True  # whether everything since this pi began was told to somebody
        self.busy = self.stopping = False
        self.tools: set[str] = set()

    def read(self, message: Frame, *, cut: bool) -> None:
        if self.seq != message["seq"] - 1:
            self.known = False
        self.seq = message["seq"]
        getattr(self, "_" + message["type"], self._anything)(message)
        if cut:  # and nobody may have been told how the next pi began
            self.known = self.busy = self.stopping = False

    def rule(self, condition: object, message: Frame, problem: str) -> None:
        need(condition or not self.known, f"{self.sid}: {message} {problem}")

    def _anything(self, message: Frame) -> None:
        need(message["type"] == "error", f"{self.sid}: {message} is not durable")

    def _agent_start(self, message: Frame) -> None:
        self.rule(not self.busy, message, "though a turn runs")
        self.busy = True

    def _agent_end(self, message: Frame) -> None:
        self.rule(self.busy, message, "though no turn runs")
        self.busy = False

    def _message_end(self, message: Frame) -> None:
        self.rule(self.busy, message, "though no turn runs")

    def _tool_start(self, message: Frame) -> None:
        self.rule(self.busy, message, "though no turn runs")
        self.tools.add(message["toolCallId"])

    def _tool_end(self, message: Frame) -> None:
        self.rule(message["toolCallId"] in self.tools, message, "of a tool that was not started")

    def _stop_requested(self, message: Frame) -> None:
        self.rule(not self.stopping or message["source"] == "server", message, "though a stop is pending")
        self.stopping = True

    def _stop_confirmed(self, message: Frame) -> None:
        self.rule(self.stopping or message.get("reason") == "Session already idle", message, "that nobody asked for")
        self.rule(not self.busy or message.get("reason") is None, message, "though a turn runs")
        self.stopping &= message.get("reason") == "Session already idle"

    def _stop_failed(self, message: Frame) -> None:
        self.rule(self.stopping, message, "that nobody asked for")
        self.stopping = False

    def _session_ended(self, message: Frame) -> None:
        self.rule(not self.stopping, message, "before it is told how the stop ended")
        self.busy = self.stopping = False  # also what is only remembered from before a gap
        self.known = True
        self.tools.clear()


@dataclass
class Memory:
    """What an app keeps of one session, also while it is closed."""

    last: int | None = None  # lastSeenSeq
    first: int = 0  # what came before this was read as history, at the first visit
    applied: set[int] = field(default_factory=set)
    gaps: list[tuple[int, int]] = field(default_factory=list)  # (after, up to): read as history
    outlines: list[list[int]] = field(default_factory=list)  # runs of seqs seen at the level `notifications`
    status: str = ""
    stopping: bool = False  # shown as stopping until it is told how that ended
    queue_version: int = -1
    queue: Any = None


def spoken(trace: list[Any]) -> list[tuple[str, str]]:
    """(role, text) of the messages of a trace in order, the blocks of an answer joined as in message_end."""
    found: list[tuple[str, str]] = []
    answer = ""
    for event in trace:
        if event["type"] not in ("user", "assistant") or event["id"].startswith("held-"):
            continue
        entry = event["id"].partition("-text-")[0]
        if event["type"] == "assistant" and found and entry == answer:
            found[-1] = ("assistant", found[-1][1] + event["text"])
        else:
            found.append((event["type"], event["text"]))
        answer = entry if event["type"] == "assistant" else ""
    return found


def missing_from(trace: list[Any], kept: list[Frame]) -> str:
    """What of the kept messages a history lacks or has in another order; "" if nothing."""
    have, position = spoken(trace), 0
    for message in kept:
        wanted = (message.get("role"), message.get("content"))
        if message["type"] != "message_end" or not message["content"]:
            continue
        if wanted not in have[position:]:
            return f"seq {message['seq']} {wanted} is not in the history after {have[:position][-2:]}"
        position = have.index(wanted, position) + 1
    results = {event.get("toolCallId") for event in trace if event["type"] == "toolResult"}
    calls = [message for message in kept if message["type"] == "tool_end" and message["toolCallId"] not in results]
    return f"tools without a result in the history: {calls}" if calls else ""


class App:
    """One app, looking at one chat at a time.  `watch` is told every frame, after it was applied."""

    def __init__(
        self, name: str, phone: Phone, wid: str, truth: Truth, watch: Callable[[App, Frame, str], None]
    ) -> None:
        self.name, self.phone, self.wid, self.truth, self.watch = name, phone, wid, truth, watch
        self.modern = phone.generation == "1.1"
        self.current = ""  # the chat it shows
        self.memory: dict[str, Memory] = {}
        self.levels: dict[str, str] = {}  # session id -> full or notifications, on this socket
        self.asked: dict[str, str] = {}  # session id -> request id of a subscription under way
        self.booting: dict[str, list[str]] = {}  # types since `connected`, until the bootstrap is complete
        self.results: dict[str, Frame] = {}  # by request id
        self.cards: dict[str, str] = {}  # approvals it shows -> session id
        self.dialogs: dict[str, Frame] = {}  # dialogs it was shown on this socket
        self.stages: dict[str, int] = {}  # turn id -> how far it was told a turn has come, on this socket
        self.questions: set[str] = set()  # ids of all permission requests on this socket
        self.socket_number = 0
        self._position = 0
        self._subscribed: list[float] = []

    def of(self, sid: str) -> Memory:
        return self.memory.setdefault(sid, Memory())

    @property
    def online(self) -> bool:
        return self.phone.socket is not None and self.phone.closed is None

    @property
    def viewing(self) -> bool:
        """Whether it shows its current chat live."""
        return self.online and self.levels.get(self.current) == "full"

    # ---- the socket --------------------------------------------------------------------------------------------------

    def lose(self, *, politely: bool = False) -> None:
        """The connection goes away, or is closed as an app does it."""
        if politely and self.online:
            self.phone.close()
        self.phone.drop()
        self.pump()
        self.forget_socket()

    def forget_socket(self) -> None:
        for state in (self.levels, self.asked, self.booting, self.cards, self.dialogs, self.stages, self.questions):
            state.clear()
        for memory in self.memory.values():
            memory.stopping = False

    def open(self, sid: str, others: tuple[str, ...] = ()) -> None:
        """Go to a chat and return at once: what the server says about it is applied by a later `pump`."""
        now = time.monotonic()
        self._subscribed = [at for at in self._subscribed if now - at < SUBSCRIBES[1]]
        if not self.modern or not self.online or len(self._subscribed) + len(others) > SUBSCRIBES[0]:
            self.lose()
            self._subscribed = []
            self.socket_number += 1
            if self.modern:
                self.phone.open()
            else:
                self.phone.open_session(self.wid, sid)
        before, self.current = self.current, sid
        if not self.modern:
            return
        self._subscribe(sid, "full")
        for other in (*others, before):
            if other not in ("", sid) and self.levels.get(other) != "notifications":
                self._subscribe(other, "notifications")

    def _subscribe(self, sid: str, level: str) -> None:
        self._subscribed.append(time.monotonic())
        self.asked[sid] = new_id()
        self.phone.send("subscribe", sessionId=sid, level=level, requestId=self.asked[sid])

    def enter(self, sid: str, others: tuple[str, ...] = ()) -> None:
        """Go to a chat and wait until it is shown, then ask what both apps ask."""
        self.open(sid, others)
        self.until(lambda: self.shown(sid), f"{sid} is shown")
        self.send("get_state")
        self.send("get_commands", requestId=new_id())
        if self.modern:
            self.send("get_queue", requestId=new_id())

    def shown(self, sid: str) -> bool:
        """Whether the bootstrap of a chat is complete."""
        waiting = sid in self.asked or sid in self.booting
        return self.levels.get(sid) == "full" and not waiting and self.of(sid).last is not None

    def send(self, kind: str, **fields: Any) -> None:
        """A message for the current chat."""
        address = {"sessionId": self.current} if self.modern else {}
        self.phone.send(kind, **address, **fields)

    def request(self, kind: str, **fields: Any) -> Frame:
        """A command with its result."""
        request = new_id()
        self.send(kind, requestId=request, **fields)
        return self.result(request, kind)

    def result(self, request: str, what: str = "") -> Frame:
        self.until(lambda: request in self.results, f"a result of {what or request}")
        return self.results[request]

    def sync(self) -> None:
        """Return when the server has begun with everything this socket sent before: it answers in order."""
        unknown = f"sync-{new_id()}"
        self.phone.send("permission_response", id=unknown, action="deny")
        text = f"Permission request not found: {unknown}"
        start = self._position
        self.until(lambda: any(f.get("error") == text for f in self.phone.frames[start:]), "an answer in order")

    def until(self, check: Callable[[], object], what: str, timeout: float = PATIENCE) -> None:
        """Apply frames until this is true."""
        deadline = time.monotonic() + timeout
        while True:
            known, online = len(self.phone.frames), self.online
            self.pump()
            if check():
                return
            left = deadline - time.monotonic()
            if left <= 0 or not online:
                tail = "\n  ".join(str(frame)[:260] for frame in self.phone.frames[-15:])
                state = "" if self.online else f" (the socket is closed: {self.phone.closed})"
                raise PhoneError(f"{self.name} waited in vain for: {what}{state}; its last frames:\n  {tail}")
            self.phone.news(known, left)

    # ---- frames ------------------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Apply what has arrived."""
        self.phone.raise_errors()
        while self._position < len(self.phone.frames):
            frame = self.phone.frames[self._position]
            self._position += 1
            sid = frame.get("sessionId") or ("" if self.modern else self.phone.session_id) or ""
            if sid:
                self._take(frame, sid)
            self.watch(self, frame, sid)

    def _take(self, frame: Frame, sid: str) -> None:
        kind, memory = frame["type"], self.of(sid)
        if sid in self.booting and kind != "connected":
            self._boot(frame, sid)
        if kind == "connected":
            self.levels[sid] = "full"
            self.booting[sid] = []
            self._connected(frame, sid, memory)
        elif "seq" in frame:
            self.truth.add(sid, frame, self.name)
            self._durable(frame, sid, memory)
        elif kind == RESULT_TYPE[self.phone.generation]:
            self._result(frame, sid)
        self._remember(frame, sid, memory)

    def _boot(self, frame: Frame, sid: str) -> None:
        """connected < state < pending questions < result, and nothing live in between (stream.md 4.4).

        On the socket of app 1.0 pi may take its time between the first two, in which an older one may still end.
        """
        seen = self.booting[sid]
        if self.modern and frame["type"] == "command_result" and frame["command"] == "subscribe":
            need(seen[:1] == ["state"], f"{self.name}: a subscription told {seen} and no state")
            del self.booting[sid]
        elif not self.modern and frame["type"] in ("state", "error") and "seq" not in frame:
            del self.booting[sid]  # what is pending follows, and then what is live
        elif self.modern:
            need(frame["type"] in BOOTSTRAP, f"{self.name}: {frame} in the middle of a bootstrap, after {seen}")
            seen.append(frame["type"])

    def _connected(self, frame: Frame, sid: str, memory: Memory) -> None:
        current = int(frame.get("currentSeq", -1))
        memory.status, memory.stopping = frame["session"]["status"], False
        for key in [key for key, dialog in self.dialogs.items() if dialog["sessionId"] == sid]:
            del self.dialogs[key]  # the chat is opened anew, and open ones are told again
        if memory.last is None and self.modern:  # app 1.1 begins with the history, app 1.0 as if it had seen seq 0
            memory.first = memory.last = current
            self._read_history(sid, current)
            return
        memory.last = memory.last or 0
        need(current >= memory.last, f"{self.name}: connected says {current} where {memory.last} was seen")
        if current > memory.last:
            self._catch_up(sid, current, memory)

    def _catch_up(self, sid: str, current: int, memory: Memory) -> None:
        """Fetch what was missed, or the history if that is not held any more."""
        last = memory.last or 0
        try:
            reply = self.phone.events(self.wid, sid, last)
        except PhoneError:  # the session is not active: there is only the history
            self._skip(sid, current, memory)
            return
        seqs = [event["seq"] for event in reply["events"]]
        if not reply["catchUpComplete"]:
            need(not seqs, f"{self.name}: events since {last} are not complete, but {seqs} are told")
            self._skip(sid, current, memory)
            return
        wanted = list(range(last + 1, reply["currentSeq"] + 1))
        need(seqs == wanted, f"{self.name}: events since {last} are called complete: {seqs}, not {wanted}")
        for event in reply["events"]:
            self.truth.add(sid, event, self.name)
            memory.applied.add(event["seq"])
            self._remember(event, sid, memory)
        memory.last = reply["currentSeq"]

    def _skip(self, sid: str, current: int, memory: Memory) -> None:
        self._read_history(sid, current)
        memory.gaps.append((memory.last or 0, current))
        memory.last = current

    def _read_history(self, sid: str, current: int) -> None:
        """Read the trace; it must have everything that was told to anyone before and that pi has written."""
        kept = self.truth.kept(sid, current)
        deadline = time.monotonic() + PATIENCE
        while True:  # pi tells a message just before it writes it
            problem = missing_from(self.phone.session_detail(self.wid, sid)["trace"], kept)
            if not problem:
                break
            need(time.monotonic() < deadline, f"{self.name} reads the history: {problem}")
            time.sleep(0.01)

    def _durable(self, frame: Frame, sid: str, memory: Memory) -> None:
        seq, level = frame["seq"], self.levels.get(sid)
        if level == "notifications":
            need(frame["type"] in OUTLINE, f"{self.name}: {frame['type']} at level notifications")
            memory.outlines[-1].append(seq)
            return
        need(level == "full", f"{self.name}: {frame} of a session that it does not look at")
        last = memory.last or 0
        if seq <= last:
            return  # it came by catch-up already
        need(seq == last + 1, f"{self.name}: {frame} follows seq {last}, so something between was lost")
        memory.last = seq
        memory.applied.add(seq)

    def _result(self, frame: Frame, sid: str) -> None:
        if frame.get("requestId"):
            self.results[frame["requestId"]] = frame
        if frame["command"] == "subscribe":
            need(frame["success"], f"{self.name}: {frame}")
            if self.asked.get(sid) == frame["requestId"]:
                del self.asked[sid]
            if frame["data"]["level"] == "notifications":
                self.levels[sid] = "notifications"
                self.of(sid).outlines.append([])

    def _remember(self, frame: Frame, sid: str, memory: Memory) -> None:
        """What the app shows: status, approvals, dialogs, queue (stream.md 3, app reactions)."""
        kind = frame["type"]
        if kind == "state" and frame["session"]["id"] == sid:
            self._status(frame["session"]["status"], sid, memory)
        elif kind == "stop_requested":
            memory.status, memory.stopping = "stopping", True
        elif kind in ("stop_confirmed", "stop_failed"):
            memory.stopping = False
        elif kind == "session_ended":
            memory.status, memory.stopping = "stopped", False
            memory.queue = None
        elif kind == "permission_request":
            self.cards[frame["id"]] = sid
            self.questions.add(frame["id"])
        elif kind in ("permission_cancelled", "permission_expired"):
            self.cards.pop(frame["id"], None)
        elif kind == "extension_ui_request":
            self.dialogs[frame["id"]] = frame
        elif kind == "queue_state":
            version = frame["queue"]["version"]
            told = f"{self.name}: queue version {version} after {memory.queue_version}: the app ignores it"
            need(version >= memory.queue_version, told)
            memory.queue_version, memory.queue = version, frame["queue"]
        elif kind == "turn_ack":
            self._ack(frame)

    def _status(self, status: str, sid: str, memory: Memory) -> None:
        """Only the transitions of stream.md 5.1 may be seen."""
        if memory.stopping and sid not in self.booting:
            need(status == "stopping", f"{self.name}: {status} while a stop is pending in {sid}")
        memory.status = status

    def _ack(self, frame: Frame) -> None:
        """A stage only moves forward."""
        stage = ("accepted", "dispatched", "started").index(frame["stage"])
        before = self.stages.get(frame["clientTurnId"], -1)
        moved = stage >= before if frame.get("duplicate") else stage > before or stage == before == 0
        need(moved, f"{self.name}: {frame} after stage {before}")
        self.stages[frame["clientTurnId"]] = stage

    # ---- what must be true at rest -----------------------------------------------------------------------------------

    def check(self, sid: str) -> None:
        """Every durable message was applied exactly once, or was read as history."""
        memory = self.of(sid)
        told = self.truth.of(sid)
        for seq in told:
            if memory.last is None or not memory.first < seq <= memory.last:
                continue
            in_gap = any(after < seq <= upto for after, upto in memory.gaps)
            need(seq in memory.applied or in_gap, f"{self.name} never saw seq {seq}: {told[seq]}")
        for run in memory.outlines:
            between = [s for s in told if run and run[0] < s < run[-1] and told[s]["type"] in OUTLINE and s not in run]
            need(not between, f"{self.name} lacks at level notifications: {[told[s] for s in between]}")

    def recently(self) -> str:
        """What it was told last, without the bulk."""
        told = []
        for frame in self.phone.frames[-25:]:
            if frame["type"] in ("state", "connected"):
                frame = {"type": frame["type"], "sessionId": frame.get("sessionId"), **_outline(frame)}
            told.append(str(frame)[:300])
        return f"{self.name} at {self.current}:\n  " + "\n  ".join(told)

    def close(self) -> None:
        with contextlib.suppress(PhoneError, OSError):
            self.phone.drop()


def _outline(frame: Frame) -> Frame:
    return {"status": frame["session"]["status"], "currentSeq": frame.get("currentSeq")}
