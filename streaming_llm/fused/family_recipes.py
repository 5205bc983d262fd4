"""The recipe of a model, read off its modules by the names that its family gives them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..attention.kernel_choice import unwrapped
from ..families import decoder_of, layer_windows, module_name, rotaries_from_model, text_config
from ..rope_utils import Rotary
from .family_names import NAMES, Names
from .recipe import MLP, Attention, Layer, Linear, Norm, Recipe

ACTIVATION_OF = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",  # before Transformers 5
    "ReLU": "relu",
}
"""Class of an activation in a model -> its name in recipes."""


class NotCoveredError(ValueError):
    """A recipe cannot say what this model computes; the message says what that is."""


def recipe_of(model: Any) -> Recipe:
    """The recipe of a causal language model of a family in the table.

    Raises:
        NotCoveredError: there is none, or it cannot say what this model computes.
        ValueError: the model cannot stream.
    """
    names = NAMES.get(model.config.model_type)
    if names is None:
        known = ", ".join(sorted(NAMES))
        raise NotCoveredError(f"no recipe covers model type {model.config.model_type!r} (only {known})")
    config, decoder = text_config(model.config), decoder_of(model)
    layers = getattr(decoder, names.layers)
    _require_own(layers, names, module_name(type(config)))
    table = model.get_input_embeddings()
    embedding = table.weight
    rotaries = rotaries_from_model(model)
    here = {id(rotary): rotary.to(embedding.device) for rotary in rotaries}  # layers that rotate alike share one
    per_layer = zip(layers, (here[id(rotary)] for rotary in rotaries), layer_windows(model.config), strict=True)
    scale = names.embedding_scale(config)
    if names.plus_one:  # Gemma's, rounded as its forward rounds it
        scale = torch.tensor(scale, dtype=embedding.dtype).item()
    return Recipe(
        embedding=embedding,
        embedding_scale=scale,
        given_scale=1.0 if hasattr(table, "embed_scale") else scale,
        layers=tuple(_layer(layer, names, config, rotary, window) for layer, rotary, window in per_layer),
        norm=norm_of(getattr(decoder, names.final_norm), names.plus_one),
        output=linear_of(model.get_output_embeddings()),
        logit_scale=names.logit_scale(config),
        logit_cap=getattr(config, "final_logit_softcapping", None),
    )


def _require_own(layers: Any, names: Names, module_name: str) -> None:
    """Layers, attention and MLPs of other classes than the family's may compute anything."""
    for layer in layers:
        for part in (layer, layer.mlp, unwrapped(getattr(layer, names.attention))):
            if type(part).__module__ != module_name:
                raise NotCoveredError(f"a {type(part).__name__} is in a layer, which is no class of {module_name}")


def _layer(layer: Any, names: Names, config: Any, rotary: Rotary, window: int | None) -> Layer:
    found = [_first(layer, of_place) for of_place in names.norms]
    norms = [None if norm is None else norm_of(norm, names.plus_one) for norm in found]
    parallel = names.parallel(config)
    return Layer(
        attention=_attention(getattr(layer, names.attention), names, config, rotary, window),
        mlp=_mlp(layer.mlp, names),
        parallel=parallel,
        attention_norm=norms[0],
        mlp_norm=norms[2] or (norms[0] if parallel else None),
        attention_out_norm=norms[1],
        mlp_out_norm=norms[3],
        multiplier=getattr(layer, "residual_multiplier", 1.0),
    )


def _first(parent: nn.Module, names: tuple[str, ...]) -> Any:
    return next((found for name in names if (found := getattr(parent, name, None)) is not None), None)


def _attention(module: nn.Module, names: Names, config: Any, rotary: Rotary, window: int | None) -> Attention:
    inner = unwrapped(module)
    num_heads = config.num_attention_heads
    num_kv_heads = names.kv_heads(config) or num_heads
    output = linear_of(getattr(inner, names.output))
    head_dim = output.columns // num_heads
    norms = [getattr(inner, name, None) for name in names.head_norms]
    query_norm, key_norm = (norm and head_norm_of(norm, names.plus_one) for norm in norms)
    return Attention(
        module=module,
        projections=tuple(linear_of(getattr(inner, name)) for name in names.qkv),
        places=names.places(num_heads, num_kv_heads),
        output=output,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary=rotary,
        scale=getattr(inner, "scaling", head_dim**-0.5),
        softcap=getattr(config, "attn_logit_softcapping", None),
        clip=getattr(config, "clip_qkv", None),
        query_norm=query_norm,
        key_norm=key_norm,
        norms_all_heads=names.norms_all_heads,
        window=window,
    )


def _mlp(module: Any, names: Names) -> MLP:
    function = _first(module, ("act_fn", "activation_fn", "act"))
    activation = ACTIVATION_OF.get(type(function).__name__)
    if activation is None:
        raise NotCoveredError(f"no kernel computes its activation {type(function).__name__}")
    down = linear_of(getattr(module, names.down))
    gate: Any = None if names.gate is None else linear_of(getattr(module, names.gate))
    if names.up is not None:
        return MLP(gate, linear_of(getattr(module, names.up)), down, activation, None)
    first, second = gate.halves()
    return MLP(first, second, down, activation, gate)


def linear_of(module: nn.Module) -> Linear:
    """A linear layer of a model."""
    if not isinstance(module, nn.Linear):
        raise NotCoveredError(f"it holds a {type(module).__name__} in place of a plain layer")
    return Linear(module.weight, module.bias)


def norm_of(module: nn.Module, plus_one: bool = False) -> Norm:
    """A norm of a model, by the last word of its class's name."""
    kind = type(module).__name__
    if not kind.endswith(("RMSNorm", "LayerNorm")):
        raise NotCoveredError(f"it has a norm of class {kind}")
    eps = _first(module, ("variance_epsilon", "eps"))
    return Norm(
        weight=getattr(module, "weight", None),
        bias=getattr(module, "bias", None),
        eps=1e-5 if eps is None else eps,  # OLMo's has it in its forward
        centred=kind.endswith("LayerNorm"),
        plus_one=plus_one,
    )


def head_norm_of(module: Any, plus_one: bool) -> Norm:
    """A norm of queries or keys; one of StableLM, which has a module for each head, as one with a row for each."""
    if not hasattr(module, "norms"):
        return norm_of(module, plus_one)
    parts = [norm_of(norm, plus_one) for norm in module.norms]
    weights, biases = ([x for part in parts if (x := getattr(part, name)) is not None] for name in ("weight", "bias"))
    bias = torch.stack(biases) if biases else None
    return Norm(torch.stack(weights), bias, parts[0].eps, centred=True)
