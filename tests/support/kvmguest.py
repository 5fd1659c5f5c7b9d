# SPDX-License-Identifier: GPL-2.0-or-later
"""The test's end of guests/command.S, which does port I/O, MMIO and one interrupt at a time on command."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from proxyd.kvm.kvm import Kvm, Vcpu
from proxyd.kvm.kvm_h import ExitReason, Request, kvm_regs

GUESTS = Path(__file__).parent.parent / "guests"

LOAD_ADDRESS = 0x1000
STACK = 0xFF00
MAILBOX = 0x500
DOORBELL = 0x5E0
WINDOW = 0x5E1
OWN_PORTS = frozenset((DOORBELL, WINDOW))

_COMMANDS = tuple(f"{verb}{size}" for verb in ("in", "out", "read", "write") for size in (1, 2, 4))
_TAKE = len(_COMMANDS)
_REQUEST = struct.Struct("<IIIi")
_NO_VECTOR = -1


class Handler(Protocol):
    """Who serves the ports and addresses that are not the harness's own; sizes in bytes, values unsigned."""

    def port_in(self, port: int, size: int) -> int: ...

    def port_out(self, port: int, size: int, value: int) -> None: ...

    def mmio_read(self, address: int, size: int) -> int: ...

    def mmio_write(self, address: int, size: int, value: int) -> None: ...


class UnexpectedExit(Exception):
    """The guest left for a reason that the test has no use for."""


class NoDevices:
    """A Handler for machines that have nothing outside of KVM."""

    def port_in(self, port: int, size: int) -> int:
        raise UnexpectedExit(f"in of {size} bytes from port {port:#x}")

    def port_out(self, port: int, size: int, value: int) -> None:
        raise UnexpectedExit(f"out of {value:#x}, {size} bytes, to port {port:#x}")

    def mmio_read(self, address: int, size: int) -> int:
        raise UnexpectedExit(f"read of {size} bytes at {address:#x}")

    def mmio_write(self, address: int, size: int, value: int) -> None:
        raise UnexpectedExit(f"write of {value:#x}, {size} bytes, at {address:#x}")


def load_command_guest(ram: mmap.mmap) -> None:
    """Puts the guest in its place: entry LOAD_ADDRESS, 32-bit protected mode, RAM from 0 to 64 KiB."""
    binary = GUESTS / "command.bin"
    if not binary.exists():
        raise FileNotFoundError(f"{binary} is missing: run `make guest`")
    code = binary.read_bytes()
    ram[LOAD_ADDRESS : LOAD_ADDRESS + len(code)] = code


class CommandGuest:
    """Commands for a loaded guest, whoever runs its vCPU.

    ``run_to_doorbell()`` answers the guest's read of DOORBELL and returns at the next one; reads of WINDOW
    get any answer, at once. The guest must be waiting at its doorbell already.
    """

    def __init__(self, ram: mmap.mmap, run_to_doorbell: Callable[[], None]) -> None:
        self._ram = ram
        self._run_to_doorbell = run_to_doorbell

    def inb(self, port: int) -> int:
        return self._command("in1", port)

    def inw(self, port: int) -> int:
        return self._command("in2", port)

    def inl(self, port: int) -> int:
        return self._command("in4", port)

    def outb(self, port: int, value: int) -> None:
        self._command("out1", port, value)

    def outw(self, port: int, value: int) -> None:
        self._command("out2", port, value)

    def outl(self, port: int, value: int) -> None:
        self._command("out4", port, value)

    def readb(self, address: int) -> int:
        return self._command("read1", address)

    def readw(self, address: int) -> int:
        return self._command("read2", address)

    def readl(self, address: int) -> int:
        return self._command("read4", address)

    def writeb(self, address: int, value: int) -> None:
        self._command("write1", address, value)

    def writew(self, address: int, value: int) -> None:
        self._command("write2", address, value)

    def writel(self, address: int, value: int) -> None:
        self._command("write4", address, value)

    def take(self, limit: int = 1, loops: int = 0) -> list[int]:
        """Takes up to ``limit`` interrupts, without EOI, and returns their vectors.

        ``loops`` is how many turns of a three-instruction loop each window stays open for what isn't pending
        yet.
        """
        vectors: list[int] = []
        while len(vectors) < limit:
            self._transact(_TAKE, 0, loops)
            vector: int = _REQUEST.unpack_from(self._ram, MAILBOX)[3]
            if vector == _NO_VECTOR:
                break
            vectors.append(vector)
        return vectors

    def _command(self, name: str, address: int, value: int = 0) -> int:
        self._transact(_COMMANDS.index(name), address, value)
        result: int = _REQUEST.unpack_from(self._ram, MAILBOX)[2]
        return result

    def _transact(self, command: int, address: int, value: int) -> None:
        _REQUEST.pack_into(self._ram, MAILBOX, command, address, value, _NO_VECTOR)
        self._run_to_doorbell()


class KvmMachine:
    """KVM's irqchip, 1 MiB of RAM and a vCPU that runs the command guest, in the caller's thread."""

    def __init__(self, handler: Handler | None = None) -> None:
        self._handler = handler or NoDevices()
        with Kvm() as kvm:
            self.vm = kvm.create_vm()
        self.ram = mmap.mmap(-1, 1 << 20)
        load_command_guest(self.ram)
        self.vm.map_ram(0, 0, self.ram)
        self.vcpu: Vcpu = self.vm.create_vcpu()
        self.vcpu.start_protected_mode(LOAD_ADDRESS, STACK)
        self._run_to_doorbell()
        self.guest = CommandGuest(self.ram, self._run_to_doorbell)

    def close(self) -> None:
        self.vm.close()
        self.ram.close()

    def _run_to_doorbell(self) -> None:
        while True:
            reason = self.vcpu.run()
            if reason is ExitReason.IO:
                port: int = self.vcpu.state.io.port
                if port == DOORBELL:
                    return
                if port != WINDOW:
                    self.vcpu.complete_io(self._handler.port_in, self._handler.port_out)
            elif reason is ExitReason.MMIO:
                self.vcpu.complete_mmio(self._handler.mmio_read, self._handler.mmio_write)
            elif reason is not ExitReason.INTR:
                regs = kvm_regs()
                self.vm.ioctl_on(self.vcpu.fd, Request.KVM_GET_REGS, regs)
                raise UnexpectedExit(f"{reason.name} at eip {regs.rip:#x}")
