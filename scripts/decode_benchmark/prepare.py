"""From a command line to a benchmark that can run: everything is checked first."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

from decode_benchmark.contenders import CONTENDERS
from decode_benchmark.measuring import Timing
from decode_benchmark.plan import Plan
from decode_benchmark.results import ResultFile
from decode_benchmark.runner import DecodeBenchmark, Job, PeerRun, default_contenders
from experiments.config import DEMO_MODEL, ExperimentConfig, SetupError
from experiments.models import find_model
from experiments.session import resolve_machine
from experiments.storage import check_writable
from personal_adapters.sdpa import ATTN_BACKENDS, check_backend_available

_NBYTES_NEEDED = 2**20


def prepare(arguments: argparse.Namespace, command: str, start: float, say: Callable[[str], None]) -> DecodeBenchmark:
    """The benchmark that a command line asks for; raises SetupError for what is wrong before computing.

    `start`: `time.monotonic()` when the program began.
    """
    machine = resolve_machine(
        ExperimentConfig(device=arguments.device, dtype=arguments.dtype, attn_backend_list=arguments.backends)
    )
    backends = machine.backends
    if arguments.backends is None:
        runs = partial(check_backend_available, dtype=machine.dtype, device=machine.device)
        backends = tuple(name for name in ATTN_BACKENDS if runs(name))
    sources = [find_model(name, arguments.seed) for name in dict.fromkeys(arguments.model)]
    only_demo = all(source.name == DEMO_MODEL for source in sources)
    names = arguments.contenders or default_contenders(arguments.peer_python is not None)
    plan = Plan(
        cache_sizes=tuple(arguments.cache_sizes or ([256] if only_demo else [2048])),
        prefill_lengths=tuple(arguments.prefill_lengths),
        batch_sizes=tuple(arguments.batch_sizes),
        contenders=tuple(name for name in CONTENDERS if name in names),
        backends=backends,
        n_sink=arguments.n_sink,
    )
    timing = Timing(arguments.steps, arguments.warmup_steps, arguments.max_run_seconds, arguments.seed)
    if arguments.output is not None:
        check_writable(arguments.output.parent, _NBYTES_NEEDED)
    file = ResultFile(arguments.output, machine.device, machine.dtype_name, timing, command)
    resumed = file.resume()
    if resumed:
        say(resumed)
    say(f"device {machine.device}, {machine.dtype_name}, attention backends: {', '.join(backends)}")
    job = Job(
        plan=plan,
        timing=timing,
        repeats=arguments.repeats,
        sources=tuple(sources),
        dtype=machine.dtype,
        device=machine.device,
        overhead_rounds=arguments.overhead_rounds,
        deadline=None if arguments.max_seconds is None else start + arguments.max_seconds,
        peer=_peer(arguments, machine.dtype_name, timing),
    )
    return DecodeBenchmark(job, file, say)


def _peer(arguments: argparse.Namespace, dtype_name: str, timing: Timing) -> PeerRun | None:
    if arguments.peer_python is None:
        return None
    if not arguments.peer_python.exists():
        raise SetupError(f"--peer-python {arguments.peer_python}: there is no such file")
    from decode_benchmark.peer import run_peer

    return partial(run_peer, arguments.peer_python, dtype_name, timing)
