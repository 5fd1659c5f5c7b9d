# SPDX-License-Identifier: GPL-2.0-or-later
"""Where VMs have their runtime directories on this host, and which VMs there are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from common.config import check_name
from common.errors import UsageError

__all__ = ["find_runtime_dir", "find_vms", "runtime_roots"]

_SYSTEM_ROOT = Path("/run/iohub")


def runtime_roots(uid: int, environ: Mapping[str, str]) -> list[Path]:
    """The directories in which VMs have theirs, the user's own first: /run/iohub, $XDG_RUNTIME_DIR/iohub."""
    base = environ.get("XDG_RUNTIME_DIR", "")
    roots = [Path(base, "iohub")] if base.startswith("/") else []
    return [_SYSTEM_ROOT, *roots] if uid == 0 else [*roots, _SYSTEM_ROOT]


def find_runtime_dir(name: str, uid: int, environ: Mapping[str, str]) -> Path:
    """The first runtime directory of a VM of this name; where it would be if there is none. Raises UsageError."""
    check_name(name)
    directories = [root / name for root in runtime_roots(uid, environ)]
    return next(filter(os.path.isdir, directories), directories[0])


def find_vms(root: Path) -> Iterator[Path]:
    """The runtime directories in which a daemon has, or had, a control socket, by name.

    Raises OSError for a root that is there but can't be read.
    """
    try:
        names = sorted(os.listdir(root))
    except FileNotFoundError:
        return
    for name in names:
        try:
            check_name(name)
        except UsageError:
            continue
        if any(os.path.lexists(root / name / f"{daemon}.varlink") for daemon in ("remoted", "proxyd")):
            yield root / name
