"""Endless generation, measured: memory while it runs, and whether the text at the end is as good as at the beginning.

Generates with the model's own probabilities, then scores the text by the same model in block-parallel form: perplexity
and distinct 4-grams of each tenth. The perplexity of a stretch varies by chance from stream to stream (for 10,000
tokens of the demo model by 7%), so several streams say more than one.

    python scripts/measure_endless.py --streams 4 --output results/cpu/endless.json
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from model_setup import keep_result, load_trained, make_decoder
from torch import nn
from tqdm import tqdm

from experiments.cli import OneLineParser, add_cache_sizes, add_dtype_and_device, guarded
from experiments.config import SetupError, at_least
from experiments.environment import device_name
from experiments.models import LoadedModel
from experiments.session import Machine
from experiments.storage import check_writable
from experiments.tokens import put_in_front
from streaming_llm import StreamingConfig, StreamingDecoder, score_stream

WARM_UP = 1000
"""Tokens after which nothing is allocated any more; memory is read whenever so many more have come."""

STREAMS_AT_ONCE = 8
"""Streams that are scored together."""


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


def generate(decoder: StreamingDecoder, options: argparse.Namespace) -> tuple[torch.Tensor, list[dict]]:
    """Draw tokens for each stream.

    Returns:
        Their ids ``[streams, tokens]``, int32 on the CPU; and ``tokens``, ``memory_bytes`` and ``sec`` so far, after
        every thousand.
    """
    ids = torch.full((options.streams, options.tokens), -1, dtype=torch.int32)  # written, so that it counts already
    samples, begin = [], time.perf_counter()
    with tqdm(total=options.tokens, unit=" tokens", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        for start in range(0, options.tokens, WARM_UP):
            seed = None if start else options.seed
            ids[:, start : start + WARM_UP] = decoder.generate(WARM_UP, temperature=options.temperature, seed=seed)
            bar.update(WARM_UP)
            sample = {"tokens": start + WARM_UP, "memory_bytes": memory_bytes(decoder.model.device)}
            samples.append(sample | {"sec": time.perf_counter() - begin})
    return ids, samples


def score(model: nn.Module, ids: torch.Tensor, start: list[int], config: StreamingConfig) -> np.ndarray:
    """Losses in nats ``[streams, tokens]`` of ids ``[streams, tokens]`` that were drawn after ``start``."""
    rows = []
    for part in ids.split(STREAMS_AT_ONCE):
        whole = torch.cat((torch.tensor([start]).expand(len(part), -1), part.long()), dim=1)
        rows.append(score_stream(model, whole, config.n_sink, config.window_size)[:, -ids.shape[1] :].cpu())
    return torch.cat(rows).numpy()


def quality(nll: np.ndarray, ids: np.ndarray) -> dict:
    """Tenths of streams, losses and ids ``[streams, tokens]``: perplexity over all streams, distinct 4-grams of one on
    average; and of each stream the last tenth's as multiples of the first's."""
    means = np.stack([part.mean(axis=1, dtype=np.float64) for part in np.array_split(nll, 10, axis=1)])
    grams = np.array([[_distinct_4grams(row) for row in part] for part in np.array_split(ids, 10, axis=1)])
    return {
        "perplexity_by_tenths": np.exp(means.mean(axis=1)).tolist(),
        "distinct_4grams_by_tenths": grams.mean(axis=1).tolist(),
        "perplexity_ratio": float(np.exp((means[-1] - means[0]).mean())),
        "distinct_4grams_ratio": float(grams[-1].sum() / grams[0].sum()),
        "perplexity_ratio_of_each": np.exp(means[-1] - means[0]).tolist(),
        "distinct_4grams_ratio_of_each": (grams[-1] / grams[0]).tolist(),
    }


def _distinct_4grams(ids: np.ndarray) -> int:
    return len({tuple(gram) for gram in np.lib.stride_tricks.sliding_window_view(ids, 4).tolist()})


def measure(options: argparse.Namespace, machine: Machine, loaded: LoadedModel, config: StreamingConfig) -> dict:
    """Generate, score, compare."""
    model, device = loaded.model, loaded.model.get_input_embeddings().weight.device
    start = put_in_front(loaded.tokenizer) or [loaded.tokenizer.bos_token_id]
    if start == [None]:
        raise SetupError("the tokenizer has no token that a text could begin with")
    with make_decoder(loaded, config, options.decode_engine) as decoder:
        decoder.prefill(torch.tensor([start] * options.streams, device=device))
        ids, samples = generate(decoder, options)
        engine, cache_bytes = decoder.engine, decoder.cache_nbytes
    return {
        "experiment": "endless",
        "model": options.model,
        "dtype": machine.dtype_name,
        "device": device_name(device),
        "backend": machine.backends[0],
        "decode_engine": engine,
        "streaming_llm": {"n_sink": config.n_sink, "window_size": config.window_size},
        "streams": options.streams,
        "tokens": options.tokens,
        "temperature": options.temperature,
        "seed": options.seed,
        "cache_bytes": cache_bytes,
        "memory_kind": "CUDA memory allocated" if device.type == "cuda" else "resident size of the process",
        "memory_growth": samples[-1]["memory_bytes"] / samples[0]["memory_bytes"] - 1,
        "steps_per_sec": options.tokens / samples[-1]["sec"],
        **quality(score(model, ids, start, config), ids.numpy()),
        "samples": samples,
    }


def summary(value: dict) -> str:
    """The result in a few lines."""
    first, last = value["samples"][0], value["samples"][-1]
    within = sum(abs(ratio - 1) < 0.1 for ratio in value["perplexity_ratio_of_each"])
    tenths = " ".join(f"{perplexity:.2f}" for perplexity in value["perplexity_by_tenths"])
    return (
        f"{value['streams']} x {value['tokens']:,} tokens, {value['steps_per_sec']:,.0f} steps/s "
        f"({value['decode_engine']})\n"
        f"{value['memory_kind']}: {first['memory_bytes'] / 1e6:,.2f} MB after {first['tokens']:,} tokens, "
        f"{last['memory_bytes'] / 1e6:,.2f} MB at the end ({value['memory_growth']:+.3%})\n"
        f"perplexity by tenths: {tenths}; last / first {value['perplexity_ratio']:.3f}, within 10% for {within} of "
        f"{value['streams']} streams by themselves\n"
        f"distinct 4-grams, last / first tenth: {value['distinct_4grams_ratio']:.3f}"
    )


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="measure_endless.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", default="demo", metavar="NAME", help="demo (the default), a hub name, a folder")
    parser.add_argument(
        "--tokens", type=int, default=100_000, metavar="N", help="thousands, at least two; default: 100,000"
    )
    parser.add_argument("--streams", type=int, default=1, metavar="B", help="generated side by side; default: 1")
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
    at_least("--streams", options.streams, 1)
    at_least("--seed", options.seed, 0)
    if options.tokens % WARM_UP:
        raise SetupError(f"--tokens must be a multiple of {WARM_UP}, got {options.tokens}")
    if not 0 < options.temperature < math.inf:
        raise SetupError(f"--temperature must be above 0, got {options.temperature}")
    if options.output is not None:
        check_writable(options.output.parent, 1 << 20)
    machine, loaded, config = load_trained(options)
    value = measure(options, machine, loaded, config)
    print(summary(value))
    keep_result(options.output, value, machine, "measure_endless.py", argv, options.seed)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    return guarded(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    raise SystemExit(main())
