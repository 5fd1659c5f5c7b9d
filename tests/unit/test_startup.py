# SPDX-License-Identifier: GPL-2.0-or-later
"""What a daemon doesn't load at its start, as it costs time and memory and most never need it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import mpqemu
from common.control import call
from common.ctl.children import Child
from common.link import Client
from common.mpqemu import Command
from remoted.models import BUILT_IN
from tests.support.checkout import ROOT
from tests.support.wait import wait_until

UNWANTED = (
    *("asyncio", "asyncvarlink", "json", "shutil", "ssl", "subprocess", "tempfile"),
    *("dataclasses", "difflib", "hashlib", "importlib.metadata", "inspect", "pathlib", "tomllib"),
    *("datetime", "common.vfiouser", "remoted.keeper", "remoted.modellist"),
    *("common.chardev.file", "common.chardev.pty", "common.chardev.unix"),
)
DEVICE = f"""
import gc
import sys
from remoted.device import PciFunction

class Probe(PciFunction):
    VENDOR_ID, DEVICE_ID, CLASS_CODE = 0x1234, 0x0001, 0xFF0000

    def config_read(self, addr, size):
        if addr == 0x44:
            is_uncollected = gc.get_stats()[2]["collections"] == 0
            return gc.isenabled() | (gc.get_freeze_count() > 1000) << 1 | is_uncollected << 2
        loaded = [name in sys.modules for name in {UNWANTED}]
        return sum(is_loaded << bit for bit, is_loaded in enumerate(loaded))
"""


def test_the_modules_of_daemon_and_models_need_neither_libraries_nor_what_is_slow_to_load() -> None:
    """Not even where Python itself has loaded none of it: -S leaves out what an installation adds."""
    models = [target.partition(":")[0] for target in BUILT_IN.values()]
    code = f"import sys, remoted.main, {', '.join(models)}; print(*sys.modules)"
    command = [sys.executable, "-S", "-c", code]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert set(loaded) & set(UNWANTED) <= {"hashlib"}  # of nvme


PATTERNS = """
import re
import sys

def note(pattern, flags=0):
    places.append(sys._getframe(1).f_globals["__name__"])
    return compile(pattern, flags)

places, compile, re.compile = [], re.compile, note
import {modules}
print(*places)
"""


@pytest.mark.parametrize(
    "modules",
    [
        "remoted.main, remoted.devices.pci_serial, remoted.devices.nvme.controller",
        "proxyd.main, proxyd.vm.qmp.plugger, proxyd.vm.pid.attached",
    ],
)
def test_no_module_of_a_daemon_compiles_a_regular_expression_that_may_never_be_used(modules: str) -> None:
    command = [sys.executable, "-c", PATTERNS.format(modules=modules)]
    places = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert "logging" in places, "it notices those of the library"
    assert not [place for place in places if place.partition(".")[0] in ("common", "proxyd", "remoted")]


def loaded_by_proxyd(way: str) -> set[str]:
    code = f"import sys, proxyd.main, proxyd.vm.{way}; print(*sys.modules)"
    command = [sys.executable, "-S", "-c", code]
    return {*subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()}


@pytest.mark.parametrize("way", ["embedded.embedded", "pid.attached", "soft.soft"])
def test_proxyd_loads_neither_asyncio_nor_what_answers_calls_unless_it_has_a_monitor(way: str) -> None:
    unwanted = {"asyncio", "asyncvarlink", "json", "pyroute2", "shutil", "ssl", "subprocess"}
    assert not loaded_by_proxyd(way) & unwanted


@pytest.mark.parametrize("way", ["embedded.embedded", "pid.attached"])
def test_proxyd_does_not_load_dataclasses_with_all_that_takes_code_apart(way: str) -> None:
    assert not loaded_by_proxyd(way) & {"ast", "dataclasses", "dis", "inspect"}


EVENTS = """
import sys
from proxyd.vm.qmp import plugger, uevents
for message in sys.argv[1:]:
    event = uevents.parse(message.replace(" ", "\\0").encode())
    print(event and event.kind, "pyroute2" in sys.modules)
"""


def test_proxyd_loads_pyroute2_with_the_first_of_kvms_events() -> None:
    kvm = "change@/devices/virtual/misc/kvm DEVPATH=/devices/virtual/misc/kvm SUBSYSTEM=misc EVENT=create PID=42 "
    command = [sys.executable, "-c", EVENTS, kvm.replace("kvm", "fuse"), kvm]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found.splitlines() == ["None False", "create True"]


def loaded_by_python() -> set[str]:
    """What Python loads by itself, which depends on how iohub was installed."""
    command = [sys.executable, "-c", "import sys; print(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def loaded(client: Client) -> set[str]:
    """Which of UNWANTED the daemon has loaded by now."""
    bits = client.request(Command.PCI_CFGREAD, mpqemu.CONFIG.pack(0x40, 0, 4))
    return {name for bit, name in enumerate(UNWANTED) if bits >> bit & 1}


@pytest.fixture
def remoted(tmp_path: Path) -> Iterator[Client]:
    """A client of the device above, in a daemon of its own."""
    (tmp_path / "probe.py").write_text(DEVICE)
    device = f"--device={tmp_path}/probe.py:Probe,id=probe,addr=05.0"
    child = Child("remoted", ["--name=vm", f"--runtime-dir={tmp_path}", device], tmp_path)
    try:
        path = tmp_path / "probe.sock"
        wait_until(path.exists, "the device's socket is there")
        client = Client.connect(str(path), 10)
        yield client
        client.close()
    finally:
        child.kill()


def test_a_daemon_loads_only_what_it_needs(remoted: Client, tmp_path: Path) -> None:
    assert loaded(remoted) <= loaded_by_python()
    assert call(tmp_path / "remoted.varlink", "org.iohub.Remoted.Status")["vm"] == "vm"
    assert {"asyncio", "asyncvarlink", "json"} <= loaded(remoted)


def test_the_collector_starts_with_the_service_and_leaves_what_there_is_alone(remoted: Client) -> None:
    """Nothing was ever collected in full."""
    assert remoted.request(Command.PCI_CFGREAD, mpqemu.CONFIG.pack(0x44, 0, 4)) == 0b111
