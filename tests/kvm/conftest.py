# SPDX-License-Identifier: GPL-2.0-or-later
"""Benches for tests that must hold for KVM's irqchip and for the userspace one alike."""

from collections.abc import Iterator

import pytest

from tests.support.irqbench import IrqBench, KvmBench, SoftBench


@pytest.fixture
def kvm_bench(requires_kvm: None) -> Iterator[KvmBench]:
    bench = KvmBench()
    yield bench
    bench.close()


@pytest.fixture(params=["kvm", "soft"])
def bench(request: pytest.FixtureRequest) -> Iterator[IrqBench]:
    if request.param == "kvm":
        yield request.getfixturevalue("kvm_bench")
    else:
        bench = SoftBench()
        yield bench
        bench.close()
