# SPDX-License-Identifier: GPL-2.0-or-later
"""A remoted in the test's own thread with devices on vfio-user, and a client of one of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import pytest

from common.config import Transport
from remoted.device import Bar, BarKind, Msi, Msix
from tests.support.fds import await_fds, count_fds
from tests.support.remotebench import LineDevice, RemoteBench
from tests.support.vfiouserbench import VfioUserPeer


class VectorDevice(LineDevice):
    """Raises the vector whose number is written to offset 0 of BAR 1, and fails at offset 4.

    BAR 2 has registers and an area of memory that can be mapped, BAR 3 is such memory throughout.
    """

    MSI = Msi(vectors=4)
    MSIX = Msix(vectors=8)
    BARS: ClassVar[Mapping[int, Bar]] = {
        1: Bar(BarKind.MEM32, 4096),
        2: Bar(BarKind.MEM32, 16384, shared=((4096, 8192),)),
        3: Bar(BarKind.MEM32, 8192, shared=True),
    }

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        if (bar, offset) == (1, 4):
            raise RuntimeError("a bug")
        return super().bar_read(bar, offset, size)

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        if (bar, offset) == (1, 0):
            self.raise_irq(value)
        elif (bar, offset) == (1, 4):
            raise RuntimeError("a bug")
        else:
            for n, byte in enumerate(value.to_bytes(size, "little")):
                self.registers[bar, offset + n] = byte


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[RemoteBench]:
    before = count_fds()
    bench = RemoteBench(tmp_path)
    bench.add(LineDevice, "dev", 0x28, Transport.VFIO_USER)
    bench.add(VectorDevice, "vectors", 0x30, Transport.VFIO_USER)
    yield bench
    bench.close()
    await_fds(before)


@pytest.fixture
def peer(bench: RemoteBench) -> Iterator[VfioUserPeer]:
    """A client of a LineDevice."""
    with VfioUserPeer(bench, "dev") as peer:
        yield peer


@pytest.fixture
def client(bench: RemoteBench) -> Iterator[VfioUserPeer]:
    """A client of a VectorDevice, which is bus master."""
    with VfioUserPeer(bench, "vectors") as client:
        client.set_command(6)
        yield client


@pytest.fixture
def eventfds() -> Iterator[list[int]]:
    fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(8)]
    yield fds
    for fd in fds:
        os.close(fd)
