# SPDX-License-Identifier: GPL-2.0-or-later
"""The scripted guest's functions, and the handler of their interrupts: what guest/irq.c, function.c and generic.c
do, in Python.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from common.pci import PCI_COMMAND, PCI_COMMAND_INTX_DISABLE, format_devfn, parse_devfn
from proxyd.vm.soft.machine import SoftMachine
from proxyd.vm.soft.scripteddrivers import Driver
from proxyd.vm.soft.scriptedpci import RUNNING, is_asserting

__all__ = [
    "MASTER_VECTOR",
    "PIRQ_IRQS",
    "SLAVE_VECTOR",
    "SPARE_IRQ",
    "Device",
    "Function",
    "Interrupts",
    "Line",
]

PIRQ_IRQS = (10, 11, 5, 9)
"""where PIRQ A to D go at first"""
SPARE_IRQ = 12
MASTER_VECTOR, SLAVE_VECTOR = 0x20, 0x28

_ISA_BRIDGE = parse_devfn("01.0")
_STORM_LIMIT = 200


@dataclass(eq=False)
class Function:
    """One function with its driver, and its counts, which guest/main.c explains."""

    machine: SoftMachine
    devfn: int
    driver: Driver
    pirq: int
    irq: int
    raised: int = 0
    served: int = 0
    lost: int = 0
    redone: int = 0
    eois: int = 0
    held: int = 0
    reasserts: int = 0
    hold: bool = False
    """the handler's next entry does not acknowledge at the device"""
    move_to: int | None = None
    """the IRQ that it then routes the function's PIRQ to, before the EOI"""
    intx_disabled: bool = False
    recovering: bool = False
    parked: bool = False
    """raised by "hold", its IRQ masked"""
    samples: dict[str, list[int]] = field(default_factory=dict)
    """nanoseconds, by the kinds that are wanted"""
    _raised_at: int = 0
    _eoi_at: int = 0

    @property
    def addr(self) -> str:
        return format_devfn(self.devfn)

    def raise_line(self) -> None:
        """Makes the device assert its line."""
        self.raised += 1
        self._eoi_at = 0
        self._raised_at = time.perf_counter_ns()
        self.driver.raise_line()

    def quiesce(self) -> None:
        """Back to where a round begins, whatever became of the last one."""
        self.hold, self.move_to = False, None
        self._raised_at = self._eoi_at = 0
        self.driver.init()

    def is_asserting(self) -> bool:
        """Whether its line is high, INTX_DISABLE or not."""
        return is_asserting(self.machine, self.devfn)

    def disable_intx(self, disable: bool) -> None:
        """Writes INTX_DISABLE."""
        self.intx_disabled = disable
        command = RUNNING | (PCI_COMMAND_INTX_DISABLE if disable else 0)
        self.machine.config_write(self.devfn, PCI_COMMAND, 2, command)

    def entered(self, now: int) -> None:
        """The handler, entered at ``now``, has found it asserting."""
        if self._raised_at:
            kind, began, self._raised_at = "raise_to_handler", self._raised_at, 0
        elif self._eoi_at:
            kind, began, self._eoi_at = "eoi_to_reassert", self._eoi_at, 0
            self.reasserts += 1
        else:
            return
        if kind in self.samples:
            self.samples[kind].append(now - began)

    def eoi_sent(self) -> None:
        """Its line is still high at this EOI."""
        self._eoi_at = time.perf_counter_ns()


