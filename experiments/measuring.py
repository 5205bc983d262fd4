"""Measuring one cell on one device: a function of the two. What is loaded there stays loaded between cells."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from experiments.config import DTYPES, ExperimentConfig, SetupError, first_line
from experiments.environment import environment, what_matters
from experiments.kept import Found
from experiments.kvpress_support import PRESSES
from experiments.methods import DEFAULT_METHODS, METHODS, MethodSettings
from experiments.models import LoadedModel, ModelSource
from experiments.perplexity import compute_perplexity
from experiments.plan import Cell, Facts, Task, model_settings
from experiments.progress import LossDisplay
from experiments.results import run_record
from personal_adapters.neox_flash import wrap_attention
from personal_adapters.sdpa import check_backend_available, resolve_attn_backend, select_dtype
from streaming_llm import resolve_engine

Value = TypeVar("Value")


@dataclass(frozen=True)
class Machine:
    """Where and in what everything runs: device, dtype, and the attention backends (never "auto")."""

    device: torch.device
    dtype: torch.dtype
    backends: tuple[str, ...]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def load(self, source: ModelSource, device_map: str | None = None) -> LoadedModel:
        """A model with its attention wrapped for the first backend; raises SetupError."""
        loaded = source.load(self.dtype, self.device, device_map)
        self.wrap(loaded, self.backends[0])
        return loaded

    def wrap(self, loaded: LoadedModel, backend: str) -> None:
        """Let a backend compute the model's attention; raises SetupError where it cannot."""
        available = check_backend_available(backend, self.dtype, self.device, loaded.head_dim)
        if not available:
            raise SetupError(f"attention backend {backend!r} cannot run {loaded.name!r}: {available.reason}")
        try:
            wrap_attention(loaded.model, backend)
        except ValueError as error:
            raise SetupError(f"model {loaded.name!r} cannot be measured: {error}") from None

    def engine(self, loaded: LoadedModel, asked: str, backend: str) -> str:
        """The decode engine with a backend: what was asked for, or the fastest that runs; raises SetupError."""
        self.wrap(loaded, backend)
        try:
            return resolve_engine(loaded.model, asked)
        except ValueError as error:
            raise SetupError(f"engine {asked!r} cannot run {loaded.name!r}: {error}") from None


