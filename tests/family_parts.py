"""Parts of the architectures for the float64 reference: norms, projections, feed-forward layers, residual streams.

Written from the definitions; shares no code with the project nor with Transformers' models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from family_reference import Family


def rms_norm(x: Tensor, weight: Tensor | float, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def layer_norm(x: Tensor, weight: Tensor | float, bias: Tensor | float, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


class Block:
    """Weights below one prefix, in float64, and the arithmetic on them that families share."""

    def __init__(self, weights: dict[str, Tensor], config, family: Family, prefix: str, index: int = 0) -> None:
        self.weights, self.config, self.family, self.prefix, self.index = weights, config, family, prefix, index

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[f"{self.prefix}{name}"]

    def get(self, name: str, default: float) -> Tensor | float:
        return self.weights.get(f"{self.prefix}{name}", default)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self[f"{name}.weight"].T + self.get(f"{name}.bias", 0.0)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return self.family.norm(self, x, name)

    @property
    def eps(self) -> float:
        names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
        return next(getattr(self.config, name) for name in names if hasattr(self.config, name))


def plain_rms(block: Block, x: Tensor, name: str) -> Tensor:
    return rms_norm(x, block[f"{name}.weight"], block.eps)


def rms_plus_one(block: Block, x: Tensor, name: str) -> Tensor:
    return rms_norm(x, 1 + block[f"{name}.weight"], block.eps)


def full_layer_norm(block: Block, x: Tensor, name: str) -> Tensor:
    return layer_norm(x, block[f"{name}.weight"], block.get(f"{name}.bias", 0.0), block.eps)


def bare_layer_norm(block: Block, x: Tensor, name: str) -> Tensor:
    return layer_norm(x, 1.0, 0.0, 1e-5)


# Queries, keys and values: [batch, heads, head_dim] each


def heads(x: Tensor, head_dim: int) -> Tensor:
    return x.unflatten(-1, (-1, head_dim))


def head_dim_of(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def separate(block: Block, x: Tensor) -> tuple[Tensor, ...]:
    at = block.family.attention
    return tuple(heads(block.linear(x, f"{at}.{p}_proj"), head_dim_of(block.config)) for p in "qkv")


def separate_normed(norm: Callable, whole: bool = False, names: tuple[str, str] = ("q_norm", "k_norm")) -> Callable:
    """Queries and keys normed per head, or over all heads at once (OLMo 2)."""

    def qkv(block: Block, x: Tensor) -> tuple[Tensor, ...]:
        at, dim = block.family.attention, head_dim_of(block.config)
        q, k, v = (block.linear(x, f"{at}.{p}_proj") for p in "qkv")
        if not whole:
            q, k = heads(q, dim), heads(k, dim)
        q, k = norm(block, q, f"{at}.{names[0]}"), norm(block, k, f"{at}.{names[1]}")
        if whole:
            q, k = heads(q, dim), heads(k, dim)
        return q, k, heads(v, dim)

    return qkv


def optionally_normed(flag: str, normed: Callable) -> Callable:
    return lambda block, x: (normed if getattr(block.config, flag) else separate)(block, x)


def stablelm_head_norm(block: Block, x: Tensor, name: str) -> Tensor:
    weight = torch.stack([block[f"{name}.norms.{head}.weight"] for head in range(x.shape[-2])])
    return layer_norm(x, weight, 0.0, block.eps)


def cohere_head_norm(block: Block, x: Tensor, name: str) -> Tensor:
    return layer_norm(x, block[f"{name}.weight"], 0.0, block.eps)


def neox_qkv(block: Block, x: Tensor) -> tuple[Tensor, ...]:
    return heads(block.linear(x, "attention.query_key_value"), 3 * head_dim_of(block.config)).chunk(3, dim=-1)


def phi3_qkv(block: Block, x: Tensor) -> tuple[Tensor, ...]:
    config, dim = block.config, head_dim_of(block.config)
    sizes = [config.num_attention_heads * dim] + 2 * [config.num_key_value_heads * dim]
    return tuple(heads(y, dim) for y in block.linear(x, "self_attn.qkv_proj").split(sizes, dim=-1))


def falcon_qkv(block: Block, x: Tensor) -> tuple[Tensor, ...]:
    config, dim = block.config, head_dim_of(block.config)
    fused = heads(block.linear(x, "self_attention.query_key_value"), dim)  # [batch, heads of all kinds, dim]
    if config.new_decoder_architecture:
        groups = config.num_attention_heads // config.num_kv_heads
        fused = fused.unflatten(1, (config.num_kv_heads, groups + 2))
        return fused[:, :, :-2].flatten(1, 2), fused[:, :, -2], fused[:, :, -1]
    if config.multi_query:
        return fused[:, :-2], fused[:, -2:-1], fused[:, -1:]
    fused = fused.unflatten(1, (config.num_attention_heads, 3))
    return fused[:, :, 0], fused[:, :, 1], fused[:, :, 2]


# Feed-forward layers


def gated(activation: Callable) -> Callable:
    def mlp(block: Block, x: Tensor) -> Tensor:
        hidden = activation(block.linear(x, "mlp.gate_proj")) * block.linear(x, "mlp.up_proj")
        return block.linear(hidden, "mlp.down_proj")

    return mlp


def gated_fused(block: Block, x: Tensor) -> Tensor:
    gate, up = block.linear(x, "mlp.gate_up_proj").chunk(2, dim=-1)
    return block.linear(silu(gate) * up, "mlp.down_proj")


def two_layers(up: str, down: str, activation: Callable) -> Callable:
    return lambda block, x: block.linear(activation(block.linear(x, up)), down)


def experts(normalised: Callable[[object], bool], shared: bool = False) -> Callable:
    """Each token through its best experts, weighted; Qwen 2 adds one for all."""

    def place(block: Block) -> str:
        return next(
            name for name in ("mlp", "block_sparse_moe") if f"{block.prefix}{name}.gate.weight" in block.weights
        )

    def expert(block: Block, x: Tensor, number: int) -> Tensor:
        where = place(block)
        if f"{block.prefix}{where}.experts.gate_up_proj" in block.weights:  # newer Transformers: all experts in one
            gate, up = (x @ block[f"{where}.experts.gate_up_proj"][number].T).chunk(2, dim=-1)
            return (silu(gate) * up) @ block[f"{where}.experts.down_proj"][number].T
        names = ("w1", "w3", "w2") if "sparse" in where else ("gate_proj", "up_proj", "down_proj")
        gate, up, down = (f"{where}.experts.{number}.{name}" for name in names)
        return block.linear(silu(block.linear(x, gate)) * block.linear(x, up), down)

    def mlp(block: Block, x: Tensor) -> Tensor:
        probability = block.linear(x, f"{place(block)}.gate").softmax(-1)
        best, chosen = probability.topk(block.config.num_experts_per_tok, dim=-1)
        if normalised(block.config):
            best = best / best.sum(-1, keepdim=True)
        rows = [
            sum(w * expert(block, row, int(number)) for w, number in zip(weights, numbers, strict=True))
            for row, weights, numbers in zip(x, best, chosen, strict=True)
        ]
        out = torch.stack(rows)
        if shared:
            hidden = silu(block.linear(x, "mlp.shared_expert.gate_proj")) * block.linear(
                x, "mlp.shared_expert.up_proj"
            )
            weight = torch.sigmoid(block.linear(x, "mlp.shared_expert_gate"))
            out = out + weight * block.linear(hidden, "mlp.shared_expert.down_proj")
        return out

    return mlp


# Residual streams: (block, x, attention) -> x


def sequential(block: Block, x: Tensor, attend: Callable) -> Tensor:
    scale = getattr(block.config, "residual_multiplier", 1.0)
    x = x + scale * attend(block.norm(x, "input_layernorm"))
    return x + scale * block.family.mlp(block, block.norm(x, "post_attention_layernorm"))


def post_normed(block: Block, x: Tensor, attend: Callable) -> Tensor:
    x = x + block.norm(attend(x), "post_attention_layernorm")
    return x + block.norm(block.family.mlp(block, x), "post_feedforward_layernorm")


def sandwiched(names: tuple[str, str, str, str]) -> Callable:
    """Norms before and after attention, before and after the feed-forward layer."""

    def residual(block: Block, x: Tensor, attend: Callable) -> Tensor:
        before, after, before_mlp, after_mlp = names
        x = x + block.norm(attend(block.norm(x, before)), after)
        return x + block.norm(block.family.mlp(block, block.norm(x, before_mlp)), after_mlp)

    return residual


GEMMA_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
GLM4_NORMS = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")


def parallel(norm: str, mlp_norm: str | None = None) -> Callable:
    def residual(block: Block, x: Tensor, attend: Callable) -> Tensor:
        normed = block.norm(x, norm)
        other = block.norm(x, mlp_norm) if mlp_norm else normed
        return x + attend(normed) + block.family.mlp(block, other)

    return residual


def parallel_if(flag: str, then: Callable) -> Callable:
    return lambda block, x, attend: (then if getattr(block.config, flag) else sequential)(block, x, attend)


def falcon_residual(block: Block, x: Tensor, attend: Callable) -> Tensor:
    if block.config.new_decoder_architecture:
        return parallel("ln_attn", "ln_mlp")(block, x, attend)
    return (parallel("input_layernorm") if block.config.parallel_attn else sequential)(block, x, attend)
