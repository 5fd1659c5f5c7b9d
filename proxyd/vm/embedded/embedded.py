# SPDX-License-Identifier: GPL-2.0-or-later
"""--vm embedded: proxyd is the VMM of a small guest on /dev/kvm.

One vCPU in a thread of its own, KVM's PICs, IOAPIC and PIT, 16 MiB of RAM that devices can reach, a console at
COM1, reset control at port 0xcf9, and the PCI bus of proxyd.pci.pcihost. KVM itself serves the PICs' registers,
ELCR among them.
"""

from __future__ import annotations

import logging
import mmap
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from common.config import VmConfig
from common.errors import UsageError
from common.journal import RateLimited
from common.loop import Loop
from common.messages import Event
from common.rate import Rate
from common.service import notify
from proxyd.kvm.irqchip import KvmIrqchip
from proxyd.kvm.kvm import Kvm, Vm
from proxyd.kvm.kvm_h import ExitReason
from proxyd.machine.board import Board, check_addresses
from proxyd.machine.console import COM1_PORTS, Console
from proxyd.pci.pcihost import RESET_CPU, RESET_PORT, PciHost
from proxyd.pci.ram import Ram
from proxyd.vm.embedded.multiboot import Image, parse_image

__all__ = ["Embedded", "Machine", "VcpuThread"]

GUEST_IMAGE = Path(__file__).parent / "guest.bin"

RAM_SIZE = 16 << 20

KICK_SIGNAL = signal.SIGUSR1
"""ends a KVM_RUN; the main thread must have a handler for it, which does nothing"""


class Machine:
    """RAM, vCPU and the devices of the board. Stepped by one thread."""

    def __init__(self, vm: Vm, ram: mmap.mmap, image: Image, host: PciHost, console: Console | None) -> None:
        """Loads the image and puts the vCPU at its entry. Raises UsageError, OSError."""
        if image.memory_end > len(ram):
            raise UsageError(f"the guest's image needs {image.memory_end} bytes of RAM, there are {len(ram)}")
        self._image = image
        self._host = host
        self._console = console
        self._ram = ram
        vm.map_ram(0, 0, ram)
        self._vcpu = vm.create_vcpu()
        self._stats = self._vcpu.stats()
        self._start()

    def step(self) -> ExitReason:
        """Runs the guest until it needs the board, and serves that. Returns why KVM came back."""
        vcpu = self._vcpu
        reason = vcpu.run()
        if reason is ExitReason.IO:
            vcpu.complete_io(self.port_in, self.port_out)
        elif reason is ExitReason.MMIO:
            vcpu.complete_mmio(self._host.mmio_read, self._host.mmio_write)
        return reason

    def port_in(self, port: int, size: int) -> int:
        """An I/O port read that left KVM."""
        if port in COM1_PORTS and size == 1 and self._console is not None:
            return self._console.read(port)
        return self._host.pio_read(port, size)

    def port_out(self, port: int, size: int, value: int) -> None:
        """An I/O port write that left KVM."""
        if port == RESET_PORT and size == 1:
            if value & RESET_CPU:
                self.reset()
        elif port in COM1_PORTS and size == 1 and self._console is not None:
            self._console.write(port, value)
        else:
            self._host.pio_write(port, size, value)

    def reset(self) -> None:
        """The machine's reset: the bus with its functions, the console, then the guest from its entry."""
        self._host.reset()
        if self._console is not None:
            self._console.reset()
        self._start()

    def interrupt(self, value: bool) -> None:
        """Makes step() return INTR at once for as long as it is set. Any thread."""
        self._vcpu.immediate_exit = value

    def interrupts(self) -> int:
        """How many interrupts the guest has taken. Any thread."""
        return 0 if self._stats is None else self._stats.interrupts()

    def close(self) -> None:
        """Closes the statistics; the vCPU is the VM's."""
        if self._stats is not None:
            self._stats.close()

    def tsc_khz(self) -> int | None:
        """The frequency of the guest's time stamp counter in kHz, None where KVM can't tell."""
        return self._vcpu.tsc_khz()

    def _start(self) -> None:
        load = self._image.load_address
        self._ram[load : load + len(self._image.data)] = self._image.data
        self._vcpu.start_protected_mode(self._image.entry, len(self._ram))


