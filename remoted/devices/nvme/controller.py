# SPDX-License-Identifier: GPL-2.0-or-later
"""The nvme model: controller registers and the controller's life (NVM Express 1.4, 3.1 and 7.6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from common.messages import Event
from remoted.device import (
    Bar,
    BarKind,
    Host,
    Msi,
    Msix,
    Option,
    PciExpress,
    PciFunction,
    PowerManagement,
    RateLimited,
    UsageError,
    register,
)
from remoted.devices.nvme import nvme_h
from remoted.devices.nvme.admin import AdminCommands
from remoted.devices.nvme.drive import open_drive
from remoted.devices.nvme.engine import Engine
from remoted.devices.nvme.events import (
    INVALID_DOORBELL_REGISTER,
    INVALID_DOORBELL_VALUE,
    AsyncEvents,
    EventType,
)
from remoted.devices.nvme.features import Features
from remoted.devices.nvme.identify import FIRMWARE, Identity
from remoted.devices.nvme.io import IoCommands
from remoted.devices.nvme.logs import Health, Logs
from remoted.devices.nvme.nvme_h import DOORBELLS, PAGE, Register
from remoted.devices.nvme.queues import MAX_IO_QUEUES, CompletionQueue, Queues, SubmissionQueue

__all__ = ["Nvme"]

_TIMEOUT = 240
"""CAP.TO, in units of 500 ms: what a slow drive may need to end what is under way"""
_CAP = (
    (nvme_h.MAX_QUEUE_ENTRIES - 1)
    | nvme_h.CAP_CQR
    | _TIMEOUT << nvme_h.CAP_TO_SHIFT
    | nvme_h.CAP_CSS_NVM
    | nvme_h.MAX_PAGE_SHIFT << nvme_h.CAP_MPSMAX_SHIFT
)
_MASK32 = 0xFFFF_FFFF
_PINNED_VECTORS = 32
"""that INTMS and INTMC have bits for"""
_MAX_SERIAL = 20
_FIXED = 0x3FF1
"""bits of CC that can't be changed while the controller is enabled: AMS, MPS, CSS, and EN itself"""


