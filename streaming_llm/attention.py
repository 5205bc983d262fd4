"""Attention functions registered with Transformers: no mask is ever built, and blocks of a stream are exact.

Transformers builds a mask in several cases in which none is needed, and CUDA's flash kernel takes none. While a
model is attached, its configuration names an attention function of this module; the model's own one still does
the work of a single query. What is registered stays registered, what is changed on a model is restored.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .banded_attention import block_attention
from .config import StreamingConfig
from .families import FAMILIES
from .kv_cache import ATTACHED
from .math_attention import explicit_attention
from .own_attention import own_attention_replaced, require_no_mask
from .positions import StreamLayout
from .sdpa_kernels import causal_attention, kernel_for, repeat_heads
from .sinks import BlockPlan

MASKLESS = "maskless_"
"""Prefix of the implementation that is causal and never builds a mask."""

DELEGATES = ("sdpa", "eager")
"""Attention implementations of Transformers that can be attached."""


def _delegate(name: str, module: nn.Module) -> Callable:
    """The model's own attention, for one query over all keys."""
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", _explicit)


def _explicit(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, **unused):
    """Eager attention of a layer whose model file has no function of it."""
    key, value = repeat_heads(query, key, "math"), repeat_heads(query, value, "math")
    out, weights = explicit_attention(query, key, value, scaling)
    return out.transpose(1, 2).contiguous(), weights


def _window_plan(window: int, q_len: int, kv_len: int) -> BlockPlan:
    """A sliding window of the model's own, over the last ``kv_len`` tokens: a stream's rule without sinks."""
    layout = StreamLayout(StreamingConfig(0, window - 1))
    return BlockPlan(layout, None, 0, kv_len - q_len, None, None)


