# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU with guests/messages.S: a test drives its bus, and it counts the messages that come."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from tests.support.monitorclient import Monitor
from tests.support.qemu import GUESTS, PATIENCE, Qemu, boot, pc_machine

FIRST_VECTOR = 0x40
APIC_ADDRESS = 0xFEE00000

_READ, _WRITE, _GET, _SET, _SET16, _COUNT, _RUN = range(7)
_COMMAND = struct.Struct("<III")
_ANSWER = struct.Struct("<I")
_ENABLE = 1 << 31


class MessageGuest(Qemu):
    """One QEMU process, its guest ready for commands."""

    def __init__(self, args: Sequence[str], program: str, accelerator: str, machine: str = "") -> None:
        """``machine`` follows on -machine, with its comma."""
        super().__init__(
            [
                *pc_machine(machine, accelerator),
                *boot(GUESTS / "messages.bin"),
                *("-device", "isa-debugcon,iobase=0xe9,chardev=letters"),
                *("-serial", "chardev:commands", "-qmp", "chardev:qmp"),
                *args,
            ],
            channels=("letters", "qmp", "commands"),
            program=program,
        )
        with self._starting() as owned:
            self._commands = self.channels["commands"]
            self.monitor = owned.enter_context(Monitor(self.channels["qmp"]))
            for channel in (self._commands, self.channels["letters"]):
                channel.settimeout(PATIENCE)
            self._await_ready()

    def reset(self) -> None:
        """Resets the machine, and waits for the guest."""
        self.monitor.execute("system_reset")
        self._await_ready()

    def read(self, address: int) -> int:
        """32 bits at a physical address."""
        return self._command(_READ, address)

    def write(self, address: int, value: int) -> None:
        """Writes 32 bits to a physical address."""
        self._command(_WRITE, address, value)

    def get(self, devfn: int, offset: int) -> int:
        """32 bits of config space."""
        return self._command(_GET, _ENABLE | devfn << 8 | offset)

    def set(self, devfn: int, offset: int, value: int) -> None:
        """Writes 32 bits of config space."""
        self._command(_SET, _ENABLE | devfn << 8 | offset, value)

    def set16(self, devfn: int, offset: int, value: int) -> None:
        """Writes 16 bits of config space."""
        self._command(_SET16, _ENABLE | devfn << 8 | offset, value)

    def counts(self, vectors: int) -> list[int]:
        """How often each of the first so many vectors has come."""
        return [self._command(_COUNT, FIRST_VECTOR + number) for number in range(vectors)]

    def run(self, address: int, vectors: int, rounds: int) -> None:
        """Writes 0 to ``vectors`` - 1 to a register, in turn, and waits after each for the vector so numbered."""
        self._command(_RUN, address, rounds << 8 | vectors)

    def start_run(self, address: int, vectors: int, rounds: int) -> None:
        """The same without waiting for its end: no other command can follow."""
        self._commands.sendall(_COMMAND.pack(_RUN, address, rounds << 8 | vectors))

    def _await_ready(self) -> None:
        if self.channels["letters"].recv(1) != b"R":
            raise RuntimeError("the guest didn't get ready")

    def _command(self, *words: int) -> int:
        self._commands.sendall(_COMMAND.pack(*words, *(0,) * (3 - len(words))))
        answer = b""
        while len(answer) < _ANSWER.size:
            part = self._commands.recv(_ANSWER.size - len(answer))
            if not part:
                raise EOFError("QEMU has ended")
            answer += part
        return int(_ANSWER.unpack(answer)[0])
