# SPDX-License-Identifier: GPL-2.0-or-later
"""What remoted is to reach, as ratios to QEMU's remote process in the same run, and whether it did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tests.bench.candidates import ADAPTIVE, FLOOR, FLOORS, OFF, PEER
from tests.bench.exchanges import EXCHANGES, OWN_CORE

__all__ = [
    "Verdict",
    "busy_verdicts",
    "exchange_verdicts",
    "footprint_verdicts",
    "functions_verdicts",
    "guest_verdicts",
    "many_verdicts",
    "ratio_verdict",
]

Summaries = Mapping[str, Mapping[str, Mapping[str, float]]]
"""figures by exchange and candidate"""

_P50 = {
    "config-read": (0.45, 1.0),
    "bar-read": (0.45, 1.0),
    "bar-write": (0.45, 1.0),
    "raise": (0.50, 1.0),
    "resample-echo": (0.30, 1.0),
}
"""of PEER, with each end on its own core: with adaptive polling, and without"""
_P99 = (0.8, 1.2)
_FLOOR = 2.0
_GUEST = {"port read": (0.80, 1.1), "interrupt round trip": (0.60, 1.1)}
"""of PEER: with adaptive polling, and without"""
_BUSY = 1.1
"""of remoted without polling"""
_PRIVATE = 0.33
_FIRST_ANSWER = 0.9
_FIRST_ANSWER_OF_256 = 150.0
"""milliseconds"""
_BESIDE_OTHERS = 1.1
"""of a single process, or function"""
_FREE = (1.0, 1.2)
"""with both ends left to the scheduler"""


class Verdict(NamedTuple):
    """One target and what was measured."""

    what: str
    measured: float
    bound: float
    unit: str = ""
    where: str = ""
    """what was measured of where it goes, for the report of a miss"""

    @property
    def is_hit(self) -> bool:
        return self.measured <= self.bound

    def describe(self) -> str:
        """Its line of the table; of a miss with a second line, that tells where it goes."""
        mark = "hit " if self.is_hit else "MISS"
        line = f"{mark}  {self.what:66} {self.measured:8.2f}{self.unit} <= {self.bound:g}{self.unit}"
        return line if self.is_hit or not self.where else f"{line}\n        {self.where}"


def ratio_verdict(what: str, value: float, reference: float, bound: float, where: str = "") -> Verdict:
    """A target for ``value / reference``."""
    return Verdict(what, value / reference, bound, where=where)


def exchange_verdicts(setup: str, summaries: Summaries) -> Iterator[Verdict]:
    """The targets of one set-up."""
    for exchange, by_candidate in summaries.items():
        if PEER not in by_candidate:
            continue
        name = f"{setup}: {EXCHANGES[exchange]}"
        peer = by_candidate[PEER]
        for number, candidate in enumerate((ADAPTIVE, OFF)):
            own = by_candidate[candidate]
            floors = {floor: by_candidate[floor] for floor in FLOORS[1 - number :: 2]}
            where = _where({PEER: peer, candidate: own, **floors})
            bound = _P50[exchange][number] if setup == OWN_CORE else _FREE[number]
            yield ratio_verdict(f"{name}, p50, {candidate}", own["p50"], peer["p50"], bound, where)
            if setup == OWN_CORE:
                tails = _where({PEER: peer, candidate: own, **floors}, "p99")
                yield ratio_verdict(f"{name}, p99, {candidate}", own["p99"], peer["p99"], _P99[number], tails)
        if setup == OWN_CORE:
            own, polling = by_candidate[ADAPTIVE], by_candidate[FLOOR]
            where = _where({FLOOR: polling, ADAPTIVE: own})
            yield ratio_verdict(
                f"{name}, p50, {ADAPTIVE} to floor", own["p50"], polling["p50"], _FLOOR, where
            )


def _where(summaries: Mapping[str, Mapping[str, float]], figure: str = "p50") -> str:
    """The CPU time that each remote uses for an exchange: the rest are wake-ups, the client and the kernel."""
    return "; ".join(
        f"{name} {values[figure]:.1f} us, the remote's CPU time {values['cpu']:.1f}, best {values['min']:.1f}"
        for name, values in summaries.items()
    )


Rows = Mapping[str, Mapping[str, float]]


def busy_verdicts(situation: str, means: Rows) -> Iterator[Verdict]:
    """Polling doesn't hurt: the mean of all exchanges, as one exchange's is a matter of luck."""
    adaptive, off = (sum(row[name] for row in means.values()) for name in (ADAPTIVE, OFF))
    where = f"sums of the means: {adaptive:.1f} us to {off:.1f}"
    yield ratio_verdict(f"{situation}: mean, {ADAPTIVE} to {OFF}", adaptive, off, _BUSY, where)


def footprint_verdicts(
    starts: Mapping[str, float], parts: Mapping[str, float], memory: Rows, silent: Rows
) -> Iterator[Verdict]:
    """Start and memory beside the peer's, and no wake-up in silence; ``parts`` are those of the start."""
    if PEER in starts:
        spent = ", ".join(f"{name} {value:.1f}" for name, value in parts.items())
        where = f"{starts[ADAPTIVE]:.1f} ms to {starts[PEER]:.1f}; ms of CPU time: {spent}"
        yield ratio_verdict("first answer", starts[ADAPTIVE], starts[PEER], _FIRST_ANSWER, where)
        own, peer = memory[ADAPTIVE], memory[PEER]
        where = _memory_where(own, peer)
        yield ratio_verdict("private memory, alone", own["private"], peer["private"], _PRIVATE, where)
    yield Verdict("wake-ups in 3 s of silence", silent[ADAPTIVE]["wake-ups"], 0)


