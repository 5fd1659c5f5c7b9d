# SPDX-License-Identifier: GPL-2.0-or-later
"""Random lives of three functions behind the PCI proxy: re-routed, masked, reset, cut off, restarted.

Everything is the real thing but KVM, for which the userspace irqchip stands in. After each step every function
that is high and routed has its IRQ requested; after the EOIs that a guest would send, nobody else has.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from common import pci
from common.errors import PeerGone
from common.loop import Loop
from common.pci import parse_devfn
from proxyd.pci.pcidev import PciProxy
from proxyd.pci.pcihost import PciHost
from proxyd.vm.soft.softirqchip import SoftIrqchip, _Assignment
from tests.support.fds import await_fds, count_fds
from tests.support.irqbench import M_CMD, READ_IRR, S_CMD, SPECIFIC_EOI
from tests.support.lives import check_lives
from tests.support.remote import RemoteThread
from tests.support.remotebench import LineDevice

LIVES = 60
STEPS = 60
ADDRESSES = ("05.0", "09.0", "06.0")
"""the first two are on PIRQA, the third is on PIRQB"""
PIRQS = (0, 0, 1)
ROUTES = (10, 11, 5, 0x80, 0x0D)
"""two of the slave, one of the master, none, and one that can't be"""
IRQS = (5, 10, 11)
ISA_BRIDGE = parse_devfn("01.0")


class Function:
    """One function, as the guest sees it and as it is."""

    def __init__(self, number: int) -> None:
        self.name = f"line{number}"
        self.devfn = parse_devfn(ADDRESSES[number])
        self.pirq = PIRQS[number]
        self.remote: RemoteThread | None = None
        self.device: LineDevice | None = None
        self.is_disabled = False
        self.has_missed_reset = False


class CountingIrqchip(SoftIrqchip):
    """Counts how often each irqfd was written."""

    def __init__(self, loop: Loop) -> None:
        super().__init__(loop)
        self.written: Counter[int] = Counter()
        """by the irqfd's number"""

    def _inject(self, assignment: _Assignment) -> None:
        try:
            self.written[assignment.irqfd.fd] += os.eventfd_read(assignment.irqfd.fd)
        except BlockingIOError:
            return
        self._assert(assignment.gsi, True)


class World:
    """A guest's bus, its devices, and what must be."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._loop = Loop()
        self._irqchip = CountingIrqchip(self._loop)
        self.functions = [Function(number) for number in range(len(ADDRESSES))]
        self.proxies = {
            function.name: PciProxy(
                function.name,
                function.devfn,
                str(directory / f"{function.name}.sock"),
                self._irqchip,
                logging.getLogger("test"),
                lambda _proxy: None,
                deadline=20.0,
            )
            for function in self.functions
        }
        self.host = PciHost(self._irqchip, self.proxies.values())
        self.routes = [0x80] * 4
        for function in self.functions:
            self.start(function)
            self.link(function)

    def start(self, function: Function) -> None:
        """The function's daemon starts."""
        if function.remote is None:
            function.remote = RemoteThread(self._directory)
            function.device = function.remote.add(LineDevice, function.name, function.devfn)
            function.remote.start()

    def stop(self, function: Function) -> None:
        """It dies."""
        if function.remote is not None:
            function.remote.close()
            function.remote = function.device = None
            self.cut(function)

    def proxy(self, function: Function) -> PciProxy:
        return self.proxies[function.name]

    def is_linked(self, function: Function) -> bool:
        return self.proxy(function).remote is not None

    def link(self, function: Function) -> None:
        """What the keeper of links does."""
        proxy = self.proxy(function)
        if not self.is_linked(function):
            try:
                proxy.connect()
                proxy.attach()
            except PeerGone:
                assert function.remote is None
                proxy.reap()
            else:
                self.attached(function)

    def attached(self, function: Function) -> None:
        """A function that was away at a reset has been reset now."""
        if function.has_missed_reset:
            function.has_missed_reset = False
            self.settle()
            assert function.device is not None
            assert not function.device.intx_level

    def cut(self, function: Function) -> None:
        """The link ends, whoever lives on."""
        proxy = self.proxy(function)
        if proxy._client is not None:
            proxy._client.shutdown()
            proxy.check_link()
            proxy.reap()

    def set_level(self, function: Function, level: bool) -> None:
        """The device raises or lowers its line by itself."""
        remote, device = function.remote, function.device
        if remote is not None and device is not None:
            remote._loop.call_soon_threadsafe(lambda: device.set_intx(level))

    def disable(self, function: Function, disabled: bool) -> None:
        """The guest writes INTX_DISABLE, which is lost without a link."""
        self.config_write(function.devfn, pci.PCI_COMMAND, pci.PCI_COMMAND_INTX_DISABLE if disabled else 0)
        if self.is_linked(function):
            function.is_disabled = disabled

    def route(self, pirq: int, value: int) -> None:
        self.config_write(ISA_BRIDGE, 0x60 + pirq, value, 1)
        self.routes[pirq] = value

    def reset(self) -> None:
        """The guest resets the machine: all functions, when they are there again."""
        self.host.reset()
        self.routes = [0x80] * 4
        for function in self.functions:
            function.is_disabled = False
            function.has_missed_reset = not self.is_linked(function)

    def config_write(self, devfn: int, offset: int, value: int, size: int = 2) -> None:
        self.host.pio_write(0xCF8, 4, 1 << 31 | devfn << 8 | offset & ~3)
        self.host.pio_write(0xCFC + (offset & 3), size, value)

    def settle(self) -> None:
        """Whatever was said to a remote has been handled there, and what it wrote has arrived."""
        for function in self.functions:
            for _ in range(4):  # a message may take a pass, and a resample that waits for it the next
                if function.remote is not None:
                    done = threading.Event()
                    function.remote._loop.call_soon_threadsafe(done.set)
                    assert done.wait(20.0)
        self._irqchip.poll()

    def requested(self) -> set[int]:
        """The IRQs in IRR."""
        pic = self._irqchip.pic
        for command in (M_CMD, S_CMD):
            pic.port_out(command, 1, READ_IRR)
        irr = pic.port_in(M_CMD, 1) | pic.port_in(S_CMD, 1) << 8
        return {irq for irq in IRQS if irr >> irq & 1}

    def wanted(self) -> set[int]:
        """The IRQs that a function asserts."""
        return {
            self.routes[function.pirq]
            for function in self.functions
            if self.is_linked(function)
            and function.device is not None
            and function.device.intx_level
            and not function.is_disabled
            and self.routes[function.pirq] in IRQS
        }

    def begin(self) -> None:
        """What is asserted is counted from here on."""
        self._irqchip.written.clear()

    def check_count(self) -> None:
        """A step gives each function one reason to assert its line, at most."""
        self.settle()
        assert not self._irqchip.written or max(self._irqchip.written.values()) == 1, "asserted twice"

    def check(self) -> None:
        self.settle()
        wanted = self.wanted()
        assert self.requested() >= wanted, "lost"
        pic = self._irqchip.pic
        self.begin()
        for irq in IRQS:
            pic.port_out(S_CMD if irq >= 8 else M_CMD, 1, SPECIFIC_EOI | irq & 7)
        self.check_count()
        assert self.requested() == wanted, "stuck, or lost at the EOI"

    def close(self) -> None:
        for function in self.functions:
            self.proxy(function).close()
            if function.remote is not None:
                function.remote.close()
        self._irqchip.close()
        self._loop.close()


