# SPDX-License-Identifier: GPL-2.0-or-later
"""Keeps every function's link to remoted alive: connects, notices the end, connects again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from select import EPOLLRDHUP
from typing import Protocol

from common.errors import PeerGone, ProtocolError
from common.journal import RateLimited
from common.loop import Loop

__all__ = ["LinkKeeper", "Linked"]

_FIRST_RETRY_SECONDS = 0.02
_LAST_RETRY_SECONDS = 1.0


class Linked(Protocol):
    """The VM's side of one function with a link."""

    log: RateLimited

    def attach(self) -> None:
        """Connects and does what is to be done first. Raises PeerGone, ProtocolError."""

    def fileno(self) -> int:
        """The link's fd, -1 without one."""

    def check_link(self) -> None:
        """Has LinkKeeper.lost called if the link has ended."""

    def reap(self) -> None:
        """Closes a lost link, which the loop has forgotten."""


class LinkKeeper:
    """Runs in the control thread's loop; whoever notices that a link has ended calls lost()."""

    def __init__(self, loop: Loop, on_attached: Callable[[], None]) -> None:
        """``on_attached`` is called after each successful connection: the function may have to be routed."""
        self._loop = loop
        self._on_attached = on_attached
        self._registered: dict[Linked, int] = {}
        self._closing = False

    def start(self, proxies: Iterable[Linked]) -> None:
        """Tries to connect each proxy once, now; whoever isn't there is tried again later."""
        for proxy in proxies:
            self._try(proxy, _FIRST_RETRY_SECONDS)

    def lost(self, proxy: Linked) -> None:
        """A link was lost; may be called from any thread."""
        self._loop.call_soon_threadsafe(lambda: self._reconnect(proxy))

    def close(self) -> None:
        """Forgets the links' fds and tries no more; the proxies are closed by their owner."""
        self._closing = True
        for proxy in list(self._registered):
            self._forget(proxy)

    def _reconnect(self, proxy: Linked) -> None:
        self._forget(proxy)
        proxy.reap()
        if not self._closing:
            self._try(proxy, _FIRST_RETRY_SECONDS)

    def _try(self, proxy: Linked, retry: float) -> None:
        if self._closing:
            return
        try:
            proxy.attach()
        except (PeerGone, ProtocolError) as error:
            if retry == _FIRST_RETRY_SECONDS:
                proxy.log.warning("no link: %s", error)
            self._loop.call_later(retry, lambda: self._try(proxy, min(2 * retry, _LAST_RETRY_SECONDS)))
            return
        fd = proxy.fileno()
        if fd != -1:  # else another thread has lost it already, and lost() has been called
            self._registered[proxy] = fd
            # Not EPOLLIN: every reply to the vCPU's thread would wake this one.
            self._loop.add(fd, lambda _events: proxy.check_link(), EPOLLRDHUP)
        self._on_attached()

    def _forget(self, proxy: Linked) -> None:
        fd = self._registered.pop(proxy, None)
        if fd is not None:
            self._loop.remove(fd)
