# SPDX-License-Identifier: GPL-2.0-or-later
"""The service manager's side of a daemon's life (sd_notify(3))."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import gc
import os
import resource
import socket
import sys
import threading
from collections.abc import Callable

from common.loop import EventLoop

__all__ = [
    "dump_stacks_on_crash",
    "feed_watchdog",
    "freeze_heap",
    "notify",
    "pause_before_restart",
    "raise_fd_limit",
]


_RETRY_SECONDS = 0.5
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
_PAUSE_SECONDS = 1.0


class _Notifier:
    """Sends states to the service manager: at once, or from a thread if its queue is full or no fd is left."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unsent: dict[str, str] = {}
        """the latest assignment of each variable that has not been sent"""
        self._has_thread = False

    def send(self, address: str, state: str) -> None:
        with self._lock:
            for assignment in state.splitlines():
                name = assignment.partition("=")[0]
                self._unsent.pop(name, None)  # the manager goes by the order
                self._unsent[name] = assignment
            if self._has_thread:
                return
            if _send(address, "\n".join(self._unsent.values()), socket.MSG_DONTWAIT):
                self._unsent.clear()
                return
            self._has_thread = True
            try:
                threading.Thread(target=self._run, args=(address,), name="notify", daemon=True).start()
            except RuntimeError:  # no thread can be started now; the next state tries again
                self._has_thread = False

    def _run(self, address: str) -> None:
        while True:
            with self._lock:
                if not self._unsent:
                    self._has_thread = False
                    return
                state = "\n".join(self._unsent.values())
                self._unsent.clear()
            while not _send(address, state, 0):
                threading.Event().wait(_RETRY_SECONDS)


_notifier = _Notifier()


def notify(state: str) -> None:
    """Tells the manager at ``$NOTIFY_SOCKET``, if there is one, such as ``READY=1``; lines are assignments.

    Never blocks: what the manager's queue has no room for is sent as soon as it has. Of several values of one
    variable the manager may then see only the last. One that doesn't listen (any more) is no reason to fail.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith(("/", "@")):
        _notifier.send(address, state)


def dump_stacks_on_crash() -> None:
    """Writes the Python stack of every thread to stderr when a signal ends the process that is a crash.

    SIGABRT is among them, which the manager sends when the watchdog expires (systemd.service(5), WatchdogSec=).
    """
    if sys.__stderr__ is not None:  # otherwise fd 2 may be another file's by now
        faulthandler.enable(2)


def feed_watchdog(loop: EventLoop, describe: Callable[[], str] | None = None) -> None:
    """Lets the manager know, as often as it wants to (``$WATCHDOG_USEC``), that the loop is turning.

    ``describe()`` returns the status to tell with it, in one line. Nothing is done where no watchdog is set up for
    this process.
    """
    interval = os.environ.pop("WATCHDOG_USEC", "")
    pid = os.environ.pop("WATCHDOG_PID", str(os.getpid()))
    if not interval.isdecimal() or pid != str(os.getpid()):
        return
    seconds = int(interval) / 1e6 / 2

    def feed() -> None:
        notify("WATCHDOG=1" if describe is None else f"WATCHDOG=1\nSTATUS={describe()}")
        loop.call_later(seconds, feed)

    feed()


def pause_before_restart(status: int) -> int:
    """Waits for a second where a manager would start the daemon again at once after a failure that may pass.

    That is one with exit status 1 (common.errors.exit_status()). Returns the status.
    """
    if status == 1 and "NOTIFY_SOCKET" in os.environ:
        threading.Event().wait(_PAUSE_SECONDS)
    return status


def _send(address: str, state: str, flags: int) -> bool:
    """Sends one datagram. False if that is worth another try: it would have had to wait, or no fd is left."""
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect(address)
            sock.send(state.encode(), flags)
    except BlockingIOError:
        return False
    except OSError as error:
        return error.errno not in _SHORTAGES
    return True


def raise_fd_limit() -> None:
    """Raises the soft limit of open fds to the hard one: 256 functions with client and eventfds are over 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def freeze_heap() -> None:
    """Exempts what exists now from garbage collection, which begins now: it lives as long as the daemon does.

    A collection that includes it takes milliseconds, in which no interrupt is sent, or an attached VM is stopped.
    What a start leaves that is no longer used is 0.1 MiB; not even once is it worth those milliseconds.
    """
    gc.freeze()
    gc.enable()
