"""The report's HTML: one page that needs nothing else, made of what ``report_data`` says and of inline figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from . import style
from .report_data import (
    ABLATION_COLUMNS,
    RESULT_COLUMNS,
    Column,
    Environment,
    Environments,
    Glance,
    Row,
    Run,
    ablation_rows,
    conditions_line,
    format_value,
    glance,
    result_rows,
)

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Picture:
    """A figure in the page. ``dataset`` is that of a figure of one data set, as in ids; else empty."""

    run: str
    name: str
    svg: str
    dataset: str = ""
    wide: bool = False


def build_page(runs: Sequence[Run], pictures: Sequence[Picture], missing: Sequence[tuple[str, str]]) -> str:
    """The whole page.

    Args:
        missing: (run, line): what has no result, and files that could not be read.
    """
    environments = Environments()
    results, ablations = result_rows(runs, environments), ablation_rows(runs, environments)
    several = len(runs) > 1
    sections = [
        ("glance", "At a glance", _glance(runs)),
        ("tables", "Results", _results_table(results, several)),
        ("figures", "Figures", _figures(runs, pictures)),
        ("ablations", "Ablations", _ablations_table(ablations, several) if ablations else ""),
        ("environments", "Environments", _environments(environments.all(), several)),
        ("missing", "Not measured", _missing(missing, several) if missing else ""),
    ]
    sections = [section for section in sections if section[2]]
    nav = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _ in sections)
    body = "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>\n{content}</section>'
        for name, title, content in sections
    )
    return _PAGE.format(
        css=(_HERE / "report.css").read_text(encoding="utf-8"),
        js=(_HERE / "report.js").read_text(encoding="utf-8"),
        nav=nav,
        filters=_filters([*results, *ablations], several),
        body=body,
    )


_PAGE = """<!DOCTYPE html>
<html lang="en-GB">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Streaming attention: quality and speed</title>
<style>
{css}</style>
</head>
<body>
<a class="skip" href="#tables">Skip to the results</a>
<header>
<div>
<h1>Streaming attention: quality and speed</h1>
<p>Attention sinks and a window of recent tokens, against re-computing the window at every step (the baseline) and
against other ways of bounding the cache, by attention kernel.</p>
<nav aria-label="Sections"><ul>{nav}</ul></nav>
</div>
<button type="button" id="theme" class="tool" aria-pressed="false" aria-label="Dark theme">Dark</button>
</header>
{filters}
<main>
{body}
</main>
<script>
{js}</script>
</body>
</html>
"""


def _filters(rows: Sequence[Row], several: bool) -> str:
    groups = [
        ("run", "Run", _distinct((row.run, row.run, "") for row in rows) if several else []),
        ("dataset", "Data set", _distinct((row.dataset, _dataset_text(row), "") for row in rows)),
        ("method", "Method", [(m, s.label, s.colour) for m, s in style.METHODS.items() if _has(rows, "method", m)]),
        ("backend", "Backend", [(b, b, "") for b in style.BACKENDS if _has(rows, "backend", b)]),
    ]
    fieldsets = "".join(_fieldset(name, title, items) for name, title, items in groups if items)
    spread = ""
    if any(row.spans for row in rows):
        spread = '<label><input type="checkbox" id="spread"> show the range of repeats</label>'
    return (
        f'<details class="filters" open><summary>Filter tables and figures</summary>'
        f'<div class="groups">{fieldsets}</div>'
        f'<div class="filter-foot"><button type="button" id="all" class="tool">Show all</button>{spread}'
        f'<span id="state" role="status" class="quiet"></span></div></details>'
    )


def _fieldset(name: str, title: str, items: Sequence[tuple[str, str, str]]) -> str:
    boxes = "".join(
        f'<label><input type="checkbox" checked data-group="{name}" value="{escape(value)}">'
        f"{_swatch(colour)}{escape(text)}</label>"
        for value, text, colour in items
    )
    return f"<fieldset><legend>{title}</legend>{boxes}</fieldset>"


def _swatch(colour: str) -> str:
    return f'<span class="swatch" style="background:{colour}"></span>' if colour else ""


def _glance(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        heading = f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""
        conditions = f'<p class="quiet">{escape(conditions_line(run.results))}</p>'
        listing = _glance_table(glance(run.results))
        parts.append(f'<div class="run" data-run="{escape(run.name)}">{heading}{conditions}{listing}</div>')
    return f"<p>Against the baseline with the same backend; ranges are over the data sets.</p>{''.join(parts)}"


def _glance_table(lines: Sequence[Glance]) -> str:
    if not lines:
        return ""
    heads = "".join(f'<th class="plain" scope="col">{head}</th>' for head in ("", "Speed", "Perplexity", "KV cache"))
    rows = "".join(
        f'<tr data-method="{line.series.method}" data-backend="{line.series.backend}"><th scope="row">'
        f"{_swatch(style.METHODS[line.series.method].colour)}&nbsp;{escape(line.series.label)}</th>"
        f"<td>{line.speed}</td><td>{line.perplexity}</td><td>{line.memory}</td></tr>"
        for line in lines
    )
    return (
        '<div class="scroll narrow" tabindex="0" role="region" aria-label="Table, scrolls sideways">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _figures(runs: Sequence[Run], pictures: Sequence[Picture]) -> str:
    parts = []
    for run in runs:
        mine = [picture for picture in pictures if picture.run == run.name]
        if not mine:
            continue
        heading = f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""
        figures = "\n".join(_figure(picture) for picture in mine)
        parts.append(
            f'<div class="run" data-run="{escape(run.name)}">{heading}<div class="figures">{figures}</div></div>'
        )
    return "\n".join(parts)


def _figure(picture: Picture) -> str:
    dataset = f' data-dataset="{escape(picture.dataset)}"' if picture.dataset else ""
    wide = ' class="wide"' if picture.wide else ""
    wide += ' tabindex="0"' if wide else ""  # scrolls sideways on a phone
    return f"<figure{wide}{dataset}>\n{picture.svg}\n<figcaption>{escape(picture.name)}</figcaption></figure>"


def _results_table(rows: Sequence[Row], several: bool) -> str:
    texts = ["Method", "Backend", "Data set", *(["Run"] if several else [])]
    order = [2, 3, 1, *([0] if several else [])]
    return _table("results", rows, texts, order, RESULT_COLUMNS)


def _ablations_table(rows: Sequence[Row], several: bool) -> str:
    texts = ["Ablation of", "Backend", "Data set", *(["Run"] if several else [])]
    order = [1, 3, 2, *([0] if several else [])]
    return _table("ablation-rows", rows, texts, order, ABLATION_COLUMNS)


def _table(
    name: str, rows: Sequence[Row], texts: Sequence[str], order: Sequence[int], columns: Sequence[Column]
) -> str:
    """``order``: which of a row's texts stand in the text columns."""
    columns = [c for c in columns if any(c.key in row.values for row in rows)]
    heads = [_head(text, "", False) for text in texts] + [_head(c.title, c.unit, True) for c in columns]
    heads.append('<th class="plain" scope="col">Conditions</th><th class="plain" scope="col">Note</th>')
    body = "\n".join(_table_row(row, order, columns) for row in rows)
    width = len(texts) + len(columns) + 2
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table, scrolls sideways">\n'
        f'<table id="{name}" data-filtered><caption><span class="count">{len(rows)} rows</span>; '
        f"a heading sorts by its column</caption>\n<thead><tr>{''.join(heads)}</tr></thead>\n<tbody>\n{body}\n"
        f'<tr class="none" hidden><td colspan="{width}">Nothing fits the filters.</td></tr>\n</tbody></table></div>'
    )


