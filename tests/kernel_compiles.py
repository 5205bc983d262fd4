"""Every Triton kernel compiles for a GPU, with or without one: the interpreter does not check types.

Run by `test_fused_kernels.py` in a process of its own; by hand: `python -m pytest tests/kernel_compiles.py`.
"""

from __future__ import annotations

import pytest
import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from streaming_llm.attention import triton_kernels
from streaming_llm.attention.math_kernel import Scores
from streaming_llm.cache_layer import StreamingLayer
from streaming_llm.config import StreamingConfig
from streaming_llm.fused import block_heads, elementwise, few_rows
from streaming_llm.fused.band_attention import band_attention
from streaming_llm.fused.full_ring import FullRing
from streaming_llm.fused.gemv_sum import gemv_sum
from streaming_llm.fused.norm_gemv import norm_gemv
from streaming_llm.fused.recipe import Attention, HeadPlaces, Linear, Norm
from streaming_llm.fused.ring_attention import RingAttention
from streaming_llm.fused.rings import Rings, begin_step
from streaming_llm.fused.sampling import HistogramSampler
from streaming_llm.fused.weights import Packed
from streaming_llm.positions import Progress, StreamLayout
from streaming_llm.rope_utils import Rotary
from streaming_llm.sinks import SinkRotation

HOPPER = GPUTarget("cuda", 90, 32)
HOPPER_SHARED = 227 * 1024  # bytes that a program may have
TYPES = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip


@pytest.fixture(autouse=True)
def compiled(monkeypatch) -> list[str]:
    """Kernels that a test launched: compiled, not run."""
    names = []

    def type_of(value) -> str:
        if isinstance(value, TensorDescriptor):
            return f"tensordesc<{TYPES[value.base.dtype][1:]}{value.block_shape}>".replace(" ", "")
        return TYPES[value.dtype] if isinstance(value, torch.Tensor) else "fp32" if isinstance(value, float) else "i32"

    def compile_only(self, *args, grid, warmup, **kwargs) -> None:
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        constant = {p.name for p in self.params if p.is_constexpr}
        signature = {n: "constexpr" if n in constant else type_of(given[n]) for n in self.arg_names}
        values = {(self.arg_names.index(n),): given[n] for n in constant}
        options = {name: value for name, value in kwargs.items() if name not in self.arg_names}
        made = triton.compile(ASTSource(self, signature, constexprs=values), target=HOPPER, options=options)
        assert made.metadata.shared <= HOPPER_SHARED
        names.append(self.__name__)

    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    return names


def linear(rows: int, columns: int, dtype: torch.dtype, bias: bool = True) -> Linear:
    return Linear(torch.zeros(rows, columns, dtype=dtype), torch.zeros(rows, dtype=dtype) if bias else None)


