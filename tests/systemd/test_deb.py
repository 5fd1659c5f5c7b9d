# SPDX-License-Identifier: GPL-2.0-or-later
"""The Debian package that ``make deb`` builds: installed, upgraded below a running VM, removed."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.bootedsystem import BootedSystem
from tests.support.checkout import ROOT
from tests.support.hostbench import PROXYD, QEMU_UNIT, REMOTED, HostBench
from tests.support.wait import wait_until

PACKAGE_IN_HOST = "/tmp/iohub.deb"

# What dpkg, the journal and other tools keep for themselves.
NOT_OURS = re.compile(
    r" /var/(lib/dpkg|lib/systemd|log|cache|tmp)/"
    r"| /etc/(passwd|group|shadow|gshadow)-$| /etc/\.pwd\.lock$| /usr/(local/)?lib/python.*/__pycache__"
)


@pytest.fixture
def system(requires_systemd: None) -> Iterator[BootedSystem]:
    booted = BootedSystem()
    try:
        yield booted
    finally:
        booted.close()


def files(system: BootedSystem) -> set[str]:
    """Type, mode, owner and path of all files."""
    command = ("find", "/etc", "/opt", "/run/iohub", "/usr", "/var", "-printf", r"%y %m %u:%g %p\n")
    return {
        line for line in system.run(*command, check=False).stdout.splitlines() if not NOT_OURS.search(line)
    }


def test_the_changelog_has_the_version_of_the_python_package() -> None:
    (version,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    changelog = (ROOT / "systemd/debian/changelog").read_text()
    assert changelog.startswith(f"iohub ({version}) ")


def test_lintian_finds_no_error(package: Path) -> None:
    if shutil.which("lintian") is None:
        pytest.skip("needs lintian: apt-get install lintian")
    (changes,) = package.parent.glob("*.changes")
    done = subprocess.run(
        ["lintian", "--allow-root", str(changes)], capture_output=True, text=True, check=False
    )
    assert [line for line in done.stdout.splitlines() if line.startswith("E:")] == []
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_has_the_files_of_make_install(package: Path, installed: Path) -> None:
    """But not what Python has compiled; compressed are man pages and documents."""
    contents = subprocess.run(["dpkg-deb", "--contents", package], capture_output=True, text=True, check=True)
    packed = {line.split()[-1].removeprefix(".").removesuffix(".gz") for line in contents.stdout.splitlines()}
    ours = {f"/{path.relative_to(installed)}" for path in installed.rglob("*") if path.is_file()}
    compiled = {path for path in ours if "__pycache__" in path}
    assert compiled
    assert ours - compiled - packed == {"/usr/lib/iohub/manifest"}


def test_it_is_removed_without_a_trace(system: BootedSystem, package: Path) -> None:
    shutil.copy(package, system.root / "tmp/iohub.deb")
    before = files(system)
    system.run("dpkg", "--install", PACKAGE_IN_HOST)
    assert re.match(r"iohub-remoted \d", system.run("iohub-remoted", "--version").stdout)
    compiled = [line for line in files(system) if "/usr/lib/iohub/" in line and line.endswith(".pyc")]
    assert [line for line in compiled if "/remoted/__pycache__/main." in line]
    assert system.run("stat", "-c", "%A %U %G", "/etc/iohub").stdout == "drwxr-x--- root iohub\n"
    (message_id, *_) = re.findall(
        r"^-- ([0-9a-f]{32})$", (ROOT / "systemd/iohub.catalog").read_text(), re.MULTILINE
    )
    assert system.run("journalctl", "--list-catalog", message_id).stdout.startswith(message_id)

    (system.root / "etc/iohub/vm1.toml").write_text('name = "vm1"\n')
    system.systemctl("enable", REMOTED, PROXYD)
    system.run("dpkg", "--remove", "iohub")
    assert (system.root / "etc/iohub/vm1.toml").exists(), "the operator's file went with the package"
    (system.root / "etc/iohub/vm1.toml").unlink()
    system.run("dpkg", "--purge", "iohub")
    wants = "/etc/systemd/system/qemu@vm1.service.wants"
    after = {line for line in files(system) if not line.endswith(wants)}
    assert (after - before, before - after) == (set(), set())


@pytest.mark.usefixtures("requires_systemd", "requires_kvm", "requires_qemu")
def test_an_upgrade_under_a_running_vm_loses_no_interrupt(package: Path, tmp_path: Path) -> None:
    later = later_version(package, tmp_path)
    host = HostBench(package)
    try:
        host.start()
        pids = [host.wait_for_process(unit) for unit in (QEMU_UNIT, REMOTED, PROXYD)]
        host.command("setup")
        upgraded = threading.Event()
        with ThreadPoolExecutor() as pool:
            guest = pool.submit(run_until, host, upgraded)
            try:
                host.install_package(later)
                wait_until(lambda: host.linked() == {"edu0", "com1"}, "all functions are served")
            finally:
                upgraded.set()
            assert guest.result() > 0
        stats = host.command("stats")
        for function in stats.of_kind("function"):
            assert function.number("raised") == function.number("served") > 0, stats
            assert function.number("held") == function.number("reasserts") > 0, stats
        for record in stats.records:
            for name in record.fields.keys() & {"lost", "redone", "orphaned", "stuck"}:
                assert record.number(name) == 0, stats
            # The restart of remoted may cost one.
            assert "spurious" not in record.fields or record.number("spurious") <= 1, stats
        qemu, remoted, proxyd = [host.wait_for_process(unit) for unit in (QEMU_UNIT, REMOTED, PROXYD)]
        assert qemu == pids[0]
        assert remoted != pids[1]
        assert proxyd != pids[2]
        assert "0.1.0+later" in host.system.run("dpkg-query", "--show", "iohub").stdout
    finally:
        host.close()


def run_until(host: HostBench, end: threading.Event) -> int:
    """Lets the guest raise and serve interrupts until then; the number of its runs."""
    runs = 0
    while not end.is_set():
        host.command("run 100 held 4")
        runs += 1
    return runs


def later_version(package: Path, directory: Path) -> Path:
    """The same package as the next version of itself, with other times of its modules."""
    tree = directory / "tree"
    subprocess.run(["dpkg-deb", "--raw-extract", package, tree], check=True)
    control = tree / "DEBIAN/control"
    control.write_text(
        re.sub(r"^Version: (.*)$", r"Version: \1+later", control.read_text(), flags=re.MULTILINE)
    )
    for module in (tree / "usr/lib/iohub").rglob("*.py"):
        module.touch()
    later = directory / "later.deb"
    subprocess.run(
        ["dpkg-deb", "--build", "--root-owner-group", "-Znone", tree, later], check=True, capture_output=True
    )
    return later
