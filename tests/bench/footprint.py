# SPDX-License-Identifier: GPL-2.0-or-later
"""Time to the first answer, memory, and what an idle process does: alone, and beside many others."""

from __future__ import annotations

import os
import select
import statistics
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.bench.candidates import INTERPRETER, Candidate, Remote, cpu_seconds
from tests.bench.exchanges import exchange_times
from tests.support.checkout import ROOT

__all__ = ["beside_others", "first_answers", "idle", "memory_alone", "start_parts"]

_OWN_PACKAGES = ("common", "remoted", "qemu_iohub")
_AS_AT_A_START = "import gc; gc.disable()"
_OWN_MODULES = "import qemu_iohub, remoted.main, remoted.devices.pci_serial"

_STARTS = 4
"""of each candidate in a round"""
_IDLE_SECONDS = 3.0
_SETTLE_SECONDS = 1.5
"""more than the time between two samples of remoted's watchdog"""


def first_answers(candidates: Sequence[Candidate], rounds: int, directory: Path) -> dict[str, float]:
    """Median milliseconds from before the process is made to the answer to a config read, by candidate."""
    times: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for _ in range(_STARTS * rounds):
        for candidate in candidates:
            with Remote(candidate, directory, settle=False) as remote:
                times[candidate.name].append(remote.first_answer * 1000)
    return {name: statistics.median(values) for name, values in times.items()}


def start_parts(candidate: Candidate, rounds: int, directory: Path) -> dict[str, float]:
    """Median milliseconds of CPU time that a remoted uses before its first answer, by what it does."""
    # In the order of sys.modules, and os first: some of the library can't be loaded in any order.
    names = _output(
        f"import sys; before = {{*sys.modules}}; {_OWN_MODULES}; "
        "print(*(name for name in sys.modules if name not in before))"
    ).split()
    library = [name for name in names if name.partition(".")[0] not in _OWN_PACKAGES]
    steps = {
        "interpreter": "",
        "its library": f"{_AS_AT_A_START}; import os, {', '.join(library)}",
        "own modules": f"{_AS_AT_A_START}; {_OWN_MODULES}",
    }
    until: dict[str, list[float]] = {name: [] for name in (*steps, "the rest")}
    for _ in range(rounds):
        for name, code in steps.items():
            before = cpu_seconds()
            _output(f"{code}\nimport os; os._exit(0)")  # without what a regular end takes
            until[name].append((cpu_seconds() - before) * 1000)
        with Remote(candidate, directory, settle=False) as remote:
            until["the rest"].append(remote.first_answer_cpu * 1000)
    medians = [0.0, *(statistics.median(values) for values in until.values())]
    return {
        name: after - before for name, before, after in zip(until, medians[:-1], medians[1:], strict=True)
    }


def _output(code: str) -> str:
    """What Python prints that runs the code."""
    return subprocess.run(
        [INTERPRETER, "-P", "-S", "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def memory_alone(candidates: Sequence[Candidate], directory: Path) -> dict[str, dict[str, float]]:
    """Resident and private MiB of a process that is the only one of its kind, by candidate."""
    found = {}
    for candidate in candidates:
        with Remote(candidate, directory) as remote:
            exchange_times(remote, "bar-read", 0, 1000, -1)
            found[candidate.name] = _mebibytes(remote)
    return found


def idle(candidates: Sequence[Candidate], directory: Path) -> dict[str, dict[str, float]]:
    """What a process with a link does in seconds of silence, by candidate: wake-ups, and CPU time in ms."""
    found = {}
    for candidate in candidates:
        with Remote(candidate, directory) as remote:
            exchange_times(remote, "bar-read", 0, 1000, -1)
            _sleep(remote, _SETTLE_SECONDS)
            switches, cpu = remote.switches(), remote.cpu_seconds()
            _sleep(remote, _IDLE_SECONDS)
            found[candidate.name] = {
                "wake-ups": remote.switches() - switches,
                "cpu": (remote.cpu_seconds() - cpu) * 1000,
            }
    return found


def beside_others(
    candidate: Candidate, counts: Sequence[int], rounds: int, directory: Path, exchanges: int = 2000
) -> dict[int, dict[str, float]]:
    """One busy process beside so many idle ones with a live link each.

    By the number of all: milliseconds of the start of one, private and dirty MiB of the busy one, and microseconds
    (p50) of its BAR read, with each end on a core of its own.
    """
    cpus = sorted(os.sched_getaffinity(0))
    found = {}
    with ExitStack() as stack:
        busy = stack.enter_context(Remote(candidate, directory))
        busy.pin({cpus[-1]})
        remotes = [busy]
        starts = [busy.first_answer * 1000]
        for count in counts:
            while len(remotes) < count:
                own = directory / f"idle{len(remotes)}"
                own.mkdir()
                remotes.append(stack.enter_context(Remote(candidate, own)))
                starts.append(remotes[-1].first_answer * 1000)
            _sleep(busy, _SETTLE_SECONDS)
            times = [
                sorted(exchange_times(busy, "bar-read", 200, exchanges, cpus[0]))[exchanges // 2]
                for _ in range(rounds)
            ]
            found[count] = {
                "start": statistics.median(starts),
                "private": _mebibytes(busy)["private"],
                "dirty": _mebibytes(busy)["dirty"],
                "bar read": statistics.median(times) / 1000,
            }
    return found


def _mebibytes(remote: Remote) -> dict[str, float]:
    return {name: size / (1 << 20) for name, size in remote.memory().items()}


def _sleep(remote: Remote, seconds: float) -> None:
    """Waits; fails if the process ends meanwhile."""
    pidfd = os.pidfd_open(remote.pid)
    try:
        if select.select([pidfd], [], [], seconds)[0]:
            raise SystemExit(f"{remote.candidate.name}: it has ended")
    finally:
        os.close(pidfd)
