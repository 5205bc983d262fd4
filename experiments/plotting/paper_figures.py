"""Figures of the paper's experiments, each from the contents of a result file."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke

from . import style
from .lines import number_axis
from .page import new_page

PANEL_IN = 1.75
RECOMPUTED = "Baseline: a sliding window with re-computation"
MODEL_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def _look(method: str, marker_size: float = 0, **more) -> dict:
    """A method's line; the baseline's is broad and below, since streaming should lie on it."""
    known, is_below = style.METHODS[method], method == "baseline"
    look = {"color": known.colour, "label": known.label, "linewidth": 2.4 if is_below else 1.1, "zorder": 3 - is_below}
    return look | ({"marker": known.marker, "markersize": marker_size} if marker_size else {}) | more


def _looks(result: dict, marker_size: float = 0) -> dict[str, dict]:
    return {method: _look(method, marker_size) for method in result["curves"]}


def _size(result: dict) -> str:
    n_sink = result["n_sink"]
    return f"cache of {n_sink} sinks + {result['cache_size'] - n_sink} tokens (window: {result['cache_size']})"


def _page(result: dict, lines: Iterable[dict], *notes: str, rows: int = 1, columns: int = 1, **options) -> tuple:
    """A page with a legend of lines; the caption says what was measured, on what. -> figure, each row of panels."""
    name = result["model"].rsplit("/", 1)[-1]
    where = f"{result['device']}, {result['dtype']}, {result['backend']}"
    figure, axes = new_page(
        rows,
        columns,
        options.pop("panel_in", PANEL_IN),
        title=f"{result['title']} ({result['reference']})",
        handles=[Line2D([], [], **line) for line in lines],
        caption=[f"{name}; {result['dataset']}; {where}", *notes],
        **options,
    )
    return figure, *axes


def _along(ax: Axes, curves: dict[str, dict], key: str, looks: dict[str, dict], title: str, **x_axis) -> None:
    """Curves along a stream: `key` over the number of the token."""
    for name, one in curves.items():
        ax.plot(one["token"], one[key], **looks[name])
    number_axis(ax, "x", [token for one in curves.values() for token in one["token"]], **x_axis)
    if key == "perplexity":
        number_axis(ax, "y", [value for one in curves.values() for value in one[key]], log_ratio=20)
    ax.set(xlabel="token", title=title)


def methods(result: dict) -> Figure:
    """Perplexity along the text by method."""
    looks = _looks(result)
    figure, (ax,) = _page(result, looks.values(), _size(result), RECOMPUTED)
    _along(ax, result["curves"], "perplexity", looks, "perplexity, of stretches of the text")
    return figure


def long(result: dict) -> Figure:
    """Perplexity along a very long text: its first part on a log axis, and all of it."""
    looks = {}
    for row in result["rows"]:
        name, cache = row["method"], row.get("cache_size")
        kept = "" if cache is None else f", {result['n_sink']} + {cache - result['n_sink']}"
        kept = f", {cache}" if name == "window" else kept
        is_smaller = name == "streaming" and cache != result["cache_size"]
        look = {"label": style.METHODS[name].label + kept, "linestyle": ":" if is_smaller else "-"}
        look["zorder"] = 2 + (name == "streaming")
        looks[name if cache is None else f"{name} {cache}"] = _look(name, 2.4, **look)
    books = "Left: stretches each as long as all before it. Texts follow each other, and perplexity differs between "
    books += "them. Dashed: the model's context"
    figure, axes = _page(result, looks.values(), books, columns=2, sharey=True)
    _along(axes[0], result["starts"], "perplexity", looks, "perplexity, log axis", log_ratio=2)
    plain = {name: look | {"marker": ""} for name, look in looks.items()}
    _along(axes[1], result["curves"], "perplexity", plain, "perplexity, all of it")
    drawn = [one for part in ("starts", "curves") for one in result[part].values()]
    number_axis(axes[0], "y", [value for one in drawn for value in one["perplexity"]], log_ratio=20)
    for ax in axes:
        ax.axvline(result["context_length"], color=style.QUIET, linewidth=0.8, linestyle="--")
    return figure


def models(results: Sequence[dict]) -> Figure:
    """Perplexity along very long texts with StreamingLLM's larger cache, a line for each model."""
    curves, looks = {}, {}
    for i, result in enumerate(results):
        name, n_sink = result["model"].rsplit("/", 1)[-1], result["n_sink"]
        label = f"{name}, {n_sink} + {result['cache_size'] - n_sink}"
        looks[result["model"]] = {"color": MODEL_COLOURS[i % len(MODEL_COLOURS)], "label": label, "linewidth": 0.9}
        curves[result["model"]] = result["curves"][f"streaming {result['cache_size']}"]
    figure, (ax,) = _page(results[0], looks.values(), "Books follow each other: perplexity differs between them")
    _along(ax, curves, "perplexity", looks, "perplexity, StreamingLLM")
    return figure


