# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemons' command lines, and ``--device`` in the style of QEMU's ``-device``.

``--device pci-serial,id=com1,addr=05.0,chardev=pty``: pairs of key and value between commas, and for remoted
the model first. ``,,`` stands for a comma in a value.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from common.arguments import Argument, Given, parse_arguments
from common.errors import UsageError
from common.text import DIGITS, LETTERS, consists_of
from common.version import print_version

__all__ = [
    "DEFAULT_POLL_US",
    "DEVICE_OPTIONS",
    "LONGEST_POLL_US",
    "PROXYD",
    "REMOTED",
    "Keys",
    "Role",
    "Value",
    "check_id",
    "check_text",
    "is_key",
    "nearest",
    "parse_device",
    "read_command_line",
]

BOOLEAN_KEYS = frozenset(("msix",))
INTEGER_KEYS = frozenset(("fd", "gsi"))
STRING_KEYS = frozenset(("id", "model", "addr", "socket", "transport"))
DEVICE_OPTIONS = {
    "id=ID": "its name: 1 to 32 letters, digits, '-' and '_'; needed",
    "addr=SLOT.FN": "where the guest finds it (default: the first slot from 02.0 upward that is free)",
    "socket=PATH": "where it listens (default: ID.sock in the runtime directory)",
    "transport=mpqemu|vfio-user": "what its clients speak (default: mpqemu)",
    "fd=N": "serves an inherited, connected socket instead",
    "msix=on|off": "with vfio-user: whether the guest sees the device's MSI-X (default: on)",
}
"""what remoted takes for a device of any model, and what it means"""
COMMON_KEYS = BOOLEAN_KEYS | INTEGER_KEYS | STRING_KEYS
"""of a device; every other key belongs to its model"""

_WORD = LETTERS | DIGITS | {"-", "_"}
_MAX_KEY = 64
_MAX_ID = 32
_MAX_DIGITS = 10
DEFAULT_POLL_US = 50
"""by measurement (tests/bench/README.md)"""
LONGEST_POLL_US = 1000
_LEAST_LIKENESS = 0.7
"""as difflib counts it: ``adr`` and ``address`` are meant to be ``addr``"""


class Value(NamedTuple):
    """A value as text, and what an error has to name: the option, or the file and the device."""

    text: str
    where: str

    def number(self, key: str, maximum: int) -> int:
        """An integer from 0 to the maximum. Raises UsageError, which begins with where and ``key``."""
        if not consists_of(self.text, DIGITS, _MAX_DIGITS) or int(self.text) > maximum:
            raise UsageError(f"{self.where}: {key}{self.text!r} is not an integer from 0 to {maximum}")
        return int(self.text)

    def flag(self, key: str) -> bool:
        """Whether it is on. Raises UsageError, which begins with where and ``key``."""
        if self.text not in ("on", "off"):
            raise UsageError(f"{self.where}: {key}{self.text!r} must be on or off")
        return self.text == "on"

    def path(self, key: str = "") -> str:
        """A path. Raises UsageError, which begins with where and ``key``."""
        if not self.text:
            raise UsageError(f"{self.where}: {key}{self.text!r} is not a path")
        return self.text


Keys = dict[str, Value]


_SHARED = (
    Argument("--version", "", "show the version and exit"),
    Argument("--name", "VM", "the VM's name; required here or in the file"),
    Argument("--config", "FILE", "the VM's TOML file, which both daemons read; options override it"),
    Argument(
        "--runtime-dir",
        "DIR",
        "where the sockets are (default: /run/iohub/VM, or "
        "$XDG_RUNTIME_DIR/iohub/VM for users other than root)",
    ),
    Argument(
        "--allow-user",
        "USER",
        "another user, by name or number, whose processes and directories are trusted besides root's and "
        "the daemon's own; repeat for more; replaces the file's allow-users",
        is_repeatable=True,
    ),
    Argument("--verbose", "", "also log debug messages", short="-v"),
)


class Role(NamedTuple):
    """What one daemon takes on its command line."""

    program: str
    summary: str
    device: str
    """the syntax of ``--device``"""
    device_help: str
    own: tuple[Argument, ...]
    """the options that the other daemon doesn't have"""
    epilog: str
    """ends with an example"""
    keys: frozenset[str]
    """those of COMMON_KEYS that ``--device`` may have"""
    has_models: bool
    """the first word is a model, and other keys are the model's own"""

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """All options, in the order of the help."""
        device = Argument("--device", self.device, self.device_help, is_repeatable=True)
        return (*_SHARED, device, *self.own)


REMOTED = Role(
    "iohub-remoted",
    "Runs a VM's PCI devices, each behind a socket of its own.",
    "MODEL,id=ID[,addr=SLOT.FN][,transport=mpqemu|vfio-user][,msix=on|off][,socket=PATH|fd=N][,OPTION=VALUE...]",
    "a device, which listens at PATH (default: ID.sock in the runtime directory) or serves the connected "
    "socket that was inherited as fd N; addr defaults to the first slot from 02.0 upward that no other "
    "device given here or in the file has; transport is what its clients speak (default: mpqemu); "
    "msix=off hides MSI-X from the guest; repeat for more; ,, is a comma in a value",
    (
        Argument(
            "--poll-max-us",
            "N",
            "poll for the next message for at most N microseconds before sleeping, adapted to the traffic; "
            f"0 to {LONGEST_POLL_US}, 0 turns polling off (default: {DEFAULT_POLL_US})",
        ),
        Argument("--models", "", "list the models with their options and exit"),
        Argument("--json", "", "with --models: as one JSON object"),
    ),
    """\
models:
  NAME            edu, irq-line, nvme, pci-serial, or a model of an installed
                  package: --models lists them with their options
  PACKAGE.MODULE:CLASS
                  a subclass of remoted.device.PciFunction in a module on
                  PYTHONPATH
  ./FILE.py:CLASS
                  the same in a file

exit status: 0 after SIGTERM or SIGINT, or when the last link that was
inherited has ended and nothing listens; 1 for a failure that may pass, such
as a full disk; 2 for invalid options or configuration

example:
  iohub-remoted --name vm1 --runtime-dir /tmp/vm1 \\
      --device pci-serial,id=com1,addr=05.0,chardev=pty""",
    frozenset(("id", "model", "addr", "socket", "fd", "transport", "msix")),
    True,
)

