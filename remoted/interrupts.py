# SPDX-License-Identifier: GPL-2.0-or-later
"""What a function signals: its INTx line, or messages (MSI, MSI-X), as the guest has enabled them.

PCI Local Bus Specification 3.0, chapter 6.8. While messages are enabled the line is low (6.8.1.4). A message is
pending while its vector is masked or has no eventfd, and while the function is not bus master (a message is a
memory write, 6.2.2). It is sent once when that has changed. lower_irq() clears the pending bit of what has not
been sent, as 6.8.3.5 demands for a cause that is gone. What was raised while the line carried it, and has not been
lowered since, is sent when messages are enabled: otherwise the change would lose it.

The entries' own mask bits of the MSI-X table silence nothing here: the client emulates the table, and masks by its
transport.
"""

from __future__ import annotations

from typing import ClassVar

from common import pci
from remoted.configspace import ConfigSpace
from remoted.host import Host
from remoted.msi import (
    ENTRY_SIZE,
    MSI_ENABLE,
    MSI_MASK,
    MSI_PENDING,
    MSIX_ENABLE,
    MSIX_FUNCTION_MASK,
    Msi,
    Msix,
    VectorKind,
    VectorPort,
)

__all__ = ["Interrupts", "MsixArea"]

_ALL_ONES = 0xFFFFFFFFFFFFFFFF
_STATUS, _INTERRUPT, _NO_INTERRUPT = pci.PCI_STATUS, pci.PCI_STATUS_INTERRUPT, ~pci.PCI_STATUS_INTERRUPT
_LOW, _TOLD_BY_LINE, _TOLD_BY_MESSAGE = range(3)
"""of a vector: not raised; raised, and since then only the line has told of it; or a message has, or is pending"""
_MASKED = b"\0" * 12 + b"\x01\0\0\0"
"""an entry of the MSI-X table after a reset"""


class _Messages:
    """The messages of one kind: which are masked, and which are pending."""

    kind: ClassVar[VectorKind]

    def __init__(
        self, vectors: int, port: VectorPort, config: bytearray, offset: int, pending: memoryview
    ) -> None:
        """``offset`` is that of the capability in config space."""
        self.vectors = vectors
        self.offset = offset
        self.pending = pending
        self.may_be_pending = True
        """False if no vector is"""
        self._port = port
        self._config = config

    @property
    def is_enabled(self) -> bool:
        raise NotImplementedError

    def is_masked(self, vector: int) -> bool:
        """Whether config space masks it."""
        raise NotImplementedError

    def fold(self, vector: int) -> int:
        """The vector that stands for this one."""
        return vector

    def send(self, vector: int, is_allowed: bool) -> None:
        """Sends a message, or keeps it pending."""
        vector = self.fold(vector)
        bit = 1 << (vector & 7)
        if is_allowed and not self.is_masked(vector) and self._port.signal(self.kind, vector):
            self.pending[vector >> 3] &= ~bit
        else:
            self.pending[vector >> 3] |= bit
            self.may_be_pending = True

    def is_pending(self, vector: int) -> bool:
        return bool(self.pending[vector >> 3] & 1 << (vector & 7))

    def clear(self, vector: int) -> None:
        """The vector is not pending any more."""
        self.pending[vector >> 3] &= ~(1 << (vector & 7))

    def release(self, start: int, count: int) -> None:
        """Sends what is pending of these vectors and may be sent now."""
        for vector in range(max(start, 0), min(start + count, self.vectors)):
            if self.is_pending(vector):
                self.clear(vector)
                self.send(vector, True)
        self.may_be_pending = any(self.pending)

    def reset(self) -> None:
        self.pending[:] = bytes(len(self.pending))
        self.may_be_pending = False


