# SPDX-License-Identifier: GPL-2.0-or-later
"""What may happen to a line of the scripted guest while it is asserted: guest/route.c in Python."""

from __future__ import annotations

import time
from collections.abc import Callable

from proxyd.vm.soft.machine import TICK_SECONDS
from proxyd.vm.soft.scriptedbus import Bus
from proxyd.vm.soft.scriptedirq import SPARE_IRQ, Function
from proxyd.vm.soft.scriptedparse import CommandError
from proxyd.vm.soft.scriptedrun import SERVED_WITHIN, settle

__all__ = ["Routes"]

_PIRQ_DISABLED = 0x80
_SETTLE = 3 * TICK_SECONDS
_FAILED = "a step had the wrong interrupts"

Counts = tuple[int, int, int]
"""entries on the step's IRQ, entries elsewhere, and services of its function"""


class Routes:
    """The commands "reroute", "intx", "hold" and "release"."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    def reroute(self, words: list[str]) -> str:
        """reroute ADDR"""
        function = self._idle(words[0])
        machine, interrupts = self._bus.machine, self._bus.interrupts
        pirq, irq = function.pirq, function.irq
        machine.set_level_triggered(SPARE_IRQ)
        machine.mask(SPARE_IRQ, False)

        def move_before_inta() -> None:
            function.raise_line()
            interrupts.route(pirq, SPARE_IRQ)

        def move_before_eoi() -> None:
            function.hold, function.move_to = True, irq
            function.raise_line()

        def disable() -> None:
            function.raise_line()
            interrupts.route(pirq, _PIRQ_DISABLED)

        good = self._step("before_inta", function, SPARE_IRQ, move_before_inta, (1, 0, 1))
        good &= self._works("on_new_irq", pirq, SPARE_IRQ)
        good &= self._step("before_eoi", function, irq, move_before_eoi, (1, 1, 1))
        function.move_to = None
        interrupts.route(pirq, irq)
        good &= self._step("disabled", function, irq, disable, (0, 0, 0))
        good &= self._step("enabled", function, irq, lambda: interrupts.route(pirq, irq), (1, 0, 1))
        good &= self._works("restored", pirq, irq)
        machine.mask(SPARE_IRQ, True)
        machine.set_level_triggered(SPARE_IRQ, False)
        if not good:
            raise CommandError(_FAILED)
        return ""

    def intx(self, words: list[str]) -> str:
        """intx ADDR

        On an IRQ that is shared, one entry is allowed while INTx is disabled: the line may have been counted as
        pending before it fell.
        """
        function = self._idle(words[0])
        shared = sum(other.pirq == function.pirq for other in self._bus.functions) > 1
        status = False

        def disable() -> None:
            nonlocal status
            function.raise_line()
            function.disable_intx(True)
            settle(self._bus, _SETTLE)
            status = function.is_asserting()

        before = self._counts(function, function.irq)
        disable()
        entries = self._counts(function, function.irq)[0] - before[0]
        good = self._end("disabled", function, function.irq, before, (int(shared and entries > 0), 0, 0))
        good &= self._step("enabled", function, function.irq, lambda: function.disable_intx(False), (1, 0, 1))
        if not status:
            raise CommandError("the status bit was clear while INTx was disabled")
        if not good:
            raise CommandError(_FAILED)
        return ""

    def hold(self, words: list[str]) -> str:
        """hold ADDR"""
        function = self._idle(words[0])
        self._bus.machine.mask(function.irq, True)
        function.parked = True
        function.raise_line()
        return f"status={int(function.is_asserting())}"

    def release(self, words: list[str]) -> str:
        """release ADDR"""
        function = self._bus.named(words[0])
        if not function.parked:
            raise CommandError("the function's line is not held")
        function.parked = False

        def unmask() -> None:
            self._bus.machine.mask(function.irq, False)

        if not self._step("released", function, function.irq, unmask, (1, 0, 1)):
            raise CommandError(_FAILED)
        return ""

    def _idle(self, word: str) -> Function:
        function = self._bus.named(word)
        if function.parked:
            raise CommandError("the function's line is held")
        return function

    def _works(self, name: str, pirq: int, irq: int) -> bool:
        """A round for every function of the PIRQ, on the IRQ where it is routed now."""
        good = True
        for function in reversed(self._bus.functions):  # the order of guest/function.c's list
            if function.pirq == pirq:
                good &= self._step(name, function, irq, function.raise_line, (1, 0, 1))
        return good

    def _step(
        self, name: str, function: Function, irq: int, act: Callable[[], None], expected: Counts
    ) -> bool:
        """Acts and waits; whether what was counted is as expected."""
        before = self._counts(function, irq)
        act()
        expires = time.monotonic() + SERVED_WITHIN
        while expected[2] and function.served == before[2] and time.monotonic() < expires:
            self._bus.machine.halt(time.monotonic() + TICK_SECONDS, self._bus.interrupts.take)
        if expected[2] and function.served == before[2]:
            function.lost += 1
            function.quiesce()
        settle(self._bus, _SETTLE)
        return self._end(name, function, irq, before, expected)

    def _counts(self, function: Function, irq: int) -> tuple[int, int, int, int, int]:
        """Counts, and the spurious vectors 7 and 15."""
        lines, spurious = self._bus.interrupts.lines, self._bus.interrupts.spurious
        elsewhere = sum(line.entries for other, line in lines.items() if other != irq)
        return lines[irq].entries, elsewhere, function.served, spurious[7], spurious[15]

    def _end(
        self, name: str, function: Function, irq: int, before: tuple[int, ...], expected: Counts
    ) -> bool:
        got = tuple(after - start for after, start in zip(self._counts(function, irq), before, strict=True))
        good = got[:3] == expected
        self._bus.record(
            f"step name={name} addr={function.addr} irq={irq} entries={got[0]} elsewhere={got[1]} "
            f"served={got[2]} vector7={got[3]} vector15={got[4]} result={'good' if good else 'bad'}"
        )
        return good
