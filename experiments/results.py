"""The result files: their contents, how they are assembled from finished cells, and how they are saved and read.

A figure that could not be measured is None, with the reason beside it under `<figure>_reason`.
"""

import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from experiments.method_base import recomputing_engine
from experiments.methods import METHODS, REFERENCE_METHOD
from experiments.perplexity import RunFigures
from experiments.plan import Cell
from experiments.storage import now, read_json, set_aside, write_json

SCHEMA_VERSION = 1
FIGURES = tuple(item.name for item in fields(RunFigures))
_PARALLEL_FIGURES = ("scoring_sec", "scored_tokens")  # only of a run that was scored in parallel
COMPARISONS = ("speedup", "compression_ratio", "ppl_increase_percent")
_ABOUT_THE_RUN = ("timestamp", "environment")  # differ between two writings of one result


@dataclass(frozen=True)
class Runs:
    """The finished runs of a cell and its repeats, or why there are none: `status` "ok", "skipped" or "failed"."""

    cell: Cell
    runs: Sequence[dict]  # figures and facts of each run, as `run_record` makes them
    status: str = "ok"
    reason: str = ""


def run_record(result, attn_backend: str) -> dict:
    """One run's `PerplexityResult` as a JSON object: figures, reasons, and what really ran."""
    record = {name: getattr(result, name) for name in FIGURES}
    record |= {f"{name}_reason": reason for name, reason in result.reasons.items()}
    record |= {
        "peak_memory_kind": result.peak_memory_kind,
        "engine": result.engine,
        "attn_backend": attn_backend,
        "prompt_tokens": result.prompt_tokens,
        "scoring": result.scoring,
        **result.details,
    }
    return record | {name: getattr(result, name) for name in _PARALLEL_FIGURES if getattr(result, name) is not None}


def method_block(runs: Runs, header: dict, reference: Runs | None) -> dict:
    """A method's block: medians over its runs, its comparison with the reference method, the raw runs."""
    block: dict = {"status": runs.status, "label": METHODS[runs.cell.method].label}
    if runs.reason:
        block["reason"] = runs.reason
    if runs.status != "ok":
        block |= dict.fromkeys((*FIGURES, *COMPARISONS))
        return block | {"runs": list(runs.runs)}
    no_perplexity = {"perplexity": None, "perplexity_reason": "the weights are random"}
    records = [run | no_perplexity if header["weights"] == "random" else run for run in runs.runs]
    names = FIGURES + tuple(name for name in _PARALLEL_FIGURES if name in records[0])
    block |= {name: median([record[name] for record in records]) for name in names}
    facts = {key: value for key, value in records[0].items() if key not in names}
    block |= _comparisons(runs, block | facts, header, reference) | facts
    if len(records) > 1:
        values = {name: [record[name] for record in records] for name in names}
        block["spread"] = {name: None if None in some else [min(some), max(some)] for name, some in values.items()}
    return block | {"runs": records}


def median(values: Sequence[float | None]) -> float | None:
    """The median, a count staying a count; None where a value is missing."""
    if None in values:
        return None
    return values[0] if len(set(values)) == 1 else statistics.median(values)


def evicts(num_tokens: int, cache_size: int, method: str = "streaming") -> bool:
    """Whether a token of the stream sees fewer than all tokens before it.

    The last token is predicted, not fed; a fed token t sees itself and cache_size tokens before it.
    """
    return METHODS[method].bounded and num_tokens - 2 > cache_size


def _comparisons(runs: Runs, block: dict, header: dict, reference: Runs | None) -> dict:
    num_tokens, cache_size = header["num_tokens"], sum(runs.cell.sizes)
    evicted = evicts(num_tokens, cache_size, runs.cell.method)
    compared = {
        "speedup": None,
        "compression_ratio": 1 - cache_size / num_tokens if evicted else 0.0,
        "ppl_increase_percent": None,
    }
    if reference is None or reference.status != "ok":
        why = f"there is no {REFERENCE_METHOD} to compare with"
        return compared | {"speedup_reason": why, "ppl_increase_percent_reason": why}
    theirs = {name: median([run[name] for run in reference.runs]) for name in ("runtime_sec", "perplexity")}
    engines = block["engine"], reference.runs[0]["engine"]
    if recomputing_engine(engines[0]) != engines[1]:
        compared["speedup_reason"] = f"engine {engines[0]!r}, the {REFERENCE_METHOD} {engines[1]!r}"
    elif theirs["runtime_sec"] is None or block["runtime_sec"] is None:
        compared["speedup_reason"] = block.get("runtime_sec_reason") or "the times are not known"
    else:
        compared["speedup"] = theirs["runtime_sec"] / block["runtime_sec"]
    if block["perplexity"] is None or theirs["perplexity"] is None:
        own, other = block.get("perplexity_reason"), reference.runs[0].get("perplexity_reason")
        why = own or f"the {REFERENCE_METHOD} has no perplexity ({other})"
        compared["ppl_increase_percent_reason"] = why
    else:
        compared["ppl_increase_percent"] = 100 * (block["perplexity"] / theirs["perplexity"] - 1)
    return compared


