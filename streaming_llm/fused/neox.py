"""GPT-NeoX (Pythia) forwards made of this library's kernels: blocks of any length, and one token for a whole ring.

Both compute what ``GPTNeoXForCausalLM`` computes with a parallel residual, with the residual stream in float32.
Matrix products over many tokens are cuBLAS's; of a single token they are :mod:`.gemv`'s.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.band import block_attention
from ..attention.kernel_choice import OWN_MODULES, choose_kernel, kernel_context, unwrapped
from ..attention.plan import BlockPlan
from ..kv_cache import StreamingKVCache
from ..rope_utils import Rotary
from .attention import RingAttention, RingState, begin_step, rotate_and_store
from .elementwise import gelu_, rotate_qk_, sum_and_norms
from .gemv import gemv_sum, norm_gemv
from .launch import pdl_available

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not(model: nn.Module, rotary: Rotary) -> str | None:
    """Why this model cannot go through the fused forwards; ``None`` if it can."""
    config = model.config
    if rotary.scaling != 1.0:
        return "its rotation has a factor (YaRN)"
    if not config.use_parallel_residual:
        return "the model has no parallel residual"
    if config.hidden_act != "gelu":
        return f"its activation is {config.hidden_act!r}, not 'gelu'"
    if model.training:
        return "the model is in training mode: call model.eval()"
    if model.dtype not in DTYPES:
        return f"its dtype is {model.dtype}"
    for part in model.modules():  # PEFT's layers have a plain one inside, which is not all that they compute
        if not type(part).__module__.startswith(OWN_MODULES):
            return f"it holds a {type(part).__name__}, whose forward would be left out"
    parts = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.LayerNorm, nn.Embedding))]
    for part in parts:
        if type(part) not in (nn.Linear, nn.LayerNorm, nn.Embedding):
            return f"it holds a {type(part).__name__} in place of a plain layer"
        if part.weight.dtype != model.dtype or not part.weight.is_contiguous():
            return "its weights are not all of one dtype and contiguous"
    for layer in model.gpt_neox.layers:
        parts = type(layer), type(layer.mlp), type(unwrapped(layer.attention))
        if [part.__name__ for part in parts] != ["GPTNeoXLayer", "GPTNeoXMLP", "GPTNeoXAttention"]:
            return "a layer is of another class than Transformers' own"
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    if any(not hook.__module__.startswith("streaming_llm.") for hook in hooks):
        return "hooks are registered on it"
    return None


class BlockForward:
    """Hidden states of many tokens.

    Args:
        model: a model for which :func:`why_not` finds nothing.
        rotary: its rotation.
    """

    def __init__(self, model: nn.Module, rotary: Rotary) -> None:
        self.body, self.model = model.gpt_neox, model
        self.rotary = rotary.to(model.device)
        self.num_heads = model.config.num_attention_heads
        self.head_dim = model.config.hidden_size // self.num_heads
        self.scale = self.head_dim**-0.5

    def __call__(self, input_ids: Tensor, cache: StreamingKVCache | None = None) -> Tensor:
        """Final hidden states ``[batch, length, hidden]`` of ``input_ids`` ``[batch, length]``.

        Args:
            cache: the stream that they continue; ``None``: plain causal attention over themselves.
        """
        start = 0 if cache is None else cache.get_seq_length()
        if cache is not None:
            cache.begin(input_ids.shape[1], attached=True)
        positions = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
        cos, sin = (x[:, : self.rotary.rotary_dim // 2].float().contiguous() for x in self.rotary.cos_sin(positions))
        x, add = F.embedding(input_ids, self.body.embed_in.weight), None
        for index, layer in enumerate(self.body.layers):
            x, (to_attention, to_mlp) = sum_and_norms(x, add, (layer.input_layernorm, layer.post_attention_layernorm))
            attended = self._attention(layer.attention, index, to_attention, cos, sin, cache)
            inner = layer.mlp.dense_h_to_4h
            hidden = gelu_(F.linear(to_mlp, inner.weight, inner.bias))
            outer = layer.mlp.dense_4h_to_h
            add = attended, F.linear(hidden, outer.weight, outer.bias)
        if cache is not None:
            cache.end()
        return sum_and_norms(x, add, (self.body.final_layer_norm,))[1][0]

    def _attention(
        self, attention: nn.Module, index: int, x: Tensor, cos: Tensor, sin: Tensor, cache: StreamingKVCache | None
    ) -> Tensor:
        batch, length, hidden = x.shape
        qkv = F.linear(x, attention.query_key_value.weight, attention.query_key_value.bias)
        qkv = qkv.view(batch, length, self.num_heads, 3 * self.head_dim)
        rotate_qk_(qkv, cos, sin)
        query, key, value = qkv.transpose(1, 2).split(self.head_dim, dim=-1)
        with kernel_context(attention):
            if cache is None:
                out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale)
            else:
                key, value = cache.update(key, value, index)
                plan = cache.take_plan(index)
                if isinstance(plan, BlockPlan):
                    out = block_attention(query, key, value, plan, self.scale)
                else:  # a single token attends to all of them
                    out = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        out = out.transpose(1, 2).reshape(batch, length, hidden)
        return F.linear(out, attention.dense.weight, attention.dense.bias)


class StepForward:
    """Logits of one token, with everything that depends on the position on the device: made to be captured.

    Args:
        model: a model for which :func:`why_not` finds nothing.
        cache: its stream, with the whole ring allocated.
        rotary: its rotation.
        own_attention: attention by :class:`RingAttention`, for a ring filled to any degree, instead of the SDPA kernel
            that is allowed, for a full ring.
        logits: ``[batch, vocab]``, where every call writes its result.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: StreamingKVCache,
        rotary: Rotary,
        *,
        own_attention: bool,
        logits: Tensor,
    ) -> None:
        self.model, self.layers, self.own_attention = model, list(model.gpt_neox.layers), own_attention
        self.cache, self.caches, device = cache, cache.layers, model.device
        self.pdl = pdl_available(device)
        config, dtype = model.config, model.dtype
        batch, hidden = self.caches[0].batch_size, config.hidden_size
        self.num_heads, self.head_dim = config.num_attention_heads, hidden // config.num_attention_heads
        self.scale = self.head_dim**-0.5
        self.state = RingState(self.caches[0].layout, rotary, device)
        n_sink = self.state.layout.config.n_sink
        heads = (batch, self.num_heads)
        self.sinks = [torch.zeros(*heads, n_sink, self.head_dim, dtype=dtype, device=device) for _ in self.caches]
        self.ring = RingAttention(self.caches[0].keys, self.state, self.scale) if own_attention else None
        self.x = [torch.empty(batch, hidden, dtype=torch.float32, device=device) for _ in range(2)]
        self.qkv = torch.empty(*heads, 3 * self.head_dim, dtype=torch.float32, device=device)
        self.query = torch.empty(*heads, 1, self.head_dim, dtype=dtype, device=device)
        self.attended = torch.empty(batch, hidden, dtype=dtype, device=device)
        self.inner = torch.empty(batch, config.intermediate_size, dtype=dtype, device=device)
        self.mlp = torch.empty(batch, hidden, dtype=torch.float32, device=device)
        self.logits = logits
        self.side = torch.cuda.Stream(device)

    def load(self) -> None:
        """Take over the stream from the host: counters, and the sinks as first rotated."""
        self.state.set(self.cache.progress.seen[0], self.cache.progress.offset[0])
        for layer, copy in zip(self.caches, self.sinks, strict=True):
            if self.own_attention:
                layer.put_sinks_back()
            else:
                copy.copy_(layer.sinks)

    def __call__(self, tokens: Tensor) -> None:
        """Feed ``tokens`` ``[batch]`` and advance."""
        begin_step(tokens, self.model.gpt_neox.embed_in.weight, self.x[0], self.state, pdl=False)
        step = self._layer_of_one if tokens.shape[0] == 1 else self._layer_of_many
        x, add = self.x[0], None
        for index in range(len(self.layers)):
            x, add = step(index, x, add)
        head, norm = self.model.get_output_embeddings(), self.model.gpt_neox.final_layer_norm
        if tokens.shape[0] == 1:
            norm_gemv(x[0], norm, head, self.logits[0], pdl=self.pdl)
        else:
            torch.mm(sum_and_norms(x, add, (norm,))[1][0], head.weight.T, out=self.logits)

    def _attend(self, index: int, qkv: Tensor) -> Tensor:
        """Store the token of ``qkv`` ``[batch, num_heads, 3 * head_dim]`` and attend: ``[batch, hidden]``."""
        keys, values = self.caches[index].keys, self.caches[index].values
        if self.ring is not None:
            self.ring(qkv, keys, values, self.attended, pdl=self.pdl)
            return self.attended
        rotate_and_store(qkv, self.query, keys, values, self.sinks[index], self.state, pdl=self.pdl)
        with kernel_context(self.layers[index].attention):
            out = F.scaled_dot_product_attention(self.query, keys, values, scale=self.scale)
        return out.view_as(self.attended)

    def _layer_of_one(self, index: int, x: Tensor, add: None) -> tuple[Tensor, None]:
        """Attention, and beside it on a second stream the MLP, or as much of it as takes as long."""
        layer, y = self.layers[index], self.x[1 - index % 2]
        attention, mlp = layer.attention, layer.mlp
        down, joins = (mlp.dense_4h_to_h, self.inner[0]), self._mlp_joins(attention)
        main = torch.cuda.current_stream()
        self.side.wait_stream(main)
        with torch.cuda.stream(self.side):
            norm, inner = layer.post_attention_layernorm, mlp.dense_h_to_4h
            norm_gemv(x[0], norm, inner, self.inner[0], with_gelu=True, pdl=self.pdl)
            if not joins:
                gemv_sum(down, None, self.mlp[0], pdl=self.pdl)
        norm_gemv(x[0], layer.input_layernorm, attention.query_key_value, self.qkv.view(-1), pdl=self.pdl)
        dense = attention.dense, self._attend(index, self.qkv)[0]
        main.wait_stream(self.side)
        # It may start before what it needs has ended, on either stream, and waits for both.
        if joins:
            gemv_sum(dense, down, y[0], residual=x[0], pdl=self.pdl)
        else:
            gemv_sum(dense, None, y[0], residual=x[0], other=self.mlp[0], pdl=self.pdl)
        return y, None

    def _mlp_joins(self, attention: nn.Module) -> bool:
        """Whether the MLP's second product shares a launch with the attention's, instead of running beside it.

        It pays where the MLP's first product takes as long as the attention: measured on an H200 with 2,048 tokens,
        for the sizes of Pythia-70m, 410m, 2.8b and 6.9b.
        """
        hidden = self.model.config.hidden_size
        if self.own_attention:
            return hidden >= 2560
        with kernel_context(attention):
            return hidden >= 4096 and choose_kernel(self.query) != "math"

    def _layer_of_many(self, index: int, x: Tensor, add: tuple[Tensor, Tensor] | None):
        layer = self.layers[index]
        attention, mlp = layer.attention, layer.mlp
        x, (to_attention, to_mlp) = sum_and_norms(x, add, (layer.input_layernorm, layer.post_attention_layernorm))
        qkv = F.linear(to_attention, attention.query_key_value.weight, attention.query_key_value.bias)
        attended = self._attend(index, qkv.view(*qkv.shape[:-1], self.num_heads, -1))
        inner = gelu_(F.linear(to_mlp, mlp.dense_h_to_4h.weight, mlp.dense_h_to_4h.bias))
        down = F.linear(inner, mlp.dense_4h_to_h.weight, mlp.dense_4h_to_h.bias)
        return x, (F.linear(attended, attention.dense.weight, attention.dense.bias), down)
