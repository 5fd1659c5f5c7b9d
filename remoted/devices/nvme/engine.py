# SPDX-License-Identifier: GPL-2.0-or-later
"""Fetches commands, has them executed, and posts their completions (NVM Express 1.4, 4.1 and 7.2).

One call handles commands for half a millisecond at most, one queue after the other, and goes on in the next pass
of the loop: a guest that keeps its queues full delays no other device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import groupby
from typing import Any

from common.messages import Event
from remoted.device import DmaError, Host, RateLimited, Timer
from remoted.devices.nvme.events import AsyncEvents
from remoted.devices.nvme.logs import Logs
from remoted.devices.nvme.nvme_h import COMPLETION, FLAGS_FUSE, FLAGS_PSDT, PAGE, CommandError, Status
from remoted.devices.nvme.queues import Command, CompletionQueue, Queues, SubmissionQueue
from remoted.devices.nvme.workers import Workers

__all__ = ["Engine", "Handler"]

Handler = Callable[[Command], int | None]
"""Executes a command. Returns dword 0 of its completion, or None if it ends later; raises CommandError."""

_SLICE_SECONDS = 0.0005
_BATCH = 8
"""commands of one queue that are fetched at once; the next queue's come before the rest"""
_ENTRY = 64
_COMPLETION_SIZE = 16


