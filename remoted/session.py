# SPDX-License-Identifier: GPL-2.0-or-later
"""One mpqemu link served: message -> function -> reply.

A client's mistake costs it its session at most. Out-of-range accesses are answered with all ones, as an error
is on this wire. Invalid requests without a reply (SYNC_SYSMEM, SET_IRQFD) are ignored as a whole. Only what
puts the stream out of step ends the session: a wrong size, an unknown command, more fds than fit, a flood
whose replies nobody reads, a frame that doesn't end. A shortage on this side, such as of file descriptors, ends
the session as well: the client would wait in vain for the interrupts of a SET_IRQFD that was dropped, while one
that connects again sends a new one.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from select import EPOLLET, EPOLLHUP, EPOLLIN, EPOLLRDHUP

from common.disposal import Disposal
from common.errors import PeerGone, ProtocolError, ShortageError
from common.journal import RateLimited
from common.link import Link
from common.loop import Loop, Timer
from common.messages import Event
from common.mpqemu import BAR, CONFIG, ERROR, Command
from common.notifier import adopt_pair
from common.peer import peer_credentials
from remoted.function import PciFunction
from remoted.iohub import Pirq
from remoted.keeper import Keeper
from remoted.keptlink import KeptLink

__all__ = ["Session"]

_unpack_config = CONFIG.unpack_from
_unpack_bar = BAR.unpack_from
_HALF_FRAME_SECONDS = 5.0
"""how long the rest of a frame may take"""


class Session:
    """Serves one client of one function until either end closes the link."""

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        function: PciFunction,
        pirq: Pirq,
        on_end: Callable[[Session], None],
        log: RateLimited,
        disposal: Disposal,
        keeper: Keeper | None = None,
    ) -> None:
        """Takes ownership of the connected socket; ``on_end`` is called once, whoever ends the session.

        ``log`` outlives the session: its limit must hold for a client that comes again and again. ``keeper``
        keeps the link for the next process. Raises ShortageError when the loop can't watch the socket, PeerGone
        and ProtocolError when a kept link has ended; the socket is closed then.
        """
        self.peer = peer_credentials(sock)
        self.client = str(self.peer)
        self.client_name = self.peer.name
        self.rejected = 0
        """messages that broke the protocol"""
        self.accesses = 0
        """messages handled"""
        self.ram_refusal = ""
        """why the guest's RAM was refused last; empty if the client's last SYNC_SYSMEM was accepted"""
        self._loop = loop
        self._function = function
        self._pirq = pirq
        self._on_end = on_end
        self._log = log
        self._disposal = disposal
        self._keeper = keeper
        self._link: Link | KeptLink = Link(sock, disposal) if keeper is None else keeper.link(sock)
        self._receive = self._link.receive
        self._reply = self._link.reply
        self._payload = self._link.payload
        self._partial: Timer | None = None
        self._handlers: dict[int, Callable[[], None]] = {
            Command.SYNC_SYSMEM: self._sync_sysmem,
            Command.PCI_CFGWRITE: self._config_write,
            Command.PCI_CFGREAD: self._config_read,
            Command.BAR_WRITE: self._bar_write,
            Command.BAR_READ: self._bar_read,
            Command.SET_IRQFD: self._set_irqfd,
            Command.DEVICE_RESET: self._device_reset,
        }
        self._is_edge_triggered = False
        """whether the link is: half a message lies in its socket, where a kept link leaves it"""
        try:
            loop.add(self._link.fileno(), self._on_readable, in_turn=True)
        except OSError as error:
            self._link.close()
            if keeper is not None:
                keeper.forget()
            raise ShortageError(f"the link can't be watched: {error.strerror}") from error
        self._order_resample()

    def fileno(self) -> int:
        """The link's fd."""
        return self._link.fileno()

    def close(self) -> None:
        """Ends the session: link, eventfds and guest RAM are closed. A second call does nothing."""
        if not self._link.closed:
            self._unwatch()
            self._link.close()
            if self._keeper is not None:
                self._keeper.forget()
            self._release_resources()

    def leave(self) -> None:
        """Ends the session in this process only, where links are kept: its client notices nothing."""
        if self._keeper is not None and not self._link.closed:
            self._unwatch()
            self._keeper.leave()
            self._release_resources()

    def _release_resources(self) -> None:
        self._pirq.drop_irqfd()
        self._disposal.close_fds(self._function.host.memory.clear())
        self._on_end(self)

    def _unwatch(self) -> None:
        if self._partial is not None:
            self._partial.cancel()
        self._loop.remove(self._link.fileno())

    def _order_resample(self) -> None:
        """A message that is here already is handled before an EOI is judged: it may lower the line."""
        resamplefd = self._pirq.resamplefd
        if resamplefd != -1:
            self._loop.order(resamplefd, after=self._link.fileno())

    def _hold(self) -> None:
        """Handles no further message, and no EOI, until the fd store has the files of this one."""
        if self._is_edge_triggered:
            self._wait_for_rest(False)
        self._loop.hold(self._link.fileno())

    def _stored(self) -> None:
        """The fd store has the files of the last message: the next one is handled."""
        if not self._link.closed:
            self._loop.release(self._link.fileno())

    def _on_readable(self, events: int) -> None:
        link = self._link
        try:
            command = self._receive()
            while command >= 0:
                self._handlers[command]()
                self.accesses += 1
                if not link.is_partial:  # so after each frame that took several reads: the last ends with it
                    if self._partial is not None:
                        self._partial.cancel()
                        self._partial = None
                        if self._is_edge_triggered:
                            self._wait_for_rest(False)
                    return
                command = self._receive()  # more than that frame has been read already
            if self._keeper is not None and link.is_partial is not self._is_edge_triggered:
                self._wait_for_rest(link.is_partial)
            elif self._is_edge_triggered and events & (EPOLLHUP | EPOLLRDHUP):
                raise PeerGone("the peer closed the link within a frame")
        except PeerGone as error:
            self._log.info("%s", error, event=Event.CLIENT_GONE, peer=self.client)
            self.close()
        except ProtocolError as error:
            self._reject(error)
            self.close()
        except ShortageError as error:
            text = "the session ends, the client can connect again: %s"
            self._log.warning(text, error, event=Event.SHORTAGE, peer=self.client)
            self.close()
        else:
            if link.is_partial and self._partial is None:
                self._partial = self._loop.call_later(_HALF_FRAME_SECONDS, self._half_frame_expired)

    def _wait_for_rest(self, is_partial: bool) -> None:
        """While half a message lies in the socket, waits for further bytes or the end of the stream."""
        self._is_edge_triggered = is_partial
        events = EPOLLIN | EPOLLRDHUP | EPOLLET if is_partial else EPOLLIN
        self._loop.modify(self._link.fileno(), events)

    def _half_frame_expired(self) -> None:
        self._reject(ProtocolError(f"half a message and then silence for {_HALF_FRAME_SECONDS:g} s"))
        self.close()

    def _reject(self, error: ProtocolError, event: Event = Event.CLIENT_BROKE_PROTOCOL) -> None:
        self.rejected += 1
        self._log.warning("%s", error, event=event, peer=self.client)

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
        self._order_resample()
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
