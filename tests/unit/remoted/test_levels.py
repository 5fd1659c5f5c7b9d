# SPDX-License-Identifier: GPL-2.0-or-later
"""Random lives of four functions on three GSIs, step by step against a model of KVM's resample irqfds.

The device's side is the real one: loop, hub, functions, sessions, sockets, eventfds. The VM's side is a model:
an irqfd write asserts the GSI's line, an EOI lowers it and then signals the resamplefd of everyone on the GSI,
the last irqfd that leaves a GSI lowers it (virt/kvm/eventfd.c). After each step every line must be exactly what
the history of levels and EOIs demands: none lost, none stuck, none asserted for a level that is low.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from common import pci
from common.mpqemu import BAR, CONFIG, Command
from tests.support.fds import await_fds, count_fds
from tests.support.lives import check_lives
from tests.support.remotebench import IO_BASE, LineDevice, Pair, Peer, RemoteBench

FUNCTIONS = 4
GSIS = 3
LIVES = 400
STEPS = 250


class Function:
    """What the test knows of one function: the truth, and the client's side of its link."""

    def __init__(self, name: str, device: LineDevice, gsi: int) -> None:
        self.name = name
        self.device = device
        self.gsi = gsi
        self.level = False
        self.disabled = False
        self.peer: Peer | None = None
        self.pair: Pair | None = None

    @property
    def is_high(self) -> bool:
        return self.level and not self.disabled

    @property
    def command(self) -> int:
        """What the command register holds."""
        return pci.PCI_COMMAND_IO | (pci.PCI_COMMAND_INTX_DISABLE if self.disabled else 0)


class World:
    """The device's side, KVM, and what must be."""

    def __init__(self, directory: Path) -> None:
        self.bench = RemoteBench(directory)
        self.functions: list[Function] = []
        self.lines = [False] * GSIS
        """KVM's lines"""
        self.wanted = [False] * GSIS
        """what they must be"""
        for number in range(FUNCTIONS):
            name = f"dev{number}"
            function = Function(name, self.bench.add(LineDevice, name, 8 * number), number % GSIS)
            self.functions.append(function)
            self.connect(function)

    def close(self) -> None:
        for function in self.functions:
            if function.peer is not None:
                function.peer.close()
        self.bench.close()

    def check(self) -> None:
        """Lets the device's side come to rest, and KVM take what was written to irqfds."""
        self.bench.settle()
        for function in self.functions:
            if self.take(function):
                assert function.is_high, f"{function.name} asserted although it is low"
        assert self.lines == self.wanted

    def change(self, function: Function, *, level: bool | None = None, disabled: bool | None = None) -> None:
        """The truth changes."""
        before = function.is_high
        if level is not None:
            function.level = level
        if disabled is not None:
            function.disabled = disabled
        if function.is_high and not before and function.pair is not None:
            self.wanted[function.gsi] = True

    # KVM

    def sharers(self, gsi: int) -> list[Function]:
        return [function for function in self.functions if function.pair is not None and function.gsi == gsi]

    def take(self, function: Function) -> bool:
        """KVM's wake-up by an irqfd."""
        count = function.pair.written() if function.pair is not None else 0
        assert count <= 1, f"{function.name} asserted twice for one reason"
        if count:
            self.lines[function.gsi] = True
        return bool(count)

    def assign(self, function: Function, gsi: int) -> None:
        function.gsi = gsi
        self.wanted[gsi] |= function.is_high
        self.take(function)

    def deassign(self, function: Function) -> None:
        if self.sharers(function.gsi) == [function]:
            self.lines[function.gsi] = self.wanted[function.gsi] = False

    def eoi(self, gsi: int) -> None:
        self.lines[gsi] = False
        sharers = self.sharers(gsi)
        self.wanted[gsi] = any(function.is_high for function in sharers)
        for function in sharers:
            self.kick(function)

    def kick(self, function: Function) -> None:
        assert function.pair is not None
        function.pair.resamplefd.set()

    # The client

    def connect(self, function: Function) -> None:
        function.peer = self.bench.connect(function.name)
        self.bring_up(function, function.peer)
        function.pair = function.peer.set_irqfd()
        self.assign(function, function.gsi)

    def bring_up(self, function: Function, peer: Peer) -> None:
        peer.config_write(pci.PCI_BASE_ADDRESS_0, 4, IO_BASE)
        peer.config_write(pci.PCI_COMMAND, 2, function.command)

    def replace(self, function: Function, peer: Peer, pair: Pair, gsi: int, *, kicked: bool) -> None:
        """A new pair on another GSI, or the same one."""
        self.deassign(function)
        peer.forget(pair)
        function.pair = peer.set_irqfd(kicked=kicked)
        self.assign(function, gsi)

    def disconnect(self, function: Function, peer: Peer) -> None:
        self.deassign(function)
        peer.close()
        function.peer = function.pair = None