def _attention_forward(delegate: str) -> Callable:
    def streaming_attention_forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of ``query`` ``[batch, num_heads, q_len, head_dim]`` over keys from a cache or a plain forward.

        Returns:
            ``[batch, q_len, num_heads, head_dim]`` and, from an eager model with one query, the weights.
        """
        require_no_mask(attention_mask)
        q_len, kv_len = query.shape[2], key.shape[2]
        plan = getattr(key, "streaming_plan", None)
        if sliding_window and kv_len > sliding_window and not hasattr(key, "streaming_plan"):
            if q_len > 1:
                plan = _window_plan(sliding_window, q_len, kv_len)
            else:
                key, value = key[:, :, -sliding_window:], value[:, :, -sliding_window:]
        written_out = softcap is not None and delegate != "eager"
        if plan is None and not written_out and (q_len == 1 or (q_len == kv_len and delegate != "eager")):
            if key.shape[1] != query.shape[1] and not hasattr(module, "num_key_value_groups"):  # nothing else repeats
                key, value = repeat_heads(query, key, "math"), repeat_heads(query, value, "math")
            capping = {} if softcap is None else {"softcap": softcap}
            return _delegate(delegate, module)(
                module, query, key, value, None, scaling=scaling, dropout=dropout, **capping, **kwargs
            )
        if dropout:
            raise ValueError(f"a block of {q_len} tokens cannot have attention dropout {dropout}: use model.eval()")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if plan is not None:
            out = block_attention(query, key, value, plan, scale, softcap)
        else:
            kernel = kernel_for(query, softcap)
            key, value = repeat_heads(query, key, kernel), repeat_heads(query, value, kernel)
            out = causal_attention(query, key, value, scale, kernel, softcap)
        return out.transpose(1, 2).to(query.dtype).contiguous(), None

    return streaming_attention_forward


def refuse_padding(attention_mask: Tensor | None) -> None:
    """Raise ``ValueError`` if a padding mask ``[batch, length]`` hides a token."""
    if attention_mask is not None and not bool(torch.all(attention_mask)):
        raise ValueError(
            "attention_mask hides tokens: a stream cannot be padded. Give all sequences of a batch the same length, "
            "or run them one by one"
        )


def _no_mask(
    *args, attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True, config=None, **sizes
) -> None:
    """The mask function of attached models: none, after making sure that none is needed.

    Raises:
        ValueError: a padding mask hides a token, or attention would be other than causal (packed sequences, a mask
            function of the caller's, a static cache).
    """
    refuse_padding(attention_mask)
    family = FAMILIES.get(getattr(config, "model_type", None))
    asks_for_one = not allow_is_causal_skip and not (family is not None and family.forces_mask)
    if asks_for_one or _has_unwritten_keys(**sizes):
        raise ValueError(
            "packed sequences, mask functions and static caches need a mask, and a streaming model has none: use "
            "consecutive positions and a StreamingKVCache or DynamicCache"
        )


def _has_unwritten_keys(
    q_length: int | None = None, q_offset=0, kv_length: int = 0, kv_offset: int = 0, **other
) -> bool:
    """Whether a cache has more slots than tokens: a static one, which newer Transformers does not announce."""
    if q_length is None:  # older Transformers, which does
        return False
    return isinstance(q_offset, Tensor) or kv_offset + kv_length > q_offset + q_length


for _name in DELEGATES:
    AttentionInterface.register(ATTACHED + _name, _attention_forward(_name))
    AttentionMaskInterface.register(ATTACHED + _name, _no_mask)
    # Without a mask function Transformers neither builds a mask nor looks for packed sequences.
    AttentionInterface.register(MASKLESS + _name, _attention_forward(_name))


class _Switch:
    """The attention implementation that one configuration names, and who has asked for another.

    Configurations may be shared by models, and uses overlap in any order: the last to leave restores.
    """

    _of_config: ClassVar[dict[int, _Switch]] = {}

    def __init__(self, config) -> None:
        self.config = config
        self.original = config._attn_implementation
        self.users = {ATTACHED: 0, MASKLESS: 0}  # the first that has users is in force

    @classmethod
    def change(cls, config, prefix: str, users: int) -> None:
        """Add ``users`` (1 or -1) of ``prefix`` for ``config``."""
        switch = cls._of_config.get(id(config)) or cls(config)
        if switch.original not in DELEGATES:
            raise ValueError(
                f"attention implementation {switch.original!r} cannot be streamed: load the model with "
                f"attn_implementation={' or '.join(map(repr, DELEGATES))}"
            )
        cls._of_config[id(config)] = switch
        switch.users[prefix] += users
        in_force = next((name for name, count in switch.users.items() if count), "")
        # The public name would set those of nested configurations too, which have a switch each.
        config._attn_implementation_internal = in_force + switch.original
        if not in_force:
            del cls._of_config[id(config)]


def _attention_configs(model: nn.Module) -> list:
    """Every configuration object that attention layers of the model may read."""
    configs = {id(c): c for c in (getattr(m, "config", None) for m in model.modules()) if c is not None}
    return [config for config in configs.values() if getattr(config, "_attn_implementation", None) is not None]


@contextmanager
def switched_attention(model: nn.Module, prefix: str) -> Iterator[None]:
    """The model's attention is the one registered with ``prefix`` until leaving.

    Raises:
        ValueError: the model's attention implementation is neither ``sdpa`` nor ``eager``.
    """
    with ExitStack() as stack:
        for config in _attention_configs(model):
            _Switch.change(config, prefix, 1)
            stack.callback(_Switch.change, config, prefix, -1)
        stack.enter_context(own_attention_replaced(model, refuse_padding))
        yield


def maskless_attention(model: nn.Module) -> AbstractContextManager[None]:
    """The model's attention is causal and no mask is built or inspected, so a forward never waits for the GPU.

    For loops without padding, which is not checked: a two-dimensional ``attention_mask`` is not read. Several queries
    over a longer cache are causal with the last query at the last key. The model is restored on leaving; uses may
    overlap.

    Raises:
        ValueError: the model's attention implementation is neither ``sdpa`` nor ``eager``.
    """
    return switched_attention(model, MASKLESS)
