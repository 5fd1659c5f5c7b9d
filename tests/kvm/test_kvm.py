# SPDX-License-Identifier: GPL-2.0-or-later
"""The wrappers of the KVM ioctls, on KVM."""

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Iterator

import pytest

from proxyd.kvm.kvm import Kvm, Vm
from proxyd.kvm.kvm_h import KVM_IRQCHIP_PIC_MASTER, ExitReason
from tests.support.fds import count_fds, no_more_fds
from tests.support.irqbench import M_CMD, M_DATA, MASTER_BASE, KvmBench
from tests.support.kvmguest import KvmMachine

pytestmark = pytest.mark.usefixtures("requires_kvm")

KVM_GET_TSC_KHZ = 0xAEA3
"""<linux/kvm.h>, in kHz; fails with EIO where the TSC is unstable"""

PIT_CHANNEL0, PIT_COMMAND = 0x40, 0x43
RATE_GENERATOR = 0x34


@pytest.fixture
def vm() -> Iterator[Vm]:
    with Kvm() as kvm, kvm.create_vm() as vm:
        yield vm


class Recorder:
    """A Handler that answers reads from a table and writes everything down."""

    def __init__(self) -> None:
        self.answers: dict[int, int] = {}
        self.seen: list[tuple[object, ...]] = []

    def port_in(self, port: int, size: int) -> int:
        self.seen.append(("in", port, size))
        return self.answers[port]

    def port_out(self, port: int, size: int, value: int) -> None:
        self.seen.append(("out", port, size, value))

    def mmio_read(self, address: int, size: int) -> int:
        self.seen.append(("read", address, size))
        return self.answers[address]

    def mmio_write(self, address: int, size: int, value: int) -> None:
        self.seen.append(("write", address, size, value))


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def machine(recorder: Recorder) -> Iterator[KvmMachine]:
    machine = KvmMachine(recorder)
    yield machine
    machine.close()


def test_a_vcpu_that_can_not_be_mapped_leaves_nothing_open(vm: Vm) -> None:
    """The mapping takes a second fd, a duplicate of the vCPU's."""
    before = count_fds()
    spare = os.dup(0)
    with no_more_fds():
        os.close(spare)
        with pytest.raises(OSError, match="Too many open files"):
            vm.create_vcpu()
    assert count_fds() == before


def load(vm: Vm, code: bytes, address: int = 0x1000) -> mmap.mmap:
    ram = mmap.mmap(-1, 0x10000)
    ram[address : address + len(code)] = code
    vm.map_ram(0, 0, ram)
    return ram


def test_the_irqchip_is_there_before_any_vcpu(vm: Vm) -> None:
    with pytest.raises(OSError, match="KVM_CREATE_IRQCHIP") as caught:
        vm.create_irqchip()
    assert caught.value.errno == errno.EEXIST
    assert vm.get_irqchip(KVM_IRQCHIP_PIC_MASTER).chip.pic.elcr_mask == 0xF8


def test_nothing_stays_open() -> None:
    before = count_fds()
    for _ in range(3):
        with Kvm() as kvm, kvm.create_vm() as vm:
            vm.create_vcpu()
    assert count_fds() == before


@pytest.mark.parametrize(
    ("size", "value"), [(1, 0xA5), (2, 0xA55A), (4, 0xA55A0FF0)], ids=["byte", "word", "dword"]
)
def test_port_and_memory_accesses_leave_kvm(
    machine: KvmMachine, recorder: Recorder, size: int, value: int
) -> None:
    guest = machine.guest
    port, address = 0x600, 0xE000_0000
    recorder.answers = {port: value, address: value}
    reads = {1: (guest.inb, guest.readb), 2: (guest.inw, guest.readw), 4: (guest.inl, guest.readl)}[size]
    writes = {1: (guest.outb, guest.writeb), 2: (guest.outw, guest.writew), 4: (guest.outl, guest.writel)}[
        size
    ]
    assert [read(target) for read, target in zip(reads, (port, address), strict=True)] == [value, value]
    for write, target in zip(writes, (port, address), strict=True):
        write(target, value)
    assert recorder.seen == [
        ("in", port, size),
        ("read", address, size),
        ("out", port, size, value),
        ("write", address, size, value),
    ]


def test_an_answer_that_is_too_wide_is_cut(machine: KvmMachine, recorder: Recorder) -> None:
    recorder.answers = {0x600: 0xFFFF_FFFF_FFFF_FF12, 0xE000_0000: -2}
    assert machine.guest.inb(0x600) == 0x12
    assert machine.guest.readw(0xE000_0000) == 0xFFFE


