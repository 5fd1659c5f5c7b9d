# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's bus: what an access of any width at any address reaches."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import pytest

from common.loop import Loop
from common.pci import parse_devfn
from proxyd.pci.pcidev import PciProxy
from proxyd.pci.pcihost import PciHost
from proxyd.vm.soft.softirqchip import SoftIrqchip
from remoted.device import Bar, BarKind, Host, PciFunction
from tests.support.remote import RemoteThread

DEVFN = parse_devfn("05.0")
PORT, MEMORY = 0xC000, 0xFE000000
CONFIG_ADDRESS, CONFIG_DATA = 0xCF8, 0xCFC
ENABLE = 1 << 31
DEVICE = ENABLE | DEVFN << 8


class Witness(PciFunction):
    """Eight bytes of I/O, and a page of memory; each byte reads as the low byte of its offset."""

    VENDOR_ID = 0x1234
    DEVICE_ID = 0x5678
    BARS: ClassVar[Mapping[int, Bar]] = {0: Bar(BarKind.IO, 8), 1: Bar(BarKind.MEM32, 4096)}

    def __init__(self, host: Host, properties: Mapping[str, str]) -> None:
        super().__init__(host, properties)
        self.seen: list[tuple[int, int]] = []
        """offset and size of each access"""
        self.written: list[tuple[int, int, int]] = []

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        self.seen.append((offset, size))
        return int.from_bytes(bytes((offset + n) & 0xFF for n in range(size)), "little")

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        self.written.append((offset, size, value))


class Bus:
    """The host bridge with one function, which decodes I/O at PORT and memory at MEMORY."""

    def __init__(self, directory: Path) -> None:
        self.remote = RemoteThread(directory)
        self.function = self.remote.add(Witness, "witness", DEVFN)
        self.remote.start()
        self.loop = Loop()
        irqchip = SoftIrqchip(self.loop)
        self.proxy = PciProxy(
            "witness",
            DEVFN,
            self.remote.path("witness"),
            irqchip,
            logging.getLogger("test"),
            lambda _proxy: None,
            deadline=20.0,
        )
        self.host = PciHost(irqchip, [self.proxy])
        self.proxy.connect()
        self.proxy.attach()
        self.place(PORT)
        for offset, value in ((0x14, MEMORY), (0x04, 0x0003)):
            self.config(offset)
            self.host.pio_write(CONFIG_DATA, 4, value)

    def place(self, port: int) -> None:
        """Moves the I/O BAR."""
        self.config(0x10)
        self.host.pio_write(CONFIG_DATA, 4, port)

    def config(self, offset: int, base: int = DEVICE) -> None:
        """Writes CONFIG_ADDRESS."""
        self.host.pio_write(CONFIG_ADDRESS, 4, base | offset)

    def close(self) -> None:
        self.proxy.close()
        self.loop.close()
        self.remote.close()


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[Bus]:
    bus = Bus(tmp_path)
    yield bus
    bus.close()


ACCESSES = {
    "aligned byte": (5, 1, [(5, 1)], 0x05),
    "aligned word": (6, 2, [(6, 2)], 0x0706),
    "aligned doubleword": (4, 4, [(4, 4)], 0x07060504),
    "word across a word": (1, 2, [(1, 1), (2, 1)], 0x0201),
    "word across a doubleword": (3, 2, [(3, 1), (4, 1)], 0x0403),
    "doubleword from an odd address": (3, 4, [(3, 1), (4, 2), (6, 1)], 0x06050403),
    "doubleword from an even address": (2, 4, [(2, 2), (4, 2)], 0x05040302),
    "word that ends beyond": (7, 2, [(7, 1)], 0xFF07),
    "doubleword that ends beyond": (7, 4, [(7, 1)], 0xFFFFFF07),
    "doubleword that begins before": (-2, 4, [(0, 2)], 0x0100FFFF),
    "word that begins before": (-1, 2, [(0, 1)], 0x00FF),
    "beyond": (8, 4, [], 0xFFFFFFFF),
}


