# SPDX-License-Identifier: GPL-2.0-or-later
"""The PCI proxy's link: what a function has been through when the guest sees it, and what it costs to lose it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import ClassVar

import pytest

from common import pci
from common.errors import PeerGone, ProtocolError
from common.loop import Loop
from common.notifier import EventNotifier
from common.pci import parse_devfn
from proxyd.pci.pcidev import PciProxy
from proxyd.vm.soft.softirqchip import SoftIrqchip
from remoted.device import Bar, BarKind, PciFunction
from tests.support.fds import no_fd_is_left, no_more_fds
from tests.support.irqbench import READ_IRR, S_CMD
from tests.support.remote import RemoteThread
from tests.support.remotebench import LineDevice
from tests.support.steploop import run_until

DEVFN = parse_devfn("05.0")
GSI = 10
BAR0 = pci.PCI_BASE_ADDRESS_0
RUNNING = pci.PCI_COMMAND_IO | pci.PCI_COMMAND_MEMORY


class OtherBar(LineDevice):
    BARS: ClassVar[Mapping[int, Bar]] = {**LineDevice.BARS, 1: Bar(BarKind.MEM32, 8192)}


class OtherPin(LineDevice):
    INTERRUPT_PIN = 2


class PinC(LineDevice):
    INTERRUPT_PIN = 3


class OtherClass(LineDevice):
    CLASS_CODE = 0x078001


class NoFunction(LineDevice):
    VENDOR_ID = 0xFFFF


class ImpossiblePin(LineDevice):
    def config_read(self, addr: int, size: int) -> int:
        return 5 if addr == pci.PCI_INTERRUPT_PIN else super().config_read(addr, size)


class Dying(LineDevice):
    """Its remote hangs up at the first access to config space after a reset in mid-life."""

    hang_up: ClassVar[list[RemoteThread]] = []

    def config_read(self, addr: int, size: int) -> int:
        if self.resets and self.hang_up:
            session = self.hang_up.pop().servers["line"].session
            assert session is not None
            session.close()
        return super().config_read(addr, size)


class Bench:
    """A proxy on the userspace irqchip, and remotes in threads, one after the other."""

    remote: RemoteThread

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.loop = Loop()
        self.irqchip = SoftIrqchip(self.loop)
        self.lost: list[PciProxy] = []

    def serve(self, model: type[LineDevice] = LineDevice) -> LineDevice:
        """A remote with one function, fresh from its power-on."""
        self.remote = RemoteThread(self._directory)
        function = self.remote.add(model, "line", DEVFN)
        self.remote.start()
        return function

    def proxy(self, *, is_powered_on: bool = False, poll_limit: float = 0.0) -> PciProxy:
        return PciProxy(
            "line",
            DEVFN,
            str(self._directory / "line.sock"),
            self.irqchip,
            logging.getLogger("test"),
            self.lost.append,
            deadline=20.0,
            poll_limit=poll_limit,
            is_powered_on=is_powered_on,
        )

    def is_requested(self) -> bool:
        """Whether the GSI is in the slave's IRR."""
        self.irqchip.pic.port_out(S_CMD, 1, READ_IRR)
        return bool(self.irqchip.pic.port_in(S_CMD, 1) >> (GSI & 7) & 1)

    def close(self) -> None:
        self.irqchip.close()
        self.loop.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with no_fd_is_left(), closing(Bench(tmp_path)) as bench:
        yield bench


def link(proxy: PciProxy) -> None:
    proxy.connect()
    proxy.attach()


def use(proxy: PciProxy, function: PciFunction) -> None:
    """What a guest does: places a BAR, turns the function on; and the function's line goes up."""
    proxy.config_write(BAR0, 4, 0xC000)
    proxy.config_write(pci.PCI_COMMAND, 2, RUNNING)
    proxy.bar_write(False, 0xC000, 1, 1)
    assert function.intx_level


def lose(proxy: PciProxy) -> None:
    """The link ends, the remote lives on."""
    client = proxy._client
    assert client is not None
    client.shutdown()
    assert proxy.config_read(0, 4) == 0xFFFFFFFF
    proxy.reap()


