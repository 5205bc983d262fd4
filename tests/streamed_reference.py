"""A slow, independent path for every model type: StreamingLLM's attention written from its definition, in float64.

The model's own projections, norms, experts and recurrent layers run in float64, token by token; every token is put at
position 0, where a rotation does nothing. What reaches attention is thus not rotated. It is cached in lists, and at
every step rotated to its position in the cache, as the original implementation does, by `family_reference.rotated`.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field

import torch
from family_reference import rotated
from torch import Tensor, nn
from transformers import AttentionInterface

from streaming_llm.families import family_of_model, layer_windows, lm_head, rotaries_from_model
from streaming_llm.families.native_cache import native_cache
from streaming_llm.families.parts import decoder_of

NAME = "test_streamed_reference"


@dataclass
class _Layer:
    """What a layer has kept: keys and values ``[batch, heads, dim]``, without rotation."""

    frequency: Tensor
    neighbours: bool
    offset: int
    n_sink: int
    kept: int
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        """``x`` ``[batch, heads, n, dim]`` rotated to ``positions`` ``[n]``."""
        turned = rotated(x[..., self.offset :], positions, self.frequency, self.neighbours)
        return torch.cat((x[..., : self.offset], turned), dim=-1)


_layers: dict[int, _Layer] = {}
_sources: dict[int, int] = {}
"""Layers that attend to what another one keeps."""


def _attend(module: nn.Module, query, key, value, attention_mask=None, scaling=None, softcap=None, s_aux=None, **rest):
    layer = _layers[module.layer_idx]
    if module.layer_idx not in _sources:
        if len(layer.keys) > layer.kept:
            del layer.keys[layer.n_sink], layer.values[layer.n_sink]
        layer.keys.append(key[:, :, 0])
        layer.values.append(value[:, :, 0])
    n = len(layer.keys)
    keys = layer.turned(torch.stack(layer.keys, dim=2), torch.arange(n))
    values = torch.stack(layer.values, dim=2)
    groups = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    scores = layer.turned(query, torch.tensor([n - 1])) @ keys.transpose(2, 3)
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if s_aux is not None:
        scores = torch.cat((scores, s_aux.to(scores).view(1, -1, 1, 1).expand(len(scores), -1, 1, 1)), dim=-1)
    weights = scores.softmax(-1)[..., :n]
    return (weights @ values).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attend)


@torch.no_grad()
def streamed_logits(model, input_ids: Tensor, n_sink: int, window_size: int) -> Tensor:
    """Float64 logits ``[batch, length, vocab]`` of ``input_ids`` fed one by one to a copy of ``model``."""
    rotaries, windows = rotaries_from_model(model), layer_windows(model.config)
    family, model = family_of_model(model), copy.deepcopy(model).double()
    mixed = None in windows and any(windows)
    _layers.clear()
    _sources.clear()
    for index, rotary, window in zip(family.stores, rotaries, windows, strict=True):
        rule = (0, window - 1) if window and mixed else (n_sink, n_sink + window_size)
        _layers[index] = _Layer(rotary.inv_freq, rotary.interleaved, rotary.offset, *rule)
    for index, source in family.sources.items():
        _layers[index], _sources[index] = _layers[source], source
    for module in model.modules():
        if "config" in vars(module):
            module.config._attn_implementation_internal = NAME
    decoder = decoder_of(model)
    cache = native_cache(decoder, len(input_ids), "cpu", torch.float64)
    cache.update = lambda key, value, *args, **kwargs: (key, value)
    takes_position = takes_cache_position(decoder)
    zero, logits = torch.zeros(1, 1, dtype=torch.int64), []
    for t, token in enumerate(input_ids.T):
        # Lfm2 of some versions puts a state elsewhere while this is smaller than its convolution is long.
        given = {"cache_position": torch.tensor([t and t + 50])} if family.has_state and takes_position else {}
        hidden = decoder(
            input_ids=token[:, None], position_ids=zero, past_key_values=cache, use_cache=True, **given
        ).last_hidden_state
        logits.append(lm_head(model, hidden))
    return torch.cat(logits, dim=1)


def takes_cache_position(decoder: nn.Module) -> bool:
    """Whether this Transformers tells recurrent layers by it that they go on."""
    return "cache_position" in inspect.signature(type(decoder).forward).parameters
