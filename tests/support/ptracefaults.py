# SPDX-License-Identifier: GPL-2.0-or-later
"""Lets the nth step of a tracer's work fail, or kill the tracer. A step is a call of a function of
proxyd.vm.pid.ptrace.

As a program it kills tracers at every step, one after the other:

    python -m tests.support.ptracefaults PID calls|attach|detach

with a PID of a process that is made to make system calls, or to attach and detach an irqfd of its VM. It
prints how many steps the work has, how many tracers it had killed, and how many fds one of them has left in
the process, at most; in "calls" these aren't looked at.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

from proxyd.vm.pid import ptrace
from proxyd.vm.pid.inject import Target
from proxyd.vm.pid.landmarks import find_landmarks
from proxyd.vm.pid.remotecall import SCRATCH_SIZE, StoppedThread, Syscall, run_stopped
from tests.support.wait import wait_until

STEPS = (
    *("seize", "interrupt", "cont", "cont_to_syscall", "detach", "getregs", "setregs", "get_xstate"),
    *("get_signal_mask", "set_signal_mask", "read_memory", "write_memory", "pidfd_getfd"),
    "grow_stack",
)
GSI = 5
_RT_SIGRETURN = 15


def two_calls(thread: StoppedThread) -> None:
    """Work for run_stopped(), with as much memory as it may use. Leaves nothing behind if it gets to its end."""
    thread.put(b"\xff" * SCRATCH_SIZE)
    fd = thread.call(Syscall.eventfd2, 0, 0)
    with thread.closing(fd):
        pass


@contextmanager
def at_step(number: int, action: Callable[[], None], *, after: bool = False) -> Iterator[list[str]]:
    """Takes the action before (or after) the step with this number, from 1. Yields the steps that were begun."""
    begun: list[str] = []

    def counting(function: Callable[..., object]) -> Callable[..., object]:
        @wraps(function)
        def step(*args: object) -> object:
            begun.append(function.__name__)
            its_turn = len(begun) == number
            if its_turn and not after:
                action()
            result = function(*args)
            if its_turn and after:
                action()
            return result

        return step

    originals = {name: getattr(ptrace, name) for name in STEPS}
    for name, function in originals.items():
        setattr(ptrace, name, counting(function))
    try:
        yield begun
    finally:
        for name, function in originals.items():
            setattr(ptrace, name, function)


class StepFailedError(OSError):
    """What fail() lets a step raise."""


def fail() -> None:
    """An action: the step fails."""
    raise StepFailedError(errno.EIO, os.strerror(errno.EIO), "a test")


def die() -> None:
    """An action: the process is killed."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_each_step(
    prepare: Callable[[], Callable[[], object]], count: Callable[[], int]
) -> tuple[int, int, int]:
    """Forks tracers that do the work which ``prepare`` returns; each but the last two dies within it.

    ``count`` counts the fds of the process.

    Returns the number of steps, how many tracers were killed, and how many fds one of them has left at most.
    """
    number = killed = left = 0
    while True:
        number += 1
        statuses = []
        for after in (False, True):
            before = count()
            child = os.fork()
            if child == 0:
                _trace(prepare, number, after)
            statuses.append(os.waitpid(child, 0)[1])
            left = max(left, count() - before)
        killed += sum(map(os.WIFSIGNALED, statuses))
        if all(os.WIFEXITED(status) for status in statuses):
            if any(statuses):
                raise RuntimeError(f"a tracer that wasn't killed at step {number} failed")
            return number - 1, killed, left


def _count_idle(pid: int) -> int:
    """Counts the fds of a process that is done with all calls and waits in one of its own."""

    def is_idle() -> bool:
        call = Path(f"/proc/{pid}/syscall").read_text().split()[0]
        return call != "running" and int(call) not in {*Syscall, _RT_SIGRETURN}

    wait_until(is_idle, "the process is back at what it did")
    return len(os.listdir(f"/proc/{pid}/fd"))


def _trace(prepare: Callable[[], Callable[[], object]], number: int, after: bool) -> None:
    try:
        work = prepare()
        with at_step(number, die, after=after):
            work()
        os._exit(0)
    finally:
        traceback.print_exc()
        os._exit(1)


def main(pid: int, kind: str) -> None:
    """The program."""
    if kind == "calls":
        landmarks = find_landmarks(pid)
        steps, killed, left = kill_at_each_step(
            lambda: lambda: run_stopped(pid, landmarks, two_calls), count=lambda: 0
        )
    elif kind == "attach":
        target = Target.open(pid)
        steps, killed, left = kill_at_each_step(lambda: lambda: target.attach(GSI), lambda: _count_idle(pid))
    else:
        target = Target.open(pid)

        def prepare() -> Callable[[], object]:
            line = target.attach(GSI)
            return lambda: target.detach(line)

        steps, killed, left = kill_at_each_step(prepare, lambda: _count_idle(pid))
    print(f"{steps} steps, {killed} killed, {left} left")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
