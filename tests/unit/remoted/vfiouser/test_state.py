# SPDX-License-Identifier: GPL-2.0-or-later
"""A device on vfio-user below a service manager with an fd store: its state goes on, its link does not."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import ClassVar

from common.fdstore import FdStore
from common.fields import register
from common.journal import RateLimited
from remoted.device import Bar, BarKind, PciFunction
from remoted.host import Host
from remoted.memory import GuestMemory
from remoted.ramfiles import RamFiles
from remoted.server import DeviceServer
from remoted.vfiouser.line import IntxLine
from remoted.vfiouser.vectors import Vectors
from tests.support.fds import no_fd_is_left
from tests.support.remotebench import RemoteBench
from tests.support.storemanager import StoreManager
from tests.support.vfiouserbench import TRIGGER, VfioUserPeer, signals

DEVFN = 0x28


class Kept(PciFunction):
    """A register that outlives the process, whose lowest bit drives the line."""

    VENDOR_ID, DEVICE_ID = 0x1234, 0x0001
    BARS: ClassVar = {0: Bar(BarKind.MEM32, 4096)}
    value: int = register(32, reset=7)

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        return self.value

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        self.value = value
        self.set_intx(bool(value & 1))


class Process(RemoteBench):
    """One remoted of a unit whose manager is ``manager``."""

    def __init__(self, directory: Path, manager: StoreManager, inherited: dict[str, list[int]]) -> None:
        super().__init__(directory)
        self.store = FdStore(self.loop, RateLimited(self.log.logger), manager.address, inherited)
        ram_files = RamFiles(self.store)
        line = IntxLine(self.loop, self.hub.owners)
        vectors = Vectors(line)
        host = Host("dev", self.loop, self.log.logger, GuestMemory(), line.set_irq, None, vectors)
        server = DeviceServer(self.loop, Kept(host, {}), vectors, self._on_idle)
        server.keep(self.store, ram_files, DEVFN)
        server.listen(self.path("dev"))
        self.servers["dev"] = server
        ram_files.end_of_start()
        self.store.drop_inherited()
        self.settle()
        while manager.serve():
            self.settle()

    def close(self) -> None:
        super().close()
        self.store.close()


def test_registers_and_a_high_line_go_on_with_the_next_client(tmp_path: Path) -> None:
    """As after a SIGKILL: the first process does nothing more once the second one is there."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    with no_fd_is_left(), closing(StoreManager(tmp_path)) as manager:
        with closing(Process(tmp_path / "first", manager, {})) as first:
            peer = VfioUserPeer(first, "dev")
            peer.post(0, 0, (0x12345679).to_bytes(4, "little"))
            first.settle()
            trigger = os.eventfd(0, os.EFD_NONBLOCK)
            with (
                closing(Process(tmp_path / "second", manager, manager.hand_over())) as second,
                VfioUserPeer(second, "dev") as following,
            ):
                assert following.read(0, 0, 4).payload == (0x12345679).to_bytes(4, "little")
                assert following.set_irqs(TRIGGER, fds=[trigger]) == 0
                assert signals(trigger) == 1
            os.close(trigger)
        assert peer.sock.recv(1) == b"", "the link has ended with its process"
        peer.sock.close()
