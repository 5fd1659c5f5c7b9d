# SPDX-License-Identifier: GPL-2.0-or-later
"""The README's disk is plugged into a running VM by its three commands, and unplugged."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.support.checkout import ROOT
from tests.support.linuxguest import LinuxGuest
from tests.support.wait import wait_until

PATIENCE = 60.0


def readme_commands() -> list[str]:
    readme = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"Three commands plug a disk[^$]*?\n\n((?:    \$ [^\n]*\n)+)", readme)
    assert block.count("\n") == 3
    return [line.removeprefix("    $ ").removesuffix(" &") for line in block.splitlines()]


def has_disk(guest: LinuxGuest) -> Callable[[], bool]:
    return lambda: "1048576 nvme0n1" in guest.run("cat /proc/partitions")


def test_a_disk_is_plugged_by_three_commands(tmp_path: Path, vfio_user_qemu: str) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    monitor = f"unix:{tmp_path}/qmp.sock,server=on,wait=off"
    make_image, *daemons = readme_commands()
    subprocess.run(["sh", "-c", make_image], cwd=tmp_path, check=True)
    started: list[subprocess.Popen[bytes]] = []
    with LinuxGuest(["-qmp", monitor], program=vfio_user_qemu, machine="pc") as guest:
        try:
            for command in daemons:
                arguments = ["sh", "-c", f"exec {command}"]
                started += [subprocess.Popen(arguments, cwd=tmp_path, env=environment)]
            wait_until(has_disk(guest), "the guest has the disk")
            started[1].send_signal(signal.SIGTERM)
            assert started[1].wait(PATIENCE) == 0
            assert "nvme" not in guest.run("cat /proc/partitions")
        finally:
            for process in started:
                process.kill()
                process.wait()
