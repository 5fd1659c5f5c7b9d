# SPDX-License-Identifier: GPL-2.0-or-later
"""One device after another process: what it takes up again from the fd store, and what it leaves alone."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest

from common import pci
from common.fdstore import FdStore
from common.fields import register
from common.journal import RateLimited
from common.mpqemu import BAR, SYSMEM, Command, request_frame
from remoted.device import Bar, BarKind, PciFunction
from remoted.host import Host
from remoted.memory import GuestMemory
from remoted.ramfiles import RamFiles
from remoted.server import DeviceServer
from remoted.sharedmemory import take_bar_memory
from tests.support.fds import no_fd_is_left
from tests.support.remotebench import IO_BASE, Pair, Peer, RemoteBench
from tests.support.storemanager import StoreManager

DEVFNS = {"dev0": 0x28, "dev1": 0x30}
VALUE, LINE, FETCH = 0, 4, 8
PAGE = 4096


class Kept(PciFunction):
    """A register; one that drives the line; and one whose write copies a word of RAM into the first."""

    VENDOR_ID, DEVICE_ID = 0x1234, 0x0001
    BARS: ClassVar = {0: Bar(BarKind.IO, 16)}
    value: int = register(32, reset=7)
    restores = resets = 0

    def reset(self) -> None:
        self.resets += 1

    def restored(self) -> None:
        self.restores += 1

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        return self.value

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        if offset == VALUE:
            self.value = value
        elif offset == LINE:
            self.set_intx(bool(value))
        else:
            self.value = int.from_bytes(self.host.memory.read(value, 4), "little")


class Forgetful(Kept):
    """The same without a field."""

    value = 7

    def reset(self) -> None:
        super().reset()
        self.value = 7


class Wider(Kept):
    """The same with another layout."""

    more: int = register(8)


class Framebuffer(Kept):
    """The same with memory that the guest may map."""

    BARS: ClassVar = {0: Bar(BarKind.IO, 16), 2: Bar(BarKind.MEM64, 2 * PAGE, shared=True)}


class LargerFramebuffer(Framebuffer):
    BARS: ClassVar = {0: Bar(BarKind.IO, 16), 2: Bar(BarKind.MEM64, 4 * PAGE, shared=True)}


class KeptBench(RemoteBench):
    """A service manager, and one remoted after the other in the same directory."""

    def __init__(self, directory: Path) -> None:
        self.manager = StoreManager(directory)
        self._start(directory, Kept, {})

    def restart(self, model: type[PciFunction] = Kept) -> None:
        """Ends the process as a restart of its unit does, and starts the next one."""
        super().close()
        self.store.close()
        self._start(self._directory, model, self.manager.hand_over())

    def settle(self) -> None:
        super().settle()
        while self.manager.serve():
            super().settle()

    def settle_without_manager(self) -> None:
        """Lets the loop run until it would wait, while the manager does nothing."""
        super().settle()

    def function(self, name: str) -> Kept:
        function = self.servers[name].function
        assert isinstance(function, Kept)
        return function

    def close(self) -> None:
        super().close()
        self.store.close()
        self.manager.close()

    def _start(self, directory: Path, model: type[PciFunction], inherited: dict[str, list[int]]) -> None:
        super().__init__(directory)
        self.store = FdStore(self.loop, RateLimited(self.log.logger), self.manager.address, inherited)
        ram_files = RamFiles(self.store)
        for name, devfn in DEVFNS.items():
            pirq = self.hub.pirqs[devfn]
            host = Host(
                name,
                self.loop,
                self.log.logger,
                GuestMemory(),
                pirq.set_irq,
                kept_memory=partial(take_bar_memory, self.store, devfn),
            )
            function = model(host, {})
            self.servers[name] = DeviceServer(self.loop, function, pirq, self._on_idle)
            self.servers[name].keep(self.store, ram_files, devfn)
            self.servers[name].listen(self.path(name))
        ram_files.end_of_start()
        self.dropped = self.store.drop_inherited()
        self.settle()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[KeptBench]:
    with no_fd_is_left(), closing(KeptBench(tmp_path)) as bench:
        yield bench


@pytest.fixture
def peer(bench: KeptBench) -> Iterator[Peer]:
    with bench.connect("dev0") as peer:
        peer.config_write(pci.PCI_BASE_ADDRESS_0, 4, IO_BASE)
        peer.config_write(pci.PCI_COMMAND, 2, pci.PCI_COMMAND_IO | pci.PCI_COMMAND_MASTER)
        yield peer


def write(peer: Peer, register: int, value: int) -> None:
    assert peer.bar_write(False, IO_BASE + register, 4, value) == 0


def test_link_registers_and_config_space_go_on(bench: KeptBench, peer: Peer) -> None:
    write(peer, VALUE, 0x12345678)
    bench.restart()
    assert peer.bar_read(False, IO_BASE, 4) == 0x12345678
    assert peer.config_read(pci.PCI_BASE_ADDRESS_0, 4) == IO_BASE | 1
    function = bench.function("dev0")
    assert (function.restores, function.resets) == (1, 0)
    assert function.is_bus_master


def test_an_untouched_device_has_its_reset_values(bench: KeptBench) -> None:
    bench.restart()
    assert bench.function("dev1").value == 7


def test_a_high_line_is_not_asserted_again(bench: KeptBench, peer: Peer) -> None:
    pair = peer.set_irqfd()
    write(peer, LINE, 1)
    assert pair.written() == 1
    bench.restart()
    assert pair.written() == 0
    bench.resample(pair)
    assert pair.written() == 1, "it is still high at the EOI"
    write(peer, LINE, 0)
    bench.resample(pair)
    assert pair.written() == 0


def test_an_eoi_while_no_process_runs_is_served(bench: KeptBench, peer: Peer) -> None:
    pair = peer.set_irqfd()
    write(peer, LINE, 1)
    assert pair.written() == 1
    pair.resamplefd.set()
    bench.restart()
    assert pair.written() == 1


def test_an_eoi_that_was_read_and_not_served_is_served(bench: KeptBench, peer: Peer) -> None:
    """The process was killed between its read of the resamplefd and the write of the irqfd."""
    pair = peer.set_irqfd()
    write(peer, LINE, 1)
    assert pair.written() == 1
    bench.servers["dev0"].line.owes_assert[0] = 1
    bench.restart()
    assert pair.written() == 1
    bench.restart()
    assert pair.written() == 0


def test_masked_line_stays_masked(bench: KeptBench, peer: Peer) -> None:
    pair = peer.set_irqfd()
    peer.config_write(pci.PCI_COMMAND, 2, pci.PCI_COMMAND_IO | pci.PCI_COMMAND_INTX_DISABLE)
    write(peer, LINE, 1)
    bench.restart()
    bench.resample(pair)
    assert pair.written() == 0
    peer.config_write(pci.PCI_COMMAND, 2, pci.PCI_COMMAND_IO)
    assert pair.written() == 1


@pytest.fixture
def ram() -> Iterator[int]:
    fd = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4 * PAGE)
    for page in range(4):
        os.pwrite(fd, (0xAB00 + page).to_bytes(4, "little"), page * PAGE)
    yield fd
    os.close(fd)


def sync(peer: Peer, bench: KeptBench, fd: int, *pages: int) -> None:
    """One region a page, at the page's number times 1 MiB."""
    rest = [0] * (8 - len(pages))
    starts, sizes = [page << 20 for page in pages], [PAGE] * len(pages)
    offsets = [page * PAGE for page in pages]
    table = SYSMEM.pack(*starts, *rest, *sizes, *rest, *offsets, *rest)
    peer.send(Command.SYNC_SYSMEM, table, [fd] * len(pages))
    bench.settle()


