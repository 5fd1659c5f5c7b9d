# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemons' command lines, and ``--device`` in the style of QEMU's ``-device``.

``--device pci-serial,id=com1,addr=05.0,chardev=pty``: pairs of key and value between commas, and for remoted
the model first. ``,,`` stands for a comma in a value.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from common.errors import UsageError
from common.journal import printable
from common.output import emit
from common.text import DIGITS, LETTERS, consists_of, is_number
from common.version import package_version

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

__all__ = [
    "DEFAULT_POLL_US",
    "DEVICE_OPTIONS",
    "LONGEST_POLL_US",
    "PROXYD",
    "REMOTED",
    "Keys",
    "Parser",
    "Role",
    "Value",
    "add_version",
    "check_id",
    "check_text",
    "is_key",
    "make_parser",
    "nearest",
    "parse_device",
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
        if not is_number(self.text) or int(self.text) > maximum:
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


class Role(NamedTuple):
    """What one daemon takes on its command line."""

    program: str
    summary: str
    device: str
    """the syntax of ``--device``"""
    device_help: str
    polling: str
    """what ``--poll-max-us`` is about"""
    epilog: str
    """ends with an example"""
    keys: frozenset[str]
    """those of COMMON_KEYS that ``--device`` may have"""
    has_models: bool
    """the first word is a model, and other keys are the model's own"""


REMOTED = Role(
    "iohub-remoted",
    "Runs a VM's PCI devices, each behind a socket of its own.",
    "MODEL,id=ID[,addr=SLOT.FN][,transport=mpqemu|vfio-user][,msix=on|off][,socket=PATH|fd=N][,OPTION=VALUE...]",
    "a device, which listens at PATH (default: ID.sock in the runtime directory) or serves "
    "the connected socket that was inherited as fd N; addr defaults to the first slot from 02.0 upward that no "
    "other device given here or in the file has; transport is what its clients speak (default: mpqemu); "
    "msix=off hides MSI-X from the guest; repeat for more; ,, is a comma in a value",
    "poll for the next message",
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
    "defaults to the first slot from 02.0 upward that no other device given here or in the file has, even if "
    "QEMU has a device there; transport is as for iohub-remoted (default: mpqemu); gsi is required with pid:PID; "
    "repeat for more; ,, is a comma in a value",
    "with embedded and soft only: poll for a device's answer",
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


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UsageErrors, for main() to print as one line."""

    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        raise UsageError(printable(message))

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        """Prints the help to stdout. Raises OutputError."""
        emit(self.format_help())


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """As wide as the terminal. argparse would ask shutil at each start: three compression libraries."""

    def __init__(self, prog: str) -> None:
        try:
            columns = int(os.environ.get("COLUMNS", "0")) or os.get_terminal_size(1).columns
        except (ValueError, OSError):
            columns = 80
        super().__init__(prog, width=columns - 2)


class _Version(argparse.Action):
    """Prints the version and exits."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> NoReturn:
        version = package_version()
        if version is None:
            raise UsageError("--version: unknown, as the package qemu-iohub is not installed")
        emit(f"{parser.prog} {version}\n")
        parser.exit()


def add_version(parser: argparse.ArgumentParser) -> None:
    """Adds --version, which prints the program's name and the version of the package."""
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")


def make_parser(role: Role) -> Parser:
    """The options that both daemons have: --version, --name, --config, --runtime-dir, --allow-user,
    --verbose, --device.
    """
    parser = Parser(
        prog=role.program,
        description=role.summary,
        epilog=role.epilog,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    add_version(parser)
    parser.add_argument("--name", metavar="VM", help="the VM's name; required here or in the file")
    parser.add_argument(
        "--config", metavar="FILE", help="the VM's TOML file, which both daemons read; options override it"
    )
    parser.add_argument(
        "--runtime-dir",
        metavar="DIR",
        help="where the sockets are (default: /run/iohub/VM, or "
        "$XDG_RUNTIME_DIR/iohub/VM for users other than root)",
    )
    parser.add_argument(
        "--allow-user",
        metavar="USER",
        action="append",
        default=[],
        help="another user, by name or number, whose processes and directories are trusted besides root's and "
        "the daemon's own; repeat for more; replaces the file's allow-users",
    )
    parser.add_argument(
        "--poll-max-us",
        metavar="N",
        help=f"{role.polling} for at most N microseconds before sleeping, adapted to the traffic; 0 to "
        f"{LONGEST_POLL_US}, 0 turns polling off (default: {DEFAULT_POLL_US})",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="also log debug messages")
    parser.add_argument("--device", metavar=role.device, action="append", default=[], help=role.device_help)
    return parser


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
