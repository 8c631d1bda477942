"""Workspaces in containers, with the scripted pi: how a container comes, is shared, is left, and goes again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.container.rig import Apple
from tests.support.server import Server
from tests.wire.rig import MANY, Rig

FAKE = {"DIALECT": "0.87"}


class Boxed(Rig):
    """A server that has a stand-in for `container`, and a workspace in one."""

    def __init__(self, server: Server, log: Path, apple: Apple) -> None:
        super().__init__(server, log)
        self.apple = apple

    def workspace(self, preset: str = "container", **fields: Any) -> str:
        if preset not in self.workspaces:
            values = {"policyPreset": "container", "runtime": "container", **fields}
            self.workspaces[preset] = self.phone("1.0").create_workspace(preset, **values)["id"]
        return self.workspaces[preset]

    def name(self, wid: str) -> str:
        (name,) = [n for n, r in self.apple.store.read()["containers"].items() if r["labels"].get("oppi.workspace") == wid]
        return name


@pytest.fixture
def boxed(tmp_path: Path) -> Iterator[Boxed]:
    with Apple(fake=FAKE) as apple, Server(env=apple.env, config=MANY) as server:
        yield Boxed(server, tmp_path / "log", apple)


def test_a_turn_in_a_container(boxed: Boxed) -> None:
    chat = boxed.chat(preset="container")
    chat.play("hello")
    assert boxed.apple.running()
    print(json.dumps(boxed.apple.store.read()["containers"], indent=1)[:3000])
    print([c["argv"] for c in boxed.apple.log()])
