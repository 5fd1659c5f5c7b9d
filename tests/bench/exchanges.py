# SPDX-License-Identifier: GPL-2.0-or-later
"""Exchanges over one link, measured by the C client in batches, the candidates in turns."""

from __future__ import annotations

import os
import statistics
import subprocess
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.candidates import BINARIES, IO_BASE, Candidate, Remote

__all__ = [
    "EXCHANGES",
    "OWN_CORE",
    "WRITE_BURST",
    "Plan",
    "Series",
    "run_exchanges",
    "running_in_turns",
    "setups",
]

OWN_CORE = "own core each"
EXCHANGES = {
    "config-read": "config read",
    "bar-read": "BAR read",
    "bar-write": "BAR write",
    "raise": "raise -> irqfd",
    "resample-echo": "resample echo",
}
"""the client's name of each, and the table's"""
WRITE_BURST = "write-burst"
"""64 writes, posted where the transport can, and a read; the time of each"""

_BUCKETS = 4
"""of the histogram, per microsecond"""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    count: int
    """exchanges of each kind per candidate and round"""
    warmup: int


@dataclass
class Series:
    """What one candidate took for one exchange in one set-up; nanoseconds, one entry a round."""

    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    p999: list[float] = field(default_factory=list)
    minimum: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """CPU time of the remote process per exchange, warm-up included"""
    histogram: dict[int, int] = field(default_factory=dict)
    """how many exchanges took so many quarters of a microsecond, all rounds together"""

    def add(self, times: array[int], cpu: float) -> None:
        """Adds a round."""
        ordered = sorted(times)
        count = len(ordered)
        self.p50.append(ordered[count // 2])
        self.p99.append(ordered[count * 99 // 100])
        self.p999.append(ordered[count * 999 // 1000])
        self.minimum.append(ordered[0])
        self.cpu.append(cpu)
        for time in ordered:
            bucket = time * _BUCKETS // 1000
            self.histogram[bucket] = self.histogram.get(bucket, 0) + 1

    def summary(self) -> dict[str, float]:
        """Medians over the rounds, in microseconds."""
        values = {
            "p50": self.p50,
            "p99": self.p99,
            "p99.9": self.p999,
            "min": self.minimum,
            "cpu": self.cpu,
        }
        return {name: statistics.median(rounds) / 1000 for name, rounds in values.items()}

    def mean(self) -> float:
        """Microseconds, of all rounds together."""
        total = sum(bucket * count for bucket, count in self.histogram.items())
        return total / sum(self.histogram.values()) / _BUCKETS

    def distribution(self) -> list[tuple[float, float]]:
        """Microseconds, and the fraction of the exchanges that took no longer."""
        total = sum(self.histogram.values())
        points = []
        seen = 0
        for bucket in sorted(self.histogram):
            seen += self.histogram[bucket]
            points.append(((bucket + 1) / _BUCKETS, seen / total))
        return points


def setups() -> dict[str, tuple[int, int]]:
    """The CPUs of client and remote by the name of the set-up; -1 for any."""
    cpus = sorted(os.sched_getaffinity(0))
    pinned = {OWN_CORE: (cpus[0], cpus[1])} if len(cpus) > 1 else {}
    return {**pinned, "free": (-1, -1)}


def run_exchanges(
    candidates: Sequence[Candidate],
    plan: Plan,
    cpus: tuple[int, int],
    directory: Path,
    exchanges: Sequence[str] = tuple(EXCHANGES),
) -> dict[str, dict[str, Series]]:
    """By exchange and candidate. All processes live at the same time; only one of them is busy."""
    figures = {exchange: {each.name: Series() for each in candidates} for exchange in exchanges}
    with _running(candidates, cpus[1], directory) as remotes:
        for exchange, remote in _turns(remotes, plan.rounds, exchanges):
            before = remote.cpu_seconds()
            times = exchange_times(remote, exchange, plan.warmup, plan.count, cpus[0])
            cpu = (remote.cpu_seconds() - before) * 1e9 / (plan.warmup + plan.count)
            figures[exchange][remote.candidate.name].add(times, cpu)
    return figures


def running_in_turns(
    candidates: Sequence[Candidate], rounds: int, cpus: tuple[int, int], directory: Path
) -> Iterator[Remote]:
    """Each candidate's process in each round; all of them live until the end."""
    with _running(candidates, cpus[1], directory) as remotes:
        for _, remote in _turns(remotes, rounds, ("",)):
            yield remote


def exchange_times(remote: Remote, exchange: str, warmup: int, count: int, cpu: int) -> array[int]:
    """Nanoseconds of ``count`` exchanges."""
    fds = (remote.link.fileno(), remote.irqfd, remote.resamplefd)
    arguments = (remote.candidate.transport, exchange, warmup, count, cpu, *fds, IO_BASE)
    output = subprocess.run(
        [str(BINARIES / "client"), *map(str, arguments)], pass_fds=fds, stdout=subprocess.PIPE, check=True
    ).stdout
    times = array("I")
    times.frombytes(output)
    return times


@contextmanager
def _running(candidates: Sequence[Candidate], cpu: int, directory: Path) -> Iterator[list[Remote]]:
    """A process of each candidate, on one CPU, or on any for -1."""
    with ExitStack() as stack:
        remotes = []
        for number, candidate in enumerate(candidates):
            own = directory / str(number)
            own.mkdir(exist_ok=True)
            remote = stack.enter_context(Remote(candidate, own))
            if cpu >= 0:
                remote.pin({cpu})
            remotes.append(remote)
        yield remotes


def _turns(remotes: Sequence[Remote], rounds: int, exchanges: Sequence[str]) -> Iterator[tuple[str, Remote]]:
    """Every exchange with every remote in each round; another remote begins each time."""
    for number in range(rounds):
        for exchange in exchanges:
            first = number % len(remotes)
            for remote in (*remotes[first:], *remotes[:first]):
                yield exchange, remote
