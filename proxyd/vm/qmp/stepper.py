# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon's loop, stepped from asyncio's, and the end of asyncio's tasks."""

from __future__ import annotations

import asyncio
from typing import Any

from common.errors import IohubError
from common.loop import Loop

__all__ = ["Stepper", "cancel"]


class Stepper:
    """Steps the daemon's loop whenever asyncio's finds it ready; an exception in there ends up in ``failed``."""

    def __init__(self, loop: Loop, stopped: asyncio.Event) -> None:
        """Sets ``stopped`` when the loop is."""
        self._stopped = stopped
        self._asyncio = asyncio.get_running_loop()
        self.failed: asyncio.Future[None] = self._asyncio.create_future()
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._asyncio.add_reader(loop.fileno(), self._step)
        self._asyncio.call_soon(self._step)  # timers may have been set already

    def close(self) -> None:
        """Steps it no more."""
        self._asyncio.remove_reader(self._loop.fileno())
        if self._timer is not None:
            self._timer.cancel()
        self.failed.cancel()

    def _step(self) -> None:
        try:
            self._loop.step(0)
        except BaseException as error:  # noqa: BLE001  asyncio would log it and go on
            self._asyncio.remove_reader(self._loop.fileno())
            if not self.failed.done():
                self.failed.set_exception(error)
            return
        if self._loop.is_stopped:
            self._stopped.set()
        if self._timer is not None:
            self._timer.cancel()
        seconds = self._loop.until_next_timer()
        self._timer = None if seconds is None else self._asyncio.call_later(seconds, self._step)


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    """Ends tasks. Raises what one of them has raised that isn't the peers' doing."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception) and not isinstance(result, IohubError):
            raise result
