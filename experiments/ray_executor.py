"""Cells on all GPUs of this machine or of a cluster, by Ray (https://ray.io): the optional extra `cluster`.

One worker (a Ray actor) for each GPU keeps the model that it loaded last, and takes cells of that model first. Tasks
carry their token ids, and outcomes come back whole: no file system has to be shared. A worker or node that dies takes
one cell with it, which is tried again elsewhere.
"""

import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from tqdm import tqdm

from experiments.config import ExperimentConfig, SetupError, first_line, unknown_name
from experiments.environment import ROOT, commit, sources_hash
from experiments.executors import CellQueue
from experiments.measuring import Bench, Outcome, outcome_of
from experiments.models import ModelSource
from experiments.plan import Facts, Task

_PACKAGES = ("experiments", "personal_adapters", "streaming_llm")
_KIND = "accelerator_type:"  # how Ray names the kind of a node's GPUs
_TICK_SEC = 1.0
_CONNECT_SEC = 10.0
_NOBODY_SEC = 60.0  # without any node that a cell fits on, after which the rest is given up


class Worker:
    """What an actor runs: a `Bench` that is made where it runs. Errors of the setup are values: they are expected."""

    def __init__(self, config: ExperimentConfig):
        self.config = config
        if config.device == "cpu":
            torch.set_num_threads(config.cpus_per_cell)

    def started(self) -> None:
        """Answers when the worker is there."""

    @cached_property
    def bench(self) -> Bench:
        return Bench(self.config)

    def open(self, source: ModelSource) -> Facts | SetupError:
        try:
            return self.bench.open(source)
        except SetupError as error:
            return error

    def measure(self, task: Task) -> Outcome:
        return outcome_of(lambda: self.bench.measure(task), task.cell)


