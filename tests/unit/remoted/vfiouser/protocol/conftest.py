# SPDX-License-Identifier: GPL-2.0-or-later
"""A real remoted that serves over vfio-user, and a client of the tests' own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.vfiouserclient import VfioUserClient
from tests.support.vfiouserprocess import PINLESS, PROBE, VfioUserServer


@pytest.fixture(scope="package")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VfioUserServer]:
    devices = {"probe": PROBE, "other": PROBE, "pinless": PINLESS}
    server = VfioUserServer(tmp_path_factory.mktemp("vfiouser"), devices)
    yield server
    server.close()


@pytest.fixture
def server(process: VfioUserServer) -> Iterator[VfioUserServer]:
    """The process, which must have open and mapped after a test what it had before the first one."""
    yield process
    process.await_nothing_left()


@pytest.fixture
def client(server: VfioUserServer) -> Iterator[VfioUserClient]:
    """A client of the device ``probe`` that has negotiated and reset it."""
    with server.negotiated("probe") as client:
        yield client
