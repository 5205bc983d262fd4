"""The plan of an evaluation: which files it will write, which cells they need, in which order. Pure: nothing runs.

A cell is one run of one method on one text with one attention backend and one engine: the smallest piece of work
whose outcome is kept. A file needs the cells of its groups, each as often as there are repeats.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from experiments.config import ExperimentConfig, ModelSettings, SetupError, settings_for
from experiments.methods import METHODS, REFERENCE_METHOD
from experiments.models import ModelInfo, ModelSource
from experiments.perplexity import decode_steps
from experiments.storage import hash_of
from experiments.texts import Text
from experiments.tokens import Beginning, first_tokens, random_tokens

MAIN = "main"
HELD_CONSTANT = {"ablation_window_size": "n_sink", "ablation_n_sink": "cache_size"}


@dataclass(frozen=True)
class Cell:
    """One run. `dataset` is the data set's key, `engine` what the method was told to run by; sizes in tokens;
    `repeat` counts from 0."""

    model: str
    dataset: str
    backend: str
    method: str
    engine: str
    n_sink: int
    window_size: int
    scoring: str
    tokens: int
    repeat: int = 0

    def __str__(self) -> str:
        engine = "" if self.engine == "eager" else f" ({self.engine})"
        sizes = f"{self.n_sink}+{self.window_size}"
        return f"{self.dataset} | {self.backend} | {self.method} {sizes}{engine} | run {self.repeat + 1}"

    @property
    def sizes(self) -> tuple[int, int]:
        """Sinks and window."""
        return self.n_sink, self.window_size

    @property
    def stem(self) -> str:
        """Names its record."""
        sizes = f"s{self.n_sink}w{self.window_size}n{self.tokens}"
        return "_".join((self.dataset, self.backend, self.method, self.engine, sizes, self.scoring, f"r{self.repeat}"))

    @property
    def kind(self) -> tuple[str, ...]:
        """Cells of one kind take about equally long for each token."""
        return self.model, self.method, self.backend, self.engine, self.scoring


@dataclass(frozen=True)
class Facts:
    """What was found where a model is measured: the device, what runs there and how. All of it JSON values.

    `engines`: the decode engine with each backend, never "auto". `skipped`: methods of the default ones that cannot
    run, and why. `matters`: what could change a figure. `environment`: the rest of what is recorded.
    """

    dtype: str
    engines: dict[str, str]
    methods: tuple[str, ...]
    skipped: dict[str, str]
    matters: dict
    environment: dict
    device_map: dict | None = None


@dataclass(frozen=True)
class FilePlan:
    """One result file: `kind` is a name of EXPERIMENTS.

    `cells`: the first run of each of its blocks or entries; they differ in method, engine and sizes alone.
    """

    kind: str
    cells: tuple[Cell, ...]

    @property
    def first(self) -> Cell:
        """Stands for what all its cells share."""
        return self.cells[0]

    @property
    def stem(self) -> str:
        """The file's name without `.json`."""
        prefix = f"{self.first.dataset}_main" if self.kind == MAIN else self.kind
        return f"{prefix}_backend-{self.first.backend}"


def plan_files(
    model: str, config: ExperimentConfig, settings: ModelSettings, datasets: Sequence[str], facts: Facts
) -> list[FilePlan]:
    """The files of one model: a main file for each data set and backend; the ablations, on the first data set."""
    files = []
    for dataset in datasets if MAIN in config.only else ():
        for backend, engine in facts.engines.items():  # the attn_backend_list
            cells = tuple(
                Cell(model, dataset, backend, method, own, *settings.sizes, config.scoring, settings.max_eval_tokens)
                for method in facts.methods
                for own in engines_of(method, engine, facts.methods)
            )
            files.append(FilePlan(MAIN, cells))
    # Window sizes with the sinks unchanged; sinks with the cache size unchanged, as in Table 2 of the paper.
    ladders = {
        "ablation_window_size": [(settings.n_sink, window) for window in settings.ablation_window_sizes],
        "ablation_n_sink": [(sink, settings.cache_size - sink) for sink in settings.ablation_n_sinks],
    }
    for kind in (kind for kind in ladders if kind in config.only):
        for backend, engine in facts.engines.items():
            cells = tuple(
                Cell(model, datasets[0], backend, "streaming", engine, *sizes, "parallel", settings.ablation_tokens)
                for sizes in ladders[kind]
            )
            files.append(FilePlan(kind, cells))
    return files


def engines_of(method: str, engine: str, methods: Iterable[str]) -> tuple[str, ...]:
    """The engines with which a method runs in a file, where `engine` was chosen.

    That is one, but the reference method runs with each that another method is compared with it by; the one of
    `engine` comes first.
    """
    if method != REFERENCE_METHOD:
        return (METHODS[method].engine_for(engine),)
    others = [METHODS[name].engine_for(engine) for name in methods if name != method]
    others.sort(key=lambda other: other != engine)
    return tuple(dict.fromkeys(METHODS[method].engine_for(other) for other in others or [engine]))


def plan_cells(files: Iterable[FilePlan], repeats: int) -> list[Cell]:
    """All cells in the order in which they run, each once.

    Repeats are interleaved: every method and backend runs once before any runs again. The main files come first.
    """
    files = list(files)
    phases = [[f for f in files if f.kind == MAIN], [f for f in files if f.kind != MAIN]]
    cells = [
        replace(cell, repeat=repeat)
        for phase in phases
        for repeat in range(repeats)
        for file in phase
        for cell in file.cells
    ]
    return list(dict.fromkeys(cells))


