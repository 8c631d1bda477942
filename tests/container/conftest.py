"""Every test here runs in a network namespace of the tests' own; `apple` is a fresh stand-in, `boxed` one for a module
with a server on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.container.boxed import Boxed, boxed_with
from tests.container.rig import Apple, contents, namespaces


@pytest.fixture(scope="package", autouse=True)
def own_network() -> Iterator[None]:
    """What has to be fetched is fetched before, because inside there is no way out."""
    contents()
    with namespaces():
        yield


@pytest.fixture
def apple() -> Iterator[Apple]:
    with Apple() as found:
        yield found


@pytest.fixture(scope="module")
def module_boxed(own_network: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Boxed]:
    with boxed_with(tmp_path_factory.mktemp("boxed")) as rig:
        yield rig


@pytest.fixture
def boxed(module_boxed: Boxed) -> Iterator[Boxed]:
    yield module_boxed
    module_boxed.apple.healthy()
    module_boxed.sweep()
