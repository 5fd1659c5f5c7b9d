# SPDX-License-Identifier: GPL-2.0-or-later
"""Levels over real sockets and eventfds: interrupts are never lost nor invented."""

from __future__ import annotations

import os

import pytest

from common.mpqemu import BAR, CONFIG, Command, request_frame
from tests.support.fds import await_fds, count_fds
from tests.support.remotebench import IO_BASE, LineDevice, Pair, Peer, RemoteBench

FULL = (1 << 64) - 2


def test_intx_disable_set_and_cleared_while_high_leaves_nothing_behind(
    bench: RemoteBench, peer: Peer, pair: Pair
) -> None:
    """The line is a boolean: after it fell, no resample finds it high, and the next raise is signalled."""
    peer.drive(True)
    peer.disable_intx(True)
    peer.disable_intx(False)
    peer.drive(False)
    pair.written()
    for _ in range(4):
        bench.resample(pair)
    assert pair.written() == 0
    peer.drive(True)
    assert pair.written() == 1


def test_irqfd_is_written_once_for_each_effective_rise(bench: RemoteBench, peer: Peer, pair: Pair) -> None:
    for _ in range(3):
        peer.drive(True)
        peer.drive(True)
        assert pair.written() == 1
        peer.disable_intx(True)
        assert pair.written() == 0
        peer.disable_intx(False)
        assert pair.written() == 1
        peer.drive(False)
        assert pair.written() == 0


@pytest.mark.parametrize("count", [1, 4, FULL])
def test_resample_is_read_once_and_asserts_what_is_still_high(
    bench: RemoteBench, peer: Peer, pair: Pair, count: int
) -> None:
    peer.drive(True)
    pair.written()
    os.eventfd_write(pair.resamplefd.fd, count)
    bench.settle()
    assert pair.written() == 1
    assert not pair.resamplefd.test_and_clear()
    peer.disable_intx(True)
    os.eventfd_write(pair.resamplefd.fd, count)
    bench.settle()
    assert pair.written() == 0
    assert not pair.resamplefd.test_and_clear()


def test_acknowledgement_that_was_received_before_the_resample_counts(
    bench: RemoteBench, peer: Peer, pair: Pair
) -> None:
    peer.drive(True)
    pair.written()
    peer.queue_line(False)
    pair.resamplefd.set()
    bench.settle()
    assert pair.written() == 0
    assert peer.receive() == 0


def test_acknowledgement_behind_other_messages_and_in_pieces_counts(
    bench: RemoteBench, peer: Peer, pair: Pair
) -> None:
    acknowledge = request_frame(Command.BAR_WRITE, BAR.pack(IO_BASE, 0, 1, False))
    for cut in range(1, len(acknowledge)):
        peer.drive(True)
        pair.written()
        pair.resamplefd.set()
        for _ in range(10):
            peer.send(Command.PCI_CFGREAD, CONFIG.pack(0, 0, 4))
        peer.send_bytes(acknowledge[:cut])
        peer.send_bytes(acknowledge[cut:])
        bench.settle()
        assert pair.written() == 0
        assert [peer.receive() for _ in range(12)] == [0x00421B36] * 10 + [0, None]


def test_acknowledgement_behind_a_full_queue_counts_and_delays_no_other_function(
    bench: RemoteBench, peer: Peer, pair: Pair
) -> None:
    bench.add(LineDevice, "other", 0x48)
    other = bench.connect("other")
    other.enable()
    others_pair = other.set_irqfd()
    other.drive(True)
    others_pair.written()
    peer.drive(True)
    pair.written()
    for _ in range(100):
        peer.send(Command.SYNC_SYSMEM, bytes(192))
    peer.queue_line(False)
    pair.resamplefd.set()
    others_pair.resamplefd.set()
    bench.loop.step()
    assert others_pair.written() == 1
    bench.settle()
    assert pair.written() == 0
    assert peer.receive() == 0
    other.close()