def test_a_string_instruction_is_served_item_by_item(vm: Vm, recorder: Recorder) -> None:
    # cld; mov $0x2000,%esi; mov $3,%ecx; mov $0x600,%edx; rep outsw; mov $0x3000,%edi; mov $2,%ecx; rep insl;
    # out %al,$0x80
    code = bytes.fromhex(
        "fc be00200000 b903000000 ba00060000 f3 66 6f bf00300000 b902000000 f3 6d e680".replace(" ", "")
    )
    ram = load(vm, code)
    ram[0x2000:0x2006] = b"\x11\x22\x33\x44\x55\x66"
    vcpu = vm.create_vcpu()
    vcpu.start_protected_mode(0x1000, 0x8000)
    sregs = vcpu.get_sregs()
    assert (sregs.cs.db, sregs.es.limit) == (1, 0xFFFF_FFFF)
    recorder.answers = {0x600: 0xCAFE_F00D}
    while vcpu.run() is ExitReason.IO and vcpu.state.io.port != 0x80:
        vcpu.complete_io(recorder.port_in, recorder.port_out)
    assert recorder.seen == [
        ("out", 0x600, 2, 0x2211),
        ("out", 0x600, 2, 0x4433),
        ("out", 0x600, 2, 0x6655),
        ("in", 0x600, 4),
        ("in", 0x600, 4),
    ]
    assert ram[0x3000:0x3008] == bytes.fromhex("0df0feca") * 2


def test_immediate_exit_returns_without_entering_the_guest(machine: KvmMachine) -> None:
    machine.vcpu.immediate_exit = True
    assert machine.vcpu.immediate_exit
    assert machine.vcpu.run() is ExitReason.INTR
    machine.vcpu.immediate_exit = False
    assert machine.guest.inb(M_DATA) == 0


def test_guest_ram_can_be_a_shared_memfd(vm: Vm) -> None:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 0x10000)
    with mmap.mmap(fd, 0x10000) as mine, mmap.mmap(fd, 0x10000) as other:
        os.close(fd)
        mine[0x1000:0x1009] = bytes.fromhex("c605002000007ee680")  # movb $0x7e,0x2000; out %al,$0x80
        vm.map_ram(0, 0, mine)
        vcpu = vm.create_vcpu()
        vcpu.start_protected_mode(0x1000, 0x8000)
        assert vcpu.run() is ExitReason.IO
        assert other[0x2000] == 0x7E
        vm.close()


def test_the_tsc_frequency_is_plausible(vm: Vm) -> None:
    vcpu = vm.create_vcpu()
    try:
        expected = fcntl.ioctl(vcpu.fd, KVM_GET_TSC_KHZ)
    except OSError as error:
        assert error.errno == errno.EIO
        expected = 0
    assert (vcpu.tsc_khz() or 0) == expected
    assert not expected or 100_000 < expected < 20_000_000


def start_ticks(bench: KvmBench, hertz: int) -> None:
    divisor = 1_193_182 // hertz
    bench.outb(PIT_COMMAND, RATE_GENERATOR)
    bench.outb(PIT_CHANNEL0, divisor & 0xFF)
    bench.outb(PIT_CHANNEL0, divisor >> 8)


def test_the_pit_ticks_on_and_on(kvm_bench: KvmBench) -> None:
    kvm_bench.init_pics()
    kvm_bench.machine.vm.create_pit()
    start_ticks(kvm_bench, 1000)
    for _ in range(3):
        assert kvm_bench.machine.guest.take(loops=20_000_000) == [MASTER_BASE]
        kvm_bench.eoi(0)


def test_a_tick_that_is_wiped_out_does_not_stop_the_pit(kvm_bench: KvmBench) -> None:
    bench = kvm_bench
    bench.init_pics()
    vm = bench.machine.vm
    vm.create_pit()
    start_ticks(bench, 1000)
    while not (chip := vm.get_irqchip(KVM_IRQCHIP_PIC_MASTER)).chip.pic.irr & 1:
        bench.inb(M_CMD)
    chip.chip.pic.irr = 0
    vm.set_irqchip(chip)
    assert bench.machine.guest.take(loops=20_000_000) == [MASTER_BASE]


def test_every_thread_may_use_a_vm(kvm_bench: KvmBench) -> None:
    thread = threading.Thread(target=kvm_bench.irqchip.set_line, args=(3, True))
    thread.start()
    thread.join()
    assert kvm_bench.irr() == 1 << 3
