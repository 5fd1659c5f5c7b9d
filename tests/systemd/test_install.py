# SPDX-License-Identifier: GPL-2.0-or-later
"""``make install`` and ``make uninstall``: what they write, and that it works without the checkout."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.configfile import TOP_KEYS
from common.ctl.main import make_ctl_parser
from common.options import COMMON_KEYS
from tests.support.bootedsystem import BootedSystem
from tests.support.checkout import ROOT
from tests.support.installation import install, make

PAGES = ("iohub-proxyd.8", "iohub-remoted.8", "iohub.toml.5", "iohubctl.1")
COMMANDS = [*re.findall(r"^    (\w+)  ", make_ctl_parser([]).format_help(), re.MULTILINE)]
MANIFEST = "usr/lib/iohub/manifest"
PROGRAMS = ("iohub-proxyd", "iohub-remoted", "iohubctl")


@pytest.fixture(scope="module")
def system(installed: Path, requires_systemd: None) -> Iterator[BootedSystem]:
    """A host where iohub is installed."""
    booted = BootedSystem()
    try:
        shutil.copytree(installed, booted.root, symlinks=True, dirs_exist_ok=True)
        yield booted
    finally:
        booted.close()


def install_again(installed: Path, destination: Path) -> None:
    """Installs the files of an installation into another directory, without building them again."""
    tree = destination.with_name("tree")
    shutil.copytree(installed, tree, dirs_exist_ok=True)
    (tree / MANIFEST).unlink()
    environment = {"PATH": "/usr/bin:/bin", "DESTDIR": str(destination), "PREFIX": "/usr"}
    subprocess.run([ROOT / "systemd/install", tree], env=environment, check=True)


def listing(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_uninstall_leaves_what_was_there_before(installed: Path, tmp_path: Path) -> None:
    """Directories that were empty before, and the operator's files; not what Python has compiled since."""
    destination = tmp_path / "root"
    for directory in ("usr/share/man", "usr/lib/systemd/system", "etc/iohub"):
        (destination / directory).mkdir(parents=True)
    (destination / "etc/iohub/vm1.toml").touch()
    (destination / "usr/share/man").chmod(0o2775)
    before = listing(destination)
    install_again(installed, destination)
    assert set(listing(installed)) <= set(listing(destination))
    assert (destination / "usr/share/man").stat().st_mode & 0o7777 == 0o2775
    (destination / "usr/lib/iohub/common/__pycache__/loop.cpython-399.pyc").touch()
    make("uninstall", f"DESTDIR={destination}", "PREFIX=/usr")
    assert listing(destination) == before


def test_an_installation_over_an_older_one_leaves_none_of_its_files(installed: Path, tmp_path: Path) -> None:
    destination = tmp_path / "root"
    shutil.copytree(installed, destination)
    module = destination / "usr/lib/iohub/common/gone.py"
    module.touch()
    manifest = destination / MANIFEST
    manifest.write_text(f"{manifest.read_text()}/usr/lib/iohub/common/gone.py\n")
    install_again(installed, destination)
    assert listing(destination) == listing(installed)
    assert sorted(manifest.read_text().split()) == sorted((installed / MANIFEST).read_text().split())
    make("uninstall", f"DESTDIR={destination}", "PREFIX=/usr")
    assert listing(destination) == []


def test_another_prefix(tmp_path: Path) -> None:
    install(tmp_path, "/opt/iohub")
    assert {path.name for path in tmp_path.iterdir()} == {"etc", "opt"}
    outside = [path for path in (tmp_path / "etc").rglob("*") if not path.is_dir()]
    assert outside == [tmp_path / "etc/libvirt/hooks/qemu.d/iohub"], (
        "where libvirt looks, whatever the prefix"
    )
    for name in ("remoted", "proxyd"):
        unit = (tmp_path / f"opt/iohub/lib/systemd/system/iohub-{name}@.service").read_text()
        assert f"ExecStart=/opt/iohub/bin/iohub-{name} " in unit
        assert "/usr/bin/iohub" not in unit
    assert '"/opt/iohub/lib/iohub"' in (tmp_path / "opt/iohub/bin/iohubctl").read_text()


def test_no_file_names_the_directory_that_it_was_built_in(installed: Path) -> None:
    names = [str(installed).encode(), str(ROOT).encode(), b"/tmp/tmp."]
    for path in installed.rglob("*"):
        if path.is_file():
            contents = path.read_bytes()
            assert not [name for name in names if name in contents], path


def test_all_modules_are_compiled_and_not_compared_with_their_sources_at_a_start(installed: Path) -> None:
    library = installed / "usr/lib/iohub"
    for source in library.rglob("*.py"):
        (compiled,) = (source.parent / "__pycache__").glob(f"{source.stem}.cpython-*.pyc")
        flags = int.from_bytes(compiled.read_bytes()[4:8], "little")
        assert flags == 0b01, f"{compiled}: not a hash-based .pyc that is not checked (PEP 552)"


def test_uninstall_of_nothing_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "systemd/uninstall"],
        env={"DESTDIR": str(tmp_path), "PREFIX": "/usr"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"uninstall: there is no {tmp_path}/usr/lib/iohub/manifest, nothing of iohub is installed there\n"
    )


