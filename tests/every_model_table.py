"""Writes results/families.md: for every model type of the installed Transformers, that it streams exactly, or why not.

python tests/every_model_table.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from every_model import VOCAB, model_types, tiny_model
from streamed_reference import streamed_logits
from streams import forward_in_blocks
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CONFIG_MAPPING

from streaming_llm import StreamingKVCache, StreamingLLMWrapper
from streaming_llm.families import family_of_model, text_config
from streaming_llm.families.table import REWRITTEN_TYPES

DOCUMENT = Path(__file__).resolve().parents[1] / "results" / "families.md"
N_SINK, LENGTH = 4, 90
IDS = torch.randint(3, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(1))
KERNELS = {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}
OWN_REFERENCE = "against a reference of its own (tests/test_families.py)"


def in_blocks(model, cache: StreamingKVCache, cuts) -> torch.Tensor:
    return forward_in_blocks(model, cache, IDS, cuts)


def block_cuts(model) -> tuple[int, ...]:
    """Blocks before and after the ring turns, and single tokens; where layers take no later block, tokens."""
    if family_of_model(model).blocks_continue:
        return (0, 33, 34, 35, 70, LENGTH)
    return (0, 33, *range(34, LENGTH + 1))


@torch.no_grad()
def allowed_error(model, reference: torch.Tensor, window_size: int) -> float:
    """Five times what parts of the model's own that compute in float32 make of a plain forward, without the library.

    Logits have a standard deviation of 1, and all the rest is float64.
    """
    n = N_SINK + window_size + 1  # tokens that have lost nothing yet
    own = (model(input_ids=IDS[:, :n]).logits - reference[:, :n]).abs().max().item()
    return min(max(5 * own, 1e-6), 1e-4)


def largest_errors(model, window_size: int) -> tuple[dict[str, float], float]:
    """How far blocks and single tokens are from the reference, by each kernel that can do it, and ``generate``.

    And how far they may be.
    """
    reference, errors = streamed_logits(model, IDS, N_SINK, window_size), {}
    capped = getattr(text_config(model.config), "attn_logit_softcapping", None) is not None
    for name, kernel in KERNELS.items():
        if capped and name == "flash":  # no kernel of PyTorch's caps scores
            continue
        with StreamingLLMWrapper(model, N_SINK, window_size) as stream, sdpa_kernel(kernel):
            errors[f"blocks, {name}"] = (
                (in_blocks(model, stream.new_cache(), block_cuts(model)) - reference).abs().max()
            )
            if name == "math":
                cuts = (0, 8, *range(9, LENGTH + 1))
                errors["tokens"] = (in_blocks(model, stream.new_cache(), cuts) - reference).abs().max()
    with StreamingLLMWrapper(model, N_SINK, window_size) as stream:
        out = stream.generate(IDS[:, :50], max_new_tokens=12, do_sample=False, eos_token_id=None)
    chosen = streamed_logits(model, out, N_SINK, window_size)[:, 49:-1]
    taken = chosen.gather(2, out[:, 50:, None])[..., 0]
    errors["generate"] = (chosen.max(-1).values - taken).abs().max()
    return {name: float(error) for name, error in errors.items()}, allowed_error(model, reference, window_size)


def verdict(model_type: str) -> tuple[str, str]:
    """``yes``, ``no``, ``with it`` or ``not tried``, and what was measured or why."""
    if model_type in REWRITTEN_TYPES:
        return "yes", OWN_REFERENCE
    text = text_config(CONFIG_MAPPING[model_type]())
    if text.model_type != model_type:
        return "with it", f"its language model is {text.model_type}"
    try:
        model = tiny_model(model_type).double()
    except Exception as error:  # whatever a model wants that the tests do not know
        return "not tried", f"the tests make no small model of it ({type(error).__name__})"
    try:
        StreamingLLMWrapper(model, N_SINK, 16)
    except ValueError as error:
        return "no", str(error).partition("cannot stream: ")[2].partition(". Those that are known")[0] or str(error)
    errors, allowed = largest_errors(model, 16)
    worst = max(errors.values())
    return ("yes" if worst < allowed else "no"), f"largest error {worst:.0e} (" + ", ".join(errors) + ")"


def table() -> str:
    """The whole document."""
    rows = {model_type: verdict(model_type) for model_type in model_types()}
    n_yes = sum(streams == "yes" for streams, _ in rows.values())
    lines = [
        "# Which model types stream",
        "",
        f"Every model type of Transformers {transformers.__version__} with a causal language model and rotary "
        "positions (and a few hybrids whose attention needs none), as a tiny random model in float64. The reference "
        "is StreamingLLM's attention written from its definition, token by token (`tests/streamed_reference.py`); 4 "
        "sinks, a window of 16, 90 tokens. Made by `python tests/every_model_table.py`.",
        "",
        f"{n_yes} of {len(rows)} stream exactly. Logits have a standard deviation of 1. Errors above 1e-12 are of "
        "parts that a family's own code computes in float32, such as softmax, rotation, routing or recurrent layers: "
        "allowed are five times those of the model's plain forward, at least 1e-6 and at most 1e-4.",
        "",
        "| model type | streams | |",
        "| --- | --- | --- |",
        *(
            f"| {model_type} | {streams} | {about.replace('|', '/')} |"
            for model_type, (streams, about) in rows.items()
        ),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    if sys.argv[1:]:
        for name in sys.argv[1:]:
            print(name, *verdict(name))
    else:
        DOCUMENT.write_text(table(), encoding="utf-8")
