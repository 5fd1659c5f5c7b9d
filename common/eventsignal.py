# SPDX-License-Identifier: GPL-2.0-or-later
"""Signalling an eventfd whose other end is hostile, without ever blocking.

A write(2) to an eventfd blocks while its counter is full, unless O_NONBLOCK is set. That flag belongs to the open
file description, so a peer that shares the eventfd may clear it, and fill the counter between a poll and the
write. The kernel's own eventfd_signal() never blocks: a full counter stays at its maximum. It is called when an
asynchronous I/O request with IOCB_FLAG_RESFD completes (aio_complete() in fs/aio.c; io_submit(2)), and KVM
handles it like a write. The request writes zero bytes to /dev/null, so it completes within io_submit().
"""

from __future__ import annotations

import ctypes
import os
from functools import cache, partial

from common.errors import UsageError

__all__ = ["EventSignal", "prepare"]

# asm/unistd_64.h on x86-64, asm-generic/unistd.h elsewhere
_IO_SETUP, _IO_GETEVENTS, _IO_SUBMIT = (206, 208, 209) if os.uname().machine == "x86_64" else (0, 4, 2)
_IOCB_CMD_PWRITE = 1
_IOCB_FLAG_RESFD = 1
_NO_FD = 0xFFFF_FFFF

# PyDLL keeps the interpreter's lock: the calls take about a microsecond and never block.
_syscall = ctypes.PyDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long
_syscall_without_errno = ctypes.PyDLL(None).syscall  # a tenth faster
_syscall_without_errno.restype = ctypes.c_long


class _Iocb(ctypes.Structure):
    """struct iocb of linux/aio_abi.h, little-endian."""

    _fields_ = (
        ("aio_data", ctypes.c_uint64),
        ("aio_key", ctypes.c_uint32),
        ("aio_rw_flags", ctypes.c_int32),
        ("aio_lio_opcode", ctypes.c_uint16),
        ("aio_reqprio", ctypes.c_int16),
        ("aio_fildes", ctypes.c_uint32),
        ("aio_buf", ctypes.c_uint64),
        ("aio_nbytes", ctypes.c_uint64),
        ("aio_offset", ctypes.c_int64),
        ("aio_reserved2", ctypes.c_uint64),
        ("aio_flags", ctypes.c_uint32),
        ("aio_resfd", ctypes.c_uint32),
    )


class _Context:
    """The process's AIO context, and the file that requests go to. Any thread may use it."""

    def __init__(self) -> None:
        """Raises OSError: EAGAIN when other processes have reserved all requests that fs.aio-max-nr allows."""
        context = ctypes.c_ulong(0)
        if _syscall(ctypes.c_long(_IO_SETUP), ctypes.c_uint(1), ctypes.byref(context)) < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), "io_setup")
        self.number = ctypes.c_long(context.value)
        self.null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        events = ctypes.create_string_buffer(128 * 32)  # of struct io_event
        zero, room = ctypes.c_long(0), ctypes.c_long(128)
        self.reap = partial(
            _syscall, ctypes.c_long(_IO_GETEVENTS), self.number, zero, room, events, ctypes.c_void_p(None)
        )
        """removes the results of earlier requests, which makes room for new ones"""


_context = cache(_Context)


def prepare() -> None:
    """Creates the AIO context of the process, so that no EventSignal can fail later. Raises UsageError."""
    try:
        _context()
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}"
        raise UsageError(
            f"no asynchronous I/O, which signals interrupts ({reason}; see aio-max-nr)"
        ) from error


class EventSignal:
    """Signals an eventfd that somebody else owns."""

    __slots__ = ("_arguments", "_reap", "_request", "_requests", "submit")

    def __init__(self, eventfd: int) -> None:
        """Raises OSError if the process has no AIO context and can't create one; see prepare()."""
        context = _context()
        self._request = _Iocb(
            aio_lio_opcode=_IOCB_CMD_PWRITE,
            aio_fildes=context.null,
            aio_flags=_IOCB_FLAG_RESFD,
            aio_resfd=eventfd,
        )
        self._requests = (ctypes.c_void_p * 1)(ctypes.addressof(self._request))
        self._arguments = (ctypes.c_long(_IO_SUBMIT), context.number, ctypes.c_long(1), self._requests)
        self.submit = partial(_syscall_without_errno, *self._arguments)
        """adds 1 to the counter, unless that is at its maximum; retry() is to follow if the result is not 1"""
        self._reap = context.reap

    def retry(self) -> None:
        """Makes room for results, and does it once more. Raises OSError, also after disarm()."""
        self._reap()
        if _syscall(*self._arguments) != 1:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), "io_submit")

    def disarm(self) -> None:
        """Stops signalling. To be called before the eventfd is closed: its number may be reused."""
        self._request.aio_resfd = _NO_FD
