# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest of --vm soft: what proxyd/vm/guest does in C, as far as the demo and tests need it, in Python.

The console protocol, the commands and the meaning of every count are those at the top of guest/main.c; there are
fewer commands, and latencies are in nanoseconds. Accesses to devices are the same ones that the C drivers make.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from common.errors import UsageError
from common.pci import PCI_COMMAND_INTX_DISABLE, PCI_STATUS_INTERRUPT, format_devfn, parse_devfn
from proxyd.pcihost import RESET_PORT
from proxyd.vm.scripteddrivers import DRIVERS, Driver
from proxyd.vm.softmachine import TICK_SECONDS, MachineReset, PowerOff, SoftMachine

__all__ = ["ScriptedGuest"]

_PIRQ_IRQS = (10, 11, 5, 9)
_SPARE_IRQ = 12
_PIRQ_DISABLED = 0x80
_MASTER_VECTOR, _SLAVE_VECTOR = 0x20, 0x28
_COMMAND_RUNNING = 0x0003
_ISA_BRIDGE = parse_devfn("01.0")

_SERVED_WITHIN = 1.0
_BACK_WITHIN = 20.0
_SETTLE = 3 * TICK_SECONDS
_STORM_LIMIT = 200
_PROGRESS_STEPS = 20
_LOST_IN_A_ROW = 10
_SAMPLES_A_LINE = 16
_SAMPLES_MAX = 16384


class _CommandError(Exception):
    """What follows ``err``."""


@dataclass(eq=False)
class _Function:
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
    move_to: int | None = None
    intx_disabled: bool = False
    recovering: bool = False
    raised_at: int = 0
    eoi_at: int = 0
    samples: dict[str, list[int]] = field(default_factory=dict)

    @property
    def addr(self) -> str:
        return format_devfn(self.devfn)


@dataclass
class _Line:
    entries: int = 0
    eois: int = 0
    spurious: int = 0
    orphaned: int = 0
    unclaimed: int = 0
    stuck: int = 0


