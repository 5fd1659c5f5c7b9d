# SPDX-License-Identifier: GPL-2.0-or-later
"""What tests on a booted systemd share: iohub as it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.bootedsystem import missing_for_boot
from tests.support.hostbench import HostBench
from tests.support.installation import install, make_deb, make_once, missing_for_deb, missing_for_install


@pytest.fixture(scope="session")
def requires_systemd() -> None:
    """Skips a test where no systemd can be booted."""
    if (reason := missing_for_boot()) is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A directory of all workers of pytest-xdist in this run."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def installed(shared: Path) -> Path:
    """A directory with what ``make install PREFIX=/usr`` has put there, for HostBench; not to be changed."""
    if (reason := missing_for_install()) is not None:
        pytest.skip(reason)
    return make_once(shared, "installed", install)


@pytest.fixture(scope="session")
def package(shared: Path) -> Path:
    """The Debian package that ``make deb`` has built."""
    if (reason := missing_for_deb()) is not None:
        pytest.skip(reason)
    (package,) = (make_once(shared, "debian", make_deb) / "deb").glob("*.deb")
    return package


@pytest.fixture(scope="module")
def booted(
    installed: Path, requires_systemd: None, requires_kvm: None, requires_qemu: None
) -> Iterator[HostBench]:
    """A host, for all tests of a module: to boot one takes seconds."""
    with closing(HostBench(installed)) as bench:
        yield bench


@pytest.fixture
def stopped_host(booted: HostBench) -> HostBench:
    """A host whose VM hasn't been started."""
    booted.renew()
    return booted


@pytest.fixture
def host(stopped_host: HostBench) -> HostBench:
    """A host whose VM runs, with its functions plugged."""
    stopped_host.start()
    return stopped_host
