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
from .model_parts import activation_of, first_of, head_norm_of, linear_of, norm_of
from .recipe import MLP, Attention, HeadPlaces, Layer, Recipe
from .weights import NotCoveredError


@dataclass(frozen=True)
class Names:
    """By what names a family's parts go, and what of it is not as in Llama.

    Args:
        qkv: attributes of the attention layer: one matrix or three.
        places: ``(num_heads, num_kv_heads) -> HeadPlaces`` in what they give.
        kv_heads: ``config -> num_kv_heads``.
        head_norms: norms of query and key, where the layer has them.
        gate, up, down: attributes of the MLP; ``gate`` is ``None`` where there is none, and ``up`` where the rows of
            both are those of one matrix.
        norms: of a layer: before and after attention, before and after the MLP. Of several names the one that is
            there; where there is none before the MLP of a parallel layer, that shares attention's.
        parallel: ``config -> bool``.
        final_norm: of the decoder.
        embedding_scale: ``config -> factor``.
        logit_scale: ``config -> factor``.
    """

    layers: str = "layers"
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    places: Callable[[int, int], HeadPlaces] = HeadPlaces.separate
    kv_heads: Callable[[Any], Any] = lambda config: getattr(config, "num_key_value_heads", None)
    output: str = "o_proj"
    head_norms: tuple[str, str] = ("q_norm", "k_norm")
    norms_all_heads: bool = False
    gate: str | None = "gate_proj"
    up: str | None = "up_proj"
    down: str = "down_proj"
    norms: tuple[tuple[str, ...], ...] = (("input_layernorm",), (), ("post_attention_layernorm",), ())
    plus_one: bool = False
    parallel: Callable[[Any], bool] = lambda config: False
    final_norm: str = "norm"
    embedding_scale: Callable[[Any], float] = lambda config: 1.0
    logit_scale: Callable[[Any], float] = lambda config: 1.0


def _sandwich(*names: str) -> tuple[tuple[str, ...], ...]:
    return tuple((name,) if name else () for name in names)


def _plain_mlp(up: str, down: str) -> dict[str, Any]:
    return {"gate": None, "up": up, "down": down}


def _is_parallel(config: Any) -> bool:
    return True


def _residual_flag(config: Any) -> bool:
    return config.use_parallel_residual


def _falcon_places(num_heads: int, num_kv_heads: int) -> HeadPlaces:
    shared_by_all = num_kv_heads == 1
    return (HeadPlaces.separate if shared_by_all else HeadPlaces.by_kv_head)(num_heads, num_kv_heads)


def _falcon_kv_heads(config: Any) -> int:
    if config.new_decoder_architecture:
        return config.num_kv_heads
    return 1 if config.multi_query else config.num_attention_heads


_LLAMA = Names()
_GEMMA: dict[str, Any] = {"plus_one": True, "embedding_scale": lambda config: config.hidden_size**0.5}
_GEMMA_SANDWICH = _sandwich(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
_FUSED_GATE: dict[str, Any] = {"gate": "gate_up_proj", "up": None}
_COHERE = Names(parallel=_is_parallel, logit_scale=lambda config: config.logit_scale)
_OF_TRANSFORMER: dict[str, Any] = {"layers": "h", "final_norm": "ln_f", "parallel": _is_parallel}

NAMES: dict[str, Names] = {
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "falcon": Names(
        layers="h",
        final_norm="ln_f",
        parallel=lambda config: config.new_decoder_architecture or config.parallel_attn,
        attention="self_attention",
        qkv=("query_key_value",),
        places=_falcon_places,
        kv_heads=_falcon_kv_heads,
        output="dense",
        norms=(("ln_attn", "input_layernorm"), (), ("ln_mlp", "post_attention_layernorm"), ()),
        **_plain_mlp("dense_h_to_4h", "dense_4h_to_h"),
    ),
    "gemma": Names(**_GEMMA),
    "gemma2": Names(**_GEMMA, norms=_GEMMA_SANDWICH),
    "gemma3_text": Names(**_GEMMA, norms=_GEMMA_SANDWICH),
    "glm": Names(**_FUSED_GATE),
    "glm4": Names(
        **_FUSED_GATE,
        norms=_sandwich(
            "input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"
        ),
    ),
    "gpt_neox": Names(
        attention="attention",
        qkv=("query_key_value",),
        places=HeadPlaces.by_kv_head,
        output="dense",
        parallel=_residual_flag,
        final_norm="final_layer_norm",
        **_plain_mlp("dense_h_to_4h", "dense_4h_to_h"),
    ),
    "gptj": Names(
        **_OF_TRANSFORMER,
        attention="attn",
        output="out_proj",
        norms=(("ln_1",), (), (), ()),
        **_plain_mlp("fc_in", "fc_out"),
    ),
    "granite": Names(
        embedding_scale=lambda config: config.embedding_multiplier,
        logit_scale=lambda config: 1.0 / config.logits_scaling,
    ),
    "llama": _LLAMA,
    "ministral": _LLAMA,
    "mistral": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": Names(
        norms=_sandwich("", "post_attention_layernorm", "", "post_feedforward_layernorm"), norms_all_heads=True
    ),
    "phi": Names(
        output="dense",
        parallel=_is_parallel,
        head_norms=("q_layernorm", "k_layernorm"),
        final_norm="final_layernorm",
        **_plain_mlp("fc1", "fc2"),
    ),
    "phi3": Names(**_FUSED_GATE, qkv=("qkv_proj",)),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": Names(parallel=_residual_flag, head_norms=("q_layernorm", "k_layernorm")),
    "starcoder2": Names(**_plain_mlp("c_fc", "c_proj")),
}
"""Transformers' ``model_type`` -> names of its parts."""
NAMES["olmo3"] = NAMES["olmo2"]


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
    found = [first_of(layer, of_place) for of_place in names.norms]
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
        scores=Scores(getattr(inner, "scaling", head_dim**-0.5), getattr(config, "attn_logit_softcapping", None)),
        clip=getattr(config, "clip_qkv", None),
        query_norm=query_norm,
        key_norm=key_norm,
        norms_all_heads=names.norms_all_heads,
        window=window,
    )


def _mlp(module: Any, names: Names) -> MLP:
    down, activation = linear_of(getattr(module, names.down)), activation_of(module)
    gate: Any = None if names.gate is None else linear_of(getattr(module, names.gate))
    if names.up is not None:
        return MLP(gate, linear_of(getattr(module, names.up)), down, activation, None)
    first, second = gate.halves()
    return MLP(first, second, down, activation, gate)