class Engine:
    """The part of the controller that runs commands."""

    def __init__(
        self,
        host: Host,
        queues: Queues,
        events: AsyncEvents,
        logs: Logs,
        interrupt: Callable[[int], None],
        fail: Callable[[str], None],
        drained: Callable[[], None],
    ) -> None:
        """``interrupt(vector)`` raises an interrupt, ``fail(reason)`` says that the controller can't go on, and
        ``drained()`` that a job of the time before a reset has ended."""
        self.admin: Mapping[int, Handler] = {}
        self.io: Mapping[int, Handler] = {}
        self.page = PAGE
        """the memory page size in bytes, CC.MPS"""
        self.is_running = False
        """whether the controller is ready and has not failed"""
        self.stale = 0
        """jobs from before a reset that have not ended: what they read is dropped"""
        self._workers = Workers(host.loop.call_soon_threadsafe)
        self._memory = host.memory
        self._loop = host.loop
        self._log = RateLimited(host.log)
        self._queues = queues
        self._events = events
        self._logs = logs
        self._interrupt = interrupt
        self._fail = fail
        self._drained = drained
        self._epoch = 0
        self._jobs = 0
        self._turn = 0
        self._timer: Timer | None = None
        self._when_idle: Callable[[], None] | None = None
        self._waiting: list[Command] = []
        """commands that wait for others to end"""

    def stop(self) -> None:
        """Forgets all queues and commands. Jobs that have begun can't be stopped, and are stale until they end."""
        self.is_running = False
        self._epoch += 1
        self.stale += self._jobs
        self._jobs = 0
        self._waiting.clear()
        self._when_idle = None
        self._queues.clear()
        self._events.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self, then: Callable[[], None]) -> None:
        """Ends its work in this process, and calls ``then()`` after the last job. A next process goes on."""
        self.is_running = False
        if self._timer is not None:
            self._timer.cancel()
        self._workers.close(then)

    def go_on(self) -> None:
        """After a restart of the process: does what was under way again, and posts what was not posted."""
        commands = self._queues.restore()
        self.is_running &= 0 in self._queues.submissions  # it has none in a reset that was not over
        for command in commands:
            self._execute(command)
        self._finish()

    def run(self) -> None:
        """Posts what is due, and executes what has been submitted since. To be called at a doorbell."""
        self.post()
        waiting, self._waiting = self._waiting, []
        for command in waiting:
            self._queues.stop(command)
            self._execute(command)
        deadline = self._loop.time() + _SLICE_SECONDS
        order = sorted(self._queues.submissions)
        order = [each for each in order if each >= self._turn] + [each for each in order if each < self._turn]
        has_more = True
        while has_more and self.is_running:
            has_more = False
            for number in order:
                queue = self._queues.submissions.get(number)
                if queue is not None and self._fetch(queue, deadline):
                    has_more = True
                    self._turn = number + 1
                    if self._loop.time() > deadline:
                        self._kick()
                        self._finish()
                        return
        self._finish()

    def post(self) -> None:
        """Writes the completions of an earlier handler to their queues, and raises the interrupts."""
        if not self._queues.unposted or not self.is_running:
            return
        entries: list[tuple[CompletionQueue, int, bytes]] = []
        submissions = self._queues.submissions
        for queue, number, dword0, cid, status in self._queues.take_postable():
            head = submissions[number].head if number in submissions else 0
            entry = COMPLETION.pack(dword0, 0, head, number, cid, status << 1 | queue.phase)
            entries.append((queue, queue.tail, entry))
            queue.tail += 1
            if queue.tail == queue.size:
                queue.tail = 0
                queue.phase ^= 1
        try:
            for _, run in groupby(enumerate(entries), lambda each: (each[1][0].id, each[1][1] - each[0])):
                batch = [each for _, each in run]
                queue, slot, _ = batch[0]
                self._write(queue.address + _COMPLETION_SIZE * slot, b"".join(each[2] for each in batch))
        except DmaError as error:
            self._fail(f"a completion can't be posted: {error}")
            return
        for vector in sorted({queue.vector for queue, _, _ in entries if queue.has_interrupts}):
            self._interrupt(vector)

    def report_events(self) -> None:
        """Ends the requests for which an event waits."""
        admin = self._queues.submissions.get(0)
        if admin is not None:
            for cid, dword0 in self._events.take():
                self._queues.add_completion(admin, cid, dword0, Status.SUCCESS)

    def submit(
        self,
        command: Command,
        job: Callable[[], Any],
        finish: Callable[[Any], int],
        failed: Callable[[CommandError], None],
    ) -> None:
        """Lets a thread do ``job()``, and ends the command with ``finish(result)``, in the loop.

        A CommandError of the job ends it after ``failed(error)``. Raises CommandError.
        """
        epoch = self._epoch

        def unless_reset() -> Any:
            return job() if epoch == self._epoch else None

        try:
            self._workers.submit(unless_reset, partial(self._done, epoch, command, finish, failed))
        except RuntimeError as error:
            raise CommandError(Status.INTERNAL_ERROR) from error
        self._jobs += 1
        self._queues.start(command)

    def finish_writes(self, flush: Callable[[], object], done: Callable[[], None]) -> None:
        """Lets a thread call ``flush()`` when no command is under way, and then calls ``done()``, in the loop."""
        if self._jobs:
            self._when_idle = partial(self.finish_writes, flush, done)
            return
        epoch = self._epoch

        def ended(_result: object, error: Exception | None) -> None:
            if error is not None:
                text = "the drive has failed: flushing it for a shutdown: %s"
                self._log.warning(text, error, event=Event.DRIVE_FAILED)
            if epoch == self._epoch:
                done()

        try:
            self._workers.submit(flush, ended)
        except RuntimeError as error:
            ended(None, error)

    def wait(self, command: Command) -> None:
        """The command is tried again when others have ended."""
        self._queues.start(command)
        self._waiting.append(command)

    def _fetch(self, queue: SubmissionQueue, deadline: float) -> bool:
        """Fetches commands of a queue, and executes them until the time is over; False if there are none."""
        count = 0 if queue.is_closing else min(_BATCH, self._queues.room(queue), queue.size - queue.head)
        if not count:
            return False
        try:
            entries = self._memory.read(queue.address + _ENTRY * queue.head, _ENTRY * count)
        except DmaError as error:
            self._fail(f"commands can't be fetched: {error}")
            return False
        for start in range(0, len(entries), _ENTRY):
            queue.head = (queue.head + 1) % queue.size
            self._execute(Command(queue, entries[start : start + _ENTRY]))
            if self._loop.time() > deadline:
                break
        return True

    def _execute(self, command: Command) -> None:
        handler = (self.io if command.queue.id else self.admin).get(command.opcode)
        try:
            if handler is None:
                raise CommandError(Status.INVALID_OPCODE, 0)
            if command.flags & (FLAGS_FUSE | FLAGS_PSDT):  # there are no fused commands and no SGLs
                raise CommandError(Status.INVALID_FIELD, 1)
            dword0 = handler(command)
        except CommandError as error:
            self._end(command, error)
        except Exception:  # noqa: BLE001  a fault of ours must not lose the command
            self._log.exception("the command %#x failed", command.opcode, event=Event.DEVICE_FAILED)
            self._end(command, CommandError(Status.INTERNAL_ERROR))
        else:
            if dword0 is not None:
                self._end(command, dword0)

    def _end(self, command: Command, outcome: int | CommandError) -> None:
        if isinstance(outcome, CommandError):
            queue, lba = command.queue.id, command.cdw10 | command.cdw11 << 32 if command.queue.id else 0
            self._logs.add_error(queue, command.cid, outcome.field, outcome.location, lba, command.nsid)
            self._queues.complete(command, 0, outcome.field)
        else:
            self._queues.complete(command, outcome, Status.SUCCESS)

    def _done(
        self,
        epoch: int,
        command: Command,
        finish: Callable[[Any], int],
        failed: Callable[[CommandError], None],
        result: Any,
        error: Exception | None,
    ) -> None:
        """A job has ended."""
        if epoch != self._epoch:
            self.stale -= 1
            self._drained()
            return
        self._jobs -= 1
        try:
            if isinstance(error, CommandError):
                failed(error)
            if error is not None:
                raise error
            outcome: int | CommandError = finish(result)
        except CommandError as failure:
            outcome = failure
        except Exception:  # noqa: BLE001  as above
            self._log.exception("the command %#x failed", command.opcode, event=Event.DEVICE_FAILED)
            outcome = CommandError(Status.INTERNAL_ERROR)
        self._end(command, outcome)
        if not self._jobs and self._when_idle is not None:
            when_idle, self._when_idle = self._when_idle, None
            when_idle()
        self._finish()
        self._kick()

    def _finish(self) -> None:
        """At the end of a handler: what has been completed is posted by the next one."""
        self.report_events()
        self._queues.save()
        if self.is_running and any(each[0].free for each in self._queues.unposted):
            self._kick()

    def _kick(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(0, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.run()

    def _write(self, address: int, entries: bytes) -> None:
        """Writes completions such that each one's phase bit comes last. Raises DmaError."""
        try:
            view = self._memory.view(address, len(entries))
        except DmaError:
            self._memory.write(address, entries)
            return
        with view, view.cast("Q") as words, memoryview(entries).cast("Q") as source:
            for i, word in enumerate(source):
                words[i] = word
