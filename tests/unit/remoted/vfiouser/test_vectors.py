# SPDX-License-Identifier: GPL-2.0-or-later
"""MSI and MSI-X on vfio-user: which eventfd a vector signals, and what stays pending until there is one."""

from __future__ import annotations

import errno
import os

import pytest

from common.vfiouser import IRQ_INFO, IRQ_SET, Command, IrqIndex, IrqSetFlag, RegionIndex
from tests.support.fds import await_fds, count_fds
from tests.support.remotebench import RemoteBench
from tests.support.vfiouserbench import DISABLE, MASK, TRIGGER, UNMASK, UNMASK_BY, VfioUserPeer, signals

CONFIG = RegionIndex.CONFIG
MSI, MSIX = IrqIndex.MSI, IrqIndex.MSIX
CAPABILITIES = {MSI: 0x05, MSIX: 0x11}
ENABLE = {MSI: 0x01, MSIX: 0x8000}
FUNCTION_MASK = 0x4000


def capability(client: VfioUserPeer, number: int) -> int:
    """The offset of a capability in config space."""
    offset = client.read(CONFIG, 0x34, 1).payload[0]
    while offset:
        found, following = client.read(CONFIG, offset, 2).payload
        if found == number:
            return offset
        offset = following
    raise LookupError(number)


def enable(client: VfioUserPeer, index: int, control: int | None = None) -> None:
    """Writes message control of MSI or MSI-X as a guest does."""
    value = ENABLE[IrqIndex(index)] | (0x20 if index == MSI else 0) if control is None else control
    offset = capability(client, CAPABILITIES[IrqIndex(index)]) + 2
    assert client.write(CONFIG, offset, value.to_bytes(2, "little")).error == 0


def raise_vector(client: VfioUserPeer, vector: int) -> None:
    assert client.write(1, 0, vector.to_bytes(4, "little")).error == 0


@pytest.mark.parametrize(("index", "count"), [(IrqIndex.INTX, 1), (MSI, 4), (MSIX, 8)])
def test_irq_info(client: VfioUserPeer, index: int, count: int) -> None:
    reply = client.call(Command.DEVICE_GET_IRQ_INFO, IRQ_INFO.pack(16, 0, index, 0))
    assert IRQ_INFO.unpack(reply.payload)[2:] == (index, count)


@pytest.mark.parametrize("index", [MSI, MSIX])
def test_each_vector_signals_its_own_eventfd_once(
    client: VfioUserPeer, eventfds: list[int], index: int
) -> None:
    enable(client, index)
    assert client.set_irqs(TRIGGER, index, 0, 2, fds=eventfds[:2]) == 0
    assert client.set_irqs(TRIGGER, index, 3, 1, fds=[eventfds[3]]) == 0
    for vector in (0, 1, 1, 3):
        raise_vector(client, vector)
    assert [signals(fd) for fd in eventfds[:4]] == [1, 2, 0, 1]
    server = client.bench.servers["vectors"]
    assert server.interrupts_in_use == ("MSI" if index == MSI else "MSI-X", 3)
    assert server.messages == 4


@pytest.mark.parametrize("index", [MSI, MSIX])
def test_what_has_no_eventfd_is_pending_until_it_has_one(
    client: VfioUserPeer, eventfds: list[int], index: int
) -> None:
    enable(client, index)
    for vector in (2, 2, 3):
        raise_vector(client, vector)
    assert client.set_irqs(TRIGGER, index, 1, 2, fds=eventfds[1:3]) == 0
    assert [signals(fd) for fd in eventfds[:4]] == [0, 0, 1, 0]
    assert client.set_irqs(TRIGGER, index, 2, 1) == 0, "detached"
    raise_vector(client, 2)
    assert signals(eventfds[2]) == 0
    assert client.set_irqs(TRIGGER, index, 2, 1, fds=[eventfds[4]]) == 0
    assert signals(eventfds[4]) == 1


@pytest.mark.parametrize("index", [MSI, MSIX])
def test_what_the_client_masks_is_pending_until_it_unmasks(
    client: VfioUserPeer, eventfds: list[int], index: int
) -> None:
    enable(client, index)
    assert client.set_irqs(TRIGGER, index, 0, 4, fds=eventfds[:4]) == 0
    assert client.set_irqs(int(IrqSetFlag.DATA_BOOL | IrqSetFlag.MASK), index, 0, 4, b"\0\1\1\0") == 0
    for vector in range(4):
        raise_vector(client, vector)
    assert [signals(fd) for fd in eventfds[:4]] == [1, 0, 0, 1]
    assert client.set_irqs(UNMASK, index, 1, 1) == 0
    raise_vector(client, 2)
    assert [signals(fd) for fd in eventfds[:4]] == [0, 1, 0, 0]
    assert client.set_irqs(DISABLE, index, 0, 0) == 0
    assert client.set_irqs(TRIGGER, index, 0, 4, fds=eventfds[:4]) == 0
    assert [signals(fd) for fd in eventfds[:4]] == [0, 0, 1, 0], "a disabled index masks nothing"


def test_the_function_mask_of_config_space_counts(client: VfioUserPeer, eventfds: list[int]) -> None:
    enable(client, MSIX, ENABLE[MSIX] | FUNCTION_MASK)
    assert client.set_irqs(TRIGGER, MSIX, 0, 1, fds=[eventfds[0]]) == 0
    raise_vector(client, 0)
    assert signals(eventfds[0]) == 0
    enable(client, MSIX)
    assert signals(eventfds[0]) == 1


