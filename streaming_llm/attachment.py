"""The one place that changes a model, and makes it as it was again.

A model is attached while somebody needs it to stream: wrappers, decoders and scorers enter, and the last to leave
restores it. What is changed stands in one list: an attribute of one of the model's modules, and its new value. No
class is touched, and nothing outside the model.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .attention.interface import AT_HAND, DELEGATES, MASKLESS, STREAMING, refuse_images
from .attention.kernel_choice import unwrapped
from .attention.plan import ForwardAtHand
from .attention.rewritten_layers import rewritten_forwards
from .families import (
    constant_up_to,
    decoder_of,
    exact_rotations,
    family_of_model,
    queries_scaled_from,
    transformers_model,
)
from .kv_cache import StreamingKVCache
from .saving import model_facts

ATTRIBUTE = "_streaming_attachment"
"""Where an attached model keeps its attachment."""

PAST_CONVOLUTIONS = 64
"""A position that is larger than any short convolution of a model is long."""

Change = tuple[nn.Module, str, Any]
"""A module, the name of an attribute, and its value while the model is attached."""


class Attachment:
    """What is changed on one model, and who needs it.

    It is attached with the prefix of an attention implementation: ``STREAMING``, or ``MASKLESS`` for a model that only
    has to do without masks, which streaming includes. Uses may overlap in any order.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._users: Counter[str] = Counter()
        self._in_force = ""
        self._put_now: list[Change] = []
        self._undo = ExitStack()

    @classmethod
    def enter(cls, model: nn.Module, prefix: str = STREAMING) -> Attachment:
        """Attach ``model``, or join those who have. Whoever enters calls :meth:`leave` with the same prefix.

        Raises:
            ValueError: the model cannot stream.
        """
        model = transformers_model(model)
        attachment = model.__dict__.get(ATTRIBUTE) or cls(model)
        attachment._users[prefix] += 1
        try:
            attachment._bring_in_force()
        except BaseException:
            attachment.leave(prefix)
            raise
        return attachment

    def leave(self, prefix: str = STREAMING) -> None:
        """Leave; the last user restores the model."""
        self._users[prefix] -= 1
        self._bring_in_force()

    def _bring_in_force(self) -> None:
        """Change the model to what its users need now."""
        wanted = next((prefix for prefix in (STREAMING, MASKLESS) if self._users[prefix]), "")
        if wanted == self._in_force:
            return
        self._undo.close()
        # A change that refers to this object would keep a model's memory until Python looks for circles.
        self._in_force, self._put_now = "", []
        if wanted:
            self._put(self._changes(wanted), wanted)

    def _put(self, changes: list[Change], prefix: str) -> None:
        with ExitStack() as undo:
            undo.enter_context(changed(changes))
            for hook in self._hooks() if prefix == STREAMING else ():
                undo.callback(hook.remove)
            self._undo = undo.pop_all()
        self._in_force, self._put_now = prefix, changes

    def _changes(self, prefix: str) -> list[Change]:
        """Everything that is changed but for hooks."""
        model = self.model
        changes: list[Change] = [(model, ATTRIBUTE, self), (model, "__deepcopy__", self._copy_of_model)]
        changes += _switched_attention(model, prefix)
        changes += rewritten_forwards(model)
        if prefix != STREAMING:
            return changes
        at_hand = self._at_hand = ForwardAtHand()
        # Where frequencies change with the length, a forward that is no stream's has the model's own.
        stands_in = None if constant_up_to(model.config) is None else (lambda: at_hand.cache is not None)
        changes += exact_rotations(model, stands_in, lambda: at_hand.positions)
        layers = {id(x): x for x in map(unwrapped, model.modules()) if "layer_idx" in vars(x)}
        return changes + [(layer, AT_HAND, at_hand) for layer in layers.values()]

    def _copy_of_model(self, memo: dict[int, Any]) -> PreTrainedModel:
        """``copy.deepcopy(model)`` gives a model as it is without being attached."""
        changes, prefix = self._put_now, self._in_force
        self._undo.close()
        try:
            return copy.deepcopy(self.model, memo)
        finally:
            self._put(changes, prefix)  # the same objects: a recorded step reads their tensors

    # Every forward of the decoder begins and ends with its cache

    def _hooks(self) -> list[torch.utils.hooks.RemovableHandle]:
        decoder, hooks = decoder_of(self.model), []
        if decoder is not self.model.base_model:
            hooks.append(self.model.register_forward_pre_hook(_refuse_images, with_kwargs=True))
        self._scales_queries = queries_scaled_from(self.model.config) is not None
        if family_of_model(self.model).has_state:
            firsts = [module for module in decoder.modules() if vars(module).get("layer_idx") == 0]
            hooks += [first.register_forward_pre_hook(self._first_layer) for first in firsts]
        self._facts = model_facts(self.model.config)
        self._parameters = list(inspect.signature(type(decoder).forward).parameters)[1:]  # without self
        return [
            *hooks,
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def _before(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        cache: Any = given.get("past_key_values")
        if isinstance(cache, (tuple, list)):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__} of keys and values, which Transformers no longer uses: "
                "give a cache (StreamingKVCache.from_model(model), or stream.new_cache())"
            )
        self._at_hand.cache = None
        if not hasattr(cache, "take_plan"):
            return None
        tokens = given["input_ids"] if given.get("inputs_embeds") is None else given["inputs_embeds"]
        if isinstance(cache, StreamingKVCache):
            cache.require_model(self._facts)
            cache.require_rows(len(tokens))
        cache.begin(tokens.shape[1], attached=True)
        self._at_hand.cache = cache
        if not isinstance(cache, StreamingKVCache):
            return None
        own: dict[str, Any] = {"position_ids": None, "cache_position": None}  # whatever was given
        if not cache.progress.together:
            rows = cache.progress.of_rows(len(tokens))
            own["position_ids"] = torch.tensor([[seen + offset] for seen, offset in rows], device=tokens.device)
        elif cache.recurrent is not None or self._scales_queries:  # some of these models would begin at 0 again
            first = cache.progress.position
            own["position_ids"] = torch.arange(first, first + tokens.shape[1], device=tokens.device).unsqueeze(0)
        if self._scales_queries:  # they grow with their position, which is that in the cache
            self._at_hand.positions, last = own["position_ids"], cache.streaming_config.cache_size
            own["position_ids"] = (self._at_hand.positions - max(cache.progress.offset)).clamp(max=last)
            own["cache_position"] = own["position_ids"].amax(0)
        if cache.recurrent is not None:
            # It tells whether they go on. Lfm2 takes a small one for a place in its state, which fills from the end.
            begin = max(cache.n_seen, PAST_CONVOLUTIONS) if cache.n_seen else 0
            own["cache_position"] = torch.arange(begin, begin + tokens.shape[1], device=tokens.device)
            own["past_key_values"] = cache.recurrent.native(decoder, cache, len(tokens), tokens.device)
        return (), given | {name: value for name, value in own.items() if name in self._parameters}

    def _first_layer(self, *unused: Any) -> None:
        if self._at_hand.cache is not None:
            self._at_hand.cache.first_layer_begins()

    def _after(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache, self._at_hand.cache, self._at_hand.positions = self._at_hand.cache, None, None
        if cache is None:
            return
        if getattr(cache, "recurrent", None) is not None:
            cache.recurrent.release()
            if output is not None and getattr(output, "past_key_values", None) is not None:
                output["past_key_values"] = cache
        if output is None:  # the forward raised an error
            cache.abandon()
        else:
            cache.end()


def _refuse_images(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if hasattr(kwargs.get("past_key_values"), "take_plan"):
        refuse_images(kwargs)


@contextmanager
def changed(changes: list[Change]) -> Iterator[None]:
    """Attributes of modules have other values until leaving."""
    with ExitStack() as undo:
        for module, name, value in changes:
            table = module._modules if isinstance(value, nn.Module) and name in module._modules else module.__dict__
            if name in table:
                undo.callback(table.__setitem__, name, table[name])
            else:
                undo.callback(table.pop, name, None)
            table[name] = value
        yield


def _switched_attention(model: nn.Module, prefix: str) -> list[Change]:
    """A copy of its configuration for each module, which names the attention implementation with ``prefix``.

    Configurations may be shared by models, so they are not changed.

    Raises:
        ValueError: the model's attention implementation is neither ``sdpa`` nor ``eager``.
    """
    modules = [module for module in map(unwrapped, model.modules()) if "config" in vars(module)]
    originals: dict[int, Any] = {
        id(m.config): m.config for m in modules if getattr(m.config, "_attn_implementation", None)
    }
    copies: dict[int, Any] = {}
    for original in originals.values():
        copy.deepcopy(original, copies)  # configurations inside it too, each once
    for key, original in originals.items():
        name = original._attn_implementation
        if name not in DELEGATES:
            raise ValueError(
                f"attention implementation {name!r} cannot be streamed: load the model with "
                f"attn_implementation={' or '.join(map(repr, DELEGATES))}"
            )
        copies[key]._attn_implementation_internal = prefix + name
    return [(module, "config", copies[id(module.config)]) for module in modules if id(module.config) in originals]


def foreign_hooks(model: nn.Module) -> bool:
    """Whether hooks of others are registered on the model's modules, or Accelerate's.

    Transformers' own stay behind where hidden states were asked for once, and do nothing otherwise.
    """
    for module in model.modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not getattr(hook, "__module__", "").startswith(("streaming_llm.", "transformers.")):
                return True
    return any(hasattr(module, "_hf_hook") for module in model.modules())


@contextmanager
def attached(model: nn.Module, prefix: str = STREAMING) -> Iterator[None]:
    """Attach ``model`` for a while."""
    attachment = Attachment.enter(model, prefix)
    try:
        yield
    finally:
        attachment.leave(prefix)


def maskless_attention(model: nn.Module) -> Any:
    """The model's attention is causal and no mask is built or inspected, so a forward never waits for the GPU.

    For loops without padding, which is not checked: a two-dimensional ``attention_mask`` is not read. Several queries
    over a longer cache are causal with the last query at the last key. The model is restored on leaving; uses may
    overlap.

    Raises:
        ValueError: the model's attention implementation is neither ``sdpa`` nor ``eager``.
    """
    return attached(model, MASKLESS)
