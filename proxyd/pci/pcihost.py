# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's PCI bus: configuration mechanism 1, a PIIX3-like PIRQ router, and the decoding of BARs.

The chipset is as much of a PC's as interrupt routing needs, so that a guest for QEMU's ``pc`` machine finds
what it expects: a host bridge at 00.0 (82441FX), an ISA bridge at 01.0 (82371SB) whose registers 0x60 to 0x63
say which IRQ each of the four PIRQs goes to, bit 7 meaning none (Intel 290550, 2.2.6). Slots are wired to
PIRQs as in QEMU's hw/i386/pc_piix.c.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import ClassVar

from common import pci
from proxyd.kvm.irqchip import Irqchip
from proxyd.pci.pcidev import PciProxy

__all__ = ["RESERVED_DEVFNS", "RESET_CPU", "RESET_PORT", "PciHost"]

RESET_PORT = 0xCF9
"""reset control register (Intel 290550, 2.5.3.1): writing RESET_CPU resets the machine"""
RESET_CPU = 0x04

CONFIG_ADDRESS = 0xCF8
CONFIG_DATA = 0xCFC

PIRQ_REGISTERS = range(0x60, 0x64)
_PIRQ_DISABLED = 0x80
_EDGE_ONLY_IRQS = frozenset((0, 1, 2, 8, 13))
"""IRQs that a PIRQ can't be routed to: their ELCR bits are fixed to edge-triggered"""

_HOST_BRIDGE = 0x00
_ISA_BRIDGE = 0x08
RESERVED_DEVFNS = frozenset((_HOST_BRIDGE, _ISA_BRIDGE))
"""addresses that the chipset occupies"""


class _LocalFunction:
    """A function of the chipset: config space, nothing behind it."""

    def __init__(self, vendor: int, device: int, class_code: int, writable: Iterable[int] = ()) -> None:
        self._config = bytearray(pci.PCI_CONFIG_SIZE)
        self._config[0:2] = vendor.to_bytes(2, "little")
        self._config[2:4] = device.to_bytes(2, "little")
        self._config[pci.PCI_CLASS_PROG : pci.PCI_CLASS_PROG + 3] = class_code.to_bytes(3, "little")
        self._writable = frozenset(writable)

    def config_read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._config[offset : offset + size], "little")

    def config_write(self, offset: int, size: int, value: int) -> None:
        for position in range(offset, offset + size):
            if position in self._writable:
                self._config[position] = value & 0xFF
            value >>= 8


class _IsaBridge(_LocalFunction):
    VENDOR_ID: ClassVar[int] = 0x8086
    DEVICE_ID: ClassVar[int] = 0x7000

    def __init__(self) -> None:
        super().__init__(self.VENDOR_ID, self.DEVICE_ID, 0x060100, PIRQ_REGISTERS)
        self.reset()

    def reset(self) -> None:
        for register in PIRQ_REGISTERS:
            self._config[register] = _PIRQ_DISABLED

    def irq(self, pirq: int) -> int | None:
        """The IRQ that PIRQ 0 to 3 is routed to, None when disabled or where it can't go."""
        value = self._config[PIRQ_REGISTERS[pirq]]
        irq = value & 0x0F
        return None if value & _PIRQ_DISABLED or irq in _EDGE_ONLY_IRQS else irq


