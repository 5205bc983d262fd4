"""What a person reads on the console: one line for each cell, and the tables at the end."""

from collections.abc import Sequence

_COLUMNS = (  # heading, key, format
    ("perplexity", "perplexity", "{:.3f}"),
    ("increase %", "ppl_increase_percent", "{:+.2f}"),
    ("runtime s", "runtime_sec", "{:.3f}"),
    ("prefill s", "prefill_sec", "{:.4f}"),
    ("ms/token", "tpot_ms", "{:.3f}"),
    ("tokens/s", "decode_toks_per_sec", "{:.1f}"),
    ("speedup", "speedup", "{:.2f}x"),
    ("memory MB", "peak_memory_mb", "{:.0f}"),
)
_MISSING = "-"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in aligned columns, numbers to the right."""
    columns = list(zip(*rows, strict=True))
    adjust = [str.rjust if all(cell[:1] in "+-0123456789" for cell in column) else str.ljust for column in columns]
    widths = [max(map(len, (heading, *column))) for heading, column in zip(headings, columns, strict=True)]
    lines = [headings, ["-" * width for width in widths], *rows]
    aligned = ([a(cell, w) for a, cell, w in zip(adjust, line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)


def _figures(block: dict) -> list[str]:
    return [_MISSING if block.get(key) is None else fmt.format(block[key]) for _, key, fmt in _COLUMNS]


def main_table(results: Sequence[dict]) -> str:
    """The methods of main result files, one row each; what failed or was skipped says so in the last column."""
    rows = []
    for result in results:
        others = [block for block in result.get("baselines", {}).values() if block != result["baseline"]]
        for block in [*(result[name] for name in result["methods"]), *others]:
            engine = block.get("engine", "eager")
            how = result["backend"] if engine == "eager" else f"{result['backend']}, {engine}"
            rows.append([result["dataset_key"], f"{block['label']} ({how})", *_figures(block), _note(block)])
    return table(["data set", "method", *_headings(results), ""], rows)


def _headings(results: Sequence[dict]) -> list[str]:
    """Of the columns; a runtime that is that of a sample of the steps says so."""
    headings = [heading for heading, _, _ in _COLUMNS]
    blocks = [result[name] for result in results if result["scoring"] == "parallel" for name in result["methods"]]
    if blocks:
        steps = max((block["decode_tokens"] or 0 for block in blocks), default=0)
        headings[headings.index("runtime s")] = f"s for prefill + {steps} tokens"
    return headings


def _note(block: dict) -> str:
    """Why a block has no figures."""
    return "" if block["status"] == "ok" else f"{block['status']}: {_short(block['reason'])}"


def ablation_table(result: dict) -> str:
    """The entries of an ablation file."""
    rows = []
    for entry in result["results"]:
        note = _note(entry) or ("" if entry["evicts"] else "evicts nothing")
        figures = _figures(entry)
        rows.append([str(entry["n_sink"]), str(entry["window_size"]), figures[0], figures[4], note])
    return table(["sinks", "window", "perplexity", "ms/token", ""], rows)


def _short(reason: str, length: int = 80) -> str:
    return reason if len(reason) <= length else reason[: length - 3] + "..."


def cell_line(run: dict, show_perplexity: bool = True) -> str:
    """The run of one cell in a few words; the perplexity of random weights is not to be shown."""
    parts = []
    if show_perplexity and run["perplexity"] is not None:
        parts.append(f"perplexity {run['perplexity']:.3f}")
    if run["prefill_sec"] is not None:
        parts.append(f"prefill {run['prefill_sec']:.3f} s")
    if run["tpot_ms"] is not None:
        parts.append(f"{run['tpot_ms']:.2f} ms/token")
    return ", ".join(parts)
