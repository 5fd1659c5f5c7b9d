# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest on QEMU's vfio-user-pci that drives all of a device but its line: messages, DMA, and a BAR that it maps.

As many messages come as were sent, and masks hold them back.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from subprocess import TimeoutExpired

import pytest

from common import pci
from tests.support import vfiouserdevice as device
from tests.support.consolevfiouser import RAM, device_option
from tests.support.messageguest import APIC_ADDRESS, FIRST_VECTOR, MessageGuest
from tests.support.vfiouserprocess import (
    PCI_CAP_ID_MSI,
    PCI_CAP_ID_MSIX,
    PCI_CAPABILITY_LIST,
    PROBE,
    VfioUserServer,
)

DEVFN = 5 << 3
BASE = 0xE000_0000
STRIDE = 1 << 24
MESSAGES = 2000
KILLS = 10
RAM_ADDRESS = 0x200000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VfioUserServer]:
    server = VfioUserServer(tmp_path_factory.mktemp("messages"), {"probe": PROBE})
    yield server
    server.close()


@pytest.fixture(params=["kvm", "tcg"])
def guest(
    request: pytest.FixtureRequest, server: VfioUserServer, vfio_user_qemu: str
) -> Iterator[MessageFunction]:
    """The function with its BARs placed, in a fresh machine."""
    if request.param == "kvm":
        request.getfixturevalue("requires_kvm")
    with start(server, vfio_user_qemu, request.param) as machine:
        yield MessageFunction(machine)
    server.await_nothing_left()


def start(server: VfioUserServer, program: str, accelerator: str) -> MessageGuest:
    """A guest with the function."""
    return MessageGuest([*RAM, *device_option(server, "probe")], program, accelerator, ",memory-backend=ram")


class MessageFunction:
    """The guest's driver of a Probe."""

    def __init__(self, machine: MessageGuest) -> None:
        self.machine = machine
        for number in range(pci.PCI_NUM_BARS):
            register = pci.PCI_BASE_ADDRESS_0 + 4 * number
            is_upper_half = number == 3
            machine.set(DEVFN, register, 0 if is_upper_half else BASE + number * STRIDE)
        machine.set16(DEVFN, pci.PCI_COMMAND, pci.PCI_COMMAND_MEMORY | pci.PCI_COMMAND_MASTER)
        self.raise_register = BASE + device.RAISE
        capabilities = dict(self._capabilities())
        self.msi = capabilities[PCI_CAP_ID_MSI]
        self._msix = capabilities[PCI_CAP_ID_MSIX]
        place = machine.get(DEVFN, self._msix + 4)
        self._table = BASE + (place & 7) * STRIDE + (place & ~7)

    def _capabilities(self) -> Iterator[tuple[int, int]]:
        """The id of each, and where it is in config space."""
        position = self.machine.get(DEVFN, PCI_CAPABILITY_LIST) & 0xFF
        while position:
            word = self.machine.get(DEVFN, position)
            yield word & 0xFF, position
            position = word >> 8 & 0xFF

    def send(self, vector: int) -> None:
        """Lets the device send a message."""
        self.machine.write(self.raise_register, vector)

    def enable_msix(self, control: int = 0x8000) -> None:
        """Writes the control word; its other bits can't be written."""
        self.machine.set16(DEVFN, self._msix + 2, control)

    def mask(self, vector: int, masked: bool) -> None:
        """Masks or unmasks an entry of the MSI-X table."""
        self.machine.write(self._table + 16 * vector + 12, int(masked))

    def fill_table(self) -> None:
        """Each vector is sent to the vector of the CPU with its number, and none is masked."""
        for vector in range(device.MSIX_VECTORS):
            for offset, word in ((0, APIC_ADDRESS), (4, 0), (8, FIRST_VECTOR + vector), (12, 0)):
                self.machine.write(self._table + 16 * vector + offset, word)

    def enable_msi(self, masked: int = 0) -> None:
        """All vectors of MSI."""
        words = (APIC_ADDRESS, 0, FIRST_VECTOR, masked)
        for offset, word in zip((4, 8, 12, 16), words, strict=True):
            self.machine.set(DEVFN, self.msi + offset, word)
        multiple = device.MSI_VECTORS.bit_length() - 1
        self.machine.set16(DEVFN, self.msi + 2, multiple << 4 | 1)


