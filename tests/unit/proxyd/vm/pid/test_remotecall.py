# SPDX-License-Identifier: GPL-2.0-or-later
"""System calls made by another process's thread: it must not notice, whatever it did and whatever fails."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import IohubError, PeerGone
from proxyd.vm.pid import ptrace, remotecall
from proxyd.vm.pid.landmarks import find_landmarks, find_stack, match_gadgets
from proxyd.vm.pid.remotecall import StoppedThread, Syscall, run_stopped
from tests.support.checkout import ROOT
from tests.support.fds import count_fds
from tests.support.ptracefaults import StepFailedError, at_step, fail, two_calls
from tests.support.target import TargetProcess, build, needs_gcc
from tests.support.wait import wait_until

pytestmark = needs_gcc


# What ends a wait without the kernel's restart_block, and what needs it.
CHECKS = (
    *("ppoll", "poll", "pselect", "nanosleep", "clock_nanosleep", "futex", "epoll_wait", "sigtimedwait"),
    *("semtimedop", "socket", "io_uring", "io_getevents", "read", "registers", "vectors", "signals"),
    *("coroutine", "deep"),
)


@pytest.fixture(params=[*CHECKS, "kvm_run"])
def check(request: pytest.FixtureRequest) -> str:
    """A check of tests/support/target; the one with a vCPU only where there is KVM."""
    name = str(request.param)
    if name == "kvm_run":
        request.getfixturevalue("requires_kvm")
    return name


@pytest.fixture(autouse=True)
def no_fd_is_left() -> Iterator[None]:
    before = count_fds()
    yield
    assert count_fds() == before


def rounds(said: str) -> int:
    """How often the check was made, if that is all it had to say."""
    match = re.fullmatch(r"(\d+) rounds", said)
    assert match is not None, said
    return int(match[1])


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_the_target_does_not_notice(check: str) -> None:
    chance = random.Random(check)
    with TargetProcess(check) as target:
        landmarks = find_landmarks(target.pid)
        for _ in range(300):
            run_stopped(target.pid, landmarks, two_calls)
            target.pause(chance.uniform(0, 0.003))
        assert rounds(target.finish()) > 0


def test_the_target_does_not_notice_that_its_tracer_is_killed(check: str) -> None:
    with TargetProcess(check, "eintr") as target:
        result = subprocess.run(
            [sys.executable, "-m", "tests.support.ptracefaults", str(target.pid), "calls"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        match = re.fullmatch(r"(\d+) steps, (\d+) killed, 0 left\n", result.stdout)
        assert match is not None, result.stdout
        assert int(match[1]) > 20
        assert int(match[2]) >= int(match[1])  # a step is counted if one of its two tracers got there
        target.pause(0.05)
        assert rounds(target.finish()) > 0


def test_a_failure_at_any_step_leaves_the_target_as_it_was(check: str) -> None:
    with TargetProcess(check, "eintr") as target:
        landmarks = find_landmarks(target.pid)
        for number in itertools.count(1):
            with at_step(number, fail) as begun, contextlib.suppress(StepFailedError):
                run_stopped(target.pid, landmarks, two_calls)
            # The end of the tracer's thread, which releases the target, may come a little after its result.
            wait_until(lambda: status(target.pid)["TracerPid"] == "0", "the target is released")
            if len(begun) < number:
                break
        assert number > 20
        target.pause(0.05)
        assert rounds(target.finish()) > 0


def test_a_restartable_sequence_is_aborted_and_not_forgotten() -> None:
    with TargetProcess("rseq") as target:
        landmarks = find_landmarks(target.pid)
        for _ in range(20):
            before = target.ask()
            run_stopped(target.pid, landmarks, two_calls)
            wait_until(lambda: target.ask() > before, "the sequence is aborted")  # noqa: B023


def test_a_thread_that_stays_on_a_stack_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def has_left_the_main_stack() -> bool:
        fields = Path(f"/proc/{target.pid}/syscall").read_text().split()  # proc_pid_syscall(5)
        return len(fields) > 1 and int(fields[-2], 16) not in find_stack(target.pid)

    monkeypatch.setattr(remotecall, "STOP_DEADLINE", 0.1)
    with TargetProcess("coroutine", "stay") as target:
        wait_until(has_left_the_main_stack, "the thread is on the stack of its own")
        with pytest.raises(
            IohubError, match=f"process {target.pid} has its main thread on a stack of its own"
        ):
            run_stopped(target.pid, find_landmarks(target.pid), two_calls)
        assert rounds(target.finish()) > 0


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_stop_signal_holds(when: str) -> None:
    def stop_and_call(thread: StoppedThread) -> None:
        if when == "during":
            os.kill(thread.pid, signal.SIGSTOP)
        two_calls(thread)

    def stopped() -> bool:
        return status(target.pid)["State"] == "T (stopped)"

    with TargetProcess("ppoll") as target:
        if when == "before":
            os.kill(target.pid, signal.SIGSTOP)
            wait_until(stopped, "the target is stopped")
        run_stopped(target.pid, find_landmarks(target.pid), stop_and_call)
        wait_until(stopped, "the target is stopped again")
        os.kill(target.pid, signal.SIGCONT)
        assert rounds(target.finish()) > 0


def test_a_signal_that_comes_before_the_stop_is_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    def signal_and_interrupt(pid: int) -> None:
        os.kill(pid, signal.SIGUSR1)
        wait_until(lambda: status(pid)["State"].startswith("t"), "the signal is on its way")
        interrupt(pid)

    interrupt = ptrace.interrupt
    monkeypatch.setattr(ptrace, "interrupt", signal_and_interrupt)
    with program_with_threads(1) as pid, pytest.raises(PeerGone, match=f"process {pid} has exited"):
        run_stopped(pid, find_landmarks(pid), two_calls)


def test_a_call_that_hangs_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tracer gives up; the call ends later, and the thread returns by itself."""
    monkeypatch.setattr(remotecall, "STOP_DEADLINE", 0.05)
    ends: list[socket.socket] = []

    def wait_for_a_message(thread: StoppedThread) -> None:
        pair = thread.put(bytes(8))
        thread.call(Syscall.socketpair, socket.AF_UNIX, socket.SOCK_DGRAM, 0, pair)
        near, far = struct.unpack("ii", thread.get(pair, 8))
        pidfd = os.pidfd_open(thread.pid)
        ends.append(socket.socket(fileno=ptrace.pidfd_getfd(pidfd, near)))
        os.close(pidfd)
        thread.call(Syscall.recvmsg, far, thread.put(bytes(56)), 0)

    with TargetProcess("nanosleep", "eintr") as target:
        with pytest.raises(IohubError, match=rf"process {target.pid} didn't stop within 0\.05 s"):
            run_stopped(target.pid, find_landmarks(target.pid), wait_for_a_message)
        with ends[0]:
            ends[0].send(b"x")
        assert rounds(target.finish()) > 0