def test_acknowledgements_of_all_functions_count_before_the_resample_of_their_gsi(
    bench: RemoteBench, peer: Peer, pair: Pair
) -> None:
    """Both share a GSI: KVM tells both of the EOI. One is acknowledged, one isn't."""
    with bench.connect("dev1") as other:
        other.enable()
        others = other.set_irqfd()
        for acknowledged, still_high in ((peer, others), (other, pair)):
            peer.drive(True)
            other.drive(True)
            pair.written(), others.written()
            acknowledged.queue_line(False)
            pair.resamplefd.set()
            others.resamplefd.set()
            bench.settle()
            assert acknowledged.receive() == 0
            assert {"pair": pair.written(), "others": others.written()} == {
                "pair": int(still_high is pair),
                "others": int(still_high is others),
            }
            peer.drive(False)
            other.drive(False)


def test_new_irqfd_is_written_at_once_while_the_line_is_high(
    bench: RemoteBench, peer: Peer, pair: Pair
) -> None:
    peer.drive(True)
    pair.written()
    new = peer.set_irqfd()
    assert new.written() == 1
    assert pair.written() == 0
    bench.resample(new)
    assert new.written() == 1
    pair.resamplefd.set()
    bench.settle()
    assert new.written() == pair.written() == 0


def test_level_that_rose_before_any_irqfd_reaches_the_first_one(bench: RemoteBench, peer: Peer) -> None:
    peer.drive(True)
    assert peer.set_irqfd().written() == 1


def test_level_that_rose_without_a_client_reaches_the_next_one(bench: RemoteBench) -> None:
    bench.servers["dev0"].function.set_intx(True)
    with bench.connect("dev0") as peer:
        assert peer.set_irqfd().written() == 1


def test_new_irqfd_is_left_alone_while_the_line_is_low_or_disabled(
    bench: RemoteBench, peer: Peer, pair: Pair
) -> None:
    assert peer.set_irqfd().written() == 0
    peer.drive(True)
    peer.disable_intx(True)
    assert peer.set_irqfd().written() == 0


def test_replaced_pair_is_closed(bench: RemoteBench, peer: Peer) -> None:
    peer.forget(peer.set_irqfd())
    before = count_fds()
    for _ in range(10):
        peer.forget(peer.set_irqfd())
    await_fds(before)


def test_status_bit_is_the_raw_level_and_intx_disable_gates_the_line_only(
    bench: RemoteBench, peer: Peer, pair: Pair
) -> None:
    peer.drive(True)
    assert peer.config_read(0x06, 2) == 0x08
    pair.written()
    peer.config_write(0x04, 2, 0x403)
    assert peer.config_read(0x04, 4) == 0x80403
    peer.config_write(0x06, 2, 0xFFFF)
    assert peer.config_read(0x06, 2) == 0x08
    assert pair.written() == 0
    peer.config_write(0x04, 2, 0x003)
    assert pair.written() == 1
    peer.drive(False)
    assert peer.config_read(0x06, 2) == 0


def test_reset_lowers_the_line_and_forgets_what_was_pending(
    bench: RemoteBench, peer: Peer, pair: Pair
) -> None:
    peer.drive(True)
    pair.written()
    assert peer.call(Command.DEVICE_RESET) == 0
    bench.resample(pair)
    assert pair.written() == 0
    assert [peer.config_read(addr, 4) for addr in (0x04, 0x10, 0x14, 0x3C)] == [0, 1, 0, 0x0100]
    peer.enable()
    peer.drive(True)
    assert pair.written() == 1


def test_reset_and_resample_queued_together(bench: RemoteBench, peer: Peer, pair: Pair) -> None:
    peer.drive(True)
    pair.written()
    peer.send(Command.DEVICE_RESET)
    pair.resamplefd.set()
    bench.settle()
    assert pair.written() == 0
    assert peer.receive() == 0


def test_reset_while_disabled_leaves_nothing_behind(bench: RemoteBench, peer: Peer, pair: Pair) -> None:
    peer.drive(True)
    peer.disable_intx(True)
    pair.written()
    peer.call(Command.DEVICE_RESET)
    peer.enable()
    bench.resample(pair)
    assert pair.written() == 0
    assert peer.config_read(0x06, 2) == 0
