"""Where cells run: in this process, or (`ray_executor`) on the GPUs of a machine or a cluster."""

import os
from collections.abc import Iterator, Sequence

from experiments.cell_queue import CellQueue
from experiments.config import ExperimentConfig, SetupError
from experiments.measuring import Bench, Outcome, outcome_of
from experiments.models import ModelSource
from experiments.plan import Facts, Task
from experiments.progress import LossDisplay, token_bar

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
            yield self._measure(task, f"{queue.title(task.cell)}, left: {queue.time_left()}")

    def _measure(self, task: Task, title: str) -> Outcome:
        trained = task.source.weights == "trained"  # perplexities of random weights mean nothing
        with token_bar(title, self.config.progress, lambda: task.steps, trained) as show:
            return outcome_of(lambda: self.bench.measure(task, LossDisplay(show)), task.cell)

    def close(self) -> None:
        """Give back what is held for other processes: nothing."""
