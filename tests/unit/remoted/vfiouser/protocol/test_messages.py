# SPDX-License-Identifier: GPL-2.0-or-later
"""MSI and MSI-X over vfio-user, and SET_IRQS in all its combinations."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections.abc import Iterator

import pytest

from common import pci
from tests.support import vfiouserclient as vfu
from tests.support import vfiouserdevice as device
from tests.support.vfiouserclient import CONFIG_REGION, INTX, MSI, MSIX, Refused, VfioUserClient
from tests.support.vfiouserprocess import (
    PCI_CAP_ID_MSI,
    PCI_CAP_ID_MSIX,
    Event,
    VfioUserServer,
    chunks,
    enable_msi,
    enable_msix,
    events,
    fds_of,
    find_capability,
    settle,
)


@pytest.fixture
def vectors() -> Iterator[list[Event]]:
    """An eventfd for each vector of MSI-X."""
    with events(device.MSIX_VECTORS) as made:
        yield made


@pytest.fixture
def msix(client: VfioUserClient, vectors: list[Event]) -> VfioUserClient:
    """A client that has enabled MSI-X and attached all vectors as QEMU does."""
    attach_msix(client, vectors, 16)
    return client


def attach_msix(client: VfioUserClient, vectors: list[Event], most: int) -> None:
    enable_msix(client)
    client.disable(INTX)
    client.detach(MSIX, 0, 1)
    for start, fds in chunks(fds_of(vectors), most):
        client.attach(MSIX, start, fds)


def signal(client: VfioUserClient, vector: int) -> None:
    client.write(0, device.RAISE, vector)


def taken(vectors: list[Event]) -> dict[int, int]:
    """How often each vector was signalled, of those that were."""
    counts = {number: event.take() for number, event in enumerate(vectors)}
    return {number: count for number, count in counts.items() if count}


@pytest.mark.parametrize("most", [1, 8, 16])
def test_each_vector_has_its_eventfd(client: VfioUserClient, vectors: list[Event], most: int) -> None:
    attach_msix(client, vectors, most)
    for vector in range(len(vectors)):
        signal(client, vector)
        assert taken(vectors) == {vector: 1}
        signal(client, vector)
        assert taken(vectors) == {vector: 1}


def test_every_message_is_signalled(msix: VfioUserClient, vectors: list[Event]) -> None:
    """A message is an edge: nothing acknowledges it, and none is kept from the next."""
    for _ in range(500):
        msix.write(0, device.RAISE, 7, posted=True)
    settle(msix)
    assert taken(vectors) == {7: 500}


@pytest.mark.parametrize("most", [1, 4])
def test_msi(client: VfioUserClient, most: int) -> None:
    enable_msi(client, device.MSI_VECTORS)
    client.disable(INTX)
    with events(device.MSI_VECTORS) as made:
        for start, fds in chunks(fds_of(made), most):
            client.attach(MSI, start, fds)
        for vector in range(device.MSI_VECTORS):
            signal(client, vector)
            assert taken(made) == {vector: 1}
        client.disable(MSI)
        enable_msi(client, enabled=False)
        signal(client, 1)
        assert taken(made) == {}
        with Event() as trigger:
            client.attach(INTX, 0, [trigger.fd])
            assert trigger.take() == 1


def test_vector_without_an_eventfd_is_pending(msix: VfioUserClient, vectors: list[Event]) -> None:
    """As QEMU does while the guest has masked it. For the pending bits see PCI 3.0, 6.8.2.9 and 6.8.3.5."""
    msix.detach(MSIX, 3, 2)
    for _ in range(2):
        signal(msix, 3)
    signal(msix, 5)
    assert taken(vectors) == {5: 1}
    assert pending(msix) == 1 << 3
    msix.attach(MSIX, 3, fds_of(vectors[3:5]))
    assert taken(vectors) == {3: 1}
    assert pending(msix) == 0


def test_masked_vector_is_pending(msix: VfioUserClient, vectors: list[Event]) -> None:
    msix.mask(MSIX, 2, 3)
    for vector in (1, 2, 2, 4, 5):
        signal(msix, vector)
    assert taken(vectors) == {1: 1, 5: 1}
    assert pending(msix) == 1 << 2 | 1 << 4
    msix.unmask(MSIX, 3, 2)
    assert taken(vectors) == {4: 1}
    msix.unmask(MSIX, 0, device.MSIX_VECTORS)
    assert taken(vectors) == {2: 1}
    assert pending(msix) == 0


def test_mask_by_booleans(msix: VfioUserClient, vectors: list[Event]) -> None:
    msix.set_irqs(vfu.DATA_BOOL | vfu.MASK, MSIX, 2, 4, data=b"\1\0\0\1")
    for vector in range(8):
        signal(msix, vector)
    assert taken(vectors) == dict.fromkeys((0, 1, 3, 4, 6, 7), 1)
    msix.set_irqs(vfu.DATA_BOOL | vfu.UNMASK, MSIX, 2, 4, data=b"\0\1\1\1")
    assert taken(vectors) == {5: 1}


def test_function_mask(msix: VfioUserClient, vectors: list[Event]) -> None:
    enable_msix(msix, masked=True)
    signal(msix, 0)
    signal(msix, 19)
    assert taken(vectors) == {}
    assert pending(msix) == 1 << 19 | 1
    enable_msix(msix)
    assert taken(vectors) == {0: 1, 19: 1}


def test_msi_masks_and_pending_bits_in_config_space(client: VfioUserClient) -> None:
    """PCI 3.0, 6.8.1.7 and 6.8.1.8: with 64-bit addresses they are at 0x10 and 0x14 of the capability."""
    capability = find_capability(client, PCI_CAP_ID_MSI)
    enable_msi(client, device.MSI_VECTORS)
    with events(device.MSI_VECTORS) as made:
        client.attach(MSI, 0, fds_of(made))
        client.write(CONFIG_REGION, capability + 0x10, 0b0110)
        for vector in range(device.MSI_VECTORS):
            signal(client, vector)
        assert taken(made) == {0: 1, 3: 1}
        assert client.read(CONFIG_REGION, capability + 0x14) == 0b0110
        client.write(CONFIG_REGION, capability + 0x10, 0b0100)
        assert taken(made) == {1: 1}
        assert client.read(CONFIG_REGION, capability + 0x14) == 0b0100


def test_function_that_is_no_bus_master_sends_nothing(msix: VfioUserClient, vectors: list[Event]) -> None:
    """A message is a write to memory (PCI 3.0, 6.8)."""
    msix.write(CONFIG_REGION, pci.PCI_COMMAND, 0, 2)
    signal(msix, 1)
    assert taken(vectors) == {}
    msix.write(CONFIG_REGION, pci.PCI_COMMAND, pci.PCI_COMMAND_MASTER, 2)
    vectors[1].take()  # it may have been kept
    signal(msix, 1)
    assert taken(vectors) == {1: 1}


def test_line_is_low_while_messages_are_enabled(client: VfioUserClient, vectors: list[Event]) -> None:
    with Event() as trigger, Event() as unmask:
        client.attach(INTX, 0, [trigger.fd])
        client.attach_unmask(unmask.fd)
        signal(client, 0)
        assert trigger.take() == 1
        enable_msix(client)
        unmask.set()
        client.unmask(INTX)
        settle(client, unmask)
        assert trigger.take() == 0
        attach_msix(client, vectors, 16)
        assert taken(vectors) in ({}, {0: 1})  # what is raised may be sent as a message as well
        signal(client, 2)
        assert taken(vectors) == {2: 1}
        client.disable(MSIX)
        enable_msix(client, enabled=False)
        client.attach(INTX, 0, [trigger.fd])
        assert trigger.take() == 1  # nobody has lowered it
        client.write(0, device.LOWER, 0)


def test_disable_takes_all_eventfds(msix: VfioUserClient, vectors: list[Event]) -> None:
    msix.disable(MSIX)
    for vector in range(device.MSIX_VECTORS):
        signal(msix, vector)
    assert taken(vectors) == {}


def test_reset_forgets_what_is_pending(msix: VfioUserClient, vectors: list[Event]) -> None:
    msix.mask(MSIX, 0, device.MSIX_VECTORS)
    signal(msix, 4)
    msix.reset()
    attach_msix(msix, vectors, 16)
    msix.unmask(MSIX, 0, device.MSIX_VECTORS)
    assert taken(vectors) == {}
    signal(msix, 4)
    assert taken(vectors) == {4: 1}


def test_pending_vector_outlives_its_client(server: VfioUserServer, vectors: list[Event]) -> None:
    with server.negotiated("probe") as client:
        attach_msix(client, vectors, 16)
        client.detach(MSIX, 6)
        signal(client, 6)
    with server.connect("probe") as client:
        client.version()
        client.attach(MSIX, 0, fds_of(vectors[:16]))
        assert taken(vectors) == {6: 1}
        client.reset()


def test_one_eventfd_may_serve_several_vectors(msix: VfioUserClient) -> None:
    """A client without KVM may read them all at one place."""
    with Event() as shared:
        duplicate = os.dup(shared.fd)
        try:
            msix.attach(MSIX, 0, [shared.fd, duplicate])
        except Refused as refusal:
            assert refusal.errno == errno.EINVAL
        else:
            signal(msix, 0)
            signal(msix, 1)
            assert shared.take() == 2
        finally:
            os.close(duplicate)


def test_eventfd_is_its_devices_until_the_last_vector_lets_it_go(
    server: VfioUserServer, msix: VfioUserClient
) -> None:
    with server.negotiated("other") as other, Event() as shared:
        msix.attach(MSIX, 0, [shared.fd])
        msix.attach(MSIX, 1, [shared.fd])
        for vector in (0, 1):
            with pytest.raises(Refused):
                other.attach(MSIX, 0, [shared.fd])
            msix.detach(MSIX, vector)
        other.attach(MSIX, 0, [shared.fd])


def test_client_triggers_vectors_itself(msix: VfioUserClient, vectors: list[Event]) -> None:
    """The specification lets it, for tests; a server may refuse."""
    try:
        msix.set_irqs(vfu.DATA_NONE | vfu.TRIGGER, MSIX, 3, 2)
        msix.set_irqs(vfu.DATA_BOOL | vfu.TRIGGER, MSIX, 7, 3, data=b"\1\0\1")
    except Refused as refusal:
        assert refusal.errno in (errno.EINVAL, errno.ENOTSUP)
        assert taken(vectors) == {}
    else:
        assert taken(vectors) == dict.fromkeys((3, 4, 7, 9), 1)


def test_full_and_blocking_eventfds_hold_nobody_up(msix: VfioUserClient, vectors: list[Event]) -> None:
    """Whoever shares an eventfd may fill it, and clear its O_NONBLOCK."""
    os.eventfd_write(vectors[0].fd, (1 << 64) - 2)
    os.set_blocking(vectors[0].fd, True)
    for vector in (0, 0, 1):
        signal(msix, vector)
    assert set(taken(vectors)) == {0, 1}


# What doesn't fit


@pytest.mark.parametrize(
    ("start", "count", "fds"),
    [
        (0, 2, 1),
        (0, 1, 2),
        (0, 0, 1),
        (19, 2, 2),
        (20, 1, 1),
        (0xFFFFFFFF, 1, 1),
        (0xFFFFFFF0, 16, 16),
        (1, 0xFFFFFFFF, 1),
        (0, 0x80000000, 16),
    ],
)
def test_eventfds_that_dont_fit_are_refused(
    msix: VfioUserClient, vectors: list[Event], start: int, count: int, fds: int
) -> None:
    with events(fds) as others:
        for _ in range(3):
            with pytest.raises(Refused) as refused:
                msix.set_irqs(vfu.DATA_EVENTFD | vfu.TRIGGER, MSIX, start, count, fds_of(others))
            assert refused.value.errno == errno.EINVAL
        for vector in (0, 1, 19):
            signal(msix, vector)
        assert taken(others) == {}
    assert taken(vectors) == {0: 1, 1: 1, 19: 1}


def test_one_bad_eventfd_refuses_the_message_as_a_whole(msix: VfioUserClient, vectors: list[Event]) -> None:
    with events(3) as others, open(os.devnull, "rb") as null:
        with pytest.raises(Refused):
            msix.attach(MSIX, 0, [others[0].fd, others[1].fd, null.fileno(), others[2].fd])
        for vector in range(4):
            signal(msix, vector)
        assert taken(others) == {}
    assert taken(vectors) == dict.fromkeys(range(4), 1)


BAD_SETS = {
    "a short argsz": vfu.IRQ_SET.pack(19, vfu.DATA_NONE | vfu.MASK, MSIX, 0, 1),
    "a payload that is too short": vfu.IRQ_SET.pack(20, vfu.DATA_NONE | vfu.MASK, MSIX, 0, 1)[:-1],
    "no payload": b"",
    "one boolean too few": vfu.IRQ_SET.pack(22, vfu.DATA_BOOL | vfu.MASK, MSIX, 0, 3) + b"\1\1",
    "no booleans": vfu.IRQ_SET.pack(20, vfu.DATA_BOOL | vfu.MASK, MSIX, 0, 3),
    "booleans without end": vfu.IRQ_SET.pack(21, vfu.DATA_BOOL | vfu.MASK, MSIX, 0, 0xFFFFFFFF) + b"\1",
}


@pytest.mark.parametrize("payload", BAD_SETS.values(), ids=BAD_SETS)
def test_malformed_set_is_refused(msix: VfioUserClient, vectors: list[Event], payload: bytes) -> None:
    with pytest.raises(Refused) as refused:
        msix.call(vfu.SET_IRQS, payload)
    assert refused.value.errno == errno.EINVAL
    signal(msix, 0)
    assert taken(vectors) == {0: 1}


DATA = (0, vfu.DATA_NONE, vfu.DATA_BOOL, vfu.DATA_EVENTFD, 3, 5, 6, 7)
ACTIONS = (0, vfu.MASK, vfu.UNMASK, vfu.TRIGGER, 0x18, 0x28, 0x30, 0x38, 0x40, 0x60)
COUNTS = {INTX: 1, MSI: device.MSI_VECTORS, MSIX: device.MSIX_VECTORS}
QEMUS = {
    *itertools.product([vfu.DATA_NONE | vfu.MASK, vfu.DATA_NONE | vfu.UNMASK], [INTX], [0]),
    (vfu.DATA_EVENTFD | vfu.UNMASK, INTX, 1),
    *itertools.product([vfu.DATA_EVENTFD | vfu.TRIGGER], [INTX, MSI, MSIX], [0, 1]),
}
"""flags, index, and whether fds come with it, of what must work"""


def combinations(vectors: int) -> Iterator[tuple[int, int, tuple[int, int], int]]:
    """Data, action, range, and number of fds; flags that are wrong by themselves with one range only."""
    for data, action in itertools.product(DATA, ACTIONS):
        is_possible = data in (1, 2, 4) and action in (8, 0x10, 0x20)
        for extent in ranges(vectors) if is_possible else [(0, 1)]:
            yield from ((data, action, extent, fds) for fds in (0, 1, 2))


def ranges(vectors: int) -> Iterator[tuple[int, int]]:
    """Start and count."""
    yield from (
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 1),
        (vectors - 1, 1),
        (vectors, 1),
        (0, vectors),
        (0, vectors + 1),
    )
    yield from ((0xFFFFFFFF, 1), (1, 0xFFFFFFFF), (0xFFFFFFFF, 0), (0, 0xFFFFFFFF))


def is_expected(data: int, action: int, index: int, start: int, count: int, fds: int) -> bool | None:
    """Whether a message must be accepted; None where a server may choose."""
    if index > vfu.REQ or data not in (1, 2, 4) or action not in (8, 0x10, 0x20):
        return False
    if start + count > COUNTS.get(index, 1) or (start > 0 and count == 0):
        return False
    if data == vfu.DATA_EVENTFD and fds not in (0, count):
        return False
    if data | action == vfu.DATA_NONE | vfu.TRIGGER and index in COUNTS and count == fds == 0:
        return True
    if (data | action, index, fds) in QEMUS and count == 1:
        return True
    return None


@pytest.mark.parametrize("index", [INTX, MSI, MSIX, vfu.ERR, vfu.REQ, 5, 0xFFFFFFFF])
def test_every_combination_is_answered(client: VfioUserClient, index: int) -> None:
    """What the specification rules out is refused, what QEMU sends is accepted; then all is as it should be."""
    vectors = COUNTS.get(index, 1)
    with events(2 * len(ACTIONS)) as made:
        for data, action, (start, count), fds in combinations(vectors):
            own = made[2 * ACTIONS.index(action) :]  # one eventfd can't both assert and unmask
            booleans = b"\1" * count if data == vfu.DATA_BOOL and count <= vectors + 1 else b""
            try:
                client.set_irqs(data | action, index, start, count, fds_of(own[:fds]), booleans)
                is_accepted = True
            except Refused:
                is_accepted = False
            expected = is_expected(data, action, index, start, count, fds)
            if expected is not None:
                assert is_accepted is expected, f"flags {data | action:#x}, {count} from {start}, {fds} fds"
    for each in COUNTS:
        client.disable(each)
    client.unmask(INTX)
    with Event() as trigger:
        client.attach(INTX, 0, [trigger.fd])
        signal(client, 0)
        assert trigger.take() == 1
        client.write(0, device.LOWER, 0)


def pending(client: VfioUserClient) -> int:
    """The pending bits of MSI-X, wherever the capability says that they are (PCI 3.0, 6.8.2.5)."""
    place = client.read(CONFIG_REGION, find_capability(client, PCI_CAP_ID_MSIX) + 8)
    return client.read(place & 7, place & ~7)


def test_capabilities_have_room_for_the_table(client: VfioUserClient) -> None:
    """Table and pending bits lie within their BARs, apart from each other."""
    capability = find_capability(client, PCI_CAP_ID_MSIX)
    assert client.read(CONFIG_REGION, capability + 2, 2) & 0x7FF == device.MSIX_VECTORS - 1
    table, bits = (client.read(CONFIG_REGION, capability + offset) for offset in (4, 8))
    extents = []
    for place, size in ((table, 16 * device.MSIX_VECTORS), (bits, 8)):
        region = client.region_info(place & 7)
        with contextlib.suppress(OSError):
            os.close(region.fd)
        start = place & ~7
        assert start + size <= region.size
        extents.append((place & 7, start, start + size))
    (table_bar, table_start, table_end), (bits_bar, bits_start, bits_end) = extents
    assert table_bar != bits_bar or table_end <= bits_start or bits_end <= table_start
