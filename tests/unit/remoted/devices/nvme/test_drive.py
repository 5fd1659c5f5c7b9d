# SPDX-License-Identifier: GPL-2.0-or-later
"""What the nvme model stores blocks in: which images it takes, its locks, and a full filesystem."""

from __future__ import annotations

import errno
import logging
import os
import resource
import stat
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from common.errors import UsageError
from common.fdstore import FdStore
from common.journal import RateLimited
from common.keptfiles import KeptFiles
from common.loop import Loop
from remoted.devices.nvme import image as image_module
from remoted.devices.nvme.drive import Drive, open_drive
from tests.support.fds import count_fds
from tests.support.filesystems import small_filesystem
from tests.support.fuseimage import OPEN, fuse_image
from tests.support.nvmedriver import driver
from tests.support.storemanager import StoreManager
from tests.support.wait import wait_until

WRITE, WRITE_ZEROES = 0x01, 0x08
CAPACITY_EXCEEDED, WRITE_FAULT = 0x081, 0x280
MEBIBYTE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(MEBIBYTE))
    return path


@contextmanager
def opened(text: str) -> Iterator[Drive]:
    drive = open_drive(text, None)
    try:
        yield drive
    finally:
        drive.close()


class TestWhatIsRefused:
    def complaint(self, text: str) -> str:
        before = count_fds()
        with pytest.raises(UsageError) as refusal:
            open_drive(text, None)
        assert count_fds() == before
        assert "\n" not in str(refusal.value)
        return str(refusal.value)

    def test_a_file_that_does_not_exist(self, tmp_path: Path) -> None:
        text = f"drive=file:{tmp_path}/none"
        assert self.complaint(text.removeprefix("drive=")) == f"{text}: No such file or directory"
        assert not (tmp_path / "none").exists()

    def test_what_is_no_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        for path in ("/dev/null", str(tmp_path / "fifo")):
            text = f"file:{path}"
            assert self.complaint(text) == f"drive={text}: is neither a file nor a block device"
        assert self.complaint(f"file:{tmp_path}") == f"drive=file:{tmp_path}: Is a directory"

    def test_a_path_with_a_null_byte(self) -> None:
        assert "embedded null" in self.complaint("file:a\0b")

    def test_an_image_in_use(self, image: Path) -> None:
        with opened(f"file:{image}"):
            complaint = f"drive=file:{image}: is in use by another process"
            assert self.complaint(f"file:{image}") == complaint
        with opened(f"file:{image}"):
            pass


def test_flags_of_the_fd(image: Path) -> None:
    with opened(f"file:{image}") as drive:
        assert not os.get_inheritable(drive._fd)
        assert os.get_blocking(drive._fd)