# Steps without a client: by the device itself, or by another function's guest.


def raise_line(world: World, function: Function, gsi: int) -> None:
    world.change(function, level=True)
    function.device.set_intx(True)


def lower_line(world: World, function: Function, gsi: int) -> None:
    world.change(function, level=False)
    function.device.set_intx(False)


def eoi(world: World, function: Function, gsi: int) -> None:
    world.eoi(gsi)


def eoi_and_raise(world: World, function: Function, gsi: int) -> None:
    """The device raises its line before it sees the EOI."""
    world.eoi(function.gsi)
    raise_line(world, function, gsi)


def connect(world: World, function: Function, gsi: int) -> None:
    if function.peer is None:
        function.gsi = gsi
        world.connect(function)


# Steps of a client that is there.

Step = Callable[[World, Function, int], None]
ClientStep = Callable[[World, Function, Peer, Pair, int], None]


def client(step: ClientStep) -> Step:
    def guarded(world: World, function: Function, gsi: int) -> None:
        if function.peer is not None and function.pair is not None:
            step(world, function, function.peer, function.pair, gsi)

    guarded.__name__ = step.__name__
    return guarded


@client
def guest_raises(world: World, function: Function, peer: Peer, pair: Pair, gsi: int) -> None:
    world.change(function, level=True)
    peer.drive(True)


@client
def guest_acknowledges(world: World, function: Function, peer: Peer, pair: Pair, gsi: int) -> None:
    world.change(function, level=False)
    peer.drive(False)


@client
def guest_acknowledges_and_sends_eoi(
    world: World, function: Function, peer: Peer, pair: Pair, gsi: int
) -> None:
    """Both are there when the device's side wakes up, whichever came first."""
    world.change(function, level=False)
    if gsi:
        world.eoi(function.gsi)
        peer.queue_line(False)
    else:
        peer.queue_line(False)
        world.eoi(function.gsi)
    world.bench.settle()
    assert peer.receive() == 0


@client
def guest_sends_eoi_and_raises(world: World, function: Function, peer: Peer, pair: Pair, gsi: int) -> None:
    world.eoi(function.gsi)
    world.change(function, level=True)
    peer.queue_line(True)
    world.bench.settle()
    assert peer.receive() == 0


@client
def guest_raises_and_acknowledges(world: World, function: Function, peer: Peer, pair: Pair, gsi: int) -> None:
    """A pulse: the line stays up until the EOI, for there is no way to take it back."""
    world.change(function, level=True)
    world.change(function, level=False)
    peer.queue_line(True)
    peer.queue_line(False)
    world.bench.settle()
    world.take(function)
    assert [peer.receive(), peer.receive()] == [0, 0]


@client
def guest_disables(world: World, function: Function, peer: Peer, pair: Pair, gsi: int) -> None:
    world.change(function, disabled=True)
    peer.config_write(pci.PCI_COMMAND, 2, function.command)


@client
def guest_enables(world: World, function: Function, peer: Peer, pair: Pair, gsi: int) -> None:
    world.change(function, disabled=False)
    peer.config_write(pci.PCI_COMMAND, 2, function.command)


@client
def guest_disables_and_sends_eoi(world: World, function: Function, peer: Peer, pair: Pair, gsi: int) -> None:
    world.change(function, disabled=True)
    peer.send(Command.PCI_CFGWRITE, CONFIG.pack(pci.PCI_COMMAND, function.command, 2))
    world.eoi(function.gsi)
    world.bench.settle()
    assert peer.receive() == 0


@client
def guest_reads_status(world: World, function: Function, peer: Peer, pair: Pair, gsi: int) -> None:
    assert peer.config_read(pci.PCI_STATUS, 2) == (pci.PCI_STATUS_INTERRUPT if function.level else 0)


@client
def kick(world: World, function: Function, peer: Peer, pair: Pair, gsi: int) -> None:
    """A resample without an EOI."""
    world.wanted[function.gsi] |= function.is_high
    world.kick(function)


@client
def reroute(world: World, function: Function, peer: Peer, pair: Pair, gsi: int) -> None:
    """The same pair on another GSI: the kick lets the device look at its level again."""
    world.deassign(function)
    world.assign(function, gsi)
    world.kick(function)


