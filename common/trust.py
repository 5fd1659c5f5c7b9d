# SPDX-License-Identifier: GPL-2.0-or-later
"""Which users a daemon trusts: with the directories that its sockets are in, and at the other end of a socket.

Root and the daemon's own user are always trusted, others only by name (``--allow-user``). A path is as
trustworthy as the least trustworthy directory or symbolic link on the way to it: its owner can put another file
there. So each has to belong to a trusted user and be closed to writers other than its owner. In a directory with
the sticky bit, such as /tmp, anybody may create files, but only their owners may replace them (inode(7)).
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import socket
import stat
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from common.errors import UntrustedError, UsageError
from common.journal import printable
from common.peer import peer_credentials
from common.text import is_number

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["MAX_SOCKET_PATH", "TRUST", "Trust", "find_user"]

_MAX_LINKS = 40
"""symbolic links on the way to a file, as in the kernel (MAXSYMLINKS in include/linux/namei.h)"""
MAX_SOCKET_PATH = 107
"""bytes of sun_path (unix(7)) less its terminating null"""
_MAX_UID = (1 << 32) - 2
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Trust:
    """A set of trusted users."""

    def __init__(self, others: Iterable[int] = ()) -> None:
        """``others`` are uids that are trusted besides root and the process's own user."""
        self.others = frozenset(others)

    def allow(self, uids: Iterable[int]) -> None:
        """Trusts more users."""
        self.others |= frozenset(uids)

    def with_appointed(self, directory: Path) -> Trust:
        """These users, and the one to whom root has given the directory, as systemd does for a unit.

        Nobody but root can have done so where all directories above it belong to root and are closed to other
        writers; here the sticky bit is no exception. Elsewhere nobody is added.
        """
        try:
            for parent in directory.absolute().parents:
                status = os.lstat(parent)
                if status.st_uid != 0 or not stat.S_ISDIR(status.st_mode) or status.st_mode & _OTHERS_WRITE:
                    return self
            status = os.lstat(directory)
        except OSError:
            return self
        return Trust({*self.others, status.st_uid}) if stat.S_ISDIR(status.st_mode) else self

    def includes(self, uid: int) -> bool:
        """Whether a user is trusted."""
        return uid in (0, os.geteuid()) or uid in self.others

    def check_directory(self, path: str | os.PathLike[str]) -> None:
        """Raises UntrustedError if an untrusted user can replace the directory or files of its owner there.

        Raises OSError if it isn't there.
        """
        self._walk(path)

    def check_socket(self, path: str | os.PathLike[str]) -> None:
        """Raises UntrustedError if an untrusted user owns the socket or can replace it.

        Raises OSError if it isn't there.
        """
        self._walk(path)

    def check_peer(self, sock: socket.socket) -> None:
        """Raises UntrustedError unless a trusted user's process is at the other end, and OSError."""
        peer = peer_credentials(sock)
        if not self.includes(peer.uid):
            raise UntrustedError(f"{peer} belongs to user {peer.uid}, who is not trusted (--allow-user)")

    def connect(self, sock: socket.socket, path: str | os.PathLike[str]) -> None:
        """Connects a UNIX socket to a path, with all checks. Raises UntrustedError, and OSError as connect(2)."""
        if len(os.fsencode(path)) > MAX_SOCKET_PATH:  # no such socket can be there
            raise OSError(errno.ENAMETOOLONG, "the path is too long for a socket", os.fspath(path))
        self.check_socket(path)
        sock.connect(os.fspath(path))
        self.check_peer(sock)

    def check_owner(self, path: str, status: os.stat_result) -> None:
        """Raises UntrustedError unless a file, by what stat(2) tells of it, belongs to a trusted user."""
        if not self.includes(status.st_uid):
            raise UntrustedError(
                f"{printable(path)} belongs to user {status.st_uid}, who is not trusted (--allow-user)"
            )

    def _walk(self, path: str | os.PathLike[str]) -> None:
        """Looks at everything on the way to a file, in the order of path_resolution(7), and at the file.

        Whatever has passed can't be replaced by untrusted users any more when the next one is looked at.
        """
        names = _names(os.path.join(os.getcwd(), path))
        at = "/"
        self._check(at, os.lstat(at))
        links = 0
        while names:
            name = names.pop()
            if name == "..":
                at = os.path.dirname(at)
                continue
            here = os.path.join(at, name)
            status = os.lstat(here)
            self._check(here, status)
            if not stat.S_ISLNK(status.st_mode):
                at = here
                continue
            links += 1
            if links > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path))
            target = os.readlink(here)
            names += _names(target)
            if target.startswith("/"):
                at = "/"

    def _check(self, path: str, status: os.stat_result) -> None:
        self.check_owner(path, status)
        writers = status.st_mode & _OTHERS_WRITE
        if not stat.S_ISDIR(status.st_mode) or not writers or status.st_mode & stat.S_ISVTX:
            return
        if writers == stat.S_IWGRP and status.st_gid == _private_group(os.geteuid()) and not _has_acl(path):
            return
        who = "everybody" if writers & stat.S_IWOTH else f"group {status.st_gid}"
        raise UntrustedError(
            f"directory {printable(path)} can be written by {who} (mode {stat.S_IMODE(status.st_mode):04o})"
        )


TRUST = Trust()
"""the users whom this process trusts; main() adds those of ``--allow-user``"""


def find_user(name: str) -> int:
    """The uid of a user, given by name or number. Raises UsageError for one that doesn't exist."""
    if is_number(name) and int(name) <= _MAX_UID:
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid
    except (KeyError, ValueError):  # ValueError: NUL in the name
        raise UsageError(f"there is no user {name!r}") from None


def _names(path: str) -> list[str]:
    """The path's components, the last one first."""
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def _has_acl(path: str) -> bool:
    """Whether a directory has an access control list: the group bits of its mode may be others' then (acl(5))."""
    try:
        os.getxattr(path, "system.posix_acl_access")
    except OSError:
        return False
    return True


@cache
def _private_group(uid: int) -> int | None:
    """The group that has this user as its only member, as many distributions give each user one (umask 002)."""
    try:
        user = pwd.getpwuid(uid)
        group = grp.getgrgid(user.pw_gid)
    except KeyError:
        return None
    return group.gr_gid if group.gr_name == user.pw_name and not group.gr_mem else None