def is_fresh(proxy: PciProxy, function: PciFunction) -> bool:
    return (
        not function.intx_level
        and proxy.config_read(pci.PCI_COMMAND, 2) == 0
        and proxy.config_read(BAR0, 4) == pci.PCI_BASE_ADDRESS_SPACE_IO
        and proxy.windows == ()
    )


def test_a_new_guest_finds_the_function_as_after_power_on(bench: Bench) -> None:
    function = bench.serve()
    former = bench.proxy()
    link(former)
    use(former, function)
    former.close()
    proxy = bench.proxy()
    link(proxy)
    assert is_fresh(proxy, function)
    assert proxy.reconnects == 0
    proxy.close()
    bench.remote.close()


def test_a_restored_guest_finds_the_function_as_it_was(bench: Bench) -> None:
    function = bench.serve()
    former = bench.proxy()
    link(former)
    use(former, function)
    former.close()
    proxy = bench.proxy(is_powered_on=True)
    proxy.set_routes([GSI, None, None, None])
    link(proxy)
    assert function.intx_level
    assert [window.start for window in proxy.windows] == [0xC000]
    assert proxy.bar_read(False, 0xC000, 1) == 1
    proxy.close()
    bench.remote.close()


def test_a_function_that_was_only_out_of_reach_is_what_it_was(bench: Bench) -> None:
    function = bench.serve()
    proxy = bench.proxy()
    link(proxy)
    proxy.quiesce()
    proxy.reset()
    use(proxy, function)
    lose(proxy)
    link(proxy)
    assert function.intx_level
    assert proxy.bar_read(False, 0xC000, 1) == 1
    proxy.close()
    bench.remote.close()


def test_a_reset_that_the_remote_was_out_of_reach_for_is_made_up_for(bench: Bench) -> None:
    function = bench.serve()
    proxy = bench.proxy()
    link(proxy)
    use(proxy, function)
    lose(proxy)
    proxy.quiesce()
    proxy.reset()
    link(proxy)
    assert is_fresh(proxy, function)
    proxy.close()
    bench.remote.close()


def test_a_remote_that_dies_of_a_reset_leaves_a_function_that_is_reset(bench: Bench) -> None:
    """Between the answer to DEVICE_RESET and the look at what it has left in config space."""
    function = bench.serve(Dying)
    proxy = bench.proxy()
    link(proxy)
    use(proxy, function)
    Dying.hang_up.append(bench.remote)
    proxy.quiesce()
    proxy.reset()
    assert bench.lost == [proxy]
    proxy.reap()
    link(proxy)
    assert is_fresh(proxy, function)
    proxy.close()
    bench.remote.close()


def test_a_reset_while_the_link_is_made_lets_it_be_made_again(bench: Bench) -> None:
    function = bench.serve()
    proxy = bench.proxy()
    link(proxy)
    use(proxy, function)
    lose(proxy)
    proxy.connect()
    proxy.quiesce()
    proxy.reset()
    with pytest.raises(PeerGone, match="reset while connecting"):
        proxy.attach()
    proxy.reap()
    link(proxy)
    assert is_fresh(proxy, function)
    assert bench.remote.hub.pirqs[DEVFN].has_irqfd
    proxy.close()
    bench.remote.close()


@pytest.mark.parametrize("model", [OtherBar, OtherPin, OtherClass, NoFunction, ImpossiblePin])
def test_another_function_at_the_same_socket_is_not_linked(bench: Bench, model: type[LineDevice]) -> None:
    bench.serve()
    proxy = bench.proxy()
    link(proxy)
    bench.remote.close()
    assert proxy.config_read(0, 4) == 0xFFFFFFFF
    proxy.reap()
    bench.serve(model)
    with pytest.raises(ProtocolError):
        proxy.connect()
    proxy.reap()
    assert proxy.config_read(0, 4) == 0xFFFFFFFF
    bench.remote.close()
    bench.serve()
    link(proxy)
    assert proxy.config_read(0, 2) == LineDevice.VENDOR_ID
    proxy.close()
    bench.remote.close()


