# SPDX-License-Identifier: GPL-2.0-or-later
"""NVM commands (NVM Express 1.4, 6): what they do to the drive.

Reads and writes that need not wait, as the page cache serves them, are done at once, straight from or to the
guest's RAM. All else is done by a thread with a copy of the data: once a command has ended, or was given up by a
reset, no thread touches the guest's RAM.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from common.messages import Event
from remoted.device import DmaError, GuestMemory, RateLimited
from remoted.devices.nvme.drive import Drive
from remoted.devices.nvme.engine import Engine, Handler
from remoted.devices.nvme.features import Features
from remoted.devices.nvme.identify import MAX_TRANSFER, Identity
from remoted.devices.nvme.logs import Health
from remoted.devices.nvme.nvme_h import ALL_NAMESPACES, CommandError, Opcode, Status
from remoted.devices.nvme.prp import Ranges, find_ranges, read_data, write_data
from remoted.devices.nvme.queues import Command

__all__ = ["IoCommands"]

_NSID, _CDW10, _CDW12 = 4, 40, 48
"""bytes of the command, for the error log"""
_FORCE_UNIT_ACCESS = 1 << 30
_DEALLOCATE = 1 << 25
"""of Write Zeroes"""
_ATTRIBUTE_DEALLOCATE = 1 << 2
"""of Dataset Management"""
_RANGE = struct.Struct("<4xIQ")
_FULL = (errno.ENOSPC, errno.EDQUOT)


class IoCommands:
    """Executes NVM commands on one drive."""

    def __init__(
        self,
        memory: GuestMemory,
        engine: Engine,
        drive: Drive,
        identity: Identity,
        features: Features,
        health: Health,
        log: RateLimited,
    ) -> None:
        self._memory = memory
        self._engine = engine
        self._drive = drive
        self._blocks = identity.blocks
        self._block_size = identity.block_size
        self._features = features
        self._health = health
        self._log = log
        self._problem = ""
        self.handlers: dict[int, Handler] = {
            Opcode.FLUSH: self._flush,
            Opcode.WRITE: self._write,
            Opcode.READ: self._read,
            Opcode.WRITE_ZEROES: self._write_zeroes,
            Opcode.DATASET_MANAGEMENT: self._manage_dataset,
        }

    def amiss(self) -> Iterator[str]:
        """What has been wrong with the image since the last reset."""
        if self._problem:
            yield self._problem

    def forgive(self) -> None:
        """Forgets what amiss() tells."""
        self._problem = ""

    def flush_drive(self) -> None:
        """Returns when everything that was written is on the medium; in a thread. Raises OSError."""
        self._drive.flush()

    def flush(self, command: Command) -> int | None:
        """Ends the command once everything that was written is on the medium."""
        if self._drive.is_memory or self._drive.is_read_only:
            return 0
        return self._do(command, self._drive.flush, _nothing, "flushing", Status.WRITE_FAULT)

    def _flush(self, command: Command) -> int | None:
        """Flush (6.8)."""
        if command.nsid not in (1, ALL_NAMESPACES):
            raise CommandError(Status.INVALID_NAMESPACE, _NSID)
        return self.flush(command)

    def _read(self, command: Command) -> int | None:
        """Read (6.9)."""
        offset, size = self._extent(command)
        ranges = self._find_data(command, size)
        needs_flush = bool(command.cdw12 & _FORCE_UNIT_ACCESS)
        if (self._drive.is_memory or not needs_flush) and self._try_read(offset, size, ranges):
            return self._has_read(size)

        def job() -> bytearray:
            if needs_flush:
                self._drive.flush()
            return self._drive.read(offset, size)

        def finish(data: bytearray) -> int:
            write_data(self._memory, ranges, data)
            return self._has_read(size)

        what = f"reading {size} bytes at {offset:#x}"
        return self._do(command, job, finish, what, Status.UNRECOVERED_READ_ERROR)

    def _write(self, command: Command) -> int | None:
        """Write (6.15)."""
        offset, size = self._extent(command)
        ranges = self._find_data(command, size)
        self._check_writable()
        is_durable = self._is_durable(command)
        if (self._drive.is_memory or not is_durable) and self._try_write(offset, size, ranges):
            return self._has_written(size, None)
        job = partial(self._drive.write, offset, read_data(self._memory, ranges), is_durable=is_durable)
        what = f"writing {size} bytes at {offset:#x}"
        return self._do(command, job, partial(self._has_written, size), what, Status.WRITE_FAULT)

    def _write_zeroes(self, command: Command) -> int | None:
        """Write Zeroes (6.17)."""
        offset, size = self._extent(command)
        self._check_writable()
        job = partial(
            self._drive.zero,
            offset,
            size,
            may_deallocate=bool(command.cdw12 & _DEALLOCATE),
            is_durable=self._is_durable(command),
        )
        what = f"zeroing {size} bytes at {offset:#x}"
        return self._do(command, job, _nothing, what, Status.WRITE_FAULT, is_quick=False)

    def _manage_dataset(self, command: Command) -> int | None:
        """Dataset Management (6.7)."""
        self._check_namespace(command)
        count = (command.cdw10 & 0xFF) + 1
        ranges = find_ranges(self._memory, self._engine.page, command.prp1, command.prp2, count * _RANGE.size)
        extents = []
        for blocks, start in _RANGE.iter_unpack(b"".join(read_data(self._memory, ranges))):
            if start + blocks > self._blocks:
                raise CommandError(Status.LBA_OUT_OF_RANGE, _CDW10)
            extents.append((start * self._block_size, blocks * self._block_size))
        if not command.cdw11 & _ATTRIBUTE_DEALLOCATE:
            return 0
        self._check_writable()
        job = partial(self._drive.deallocate, extents)
        return self._do(command, job, _nothing, "deallocating blocks", Status.WRITE_FAULT, is_quick=False)

    def _do(
        self,
        command: Command,
        job: Callable[[], Any],
        finish: Callable[[Any], int],
        what: str,
        fault: Status,
        *,
        is_quick: bool = True,
    ) -> int | None:
        """Does a job here if the drive never waits, and in a thread otherwise. ``what`` is for the log."""

        def checked() -> Any:
            try:
                return job()
            except OSError as error:
                is_full = error.errno in _FULL
                raise CommandError(Status.CAPACITY_EXCEEDED if is_full else fault) from error

        def failed(error: CommandError) -> None:
            cause = error.__cause__
            reason = cause.strerror if isinstance(cause, OSError) else None
            self._problem = f"the drive has failed: {what}: {reason or cause}"
            self._log.warning("%s", self._problem, event=Event.DRIVE_FAILED)
            self._health.media_errors += error.status is not Status.CAPACITY_EXCEEDED

        if is_quick and self._drive.is_memory:
            try:
                result = checked()
            except CommandError as error:
                failed(error)
                raise
            return finish(result)
        self._engine.submit(command, checked, finish, failed)
        return None

    def _try_read(self, offset: int, size: int, ranges: Ranges) -> bool:
        """Reads straight into the guest's RAM; False if the drive has to be waited for."""
        with self._views(ranges) as views:
            if views is not None:
                return self._drive.try_read(offset, views, size)
        data = bytearray(size)
        if not self._drive.try_read(offset, [data], size):
            return False
        write_data(self._memory, ranges, data)
        return True

    def _try_write(self, offset: int, size: int, ranges: Ranges) -> bool:
        """Writes straight from the guest's RAM; False if that can't be, or the drive has to be waited for."""
        with self._views(ranges) as views:
            return views is not None and self._drive.try_write(offset, views, size)

    @contextmanager
    def _views(self, ranges: Ranges) -> Iterator[list[memoryview] | None]:
        """The guest's RAM itself, for the body of a with statement; None where it can only be copied."""
        views: list[memoryview] = []
        can_view = True
        try:
            try:
                for each in ranges:
                    views.append(self._memory.view(*each))  # noqa: PERF401  those before an error are released
            except DmaError:
                can_view = False
            yield views if can_view else None
        finally:
            for view in views:
                view.release()

    def _find_data(self, command: Command, size: int) -> Ranges:
        if size > MAX_TRANSFER:
            raise CommandError(Status.INVALID_FIELD, _CDW12)
        return find_ranges(self._memory, self._engine.page, command.prp1, command.prp2, size)

    def _extent(self, command: Command) -> tuple[int, int]:
        """Offset and size, in bytes, of the blocks that a command names."""
        self._check_namespace(command)
        start, blocks = command.cdw11 << 32 | command.cdw10, (command.cdw12 & 0xFFFF) + 1
        if start + blocks > self._blocks:
            raise CommandError(Status.LBA_OUT_OF_RANGE, _CDW10)
        return start * self._block_size, blocks * self._block_size

    def _check_namespace(self, command: Command) -> None:
        if command.nsid != 1:
            raise CommandError(Status.INVALID_NAMESPACE, _NSID)

    def _check_writable(self) -> None:
        if self._drive.is_read_only:
            raise CommandError(Status.WRITE_PROTECTED)

    def _is_durable(self, command: Command) -> bool:
        return bool(command.cdw12 & _FORCE_UNIT_ACCESS) or not self._features.has_write_cache

    def _has_read(self, size: int) -> int:
        self._health.reads += 1
        self._health.read_bytes += size
        return 0

    def _has_written(self, size: int, _result: Any) -> int:
        self._health.writes += 1
        self._health.written_bytes += size
        return 0


def _nothing(_result: Any) -> int:
    return 0
