"""StreamingLLMWrapper: a model made to stream, and made as it was again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .attachment import Attachment, changed, foreign_hooks
from .config import StreamingConfig
from .engines import resolve_block_engine, resolve_engine
from .engines.blocks import block_forward, feed_rows, rows_of
from .engines.pool import EnginePool
from .families import last_logits, transformers_model
from .generate_arguments import (
    Prompt,
    expand_size_of,
    is_drafting,
    refuse_arguments,
    require_cache,
    setting,
    take_prompt,
)
from .generation import GenerationForwards
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
        engine: how :meth:`generate` and :meth:`prefill` run: a name of :data:`streaming_llm.ENGINES`, or ``auto``, the
            fastest of them that runs here.

    Attributes:
        engine: its name; never ``auto``.
        engine_of_last_generate: what ran the single tokens of the last :meth:`generate`.
        why_eager: where that was the plain model call instead of :attr:`engine`, why.

    Raises:
        ValueError: a number is out of range, the model cannot stream, or the engine cannot run it.
    """

    def __init__(
        self,
        model: nn.Module,
        n_sink: int = 4,
        window_size: int = 1020,
        engine: str = "auto",
        *,
        config: StreamingConfig | None = None,
    ) -> None:
        self.model: Any = model
        self.streaming_config = StreamingConfig.given(n_sink, window_size, config)
        StreamingKVCache.from_model(model, config=self.streaming_config)  # refuse now what cannot stream
        self.engine = resolve_engine(model, engine)
        self.engine_of_last_generate: str | None = None
        self.why_eager: str | None = None
        self._block = block_forward(model, resolve_block_engine(model, self.engine))
        self._engines = EnginePool(model, self.engine)
        self._attachment: Attachment | None = None

    def __enter__(self) -> StreamingLLMWrapper:
        if self._attachment is not None:
            raise RuntimeError("this StreamingLLMWrapper is entered already; make another one")
        self._attachment = Attachment.enter(self.model)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._attachment is not None:
            self._attachment.leave()
        self._attachment = None

    def _require_entered(self) -> None:
        if self._attachment is None:
            raise RuntimeError("enter it first: `with StreamingLLMWrapper(model, ...) as stream:`")

    def new_cache(self) -> StreamingKVCache:
        """An empty cache for one stream, or one batch of streams of equal length."""
        self._require_entered()
        return StreamingKVCache.from_model(self.model, config=self.streaming_config)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward; pass ``past_key_values=stream.new_cache()``."""
        self._require_entered()
        return self.model(*args, **kwargs)

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor,
        cache: StreamingKVCache,
        block_size: int | None = None,
        *,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Feed prompts ``[batch, length]`` of any length to ``cache``, in memory that does not grow with it.

        Args:
            attention_mask: ``[batch, length]``, 0 at padding, left or right.

        Returns:
            Logits ``[batch, vocab]`` of each row's last token, in the model's dtype.
        """
        self._require_entered()
        require_cache(transformers_model(self.model), cache)
        rows = rows_of(input_ids, attention_mask)
        hidden = feed_rows(self.model, cache, rows, self._block, block_size)
        return last_logits(transformers_model(self.model), hidden)

    def generate(self, inputs: Tensor | None = None, *, continues: bool = False, **kwargs: Any) -> Any:
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
            inputs: ids ``[batch, length]`` (or ``input_ids=``, ``inputs_embeds=``). ``attention_mask`` hides padding,
                left or right: each row is a stream of its own. Rows that end early are filled with the padding token,
                which then belongs to their stream.
            continues: the ids are those that the cache has not seen.

        Raises:
            ValueError: an argument would not stream exactly.
        """
        self._require_entered()
        given = kwargs.pop("past_key_values", None)
        cache = self.new_cache() if given is None else given
        model = transformers_model(self.model)
        refuse_arguments(model, cache, continues, kwargs)
        prompt = take_prompt(inputs, kwargs, cache, continues)
        if prompt is not None:
            kwargs[prompt.name] = prompt.tokens
        kwargs["cache_implementation"] = None  # the one that a model's generation configuration may name
        expand_size = expand_size_of(model, kwargs)
        output = self.run_generation(
            lambda view: self.model.generate(past_key_values=view, **kwargs), cache, prompt, expand_size, kwargs
        )
        sequences = getattr(output, "sequences", output)
        if prompt is not None and continues and expand_size > 1:  # the stream goes on with the best beam
            self._feed_best(prompt, cache, sequences)
        if continues or expand_size == 1:
            cache.set_pending(sequences[:, -1].clone())
        return output

    def run_generation(
        self,
        generate: Callable[[StreamingKVCache], Any],
        cache: StreamingKVCache,
        prompt: Prompt | None,
        expand_size: int,
        kwargs: dict[str, Any],
    ) -> Any:
        """Run ``generate(view)``, whose forwards with the view go to ``cache``.

        Args:
            expand_size: rows that it makes of each row of the prompt.
            kwargs: its arguments.

        Returns:
            What it returns, with the cache in place of the view.
        """
        model = transformers_model(self.model)
        drafts = is_drafting(model, kwargs)
        self.why_eager = self._why_plain_call(model, drafts, kwargs)
        self.engine_of_last_generate = "eager" if self.why_eager else self.engine
        engines = None if self.engine_of_last_generate == "eager" else self._engines
        forwards = GenerationForwards(
            model, cache, prompt, expand_size=expand_size, drafts=drafts, block=self._block, engines=engines
        )
        with changed(forwards.changes()):
            output = generate(forwards.view)
        if getattr(output, "past_key_values", None) is forwards.view:
            output.past_key_values = forwards.view.cache
        return output

    def _why_plain_call(self, model: nn.Module, drafts: bool, kwargs: dict[str, Any]) -> str | None:
        """Why the engine cannot run a call of ``generate``."""
        for name in ("output_attentions", "output_hidden_states"):
            if setting(model, kwargs, name) or getattr(model.config, name, None):
                return f"{name} asks for what only the model's own call gives"
        if drafts:
            return "drafted tokens are fed several at a time"
        if foreign_hooks(model):
            return "hooks are registered on the model's modules"
        return None

    def _feed_best(self, prompt: Prompt, cache: StreamingKVCache, sequences: Tensor) -> None:
        """What a cache that has seen all but the last of the prompt lacks of all but the last of the best sequence."""
        feed_rows(self.model, cache, [row[-1:] for row in prompt.unseen()], self._block)
        n_repeated = prompt.tokens.shape[1] if prompt.name == "input_ids" else 0  # generate() returns ids alone
        if sequences.shape[1] > n_repeated + 1:
            feed_rows(self.model, cache, list(sequences[:, n_repeated:-1]), self._block)
