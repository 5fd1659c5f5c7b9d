# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's bus on real KVM, stepped by the test: edu functions behind the real remote side."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

from common.pci import parse_devfn
from proxyd.kvm.kvm_h import kvm_irqchip
from proxyd.pci.pcidev import PciProxy
from proxyd.pci.pcihost import PciHost
from remoted.devices.edu import Edu
from tests.support.irqbench import EOI, M_CMD, S_CMD, SLAVE_BASE, KvmBench
from tests.support.remote import RemoteThread

LONG = 400_000
"""turns of the window's loop within which what is on its way has arrived"""
SHORT = 4_000
"""turns after which what has not arrived is not coming: several times what an injection takes"""

IDS = {"a": "05.0", "b": "06.0", "shared": "09.0"}
BARS = {"a": 0xE0000000, "b": 0xE0100000, "shared": 0xE0200000}
SPURIOUS = 15
RAISE, ACKNOWLEDGE = 0x60, 0x64


class Saved(NamedTuple):
    """A VM's interrupt controllers, and the remote that lives on."""

    remote: RemoteThread
    functions: dict[str, Edu]
    chips: list[kvm_irqchip]


class Board:
    """A guest's bus with three functions; 05.0 and 09.0 are on PIRQA, 06.0 is on PIRQB."""

    def __init__(
        self, directory: Path, model: type[Edu] = Edu, *, saved: Saved | None = None, deadline: float = 5.0
    ) -> None:
        """With ``saved``, a VM that goes on where another was saved, with that one's remote."""
        if saved is None:
            self.remote = RemoteThread(directory)
            self.functions = {
                name: self.remote.add(model, name, parse_devfn(addr)) for name, addr in IDS.items()
            }
            self.remote.start()
        else:
            self.remote, self.functions = saved.remote, saved.functions
        self.bench = KvmBench(self)
        self.lost: list[PciProxy] = []
        self.proxies = {
            name: PciProxy(
                name,
                parse_devfn(addr),
                self.remote.path(name),
                self.bench.irqchip,
                logging.getLogger(f"proxy.{name}"),
                self.lost.append,
                deadline=deadline,
                is_powered_on=saved is not None,
            )
            for name, addr in IDS.items()
        }
        self.host = PciHost(self.bench.irqchip, self.proxies.values())
        self.guest = self.bench.machine.guest
        for proxy in self.proxies.values():
            proxy.connect()
            proxy.attach()
        if saved is not None:
            for chip in saved.chips:
                self.bench.machine.vm.set_irqchip(chip)
            return
        self.bench.init_pics()
        for name, address in BARS.items():
            self.config_write(IDS[name], 0x10, address)
            self.config_write(IDS[name], 0x04, 0x0002)

    def close(self) -> None:
        self.close_vm()
        self.remote.close()

    def close_vm(self) -> None:
        for proxy in self.proxies.values():
            proxy.close()
        self.bench.close()

    def save(self) -> Saved:
        """What a VMM saves: irqfds inject while vCPUs stand still, and aren't part of the chips' state."""
        for proxy in self.proxies.values():
            proxy.quiesce()
        vm = self.bench.machine.vm
        return Saved(self.remote, self.functions, [vm.get_irqchip(chip) for chip in range(3)])

    def port_in(self, port: int, size: int) -> int:
        return self.host.pio_read(port, size)

    def port_out(self, port: int, size: int, value: int) -> None:
        self.host.pio_write(port, size, value)

    def mmio_read(self, address: int, size: int) -> int:
        return self.host.mmio_read(address, size)

    def mmio_write(self, address: int, size: int, value: int) -> None:
        self.host.mmio_write(address, size, value)

    def config_address(self, addr: str, offset: int) -> None:
        self.guest.outl(0xCF8, 1 << 31 | parse_devfn(addr) << 8 | offset & ~3)

    def config_read(self, addr: str, offset: int) -> int:
        self.config_address(addr, offset)
        return self.guest.inl(0xCFC)

    def config_write(self, addr: str, offset: int, value: int) -> None:
        self.config_address(addr, offset)
        self.guest.outl(0xCFC, value)

    def route(self, pirq: int, value: int) -> None:
        self.config_address("01.0", 0x60)
        self.guest.outb(0xCFC + pirq, value)

    def raise_line(self, name: str) -> None:
        self.guest.writel(BARS[name] + RAISE, 1)

    def acknowledge(self, name: str) -> None:
        self.guest.writel(BARS[name] + ACKNOWLEDGE, 1)

    def take(self) -> list[int]:
        """The IRQ that arrives, as a list; a spurious 15 of a line that fell untaken is passed over."""
        irqs = [irq_of(vector) for vector in self.guest.take(1, LONG)]
        if irqs == [SPURIOUS]:
            self.guest.outb(M_CMD, EOI)
            irqs = [irq_of(vector) for vector in self.guest.take(1, LONG)]
        return irqs

    def nothing_arrives(self) -> bool:
        return not self.guest.take(1, SHORT)

    def serve(self, name: str) -> None:
        """What a handler does after it was entered."""
        self.acknowledge(name)
        self.eoi()

    def eoi(self) -> None:
        self.guest.outb(S_CMD, EOI)
        self.guest.outb(M_CMD, EOI)


def irq_of(vector: int) -> int:
    return vector - SLAVE_BASE + 8 if vector >= SLAVE_BASE else vector - 0x20
