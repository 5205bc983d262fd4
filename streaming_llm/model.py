"""StreamingLLMWrapper: a model made to stream, and made as it was again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from .attention import refuse_padding, switched_attention
from .config import StreamingConfig, require_int
from .families import decoder_of, family_of, module_angles, require_window_fits, rotaries_from_model, rotary_modules
from .forwards import BlockForward, block_forward
from .generation import generation_view, is_drafting, refuse_arguments, rows_of_each_prompt, take_prompt, with_rows
from .inner_model import transformers_model
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
        model = transformers_model(model)
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


def default_block_size(window_size: int, model: nn.Module) -> int:
    """Tokens to process at a time: enough to keep the device busy, a multiple of the window where that is larger."""
    weight = model.get_input_embeddings().weight
    least = max(16384, (1 << 24) // weight.shape[1]) if weight.device.type == "cuda" else 512
    return max(1, -(-least // window_size)) * window_size


def feed(
    model: nn.Module,
    cache: StreamingKVCache,
    input_ids: Tensor,
    block_size: int | None,
    forward: BlockForward | None = None,
) -> Tensor:
    """Run tokens ``[batch, length >= 1]`` through an attached model block by block.

    Args:
        forward: how a block runs; the plain model call if not given.

    Returns:
        The final hidden state of the last token, ``[batch, 1, hidden]``.
    """
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(f"input_ids must be [batch, length >= 1], got {list(input_ids.shape)}")
    if block_size is None:
        block_size = default_block_size(cache.streaming_config.window_size, model)
    require_int("block_size", block_size, 1)
    forward = block_forward(model, "eager") if forward is None else forward
    for block in input_ids.split(block_size, dim=1):
        hidden = forward(block, cache)
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
        rotaries_from_model(transformers_model(model))  # refuse now what cannot stream
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

    def generate(self, inputs: Tensor | None = None, *, continues: bool = False, **kwargs):
        """``model.generate`` on a streaming cache: prompts of any length, as many new tokens as one likes.

        Takes what ``model.generate`` takes, and returns what it returns. A prompt longer than the cache is fed block
        by block first. To go on with a stream, pass ``past_key_values=`` its cache (of :meth:`new_cache`), and either

        - all ids so far and at least one more, as Transformers expects; or
        - with ``continues=True`` only those that the cache has not seen, for streams too long to keep. They begin with
          the last token of the previous result, which was returned and never fed::

              out = stream.generate(ids, past_key_values=cache)
              out = stream.generate(torch.cat((out[:, -1:], turn), 1), past_key_values=cache, continues=True)

          Lengths (``max_length``), penalties and stopping criteria then concern the ids of this call alone.

        Memory is constant but for what ``generate`` itself keeps: the ids of the call. Their time grows too, as it
        copies them at every step; in calls of some thousand tokens with ``continues=True`` neither does.

        Beams, and several sequences for one prompt, run on a copy of a cache that was passed in: it remains that of
        the one prompt, and can be continued with any of the results. Drafted tokens (an assistant model, prompt
        lookup) that were wrong are taken back exactly; an assistant's own cache is an ordinary one and grows.

        Args:
            inputs: ids ``[batch, length]`` (or ``input_ids=``, ``inputs_embeds=``) of sequences of equal length. Rows
                that end early are filled with the padding token, which then belongs to their stream.
            continues: the ids are those that the cache has not seen.

        Raises:
            ValueError: a prompt is padded (``attention_mask`` hides tokens), or an argument would not stream exactly.
        """
        self._require_entered()
        given = kwargs.pop("past_key_values", None)
        cache = self.new_cache() if given is None else given
        model = transformers_model(self.model)
        refuse_arguments(model, cache, continues, kwargs)
        n_seen = cache.get_seq_length()
        prompt = take_prompt(inputs, kwargs, n_seen, continues)
        n_rows, drafts, working = rows_of_each_prompt(model, kwargs), is_drafting(model, kwargs), cache
        if prompt is not None:
            kwargs[prompt.name] = prompt.tokens
            in_one_forward = self.streaming_config.cache_size if n_rows == 1 and not drafts else 0
            if prompt.unseen.shape[1] > in_one_forward:
                refuse_padding(kwargs.get("attention_mask"))
                self._feed(prompt.unseen, cache)
            if n_rows > 1:
                working = with_rows(cache, n_rows)
        with generation_view(model, working, n_seen if continues else 0, drafts) as view:
            output = self.model.generate(past_key_values=view, **kwargs)
        if getattr(output, "past_key_values", None) is view:
            output.past_key_values = working
        if continues and working is not cache:  # the stream goes on with the best beam
            for tokens in prompt.left_to_feed(getattr(output, "sequences", output)):
                self._feed(tokens, cache)
        return output

    @torch.no_grad()
    def _feed(self, tokens: Tensor, cache: StreamingKVCache) -> None:
        """Feed ids ``[batch, length]`` or embeddings ``[batch, length, hidden]``."""
        model = transformers_model(self.model)
        tokens = tokens.to(model.device)
        if tokens.dim() == 2:
            self.prefill(tokens, cache)
            return
        for block in tokens.split(default_block_size(cache.streaming_config.window_size, model), dim=1):
            decoder_of(model)(inputs_embeds=block, past_key_values=cache, use_cache=True)
