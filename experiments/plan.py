"""The plan of an evaluation of one model: which files it will write, which cells they need, and in which order."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from experiments.cells import Cell
from experiments.config import ExperimentConfig, ModelSettings

MAIN = "main"


@dataclass(frozen=True)
class Group:
    """A method with its sizes: in a file, the runs that one block or entry is made of."""

    method: str
    n_sink: int
    window_size: int


@dataclass(frozen=True)
class FilePlan:
    """One result file: what it compares, on which text, with which backend. `kind` is a name of EXPERIMENTS."""

    kind: str
    dataset: str
    backend: str
    tokens: int
    scoring: str
    groups: tuple[Group, ...]

    @property
    def stem(self) -> str:
        """The file's name without `.json`."""
        prefix = f"{self.dataset}_main" if self.kind == MAIN else self.kind
        return f"{prefix}_backend-{self.backend}"

    def cell(self, group: Group, repeat: int) -> Cell:
        sizes = (group.n_sink, group.window_size)
        return Cell(self.dataset, self.backend, group.method, *sizes, self.scoring, self.tokens, repeat)


def plan_files(
    config: ExperimentConfig,
    settings: ModelSettings,
    datasets: Sequence[str],
    backends: Sequence[str],
    methods: Sequence[str],
) -> list[FilePlan]:
    """The files of one model: a main file for each data set and backend; the ablations, on the first data set."""
    files = []
    if MAIN in config.only:
        groups = tuple(Group(method, settings.n_sink, settings.window_size) for method in methods)
        for dataset in datasets:
            for backend in backends:
                files.append(FilePlan(MAIN, dataset, backend, settings.max_eval_tokens, config.scoring, groups))
    # Window sizes with the sinks unchanged; sinks with the cache size unchanged, as in Table 2 of the paper.
    ladders = {
        "ablation_window_size": [(settings.n_sink, window) for window in settings.ablation_window_sizes],
        "ablation_n_sink": [(sink, settings.cache_size - sink) for sink in settings.ablation_n_sinks],
    }
    for kind, sizes in ladders.items():
        if kind in config.only:
            groups = tuple(Group("streaming", *pair) for pair in sizes)
            for backend in backends:
                files.append(FilePlan(kind, datasets[0], backend, settings.ablation_tokens, "parallel", groups))
    return files


HELD_CONSTANT = {"ablation_window_size": "n_sink", "ablation_n_sink": "cache_size"}


def plan_cells(files: Iterable[FilePlan], repeats: int) -> list[Cell]:
    """All cells in the order in which they run, each once.

    Repeats are interleaved: every method and backend runs once before any runs again. The main files come first.
    """
    files = list(files)
    phases = [[f for f in files if f.kind == MAIN], [f for f in files if f.kind != MAIN]]
    cells = [
        file.cell(group, repeat)
        for phase in phases
        for repeat in range(repeats)
        for file in phase
        for group in file.groups
    ]
    return list(dict.fromkeys(cells))


class TimeEstimator:
    """How long cells take, from those that have run: the mean of their kind for each token."""

    def __init__(self, earlier: dict[tuple[str, str, str], list[float]] | None = None):
        self._earlier = dict(earlier or {})
        self._now: dict[tuple[str, str, str], list[float]] = {}

    def add(self, cell: Cell, wall_sec: float) -> None:
        """Count a cell that ran; what is known from this run goes before what earlier runs took."""
        self._now.setdefault(cell.kind, []).append(wall_sec / cell.tokens)

    def knows(self, cell: Cell) -> bool:
        return cell.kind in self._now or cell.kind in self._earlier

    def seconds(self, cells: Iterable[Cell]) -> tuple[float, bool]:
        """Seconds that the cells will take, and whether all their kinds are known (if not: at least that long)."""
        total, complete = 0.0, True
        for cell in cells:
            times = self._now.get(cell.kind) or self._earlier.get(cell.kind)
            complete = complete and times is not None
            total += cell.tokens * sum(times) / len(times) if times else 0.0
        return total, complete

    def text(self, cells: Iterable[Cell]) -> str:
        """The estimate in words: "about 3 min 20 s", "at least 15 s", "unknown", "none" for no cells."""
        cells = list(cells)
        if not cells:
            return "none"
        seconds, complete = self.seconds(cells)
        if not complete and not seconds:
            return "unknown"
        return f"{'about' if complete else 'at least'} {duration(seconds)}"


def duration(seconds: float) -> str:
    """Seconds in words: "15 s", "3 min 20 s", "2 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 1 else "1 s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
