"""A long stream decoded token by token on given text: memory and time from beginning to end, and the losses against
block-parallel scoring of the same tokens.

    python scripts/measure_long_decode.py --tokens 1000000 --output results/cpu/long_decode.json
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from measure_endless import memory_bytes
from model_setup import keep_result, load_trained, make_decoder
from torch import Tensor
from tqdm import tqdm

from experiments.cli import EXIT_FAILED, OneLineParser, add_cache_sizes, add_dtype_and_device, guarded
from experiments.config import SetupError, at_least
from experiments.environment import device_name
from experiments.models import LoadedModel
from experiments.session import Machine
from experiments.storage import check_writable
from experiments.texts import default_datasets, load_texts
from experiments.tokens import first_tokens
from streaming_llm import StreamingConfig, StreamingDecoder, score_stream
from streaming_llm.decoder import ATTENTION
from streaming_llm.forwards import resolve_block_engine

CHUNKS = 1000
"""Parts of the stream whose times are taken: a hundredth is the median of ten."""


@dataclass(frozen=True)
class Decoded:
    """A decoded stream.

    Attributes:
        nll: losses in nats ``[tokens]``, float32, on the CPU.
        chunk_ms: milliseconds per token, of each chunk.
        chunk_memory: bytes in use after each chunk.
    """

    nll: Tensor
    chunk_ms: list[float]
    chunk_memory: list[int]


def read_tokens(loaded: LoadedModel, names: tuple[str, ...], length: int) -> tuple[Tensor, float]:
    """Ids ``[1, length]`` of texts one behind the other, over and over; and how often all of them are in it."""
    front = loaded.beginning("auto").ids
    once = torch.cat([first_tokens(text, loaded.tokenizer, front, length) for text in load_texts(names)], dim=1)
    return once.repeat(1, -(-length // once.shape[1]))[:, :length], length / once.shape[1]


def decode(decoder: StreamingDecoder, ids: Tensor, prompt: int) -> Decoded:
    """Feed ``ids`` ``[1, prompt + tokens]`` token by token behind a prompt that fills the cache.

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
            chunk_memory.append(memory_bytes(device))
            bar.update(size)
    return Decoded(nll, chunk_ms, chunk_memory)


def speed_and_memory(decoded: Decoded) -> dict:
    """From the first hundredth of the stream to its last."""
    hundredth = CHUNKS // 100
    first, last = (statistics.median(part) for part in (decoded.chunk_ms[:hundredth], decoded.chunk_ms[-hundredth:]))
    memory = decoded.chunk_memory
    return {
        "ms_per_token": statistics.median(decoded.chunk_ms),
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

    Raises:
        FloatingPointError: one of them is not finite.
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


def measure(options: argparse.Namespace, machine: Machine, loaded: LoadedModel, config: StreamingConfig) -> dict:
    """Decode, score, compare."""
    model, prompt = loaded.model, config.cache_size
    names = default_datasets(True) if options.text is None else (str(options.text),)
    ids, times = read_tokens(loaded, names, prompt + options.tokens)
    with make_decoder(loaded, config, options.decode_engine, options.decode_attention) as decoder:
        decoded = decode(decoder, ids, prompt)
        engine, compile_sec, cache_bytes = decoder.engine, decoder.compile_sec, decoder.cache_nbytes
    expected = score_stream(model, ids, config.n_sink, config.window_size)[0, prompt - 1 :]
    return {
        "experiment": "long_decode",
        "model": options.model,
        "dtype": machine.dtype_name,
        "device": device_name(machine.device),
        "backend": machine.backends[0],
        "decode_engine": engine,
        "decode_attention": options.decode_attention,
        "scoring_engine": resolve_block_engine(model),
        "streaming_llm": {"n_sink": config.n_sink, "window_size": config.window_size},
        "texts": [Path(name).name for name in names],
        "texts_repeated": times,
        "prompt_tokens": prompt,
        "tokens": options.tokens,
        "compile_sec": compile_sec,
        "cache_bytes": cache_bytes,
        **speed_and_memory(decoded),
        "memory_kind": "CUDA memory allocated" if machine.device.type == "cuda" else "resident size of the process",
        **agreement(decoded.nll, expected),
    }


def summary(value: dict) -> str:
    """The result in a few lines."""
    return (
        f"{value['tokens']:,} tokens behind {value['prompt_tokens']:,}, "
        f"engine {value['decode_engine']} ({value['decode_attention']}), "
        f"{value['backend']}, {value['dtype']}, {value['device']}\n"
        f"ms/token: {value['ms_per_token']:.4f}; first 1% {value['ms_per_token_first_hundredth']:.4f}, last 1% "
        f"{value['ms_per_token_last_hundredth']:.4f} ({value['last_to_first'] - 1:+.2%})\n"
        f"{value['memory_kind']}: {value['memory_bytes_after_warm_up']:,} bytes after warm-up, "
        f"{value['memory_bytes_at_the_end']:,} at the end ({value['memory_growth_bytes']:+,})\n"
        f"perplexity: {value['perplexity']:.6f}, block-parallel ({value['scoring_engine']}) "
        f"{value['perplexity_block_parallel']:.6f}; losses differ by {value['loss_difference_mean']:.2e} nats on "
        f"average, {value['loss_difference_largest']:.2e} at most"
    )


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="measure_long_decode.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default="demo", metavar="NAME", help="demo (the default), a hub name, a folder")
    parser.add_argument(
        "--text", type=Path, default=None, metavar="FILE", help="repeated to length; default: the bundled texts"
    )
    parser.add_argument(
        "--tokens", type=int, default=1_000_000, metavar="N", help="thousands; default: 1,000,000, behind a prompt"
    )
    parser.add_argument("--attn-backend", default=None, metavar="NAME", help="math, flash, auto, ...; default: math")
    parser.add_argument("--decode-engine", default="auto", metavar="NAME", help="auto (default), eager, graph, fused")
    parser.add_argument(
        "--decode-attention",
        default="sdpa",
        choices=ATTENTION,
        help="of the fused engine: sdpa (default), the kernel of --attn-backend, or triton, the library's own",
    )
    add_cache_sizes(parser.add_argument_group("sizes, in tokens"))
    add_dtype_and_device(parser.add_argument_group("where it is computed"))
    parser.add_argument(
        "--output", type=Path, default=None, metavar="FILE.json", help="the result, if it is to be kept"
    )
    return parser


def run(argv: list[str]) -> int:
    options = build_parser().parse_args(argv)
    at_least("--tokens", options.tokens, 2 * CHUNKS)
    if options.tokens % CHUNKS:
        raise SetupError(f"--tokens must be a multiple of {CHUNKS}, got {options.tokens}")
    if options.output is not None:
        check_writable(options.output.parent, 1 << 20)
    machine, loaded, config = load_trained(options)
    try:
        value = measure(options, machine, loaded, config)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    print(summary(value))
    keep_result(options.output, value, machine, "measure_long_decode.py", argv, 0)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    return guarded(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    raise SystemExit(main())
