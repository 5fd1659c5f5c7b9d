# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the time of an exchange goes, from the kernel's own trace of the system calls of both ends.

A line of the trace costs about half a microsecond, so that what is found is a little longer than without it.
"""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tests.bench.candidates import Candidate, Remote
from tests.bench.exchanges import Plan, exchange_times, running_in_turns

__all__ = ["PHASES", "TRACED", "Call", "can_trace", "measure_phases", "phases_of"]

PHASES = ("remote awake", "answers", "client has it")
"""from the client's send to the end of the remote's wait, to its answer, to the end of the client's wait"""
TRACED = ("bar-read", "raise")
"""the exchanges that are traced: one with a reply, one with an interrupt"""

_INSTANCES = Path("/sys/kernel/tracing/instances")
_EVENTS = ("raw_syscalls/sys_enter", "raw_syscalls/sys_exit")
_BUFFER_KIB = 32768
_MAX_COUNT = 4000
_LINE = re.compile(
    r"^\s*(?P<comm>.+)-(?P<task>\d+)\s+\[\d+\] \S+ (?P<seconds>[\d.]+): "
    r"sys_(?P<edge>enter|exit): NR (?P<number>\d+)(?: \((?P<first>[0-9a-f]+)| = (?P<result>-?\d+))"
)
# asm/unistd_64.h
_READ, _WRITE, _SENDTO, _RECVFROM, _SENDMSG, _IO_SUBMIT = 0, 1, 44, 45, 46, 209
_WAITS = frozenset((7, 232, 271, 281))
"""poll, epoll_wait, ppoll, epoll_pwait"""


class Call(NamedTuple):
    """The beginning or the end of a system call."""

    is_client: bool
    micros: float
    is_enter: bool
    number: int
    argument: int
    """the first one of its arguments at the beginning, its result at the end"""


def can_trace() -> bool:
    """Whether the kernel's trace can be used, on a machine whose system calls have these numbers."""
    return os.uname().machine == "x86_64" and os.access(_INSTANCES, os.W_OK)


def measure_phases(
    candidates: Sequence[Candidate], exchange: str, plan: Plan, cpus: tuple[int, int], directory: Path
) -> dict[str, dict[str, float]]:
    """Microseconds of each of PHASES and of all, by candidate, with each end on a CPU of its own.

    The median over the rounds of a mean without the slowest tenth. A round has fewer exchanges than elsewhere: the
    kernel's buffer has room for so many.
    """
    plan = replace(plan, count=min(plan.count, _MAX_COUNT), warmup=min(plan.warmup, _MAX_COUNT))
    means: dict[str, list[list[float]]] = {candidate.name: [] for candidate in candidates}
    for remote in running_in_turns(candidates, plan.rounds, cpus, directory):
        with _tracing() as trace:
            exchange_times(remote, exchange, plan.warmup, plan.count, cpus[0])
            (trace / "tracing_on").write_text("0")
            calls = _calls(trace, remote)
            by_length = sorted(phases_of(calls, exchange == "raise", _number_of_irqfd(remote)), key=sum)
        usual = by_length[: max(1, len(by_length) * 9 // 10)]
        means[remote.candidate.name].append([statistics.fmean(values) for values in zip(*usual, strict=True)])
    return {name: _summary(rounds) for name, rounds in means.items()}


def _summary(rounds: Sequence[Sequence[float]]) -> dict[str, float]:
    medians = [statistics.median(values) for values in zip(*rounds, strict=True)]
    return {**dict(zip(PHASES, medians, strict=True)), "in all": statistics.median(map(sum, rounds))}


def phases_of(calls: Iterable[Call], is_raise: bool, irqfd: int) -> Iterator[tuple[float, float, float]]:
    """Microseconds of each of PHASES, for each exchange of a trace that is there as a whole.

    An answer is the call that signals the eventfd ``irqfd``, or else the one that sends the reply.
    """
    answer = _READ if is_raise else _RECVFROM
    asked = awake = answered = -1.0
    for call in calls:
        if call.is_client and call.is_enter and call.number == _SENDTO:
            asked, awake, answered = call.micros, -1.0, -1.0
        elif asked < 0:
            continue
        elif call.is_client:
            if not call.is_enter and call.number == answer and answered >= 0:
                yield awake - asked, answered - awake, call.micros - answered
                asked = -1.0
        elif awake < 0:
            if not call.is_enter and call.number in _WAITS and call.argument > 0:
                awake = call.micros
        elif answered < 0 and call.is_enter:
            signals = call.number == _IO_SUBMIT or (call.number == _WRITE and call.argument == irqfd)
            if signals if is_raise else call.number in (_SENDTO, _SENDMSG):
                answered = call.micros


def _calls(trace: Path, remote: Remote) -> Iterator[Call]:
    tasks = {int(task) for task in os.listdir(f"/proc/{remote.pid}/task")}
    with (trace / "trace").open(encoding="ascii", errors="replace") as lines:
        for line in lines:
            if (found := _LINE.match(line)) is None:
                continue
            is_client = found["comm"] == "client"
            if is_client or int(found["task"]) in tasks:
                is_enter = found["edge"] == "enter"
                argument = int(found["first"], 16) if is_enter else int(found["result"])
                yield Call(is_client, float(found["seconds"]) * 1e6, is_enter, int(found["number"]), argument)


def _number_of_irqfd(remote: Remote) -> int:
    """The number that the remote's irqfd has in the remote."""
    own = _eventfd_id(f"/proc/self/fdinfo/{remote.irqfd}")
    return next(
        int(fd)
        for fd in os.listdir(f"/proc/{remote.pid}/fdinfo")
        if _eventfd_id(f"/proc/{remote.pid}/fdinfo/{fd}") == own
    )


def _eventfd_id(path: str) -> str | None:
    lines = Path(path).read_text().splitlines()
    return next((line for line in lines if line.startswith("eventfd-id:")), None)


@contextmanager
def _tracing() -> Iterator[Path]:
    """Traces the system calls of all processes into a buffer of its own; the directory of that."""
    instance = _INSTANCES / f"iohub-bench-{os.getpid()}"
    instance.mkdir()
    try:
        (instance / "trace_clock").write_text("mono")
        (instance / "buffer_size_kb").write_text(str(_BUFFER_KIB))
        for event in _EVENTS:
            (instance / "events" / event / "enable").write_text("1")
        yield instance
    finally:
        instance.rmdir()  # ends the tracing
