# SPDX-License-Identifier: GPL-2.0-or-later
"""The version of the installed package."""

from __future__ import annotations

from common.errors import UsageError
from common.output import emit

__all__ = ["package_version", "print_version"]


def package_version() -> str | None:
    """As in ``qemu-iohub 0.1.0``; None when it runs without being installed."""
    from importlib.metadata import PackageNotFoundError, version  # takes longer than a program's options do

    try:
        return version("qemu-iohub")
    except PackageNotFoundError:
        return None


def print_version(program: str) -> None:
    """Prints it to stdout behind the program's name. Raises UsageError if it isn't known, and OutputError."""
    version = package_version()
    if version is None:
        raise UsageError("--version: unknown, as the package qemu-iohub is not installed")
    emit(f"{program} {version}\n")
