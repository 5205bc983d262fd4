"""The figures of a decode benchmark, from its JSON alone: time per step by contender, a panel per model. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from experiments.plotting import style
from experiments.plotting.lines import number_axis
from experiments.plotting.page import new_page
from experiments.plotting.style import short_number

ROW_IN = 11 / 72
OWN_ATTENTION = style.BackendStyle("", "-", True, 5.6)
"""How attention that is no SDPA backend's shows; its marker is a diamond."""
DODGE_IN = ROW_IN / 6  # backends of a row lie so far below each other
REASON_CHARS = 110
NOTE = "lower is better; at the right the fastest of a row, in ms"

_FIGURE = {"decode": "tpot_ms", "prefill": "prefill_ms"}
_FLOOR_LINE = {"color": style.INK, "lw": 0.9, "linestyle": (0, (2, 1.2))}


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
    with mpl.rc_context(style.RC):
        return {name: plot(rows, results) for name, rows in found.items() if any(map(_time, rows))}


def plot(rows: Sequence[dict], results: Sequence[dict]) -> Figure:
    """One figure: `rows` have one kind, size and batch size; `results` are the files that they come from."""
    cell = rows[0]["cell"]
    timed = [row for row in rows if _time(row) is not None]
    models = list(dict.fromkeys(row["cell"]["model"] for row in rows))
    # A contender that ran nowhere is named below the panels.
    labels = list(dict.fromkeys(row["label"] for row in timed))
    backends = list(dict.fromkeys(row["cell"]["backend"] for row in timed))
    decode = cell["kind"] == "decode"
    what = f"Decode step, cache {cell['cache_size']:,}" if decode else f"Prefill of {cell['length']:,} tokens"
    figure, axes = new_page(
        len(models),
        1,
        len(labels) * ROW_IN + 0.5,
        title=f"{what}, batch {cell['batch_size']}",
        handles=_handles(backends, decode),
        caption=[_caption(results, rows), NOTE, *_missing(rows)],
    )
    for ax, model in zip(axes[:, 0], models, strict=True):
        _draw_panel(ax, [row for row in timed if row["cell"]["model"] == model], labels)
        ax.set(xlabel="time per step (ms)" if decode else "prefill time (ms)", title=model.removeprefix("random:"))
    return figure


def _draw_panel(ax: Axes, rows: Sequence[dict], labels: Sequence[str]) -> None:
    floors = [row["floor_ms"] for row in rows if "floor_ms" in row][:1]
    for row in rows:
        colour = style.METHODS[row["group"]].colour
        beside = [other for other in rows if other["label"] == row["label"]]
        shift = DODGE_IN * ((len(beside) - 1) / 2 - beside.index(row))
        place = {"transform": ax.transData + ScaledTranslation(0, shift, ax.figure.dpi_scale_trans), "color": colour}
        y = labels.index(row["label"])
        ax.plot(row["spread_ms"], [y, y], "-", lw=0.8, **place)
        (point,) = ax.plot([_time(row)], [y], **_marker(row["cell"]["backend"], colour), **place)
        point.set_gid(f"{row['cell']['contender']}|{row['cell']['backend']}")
    for i, label in enumerate(labels):
        own = [_time(row) for row in rows if row["label"] == label]
        text = short_number(min(own)) if own else "none"
        look = {"size": style.SIZE_VALUE, "color": style.INK if own else style.QUIET}
        ax.text(1.01, i, text, transform=ax.get_yaxis_transform(), va="center", **look)
    for floor in floors:
        ax.axvline(floor, **_FLOOR_LINE, zorder=1.5)
    if rows:
        number_axis(ax, "x", [*map(_time, rows), *floors], log_ratio=1, room=0.08)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.set_yticks(range(len(labels)), labels)
    ax.tick_params(axis="y", length=0)


def _time(row: dict) -> float | None:
    return row[_FIGURE[row["cell"]["kind"]]] if row["status"] == "ok" else None


def _marker(backend: str, colour: str) -> dict:
    """The marker of a backend, as keywords of ``Axes.plot``: rings of growing size, so that none hides another."""
    look = style.BACKENDS.get(backend, OWN_ATTENTION)
    return {
        "linestyle": "none",
        "marker": "d" if look is OWN_ATTENTION else "o",
        "markersize": look.marker_size,
        "markeredgecolor": colour,
        "markerfacecolor": colour if look.filled else "none",
        "markeredgewidth": 0.0 if look.filled else 0.9,
    }


def _handles(backends: Sequence[str], with_floor: bool) -> list[Line2D]:
    names = {backend: backend if backend in style.BACKENDS else f"{backend} (its own)" for backend in backends}
    looks = [{"label": name} | _marker(backend, style.INK) for backend, name in names.items()]
    looks += [{"label": "memory-bandwidth floor"} | _FLOOR_LINE] * with_floor
    return [Line2D([], [], **look) for look in looks]


def _caption(results: Sequence[dict], rows: Sequence[dict]) -> str:
    """Device, dtype, weights, repeats: as far as all files agree, one of each."""
    models = {row["cell"]["model"] for row in rows}
    used = [result for result in results if models & {row["cell"]["model"] for row in result["rows"]}]
    kinds = {model["weights"] for result in used for name, model in result["models"].items() if name in models}
    counts = sorted({len(row["runs"]) for row in rows if row["runs"]})
    parts = [" / ".join(dict.fromkeys(result[key] for result in used)) for key in ("device", "dtype")]
    parts.append("random weights" if kinds == {"random"} else "")
    several = f"median of {' / '.join(map(str, counts))} runs; whiskers: all of them"
    parts.append("one run" if counts == [1] else several if counts else "")
    return " · ".join(part.replace(" ", "\xa0") for part in parts if part)


def _missing(rows: Sequence[dict]) -> list[str]:
    """Why rows have no value: contenders with the same reason on one line."""
    reasons: dict[str, list[str]] = {}
    drawn = {row["label"] for row in rows if _time(row) is not None}
    for row in rows:
        if _time(row) is None:
            model, backend = row["cell"]["model"].removeprefix("random:"), row["cell"]["backend"]
            name = f"{row['label']} ({backend}, {model})" if row["label"] in drawn else row["label"]
            reasons.setdefault(row.get("reason", "not measured")[:REASON_CHARS], []).append(name)
    return [f"none: {', '.join(dict.fromkeys(names))}: {reason}" for reason, names in reasons.items()]
