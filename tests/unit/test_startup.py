# SPDX-License-Identifier: GPL-2.0-or-later
"""What a daemon doesn't load at its start, as it costs time and memory and most never need it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from common import mpqemu
from common.control import call
from common.ctl.children import Child
from common.link import Client
from common.mpqemu import Command
from tests.support.wait import wait_until

UNWANTED = (
    *("asyncio", "asyncvarlink", "json", "ssl", "subprocess", "tempfile"),
    *("dataclasses", "difflib", "hashlib", "importlib.metadata", "inspect", "pathlib", "tomllib"),
    *("remoted.keeper", "remoted.modellist"),
)
DEVICE = f"""
import sys
from remoted.device import PciFunction

class Probe(PciFunction):
    VENDOR_ID, DEVICE_ID, CLASS_CODE = 0x1234, 0x0001, 0xFF0000

    def config_read(self, addr, size):
        loaded = [name in sys.modules for name in {UNWANTED}]
        return sum(is_loaded << bit for bit, is_loaded in enumerate(loaded))
"""


def loaded_by_python() -> set[str]:
    """What Python loads by itself, which depends on how iohub was installed."""
    command = [sys.executable, "-c", "import sys; print(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def loaded(client: Client) -> set[str]:
    """Which of UNWANTED the daemon has loaded by now."""
    bits = client.request(Command.PCI_CFGREAD, mpqemu.CONFIG.pack(0x40, 0, 4))
    return {name for bit, name in enumerate(UNWANTED) if bits >> bit & 1}


def test_a_daemon_loads_only_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text(DEVICE)
    device = f"--device={tmp_path}/probe.py:Probe,id=probe,addr=05.0"
    child = Child("remoted", ["--name=vm", f"--runtime-dir={tmp_path}", device], tmp_path)
    try:
        path = tmp_path / "probe.sock"
        wait_until(path.exists, "the device's socket is there")
        client = Client.connect(str(path), 10)
        assert loaded(client) <= loaded_by_python()
        assert call(tmp_path / "remoted.varlink", "org.iohub.Remoted.Status")["vm"] == "vm"
        assert {"asyncio", "asyncvarlink", "json"} <= loaded(client)
        client.close()
    finally:
        child.kill()
