# SPDX-License-Identifier: GPL-2.0-or-later
"""What ``iohubctl status`` makes of the daemons' answers."""

from __future__ import annotations

from typing import Any

import pytest

from common.ctl.statustable import find_amiss, render
from tests.support.statusrows import details_of, rows_of, unwrapped

NO_IRQFD: dict[str, object] = {"has_irqfd": False, "interrupts": None, "vectors": 0}
VFIO_USER: dict[str, object] = {"transport": "vfio-user", "has_irqfd": False}


def remote_function(**fields: object) -> dict[str, object]:
    return {
        "id": "com1",
        "addr": "05.0",
        "model": "pci-serial",
        "level": False,
        "asserted": False,
        "raised": 1,
        "resamples": 2,
        "reasserts": 3,
        "rejected": 4,
        "refused": 5,
        "has_irqfd": True,
        "transport": "mpqemu",
        "interrupts": "INTx",
        "vectors": 1,
        "messages": 0,
        "link": "connected",
        "client_pid": 42,
        "client_name": "qemu",
        "client_gone": False,
        "accesses": 7,
        "quiet_seconds": 8,
        "errors": 0,
        "counters": {},
        "amiss": [],
        **fields,
    }


def proxy_function(**fields: object) -> dict[str, object]:
    return {
        "id": "com1",
        "addr": "05.0",
        "pin": 2,
        "gsi": 11,
        "connected": True,
        "reconnects": 6,
        "remote_pid": 43,
        "remote_name": "iohub-remoted",
        "reason": None,
        "decoded": True,
        "answer_mean_us": None,
        "answer_max_us": None,
        "polled_ms": None,
        "amiss": [],
        **fields,
    }


def answers_of(
    remote: dict[str, object] | None, proxy: dict[str, object] | None, **proxyd: object
) -> dict[str, Any]:
    """What the daemons would answer, each with one function or none."""
    return {
        "remoted": {
            "vm": "vm1",
            "pid": 1,
            "polling": {"window_us": 0, "found": 0, "missed": 0, "spent_ms": 0},
            "amiss": [],
            "functions": [remote] if remote else [],
        },
        "proxyd": {
            "vm": "vm1",
            "pid": 2,
            "kind": "qmp:x",
            "irqchip": "kvm",
            "attached": "qemu[42]",
            "reason": None,
            "tsc_khz": None,
            "amiss": [],
            "functions": [proxy] if proxy else [],
            **proxyd,
        },
    }


def table_of(remote: dict[str, object] | None, proxy: dict[str, object] | None, **proxyd: object) -> str:
    answers = answers_of(remote, proxy, **proxyd)
    return render("vm1", answers, {}, find_amiss(answers, {}))


def test_a_healthy_function_has_no_remarks() -> None:
    assert find_amiss(answers_of(remote_function(), proxy_function()), {}) == []
    table = table_of(remote_function(), proxy_function())
    (row,) = rows_of(table)
    numbers = ("RAISED", "RESAMPLES", "RE-ASSERTS", "ACCESSES", "QUIET")
    assert [row[name] for name in numbers] == ["1", "2", "3", "7", "8s"]
    assert (row["ID"], row["PIN"], row["GSI"]) == ("com1", "INTB", "11")
    assert details_of(table) == [
        "pci-serial",
        "irqfd set",
        "client qemu[42]",
        "link iohub-remoted[43]",
        "6 reconnects",
        "4 rejected",
        "5 refused",
    ]
    assert "  proxyd runs as pid 2, VM qmp:x, irqchip kvm, attached to qemu[42]\n" in table
    assert table.endswith("5 refused\n")


def test_messages_count_as_raised() -> None:
    remote = remote_function(**VFIO_USER, interrupts="MSI-X", messages=8)
    (row,) = rows_of(table_of(remote, proxy_function()))
    assert row["RAISED"] == "9"


