# SPDX-License-Identifier: GPL-2.0-or-later
"""Closing what peers sent, or left behind in a socket, without waiting for them.

A close may take as long as the file's owner likes: a TCP socket lingers (SO_LINGER, socket(7)), a FUSE server
leaves FLUSH unanswered, a UNIX socket closes the fds in its queue first, the last close of a memfd frees some
gigabytes a second. The last close of an eventfd waits for every epoll that watches it (eventpoll_release_file() in
fs/eventpoll.c), and one whose owner lets a page fault in its epoll_wait() last keeps its mutex meanwhile. So only
memory of which another fd is kept is closed at once. All else is closed by a thread, which exists as long as there
is any. Eventfds, of which a client may bring thousands a second, go into the queue of a socket pair first: there
their own fds can be closed at once, and the thread ends the queue by a single call.

The kernel closes fds in the reading thread if a read has no room for them: without a control buffer, with one that
takes fewer than SCM_MAX_FD, or at the process's limit of open files. So every UNIX socket of a daemon is read by
recvmsg(2) with room, also one that refuses fds, which it can since Linux 6.16 only. The limit of open files can
still be reached, hence the bounds here.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import socket
import termios
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from common.notifier import is_eventfd

__all__ = [
    "ANCILLARY_SIZE",
    "Disposal",
    "count_unread",
    "is_memory",
    "receive_urgent_inline",
    "received_fds",
    "refuse_fds",
]

_SCM_MAX_FD = 253
"""fds in one message at most (include/net/scm.h)"""
ANCILLARY_SIZE = socket.CMSG_SPACE(_SCM_MAX_FD * 4)
"""bytes of a control buffer that takes all fds of a message"""

_SO_PASSRIGHTS = 83  # include/uapi/asm-generic/socket.h, since Linux 6.16
_MAX_PENDING = 256
"""fds; the thread may need some milliseconds until it runs, in which a client with unfit fds must not fill it"""


_MAX_BATCHES = 16
"""socket pairs with eventfds that are to be closed, some 500 in each"""


class Disposal:
    """Closes the fds that the peers of one device, or of one other socket, have sent.

    Each device has its own, with its own thread, so that a slow close delays only the peers of that device. As
    long as it ``is_full``, no new ones are served. Any thread may use it.
    """

    def __init__(self, kept: Callable[[], Iterable[int]] = tuple) -> None:
        """``kept()`` returns fds of memory that is in use. Other fds of that memory are closed at once."""
        self._kept = kept
        self._pending: deque[int] = deque()
        self._batches: deque[tuple[int, int]] = deque()
        """socket pairs; in the first one's queue are eventfds"""
        self._is_running = False
        self._lock = threading.Lock()  # never held while an fd is closed

    @property
    def is_full(self) -> bool:
        """Whether so many fds wait to be closed that no more should come."""
        with self._lock:
            self._start()  # no thread could be started before, perhaps
            return len(self._pending) >= _MAX_PENDING

    def close_fds(self, fds: Iterable[int]) -> bool:
        """Closes fds that a peer sent: before it returns if that is quick, soon otherwise.

        Returns whether there were any whose close may take long.
        """
        is_slow = False
        eventfds = []
        for fd in fds:
            if is_eventfd(fd):
                eventfds.append(fd)
            elif is_memory(fd) and self._is_kept(fd):
                os.close(fd)
            else:
                self._hand_over(fd)
                is_slow = True
        if eventfds and not self._put_into_batch(eventfds):
            for fd in eventfds:
                self._hand_over(fd)
            is_slow = True
        return is_slow

    def receive(self, sock: socket.socket, size: int) -> bytes:
        """Reads like sock.recv(), from a UNIX socket on which no fds are expected; fds that arrive are closed.

        Raises OSError.
        """
        data, ancillary, _, _ = sock.recvmsg(size, ANCILLARY_SIZE, socket.MSG_CMSG_CLOEXEC)
        if ancillary:
            self.close_fds(received_fds(ancillary))
        return data

    def hang_up(self, sock: socket.socket) -> None:
        """Ends a connection, at once for its peer and whoever else has a copy, and closes the socket."""
        with contextlib.suppress(OSError):  # it may have ended already
            sock.shutdown(socket.SHUT_RDWR)
        self.close_socket(sock)

    def close_socket(self, sock: socket.socket) -> None:
        """Closes a connected UNIX socket, or a copy: soon, if something lies unread there, which may bring fds.

        Unless it was shut down before, something may still arrive meanwhile. A second call does nothing.
        """
        if sock.fileno() != -1 and count_unread(sock.fileno()):
            self._hand_over(sock.detach())
        else:
            sock.close()

    def _is_kept(self, memory: int) -> bool:
        status = os.fstat(memory)
        return any(os.path.samestat(status, os.fstat(fd)) for fd in self._kept())

    def _put_into_batch(self, eventfds: Sequence[int]) -> bool:
        """Whether there was room: the socket pair has the eventfds then, and they are closed here."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", eventfds))]
        with self._lock:
            try:
                if not self._batches or not _has_sent(self._batches[-1][1], rights):
                    if len(self._batches) == _MAX_BATCHES:
                        return False
                    first, second = socket.socketpair()
                    self._batches.append((first.detach(), second.detach()))
                    if not _has_sent(self._batches[-1][1], rights):
                        return False
            except OSError:
                return False
            for fd in eventfds:
                os.close(fd)
            self._start()
        return True

    def _hand_over(self, fd: int) -> None:
        with self._lock:
            self._pending.append(fd)
            self._start()

    def _start(self) -> None:
        """Makes sure that a thread is closing what is pending; to be called with the lock."""
        if (self._pending or self._batches) and not self._is_running:
            with contextlib.suppress(RuntimeError):  # no thread can be started
                threading.Thread(target=self._run, name="disposal", daemon=True).start()
                self._is_running = True

    def _run(self) -> None:
        while True:
            with self._lock:
                batch = self._batches.popleft() if self._batches else ()
                fds = [self._pending[0]] if self._pending else []
            for fd in (*batch, *fds):
                with contextlib.suppress(OSError):  # the fd is closed all the same (close(2))
                    os.close(fd)
            with self._lock:
                if fds:
                    self._pending.popleft()
                if not self._pending and not self._batches:
                    self._is_running = False
                    return


def _has_sent(end: int, rights: Sequence[tuple[int, int, array.array[int]]]) -> bool:
    """Whether the queue had room. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=end)
    try:
        sock.sendmsg([b"\0"], rights, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    finally:
        sock.detach()
    return True


def is_memory(fd: int) -> bool:
    """Whether it is a file on tmpfs or hugetlbfs, such as a memfd. Doesn't call into any other filesystem.

    Only these have seals (memfd_fcntl() in mm/memfd.c).
    """
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


def refuse_fds(sock: socket.socket) -> None:
    """Lets peers of a UNIX socket send bytes only; of a listening one, the clients that connect from then on.

    Before Linux 6.16 it does nothing: see Disposal.receive().
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise


def receive_urgent_inline(sock: socket.socket) -> None:
    """Makes a byte that is sent with MSG_OOB arrive as any other byte of a UNIX stream.

    Without it the next read drops the byte, and closes its fds in the reading thread (manage_oob() in
    net/unix/af_unix.c).
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)


def received_fds(ancillary: Iterable[tuple[int, int, bytes]]) -> array.array[int]:
    """The fds in the ancillary data of recvmsg(); the caller closes them."""
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds


def count_unread(sock: int) -> int:
    """How many bytes lie unread in a UNIX stream socket (SIOCINQ, unix_ioctl() in net/unix/af_unix.c)."""
    unread = array.array("i", [0])
    fcntl.ioctl(sock, termios.FIONREAD, unread)
    return unread[0]
