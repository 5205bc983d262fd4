"""One result file -> rows for the table of results.

Names read from the right, since a data set's name may hold anything, underscores included:

    <dataset>_main[_backend-<backend>].json
    <dataset>_<method>[_<mode>][_backend-<backend>].json
    ablation_<window_size|n_sink>[_backend-<backend>].json
    <stem of a main file>.<method>.nll.npz

Today's files and the older ones differ in the names of their figures and in what they leave out; ``ALIASES`` and
``_where`` are all that is to know about it.
"""

import json
import math
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from .style import BACKENDS, METHODS, METRICS, MODE_LABELS

# Names by which files know a method: those of today, and those of older files.
METHOD_KEYS = {**{key: key for key in METHODS}, "ours": "streaming"}
ABLATIONS = ("window_size", "n_sink")
STATUSES = ("ok", "skipped", "failed")
# Figure -> the keys under which files hold it, today's first.
ALIASES = {key: (key,) for key in (*METRICS, "decode_tokens", "prompt_tokens", "kv_bytes_per_token")} | {
    "compression_ratio": ("compression_ratio",),
    "perplexity": ("perplexity", "ppl"),
    "runtime_sec": ("runtime_sec", "total_time", "runtime"),
    "prefill_sec": ("prefill_sec", "prefill_time"),
    "first_token_latency_sec": ("first_token_latency_sec", "first_token_time"),
    "decode_sec": ("decode_sec", "decode_time"),
}
# What a row was measured under, as far as its file says.
CONDITIONS = ("model", "weights", "device", "dtype", "engine", "kvpress_press", "peak_memory_kind")
CONDITIONS += ("config_hash", "data_sha256", "timestamp")
SIZES = ("n_sink", "window_size", "num_tokens")
# A dict under a top-level key is a method's block when it has one of these.
_FIGURE_MARKS = ("perplexity", "runtime_sec", "total_time")

_METHODS, _MODES = "|".join(METHOD_KEYS), "|".join(MODE_LABELS)
_BACKEND = r"(?:_backend-(?P<backend>[A-Za-z0-9]+))?"
_NAMES = {
    "nll": re.compile(rf"(?P<dataset>.+)_main{_BACKEND}\.(?P<method>{_METHODS})\.nll"),
    "ablation": re.compile(rf"ablation_(?P<ablation>{'|'.join(ABLATIONS)}){_BACKEND}"),
    "main": re.compile(rf"(?P<dataset>.+)_main{_BACKEND}"),
    "single": re.compile(rf"(?P<dataset>.+)_(?P<method>{_METHODS})(?:_(?P<mode>{_MODES}))?{_BACKEND}"),
}


class FormatError(ValueError):
    """A file is not what its name says, or not a result file at all."""


def parse_name(stem: str) -> dict[str, str] | None:
    """What a file's name without its last suffix says: ``kind`` and the parts that it states; None for other names."""
    for kind, pattern in _NAMES.items():
        if match := pattern.fullmatch(stem):
            fields = {key: value for key, value in match.groupdict().items() if value}
            if "method" in fields:
                fields["method"] = METHOD_KEYS[fields["method"]]
            return {"kind": kind, **fields}
    return None


def read_json(path: Path) -> list[dict]:
    """The rows of one result file: a cell's figures as ``repeat`` 0, its raw runs as 1, 2, ...

    Raises:
        FormatError: It is broken (not JSON) or foreign (not a result file).
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # a JSON error and a decoding error are ValueErrors
        raise FormatError(f"broken: not JSON ({error})") from error
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror})") from error
    if not isinstance(data, dict):
        raise FormatError(f"foreign: a result file is an object, not a {type(data).__name__}")
    name = parse_name(path.stem) or _name_from_fields(data)
    parse = {"main": _main, "single": _single, "ablation": _ablation}.get(name["kind"])
    if parse is None:
        raise FormatError("foreign: losses are kept as .npz")
    return parse(data, name)


def read_losses(path: Path) -> dict:
    """Stored losses: ``dataset``, ``method``, ``backend``, ``stated``, ``nll`` [n] in nats and ``position`` [n].

    Raises:
        FormatError: It is broken, or not named as losses are.
    """
    name = parse_name(path.stem)
    if name is None or name["kind"] != "nll":
        raise FormatError("foreign: not named <dataset>_main[_backend-<backend>].<method>.nll.npz")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            nll, position = arrays["nll"].astype(np.float64), arrays["position"].astype(np.int64)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise FormatError(f"broken: not an .npz with nll and position ({error})") from error
    if nll.ndim != 1 or nll.shape != position.shape or nll.size == 0:
        raise FormatError(f"broken: nll {nll.shape} and position {position.shape} are not one vector each")
    if not np.isfinite(nll).all() or (np.diff(position) <= 0).any():
        raise FormatError("broken: losses are not finite, or positions do not grow")
    where = _where({}, name)
    main = path.name.rsplit(".", 3)[0]  # the stem of the file that it lies beside
    return {**where, "method": name["method"], "nll": nll, "position": position, "main": main}


def _main(data: dict, name: dict) -> list[dict]:
    """A main file: a block per method."""
    blocks = _blocks(data)
    _require_known(blocks, METHOD_KEYS, "method")
    if not blocks and data.get("status", "ok") == "ok":
        raise FormatError("foreign: a main result file without a method's block")
    return [r for key, block in blocks.items() for r in _rows(data, block, name, rank=1, method=METHOD_KEYS[key])]


def _single(data: dict, name: dict) -> list[dict]:
    """A method's own file, and the baseline that an older file holds beside it (which yields to any other).

    Some older files hold no figures themselves but blocks ``baseline`` and ``streaming``; the latter is whatever
    method the file is named after.
    """
    method, blocks = METHOD_KEYS.get(data.get("method"), name["method"]), _blocks(data)
    own = data
    if not any(alias in data for key in ("perplexity", "runtime_sec") for alias in ALIASES[key]):
        keys = [method] if method == "baseline" else [method, "ours", "streaming"]
        own = next((blocks[key] for key in keys if key in blocks), data)
        if own is data and data.get("status", "ok") == "ok":
            raise FormatError(f"foreign: neither a perplexity nor a time of method {method!r} in it")
    rows = _rows(data, own, name, rank=0, method=method)
    if method != "baseline" and "baseline" in blocks:
        rows += _rows(data, blocks["baseline"], name, rank=2, method="baseline")
    return rows


def _ablation(data: dict, name: dict) -> list[dict]:
    """An ablation's file: a row per setting."""
    kind, results = name["ablation"], data.get("results")
    is_list = isinstance(results, list) and all(isinstance(r, dict) for r in results)
    if data.get("ablation_type", kind) != kind or not is_list:
        raise FormatError(f"foreign: not an ablation of {kind} with a list of results")
    rows = []
    for block in results:
        setting = block.get(kind)
        if not isinstance(setting, int) or isinstance(setting, bool):
            raise FormatError(f"foreign: a row of the ablation has no integer {kind}")
        keys = [source.get(key) for source in (block, data) for key in ("dataset_key", "dataset")]
        dataset = next((key for key in keys if isinstance(key, str)), "")
        method = METHOD_KEYS.get(block.get("method"), "streaming")
        rows += _rows(data, block, name, ablation=kind, setting=setting, dataset=dataset, method=method)
    return rows


