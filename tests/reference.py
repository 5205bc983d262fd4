"""The slow, independent path: StreamingLLM on GPT-NeoX in float64, token by token, written from the definition.

Shares no code with the project and none of Transformers' attention, rotary or cache code: it reads the weights.
Keys are cached as they come out of the projection, without rotation, and all of them are rotated to their
position in the cache at every step, as the original implementation does.
"""

from __future__ import annotations

import functools
import hashlib

import torch


def rotated(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """``x`` ``[batch, heads, n, head_dim]`` rotated to ``positions`` ``[n]`` in its first dimensions."""
    half = inv_freq.shape[0]
    angle = positions.double()[:, None] * inv_freq[None, :]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest), dim=-1)


def once(compute):
    """Computes the same logits once: tests of two kernels or dtypes have one reference."""
    found: dict[tuple, torch.Tensor] = {}

    @functools.wraps(compute)
    def logits(model, input_ids: torch.Tensor, *sizes, **options) -> torch.Tensor:
        digest, rotary = hashlib.sha256(), model.gpt_neox.rotary_emb
        for tensor in (*model.state_dict().values(), getattr(rotary, "replaced", rotary).inv_freq, input_ids):
            digest.update(tensor.detach().cpu().double().numpy().tobytes())
        config = model.config
        about = (config.num_attention_heads, config.layer_norm_eps, config.use_parallel_residual)
        key = (digest.digest(), *about, input_ids.shape, input_ids.device, sizes, *options.items())
        if key not in found:
            found[key] = compute(model, input_ids, *sizes, **options)
        return found[key].clone()

    return logits


@once
@torch.no_grad()
def reference_logits(
    model, input_ids: torch.Tensor, n_sink: int, window_size: int, *, gapped: bool = False
) -> torch.Tensor:
    """Float64 logits ``[batch, length, vocab]`` of a GPT-NeoX fed ``input_ids`` ``[batch, length]`` one by one.

    ``gapped``: kept tokens stay at their positions in the stream.
    """
    config = model.config
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    output_layer = next(name for name in ("embed_out", "lm_head") if f"{name}.weight" in weights)  # older, newer name
    rotary = model.gpt_neox.rotary_emb  # a streaming model's own one lies behind the stand-in
    inv_freq = getattr(rotary, "replaced", rotary).inv_freq.double()
    batch, length = input_ids.shape
    num_heads = config.num_attention_heads
    head_dim = config.hidden_size // num_heads

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def layer_norm(x, name):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / (var + config.layer_norm_eps).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    # Per layer, of each kept token: its un-rotated key, its value, its position in the stream.
    kept = [[] for _ in range(config.num_hidden_layers)]
    logits = []
    for t in range(length):
        x = weights["gpt_neox.embed_in.weight"][input_ids[:, t]]
        for layer, cache in enumerate(kept):
            prefix = f"gpt_neox.layers.{layer}"
            qkv = linear(layer_norm(x, f"{prefix}.input_layernorm"), f"{prefix}.attention.query_key_value")
            q, k, v = qkv.view(batch, num_heads, 1, 3 * head_dim).chunk(3, dim=-1)
            if len(cache) > n_sink + window_size:
                del cache[n_sink]
            cache.append((k, v, t))
            keys, values = (torch.cat([token[i] for token in cache], dim=2) for i in range(2))
            positions = torch.tensor([token[2] for token in cache]) if gapped else torch.arange(len(cache))
            keys, q = rotated(keys, positions, inv_freq), rotated(q, positions[-1:], inv_freq)
            scores = (q @ keys.transpose(2, 3)) / head_dim**0.5
            attended = (scores.softmax(-1) @ values).reshape(batch, -1)
            attended = linear(attended, f"{prefix}.attention.dense")
            inner = x if config.use_parallel_residual else x + attended
            hidden = linear(layer_norm(inner, f"{prefix}.post_attention_layernorm"), f"{prefix}.mlp.dense_h_to_4h")
            x = x + attended + linear(torch.nn.functional.gelu(hidden), f"{prefix}.mlp.dense_4h_to_h")
        logits.append(linear(layer_norm(x, "gpt_neox.final_layer_norm"), output_layer))
    return torch.stack(logits, dim=1)