def test_polling_is_told_with_its_cost() -> None:
    answers = answers_of(remote_function(), proxy_function())
    assert "  remoted runs as pid 1\n" in render("vm1", answers, {}, [])
    answers["remoted"]["polling"] = {"window_us": 50, "found": 9, "missed": 1, "spent_ms": 1200}
    assert "  remoted runs as pid 1, has polled for 1200 ms\n" in render("vm1", answers, {}, [])


@pytest.mark.parametrize(
    ("remote", "line"),
    [({"level": True}, "masked"), ({"level": True, "asserted": True}, "high"), ({}, "low")],
)
def test_lines(remote: dict[str, object], line: str) -> None:
    (row,) = rows_of(table_of(remote_function(**remote), proxy_function()))
    assert row["LINE"] == line


@pytest.mark.parametrize(
    ("remote", "proxy", "detail"),
    [
        ({"link": "closed", "client_pid": None, **NO_IRQFD}, {}, "client closed"),
        (NO_IRQFD, {}, "irqfd none"),
        ({**VFIO_USER, **NO_IRQFD}, {}, "no eventfd"),
        ({**VFIO_USER, "has_irqfd": True}, {}, "INTx"),
        ({**VFIO_USER, "interrupts": "MSI", "vectors": 1}, {}, "MSI with 1 vector"),
        ({**VFIO_USER, "interrupts": "MSI-X", "vectors": 5}, {}, "MSI-X with 5 vectors"),
        ({"client_name": None}, {}, "client pid 42"),
        ({"client_gone": True}, {}, "client pid 42 (has ended"),
        ({"errors": 3}, {}, "3 errors"),
        ({"counters": {"dropped_output": 9}}, {}, "9 dropped_output"),
        ({}, {"connected": False}, "link down"),
        ({}, {"decoded": False}, "BARs not decoded"),
        ({}, {"answer_mean_us": 80, "answer_max_us": 12_345}, "answers in 80 us on average (max 12.3 ms)"),
    ],
)
def test_details(remote: dict[str, object], proxy: dict[str, object], detail: str) -> None:
    assert detail in details_of(table_of(remote_function(**remote), proxy_function(**proxy)))


def test_counters_that_are_0_are_left_out() -> None:
    quiet = remote_function(rejected=0, refused=0, counters={"dropped_input": 0})
    assert len(details_of(table_of(quiet, proxy_function(reconnects=0)))) == 4


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (119, "119s"), (120, "2m"), (7200, "2h"), (86400 * 3, "3d"), (10**17, "1.16e12d")],
)
def test_durations_are_short(seconds: int, text: str) -> None:
    (row,) = rows_of(table_of(remote_function(quiet_seconds=seconds), proxy_function()))
    assert row["QUIET"] == text


def test_the_widest_values_fit_into_80_columns() -> None:
    most = (1 << 64) - 1
    counts = (
        "raised",
        "resamples",
        "reasserts",
        "accesses",
        "rejected",
        "refused",
        "errors",
        "quiet_seconds",
    )
    remote = remote_function(
        **dict.fromkeys(counts, most),
        id="x" * 32,
        model="remoted.devices.pci_serial:PciSerial " * 5,
        amiss=["a sentence of a dozen words " * 9],
        level=True,
    )
    proxy = proxy_function(id="x" * 32, gsi=255, reconnects=most, amiss=["one more " * 20])
    lines = table_of(remote, proxy, kind="qmp:/run/a/directory/with/a/long/name/qmp.sock").splitlines()
    assert max(map(len, lines)) <= 80
    assert "-" not in rows_of("\n".join(lines))[0].values()


