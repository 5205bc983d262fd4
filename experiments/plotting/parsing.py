"""The contents of one result file -> records. Pure: takes the parsed JSON, touches no disk.

Today's files and the older ones differ in the names of their figures and in what they leave out; the table
``ALIASES`` and the fall-backs in ``_series`` are all that is to know about it.
"""

import math
from collections.abc import Mapping
from pathlib import Path

from .names import METHOD_KEYS, FileName
from .records import AblationRow, Conditions, Record, Series
from .style import BACKENDS

# Figure -> the keys under which files hold it, today's first.
ALIASES = {
    "perplexity": ("perplexity", "ppl"),
    "runtime_sec": ("runtime_sec", "total_time", "runtime"),
    "prefill_sec": ("prefill_sec", "prefill_time"),
    "first_token_latency_sec": ("first_token_latency_sec", "first_token_time"),
    "ttft_sec": ("ttft_sec",),
    "decode_sec": ("decode_sec", "decode_time"),
    "decode_tokens": ("decode_tokens",),
    "prompt_tokens": ("prompt_tokens",),
    "decode_toks_per_sec": ("decode_toks_per_sec",),
    "tpot_ms": ("tpot_ms",),
    "peak_memory_mb": ("peak_memory_mb",),
    "kv_cache_mb": ("kv_cache_mb",),
    "kv_bytes_per_token": ("kv_bytes_per_token",),
    "speedup": ("speedup",),
    "compression_ratio": ("compression_ratio",),
    "ppl_increase_percent": ("ppl_increase_percent",),
}
STATUSES = ("ok", "skipped", "failed")
# A dict under a top-level key is a method's block when it has one of these.
_BLOCK_MARKS = ("perplexity", "runtime_sec", "total_time", "status")
_QUALITY = ("perplexity", "ppl_increase_percent")


class FormatError(ValueError):
    """A file is not what its name says, or not a result file at all."""


def parse_main(data: dict, name: FileName, path: Path) -> list[Record]:
    """A main file: a block per method."""
    blocks = {k: v for k, v in data.items() if isinstance(v, dict) and any(m in v for m in _BLOCK_MARKS)}
    _require_known(blocks, METHOD_KEYS, "method")
    if not blocks and data.get("status", "ok") == "ok":
        raise FormatError("foreign: a main result file without a method's block")
    return [_record(data, block, METHOD_KEYS[key], name, path) for key, block in blocks.items()]


def parse_single(data: dict, name: FileName | None, path: Path) -> list[tuple[int, Record]]:
    """A method's own file -> its record (rank 0), and the baseline that an older file holds beside it (rank 2).

    Some older files hold no figures themselves but blocks ``baseline`` and ``streaming``; the latter is whatever
    method the file is named after.
    """
    name = name or _name_from_fields(data)
    method = METHOD_KEYS.get(data.get("method"), name.method)
    blocks = {k: v for k, v in data.items() if isinstance(v, dict) and any(m in v for m in _BLOCK_MARKS)}
    if any(alias in data for key in ("perplexity", "runtime_sec") for alias in ALIASES[key]):
        own = data
    else:
        own = blocks.get(method) or blocks.get("ours" if method == "streaming" else method)
        own = own or (blocks.get("streaming") if method != "baseline" else None)
        if own is None and data.get("status", "ok") == "ok":
            raise FormatError(f"foreign: neither a perplexity nor a time of method {method!r} in it")
        own = own or data
    found = [(0, _record(data, own, method, name, path))]
    if method != "baseline" and "baseline" in blocks:
        found.append((2, _record(data, blocks["baseline"], "baseline", name, path)))
    return found


def parse_ablation(data: dict, name: FileName, path: Path) -> list[AblationRow]:
    """An ablation's file: a row per setting."""
    ablation = data.get("ablation_type", name.ablation)
    rows = data.get("results")
    if ablation != name.ablation or not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        raise FormatError(f"foreign: not an ablation of {name.ablation} with a list of results")
    conditions = _conditions(data, data)
    out = []
    for row in rows:
        setting = row.get(ablation)
        if not isinstance(setting, int) or isinstance(setting, bool):
            raise FormatError(f"foreign: a row of the ablation has no integer {ablation}")
        values, reasons = _figures(data, row)
        status, reason = _status(data, row)
        out.append(
            AblationRow(
                ablation=ablation,
                dataset=row.get("dataset_key") or data.get("dataset_key") or row.get("dataset") or data.get("dataset"),
                series=_series(data, METHOD_KEYS.get(row.get("method"), "streaming"), name),
                n_sink=row.get("n_sink", conditions.n_sink),
                window_size=row.get("window_size", conditions.window_size),
                values=values,
                reasons=reasons,
                runs=_runs(data, row),
                evicts=_evicts(row, values),
                status=status,
                reason=reason,
                conditions=conditions,
                environment=_mapping(data.get("environment")),
                details=_details(data),
                source=path,
            )
        )
    return out


