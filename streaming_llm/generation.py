"""What ``model.generate`` has to be told, and what it must not do, for a stream to be generated exactly.

``generate`` counts positions from the ids that it is given, and would keep and inspect a mask as long as the stream.
A streaming cache knows its positions and has no mask. So ``generate`` is shown the cache through a view that counts
from the first id given, and the model's forward receives the cache itself and nothing about positions.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from .attention.interface import refuse_padding
from .engines.blocks import feed
from .kv_cache import StreamingKVCache
from .speculative import OverwrittenSlots


class GenerationView(StreamingKVCache):
    """A streaming cache as ``generate`` sees it: one state with the cache, the length counted from ``first``."""

    __slots__ = ("cache", "first", "overwritten")

    def __init__(self, cache: StreamingKVCache, first: int) -> None:
        self.first = first
        self.overwritten: OverwrittenSlots | None = None
        self.show(cache)

    def show(self, cache: StreamingKVCache) -> None:
        """Be a view of another cache of the same streams."""
        self.__dict__ = cache.__dict__
        self.cache = cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen since ``first``."""
        return self.cache.get_seq_length(layer_idx) - self.first

    def crop(self, max_length: int) -> None:
        """Forget the last tokens: all but ``max_length``, or (newer Transformers) ``-max_length``."""
        max_length = int(max_length)  # some versions pass a tensor
        n_tokens = self.get_seq_length() - max_length if max_length > 0 else -max_length
        if n_tokens <= 0:
            return
        if self.overwritten is None:
            self.cache.crop(-n_tokens)
        else:
            self.overwritten.take_back(self.cache, n_tokens)

    def update(self, *args, **kwargs):
        raise RuntimeError("generate() gave a view of the cache to a model that is not in the StreamingLLMWrapper")


