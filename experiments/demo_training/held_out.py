"""Does the model that was written stream as it should, on text that it has never seen?

Everything is measured on the files in the output folder, loaded as a user loads them, in float32. For each held-out
text a stream of tokens beginning with `<|endoftext|>` is scored three times: with everything kept (dense), with a
window without sinks, and with sinks and a window of the same size together. Perplexities are over the second half of
the stream, far past the length that the model was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from experiments.config import SetupError
from experiments.progress import table
from streaming_llm import score_stream

N_SINK = 4


def make_stream(
    tokenizer: PreTrainedTokenizerFast, name: str, text: str, max_tokens: int, min_tokens: int
) -> torch.Tensor:
    """The first `max_tokens` tokens: int64 `[1, tokens]`, beginning with `<|endoftext|>`.

    Raises:
        SetupError: fewer than `min_tokens` are there; nothing would have been evicted from the cache then.
    """
    ids = tokenizer(text, verbose=False).input_ids[:max_tokens]
    if len(ids) < min_tokens:
        raise SetupError(
            f"held-out text {name}: {len(ids)} tokens, at least {min_tokens} are needed; pass a longer text, "
            "a smaller --held-out-start or a larger --held-out-tokens"
        )
    return torch.tensor([ids])


def measure(
    folder: Path, tokenizer: PreTrainedTokenizerFast, streams: dict[str, torch.Tensor], cache_size: int, device: str
) -> list[dict]:
    """Score every stream with the three kinds of attention; `cache_size` counts sinks and window together.

    Perplexities per token over stream positions `first_position` to `tokens`, and their ratios.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    results = []
    for name, ids in streams.items():
        tokens = ids.shape[1]
        first = tokens // 2
        kinds = {"dense": (0, tokens), "window": (0, cache_size), "streaming": (N_SINK, cache_size - N_SINK)}
        mean = {}
        for kind, (n_sink, window_size) in kinds.items():
            nll = score_stream(model, ids.to(device), n_sink=n_sink, window_size=window_size)  # [1, tokens - 1]
            mean[kind] = nll[0, first - 1 :].double().mean().item()  # nll[0, j] is token j + 1's
        result = {"text": name, "tokens": tokens, "first_position": first}
        result |= {kind: math.exp(nll) for kind, nll in mean.items()}
        result |= {f"{k}_to_streaming": math.exp(mean[k] - mean["streaming"]) for k in ("dense", "window")}
        bits = mean["streaming"] * (tokens - first) / math.log(2)
        results.append(result | {"streaming_bits_per_character": bits / len(tokenizer.decode(ids[0, first:]))})
    return results


@torch.no_grad()
def sink_shares(folder: Path, streams: Iterable[torch.Tensor], context_length: int, device: str) -> list[float]:
    """Share of the attention that token 0 takes, per layer, in 0..1.

    Mean over the texts, all heads, and the queries of the second half of the first `context_length` tokens.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.to(device).eval()
    shares = []
    for ids in streams:
        attentions = model(ids[:, :context_length].to(device), use_cache=False, output_attentions=True).attentions
        # each [1, num_heads, length, length]
        shares.append([w[0, :, w.shape[2] // 2 :, 0].double().mean().item() for w in attentions])
    return torch.tensor(shares).mean(0).tolist()


def format_table(results: list[dict], shares: list[float], cache_size: int) -> str:
    """The report as plain text, for the console; its last line is what sinks are worth."""
    kinds = ["dense", f"window {cache_size}", f"{N_SINK} sinks + {cache_size - N_SINK}", "dense /", "window /"]
    rows = []
    for result in results:
        name, tokens, first, *values = result.values()
        rows.append([name, f"{first}..{tokens}", *(f"{value:.3f}" for value in values)])
    lines = [table(["held-out text", "positions", *kinds, "bits/char"], rows)]
    lines.append("attention on token 0, by layer: " + "  ".join(f"{share:.1%}" for share in shares))
    ratios = [result["window_to_streaming"] for result in results]
    lines.append(f"window without sinks / with sinks: {min(ratios):.2f} to {max(ratios):.2f} times the perplexity")
    return "\n".join(lines)
