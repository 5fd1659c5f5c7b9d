# SPDX-License-Identifier: GPL-2.0-or-later
"""What a device knows of its line's far end, and the far end of the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

__all__ = ["MAX_OUTPUT", "Chardev", "Frontend"]

MAX_OUTPUT = 4096
"""bytes kept for a reader that is slow"""


class Frontend(Protocol):
    """The device's side of the line."""

    def can_receive(self) -> int:
        """How many characters the device has room for."""

    def receive(self, data: bytes) -> None:
        """Characters for the device, no more than it has room for."""

    def transmit_ready(self) -> None:
        """write() takes characters again."""


class Chardev:
    """A line's far end. This one is ``null``: nothing comes, and output is discarded."""

    connected = True
    """whether somebody is there"""
    dropped_output = 0
    """bytes that the device wrote and that were dropped, as nobody was there to take them"""
    dropped_input = 0
    """bytes that were sent to the device and that were dropped, as it didn't read them"""

    def write(self, data: bytes | bytearray) -> int:
        """Takes characters and answers how many; if not all, Frontend.transmit_ready() tells when to go on."""
        return len(data)

    def resume(self) -> None:
        """The device may have room again."""

    def amiss(self) -> Iterator[str]:
        """What an operator should know, in words: a source for common.amiss."""
        yield from ()

    def close(self) -> None:
        """Releases the far end. Called once."""