def taken(guest: MessageFunction, before: list[int]) -> dict[int, int]:
    """How often each vector has come since, of those that have."""
    counts = [now - then for now, then in zip(guest.machine.counts(len(before)), before, strict=True)]
    return {number: count for number, count in enumerate(counts) if count}


def test_every_msix_message_arrives_once(guest: MessageFunction) -> None:
    guest.fill_table()
    guest.enable_msix()
    guest.machine.run(guest.raise_register, device.MSIX_VECTORS, MESSAGES)
    share = MESSAGES // device.MSIX_VECTORS
    assert guest.machine.counts(device.MSIX_VECTORS) == [share] * device.MSIX_VECTORS


def test_every_msi_message_arrives_once(guest: MessageFunction) -> None:
    guest.enable_msi()
    guest.machine.run(guest.raise_register, device.MSI_VECTORS, MESSAGES)
    share = MESSAGES // device.MSI_VECTORS
    assert guest.machine.counts(device.MSI_VECTORS) == [share] * device.MSI_VECTORS


def test_masked_msix_vector_comes_once_when_it_is_unmasked(guest: MessageFunction) -> None:
    guest.fill_table()
    guest.enable_msix()
    none = [0] * device.MSIX_VECTORS
    for turn in range(1, 6):
        guest.mask(3, True)
        for _ in range(turn):
            guest.send(3)
        guest.machine.run(guest.raise_register, 3, 3)  # what was sent before has had its time
        assert 3 not in taken(guest, none)
        guest.mask(3, False)
        guest.machine.run(guest.raise_register, 3, 3)
        assert taken(guest, none)[3] == 1
        none[3] += 1
    guest.send(3)
    guest.machine.run(guest.raise_register, 3, 3)
    assert taken(guest, none)[3] == 1


def test_function_mask_of_msix(guest: MessageFunction) -> None:
    guest.fill_table()
    guest.enable_msix(0xC000)
    for vector in (5, 5, 19):
        guest.send(vector)
    assert guest.machine.read(BASE + device.SCRATCH) == 0  # it has handled them
    none = [0] * device.MSIX_VECTORS
    assert taken(guest, none) == {}
    guest.enable_msix()
    guest.machine.run(guest.raise_register, 1, 1)
    assert taken(guest, none) == {0: 1, 5: 1, 19: 1}


def test_masked_msi_vector_comes_once_when_it_is_unmasked(guest: MessageFunction) -> None:
    guest.enable_msi(masked=0b0100)
    for vector in (2, 2, 3):
        guest.send(vector)
    guest.machine.run(guest.raise_register, 2, 2)
    none = [0] * device.MSI_VECTORS
    assert taken(guest, none) == {0: 1, 1: 1, 3: 1}
    guest.machine.set(DEVFN, guest.msi + 0x10, 0)
    guest.machine.run(guest.raise_register, 2, 2)
    assert taken(guest, none) == {0: 2, 1: 2, 2: 1, 3: 1}


def test_messages_are_switched_off_and_on(guest: MessageFunction) -> None:
    """With resets of the machine in between, which take everything back."""
    for _ in range(3):
        guest.fill_table()
        guest.enable_msix()
        guest.machine.run(guest.raise_register, 20, 20)
        guest.enable_msix(0)
        guest.enable_msi()
        before = guest.machine.counts(device.MSI_VECTORS)
        guest.machine.run(guest.raise_register, 4, 4)
        assert taken(guest, before) == dict.fromkeys(range(4), 1)
        guest.machine.set16(DEVFN, guest.msi + 2, 0)
        guest.machine.reset()
        guest = MessageFunction(guest.machine)


