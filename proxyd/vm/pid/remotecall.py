# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes another process's main thread carry out system calls, under ptrace, and restores its state exactly.

The thread is stopped by PTRACE_INTERRUPT, which leaves no trace in its signals. If that interrupts a system
call, its registers hold one of the kernel's private restart codes. They are put back, code and all, before
the thread is released, and the kernel restarts the call or not, as it would have done: the time that is left
of a sleep is kept in a restart_block that none of the calls made here touches.

Signals are blocked meanwhile and stay queued. A job control stop is let through at once: the kernel allows a
traced thread to run within it and stops the thread again after the detach.

While the thread is ours, its stack pointer points at a signal frame with its own state (proxyd.vm.pid.sigframe),
placed where the kernel would put one, and every call is made by an instruction pair ``syscall; ret``. So if
this process is killed in the midst of it, the kernel detaches the thread and it returns through that frame by
itself: a call that was begun completes, registers and signal mask come back, an interrupted call is
restarted. The fds that the work has opened are closed on that path, by a frame each; only what a call has just
opened can stay behind, as long as its number isn't known here.

Two things are different then. A sleep with its rest in the restart_block fails with EINTR, as after any
handled signal. And in two moments of some microseconds, when the registers are ours and the signal mask
isn't, an interrupted call is restarted even if a handler runs. (A program with a user shadow stack can't return
like this: the ``ret`` would kill it.)

For the same reason a call that hangs can be left behind at any time: ptrace belongs to a thread, so the work
is done in one of its own, and its end releases the traced thread. One deadline bounds all of a stop, however the
process delays its parts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import TypeVar

from common.errors import IohubError, PeerGone
from proxyd.vm.bounded import run_bounded
from proxyd.vm.pid import ptrace, sigframe
from proxyd.vm.pid.interrupted import leave_critical_section, make_restartable, restarted
from proxyd.vm.pid.landmarks import RESTORE_RT_MAX, SYSCALL_RET, Landmarks, find_stack, is_restore_rt
from proxyd.vm.pid.ptrace import user_regs_struct

__all__ = ["StoppedThread", "Syscall", "run_stopped"]

STOP_DEADLINE = 5.0
"""Seconds from the request to stop until the release; in uninterruptible sleep a thread doesn't even stop."""

_TRACER_SECONDS = 5.0
"""what the tracer may take beyond that, if the process holds up an access to its memory"""

LOOK_SECONDS = 0.1
"""How soon a stop is seen whose SIGCHLD went to another thread, so all of them should block it. Looking every
millisecond from the target's CPU kept KVM's kernel threads off it for seconds when the machine was busy."""

SCRATCH_SIZE = 1024
"""Bytes for the arguments of the calls of one stop."""

MAX_OPEN = 3
"""fds that one stop may have open at a time."""

_RED_ZONE = 128  # System V ABI, AMD64 supplement, 3.2.2: below the stack pointer, yet in use
_FIRST_PAUSE_SECONDS = 0.001  # how soon a thread that wasn't on its main stack is stopped again
_LAST_PAUSE_SECONDS = 0.01
_STAT_PROCESSOR = 36  # fields after the name in proc_pid_stat(5)
_MINUS_1 = (1 << 64) - 1
_WALL = 0x40000000  # __WALL of wait(2)


class Syscall(IntEnum):
    """<asm/unistd_64.h>, the calls that are made."""

    close = 3
    ioctl = 16
    recvmsg = 47
    socketpair = 53
    eventfd2 = 290


_T = TypeVar("_T")


