# SPDX-License-Identifier: GPL-2.0-or-later
"""irqfds that a stock QEMU registers without knowing: they serve, they leave, and whoever dies, QEMU doesn't."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import IohubError, PeerGone, UsageError
from common.notifier import EventNotifier
from proxyd.vm.pid import ptrace
from proxyd.vm.pid.inject import Line, Target
from proxyd.vm.pid.process import Process
from tests.support.checkout import ROOT
from tests.support.countguest import CountGuest
from tests.support.fds import await_fds, count_fds
from tests.support.ptracefaults import GSI, StepFailedError, at_step, fail
from tests.support.target import needs_gcc
from tests.support.wait import wait_until

pytestmark = [pytest.mark.usefixtures("requires_kvm", "requires_qemu"), needs_gcc]

PATIENCE = 20.0

# A failure of these can't leave an fd behind; of the others it is unknown what the call has done.
SAFE_STEPS = {"seize", "interrupt", "write_memory", "pidfd_getfd", "get_signal_mask", "get_xstate"}


@pytest.fixture(scope="module")
def machine(requires_kvm: None, requires_qemu: None) -> Iterator[CountGuest]:
    with CountGuest() as machine:
        yield machine


@pytest.fixture
def guest(machine: CountGuest) -> Iterator[CountGuest]:
    """The running machine; afterwards it runs, no line is high and nothing was served that wasn't asked for."""
    before = count_fds()
    yield machine
    machine.qmp("cont")
    wait_until(lambda: not high(machine), "the line is low")
    assert machine.served_nothing()
    await_fds(before)


@pytest.fixture
def target(guest: CountGuest) -> Iterator[Target]:
    target = Target.open(guest.pid)
    yield target
    target.close()


def high(guest: CountGuest, gsi: int = GSI) -> bool:
    return bool(guest.requested() >> gsi & 1)


def acknowledged(line: Line) -> bool:
    return bool(select.select([line.resamplefd.fd], [], [], PATIENCE)[0]) and line.resamplefd.test_and_clear()


def serve_one(guest: CountGuest, line: Line) -> None:
    """One interrupt, from the assertion to the acknowledgement."""
    line.irqfd.set()
    assert acknowledged(line)
    assert guest.served() == line.gsi


@contextlib.contextmanager
def limited(pid: int, room: int) -> Iterator[None]:
    """Lets the process open so many more fds."""
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    limit = next(itertools.islice((number for number in itertools.count() if number not in used), room, None))
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("gsi", [5, 10, 11])
def test_every_assertion_is_served_once(guest: CountGuest, target: Target, gsi: int) -> None:
    fds = guest.fds()
    line = target.attach(gsi)
    assert guest.fds() == fds
    for _ in range(2000):
        serve_one(guest, line)
    assert guest.served_nothing()
    target.detach(line)
    assert guest.fds() == fds


def test_lines_of_several_devices_at_once(guest: CountGuest, target: Target) -> None:
    lines = [target.attach(gsi) for gsi in (5, 10, 11)]
    for line in lines * 10:
        serve_one(guest, line)
    for line in lines:
        target.detach(line)


def test_detach_lowers_the_line_though_another_holds_the_irqfd(guest: CountGuest, target: Target) -> None:
    line = target.attach(GSI)
    with contextlib.closing(EventNotifier(os.dup(line.irqfd.fd))) as copy:
        guest.qmp("stop")
        copy.set()
        wait_until(lambda: high(guest), "the line is high")
        target.detach(line)
        assert not high(guest)
        copy.set()
        assert copy.test_and_clear()  # KVM would have taken it
        assert not high(guest)


def test_a_closed_line_is_low(guest: CountGuest, target: Target) -> None:
    line = target.attach(GSI)
    guest.qmp("stop")
    line.irqfd.set()
    wait_until(lambda: high(guest), "the line is high")
    line.close()
    wait_until(lambda: not high(guest), "the line is low")


