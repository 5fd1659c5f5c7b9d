# SPDX-License-Identifier: GPL-2.0-or-later
"""Thin wrappers of the KVM ioctls: class Kvm is /dev/kvm, Vm a machine with an in-kernel irqchip, Vcpu a CPU.

Source: Documentation/virt/kvm/api.rst. Every failing request raises OSError with the request's name. KVM
serves a VM only in the address space that created it: threads may share a Vm, a forked child gets EIO.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from fcntl import ioctl
from typing import Self, TypeAlias

from common.errors import UsageError
from common.notifier import EventNotifier
from proxyd.kvm.kvm_h import (
    KVM_API_VERSION,
    KVM_EXIT_IO_IN,
    Capability,
    ExitReason,
    IrqfdFlag,
    Request,
    kvm_identity_map_addr,
    kvm_irq_level,
    kvm_irq_routing,
    kvm_irq_routing_entry,
    kvm_irqchip,
    kvm_irqfd,
    kvm_pit_config,
    kvm_regs,
    kvm_reinject_control,
    kvm_run,
    kvm_segment,
    kvm_sregs,
    kvm_userspace_memory_region,
)
from proxyd.kvm.stats import VcpuStats

__all__ = ["REQUIRED_CAPABILITIES", "Kvm", "Vcpu", "Vm", "missing_capabilities"]

REQUIRED_CAPABILITIES = (
    Capability.USER_MEMORY,
    Capability.SET_TSS_ADDR,
    Capability.SET_IDENTITY_MAP_ADDR,
    Capability.IRQCHIP,
    Capability.PIT2,
    Capability.REINJECT_CONTROL,
    Capability.IRQ_ROUTING,
    Capability.IRQFD,
    Capability.GET_TSC_KHZ,
    Capability.IRQFD_RESAMPLE,
    Capability.IMMEDIATE_EXIT,
)

# Intel's VMX without unrestricted guest needs four pages of guest-physical space of its own. fcntl.ioctl()
# takes no integer argument of 2 GiB or more, so they are the last ones below that; RAM and BARs must stay
# clear of them.
_TSS_ADDRESS = (1 << 31) - 3 * mmap.PAGESIZE
_IDENTITY_MAP_ADDRESS = _TSS_ADDRESS - mmap.PAGESIZE

_SOFT = "--vm soft works without KVM"

_KVM_RUN = int(Request.KVM_RUN)
_REASONS = {int(reason): reason for reason in ExitReason}
_unpack_io = struct.Struct("<BBHIQ").unpack_from
_IO_OFFSET = kvm_run.io.offset


_Argument: TypeAlias = int | ctypes.Structure | ctypes.Array[ctypes.c_char]


def _ioctl(fd: int, request: Request, argument: _Argument = 0) -> int:
    try:
        return ioctl(fd, request, argument)
    except OSError as error:
        raise OSError(error.errno, error.strerror, request.name) from error


def missing_capabilities(present: Mapping[Capability, int]) -> list[str]:
    """Names of the required capabilities that ``present`` lacks or holds a 0 for, in the order of the table.

    ``present`` maps a capability to the answer of KVM_CHECK_EXTENSION.
    """
    return [f"KVM_CAP_{wanted.name}" for wanted in REQUIRED_CAPABILITIES if present.get(wanted, 0) <= 0]


class Kvm:
    """/dev/kvm, opened and checked."""

    def __init__(self, path: str = "/dev/kvm") -> None:
        """Raises UsageError, which names the way without KVM, when KVM is missing or not permitted."""
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}; {_SOFT}") from error
        try:
            version = _ioctl(self.fd, Request.KVM_GET_API_VERSION)
            if version != KVM_API_VERSION:
                raise UsageError(f"{path} speaks API version {version}, not {KVM_API_VERSION}; {_SOFT}")
            self.vcpu_mmap_size = _ioctl(self.fd, Request.KVM_GET_VCPU_MMAP_SIZE)
        except OSError as error:
            self.close()
            raise UsageError(f"{path} is not KVM's device: {error.strerror}; {_SOFT}") from error
        except UsageError:
            self.close()
            raise

    def create_vm(self) -> Vm:
        """A VM with KVM's PICs and IOAPIC, and no vCPU yet: KVM requires this order.

        Raises UsageError with the names of the capabilities that are missing, OSError if KVM refuses.
        """
        vm = Vm(_ioctl(self.fd, Request.KVM_CREATE_VM), self.vcpu_mmap_size)
        try:
            # Checked on the VM: IRQFD_RESAMPLE depends on the kind of VM, and /dev/kvm answers for the best one.
            missing = missing_capabilities({wanted: vm.check_extension(wanted) for wanted in Capability})
            if missing:
                raise UsageError(f"KVM lacks {', '.join(missing)}; {_SOFT}")
            vm.create_irqchip()
        except BaseException:
            vm.close()
            raise
        return vm

    def close(self) -> None:
        """Closes /dev/kvm; VMs made from it live on."""
        fd, self.fd = self.fd, -1
        if fd != -1:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


class Vm:
    """One VM; made by Kvm.create_vm()."""

    def __init__(self, fd: int, vcpu_mmap_size: int) -> None:
        self.fd = fd
        self._vcpu_mmap_size = vcpu_mmap_size
        self._owner = os.getpid()
        self._ram: dict[int, mmap.mmap] = {}
        self._vcpus: list[Vcpu] = []

    def ioctl(self, request: Request, argument: _Argument = 0) -> int:
        """Issues a request on the VM. Raises OSError, which says so when the caller is a forked child."""
        return self.ioctl_on(self.fd, request, argument)

    def ioctl_on(self, fd: int, request: Request, argument: _Argument = 0) -> int:
        """The same on the VM's own fd or on that of one of its vCPUs."""
        try:
            return ioctl(fd, request, argument)
        except OSError as error:
            raise self.explain(error, request) from error

    def explain(self, error: OSError, request: Request) -> OSError:
        """The error of a failed request with the request's name, and in a forked child with the reason."""
        if error.errno == errno.EIO and os.getpid() != self._owner:
            reason = f"the VM belongs to process {self._owner}, KVM refuses process {os.getpid()}"
            return OSError(errno.EIO, reason, request.name)
        return OSError(error.errno, error.strerror, request.name)

    def check_extension(self, capability: Capability) -> int:
        """KVM_CHECK_EXTENSION: 0 if the VM lacks the capability, else 1 or a value with a meaning of its own."""
        return self.ioctl(Request.KVM_CHECK_EXTENSION, capability)

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP, once, before any vCPU; and the pages that VMX needs."""
        self.ioctl(Request.KVM_SET_IDENTITY_MAP_ADDR, kvm_identity_map_addr(_IDENTITY_MAP_ADDRESS))
        self.ioctl(Request.KVM_SET_TSS_ADDR, _TSS_ADDRESS)
        self.ioctl(Request.KVM_CREATE_IRQCHIP)

    def create_pit(self) -> None:
        """KVM_CREATE_PIT2: an i8254 at ports 0x40 to 0x43 and 0x61, wired to IRQ 0.

        Missed ticks aren't reinjected: KVM would do so only after the EOI of the tick before, and a tick that
        KVM_SET_IRQCHIP has cleared is never acknowledged, so the timer would stop for good.
        """
        self.ioctl(Request.KVM_CREATE_PIT2, kvm_pit_config())
        self.ioctl(Request.KVM_REINJECT_CONTROL, kvm_reinject_control(pit_reinject=0))

    def map_ram(self, slot: int, guest_address: int, ram: mmap.mmap) -> None:
        """Maps all of ``ram``, anonymous or of a memfd, at a guest-physical byte address.

        Address and length are multiples of the page size. The VM keeps the mapping alive; it must not be
        closed before the VM.
        """
        address = ctypes.addressof(ctypes.c_char.from_buffer(ram))
        region = kvm_userspace_memory_region(slot, 0, guest_address, len(ram), address)
        self.ioctl(Request.KVM_SET_USER_MEMORY_REGION, region)
        self._ram[slot] = ram

    def create_vcpu(self, vcpu_id: int = 0) -> Vcpu:
        """KVM_CREATE_VCPU; number 0 starts running, the state is that after a reset."""
        vcpu = Vcpu(self.ioctl(Request.KVM_CREATE_VCPU, vcpu_id), self._vcpu_mmap_size, self)
        self._vcpus.append(vcpu)
        return vcpu

    def assign_irqfd(self, gsi: int, irqfd: EventNotifier, resamplefd: EventNotifier) -> None:
        """KVM_IRQFD with RESAMPLE: ``irqfd`` asserts the GSI, EOI lowers it and signals ``resamplefd``.

        KVM doesn't check the GSI: it accepts one without a route and drops every event. Raises OSError, with
        EBUSY when the eventfd is an irqfd already, on any GSI.
        """
        self.ioctl(Request.KVM_IRQFD, kvm_irqfd(irqfd.fd, gsi, IrqfdFlag.RESAMPLE, resamplefd.fd))

    def deassign_irqfd(self, gsi: int, irqfd: EventNotifier) -> None:
        """KVM_IRQFD with DEASSIGN: drains the eventfd, and lowers the line if no other irqfd is on ``gsi``.

        Returns when a pending injection is over. A GSI other than that of the assignment is no error to KVM
        and leaves everything as it is.
        """
        self.ioctl(Request.KVM_IRQFD, kvm_irqfd(irqfd.fd, gsi, IrqfdFlag.DEASSIGN))

    def irq_line(self, gsi: int, level: bool) -> None:
        """KVM_IRQ_LINE: drives the userspace source of ``gsi``, which is ORed with that of the irqfds."""
        self.ioctl(Request.KVM_IRQ_LINE, kvm_irq_level(gsi, level))

    def get_irqchip(self, chip_id: int) -> kvm_irqchip:
        """KVM_GET_IRQCHIP of a KVM_IRQCHIP_* chip. The state of the interrupt sources isn't part of it."""
        chip = kvm_irqchip(chip_id)
        self.ioctl(Request.KVM_GET_IRQCHIP, chip)
        return chip

    def set_irqchip(self, chip: kvm_irqchip) -> None:
        """KVM_SET_IRQCHIP: replaces the whole state of one chip, but no interrupt source."""
        self.ioctl(Request.KVM_SET_IRQCHIP, chip)

    def set_gsi_routing(self, entries: Sequence[kvm_irq_routing_entry]) -> None:
        """KVM_SET_GSI_ROUTING: replaces the whole table."""
        table = bytes(kvm_irq_routing(len(entries))) + b"".join(bytes(entry) for entry in entries)
        self.ioctl(Request.KVM_SET_GSI_ROUTING, ctypes.create_string_buffer(table, len(table)))

    def close(self) -> None:
        """Closes the vCPUs and the VM. A vCPU must not be running."""
        while self._vcpus:
            self._vcpus.pop().close()
        fd, self.fd = self.fd, -1
        if fd != -1:
            os.close(fd)
        self._ram.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


