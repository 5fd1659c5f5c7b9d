# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon's loop stepped from asyncio's: its timers, its fds, its errors."""

from __future__ import annotations

import asyncio
import os

import pytest

from common.loop import Loop
from proxyd.vm.qmp.stepper import Stepper


def run(loop: Loop, expected: asyncio.Event) -> None:
    """Runs both loops until the event comes."""

    async def main() -> None:
        stepper = Stepper(loop, asyncio.Event())
        try:
            async with asyncio.timeout(10.0):
                await expected.wait()
        finally:
            stepper.close()

    asyncio.run(main())


def test_a_timer_that_was_set_before_fires_without_any_other_event(loop: Loop) -> None:
    fired = asyncio.Event()
    loop.call_later(0.01, fired.set)
    run(loop, fired)


def test_a_timer_sets_the_next(loop: Loop) -> None:
    fired = asyncio.Event()

    def next_one() -> None:
        loop.call_later(0.01, fired.set)

    loop.call_later(0.01, next_one)
    run(loop, fired)


def test_an_fd(loop: Loop) -> None:
    ready = asyncio.Event()
    read_end, write_end = os.pipe()
    loop.add(read_end, lambda _events: ready.set())
    os.write(write_end, b"x")
    run(loop, ready)
    loop.remove(read_end)
    os.close(read_end)
    os.close(write_end)


def test_what_a_handler_raises_is_told(loop: Loop) -> None:
    def fail() -> None:
        raise LookupError("a bug")

    async def main() -> None:
        loop.call_later(0, fail)
        stepper = Stepper(loop, asyncio.Event())
        try:
            await stepper.failed
        finally:
            stepper.close()

    with pytest.raises(LookupError):
        asyncio.run(main())
