# SPDX-License-Identifier: GPL-2.0-or-later
"""What tests need from the machine. Without KVM or QEMU they are skipped, and the summary says why."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import resource
import shutil
import signal
from collections.abc import Generator

import hypothesis
import pytest

from common.errors import UsageError
from common.eventsignal import prepare
from tests.support.qemu import newer_qemu

_KVM_GET_API_VERSION = 0xAE00
_KVM_API_VERSION = 12

_FDS = 4096
"""enough for a hub with all its 256 lines wired"""


# A failure is the same in every run and every checkout. What Hypothesis draws still depends on its version and on
# the constants of the loaded modules, so a case that must be found has a test of its own. For tests that take more
# than a millisecond an example there is tests.support.lives: Hypothesis may shrink one for five minutes, and
# faulthandler_timeout ends it after two.
hypothesis.settings.register_profile("iohub", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("iohub")


def pytest_configure() -> None:
    """Lifts the soft limit of open files, which is 1024 on most systems, and undoes what nohup does.

    What a process ignores, those that it starts ignore as well, and the daemons' signals would have no effect.
    """
    for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(signum) is signal.SIG_IGN:
            signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _FDS <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (_FDS, hard))


def pytest_collection_finish() -> None:
    """Exempts pytest and all modules from count_fds()'s garbage collections, which then take no time.

    What a process opens once is opened now: no test is to take it for an fd that was left open.
    """
    with contextlib.suppress(UsageError):  # the tests that need it fail
        prepare()
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escapes lone surrogates in captured output, which a pytest-xdist worker can't send."""
    report = yield
    report.sections = [
        (title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections
    ]
    return report


@pytest.fixture(scope="session")
def requires_kvm() -> None:
    """Skips a test where KVM can't be used. It does without proxyd's code, whose faults must fail."""
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        pytest.skip(f"needs /dev/kvm: {error.strerror}")
    try:
        version = fcntl.ioctl(fd, _KVM_GET_API_VERSION)
    except OSError as error:
        pytest.skip(f"needs KVM behind /dev/kvm: {error.strerror}")
    finally:
        os.close(fd)
    if version != _KVM_API_VERSION:
        pytest.skip(f"needs KVM's API version {_KVM_API_VERSION}, this is {version}")


@pytest.fixture(scope="session")
def requires_qemu() -> None:
    """Skips a test where QEMU is not installed."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("needs qemu-system-x86_64: apt-get install qemu-system-x86")


@pytest.fixture(scope="session")
def vfio_user_qemu() -> str:
    """A QEMU that has vfio-user-pci."""
    program = newer_qemu()
    if program is None:
        pytest.skip("needs a QEMU that has vfio-user-pci: make qemu")
    return program
