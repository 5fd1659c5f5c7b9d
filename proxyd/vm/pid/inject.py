# SPDX-License-Identifier: GPL-2.0-or-later
"""``--vm pid:PID``: any running KVM process registers irqfds with its own VM, without its cooperation.

KVM serves a VM only in the address space that made it (EIO elsewhere, virt/kvm/kvm_main.c), so the process
itself has to make the calls; proxyd.vm.pid.remotecall has its main thread make them. x86-64 only.

Who holds the eventfds afterwards: proxyd, and remoted once it has been sent them. The process keeps no copy.
KVM's irqfd lives as long as its eventfd is open anywhere, and its end lowers the line (virt/kvm/eventfd.c);
so nothing is left in the VM when proxyd and remoted are gone, whatever ended them. To deassign while remoted
may still hold its copy, the eventfd must be an fd of the process once more: it is sent there through a socket
pair that the process makes and closes again.

What a proxyd leaves that is killed within the millisecond of an attach or detach: the process goes on and
closes what it had opened, see proxyd.vm.pid.remotecall. An fd can stay in it only if that happens in the
microseconds from the call that opens it until its number is known here: an eventfd that isn't an irqfd yet,
the socket pair, or the irqfd of a line that nobody raises any more.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from ctypes import Structure, c_int, c_size_t, c_uint64, sizeof
from typing import NamedTuple, Self, TypeVar

from common.disposal import Disposal
from common.errors import IohubError, UsageError
from common.notifier import EventNotifier, adopt_pair
from proxyd.kvm.kvm_h import (
    KVM_IOAPIC_NUM_PINS,
    KVM_IRQCHIP_PIC_MASTER,
    IrqfdFlag,
    Request,
    kvm_irqchip,
    kvm_irqfd,
)
from proxyd.vm.bounded import run_bounded
from proxyd.vm.pid import ptrace
from proxyd.vm.pid.landmarks import Landmarks, find_landmarks
from proxyd.vm.pid.process import Process
from proxyd.vm.pid.remotecall import StoppedThread, Syscall, run_stopped

__all__ = ["Line", "Target"]

_T = TypeVar("_T")

_LOOK_SECONDS = 10.0
"""for a first look at a process: there may be hundreds of megabytes of code, and other processes that are busy"""


class iovec(Structure):
    """<linux/uio.h>, with pointers as numbers: they are the other process's."""

    _fields_ = [("iov_base", c_uint64), ("iov_len", c_size_t)]


class user_msghdr(Structure):
    """<linux/socket.h>."""

    _fields_ = [
        ("msg_name", c_uint64),
        ("msg_namelen", c_int),
        ("msg_iov", c_uint64),
        ("msg_iovlen", c_size_t),
        ("msg_control", c_uint64),
        ("msg_controllen", c_size_t),
        ("msg_flags", c_int),
    ]


class rights(Structure):
    """struct cmsghdr of <linux/socket.h> with one fd, padded as CMSG_SPACE() does."""

    _fields_ = [
        ("cmsg_len", c_size_t),
        ("cmsg_level", c_int),
        ("cmsg_type", c_int),
        ("fd", c_int),
        ("pad", c_int),
    ]


class Line(NamedTuple):
    """One GSI of the VM: write ``irqfd`` to assert it; ``resamplefd`` fires when the guest acknowledges."""

    gsi: int
    irqfd: EventNotifier
    resamplefd: EventNotifier
    seconds: float
    """for how long the process stood still for it, at most"""
    disposal: Disposal

    @property
    def is_closed(self) -> bool:
        return self.irqfd.fd == -1

    def close(self) -> None:
        """Closes both eventfds. The last copy of the irqfd takes it out of KVM and lowers the line."""
        _close_pair((self.irqfd, self.resamplefd), self.disposal)


