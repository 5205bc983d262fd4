"""The recipe of a model of each family: by what names its parts go, and what differs beside names.

Adding a family is a row of the table, and a case of the test that compares recipes with the models' own forwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..attention.kernel_choice import unwrapped
from ..attention.math_kernel import Scores
from ..families import decoder_of, layer_windows, module_name, rotaries_from_model, text_config
from ..rope_utils import Rotary
from .recipe import MLP, Attention, HeadPlaces, Layer, Linear, Norm, Recipe
from .weights import NotCoveredError, stored


@dataclass(frozen=True)
class Names:
    """By what names a family's parts go, and what of it is not as in Llama.

    Args:
        qkv: attributes of the attention layer: one matrix or three.
        places: ``(num_heads, num_kv_heads) -> HeadPlaces`` in what they give.
        head_norms: norms of query and key, where the layer has them.
        norms_all_heads: these are of all heads at once.
        mlp: gate, up and down; the first is empty where there is no gate, the second where the rows of both are those
            of one matrix.
        norms: of a layer: before and after attention, before and after the MLP. Of several names the one that is
            there; where there is none before the MLP of a parallel layer, that shares attention's.
        gemma: norms multiply with ``1 + weight``, and embeddings are scaled by the root of their size.
        parallel: ``config -> bool``.
        final_norm: of the decoder.
    """

    layers: str = "layers"
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    places: Callable[[int, int], HeadPlaces] = HeadPlaces.separate
    output: str = "o_proj"
    head_norms: tuple[str, str] = ("q_norm", "k_norm")
    norms_all_heads: bool = False
    mlp: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    norms: tuple[str, str, str, str] = ("input_layernorm", "", "post_attention_layernorm", "")
    gemma: bool = False
    parallel: Callable[[Any], bool] = lambda config: False
    final_norm: str = "norm"


_AS_LLAMA = ("granite", "llama", "ministral", "mistral", "olmo", "qwen2", "qwen3", "smollm3")
_FUSED_GATE = ("gate_up_proj", "", "down_proj")
_COHERE = Names(parallel=lambda config: True)
_GEMMA_SANDWICH = Names(
    gemma=True,
    norms=("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
_OLMO2 = Names(norms=("", "post_attention_layernorm", "", "post_feedforward_layernorm"), norms_all_heads=True)

NAMES: dict[str, Names] = {
    **dict.fromkeys(_AS_LLAMA, Names()),
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "falcon": Names(
        layers="h",
        final_norm="ln_f",
        parallel=lambda config: config.new_decoder_architecture or config.parallel_attn,
        attention="self_attention",
        qkv=("query_key_value",),
        places=HeadPlaces.by_kv_head,
        output="dense",
        norms=("ln_attn input_layernorm", "", "ln_mlp post_attention_layernorm", ""),
        mlp=("", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "gemma": Names(gemma=True),
    "gemma2": _GEMMA_SANDWICH,
    "gemma3_text": _GEMMA_SANDWICH,
    "glm": Names(mlp=_FUSED_GATE),
    "glm4": Names(
        mlp=_FUSED_GATE,
        norms=("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    ),
    "gpt_neox": Names(
        attention="attention",
        qkv=("query_key_value",),
        places=HeadPlaces.by_kv_head,
        output="dense",
        parallel=lambda config: config.use_parallel_residual,
        final_norm="final_layer_norm",
        mlp=("", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "gptj": Names(
        layers="h",
        final_norm="ln_f",
        parallel=lambda config: True,
        attention="attn",
        output="out_proj",
        norms=("ln_1", "", "", ""),
        mlp=("", "fc_in", "fc_out"),
    ),
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "phi": Names(
        output="dense",
        parallel=lambda config: True,
        head_norms=("q_layernorm", "k_layernorm"),
        final_norm="final_layernorm",
        mlp=("", "fc1", "fc2"),
    ),
    "phi3": Names(mlp=_FUSED_GATE, qkv=("qkv_proj",)),
    "stablelm": Names(parallel=lambda config: config.use_parallel_residual, head_norms=("q_layernorm", "k_layernorm")),
    "starcoder2": Names(mlp=("", "c_fc", "c_proj")),
}
"""Transformers' ``model_type`` -> names of its parts."""


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
    scale = getattr(config, "embedding_multiplier", 1.0)
    if names.gemma:  # rounded as its forward rounds it
        scale = torch.tensor(config.hidden_size**0.5, dtype=embedding.dtype).item()
    return Recipe(
        embedding=embedding,
        embedding_scale=scale,
        given_scale=1.0 if hasattr(table, "embed_scale") else scale,
        layers=tuple(_layer(layer, names, config, rotary, window) for layer, rotary, window in per_layer),
        norm=_norm(getattr(decoder, names.final_norm), names.gemma),
        output=_linear(model.get_output_embeddings()),
        logit_scale=getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0),
        logit_cap=getattr(config, "final_logit_softcapping", None),
    )


