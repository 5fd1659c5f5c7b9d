# SPDX-License-Identifier: GPL-2.0-or-later
"""Both ends are interchangeable: any proxy with any remote process, the same guest and the same checks.

What a stock end is known to do wrong is expected of the cells that have it, and of no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from typing import NamedTuple

import pytest

from common import pci
from common.ctl.guestconsole import Record, Reply
from common.serial_reg import UART_MSR, UART_MSR_ANY_DELTA
from tests.support.matrix import OURS, STOCK, Cell
from tests.support.qemuguest import QemuGuest

pytestmark = pytest.mark.usefixtures("requires_kvm", "requires_qemu")

ADDR = "05.0"
PORT_COUNT = 8
LAST_CONFIG = pci.PCI_CONFIG_SIZE - 4
"""the last offset at which QEMU's remote survives a config access"""


class Defect(Enum):
    """What a stock end does wrong."""

    DROPS_A_REROUTED_LINE = "QEMU's proxy takes a line off its GSI and tells nobody to assert it on the next"
    LEAVES_A_DISABLED_LINE = (
        "QEMU's proxy leaves the line up in KVM when INTX_DISABLE is set: one more interrupt"
    )
    GETS_A_VECTOR_TOO_MANY = (
        "QEMU's timer may make KVM look at a PIC that is handling an EOI and hasn't lowered the line yet "
        "(pic_clear_isr() in arch/x86/kvm/i8259.c unlocks in between): the guest gets vector 7 or 15"
    )
    STORMS_AFTER_INTX_DISABLE = (
        "QEMU's remote counts a line that is high four times more when INTX_DISABLE goes"
    )
    MAY_ASSERT_A_RISE_TWICE = (
        "QEMU's remote may judge an EOI from before a rise only after it, and assert the line once more"
    )
    REFUSES_THE_LAST_CONFIG_BYTES = (
        "QEMU's remote exits when one of the last three bytes of config space is read"
    )


PROXY_DEFECTS = frozenset(
    {Defect.DROPS_A_REROUTED_LINE, Defect.LEAVES_A_DISABLED_LINE, Defect.GETS_A_VECTOR_TOO_MANY}
)
REMOTE_DEFECTS = frozenset(
    {
        Defect.STORMS_AFTER_INTX_DISABLE,
        Defect.MAY_ASSERT_A_RISE_TWICE,
        Defect.REFUSES_THE_LAST_CONFIG_BYTES,
    }
)
MOST_SPURIOUS = 20
"""of 2000 interrupts; in most runs there is none"""


class Setting(NamedTuple):
    """A cell, and what must go wrong in it."""

    proxy: str
    remote: str
    defects: frozenset[Defect]


SETTINGS = {
    "stock-proxy-stock-remote": Setting(STOCK, STOCK, PROXY_DEFECTS | REMOTE_DEFECTS),
    "stock-proxy-remoted": Setting(STOCK, OURS, PROXY_DEFECTS),
    "proxyd-stock-remote": Setting(OURS, STOCK, REMOTE_DEFECTS),
    "proxyd-remoted": Setting(OURS, OURS, frozenset()),
}


