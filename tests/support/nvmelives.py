# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest whose nvme device has one process after the other."""

from __future__ import annotations

import os
import threading
from typing import NoReturn

from common.loop import Loop
from remoted.devices.nvme.controller import Nvme
from remoted.host import Host
from remoted.memory import GuestMemory
from remoted.state import FunctionState
from tests.support.devices import FunctionBench
from tests.support.nvmedriver import Driver
from tests.support.remotebench import Recorder
from tests.support.steploop import run_until

__all__ = ["Machine", "Process"]


def _fail(reason: str) -> NoReturn:
    raise AssertionError(reason)


def _has_no_thread() -> bool:
    """Whether the device's threads have ended, the last of which closes the image."""
    return "nvme" not in [each.name for each in threading.enumerate()]


class Process(FunctionBench[Nvme]):
    """One life of a remoted: a function whose state outlives it."""

    def __init__(self, state_fd: int, drive: str) -> None:
        self.lines = []
        self.loop = Loop()
        host = Host("dev0", self.loop, Recorder().logger, GuestMemory(), self.lines.append)
        self.function = Nvme(host, {"drive": drive})
        self.state = FunctionState(self.function, os.dup(state_fd), _fail)
        if self.state.is_new:
            self.function.full_reset()
            self.place_bars()
        else:
            self.state.restore()
        self.state.commit()
        self.function.host.guard.on_done = self.state.commit

    def write(self, offset: int, size: int, value: int, bar: int = 0) -> None:
        super().write(offset, size, value, bar)
        self.state.commit_reply(0)

    def vanish(self) -> None:
        """Ends what a kill ends."""
        self.function.host.guard.on_done = None
        self.function.shut_down()
        run_until(self.loop, _has_no_thread)
        self.state.close()
        self.loop.close()


class Machine(Driver):
    """A guest that outlives the processes of its device."""

    def __init__(self, drive: str) -> None:
        self._state_fd = os.memfd_create("state", os.MFD_CLOEXEC)
        self._drive = drive
        self.process: Process | None = None
        super().__init__(Loop(), drive=drive)

    def make_bench(self) -> Process:
        self.loop.close()
        self.process = Process(self._state_fd, self._drive)
        self.loop = self.process.loop
        return self.process

    def start_again(self) -> None:
        """The process is gone, and another one takes over."""
        self.vanish()
        self.revive()

    def vanish(self) -> None:
        """The process is gone."""
        assert self.process is not None
        self.lose_ram()
        self.process.vanish()

    def revive(self) -> None:
        """Another process takes over."""
        self.loop = Loop()
        self.bench = process = self.make_bench()
        self.function = process.function
        self.attach_ram()
        process.function.go_on()
        process.state.commit()

    def close(self) -> None:
        super().close()
        assert self.process is not None
        run_until(self.loop, _has_no_thread)
        self.process.state.close()
        self.loop.close()
        os.close(self._state_fd)