def _head(title: str, unit: str, number: bool) -> str:
    css = ' class="number"' if number else ""
    small = f"<small>{escape(unit)}</small>" if unit else ""
    button = f'<button type="button"><span>{escape(title)}</span>{small}</button>'
    return f'<th scope="col" aria-sort="none"{css}>{button}</th>'


def _table_row(row: Row, order: Sequence[int], columns: Sequence[Column]) -> str:
    first, *rest = (row.texts[i] for i in order)
    swatch = _swatch(style.METHODS[row.method].colour)
    cells = [f'<th scope="row">{swatch}&nbsp;{escape(first)}</th>', *(f"<td>{escape(text)}</td>" for text in rest)]
    cells += [_number(row, column) for column in columns]
    cells.append(f'<td><a href="#env-{row.environment + 1}">{row.environment + 1}</a></td>')
    cells.append(f'<td class="note">{escape(_note(row, columns))}</td>')
    data = f'data-run="{escape(row.run)}" data-dataset="{escape(row.dataset)}"'
    return f'<tr {data} data-method="{row.method}" data-backend="{row.backend}">{"".join(cells)}</tr>'


def _number(row: Row, column: Column) -> str:
    value = row.values.get(column.key)
    if value is None:
        return '<td class="number" data-v="">\N{EN DASH}</td>'
    spread = ""
    if column.key in row.spans:
        low, high = (format_value(v, column) for v in row.spans[column.key])
        spread = f'<span class="spread">{low} to {high}</span>'
    return f'<td class="number" data-v="{value!r}">{format_value(value, column)}{spread}</td>'


