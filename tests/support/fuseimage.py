# SPDX-License-Identifier: GPL-2.0-or-later
"""An image on a FUSE filesystem (<linux/fuse.h>) whose server holds requests, or answers them with an errno.

A process that is killed while it waits for a request of its own never ends. So /dev/fuse belongs to a child, which
passes messages on, and which is killed when the thread that has started it ends: that ends the filesystem.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["FALLOCATE", "FSYNC", "OPEN", "READ", "WRITE", "FuseImage", "fuse_image"]

_LOOKUP, _FORGET, _GETATTR, _SETATTR, OPEN, READ, WRITE, _RELEASE = 1, 2, 3, 4, 14, 15, 16, 18
FSYNC, _INIT, _INTERRUPT, _BATCH_FORGET, FALLOCATE = 20, 26, 36, 42, 43
_NO_REPLY = (_FORGET, _INTERRUPT, _BATCH_FORGET)
_IN_HEADER = struct.Struct("<IIQQIIII")
_OUT_HEADER = struct.Struct("<IiQ")
_ATTR = struct.Struct("<6Q10I")
_IO = struct.Struct("<QQI20x")
"""fuse_read_in and fuse_write_in: handle, offset, size"""
_ROOT, _FILE = 1, 2
_DIRECT_IO, _NO_FLUSH = 1 << 0, 1 << 5
"""flags of an open file; without FLUSH the process that serves it can exit while it is open"""
_MNT_DETACH = 2
_PUNCH_HOLE = 2
_SO_SNDBUFFORCE = 32

_MAX_WRITE = 1 << 17
_PASSER = """
import ctypes, os, select, signal, socket, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
device, sock = int(sys.argv[1]), socket.socket(fileno=int(sys.argv[2]))
while True:
    ready = select.select([device, sock], [], [])[0]
    try:
        if device in ready:
            sock.send(os.read(device, 1 << 18))
        if sock in ready:
            message = sock.recv(1 << 18)
            if not message:
                break
            os.write(device, message)
    except FileNotFoundError:
        pass  # nobody waits for the answer any more
    except OSError:
        break  # unmounted
"""

_libc = ctypes.CDLL(None, use_errno=True)


class FuseImage:
    """Serves one file in a thread. Nothing of it is in the page cache."""

    def __init__(self, directory: Path, size: int, *, is_read_only: bool) -> None:
        """Mounts the filesystem at the directory. Raises OSError."""
        self.path = directory / "image"
        self.content = bytearray(size)
        self.durable = bytes(size)
        """the content at the last FSYNC"""
        self._is_read_only = is_read_only
        self.errors: dict[int, int] = {}
        """errno by opcode"""
        self.held: set[int] = set()
        """opcodes that are not answered until release()"""
        self.waiting: list[tuple[int, int, bytes]] = []
        """the requests that wait: opcode, unique number, body"""
        self.seen: list[int] = []
        """opcodes of requests for the content"""
        self._directory = os.fsencode(directory)
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        try:
            options = f"fd={device},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()}"
            if _libc.mount(b"image", self._directory, b"fuse", 0, options.encode()):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "fuse")
            self._lock = threading.Lock()
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            for end in (self._socket, theirs):
                end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 4 * _MAX_WRITE)
            is_started = threading.Event()

            def serve() -> None:
                fds = (device, theirs.fileno())
                command = [sys.executable, "-S", "-c", _PASSER, *map(str, fds)]
                with subprocess.Popen(command, pass_fds=fds):
                    is_started.set()
                    with contextlib.suppress(ConnectionResetError):  # unmounted
                        self._serve()

            self._thread = threading.Thread(target=serve, daemon=True)
            self._thread.start()
            is_started.wait()
            theirs.close()
        finally:
            os.close(device)

    def release(self, count: int | None = None) -> None:
        """Answers what waits, or the first so many; without a number, nothing is held any more."""
        with self._lock:
            if count is None:
                self.held.clear()
            released = self.waiting[:count]
            del self.waiting[:count]
        for opcode, unique, body in released:
            self._answer(opcode, unique, _FILE, body)

    def close(self) -> None:
        """Unmounts the filesystem, which ends the server."""
        self.release()
        _libc.umount2(self._directory, _MNT_DETACH)
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while request := self._socket.recv(2 * _MAX_WRITE):
            _, opcode, unique, node, _, _, _, _ = _IN_HEADER.unpack_from(request)
            body = request[_IN_HEADER.size :]
            with self._lock:
                if opcode in (READ, WRITE, FSYNC, FALLOCATE):
                    self.seen.append(opcode)
                if opcode in self.held:
                    self.waiting.append((opcode, unique, body))
                    continue
            if opcode not in _NO_REPLY:
                self._answer(opcode, unique, node, body)

    def _answer(self, opcode: int, unique: int, node: int, body: bytes) -> None:
        error = self.errors.get(opcode, 0)
        content = b""
        if not error:
            error, content = self._do(opcode, node, body)
        header = _OUT_HEADER.pack(_OUT_HEADER.size + len(content), -error, unique)
        with contextlib.suppress(BrokenPipeError):  # unmounted
            self._socket.send(header + content)

    def _do(self, opcode: int, node: int, body: bytes) -> tuple[int, bytes]:
        """The errno and what follows the header."""
        if opcode == _INIT:
            return 0, struct.pack("<IIIIHHII36x", 7, 31, 0, 1 << 5, 0, 0, _MAX_WRITE, 1)  # FUSE_BIG_WRITES
        if opcode == _LOOKUP:
            return 0, struct.pack("<QQQQII", _FILE, 0, 0, 0, 0, 0) + self._attributes(_FILE)
        if opcode in (_GETATTR, _SETATTR):
            return 0, struct.pack("<QII", 0, 0, 0) + self._attributes(node)
        if opcode == OPEN and self._is_read_only and int.from_bytes(body[:4], "little") & os.O_ACCMODE:
            return errno.EROFS, b""
        if opcode == OPEN:
            return 0, struct.pack("<QII", 0, _DIRECT_IO | _NO_FLUSH, 0)
        if opcode == READ:
            _, offset, size = _IO.unpack_from(body)
            return 0, bytes(self.content[offset : offset + size])
        if opcode == WRITE:
            _, offset, size = _IO.unpack_from(body)
            self.content[offset : offset + size] = body[_IO.size : _IO.size + size]
            return 0, struct.pack("<II", size, 0)
        if opcode == FSYNC:
            self.durable = bytes(self.content)
        if opcode == FALLOCATE:
            _, offset, length, mode = struct.unpack_from("<QQQI", body)
            if not mode & _PUNCH_HOLE:
                return errno.EOPNOTSUPP, b""
            self.content[offset : offset + length] = bytes(length)
            return 0, b""
        return (0, b"") if opcode in (_RELEASE, FSYNC) else (errno.ENOSYS, b"")

    def _attributes(self, node: int) -> bytes:
        mode = stat.S_IFDIR | 0o755 if node == _ROOT else stat.S_IFREG | 0o600
        return _ATTR.pack(
            node, len(self.content), 0, 0, 0, 0, 0, 0, 0, mode, 1, os.geteuid(), os.getegid(), 0, 4096, 0
        )


@contextmanager
def fuse_image(directory: Path, size: int = 1 << 20, *, is_read_only: bool = False) -> Iterator[FuseImage]:
    """Skips the test where FUSE can't be mounted."""
    directory.mkdir()
    try:
        image = FuseImage(directory, size, is_read_only=is_read_only)
    except OSError as error:
        pytest.skip(f"needs to mount a FUSE filesystem: {error.strerror}")
    try:
        yield image
    finally:
        image.close()
