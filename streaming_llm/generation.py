"""What ``model.generate`` has to be told, and what it must not do, for a stream to be generated exactly.

``generate`` counts positions from the ids that it is given, and would keep and inspect a mask as long as the stream.
A streaming cache knows its positions and has no mask. So ``generate`` is shown the cache through a view that counts
from the first id given, and the model's forward receives the cache itself and nothing about positions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .attention import refuse_padding
from .drafts import OverwrittenSlots
from .kv_cache import StreamingKVCache


class GenerationView(StreamingKVCache):
    """A streaming cache as ``generate`` sees it: the same layers, the length counted from position ``first``."""

    def __init__(self, cache: StreamingKVCache, first: int) -> None:
        self.__dict__.update(cache.__dict__)
        self.cache = cache
        self.first = first
        self.overwritten: OverwrittenSlots | None = None

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


@contextmanager
def generation_view(
    model: nn.Module, cache: StreamingKVCache, first: int, drafts: bool = False
) -> Iterator[GenerationView]:
    """A view for ``generate``; until leaving, ``model`` replaces it by ``cache`` in its forward.

    Args:
        model: the Transformers model itself, attached.
        first: position in the stream of the first id that ``generate`` is given.
        drafts: whether ``generate`` takes back some of the tokens that it feeds.

    Raises:
        ValueError: (in the forward) the mask of the prompt hides tokens, or embeddings come where ids should.
    """
    view = GenerationView(cache, first)
    is_prompt = True

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        nonlocal is_prompt
        if kwargs.get("past_key_values") is not view:  # a forward of an assistant that shares the model
            return None
        if is_prompt:  # later masks only grow by ones
            refuse_padding(kwargs.get("attention_mask"))
        elif kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "this version of Transformers feeds inputs_embeds of one position again at every step: give at least "
                "two positions, or ids"
            )
        is_prompt = False
        own = {"past_key_values": cache, "attention_mask": None, "position_ids": None, "cache_position": None}
        if drafts:
            own["input_ids"] = _last_and_draft(kwargs)
            view.overwritten = OverwrittenSlots(cache, own["input_ids"].shape[1])
        return args, kwargs | {name: value for name, value in own.items() if name in kwargs}

    def after(module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        if kwargs.get("past_key_values") is cache:
            output.past_key_values = view

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(after, with_kwargs=True).remove)
        yield view


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


def take_prompt(inputs: Tensor | None, kwargs: dict[str, Any], n_seen: int, continues: bool) -> Prompt | None:
    """The prompt among the arguments of ``generate``, which is removed from ``kwargs``.

    Args:
        n_seen: tokens that the cache has seen.
        continues: whether the prompt is what follows them, instead of beginning with them.

    Raises:
        ValueError: there is nothing in it that the cache has not seen, or the mask has another length.
    """
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
        n_seen = 0
    if length <= n_seen:
        raise ValueError(
            f"the cache has seen {n_seen} tokens and was given {length} ids: the ids have to begin with those seen "
            "and go on with at least one more. To pass only those that it has not seen, use continues=True"
        )
    if not length:
        raise ValueError(f"{name} must hold at least one token, got {list(tokens.shape)}")
    return Prompt(name, tokens, n_seen)


def is_drafting(model: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether ``generate`` is asked for assisted decoding: a draft is fed and what was wrong is taken back."""
    settings = (setting(model, kwargs, name) for name in ("prompt_lookup_num_tokens", "assistant_early_exit"))
    return kwargs.get("assistant_model") is not None or any(settings)


def rows_of_each_prompt(model: nn.Module, kwargs: dict[str, Any]) -> int:
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
    chunk = setting(model, kwargs, "prefill_chunk_size")
    if chunk is not None:
        raise ValueError(
            f"prefill_chunk_size={chunk} is not needed: a prompt longer than the cache is fed block by block anyway"
        )


def with_rows(cache: StreamingKVCache, rows: int) -> StreamingKVCache:
    """A copy of ``cache`` with each stream ``rows`` times, as ``generate`` repeats the ids."""
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(rows)
    return repeated