def _write_values(ax: Axes, places: Iterable, values: Iterable[float], offset: tuple[int, int]) -> None:
    """Write figures beside their points, readable over lines."""
    for place, value in zip(places, values, strict=True):
        where = {"textcoords": "offset points", "ha": "left" if offset[0] else "center"}
        where["va"] = "bottom" if offset[1] else "center"
        text = ax.annotate(f"{value:.2f}", place, offset, size=style.SIZE_VALUE, **where)
        text.set_path_effects([Stroke(linewidth=2.5, foreground="white"), Normal()])


def sizes(result: dict) -> Figure:
    """Perplexity by number of sinks, or by cache size."""
    key, label = ("n_sink", "sinks") if result["experiment"] == "sinks" else ("cache_size", "cache size, tokens")
    look = _look("streaming", 3.4)
    figure, (ax,) = _page(result, [look], f"{result['rows'][0]['tokens']:,} tokens")
    y = [row["perplexity"] for row in result["rows"]]
    ax.plot(range(len(y)), y, **look)
    _write_values(ax, enumerate(y), y, (0, 5))
    number_axis(ax, "y", y, log_ratio=20, room=0.12)
    ax.margins(y=0.2)  # room for the values
    ax.set(xticks=range(len(y)), xticklabels=[row[key] for row in result["rows"]], xlabel=label, title="perplexity")
    return figure


def bars(result: dict) -> Figure:
    """Perplexity by what is kept as sinks, on a log scale."""
    rows, values = result["rows"], [row["perplexity"] for row in result["rows"]]
    look = {"color": style.METHODS["streaming"].colour, "label": "perplexity", "linewidth": 4}
    figure, (ax,) = _page(result, [look], f"{rows[0]['tokens']:,} tokens")
    names = [f"{row['n_sink']} {row['sinks']} + {row['window_size']}" for row in rows]
    names[0] = f"window of {rows[0]['window_size']}"
    ax.barh(names, values, color=look["color"], height=0.6)
    _write_values(ax, zip(values, range(len(rows)), strict=True), values, (3, 0))
    ax.margins(x=0.15)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_title("perplexity")
    return figure


def latency(result: dict) -> Figure:
    """Milliseconds and memory of a token by cache size."""
    looks = {row["method"]: _look(row["method"], 3.4) for row in result["rows"]}
    engines = "; ".join(f"{style.METHODS[row['method']].label}: {row['engine']}" for row in result["rows"][:2])
    figure, axes = _page(result, looks.values(), f"Engines: {engines}", RECOMPUTED, columns=2)
    sizes = sorted({row["cache_size"] for row in result["rows"]})
    for ax, key, title in zip(axes, ("tpot_ms", "peak_memory_mb"), ("ms per token", "peak memory, MB"), strict=True):
        known = [row for row in result["rows"] if row[key] is not None]
        for name, look in looks.items():
            rows = [row for row in known if row["method"] == name]
            ax.plot([row["cache_size"] for row in rows], [row[key] for row in rows], **look)
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes, sizes)
        ax.minorticks_off()
        if known:
            number_axis(ax, "y", [row[key] for row in known], log_ratio=8)
        ax.set(xlabel="cache size, tokens", title=title)
    return figure


