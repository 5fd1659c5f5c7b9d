# SPDX-License-Identifier: GPL-2.0-or-later
"""How the units of a VM depend on each other: each event, and what runs afterwards.

The VM's own unit wants the daemons and knows nothing else of them; they are part of it (PartOf=), and stop when
nothing needs them (StopWhenUnneeded=).
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence

import pytest

from tests.support.hostbench import PROXYD, QEMU_UNIT, REMOTED, HostBench
from tests.support.wait import wait_until

UNITS = (QEMU_UNIT, REMOTED, PROXYD)
DAEMONS = (REMOTED, PROXYD)
SAME, NEW, GONE = "the same process", "a new process", "no process"

Event = Callable[[HostBench], object]


def systemctl(*arguments: str) -> Event:
    return lambda host: host.system.systemctl(*arguments)


def kill(unit: str, signum: signal.Signals = signal.SIGKILL) -> Event:
    return lambda host: host.kill(unit, signum)


def kill_both(host: HostBench) -> None:
    for unit in DAEMONS:
        host.kill(unit)


def power_off(host: HostBench) -> None:
    """What ACPI's \\_S5 does on a PIIX4: gives its power management registers a place, and writes SLP_EN there."""
    host.command("config write 32 01.3 0x40 0x601")
    host.command("config write 8 01.3 0x80 1")
    host.send("out 16 0x604 0x2000")


EVENTS: dict[str, tuple[Event, Sequence[str]]] = {
    # of a daemon: the VM runs on
    "kill remoted": (kill(REMOTED), (SAME, NEW, SAME)),
    "kill proxyd": (kill(PROXYD), (SAME, SAME, NEW)),
    "kill both": (kill_both, (SAME, NEW, NEW)),
    "crash of remoted": (kill(REMOTED, signal.SIGSEGV), (SAME, NEW, SAME)),
    "crash of proxyd": (kill(PROXYD, signal.SIGSEGV), (SAME, SAME, NEW)),
    "clean exit of remoted": (kill(REMOTED, signal.SIGTERM), (SAME, NEW, SAME)),
    "clean exit of proxyd": (kill(PROXYD, signal.SIGTERM), (SAME, SAME, NEW)),
    "restart of remoted": (systemctl("restart", REMOTED), (SAME, NEW, SAME)),
    "restart of proxyd": (systemctl("restart", PROXYD), (SAME, SAME, NEW)),
    "restart of both": (systemctl("restart", *DAEMONS), (SAME, NEW, NEW)),
    "stop of remoted": (systemctl("stop", REMOTED), (SAME, GONE, SAME)),
    "stop of proxyd": (systemctl("stop", PROXYD), (SAME, SAME, GONE)),
    "stop of both": (systemctl("stop", *DAEMONS), (SAME, GONE, GONE)),
    "reload of both": (systemctl("reload", *DAEMONS), (SAME, SAME, SAME)),
    "daemon-reload": (systemctl("daemon-reload"), (SAME, SAME, SAME)),
    "daemon-reexec": (systemctl("daemon-reexec"), (SAME, SAME, SAME)),
    # of the VM: the daemons go with it
    "stop of the VM": (systemctl("stop", QEMU_UNIT), (GONE, GONE, GONE)),
    "kill of the VM": (kill(QEMU_UNIT), (GONE, GONE, GONE)),
    "crash of the VM": (kill(QEMU_UNIT, signal.SIGSEGV), (GONE, GONE, GONE)),
    "power off by the guest": (power_off, (GONE, GONE, GONE)),
    "restart of the VM": (systemctl("restart", QEMU_UNIT), (NEW, NEW, NEW)),
}


def pid_of(host: HostBench, unit: str) -> int:
    return int(host.system.show(unit, "MainPID"))


def run_and_check(host: HostBench) -> None:
    """The guest is served: a run, and all of it."""
    host.command("setup")
    host.command("run 20")
    for record in host.command("stats").of_kind("function"):
        assert [record.number(key) for key in ("raised", "served", "lost", "redone")] == [20, 20, 0, 0]