def _require_own(layers: Any, names: Names, module_name: str) -> None:
    """Layers, attention and MLPs of other classes than the family's may compute anything."""
    for layer in layers:
        for part in (layer, layer.mlp, unwrapped(getattr(layer, names.attention))):
            if type(part).__module__ != module_name:
                raise NotCoveredError(f"a {type(part).__name__} is in a layer, which is no class of {module_name}")


def _layer(layer: Any, names: Names, config: Any, rotary: Rotary, window: int | None) -> Layer:
    found = [_first_of(layer, name) for name in names.norms]
    norms = [None if norm is None else _norm(norm, names.gemma) for norm in found]
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


def _attention(module: nn.Module, names: Names, config: Any, rotary: Rotary, window: int | None) -> Attention:
    inner = unwrapped(module)
    projections = tuple(_linear(getattr(inner, name)) for name in names.qkv)
    output, num_heads = _linear(getattr(inner, names.output)), config.num_attention_heads
    head_dim = output.columns // num_heads
    num_kv_heads = (sum(linear.rows for linear in projections) // head_dim - num_heads) // 2
    query_norm, key_norm = (_head_norm(getattr(inner, name, None), names.gemma) for name in names.head_norms)
    return Attention(
        module=module,
        projections=projections,
        places=names.places(num_heads, num_kv_heads),
        output=output,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary=rotary,
        scores=Scores(getattr(inner, "scaling", head_dim**-0.5), getattr(config, "attn_logit_softcapping", None)),
        clip=getattr(config, "clip_qkv", None),
        query_norm=query_norm,
        key_norm=key_norm,
        norms_all_heads=names.norms_all_heads,
        window=window,
    )


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


def _mlp(module: Any, names: Names) -> MLP:
    activation = type(_first_of(module, "act_fn activation_fn act")).__name__
    if activation not in ACTIVATION_OF:
        raise NotCoveredError(f"no kernel computes its activation {activation}")
    act, (gate_name, up_name, down_name) = ACTIVATION_OF[activation], names.mlp
    down = _linear(getattr(module, down_name))
    gate: Any = _linear(getattr(module, gate_name)) if gate_name else None
    if up_name:
        return MLP(gate, _linear(getattr(module, up_name)), down, act)
    first, second = gate.halves()
    return MLP(first, second, down, act, gate_and_up=gate)


def _first_of(parent: nn.Module, names: str) -> Any:
    """The first of these attributes that is there and not ``None``; otherwise ``None``."""
    return next((found for name in names.split() if (found := getattr(parent, name, None)) is not None), None)


def _linear(module: nn.Module) -> Linear:
    if not isinstance(module, nn.Linear):
        raise NotCoveredError(f"it holds a {type(module).__name__} in place of a plain layer")
    return Linear(stored(module.weight), module.bias)


def _norm(module: nn.Module, plus_one: bool = False) -> Norm:
    """A norm of a model, by the last word of its class's name."""
    kind = type(module).__name__
    if not kind.endswith(("RMSNorm", "LayerNorm")):
        raise NotCoveredError(f"it has a norm of class {kind}")
    eps = _first_of(module, "variance_epsilon eps")
    return Norm(
        weight=getattr(module, "weight", None),
        bias=getattr(module, "bias", None),
        eps=1e-5 if eps is None else eps,  # OLMo's has it in its forward
        centred=kind.endswith("LayerNorm"),
        plus_one=plus_one,
    )


def _head_norm(module: Any, plus_one: bool) -> Norm | None:
    """A norm of queries or keys; one of StableLM, which has a module for each head, as one with a row for each."""
    if module is None:
        return None
    if not hasattr(module, "norms"):
        return _norm(module, plus_one)
    parts = [_norm(norm) for norm in module.norms]
    weights, biases = ([x for part in parts if (x := getattr(part, name)) is not None] for name in ("weight", "bias"))
    return Norm(torch.stack(weights), torch.stack(biases) if biases else None, parts[0].eps, centred=True)
