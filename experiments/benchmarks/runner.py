"""Runs a plan, model after model: every finished run is kept, and what fails is named while the others go on.

The floor is the least time that a decode step can take: the bytes it has to read, at the speed at which memory is
copied here. A step reads every weight once, but for the table of input embeddings, of which it reads a row, and the
keys and values of every token that is attended to. Activations and what is written are left out: it is a bound.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

import torch

from experiments.benchmarks.contenders import CONTENDERS
from experiments.benchmarks.decode import DECODE, Bench, Cell, Plan, Timing, in_turns
from experiments.benchmarks.rows import FIGURE, ResultFile
from experiments.config import SetupError
from experiments.costs import seconds
from experiments.measuring import Machine, attempt, describe, free_memory
from experiments.methods import Dense, MethodSettings
from experiments.models import LoadedModel, ModelSource
from streaming_llm.placement import stored_nbytes

KINDS = {"int8": "Int8WeightOnlyConfig", "int4": "Int4WeightOnlyConfig"}
"""Name -> torchao's configuration, with its own defaults."""


@dataclass(frozen=True)
class QuantisedSource:
    """A model's source, and what its weights are quantised to: a name of `KINDS`."""

    source: ModelSource
    kind: str

    @property
    def name(self) -> str:
        return f"{self.source.name}, {self.kind}"

    @property
    def weights(self) -> str:
        return self.source.weights

    @property
    def fingerprint(self) -> str:
        return f"{self.source.fingerprint}, {self.kind} by torchao {version('torchao')}"

    def load(self, dtype: torch.dtype, device: torch.device) -> LoadedModel:
        """The model on a device; raises SetupError where it cannot be loaded or quantised."""
        quantization = torchao()
        loaded = self.source.load(dtype, device)
        try:
            quantization.quantize_(loaded.model, getattr(quantization, KINDS[self.kind])())
        except (ImportError, AssertionError) as error:  # int4 needs mslk
            raise SetupError(f"torchao cannot quantise {self.source.name} to {self.kind}: {error}") from None
        return loaded


def torchao():
    """torchao's module of that name; raises SetupError where it is not installed."""
    try:
        import torchao.quantization
    except ImportError as error:
        raise SetupError(f"--quantize needs torchao (pip install -e '.[quantize]'): {error}") from None
    return torchao.quantization


_COPIES = 10
_CUDA_NBYTES, _CPU_NBYTES = 2**30, 2**28


def weight_nbytes(model) -> int:
    """Bytes of weights that a step reads, as they are stored: quantised or not.

    A table that is input and output embedding in one counts once.
    """
    table = model.get_input_embeddings().weight
    tied = table is model.get_output_embeddings().weight
    total = sum(map(stored_nbytes, model.parameters()))
    return total if tied else total - stored_nbytes(table)


@torch.inference_mode()
def kv_token_nbytes(model) -> int:
    """Bytes of the keys and values of one token in all layers, as the model hands them to a cache.

    Configurations do not say: Falcon stores its shared heads once or repeated, by version.
    """
    with Dense(model, MethodSettings(0, 1)) as method:
        method.reset()
        method.prefill(torch.zeros(1, 1, dtype=torch.int64, device=model.get_input_embeddings().weight.device))
        return method.kv_bytes_per_token


def step_nbytes(weights: int, token: int, cache_size: int, batch_size: int) -> int:
    """Bytes that a step reads: weights, and the keys and values of a full cache and the new token.

    Args:
        weights, token: bytes, see :func:`weight_nbytes` and :func:`kv_token_nbytes`.
    """
    return weights + batch_size * (cache_size + 1) * token


def copy_bytes_per_sec(device: torch.device, repeats: int = 5) -> float:
    """Bytes read and written per second by a large copy within the device's memory; the median of `repeats`."""
    nbytes = _CUDA_NBYTES if device.type == "cuda" else _CPU_NBYTES
    source = torch.ones(nbytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times = [seconds(lambda: [target.copy_(source) for _ in range(_COPIES)], device) for _ in range(repeats)]
    return 2 * nbytes * _COPIES / statistics.median(times)


def _status_and_reason(error: Exception) -> tuple[str, str]:
    """Some errors say that a contender cannot run here."""
    return ("skipped", str(error)) if isinstance(error, ValueError | ImportError) else ("failed", describe(error))


@dataclass
class DecodeBenchmark:
    """Runs a plan into a result file.

    `deadline`: `time.monotonic()` after which no run starts; None: all of them do.
    """

    plan: Plan
    timing: Timing
    repeats: int
    sources: Sequence[ModelSource | QuantisedSource]
    machine: Machine
    file: ResultFile
    say: Callable[[str], None]
    deadline: float | None = None

    def left(self) -> list[tuple[int, Cell]]:
        """The runs (repeat, cell) that are not finished, in order."""
        groups = [group for source in self.sources for group in self.plan.groups(source.name)]
        return [(r, c) for group in groups for r, c in in_turns(group, self.repeats) if not self.file.has(c, r)]

    def run(self) -> int:
        """Run all models; how many runs there was no time for."""
        copy_speed, prefill_backend = None, "flash" if "flash" in self.plan.backends else self.plan.backends[0]
        for source in self.sources:
            todo = [(repeat, cell) for repeat, cell in self.left() if cell.model == source.name]
            if not todo or self._late():
                continue
            copy_speed = copy_speed or copy_bytes_per_sec(self.machine.device)
            loaded = source.load(self.machine.dtype, self.machine.device)
            self.file.models[source.name] = {
                "weights": source.weights,
                "fingerprint": source.fingerprint,
                "parameters": sum(p.numel() for p in loaded.model.parameters()),
                "weight_bytes_per_step": weight_nbytes(loaded.model),
                "kv_bytes_per_token": kv_token_nbytes(loaded.model),
            }
            bench = Bench(loaded, self.timing, prefill_backend)
            for repeat, cell in todo:
                if not self.file.has(cell, repeat) and not self._late():  # it may have failed by now
                    at_once = CONTENDERS[cell.contender].at_once
                    self._run_cell(bench, cell, self.repeats - repeat if at_once else 1, copy_speed)
            del bench, loaded
            free_memory()
        n_left = len(self.left())
        self.file.save(complete=not n_left)
        return n_left

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _run_cell(self, bench: Bench, cell: Cell, count: int, copy_speed: float) -> None:
        """Run one cell, and keep its runs or why there are none."""
        runs, reason = attempt(partial(bench.run, cell, count), _status_and_reason)
        if runs is None:
            self.file.fail(cell, *reason)
            self.say(f"{cell}: {': '.join(reason)}")
            return
        noted = self.file.models[cell.model]
        nbytes = (noted["weight_bytes_per_step"], noted["kv_bytes_per_token"])
        for run in runs:
            if cell.kind == DECODE:
                run["step_nbytes"] = step_nbytes(*nbytes, cell.cache_size, cell.batch_size)
                run["copy_bytes_per_sec"] = copy_speed
            self.file.add(cell, run)
            self.say(f"{cell}: {run[FIGURE[cell.kind]]:.3f} ms")
