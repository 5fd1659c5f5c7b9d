# SPDX-License-Identifier: GPL-2.0-or-later
"""remoted at its limit of open files: that ends one session, which can come again, and no interrupt is lost."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from tests.support import vfiouserclient as vfu
from tests.support import vfiouserdevice as device
from tests.support.fds import count_fds
from tests.support.vfiouserclient import CONFIG_REGION, INTX, MSIX, VfioUserClient
from tests.support.vfiouserprocess import Event, VfioUserServer, enable_msix, events, fds_of, memory
from tests.support.wait import wait_until


@contextmanager
def no_more_fds(server: VfioUserServer, spare: int = 0) -> Iterator[None]:
    """Lets the server open so many more files only."""
    soft, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    highest = count_fds(server.pid) + spare
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (highest, hard))
    try:
        yield
    finally:
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def victim(server: VfioUserServer) -> Iterator[VfioUserClient]:
    """The client of another device."""
    with server.negotiated("other") as victim:
        yield victim
        assert victim.read(CONFIG_REGION, 0) == device.IDENTITY


@pytest.mark.parametrize("spare", [0, 5])
def test_vectors_that_cannot_be_received(server: VfioUserServer, victim: VfioUserClient, spare: int) -> None:
    """The client would wait for their interrupts for ever if its message were refused, or taken in part."""
    with events(16) as made:
        with server.negotiated("probe") as client:
            enable_msix(client)
            client.attach(MSIX, 0, fds_of(made))
            client.detach(MSIX, 0, 16)
            client.write(0, device.RAISE, 9)
            with no_more_fds(server, spare), pytest.raises((EOFError, ConnectionError)):
                client.attach(MSIX, 0, fds_of(made))
        assert not any(event.take() for event in made)
        with server.connect("probe") as client:
            client.version()
            client.attach(MSIX, 0, fds_of(made))
            assert [number for number, event in enumerate(made) if event.take()] == [9]
            client.reset()


def test_trigger_that_cannot_be_received(server: VfioUserServer, victim: VfioUserClient) -> None:
    with Event() as trigger:
        with server.negotiated("probe") as client:
            client.write(0, device.RAISE, 0)
            with no_more_fds(server), pytest.raises((EOFError, ConnectionError)):
                client.attach(INTX, 0, [trigger.fd])
        assert trigger.take() == 0
        with server.connect("probe") as client:
            client.version()
            client.attach(INTX, 0, [trigger.fd])
            assert trigger.take() == 1
            client.reset()


def test_ram_that_cannot_be_received(server: VfioUserServer, victim: VfioUserClient) -> None:
    ending = (EOFError, ConnectionError)
    with memory(1 << 20) as ram:
        with server.negotiated("probe") as client, no_more_fds(server), pytest.raises(ending):
            client.dma_map(0, 1 << 20, ram)
        with server.negotiated("probe") as client:
            client.dma_map(0, 1 << 20, ram)


def test_client_that_cannot_be_accepted(server: VfioUserServer, victim: VfioUserClient) -> None:
    """It is turned away or waits; the server does not spin meanwhile, and takes the next one."""
    with no_more_fds(server):
        before = server.cpu_seconds()
        for _ in range(3):
            with server.connect("probe") as client:
                client.sock.settimeout(0.02)
                with suppress(EOFError, ConnectionError, TimeoutError):
                    client.version()
        assert victim.read(CONFIG_REGION, 0) == device.IDENTITY
        assert server.cpu_seconds() - before < 0.2
    wait_until(lambda: is_served(server), "a client is served again")


def is_served(server: VfioUserServer) -> bool:
    try:
        with server.connect("probe") as client:
            client.version()
            return client.read(CONFIG_REGION, 0) == device.IDENTITY
    except (EOFError, ConnectionError):
        return False


def test_mapped_bar_cannot_be_sent(server: VfioUserServer, victim: VfioUserClient) -> None:
    """A copy of an fd in a message is no open file of the server's."""
    with server.negotiated("probe") as client, no_more_fds(server):
        region = client.whole_region_info(2)
        vfu.close_all([region.fd])
