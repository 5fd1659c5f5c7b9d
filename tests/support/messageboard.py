# SPDX-License-Identifier: GPL-2.0-or-later
"""A function between a transport that carries messages, and a guest: the test is both."""

from __future__ import annotations

import os
from contextlib import closing

import pytest

from common import pci
from common.loop import Loop
from remoted.device import Host, PciFunction
from remoted.memory import GuestMemory
from remoted.msi import VectorKind
from remoted.state import FunctionState
from tests.support.remotebench import Recorder


class Port:
    """A transport: which vectors have an eventfd, and what was signalled."""

    def __init__(self) -> None:
        self.attached: set[tuple[VectorKind, int]] = set()
        self.sent: list[tuple[VectorKind, int]] = []

    def signal(self, kind: VectorKind, vector: int) -> bool:
        if (kind, vector) not in self.attached:
            return False
        self.sent.append((kind, vector))
        return True

    def take(self) -> list[int]:
        """The vectors signalled since the last call."""
        sent, self.sent = self.sent, []
        return [vector for _, vector in sent]


class MessageBoard:
    """A function between a transport and a guest."""

    def __init__(self, model: type[PciFunction], *, has_messages: bool = True, msix: bool = True) -> None:
        self.lines: list[bool] = []
        self.port = Port()
        self.function = self._create(model, has_messages, msix)
        self.function.full_reset()

    def _create(self, model: type[PciFunction], has_messages: bool, msix: bool = True) -> PciFunction:
        loop = Loop()
        loop.close()
        log = Recorder().logger
        vectors = self.port if has_messages else None
        host = Host("dev0", loop, log, GuestMemory(), self.lines.append, vectors=vectors, msix=msix)
        return model(host, {})

    def keep(self) -> FunctionState:
        """A state file as it is after a commit; it stays as it is."""
        return FunctionState(self.function, os.memfd_create("state", os.MFD_CLOEXEC), pytest.fail)

    def restart(self, fd: int) -> None:
        """The next process begins: its function takes the state in a file, and the eventfds are attached again."""
        self.function = self._create(type(self.function), has_messages=True)
        with closing(FunctionState(self.function, os.dup(fd), pytest.fail)) as state:
            assert not state.is_new
            state.restore()
        self.function.go_on()
        for kind in VectorKind:
            self.function.release_pending(kind, 0, 1 << 32)

    def capability(self, cap_id: int) -> int:
        """The offset of a capability, found as a guest finds it; 0 without it."""
        function = self.function
        offset = 0
        if function.bus_config_read(pci.PCI_STATUS, 2) & pci.PCI_STATUS_CAP_LIST:
            offset = function.bus_config_read(pci.PCI_CAPABILITY_LIST, 1)
        while offset and function.bus_config_read(offset, 1) != cap_id:
            offset = function.bus_config_read(offset + 1, 1)
        return offset

    def command(self, value: int) -> None:
        assert self.function.bus_config_write(pci.PCI_COMMAND, 2, value)

    def msi_control(self, value: int) -> None:
        assert self.function.bus_config_write(self.capability(pci.PCI_CAP_ID_MSI) + 2, 2, value)

    def msix_control(self, value: int) -> None:
        assert self.function.bus_config_write(self.capability(pci.PCI_CAP_ID_MSIX) + 2, 2, value)

    def attach(self, kind: VectorKind, start: int, count: int) -> None:
        self.port.attached |= {(kind, vector) for vector in range(start, start + count)}
        self.function.release_pending(kind, start, count)

    @property
    def pba(self) -> int:
        """The pending bits of MSI-X, read as the guest reads them."""
        register = self.function.bus_config_read(self.capability(pci.PCI_CAP_ID_MSIX) + 8, 4)
        bar, offset = register & 7, register & ~7
        count = self.function.vectors(VectorKind.MSIX)
        return sum(
            self.function.region_read(bar, offset + 8 * i, 8) << 64 * i for i in range((count + 63) // 64)
        )

    @property
    def msi_pending(self) -> int:
        return self.function.bus_config_read(self.capability(pci.PCI_CAP_ID_MSI) + 0x14, 4)

    @property
    def line(self) -> bool:
        return bool(self.lines) and self.lines[-1]