class Target:
    """A running process with one VM; made by open()."""

    def __init__(self, process: Process) -> None:
        """Raises UsageError, one line that says what is in the way; the process isn't touched."""
        self._process = process
        self.turn = threading.Lock()
        """to be held for attach() and detach(): a process can be traced by one thread only"""
        self._lines: list[Line] = []
        self._disposal = Disposal()
        status = process.refuse_unfit()
        try:
            self._vm_fd, self._landmarks = run_bounded(
                f"look at process {process.pid}", _LOOK_SECONDS, lambda: _look_at(process, status)
            )
        except IohubError as error:
            raise UsageError(str(error)) from error

    @classmethod
    def open(cls, pid: int, *, check_irqchip: bool = True) -> Self:
        """The target with this process id. Raises UsageError as the constructor and check_irqchip() do."""
        process = Process(pid)
        try:
            target = cls(process)
            if check_irqchip:
                target.check_irqchip()
        except BaseException:
            process.close()
            raise
        return target

    @property
    def pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        """A pidfd: readable once the process has exited."""
        return self._process.pidfd

    def check_irqchip(self) -> None:
        """Stops the process, to ask KVM what irqchip its VM has. Raises UsageError if devices can't use it."""
        try:
            self._run(self._check_irqchip)
        except IohubError as error:
            raise UsageError(str(error)) from error

    def adopt(self, gsi: int, irqfd: int, resamplefd: int) -> Line:
        """The line that an earlier process has attached. Owns the fds of its pair then.

        Raises IohubError for a pair that isn't in the VM, as far as that can be seen, with the fds still the
        caller's.
        """
        notifiers = adopt_pair(irqfd, resamplefd, self._is_in_use)
        # KVM takes each event at once (irqfd_wakeup() of virt/kvm/eventfd.c), as long as there is the VM.
        if notifiers[0].is_set():
            for notifier in notifiers:
                notifier.release()
            raise IohubError(f"pid:{self.pid}: no VM takes the events of the irqfd for GSI {gsi}")
        return self._add_line(gsi, *notifiers, 0.0)

    def attach(self, gsi: int) -> Line:
        """Has the process make a pair of eventfds and assign them to ``gsi`` with RESAMPLE.

        Raises UsageError for a GSI that isn't a pin of KVM's irqchip: KVM would accept it and drop every
        event. Raises PeerGone if the process exits, IohubError if it refuses or can't be stopped. It keeps
        nothing then, unless a call hung in it.
        """
        if not 0 <= gsi < KVM_IOAPIC_NUM_PINS:
            raise UsageError(f"pid:{self.pid}: GSI {gsi} isn't one of 0 to {KVM_IOAPIC_NUM_PINS - 1}")
        (irqfd, resamplefd), seconds = self._run(lambda thread: self._assign(thread, gsi), self._discard)
        return self._add_line(gsi, irqfd, resamplefd, seconds)

    def detach(self, line: Line) -> float:
        """Has the process deassign the irqfd, whoever holds a copy of it, and closes the line in any case.

        The GSI is low then, as far as no other device asserts it. Returns the seconds for which the process
        stood still, at most. Raises as attach() does; the irqfd ends with its last copy then.
        """
        with closing(line):
            return self._run(lambda thread: self._deassign(thread, line))[1]

    def close(self) -> None:
        """Closes the process's pidfd; lines stay as they are."""
        self._process.close()

    def _add_line(self, gsi: int, irqfd: EventNotifier, resamplefd: EventNotifier, seconds: float) -> Line:
        line = Line(gsi, irqfd, resamplefd, seconds, self._disposal)
        self._lines = [other for other in self._lines if not other.is_closed] + [line]
        return line

    def _is_in_use(self, identity: str) -> bool:
        """Whether an eventfd is one of another line."""
        return any(
            identity in (line.irqfd.identity, line.resamplefd.identity)
            for line in self._lines
            if not line.is_closed
        )

    def _run(
        self, body: Callable[[StoppedThread], _T], discard: Callable[[_T], None] = lambda _result: None
    ) -> tuple[_T, float]:
        def checked(thread: StoppedThread) -> _T:
            # By way of the pidfd, so it also tells whether the one that was stopped is still that process.
            self._process.check_vm(self._vm_fd)
            return body(thread)

        self._process.refuse_unfit()
        with self._process.explained(IohubError):
            return run_stopped(self.pid, self._landmarks, checked, discard)

    def _discard(self, pair: tuple[EventNotifier, EventNotifier]) -> None:
        _close_pair(pair, self._disposal)

    def _vm_ioctl(self, thread: StoppedThread, request: Request, argument: Structure) -> None:
        try:
            thread.call(Syscall.ioctl, self._vm_fd, request, thread.put(bytes(argument)))
        except OSError as error:
            if error.errno == errno.EIO:
                raise IohubError(f"pid:{self.pid}: its VM was made by another process") from error
            # Split or none: KVM_GET_IRQCHIP fails with ENXIO, KVM_IRQFD with RESAMPLE with EINVAL.
            if error.errno in (errno.ENXIO, errno.EINVAL):
                reason = "its VM has no full in-kernel irqchip (QEMU: -machine kernel-irqchip=on)"
                raise IohubError(f"pid:{self.pid}: {reason}") from error
            raise IohubError(f"pid:{self.pid}: {request.name}: {error.strerror}") from error

    def _check_irqchip(self, thread: StoppedThread) -> None:
        self._vm_ioctl(thread, Request.KVM_GET_IRQCHIP, kvm_irqchip(KVM_IRQCHIP_PIC_MASTER))

    def _assign(self, thread: StoppedThread, gsi: int) -> tuple[EventNotifier, EventNotifier]:
        """Our copies of the irqfd and the resamplefd."""
        with ExitStack() as copies:
            with ExitStack() as theirs:
                pair = []
                ours = []
                for _ in range(2):
                    fd = thread.call(Syscall.eventfd2, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                    theirs.enter_context(thread.closing(fd))
                    pair.append(fd)
                    copy = ptrace.pidfd_getfd(self._process.pidfd, fd)
                    copies.callback(os.close, copy)
                    ours.append(copy)
                # Another thread of the process may have put anything where the eventfds were.
                notifiers = adopt_pair(ours[1], ours[0], self._is_in_use)
                resamplefd, irqfd = pair  # the irqfd is the first to be closed
                self._vm_ioctl(
                    thread, Request.KVM_IRQFD, kvm_irqfd(irqfd, gsi, IrqfdFlag.RESAMPLE, resamplefd)
                )
            copies.pop_all()
        return notifiers

    def _deassign(self, thread: StoppedThread, line: Line) -> None:
        with ExitStack() as theirs:
            irqfd = self._put_fd(thread, line.irqfd.fd, theirs)
            self._vm_ioctl(thread, Request.KVM_IRQFD, kvm_irqfd(irqfd, line.gsi, IrqfdFlag.DEASSIGN))

    def _put_fd(self, thread: StoppedThread, fd: int, theirs: ExitStack) -> int:
        """Gives the process a copy of an fd of ours and returns its number there; ``theirs`` closes it."""
        ends = thread.put(bytes(2 * sizeof(c_int)))
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        thread.call(Syscall.socketpair, socket.AF_UNIX, kind, 0, ends)
        near, far = struct.unpack("ii", thread.get(ends, 2 * sizeof(c_int)))
        theirs.enter_context(thread.closing(near, far))
        copy = ptrace.pidfd_getfd(self._process.pidfd, near)
        try:
            sender = socket.socket(fileno=copy)
        except OSError as error:
            os.close(copy)
            raise self._replaced() from error
        with sender:
            thread.check_time()
            self._send_fd(sender, fd)
        buffer = thread.put(bytes(1))
        control = thread.put(bytes(sizeof(rights)))
        header = user_msghdr(
            msg_iov=thread.put(bytes(iovec(buffer, 1))),
            msg_iovlen=1,
            msg_control=control,
            msg_controllen=sizeof(rights),
        )
        thread.call(Syscall.recvmsg, far, thread.put(bytes(header)), socket.MSG_CMSG_CLOEXEC)
        received = rights.from_buffer_copy(thread.get(control, sizeof(rights)))
        if received.cmsg_type != socket.SCM_RIGHTS or received.cmsg_level != socket.SOL_SOCKET:
            raise IohubError(f"pid:{self.pid}: it can't open another file to deassign the irqfd")
        theirs.enter_context(thread.closing(received.fd))
        return int(received.fd)

    def _send_fd(self, sender: socket.socket, fd: int) -> None:
        """Sends a copy of an fd, without waiting.

        The process has told the socket's number, and may have changed its flags and filled it.
        """
        if (sender.family, sender.type) != (socket.AF_UNIX, socket.SOCK_DGRAM):
            raise self._replaced()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))]
        try:
            sender.sendmsg([b"\0"], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError as error:
            raise IohubError(f"pid:{self.pid}: it has filled its socket pair") from error

    def _replaced(self) -> IohubError:
        return IohubError(f"pid:{self.pid}: it has put another file in place of its socket pair")


def _look_at(process: Process, status: Mapping[str, str]) -> tuple[int, Landmarks]:
    """The fd of its VM, and where it has code. Raises IohubError."""
    with process.explained(UsageError):
        process.refuse_foreign_architecture()
        return process.find_vm(int(status["FDSize"])), find_landmarks(process.pid)


def _close_pair(pair: tuple[EventNotifier, EventNotifier], disposal: Disposal) -> None:
    disposal.close_fds([fd for notifier in pair if (fd := notifier.release()) != -1])
