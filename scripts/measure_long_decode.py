#!/usr/bin/env python
"""A long stream decoded token by token on given text: memory and time from beginning to end, and the losses against
block-parallel scoring of the same tokens.

    python scripts/measure_long_decode.py --tokens 1000000 --output results/cpu/long_decode.json
"""

import math
import statistics
import sys
import time
from argparse import Namespace
from pathlib import Path

if __name__ == "__main__":  # perhaps in a checkout that is not installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor
from tqdm import tqdm

from experiments.cli import MODEL, STREAM, TEXTS, OneLineParser, add_options, config_from, guarded
from experiments.config import SetupError, at_least
from experiments.costs import held_bytes, kind_of_held_bytes
from experiments.model_setup import Subject, keep_result, make_decoder, set_up
from experiments.storage import check_writable
from experiments.texts import default_datasets, load_texts
from experiments.tokens import first_tokens
from streaming_llm import StreamingDecoder, resolve_block_engine, score_stream

CHUNKS = 1000
"""Parts of the stream whose times are taken: a hundredth is the median of ten."""


def decode(decoder: StreamingDecoder, ids: Tensor, prompt: int) -> tuple[Tensor, list[float], list[int]]:
    """Feed ids [1, prompt + tokens] token by token behind a prompt that fills the cache.

    Returns the losses in nats [tokens], float32, on the CPU; of each chunk the milliseconds per token, and the bytes
    in use after it.
    The first chunks are decoded once before: what has to be compiled, recorded or allocated is so then.
    """
    device, steps = decoder.model.get_input_embeddings().weight.device, ids[:, prompt:]
    size = steps.shape[1] // CHUNKS
    nll = torch.full((steps.shape[1],), math.nan)  # written, so that it counts already
    chunk_ms, chunk_memory = [], []
    decoder.prefill(ids[:, :prompt].to(device))
    decoder.score(steps[:, : 2 * size].to(device))
    decoder.reset()
    decoder.prefill(ids[:, :prompt].to(device))
    with tqdm(total=steps.shape[1], unit=" tokens", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        for start in range(0, steps.shape[1], size):
            begin = time.perf_counter()
            chunk = steps[:, start : start + size].to(device)
            nll[start : start + size] = decoder.score(chunk)[0].cpu()  # waits for the device
            chunk_ms.append(1e3 * (time.perf_counter() - begin) / size)
            chunk_memory.append(held_bytes(device))
            bar.update(size)
    return nll, chunk_ms, chunk_memory


def speed_and_memory(chunk_ms: list[float], memory: list[int]) -> dict:
    """From the first hundredth of the stream to its last."""
    hundredth = CHUNKS // 100
    first, last = (statistics.median(part) for part in (chunk_ms[:hundredth], chunk_ms[-hundredth:]))
    return {
        "ms_per_token": statistics.median(chunk_ms),
        "ms_per_token_first_hundredth": first,
        "ms_per_token_last_hundredth": last,
        "last_to_first": last / first,
        "memory_bytes_after_warm_up": memory[0],
        "memory_bytes_at_most": max(memory),
        "memory_bytes_at_the_end": memory[-1],
        "memory_growth_bytes": memory[-1] - memory[0],
    }


def agreement(nll: Tensor, expected: Tensor) -> dict:
    """Losses in nats of decoding, and of block-parallel scoring.

    Raises FloatingPointError where one of them is not finite.
    """
    difference = (nll.double() - expected.double()).abs()
    if not difference.isfinite().all():
        broken = [name for name, x in (("decoding", nll), ("scoring", expected)) if not x.isfinite().all()]
        raise FloatingPointError(f"losses of {' and '.join(broken)} are not finite: nothing is written")
    return {
        "perplexity": nll.double().mean().exp().item(),
        "perplexity_block_parallel": expected.double().mean().exp().item(),
        "loss_difference_mean": difference.mean().item(),
        "loss_difference_largest": difference.max().item(),
    }


def measure(options: Namespace, subject: Subject) -> dict:
    """Decode, score, compare."""
    config, model, device = subject.streaming, subject.loaded.model, subject.machine.device
    names = options.datasets or default_datasets(has_tokenizer=True)
    texts, prompt = load_texts(names, options.text_key), config.cache_size
    front, length = subject.beginning.ids, prompt + options.tokens
    once = torch.cat([first_tokens(text, subject.loaded.tokenizer, front, length) for text in texts], dim=1)
    ids = once.repeat(1, -(-length // once.shape[1]))[:, :length]  # one behind the other, over and over
    with make_decoder(subject.loaded, config, options.engine) as decoder:
        nll, chunk_ms, memory = decode(decoder, ids, prompt)
        engine, compile_sec, cache_bytes = decoder.engine, decoder.compile_sec, decoder.cache_nbytes
    expected = score_stream(model, ids, config.n_sink, config.window_size)[0, prompt - 1 :]
    return {
        "experiment": "long_decode",
        **subject.facts(),
        "decode_engine": engine,
        "scoring_engine": resolve_block_engine(model),
        "texts": [text.dataset for text in texts],
        "texts_repeated": length / once.shape[1],
        "prompt_tokens": prompt,
        "tokens": options.tokens,
        "compile_sec": compile_sec,
        "cache_bytes": cache_bytes,
        **speed_and_memory(chunk_ms, memory),
        "memory_kind": kind_of_held_bytes(device),
        **agreement(nll, expected),
    }


def summary(value: dict) -> str:
    """The result in a few lines."""
    return (
        f"{value['tokens']:,} tokens behind {value['prompt_tokens']:,}, "
        f"engine {value['decode_engine']}, {value['backend']}, {value['dtype']}, {value['device']}\n"
        f"ms/token: {value['ms_per_token']:.4f}; first 1% {value['ms_per_token_first_hundredth']:.4f}, last 1% "
        f"{value['ms_per_token_last_hundredth']:.4f} ({value['last_to_first'] - 1:+.2%})\n"
        f"{value['memory_kind']}: {value['memory_bytes_after_warm_up']:,} bytes after warm-up, "
        f"{value['memory_bytes_at_the_end']:,} at the end ({value['memory_growth_bytes']:+,})\n"
        f"perplexity: {value['perplexity']:.6f}, block-parallel ({value['scoring_engine']}) "
        f"{value['perplexity_block_parallel']:.6f}; losses differ by {value['loss_difference_mean']:.2e} nats on "
        f"average, {value['loss_difference_largest']:.2e} at most"
    )


def build_parser() -> OneLineParser:
    """The command line."""
    parser = OneLineParser("measure_long_decode.py", __doc__.split("\n\n")[0])
    names = (*MODEL[:3], *TEXTS, *STREAM, "attn_backend_list", "engine")
    texts = {"flags": ("--datasets", "--text"), "help": "texts, repeated to length; default: the bundled ones"}
    changes = {"attn_backend_list": {"flags": ("--attn-backend",)}, "datasets": texts}
    add = add_options(parser, "what is measured", names, ("model", "attn_backend_list"), **changes).add_argument
    add("--tokens", type=int, default=1_000_000, metavar="N", help="thousands, behind a prompt; default: 1,000,000")
    add("--output", type=Path, metavar="FILE.json", help="the result, if it is to be kept")
    return parser


def run(argv: list[str]) -> int:
    options = build_parser().parse_args(argv)
    at_least("--tokens", options.tokens, 2 * CHUNKS)
    if options.tokens % CHUNKS:
        raise SetupError(f"--tokens must be a multiple of {CHUNKS}, got {options.tokens}")
    check_writable(options.output and options.output.parent, 1 << 20)
    subject = set_up(config_from(options))
    value = measure(options, subject)
    print(summary(value))
    keep_result(options.output, value, subject.machine, "measure_long_decode.py", argv, 0)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    return guarded(lambda: run(sys.argv[1:] if argv is None else argv), FloatingPointError)


if __name__ == "__main__":
    raise SystemExit(main())
