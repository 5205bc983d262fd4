"""Captions: the conditions under which the records of a figure were measured, from the files."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePath

from .records import AblationRow, Conditions, Record
from .style import METHODS


def caption(records: Sequence[Record | AblationRow], vary: Iterable[str] = (), repeats: bool = True) -> str:
    """One line: model, device, dtype, cache, tokens, repeats. What the files do not say is left out.

    Args:
        vary: Parts that the figure itself varies, to leave out: ``cache``, ``tokens``.
        repeats: Whether to say of how many runs the figures are medians.
    """
    vary = set(vary)
    conditions = [r.conditions for r in records]
    parts = [_join(conditions, get) for name, get in _PARTS.items() if name not in vary]
    parts.append(_engines(records))
    if repeats:
        parts.append(_repeats(records))
    # A part stays on one line where it fits on one: no-break spaces within parts.
    return " · ".join(part.replace(" ", "\xa0") for part in parts if part)


def peak_memory_note(records: Iterable[Record]) -> str:
    """What the files mean by peak memory: it is not the same thing on a GPU and on a CPU."""
    kinds = sorted({r.conditions.peak_memory_kind for r in records if r.conditions.peak_memory_kind})
    return f"peak memory: {' / '.join(kinds)}" if kinds else ""


def _join(conditions: Sequence[Conditions], get: Callable[[Conditions], str | None]) -> str:
    return " / ".join(sorted({text for text in map(get, conditions) if text}))


def _model(c: Conditions) -> str | None:
    if c.model is None:
        return None
    name = PurePath(c.model).name if c.model.startswith(("/", ".")) else c.model
    return f"{name.removeprefix('random:')} (random weights)" if c.weights == "random" else name


def _cache(c: Conditions) -> str | None:
    if c.cache_size is None:
        return None
    return f"cache {c.n_sink} + {c.window_size:,} tokens"


def _tokens(c: Conditions) -> str | None:
    return None if c.num_tokens is None else f"{c.num_tokens:,} tokens of text"


def _engines(records: Sequence[Record | AblationRow]) -> str:
    """Which decode engines ran: nothing where all were eager, and which methods had which where they differ."""
    methods: dict[str, set[str]] = {}
    for record in records:
        if record.conditions.engine is not None:
            methods.setdefault(record.conditions.engine, set()).add(METHODS[record.series.method].label)
    if not set(methods) - {"eager"}:
        return ""
    if len(methods) == 1:
        return f"{next(iter(methods))} engine"
    return "engines: " + "; ".join(f"{name} ({', '.join(sorted(methods[name]))})" for name in sorted(methods))


_PARTS: dict[str, Callable[[Conditions], str | None]] = {
    "model": _model,
    "device": lambda c: c.device,
    "dtype": lambda c: c.dtype,
    "cache": _cache,
    "tokens": _tokens,
    "press": lambda c: None if c.press in (None, "streaming_llm") else f"kvpress with the press {c.press}",
}


def _repeats(records: Sequence[Record | AblationRow]) -> str:
    counts = sorted({len(r.runs) for r in records if len(r.runs) > 1})
    if not counts:
        return ""
    return f"median of {' / '.join(map(str, counts))} runs; whiskers: all of them"