@dataclass(frozen=True)
class Task:
    """What it takes to measure a cell, wherever that is: ids int64 [1, N] on the CPU."""

    cell: Cell
    source: ModelSource
    config: ExperimentConfig
    ids: Tensor

    @property
    def steps(self) -> int:
        """How many decode steps are timed."""
        num_tokens, cell = self.ids.shape[1], self.cell
        prompt = min(sum(cell.sizes), num_tokens)
        return decode_steps(num_tokens, prompt, cell.scoring, self.config.decode_sample)


@dataclass
class ModelPlan:
    """The plan of one model: its numbers, streams, files and cells. Raises SetupError where one cannot be had."""

    config: ExperimentConfig
    source: ModelSource
    info: ModelInfo
    texts: Sequence[Text]
    facts: Facts
    settings: ModelSettings = field(init=False)
    beginning: Beginning = field(init=False)
    files: list[FilePlan] = field(init=False)
    cells: list[Cell] = field(init=False)

    def __post_init__(self):
        self.settings = model_settings(self.config, self.source, self.info)
        self.beginning = self.info.beginning(self.config.bos)
        self._ids: dict[tuple[str, int], Tensor] = {}
        keys = [text.key for text in self.texts]
        self.files = plan_files(self.source.name, self.config, self.settings, keys, self.facts)
        self.cells = plan_cells(self.files, self.config.repeats)
        for key in keys:
            self.ids(key, self.settings.max_eval_tokens)

    def text(self, key: str) -> Text:
        return next(text for text in self.texts if text.key == key)

    def ids(self, key: str, limit: int) -> Tensor:
        """The first `limit` tokens of a text as the model gets them: int64 [1, N]."""
        if (key, limit) not in self._ids:
            text, vocab_size = self.text(key), self.info.vocab_size
            if self.info.tokenizer is None:
                ids = random_tokens(text, vocab_size, limit, self.config.seed)
            elif text.documents is None:
                raise SetupError(f"data set {text.dataset} is for models with random weights (random:<size>) only")
            else:
                ids = first_tokens(text, self.info.tokenizer, self.beginning.ids, limit)
            if (largest := int(ids.max())) >= vocab_size:
                raise SetupError(f"data set {text.dataset}: token id {largest} is outside the model's vocabulary")
            self._ids[key, limit] = ids
        return self._ids[key, limit]

    def task(self, cell: Cell) -> Task:
        return Task(cell, self.source, self.config, self.ids(cell.dataset, cell.tokens))

    def cell_config(self, cell: Cell) -> dict:
        """Everything that could change a cell's figures, its hash's preimage; the same for all its repeats."""
        value = self._shared_config(cell)
        value |= {"method": cell.method, "engine": cell.engine}
        value |= {"n_sink": cell.n_sink, "window_size": cell.window_size}
        return value | (self._kvpress_config() if cell.method == "kvpress" else {})

    def _shared_config(self, cell: Cell) -> dict:
        """What all methods with the cell's backend on its text share."""
        ids = self.ids(cell.dataset, cell.tokens)
        return {
            "schema": 1,
            "model": self.source.fingerprint,
            "data_sha256": self.text(cell.dataset).sha256,
            "tokens_sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
            "num_tokens": ids.shape[1],
            "backend": cell.backend,
            "dtype": self.facts.dtype,
            "device_map": self.facts.device_map,
            "scoring": cell.scoring,
            "decode_sample": self.config.decode_sample if cell.scoring == "parallel" else None,
            "decode_engine": self.facts.engines[cell.backend],
            "seed": self.config.seed,
            "warmup_steps": self.config.warmup_steps,
            **self.facts.matters,
        }

    def _kvpress_config(self) -> dict:
        return {"kvpress": self.facts.environment["kvpress"], "kvpress_press": self.config.kvpress_press}

    def header(self, file: FilePlan) -> dict:
        """The conditions of a result file; its hash covers all methods' configurations, not which of them ran."""
        cell, text, settings = file.first, self.text(file.first.dataset), self.settings
        shared = self._shared_config(cell) | self._kvpress_config()
        if file.kind == MAIN:
            shared |= {"n_sink": settings.n_sink, "window_size": settings.window_size}
        else:
            shared |= {"sizes": [list(cell.sizes) for cell in file.cells]}
        is_random = self.info.tokenizer is None
        return {
            "experiment": text.experiment,
            "model": self.source.name,
            "dataset": text.dataset,
            "dataset_key": text.key,
            "backend": cell.backend,
            "dtype": self.facts.dtype,
            "device": self.facts.matters["device"],
            "num_tokens": shared["num_tokens"],
            "max_eval_tokens": cell.tokens,
            "tokens": f"random ids, seed {self.config.seed}" if is_random else "the text, by the model's tokenizer",
            "scoring": cell.scoring,
            "weights": self.source.weights,
            "bos": self.beginning.record(),
            "data_sha256": text.sha256,
            "config_hash": hash_of(shared),
        }


def model_settings(config: ExperimentConfig, source: ModelSource, info: ModelInfo) -> ModelSettings:
    """The numbers for a model; raises SetupError where those that were asked for do not fit it."""
    return settings_for(config, info.context_length, source.is_demo, info.largest_window)