def norm(size: int, dtype: torch.dtype, kind: str = "layer") -> Norm:
    weight, bias = torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype) if kind == "layer" else None
    return Norm(weight, bias, 1e-5, centred=kind == "layer", plus_one=kind == "rms+1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "few"), [(512, 12288), (2560, 12288), (4096, 0)])
def test_matrix_vector_products(hidden, few, dtype, compiled, monkeypatch):
    monkeypatch.setattr("streaming_llm.fused.norm_gemv.FEW_ROWS", few)
    x, y = torch.zeros(hidden), torch.zeros(hidden)
    one, narrow = linear(hidden, hidden, dtype), linear(hidden // 4, hidden, dtype)
    wide = linear(hidden, 4 * hidden, dtype), torch.zeros(4 * hidden, dtype=dtype)
    norm_gemv(x, norm(hidden, dtype), (one,), y, activation="gelu", pdl=True)
    norm_gemv(x, norm(hidden, dtype, "rms"), (one, narrow, narrow), torch.zeros(2 * hidden), clip=8.0, pdl=True)
    pending = x, norm(hidden, dtype, "rms+1")
    how = {"activation": "silu", "gated": True, "pending": pending, "new_x": y, "pdl": True}
    norm_gemv(x, norm(hidden, dtype, "rms+1"), (one, one), torch.zeros(hidden, dtype=dtype), **how)
    norm_gemv(x, norm(hidden, dtype, "rms"), (linear(3, hidden, dtype, False),), y, scale=0.5, cap=30.0, pdl=True)
    gemv_sum(wide, None, y, pdl=True)
    gemv_sum((one, x.to(dtype)), None, y, residual=x, other=x, multiplier=0.2, pdl=True)
    gemv_sum((one, x.to(dtype)), wide, y, residual=x, pdl=True)
    assert compiled == [*4 * ["_norm_gemv"], *3 * ["_gemv_sum"]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_a_few_rows(dtype, compiled, monkeypatch):
    monkeypatch.setattr(few_rows, "pdl_available", lambda device: True)
    x, one, narrow = torch.zeros(3, 512, dtype=dtype), linear(512, 512, dtype), linear(100, 512, dtype)
    few_rows.few_rows(x, (one, narrow, narrow), clip=8.0)
    few_rows.few_rows(x, (one, one), activation="silu", gated=True)
    few_rows.few_rows(x, (linear(70, 512, dtype, False),), activation="gelu")
    assert compiled == 3 * ["_few_rows"]


def packed(rows: int, columns: int, bits: int, group: int, factors: torch.dtype) -> Linear:
    words = torch.zeros(rows, columns * bits // 32, dtype=torch.int32)
    factor = torch.zeros(columns // group, rows, dtype=factors)
    return Linear(Packed(words, bits, factor, factor, words), torch.zeros(rows, dtype=torch.bfloat16))


@pytest.mark.parametrize("few", [0, 12288])
@pytest.mark.parametrize(
    ("bits", "group", "factors"), [(8, 512, torch.float32), (4, 128, torch.bfloat16), (4, 32, torch.float32)]
)
def test_products_of_packed_weights(bits, group, factors, few, compiled, monkeypatch):
    monkeypatch.setattr("streaming_llm.fused.norm_gemv.FEW_ROWS", few)
    x, y, one = torch.zeros(512), torch.zeros(512), packed(512, 512, bits, group, factors)
    narrow = packed(128, 512, bits, group, factors)
    norm_gemv(x, norm(512, torch.bfloat16), (one, narrow, narrow), torch.zeros(768), pdl=True)
    norm_gemv(x, None, one.halves(), y[:256], activation="silu", gated=True, pdl=True)
    for of in (torch.bfloat16, torch.float16):
        gemv_sum((one, x.to(of)), None, y, residual=x, pdl=True)
    gemv_sum((one, x), (one, x), y, residual=x, other=x, pdl=True)
    pending = x, norm(512, torch.bfloat16, "rms")
    norm_gemv(x, norm(512, torch.bfloat16, "rms"), (one,), y, pending=pending, new_x=torch.zeros(512), pdl=True)
    assert compiled == [*2 * ["_norm_gemv"], *3 * ["_gemv_sum"], "_norm_gemv"]


# Heads, heads of keys, head_dim, norm, softcap, dtype: like Pythia, Qwen 3, and Gemma
SIZES = [
    (8, 8, 64, None, None, torch.float32),
    (32, 32, 80, None, None, torch.bfloat16),
    (32, 8, 128, "rms", None, torch.bfloat16),
    (4, 1, 256, "rms+1", 30.0, torch.float32),
]


def layer_of(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, how: dict, window: int = 2044
) -> tuple[Attention, StreamingLayer]:
    """A layer's recipe, and its ring: of the right shape without its memory."""
    rotary = Rotary(torch.ones(head_dim // 8, dtype=torch.float64))
    places = HeadPlaces.by_kv_head(heads, kv_heads) if heads == kv_heads else HeadPlaces.separate(heads, kv_heads)
    projections = (Linear(torch.zeros((heads + 2 * kv_heads) * head_dim, 1)),)
    scores = Scores(0.1, how.pop("softcap", None))
    attention = Attention(
        nn.Identity(), projections, places, projections[0], heads, kv_heads, head_dim, rotary, scores, **how
    )
    layer = StreamingLayer(StreamLayout(StreamingConfig(4, window)), SinkRotation(rotary), Progress())
    layer.keys = layer.values = torch.zeros(1, dtype=dtype).expand(1, kv_heads, layer.layout.capacity, head_dim)
    layer.sinks = layer.keys[:, :, :4]
    return attention, layer


@pytest.mark.parametrize("shared", [HOPPER_SHARED - 2**12, 10**5])
@pytest.mark.parametrize(("head_dim", "softcap"), [(64, None), (80, None), (128, 30.0), (256, None)])
def test_attention_over_a_band(head_dim, softcap, shared, compiled, monkeypatch):
    monkeypatch.setattr("streaming_llm.fused.band_attention.shared_memory", lambda device: shared)
    query, out = (
        torch.zeros(1, 8, 5, head_dim, dtype=torch.bfloat16),
        torch.zeros(1, 5, 8, head_dim, dtype=torch.bfloat16),
    )
    key, turn, scores = torch.zeros(1, 2, 9, head_dim, dtype=torch.bfloat16), torch.zeros(5, 16), Scores(0.1, softcap)
    for n_sink in (4, 70):
        sinks = torch.zeros(1, 2, n_sink, head_dim, dtype=torch.bfloat16)
        band_attention(query, key, key, out, 4, scores, triton_kernels.Sinks(sinks, sinks, turn, turn, False))
    band_attention(query, key, key, out, None, scores, None)
    assert compiled == 3 * ["_band_attention"]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "kind", "softcap", "dtype"), SIZES)
def test_attention_over_a_ring(heads, kv_heads, head_dim, kind, softcap, dtype, compiled):
    of_heads = norm(head_dim, dtype, kind) if kind else None
    how = {"query_norm": of_heads, "key_norm": of_heads, "softcap": softcap}
    attention, layer = layer_of(heads, kv_heads, head_dim, dtype, how)
    rings = Rings([layer], 1, torch.device("cpu"))
    qkv = torch.zeros(1, attention.width)
    tokens, table = torch.zeros(1, dtype=torch.int64), torch.zeros(3, 512, dtype=dtype)
    begin_step(tokens, table, torch.zeros(1, 512), rings, 2.0, pdl=True)
    RingAttention(attention, layer.keys, rings.states[0])(attention, qkv, layer, pdl=True)
    whole = FullRing(attention, layer.keys, rings.states[0])
    for masked in (False, True):
        whole.begin(masked)
        whole(attention, qkv, layer, pdl=True)
    assert compiled == ["_begin_step", "_ring_attention", *2 * ["_rotate_and_store"]]


def test_attention_with_tiles_on_their_way(compiled, monkeypatch):
    monkeypatch.setattr(RingAttention, "WARPS_IN_ALL", 1)
    attention, layer = layer_of(32, 8, 128, torch.bfloat16, {})
    kernel = RingAttention(attention, layer.keys, Rings([layer], 1, torch.device("cpu")).states[0])
    assert kernel.stages > 1
    kernel(attention, torch.zeros(1, attention.width), layer, pdl=True)
    assert compiled == ["_ring_attention"]


def test_code_does_not_grow_with_the_parts_that_are_put_together(monkeypatch):
    """Unrolled, 128 parts took half a minute to compile."""
    lengths, compile_ = [], triton.compile

    def measured(*args, **kwargs):
        kernel = compile_(*args, **kwargs)
        lengths.append(len(kernel.asm["ptx"]))
        return kernel

    monkeypatch.setattr(triton, "compile", measured)
    for window, splits in ((2044, 64), (4091, 128)):
        attention, layer = layer_of(14, 2, 64, torch.bfloat16, {}, window)
        kernel = RingAttention(attention, layer.keys, Rings([layer], 1, torch.device("cpu")).states[0])
        assert kernel.splits == splits
        kernel(attention, torch.zeros(1, attention.width), layer, pdl=True)
    assert lengths[1] < 1.1 * lengths[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_over_blocks(dtype, compiled):
    x, norms = torch.zeros(2, 3, 512, dtype=dtype), tuple(norm(512, dtype) for _ in range(2))
    elementwise.add_and_norm(x, (x, x), norms, dtype)
    elementwise.add_and_norm(x, (x,), norms[:1], dtype, out_norm=norm(512, dtype, "rms+1"), factor=0.2)
    elementwise.activated(x, x, "silu")
    elementwise.activated(x, None, "gelu")
    attention, _ = layer_of(4, 4, 80, dtype, {"query_norm": norm(80, dtype), "key_norm": norm(80, dtype)})
    angles = [torch.zeros(3, 10) for _ in range(2)]
    block_heads.norm_and_rotate_([torch.zeros(2, 3, attention.width, dtype=dtype)], attention, *angles)
    elementwise.cross_entropy(torch.zeros(3, 5000, dtype=dtype), torch.zeros(3, dtype=torch.int64))
    assert compiled == [*2 * ["_add_and_norm"], *2 * ["_activate"], *2 * ["_norm_and_rotate"], "_cross_entropy"]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_of_parts(dtype, interleaved, compiled):
    query, sink = torch.zeros(1, 4, 64, 80, dtype=dtype), torch.zeros(1, 2, 4, 80, dtype=dtype)
    part, angles = (query, torch.zeros(1, 4, 64)), torch.zeros(64, 10)
    sinks = triton_kernels.Sinks(sink, sink, angles, angles, interleaved)
    for older, given in ((None, sinks), (part, sinks), (part, None)):
        triton_kernels.merge_parts(query, part, older, given, 0.1, torch.zeros(1, 64, 4, 80, dtype=dtype))
    triton_kernels.reversed_blocks(query, 32)
    assert compiled == [*3 * ["_merge"], "_reverse"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_drawing_of_tokens(dtype, compiled):
    batch, vocab = 2, 128_256
    sampler = HistogramSampler(batch, vocab, torch.device("cpu"))
    uniform, tokens = torch.zeros(batch, dtype=torch.float64), torch.zeros(batch, dtype=torch.int64)
    sampler(torch.zeros(batch, vocab, dtype=dtype), uniform, tokens, pdl=True)
    assert compiled == ["_count", "_pick", "_find"]
