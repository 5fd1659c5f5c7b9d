# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM's irqfds with a real IOHub at the other end: what the PCI proxy relies on, in which order it acts."""

import errno
import os
import warnings
from collections.abc import Callable, Iterator

import pytest

from proxyd.kvm.irqchip import KvmIrqchip, intx_routing
from proxyd.kvm.kvm import Kvm
from proxyd.kvm.kvm_h import (
    KVM_IRQ_ROUTING_MSI,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    kvm_irq_routing_entry,
    kvm_irqchip,
)
from tests.support.irqbench import ELCR1, ELCR2, M_CMD, S_CMD, SLAVE_BASE, SPECIFIC_EOI, KvmBench, Pair
from tests.support.irqpeer import Function, Peer

IRQ10, IRQ11 = SLAVE_BASE + 2, SLAVE_BASE + 3
SPURIOUS_SLAVE = SLAVE_BASE + 7


@pytest.fixture
def bench(kvm_bench: KvmBench) -> KvmBench:
    kvm_bench.init_pics(level=(5, 9, 10, 11))
    return kvm_bench


@pytest.fixture
def function(bench: KvmBench) -> Iterator[Function]:
    function = Function(bench)
    yield function
    function.close()


@pytest.fixture
def sharer(bench: KvmBench) -> Iterator[Function]:
    function = Function(bench)
    yield function
    function.close()


