# SPDX-License-Identifier: GPL-2.0-or-later
"""What a thread was doing when a tracer stopped it, and the state that lets it go on as if nothing had been.

An interrupted system call is about to return one of the kernel's private restart codes. On the way out the
kernel's signal handling restarts the call or makes it fail with EINTR (arch/x86/kernel/signal.c), depending
on the code and on whether a handler runs.
"""

from __future__ import annotations

import errno

from proxyd.kvm.kvm_h import Request
from proxyd.vm.pid import ptrace
from proxyd.vm.pid.ptrace import user_regs_struct

__all__ = ["leave_critical_section", "make_restartable", "restarted"]

# <linux/errno.h>, never seen outside of the kernel except by a tracer.
ERESTARTSYS = 512
ERESTARTNOINTR = 513
ERESTARTNOHAND = 514
ERESTART_RESTARTBLOCK = 516

_NR_IOCTL = 16

# What changes nothing when it fails with EINTR, and fails so on any stop, of a socket if that has a timeout
# (signal(7)). Not connect(2), which goes on in the background.
_REPEATABLE = {
    "read": 0,
    "write": 1,
    "readv": 19,
    "writev": 20,
    "accept": 43,
    "sendto": 44,
    "recvfrom": 45,
    "sendmsg": 46,
    "recvmsg": 47,
    "semop": 65,
    "rt_sigtimedwait": 128,
    "io_getevents": 208,
    "semtimedop": 220,
    "epoll_wait": 232,
    "epoll_pwait": 281,
    "accept4": 288,
    "recvmmsg": 299,
    "sendmmsg": 307,
    "io_pgetevents": 333,
    "io_uring_enter": 426,
    "epoll_pwait2": 441,
}

_U64 = (1 << 64) - 1  # as orig_rax: not in a system call


def leave_critical_section(pid: int, regs: user_regs_struct) -> None:
    """Takes the abort path if the thread was stopped in a restartable sequence, as any preemption would.

    The kernel can't do it: it judges by the instruction pointer when the thread next leaves the kernel, which
    is at our call, and forgets the sequence then (kernel/rseq.c).
    """
    if regs.orig_rax != _U64:
        return  # a system call isn't allowed in one
    try:
        area = ptrace.get_rseq(pid)
    except OSError as error:
        if error.errno == errno.EIO:
            return
        raise
    # <linux/rseq.h>: struct rseq.rseq_cs at 8; struct rseq_cs start_ip at 8, post_commit_offset at 16,
    # abort_ip at 24.
    section = _u64s(pid, area + 8, 1)[0] if area else 0
    if section:
        start, length, abort = _u64s(pid, section + 8, 3)
        if regs.rip - start in range(length):
            regs.rip = abort


def _u64s(pid: int, address: int, count: int) -> list[int]:
    data = ptrace.read_memory(pid, address, 8 * count)
    return [int.from_bytes(data[offset : offset + 8], "little") for offset in range(0, len(data), 8)]


def _interrupted(regs: user_regs_struct) -> int:
    """The errno or restart code that an interrupted system call is about to return, 0 if there is none."""
    return 0 if regs.orig_rax == _U64 else -regs.rax & _U64


def make_restartable(regs: user_regs_struct) -> bool:
    """Lets the kernel restart the calls that fail with EINTR on any stop, handler or not (signal(7)).

    Returns whether ``regs`` have changed for it.

    Nothing is lost by a second go, and with the code for "unless a handler runs" a signal that did come still
    ends them with EINTR. A timeout begins anew.
    """
    repeatable = regs.orig_rax in _REPEATABLE.values() or (
        regs.orig_rax == _NR_IOCTL and regs.rsi & 0xFFFF_FFFF == Request.KVM_RUN
    )
    if not repeatable or _interrupted(regs) != errno.EINTR:
        return False
    regs.rax = -ERESTARTNOHAND & _U64
    return True


def restarted(regs: user_regs_struct) -> user_regs_struct:
    """``regs`` as the kernel's signal handling would leave them where no handler runs.

    Without the restart_block, which rt_sigreturn(2) gives up: a call that needs it is told to fail with
    EINTR.
    """
    home = user_regs_struct.from_buffer_copy(regs)
    code = _interrupted(regs)
    if code in (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND):
        home.rax = regs.orig_rax
        home.rip -= len(b"\x0f\x05")
    elif code == ERESTART_RESTARTBLOCK:
        home.rax = -errno.EINTR & _U64
    return home
