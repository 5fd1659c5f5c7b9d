# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest on QEMU's vfio-user-pci: the line's level is right on KVM's irqfds, and without KVM as well."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from common.ctl.guestconsole import Reply
from tests.support.consolevfiouser import ConsoleGuest, check_interrupts
from tests.support.qemu import PATIENCE
from tests.support.vfiouserprocess import VfioUserServer

SERIAL, EDU = "05.0", "06.0"
ACCELERATORS = ["kvm", "tcg"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VfioUserServer]:
    server = VfioUserServer(tmp_path_factory.mktemp("levels"), {"com1": "pci-serial", "edu0": "edu"})
    yield server
    server.close()


@pytest.fixture(scope="module", params=ACCELERATORS)
def running(
    request: pytest.FixtureRequest,
    server: VfioUserServer,
    vfio_user_qemu: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ConsoleGuest]:
    """Both functions in one machine."""
    if request.param == "kvm":
        request.getfixturevalue("requires_kvm")
    directory = tmp_path_factory.mktemp("qemu")
    with ConsoleGuest(directory, server, vfio_user_qemu, request.param) as guest:
        yield guest
    server.await_nothing_left()


@pytest.fixture
def guest(running: ConsoleGuest) -> ConsoleGuest:
    """The guest after a fresh setup: all counters are zero."""
    running.ok("setup")
    return running


def test_2000_interrupts_of_each_function(guest: ConsoleGuest) -> None:
    check_interrupts(guest, 2000)


def test_lines_that_stay_high_at_eoi_come_again(guest: ConsoleGuest) -> None:
    check_interrupts(guest, 200, held=50)


def steps(reply: Reply) -> dict[str, tuple[int, int, int]]:
    """Interrupts of each step: where they must be and elsewhere, and services."""
    return {
        step.text("name"): (step.number("entries"), step.number("elsewhere"), step.number("served"))
        for step in reply.of_kind("step")
    }


@pytest.mark.parametrize("addr", [SERIAL, EDU])
def test_reroute_of_an_asserted_line(guest: ConsoleGuest, addr: str) -> None:
    found = steps(guest.console.command(f"reroute {addr}", timeout=60.0))
    assert {name: (elsewhere, served) for name, (_, elsewhere, served) in found.items()} == {
        "before_inta": (0, 1),
        "on_new_irq": (0, 1),
        "before_eoi": (1, 1),
        "disabled": (0, 0),
        "enabled": (0, 1),
        "restored": (0, 1),
    }
    if guest.accelerator == "kvm":
        assert all(entries == served for entries, _, served in found.values())
    assert guest.functions()[addr].number("lost") == 0
    check_interrupts(guest, 20, held=5)


@pytest.mark.parametrize("addr", [SERIAL, EDU])
def test_intx_disable_while_high(guest: ConsoleGuest, addr: str) -> None:
    found = steps(guest.console.command(f"intx {addr}", timeout=60.0))
    assert found["disabled"][2] == 0
    assert found["enabled"][2] == 1
    check_interrupts(guest, 20, held=5)


def test_reset_of_the_machine_with_lines_high(guest: ConsoleGuest, server: VfioUserServer) -> None:
    for held in ([SERIAL], [EDU], [SERIAL, EDU]):
        for addr in held:
            assert guest.ok(f"hold {addr}").result.number("status") == 1
        guest.monitor.execute("system_reset")
        guest.console.wait_ready(PATIENCE)
        assert not any(server.status(name)["level"] for name in server.addresses)
        check_interrupts(guest, 20, held=5)


def test_stop_and_cont_with_a_line_high(guest: ConsoleGuest) -> None:
    for addr in (SERIAL, EDU):
        guest.ok("setup")
        guest.ok(f"hold {addr}")
        for _ in range(3):
            guest.monitor.execute("stop")
            guest.monitor.execute("cont")
        (step,) = guest.console.command(f"release {addr}", timeout=60.0).of_kind("step")
        assert step.number("served") == 1
        assert guest.accelerator == "tcg" or step.number("entries") == 1
        check_interrupts(guest, 20, held=5)
