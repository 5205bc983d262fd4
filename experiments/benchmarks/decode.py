"""One run of one contender: attach, prefill, check, warm up, time. The same loop for all of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from experiments.benchmarks.contenders import CONSTANT_DENSE, CONTENDERS
from experiments.costs import measured, seconds
from experiments.measuring import free_memory
from experiments.methods import METHODS, Dense, Method, MethodSettings, Streaming
from experiments.models import LoadedModel
from experiments.perplexity import devices_of
from personal_adapters.neox_flash import wrap_attention
from personal_adapters.sdpa import ATTN_BACKENDS

DECODE, PREFILL = "decode", "prefill"
CHECKED_STEPS = 8
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""By dtype: root mean square of the difference of logits, as a share of the logits' own."""

_MIN_STEPS, _PROBE_STEPS = 3, 2


class CheckError(RuntimeError):
    """A contender computes something else than it should."""


@dataclass(frozen=True)
class Cell:
    """One contender under one set of conditions. `length`: tokens of the prompt; sizes in tokens.

    `backend` is what computes the attention: an SDPA backend, or the contender's own kernel.
    """

    kind: str  # DECODE | PREFILL
    model: str
    cache_size: int
    n_sink: int
    batch_size: int
    length: int
    contender: str
    backend: str

    def __str__(self) -> str:
        what = f"cache {self.cache_size}" if self.kind == DECODE else f"prefill {self.length}"
        return f"{self.model} | {what} | batch {self.batch_size} | {self.contender} ({self.backend})"

    @property
    def key(self) -> dict:
        """The cell as JSON values."""
        return asdict(self)

    @property
    def conditions(self) -> tuple:
        """What cells that are compared with each other share."""
        return self.kind, self.model, self.cache_size, self.n_sink, self.batch_size, self.length


@dataclass(frozen=True)
class Plan:
    """What a command line asks for."""

    cache_sizes: tuple[int, ...]
    prefill_lengths: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    contenders: tuple[str, ...]
    backends: tuple[str, ...]
    n_sink: int

    def groups(self, model: str) -> list[list[Cell]]:
        """Cells that are measured in turns: one list for each set of conditions."""
        sizes = [(DECODE, size, size) for size in self.cache_sizes]
        sizes += [(PREFILL, self.cache_sizes[0], length) for length in self.prefill_lengths]
        groups = [
            [
                Cell(kind, model, cache_size, self.n_sink, batch_size, length, name, backend)
                for name in self.contenders
                if kind == DECODE or CONTENDERS[name].prefills
                for backend in ([CONTENDERS[name].attention] if CONTENDERS[name].attention else self.backends)
            ]
            for batch_size in self.batch_sizes
            for kind, cache_size, length in sizes
        ]
        return [group for group in groups if group]


def in_turns(group: Sequence[Cell], repeats: int) -> Iterator[tuple[int, Cell]]:
    """The runs of a group, (repeat, cell): every contender once before any runs again."""
    for repeat in range(repeats):
        for cell in group:
            yield repeat, cell


class ConstantDense(Dense):
    """Transformers' own cache at a constant length: each step attends to all of it and is forgotten again."""

    name, label = CONSTANT_DENSE, "DynamicCache"

    def prefill(self, ids: Tensor) -> Tensor:
        self._length = ids.shape[1]
        return super().prefill(ids)

    def step(self, ids: Tensor) -> Tensor:
        logits = super().step(ids)
        self._cache.crop(self._length)
        return logits


@dataclass(frozen=True)
class Timing:
    """How a run is timed: `steps` decode steps after `warmup` ones, fewer where they would take `max_sec` seconds."""

    steps: int
    warmup: int
    max_sec: float
    seed: int


