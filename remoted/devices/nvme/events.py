# SPDX-License-Identifier: GPL-2.0-or-later
"""Asynchronous events (NVM Express 1.4, 5.2): commands that wait for one, and events that wait for a command."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

from remoted.device import buffer, register, set_to_reset_values
from remoted.devices.nvme.nvme_h import CommandError, LogPage, Status

__all__ = ["INVALID_DOORBELL_REGISTER", "INVALID_DOORBELL_VALUE", "MAX_REQUESTS", "AsyncEvents", "EventType"]

MAX_REQUESTS = 4
"""that may be outstanding, AERL + 1"""
_MAX_EVENTS = 8


class EventType(IntEnum):
    """Asynchronous event types (figure 147 there)."""

    ERROR = 0
    HEALTH = 1


INVALID_DOORBELL_REGISTER = 0
INVALID_DOORBELL_VALUE = 1
TEMPERATURE_CROSSED = 1
"""event information by type (figures 148 and 149)"""

_PAGES = {EventType.ERROR: LogPage.ERRORS, EventType.HEALTH: LogPage.SMART}


class AsyncEvents:
    """The outstanding requests of the host, and the events that have happened since."""

    _requests: bytearray = buffer(2 * MAX_REQUESTS)
    """their command identifiers, 2 bytes each"""
    _events: bytearray = buffer(2 * _MAX_EVENTS)
    """type and information of each"""
    _masked: int = register(8)
    """a bit for each type that was reported, until its log page is read"""

    def __init__(self) -> None:
        set_to_reset_values(self)

    def clear(self) -> None:
        """Forgets all requests and events."""
        set_to_reset_values(self)

    def request(self, cid: int) -> None:
        """Takes an Asynchronous Event Request. Raises CommandError if there are too many."""
        if len(self._requests) == 2 * MAX_REQUESTS:
            raise CommandError(Status.EVENT_REQUEST_LIMIT_EXCEEDED)
        self._requests += cid.to_bytes(2, "little")

    def abort(self, cid: int) -> bool:
        """Drops the request with this command identifier; False if there is none."""
        for i in range(0, len(self._requests), 2):
            if int.from_bytes(self._requests[i : i + 2], "little") == cid:
                del self._requests[i : i + 2]
                return True
        return False

    def report(self, kind: EventType, information: int) -> None:
        """An event has happened. It is dropped if the same one waits, or its type is masked."""
        event = bytes((kind, information))
        waiting = [self._events[i : i + 2] for i in range(0, len(self._events), 2)]
        if not self._masked & 1 << kind and event not in waiting and len(waiting) < _MAX_EVENTS:
            self._events += event

    def take(self) -> Iterator[tuple[int, int]]:
        """Command identifier and dword 0 of each request that an event ends now."""
        i = 0
        while i < len(self._events) and self._requests:
            kind, information = EventType(self._events[i]), self._events[i + 1]
            if self._masked & 1 << kind:
                i += 2
                continue
            del self._events[i : i + 2]
            self._masked |= 1 << kind
            cid = int.from_bytes(self._requests[:2], "little")
            del self._requests[:2]
            yield cid, kind | information << 8 | _PAGES[kind] << 16

    def unmask(self, page: int) -> None:
        """The host has read a log page: events of its type are reported again."""
        for kind, each in _PAGES.items():
            if each == page:
                self._masked &= ~(1 << kind)
