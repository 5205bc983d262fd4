"""What a person sees: a bar and how long the rest will take while cells run, and tables at the end. And the signals
that stop a run.
"""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

_EVERY_STEPS = 32
Times = dict[tuple[str, ...], list[float]]
"""Seconds per token, by kind."""

Show = Callable[[int, float | None], None]
"""Called with the steps done since the last call, and the running perplexity (None until there is one)."""


class LossDisplay:
    """Shows a bar's progress and the perplexity of the losses so far, a few steps late on a GPU.

    `show` is called every 32 steps. On CUDA the mean loss is copied to pinned memory behind the work
    in flight, and read when an event says that it has arrived; nothing waits for it. Without `show` it does nothing.
    """

    def __init__(self, show: Show | None = None):
        self._show = show
        self._steps = 0
        self._pinned: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self._perplexity: float | None = None

    def step(self, nll: Tensor) -> None:
        """Count one step; `nll` is a view of the losses so far [n], on the device."""
        if self._show is None:
            return
        self._steps += 1
        if self._steps % _EVERY_STEPS:
            return
        if nll.device.type == "cuda":
            self._poll(nll)
        elif nll.device.type == "cpu":
            self._perplexity = perplexity_shown(nll.mean().item())
        self._show(_EVERY_STEPS, self._perplexity)

    def _poll(self, nll: Tensor) -> None:
        if self._arrived is not None:
            if not self._arrived.query():
                return
            self._perplexity = perplexity_shown(self._pinned.item())
        if self._pinned is None:
            self._pinned = torch.empty((), dtype=nll.dtype, pin_memory=True)
        self._pinned.copy_(nll.mean(), non_blocking=True)
        self._arrived = torch.cuda.current_stream(nll.device).record_event()


def perplexity_shown(mean: float) -> float:
    """Of a mean loss in nats, for the eye: a huge one is cut."""
    return math.exp(min(mean, 700.0))


@contextmanager
def token_bar(
    title: str, wanted: bool, expected: Callable[[], int | None] = lambda: None, show_perplexity: bool = True
) -> Iterator[Show | None]:
    """A bar on standard error, to be told of tokens, of which so many are `expected`; None where nobody watches."""
    if not (wanted and sys.stderr.isatty()):
        yield None
        return
    with tqdm(desc=title, unit=" tokens", unit_scale=True, leave=False) as bar:

        def show(done: int, perplexity: float | None) -> None:
            if show_perplexity and perplexity is not None:
                bar.set_postfix_str(f"perplexity {perplexity:.2f}", refresh=False)
            whole = expected()
            bar.total = whole if whole is None else max(whole, bar.n + done)
            bar.update(done)

        yield show


class TimeEstimator:
    """How long cells take, from those that have run: the mean of their kind for each token."""

    def __init__(self, earlier: Times):
        self._earlier = dict(earlier)
        self._now: Times = {}

    def add(self, cell, wall_sec: float) -> None:
        """Count a cell that ran; what is known from this run goes before what earlier runs took."""
        self._now.setdefault(cell.kind, []).append(wall_sec / cell.tokens)

    def knows(self, cell) -> bool:
        return cell.kind in self._now or cell.kind in self._earlier

    def text(self, cells: Iterable) -> str:
        """The estimate in words: "about 3 min 20 s", "at least 15 s", "unknown", "none" for no cells."""
        cells, total, complete = list(cells), 0.0, True
        for cell in cells:
            times = self._now.get(cell.kind) or self._earlier.get(cell.kind)
            complete = complete and times is not None
            total += cell.tokens * sum(times) / len(times) if times else 0.0
        if not cells:
            return "none"
        if not complete and not total:
            return "unknown"
        return f"{'about' if complete else 'at least'} {duration(total)}"


def duration(seconds: float) -> str:
    """Seconds in words: "15 s", "3 min 20 s", "2 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 1 else "1 s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


class StopRequest:
    """Notes SIGINT and SIGTERM, for a loop to end between two steps; a second one ends it at once."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc_info) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.signal_number is not None:
            raise KeyboardInterrupt
        self.signal_number = number


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
_REASON_CHARS = 80


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
    headings = [heading for heading, _, _ in _COLUMNS]
    blocks = [result[name] for result in results if result["scoring"] == "parallel" for name in result["methods"]]
    if blocks:  # the runtime is that of a sample of the steps
        steps = max(block["decode_tokens"] or 0 for block in blocks)
        headings[headings.index("runtime s")] = f"s for prefill + {steps} tokens"
    return table(["data set", "method", *headings, ""], rows)


def _note(block: dict) -> str:
    """Why a block has no figures."""
    reason = block.get("reason") or ""
    short = reason if len(reason) <= _REASON_CHARS else reason[: _REASON_CHARS - 3] + "..."
    return "" if block["status"] == "ok" else f"{block['status']}: {short}"


def ablation_table(result: dict) -> str:
    """The entries of an ablation file."""
    rows = []
    for entry in result["results"]:
        note = _note(entry) or ("" if entry["evicts"] else "evicts nothing")
        figures = _figures(entry)
        rows.append([str(entry["n_sink"]), str(entry["window_size"]), figures[0], figures[4], note])
    return table(["sinks", "window", "perplexity", "ms/token", ""], rows)


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
