# SPDX-License-Identifier: GPL-2.0-or-later
"""The scripted guest's interrupt run: guest/run.c in Python; latencies are in nanoseconds."""

from __future__ import annotations

import time

from proxyd.vm.soft.machine import TICK_SECONDS
from proxyd.vm.soft.scriptedbus import Bus
from proxyd.vm.soft.scripteddrivers import DRIVERS
from proxyd.vm.soft.scriptedirq import Function
from proxyd.vm.soft.scriptedparse import CommandError, parse_number

__all__ = ["SERVED_WITHIN", "Run", "settle"]

SERVED_WITHIN = 3.0
_BACK_WITHIN = 20.0
_PROGRESS_STEPS = 20
_LOST_IN_A_ROW = 10
_ROUNDS_MAX = 1_000_000
_SAMPLES_A_LINE = 16
_SAMPLES_MAX = 16384


def settle(bus: Bus, seconds: float) -> None:
    """Serves what still comes in that time."""
    expires = time.monotonic() + seconds
    while time.monotonic() < expires:
        bus.machine.halt(expires, bus.interrupts.take)


class Run:
    """The commands "run" and "samples"."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    def run(self, words: list[str]) -> str:
        """run ROUNDS [held EVERY]"""
        rounds, every = _parse(words)
        functions = self._bus.functions
        if not functions:
            raise CommandError("no function with a driver: setup finds them")
        if any(function.parked for function in functions):
            raise CommandError("a line is held, release comes first")
        started = time.monotonic()
        total = rounds * len(functions)
        step = max(1, total // _PROGRESS_STEPS)
        done = lost_in_a_row = 0
        for function in functions:
            function.samples = {"raise_to_handler": [], "eoi_to_reassert": []}
        for number in range(1, rounds + 1):
            for function in functions:
                is_served = self._round(function, bool(every) and number % every == 0)
                lost_in_a_row = 0 if is_served else lost_in_a_row + 1
                if lost_in_a_row == _LOST_IN_A_ROW:
                    raise CommandError("too many rounds in a row were lost")
                done += 1
                if done % step == 0 or done == total:
                    self._bus.record(f"progress done={done} total={total}")
                    self._recover_all()
        return f"ticks={int((time.monotonic() - started) / TICK_SECONDS)}"

    def samples(self, words: list[str]) -> str:
        """samples ADDR"""
        for kind, samples in self._bus.named(words[0]).samples.items():
            kept = samples[-_SAMPLES_MAX:]
            for start in range(0, len(kept), _SAMPLES_A_LINE):
                row = kept[start : start + _SAMPLES_A_LINE]
                self._bus.record(f"{kind} tsc={','.join(f'{sample:x}' for sample in row)}")
        return ""

    def _round(self, function: Function, hold: bool) -> bool:
        """One round, however often the device is reset under it. False if its interrupt was lost."""
        while True:
            before = function.raised, function.served, function.held, function.reasserts
            served = self._attempt(function, hold)
            if served is not None:
                if not served and self._bus.interrupts.lines[function.irq].stuck:
                    raise CommandError("an IRQ is stuck")
                return served
            try:
                self._recover_all(function)
            finally:
                # A device that continued where it was may have interrupted meanwhile: that belongs to no round.
                function.raised, function.served, function.held, function.reasserts = before
                function.redone += 1

    def _attempt(self, function: Function, hold: bool) -> bool | None:
        """Raises, and waits: whether that was served, or None if the device has been reset or has gone."""
        served = function.served
        function.hold = hold
        function.raise_line()
        expires = time.monotonic() + SERVED_WITHIN
        while True:
            now = time.monotonic()
            self._bus.machine.halt(now + TICK_SECONDS, self._bus.interrupts.take)
            if function.served != served:
                return True
            if not function.driver.is_alive():
                return None
            if now > expires:
                function.lost += 1
                function.quiesce()
                return False

    def _recover_all(self, dead: Function | None = None) -> None:
        """Recovers every function that has been reset: what reset one has probably reset others, too.

        ``dead`` is recovered in any case. It may answer again by now, its line still high.
        """
        for function in self._bus.functions:
            if function is dead or not function.driver.is_alive():
                self._recover(function)

    def _recover(self, function: Function) -> None:
        """Waits until the function answers with its cookie; initialises it if it was reset."""
        function.recovering = True
        started = time.monotonic()
        while True:
            if self._bus.machine.config_read(function.devfn, 0x00, 4) in DRIVERS:
                function.quiesce()
                if function.driver.is_alive():
                    break
            if time.monotonic() - started > _BACK_WITHIN:
                function.recovering = False
                self._bus.record(f"gone addr={function.addr}")
                raise CommandError("a function did not come back")
            settle(self._bus, TICK_SECONDS)
        ticks = int((time.monotonic() - started) / TICK_SECONDS)
        self._bus.record(f"back addr={function.addr} after_ticks={ticks} config=kept")
        settle(self._bus, TICK_SECONDS)
        function.recovering = False


def _parse(words: list[str]) -> tuple[int, int]:
    """How many rounds, and in every how many-th the line is held; 0 for never. Raises CommandError."""
    rounds = parse_number(words[0], _ROUNDS_MAX)
    if not rounds:
        raise CommandError("bad number")
    if len(words) == 1:
        return rounds, 0
    if len(words) != 3 or words[1] != "held":
        raise CommandError("run ROUNDS [held EVERY] is meant")
    every = parse_number(words[2])
    if not every:
        raise CommandError("bad number")
    return rounds, every