@client
def reroute_with_new_pair(world: World, function: Function, peer: Peer, pair: Pair, gsi: int) -> None:
    world.replace(function, peer, pair, gsi, kicked=False)


@client
def reroute_with_new_pair_and_kick(
    world: World, function: Function, peer: Peer, pair: Pair, gsi: int
) -> None:
    world.replace(function, peer, pair, gsi, kicked=True)


@client
def reset(world: World, function: Function, peer: Peer, pair: Pair, gsi: int) -> None:
    """With the irqfd left assigned: what is asserted stays so until the EOI."""
    world.change(function, level=False, disabled=False)
    assert peer.call(Command.DEVICE_RESET) == 0
    world.bring_up(function, peer)


@client
def reset_without_irqfd(world: World, function: Function, peer: Peer, pair: Pair, gsi: int) -> None:
    world.deassign(function)
    function.pair = None
    world.change(function, level=False, disabled=False)
    assert peer.call(Command.DEVICE_RESET) == 0
    world.bring_up(function, peer)
    function.pair = pair
    world.assign(function, function.gsi)
    world.kick(function)


@client
def reset_and_eoi(world: World, function: Function, peer: Peer, pair: Pair, gsi: int) -> None:
    world.change(function, level=False, disabled=False)
    peer.send(Command.DEVICE_RESET)
    world.eoi(function.gsi)
    world.bench.settle()
    assert peer.receive() == 0
    world.bring_up(function, peer)


@client
def disconnect(world: World, function: Function, peer: Peer, pair: Pair, gsi: int) -> None:
    world.disconnect(function, peer)


@client
def die_within_a_message(world: World, function: Function, peer: Peer, pair: Pair, gsi: int) -> None:
    peer.send_bytes(b"\6\0\0", pair.fds)
    world.disconnect(function, peer)


@client
def reconnect(world: World, function: Function, peer: Peer, pair: Pair, gsi: int) -> None:
    """At once: the end of the old link and the new client are seen together."""
    world.disconnect(function, peer)
    function.gsi = gsi
    world.connect(function)


@client
def send_nonsense(world: World, function: Function, peer: Peer, pair: Pair, gsi: int) -> None:
    """It costs nothing that is in force."""
    peer.send(Command.SET_IRQFD, fds=[pair.irqfd.fd, pair.irqfd.fd])
    for other in world.functions:
        if other.pair is not None and other is not function:
            peer.send(Command.SET_IRQFD, fds=[other.pair.resamplefd.fd, other.pair.irqfd.fd])
    peer.send(Command.BAR_WRITE, BAR.pack(IO_BASE + 64, 1, 1, False))
    world.bench.settle()
    assert peer.receive() == (1 << 64) - 1


KINDS: dict[Step, int] = {
    raise_line: 4,
    lower_line: 3,
    eoi: 6,
    eoi_and_raise: 2,
    connect: 4,
    guest_raises: 2,
    guest_acknowledges: 3,
    guest_acknowledges_and_sends_eoi: 3,
    guest_sends_eoi_and_raises: 2,
    guest_raises_and_acknowledges: 1,
    guest_disables: 2,
    guest_enables: 4,
    guest_disables_and_sends_eoi: 1,
    guest_reads_status: 1,
    kick: 1,
    reroute: 3,
    reroute_with_new_pair: 2,
    reroute_with_new_pair_and_kick: 2,
    reset: 1,
    reset_without_irqfd: 1,
    reset_and_eoi: 1,
    disconnect: 1,
    die_within_a_message: 1,
    reconnect: 1,
    send_nonsense: 1,
}
"""and how often each is taken, relatively"""

ALL = [
    (kind, function, gsi)
    for kind, weight in KINDS.items()
    for function in range(FUNCTIONS)
    for gsi in range(GSIS)
    for _ in range(weight)
]


def play(life: Sequence[tuple[Step, int, int]]) -> None:
    before = count_fds()
    with tempfile.TemporaryDirectory() as directory:
        world = World(Path(directory))
        try:
            for step, number, gsi in life:
                step(world, world.functions[number], gsi)
                world.check()
        finally:
            world.close()
    await_fds(before)


def describe(taken: tuple[Step, int, int]) -> str:
    step, number, gsi = taken
    return f"{step.__name__} dev{number} gsi {gsi}"


def test_no_line_is_lost_stuck_or_invented() -> None:
    check_lives(LIVES, lambda random: random.choices(ALL, k=STEPS), play, describe)
