"""Runs a plan, model after model: every finished run is kept, and what fails is named while the others go on."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from decode_benchmark.contenders import CONTENDERS, PEER
from decode_benchmark.floor import copy_bytes_per_sec, kv_token_nbytes, step_nbytes, weight_nbytes
from decode_benchmark.measuring import Bench, Timing
from decode_benchmark.overhead import measure_overhead
from decode_benchmark.plan import DECODE, Cell, Plan, in_turns
from decode_benchmark.results import FIGURE, ResultFile
from experiments.methods import MethodSettings
from experiments.model_run import describe
from experiments.models import ModelSource

Say = Callable[[str], None]
PeerRun = Callable[[Cell, torch.nn.Module], dict]


class OutOfTimeError(Exception):
    """No run may start any more."""


@dataclass(frozen=True)
class Job:
    """What to measure, on what.

    Attributes:
        overhead_rounds: of single steps, for the decoder's overhead; 0 for none.
        deadline: `time.monotonic()` after which no run starts; None: all of them do.
        peer: runs a cell of the peer that has a Python of its own.
    """

    plan: Plan
    timing: Timing
    repeats: int
    sources: tuple[ModelSource, ...]
    dtype: torch.dtype
    device: torch.device
    overhead_rounds: int = 0
    deadline: float | None = None
    peer: PeerRun | None = None


class DecodeBenchmark:
    """Runs a job into a result file; `left` counts the runs that it had no time for."""

    def __init__(self, job: Job, file: ResultFile, say: Say):
        self.job, self.file, self.say = job, file, say
        self.plan, self.repeats = job.plan, job.repeats
        self.left = 0

    def run(self) -> bool:
        """Run all models; whether nothing is left to do."""
        copy_speed, device = None, self.job.device
        for source in self.job.sources:
            groups = self.plan.groups(source.name)
            todo = [(r, c) for group in groups for r, c in in_turns(group, self.repeats) if not self.file.has(c, r)]
            wants_overhead = self.job.overhead_rounds and not self._has_overhead(source.name)
            if not todo and not wants_overhead:
                continue
            if self._late():
                self.left += len(todo)
                continue
            copy_speed = copy_speed or copy_bytes_per_sec(device)
            model = source.load(self.job.dtype, device).model
            self._note_model(source, model)
            try:
                if wants_overhead:
                    self._run_overhead(source.name, model)
                self._run_groups(groups, model, copy_speed)
            except OutOfTimeError:
                self.left += sum(not self.file.has(cell, repeat) for repeat, cell in todo)
            finally:
                del model
                _free_memory()
        self.file.save(complete=not self.left)
        return not self.left

    def _late(self) -> bool:
        return self.job.deadline is not None and time.monotonic() > self.job.deadline

    def _note_model(self, source: ModelSource, model) -> None:
        self.file.models[source.name] = {
            "weights": source.weights,
            "fingerprint": source.fingerprint,
            "parameters": sum(p.numel() for p in model.parameters()),
            "weight_bytes_per_step": weight_nbytes(model),
            "kv_bytes_per_token": kv_token_nbytes(model),
        }

    def _run_groups(self, groups: Sequence[Sequence[Cell]], model, copy_speed: float) -> None:
        prefill_backend = "flash" if "flash" in self.plan.backends else self.plan.backends[0]
        bench = Bench(model, self.job.timing, prefill_backend)
        for group in groups:
            for repeat, cell in in_turns(group, self.repeats):
                if self.file.has(cell, repeat):
                    continue
                if self._late():
                    raise OutOfTimeError
                count = self.repeats - repeat if CONTENDERS[cell.contender].at_once else 1
                self._run_cell(bench, cell, count, copy_speed)

    def _run_cell(self, bench: Bench, cell: Cell, count: int, copy_speed: float) -> None:
        """Run one cell. This is the boundary at which a failure becomes a reason, and the others go on."""
        status = reason = ""
        try:
            runs = [self.job.peer(cell, bench.model)] if cell.contender == PEER else bench.run(cell, count)
        except (ValueError, ImportError) as error:  # it says that it cannot run here
            status, reason = "skipped", str(error)
        except Exception as error:  # whatever it is, it concerns this cell
            status, reason = "failed", describe(error)
        if reason:
            _free_memory()  # what the failed run held must not be missing to the next one
            self.file.fail(cell, status, reason)
            self.say(f"{cell}: {status}: {reason}")
            return
        for run in runs:
            if cell.kind == DECODE:
                noted = self.file.models[cell.model]
                nbytes = (noted["weight_bytes_per_step"], noted["kv_bytes_per_token"])
                run["step_nbytes"] = step_nbytes(*nbytes, cell.cache_size, cell.batch_size)
                run["copy_bytes_per_sec"] = copy_speed
            self.file.add(cell, run)
            self.say(f"{cell}: {run[FIGURE[cell.kind]]:.3f} ms")

    # --- overhead --------------------------------------------------------------------------------------------

    def _has_overhead(self, model: str) -> bool:
        return any(row["model"] == model for row in self.file.overhead)

    def _run_overhead(self, name: str, model) -> None:
        for cache_size in self.plan.cache_sizes:
            for backend in self.plan.backends:
                settings = MethodSettings(self.plan.n_sink, cache_size - self.plan.n_sink)
                row = measure_overhead(model, settings, backend, self.job.overhead_rounds, self.job.timing.seed)
                self.file.overhead.append({"model": name, "cache_size": cache_size, **row})
                self.file.save(complete=False)
                self.say(
                    f"{name} | cache {cache_size} | {backend}: eager step {row['decoder_step_ms']:.3f} ms, of which "
                    f"{row['overhead_percent']:.1f}% beside the model's forward"
                )


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def default_contenders(with_peer: bool) -> tuple[str, ...]:
    """All, the peer only where its Python is known."""
    return tuple(name for name in CONTENDERS if with_peer or name != PEER)