@pytest.mark.parametrize("program", PROGRAMS)
def test_version(system: BootedSystem, program: str) -> None:
    (version,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert system.run(program, "--version").stdout == f"{program} {version}\n"


def test_both_daemons_run_on_what_is_installed(system: BootedSystem) -> None:
    assert " 0 lost, 0 stuck" in system.run("iohubctl", "demo", "--vm=soft", "--rounds=4").stdout


def test_programs_write_nothing_where_they_are_installed(system: BootedSystem) -> None:
    before = listing(system.root / "usr/lib/iohub")
    for program in PROGRAMS:
        system.run(program, "--help")
    system.run("iohub-remoted", "--models")
    assert listing(system.root / "usr/lib/iohub") == before


def test_systemd_takes_the_files(system: BootedSystem) -> None:
    for command in (
        ("systemd-sysusers", "iohub.conf"),
        ("systemd-tmpfiles", "--create", "iohub.conf"),
        ("systemctl", "daemon-reload"),
    ):
        done = system.run(*command)
        assert command[0] == "systemd-sysusers" or done.stderr == ""
    verified = system.run(
        "systemd-analyze", "verify", "iohub-remoted@vm1.service", "iohub-proxyd@vm1.service"
    )
    assert verified.stdout + verified.stderr == ""  # it also looks for the manual pages
    assert system.run("id", "--name", "--user", "iohub").stdout == "iohub\n"
    assert system.run("stat", "-c", "%A %U %G", "/etc/iohub", "/run/iohub").stdout.splitlines() == [
        "drwxr-x--- root iohub",
        "drwxr-xr-x root root",
    ]
    for unit in ("iohub-remoted@.service", "iohub-proxyd@.service"):
        assert system.run("systemctl", "is-enabled", unit, check=False).stdout == "disabled\n"
        assert system.run("systemctl", "preset", unit).stderr == ""
        assert system.run("systemctl", "is-enabled", unit, check=False).stdout == "disabled\n"


@pytest.mark.parametrize("page", PAGES)
def test_manual_page_has_no_mistake(installed: Path, page: str) -> None:
    if shutil.which("mandoc") is None:
        pytest.skip("needs mandoc: apt-get install mandoc")
    path = installed / f"usr/share/man/man{page[-1]}/{page}"
    done = subprocess.run(["mandoc", "-T", "lint", path], capture_output=True, text=True, check=False)
    # That of others depends on what the machine has, and on mandoc's index of it.
    ignored = ("referenced manual not found", "outdated mandoc.db")
    assert [line for line in done.stdout.splitlines() if not any(each in line for each in ignored)] == []
    if shutil.which("man") is None:
        return
    done = subprocess.run(
        ["man", "--warnings", "-l", path],
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "MANWIDTH": "90"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "command",
    [("iohub-remoted",), ("iohub-proxyd",), ("iohubctl",), *(("iohubctl", name) for name in COMMANDS)],
    ids=" ".join,
)
def test_manual_page_has_each_option_of_the_help(installed: Path, command: tuple[str, ...]) -> None:
    if shutil.which("mandoc") is None:
        pytest.skip("needs mandoc: apt-get install mandoc")
    (page,) = (installed / "usr/share/man").rglob(f"{command[0]}.[1-8]")
    text = subprocess.run(["mandoc", "-T", "ascii", page], capture_output=True, text=True, check=True).stdout
    text = re.sub(".\x08", "", text)  # bold is overstruck
    if len(command) == 2:
        text = re.split(r"^   \S", text.partition(f"\n   {command[1]}\n")[2], maxsplit=1, flags=re.MULTILINE)[
            0
        ]
    usage = subprocess.run(
        [Path(sys.executable).with_name(command[0]), *command[1:], "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    options = set(re.findall(r"^  (?:-\w, )?(--[a-z-]+)", usage, re.MULTILINE))
    assert options
    assert options <= set(re.findall(r"^ +(?:-\w, )?(--[a-z-]+)", text, re.MULTILINE))


def test_manual_page_of_the_file_has_each_key(installed: Path) -> None:
    text = (installed / "usr/share/man/man5/iohub.toml.5").read_text()
    keys = set(re.findall(r"^\.It Cm (\S+) No =", text, re.MULTILINE))
    assert keys == TOP_KEYS | COMMON_KEYS


@pytest.mark.parametrize("shell", ["bash", "zsh"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_completion_is_a_script_of_the_shell(installed: Path, shell: str, program: str) -> None:
    names = {
        "bash": [f"usr/share/bash-completion/completions/{program}"],
        "zsh": [f"usr/share/zsh/{name}/_{program}" for name in ("vendor-completions", "site-functions")],
    }
    (script,) = (installed / name for name in names[shell] if (installed / name).exists())
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    done = subprocess.run([shell, "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_bash_completes(installed: Path) -> None:
    def complete(*words: str) -> list[str]:
        program, *_ = words
        script = installed / f"usr/share/bash-completion/completions/{program}"
        text = (
            f'source "{script}"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
            f"handler=$(complete -p {program}); handler=${{handler##*-F }}; "
            '"${handler%% *}"; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        done = subprocess.run(
            ["bash", "-c", text, "bash", *words], capture_output=True, text=True, check=False
        )
        return done.stdout.split()

    assert complete("iohub-remoted", "--m") == ["--models"]
    assert complete("iohub-proxyd", "--unp") == ["--unplug-on-exit"]
    assert {"status", "list", "raise", "lower", "demo"} <= set(complete("iohubctl", ""))
    assert complete("iohubctl", "demo", "--rou") == ["--rounds"]
    assert complete("iohub-proxyd", "--config", str(ROOT / "pypro")) == [str(ROOT / "pyproject.toml")]
