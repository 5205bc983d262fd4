"""A small random model that rotates as the one of a configuration does: as many layers, heads of the same size."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from .table import value_of

VOCAB = 8
SMALLER = {
    r"(intermediate|ffn)\w*(size|dim)$|^n_inner$": 16,
    r"^(moe_)?(num|n)_(local_|routed_)?experts$": 4,
    r"^(num_experts_per_tok|moe_topk|moe_k|top_k_experts|num_experts_per_token)$": 1,
    r"^(n_group|topk_group)$": 1,
    r"_token_id$": 0,
}
"""Pattern of a name -> what takes the place of such a value, or of each in a list: widths, experts, ids of tokens."""


def decoder_class(config: Any) -> type[nn.Module] | None:
    """The class of the decoder of a language model's configuration; ``None`` if Transformers has none."""
    try:
        found = MODEL_MAPPING[type(config)]
    except KeyError:
        return None
    return found[0] if isinstance(found, tuple) else found


def small_config(config: Any) -> Any:
    """The configuration of a language model, narrowed: what concerns positions, layers and heads' sizes stays."""
    small = copy.deepcopy(config)
    for name, value in _narrowed(small).items():
        if name in _attributes(small):
            setattr(small, name, value)
    for name, value in _attributes(small).items():
        for pattern, smaller in SMALLER.items():
            if value and re.search(pattern, name):
                setattr(small, name, [smaller] * len(value) if isinstance(value, (list, tuple)) else smaller)
    return small


def _attributes(config: Any) -> dict[str, Any]:
    aliases = {alias: value_of(config, alias) for alias in config.attribute_map}
    return dict(vars(config)) | aliases


def _narrowed(config: Any) -> dict[str, Any]:
    n_heads = config.num_attention_heads
    n_keys = value_of(config, "num_key_value_heads") or value_of(config, "num_kv_heads") or n_heads
    head_dim = value_of(config, "head_dim") or config.hidden_size // n_heads
    hidden = 2 * head_dim
    values = {"hidden_size": hidden, "vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB}
    if not getattr(config, "is_heterogeneous", False):  # else each layer may have its own numbers of heads
        n_small = 1 if n_keys < n_heads else 2
        values |= {"num_attention_heads": 2, "num_key_value_heads": n_small, "num_kv_heads": n_small}
    return values | _of_recurrent_layers(config, hidden)


def _of_recurrent_layers(config: Any, hidden: int) -> dict[str, Any]:
    """Numbers of heads of recurrent layers, which have to fit the width."""
    values: dict[str, Any] = {"chunk_size": 2, "mamba_chunk_size": 2, "mamba_d_state": 2, "ssm_state_size": 2}
    values["lru_width"] = hidden
    head_dim, expand = getattr(config, "mamba_d_head", None), getattr(config, "mamba_expand", None)
    if isinstance(head_dim, int) and expand:
        inner = -(-expand * hidden // head_dim) * head_dim
        values |= {"mamba_n_heads": inner // head_dim, "mamba_n_groups": 1}
        if getattr(config, "mamba_d_ssm", None):
            values["mamba_d_ssm"] = inner
    if getattr(config, "mamba_head_dim", None):
        values |= {"mamba_num_heads": 2, "n_groups": 1}
    if getattr(config, "linear_num_value_heads", None):
        values |= {"linear_num_value_heads": 2, "linear_num_key_heads": 1}
    return values


def small_model(model_class: type[nn.Module], config: Any) -> nn.Module:
    """A model of random weights in float32 on the CPU, always the same; leaves the caller's random numbers alone."""
    small = small_config(config)
    small._attn_implementation = "eager"
    with torch.random.fork_rng([]), torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return model_class(small).eval().float()