def main_result(header: dict, methods: Sequence[Runs], sizes: tuple[int, int], environment: dict) -> dict:
    """The contents of `<dataset>_main_backend-<backend>.json`; `sizes`: (n_sink, window_size).

    A method is compared with the reference method by the same engine. `methods` may hold the latter several times:
    the first is the file's `baseline`, and all of them stand by engine under `baselines`.
    """
    references = {runs.cell.engine: runs for runs in methods if runs.cell.method == REFERENCE_METHOD}
    blocks: dict[str, dict] = {}
    baselines: dict[str, dict] = {}
    failed: dict[str, str] = {}
    for runs in methods:
        method, engine = runs.cell.method, runs.cell.engine
        block = method_block(runs, header, references.get(recomputing_engine(engine)))
        if method == REFERENCE_METHOD:
            baselines[engine] = block
        if block["status"] == "failed":
            failed[f"{method} ({engine})" if method in blocks else method] = block["reason"]
        blocks.setdefault(method, block)
    streaming = blocks.get("streaming", {})
    value = {"schema_version": SCHEMA_VERSION, **header, "streaming_llm": _sizes(sizes), **blocks}
    if len(baselines) > 1:
        value["baselines"] = baselines
    value["metrics"] = {name: streaming.get(name) for name in COMPARISONS}
    value["methods"] = list(blocks)
    return value | _ending(failed, environment)


def _sizes(sizes: tuple[int, int]) -> dict:
    return {"n_sink": sizes[0], "window_size": sizes[1], "max_cache_size": sum(sizes)}


def fixed_eval_result(main: dict, method: str) -> dict:
    """The contents of `<dataset>_<method>_backend-<backend>.json`, from the main file's contents."""
    block, shared = main[method], itertools.takewhile(lambda item: item[0] not in main["methods"], main.items())
    value = {"schema_version": SCHEMA_VERSION, "method": method} | dict(shared)
    value |= {"total_time": block["runtime_sec"], "prefill_time": block["prefill_sec"]}
    return value | block | {"environment": main["environment"], "timestamp": main["timestamp"]}


def ablation_result(header: dict, kind: str, cells: Sequence[Runs], held_constant: str, environment: dict) -> dict:
    """The contents of `ablation_<kind>_backend-<backend>.json`: one entry for each pair of sizes."""
    entries, failed = [], {}
    no_baseline = {f"{name}{reason}" for name in ("speedup", "ppl_increase_percent") for reason in ("", "_reason")}
    for runs in cells:
        block = method_block(runs, header, None)
        sizes = _sizes(runs.cell.sizes)
        entry = sizes | {"evicts": evicts(header["num_tokens"], sizes["max_cache_size"])}
        entries.append(entry | {name: figure for name, figure in block.items() if name not in no_baseline})
        if runs.status == "failed":
            failed[f"n_sink {sizes['n_sink']}, window_size {sizes['window_size']}"] = runs.reason
    value = {"schema_version": SCHEMA_VERSION, "ablation_type": kind, "held_constant": held_constant}
    return value | header | {"method": "streaming", "results": entries} | _ending(failed, environment)


def _ending(failed: dict[str, str], environment: dict) -> dict:
    value = {"environment": environment, "status": "failed" if failed else "ok"}
    if failed:
        value["reason"] = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
    return value | {"timestamp": now()}


def read_result(path: Path) -> dict:
    """A result file of this project; raises ValueError that says why it is none, OSError where there is none."""
    value = read_json(path)
    if value.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"not a result of this program (schema_version is {value.get('schema_version')!r})")
    if not isinstance(value.get("config_hash"), str):
        raise ValueError("not a result of this program (it has no config_hash)")
    return value


class Saved(NamedTuple):
    """What became of a result file: a line that begins with wrote, updated or unchanged; `aside`: what was there."""

    line: str
    aside: Path | None = None


def save_result(path: Path, value: dict, keep_previous: bool = False) -> Saved:
    """Save a result file; whatever was there and is something else is set aside, never overwritten.

    A file of another configuration, of another program, or one that cannot be read moves into `superseded/`; with
    `keep_previous` a file of the same configuration does too. An equal file stays untouched.
    """
    if not path.exists():
        write_json(path, value)
        return Saved(f"wrote: {path}")
    try:
        previous = read_result(path)
        if previous["config_hash"] == value["config_hash"] and not keep_previous:
            if _substance(previous) == _substance(value):
                return Saved(f"unchanged: {path}")
            write_json(path, value)
            return Saved(f"updated: {path}")
        aside, why = set_aside(path, previous["config_hash"][:8]), "the earlier result"
    except ValueError as error:
        aside, why = set_aside(path, "unreadable"), f"what was there ({error})"
    write_json(path, value)
    return Saved(f"wrote: {path}; {why} is kept as {aside}", aside)


def _substance(value: dict) -> dict:
    kept = {key: item for key, item in value.items() if key not in _ABOUT_THE_RUN}
    return json.loads(json.dumps(kept))
