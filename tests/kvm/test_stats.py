# SPDX-License-Identifier: GPL-2.0-or-later
"""The interrupts that a guest takes are counted, by KVM and by the userspace irqchip."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from common.config import DeviceConfig, VmConfig
from common.loop import Loop
from proxyd.kvm.stats import VcpuStats
from proxyd.vm.embedded.embedded import Embedded
from proxyd.vm.soft.soft import Soft
from tests.support.fds import count_fds
from tests.support.irqbench import IrqBench, KvmBench, SoftBench

ROUNDS = 20


@pytest.fixture
def kvm_bench(requires_kvm: None) -> Iterator[KvmBench]:
    with closing(KvmBench()) as bench:
        yield bench


def take_rounds(bench: IrqBench) -> None:
    bench.init_pics(level=(10,))
    pair = bench.assign(10)
    for _ in range(ROUNDS):
        bench.fire(10, pair)
        assert len(bench.take()) == 1
        bench.eoi(10)


def test_kvm_counts_what_the_guest_takes(kvm_bench: KvmBench) -> None:
    before = count_fds()
    stats = kvm_bench.machine.vcpu.stats()
    assert stats is not None
    assert stats.interrupts() == 0
    take_rounds(kvm_bench)
    assert stats.interrupts() == ROUNDS
    stats.close()
    stats.close()
    assert count_fds() == before + 2  # the pair


def test_a_file_without_such_a_statistic_counts_nothing(tmp_path: Path) -> None:
    path = tmp_path / "stats"
    path.write_bytes(bytes(24))
    with closing(VcpuStats(os.open(path, os.O_RDONLY))) as stats:
        assert stats.interrupts() == 0


def test_the_userspace_irqchip_counts_what_the_guest_takes() -> None:
    with closing(SoftBench()) as bench:
        take_rounds(bench)
        assert bench._soft.pic.acknowledged == ROUNDS


@pytest.mark.usefixtures("requires_kvm")
@pytest.mark.parametrize("kind", [Embedded, Soft])
def test_the_state_has_them(kind: Callable[[str, VmConfig, Loop], Embedded | Soft], tmp_path: Path) -> None:
    loop = Loop()
    device = DeviceConfig("edu0", None, 0x28, None, None, None, {})
    vm = kind("iohub-proxyd", VmConfig("vm", str(tmp_path), "x", (device,)), loop)
    assert vm.describe() == "1 functions, 0 of them linked, 0 interrupts/s"
    vm.close()
    loop.close()
