#!/usr/bin/env python
"""How long a decoded token takes, and how far that is from what memory allows: all contenders side by side.

python scripts/benchmark_decode.py --output results/decode.json --figures figures/decode
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # perhaps in a checkout that is not installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments.benchmarks.contenders import CONTENDERS
from experiments.cli import GOES_ON, OneLineParser, add_options, config_from, guarded
from experiments.config import DEMO_MODEL, SetupError, at_least, unknown_name
from experiments.storage import check_writable, read_json

EPILOG = """examples:
  the bundled demo model, whatever runs on this machine:
    python scripts/benchmark_decode.py --output results/decode.json --figures figures/decode
  sizes and kernels on a GPU, in parts of nine minutes (the same command goes on where it stopped):
    python scripts/benchmark_decode.py --model random:pythia-70m random:pythia-2.8b random:pythia-6.9b \\
        --backends math flash cudnn --cache-sizes 2048 4096 --max-seconds 540 --output decode.json
  one figure from several files:
    python scripts/benchmark_decode.py --plot-only decode.json more.json --figures figures/decode

Every contender runs the same loop on the same seeded random tokens: a prompt of the cache's size, steps that warm up,
then the steps that are timed. Repeats are interleaved (but for graph+compile, which would compile anew); figures are
medians, and the raw runs are kept. The logits of the StreamingLLM contenders are compared with those of the eager
decoder with math before anything is timed.

