# SPDX-License-Identifier: GPL-2.0-or-later
"""What the scripted guest has set up, and the command that does it: guest/setup.c in Python."""

from __future__ import annotations

from common import pci
from proxyd.vm.soft.machine import SoftMachine
from proxyd.vm.soft.scripteddrivers import DRIVERS
from proxyd.vm.soft.scriptedirq import PIRQ_IRQS, Device, Function, Interrupts
from proxyd.vm.soft.scriptedparse import CommandError, parse_address
from proxyd.vm.soft.scriptedpci import RUNNING, Windows, functions, is_device, pirq_of

__all__ = ["Bus"]


class Bus:
    """The guest's functions, and the handler of their interrupts."""

    def __init__(self, machine: SoftMachine) -> None:
        self.machine = machine
        self.functions: list[Function] = []
        """those with a driver"""
        self.devices: list[Device] = []
        """those without one"""
        self.interrupts = Interrupts(machine, (), ())

    def setup(self, _words: list[str]) -> str:
        """setup"""
        machine = self.machine
        for irq in PIRQ_IRQS:
            machine.mask(irq, True)
        self.functions, self.devices = [], []
        devfns = [devfn for devfn in functions(machine) if is_device(machine, devfn)]
        for devfn in devfns:
            machine.config_write(devfn, pci.PCI_COMMAND, 2, 0)
        windows = Windows()
        # Those with a driver come first, they can't do without an address.
        known = {devfn: self._is_known(devfn) for devfn in devfns}
        records = [
            self._start(devfn, windows, is_known=known[devfn])
            for devfn in sorted(devfns, key=lambda devfn: not known[devfn])
        ]
        self.interrupts = Interrupts(machine, self.functions, self.devices)
        used = {function.pirq for function in self.functions} | {device.pirq for device in self.devices}
        for pirq, irq in enumerate(PIRQ_IRQS):
            machine.set_level_triggered(irq)
            self.interrupts.route(pirq, irq)
            if pirq in used:
                machine.mask(irq, False)
        for record in records:
            self.record(record)
        return f"functions={len(self.functions)} devices={len(self.devices)}"

    def named(self, word: str) -> Function:
        """The function with a driver at the address. Raises CommandError."""
        devfn = parse_address(word)
        for function in self.functions:
            if function.devfn == devfn:
                return function
        raise CommandError("no function with a driver at this address")

    def irq(self, words: list[str]) -> str:
        """irq ADDR [enable]"""
        devfn = parse_address(words[0])
        if words[1:] not in ([], ["enable"]):
            raise CommandError("irq ADDR [enable] is meant")
        for device in self.devices:
            if device.devfn == devfn:
                if words[1:]:
                    device.enable()
                gsi = f"gsi={device.irq} " if device.irq is not None else ""
                asserted, disabled = int(device.is_asserting()), int(device.is_disabled())
                return f"{gsi}interrupts={device.interrupts} asserted={asserted} disabled={disabled}"
        raise CommandError("no function without a driver at this address")

    def record(self, text: str) -> None:
        """Prints a record."""
        self.machine.write_line(f"* {text}")

    def _is_known(self, devfn: int) -> bool:
        ids = self.machine.config_read(devfn, pci.PCI_VENDOR_ID, 4)
        return ids in DRIVERS and 1 <= self.machine.config_read(devfn, pci.PCI_INTERRUPT_PIN, 1) <= 4

    def _start(self, devfn: int, windows: Windows, *, is_known: bool) -> str:
        """Lets a function decode, and starts it if it has a driver. Returns the record of it."""
        machine = self.machine
        ids = machine.config_read(devfn, pci.PCI_VENDOR_ID, 4)
        pin = machine.config_read(devfn, pci.PCI_INTERRUPT_PIN, 1)
        pirq = pirq_of(devfn, pin) if 1 <= pin <= 4 else None
        irq = None if pirq is None else PIRQ_IRQS[pirq]
        placed, is_complete = windows.place(machine, devfn)
        if is_known and not is_complete:
            raise CommandError("a BAR fits no window")
        machine.config_write(devfn, pci.PCI_INTERRUPT_LINE, 1, irq or 0)
        machine.config_write(devfn, pci.PCI_COMMAND, 2, RUNNING)
        name = f"{ids & 0xFFFF:04x}:{ids >> 16:04x}"
        where = "".join(f" {key}={address:#x}" for key, address in placed.items())
        if not is_known or pirq is None or irq is None:
            device = Device(machine, devfn, pirq, irq)
            self.devices.append(device)
            gsi = f" gsi={irq}" if irq is not None else ""
            return f"device addr={device.addr} id={name}{gsi}{where}"
        driver = DRIVERS[ids](machine, next(iter(placed.values())))
        function = Function(machine, devfn, driver, pirq, irq)
        self.functions.append(function)
        driver.init()
        if not driver.is_alive():
            raise CommandError("a function's registers do not answer")
        return f"function addr={function.addr} id={name} model={driver.model} gsi={irq}{where}"
