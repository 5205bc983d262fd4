"""The cells of an evaluation that are left, as an executor takes them: in order, or one of a model first."""

from collections.abc import Sequence
from dataclasses import replace

from experiments.model_results import ModelResults
from experiments.plan import Cell, Task
from experiments.progress import TimeEstimator

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
