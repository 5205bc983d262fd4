"""The figures of a decode benchmark, from its JSON alone: time per step by contender, a panel per model. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from experiments.plotting import style
from experiments.plotting.lines import log_limits
from experiments.plotting.metrics import short_number, tick_number
from experiments.plotting.output import save
from experiments.plotting.page import COLUMN_IN, PT, Legend, Panel, make_page, text_width

ROW_PT = 11.0
OWN_ATTENTION = style.BackendStyle("", "-", True, 5.6)
"""How attention that is no SDPA backend's shows; its marker is a diamond."""

_FIGURE = {"decode": "tpot_ms", "prefill": "prefill_ms"}
_FLOOR_LINE = {"color": style.INK, "lw": 0.9, "linestyle": (0, (2, 1.2))}
_RIGHT = 0.3  # inches, for the value of a row's fastest


def draw(results: Sequence[dict], folder: Path, formats: tuple[str, ...]) -> list[Path]:
    """Draw all figures of one or several result files; -> the paths."""
    paths = []
    with mpl.rc_context(style.RC):
        for name, figure in figures(results).items():
            paths += save(figure, name, folder, formats)
    return paths


def figures(results: Sequence[dict]) -> dict[str, Figure]:
    """A figure for each pair of cache size and batch size, and of prompt length and batch size: name -> figure.

    What several files have measured is taken from the first of them.
    """
    found: dict[str, list[dict]] = {}
    cells: dict[str, dict] = {}
    for row in (row for result in results for row in result["rows"]):
        key = json.dumps(row["cell"], sort_keys=True)
        if key not in cells or _time(cells[key]) is None:
            cells[key] = row
    for row in cells.values():
        cell = row["cell"]
        size = cell["cache_size"] if cell["kind"] == "decode" else cell["length"]
        found.setdefault(f"{cell['kind']}_{size}_batch_{cell['batch_size']}", []).append(row)
    drawn = {name: rows for name, rows in found.items() if any(_time(row) is not None for row in rows)}
    return {name: plot(rows, results) for name, rows in drawn.items()}


def plot(rows: Sequence[dict], results: Sequence[dict]) -> Figure:
    """One figure: `rows` have one kind, size and batch size; `results` are the files that they come from."""
    cell = rows[0]["cell"]
    models = list(dict.fromkeys(row["cell"]["model"] for row in rows))
    # A contender that ran nowhere is named below the panels.
    labels = list(dict.fromkeys(row["label"] for row in rows if _time(row) is not None))
    backends = list(dict.fromkeys(row["cell"]["backend"] for row in rows if _time(row) is not None))
    left = max(text_width(label, style.SIZE_TICK) for label in labels) * PT + 0.1
    panels = [Panel(len(labels) * ROW_PT * PT, 0.34, 0.2, left, _RIGHT) for _ in models]
    decode = cell["kind"] == "decode"
    what = f"Decode step, cache {cell['cache_size']:,}" if decode else f"Prefill of {cell['length']:,} tokens"
    figure, axes = make_page(
        [panels],
        title=f"{what}, batch {cell['batch_size']}",
        subtitle="lower is better; at the right the fastest of a row, in ms",
        legend=_legend(backends, decode),
        caption=[_caption(results, rows)],
        notes=_missing(rows),
        widths=[COLUMN_IN],
    )
    for ax, model in zip(axes, models, strict=True):
        _draw_panel(ax, [row for row in rows if row["cell"]["model"] == model], labels)
        ax.set_xlabel("time per step (ms)" if decode else "prefill time (ms)")
        ax.set_title(model.removeprefix("random:"), loc="left", size=style.SIZE_LABEL, pad=3, weight="bold")
    return figure


