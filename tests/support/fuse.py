# SPDX-License-Identifier: GPL-2.0-or-later
"""A file whose close lasts, on a FUSE filesystem whose server leaves FLUSH unanswered (<linux/fuse.h>)."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["StallingFile", "stalling_file"]

_LOOKUP, _FORGET, _GETATTR, _OPEN, _RELEASE, _FLUSH, _INIT = 1, 2, 3, 14, 18, 25, 26
_INTERRUPT, _BATCH_FORGET = 36, 42
_NO_REPLY = (_FORGET, _INTERRUPT, _BATCH_FORGET)
_IN_HEADER = struct.Struct("<IIQQIIII")
_OUT_HEADER = struct.Struct("<IiQ")
_ATTR = struct.Struct("<6Q10I")
_ROOT, _FILE = 1, 2
_MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


class StallingFile:
    """Serves one file, in a thread. The victim's closes of it wait for release(), even after SIGKILL."""

    def __init__(self, directory: Path) -> None:
        """Mounts the filesystem at the directory. Raises OSError."""
        self.path = directory / "file"
        self.victim = -1
        """the pid of the process"""
        self.has_stalled = False
        """whether a close waits"""
        self._directory = os.fsencode(directory)
        self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._device},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()}"
        if _libc.mount(b"stalling", self._directory, b"fuse", 0, options.encode()):
            os.close(self._device)
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "fuse")
        self._uniques: list[int] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Lets the closes end. A second call does nothing."""
        while self._uniques:
            os.write(self._device, _OUT_HEADER.pack(_OUT_HEADER.size, 0, self._uniques.pop()))

    def close(self) -> None:
        """Unmounts the filesystem, which ends the server."""
        self.release()
        _libc.umount2(self._directory, _MNT_DETACH)
        self._thread.join()
        os.close(self._device)

    def _serve(self) -> None:
        while True:
            try:
                request = os.read(self._device, 1 << 17)
            except OSError as error:
                if error.errno == errno.ENODEV:  # unmounted
                    return
                raise
            _, opcode, unique, node, _, _, pid, _ = _IN_HEADER.unpack_from(request)
            if opcode == _FLUSH and os.path.exists(f"/proc/{self.victim}/task/{pid}"):
                self._uniques.append(unique)
                self.has_stalled = True
            elif opcode not in _NO_REPLY:
                error_number, body = _answer(opcode, node)
                os.write(
                    self._device, _OUT_HEADER.pack(_OUT_HEADER.size + len(body), -error_number, unique) + body
                )


def _answer(opcode: int, node: int) -> tuple[int, bytes]:
    """The errno and what follows the header."""
    if opcode == _INIT:
        return 0, struct.pack("<IIIIHHII36x", 7, 31, 0, 0, 0, 0, 4096, 1)
    if opcode == _LOOKUP:
        return 0, struct.pack("<QQQQII", _FILE, 0, 0, 0, 0, 0) + _attributes(_FILE)
    if opcode == _GETATTR:
        return 0, struct.pack("<QII", 0, 0, 0) + _attributes(node)
    if opcode == _OPEN:
        return 0, struct.pack("<QII", 0, 0, 0)
    return (0, b"") if opcode in (_RELEASE, _FLUSH) else (errno.ENOSYS, b"")


def _attributes(node: int) -> bytes:
    mode = stat.S_IFDIR | 0o755 if node == _ROOT else stat.S_IFREG | 0o600
    return _ATTR.pack(node, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, os.geteuid(), os.getegid(), 0, 4096, 0)


@contextmanager
def stalling_file(directory: Path) -> Iterator[StallingFile]:
    """Skips the test where FUSE can't be mounted."""
    directory.mkdir()
    try:
        file = StallingFile(directory)
    except OSError as error:
        pytest.skip(f"needs to mount a FUSE filesystem: {error.strerror}")
    try:
        yield file
    finally:
        file.close()
