# SPDX-License-Identifier: GPL-2.0-or-later
"""What the daemon gives to a device: a loop whose callbacks are guarded, a log, the guest's RAM."""

from __future__ import annotations

import contextlib
import math
import os
import re
import socket
import stat
from collections.abc import Callable
from select import EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT

from common.disposal import count_unread
from common.journal import Log
from common.keptfiles import KeptFiles
from common.loop import EventLoop, Timer
from remoted.guard import DEVICE_ERRORS, Guard
from remoted.memory import GuestMemory
from remoted.msi import VectorPort
from remoted.watchdog import Watchdog

__all__ = ["GuardedLoop", "Host", "PeriodicTimer"]

_PROBE_EVERY = 256
"""after so many calls of an fd's handler it is checked whether there was anything to handle"""
_MAX_IDLE_CALLS = 64
"""so many calls in a row that change nothing make the fd edge-triggered"""
_COUNT = r"(?m)^(?:eventfd-count|ticks): *([0-9a-f]+)$"
_MIN_PERIOD = 0.001
_MAX_SECONDS = 1e6
"""epoll_wait(2) takes at most 2**31 ms"""


class _Watched:
    """An fd of the device in the loop, and the guard around its callback."""

    __slots__ = ("_calls", "_doing", "_idle_calls", "_is_edge_triggered", "callback", "events", "fd", "loop")

    def __init__(self, loop: GuardedLoop, fd: int, callback: Callable[[int], None], events: int) -> None:
        self.loop = loop
        self.fd = fd
        self.callback = callback
        self.events = events
        self._doing = f"handling fd {fd} in {_name(callback)}()"
        self._calls = 0
        self._idle_calls = 0
        self._is_edge_triggered = False
        """whether it was made so here"""

    def on_modified(self, events: int) -> None:
        self.events = events
        self._is_edge_triggered = False

    def on_ready(self, ready: int) -> None:
        self._calls += 1
        count = 0
        if self._idle_calls or self._calls >= _PROBE_EVERY:
            self._calls = 0
            if not self.events & EPOLLET:  # an edge is reported only when something happens
                count = _count(self.fd)
                if not count:
                    self._note(_is_at_end(self.fd, ready), "the end of fd {}, which it should remove")
        with self.loop.guard.running(self._doing) as run:
            self.callback(ready)
        if run.failed:
            # It may have removed the fd before it failed.
            with contextlib.suppress(KeyError, OSError):
                self.loop.remove(self.fd)
        elif count and self.loop.watches(self):
            self._note(_count(self.fd) == count, "fd {}, which it should read")

    def _note(self, is_idle: bool, what: str) -> None:
        """Counts calls that change nothing: at the end of a stream, or by what reads neither eventfd nor timerfd.

        As a level such an fd would call the handler in each pass of the loop for ever. As an edge it does so only
        when something happens, and that something makes it a level again.
        """
        if not is_idle:
            self._idle_calls = 0
            if self._is_edge_triggered:
                self._is_edge_triggered = False
                self.loop.inner.modify(self.fd, self.events)
                self.loop.guard.spinning.pop(self.fd, None)
            return
        self._idle_calls += 1
        if self._idle_calls >= _MAX_IDLE_CALLS and not self._is_edge_triggered:
            self._is_edge_triggered = True
            self.loop.inner.modify(self.fd, self.events | EPOLLET)
            self.loop.guard.spins(self.fd, f"{_name(self.callback)}() ignores {what.format(self.fd)}")


class GuardedLoop:
    """The daemon's loop for a device.

    What a callback raises is logged, and ends neither daemon nor loop. A device can reach its own fds only.
    """

    def __init__(self, loop: EventLoop, guard: Guard) -> None:
        self.inner = loop
        self.guard = guard
        self._watched: dict[int, _Watched] = {}

    def add(
        self, fd: int, callback: Callable[[int], None], events: int = EPOLLIN, *, in_turn: bool = False
    ) -> None:
        """As Loop.add(); an fd whose callback fails is watched no more, or it would fail for ever."""
        _check_callable(callback)
        watched = _Watched(self, fd, callback, events)
        self.inner.add(fd, watched.on_ready, events, in_turn=in_turn)
        self._watched[fd] = watched

    def modify(self, fd: int, events: int) -> None:
        """As Loop.modify(). Raises KeyError for an fd that isn't registered."""
        watched = self._watched[fd]
        self.inner.modify(fd, events)
        watched.on_modified(events)

    def remove(self, fd: int) -> None:
        """As Loop.remove(). Raises KeyError for an fd that isn't registered."""
        del self._watched[fd]
        self.guard.spinning.pop(fd, None)
        self.inner.remove(fd)

    def watches(self, watched: _Watched) -> bool:
        """Whether the fd has still been given to this callback, and to no other."""
        return self._watched.get(watched.fd) is watched

    def time(self) -> float:
        """As Loop.time()."""
        return self.inner.time()

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """As Loop.call_later(). Raises ValueError for a time that is negative or longer than 11 days."""
        _check_callable(callback)
        if not 0 <= seconds <= _MAX_SECONDS:
            raise ValueError(f"call_later() takes 0 to {_MAX_SECONDS:.0f} seconds, not {seconds!r}")

        def guarded() -> None:
            with self.guard.running(f"running the timer's {_name(callback)}()"):
                callback()

        return self.inner.call_later(seconds, guarded)

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        """As Loop.call_soon_threadsafe()."""
        _check_callable(callback)

        def guarded() -> None:
            with self.guard.running(f"running {_name(callback)}()"):
                callback()

        self.inner.call_soon_threadsafe(guarded)


