"""Runs a plan, model after model: every finished run is kept, and what fails is named while the others go on."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.benchmarks.contenders import CONTENDERS, PEER
from experiments.benchmarks.decode import DECODE, Bench, Cell, Plan, Timing, in_turns
from experiments.benchmarks.floor import copy_bytes_per_sec, kv_token_nbytes, step_nbytes, weight_nbytes
from experiments.benchmarks.overhead import measure_overhead
from experiments.benchmarks.rows import FIGURE, ResultFile
from experiments.measuring import Machine, describe, free_memory
from experiments.methods import MethodSettings
from experiments.models import LoadedModel, ModelSource
from experiments.quantised import QuantisedSource


class OutOfTimeError(Exception):
    """No run may start any more."""


@dataclass
class DecodeBenchmark:
    """Runs a plan into a result file; `left` counts the runs that it had no time for.

    `overhead_rounds`: of single steps, for the decoder's overhead; 0 for none. `deadline`: `time.monotonic()` after
    which no run starts; None: all of them do. `peer`: runs a cell of the peer that has a Python of its own.
    """

    plan: Plan
    timing: Timing
    repeats: int
    sources: Sequence[ModelSource | QuantisedSource]
    machine: Machine
    file: ResultFile
    say: Callable[[str], None]
    overhead_rounds: int = 0
    deadline: float | None = None
    peer: Callable[[Cell, LoadedModel], dict] | None = None
    left: int = 0

    def run(self) -> bool:
        """Run all models; whether nothing is left to do."""
        copy_speed = None
        for source in self.sources:
            groups = self.plan.groups(source.name)
            todo = [(r, c) for group in groups for r, c in in_turns(group, self.repeats) if not self.file.has(c, r)]
            wants_overhead = self.overhead_rounds and source.name not in [row["model"] for row in self.file.overhead]
            if not todo and not wants_overhead:
                continue
            if self._late():
                self.left += len(todo)
                continue
            copy_speed = copy_speed or copy_bytes_per_sec(self.machine.device)
            loaded = source.load(self.machine.dtype, self.machine.device)
            self._note_model(source, loaded.model)
            try:
                if wants_overhead:
                    self._run_overhead(source.name, loaded)
                self._run_groups(groups, loaded, copy_speed)
            except OutOfTimeError:
                self.left += sum(not self.file.has(cell, repeat) for repeat, cell in todo)
            finally:
                del loaded
                free_memory()
        self.file.save(complete=not self.left)
        return not self.left

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _note_model(self, source: ModelSource | QuantisedSource, model) -> None:
        self.file.models[source.name] = {
            "weights": source.weights,
            "fingerprint": source.fingerprint,
            "parameters": sum(p.numel() for p in model.parameters()),
            "weight_bytes_per_step": weight_nbytes(model),
            "kv_bytes_per_token": kv_token_nbytes(model),
        }

    def _run_groups(self, groups: Sequence[Sequence[Cell]], loaded: LoadedModel, copy_speed: float) -> None:
        prefill_backend = "flash" if "flash" in self.plan.backends else self.plan.backends[0]
        bench = Bench(loaded, self.timing, prefill_backend)
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
            runs = [self.peer(cell, bench.loaded)] if cell.contender == PEER else bench.run(cell, count)
        except (ValueError, ImportError) as error:  # it says that it cannot run here
            status, reason = "skipped", str(error)
        except Exception as error:  # whatever it is, it concerns this cell
            status, reason = "failed", describe(error)
        if reason:
            free_memory()  # what the failed run held must not be missing to the next one
            self.file.fail(cell, status, reason)
            self.say(f"{cell}: {status}: {reason}")
            return
        noted = self.file.models[cell.model]
        nbytes = (noted["weight_bytes_per_step"], noted["kv_bytes_per_token"])
        for run in runs:
            if cell.kind == DECODE:
                run["step_nbytes"] = step_nbytes(*nbytes, cell.cache_size, cell.batch_size)
                run["copy_bytes_per_sec"] = copy_speed
            self.file.add(cell, run)
            self.say(f"{cell}: {run[FIGURE[cell.kind]]:.3f} ms")

    def _run_overhead(self, name: str, loaded: LoadedModel) -> None:
        for cache_size in self.plan.cache_sizes:
            for backend in self.plan.backends:
                settings = MethodSettings(self.plan.n_sink, cache_size - self.plan.n_sink)
                row = measure_overhead(loaded, settings, backend, self.overhead_rounds, self.timing.seed)
                self.file.overhead.append({"model": name, "cache_size": cache_size, **row})
                self.file.save(complete=False)
                self.say(
                    f"{name} | cache {cache_size} | {backend}: eager step {row['decoder_step_ms']:.3f} ms, of which "
                    f"{row['overhead_percent']:.1f}% beside the model's forward"
                )
