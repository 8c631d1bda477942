"""Every test here runs in a network namespace of the tests' own; `apple` is a fresh stand-in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

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
