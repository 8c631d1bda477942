"""A model of sessions, phones and faults, driven at random against a running server with the fake pi.

Four apps of both generations prompt, steer, stop, answer, get lost, come back and repeat themselves, while pi and the
server are killed under them.  Every step may leave things under way; the step `settle` lets everything come to rest
and compares: what each app has applied with what the others were told, what was acknowledged with pi's history, and
what pi was written with what it should have been.  What is compared all the time stands in tests/support/app.py.

The seed is fixed, so that a failure comes again; OPPI_SEED=n takes another one and OPPI_LONG=1 ten times as many
steps.  What ends the test is the number of steps and no clock, so a busy machine tries no less.
There is no shrinking: against a living server it takes minutes and seldom helps.  A failure tells its story.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from tests.support.app import PATIENCE, App, Lost, Truth, need, spoken
from tests.support.phone import SEND_TIMEOUT, Frame, Phone, PhoneError, new_id

from .rig import DIALECTS, Rig, bash, rig_with

LONG = os.environ.get("OPPI_LONG") == "1"
SEED = int(os.environ.get("OPPI_SEED", "20"))
STEPS = 140  # of one example; its end costs as much as ten of them
EXAMPLES = 8  # of one seed
ENOUGH = 10_000 if LONG else 1000  # steps that are always made, for each dialect of pi
EMERGENCY = 7200.0 if LONG else 900.0  # s for each dialect, thirty times what a quiet machine takes: then it fails
APPS = (("old 1", "1.0"), ("new 1", "1.1"), ("old 2", "1.0"), ("new 2", "1.1"))
SESSIONS = 3  # at most, in one example
WRITTEN = 3.0  # s after which a busy machine has written what a person decided
AT_REST = ("ready", "stopped", "error")

SCRIPTS: dict[str, str] = {  # what the fake pi plays; TAG stands for the name of the turn
    "plain": "",
    "say": "!say this is TAG",
    "think": "!think 3\n!say thought of TAG",
    "tool": "!toolwait 0\n" + bash("echo TAG"),
    "ask": "!toolwait 0\n" + bash("git push origin TAG") + "\n!say asked for TAG",
    "ask twice": bash("git push origin TAG") + "\n" + bash("git push upstream TAG"),
    "slow": "!slow 5\n!text 30",
    "slow tool": "!toolwait 150\n" + '!tool read {"path":"TAG"}',
    "select": "!dialog select",
    "confirm": "!dialog confirm",
    "error": "!error 529 Overloaded",
    "garbage": "!garbage\n!say after garbage",
    "bigline": "!bigline 300000\n!say after a big line",
    "badutf8": "!badutf8\n!say after bad bytes",
    "orphan": "!orphan 60\n!say left something running",
    "crash": "!crash 3",
    "crash late": "!say almost\n" + bash("echo TAG") + "\n!crash 3",
    "half line": "!say half\n!halfline",
}
GENTLE = ("plain", "say", "think", "tool", "slow", "ask", "slow tool")
REFUSALS = (  # why a turn may fail
    r"Session not active: .*",
    r"Steer requires an active streaming turn",
    r"Follow-up requires an active streaming turn",
    r"pi has ended",
    r"pi has refused it",
)
ERRORS = (  # what a session may say
    r"529.*",
    r"pi ended unexpectedly.*",
    r"(prompt|steer|follow_up): pi has ended",
    r"Not sent again: .*",
)
QUEUE_REFUSALS = (
    r"Queue version mismatch: .*",
    r"Message queue can only contain items while a turn is streaming",
    r"This version of pi cannot change its queue",
    r"Session not active: .*",
    r"pi has ended",
)

ANSWERS: dict[str, tuple[str, Any]] = {"select": ("value", "green"), "confirm": ("confirmed", True)}
THEN = ("", "", "say", "slow")  # what is said right after a stop

WHO = st.integers(0, len(APPS) - 1)
ANY = st.integers(0, 23)
COIN = st.booleans()


@dataclass(eq=False)
class Turn:
    """Something a person said, under whatever ids."""

    tag: str
    text: str
    kind: str
    sid: str
    client_id: str | None
    pi: int = -1  # the number of the pi it was last given to, if that is known
    safe: bool = False  # an app was told that it is dispatched or has succeeded
    refused: bool = False  # an app was told that it failed
    again: int = 0  # how often a person chose to send it again
    requeued: int = 0  # how often a change of the queue may have written it again
    droppable: bool = False  # a person stopped the turn or emptied the queue
    discarded: bool = False
    decided: float = 0.0  # when a person discarded it
    left: bool = False  # still held after a later one ran, so no pi begins it unasked


@dataclass(eq=False)
class Send:
    """One message of an app that carries a turn."""

    turn: Turn
    app: App
    socket: int
    pi: int  # the number of the session's pi then
    known: bool  # it was called safe before, so this is a duplicate
    conflict: bool = False
    duplicate: bool = False  # the app was told so
    result: Frame | None = None


@dataclass(eq=False)
class Approval:
    """A question of the gate that was shown to somebody."""

    id: str
    sid: str
    command: str
    pi: int
    allowed: bool = False
    settled: bool = False
    tried: int = 0  # answers `allow` that were not refused, or not yet


class World:
    """The server that all examples of one dialect share."""

    def __init__(self, rig: Rig, starts: Path) -> None:
        self.rig, self.server, self.starts_file = rig, rig.server, starts
        self.wid = rig.workspace()
        self.tokens = [self.server.pair(generation).token for _, generation in APPS]
        self.control = rig.phone()
        self.steps = self.examples = 0
        self.begin = time.monotonic()
        self.tags = 0
        self.failure: Lost | None = None
        self._log_position = 0
        self._writes: dict[str, int] = {}
        self._emptied = 0  # how often some pi was made to forget its queue
        self._emptied_before: dict[str, int] = {}  # and how often before a turn was written first
        self._verdicts: dict[str, list[str]] = {}

    @property
    def over(self) -> bool:
        """Whether there is nothing more to find out: hypothesis would play a failure again, which proves nothing."""
        return self.failure is not None

    def in_time(self) -> None:
        """A machine that is too slow, or a server that hangs, is a failure and never a pass with less."""
        need(time.monotonic() - self.begin < EMERGENCY, f"only {self.steps} steps in {EMERGENCY:.0f} s")

    def phone(self, number: int) -> Phone:
        return Phone(self.server.base_url, self.tokens[number], APPS[number][1])

    def new_tag(self) -> str:
        self.tags += 1
        return f"t{self.tags}"

    def starts(self, sid: str) -> int:
        """How many pis this session has had."""
        lines = self.starts_file.read_text("utf-8").split("\n") if self.starts_file.exists() else []
        return lines.count(sid)

    def _read_log(self) -> None:
        """Take in what was written to any pi since the last time."""
        with contextlib.suppress(FileNotFoundError), self.rig.log.open("rb") as file:
            file.seek(self._log_position)
            data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._log_position += len(whole)
            for line in map(json.loads, whole.splitlines()):
                if line["type"] in ("prompt", "steer", "follow_up"):
                    self._writes[line["message"]] = self._writes.get(line["message"], 0) + 1
                    self._emptied_before.setdefault(line["message"], self._emptied)
                elif line["type"] in ("clear_queue", "switch_session"):
                    self._emptied += 1
                elif line["type"] == "extension_ui_response" and '"verdict"' in (line.get("value") or ""):
                    verdict = json.loads(line["value"])
                    self._verdicts.setdefault(verdict["toolCallId"], []).append(verdict["verdict"])

    def writes(self, text: str) -> int:
        """How often this turn was written to a pi."""
        self._read_log()
        return self._writes.get(text, 0)

    def emptied_since(self, text: str) -> int:
        """How often this turn may have been taken out of a queue, to be written again."""
        return self._emptied - self._emptied_before.get(text, self._emptied)

    def verdicts(self, call_id: str) -> list[str]:
        """What the gate was answered about a call."""
        self._read_log()
        return self._verdicts.get(call_id, [])

    def pi_of(self, sid: str) -> list[int]:
        """Process ids of a session's pi."""
        return [pid for pid, line in self.server.orphans() if f"/pi/{sid}" in line and "--mode" in line]

    def sessions(self) -> dict[str, Any]:
        return {session["id"]: session for session in self.control.sessions(self.wid)}