def test_ram_goes_on_for_each_device_that_had_it(bench: KeptBench, peer: Peer, ram: int) -> None:
    """One file, several regions, two devices: the fd store takes it once."""
    with bench.connect("dev1") as other:
        other.config_write(pci.PCI_BASE_ADDRESS_0, 4, IO_BASE)
        other.config_write(pci.PCI_COMMAND, 2, pci.PCI_COMMAND_IO | pci.PCI_COMMAND_MASTER)
        sync(peer, bench, ram, 0, 1, 3)
        sync(other, bench, ram, 2)
        sync(peer, bench, ram, 1, 3)
        for _ in range(2):
            bench.restart()
            write(peer, FETCH, 3 << 20)
            assert peer.bar_read(False, IO_BASE, 4) == 0xAB03
            write(other, FETCH, 2 << 20)
            assert other.bar_read(False, IO_BASE, 4) == 0xAB02
        assert peer.bar_write(False, IO_BASE + FETCH, 4, 0) != 0, "the first table's region is gone"
    bench.settle()
    assert [name for name in bench.manager.files if name.startswith("ram")] != []
    sync(peer, bench, ram)
    assert [name for name in bench.manager.files if name.startswith("ram")] == []


def test_the_same_pair_again(bench: KeptBench, peer: Peer) -> None:
    """A client that sends its pair once more: the fd store would drop it as known."""
    pair = peer.set_irqfd()
    peer.send(Command.SET_IRQFD, fds=pair.fds)
    bench.settle()
    bench.restart()
    write(peer, LINE, 1)
    assert pair.written() == 1


