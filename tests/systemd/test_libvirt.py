# SPDX-License-Identifier: GPL-2.0-or-later
"""A libvirt domain gets iohub's devices: by the documented XML, and the hook that is installed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.checkout import ROOT
from tests.support.hostbench import PROXYD, REMOTED, HostBench
from tests.support.wait import wait_until

pytestmark = pytest.mark.skipif(
    shutil.which("libvirtd") is None or shutil.which("virsh") is None,
    reason="needs libvirt: apt-get install libvirt-daemon-system libvirt-clients",
)

GUEST = """
    <qemu:arg value='-bios'/>
    <qemu:arg value='/var/lib/firmware.bin'/>
    <qemu:arg value='-device'/>
    <qemu:arg value='loader,file=/var/lib/guest.bin,addr=0x100000,force-raw=on'/>
    <qemu:arg value='-chardev'/>
    <qemu:arg value='socket,id=console,path=/run/iohub-libvirt/vm1/console,server=on,wait=off'/>
    <qemu:arg value='-device'/>
    <qemu:arg value='isa-serial,chardev=console'/>
  </qemu:commandline>"""


class LibvirtBench(HostBench):
    """The example's domain, with the guest of the tests."""

    CONSOLE = "run/iohub-libvirt/vm1/console"

    def __init__(self, installed: Path) -> None:
        super().__init__(installed)
        self.system.systemctl("disable", REMOTED, PROXYD)
        example = (ROOT / "systemd/examples/libvirt-domain.xml").read_text()
        domain = example.replace("1024", "64").replace("\n  </qemu:commandline>", GUEST)
        (self.root / "tmp/vm1.xml").write_text(domain)
        config = self.root / "etc/iohub/vm1.toml"
        text = config.read_text()
        for old, new in (("/run/qemu/", "/run/iohub-libvirt/"), ('"qemu"', '"libvirt-qemu"')):
            text = text.replace(old, new)
        config.write_text(text.replace("05.0", "10.0").replace("06.0", "11.0"))
        self.system.systemctl("start", "libvirtd")
        self.virsh("define", "/tmp/vm1.xml")

    def virsh(self, *arguments: str) -> str:
        return self.system.run("virsh", "-c", "qemu:///system", *arguments).stdout

    def start_domain(self) -> None:
        """Starts the domain; returns when the guest is ready and has its functions."""
        self.virsh("start", "vm1", "--paused")
        self.attach()

    def resume(self) -> None:
        self.virsh("resume", "vm1")

    def main_pids(self) -> set[str]:
        """Of the daemons that run."""
        return {self.system.show(unit, "MainPID") for unit in (REMOTED, PROXYD)} - {"0"}


@pytest.fixture
def host(
    installed: Path, requires_systemd: None, requires_kvm: None, requires_qemu: None
) -> Iterator[LibvirtBench]:
    with closing(LibvirtBench(installed)) as bench:
        yield bench


def test_a_domain_gets_its_devices_and_takes_the_daemons_along(host: LibvirtBench) -> None:
    assert not host.main_pids()
    host.start_domain()
    assert host.command("setup").result.number("functions") == 2
    host.command("run 20")
    pid = host.kill(REMOTED)
    host.wait_for_process(REMOTED, other_than=pid)
    host.command("run 20")
    stats = host.command("stats")
    assert [each.number("served") for each in stats.of_kind("function")] == [40, 40]
    assert [each.number("lost") for each in stats.of_kind("function")] == [0, 0]
    host.virsh("destroy", "vm1")
    wait_until(lambda: not host.main_pids(), "the daemons have ended with the domain")
    host.start_domain()


def test_a_domain_without_a_configuration_is_left_alone(host: LibvirtBench) -> None:
    (host.root / "etc/iohub/vm1.toml").unlink()
    (host.root / "run/iohub-libvirt/vm1").mkdir(parents=True)
    shutil.chown(host.root / "run/iohub-libvirt/vm1", 0, 0)
    (host.root / "run/iohub-libvirt/vm1").chmod(0o777)
    host.virsh("start", "vm1")
    assert "running" in host.virsh("domstate", "vm1")
    assert not host.main_pids()
    assert "iohub" not in host.system.systemctl("list-units", "--all", "iohub*", "--plain", "--no-legend")
    host.virsh("destroy", "vm1")


@pytest.mark.parametrize("name", ["", "-x", ".hidden", "a b", "../vm1", "a/b", "vm1;reboot"])
def test_the_hook_leaves_other_names_alone(name: str, tmp_path: Path) -> None:
    """No command is run: there is none on its path."""
    hook = ROOT / "systemd/libvirt-hook"
    done = subprocess.run(
        ["/bin/sh", str(hook), name, "prepare", "begin", "-"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
