# SPDX-License-Identifier: GPL-2.0-or-later
"""pci-serial on a real loop with real far ends."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common import pci
from common.errors import UsageError
from common.serial_reg import (
    UART_FCR,
    UART_IER,
    UART_IIR,
    UART_LCR,
    UART_LSR,
    UART_LSR_DR,
    UART_LSR_THRE,
    UART_MCR,
    UART_MSR,
    UART_RX,
    UART_SCR,
    UART_TX,
)
from remoted.devices.pci_serial import PciSerial
from tests.support.devices import FunctionBench
from tests.support.steploop import CountingLoop, run_ready, run_until
from tests.support.wait import wait_until

Bench = FunctionBench[PciSerial]
Create = Callable[..., Bench]


@pytest.fixture
def create(counting_loop: CountingLoop) -> Iterator[Create]:
    made: list[Bench] = []

    def create(**properties: str) -> Bench:
        made.append(FunctionBench(PciSerial, counting_loop, **properties))
        return made[-1]

    yield create
    for bench in made:
        bench.function.close()


def receive(bench: Bench, loop: CountingLoop, size: int) -> bytes:
    """So many characters, read by a polling guest."""
    data = bytearray()
    while len(data) < size:
        run_until(loop, lambda: bench.read(UART_LSR, 1) & UART_LSR_DR)
        data.append(bench.read(UART_RX, 1))
    return bytes(data)


def test_identity(create: Create) -> None:
    """As QEMU's hw/char/serial-pci.c and Linux's 8250_pci.c have it."""
    function = create().function
    assert function.config_read(pci.PCI_VENDOR_ID, 4) == 0x00021B36
    assert function.config_read(pci.PCI_REVISION_ID, 4) == 0x07000201
    assert function.config_read(pci.PCI_SUBSYSTEM_VENDOR_ID, 4) == 0x11001AF4
    assert function.config_read(pci.PCI_INTERRUPT_PIN, 1) == 1
    function.config_write(pci.PCI_BASE_ADDRESS_0, 4, 0xFFFFFFFF)
    assert function.config_read(pci.PCI_BASE_ADDRESS_0, 4) == 0xFFFFFFF9


def test_wide_accesses_are_little_endian_bytes(create: Create) -> None:
    bench = create()
    bench.write(UART_LCR, 1, 0x80)
    bench.write(0, 2, 0x1234)
    assert [bench.read(offset, 1) for offset in range(2)] == [0x34, 0x12]
    bench.write(UART_LCR, 4, 0x44332211)
    assert bench.read(UART_LCR, 4) == 0xB0600000 | bench.read(UART_MCR, 1) << 8 | 0x11
    bench.write(UART_MCR, 4, 0x77000000)
    assert bench.read(UART_SCR, 1) == 0x77


def test_interrupt_reaches_the_line(create: Create) -> None:
    bench = create()
    bench.write(UART_IER, 1, 0x02)
    assert bench.lines == [True]
    bench.write(UART_TX, 1, ord("x"))
    assert bench.lines == [True], "INTR's dip within one access isn't shown to the hub"
    bench.read(UART_IIR, 1)
    assert bench.lines == [True, False]


def test_intx_disable_holds_the_line_down(create: Create) -> None:
    bench = create()
    bench.write(UART_IER, 1, 0x02)
    bench.function.config_write(pci.PCI_COMMAND, 2, 0x403)
    assert not bench.line
    bench.function.config_write(pci.PCI_COMMAND, 2, 0x003)
    assert bench.line


def test_received_character_interrupts(create: Create, counting_loop: CountingLoop, tmp_path: Path) -> None:
    """Between accesses the line follows INTR: data, and the character timeout from the loop's timer."""
    bench = create(chardev=f"unix:{tmp_path}/line")
    bench.write(UART_IER, 1, 0x01)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{tmp_path}/line")
        client.sendall(b"a")
        run_until(counting_loop, lambda: bench.line)
        assert bench.read(UART_RX, 1) == ord("a")
        assert not bench.line
        bench.write(UART_FCR, 1, 0xC1)
        client.sendall(b"b")
        run_until(counting_loop, lambda: bench.line)
        assert bench.read(UART_IIR, 1) == 0xCC


