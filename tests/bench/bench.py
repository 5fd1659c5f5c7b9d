# SPDX-License-Identifier: GPL-2.0-or-later
"""``make bench``: remoted beside QEMU's C remote process and beside a floor of bare system calls, in one run.

The candidates take turns, so that a machine that is busy for a while is busy for all of them; ratios within one
run are what counts. README.md beside this file tells what is measured, and how.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.bench.candidates import BINARIES, CANDIDATES, PEER, Candidate
from tests.bench.exchanges import EXCHANGES, Plan, Series, run_exchanges, setups
from tests.bench.machine import OtherLoad, describe
from tests.bench.picture import Panels, draw
from tests.bench.stop import stops
from tests.bench.targets import Verdict, exchange_verdicts

Results = dict[str, Any]


class Run:
    """One run: what was asked for, and what has been found so far."""

    def __init__(self, arguments: argparse.Namespace, directory: Path) -> None:
        self.arguments = arguments
        self.directory = directory
        self.results: Results = {"machine": describe()}
        self.verdicts: list[Verdict] = []

    def exchanges(self) -> None:
        """The exchanges over a link, in each set-up."""
        plan = Plan(self.arguments.rounds, self.arguments.count, self.arguments.warmup)
        panels: Panels = {}
        for setup, cpus in setups().items():
            load = OtherLoad()
            figures = run_exchanges(CANDIDATES, plan, cpus, self.directory)
            summaries = {
                exchange: {name: series.summary() for name, series in by_name.items()}
                for exchange, by_name in figures.items()
            }
            self.results.setdefault("exchanges", {})[setup] = summaries
            self.results.setdefault("other load", {})[f"exchanges, {setup}"] = load.describe()
            self.verdicts += exchange_verdicts(setup, summaries)
            print(f"\n{setup}; microseconds, {plan.rounds} rounds of {plan.count}; {load.describe()}")
            print_exchanges(figures, CANDIDATES)
            if not panels:
                panels = {
                    f"{EXCHANGES[exchange]}, {setup}": {
                        name: series.distribution() for name, series in by_name.items()
                    }
                    for exchange, by_name in figures.items()
                }
        title = "Latency: iohub-remoted, QEMU x-remote, and the floor"
        (self.arguments.output / "bench.svg").write_text(draw(title, panels))

    def stops(self) -> None:
        """For how long ``--vm pid:PID`` makes a QEMU stand still."""
        if PEER not in [candidate.name for candidate in CANDIDATES] or not os.access("/dev/kvm", os.W_OK):
            print("\nstops: left out, they need QEMU and /dev/kvm")
            return
        still = {kind: spread(times) for kind, times in stops(self.arguments.stops).items()}
        self.results["stops"] = still
        print(f"\n{'a QEMU stands still at':24}{'p50':>9}{'p99':>9}{'max':>9}")
        for kind, values in still.items():
            print(f"{kind:24}" + "".join(f"{value:9.0f}" for value in values.values()) + " us")


PARTS: dict[str, Callable[[Run], None]] = {
    "exchanges": Run.exchanges,
    "stops": Run.stops,
}


def print_exchanges(figures: dict[str, dict[str, Series]], candidates: Sequence[Candidate]) -> None:
    """A table of medians over the rounds."""
    names = [candidate.name for candidate in candidates]
    print(f"{'':24}" + "".join(f"{name:>18}" for name in names))
    for exchange, by_name in figures.items():
        summaries = {name: by_name[name].summary() for name in names}
        for figure in next(iter(summaries.values())):
            label = EXCHANGES[exchange] if figure == "p50" else ""
            row = "".join(f"{summaries[name][figure]:18.1f}" for name in names)
            print(f"{label:16}{figure:8}{row}")


def spread(times: list[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum."""
    p99 = sorted(times)[len(times) * 99 // 100]
    return {"p50": statistics.median(times), "p99": p99, "max": max(times)}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make bench", usage='make bench ARGS="..."', description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each candidate (default: %(default)s)")
    parser.add_argument("--count", type=int, default=20_000, help="exchanges a turn (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=500, help="not counted (default: %(default)s)")
    parser.add_argument("--stops", type=int, default=500, help="of a QEMU, each kind (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=BINARIES, help="directory of bench.json and bench.svg"
    )
    arguments = parser.parse_args()
    for part in arguments.parts:
        if part not in PARTS:
            parser.error(f"{part}: the parts are {', '.join(PARTS)}")
    arguments.output.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory(prefix="iohub-bench-") as directory:
        run = Run(arguments, Path(directory))
        print("\n".join(f"{name}: {value}" for name, value in run.results["machine"].items()))
        for part in arguments.parts or PARTS:
            PARTS[part](run)
    run.results["targets"] = [
        {"target": each.what, "measured": each.measured, "bound": each.bound, "hit": each.is_hit}
        for each in run.verdicts
    ]
    (arguments.output / "bench.json").write_text(json.dumps(run.results, indent=1) + "\n")
    if run.verdicts:
        print("\nTargets: ratios to x-remote in this run, unless there is a unit")
        print("\n".join(verdict.describe() for verdict in run.verdicts))
        hits = sum(verdict.is_hit for verdict in run.verdicts)
        print(f"{hits} of {len(run.verdicts)} hit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