class Nvme(PciFunction):
    """An NVM Express controller with one namespace, on a raw image, a block device, or memory."""

    VENDOR_ID = 0x1B36
    DEVICE_ID = 0x0010
    REVISION = 2
    CLASS_CODE = 0x010802
    BARS: ClassVar = {0: Bar(BarKind.MEM64, 16384)}
    MSI = Msi(vectors=32)
    MSIX = Msix(vectors=MAX_IO_QUEUES + 1)
    CAPABILITIES = (PowerManagement(), PciExpress())
    REGISTERS: ClassVar = {0: {each.value: each.name for each in Register}}
    OPTIONS = (
        Option("drive", str, None, "what has the blocks: file:PATH (raw image, block device) or memory:SIZE"),
        Option("serial", str, None, "the serial number, up to 20 characters; the device's id if not given"),
        Option("queues", int, 4, "I/O queues of each kind", minimum=1, maximum=MAX_IO_QUEUES),
        Option("block-size", int, 512, "bytes of a block", choices=(512, 4096)),
    )
    PARTS = ("_queues", "_features", "_events", "_health")

    _cc: int = register(32)
    _csts: int = register(32)
    _intms: int = register(32)
    _aqa: int = register(32)
    _asq: int = register(64)
    _acq: int = register(64)

    def __init__(self, host: Host, options: Mapping[str, str]) -> None:
        """Opens the drive. Raises UsageError."""
        super().__init__(host, options)
        self._log = RateLimited(host.log)
        serial = self.options["serial"] or host.name[:_MAX_SERIAL]
        if len(serial) > _MAX_SERIAL or not (serial.isascii() and serial.isprintable()):
            raise UsageError(f"serial={serial}: must be at most {_MAX_SERIAL} printable characters of ASCII")
        if self.options["drive"] is None:
            raise UsageError("drive= is missing: file:PATH or memory:SIZE")
        block_size = self.options["block-size"]
        self._drive = open_drive(self.options["drive"], host.files)
        blocks, rest = divmod(self._drive.size, block_size)
        if not blocks:
            self._drive.close()
            raise UsageError(f"drive={self.options['drive']}: is smaller than a block of {block_size} bytes")
        if self._drive.is_read_only:
            host.log.info("its drive can only be read: the namespace is write-protected")
        if rest:
            host.log.info("the last %d bytes of the drive are left out: they are no whole block", rest)
        identity = Identity(
            self.VENDOR_ID, self.SUBSYSTEM_VENDOR_ID, serial, blocks, block_size, self._drive.is_read_only
        )
        queues = self.options["queues"]
        self._queues = Queues()
        self._features = Features(queues)
        self._events = AsyncEvents()
        self._health = Health()
        logs = Logs(self._health, FIRMWARE)
        self._engine = Engine(
            host, self._queues, self._events, logs, self._interrupt, self._fail, self._update_ready
        )
        self._io = IoCommands(
            host.memory, self._engine, self._drive, identity, self._features, self._health, self._log
        )
        admin = AdminCommands(
            host.memory, self._engine, self._queues, self._features, self._events, logs, identity, queues,
            self._entry_sizes, self._io.flush, self._lower_if_empty,
        )  # fmt: skip
        self._engine.admin = admin.handlers
        self._engine.io = self._io.handlers
        self.amiss.add(self._io.amiss)

    @property
    def counters(self) -> Mapping[str, int]:
        health = self._health
        return {
            "reads": health.reads,
            "writes": health.writes,
            "media_errors": health.media_errors,
            "failed_commands": health.errors,
        }

    def reset(self) -> None:
        self._io.forgive()
        self._stop()

    def restored(self) -> None:
        self._engine.page = PAGE << (self._cc >> nvme_h.CC_MPS_SHIFT & 0xF)
        self._engine.is_running = self._csts & (nvme_h.CSTS_RDY | nvme_h.CSTS_CFS) == nvme_h.CSTS_RDY
        self._engine.go_on()
        if self._csts & nvme_h.CSTS_SHST_MASK == nvme_h.CSTS_SHST_OCCURRING:
            self._begin_shutdown()
        self._update_ready()

    def close(self) -> None:
        self._engine.close(self._drive.close)

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        if offset % size:
            return 0
        values = {
            Register.CAP: _CAP,
            Register.VS: nvme_h.VERSION | self._intms << 32,
            Register.INTMC: self._intms | self._cc << 32,
            0x18: self._csts << 32,
            0x20: self._aqa << 32,
            Register.ASQ: self._asq,
            Register.ACQ: self._acq,
        }
        return values.get(offset & ~7, 0) >> 8 * (offset & 7)

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        if offset % size or size < 4:
            return
        if offset >= DOORBELLS:
            if size == 4:
                self._ring(offset - DOORBELLS, value & 0xFFFF)
            return
        for start in range(0, size, 4):
            self._write_register(offset + start, value >> 8 * start & _MASK32)

    def _write_register(self, offset: int, value: int) -> None:
        if offset == Register.CC:
            self._write_cc(value & nvme_h.CC_WRITABLE)
        elif offset == Register.INTMS:
            self._mask_interrupts(self._intms | value)
        elif offset == Register.INTMC:
            self._mask_interrupts(self._intms & ~value)
        elif offset == Register.AQA:
            self._aqa = value & nvme_h.AQA_WRITABLE
        elif offset == Register.ASQ:
            self._asq = self._asq & _MASK32 << 32 | value & ~0xFFF
        elif offset == Register.ASQ + 4:
            self._asq = self._asq & _MASK32 | value << 32
        elif offset == Register.ACQ:
            self._acq = self._acq & _MASK32 << 32 | value & ~0xFFF
        elif offset == Register.ACQ + 4:
            self._acq = self._acq & _MASK32 | value << 32

    def _write_cc(self, value: int) -> None:
        """Controller Configuration (3.1.5)."""
        old = self._cc
        if old & value & nvme_h.CC_EN:
            value = value & ~_FIXED | old & _FIXED
        self._cc = value
        if old & nvme_h.CC_EN and not value & nvme_h.CC_EN:
            self._intms = 0
            self._stop()
        shutdown = value >> nvme_h.CC_SHN_SHIFT & 3
        if shutdown and shutdown != old >> nvme_h.CC_SHN_SHIFT & 3:
            self._begin_shutdown()
        self._update_ready()

    def _stop(self) -> None:
        """What a controller reset does (7.3.2) to all but the registers for the admin queues."""
        self._engine.stop()
        self._features.clear()
        # It is ready until the last job has ended: what that writes must not overtake what the host writes next.
        self._csts &= nvme_h.CSTS_RDY
        for vector in range(self._features.queues + 1):
            self.lower_irq(vector)

    def _update_ready(self) -> None:
        """Lets CSTS.RDY follow CC.EN, as soon as nothing from before the last reset runs any more."""
        if self._engine.stale:
            return
        if not self._cc & nvme_h.CC_EN:
            self._csts &= ~nvme_h.CSTS_RDY
        elif not (self._engine.is_running or self._csts & nvme_h.CSTS_CFS):
            # RDY is still set if the host has not waited for the end of the reset.
            self._start()

    def _start(self) -> None:
        """Creates the admin queues, and is ready (7.6.1)."""
        submissions, completions = (self._aqa & 0xFFF) + 1, (self._aqa >> 16 & 0xFFF) + 1
        shift = self._cc >> nvme_h.CC_MPS_SHIFT & 0xF
        page = PAGE << shift
        problem = ""
        if submissions < 2 or completions < 2:
            problem = f"admin queues of {submissions} and {completions} entries"
        elif shift > nvme_h.MAX_PAGE_SHIFT:
            problem = f"memory pages of {page} bytes"
        elif self._asq % page or self._acq % page:
            problem = f"admin queues at {self._asq:#x} and {self._acq:#x}, which are not page-aligned"
        elif self._cc >> nvme_h.CC_CSS_SHIFT & 7 or self._cc >> nvme_h.CC_AMS_SHIFT & 7:
            problem = f"command set or arbitration of CC {self._cc:#x}"
        if problem:
            self._fail(f"it can't be enabled with {problem}")
            return
        self._engine.page = page
        completion_queue = CompletionQueue(0, self._acq, completions, 0, has_interrupts=True)
        self._queues.completions[0] = completion_queue
        self._queues.submissions[0] = SubmissionQueue(0, self._asq, submissions, completion_queue)
        self._queues.save()
        self._engine.is_running = True
        self._csts |= nvme_h.CSTS_RDY

    def _begin_shutdown(self) -> None:
        """What has been written goes to the medium (7.6.2)."""
        self._csts = self._csts & ~nvme_h.CSTS_SHST_MASK | nvme_h.CSTS_SHST_OCCURRING
        self._engine.finish_writes(self._io.flush_drive, self._end_shutdown)

    def _end_shutdown(self) -> None:
        self._csts = self._csts & ~nvme_h.CSTS_SHST_MASK | nvme_h.CSTS_SHST_COMPLETE

    def _fail(self, reason: str) -> None:
        """A fatal error: the controller does nothing more until the host resets it (9.5)."""
        self._engine.is_running = False
        self._csts |= nvme_h.CSTS_CFS
        self._log.warning(
            "the controller has failed until its reset: %s", reason, event=Event.CONTROLLER_FAILED
        )

    def _ring(self, offset: int, value: int) -> None:
        """A doorbell (3.1.24, 3.1.25): the new tail of a submission queue, or head of a completion queue."""
        self._engine.post()
        if not self._engine.is_running:
            return
        number = offset // 8
        if offset % 8:
            completions = self._queues.completions.get(number)
            if completions is not None:
                used = (completions.tail - completions.head) % completions.size
                if value >= completions.size or (value - completions.head) % completions.size > used:
                    self._events.report(EventType.ERROR, INVALID_DOORBELL_VALUE)
                else:
                    completions.head = value
                    self._lower_if_empty(completions.vector)
                self._engine.run()
                return
        else:
            submissions = self._queues.submissions.get(number)
            if submissions is not None:
                if value >= submissions.size:
                    self._events.report(EventType.ERROR, INVALID_DOORBELL_VALUE)
                else:
                    submissions.tail = value
                self._engine.run()
                return
        self._events.report(EventType.ERROR, INVALID_DOORBELL_REGISTER)
        self._engine.run()

    def _mask_interrupts(self, masked: int) -> None:
        """INTMS and INTMC (3.1.3, 3.1.4)."""
        changed, self._intms = self._intms ^ masked, masked
        for vector in range(_PINNED_VECTORS):
            if changed >> vector & 1:
                if masked >> vector & 1:
                    self.lower_irq(vector)
                elif self._has_unread(vector):
                    self.raise_irq(vector)

    def _interrupt(self, vector: int) -> None:
        if vector >= _PINNED_VECTORS or not self._intms >> vector & 1:
            self.raise_irq(vector)

    def _lower_if_empty(self, vector: int) -> None:
        if not self._has_unread(vector):
            self.lower_irq(vector)

    def _has_unread(self, vector: int) -> bool:
        return any(
            each.head != each.tail
            for each in self._queues.completions.values()
            if each.vector == vector and each.has_interrupts
        )

    def _entry_sizes(self) -> tuple[int, int]:
        return self._cc >> nvme_h.CC_IOSQES_SHIFT & 0xF, self._cc >> nvme_h.CC_IOCQES_SHIFT & 0xF
