# SPDX-License-Identifier: GPL-2.0-or-later
"""The frame that rt_sigreturn(2) takes on x86-64: the whole state of a thread, in its own memory.

A thread that returns to such a frame restores its own state, without a tracer. Layout: <asm/sigcontext.h>,
<asm/ucontext.h> and struct rt_sigframe of arch/x86/include/asm/sigframe.h.
"""

from __future__ import annotations

import struct
from ctypes import Structure, c_uint16, c_uint32, c_uint64, sizeof

from proxyd.vm.pid.ptrace import user_regs_struct

__all__ = ["FP_ALIGNMENT", "build", "size", "without_unused_tiles"]

FP_XSTATE_MAGIC1 = 0x46505853
FP_XSTATE_MAGIC2 = 0x46505845
UC_FP_XSTATE = 0x1
UC_SIGCONTEXT_SS = 0x2
UC_STRICT_RESTORE_SS = 0x4

FP_ALIGNMENT = 64
"""What XRSTOR wants of its area, in bytes; build() wants it of the frame's address."""

_XSTATE_BV = 512  # of struct _xstate: what isn't in its initial state
_XTILEDATA = 18
_XTILEDATA_SIZE = 8192  # the last component of the standard format

_SW_RESERVED = 464  # of struct _fpstate_64; the register set keeps XCR0 there, the frame struct _fpx_sw_bytes
_FPX_SW_BYTES = struct.Struct("<IIQI28x")
_MAGIC2 = struct.Struct("<I")

# sigaltstack(2) refuses flags that it doesn't know, and rt_sigreturn(2) then keeps the stack that is set.
_SS_FLAGS_KEEP = 0xFFFF


class stack_t(Structure):
    """<asm/signal.h>."""

    _fields_ = [("ss_sp", c_uint64), ("ss_flags", c_uint32), ("pad", c_uint32), ("ss_size", c_uint64)]


_REGISTERS = (
    *(f"r{number}" for number in range(8, 16)),
    *("rdi", "rsi", "rbp", "rbx", "rdx", "rax", "rcx", "rsp", "rip", "eflags"),
)
_SELECTORS = ("cs", "gs", "fs", "ss")


class sigcontext_64(Structure):
    """Of the kernel's <asm/sigcontext.h>."""

    _fields_ = [
        *((name, c_uint64) for name in _REGISTERS),
        *((name, c_uint16) for name in _SELECTORS),
        *((name, c_uint64) for name in ("err", "trapno", "oldmask", "cr2", "fpstate")),
        ("reserved1", c_uint64 * 8),
    ]


class ucontext(Structure):
    """<asm/ucontext.h>."""

    _fields_ = [
        ("uc_flags", c_uint64),
        ("uc_link", c_uint64),
        ("uc_stack", stack_t),
        ("uc_mcontext", sigcontext_64),
        ("uc_sigmask", c_uint64),
    ]


class rt_sigframe(Structure):
    """With the siginfo that a handler would get; here it is only room that the kernel insists on."""

    _fields_ = [("pretcode", c_uint64), ("uc", ucontext), ("info", c_uint64 * 16)]


_FPSTATE = -(-sizeof(rt_sigframe) // FP_ALIGNMENT) * FP_ALIGNMENT


def without_unused_tiles(xstate: bytes) -> bytes:
    """A vector state as PTRACE_GETREGSET gives it, less AMX's tile data where that is in its initial state.

    The register set has room for it in any case, but of a thread that never asked for AMX the kernel takes a
    frame of that size for a broken one and restores x87 and SSE alone (arch/x86/kernel/fpu/signal.c:
    check_xstate_in_sigframe()).
    """
    bit = 1 << _XTILEDATA
    xcr0 = int.from_bytes(xstate[_SW_RESERVED : _SW_RESERVED + 8], "little")
    used = int.from_bytes(xstate[_XSTATE_BV : _XSTATE_BV + 8], "little")
    if not xcr0 & bit or used & bit:
        return xstate
    without = (xcr0 & ~bit).to_bytes(8, "little")
    return xstate[:_SW_RESERVED] + without + xstate[_SW_RESERVED + 8 : -_XTILEDATA_SIZE]


def size(xstate: bytes = b"") -> int:
    """Bytes that build() makes of such a vector state, a multiple of FP_ALIGNMENT."""
    if not xstate:
        return _FPSTATE
    return -(-(_FPSTATE + len(xstate) + _MAGIC2.size) // FP_ALIGNMENT) * FP_ALIGNMENT


def build(address: int, restore_rt: int, regs: user_regs_struct, mask: int, xstate: bytes = b"") -> bytes:
    """A frame to be written at ``address``, a multiple of FP_ALIGNMENT.

    With the stack pointer at ``address`` a ``ret`` enters ``restore_rt`` (mov $15, %rax; syscall), which
    makes ``regs``, the signal mask ``mask`` and ``xstate``, as PTRACE_GETREGSET gave it, the state of the
    thread; without ``xstate`` the vector registers are those of a new thread. The alternate signal stack
    stays. A system call that ``regs`` say was interrupted isn't restarted by this.
    """
    frame = rt_sigframe(pretcode=restore_rt)
    frame.uc.uc_flags = UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS
    frame.uc.uc_stack.ss_flags = _SS_FLAGS_KEEP
    frame.uc.uc_sigmask = mask
    context = frame.uc.uc_mcontext
    for name in (*_REGISTERS, *_SELECTORS):
        setattr(context, name, getattr(regs, name))
    if not xstate:
        return bytes(frame).ljust(_FPSTATE, b"\0")
    frame.uc.uc_flags |= UC_FP_XSTATE
    context.fpstate = address + _FPSTATE
    xfeatures = int.from_bytes(xstate[_SW_RESERVED : _SW_RESERVED + 8], "little")
    sw_bytes = _FPX_SW_BYTES.pack(FP_XSTATE_MAGIC1, len(xstate) + _MAGIC2.size, xfeatures, len(xstate))
    fpstate = xstate[:_SW_RESERVED] + sw_bytes + xstate[_SW_RESERVED + len(sw_bytes) :]
    frame_bytes = bytes(frame).ljust(_FPSTATE, b"\0")
    return (frame_bytes + fpstate + _MAGIC2.pack(FP_XSTATE_MAGIC2)).ljust(size(xstate), b"\0")
