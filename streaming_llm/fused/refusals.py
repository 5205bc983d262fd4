"""Why a model cannot go through the kernels of a recipe: what these would pass over without noticing."""

from __future__ import annotations

import torch
from torch import nn

from ..attention.kernel_choice import OWN_MODULES
from .family_recipes import recipe_of
from .recipe import Linear, Recipe
from .weights import NotCoveredError, Packed, stored

# Of this library, and those that Transformers leaves behind once it was asked for attention weights or hidden states:
# they do nothing until it is asked again.
_IDLE_HOOKS = ("streaming_llm.", "transformers.utils.output_capturing")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not(model: nn.Module) -> str | None:
    """Why no recipe covers all that ``model`` computes; ``None`` if one does."""
    if model.training:
        return "the model is in training mode: call model.eval()"
    for module in model.modules():
        reason = _of_module(module)
        if reason is not None:
            return reason
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        return (
            f"its weights are {', '.join(sorted(map(str, dtypes)))}, not all of one of {', '.join(map(str, DTYPES))}"
        )
    try:
        for parameter in model.parameters():
            stored(parameter)
        recipe = recipe_of(model)
    except NotCoveredError as error:
        return str(error)
    return _of_recipe(recipe)


def _of_module(module: nn.Module) -> str | None:
    kind = type(module)
    if not kind.__module__.startswith(OWN_MODULES):  # PEFT's, with a plain layer inside, or a quantising library's
        return f"it holds a {kind.__name__}, whose forward would be left out"
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    if any(not hook.__module__.startswith(_IDLE_HOOKS) for hook in hooks):
        return "hooks are registered on it"
    replaced = module.__dict__.get("forward")
    if replaced is not None and not _own(replaced):
        return f"the forward of a {kind.__name__} has been replaced"
    return None


def _own(function: object) -> bool:
    """Whether a function, or what ``functools.partial`` holds, is of this library."""
    function = getattr(function, "func", function)
    return getattr(function, "__module__", type(function).__module__ or "").startswith("streaming_llm.")


def _of_recipe(recipe: Recipe) -> str | None:
    if stored(recipe.embedding) is not recipe.embedding:
        return f"its embeddings are of class {type(recipe.embedding).__name__}"
    weights = [recipe.embedding, *(linear.weight for linear in recipe.linears)]
    if any(not weight.is_contiguous() for weight in weights):
        return "its weights are not all contiguous"
    if any(isinstance(weight, Packed) and not weight.is_aligned for weight in weights):
        return "its int4 weights, or halves of them, have odd numbers of rows or begin within a word of memory"
    for layer in recipe.layers:
        attention, mlp = layer.attention, layer.mlp
        out_norms = [norm for norm in (layer.attention_out_norm, layer.mlp_out_norm) if norm is not None]
        if any(norm.centred or norm.weight is None for norm in out_norms):
            return "a norm behind attention or MLP is no RMSNorm"
        if layer.multiplier != 1.0 and out_norms:
            return "it has norms and factors behind attention or MLP"
        for names, linears in (("query, key and value", attention.projections), ("gate and up", mlp.first)):
            if len({linear.bias is None for linear in linears}) > 1:
                return f"only some of {names} have a bias"
        outputs = (attention.output, mlp.down) if layer.parallel else ()
        read_together = (attention.projections, mlp.first, outputs)
        if any(len(set(map(_how_stored, linears))) > 1 for linears in read_together):
            return "matrices that a kernel reads together are not stored alike"
    return None


def _how_stored(linear: Linear) -> tuple[object, ...]:
    packed = linear.weight
    if not isinstance(packed, Packed):
        return ()
    return packed.bits, packed.group if packed.bits == 4 else None, packed.scale.dtype, packed.zero.dtype
