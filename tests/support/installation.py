# SPDX-License-Identifier: GPL-2.0-or-later
"""``make install`` into a directory, as a package is built, for tests of what is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.support.checkout import ROOT

__all__ = ["SYSTEM_PYTHON", "install", "make", "missing_for_install"]

SYSTEM_PYTHON = "/usr/bin/python3"


def missing_for_install() -> str | None:
    """Why ``make install`` can't be tried here; None if it can."""
    probe = "import sys; sys.exit(sys.version_info < (3, 11))"
    try:
        suitable = not subprocess.run([SYSTEM_PYTHON, "-c", probe], check=False).returncode
    except FileNotFoundError:
        suitable = False
    if not suitable:
        return f"installed programs run on {SYSTEM_PYTHON}, which is missing or older than Python 3.11"
    return None if shutil.which("make") else "needs make"


def make(target: str, *variables: str) -> str:
    """What ``make TARGET VARIABLE=...`` prints. Fails the test, with what make said, when it fails."""
    # Variables of a make that runs the tests are not for this one.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "--silent", "--no-print-directory", target, *variables],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def install(destination: Path, prefix: str = "/usr") -> Path:
    """Installs below a directory, which it returns."""
    make("install", f"DESTDIR={destination}", f"PREFIX={prefix}")
    return destination
