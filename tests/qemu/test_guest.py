# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest on a stock QEMU with in-process devices, whose interrupts are known to be right."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator

import pytest

from common.ctl.guestconsole import GuestConsole, Record, Reply
from common.errors import ProtocolError
from tests.support.qemu import PATIENCE
from tests.support.qemuguest import QemuGuest, guest_symbol
from tests.support.xremote import StockRemote

pytestmark = pytest.mark.usefixtures("requires_kvm", "requires_qemu")

# 05.0 and 09.0 share PIRQ A; the others have one to themselves.
FUNCTIONS = {"05.0": ("edu", 10), "06.0": ("edu", 11), "07.0": ("pci-serial", 5), "09.0": ("pci-serial", 10)}
DEVICES = [
    *("-device", "edu,addr=05.0", "-device", "edu,addr=06.0"),
    *("-chardev", "null,id=null7", "-device", "pci-serial,addr=07.0,chardev=null7"),
    *("-chardev", "null,id=null9", "-device", "pci-serial,addr=09.0,chardev=null9"),
]


@pytest.fixture(scope="module")
def machine(requires_kvm: None, requires_qemu: None) -> Iterator[QemuGuest]:
    with QemuGuest(DEVICES, seabios=True) as machine:
        yield machine


@pytest.fixture
def console(machine: QemuGuest) -> GuestConsole:
    """The guest's console after a fresh setup: all counters are zero."""
    ok(machine.console, "setup")
    return machine.console


def ok(console: GuestConsole, line: str) -> Reply:
    reply = console.command(line, timeout=60.0)
    assert reply.ok, f"{line}: {reply.reason}, {reply.records}"
    return reply


def value(console: GuestConsole, line: str) -> int:
    return ok(console, line).result.number("value")


def by_addr(reply: Reply) -> dict[str, Record]:
    return {record.text("addr"): record for record in reply.of_kind("function")}


def check_counts(console: GuestConsole, rounds: int, held: int) -> None:
    """Every raise served, every held line asserted again, and not one interrupt more."""
    stats = ok(console, "stats")
    functions = by_addr(stats)
    assert set(functions) == set(FUNCTIONS)
    for addr, (_, gsi) in FUNCTIONS.items():
        sharers = sum(other == gsi for _, other in FUNCTIONS.values())
        expected = {"raised": rounds, "served": rounds, "lost": 0, "redone": 0}
        expected |= {"held": held, "reasserts": held, "eois": sharers * (rounds + held)}
        assert {key: functions[addr].number(key) for key in expected} == expected
    for irq in stats.of_kind("irq"):
        assert irq.number("entries") == irq.number("eois")
        assert (irq.number("spurious"), irq.number("orphaned"), irq.number("stuck")) == (0, 0, 0)
    (vectors,) = stats.of_kind("vectors")
    assert (vectors.number("spurious7"), vectors.number("spurious15")) == (0, 0)


def test_setup_finds_the_functions_and_routes_them(machine: QemuGuest) -> None:
    functions = by_addr(ok(machine.console, "setup"))
    assert {
        addr: (record.text("model"), record.number("gsi")) for addr, record in functions.items()
    } == FUNCTIONS
    for addr, (_, gsi) in FUNCTIONS.items():
        assert value(machine.console, f"config read 8 {addr} 0x3c") == gsi
    assert value(machine.console, "config read 32 01.0 0x60") == 0x09050B0A
    assert value(machine.console, "in 8 0x4d0") == 1 << 5
    assert value(machine.console, "in 8 0x4d1") == (1 << 10 | 1 << 11 | 1 << 9) >> 8


def test_bus_listing(console: GuestConsole) -> None:
    listed = {record.text("addr"): record for record in ok(console, "lspci").of_kind("pci")}
    assert listed["01.0"].text("id") == "8086:7000"
    assert listed["01.3"].text("id") == "8086:7113"
    assert listed["05.0"].text("id") == "1234:11e8"
    assert listed["05.0"].number("revision") == 0x10
    assert listed["07.0"].text("id") == "1b36:0002"
    assert listed["07.0"].number("class") == 0x070002
    assert (listed["07.0"].number("pin"), listed["07.0"].number("line")) == (1, 5)


