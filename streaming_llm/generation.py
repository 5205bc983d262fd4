"""One call of ``model.generate`` on a streaming cache: what it is shown, and what the model is given instead.

``generate`` counts positions from the ids that it is given, and would keep and inspect a mask as long as the stream.
A streaming cache knows its positions and has no mask. So ``generate`` is shown the cache through a view that counts
columns of ids, and its forwards go to the prompt's blocks, to the engine, or to the model's own call with the cache
itself and nothing about positions.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from .attachment import Change
from .engines.blocks import BlockForward, feed_rows
from .engines.pool import EnginePool
from .families import last_logits
from .generate_arguments import Prompt
from .kv_cache import StreamingKVCache
from .speculative import OverwrittenSlots

OF_EVERY_FORWARD = (
    "input_ids",
    "inputs_embeds",
    "past_key_values",
    "attention_mask",
    "position_ids",
    "cache_position",
    "use_cache",
    "return_dict",
    "logits_to_keep",
)
"""What ``generate`` gives a forward that is a token and a cache, and nothing more."""


class GenerationView(StreamingKVCache):
    """A streaming cache as ``generate`` sees it: one state with the cache, as long as the columns of ids behind it.

    Attributes:
        cache: what is decoded with: the stream's own, or a copy with a row for each beam or sequence.
        columns: of ids that have been fed.
        overwritten: by the last draft, before which there is nothing to crop.
    """

    __slots__ = ("cache", "columns", "overwritten")
    overwritten: OverwrittenSlots

    def __init__(self, cache: StreamingKVCache, columns: int) -> None:
        self.columns = columns
        self.show(cache)

    def show(self, cache: StreamingKVCache) -> None:
        """Be a view of another cache of the same streams."""
        self.become(cache)
        self.cache = cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of ids that have been fed."""
        return self.columns

    def crop(self, max_length: int) -> None:
        """Forget the last tokens: all but ``max_length``, or (newer Transformers) ``-max_length``."""
        max_length = int(max_length)  # some versions pass a tensor
        n_tokens = self.columns - max_length if max_length > 0 else -max_length
        if n_tokens <= 0:
            return
        self.overwritten.take_back(self.cache, [n_tokens])
        self.columns -= n_tokens

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError("generate() gave a view of the cache to a model that is not in the StreamingLLMWrapper")