class SlowIrqchip(SoftIrqchip):
    """Each assign takes until the remote has handled all that it was sent."""

    remote: RemoteThread

    def assign(self, gsi: int, irqfd: EventNotifier, resamplefd: EventNotifier) -> None:
        super().assign(gsi, irqfd, resamplefd)
        settle(self.remote)


def settle(remote: RemoteThread) -> None:
    """What was sent to the remote has been handled; a resample may wait for a message, and take one more pass."""
    for _ in range(4):
        done = threading.Event()
        remote._loop.call_soon_threadsafe(done.set)
        assert done.wait(20.0)


def test_a_line_that_is_high_when_it_is_linked_asserts_once(bench: Bench) -> None:
    """The remote has the pair and the kick at the same time, and takes them for one question."""
    function = bench.serve()
    former = bench.proxy()
    link(former)
    use(former, function)
    former.close()
    bench.irqchip = SlowIrqchip(bench.loop)
    bench.irqchip.remote = bench.remote
    proxy = bench.proxy(is_powered_on=True)
    proxy.set_routes([GSI, None, None, None])
    pirq = bench.remote.hub.pirqs[DEVFN]
    before = pirq.reasserts
    link(proxy)
    settle(bench.remote)
    assert pirq.reasserts == before + 1
    proxy.close()
    bench.remote.close()


def test_a_link_that_ends_while_it_is_put_into_use_leaves_no_irqfd_behind(bench: Bench) -> None:
    bench.serve()
    proxy = bench.proxy()
    proxy.set_routes([GSI, None, None, None])
    proxy.connect()
    bench.remote.close()
    with pytest.raises(PeerGone):
        proxy.attach()
    assert proxy.gsi is None
    bench.irqchip.reset()  # which an irqfd that is still assigned would prevent
    proxy.reap()
    assert proxy.config_read(0, 4) == 0xFFFFFFFF
    bench.serve()
    link(proxy)
    assert proxy.gsi == GSI
    proxy.close()
    bench.remote.close()


def test_what_a_guest_has_programmed_is_there_after_a_reconnect(bench: Bench) -> None:
    programmed = {
        (pci.PCI_CACHE_LINE_SIZE, 1): 0x10,
        (pci.PCI_INTERRUPT_LINE, 1): 0x0B,
        (BAR0, 4): 0xC001,
        (BAR0 + 4, 4): 0xE0000000,
        (BAR0 + 8, 4): 0x8000_000C,
        (BAR0 + 12, 4): 0x12,
        (pci.PCI_COMMAND, 2): RUNNING | pci.PCI_COMMAND_MASTER | pci.PCI_COMMAND_INTX_DISABLE,
    }
    bench.serve()
    proxy = bench.proxy()
    link(proxy)
    for (offset, size), value in programmed.items():
        proxy.config_write(offset, size, value)
    bench.remote.close()
    proxy.check_link()
    proxy.reap()
    bench.serve()
    link(proxy)
    assert {where: proxy.config_read(*where) for where in programmed} == programmed
    proxy.close()
    bench.remote.close()


def test_the_time_of_polling_is_counted_over_all_links(bench: Bench) -> None:
    bench.serve()
    proxy = bench.proxy()
    assert proxy.polled_seconds == 0
    for seconds, total in ((1.5, 1.5), (2.0, 3.5)):
        link(proxy)
        assert proxy._client is not None
        proxy._client.polling.seconds = seconds
        assert proxy.polled_seconds == total
        lose(proxy)
        assert proxy.polled_seconds == total
    proxy.close()
    bench.remote.close()


def test_each_link_polls_as_long_as_the_proxy_may(bench: Bench) -> None:
    bench.serve()
    proxy = bench.proxy(poll_limit=20.0)
    link(proxy)
    assert proxy._client is not None
    polling = proxy._client.polling
    for _ in range(1000):
        polling.window = 20.0
        assert proxy.config_read(0, 2) == LineDevice.VENDOR_ID
        if polling.found or polling.missed:
            break
    else:
        pytest.fail("each answer was there at the first look")
    proxy.close()
    bench.remote.close()


def test_an_abort_ends_a_connection_that_is_being_made(bench: Bench) -> None:
    """Also one that it comes too early for: the thread that connects has no link yet that could be shut down."""
    bench.serve()
    proxy = bench.proxy()
    proxy.abort()
    with pytest.raises(PeerGone, match="the daemon ends"):
        proxy.connect()
    proxy.close()
    bench.remote.close()


