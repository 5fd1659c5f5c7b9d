# SPDX-License-Identifier: GPL-2.0-or-later
"""The irqfd/resamplefd pair of one function, and the GSI that its irqfd is assigned to.

QEMU loses a level on a re-route (hw/remote/proxy.c, proxy_intx_update()). Here a kick follows every assign:
writing the resamplefd makes the remote look at its level again and assert what is still high. It does nothing to
a low line.
"""

from __future__ import annotations

import errno

from common.disposal import Disposal
from common.link import Client
from common.mpqemu import Command
from common.notifier import EventNotifier
from proxyd.kvm.irqchip import Irqchip

__all__ = ["IntxPair"]


class IntxPair:
    """Not to be used by two threads at once."""

    def __init__(self, irqchip: Irqchip) -> None:
        self.gsi: int | None = None
        """where the irqfd is assigned to; None if it isn't"""
        self._irqchip = irqchip
        self._disposal = Disposal()
        self.irqfd: EventNotifier | None = None
        """asserts the line; None without a pair, as ``resamplefd``"""
        self.resamplefd: EventNotifier | None = None
        """signalled at the EOI"""

    def create(self) -> None:
        """Opens a new pair; there is none, or it was closed. Raises OSError; close() is to follow then."""
        if self._disposal.is_full:
            raise OSError(errno.EBUSY, "too many earlier ones take long to close")
        self.irqfd = EventNotifier.create()
        self.resamplefd = EventNotifier.create()

    def assign(self, gsi: int | None) -> None:
        """Moves the irqfd to the GSI, or to none, and kicks. Does nothing without a pair.

        Raises OSError; the irqfd is not assigned then.
        """
        self.deassign()  # an assign before the deassign would be EBUSY
        if gsi is None or self.irqfd is None or self.resamplefd is None:
            return
        # An event from before would assert the line at once, and the answer to the kick would do so once more: the
        # guest may have served the first one by the time that KVM injects the second.
        self.irqfd.test_and_clear()
        self._irqchip.assign(gsi, self.irqfd, self.resamplefd)
        self.gsi = gsi
        self.resamplefd.set()

    def deassign(self) -> None:
        """Takes the irqfd out of the irqchip, which lowers the line if no other irqfd is on the GSI."""
        if self.gsi is not None and self.irqfd is not None:
            self._irqchip.deassign(self.gsi, self.irqfd)
        self.gsi = None

    def send(self, client: Client) -> None:
        """Hands the pair to the remote. Does nothing without a pair.

        To be called after assign(), so that the kick is pending already. QEMU's remote looks at its level when it
        reads the kick. Ours looks at it when the pair arrives, and consumes the kick, so that it asserts once.

        Raises PeerGone and ProtocolError.
        """
        if self.irqfd is not None and self.resamplefd is not None:
            client.send(Command.SET_IRQFD, fds=(self.irqfd.fd, self.resamplefd.fd))

    def close(self) -> None:
        """Takes the irqfd out of the irqchip, then closes the pair. A second call does nothing."""
        self.deassign()
        pair = (self.irqfd, self.resamplefd)
        self._disposal.close_fds(notifier.release() for notifier in pair if notifier is not None)
        self.irqfd = self.resamplefd = None
