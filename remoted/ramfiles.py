# SPDX-License-Identifier: GPL-2.0-or-later
"""The files of guest RAM in the fd store, which all devices of a VM share.

The store takes an open file once: a second name for it is dropped without a word (fd_store_add() in systemd's
src/core/service.c). So each file is there by one name, that of its inode, as long as any device uses it.
"""

from __future__ import annotations

import os

from common.fdstore import FdStore
from remoted.ramregions import FileKey, file_key

__all__ = ["RamFiles"]


class RamFiles:
    """Which device uses which file."""

    def __init__(self, store: FdStore) -> None:
        self._store = store
        self._users: dict[str, set[str]] = {}
        self._inherited: dict[str, int] = {}

    @staticmethod
    def name(key: FileKey) -> str:
        """The name of a file, which has 32 characters at most.

        One that can only be read has another than one of the same inode that can be written.
        """
        device, inode, is_writable = key
        return f"ram-{device:x}-{inode:x}" + ("" if is_writable else "-r")

    def use(self, user: str, fd: int) -> str:
        """Stores the file for that device, unless it is there already. Returns its name. Raises OSError."""
        name = self.name(file_key(fd))
        if not self._users.get(name):
            self._store.put(name, fd)
        self._users.setdefault(name, set()).add(user)
        return name

    def take(self, user: str, name: str) -> int:
        """A file that an earlier process used for that device, now the caller's; -1 if it isn't there.

        Raises OSError.
        """
        if name not in self._inherited:
            self._inherited[name] = self._store.take_one(name)
        if self._inherited[name] == -1:
            return -1
        self._users.setdefault(name, set()).add(user)
        return os.dup(self._inherited[name])

    def end_of_start(self) -> None:
        """Closes the inherited files: all devices have their copies."""
        for fd in self._inherited.values():
            if fd != -1:
                os.close(fd)
        self._inherited.clear()

    def release(self, user: str, name: str) -> None:
        """The device no longer uses the file. The store drops it with its last user."""
        users = self._users.get(name, set())
        users.discard(user)
        if not users and self._users.pop(name, None) is not None:
            self._store.remove(name)
