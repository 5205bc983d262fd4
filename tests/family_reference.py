"""The slow, independent path for every family: StreamingLLM in float64, token by token, written from the definitions.

Shares no code with the project and none of Transformers' attention, rotary, cache or model code: it reads weights and
configuration values. Keys are cached as they come out of the projection (and its norm), without rotation, and all of
them are rotated to their position in the cache at every step, as the original implementation does. A table says how
families differ; everything that is not said there is Llama's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from family_parts import (
    GEMMA_NORMS,
    GLM4_NORMS,
    Block,
    bare_layer_norm,
    cohere_head_norm,
    experts,
    falcon_qkv,
    falcon_residual,
    full_layer_norm,
    gated,
    gated_fused,
    gelu,
    gelu_tanh,
    head_dim_of,
    neox_qkv,
    optionally_normed,
    parallel,
    parallel_if,
    phi3_qkv,
    plain_rms,
    post_normed,
    rms_plus_one,
    sandwiched,
    separate,
    separate_normed,
    sequential,
    silu,
    stablelm_head_norm,
    two_layers,
)
from torch import Tensor

# Positions


def rope(config, layer_type: str) -> dict:
    """The rotary parameters of a kind of layer, by the names of newer Transformers."""
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None:
        scaling = dict(getattr(config, "rope_scaling", None) or {})
        local = getattr(config, "rope_local_base_freq", None)
        if layer_type == "sliding_attention" and config.model_type in ("gemma3_text", "olmo3"):
            scaling = {}
        else:
            local = None
        scaling.setdefault("rope_theta", local or getattr(config, "rope_theta", None) or config.rotary_emb_base)
        return scaling
    return parameters.get(layer_type, parameters)


def frequencies(config, layer_type: str, dim: int) -> tuple[Tensor, float]:
    """Angle per position ``[dim / 2]``, rounded to float32 as in every model, and the factor on keys and queries."""
    given = rope(config, layer_type)
    kind, base = given.get("rope_type", given.get("type", "default")), given["rope_theta"]
    exponent = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    frequency, factor = base**-exponent, 1.0
    scale = given.get("factor", 1.0)
    if kind == "linear":
        frequency = frequency / scale
    elif kind == "llama3":
        length = given["original_max_position_embeddings"]
        low, high = given["low_freq_factor"], given["high_freq_factor"]
        turns = length * frequency / (2 * math.pi)
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = (1 - smooth) * frequency / scale + smooth * frequency
    elif kind == "yarn":
        length = given["original_max_position_embeddings"]
        slow, fast = given.get("beta_slow", 1), given.get("beta_fast", 32)

        def dimension(turns: float) -> float:
            return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = max(math.floor(dimension(fast)), 0), min(math.ceil(dimension(slow)), dim - 1)
        ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
        frequency = ramp * frequency / scale + (1 - ramp) * frequency
        factor = 0.1 * math.log(scale) + 1
    elif kind == "longrope":  # of a stream no longer than the original length
        length = config.original_max_position_embeddings
        frequency = frequency / torch.tensor(given["short_factor"], dtype=torch.float64)
        factor = math.sqrt(1 + math.log(config.max_position_embeddings / length) / math.log(length))
    return frequency.float().double(), factor


def rotated(x: Tensor, positions: Tensor, frequency: Tensor, neighbours: bool) -> Tensor:
    """``x`` ``[batch, heads, n, head_dim]`` rotated to ``positions`` ``[n]`` in its first dimensions."""
    pairs = frequency.shape[0]
    angle = positions.double()[:, None] * frequency
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    a, b = (turned[..., ::2], turned[..., 1::2]) if neighbours else (turned[..., :pairs], turned[..., pairs:])
    a, b = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    turned = torch.stack((a, b), dim=-1).flatten(-2) if neighbours else torch.cat((a, b), dim=-1)
    return torch.cat((turned, rest), dim=-1)


# Families


def partial_dim(config) -> int:
    given = getattr(config, "rope_parameters", None) or {}
    factors = (given.get("partial_rotary_factor"), getattr(config, "partial_rotary_factor", None))
    factors += (getattr(config, "rotary_pct", None), 1.0)
    return int(head_dim_of(config) * next(factor for factor in factors if factor is not None))


def default_scale(config) -> float:
    return head_dim_of(config) ** -0.5


def gemma_scale(config) -> float:
    return config.query_pre_attn_scalar**-0.5


def sqrt_hidden(config) -> float:
    return config.hidden_size**0.5


def capped(config, logits: Tensor) -> Tensor:
    cap = config.final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap)


@dataclass(frozen=True)
class Family:
    norm: Callable = plain_rms
    qkv: Callable = separate
    out: str = "self_attn.o_proj"
    attention: str = "self_attn"
    mlp: Callable = field(default_factory=lambda: gated(silu))
    residual: Callable = sequential
    neighbours: bool = False
    rotary_dim: Callable = partial_dim
    unrotated: Callable = lambda config, index: False
    score_scale: Callable = default_scale
    embed: str = "model.embed_tokens"
    embed_scale: Callable = lambda config: 1.0
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    logits: Callable = lambda config, logits: logits


_GEMMA = {"norm": rms_plus_one, "mlp": gated(gelu_tanh), "embed_scale": sqrt_hidden}
_COHERE = {
    "norm": full_layer_norm,
    "residual": parallel("input_layernorm"),
    "neighbours": True,
    "logits": lambda config, logits: logits * config.logit_scale,
}
_OLMO2 = Family(qkv=separate_normed(plain_rms, whole=True), residual=post_normed)
_TRANSFORMER = {"embed": "transformer.wte", "layers": "transformer.h", "final_norm": "transformer.ln_f"}

FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(qkv=separate_normed(plain_rms)),
    "olmo": Family(norm=bare_layer_norm),
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "smollm3": Family(unrotated=lambda config, index: not config.no_rope_layers[index]),
    "granite": Family(
        score_scale=lambda config: config.attention_multiplier,
        embed_scale=lambda config: config.embedding_multiplier,
        logits=lambda config, logits: logits / config.logits_scaling,
    ),
    "stablelm": Family(
        norm=full_layer_norm,
        qkv=optionally_normed(
            "qk_layernorm", separate_normed(stablelm_head_norm, names=("q_layernorm", "k_layernorm"))
        ),
        residual=parallel_if("use_parallel_residual", parallel("input_layernorm")),
    ),
    "phi": Family(
        norm=full_layer_norm,
        qkv=optionally_normed("qk_layernorm", separate_normed(full_layer_norm, names=("q_layernorm", "k_layernorm"))),
        out="self_attn.dense",
        mlp=two_layers("mlp.fc1", "mlp.fc2", gelu_tanh),
        residual=parallel("input_layernorm"),
        final_norm="model.final_layernorm",
    ),
    "phi3": Family(qkv=phi3_qkv, mlp=gated_fused),
    "gemma": Family(**_GEMMA),
    "gemma2": Family(**_GEMMA, residual=sandwiched(GEMMA_NORMS), score_scale=gemma_scale, logits=capped),
    "gemma3_text": Family(
        **_GEMMA,
        qkv=separate_normed(rms_plus_one),
        residual=sandwiched(GEMMA_NORMS),
        score_scale=gemma_scale,
        logits=capped,
    ),
    "cohere": Family(**_COHERE, qkv=optionally_normed("use_qk_norm", separate_normed(cohere_head_norm))),
    "cohere2": Family(**_COHERE, unrotated=lambda config, index: config.layer_types[index] != "sliding_attention"),
    "glm": Family(neighbours=True, mlp=gated_fused),
    "glm4": Family(neighbours=True, mlp=gated_fused, residual=sandwiched(GLM4_NORMS)),
    "starcoder2": Family(norm=full_layer_norm, mlp=two_layers("mlp.c_fc", "mlp.c_proj", gelu_tanh)),
    "mixtral": Family(mlp=experts(lambda config: True)),
    "qwen2_moe": Family(mlp=experts(lambda config: config.norm_topk_prob, shared=True)),
    "qwen3_moe": Family(qkv=separate_normed(plain_rms), mlp=experts(lambda config: config.norm_topk_prob)),
    "gpt_neox": Family(
        norm=full_layer_norm,
        qkv=neox_qkv,
        out="attention.dense",
        mlp=two_layers("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", gelu),
        residual=parallel_if("use_parallel_residual", parallel("input_layernorm", "post_attention_layernorm")),
        embed="gpt_neox.embed_in",
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
    ),
    "gptj": Family(
        **_TRANSFORMER,
        norm=full_layer_norm,
        attention="attn",
        out="attn.out_proj",
        mlp=two_layers("mlp.fc_in", "mlp.fc_out", gelu_tanh),
        residual=parallel("ln_1"),
        neighbours=True,
        rotary_dim=lambda config: config.rotary_dim,
    ),
    "falcon": Family(
        norm=full_layer_norm,
        qkv=falcon_qkv,
        out="self_attention.dense",
        mlp=two_layers("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", gelu),
        residual=falcon_residual,
        embed="transformer.word_embeddings",
        layers="transformer.h",
        final_norm="transformer.ln_f",
    ),
}


# The stream


class _Attention:
    """One layer's cache of un-rotated keys, and attention of the next token over it."""

    def __init__(self, block: Block, sizes: tuple[int, int], keep: bool, gapped: bool, given: Tensor | None) -> None:
        self.block, self.n_sink, self.kept, self.gapped = block, sizes[0], sum(sizes), gapped
        config, family = block.config, block.family
        types = getattr(config, "layer_types", None) or ["full_attention"] * (block.index + 1)
        layer_type = types[block.index]
        if layer_type == "sliding_attention" and "full_attention" in types and keep:  # as the model has it
            self.n_sink, self.kept = 0, config.sliding_window - 1
        dim = 0 if family.unrotated(config, block.index) else family.rotary_dim(config)
        if config.model_type == "gptj":
            given = (10000 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)).float().double()
        self.frequency, self.factor = frequencies(config, layer_type, dim) if given is None else (given, 1.0)
        self.turned = slice(0, dim)
        self.cap = getattr(config, "attn_logit_softcapping", None)
        self.cache: list[tuple[Tensor, Tensor]] = []
        self.in_stream: list[int] = []

    def rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        x = rotated(x, positions, self.frequency, self.block.family.neighbours)
        if self.factor != 1.0:
            x = torch.cat((x[..., self.turned] * self.factor, x[..., self.turned.stop :]), dim=-1)
        return x

    def __call__(self, x: Tensor) -> Tensor:
        block = self.block
        q, k, v = block.family.qkv(block, x)  # [batch, heads, head_dim]
        self.in_stream.append(self.in_stream[-1] + 1 if self.in_stream else 0)
        if len(self.cache) > self.kept:
            del self.cache[self.n_sink], self.in_stream[self.n_sink]
        self.cache.append((k, v))
        keys, values = (torch.stack(part, dim=2) for part in zip(*self.cache, strict=True))
        positions = torch.tensor(self.in_stream) if self.gapped else torch.arange(len(self.cache))
        keys, q = self.rotated(keys, positions), self.rotated(q.unsqueeze(2), positions[-1:])
        groups = q.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
        scores = q @ keys.transpose(2, 3) * block.family.score_scale(block.config)
        if self.cap is not None:
            scores = self.cap * torch.tanh(scores / self.cap)
        out = (scores.softmax(-1) @ values).flatten(1)
        return block.linear(out, block.family.out)


