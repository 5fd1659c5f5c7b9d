# SPDX-License-Identifier: GPL-2.0-or-later
"""The same random life for KVM's irqchip and for the userspace one: every answer must be the same."""

import random
from collections import deque
from collections.abc import Iterator

import pytest

from proxyd.kvm.irqchip import is_level_capable
from tests.support.irqbench import ELCR1, ELCR2, M_CMD, POLL, S_CMD, IrqBench, KvmBench, SoftBench

STEPS = 4000
PAIRS = 6
TRACE = 40
PORTS = (M_CMD, M_CMD + 1, S_CMD, S_CMD + 1, ELCR1, ELCR2)
LEVEL_CAPABLE = tuple(irq for irq in range(16) if is_level_capable(irq))

Step = tuple[str, *tuple[int, ...]]


class Player:
    """One bench; each method is a kind of step and returns what can be seen of it."""

    def __init__(self, bench: IrqBench) -> None:
        self._bench = bench
        self._pairs = [bench.pair() for _ in range(PAIRS)]
        self._gsis: dict[int, int] = {}
        self._polled: set[int] = set()
        bench.init_pics(level=LEVEL_CAPABLE)

    def play(self, step: Step) -> tuple[object, list[bool]]:
        """The step's own answer, and which resamplefds it signalled."""
        name, *arguments = step
        answer = getattr(self, name)(*arguments)
        return answer, [pair.resampled for pair in self._pairs]

    def outb(self, port: int, value: int) -> None:
        if port in (M_CMD, S_CMD) and value & 0x18 == 0x08 and value & POLL == POLL:
            self._polled.add(port)
        self._bench.outb(port, value)

    def inb(self, port: int) -> int:
        value = self._bench.inb(port)
        if port & ~1 in self._polled:
            self._polled.discard(port & ~1)
            return value & 0x7F  # Linux before 6.8 doesn't set bit 7
        return value

    def take(self, limit: int) -> list[int]:
        return self._bench.take(limit)

    def line(self, irq: int, level: int) -> None:
        self._bench.irqchip.set_line(irq, bool(level))

    def fire(self, number: int) -> None:
        if number in self._gsis:
            self._bench.fire(self._gsis[number], self._pairs[number])
        else:
            self._pairs[number].irqfd.set()

    def assign(self, number: int, gsi: int) -> int | None:
        try:
            self._bench.assign(gsi, self._pairs[number])
        except OSError as error:
            return error.errno
        self._gsis[number] = gsi
        self._bench.settle(gsi, self._pairs[number])
        return None

    def deassign(self, number: int, gsi: int) -> None:
        self._bench.irqchip.deassign(gsi, self._pairs[number].irqfd)
        if self._gsis.get(number) == gsi:
            del self._gsis[number]

    def leave(self, number: int) -> None:
        if number in self._gsis:
            self.deassign(number, self._gsis[number])

    def route(self, irq: int) -> bool:
        return self._bench.irqchip.set_level_triggered(irq)

    def reset(self) -> None:
        for number in tuple(self._gsis):
            self.leave(number)
        self._bench.irqchip.reset()


def guest_steps(random_: random.Random) -> Iterator[Step]:
    """Port accesses: mostly what drivers do, some that nobody would."""
    command = random_.choice((M_CMD, S_CMD))
    match random_.randrange(13):
        case 0 | 1 | 2 | 3:
            yield "outb", command, random_.choice((0x20, 0x20, 0x20, 0xA0))
        case 4:
            yield "outb", command, random_.choice((0x60, 0x60, 0xE0, 0xC0)) | random_.randrange(8)
        case 5:
            yield "outb", command, random_.choice((0x00, 0x80, 0x40))
        case 6:
            yield "outb", command, 0x08 | random_.randrange(0x80) & ~0x10
        case 7 | 8:
            yield "outb", command + 1, random_.randrange(256) & random_.randrange(256)
        case 9:
            yield "outb", random_.choice((ELCR1, ELCR2)), random_.randrange(256) | random_.randrange(256)
        case 10:
            if random_.random() < 0.3:
                yield "outb", command, 0x10 | random_.randrange(0x10)
                for value in (random_.randrange(0x20, 0x100), 0, random_.choice((0x01, 0x03, 0x11, 0x13))):
                    yield "outb", command + 1, value
        case 11:
            if random_.random() < 0.2:
                yield "outb", random_.choice(PORTS), random_.randrange(256)
        case _:
            for port in PORTS:
                yield "inb", port
    yield "inb", random_.choice(PORTS)


def machine_steps(random_: random.Random) -> Iterator[Step]:
    """What devices, routers and the CPU do."""
    number, gsi = random_.randrange(PAIRS), random_.choice(LEVEL_CAPABLE)
    match random_.randrange(12):
        case 0 | 1 | 2:
            yield "fire", number
        case 3 | 4:
            yield "line", random_.randrange(16), random_.random() < 0.4
        case 5 | 6:
            yield "assign", number, gsi
        case 7:
            yield "deassign", number, gsi
        case 8:
            yield "leave", number
        case 9:
            yield "route", gsi
        case 10:
            if random_.random() < 0.03:
                yield ("reset",)
        case _:
            yield "take", random_.randrange(1, 4)
            for _ in range(random_.randrange(4)):
                yield "outb", S_CMD, 0x20
                yield "outb", M_CMD, 0x20
    yield "take", 1


@pytest.mark.parametrize("seed", range(8))
def test_kvm_and_soft_give_the_same_answers(kvm_bench: KvmBench, seed: int) -> None:
    random_ = random.Random(seed)
    soft_bench = SoftBench()
    kvm, soft = Player(kvm_bench), Player(soft_bench)
    trace: deque[tuple[Step, object]] = deque(maxlen=TRACE)
    taken = resampled = steps = 0
    while steps < STEPS:
        for step in (guest_steps if random_.random() < 0.5 else machine_steps)(random_):
            steps += 1
            expected = kvm.play(step)
            trace.append((step, expected))
            assert soft.play(step) == expected, f"step {steps}, after {list(trace)}"
            taken += step[0] == "take" and bool(expected[0])
            resampled += any(expected[1])
    soft_bench.close()
    # A script that masks everything, or that nothing ever acknowledges, would agree about nothing much.
    assert taken > STEPS // 100
    assert resampled > STEPS // 100
