"""The report at the end: does the model that was written stream as it should, on text it has never seen?

Everything is measured on the files in the output folder, loaded as a user loads them, in float32. For each
held-out text a stream of tokens beginning with `<|endoftext|>` is scored three times: with everything kept
(dense), with a window without sinks, and with sinks and a window of the same size together. Perplexities are
over the second half of the stream, far past the length that the model was trained on.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

N_SINK = 4


@dataclass(frozen=True)
class HeldOutText:
    """A text that was not trained on, and the stream that its report is about.

    Attributes:
        ids: token ids, int64 `[1, tokens]`, beginning with `<|endoftext|>`.
        start_character: where in the text the stream begins.
        tail_characters: characters that the second half of the stream stands for.
    """

    name: str
    ids: torch.Tensor
    start_character: int
    tail_characters: int


@dataclass(frozen=True)
class HeldOutResult:
    """Perplexities per token over stream positions `first_position` to `tokens`, and their ratios."""

    text: str
    tokens: int
    first_position: int
    dense: float
    window: float
    streaming: float
    dense_to_streaming: float
    window_to_streaming: float
    streaming_bits_per_character: float


def make_held_out_text(
    tokenizer: object, name: str, text: str, *, start_character: int, max_tokens: int, min_tokens: int
) -> HeldOutText:
    """The first `max_tokens` tokens from `start_character` on.

    Raises:
        ValueError: fewer than `min_tokens` are there; nothing would have been evicted from the cache then.
    """
    ids = tokenizer(text[start_character:], verbose=False).input_ids[:max_tokens]
    if len(ids) < min_tokens:
        raise ValueError(
            f"held-out text {name}: {len(ids)} tokens from character {start_character} on, at least "
            f"{min_tokens} are needed; pass a longer text or a smaller --held-out-start"
        )
    tail = ids[len(ids) // 2 :]
    return HeldOutText(name, torch.tensor([ids]), start_character, len(tokenizer.decode(tail)))


def measure(model_dir: Path, texts: list[HeldOutText], cache_size: int, device: torch.device) -> list[HeldOutResult]:
    """Score every text with the three kinds of attention; `cache_size` counts sinks and window together."""
    from transformers import AutoModelForCausalLM

    from streaming_llm import score_stream

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).to(device).eval()
    results = []
    for text in texts:
        ids, tokens = text.ids.to(device), text.ids.shape[1]
        first = tokens // 2
        kinds = {"dense": (0, tokens), "window": (0, cache_size), "streaming": (N_SINK, cache_size - N_SINK)}
        mean = {}
        for kind, (n_sink, window_size) in kinds.items():
            nll = score_stream(model, ids, n_sink=n_sink, window_size=window_size)  # [1, tokens - 1]
            mean[kind] = nll[0, first - 1 :].double().mean().item()  # nll[0, j] is token j + 1's
        tail_tokens = tokens - first
        results.append(
            HeldOutResult(
                text=text.name,
                tokens=tokens,
                first_position=first,
                **{kind: math.exp(nll) for kind, nll in mean.items()},
                dense_to_streaming=math.exp(mean["dense"] - mean["streaming"]),
                window_to_streaming=math.exp(mean["window"] - mean["streaming"]),
                streaming_bits_per_character=mean["streaming"] * tail_tokens / math.log(2) / text.tail_characters,
            )
        )
    return results


@torch.no_grad()
def sink_shares(model_dir: Path, texts: list[HeldOutText], context_length: int, device: torch.device) -> list[float]:
    """Share of the attention that token 0 takes, per layer, in 0..1.

    Mean over the texts, all heads, and the queries of the second half of the first `context_length` tokens.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    model.to(device).eval()
    total = torch.zeros(model.config.num_hidden_layers, dtype=torch.float64)
    for text in texts:
        ids = text.ids[:, :context_length].to(device)
        attentions = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
        for layer, weights in enumerate(attentions):  # each [1, num_heads, length, length]
            total[layer] += weights[0, :, ids.shape[1] // 2 :, 0].double().mean().cpu()
    return (total / len(texts)).tolist()


def format_table(results: list[HeldOutResult], shares: list[float], cache_size: int) -> str:
    """The report as plain text, for the console."""
    names = (
        "dense",
        f"window {cache_size}",
        f"{N_SINK} sinks + {cache_size - N_SINK}",
        "dense /",
        "window /",
        "bits/char",
    )
    width = max(len("held-out text"), *(len(result.text) for result in results))
    lines = [f"{'held-out text':<{width}}  {'positions':>13}  " + "  ".join(f"{name:>14}" for name in names)]
    for result in results:
        fields = asdict(result)
        values = [fields[key] for key in ("dense", "window", "streaming")]
        ratios = [result.dense_to_streaming, result.window_to_streaming, result.streaming_bits_per_character]
        cells = [f"{value:14.2f}" for value in values] + [f"{value:14.3f}" for value in ratios]
        span = f"{result.first_position}..{result.tokens}"
        lines.append(f"{result.text:<{width}}  {span:>13}  " + "  ".join(cells))
    lines.append("attention on token 0, by layer: " + "  ".join(f"{share:.1%}" for share in shares))
    return "\n".join(lines)
