"""What the terminal shows beside the text: speed and fill of the cache, in its last row."""

from __future__ import annotations

import os
import time
from typing import TextIO

EVERY_SEC = 0.25
SAVE_CURSOR, RESTORE_CURSOR, CLEAR_TO_END, DIM, NORMAL = "\x1b7", "\x1b8", "\x1b[K", "\x1b[2m", "\x1b[0m"


class StatusLine:
    """One line on standard error, only where that is a terminal.

    Where text goes to the same terminal, its last row is set apart and the text scrolls above it.
    """

    def __init__(self, err: TextIO, out: TextIO) -> None:
        visible = err.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._err = err if visible else None
        self._apart = visible and out.isatty()
        self._size: os.terminal_size | None = None

    @property
    def visible(self) -> bool:
        return self._err is not None

    def show(self, text: str) -> None:
        """Replace the line."""
        if self._err is None:
            return
        size = os.get_terminal_size(self._err.fileno())
        line = text[: max(0, size.columns - 1)]
        if not self._apart:
            self._write(f"\r{line}{CLEAR_TO_END}")
        elif size.lines > 2:
            self._write(self._set_apart(size) + self._last_row(size, f"{DIM}{line}{NORMAL}"))

    def _set_apart(self, size: os.terminal_size) -> str:
        if size == self._size:
            return ""
        scroll = "\n\x1b[A" if self._size is None else ""  # the cursor may be in the last row
        self._size = size
        return f"{scroll}{SAVE_CURSOR}\x1b[1;{size.lines - 1}r{RESTORE_CURSOR}"

    def _last_row(self, size: os.terminal_size, line: str) -> str:
        return f"{SAVE_CURSOR}\x1b[{size.lines};1H{line}{CLEAR_TO_END}{RESTORE_CURSOR}"

    def close(self) -> None:
        """Give the row back."""
        if self._err is None:
            return
        if not self._apart:
            self._write(f"\r{CLEAR_TO_END}")
        elif self._size is not None:
            self._write(f"{self._last_row(self._size, '')}{SAVE_CURSOR}\x1b[r{RESTORE_CURSOR}")

    def _write(self, text: str) -> None:
        self._err.write(text)
        self._err.flush()


class Speed:
    """Tokens per second since the last time it was asked, at most every so often."""

    def __init__(self) -> None:
        self._tokens, self._since = 0, time.perf_counter()

    def count(self) -> float | None:
        """Count a token; tokens/s when a figure is due."""
        self._tokens += 1
        elapsed = time.perf_counter() - self._since
        if elapsed < EVERY_SEC:
            return None
        speed = self._tokens / elapsed
        self._tokens, self._since = 0, time.perf_counter()
        return speed