PROXYD = Role(
    "iohub-proxyd",
    "Connects iohub-remoted's devices and their interrupt lines to a VM.",
    "id=ID[,addr=SLOT.FN][,transport=mpqemu|vfio-user][,socket=PATH][,gsi=N]",
    "a device of iohub-remoted, which listens at PATH (default: ID.sock in the runtime directory); addr "
    "defaults to the first slot from 02.0 upward that no other device given here or in the file has, "
    "even if QEMU has a device there; transport is as for iohub-remoted (default: mpqemu); gsi is "
    "required with pid:PID; repeat for more; ,, is a comma in a value",
    (
        Argument(
            "--vm",
            "KIND",
            "how to reach the VM: embedded (a small guest that iohub-proxyd runs on /dev/kvm; the default), soft "
            "(the same without KVM), qmp:SOCKET (a stock QEMU) or pid:PID (any KVM process: interrupts only; "
            "iohub-proxyd ends when the process does, with status 0)",
        ),
        Argument(
            "--unplug-on-exit",
            "",
            "with qmp:SOCKET only: unplug the devices from QEMU on exit; by default they stay plugged",
        ),
    ),
    """\
exit status: 0 after SIGTERM or SIGINT, or when the process of pid:PID has
exited; 1 when the embedded guest died, or for a failure that may pass, such
as a full disk; 2 for invalid options, configuration or VM

example:
  iohub-proxyd --name vm1 --runtime-dir /tmp/vm1 --vm qmp:/tmp/vm1/qmp.sock \\
      --device id=com1,addr=05.0""",
    frozenset(("id", "addr", "socket", "gsi", "transport")),
    False,
)


def read_command_line(role: Role, argv: Sequence[str] | None) -> Given:
    """What was given, on the process's own command line if ``argv`` is None. Raises UsageError.

    --help and --version print to stdout, which may raise OutputError, and raise SystemExit then.
    """
    words = sys.argv[1:] if argv is None else argv
    if "-h" in words or "--help" in words:
        from common.parser import make_parser

        make_parser(role).print_help()
        raise SystemExit(0)
    given = parse_arguments(role.arguments, words)
    if "--version" in given:
        print_version(role.program)
        raise SystemExit(0)
    return given


def parse_device(role: Role, text: str) -> Keys:
    """The keys of one ``--device``; of their values only the id is checked. Raises UsageError."""
    where = f"--device {text!r}"
    check_text(text, "--device")
    keys: Keys = {}
    # An argument can't hold a null byte.
    for number, word in enumerate(text.replace(",,", "\0").split(",")):
        key, equals, value = word.replace("\0", ",").partition("=")
        if not equals and number == 0 and role.has_models and key:
            key, value = "model", key
        elif not equals:
            hint = ""
            if number == 0 and _is_id(key):
                hint = " (the model is for iohub-remoted)" if ",id=" in text else f" (id={key}?)"
            raise UsageError(f"{where}: {key!r} is not KEY=VALUE{hint}")
        if not is_key(key) or (key not in role.keys and (key in COMMON_KEYS or not role.has_models)):
            hint = f"{key} is for iohub-remoted" if key in REMOTED.keys else f"unknown key {key!r}"
            raise UsageError(f"{where}: {hint}: {role.program} takes {role.device}")
        if key in keys:
            raise UsageError(f"{where}: {key} is given twice")
        keys[key] = Value(value, where)
    check_id(keys, where)
    return keys


def check_text(text: str, where: str) -> str:
    """The text. Raises UsageError if it has control characters: paths, names and log lines are made of it."""
    if any(c < " " or c == "\x7f" for c in text):
        raise UsageError(f"{where}: {text!r} has a control character")
    return text


def check_id(keys: Keys, where: str) -> None:
    """Raises UsageError unless there is an id that can be the name of a file and of an fd."""
    if "id" not in keys:
        raise UsageError(f"{where}: id is missing")
    if not _is_id(keys["id"].text):
        raise UsageError(f"{where}: id: {keys['id'].text!r} is not 1 to 32 letters, digits, '-' and '_'")


def is_key(text: str) -> bool:
    """Whether it can name a device's option: 1 to 64 letters, digits, ``-`` and ``_``, the first a letter."""
    return text[:1] in LETTERS and consists_of(text, _WORD, _MAX_KEY)


def _is_id(text: str) -> bool:
    return consists_of(text, _WORD, _MAX_ID)


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name that a misspelt word is meant to be; None if it is like none of them."""
    import difflib  # for a user's error only

    return next(iter(difflib.get_close_matches(word.lower(), list(names), 1, _LEAST_LIKENESS)), None)
