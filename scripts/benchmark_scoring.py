#!/usr/bin/env python
"""How fast streams are scored: block-parallel streaming attention against a plain dense forward over chunks.

Both go over the same tokens with the same model, engine, kernel, block length and loss, interleaved in one run. The
dense forward sees each chunk by itself, so it is no alternative, but the speed that the model allows.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # perhaps in a checkout that is not installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from experiments.cli import MODEL, OneLineParser, add_options, config_from, guarded
from experiments.config import SetupError, at_least, first_line
from experiments.costs import seconds
from experiments.environment import device_name
from experiments.measuring import resolve_machine
from experiments.model_setup import keep_result
from experiments.models import LoadedModel, find_model
from experiments.storage import check_writable
from streaming_llm import resolve_block_engine, score_stream
from streaming_llm.attachment import maskless_attention
from streaming_llm.fused import fused_blocks
from streaming_llm.losses import token_nll

EPILOG = """examples:
  python scripts/benchmark_scoring.py --attn-backend-list math flash --tokens 20000 --block-size 4096
  python scripts/benchmark_scoring.py --model random:pythia-70m random:pythia-2.8b --attn-backend-list flash cudnn \\
      --output results/scoring.json"""


@torch.no_grad()
def score_dense_chunks(loaded: LoadedModel, ids: Tensor, block_size: int, engine: str) -> None:
    """The dense forward over chunks [1, block_size], with the loss that scoring uses, by the kernels of `engine`."""
    model = loaded.model
    fused = None if engine == "eager" else fused_blocks(model, own_attention=engine == "fused-triton")
    for chunk in (part.to(loaded.device) for part in ids.split(block_size, dim=1)):
        if chunk.shape[1] > 1:  # nothing predicts one token
            with maskless_attention(model):
                hidden = fused(chunk) if fused else model.base_model(chunk, use_cache=False).last_hidden_state
                token_nll(model, hidden[:, :-1], chunk[:, 1:])


def peak_memory_mb(call: Callable[[], object], device: torch.device) -> float | None:
    """What PyTorch had given out at most during a call, weights included; None off CUDA."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) / 1e6


def measure(loaded: LoadedModel, options: argparse.Namespace, engine: str) -> dict:
    """Tokens per second of both, medians of interleaved repeats, for one model."""
    lengths = {options.tokens, *options.peak_tokens}
    generator = torch.Generator().manual_seed(options.seed)
    ids = torch.randint(loaded.vocab_size, (1, max(lengths)), generator=generator)
    sizes = (options.n_sink, options.window_size, options.block_size)

    def streaming(tokens: int = options.tokens) -> None:
        score_stream(loaded.model, ids[:, :tokens], *sizes, engine=engine, on_block=lambda *_: None)

    def dense() -> None:
        score_dense_chunks(loaded, ids[:, : options.tokens], options.block_size, engine)

    calls = {"streaming": streaming, "dense_chunks": dense}
    peaks = {str(n): peak_memory_mb(lambda n=n: streaming(n), loaded.device) for n in sorted(lengths)}
    for call in calls.values():
        call()
    runs: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.repeats):
        for name, call in calls.items():
            runs[name].append(options.tokens / seconds(call, loaded.device))
    medians = {name: statistics.median(values) for name, values in runs.items()}
    return {
        "engine": engine,
        "toks_per_sec": medians,
        "streaming_to_dense": medians["streaming"] / medians["dense_chunks"],
        "runs_toks_per_sec": runs,
        "peak_memory_mb": peaks,
    }


def build_parser() -> OneLineParser:
    """The command line."""
    parser = OneLineParser("benchmark_scoring.py", __doc__.split("\n\n")[0], EPILOG)
    add = add_options(parser, "what is measured", (*MODEL, "attn_backend_list")).add_argument
    engines = "auto (default), eager, fused, or fused-triton, with its own attention kernel in place of the backends"
    choices = ("auto", "eager", "fused", "fused-triton")
    add("--engine", dest="block_engine", default="auto", choices=choices, help=engines)
    defaults = {"n_sink": {"default": 4}, "window_size": {"default": 2048, "help": "recent tokens; default: 2048"}}
    add = add_options(parser, "sizes, in tokens", ("n_sink", "window_size"), **defaults).add_argument
    add("--block-size", type=int, default=16384, metavar="N", help="of a block and of a chunk; default: 16384")
    add("--tokens", type=int, default=131_072, metavar="N", help="scored in a run; default: 131072")
    add("--peak-tokens", type=int, nargs="+", default=[], metavar="N", help="further lengths to measure the memory at")
    add("--repeats", type=int, default=3, metavar="N", help="interleaved runs; default: 3")
    add("--output", type=Path, metavar="FILE.json", help="the result, if kept")
    return parser


def run(argv: list[str]) -> int:
    options = build_parser().parse_args(argv)
    for name in ("block_size", "tokens"):
        at_least(f"--{name.replace('_', '-')}", getattr(options, name), 2)
    for length in options.peak_tokens:
        at_least("--peak-tokens", length, 2)
    config = config_from(options)
    machine = resolve_machine(config)
    sources = [find_model(name, config.seed) for name in config.model]
    check_writable(options.output and options.output.parent, 1 << 20)
    models, failed = {}, []
    result = {
        "benchmark": "scoring",
        "dtype": machine.dtype_name,
        "device": device_name(machine.device),
        **{name: getattr(options, name) for name in ("n_sink", "window_size", "block_size", "tokens")},
        "models": models,
    }
    own = options.block_engine == "fused-triton"
    names = ("triton",) if own else machine.backends
    for source in sources:
        loaded, backends = source.load(machine.dtype, machine.device), {}
        models[source.name] = {"weights": source.weights, "backends": backends}
        for backend in names:
            what = f"{source.name} ({source.weights} weights), {backend}"
            try:
                if not own:
                    machine.wrap(loaded, backend)
                engine = resolve_block_engine(loaded.model, options.block_engine)
                if own and engine != options.block_engine:
                    raise SetupError("its dtype or heads are none that the kernel of fused-triton takes")
                backends[backend] = {"status": "ok"} | measure(loaded, options, engine)
                speed, peaks = (backends[backend][name] for name in ("toks_per_sec", "peak_memory_mb"))
                ratio = f"ratio {backends[backend]['streaming_to_dense']:.2f}, peak MB by tokens {peaks}"
                speeds = f"streaming {speed['streaming']:,.0f} tokens/s, dense chunks {speed['dense_chunks']:,.0f}"
                print(f"{what}: {speeds}, {ratio}", flush=True)
            except (SetupError, ValueError, RuntimeError) as error:  # out of memory among them
                reason = first_line(error)
                backends[backend] = {"status": "failed", "reason": reason}
                failed.append(what)
                print(f"{what}: failed: {reason}", file=sys.stderr, flush=True)
            keep_result(options.output, result, machine, "benchmark_scoring.py", argv, config.seed)
        del loaded
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    return guarded(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    raise SystemExit(main())