def test_reset_while_high(create: Create) -> None:
    bench = create()
    bench.write(UART_FCR, 1, 0x01)
    bench.write(UART_IER, 1, 0x02)
    bench.function.full_reset()
    assert not bench.line
    bench.place_bars()
    assert [bench.read(offset, 1) for offset in range(8)] == [0, 0, 0x01, 0, 0x08, 0x60, 0xB0, 0]
    bench.write(UART_IER, 1, 0x02)
    assert bench.line


@pytest.mark.parametrize("fcr", [0x00, 0x01, 0x41, 0x81, 0xC1])
def test_unix_both_ways(create: Create, counting_loop: CountingLoop, tmp_path: Path, fcr: int) -> None:
    """Much more than the FIFO and the guest's patience hold, at every trigger level: nothing is lost."""
    bench = create(chardev=f"unix:{tmp_path}/line")
    bench.write(UART_FCR, 1, fcr)
    data = os.urandom(3000)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{tmp_path}/line")
        client.sendall(data)
        assert receive(bench, counting_loop, len(data)) == data
        for byte in data:
            bench.write(UART_TX, 1, byte)
        received = bytearray()
        client.setblocking(False)

        def everything() -> bool:
            with contextlib.suppress(BlockingIOError):
                received.extend(client.recv(1 << 16))
            return len(received) == len(data)

        run_until(counting_loop, everything)
        assert received == data


def test_guest_that_does_not_read(create: Create, counting_loop: CountingLoop, tmp_path: Path) -> None:
    """Characters wait outside of the chip without overrun, and the loop sleeps."""
    bench = create(chardev=f"unix:{tmp_path}/line")
    bench.write(UART_FCR, 1, 0x81)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{tmp_path}/line")
        client.sendall(bytes(range(100)))
        run_until(counting_loop, lambda: bench.read(UART_LSR, 1) & UART_LSR_DR)
        run_ready(counting_loop)
        assert run_ready(counting_loop) == 0
        assert bench.read(UART_LSR, 1) == 0x61
        assert receive(bench, counting_loop, 100) == bytes(range(100))


def test_loopback_keeps_the_line_out(create: Create, counting_loop: CountingLoop, tmp_path: Path) -> None:
    """What arrives meanwhile is delivered when loopback ends."""
    bench = create(chardev=f"unix:{tmp_path}/line")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{tmp_path}/line")
        bench.write(UART_MCR, 1, 0x10)
        client.sendall(b"x")
        run_ready(counting_loop)
        assert bench.read(UART_LSR, 1) == 0x60
        bench.write(UART_MCR, 1, 0)
        assert receive(bench, counting_loop, 1) == b"x"


def test_slow_reader_stops_the_guest(create: Create, counting_loop: CountingLoop, tmp_path: Path) -> None:
    """THRE goes off until the reader has caught up; a reset by the guest doesn't confuse the line."""
    bench = create(chardev=f"unix:{tmp_path}/line")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{tmp_path}/line")
        run_until(counting_loop, lambda: bench.function._chardev.connected)
        sent = 0
        while bench.read(UART_LSR, 1) & UART_LSR_THRE:
            bench.write(UART_TX, 1, sent & 0xFF)
            sent += 1
            assert sent < 1 << 22
        assert run_ready(counting_loop) < 100
        received = bytearray()
        client.setblocking(False)

        def caught_up() -> bool:
            with contextlib.suppress(BlockingIOError):
                received.extend(client.recv(1 << 16))
            return len(received) == sent

        run_until(counting_loop, caught_up)
        assert received == bytes(i & 0xFF for i in range(sent))
        assert bench.read(UART_LSR, 1) == 0x60


