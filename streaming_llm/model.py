"""StreamingLLMWrapper: a model made to stream, and made as it was again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attachment import Attachment
from .config import StreamingConfig
from .engines.blocks import feed
from .families import lm_head, transformers_model
from .generation import (
    GenerationForwards,
    expand_size_of,
    give_mask,
    is_drafting,
    refuse_arguments,
    take_prompt,
)
from .kv_cache import StreamingKVCache


class StreamingLLMWrapper:
    """Makes a causal language model stream for as long as it is entered.

    ::

        with StreamingLLMWrapper(model, n_sink=4, window_size=1020) as stream:
            stream.generate(**inputs, max_new_tokens=100_000)

    Inside, forwards with a cache from :meth:`new_cache` take blocks of any length, exactly as if fed token by token,
    and rotary angles are exact at any position. On leaving, also after an error, the model is as it was.
    No weight and no class is changed. Wrappers of one model can be nested. For inference, one forward of a model at a
    time. Positions are the cache's; pass no ``position_ids``.

    Args:
        model: a Transformers causal language model of a supported family, loaded with ``sdpa`` or ``eager`` attention.
        n_sink, window_size: see :class:`StreamingConfig`, or
        config: both in one.

    Raises:
        ValueError: a number is out of range, or the model cannot stream.
    """

    def __init__(
        self, model: nn.Module, n_sink: int = 4, window_size: int = 1020, *, config: StreamingConfig | None = None
    ) -> None:
        self.model = model
        self.streaming_config = StreamingConfig.given(n_sink, window_size, config)
        StreamingKVCache.from_model(model, config=self.streaming_config)  # refuse now what cannot stream
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
        return StreamingKVCache.from_model(self.model, config=self.streaming_config)

    def __call__(self, *args, **kwargs):
        """The model's forward; pass ``past_key_values=stream.new_cache()``."""
        self._require_entered()
        return self.model(*args, **kwargs)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, cache: StreamingKVCache, block_size: int | None = None) -> Tensor:
        """Feed a prompt ``[batch, length]`` of any length to ``cache``, in memory that does not grow with it.

        Returns:
            Logits ``[batch, vocab]`` of the last token, in the model's dtype.
        """
        self._require_entered()
        hidden = feed(self.model, cache, input_ids, block_size)
        return lm_head(transformers_model(self.model), hidden)[:, -1]

    def generate(self, inputs: Tensor | None = None, *, continues: bool = False, **kwargs):
        """``model.generate`` on a streaming cache: prompts of any length, as many new tokens as one likes.

        Takes what ``model.generate`` takes, and returns what it returns. A prompt longer than the cache is fed block
        by block first. To go on with a stream, pass ``past_key_values=`` its cache (of :meth:`new_cache`), and either

        - all ids so far and at least one more, as Transformers expects; or
        - with ``continues=True`` only those that the cache has not seen, for streams too long to keep. They begin with
          the last token of the previous result, which was returned and never fed (the cache knows it, and refuses
          ids that begin with another)::

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
        prompt = take_prompt(inputs, kwargs, cache, continues)
        if prompt is not None:
            give_mask(prompt, kwargs)
            kwargs[prompt.name] = prompt.tokens
        kwargs["cache_implementation"] = None  # the one that a model's generation configuration may name
        first, expand_size = n_seen if continues else 0, expand_size_of(model, kwargs)
        with GenerationForwards(model, cache, prompt, first, expand_size, is_drafting(model, kwargs)) as forwards:
            output = self.model.generate(past_key_values=forwards.view, **kwargs)
        if getattr(output, "past_key_values", None) is forwards.view:
            output.past_key_values = forwards.working
        sequences = getattr(output, "sequences", output)
        if continues and expand_size > 1:  # the stream goes on with the best beam
            for tokens in prompt.left_to_feed(sequences):
                feed(self.model, cache, tokens)
        if continues or expand_size == 1:
            cache.set_pending(sequences[:, -1])
        return output
