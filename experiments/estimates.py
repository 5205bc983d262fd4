"""How long a cell would take, from running a small piece of it: for dry runs where nothing has run yet."""

import time

import torch

from experiments.cells import Cell
from experiments.device import synchronise
from experiments.perplexity import compute_perplexity
from experiments.session import ModelSession

_PROBE_STEPS = 4


def probe_seconds(session: ModelSession, cell: Cell) -> float:
    """Seconds that the cell would take, from a few decode steps (and, scored in parallel, a part of the text)."""
    ids = session.stream(cell.dataset, cell.tokens).ids
    prompt = min(cell.n_sink + cell.window_size, ids.shape[1])
    method = session.method(cell)
    probe = compute_perplexity(session.model, ids[:, : prompt + _PROBE_STEPS + 1], method, warmup_steps=1)
    scoring = 0.0
    if cell.scoring == "parallel" and method.parallel:
        scoring = _scoring_seconds(method, ids.to(session.model.device))
    tpot = (probe.tpot_ms or 0.0) / 1e3
    warm_up = probe.prefill_sec + session.config.warmup_steps * tpot
    return warm_up + probe.prefill_sec + session.decode_steps(cell) * tpot + scoring


def _scoring_seconds(method, ids: torch.Tensor) -> float:
    part = ids[:, : min(ids.shape[1], 4 * method.settings.cache_size)]
    synchronise(ids.device)
    start = time.perf_counter()
    method.score(part)
    synchronise(ids.device)
    return (time.perf_counter() - start) * ids.shape[1] / part.shape[1]
