# SPDX-License-Identifier: GPL-2.0-or-later
"""One mpqemu link served: message -> function -> reply.

A client's mistake costs it its session at most. Out-of-range accesses are answered with all ones, as an error
is on this wire. Invalid requests without a reply (SYNC_SYSMEM, SET_IRQFD) are ignored as a whole. What ends a
session is told in remoted.clientsession; here an unknown command does so, too, and a flood whose replies nobody
reads: a client has to wait for each of them.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from common.disposal import Disposal
from common.errors import PeerGone, ProtocolError, ShortageError
from common.journal import RateLimited
from common.link import Link
from common.loop import Loop
from common.messages import Event
from common.mpqemu import BAR, CONFIG, ERROR, Command
from common.notifier import adopt_pair
from remoted.clientsession import ClientLink, ClientSession
from remoted.function import PciFunction
from remoted.iohub import Pirq

if TYPE_CHECKING:
    from remoted.keeper import Keeper
    from remoted.keptlink import KeptLink

__all__ = ["Session"]

_unpack_config = CONFIG.unpack_from
_unpack_bar = BAR.unpack_from


class Session(ClientSession):
    """Serves one mpqemu client of one function until either end closes the link."""

    _link: Link | KeptLink

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        function: PciFunction,
        pirq: Pirq,
        on_end: Callable[[], None],
        log: RateLimited,
        disposal: Disposal,
        keeper: Keeper | None = None,
    ) -> None:
        """As ClientSession; ``pirq`` is the function's."""
        self._pirq = pirq
        super().__init__(loop, sock, function, on_end, log, disposal, keeper)
        self._reply = self._link.reply
        self._payload = self._link.payload
        self._order_eoi(pirq.resamplefd)
        if self._link.taken >= 0:
            # In the loop, as any other request: a device that hangs in it doesn't hang the start. It comes before
            # further requests and before EOIs: see remoted.keptlink.
            self._hold()
            loop.call_later(0, partial(self._redo, self._link.taken))

    def _open_link(self, sock: socket.socket) -> tuple[ClientLink, Mapping[int, Callable[[], None]]]:
        link = Link(sock, self._disposal) if self._keeper is None else self._keeper.link(sock, self._pirq)
        return link, {
            Command.SYNC_SYSMEM: self._sync_sysmem,
            Command.PCI_CFGWRITE: self._config_write,
            Command.PCI_CFGREAD: self._config_read,
            Command.BAR_WRITE: self._bar_write,
            Command.BAR_READ: self._bar_read,
            Command.SET_IRQFD: self._set_irqfd,
            Command.DEVICE_RESET: self._device_reset,
        }

    def _redo(self, command: int) -> None:
        """Handles the request that the process before this one had taken out of the socket, but not done."""
        if self._link.closed:
            return
        try:
            self._handlers[command]()
            self.accesses += 1
        except (PeerGone, ProtocolError, ShortageError) as error:
            self._end(error)
        else:
            self._loop.release(self._link.fileno())

    def _drop_interrupts(self) -> None:
        self._pirq.drop_irqfd()

    def _config_read(self) -> None:
        addr, _, length = _unpack_config(self._payload)
        self._reply(self._function.bus_config_read(addr, length))

    def _config_write(self) -> None:
        addr, value, length = _unpack_config(self._payload)
        self._reply(0 if self._function.bus_config_write(addr, length, value) else ERROR)

    def _bar_read(self) -> None:
        addr, _, size, memory = _unpack_bar(self._payload)
        self._reply(self._function.bus_read(memory, addr, size))

    def _bar_write(self) -> None:
        addr, value, size, memory = _unpack_bar(self._payload)
        self._reply(0 if self._function.bus_write(memory, addr, size, value) else ERROR)

    def _device_reset(self) -> None:
        self._reply(0 if self._function.full_reset() else ERROR)
        self._log.info("reset by its client", event=Event.DEVICE_RESET, peer=self.client)

    def _set_irqfd(self) -> None:
        fds = self._link.take_fds()
        if len(fds) != 2:
            error = ProtocolError(f"SET_IRQFD with {len(fds)} file descriptors instead of 2")
            self._reject(error, Event.IRQFD_REFUSED)
            self._link.discard(fds)
            return
        try:
            irqfd, resamplefd = adopt_pair(fds[0], fds[1], self._pirq.is_foreign)
        except ProtocolError as error:
            self._reject(ProtocolError(f"SET_IRQFD: {error}"), Event.IRQFD_REFUSED)
            self._link.discard(fds)
            return
        except ShortageError:
            self._link.discard(fds)
            raise
        self._pirq.set_irqfd(irqfd, resamplefd)
        if self._disposal.is_full:
            raise ProtocolError("too many eventfds whose close takes long")
        self._order_eoi(self._pirq.resamplefd)
        if self._keeper is not None:
            self._hold()
            self._keeper.keep_irqfds(irqfd, resamplefd, self._stored)

    def _sync_sysmem(self) -> None:
        fds = sent = self._link.take_fds()
        try:
            fds = self._function.host.memory.sync(self._payload, sent)
            self.ram_refusal = ""
            if self._keeper is not None:
                self._hold()
                self._keeper.keep_ram(self._payload, sent, self._stored)
        except ProtocolError as error:
            self.ram_refusal = str(error)
            self._reject(ProtocolError(f"SYNC_SYSMEM: {error}"), Event.RAM_REFUSED)
        finally:
            self._link.discard(fds)
