"""What a stream keeps: the two numbers of StreamingLLM, validated once.

The original implementation calls them ``start_size`` and ``recent_size``.
"""

from __future__ import annotations

from dataclasses import dataclass


def require_int(name: str, value: object, minimum: int) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer (no bool) of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")


@dataclass(frozen=True)
class StreamingConfig:
    """Attention sinks and window of a stream (Xiao et al., ICLR 2024, section 3.2).

    Args:
        n_sink: first tokens of the stream that are never evicted, at least 0. 0 is plain window attention.
        window_size: recent tokens kept, the sinks and the current token excluded, at least 1.

    Raises:
        ValueError: a number is out of range or no integer.
    """

    n_sink: int = 4
    window_size: int = 1020

    def __post_init__(self) -> None:
        require_int("n_sink", self.n_sink, 0)
        require_int("window_size", self.window_size, 1)

    @property
    def cache_size(self) -> int:
        """Tokens a new token attends to besides itself, once the cache is full."""
        return self.n_sink + self.window_size
