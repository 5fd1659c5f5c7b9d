# SPDX-License-Identifier: GPL-2.0-or-later
"""A function on an irqchip bench whose level is kept by the IOHub's real code."""

from __future__ import annotations

import os

from common.loop import Loop
from common.notifier import EventNotifier
from proxyd.pci.intxpair import IntxPair
from remoted.iohub import Pirq
from tests.support.irqbench import IrqBench, Pair


class Peer:
    """The device's side: one function's pirq, holding duplicates of the eventfds."""

    def __init__(self, pair: Pair) -> None:
        self._loop = Loop()
        self.pirq = Pirq(self._loop, {})
        self.pirq.set_irqfd(*(EventNotifier(os.dup(notifier.fd)) for notifier in pair))

    def set_level(self, level: bool) -> None:
        self.pirq.set_irq(level)

    def serve(self) -> None:
        """Handles the resamples that have come."""
        self._loop.step(0)

    def close(self) -> None:
        self.pirq.drop_irqfd()
        self._loop.close()


class Function:
    """The proxy's pair of one function, and the peer that has the other end."""

    def __init__(self, bench: IrqBench) -> None:
        self._bench = bench
        self._intx = IntxPair(bench.irqchip)
        self._intx.create()
        assert self._intx.irqfd is not None
        assert self._intx.resamplefd is not None
        self.pair = Pair(self._intx.irqfd, self._intx.resamplefd)
        self.peer = Peer(self.pair)

    def route(self, gsi: int | None) -> None:
        """The guest routes the pin elsewhere, or nowhere."""
        self._intx.assign(gsi)
        self.settle()

    def settle(self) -> None:
        """Lets the peer see its resamples, and its events arrive."""
        self.peer.serve()
        if self._intx.gsi is not None:
            self._bench.settle(self._intx.gsi, self.pair)

    def close(self) -> None:
        self.peer.close()
        self._intx.close()
