# SPDX-License-Identifier: GPL-2.0-or-later
"""For how long a guest's CPU may wait for one function: not only for one answer, but over time.

A remote that always answers just within the deadline of a round trip would hold up the guest at each access. So
the waiting is counted as in a leaky bucket: what an answer takes beyond a tolerance goes in, a tenth of the time
that passes goes out, and a link whose bucket runs over counts as lost. In the long run a guest waits for a
function no more than a tenth of the time, apart from the tolerance.

One process mostly serves all functions of a VM. When it has missed a deadline for one of them, requests to the
others get no more than the tolerance until one is answered: else the guest would wait a deadline for each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from common.errors import PeerGone, PeerTooSlow
from common.link import Client
from common.mpqemu import Command, describe_request

__all__ = ["WaitBudget"]

_TOLERANCE_SECONDS = 0.1
"""an answer that takes no longer costs nothing"""
_SLOW_SECONDS = 0.5
"""an answer that takes longer is reported"""
_CAPACITY_SECONDS = 4.0
_LEAK = 0.1
_PAGE_SECONDS = 60.0
_MAX_HUNG = 64


class _Page:
    """The answers of a minute."""

    __slots__ = ("count", "maximum", "slowest", "total")

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.maximum = 0.0
        self.slowest: tuple[Command, bytes] = (Command.RET, b"")
        """the request that took longest"""


class WaitBudget:
    """The budget of one function; and how long its answers took in the last minute or two.

    One thread at a time may wait. The times may be asked for by any thread.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, hung: set[int] | None = None) -> None:
        """``hung``: pids of the processes that have missed a deadline; the functions of a VM share the set."""
        self._clock = clock
        self._hung = set() if hung is None else hung
        self._level = 0.0
        self._leaked_at = clock()
        self._page, self._last_page = _Page(), _Page()
        self._turned_at = clock()
        self._waiting: tuple[float, Command, bytes] | None = None

    def request(self, client: Client, command: Command, payload: bytes = b"") -> int:
        """Client.request(), on this budget. Raises PeerGone also when that is used up, and ProtocolError."""
        began = self._clock()
        self._waiting = began, command, payload
        deadline, pid = client.deadline, client.peer.pid
        is_suspect = pid in self._hung
        if is_suspect:
            client.deadline = min(deadline, _TOLERANCE_SECONDS)
        try:
            value = client.request(command, payload)
        except PeerGone:
            if self._clock() - began >= client.deadline:
                self._suspect(pid)
            raise
        finally:
            self._waiting = None
            now = self._clock()
            took = now - began
            if now - self._turned_at >= _PAGE_SECONDS:
                self._turn(now)
            page = self._page
            page.count += 1
            page.total += took
            if took > page.maximum:
                page.maximum = took
                page.slowest = command, payload
            if took > _TOLERANCE_SECONDS:
                self._leak(now)
                self._level += took - _TOLERANCE_SECONDS
        if is_suspect:
            client.deadline = deadline
            self.trust(pid)
        if self._level > _CAPACITY_SECONDS and took > _TOLERANCE_SECONDS:
            request = describe_request(command, payload)
            raise PeerTooSlow(f"too slow: the answer to {request} took {took:.1f} s, and others before it")
        return value

    def trust(self, pid: int) -> None:
        """The process answers again."""
        self._hung.discard(pid)

    def check(self) -> None:
        """Raises PeerGone as long as less than half of the budget is there."""
        self._leak(self._clock())
        missing = self._level - _CAPACITY_SECONDS / 2
        if missing > 0:
            raise PeerTooSlow(f"too slow before: the next link is made in {missing / _LEAK:.0f} s")

    @property
    def times(self) -> tuple[float, float] | None:
        """Seconds that an answer took on average, and at most, in the last minute or two; None without any.

        One that didn't come counts with the time for which it was waited.
        """
        pages = self._pages()
        count = sum(page.count for page in pages)
        if not count:
            return None
        return sum(page.total for page in pages) / count, max(page.maximum for page in pages)

    def amiss(self) -> Iterator[str]:
        """See Amiss.add()."""
        waiting = self._waiting  # by another thread, which may get its answer at any time
        if waiting is not None:
            began, command, payload = waiting
            took = self._clock() - began
            if took > _SLOW_SECONDS:
                yield f"waiting for {took:.1f} s now for the answer to {describe_request(command, payload)}"
        mean, longest = self.times or (0.0, 0.0)
        if longest > _SLOW_SECONDS:
            slowest = max(self._pages(), key=lambda page: page.maximum).slowest
            yield (
                f"the guest's CPU has waited up to {longest:.1f} s for an answer in the last two minutes, "
                f"{mean * 1000:.3g} ms on average; the longest was that to {describe_request(*slowest)}"
            )

    def _suspect(self, pid: int) -> None:
        if len(self._hung) >= _MAX_HUNG:  # they may have ended since
            self._hung.clear()
        if pid:  # else it is of a pid namespace that can't be seen from here
            self._hung.add(pid)

    def _leak(self, now: float) -> None:
        self._level = max(0.0, self._level - (now - self._leaked_at) * _LEAK)
        self._leaked_at = now

    def _pages(self) -> tuple[_Page, _Page]:
        now = self._clock()
        if now - self._turned_at >= _PAGE_SECONDS:
            self._turn(now)
        return self._page, self._last_page

    def _turn(self, now: float) -> None:
        is_recent = now - self._turned_at < 2 * _PAGE_SECONDS
        self._last_page = self._page if is_recent else _Page()
        self._page = _Page()
        self._turned_at = now
