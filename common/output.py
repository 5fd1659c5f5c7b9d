# SPDX-License-Identifier: GPL-2.0-or-later
"""Output to stdout and stderr, whose readers may have gone and whose filesystem may be full."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys

from common.errors import IohubError

__all__ = ["OutputError", "complain", "emit"]


class OutputError(IohubError):
    """Standard output takes no more."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(f"standard output: {cause.strerror or cause}")
        self.status = 128 + signal.SIGPIPE if isinstance(cause, BrokenPipeError) else 1
        """the exit status; if the reader has gone, the one that shells give to a process killed by SIGPIPE"""


def emit(text: str) -> None:
    """Prints to stdout and flushes it. Raises OutputError."""
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        encoding = sys.stdout.encoding
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except OSError as error:
        _discard_output()
        raise OutputError(error) from error


def complain(program: str, error: Exception) -> None:
    """Prints an error as one line to stderr; but nothing for a reader of stdout that has gone (OutputError)."""
    if isinstance(error, OutputError) and isinstance(error.__cause__, BrokenPipeError):
        return
    with contextlib.suppress(OSError):
        print(f"{program}: {getattr(error, 'strerror', None) or error}", file=sys.stderr, flush=True)


def _discard_output() -> None:
    """Keeps the interpreter from writing it again when it ends, which would fail with status 120."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        devnull = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)
