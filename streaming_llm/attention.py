"""Attention functions registered with Transformers: no mask is ever built, and blocks of a stream are exact.

Transformers builds a mask in several cases in which none is needed, and CUDA's flash kernel takes none. While a
model is attached, its configuration names an attention function of this module; the model's own one still does
the work of a single query. What is registered stays registered, what is changed on a model is restored.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .banded_attention import block_attention, causal_attention, choose_kernel, repeat_heads

PREFIX = "streaming_llm_"
DELEGATES = ("sdpa", "eager")
"""Attention implementations of Transformers that can be attached."""


def _delegate(name: str, module: nn.Module) -> Callable:
    if name == "eager":  # each model file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


def _attention_forward(delegate: str) -> Callable:
    def streaming_attention_forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of ``query`` ``[batch, num_heads, q_len, head_dim]`` over keys from a cache or a plain forward.

        Returns:
            ``[batch, q_len, num_heads, head_dim]`` and, from an eager model with one query, the weights.
        """
        q_len, kv_len = query.shape[2], key.shape[2]
        plan = getattr(key, "streaming_plan", None)
        if plan is None and (q_len == 1 or (q_len == kv_len and delegate != "eager")):
            return _delegate(delegate, module)(
                module, query, key, value, None, scaling=scaling, dropout=dropout, **kwargs
            )
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if plan is not None:
            out = block_attention(query, key, value, plan, scale)
        else:
            kernel = choose_kernel(query)
            key, value = repeat_heads(query, key, kernel), repeat_heads(query, value, kernel)
            out = causal_attention(query, key, value, scale, kernel)
        return out.transpose(1, 2).contiguous(), None

    return streaming_attention_forward


def _no_mask(*args, attention_mask: Tensor | None = None, **kwargs) -> None:
    """The mask function: none, after making sure that nothing is padded.

    Raises:
        ValueError: a padding mask hides a token.
    """
    if attention_mask is not None and not bool(torch.all(attention_mask)):
        raise ValueError(
            "attention_mask hides tokens: a stream cannot be padded. Give all sequences of a batch the same length, "
            "or run them one by one"
        )


for _name in DELEGATES:
    AttentionInterface.register(PREFIX + _name, _attention_forward(_name))
    AttentionMaskInterface.register(PREFIX + _name, _no_mask)


def _attention_configs(model: nn.Module) -> list:
    """Every configuration object that attention layers of the model may read."""
    configs = {id(c): c for c in (getattr(m, "config", None) for m in model.modules()) if c is not None}
    return list(configs.values())


@contextmanager
def maskless_attention(model: nn.Module) -> Iterator[None]:
    """The model's attention is causal and never builds or inspects a mask, so a forward never waits for the GPU.

    For loops without padding. Several queries over a longer cache are causal with the last query at the last key.
    The model is restored on leaving. Entering a second time does nothing.

    Raises:
        ValueError: the model's attention implementation is neither ``sdpa`` nor ``eager``.
    """
    changed = []
    try:
        for config in _attention_configs(model):
            name = config._attn_implementation
            if name is None or name.startswith(PREFIX):
                continue
            if name not in DELEGATES:
                raise ValueError(
                    f"attention implementation {name!r} cannot be streamed: load the model with "
                    f"attn_implementation={' or '.join(map(repr, DELEGATES))}"
                )
            changed.append((config, name))
            config._attn_implementation = PREFIX + name
        yield
    finally:
        for config, name in changed:
            config._attn_implementation = name
