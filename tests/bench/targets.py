# SPDX-License-Identifier: GPL-2.0-or-later
"""What remoted is to reach, as ratios to QEMU's remote process in the same run, and whether it did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tests.bench.candidates import ADAPTIVE, FLOOR, OFF, PEER
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

    @property
    def is_hit(self) -> bool:
        return self.measured <= self.bound

    def describe(self) -> str:
        """One line of the table."""
        mark = "hit " if self.is_hit else "MISS"
        return f"{mark}  {self.what:66} {self.measured:8.2f}{self.unit} <= {self.bound:g}{self.unit}"


def ratio_verdict(what: str, value: float, reference: float, bound: float) -> Verdict:
    """A target for ``value / reference``."""
    return Verdict(what, value / reference, bound)


def exchange_verdicts(setup: str, summaries: Summaries) -> Iterator[Verdict]:
    """The targets of one set-up."""
    for exchange, by_candidate in summaries.items():
        if PEER not in by_candidate:
            continue
        name = f"{setup}: {EXCHANGES[exchange]}"
        peer = by_candidate[PEER]
        for number, candidate in enumerate((ADAPTIVE, OFF)):
            own = by_candidate[candidate]
            bound = _P50[exchange][number] if setup == OWN_CORE else _FREE[number]
            yield ratio_verdict(f"{name}, p50, {candidate}", own["p50"], peer["p50"], bound)
            if setup == OWN_CORE:
                yield ratio_verdict(f"{name}, p99, {candidate}", own["p99"], peer["p99"], _P99[number])
        if setup == OWN_CORE:
            floor = by_candidate[FLOOR]
            yield ratio_verdict(
                f"{name}, p50, {ADAPTIVE} to floor", by_candidate[ADAPTIVE]["p50"], floor["p50"], _FLOOR
            )


Rows = Mapping[str, Mapping[str, float]]


def busy_verdicts(situation: str, means: Rows) -> Iterator[Verdict]:
    """Polling doesn't hurt: the mean of all exchanges, as one exchange's is a matter of luck."""
    adaptive, off = (sum(row[name] for row in means.values()) for name in (ADAPTIVE, OFF))
    yield ratio_verdict(f"{situation}: mean, {ADAPTIVE} to {OFF}", adaptive, off, _BUSY)


def footprint_verdicts(starts: Mapping[str, float], memory: Rows, silent: Rows) -> Iterator[Verdict]:
    """Start and memory beside the peer's, and no wake-up in silence."""
    if PEER in starts:
        yield ratio_verdict("first answer", starts[ADAPTIVE], starts[PEER], _FIRST_ANSWER)
        private = memory[ADAPTIVE]["private"], memory[PEER]["private"]
        yield ratio_verdict("private memory, alone", *private, _PRIVATE)
    yield Verdict("wake-ups in 3 s of silence", silent[ADAPTIVE]["wake-ups"], 0)


def many_verdicts(found: Mapping[str, Mapping[int, Mapping[str, float]]]) -> Iterator[Verdict]:
    """The busy one of many is as fast as alone."""
    own = found[ADAPTIVE]
    least, most = min(own), max(own)
    yield ratio_verdict(
        f"BAR read, 1 busy of {most} processes, to alone",
        own[most]["bar read"],
        own[least]["bar read"],
        _BESIDE_OTHERS,
    )
    if PEER in found:
        private = own[most]["private"], found[PEER][most]["private"]
        yield ratio_verdict(f"private memory, 1 of {most}", *private, _PRIVATE)


def functions_verdicts(found: Mapping[int, Mapping[str, float]]) -> Iterator[Verdict]:
    """Idle functions cost nothing, and busy ones the same each."""
    least, most = min(found), max(found)
    few = sorted(found)[1]
    one = found[most]["one busy"], found[least]["one busy"]
    yield ratio_verdict(f"config read, 1 busy of {most} functions, to alone", *one, _BESIDE_OTHERS)
    busy = found[most]["all busy"], found[few]["all busy"]
    yield ratio_verdict(f"CPU time of a request, {most} busy functions to {few}", *busy, 1.25)
    yield Verdict(f"first answer, {most} functions", found[most]["first answer"], _FIRST_ANSWER_OF_256, " ms")


def guest_verdicts(cycles: Rows) -> Iterator[Verdict]:
    """A real guest, beside the same with the peer."""
    for kind, by_name in cycles.items():
        for bound, candidate in zip(_GUEST[kind], (ADAPTIVE, OFF), strict=True):
            yield ratio_verdict(f"guest: {kind}, mean, {candidate}", by_name[candidate], by_name[PEER], bound)