def test_no_fd_for_the_link(bench: Bench) -> None:
    bench.serve()
    proxy = bench.proxy()
    with no_more_fds(), pytest.raises(PeerGone, match="Too many open files"):
        proxy.connect()
    link(proxy)
    proxy.close()
    bench.remote.close()


def test_no_fd_for_the_irqfd(bench: Bench) -> None:
    bench.serve()
    proxy = bench.proxy()
    proxy.connect()
    with no_more_fds(), pytest.raises(PeerGone, match="Too many open files"):
        proxy.attach()
    proxy.reap()
    assert proxy.config_read(0, 4) == 0xFFFFFFFF
    link(proxy)
    assert proxy.reconnects == 0
    proxy.close()
    bench.remote.close()


class WithoutBars(LineDevice):
    BARS: ClassVar[Mapping[int, Bar]] = {}


def test_whether_the_guest_lets_a_function_decode(bench: Bench) -> None:
    function = bench.serve()
    proxy = bench.proxy()
    assert proxy.is_decoded is None, "nobody knows yet whether it has BARs"
    link(proxy)
    assert proxy.is_decoded is False
    use(proxy, function)
    assert proxy.is_decoded is True
    proxy.config_write(pci.PCI_COMMAND, 2, 0)
    assert proxy.is_decoded is False
    use(proxy, function)
    proxy.quiesce()
    proxy.reset()
    assert proxy.is_decoded is False
    proxy.close()
    bench.remote.close()


def test_a_function_without_bars_is_not_amiss_for_it(bench: Bench) -> None:
    bench.serve(WithoutBars)
    proxy = bench.proxy()
    link(proxy)
    assert proxy.is_decoded is None
    proxy.close()
    bench.remote.close()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_narrow_writes_to_command_and_bar_count(bench: Bench, size: int) -> None:
    function = bench.serve()
    proxy = bench.proxy()
    link(proxy)

    def write(offset: int, value: int) -> None:
        for position in range(0, 4, size):
            proxy.config_write(offset + position, size, value >> 8 * position)

    write(BAR0, 0xC120)
    write(BAR0 + 8, 0x8000_0000)
    write(BAR0 + 12, 0x12)
    write(pci.PCI_COMMAND, RUNNING)
    assert [(window.start, window.end) for window in proxy.windows] == [
        (0xC120, 0xC130),
        (0x12_8000_0000, 0x12_8001_0000),
    ]
    proxy.bar_write(True, 0x12_8000_0010, 8, 0x1122_3344_5566_7788)
    assert proxy.bar_read(True, 0x12_8000_0014, 4) == 0x1122_3344
    # And so they are restored.
    bench.remote.close()
    assert proxy.config_read(0, 4) == 0xFFFFFFFF
    proxy.reap()
    function = bench.serve()
    link(proxy)
    assert proxy.config_read(BAR0, 4) == 0xC121
    assert proxy.config_read(BAR0 + 12, 4) == 0x12
    assert proxy.config_read(pci.PCI_COMMAND, 2) == RUNNING
    assert function.resets == 1
    # INTX_DISABLE is in the second byte.
    bench.irqchip.set_level_triggered(GSI)
    proxy.set_routes([GSI, None, None, None])
    proxy.bar_write(False, 0xC120, 1, 1)
    run_until(bench.loop, bench.is_requested)
    write(pci.PCI_COMMAND, RUNNING | pci.PCI_COMMAND_INTX_DISABLE)
    assert not bench.is_requested()
    proxy.close()
    bench.remote.close()


def test_a_function_that_comes_late_is_routed_where_its_pin_goes(bench: Bench) -> None:
    proxy = bench.proxy()
    proxy.set_routes([5, 9, GSI, None])
    bench.serve(PinC)
    link(proxy)
    assert proxy.gsi == GSI
    proxy.set_routes([GSI, 9, None, 5])
    assert proxy.gsi is None
    proxy.set_routes([None, None, 11, None])
    assert proxy.gsi == 11
    proxy.close()
    bench.remote.close()
