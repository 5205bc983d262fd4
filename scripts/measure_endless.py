"""Endless generation, measured: memory while it runs, and whether the text at the end is as good as at the beginning.

Generates text with the model's own probabilities, then scores it by the same model in block-parallel form. Perplexity
and distinct 4-grams of the last tenth stand beside those of the first.

    python scripts/measure_endless.py --output results/cpu/endless.json
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from long_scoring.tokens import put_in_front
from model_setup import load_wrapped
from streaming_chat.token_stream import Sampler, SamplingSettings, TokenStream
from tqdm import tqdm

from experiments.cli import OneLineParser, add_cache_sizes, add_dtype_and_device, guarded
from experiments.config import ExperimentConfig, ModelSettings, SetupError, at_least, settings_for
from experiments.environment import device_name, environment
from experiments.models import LoadedModel, find_model
from experiments.results import now
from experiments.session import Machine, resolve_machine
from experiments.storage import write_json
from streaming_llm import StreamingDecoder, score_stream

WARM_UP = 1000
"""Tokens after which nothing is allocated any more."""


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    answer = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True)
    return int(answer.stdout) * 1024


def memory_bytes(device: torch.device) -> int:
    """What grows if anything does: on CUDA PyTorch's allocations, else the process's resident size."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


def generate(stream: TokenStream, n: int, device: torch.device) -> tuple[np.ndarray, list[dict]]:
    """Draw ``n`` tokens.

    Returns:
        Their ids ``[n]``, and, a hundred times and after the warm-up, ``tokens``, ``memory_bytes`` and ``sec`` so far.
    """
    ids, samples = np.full(n, -1, dtype=np.int32), []
    points = {WARM_UP, *range(max(1, n // 100), n + 1, max(1, n // 100)), n}
    begin = time.perf_counter()
    with tqdm(total=n, unit=" tokens", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        for number, token in enumerate(stream.tokens(), start=1):
            ids[number - 1] = token
            if number in points:
                sample = {"tokens": number, "memory_bytes": memory_bytes(device)}
                samples.append(sample | {"sec": time.perf_counter() - begin})
                bar.update(number - bar.n)
            if number == n:
                return ids, samples
    raise AssertionError("tokens have no end")


def quality(nll: np.ndarray, ids: np.ndarray) -> dict:
    """Perplexity and distinct 4-grams of a stretch: losses ``[n]`` and ids ``[n]``."""
    grams = {tuple(row) for row in np.lib.stride_tricks.sliding_window_view(ids, 4).tolist()}
    return {"tokens": len(ids), "perplexity": math.exp(nll.mean(dtype=np.float64)), "distinct_4grams": len(grams)}


def measure(options: argparse.Namespace, machine: Machine, loaded: LoadedModel, settings: ModelSettings) -> dict:
    """Generate, score, compare."""
    model, device = loaded.model, loaded.model.get_input_embeddings().weight.device
    start = put_in_front(loaded.tokenizer) or [loaded.tokenizer.bos_token_id]
    sampler = Sampler(SamplingSettings(options.temperature, 0, 1.0, options.seed), device)
    with StreamingDecoder(model, settings.n_sink, settings.window_size, options.decode_engine) as decoder:
        stream = TokenStream(decoder, sampler)
        stream.pending += start
        ids, samples = generate(stream, options.tokens, device)
        engine, cache_bytes = decoder.engine, decoder.cache_nbytes
    whole = torch.tensor([start + ids.tolist()])
    nll = score_stream(model, whole, settings.n_sink, settings.window_size)[0, -len(ids) :].cpu().numpy()
    tenths = [quality(*parts) for parts in zip(np.array_split(nll, 10), np.array_split(ids, 10), strict=True)]
    first, last = tenths[0], tenths[-1]
    warm = next(sample for sample in samples if sample["tokens"] == WARM_UP)
    return {
        "experiment": "endless",
        "model": options.model,
        "dtype": machine.dtype_name,
        "device": device_name(device),
        "backend": machine.backends[0],
        "decode_engine": engine,
        "streaming_llm": {"n_sink": settings.n_sink, "window_size": settings.window_size},
        "tokens": len(ids),
        "temperature": options.temperature,
        "seed": options.seed,
        "cache_bytes": cache_bytes,
        "memory_kind": "CUDA memory allocated" if device.type == "cuda" else "resident size of the process",
        "memory_growth": samples[-1]["memory_bytes"] / warm["memory_bytes"] - 1,
        "toks_per_sec": len(ids) / samples[-1]["sec"],
        "tenths": tenths,
        "perplexity_ratio": last["perplexity"] / first["perplexity"],
        "distinct_4grams_ratio": last["distinct_4grams"] / first["distinct_4grams"],
        "samples": samples,
    }


def summary(value: dict) -> str:
    """The result in a few lines."""
    samples, tenths = value["samples"], value["tenths"]
    first, last = tenths[0], tenths[-1]
    warm = next(sample for sample in samples if sample["tokens"] == WARM_UP)
    return (
        f"{value['tokens']:,} tokens at {value['toks_per_sec']:,.0f} tokens/s ({value['decode_engine']})\n"
        f"{value['memory_kind']}: {warm['memory_bytes'] / 1e6:,.2f} MB after {WARM_UP:,} tokens, "
        f"{samples[-1]['memory_bytes'] / 1e6:,.2f} MB at the end ({value['memory_growth']:+.3%})\n"
        f"perplexity of the first and last {first['tokens']:,} tokens: {first['perplexity']:.2f}, "
        f"{last['perplexity']:.2f} ({value['perplexity_ratio']:.3f} times); by tenths: "
        f"{' '.join(format(row['perplexity'], '.1f') for row in tenths)}\n"
        f"distinct 4-grams: {first['distinct_4grams']:,}, {last['distinct_4grams']:,} "
        f"({value['distinct_4grams_ratio']:.3f} times)"
    )


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="measure_endless.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", default="demo", metavar="NAME", help="demo (the default), a hub name, a folder")
    parser.add_argument("--tokens", type=int, default=100_000, metavar="N", help="default: 100,000; at least 2,000")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="default: 1")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--attn-backend", default=None, metavar="NAME", help="math, flash, auto, ...; default: math")
    parser.add_argument("--decode-engine", default="eager", metavar="NAME", help="eager (default), graph, auto, ...")
    add_cache_sizes(parser.add_argument_group("sizes, in tokens"))
    add_dtype_and_device(parser.add_argument_group("where it is computed"))
    parser.add_argument(
        "--output", type=Path, default=None, metavar="FILE.json", help="the result, if it is to be kept"
    )
    return parser


def run(argv: list[str]) -> int:
    options = build_parser().parse_args(argv)
    at_least("--tokens", options.tokens, 2 * WARM_UP)
    at_least("--seed", options.seed, 0)
    if not 0 < options.temperature < math.inf:
        raise SetupError(f"--temperature must be above 0, got {options.temperature}")
    config = ExperimentConfig(
        model=options.model,
        attn_backend_list=options.attn_backend,
        dtype=options.dtype,
        device=options.device,
        n_sink=options.n_sink,
        window_size=options.window_size,
        decode_engine=options.decode_engine,
        seed=options.seed,
    )
    machine, source = resolve_machine(config), find_model(options.model)
    if source.weights == "random":
        raise SetupError(f"--model {options.model}: random weights have no text")
    loaded = load_wrapped(source, machine)
    value = measure(options, machine, loaded, settings_for(config, loaded.context_length, source.is_demo))
    print(summary(value))
    if options.output is not None:
        command = shlex.join(["python", "scripts/measure_endless.py", *argv])
        where = environment(machine.device, command, options.seed, kvpress_imported=False)
        write_json(options.output, value | {"environment": where, "timestamp": now()})
        print(f"wrote: {options.output}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    return guarded(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    raise SystemExit(main())