def _memory_where(own: Mapping[str, float], peer: Mapping[str, float]) -> str:
    sizes = " to ".join(f"{each['private']:.1f} MiB ({each['dirty']:.1f} dirty)" for each in (own, peer))
    return f"{sizes}: pages of files that another process has mapped as well aren't private"


def many_verdicts(found: Mapping[str, Mapping[int, Mapping[str, float]]]) -> Iterator[Verdict]:
    """The busy one of many is as fast as alone."""
    own = found[ADAPTIVE]
    least, most = min(own), max(own)
    times = own[most]["bar read"], own[least]["bar read"]
    where = "{:.1f} us to {:.1f}".format(*times)
    yield ratio_verdict(f"BAR read, 1 busy of {most} processes, to alone", *times, _BESIDE_OTHERS, where)
    if PEER in found:
        one, peer = own[most], found[PEER][least]
        where = _memory_where(one, peer)
        what = f"private memory, 1 of {most}, to {PEER}'s alone"
        yield ratio_verdict(what, one["private"], peer["private"], _PRIVATE, where)


def functions_verdicts(found: Mapping[int, Mapping[str, float]]) -> Iterator[Verdict]:
    """Idle functions cost nothing, and busy ones the same each."""
    least, most = min(found), max(found)
    few = sorted(found)[1]
    one = found[most]["one busy"], found[least]["one busy"]
    where = "{:.1f} us to {:.1f}".format(*one)
    yield ratio_verdict(f"config read, 1 busy of {most} functions, to alone", *one, _BESIDE_OTHERS, where)
    busy = found[most]["all busy"], found[few]["all busy"]
    where = "{:.1f} us to {:.1f}".format(*busy)
    yield ratio_verdict(f"CPU time of a request, {most} busy functions to {few}", *busy, 1.25, where)
    yield Verdict(f"first answer, {most} functions", found[most]["first answer"], _FIRST_ANSWER_OF_256, " ms")


def guest_verdicts(found: Rows) -> Iterator[Verdict]:
    """A real guest, beside the same with the peer."""
    for kind, by_name in found.items():
        for bound, candidate in zip(_GUEST[kind], (ADAPTIVE, OFF), strict=True):
            where = ", ".join(f"{name} {cycles:.0f}" for name, cycles in by_name.items()) + " cycles"
            what = f"guest: {kind}, mean, {candidate}"
            yield ratio_verdict(what, by_name[candidate], by_name[PEER], bound, where)
