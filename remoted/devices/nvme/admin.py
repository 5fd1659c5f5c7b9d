# SPDX-License-Identifier: GPL-2.0-or-later
"""Admin commands (NVM Express 1.4, 5)."""

from __future__ import annotations

from collections.abc import Callable

from remoted.device import GuestMemory
from remoted.devices.nvme import identify
from remoted.devices.nvme.engine import Engine, Handler
from remoted.devices.nvme.events import TEMPERATURE_CROSSED, AsyncEvents, EventType
from remoted.devices.nvme.features import Features
from remoted.devices.nvme.identify import MAX_TRANSFER, Identity
from remoted.devices.nvme.logs import WARNING_READ_ONLY, WARNING_TEMPERATURE_CROSSED, Logs
from remoted.devices.nvme.nvme_h import (
    ALL_NAMESPACES,
    MAX_QUEUE_ENTRIES,
    AdminOpcode,
    CommandError,
    IdentifyCns,
    LogPage,
    Status,
)
from remoted.devices.nvme.prp import find_ranges, write_data
from remoted.devices.nvme.queues import Command, CompletionQueue, Queues, SubmissionQueue

__all__ = ["AdminCommands"]

_NSID, _PRP1, _CDW10, _CDW11, _CDW12 = 4, 24, 40, 44, 48
"""bytes of the command, for the error log"""
_CONTIGUOUS, _HAS_INTERRUPTS = 0x1, 0x2
_RETAIN_EVENT = 1 << 15
_ENTRY_SIZES = (6, 4)
"""binary logarithms of the sizes of queue entries, as CC.IOSQES and CC.IOCQES have to have them"""


