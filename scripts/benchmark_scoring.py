#!/usr/bin/env python
"""How fast streams are scored: block-parallel streaming attention against a plain dense forward over chunks.

Both go over the same tokens with the same model, engine, kernel, block length and loss, interleaved in one run. The
dense forward sees each chunk by itself, so it is no alternative, but the speed that the model allows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from model_setup import keep_result, wrap_loaded
from torch import Tensor

from experiments.cli import OneLineParser, add_dtype_and_device, guarded
from experiments.config import ExperimentConfig, SetupError, at_least
from experiments.device import synchronise
from experiments.environment import device_name
from experiments.models import find_model
from experiments.session import resolve_machine
from experiments.storage import check_writable
from streaming_llm import resolve_block_engine, score_stream
from streaming_llm.attachment import maskless_attention
from streaming_llm.engines.blocks import BLOCK_ENGINES
from streaming_llm.families import text_config
from streaming_llm.fused import fused_blocks
from streaming_llm.losses import token_nll

EPILOG = """examples:
  python scripts/benchmark_scoring.py --attn-backend-list math flash --tokens 20000 --block-size 4096
  python scripts/benchmark_scoring.py --model random:pythia-70m random:pythia-2.8b --attn-backend-list flash cudnn \\
      --output results/scoring.json"""


def dense_forward(model, engine: str) -> Callable[[Tensor], Tensor]:
    """Ids ``[1, length]`` -> final hidden states ``[1, length, hidden]``, as the engine computes them."""
    if engine == "fused":
        return fused_blocks(model)
    return lambda ids: model.base_model(input_ids=ids, use_cache=False).last_hidden_state


@torch.no_grad()
def score_dense_chunks(model, ids: Tensor, block_size: int, engine: str) -> None:
    """The dense forward over chunks ``[1, block_size]``, with the loss that scoring uses."""
    forward = dense_forward(model, engine)
    with maskless_attention(model):
        for chunk in ids.split(block_size, dim=1):
            if chunk.shape[1] < 2:  # one token that nothing predicts
                break
            block = chunk.to(model.device)
            hidden = forward(block)
            token_nll(model, hidden[:, :-1], block[:, 1:])


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of a call, the device's work included."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def peak_memory_mb(call: Callable[[], object], device: torch.device) -> float | None:
    """What PyTorch had given out at most during a call, weights included; ``None`` off CUDA."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) / 1e6


def measure(model, options: argparse.Namespace, engine: str) -> dict:
    """Tokens per second of both, medians of interleaved repeats, for one model."""
    device, vocab = model.device, text_config(model.config).vocab_size
    lengths = {options.tokens, *options.peak_tokens}
    ids = torch.randint(vocab, (1, max(lengths)), generator=torch.Generator().manual_seed(options.seed))
    size = options.block_size

    def streaming(tokens: int = options.tokens) -> None:
        sizes = (options.n_sink, options.window_size, size)
        score_stream(model, ids[:, :tokens], *sizes, engine=engine, on_block=lambda *_: None)

    timed = ids[:, : options.tokens]
    calls = {"streaming": streaming, "dense_chunks": lambda: score_dense_chunks(model, timed, size, engine)}
    peaks = {str(n): peak_memory_mb(lambda n=n: streaming(n), device) for n in sorted(lengths)}
    for call in calls.values():
        call()
    runs: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.repeats):
        for name, call in calls.items():
            runs[name].append(options.tokens / seconds(call, device))
    medians = {name: statistics.median(values) for name, values in runs.items()}
    return {
        "engine": engine,
        "toks_per_sec": medians,
        "streaming_to_dense": medians["streaming"] / medians["dense_chunks"],
        "runs_toks_per_sec": runs,
        "peak_memory_mb": peaks,
    }


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="benchmark_scoring.py",
        description=__doc__.split("\n\n")[0],
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", nargs="+", default=["demo"], metavar="NAME", help="demo (the default), a hub name, random:<size>"
    )
    parser.add_argument(
        "--attn-backend-list",
        nargs="+",
        default=None,
        metavar="NAME",
        help="math, flash, cudnn, auto; default: what FLASH_SDPA says, else math",
    )
    parser.add_argument(
        "--engine", default="auto", choices=("auto", *BLOCK_ENGINES), help="default: auto, fused where it runs"
    )
    sizes = parser.add_argument_group("sizes, in tokens")
    for name, value, meaning in (
        ("--n-sink", 4, "sinks"),
        ("--window-size", 2048, "recent tokens"),
        ("--block-size", 16384, "of a block and of a chunk"),
        ("--tokens", 131_072, "scored in a run"),
    ):
        sizes.add_argument(name, type=int, default=value, metavar="N", help=f"{meaning}; default: {value}")
    sizes.add_argument(
        "--peak-tokens", type=int, nargs="+", default=[], metavar="N", help="further lengths to measure the memory at"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="interleaved runs; default: 3")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and tokens; default: 0")
    add_dtype_and_device(parser.add_argument_group("where it is computed"))
    parser.add_argument("--output", type=Path, default=None, metavar="FILE.json", help="the result, if kept")
    return parser


def run(argv: list[str]) -> int:
    options = build_parser().parse_args(argv)
    for name, low in (
        ("n_sink", 0),
        ("window_size", 1),
        ("block_size", 2),
        ("tokens", 2),
        ("repeats", 1),
        ("seed", 0),
    ):
        at_least(f"--{name.replace('_', '-')}", getattr(options, name), low)
    for length in options.peak_tokens:
        at_least("--peak-tokens", length, 2)
    machine = resolve_machine(
        ExperimentConfig(device=options.device, dtype=options.dtype, attn_backend_list=options.attn_backend_list)
    )
    sources = [find_model(name, options.seed) for name in dict.fromkeys(options.model)]
    if options.output is not None:
        check_writable(options.output.parent, 1 << 20)
    models, failed = {}, []
    result = {
        "benchmark": "scoring",
        "dtype": machine.dtype_name,
        "device": device_name(machine.device),
        **{name: getattr(options, name) for name in ("n_sink", "window_size", "block_size", "tokens")},
        "models": models,
    }
    for source in sources:
        loaded, backends = source.load(machine.dtype, machine.device), {}
        models[source.name] = {"weights": source.weights, "backends": backends}
        for backend in machine.backends:
            what = f"{source.name} ({source.weights} weights), {backend}"
            try:
                wrap_loaded(loaded, source, machine, backend)
                engine = resolve_block_engine(loaded.model, options.engine)
                backends[backend] = {"status": "ok"} | measure(loaded.model, options, engine)
                print(f"{what}: {line(backends[backend])}", flush=True)
            except (SetupError, ValueError, RuntimeError) as error:  # out of memory among them
                reason = (str(error) or type(error).__name__).splitlines()[0]
                backends[backend] = {"status": "failed", "reason": reason}
                failed.append(what)
                print(f"{what}: failed: {reason}", file=sys.stderr, flush=True)
            keep_result(options.output, result, machine, "benchmark_scoring.py", argv, options.seed)
        del loaded
    return 1 if failed else 0


def line(figures: dict) -> str:
    """The figures of a model and a backend, for the eye."""
    speed, peaks = figures["toks_per_sec"], figures["peak_memory_mb"]
    return (
        f"streaming {speed['streaming']:,.0f} tokens/s, dense chunks {speed['dense_chunks']:,.0f}, ratio "
        f"{figures['streaming_to_dense']:.2f}, peak MB by tokens {peaks}"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    return guarded(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    raise SystemExit(main())
