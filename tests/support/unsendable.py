# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that a hostile peer sends because of what their close does."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from common import disposal

__all__ = ["has_passrights", "lasting_eventfd", "returns_soon", "unsendable_socket"]

_LINGER_SECONDS = 3600
_SOON_SECONDS = 20.0

# <asm/unistd_64.h>, <asm-generic/unistd.h>, <linux/userfaultfd.h>
_USERFAULTFD = 323 if os.uname().machine == "x86_64" else 282
_UFFD_API = 0xAA
_UFFDIO_API, _UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00
_MODE_MISSING = 1

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def unsendable_socket() -> Iterator[socket.socket]:
    """A TCP socket whose last close takes an hour, as nobody reads what it has sent, or until the context ends."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        server.bind(("127.0.0.1", 0))
        server.listen()
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
    try:
        sender.setblocking(False)
        try:
            while True:
                sender.send(bytes(1 << 16))
        except BlockingIOError:
            pass
        # A non-blocking socket doesn't linger.
        sender.setblocking(True)
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, _LINGER_SECONDS))
        yield sender
    finally:
        receiver.close()  # with data unread: resets the connection, which ends the linger
        sender.close()


@contextmanager
def lasting_eventfd() -> Iterator[int]:
    """An eventfd, the caller's, whose last close takes until the context ends; skips where that can't be made.

    An epoll watches it whose owner waits for events in memory that a userfaultfd keeps from it, with the epoll's
    mutex.
    """
    faults = _libc.syscall(_USERFAULTFD, os.O_CLOEXEC)
    if faults < 0:
        pytest.skip(f"needs userfaultfd(2): {os.strerror(ctypes.get_errno())}")
    fcntl.ioctl(faults, _UFFDIO_API, struct.pack("QQQ", _UFFD_API, 0, 0))
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(faults, _UFFDIO_REGISTER, struct.pack("QQQQ", address, mmap.PAGESIZE, _MODE_MISSING, 0))
    eventfd, ready = os.eventfd(0), os.eventfd(1)
    with select.epoll() as epoll:
        epoll.register(eventfd, select.EPOLLIN)
        epoll.register(ready, select.EPOLLIN)
        arguments = epoll.fileno(), ctypes.c_void_p(address), 1, -1
        waiter = threading.Thread(target=_libc.epoll_wait, args=arguments, daemon=True)
        waiter.start()
        select.select([faults], [], [])
        try:
            yield eventfd
        finally:
            os.close(faults)  # lets the thread have its memory
            waiter.join()
            os.close(ready)


def has_passrights() -> bool:
    """Whether the kernel lets sockets refuse fds."""
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.getsockopt(socket.SOL_SOCKET, disposal._SO_PASSRIGHTS)
        except OSError:
            return False
    return True


def returns_soon(action: Callable[[], object]) -> bool:
    """Whether an action returns although something it closes doesn't; to be called where that ends afterwards."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(_SOON_SECONDS)
    return not thread.is_alive()
