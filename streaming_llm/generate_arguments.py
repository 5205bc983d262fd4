"""What ``model.generate`` is given: the prompt among its arguments, and what would not stream, or not exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attention.interface import refuse_images
from .engines.blocks import rows_of
from .kv_cache import StreamingKVCache
from .saving import model_facts


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
        mask: boolean ``[batch, length]``, false at padding; ``None`` where there is none.
        n_seen: for each row, how many of its tokens the cache has seen.
    """

    name: str
    tokens: Tensor
    mask: Tensor | None
    n_seen: list[int]

    def unseen(self) -> list[Tensor]:
        """For each row, its tokens that the cache has not seen: ids ``[n]`` or embeddings ``[n, hidden]``."""
        rows = rows_of(self.tokens, self.mask)
        return [row[n:] for row, n in zip(rows, self.n_seen, strict=True)]


def take_prompt(
    inputs: Tensor | None, kwargs: dict[str, Any], cache: StreamingKVCache, continues: bool
) -> Prompt | None:
    """The prompt among the arguments of ``generate``, which is removed from ``kwargs``, and its mask put there.

    Args:
        continues: whether the prompt is what follows the tokens that ``cache`` has seen, instead of beginning with
            them.

    Raises:
        ValueError: there is nothing in it that the cache has not seen, it leaves out a token, or the mask has another
            length.
    """
    name = "inputs_embeds" if kwargs.get("inputs_embeds") is not None else "input_ids"
    tokens = kwargs.pop(name, None)
    tokens = inputs if tokens is None else tokens
    if tokens is None:
        if continues or cache.n_seen:
            raise ValueError(f"the cache has seen {cache.n_seen} tokens and no ids were given to go on with")
        return None
    if tokens.dim() != (3 if name == "inputs_embeds" else 2) or not tokens.numel():
        raise ValueError(f"{name} must be [batch, length] of at least one token, got {list(tokens.shape)}")
    mask = _mask(name, tokens, kwargs)
    n_rows = len(tokens)
    cache.require_rows(n_rows)
    n_seen = [0] * n_rows
    if continues:
        _require_pending(cache, tokens, mask)
    else:
        n_seen = [seen + offset for seen, offset in cache.progress.of_rows(n_rows)]
    lengths = [tokens.shape[1]] * n_rows if mask is None else mask.sum(1).tolist()
    for row, (length, seen) in enumerate(zip(lengths, n_seen, strict=True)):
        if length <= seen:
            raise ValueError(
                f"row {row}: the cache has seen {seen} tokens and was given {length} ids: the ids have to begin with "
                "those seen and go on with at least one more. To pass only those that it has not seen, use "
                "continues=True"
            )
    return Prompt(name, tokens, mask, n_seen)


def _mask(name: str, tokens: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The mask ``[batch, length]``, where it hides something. ``generate`` is given one that it need not guess."""
    given = kwargs.get("attention_mask")
    if given is None:
        kwargs["attention_mask"] = torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
        return None
    if given.shape != tokens.shape[:2]:
        raise ValueError(
            f"attention_mask covers {given.shape[-1]} tokens and {name} has {tokens.shape[1]}: they must be "
            "equal. To pass only the tokens that the cache has not seen, use continues=True"
        )
    mask = given.bool()
    return None if bool(mask.all()) else mask


def _require_pending(cache: StreamingKVCache, tokens: Tensor, mask: Tensor | None) -> None:
    """Raise ``ValueError`` where ids leave out the token that the last result ended with, which was never fed."""
    pending = cache.pending
    if pending is None or tokens.dim() != 2:
        return
    first = tokens[:, 0] if mask is None else tokens.gather(1, mask.int().argmax(1, keepdim=True))[:, 0]
    if not torch.equal(first.cpu(), pending.cpu()):
        raise ValueError(
            f"with continues=True the ids begin with the last token of the previous result, {pending.tolist()}, which "
            f"has not been fed: got ids that begin with {first.tolist()}. Pass "
            "torch.cat((previous[:, -1:], new_ids), dim=1)"
        )


def is_drafting(model: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether ``generate`` is asked for assisted decoding: a draft is fed and what was wrong is taken back."""
    settings = (setting(model, kwargs, name) for name in ("prompt_lookup_num_tokens", "assistant_early_exit"))
    return kwargs.get("assistant_model") is not None or any(settings)


def expand_size_of(model: nn.Module, kwargs: dict[str, Any]) -> int:
    """How many rows ``generate`` makes of each: beams, or sequences to return."""
    return max(setting(model, kwargs, name) or 1 for name in ("num_beams", "num_return_sequences"))


def require_cache(model: nn.Module, cache: Any) -> None:
    """Raise ``ValueError`` where ``cache`` is no cache of a stream of ``model``."""
    if not isinstance(cache, StreamingKVCache):
        raise ValueError(
            f"past_key_values must be a StreamingKVCache (stream.new_cache()), got {type(cache).__name__}"
        )
    cache.require_model(model_facts(model.config))


def refuse_arguments(model: nn.Module, cache: Any, continues: bool, kwargs: dict[str, Any]) -> None:
    """Raise ``ValueError`` for arguments of ``generate`` that would not stream, or not exactly."""
    require_cache(model, cache)
    refuse_images(kwargs)
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
    if cache.recurrent is not None and is_drafting(model, kwargs):
        raise ValueError(
            "drafted tokens cannot be taken back from the state of this model's recurrent layers: generate without "
            "assistant_model and prompt_lookup_num_tokens"
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
