"""Words below figures: the conditions under which their rows were measured, and what is missing."""

from collections.abc import Iterable, Sequence
from pathlib import PurePath

import numpy as np
import pandas as pd

from . import style
from .files import SIZES
from .style import METRICS, short_number
from .table import why_missing

SHORT_CHARS = 50


def caption(rows: pd.DataFrame, without: Sequence[str] = ()) -> str:
    """One paragraph: model, device, dtype, cache, tokens, engines, repeats. What the files do not say is left out.

    Args:
        without: Parts that the figure itself varies or does not concern: ``cache``, ``tokens``, ``repeats``.
    """
    rows = rows[rows["status"] != "absent"]
    parts = {
        "model": _distinct(map(_model, rows["model"], rows["weights"])),
        "device": _distinct(rows["device"]),
        "dtype": _distinct(rows["dtype"]),
        "cache": _distinct(f"cache {s:.0f} + {w:,.0f} tokens" for s, w in rows[list(SIZES[:2])].dropna().values),
        "tokens": _distinct(f"{n:,.0f} tokens of text" for n in rows["num_tokens"].dropna()),
        "press": _distinct(f"kvpress: {p}" for p in rows["kvpress_press"].dropna() if p != "streaming_llm"),
        "engines": _engines(rows),
        "repeats": _distinct(f"{n:.0f}" for n in rows["repeats"] if n > 1),
    }
    if parts["repeats"]:
        parts["repeats"] = f"median of {parts['repeats']} runs; whiskers: all of them"
    shown = [text for name, text in parts.items() if text and name not in without]
    # A short part stays on one line: no-break spaces within it.
    return " · ".join(text.replace(" ", "\xa0") if len(text) < SHORT_CHARS else text for text in shown)


def memory_note(rows: pd.DataFrame) -> str:
    """What the figures of memory mean: peak memory is not the same thing on a GPU and on a CPU."""
    kinds = _distinct(rows["peak_memory_kind"])
    return f"KV cache: held between steps; peak memory: {kinds}" if kinds else ""


def findings(cells: pd.DataFrame) -> str:
    """One sentence: what StreamingLLM gains and costs on these data sets, as ranges over them and the backends."""
    ours = cells[(cells["method"] == "streaming") & (cells["status"] == "ok")]
    *others, last = map(style.dataset_label, sorted(ours["dataset"].unique()) or [""])
    on = f"On {', '.join(others)}{' and ' * bool(others)}{last}"
    speedup, change = ours["speedup"].dropna(), ours["ppl_increase_percent"].dropna()
    parts = []
    if len(speedup):
        parts.append(f"was {_span(speedup)} times as fast as re-computing the window at every step")
    elif ours["decode_toks_per_sec"].notna().any():
        parts.append(f"decoded {_span(ours['decode_toks_per_sec'])} tokens per second")
    if len(change):
        lower, higher = -change[change < 0], change[change >= 0]
        words = [f"{_span(values)}% {word}" for values, word in ((lower, "lower"), (higher, "higher")) if len(values)]
        parts.append(f"had a perplexity {' or '.join(words)}")
    elif ours["perplexity"].notna().any():
        parts.append(f"had a perplexity of {_span(ours['perplexity'])}")
    return f"{on}, StreamingLLM {' and '.join(parts)}." if parts else "There is no result of StreamingLLM among them."


def missing_lines(rows: pd.DataFrame, keys: Sequence[str] = (), longest: int = 0) -> list[str]:
    """Name what has no value, a line for each reason: ``KVPress (flash) on PG19: no result``.

    Cells that have no value at all first; then those that have none for some of the metrics ``keys``, with the
    metric's name. A series that misses on all data sets, of several, is named without them.

    Args:
        longest: Longer reasons are cut, characters; 0: none is.
    """
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    known = list(rows[["dataset", "label", "method", "status", "reason", "reasons", *keys]].itertuples())
    for key in ("", *keys):
        reference = METRICS[key].reference if key else None
        for row in known:
            lacks = row.status == "ok" and np.isnan(getattr(row, key)) if key else row.status != "ok"
            if lacks and (reference is None or row.method != "baseline"):
                reason = why_missing(row, key)
                short = reason if not 0 < longest < len(reason) else reason[: longest - 1].rstrip() + "…"
                what = f"{METRICS[key].title}: " if key else ""
                found.setdefault((what, short), {}).setdefault(row.label, []).append(style.dataset_label(row.dataset))
    lines, several = [], rows["dataset"].nunique() > 1
    for (what, reason), by_label in found.items():
        by_place: dict[str, list[str]] = {}
        for label, datasets in by_label.items():
            everywhere = several and len(datasets) == rows["dataset"].nunique()
            by_place.setdefault("" if everywhere else f" on {', '.join(datasets)}", []).append(label)
        cells = "; ".join(", ".join(labels) + place for place, labels in by_place.items())
        lines.append(f"{what}{cells}: {reason}")
    return lines


def _span(values: pd.Series) -> str:
    return " to ".join(dict.fromkeys(short_number(value) for value in (values.min(), values.max())))


def _distinct(texts: Iterable[str | None]) -> str:
    return " / ".join(sorted({text for text in texts if isinstance(text, str)}))


def _model(model: str | None, weights: str | None) -> str | None:
    if not isinstance(model, str):
        return None
    name = PurePath(model).name if model.startswith(("/", ".")) else model
    return f"{name.removeprefix('random:')} (random weights)" if weights == "random" else name


def _engines(rows: pd.DataFrame) -> str:
    """Which decode engines ran: nothing where all were eager, and which methods had which where they differ."""
    labels = rows["method"].map(lambda method: style.METHODS[method].label)
    engines = {engine: ", ".join(sorted(set(names))) for engine, names in labels.groupby(rows["engine"])}
    if set(engines) <= {"eager"}:
        return ""
    if len(engines) == 1:
        return f"{next(iter(engines))} engine"
    return "engines: " + "; ".join(f"{engine} ({methods})" for engine, methods in engines.items())