def test_the_end_of_a_link_empties_the_store(bench: KeptBench, peer: Peer, ram: int) -> None:
    peer.set_irqfd()
    sync(peer, bench, ram, 0)
    peer.sock.close()
    bench.settle()
    assert set(bench.manager.files) == {"28.state", "30.state"}


def test_a_link_that_ended_meanwhile_takes_all_along(bench: KeptBench, peer: Peer, ram: int) -> None:
    """Its VM has gone: eventfds and RAM are an earlier VM's."""
    peer.set_irqfd()
    sync(peer, bench, ram, 0)
    peer.sock.close()
    bench.restart()
    assert not bench.servers["dev0"].line.has_irqfd
    assert set(bench.manager.files) == {"28.state", "30.state"}
    with bench.connect("dev0") as successor:
        assert successor.config_read(pci.PCI_VENDOR_ID, 2) == 0x1234


def test_a_class_without_fields_starts_from_reset(bench: KeptBench) -> None:
    bench.restart(Forgetful)
    with bench.connect("dev0") as peer:
        peer.config_write(pci.PCI_BASE_ADDRESS_0, 4, IO_BASE)
        peer.config_write(pci.PCI_COMMAND, 2, pci.PCI_COMMAND_IO)
        pair = peer.set_irqfd()
        write(peer, VALUE, 5)
        write(peer, LINE, 1)
        assert pair.written() == 1
        bench.restart(Forgetful)
        assert peer.bar_read(False, IO_BASE, 4) == 7
        bench.resample(pair)
        assert pair.written() == 0
        assert not peer.config_read(pci.PCI_STATUS, 2) & pci.PCI_STATUS_INTERRUPT


def test_state_of_another_layout_is_refused(bench: KeptBench, peer: Peer) -> None:
    write(peer, VALUE, 5)
    bench.restart(Wider)
    assert bench.function("dev0").value == 7
    assert [message for message in bench.log.messages if "starts from reset" in message]
    assert peer.has_ended


def test_a_field_that_does_not_fit_is_told_once(bench: KeptBench, peer: Peer) -> None:
    """The device goes on, and its successor starts from reset."""
    bench.function("dev0").value = 1 << 40
    write(peer, LINE, 1)
    write(peer, LINE, 0)
    assert len([message for message in bench.log.messages if "can't be kept" in message]) == 1
    assert any("can't be kept" in text for text in bench.function("dev0").amiss.texts())
    bench.restart()
    assert bench.function("dev0").value == 7


def test_what_a_timer_did_is_kept(bench: KeptBench) -> None:
    function = bench.function("dev0")
    function.host.loop.call_later(0, lambda: setattr(function, "value", 9))
    bench.loop.step()
    bench.restart()
    assert bench.function("dev0").value == 9


def wakes(bench: KeptBench, passes: int = 50) -> int:
    """In how many of so many passes the loop finds something to do."""
    count = 0
    for _ in range(passes):
        if bench.is_ready:
            count += 1
            bench.loop.step()
    return count


def test_shared_memory_goes_on(bench: KeptBench, peer: Peer) -> None:
    bench.restart(Framebuffer)
    assert set(bench.manager.files) == {"28.state", "28.bar2", "30.state", "30.bar2"}
    bench.function("dev0").bar_memory(2)[PAGE : PAGE + 5] = b"hello"
    bench.restart(Framebuffer)
    bench.restart(Framebuffer)
    assert bytes(bench.function("dev0").bar_memory(2)[PAGE : PAGE + 5]) == b"hello"
    assert bytes(bench.function("dev1").bar_memory(2)[PAGE : PAGE + 5]) == bytes(5)
    bench.restart(LargerFramebuffer)
    assert bytes(bench.function("dev0").bar_memory(2)) == bytes(4 * PAGE)
    bench.restart(LargerFramebuffer)
    assert len(bench.function("dev0").bar_memory(2)) == 4 * PAGE
    bench.servers["dev0"].discard()
    bench.settle()
    assert set(bench.manager.files) == {"30.state", "30.bar2"}
    bench.restart()
    assert bench.dropped == ["30.bar2"]


