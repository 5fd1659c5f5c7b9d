# SPDX-License-Identifier: GPL-2.0-or-later
"""A process that has KVM virtual machines, as a program: python -m tests.support.vmholder KIND

It prints a line when it is as KIND says, and stays so until standard input ends:
    one         one VM
    dup         one VM, two fds
    two         two VMs
    heir        one VM that its parent made
    nobody      one VM, by another user than root, who may be looked at
    seccomp     one VM, under a filter that allows everything
"""

from __future__ import annotations

import ctypes
import os
import sys

from proxyd.kvm.kvm import Kvm

# <linux/prctl.h>, <linux/seccomp.h>, <linux/filter.h>
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ALLOW = 0x7FFF0000
BPF_RET_K = 0x06
NOBODY = 65534


class sock_filter(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_uint16),
        ("jt", ctypes.c_uint8),
        ("jf", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    ]


class sock_fprog(ctypes.Structure):
    _fields_ = [("len", ctypes.c_uint16), ("filter", ctypes.POINTER(sock_filter))]


def prctl(option: int, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, *arguments, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "prctl")


def main(kind: str) -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        if kind == "dup":
            os.dup(vm.fd)
        elif kind == "two":
            other = kvm.create_vm()
            assert other.fd != vm.fd
        elif kind == "heir":
            if os.fork() != 0:
                os.wait()
                return
        elif kind == "nobody":
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            prctl(PR_SET_DUMPABLE, 1)
        elif kind == "seccomp":
            allow = sock_filter(BPF_RET_K, 0, 0, SECCOMP_RET_ALLOW)
            prctl(PR_SET_NO_NEW_PRIVS, 1)
            prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(sock_fprog(1, ctypes.pointer(allow))))
        print(os.getpid(), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1])
