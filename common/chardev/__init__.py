# SPDX-License-Identifier: GPL-2.0-or-later
"""Character devices: what the far end of a serial line is. ``null``, ``pty``, ``file:PATH``, ``unix:PATH``.

A line has back-pressure in both directions: a chardev reads no more than the device has room for, and when a
reader falls behind by the size of the output buffer, write() says so and the device waits. Output is dropped and
counted while no user is connected. Input of a user who has left is still delivered. Nothing blocks the loop.
"""

from __future__ import annotations

from collections.abc import Callable

from common.chardev.base import Chardev, Frontend
from common.errors import UsageError
from common.journal import Log
from common.keptfiles import KeptFiles
from common.loop import EventLoop

__all__ = ["Chardev", "Frontend", "open_chardev"]


def open_chardev(
    spec: str,
    loop: EventLoop,
    log: Log,
    frontend: Frontend,
    on_connected: Callable[[bool], None],
    files: KeptFiles | None = None,
) -> Chardev:
    """Opens the far end that the text describes. ``on_connected(connected)`` is called when
    a user connects or leaves.

    With ``files`` the users stay connected when the process ends and another one follows, input is delivered
    exactly once, and no output that was taken is lost. The device has the part ``arrivals`` then, and calls
    restored() when it has the registers of the previous process.

    Raises UsageError for another text and for a path that can't be used.
    """
    kind, _, path = spec.partition(":")
    try:
        if spec == "null":
            return Chardev()
        if spec == "pty":
            from common.chardev.pty import PtyChardev  # each kind is loaded where it is used

            return PtyChardev(loop, log, frontend, on_connected, files)
        if kind == "file" and path:
            from common.chardev.file import FileChardev

            return FileChardev(path, loop, log, frontend, files)
        if kind == "unix" and path:
            from common.chardev.unix import UnixChardev

            return UnixChardev(path, loop, log, frontend, on_connected, files)
        raise UsageError("must be null, pty, file:PATH or unix:PATH")
    except UsageError as error:
        raise UsageError(f"chardev={spec}: {error}") from error
