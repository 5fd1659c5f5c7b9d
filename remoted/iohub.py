# SPDX-License-Identifier: GPL-2.0-or-later
"""The IOHub: levels, irqfds and resamplefds of 256 pirqs, as in QEMU's hw/remote/iohub.c.

A pirq is a function's devfn. Signalling its irqfd asserts the INTx line in the guest. The line can't be lowered
from here: KVM lowers it at the guest's EOI and signals the resamplefd. A line that is still high is asserted again
then. So the irqfd is signalled

- when the level rises,
- on a resample while the level is high,
- when an irqfd arrives while the level is high: the rise went to the irqfd before, or to none.

A resample while the level is low does nothing: it may come from another function on the same GSI, or from an
EOI for a line that was not asserted.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial

from common.errors import ShortageError
from common.loop import Loop
from common.notifier import EventNotifier

__all__ = ["IoHub", "Line", "Pirq"]


class Line:
    """One interrupt line, whatever its transport: its level, who uses which eventfd, and what happened on it."""

    __slots__ = (
        "_loop",
        "_owners",
        "close_fds",
        "level",
        "owes_assert",
        "raised",
        "reasserts",
        "resamples",
    )

    def __init__(self, loop: Loop, owners: dict[str, Line]) -> None:
        """``owners`` is shared by all lines: the line that uses an eventfd, by the eventfd's identity."""
        self._loop = loop
        self._owners = owners
        self.close_fds: Callable[[Iterable[int]], object] = _close_now
        """closes eventfds; where peers have them as well, it is to be one that never waits (common.disposal)"""
        self.level = 0
        """how many sources assert the line"""
        self.raised = 0
        """effective rises"""
        self.resamples = 0
        """EOIs that were reported"""
        self.reasserts = 0
        """how often the line was asserted for a level that was high already"""
        self.owes_assert: bytearray | memoryview = bytearray(1)
        """not 0 from before an EOI is read until the line is asserted again; kept where state is kept"""

    @property
    def has_irqfd(self) -> bool:
        """Whether there is an eventfd that asserts the line in the guest."""
        raise NotImplementedError

    def set_irq(self, asserted: bool) -> None:
        """One source asserts the line, or no longer asserts it."""
        raise NotImplementedError

    def is_foreign(self, identity: str) -> bool:
        """Whether the eventfd is in use by another line."""
        return self._owners.get(identity, self) is not self


class Pirq(Line):
    """The line of a function on mpqemu, with an irqfd and a resamplefd."""

    __slots__ = ("_irqfd", "_resamplefd")

    def __init__(self, loop: Loop, owners: dict[str, Line]) -> None:
        super().__init__(loop, owners)
        self._irqfd: EventNotifier | None = None
        self._resamplefd: EventNotifier | None = None

    @property
    def has_irqfd(self) -> bool:
        return self._irqfd is not None

    @property
    def resamplefd(self) -> int:
        """The fd of the resamplefd, or -1."""
        return -1 if self._resamplefd is None else self._resamplefd.fd

    def set_irq(self, asserted: bool) -> None:
        if asserted:
            self.level += 1
            if self.level == 1:
                if self._irqfd is not None and self._resamplefd is not None:
                    # An EOI from before the rise is consumed here. Otherwise it would assert the line a second
                    # time, perhaps after the guest has served the first assertion.
                    if self._resamplefd.is_set():
                        self.resamples += self._resamplefd.test_and_clear()
                    self._irqfd.set()
                self.raised += 1
        elif self.level:
            self.level -= 1

    def set_irqfd(self, irqfd: EventNotifier, resamplefd: EventNotifier) -> None:
        """Replaces the eventfds, and takes ownership of the new ones; a level that is high asserts the line.

        Raises ShortageError when the loop can't watch the resamplefd: then the line has no eventfds.
        """
        self.drop_irqfd()
        self._install(irqfd, resamplefd)
        if self.level:
            # The peer may have signalled the resamplefd already, to have the line asserted: this does it once.
            self.resamples += resamplefd.test_and_clear()
            self._reassert()

    def resume(self, irqfd: EventNotifier, resamplefd: EventNotifier) -> None:
        """Continues with the eventfds of the previous process.

        A level that is high has been asserted by it, unless it was killed between the EOI and the assertion.
        Raises ShortageError, as set_irqfd().
        """
        self._install(irqfd, resamplefd)
        if self.owes_assert[0] and self.level:
            self._reassert()
        self.owes_assert[0] = 0

    def _install(self, irqfd: EventNotifier, resamplefd: EventNotifier) -> None:
        try:
            self._loop.add(resamplefd.fd, self._on_resample)
        except OSError as error:
            self.close_fds((irqfd.release(), resamplefd.release()))
            raise ShortageError(f"the resamplefd can't be watched: {error.strerror}") from error
        self._irqfd, self._resamplefd = irqfd, resamplefd
        for notifier in (irqfd, resamplefd):
            if notifier.identity is not None:
                self._owners[notifier.identity] = self

    def drop_irqfd(self) -> None:
        """Closes the eventfds: if the VMM has closed its irqfd, this close takes it out of KVM."""
        if self._irqfd is not None and self._resamplefd is not None:
            self._loop.remove(self._resamplefd.fd)
            for notifier in (self._irqfd, self._resamplefd):
                if notifier.identity is not None:
                    del self._owners[notifier.identity]
            self.close_fds((self._irqfd.release(), self._resamplefd.release()))
        self._irqfd = self._resamplefd = None

    def _on_resample(self, _events: int) -> None:
        resamplefd = self._resamplefd
        if resamplefd is not None:
            self.owes_assert[0] = 1
            if resamplefd.test_and_clear():
                if self.level:
                    self._reassert()
                self.resamples += 1
            self.owes_assert[0] = 0

    def _reassert(self) -> None:
        if self._irqfd is not None:
            self._irqfd.set()
            self.reasserts += 1


def _close_now(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


class IoHub:
    """The 256 pirqs of one daemon."""

    def __init__(self, loop: Loop) -> None:
        self.owners: dict[str, Line] = {}
        """the line that uses an eventfd, by the eventfd's identity, for lines of other transports"""
        self.pirqs = defaultdict[int, Pirq](partial(Pirq, loop, self.owners))
        """by number, 0 to 255; each is made when it is first asked for"""

    @staticmethod
    def map_irq(devfn: int, _pin: int) -> int:
        """The pirq of a function's interrupt pin: all four pins of a devfn share one."""
        return devfn

    def finalize(self) -> None:
        """Closes every eventfd."""
        for pirq in self.pirqs.values():
            pirq.drop_irqfd()
