"""A server that has a stand-in for `container`, and workspaces in containers with the scripted pi."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Callable

from tests.container.container_cli import network_record
from tests.container.rig import Apple
from tests.support.phone import quote
from tests.support.server import Server
from tests.wire.rig import MANY, Chat, Rig, eventually

FAKE = {"DIALECT": "0.87"}
LIE = """#!/bin/sh
if [ -f /work/.lie ]; then  # a pi that an agent has taken over says where its conversation is
    FAKE_PI_DIALECT=0.87 /usr/bin/python3 /opt/fake_pi.py "$@" |
        sed -u "s#\\"sessionFile\\":\\"[^\\"]*\\"#\\"sessionFile\\":\\"$(cat /work/.lie)\\"#"
    exit
fi
"""
NUMBERS = itertools.count(65)  # of the next "Mac": all share one kernel, so that no two may choose the same subnet


class Boxed(Rig):
    def __init__(self, server: Server, log: Path, apple: Apple) -> None:
        super().__init__(server, log)
        self.apple = apple

    def workspace(self, preset: str = "container", **fields: Any) -> str:
        """Id of the container workspace of this name, made once."""
        if preset not in self.workspaces:
            values = {"policyPreset": "container", "runtime": "container", **fields}
            self.workspaces[preset] = self.phone("1.0").create_workspace(preset, **values)["id"]
        return self.workspaces[preset]

    def session(self, preset: str = "container", **fields: Any) -> tuple[str, str]:
        return super().session(preset, **fields)

    def chat(self, generation: str = "1.1", preset: str = "container", **fields: Any) -> Chat:
        return super().chat(generation, preset, **fields)

    def names(self, wid: str) -> list[str]:
        """The containers of a workspace."""
        records = self.apple.store.read()["containers"]
        return [name for name, record in records.items() if record["configuration"]["labels"].get("oppi.workspace") == wid]

    def name(self, wid: str) -> str:
        (name,) = self.names(wid)
        return name

    def configuration(self, wid: str) -> Any:
        return self.apple.json("inspect", self.name(wid))[0]["configuration"]

    def folder(self, wid: str, *names: str) -> Path:
        """What the server keeps for a workspace."""
        return self.server.data.joinpath("sandboxes", wid, *names)

    def inside(self, wid: str, script: str) -> subprocess.CompletedProcess[str]:
        """What an agent can do there: a shell command as its user."""
        return self.apple.call("exec", self.name(wid), "sh", "-c", script)

    def read(self, wid: str, script: str) -> str:
        done = self.inside(wid, script)
        assert done.returncode == 0, done.stderr
        return done.stdout.rstrip("\n")

    def pis(self, wid: str) -> list[list[str]]:
        """The arguments of the pis that run in a workspace's containers."""
        found = [argv for name in self.names(wid) for argv in self.apple.execs(name).values()]
        return [argv for argv in found if "rpc" in argv]

    def resume(self, wid: str, sid: str, timeout: float = 60.0) -> tuple[int, Any]:
        """(status, the session or what a person reads) of a start over REST."""
        path = f"/workspaces/{quote(wid)}/sessions/{quote(sid)}/resume"
        status, value = self.phone().request("POST", path, {}, timeout=timeout)
        return status, value["session"] if status == 200 else value["error"]

    def started(self, preset: str = "container") -> tuple[str, str]:
        """A new session that runs."""
        wid, sid = self.session(preset)
        status, answer = self.resume(wid, sid)
        assert status == 200, answer
        return wid, sid

    def status(self, wid: str, sid: str) -> str:
        return str(next(s["status"] for s in self.phone().sessions(wid) if s["id"] == sid))

    def problem(self, wid: str) -> str:
        """Why a workspace cannot have its container now, as the app shows it."""
        return str(next(w for w in self.phone("1.0").workspaces() if w["id"] == wid).get("runtimeProblem", ""))

    def change(self, wid: str, **fields: Any) -> Any:
        return self.phone("1.0").call("PUT", f"/workspaces/{quote(wid)}", fields)["workspace"]

    def users(self, wid: str, sid: str) -> list[str]:
        """What was said in a session, as its trace has it."""
        trace = self.phone().session_detail(wid, sid)["trace"]
        return [event["text"] for event in trace if event["type"] == "user"]

    def record(self, sid: str) -> Any:
        """A session as it is stored."""
        return json.loads((self.server.data / "sessions" / f"{sid}.json").read_text("utf-8"))["session"]

    def file(self, sid: str) -> Path:
        """Where the conversation of a session is on this machine."""
        return Path(eventually(lambda: self.record(sid).get("piSessionFile")))

    def gone(self, wid: str) -> None:
        """Takes a workspace's container away, so that the next session begins with none."""
        for name in self.names(wid):
            self.apple.ok("delete", "-f", name)


def together(*works: Callable[[], Any]) -> list[Any]:
    """The results of what is done at the same time."""
    results: list[Any] = [None] * len(works)

    def run(number: int) -> None:
        try:
            results[number] = works[number]()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


@contextlib.contextmanager
def boxed_with(
    folder: Path, config: Mapping[str, Any] | None = None, env: Mapping[str, str] | None = None, start: bool = True, **mac: Any
) -> Iterator[Boxed]:
    """A server on a "Mac" of its own, with these settings of both."""
    with Apple(fake=FAKE, **mac) as apple:
        with apple.store.change() as db:
            for third in range(65, next(NUMBERS)):
                db["networks"][f"taken{third}"] = network_record(f"taken{third}", (192 << 24 | 168 << 16 | third << 8, 24), 0)
        launcher = apple.folder / "fake-pi"
        launcher.write_text(LIE + launcher.read_text("utf-8").partition("\n")[2], "utf-8")
        with Server(env={**apple.env, **(env or {})}, config={**MANY, **(config or {})}, start=start) as server:
            rig = Boxed(server, folder / "stdin.log", apple)
            try:
                yield rig
            finally:
                with contextlib.suppress(AssertionError):
                    rig.sweep()


__all__ = ["Boxed", "Chat", "Server", "boxed_with", "eventually", "together"]
