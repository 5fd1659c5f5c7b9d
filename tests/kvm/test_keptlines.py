# SPDX-License-Identifier: GPL-2.0-or-later
"""What a proxyd finds of the lines of the one before it in the fd store, beside a process with a VM."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from common.fdstore import FdStore
from common.journal import RateLimited
from common.link import Client
from common.loop import Loop
from proxyd.vm.pid.inject import Line, Target
from proxyd.vm.pid.keptlines import KeptLines
from tests.support.checkout import ROOT
from tests.support.fds import await_fds, count_fds
from tests.support.storemanager import StoreManager
from tests.support.wait import wait_until

pytestmark = pytest.mark.usefixtures("requires_kvm")

DEVFN, GSI = 0x28, 5


@contextmanager
def vm_process() -> Iterator[int]:
    """The pid of a process with one VM."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.vmholder", "one"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.kill()


class Life:
    """One proxyd's view of a process and of the store."""

    def __init__(self, manager: StoreManager, pid: int, number: int = 0) -> None:
        """``number`` is the process's instead of ``pid``, as if another one had had it before."""
        self._manager = manager
        self._loop = Loop()
        log = RateLimited(logging.getLogger("tests.keptlines"))
        self._store = FdStore(self._loop, log, manager.address, manager.hand_over())
        self.target = Target.open(pid, check_irqchip=False)
        self.target._process.pid = number or pid
        self.kept = KeptLines(self._store, self.target)

    def take(self, path: Path, gsi: int = GSI) -> tuple[Line | None, Client | None]:
        return self.kept.take(DEVFN, gsi, str(path), 2.0)

    def begin(self) -> None:
        self.kept.begin()
        self._manager.serve()

    def close(self) -> None:
        """Its process has ended."""
        self._manager.serve()
        self._store.close()
        self.target.close()
        self._loop.close()


class Bench:
    """A store, a device's socket, and a first life that has left a line and a link there."""

    def __init__(self, directory: Path, pid: int) -> None:
        self.path = directory / "line0.sock"
        self.manager = StoreManager(directory)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        with closing(Life(self.manager, pid)) as life:
            assert not life.kept.is_same
            life.begin()
            client = Client.connect(str(self.path), 2.0)
            line = life.target.attach(GSI)
            life.kept.keep(DEVFN, line, client)
            client.close_own_copy()
            line.close()
        self.device, _ = self._listener.accept()

    def link_has_ended(self) -> bool:
        self.device.setblocking(False)
        try:
            return self.device.recv(1) == b""
        except BlockingIOError:
            return False

    def close(self) -> None:
        self.device.close()
        self._listener.close()
        self.manager.close()


@pytest.fixture
def pid() -> Iterator[int]:
    with vm_process() as pid:
        yield pid


@pytest.fixture
def bench(tmp_path: Path, pid: int) -> Iterator[Bench]:
    before = count_fds()
    with closing(Bench(tmp_path, pid)) as bench:
        yield bench
    await_fds(before)


def test_line_and_link_are_there_for_the_next_life(bench: Bench, pid: int) -> None:
    for _ in range(2):
        with closing(Life(bench.manager, pid)) as life:
            assert life.kept.is_same
            line, client = life.take(bench.path)
            life.begin()
            assert line is not None
            assert client is not None
            line.irqfd.set()
            assert not line.irqfd.is_set(), "the VM takes what is written to it"
            client.close_own_copy()
            line.close()
    assert sorted(bench.manager.files) == ["28.irqfd-5", "28.link-5", "28.resamplefd-5", "process"]
    assert not bench.link_has_ended()


def test_what_was_forgotten_is_gone(bench: Bench, pid: int) -> None:
    with closing(Life(bench.manager, pid)) as life:
        line, client = life.take(bench.path)
        life.kept.forget(DEVFN, GSI)
        assert line is not None
        assert client is not None
        life.target.detach(line)
        client.close_own_copy()
    assert list(bench.manager.files) == ["process"]
    assert bench.link_has_ended()


def test_a_line_of_another_gsi_is_dropped_with_its_link(bench: Bench, pid: int) -> None:
    with closing(Life(bench.manager, pid)) as life:
        assert life.take(bench.path, GSI + 1) == (None, None)
        life.begin()
    assert list(bench.manager.files) == ["process"]
    assert bench.link_has_ended()


def test_lines_of_another_process_are_dropped(bench: Bench) -> None:
    with vm_process() as other, closing(Life(bench.manager, other)) as life:
        assert not life.kept.is_same
        assert life.take(bench.path) == (None, None)
        life.begin()
        assert list(bench.manager.files) == ["process"]
    assert bench.link_has_ended()


def test_a_process_that_has_exited_is_no_other_with_its_number(bench: Bench, pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with vm_process() as other, closing(Life(bench.manager, other, number=pid)) as life:
        assert not life.kept.is_same
        life.begin()
    assert list(bench.manager.files) == ["process"]


def test_a_link_that_leads_elsewhere_is_not_used(bench: Bench, pid: int, tmp_path: Path) -> None:
    with closing(Life(bench.manager, pid)) as life:
        line, client = life.take(tmp_path / "other.sock")
        assert client is None
        assert line is not None
        life.target.detach(line)
    wait_until(bench.link_has_ended, "its end is told")


@pytest.mark.parametrize("missing", ["irqfd", "resamplefd"])
def test_half_a_pair_is_not_used(bench: Bench, pid: int, missing: str) -> None:
    for fd in bench.manager.files.pop(f"28.{missing}-5"):
        os.close(fd)
    with closing(Life(bench.manager, pid)) as life:
        assert life.take(bench.path) == (None, None)
    wait_until(bench.link_has_ended, "its end is told")
