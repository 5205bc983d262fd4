"""The loss of every token, in a file: what has been scored, whatever the stream's length."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np


class LossFile:
    """Losses in the order of the stream, float32, in nats; appended to, and cut back to a checkpoint.

    Args:
        path: made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()
        self._file = path.open("r+b")

    def __enter__(self) -> LossFile:
        return self

    def __exit__(self, *exc_info) -> None:
        self._file.close()

    def cut(self, length: int) -> None:
        """Keep the first `length` losses, and go on behind them.

        Raises:
            ValueError: there are fewer.
        """
        held = self.path.stat().st_size // 4
        if held < length:
            raise ValueError(f"{self.path} holds {held} losses, {length} were written")
        self._file.truncate(4 * length)
        self._file.seek(4 * length)

    def append(self, losses: np.ndarray) -> None:
        self._file.write(losses.astype("<f4", copy=False).tobytes())

    def sync(self) -> None:
        """Bring what was appended to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def read(self) -> np.ndarray:
        """All losses ``[n]``, mapped from the file."""
        self._file.flush()
        if not self.path.stat().st_size:
            return np.empty(0, dtype="<f4")
        return np.memmap(self.path, dtype="<f4", mode="r")
