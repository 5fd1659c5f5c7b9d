# SPDX-License-Identifier: GPL-2.0-or-later
"""--vm pid:PID: lines of devices at remoted, wired to GSIs of any running KVM process.

The VM has no PCI function for them; a guest's driver knows the GSI. While a device's remoted is gone its irqfd is
out of the VM, so the line is low.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator

from common import mpqemu, pci
from common.amiss import Amiss
from common.config import DeviceConfig, VmConfig
from common.errors import IohubError, PeerGone, ProtocolError, UsageError
from common.fdstore import FdStore
from common.journal import RateLimited, device_log
from common.link import Client
from common.loop import Loop
from common.messages import Event
from common.mpqemu import Command
from common.peer import PeerCredentials
from common.service import notify
from proxyd.controlserver import answer_calls
from proxyd.kvm.kvm_h import KVM_IOAPIC_NUM_PINS
from proxyd.pci.links import LinkKeeper
from proxyd.vm.pid.inject import Line, Target
from proxyd.vm.pid.keptlines import KeptLines
from proxyd.vm.procstat import is_stopped
from proxyd.vmstate import VmState, describe

__all__ = ["Attached"]

_ROUND_TRIP_SECONDS = 2.0
_LONG_STOP_SECONDS = 0.01
"""what a guest may notice: a tick of its clock"""


class _Function:
    """One device at remoted and its GSI."""

    answer_times = polled_seconds = None
    is_decoded = None
    """the guest asks a device nothing"""

    def __init__(
        self,
        device: DeviceConfig,
        gsi: int,
        path: str,
        target: Target,
        log: logging.LoggerAdapter[logging.Logger],
        on_lost: Callable[[_Function], None],
    ) -> None:
        self.name = device.id
        self.devfn = device.devfn
        self.reconnects = 0
        self.reason = ""
        """why there is no link, or was none before this one"""
        self.amiss = Amiss()
        self.pin: int | None = None
        self.kept: KeptLines | None = None
        """where line and link are kept for the next process"""
        self.log = RateLimited(log)
        self._gsi = gsi
        self.path = path
        self._target = target
        self._on_lost = on_lost
        self._client: Client | None = None
        self._connecting: Client | None = None
        self._lost: Client | None = None
        self._aborted = False
        self._was_linked = False
        self._line: Line | None = None
        self._detaching: threading.Thread | None = None
        self._peer = ""  # who is or was linked last, as the log has it: its name goes with the process

    @property
    def gsi(self) -> int | None:
        return None if self._client is None else self._gsi

    @property
    def remote(self) -> PeerCredentials | None:
        return None if self._client is None else self._client.peer

    def fileno(self) -> int:
        return -1 if self._client is None else self._client.fileno()

    def adopt(self, kept: KeptLines) -> None:
        """Goes on with the line and the link of the process before this one, if they are there.

        A line whose link has ended meanwhile is taken out of the VM.
        """
        self.kept = kept
        try:
            self._line, self._client = kept.take(self.devfn, self._gsi, self.path, _ROUND_TRIP_SECONDS)
        except IohubError as error:
            self.log.warning("its line can't be used again: %s", error, event=Event.RESUME_FAILED)
        if self._client is not None:
            self._peer = str(self._client.peer)
            self._was_linked = True
            text = "goes on with GSI %d of pid:%d and the link of the previous process"
            self.log.info(text, self._gsi, self._target.pid, event=Event.TAKEN_UP, peer=self._peer)
        elif self._line is not None:
            self._give_up_line()

    def connect(self) -> None:
        """Connects, looks at the pin, and has the process make and assign the irqfd.

        Raises PeerGone, also when the process refuses, and ProtocolError.
        """
        if self._detaching is not None:
            self._detaching.join()
        client = Client.connect(self.path, _ROUND_TRIP_SECONDS)
        self._connecting = client
        self._refuse_aborted()
        pin = client.request(Command.PCI_CFGREAD, mpqemu.CONFIG.pack(pci.PCI_INTERRUPT_PIN, 0, 1)) & 0xFF
        if not 1 <= pin <= 4:
            raise ProtocolError(f"the device has no interrupt pin (register {pin})")
        self.pin = pin
        with self._target.turn:
            self._refuse_aborted()
            try:
                self._line = self._target.attach(self._gsi)
            except IohubError as error:
                raise PeerGone(str(error)) from error

    def attach(self) -> None:
        """Kicks, then sends the pair that connect() has brought. Raises PeerGone and ProtocolError."""
        client, line = self._connecting, self._line
        if client is None or line is None:
            raise PeerGone("not connected")
        self._peer = str(client.peer)
        self._tell(Event.VM_ATTACHED, "attached to", line.seconds, " (interrupts only)")
        try:
            # The kick first: if the other end looks at it only when it has asserted a level that is high, it does
            # so twice.
            line.resamplefd.set()
            client.send(Command.SET_IRQFD, fds=(line.irqfd.fd, line.resamplefd.fd))
        except BaseException:
            self._give_up_line()
            raise
        if self.kept is not None:
            try:
                self.kept.keep(self.devfn, line, client)
            except OSError as error:
                self.log.warning(
                    "its line won't outlive this process: %s", error.strerror, event=Event.STATE_NOT_KEPT
                )
        self._client, self._connecting = client, None
        self.reconnects += self._was_linked
        self._was_linked = True

    def abort(self) -> None:
        """Ends connect(), for good."""
        self._aborted = True
        client = self._connecting
        if client is not None:
            client.shutdown()

    def check_link(self) -> None:
        """Takes the line out of the VM when the link has ended."""
        try:
            if self._client is not None:
                self._client.check_quiet()
        except (PeerGone, ProtocolError) as error:
            self.reason = f"link lost: {error}"
            self.log.warning("%s", self.reason, event=Event.LINK_LOST, peer=self._peer)
            self._lost, self._client = self._client, None
            self._give_up_line()
            self._on_lost(self)

    def reap(self) -> None:
        """Closes a lost link, and one that was not put into use."""
        lost, self._lost = self._lost, None
        connecting, self._connecting = self._connecting, None
        for client in (lost, connecting):
            if client is not None:
                client.close()

    def leave(self) -> None:
        """Closes what this process has of line and link, which are kept for a successor."""
        self.reap()
        client, self._client = self._client, None
        line, self._line = self._line, None
        if client is not None:
            client.close_own_copy()
        if line is not None:
            line.close()

    def close(self, *, detach: bool) -> bool:
        """Takes the line out of the VM, and closes the link. Returns whether that has worked.

        Without ``detach``, the last close of the irqfd takes it out.
        """
        if self._detaching is not None:
            self._detaching.join()
        line, self._line = self._line, None
        done = True
        if line is not None and detach:
            done = self._detach(line)
        elif line is not None:
            line.close()
        self._lost, self._client = self._client or self._lost, None
        self.reap()
        return done

    def _give_up_line(self) -> None:
        """Has a thread take the line out of the VM: the process may take its time."""
        line, self._line = self._line, None
        if line is None:
            return
        if self.kept is not None:
            self.kept.forget(self.devfn, self._gsi)
        thread = threading.Thread(target=self._detach, args=(line,), name=f"detach {self.name}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system has no room for one more
            line.close()
            self._warn_not_detached(error)
        else:
            self._detaching = thread

    def _detach(self, line: Line) -> bool:
        """Has the process deassign the irqfd; if it can't, having exited say, the last close of it does."""
        try:
            with self._target.turn:
                seconds = self._target.detach(line)
        except IohubError as error:
            self._warn_not_detached(error)
            return False
        self._tell(Event.VM_DETACHED, "detached from", seconds)
        return True

    def _warn_not_detached(self, error: Exception) -> None:
        self.log.warning("not detached in order: %s", error, event=Event.DETACH_FAILED, peer=self._peer)

    def _refuse_aborted(self) -> None:
        if self._aborted:
            raise PeerGone("the daemon ends")

    def _tell(self, event: Event, what: str, seconds: float, remark: str = "") -> None:
        text = "%s GSI %d of pid:%d%s, which stood still for %.0f us"
        pid = self._target.pid
        self.log.info(text, what, self._gsi, pid, remark, seconds * 1e6, event=event, peer=self._peer)
        if seconds > _LONG_STOP_SECONDS:
            self.log.warning(
                "pid:%d stood still for %.0f ms",
                pid,
                seconds * 1e3,
                event=Event.VM_STOOD_LONG,
                peer=self._peer,
            )


