# SPDX-License-Identifier: GPL-2.0-or-later
"""The benchmark measures what it says: every exchange with every candidate, and the table of targets."""

from __future__ import annotations

import shutil
import subprocess
from array import array
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from common.config import Transport
from tests.bench.candidates import (
    ADAPTIVE,
    BINARIES,
    CANDIDATES,
    FLOORS,
    LOOPS,
    OFF,
    PEER,
    TRANSPORTS,
)
from tests.bench.exchanges import EXCHANGES, OWN_CORE, WRITE_BURST, Plan, Series, run_exchanges
from tests.bench.phases import PHASES, TRACED, Call, can_trace, measure_phases, phases_of
from tests.bench.picture import draw
from tests.bench.targets import exchange_verdicts
from tests.support.checkout import ROOT

COUNT = 20


@pytest.fixture(scope="module", autouse=True)
def programs() -> None:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    names = [str((BINARIES / name).relative_to(ROOT)) for name in ("client", "floor")]
    subprocess.run(["make", "--silent", *names], cwd=ROOT, check=True)


def test_every_candidate_does_every_exchange(tmp_path: Path) -> None:
    for _ in range(2):  # one set-up after the other
        figures = run_exchanges([*CANDIDATES, *LOOPS], Plan(1, COUNT, 1), (-1, -1), tmp_path)
    names = {candidate.name for candidate in (*CANDIDATES, *LOOPS)}
    assert {OFF, ADAPTIVE, *FLOORS, "remoted fixed"} <= names
    assert set(figures) == set(EXCHANGES)
    for by_name in figures.values():
        assert set(by_name) == names
        for series in by_name.values():
            assert sum(series.histogram.values()) == COUNT
            summary = series.summary()
            assert 0 < summary["min"] <= summary["p50"] <= summary["p99"] <= summary["p99.9"]
            assert summary["cpu"] > 0


def test_each_transport_does_every_exchange(tmp_path: Path) -> None:
    exchanges = (*EXCHANGES, WRITE_BURST)
    figures = run_exchanges(TRANSPORTS, Plan(2, COUNT, 1), (-1, -1), tmp_path, exchanges)
    assert tuple(figures) == exchanges
    for by_name in figures.values():
        assert set(by_name) == {str(transport) for transport in Transport}
        assert all(sum(series.histogram.values()) == 2 * COUNT for series in by_name.values())


def test_an_exchange_is_divided_by_the_system_calls_of_both_ends() -> None:
    """As x-remote does it: it notifies itself by an eventfd, and signals the irqfd before it replies."""
    sendto, recvfrom, read, write, sendmsg, ppoll = 44, 45, 0, 1, 46, 271
    irqfd, other, link = 17, 5, 9
    calls = [
        Call(False, 1.0, False, ppoll, 1),  # begins before the trace does
        Call(True, 2.0, False, recvfrom, 24),
        Call(True, 10.0, True, sendto, link),
        Call(True, 11.0, False, sendto, 40),
        Call(True, 12.0, True, read, 6),
        Call(False, 15.0, False, ppoll, 0),  # a look that finds nothing
        Call(False, 20.0, False, ppoll, 1),
        Call(False, 21.0, True, write, other),
        Call(False, 25.0, True, write, irqfd),
        Call(False, 26.0, False, write, 8),
        Call(False, 27.0, True, sendmsg, link),
        Call(True, 40.0, False, read, 8),
        Call(True, 41.0, False, recvfrom, 24),
        Call(True, 50.0, True, sendto, link),  # ends after the trace does
        Call(False, 60.0, False, ppoll, 1),
    ]
    assert list(phases_of(calls, True, irqfd)) == [(10.0, 5.0, 15.0)]
    assert list(phases_of(calls, False, irqfd)) == [(10.0, 7.0, 14.0)]


@pytest.mark.skipif(not can_trace(), reason="needs root, tracefs and x86-64")
@pytest.mark.parametrize("exchange", TRACED)
def test_the_phases_of_real_exchanges(tmp_path: Path, exchange: str) -> None:
    candidates = [each for each in CANDIDATES if each.name in (PEER, OFF, *FLOORS)]
    found = measure_phases(candidates, exchange, Plan(1, COUNT, 1), (0, 0), tmp_path)
    assert list(found) == [candidate.name for candidate in candidates]
    for means in found.values():
        assert all(means[phase] > 0 for phase in PHASES)
        assert sum(means[phase] for phase in PHASES) == pytest.approx(means["in all"])


def test_a_series_is_summed_up_in_microseconds() -> None:
    series = Series()
    series.add(array("I", [*[2000] * 50, *[4000] * 49, 9000]), 1500.0)
    series.add(array("I", [3000] * 100), 2500.0)
    series.add(array("I", [5000] * 100), 3500.0)
    assert series.summary() == {"p50": 4.0, "p99": 5.0, "p99.9": 5.0, "min": 3.0, "cpu": 2.5}
    assert series.mean() == pytest.approx((2 * 50 + 4 * 49 + 9 + 300 + 500) / 300)
    assert series.distribution()[-1][1] == 1


def test_a_target_is_a_ratio_to_the_peer_in_the_same_set_up() -> None:
    figures = {
        PEER: (40.0, 90.0),
        **dict(zip(FLOORS, [(39.0, 80.0), (9.0, 20.0), (40.5, 85.0), (12.0, 25.0)], strict=True)),
        OFF: (41.0, 90.0),
        ADAPTIVE: (18.0, 90.0),
    }
    summaries = {
        "bar-read": {
            name: {"p50": p50, "p99": p99, "cpu": p50 / 2, "min": p50 / 4}
            for name, (p50, p99) in figures.items()
        }
    }
    own = {verdict.what: verdict.is_hit for verdict in exchange_verdicts(OWN_CORE, summaries)}
    assert own == {
        f"{OWN_CORE}: BAR read, p50, {ADAPTIVE}": True,
        f"{OWN_CORE}: BAR read, p99, {ADAPTIVE}": False,
        f"{OWN_CORE}: BAR read, p50, {OFF}": False,
        f"{OWN_CORE}: BAR read, p99, {OFF}": True,
        f"{OWN_CORE}: BAR read, p50, {ADAPTIVE} to floor": True,
    }
    (missed,) = (
        each for each in exchange_verdicts(OWN_CORE, summaries) if "p50" in each.what and not each.is_hit
    )
    line, where = missed.describe().splitlines()
    assert line.startswith("MISS  ")
    assert f"{OFF} 41.0 us, the remote's CPU time 20.5, best 10.2" in where
    assert "floor 39.0 us" in where
    assert "floor.py 40.5 us" in where
    assert "polling" not in where
    free = {verdict.what: verdict.is_hit for verdict in exchange_verdicts("free", summaries)}
    assert free == {f"free: BAR read, p50, {ADAPTIVE}": True, f"free: BAR read, p50, {OFF}": True}


def test_the_picture_has_a_curve_for_each_candidate() -> None:
    curve = [(5.0, 0.5), (10.0, 1.0)]
    svg = ET.fromstring(draw("a < b", {"one": {"x": curve, "y": curve}, "two": {"x": curve}}))
    curves = svg.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert len(curves) == 3
    assert len({each.get("stroke") for each in curves}) == 2