class _MsiMessages(_Messages):
    kind = VectorKind.MSI

    def __init__(
        self, msi: Msi, port: VectorPort, config: bytearray, offset: int, pending: memoryview
    ) -> None:
        if msi.maskable:
            pending = memoryview(config)[offset + MSI_PENDING : offset + MSI_PENDING + 4]
        super().__init__(msi.vectors, port, config, offset, pending)
        self._is_maskable = msi.maskable

    @property
    def is_enabled(self) -> bool:
        return bool(self._config[self.offset + 2] & MSI_ENABLE)

    def is_masked(self, vector: int) -> bool:
        return self._is_maskable and bool(
            self._config[self.offset + MSI_MASK + (vector >> 3)] & 1 << (vector & 7)
        )

    def fold(self, vector: int) -> int:
        """The guest may allocate fewer vectors than the class declares: the others share those (6.8.1.3)."""
        allocated = 1 << (self._config[self.offset + 2] >> 4 & 7)
        return vector & min(allocated, self.vectors) - 1


class _MsixMessages(_Messages):
    kind = VectorKind.MSIX

    @property
    def is_enabled(self) -> bool:
        return bool(self._config[self.offset + 3] & MSIX_ENABLE)

    def is_masked(self, vector: int) -> bool:
        return bool(self._config[self.offset + 3] & MSIX_FUNCTION_MASK)


