"""What the report says, as plain data: sentences, tables of cells, environments. No HTML here."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .captions import caption, peak_memory_note
from .metrics import MINUS, TIMES, short_number
from .names import ABLATION_TYPES
from .records import AblationRow, Record, ResultSet, Series
from .series import safe_name, sorted_series
from .style import MODE_LABELS, dataset_label


@dataclass(frozen=True)
class Run:
    """The results of one root, under the name that the report gives them."""

    name: str
    results: ResultSet


@dataclass(frozen=True)
class Column:
    """A column of a table: the key of the figure, its heading, and the unit."""

    key: str
    title: str
    unit: str = ""
    whole: bool = False
    scale: float = 1.0  # from the unit of the files to that of the column


@dataclass(frozen=True)
class Row:
    """A row of a table: texts, figures, and what the filters go by."""

    texts: tuple[str, ...]
    values: Mapping[str, float]
    reasons: Mapping[str, str]
    note: str
    environment: int  # index into the environments
    run: str
    dataset: str  # as in ids: see series.safe_name
    method: str
    backend: str
    spans: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Environment:
    """One set of conditions, and the files that were measured under it."""

    run: str
    entries: tuple[tuple[str, str], ...]
    files: tuple[tuple[str, ...], ...]  # name, config_hash, data_sha256, timestamp
    datasets: tuple[str, ...]
    backends: tuple[str, ...]


RESULT_COLUMNS = (
    Column("perplexity", "Perplexity"),
    Column("ppl_increase_percent", "Increase", "%"),
    Column("speedup", "Speedup", TIMES),
    Column("runtime_sec", "Runtime", "s"),
    Column("prefill_sec", "Prefill", "ms", scale=1e3),
    Column("ttft_sec", "TTFT", "ms", scale=1e3),
    Column("decode_toks_per_sec", "Decode", "tokens/s"),
    Column("tpot_ms", "TPOT", "ms"),
    Column("kv_cache_mb", "KV cache", "MB"),
    Column("peak_memory_mb", "Peak memory", "MB"),
)
ABLATION_COLUMNS = (
    Column("n_sink", "n_sink", whole=True),
    Column("window_size", "window_size", whole=True),
    Column("perplexity", "Perplexity"),
    Column("decode_toks_per_sec", "Decode", "tokens/s"),
    Column("runtime_sec", "Runtime", "s"),
    Column("prefill_sec", "Prefill", "ms", scale=1e3),
    Column("kv_cache_mb", "KV cache", "MB"),
)
_FILE_KEYS = ("config_hash", "data_sha256", "timestamp")
# Entries of a file that say what was measured, not under which conditions.
_NOT_CONDITIONS = (
    *_FILE_KEYS,
    *("method", "dataset", "dataset_key", "experiment", "backend", "status", "reason", "label", "schema_version"),
    *("num_tokens", "max_eval_tokens", "ablation_type", "held_constant", "attn_backend", "engine"),
    *("total_time", "prefill_time", "n_sink", "window_size", "max_cache_size", "peak_memory_kind", "prompt_tokens"),
    *("scored_tokens", "scoring_sec", "scoring", "press_class", "key_rerotation", "kvpress_press", "tokens"),
)


class Environments:
    """Numbers the distinct environments in the order in which they are met."""

    def __init__(self):
        self._by_key: dict[str, int] = {}
        self._entries: list[tuple[str, tuple[tuple[str, str], ...]]] = []
        self._members: list[list[Record | AblationRow]] = []

    def index(self, run: str, record: Record | AblationRow) -> int:
        """The number of a record's environment."""
        entries = tuple(_flatten(_conditions(record)))
        key = json.dumps([run, entries])
        if key not in self._by_key:
            self._by_key[key] = len(self._entries)
            self._entries.append((run, entries))
            self._members.append([])
        self._members[self._by_key[key]].append(record)
        return self._by_key[key]

    def all(self) -> list[Environment]:
        """The environments with their files."""
        out = []
        for (run, entries), members in zip(self._entries, self._members, strict=True):
            files = {m.source.name: tuple(str(m.details.get(key, "")) for key in _FILE_KEYS) for m in members}
            out.append(
                Environment(
                    run,
                    entries,
                    tuple((name, *rest) for name, rest in sorted(files.items())),
                    tuple(sorted({safe_name(m.dataset or "") for m in members})),
                    tuple(sorted({m.series.backend for m in members})),
                )
            )
        return out