class GenerationForwards:
    """Stands between ``generate`` and the model for one call, while :meth:`changes` are in force.

    ``generate`` is given :attr:`view`. The prompt goes in at its first forward: whatever ``generate`` refuses, it has
    refused before.

    Args:
        model: the Transformers model itself, attached.
        cache: the stream.
        prompt: what ``generate`` is given to start from, if anything.
        expand_size: rows that ``generate`` makes of each row of the prompt.
        drafts: whether ``generate`` takes back some of the tokens that it feeds.
        block: how the prompt's blocks run.
        engines: what runs single tokens; ``None``: the plain model call.
    """

    def __init__(
        self,
        model: Any,
        cache: StreamingKVCache,
        prompt: Prompt | None,
        *,
        expand_size: int,
        drafts: bool,
        block: BlockForward,
        engines: EnginePool | None,
    ) -> None:
        self.model, self.cache, self.prompt = model, cache, prompt
        self.expand_size, self.drafts = expand_size, drafts
        self.view = GenerationView(cache, 0 if prompt is None or prompt.mask is not None else prompt.n_seen[0])
        self._block, self._engines = block, engines
        self._is_first, self._needs_ids_alone = True, False
        self._forward, self._prepare_inputs = model.forward, model.prepare_inputs_for_generation

    def changes(self) -> list[Change]:
        """What stands in for the model's own methods, with their signatures, which ``generate`` looks at."""
        forward = functools.update_wrapper(functools.partial(self._run), self._forward)
        prepare = functools.update_wrapper(functools.partial(self._prepare), self._prepare_inputs)
        return [(self.model, "forward", forward), (self.model, "prepare_inputs_for_generation", prepare)]

    def _prepare(self, input_ids: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The model's own preparation, but where that drops the stream's cache (Phi-3 does at its original length).

        Once an engine has run a token, the preparation of the next ones is left out: the device waits for it.
        """
        if self._needs_ids_alone and kwargs.get("past_key_values") is self.view:
            return {"input_ids": input_ids[:, -1:], "past_key_values": self.view}
        inputs = self._prepare_inputs(input_ids, *args, **kwargs)
        if kwargs.get("past_key_values") is self.view and inputs.get("past_key_values") is not self.view:
            inputs = GenerationMixin.prepare_inputs_for_generation(self.model, input_ids, *args, **kwargs)
        return inputs

    # The forwards

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the model's forward."""
        cache = kwargs.get("past_key_values")
        if cache is not self.view:
            if not self.drafts and not hasattr(cache, "take_plan"):
                raise RuntimeError(
                    f"{type(self.model).__name__} ran a forward of generate() without the stream's cache: this way of "
                    "decoding cannot stream. Use StreamingDecoder, or another way of decoding"
                )
            return self._forward(*args, **kwargs)  # of an engine, or of an assistant that shares the model
        first, self._is_first = self._is_first, False
        if first:
            return self._run_prompt(kwargs)
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "this version of Transformers feeds inputs_embeds of one position again at every step: give at least "
                "two positions, or ids"
            )
        tokens = _last_and_draft(kwargs) if self.drafts else kwargs["input_ids"]
        return self._run_tokens(kwargs, tokens)

    def _run_prompt(self, kwargs: dict[str, Any]) -> Any:
        """Feed what is unseen of the prompt block by block, and the last of it as ``generate`` asks for."""
        name = "input_ids" if kwargs.get("inputs_embeds") is None else "inputs_embeds"
        tokens = kwargs[name]
        if self.prompt is None:
            return self._run_tokens(kwargs, tokens)
        if self.prompt.mask is None and not self.drafts:
            unseen = list(tokens[:: self.expand_size])
            self.view.columns += tokens.shape[1]
        else:
            unseen, self.view.columns = self.prompt.unseen(), self.prompt.length
        if self.expand_size == 1 and not self.drafts and not self._more_than_logits(kwargs):
            hidden = feed_rows(self.model, self.cache, unseen, self._block)
            return self._output(last_logits(self.model, hidden))
        before = [row[:-1] for row in unseen]
        if max(map(len, before)):
            feed_rows(self.model, self.cache, before, self._block)
        if self.expand_size > 1:
            repeated = copy.deepcopy(self.cache)
            repeated.batch_repeat_interleave(self.expand_size)  # as generate() repeats the ids
            self.view.show(repeated)
        self.view.columns -= 1
        last = torch.stack([row[-1:] for row in unseen]).repeat_interleave(self.expand_size, dim=0).to(tokens.device)
        if self.drafts:  # the last column may be padding
            last = torch.cat((last, _last_and_draft(kwargs)[:, 1:]), dim=1)
        return self._run_tokens(kwargs, last, name)

    def _run_tokens(self, kwargs: dict[str, Any], tokens: Tensor, name: str = "input_ids") -> Any:
        """Feed new tokens ``[batch, n]`` (or embeddings) by the engine, or by the model's own call."""
        alone = tokens.dim() == 2 and tokens.shape[1] == 1 and self.view.n_seen > 0
        if self._engines is not None and alone and not self._more_than_logits(kwargs):
            engine = self._engines.engine_for(self.view.cache)
            self.view.show(self.view.cache)
            logits = engine.step(tokens[:, 0])
            self.view.columns += 1
            self._needs_ids_alone = True
            return self._output(logits)
        if self.drafts:
            self.view.overwritten = OverwrittenSlots(self.view.cache, tokens.shape[1])
        own: dict[str, Any] = {
            key: None for key in ("attention_mask", "position_ids", "cache_position") if key in kwargs
        }
        own |= {name: tokens, "past_key_values": self.view.cache}
        output = self._forward(**(kwargs | own))
        self.view.columns += tokens.shape[1]
        output.past_key_values = self.view
        return output

    def _more_than_logits(self, kwargs: dict[str, Any]) -> bool:
        """Whether a forward is asked for what blocks and engines do not give."""
        return any(
            value is not None and value is not False for key, value in kwargs.items() if key not in OF_EVERY_FORWARD
        )

    def _output(self, logits: Any) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=logits.unsqueeze(1), past_key_values=self.view)


def _last_and_draft(kwargs: dict[str, Any]) -> Tensor:
    """The last known token and the draft ``[1, n]``; newer Transformers first pass what the cache has seen, too."""
    n_kept = kwargs.get("logits_to_keep")
    if not n_kept:
        raise ValueError("assisted decoding of a stream needs a model that takes logits_to_keep")
    return kwargs["input_ids"][:, -n_kept:]
