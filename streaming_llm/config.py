"""What a stream keeps: the two numbers of StreamingLLM, validated once.

The original implementation calls them ``start_size`` and ``recent_size``.
"""

from __future__ import annotations

from dataclasses import dataclass

SLIDING_LAYERS = ("auto", "keep", "stream")


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
        sliding_layers: what becomes of layers that have a sliding window of the model's own. ``keep``: they stay as
            the model has them, without sinks. ``stream``: the rule of the stream holds in them too. ``auto``:
            ``keep`` where other layers see everything, else ``stream``.

    Raises:
        ValueError: a number is out of range or no integer, or ``sliding_layers`` is none of these.
    """

    n_sink: int = 4
    window_size: int = 1020
    sliding_layers: str = "auto"

    def __post_init__(self) -> None:
        require_int("n_sink", self.n_sink, 0)
        require_int("window_size", self.window_size, 1)
        if self.sliding_layers not in SLIDING_LAYERS:
            raise ValueError(f"sliding_layers must be one of {', '.join(SLIDING_LAYERS)}, got {self.sliding_layers!r}")

    @property
    def cache_size(self) -> int:
        """Tokens a new token attends to besides itself, once the cache is full."""
        return self.n_sink + self.window_size

    @classmethod
    def given(cls, n_sink: int, window_size: int, config: StreamingConfig | None) -> StreamingConfig:
        """What an entry point was given: ``config``, or the two numbers.

        Raises:
            ValueError: both were given and differ, or a number is out of range.
        """
        if config is None:
            return cls(n_sink, window_size)
        if (n_sink, window_size) not in ((cls.n_sink, cls.window_size), (config.n_sink, config.window_size)):
            raise ValueError(f"give n_sink and window_size or config, not both: got {n_sink}, {window_size}, {config}")
        return config
