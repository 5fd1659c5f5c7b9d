# SPDX-License-Identifier: GPL-2.0-or-later
"""Waiting for a daemon to have nothing left to do: its requests are handled, and its log is written."""

from __future__ import annotations

import time
from pathlib import Path

from common.ctl.children import Child
from tests.support.wait import wait_until

__all__ = ["settled_log", "switches", "wait_asleep"]


def switches(pid: int) -> dict[str, tuple[str, ...]]:
    """State and context switches of every thread."""
    found: dict[str, tuple[str, ...]] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            lines = (task / "status").read_text(encoding="utf-8").splitlines()
        except (FileNotFoundError, ProcessLookupError):  # the thread has ended
            continue
        fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        found[task.name] = (
            fields["State"],
            fields["voluntary_ctxt_switches"],
            fields["nonvoluntary_ctxt_switches"],
        )
    return found


def wait_asleep(pid: int, seconds: float = 0.0) -> dict[str, tuple[str, ...]]:
    """Waits until every thread sleeps, and has not run since the look before and for so many seconds.

    Returns their switches().
    """
    last: dict[str, tuple[str, ...]] = {}
    since = time.monotonic()

    def settled() -> bool:
        nonlocal last, since
        before, last = last, switches(pid)
        if before != last or not all(state.startswith("S") for state, _, _ in last.values()):
            since = time.monotonic()
            return False
        return time.monotonic() - since >= seconds

    wait_until(settled, f"process {pid} goes to sleep")
    return last


def settled_log(child: Child) -> str:
    """What a running daemon has logged about all that it was asked to do so far."""
    wait_asleep(child.process.pid)
    return child.log.read_text()