def test_every_interrupt_is_served_and_every_held_line_comes_back(console: GuestConsole) -> None:
    seen: list[int] = []
    reply = console.command("run 200 held 10", lambda record: seen.append(record.number("done")))
    assert reply.ok, reply.reason
    assert seen == list(range(40, 801, 40))
    check_counts(console, rounds=200, held=20)


@pytest.mark.parametrize(("run", "reasserts"), [("run 50", 0), ("run 50 held 5", 10), ("run 3 held 1", 3)])
def test_samples_are_those_of_the_last_run(console: GuestConsole, run: str, reasserts: int) -> None:
    ok(console, "run 20 held 2")
    ok(console, run)
    for addr in FUNCTIONS:
        reply = ok(console, f"samples {addr}")
        raises = [cycles for record in reply.of_kind("raise_to_handler") for cycles in record.cycles()]
        again = [cycles for record in reply.of_kind("eoi_to_reassert") for cycles in record.cycles()]
        assert len(raises) == int(run.split()[1])
        assert len(again) == reasserts
        assert all(raises)
        assert all(again)


@pytest.mark.parametrize("addr", FUNCTIONS)
def test_reroute_of_an_asserted_line(console: GuestConsole, addr: str) -> None:
    reply = ok(console, f"reroute {addr}")
    gsi = FUNCTIONS[addr][1]
    sharers = sum(other == gsi for _, other in FUNCTIONS.values())
    steps = [(step.text("name"), step.number("irq")) for step in reply.of_kind("step")]
    assert steps == [
        ("before_inta", 12),
        *[("on_new_irq", 12)] * sharers,
        ("before_eoi", gsi),
        ("disabled", gsi),
        ("enabled", gsi),
        *[("restored", gsi)] * sharers,
    ]
    assert {step.text("result") for step in reply.of_kind("step")} == {"good"}
    assert value(console, "config read 32 01.0 0x60") == 0x09050B0A
    ok(console, "setup")
    ok(console, "run 20 held 5")
    check_counts(console, rounds=20, held=4)


@pytest.mark.parametrize("addr", FUNCTIONS)
def test_intx_disable_while_high(console: GuestConsole, addr: str) -> None:
    disabled, enabled = ok(console, f"intx {addr}").of_kind("step")
    assert (disabled.text("name"), enabled.text("name")) == ("disabled", "enabled")
    assert (disabled.number("entries"), disabled.number("served")) == (0, 0)
    assert (enabled.number("entries"), enabled.number("served")) == (1, 1)


@pytest.mark.parametrize("addr", FUNCTIONS)
def test_a_held_line_waits_for_its_release(console: GuestConsole, addr: str) -> None:
    assert ok(console, f"hold {addr}").result.number("status") == 1
    assert console.command("run 1").reason == "a line is held, release comes first"
    assert console.command(f"hold {addr}").reason == "the function's line is held"
    assert by_addr(ok(console, "stats"))[addr].number("served") == 0
    (step,) = ok(console, f"release {addr}").of_kind("step")
    assert (step.number("entries"), step.number("served")) == (1, 1)
    assert not console.command(f"release {addr}").ok


@pytest.mark.parametrize("addr", ["05.0", "07.0"])
def test_reboot_with_a_line_high(machine: QemuGuest, console: GuestConsole, addr: str) -> None:
    ok(console, f"hold {addr}")
    ok(console, "reboot")
    console.wait_ready(PATIENCE)
    assert console.command("run 1").reason == "no function with a driver: setup finds them"
    ok(console, "setup")
    ok(console, "run 100 held 10")
    check_counts(console, rounds=100, held=10)


def test_registers_that_were_reset_are_noticed_at_the_latest_at_the_end(console: GuestConsole) -> None:
    """A backend that restarts too fast to be missed leaves only its registers' loss to see."""
    edu = value(console, "config read 32 06.0 0x10")
    serial = value(console, "config read 32 07.0 0x10") & ~3
    ok(console, f"write 32 {edu + 4} 0")
    ok(console, f"out 8 {serial + 7} 0")
    back = {record.text("addr"): record for record in ok(console, "run 1").of_kind("back")}
    assert set(back) == {"06.0", "07.0"}
    assert {record.text("config") for record in back.values()} == {"kept"}
    assert ok(console, "run 1").of_kind("back") == []
    check_counts(console, rounds=2, held=0)


