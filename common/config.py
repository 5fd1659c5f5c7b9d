# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VM and its devices are: one model for both daemons, from a TOML file and from options.

The file, read by both daemons:

    name = "vm1"
    vm = "embedded"                 # proxyd's way to the VM
    allow-users = ["libvirt-qemu"]  # trusted besides root and the daemon's own user
    poll-max-us = 50                # as --poll-max-us
    [[device]]
    id = "com1"
    model = "pci-serial"            # remoted's
    addr = "05.0"
    transport = "mpqemu"            # or "vfio-user"
    chardev = "pty"                 # the model's own option

The command line (common.options) wins: a ``--device`` whose id is in the file replaces the keys that it
gives, any other adds a device.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from common.addresses import assign_addresses
from common.configfile import ConfigFile, read_file
from common.errors import UntrustedError, UsageError
from common.journal import printable
from common.options import (
    COMMON_KEYS,
    DEFAULT_POLL_US,
    LONGEST_POLL_US,
    PROXYD,
    REMOTED,
    Keys,
    Parser,
    Role,
    Value,
    check_text,
    make_parser,
    nearest,
    parse_device,
)
from common.output import emit
from common.text import DIGITS, LETTERS, consists_of, is_number
from common.trust import MAX_SOCKET_PATH, TRUST, find_user

__all__ = [
    "DeviceConfig",
    "Transport",
    "VmConfig",
    "check_name",
    "default_runtime_dir",
    "parse_proxyd",
    "parse_remoted",
    "proxyd_parser",
    "remoted_parser",
]

_MAX_FD = (1 << 31) - 1
_MAX_GSI = 4095
"""the last of KVM_MAX_IRQ_ROUTES (linux/kvm_host.h)"""

_GUESSED_KEYS = ("addr", "socket", "transport")
"""what is made up where a device doesn't have it"""

_LONGEST_NAME = "remoted.varlink"
"""of the sockets that the daemons make besides the devices'"""

_NAME = LETTERS | DIGITS | {"_", ".", "-"}
_MAX_NAME = 64


class Transport(StrEnum):
    """What a device's clients speak; the value is that of ``transport=``."""

    MPQEMU = "mpqemu"
    """QEMU's multi-process protocol: any QEMU since 6.0"""
    VFIO_USER = "vfio-user"
    """vfio-user: QEMU since 10.1 and other VMMs"""


class DeviceConfig(NamedTuple):
    """One device, as both daemons see it."""

    id: str
    """up to 32 letters, digits, ``-`` and ``_``"""
    model: str | None
    """what remoted makes; None only in proxyd"""
    devfn: int
    """0 to 255; given, or function 0 of the first slot from 02.0 upward that no other device here has"""
    socket: str | None
    """the path given, if one was: VmConfig.socket_path() tells where the device is found"""
    fd: int | None
    """an inherited, connected socket for remoted to serve"""
    gsi: int | None
    """for proxyd with ``pid:``, since nothing else tells it there"""
    properties: dict[str, str]
    """the model's own options; booleans of the file are ``on`` and ``off``"""
    transport: Transport = Transport.MPQEMU
    """the protocol that its clients speak"""
    msix: bool = True
    """whether the guest sees its MSI-X, which only vfio-user carries"""


class VmConfig(NamedTuple):
    """A VM with its devices, in the order of the file and then of the command line."""

    name: str
    runtime_dir: str
    vm: str
    """``embedded``, ``soft``, ``qmp:PATH`` or ``pid:N``"""
    devices: tuple[DeviceConfig, ...]
    allow_users: tuple[int, ...] = ()
    """uids that are trusted besides root and the daemon's own user (common.trust)"""
    unplug_on_exit: bool = False
    """for proxyd with ``qmp:``: whether the devices leave QEMU together with it"""
    poll_max_us: int = DEFAULT_POLL_US
    """for how many microseconds remoted's loop, or a vCPU of proxyd's, polls at most before it sleeps; 0: never"""
    verbose: bool = False
    """whether messages for debugging are logged as well"""
    is_from_file: bool = False
    """whether there is a file, which may change"""

    def socket_path(self, device: DeviceConfig) -> str:
        """Where the device listens: its ``socket=``, or ID.sock in the runtime directory."""
        return device.socket or self.own_socket_path(f"{device.id}.sock")

    def own_socket_path(self, name: str) -> str:
        """Where the daemon has a socket that is no device's."""
        return os.path.join(self.runtime_dir, name)

    def make_runtime_dir(self) -> None:
        """Makes the runtime directory if it isn't there, and those above it, writable by their owner only.

        Raises UsageError, and UntrustedError if other users can change the directory.
        """
        where = f"--runtime-dir {printable(self.runtime_dir)}"
        try:
            _make_directory(self.runtime_dir)
            TRUST.check_directory(self.runtime_dir)
        except FileExistsError as error:
            raise UsageError(f"{where}: {printable(error.filename)} exists and is not a directory") from error
        except OSError as error:
            raise UsageError(f"{where}: {error.strerror}") from error
        except UntrustedError as error:
            raise UntrustedError(f"{where}: {error}") from error


