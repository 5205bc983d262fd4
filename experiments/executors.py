"""Cells that are left, and where they run: in this process, or (`ray_executor`) on GPUs of a machine or a cluster."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from experiments.config import ExperimentConfig, SetupError
from experiments.measuring import Bench, Outcome, outcome_of
from experiments.model_results import ModelResults
from experiments.models import ModelSource
from experiments.plan import Cell, Facts, Task
from experiments.progress import LossDisplay, TimeEstimator, token_bar

_PROBE_STEPS = 4


class CellQueue:
    """Gives out the cells of models that are missing. Its length is the number of those that are left."""

    def __init__(self, models: Sequence[ModelResults]):
        self.models = {model.plan.source.name: model for model in models}
        self.planned = [cell for model in models for cell in model.plan.cells]
        self.waiting = [cell for model in models for cell in model.missing]
        self.estimator = TimeEstimator({kind: t for m in models for kind, t in m.store.earlier_times().items()})

    def __len__(self) -> int:
        return len(self.waiting)

    def next(self, model: str | None = None) -> Task | None:
        """The next task, one of the model named if there is any left; None when there are no more."""
        while self.waiting:
            cell = next((cell for cell in self.waiting if cell.model == model), self.waiting[0])
            self.waiting.remove(cell)
            results = self.models[cell.model]
            if not results.fails_again(cell):
                return results.plan.task(cell)
        return None

    def title(self, cell: Cell) -> str:
        """Its number and name."""
        return f"[{self.planned.index(cell) + 1}/{len(self.planned)}] {cell}"

    def progress(self) -> str:
        """What is done, what failed, how long the rest will take: for the eye."""
        done, failed = (sum(len(getattr(m, what)) for m in self.models.values()) for what in ("done", "failed"))
        return f"{done} done, {failed} failed, left: {self.time_left()}"

    def time_left(self) -> str:
        return self.estimator.text([cell for model in self.models.values() for cell in model.missing])


class Probes(CellQueue):
    """A small piece of each kind of cell of which no time is known, for the estimate of a dry run."""

    def __init__(self, model: ModelResults):
        super().__init__([model])
        self.waiting = list({cell.kind: cell for cell in model.missing if not self.estimator.knows(cell)}.values())

    def next(self, model: str | None = None) -> Task | None:
        task = super().next(model)
        if task is None:
            return None
        cache_size = sum(task.cell.sizes)
        length = 4 * cache_size if task.cell.scoring == "parallel" else cache_size + _PROBE_STEPS + 1
        config = replace(task.config, warmup_steps=1, decode_sample=_PROBE_STEPS)
        return replace(task, config=config, ids=task.ids[:, :length])

    def add(self, run: dict, task: Task) -> None:
        """Estimate the whole task from the run of its piece."""
        steps = task.config.warmup_steps + task.steps
        seconds = 2 * run["prefill_sec"] + steps * (run["tpot_ms"] or 0.0) / 1e3
        if "scoring_sec" in run:
            seconds += run["scoring_sec"] * task.ids.shape[1] / (run["scored_tokens"] + 1)
        self.estimator.add(task.cell, seconds)


BUSY = 0.75
"""Load by other programs, for each core, from which on times on a CPU come with a warning."""


class InProcess:
    """One cell after the other, on this process's device.

    What any executor has: `models_at_once` (whose cells may be given out together; None: all models), a `description`
    of where it runs, `open`, `measure` and `close`.
    """

    models_at_once: int | None = 1

    def __init__(self, config: ExperimentConfig):
        self.config = config
        self.bench = Bench(config)
        machine = self.bench.machine
        backends = ", ".join(machine.backends)
        self.description = f"device {machine.device}, {machine.dtype_name}, attention backends: {backends}"
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # Windows has none
        cores = os.cpu_count() or 1
        if machine.device.type == "cpu" and load > BUSY * cores:
            self.description += f"\nwarning: the machine is busy (load {load:.1f}, {cores} cores): times will be wrong"

    def open(self, sources: Sequence[ModelSource]) -> list[Facts | SetupError]:
        """What there is to know of each model where it will be measured, or why it cannot be."""
        found: list[Facts | SetupError] = []
        for source in sources:
            try:
                found.append(self.bench.open(source))
            except SetupError as error:
                found.append(error)
        return found

    def measure(self, queue: CellQueue) -> Iterator[Outcome]:
        """Measure tasks until there are no more; yields each outcome as it comes."""
        while (task := queue.next()) is not None:
            title = f"{queue.title(task.cell)}, left: {queue.time_left()}"
            trained = task.source.weights == "trained"  # perplexities of random weights mean nothing
            with token_bar(title, self.config.progress, lambda task=task: task.steps, trained) as show:
                outcome = outcome_of(partial(self.bench.measure, task, LossDisplay(show)), task.cell)
            yield outcome

    def close(self) -> None:
        """Give back what is held for other processes: nothing."""
