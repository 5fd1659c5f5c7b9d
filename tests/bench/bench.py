# SPDX-License-Identifier: GPL-2.0-or-later
"""``make bench``: remoted beside QEMU's C remote process and beside a floor of bare system calls, in one run.

The candidates take turns, so that a machine that is busy for a while is busy for all of them; ratios within one
run are what counts. README.md beside this file tells what is measured, and how.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.errors import IohubError
from tests.bench.busy import run_busy
from tests.bench.candidates import (
    ADAPTIVE,
    BINARIES,
    CANDIDATES,
    FLOORS,
    INTERPRETER,
    KEPT,
    LOOPS,
    OFF,
    PEER,
    QEMU,
    TRANSPORTS,
    Candidate,
)
from tests.bench.disks import is_measurable, measure_disks
from tests.bench.exchanges import EXCHANGES, OWN_CORE, WRITE_BURST, Plan, Series, run_exchanges, setups
from tests.bench.footprint import beside_others, first_answers, idle, memory_alone, start_parts
from tests.bench.functions import measure_functions
from tests.bench.guest import run_guests
from tests.bench.machine import OtherLoad, describe
from tests.bench.phases import TRACED, can_trace, measure_phases
from tests.bench.picture import Panels, draw
from tests.bench.proxies import measure_client, raise_to_handler
from tests.bench.stop import stops
from tests.bench.targets import (
    Verdict,
    busy_verdicts,
    exchange_verdicts,
    footprint_verdicts,
    functions_verdicts,
    guest_verdicts,
    many_verdicts,
)
from tests.support.checkout import ROOT
from tests.support.qemu import newer_qemu

Results = dict[str, Any]


class Run:
    """One run: what was asked for, and what has been found so far."""

    def __init__(self, arguments: argparse.Namespace, directory: Path) -> None:
        self.arguments = arguments
        self.directory = directory
        self.results: Results = {"machine": describe()}
        self.verdicts: list[Verdict] = []
        self.plan = Plan(arguments.rounds, arguments.count, arguments.warmup)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measures what else the machine does meanwhile."""
        load = OtherLoad()
        yield
        self.results.setdefault("other load", {})[name] = load.describe()
        print(f"({load.describe()})")

    def table(self, name: str, rows: Mapping[Any, Mapping[str, float]]) -> None:
        """Keeps figures by row and column, and prints them."""
        self.results[name] = rows
        columns = list(next(iter(rows.values())))
        print(f"\n{name:32}" + "".join(f"{column:>18}" for column in columns))
        for label, values in rows.items():
            print(f"{label!s:32}" + "".join(f"{values[column]:18.2f}" for column in columns))

    def exchanges(self) -> None:
        """The exchanges over a link, in each set-up."""
        panels: Panels = {}
        for setup, cpus in setups().items():
            with self.part(f"exchanges, {setup}"):
                figures = run_exchanges(CANDIDATES, self.plan, cpus, self.directory)
            summaries = {
                exchange: {name: series.summary() for name, series in by_name.items()}
                for exchange, by_name in figures.items()
            }
            self.results.setdefault("exchanges", {})[setup] = summaries
            self.verdicts += exchange_verdicts(setup, summaries)
            print(f"\n{setup}; microseconds, {self.plan.rounds} rounds of {self.plan.count}")
            print_exchanges(figures, CANDIDATES)
            extra = {
                EXCHANGES[exchange]: {"kept link": by_name[KEPT]["p50"] - by_name[ADAPTIVE]["p50"]}
                for exchange, by_name in summaries.items()
            }
            self.table(f"us more of a kept link, {setup}", extra)
            if not panels:
                panels = {
                    f"{EXCHANGES[exchange]}, {setup}": {
                        name: series.distribution() for name, series in by_name.items()
                    }
                    for exchange, by_name in figures.items()
                }
        title = "Latency: iohub-remoted, QEMU x-remote, and the floor"
        (self.arguments.output / "bench.svg").write_text(draw(title, panels))

    def phases(self) -> None:
        """Where the time of an exchange goes."""
        cpus = setups().get(OWN_CORE)
        if cpus is None or not can_trace():
            print("\nphases: left out, needs root, tracefs, x86-64 and two CPUs")
            return
        candidates = chosen(PEER, *FLOORS, OFF, ADAPTIVE)
        for exchange in TRACED:
            with self.part(f"phases, {exchange}"):
                found = measure_phases(candidates, exchange, self.plan, cpus, self.directory)
            self.table(f"mean us, {EXCHANGES[exchange]}", found)

    def busy(self) -> None:
        """Polling where it can't help."""
        plan = replace(self.plan, count=self.plan.count // 10)
        with self.part("busy"):
            found = run_busy(chosen(OFF, ADAPTIVE), plan, self.directory)
        for situation, figures in found.items():
            means = {
                EXCHANGES[exchange]: {name: series.mean() for name, series in by_name.items()}
                for exchange, by_name in figures.items()
            }
            self.table(f"mean us, {situation}", means)
            self.verdicts += busy_verdicts(situation, means)

    def footprint(self) -> None:
        """Start, memory, and idle processes."""
        candidates = chosen(PEER, "floor", "floor.py", OFF, ADAPTIVE)
        (adaptive,) = chosen(ADAPTIVE)
        with self.part("footprint"):
            starts = first_answers(candidates, self.plan.rounds, self.directory)
            parts = start_parts(adaptive, self.plan.rounds, self.directory)
            memory = memory_alone(candidates, self.directory)
            silent = idle(candidates, self.directory)
        self.table("first answer, ms", {"1 function": starts})
        self.table("of it, ms of CPU time", {ADAPTIVE: parts})
        self.table("memory, MiB", memory)
        self.table("3 s of silence; CPU in ms", silent)
        self.verdicts += footprint_verdicts(starts, parts, memory, silent)

    def many(self) -> None:
        """Many processes side by side, all idle but one."""
        found = {}
        for candidate in chosen(ADAPTIVE, PEER):
            with (
                tempfile.TemporaryDirectory(dir=self.directory) as directory,
                self.part(f"many {candidate.name}"),
            ):
                found[candidate.name] = beside_others(
                    candidate, self.arguments.processes, self.plan.rounds, Path(directory)
                )
        for name, by_count in found.items():
            self.table(f"processes of {name}", by_count)
        self.verdicts += many_verdicts(found)

    def functions(self) -> None:
        """Many functions in one remoted."""
        with self.part("functions"):
            found = measure_functions((1, 16, 64, 256), self.plan.rounds, self.directory)
        self.table("functions in one remoted", found)
        self.verdicts += functions_verdicts(found)

    def guest(self) -> None:
        """A real guest in stock QEMU."""
        if not has_kvm_and_qemu("guest"):
            return
        with self.part("guest"):
            found = run_guests(chosen(PEER, *FLOORS, OFF, ADAPTIVE), self.plan.rounds, 40, self.directory)
        self.table("guest in QEMU, mean cycles", found)
        self.verdicts += guest_verdicts(found)

    def proxies(self) -> None:
        """proxyd's side."""
        (adaptive,) = chosen(ADAPTIVE)
        with self.part("proxies"):
            client = measure_client(adaptive, self.plan.rounds, self.plan.count // 4, self.directory)
            self.table("config read, us", {ADAPTIVE: client})
            if has_kvm_and_qemu("proxies"):
                cycles = raise_to_handler(self.plan.rounds, self.directory)
                self.table("raise to handler, cycles", {ADAPTIVE: cycles})

    def loops(self) -> None:
        """The same session code on other event loops."""
        for setup, cpus in setups().items():
            with self.part(f"loops, {setup}"):
                figures = run_exchanges([*chosen(OFF), *LOOPS], self.plan, cpus, self.directory)
            print(f"\n{setup}; microseconds")
            print_exchanges(figures, [*chosen(OFF), *LOOPS])
            self.results.setdefault("loops", {})[setup] = {
                exchange: {name: series.summary() for name, series in by_name.items()}
                for exchange, by_name in figures.items()
            }

    def transports(self) -> None:
        """vfio-user beside mpqemu: over a link, and with a guest in one and the same QEMU."""
        exchanges = {**EXCHANGES, WRITE_BURST: "write in a burst"}
        for setup, cpus in setups().items():
            with self.part(f"transports, {setup}"):
                figures = run_exchanges(TRANSPORTS, self.plan, cpus, self.directory, tuple(exchanges))
            rows = {
                exchanges[exchange]: {name: series.summary()["p50"] for name, series in by_name.items()}
                for exchange, by_name in figures.items()
            }
            self.table(f"us (p50), {setup}", rows)
        program = newer_qemu()
        if program is None or not has_kvm_and_qemu("transports"):
            print("\ntransports: the guest is left out, needs a QEMU that has vfio-user-pci: make qemu")
            return
        with self.part("transports, guest"):
            found = run_guests(TRANSPORTS, self.plan.rounds, 40, self.directory, program)
        self.table("guest in a newer QEMU, cycles", found)

    def nvme(self) -> None:
        """A disk in a Linux guest."""
        if not is_measurable():
            print("\nnvme: left out, needs a newer QEMU and a Linux guest: make qemu linux-guest")
            return
        with self.part("nvme"):
            found = measure_disks(self.plan.rounds, self.arguments.disk_seconds, self.directory)
        self.table("nvme in Linux, reads a second", found)

    def stops(self) -> None:
        """For how long ``--vm pid:PID`` makes a QEMU stand still."""
        if not has_kvm_and_qemu("stops"):
            return
        still = {kind: spread(times) for kind, times in stops(self.arguments.stops).items()}
        self.results["stops"] = still
        print(f"\n{'a QEMU stands still at':24}{'p50':>9}{'p99':>9}{'max':>9}")
        for kind, values in still.items():
            print(f"{kind:24}" + "".join(f"{value:9.0f}" for value in values.values()) + " us")


PARTS: dict[str, Callable[[Run], None]] = {
    "exchanges": Run.exchanges,
    "phases": Run.phases,
    "busy": Run.busy,
    "footprint": Run.footprint,
    "many": Run.many,
    "functions": Run.functions,
    "guest": Run.guest,
    "proxies": Run.proxies,
    "loops": Run.loops,
    "transports": Run.transports,
    "nvme": Run.nvme,
    "stops": Run.stops,
}


FAILURES = (
    OSError,
    EOFError,
    AssertionError,
    RuntimeError,
    IohubError,
    subprocess.SubprocessError,
    struct.error,
)
"""what a part may raise when a process that it measures ends or hangs; the other parts go on"""


def chosen(*names: str) -> list[Candidate]:
    """Those of CANDIDATES that are there."""
    return [candidate for name in names for candidate in CANDIDATES if candidate.name == name]


def has_kvm_and_qemu(part: str) -> bool:
    """Whether a part that needs both can be measured; says so if not."""
    there = bool(shutil.which(QEMU)) and os.access("/dev/kvm", os.R_OK | os.W_OK)
    if not there:
        print(f"\n{part}: left out, needs {QEMU} and /dev/kvm")
    return there


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
    parser.add_argument(
        "--rounds", type=int, default=5, help="turns of each candidate (default: %(default)s)"
    )
    parser.add_argument("--count", type=int, default=20_000, help="exchanges a turn (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=500, help="not counted (default: %(default)s)")
    parser.add_argument(
        "--disk-seconds", type=float, default=3.0, help="of each workload a round (default: %(default)s)"
    )
    parser.add_argument("--stops", type=int, default=500, help="of a QEMU, each kind (default: %(default)s)")
    parser.add_argument(
        "--processes",
        type=int,
        nargs="+",
        default=[1, 10, 50, 200],
        help="how many side by side (default: 1 10 50 200)",
    )
    parser.add_argument("--output", type=Path, default=BINARIES, help="directory of bench.json and bench.svg")
    arguments = parser.parse_args()
    for part in arguments.parts:
        if part not in PARTS:
            parser.error(f"{part}: the parts are {', '.join(PARTS)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    failed = False

    packages = ("common", "proxyd", "remoted", "qemu_iohub.py")
    # As an installation does; where Python may not write its caches, each start would compile everything.
    subprocess.run([INTERPRETER, "-m", "compileall", "-q", *packages], cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory(prefix="iohub-bench-") as directory:
        run = Run(arguments, Path(directory))
        print("\n".join(f"{name}: {value}" for name, value in run.results["machine"].items()))
        for part in arguments.parts or PARTS:
            try:
                PARTS[part](run)
            except FAILURES as error:
                failed = True
                print(f"\n{part}: FAILED: {type(error).__name__}: {error}")
                run.results.setdefault("failed", {})[part] = str(error)
    run.results["targets"] = [
        {
            "target": each.what,
            "measured": each.measured,
            "bound": each.bound,
            "hit": each.is_hit,
            "where": each.where,
        }
        for each in run.verdicts
    ]
    (arguments.output / "bench.json").write_text(json.dumps(run.results, indent=1) + "\n")
    if run.verdicts:
        print("\nTargets: ratios to x-remote in this run, unless there is a unit")
        print("\n".join(verdict.describe() for verdict in run.verdicts))
        hits = sum(verdict.is_hit for verdict in run.verdicts)
        print(f"{hits} of {len(run.verdicts)} hit")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
