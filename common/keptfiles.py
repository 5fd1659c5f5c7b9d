# SPDX-License-Identifier: GPL-2.0-or-later
"""Files of one device's own that outlive the process, in the service manager's fd store."""

from __future__ import annotations

from collections.abc import Callable

from common.fdstore import FdStore

__all__ = ["KeptFiles"]


class KeptFiles:
    """One device's part of the fd store. It exists only where there is a store.

    The store keeps a file, whatever its other end does, until remove().
    """

    def __init__(self, store: FdStore, prefix: str) -> None:
        """``prefix`` is what the names of the device's files begin with in the store."""
        self._store = store
        self._prefix = prefix
        self._names: set[str] = set()
        self.commit: Callable[[], None] = _nothing
        """makes the device's present state valid: what a next process would begin with"""
        self.outlive = True
        """whether a next process is to have the files; False once the device is removed"""

    def inherited(self, prefix: str) -> list[str]:
        """The names, beginning with ``prefix``, of files that an earlier process left and nobody has taken."""
        start = self._prefix + prefix
        return [name[len(self._prefix) :] for name in self._store.inherited if name.startswith(start)]

    def take(self, name: str) -> int:
        """The file that an earlier process left by that name, now the caller's; -1 if there is none."""
        fd = self._store.take_one(self._prefix + name)
        if fd != -1:
            self._names.add(name)
        return fd

    def put(self, name: str, fd: int) -> None:
        """Stores a file by a name that no other has. The caller keeps its own copy. Raises OSError."""
        self._names.add(name)
        self._store.put(self._prefix + name, fd, is_polled=False)

    def remove(self, name: str) -> None:
        """Takes the file of that name out of the store."""
        self._names.discard(name)
        self._store.remove(self._prefix + name)

    def discard(self) -> None:
        """Takes all files out of the store: the device is removed."""
        self.outlive = False
        for name in sorted(self._names):
            self.remove(name)


def _nothing() -> None:
    pass
