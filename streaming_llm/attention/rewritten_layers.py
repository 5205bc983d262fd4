"""Attention layers of model files that do not use Transformers' attention functions: GPT-J, Falcon, older StableLM.

While a model's attention is switched, such a layer runs a forward of this module: the same projections and the same
cache, but the attention function that the model's configuration names. GPT-J's rotations are computed instead of read
from its table, so that a stream has no end. Nothing is changed here: see :mod:`streaming_llm.attachment`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..families import decoder_of, rotaries_from_model, uses_attention_functions
from ..rope_utils import rotate
from .kernel_choice import unwrapped


class _Rewritten:
    """The forward of a family's attention layers: projected, rotated, attended, and projected again."""

    def __init__(self, model: nn.Module) -> None:
        self.rotary = rotaries_from_model(model)[0]  # in these families all layers rotate alike

    def __call__(
        self,
        layer: Any,
        hidden_states: Tensor,
        *,
        attention_mask: Tensor | None = None,
        layer_past: Any = None,
        past_key_values: Any = None,
        **given: Any,
    ) -> tuple[Tensor, Tensor | None]:
        require_no_mask(attention_mask)
        query, key, value = self.projected(layer, hidden_states)
        cos, sin = (x.unsqueeze(1) for x in self.cos_sin(layer, given))  # [batch, 1, q_len, rotary_dim]
        query, key = (rotate(x, cos, sin, self.rotary) for x in (query, key))
        cache = past_key_values if layer_past is None else layer_past
        if cache is not None:
            key, value = cache.update(key, value, layer.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self.implementation(layer)]
        dropout = self.dropout(layer) if layer.training else 0.0
        out, weights = attend(layer, query, key, value, None, dropout=dropout, scaling=layer.head_dim**-0.5)
        return self.output(layer, out.flatten(2)), weights

    def projected(self, layer: Any, states: Tensor) -> Sequence[Tensor]:
        """Query, key and value ``[batch, heads, q_len, head_dim]`` of ``[batch, q_len, hidden]``."""
        projections = (layer.q_proj, layer.k_proj, layer.v_proj)
        return [p(states).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2) for p in projections]

    def cos_sin(self, layer: Any, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``[batch, q_len, rotary_dim]`` of the tokens' positions, from what the layer was given."""
        cos, sin = given["position_embeddings"]
        return cos, sin

    def implementation(self, layer: Any) -> str:
        """Name of a registered attention function."""
        return layer.config._attn_implementation

    def dropout(self, layer: Any) -> float:
        """Of attention weights, in training."""
        return 0.0

    def output(self, layer: Any, attended: Tensor) -> Tensor:
        """What the layer returns for ``[batch, q_len, num_heads * head_dim]``."""
        raise NotImplementedError


class _GPTJ(_Rewritten):
    """GPT-J: rotation exact at any position, and SDPA where the model's own attention is written out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def cos_sin(self, layer: Any, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        position_ids = given["position_ids"]
        # The layers of a forward share one tensor of positions; a later forward may reuse it with other values.
        if layer.layer_idx == 0 or self._last is None or self._last[0] is not position_ids:
            if self.rotary.inv_freq.device != position_ids.device:
                self.rotary = self.rotary.to(position_ids.device)
            self._last = (position_ids, *self.rotary.cos_sin(position_ids))
        return self._last[1:]

    def implementation(self, layer: Any) -> str:
        return super().implementation(layer).replace("eager", "sdpa")

    def dropout(self, layer: Any) -> float:
        return layer.attn_dropout.p

    def output(self, layer: Any, attended: Tensor) -> Tensor:
        return layer.resid_dropout(layer.out_proj(attended))


class _Falcon(_Rewritten):
    """Falcon with rotary positions: one fused projection in three layouts, keys and values shared or not."""

    def projected(self, layer: Any, states: Tensor) -> list[Tensor]:
        fused = layer.query_key_value(states)  # cut by slices, which a CUDA graph can hold
        if not layer.new_decoder_architecture and not layer.multi_query:
            return [x.squeeze(3).transpose(1, 2) for x in fused.unflatten(-1, (layer.num_heads, 3, -1)).split(1, 3)]
        groups = layer.num_kv_heads if layer.new_decoder_architecture else 1
        shared = layer.num_heads // groups
        parts = fused.unflatten(-1, (groups, shared + 2, layer.head_dim)).split([shared, 1, 1], dim=3)
        return [x.flatten(2, 3).transpose(1, 2) for x in parts]

    def output(self, layer: Any, attended: Tensor) -> Tensor:
        return layer.dense(attended)


class _StableLm(_Rewritten):
    """StableLM before Transformers 5."""

    def projected(self, layer: Any, states: Tensor) -> Sequence[Tensor]:
        query, key, value = super().projected(layer, states)
        if layer.qk_layernorm:
            query, key = layer.q_layernorm(query), layer.k_layernorm(key)
        return query, key, value

    def dropout(self, layer: Any) -> float:
        return layer.attention_dropout.p

    def output(self, layer: Any, attended: Tensor) -> Tensor:
        return layer.o_proj(attended)


REWRITTEN: dict[str, tuple[str, type[_Rewritten]]] = {
    "gptj": ("GPTJAttention", _GPTJ),
    "falcon": ("FalconAttention", _Falcon),
    "stablelm": ("StableLmAttention", _StableLm),
}
"""Model type -> name of its attention layers' class, and their forward in its place."""


def require_no_mask(attention_mask: Tensor | None) -> None:
    """Raise ``ValueError`` if a mask reaches attention that is causal by itself."""
    if attention_mask is not None:
        raise ValueError("a mask was given: attention is causal here, over streams without padding, and takes none")


def refuse_padding(attention_mask: Tensor | None) -> None:
    """Raise ``ValueError`` if a padding mask ``[batch, length]`` hides a token."""
    if attention_mask is not None and not bool(torch.all(attention_mask)):
        raise ValueError(
            "attention_mask hides tokens, which one forward over all rows cannot leave out: use stream.generate(), "
            "stream.prefill(), StreamingDecoder or score_stream(), which take each row by itself, or give all rows of "
            "a batch the same length"
        )


def _make_no_mask(attention_mask: Tensor | None, *args: Any, **kwargs: Any) -> None:
    refuse_padding(attention_mask)


def rewritten_forwards(model: Any) -> list[tuple[nn.Module, str, Callable[..., Any]]]:
    """What makes a model go through the attention function that its configuration names, and make no mask itself.

    Returns:
        ``(module, attribute, value)`` to set on each; empty for a model whose file does all that anyway.

    Raises:
        ValueError: the layers of this family cannot be replaced under the installed Transformers.
    """
    changes: list[tuple[nn.Module, str, Callable[..., Any]]] = [
        (module, "_update_causal_mask", _make_no_mask)  # a file may use the functions and make its own mask still
        for module in model.modules()
        if hasattr(type(module), "_update_causal_mask")
    ]
    if uses_attention_functions(decoder_of(model)):
        return changes
    model_type = model.config.model_type
    if model_type not in REWRITTEN:
        raise ValueError(f"model type {model_type!r} can stream under Transformers 5.0 and later only")
    class_name, rewritten = REWRITTEN[model_type]
    forward = rewritten(model)
    for layer in map(unwrapped, model.modules()):
        if all(kind.__name__ != class_name for kind in type(layer).__mro__):
            continue
        # Accelerate keeps the forward that its hooks call under another name.
        name = "_old_forward" if "_old_forward" in layer.__dict__ else "forward"
        changes.append((layer, name, functools.partial(forward, layer)))
    return changes