class TestReadOnly:
    def test_readers_share_an_image(self, tmp_path: Path) -> None:
        with (
            fuse_image(tmp_path / "fuse", is_read_only=True) as image,
            opened(f"file:{image.path}") as first,
            opened(f"file:{image.path}") as second,
        ):
            assert first.is_read_only
            assert second.is_read_only

    def test_a_writer_excludes_readers(self, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with opened(f"file:{image}"):
            refuse_writers(monkeypatch)
            with pytest.raises(UsageError, match="is in use"):
                open_drive(f"file:{image}", None)

    def test_a_reader_excludes_writers(self, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        refuse_writers(monkeypatch)
        with opened(f"file:{image}") as reader:
            assert reader.is_read_only
            monkeypatch.undo()
            with pytest.raises(UsageError, match="is in use"):
                open_drive(f"file:{image}", None)


def refuse_writers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets open() answer as for an image that this user may only read, which root can't have."""
    real = os.open

    def refusing(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_ACCMODE:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refusing)


class TestFilesystemsThatDoNotAnswer:
    def test_open(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The image is closed when it has been opened at last."""
        monkeypatch.setattr(image_module, "_OPEN_SECONDS", 0.05)
        with fuse_image(tmp_path / "fuse") as image:
            image.held.add(OPEN)
            before = count_fds()
            with pytest.raises(UsageError) as refusal:
                open_drive(f"file:{image.path}", None)
            complaint = "its filesystem has not opened it within 0.05 s"
            assert str(refusal.value) == f"drive=file:{image.path}: {complaint}"
            wait_until(lambda: image.waiting, "the thread waits")
            image.release()
            wait_until(lambda: "nvme" not in [each.name for each in threading.enumerate()], "it has ended")
            assert count_fds() == before
            monkeypatch.undo()
            with opened(f"file:{image.path}"):
                pass

    def test_close(self, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It goes on in a thread."""
        answer = threading.Event()
        closed: list[int] = []

        def close(fd: int) -> None:
            answer.wait()
            closed.append(fd)

        with monkeypatch.context() as patch:
            patch.setattr(os, "close", close)
            drive = open_drive(f"file:{image}", None)
            fd = drive._fd
            drive.close()
            assert drive.is_closed
            assert closed == []
            answer.set()
            wait_until(lambda: closed == [fd], "it is closed")
        os.close(fd)


def test_a_full_filesystem(loop: Loop, tmp_path: Path) -> None:
    """The command fails, the guest can go on, and what fits is written once there is room."""
    with small_filesystem(tmp_path / "small", 4 * MEBIBYTE) as folder:
        image, ballast = folder / "image", folder / "ballast"
        with image.open("wb") as file:
            file.truncate(8 * MEBIBYTE)
        ballast.write_bytes(bytes(3 * MEBIBYTE))
        with driver(loop, drive=f"file:{image}") as nvme:
            nvme.enable()
            queue = nvme.create_pair()
            buffer, pages = nvme.allocate(128 * 4096), nvme.allocate()
            nvme.store(pages, b"".join((buffer + 4096 * i).to_bytes(8, "little") for i in range(1, 128)))
            fields = {"nsid": 1, "prp1": buffer, "prp2": pages, "cdw12": 1023}
            statuses = [nvme.run(queue, WRITE, cdw10=1024 * i, **fields).status for i in range(4)]
            assert statuses[0] == 0
            assert statuses[-1] == CAPACITY_EXCEEDED
            (text,) = nvme.function.amiss.texts()
            assert text == "the drive has failed: writing 524288 bytes at 0x180000: No space left on device"
            ballast.unlink()
            assert nvme.run(queue, WRITE, cdw10=1024 * 3, **fields).status == 0


def test_a_limit_of_the_file_size(loop: Loop, image: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with driver(loop, drive=f"file:{image}") as nvme:
        nvme.enable()
        queue = nvme.create_pair()
        buffer = nvme.allocate()
        resource.setrlimit(resource.RLIMIT_FSIZE, (MEBIBYTE // 2, limits[1]))
        try:
            assert nvme.run(queue, WRITE, nsid=1, prp1=buffer, cdw10=2000).status == WRITE_FAULT
            assert nvme.run(queue, WRITE, nsid=1, prp1=buffer, cdw10=1).status == 0
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_block_device(loop: Loop) -> None:
    """Takes its size from the device; a loop device where there is one to be had."""
    devices = [Path(f"/dev/loop{i}") for i in range(8)]
    found = [each for each in devices if each.exists() and stat.S_ISBLK(each.stat().st_mode) and size(each)]
    if not found:
        pytest.skip("needs a block device with a medium: none of /dev/loop0 to /dev/loop7 has one")
    with driver(loop, drive=f"file:{found[0]}") as nvme:
        nvme.enable()


def size(device: Path) -> int:
    with device.open("rb") as file:
        return file.seek(0, os.SEEK_END)


class TestKeptMemory:
    @pytest.fixture
    def manager(self, tmp_path: Path) -> Iterator[StoreManager]:
        with closing(StoreManager(tmp_path)) as manager:
            yield manager

    def open(self, loop: Loop, manager: StoreManager, size: str) -> Drive:
        """As a process does that comes after another one."""
        store = FdStore(loop, RateLimited(logging.getLogger("test")), manager.address, manager.hand_over())
        try:
            return open_drive(f"memory:{size}", KeptFiles(store, "28.own-"))
        finally:
            manager.serve()
            store.close()

    def test_the_next_process_has_it(self, loop: Loop, manager: StoreManager) -> None:
        first = self.open(loop, manager, "1M")
        first.write(5000, [b"kept"], is_durable=False)
        first.close()
        second = self.open(loop, manager, "1M")
        assert second.read(5000, 4) == b"kept"
        second.close()

    def test_memory_of_another_size_is_new(self, loop: Loop, manager: StoreManager) -> None:
        first = self.open(loop, manager, "1M")
        first.write(0, [b"lost"], is_durable=False)
        first.close()
        for expected in (bytes(4), b"kept"):
            drive = self.open(loop, manager, "2M")
            assert drive.size == 2 << 20
            assert drive.read(0, 4) == expected
            drive.write(0, [b"kept"], is_durable=False)
            drive.close()
