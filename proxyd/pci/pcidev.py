# SPDX-License-Identifier: GPL-2.0-or-later
"""The PCI proxy of one function: what QEMU's hw/remote/proxy.c does, kept exact.

It forwards config and BAR accesses over the link, owns the irqfd/resamplefd pair, and follows the route of
the function's interrupt pin. Where QEMU drops a level on the way this proxy kicks: writing the resamplefd
makes the remote look at its level again and re-assert what is still high, and does nothing to a low line. A
kick follows every assign.

While the remote is gone reads give all ones, writes are lost, and nothing is asserted. A new connection gets
back what the guest had programmed (BARs, command, interrupt line) and a fresh pair of eventfds.

Three threads use it: the vCPU's (accesses, routes), the control thread's (attach, teardown), and one for each
connection that is being made, which may take many round trips. One lock guards the link and the pair; it is
never held for longer than one access takes, and never by who connects.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from common import mpqemu, pci
from common.amiss import Amiss
from common.errors import PeerGone, ProtocolError
from common.journal import RateLimited
from common.link import Client, PeerCredentials
from common.mpqemu import Command
from common.notifier import EventNotifier
from common.pci import BarKind
from proxyd.kvm.irqchip import Irqchip
from proxyd.pci.bars import ROM, DecodedBar, size_bars
from proxyd.pci.ram import Ram

__all__ = ["Identity", "PciProxy"]

_ALL_ONES = 0xFFFFFFFFFFFFFFFF
_NO_ROUTES = (None,) * 4
_RESTORED = (
    (pci.PCI_CACHE_LINE_SIZE, 1),
    (pci.PCI_INTERRUPT_LINE, 1),
    *((offset, 4) for offset in range(pci.PCI_BASE_ADDRESS_0, pci.PCI_BASE_ADDRESS_5 + 4, 4)),
    (pci.PCI_ROM_ADDRESS, 4),
    (pci.PCI_COMMAND, 2),
)
"""what a guest programs and a restarted remote has lost; command last, since it enables decoding"""


class Identity(NamedTuple):
    """What makes a function the same one after a reconnect."""

    vendor: int
    device: int
    class_code: int
    pin: int
    bars: tuple[DecodedBar, ...]


class _Found(NamedTuple):
    """What connect() leaves for attach()."""

    identity: Identity
    generation: int
    """of resets: what was found is worthless if the machine was reset since"""
    registers: bytearray | None
    """what a reset has left in config space, as far as it is kept; None if the guest's was restored"""


class _Window(NamedTuple):
    memory: bool
    start: int
    end: int


