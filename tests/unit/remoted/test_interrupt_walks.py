# SPDX-License-Identifier: GPL-2.0-or-later
"""Random walks through interrupts, beside a model written from PCI Local Bus 3.0, chapter 6.8.

Among the steps are restarts of the daemon, and kills of it within a step: that step is done again by the next
process, from the state before it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing
from typing import ClassVar

import pytest

from common import pci
from remoted.device import Msi, Msix, PciFunction, PowerManagement
from remoted.msi import VectorKind
from tests.support.messageboard import MessageBoard

MSI, MSIX = VectorKind.MSI, VectorKind.MSIX
STEPS = 800

Step = tuple[Callable[[], None], Callable[[], None]]
"""what the function is told, and what the model is"""


class Masking(PciFunction):
    VENDOR_ID, DEVICE_ID = 0x1234, 0x0001
    CAPABILITIES: ClassVar = (PowerManagement(no_soft_reset=True),)
    MSI: ClassVar[Msi] = Msi(8)
    MSIX = Msix(11)


class Unmasking(Masking):
    MSI = Msi(8, maskable=False)


class Model:
    """What the specification says, and what iohub's documentation decides where it leaves a choice."""

    def __init__(self, is_maskable: bool) -> None:
        self.is_maskable = is_maskable
        self.attached: dict[VectorKind, set[int]] = {MSI: set(), MSIX: set()}
        self.sent: list[tuple[VectorKind, int]] = []
        self.reset()

    def reset(self) -> None:
        self.raised: set[int] = set()
        self.unsent: set[int] = set()
        self.pending: dict[VectorKind, set[int]] = {MSI: set(), MSIX: set()}
        self.msi_enabled = self.msix_enabled = self.all_masked = False
        self.allocated = 1
        self.masks: set[int] = set()
        self.is_master = self.intx_disabled = False
        self.is_awake = True

    @property
    def enabled(self) -> VectorKind | None:
        return MSIX if self.msix_enabled else MSI if self.msi_enabled else None

    @property
    def line(self) -> bool:
        return bool(self.raised) and self.enabled is None and not self.intx_disabled and self.is_awake

    def message(self, kind: VectorKind, vector: int) -> int:
        return vector % self.allocated if kind is MSI else vector

    def send(self, kind: VectorKind, vector: int) -> None:
        vector = self.message(kind, vector)
        is_masked = self.all_masked if kind is MSIX else self.is_maskable and vector in self.masks
        if self.is_awake and self.is_master and not is_masked and vector in self.attached[kind]:
            self.sent.append((kind, vector))
            self.pending[kind].discard(vector)
        else:
            self.pending[kind].add(vector)

    def raise_irq(self, vector: int) -> None:
        self.raised.add(vector)
        if self.enabled is not None:
            self.send(self.enabled, vector)
        else:
            self.unsent.add(vector)

    def lower_irq(self, vector: int) -> None:
        if vector in self.raised:
            self.raised.remove(vector)
            self.unsent.discard(vector)
            for kind, pending in self.pending.items():
                pending.intersection_update(
                    pending - {self.message(kind, vector)}
                    | {self.message(kind, each) for each in self.raised}
                )

    def release(self) -> None:
        """Something has changed: sends what can be sent now."""
        if (kind := self.enabled) is not None:
            while self.unsent:
                vector = min(self.unsent)
                self.unsent.remove(vector)
                self.send(kind, vector)
        if (kind := self.enabled) is not None and self.is_awake and self.is_master:
            for vector in sorted(self.pending[kind]):
                self.pending[kind].discard(vector)
                self.send(kind, vector)


