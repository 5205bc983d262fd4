"""How tests feed streams, and what they feed."""

from __future__ import annotations

import contextlib
import itertools

import torch
from transformers import StoppingCriteria

CONFIGS = [(4, 60), (0, 60), (1, 60), (4, 1), (0, 1), (4, 600)]
"""Sinks and windows; the last never fills."""

CUTS = (0, 3, 10, 40, 130, 131, 200, 300)


@torch.no_grad()
def forward_in_blocks(model, cache, ids: torch.Tensor, cuts=CUTS) -> torch.Tensor:
    """Logits ``[batch, length, vocab]`` of the ids fed in blocks that end at ``cuts``."""
    blocks = [ids[:, a:b] for a, b in itertools.pairwise(cuts)]
    return torch.cat([model(input_ids=x, past_key_values=cache, use_cache=True).logits for x in blocks], dim=1)


def decode(model, cache, ids: torch.Tensor) -> torch.Tensor:
    """Logits ``[batch, length, vocab]`` of the ids fed one by one."""
    return forward_in_blocks(model, cache, ids, range(ids.shape[1] + 1))


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids ``[batch, longest]`` and their mask; the padding is an ordinary token of the vocabulary."""
    longest = max(row.shape[-1] for row in rows)
    ids, mask = torch.full((len(rows), longest), 5), torch.zeros(len(rows), longest, dtype=torch.int64)
    for index, row in enumerate(rows):
        n = row.shape[-1]
        place = slice(longest - n, longest) if side == "left" else slice(0, n)
        ids[index, place], mask[index, place] = row[0], 1
    return ids, mask


class Ends(StoppingCriteria):
    """Stops each row behind a number of new tokens."""

    def __init__(self, after: list[int]) -> None:
        self.after = after

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] >= n for n in self.after], device=input_ids.device)


def snapshot(model) -> dict:
    return {
        "attention": model.config._attn_implementation,
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "state": list(model.state_dict()),
    }


KERNEL_OPS = {
    "math": "aten::_scaled_dot_product_attention_math",
    "flash": "aten::_scaled_dot_product_flash_attention_for_cpu",
}


def kernels_run(call) -> set[str]:
    """Names of the backends whose kernel ran during ``call()``."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    names = {event.key for event in profile.key_averages()}
    return {backend for backend, op in KERNEL_OPS.items() if op in names}


@contextlib.contextmanager
def nothing_waits():
    """Whatever waits for a CUDA device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
