# SPDX-License-Identifier: GPL-2.0-or-later
"""The RAM of a guest that proxyd runs: KVM, this process and, for DMA, every remote have it mapped."""

from __future__ import annotations

import fcntl
import mmap
import os

from common import mpqemu

__all__ = ["Ram"]


class Ram:
    """RAM from guest-physical address 0 up, in a memfd of its size that can't be truncated."""

    def __init__(self, size: int) -> None:
        """``size`` in bytes, a multiple of the page size. Raises OSError."""
        fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self.mapping = mmap.mmap(fd, size)
            self.mapping.madvise(mmap.MADV_DONTDUMP)
        except BaseException:
            os.close(fd)
            raise
        self.fd = fd

    @property
    def sysmem(self) -> bytes:
        """The payload of a SYNC_SYSMEM that goes with ``fd``."""
        unused = (0,) * (mpqemu.MAX_FDS - 1)
        return mpqemu.SYSMEM.pack(0, *unused, len(self.mapping), *unused, 0, *unused)

    def close(self) -> None:
        """Unmaps it here, which KVM must have done; a second call does nothing."""
        fd, self.fd = self.fd, -1
        if fd != -1:
            self.mapping.close()
            os.close(fd)
