# SPDX-License-Identifier: GPL-2.0-or-later
"""SIGKILL of the daemons at random moments, while a guest in a stock QEMU raises and serves interrupts.

``IOHUB_KILLS=200`` in the environment makes it so many kills of each kind; the report is printed with ``-s``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random
from statistics import quantiles

import pytest

from proxyd.kvm.kvm import Kvm
from tests.support.hostbench import PROXYD, QEMU_UNIT, REMOTED, HostBench
from tests.support.wait import wait_until

KILLS = int(os.environ.get("IOHUB_KILLS", "10"))
ROUNDS = 100
LONGEST_LIFE = 0.5
"""seconds, from the start of a process"""
LONGEST_SERVICE = 0.1
"""seconds, once the functions are served"""
BLACKOUT = 0.02
"""seconds from the access that raises a line to its handler, which nothing but a kill takes"""


class Hammer(threading.Thread):
    """Lets the guest raise and serve interrupts until it is stopped."""

    def __init__(self, host: HostBench) -> None:
        super().__init__(daemon=True)
        self.rounds = 0
        self.samples: list[int] = []
        """TSC cycles from each access that raised a line to the handler"""
        self.error: BaseException | None = None
        self._host = host
        self._is_over = threading.Event()

    def run(self) -> None:
        try:
            while not self._is_over.is_set():
                self._host.command(f"run {ROUNDS} held 4")
                self.rounds += ROUNDS
                for addr in ("05.0", "06.0"):
                    for record in self._host.command(f"samples {addr}").of_kind("raise_to_handler"):
                        self.samples += record.cycles()
        except BaseException as error:  # noqa: BLE001  it is raised by stop()
            self.error = error

    def stop(self) -> None:
        """Waits for the end of the present run. Raises what has failed in it."""
        self._is_over.set()
        self.join()
        if self.error is not None:
            raise self.error


@contextmanager
def hammering(host: HostBench) -> Iterator[Hammer]:
    hammer = Hammer(host)
    hammer.start()
    yield hammer
    hammer.stop()


def kill_at_random(host: HostBench, units: Sequence[str], kills: int, random: Random) -> None:
    """Kills all of the units at once, again and again, each time at another moment of their lives.

    Every other time they have got as far as to serve the guest, which waits for an interrupt for a few seconds.
    """
    victims = dict.fromkeys(units, 0)
    for number in range(kills):
        victims = {unit: host.wait_for_process(unit, pid) for unit, pid in victims.items()}
        if number % 2:
            wait_until(lambda: host.linked() == {"edu0", "com1"}, "all functions are served")
        threading.Event().wait(random.uniform(0, LONGEST_SERVICE if number % 2 else LONGEST_LIFE))
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


@pytest.mark.parametrize(
    ("units", "kills"),
    [((REMOTED,), KILLS), ((PROXYD,), KILLS // 4 or 1), ((REMOTED, PROXYD), KILLS // 10 or 1)],
    ids=["remoted", "proxyd", "both"],
)
def test_kills_while_the_guest_runs(host: HostBench, units: tuple[str, ...], kills: int) -> None:
    host.command("setup")
    said = host.journal("-u", QEMU_UNIT)
    qemu = host.wait_for_process(QEMU_UNIT)
    with hammering(host) as hammer:
        kill_at_random(host, units, kills, Random(kills))
    sums = check_counts(host, spurious=kills)
    assert host.wait_for_process(QEMU_UNIT) == qemu
    assert host.journal("-u", QEMU_UNIT) == said
    hertz = tsc_hertz()
    blackouts = sorted(cycles / hertz for cycles in hammer.samples if cycles > BLACKOUT * hertz)
    print(
        f"\n{kills} kills of {' and '.join(units)}, {sums['served']} interrupts, {sums['spurious']} spurious"
    )
    if len(blackouts) > 1:
        cuts = quantiles(blackouts, n=100, method="inclusive")
        print(f"blackouts in {len(blackouts)} accesses that raise a line: p50 {cuts[49]:.3f} s,")
        print(f"p99 {cuts[98]:.3f} s, max {blackouts[-1]:.3f} s")