def test_interrupts_outlive_the_client(bench: RemoteBench, eventfds: list[int]) -> None:
    with VfioUserPeer(bench, "vectors") as client:
        client.set_command(6)
        enable(client, MSIX)
        assert client.set_irqs(TRIGGER, MSIX, 5, 1, fds=[eventfds[5]]) == 0
        assert client.set_irqs(MASK, MSIX, 5, 1) == 0
        raise_vector(client, 5)
    assert bench.servers["vectors"].interrupts_in_use == (None, 0)
    with VfioUserPeer(bench, "vectors") as client:
        assert client.set_irqs(TRIGGER, MSIX, 5, 1, fds=[eventfds[6]]) == 0
        assert (signals(eventfds[5]), signals(eventfds[6])) == (0, 1)


def test_an_eventfd_is_the_devices_until_its_last_use_ends(
    bench: RemoteBench, client: VfioUserPeer, eventfds: list[int]
) -> None:
    shared = eventfds[0]
    assert client.set_irqs(TRIGGER, MSIX, 0, 2, fds=[shared, shared]) == 0
    with VfioUserPeer(bench, "dev") as other:
        assert client.set_irqs(TRIGGER, MSIX, 0, 1, fds=eventfds[1:2]) == 0, "instead of the first"
        assert other.set_irqs(TRIGGER, fds=[shared]) == errno.EINVAL
        assert client.set_irqs(TRIGGER, MSIX, 1, 1) == 0
        assert other.set_irqs(TRIGGER, fds=[shared]) == 0


def test_eventfds_that_are_replaced_are_closed(client: VfioUserPeer, eventfds: list[int]) -> None:
    assert client.set_irqs(TRIGGER, MSIX, 0, 8, fds=eventfds) == 0
    fds = count_fds()
    for _ in range(20):
        assert client.set_irqs(TRIGGER, MSIX, 0, 8, fds=eventfds) == 0
    await_fds(fds)


@pytest.mark.parametrize(
    ("argsz", "flags", "data"),
    [
        (19, MASK, b""),
        (20, MASK, b"\1\1"),
        (20, int(IrqSetFlag.DATA_BOOL | IrqSetFlag.MASK), b"\1"),
        (20, int(IrqSetFlag.DATA_BOOL | IrqSetFlag.MASK), b"\1\1\1"),
        (20, TRIGGER, b"\1\1"),
    ],
)
def test_data_of_another_size_is_refused(client: VfioUserPeer, argsz: int, flags: int, data: bytes) -> None:
    payload = IRQ_SET.pack(argsz, flags, MSIX, 0, 2) + data
    assert client.call(Command.DEVICE_SET_IRQS, payload).error == errno.EINVAL


def test_the_client_can_test_its_eventfds(client: VfioUserPeer, eventfds: list[int]) -> None:
    assert client.set_irqs(TRIGGER, MSIX, 0, 3, fds=eventfds[:3]) == 0
    assert client.set_irqs(int(IrqSetFlag.DATA_BOOL | IrqSetFlag.TRIGGER), MSIX, 0, 3, b"\1\0\1") == 0
    assert [signals(fd) for fd in eventfds[:3]] == [1, 0, 1]


def test_all_eventfds_of_a_message_or_none(client: VfioUserPeer, eventfds: list[int]) -> None:
    """One of them is a file, for which the whole message is refused; the vectors keep what they have."""
    assert client.set_irqs(TRIGGER, MSIX, 0, 2, fds=eventfds[:2]) == 0
    with open(os.devnull) as null:
        assert client.set_irqs(TRIGGER, MSIX, 0, 2, fds=[eventfds[2], null.fileno()]) == errno.EINVAL
    enable(client, MSIX)
    raise_vector(client, 0)
    assert (signals(eventfds[0]), signals(eventfds[2])) == (1, 0)


@pytest.mark.parametrize(
    ("flags", "index", "start", "count", "code"),
    [
        (TRIGGER, MSI, 4, 1, errno.EINVAL),
        (TRIGGER, MSIX, 7, 2, errno.EINVAL),
        (TRIGGER, MSIX, 0xFFFFFFFF, 2, errno.EINVAL),
        (TRIGGER, MSIX, 0, 3, errno.EINVAL),  # two fds come with it
        (UNMASK_BY, MSIX, 0, 2, errno.ENOTSUP),
        (int(IrqSetFlag.DATA_EVENTFD | IrqSetFlag.MASK), IrqIndex.INTX, 0, 2, errno.EINVAL),
        (MASK, MSIX, 0, 2, errno.EINVAL),
        (0x3F, MSIX, 0, 2, errno.EINVAL),
        (TRIGGER, IrqIndex.ERR, 0, 1, errno.EINVAL),
    ],
)
def test_refused(
    client: VfioUserPeer, eventfds: list[int], flags: int, index: int, start: int, count: int, code: int
) -> None:
    assert client.set_irqs(flags, index, start, count, fds=eventfds[:2]) == code
    assert client.bench.servers["vectors"].interrupts_in_use == (None, 0)
    assert client.bench.servers["vectors"].rejected == 1
