# SPDX-License-Identifier: GPL-2.0-or-later
"""The PCI proxy on real KVM: a guest that does what the test says, edu functions behind the real remote side."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.disposal import Disposal
from common.errors import PeerGone, ProtocolError
from common.link import Client
from common.pci import parse_devfn
from remoted.devices.edu import Edu
from tests.support.pciboard import BARS, IDS, Board
from tests.support.remote import RemoteThread


class EduOnPinB(Edu):
    INTERRUPT_PIN = 2


class EduWithoutPin(Edu):
    INTERRUPT_PIN = 0


@pytest.fixture
def board(requires_kvm: None, tmp_path: Path) -> Iterator[Board]:
    board = Board(tmp_path)
    yield board
    board.close()


def test_nothing_is_assigned_before_the_router_is_programmed(board: Board) -> None:
    board.raise_line("a")
    assert board.nothing_arrives()
    assert board.bench.irr() & ~1 == 0
    board.route(0, 10)
    assert board.take() == [10]
    board.serve("a")
    assert board.nothing_arrives()


@pytest.mark.parametrize("irq", [0, 1, 2, 8, 13])
def test_the_router_does_not_drive_an_edge_only_irq(board: Board, irq: int) -> None:
    board.raise_line("a")
    board.route(0, irq)
    assert board.proxies["a"].gsi is None
    assert board.nothing_arrives()


def test_the_router_makes_its_irqs_level_triggered(board: Board) -> None:
    board.route(0, 10)
    board.route(1, 5)
    assert (board.guest.inb(0x4D0), board.guest.inb(0x4D1)) == (0x20, 0x04)
    # A sharer that asserts before the EOI of the other would be lost on an edge-triggered pin.
    board.raise_line("a")
    assert board.take() == [10]
    board.raise_line("shared")
    board.serve("a")
    assert board.take() == [10]
    board.serve("shared")
    assert board.nothing_arrives()


def test_a_line_moved_before_its_interrupt_is_taken_arrives_on_the_new_irq(board: Board) -> None:
    board.route(0, 10)
    board.raise_line("a")
    board.route(0, 11)
    assert board.take() == [11]
    board.serve("a")
    assert board.nothing_arrives()


def test_a_line_moved_between_interrupt_and_eoi_arrives_on_the_new_irq(board: Board) -> None:
    board.route(0, 10)
    board.raise_line("a")
    assert board.take() == [10]
    board.route(0, 11)
    board.eoi()
    assert board.take() == [11]
    board.serve("a")
    assert board.nothing_arrives()


def test_a_line_disabled_and_enabled_at_the_router_arrives_again(board: Board) -> None:
    board.route(0, 10)
    board.raise_line("a")
    assert board.take() == [10]
    board.route(0, 0x80)
    board.eoi()
    assert board.nothing_arrives()
    board.route(0, 10)
    assert board.take() == [10]
    board.serve("a")
    assert board.nothing_arrives()


def test_a_kick_brings_a_lost_assertion_back_and_does_nothing_to_a_low_line(board: Board) -> None:
    board.route(1, 11)
    board.raise_line("b")
    proxy = board.proxies["b"]
    proxy.quiesce()
    assert board.bench.irr() & 1 << 11 == 0
    proxy.set_routes([None] * 4)
    proxy.set_routes([11] * 4)
    assert board.take() == [11]
    board.serve("b")
    for _ in range(3):
        proxy.set_routes([None] * 4)
        proxy.set_routes([11] * 4)
    assert board.nothing_arrives()


def test_after_the_teardown_a_peer_that_kept_its_irqfd_reaches_nothing(board: Board) -> None:
    board.route(1, 11)
    kept = os.dup(board.proxies["b"]._pair.irqfd.fd)  # type: ignore[union-attr]
    try:
        board.proxies["b"].close()
        os.eventfd_write(kept, 1)
        assert board.nothing_arrives()
        assert board.bench.irr() & 1 << 11 == 0
        assert os.eventfd_read(kept) == 1, "KVM has still consumed it"
    finally:
        os.close(kept)


def test_a_reset_of_the_machine_leaves_no_assertion_behind(board: Board) -> None:
    board.route(0, 10)
    board.raise_line("a")
    board.host.reset()
    assert not board.functions["a"].intx_level
    board.bench.init_pics(level=(10,))
    assert board.bench.irr() & 1 << 10 == 0
    # What an irqfd has asserted survives KVM_SET_IRQCHIP and would come back when anybody touches the line.
    board.bench.irqchip.set_line(10, True)
    board.bench.irqchip.set_line(10, False)
    assert board.bench.irr() & 1 << 10 == 0
    assert board.config_read(IDS["a"], 0x04) & 0xFFFF == 0
    assert board.config_read("01.0", 0x60) == 0x80808080


def test_a_function_works_after_a_reset_with_its_line_high(board: Board) -> None:
    board.route(0, 10)
    board.raise_line("a")
    board.host.reset()
    board.bench.init_pics()
    board.config_write(IDS["a"], 0x10, BARS["a"])
    board.config_write(IDS["a"], 0x04, 0x0002)
    board.route(0, 10)
    assert board.nothing_arrives()
    board.raise_line("a")
    assert board.take() == [10]
    board.serve("a")
    assert board.nothing_arrives()


def test_intx_disable_withdraws_what_is_pending_and_clearing_it_signals_once(board: Board) -> None:
    board.route(1, 11)
    board.raise_line("b")
    board.config_write(IDS["b"], 0x04, 0x0402)
    assert board.bench.irr() & 1 << 11 == 0
    assert [irq for irq in board.take() if irq not in (7, 15)] == []
    board.eoi()
    assert board.config_read(IDS["b"], 0x04) >> 16 & 0x08, (
        "the status bit tells the level, whatever INTX_DISABLE says"
    )
    board.config_write(IDS["b"], 0x04, 0x0002)
    assert board.take() == [11]
    board.serve("b")
    assert board.nothing_arrives()


def test_intx_disable_next_to_a_sharer_costs_one_interrupt_at_most(board: Board) -> None:
    board.route(0, 10)
    board.raise_line("a")
    board.config_write(IDS["a"], 0x04, 0x0402)
    spurious = board.take()
    board.eoi()
    assert spurious in ([], [10])
    assert board.nothing_arrives()
    board.raise_line("shared")
    assert board.take() == [10]
    board.serve("shared")
    assert board.nothing_arrives()


def test_the_pin_is_the_remote_functions(requires_kvm: None, tmp_path: Path) -> None:
    board = Board(tmp_path, EduOnPinB)
    try:
        board.route(0, 10)
        board.route(1, 11)
        board.raise_line("a")
        assert board.take() == [11]
        board.serve("a")
        assert board.nothing_arrives()
    finally:
        board.close()


def test_a_function_without_a_pin_has_no_irqfd(requires_kvm: None, tmp_path: Path) -> None:
    board = Board(tmp_path, EduWithoutPin)
    try:
        board.route(0, 10)
        board.raise_line("a")
        assert board.proxies["a"].gsi is None
        assert not board.remote.hub.pirqs[parse_devfn(IDS["a"])].has_irqfd
        assert board.nothing_arrives()
    finally:
        board.close()


def test_a_remote_that_vanishes_takes_its_line_along_and_finds_its_registers_again(board: Board) -> None:
    board.route(1, 11)
    board.raise_line("b")
    board.remote.close()
    assert board.config_read(IDS["b"], 0x00) == 0xFFFFFFFF
    board.guest.writel(BARS["b"], 1)
    assert board.lost == [board.proxies["b"]]
    assert board.bench.irr() & 1 << 11 == 0
    assert board.guest.readl(BARS["b"]) == 0xFFFFFFFF

    proxy = board.proxies["b"]
    proxy.reap()
    with pytest.raises(PeerGone):
        proxy.connect()
    successor = RemoteThread(Path(board.remote.path("b")).parent)
    function = successor.add(Edu, "b", parse_devfn(IDS["b"]))
    successor.start()
    try:
        proxy.connect()
        proxy.attach()
        assert proxy.reconnects == 1
        assert board.guest.readl(BARS["b"]) == 0x010000ED, (
            "BAR and command are those that the guest had programmed"
        )
        function.set_intx(False)
        board.raise_line("b")
        assert board.take() == [11]
        board.serve("b")
        assert board.nothing_arrives()
    finally:
        proxy.close()
        successor.close()
        board.remote = RemoteThread(Path(board.remote.path("b")).parent)
        board.remote.start()


def test_another_function_at_the_same_socket_is_refused(board: Board) -> None:
    class Other(Edu):
        DEVICE_ID = 0x4242

    board.remote.close()
    assert board.config_read(IDS["a"], 0x00) == 0xFFFFFFFF
    board.proxies["a"].reap()
    board.remote = RemoteThread(Path(board.remote.path("a")).parent)
    board.remote.add(Other, "a", parse_devfn(IDS["a"]))
    board.remote.start()
    with pytest.raises(ProtocolError, match="not the same function"):
        board.proxies["a"].connect()
    assert board.config_read(IDS["a"], 0x00) == 0xFFFFFFFF


def test_a_remote_that_hangs_costs_one_deadline_and_its_line(board: Board, tmp_path: Path) -> None:
    """The link of a function is replaced by one whose other end reads everything and answers nothing."""
    board.route(1, 11)
    board.raise_line("b")
    proxy = board.proxies["b"]
    ours, theirs = socket.socketpair()
    assert proxy._client is not None
    proxy._client.close()
    proxy._client = Client(ours, deadline=0.05, disposal=Disposal())
    with theirs:
        assert board.config_read(IDS["b"], 0x00) == 0xFFFFFFFF
        assert board.lost == [proxy]
        assert board.bench.irr() & 1 << 11 == 0
        assert board.guest.readl(BARS["b"]) == 0xFFFFFFFF


def test_a_round_trip_can_be_aborted_from_another_thread(board: Board) -> None:
    proxy = board.proxies["a"]
    ours, theirs = socket.socketpair()
    assert proxy._client is not None
    proxy._client.close()
    proxy._client = Client(ours, deadline=60.0, disposal=Disposal())
    with theirs:

        def abort() -> None:
            theirs.recv(16)  # the request is under way
            proxy.abort()

        thread = threading.Thread(target=abort)
        thread.start()
        assert board.config_read(IDS["a"], 0x00) == 0xFFFFFFFF
        thread.join()


def test_a_line_that_is_high_when_the_vm_is_saved_interrupts_the_restored_one_once(
    requires_kvm: None, tmp_path: Path
) -> None:
    board = Board(tmp_path)
    board.route(1, 11)
    board.raise_line("b")
    saved = board.save()
    assert not saved.chips[1].chip.pic.irr & 1 << 3, "what the irqfd asserts is not in the saved state"
    board.close_vm()
    restored = Board(tmp_path, saved=saved)
    try:
        assert restored.functions["b"].intx_level
        restored.route(1, 11)
        assert restored.take() == [11]
        restored.serve("b")
        assert restored.nothing_arrives()
        assert not restored.functions["b"].intx_level
    finally:
        restored.close()


def test_an_irqfd_that_kvm_refuses_costs_the_link_and_nothing_else(board: Board) -> None:
    """KVM takes an eventfd once, whatever the GSI."""
    board.route(0, 10)
    proxy = board.proxies["b"]
    pair = proxy._pair
    assert pair.irqfd is not None
    assert pair.resamplefd is not None
    board.bench.machine.vm.assign_irqfd(23, pair.irqfd, pair.resamplefd)
    board.raise_line("b")
    board.route(1, 11)
    assert board.lost == [proxy]
    assert proxy.gsi is None
    assert board.config_read(IDS["b"], 0x00) == 0xFFFFFFFF
    board.raise_line("a")
    assert board.take() == [10]
    board.serve("a")
    proxy.reap()
    proxy.connect()
    proxy.attach()
    assert board.take() == [11]
    board.serve("b")
    assert board.nothing_arrives()
