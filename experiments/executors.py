"""Where cells run: in this process, or (`ray_executor`) on the GPUs of a machine or a cluster."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Protocol

from experiments.config import ExperimentConfig, SetupError
from experiments.measuring import Bench, Outcome, outcome_of
from experiments.models import ModelSource
from experiments.plan import Facts, Task
from experiments.progress import cell_bar


class Queue(Protocol):
    """Gives out tasks. Its length is the number of those that are left."""

    def __len__(self) -> int: ...

    def next(self, model: str | None) -> Task | None:
        """The next task, one of the model named if there is any left; None when there are no more."""

    def title(self, task: Task) -> str:
        """A task's number and name, for a progress bar."""

    def progress(self) -> str:
        """What is done, what failed, how long the rest will take: for the eye."""


class Executor(ABC):
    """Measures cells. A context manager: what it holds is given back on leaving, also after an error."""

    models_at_once: int | None = None  # whose cells may be given out together; None: all
    description = ""  # where it runs, for the eye

    def __enter__(self) -> "Executor":
        return self

    def __exit__(self, *exc_info) -> None:
        return None

    @abstractmethod
    def open(self, sources: Sequence[ModelSource]) -> list[Facts | SetupError]:
        """What there is to know of each model where it will be measured, or why it cannot be."""

    @abstractmethod
    def measure(self, queue: Queue) -> Iterator[Outcome]:
        """Measure tasks until there are no more; yields each outcome as it comes."""


class InProcess(Executor):
    """One cell after the other, on this process's device."""

    models_at_once = 1

    def __init__(self, config: ExperimentConfig):
        self.config = config
        self.bench = Bench(config)
        machine = self.bench.machine
        backends = ", ".join(machine.backends)
        self.description = f"device {machine.device}, {machine.dtype_name}, attention backends: {backends}"

    def open(self, sources: Sequence[ModelSource]) -> list[Facts | SetupError]:
        found: list[Facts | SetupError] = []
        for source in sources:
            try:
                found.append(self.bench.open(source))
            except SetupError as error:
                found.append(error)
        return found

    def measure(self, queue: Queue) -> Iterator[Outcome]:
        while (task := queue.next(None)) is not None:
            trained = task.source.weights == "trained"  # perplexities of random weights mean nothing
            with cell_bar(queue.title(task), task.steps, self.config.progress, trained) as display:
                outcome = outcome_of(lambda task=task, display=display: self.bench.measure(task, display), task.cell)
            yield outcome
