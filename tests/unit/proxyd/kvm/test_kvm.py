# SPDX-License-Identifier: GPL-2.0-or-later
"""What a machine without a usable /dev/kvm gets to read."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.errors import UsageError
from proxyd.kvm.kvm import REQUIRED_CAPABILITIES, Kvm, missing_capabilities
from proxyd.kvm.kvm_h import Capability
from tests.support.fds import count_fds

NOBODY = 65534


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may open anything, whatever its mode."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_complete_kernel_lacks_nothing() -> None:
    assert missing_capabilities(dict.fromkeys(Capability, 1)) == []
    assert missing_capabilities(dict.fromkeys(Capability, 1) | {Capability.IRQ_ROUTING: 4096}) == []


@pytest.mark.parametrize("answer", [0, -1, None])
@pytest.mark.parametrize("capability", REQUIRED_CAPABILITIES)
def test_each_missing_capability_is_named(capability: Capability, answer: int | None) -> None:
    present = dict.fromkeys(Capability, 1)
    del present[capability]
    if answer is not None:
        present[capability] = answer
    assert missing_capabilities(present) == [f"KVM_CAP_{capability.name}"]


def test_all_missing_capabilities_are_named() -> None:
    present = dict.fromkeys(Capability, 1) | {Capability.IRQFD_RESAMPLE: 0, Capability.IRQCHIP: 0}
    assert missing_capabilities(present) == ["KVM_CAP_IRQCHIP", "KVM_CAP_IRQFD_RESAMPLE"]


def refusal(path: Path | str) -> str:
    with pytest.raises(UsageError) as caught:
        Kvm(str(path))
    line = str(caught.value)
    assert "--vm soft" in line
    assert "\n" not in line
    return line


def test_a_missing_device_is_reported_with_the_way_without_it(tmp_path: Path) -> None:
    assert refusal(tmp_path / "kvm").startswith(f"{tmp_path}/kvm: No such file or directory; ")


def test_a_forbidden_device_is_reported_with_the_way_without_it(tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    device.touch(mode=0)
    with unprivileged():
        assert refusal(device).startswith(f"{device}: Permission denied; ")


def test_a_device_that_is_not_kvm_is_reported() -> None:
    before = count_fds()
    assert refusal("/dev/null").startswith("/dev/null is not KVM's device: Inappropriate ioctl for device; ")
    assert count_fds() == before
