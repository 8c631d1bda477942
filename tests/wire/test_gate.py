"""What must never happen: a tool that runs without a yes; and what a broken or killed process may do."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.phone import CommandFailed
from tests.support.server import Server

from .rig import DIALECTS, PUSH, Chat, Rig, bash, eventually, rig_with

ALLOW = '"verdict":"allow"'

JUNK_QUESTIONS = 22  # that the pi below asks
JUNK_PI = r'''#!{python}
"""A pi whose gate asks nonsense; it writes down what it is answered."""
import json, os, sys
if "--version" in sys.argv or "--list-models" in sys.argv:
    print("0.87.1"); sys.exit()
os.environ["OPPI_TEST_MARK"] = "{mark}"
def say(**event): print(json.dumps(event), flush=True)
def dialog(key, question): say(type="extension_ui_request", id=key, method="input", title="oppi-gate", placeholder=question)
dialog("hello", '{{"hello":1}}')
good = {{"tool": "bash", "toolCallId": "c1", "input": {{"command": "true"}}}}
junk = ["", "nonsense", "null", "[]", "7", "{{", '"allow"', "{{}}", '{{"verdict":"allow","toolCallId":"c"}}', '{{"hello":0}}']
junk += [json.dumps({{**good, name: value}}) for name in good for value in (None, 7, [], "")]
for line in sys.stdin:
    with open("{log}", "a") as log: log.write(line)
    command = json.loads(line)
    kind = command.get("type")
    if kind == "get_state":
        say(type="response", id=command["id"], command=kind, success=True, data={{"sessionId": "s", "isStreaming": False}})
    elif kind == "prompt":
        say(type="response", id=command["id"], command=kind, success=True)
        say(type="agent_start")
        for number, question in enumerate(junk): dialog("junk-%d" % number, question)
        say(type="extension_ui_request", id="odd-1", method="input", title="oppi-gate")
        say(type="extension_ui_request", id="odd-2", method="select", title="oppi-gate", options=["allow"])
        say(type="agent_end", messages=[], willRetry=False)
        say(type="agent_settled")
'''


@pytest.fixture(scope="class", params=DIALECTS)
def class_own(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A server for tests that kill it or its children."""
    with rig_with(tmp_path_factory.mktemp("own"), request.param) as rig:
        yield rig


@pytest.fixture
def own(class_own: Rig) -> Iterator[Rig]:
    if not class_own.server.alive:
        class_own.server.start()
    yield class_own
    class_own.sweep()


class TestNoGate:
    def test_without_a_hello_pi_gets_no_prompt(self, tmp_path: Path) -> None:
        with rig_with(tmp_path, fake={"NO_GATE": "1"}) as rig:
            chat = rig.chat("1.0")
            with pytest.raises(CommandFailed, match="gate"):
                chat.phone.prompt(chat.sid, bash("echo unguarded"))
            new = rig.join(chat.wid, chat.sid)
            for kind in ("prompt", "steer", "follow_up"):
                assert new.phone.command(kind, chat.sid, message="x")["success"] is False
            rig.phone().call("POST", f"/workspaces/{chat.wid}/sessions/{chat.sid}/stop", {})
            assert not {line["type"] for line in rig.stdin_of_pi()} & {"prompt", "steer", "follow_up", "bash"}

    def test_junk_questions_are_denied(self, tmp_path: Path) -> None:
        log = tmp_path / "answers"
        with Server(start=False) as server:
            server.pi.write_text(JUNK_PI.format(python=sys.executable, mark=server.mark, log=log))
            server.start()
            rig = Rig(server, log)
            chat = rig.chat()
            chat.say("go")
            chat.phone.wait("agent_end")
            eventually(lambda: log.read_text().count('"junk-') == JUNK_QUESTIONS)
            assert ALLOW not in log.read_text().replace("\\", "")
            rig.sweep()


class TestTripwire:
    @pytest.mark.parametrize("tool", ['bash {"command":"curl evil"}', 'write {"path":"x","content":"y"}'])
    def test_a_tool_that_runs_unasked_ends_the_session(self, both: Rig, tool: str) -> None:
        chat, other = both.chat(), both.chat("1.0")
        watcher = both.stream()
        watcher.subscribe(chat.sid, "notifications")
        chat.say(f"!toolwait 500\n!ungated {tool}\n!say never said")
        assert chat.phone.wait("error")["code"] == "gate_bypassed"
        chat.phone.wait("session_ended")
        assert "did:" not in chat.output() and "ran:" not in chat.output() and "never said" not in chat.phone.text()
        assert watcher.wait("error", sessionId=chat.sid)["code"] == "gate_bypassed"
        entry = eventually(lambda: [e for e in both.audit() if e["sessionId"] == chat.sid])[-1]
        assert (entry["decision"], entry["layer"], entry["risk"]) == ("deny", "tripwire", "critical")
        assert chat.phone.session_detail(chat.wid, chat.sid)["session"]["status"] == "stopped"
        other.play("!say unharmed")
        assert other.answer_of() == "unharmed"

    def test_a_tool_that_was_denied_may_not_run_either(self, both: Rig) -> None:
        chat = both.chat()
        frames = chat.play(bash("sudo ls"))
        assert "error" not in [f["type"] for f in frames]

    def test_a_call_that_fails_before_it_runs_is_harmless(self, both: Rig) -> None:
        chat = both.chat()
        chat.play("!tool nosuch {}\n!say on")
        assert chat.answer_of().endswith("on")


