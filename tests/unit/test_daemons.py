# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemons as processes: start, bad usage, takeover of sockets, end."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import mpqemu
from common.ctl.children import Child
from common.disposal import Disposal
from common.errors import PeerGone
from common.link import Client
from common.mpqemu import Command
from common.peer import is_dying
from tests.support.asleep import settled_log
from tests.support.fds import count_fds
from tests.support.fuse import stalling_file
from tests.support.wait import wait_until

END_SECONDS = 20
STRANGER = 54321


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def vendor(client: Client) -> int:
    return client.request(Command.PCI_CFGREAD, mpqemu.CONFIG.pack(0, 0, 2))


def remoted(directory: Path, *devices: str) -> Child:
    options = [f"--device={device}" for device in devices]
    return Child("remoted", ["--name=vm", f"--runtime-dir={directory}", *options], directory)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Child]:
    child = remoted(tmp_path, "edu,id=edu0,addr=05.0")
    yield child
    child.kill()


BAD_USAGE = {
    "unknown model": (["--device=nothing,id=a"], "nothing"),
    "model that does not import": (["--device=no.such:Thing,id=a"], "no.such:Thing"),
    "model that is no function": (["--device=os:path,id=a"], "os:path"),
    "bad address": (["--device=edu,id=a,addr=20.0"], "20.0"),
    "two devices at one address": (["--device=edu,id=a,addr=05.0", "--device=edu,id=b,addr=05.0"], "05.0"),
    "two devices with one id": (["--device=edu,id=a,addr=05.0", "--device=edu,id=a,addr=06.0"], "a"),
    "unknown option of a model": (["--device=edu,id=a,colour=red"], "colour"),
    "unknown chardev": (["--device=pci-serial,id=a,chardev=teapot"], "teapot"),
    "unreadable configuration": (["--config=/nonexistent.toml"], "/nonexistent.toml"),
    "an fd that is closed": (["--device=edu,id=a,fd=999"], "999"),
    "an fd that is no socket": (["--device=edu,id=a,fd=0"], "fd=0"),
    "a directory that can't be made": (["--device=edu,id=a", "--runtime-dir=/proc/nowhere"], "/proc/nowhere"),
}


@pytest.mark.parametrize("case", BAD_USAGE)
def test_bad_usage_of_remoted_is_one_line_and_status_2(tmp_path: Path, case: str) -> None:
    arguments, named = BAD_USAGE[case]
    result = run("remoted", "--name=vm", f"--runtime-dir={tmp_path}", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("iohub-remoted: ")
    assert result.stderr.count("\n") == 1
    assert named in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--vm=hyperspace"], "hyperspace"),
        (["--device=id=a,addr=00.0"], "00.0"),
        (["--device=id=a,addr=01.0", "--vm=soft"], "01.0"),
        (["--vm=soft"], "no devices"),
        (["--device=id=a", "--runtime-dir=/proc/nowhere"], "--runtime-dir /proc/nowhere: No such file"),
        (["--device=id=a", "--vm=qmp:/etc/passwd"], "--vm qmp:/etc/passwd: exists and is not a socket"),
    ],
)
def test_bad_usage_of_proxyd_is_one_line_and_status_2(
    tmp_path: Path, arguments: list[str], named: str
) -> None:
    result = run("proxyd", "--name=vm", f"--runtime-dir={tmp_path}", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("iohub-proxyd: ")
    assert result.stderr.count("\n") == 1
    assert named in result.stderr


def test_a_function_without_its_function_0_is_warned_of(tmp_path: Path) -> None:
    """The last device ends it: its address is the chipset's."""
    devices = ["id=a,addr=07.1", "id=b,addr=08.1", "id=c,addr=08.0", "id=d,addr=01.0"]
    options = [f"--device={device}" for device in devices]
    result = run("proxyd", "--name=vm", f"--runtime-dir={tmp_path}", "--vm=soft", *options)
    warning, error = result.stderr.splitlines()
    assert (
        warning.partition(" ")[2]
        == "iohub-proxyd[vm] a: warning: 07.1: guests don't look for it without 07.0"
    )
    assert "01.0" in error
    result = run("proxyd", "--name=vm", f"--runtime-dir={tmp_path}", "--vm=pid:1", "--device=id=a,addr=07.1")
    (error,) = result.stderr.splitlines()
    assert "gsi" in error


@pytest.mark.parametrize("vm", ["soft", "qmp:nowhere", "pid:1"])
def test_a_second_proxyd_takes_nothing_and_looks_at_no_vm(tmp_path: Path, vm: str) -> None:
    device = "--device=id=a,addr=05.0,gsi=10" if vm == "pid:1" else "--device=id=a,addr=05.0"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "proxyd.varlink"))
        other.listen()
        result = run("proxyd", "--name=vm", f"--runtime-dir={tmp_path}", f"--vm={vm}", device)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert f"[{os.getpid()}] runs in {tmp_path} already: stop it, or choose another --runtime-dir" in line
    assert os.listdir(tmp_path) == ["proxyd.varlink"]