def one_of(patterns: Iterable[str], text: str) -> bool:
    return any(re.fullmatch(pattern, text, re.S) for pattern in patterns)


class NothingToDo(Exception):
    """A step found nothing that it could be applied to."""


def pick(things: Iterable[Any], number: int) -> Any:
    """One of these."""
    found = list(things)
    if not found:
        raise NothingToDo
    return found[number % len(found)]


def step(function: Callable[..., None]) -> Callable[..., None]:
    """Count a step, unless it had nothing to do, apply what arrived, and let a failure tell what led to it."""

    @functools.wraps(function)
    def run(self: Model, **choices: Any) -> None:
        if self.world.over:
            return
        self.note(function.__name__, **choices)
        with self.telling(), contextlib.suppress(NothingToDo):
            self.world.in_time()
            function(self, **choices)
            self.world.steps += 1
            self.pump()

    return run


class Model(RuleBasedStateMachine):
    """Rules choose by numbers, which are taken modulo what there is, so that chance never depends on timing."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.story: list[str] = []
        self.truth = Truth()
        self.turns: list[Turn] = []
        self.sends: dict[str, Send] = {}
        self.approvals: dict[str, Approval] = {}
        self.refused_answers: list[str] = []  # ids of questions whose answer came too late
        self.answered_dialogs: set[str] = set()
        self.killed: dict[str, int] = {}  # session id -> number of its pi that was killed last
        self.sids: list[str] = []
        self.begin = time.monotonic()
        self.world.examples += 1
        world = self.world
        self.apps = [App(name, world.phone(i), world.wid, self.truth, self.watch) for i, (name, _) in enumerate(APPS)]
        if not self.world.over:
            with self.telling():
                self.create()
                self.create()

    # ---- telling what happened ---------------------------------------------------------------------------------------

    def note(self, *words: object, **fields: object) -> None:
        told = " ".join(map(str, words)) + "".join(f" {name}={value}" for name, value in fields.items())
        self.story.append(f"{time.monotonic() - self.begin:8.3f} {told}")

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        try:
            yield
        except NothingToDo:
            raise
        except Exception as error:
            story = "\n".join(self.story[-150:])
            told = "\n".join(app.recently() for app in self.apps)
            report = self.world.server.report("")
            text = f"{type(error).__name__}: {error}\n\nThe steps before:\n{story}\n\n{told}\n{report}"
            self.world.failure = Lost(text)
            raise self.world.failure from error

    # ---- what the apps are told --------------------------------------------------------------------------------------

    def pump(self) -> None:
        for app in self.apps:
            app.pump()

    def watch(self, app: App, frame: Frame, sid: str) -> None:
        """Every frame that an app has applied."""
        kind = frame["type"]
        if kind == "turn_ack":
            self.on_ack(app, frame)
        elif kind in ("command_result", "rpc_result"):
            self.on_result(frame)
        elif kind == "permission_request":
            self.on_question(frame)
        elif kind == "error":
            self.on_error(app, frame)

    def on_ack(self, app: App, frame: Frame) -> None:
        turn = next((t for t in self.turns if t.client_id == frame["clientTurnId"]), None)
        if turn is None:
            raise Lost(f"{app.name}: an acknowledgement of a turn nobody sent: {frame}")
        turn.safe |= frame["stage"] != "accepted"
        need(frame["command"] == turn.kind, f"{frame} acknowledges a {turn.kind}")
        send = self.sends.get(frame.get("requestId") or "")
        if frame.get("duplicate"):
            need(send is not None and send.app is app, f"{app.name}: {frame} answers nothing that it sent")
            assert send
            send.duplicate = True
        elif send:
            turn.pi = send.pi

    def on_result(self, frame: Frame) -> None:
        send = self.sends.get(frame.get("requestId") or "")
        if send is None:
            return
        send.result, turn = frame, send.turn
        if send.conflict:
            wanted = f"clientTurnId conflict: {turn.client_id}"
            inactive = frame.get("error") == f"Session not active: {turn.sid}"
            need(frame.get("error") == wanted or inactive, f"{frame} instead of {wanted}")
        elif frame["success"]:
            need(send.duplicate or not send.known, f"{turn.tag} was repeated and taken for a new turn: {frame}")
            turn.safe = True
            turn.pi = turn.pi if send.duplicate else send.pi
        else:
            reasons = REFUSALS[:1] if send.known else REFUSALS
            need(one_of(reasons, frame["error"]), f"{turn.tag}, known={send.known}: {frame}")
            need(send.known or not self.told_safe(send), f"{turn.tag} was called safe, and then: {frame}")
            turn.refused = True

    def told_safe(self, send: Send) -> bool:
        """Whether this app was told before that its turn is safe.

        When it was sent twice, one may be refused before pi runs and the other one not.  Only on one socket it is
        known what came first, and whoever looks at the session is told there of the acknowledgement.
        """
        turn = send.turn
        alone = not any(other.turn is turn and other is not send for other in self.sends.values())
        return turn.safe if alone else send.app.stages.get(turn.client_id or "", 0) >= 1

    def on_question(self, frame: Frame) -> None:
        if frame["id"] not in self.approvals:
            command = frame["input"]["command"]
            approval = Approval(frame["id"], frame["sessionId"], command, self.world.starts(frame["sessionId"]))
            self.approvals[frame["id"]] = approval

    def on_error(self, app: App, frame: Frame) -> None:
        text = frame["error"]
        unknown = re.fullmatch(r"(?:Permission request|UI request) not found: (.*)", text)
        if unknown:
            self.refused_answers.append(unknown.group(1))
        elif "seq" in frame:
            need(one_of(ERRORS, text), f"{app.name}: an error nobody made: {frame}")
        else:
            need(one_of(REFUSALS, text), f"{app.name}: an error nobody made: {frame}")

    # ---- doing things ------------------------------------------------------------------------------------------------

    def create(self) -> str:
        sid = str(self.world.control.create_session(self.world.wid)["id"])
        self.sids.append(sid)
        return sid

    def others(self, sid: str) -> tuple[str, ...]:
        return tuple(other for other in self.sids if other != sid)

    def enter(self, app: App, sid: str) -> None:
        self.note(app.name, "enters", sid)
        app.enter(sid, self.others(sid))

    def viewer(self, who: int, which: int) -> App:
        """This app, looking at some session."""
        app = self.apps[who]
        if not app.viewing:
            self.enter(app, app.current or self.sids[which % len(self.sids)])
        return app

    def new_turn(self, sid: str, kind: str, script: str, with_id: bool) -> Turn:
        tag = self.world.new_tag()
        text = f"{tag} {script}\n{SCRIPTS[script]}".replace("TAG", tag).strip()
        turn = Turn(tag, text, kind, sid, f"turn-{tag}-{new_id()}" if with_id else None)
        self.turns.append(turn)
        return turn

    def post(self, app: App, turn: Turn, text: str = "") -> Send:
        """Send a turn, or another one under its id."""
        request = new_id()
        known = turn.safe and turn.client_id is not None
        pi = self.world.starts(turn.sid)
        send = self.sends[request] = Send(turn, app, app.socket_number, pi, known, bool(text))
        self.note(app.name, "sends", turn.kind, repr(turn.text), "to", turn.sid, "known" if known else "", bool(text))
        turn.refused &= known
        app.send(turn.kind, message=text or turn.text, requestId=request, clientTurnId=turn.client_id)
        return send

    def settled_send(self, send: Send) -> None:
        """Both apps give up on a message that is not dispatched or answered after 4 s."""
        turn = send.turn
        what = f"{turn.kind} {turn.tag} is acknowledged"
        app = send.app
        app.until(lambda: send.result or app.stages.get(turn.client_id or "", 0) >= 1, what, SEND_TIMEOUT)

    def say(self, app: App, kind: str, script: str, with_id: bool, wait: bool) -> Turn:
        turn = self.new_turn(app.current, kind, script, with_id)
        send = self.post(app, turn)
        if wait:
            self.settled_send(send)
        return turn

    def droppable(self, sid: str) -> None:
        """A person stops the turn or the session: what waits in the queue may go with it."""
        for turn in self.turns:
            if turn.sid == sid:
                turn.droppable = True

    def answer(self, app: App, approval: Approval, action: str) -> bool:
        """Answer a question of the gate; whether the answer came in time."""
        self.note(app.name, action, approval.id, approval.command)
        before = self.refused_answers.count(approval.id)
        app.phone.answer(approval.id, action)
        app.cards.pop(approval.id, None)
        app.sync()
        in_time = self.refused_answers.count(approval.id) == before
        if in_time:
            need(not approval.settled, f"two answers to {approval} were accepted")
            approval.settled, approval.allowed = True, action == "allow"
        return in_time

    def answer_dialog(self, app: App, dialog: Frame, **answer: Any) -> bool:
        """Answer a dialog of the chat the app shows; whether the answer was the first, and came before pi ended."""
        self.note(app.name, "answers", dialog["id"], dialog.get("title"), answer)
        before = len(app.phone.frames)
        refusals = (f"UI request not found: {dialog['id']}", f"Session not active: {app.current}")
        app.phone.answer_dialog(dialog["id"], app.current, **answer)
        app.sync()
        app.dialogs.pop(dialog["id"], None)
        told = [frame for frame in app.phone.frames[before:] if frame["type"] == "error"]
        in_time = not any(frame["error"] in refusals for frame in told)
        key = self.asked_once(dialog)
        need(not in_time or key not in self.answered_dialogs, f"two answers to {dialog} were accepted")
        self.answered_dialogs.add(key)
        return in_time

    def asked_once(self, dialog: Frame) -> str:
        """The question, which for a lost turn is put again at each start."""
        key = str(dialog["id"])
        return f"{key} of pi {self.world.starts(dialog['sessionId'])}" if key.startswith("held-") else key

    def provoke(self, app: App, script: str, check: Callable[[], object]) -> None:
        """Let the agent ask, and wait for what a pi may not come to say: it may be about to die, or be busy."""
        turn = self.say(app, "prompt", script, True, True)
        with contextlib.suppress(PhoneError):
            app.until(lambda: check() or turn.refused, "something is asked", 0.3)

    def asked_about(self, app: App, which: int) -> Approval:
        """An approval that the app shows; if there is none, the agent asks for one."""
        if not app.cards:
            self.provoke(app, "ask", lambda: app.cards)
        return self.approvals[pick(sorted(app.cards), which)]

    def open_dialogs(self, app: App) -> list[Frame]:
        shown = [dialog for dialog in app.dialogs.values() if dialog["sessionId"] == app.current]
        return [dialog for dialog in shown if self.asked_once(dialog) not in self.answered_dialogs]

    def answer_held(self, app: App, dialog: Frame, choice: str) -> None:
        """Decide about a turn that pi lost."""
        need(dialog["options"] == ["Send again", "Discard"], f"{app.name}: {dialog}")
        turn = next((t for t in self.turns if re.search(rf"\b{t.tag}\b", dialog["title"])), None)
        if turn is None:
            raise Lost(f"{dialog} does not name the turn it asks about")
        pi = self.world.starts(turn.sid)
        if choice == "Send again":
            turn.again += 1
        in_time = self.answer_dialog(app, dialog, **({"value": choice} if choice else {"cancelled": True}))
        if in_time and choice == "Send again":
            turn.pi, turn.droppable, turn.left = pi, False, False
        if in_time and choice == "Discard":
            turn.discarded, turn.decided = True, time.monotonic()

    # ---- rules: people -----------------------------------------------------------------------------------------------

    @rule(who=WHO, which=ANY, script=st.sampled_from(sorted(SCRIPTS)), with_id=COIN, wait=COIN)
    @step
    def prompt(self, who: int, which: int, script: str, with_id: bool, wait: bool) -> None:
        self.say(self.viewer(who, which), "prompt", script, with_id or not wait, wait)

    @rule(who=WHO, which=ANY, script=st.sampled_from(GENTLE), wait=COIN)
    @step
    def prompt_gently(self, who: int, which: int, script: str, wait: bool) -> None:
        self.say(self.viewer(who, which), "prompt", script, True, wait)

    @rule(who=WHO, which=ANY, kind=st.sampled_from(("steer", "follow_up")), script=st.sampled_from(GENTLE), wait=COIN)
    @step
    def queue(self, who: int, which: int, kind: str, script: str, wait: bool) -> None:
        self.say(self.viewer(who, which), kind, script, True, wait)

    @rule(who=WHO, which=ANY, kind=st.sampled_from(("steer", "follow_up")), script=st.sampled_from(GENTLE))
    @step
    def begin_and_queue(self, who: int, which: int, kind: str, script: str) -> None:
        """As two people do who do not wait for each other."""
        app = self.viewer(who, which)
        self.say(app, "prompt", "slow", True, True)
        self.say(app, kind, script, True, True)

    @rule(who=WHO, which=ANY, script=st.sampled_from(GENTLE), reconnect=COIN)
    @step
    def rush(self, who: int, which: int, script: str, reconnect: bool) -> None:
        """Open a chat and say something before it is shown; then perhaps lose the network and repeat it."""
        app, sid = self.apps[who], self.sids[which % len(self.sids)]
        app.lose()
        self.note(app.name, "rushes to", sid)
        app.open(sid)
        turn = self.new_turn(sid, "prompt", script, True)
        send = self.post(app, turn)
        if reconnect:
            app.lose()
            app.open(sid)
            send = self.post(app, turn)
        self.settled_send(send)
        app.until(lambda: app.shown(sid), f"{sid} is shown")

    @rule(who=WHO, which=ANY, other_text=st.sampled_from((False, False, False, True)), wait=COIN)
    @step
    def repeat(self, who: int, which: int, other_text: bool, wait: bool) -> None:
        """Send a turn again with the same id, from whatever phone and after whatever happened since."""
        if not self.turns:
            self.say(self.viewer(who, which), "prompt", "say", True, False)
        turns = [t for t in self.turns[-8:] if t.client_id and not (t.again or t.discarded)]
        turn = pick(turns, which)
        app = self.apps[who]
        if not app.viewing or app.current != turn.sid:
            self.enter(app, turn.sid)
        send = self.post(app, turn, "another text" if other_text and turn.safe else "")
        if wait:
            self.settled_send(send)

    @rule(who=WHO, which=ANY, kind=st.sampled_from(("stop", "abort")), told=COIN, then=st.sampled_from(THEN))
    @step
    def stop(self, who: int, which: int, kind: str, told: bool, then: str) -> None:
        """Abort the turn, and perhaps say the next thing at once."""
        app = self.viewer(who, which)
        self.droppable(app.current)
        app.send(kind, **({"requestId": new_id()} if told else {}))
        if then:
            self.say(app, "prompt", then, True, False)
        app.sync()

    @rule(who=WHO, which=ANY, how=st.sampled_from(("rest", "socket", "at once")))
    @step
    def end(self, who: int, which: int, how: str) -> None:
        """End the session."""
        app = self.viewer(who, which)
        self.droppable(app.current)
        if how == "at once":
            app.send("stop_session")
        elif how == "socket":
            need(app.request("stop_session")["success"], "stop_session failed")
        else:
            ended = app.phone.stop(self.world.wid, app.current)["session"]
            need(ended["status"] == "stopped", f"{ended} after stop")

    @rule(who=WHO, which=ANY)
    @step
    def resume(self, who: int, which: int) -> None:
        session = self.apps[who].phone.resume(self.world.wid, self.sids[which % len(self.sids)])
        need(session["status"] in ("ready", "busy", "stopping"), f"{session} after resume")

    @rule(who=WHO, which=ANY)
    @step
    def go(self, who: int, which: int) -> None:
        """Look at another chat, or come back to one."""
        self.enter(self.apps[who], self.sids[which % len(self.sids)])

    @rule(who=WHO, politely=COIN)
    @step
    def leave(self, who: int, politely: bool) -> None:
        """Lose the network, or say goodbye."""
        self.note(self.apps[who].name, "is lost")
        self.apps[who].lose(politely=politely)

    @rule(who=WHO, which=ANY)
    @step
    def come_back(self, who: int, which: int) -> None:
        """Lose the network for a moment."""
        app = self.viewer(who, which)
        app.lose()
        self.enter(app, app.current)

    @rule(who=WHO, which=ANY)
    @step
    def wait(self, who: int, which: int) -> None:
        """Watch until the chat is at rest or asks something."""
        app = self.viewer(who, which)
        memory = app.of(app.current)

        def still() -> bool:
            asking = app.current in app.cards.values() or self.open_dialogs(app)
            return memory.status in AT_REST or bool(asking)

        app.until(still, f"{app.current} is at rest")

    @rule(who=WHO, which=ANY, action=st.sampled_from(("allow", "deny")))
    @step
    def decide(self, who: int, which: int, action: str) -> None:
        """Answer an approval that the app shows."""
        app = self.viewer(who, which)
        self.answer(app, self.asked_about(app, which), action)

    @rule(who=WHO, which=ANY)
    @step
    def decide_twice(self, who: int, which: int) -> None:
        """Two people answer the same question at the same moment: the verdict is one of both."""
        one, two = self.viewer(who, which), self.viewer((who + 1) % len(APPS), which)
        approval = self.asked_about(one, which)
        for app in (one, two):
            app.sync()
        if not (approval.id in one.cards and approval.id in two.cards):
            raise NothingToDo
        self.note(one.name, "and", two.name, "answer", approval.id, approval.command)
        one.phone.answer(approval.id, "allow")
        two.phone.answer(approval.id, "deny")
        for app in (one, two):
            app.cards.pop(approval.id, None)
            app.sync()
        self.pump()
        refused = self.refused_answers.count(approval.id)
        need(refused >= 1, f"two answers to {approval} were accepted")
        approval.settled = approval.allowed = True  # perhaps; what is sure is that pi gets one verdict

    @rule(who=WHO, which=ANY, rest=COIN)
    @step
    def decide_too_late(self, who: int, which: int, rest: bool) -> None:
        """Allow what is not asked any more: it was answered, or its turn, session or server has ended."""
        app = self.viewer(who, which)
        if not self.approvals:
            self.answer(app, self.asked_about(app, which), "deny")
        pending = {item["id"] for item in app.phone.pending()}
        approval = self.approvals[pick(sorted(self.approvals.keys() - pending), which)]
        if rest:
            status, answer = app.phone.request("POST", f"/permissions/{approval.id}/respond", {"action": "allow"})
            need((status, answer["error"]) == (404, "Permission request not found"), f"{approval}: {status} {answer}")
        else:
            approval.settled, was = False, (approval.settled, approval.allowed)
            need(not self.answer(app, approval, "allow"), f"{approval} is over and was allowed")
            approval.settled, approval.allowed = was

    @rule(who=WHO, which=ANY, choice=st.sampled_from(("Send again", "Discard", "")))
    @step
    def answer_question(self, who: int, which: int, choice: str) -> None:
        """Answer a dialog of an extension, or one about a turn that was lost."""
        app = self.viewer(who, which)
        if not self.open_dialogs(app):
            self.provoke(app, "select", lambda: self.open_dialogs(app))
        dialog = pick(sorted(self.open_dialogs(app), key=lambda d: str(d["id"])), which)
        if dialog["id"].startswith("held-"):
            self.answer_held(app, dialog, choice)
        else:
            field, value = ANSWERS[dialog["method"]]
            self.answer_dialog(app, dialog, **{field: value})

    @rule(who=WHO, which=ANY)
    @step
    def answer_question_again(self, who: int, which: int) -> None:
        """The first answer wins; later ones are told so."""
        app = self.viewer(who, which)
        key = pick(sorted(key for key in self.answered_dialogs if not key.startswith("held-")), which)
        before = self.refused_answers.count(key)
        app.phone.answer_dialog(key, app.current, value="green")
        app.sync()
        gone = app.of(app.current).status in ("stopped", "error")
        need(gone or self.refused_answers.count(key) > before, f"a second answer to {key} was accepted")

    @rule(who=WHO, which=ANY)
    @step
    def rename(self, who: int, which: int) -> None:
        app, name = self.viewer(who, which), self.world.new_tag()
        result = app.request("set_session_name", name=name)
        if result["success"]:
            shown = self.world.sessions()[app.current].get("name")
            need(shown == name, f"{app.current} is called {shown}, not {name}")
        else:
            need(one_of(REFUSALS, result["error"]), f"rename: {result}")

    @rule(who=WHO, which=ANY, what=st.sampled_from(("get_state", "get_commands", "get_queue", "get_session_stats")))
    @step
    def look(self, who: int, which: int, what: str) -> None:
        app = self.viewer(who, which)
        app.send(what, requestId=new_id())

    @rule(who=WHO, which=ANY, back=st.integers(0, 60))
    @step
    def ask_for_events(self, who: int, which: int, back: int) -> None:
        """What is called complete is complete, and nothing else is told."""
        sid = self.sids[which % len(self.sids)]
        since = max(0, self.truth.last(sid) - back)
        path = f"/workspaces/{self.world.wid}/sessions/{sid}/events?since={since}"
        status, reply = self.apps[who].phone.request("GET", path)
        if status == 404:
            need(reply["error"] == "Session not active", f"{path}: {reply}")
            return
        seqs = [event["seq"] for event in reply["events"]]
        wanted = list(range(since + 1, reply["currentSeq"] + 1)) if reply["catchUpComplete"] else []
        need(seqs == wanted, f"{path}: {seqs} instead of {wanted}")
        for event in reply["events"]:
            self.truth.add(sid, event, "events")

    @rule(who=WHO, which=ANY, drop=COIN, add=COIN, script=st.sampled_from(GENTLE))
    @step
    def edit_queue(self, who: int, which: int, drop: bool, add: bool, script: str) -> None:
        """Replace the queue: reorder it, take something out, put something in."""
        app = self.viewer(who | 1, which)  # only app 1.1 can
        if not add:
            self.say(app, "prompt", "slow", True, True)
            self.say(app, "follow_up", script, True, True)
        queue = app.request("get_queue").get("data")
        if queue is None:
            raise NothingToDo
        waiting = [(kind, item) for kind in ("steering", "followUp") for item in queue[kind]]
        kept = list(reversed(waiting[1:] if drop else waiting))
        for turn in self.turns:
            if any(turn.text == item["message"] for _, item in waiting[: drop or 0]):
                turn.droppable = True
            if any(turn.text == item["message"] for _, item in kept):
                turn.requeued, turn.left = turn.requeued + 1, False
        lists: dict[str, list[Any]] = {"steering": [], "followUp": []}
        for kind, item in kept:
            lists[kind].append({"id": item["id"], "message": item["message"], "createdAt": item["createdAt"]})
        new = self.new_turn(app.current, "follow_up", script, False) if add else None
        if new:
            new.droppable = True  # it is no turn command, so nothing holds it
            lists["followUp"].append({"message": new.text})
        self.note(app.name, "sets queue", queue["version"], lists)
        result = app.request("set_queue", baseVersion=queue["version"], **lists)
        if result["success"] and new:
            new.safe = True
        need(result["success"] or one_of(QUEUE_REFUSALS, result["error"]), f"set_queue: {result}")

    @rule(who=WHO)
    @step
    def new_session(self, who: int) -> None:
        """Somebody opens a new chat."""
        if len(self.sids) < SESSIONS:
            self.create()
        self.enter(self.apps[who], self.sids[-1])

    # ---- rules: faults -----------------------------------------------------------------------------------------------

    @rule(who=WHO, which=ANY, script=st.sampled_from(GENTLE), idle=COIN)
    @step
    def kill_pi(self, who: int, which: int, script: str, idle: bool) -> None:
        """The system takes pi away, perhaps in the middle of something."""
        app = self.viewer(who, which)
        sid = app.current
        if not idle:
            self.say(app, "prompt", script, True, False)
        self.note("kill pi of", sid)
        for pid in self.world.pi_of(sid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                self.killed[sid] = self.world.starts(sid)

    @rule(who=WHO, which=ANY, what=st.sampled_from((*3 * ("network",), *2 * ("kill",), "terminate")))
    @step
    def outage(self, who: int, which: int, what: str) -> None:
        """Nobody can reach the server for a moment; seldom, because that takes time, it ends and comes back."""
        if what == "network":
            for app in self.apps:
                app.lose()
            self.enter(self.apps[who], self.sids[which % len(self.sids)])
        else:
            self.restart(what)

    def restart(self, what: str) -> None:
        """The server ends, politely or not, and comes back on the same data."""
        self.pump()
        server = self.world.server
        if what == "kill":
            server.kill()
            self.forget_decisions()
        else:
            server.stop()
        server.start()
        for app in self.apps:
            app.lose()
        for sid in self.sids:
            if what == "kill":
                self.truth.cut(sid)
        left = server.wait_no_orphans()
        need(not left, f"left behind by the server that was ended: {left}")
        for sid, session in self.world.sessions().items():
            fresh = session["status"] == "starting" and not self.world.starts(sid)
            need(session["status"] in ("stopped", "error") or fresh, f"{sid} is {session['status']} after a restart")

    def forget_decisions(self) -> None:
        """No answer to a dialog is acknowledged (stream.md 2.7), so one of just before may be gone with the server.

        Then the message has to be held as before, and a person is asked about it again.
        """
        late = time.monotonic() - WRITTEN
        for turn in self.turns:
            if turn.discarded and turn.decided > late and turn.text in self.on_disk(turn.sid):
                self.note(turn.tag, "is held again")
                turn.discarded = False

    def on_disk(self, sid: str) -> list[str]:
        """The texts of the turns that the server holds for this session over its end."""
        stored = json.loads((self.world.server.data / "turns" / f"{sid}.json").read_text("utf-8"))
        return [turn["text"] for turn in stored["turns"] if turn["payload"] is not None]

    # ---- rest --------------------------------------------------------------------------------------------------------

    @rule(which=ANY)
    @step
    def settle(self, which: int) -> None:
        self.come_to_rest()

    def come_to_rest(self) -> None:
        """Answer what is asked, wait until nothing is under way, and compare everything with everything."""
        self.note("come to rest")
        self.quieten()
        active = [sid for sid, session in self.world.sessions().items() if session["status"] == "ready"]
        for sid in self.sids:
            self.until_true(lambda sid=sid: self.check_history(sid))  # type: ignore[misc]
        for app in self.apps:
            for sid in self.sids:
                if sid in active and sid in app.memory:
                    self.enter(app, sid)
        self.pump()
        for sid in self.sids:
            self.check_stream(sid, sid in active)
        for app in self.apps:
            left = {key for key in app.cards if self.approvals[key].sid in self.sids}
            need(not left, f"{app.name} still shows approvals that nobody can give any more: {left}")
        self.check_sends()

    def quieten(self) -> None:
        """Until no session is busy and nothing is on its way to make one busy.  Whoever is asked declines."""
        begin = time.monotonic()
        probes: dict[str, tuple[Turn, list[Turn]]] = {}
        for app in self.apps:
            if app.online:
                app.sync()  # a session that it ends is being ended now
        while True:
            self.pump()
            pending = [item for item in self.world.control.pending() if item["sessionId"] in self.sids]
            statuses = self.statuses()
            busy = [sid for sid in self.sids if statuses[sid] not in (*AT_REST, "starting")]
            waiting = [send.turn for send in self.sends.values() if self.unanswered(send)]
            if not (pending or busy or waiting):
                waiting = self.under_way(statuses)
                if not (waiting or self.probing(statuses, probes)) and statuses.items() <= self.statuses().items():
                    return
            if time.monotonic() > begin + 2 * PATIENCE:
                for turn in waiting:
                    self.note(turn.tag, "written:", self.world.writes(turn.text), "in history:", self.ran(turn))
                raise Lost(f"not at rest: {statuses}, pending {pending}, waiting {waiting}")
            for sid in busy:
                app = self.onlooker(sid)
                for dialog in self.open_dialogs(app):
                    if not dialog["id"].startswith("held-"):
                        self.answer_dialog(app, dialog, cancelled=True)
            for item in pending:
                self.decline(item)
            time.sleep(0.005)

    def ran(self, turn: Turn) -> int:
        trace = self.world.control.session_detail(self.world.wid, turn.sid)["trace"]
        return [text for role, text in spoken(trace) if role == "user"].count(turn.text)

    def statuses(self) -> dict[str, str]:
        return {sid: session["status"] for sid, session in self.world.sessions().items() if sid in self.sids}

    def onlooker(self, sid: str) -> App:
        """An app that looks at this session."""
        app = next((app for app in self.apps if app.viewing and app.current == sid), None)
        if app is None:
            app = self.apps[1]
            self.enter(app, sid)
        return app

    def held(self, sid: str) -> list[Turn]:
        """What the server keeps because pi has not written it down."""
        trace = self.world.control.session_detail(self.world.wid, sid)["trace"]
        texts = [event["text"] for event in trace if event["id"].startswith("held-")]
        return [turn for turn in self.turns if turn.sid == sid and turn.text in texts]

    def under_way(self, statuses: dict[str, str]) -> list[Turn]:
        """Turns that a pi that is alive was given and has not written down, though it is idle: it will begin at once.

        One that a person stopped may never begin.
        """
        ready = [sid for sid in self.sids if statuses[sid] == "ready"]
        held = [turn for sid in ready for turn in self.held(sid)]
        return [turn for turn in held if turn.pi == self.world.starts(turn.sid) and not turn.droppable]

    def probing(self, statuses: dict[str, str], probes: dict[str, tuple[Turn, list[Turn]]]) -> bool:
        """Whether it has still to be found out if anything else that is held in an idle session is about to begin.

        Which pi a turn goes to that came while one started, nobody is told, nor whether a stop was in time for it.  But
        turns are played in their order: what is still held when a later one, its probe, has been played was left by an
        earlier pi.
        """
        unknown = False
        for sid in (sid for sid in self.sids if statuses[sid] == "ready"):
            probe, before = probes.pop(sid, (None, []))
            for turn in before:
                turn.left |= bool(probe and self.ran(probe))
            unclear = [turn for turn in self.held(sid) if not turn.left]
            if unclear:
                probes[sid] = self.say(self.onlooker(sid), "prompt", "plain", True, True), unclear
            unknown |= bool(unclear) or self.killed.get(sid) == self.world.starts(sid)  # not noticed yet
        return unknown

    def decline(self, item: Any) -> None:
        self.note("decline", item["id"])
        body = {"action": "deny"}
        status, _ = self.world.control.request("POST", f"/permissions/{item['id']}/respond", body)
        need(status in (200, 404), f"an answer to {item}: {status}")
        self.on_question(item)
        if status == 200:
            need(not self.approvals[item["id"]].settled, f"two answers to {item} were accepted")
            self.approvals[item["id"]].settled = True

    def unanswered(self, send: Send) -> bool:
        """Whether an app still waits for the result of a turn on the socket on which it asked for it."""
        return send.result is None and send.app.online and send.app.socket_number == send.socket

    def until_true(self, check: Callable[[], None]) -> None:
        """What pi writes to its file comes a little after what it tells."""
        deadline = time.monotonic() + PATIENCE
        while True:
            self.pump()
            try:
                check()
                return
            except Lost:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def check_history(self, sid: str) -> None:
        """Every turn is in pi's history once, or shown as held, or was given up by a person."""
        detail = self.world.control.session_detail(self.world.wid, sid)
        trace, status = detail["trace"], detail["session"]["status"]
        users = [text for role, text in spoken(trace) if role == "user"]
        held = [event["text"] for event in trace if event["id"].startswith("held-")]
        tail = [event["id"].startswith("held-") for event in trace]
        need(tail == sorted(tail), f"held turns stand in the middle of {[event['id'] for event in trace]}")
        kept = self.truth.kept(sid)
        said = [message["content"] for message in kept if message.get("role") == "user"]
        need(len(said) == len(set(said)), f"told twice: {said}")
        for turn in (turn for turn in self.turns if turn.sid == sid):
            self.check_turn(turn, users.count(turn.text), held.count(turn.text), status)
        self.check_gate(trace)

    def check_turn(self, turn: Turn, ran: int, held: int, status: str) -> None:
        written = self.world.writes(turn.text)
        told = f"{turn.tag} ran {ran} times, is held {held} times, was written {written} times; {status}: {turn}"
        need(ran <= 1, "run twice: " + told)
        need(ran + held <= 1, "shown twice: " + told)
        need(written <= 1 + turn.again + turn.requeued + self.world.emptied_since(turn.text), "written again: " + told)
        given_up = turn.droppable or turn.discarded
        need(ran + held == 1 or given_up or not turn.safe, "lost: " + told)
        need(not (turn.discarded and held and not turn.droppable), "held though it was discarded: " + told)
        answered = all(send.result for send in self.sends.values() if send.turn is turn)
        if turn.refused and not turn.safe and answered:
            need(ran + held == 0, "kept though an app was told that it failed: " + told)

    def check_gate(self, trace: list[Any]) -> None:
        """A command that nobody allowed in time has not run, and each question was answered once."""
        calls = {event["id"]: event["args"].get("command", "") for event in trace if event["type"] == "toolCall"}
        results = {event["toolCallId"]: event for event in trace if event["type"] == "toolResult"}
        for call, command in calls.items():
            verdicts = self.world.verdicts(call)
            need(len(verdicts) <= 1, f"the gate was answered {verdicts} about {command}")
            if not command.startswith("git push"):
                continue
            allowed = any(a.allowed for a in self.approvals.values() if a.command == command)
            need(allowed or "allow" not in verdicts, f"{command} was allowed by nobody")
            output = results.get(call, {}).get("output", "")
            need("allow" in verdicts or f"ran: {command}" not in output, f"{command} ran with the verdicts {verdicts}")

    def check_stream(self, sid: str, active: bool) -> None:
        self.truth.check(sid)
        for app in self.apps:
            app.check(sid)
        if not active:
            return
        reply = self.world.control.events(self.world.wid, sid, self.truth.last(sid))
        need(not reply["events"], f"nobody was told of {reply['events']}")
        status = self.world.sessions()[sid]["status"]
        for app in self.apps:
            if app.viewing and app.current == sid:
                memory = app.of(sid)
                current = reply["currentSeq"]
                need(memory.last == current, f"{app.name} is at {memory.last}, {sid} at {current}")
                shown = memory.status in (status, "stopped")  # that it was started again is told to nobody
                need(shown, f"{app.name} shows {sid} as {memory.status}, it is {status}")

    def check_sends(self) -> None:
        """A turn is answered, and only a pi that has ended is called that."""
        statuses = self.statuses()
        for send in self.sends.values():
            tag, sid = send.turn.tag, send.turn.sid
            need(not self.unanswered(send), f"{tag}: no result, though the socket is open")
            if send.result and send.result.get("error") == "pi has ended":
                gone = self.world.starts(sid) != send.pi or statuses[sid] != "ready"
                need(gone, f"{tag} was refused by {send.result}, but that pi is still there")

    def teardown(self) -> None:
        """Bring every session back, decide about what was lost, and end them all: nothing may be left running."""
        try:
            if not self.world.over:
                with self.telling():
                    self.last_look()
                    self.clear_away()
        finally:
            for app in self.apps:
                app.close()

    def clear_away(self) -> None:
        for sid in self.sids:
            self.world.control.delete(self.world.wid, sid)
        left = self.world.server.wait_no_orphans()
        need(not left, f"left behind by sessions that were deleted: {left}")

    def last_look(self) -> None:
        """At a new start every turn that pi lost is asked about, one after the other; then all is at rest."""
        self.come_to_rest()
        for number, sid in enumerate(self.sids):
            app = self.apps[number % len(self.apps)]
            app.phone.stop(self.world.wid, sid)
            self.enter(app, sid)
            app.sync()
            trace = self.world.control.session_detail(self.world.wid, sid)["trace"]
            left = [event["id"] for event in trace if event["id"].startswith("held-")]
            while left:
                asked = [dialog for dialog in self.open_dialogs(app) if dialog["id"] in left]
                need(asked, f"{sid} holds {left}, and {app.name} is asked about {list(app.dialogs)}")
                left.remove(asked[0]["id"])
                deadly = "!crash" in asked[0]["title"] or "!halfline" in asked[0]["title"]
                self.answer_held(app, asked[0], "Discard" if deadly or len(left) % 2 else "Send again")
            more = [dialog for dialog in self.open_dialogs(app) if dialog["id"].startswith("held-")]
            need(not more, f"{app.name} is asked about {more}")  # a turn that was sent again may ask something, too
        self.come_to_rest()


@pytest.mark.parametrize("dialect", DIALECTS)
def test_nothing_is_lost_doubled_or_out_of_order(tmp_path: Path, dialect: str) -> None:
    starts = tmp_path / "starts"
    with rig_with(tmp_path, dialect, {"STARTS": str(starts)}) as rig:
        world = World(rig, starts)
        machine = type("Run", (Model,), {"world": world})
        chosen = settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )
        seeds = itertools.count(SEED + 1000 * DIALECTS.index(dialect))
        try:
            while world.steps < ENOUGH:
                run_state_machine_as_test(seed(next(seeds))(machine), settings=chosen)
        finally:
            if world.failure:  # hypothesis plays it again, to no effect, and would call it flaky
                raise world.failure
        took = time.monotonic() - world.begin
        print(f"pi {dialect}: {world.steps} steps in {world.examples} examples, {took:.0f} s")