def _check_gsi(device: DeviceConfig) -> int:
    """The device's GSI. Raises UsageError without one, or one that isn't a pin of KVM's irqchip."""
    if device.gsi is None:
        raise UsageError(f"device {device.id}: --vm pid:PID needs gsi=N")
    if device.gsi >= KVM_IOAPIC_NUM_PINS:
        raise UsageError(f"device {device.id}: gsi={device.gsi} isn't one of 0 to {KVM_IOAPIC_NUM_PINS - 1}")
    return device.gsi


class Attached:
    """The daemon beside one process."""

    def __init__(self, program: str, config: VmConfig, loop: Loop, store: FdStore | None = None) -> None:
        """``store`` is where lines are kept for the next process.

        Raises UsageError, one line that says what is in the way; the process is what it was then.
        """
        log = logging.getLogger(program)
        self._log = RateLimited(log)
        self._loop = loop
        self._exited = False
        gsis = {device.id: _check_gsi(device) for device in config.devices}
        self._functions: list[_Function] = []
        remoted = f"{config.runtime_dir}/remoted.varlink"
        state = VmState(config.name, config.vm, "kvm", None, self._functions, remoted)
        # Before the process is touched: it may have a daemon already.
        self._control = answer_calls(loop, config, state, log)
        # Before any thread is started: one that doesn't block it can take the signal that says that the process
        # has stopped, and it would stand still until somebody looks.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        try:
            self._target, self._kept = _open(int(config.vm.partition(":")[2]), store)
        except BaseException:
            self._control.close()
            raise
        state.amiss.add(self._amiss)
        self._keeper = LinkKeeper(loop)
        self._functions += [
            _Function(
                device,
                gsis[device.id],
                config.socket_path(device),
                self._target,
                device_log(program, device.id, device.devfn),
                self._keeper.lost,
            )
            for device in config.devices
        ]
        loop.add(self._target.fileno(), self._on_exit)

    def run(self) -> int:
        """Attaches, and serves until the loop is stopped or the process exits. Returns the exit status."""
        if self._kept is not None:
            for function in self._functions:
                function.adopt(self._kept)
            self._kept.begin()
        self._keeper.start(self._functions)
        notify(f"READY=1\nSTATUS={self.describe()}")
        self._loop.run()
        return 0

    def describe(self) -> str:
        """The state in one line."""
        return f"Attached to process {self._target.pid}: {describe(self._functions)}"

    def close(self) -> None:
        """Takes every line out of the VM, unless it is kept, and closes the process's pidfd."""
        self._keeper.close()
        detach = not self._exited
        for function in self._functions:
            if self._kept is not None and not self._exited:
                function.leave()
            else:
                # A process that doesn't let one line be taken out is not waited for again.
                detach = function.close(detach=detach) and detach
        self._control.close()
        self._loop.remove(self._target.fileno())
        self._target.close()

    def _amiss(self) -> Iterator[str]:
        if is_stopped(self._target.pid):
            yield f"pid:{self._target.pid} is stopped by a signal"

    def _on_exit(self, _events: int) -> None:
        self._log.info("pid:%d has exited", self._target.pid, event=Event.VM_EXITED)
        self._exited = True
        self._loop.stop()


def _open(pid: int, store: FdStore | None) -> tuple[Target, KeptLines | None]:
    """The process, and what is kept of its lines. Raises UsageError."""
    if store is None:
        return Target.open(pid), None
    target = Target.open(pid, check_irqchip=False)
    try:
        kept = KeptLines(store, target)
        if not kept.is_same:
            target.check_irqchip()
    except BaseException:
        target.close()
        raise
    return target, kept
