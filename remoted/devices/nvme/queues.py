# SPDX-License-Identifier: GPL-2.0-or-later
"""Submission and completion queues in the guest's RAM (NVM Express 1.4, 4.1), and what a restart needs of them.

What is fetched is completed once, also if the process is killed in between:

- a command that is under way is kept as it was fetched. Its slot in the submission queue may have been used again
  since, as drivers need not look at the SQ head pointer for that. The next process does it again;
- a completion is kept first, and posted by a later handler of the device, after the state with it has become
  valid. The next process posts all that were kept, to the same slots in the same order. Where the guest has them
  already, these slots are consumed, and nobody looks at them until the phase changes.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator

from remoted.device import buffer, set_to_reset_values
from remoted.devices.nvme.nvme_h import SUBMISSION

__all__ = ["MAX_IO_QUEUES", "MAX_UNDER_WAY", "Command", "CompletionQueue", "Queues", "SubmissionQueue"]

MAX_IO_QUEUES = 64
MAX_UNDER_WAY = 64
"""I/O commands that have been fetched and are not done"""
MAX_ADMIN_UNDER_WAY = 16
"""admin commands, which a drive that doesn't answer must not hold up"""
MAX_UNPOSTED = 256
"""completions that have not been posted; no further command is fetched then"""
_MAX_KEPT = MAX_UNPOSTED + 16
"""with those of requests for events, which were fetched long ago"""

_RECORD = struct.Struct("<BBHHHHQ")
"""of a queue: flags, phase, size, head, tail, completion queue or vector, address"""
_EXISTS, _HAS_INTERRUPTS = 0x01, 0x02
_UNDER_WAY = struct.Struct("<H64s")
"""of a command: submission queue, entry"""
_UNPOSTED = struct.Struct("<HHIHH")
"""of a completion: completion queue, submission queue, dword 0, command identifier, status"""


class CompletionQueue:
    """A completion queue. Head and tail are slots; the queue is empty while they are equal."""

    __slots__ = ("address", "has_interrupts", "head", "id", "phase", "promised", "size", "tail", "vector")

    def __init__(self, number: int, address: int, size: int, vector: int, *, has_interrupts: bool) -> None:
        self.id = number
        self.address = address
        self.size = size
        """in entries of 16 bytes"""
        self.vector = vector
        self.has_interrupts = has_interrupts
        self.head = 0
        self.tail = 0
        self.phase = 1
        self.promised = 0
        """slots that the completions of fetched commands will need, or those that are to be posted"""

    @property
    def free(self) -> int:
        """Slots that can be posted to."""
        return (self.head - self.tail - 1) % self.size


class SubmissionQueue:
    """A submission queue."""

    __slots__ = ("address", "completions", "head", "id", "is_closing", "size", "tail", "under_way")

    def __init__(self, number: int, address: int, size: int, completions: CompletionQueue) -> None:
        self.id = number
        self.address = address
        self.size = size
        """in entries of 64 bytes"""
        self.completions = completions
        self.head = 0
        self.tail = 0
        self.under_way = 0
        """commands that have been fetched and are not done"""
        self.is_closing = False
        """whether it is to be deleted, and no further command is fetched"""


class Command:
    """A submission queue entry (4.2)."""

    __slots__ = (
        "cdw10",
        "cdw11",
        "cdw12",
        "cdw13",
        "cid",
        "entry",
        "flags",
        "nsid",
        "opcode",
        "prp1",
        "prp2",
        "queue",
    )

    def __init__(self, queue: SubmissionQueue, entry: bytes) -> None:
        self.queue = queue
        self.entry = entry
        (
            self.opcode,
            self.flags,
            self.cid,
            self.nsid,
            _,
            _,
            self.prp1,
            self.prp2,
            self.cdw10,
            self.cdw11,
            self.cdw12,
            self.cdw13,
            _,
            _,
        ) = SUBMISSION.unpack(entry)