def result_rows(runs: Sequence[Run], environments: Environments) -> list[Row]:
    """A row per cell of the evaluation."""
    rows = []
    for run in runs:
        for record in sorted(run.results.records, key=lambda r: (r.dataset, r.series.order)):
            texts = (
                run.name,
                dataset_label(record.dataset),
                _method_text(record.series),
                _backend_text(record.series),
            )
            rows.append(_row(run.name, record, texts, environments))
    return rows


def ablation_rows(runs: Sequence[Run], environments: Environments) -> list[Row]:
    """A row per setting of an ablation."""
    rows = []
    for run in runs:
        order = {kind: i for i, kind in enumerate(ABLATION_TYPES)}
        ablations = sorted(run.results.ablations, key=lambda r: (order[r.ablation], r.series.order, r.setting))
        for row in ablations:
            dataset = dataset_label(row.dataset) if row.dataset else ""
            texts = (run.name, row.ablation, dataset, _backend_text(row.series))
            rows.append(_row(run.name, row, texts, environments))
    return rows


@dataclass(frozen=True)
class Glance:
    """What a reader should know first about a series; ranges are over the data sets."""

    series: Series
    speed: str
    perplexity: str
    memory: str


def glance(results: ResultSet) -> list[Glance]:
    """Each series against the baseline with the same backend, and what it holds in memory."""
    lines = []
    for series in sorted_series(results.records):
        records = [r for r in results.records if r.series == series and r.status == "ok"]
        if series.method == "baseline" or not records:
            continue
        lines.append(
            Glance(
                series,
                _range(records, "speedup", TIMES),
                _range(records, "ppl_increase_percent", "\xa0%", signed=True),
                _range(records, "kv_cache_mb", "\xa0MB"),
            )
        )
    return lines


def conditions_line(results: ResultSet) -> str:
    """Under what the results were measured, in one line."""
    parts = [caption(results.records or results.ablations, repeats=False), peak_memory_note(results.records)]
    return " · ".join(part for part in parts if part).replace("\xa0", " ")


def format_value(value: float, column: Column) -> str:
    """A figure of the files as a table shows it: whole numbers as they are, else some four significant digits."""
    value *= column.scale
    size = abs(value)
    if column.whole:
        return f"{value:,.0f}"
    if size >= 1e6:
        return short_number(value)
    decimals = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 1 else 3
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def _row(run: str, record: Record | AblationRow, texts: tuple[str, ...], environments: Environments) -> Row:
    values = dict(record.values)
    note = ""
    if isinstance(record, AblationRow):
        sizes = {"n_sink": record.n_sink, "window_size": record.window_size}
        values |= {key: float(size) for key, size in sizes.items() if size is not None}
        note = "" if record.evicts else "evicts nothing: the text fits into the cache"
    if record.status != "ok":
        values, note = {}, record.missing_reason("")
    return Row(
        texts=texts,
        values=values,
        reasons=record.reasons,
        note=note,
        environment=environments.index(run, record),
        run=run,
        dataset=safe_name(record.dataset or ""),
        method=record.series.method,
        backend=record.series.backend,
        spans=_spans(record),
    )


def _spans(record: Record | AblationRow) -> dict[str, tuple[float, float]]:
    keys = {key for run in record.runs for key in run}
    samples = {key: [run[key] for run in record.runs if key in run] for key in keys}
    return {key: (min(s), max(s)) for key, s in samples.items() if len(s) > 1 and min(s) < max(s)}


def _method_text(series: Series) -> str:
    label = Series(series.method, series.backend, backend_stated=False).label
    return f"{label}, {MODE_LABELS[series.mode]}" if series.mode else label


def _backend_text(series: Series) -> str:
    return series.backend if series.backend_stated else "not stated"


def _conditions(record: Record | AblationRow) -> dict:
    own = {key: value for key, value in record.details.items() if key not in _NOT_CONDITIONS}
    return {**own, **record.environment}


def _flatten(mapping: Mapping, prefix: str = "") -> list[tuple[str, str]]:
    out = []
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            out += _flatten(value, f"{prefix}{key}.")
        elif value is not None and value != "":
            text = value if isinstance(value, str) else json.dumps(value)
            out.append((f"{prefix}{key}", text))
    return out


def _range(records: Sequence[Record], key: str, unit: str, signed: bool = False) -> str:
    values = [r.values[key] for r in records if key in r.values]
    if not values:
        return "\N{EN DASH}"
    low, high = (f"{'+' if signed and v >= 0 else ''}{short_number(v)}" for v in (min(values), max(values)))
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"