@pytest.mark.parametrize("killed", [("proxyd",), ("remoted",), ("proxyd", "remoted")], ids="+".join)
def test_kill_of_the_daemons(guest: CountGuest, killed: tuple[str, ...]) -> None:
    """With the line high and the guest unable to acknowledge it, only the end of the irqfd can lower it."""
    fds = guest.fds()
    guest.qmp("stop")
    ends = socket.socketpair()
    with contextlib.ExitStack() as stack:
        holders = {}
        for role, end, arguments in zip(("proxyd", "remoted"), ends, ([guest.pid, GSI], []), strict=True):
            holders[role] = stack.enter_context(holder(role, end, *map(str, arguments)))
        for role, said in (("proxyd", "attached\n"), ("remoted", "asserted\n")):
            assert line_of(holders[role]) == said
        wait_until(lambda: high(guest), "the line is high")
        for role in killed:
            holders[role].kill()
        for role, said in (("proxyd", "detached\n"), ("remoted", "closed\n")):
            if role not in killed:
                assert line_of(holders[role]) == said
        wait_until(lambda: not high(guest), "the line is low")
    assert guest.fds() == fds
    guest.qmp("cont")
    target = Target.open(guest.pid)
    line = target.attach(GSI)
    serve_one(guest, line)
    target.detach(line)
    target.close()


@contextlib.contextmanager
def holder(role: str, end: socket.socket, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    with end:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.lineholder", role, str(end.fileno()), *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[end.fileno()],
        )
    with process:
        yield process
        process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.parametrize("room", [0, 1])
def test_attach_to_a_process_without_free_fds(guest: CountGuest, target: Target, room: int) -> None:
    fds = guest.fds()
    with (
        limited(guest.pid, room),
        pytest.raises(IohubError, match=r"eventfd2 in process \d+: Too many open files"),
    ):
        target.attach(GSI)
    assert guest.fds() == fds


@pytest.mark.parametrize("room", [0, 1, 2])
def test_detach_from_a_process_without_free_fds(guest: CountGuest, target: Target, room: int) -> None:
    """It fails; the line is closed all the same, and is low if nobody else holds it."""
    fds = guest.fds()
    line = target.attach(GSI)
    guest.qmp("stop")
    line.irqfd.set()
    wait_until(lambda: high(guest), "the line is high")
    with (
        limited(guest.pid, room),
        pytest.raises(IohubError, match=r"Too many open files|can't open another file"),
    ):
        target.detach(line)
    assert line.irqfd.fd == line.resamplefd.fd == -1
    assert guest.fds() == fds
    wait_until(lambda: not high(guest), "the line is low")


@pytest.mark.parametrize("room", [0, 1, 2])
def test_attach_without_free_fds_of_our_own(guest: CountGuest, target: Target, room: int) -> None:
    fds = guest.fds()
    with limited(os.getpid(), room):
        try:
            line = target.attach(GSI)
        except IohubError as error:
            refusal = str(error)
        else:
            line.close()
            refusal = ""
    assert "Too many open files" in refusal or room == 2
    assert guest.fds() == fds


@pytest.mark.parametrize("work", ["attach", "detach"])
def test_a_failure_at_any_step(guest: CountGuest, target: Target, work: str) -> None:
    for number in itertools.count(1):
        line = target.attach(GSI) if work == "detach" else None
        fds = guest.fds()
        with at_step(number, fail) as begun, contextlib.suppress(IohubError, StepFailedError):
            if line is not None:
                target.detach(line)
            else:
                target.attach(GSI).close()
        wait_until(
            lambda: "TracerPid:\t0\n" in Path(f"/proc/{guest.pid}/status").read_text(), "QEMU is released"
        )
        if len(begun) < number or begun[number - 1] in SAFE_STEPS:
            assert guest.fds() == fds
        if len(begun) < number:
            break
    assert number > 30
    line = target.attach(GSI)
    serve_one(guest, line)
    target.detach(line)


@pytest.mark.parametrize(("work", "most"), [("attach", 1), ("detach", 2)])
def test_a_tracer_killed_at_any_step(guest: CountGuest, target: Target, work: str, most: int) -> None:
    """What its last call has opened may be left; that is an irqfd only if it was there before."""
    fds = guest.fds()
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.ptracefaults", str(guest.pid), work],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    match = re.fullmatch(r"(\d+) steps, (\d+) killed, (\d+) left\n", result.stdout)
    assert match is not None, result.stdout
    assert int(match[2]) >= int(match[1]) > 30
    assert int(match[3]) == most
    if work == "attach":
        for fd in guest.fds().keys() - fds.keys():
            with contextlib.closing(EventNotifier(ptrace.pidfd_getfd(target.fileno(), fd))) as left:
                left.set()
                assert left.test_and_clear()  # KVM would have taken it
    line = target.attach(GSI)
    serve_one(guest, line)
    target.detach(line)