@pytest.fixture(scope="module", params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> Setting:
    return SETTINGS[str(request.param)]


@pytest.fixture(scope="module")
def running(
    setting: Setting, requires_kvm: None, requires_qemu: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cell]:
    cell = Cell(tmp_path_factory.mktemp("cell"), setting.proxy, setting.remote)
    yield cell
    cell.close()


@pytest.fixture
def cell(running: Cell) -> Cell:
    """The cell after a fresh setup: all counters are zero."""
    running.ok("setup")
    return running


class Counts(NamedTuple):
    """Interrupts of a step: handler entries where they must be and elsewhere, and services."""

    entries: int
    elsewhere: int
    served: int


def steps(reply: Reply) -> dict[str, Counts]:
    return {
        step.text("name"): Counts(step.number("entries"), step.number("elsewhere"), step.number("served"))
        for step in reply.of_kind("step")
    }


def the_function(cell: Cell) -> Record:
    (function,) = cell.ok("stats").of_kind("function")
    return function


def script(base: int) -> Iterator[str]:
    """Commands for the guest: accesses to config space and registers, none of which raises the line."""
    for width, step in ((8, 1), (16, 2), (32, 4)):
        offsets = (*range(0, pci.PCI_STD_HEADER_SIZE, step), 0x41 & -step, LAST_CONFIG)
        yield from (f"config read {width} {ADDR} {offset}" for offset in offsets)
    for offset in (*range(0, pci.PCI_STD_HEADER_SIZE, 4), 0x80, LAST_CONFIG):
        if offset == pci.PCI_COMMAND:
            continue
        restore = f"{base | 1:#x}" if offset == pci.PCI_BASE_ADDRESS_0 else "0"
        for value in ("0xffffffff", "0x5aa55aa5", restore):
            yield f"config write 32 {ADDR} {offset} {value}"
            yield f"config read 32 {ADDR} {offset}"
    for command in (0xFFFF, 0x0400, 0x0000, 0x0002, 0x0104, 0x0003):
        yield f"config write 16 {ADDR} 4 {command}"
        yield f"config read 32 {ADDR} 4"
        yield f"in 8 {base + 7}"
    yield f"config write 16 {ADDR} 6 0xffff"
    yield f"config read 16 {ADDR} 6"
    yield from _register_script(base)


def _register_script(base: int) -> Iterator[str]:
    yield f"out 8 {base + 7} 0x96"
    for width, size in ((8, 1), (16, 2), (32, 4)):
        yield from (f"in {width} {base + offset}" for offset in range(1 - size, PORT_COUNT + 1))
    yield from (f"out 8 {base + 3} 0x83", f"out 16 {base} 0x1234", f"in 32 {base}", f"in 16 {base - 1}")
    yield from (f"out 16 {base + 7} 0xab77", f"in 8 {base + 7}", f"out 16 {base - 1} 0x55cc", f"in 8 {base}")
    yield from (f"out 8 {base + 3} 3", f"out 32 {base + 2} 0x101000c7", f"in 32 {base + 2}")
    for fcr in (0x00, 0x01, 0xC7):
        yield from (f"out 8 {base + 2} {fcr}", f"in 8 {base + 2}", f"out 8 {base + 4} 0x10")
        yield from (f"out 8 {base} {byte}" for byte in (0x41, 0x42, 0x43))
        for _ in range(4):
            yield from (f"in 8 {base + 5}", f"in 8 {base}")
    for mcr in range(0x20):
        yield from (f"out 8 {base + 4} {mcr}", f"in 8 {base + 4}", f"in 8 {base + 6}")
    yield from (f"out 8 {base + offset} 0" for offset in (4, 2, 7))
    yield from (f"in 8 {base + offset}" for offset in range(PORT_COUNT))


def transcript(command: Callable[[str], Reply]) -> list[str]:
    """The script with its answers."""
    base = command(f"config read 32 {ADDR} {pci.PCI_BASE_ADDRESS_0}").result.number("value") & ~3
    lines = []
    for line in script(base):
        reply = command(line)
        assert reply.ok, f"{line}: {reply.reason}"
        value = reply.result.fields.get("value")
        if line == f"in 8 {base + UART_MSR}" and value is not None:
            value = f"{int(value, 16) & ~UART_MSR_ANY_DELTA:#x}"  # in loopback QEMU notes no change
        lines.append(f"{line}: {value}")
    return lines


@pytest.fixture(scope="module")
def known(requires_kvm: None, requires_qemu: None) -> list[str]:
    """The transcript of a pci-serial in QEMU's own process."""
    devices = ["-chardev", "null,id=null", "-device", f"pci-serial,addr={ADDR},chardev=null"]
    with QemuGuest(devices) as machine:
        assert machine.console.command("setup").ok
        return transcript(machine.console.command)


def test_every_access_is_answered_alike(cell: Cell, known: list[str]) -> None:
    assert transcript(cell.command) == known


def test_2000_interrupts(cell: Cell, setting: Setting) -> None:
    """None is lost, and none comes that nobody has raised, but for the stock ends' defects."""
    cell.ok("run 2000")
    stats = cell.ok("stats")
    (function,), (irq,), (vectors,) = (stats.of_kind(kind) for kind in ("function", "irq", "vectors"))
    assert [function.number(key) for key in ("raised", "served", "lost", "redone")] == [2000, 2000, 0, 0]
    spurious = irq.number("spurious")
    assert [irq.number(key) for key in ("entries", "orphaned", "stuck")] == [2000 + spurious, 0, 0]
    most_spurious = MOST_SPURIOUS if Defect.MAY_ASSERT_A_RISE_TWICE in setting.defects else 0
    assert spurious <= most_spurious
    most_vectors = MOST_SPURIOUS if Defect.GETS_A_VECTOR_TOO_MANY in setting.defects else most_spurious
    assert vectors.number("spurious7") + vectors.number("spurious15") <= most_vectors


def test_lines_that_stay_high_at_eoi_come_again(cell: Cell) -> None:
    cell.ok("run 100 held 2")
    function = the_function(cell)
    keys = ("raised", "served", "lost", "held", "reasserts")
    assert [function.number(key) for key in keys] == [100, 100, 0, 50, 50]


def test_reroute_of_an_asserted_line(cell: Cell, setting: Setting) -> None:
    expected = {
        "before_inta": Counts(1, 0, 1),
        "on_new_irq": Counts(1, 0, 1),
        "before_eoi": Counts(1, 1, 1),
        "disabled": Counts(0, 0, 0),
        "enabled": Counts(1, 0, 1),
        "restored": Counts(1, 0, 1),
    }
    lost = 0
    if Defect.DROPS_A_REROUTED_LINE in setting.defects:
        expected |= {
            "before_inta": Counts(0, 0, 0),
            "before_eoi": Counts(0, 1, 0),
            "enabled": Counts(0, 0, 0),
        }
        lost = 3
    assert steps(cell.command(f"reroute {ADDR}")) == expected
    assert the_function(cell).number("lost") == lost


def test_intx_disable_while_high(cell: Cell, setting: Setting) -> None:
    found = steps(cell.command(f"intx {ADDR}"))
    disabled, enabled = found["disabled"], found["enabled"]
    assert disabled == Counts(1 if Defect.LEAVES_A_DISABLED_LINE in setting.defects else 0, 0, 0)
    if Defect.STORMS_AFTER_INTX_DISABLE in setting.defects:
        assert enabled.entries > 2
    else:
        assert enabled == Counts(1, 0, 1)


def test_the_last_bytes_of_config_space(cell: Cell, setting: Setting) -> None:
    """Last, as a cell with that defect needs a new remote process after it."""
    refused = Defect.REFUSES_THE_LAST_CONFIG_BYTES in setting.defects
    for offset in range(LAST_CONFIG + 1, pci.PCI_CONFIG_SIZE):
        value = cell.ok(f"config read 8 {ADDR} {offset}").result.number("value")
        assert value == (0xFF if refused else 0)
