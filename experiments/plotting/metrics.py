"""The table of what can be drawn: title, axis, unit, direction, and what a figure does with the baseline."""

from dataclasses import dataclass

MINUS = "\N{MINUS SIGN}"
_SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class Metric:
    """One figure of a record, and how it is drawn. ``unit`` is that of the result files."""

    key: str
    title: str
    axis: str
    unit: str = ""
    better: str = ""  # "lower" | "higher"
    with_baseline: bool = True  # False: the figure compares with the baseline, which is the line `reference`
    reference: float | None = None
    signed: bool = False  # may be negative
    short: str = ""  # what small panels call it, where `axis` is too long
    log_ratio: float = 40.0  # a wider range of values goes on a log axis, else the small ones cannot be read

    @property
    def subtitle(self) -> str:
        """Which way is good, and what the reference line is."""
        parts = [f"{self.better} is better"] if self.better else []
        if self.reference is not None and not self.with_baseline:
            parts.append("line: the baseline with the same backend")
        return "; ".join(parts)


METRICS = {
    m.key: m
    for m in (
        Metric("perplexity", "Perplexity", "perplexity", better="lower", log_ratio=10.0),
        Metric(
            "ppl_increase_percent",
            "Perplexity increase over the baseline",
            "perplexity increase",
            "%",
            better="lower",
            short="increase",
            with_baseline=False,
            reference=0.0,
            signed=True,
        ),
        Metric("runtime_sec", "Runtime: prefill and decode", "runtime", "s", better="lower"),
        Metric(
            "speedup",
            "Speedup over the baseline",
            "speedup",
            TIMES,
            better="higher",
            with_baseline=False,
            reference=1.0,
        ),
        Metric("prefill_sec", "Prefill: until the prompt is in", "prefill time", "s", better="lower", short="prefill"),
        Metric(
            "ttft_sec",
            "Time to first token: prefill and one step",
            "time to first token",
            "s",
            better="lower",
            short="TTFT",
        ),
        Metric("first_token_latency_sec", "First decode step", "first step", "s", better="lower"),
        Metric("decode_sec", "Decode: after the prefill", "decode time", "s", better="lower"),
        Metric("decode_toks_per_sec", "Decode throughput", "decode rate", "tokens/s", better="higher", short="decode"),
        Metric("tpot_ms", "Time per decoded token", "time per token", "ms", better="lower", short="TPOT"),
        Metric("peak_memory_mb", "Peak memory", "peak memory", "MB", better="lower"),
        Metric(
            "kv_cache_mb", "Keys and values held at the end", "keys and values", "MB", better="lower", short="KV cache"
        ),
    )
}


def axis_unit(unit: str, largest: float) -> tuple[float, str]:
    """-> (factor, unit) for an axis whose largest value is ``largest``: short times read better in ms."""
    if unit == "s" and 0 < largest < 1.0:
        return 1e3, "ms"
    if unit == "ms" and 0 < largest < 1.0:
        return 1e3, "µs"
    return 1.0, unit


def short_number(value: float) -> str:
    """Three significant digits, at most five characters and a sign: 0.512, 23.4, 768, 1.23k, 4.10M."""
    return _short(value).replace("-", MINUS)


def _short(value: float) -> str:
    size = abs(value)
    if size >= 1e15:
        return f"{value:.0e}"
    for limit, suffix in _SUFFIXES:
        if size >= 0.9995 * limit:
            return f"{_three_digits(value / limit)}{suffix}"
    return "0" if size < 5e-4 else _three_digits(value)


def _three_digits(value: float) -> str:
    size = abs(value)
    digits = 0 if size >= 99.95 else 1 if size >= 9.995 else 2 if size >= 0.9995 else 3
    return f"{value:.{digits}f}"


def tick_number(value: float) -> str:
    """An axis tick: no trailing noughts, k and M for thousands and millions."""
    for limit, suffix in _SUFFIXES:
        if abs(value) >= limit:
            return f"{value / limit:g}{suffix}".replace("-", MINUS)
    return f"{value:g}".replace("-", MINUS)


def whole_number(value: float) -> str:
    """A setting on an axis: 252, 1024, 131k."""
    return f"{value:g}" if abs(value) < 1e4 else short_number(value)