@torch.no_grad()
def family_reference_logits(
    model, input_ids: Tensor, n_sink: int, window_size: int, keep: bool = True, *, gapped: bool = False,
    frequency: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Float64 logits ``[batch, length, vocab]`` of ``input_ids`` ``[batch, length]`` fed one by one.

    Args:
        keep: layers with a window of their own stay as they are, where other layers see everything.
        gapped: kept tokens stay at their positions in the stream.
        frequency: in place of those that the configuration gives.
    """
    config = model.config.get_text_config(decoder=True)
    family = FAMILIES[config.model_type]
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    top = Block(weights, config, family, "")
    output_layer = next(name for name in ("lm_head", "embed_out") if f"{name}.weight" in weights)
    blocks = [Block(weights, config, family, f"{family.layers}.{i}.", i) for i in range(config.num_hidden_layers)]
    attentions = [_Attention(block, (n_sink, window_size), keep, gapped, frequency) for block in blocks]
    logits = []
    for token in input_ids.T:
        x = F.embedding(token, weights[f"{family.embed}.weight"]) * family.embed_scale(config)
        for block, attend in zip(blocks, attentions, strict=True):
            x = family.residual(block, x, attend)
        logits.append(family.logits(config, top.linear(top.norm(x, family.final_norm), output_layer)))
    return torch.stack(logits, dim=1)
