"""Hidden states of many tokens, by recipe: cuBLAS's products, and this library's kernels between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.band import block_attention
from ..attention.kernel_choice import kernel_context
from ..attention.math_kernel import Scores
from ..attention.plan import BlockPlan
from ..attention.torch_kernels import causal_attention
from ..kv_cache import StreamingKVCache
from ..placement import weight_addresses
from ..positions import StreamLayout
from ..rope_utils import Rotary
from .band_attention import band_attention
from .block_heads import norm_and_rotate_
from .elementwise import activated, add_and_norm
from .family_recipes import recipe_of
from .few_rows import are_few, few_rows
from .recipe import MLP, Attention, Linear, Recipe
from .weights import Packed


def product(x: Tensor, linear: Linear) -> Tensor:
    """``x`` ``[..., columns]`` times a matrix of the model, ``[..., rows]``."""
    if are_few(x, linear):
        return few_rows(x, (linear,))
    weight = linear.weight.own if isinstance(linear.weight, Packed) else linear.weight
    return F.linear(x, weight, linear.bias)


def projected(x: Tensor, attention: Attention) -> list[Tensor]:
    """What each projection of an attention layer gives for ``x`` ``[..., hidden]``."""
    outputs = [product(x, linear) for linear in attention.projections]
    if attention.clip is not None:
        for output in outputs:
            output.clamp_(-attention.clip, attention.clip)
    return outputs


def projected_as_one(x: Tensor, attention: Attention) -> Tensor:
    """The outputs of :func:`projected`, one after the other, ``[..., attention.width]``."""
    if are_few(x, attention.projections[0]):
        return few_rows(x, attention.projections, clip=attention.clip)
    outputs = projected(x, attention)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def mlp_output(x: Tensor, mlp: MLP) -> Tensor:
    """The MLP of normed hidden states ``[..., hidden]``."""
    if are_few(x, mlp.up):
        inner = few_rows(x, mlp.first, activation=mlp.activation, gated=mlp.gate is not None)
        return product(inner, mlp.down)
    if mlp.gate_and_up is not None:
        gate, up = product(x, mlp.gate_and_up).chunk(2, dim=-1)
        return product(activated(up, gate, mlp.activation), mlp.down)
    gated = None if mlp.gate is None else product(x, mlp.gate)
    return product(activated(product(x, mlp.up), gated, mlp.activation), mlp.down)


Beside = Callable[[Callable[[], Any]], AbstractContextManager[Any]]
"""Runs work that may run while what stands inside does; gives its result."""


@contextmanager
def in_turn(work: Callable[[], Any]) -> Iterator[Any]:
    """``work``, then what stands inside."""
    yield work()


def through_layers(
    recipe: Recipe,
    x: Tensor,
    attend: Callable[[int, Tensor], Tensor],
    factor: float = 1.0,
    beside: Beside = in_turn,
) -> Tensor:
    """Final hidden states of ``x`` ``[..., hidden]``, in the model's dtype.

    Args:
        x: embeddings, contiguous.
        attend: ``(index, normed hidden states) -> the attention layer's output``, of the shape of ``x``.
        factor: on the embeddings.
        beside: how the MLP of a parallel layer runs, with attention inside.
    """
    adds: tuple[Tensor, ...] = ()
    out_norm, dtype = None, recipe.embedding.dtype
    for index, layer in enumerate(recipe.layers):
        x, normed = add_and_norm(x, adds, layer.norms_of_input, dtype, out_norm=out_norm, factor=factor)
        if layer.parallel:
            with beside(partial(mlp_output, normed[-1], layer.mlp)) as of_mlp:
                attended = attend(index, normed[0])
            adds, out_norm, factor = (attended, of_mlp), None, layer.multiplier
        else:
            attended, factor = attend(index, normed[0]), layer.multiplier
            norms = layer.mlp_norm, layer.attention_out_norm
            x, normed = add_and_norm(x, (attended,), norms[:1], dtype, out_norm=norms[1], factor=factor)
            adds, out_norm = (mlp_output(normed[0], layer.mlp),), layer.mlp_out_norm
    return add_and_norm(x, adds, (recipe.norm,), dtype, out_norm=out_norm, factor=factor)[1][0]


def logits_of(hidden: Tensor, recipe: Recipe, out: Tensor) -> None:
    """Logits of final hidden states ``[n, hidden]``, to ``out`` ``[n, vocab]``."""
    if isinstance(recipe.output.weight, Packed):
        out.copy_(product(hidden, recipe.output))
    else:
        torch.mm(hidden, recipe.output.weight.T, out=out)
        if recipe.output.bias is not None:
            out += recipe.output.bias
    if recipe.logit_scale != 1.0:
        out *= recipe.logit_scale
    if recipe.logit_cap is not None:
        out.div_(recipe.logit_cap).tanh_().mul_(recipe.logit_cap)


class BlockForward:
    """The decoder of a model that has a recipe.

    Args:
        model: see :func:`.recipe_of`.
        own_attention: attention by :func:`.band_attention`, instead of the SDPA kernel that is allowed.
    """

    def __init__(self, model: nn.Module, *, own_attention: bool = False) -> None:
        self.model = model
        self.own = band_attention if own_attention else None
        self._built_for: tuple[Any, ...] = ()

    @property
    def recipe(self) -> Recipe:
        """The model's recipe, made anew when weights have been replaced."""
        built_for = weight_addresses(self.model)
        if built_for != self._built_for:
            self._built_for, self._recipe = built_for, recipe_of(self.model)
        return self._recipe

    def __call__(self, tokens: Tensor, cache: StreamingKVCache | None = None) -> Tensor:
        """Final hidden states ``[batch, length, hidden]``.

        Args:
            tokens: ids ``[batch, length]``, or embeddings ``[batch, length, hidden]``.
            cache: the streams that they continue, all equally far; ``None``: plain causal attention over themselves.
        """
        recipe, length = self.recipe, tokens.shape[1]
        if cache is not None:
            cache.begin(length, attached=True)
        start = 0 if cache is None else cache.get_seq_length()
        positions = torch.arange(start, start + length, device=tokens.device)
        rotaries = {id(layer.attention.rotary): layer.attention.rotary for layer in recipe.layers}
        angles = {key: _angles(rotary, positions) for key, rotary in rotaries.items()}

        def attend(index: int, x: Tensor) -> Tensor:
            attention = recipe.layers[index].attention
            query, key, value = rotated_heads(projected(x, attention), attention, *angles[id(attention.rotary)])
            with kernel_context(attention.module):
                out = self._attended(query, key, value, attention, index, cache)
            return product(out.transpose(1, 2).flatten(2), attention.output)

        if tokens.dim() == 2:
            x, factor = F.embedding(tokens, recipe.embedding), recipe.embedding_scale
        else:
            x, factor = tokens.contiguous(), recipe.given_scale
        hidden = through_layers(recipe, x, attend, factor)
        if cache is not None:
            cache.end()
        return hidden

    def _attended(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention: Attention,
        index: int,
        cache: StreamingKVCache | None,
    ) -> Tensor:
        """``[batch, num_heads, length, head_dim]``; keys and values go to the cache, if there is one."""
        plan, window, length = None, attention.window, query.shape[2]
        if cache is not None:
            key, value = cache.update(key, value, index)
            plan = cache.take_plan(index)
        elif window is not None and length > window:
            plan = BlockPlan(StreamLayout.of_window(window), 0, 0)
        if isinstance(plan, BlockPlan):
            return block_attention(query, key, value, plan, attention.scores, self.own)
        if self.own is None:
            return causal(query, key, value, attention.scores)
        out = query.new_empty(query.transpose(1, 2).shape)
        self.own(query, key, value, out, None, attention.scores, None)
        return out.transpose(1, 2)