def _rows(data: dict, block: dict, name: dict, **cell) -> list[dict]:
    """A method's block as a row, and a row for each of its raw runs."""
    runs = block.get("runs") or []
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise FormatError("foreign: runs is not a list of objects")
    values, reasons = _figures(data, block)
    status = block.get("status") or ("ok" if any(m in block for m in _FIGURE_MARKS) else data.get("status", "ok"))
    _require_known([status], STATUSES, "status")
    if status == "ok" and not values and not reasons:
        raise FormatError(f"foreign: no figure in it that is known, for method {cell['method']!r}")
    reason = block.get("reason") or (data.get("reason") if block is data else None)
    shared = {"rank": 0, "ablation": "", "setting": 0, **_where(data, name), **_conditions(data, block), **cell}
    shared |= {"status": status, "reason": reason or "", "reasons": reasons}
    return [
        shared | {"repeat": i, **figures}
        for i, figures in enumerate([values, *(_figures(data, run)[0] for run in runs)])
    ]


def _where(data: dict, name: dict) -> dict:
    """Data set, mode and backend, which is the field's, else the name's suffix, else math with the bare label."""
    backend = data.get("backend") or name.get("backend")
    _require_known([backend or "math"], BACKENDS, "backend")
    return {
        "dataset": name.get("dataset", ""),
        "backend": backend or "math",
        "stated": backend is not None,
        "mode": name.get("mode", ""),
    }


def _blocks(data: dict) -> dict[str, dict]:
    marks = (*_FIGURE_MARKS, "status")
    return {key: value for key, value in data.items() if isinstance(value, dict) and any(m in value for m in marks)}


def _name_from_fields(data: dict) -> dict:
    dataset, method = data.get("dataset"), data.get("method")
    if not isinstance(dataset, str) or not isinstance(method, str):
        raise FormatError("foreign: neither its name nor its fields say which method on which data set it holds")
    _require_known([method], METHOD_KEYS, "method")
    return {"kind": "single", "dataset": dataset, "method": METHOD_KEYS[method]}


def _require_known(keys: Iterable, known: Iterable[str], what: str) -> None:
    for key in keys:
        if not isinstance(key, str) or key not in known:
            raise FormatError(f"unknown {what} {key!r}; known: {', '.join(known)}")


def _figures(data: dict, block: dict) -> tuple[dict[str, float], dict[str, str]]:
    """-> values, and the reasons of those that are null or must not be shown."""
    values, reasons = {}, {}
    stated = _mapping(block.get("reasons"))
    for key, aliases in ALIASES.items():
        alias = next((a for a in aliases if a in block), None)
        number = block.get(alias)
        if alias is None:
            continue
        if number is None:
            reasons[key] = str(block.get(f"{alias}_reason") or stated.get(alias) or block.get("reason") or "null")
        elif isinstance(number, bool) or not isinstance(number, int | float):
            raise FormatError(f"foreign: {alias} is {number!r}, not a number")
        elif not math.isfinite(number):
            reasons[key] = f"not finite ({number})"
        else:
            values[key] = float(number)
    if data.get("weights") == "random":
        for key in ("perplexity", "ppl_increase_percent"):
            values.pop(key, None)
            reasons[key] = "random weights"
    return values, reasons


def _conditions(data: dict, block: dict) -> dict:
    """What a row was measured under."""
    environment, sizes = _mapping(data.get("environment")), _mapping(data.get("streaming_llm"))
    found = {key: block.get(key, sizes.get(key, data.get(key))) for key in (*CONDITIONS, *SIZES)}
    found["device"] = environment.get("gpu") or environment.get("cpu") or found["device"]
    found = {key: value if isinstance(value, int if key in SIZES else str) else None for key, value in found.items()}
    evicts = block.get("evicts", block.get("compression_ratio", 1.0) != 0)
    return found | {"evicts": evicts, "environment": environment}


def _mapping(value: object) -> Mapping:
    return value if isinstance(value, dict) else {}
