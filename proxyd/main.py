# SPDX-License-Identifier: GPL-2.0-or-later
"""iohub-proxyd: the VM's side; gives each device's interrupt line to the VM."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from common.config import DeviceConfig, VmConfig, parse_proxyd
from common.control import ControlServer
from common.errors import IohubError, UsageError
from common.journal import device_log, setup
from common.link import Client
from common.loop import Loop
from common.pci import format_devfn
from proxyd.console import COM1_IRQ, Console
from proxyd.control import INTERFACE, ProxydInterface
from proxyd.irqchip import Irqchip, KvmIrqchip
from proxyd.links import LinkKeeper
from proxyd.pcidev import PciProxy
from proxyd.pcihost import RESERVED_DEVFNS, PciHost
from proxyd.vm.embedded import KICK_SIGNAL, Machine, VcpuThread, open_vm
from proxyd.vm.multiboot import parse_image
from systemd import daemon

if TYPE_CHECKING:
    from proxyd.vm.qmp import QemuPlugger

__all__ = ["main"]

PROGRAM = "iohub-proxyd"
GUEST_IMAGE = Path(__file__).parent / "vm" / "guest.bin"

ROUND_TRIP_SECONDS = 2.0
"""how long a vCPU waits for a remote before the link counts as lost"""


class Embedded:
    """The daemon with a VM of its own on /dev/kvm."""

    def __init__(self, config: VmConfig) -> None:
        """Raises UsageError."""
        self.exit_status = 0
        self._log = logging.getLogger(PROGRAM)
        self._loop = Loop()
        image = parse_image(_read_image(GUEST_IMAGE), str(GUEST_IMAGE))
        self._kvm, self._vm = open_vm()
        self._irqchip = KvmIrqchip(self._vm)
        self._console = Console(
            self._loop,
            str(config.runtime_dir / "console.sock"),
            lambda level: self._irqchip.set_line(COM1_IRQ, level),
        )
        self._keeper = LinkKeeper(self._loop, self._route)
        self._proxies = [
            create_proxy(config, device, self._irqchip, self._keeper) for device in config.devices
        ]
        self._host = PciHost(self._irqchip, self._proxies)
        self._machine = Machine(self._vm, image, self._host, self._console)
        self._vcpu = VcpuThread(self._machine, self._log, self._on_dead)
        # The vCPU can't be asked once it runs.
        tsc_khz = self._machine.tsc_khz()
        interface = ProxydInterface(config.name, config.vm, "kvm", tsc_khz, self._proxies)
        path = str(config.runtime_dir / "proxyd.varlink")
        self._control = ControlServer(self._loop, path, INTERFACE, interface, self._log)

    def run(self) -> None:
        """Runs the guest until SIGTERM or SIGINT, or until it can't go on."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._loop.on_signal(signum, self._loop.stop)
        self._loop.on_signal(KICK_SIGNAL, lambda: None)
        self._keeper.start(self._proxies)
        self._vcpu.start()
        daemon.notify("READY=1")
        self._loop.run()
        daemon.notify("STOPPING=1")

    def close(self) -> None:
        """Stops the guest, takes the irqfds out of KVM one by one, closes everything."""
        self._control.close()
        self._keeper.close()
        for proxy in self._proxies:
            proxy.abort()
        self._vcpu.stop()
        for proxy in self._proxies:
            proxy.close()
        self._irqchip.close()
        self._console.close()
        self._vm.close()
        self._kvm.close()
        self._loop.close()

    def _route(self) -> None:
        self._host.route()

    def _on_dead(self) -> None:
        self.exit_status = 1
        self._loop.call_soon_threadsafe(self._loop.stop)


def create_proxy(config: VmConfig, device: DeviceConfig, irqchip: Irqchip, keeper: LinkKeeper) -> PciProxy:
    """The proxy of one configured device. Raises UsageError for an address that the chipset has."""
    if device.devfn in RESERVED_DEVFNS:
        raise UsageError(f"device {device.id}: address {format_devfn(device.devfn)} belongs to the chipset")
    path = config.socket_path(device)
    connect = partial(Client.connect, path, ROUND_TRIP_SECONDS)
    return PciProxy(device.id, device.devfn, connect, irqchip, device_log(PROGRAM, device.id), keeper.lost)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit status: 0, 1 when the guest died, 2 for bad usage."""
    try:
        config = parse_proxyd(argv)
        setup(PROGRAM, config.name)
        config.runtime_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        proxyd = _create(config)
    except (IohubError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    try:
        proxyd.run()
    except UsageError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    finally:
        proxyd.close()
    return proxyd.exit_status


def _create(config: VmConfig) -> Embedded | QemuPlugger:
    """The daemon for the configured way to the VM."""
    kind, _, argument = config.vm.partition(":")
    if kind == "qmp":
        from proxyd.vm.qmp import QemuPlugger  # asyncio and a library that the others do without

        return QemuPlugger(config, argument, logging.getLogger(PROGRAM))
    return Embedded(config)


def _read_image(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; `make guest` builds it") from error
