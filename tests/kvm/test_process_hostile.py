# SPDX-License-Identifier: GPL-2.0-or-later
"""A process that lies to the daemon that makes calls in it: it costs that process's lines, and nothing waits."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from common.errors import IohubError, UsageError
from proxyd.vm.pid import inject
from proxyd.vm.pid.inject import Target
from proxyd.vm.pid.remotecall import StoppedThread, Syscall
from tests.support.checkout import ROOT
from tests.support.fds import no_fd_is_left
from tests.support.wait import wait_until

pytestmark = pytest.mark.usefixtures("requires_kvm")

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="userfaultfd(2) for the kernel's accesses takes root"
)


class Liar:
    """A process with a VM, and numbers of its other files."""

    def __init__(self, kind: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.vmholder", kind],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        pid, *files = self.process.stdout.readline().split()
        self.pid = int(pid)
        self.files = {name: int(fd) for name, _, fd in (file.partition("=") for file in files)}

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def liar() -> Iterator[Liar]:
    liar = Liar("odd")
    with no_fd_is_left():
        yield liar
    liar.close()


@pytest.mark.parametrize(
    ("named", "line"),
    [
        ("stream", "it has put another file in place of its socket pair"),
        ("datagram", "it has filled its socket pair"),
        ("tcp", "it has put another file in place of its socket pair"),
        ("listener", "it has put another file in place of its socket pair"),
        ("pipe", "it has put another file in place of its socket pair"),
        ("file", "it has put another file in place of its socket pair"),
        (-1, "close in process PID: Bad file descriptor"),
        ((1 << 31) - 1, "close in process PID: Bad file descriptor"),
    ],
)
def test_another_file_instead_of_the_socket_pair(
    liar: Liar, monkeypatch: pytest.MonkeyPatch, named: str | int, line: str
) -> None:
    """Such as a socket that is full and blocks: a send to it would never end."""
    number = named if isinstance(named, int) else liar.files[named]
    get = StoppedThread.get

    def lie(self: StoppedThread, address: int, size: int) -> bytes:
        true = get(self, address, size)
        return struct.pack("ii", number, struct.unpack("ii", true)[1]) if size == 8 else true

    target = Target.open(liar.pid)
    attached = target.attach(5)
    with monkeypatch.context() as patch:
        patch.setattr(StoppedThread, "get", lie)
        with pytest.raises(IohubError) as caught:
            target.detach(attached)
    assert str(caught.value) == f"pid:{liar.pid}: {line}".replace("PID", str(liar.pid))
    assert attached.irqfd.fd == attached.resamplefd.fd == -1
    target.detach(target.attach(5))
    target.close()


@pytest.mark.parametrize("named", ["stream", "tcp", "pipe", "file"])
def test_another_file_instead_of_an_eventfd(liar: Liar, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    call = StoppedThread.call

    lies = [liar.files[named]]

    def lie(self: StoppedThread, number: Syscall, *arguments: int) -> int:
        return lies.pop() if lies and number is Syscall.eventfd2 else call(self, number, *arguments)

    target = Target.open(liar.pid)
    with monkeypatch.context() as patch:
        patch.setattr(StoppedThread, "call", lie)
        with pytest.raises(IohubError, match="expected an eventfd, got"):
            target.attach(5)
    target.detach(target.attach(5))
    target.close()


@needs_root
def test_code_whose_pages_never_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inject, "_LOOK_SECONDS", 0.2)
    threads = threading.active_count()
    liar = Liar("slow")
    try:
        with pytest.raises(UsageError, match=rf"^can't look at process {liar.pid}: not done within 0\.2 s$"):
            Target.open(liar.pid)
        assert threading.active_count() == threads + 1, "the look goes on, and nobody waits for it"
    finally:
        liar.close()
    wait_until(
        lambda: threading.active_count() == threads, "the process has gone, and so the look at it ends"
    )