def _angles(rotary: Rotary, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[length, rotary_dim / 2]``, float32, with the rotation's factor."""
    angle = positions.double()[:, None] * rotary.inv_freq
    return (angle.cos() * rotary.scaling).float(), (angle.sin() * rotary.scaling).float()


def rotated_heads(outputs: list[Tensor], attention: Attention, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value ``[batch, heads, length, head_dim]``, views of what the projections gave, changed in place.

    Args:
        outputs: ``[batch, length, rows]`` of each projection.
        cos, sin: see :func:`_angles`.
    """
    norm_and_rotate_(outputs, attention, cos, sin)
    heads = tuple(x.unflatten(-1, (-1, attention.head_dim)) for x in outputs)
    if len(heads) == 1:
        heads = attention.places.split(heads[0], attention.num_kv_heads)
    return tuple(x.transpose(1, 2) for x in heads)


def causal(query: Tensor, key: Tensor, value: Tensor, scores: Scores, mask: Tensor | None = None) -> Tensor:
    """A single token attends to all keys, several over themselves, ``[batch, num_heads, length, head_dim]``.

    Args:
        mask: for a single token, see :func:`.mask_of_empty`.
    """
    if scores.softcap is not None:
        return causal_attention(query, key, value, scores, mask).to(query.dtype)
    several, shared = query.shape[2] > 1, query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=several, scale=scores.scale, enable_gqa=shared
    )