def test_hundreds_of_attachments(guest: CountGuest, target: Target) -> None:
    fds = guest.fds()
    for _ in range(300):
        line = target.attach(GSI)
        serve_one(guest, line)
        target.detach(line)
    assert guest.fds() == fds


def test_the_stop_is_measured(guest: CountGuest, target: Target) -> None:
    begin = time.monotonic()
    line = target.attach(10)
    seconds = target.detach(line)
    assert line.seconds > 0
    assert seconds > 0
    assert line.seconds + seconds < time.monotonic() - begin


@pytest.mark.parametrize("gsi", [-1, 24, 1 << 32])
def test_a_gsi_without_a_pin_is_refused(target: Target, gsi: int) -> None:
    with pytest.raises(UsageError, match=f"GSI {gsi} isn't one of 0 to 23"):
        target.attach(gsi)


@pytest.mark.parametrize("irqchip", ["split", "off"])
def test_a_vm_without_a_full_irqchip_is_refused(irqchip: str) -> None:
    # A newer QEMU has no APIC of its own beside KVM.
    with CountGuest(
        f",kernel-irqchip={irqchip}", ["-cpu", "qemu64,-apic"] if irqchip == "off" else []
    ) as guest:
        fds = guest.fds()
        with pytest.raises(
            UsageError, match=r"no full in-kernel irqchip \(QEMU: -machine kernel-irqchip=on\)"
        ):
            Target.open(guest.pid)
        assert guest.fds() == fds
        assert guest.qmp("query-status")["running"]


def test_a_sandboxed_qemu_is_refused() -> None:
    with CountGuest(args=["-sandbox", "on"]) as guest:
        with pytest.raises(UsageError, match=r"is under seccomp, which may kill it \(QEMU: -sandbox off\)"):
            Target.open(guest.pid)
        assert guest.qmp("query-status")["running"]


def test_the_end_of_the_process_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with CountGuest() as guest:
        target = Target.open(guest.pid)
        first, second = target.attach(GSI), target.attach(10)
        assert not select.select([target], [], [], 0)[0]
        os.kill(guest.pid, signal.SIGKILL)
        assert select.select([target], [], [], PATIENCE)[0]
        with pytest.raises(IohubError, match="main thread has exited"):
            target.detach(first)
        guest.process.wait()
        with pytest.raises(IohubError, match=f"pid:{guest.pid}: can't be examined"):
            target.detach(second)
        monkeypatch.setattr(Process, "refuse_unfit", lambda _: {})  # it exits right after it was looked at
        with pytest.raises(PeerGone, match=f"pid:{guest.pid}: has exited"):
            target.attach(GSI)
        assert first.irqfd.fd == second.resamplefd.fd == -1
        target.close()


def test_a_vm_that_was_closed_is_noticed(guest: CountGuest, target: Target) -> None:
    """Its fd number may be anything's by now."""
    target._vm_fd = next(fd for fd, what in guest.fds().items() if what == "anon_inode:[eventfd]")
    with pytest.raises(PeerGone, match="its VM is gone"):
        target.attach(GSI)


def test_another_process_goes_on_with_a_line(guest: CountGuest, target: Target) -> None:
    line = target.attach(GSI)
    fds = guest.fds()
    successor = Target.open(guest.pid, check_irqchip=False)
    adopted = successor.adopt(GSI, os.dup(line.irqfd.fd), os.dup(line.resamplefd.fd))
    line.close()
    serve_one(guest, adopted)
    successor.detach(adopted)
    successor.close()
    assert guest.fds() == fds


def test_a_line_that_is_in_no_vm_is_not_adopted(target: Target) -> None:
    fds = os.eventfd(1), os.eventfd(0)
    with pytest.raises(IohubError, match="no VM takes the events of the irqfd for GSI 5"):
        target.adopt(GSI, *fds)
    for fd in fds:
        os.close(fd)
