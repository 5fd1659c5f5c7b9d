# SPDX-License-Identifier: GPL-2.0-or-later
"""The devices of a daemon that follows another one: in which order they are taken up."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.config import DeviceConfig, VmConfig
from common.fdstore import FdStore
from common.journal import RateLimited
from common.link import Client
from common.loop import Loop
from common.mpqemu import CONFIG, Command
from common.pci import parse_devfn
from remoted.roster import Roster
from remoted.watchdog import Watchdog
from tests.support.loops import running
from tests.support.storemanager import StoreManager

NAMES = {"line0": "05.0", "line1": "06.0", "line2": "07.0"}
PROGRAM = "tests.roster"


def config_in(directory: Path) -> VmConfig:
    devices = (
        DeviceConfig(name, "irq-line", parse_devfn(addr), None, None, None, {})
        for name, addr in NAMES.items()
    )
    return VmConfig("vm1", str(directory), "embedded", tuple(devices))


@contextmanager
def roster_in(directory: Path, manager: StoreManager) -> Iterator[Loop]:
    """The devices of one process, which has what the one before left; its links are kept for the next one."""
    loop = Loop()
    log = logging.getLogger(PROGRAM)
    store = FdStore(loop, RateLimited(log), manager.address, manager.hand_over())
    roster = Roster(PROGRAM, loop, Watchdog(), lambda: None)
    try:
        roster.start(config_in(directory), store)
        yield loop
    finally:
        for server in roster.servers:
            server.hang_up()
        roster.close()
        store.close()
        manager.serve()
        loop.close()


def test_all_links_are_taken_up_before_the_first_device_listens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, PROGRAM)
    manager = StoreManager(tmp_path)
    with roster_in(tmp_path, manager) as loop:
        clients = [Client.connect(str(tmp_path / f"{name}.sock"), 10) for name in NAMES]
        with running(loop):
            for client in clients:
                client.request(Command.PCI_CFGREAD, CONFIG.pack(0, 0, 4))
        manager.serve()
    caplog.clear()
    with roster_in(tmp_path, manager):
        lines = [record.getMessage() for record in caplog.records]
    taken_up = [number for number, line in enumerate(lines) if line.startswith("continues the link")]
    listening = [number for number, line in enumerate(lines) if line.startswith("listening on")]
    assert len(taken_up) == len(listening) == len(NAMES), lines
    assert max(taken_up) < min(listening), lines
    for client in clients:
        client.close()
    manager.close()