def _note(row: Row, columns: Sequence[Column]) -> str:
    """Why figures are absent: the row's own note, else each reason with the columns it holds for."""
    if row.note and not row.values:
        return row.note
    by_reason: dict[str, list[str]] = {}
    for column in columns:
        if column.key not in row.values and column.key in row.reasons:
            by_reason.setdefault(row.reasons[column.key], []).append(column.title.lower())
    parts = [f"{', '.join(titles)}: {reason}" for reason, titles in by_reason.items()]
    return "; ".join([*([row.note] if row.note else []), *parts])


def _environments(environments: Sequence[Environment], several: bool) -> str:
    parts = []
    for i, environment in enumerate(environments, 1):
        pairs = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in environment.entries)
        name = f", {environment.run}" if several else ""
        files = "".join(_file(*entry) for entry in environment.files)
        data = f'data-run="{escape(environment.run)}" data-dataset="{escape(" ".join(environment.datasets))}"'
        data += f' data-backend="{escape(" ".join(environment.backends))}"'
        parts.append(
            f'<details class="env" id="env-{i}" {data}><summary>Conditions {i}{escape(name)}: '
            f"{len(environment.files)} files</summary><dl>{pairs}</dl><ul>{files}</ul></details>"
        )
    return "\n".join(parts)


def _file(name: str, config_hash: str, data_sha256: str, timestamp: str) -> str:
    parts = [escape(name)]
    for label, value in (("configuration", config_hash[:12]), ("text", data_sha256[:12])):
        if value:
            parts.append(f'{label} <span class="hash">{escape(value)}</span>')
    return f"<li>{', '.join([*parts, escape(timestamp)] if timestamp else parts)}</li>"


def _missing(missing: Sequence[tuple[str, str]], several: bool) -> str:
    items = "".join(
        f'<li class="run" data-run="{escape(run)}">{escape(f"{run}: " if several else "")}{escape(line)}</li>'
        for run, line in missing
    )
    return f"<ul>{items}</ul>"


def _dataset_text(row: Row) -> str:
    return row.texts[1] if row.texts[1] not in ("window_size", "n_sink") else row.texts[2]


def _has(rows: Sequence[Row], name: str, value: str) -> bool:
    return any(getattr(row, name) == value for row in rows)


def _distinct(items) -> list[tuple[str, str, str]]:
    seen: dict[str, tuple[str, str, str]] = {}
    for item in items:
        if item[0]:
            seen.setdefault(item[0], item)
    return list(seen.values())
