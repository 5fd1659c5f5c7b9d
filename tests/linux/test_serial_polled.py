# SPDX-License-Identifier: GPL-2.0-or-later
"""Linux's 8250 driver on pci-serial over mpqemu. Under TCG QEMU's proxy has no interrupts: the driver polls."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.ctl.children import Child
from tests.support.linuxguest import KernelPanic, LinuxGuest, QemuEnded
from tests.support.serialline import exchange

pytestmark = pytest.mark.usefixtures("requires_qemu")

PORT = "/dev/ttyS1"


@pytest.fixture(scope="module")
def line() -> Iterator[socket.socket]:
    """The serial line's other end."""
    with socket.socket(socket.AF_UNIX) as line:
        yield line


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory, line: socket.socket) -> Iterator[LinuxGuest]:
    directory = tmp_path_factory.mktemp("polled")
    chardev = directory / "line"
    device = f"--device=pci-serial,id=com1,addr=05.0,chardev=unix:{chardev}"
    remoted = Child("remoted", ["--name=vm", f"--runtime-dir={directory}", device], directory)
    try:
        line.connect(str(chardev))
        with booted(directory / "com1.sock") as guest:
            yield guest
    finally:
        remoted.kill()


def booted(device: Path) -> LinuxGuest:
    """Under the system's QEMU; newer ones than 7.2 crash where an x-pci-proxy-dev has no KVM."""
    for _ in range(2):
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(str(device))
            args = ["-device", f"x-pci-proxy-dev,addr=05.0,fd={link.fileno()}"]
            # QEMU 7.2's TCG lets a newer kernel oops once in a while, in any of its parts.
            with contextlib.suppress(KernelPanic):
                try:
                    return LinuxGuest(args, pass_fds=[link.fileno()], machine="pc")
                except QemuEnded as ended:
                    if ended.status != -signal.SIGSEGV:
                        raise
                    pytest.skip("needs an x-pci-proxy-dev that works without KVM: QEMU 7.2's")
    pytest.fail("the kernel panics at each start")


def test_the_driver_finds_a_16550a(guest: LinuxGuest) -> None:
    (found,) = guest.run("dmesg | grep 'ttyS1 at'").splitlines()
    assert "0000:00:05.0" in found
    assert found.endswith("is a 16550A")


def test_bytes_arrive_in_both_directions_at_once(guest: LinuxGuest, line: socket.socket) -> None:
    """The driver sends a FIFO's 16 bytes at each tick of its timer, 2 to 4 KB/s."""
    guest.run(f"serialport {PORT} irq 0")
    exchange(guest, PORT, line, inward=32768, outward=8192)
    assert "irq:0 tx:8192 rx:32768 " in guest.run("grep ^1: /proc/tty/driver/serial")