def _record(data: dict, block: dict, method: str, name: FileName, path: Path) -> Record:
    values, reasons = _figures(data, block)
    status, reason = _status(data, block)
    if status == "ok" and not values:
        reason = next(iter(reasons.values()), None)
        if reason is None:
            raise FormatError(f"foreign: no figure in it that is known, for method {method!r}")
    return Record(
        dataset=name.dataset,
        series=_series(data, method, name),
        values=values,
        reasons=reasons,
        runs=_runs(data, block),
        status=status,
        reason=reason,
        conditions=_conditions(data, block),
        environment=_mapping(data.get("environment")),
        details=_details(data),
        source=path,
    )


def _series(data: dict, method: str, name: FileName) -> Series:
    """The backend is the field's, else the name's suffix, else math (an older file, which keeps the bare label)."""
    backend = data.get("backend") or name.backend
    _require_known([backend or "math"], BACKENDS, "backend")
    return Series(method, backend or "math", backend is not None, name.mode)


def _name_from_fields(data: dict) -> FileName:
    dataset, method = data.get("dataset"), data.get("method")
    if not isinstance(dataset, str) or not isinstance(method, str):
        raise FormatError("foreign: neither its name nor its fields say which method on which data set it holds")
    _require_known([method], METHOD_KEYS, "method")
    return FileName("single", dataset=dataset, method=METHOD_KEYS[method])


def _require_known(keys, known: Mapping, what: str) -> None:
    unknown = [key for key in keys if not isinstance(key, str) or key not in known]
    if unknown:
        raise FormatError(f"unknown {what} {unknown[0]!r}; known: {', '.join(known)}")


def _figures(data: dict, block: dict) -> tuple[dict[str, float], dict[str, str]]:
    """-> values, and the reasons of those that are null or must not be shown."""
    values, reasons = {}, {}
    stated = _mapping(block.get("reasons"))
    for key, aliases in ALIASES.items():
        alias = next((a for a in aliases if a in block), None)
        if alias is None:
            continue
        number = block[alias]
        if number is None:
            reasons[key] = str(block.get(f"{alias}_reason") or stated.get(alias) or block.get("reason") or "null")
        elif isinstance(number, bool) or not isinstance(number, int | float):
            raise FormatError(f"foreign: {alias} is {number!r}, not a number")
        elif not math.isfinite(number):
            reasons[key] = f"not finite ({number})"
        else:
            values[key] = float(number)
    if data.get("weights") == "random":
        for key in _QUALITY:
            values.pop(key, None)
            reasons[key] = "random weights"
    return values, reasons


def _runs(data: dict, block: dict) -> tuple[dict[str, float], ...]:
    runs = block.get("runs") or []
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise FormatError("foreign: runs is not a list of objects")
    return tuple(_figures(data, run)[0] for run in runs)


def _status(data: dict, block: dict) -> tuple[str, str | None]:
    """A block's own status, else the file's (which in a main file may speak of another method)."""
    status = block.get("status") or ("ok" if any(m in block for m in _BLOCK_MARKS[:3]) else data.get("status", "ok"))
    if status not in STATUSES:
        raise FormatError(f"foreign: status {status!r}; known: {', '.join(STATUSES)}")
    return status, block.get("reason") or (data.get("reason") if block is data else None)


def _evicts(row: dict, values: Mapping[str, float]) -> bool:
    if isinstance(row.get("evicts"), bool):
        return row["evicts"]
    return values.get("compression_ratio", 1.0) > 0


def _conditions(data: dict, block: dict) -> Conditions:
    streaming = _mapping(data.get("streaming_llm"))
    environment = _mapping(data.get("environment"))
    return Conditions(
        model=_text(data.get("model")),
        weights=_text(data.get("weights")),
        device=_text(environment.get("gpu")) or _text(environment.get("cpu")) or _text(data.get("device")),
        dtype=_text(data.get("dtype")),
        n_sink=_whole(streaming.get("n_sink", data.get("n_sink"))),
        window_size=_whole(streaming.get("window_size", data.get("window_size"))),
        num_tokens=_whole(data.get("num_tokens")),
        engine=_text(block.get("engine", data.get("engine"))),
        scoring=_text(block.get("scoring", data.get("scoring"))),
        press=_text(block.get("kvpress_press", data.get("kvpress_press"))),
        peak_memory_kind=_text(block.get("peak_memory_kind")),
    )


def _details(data: dict) -> dict:
    """A file's own plain entries, less the figures of a method."""
    figures = {alias for aliases in ALIASES.values() for alias in aliases}
    return {k: v for k, v in data.items() if isinstance(v, str | int | float) and k not in figures}


def _mapping(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
