# SPDX-License-Identifier: GPL-2.0-or-later
"""What the fd store has of the process whose lines are kept there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from common.fdstore import FdStore
from common.journal import RateLimited
from common.loop import Loop
from proxyd.vm.pid.inject import Target
from proxyd.vm.pid.keptlines import KeptLines
from tests.support.checkout import ROOT
from tests.support.remotebench import Recorder
from tests.support.storemanager import StoreManager


@pytest.fixture
def pids(requires_kvm: None) -> Iterator[list[int]]:
    """Two processes with a VM each."""
    command = [sys.executable, "-m", "tests.support.vmholder", "one"]
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline()
    yield [process.pid for process in processes]
    for process in processes:
        process.communicate(timeout=20)


def begin(manager: StoreManager, pid: int) -> bool:
    """Begins as one daemon for that process, and ends; whether it finds that process in the store."""
    with ExitStack() as stack:
        loop = stack.enter_context(closing(Loop()))
        log = RateLimited(Recorder().logger)
        store = stack.enter_context(closing(FdStore(loop, log, manager.address, manager.hand_over())))
        target = stack.enter_context(closing(Target.open(pid, check_irqchip=False)))
        kept = KeptLines(store, target)
        is_same = kept.is_same
        kept.begin()
        manager.serve()
    return is_same


def test_the_store_has_one_process_the_last(tmp_path: Path, pids: list[int]) -> None:
    with closing(StoreManager(tmp_path)) as manager:
        for pid in pids:
            assert not begin(manager, pid)
            assert begin(manager, pid)
            assert len(manager.files["process"]) == 1
