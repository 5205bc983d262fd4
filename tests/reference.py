"""The slow, independent path for GPT-NeoX: `family_reference.py`, with the frequencies that the model holds."""

from __future__ import annotations

import hashlib

import torch
from family_reference import family_reference_logits

_found: dict[tuple, torch.Tensor] = {}


def reference_logits(
    model, input_ids: torch.Tensor, n_sink: int, window_size: int, *, gapped: bool = False
) -> torch.Tensor:
    """Float64 logits ``[batch, length, vocab]`` of a GPT-NeoX fed ``input_ids`` ``[batch, length]`` one by one.

    Computed once: tests of two kernels or dtypes have one reference.
    """
    rotary = model.gpt_neox.rotary_emb  # a streaming model's own one lies behind the stand-in
    frequency, digest = getattr(rotary, "replaced", rotary).inv_freq.double(), hashlib.sha256()
    for tensor in (*model.state_dict().values(), frequency, input_ids):
        digest.update(tensor.detach().cpu().double().numpy().tobytes())
    config = model.config
    about = (config.num_attention_heads, config.layer_norm_eps, config.use_parallel_residual)
    key = (digest.digest(), *about, input_ids.shape, n_sink, window_size, gapped)
    if key not in _found:
        _found[key] = family_reference_logits(
            model, input_ids, n_sink, window_size, gapped=gapped, frequency=frequency
        )
    return _found[key].clone()