class PciProxy:
    """One function of the guest's bus whose device is behind an mpqemu link."""

    def __init__(
        self,
        name: str,
        devfn: int,
        connect: Callable[[], Client],
        irqchip: Irqchip,
        log: logging.Logger | logging.LoggerAdapter[logging.Logger],
        on_lost: Callable[[PciProxy], None],
        *,
        ram: Ram | None = None,
        is_powered_on: bool = False,
    ) -> None:
        """``connect()`` gives a connected link or raises PeerGone. ``ram`` is what the function may reach.

        ``on_lost`` is called, by whichever thread notices, when an established link is lost. The link's fd
        stays open, and its number taken, until the control thread has forgotten it and calls reap().

        The function is reset when it is first linked, since a guest starts with its devices, unless
        ``is_powered_on``: the guest goes on where another VM was saved.
        """
        self.name = name
        self.devfn = devfn
        self.identity: Identity | None = None
        self.windows: tuple[_Window, ...] = ()
        """where the function's BARs are decoded at present"""
        self.reconnects = 0
        self.reason = ""
        """why there is no link, or was none before this one"""
        self.amiss = Amiss()
        self._connect = connect
        self._ram = ram
        self._irqchip = irqchip
        self.log = RateLimited(log)
        self._on_lost = on_lost
        self._lock = threading.RLock()
        self._client: Client | None = None
        self._connecting: Client | None = None
        self._found: _Found | None = None
        self._lost: Client | None = None
        self._peer = ""  # who is or was linked last, as the log has it: its name goes with the process
        self._aborted = False
        self._was_linked = False
        self._irqfd: EventNotifier | None = None
        self._resamplefd: EventNotifier | None = None
        self._routes: tuple[int | None, ...] = _NO_ROUTES
        self._assigned: int | None = None
        self._shadow = bytearray(pci.PCI_CONFIG_SIZE)
        self._generation = 0  # of resets
        self._reset_due = not is_powered_on  # the remote has not seen the last one

    @property
    def remote(self) -> PeerCredentials | None:
        """The process that listens at the link's other end; None without a link."""
        client = self._client
        return None if client is None else client.peer

    @property
    def pin(self) -> int | None:
        """The remote's interrupt pin register, 0 without an interrupt; None before the first connection."""
        return self.identity.pin if self.identity is not None else None

    @property
    def gsi(self) -> int | None:
        """The GSI that the irqfd is assigned to."""
        return self._assigned

    def fileno(self) -> int:
        """The link's fd; readable without a request under way it has ended, or should."""
        client = self._client  # the vCPU's thread may lose it at any time
        return -1 if client is None else client.fileno()

    def connect(self) -> None:
        """Connects, gives the function RAM, identifies it, and resets it or gives it its registers back.

        To be called in a thread of its own while there is no link: it takes many round trips. attach() or
        reap() is to follow, in the control thread. Raises PeerGone when nobody is there, ProtocolError when
        what is there is not the function that was.
        """
        with self._lock:
            generation, reset_due, shadow = self._generation, self._reset_due, self._shadow[:]
        client = self._connect()
        self._connecting = client
        if self._aborted:
            raise PeerGone("the daemon ends")
        if self._ram is not None:
            client.send(Command.SYNC_SYSMEM, self._ram.sysmem, (self._ram.fd,))
        identity = _identify(client)
        if self.identity not in (None, identity):
            raise ProtocolError("another function than before the connection was lost")
        if reset_due:
            client.request(Command.DEVICE_RESET)
        if reset_due or self.identity is None:
            registers = _read_registers(client)
        else:
            registers = None
            _write_registers(client, shadow)
        self._found = _Found(identity, generation, registers)

    def attach(self) -> None:
        """Puts the link into use that connect() has made, with a fresh irqfd pair.

        Raises PeerGone and ProtocolError; reap() is to follow then.
        """
        client, found = self._connecting, self._found
        self._found = None
        if client is None or found is None:
            raise PeerGone("not connected")
        with self._lock:
            if found.generation != self._generation:
                raise PeerGone("the machine was reset while connecting")
            self.identity = found.identity
            try:
                if self.pin:
                    self._create_pair()
                    self._assign()
                    self._send_pair(client)
            except OSError as error:
                self._drop_pair()
                raise PeerGone(f"no irqfd: {error.strerror or error}") from error
            except BaseException:
                self._drop_pair()
                raise
            self.reconnects += self._was_linked
            self._was_linked = True
            if found.registers is not None:
                self._shadow = found.registers
            self._reset_due = False
            self._client, self._connecting = client, None
            self._peer = str(client.peer)
            self._update_windows()
        self.log.info(
            "linked to %04x:%04x at %s",
            found.identity.vendor,
            found.identity.device,
            pci.format_devfn(self.devfn),
            peer=self._peer,
        )

    def close(self) -> None:
        """Takes the irqfd out of KVM, then closes the pair, then the link. A second call does nothing."""
        with self._lock:
            self._drop_pair()
            self._lost, self._client = self._client or self._lost, None
            self.reap()

    def reap(self) -> None:
        """Closes a lost link, and one that was not put into use."""
        self._found = None
        lost, self._lost = self._lost, None
        connecting, self._connecting = self._connecting, None
        for client in (lost, connecting):
            if client is not None:
                client.close()

    def config_read(self, offset: int, size: int) -> int:
        """``size`` (1, 2 or 4) bytes of the function's config space."""
        value = self._request(Command.PCI_CFGREAD, mpqemu.CONFIG.pack(offset, 0, size))
        return value & ((1 << 8 * size) - 1)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Writes ``size`` (1, 2 or 4) bytes of the function's config space."""
        value &= (1 << 8 * size) - 1
        with self._lock:
            self._request(Command.PCI_CFGWRITE, mpqemu.CONFIG.pack(offset, value, size))
            if self._client is None or offset >= pci.PCI_STD_HEADER_SIZE:
                return
            was_disabled = self._is_intx_disabled()
            self._shadow[offset : offset + size] = value.to_bytes(size, "little")
            self._update_windows()
            if self._is_intx_disabled() and not was_disabled:
                # The remote has stopped to assert; what it had asserted is still in KVM.
                self._reassign()

    def bar_read(self, memory: bool, addr: int, size: int) -> int:
        """``size`` bytes at a bus address that one of ``windows`` covers."""
        value = self._request(Command.BAR_READ, mpqemu.BAR.pack(addr, 0, size, memory))
        return value & ((1 << 8 * size) - 1)

    def bar_write(self, memory: bool, addr: int, size: int, value: int) -> None:
        """Writes ``size`` bytes at a bus address that one of ``windows`` covers."""
        self._request(Command.BAR_WRITE, mpqemu.BAR.pack(addr, value, size, memory))

    def set_routes(self, gsis: Sequence[int | None]) -> None:
        """The GSIs that pins A to D of the slot are routed to from now on; None where the router has none.

        A level that is high at this moment arrives on the new GSI.
        """
        with self._lock:
            before = self._route
            self._routes = tuple(gsis)
            if self._route != before:
                self._reassign()

    def abort(self) -> None:
        """Ends the round trips that other threads are waiting in, for good: links are lost. Takes no lock."""
        self._aborted = True
        for client in (self._client, self._connecting):
            if client is not None:
                client.shutdown()

    def quiesce(self) -> None:
        """Takes the irqfd out of the irqchip, lowering the line: first step of a reset, and before a save."""
        with self._lock:
            self._deassign()

    def reset(self) -> None:
        """Resets the remote function and forgets what the guest had programmed; to be called while quiesced.

        A remote that isn't there, or that is lost over it, is reset as soon as it is linked again.
        """
        with self._lock:
            self._generation += 1
            self._reset_due = True
            self._deassign()
            self._routes = _NO_ROUTES
            self._shadow = bytearray(pci.PCI_CONFIG_SIZE)
            if self._client is not None:
                try:
                    self._client.request(Command.DEVICE_RESET)
                    self._shadow = _read_registers(self._client)
                    self._reset_due = False
                except (PeerGone, ProtocolError) as error:
                    self._lose(error)
            self._update_windows()

    def check_link(self) -> None:
        """To be called when fileno() is readable: drops a link that has ended or that speaks unasked."""
        with self._lock:
            if self._client is not None:
                try:
                    self._client.check_quiet()
                except (PeerGone, ProtocolError) as error:
                    self._lose(error)

    def _request(self, command: Command, payload: bytes) -> int:
        with self._lock:
            if self._client is None:
                return _ALL_ONES
            try:
                return self._client.request(command, payload)
            except (PeerGone, ProtocolError) as error:
                self._lose(error)
                return _ALL_ONES

    def _lose(self, error: Exception) -> None:
        self.reason = f"link lost: {error}"
        self.log.warning("%s", self.reason, peer=self._peer)
        self._drop_pair()
        self._lost, self._client = self._client, None
        self._on_lost(self)

    def _create_pair(self) -> None:
        self._irqfd = EventNotifier.create()
        self._resamplefd = EventNotifier.create()

    def _send_pair(self, client: Client) -> None:
        """Hands the pair to the remote, after _assign() has kicked: QEMU's looks at its level only then, ours
        looks at it when the pair arrives and takes the kick for the same question, so that it asserts once."""
        if self._irqfd is not None and self._resamplefd is not None:
            client.send(Command.SET_IRQFD, fds=(self._irqfd.fd, self._resamplefd.fd))

    def _drop_pair(self) -> None:
        self._deassign()
        for notifier in (self._irqfd, self._resamplefd):
            if notifier is not None:
                notifier.close()
        self._irqfd = self._resamplefd = None

    def _reassign(self) -> None:
        """Deassign, assign, kick: an assign before the deassign would be EBUSY."""
        self._deassign()
        try:
            self._assign()
        except OSError as error:  # a new link gets a new pair, and tries again
            self._lose(error)

    def _deassign(self) -> None:
        if self._assigned is not None and self._irqfd is not None:
            self._irqchip.deassign(self._assigned, self._irqfd)
        self._assigned = None

    def _assign(self) -> None:
        route = self._route
        if route is None or self._irqfd is None or self._resamplefd is None:
            return
        # An event from before would assert the line at once, and the kick's answer would once more: the guest may
        # have served the first by the time that KVM injects the second.
        self._irqfd.test_and_clear()
        self._irqchip.assign(route, self._irqfd, self._resamplefd)
        self._assigned = route
        self._resamplefd.set()

    @property
    def _route(self) -> int | None:
        """Where the pin goes at present."""
        return self._routes[self.pin - 1] if self.pin else None

    def _is_intx_disabled(self) -> bool:
        return bool(self._shadow[pci.PCI_COMMAND + 1] << 8 & pci.PCI_COMMAND_INTX_DISABLE)

    def _update_windows(self) -> None:
        command = self._shadow[pci.PCI_COMMAND]
        windows = []
        for decoded in self.identity.bars if self.identity is not None else ():
            raw = int.from_bytes(self._shadow[decoded.offset : decoded.offset + decoded.width], "little")
            memory = decoded.bar.kind is not BarKind.IO
            start = raw & ~(decoded.bar.size - 1) & ((1 << 8 * decoded.width) - 1)
            enabled = command & (pci.PCI_COMMAND_MEMORY if memory else pci.PCI_COMMAND_IO)
            if decoded.number == ROM:
                enabled = enabled and raw & pci.PCI_ROM_ADDRESS_ENABLE
            if enabled and start:
                windows.append(_Window(memory, start, start + decoded.bar.size))
        self.windows = tuple(windows)