Step = Callable[[World, Function], None]


def high(world: World, function: Function) -> None:
    world.set_level(function, True)


def low(world: World, function: Function) -> None:
    world.set_level(function, False)


def disable(world: World, function: Function) -> None:
    world.disable(function, True)


def enable(world: World, function: Function) -> None:
    world.disable(function, False)


def reset(world: World, _function: Function) -> None:
    world.reset()


def cut(world: World, function: Function) -> None:
    world.cut(function)


def link(world: World, function: Function) -> None:
    world.link(function)


def relink(world: World, function: Function) -> None:
    world.cut(function)
    world.link(function)


def die(world: World, function: Function) -> None:
    world.stop(function)


def live(world: World, function: Function) -> None:
    world.start(function)


def restart(world: World, function: Function) -> None:
    world.stop(function)
    world.start(function)
    world.link(function)


def reset_while_linking(world: World, function: Function) -> None:
    """The guest's reset comes between what the connecting thread does and what the control thread does."""
    proxy = world.proxy(function)
    world.cut(function)
    if function.remote is not None:
        proxy.connect()
        world.reset()
        try:
            proxy.attach()
            raise AssertionError("attached a function from before the reset")
        except PeerGone:
            proxy.reap()


def reroute_while_linking(world: World, function: Function) -> None:
    proxy = world.proxy(function)
    world.cut(function)
    if function.remote is not None:
        proxy.connect()
        world.route(
            function.pirq, 21 - world.routes[function.pirq] if world.routes[function.pirq] < 12 else 11
        )
        proxy.attach()
        world.attached(function)


def route_to(value: int) -> Step:
    def route(world: World, function: Function) -> None:
        world.route(function.pirq, value)

    route.__name__ = f"route_to_{value:#x}"
    return route


KINDS: dict[Step, int] = {
    high: 6,
    low: 4,
    disable: 3,
    enable: 4,
    reset: 1,
    cut: 1,
    link: 4,
    relink: 1,
    die: 1,
    live: 2,
    restart: 1,
    reset_while_linking: 1,
    reroute_while_linking: 1,
    **{route_to(value): 2 for value in ROUTES},
}
"""and how often each is taken, relatively"""
ALL = [
    (kind, number)
    for kind, weight in KINDS.items()
    for number in range(len(ADDRESSES))
    for _ in range(weight)
]

Taken = tuple[tuple[Step, int], bool]
"""a step, the function's number, and whether things come to rest before the next step"""


def play(life: Sequence[Taken]) -> None:
    before = count_fds()
    with tempfile.TemporaryDirectory() as directory:
        world = World(Path(directory))
        try:
            was_at_rest = True
            for (step, number), look in life:
                world.begin()
                step(world, world.functions[number])
                if look:
                    if was_at_rest:
                        world.check_count()
                    world.check()
                was_at_rest = look
            world.check()
        finally:
            world.close()
    await_fds(before)


def draw(random: Random) -> list[Taken]:
    return [(step, random.random() < 0.5) for step in random.choices(ALL, k=STEPS)]


def describe(taken: Taken) -> str:
    (step, number), look = taken
    return f"{step.__name__} {number}{'' if look else ' and at once'}"


def test_no_line_is_lost_or_stuck() -> None:
    check_lives(LIVES, draw, play, describe)
