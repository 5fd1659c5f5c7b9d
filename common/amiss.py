# SPDX-License-Identifier: GPL-2.0-or-later
"""What is amiss with a function or a daemon, as reported by the module that knows.

Every function and every daemon's control interface has an Amiss, and a module that knows of a condition which an
operator should act on adds a source to it once::

    function.amiss.add(self._amiss)

    def _amiss(self) -> Iterator[str]:
        if self._dropped:
            yield f"{self._dropped} bytes dropped: nobody is connected to the chardev"

The sources are asked at each Status call: a text is reported for as long as it is true, and no module has to
withdraw it. `iohubctl status` puts the function's address and id before each text, and exits with status 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from common.journal import printable

__all__ = ["MAX_TEXTS", "Amiss", "one_line"]

MAX_TEXTS = 16
_MAX_CHARACTERS = 256


class Amiss:
    """The sources of one function or daemon."""

    __slots__ = ("_sources",)

    def __init__(self) -> None:
        self._sources: list[Callable[[], Iterable[str]]] = []

    def add(self, source: Callable[[], Iterable[str]]) -> None:
        """Adds a source, which can't be removed. It is called in the control thread, gives one text for each thing
        that is amiss at present, none if all is well, and must neither block nor raise."""
        self._sources.append(source)

    def texts(self) -> list[str]:
        """What is amiss at present: at most 16 texts of one line each, in the order of their sources."""
        return [one_line(text) for source in self._sources for text in source()][:MAX_TEXTS]


def one_line(text: str) -> str:
    """The text for a reply: printable, and at most 256 characters of it, since some of it may be a peer's."""
    return printable(text[:_MAX_CHARACTERS])
