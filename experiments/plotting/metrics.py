"""The table of what can be drawn: title, unit, direction, and what a figure does with the baseline."""

from collections.abc import Callable
from dataclasses import dataclass

MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
ARROWS = {"lower": "\N{DOWNWARDS ARROW}", "higher": "\N{UPWARDS ARROW}"}
_SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Metric:
    """One column of the table of results, and how it is drawn. ``unit`` is that of the result files."""

    key: str
    title: str
    axis: str  # short enough for a small panel
    unit: str = ""
    better: str = "lower"  # or "higher"
    reference: float | None = None  # the baseline's own value, where the metric compares with the baseline
    log_ratio: float = 40.0  # a wider range of values goes on a log axis, else the small ones cannot be read
    signed: bool = False  # may be negative

    def axis_label(self, largest: float) -> tuple[str, float]:
        """-> name, unit and the better direction of an axis, and the factor from the files' unit to the axis's.

        Times whose largest is below 1 read better in the next smaller unit.
        """
        smaller = {"s": "ms", "ms": "µs"}.get(self.unit) if 0 < largest < 1 else None
        unit = smaller or self.unit
        return f"{self.axis} ({unit}) {ARROWS[self.better]}" if unit else f"{self.axis} {ARROWS[self.better]}", (
            1e3 if smaller else 1.0
        )


METRICS = {
    metric.key: metric
    for metric in (
        Metric("perplexity", "Perplexity", "perplexity", log_ratio=10.0),
        Metric(
            "ppl_increase_percent", "Perplexity increase over the baseline", "increase", "%", reference=0, signed=True
        ),
        Metric("runtime_sec", "Runtime: prefill and decode", "runtime", "s"),
        Metric("speedup", "Speedup over the baseline, whole run", "speedup", TIMES, "higher", reference=1),
        Metric("prefill_sec", "Prefill: until the prompt is in", "prefill", "s"),
        Metric("ttft_sec", "Time to first token: prefill and one step", "TTFT", "s"),
        Metric("first_token_latency_sec", "First decode step", "first step", "s"),
        Metric("decode_sec", "Decode: after the prefill", "decode", "s"),
        Metric("decode_toks_per_sec", "Decode throughput", "decode", "tokens/s", "higher"),
        Metric("tpot_ms", "Time per decoded token", "time per token", "ms"),
        Metric("peak_memory_mb", "Peak memory", "peak memory", "MB"),
        Metric("kv_cache_mb", "Keys and values held at the end", "KV cache", "MB"),
        Metric("math_over_prefill", "Prefill, time with math / time with it", "prefill", TIMES, "higher", 1),
        Metric("math_over_decode", "Decode step, time with math / time with it", "decode step", TIMES, "higher", 1),
    )
}


def short_number(value: float) -> str:
    """Three significant digits, at most five characters and a sign: 0.512, 23.4, 768, 1.23k, 4.10M."""
    if abs(value) >= 1e15:
        return f"{value:.0e}".replace("-", MINUS)
    if abs(value) < 5e-4:
        return "0"
    return _shortened(value, 0.9995, _three_digits)


def tick_number(value: float) -> str:
    """An axis tick: no trailing noughts, k and M for thousands and millions."""
    return _shortened(value, 1.0, "{:g}".format)


def _shortened(value: float, share: float, write: Callable[[float], str]) -> str:
    limit, suffix = next((s for s in _SUFFIXES if abs(value) >= share * s[0]), (1.0, ""))
    return f"{write(value / limit)}{suffix}".replace("-", MINUS)


def _three_digits(value: float) -> str:
    size = abs(value)
    return f"{value:.{0 if size >= 99.95 else 1 if size >= 9.995 else 2 if size >= 0.9995 else 3}f}"
