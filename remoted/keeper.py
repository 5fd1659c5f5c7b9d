# SPDX-License-Identifier: GPL-2.0-or-later
"""One device's files in the service manager's fd store, and what a successor makes of them.

Their names begin with the device's devfn: ``28.state``, ``28.link``, ``28.reply-read``, ``28.reply-write``,
``28.irqfd-7``, ``28.resamplefd-7``, ``28.bar2`` (the shared memory of a BAR); for RAM see ramfiles.py. Each pair
of eventfds, and each table of RAM regions, has a serial number, and counts once the state names that number, which
is when the store has its files. Files of another number were on their way in or out. A successor doesn't take
them, nor anything of a link that has ended meanwhile: FdStore.drop_inherited() drops what nobody takes.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from common.disposal import Disposal
from common.errors import IohubError, ProtocolError, ShortageError
from common.fdstore import FdStore
from common.journal import RateLimited
from common.messages import Event
from common.notifier import EventNotifier, adopt_pair
from remoted.function import PciFunction
from remoted.iohub import Line, Pirq
from remoted.keptframelink import KeptFrameLink
from remoted.keptlink import KeptLink
from remoted.ramfiles import RamFiles
from remoted.sharedmemory import SharedMemory, bar_memory_name
from remoted.state import FunctionState, StateMismatch

__all__ = ["Keeper", "as_shortage"]

_LINK = ("link", "reply-read", "reply-write")
_LASTING = ("state", "client")
"""what is of the device, not of its present client"""
_Link = TypeVar("_Link", bound=KeptFrameLink)


class Keeper:
    """Keeps one device's state, link, eventfds and RAM in the fd store. It exists only where there is a store."""

    def __init__(
        self,
        store: FdStore,
        ram_files: RamFiles,
        devfn: int,
        function: PciFunction,
        line: Line,
        disposal: Disposal,
    ) -> None:
        """Gives the function the state that the process before this one left, or resets it. Raises OSError."""
        self._store = store
        self._ram_files = ram_files
        self._prefix = f"{devfn:02x}."
        self._function = function
        self._line = line
        self._disposal = disposal
        self._log = RateLimited(function.host.log)
        self._names: set[str] = set()
        """what the store holds for the present link"""
        self._link: KeptFrameLink | None = None
        self._pipe: tuple[int, int] | None = None
        """of the socket that take_socket() has given"""
        self._amiss: list[str] = []
        function.amiss.add(lambda: self._amiss)
        self._state = self._open_state()
        self._keep_bar_memory()
        if self._state.is_new:
            function.full_reset()
        else:
            line.level = int(self._state.restore())
        self.commit()
        function.host.guard.on_done = self.commit
        if function.host.files is not None:
            function.host.files.commit = self.commit
        line.owes_assert = self._state.owes_assert

    def go_on(self) -> None:
        """Lets the function go on, once its link, eventfds and RAM are there again."""
        if not self._state.is_new:
            self._function.go_on()

    def commit(self) -> None:
        """Makes the function's present state valid, after whatever it has done but for a request."""
        self._state.commit()

    def take_socket(self) -> socket.socket | None:
        """The connected socket of the process before this one, to be given to link(); None without one."""
        fd, *pipe = (self._take(name) for name in _LINK)
        if fd != -1 and -1 not in pipe and not self._state.is_new:
            self._pipe = (pipe[0], pipe[1])
            return socket.socket(fileno=fd)
        self._disposal.close_fds(each for each in pipe if each != -1)
        if fd != -1:
            self._disposal.hang_up(socket.socket(fileno=fd))
        self.forget()
        return None

    def link(self, sock: socket.socket, pirq: Pirq) -> KeptLink:
        """A link over the socket, which it owns: a new one, or with the RAM of the one before, and its eventfds.

        ``pirq`` is the function's, and gets the eventfds.
        Raises PeerGone and ProtocolError, when a socket from take_socket() has come to its end, and ShortageError.
        The socket is closed then, and forgotten.
        """
        link, is_new = self._open_link(sock, lambda pipe: KeptLink(sock, pipe, self._state, self._disposal))
        if not is_new:
            self._resume_irqfds(pirq)
            self._resume_ram()
        return link

    def _open_link(self, sock: socket.socket, make: Callable[[tuple[int, int]], _Link]) -> tuple[_Link, bool]:
        """The link that ``make(pipe)`` makes, and whether it is a new one, which is stored. Raises as link()."""
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            try:
                self._link = link = make(pipe)
            except IohubError:
                self.forget()
                raise
            return link, False
        try:
            pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            self._disposal.hang_up(sock)
            raise ShortageError(f"no pipe for replies: {error.strerror}") from error
        self._link = link = make(pipe)
        try:
            with as_shortage("the link can't be kept"):
                for name, fd in zip(_LINK, (sock.fileno(), *pipe), strict=True):
                    self._put(name, fd)
        except ShortageError:
            self._link.close()
            self.forget()
            raise
        return link, True

    def keep_irqfds(self, irqfd: EventNotifier, resamplefd: EventNotifier, done: Callable[[], None]) -> None:
        """Stores the pair of a SET_IRQFD; ``done()`` is called once it would survive this process.

        Until then the message must stay in its socket: the store has neither the old pair nor the new one for a
        moment, since it might be the same, which the store doesn't take twice. Raises ShortageError.
        """
        state, serial = self._state, self._state.irqfds % 255 + 1

        def stored() -> None:
            state.irqfds = serial
            done()

        self._remove(_irqfd_names(state.irqfds))
        with as_shortage("the eventfds can't be kept"):
            for name, notifier in zip(_irqfd_names(serial), (irqfd, resamplefd), strict=True):
                self._put(name, notifier.fd)
            self._store.barrier(stored)

    def keep_ram(self, table: memoryview, fds: Sequence[int], done: Callable[[], None]) -> None:
        """Stores the files of a SYNC_SYSMEM, and its payload; ``done()`` is called once they would survive.

        Raises ShortageError.
        """
        state, serial = self._state, self._state.ram % 255 + 1
        old = set(state.ram_table[1])
        names: list[str] = []

        def stored() -> None:
            state.ram = serial
            for name in old.difference(names):
                self._ram_files.release(self._prefix, name)
            done()

        try:
            with as_shortage("the guest's RAM can't be kept"):
                for fd in fds:
                    names.append(self._ram_files.use(self._prefix, fd))  # noqa: PERF401  those before an error count
                state.put_ram_table(serial, table, names)
                self._store.barrier(stored)
        except ShortageError:
            for name in set(names).difference(old):
                self._ram_files.release(self._prefix, name)
            raise

    def leave(self) -> None:
        """Closes what this process has of the link; the store keeps it for a successor."""
        if self._link is not None:
            self._link.leave()

    def forget(self) -> None:
        """The link has ended: drops all that belonged to it."""
        for name in self._state.ram_table[1]:
            self._ram_files.release(self._prefix, name)
        self._state.irqfds = self._state.ram = 0
        self._state.sent = self._state.serial  # the next link owes no reply of this one
        for slot in range(2):
            self._state.clear_slot(slot)
        self._remove(list(self._names))

    def discard(self) -> None:
        """Drops the state, too: the device is removed."""
        self._store.remove(self._prefix + "state")
        for bar, _ in self._bar_memories():
            self._store.remove(bar_memory_name(self._prefix, bar))
        if self._function.host.files is not None:
            self._function.host.files.discard()

    def close(self) -> None:
        """Closes the state; the store keeps it."""
        self._function.host.guard.on_done = None
        self._line.owes_assert = bytearray(1)
        self._state.close()

    def _keep_bar_memory(self) -> None:
        for bar, memory in self._bar_memories():
            if not memory.is_kept:
                self._store.remove(bar_memory_name(self._prefix, bar))
                self._store.put(bar_memory_name(self._prefix, bar), memory.fd)

    def _bar_memories(self) -> Iterator[tuple[int, SharedMemory]]:
        for bar in self._function.bars:
            memory = self._function.shared_memory(bar)
            if memory is not None:
                yield bar, memory

    def _open_state(self) -> FunctionState:
        fd = self._take("state")
        if fd != -1:
            try:
                return FunctionState(self._function, fd, self._on_void)
            except StateMismatch as error:
                self._log.warning("it starts from reset: %s", error, event=Event.STATE_REFUSED)
                os.close(fd)
        self._store.remove(self._prefix + "state")
        fd = os.memfd_create("iohub-state", os.MFD_CLOEXEC)
        try:
            state = FunctionState(self._function, fd, self._on_void)
        except BaseException:
            os.close(fd)
            raise
        self._store.put(self._prefix + "state", fd)
        return state

    def _on_void(self, reason: str) -> None:
        self._log.error(
            "its state can't be kept, a restart starts it from reset: %s", reason, event=Event.STATE_NOT_KEPT
        )
        self._amiss.append(f"its state can't be kept, a restart starts it from reset: {reason}")

    def _resume_irqfds(self, pirq: Pirq) -> None:
        fds = [self._take(name) for name in _irqfd_names(self._state.irqfds)]
        try:
            if -1 in fds:
                raise ProtocolError("they are not both in the fd store")
            irqfd, resamplefd = adopt_pair(fds[0], fds[1], pirq.is_foreign)
        except IohubError as error:
            self._disposal.close_fds(fd for fd in fds if fd != -1)
            if self._state.irqfds:
                self._log.warning("its eventfds can't be used again: %s", error, event=Event.RESUME_FAILED)
        else:
            pirq.resume(irqfd, resamplefd)

    def _resume_ram(self) -> None:
        table, names = self._state.ram_table
        fds = [self._ram_files.take(self._prefix, name) for name in names]
        if not fds:
            return
        try:
            if -1 in fds:
                raise ProtocolError("a region's file is not in the fd store")
            self._function.host.memory.sync(table, fds)
        except IohubError as error:
            self._log.warning(
                "the guest's RAM can't be used until it is sent again: %s", error, event=Event.RESUME_FAILED
            )
            self._disposal.close_fds(fd for fd in fds if fd != -1)

    def _take(self, name: str) -> int:
        """The file that an earlier process left by that name, or -1."""
        fd = self._store.take_one(self._prefix + name, self._disposal.close_fds)
        if fd != -1 and name not in _LASTING:
            self._names.add(name)
        return fd

    def _put(self, name: str, fd: int) -> None:
        self._names.add(name)
        self._store.put(self._prefix + name, fd)

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:
            self._names.discard(name)
            self._store.remove(self._prefix + name)


@contextlib.contextmanager
def as_shortage(text: str) -> Iterator[None]:
    """Turns an OSError into a ShortageError."""
    try:
        yield
    except OSError as error:
        raise ShortageError(f"{text}: {error.strerror}") from error


def _irqfd_names(serial: int) -> tuple[str, str]:
    return f"irqfd-{serial}", f"resamplefd-{serial}"
