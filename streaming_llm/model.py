"""StreamingLLMWrapper: a model made to stream, and made as it was again."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from .attention import maskless_attention
from .config import StreamingConfig
from .families import rotary_from_model, rotary_modules
from .kv_cache import StreamingKVCache
from .rope_utils import ExactRotaryEmbedding, Rotary


class Attachment:
    """What streaming changes on one model: its attention functions and its rotary modules.

    It does not depend on sinks or window, so wrappers and decoders of one model share it; the last to leave
    restores the model.
    """

    _active: ClassVar[dict[int, Attachment]] = {}  # by the model's id; a changed model is alive until restored

    def __init__(self, model: nn.Module) -> None:
        self.rotary: Rotary = rotary_from_model(model)
        self._model_id = id(model)
        self._users = 0
        with ExitStack() as stack:
            stack.enter_context(maskless_attention(model))
            for parent, name, module in rotary_modules(model):
                setattr(parent, name, ExactRotaryEmbedding(module, self.rotary))
                stack.callback(setattr, parent, name, module)
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

    def is_active(self) -> bool:
        """Whether the model is attached now."""
        return self._users > 0


@contextmanager
def attached(model: nn.Module):
    """Attach ``model`` for a while; yields the :class:`Attachment`."""
    attachment = Attachment.enter(model)
    try:
        yield attachment
    finally:
        attachment.leave()


def new_cache(model: nn.Module, attachment: Attachment, config: StreamingConfig) -> StreamingKVCache:
    """A cache for an attached model: exact angles, blocks of any length."""
    cache = StreamingKVCache(
        model.config, config.n_sink, config.window_size, rotary=attachment.rotary.to(torch.device("cpu"))
    )
    cache.allow_blocks(attachment.is_active)
    return cache


def default_block_size(window_size: int, device: torch.device) -> int:
    """Tokens to process at a time: enough to keep the device busy, a multiple of the window where that is larger."""
    least = 8192 if device.type == "cuda" else 512
    return max(1, -(-least // window_size)) * window_size


def feed(model: nn.Module, cache: StreamingKVCache, input_ids: Tensor, block_size: int) -> Tensor:
    """Run tokens ``[batch, length]`` through an attached model block by block.

    Returns:
        The final hidden state of the last token, ``[batch, 1, hidden]``.
    """
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
    No weight, class or module-level state is changed. Wrappers of one model can be nested.

    Args:
        model: a Transformers causal language model of a supported family, loaded with ``sdpa`` or ``eager`` attention.
        n_sink, window_size: see :class:`StreamingConfig`.

    Raises:
        ValueError: a number is out of range, or the model cannot stream.
    """

    def __init__(self, model: nn.Module, n_sink: int = 4, window_size: int = 1020) -> None:
        self.model = model
        self.streaming_config = StreamingConfig(n_sink, window_size)
        rotary_from_model(model)  # refuse now what cannot stream
        self._attachment: Attachment | None = None

    def __enter__(self) -> StreamingLLMWrapper:
        if self._attachment is not None:
            raise RuntimeError("this StreamingLLMWrapper is entered already; make another one")
        self._attachment = Attachment.enter(self.model)
        return self

    def __exit__(self, *exc_info) -> None:
        self._attachment.leave()
        self._attachment = None

    def _attached(self) -> Attachment:
        if self._attachment is None:
            raise RuntimeError("enter it first: `with StreamingLLMWrapper(model, ...) as stream:`")
        return self._attachment

    def new_cache(self) -> StreamingKVCache:
        """An empty cache for one stream, or one batch of streams of equal length."""
        return new_cache(self.model, self._attached(), self.streaming_config)

    def __call__(self, *args, **kwargs):
        """The model's forward; pass ``past_key_values=stream.new_cache()``."""
        self._attached()
        return self.model(*args, **kwargs)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, cache: StreamingKVCache, block_size: int | None = None) -> None:
        """Feed a prompt ``[batch, length]`` of any length to ``cache``, in memory that does not grow with it."""
        self._attached()
        if block_size is None:
            block_size = default_block_size(self.streaming_config.window_size, input_ids.device)
        feed(self.model, cache, input_ids, block_size)

    def generate(self, inputs: Tensor | None = None, **kwargs):
        """``model.generate`` on a streaming cache: prompts of any length, as many new tokens as one likes.

        Takes what ``model.generate`` takes. A prompt longer than the cache is fed block by block first. Pass
        ``past_key_values=`` a cache of :meth:`new_cache` to go on with a stream: the ids then begin with all those
        that the cache has seen, as Transformers expects.

        Raises:
            ValueError: a prompt is padded (``attention_mask`` hides tokens).
        """
        self._attached()
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        cache = kwargs.pop("past_key_values", None)
        cache = self.new_cache() if cache is None else cache
        if input_ids is not None:
            unseen = input_ids[:, cache.get_seq_length() : -1]
            if unseen.shape[1] > self.streaming_config.cache_size:
                self._refuse_padding(kwargs.get("attention_mask"))
                self.prefill(unseen.to(self.model.device), cache)
                self._expand(cache, kwargs)
            kwargs["input_ids"] = input_ids
        return self.model.generate(past_key_values=cache, **kwargs)

    @staticmethod
    def _refuse_padding(attention_mask: Tensor | None) -> None:
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError(
                "attention_mask hides tokens: a stream cannot be padded. Give all prompts of a batch the same length, "
                "or run them one by one"
            )

    def _expand(self, cache: StreamingKVCache, kwargs: dict) -> None:
        """Give a prefilled cache one row for each beam or returned sequence, as ``generate`` does with the ids."""
        config = kwargs.get("generation_config") or self.model.generation_config
        names = ("num_beams", "num_return_sequences")
        beams, sequences = (kwargs.get(name) or getattr(config, name, None) or 1 for name in names)
        if max(beams, sequences) > 1:
            cache.batch_repeat_interleave(max(beams, sequences))
