"""Attention functions registered with Transformers: no mask is ever built, and blocks of a stream are exact.

Transformers builds a mask in several cases in which none is needed, and CUDA's flash kernel takes none. While a
model is attached (:mod:`streaming_llm.attachment`), its layers go through an attention function of this module; the
model's own one still does the work of a single query.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..positions import StreamLayout
from . import kernel_choice
from .band import block_attention
from .math_kernel import Scores, explicit_attention
from .plan import BlockPlan, ForwardAtHand, StepPlan
from .rewritten_layers import refuse_padding, require_no_mask
from .torch_kernels import causal_attention, repeat_heads

STREAMING = "streaming_llm_"
"""Prefix of the implementation of a model that streams."""

MASKLESS = "maskless_"
"""Prefix of the implementation that is causal and neither builds nor inspects a mask."""

DELEGATES = ("sdpa", "eager")
"""Attention implementations of Transformers that can be attached."""

FORCES_MASK = ("falcon",)
"""Model types that ask for a mask in every forward, though their attention is plainly causal."""

OF_IMAGES = re.compile("pixel|image|video|audio|input_features")
"""What arguments for images, videos and sound are called."""

AT_HAND = "forward_at_hand"
"""Attribute of the attention layers of an attached model: a :class:`ForwardAtHand` that they share."""

Attended = tuple[Tensor, Tensor | None]
"""``[batch, q_len, num_heads, head_dim]`` and, from an eager model with one query, the weights."""


@dataclass(frozen=True)
class _Call:
    """One call of an attention function.

    Args:
        delegate: name of the model's own attention.
        query: ``[batch, num_heads, q_len, head_dim]``.
        window: sliding window of the model's own.
        rest: what the model's own attention takes beside.
    """

    module: nn.Module
    delegate: str
    query: Tensor
    scores: Scores
    window: int | None
    dropout: float
    rest: dict[str, Any]

    def one_query(self, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Attended:
        """A single query over all keys, or a plain forward over itself: the model's own attention.

        Args:
            mask: see :class:`StepPlan`.
        """
        if not self._own_function_will_do(key, value):
            return self.causal(key, value, mask)
        if key.shape[1] != self.query.shape[1] and not hasattr(self.module, "num_key_value_groups"):
            key, value = repeat_heads(self.query, key, "math"), repeat_heads(self.query, value, "math")
        optional = {"softcap": self.scores.softcap, "s_aux": self.scores.learned}
        optional = {name: value for name, value in optional.items() if value is not None}
        given = {"scaling": self.scores.scale, "dropout": self.dropout, **optional, **self.rest}
        return self._own_function()(self.module, self.query, key, value, mask, **given)

    def _own_function_will_do(self, key: Tensor, value: Tensor) -> bool:
        if self.delegate == "eager":
            return self.scores.learned is None or kernel_choice.choose_kernel(self.query) == "math"
        if self.scores.softcap is not None or self.scores.learned is not None:
            return False  # no kernel of PyTorch's knows of them
        narrow = key.shape[-1] != value.shape[-1]  # DeepSeek's values, which PyTorch's flash kernel does not take
        return not narrow or kernel_choice.choose_kernel(self.query) == "math"

    def _own_function(self) -> Callable[..., Any]:
        if self.delegate != "eager":
            return ALL_ATTENTION_FUNCTIONS[self.delegate]
        return getattr(sys.modules[type(self.module).__module__], "eager_attention_forward", _explicit)

    def one_query_for_each_row(self, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Attended:
        """Rows that see different numbers of keys, those that see as many together: no kernel needs a mask."""
        batch, num_heads, q_len, _ = self.query.shape
        out = self.query.new_empty((batch, q_len, num_heads, value.shape[-1]))
        for length in sorted(set(lengths)):
            rows = torch.tensor([row for row, n in enumerate(lengths) if n == length], device=key.device)
            call = replace(self, query=self.query[rows])
            out[rows] = call.one_query(key[rows, :, :length], value[rows, :, :length])[0]
        return out, None

    def causal(self, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Attended:
        """New tokens after those of a cache that is none of ours, or scores that have to be written out."""
        self._refuse_dropout()
        return self._result(causal_attention(self.query, key, value, self.scores, mask))

    def block(self, key: Tensor, value: Tensor, plan: BlockPlan) -> Attended:
        """Several new tokens, each with a window of its own."""
        self._refuse_dropout()
        return self._result(block_attention(self.query, key, value, plan, self.scores))

    def _refuse_dropout(self) -> None:
        if self.dropout:
            raise ValueError(
                f"a block of {self.query.shape[2]} tokens cannot have attention dropout {self.dropout}: "
                "use model.eval()"
            )

    def _result(self, out: Tensor) -> Attended:
        return out.transpose(1, 2).to(self.query.dtype).contiguous(), None

    def without_stream(self, key: Tensor, value: Tensor) -> Attended:
        """A forward without a streaming cache: causal, within the model's own window."""
        q_len, kv_len = self.query.shape[2], key.shape[2]
        if self.window and kv_len > self.window:
            if q_len > 1:
                return self.block(key, value, BlockPlan(StreamLayout.of_window(self.window), 0, kv_len - q_len))
            key, value = key[:, :, -self.window :], value[:, :, -self.window :]
        if q_len == 1 or (q_len == kv_len and self.delegate != "eager"):
            return self.one_query(key, value)
        return self.causal(key, value)


