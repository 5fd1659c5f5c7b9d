# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the table and the PBA of MSI-X are placed. What is refused is in test_declaration.py."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from common.errors import UsageError
from common.pci import Bar, BarKind
from remoted.device import Msix
from remoted.msi import place_msix

PAGE = 4096
MEM = Bar(BarKind.MEM32, PAGE)


def shared(offset: int, size: int = PAGE) -> Bar:
    """A BAR of four pages, of which the guest may map an area."""
    return Bar(BarKind.MEM32, 4 * PAGE, shared=((offset, size),))


@pytest.mark.parametrize(("vectors", "size"), [(1, PAGE), (254, PAGE), (255, 2 * PAGE), (2048, 16 * PAGE)])
def test_a_bar_of_its_own_has_room_for_table_and_pba(vectors: int, size: int) -> None:
    msix, bars = place_msix(Msix(vectors), {})
    assert (msix.bar, msix.table, msix.pba) == (5, 0, 16 * vectors)
    assert bars == {5: Bar(BarKind.MEM32, size)}


@pytest.mark.parametrize(
    ("bars", "number"),
    [
        ({0: MEM}, 5),
        ({5: MEM}, 4),
        ({4: Bar(BarKind.MEM64, PAGE)}, 3),
        ({2: Bar(BarKind.MEM64, PAGE), 4: MEM, 5: MEM}, 1),
    ],
)
def test_its_own_bar_is_the_last_that_the_class_leaves_free(bars: Mapping[int, Bar], number: int) -> None:
    msix, placed = place_msix(Msix(4), bars)
    assert msix.bar == number
    assert placed == {**bars, number: MEM}


def test_without_a_free_bar_it_says_how_to_do_without_one() -> None:
    bars = {number: Bar(BarKind.MEM64, PAGE) for number in (0, 2, 4)}
    with pytest.raises(
        UsageError, match=r"^MSIX: no BAR is free for its table: bar= places it in one of the"
    ):
        place_msix(Msix(4), bars)


@pytest.mark.parametrize(
    ("msix", "bar", "pba"),
    [
        (Msix(4, bar=0), MEM, 64),
        (Msix(4, bar=0, table=8, pba=0), MEM, 0),
        (Msix(4, bar=0, table=PAGE - 72), MEM, PAGE - 8),
        (Msix(16, bar=0, table=PAGE - 256, pba=0), shared(PAGE), 0),
        (Msix(4, bar=0, table=2 * PAGE, pba=PAGE - 8), shared(PAGE), PAGE - 8),
    ],
    ids=["pba behind", "pba before", "up to the end", "up to shared memory", "around shared memory"],
)
def test_a_place_in_a_bar_of_the_class(msix: Msix, bar: Bar, pba: int) -> None:
    placed, bars = place_msix(msix, {0: bar})
    assert (placed.bar, placed.table, placed.pba) == (0, msix.table, pba)
    assert bars == {0: bar}


@pytest.mark.parametrize(
    "msix",
    [
        Msix(4, bar=0, table=PAGE),
        Msix(4, bar=0, table=2 * PAGE - 64),
        Msix(16, bar=0, table=PAGE - 248, pba=0),
        Msix(512, bar=0, table=PAGE - 8),
        Msix(4, bar=0, pba=PAGE),
    ],
)
def test_shared_memory_and_table_or_pba_do_not_overlap(msix: Msix) -> None:
    with pytest.raises(
        UsageError, match=r"^MSIX: table or pba overlap the shared memory at 0x1000 of BAR 0$"
    ):
        place_msix(msix, {0: shared(PAGE)})