def test_the_scripted_guest_is_told_of_at_the_start(tmp_path: Path) -> None:
    child = Child(
        "proxyd", ["--name=vm", f"--runtime-dir={tmp_path}", "--vm=soft", "--device=id=a"], tmp_path
    )
    assert child.end() == 0
    assert "running the scripted guest, without KVM; for another VM: --vm qmp:SOCKET" in child.log.read_text()


def test_the_embedded_guest_is_told_of_at_the_start(requires_kvm: None, tmp_path: Path) -> None:
    child = Child("proxyd", ["--name=vm", f"--runtime-dir={tmp_path}", "--device=id=a,addr=05.0"], tmp_path)
    assert child.end() == 0
    assert "running the embedded guest on /dev/kvm; for another VM: --vm qmp:SOCKET" in child.log.read_text()


@pytest.mark.parametrize("vm", ["embedded", "soft", "pid:1"])
def test_only_qemu_has_vfio_user(tmp_path: Path, vm: str) -> None:
    gsi = ",gsi=10" if vm.startswith("pid") else ""
    device = f"--device=id=dev0,transport=vfio-user{gsi}"
    result = run("proxyd", "--name=vm", f"--runtime-dir={tmp_path}", f"--vm={vm}", device)
    kind = vm.partition(":")[0]
    assert result.returncode == 2
    assert result.stderr == (
        f"iohub-proxyd: device dev0: --vm {kind} has no transport=vfio-user: qmp:SOCKET has it\n"
    )


def in_mount_namespace(script: str) -> subprocess.CompletedProcess[str]:
    """Runs a script that mounts what only its own processes see, and then a daemon."""
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if "unshare" in result.stderr or "mount:" in result.stderr:
        pytest.skip(f"needs a mount namespace, and the right to mount: {result.stderr.strip()}")
    return result


def test_without_kvm_the_error_names_the_way_that_needs_none(tmp_path: Path) -> None:
    command = f"{sys.executable} -m proxyd --name=vm --runtime-dir={tmp_path} --device=id=a"
    result = in_mount_namespace(f"mount --bind /dev/null /dev/kvm && exec {command}")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "/dev/kvm" in result.stderr
    assert "--vm soft" in result.stderr


@pytest.mark.parametrize("module", ["remoted", "proxyd"])
@pytest.mark.parametrize(
    ("setup", "told"),
    [
        ("ulimit -n 9", "Too many open files"),
        ("mount -t tmpfs -o nr_inodes=1 x {}", "No space left on device"),
    ],
    ids=["fds", "disk"],
)
def test_a_shortage_at_the_start_has_a_status_of_its_own(
    tmp_path: Path, module: str, setup: str, told: str
) -> None:
    """systemd starts a daemon again after 1, but not after 2."""
    model, vm = {"remoted": ("edu,", ""), "proxyd": ("", "--vm=soft")}[module]
    options = f"--name=vm --runtime-dir={tmp_path}/vm {vm} --device={model}id=a"
    result = in_mount_namespace(f"{setup.format(tmp_path)} && exec {sys.executable} -m {module} {options}")
    assert result.returncode == 1, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert told in result.stderr