def test_dma(guest: MessageFunction) -> None:
    """Only while the guest has set bus mastering, as on hardware."""
    guest.machine.write(RAM_ADDRESS, 0x600DCAFE)
    guest.machine.write(BASE + device.DMA_ADDRESS, RAM_ADDRESS)
    guest.machine.write(BASE + device.DMA_ADDRESS + 4, 0)
    assert guest.machine.read(BASE + device.DMA_DATA) == 0x600DCAFE
    guest.machine.write(BASE + device.DMA_DATA, 0x12345678)
    assert guest.machine.read(BASE + device.DMA_FAILED) == 0
    assert guest.machine.read(RAM_ADDRESS) == 0x12345678
    guest.machine.set16(DEVFN, pci.PCI_COMMAND, pci.PCI_COMMAND_MEMORY)
    guest.machine.write(BASE + device.DMA_DATA, 0xBAD)
    assert guest.machine.read(BASE + device.DMA_FAILED) == 1
    assert guest.machine.read(RAM_ADDRESS) == 0x12345678
    guest.machine.set16(DEVFN, pci.PCI_COMMAND, pci.PCI_COMMAND_MEMORY | pci.PCI_COMMAND_MASTER)
    assert guest.machine.read(BASE + device.DMA_DATA) == 0x12345678


def test_dma_where_there_is_no_ram(guest: MessageFunction) -> None:
    for address in (0xF000_0000, 0xFFFF_F000, 64 << 20):
        guest.machine.write(BASE + device.DMA_ADDRESS, address)
        guest.machine.write(BASE + device.DMA_DATA, 0xBAD)
        assert guest.machine.read(BASE + device.DMA_FAILED) == 1


def test_guest_maps_a_bar(guest: MessageFunction, server: VfioUserServer) -> None:
    """What it writes to the mapped area never comes as a message; the registers beside it work."""
    start, length = device.SHARED
    bar = BASE + 2 * STRIDE
    places = [start, start + 0x1000, start + length - 4]
    guest.machine.write(bar + start, 0)  # the first access may be the one that maps it
    before = server.status("probe")["accesses"]
    for number, place in enumerate(places * 10):
        guest.machine.write(bar + place, 0xA0000000 + number)
        assert guest.machine.read(bar + place) == 0xA0000000 + number
    assert server.status("probe")["accesses"] == before
    assert guest.machine.read(bar + 0x10) == 0x10
    assert server.status("probe")["accesses"] == before + 1
    guest.machine.close()
    server.await_nothing_left()
    with server.connect("probe") as client:
        client.version()
        assert [client.read(2, place) - 0xA0000000 for place in places] == [27, 28, 29]


def test_qemu_is_killed_while_messages_are_sent(
    requires_kvm: None, server: VfioUserServer, vfio_user_qemu: str
) -> None:
    """With RAM that was accessed, a BAR that is mapped, and an eventfd for each vector: nothing of it is left."""
    random = Random(7)
    sent = 0
    for _ in range(KILLS):
        before = server.status("probe")["messages"]
        with start(server, vfio_user_qemu, "kvm") as machine:
            guest = MessageFunction(machine)
            guest.fill_table()
            guest.enable_msix()
            machine.write(BASE + 2 * STRIDE + device.SHARED[0], 1)
            machine.write(BASE + device.DMA_ADDRESS, RAM_ADDRESS)
            machine.write(BASE + device.DMA_DATA, 1)
            machine.start_run(guest.raise_register, device.MSIX_VECTORS, 1 << 23)
            with pytest.raises(TimeoutExpired):
                machine.process.wait(random.uniform(0, 0.1))
        server.await_nothing_left()
        sent += server.status("probe")["messages"] > before
    assert sent > KILLS // 2
    with start(server, vfio_user_qemu, "kvm") as machine:
        guest = MessageFunction(machine)
        guest.fill_table()
        guest.enable_msix()
        machine.run(guest.raise_register, device.MSIX_VECTORS, MESSAGES)
