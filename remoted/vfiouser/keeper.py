# SPDX-License-Identifier: GPL-2.0-or-later
"""A vfio-user client's files in the fd store, besides those that remoted.keeper tells of.

``28.client`` (remoted.vfiouser.clientstate), and ``28.event-17`` for each eventfd, by its number in the kernel:
the store takes an eventfd once, and a client may use it for several vectors.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from common.disposal import Disposal
from common.errors import IohubError, ProtocolError, ShortageError
from common.fdstore import FdStore
from common.messages import Event
from common.notifier import EventNotifier
from common.vfiouser import DMA_MAP, DMA_UNMAP, Command
from remoted.function import PciFunction
from remoted.keeper import Keeper, as_shortage
from remoted.msi import VectorKind
from remoted.ramfiles import RamFiles
from remoted.ramregions import file_key
from remoted.vfiouser.clientstate import ClientState, IrqTable, Request
from remoted.vfiouser.keptlink import KeptVfioUserLink
from remoted.vfiouser.ramtable import RamEntry
from remoted.vfiouser.vectors import Vectors

__all__ = ["VfioUserKeeper"]


class VfioUserKeeper(Keeper):
    """Keeps one device's state, and link, eventfds and RAM of its vfio-user client, in the fd store."""

    def __init__(
        self,
        store: FdStore,
        ram_files: RamFiles,
        devfn: int,
        function: PciFunction,
        vectors: Vectors,
        disposal: Disposal,
    ) -> None:
        """As Keeper; ``vectors`` are the function's, with its line."""
        super().__init__(store, ram_files, devfn, function, vectors.line, disposal)
        self._vectors = vectors
        self._stored_ram: Counter[str] = Counter()
        """how many regions use a file"""
        self._stored_events: set[str] = set()
        """what the tables that are valid, or are about to be, refer to"""
        self._stale_ram: set[str] = set()
        self._stale_events: set[str] = set()
        """what they have referred to before the last request"""
        self._staged: tuple[int, int] | None = None
        """a table of interrupts and a change of RAM that are valid once the store has their files"""
        fd = self._take("client")
        if fd == -1:
            fd = os.memfd_create("iohub-client", os.MFD_CLOEXEC)
            try:
                store.put(self._prefix + "client", fd)
            except OSError:
                os.close(fd)
                raise
        self._client = ClientState(fd)

    def client_link(self, sock: socket.socket) -> KeptVfioUserLink:
        """A link over the socket, which it owns: a new one, or with interrupts and RAM of the one before.

        Raises as Keeper.link().
        """
        if self._pipe is None:
            self._client.note(self._state.serial, Request(), b"")
            self._client.consumed = self._state.serial
            self._client.ram.clear()
        link, is_new = self._open_link(sock, self._make_link(sock))
        if not is_new:
            request = self._client.request(self._state.serial)
            if request.has_tables:
                self._resume_vectors(self._client.irqs(request.irq_table))
                self._resume_regions(self._client.ram.resume(request.ram_change))
        return link

    def forget(self) -> None:
        super().forget()
        for name in self._stored_ram.keys() | self._stale_ram:
            self._ram_files.release(self._prefix, name)
        self._stored_ram, self._stale_ram = Counter(), set()
        self._stored_events, self._stale_events = set(), set()
        self._staged = None

    def discard(self) -> None:
        super().discard()
        self._store.remove(self._prefix + "client")

    def close(self) -> None:
        super().close()
        self._client.close()

    def _make_link(self, sock: socket.socket) -> Callable[[tuple[int, int]], KeptVfioUserLink]:
        return lambda pipe: KeptVfioUserLink(
            sock, pipe, self._state, self._client, self._store_tables, self._disposal
        )

    def _store_tables(
        self, command: int, payload: memoryview, done: Callable[[], None]
    ) -> tuple[int, int] | None:
        """See KeptVfioUserLink. Raises ShortageError."""
        if self._staged is not None:
            tables, self._staged = self._staged, None
            return tables
        if self._stale_ram or self._stale_events:
            self._drop_stale()
        last = self._client.request(self._state.serial)
        irqs, change, are_new = last.irq_table, last.ram_change, False
        with as_shortage("the client's files can't be kept"):
            if command == Command.DEVICE_SET_IRQS or not last.has_tables:
                irqs = 1 - irqs
                are_new = self._store_irqs(irqs)
            if command in (Command.DMA_MAP, Command.DMA_UNMAP):
                change += 1
                are_new = self._store_ram(command, payload, change)
            if are_new:
                self._staged = irqs, change
                self._store.barrier(done)
                return None
        return irqs, change

    def _drop_stale(self) -> None:
        for name in self._stale_ram:
            self._ram_files.release(self._prefix, name)
        self._remove(sorted(self._stale_events))
        self._stale_ram, self._stale_events = set(), set()

    def _store_irqs(self, index: int) -> bool:
        """Writes a table of interrupts, and stores the eventfds that are new; whether there are any."""
        events: dict[str, EventNotifier] = {}

        def key(notifier: EventNotifier | None) -> int:
            if notifier is None or notifier.identity is None:
                return 0
            events[f"event-{notifier.identity}"] = notifier
            return int(notifier.identity) + 1

        trigger, unmask, is_masked = self._vectors.line.kept
        attached, masked = {}, {}
        for kind in VectorKind:
            notifiers, masks = self._vectors.kept(kind)
            attached[kind] = {vector: key(notifier) for vector, notifier in notifiers.items()}
            masked[kind] = set(masks)
        self._client.put_irqs(index, IrqTable(is_masked, key(trigger), key(unmask), attached, masked))
        new = events.keys() - self._stored_events
        for name in new:
            self._put(name, events[name].fd)
        self._stale_events = self._stored_events - events.keys()
        self._stored_events = set(events)
        return bool(new)

    def _store_ram(self, command: int, payload: memoryview, change: int) -> bool:
        """Notes the change of a region, and stores its file if that is new; whether it is."""
        memory, table = self._function.host.memory, self._client.ram
        if memory.is_empty:
            for each in table:
                self._unuse(table.drop(each, change))
            return False
        layout, index = (DMA_MAP, 3) if command == Command.DMA_MAP else (DMA_UNMAP, 2)
        start = layout.unpack_from(payload)[index]
        mapping, entry = memory.mapping(start), table.get(start)
        if mapping is None:
            if entry is not None:
                self._unuse(table.drop(start, change))
            return False
        size, offset, fd, can_read, can_write = mapping
        file = (0, 0, False) if fd == -1 else file_key(fd)
        wanted = RamEntry(start, size, offset, *file, can_read, can_write)
        if entry == wanted:
            return False
        table.add(wanted, change)
        if entry is not None:  # which the previous process has left, and this one could not use
            self._unuse(entry)
        if fd == -1:
            return False
        name = self._ram_files.name(file)
        self._stored_ram[name] += 1
        if self._stored_ram[name] == 1:
            self._ram_files.use(self._prefix, fd)
        return self._stored_ram[name] == 1

    def _unuse(self, entry: RamEntry) -> None:
        """A region has gone; with the next request its file leaves the store, if no other region uses it."""
        if entry.file is not None:
            name = self._ram_files.name(entry.file)
            self._stored_ram[name] -= 1
            if not self._stored_ram[name]:
                del self._stored_ram[name]
                self._stale_ram.add(name)

    def _resume_vectors(self, table: IrqTable) -> None:
        fds: dict[int, int] = {}

        def adopt(key: int) -> EventNotifier | None:
            if not key:
                return None
            if key not in fds:
                fds[key] = self._take(f"event-{key - 1}")
            if fds[key] == -1:
                raise ProtocolError("an eventfd is not in the fd store")
            self._stored_events.add(f"event-{key - 1}")
            fd = os.dup(fds[key])
            try:
                return self._vectors.line.adopt(fd)
            except IohubError:
                os.close(fd)
                raise

        try:
            line = adopt(table.trigger), adopt(table.unmask)
            self._vectors.line.resume(*line, table.is_masked)
            for kind in VectorKind:
                adopted = {vector: adopt(key) for vector, key in table.attached[kind].items()}
                attached = {vector: notifier for vector, notifier in adopted.items() if notifier is not None}
                self._vectors.resume(kind, attached, table.masked[kind])
        except (IohubError, OSError) as error:
            self._log.warning("its eventfds can't be used again: %s", error, event=Event.RESUME_FAILED)
        finally:
            self._close(fds.values())

    def _resume_regions(self, table: Sequence[RamEntry]) -> None:
        memory = self._function.host.memory
        for each in table:
            if each.file is not None:
                self._stored_ram[self._ram_files.name(each.file)] += 1
        try:
            for each in table:
                fd = -1
                if each.file is not None:
                    fd = self._ram_files.take(self._prefix, self._ram_files.name(each.file))
                    if fd == -1:
                        raise ProtocolError("a region's file is not in the fd store")
                rights = {"can_read": each.can_read, "can_write": each.can_write}
                try:
                    surplus = memory.map(each.start, each.size, each.offset, fd, **rights)
                except (ProtocolError, ShortageError):
                    self._close((fd,))
                    raise
                self._close(surplus)
        except (IohubError, OSError) as error:
            self._log.warning(
                "the guest's RAM can't be used until it is mapped again: %s", error, event=Event.RESUME_FAILED
            )

    def _close(self, fds: Iterable[int]) -> None:
        self._disposal.close_fds(fd for fd in fds if fd != -1)
