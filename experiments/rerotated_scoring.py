"""Losses of a stream whose keys are turned back by one position at every step, all tokens at once.

A key's value after n turns is its rotation rounded n times, which cannot be had in one step. But all keys can take
their n-th turn together: after it, token t meets the one key that has made as many turns by then. The whole stream
goes through the model in one forward with an attention that works by turns instead of by tokens.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from streaming_llm.families import decoder_of, rotaries_from_model, transformers_model
from streaming_llm.losses import token_nll
from streaming_llm.rope_utils import Rotary

QUERIES_AT_A_TIME = 16384
_NAME = "rerotated"


@functools.lru_cache(maxsize=16)
def _one_back(rotary: Rotary, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine `[rotary_dim]` of a turn by -1 position."""
    with torch.inference_mode(False):
        return tuple(x.to(dtype) for x in rotary.cos_sin(-1))


def turned_back(keys: Tensor, rotary: Rotary) -> Tensor:
    """Keys `[..., head_dim]` turned by -1 position with cosines, products and sums in their own dtype."""
    cos, sin = _one_back(rotary, keys.dtype)
    turned, passed = keys[..., : rotary.rotary_dim], keys[..., rotary.rotary_dim :]
    return torch.cat((turned * cos + rotary.quarter_turn(turned) * sin, passed), dim=-1)


@torch.no_grad()
def rerotated_losses(model, ids: Tensor, n_sink: int, window_size: int) -> Tensor:
    """Losses `[1, N - 1]` in nats, float32, of ids `[1, N]` on the model's device.

    Raises ValueError for a model whose scores are soft-capped, or whose attention cannot be replaced.
    """
    model = transformers_model(model)
    positions = torch.arange(ids.shape[1], device=ids.device).clamp(max=n_sink + window_size)
    turns = _Turns(model, n_sink, window_size)
    with _attention(model, turns):
        hidden = decoder_of(model)(ids, position_ids=positions[None], use_cache=False).last_hidden_state
    if turns.n_calls != len(turns.rotaries):
        raise ValueError(f"{type(model).__name__} does not let its attention be replaced: score it token by token")
    return token_nll(model, hidden[:, :-1], ids[:, 1:]).float()


@contextmanager
def _attention(model, function) -> Iterator[None]:
    """The model's layers go through `function`."""
    before = model.config._attn_implementation
    AttentionInterface.register(_NAME, function)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS._global_mapping[_NAME]


class _Turns:
    """Attention of a whole stream, queries and keys rotated to where each token enters the cache."""

    def __init__(self, model, n_sink: int, window_size: int):
        self.n_sink, self.window, self.full = n_sink, window_size, n_sink + window_size
        device = model.get_input_embeddings().weight.device
        self.rotaries = [rotary.to(device) for rotary in rotaries_from_model(model)]
        self.n_calls = 0

    def __call__(self, module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **given):
        """Query `[1, num_heads, N, head_dim]`, key and value `[1, num_kv_heads, N, head_dim]`.

        Returns `[1, N, num_heads, head_dim]` and no weights.
        """
        if given.get("softcap") is not None:
            raise ValueError("re-rotated scoring has no soft-capped scores")
        self.n_calls += 1
        scale = given.get("scaling")
        query = query[0] * (query.shape[-1] ** -0.5 if scale is None else scale)
        query = query.unflatten(0, (key.shape[1], -1))  # [num_kv_heads, groups, N, head_dim]
        rotary = self.rotaries[module.layer_idx]
        parts = [
            self._queries(query, key[0], value[0], start, min(start + QUERIES_AT_A_TIME, query.shape[2]), rotary)
            for start in range(0, query.shape[2], QUERIES_AT_A_TIME)
        ]
        return torch.cat(parts, dim=2).flatten(0, 1).transpose(0, 1)[None].to(value.dtype), None

    def _queries(self, query: Tensor, key: Tensor, value: Tensor, start: int, end: int, rotary: Rotary) -> Tensor:
        """Outputs `[num_kv_heads, groups, n, head_dim]` of the queries from `start` to `end`, float32 or better."""
        n_sink, window = self.n_sink, self.window
        first = max(0, start - window)
        dtype = torch.promote_types(query.dtype, torch.float32)
        query, keys = query[:, :, start:end].to(dtype), key[:, first:end]
        values = value[:, first:end].to(dtype)
        # The last column of `scores` is of the token itself, the one before it of the token before, ...
        scores = query.new_full((*query.shape[:3], window + 1), -torch.inf)
        for n_turns in range(window + 1):
            of_keys = keys.to(dtype)
            low = max(start, self.full + n_turns)  # keys that entered a full cache: those n_turns tokens back
            if low < end:
                met = of_keys[:, None, low - n_turns - first : end - n_turns - first]
                scores[:, :, low - start :, window - n_turns] = (query[:, :, low - start :] * met).sum(-1)
            # Keys of the first tokens have made as many turns as tokens have been evicted.
            for token in range(0, self.full + 1) if n_turns == 0 else (self.full + n_turns,):
                oldest, newest = max(n_sink, token - window), min(token, self.full - 1)
                if start <= token < end and oldest <= newest:
                    met = of_keys[:, None, oldest - first : newest + 1 - first]
                    found = (query[:, :, token - start, None] * met).sum(-1)
                    columns = slice(window - (token - oldest), window - (token - newest) + 1)
                    scores[:, :, token - start, columns] = found
            keys = turned_back(keys, rotary)
        of_sinks = query @ key[:, None, :n_sink].to(dtype).transpose(2, 3)
        tokens = torch.arange(start, end, device=query.device)[:, None]
        seen = torch.arange(of_sinks.shape[-1], device=query.device) <= tokens
        weights = torch.cat((of_sinks.masked_fill(~seen, -torch.inf), scores), dim=-1).softmax(-1)
        out = weights[..., : of_sinks.shape[-1]] @ value[:, None, :n_sink].to(dtype)
        weights = weights[..., of_sinks.shape[-1] :]
        for distance in range(window + 1):
            low = max(start, distance)
            if low < end:
                met = values[:, None, low - distance - first : end - distance - first]
                out[:, :, low - start :] += weights[:, :, low - start :, window - distance, None] * met
        return out
