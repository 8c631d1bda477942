"""What a person reads when a container, the tool or its services fail, and that the next try works."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.container.boxed import Boxed, boxed_with, eventually, together
from tests.support.phone import quote

NOT_HERE = r"^This workspace runs in a container, and this machine has no `container` program\. Install it .* to host\.$"
TROUBLE = "Error: internalError: it is not a good day\n"


@pytest.fixture(scope="module")
def module_boxed(own_network: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Boxed]:
    with boxed_with(tmp_path_factory.mktemp("faults"), config={"workspaceIdleTimeoutMs": 5000}) as rig:
        yield rig
        rig.sweep()
        names = [name for wid in rig.workspaces.values() for name in rig.names(wid)]
        eventually(lambda: not set(names) & set(rig.apple.running()), 20, "no session that failed stays a guest for ever")


def readable(text: str) -> bool:
    """Whether it is a sentence for a person, and not an accident of this program."""
    return len(text) < 600 and not re.search(r"Internal error|Traceback|Error\(|\[\]|\['|/tmp/|None", text)


# -- death ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["the container", "the exec", "the call"])
def test_a_death_in_the_middle_of_a_turn_is_told_and_the_next_start_goes_on(boxed: Boxed, what: str) -> None:
    chat = boxed.chat()
    chat.play("before")
    chat.say("!slow 100\n!text 400")
    chat.phone.wait("text_delta", sessionId=chat.sid)
    name = boxed.name(chat.wid)
    if what == "the container":
        boxed.apple.die(name)
    elif what == "the exec":
        boxed.apple.end_exec(name, "rpc")
    else:
        (call,) = [c for c in boxed.apple.log() if c["argv"][:2] == ["exec", "-i"] and f"OPPI_SESSION={chat.sid}" in c["argv"]]
        os.kill(call["pid"], signal.SIGKILL)
    error = chat.phone.wait("error", 15, sessionId=chat.sid)["error"]
    chat.phone.wait("session_ended", 15, sessionId=chat.sid, reason="error")
    if what == "the container":
        assert "The workspace's container has ended" in error
    assert readable(error), error
    eventually(lambda: not boxed.pis(chat.wid), 15)
    chat.phone.subscribe(chat.sid)
    chat.play("after")
    assert boxed.users(chat.wid, chat.sid)[0] == "before" and boxed.users(chat.wid, chat.sid)[-1] == "after"
    assert len(boxed.names(chat.wid)) == 1


def test_one_that_cannot_be_ended_inside_ends_with_its_container(boxed: Boxed) -> None:
    chat = boxed.chat(preset="stubborn")
    name = boxed.name(chat.wid)
    chat.say("!hang hard")
    chat.phone.wait("agent_start", sessionId=chat.sid)
    boxed.apple.fault("exec", name, exit=1, stderr=TROUBLE)
    chat.stop()
    eventually(lambda: name not in boxed.apple.running(), 30)
    boxed.apple.healthy()
    chat.phone.subscribe(chat.sid)
    chat.play("again")


def test_an_image_without_pi_says_so(tmp_path: Path) -> None:
    with boxed_with(tmp_path, contents=[{"paths": {}}]) as rig:
        status, text = rig.resume(*rig.session())
        assert status == 500 and "pi: not found" in text and readable(text), text


# -- what this machine is ----------------------------------------------------------------------------------------------


def test_a_machine_without_the_tool_says_what_to_do(tmp_path: Path) -> None:
    with boxed_with(tmp_path, start=False) as rig:
        away = rig.apple.program.rename(rig.apple.bin / "elsewhere")
        rig.server.start()
        wid, sid = rig.session()
        status, text = rig.resume(wid, sid)
        assert status == 500 and re.match(NOT_HERE, text), text
        assert re.match(NOT_HERE, rig.problem(wid))
        fields = {"policyPreset": "host", "hostMount": str(rig.server.workspace), "runtime": "host"}
        host = rig.phone("1.0").create_workspace("host", **fields)
        assert "runtimeProblem" not in host
        here = rig.phone().create_session(host["id"])["id"]
        rig.made.append((host["id"], here))
        rig.join(host["id"], here).play("on this machine")
        begin = time.monotonic()
        rig.server.restart()
        assert time.monotonic() - begin < 15
        away.rename(rig.apple.program)
        rig.join(wid, sid).play("and now in a container")


@pytest.mark.parametrize("version", ["0.9.0", "0.12.0", "1.0.0"])
def test_older_tools_will_do(tmp_path: Path, version: str) -> None:
    with boxed_with(tmp_path, version=version) as rig:
        chat = rig.chat()
        chat.play("hello")
        (words,) = rig.apple.calls("run")
        assert ("--init" in words) == (version != "0.9.0") and ("--cap-drop" in words) == (version not in ("0.9.0",))
        name = rig.name(chat.wid)
        rig.server.kill()
        rig.server.start()
        eventually(lambda: not rig.pis(chat.wid), 20)
        chat = rig.join(chat.wid, chat.sid)
        chat.play("again")
        assert rig.names(chat.wid) == [name] and len(rig.apple.calls("run")) == 1
        rig.server.stop()
        assert not rig.names(chat.wid)


def test_a_system_that_is_too_old_is_named(tmp_path: Path) -> None:
    with boxed_with(tmp_path, macos=15) as rig:
        wid, sid = rig.session()
        status, text = rig.resume(wid, sid)
        assert status == 500 and "macOS 26" in text and readable(text), text
        assert "macOS 26" in rig.problem(wid)
        assert all(complaint.startswith("container network ") for complaint in rig.apple.complaints())


def test_services_that_are_down_are_started(tmp_path: Path) -> None:
    with boxed_with(tmp_path, kernel=False) as rig:
        rig.apple.services(False)
        wid, sid = rig.session()
        rig.apple.fault("system", "start", exit=1, stderr="Error: launchd said no\n", times=1)
        status, text = rig.resume(wid, sid)
        assert status == 500 and "container system start" in text and "launchd said no" in text and readable(text), text
        assert "launchd said no" in rig.problem(wid)
        rig.join(wid, sid).play("hello")
        assert rig.apple.calls("system", "start")[-1][2:] == ["--enable-kernel-install"]
        assert not rig.problem(wid)
        rig.server.stop()
        rig.apple.services(False)
        rig.server.start()
        assert rig.resume(wid, sid)[0] == 200


def test_the_server_serves_while_an_image_is_built_once(tmp_path: Path) -> None:
    with boxed_with(tmp_path, start=False) as rig:
        rig.apple.fault("build", hang=True, times=1)
        rig.server.start()
        sessions = [rig.session("one"), rig.session("two"), rig.session("two")]
        answers = together(*(lambda pair=pair: rig.resume(*pair) for pair in sessions))
        for status, text in answers:
            assert status == 500 and "being prepared" in text and "image" in text and readable(text), text
        assert "being prepared" in rig.problem(sessions[0][0])
        assert rig.phone().health()["ok"]
        (build,) = [call for call in rig.apple.log() if call["argv"][0] == "build"]
        os.kill(build["pid"], signal.SIGKILL)
        eventually(lambda: "build` failed" in rig.problem(sessions[0][0]))
        answers = together(*(lambda pair=pair: rig.resume(*pair) for pair in sessions))
        assert [status for status, _ in answers] == [200] * 3, answers
        assert len(rig.apple.calls("build")) == 2 and len(rig.apple.calls("run")) == 2
        assert not rig.problem(sessions[0][0])


# -- each call ---------------------------------------------------------------------------------------------------------


def absent(rig: Boxed, wid: str, *what: str) -> None:
    """Bring about that a call has to be made: nothing of this is there."""
    if {"container", "image", "network"} & set(what):
        rig.gone(wid)
    for other in rig.workspaces.values():
        if "network" in what:
            rig.gone(other)
    if "image" in what:
        for name in list(rig.apple.store.read()["images"]):
            if name.startswith("oppi-pi:"):
                rig.apple.ok("image", "delete", name)
    if "network" in what:
        for name in list(rig.apple.store.read()["networks"]):
            if name.startswith("oppi-"):
                rig.apple.ok("network", "delete", name)
    if "sweep" in what:
        rig.server.restart()


RULES: dict[str, dict[str, Any]] = {
    "fails": {"exit": 1, "stderr": TROUBLE}, "babbles": {"exit": 0, "stdout": "\x1b[31m}{ garbage"}, "is killed": {"exit": 137}
}  # fmt: skip
CALLS = (  # a call, how it goes wrong, and what is taken away before so that it has to be made
    ("system status", "fails"),
    ("--version", "fails babbles"),
    ("image inspect", "fails babbles"),
    ("image list", "fails", "image"),
    ("build", "fails", "image"),
    ("network inspect", "fails babbles"),
    ("network list", "fails", "network"),
    ("network create", "fails", "network"),
    ("list -a --format", "fails babbles", "sweep"),
    ("inspect", "fails babbles", "container"),
    ("list -a -q", "fails", "container"),
    ("run", "fails babbles is killed", "container"),
    ("exec -i", "fails babbles is killed"),
    ("exec", "fails is killed"),
)


CASES = [(call, fault, missing) for call, faults, *missing in CALLS for fault in RULES if fault in faults]


@pytest.mark.parametrize(("call", "fault", "missing"), CASES)
def test_a_call_that_goes_wrong_is_told_and_the_next_try_works(boxed: Boxed, call: str, fault: str, missing: list[str]) -> None:
    words, (wid, sid) = call.split(), boxed.session("failing")
    absent(boxed, wid, *missing)
    boxed.apple.fault(*words, **RULES[fault])
    before = len(boxed.apple.log())
    status, text = boxed.resume(wid, sid)
    made = [entry["argv"] for entry in boxed.apple.log()[before:]]
    assert any(argv[: len(words)] == words for argv in made), "the fault has not been met"
    assert status == 200 or (status == 500 and readable(text)), text
    boxed.apple.healthy()
    eventually(lambda: len(boxed.pis(wid)) == (status == 200), 15)
    assert len(boxed.names(wid)) <= 1
    for name in boxed.names(wid):
        assert name in boxed.apple.running(), "a container that does not run is left"
    chat = boxed.join(wid, sid)
    chat.play("works again")
    assert len(boxed.pis(wid)) == 1
    chat.stop()


def test_a_subnet_that_is_taken_is_not_insisted_on(boxed: Boxed) -> None:
    wid, sid = boxed.session("subnet")
    absent(boxed, wid, "network")
    for number in range(2):
        text = f"Error: IPv4 subnet 10.{number}.0.0/24 overlaps an existing network with subnet 10.0.0.0/8\n"
        boxed.apple.fault("network", "create", exit=1, stderr=text, times=1)
    assert boxed.resume(wid, sid)[0] == 200
    assert boxed.apple.calls("network", "create")[-1][-2:-1] == ["10.202.0.0/24"]


@pytest.mark.parametrize("rules", [["stop"], ["delete"], ["stop", "delete"]])
def test_a_container_goes_although_it_is_stopped_badly(boxed: Boxed, rules: list[str]) -> None:
    wid, _ = boxed.started(f"bad {'-'.join(rules)}")
    name = boxed.name(wid)
    for call in rules:
        boxed.apple.fault(call, exit=1, stderr=TROUBLE, has=[name], times=1)
    boxed.phone().call("DELETE", f"/workspaces/{quote(wid)}")
    if len(rules) == 2:
        eventually(lambda: len([c for c in boxed.apple.calls("delete") if name in c]) > 1, 30, "it is tried again")
    eventually(lambda: not boxed.names(wid), 30)


def test_calls_that_hang_are_given_up(tmp_path: Path) -> None:
    """All side by side, for each waits for its own limit."""

    def try_with(number: int, call: str, rule: dict[str, Any]) -> float:
        folder = tmp_path / str(number)
        folder.mkdir()
        with boxed_with(folder) as rig:
            wid, sid = rig.session()
            rig.apple.fault(*call.split(), hang=True, deaf=True, times=1, **rule)
            begin = time.monotonic()
            status, text = rig.resume(wid, sid, 120)
            took = time.monotonic() - begin
            assert status == 200 or (status == 500 and readable(text)), (call, text)
            status, text = rig.resume(wid, sid)
            assert status == 200, (call, text)
            assert len(rig.pis(wid)) == 1 and len(rig.names(wid)) == 1, call
            for name in rig.names(wid):
                rig.apple.fault("stop", hang=True, deaf=True, has=[name])
            begin = time.monotonic()
            rig.server.stop()
            assert not rig.names(wid) and time.monotonic() - begin < 12, call
        return took

    calls: list[tuple[str, dict[str, Any]]] = [
        ("system status", {}), ("network create", {}), ("inspect", {}), ("run", {"act": True}), ("exec -i", {}), ("list -a", {}),
    ]  # fmt: skip
    times = together(*(lambda n=n, c=c, r=r: try_with(n, c, r) for n, (c, r) in enumerate(calls)))
    assert max(times) < 90, dict(zip([call for call, _ in calls], times))