@pytest.mark.parametrize(("offset", "size", "seen", "value"), ACCESSES.values(), ids=ACCESSES)
def test_an_io_read_reaches_the_device_in_aligned_parts(
    bus: Bus, offset: int, size: int, seen: list[tuple[int, int]], value: int
) -> None:
    assert bus.host.pio_read(PORT + offset, size) == value
    assert bus.function.seen == seen


@pytest.mark.parametrize(
    ("offset", "size", "written"),
    [
        (4, 4, [(4, 4, 0x44332211)]),
        (3, 4, [(3, 1, 0x11), (4, 2, 0x3322), (6, 1, 0x44)]),
        (7, 2, [(7, 1, 0x11)]),
        (-2, 4, [(0, 2, 0x4433)]),
    ],
)
def test_an_io_write_reaches_the_device_in_aligned_parts(
    bus: Bus, offset: int, size: int, written: list[tuple[int, int, int]]
) -> None:
    bus.host.pio_write(PORT + offset, size, 0x44332211 & (1 << 8 * size) - 1)
    assert bus.function.written == written


MEMORY_ACCESSES = {
    "quadword": (8, 8, [(8, 8)]),
    "quadword from a doubleword": (4, 8, [(4, 4), (8, 4)]),
    "doubleword from an odd address": (1, 4, [(1, 1), (2, 2), (4, 1)]),
    "three bytes, half of one across a page": (0xFFD, 3, [(0xFFD, 1), (0xFFE, 2)]),
    "quadword across the end": (0xFFC, 8, [(0xFFC, 4)]),
}


@pytest.mark.parametrize(("offset", "size", "seen"), MEMORY_ACCESSES.values(), ids=MEMORY_ACCESSES)
def test_a_memory_access_reaches_the_device_in_aligned_parts(
    bus: Bus, offset: int, size: int, seen: list[tuple[int, int]]
) -> None:
    inside = min(size, 4096 - offset)
    data = bytes((offset + n) & 0xFF for n in range(inside)) + b"\xff" * (size - inside)
    assert bus.host.mmio_read(MEMORY + offset, size) == int.from_bytes(data, "little")
    assert bus.function.seen == seen
    bus.host.mmio_write(MEMORY + offset, size, int.from_bytes(data, "little"))
    assert [(start, length) for start, length, _ in bus.function.written] == seen
    assert (
        b"".join(value.to_bytes(length, "little") for _, length, value in bus.function.written)
        == data[:inside]
    )


CONFIG_READS = {
    "doubleword": (0, 4, 0x56781234),
    "device id": (2, 2, 0x5678),
    "byte": (3, 1, 0x56),
    "word across its bytes": (1, 2, 0x7812),
    "doubleword that ends beyond the data port": (2, 4, 0xFFFF5678),
    "word that ends beyond the data port": (3, 2, 0xFF56),
    "word that begins before the data port": (-1, 2, 0x34FF),
}


@pytest.mark.parametrize(("position", "size", "value"), CONFIG_READS.values(), ids=CONFIG_READS)
def test_a_config_read_ends_with_the_data_port(bus: Bus, position: int, size: int, value: int) -> None:
    bus.config(0x00)
    assert bus.host.pio_read(CONFIG_DATA + position, size) == value


def test_a_config_write_ends_with_the_data_port(bus: Bus) -> None:
    bus.config(0x0C)
    bus.host.pio_write(CONFIG_DATA + 2, 4, 0xFFFFFFFF)
    bus.config(0x10)
    assert bus.host.pio_read(CONFIG_DATA, 4) == PORT | 1


def test_the_last_bytes_of_config_space(bus: Bus) -> None:
    bus.config(0xFC)
    bus.host.pio_write(CONFIG_DATA, 4, 0x44332211)
    assert [bus.host.pio_read(CONFIG_DATA + position, 1) for position in range(4)] == [0x11, 0x22, 0x33, 0x44]
    assert bus.host.pio_read(CONFIG_DATA + 2, 4) == 0xFFFF4433


def test_the_address_register_takes_doublewords_only(bus: Bus) -> None:
    bus.config(0x00)
    assert bus.host.pio_read(CONFIG_ADDRESS, 4) == DEVICE
    bus.host.pio_write(CONFIG_ADDRESS, 2, 0x0040)
    bus.host.pio_write(CONFIG_ADDRESS + 3, 1, 0)
    assert bus.host.pio_read(CONFIG_ADDRESS, 4) == DEVICE
    assert bus.host.pio_read(CONFIG_ADDRESS, 2) == 0xFFFF


