# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest of --vm soft: in Python what proxyd/vm/embedded/guest does in C, as far as the demo and tests need it.

The console protocol, the commands and the meaning of every count are those at the top of guest/main.c; there are
fewer commands, and latencies are in nanoseconds. This is the part that takes commands; the interrupts' handler is
in scriptedirq.py, the drivers are in scripteddrivers.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from common.errors import UsageError
from common.pci import parse_devfn
from proxyd.pci.pcihost import RESET_PORT
from proxyd.vm.soft.machine import TICK_SECONDS, MachineReset, PowerOff, SoftMachine
from proxyd.vm.soft.scripteddrivers import DRIVERS
from proxyd.vm.soft.scriptedirq import MASTER_VECTOR, PIRQ_IRQS, SLAVE_VECTOR, SPARE_IRQ, Function, Interrupts

__all__ = ["ScriptedGuest"]

_PIRQ_DISABLED = 0x80

_SERVED_WITHIN = 1.0
_BACK_WITHIN = 20.0
_SETTLE = 3 * TICK_SECONDS
_PROGRESS_STEPS = 20
_LOST_IN_A_ROW = 10
_SAMPLES_A_LINE = 16
_SAMPLES_MAX = 16384


class _CommandError(Exception):
    """What follows ``err``."""


class ScriptedGuest:
    """Takes commands from the console until the daemon ends."""

    def __init__(self, machine: SoftMachine) -> None:
        self._machine = machine
        self._functions: list[Function] = []
        self._interrupts = Interrupts(machine, ())
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
        self._functions = []
        self._interrupts = Interrupts(self._machine, ())
        for command, base, cascade in ((0x20, MASTER_VECTOR, 0x04), (0xA0, SLAVE_VECTOR, 0x02)):
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
            function = Function(self._machine, devfn, driver, pirq, PIRQ_IRQS[pirq])
            function.start()
            self._functions.append(function)
        self._interrupts = Interrupts(self._machine, self._functions)
        for pirq, irq in enumerate(PIRQ_IRQS):
            self._machine.set_level_triggered(irq)
            self._interrupts.route(pirq, irq)
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

    def _round(self, function: Function, hold: bool) -> bool:
        """One round, however often the device is reset under it. False if its interrupt was lost."""
        while True:
            before = function.raised, function.served, function.held, function.reasserts
            served = self._attempt(function, hold)
            if served is not None:
                return served
            try:
                self._recover_all(function)
            finally:
                # What a device that goes on where it was has asserted meanwhile is of no round.
                function.raised, function.served, function.held, function.reasserts = before
                function.redone += 1

    def _attempt(self, function: Function, hold: bool) -> bool | None:
        """Raises, and waits: whether that was served, or None if the device has been reset or has gone."""
        served = function.served
        function.hold = hold
        function.raise_line()
        expires = time.monotonic() + _SERVED_WITHIN
        while True:
            now = time.monotonic()
            self._machine.halt(now + TICK_SECONDS, self._interrupts.take)
            if function.served != served:
                return True
            if not function.driver.is_alive():
                return None
            if now > expires:
                function.lost += 1
                function.quiesce()
                return False

    def _recover_all(self, dead: Function | None = None) -> None:
        """What reset one device has seldom left the others alone.

        One that was seen ``dead`` may be back by now, with its line as high as it was.
        """
        for function in self._functions:
            if function is dead or not function.driver.is_alive():
                self._recover(function)

    def _recover(self, function: Function) -> None:
        """Waits until the function answers with its cookie; initialises it if it was reset."""
        function.recovering = True
        started = time.monotonic()
        while True:
            if self._machine.config_read(function.devfn, 0x00, 4) in DRIVERS:
                function.quiesce()
                if function.driver.is_alive():
                    break
            if time.monotonic() - started > _BACK_WITHIN:
                self._record(f"gone addr={function.addr}")
                raise _CommandError("a function did not come back")
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
        for irq, line in self._interrupts.lines.items():
            line_counts = ("entries", "eois", "spurious", "orphaned", "stuck")
            self._record(
                f"irq irq={irq} " + " ".join(f"{count}={getattr(line, count)}" for count in line_counts)
            )
        spurious = self._interrupts.spurious
        self._record(f"vectors spurious7={spurious[7]} spurious15={spurious[15]}")
        return ""

    def _reroute(self, words: list[str]) -> str:
        function = self._named(words)
        pirq, irq = function.pirq, function.irq
        self._machine.set_level_triggered(SPARE_IRQ)
        self._machine.mask(SPARE_IRQ, False)

        def move_before_inta() -> None:
            function.raise_line()
            self._interrupts.route(pirq, SPARE_IRQ)

        def move_before_eoi() -> None:
            function.hold, function.move_to = True, irq
            function.raise_line()

        def disable() -> None:
            function.raise_line()
            self._interrupts.route(pirq, _PIRQ_DISABLED)

        good = self._step("before_inta", function, SPARE_IRQ, move_before_inta, (1, 0, 1))
        good &= self._step("before_eoi", function, irq, move_before_eoi, (1, 1, 1))
        good &= self._step("disabled", function, irq, disable, (0, 0, 0))
        good &= self._step("enabled", function, irq, lambda: self._interrupts.route(pirq, irq), (1, 0, 1))
        for sharer in self._functions:
            if sharer.pirq == pirq:
                good &= self._step("restored", sharer, irq, sharer.raise_line, (1, 0, 1))
        self._machine.mask(SPARE_IRQ, True)
        if not good:
            raise _CommandError("a step had the wrong interrupts")
        return ""

    def _intx(self, words: list[str]) -> str:
        function = self._named(words)
        shared = sum(other.pirq == function.pirq for other in self._functions) > 1

        before = self._interrupts.lines[function.irq].entries
        function.raise_line()
        function.disable_intx(True)
        self._settle(_SETTLE)
        entries = self._interrupts.lines[function.irq].entries - before
        if not function.is_asserting():
            raise _CommandError("the status bit was clear while INTx was disabled")
        enabled = self._step(
            "enabled", function, function.irq, lambda: function.disable_intx(False), (1, 0, 1)
        )
        if entries > shared or not enabled:
            raise _CommandError("a step had the wrong interrupts")
        return ""

    def _hold(self, words: list[str]) -> str:
        function = self._named(words)
        self._machine.mask(function.irq, True)
        function.raise_line()
        return f"status={int(function.is_asserting())}"

    def _reboot(self, _words: list[str]) -> str:
        self._machine.write_line("ok")
        self._machine.outp(RESET_PORT, 0x06)
        return ""

    def _step(
        self,
        name: str,
        function: Function,
        irq: int,
        act: Callable[[], None],
        expected: tuple[int, int, int],
    ) -> bool:
        """Acts and waits; whether entries on the IRQ, entries elsewhere and services are as expected."""

        def counts() -> tuple[int, int, int]:
            elsewhere = sum(line.entries for other, line in self._interrupts.lines.items() if other != irq)
            return self._interrupts.lines[irq].entries, elsewhere, function.served

        before = counts()
        act()
        expires = time.monotonic() + _SERVED_WITHIN
        while expected[2] and function.served == before[2] and time.monotonic() < expires:
            self._machine.halt(time.monotonic() + TICK_SECONDS, self._interrupts.take)
        if expected[2] and function.served == before[2]:
            function.lost += 1
            function.quiesce()
        self._settle(_SETTLE)
        got = tuple(after - start for after, start in zip(counts(), before, strict=True))
        result = "good" if got == expected else "bad"
        self._record(
            f"step name={name} addr={function.addr} irq={irq} entries={got[0]} elsewhere={got[1]} "
            f"served={got[2]} result={result}"
        )
        return got == expected

    def _settle(self, seconds: float) -> None:
        expires = time.monotonic() + seconds
        while time.monotonic() < expires:
            self._machine.halt(expires, self._interrupts.take)

    def _named(self, words: list[str]) -> Function:
        try:
            devfn = parse_devfn(words[0] if words else "")
        except UsageError as error:
            raise _CommandError(str(error)) from error
        for function in self._functions:
            if function.devfn == devfn:
                return function
        raise _CommandError("no such function, setup comes first")

    def _record(self, text: str) -> None:
        self._machine.write_line(f"* {text}")
