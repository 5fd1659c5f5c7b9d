# SPDX-License-Identifier: GPL-2.0-or-later
"""The state of the attached QEMU that an operator should know: its process, its monitor, its guest's CPUs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from proxyd.vm.procstat import is_stopped
from proxyd.vm.qmp.monitor import Monitor
from proxyd.vm.qmp.qemu import run_state

__all__ = ["Health"]

_ASK_SECONDS = 5.0
"""how often QEMU is asked whether its guest runs, and so whether it answers"""
_SILENCE_SECONDS = 2.0
"""an answer that takes longer is reported"""
_MAX_STATE = 40


class Health:
    """The state of the QEMU that is attached at present."""

    def __init__(self) -> None:
        self.is_running = True
        """whether the guest's CPUs run"""
        self._state = "running"
        self._monitor: Monitor | None = None

    async def begin(self, monitor: Monitor) -> None:
        """Asks a newly attached QEMU for its state. Raises PeerGone and ProtocolError."""
        self.is_running, self._state = await run_state(monitor.execute)
        self._monitor = monitor

    async def watch(self, monitor: Monitor) -> None:
        """Asks again every few seconds. Raises PeerGone and ProtocolError."""
        while True:
            await asyncio.sleep(_ASK_SECONDS)
            # However long it takes: a QEMU that is stopped for a while stays attached.
            self.is_running, self._state = await run_state(monitor.wait_for)

    def on_event(self, name: str) -> None:
        """STOP or RESUME."""
        self.is_running = name == "RESUME"
        self._state = "running" if self.is_running else "paused"

    def end(self) -> None:
        """No QEMU is attached any more."""
        self._monitor = None

    def amiss(self) -> Iterator[str]:
        """A source for common.amiss."""
        if self._monitor is None:
            return
        if is_stopped(self._monitor.peer.pid):
            yield f"{self._monitor.name} is stopped by a signal"
            return
        silent = self._monitor.silent_for
        if silent >= _SILENCE_SECONDS:
            yield f"{self._monitor.name} hasn't answered its monitor for {silent:.0f} s"
        if not self.is_running:
            state = self._state[:_MAX_STATE]
            yield "the guest is paused" if state == "paused" else f"the guest doesn't run: QEMU says {state}"
