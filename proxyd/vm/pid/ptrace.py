# SPDX-License-Identifier: GPL-2.0-or-later
"""ptrace(2) and its neighbours on x86-64, thin: one wrapper a request, a failure is an OSError with its name.

Requests on a tracee belong to the thread that seized it, and all but ``interrupt`` need it to be stopped.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import Structure, byref, c_int, c_long, c_size_t, c_uint32, c_uint64, c_void_p, sizeof

__all__ = [
    "NSIG_MASK",
    "PTRACE_EVENT_STOP",
    "PTRACE_O_TRACESYSGOOD",
    "cont",
    "cont_to_syscall",
    "detach",
    "get_rseq",
    "get_signal_mask",
    "get_xstate",
    "getregs",
    "grow_stack",
    "interrupt",
    "pidfd_getfd",
    "read_memory",
    "same_file",
    "seize",
    "set_signal_mask",
    "setregs",
    "user_regs_struct",
    "write_memory",
]

# <linux/ptrace.h>
PTRACE_PEEKDATA = 2
PTRACE_CONT = 7
PTRACE_DETACH = 17
PTRACE_SYSCALL = 24
PTRACE_GETREGSET = 0x4204
PTRACE_SETREGSET = 0x4205
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
PTRACE_GETSIGMASK = 0x420A
PTRACE_SETSIGMASK = 0x420B
PTRACE_GET_RSEQ_CONFIGURATION = 0x420F
PTRACE_O_TRACESYSGOOD = 1
PTRACE_EVENT_STOP = 128

# <linux/elf.h>
NT_PRSTATUS = 1
NT_X86_XSTATE = 0x202

# <linux/kcmp.h>
KCMP_FILE = 0

# <asm/unistd_64.h>
_NR_KCMP = 312
_NR_PIDFD_GETFD = 438

NSIG_MASK = (1 << 64) - 1
"""Every signal of the kernel's 64; it ignores the bits of SIGKILL and SIGSTOP."""

_XSTATE_MAX = 1 << 15  # AMX needs 11 KiB


class user_regs_struct(Structure):
    """<asm/user_64.h>; also the layout of NT_PRSTATUS."""

    _fields_ = [
        (name, c_uint64)
        for name in (
            *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8"),
            *("rax", "rcx", "rdx", "rsi", "rdi", "orig_rax", "rip", "cs", "eflags", "rsp", "ss"),
            *("fs_base", "gs_base", "ds", "es", "fs", "gs"),
        )
    ]


class ptrace_rseq_configuration(Structure):
    """<linux/ptrace.h>."""

    _fields_ = [
        ("rseq_abi_pointer", c_uint64),
        ("rseq_abi_size", c_uint32),
        ("signature", c_uint32),
        ("flags", c_uint32),
        ("pad", c_uint32),
    ]


class iovec(Structure):
    """<linux/uio.h>."""

    _fields_ = [("iov_base", c_void_p), ("iov_len", c_size_t)]


_libc = ctypes.CDLL(None, use_errno=True)
_ptrace = _libc.ptrace
_ptrace.argtypes = [c_long, c_int, c_void_p, c_void_p]
_ptrace.restype = c_long
_syscall = _libc.syscall
_syscall.argtypes = [c_long, c_long, c_long, c_long, c_long, c_long]
_syscall.restype = c_long
_process_vm_readv = _libc.process_vm_readv
_process_vm_writev = _libc.process_vm_writev
for _function in (_process_vm_readv, _process_vm_writev):
    _function.argtypes = [c_int, c_void_p, c_size_t, c_void_p, c_size_t, c_size_t]
    _function.restype = c_long