@dataclass(eq=False)
class Device:
    """One function without a driver."""

    machine: SoftMachine
    devfn: int
    pirq: int | None
    irq: int | None
    """both are None without an interrupt pin"""
    interrupts: int = 0

    @property
    def addr(self) -> str:
        return format_devfn(self.devfn)

    def is_asserting(self) -> bool:
        """Whether its line is high, INTX_DISABLE or not."""
        return is_asserting(self.machine, self.devfn)

    def is_disabled(self) -> bool:
        """Whether INTX_DISABLE is set."""
        return bool(self.machine.config_read(self.devfn, PCI_COMMAND, 2) & PCI_COMMAND_INTX_DISABLE)

    def enable(self) -> None:
        """Clears INTX_DISABLE."""
        self.machine.config_write(self.devfn, PCI_COMMAND, 2, RUNNING)

    def claim(self) -> bool:
        """If it asserts the line: counts, and sets INTX_DISABLE, since nobody knows how to acknowledge it."""
        if not self.is_asserting() or self.is_disabled():
            return False
        self.machine.config_write(self.devfn, PCI_COMMAND, 2, RUNNING | PCI_COMMAND_INTX_DISABLE)
        self.interrupts += 1
        return True


@dataclass
class Line:
    """The counts of one IRQ."""

    entries: int = 0
    eois: int = 0
    spurious: int = 0
    orphaned: int = 0
    stuck: int = 0
    unclaimed: int = 0
    """entries in a row for which no function was asserting"""


class Interrupts:
    """The handler, the PIRQ router, and what is counted for each IRQ."""

    def __init__(
        self, machine: SoftMachine, functions: Sequence[Function], devices: Sequence[Device] = ()
    ) -> None:
        self.lines = {irq: Line() for irq in (*PIRQ_IRQS, SPARE_IRQ)}
        self.spurious = {7: 0, 15: 0}
        """vectors of an IRQ that had gone by the time of the INTA"""
        self._machine = machine
        self._functions = functions
        self._devices = devices
        self._routes: dict[int, int] = {}

    def is_used(self, irq: int) -> bool:
        """Whether a function with a driver is on the IRQ at present."""
        return any(self._routes.get(function.pirq) == irq for function in self._functions)

    def route(self, pirq: int, value: int) -> None:
        """Writes a PIRQ's register: an IRQ, or bit 7 for none."""
        self._routes[pirq] = value
        self._machine.config_write(_ISA_BRIDGE, 0x60 + pirq, 1, value)

    def take(self, vector: int) -> None:
        """The handler of all vectors."""
        now = time.perf_counter_ns()
        irq = vector - MASTER_VECTOR if vector < SLAVE_VECTOR else vector - SLAVE_VECTOR + 8
        if irq in self.spurious and not self._machine.is_in_service(irq):
            self.spurious[irq] += 1
            if irq == 15:
                self._machine.outp(0x20, 0x62)
            return
        if irq in self.lines:
            self._serve(irq, now)
        self._machine.eoi(irq)

    def _serve(self, irq: int, now: int) -> None:
        line = self.lines[irq]
        line.entries += 1
        on_line = [function for function in self._functions if self._routes.get(function.pirq) == irq]
        claimed = False
        held: Function | None = None
        for function in on_line:
            if function.intx_disabled:
                continue
            if function.hold:
                if not function.is_asserting():
                    continue
                function.entered(now)
                function.hold, held = False, function
                function.held += 1
            elif function.driver.claim():
                function.entered(now)
                function.served += 1
            else:
                continue
            claimed = True
        for device in self._devices:
            if device.pirq is not None and self._routes.get(device.pirq) == irq:
                claimed |= device.claim()
        self._account(line, irq, claimed, on_line)
        if held is not None and held.move_to is not None:
            self.route(held.pirq, held.move_to)
            held.move_to = None
        line.eois += 1
        for function in on_line:
            function.eois += 1
        if held is not None:
            held.eoi_sent()

    def _account(self, line: Line, irq: int, claimed: bool, on_line: list[Function]) -> None:
        if claimed:
            line.unclaimed = 0
            return
        if any(function.recovering or not function.driver.is_alive() for function in on_line):
            line.orphaned += 1
        else:
            line.spurious += 1
        line.unclaimed += 1
        if line.unclaimed == _STORM_LIMIT:
            line.stuck = 1
            self._machine.mask(irq, True)
