# SPDX-License-Identifier: GPL-2.0-or-later
"""Which processes can be made to register irqfds, and the one line that every other gets."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.errors import IohubError, UsageError
from common.notifier import is_eventfd
from proxyd.vm.pid import ptrace
from proxyd.vm.pid.inject import Target
from proxyd.vm.pid.ptrace import pidfd_getfd
from tests.support.checkout import ROOT
from tests.support.fds import count_fds
from tests.support.target import TargetProcess, build, needs_gcc
from tests.support.wait import wait_until

ATTACH = """
import sys
from common.errors import IohubError, UsageError
from common.notifier import is_eventfd
from proxyd.vm.pid import ptrace
from proxyd.vm.pid.ptrace import pidfd_getfd
from proxyd.vm.pid.inject import Target
try:
    target = Target.open(int(sys.argv[1]))
    target.detach(target.attach(5))
    print("attached")
except UsageError as error:
    print(error)
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes users and capabilities, which takes root")
needs_setpriv = pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not installed")


@pytest.fixture(autouse=True)
def no_fd_is_left() -> Iterator[None]:
    before = count_fds()
    yield
    assert count_fds() == before


@contextmanager
def vm_holder(kind: str) -> Iterator[int]:
    """The process id of one, see tests/support/vmholder.py; it has noticed nothing at the end."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.vmholder", kind],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        fds = sorted(os.listdir(f"/proc/{pid}/fd"))
        yield pid
        assert sorted(os.listdir(f"/proc/{pid}/fd")) == fds
        process.stdin.close()
        assert process.wait() == 0


def refusal(pid: int) -> str:
    """The line, without the process id at its beginning."""
    with pytest.raises(UsageError) as caught:
        Target.open(pid)
    line = str(caught.value)
    assert line.startswith(f"pid:{pid}: ")
    assert "\n" not in line
    return line.partition(": ")[2]


@pytest.mark.usefixtures("requires_kvm")
@pytest.mark.parametrize("kind", ["one", "dup"])
def test_a_process_with_one_vm(kind: str) -> None:
    with vm_holder(kind) as pid:
        target = Target.open(pid)
        line = target.attach(5)
        line.irqfd.set()
        assert not line.irqfd.test_and_clear(), "KVM takes what is written to it"
        target.detach(line)
        target.close()


@pytest.mark.usefixtures("requires_kvm")
def test_eventfds_of_another_line_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another thread of the process may put them where the new ones are."""
    with vm_holder("one") as pid:
        target = Target.open(pid)
        first, second = target.attach(5), target.attach(6)
        swapped = itertools.cycle([first.resamplefd, second.irqfd])

        def getfd(pidfd: int, fd: int) -> int:
            copy = pidfd_getfd(pidfd, fd)
            if is_eventfd(copy):
                os.dup2(next(swapped).fd, copy, inheritable=False)
            return copy

        with monkeypatch.context() as patch:
            patch.setattr(ptrace, "pidfd_getfd", getfd)
            with pytest.raises(IohubError, match="an eventfd that another device uses"):
                target.attach(7)
        target.detach(first)
        target.detach(second)
        target.detach(target.attach(7))
        target.close()


@pytest.mark.usefixtures("requires_kvm")
@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("two", "has 2 VMs, can't tell which is meant"),
        ("heir", "its VM was made by another process"),
        ("seccomp", "is under seccomp, which may kill it (QEMU: -sandbox off)"),
    ],
)
def test_other_processes_with_a_vm(kind: str, line: str) -> None:
    with vm_holder(kind) as pid:
        assert refusal(pid) == line


@needs_gcc
def test_a_process_without_a_vm() -> None:
    with TargetProcess("ppoll") as target:
        assert refusal(target.pid) == "has no KVM virtual machine"
        assert target.finish().endswith(" rounds")


def is_executed(pid: int, program: Path) -> bool:
    """Whether execve() is through with its last mapping."""
    return (
        Path(f"/proc/{pid}/exe").readlink() == program and "[vdso]" in Path(f"/proc/{pid}/maps").read_text()
    )


@needs_gcc
def test_a_32_bit_process() -> None:
    program = build("pause32.c", "-m32", "-static", "-nostdlib", "-fno-pie", "-no-pie")
    with subprocess.Popen([program]) as process:
        try:
            wait_until(lambda: is_executed(process.pid, program), "it is executed")
            assert refusal(process.pid) == "isn't an x86-64 program"
            assert process.poll() is None
        finally:
            process.kill()


@needs_gcc
def test_a_process_that_is_traced() -> None:
    with TargetProcess("ppoll") as target:
        ptrace.seize(target.pid, 0)  # this thread's, until the target ends
        assert refusal(target.pid) == f"is traced by process {os.getpid()} already"


def test_a_process_that_has_exited() -> None:
    with subprocess.Popen(["true"]) as process:
        wait_until(lambda: "State:\tZ" in Path(f"/proc/{process.pid}/status").read_text(), "it is a zombie")
        assert refusal(process.pid) == "its main thread has exited"
    assert refusal(process.pid) == "No such process"


@pytest.mark.parametrize("pid", [-1, 0, 1 << 40])
def test_no_process_id_at_all(pid: int) -> None:
    assert refusal(pid) in ("Invalid argument", "no such process")


def test_a_thread_is_no_process() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    assert thread.native_id is not None
    line = refusal(thread.native_id)
    done.set()
    thread.join()
    assert line in ("Invalid argument", "No such file or directory")


def test_another_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = os.uname_result(("Linux", "host", "6.1", "#1", "aarch64"))
    monkeypatch.setattr(os, "uname", lambda: machine)
    assert refusal(os.getpid()) == "works on x86-64 only, this is aarch64"


def attach_with(capabilities: str, pid: int) -> str:
    """What a root with no more than these capabilities has to say about attaching to the process."""
    return subprocess.run(
        ["setpriv", f"--bounding-set={capabilities}", sys.executable, "-c", ATTACH, str(pid)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.rstrip("\n")


@needs_root
@needs_setpriv
@pytest.mark.usefixtures("requires_kvm")
def test_cap_sys_ptrace_is_enough_and_needed() -> None:
    """With it alone the fds of another user's process can't be listed."""
    with vm_holder("nobody") as pid:
        assert attach_with("-all,+sys_ptrace", pid) == "attached"
        line = attach_with("-all", pid)
        assert line.startswith(f"pid:{pid}: ")
        assert " is not permitted: it needs CAP_SYS_PTRACE, or the process's user" in line