class PeriodicTimer:
    """Calls back every so many seconds until cancel(); a call that comes late does not delay those after it."""

    def __init__(self, loop: EventLoop, seconds: float, callback: Callable[[], None]) -> None:
        """Raises ValueError for a period under a millisecond."""
        _check_callable(callback)
        if not (math.isfinite(seconds) and seconds >= _MIN_PERIOD):
            raise ValueError(f"a period is {_MIN_PERIOD} s or more, not {seconds!r}")
        self._loop = loop
        self._seconds = seconds
        self.callback = callback
        self._due = loop.time() + seconds
        self._timer: Timer | None = loop.call_later(seconds, self._expired)

    @property
    def is_active(self) -> bool:
        """Whether there are more calls to come."""
        return self._timer is not None

    def cancel(self) -> None:
        """Prevents all further calls; after it, or a second time, does nothing."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expired(self) -> None:
        now = self._loop.time()
        # Periods that are over already are left out.
        self._due = max(self._due + self._seconds, now)
        self._timer = self._loop.call_later(self._due - now, self._expired)
        self.callback()


class Host:
    """What the daemon gives to a device."""

    __slots__ = (
        "files",
        "guard",
        "has_msix",
        "kept_memory",
        "log",
        "loop",
        "memory",
        "name",
        "set_irq",
        "vectors",
    )

    def __init__(
        self,
        name: str,
        loop: EventLoop,
        log: Log,
        memory: GuestMemory,
        set_irq: Callable[[bool], None],
        watchdog: Watchdog | None = None,
        vectors: VectorPort | None = None,
        kept_memory: Callable[[int], int] = lambda _bar: -1,
        files: KeptFiles | None = None,
        msix: bool = True,
    ) -> None:
        """``loop`` and ``watchdog`` are the daemon's."""
        self.name = name
        """the device's id"""
        self.guard = Guard(log, watchdog or Watchdog())
        """for the daemon: whatever it calls of the device runs in this"""
        self.loop: EventLoop = GuardedLoop(loop, self.guard)
        """timers and fds; what a callback raises is logged"""
        self.log = log
        """its lines name the VM and the device; ``debug()`` is shown with --verbose"""
        self.memory = memory
        """the RAM of the guest that is connected, for DMA while the guest has set bus mastering"""
        self.set_irq = set_irq
        """for the daemon: drives the function's pirq; devices use set_intx()"""
        self.vectors = vectors
        """for the daemon: sends MSI and MSI-X; None where the transport carries none. Devices use raise_irq()"""
        self.has_msix = msix and vectors is not None
        """for the daemon: whether the guest may see MSI-X"""
        self.kept_memory = kept_memory
        """for the daemon: the file with a BAR's shared memory that the previous process had, or -1"""
        self.files = files
        """files of the device's own that outlive the process; None where none do"""


def _name(callback: Callable[..., None]) -> str:
    """A partial() has no name, and a device's object may raise when asked for it."""
    try:
        timer = getattr(callback, "__self__", None)
        return str((timer.callback if isinstance(timer, PeriodicTimer) else callback).__qualname__)
    except DEVICE_ERRORS:
        return type(callback).__name__


def _check_callable(callback: object) -> None:
    if not callable(callback):
        raise TypeError(f"{callback!r} can't be called")


def _is_at_end(fd: int, ready: int) -> bool:
    """Whether a pipe, a stream or a terminal is ready because it has come to its end, and for nothing else."""
    if ready & EPOLLOUT and not ready & (EPOLLHUP | EPOLLERR):
        return False
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or (stat.S_ISSOCK(mode) and _is_stream(fd))):
            return False
        return count_unread(fd) == 0
    except OSError:
        return False


def _count(fd: int) -> int:
    """What an eventfd has counted, or a timerfd; 0 for any other fd (fs/eventfd.c, fs/timerfd.c)."""
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as lines:
            found = re.search(_COUNT, lines.read())
    except OSError:
        return 0
    return int(found[1], 16 if found[0].startswith("e") else 10) if found else 0


def _is_stream(fd: int) -> bool:
    """Whether a socket is a stream: other sockets have empty messages."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        return sock.type == socket.SOCK_STREAM
