# SPDX-License-Identifier: GPL-2.0-or-later
"""The part of <linux/kvm.h> and <asm/kvm.h> (x86) that is used here, under the kernel's names.

Request numbers are computed from the size of their argument, as the C macros do, so a wrong structure
gives a wrong number and the kernel answers ENOTTY instead of reading past the end.
"""

from ctypes import Structure, Union, c_int16, c_uint8, c_uint16, c_uint32, c_uint64, sizeof
from enum import IntEnum, IntFlag

KVM_API_VERSION = 12
KVM_NR_INTERRUPTS = 256
KVM_IOAPIC_NUM_PINS = 24
KVMIO = 0xAE

# <asm-generic/ioctl.h>
_IOC_NRSHIFT, _IOC_TYPESHIFT, _IOC_SIZESHIFT, _IOC_DIRSHIFT = 0, 8, 16, 30
_IOC_NONE, _IOC_WRITE, _IOC_READ = 0, 1, 2


def _ioc(direction: int, number: int, size: int) -> int:
    return (
        direction << _IOC_DIRSHIFT | size << _IOC_SIZESHIFT | KVMIO << _IOC_TYPESHIFT | number << _IOC_NRSHIFT
    )


def _IO(number: int) -> int:
    return _ioc(_IOC_NONE, number, 0)


def _IOR(number: int, argument: type[Structure]) -> int:
    return _ioc(_IOC_READ, number, sizeof(argument))


def _IOW(number: int, argument: type[Structure]) -> int:
    return _ioc(_IOC_WRITE, number, sizeof(argument))


class Capability(IntEnum):
    """KVM_CAP_*, without the prefix."""

    IRQCHIP = 0
    USER_MEMORY = 3
    SET_TSS_ADDR = 4
    REINJECT_CONTROL = 24
    IRQ_ROUTING = 25
    IRQFD = 32
    PIT2 = 33
    SET_IDENTITY_MAP_ADDR = 37
    GET_TSC_KHZ = 61
    IRQFD_RESAMPLE = 82
    IMMEDIATE_EXIT = 136


