# SPDX-License-Identifier: GPL-2.0-or-later
"""The lines of ``--vm pid:PID`` in the service manager's fd store, where they outlive this process.

For each device there are a pair of eventfds and the link that they were sent over, for the process a pidfd. Names
begin with the device's devfn and end with its GSI: ``28.irqfd-10``, ``28.resamplefd-10``, ``28.link-10``; the
pidfd's is ``process``. The link is stored last and removed first, so a link in the store belongs to the pair in
the store. FdStore.drop_inherited() drops what nobody takes: what is of another process, GSI or device.
"""

from __future__ import annotations

import os
import select
import socket

from common.disposal import Disposal
from common.errors import IohubError
from common.fdstore import FdStore
from common.link import Client
from proxyd.vm.pid.inject import Line, Target

__all__ = ["KeptLines"]

_PROCESS = "process"
_PAIR = ("irqfd", "resamplefd")


class KeptLines:
    """What the store has of the lines of one process. It exists only where there is a store."""

    def __init__(self, store: FdStore, target: Target) -> None:
        self._store = store
        self._target = target
        self._disposal = Disposal()
        fds = store.take(_PROCESS)
        self.is_same = len(fds) == 1 and _is_process(fds[0], target.pid)
        """whether what is in the store is of this process, and not of one that had its number before"""
        for fd in fds:
            os.close(fd)

    def take(self, devfn: int, gsi: int, path: str, deadline: float) -> tuple[Line | None, Client | None]:
        """A device's line, and its link: what an earlier process has left. ``path`` is the device's socket.

        A line without a link has lost it meanwhile. Raises IohubError when the pair can't be used; all is
        closed then.
        """
        if not self.is_same:
            return None, None
        prefix = f"{devfn:02x}."
        fds = [self._take(f"{prefix}{name}-{gsi}") for name in (*_PAIR, "link")]
        irqfd, resamplefd, link = fds
        sock = None if link == -1 else socket.socket(fileno=link)
        if irqfd == -1 or resamplefd == -1:
            # It was not yet in use, or not any more.
            self._close(irqfd, resamplefd, sock)
            return None, None
        try:
            line = self._target.adopt(gsi, irqfd, resamplefd)
        except IohubError:
            self._close(irqfd, resamplefd, sock)
            raise
        try:
            return line, None if sock is None else Client.resume(sock, path, deadline)
        except IohubError:
            return line, None

    def begin(self) -> None:
        """Drops what nobody has taken. From now on the store is for this process."""
        self._store.drop_inherited()
        if not self.is_same:
            self._store.remove(_PROCESS)
            self._store.put(_PROCESS, self._target.fileno())
            self.is_same = True

    def keep(self, devfn: int, line: Line, client: Client) -> None:
        """Stores a line that is in use, and its link. Raises OSError when no fds are left."""
        for name, fd in (
            (_PAIR[0], line.irqfd.fd),
            (_PAIR[1], line.resamplefd.fd),
            ("link", client.fileno()),
        ):
            self._store.put(f"{devfn:02x}.{name}-{line.gsi}", fd)

    def forget(self, devfn: int, gsi: int) -> None:
        """Takes a device's line and link out of the store."""
        for name in ("link", *_PAIR):
            self._store.remove(f"{devfn:02x}.{name}-{gsi}")

    def _take(self, name: str) -> int:
        """The file that an earlier process has left by that name, or -1. Of several none is known to be right."""
        fds = self._store.take(name)
        if len(fds) == 1:
            return fds[0]
        self._disposal.close_fds(fds)
        return -1

    def _close(self, irqfd: int, resamplefd: int, sock: socket.socket | None) -> None:
        self._disposal.close_fds(fd for fd in (irqfd, resamplefd) if fd != -1)
        if sock is not None:
            self._disposal.hang_up(sock)


def _is_process(pidfd: int, pid: int) -> bool:
    """Whether it is a pidfd of the process that has this number at present (proc_pid_fdinfo(5))."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    if poll.poll(0):  # it has exited
        return False
    try:
        with open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as lines:
            fields = dict(line.partition(":")[::2] for line in lines)
    except OSError:
        return False
    return fields.get("Pid", "").strip() == str(pid)
