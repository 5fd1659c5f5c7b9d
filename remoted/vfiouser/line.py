# SPDX-License-Identifier: GPL-2.0-or-later
"""The INTx line of a function on vfio-user, as the kernel's vfio-pci presents one (vfio_pci_intrs.c).

The trigger eventfd asserts the line in the guest. From then on the line is masked until the client unmasks it, by
a message or by the unmask eventfd, which KVM signals at the guest's EOI: a level that is still high asserts the
line again then. A client without KVM's irqfds asserts the line by itself, and unmasks it at the guest's next
access to the device. So the trigger is signalled when the line is not masked, a trigger is attached, and the level
is high: whichever of these comes last.

A level that rises while no trigger is attached asserts the line as soon as one is. The line outlives its clients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from common.errors import ShortageError
from common.loop import Loop
from common.notifier import EventNotifier, adopt_eventfd
from remoted.iohub import Line

__all__ = ["IntxLine"]


class IntxLine(Line):
    """The line, and the owner of all eventfds that the function's client has sent."""

    __slots__ = ("_is_masked", "_is_rewired", "_is_served", "_trigger", "_unmask", "_uses")

    def __init__(self, loop: Loop, owners: dict[str, Line]) -> None:
        """``owners`` as for Line."""
        super().__init__(loop, owners)
        self._trigger: EventNotifier | None = None
        self._unmask: EventNotifier | None = None
        self._is_masked = False
        """by the client"""
        self._is_served = False
        """whether the guest has been interrupted, and the line not unmasked since"""
        self._is_rewired = False
        """whether the unmask eventfd has come since the line was asserted last, and was not signalled yet"""
        self._uses: Counter[str] = Counter()
        """how often each eventfd is in use, by its identity"""

    @property
    def has_irqfd(self) -> bool:
        return self._trigger is not None

    @property
    def unmaskfd(self) -> int:
        """The fd of the unmask eventfd, or -1."""
        return -1 if self._unmask is None else self._unmask.fd

    @property
    def kept(self) -> tuple[EventNotifier | None, EventNotifier | None, bool]:
        """What resume() takes: the two eventfds, and whether the client has masked the line."""
        return self._trigger, self._unmask, self._is_masked

    def resume(self, trigger: EventNotifier | None, unmask: EventNotifier | None, is_masked: bool) -> None:
        """Goes on with the eventfds of the previous process, and takes ownership of them.

        A level that is high has been asserted by it, unless it was killed between the EOI and the assertion.
        Raises ShortageError, as set_unmask().
        """
        self._trigger, self._is_masked = trigger, is_masked
        self._is_served = bool(self.level) and trigger is not None and not (is_masked or self.owes_assert[0])
        self.owes_assert[0] = 0
        self.set_unmask(unmask)
        self._is_rewired = False
        self._refire()

    def adopt(self, fd: int) -> EventNotifier:
        """Takes ownership of an eventfd of the client, also for vectors.

        Raises ProtocolError and ShortageError as adopt_eventfd(); the fd is the caller's then.
        """
        notifier = adopt_eventfd(fd, self.is_foreign)
        if notifier.identity is not None:
            self._uses[notifier.identity] += 1
            self._owners[notifier.identity] = self
        return notifier

    def give_up(self, notifiers: Iterable[EventNotifier]) -> list[int]:
        """Ends the use of eventfds. Returns their fds, which are the caller's to close."""
        fds = []
        for notifier in notifiers:
            if notifier.identity is not None:
                self._uses[notifier.identity] -= 1
                if not self._uses[notifier.identity]:
                    del self._uses[notifier.identity]
                    del self._owners[notifier.identity]
            fds.append(notifier.release())
        return fds

    def set_irq(self, asserted: bool) -> None:
        if asserted:
            self.level += 1
            if self.level == 1:
                self.raised += 1
                if not (self._is_served or self._is_masked):
                    # An EOI from before the rise, of another function on the same GSI, is consumed here. It would
                    # unmask the line, and assert it a second time, before the guest has served it.
                    if self._unmask is not None and self._unmask.is_set():
                        self.resamples += self._unmask.test_and_clear()
                    self._fire()
        elif self.level:
            self.level -= 1

    def set_trigger(self, trigger: EventNotifier | None) -> None:
        """Replaces the eventfd that asserts the line, or takes it away; takes ownership of the new one.

        A level that is high asserts the line by the new one: what went to the old one, if anything, is lost.
        """
        old, self._trigger = self._trigger, trigger
        if old is not None:
            self.close_fds(self.give_up((old,)))
        self._is_served = False
        self._refire()

    def set_unmask(self, unmask: EventNotifier | None) -> None:
        """Replaces the eventfd that unmasks the line, or takes it away; takes ownership of the new one.

        Raises ShortageError when the loop can't watch the new one: then there is none, and its fd is the caller's.
        """
        old, self._unmask = self._unmask, None
        if old is not None:
            is_signalled = old.is_set()
            self.owes_assert[0] = is_signalled
            old.test_and_clear()
            self._loop.remove(old.fd)
            self.close_fds(self.give_up((old,)))
            if is_signalled:
                self.resamples += 1
                self._end_of_interrupt()
                self.owes_assert[0] = 0
        if unmask is not None:
            try:
                self._loop.add(unmask.fd, self._on_unmask)
            except OSError as error:
                self.give_up((unmask,))
                raise ShortageError(f"the unmask eventfd can't be watched: {error.strerror}") from error
            self._unmask = unmask
            self._is_rewired = True

    def is_trigger(self, eventfd: EventNotifier) -> bool:
        """Whether it is the eventfd that asserts the line: as the unmask eventfd it would unmask it at once."""
        return self._is_same(self._trigger, eventfd)

    def is_unmask(self, eventfd: EventNotifier) -> bool:
        """Whether it is the eventfd that unmasks the line."""
        return self._is_same(self._unmask, eventfd)

    def mask(self) -> None:
        """Keeps the line from being asserted until unmask()."""
        self._is_masked = True

    def unmask(self) -> None:
        """Lets the line be asserted, which a level that is high does at once.

        QEMU unmasks the line twice when the guest re-routes it: without KVM's irqfd, and with a new one, which
        asserts what is pending in the trigger (kvm_irqfd_assign() in virt/kvm/eventfd.c). If that is the first
        assertion, a second one could arrive after the guest has served it. Only an EOI shows that it has.
        """
        self._is_masked = False
        self._is_served = self._is_rewired and self._trigger is not None and self._trigger.is_set()
        self._refire()

    def signal(self) -> None:
        """Asserts the line whatever the level: the client tests its eventfd."""
        if self._trigger is not None and not (self._is_masked or self._is_served):
            self._is_served = True
            self._trigger.set()

    def device_was_reset(self) -> None:
        """The line is low, and no interrupt is in service."""
        self._is_served = False

    def disable(self) -> None:
        """Closes both eventfds; a level that is high stays pending."""
        self._is_masked = self._is_served = self._is_rewired = False
        old = [notifier for notifier in (self._trigger, self._unmask) if notifier is not None]
        if self._unmask is not None:
            self._loop.remove(self._unmask.fd)
        self._trigger = self._unmask = None
        self.close_fds(self.give_up(old))

    def _fire(self) -> None:
        if self._trigger is not None:
            self._is_served = True
            self._is_rewired = False
            self._trigger.set()

    def _end_of_interrupt(self) -> None:
        """The client's unmask eventfd was signalled: a level that is high asserts the line again."""
        self._is_masked = self._is_served = self._is_rewired = False
        self._refire()

    def _refire(self) -> None:
        """Asserts the line for a level that was high already."""
        if self.level and self._trigger is not None and not (self._is_masked or self._is_served):
            self.reasserts += 1
            self._fire()

    def _on_unmask(self, _events: int) -> None:
        if self._unmask is not None:
            self.owes_assert[0] = 1
            if self._unmask.test_and_clear():
                self.resamples += 1
                self._end_of_interrupt()
            self.owes_assert[0] = 0

    @staticmethod
    def _is_same(own: EventNotifier | None, other: EventNotifier) -> bool:
        return own is not None and own.identity is not None and own.identity == other.identity