DOWN = proxy_function(connected=False, gsi=None, reason="no link: x.sock: Connection refused")
REMARKS = {
    "waiting": (remote_function(link="waiting"), proxy_function(), "no client is connected to its socket"),
    "closed": (
        remote_function(link="closed"),
        proxy_function(),
        "the connection that it inherited has ended",
    ),
    "no irqfd": (
        remote_function(**NO_IRQFD),
        proxy_function(),
        "the client has sent no irqfd: interrupts don't arrive",
    ),
    "no eventfd": (
        remote_function(**VFIO_USER, interrupts=None),
        proxy_function(),
        "the client has sent no eventfd: interrupts don't arrive",
    ),
    "no link": (remote_function(), DOWN, "no link: x.sock: Connection refused"),
    "no link at either end": (remote_function(link="waiting"), DOWN, "no link: x.sock: Connection refused"),
    "no route": (
        remote_function(),
        proxy_function(gsi=None),
        "the guest has not routed its pin to an IRQ: interrupts don't arrive",
    ),
    "only remoted": (remote_function(), None, "proxyd has no such function"),
    "only proxyd": (None, proxy_function(), "remoted has no such function"),
}


@pytest.mark.parametrize(("remote", "proxy", "remark"), REMARKS.values(), ids=REMARKS)
def test_what_is_amiss_is_said_below_the_table_once(
    remote: dict[str, object] | None, proxy: dict[str, object] | None, remark: str
) -> None:
    line = f"05.0 com1: {remark}"
    assert find_amiss(answers_of(remote, proxy), {}) == [line]
    above, _, below = table_of(remote, proxy).rpartition("\n\n")
    assert above
    assert unwrapped(below) == f"{line}\n"


def test_what_the_daemons_modules_say_is_amiss_is_said_after_what_the_table_shows() -> None:
    answers = answers_of(
        remote_function(amiss=["9 bytes dropped", "reset() failed"], link="waiting"),
        proxy_function(amiss=["slow"]),
        amiss=["the guest is paused"],
    )
    answers["remoted"]["amiss"] = ["something"]
    assert find_amiss(answers, {}) == [
        "remoted: something",
        "proxyd: the guest is paused",
        "05.0 com1: no client is connected to its socket",
        "05.0 com1: 9 bytes dropped",
        "05.0 com1: reset() failed",
        "05.0 com1: slow",
    ]


def test_a_vm_without_a_qemu_is_amiss() -> None:
    table = table_of(None, None, attached=None, reason="no QEMU (x: Connection refused): waiting for one")
    assert "  proxyd runs as pid 2, VM qmp:x, not attached\n" in table
    assert table.endswith("\n\nproxyd: no QEMU (x: Connection refused): waiting for one\n")


def test_a_function_without_a_pin_needs_no_route_and_no_irqfd() -> None:
    table = table_of(remote_function(**NO_IRQFD), proxy_function(pin=0, gsi=None))
    (row,) = rows_of(table)
    assert (row["PIN"], row["GSI"]) == ("-", "-")
    assert table.endswith("5 refused\n")


def test_a_pin_that_is_not_known_needs_no_route_but_an_irqfd() -> None:
    proxy = proxy_function(gsi=None, pin=None)
    (row,) = rows_of(table_of(remote_function(), proxy))
    assert (row["PIN"], row["GSI"]) == ("-", "-")
    assert find_amiss(answers_of(remote_function(), proxy), {}) == []
    assert len(find_amiss(answers_of(remote_function(**NO_IRQFD), proxy), {})) == 1


def test_a_function_at_two_addresses_is_shown_once_and_told() -> None:
    table = table_of(remote_function(), proxy_function(addr="07.0"))
    (row,) = rows_of(table)
    assert (row["ADDR"], row["RAISED"], row["GSI"]) == ("05.0/07.0", "1", "11")
    assert table.endswith("\n\ncom1: at 05.0 in remoted, at 07.0 in proxyd: give both the same addr=\n")


def test_beside_a_process_proxyds_address_means_nothing() -> None:
    proxy = proxy_function(addr="02.0")
    assert find_amiss(answers_of(remote_function(), proxy, kind="pid:42"), {}) == []
    (row,) = rows_of(table_of(remote_function(), proxy, kind="pid:42"))
    assert row["ADDR"] == "05.0"


def test_a_vm_without_functions() -> None:
    assert table_of(None, None).endswith("\nno functions\n")
