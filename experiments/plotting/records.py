"""What was measured, as plain records, and the figures that follow from others.

A record is one cell: a method on a data set with one backend. It holds what its file says and nothing that was made
up: a figure that could not be measured is absent from ``values``, and ``reasons`` says why where the file does.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from .style import BACKENDS, METHODS, MODE_LABELS, series_label


@dataclass(frozen=True)
class Conditions:
    """What a record was measured under, as far as its file says (None: it does not)."""

    model: str | None = None
    weights: str | None = None  # "trained" | "random"
    device: str | None = None  # the GPU's name where there is one
    dtype: str | None = None
    n_sink: int | None = None
    window_size: int | None = None
    num_tokens: int | None = None
    engine: str | None = None
    scoring: str | None = None
    press: str | None = None  # which press kvpress ran
    peak_memory_kind: str | None = None

    @property
    def cache_size(self) -> int | None:
        """Tokens a full cache holds: sinks and window."""
        if self.n_sink is None or self.window_size is None:
            return None
        return self.n_sink + self.window_size


@dataclass(frozen=True)
class Series:
    """What one colour and hatch of a figure stands for."""

    method: str
    backend: str
    backend_stated: bool = True  # False: an older file, which names no backend; it keeps the bare label
    mode: str | None = None  # a mode of older files; two modes never share a series

    @property
    def label(self) -> str:
        """What the legend says."""
        return series_label(self.method, self.backend if self.backend_stated else None, self.mode)

    @property
    def family(self) -> tuple[bool, str]:
        """Series of one family belong to the same run of an evaluation."""
        return (self.backend_stated, self.mode or "")

    @property
    def order(self) -> tuple:
        """Sorting key: method by method as in ``style.METHODS``, backends side by side."""
        modes = ["", *MODE_LABELS]
        return (
            list(METHODS).index(self.method),
            not self.backend_stated,
            list(BACKENDS).index(self.backend),
            modes.index(self.mode or ""),
        )


@dataclass(frozen=True)
class Record:
    """One cell. ``values`` maps the keys of the result files to numbers, in the units that the keys name."""

    dataset: str
    series: Series
    values: Mapping[str, float] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)  # why a figure is absent
    runs: tuple[Mapping[str, float], ...] = ()  # raw repeats; values are their medians
    status: str = "ok"  # "ok" | "skipped" | "failed"
    reason: str | None = None
    conditions: Conditions = Conditions()
    environment: Mapping = field(default_factory=dict)
    details: Mapping = field(default_factory=dict)  # what else the file says of itself: hashes, time, ...
    source: Path = Path()

    def missing_reason(self, key: str) -> str:
        """Why ``values`` has no ``key``."""
        if self.status != "ok":
            return f"{self.status}: {self.reason}" if self.reason else self.status
        return self.reasons.get(key, "not in the file")


@dataclass(frozen=True)
class AblationRow:
    """One setting of an ablation, with one backend."""

    ablation: str  # "window_size" | "n_sink"
    dataset: str | None
    series: Series
    n_sink: int | None
    window_size: int | None
    values: Mapping[str, float] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    runs: tuple[Mapping[str, float], ...] = ()
    evicts: bool = True  # False: the text fits into the cache, so the setting says nothing about eviction
    status: str = "ok"
    reason: str | None = None
    conditions: Conditions = Conditions()
    environment: Mapping = field(default_factory=dict)
    details: Mapping = field(default_factory=dict)
    source: Path = Path()

    @property
    def cache_size(self) -> int | None:
        """Tokens a full cache holds in this setting."""
        if self.n_sink is None or self.window_size is None:
            return None
        return self.n_sink + self.window_size

    @property
    def setting(self) -> int:
        """The value of what is varied."""
        value = self.window_size if self.ablation == "window_size" else self.n_sink
        assert value is not None  # the reader lets no such row in
        return value

    def missing_reason(self, key: str) -> str:
        """Why ``values`` has no ``key``."""
        if self.status != "ok":
            return f"{self.status}: {self.reason}" if self.reason else self.status
        return self.reasons.get(key, "not in the file")


@dataclass(frozen=True)
class LossCurve:
    """The stored losses of one method over one text."""

    dataset: str
    series: Series
    nll: "object"  # float32 [n], nats
    position: "object"  # int [n]: the token's index in the stream
    source: Path = Path()


@dataclass(frozen=True)
class Problem:
    """A file that could not be used, or only in part. Named on the console; decides the exit code."""

    path: Path
    text: str


@dataclass(frozen=True)
class ResultSet:
    """Everything that a folder of result files holds."""

    root: Path
    records: tuple[Record, ...] = ()
    ablations: tuple[AblationRow, ...] = ()
    curves: tuple[LossCurve, ...] = ()
    problems: tuple[Problem, ...] = ()
    notices: tuple[str, ...] = ()
    num_files: int = 0  # recognised result files

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing at all to draw."""
        return not (self.records or self.ablations or self.curves)


