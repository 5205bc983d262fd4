"""Other places for the tokens that StreamingLLM keeps, measured beside it.

StreamingLLM gives kept tokens their positions in the cache, exactly. `gapped` leaves every token at its position in
the stream, as engines with append-only caches do: the distance to the sinks grows without end. `rerotated` gives
positions in the cache as a naive implementation does: at every step each kept key is turned back by one position, in
the model's dtype, and rounded, up to W times in its life.
"""

import functools
from contextlib import ExitStack

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from experiments.method_base import Cached, Capturing, MethodSettings
from experiments.perplexity import token_losses
from streaming_llm import StreamingConfig, StreamingKVCache
from streaming_llm.attachment import attached
from streaming_llm.blockwise import BlockScorer, in_blocks
from streaming_llm.engines import make_engine
from streaming_llm.engines.blocks import block_forward, default_block_size, feed_rows
from streaming_llm.families import UNROTATED, last_logits, layer_windows, rotaries_from_model, transformers_model
from streaming_llm.rope_utils import Rotary


def model_call_engine(engine: str) -> str:
    """The engine of a method that only the model's own call computes, where `engine` is chosen."""
    return "eager" if engine == "eager" else "graph"


class Gapped(Cached):
    """Sinks and window, every token at its position in the stream.

    A streaming cache of a rotation of no dimensions: the model rotates the keys, and the cache turns no sink.
    """

    name, label = "gapped", "Gapped"
    engine_for = staticmethod(model_call_engine)

    def _attach(self, stack: ExitStack) -> None:
        stack.enter_context(attached(self.model))
        self._cache = self._new_cache()
        self._runner = make_engine(self.model, self._cache, self.settings.engine)

    def _new_cache(self) -> StreamingKVCache:
        sizes = StreamingConfig(self.settings.n_sink, self.settings.window_size)
        return StreamingKVCache(transformers_model(self.model).config, config=sizes, rotary=UNROTATED)

    def prefill(self, ids: Tensor) -> Tensor:
        hidden = feed_rows(self.model, self._cache, list(ids), block_forward(self.model, "eager"))
        return last_logits(transformers_model(self.model), hidden)

    def score(self, ids: Tensor) -> Tensor:
        with attached(self.model):
            scorer = BlockScorer(self.model, self._new_cache(), engine="eager")
            size = default_block_size(self.settings.window_size, self.model)
            return torch.cat([scorer.score(block)[0] for block in in_blocks(ids, size)], dim=1).float()


class Rerotated(Capturing):
    """Sinks and window at their positions in the cache, every key turned back at every step in the model's dtype."""

    name, label = "rerotated", "Re-rotated"
    parallel = True
    engine_for = staticmethod(model_call_engine)

    def __init__(self, model, settings: MethodSettings):
        super().__init__(model, settings)
        if any(layer_windows(transformers_model(model).config)):
            raise ValueError("re-rotation at every step is not defined beside sliding windows of the model's own")

    def _attach(self, stack: ExitStack) -> None:
        super()._attach(stack)
        device = self.model.get_input_embeddings().weight.device
        sizes = (self.settings.n_sink, self.settings.cache_size)
        rotaries = [rotary.to(device) for rotary in rotaries_from_model(transformers_model(self.model))]
        self._cache = Cache(layers=[_ShiftedLayer(rotary, *sizes) for rotary in rotaries])
        self._last_position = torch.full((1, 1), self.settings.cache_size, device=device)

    def reset(self) -> None:
        for layer in self._cache.layers:
            layer.reset()

    def prefill(self, ids: Tensor) -> Tensor:
        return self._forward(ids, torch.arange(ids.shape[1], device=ids.device)[None])

    def step(self, ids: Tensor) -> Tensor:
        if self._n_kept <= self.settings.cache_size:
            return self._forward(ids[:, None], torch.full_like(self._last_position, self._n_kept))
        if self.engine == "eager":
            return self._evicting(ids[:, None])
        return self._by_capture(self._evicting, ids[:, None], self._slots())

    @property
    def _n_kept(self) -> int:
        return self._cache.get_seq_length()

    def _evicting(self, ids: Tensor) -> Tensor:
        return self._forward(ids, self._last_position)

    def _forward(self, ids: Tensor, position_ids: Tensor) -> Tensor:
        given = {"past_key_values": self._cache, "use_cache": True, "position_ids": position_ids}
        return self.model(ids, **given, logits_to_keep=1).logits[:, -1]

    def _slots(self) -> list[Tensor]:
        """Keys and values of every layer; trial runs of a capture evict some."""
        return [x for layer in self._cache.layers for x in (layer.slots_of_keys, layer.slots_of_values)]

    @property
    def kv_cache_nbytes(self) -> int:
        return self._n_kept * self.kv_bytes_per_token

    @property
    def kv_bytes_per_token(self) -> int:
        return sum(x.numel() * x.element_size() // x.shape[2] for x in self._slots() if x is not None)

    def score(self, ids: Tensor) -> Tensor:
        """See `Method.score`, but token by token: a key's n-th rounding cannot be had in one step."""
        with self:
            return token_losses(self, ids)[None].float()


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


class _ShiftedLayer(CacheLayerMixin):
    """One layer's keys and values in the order of their positions, `[1, num_kv_heads, S + W + 1, head_dim]`."""

    is_compileable = False
    is_sliding = False

    def __init__(self, rotary, n_sink: int, cache_size: int):
        super().__init__()
        self.is_initialized = False
        self.rotary, self.n_sink, self.cache_size = rotary, n_sink, cache_size
        self.n_kept = 0
        self.slots_of_keys: Tensor | None = None
        self.slots_of_values: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        with torch.inference_mode(False):  # steps that are recorded outside of it write to these too
            self.slots_of_keys, self.slots_of_values = (
                x.new_zeros((*x.shape[:2], self.cache_size + 1, x.shape[3])) for x in (key_states, value_states)
            )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store new tokens; a full layer evicts the oldest behind the sinks and turns the others back by one."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.slots_of_keys, self.slots_of_values
        if self.n_kept == self.cache_size + 1:
            older = slice(self.n_sink + 1, None)
            moved = turned_back(keys[:, :, older], self.rotary), values[:, :, older].clone()
            for slots, before, new in zip((keys, values), moved, (key_states, value_states), strict=True):
                slots[:, :, self.n_sink : -1] = before
                slots[:, :, -1:] = new
        else:
            end = self.n_kept + key_states.shape[2]
            keys[:, :, self.n_kept : end], values[:, :, self.n_kept : end] = key_states, value_states
            self.n_kept = end
        return keys[:, :, : self.n_kept], values[:, :, : self.n_kept]

    def reset(self) -> None:
        self.n_kept = 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.n_kept

    def get_mask_sizes(self, cache_position: Tensor | int) -> tuple[int, int]:
        """No mask is built."""
        return self.cache_size + 1, 0

    def get_max_length(self) -> int:
        """Tokens held at most."""
        return self.cache_size + 1

    get_max_cache_shape = get_max_length