def _check(result: int, name: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
    return result


def seize(pid: int, options: int) -> None:
    """PTRACE_SEIZE: becomes the tracer of the thread, which runs on. EPERM: forbidden, or traced already."""
    _check(_ptrace(PTRACE_SEIZE, pid, None, options), "PTRACE_SEIZE")


def interrupt(pid: int) -> None:
    """PTRACE_INTERRUPT: at least one PTRACE_EVENT_STOP follows, without a trace in the thread's signals."""
    _check(_ptrace(PTRACE_INTERRUPT, pid, None, None), "PTRACE_INTERRUPT")


def cont(pid: int, signal: int = 0) -> None:
    """PTRACE_CONT; in a signal-delivery-stop ``signal`` is delivered, elsewhere it must be 0."""
    _check(_ptrace(PTRACE_CONT, pid, None, signal), "PTRACE_CONT")


def cont_to_syscall(pid: int, signal: int = 0) -> None:
    """PTRACE_SYSCALL: as cont(), up to the next entry to a system call, or from there to its end."""
    _check(_ptrace(PTRACE_SYSCALL, pid, None, signal), "PTRACE_SYSCALL")


def detach(pid: int) -> None:
    """PTRACE_DETACH: the thread runs on; a group stop that is in effect takes hold again."""
    _check(_ptrace(PTRACE_DETACH, pid, None, None), "PTRACE_DETACH")


def getregs(pid: int) -> user_regs_struct | None:
    """The general registers, None if the thread runs 32-bit code: its register set is a shorter one."""
    regs = user_regs_struct()
    vector = iovec(ctypes.addressof(regs), sizeof(regs))
    _check(_ptrace(PTRACE_GETREGSET, pid, NT_PRSTATUS, ctypes.addressof(vector)), "PTRACE_GETREGSET")
    return regs if vector.iov_len == sizeof(regs) else None


def setregs(pid: int, regs: user_regs_struct) -> None:
    """Replaces all general registers."""
    vector = iovec(ctypes.addressof(regs), sizeof(regs))
    _check(_ptrace(PTRACE_SETREGSET, pid, NT_PRSTATUS, ctypes.addressof(vector)), "PTRACE_SETREGSET")


def get_xstate(pid: int) -> bytes:
    """The FPU and vector registers in XSAVE's standard format, XCR0 in the first 8 bytes of sw_reserved."""
    area = ctypes.create_string_buffer(_XSTATE_MAX)
    vector = iovec(ctypes.addressof(area), len(area))
    _check(_ptrace(PTRACE_GETREGSET, pid, NT_X86_XSTATE, ctypes.addressof(vector)), "PTRACE_GETREGSET")
    return area.raw[: vector.iov_len]


def get_signal_mask(pid: int) -> int:
    """Blocked signals, bit n-1 for signal n; in a call like ppoll() the mask from before it."""
    mask = c_uint64()
    _check(_ptrace(PTRACE_GETSIGMASK, pid, sizeof(mask), ctypes.addressof(mask)), "PTRACE_GETSIGMASK")
    return mask.value


def set_signal_mask(pid: int, mask: int) -> None:
    """Replaces the blocked signals."""
    value = c_uint64(mask)
    _check(_ptrace(PTRACE_SETSIGMASK, pid, sizeof(value), ctypes.addressof(value)), "PTRACE_SETSIGMASK")


def get_rseq(pid: int) -> int:
    """Address of the thread's struct rseq, 0 without one. EIO from a kernel without rseq."""
    config = ptrace_rseq_configuration()
    _check(
        _ptrace(PTRACE_GET_RSEQ_CONFIGURATION, pid, sizeof(config), ctypes.addressof(config)),
        "PTRACE_GET_RSEQ_CONFIGURATION",
    )
    return int(config.rseq_abi_pointer)


def grow_stack(pid: int, address: int) -> None:
    """Makes the stack reach down to an address below it. EIO: it may not.

    By a look there: PTRACE_PEEKDATA lets a stack grow (mm/memory.c, __access_remote_vm()), process_vm_writev(2)
    doesn't.
    """
    ctypes.set_errno(0)
    if _ptrace(PTRACE_PEEKDATA, pid, address, None) == -1 and ctypes.get_errno():
        _check(-1, "PTRACE_PEEKDATA")


def read_memory(pid: int, address: int, size: int) -> bytes:
    """process_vm_readv(2) of one range; EFAULT unless all of it is readable."""
    data = ctypes.create_string_buffer(size)
    local, remote = iovec(ctypes.addressof(data), size), iovec(address, size)
    done = _check(_process_vm_readv(pid, byref(local), 1, byref(remote), 1, 0), "process_vm_readv")
    return _whole(data.raw, done, "process_vm_readv")


def write_memory(pid: int, address: int, data: bytes) -> None:
    """process_vm_writev(2) of one range; EFAULT unless all of it is writable, a part may be written then."""
    local = iovec(ctypes.cast(ctypes.c_char_p(data), c_void_p), len(data))
    remote = iovec(address, len(data))
    done = _check(_process_vm_writev(pid, byref(local), 1, byref(remote), 1, 0), "process_vm_writev")
    _whole(data, done, "process_vm_writev")


def _whole(data: bytes, done: int, name: str) -> bytes:
    if done != len(data):
        raise OSError(14, os.strerror(14), name)
    return data


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """A copy of another process's fd, close-on-exec. EBADF: it has no such fd."""
    return _check(_syscall(_NR_PIDFD_GETFD, pidfd, fd, 0, 0, 0), "pidfd_getfd")


def same_file(first: int, second: int) -> bool:
    """kcmp(2): whether two fds of this process are one open file."""
    pid = os.getpid()
    return _check(_syscall(_NR_KCMP, pid, pid, KCMP_FILE, first, second), "kcmp") == 0