def _identify(client: Client) -> Identity:
    vendor_device = _config_read(client, pci.PCI_VENDOR_ID, 4)
    if vendor_device & 0xFFFF in (0xFFFF, 0):
        raise ProtocolError(f"no PCI function: vendor and device id {vendor_device:#x}")
    pin = _config_read(client, pci.PCI_INTERRUPT_PIN, 1)
    if pin > 4:
        raise ProtocolError(f"impossible interrupt pin {pin}")
    class_code = _config_read(client, pci.PCI_REVISION_ID, 4) >> 8
    bars = size_bars(partial(_config_read, client), partial(_config_write, client))
    return Identity(vendor_device & 0xFFFF, vendor_device >> 16, class_code, pin, tuple(bars))


def _read_registers(client: Client) -> bytearray:
    registers = bytearray(pci.PCI_CONFIG_SIZE)
    for offset, size in _RESTORED:
        registers[offset : offset + size] = _config_read(client, offset, size).to_bytes(size, "little")
    return registers


def _write_registers(client: Client, registers: bytearray) -> None:
    for offset, size in _RESTORED:
        _config_write(client, offset, size, int.from_bytes(registers[offset : offset + size], "little"))


def _config_read(client: Client, offset: int, size: int) -> int:
    value = client.request(Command.PCI_CFGREAD, mpqemu.CONFIG.pack(offset, 0, size))
    return value & ((1 << 8 * size) - 1)


def _config_write(client: Client, offset: int, size: int, value: int) -> None:
    client.request(Command.PCI_CFGWRITE, mpqemu.CONFIG.pack(offset, value, size))