exit codes: 0 all is well (what cannot run here is named and skipped); 1 a contender failed; 2 something is wrong that
was found before computing; 130 interrupted."""


def build_parser() -> OneLineParser:
    """The command line."""
    parser = OneLineParser("benchmark_decode.py", __doc__.splitlines()[0], EPILOG)
    backends = {
        "flags": ("--backends", "--attn-backend-list"),
        "help": "math, flash, cudnn; default: all that run here",
    }
    subject = ("model", "attn_backend_list", "dtype", "device", "seed")
    add = add_options(parser, "what is compared", subject, attn_backend_list=backends).add_argument
    packed = "quantise the models' weights with torchao; results say so after the model's name"
    add("--quantize", choices=("int8", "int4"), help=packed)
    add("--contenders", nargs="+", metavar="NAME", help=f"{', '.join(CONTENDERS)}; default: all")
    add = add_options(parser, "sizes, in tokens", ("n_sink",), n_sink={"default": 4}).add_argument
    numbers = {"type": int, "metavar": "N"}
    sizes = "sinks and window together; default: 256 for the demo model alone, else 2048"
    add("--cache-sizes", nargs="+", help=sizes, **numbers)
    add("--batch-sizes", nargs="+", default=[1], help="default: 1", **numbers)
    prompts = "also time prompts of these lengths (with the first cache size)"
    add("--prefill-lengths", nargs="+", default=[], help=prompts, **numbers)
    add = parser.add_argument_group("how it is measured").add_argument
    add("--steps", default=100, help="steps of a run; default: 100", **numbers)
    add("--warmup-steps", default=8, help="before them; default: 8", **numbers)
    add("--repeats", default=3, help="interleaved runs; default: 3", **numbers)
    seconds = {"type": float, "metavar": "SEC"}
    add("--max-run-seconds", default=5.0, help="fewer steps in a run that would take longer; default: 5", **seconds)
    add("--max-seconds", help="start no run after so many seconds; the same command goes on from there", **seconds)
    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, metavar="FILE", help="the JSON file to write or go on with")
    add("--figures", type=Path, metavar="DIR", help="draw figures into this folder")
    add("--format", nargs="+", choices=("png", "pdf", "svg"), default=["png"], help="default: png")
    add("--plot-only", type=Path, nargs="+", metavar="FILE", help="measure nothing, draw these files")
    return parser


def check(options: argparse.Namespace) -> None:
    """Raise SetupError for numbers and names that cannot be."""
    lows = {"n_sink": 0, "steps": 1, "warmup_steps": 4, "repeats": 1, "seed": 0}
    lows |= {"cache_sizes": options.n_sink + 1, "batch_sizes": 1, "prefill_lengths": 2}
    for name, low in lows.items():
        given = getattr(options, name)
        for value in given if isinstance(given, list) else [given]:
            at_least(f"--{name.replace('_', '-')}", value, low)
    for name in options.contenders or ():
        if name not in CONTENDERS:
            raise unknown_name("contender", name, CONTENDERS)
    if options.plot_only and options.figures is None:
        raise SetupError("--plot-only needs --figures, the folder to draw into")


def prepare(options: argparse.Namespace, command: str, start: float):
    """The benchmark that a command line asks for; raises SetupError for what is wrong before computing.

    `start`: `time.monotonic()` when the program began.
    """
    from experiments.benchmarks.decode import Plan, Timing  # here: they import torch, which drawing does not need
    from experiments.benchmarks.rows import ResultFile
    from experiments.benchmarks.runner import DecodeBenchmark, QuantisedSource, torchao
    from experiments.measuring import resolve_machine
    from experiments.models import find_model
    from personal_adapters.sdpa import ATTN_BACKENDS, check_backend_available

    config = config_from(options)
    machine = resolve_machine(config)
    backends = machine.backends
    if config.attn_backend_list is None:
        backends = tuple(n for n in ATTN_BACKENDS if check_backend_available(n, machine.dtype, machine.device))
    sources = [find_model(name, config.seed) for name in config.model]
    only_demo = all(source.name == DEMO_MODEL for source in sources)
    if options.quantize is not None:
        torchao()
        sources = [QuantisedSource(source, options.quantize) for source in sources]
    plan = Plan(
        cache_sizes=tuple(options.cache_sizes or ([256] if only_demo else [2048])),
        prefill_lengths=tuple(options.prefill_lengths),
        batch_sizes=tuple(options.batch_sizes),
        contenders=tuple(name for name in CONTENDERS if name in (options.contenders or CONTENDERS)),
        backends=backends,
        n_sink=options.n_sink,
    )
    timing = Timing(options.steps, options.warmup_steps, options.max_run_seconds, config.seed)
    check_writable(options.output and options.output.parent, 1 << 20)
    file = ResultFile(options.output, machine, timing, command)
    if resumed := file.resume():
        print(resumed)
    print(f"device {machine.device}, {machine.dtype_name}, attention backends: {', '.join(backends)}")
    deadline = None if options.max_seconds is None else start + options.max_seconds
    return DecodeBenchmark(plan, timing, options.repeats, sources, machine, file, print, deadline)


def run(options: argparse.Namespace, command: str) -> int:
    """What the command line says; returns its exit code."""
    check(options)
    if options.plot_only:  # needs no torch
        return draw(options, [read_result(path) for path in options.plot_only])
    start = time.monotonic()
    benchmark = prepare(options, command, start)
    try:
        n_left = benchmark.run()
    except KeyboardInterrupt:
        print("interrupted: what is finished is kept, the same command goes on from there", file=sys.stderr)
        raise
    if n_left:
        print(f"stopped after {time.monotonic() - start:.0f} s: {n_left} runs left; the same command goes on")
    print(benchmark.file.table())
    if options.figures is not None:
        draw(options, [benchmark.file.contents(complete=not n_left)])
    for failure in benchmark.file.failures:
        print(f"FAILED: {failure}")
    return 1 if benchmark.file.failures else 0


def read_result(path: Path) -> dict:
    """A result of this program; raises SetupError where it is none."""
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise SetupError(f"--plot-only {path}: {error}") from None
    if value.get("benchmark") != "decode":
        raise SetupError(f"--plot-only {path}: not a result of this program")
    return value


def draw(options: argparse.Namespace, results: list[dict]) -> int:
    """Draw results and say which files that gave."""
    from experiments.plotting.decode_benchmark import figures
    from experiments.plotting.page import save

    for name, figure in figures(results).items():
        print(*save(figure, name, options.figures, options.format), sep="\n")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    options = build_parser().parse_args(argv)
    return guarded(lambda: run(options, shlex.join(["python", "scripts/benchmark_decode.py", *argv])), later=GOES_ON)


if __name__ == "__main__":
    raise SystemExit(main())