@pytest.mark.parametrize(("addr", "offset"), [("05.0", 0x04), ("05.0", 0x10), ("09.0", 0x04), ("09.0", 0x10)])
def test_a_function_that_lost_its_config_is_restored_and_its_round_redone(
    console: GuestConsole, addr: str, offset: int
) -> None:
    ok(console, f"config write 32 {addr} {offset} 0")
    (back,) = ok(console, "run 100").of_kind("back")
    assert (back.text("addr"), back.text("config")) == (addr, "rewritten")
    for name, function in by_addr(ok(console, "stats")).items():
        counts = [function.number(key) for key in ("raised", "served", "lost", "redone")]
        assert counts == [100, 100, 0, 1 if name == addr else 0]


def test_generic_accesses(console: GuestConsole) -> None:
    edu = value(console, "config read 32 05.0 0x10")
    serial = value(console, "config read 32 07.0 0x10") & ~3
    assert value(console, f"read 32 {edu}") == 0x010000ED
    ok(console, f"write 32 {edu + 8} 5")
    assert value(console, f"in 8 {serial + 7}") == 0x5A
    ok(console, f"out 8 {serial + 7} 0xa5")
    assert value(console, f"in 8 {serial + 7}") == 0xA5
    ok(console, "out 32 0xcf8 0x80002800")
    assert value(console, "in 32 0xcfc") == 0x11E81234
    assert value(console, "in 16 0xcfe") == 0x11E8
    ok(console, "write 32 0x200000 0x11223344")
    ok(console, "write 8 0x200001 0xaa")
    ok(console, "write 16 0x200002 0xbbcc")
    assert value(console, "read 32 0x200000") == 0xBBCCAA44
    assert value(console, "read 8 0x200003") == 0xBB
    assert value(console, "read 16 0x200000") == 0xAA44
    ok(console, "config write 8 06.0 0x3c 0x5d")
    assert value(console, "config read 8 06.0 0x3c") == 0x5D
    assert value(console, "config read 16 06.0 0") == 0x1234
    assert value(console, "config read 8 05.0 255") == 0
    assert value(console, "config read 32 1f.0 0") == 0xFFFFFFFF


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "empty line"),
        ("  ", "empty line"),
        ("bogus", "unknown command"),
        ("setupx", "unknown command"),
        ("setup 1", "wrong number of arguments"),
        ("run", "wrong number of arguments"),
        ("run 1 held", "run ROUNDS [held EVERY] is meant"),
        ("run 1 hold 1", "run ROUNDS [held EVERY] is meant"),
        ("run 0", "bad number"),
        ("run -1", "bad number"),
        ("run 1x", "bad number"),
        ("run 1000001", "bad number"),
        ("run 4294967297", "bad number"),
        ("run 1 held 0", "bad number"),
        ("in 8 0x10000", "bad number"),
        ("in 8 0x", "bad number"),
        ("in 24 0x80", "width is 8, 16 or 32"),
        ("out 8 0x80 0x100", "bad number"),
        ("out 16 0x80 65536", "bad number"),
        ("read 32 0x100000000", "bad number"),
        ("write 16 0x200000 0x10000", "bad number"),
        ("config read 8 05.0 0x100", "bad number"),
        ("config read 32 05.0 2", "the access crosses a doubleword"),
        ("config read 16 05.0 0xff", "the access crosses a doubleword"),
        ("config read 8 05.8 0", "bad address, SLOT.FN is meant"),
        ("config read 8 20.0 0", "bad address, SLOT.FN is meant"),
        ("config read 8 5.0 0", "bad address, SLOT.FN is meant"),
        ("config peek 8 05.0 0", "read or write"),
        ("config write 8 05.0 0", "wrong number of arguments"),
        ("config write 8 05.0 0 1 2 3", "wrong number of arguments"),
        ("samples 04.0", "no function with a driver at this address"),
        ("reroute 05", "bad address, SLOT.FN is meant"),
        ("intx 01.0", "no function with a driver at this address"),
    ],
)
def test_bad_commands_are_refused(console: GuestConsole, line: str, reason: str) -> None:
    reply = console.command(line)
    assert (reply.ok, reply.reason) == (False, reason)
    ok(console, "version")


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"x" * 128, "line too long"),
        (b"version " + b"y" * 5000, "line too long"),
        (b"version\0", "not printable ASCII"),
        (b"\xffversion", "not printable ASCII"),
    ],
)
def test_bad_lines_are_refused(machine: QemuGuest, sent: bytes, reason: str) -> None:
    machine.channels["console"].sendall(sent)
    reply = machine.console.command("")
    assert (reply.ok, reply.reason) == (False, reason)
    ok(machine.console, "version")