def in_child(action: Callable[[], object]) -> str:
    """What the action raises in a forked child, as a line; empty if nothing."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork() with threads, since Python 3.12
        child = os.fork()
    if child == 0:
        try:
            try:
                action()
            except OSError as error:
                os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        line = pipe.read()
    os.waitpid(child, 0)
    return line


def test_a_forked_child_is_told_whose_vm_it_is(bench: KvmBench) -> None:
    vm, pair = bench.machine.vm, bench.pair()
    requests: dict[str, Callable[[], object]] = {
        "KVM_IRQFD": lambda: vm.assign_irqfd(10, *pair),
        "KVM_IRQ_LINE": lambda: vm.irq_line(10, True),
        "KVM_GET_IRQCHIP": lambda: vm.get_irqchip(KVM_IRQCHIP_PIC_MASTER),
        "KVM_SET_GSI_ROUTING": lambda: vm.set_gsi_routing(intx_routing()),
        "KVM_RUN": bench.machine.vcpu.run,
        "KVM_GET_SREGS": bench.machine.vcpu.get_sregs,
    }
    for name, request in requests.items():
        line = in_child(request)
        assert f"the VM belongs to process {os.getpid()}, KVM refuses process " in line
        assert f"'{name}'" in line
    bench.assign(10, pair)
    bench.fire(10, pair)
    assert bench.take() == [IRQ10]


def test_the_irqchip_puts_the_gsis_on_their_pins(bench: KvmBench) -> None:
    vm = bench.machine.vm
    vm.set_gsi_routing([])
    bench.irqchip.set_line(11, True)
    assert bench.irr() == 0
    irqchip = KvmIrqchip(vm)
    for gsi, pic_pins in ((11, 1 << 11), (5, 1 << 5), (20, 0)):
        irqchip.set_line(gsi, True)
        assert bench.irr() & 0xFFFB == pic_pins
        assert vm.get_irqchip(KVM_IRQCHIP_IOAPIC).chip.ioapic.irr == 1 << gsi
        irqchip.set_line(gsi, False)


def test_kvm_swallows_the_events_of_a_gsi_without_a_route(bench: KvmBench) -> None:
    pair, vm = bench.pair(), bench.machine.vm
    vm.assign_irqfd(60, *pair)
    bench.fire(60, pair)
    assert not pair.irqfd.test_and_clear(), "taken, although it goes nowhere"
    assert vm.get_irqchip(KVM_IRQCHIP_IOAPIC).chip.ioapic.irr == 0
    assert bench.irr() == 0
    vm.deassign_irqfd(60, pair.irqfd)


def test_kvm_ignores_a_deassign_with_the_wrong_gsi(bench: KvmBench) -> None:
    pair, vm = bench.pair(), bench.machine.vm
    vm.assign_irqfd(10, *pair)
    vm.deassign_irqfd(11, pair.irqfd)
    bench.fire(10, pair)
    assert bench.take() == [IRQ10]
    vm.deassign_irqfd(10, pair.irqfd)


def test_kvm_refuses_to_assign_before_the_old_gsi_is_given_up(bench: KvmBench, function: Function) -> None:
    function.route(10)
    with pytest.raises(OSError) as caught:
        bench.machine.vm.assign_irqfd(11, *function.pair)
    assert caught.value.errno == errno.EBUSY
    function.route(11)
    function.peer.set_level(True)
    function.settle()
    assert bench.take(2) == [IRQ11]


def test_a_line_that_moves_before_inta_arrives_on_the_new_pin(bench: KvmBench, function: Function) -> None:
    function.route(10)
    function.peer.set_level(True)
    function.settle()
    function.route(11)
    assert bench.irr() & (1 << 10 | 1 << 11) == 1 << 11
    assert bench.take(2) == [IRQ11]
    function.peer.set_level(False)
    bench.eoi(11)
    function.settle()
    assert bench.take() == []


def test_a_line_that_moves_before_eoi_arrives_on_the_new_pin(bench: KvmBench, function: Function) -> None:
    function.route(10)
    function.peer.set_level(True)
    function.settle()
    assert bench.take() == [IRQ10]
    function.route(11)
    assert bench.take() == [], "IRQ 10 is still in service and has the higher priority"
    bench.eoi(10)
    assert bench.take() == [IRQ11]
    function.peer.set_level(False)
    bench.eoi(11)
    function.settle()
    assert bench.take() == []
    assert function.peer.pirq.resamples == 3, "two kicks and the EOI of IRQ 11"


def test_a_line_whose_route_was_off_meanwhile_arrives_when_it_is_on(
    bench: KvmBench, function: Function
) -> None:
    function.route(10)
    function.peer.set_level(True)
    function.settle()
    function.route(None)
    assert bench.take() == [SPURIOUS_SLAVE]
    bench.outb(M_CMD, SPECIFIC_EOI | 2)
    function.route(10)
    assert bench.take() == [IRQ10]


def test_a_level_that_rose_while_unrouted_arrives_with_the_kick(bench: KvmBench, function: Function) -> None:
    function.peer.set_level(True)
    function.pair.irqfd.test_and_clear()
    function.route(10)
    assert bench.take() == [IRQ10]


def test_a_kick_of_a_low_line_does_nothing(bench: KvmBench, function: Function) -> None:
    for gsi in (10, 11, None, 10):
        function.route(gsi)
        assert bench.irr() == 0
    assert bench.take() == []


def test_no_raise_is_lost_and_none_is_spurious(bench: KvmBench, function: Function, sharer: Function) -> None:
    function.route(11)
    sharer.route(11)
    for _ in range(200):
        function.peer.set_level(True)
        function.settle()
        assert bench.take() == [IRQ11]
        sharer.peer.set_level(True)
        sharer.settle()
        function.peer.set_level(False)
        bench.eoi(11)
        function.settle()
        sharer.settle()
        assert bench.take() == [IRQ11], "the sharer is still high"
        sharer.peer.set_level(False)
        bench.eoi(11)
        function.settle()
        sharer.settle()
        assert bench.take() == []
    for peer in (function.peer, sharer.peer):
        assert peer.pirq.raised == 200


@pytest.mark.parametrize("cause", ["specific EOI", "another function", "an emulated device"])
def test_a_resample_without_assertion_is_nothing_to_the_peer(
    bench: KvmBench, function: Function, sharer: Function, cause: str
) -> None:
    function.route(11)
    sharer.route(11)
    if cause == "specific EOI":
        bench.outb(S_CMD, SPECIFIC_EOI | 3)
    elif cause == "another function":
        sharer.peer.set_level(True)
        sharer.settle()
        assert bench.take() == [IRQ11]
        sharer.peer.set_level(False)
        bench.eoi(11)
    else:
        bench.irqchip.set_line(11, True)
        assert bench.take() == [IRQ11]
        bench.irqchip.set_line(11, False)
        bench.eoi(11)
    before = function.peer.pirq.resamples
    function.settle()
    assert function.peer.pirq.resamples == before + 1
    assert function.peer.pirq.reasserts == 0
    assert bench.irr() & 1 << 11 == 0
    assert bench.take() == []


def test_a_spurious_interrupt_of_the_slave_leaves_the_next_one_working(
    bench: KvmBench, function: Function
) -> None:
    function.route(10)
    function.peer.set_level(True)
    function.settle()
    function.peer.set_level(False)
    function.route(None)
    assert bench.take() == [SPURIOUS_SLAVE]
    bench.outb(M_CMD, SPECIFIC_EOI | 2)
    function.route(10)
    function.peer.set_level(True)
    function.settle()
    assert bench.take() == [IRQ10]


def reset_pics(bench: KvmBench) -> None:
    """What a VMM without regard for irqfds does at reset."""
    for chip_id, elcr_mask in ((KVM_IRQCHIP_PIC_SLAVE, 0xDE), (KVM_IRQCHIP_PIC_MASTER, 0xF8)):
        chip = kvm_irqchip(chip_id)
        chip.chip.pic.elcr_mask = elcr_mask
        bench.machine.vm.set_irqchip(chip)


def wiggle(bench: KvmBench, gsi: int) -> None:
    bench.irqchip.set_line(gsi, True)
    bench.irqchip.set_line(gsi, False)


def test_an_assertion_survives_a_reset_of_the_chips_alone(bench: KvmBench, function: Function) -> None:
    function.route(11)
    function.peer.set_level(True)
    function.settle()
    reset_pics(bench)
    bench.init_pics(level=(11,))
    assert bench.irr() == 0
    wiggle(bench, 11)
    assert bench.irr() & 1 << 11, "out of nowhere, as the guest sees it"


def test_nothing_survives_a_reset_after_the_deassign(bench: KvmBench, function: Function) -> None:
    function.route(11)
    function.peer.set_level(True)
    function.settle()
    function.route(None)
    bench.irqchip.reset()
    bench.init_pics(level=(11,))
    wiggle(bench, 11)
    assert bench.irr() & 1 << 11 == 0
    function.route(11)
    assert bench.take() == [IRQ11], "the function is still high, and routed again"


def test_a_reset_leaves_the_state_of_a_new_vm(bench: KvmBench) -> None:
    chips = (KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC)
    with Kvm() as kvm, kvm.create_vm() as fresh:
        power_on = [bytes(fresh.get_irqchip(chip)) for chip in chips]
    vm = bench.machine.vm
    ioapic = vm.get_irqchip(KVM_IRQCHIP_IOAPIC)
    ioapic.chip.ioapic.redirtbl[11] = 1 << 16 | 1 << 15 | 0x5B
    ioapic.chip.ioapic.ioregsel = 0x26
    vm.set_irqchip(ioapic)
    bench.irqchip.set_line(11, True)
    bench.irqchip.set_line(12, True)
    assert bench.take() == [IRQ11]
    bench.irqchip.reset()
    assert [bytes(vm.get_irqchip(chip)) for chip in chips] == power_on


@pytest.mark.parametrize("gsi", [5, 11])
def test_an_assertion_in_the_midst_of_an_elcr_change_is_not_lost(
    bench: KvmBench, monkeypatch: pytest.MonkeyPatch, gsi: int
) -> None:
    pair = bench.assign(gsi)
    bench.outb(ELCR1, 0)
    bench.outb(ELCR2, 0)
    vm = bench.machine.vm
    set_irqchip = vm.set_irqchip

    def assert_then_set(chip: kvm_irqchip) -> None:
        bench.fire(gsi, pair)
        set_irqchip(chip)
        assert bench.irr() & 1 << gsi == 0, "the state from before the assertion"

    monkeypatch.setattr(vm, "set_irqchip", assert_then_set)
    assert bench.irqchip.set_level_triggered(gsi)
    assert bench.irr() & 1 << gsi


def test_routes_for_msi_leave_an_asserted_line_alone(bench: KvmBench, function: Function) -> None:
    function.route(11)
    function.peer.set_level(True)
    function.settle()
    assert bench.take() == [IRQ11]
    entries = intx_routing()
    for gsi in (24, 25):
        msi = kvm_irq_routing_entry(gsi, KVM_IRQ_ROUTING_MSI)
        msi.u.msi.address_lo, msi.u.msi.data = 0xFEE0_0000, 0x50
        entries.append(msi)
    bench.machine.vm.set_gsi_routing(entries)
    function.peer.set_level(False)
    bench.eoi(11)
    function.settle()
    assert function.peer.pirq.resamples == 2, "the kick and the EOI"
    assert bench.take() == []
    function.peer.set_level(True)
    function.settle()
    assert bench.take() == [IRQ11]


def test_the_last_close_of_an_irqfd_takes_its_assertion_along(bench: KvmBench) -> None:
    pair = Pair.create()
    peer = Peer(pair)
    bench.machine.vm.assign_irqfd(10, *pair)
    peer.set_level(True)
    bench.settle(10, pair)
    pair.close()
    assert bench.irr() & 1 << 10, "the peer's copy keeps the irqfd alive, out of reach"
    peer.close()
    for _ in range(100_000):  # KVM does it in its own time; each turn lets a guest run for microseconds
        if not bench.irr() & 1 << 10:
            break
    assert bench.irr() & 1 << 10 == 0


def test_an_interrupt_that_comes_late_finds_the_window_open(bench: KvmBench, function: Function) -> None:
    function.route(10)
    for _ in range(20):
        function.peer.set_level(True)
        assert bench.machine.guest.take(loops=20_000_000) == [IRQ10]
        function.peer.set_level(False)
        bench.eoi(10)
        function.settle()
        assert bench.machine.guest.take(loops=5000) == []