def test_a_target_that_cannot_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remotecall, "STOP_DEADLINE", 0.05)
    with TargetProcess("vfork") as target:
        landmarks = find_landmarks(target.pid)
        children = Path(f"/proc/{target.pid}/task/{target.pid}/children")
        wait_until(
            lambda: children.read_text() and status(target.pid)["State"].startswith("D"),
            "the target waits for its child",
        )
        with pytest.raises(IohubError, match="didn't stop within"):
            run_stopped(target.pid, landmarks, two_calls)
        assert target.finish() == "child\n1 rounds"


def test_a_call_that_has_just_returned_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even when the tracer fails where the kernel would make whatever call the registers name."""

    def interrupt_and_return(pid: int) -> None:
        interrupt(pid)
        target.end_input()

    with TargetProcess("ppoll") as target:
        landmarks = find_landmarks(target.pid)
        with at_step(0, fail) as steps:
            run_stopped(target.pid, landmarks, two_calls)
    at_entry = [number for number, name in enumerate(steps, 1) if name == "cont_to_syscall"][1]
    interrupt = ptrace.interrupt
    monkeypatch.setattr(ptrace, "interrupt", interrupt_and_return)
    with TargetProcess("vfork") as target:
        landmarks = find_landmarks(target.pid)
        with at_step(at_entry, fail), pytest.raises(StepFailedError):
            run_stopped(target.pid, landmarks, two_calls)
        assert target.finish() == "child\n1 rounds"


@pytest.mark.parametrize("threads", [1, 2])
def test_a_target_that_is_killed_meanwhile(threads: int) -> None:
    def kill_and_call(thread: StoppedThread) -> None:
        os.kill(thread.pid, signal.SIGKILL)
        two_calls(thread)

    with program_with_threads(threads) as pid, pytest.raises((PeerGone, ProcessLookupError)):
        run_stopped(pid, find_landmarks(pid), kill_and_call)


@contextlib.contextmanager
def program_with_threads(threads: int) -> Iterator[int]:
    """The process id of a program that waits for input."""
    program = ["cat"] if threads == 1 else [str(build("target", "-pthread")), "read"]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"ready\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
        process.kill()


def test_no_thread_is_left() -> None:
    with TargetProcess("ppoll") as target:
        landmarks = find_landmarks(target.pid)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        threads = threading.active_count()
        run_stopped(target.pid, landmarks, two_calls)
        assert threading.active_count() == threads
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_no_room_for_a_thread_is_an_error_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with TargetProcess("ppoll") as target:
        landmarks = find_landmarks(target.pid)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(IohubError, match="no thread to trace process"):
                run_stopped(target.pid, landmarks, two_calls)
        run_stopped(target.pid, landmarks, two_calls)


def test_errors_of_the_call_have_its_name() -> None:
    def close_nothing(thread: StoppedThread) -> None:
        thread.call(Syscall.close, 12345)

    with TargetProcess("ppoll") as target:
        with pytest.raises(OSError, match=f"Bad file descriptor: 'close in process {target.pid}'"):
            run_stopped(target.pid, find_landmarks(target.pid), close_nothing)
        assert rounds(target.finish()) > 0


def test_arguments_go_there_and_back() -> None:
    def put_and_get(thread: StoppedThread) -> tuple[bytes, bytes]:
        first, second = thread.put(b"x" * 13), thread.put(b"y" * 100)
        assert first % 8 == second % 8 == 0
        with pytest.raises(ValueError, match="no room for 1000 bytes"):
            thread.put(bytes(1000))
        return thread.get(first, 13), thread.get(second, 100)

    with TargetProcess("ppoll") as target:
        assert run_stopped(target.pid, find_landmarks(target.pid), put_and_get)[0] == (b"x" * 13, b"y" * 100)


def test_a_32_bit_program_is_refused() -> None:
    program = build("pause32.c", "-m32", "-static", "-nostdlib", "-fno-pie", "-no-pie")
    with subprocess.Popen([program]) as process, TargetProcess("ppoll") as other:
        try:
            with pytest.raises(IohubError, match=f"process {process.pid} has no code that"):
                find_landmarks(process.pid)
            with pytest.raises(IohubError, match=f"process {process.pid} runs 32-bit code"):
                run_stopped(process.pid, find_landmarks(other.pid), two_calls)
            assert process.poll() is None
        finally:
            process.kill()


def test_a_program_that_replaced_itself_is_refused() -> None:
    with TargetProcess("ppoll") as target:
        landmarks = find_landmarks(target.pid)
        swapped = (
            landmarks._replace(syscall_ret=landmarks.restore_rt),
            landmarks._replace(restore_rt=landmarks.syscall_ret),
        )
        for wrong in swapped:
            with pytest.raises(IohubError, match="has replaced its code"):
                run_stopped(target.pid, wrong, two_calls)
        assert rounds(target.finish()) > 0


@pytest.mark.parametrize(
    ("code", "offsets"),
    [
        (b"", (-1, -1)),
        (b"\x90\x0f\x05\xc3", (1, -1)),
        (b"\x0f\x05\x90\xc3", (-1, -1)),
        (b"\x48\xc7\xc0\x0f\0\0\0\x0f\x05\x90\x0f\x05\xc3", (10, 0)),
        (b"\xcc\xb8\x0f\0\0\0\x0f\x05", (-1, 1)),
        (b"\xb8\x0f\0\0\0\x0f\x05\x48\xc7\xc0\x0f\0\0\0\x0f\x05", (-1, 0)),
        (b"\x48\xc7\xc0\x10\0\0\0\x0f\x05", (-1, -1)),
    ],
)
def test_gadgets_are_found(code: bytes, offsets: tuple[int, int]) -> None:
    assert match_gadgets(code) == offsets