class Bench:
    """Runs cells of one model.

    `prefill_backend`: the SDPA backend that is allowed where a contender has attention of its own. In float32 it
    prefills by that.
    """

    def __init__(self, loaded: LoadedModel, timing: Timing, prefill_backend: str):
        self.loaded, self.model = loaded, loaded.model
        self.timing, self.prefill_backend = timing, prefill_backend
        self._references: dict[tuple, Tensor | str] = {}

    @torch.inference_mode()
    def run(self, cell: Cell, count: int = 1) -> list[dict]:
        """Run a cell `count` times in one opening; the figures of each as JSON values.

        Raises what the contender raises, and CheckError.
        """
        ids = self._ids(cell)
        checked = CONTENDERS[cell.contender].checked and cell.kind == DECODE
        check = self._reference(cell, ids) if checked else None
        free_memory()  # where its memory lies, and so how fast it is, is not left to what ran before
        with self._open(cell) as method:
            if cell.kind == PREFILL:
                prefill = partial(self._time_prefill, method, ids[:, : cell.length])
                prefill()  # warms up
                return [self._measured(method, prefill) for _ in range(count)]
            method.reset()
            logits = method.prefill(ids[:, : cell.length])
            tokens = [column.contiguous() for column in ids[:, cell.length :].unbind(1)]
            rows = [logits, *(method.step(token).clone() for token in tokens[:CHECKED_STEPS])]
            found = None if check is None else self._compare(rows, check)
            del rows, logits
            for token in tokens[CHECKED_STEPS : self.timing.warmup]:
                method.step(token)
            runs = []
            for _ in range(count):
                run = self._measured(method, partial(self._time_steps, method, tokens))
                held = {"compile_sec": method.compile_sec, "kv_cache_mb": method.kv_cache_nbytes / 1e6}
                runs.append(run | held | {"check": found})
            return runs

    def _time_steps(self, method: Method, tokens: list[Tensor]) -> dict:
        """Milliseconds per step, over fewer steps where they take long."""

        def feed(some: list[Tensor]) -> float:
            return seconds(lambda: [method.step(token) for token in some], self.loaded.device)

        probe = feed(tokens[:_PROBE_STEPS]) / _PROBE_STEPS
        steps = max(_MIN_STEPS, min(self.timing.steps, int(self.timing.max_sec / probe)))
        return {"tpot_ms": 1e3 * feed(tokens[:steps]) / steps, "steps": steps}

    def _time_prefill(self, method: Method, ids: Tensor) -> dict:
        method.reset()
        return {"prefill_ms": 1e3 * seconds(lambda: method.prefill(ids), self.loaded.device)}

    def _measured(self, method: Method, run: Callable[[], dict]) -> dict:
        figures, peak = measured(method, run, devices_of(self.model))
        memory = {"peak_memory_mb": peak.peak_mb, "peak_memory_kind": peak.kind}
        return {**figures, "engine": method.engine, **memory}

    # --- what they need --------------------------------------------------------------------------------------

    def _open(self, cell: Cell) -> Method:
        """The contender's method on the model; raises ValueError where it cannot run."""
        contender = CONTENDERS[cell.contender]
        method = METHODS.get(contender.method, ConstantDense)
        reason = method.unavailable()
        if reason is not None:
            raise ValueError(reason)
        if contender.at_once:
            torch.compiler.reset()  # past a number of recompilations PyTorch goes on uncompiled, and only warns
        wrap_attention(self.model, cell.backend if cell.backend in ATTN_BACKENDS else self.prefill_backend)
        return method(self.model, self._settings(cell, contender.engine))

    @staticmethod
    def _settings(cell: Cell, engine: str) -> MethodSettings:
        return MethodSettings(cell.n_sink, cell.cache_size - cell.n_sink, engine)

    def _ids(self, cell: Cell) -> Tensor:
        """Seeded random tokens [batch, length + steps] on the device: the prompt, and what is fed after it."""
        count = max(self.timing.steps, self.timing.warmup, CHECKED_STEPS)
        generator = torch.Generator().manual_seed(self.timing.seed)
        shape = (cell.batch_size, cell.length + count)
        return torch.randint(self.loaded.vocab_size, shape, generator=generator).to(self.loaded.device)

    # --- the check -------------------------------------------------------------------------------------------

    def _reference(self, cell: Cell, ids: Tensor) -> Tensor | str:
        """Logits [1 + CHECKED_STEPS, batch, vocab] of the eager decoder with math, or why there are none."""
        if cell.conditions not in self._references:
            self._references.clear()  # one set of conditions is measured at a time
            wrap_attention(self.model, "math")
            try:
                with Streaming(self.model, self._settings(cell, "eager")) as method:
                    method.reset()
                    rows = [method.prefill(ids[:, : cell.length])]
                    rows += [method.step(ids[:, cell.length + i]).clone() for i in range(CHECKED_STEPS)]
                    self._references[cell.conditions] = torch.stack(rows)
            except torch.OutOfMemoryError:
                self._references[cell.conditions] = "the eager decoder with math ran out of memory"
        return self._references[cell.conditions]

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