def _explicit(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **unused: Any
) -> Any:
    """Eager attention of a layer whose model file has no function of it."""
    key, value = repeat_heads(query, key, "math"), repeat_heads(query, value, "math")
    out, weights = explicit_attention(query, key, value, Scores(scaling), None if mask is None else mask == 0)
    return out.transpose(1, 2).contiguous(), weights


def _attention_function(delegate: str) -> Callable[..., Attended]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **rest: Any,
    ) -> Attended:
        """Attention of ``query`` ``[batch, num_heads, q_len, head_dim]`` over keys from a cache or a plain forward."""
        require_no_mask(attention_mask)
        scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
        call = _Call(module, delegate, query, scores, sliding_window, dropout, rest)
        at_hand: ForwardAtHand | None = getattr(module, AT_HAND, None)
        if at_hand is None or at_hand.cache is None:
            return call.without_stream(key, value)
        plan = at_hand.cache.take_plan(module.layer_idx)
        if isinstance(plan, BlockPlan):
            return call.block(*plan.split(key, value))
        assert isinstance(plan, StepPlan)
        if plan.lengths is None:
            return call.one_query(key, value, plan.mask)
        return call.one_query_for_each_row(key, value, plan.lengths)

    return attention


def refuse_images(kwargs: dict[str, Any]) -> None:
    """Raise ``ValueError`` if a forward is given images, videos or sound, whose tokens are not plainly causal."""
    given = [name for name, value in kwargs.items() if isinstance(value, Tensor) and OF_IMAGES.search(name)]
    if given:
        raise ValueError(
            f"a stream is of text, and {', '.join(given)} was given: leave images, videos and sound out, or give "
            "their embeddings among those of the text as inputs_embeds"
        )


def _no_mask(
    *args: Any,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    q_length: int | None = None,
    q_offset: Any = 0,
    kv_length: int = 0,
    kv_offset: int = 0,
    **other: Any,
) -> None:
    """The mask function of attached models: none, after making sure that none is needed.

    Raises:
        ValueError: a padding mask hides a token, or attention would be other than causal (packed sequences, a mask
            function of the caller's, a static cache).
    """
    refuse_padding(attention_mask)
    asks_for_one = not allow_is_causal_skip and getattr(config, "model_type", None) not in FORCES_MASK
    # A static cache has more slots than tokens. Older Transformers, which gives no lengths, announces it.
    is_static = q_length and (isinstance(q_offset, Tensor) or kv_offset + kv_length > q_offset + q_length)
    if asks_for_one or is_static:
        raise ValueError(
            "packed sequences, mask functions and static caches need a mask, and a streaming model has none: use "
            "consecutive positions and a StreamingKVCache or DynamicCache"
        )


for _name in DELEGATES:
    AttentionInterface.register(STREAMING + _name, _attention_function(_name))
    AttentionMaskInterface.register(STREAMING + _name, _no_mask)
    # Without a mask function Transformers neither builds a mask nor looks for packed sequences.
    AttentionInterface.register(MASKLESS + _name, _attention_function(_name))
