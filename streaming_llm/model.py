"""StreamingLLMWrapper: a model made to stream, and made as it was again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from .attention import refuse_padding, switched_attention
from .config import StreamingConfig, require_int
from .families import family_of, module_angles, require_window_fits, rotaries_from_model, rotary_modules
from .kv_cache import ATTACHED, StreamingKVCache
from .rope_utils import ExactRotaryEmbedding


class Attachment:
    """What streaming changes on one model: its attention functions and its rotary modules.

    It does not depend on sinks or window, so wrappers and decoders of one model share it; the last to leave
    restores the model.
    """

    _active: ClassVar[dict[int, Attachment]] = {}  # by the model's id; a changed model is alive until restored

    def __init__(self, model: nn.Module) -> None:
        family = family_of(model.config)
        self._model_id = id(model)
        self._users = 0
        with ExitStack() as stack:
            stack.enter_context(switched_attention(model, ATTACHED))
            for found in rotary_modules(model):
                exact = ExactRotaryEmbedding(found.module, module_angles(found, family))
                setattr(found.parent, found.name, exact)
                stack.callback(setattr, found.parent, found.name, found.module)
            self._restore = stack.pop_all()

    @classmethod
    def enter(cls, model: nn.Module) -> Attachment:
        """Attach ``model``, or join those who have."""
        attachment = cls._active.get(id(model))
        if attachment is None:
            attachment = cls._active[id(model)] = cls(model)
        attachment._users += 1
        return attachment

    def leave(self) -> None:
        """Leave; the last user restores the model."""
        self._users -= 1
        if self._users == 0:
            del self._active[self._model_id]
            self._restore.close()


@contextmanager
def attached(model: nn.Module) -> Iterator[None]:
    """Attach ``model`` for a while."""
    attachment = Attachment.enter(model)
    try:
        yield
    finally:
        attachment.leave()


def new_cache(model: nn.Module, config: StreamingConfig) -> StreamingKVCache:
    """A cache with the frequencies that the model holds, also where they were rounded with the weights."""
    return StreamingKVCache(model.config, config.n_sink, config.window_size, rotary=rotaries_from_model(model))


def default_block_size(window_size: int, device: torch.device) -> int:
    """Tokens to process at a time: enough to keep the device busy, a multiple of the window where that is larger."""
    least = 8192 if device.type == "cuda" else 512
    return max(1, -(-least // window_size)) * window_size


def feed(model: nn.Module, cache: StreamingKVCache, input_ids: Tensor, block_size: int | None) -> Tensor:
    """Run tokens ``[batch, length >= 1]`` through an attached model block by block.

    Returns:
        The final hidden state of the last token, ``[batch, 1, hidden]``.
    """
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(f"input_ids must be [batch, length >= 1], got {list(input_ids.shape)}")
    if block_size is None:
        block_size = default_block_size(cache.streaming_config.window_size, input_ids.device)
    require_int("block_size", block_size, 1)
    for block in input_ids.split(block_size, dim=1):
        hidden = model.base_model(input_ids=block, past_key_values=cache, use_cache=True).last_hidden_state
    return hidden[:, -1:]


class StreamingLLMWrapper:
    """Makes a causal language model stream for as long as it is entered.

    ::

        with StreamingLLMWrapper(model, n_sink=4, window_size=1020) as stream:
            stream.generate(**inputs, max_new_tokens=100_000)

    Inside, forwards with a cache from :meth:`new_cache` take blocks of any length, exactly as if fed token by token,
    and rotary angles are exact at any position. On leaving, also after an error, the model is as it was.
    No weight and no class is changed. Wrappers of one model can be nested. For inference, in one thread: the
    allowed SDPA kernels are a setting of the whole process. Positions are the cache's; pass no ``position_ids``.

    Args:
        model: a Transformers causal language model of a supported family, loaded with ``sdpa`` or ``eager`` attention.
        n_sink, window_size: see :class:`StreamingConfig`.

    Raises:
        ValueError: a number is out of range, or the model cannot stream.
    """

    def __init__(self, model: nn.Module, n_sink: int = 4, window_size: int = 1020) -> None:
        self.model = model
        self.streaming_config = StreamingConfig(n_sink, window_size)
        rotaries_from_model(model)  # refuse now what cannot stream
        require_window_fits(model.config, self.streaming_config)
        self._attachment: Attachment | None = None

    def __enter__(self) -> StreamingLLMWrapper:
        if self._attachment is not None:
            raise RuntimeError("this StreamingLLMWrapper is entered already; make another one")
        self._attachment = Attachment.enter(self.model)
        return self

    def __exit__(self, *exc_info) -> None:
        self._attachment.leave()
        self._attachment = None

    def _require_entered(self) -> None:
        if self._attachment is None:
            raise RuntimeError("enter it first: `with StreamingLLMWrapper(model, ...) as stream:`")

    def new_cache(self) -> StreamingKVCache:
        """An empty cache for one stream, or one batch of streams of equal length."""
        self._require_entered()
        return new_cache(self.model, self.streaming_config)

    def __call__(self, *args, **kwargs):
        """The model's forward; pass ``past_key_values=stream.new_cache()``."""
        self._require_entered()
        return self.model(*args, **kwargs)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, cache: StreamingKVCache, block_size: int | None = None) -> None:
        """Feed a prompt ``[batch, length]`` of any length to ``cache``, in memory that does not grow with it."""
        self._require_entered()
        feed(self.model, cache, input_ids, block_size)

    def generate(self, inputs: Tensor | None = None, **kwargs):
        """``model.generate`` on a streaming cache: prompts of any length, as many new tokens as one likes.

        Takes what ``model.generate`` takes. A prompt longer than the cache is fed block by block first. Pass
        ``past_key_values=`` a cache of :meth:`new_cache` to go on with a stream: the ids then begin with all those
        that the cache has seen, as Transformers expects.

        Raises:
            ValueError: a prompt is padded (``attention_mask`` hides tokens).
        """
        self._require_entered()
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        cache = kwargs.pop("past_key_values", None)
        cache = self.new_cache() if cache is None else cache
        self._require_streaming(cache, kwargs)
        if input_ids is not None:
            seen = cache.get_seq_length()
            if input_ids.shape[1] <= seen:
                raise ValueError(
                    f"the cache has seen {seen} tokens and was given {input_ids.shape[1]} ids: the ids have to begin "
                    "with those seen and go on with at least one more"
                )
            unseen = input_ids[:, seen:-1]
            if unseen.shape[1] > self.streaming_config.cache_size:
                refuse_padding(kwargs.get("attention_mask"))
                self.prefill(unseen.to(self.model.device), cache)
            self._expand(cache, input_ids.shape[0], kwargs)
            kwargs["input_ids"] = input_ids
        return self.model.generate(past_key_values=cache, **kwargs)

    def _setting(self, kwargs: dict, name: str):
        """What ``generate`` will use: the argument, else the given configuration's value, else the model's."""
        given = kwargs.get("generation_config")
        values = (kwargs.get(name), getattr(given, name, None), getattr(self.model.generation_config, name, None))
        return next((value for value in values if value is not None), None)

    def _require_streaming(self, cache, kwargs: dict) -> None:
        if not isinstance(cache, StreamingKVCache):
            raise ValueError(
                f"past_key_values must be a StreamingKVCache (stream.new_cache()), got {type(cache).__name__}"
            )
        if self._setting(kwargs, "use_cache") is False:
            raise ValueError("use_cache=False would not stream: leave it out, or call model.generate")

    def _expand(self, cache: StreamingKVCache, batch: int, kwargs: dict) -> None:
        """Give a filled cache one row for each beam or returned sequence, as ``generate`` does with the ids."""
        rows = max(self._setting(kwargs, name) or 1 for name in ("num_beams", "num_return_sequences"))
        if rows > 1 and cache.get_seq_length() and cache.layers[0].batch_size == batch:
            cache.batch_repeat_interleave(rows)