def _draw_panel(ax: Axes, rows: Sequence[dict], labels: Sequence[str]) -> None:
    rows = [row for row in rows if _time(row) is not None]
    times = [_time(row) for row in rows]
    floors = [row["floor_ms"] for row in rows if "floor_ms" in row]
    ax.set_xscale("log")
    for row in rows:
        _draw_row(ax, row, labels.index(row["label"]))
    for i, label in enumerate(labels):
        own = [_time(row) for row in rows if row["label"] == label]
        text = short_number(min(own)) if own else "none"
        ax.annotate(
            text, (1, i), xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points",
            va="center", size=style.SIZE_VALUE, color=style.INK if own else style.QUIET, annotation_clip=False,
        )  # fmt: skip
    for floor in floors[:1]:
        ax.axvline(floor, **_FLOOR_LINE, zorder=1.5)
    if times:
        ax.set_xlim(*log_limits([*times, *floors[:1]], 0.08))
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.yaxis.set_major_locator(FixedLocator(range(len(labels))))
    ax.set_yticklabels(labels)
    ax.tick_params(axis="y", length=0)
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 100 else (1.0, 2.0, 5.0), numticks=9))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_number(value)))
    ax.grid(axis="x")


def _draw_row(ax: Axes, row: dict, y: int) -> None:
    colour = style.METHODS[row["group"]].colour
    ax.plot(row["spread_ms"], [y, y], "-", color=colour, lw=0.8)
    (point,) = ax.plot([_time(row)], [y], linestyle="none", **_marker(row["cell"]["backend"], colour))
    point.set_gid(f"{row['cell']['contender']}|{row['cell']['backend']}")


def _time(row: dict) -> float | None:
    return row[_FIGURE[row["cell"]["kind"]]] if row["status"] == "ok" else None


def _marker(backend: str, colour: str) -> dict:
    """The marker of a backend, as keywords of ``Axes.plot``: rings of growing size, so that none hides another."""
    look = style.BACKENDS.get(backend, OWN_ATTENTION)
    return {
        "marker": "d" if look is OWN_ATTENTION else "o",
        "markersize": look.marker_size,
        "color": colour,
        "markerfacecolor": colour if look.filled else "none",
        "markeredgewidth": 0.0 if look.filled else 0.9,
    }


def _legend(backends: Sequence[str], with_floor: bool) -> Legend:
    handles = [Line2D([], [], linestyle="none", **_marker(backend, style.INK)) for backend in backends]
    labels = [backend if backend in style.BACKENDS else f"{backend} (its own)" for backend in backends]
    if with_floor:
        handles.append(Line2D([], [], **_FLOOR_LINE))
        labels.append("memory-bandwidth floor")
    return Legend(handles, labels, 4)


def _caption(results: Sequence[dict], rows: Sequence[dict]) -> str:
    """Device, dtype, weights, repeats: as far as all files agree, one of each."""
    models = {row["cell"]["model"] for row in rows}
    used = [result for result in results if models & {row["cell"]["model"] for row in result["rows"]}]
    kinds = {model["weights"] for result in used for name, model in result["models"].items() if name in models}
    counts = sorted({len(row["runs"]) for row in rows if row["runs"]})
    parts = [" / ".join(dict.fromkeys(result["device"] for result in used))]
    parts.append(" / ".join(dict.fromkeys(result["dtype"] for result in used)))
    parts.append("random weights" if kinds == {"random"} else "")
    several = f"median of {' / '.join(map(str, counts))} runs; whiskers: all of them"
    parts.append("one run" if counts == [1] else several if counts else "")
    return " · ".join(part.replace(" ", "\xa0") for part in parts if part)


def _missing(rows: Sequence[dict], longest: int = 110) -> list[str]:
    """Why rows have no value: contenders with the same reason on one line."""
    reasons: dict[str, list[str]] = {}
    drawn = {row["label"] for row in rows if _time(row) is not None}
    for row in rows:
        if _time(row) is None:
            model, backend = row["cell"]["model"].removeprefix("random:"), row["cell"]["backend"]
            name = f"{row['label']} ({backend}, {model})" if row["label"] in drawn else row["label"]
            reasons.setdefault(row.get("reason", "not measured"), []).append(name)
    return [
        f"none: {', '.join(dict.fromkeys(names))}: {reason if len(reason) <= longest else reason[: longest - 1] + '…'}"
        for reason, names in reasons.items()
    ]