def test_a_socket_of_a_live_daemon_is_refused_and_a_stale_one_taken_over(
    daemon: Child, tmp_path: Path
) -> None:
    refused = rf"iohub-remoted: \S+\[{daemon.process.pid}\] runs in {tmp_path} already: stop it, .*\n"
    log = settled_log(daemon)
    for device in ("edu0", "other"):
        result = run("remoted", "--name=vm", f"--runtime-dir={tmp_path}", f"--device=edu,id={device}")
        assert result.returncode == 2
        assert re.fullmatch(refused, result.stderr), result.stderr
    other_dir = tmp_path / "other"
    socket_option = f"--device=edu,id=edu0,socket={tmp_path}/edu0.sock"
    result = run("remoted", "--name=vm", f"--runtime-dir={other_dir}", socket_option)
    assert re.search(rf"edu0\.sock is in use by \S+\[{daemon.process.pid}\]\n", result.stderr)
    client = Client.connect(str(tmp_path / "edu0.sock"), END_SECONDS)
    assert vendor(client) == 0x1234, "the refused daemon has not disturbed the live one"
    heard = settled_log(daemon).removeprefix(log)
    assert "refused" not in heard
    client.close()
    daemon.kill()
    with pytest.raises(PeerGone):
        Client.connect(str(tmp_path / "edu0.sock"), END_SECONDS)
    successor = remoted(tmp_path, "edu,id=edu0")
    try:
        client = Client.connect(str(tmp_path / "edu0.sock"), END_SECONDS)
        assert vendor(client) == 0x1234
        client.close()
    finally:
        successor.kill()


@pytest.mark.parametrize("is_queue_full", [False, True])
def test_a_daemon_that_was_killed_but_cant_end_is_replaced(
    daemon: Child, tmp_path: Path, is_queue_full: bool
) -> None:
    """A close that a client has caused lasts: the process is a zombie, and its sockets still take clients."""
    pid, path = daemon.process.pid, str(tmp_path / "edu0.sock")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(stalling_file(tmp_path / "fuse"))
        file.victim = pid
        fd = os.open(file.path, os.O_RDONLY)
        client = Client.connect(path, END_SECONDS)
        client.send(Command.SET_IRQFD, fds=[fd])
        os.close(fd)
        wait_until(lambda: file.has_stalled, "the daemon waits for the close")
        assert vendor(client) == 0x1234
        client.close()
        assert not is_dying(pid)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: is_dying(pid), "the daemon dies")
        for name in ("edu0.sock", "remoted.varlink") if is_queue_full else ():
            result = 0
            while not result:
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                sock.setblocking(False)
                result = sock.connect_ex(str(tmp_path / name))
            assert result == errno.EAGAIN
        successor = remoted(tmp_path, "edu,id=edu0")
        stack.callback(successor.kill)
        client = Client.connect(path, END_SECONDS)
        assert vendor(client) == 0x1234
        client.close()
        file.release()
        daemon.process.wait(END_SECONDS)


