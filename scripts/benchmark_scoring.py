#!/usr/bin/env python
"""How fast streams are scored: block-parallel streaming attention against a plain dense forward over chunks.

Both go over the same tokens with the same model, engine, kernel, block length and loss, interleaved in one run. The
dense forward sees each chunk by itself, so it is no alternative, but the speed that the model allows.

    python scripts/benchmark_scoring.py --model random:pythia-70m random:pythia-2.8b --attn-backend flash
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from experiments.config import SetupError
from experiments.device import synchronise
from experiments.environment import device_name, environment
from experiments.models import find_model
from experiments.storage import write_json
from personal_adapters.neox_flash import wrap_attention
from personal_adapters.sdpa import resolve_attn_backend, select_dtype
from streaming_llm import StreamingConfig, score_stream
from streaming_llm.attention import maskless_attention
from streaming_llm.blockwise import token_nll
from streaming_llm.families import rotary_from_model, text_config
from streaming_llm.forwards import resolve_block_engine
from streaming_llm.fused import require_fused


def dense_forward(model, engine: str) -> Callable[[Tensor], Tensor]:
    """Ids ``[1, length]`` -> final hidden states ``[1, length, hidden]``, as the engine computes them."""
    if engine == "fused":
        return require_fused(model).BlockForward(model, rotary_from_model(model))
    return lambda ids: model.base_model(input_ids=ids, use_cache=False).last_hidden_state


@torch.no_grad()
def score_dense_chunks(model, ids: Tensor, block_size: int, engine: str) -> None:
    """The dense forward over chunks ``[1, block_size]``, with the loss that scoring uses."""
    forward = dense_forward(model, engine)
    with maskless_attention(model):
        for chunk in ids.split(block_size, dim=1):
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


def measure(model, arguments: argparse.Namespace, stream: StreamingConfig) -> dict:
    """Tokens per second of both, medians of interleaved repeats, for one model."""
    device, vocab = model.device, text_config(model.config).vocab_size
    longest = max(arguments.tokens, *arguments.peak_tokens)
    ids = torch.randint(vocab, (1, longest), generator=torch.Generator().manual_seed(arguments.seed))
    size, engine = arguments.block_size, resolve_block_engine(model, arguments.engine)

    def streaming(tokens: int = arguments.tokens) -> None:
        sizes = (stream.n_sink, stream.window_size, size)
        score_stream(model, ids[:, :tokens], *sizes, engine=engine, on_block=lambda *_: None)

    timed = ids[:, : arguments.tokens]
    calls = {"streaming": streaming, "dense_chunks": lambda: score_dense_chunks(model, timed, size, engine)}
    for call in calls.values():
        call()
    runs: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(arguments.repeats):
        for name, call in calls.items():
            runs[name].append(arguments.tokens / seconds(call, device))
    medians = {name: statistics.median(values) for name, values in runs.items()}
    return {
        "engine": engine,
        "toks_per_sec": medians,
        "streaming_to_dense": medians["streaming"] / medians["dense_chunks"],
        "runs_toks_per_sec": runs,
        "peak_memory_mb": {
            str(tokens): peak_memory_mb(lambda tokens=tokens: streaming(tokens), device)
            for tokens in arguments.peak_tokens
        },
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["demo"], help="as in run_final_experiments.py")
    parser.add_argument("--attn-backend", default=None, help="math, flash or auto (default: FLASH_SDPA, then math)")
    parser.add_argument("--engine", default="auto", help="eager, fused or auto (default: fused where it runs)")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--n-sink", type=int, default=4)
    parser.add_argument("--window-size", type=int, default=2048)
    parser.add_argument("--block-size", type=int, default=16384, help="tokens in a block and in a chunk")
    parser.add_argument("--tokens", type=int, default=131_072)
    peak_help = "lengths of stream to measure peak memory at"
    parser.add_argument("--peak-tokens", type=int, nargs="+", default=[100_000, 200_000], help=peak_help)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = getattr(torch, arguments.dtype) if arguments.dtype else select_dtype(device)
        backend = resolve_attn_backend(arguments.attn_backend, device=device, dtype=dtype)
        stream = StreamingConfig(arguments.n_sink, arguments.window_size)
        sources = [find_model(name, arguments.seed) for name in arguments.model]
    except (SetupError, ValueError, AttributeError) as error:
        print(f"benchmark_scoring.py: {error}", file=sys.stderr)
        return 2
    result = {
        "benchmark": "scoring",
        "backend": backend,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_name(device),
        "n_sink": stream.n_sink,
        "window_size": stream.window_size,
        "block_size": arguments.block_size,
        "tokens": arguments.tokens,
        "environment": environment(device, " ".join(["python", *sys.argv]), arguments.seed, kvpress_imported=False),
        "models": {},
    }
    for source in sources:
        try:
            model = source.load(dtype, device).model
            wrap_attention(model, backend)
            figures = measure(model, arguments, stream)
        except (SetupError, ValueError) as error:
            print(f"benchmark_scoring.py: {source.name}: {error}", file=sys.stderr)
            return 2
        result["models"][source.name] = {"weights": source.weights, **figures}
        speed, peak = figures["toks_per_sec"], figures["peak_memory_mb"]
        print(
            f"{source.name} ({source.weights} weights): streaming {speed['streaming']:,.0f} tokens/s, dense chunks "
            f"{speed['dense_chunks']:,.0f}, ratio {figures['streaming_to_dense']:.2f}, peak MB by tokens {peak}",
            flush=True,
        )
        del model
        if arguments.output:
            write_json(arguments.output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