def parse_remoted(
    argv: Sequence[str] | None = None, describe_models: Callable[[bool], str] | None = None
) -> VmConfig:
    """The configuration of iohub-remoted: every device has a model. Raises UsageError.

    ``describe_models(as_json)`` is what --models prints, after which it raises SystemExit.
    """
    options = remoted_parser(has_models=describe_models is not None).parse_args(argv)
    if describe_models is not None:
        if options.models:
            emit(f"{describe_models(options.json)}\n")
            raise SystemExit(0)
        if options.json:
            raise UsageError("--json: only with --models")
    return _load(REMOTED, options)


def parse_proxyd(argv: Sequence[str] | None = None) -> VmConfig:
    """The configuration of iohub-proxyd: models and their options, from the file, are there for remoted only.

    Raises UsageError.
    """
    options = proxyd_parser().parse_args(argv)
    config = _load(PROXYD, options)._replace(unplug_on_exit=options.unplug_on_exit)
    if config.unplug_on_exit and not config.vm.startswith("qmp:"):
        raise UsageError(f"--unplug-on-exit: only for --vm qmp:SOCKET, this is {config.vm}")
    if options.poll_max_us is not None and ":" in config.vm:
        raise UsageError(f"--poll-max-us: only for --vm embedded and soft, this is {config.vm}")
    return config


def remoted_parser(*, has_models: bool = True) -> Parser:
    """The options of iohub-remoted, with --models if ``has_models``."""
    parser = make_parser(REMOTED)
    if has_models:
        parser.add_argument(
            "--models", action="store_true", help="list the models with their options and exit"
        )
        parser.add_argument("--json", action="store_true", help="with --models: as one JSON object")
    return parser


def proxyd_parser() -> Parser:
    """The options of iohub-proxyd."""
    parser = make_parser(PROXYD)
    parser.add_argument(
        "--vm",
        metavar="KIND",
        help="how to reach the VM: embedded (a small guest that iohub-proxyd runs on /dev/kvm; the default), soft "
        "(the same without KVM), qmp:SOCKET (a stock QEMU) or pid:PID (any KVM process: interrupts only; "
        "iohub-proxyd ends when the process does, with status 0)",
    )
    parser.add_argument(
        "--unplug-on-exit",
        action="store_true",
        help="with qmp:SOCKET only: unplug the devices from QEMU on exit; by default they stay plugged",
    )
    return parser


def check_name(name: str) -> str:
    """The VM's name, which becomes a directory and a log field. Raises UsageError."""
    if name.startswith(("-", ".")) or not consists_of(name, _NAME, _MAX_NAME):
        raise UsageError(
            f"{name!r} is not a VM name: 1 to 64 letters, digits, '-', '_' and '.', the first not '-' or '.'"
        )
    return name


def default_runtime_dir(name: str, uid: int, environ: Mapping[str, str]) -> str:
    """Where the sockets of a VM are unless told otherwise. Raises UsageError when there is no such place."""
    if uid == 0:
        return f"/run/iohub/{name}"
    base = environ.get("XDG_RUNTIME_DIR", "")
    if not base.startswith("/"):
        raise UsageError("--runtime-dir: needed, as XDG_RUNTIME_DIR is not set")
    return os.path.join(base, "iohub", name)