class PciHost:
    """Bus 0 with its chipset and the proxied functions. Used by the vCPU's thread."""

    def __init__(self, irqchip: Irqchip, proxies: Iterable[PciProxy]) -> None:
        self._irqchip = irqchip
        self._isa_bridge = _IsaBridge()
        self._proxies = {proxy.devfn: proxy for proxy in proxies}
        self._functions: dict[int, _LocalFunction | PciProxy] = {
            _HOST_BRIDGE: _LocalFunction(0x8086, 0x1237, 0x060000),
            _ISA_BRIDGE: self._isa_bridge,
            **self._proxies,
        }
        self._address = 0

    def pio_read(self, port: int, size: int) -> int:
        """An I/O port read of 1, 2 or 4 bytes; all ones where nothing decodes it."""
        if _is_whole(port, size):
            return self._port_read(port, size)
        return _read_parts(self._port_read, port, size)

    def pio_write(self, port: int, size: int, value: int) -> None:
        """An I/O port write of 1, 2 or 4 bytes."""
        if _is_whole(port, size):
            self._port_write(port, size, value)
            return
        for part, length, piece in _write_parts(port, size, value):
            self._port_write(part, length, piece)

    def mmio_read(self, addr: int, size: int) -> int:
        """A memory read of 1 to 8 bytes; all ones where nothing decodes it."""
        if _is_whole(addr, size):
            return self._bar_read(True, addr, size)
        return _read_parts(partial(self._bar_read, True), addr, size)

    def mmio_write(self, addr: int, size: int, value: int) -> None:
        """A memory write of 1 to 8 bytes."""
        if _is_whole(addr, size):
            self._bar_write(True, addr, size, value)
            return
        for part, length, piece in _write_parts(addr, size, value):
            self._bar_write(True, part, length, piece)

    def reset(self) -> None:
        """Resets the machine. Irqfds are deassigned first, and assigned again when the guest programs the router.

        KVM_SET_IRQCHIP doesn't clear what an irqfd asserts (irq_states in arch/x86/kvm), so it comes after all
        deassigns; and the remotes are reset before anything can be assigned again.
        """
        for proxy in self._proxies.values():
            proxy.quiesce()
        _reset_at_once(self._proxies.values())
        self._irqchip.reset()
        self._isa_bridge.reset()
        self._address = 0

    def _port_read(self, port: int, size: int) -> int:
        if port & ~3 == CONFIG_DATA and self._address >> 31:
            function, offset = self._target(port)
            return _ones(size) if function is None else function.config_read(offset, size)
        if port == CONFIG_ADDRESS and size == 4:
            return self._address
        return self._bar_read(False, port, size)

    def _port_write(self, port: int, size: int, value: int) -> None:
        if port == CONFIG_ADDRESS and size == 4:
            self._address = value
        elif port & ~3 == CONFIG_DATA and self._address >> 31:
            function, offset = self._target(port)
            if function is not None:
                function.config_write(offset, size, value)
                if function is self._isa_bridge:
                    self._router_written()
        else:
            self._bar_write(False, port, size, value)

    def _router_written(self) -> None:
        """The guest has programmed the router, whose outputs are all level-triggered."""
        irqs = [self._isa_bridge.irq(pirq) for pirq in range(len(PIRQ_REGISTERS))]
        for irq in irqs:
            if irq is not None:
                self._irqchip.set_level_triggered(irq)
        for proxy in self._proxies.values():
            first = (proxy.devfn >> 3) - 1
            proxy.set_routes([irqs[(first + pin) & 3] for pin in range(4)])

    def _target(self, port: int) -> tuple[_LocalFunction | PciProxy | None, int]:
        """The function and offset that CONFIG_ADDRESS selects (PCI 3.0, 3.2.2.3.2)."""
        bus = self._address >> 16 & 0xFF
        function = self._functions.get(self._address >> 8 & 0xFF) if bus == 0 else None
        return function, self._address & 0xFC | port & 3

    def _bar_read(self, memory: bool, addr: int, size: int) -> int:
        for proxy in self._proxies.values():
            for window in proxy.windows:
                if window.start <= addr < window.end and window.memory is memory:
                    return proxy.bar_read(memory, addr, size)
        return _ones(size)

    def _bar_write(self, memory: bool, addr: int, size: int, value: int) -> None:
        for proxy in self._proxies.values():
            for window in proxy.windows:
                if window.start <= addr < window.end and window.memory is memory:
                    proxy.bar_write(memory, addr, size, value)
                    return


def _reset_at_once(proxies: Iterable[PciProxy]) -> None:
    """Resets each function in a thread of its own, so that several that hang take no longer than one."""
    errors: list[BaseException] = []

    def reset(proxy: PciProxy) -> None:
        try:
            proxy.reset()
        except BaseException as error:  # noqa: BLE001 - a bug: it is the caller's to raise
            errors.append(error)

    threads = []
    for proxy in proxies:
        thread = threading.Thread(target=reset, args=(proxy,), name=f"reset {proxy.name}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no room for one more
            reset(proxy)
        else:
            threads.append(thread)
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _ones(size: int) -> int:
    return (1 << 8 * size) - 1


def _is_whole(addr: int, size: int) -> bool:
    """Whether an access has one part only, as nearly all have; _parts() would say the same."""
    return not (addr | size) & (size - 1)


def _parts(addr: int, size: int) -> Iterator[tuple[int, int]]:
    """Address and size of the naturally aligned parts of an access of 1 to 8 bytes.

    QEMU's memory core makes the same ones (flatview_read_continue() in system/physmem.c), and a host bridge
    similar ones. None lies across the end of a BAR or of the config data port.
    """
    while size:
        aligned = addr & -addr or size
        part = min(aligned, 1 << size.bit_length() - 1)
        yield addr, part
        addr += part
        size -= part


def _read_parts(read: Callable[[int, int], int], addr: int, size: int) -> int:
    value = 0
    for part, length in _parts(addr, size):
        value |= read(part, length) << 8 * (part - addr)
    return value


def _write_parts(addr: int, size: int, value: int) -> Iterator[tuple[int, int, int]]:
    for part, length in _parts(addr, size):
        yield part, length, value >> 8 * (part - addr) & _ones(length)