class AdminCommands:
    """Executes admin commands."""

    def __init__(
        self,
        memory: GuestMemory,
        engine: Engine,
        queues: Queues,
        features: Features,
        events: AsyncEvents,
        logs: Logs,
        identity: Identity,
        max_queues: int,
        entry_sizes: Callable[[], tuple[int, int]],
        flush: Callable[[Command], int | None],
        lower_if_empty: Callable[[int], None],
    ) -> None:
        """``max_queues`` is the number of I/O queues of each kind; ``entry_sizes()`` what CC has for them.

        ``flush(command)`` ends a command once the write cache is empty. ``lower_if_empty(vector)`` lowers an
        interrupt if no completion queue has unread entries for it.
        """
        self._memory = memory
        self._engine = engine
        self._queues = queues
        self._features = features
        self._events = events
        self._logs = logs
        self._identity = identity
        self._max_queues = max_queues
        self._entry_sizes = entry_sizes
        self._flush = flush
        self._lower_if_empty = lower_if_empty
        self.handlers: dict[int, Handler] = {
            AdminOpcode.DELETE_IO_SQ: self._delete_sq,
            AdminOpcode.CREATE_IO_SQ: self._create_sq,
            AdminOpcode.GET_LOG_PAGE: self._get_log_page,
            AdminOpcode.DELETE_IO_CQ: self._delete_cq,
            AdminOpcode.CREATE_IO_CQ: self._create_cq,
            AdminOpcode.IDENTIFY: self._identify,
            AdminOpcode.ABORT: self._abort,
            AdminOpcode.SET_FEATURES: self._set_features,
            AdminOpcode.GET_FEATURES: self._get_features,
            AdminOpcode.ASYNC_EVENT_REQUEST: self._request_event,
        }

    @property
    def warnings(self) -> int:
        """The critical warnings of the SMART log (5.14.1.2)."""
        read_only = WARNING_READ_ONLY if self._identity.is_read_only else 0
        return read_only | (WARNING_TEMPERATURE_CROSSED if self._features.is_too_warm_or_cold else 0)

    def _create_cq(self, command: Command) -> int:
        """Create I/O Completion Queue (5.3)."""
        number, size = self._new_queue(command, self._queues.completions)
        vector = command.cdw11 >> 16
        if vector > self._max_queues:
            raise CommandError(Status.INVALID_VECTOR, _CDW11 + 2)
        self._queues.completions[number] = CompletionQueue(
            number, command.prp1, size, vector, has_interrupts=bool(command.cdw11 & _HAS_INTERRUPTS)
        )
        return 0

    def _create_sq(self, command: Command) -> int:
        """Create I/O Submission Queue (5.4)."""
        number, size = self._new_queue(command, self._queues.submissions)
        target = command.cdw11 >> 16
        if not 1 <= target <= self._max_queues:
            raise CommandError(Status.INVALID_QUEUE_ID, _CDW11 + 2)
        completions = self._queues.completions.get(target)
        if completions is None:
            raise CommandError(Status.CQ_INVALID, _CDW11 + 2)
        self._queues.submissions[number] = SubmissionQueue(number, command.prp1, size, completions)
        return 0

    def _new_queue(
        self, command: Command, queues: dict[int, SubmissionQueue] | dict[int, CompletionQueue]
    ) -> tuple[int, int]:
        """Number and size of a queue that is to be created."""
        number, size = command.cdw10 & 0xFFFF, (command.cdw10 >> 16) + 1
        if not 1 <= number <= self._max_queues or number in queues:
            raise CommandError(Status.INVALID_QUEUE_ID, _CDW10)
        if not 2 <= size <= MAX_QUEUE_ENTRIES or self._entry_sizes() != _ENTRY_SIZES:
            raise CommandError(Status.INVALID_QUEUE_SIZE, _CDW10 + 2)
        if not command.cdw11 & _CONTIGUOUS:
            raise CommandError(Status.INVALID_FIELD, _CDW11)
        if command.prp1 % self._engine.page:
            raise CommandError(Status.PRP_OFFSET_INVALID, _PRP1)
        return number, size

    def _delete_sq(self, command: Command) -> int | None:
        """Delete I/O Submission Queue (5.6).

        It waits for the queue's commands: a write that was given up might overtake a later one.
        """
        number = command.cdw10 & 0xFFFF
        queue = self._queues.submissions.get(number)
        if number == 0 or queue is None:
            raise CommandError(Status.INVALID_QUEUE_ID, _CDW10)
        queue.is_closing = True
        if self._queues.has_unfinished(queue):
            self._engine.wait(command)
            return None
        del self._queues.submissions[number]
        return 0

    def _delete_cq(self, command: Command) -> int:
        """Delete I/O Completion Queue (5.5)."""
        number = command.cdw10 & 0xFFFF
        queue = self._queues.completions.get(number)
        if number == 0 or queue is None:
            raise CommandError(Status.INVALID_QUEUE_ID, _CDW10)
        if any(each.completions is queue for each in self._queues.submissions.values()):
            raise CommandError(Status.INVALID_QUEUE_DELETION, _CDW10)
        del self._queues.completions[number]
        self._lower_if_empty(queue.vector)
        return 0

    def _identify(self, command: Command) -> int:
        """Identify (5.15)."""
        cns, nsid = command.cdw10 & 0xFF, command.nsid
        if cns == IdentifyCns.NAMESPACE:
            _check_namespace(nsid)
            data = identify.namespace(self._identity)
        elif cns == IdentifyCns.CONTROLLER:
            data = identify.controller(self._identity)
        elif cns == IdentifyCns.ACTIVE_NAMESPACES:
            if nsid >= ALL_NAMESPACES - 1:
                raise CommandError(Status.INVALID_NAMESPACE, _NSID)
            data = identify.active_namespaces(nsid)
        elif cns == IdentifyCns.NAMESPACE_DESCRIPTORS:
            _check_namespace(nsid)
            data = identify.descriptors(self._identity)
        else:
            raise CommandError(Status.INVALID_FIELD, _CDW10)
        self._send(command, data)
        return 0

    def _get_log_page(self, command: Command) -> int:
        """Get Log Page (5.14)."""
        size = 4 * (((command.cdw11 & 0xFFFF) << 16 | command.cdw10 >> 16) + 1)
        offset = command.cdw13 << 32 | command.cdw12
        try:
            page = LogPage(command.cdw10 & 0xFF)
        except ValueError:
            raise CommandError(Status.INVALID_LOG_PAGE, _CDW10) from None
        if size > MAX_TRANSFER:
            raise CommandError(Status.INVALID_FIELD, _CDW10 + 2)
        if command.nsid not in (0, ALL_NAMESPACES):  # no log page is per namespace
            raise CommandError(Status.INVALID_FIELD, _NSID)
        data = self._logs.page(page, self.warnings)
        if offset % 4 or offset > len(data):
            raise CommandError(Status.INVALID_FIELD, _CDW12)
        self._send(command, data[offset : offset + size].ljust(size, b"\0"))
        if not command.cdw10 & _RETAIN_EVENT:
            self._events.unmask(page)
        return 0

    def _abort(self, command: Command) -> int:
        """Abort (5.1). Only requests for events can be aborted; dword 0 is 1 if the command was not."""
        number, cid = command.cdw10 & 0xFFFF, command.cdw10 >> 16
        if number == 0 and self._events.abort(cid):
            error = CommandError(Status.ABORT_REQUESTED)
            self._queues.add_completion(command.queue, cid, 0, error.field)
            return 0
        return 1

    def _set_features(self, command: Command) -> int | None:
        """Set Features (5.21)."""
        was_cached, was_warned = self._features.has_write_cache, self._features.is_too_warm_or_cold
        result = self._features.set(command, has_io_queues=self._queues.has_io_queues)
        features = self._features
        if features.is_too_warm_or_cold and not was_warned and features.reports_temperature:
            self._events.report(EventType.HEALTH, TEMPERATURE_CROSSED)
        if was_cached and not features.has_write_cache:
            return self._flush(command)
        return result

    def _get_features(self, command: Command) -> int:
        """Get Features (5.13)."""
        return self._features.get(command)

    def _request_event(self, command: Command) -> None:
        """Asynchronous Event Request (5.2)."""
        self._events.request(command.cid)

    def _send(self, command: Command, data: bytes) -> None:
        ranges = find_ranges(self._memory, self._engine.page, command.prp1, command.prp2, len(data))
        write_data(self._memory, ranges, data)


def _check_namespace(nsid: int) -> None:
    if nsid != 1:
        raise CommandError(Status.INVALID_NAMESPACE, _NSID)
