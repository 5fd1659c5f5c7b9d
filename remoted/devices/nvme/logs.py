# SPDX-License-Identifier: GPL-2.0-or-later
"""Log pages (NVM Express 1.4, 5.14.1), and the counters that they show."""

from __future__ import annotations

import struct
from collections import deque
from typing import NamedTuple

from remoted.device import register, set_to_reset_values
from remoted.devices.nvme.features import TEMPERATURE
from remoted.devices.nvme.nvme_h import AdminOpcode, LogPage, Opcode

__all__ = ["MAX_ERRORS", "ErrorEntry", "Health", "Logs"]

MAX_ERRORS = 16
_ERROR = struct.Struct("<QHHHHQIB35x")
_SMART = struct.Struct("<BHBBB26xQ8xQ8xQ8xQ8xQ8xQ8xQ8xQ8xQ8xQ8xII")
_UNIT = 512 * 1000
"""bytes of a data unit"""
_SPARE, _SPARE_THRESHOLD = 100, 10
WARNING_TEMPERATURE_CROSSED = 1 << 1
WARNING_READ_ONLY = 1 << 3
_EFFECT_SUPPORTED = 1 << 0
_EFFECT_CHANGES_DATA = 1 << 1


class ErrorEntry(NamedTuple):
    """What the error log says about one error (5.14.1.1)."""

    number: int
    """errors since the first, this one included"""
    queue: int
    """of the command; 0xFFFF if it has none"""
    cid: int
    status: int
    location: int
    """the byte of the command that is at fault, or 0xFFFF"""
    lba: int
    nsid: int


class Health:
    """Counters for the SMART log page (5.14.1.2), which a reset leaves alone."""

    read_bytes: int = register(64)
    written_bytes: int = register(64)
    reads: int = register(64)
    writes: int = register(64)
    media_errors: int = register(64)
    errors: int = register(64)
    power_cycles: int = register(64, 1)

    def __init__(self) -> None:
        set_to_reset_values(self)


class Logs:
    """The log pages of a controller."""

    def __init__(self, health: Health, firmware: bytes) -> None:
        """``firmware`` is the revision, 8 bytes."""
        self._health = health
        self._firmware = firmware
        self._errors: deque[ErrorEntry] = deque(maxlen=MAX_ERRORS)

    def add_error(self, queue: int, cid: int, status: int, location: int, lba: int, nsid: int) -> None:
        """Notes an error; the oldest one is forgotten if there are too many."""
        self._health.errors += 1
        self._errors.appendleft(ErrorEntry(self._health.errors, queue, cid, status, location, lba, nsid))

    def page(self, page: LogPage, warnings: int) -> bytes:
        """The content of a log page; ``warnings`` are the critical warnings of the SMART log."""
        if page is LogPage.ERRORS:
            entries = [
                _ERROR.pack(number, queue, cid, status << 1, location, lba, nsid, 0)
                for number, queue, cid, status, location, lba, nsid in self._errors
            ]
            return b"".join(entries).ljust(MAX_ERRORS * _ERROR.size, b"\0")
        if page is LogPage.SMART:
            return self._smart(warnings)
        if page is LogPage.FIRMWARE_SLOTS:
            return struct.pack("<B7x8s496x", 1, self._firmware)
        effects = bytearray(4096)
        for start, opcodes in ((0, AdminOpcode), (1024, Opcode)):
            for opcode in opcodes:
                effects[start + 4 * opcode] = _EFFECT_SUPPORTED
        for opcode in (Opcode.WRITE, Opcode.WRITE_ZEROES, Opcode.DATASET_MANAGEMENT):
            effects[1024 + 4 * opcode] |= _EFFECT_CHANGES_DATA
        return bytes(effects)

    def _smart(self, warnings: int) -> bytes:
        health = self._health
        return _SMART.pack(
            warnings,
            TEMPERATURE,
            _SPARE,
            _SPARE_THRESHOLD,
            0,
            -(-health.read_bytes // _UNIT),
            -(-health.written_bytes // _UNIT),
            health.reads,
            health.writes,
            0,
            health.power_cycles,
            0,
            0,
            health.media_errors,
            health.errors,
            0,
            0,
        ).ljust(512, b"\0")
