"""Servers for the wire suites: one for all tests of a module, swept after each of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .rig import DIALECTS, Rig, rig_with


@pytest.fixture(scope="module")
def module_rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig_with(tmp_path_factory.mktemp("rig")) as rig:
        yield rig


@pytest.fixture
def rig(module_rig: Rig) -> Iterator[Rig]:
    """The module's server, with a pi of the 0.87 dialect."""
    yield module_rig
    module_rig.sweep()


@pytest.fixture(scope="module", params=DIALECTS)
def module_both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig_with(tmp_path_factory.mktemp("both"), request.param) as rig:
        yield rig


@pytest.fixture
def both(module_both: Rig) -> Iterator[Rig]:
    """The module's server, once for each dialect of pi."""
    yield module_both
    module_both.sweep()
