"""What a family does with positions, found by measurement on a small random model of it.

One token is fed in several rows, each at another position and with nothing before it. So every layer sees the same
hidden states in all rows, and keys and queries differ by their rotation alone: what the rotary module's frequencies
would give is compared with what reaches the cache and the attention function. A rotation that agrees is the layer's;
keys that are the same at all positions have none; anything else is refused.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ..rope_utils import Rotary
from .family import (
    Family,
    MeasuredOtherwiseError,
    constant_up_to,
    held_rotations,
    queries_scaled_from,
    rotary_modules_of,
)
from .native_cache import native_cache, uses_attention_functions
from .notes import Notes, layout_of, require_latents, require_turned, rotation_of
from .small import small_model
from .table import LAYER_TYPES, REWRITTEN_TYPES

POSITIONS = (0, 1, 2, 5, 60, 1001)
"""Where the token is put; those beyond the length up to which a rotation is constant are left out."""

MEASURING = "streaming_llm_measuring"
"""Name of the attention implementation that notes what it is given."""


_notes: list[Notes] = []


def _attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    return _notes[-1].attend(module, *args, **kwargs)


AttentionInterface.register(MEASURING, _attention)


def measure(model_class: type[nn.Module], config: Any, table: Rotary | None = None) -> Family:
    """Measure a decoder's class, as it is with a configuration of it.

    Args:
        table: the rotation of a model that reads it from a table (GPT-J) and has no rotary module.

    Raises:
        MeasuredOtherwiseError: it does what a stream cannot go on with; says what was measured.
    """
    try:
        model = small_model(model_class, config)
    except Exception as error:
        raise MeasuredOtherwiseError(
            f"a small {model_class.__name__} of this configuration cannot be made to measure it: {error}"
        ) from error
    modules = rotary_modules_of(model)
    if not modules and table is None and "position_ids" not in inspect.signature(model_class.forward).parameters:
        raise MeasuredOtherwiseError("it has no rotary module and takes no position_ids")
    held = held_rotations(modules, table)
    limits = constant_up_to(config), queries_scaled_from(config), getattr(config, "max_position_embeddings", None)
    limit = min((n for n in limits if n), default=max(POSITIONS) + 1)
    positions = torch.tensor([p for p in POSITIONS if p < limit])
    notes = _run(model, modules, positions)
    stores = tuple(sorted(notes.keys))
    if set(notes.sources) & set(stores):
        raise MeasuredOtherwiseError("it runs its layers several times for each token")
    if not notes.queries and config.model_type not in REWRITTEN_TYPES:
        raise MeasuredOtherwiseError("its attention layers do not go through Transformers' attention functions")
    types = getattr(config, "layer_types", None) or ()
    if not stores:
        raise MeasuredOtherwiseError("none of its layers stores keys in a cache")
    kinds = {index: types[index] for index in (*stores, *notes.sources) if index < len(types)}
    others = set(kinds.values()) - set(LAYER_TYPES)
    if others:
        raise MeasuredOtherwiseError(f"it has attention layers of type {', '.join(sorted(others))}")
    rotations = tuple(rotation_of(index, notes, held, kinds.get(index), positions) for index in stores)
    for layer, source in notes.sources.items():
        require_turned(layer, notes.queries[layer], rotations[stores.index(source)], held, positions)
    for layer, rotation in zip(stores, rotations, strict=True):
        if notes.parts:
            require_latents(layer, notes, rotation, held, positions)
    has_state = len(stores) + len(notes.sources) < config.num_hidden_layers or _keeps_state(model)
    called = {at for at, _ in notes.returned}
    return Family(
        stores,
        rotations,
        held,
        notes.sources,
        {path: layout_of(path, notes, held) for path in modules if path in called},
        has_state,
        bool(notes.parts),
        not has_state or _blocks_continue(model),
    )


def _keeps_state(model: nn.Module) -> bool:
    """Whether there are recurrent layers beside attention, or within the same layer (Falcon-H1)."""
    return any(hasattr(module, "layer_idx") and hasattr(module, "conv1d") for module in model.modules())


@torch.no_grad()
def _run(model: Any, modules: dict[str, nn.Module], positions: Tensor) -> Notes:
    notes, ids = Notes(), torch.ones(len(positions), 1, dtype=torch.int64)
    hooks = [x.register_forward_hook(notes.noting(path), with_kwargs=True) for path, x in modules.items()]
    if uses_attention_functions(model):
        for module in model.modules():
            if "config" in vars(module):
                module.config._attn_implementation_internal = MEASURING
            if hasattr(module, "_update_causal_mask"):  # older files make their masks themselves, but not in a stream
                module._update_causal_mask = lambda *args, **kwargs: None
    _notes.append(notes)
    try:
        cache = native_cache(model, len(positions), "cpu", torch.float32)
        cache.update = notes.store
        model(input_ids=ids, position_ids=positions.unsqueeze(1), past_key_values=cache, use_cache=True)
    except MeasuredOtherwiseError:
        raise
    except Exception as error:
        raise MeasuredOtherwiseError(f"a small model of it cannot be run to measure it: {error!r}") from error
    finally:
        _notes.remove(notes)
        for hook in hooks:
            hook.remove()
    return notes


@torch.no_grad()
def _blocks_continue(model: Any) -> bool:
    """Whether a second block of tokens goes on from the state that the first one left."""
    for module in model.modules():
        if "config" in vars(module):
            module.config._attn_implementation_internal = "eager"
    ids, positions = torch.tensor([[1, 3, 2, 4, 1, 2]]), torch.arange(6).unsqueeze(0)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)  # so that what is left out shows
    whole, cache = (
        model(input_ids=ids, use_cache=False).last_hidden_state,
        native_cache(model, 1, "cpu", torch.float32),
    )
    cut = []
    try:
        for block, at in zip(ids.split(3, dim=1), positions.split(3, dim=1), strict=True):
            given = {"input_ids": block, "position_ids": at, "cache_position": at[0]}
            cut.append(model(**given, past_key_values=cache, use_cache=True).last_hidden_state)
    except Exception:  # some expect a single token
        return False
    return bool((torch.cat(cut, dim=1) - whole).abs().max() < 1e-3 * whole.abs().max())
