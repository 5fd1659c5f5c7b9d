# SPDX-License-Identifier: GPL-2.0-or-later
"""The eventfds of a function's MSI and MSI-X vectors, as its client has attached and masked them.

What a function can't send, because no eventfd is attached or the client has masked the vector, it keeps pending by
itself; it is told when that has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

from common.notifier import EventNotifier
from remoted.msi import VectorKind
from remoted.vfiouser.line import IntxLine

__all__ = ["Vectors"]


class Vectors:
    """The vectors of one function: its VectorPort."""

    def __init__(self, line: IntxLine) -> None:
        """``line`` is the function's."""
        self.line = line
        """which owns all of the function's eventfds"""
        self.sent = 0
        """messages that have been signalled"""
        self.release_pending: Callable[[VectorKind, int, int], None] = _nothing_pending
        """the function's: sends what is pending of these vectors"""
        self._attached: dict[VectorKind, dict[int, EventNotifier]] = {kind: {} for kind in VectorKind}
        self._masked: dict[VectorKind, set[int]] = {kind: set() for kind in VectorKind}

    def signal(self, kind: VectorKind, vector: int) -> bool:
        """Signals a vector's eventfd; False where none is attached, or the client has masked it."""
        notifier = self._attached[kind].get(vector)
        if notifier is None or vector in self._masked[kind]:
            return False
        notifier.set()
        self.sent += 1
        return True

    def attached(self, kind: VectorKind) -> int:
        """How many vectors have an eventfd."""
        return len(self._attached[kind])

    @property
    def kind_in_use(self) -> VectorKind | None:
        """The kind of which vectors have eventfds; None if there are none."""
        return next((kind for kind, attached in self._attached.items() if attached), None)

    def kept(self, kind: VectorKind) -> tuple[Mapping[int, EventNotifier], AbstractSet[int]]:
        """What resume() takes: eventfds by vector, and the vectors that the client has masked."""
        return self._attached[kind], self._masked[kind]

    def resume(self, kind: VectorKind, attached: Mapping[int, EventNotifier], masked: Iterable[int]) -> None:
        """Goes on with the eventfds of the previous process, and takes ownership of them."""
        self._attached[kind].update(attached)
        self._masked[kind].update(masked)

    def attach(self, kind: VectorKind, start: int, notifiers: Sequence[EventNotifier]) -> None:
        """Gives so many vectors their eventfds, and takes ownership of them."""
        self.detach(kind, start, len(notifiers))
        self._attached[kind].update(enumerate(notifiers, start))
        self.release_pending(kind, start, len(notifiers))

    def detach(self, kind: VectorKind, start: int, count: int) -> None:
        """Closes the eventfds of so many vectors."""
        attached = self._attached[kind]
        old = [attached.pop(vector) for vector in range(start, start + count) if vector in attached]
        self.line.close_fds(self.line.give_up(old))

    def mask(self, kind: VectorKind, vectors: Iterable[int]) -> None:
        """Keeps vectors from being signalled."""
        self._masked[kind].update(vectors)

    def unmask(self, kind: VectorKind, vectors: Sequence[int]) -> None:
        """Lets vectors, in ascending order, be signalled, with what has become pending meanwhile."""
        self._masked[kind].difference_update(vectors)
        self.release_pending(kind, vectors[0], vectors[-1] + 1 - vectors[0])

    def disable(self, kind: VectorKind) -> None:
        """Closes all eventfds of a kind, and masks none of its vectors."""
        self._masked[kind].clear()
        old, self._attached[kind] = self._attached[kind], {}
        self.line.close_fds(self.line.give_up(old.values()))

    def trigger(self, kind: VectorKind, vector: int) -> None:
        """Signals a vector although the function has not raised it: the client tests its eventfd."""
        if (notifier := self._attached[kind].get(vector)) is not None:
            notifier.set()


def _nothing_pending(_kind: VectorKind, _start: int, _count: int) -> None:
    """Until there is a function."""
