# SPDX-License-Identifier: GPL-2.0-or-later
"""What the sessions of all transports have in common: one client's link, watched until either end closes it.

Only what puts the stream out of step ends the session: a wrong size, more fds than fit, a message that doesn't
end. A shortage on this side, such as of file descriptors, ends the session as well: the client would wait in vain
for the interrupts of eventfds that were dropped, while one that connects again sends new ones.
"""

from __future__ import annotations

import abc
import socket
from collections.abc import Callable, Mapping
from select import EPOLLET, EPOLLHUP, EPOLLIN, EPOLLRDHUP
from typing import TYPE_CHECKING, Protocol

from common.disposal import Disposal
from common.errors import PeerGone, ProtocolError, ShortageError
from common.journal import RateLimited
from common.loop import Loop, Timer
from common.messages import Event
from common.peer import peer_credentials
from remoted.function import PciFunction

if TYPE_CHECKING:
    from remoted.keeper import Keeper

__all__ = ["HALF_MESSAGE_SECONDS", "ClientLink", "ClientSession"]

HALF_MESSAGE_SECONDS = 5.0
"""how long the rest of a message may take"""


class ClientLink(Protocol):
    """What a session uses of its link, whatever the protocol: see common.framelink.FrameLink."""

    closed: bool
    is_partial: bool
    """whether a request has begun but not ended"""

    def fileno(self) -> int:
        """The socket's fd."""

    def receive(self) -> int:
        """The command of the next whole request, or -1."""

    def close(self) -> None:
        """Ends the link."""


class ClientSession(abc.ABC):
    """Serves one client of one function until either end closes the link."""

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        function: PciFunction,
        on_end: Callable[[], None],
        log: RateLimited,
        disposal: Disposal,
        keeper: Keeper | None,
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
        """why the guest's RAM was refused last; empty if what the client told last was accepted"""
        self._loop = loop
        self._function = function
        self._on_end = on_end
        self._log = log
        self._disposal = disposal
        self._keeper = keeper
        self._link, self._handlers = self._open_link(sock)
        self._receive = self._link.receive
        self._partial: Timer | None = None
        self._is_edge_triggered = False
        """whether the link is: half a message lies in its socket, where a kept link leaves it"""
        try:
            loop.add(self._link.fileno(), self._on_readable, in_turn=True)
        except OSError as error:
            self._link.close()
            if keeper is not None:
                keeper.forget()
            raise ShortageError(f"the link can't be watched: {error.strerror}") from error

    @abc.abstractmethod
    def _open_link(self, sock: socket.socket) -> tuple[ClientLink, Mapping[int, Callable[[], None]]]:
        """The link over the socket, and the handlers of its requests by their commands. Raises as __init__()."""

    @abc.abstractmethod
    def _drop_interrupts(self) -> None:
        """Closes the eventfds that the client has sent."""

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
        """Ends the session; where links are kept, in this process only: its client notices nothing."""
        if self._keeper is None:
            self.close()
        elif not self._link.closed:
            self._unwatch()
            self._keeper.leave()
            self._release_resources()

    def _release_resources(self) -> None:
        self._drop_interrupts()
        self._disposal.close_fds(self._function.host.memory.clear())
        self._on_end()

    def _unwatch(self) -> None:
        if self._partial is not None:
            self._partial.cancel()
        self._loop.remove(self._link.fileno())

    def _order_eoi(self, fd: int) -> None:
        """A message that is here already is handled before an EOI is judged: it may lower the line.

        ``fd`` is the eventfd that reports the EOI, -1 if there is none.
        """
        if fd != -1:
            self._loop.order(fd, after=self._link.fileno())

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
                if not link.is_partial:
                    # So after each message that took several reads: the last ends with it.
                    if self._partial is not None:
                        self._partial.cancel()
                        self._partial = None
                        if self._is_edge_triggered:
                            self._wait_for_rest(False)
                    return
                command = self._receive()  # more than that message has been read already
            if self._keeper is not None and link.is_partial is not self._is_edge_triggered:
                self._wait_for_rest(link.is_partial)
            elif self._is_edge_triggered and events & (EPOLLHUP | EPOLLRDHUP):
                raise PeerGone("the peer closed the link within a frame")
        except (PeerGone, ProtocolError, ShortageError) as error:
            self._end(error)
        else:
            if link.is_partial and self._partial is None:
                self._partial = self._loop.call_later(HALF_MESSAGE_SECONDS, self._half_message_expired)

    def _end(self, error: PeerGone | ProtocolError | ShortageError) -> None:
        """Ends the session, with the reason in the log."""
        if isinstance(error, PeerGone):
            self._log.info("%s", error, event=Event.CLIENT_GONE, peer=self.client)
        elif isinstance(error, ProtocolError):
            self._reject(error)
        else:
            text = "the session ends, the client can connect again: %s"
            self._log.warning(text, error, event=Event.SHORTAGE, peer=self.client)
        self.close()

    def _wait_for_rest(self, is_partial: bool) -> None:
        """While half a message lies in the socket, waits for further bytes or the end of the stream."""
        self._is_edge_triggered = is_partial
        events = EPOLLIN | EPOLLRDHUP | EPOLLET if is_partial else EPOLLIN
        self._loop.modify(self._link.fileno(), events)

    def _half_message_expired(self) -> None:
        self._reject(ProtocolError(f"half a message and then silence for {HALF_MESSAGE_SECONDS:g} s"))
        self.close()

    def _reject(self, error: ProtocolError, event: Event = Event.CLIENT_BROKE_PROTOCOL) -> None:
        self.rejected += 1
        self._log.warning("%s", error, event=event, peer=self.client)
