# SPDX-License-Identifier: GPL-2.0-or-later
"""What iohubctl status mustn't call healthy, and a QEMU whose VM KVM doesn't announce."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.control import call
from tests.support.checkout import ROOT
from tests.support.qmpbench import EDU, QmpBench
from tests.support.wait import wait_until

pytestmark = pytest.mark.usefixtures("requires_kvm", "requires_qemu")


@pytest.fixture
def bench(bench: QmpBench) -> QmpBench:
    bench.start_remoted()
    return bench


def amiss(bench: QmpBench) -> Any:
    return call(bench.directory / "proxyd.varlink", "org.iohub.Proxyd.Status")["amiss"]


def test_a_qemu_that_is_stopped_by_a_signal_is_amiss(bench: QmpBench) -> None:
    bench.start_guest()
    bench.start_proxyd()
    assert amiss(bench) == []
    os.kill(bench.guest.pid, signal.SIGSTOP)
    stopped = [f"qemu-system-x86[{bench.guest.pid}] is stopped by a signal"]
    wait_until(lambda: amiss(bench) == stopped, "it is told")
    os.kill(bench.guest.pid, signal.SIGCONT)
    wait_until(lambda: amiss(bench) == [], "it is told")
    bench.run_guest()


def test_a_paused_guest_is_amiss(bench: QmpBench) -> None:
    monitor = bench.start_guest()
    monitor.execute("stop")
    bench.start_proxyd()
    assert amiss(bench) == ["the guest is paused"]
    monitor.execute("cont")
    wait_until(lambda: amiss(bench) == [], "it is told")
    monitor.execute("stop")
    wait_until(lambda: amiss(bench) == ["the guest is paused"], "it is told")


def can_unshare() -> bool:
    unshare = ["unshare", "--user", "--map-root-user", "--net", "true"]
    return shutil.which("unshare") is not None and subprocess.run(unshare, check=False).returncode == 0


def test_finds_a_qemu_from_namespaces_of_its_own(tmp_path: Path) -> None:
    """As in a rootless container: uevents arrive only in network namespaces of the initial user namespace."""
    if not can_unshare():
        pytest.skip("user namespaces are not permitted, or unshare is not installed")
    bench = QmpBench(tmp_path, EDU)
    bench.start_remoted()
    arguments = [f"--runtime-dir={tmp_path}", "--name=test", f"--vm=qmp:{bench.monitor_path}"]
    proxyd = subprocess.Popen(
        [
            *("unshare", "--user", "--map-root-user", "--net"),
            *(sys.executable, "-m", "proxyd", *arguments, "--device=id=edu0,addr=05.0"),
        ],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert proxyd.stderr is not None
        assert "nobody listens at" in proxyd.stderr.readline()
        bench.start_guest()
        bench.wait_linked(0)
        bench.run_guest()
    finally:
        proxyd.kill()
        proxyd.communicate()
        bench.close()
