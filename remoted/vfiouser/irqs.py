# SPDX-License-Identifier: GPL-2.0-or-later
"""DEVICE_GET_IRQ_INFO and DEVICE_SET_IRQS: what a client does with a function's interrupts.

The semantics are those of the kernel's VFIO_DEVICE_SET_IRQS (include/uapi/linux/vfio.h, and vfio_pci_set_intx_*()
and vfio_pci_set_msi_trigger() in drivers/vfio/pci/vfio_pci_intrs.c), but for the data of DATA_EVENTFD: the fds
come with the message, either one for each vector or none, which detaches. MSI and MSI-X vectors can be masked
here.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from common.errors import ProtocolError
from common.notifier import EventNotifier
from common.vfiouser import IRQ_SET, IrqFlag, IrqIndex, IrqSetFlag, RefusedError
from remoted.function import PciFunction
from remoted.msi import VectorKind
from remoted.vfiouser.vectors import Vectors

__all__ = ["Irqs"]

_KINDS = {IrqIndex.MSI: VectorKind.MSI, IrqIndex.MSIX: VectorKind.MSIX}
_DATA = (IrqSetFlag.DATA_NONE, IrqSetFlag.DATA_BOOL, IrqSetFlag.DATA_EVENTFD)
_ACTIONS = (IrqSetFlag.MASK, IrqSetFlag.UNMASK, IrqSetFlag.TRIGGER)
_LEGAL = {int(data | action): (data, action) for data in _DATA for action in _ACTIONS}
"""the values that flags may have"""
_INTX_FLAGS = IrqFlag.EVENTFD | IrqFlag.MASKABLE | IrqFlag.AUTOMASKED
_VECTOR_FLAGS = IrqFlag.EVENTFD | IrqFlag.MASKABLE


class Irqs:
    """The interrupts of one function, as its client sees them. They outlive the client."""

    def __init__(self, vectors: Vectors, function: PciFunction) -> None:
        self.line = vectors.line
        self.vectors = vectors
        self._counts: dict[int, int] = {index: function.vectors(kind) for index, kind in _KINDS.items()}
        self._counts[IrqIndex.INTX] = int(function.INTERRUPT_PIN != 0)
        vectors.release_pending = function.release_pending

    def describe(self, index: int) -> tuple[int, int]:
        """Flags and count of a kind of interrupts. Raises RefusedError for all but INTx, MSI and MSI-X."""
        count = self._counts.get(index)
        if count is None:
            raise RefusedError(errno.EINVAL)
        return int(_INTX_FLAGS if index == IrqIndex.INTX else _VECTOR_FLAGS), count

    def set(self, payload: memoryview, fds: Sequence[int]) -> None:
        """Does a SET_IRQS, and takes ownership of its fds.

        Raises RefusedError and ShortageError; after RefusedError nothing has changed. The fds are the caller's
        after both.
        """
        argsz, flags, index, start, count = IRQ_SET.unpack_from(payload)
        data = payload[IRQ_SET.size :]
        if argsz < IRQ_SET.size or flags not in _LEGAL:
            raise RefusedError(errno.EINVAL, f"argsz {argsz}, flags {flags:#x}")
        kind, action = _LEGAL[flags]
        available = self._counts.get(index)
        if available is None or start + count > available:
            raise RefusedError(errno.EINVAL, f"no interrupts {start} to {start + count - 1} of index {index}")
        if len(data) != (count if kind is IrqSetFlag.DATA_BOOL else 0):
            raise RefusedError(errno.EINVAL, f"{len(data)} bytes of data for {count} interrupts")
        if len(fds) not in ((0, count) if kind is IrqSetFlag.DATA_EVENTFD else (0,)):
            raise RefusedError(errno.EINVAL, f"{len(fds)} file descriptors for {count} interrupts")
        if kind is IrqSetFlag.DATA_EVENTFD:
            self._set_eventfds(IrqIndex(index), action, start, count, fds)
        elif chosen := [start + i for i in range(count) if kind is IrqSetFlag.DATA_NONE or data[i]]:
            self._act(IrqIndex(index), action, chosen)
        elif count == 0 and kind is IrqSetFlag.DATA_NONE and action is IrqSetFlag.TRIGGER:
            self._disable(IrqIndex(index))

    def drop(self) -> None:
        """Closes all eventfds, of a client that has gone; the function's interrupts stay pending."""
        for index in self._counts:
            self._disable(IrqIndex(index))

    def _disable(self, index: IrqIndex) -> None:
        if index is IrqIndex.INTX:
            self.line.disable()
        else:
            self.vectors.disable(_KINDS[index])

    def _act(self, index: IrqIndex, action: IrqSetFlag, chosen: Sequence[int]) -> None:
        """Masks, unmasks or signals one interrupt of a kind, or more."""
        is_line = index is IrqIndex.INTX
        if action is IrqSetFlag.MASK:
            self.line.mask() if is_line else self.vectors.mask(_KINDS[index], chosen)
        elif action is IrqSetFlag.UNMASK:
            self.line.unmask() if is_line else self.vectors.unmask(_KINDS[index], chosen)
        elif is_line:
            self.line.signal()
        else:
            for vector in chosen:
                self.vectors.trigger(_KINDS[index], vector)

    def _set_eventfds(
        self, index: IrqIndex, action: IrqSetFlag, start: int, count: int, fds: Sequence[int]
    ) -> None:
        if action is IrqSetFlag.MASK or (action is IrqSetFlag.UNMASK and index is not IrqIndex.INTX):
            raise RefusedError(errno.ENOTSUP, f"no eventfd masks or unmasks interrupts of index {index}")
        notifiers = self._adopt(fds)
        if index is not IrqIndex.INTX:
            kind = _KINDS[index]
            if notifiers:
                self.vectors.attach(kind, start, notifiers)
            else:
                self.vectors.detach(kind, start, count)
        elif count:
            notifier = notifiers[0] if notifiers else None
            is_trigger = action is IrqSetFlag.TRIGGER
            if notifier is not None and (
                self.line.is_unmask(notifier) if is_trigger else self.line.is_trigger(notifier)
            ):
                self.line.give_up(notifiers)
                raise RefusedError(errno.EINVAL, "one eventfd can't both assert and unmask the line")
            if is_trigger:
                self.line.set_trigger(notifier)
            else:
                self.line.set_unmask(notifier)

    def _adopt(self, fds: Sequence[int]) -> list[EventNotifier]:
        notifiers: list[EventNotifier] = []
        try:
            for fd in fds:
                notifiers.append(self.line.adopt(fd))  # noqa: PERF401  those before an error are given up
        except ProtocolError as error:
            self.line.give_up(notifiers)
            raise RefusedError(errno.EINVAL, str(error)) from error
        except BaseException:
            self.line.give_up(notifiers)
            raise
        return notifiers