class ExitReason(IntEnum):
    """KVM_EXIT_*, the ones that a VM with an in-kernel irqchip can see."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    IOAPIC_EOI = 26


class IrqfdFlag(IntFlag):
    """KVM_IRQFD_FLAG_*."""

    DEASSIGN = 1 << 0
    RESAMPLE = 1 << 1


KVM_EXIT_IO_IN = 0
KVM_EXIT_IO_OUT = 1

KVM_IRQCHIP_PIC_MASTER = 0
KVM_IRQCHIP_PIC_SLAVE = 1
KVM_IRQCHIP_IOAPIC = 2

KVM_IRQ_ROUTING_IRQCHIP = 1
KVM_IRQ_ROUTING_MSI = 2


class kvm_userspace_memory_region(Structure):
    _fields_ = [
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    ]


class kvm_irq_level(Structure):
    _fields_ = [("irq", c_uint32), ("level", c_uint32)]


class kvm_stats_header(Structure):
    _fields_ = [
        ("flags", c_uint32),
        ("name_size", c_uint32),
        ("num_desc", c_uint32),
        ("id_offset", c_uint32),
        ("desc_offset", c_uint32),
        ("data_offset", c_uint32),
    ]


class kvm_stats_desc(Structure):
    """Without the name that follows."""

    _fields_ = [
        ("flags", c_uint32),
        ("exponent", c_int16),
        ("size", c_uint16),
        ("offset", c_uint32),
        ("bucket_size", c_uint32),
    ]


class kvm_irqfd(Structure):
    _fields_ = [
        ("fd", c_uint32),
        ("gsi", c_uint32),
        ("flags", c_uint32),
        ("resamplefd", c_uint32),
        ("pad", c_uint8 * 16),
    ]


class kvm_pit_config(Structure):
    _fields_ = [("flags", c_uint32), ("pad", c_uint32 * 15)]


class kvm_reinject_control(Structure):
    _fields_ = [("pit_reinject", c_uint8), ("reserved", c_uint8 * 31)]


class kvm_identity_map_addr(Structure):
    """The __u64 that KVM_SET_IDENTITY_MAP_ADDR points at."""

    _fields_ = [("addr", c_uint64)]


class kvm_pic_state(Structure):
    """State of one 8259A, exactly what arch/x86/kvm/i8259.c keeps per chip."""

    _fields_ = [
        ("last_irr", c_uint8),
        ("irr", c_uint8),
        ("imr", c_uint8),
        ("isr", c_uint8),
        ("priority_add", c_uint8),
        ("irq_base", c_uint8),
        ("read_reg_select", c_uint8),
        ("poll", c_uint8),
        ("special_mask", c_uint8),
        ("init_state", c_uint8),
        ("auto_eoi", c_uint8),
        ("rotate_on_auto_eoi", c_uint8),
        ("special_fully_nested_mode", c_uint8),
        ("init4", c_uint8),
        ("elcr", c_uint8),
        ("elcr_mask", c_uint8),
    ]


class kvm_ioapic_state(Structure):
    _fields_ = [
        ("base_address", c_uint64),
        ("ioregsel", c_uint32),
        ("id", c_uint32),
        ("irr", c_uint32),
        ("pad", c_uint32),
        ("redirtbl", c_uint64 * KVM_IOAPIC_NUM_PINS),
    ]


class _kvm_irqchip_chip(Union):
    _fields_ = [("dummy", c_uint8 * 512), ("pic", kvm_pic_state), ("ioapic", kvm_ioapic_state)]


class kvm_irqchip(Structure):
    _fields_ = [("chip_id", c_uint32), ("pad", c_uint32), ("chip", _kvm_irqchip_chip)]


class _kvm_irq_routing_irqchip(Structure):
    _fields_ = [("irqchip", c_uint32), ("pin", c_uint32)]


class _kvm_irq_routing_msi(Structure):
    _fields_ = [
        ("address_lo", c_uint32),
        ("address_hi", c_uint32),
        ("data", c_uint32),
        ("devid", c_uint32),
    ]


class _kvm_irq_routing_u(Union):
    _fields_ = [("irqchip", _kvm_irq_routing_irqchip), ("msi", _kvm_irq_routing_msi), ("pad", c_uint32 * 8)]


class kvm_irq_routing_entry(Structure):
    _fields_ = [
        ("gsi", c_uint32),
        ("type", c_uint32),
        ("flags", c_uint32),
        ("pad", c_uint32),
        ("u", _kvm_irq_routing_u),
    ]


class kvm_irq_routing(Structure):
    """Head of the table; ``nr`` entries of kvm_irq_routing_entry follow it."""

    _fields_ = [("nr", c_uint32), ("flags", c_uint32)]


class kvm_regs(Structure):
    _fields_ = [
        (name, c_uint64)
        for name in (
            *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
            *(f"r{number}" for number in range(8, 16)),
            *("rip", "rflags"),
        )
    ]


class kvm_segment(Structure):
    _fields_ = [
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        ("type", c_uint8),
        ("present", c_uint8),
        ("dpl", c_uint8),
        ("db", c_uint8),
        ("s", c_uint8),
        ("l", c_uint8),
        ("g", c_uint8),
        ("avl", c_uint8),
        ("unusable", c_uint8),
        ("padding", c_uint8),
    ]


class kvm_dtable(Structure):
    _fields_ = [("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3)]


class kvm_sregs(Structure):
    _fields_ = [
        *((name, kvm_segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        ("gdt", kvm_dtable),
        ("idt", kvm_dtable),
        *((name, c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", c_uint64 * (KVM_NR_INTERRUPTS // 64)),
    ]


class _kvm_run_io(Structure):
    _fields_ = [
        ("direction", c_uint8),
        ("size", c_uint8),
        ("port", c_uint16),
        ("count", c_uint32),
        ("data_offset", c_uint64),
    ]


class _kvm_run_mmio(Structure):
    _fields_ = [
        ("phys_addr", c_uint64),
        ("data", c_uint8 * 8),
        ("len", c_uint32),
        ("is_write", c_uint8),
    ]


class _kvm_run_internal(Structure):
    _fields_ = [("suberror", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16)]


class _kvm_run_exit(Union):
    _fields_ = [
        ("io", _kvm_run_io),
        ("mmio", _kvm_run_mmio),
        ("internal", _kvm_run_internal),
        ("padding", c_uint8 * 256),
    ]


class kvm_run(Structure):
    """Head of the page that a vCPU shares with its VMM (without the s.regs part that follows it)."""

    _anonymous_ = ("u",)
    _fields_ = [
        ("request_interrupt_window", c_uint8),
        ("immediate_exit", c_uint8),
        ("padding1", c_uint8 * 6),
        ("exit_reason", c_uint32),
        ("ready_for_interrupt_injection", c_uint8),
        ("if_flag", c_uint8),
        ("flags", c_uint16),
        ("cr8", c_uint64),
        ("apic_base", c_uint64),
        ("u", _kvm_run_exit),
    ]


class Request(IntEnum):
    """The ioctl requests, by their kernel names."""

    KVM_GET_API_VERSION = _IO(0x00)
    KVM_CREATE_VM = _IO(0x01)
    KVM_CHECK_EXTENSION = _IO(0x03)
    KVM_GET_VCPU_MMAP_SIZE = _IO(0x04)
    KVM_CREATE_VCPU = _IO(0x41)
    KVM_SET_USER_MEMORY_REGION = _IOW(0x46, kvm_userspace_memory_region)
    KVM_SET_TSS_ADDR = _IO(0x47)
    KVM_SET_IDENTITY_MAP_ADDR = _IOW(0x48, kvm_identity_map_addr)
    KVM_CREATE_IRQCHIP = _IO(0x60)
    KVM_IRQ_LINE = _IOW(0x61, kvm_irq_level)
    KVM_GET_IRQCHIP = _ioc(_IOC_READ | _IOC_WRITE, 0x62, sizeof(kvm_irqchip))
    KVM_SET_IRQCHIP = _IOR(0x63, kvm_irqchip)  # _IOR in the header, although userspace writes
    KVM_SET_GSI_ROUTING = _IOW(0x6A, kvm_irq_routing)
    KVM_REINJECT_CONTROL = _IO(0x71)
    KVM_IRQFD = _IOW(0x76, kvm_irqfd)
    KVM_CREATE_PIT2 = _IOW(0x77, kvm_pit_config)
    KVM_RUN = _IO(0x80)
    KVM_GET_REGS = _IOR(0x81, kvm_regs)
    KVM_SET_REGS = _IOW(0x82, kvm_regs)
    KVM_GET_SREGS = _IOR(0x83, kvm_sregs)
    KVM_SET_SREGS = _IOW(0x84, kvm_sregs)
    KVM_GET_TSC_KHZ = _IO(0xA3)
    KVM_GET_STATS_FD = _IO(0xCE)
