"""By what names the parts of each family's models go, and what differs beside names.

Adding a family is a row of the table, and a case of the test that compares recipes with the models' own forwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .recipe import HeadPlaces


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
