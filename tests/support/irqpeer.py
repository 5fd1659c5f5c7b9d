# SPDX-License-Identifier: GPL-2.0-or-later
"""A function on an irqchip bench whose level is kept by the IOHub's real code."""

from __future__ import annotations

import os

from common.loop import Loop
from common.notifier import EventNotifier
from remoted.iohub import Pirq
from tests.support.irqbench import IrqBench, Pair


class Peer:
    """The device's side: one function's pirq, holding duplicates of the eventfds."""

    def __init__(self, pair: Pair) -> None:
        self._loop = Loop()
        self.pirq = Pirq(self._loop)
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
    """One function as the proxy sees it: a pair, its peer, and the GSI it is on."""

    def __init__(self, bench: IrqBench) -> None:
        self._bench = bench
        self.pair = bench.pair()
        self.peer = Peer(self.pair)
        self.gsi: int | None = None

    def route(self, gsi: int | None) -> None:
        """Deassign, drain, assign, kick."""
        if self.gsi is not None:
            self._bench.irqchip.deassign(self.gsi, self.pair.irqfd)
            self.pair.irqfd.test_and_clear()
        self.gsi = gsi
        if gsi is not None:
            self._bench.assign(gsi, self.pair)
            self.pair.resamplefd.set()
        self.settle()

    def settle(self) -> None:
        """Lets the peer see its resamples, and its events arrive."""
        self.peer.serve()
        if self.gsi is not None:
            self._bench.settle(self.gsi, self.pair)
