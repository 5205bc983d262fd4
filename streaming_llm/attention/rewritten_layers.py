"""Attention layers of model files that do not use Transformers' attention functions: GPT-J, Falcon, older StableLM.

While a model's attention is switched, such a layer runs a forward of this module: the same projections and the same
cache, but the attention function that the model's configuration names. GPT-J's rotations are computed instead of read
from its table, so that a stream has no end. Nothing is changed here: see :mod:`streaming_llm.attachment`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..families import decoder_of, rotary_from_model, uses_attention_functions
from ..rope_utils import Rotary, rotate
from .kernel_choice import unwrapped


def attend(
    layer: nn.Module,
    implementation: str,
    states: tuple[Tensor, Tensor, Tensor],
    layer_past,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor | None]:
    """Store new keys and values and attend.

    Args:
        implementation: name of a registered attention function.
        states: rotated query, rotated key, value, ``[batch, heads, q_len, head_dim]``.
        layer_past: the cache, or ``None``.

    Returns:
        ``[batch, q_len, num_heads * head_dim]``, and what weights the function returns.
    """
    query, key, value = states
    if layer_past is not None:
        key, value = layer_past.update(key, value, layer.layer_idx)
    function = ALL_ATTENTION_FUNCTIONS[implementation]
    dropout = dropout if layer.training else 0.0
    out, weights = function(layer, query, key, value, None, dropout=dropout, scaling=scaling)
    return out.flatten(2), weights


def _heads(states: Tensor, head_dim: int) -> Tensor:
    """``[batch, q_len, heads * head_dim]`` as ``[batch, heads, q_len, head_dim]``."""
    return states.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [batch, 1, q_len, rotary_dim]
    return rotate(query, cos, sin, rotary), rotate(key, cos, sin, rotary)


class _GPTJ:
    """GPT-J: rotation exact at any position, and SDPA where the model's own attention is written out."""

    def __init__(self, model: nn.Module) -> None:
        self.rotary = rotary_from_model(model)
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def _cos_sin(self, layer: nn.Module, positions: Tensor) -> tuple[Tensor, Tensor]:
        # The layers of a forward share one tensor of positions; a later forward may reuse it with other values.
        if layer.layer_idx == 0 or self._last is None or self._last[0] is not positions:
            if self.rotary.inv_freq.device != positions.device:
                self.rotary = self.rotary.to(positions.device)
            self._last = (positions, *self.rotary.cos_sin(positions))
        return self._last[1:]

    def __call__(
        self,
        layer: nn.Module,
        hidden_states: Tensor,
        layer_past=None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **unused,
    ) -> tuple[Tensor, Tensor | None]:
        require_no_mask(attention_mask)
        query, key, value = (
            _heads(p(hidden_states), layer.head_dim) for p in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        query, key = _rotated(query, key, *self._cos_sin(layer, position_ids), self.rotary)
        implementation = layer.config._attn_implementation.replace("eager", "sdpa")
        scaling = layer.head_dim**-0.5
        out, weights = attend(layer, implementation, (query, key, value), layer_past, scaling, layer.attn_dropout.p)
        return layer.resid_dropout(layer.out_proj(out)), weights


class _Falcon:
    """Falcon with rotary positions: one fused projection in three layouts, keys and values shared or not."""

    def __init__(self, model: nn.Module) -> None:
        self.rotary = rotary_from_model(model)

    def __call__(
        self,
        layer: nn.Module,
        hidden_states: Tensor,
        alibi: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        layer_past=None,
        *args,
        position_embeddings: tuple[Tensor, Tensor],
        **unused,
    ) -> tuple[Tensor, Tensor | None]:
        require_no_mask(attention_mask)
        query, key, value = self._split(layer, layer.query_key_value(hidden_states))
        query, key = _rotated(query, key, *position_embeddings, self.rotary)
        scaling = layer.head_dim**-0.5
        implementation = layer.config._attn_implementation
        out, weights = attend(layer, implementation, (query, key, value), layer_past, scaling, dropout=0.0)
        return layer.dense(out), weights

    @staticmethod
    def _split(layer: nn.Module, fused: Tensor) -> list[Tensor]:
        """Query, key and value ``[batch, heads, length, head_dim]``, by slices, which a CUDA graph can hold."""
        if not layer.new_decoder_architecture and not layer.multi_query:
            return [x.squeeze(3).transpose(1, 2) for x in fused.unflatten(-1, (layer.num_heads, 3, -1)).split(1, 3)]
        groups = layer.num_kv_heads if layer.new_decoder_architecture else 1
        shared = layer.num_heads // groups
        parts = fused.unflatten(-1, (groups, shared + 2, layer.head_dim)).split([shared, 1, 1], dim=3)
        return [x.flatten(2, 3).transpose(1, 2) for x in parts]


class _StableLm:
    """StableLM before Transformers 5."""

    def __init__(self, model: nn.Module) -> None:
        self.rotary = rotary_from_model(model)

    def __call__(
        self,
        layer: nn.Module,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        *args,
        position_embeddings: tuple[Tensor, Tensor],
        **unused,
    ) -> tuple[Tensor, Tensor | None]:
        require_no_mask(attention_mask)
        query, key, value = (
            _heads(p(hidden_states), layer.head_dim) for p in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        if layer.qk_layernorm:
            query, key = layer.q_layernorm(query), layer.k_layernorm(key)
        query, key = _rotated(query, key, *position_embeddings, self.rotary)
        scaling, dropout = layer.head_dim**-0.5, layer.attention_dropout.p
        implementation = layer.config._attn_implementation
        out, weights = attend(layer, implementation, (query, key, value), past_key_values, scaling, dropout)
        return layer.o_proj(out), weights


REWRITTEN: dict[str, tuple[str, Callable[[nn.Module], Callable]]] = {
    "gptj": ("GPTJAttention", _GPTJ),
    "falcon": ("FalconAttention", _Falcon),
    "stablelm": ("StableLmAttention", _StableLm),
}
"""Model type -> class of its attention layers, and what makes their forward where it does without those functions."""


def require_no_mask(attention_mask: Tensor | None) -> None:
    """Raise ``ValueError`` if a mask reaches attention that is causal by itself."""
    if attention_mask is not None:
        raise ValueError("a mask was given: attention is causal here, over streams without padding, and takes none")


def _attention_layers(model: nn.Module, name: str) -> list[nn.Module]:
    """Attention layers of the model; where a kernel adapter has taken a layer's place, the layer in it."""
    layers = map(unwrapped, model.modules())
    return [layer for layer in layers if any(kind.__name__ == name for kind in type(layer).__mro__)]


def rewritten_forwards(
    model: nn.Module, check_mask: Callable[[Tensor | None], None]
) -> list[tuple[nn.Module, str, Callable]]:
    """What makes a model go through the attention function that its configuration names, and make no mask itself.

    Args:
        check_mask: called with the two-dimensional mask of a forward, where a model makes its masks itself.

    Returns:
        ``(module, attribute, value)`` to set on each; empty for a model whose file does all that anyway.

    Raises:
        ValueError: the layers of this family cannot be replaced under the installed Transformers.
    """

    def update_causal_mask(attention_mask: Tensor | None, *args, **kwargs) -> None:
        check_mask(attention_mask)

    changes: list[tuple[nn.Module, str, Callable]] = [
        (module, "_update_causal_mask", update_causal_mask)  # a file may use the functions and make its own mask still
        for module in model.modules()
        if hasattr(type(module), "_update_causal_mask")
    ]
    if uses_attention_functions(decoder_of(model)):
        return changes
    model_type = model.config.model_type
    if model_type not in REWRITTEN:
        raise ValueError(f"model type {model_type!r} can stream under Transformers 5.0 and later only")
    class_name, make_forward = REWRITTEN[model_type]
    forward = make_forward(model)
    for layer in _attention_layers(model, class_name):
        # Accelerate keeps the forward that its hooks call under another name.
        name = "_old_forward" if "_old_forward" in layer.__dict__ else "forward"
        changes.append((layer, name, functools.partial(forward, layer)))
    return changes