class Queues:
    """All queues of a controller, the commands under way, and the completions that are to be posted."""

    _records: bytearray = buffer(2 * (MAX_IO_QUEUES + 1) * _RECORD.size)
    _kept_commands: bytearray = buffer((MAX_UNDER_WAY + MAX_ADMIN_UNDER_WAY) * _UNDER_WAY.size)
    _kept_completions: bytearray = buffer(_MAX_KEPT * _UNPOSTED.size)

    def __init__(self) -> None:
        self.submissions: dict[int, SubmissionQueue] = {}
        self.completions: dict[int, CompletionQueue] = {}
        self.under_way: dict[int, Command] = {}
        """by the identity of the command"""
        self.unposted: deque[tuple[CompletionQueue, int, int, int, int]] = deque()
        """completions: queue, submission queue's number, dword 0, command identifier, status"""
        set_to_reset_values(self)

    @property
    def has_io_queues(self) -> bool:
        """Whether any other queue than those for admin commands exists."""
        return len(self.submissions) > 1 or len(self.completions) > 1

    def clear(self) -> None:
        """Forgets everything."""
        self.submissions.clear()
        self.completions.clear()
        self.under_way.clear()
        self.unposted.clear()
        set_to_reset_values(self)

    def room(self, queue: SubmissionQueue) -> int:
        """How many commands of a queue may be fetched now, such that each has a slot for its completion."""
        completions = queue.completions
        admin = self.submissions[0].under_way
        left = MAX_UNDER_WAY + admin - len(self.under_way) if queue.id else MAX_ADMIN_UNDER_WAY - admin
        return max(
            0,
            min(
                (queue.tail - queue.head) % queue.size,
                completions.free - completions.promised,
                left,
                MAX_UNPOSTED - len(self.unposted) - len(self.under_way),
            ),
        )

    def start(self, command: Command) -> None:
        """The command is under way."""
        self.under_way[id(command)] = command
        command.queue.under_way += 1
        command.queue.completions.promised += 1

    def stop(self, command: Command) -> None:
        """The command is under way no more."""
        if self.under_way.pop(id(command), None) is not None:
            command.queue.under_way -= 1
            command.queue.completions.promised -= 1

    def complete(self, command: Command, dword0: int, status: int) -> None:
        """The command is done: its completion is to be posted. ``status`` has no phase bit."""
        self.stop(command)
        self.add_completion(command.queue, command.cid, dword0, status)

    def add_completion(self, queue: SubmissionQueue, cid: int, dword0: int, status: int) -> None:
        """As complete(), for a command that is kept elsewhere."""
        queue.completions.promised += 1
        self.unposted.append((queue.completions, queue.id, dword0, cid, status))

    def has_unfinished(self, queue: SubmissionQueue) -> bool:
        """Whether a command of this queue is under way, or its completion is not posted."""
        return bool(queue.under_way) or any(each[1] == queue.id for each in self.unposted)

    def take_postable(self) -> Iterator[tuple[CompletionQueue, int, int, int, int]]:
        """Takes the completions whose queue has room, each once its slot is free; the caller moves the tail."""
        for _ in range(len(self.unposted)):
            each = self.unposted.popleft()
            if each[0].free:
                each[0].promised -= 1
                yield each
            else:
                self.unposted.append(each)

    def save(self) -> None:
        """Sets the fields that outlive the process to the present state."""
        records = bytearray(2 * (max((0, *self.submissions, *self.completions)) + 1) * _RECORD.size)
        for sq in self.submissions.values():
            where = 2 * sq.id * _RECORD.size
            _RECORD.pack_into(
                records, where, _EXISTS, 0, sq.size, sq.head, sq.tail, sq.completions.id, sq.address
            )
        for cq in self.completions.values():
            flags = _EXISTS | (_HAS_INTERRUPTS if cq.has_interrupts else 0)
            where = (2 * cq.id + 1) * _RECORD.size
            _RECORD.pack_into(
                records, where, flags, cq.phase, cq.size, cq.head, cq.tail, cq.vector, cq.address
            )
        self._records = records
        self._kept_commands = bytearray().join(
            [_UNDER_WAY.pack(each.queue.id, each.entry) for each in self.under_way.values()]
        )
        self._kept_completions = bytearray().join(
            [_UNPOSTED.pack(each[0].id, *each[1:]) for each in self.unposted]
        )

    def restore(self) -> list[Command]:
        """Creates everything from the fields. Returns the commands that were under way, which are to be redone."""
        found = list(enumerate(_RECORD.iter_unpack(self._records)))
        for index, (flags, phase, size, head, tail, vector, address) in found:
            if index % 2 and flags & _EXISTS:
                cq = CompletionQueue(
                    index // 2, address, size, vector, has_interrupts=bool(flags & _HAS_INTERRUPTS)
                )
                cq.head, cq.tail, cq.phase = head, tail, phase
                self.completions[cq.id] = cq
        for index, (flags, _, size, head, tail, number, address) in found:
            if not index % 2 and flags & _EXISTS:
                sq = SubmissionQueue(index // 2, address, size, self.completions[number])
                sq.head, sq.tail = head, tail
                self.submissions[sq.id] = sq
        for number, of, dword0, cid, status in _UNPOSTED.iter_unpack(self._kept_completions):
            cq = self.completions[number]
            cq.promised += 1
            self.unposted.append((cq, of, dword0, cid, status))
        return [
            Command(self.submissions[number], entry)
            for number, entry in _UNDER_WAY.iter_unpack(self._kept_commands)
        ]
