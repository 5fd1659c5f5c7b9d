# SPDX-License-Identifier: GPL-2.0-or-later
"""The statistics that KVM keeps of a vCPU, since Linux 5.14.

Source: KVM_GET_STATS_FD in Documentation/virt/kvm/api.rst.
"""

from __future__ import annotations

import os
from ctypes import sizeof

from proxyd.kvm.kvm_h import kvm_stats_desc, kvm_stats_header

__all__ = ["VcpuStats"]

_INTERRUPTS = b"irq_injections"
_VALUE_SIZE = 8


class VcpuStats:
    """A vCPU's statistics. Any thread may read them."""

    def __init__(self, fd: int) -> None:
        """Takes ownership of a statistics fd. Raises OSError, upon which it is closed."""
        self._fd = fd
        try:
            self._interrupts = self._find(_INTERRUPTS)
        except BaseException:
            self.close()
            raise

    def interrupts(self) -> int:
        """How many interrupts were injected into the guest; 0 where KVM doesn't count them. Raises OSError."""
        if self._interrupts is None:
            return 0
        return int.from_bytes(os.pread(self._fd, _VALUE_SIZE, self._interrupts), "little")

    def close(self) -> None:
        """Closes the fd; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd != -1:
            os.close(fd)

    def _find(self, name: bytes) -> int | None:
        """Where the value of a statistic is in the file; None if there is none of that name."""
        header = kvm_stats_header.from_buffer_copy(os.pread(self._fd, sizeof(kvm_stats_header), 0))
        stride = sizeof(kvm_stats_desc) + header.name_size
        descriptions = os.pread(self._fd, header.num_desc * stride, header.desc_offset)
        for at in range(0, len(descriptions), stride):
            text = descriptions[at + sizeof(kvm_stats_desc) : at + stride]
            if text.partition(b"\0")[0] == name:
                return int(header.data_offset + kvm_stats_desc.from_buffer_copy(descriptions, at).offset)
        return None
