# SPDX-License-Identifier: GPL-2.0-or-later
"""What modules say is amiss, as it goes into a reply."""

from __future__ import annotations

from common.amiss import Amiss


def test_all_sources_are_asked_anew_each_time_and_in_their_order() -> None:
    amiss = Amiss()
    first: list[str] = []
    amiss.add(lambda: first)
    amiss.add(lambda: ["b", "c"])
    assert amiss.texts() == ["b", "c"]
    first.append("a")
    assert amiss.texts() == ["a", "b", "c"]


def test_a_text_is_one_printable_line_of_bounded_length() -> None:
    amiss = Amiss()
    amiss.add(lambda: ["a\nroot: b\x1b[2J", "x" * 100_000])
    forged, long = amiss.texts()
    assert forged == "a\\nroot: b\\x1b[2J"
    assert len(long) == 256


def test_there_are_not_more_texts_than_a_reply_has_room_for() -> None:
    amiss = Amiss()
    for source in range(10):
        amiss.add(lambda source=source: (f"{source}.{text}" for text in range(10)))  # type: ignore[misc]
    assert len(amiss.texts()) == 16
