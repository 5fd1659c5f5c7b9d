# SPDX-License-Identifier: GPL-2.0-or-later
"""A process that has KVM virtual machines, as a program: python -m tests.support.vmholder KIND

It prints a line when it is as KIND says, and stays so until standard input ends:
    one         one VM
    dup         one VM, two fds
    two         two VMs
    heir        one VM that its parent made
    nobody      one VM, by another user than root, who may be looked at
    seccomp     one VM, under a filter that allows everything
    odd         one VM, and files of all kinds; the line has their numbers, too, as NAME=FD
    slow        one VM, and code that nobody can read: its pages never arrive
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path

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


def odd_files() -> dict[str, int]:
    """Numbers of open files by what they are; of those that can be filled nothing more goes into them."""
    stream, datagram = socket.socketpair(), socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener = socket.create_server(("127.0.0.1", 0))
    tcp = socket.create_connection(listener.getsockname())
    pipe = os.pipe()
    for sock in (stream[0], datagram[0], tcp):
        sock.setblocking(False)
        with suppress(BlockingIOError):
            while sock.send(bytes(4096)):
                pass
        sock.setblocking(True)
    files = {"stream": stream[0], "datagram": datagram[0], "tcp": tcp, "listener": listener}
    kept = [*files.values(), stream[1], datagram[1]]
    numbers = {name: file.fileno() for name, file in files.items()}
    for sock in kept:
        sock.detach()
    return numbers | {"pipe": pipe[1], "file": os.open("/proc/self/status", os.O_RDONLY)}


# <linux/userfaultfd.h>
_NR_USERFAULTFD = 323
UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
UFFD_API = 0xAA
UFFDIO_REGISTER_MODE_MISSING = 1


def map_code_that_never_arrives() -> None:
    """Right below the stack, where a look from the top comes to it first."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, *[ctypes.c_long] * 5]
    lines = Path("/proc/self/maps").read_text().splitlines()
    stack = next(int(line.partition("-")[0], 16) for line in lines if line.endswith("[stack]"))
    code = os.memfd_create("code")
    os.truncate(code, mmap.PAGESIZE)
    address = libc.mmap(
        stack - (32 << 20), mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_PRIVATE, code, 0
    )
    faults = libc.syscall(_NR_USERFAULTFD, os.O_CLOEXEC)
    if faults < 0:
        raise OSError(ctypes.get_errno(), "userfaultfd")
    fcntl.ioctl(faults, UFFDIO_API, struct.pack("QQQ", UFFD_API, 0, 0))
    where = struct.pack("QQQQ", address, mmap.PAGESIZE, UFFDIO_REGISTER_MODE_MISSING, 0)
    fcntl.ioctl(faults, UFFDIO_REGISTER, where)


def main(kind: str) -> None:
    files: dict[str, int] = {}
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
        elif kind == "odd":
            files = odd_files()
        elif kind == "slow":
            map_code_that_never_arrives()
        print(os.getpid(), *(f"{name}={fd}" for name, fd in files.items()), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1])