class ScriptedGuest:
    """Takes commands from the console until the daemon ends."""

    def __init__(self, machine: SoftMachine) -> None:
        self._machine = machine
        self._functions: list[_Function] = []
        self._lines: dict[int, _Line] = {}
        self._routes: dict[int, int] = {}
        self._spurious = {7: 0, 15: 0}
        self._commands: dict[str, Callable[[list[str]], str]] = {
            "setup": self._setup,
            "run": self._run,
            "samples": self._samples,
            "stats": self._stats,
            "reroute": self._reroute,
            "intx": self._intx,
            "hold": self._hold,
            "reboot": self._reboot,
        }

    def run(self) -> None:
        """The guest from power-on; returns when the daemon ends."""
        while True:
            try:
                self._boot()
            except MachineReset:
                continue
            except PowerOff:
                return

    def _boot(self) -> None:
        self._functions, self._lines, self._routes = [], {}, {}
        for command, base, cascade in ((0x20, _MASTER_VECTOR, 0x04), (0xA0, _SLAVE_VECTOR, 0x02)):
            for port, value in (
                (command, 0x11),
                (command + 1, base),
                (command + 1, cascade),
                (command + 1, 0x01),
            ):
                self._machine.outp(port, value)
            self._machine.outp(command + 1, 0xFB if command == 0x20 else 0xFF)
        self._machine.write_line("iohub-guest 1 ready")
        while True:
            words = self._machine.read_line().split()
            try:
                if not words or words[0] not in self._commands:
                    raise _CommandError("unknown command")
                answer = self._commands[words[0]](words[1:])
                self._machine.write_line(f"ok {answer}".rstrip())
            except _CommandError as error:
                self._machine.write_line(f"err {error}")

    def _setup(self, _words: list[str]) -> str:
        self._functions = []
        self._lines = {irq: _Line() for irq in (*_PIRQ_IRQS, _SPARE_IRQ)}
        memory, io = 0xE0000000, 0xC000
        for devfn in range(256):
            ids = self._machine.config_read(devfn, 0x00, 4)
            pin = self._machine.config_read(devfn, 0x3D, 1)
            if ids not in DRIVERS or not 1 <= pin <= 4:
                continue
            address = memory if DRIVERS[ids].is_memory else io
            memory, io = (memory + (1 << 20), io) if DRIVERS[ids].is_memory else (memory, io + 0x100)
            pirq = ((devfn >> 3) - 1 + pin - 1) & 3
            driver = DRIVERS[ids](self._machine, address)
            function = _Function(devfn, driver, pirq, _PIRQ_IRQS[pirq])
            self._start(function)
            self._functions.append(function)
        for pirq, irq in enumerate(_PIRQ_IRQS):
            self._machine.set_level_triggered(irq)
            self._route(pirq, irq)
            self._machine.mask(irq, False)
        for function in self._functions:
            model, ids = function.driver.model, self._machine.config_read(function.devfn, 0x00, 4)
            name = f"{ids & 0xFFFF:04x}:{ids >> 16:04x}"
            self._record(f"function addr={function.addr} id={name} model={model} gsi={function.irq}")
        return f"functions={len(self._functions)}"

    def _run(self, words: list[str]) -> str:
        try:
            rounds, every = int(words[0]), int(words[2]) if words[1:2] == ["held"] else 0
        except (ValueError, IndexError):
            raise _CommandError("run ROUNDS [held EVERY] is meant") from None
        if not self._functions:
            raise _CommandError("no functions, setup comes first")
        started = time.monotonic()
        total = rounds * len(self._functions)
        step = max(1, total // _PROGRESS_STEPS)
        done = lost_in_a_row = 0
        for function in self._functions:
            function.samples = {"raise_to_handler": [], "eoi_to_reassert": []}
        for number in range(1, rounds + 1):
            for function in self._functions:
                lost_in_a_row = (
                    0 if self._round(function, bool(every) and number % every == 0) else lost_in_a_row + 1
                )
                if lost_in_a_row == _LOST_IN_A_ROW:
                    raise _CommandError("too many rounds in a row were lost")
                done += 1
                if done % step == 0 or done == total:
                    self._record(f"progress done={done} total={total}")
                    self._recover_all()
        return f"ticks={int((time.monotonic() - started) / TICK_SECONDS)}"

    def _round(self, function: _Function, hold: bool) -> bool:
        while True:
            before = function.raised, function.served, function.held, function.reasserts
            served = function.served
            function.hold = hold
            self._raise(function)
            expires = time.monotonic() + _SERVED_WITHIN
            while function.served == served:
                now = time.monotonic()
                self._machine.halt(now + TICK_SECONDS, self._interrupt)
                if function.served == served and not function.driver.is_alive():
                    try:
                        self._recover_all()
                    finally:
                        # What a device that goes on where it was has asserted meanwhile is of no round.
                        function.raised, function.served, function.held, function.reasserts = before
                        function.redone += 1
                    break
                if function.served == served and now > expires:
                    function.lost += 1
                    self._quiesce(function)
                    return False
            else:
                return True

    def _recover_all(self) -> None:
        """What reset one device has seldom left the others alone."""
        for function in self._functions:
            self._recover(function)

    def _recover(self, function: _Function) -> None:
        """Waits until the function answers with its cookie; initialises it if it was reset."""
        if function.driver.is_alive():
            return
        function.recovering = True
        started = time.monotonic()
        while not function.driver.is_alive():
            if time.monotonic() - started > _BACK_WITHIN:
                self._record(f"gone addr={function.addr}")
                raise _CommandError("a function did not come back")
            if self._machine.config_read(function.devfn, 0x00, 4) in DRIVERS:
                self._quiesce(function)
            self._settle(TICK_SECONDS)
        ticks = int((time.monotonic() - started) / TICK_SECONDS)
        self._record(f"back addr={function.addr} after_ticks={ticks} config=kept")
        self._settle(TICK_SECONDS)
        function.recovering = False

    def _samples(self, words: list[str]) -> str:
        for kind, samples in self._named(words).samples.items():
            kept = samples[-_SAMPLES_MAX:]
            for start in range(0, len(kept), _SAMPLES_A_LINE):
                row = kept[start : start + _SAMPLES_A_LINE]
                self._record(f"{kind} tsc={','.join(f'{sample:x}' for sample in row)}")
        return ""

    def _stats(self, _words: list[str]) -> str:
        for function in self._functions:
            counts = ("raised", "served", "lost", "redone", "eois", "held", "reasserts")
            text = " ".join(f"{count}={getattr(function, count)}" for count in counts)
            self._record(
                f"function addr={function.addr} model={function.driver.model} gsi={function.irq} {text}"
            )
        for irq, line in self._lines.items():
            line_counts = ("entries", "eois", "spurious", "orphaned", "stuck")
            self._record(
                f"irq irq={irq} " + " ".join(f"{count}={getattr(line, count)}" for count in line_counts)
            )
        self._record(f"vectors spurious7={self._spurious[7]} spurious15={self._spurious[15]}")
        return ""

    def _reroute(self, words: list[str]) -> str:
        function = self._named(words)
        pirq, irq = function.pirq, function.irq
        self._machine.set_level_triggered(_SPARE_IRQ)
        self._machine.mask(_SPARE_IRQ, False)

        def move_before_inta() -> None:
            self._raise(function)
            self._route(pirq, _SPARE_IRQ)

        def move_before_eoi() -> None:
            function.hold, function.move_to = True, irq
            self._raise(function)

        def disable() -> None:
            self._raise(function)
            self._route(pirq, _PIRQ_DISABLED)

        good = self._step("before_inta", function, _SPARE_IRQ, move_before_inta, (1, 0, 1))
        good &= self._step("before_eoi", function, irq, move_before_eoi, (1, 1, 1))
        good &= self._step("disabled", function, irq, disable, (0, 0, 0))
        good &= self._step("enabled", function, irq, lambda: self._route(pirq, irq), (1, 0, 1))
        for sharer in self._functions:
            if sharer.pirq == pirq:
                good &= self._step("restored", sharer, irq, partial(self._raise, sharer), (1, 0, 1))
        self._machine.mask(_SPARE_IRQ, True)
        if not good:
            raise _CommandError("a step had the wrong interrupts")
        return ""

    def _intx(self, words: list[str]) -> str:
        function = self._named(words)
        shared = sum(other.pirq == function.pirq for other in self._functions) > 1

        def disable() -> None:
            self._raise(function)
            self._disable_intx(function, True)

        before = self._lines[function.irq].entries
        disable()
        self._settle(_SETTLE)
        entries = self._lines[function.irq].entries - before
        status = self._machine.config_read(function.devfn, 0x06, 2) & PCI_STATUS_INTERRUPT
        if not status:
            raise _CommandError("the status bit was clear while INTx was disabled")
        enabled = self._step(
            "enabled", function, function.irq, lambda: self._disable_intx(function, False), (1, 0, 1)
        )
        if entries > shared or not enabled:
            raise _CommandError("a step had the wrong interrupts")
        return ""

    def _hold(self, words: list[str]) -> str:
        function = self._named(words)
        self._machine.mask(function.irq, True)
        self._raise(function)
        status = self._machine.config_read(function.devfn, 0x06, 2) & PCI_STATUS_INTERRUPT
        return f"status={int(bool(status))}"

    def _reboot(self, _words: list[str]) -> str:
        self._machine.write_line("ok")
        self._machine.outp(RESET_PORT, 0x06)
        return ""

    def _step(
        self,
        name: str,
        function: _Function,
        irq: int,
        act: Callable[[], None],
        expected: tuple[int, int, int],
    ) -> bool:
        """Acts and waits; whether entries on the IRQ, entries elsewhere and services are as expected."""

        def counts() -> tuple[int, int, int]:
            elsewhere = sum(line.entries for other, line in self._lines.items() if other != irq)
            return self._lines[irq].entries, elsewhere, function.served

        before = counts()
        act()
        expires = time.monotonic() + _SERVED_WITHIN
        while expected[2] and function.served == before[2] and time.monotonic() < expires:
            self._machine.halt(time.monotonic() + TICK_SECONDS, self._interrupt)
        if expected[2] and function.served == before[2]:
            function.lost += 1
            self._quiesce(function)
        self._settle(_SETTLE)
        got = tuple(after - start for after, start in zip(counts(), before, strict=True))
        result = "good" if got == expected else "bad"
        self._record(
            f"step name={name} addr={function.addr} irq={irq} entries={got[0]} elsewhere={got[1]} "
            f"served={got[2]} result={result}"
        )
        return got == expected

    def _interrupt(self, vector: int) -> None:
        now = time.perf_counter_ns()
        irq = vector - _MASTER_VECTOR if vector < _SLAVE_VECTOR else vector - _SLAVE_VECTOR + 8
        if irq in self._spurious and not self._machine.is_in_service(irq):
            self._spurious[irq] += 1
            if irq == 15:
                self._machine.outp(0x20, 0x62)
            return
        if irq in self._lines:
            self._device_interrupt(irq, now)
        self._machine.eoi(irq)

    def _device_interrupt(self, irq: int, now: int) -> None:
        line = self._lines[irq]
        line.entries += 1
        on_line = [function for function in self._functions if self._routes.get(function.pirq) == irq]
        claimed = False
        held: _Function | None = None
        for function in on_line:
            if function.intx_disabled:
                continue
            if function.hold:
                if not self._machine.config_read(function.devfn, 0x06, 2) & PCI_STATUS_INTERRUPT:
                    continue
                self._entered(function, now)
                function.hold, held = False, function
                function.held += 1
            elif function.driver.claim():
                self._entered(function, now)
                function.served += 1
            else:
                continue
            claimed = True
        self._account(line, irq, claimed, on_line)
        if held is not None and held.move_to is not None:
            self._route(held.pirq, held.move_to)
            held.move_to = None
        line.eois += 1
        for function in on_line:
            function.eois += 1
        if held is not None:
            held.eoi_at = time.perf_counter_ns()

    def _account(self, line: _Line, irq: int, claimed: bool, on_line: list[_Function]) -> None:
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

    def _entered(self, function: _Function, now: int) -> None:
        if function.raised_at:
            kind, began, function.raised_at = "raise_to_handler", function.raised_at, 0
        elif function.eoi_at:
            kind, began, function.eoi_at = "eoi_to_reassert", function.eoi_at, 0
            function.reasserts += 1
        else:
            return
        if kind in function.samples:
            function.samples[kind].append(now - began)

    def _raise(self, function: _Function) -> None:
        function.raised += 1
        function.eoi_at = 0
        function.raised_at = time.perf_counter_ns()
        function.driver.raise_line()

    def _start(self, function: _Function) -> None:
        self._machine.config_write(function.devfn, 0x10, 4, function.driver.base)
        self._machine.config_write(function.devfn, 0x3C, 1, function.irq)
        self._machine.config_write(function.devfn, 0x04, 2, _COMMAND_RUNNING)
        function.driver.init()

    def _quiesce(self, function: _Function) -> None:
        function.hold, function.move_to = False, None
        function.raised_at = function.eoi_at = 0
        function.driver.init()

    def _settle(self, seconds: float) -> None:
        expires = time.monotonic() + seconds
        while time.monotonic() < expires:
            self._machine.halt(expires, self._interrupt)

    def _named(self, words: list[str]) -> _Function:
        try:
            devfn = parse_devfn(words[0] if words else "")
        except UsageError as error:
            raise _CommandError(str(error)) from error
        for function in self._functions:
            if function.devfn == devfn:
                return function
        raise _CommandError("no such function, setup comes first")

    def _disable_intx(self, function: _Function, disable: bool) -> None:
        function.intx_disabled = disable
        command = _COMMAND_RUNNING | (PCI_COMMAND_INTX_DISABLE if disable else 0)
        self._machine.config_write(function.devfn, 0x04, 2, command)

    def _route(self, pirq: int, irq: int) -> None:
        self._routes[pirq] = irq
        self._machine.config_write(_ISA_BRIDGE, 0x60 + pirq, 1, irq)

    def _record(self, text: str) -> None:
        self._machine.write_line(f"* {text}")