def status(pid: int) -> dict[str, str]:
    """The fields of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@pytest.mark.parametrize("program", ["remoted", "proxyd"])
def test_daemons_gain_no_privileges_and_show_nobody_their_memory(program: str) -> None:
    """As a user without privileges: what a process that isn't dumpable has in /proc belongs to root."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to start a daemon as another user")
    stranger = ["setpriv", f"--reuid={STRANGER}", "--clear-groups", sys.executable]
    if subprocess.run([*stranger, "-c", "import common"], capture_output=True, check=False).returncode:
        pytest.skip(f"needs a checkout that other users can read: {sys.executable}")
    device = "edu,id=edu0" if program == "remoted" else "id=edu0"
    with tempfile.TemporaryDirectory() as directory:
        os.chown(directory, STRANGER, STRANGER)
        options = ["--name=vm", f"--runtime-dir={directory}", f"--device={device}"]
        if program == "proxyd":
            options.append("--vm=soft")
        child = subprocess.Popen(
            [*stranger, "-m", program, *options],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            wait_until(lambda: os.path.exists(f"{directory}/.{program}.varlink.pid"), "the daemon listens")
            assert status(child.pid)["NoNewPrivs"] == "1"
            assert os.stat(f"/proc/{child.pid}/fd").st_uid == 0, "it is not dumpable"
            if program == "remoted":
                set_irqfd(f"{directory}/edu0.sock")
        finally:
            child.terminate()
            _, log = child.communicate(timeout=END_SECONDS)
        assert child.returncode == 0
        assert "examine" not in log


def set_irqfd(path: str) -> None:
    """Makes remoted look at fds of its own in /proc."""
    sock = socket.socket(socket.AF_UNIX)
    wait_until(lambda: sock.connect_ex(path) == 0, "the device listens")
    client = Client(sock, END_SECONDS, Disposal())
    fds = (os.eventfd(0), os.eventfd(0))
    client.send(Command.SET_IRQFD, fds=fds)
    assert vendor(client) == 0x1234
    client.close()
    for fd in fds:
        os.close(fd)


def test_the_device_socket_is_private(daemon: Child, tmp_path: Path) -> None:
    assert (tmp_path / "edu0.sock").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_remoted_cleanly_with_a_client_connected(
    daemon: Child, tmp_path: Path, signum: int
) -> None:
    client = Client.connect(str(tmp_path / "edu0.sock"), END_SECONDS)
    irqfd, resamplefd = os.eventfd(0), os.eventfd(0)
    assert vendor(client) == 0x1234
    client.send(Command.SET_IRQFD, fds=(irqfd, resamplefd))
    daemon.process.send_signal(signum)
    assert daemon.process.wait(END_SECONDS) == 0
    assert not list(tmp_path.glob("*.sock"))
    assert not list(tmp_path.glob("*.varlink"))
    with pytest.raises(PeerGone):
        vendor(client)
    client.close()
    os.close(irqfd)
    os.close(resamplefd)


def test_a_second_client_is_refused_while_the_first_lives(daemon: Child, tmp_path: Path) -> None:
    path = str(tmp_path / "edu0.sock")
    first = Client.connect(path, END_SECONDS)
    assert vendor(first) == 0x1234
    before = count_fds(daemon.process.pid)
    second = Client.connect(path, END_SECONDS)
    with pytest.raises(PeerGone):
        vendor(second)
    second.close()
    assert vendor(first) == 0x1234
    # Its request may have come before its end: then a thread closes the connection.
    wait_until(lambda: count_fds(daemon.process.pid) == before, "the second client's connection is closed")
    first.close()


def test_a_daemon_with_only_an_inherited_link_ends_with_it(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-m", "remoted", "--name=vm", f"--runtime-dir={tmp_path}",
         f"--device=edu,id=edu0,fd={theirs.fileno()}"],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    theirs.close()
    client = Client(ours, END_SECONDS, Disposal())
    assert vendor(client) == 0x1234
    client.close()
    assert process.wait(END_SECONDS) == 0


def test_a_daemon_that_also_listens_outlives_its_inherited_link(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-m", "remoted", "--name=vm", f"--runtime-dir={tmp_path}",
         f"--device=edu,id=edu0,addr=05.0,fd={theirs.fileno()}", "--device=edu,id=edu1,addr=06.0"],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        theirs.close()
        client = Client(ours, END_SECONDS, Disposal())
        assert vendor(client) == 0x1234
        client.close()
        other = Client.connect(str(tmp_path / "edu1.sock"), END_SECONDS)
        assert vendor(other) == 0x1234
        other.close()
        assert process.poll() is None
    finally:
        process.terminate()
        assert process.wait(END_SECONDS) == 0
