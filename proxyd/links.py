# SPDX-License-Identifier: GPL-2.0-or-later
"""Keeps every proxy's link alive: connects, notices the end, connects again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from select import EPOLLRDHUP

from common.errors import PeerGone, ProtocolError
from common.loop import Loop
from proxyd.pcidev import PciProxy

__all__ = ["LinkKeeper"]

_FIRST_RETRY_SECONDS = 0.02
_LAST_RETRY_SECONDS = 1.0


class LinkKeeper:
    """Runs in the control thread's loop; the proxies' on_lost is ``lost``."""

    def __init__(self, loop: Loop, on_attached: Callable[[], None]) -> None:
        """``on_attached`` is called after each successful connection: the function may have to be routed."""
        self._loop = loop
        self._on_attached = on_attached
        self._registered: dict[PciProxy, int] = {}
        self._closing = False

    def start(self, proxies: Iterable[PciProxy]) -> None:
        """Tries to connect each proxy once, now; whoever isn't there is tried again later."""
        for proxy in proxies:
            self._try(proxy, _FIRST_RETRY_SECONDS)

    def lost(self, proxy: PciProxy) -> None:
        """A link was lost; may be called from any thread."""
        self._loop.call_soon_threadsafe(lambda: self._reconnect(proxy))

    def close(self) -> None:
        """Forgets the links' fds and tries no more; the proxies are closed by their owner."""
        self._closing = True
        for proxy in list(self._registered):
            self._forget(proxy)

    def _reconnect(self, proxy: PciProxy) -> None:
        self._forget(proxy)
        proxy.reap()
        if not self._closing:
            self._try(proxy, _FIRST_RETRY_SECONDS)

    def _try(self, proxy: PciProxy, retry: float) -> None:
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
        self._registered[proxy] = fd
        # Not EPOLLIN: every reply to the vCPU's thread would wake this one.
        self._loop.add(fd, lambda _events: proxy.check_link(), EPOLLRDHUP)
        self._on_attached()

    def _forget(self, proxy: PciProxy) -> None:
        fd = self._registered.pop(proxy, None)
        if fd is not None:
            self._loop.remove(fd)
