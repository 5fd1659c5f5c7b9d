# SPDX-License-Identifier: GPL-2.0-or-later
"""Linux's 8250 driver on pci-serial over vfio-user, by interrupts."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.linuxguest import LinuxGuest
from tests.support.serialline import exchange
from tests.support.vfiouserguest import VfioUserGuest, serving
from tests.support.wait import wait_until

PORT = "/dev/ttyS1"
KIBIBYTES = int(os.environ.get("IOHUB_SERIAL_KIB", "32"))
"""each way; one takes a tenth of a second, on a busy machine three"""
PART = 64
"""of them in one test, which may take two minutes"""
PARTS = range(0, KIBIBYTES, PART)
ECHOES = 300


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serial")


@pytest.fixture(scope="module")
def guest(vfio_user_qemu: str, directory: Path) -> Iterator[VfioUserGuest]:
    device = f"pci-serial,id=com1,addr=05.0,carrier=on,chardev=unix:{directory}/line"
    with (
        serving(directory, device),
        VfioUserGuest(vfio_user_qemu, directory, {"com1": {"addr": "05.0"}}) as guest,
    ):
        # An open port keeps its settings and its interrupt.
        guest.run(f"exec 9<>{PORT}")
        yield guest


@pytest.fixture
def line(directory: Path, guest: LinuxGuest) -> Iterator[socket.socket]:
    """The serial line's other end."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(directory / "line"))
        line.settimeout(20.0)
        yield line


def interrupts(guest: LinuxGuest) -> int:
    """How many the driver had."""
    return int(guest.run("grep -w ttyS1 /proc/interrupts").split()[1])


def modem(guest: LinuxGuest, *changes: str) -> set[str]:
    """The modem lines that are on after these changes."""
    return set(guest.run(f"serialport {PORT} modem {' '.join(changes)}").split())


def test_the_driver_finds_a_16550a(guest: LinuxGuest) -> None:
    (found,) = guest.run("dmesg | grep 'ttyS1 at'").splitlines()
    assert "0000:00:05.0" in found
    assert found.endswith("is a 16550A")


@pytest.mark.parametrize("part", PARTS)
def test_bytes_arrive_in_both_directions_at_once(
    guest: VfioUserGuest, line: socket.socket, part: int
) -> None:
    """The driver stays in its handler while there is work, so that more interrupts would be a storm.

    Some are spurious: without KVM, QEMU takes any access for an EOI.
    """
    before, size = interrupts(guest), min(KIBIBYTES - part, PART) << 10
    exchange(guest, PORT, line, inward=size, outward=size)
    assert 0 < interrupts(guest) - before < size // 16
    assert not guest.complaints("irq", "ttyS1", "serial", "05.0")


def test_no_interrupt_is_lost_between_single_bytes(guest: LinuxGuest, line: socket.socket) -> None:
    """The line falls and rises for each, for the receiver and for the transmitter."""
    guest.run(f"stty -F {PORT} raw -echo; cat <{PORT} >{PORT} & echo=$!")
    before = interrupts(guest)
    for number in range(ECHOES):
        byte = bytes([number & 0xFF])
        line.sendall(byte)
        assert line.recv(2) == byte
    assert interrupts(guest) - before >= ECHOES
    guest.run("kill $echo")


def test_settings_and_a_break_change_no_byte(guest: LinuxGuest, line: socket.socket) -> None:
    """The line has no speed and bytes of eight bits, whatever the guest sets."""
    guest.run(f"stty -F {PORT} raw -echo 9600 cs7 parenb parodd cstopb")
    settings = guest.run(f"stty -F {PORT} -a")
    assert "speed 9600 baud" in settings
    assert " cs7 " in settings
    guest.run(f"stty -F {PORT} 115200 cs8 -parenb -cstopb; serialport {PORT} break; printf abc > {PORT}")
    with line.makefile("rb") as output:
        assert output.read(3) == b"abc"


def test_modem_outputs_come_back_in_loopback(guest: LinuxGuest, line: socket.socket) -> None:
    """DCD is OUT2 there, which the driver has on."""
    assert modem(guest, "+loop", "+dtr", "-rts") == {"loop", "dtr", "dsr", "dcd"}
    assert modem(guest, "+loop", "-dtr", "+rts") == {"loop", "rts", "cts", "dcd"}
    assert modem(guest, "-loop") == {"dtr", "rts", "cts", "dsr", "dcd"}


def test_the_carrier_is_on_while_a_user_is_connected(guest: LinuxGuest, directory: Path) -> None:
    assert "dcd" not in modem(guest)
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(directory / "line"))
        wait_until(lambda: "dcd" in modem(guest), "the guest sees a carrier")
    wait_until(lambda: "dcd" not in modem(guest), "the guest sees no carrier")
