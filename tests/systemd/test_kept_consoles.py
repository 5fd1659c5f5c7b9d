# SPDX-License-Identifier: GPL-2.0-or-later
"""Users of a serial port stay connected when remoted is killed, and nothing that they say or hear is lost."""

from __future__ import annotations

import os
import re
import select
import socket
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.hostbench import REMOTED, HostBench
from tests.support.wait import wait_until

CHARDEVS = {"unix": "unix:/run/iohub/vm1/line", "pty": "pty"}
ADDRESSES = {"unix": "07.0", "pty": "08.0"}
ROUNDS = 3
FIFO = 16
RBR = THR = 0
FCR, LSR = 2, 5
DATA_READY = 0x01


@pytest.fixture(scope="module")
def host(
    installed: Path, requires_systemd: None, requires_kvm: None, requires_qemu: None
) -> Iterator[HostBench]:
    with closing(HostBench(installed)) as host:
        for name, chardev in CHARDEVS.items():
            host.add_device(
                f'model = "pci-serial"\nid = "{name}"\naddr = "{ADDRESSES[name]}"\nchardev = "{chardev}"\n'
            )
        host.start({"edu0", "com1", *CHARDEVS})
        host.command("setup")
        yield host


class Port:
    """The guest's end of a serial port, by polling."""

    def __init__(self, host: HostBench, name: str) -> None:
        self.host = host
        records = host.command("setup").of_kind("function")
        self._base = next(
            record.number("io0") for record in records if record.text("addr") == ADDRESSES[name]
        )
        self.write(FCR, 1)

    def read(self, register: int) -> int:
        return self.host.command(f"in 8 {self._base + register:#x}").result.number("value")

    def write(self, register: int, value: int) -> None:
        self.host.command(f"out 8 {self._base + register:#x} {value:#x}")

    def receive(self, count: int) -> bytes:
        data = bytearray()

        def has_all() -> bool:
            while self.read(LSR) & DATA_READY:
                data.append(self.read(RBR))
            return len(data) >= count

        wait_until(has_all, f"{count} characters have come, and not {bytes(data)!r}")
        return bytes(data)


def connect(host: HostBench, name: str) -> int:
    if name == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(host.root / "run/iohub/vm1/line"))
        return sock.detach()
    journal = host.journal("-u", REMOTED)
    path = re.findall(r"pty: char device redirected to (/dev/pts/\d+)", journal)[-1]
    return os.open(host.root / path.lstrip("/"), os.O_RDWR | os.O_NOCTTY)


@pytest.mark.parametrize("name", CHARDEVS)
def test_a_user_stays_connected(host: HostBench, name: str) -> None:
    """Killed with input half read and output half sent: the input comes once, a character out twice at most."""
    port = Port(host, name)
    fd = connect(host, name)
    os.write(fd, b"hello")
    assert port.receive(5) == b"hello"
    heard = bytearray()
    for number in range(ROUNDS):
        sent = os.urandom(3 * FIFO)
        os.write(fd, sent[: 2 * FIFO])
        head = bytes(port.read(RBR) for _ in range(FIFO // 2)) if number % 2 else b""
        host.kill(REMOTED)
        os.write(fd, sent[2 * FIFO :])
        received = head + port.receive(len(sent) - len(head))
        assert received == sent
        for character in range(4):
            port.write(THR, 8 * number + character)
        victim = host.kill(REMOTED)
        for character in range(4, 8):
            port.write(THR, 8 * number + character)
        host.wait_for_process(REMOTED, victim)
        while not heard.endswith(bytes((8 * number + 7,))):
            assert select.select([fd], [], [], 20.0)[0]
            heard += os.read(fd, 64)
    repeated = sum(before == after for before, after in pairwise(heard))
    assert sorted(set(heard)) == list(range(8 * ROUNDS))
    assert repeated <= ROUNDS
    assert heard == bytearray(sorted(heard))
    os.close(fd)