class StoppedThread:
    """The main thread of a process, stopped, ready to make calls; see run_stopped()."""

    def __init__(self, pid: int, landmarks: Landmarks) -> None:
        self.pid = pid
        self._landmarks = landmarks
        self._seized = False
        self._regs: user_regs_struct | None = None  # set while the thread's registers aren't its own
        self._mask: int | None = None  # set while its signal mask isn't its own
        self._saved: tuple[int, bytes] | None = None  # set while its memory isn't its own
        self._state_frame = 0  # address of the frame with the thread's own state
        self._closers: dict[
            int, int
        ] = {}  # by fd the addresses of the frames before that one, the last first
        self._scratch = self._scratch_end = 0
        self._in_call = False  # stopped where the kernel is about to make the call that orig_rax names
        self._lost: IohubError | None = None  # why the thread is no longer known to be stopped
        self._began = 0.0
        self._expires = 0.0
        self.seconds = 0.0
        """For how long the thread was stopped, at most; known after release()."""

    def stop(self) -> None:
        """Seizes and stops the thread, and makes it ready.

        Below any stack but the main one there may be anything, so one that is on a coroutine's is released and
        stopped again until it has come back to the main stack.

        Raises OSError (EPERM: no right to, or traced by another; ESRCH: gone), PeerGone if it exits,
        IohubError if it can't serve. release() must follow in any case.
        """
        stack = find_stack(self.pid)
        _run_beside(self.pid)
        deadline = time.monotonic() + STOP_DEADLINE
        pause = _FIRST_PAUSE_SECONDS
        while True:
            regs = self._interrupt()
            xstate = sigframe.without_unused_tiles(ptrace.get_xstate(self.pid))
            frame_size = sigframe.size(xstate)
            top = regs.rsp - _RED_ZONE - SCRATCH_SIZE
            frame = (top - frame_size) // sigframe.FP_ALIGNMENT * sigframe.FP_ALIGNMENT
            floor = frame - MAX_OPEN * sigframe.size()
            if floor in stack and regs.rsp in stack:
                break
            ptrace.detach(self.pid)
            self._seized = False
            if time.monotonic() > deadline:
                raise IohubError(f"process {self.pid} has its main thread on a stack of its own")
            signal.sigtimedwait({signal.SIGCHLD}, pause)
            pause = min(2 * pause, _LAST_PAUSE_SECONDS)
        ptrace.grow_stack(self.pid, floor)  # as the frame of a signal handler would
        leave_critical_section(self.pid, regs)
        mask = ptrace.get_signal_mask(self.pid)
        self._scratch = frame + frame_size
        self._scratch_end = self._scratch + SCRATCH_SIZE
        self._saved = floor, ptrace.read_memory(self.pid, floor, self._scratch_end - floor)
        home = restarted(regs)
        ptrace.write_memory(
            self.pid, frame, sigframe.build(frame, self._landmarks.restore_rt, home, mask, xstate)
        )
        self._state_frame = frame
        self._regs = regs
        # From here on the thread returns through the frame. The mask comes second: it would stay if the
        # registers didn't follow it.
        ptrace.setregs(self.pid, self._returning())
        self._mask = mask
        ptrace.set_signal_mask(self.pid, ptrace.NSIG_MASK)

    def put(self, data: bytes) -> int:
        """Copies an argument into the thread's memory, until release(). Returns its address, 8-aligned."""
        address = self._scratch
        end = address + -(-len(data) // 8) * 8
        if end > self._scratch_end:
            raise ValueError(f"no room for {len(data)} bytes of arguments")
        ptrace.write_memory(self.pid, address, data)
        self._scratch = end
        return address

    def get(self, address: int, size: int) -> bytes:
        """What is at an address that put() returned."""
        return ptrace.read_memory(self.pid, address, size)

    def call(self, number: Syscall, *arguments: int) -> int:
        """Makes one system call in the thread and returns its result.

        Raises OSError with the call's errno, PeerGone if the process exits, IohubError if the call doesn't
        end in time: release() then leaves the thread to return by itself.
        """
        self.check_time()
        ptrace.setregs(self.pid, self._calling(number, *arguments))
        ptrace.cont_to_syscall(self.pid)
        self._wait(ptrace.cont_to_syscall, _is_syscall_stop)
        self._in_call = True
        self._finish_call()
        after = ptrace.getregs(self.pid)
        if after is None:
            raise IohubError(f"process {self.pid} left 64-bit code")
        result = int.from_bytes(after.rax.to_bytes(8, "little"), "little", signed=True)
        if -4096 < result < 0:
            raise OSError(-result, os.strerror(-result), f"{number.name} in process {self.pid}")
        return result

    def check_time(self) -> None:
        """Raises IohubError when the time for this stop is over, PeerGone when the process has exited.

        Nothing may be given to the process after that: nobody waits for this thread any more.
        """
        if self._lost is None and time.monotonic() > self._expires:
            self._lost = IohubError(f"process {self.pid} didn't stop within {STOP_DEADLINE:g} s")
        if self._lost is not None:
            raise self._lost

    @contextlib.contextmanager
    def closing(self, *fds: int) -> Iterator[None]:
        """Has the thread close fds that it has opened, at the end or when it returns by itself.

        Raises as call() does. MAX_OPEN at most are open at a time; they are closed in reverse order.
        """
        with contextlib.ExitStack() as undo:
            for fd in fds:
                undo.callback(self._close, fd)
            if len(self._closers) + len(fds) > MAX_OPEN:
                raise ValueError(f"no room to close more than {MAX_OPEN} fds")
            for fd in fds:
                frame = self._return_frame - sigframe.size()
                regs = self._calling(Syscall.close, fd)
                ptrace.write_memory(
                    self.pid, frame, sigframe.build(frame, self._landmarks.restore_rt, regs, ptrace.NSIG_MASK)
                )
                self._closers[fd] = frame
            ptrace.setregs(self.pid, self._returning())
            yield

    def _close(self, fd: int) -> None:
        self._closers.pop(fd, None)
        self.call(Syscall.close, fd)

    def release(self) -> None:
        """Puts back registers, signal mask and memory, and releases the thread. Raises as call() does.

        A thread that didn't stop, or that is gone, is left to the end of the calling thread.
        """
        if not self._seized or self._lost is not None:
            return
        if self._in_call:
            self._finish_call()
        if self._mask is not None:
            ptrace.set_signal_mask(self.pid, self._mask)
        if self._regs is not None:
            ptrace.setregs(self.pid, self._regs)
        if self._saved is not None:
            # Last: until now the thread may need it to return. Nothing of the thread's own depends on it.
            with contextlib.suppress(OSError):
                ptrace.write_memory(self.pid, *self._saved)
        # It wakes the thread as a signal does (__ptrace_unlink() of kernel/ptrace.c): restart codes are looked at.
        ptrace.detach(self.pid)
        self.seconds = time.monotonic() - self._began

    def _finish_call(self) -> None:
        ptrace.cont_to_syscall(self.pid)
        self._wait(ptrace.cont_to_syscall, _is_syscall_stop)
        self._in_call = False

    @property
    def _return_frame(self) -> int:
        return next(reversed(self._closers.values()), self._state_frame)

    def _calling(self, number: Syscall, *arguments: int) -> user_regs_struct:
        """Registers that make a call, and then return through the frames."""
        regs = user_regs_struct.from_buffer_copy(self._regs or user_regs_struct())
        regs.rip = self._landmarks.syscall_ret
        regs.rsp = self._return_frame
        regs.orig_rax = _MINUS_1  # none that could be restarted
        regs.rax = number
        for name, value in zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), arguments, strict=False):
            setattr(regs, name, value & _MINUS_1)
        return regs

    def _returning(self) -> user_regs_struct:
        """Registers that return through the frames at once."""
        regs = self._calling(Syscall.close)
        regs.rip += len(SYSCALL_RET) - 1
        return regs

    def _interrupt(self) -> user_regs_struct:
        ptrace.seize(self.pid, ptrace.PTRACE_O_TRACESYSGOOD)
        self._seized = True
        self._began = time.monotonic()
        self._expires = self._began + STOP_DEADLINE
        ptrace.interrupt(self.pid)
        self._wait(ptrace.cont, _is_event_stop)
        regs = ptrace.getregs(self.pid)
        if regs is None:
            raise IohubError(f"process {self.pid} runs 32-bit code, which can't be served")
        if make_restartable(regs):
            ptrace.setregs(self.pid, regs)  # however it is released
        self._check_code()
        return regs

    def _check_code(self) -> None:
        # The process may have executed another program since it was looked at.
        call = ptrace.read_memory(self.pid, self._landmarks.syscall_ret, len(SYSCALL_RET))
        back = ptrace.read_memory(self.pid, self._landmarks.restore_rt, RESTORE_RT_MAX)
        if call != SYSCALL_RET or not is_restore_rt(back):
            raise IohubError(f"process {self.pid} has replaced its code")

    def _wait(self, resume: Callable[[int, int], None], wanted: Callable[[int], bool]) -> None:
        """Waits for a stop of the kind; resumes the thread from any other."""
        while True:
            status = _wait_status(self.pid, self._expires)
            if status is None:
                self._lost = IohubError(f"process {self.pid} didn't stop within {STOP_DEADLINE:g} s")
                raise self._lost
            if not os.WIFSTOPPED(status):
                self._lost = PeerGone(f"process {self.pid} has exited")
                raise self._lost
            if wanted(status):
                return
            # A signal on its way goes on its way: only a stop signal, once the others are blocked.
            resume(self.pid, 0 if _is_event_stop(status) or _is_syscall_stop(status) else os.WSTOPSIG(status))