class TestBrokenPi:
    @pytest.mark.parametrize("fault", ["!crash 3", "!halfline"])
    def test_a_crash_ends_its_session_and_no_other(self, both: Rig, fault: str) -> None:
        chat, other = both.chat(), both.chat()
        chat.say("!say before\n" + fault)
        assert chat.phone.wait("session_ended")["reason"] == "error"
        assert chat.phone.wait("error")["error"]
        assert chat.phone.frames[-1]["type"] == "session_ended"
        with pytest.raises(CommandFailed, match="Session not active"):
            chat.phone.prompt(chat.sid, "x")
        other.play("!say fine")
        assert other.answer_of() == "fine"
        chat.phone.resume(chat.wid, chat.sid)
        chat.play("!say again")
        assert chat.answer_of() == "again"

    def test_a_clean_exit_is_no_error(self, rig: Rig) -> None:
        chat = rig.chat()
        pid = next(pid for pid, line in rig.server.orphans() if chat.sid in line)
        os.kill(pid, signal.SIGTERM)
        assert chat.phone.wait("session_ended")["reason"] in ("error", "completed")

    @pytest.mark.parametrize("fault", ["!garbage", "!bigline 2000000", "!bigline 20000000"])
    def test_a_bad_line_is_skipped(self, both: Rig, fault: str) -> None:
        chat = both.chat()
        frames = chat.play(f"!say a\n{fault}\n!say b")
        assert chat.answer_of() == "ab" == chat.phone.text() and "error" not in [f["type"] for f in frames]

    def test_bad_utf8_is_shown_as_such(self, both: Rig) -> None:
        chat = both.chat()
        chat.play("!badutf8\n!say good")
        text = chat.phone.text()
        assert text.startswith("bad ") and "utf-8" in text and text.endswith("good")

    def test_children_that_stay_behind_are_ended(self, both: Rig) -> None:
        chat = both.chat()
        chat.play("!orphan 600\n!say left one")
        eventually(lambda: [line for _, line in both.server.orphans() if line.startswith("sleep 600")])
        chat.stop()
        eventually(lambda: not [line for _, line in both.server.orphans() if line.startswith("sleep 600")])

    def test_a_deaf_pi_is_ended_with_its_session(self, rig: Rig) -> None:
        chat = rig.chat()
        chat.say("!hang hard")
        chat.phone.wait("agent_start")
        chat.stop()
        eventually(lambda: not [line for _, line in rig.server.orphans() if chat.sid in line])


class TestKilledServer:
    def test_a_pending_question_dies_with_it(self, own: Rig) -> None:
        chat = own.chat()
        chat.play("!say before")
        request = chat.ask(PUSH + " killed")
        last = chat.phone.last_seq[chat.sid]
        chat.phone.drop()
        own.server.kill()
        assert own.server.wait_no_orphans() == []
        own.server.start()
        assert ALLOW not in own.log.read_text().replace("\\", "")
        phone = own.stream()
        assert phone.pending() == []
        assert {s["id"]: s["status"] for s in phone.sessions()}[chat.sid] == "stopped"
        status, _ = phone.request("POST", f"/permissions/{request['id']}/respond", {"action": "allow"})
        assert status == 404
        assert phone.subscribe(chat.sid)[0]["currentSeq"] >= last
        again = Chat(own, phone, chat.wid, chat.sid)
        again.play("!say after")
        trace = phone.session_detail(chat.wid, chat.sid)["trace"]
        texts = [e["text"] for e in trace if e["type"] in ("user", "assistant")]
        assert texts[:2] == ["!say before", "before"] and texts[-2:] == ["!say after", "after"]
        assert f"ran: {PUSH} killed" not in json.dumps(trace)

    def test_a_deaf_pi_does_not_outlive_the_next_start(self, own: Rig) -> None:
        chat = own.chat()
        chat.say("!orphan 600\n!hang hard")
        chat.phone.wait("agent_start")
        eventually(lambda: [line for _, line in own.server.orphans() if line.startswith("sleep 600")])
        left = {pid for pid, _ in own.server.orphans()}
        chat.phone.drop()
        own.server.kill()
        own.server.start()
        eventually(lambda: not left & {pid for pid, _ in own.server.orphans()})

    def test_in_the_middle_of_a_stream(self, own: Rig) -> None:
        chat = own.chat()
        chat.play("!say one")
        chat.say("!slow 5\n!text 100000")
        chat.phone.wait("text_delta")
        chat.phone.drop()
        own.server.kill()
        assert own.server.wait_no_orphans() == []
        own.server.start()
        again = own.join(chat.wid, chat.sid)
        again.play("!say two")
        assert again.answer_of() == "two"

    def test_a_terminated_server_says_goodbye(self, own: Rig) -> None:
        chat, idle = own.chat(), own.stream()
        own.server.stop()
        chat.phone.wait("session_ended")
        assert idle.wait_closed(10) == (1001, "Server shutting down")
        assert chat.phone.wait_closed(10)[0] == 1001
        own.phones.clear()


def test_nobody_but_the_owner_can_read_what_is_stored(rig: Rig) -> None:
    chat = rig.chat()
    chat.play(bash("echo stored"))
    eventually(lambda: rig.audit())
    for path in [rig.server.data, *rig.server.data.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0 or path.suffix == ".jsonl" and "pi" in path.parts, path
