# SPDX-License-Identifier: GPL-2.0-or-later
"""What remoted is to reach, as ratios to QEMU's remote process in the same run, and whether it did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tests.bench.candidates import ADAPTIVE, FLOOR, OFF, PEER
from tests.bench.exchanges import EXCHANGES, OWN_CORE

__all__ = ["Verdict", "exchange_verdicts", "ratio_verdict"]

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
        return f"{mark}  {self.what:58} {self.measured:8.2f}{self.unit} <= {self.bound:g}{self.unit}"


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