FRAMES = {
    "read": (Command.BAR_READ, BAR.pack(IO_BASE, 0, 4, False)),
    "irqfd": (Command.SET_IRQFD, b""),
    "ram": (Command.SYNC_SYSMEM, SYSMEM.pack(*[0] * 24)),
}


@pytest.mark.parametrize("name", FRAMES)
def test_half_a_message_is_waited_for_without_a_spin(bench: KeptBench, peer: Peer, name: str) -> None:
    """The half stays in the socket. Each further byte wakes the loop, and the link is as before after the last."""
    frame = request_frame(*FRAMES[name])
    pair = Pair()
    for start in range(len(frame)):
        peer.send_bytes(frame[start : start + 1], pair.fds if start == 0 and name == "irqfd" else ())
        assert 0 < wakes(bench) < 5
        assert not bench.is_ready
    bench.settle()
    assert name != "read" or peer.receive() == 7
    assert peer.bar_read(False, IO_BASE, 4) == 7
    if name == "irqfd":
        write(peer, LINE, 1)
        assert pair.written() == 1
    pair.close()


@pytest.mark.parametrize("cut", [1, 15, 16, 20])
def test_the_end_within_a_message_ends_the_session(bench: KeptBench, peer: Peer, cut: int) -> None:
    for how in (socket.SHUT_WR, socket.SHUT_RDWR):
        with bench.connect("dev1") as other:
            other.send_bytes(request_frame(*FRAMES["read"])[:cut])
            bench.settle()
            other.sock.shutdown(how)
            bench.settle()
            assert bench.servers["dev1"].session is None


def test_an_eoi_with_half_a_message_is_served(bench: KeptBench, peer: Peer) -> None:
    pair = peer.set_irqfd()
    write(peer, LINE, 1)
    assert pair.written() == 1
    peer.send_bytes(request_frame(*FRAMES["read"])[:20])
    pair.resamplefd.set()
    bench.settle()
    assert pair.written() == 1


def test_half_a_message_beside_a_busy_client(bench: KeptBench, peer: Peer) -> None:
    """The rest arrives in a pass that has no time left for it."""
    with bench.connect("dev1") as other:
        other.config_write(pci.PCI_BASE_ADDRESS_0, 4, IO_BASE)
        frame = request_frame(*FRAMES["read"])
        other.send_bytes(frame[:20])
        bench.settle()
        bench.clock.step = 1.0
        peer.send_bytes(frame)
        other.send_bytes(frame[20:])
        bench.settle()
        bench.clock.step = 0.0
        assert (peer.receive(), other.receive()) == (7, (1 << 64) - 1)


@pytest.mark.parametrize("name", ["irqfd", "ram"])
def test_an_eoi_waits_for_messages_behind_one_that_is_being_stored(
    bench: KeptBench, peer: Peer, name: str
) -> None:
    """The message lowers the line. The EOI would assert it once more before."""
    pair = peer.set_irqfd()
    write(peer, LINE, 1)
    assert pair.written() == 1
    peer.send(*FRAMES[name], pair.fds if name == "irqfd" else ())
    peer.send(Command.BAR_WRITE, BAR.pack(IO_BASE + LINE, 0, 4, False))
    bench.settle_without_manager()
    assert pair.written() == (name == "irqfd")
    pair.resamplefd.set()
    bench.settle_without_manager()
    bench.settle()
    assert peer.receive() == 0
    assert pair.written() == 0
    write(peer, LINE, 1)
    assert pair.written() == 1
    bench.resample(pair)
    assert pair.written() == 1


def test_the_next_client_waits_for_the_end_of_one_whose_message_is_being_stored(
    bench: KeptBench, ram: int
) -> None:
    """Also where the session goes on from the process before this one."""
    with bench.connect("dev1") as first:
        bench.restart()
        sync(first, bench, ram, 0)
        first.send(*FRAMES["ram"])
        bench.settle_without_manager()
        first.sock.close()
        with bench.connect("dev1", settled=False) as second:
            bench.settle_without_manager()
            bench.settle()
            assert second.config_read(pci.PCI_VENDOR_ID, 2) == 0x1234
    assert bench.servers["dev1"].refused == 0


def test_a_client_that_leaves_while_its_message_is_stored(bench: KeptBench) -> None:
    with bench.connect("dev1") as peer:
        peer.send(*FRAMES["ram"])
        bench.settle_without_manager()
        bench.servers["dev1"].session.close()  # type: ignore[union-attr]
    with bench.connect("dev1") as peer:
        assert peer.config_read(pci.PCI_VENDOR_ID, 2) == 0x1234
