# SPDX-License-Identifier: GPL-2.0-or-later
"""What ``iohubctl status`` makes of the daemons' answers."""

from __future__ import annotations

from typing import Any

import pytest

from common.ctl.statustable import find_amiss, render
from tests.support.statusrows import rows_of


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
        "link": "connected",
        "client_pid": 42,
        "client_name": "qemu",
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
        "amiss": [],
        **fields,
    }


def answers_of(
    remote: dict[str, object] | None, proxy: dict[str, object] | None, **proxyd: object
) -> dict[str, Any]:
    """What the daemons would answer, each with one function or none."""
    return {
        "remoted": {"vm": "vm1", "pid": 1, "amiss": [], "functions": [remote] if remote else []},
        "proxyd": {
            "vm": "vm1",
            "pid": 2,
            "kind": "qmp:x",
            "irqchip": "kvm",
            "attached": "qemu[42]",
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
    numbers = ("RAISED", "RESAMPLES", "RE-ASSERTS", "REJECTED", "REFUSED", "RECONNECTS")
    assert [row[name] for name in numbers] == ["1", "2", "3", "4", "5", "6"]
    assert (row["PIN"], row["GSI"]) == ("INTB", "11")
    assert (row["CLIENT"], row["LINK"]) == ("qemu[42]", "iohub-remoted[43]")
    assert "  proxyd runs as pid 2, VM qmp:x, irqchip kvm, attached to qemu[42]\n" in table
    assert table.endswith("6\n")


@pytest.mark.parametrize(
    ("remote", "column", "cell"),
    [
        ({"level": True}, "LINE", "masked"),
        ({"level": True, "asserted": True}, "LINE", "high"),
        ({"link": "closed", "client_pid": None, "has_irqfd": False}, "CLIENT", "closed"),
        ({"has_irqfd": False}, "IRQFD", "none"),
    ],
)
def test_cells_of_remoted(remote: dict[str, object], column: str, cell: str) -> None:
    (row,) = rows_of(table_of(remote_function(**remote), proxy_function()))
    assert row[column] == cell


DOWN = proxy_function(connected=False, gsi=None, reason="no link: x.sock: Connection refused")
REMARKS = {
    "waiting": (remote_function(link="waiting"), proxy_function(), "no client is connected to its socket"),
    "closed": (
        remote_function(link="closed"),
        proxy_function(),
        "the connection that it inherited has ended",
    ),
    "no irqfd": (
        remote_function(has_irqfd=False),
        proxy_function(),
        "the client has sent no irqfd: interrupts don't arrive",
    ),
    "no link": (remote_function(), DOWN, "no link: x.sock: Connection refused"),
    "no link at either end": (remote_function(link="waiting"), DOWN, "no link: x.sock: Connection refused"),
    "no route": (
        remote_function(),
        proxy_function(gsi=None),
        "the guest has its pin routed nowhere: interrupts don't arrive",
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
    *_, row, blank, last = table_of(remote, proxy).splitlines()
    assert row.startswith("05.0  com1  ")
    assert (blank, last) == ("", line)


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
    table = table_of(remote_function(has_irqfd=False), proxy_function(pin=0, gsi=None))
    (row,) = rows_of(table)
    assert (row["PIN"], row["GSI"]) == ("-", "-")
    assert table.endswith("6\n")


def test_a_pin_that_is_not_known_needs_no_route_but_an_irqfd() -> None:
    proxy = proxy_function(gsi=None)
    del proxy["pin"]
    (row,) = rows_of(table_of(remote_function(), proxy))
    assert (row["PIN"], row["GSI"]) == ("-", "-")
    assert find_amiss(answers_of(remote_function(), proxy), {}) == []
    assert len(find_amiss(answers_of(remote_function(has_irqfd=False), proxy), {})) == 1


def test_a_function_at_two_addresses_is_shown_once_and_told() -> None:
    table = table_of(remote_function(), proxy_function(addr="07.0"))
    (row,) = rows_of(table)
    assert (row["ADDR"], row["RAISED"], row["RECONNECTS"]) == ("05.0/07.0", "1", "6")
    assert table.endswith("\n\ncom1: at 05.0 in remoted, at 07.0 in proxyd: give both the same addr=\n")


def test_beside_a_process_proxyds_address_means_nothing() -> None:
    proxy = proxy_function(addr="02.0")
    assert find_amiss(answers_of(remote_function(), proxy, kind="pid:42"), {}) == []
    (row,) = rows_of(table_of(remote_function(), proxy, kind="pid:42"))
    assert row["ADDR"] == "05.0"


def test_a_vm_without_functions() -> None:
    assert table_of(None, None).endswith("\nno functions\n")


def test_a_client_that_has_gone_is_told_by_its_pid() -> None:
    assert "  pid 42  " in table_of(remote_function(client_name=None, client_gone=False), proxy_function())
    assert "  pid 42 (gone, its link lives on)  " in table_of(
        remote_function(client_gone=True), proxy_function()
    )
