# SPDX-License-Identifier: GPL-2.0-or-later
"""The service manager's fd store: files that outlive the process (sd_notify(3), FDSTORE=1).

The manager gives them back, by name, to the process that it starts next (sd_listen_fds(3)). Sending never blocks:
what the notify socket has no room for waits here. Only after a barrier() does the manager surely have the files;
until then neither what they replace nor the message that brought them may be given up. A manager that does not
answer is waited for once, for a few seconds: then everything goes on, and what it has not taken may be lost.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable, MutableMapping, Sequence
from select import EPOLLHUP, EPOLLOUT

from common.journal import RateLimited
from common.loop import EventLoop, Timer
from common.messages import Event

__all__ = ["FdStore"]

_FIRST_FD = 3  # SD_LISTEN_FDS_START
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "FDSTORE")
_PATIENCE = 3.0
"""seconds that a barrier waits for the manager"""
_MAX_QUEUE = 1024
"""messages that wait for a manager that does not answer; further ones are dropped"""


class FdStore:
    """The store of this process's unit. All methods belong to the loop's thread."""

    def __init__(
        self, loop: EventLoop, log: RateLimited, address: str, inherited: dict[str, list[int]]
    ) -> None:
        """``address`` is the notify socket; ``inherited`` the files that are in the store, by name.

        Raises OSError.
        """
        self._loop = loop
        self._log = log
        self._inherited = inherited
        self._queue: deque[tuple[bytes, list[int]]] = deque()
        self._is_watched = False
        """whether the loop tells when the queue has room"""
        self._barriers: dict[int, tuple[Callable[[], None], Timer]] = {}
        self._is_late = False
        """whether the manager has not answered a barrier in time; the barrier stays, to tell when it does"""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.connect("\0" + address[1:] if address.startswith("@") else address)

    @classmethod
    def open(cls, loop: EventLoop, log: RateLimited, environ: MutableMapping[str, str]) -> FdStore | None:
        """The store of this unit, with what an earlier process left there; None where there is none.

        There is one where ``FDSTORE`` is set: systemd does so since 254; for earlier ones the unit has to. What
        is about the store is taken out of the environment. Raises OSError.
        """
        address = environ.get("NOTIFY_SOCKET")
        values = {name: environ.pop(name, "") for name in _VARIABLES}
        inherited: dict[str, list[int]] = {}
        if values["LISTEN_PID"] == str(os.getpid()) and values["LISTEN_FDS"].isdecimal():
            names = values["LISTEN_FDNAMES"].split(":")
            for index in range(int(values["LISTEN_FDS"])):
                os.set_inheritable(_FIRST_FD + index, False)
                name = names[index] if index < len(names) else ""
                inherited.setdefault(name, []).append(_FIRST_FD + index)
        if not address or values["FDSTORE"] in ("", "0"):
            return None
        return cls(loop, log, address, inherited)

    @property
    def inherited(self) -> list[str]:
        """The names of files that an earlier process left, and nobody has taken."""
        return sorted(self._inherited)

    def take(self, name: str) -> list[int]:
        """The files that an earlier process left by that name, now the caller's; the store keeps its own."""
        return self._inherited.pop(name, [])

    def take_one(self, name: str, close: Callable[[Sequence[int]], object] | None = None) -> int:
        """The first of those files, or -1; ``close()`` closes the others, where that may take long."""
        fd, *others = self.take(name) or (-1,)
        (close or _close)(others)
        return fd

    def drop_inherited(self) -> list[str]:
        """Closes and drops what nobody has taken: it belonged to a device or a link that is no more."""
        dropped = self.inherited
        for name in dropped:
            for fd in self._inherited.pop(name):
                os.close(fd)
            self.remove(name)
        return dropped

    def put(self, name: str, fd: int, *, is_polled: bool = True) -> None:
        """Stores a file; the caller keeps its own copy. Raises OSError when no fd is left for it to wait.

        The manager drops a file that is at its end (EPOLLHUP), unless not ``is_polled`` (FDPOLL=0).
        """
        poll = "" if is_polled else "\nFDPOLL=0"
        self._send(f"FDSTORE=1\nFDNAME={name}{poll}".encode(), (fd,))

    def remove(self, name: str) -> None:
        """Takes every file of that name out of the store."""
        self._send(f"FDSTOREREMOVE=1\nFDNAME={name}".encode(), ())

    def barrier(self, done: Callable[[], None]) -> None:
        """Calls ``done()`` in the loop when the manager has done all that was asked for before (BARRIER=1).

        It is called as well, after some seconds, when the manager does not answer; from then on, until it does,
        without any delay. Raises OSError when no fds or epoll watches are left.
        """
        if self._is_late:
            self._loop.call_later(0, done)
            return
        read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self._loop.add(read_end, lambda _events: self._passed(read_end), EPOLLHUP)
        except OSError:
            os.close(read_end)
            os.close(write_end)
            raise
        timer = self._loop.call_later(_PATIENCE, lambda: self._expired(read_end))
        self._barriers[read_end] = done, timer
        try:
            self._send(b"BARRIER=1", (write_end,))
        except OSError:
            self._forget_barrier(read_end)
            raise
        finally:
            os.close(write_end)

    def close(self) -> None:
        """Closes what belongs to this process; the store stays as it is."""
        for fd in list(self._barriers):
            self._forget_barrier(fd)
        while self._queue:
            _close(self._queue.popleft()[1])
        self._socket.close()

    def _passed(self, read_end: int) -> None:
        if read_end in self._barriers:
            done = self._forget_barrier(read_end)
            if self._is_late:
                self._is_late = False
                self._log.info("the service manager answers again", event=Event.STORE_ANSWERS)
            done()

    def _expired(self, read_end: int) -> None:
        done, timer = self._barriers[read_end]
        self._barriers[read_end] = _nothing, timer
        if not self._is_late:
            self._is_late = True
            self._log.warning(
                "the service manager has not answered for %g s: what it is to keep may be lost",
                _PATIENCE,
                event=Event.STORE_SILENT,
            )
        done()

    def _forget_barrier(self, read_end: int) -> Callable[[], None]:
        done, timer = self._barriers.pop(read_end)
        timer.cancel()
        self._loop.remove(read_end)
        os.close(read_end)
        return done

    def _send(self, message: bytes, fds: Sequence[int]) -> None:
        if self._is_late and len(self._queue) >= _MAX_QUEUE:
            return
        if self._queue or not self._try(message, fds):
            self._queue.append((message, [os.dup(fd) for fd in fds]))
        if self._queue and not self._is_watched:
            with contextlib.suppress(OSError):  # no epoll watch is left; the next message tries again
                self._loop.add(self._socket.fileno(), self._flush, EPOLLOUT)
                self._is_watched = True

    def _try(self, message: bytes, fds: Sequence[int]) -> bool:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._socket.sendmsg([message], rights)
        except BlockingIOError:
            return False
        except OSError:
            # There is no manager any more. A barrier is passed then, as its pipe is closed here.
            pass
        return True

    def _flush(self, _events: int) -> None:
        while self._queue:
            message, fds = self._queue[0]
            if not self._try(message, fds):
                return
            self._queue.popleft()
            _close(fds)
        self._loop.remove(self._socket.fileno())
        self._is_watched = False


def _nothing() -> None:
    pass


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
