# SPDX-License-Identifier: GPL-2.0-or-later
"""Keeps every function's link to remoted: connects, notices the end, connects again.

It connects to a socket as soon as inotify reports it, and otherwise tries again at growing intervals.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from select import EPOLLRDHUP
from typing import Protocol

from common.backoff import FIRST_SECONDS, Backoff
from common.errors import PeerGone, PeerTooSlow, ProtocolError
from common.journal import RateLimited
from common.loop import Loop, Timer
from common.messages import Event
from common.pathwatch import PathWatch

__all__ = ["LinkKeeper", "Linked"]

_LAST_RETRY_SECONDS = 1.0
_LAST_HANG_UP_SECONDS = 5.0
"""the same for a remote that hangs up as soon as it is linked: attaching may hold up the VM"""
_START_SECONDS = 2.0


class Linked(Protocol):
    """The VM's side of one function with a link."""

    name: str
    path: str
    """the device's socket"""
    log: RateLimited
    reason: str
    """why the last attempt failed, or why the link was lost"""

    def connect(self) -> None:
        """Connects and does what takes round trips, in a thread of its own. Raises PeerGone, ProtocolError."""

    def attach(self) -> None:
        """Puts the link into use that connect() has made. Raises PeerGone, ProtocolError."""

    def abort(self) -> None:
        """Ends the round trips that other threads are waiting in, for good."""

    def fileno(self) -> int:
        """The link's fd, -1 without one."""

    def check_link(self) -> None:
        """Has LinkKeeper.lost called if the link has ended."""

    def reap(self) -> None:
        """Closes a lost link, which the loop has forgotten, and one that couldn't be put into use."""


class _Link:
    """What is known of one function's link."""

    def __init__(self, end: Linked) -> None:
        self.end = end
        self.fd = -1
        """what the loop watches"""
        self.connecting: threading.Thread | None = None
        self.began = 0.0
        """when the last attempt began"""
        self.timer: Timer | None = None
        """begins the next attempt"""
        self.is_held = False
        """whether attempts are left to the timer, since the last link ended as soon as it was made"""
        self.is_due = False
        """whether a socket has appeared while an attempt was under way"""
        self.is_tried = False
        """whether an attempt has ended, either way"""
        self.backoff = Backoff()
        self.since = 0.0
        """when it was attached last"""
        self.is_told = False
        """whether it was logged that there is no link"""


class LinkKeeper:
    """Runs in the control thread's loop; whoever notices that a link has ended calls lost().

    A remote that hangs, or that answers slowly, holds up nothing but its own link: each is connected in a thread
    of its own.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._links: dict[Linked, _Link] = {}
        self._watch = PathWatch(loop, self._on_listening)
        self._closing = False

    def start(self, ends: Iterable[Linked]) -> None:
        """Makes the first attempts and runs the loop until all of them have ended, for two seconds at most.

        So a guest that is started next finds its devices. Links that could not be made are tried again later. An
        end that has its link already keeps it.
        """
        for end in ends:
            link = self._links[end] = _Link(end)
            if end.fileno() == -1:
                self._connect(link)
            else:
                link.is_tried = True
                self._watch_end(link)
        expires = self._loop.time() + _START_SECONDS
        while not (self._loop.is_stopped or all(link.is_tried for link in self._links.values())):
            remaining = expires - self._loop.time()
            if remaining <= 0:
                break
            self._loop.step(remaining)

    def lost(self, end: Linked) -> None:
        """A link was lost; may be called from any thread."""
        self._loop.call_soon_threadsafe(lambda: self._reconnect(end))

    def close(self) -> None:
        """Aborts all round trips, forgets the links' fds and tries no more; the ends are closed by their owner.

        A second call does nothing.
        """
        self._closing = True
        self._watch.close()
        for link in self._links.values():
            link.end.abort()
        for link in self._links.values():
            self._forget(link)
            if link.connecting is not None:
                link.connecting.join()

    def _connect(self, link: _Link) -> None:
        if self._closing:
            return
        if link.timer is not None:
            link.timer.cancel()
            link.timer = None
        link.is_due = False
        link.began = self._loop.time()
        self._watch.watch(link.end.path)

        def connect() -> None:
            failure = None
            try:
                link.end.connect()
            except (PeerGone, ProtocolError) as error:
                failure = error
            self._loop.call_soon_threadsafe(lambda: self._connected(link, failure))

        link.connecting = threading.Thread(target=connect, name=f"link {link.end.name}", daemon=True)
        try:
            link.connecting.start()
        except RuntimeError as error:  # the system has no room for one more
            self._connected(link, PeerGone(str(error)))

    def _connected(self, link: _Link, failure: Exception | None) -> None:
        link.connecting = None
        link.is_tried = True
        if self._closing:
            return
        if failure is None:
            try:
                link.end.attach()
            except (PeerGone, ProtocolError) as error:
                failure = error
        if failure is not None:
            link.end.reap()
            link.end.reason = f"no link: {failure}"
            if not link.is_told:
                link.is_told = True
                is_slow = isinstance(failure, PeerTooSlow)
                link.end.log.warning(
                    "%s", link.end.reason, event=Event.REMOTE_TOO_SLOW if is_slow else Event.LINK_ABSENT
                )
            self._connect_later(link, _LAST_RETRY_SECONDS)
            if link.is_due and not link.is_held:
                self._connect_soon(link)
            return
        link.is_told = False
        link.since = self._loop.time()
        self._watch_end(link)

    def _watch_end(self, link: _Link) -> None:
        """Watches a link for its end; one that can't be watched for a moment is in use nevertheless."""
        fd = link.end.fileno()
        # Without an fd another thread has lost it already, and lost() has been called.
        if fd == -1 or link.fd != -1 or self._closing:
            return
        try:
            # Not EPOLLIN: every reply to the vCPU's thread would wake this one.
            self._loop.add(fd, lambda _events: link.end.check_link(), EPOLLRDHUP)
        except OSError as error:
            link.end.log.warning(
                "the link's end can't be noticed for now: %s", error.strerror, event=Event.LINK_UNWATCHED
            )
            self._loop.call_later(_LAST_RETRY_SECONDS, lambda: self._watch_end(link))
        else:
            link.fd = fd

    def _reconnect(self, end: Linked) -> None:
        link = self._links[end]
        self._forget(link)
        end.reap()
        if self._loop.time() - link.since < _LAST_RETRY_SECONDS:
            self._connect_later(link, _LAST_HANG_UP_SECONDS)
            link.is_held = True
        else:
            link.is_held = False
            link.backoff.reset()
            self._connect(link)

    def _connect_later(self, link: _Link, most: float) -> None:
        link.timer = self._loop.call_later(link.backoff.next(most), lambda: self._connect(link))

    def _on_listening(self, path: str) -> None:
        for link in self._links.values():
            if link.end.path == path:
                link.is_due = link.connecting is not None
                if link.timer is not None and not link.is_held:
                    self._connect_soon(link)

    def _connect_soon(self, link: _Link) -> None:
        """Begins the next attempt before its time: at once, or a while after the last one, however often asked."""
        if link.timer is not None:
            link.timer.cancel()
        wait = max(0.0, link.began + FIRST_SECONDS - self._loop.time())
        link.timer = self._loop.call_later(wait, lambda: self._connect(link))

    def _forget(self, link: _Link) -> None:
        fd, link.fd = link.fd, -1
        if fd != -1:
            self._loop.remove(fd)