def with_derived(record: Record) -> Record:
    """Add the figures that follow from a record's own by definition, where its file leaves them out.

    ``ttft_sec`` = prefill + first decode step; ``decode_sec`` = runtime - prefill; ``tpot_ms`` and
    ``decode_toks_per_sec`` from ``decode_sec`` and ``decode_tokens``.
    """
    return replace(
        record,
        values=_complete(record.values),
        runs=tuple(_complete(run) for run in record.runs),
    )


def _complete(values: Mapping[str, float]) -> dict[str, float]:
    out = dict(values)
    if "prefill_sec" in out and "first_token_latency_sec" in out:
        out.setdefault("ttft_sec", out["prefill_sec"] + out["first_token_latency_sec"])
    if "runtime_sec" in out and "prefill_sec" in out:
        out.setdefault("decode_sec", out["runtime_sec"] - out["prefill_sec"])
    seconds, tokens = out.get("decode_sec", 0.0), out.get("decode_tokens", 0.0)
    if seconds > 0 and tokens > 0:
        out.setdefault("tpot_ms", 1e3 * seconds / tokens)
        out.setdefault("decode_toks_per_sec", tokens / seconds)
    return out


def with_comparisons(records: Iterable[Record]) -> tuple[Record, ...]:
    """Add ``speedup`` and ``ppl_increase_percent`` where a file leaves them out.

    Both compare with the baseline of the same data set, backend, mode and decode engine, never with another's. The
    raw runs get a speedup each, run i against the baseline's run i: repeats are interleaved, so these two ran next to
    each other.
    """
    records = tuple(records)
    baselines = {_partner_key(r): r for r in records if r.series.method == "baseline"}
    return tuple(_compared(r, baselines.get(_partner_key(r))) for r in records)


def _partner_key(record: Record) -> tuple:
    series = record.series
    return (record.dataset, series.backend, series.backend_stated, series.mode)


def _compared(record: Record, baseline: Record | None) -> Record:
    if record.status != "ok":
        return record
    values, reasons, runs = dict(record.values), dict(record.reasons), record.runs
    for key, base_key in (("speedup", "runtime_sec"), ("ppl_increase_percent", "perplexity")):
        if key in values:
            continue
        why_not = _why_not_comparable(record, baseline, base_key)
        if why_not:
            reasons.setdefault(key, why_not)
        else:
            values[key] = _COMPARE[key](values[base_key], baseline.values[base_key])
    if baseline is not None and len(baseline.runs) == len(runs) and "speedup" in values:
        runs = tuple(_run_speedup(run, base) for run, base in zip(runs, baseline.runs, strict=True))
    return replace(record, values=values, reasons=reasons, runs=runs)


def _why_not_comparable(record: Record, baseline: Record | None, key: str) -> str | None:
    if baseline is None or key not in baseline.values:
        return "no baseline with the same backend"
    if record.conditions.engine != baseline.conditions.engine:
        return "the baseline ran on another decode engine"
    if key not in record.values:
        return record.missing_reason(key)
    if min(record.values[key], baseline.values[key]) <= 0:
        return f"{key} is not positive"
    return None


_COMPARE = {
    "speedup": lambda own, base: base / own,
    "ppl_increase_percent": lambda own, base: 100.0 * (own / base - 1.0),
}


def _run_speedup(run: Mapping[str, float], base: Mapping[str, float]) -> Mapping[str, float]:
    if "speedup" in run or not (run.get("runtime_sec") and base.get("runtime_sec")):
        return run
    return {**run, "speedup": _COMPARE["speedup"](run["runtime_sec"], base["runtime_sec"])}
