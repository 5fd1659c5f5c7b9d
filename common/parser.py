# SPDX-License-Identifier: GPL-2.0-or-later
"""Parsers of argparse: that of iohubctl, and those that print the daemons' help (see common.arguments)."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from common.errors import UsageError
from common.journal import printable
from common.options import Role
from common.output import emit
from common.version import print_version

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

__all__ = ["Parser", "add_version", "make_parser"]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UsageErrors, for main() to print as one line."""

    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        raise UsageError(printable(message))

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        """Prints the help to stdout. Raises OutputError."""
        emit(self.format_help())


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """As wide as the terminal. argparse would ask shutil, which loads three compression libraries."""

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
        print_version(parser.prog)
        parser.exit()


def add_version(parser: argparse.ArgumentParser) -> None:
    """Adds --version, which prints the program's name and the version of the package."""
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")


def make_parser(role: Role) -> Parser:
    """The parser that describes a daemon's options."""
    parser = Parser(
        prog=role.program,
        description=role.summary,
        epilog=role.epilog,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    for argument in role.arguments:
        names = [name for name in (argument.short, argument.name) if name]
        if argument.metavar:
            action = "append" if argument.is_repeatable else "store"
            parser.add_argument(*names, action=action, metavar=argument.metavar, help=argument.help)
        else:
            parser.add_argument(*names, action="store_true", help=argument.help)
    return parser
