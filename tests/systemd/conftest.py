# SPDX-License-Identifier: GPL-2.0-or-later
"""What tests on a booted systemd share: iohub as it is installed."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.bootedsystem import missing_for_boot
from tests.support.hostbench import HostBench
from tests.support.installation import install, missing_for_install


@pytest.fixture(scope="session")
def requires_systemd() -> None:
    """Skips a test where no systemd can be booted."""
    if (reason := missing_for_boot()) is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A directory with what ``make install PREFIX=/usr`` has put there, for HostBench; not to be changed.

    It is made once for all workers of pytest-xdist.
    """
    if (reason := missing_for_install()) is not None:
        pytest.skip(reason)
    if worker_id == "master":
        return install(tmp_path_factory.mktemp("installed"))
    shared = tmp_path_factory.getbasetemp().parent
    with (shared / "installed.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "installed").exists():
            shutil.rmtree(shared / "installing", ignore_errors=True)
            install(shared / "installing").rename(shared / "installed")
    return shared / "installed"


@pytest.fixture
def host(
    installed: Path, requires_systemd: None, requires_kvm: None, requires_qemu: None
) -> Iterator[HostBench]:
    """A host whose VM runs, with its functions plugged."""
    with closing(HostBench(installed)) as bench:
        bench.start()
        yield bench