def test_an_idle_guest_sleeps(machine: QemuGuest, console: GuestConsole) -> None:
    """No poll and no tick is left after a command: for half a second the vCPU never runs."""
    ok(console, "run 5")
    switches = []
    for _ in range(10):
        before = machine.vcpu_switches()
        assert select.select([machine.channels["console"]], [], [], 0.5) == ([], [], [])
        switches.append(machine.vcpu_switches() - before)
        if not switches[-1]:
            return
    pytest.fail(f"scheduled in every half second: {switches}")


def test_a_stuck_line_is_masked_and_the_console_lives(requires_kvm: None, requires_qemu: None) -> None:
    """An e1000 holds the line that edu shares with it; in the chipset's slot, which the guest leaves alone."""
    devices = ["-device", "edu,addr=05.0", "-device", "edu,addr=06.0", "-device", "e1000,addr=01.5,romfile="]
    with QemuGuest(devices, seabios=True) as machine:
        console = machine.console
        ok(console, "setup")
        ok(console, "config write 16 01.5 4 2")
        bar = value(console, "config read 32 01.5 0x10")
        ok(console, f"write 32 {bar + 0xD0} 4")  # IMS
        ok(console, f"write 32 {bar + 0xC8} 4")  # ICS
        (irq,) = [line for line in ok(console, "stats").of_kind("irq") if line.number("irq") == 10]
        assert (irq.number("stuck"), irq.number("spurious")) == (1, 200)
        assert console.command("run 1", timeout=60.0).reason == "an IRQ is stuck"
        ok(console, f"write 32 {bar + 0xD8} 4")  # IMC
        ok(console, "setup")
        ok(console, "run 10 held 5")
        assert {f.number("served") for f in ok(console, "stats").of_kind("function")} == {10}


@pytest.fixture
def proxied(requires_kvm: None, requires_qemu: None) -> Iterator[QemuGuest]:
    """pci-serial at 05.0 in QEMU's own remote process, whose proxy drops a line that is re-routed."""
    ours, theirs = socket.socketpair()
    with ours, StockRemote(theirs):
        devices = [
            *("-object", "memory-backend-memfd,id=ram,size=64M,share=on"),
            *("-device", f"x-pci-proxy-dev,addr=05.0,fd={ours.fileno()}"),
        ]
        with QemuGuest(devices, [ours.fileno()], ",memory-backend=ram") as machine:
            yield machine


def test_a_line_that_is_dropped_is_reported_as_lost(proxied: QemuGuest) -> None:
    ok(proxied.console, "setup")
    ok(proxied.console, "run 50 held 5")
    reply = proxied.console.command("reroute 05.0", timeout=60.0)
    results = {step.text("name"): step.text("result") for step in reply.of_kind("step")}
    assert reply.reason == "a step had the wrong interrupts"
    assert results == {
        "before_inta": "bad",
        "on_new_irq": "good",
        "before_eoi": "bad",
        "disabled": "good",
        "enabled": "bad",
        "restored": "good",
    }
    (function,) = ok(proxied.console, "stats").of_kind("function")
    assert (function.number("raised"), function.number("served"), function.number("lost")) == (55, 52, 3)


def test_interrupts_while_intx_is_disabled_are_reported(proxied: QemuGuest) -> None:
    """QEMU's proxy leaves the line up until one EOI, and its remote process then counts levels wrong."""
    ok(proxied.console, "setup")
    reply = proxied.console.command("intx 05.0")
    assert reply.reason == "a step had the wrong interrupts"
    disabled, enabled = reply.of_kind("step")
    assert (disabled.number("entries"), disabled.number("served")) == (1, 0)
    assert enabled.number("entries") > 1


def test_an_exception_is_reported(requires_kvm: None, requires_qemu: None) -> None:
    with QemuGuest([]) as machine:
        ok(machine.console, f"write 16 {guest_symbol('command_version')} 0x0b0f")  # ud2
        with pytest.raises(ProtocolError, match=r"panic vector=6 "):
            machine.console.command("version")
