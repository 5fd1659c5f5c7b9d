# SPDX-License-Identifier: GPL-2.0-or-later
"""The watchdog notices whatever the daemon calls of a device, and says how long it took."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest

from common.loop import Loop
from remoted.device import PciFunction
from remoted.host import Host
from remoted.memory import GuestMemory
from remoted.watchdog import Watchdog
from tests.support.remotebench import MEM_BASE, LineDevice, Recorder
from tests.support.wait import wait_until

PATIENCE = 0.1


class Slow(LineDevice):
    """Waits in each of its methods for the test's permission."""

    REGISTERS: ClassVar = {1: {0x8: "STATUS"}}
    permission: threading.Event | None = None
    pause = 0.0
    """seconds that each call takes"""

    def wait(self) -> None:
        if self.permission is not None:
            assert self.permission.wait(20)

    def reset(self) -> None:
        self.wait()

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        self.wait()
        select.select([], [], [], self.pause)
        return 0

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        self.wait()

    def config_read(self, addr: int, size: int) -> int:
        self.wait()
        return super().config_read(addr, size)

    def config_write(self, addr: int, size: int, value: int) -> None:
        self.wait()
        super().config_write(addr, size, value)

    def set_intx(self, level: bool) -> None:
        self.wait()
        super().set_intx(level)

    def close(self) -> None:
        self.wait()

    def on_time(self) -> None:
        self.wait()

    def on_event(self, _events: int) -> None:
        self.wait()
        self.host.loop.remove(_read_end)


_read_end = -1


class Bench:
    """A slow function and a watchdog that is quick to notice."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.log = Recorder()
        self.watchdog = Watchdog(sample_seconds=0.01, patience=PATIENCE)
        self.watchdog.start()
        host = Host("dev0", self.loop, self.log.logger, GuestMemory(), lambda _: None, self.watchdog)
        self.function = Slow(host, {})
        self.function.full_reset()
        self.function.bus_config_write(0x14, 4, MEM_BASE)
        self.function.bus_config_write(0x04, 2, 0x2)
        self.permission = self.function.permission = threading.Event()
        wait_until(lambda: self.watchdog.is_parked, "the watchdog sleeps")

    def close(self) -> None:
        self.permission.set()
        self.watchdog.close()
        self.loop.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def timer(function: PciFunction) -> None:
    assert isinstance(function, Slow)
    function.host.loop.call_later(0, function.on_time)


def event(function: PciFunction) -> None:
    global _read_end
    assert isinstance(function, Slow)
    _read_end, write_end = os.pipe()
    os.close(write_end)
    function.host.loop.add(_read_end, function.on_event)


def soon(function: PciFunction) -> None:
    assert isinstance(function, Slow)
    function.host.loop.call_soon_threadsafe(function.on_time)


CALLS: dict[str, Callable[[PciFunction], object]] = {
    "reading 4 bytes at BAR 1 + 0x8 (STATUS)": lambda function: function.bus_read(True, MEM_BASE + 8, 4),
    "writing 1 bytes at BAR 1 + 0xc": lambda function: function.bus_write(True, MEM_BASE + 12, 1, 0),
    "reading 2 bytes of config space at 0x6": lambda function: function.bus_config_read(6, 2),
    "writing 4 bytes of config space at 0x40": lambda function: function.bus_config_write(0x40, 4, 0),
    "setting the INTx line": lambda function: function.drive_intx(True),
    "close": lambda function: function.shut_down(),
    "running the timer's Slow.on_time()": timer,
    "running Slow.on_time()": soon,
    "handling fd N in Slow.on_event()": event,
}


@pytest.mark.parametrize("doing", CALLS)
def test_whatever_the_daemon_calls_is_watched(bench: Bench, doing: str) -> None:
    function = bench.function

    def call() -> None:
        CALLS[doing](function)
        bench.loop.step()
        bench.loop.step()

    with ThreadPoolExecutor(1) as executor:
        ended = executor.submit(call)
        try:
            wait_until(lambda: function.stall, "the call is noticed")
            if _read_end >= 0:
                doing = doing.replace("fd N", f"fd {_read_end}")
            assert function.stall.startswith("the device's code has not returned for ")
            assert function.stall.endswith(f" s: {doing}")
            assert function.amiss.texts() == [function.stall]
        finally:
            bench.permission.set()
        ended.result(20)
    wait_until(lambda: function.stall.startswith("the device's code took "), "its end is noticed")
    assert function.stall.endswith(f" s: {doing}")
    wait_until(lambda: bench.watchdog.is_parked, "the watchdog sleeps")
    assert [record.levelname for record in bench.log.records] == ["WARNING", "WARNING"]
    function.full_reset()
    assert function.amiss.texts() == []


def test_many_calls_are_not_one(bench: Bench) -> None:
    """Sample after sample finds the same access, but each time another call of it."""
    bench.function.permission = None
    bench.function.pause = PATIENCE / 20
    end = time.monotonic() + 3 * PATIENCE
    while time.monotonic() < end:
        bench.function.bus_read(True, MEM_BASE, 4)
    assert bench.function.stall == ""


def test_the_thread_leaves_the_daemons_signals_to_the_watched_one() -> None:
    watchdog = Watchdog()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    watchdog.start()
    try:
        [thread] = [thread for thread in threading.enumerate() if thread.name == "watchdog"]
        status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
        blocked = int(status.partition("SigBlk:\t")[2].split()[0], 16)
        for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            assert blocked >> (signum - 1) & 1, signum.name
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    finally:
        watchdog.close()
