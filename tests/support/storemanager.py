# SPDX-License-Identifier: GPL-2.0-or-later
"""A service manager's end of the notify socket: its fd store, in the test's own thread."""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
from pathlib import Path

from proxyd.vm.pid.ptrace import same_file

__all__ = ["StoreManager"]


class StoreManager:
    """Does what systemd does with FDSTORE, FDSTOREREMOVE and BARRIER, whenever serve() is called.

    As systemd's, it takes an open file once (kcmp()): under another name it is dropped.
    """

    def __init__(self, directory: Path) -> None:
        self.address = str(directory / "notify")
        self.states: list[str] = []
        """what was said besides"""
        self.files: dict[str, list[int]] = {}
        """what is in the store, by name"""
        self._known: list[str] = []
        """what was in the store at the last barrier"""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.address)
        self._socket.bind(self.address)

    def fileno(self) -> int:
        """The socket's fd."""
        return self._socket.fileno()

    def serve(self) -> int:
        """Takes what has arrived. Returns how many messages that were."""
        count = 0
        while True:
            fds = array.array("i")
            try:
                data, ancillary, _, _ = self._socket.recvmsg(4096, 1024, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return count
            for _, _, rights in ancillary:
                fds.frombytes(rights)
            count += 1
            self._take(dict(line.partition("=")[::2] for line in data.decode().splitlines()), list(fds))

    def serve_until_stored(self, kind: str) -> None:
        """Serves until a file whose name contains that is in the store, and the process knows that it is."""
        while not any(kind in name for name in self._known):
            select.select([self._socket], [], [])
            self.serve()

    def hand_over(self) -> dict[str, list[int]]:
        """Copies of what is in the store, as for the next process."""
        return {name: [os.dup(fd) for fd in fds] for name, fds in self.files.items()}

    def close(self) -> None:
        """Closes the socket and what is in the store."""
        self._socket.close()
        for fds in self.files.values():
            for fd in fds:
                os.close(fd)

    def _take(self, fields: dict[str, str], fds: list[int]) -> None:
        name = fields.get("FDNAME", "")
        if "FDSTORE" in fields:
            for fd in fds:
                if any(same_file(fd, other) for others in self.files.values() for other in others):
                    os.close(fd)
                else:
                    self.files.setdefault(name, []).append(fd)
            return
        if "FDSTOREREMOVE" in fields:
            fds = fds + self.files.pop(name, [])
        elif "BARRIER" in fields:
            self._known = list(self.files)
        else:
            self.states.append(str(fields))
        for fd in fds:
            os.close(fd)