class RayExecutor:
    """Runs cells side by side. Raises SetupError for what is wrong with its options or the cluster.

    ImportError where Ray is not installed.
    """

    models_at_once: int | None = None

    def __init__(self, config: ExperimentConfig):
        self.ray = connect(config.ray_address)
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        self.on_gpu = config.device != "cpu" and any(node.get("GPU") for node in nodes)
        try:
            self.share = share_of_a_cell(config, nodes, self.on_gpu)
        except SetupError:
            self.ray.shutdown()
            raise
        self.config = replace(config, device="cuda" if self.on_gpu else "cpu")
        self._starting: dict = {}  # of each reference to `Worker.started`: its worker
        self._idle: list = []  # workers without a cell
        self._busy: dict = {}  # of each reference to an outcome: its worker and task
        self._loaded: dict = {}  # by worker: the name of the model that it loaded last
        self._facts: dict[str, Facts | SetupError] = {}
        what = f"{self.share['num_gpus']:g} GPUs" if self.on_gpu else f"{config.cpus_per_cell} CPU cores"
        where = config.ray_address or "this machine"
        self.description = f"ray on {where}: {len(nodes)} nodes, {self._capacity()} workers with {what} each"

    def close(self) -> None:
        for worker in self._workers():
            self.ray.kill(worker)
        self.ray.shutdown()

    # --- workers ---------------------------------------------------------------------------------------------

    def _workers(self) -> list:
        return [*self._starting.values(), *self._idle, *(worker for worker, _ in self._busy.values())]

    def _capacity(self) -> int:
        """How many workers the nodes that are there now can hold."""
        gpus, cpus, kind = (self.share.get(name) for name in ("num_gpus", "num_cpus", "accelerator_type"))
        total = 0
        for node in (node["Resources"] for node in self.ray.nodes() if node["Alive"]):
            if kind is None or _KIND + kind in node:
                fits = [node.get("CPU", 0) // cpus, *([node.get("GPU", 0) // gpus] if gpus else [])]
                total += int(min(fits))
        return total

    def _grow(self, wanted: int) -> None:
        """Start workers, as many as there are tasks and place for; give up those for which there is none any more."""
        actor = self.ray.remote(Worker).options(max_restarts=0, max_task_retries=0, **self.share)
        missing = min(wanted, self._capacity()) - len(self._workers())
        for _ in range(missing):
            worker = actor.remote(self.config)
            self._starting[worker.started.remote()] = worker
        for ref in list(self._starting)[: max(0, -missing)]:
            self._drop(self._starting.pop(ref))

    def _drop(self, worker) -> None:
        self._loaded.pop(worker, None)
        self.ray.kill(worker)

    # --- calls -----------------------------------------------------------------------------------------------

    def _calls(self, name: str, take: Callable[[str | None], Any], left: Callable[[], int]) -> Iterator[tuple]:
        """Call a method of the workers with each argument there is: yields (argument, answer) as they come.

        `take` gives out the next of the `left` arguments, one of the model named if there is any. A call whose worker
        or node dies is made again elsewhere; when that has been enough, the answer is the reason, a string.
        """
        again: list = []
        attempts: dict[int, int] = {}
        last_seen = time.monotonic()  # when there was a node that a cell fits on
        while left() or again or self._busy:
            self._grow(left() + len(again) + len(self._busy))
            for worker in list(self._idle):
                argument = again.pop(0) if again else take(self._loaded.get(worker))
                if argument is None:
                    break
                self._idle.remove(worker)
                self._loaded[worker] = getattr(argument, "source", argument).name
                self._busy[getattr(worker, name).remote(argument)] = worker, argument
            for argument, answer in self._answers():
                if isinstance(answer, self.ray.exceptions.RayError):
                    tries = attempts[id(argument)] = attempts.get(id(argument), 0) + 1
                    if tries <= self.config.retries:
                        again.append(argument)
                        continue
                    answer = f"its worker died {tries} times: {first_line(answer)}"
                yield argument, answer
            if self._busy or self._capacity():
                last_seen = time.monotonic()
            elif time.monotonic() - last_seen > _NOBODY_SEC:
                while (argument := again.pop() if again else take(None)) is not None:
                    yield argument, "the Ray cluster has no node left that a cell fits on"

    def _answers(self) -> Iterator[tuple]:
        """What has come back since the last call, after at most a second: (argument, answer or Ray's error)."""
        if not (self._busy or self._starting):
            time.sleep(_TICK_SEC)
            return
        for ref in self.ray.wait([*self._busy, *self._starting], num_returns=1, timeout=_TICK_SEC)[0]:
            worker, argument = self._busy.pop(ref, None) or (self._starting.pop(ref), None)
            try:
                answer = self.ray.get(ref)
                self._idle.append(worker)
            except self.ray.exceptions.RayError as error:  # the worker or its node died
                self._drop(worker)
                answer = error
            if argument is not None:
                yield argument, answer

    def open(self, sources: Sequence[ModelSource]) -> list[Facts | SetupError]:
        waiting = list(sources)
        for source, answer in self._calls("open", lambda _: waiting.pop(0) if waiting else None, lambda: len(waiting)):
            if isinstance(answer, str):
                answer = SetupError(f"model {source.name!r}: {answer}")
            elif isinstance(answer, Facts) and answer.matters["sources"] != sources_hash():
                answer = SetupError(
                    "a node of the Ray cluster has other sources of this project: install the same there"
                )
            elif isinstance(answer, Facts):
                own = dict(zip(("commit", "dirty"), commit(), strict=True))
                answer = replace(answer, environment=answer.environment | own | {"launcher": "ray"})
            self._facts[source.name] = answer
        return [self._facts[source.name] for source in sources]

    def measure(self, queue: CellQueue) -> Iterator[Outcome]:
        visible = self.config.progress and sys.stderr.isatty()
        with tqdm(desc="cells", total=len(queue), unit="cell", disable=not visible) as bar:
            for task, answer in self._calls("measure", queue.next, lambda: len(queue)):
                yield Outcome(task.cell, reason=answer) if isinstance(answer, str) else self._of_one_kind(answer)
                bar.update()
                bar.set_postfix_str(f"{len(self._busy)} running, {queue.progress()}")

    def _of_one_kind(self, outcome: Outcome) -> Outcome:
        """The outcome, if it was measured under the conditions of the others; figures of two cards never meet."""
        expected = self._facts[outcome.cell.model].matters
        if outcome.found is None or outcome.matters == expected:
            return outcome
        differing = "; ".join(
            f"{key} {outcome.matters[key]} where it ran, {expected[key]} for the others"
            for key in expected
            if outcome.matters[key] != expected[key]
        )
        return Outcome(outcome.cell, reason=f"{differing}: see --gpu-type")


def connect(address: str | None):
    """The module `ray`, connected to a cluster, or to a Ray that it starts on this machine; raises SetupError."""
    if address is None:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # read on import: listen on the loopback address alone
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    options = {"address": address or "local", "log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        known = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = str(ROOT) + (os.pathsep + known if known else "")  # workers inherit it
        options["include_dashboard"] = False
    else:
        _require_listener(address)
        options["runtime_env"] = {"py_modules": [str(ROOT / package) for package in _PACKAGES]}
    try:
        ray.init(**options)
    except Exception as error:  # nothing listens there, another version, no space: each has its own errors
        raise SetupError(f"--launcher ray: {address or 'Ray on this machine'}: {first_line(error)}") from None
    return ray


def _require_listener(address: str) -> None:
    """Raise SetupError where nothing listens: Ray itself waits for minutes, and then ends the process."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SEC).close()
    except (OSError, ValueError) as error:
        raise SetupError(f"--launcher ray: no cluster at --ray-address {address}, HOST:PORT ({error})") from None


def share_of_a_cell(config: ExperimentConfig, nodes: Iterable[dict], on_gpu: bool) -> dict:
    """The resources of one worker, as Ray's options; raises SetupError where they make no sense or are not there."""
    if config.device not in (None, "cpu", "cuda"):
        raise SetupError(f"--device {config.device}: Ray assigns the GPUs; name cuda or cpu, or nothing")
    if config.device == "cuda" and not on_gpu:
        raise SetupError("--device cuda: the Ray cluster has no GPU")
    gpus = (1 if config.gpus_per_cell is None else config.gpus_per_cell) if on_gpu else 0
    if not on_gpu and (config.gpus_per_cell or config.gpu_type):
        raise SetupError("--gpus-per-cell and --gpu-type: no cell runs on a GPU here")
    if on_gpu and (gpus <= 0 or (gpus > 1 and gpus != int(gpus))):
        raise SetupError(f"--gpus-per-cell must be a fraction of one GPU or a whole number of them, got {gpus:g}")
    if on_gpu and gpus < 1 and (config.scoring, config.decode_sample) != ("parallel", 0):
        raise SetupError(
            f"--gpus-per-cell {gpus:g}: cells that measure time have a GPU to themselves; "
            "those that do not: --scoring parallel --decode-sample 0"
        )
    if gpus > 1 and config.device_map is None:
        raise SetupError(
            f"--gpus-per-cell {gpus:g} needs --device-map auto: a model on one GPU leaves the others idle"
        )
    share = {"num_cpus": config.cpus_per_cell, "num_gpus": gpus}
    kinds = sorted(
        {name[len(_KIND) :] for node in nodes if node.get("GPU") for name in node if name.startswith(_KIND)}
    )
    if config.gpu_type is not None and config.gpu_type not in kinds:
        raise unknown_name("--gpu-type", config.gpu_type, kinds)
    if on_gpu and config.gpu_type is None and len(kinds) > 1:
        raise SetupError(f"the Ray cluster has GPUs of several kinds: choose one with --gpu-type ({', '.join(kinds)})")
    return share | ({"accelerator_type": config.gpu_type} if config.gpu_type else {})
