# SPDX-License-Identifier: GPL-2.0-or-later
"""What make qemu and make linux-guest say where they can't fetch, and what they leave."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.checkout import ROOT

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


@pytest.mark.skipif(
    shutil.which("apt-get") is None or not KEYRING.exists(), reason="needs apt-get and Debian's keyring"
)
def test_without_a_network_nothing_is_left(tmp_path: Path) -> None:
    apt = tmp_path / "apt.conf"
    apt.write_text(
        'Acquire::http::Proxy "http://127.0.0.1:1";\nAcquire::https::Proxy "http://127.0.0.1:1";\n'
    )
    folder = tmp_path / "fetched"
    run = subprocess.run(
        [ROOT / "tests" / "fetch" / "unpack", "stable", folder, "busybox-static"],
        env={**os.environ, "APT_CONFIG": str(apt)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert run.stdout == ""
    *causes, line = run.stderr.splitlines()
    assert line.startswith("make: apt-get update failed for Debian stable at ")
    assert any("127.0.0.1" in cause for cause in causes)
    assert list(tmp_path.iterdir()) == [apt]
