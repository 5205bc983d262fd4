#!/usr/bin/env python
"""Endless generation, measured: memory while it runs, and whether the text at the end is as good as at the beginning.

Generates with the model's own probabilities, then scores the text by the same model in block-parallel form: perplexity
and distinct 4-grams of each tenth. The perplexity of a stretch varies by chance from stream to stream (for 10,000
tokens of the demo model by 7%), so several streams say more than one.

    python scripts/measure_endless.py --streams 4 --output results/cpu/endless.json
"""

import argparse
import math
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # perhaps in a checkout that is not installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from experiments.cli import MODEL, STREAM, OneLineParser, add_options, config_from, guarded
from experiments.config import SetupError, at_least
from experiments.costs import held_bytes, kind_of_held_bytes
from experiments.model_setup import Subject, keep_result, make_decoder, set_up
from experiments.storage import check_writable
from streaming_llm import StreamingConfig, StreamingDecoder, score_stream

WARM_UP = 1000
"""Tokens after which nothing is allocated any more; memory is read whenever so many more have come."""

STREAMS_AT_ONCE = 8
"""Streams that are scored together."""


def generate(decoder: StreamingDecoder, options: argparse.Namespace) -> tuple[torch.Tensor, list[dict]]:
    """Draw tokens for each stream.

    Returns their ids [streams, tokens], int32 on the CPU; and `tokens`, `memory_bytes` and `sec` so far, after every
    thousand.
    """
    ids = torch.full((options.streams, options.tokens), -1, dtype=torch.int32)  # written, so that it counts already
    samples, begin = [], time.perf_counter()
    with tqdm(total=options.tokens, unit=" tokens", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        for start in range(0, options.tokens, WARM_UP):
            seed = None if start else options.seed
            ids[:, start : start + WARM_UP] = decoder.generate(WARM_UP, temperature=options.temperature, seed=seed)
            bar.update(WARM_UP)
            sample = {"tokens": start + WARM_UP, "memory_bytes": held_bytes(decoder.model.device)}
            samples.append(sample | {"sec": time.perf_counter() - begin})
    return ids, samples


def score(model: nn.Module, ids: torch.Tensor, start: list[int], config: StreamingConfig) -> np.ndarray:
    """Losses in nats [streams, tokens] of ids [streams, tokens] that were drawn after `start`."""
    rows = []
    for part in ids.split(STREAMS_AT_ONCE):
        whole = torch.cat((torch.tensor([start]).expand(len(part), -1), part.long()), dim=1)
        rows.append(score_stream(model, whole, config.n_sink, config.window_size)[:, -ids.shape[1] :].cpu())
    return torch.cat(rows).numpy()


def quality(nll: np.ndarray, ids: np.ndarray) -> dict:
    """Tenths of streams, losses and ids [streams, tokens]: perplexity over all streams, distinct 4-grams of one on
    average; and of each stream the last tenth's as multiples of the first's."""
    means = np.stack([part.mean(axis=1, dtype=np.float64) for part in np.array_split(nll, 10, axis=1)])
    windows = [np.lib.stride_tricks.sliding_window_view(part, 4, axis=1) for part in np.array_split(ids, 10, axis=1)]
    grams = np.array([[len(np.unique(row, axis=0)) for row in part] for part in windows])
    return {
        "perplexity_by_tenths": np.exp(means.mean(axis=1)).tolist(),
        "distinct_4grams_by_tenths": grams.mean(axis=1).tolist(),
        "perplexity_ratio": float(np.exp((means[-1] - means[0]).mean())),
        "distinct_4grams_ratio": float(grams[-1].sum() / grams[0].sum()),
        "perplexity_ratio_of_each": np.exp(means[-1] - means[0]).tolist(),
        "distinct_4grams_ratio_of_each": (grams[-1] / grams[0]).tolist(),
    }


def measure(options: argparse.Namespace, subject: Subject) -> dict:
    """Generate, score, compare."""
    device, start = subject.loaded.device, list(subject.beginning.start)
    if not start:
        raise SetupError("the tokenizer has no token that a text could begin with")
    with make_decoder(subject.loaded, subject.streaming, options.engine) as decoder:
        decoder.prefill(torch.tensor([start] * options.streams, device=device))
        ids, samples = generate(decoder, options)
        engine, cache_bytes = decoder.engine, decoder.cache_nbytes
    return {
        "experiment": "endless",
        **subject.facts(),
        "bos": subject.beginning.record() | {"in_front": True},
        "decode_engine": engine,
        "streams": options.streams,
        "tokens": options.tokens,
        "temperature": options.temperature,
        "seed": options.seed,
        "cache_bytes": cache_bytes,
        "memory_kind": kind_of_held_bytes(device),
        "memory_growth": samples[-1]["memory_bytes"] / samples[0]["memory_bytes"] - 1,
        "steps_per_sec": options.tokens / samples[-1]["sec"],
        **quality(score(subject.loaded.model, ids, start, subject.streaming), ids.numpy()),
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


def build_parser() -> OneLineParser:
    """The command line."""
    parser = OneLineParser("measure_endless.py", __doc__.splitlines()[0])
    names, backend = (*MODEL, "bos", *STREAM, "attn_backend_list", "engine"), {"flags": ("--attn-backend",)}
    add = add_options(parser, "what is measured", names, one=names, attn_backend_list=backend).add_argument
    add("--tokens", type=int, default=100_000, metavar="N", help="thousands, at least two; default: 100,000")
    add("--streams", type=int, default=1, metavar="B", help="generated side by side; default: 1")
    add("--temperature", type=float, default=1.0, metavar="T", help="default: 1")
    add("--output", type=Path, metavar="FILE.json", help="the result, if it is to be kept")
    return parser


def run(argv: list[str]) -> int:
    options = build_parser().parse_args(argv)
    at_least("--tokens", options.tokens, 2 * WARM_UP)
    at_least("--streams", options.streams, 1)
    if options.tokens % WARM_UP:
        raise SetupError(f"--tokens must be a multiple of {WARM_UP}, got {options.tokens}")
    if not 0 < options.temperature < math.inf:
        raise SetupError(f"--temperature must be above 0, got {options.temperature}")
    check_writable(options.output and options.output.parent, 1 << 20)
    subject = set_up(config_from(options))
    value = measure(options, subject)
    print(summary(value))
    keep_result(options.output, value, subject.machine, "measure_endless.py", argv, options.seed)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    return guarded(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    raise SystemExit(main())