def asked(result: dict) -> Figure:
    """Accuracy along a stream by method, and by distance where there are several."""
    looks = _looks(result, 3.0)
    far = [row for row in result["rows"] if row.get("distance_lines", 20) != 20 or row["method"] == "streaming"]
    has_distances = result["experiment"] == "stream-eval" and len(far) > 1
    figure, axes = _page(result, looks.values(), _size(result), columns=1 + has_distances, sharey=True)
    _along(axes[0], result["curves"], "accuracy", looks, "accuracy along the stream")
    axes[0].set_ylim(-0.04, 1.04)
    for row in result["rows"]:
        if row["method"] == "one-shot":
            axes[0].axhline(row["accuracy"], color=style.QUIET, linewidth=0.8, linestyle=":")
    if has_distances:
        axes[1].plot([row["distance_tokens"] for row in far], [row["accuracy"] for row in far], **looks["streaming"])
        axes[1].axvline(result["cache_size"] - result["n_sink"], color=style.QUIET, linewidth=0.8, linestyle="--")
        axes[1].set(xlabel="tokens back (dashed: the window)", title="accuracy by distance")
    return figure


def attention(result: dict) -> Figure:
    """Average maps of some layers above; below, shares by layer, and by layer and head."""
    names = {"streaming": "on the sinks", "window": "on the oldest of a window without sinks"}
    looks = {name: _look(name, label=f"{style.METHODS[name].label}: {text}") for name, text in names.items()}
    recent = _look("streaming", linestyle=":", label=f"StreamingLLM: on the last {result['recent']} tokens")
    maps, size = result["maps"], {"panel_in": 1.2, "width_in": 6.8}
    note = "Above: attention of 16 tokens to each other, mean over heads and texts, white 0.001 to black 1 (log scale)"
    lines = (*looks.values(), recent)
    figure, above, below = _page(result, lines, _size(result), note, rows=2, columns=max(len(maps), 2), **size)
    for ax, (layer, values) in zip(above, maps.items(), strict=False):
        ax.imshow(np.log10(np.maximum(values, 1e-3)), cmap="Greys", vmin=-3, vmax=0)
        ax.set(title=f"layer {layer}", xticks=[0, 8, 15], yticks=[0, 8, 15])
        ax.grid(visible=False)
    grid, middle = below[0].get_gridspec(), len(below) // 2
    for ax in below:
        ax.remove()
    left, right = figure.add_subplot(grid[1, :middle]), figure.add_subplot(grid[1, middle:])
    for name, look in looks.items():
        rows = [row for row in result["rows"] if row["method"] == name]
        left.plot([row["layer"] for row in rows], [row["to_first"] for row in rows], **look)
        if name == "streaming":
            left.plot([row["layer"] for row in rows], [row["to_recent"] for row in rows], **recent)
    left.set(ylim=(0, 1), xlabel="layer", title="share of the attention")
    shown = right.imshow(np.transpose(result["heads"]["streaming"]), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    right.set(xlabel="layer", ylabel="head", title="share on the sinks, by head")
    right.grid(visible=False)
    figure.colorbar(shown, ax=right)
    return figure


def positions(result: dict) -> Figure:
    """Perplexity along the stream, and drift from the exact losses."""
    looks = _looks(result)
    looks["streaming"] |= {"linewidth": 2.4, "zorder": 2}  # others may lie on it
    figure, axes = _page(result, looks.values(), _size(result), columns=2)
    _along(axes[0], result["curves"], "perplexity", looks, "perplexity")
    _along(axes[1], result["drifts"], "drift", looks, "drift of a loss, nats")
    return figure


DRAW: dict[str, Callable[[dict], Figure]] = {
    "methods": methods,
    "line-breaks": bars,
    "sinks": sizes,
    "attention": attention,
    "long": long,
    "cache-sizes": sizes,
    "latency": latency,
    "stream-eval": asked,
    "questions": asked,
    "positions": positions,
}