class GenerationForwards:
    """Stands between ``generate`` and the model for one call, as a context manager.

    ``generate`` is given :attr:`view`. In each of its forwards the model is given the cache itself, and nothing about
    positions or masks. The prompt goes in at the first of them: whatever ``generate`` refuses, it has refused before.

    Args:
        model: the Transformers model itself, attached.
        cache: the stream.
        prompt: what ``generate`` is given to start from, if anything.
        first: position in the stream of the first id that ``generate`` is given.
        expand_size: rows that ``generate`` makes of each row of the prompt.
        drafts: whether ``generate`` takes back some of the tokens that it feeds.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: StreamingKVCache,
        prompt: Prompt | None,
        first: int,
        expand_size: int = 1,
        drafts: bool = False,
    ) -> None:
        self.model, self.cache, self.prompt = model, cache, prompt
        self.expand_size, self.drafts = expand_size, drafts
        self.view = GenerationView(cache, first)
        self._is_first = True
        self._undo = ExitStack()

    @property
    def working(self) -> StreamingKVCache:
        """The cache that is decoded with: the stream's own, or a copy with a row for each beam or sequence."""
        return self.view.cache

    def __enter__(self) -> GenerationForwards:
        model, undo = self.model, self._undo
        undo.callback(model.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        undo.callback(model.register_forward_hook(self._after, with_kwargs=True).remove)
        self._prepare_inputs = model.prepare_inputs_for_generation
        # generate() looks at the signature.
        prepare = functools.update_wrapper(functools.partial(self._prepare), self._prepare_inputs)
        model.__dict__["prepare_inputs_for_generation"] = prepare
        undo.callback(model.__dict__.pop, "prepare_inputs_for_generation")
        return self

    def __exit__(self, *exc_info) -> None:
        self._undo.close()

    def _prepare(self, input_ids: Tensor, *args, **kwargs) -> dict[str, Any]:
        """The model's own preparation, but where that drops the stream's cache (Phi-3 does at its original length)."""
        inputs = self._prepare_inputs(input_ids, *args, **kwargs)
        if kwargs.get("past_key_values") is self.view and inputs.get("past_key_values") is not self.view:
            inputs = GenerationMixin.prepare_inputs_for_generation(self.model, input_ids, *args, **kwargs)
        return inputs

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if kwargs.get("past_key_values") is not self.view:
            if not self.drafts:
                raise RuntimeError(
                    f"{type(module).__name__} ran a forward of generate() without the stream's cache: this way of "
                    "decoding cannot stream. Use StreamingDecoder, or another way of decoding"
                )
            return None  # a forward of an assistant that shares the model
        own = {"attention_mask": None, "position_ids": None, "cache_position": None}
        own = {name: value for name, value in own.items() if name in kwargs}
        name = "input_ids" if kwargs.get("inputs_embeds") is None else "inputs_embeds"
        tokens = kwargs[name]
        if self._is_first:
            refuse_padding(kwargs.get("attention_mask"))  # later masks only grow by ones
            if self._feed_prompt(tokens.shape[1]):
                tokens = tokens[:, -1:]
        elif name == "inputs_embeds":
            raise ValueError(
                "this version of Transformers feeds inputs_embeds of one position again at every step: give at least "
                "two positions, or ids"
            )
        if self.drafts:
            tokens = _last_and_draft(kwargs)
            self.view.overwritten = OverwrittenSlots(self.working, tokens.shape[1])
        self._is_first = False
        return args, kwargs | own | {name: tokens, "past_key_values": self.working}

    def _feed_prompt(self, length: int) -> bool:
        """Feed all but the last token of the prompt, block by block, where that is better than one forward."""
        fits = length <= self.cache.streaming_config.cache_size
        if self.prompt is None or (fits and self.expand_size == 1 and not self.drafts):
            return False
        if self.prompt.unseen.shape[1]:
            feed(self.model, self.cache, self.prompt.unseen)
        if self.expand_size > 1:
            self.view.show(with_rows(self.cache, self.expand_size))
        return True

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        if kwargs.get("past_key_values") is self.working:
            output.past_key_values = self.view


def _last_and_draft(kwargs: dict[str, Any]) -> Tensor:
    """The last known token and the draft ``[1, n]``; newer Transformers first pass what the cache has seen, too."""
    n_kept = kwargs.get("logits_to_keep")
    if not n_kept:
        raise ValueError("assisted decoding of a stream needs a model that takes logits_to_keep")
    return kwargs["input_ids"][:, -n_kept:]


def setting(model: nn.Module, kwargs: dict[str, Any], name: str) -> Any:
    """What ``generate`` will use: the argument, else the given configuration's value, else the model's."""
    given = kwargs.get("generation_config")
    values = (kwargs.get(name), getattr(given, name, None), getattr(model.generation_config, name, None))
    return next((value for value in values if value is not None), None)


@dataclass(frozen=True)
class Prompt:
    """What ``generate`` was given to start from.

    Args:
        name: the argument that it goes to.
        tokens: ids ``[batch, length]`` or embeddings ``[batch, length, hidden]``.
        n_seen: how many of them the cache has seen.
    """

    name: str
    tokens: Tensor
    n_seen: int

    @property
    def unseen(self) -> Tensor:
        """Those to feed ahead of ``generate``, which itself needs the last one."""
        return self.tokens[:, self.n_seen : -1]

    def left_to_feed(self, sequences: Tensor) -> Iterator[Tensor]:
        """What a cache that has seen all but the last of the prompt lacks of all but the last of ``sequences``."""
        yield self.tokens[:, -1:]
        n_repeated = self.tokens.shape[1] if self.name == "input_ids" else 0  # generate() returns ids alone
        if sequences.shape[1] > n_repeated + 1:
            yield sequences[:, n_repeated:-1]


def take_prompt(
    inputs: Tensor | None, kwargs: dict[str, Any], cache: StreamingKVCache, continues: bool
) -> Prompt | None:
    """The prompt among the arguments of ``generate``, which is removed from ``kwargs``.

    Args:
        continues: whether the prompt is what follows the tokens that ``cache`` has seen, instead of beginning with
            them.

    Raises:
        ValueError: there is nothing in it that the cache has not seen, it leaves out a token, or the mask has another
            length.
    """
    n_seen = cache.get_seq_length()
    name = "inputs_embeds" if kwargs.get("inputs_embeds") is not None else "input_ids"
    tokens = kwargs.pop(name, None)
    tokens = inputs if tokens is None else tokens
    if tokens is None:
        if continues or n_seen:
            raise ValueError(f"the cache has seen {n_seen} tokens and no ids were given to go on with")
        return None
    length, mask = tokens.shape[1], kwargs.get("attention_mask")
    if mask is not None and mask.shape[-1] != length:
        raise ValueError(
            f"attention_mask covers {mask.shape[-1]} tokens and {name} has {length}: they must be equal. To pass only "
            "the tokens that the cache has not seen, use continues=True"
        )
    if continues:
        _require_pending(cache, tokens)
        n_seen = 0
    if length <= n_seen:
        raise ValueError(
            f"the cache has seen {n_seen} tokens and was given {length} ids: the ids have to begin with those seen "
            "and go on with at least one more. To pass only those that it has not seen, use continues=True"
        )
    if not length:
        raise ValueError(f"{name} must hold at least one token, got {list(tokens.shape)}")
    return Prompt(name, tokens, n_seen)


def _require_pending(cache: StreamingKVCache, tokens: Tensor) -> None:
    """Raise ``ValueError`` where ids leave out the token that the last result ended with, which was never fed."""
    pending = cache.pending
    if pending is None or tokens.dim() != 2 or not tokens.shape[1] or len(tokens) != len(pending):
        return
    if not torch.equal(tokens[:, 0].cpu(), pending.cpu()):
        raise ValueError(
            f"with continues=True the ids begin with the last token of the previous result, {pending.tolist()}, which "
            f"has not been fed: got ids that begin with {tokens[:, 0].tolist()}. Pass "
            "torch.cat((previous[:, -1:], new_ids), dim=1)"
        )


def is_drafting(model: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether ``generate`` is asked for assisted decoding: a draft is fed and what was wrong is taken back."""
    settings = (setting(model, kwargs, name) for name in ("prompt_lookup_num_tokens", "assistant_early_exit"))
    return kwargs.get("assistant_model") is not None or any(settings)


def expand_size_of(model: nn.Module, kwargs: dict[str, Any]) -> int:
    """How many rows ``generate`` makes of each: beams, or sequences to return."""
    return max(setting(model, kwargs, name) or 1 for name in ("num_beams", "num_return_sequences"))


def refuse_arguments(model: nn.Module, cache: Any, continues: bool, kwargs: dict[str, Any]) -> None:
    """Raise ``ValueError`` for arguments of ``generate`` that would not stream, or not exactly."""
    if not isinstance(cache, StreamingKVCache):
        raise ValueError(
            f"past_key_values must be a StreamingKVCache (stream.new_cache()), got {type(cache).__name__}"
        )
    for name in ("position_ids", "cache_position"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} must not be given: positions are the cache's")
    if setting(model, kwargs, "use_cache") is False:
        raise ValueError("use_cache=False would not stream: leave it out, or call model.generate")
    if setting(model, kwargs, "penalty_alpha") and (setting(model, kwargs, "top_k") or 0) > 1:
        raise ValueError(
            "contrastive search (penalty_alpha) compares with the hidden states of all tokens, which a stream does "
            "not keep: choose another way of decoding"
        )
    guidance = setting(model, kwargs, "guidance_scale")
    if guidance is not None and guidance != 1:
        raise ValueError(
            f"guidance_scale={guidance} would run a second stream in an ordinary cache, which forgets nothing and "
            "grows: leave it out"
        )
    if kwargs.get("inputs_embeds") is not None and is_drafting(model, kwargs):
        raise ValueError("assisted decoding needs ids, got inputs_embeds")
    n_returned = setting(model, kwargs, "num_return_sequences") or 1
    if continues and n_returned > 1:
        raise ValueError(f"continues=True goes on with one sequence, got num_return_sequences={n_returned}")
    if kwargs.get("cache_implementation") is not None:
        raise ValueError(
            f"cache_implementation={kwargs['cache_implementation']!r} asks for another cache: leave it out, or call "
            "model.generate"
        )
    chunk = setting(model, kwargs, "prefill_chunk_size")
    if chunk is not None:
        raise ValueError(
            f"prefill_chunk_size={chunk} is not needed: a prompt longer than the cache is fed block by block anyway"
        )


def give_mask(prompt: Prompt, kwargs: dict[str, Any]) -> None:
    """Put a mask that hides nothing among the arguments, lest ``generate`` guesses one from padding ids.

    Raises:
        ValueError: a mask was given that hides tokens.
    """
    refuse_padding(kwargs.get("attention_mask"))
    if kwargs.get("attention_mask") is None:
        kwargs["attention_mask"] = torch.ones(prompt.tokens.shape[:2], dtype=torch.int64, device=prompt.tokens.device)


def with_rows(cache: StreamingKVCache, rows: int) -> StreamingKVCache:
    """A copy of ``cache`` with each stream ``rows`` times, as ``generate`` repeats the ids."""
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(rows)
    return repeated
