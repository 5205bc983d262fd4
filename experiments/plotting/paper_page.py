"""One page that sets what was found on each model beside the figures that the paper reports.

Those are of Xiao, Tian, Chen, Han, Lewis, "Efficient Streaming Language Models with Attention Sinks", ICLR 2024 (arXiv
2309.17453): by experiment where they stand there, in words, and as a table if there is one, in `paper_facts.toml`.
"""

import json
import tomllib
from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl

from . import style
from .page import embedded, fill_template, save
from .paper_figures import DRAW, models

_FACTS = tomllib.loads(Path(__file__).with_name("paper_facts.toml").read_text(encoding="utf-8"))
REPORTED: dict[str, dict] = _FACTS["reported"]
_SHOWN = {
    "methods": ("method", "perplexity", "beyond_cache", "tokens"),
    "line-breaks": ("sinks", "n_sink", "window_size", "perplexity"),
    "sinks": ("n_sink", "window_size", "perplexity", "tokens"),
    "attention": (),
    "long": ("method", "cache_size", "tokens", "within_context", "perplexity", "tokens_per_sec"),
    "cache-sizes": ("cache_size", "n_sink", "window_size", "perplexity"),
    "latency": ("cache_size", "method", "engine", "tpot_ms", "speedup", "peak_memory_mb", "kv_cache_mb"),
    "stream-eval": ("method", "distance_lines", "distance_tokens", "accuracy", "questions", "stream_tokens"),
    "questions": ("method", "accuracy", "questions", "stream_tokens"),
    "positions": ("method", "perplexity", "drift", "tpot_ms", "engine"),
}
_HEADS = {
    "within_context": "perplexity within the context",
    "beyond_cache": "perplexity beyond the cache", "n_sink": "sinks kept", "window_size": "window",
    "drift": "drift, nats", "tokens_per_sec": "tokens/s", "cache_size": "cache", "tpot_ms": "ms per token",
    "peak_memory_mb": "peak memory, MB", "kv_cache_mb": "KV cache, MB", "distance_lines": "lines back",
    "distance_tokens": "tokens back", "stream_tokens": "tokens of the stream",
}  # fmt: skip


def read_paper_results(root: Path) -> dict[str, list[dict]]:
    """Experiment -> the results of each model, from the JSON files below `root`; files that are none are left out."""
    found: dict[str, list[dict]] = {name: [] for name in REPORTED}
    for path in sorted(root.glob("*/*.json")):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if isinstance(value, dict) and value.get("kind") == "paper" and value.get("experiment") in found:
            found[value["experiment"]].append(value | {"folder": path.parent})
    return found


def _text(key: str, value: object) -> str:
    if value is None:
        return ""
    if key == "accuracy":
        return f"{100 * value:.1f} %"
    if key == "method":
        return style.METHODS[value].label if value in style.METHODS else str(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) < 1 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(result: dict) -> dict:
    keys = [key for key in _SHOWN[result["experiment"]] if any(key in row for row in result["rows"])]
    rows = [[_text(key, row.get(key)) for key in keys] for row in result["rows"]]
    return {"head": [_HEADS.get(key, key) for key in keys], "rows": rows if keys else []}


def _conditions(result: dict) -> str:
    facts = [result["dataset"], f"text {result['data_sha256'][:12]}", result["device"], result["dtype"]]
    facts += [f"attention by {result['backend']}", f"commit {(result['environment'].get('commit') or 'unknown')[:12]}"]
    return "; ".join([*facts, f"weights {result['model_fingerprint']}"])


def write_pages(root: Path) -> Iterable[Path]:
    """Write a PNG of each experiment beside its file, one of all models' long streams, and `index.html`."""
    sections, written = [], []
    with mpl.rc_context(style.RC):
        for name, results in read_paper_results(root).items():
            found, drawn = [], []
            for number, result in enumerate(results):
                svg = ""
                if result["rows"] and result["status"] == "ok":
                    drawn.append(result)
                    figure = DRAW[name](result)
                    written += save(figure, name, result["folder"], ["png"])
                    svg = embedded(figure, name, str(number))
                about = {"name": result["model"].rsplit("/", 1)[-1], "table": _table(result), "svg": svg}
                found.append(about | {"failed": result["failed"], "conditions": _conditions(result)})
            together = ""
            if name == "long" and len(drawn) > 1:
                figure = models(drawn)
                written += save(figure, name, root, ["png"])
                together = embedded(figure, name, "all")
            if found:
                about = {"name": name, "title": results[0]["title"], "reported": REPORTED[name]}
                sections.append(about | {"models": found, "together": together})
    if sections:
        path = root / "index.html"
        text = fill_template("paper.html.j2", sections=sections, citation=_FACTS["citation"])
        path.write_text(text, encoding="utf-8", newline="\n")
        written.append(path)
    return written