class MsixArea:
    """Table or PBA in the memory of a BAR. Accesses have 4 or 8 bytes and are aligned (6.8.2)."""

    def __init__(self, start: int, content: memoryview, is_writable: bool) -> None:
        self.start = start
        self.end = start + len(content)
        self._content = content
        self._is_writable = is_writable

    def read(self, offset: int, size: int) -> int:
        if size not in (4, 8) or offset % size:
            return _ALL_ONES >> 64 - 8 * size
        start = offset - self.start
        return int.from_bytes(self._content[start : start + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        if not self._is_writable or size not in (4, 8) or offset % size:
            return
        start = offset - self.start
        for at in range(start, start + size, 4):
            dword = value & (0x1 if at % ENTRY_SIZE == 12 else 0xFFFFFFFF)
            self._content[at : at + 4] = dword.to_bytes(4, "little")
            value >>= 32


class Interrupts:
    """The level that a device drives, the vectors that it has raised, and what is signalled of them."""

    def __init__(self, host: Host, space: ConfigSpace, pin: int, msi: Msi | None, msix: Msix | None) -> None:
        """``msi`` and ``msix`` are what the class declares, whether the guest sees them or not."""
        self.level = False
        """set_intx()'s"""
        self.is_asserted = False
        """the line, as set_irq() was told last"""
        self.areas: tuple[MsixArea, ...] = ()
        """of the BAR that msix.bar names"""
        self._set_irq = host.set_irq
        self._space = space
        self._config = space.data
        self._has_pin = pin != 0
        self._may_drive = self._has_pin
        self._may_send = False
        self._raised = 0
        """how many vectors are"""
        self._current: _Messages | None = None
        """the kind that is enabled"""
        self._kinds: tuple[_Messages, ...] = ()
        """what config space shows, in the order of precedence"""
        self._vectors = max(1, msi.vectors if msi else 0, msix.vectors if msix else 0)
        table_size, pba_size = (msix.table_size, msix.pba_size) if msix else (0, 0)
        self.state = bytearray(self._vectors + 4 + pba_size + table_size)
        """what resume() takes: a byte for each vector (_LOW and so on), MSI's pending bits, PBA, table"""
        view = memoryview(self.state)[self._vectors :]
        msi_pending, view = view[:4], view[4:]
        pba, self._table = view[:pba_size], view[pba_size:]
        self._table[:] = _MASKED * (table_size // ENTRY_SIZE)
        if msix is not None and msix.pba is not None:
            self.areas = (
                MsixArea(msix.table, self._table, is_writable=True),
                MsixArea(msix.pba, pba, is_writable=False),
            )
        if host.vectors is not None and host.has_msix and msix is not None:
            offset = space.offset_of(msix)
            self._kinds += (_MsixMessages(msix.vectors, host.vectors, self._config, offset, pba),)
        if host.vectors is not None and msi is not None:
            offset = space.offset_of(msi)
            self._kinds += (_MsiMessages(msi, host.vectors, self._config, offset, msi_pending),)

    def vectors(self, kind: VectorKind) -> int:
        """How many config space shows."""
        return next((each.vectors for each in self._kinds if each.kind is kind), 0)

    @property
    def is_high(self) -> bool:
        """Whether the line is, as far as the device is concerned."""
        return self.level or self._raised > 0

    def set_level(self, level: bool) -> None:
        """Sets the line's own level, beside the vectors'."""
        self.level = level
        self._update_line()

    def raise_irq(self, vector: int) -> None:
        """See PciFunction."""
        if not 0 <= vector < self._vectors:
            raise ValueError(f"vector {vector} is not one of the {self._vectors} that the class declares")
        current, before = self._current, self.state[vector]
        self.state[vector] = _TOLD_BY_LINE if current is None else _TOLD_BY_MESSAGE
        if not before:
            self._raised += 1
            if self._raised == 1:
                self._update_line()
        if current is not None:
            current.send(vector, self._may_send)

    def lower_irq(self, vector: int) -> None:
        """See PciFunction."""
        if not 0 <= vector < self._vectors:
            raise ValueError(f"vector {vector} is not one of the {self._vectors} that the class declares")
        if self.state[vector]:
            self.state[vector] = _LOW
            self._raised -= 1
            for messages in self._kinds:
                if messages.may_be_pending:
                    self._forget(messages, vector)
            if not self._raised:
                self._update_line()

    def release_pending(self, kind: VectorKind, start: int, count: int) -> None:
        """See PciFunction."""
        if self._current is not None and self._current.kind is kind and self._may_send:
            self._current.release(start, count)

    def config_changed(self) -> None:
        """Command or a capability was written: what they enable takes effect."""
        self._look()
        self._update_line()
        if self._current is not None:
            while (vector := self.state.find(_TOLD_BY_LINE, 0, self._vectors)) != -1:
                self.state[vector] = _TOLD_BY_MESSAGE
                self._current.send(vector, self._may_send)
            if self._may_send:
                self._current.release(0, self._current.vectors)

    def resume(self, state: bytes, level: bool) -> None:
        """Takes the state of the previous process, drives no line, and sends nothing."""
        self.state[:] = state
        self.level = level
        self._raised = self._vectors - self.state.count(_LOW, 0, self._vectors)
        for messages in self._kinds:
            messages.may_be_pending = True
        self._look()
        self.is_asserted = self.is_high and self._may_drive

    def lower_all(self) -> None:
        """Lowers everything, and forgets what is pending."""
        self.state[: self._vectors] = bytes(self._vectors)
        self._raised = 0
        for messages in self._kinds:
            messages.reset()
        self.set_level(False)

    def reset(self) -> None:
        """As lower_all(), and sets the table to its values after a reset."""
        self.lower_all()
        self._table[:] = _MASKED * (len(self._table) // ENTRY_SIZE)

    def _look(self) -> None:
        """Finds out what is enabled."""
        config = self._config
        self._current = next((each for each in self._kinds if each.is_enabled), None)
        self._may_send = self._space.is_bus_master
        is_disabled = config[pci.PCI_COMMAND + 1] << 8 & pci.PCI_COMMAND_INTX_DISABLE
        self._may_drive = self._has_pin and not is_disabled and self._current is None and self._space.is_awake

    def _forget(self, messages: _Messages, vector: int) -> None:
        """The cause of a message is gone, unless another vector that is raised shares it."""
        folded = messages.fold(vector)
        if messages.is_pending(folded) and not any(
            self.state[other] and messages.fold(other) == folded for other in range(self._vectors)
        ):
            messages.clear(folded)
            messages.may_be_pending = any(messages.pending)

    def _update_line(self) -> None:
        """Hands the line's level to the transport when it has changed, and sets the status bit."""
        is_high = self.level or self._raised > 0
        is_asserted = is_high and self._may_drive
        if is_asserted is not self.is_asserted:
            self.is_asserted = is_asserted
            self._set_irq(is_asserted)  # first of all: somebody waits for it
        if is_high:
            self._config[_STATUS] |= _INTERRUPT
        else:
            self._config[_STATUS] &= _NO_INTERRUPT
