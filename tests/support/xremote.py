# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's own remote process, ``-machine x-remote``, with one pci-serial."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from tests.support.monitorclient import Monitor
from tests.support.qemu import Qemu


class StockRemote(Qemu):
    """One process that serves a connected socket.

    It answers requests from the moment its machine is made, and only then resets it, which would forget a BAR
    that was programmed meanwhile. Its monitor answers from the main loop, which begins after that reset.
    """

    def __init__(self, link: socket.socket, args: Sequence[str] = ()) -> None:
        """Takes ownership of the socket; returns when the reset is over.

        Raises EOFError or ConnectionError when the process has ended instead, as it does when its client goes.
        """
        with link:
            super().__init__(
                [
                    *("-machine", "x-remote", "-display", "none", "-monitor", "none"),
                    *("-serial", "none", "-mon", "qmp,mode=control"),
                    *("-chardev", "null,id=null", "-device", "pci-serial,id=d,chardev=null"),
                    *("-object", f"x-remote-object,id=r,devid=d,fd={link.fileno()}", *args),
                ],
                [link.fileno()],
                channels=("qmp",),
            )
        with self._starting(), Monitor(self.channels["qmp"]) as monitor:
            monitor.execute("query-status")
