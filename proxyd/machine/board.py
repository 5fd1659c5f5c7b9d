# SPDX-License-Identifier: GPL-2.0-or-later
"""What the machines of --vm embedded and --vm soft have in common: console, PCI bus, links, control socket."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import ExitStack

from common.config import DeviceConfig, VmConfig
from common.errors import UsageError
from common.journal import device_log
from common.loop import Loop
from common.pci import format_devfn
from proxyd.controlserver import answer_calls
from proxyd.kvm.irqchip import Irqchip
from proxyd.machine.console import COM1_IRQ, Console
from proxyd.pci.links import LinkKeeper
from proxyd.pci.pcidev import PciProxy
from proxyd.pci.pcihost import RESERVED_DEVFNS, PciHost
from proxyd.pci.ram import Ram
from proxyd.vmstate import VmState, describe

__all__ = ["Board", "check_addresses"]

ROUND_TRIP_SECONDS = 2.0
"""how long a vCPU waits for a remote before the link counts as lost"""


def check_addresses(devices: Iterable[DeviceConfig]) -> None:
    """Raises UsageError for a device at an address that the chipset has."""
    for device in devices:
        if device.devfn in RESERVED_DEVFNS:
            raise UsageError(
                f"device {device.id}: address {format_devfn(device.devfn)} belongs to the chipset"
            )


class Board:
    """Owns everything but the irqchip and the CPU."""

    def __init__(
        self, program: str, config: VmConfig, loop: Loop, irqchip: Irqchip, ram: Ram | None = None
    ) -> None:
        """``config`` has passed check_addresses(); ``ram`` is what devices may reach.

        The loop is not to run before start(). Raises UsageError.
        """
        self._program = program
        self._config = config
        self._irqchip = irqchip
        self._ram = ram
        self._proxies: list[PciProxy] = []
        self._hung: set[int] = set()
        log = logging.getLogger(program)
        remoted = f"{config.runtime_dir}/remoted.varlink"
        self._state = VmState(config.name, config.vm, "", None, self._proxies, remoted)
        with ExitStack() as opened:
            self._control = answer_calls(loop, config, self._state, log)
            opened.callback(self._control.close)
            self._keeper = LinkKeeper(loop)
            opened.callback(self._keeper.close)
            self._proxies += [self._create_proxy(device) for device in config.devices]
            self.host = PciHost(irqchip, self._proxies)
            path = config.own_socket_path("proxyd.console")
            self.console = Console(loop, path, self._set_console_irq, log)
            opened.pop_all()

    def start(self, irqchip: str, tsc_khz: int | None) -> None:
        """Begins to connect; ``irqchip`` and ``tsc_khz`` are what the control socket tells of the guest."""
        self._state.irqchip = irqchip
        self._state.tsc_khz = tsc_khz
        self._keeper.start(self._proxies)

    def describe(self) -> str:
        """The functions and links, in one line."""
        return describe(self._proxies)

    def abort(self) -> None:
        """Connects no more, and ends the round trips that a vCPU is waiting in."""
        self._keeper.close()

    def close(self) -> None:
        """Takes the irqfds out of the irqchip one by one, and closes everything; once started, after abort()."""
        self._keeper.close()
        self._control.close()
        for proxy in self._proxies:
            proxy.close()
        self.console.close()

    def _create_proxy(self, device: DeviceConfig) -> PciProxy:
        return PciProxy(
            device.id,
            device.devfn,
            self._config.socket_path(device),
            self._irqchip,
            device_log(self._program, device.id, device.devfn),
            self._keeper.lost,
            deadline=ROUND_TRIP_SECONDS,
            hung=self._hung,
            poll_limit=self._config.poll_max_us / 1e6,
            ram=self._ram,
        )

    def _set_console_irq(self, level: bool) -> None:
        self._irqchip.set_line(COM1_IRQ, level)