def _make_directory(path: str) -> None:
    """Makes a directory, and those above it, unless they are there. Raises OSError."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    if parent:
        _make_directory(parent)
    try:
        os.mkdir(path, 0o755)  # the process's umask may be 0
    except FileExistsError:
        if not os.path.isdir(path):  # otherwise somebody else has made it meanwhile
            raise


def _load(role: Role, options: argparse.Namespace) -> VmConfig:
    file = ConfigFile({}, [], {}) if options.config is None else read_file(options.config)
    top, devices = file.top, file.devices
    for key in ("name", "runtime-dir", "vm", "poll-max-us"):
        text = getattr(options, key.replace("-", "_"), None)
        if text is not None:
            top[key] = Value(check_text(text, f"--{key}"), f"--{key}")
    users = [Value(name, "--allow-user") for name in options.allow_user] or file.allow_users
    name, runtime_dir, vm = _top_level(top, options.config)
    _override(devices, (parse_device(role, text) for text in options.device))
    config = VmConfig(
        name,
        runtime_dir,
        vm,
        _build(role, devices),
        allow_users=tuple(_user(user) for user in users),
        poll_max_us=top["poll-max-us"].number("", LONGEST_POLL_US)
        if "poll-max-us" in top
        else DEFAULT_POLL_US,
        verbose=options.verbose,
        is_from_file=options.config is not None,
    )
    _check_sockets(role, config, devices)
    if not role.has_models:
        _check_meant(vm, devices)
    return config


def _top_level(top: Keys, file: str | None) -> tuple[str, str, str]:
    if "name" not in top:
        place = f"as name in {printable(file)}" if file else "in a file, by --config"
        raise UsageError(f"--name: the VM needs a name: give it here, or {place}")
    try:
        name = check_name(top["name"].text)
    except UsageError as error:
        raise UsageError(f"{top['name'].where}: {error}") from error
    vm = top.get("vm", Value("embedded", ""))
    if not _is_vm(vm.text):
        raise UsageError(f"{vm.where}: {vm.text!r} is neither embedded, soft, qmp:SOCKET nor pid:PID")
    _check_length(vm.text.removeprefix("qmp:"), vm.where)
    if "runtime-dir" in top:
        runtime_dir, where = top["runtime-dir"].path().rstrip("/") or "/", top["runtime-dir"].where
    else:
        runtime_dir, where = default_runtime_dir(name, os.geteuid(), os.environ), "--runtime-dir"
    _check_length(os.path.join(runtime_dir, _LONGEST_NAME), where)
    return name, runtime_dir, vm.text


def _is_vm(text: str) -> bool:
    kind, _, rest = text.partition(":")
    if kind == "qmp":
        return rest != ""
    if kind == "pid":
        return not rest.startswith("0") and is_number(rest)
    return text in ("embedded", "soft")


def _user(name: Value) -> int:
    try:
        return find_user(name.text)
    except UsageError as error:
        raise UsageError(f"{name.where}: {error}") from error


def _check_length(path: str, where: str) -> None:
    length = len(os.fsencode(path))
    if length > MAX_SOCKET_PATH:
        raise UsageError(
            f"{where}: {printable(path)}: {length} bytes, a socket's path has at most {MAX_SOCKET_PATH}"
        )


def _check_meant(vm: str, devices: Mapping[str, Keys]) -> None:
    """For proxyd, which doesn't know the models' options: raises UsageError for keys that can't be meant so."""
    for keys in devices.values():
        if "gsi" in keys and not vm.startswith("pid:"):
            raise UsageError(f"{keys['gsi'].where}: gsi: only for --vm pid:PID, this is {vm}")
        missing = [key for key in _GUESSED_KEYS if key not in keys]
        for key in keys.keys() - COMMON_KEYS:
            if (meant := nearest(key, missing)) is not None:
                raise UsageError(
                    f"{keys[key].where}: {key}: is {meant} meant? "
                    f"A model's option of such a name needs {meant} beside it"
                )


def _override(devices: dict[str, Keys], given: Iterable[Keys]) -> None:
    """Puts the command line's devices over the file's."""
    seen: set[str] = set()
    for keys in given:
        device_id = keys["id"].text
        if device_id in seen:
            raise UsageError(f"{keys['id'].where}: the id is given twice")
        seen.add(device_id)
        merged = devices.setdefault(device_id, {})
        if "socket" in keys or "fd" in keys:
            # One choice: where the clients come from.
            merged.pop("socket", None)
            merged.pop("fd", None)
        merged.update(keys)


def _build(role: Role, devices: Mapping[str, Keys]) -> tuple[DeviceConfig, ...]:
    addresses = assign_addresses(devices)
    built = []
    for device_id, keys in devices.items():
        if role.has_models and not keys.get("model", Value("", "")).text:
            raise UsageError(f"{keys['id'].where}: the model is missing")
        if "socket" in keys and "fd" in keys:
            raise UsageError(f"{keys['fd'].where}: fd and socket exclude each other")
        transport = _transport(keys["transport"]) if "transport" in keys else Transport.MPQEMU
        if "msix" in keys and transport is not Transport.VFIO_USER:
            raise UsageError(f"{keys['msix'].where}: msix: only with transport=vfio-user")
        built.append(
            DeviceConfig(
                id=device_id,
                model=keys["model"].text if "model" in keys else None,
                devfn=addresses[device_id],
                socket=keys["socket"].path("socket: ") if "socket" in keys else None,
                fd=keys["fd"].number("fd: ", _MAX_FD) if "fd" in keys else None,
                gsi=keys["gsi"].number("gsi: ", _MAX_GSI) if "gsi" in keys else None,
                transport=transport,
                msix=keys["msix"].flag("msix: ") if "msix" in keys else True,
                properties={key: value.text for key, value in keys.items() if key not in COMMON_KEYS},
            )
        )
    return tuple(built)


def _transport(value: Value) -> Transport:
    try:
        return Transport(value.text)
    except ValueError:
        names = " or ".join(Transport)
        raise UsageError(f"{value.where}: transport: {value.text!r} must be {names}") from None


def _check_sockets(role: Role, config: VmConfig, devices: Mapping[str, Keys]) -> None:
    """No path is too long for a socket, and no two devices share a path or an inherited fd."""
    owners: dict[str | int, str] = {}
    for device in config.devices:
        where = devices[device.id]["id"].where
        if device.fd is not None and role.has_models:
            place: str | int = device.fd
            shown = f"fd {device.fd}"
        else:
            place = config.socket_path(device)
            shown = f"socket {printable(place)}"
            _check_length(place, f"{where}: socket")
        if place in owners:
            raise UsageError(f"{where}: {shown} is taken by device {owners[place]!r}")
        owners[place] = device.id
