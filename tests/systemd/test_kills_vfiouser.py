# SPDX-License-Identifier: GPL-2.0-or-later
"""SIGKILL of remoted while a guest works over vfio-user: QEMU's link, interrupts and RAM go on in the next one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from random import Random

import pytest

from tests.support.hammer import ROUNDS, Interrupts, check_counts, hammering, kill_at_random
from tests.support.hostbench import PROXYD, QEMU_UNIT, REMOTED, HostBench
from tests.support.qemu import newer_qemu
from tests.support.wait import wait_until

KILLS = int(os.environ.get("IOHUB_KILLS", "10"))


@pytest.fixture(scope="module")
def host(installed: Path, requires_systemd: None, requires_kvm: None) -> Iterator[HostBench]:
    """A host whose VM runs in a QEMU with vfio-user-pci."""
    qemu = newer_qemu()
    if qemu is None:
        pytest.skip("no QEMU with vfio-user-pci: make qemu brings it")
    with closing(HostBench(installed)) as bench:
        bench.require(qemu)
        # As root, since a checkout may be where nobody else can look.
        service = (bench.root / f"etc/systemd/system/{QEMU_UNIT.replace('vm1', '')}").read_text()
        command = service[service.index("ExecStart=") : service.index("KillMode=")]
        bench.drop_in(
            QEMU_UNIT,
            f"[Service]\nUser=root\nExecStart=\n{command.replace('/usr/bin/qemu-system-x86_64', qemu)}",
        )
        config = bench.root / "etc/iohub/vm1.toml"
        config.write_text(config.read_text().replace("addr =", 'transport = "vfio-user"\naddr ='))
        bench.start()
        yield bench


@pytest.mark.parametrize(
    ("units", "kills"),
    [((REMOTED,), KILLS), ((REMOTED, PROXYD), KILLS // 4 or 1)],
    ids=["remoted", "both"],
)
def test_kills_while_the_guest_runs(host: HostBench, units: tuple[str, ...], kills: int) -> None:
    host.command("setup")
    said = host.journal("-u", QEMU_UNIT)
    qemu = host.wait_for_process(QEMU_UNIT)
    with hammering(Interrupts(host)):
        kill_at_random(host, units, kills, Random(kills))
    sums = check_counts(host, spurious=kills)
    assert host.wait_for_process(QEMU_UNIT) == qemu
    assert host.journal("-u", QEMU_UNIT) == said
    print(
        f"\n{kills} kills of {' and '.join(units)}, {sums['served']} interrupts, {sums['spurious']} spurious"
    )


def test_kills_while_the_guest_probes(host: HostBench) -> None:
    found = host.command("setup").records

    def probe() -> None:
        assert host.command("setup").records == found

    with hammering(probe) as hammer:
        kill_at_random(host, (REMOTED,), max(KILLS // 4, 4), Random(KILLS))
    assert hammer.rounds
    host.command(f"run {ROUNDS} held 4")
    check_counts(host, spurious=1)


def test_a_guest_that_is_reset_after_a_kill_goes_on(host: HostBench) -> None:
    """QEMU would abort if its server had gone for good."""
    qemu = host.wait_for_process(QEMU_UNIT)
    for _ in range(2):
        pid = host.kill(REMOTED)
        host.wait_for_process(REMOTED, pid)
        host.reboot()
        wait_until(lambda: host.linked() == {"edu0", "com1"}, "all functions are served")
        host.command("setup")
        host.command(f"run {ROUNDS} held 4")
        check_counts(host, spurious=1)
    assert host.wait_for_process(QEMU_UNIT) == qemu
