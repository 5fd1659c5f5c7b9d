# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that works while its daemons are killed, on a HostBench."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from random import Random

from proxyd.kvm.kvm import Kvm
from tests.support.hostbench import HostBench
from tests.support.wait import wait_until

__all__ = ["ROUNDS", "Hammer", "Interrupts", "check_counts", "hammering", "kill_at_random", "tsc_hertz"]

ROUNDS = 100
LONGEST_LIFE = 0.5
"""seconds, from the start of a process"""
LONGEST_SERVICE = 0.1
"""seconds, once the functions are served"""
LONGEST_SILENCE = 1.0
"""seconds without service after which no kill comes before there was some: the guest waits for three"""


class Interrupts:
    """The guest raises and serves interrupts."""

    def __init__(self, host: HostBench) -> None:
        self.samples: list[int] = []
        """TSC cycles from each access that raised a line to the handler"""
        self._host = host

    def __call__(self) -> None:
        self._host.command(f"run {ROUNDS} held 4")
        for addr in ("05.0", "06.0"):
            for record in self._host.command(f"samples {addr}").of_kind("raise_to_handler"):
                self.samples += record.cycles()


class Hammer(threading.Thread):
    """Does some work again and again until it is stopped."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.rounds = 0
        self.error: BaseException | None = None
        self._work = work
        self._is_over = threading.Event()

    def run(self) -> None:
        try:
            while not self._is_over.is_set():
                self._work()
                self.rounds += 1
        except BaseException as error:  # noqa: BLE001  it is raised by stop()
            self.error = error

    def stop(self) -> None:
        """Waits for the end of the present round. Raises what has failed in it."""
        self._is_over.set()
        self.join()
        if self.error is not None:
            raise self.error


@contextmanager
def hammering(work: Callable[[], object]) -> Iterator[Hammer]:
    hammer = Hammer(work)
    hammer.start()
    try:
        yield hammer
    finally:
        hammer.stop()


def kill_at_random(host: HostBench, units: Sequence[str], kills: int, random: Random) -> None:
    """Kills all of the units at once, again and again, each time at another moment of their lives.

    Every other time they have got as far as to serve the guest, which waits for an interrupt for a few seconds.
    """
    victims, served = dict.fromkeys(units, 0), time.monotonic()
    for number in range(kills):
        victims = {unit: host.wait_for_process(unit, pid) for unit, pid in victims.items()}
        is_to_serve = bool(number % 2) or time.monotonic() - served > LONGEST_SILENCE
        if is_to_serve:
            wait_until(lambda: host.linked() == {"edu0", "com1"}, "all functions are served")
            served = time.monotonic()
        threading.Event().wait(random.uniform(0, LONGEST_SERVICE if is_to_serve else LONGEST_LIFE))
        for unit in victims:
            victims[unit] = host.kill(unit)
    for unit in units:
        host.wait_state(unit, "active")


def check_counts(host: HostBench, spurious: int) -> dict[str, int]:
    """Every interrupt was served, and so many at most found nobody asserting. Returns the sums of the counts."""
    stats = host.command("stats")
    sums: dict[str, int] = {}
    for record in stats.records:
        for name in set(record.fields) - {"addr", "id", "model", "gsi", "irq"}:
            sums[name] = sums.get(name, 0) + record.number(name)
    expected = {"lost": 0, "redone": 0, "orphaned": 0, "stuck": 0, "spurious7": 0, "spurious15": 0}
    assert {name: sums[name] for name in expected} == expected, stats
    assert sums["raised"] == sums["served"] > 0
    assert sums["held"] == sums["reasserts"] > 0
    assert sums["spurious"] <= spurious, stats
    return sums


def tsc_hertz() -> int:
    with Kvm() as kvm:
        vm = kvm.create_vm()
        khz = vm.create_vcpu().tsc_khz()
        vm.close()
    assert khz is not None
    return khz * 1000
