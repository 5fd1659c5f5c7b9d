# SPDX-License-Identifier: GPL-2.0-or-later
"""--vm pid:PID: lines of devices at remoted, wired to GSIs of any running KVM process.

The VM has no PCI function for them; a guest's driver knows the GSI. While a device's remoted is gone its irqfd is
out of the VM, so the line is low.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator

from common import mpqemu, pci
from common.amiss import Amiss
from common.config import DeviceConfig, VmConfig
from common.controlsocket import ControlServer
from common.errors import IohubError, PeerGone, ProtocolError, UsageError
from common.journal import RateLimited, device_log
from common.link import Client
from common.loop import Loop
from common.messages import Event
from common.mpqemu import Command
from common.peer import PeerCredentials
from common.service import notify
from proxyd.control import ProxydService
from proxyd.kvm.kvm_h import KVM_IOAPIC_NUM_PINS
from proxyd.pci.links import LinkKeeper
from proxyd.vm.pid.inject import Line, Target
from proxyd.vm.procstat import is_stopped

__all__ = ["Attached"]

_ROUND_TRIP_SECONDS = 2.0
_LONG_STOP_SECONDS = 0.01
"""what a guest may notice: a tick of its clock"""


class _Function:
    """One device at remoted and its GSI."""

    answer_times = None
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
        self._peer = ""  # who is or was linked last, as the log has it: its name goes with the process

    @property
    def gsi(self) -> int | None:
        return None if self._line is None else self._gsi

    @property
    def remote(self) -> PeerCredentials | None:
        return None if self._client is None else self._client.peer

    def fileno(self) -> int:
        return -1 if self._client is None else self._client.fileno()

    def connect(self) -> None:
        """Connects, and looks at the pin. Raises PeerGone and ProtocolError."""
        client = Client.connect(self.path, _ROUND_TRIP_SECONDS)
        self._connecting = client
        if self._aborted:
            raise PeerGone("the daemon ends")
        pin = client.request(Command.PCI_CFGREAD, mpqemu.CONFIG.pack(pci.PCI_INTERRUPT_PIN, 0, 1)) & 0xFF
        if not 1 <= pin <= 4:
            raise ProtocolError(f"the device has no interrupt pin (register {pin})")
        self.pin = pin

    def attach(self) -> None:
        """Has the process make and assign the irqfd, then kicks, then sends it.

        Raises PeerGone, also when the process refuses, and ProtocolError.
        """
        client = self._connecting
        if client is None:
            raise PeerGone("not connected")
        self._peer = str(client.peer)
        try:
            try:
                self._line = self._target.attach(self._gsi)
            except IohubError as error:
                raise PeerGone(str(error)) from error
            # The kick first: if the other end looks at it only when it has asserted a level that is high, it does
            # so twice.
            self._line.resamplefd.set()
            client.send(Command.SET_IRQFD, fds=(self._line.irqfd.fd, self._line.resamplefd.fd))
        except BaseException:
            self.detach()
            raise
        self._tell(Event.VM_ATTACHED, "attached to", self._line.seconds, " (interrupts only)")
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
            self.detach()
            self._on_lost(self)

    def reap(self) -> None:
        """Closes a lost link, and one that was not put into use."""
        lost, self._lost = self._lost, None
        connecting, self._connecting = self._connecting, None
        for client in (lost, connecting):
            if client is not None:
                client.close()

    def close(self, *, exited: bool) -> None:
        """Takes the line out of the VM, and closes the link."""
        self.detach(exited=exited)
        self._lost, self._client = self._client or self._lost, None
        self.reap()

    def detach(self, *, exited: bool = False) -> None:
        """Has the process deassign the irqfd; if it can't, having exited say, the last close of it does."""
        line, self._line = self._line, None
        if line is not None and exited:
            line.close()
        elif line is not None:
            try:
                seconds = self._target.detach(line)
            except IohubError as error:
                self.log.warning(
                    "not detached in order: %s", error, event=Event.DETACH_FAILED, peer=self._peer
                )
            else:
                self._tell(Event.VM_DETACHED, "detached from", seconds)

    def _tell(self, event: Event, what: str, seconds: float, remark: str = "") -> None:
        text = "%s GSI %d of pid:%d%s, which stood still for %.0f us"
        pid = self._target.pid
        self.log.info(text, what, self._gsi, pid, remark, seconds * 1e6, event=event, peer=self._peer)
        if seconds > _LONG_STOP_SECONDS:
            self.log.warning(
                "pid:%d stood still for %.0f ms", pid, seconds * 1e3, event=Event.VM_STOOD_LONG, peer=self._peer
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

    def __init__(self, program: str, config: VmConfig, loop: Loop) -> None:
        """Raises UsageError, one line that says what is in the way; the process is what it was then."""
        log = logging.getLogger(program)
        self._log = RateLimited(log)
        self._loop = loop
        self._exited = False
        gsis = {device.id: _check_gsi(device) for device in config.devices}
        self._functions: list[_Function] = []
        interface = ProxydService(config.name, config.vm, "kvm", None, self._functions)
        path = str(config.runtime_dir / "proxyd.varlink")
        # Before the process is touched: it may have a daemon already.
        self._control = ControlServer(loop, path, lambda: interface, log)
        # Before any thread is started: one that doesn't block it can take the signal that says that the process
        # has stopped, and it would stand still until somebody looks.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        try:
            self._target = Target.open(int(config.vm.partition(":")[2]))
        except BaseException:
            self._control.close()
            raise
        interface.amiss.add(self._amiss)
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
        self._keeper.start(self._functions)
        notify("READY=1")
        self._loop.run()
        return 0

    def close(self) -> None:
        """Takes every line out of the VM, and closes the process's pidfd."""
        self._keeper.close()
        for function in self._functions:
            function.close(exited=self._exited)
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
