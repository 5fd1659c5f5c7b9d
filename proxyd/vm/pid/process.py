# SPDX-License-Identifier: GPL-2.0-or-later
"""A process that may have a KVM VM: whether it can be made to make system calls, and which fd its VM is.

Needs CAP_SYS_PTRACE, or the process's own user where Yama doesn't object; with the former alone /proc/PID/fd
can't be listed, so then every fd number is tried.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Self

from common.errors import IohubError, PeerGone, UsageError
from proxyd.vm.pid import ptrace
from proxyd.vm.pid.landmarks import find_vdso

__all__ = ["Process"]

_KVM_VM = "anon_inode:kvm-vm"
_ELF_64 = b"\x7fELF\x02"  # EI_CLASS is ELFCLASS32 in the vdso of i386 and x32 programs


class Process:
    """One process, held by a pidfd: never another one that got its number."""

    def __init__(self, pid: int) -> None:
        """Raises UsageError if there is none with this number (EINVAL: a thread's), or not on x86-64."""
        machine = os.uname().machine
        if machine != "x86_64":
            raise UsageError(f"pid:{pid}: works on x86-64 only, this is {machine}")
        self.pid = pid
        try:
            self.pidfd = os.pidfd_open(pid)
        except OverflowError as error:
            raise UsageError(f"pid:{pid}: no such process") from error
        except OSError as error:
            raise UsageError(f"pid:{pid}: {error.strerror}") from error

    def refuse_unfit(self) -> dict[str, str]:
        """The fields of /proc/PID/status. Raises UsageError if the process can't be stopped or make calls."""
        try:
            with open(f"/proc/{self.pid}/status", encoding="utf-8", errors="replace") as file:
                status = {key: value.strip() for key, _, value in (line.partition(":") for line in file)}
        except OSError as error:
            raise UsageError(f"pid:{self.pid}: can't be examined: {error.strerror}") from error
        if status["State"][0] in "ZX":
            raise UsageError(f"pid:{self.pid}: its main thread has exited")
        if status["TracerPid"] != "0":
            raise UsageError(f"pid:{self.pid}: is traced by process {status['TracerPid']} already")
        if status.get("Seccomp", "0") != "0":
            raise UsageError(f"pid:{self.pid}: is under seccomp, which may kill it (QEMU: -sandbox off)")
        return status

    def refuse_foreign_architecture(self) -> None:
        """Raises UsageError unless it is an x86-64 program, OSError if it can't be read."""
        vdso = find_vdso(self.pid)
        if vdso is not None and ptrace.read_memory(self.pid, vdso, len(_ELF_64)) != _ELF_64:
            raise UsageError(f"pid:{self.pid}: isn't an x86-64 program")

    def find_vm(self, table_size: int) -> int:
        """The number of its kvm-vm fd. ``table_size`` bounds its fd numbers (FDSize of /proc/PID/status).

        Raises UsageError if there is none, or several that aren't one and the same VM; OSError.
        """
        found: dict[int, int] = {}
        with ExitStack() as copies:
            for number in self._fd_candidates(table_size):
                copy = self._copy_of_vm(number)
                if copy is None:
                    continue
                copies.callback(os.close, copy)
                if not any(ptrace.same_file(copy, other) for other in found.values()):
                    found[number] = copy
        if len(found) > 1:
            raise UsageError(f"pid:{self.pid}: has {len(found)} VMs, can't tell which is meant")
        if not found:
            raise UsageError(f"pid:{self.pid}: has no KVM virtual machine")
        return next(iter(found))

    def check_vm(self, number: int) -> None:
        """Raises PeerGone unless this fd of the process is a VM still, OSError."""
        copy = self._copy_of_vm(number)
        if copy is None:
            raise PeerGone(f"pid:{self.pid}: its VM is gone")
        os.close(copy)

    @contextmanager
    def explained(self, kind: type[IohubError]) -> Iterator[None]:
        """Turns an OSError into one line of this kind, PeerGone if it says that the process has exited."""
        try:
            yield
        except PermissionError as error:
            needed = "CAP_SYS_PTRACE, or the process's user and kernel.yama.ptrace_scope=0"
            reason = f"{error.filename} is not permitted: it needs {needed}"
            raise kind(f"pid:{self.pid}: {reason}") from error
        except (ProcessLookupError, FileNotFoundError) as error:  # the latter of its folder in /proc
            raise PeerGone(f"pid:{self.pid}: has exited") from error
        except OSError as error:
            raise kind(f"pid:{self.pid}: {error.filename}: {error.strerror}") from error

    def close(self) -> None:
        """Closes the pidfd; a second call does nothing."""
        pidfd, self.pidfd = self.pidfd, -1
        if pidfd != -1:
            os.close(pidfd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _fd_candidates(self, table_size: int) -> list[int]:
        directory = f"/proc/{self.pid}/fd"
        try:
            numbers = [int(name) for name in os.listdir(directory)]
        except PermissionError:
            return list(range(table_size))
        return [number for number in numbers if _link(f"{directory}/{number}") == _KVM_VM]

    def _copy_of_vm(self, number: int) -> int | None:
        """A copy of an fd of the process, None if that isn't a VM. It keeps the VM alive: close it soon."""
        try:
            copy = ptrace.pidfd_getfd(self.pidfd, number)
        except OSError as error:
            if error.errno == errno.EBADF:
                return None
            raise
        if _link(f"/proc/self/fd/{copy}") == _KVM_VM:
            return copy
        os.close(copy)
        return None


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except FileNotFoundError:
        return ""