class VcpuThread:
    """Steps a machine in a thread of its own until stop()."""

    def __init__(
        self,
        machine: Machine,
        log: RateLimited,
        on_dead: Callable[[], None],
    ) -> None:
        """``on_dead`` is called, from the vCPU's thread, when the guest can't go on."""
        self._machine = machine
        self._log = log
        self._on_dead = on_dead
        self._stopping = False
        self._lock = threading.Lock()
        self._is_running = False
        """a thread that has ended must not be signalled; ``lock`` guards it"""
        self._thread = threading.Thread(target=self._run, name="vcpu0", daemon=True)

    def start(self) -> None:
        """Lets the guest run. Raises UsageError if the system has no room for one more thread."""
        self._is_running = True
        try:
            self._thread.start()
        except RuntimeError as error:
            self._is_running = False
            raise UsageError(f"no thread for the guest's CPU: {error}") from error

    def stop(self) -> None:
        """Ends the thread; it may be in the guest. Accesses that wait for a remote must have been aborted."""
        self._stopping = True
        self._machine.interrupt(True)
        if self._thread.ident is None:
            return
        with self._lock:
            if self._is_running:
                signal.pthread_kill(self._thread.ident, KICK_SIGNAL)
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping:
                reason = self._machine.step()
                if reason not in (ExitReason.IO, ExitReason.MMIO, ExitReason.INTR):
                    self._log.error("the guest stopped: KVM_EXIT_%s", reason.name, event=Event.GUEST_STOPPED)
                    break
        except Exception:  # noqa: BLE001 - a bug: it ends the daemon, but from the main thread
            self._log.exception("the vCPU's thread failed", event=Event.GUEST_STOPPED)
        if not self._stopping:
            self._on_dead()
        with self._lock:
            self._is_running = False


class Embedded:
    """The daemon with a VM of its own on /dev/kvm."""

    def __init__(self, program: str, config: VmConfig, loop: Loop) -> None:
        """Raises UsageError, which names --vm soft where KVM is missing."""
        self._log = RateLimited(logging.getLogger(program))
        self._loop = loop
        self._failed = False
        check_addresses(config.devices)
        image = parse_image(_read_image(GUEST_IMAGE), str(GUEST_IMAGE))
        with ExitStack() as opened:
            ram = Ram(RAM_SIZE)
            opened.callback(ram.close)
            kvm = opened.enter_context(Kvm())
            vm = opened.enter_context(kvm.create_vm())
            vm.create_pit()
            irqchip = KvmIrqchip(vm)
            opened.callback(irqchip.close)
            self._board = Board(program, config, loop, irqchip, ram)
            opened.callback(self._board.close)
            self._machine = Machine(vm, ram.mapping, image, self._board.host, self._board.console)
            opened.callback(self._machine.close)
            self._vcpu = VcpuThread(self._machine, self._log, self._on_dead)
            self._opened = opened.pop_all()
        self._rate = Rate(loop.time)

    def run(self) -> int:
        """Runs the guest until the loop is stopped, or until it can't go on. Returns the exit status.

        Raises UsageError if it can't be started.
        """
        self._log.info("running the embedded guest on /dev/kvm; for another VM: --vm qmp:SOCKET or pid:PID")
        self._loop.on_signal(KICK_SIGNAL, lambda: None)
        self._board.start("kvm", self._machine.tsc_khz())  # the vCPU can't be asked once it runs
        self._vcpu.start()
        notify(f"READY=1\nSTATUS={self.describe()}")
        self._loop.run()
        return 1 if self._failed else 0

    def describe(self) -> str:
        """The state in one line."""
        rate = self._rate.update(self._machine.interrupts())
        return f"{self._board.describe()}, {rate:.0f} interrupts/s"

    def close(self) -> None:
        """Stops the guest, then takes the irqfds out of KVM."""
        self._board.abort()
        self._vcpu.stop()
        self._opened.close()

    def _on_dead(self) -> None:
        self._failed = True
        self._loop.call_soon_threadsafe(self._loop.stop)


def _read_image(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; `make guest` builds it") from error
