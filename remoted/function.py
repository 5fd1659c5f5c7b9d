# SPDX-License-Identifier: GPL-2.0-or-later
"""The PCI function: config space, BARs, interrupts. What device authors subclass.

A subclass declares its identity, BARs and capabilities as class attributes, and overrides reset(), bar_read() and
bar_write(); it interrupts by raise_irq() or set_intx(). The base class does everything else: config space, the
decoding of BAR addresses, MSI and MSI-X, the interrupt status bit, and INTX_DISABLE. The line that reaches the
transport is a boolean: QEMU's remote counts calls instead, and a line that counts wrong storms or loses
interrupts.

The daemon calls a function only by what declaration.py reserves. These methods guard the subclass's code; it can't
redefine them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from common import pci
from common.amiss import Amiss
from common.errors import UsageError
from common.fields import fields_of, set_to_reset_values
from common.journal import RateLimited
from common.messages import Event
from common.pci import Bar
from remoted.access import BusTarget
from remoted.capabilities import Capability
from remoted.configspace import ConfigSpace
from remoted.declaration import check_declaration, misspelt_attributes
from remoted.guard import GuardedAmiss
from remoted.host import Host, PeriodicTimer
from remoted.interrupts import Interrupts
from remoted.msi import Msi, Msix, VectorKind, place_msix
from remoted.options import Option, parse_options
from remoted.sharedmemory import SharedArea, SharedMemory
from remoted.windows import Area

__all__ = ["PciFunction"]


class PciFunction(BusTarget):
    """One PCI function of header type 0.

    A subclass may raise from any of the methods it overrides, and from its callbacks: the request is answered
    with all ones, the error is counted and logged, and the daemon goes on.
    """

    VENDOR_ID: ClassVar[int]
    DEVICE_ID: ClassVar[int]
    REVISION: ClassVar[int] = 0
    CLASS_CODE: ClassVar[int] = 0xFF0000
    """class, subclass and programming interface, 24 bits"""
    SUBSYSTEM_VENDOR_ID: ClassVar[int] = 0x1AF4
    SUBSYSTEM_ID: ClassVar[int] = 0x1100
    INTERRUPT_PIN: ClassVar[int] = 1
    """0: none, 1 to 4: INTA to INTD"""
    BARS: ClassVar[Mapping[int, Bar]] = {}
    """by BAR number, 0 to 5; one of kind MEM64 occupies the next number too"""
    MSI: ClassVar[Msi | None] = None
    MSIX: ClassVar[Msix | None] = None
    CAPABILITIES: ClassVar[Sequence[Capability]] = ()
    """further capabilities, in the order in which config space has them"""
    NEEDS_MESSAGES: ClassVar[bool] = False
    """whether the device is of no use with its INTx line alone"""
    REGISTERS: ClassVar[Mapping[int, Mapping[int, str]]] = {}
    """names by BAR number and offset, for the log; not every register needs one"""
    OPTIONS: ClassVar[Sequence[Option]] = ()
    """the model's own options for --device and the TOML file"""
    PARTS: ClassVar[tuple[str, ...]] = ()
    """attributes whose objects declare fields of their own, such as ``_uart``"""
    IS_DRIVABLE: ClassVar[bool] = False
    """whether `iohubctl raise` and `lower` may drive the INTx line"""

    # Attributes with two underscores are renamed by the compiler: a subclass may have its own of the same name.
    __config = bytearray()

    def __init__(self, host: Host, options: Mapping[str, str]) -> None:
        """``options`` holds a text for those of OPTIONS that were given. Raises UsageError."""
        check_declaration(self, PciFunction)
        for text in misspelt_attributes(type(self), PciFunction):
            RateLimited(host.log).warning("%s", text, event=Event.ATTRIBUTE_UNKNOWN)
        self.options: Mapping[str, Any] = parse_options(self.OPTIONS, options)
        """the value of each of OPTIONS by name: what was given, or else the default"""
        self.__host = host
        self.__guard = host.guard
        self.__amiss = GuardedAmiss(host.guard)
        self.__timers: list[PeriodicTimer] = []
        host.guard.names = {
            (bar, offset): name for bar, names in self.REGISTERS.items() for offset, name in names.items()
        }
        port = host.vectors
        if self.NEEDS_MESSAGES and port is None:
            raise UsageError("it needs MSI or MSI-X, which mpqemu does not carry: use transport=vfio-user")
        bars, msix = dict(self.BARS), self.MSIX
        if msix is not None and (msix.bar is not None or host.has_msix):
            msix, bars = place_msix(msix, bars)
        kinds = (self.MSI if port is not None else None, msix if host.has_msix else None)
        messages = [each for each in kinds if each is not None]
        if self.NEEDS_MESSAGES and not messages:
            raise UsageError("it needs MSI-X, which msix=off hides from the guest")
        space = ConfigSpace(self, bars, _shown(self.CAPABILITIES, messages, port is not None))
        self.__space = space
        self.__config = space.data
        self.__interrupts = Interrupts(host, space, self.INTERRUPT_PIN, self.MSI, msix)
        self.__shared = {
            number: SharedMemory(number, bar, host.kept_memory(number))
            for number, bar in bars.items()
            if bar.shared
        }
        areas: dict[int, list[Area]] = {
            number: [SharedArea(memory, *area) for area in memory.areas]
            for number, memory in self.__shared.items()
        }
        if msix is not None and msix.bar is not None:
            areas.setdefault(msix.bar, []).extend(self.__interrupts.areas)
            areas[msix.bar].sort(key=lambda area: area.start)
        super().__init__(host.guard, space, bars, areas)
        host.memory.is_bus_master = False
        set_to_reset_values(self)

    def reset(self) -> None:
        """Sets the device's registers to their power-on values. The line is low already."""

    def close(self) -> None:
        """Releases what the device opened. Called once, at the end of the daemon."""

    def restored(self) -> None:
        """Called instead of reset() when the previous process has left its registers: the fields have them.

        Everything else is to be created again: timers, and attributes that are computed from the fields.
        """

    @property
    def counters(self) -> Mapping[str, int]:
        """What the model counts by itself, by name, for the status."""
        return {}

    def set_intx(self, level: bool) -> None:
        """Drives the INTx line; setting the level that it has does nothing.

        For devices that declare neither MSI nor MSIX: no message is sent.
        """
        level = bool(level)
        if level is not self.__interrupts.level:
            self.__interrupts.set_level(level)

    def raise_irq(self, vector: int = 0) -> None:
        """Interrupts by a vector: 0 to what the class declares, less one; 0 if it declares none.

        While the guest has enabled MSI-X or MSI, each call sends a message, or keeps it pending while it can't
        be sent. Else the INTx line is high until all vectors are lowered; those that are still raised when the
        guest enables messages are sent then. Raises ValueError.
        """
        self.__interrupts.raise_irq(vector)

    def lower_irq(self, vector: int = 0) -> None:
        """The cause of a vector's interrupt is gone: ends its share in the INTx line, and what is pending of it.

        Messages that were sent are not affected. Raises ValueError.
        """
        self.__interrupts.lower_irq(vector)

    def capability_offset(self, capability: Capability) -> int:
        """Where in config space one of CAPABILITIES is, for a device that reads what the guest has written to it.

        Raises LookupError for one that is not shown: an extended one, where the transport is mpqemu.
        """
        return self.__space.offset_of(capability)

    def bar_memory(self, bar: int) -> memoryview:
        """The shared memory of a BAR, as long as the BAR; where it has registers, it is not used.

        The guest may read and write it at any time, without bar_read() or bar_write() being called: what is
        checked must be copied first. A reset leaves the contents alone. Raises LookupError for a BAR without.
        """
        memory = self.__shared.get(bar)
        if memory is None:
            raise LookupError(f"BAR {bar} is not declared with shared=")
        return memory.view

    def call_every(self, seconds: float, callback: Callable[[], None]) -> PeriodicTimer:
        """Calls ``callback()`` every so many seconds (0.001 or more), until the timer's cancel() or a reset.

        To be called in reset() and restored(): the first reset stops what __init__() has started. Raises
        ValueError.
        """
        timer = PeriodicTimer(self.__host.loop, seconds, callback)
        self.__timers = [each for each in self.__timers if each.is_active]
        self.__timers.append(timer)
        return timer

    @property
    def host(self) -> Host:
        """What the daemon gives to the device: loop, log, guest RAM."""
        return self.__host

    @property
    def is_bus_master(self) -> bool:
        """Whether the guest lets it do DMA, and send messages: bus mastering is set, and the function in D0."""
        return self.__space.is_bus_master

    @property
    def intx_level(self) -> bool:
        """The level that the device drives, whatever the guest has enabled; status bit 3."""
        return self.__interrupts.is_high

    @property
    def amiss(self) -> Amiss:
        """The problems of this function that `iohubctl status` reports."""
        return self.__amiss

    @property
    def errors(self) -> int:
        """How often the device's code has raised."""
        return self.__guard.errors

    @property
    def last_error(self) -> str:
        """What it raised last, in one line; empty if it never has."""
        return self.__guard.last_error

    @property
    def last_place(self) -> str:
        """What it was doing then, such as ``reading 4 bytes at BAR 0 + 0x8 (STATUS)``."""
        return self.__guard.last_place

    @property
    def stall(self) -> str:
        """What has kept the daemon for seconds since the last reset, and for how long; empty if nothing has."""
        return self.__guard.stall

    @property
    def is_initialised(self) -> bool:
        """Whether the subclass's __init__() has called this class's."""
        return bool(self.__config)

    def full_reset(self) -> bool:
        """What a reset does: lowers the line, config space to power-on values, then reset().

        It is the same for the bus's reset, a function-level reset, and the way from D3hot to D0. False when the
        device's own code failed. The order is that of pci_do_device_reset() in QEMU's hw/pci/pci.c.
        """
        self.__guard.forgive()
        for timer in self.__timers:
            timer.cancel()
        is_lowered = self.drive_intx(False)
        self.__interrupts.reset()
        self.__space.reset()
        self.__config_changed()
        set_to_reset_values(self)
        with self.__guard.running("reset") as run:
            self.reset()
        return is_lowered and not run.failed

    @property
    def keeps_registers(self) -> bool:
        """Whether a restart of the daemon loses nothing: the registers are fields, or there are none."""
        return bool(self.PARTS or fields_of(type(self))) or type(self).reset is PciFunction.reset

    @property
    def state(self) -> tuple[bytearray, bytearray, bool]:
        """Config space, vectors and the level of set_intx(): what resume() takes, besides the fields.

        The lengths of the first two never change.
        """
        return self.__config, self.__interrupts.state, self.__interrupts.level

    def resume(self, config: bytes, vectors: bytes, level: bool) -> bool:
        """Restores the state of the previous process, whose values the fields have already.

        Drives no line, sends nothing, and calls no code of the device; that is for go_on() and release_pending().
        Returns the level that was asserted.
        """
        self.__space.resume(config)
        self.__decode()
        self.__interrupts.resume(vectors, level)
        return self.__interrupts.is_asserted

    def go_on(self) -> None:
        """After resume(): the device goes on, or starts from reset if its class doesn't keep its registers."""
        with self.__guard.running("restored" if self.keeps_registers else "reset"):
            if self.keeps_registers:
                self.restored()
            else:
                self.__interrupts.lower_all()
                self.reset()

    def shut_down(self) -> list[int]:
        """Lets the device close what it opened. Returns fds that are to be closed, which may take long."""
        with self.__guard.running("close"):
            self.close()
        return [fd for memory in self.__shared.values() for fd in memory.unmap()]

    def drive_intx(self, level: bool) -> bool:
        """Lets the device drive its line to a level; False when its code failed."""
        with self.__guard.running("setting the INTx line") as run:
            self.set_intx(level)
        return not run.failed

    @property
    def is_multifunction(self) -> bool:
        """Whether it tells guests that the slot has other functions."""
        return bool(self.__config[pci.PCI_HEADER_TYPE] & pci.PCI_HEADER_TYPE_MULTIFUNCTION)

    def set_multifunction(self) -> None:
        """Tells guests that the slot has other functions (PCI Local Bus 3.0, 6.2.1); for each of them."""
        self.__config[pci.PCI_HEADER_TYPE] |= pci.PCI_HEADER_TYPE_MULTIFUNCTION

    def vectors(self, kind: VectorKind) -> int:
        """How many vectors of a kind config space shows; 0 if it doesn't have the capability."""
        return self.__interrupts.vectors(kind)

    def shared_memory(self, bar: int) -> SharedMemory | None:
        """The memory of a BAR that a client may map; None if it has none."""
        return self.__shared.get(bar)

    def release_pending(self, kind: VectorKind, start: int, count: int) -> None:
        """Sends what is pending: the transport has attached or unmasked these vectors."""
        with self.__guard.running("sending what is pending"):
            self.__interrupts.release_pending(kind, start, count)

    def config_written(self) -> None:
        """Command, a BAR or a capability may have been written: lets it take effect."""
        if self.__space.settle():
            self.full_reset()
        else:
            self.__config_changed()

    def __config_changed(self) -> None:
        self.__decode()
        self.__interrupts.config_changed()

    def __decode(self) -> None:
        self.decode_bars()
        self.__host.memory.is_bus_master = self.__space.is_bus_master


def _shown(
    declared: Sequence[Capability], messages: Sequence[Capability], has_extended: bool
) -> list[Capability]:
    """What config space shows: mpqemu's clients reach 256 bytes of it only.

    Messages come last: with and without them the others are at the same offsets.
    """
    return [*(each for each in declared if has_extended or not each.IS_EXTENDED), *messages]
