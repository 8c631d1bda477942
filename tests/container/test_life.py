"""How a workspace's container comes, is shared, is left, and goes again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

from tests.container.boxed import Boxed, boxed_with, eventually, together
from tests.container.rig import Apple, alive
from tests.support.phone import quote
from tests.support.server import Server
from tests.wire.rig import MANY

IMAGE = "stranger:local"


def owner_of(data: Path) -> str:
    """What tells the containers of one data directory from those of another."""
    return hashlib.sha256(os.path.realpath(data).encode()).hexdigest()[:10]


def start_stranger(apple: Apple, name: str, *options: str) -> None:
    """A container that no server has started."""
    if apple.call("image", "inspect", IMAGE).returncode:
        apple.build(name=IMAGE)
    apple.ok("run", "-d", "--name", name, "--network", "none", *options, "--entrypoint", "sleep", IMAGE, "1000")


def stays(check: Callable[[], object], seconds: float, what: str) -> None:
    """That something is so for a while, looked at all the time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert check(), what
        time.sleep(0.05)


def test_a_stop_ends_pi_inside_and_leaves_the_container_to_others(boxed: Boxed) -> None:
    one, two = boxed.chat(), boxed.chat()
    one.play("!orphan 4242")
    name, pid = boxed.name(one.wid), boxed.apple.record(boxed.name(one.wid))
    assert pid and len(boxed.pis(one.wid)) == 2
    begin = time.monotonic()
    one.stop()
    eventually(lambda: len(boxed.pis(one.wid)) == 1)
    eventually(lambda: not any("4242" in line for line in boxed.apple.processes(name).values()), what="what it started ends too")
    assert time.monotonic() - begin < 10
    two.play("still here")
    assert boxed.name(one.wid) == name and boxed.apple.record(name)["pid"] == pid["pid"]
    one.phone.subscribe(one.sid)
    one.play("again")
    assert boxed.users(one.wid, one.sid) == ["!orphan 4242", "again"]


def test_a_pi_that_heeds_nothing_is_ended_as_well(boxed: Boxed) -> None:
    chat = boxed.chat(preset="deaf")
    chat.say("!hang hard")
    chat.phone.wait("agent_start", sessionId=chat.sid)
    begin = time.monotonic()
    chat.stop()
    eventually(lambda: not boxed.pis(chat.wid), 15)
    assert time.monotonic() - begin < 20
    assert len(boxed.names(chat.wid)) == 1
    assert boxed.status(chat.wid, chat.sid) == "stopped"


def test_a_session_that_began_in_a_container_ends_there(boxed: Boxed) -> None:
    """Although its workspace has become one of this machine meanwhile."""
    wid, sid = boxed.started("changing")
    boxed.change(wid, runtime="host")
    boxed.phone().stop(wid, sid)
    eventually(lambda: not boxed.pis(wid))
    assert boxed.resume(wid, sid)[0] == 200 and not boxed.pis(wid)
    boxed.change(wid, runtime="container")


