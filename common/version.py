# SPDX-License-Identifier: GPL-2.0-or-later
"""The version of the installed package."""

from __future__ import annotations

__all__ = ["package_version"]


def package_version() -> str | None:
    """As in ``qemu-iohub 0.1.0``; None when it runs without being installed."""
    from importlib.metadata import PackageNotFoundError, version  # takes longer than a program's options do

    try:
        return version("qemu-iohub")
    except PackageNotFoundError:
        return None