def _is_event_stop(status: int) -> bool:
    return status >> 16 == ptrace.PTRACE_EVENT_STOP


def _is_syscall_stop(status: int) -> bool:
    return os.WSTOPSIG(status) == signal.SIGTRAP | 0x80  # PTRACE_O_TRACESYSGOOD


def _wait_status(pid: int, deadline: float) -> int | None:
    """The next wait status, None if there is none until then."""
    while True:
        found, status = os.waitpid(pid, os.WNOHANG | _WALL)
        if found:
            return status
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        signal.sigtimedwait({signal.SIGCHLD}, min(left, LOOK_SECONDS))  # every stop raises it


def _run_beside(pid: int) -> None:
    """Moves the calling thread to the CPU where the other was last.

    The two take turns, a dozen times each. On one CPU the turn passes at once, even if every CPU is busy;
    between CPUs each may wait for somebody's time slice.
    """
    with contextlib.suppress(OSError):  # a system call filter or a cpuset may forbid it
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        os.sched_setaffinity(0, {int(fields[_STAT_PROCESSOR])})


def _keep(_result: object) -> None:
    """For results that need no disposal."""


def run_stopped(
    pid: int,
    landmarks: Landmarks,
    body: Callable[[StoppedThread], _T],
    discard: Callable[[_T], None] = _keep,
) -> tuple[_T, float]:
    """Stops the main thread of a process, lets ``body`` make calls in it, and releases it.

    Returns what ``body`` returned and the seconds for which the thread was stopped, at most. Raises what
    ``body`` and StoppedThread's methods raise; the process runs on in any case. ``discard`` gets what ``body``
    returned if the release failed, or came too late.
    """
    thread = StoppedThread(pid, landmarks)

    def work() -> tuple[_T, float]:
        try:
            thread.stop()
            result = body(thread)
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to be told
                thread.release()
            raise
        try:
            thread.release()
        except BaseException:
            discard(result)
            raise
        return result, thread.seconds

    # The tracer inherits the mask, and waits for the signal.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    try:
        seconds = 2 * STOP_DEADLINE + _TRACER_SECONDS  # the first half for a thread on another stack
        return run_bounded(f"trace process {pid}", seconds, work, lambda done: discard(done[0]))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