def test_settings_count_when_nobody_is_in_the_container(boxed: Boxed) -> None:
    folders = [boxed.server.home / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
        (folder / "which").write_text(folder.name)
    wid = boxed.workspace("changed", hostMount=str(folders[0]))
    _, one = boxed.started("changed")
    before = boxed.apple.record(boxed.name(wid))["pid"]
    boxed.change(wid, hostMount=str(folders[1]))
    _, two = boxed.started("changed")
    assert boxed.read(wid, "cat /work/which") == "first" and boxed.apple.record(boxed.name(wid))["pid"] == before
    for sid in (one, two):
        boxed.phone().stop(wid, sid)
    assert boxed.resume(wid, one)[0] == 200
    assert boxed.read(wid, "cat /work/which") == "second" and not alive(before)


@pytest.mark.parametrize("state", ["created", "lost", "died"])
def test_what_is_left_of_a_container_makes_room_for_a_new_one(boxed: Boxed, state: str) -> None:
    wid, sid = boxed.started("leftover")
    name = boxed.name(wid)
    boxed.phone().stop(wid, sid)
    if state == "lost":
        boxed.apple.lose(name)
    else:
        boxed.apple.die(name)
    if state == "created":
        start_stranger(boxed.apple, "stranger")
        boxed.apple.ok("create", "--name", name, "-l", f"oppi.workspace={wid}", IMAGE)
    assert boxed.resume(wid, sid)[0] == 200
    assert boxed.name(wid) == name and name in boxed.apple.running()
    assert boxed.configuration(wid)["labels"]["oppi.mark"]


@pytest.mark.parametrize("kept", [True, False])
def test_a_deleted_workspace_leaves_nothing_but_the_work(boxed: Boxed, kept: bool) -> None:
    chat = boxed.chat(preset=f"deleted-{kept}")
    chat.play("hello")
    if kept:
        boxed.read(chat.wid, "echo precious > /work/result")
    inside = list(boxed.apple.processes(boxed.name(chat.wid)))
    folder = boxed.folder(chat.wid)
    boxed.phone().call("DELETE", f"/workspaces/{quote(chat.wid)}")
    eventually(lambda: not boxed.names(chat.wid) and not any(map(alive, inside)), 20, "the container goes, with who is in it")
    if kept:
        eventually(lambda: sorted(os.listdir(folder)) == ["workspace"])
        assert (folder / "workspace" / "result").read_text() == "precious\n"
    else:
        eventually(lambda: not folder.exists())


# -- the server ends, or is ended --------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Boxed]:
    with boxed_with(tmp_path) as rig:
        yield rig


def test_a_server_that_was_killed_finds_its_containers_again(own: Boxed) -> None:
    kept, deleted = own.chat(preset="kept"), own.chat(preset="deleted")
    kept.play("before")
    deaf = own.chat(preset="kept")
    deaf.say("!hang hard")
    deaf.phone.wait("agent_start", sessionId=deaf.sid)
    name, pid = own.name(kept.wid), own.apple.record(own.name(kept.wid))["pid"]
    foreign = owner_of(own.server.folder)
    start_stranger(own.apple, "elses", "-l", f"oppi.owner={foreign}", "-l", f"oppi.workspace={kept.wid}")
    start_stranger(own.apple, "orphan", "-l", f"oppi.owner={owner_of(own.server.data)}", "-l", "oppi.workspace=gone")
    start_stranger(own.apple, "nobodys")
    own.server.kill()
    eventually(lambda: len(own.pis(kept.wid)) == 1, what="only this one heeds that its stdin has ended")
    (own.server.data / "workspaces" / f"{deleted.wid}.json").unlink()
    runs = len(own.apple.calls("run"))
    own.server.start()
    eventually(lambda: not own.pis(kept.wid), 20)
    eventually(lambda: not {"orphan", *own.names(deleted.wid)} & set(own.apple.running()), 20)
    assert {"elses", "nobodys", "buildkit", name} <= set(own.apple.running()) | {"buildkit"}
    assert own.status(kept.wid, kept.sid) == "stopped"
    chat = own.join(kept.wid, kept.sid)
    chat.play("after")
    assert own.users(kept.wid, kept.sid) == ["before", "after"]
    assert len(own.apple.calls("run")) == runs and own.apple.record(name)["pid"] == pid, "it goes on in the same container"


def test_a_server_that_stops_takes_its_containers_along_and_no_others(own: Boxed) -> None:
    with Server(env=own.apple.env, config=MANY) as other:
        beside = Boxed(other, own.log, own.apple)
        pairs = together(lambda: beside.started("beside"), *(lambda n=n: own.started(f"ws{n}") for n in range(3)))
        assert len({own.configuration(wid)["networks"][0]["network"] for wid, _ in pairs}) == 2
        own.server.kill()
        own.server.start()
        assert own.resume(*pairs[1])[0] == 200
        assert len(beside.pis(pairs[0][0])) == 1, "another server's pi was ended"
        begin = time.monotonic()
        own.server.stop()
        assert time.monotonic() - begin < 10
        assert not any(own.names(wid) for wid, _ in pairs[1:])
        assert beside.resume(*pairs[0])[0] == 200
        beside.sweep()
    assert not [name for name in own.apple.running() if name.startswith("oppi-")]


def test_a_container_that_is_just_being_made_goes_with_the_server(own: Boxed) -> None:
    wid, sid = own.session()
    own.apple.fault("run", act=True, hang=True)

    def start() -> None:
        with contextlib.suppress(Exception):
            own.resume(wid, sid)

    def stop() -> None:
        eventually(lambda: own.names(wid) and own.name(wid) in own.apple.running(), 30)
        own.server.stop()

    together(start, stop)
    assert not own.names(wid)
    own.apple.healthy()
    own.server.start()
    assert own.resume(wid, sid)[0] == 200


def test_a_container_goes_when_nobody_has_needed_it_for_a_while(tmp_path: Path) -> None:
    limit = 3.0
    with boxed_with(tmp_path, config={"workspaceIdleTimeoutMs": int(limit * 1000)}) as rig:
        chat = rig.chat()
        name = rig.name(chat.wid)
        pid = rig.apple.record(name)["pid"]
        stays(lambda: rig.apple.record(name)["pid"] == pid, limit + 2, "somebody was in it")
        chat.stop()
        chat.phone.subscribe(chat.sid)
        stays(lambda: rig.apple.record(name)["pid"] == pid, limit + 2, "a new session stops the clock")
        rig.change(chat.wid, runtime="host")
        chat.stop()
        eventually(lambda: not rig.names(chat.wid), 20)
        assert rig.folder(chat.wid, "sessions").is_dir()
        rig.change(chat.wid, runtime="container")
        chat.phone.subscribe(chat.sid)
        chat.play("a new one")


def test_what_a_killed_server_left_goes_also_when_nobody_wants_containers_any_more(own: Boxed) -> None:
    wid, _ = own.started()
    assert own.apple.running()
    own.server.kill()
    (own.server.data / "workspaces" / f"{wid}.json").unlink()
    own.server.start()
    eventually(lambda: own.apple.running() == [], 20, "the container of the deleted workspace to go")
