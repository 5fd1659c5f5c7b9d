# SPDX-License-Identifier: GPL-2.0-or-later
"""EventNotifier: owns one eventfd, as QEMU's type of that name does, and never blocks on it.

The peer that shares an eventfd may clear O_NONBLOCK (QEMU does so to every fd that it receives; the flag belongs
to the open file description), read the counter first, or fill it. So O_NONBLOCK is not relied on: reads use
preadv2(2) with RWF_NOWAIT. Eventfds refuse that flag for writes; common.eventsignal has another way.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
from collections.abc import Callable
from typing import Self

from common.errors import ProtocolError, ShortageError
from common.eventsignal import EventSignal

__all__ = ["EventNotifier", "adopt_eventfd", "adopt_pair", "is_eventfd"]

_EVENTFD = "anon_inode:[eventfd]"
_preadv, _RWF_NOWAIT = os.preadv, os.RWF_NOWAIT


class EventNotifier:
    """Owner of an eventfd; ``fd`` is -1 once closed."""

    __slots__ = ("_buffers", "_fd", "_look", "_signal", "_submit", "identity")

    def __init__(self, fd: int, identity: str | None = None) -> None:
        """Takes ownership of an eventfd. Raises OSError, upon which it stays the caller's; see EventSignal."""
        self._signal = EventSignal(fd)
        self.identity = identity
        """the eventfd's number in the kernel, the same for all its fds; None if the eventfd isn't a peer's"""
        self._fd = fd
        self._buffers = [bytearray(8)]
        self._submit = self._signal.submit
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        self._look = poll.poll

    @classmethod
    def create(cls) -> Self:
        """A new eventfd with a zero counter, close-on-exec and non-blocking. Raises OSError."""
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            return cls(fd)
        except OSError:
            os.close(fd)
            raise

    @property
    def fd(self) -> int:
        return self._fd

    def set(self) -> None:
        """Adds one event; a full counter stays at its maximum. Raises OSError after close()."""
        if self._submit() != 1:
            self._signal.retry()

    def is_set(self) -> bool:
        """Whether events are pending; cheaper than a test_and_clear() that finds none."""
        return bool(self._look(0))

    def test_and_clear(self) -> bool:
        """Whether events were pending, any number of them; none is afterwards."""
        try:
            _preadv(self._fd, self._buffers, -1, _RWF_NOWAIT)
        except BlockingIOError:
            return False
        return True

    def release(self) -> int:
        """Gives up the eventfd: the fd is the caller's to close, by a Disposal if a peer has it as well."""
        fd, self._fd = self._fd, -1
        self._signal.disarm()
        return fd

    def close(self) -> None:
        """Closes an eventfd that no peer has; a second call does nothing."""
        fd = self.release()
        if fd != -1:
            os.close(fd)


def adopt_pair(
    irqfd: int, resamplefd: int, is_foreign: Callable[[str], bool]
) -> tuple[EventNotifier, EventNotifier]:
    """Takes ownership of a received irqfd and resamplefd.

    ``is_foreign(identity)`` tells whether another device uses an eventfd. Raises ProtocolError, with both fds
    still the caller's, unless they are two eventfds without EFD_SEMAPHORE that no other device uses;
    ShortageError, likewise, when no fd is left to examine them.

    KVM would consume one of n events of a semaphore, and find the rest at the next assign (virt/kvm/eventfd.c).
    It accepts one eventfd as both, and then asserts the line again after every EOI, for ever. Two devices that
    have each other's irqfd as their resamplefd would assert each other's line for ever.
    """
    identities = _identify(irqfd), _identify(resamplefd)
    if identities[0] == identities[1]:
        raise ProtocolError("irqfd and resamplefd are the same eventfd")
    for identity in identities:
        _check_owner(identity, is_foreign)
    return EventNotifier(irqfd, identities[0]), EventNotifier(resamplefd, identities[1])


def adopt_eventfd(fd: int, is_foreign: Callable[[str], bool]) -> EventNotifier:
    """Takes ownership of one received eventfd; as adopt_pair() otherwise."""
    identity = _identify(fd)
    _check_owner(identity, is_foreign)
    return EventNotifier(fd, identity)


def is_eventfd(fd: int) -> bool:
    """Whether it is an eventfd. Asks nothing of the file itself."""
    with contextlib.suppress(OSError):
        return _kind(fd) == _EVENTFD
    return False


def _check_owner(identity: str, is_foreign: Callable[[str], bool]) -> None:
    if is_foreign(identity):
        raise ProtocolError("an eventfd that another device uses")


def _identify(fd: int) -> str:
    """The number of an eventfd. Raises ProtocolError for an unfit fd, and ShortageError."""
    try:
        kind = _kind(fd)
        if kind != _EVENTFD:
            raise ProtocolError(f"expected an eventfd, got {kind!r}")
        # Not before the kind is known: the filesystem of another file might not answer.
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as lines:
            fields = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise ShortageError(f"an eventfd can't be examined: {error.strerror}") from error
        # Its path is too long.
        raise ProtocolError(f"can't examine an eventfd: {error.strerror}") from error
    if fields.get("eventfd-semaphore", "0") != "0":  # kernels before 6.5 don't tell
        raise ProtocolError("an eventfd with EFD_SEMAPHORE can't carry interrupts")
    identity = fields.get("eventfd-id", "-1")  # since Linux 5.2
    if identity.startswith("-"):  # ida_alloc() failed in do_eventfd() in fs/eventfd.c
        raise ProtocolError("an eventfd without a number can't be told from others")
    return identity


def _kind(fd: int) -> str:
    """The kernel's own name of an open file: that of the kind, or a path, which begins with a slash (d_path())."""
    return os.readlink(f"/proc/self/fd/{fd}")