def test_pty(create: Create, counting_loop: CountingLoop, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        bench = create(chardev="pty")
    match = re.search(r"char device redirected to (\S+)", caplog.text)
    assert match
    slave = os.open(match[1], os.O_RDWR | os.O_NOCTTY)
    try:
        os.write(slave, b"\x03\r\n")
        assert receive(bench, counting_loop, 3) == b"\x03\r\n", "raw: neither a signal nor a translation"
        bench.write(UART_TX, 1, ord("\n"))
        assert os.read(slave, 10) == b"\n"
    finally:
        os.close(slave)


def test_output_for_nobody_is_amiss(create: Create, tmp_path: Path) -> None:
    bench = create(chardev=f"unix:{tmp_path}/line")
    assert bench.function.amiss.texts() == []
    for byte in b"boot":
        bench.write(UART_TX, 1, byte)
    assert bench.function.amiss.texts() == [
        f"4 bytes of output dropped: nobody is connected to {tmp_path}/line"
    ]
    assert bench.function.counters == {"dropped_output": 4, "dropped_input": 0}


def test_file(create: Create, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("old")
    bench = create(chardev=f"file:{path}")
    for byte in b"booting\n":
        bench.write(UART_TX, 1, byte)
    wait_until(lambda: path.read_bytes() == b"booting\n", "a thread writes it")


class TestCarrier:
    def test_rises_when_a_pty_is_opened(
        self, create: Create, counting_loop: CountingLoop, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A getty waits for it before it says a word, and its user for that word."""
        with caplog.at_level("INFO"):
            bench = create(chardev="pty", carrier="on")
        match = re.search(r"char device redirected to (\S+)", caplog.text)
        assert match
        bench.write(UART_IER, 1, 0x08)
        slave = os.open(match[1], os.O_RDWR | os.O_NOCTTY)
        try:
            run_until(counting_loop, lambda: bench.line)
            assert bench.read(UART_MSR, 1) == 0xBA
        finally:
            os.close(slave)
        run_until(counting_loop, lambda: bench.line)
        assert bench.read(UART_MSR, 1) == 0x1A

    def test_is_always_there_by_default(
        self, create: Create, counting_loop: CountingLoop, tmp_path: Path
    ) -> None:
        bench = create(chardev=f"unix:{tmp_path}/line")
        assert bench.read(UART_MSR, 1) == 0xB0
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{tmp_path}/line")
            run_until(counting_loop, lambda: bench.function._chardev.connected)
            assert bench.read(UART_MSR, 1) == 0xB0

    def test_follows_the_client(self, create: Create, counting_loop: CountingLoop, tmp_path: Path) -> None:
        """With the modem status interrupt, which nothing else raises."""
        bench = create(chardev=f"unix:{tmp_path}/line", carrier="on")
        assert bench.read(UART_MSR, 1) == 0x10, "nobody there, and no delta after the reset"
        bench.write(UART_IER, 1, 0x08)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{tmp_path}/line")
            run_until(counting_loop, lambda: bench.line)
            assert bench.read(UART_IIR, 1) == 0x00
            assert bench.read(UART_MSR, 1) == 0xBA
            assert not bench.line
            bench.function.full_reset()
            bench.place_bars()
            assert bench.read(UART_MSR, 1) == 0xB0, "a reset doesn't pull the plug"
            bench.write(UART_IER, 1, 0x08)
        run_until(counting_loop, lambda: bench.line)
        assert bench.read(UART_MSR, 1) == 0x1A

    def test_a_client_does_not_show_in_loopback(
        self, create: Create, counting_loop: CountingLoop, tmp_path: Path
    ) -> None:
        bench = create(chardev=f"unix:{tmp_path}/line", carrier="on")
        bench.write(UART_IER, 1, 0x08)
        bench.write(UART_MCR, 1, 0x1B)
        assert bench.read(UART_MSR, 1) == 0xBA
        assert not bench.line
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{tmp_path}/line")
            run_until(counting_loop, lambda: bench.function._chardev.connected)
            assert not bench.line
            bench.write(UART_MCR, 1, 0x08)
            assert bench.read(UART_MSR, 1) == 0xB0, "pins and outputs are alike"
        run_until(counting_loop, lambda: bench.line)
        assert bench.read(UART_MSR, 1) == 0x1A
        assert not bench.line

    def test_null_and_file_are_always_there(self, create: Create, tmp_path: Path) -> None:
        for spec in ("null", f"file:{tmp_path}/log"):
            assert create(chardev=spec, carrier="on").read(UART_MSR, 1) == 0xB0


@pytest.mark.parametrize(
    "properties", [{"chardev": "tcp:1"}, {"carrier": ""}, {"carrier": "yes", "chardev": "pty"}]
)
def test_bad_options(create: Create, properties: dict[str, str]) -> None:
    """Named in one line; nothing stays open (the loop's fixture counts)."""
    name, value = next(iter(properties.items()))
    with pytest.raises(UsageError, match=re.escape(f"{name}={value}: must be")):
        create(**properties)
