"""One run of one contender: attach, prefill, check, warm up, time. The same loop for all of them."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from decode_benchmark.contenders import CONTENDERS, REFERENCE
from decode_benchmark.plan import PREFILL, Cell
from experiments.timing import synchronise
from experiments.memory import PeakMemory
from experiments.methods import Method, MethodSettings
from personal_adapters.neox_flash import wrap_attention
from personal_adapters.sdpa import ATTN_BACKENDS
from streaming_llm.families import text_config

CHECKED_STEPS = 8
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""By dtype: root mean square of the difference of logits, as a share of the logits' own."""

_MIN_STEPS, _PROBE_STEPS, _ATTEMPTS = 3, 2, 3


class CheckError(RuntimeError):
    """A contender computes something else than it should."""


@dataclass(frozen=True)
class Timing:
    """How a run is timed: `steps` decode steps after `warmup` ones, fewer where they would take `max_sec` seconds."""

    steps: int
    warmup: int
    max_sec: float
    seed: int


class Bench:
    """Runs cells of one model. `prefill_backend`: the SDPA backend of contenders that have attention of their own."""

    def __init__(self, model, timing: Timing, prefill_backend: str):
        self.model, self.timing, self.prefill_backend = model, timing, prefill_backend
        self._references: dict[tuple, Tensor | str] = {}

    def run(self, cell: Cell, count: int = 1) -> list[dict]:
        """Run a cell `count` times in one opening; the figures of each as JSON values.

        Raises what the contender raises, and CheckError.
        """
        return self._run_prefill(cell, count) if cell.kind == PREFILL else self._run_decode(cell, count)

    # --- the two kinds of runs -------------------------------------------------------------------------------

    @torch.inference_mode()
    def _run_decode(self, cell: Cell, count: int) -> list[dict]:
        ids = self._ids(cell)
        check = self._reference(cell, ids) if CONTENDERS[cell.contender].checked else None
        with self._open(cell) as method:
            method.reset()
            logits = method.prefill(ids[:, : cell.length])
            tokens = [column.contiguous() for column in ids[:, cell.length :].unbind(1)]
            rows = [logits, *(method.step(token).clone() for token in tokens[:CHECKED_STEPS])]
            checked = None if check is None else self._compare(rows, check)
            del rows, logits
            for token in tokens[CHECKED_STEPS : self.timing.warmup]:
                method.step(token)
            return [self._one_decode(method, tokens) | {"check": checked} for _ in range(count)]

    def _one_decode(self, method: Method, tokens: list[Tensor]) -> dict:
        memory = PeakMemory(tokens[0].device)
        memory.start()
        figures = self._time_steps(method, tokens)
        peak = memory.stop()
        return {
            **figures,
            "engine": method.engine,
            "compile_sec": method.compile_sec,
            "kv_cache_mb": method.kv_cache_nbytes / 1e6,
            "peak_memory_mb": peak.peak_mb,
            "peak_memory_kind": peak.kind,
        }

    @torch.inference_mode()
    def _run_prefill(self, cell: Cell, count: int) -> list[dict]:
        ids = self._ids(cell)[:, : cell.length]
        with self._open(cell) as method:
            method.reset()
            method.prefill(ids)  # warms up
            return [self._one_prefill(method, ids) for _ in range(count)]

    def _one_prefill(self, method: Method, ids: Tensor) -> dict:
        memory = PeakMemory(ids.device)
        memory.start()
        method.reset()
        synchronise(ids.device)
        start = time.perf_counter()
        method.prefill(ids)
        synchronise(ids.device)
        seconds = time.perf_counter() - start
        peak = memory.stop()
        return {
            "prefill_ms": 1e3 * seconds,
            "engine": method.engine,
            "peak_memory_mb": peak.peak_mb,
            "peak_memory_kind": peak.kind,
        }

    def _time_steps(self, method: Method, tokens: list[Tensor]) -> dict:
        """Milliseconds per step; a run in which something was compiled or captured does not count."""
        probe = self._seconds(method, tokens[:_PROBE_STEPS]) / _PROBE_STEPS
        steps = max(_MIN_STEPS, min(self.timing.steps, int(self.timing.max_sec / probe)))
        for _ in range(_ATTEMPTS):
            compiled = method.compile_sec
            seconds = self._seconds(method, tokens[:steps])
            if method.compile_sec == compiled:
                return {"tpot_ms": 1e3 * seconds / steps, "steps": steps}
        raise RuntimeError("it captures or compiles anew in every run")

    def _seconds(self, method: Method, tokens: list[Tensor]) -> float:
        device = tokens[0].device
        synchronise(device)
        start = time.perf_counter()
        for token in tokens:
            method.step(token)
        synchronise(device)
        return time.perf_counter() - start

    # --- what they need --------------------------------------------------------------------------------------

    def _open(self, cell: Cell) -> Method:
        contender = CONTENDERS[cell.contender]
        wrap_attention(self.model, cell.backend if cell.backend in ATTN_BACKENDS else self.prefill_backend)
        return contender.open(self.model, MethodSettings(cell.n_sink, cell.window_size, contender.engine))

    def _ids(self, cell: Cell) -> Tensor:
        """Seeded random tokens [batch, length + steps] on the device: the prompt, and what is fed after it."""
        count = max(self.timing.steps, self.timing.warmup, CHECKED_STEPS)
        generator = torch.Generator().manual_seed(self.timing.seed)
        shape = (cell.batch_size, cell.length + count)
        return torch.randint(text_config(self.model.config).vocab_size, shape, generator=generator).to(
            self.model.device
        )

    # --- the check -------------------------------------------------------------------------------------------

    def _reference(self, cell: Cell, ids: Tensor) -> Tensor | str:
        """Logits [1 + CHECKED_STEPS, batch, vocab] of the eager decoder with math, or why there are none."""
        if cell.conditions not in self._references:
            self._references.clear()  # one set of conditions is measured at a time
            try:
                self._references[cell.conditions] = self._reference_logits(cell, ids)
            except torch.OutOfMemoryError:
                self._references[cell.conditions] = "the eager decoder with math ran out of memory"
        return self._references[cell.conditions]

    def _reference_logits(self, cell: Cell, ids: Tensor) -> Tensor:
        wrap_attention(self.model, "math")
        with REFERENCE.open(self.model, MethodSettings(cell.n_sink, cell.window_size)) as method:
            method.reset()
            rows = [method.prefill(ids[:, : cell.length])]
            rows += [method.step(ids[:, cell.length + i]).clone() for i in range(CHECKED_STEPS)]
        return torch.stack(rows)

    def _compare(self, rows: list[Tensor], reference: Tensor | str) -> dict:
        if isinstance(reference, str):
            return {"error": None, "error_reason": reference}
        dtype = torch.promote_types(reference.dtype, torch.float32)
        exact = reference.to(dtype)
        difference = torch.stack(rows).to(dtype) - exact
        error = float(difference.pow(2).mean().sqrt() / exact.pow(2).mean().sqrt())
        tolerance = TOLERANCE[str(self.model.dtype).removeprefix("torch.")]
        if not error <= tolerance:
            raise CheckError(
                f"its logits differ from the eager decoder's with math by {error:.2g} of their size (allowed: "
                f"{tolerance:g})"
            )
        return {"error": error, "largest_difference": float(difference.abs().max()), "tolerance": tolerance}