class Vcpu:
    """One vCPU; run() belongs to one thread at a time, immediate_exit to any."""

    def __init__(self, fd: int, mmap_size: int, vm: Vm) -> None:
        """Takes ownership of the fd, also when it raises OSError or ValueError because kvm_run can't be mapped."""
        self.fd = fd
        self._vm = vm
        try:
            self._shared = mmap.mmap(fd, mmap_size)
            self._run: kvm_run | None = kvm_run.from_buffer(self._shared)
        except BaseException:
            self.fd = -1
            os.close(fd)
            raise

    @property
    def state(self) -> kvm_run:
        """The head of the page shared with KVM; the exit's details are in it."""
        if self._run is None:
            raise ValueError("the vCPU is closed")
        return self._run

    def run(self) -> ExitReason:
        """KVM_RUN until the guest needs the VMM; INTR when a signal or immediate_exit ended it instead.

        The data of an IN or a read is taken over by the next call.
        """
        try:
            ioctl(self.fd, _KVM_RUN)
        except InterruptedError:
            return ExitReason.INTR
        except OSError as error:
            raise self._vm.explain(error, Request.KVM_RUN) from error
        reason: int = self.state.exit_reason
        return _REASONS.get(reason) or ExitReason(reason)

    @property
    def immediate_exit(self) -> bool:
        """While True, run() completes the last exit and returns INTR without entering the guest."""
        return bool(self.state.immediate_exit)

    @immediate_exit.setter
    def immediate_exit(self, value: bool) -> None:
        self.state.immediate_exit = value

    def complete_io(
        self, port_in: Callable[[int, int], int], port_out: Callable[[int, int, int], None]
    ) -> None:
        """Serves an IO exit, item by item when it's a string instruction.

        ``port_in(port, size) -> value``, ``port_out(port, size, value)``; sizes are 1, 2 or 4 bytes, values
        unsigned; more bits than fit are cut off.
        """
        # One call instead of a ctypes access for each field.
        direction, size, port, count, offset = _unpack_io(self._shared, _IO_OFFSET)
        mask = (1 << 8 * size) - 1
        for start in range(offset, offset + count * size, size):
            if direction == KVM_EXIT_IO_IN:
                value = port_in(port, size) & mask
                self._shared[start : start + size] = value.to_bytes(size, "little")
            else:
                port_out(port, size, int.from_bytes(self._shared[start : start + size], "little"))

    def complete_mmio(self, read: Callable[[int, int], int], write: Callable[[int, int, int], None]) -> None:
        """Serves an MMIO exit of 1 to 8 bytes: ``read(address, size)``, ``write(address, size, value)``."""
        mmio = self.state.mmio
        size: int = mmio.len
        if mmio.is_write:
            write(mmio.phys_addr, size, int.from_bytes(bytes(mmio.data)[:size], "little"))
        else:
            value = read(mmio.phys_addr, size) & (1 << 8 * size) - 1
            mmio.data[:size] = value.to_bytes(size, "little")

    def get_sregs(self) -> kvm_sregs:
        """KVM_GET_SREGS."""
        sregs = kvm_sregs()
        self._ioctl(Request.KVM_GET_SREGS, sregs)
        return sregs

    def start_protected_mode(self, entry: int, stack: int) -> None:
        """Flat 32-bit segments without paging, as a multiboot loader leaves them: selectors 8 and 0x10.

        ``entry`` and ``stack`` are linear addresses. The guest loads its own GDT before it takes an
        interrupt.
        """
        sregs = self.get_sregs()
        sregs.cs = _flat_segment(0x08, 0xB)
        for name in ("ds", "es", "fs", "gs", "ss"):
            setattr(sregs, name, _flat_segment(0x10, 0x3))
        sregs.cr0 |= 1  # PE
        self._start(sregs, entry, stack)

    def tsc_khz(self) -> int | None:
        """The guest's TSC frequency in kHz, None where the host's isn't stable."""
        try:
            return self._ioctl(Request.KVM_GET_TSC_KHZ) or None
        except OSError as error:
            if error.errno == errno.EIO:
                return None
            raise

    def stats(self) -> VcpuStats | None:
        """Its statistics; None where KVM has none, before Linux 5.14. To be called before it runs."""
        try:
            return VcpuStats(self._ioctl(Request.KVM_GET_STATS_FD))
        except OSError:
            return None

    def close(self) -> None:
        """Closes the vCPU; a second call does nothing."""
        self._run = None  # else the mapping has an exported buffer and can't be closed
        with contextlib.suppress(BufferError):  # somebody's traceback may still hold a view of it
            self._shared.close()
        fd, self.fd = self.fd, -1
        if fd != -1:
            os.close(fd)

    def _ioctl(self, request: Request, argument: _Argument = 0) -> int:
        return self._vm.ioctl_on(self.fd, request, argument)

    def _start(self, sregs: kvm_sregs, entry: int, stack: int) -> None:
        self._ioctl(Request.KVM_SET_SREGS, sregs)
        self._ioctl(Request.KVM_SET_REGS, kvm_regs(rip=entry, rsp=stack, rflags=0x2))


def _flat_segment(selector: int, kind: int) -> kvm_segment:
    return kvm_segment(limit=0xFFFF_FFFF, selector=selector, type=kind, present=1, db=1, s=1, g=1)