ABSENT = {"function": ENABLE | parse_devfn("05.1") << 8, "bus": DEVICE | 1 << 16}


@pytest.mark.parametrize("base", ABSENT.values(), ids=ABSENT)
def test_nobody_answers_for_who_is_absent(bus: Bus, base: int) -> None:
    """Not even a BAR that the guest has put onto the data port."""
    bus.place(0xCF8)
    bus.config(0x00, base)
    assert bus.host.pio_read(CONFIG_DATA, 4) == 0xFFFFFFFF
    bus.host.pio_write(CONFIG_DATA, 4, 0)
    assert not bus.function.seen
    assert not bus.function.written


def test_without_the_enable_bit_the_data_port_is_a_port_like_others(bus: Bus) -> None:
    assert bus.host.pio_read(CONFIG_DATA, 4) != 0xFFFFFFFF
    bus.config(0x00, DEVICE & ~ENABLE)
    assert bus.host.pio_read(CONFIG_DATA, 4) == 0xFFFFFFFF
    bus.config(0x10)
    bus.host.pio_write(CONFIG_DATA, 4, 0xCF8)
    bus.config(0x00, DEVICE & ~ENABLE)
    assert bus.host.pio_read(CONFIG_DATA, 4) == 0x07060504


class Meeting(PciFunction):
    """A reset in mid-life waits until that of the others has begun."""

    VENDOR_ID = 0x1234
    DEVICE_ID = 0x5679
    others: ClassVar[threading.Barrier | None] = None

    def reset(self) -> None:
        if self.others is not None:
            self.others.wait(5.0)


@pytest.mark.parametrize("threads", ["enough", "none"])
def test_a_reset_of_the_machine_waits_for_all_functions_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: str
) -> None:
    loop = Loop()
    irqchip = SoftIrqchip(loop)
    remotes, proxies = [], []
    for slot in (5, 6, 7):
        remote = RemoteThread(tmp_path)
        remote.add(Meeting, f"m{slot}", slot << 3)
        remote.start()
        remotes.append(remote)
        path, log = remote.path(f"m{slot}"), logging.getLogger("test")
        proxies.append(
            PciProxy(f"m{slot}", slot << 3, path, irqchip, log, lambda _proxy: None, deadline=20.0)
        )
    for proxy in proxies:
        proxy.connect()
        proxy.attach()
    host = PciHost(irqchip, proxies)
    if threads == "enough":
        monkeypatch.setattr(Meeting, "others", threading.Barrier(len(proxies)))
    else:

        def refuse(_thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuse)
    host.reset()
    assert Meeting.others is None or not Meeting.others.broken
    for proxy in proxies:
        assert proxy.remote is not None
        assert not proxy._reset_due
        proxy.close()
    for remote in remotes:
        remote.close()
    loop.close()


ROUTER = ENABLE | parse_devfn("01.0") << 8 | 0x60
ELCR2 = 0x4D1


def test_a_reset_of_the_machine_is_one_of_the_irqchip_too() -> None:
    loop = Loop()
    irqchip = SoftIrqchip(loop)
    host = PciHost(irqchip, [])
    host.pio_write(CONFIG_ADDRESS, 4, ROUTER)
    host.pio_write(CONFIG_DATA, 1, 10)
    assert irqchip.pic.port_in(ELCR2, 1) == 1 << 10 - 8
    host.reset()
    assert irqchip.pic.port_in(ELCR2, 1) == 0
    assert host.pio_read(CONFIG_ADDRESS, 4) == 0
    loop.close()


def test_an_irq_that_stands_in_a_disabled_register_of_the_router_is_routed_nowhere() -> None:
    loop = Loop()
    irqchip = SoftIrqchip(loop)
    host = PciHost(irqchip, [])
    host.pio_write(CONFIG_ADDRESS, 4, ROUTER)
    host.pio_write(CONFIG_DATA, 1, 0x80 | 10)
    assert irqchip.pic.port_in(ELCR2, 1) == 0
    loop.close()
