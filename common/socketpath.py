# SPDX-License-Identifier: GPL-2.0-or-later
"""The path of a listening UNIX socket: taken for one process at a time, and taken over from one that is gone.

Beside the socket NAME there are two hidden files. ``.NAME.lock`` exists, and is locked, from before the socket is
bound until it listens: until then it looks like one whose daemon is gone. ``.NAME.pid`` holds the pid of the
process that listens; it is needed when that process has been killed and can't end (see is_dying()).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Iterable, Iterator

from common.errors import UsageError
from common.peer import is_dying, peer_credentials
from common.trust import Trust

__all__ = ["SocketInUse", "listen_at", "lock_path", "remove", "resume_at"]

_BACKLOG = 16

# <linux/posix_acl_xattr.h>, <linux/posix_acl.h>
_ACL_XATTR = "system.posix_acl_access"
_ACL_VERSION = struct.pack("<I", 2)
_ACL_ENTRY = struct.Struct("<HHI")
_ACL_USER_OBJ = 0x01
_ACL_USER = 0x02
_ACL_GROUP_OBJ = 0x04
_ACL_MASK = 0x10
_ACL_OTHER = 0x20
_ACL_UNDEFINED_ID = 0xFFFFFFFF
_ACL_READ_WRITE = 6


class SocketInUse(UsageError):
    """Somebody listens at the path."""

    def __init__(self, path: str, owner: str) -> None:
        """``owner`` is the daemon, by name and pid as far as they are known."""
        super().__init__(f"socket {path} is in use by {owner}")
        self.owner = owner


def listen_at(sock: socket.socket, path: str, trust: Trust) -> tuple[int, int]:
    """Binds a UNIX socket to a path and listens there for trusted users. Returns the path's device and inode.

    A socket whose process is gone, or has been killed, is replaced. Raises SocketInUse when a live process has the
    path, UsageError when it is no socket, UntrustedError for the directory, and OSError.
    """
    if "\0" in path:  # bind() would take what comes before it
        raise UsageError(f"socket {path!r}: a path can't contain NUL")
    trust.check_directory(os.path.dirname(path))
    with _locked(path, trust):
        try:
            _bind(sock, path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _remove_stale(path)
            _bind(sock, path)
        inode = _inode(path)
        try:
            if trust.others:
                _admit(path, trust.others)
            sock.listen(_BACKLOG)
            _tell_pid(path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            raise
    return inode


def resume_at(path: str, inode: tuple[int, int], trust: Trust) -> bool:
    """Goes on listening at a path, for trusted users, with a socket of the process before this one.

    ``inode`` is the path's device and inode, as that process has got them from listen_at(). False if something
    else is there now. Raises UsageError and UntrustedError, as listen_at(), and OSError.
    """
    trust.check_directory(os.path.dirname(path))
    try:
        if _inode(path) != inode:
            return False
    except FileNotFoundError:
        return False
    if trust.others:
        _admit(path, trust.others)
    _tell_pid(path)
    return True


def remove(path: str, inode: tuple[int, int]) -> None:
    """Unlinks a path that listen_at() has bound, unless somebody else has bound it since.

    The socket is to be open still: so nobody else's can have its inode.
    """
    with contextlib.suppress(OSError):
        if _inode(path) == inode:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(_pid_path(path))
            os.unlink(path)


def lock_path(path: str) -> str:
    """The file that exists from before a socket is bound at the path until it listens."""
    return _beside(path, "lock")


def _pid_path(path: str) -> str:
    return _beside(path, "pid")


def _beside(path: str, suffix: str) -> str:
    directory, name = os.path.split(path)
    return os.path.join(directory, f".{name}.{suffix}")


def _inode(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _locked(path: str, trust: Trust) -> Iterator[None]:
    """Keeps other daemons from the path meanwhile. Raises UsageError when one is at it, UntrustedError."""
    lock = lock_path(path)
    while True:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            status = os.fstat(fd)
            trust.check_owner(lock, status)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                raise UsageError(f"{lock} exists and is not a lock file")
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if not is_dying(_read_pid(lock)):
                    raise UsageError(f"socket {path} is being taken by another daemon") from error
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(lock)
                continue
            # Who had the lock before may have removed the file since it was opened here.
            if _is_at(lock, fd):
                try:
                    _write_pid(os.dup(fd))
                    yield
                finally:
                    with contextlib.suppress(FileNotFoundError):  # somebody else may have tidied up
                        os.unlink(lock)
                return
        finally:
            os.close(fd)


def _is_at(path: str, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _tell_pid(path: str) -> None:
    """Lets others know who listens at the path."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_pid_path(path))
    _write_pid(os.open(_pid_path(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def _write_pid(fd: int) -> None:
    """Replaces a file's contents by this process's pid, and closes it."""
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
    finally:
        os.close(fd)


def _read_pid(path: str) -> int:
    """The pid in a file, 0 if there is none."""
    try:
        # The file may be anybody's, such as a FIFO that nobody writes to.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return int(os.read(fd, 16))
        finally:
            os.close(fd)
    except (OSError, ValueError):
        return 0


def _bind(sock: socket.socket, path: str) -> None:
    mask = os.umask(0o177)
    try:
        sock.bind(path)
    finally:
        os.umask(mask)


def _admit(path: str, uids: Iterable[int]) -> None:
    """Lets users connect to a socket besides its owner (acl(5))."""
    entries = [
        (_ACL_USER_OBJ, _ACL_READ_WRITE, _ACL_UNDEFINED_ID),
        *((_ACL_USER, _ACL_READ_WRITE, uid) for uid in sorted(uids)),
        (_ACL_GROUP_OBJ, 0, _ACL_UNDEFINED_ID),
        (_ACL_MASK, _ACL_READ_WRITE, _ACL_UNDEFINED_ID),
        (_ACL_OTHER, 0, _ACL_UNDEFINED_ID),
    ]
    acl = _ACL_VERSION + b"".join(_ACL_ENTRY.pack(*entry) for entry in entries)
    try:
        os.setxattr(path, _ACL_XATTR, acl)
    except OSError as error:
        raise UsageError(
            f"socket {path}: its filesystem can't admit users by name: {error.strerror}"
        ) from error


def _remove_stale(path: str) -> None:
    """Unlinks a socket that nobody listens on. Raises SocketInUse for a live one, UsageError for other files."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise UsageError(f"{path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        result = probe.connect_ex(path)
        if result == 0:
            peer = peer_credentials(probe)
            if not is_dying(peer.pid):
                raise SocketInUse(path, str(peer))
        elif result != errno.ECONNREFUSED and not is_dying(_read_pid(_pid_path(path))):
            raise SocketInUse(path, "a live daemon")  # its queue is full
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
