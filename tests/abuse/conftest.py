"""The server of a module, looked at after every attack: it serves, plays a turn, and has not grown."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.wire.rig import Chat, Rig, rig_with

MEMORY = 160  # MB that the server may hold after whatever was done to it


@pytest.fixture(scope="module")
def module_rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig_with(tmp_path_factory.mktemp("abuse")) as rig:
        yield rig


@pytest.fixture(scope="module")
def witness(module_rig: Rig) -> Iterator[Chat]:
    """A phone in a session, which no attack on others may disturb."""
    chat = module_rig.chat()
    module_rig.phones.clear()
    module_rig.made.clear()
    yield chat
    chat.phone.drop()


@pytest.fixture
def rig(module_rig: Rig, witness: Chat) -> Iterator[Rig]:
    pid = module_rig.server.pid
    yield module_rig
    module_rig.sweep()
    assert module_rig.server.alive and module_rig.server.pid == pid
    assert module_rig.phone().health()["ok"] is True
    witness.play("!say unharmed")
    assert witness.answer_of() == "unharmed"
    assert memory(pid) < MEMORY


def memory(pid: int) -> float:
    """Resident memory of a process in MB."""
    return int(subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, check=True).stdout) / 1024