class Walk:
    """A function and the model, taking the same steps."""

    def __init__(self, kind: type[Masking], seed: int) -> None:
        self.random = random.Random(seed)
        self.board = MessageBoard(kind)
        self.model = Model(kind is Masking)
        self.msi = self.board.capability(pci.PCI_CAP_ID_MSI)
        self.pmcsr = self.board.capability(pci.PCI_CAP_ID_PM) + 4
        self.taken: list[str] = []

    def go(self) -> None:
        steps = (
            self.raised,
            self.lowered,
            self.msix,
            self.msi_control,
            self.masks,
            self.command,
            self.eventfds,
        )
        act, follow = self.random.choices((*steps, self.power), (8, 4, 2, 2, 2, 3, 3, 1))[0]()
        how = self.random.random()
        if how < 0.1:
            self.taken.append("killed")
            with closing(self.board.keep()) as state:
                state.commit()
                act()
                self.board.port.take()
                self.board.restart(state.fd)
        act()
        follow()
        if how > 0.98:
            self.taken.append("reset")
            self.board.function.full_reset()
            self.model.reset()
        elif how > 0.9:
            self.taken.append("restart")
            with closing(self.board.keep()) as state:
                state.commit()
                self.board.restart(state.fd)
        self.compare()

    def raised(self) -> Step:
        vector = self.random.randrange(11)
        self.taken.append(f"raise {vector}")
        return lambda: self.board.function.raise_irq(vector), lambda: self.model.raise_irq(vector)

    def lowered(self) -> Step:
        vector = self.random.choice([*range(11), *self.model.raised])
        self.taken.append(f"lower {vector}")
        return lambda: self.board.function.lower_irq(vector), lambda: self.model.lower_irq(vector)

    def msix(self) -> Step:
        value = self.random.choice((0x0000, 0x8000, 0x8000, 0xC000, 0x4000))

        def follow() -> None:
            self.model.msix_enabled, self.model.all_masked = bool(value & 0x8000), bool(value & 0x4000)

        self.taken.append(f"msix {value:#x}")
        return lambda: self.board.msix_control(value), self.then_release(follow)

    def msi_control(self) -> Step:
        allocated = self.random.randrange(4)
        value = allocated << 4 | self.random.randrange(2)

        def follow() -> None:
            self.model.msi_enabled, self.model.allocated = bool(value & 1), 1 << allocated

        self.taken.append(f"msi {value:#x}")
        return lambda: self.board.msi_control(value), self.then_release(follow)

    def masks(self) -> Step:
        value = self.random.choice((0, self.random.getrandbits(8)))

        def follow() -> None:
            self.model.masks = {vector for vector in range(8) if value >> vector & 1}

        self.taken.append(f"masks {value:#x}")
        if not self.model.is_maskable:
            return lambda: None, lambda: None
        return lambda: self.write(self.msi + 0x10, 4, value), self.then_release(follow)

    def command(self) -> Step:
        value = self.random.choice((0x004, 0x004, 0x404, 0x400, 0x000))

        def follow() -> None:
            self.model.is_master, self.model.intx_disabled = bool(value & 4), bool(value & 0x400)

        self.taken.append(f"command {value:#x}")
        return lambda: self.board.command(value), self.then_release(follow)

    def eventfds(self) -> Step:
        kind = self.random.choice((MSI, MSIX))
        start = self.random.randrange(11)
        vectors = set(range(start, start + self.random.randrange(1, 12)))
        attaches = self.random.random() < 0.7

        def act() -> None:
            if attaches:
                self.board.attach(kind, start, len(vectors))
            else:
                self.board.port.attached -= {(kind, vector) for vector in vectors}

        def follow() -> None:
            self.model.attached[kind] = (
                self.model.attached[kind] | vectors if attaches else self.model.attached[kind] - vectors
            )

        self.taken.append(f"{'attach' if attaches else 'detach'} {kind.value} {start}+{len(vectors)}")
        return act, self.then_release(follow)

    def power(self) -> Step:
        state = self.random.choice((0, 0, 3))

        def follow() -> None:
            self.model.is_awake = state == 0

        self.taken.append(f"D{state}")
        return lambda: self.write(self.board.capability(pci.PCI_CAP_ID_PM) + 4, 2, state), self.then_release(
            follow
        )

    def write(self, addr: int, size: int, value: int) -> None:
        assert self.board.function.bus_config_write(addr, size, value)

    def then_release(self, follow: Callable[[], None]) -> Callable[[], None]:
        def both() -> None:
            follow()
            self.model.release()

        return both

    def compare(self) -> None:
        board, model = self.board, self.model
        where = " ".join(self.taken[-12:])
        assert board.port.sent == model.sent, where
        board.port.sent.clear()
        model.sent.clear()
        if model.is_awake:
            assert board.pba == sum(1 << vector for vector in model.pending[MSIX]), where
        if model.is_maskable:
            assert board.msi_pending == sum(1 << vector for vector in model.pending[MSI]), where
        assert board.line is model.line, where
        status = board.function.bus_config_read(pci.PCI_STATUS, 2)
        assert bool(status & pci.PCI_STATUS_INTERRUPT) is bool(model.raised), where


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", [Masking, Unmasking])
def test_walk(kind: type[Masking], seed: int) -> None:
    walk = Walk(kind, seed)
    for _ in range(STEPS):
        walk.go()
