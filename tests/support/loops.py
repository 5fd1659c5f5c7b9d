# SPDX-License-Identifier: GPL-2.0-or-later
"""Loops in threads, for tests whose other end blocks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from common.loop import Loop


@contextmanager
def running(loop: Loop) -> Iterator[None]:
    """Runs the loop in a thread; what belongs to the loop may only be closed afterwards."""
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
