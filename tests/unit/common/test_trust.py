# SPDX-License-Identifier: GPL-2.0-or-later
"""Whom the daemons trust: files on the way to a socket, and processes behind it."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.errors import UntrustedError, UsageError
from common.trust import Trust, _private_group, find_user
from tests.support.fds import no_fd_is_left

STRANGER = 54321

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make files of other users")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory that the tests' path leads through."""
    path = tmp_path / "place"
    path.mkdir(0o755)
    (path / "inner").mkdir(0o755)
    return path


def listen(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    return sock


def test_directories_of_root_and_of_oneself_are_trusted(place: Path) -> None:
    Trust().check_directory(place / "inner")
    Trust().check_directory("/")


def belong_to_another_user(place: Path) -> None:
    os.chown(place, STRANGER, 0)


def be_open_to_everybody(place: Path) -> None:
    place.chmod(0o777)


def be_open_to_a_group(place: Path) -> None:
    os.chown(place, 0, STRANGER)
    place.chmod(0o775)


def belong_to_another_user_with_the_sticky_bit(place: Path) -> None:
    os.chown(place, STRANGER, 0)
    place.chmod(0o1777)


CHANGES: dict[Callable[[Path], None], str] = {
    belong_to_another_user: f"place belongs to user {STRANGER}",
    be_open_to_everybody: r"place can be written by everybody \(mode 0777\)",
    be_open_to_a_group: rf"place can be written by group {STRANGER} \(mode 0775\)",
    belong_to_another_user_with_the_sticky_bit: f"place belongs to user {STRANGER}",
}


@pytest.mark.parametrize("change", CHANGES)
def test_directory_on_the_way_that_others_can_change_is_refused(
    place: Path, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    complaint = CHANGES[change]
    change(place)
    for directory in (place, place / "inner"):
        with pytest.raises(UntrustedError, match=complaint):
            Trust().check_directory(directory)
    with listen(place / "inner" / "s"), pytest.raises(UntrustedError, match=complaint):
        Trust().check_socket(place / "inner" / "s")
    monkeypatch.chdir(place / "inner")
    with pytest.raises(UntrustedError, match=complaint):
        Trust().check_directory("")


def test_directory_with_the_sticky_bit_is_no_reason_but_a_strangers_file_in_it_is(place: Path) -> None:
    place.chmod(0o1777)
    Trust().check_directory(place / "inner")
    with listen(place / "s"):
        Trust().check_socket(place / "s")
        os.chown(place / "s", STRANGER, 0)
        with pytest.raises(UntrustedError, match=f"s belongs to user {STRANGER}, who is not trusted"):
            Trust().check_socket(place / "s")
        Trust([STRANGER]).check_socket(place / "s")


def test_users_that_are_listed_are_trusted_with_their_directories(place: Path) -> None:
    os.chown(place, STRANGER, STRANGER)
    Trust([STRANGER]).check_directory(place / "inner")
    with pytest.raises(UntrustedError):
        Trust([STRANGER + 1]).check_directory(place / "inner")


def test_a_group_with_no_other_member_is_no_reason(place: Path) -> None:
    """As a user's own group is, on distributions whose umask is 002."""
    user = pwd.getpwuid(0)
    if grp.getgrgid(user.pw_gid).gr_mem or grp.getgrgid(user.pw_gid).gr_name != user.pw_name:
        pytest.skip("root has no group of its own here")
    place.chmod(0o775)
    Trust().check_directory(place)
    os.chown(place, 0, STRANGER)
    with pytest.raises(UntrustedError, match=f"can be written by group {STRANGER}"):
        Trust().check_directory(place)


@pytest.mark.parametrize(
    ("name", "members"), [("root", ["somebody"]), ("wheel", [])], ids=["a member", "not the user's own"]
)
def test_a_group_that_others_may_be_in_is_a_reason(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str, members: list[str]
) -> None:
    monkeypatch.setattr(grp, "getgrgid", lambda gid: grp.struct_group((name, "x", gid, members)))
    place.chmod(0o775)
    _private_group.cache_clear()
    try:
        with pytest.raises(UntrustedError, match="can be written by group 0"):
            Trust().check_directory(place)
    finally:
        _private_group.cache_clear()


def test_a_user_whom_an_acl_lets_write_counts_also_where_the_group_does_not(place: Path) -> None:
    user = pwd.getpwuid(0)
    if grp.getgrgid(user.pw_gid).gr_mem or grp.getgrgid(user.pw_gid).gr_name != user.pw_name:
        pytest.skip("root has no group of its own here")
    entries = [(1, 7, -1), (2, 7, STRANGER), (4, 5, -1), (0x10, 7, -1), (0x20, 5, -1)]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    try:
        os.setxattr(place, "system.posix_acl_access", acl)
    except OSError as error:
        pytest.skip(f"the filesystem has no ACLs: {error.strerror}")
    with pytest.raises(UntrustedError, match=r"can be written by group 0 \(mode 0775\)"):
        Trust().check_directory(place)


def test_symbolic_links_are_followed_and_belong_to_somebody(place: Path, tmp_path: Path) -> None:
    os.symlink("place/inner", tmp_path / "near")
    os.symlink(place, tmp_path / "far")
    Trust().check_directory(tmp_path / "near" / ".." / "inner")
    Trust().check_directory(tmp_path / "far" / "inner")
    os.chown(tmp_path / "far", STRANGER, STRANGER, follow_symlinks=False)
    with pytest.raises(UntrustedError, match=f"far belongs to user {STRANGER}"):
        Trust().check_directory(tmp_path / "far" / "inner")
    os.chown(place, STRANGER, STRANGER)
    with pytest.raises(UntrustedError, match=f"place belongs to user {STRANGER}"):
        Trust().check_directory(tmp_path / "near")


def test_symbolic_links_in_a_circle_and_files_that_are_missing_are_errors_of_the_system(place: Path) -> None:
    os.symlink("circle", place / "circle")
    for path in (place / "circle", place / "missing" / "s", place / "missing"):
        with pytest.raises(OSError, match=path.name[0]):
            Trust().check_socket(path)


@pytest.mark.parametrize("links", [40, 41])
def test_as_many_symbolic_links_are_followed_as_the_kernel_follows(place: Path, links: int) -> None:
    os.symlink("inner", place / "link0")
    for number in range(1, links):
        os.symlink(f"link{number - 1}", place / f"link{number}")
    path = place / f"link{links - 1}"
    errors = []
    for look in (os.stat, Trust().check_directory):
        try:
            look(path)
            errors.append(0)
        except OSError as error:
            errors.append(error.errno or -1)
    assert errors == [0 if links == 40 else errno.ELOOP] * 2


@pytest.mark.parametrize("length", [107, 108])
def test_a_path_that_is_too_long_for_a_socket_is_told_by_its_errno(length: int) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory, socket.socket(socket.AF_UNIX) as sock:
        path = directory + "/" + "x" * (length - len(directory) - 1)
        with pytest.raises(OSError, match=r"No such|too long") as error:
            Trust().connect(sock, path)
    assert error.value.errno == (errno.ENOENT if length == 107 else errno.ENAMETOOLONG)


def test_root_and_oneself_are_trusted_and_nobody_else() -> None:
    os.seteuid(STRANGER)
    try:
        assert [Trust().includes(uid) for uid in (0, STRANGER, STRANGER + 1)] == [True, True, False]
    finally:
        os.seteuid(0)


LISTENER = """
import os, socket, sys
os.setuid(int(sys.argv[2]))
sock = socket.socket(fileno=int(sys.argv[1]))
sock.listen()
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture
def strangers_socket(place: Path) -> Iterator[Path]:
    """A socket of root at which a process of another user listens."""
    path = place / "s"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        process = subprocess.Popen(
            [sys.executable, "-c", LISTENER, str(sock.fileno()), str(STRANGER)],
            pass_fds=[sock.fileno()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
    with process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        yield path
        process.stdin.close()


def test_who_listens_must_be_trusted_whoever_owns_the_socket(strangers_socket: Path) -> None:
    with no_fd_is_left():
        with (
            socket.socket(socket.AF_UNIX) as sock,
            pytest.raises(UntrustedError, match=rf"\[\d+\] belongs to user {STRANGER}, who is not trusted"),
        ):
            Trust().connect(sock, strangers_socket)
        with socket.socket(socket.AF_UNIX) as sock:
            Trust([STRANGER]).connect(sock, strangers_socket)


def test_connect_doesnt_touch_a_strangers_socket(place: Path) -> None:
    with listen(place / "s") as server, socket.socket(socket.AF_UNIX) as sock:
        os.chown(place / "s", STRANGER, STRANGER)
        server.setblocking(False)
        with pytest.raises(UntrustedError):
            Trust().connect(sock, place / "s")
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize(("name", "uid"), [("root", 0), ("0", 0), ("4294967294", 4294967294)])
def test_find_user(name: str, uid: int) -> None:
    assert find_user(name) == uid


@pytest.mark.parametrize(
    "name", ["", "no-such-user", "a\0b", "-1", "4294967295", "99999999999", "٣", "ro ot"]
)
def test_user_that_there_isnt(name: str) -> None:
    with pytest.raises(UsageError, match=r"^there is no user '"):
        find_user(name)


@pytest.fixture
def roots_own() -> Iterator[Path]:
    """A directory that nobody but root can have made, as all above it."""
    with tempfile.TemporaryDirectory(dir="/run") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


def test_root_appoints_a_user_by_a_directory(roots_own: Path) -> None:
    directory = roots_own / "vm1"
    directory.mkdir()
    os.chown(directory, STRANGER, STRANGER)
    listen(directory / "sock").close()
    os.chown(directory / "sock", STRANGER, STRANGER)
    with pytest.raises(UntrustedError):
        Trust().check_socket(directory / "sock")
    trust = Trust([7]).with_appointed(directory)
    trust.check_socket(directory / "sock")
    assert trust.others == {7, STRANGER}


@pytest.mark.parametrize("change", [*CHANGES, lambda place: place.chmod(0o1777)])
def test_nobody_is_appointed_where_others_may_have_made_the_directory(
    roots_own: Path, change: Callable[[Path], None]
) -> None:
    place = roots_own / "place"
    (place / "between/vm1").mkdir(parents=True)
    os.chown(place / "between/vm1", STRANGER, STRANGER)
    assert Trust().with_appointed(place / "between/vm1").others
    change(place)
    assert not Trust().with_appointed(place / "between/vm1").others


def test_a_link_appoints_nobody(roots_own: Path) -> None:
    (roots_own / "real/vm1").mkdir(parents=True)
    os.chown(roots_own / "real/vm1", STRANGER, STRANGER)
    (roots_own / "way").symlink_to("real")
    (roots_own / "real/vm2").symlink_to("vm1")
    os.chown(roots_own / "real/vm2", STRANGER, STRANGER, follow_symlinks=False)
    for path in (roots_own / "way/vm1", roots_own / "real/vm2", roots_own / "absent"):
        assert not Trust().with_appointed(path).others
