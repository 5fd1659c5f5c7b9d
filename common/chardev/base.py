# SPDX-License-Identifier: GPL-2.0-or-later
"""The interface between a device and its chardev; the chardev that is ``null``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from common.chardev.arrivals import Arrivals
from common.keptfiles import KeptFiles

__all__ = ["MAX_OUTPUT", "Chardev", "Frontend"]

MAX_OUTPUT = 4096
"""bytes that are buffered for a slow reader"""


class Frontend(Protocol):
    """The device, as its chardev sees it."""

    def can_receive(self) -> int:
        """How many characters the device has room for."""

    def receive(self, data: bytes) -> None:
        """Characters for the device, no more than it has room for."""

    def transmit_ready(self) -> None:
        """write() takes characters again."""


class Chardev:
    """The far end of a serial line. This one is ``null``: it has no input, and discards output."""

    connected = True
    """whether a user is connected"""
    dropped_output = 0
    """bytes of output that were dropped: no user was connected or the file could not be written"""
    dropped_input = 0
    """bytes of input that were dropped: the device did not read them"""

    def __init__(self, files: KeptFiles | None = None) -> None:
        """``files`` keep the far end for the process after this one. Raises OSError."""
        self.arrivals = Arrivals(files)
        """for the device: a part with a register of its own, where ``files`` are given"""

    def write(self, data: bytes | bytearray) -> int:
        """Takes characters and returns how many; if not all, Frontend.transmit_ready() tells when to go on."""
        return len(data)

    def resume(self) -> None:
        """The device may have room again."""

    def restored(self) -> None:
        """The device has the registers of the previous process, that of ``arrivals`` among them."""
        self.arrivals.catch_up()

    def amiss(self) -> Iterator[str]:
        """What an operator should act on, in words: a source for common.amiss."""
        yield from ()

    def close(self) -> None:
        """Releases the far end. Called once."""