def resolve_machine(config: ExperimentConfig) -> Machine:
    """Device, dtype and backends of a configuration; raises SetupError for what does not exist or run here."""
    try:
        device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise SetupError(f"unknown device {config.device!r}: choose cpu or cuda, cuda:0, ...") from None
    if device.type not in ("cpu", "cuda"):
        raise SetupError(f"device {config.device!r} is not supported: choose cpu or cuda, cuda:0, ...")
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise SetupError(f"device {config.device!r}: PyTorch sees {torch.cuda.device_count()} CUDA devices here")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)  # for what takes the current device: it is this one from here on
    try:
        dtype = getattr(torch, config.dtype) if config.dtype in DTYPES else select_dtype(device)
        asked = config.attn_backend_list or (None,)
        backends = [resolve_attn_backend(name, device=device, dtype=dtype) for name in asked]
    except ValueError as error:
        raise SetupError(str(error)) from None
    return Machine(device, dtype, tuple(dict.fromkeys(backends)))


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    `found`: its run as `results.run_record` makes it, with the losses `nll` in nats and the `position` of their
    tokens; or None and the `reason`. `matters`: what could change a figure, as it was found where the cell ran.
    """

    cell: Cell
    found: Found | None = None
    wall_sec: float = 0.0
    matters: dict = field(default_factory=dict)
    reason: str = ""


class Bench:
    """A device with the model that was loaded last. Raises SetupError where what is configured cannot run here."""

    def __init__(self, config: ExperimentConfig):
        self.config = config
        self.machine = resolve_machine(config)
        for name in config.methods or ():  # one that was named has to be able to run
            reason = METHODS[name].unavailable()
            if reason is not None:
                raise SetupError(f"method {name!r} cannot run here: {reason}")
        if reason := PRESSES[config.kvpress_press].cannot:
            raise SetupError(f"kvpress_press {config.kvpress_press!r} cannot run: {reason}")
        self._source: ModelSource | None = None
        self._loaded: LoadedModel | None = None

    def open(self, source: ModelSource) -> Facts:
        """Load a model and find out what of the configuration runs with it; raises SetupError where nothing does."""
        loaded, machine, asked = self._load(source), self.machine, self.config.device_map
        sizes = model_settings(self.config, source, loaded).sizes
        engines = {backend: machine.engine(loaded, self.config.engine, backend) for backend in machine.backends}
        machine.wrap(loaded, machine.backends[0])
        methods, skipped = self._methods(loaded, sizes, engines[machine.backends[0]])
        matters = what_matters(machine.device)
        spread = None if asked is None else {"asked": asked, "weights_mb": loaded.weights_mb}
        where = environment(machine.device, self.config.command, self.config.seed)
        return Facts(
            dtype=machine.dtype_name,
            engines=engines,
            methods=methods,
            skipped=skipped,
            matters=matters,
            environment=where if spread is None else where | {"device_map": spread},
            device_map=spread,
        )

    def measure(self, task: Task, display: LossDisplay | None = None) -> Outcome:
        """Run a cell. Raises whatever goes wrong; see `outcome_of`."""
        start, cell, config = time.perf_counter(), task.cell, task.config
        loaded = self._load(task.source)
        self.machine.wrap(loaded, cell.backend)
        result = compute_perplexity(
            loaded.model,
            task.ids,
            METHODS[cell.method](loaded.model, self._method_settings(cell.sizes, cell.engine)),
            scoring=cell.scoring,
            decode_sample=config.decode_sample,
            warmup_steps=config.warmup_steps,
            progress=display,
        )
        found = Found(run_record(result, cell.backend), {"nll": result.nll, "position": result.position})
        return Outcome(cell, found, time.perf_counter() - start, what_matters(self.machine.device))

    def _load(self, source: ModelSource) -> LoadedModel:
        if self._source != source:
            self._source = self._loaded = None
            free_memory()
            self._loaded = source.load(self.machine.dtype, self.machine.device, self.config.device_map)
            self._source = source
        return self._loaded

    def _method_settings(self, sizes: tuple[int, int], engine: str) -> MethodSettings:
        return MethodSettings(*sizes, engine, self.config.kvpress_press, self.config.seed)

    def _methods(self, loaded: LoadedModel, sizes: tuple[int, int], engine: str) -> tuple[tuple[str, ...], dict]:
        """The methods that can run, by attaching each to the model, and of the default ones why another cannot."""
        able, skipped = [], {}
        for name in self.config.methods or DEFAULT_METHODS:
            reason = METHODS[name].unavailable()
            try:
                if reason is None:
                    settings = self._method_settings(sizes, METHODS[name].engine_for(engine))
                    with METHODS[name](loaded.model, settings):
                        able.append(name)
                        continue
            except (ValueError, ImportError) as error:
                reason = str(error)
            if self.config.methods is not None or not METHODS[name].optional:
                raise SetupError(f"method {name!r} cannot run with model {loaded.name!r}: {reason}")
            skipped[name] = reason
        return tuple(able), skipped


def attempt(compute: Callable[[], Value], reason_of: Callable | None = None) -> tuple[Value | None, Any]:
    """What a piece of work gives, or why it gives nothing: the boundary at which whatever goes wrong becomes a reason,
    as `describe` or `reason_of` words it, and the other pieces go on."""
    try:
        return compute(), ""
    except Exception as error:  # whatever it is, it concerns this piece
        reason = (reason_of or describe)(error)
    free_memory()  # what the failed run held must not be missing to the next one
    return None, reason


def outcome_of(measure: Callable[[], Outcome], cell: Cell) -> Outcome:
    """A cell's outcome, whatever goes wrong."""
    outcome, reason = attempt(measure)
    return outcome or Outcome(cell, reason=reason)


def describe(error: Exception) -> str:
    """An error as a reason: its kind and first line."""
    is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return f"{'out of memory' if is_memory else type(error).__name__}: {first_line(error)}"


def free_memory() -> None:
    """Give back what is held for nobody."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