@pytest.mark.parametrize("name", EVENTS)
def test_who_runs_after_it(host: HostBench, name: str) -> None:
    event, expected = EVENTS[name]
    run_and_check(host)
    before = {unit: pid_of(host, unit) for unit in UNITS}
    restarts = host.system.show(QEMU_UNIT, "NRestarts")
    event(host)

    def is_settled() -> bool:
        for unit, fate in zip(UNITS, expected, strict=True):
            pid, state = pid_of(host, unit), host.system.show(unit, "ActiveState")
            if fate == GONE:
                if pid or state not in ("inactive", "failed"):
                    return False
            elif state != "active" or (pid == before[unit]) is not (fate == SAME):
                return False
        return True

    wait_until(is_settled, f"{dict(zip(UNITS, expected, strict=True))}")
    assert host.system.show(QEMU_UNIT, "NRestarts") == restarts
    if name == "restart of the VM":
        host.attach()
    if GONE not in expected:
        run_and_check(host)
    elif expected[0] == SAME:
        host.command("lspci")
        host.system.systemctl("start", *DAEMONS)
        for unit in DAEMONS:
            assert host.system.show(unit, "ActiveState") == "active"
    else:
        for unit in DAEMONS:
            assert host.system.show(unit, "ActiveState") == "inactive", (
                "the end of the VM is no failure of theirs"
            )
    assert "Traceback" not in host.journal("-u", REMOTED, "-u", PROXYD)


def test_the_vm_starts_after_the_daemons_and_stops_before_them(host: HostBench) -> None:
    def when(name: str) -> list[int]:
        return [int(host.system.show(unit, name)) for unit in (REMOTED, PROXYD, QEMU_UNIT)]

    started = when("ActiveEnterTimestampMonotonic")
    assert started == sorted(started)
    host.system.systemctl("stop", QEMU_UNIT)
    for unit in DAEMONS:
        host.wait_state(unit, "inactive")
    stopped = when("InactiveEnterTimestampMonotonic")
    assert stopped == sorted(stopped, reverse=True)


@pytest.mark.parametrize("unit", DAEMONS)
def test_a_daemon_without_its_vm_ends_at_once(stopped_host: HostBench, unit: str) -> None:
    stopped_host.system.systemctl("start", unit)
    stopped_host.wait_state(unit, "inactive")
    assert stopped_host.system.show(QEMU_UNIT, "ActiveState") == "inactive"


@pytest.mark.parametrize("unit", DAEMONS)
def test_a_masked_daemon_keeps_no_vm_from_starting(stopped_host: HostBench, unit: str) -> None:
    host = stopped_host
    host.system.systemctl("mask", "--runtime", unit)
    try:
        host.system.systemctl("start", QEMU_UNIT)
        assert [host.system.show(each, "ActiveState") for each in (QEMU_UNIT, *DAEMONS)] == [
            "inactive" if each == unit else "active" for each in (QEMU_UNIT, *DAEMONS)
        ]
    finally:
        host.system.systemctl("unmask", "--runtime", unit)


def test_a_daemon_that_can_not_start_keeps_no_vm_from_starting(stopped_host: HostBench) -> None:
    host = stopped_host
    (host.root / "etc/iohub/vm1.toml").write_text("name = 1\n")
    host.system.systemctl("start", QEMU_UNIT)
    for unit in DAEMONS:
        host.wait_state(unit, "failed")
        assert host.system.show(unit, "NRestarts") == "0"
    assert host.system.show(QEMU_UNIT, "ActiveState") == "active"


def test_a_vm_without_a_configuration_runs_without_daemons(stopped_host: HostBench) -> None:
    host = stopped_host
    (host.root / "etc/iohub/vm1.toml").unlink()
    host.system.systemctl("start", QEMU_UNIT)
    assert [host.system.show(unit, "ActiveState") for unit in UNITS] == ["active", "inactive", "inactive"]


def test_the_end_of_one_vm_leaves_the_daemons_of_another_alone(host: HostBench) -> None:
    """Nor does a start or an end of the other's daemons."""
    other = tuple(unit.replace("vm1", "vm2") for unit in UNITS)
    (host.root / "etc/iohub/vm2.toml").write_text(
        (host.root / "etc/iohub/vm1.toml").read_text().replace("vm1", "vm2")
    )
    (host.root / "etc/qemu/vm2.conf").write_text("MEMORY=64M\n")
    host.system.systemctl("enable", *other[1:])
    host.system.systemctl("start", other[0])
    for unit in other:
        host.wait_state(unit, "active")
    pids = {unit: pid_of(host, unit) for unit in UNITS}
    host.system.systemctl("kill", "--signal=KILL", other[1])
    wait_until(lambda: host.system.show(other[1], "NRestarts") == "1", "it is started again")
    host.wait_state(other[1], "active")
    host.system.systemctl("stop", other[0])
    for unit in other[1:]:
        host.wait_state(unit, "inactive")
    assert {unit: pid_of(host, unit) for unit in UNITS} == pids
    run_and_check(host)
