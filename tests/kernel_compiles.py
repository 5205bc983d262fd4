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

from streaming_llm.attention import triton_kernels
from streaming_llm.config import StreamingConfig
from streaming_llm.fused import attention, elementwise, gemv
from streaming_llm.positions import StreamLayout
from streaming_llm.rope_utils import Rotary

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip


@pytest.fixture(autouse=True)
def compiled(monkeypatch) -> list[str]:
    """Kernels that a test launched: compiled, not run."""
    names = []

    def type_of(value) -> str:
        return TYPES[value.dtype] if isinstance(value, torch.Tensor) else "fp32" if isinstance(value, float) else "i32"

    def compile_only(self, *args, grid, warmup, **kwargs) -> None:
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        constant = {p.name for p in self.params if p.is_constexpr}
        signature = {n: "constexpr" if n in constant else type_of(given[n]) for n in self.arg_names}
        values = {(self.arg_names.index(n),): given[n] for n in constant}
        options = {name: value for name, value in kwargs.items() if name not in self.arg_names}
        triton.compile(ASTSource(self, signature, constexprs=values), target=HOPPER, options=options)
        names.append(self.__name__)

    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    return names


def norm_and_linear(columns: int, rows: int, dtype: torch.dtype) -> tuple[nn.LayerNorm, nn.Linear]:
    return nn.LayerNorm(columns).to(dtype), nn.Linear(columns, rows).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [512, 2560])
def test_matrix_vector_products(hidden, dtype, compiled):
    x, y = torch.zeros(hidden), torch.zeros(hidden)
    norm, linear = norm_and_linear(hidden, hidden, dtype)
    wide = nn.Linear(4 * hidden, hidden).to(dtype), torch.zeros(4 * hidden, dtype=dtype)
    gemv.norm_gemv(x, norm, linear, y, with_gelu=True, pdl=True)
    gemv.gemv_sum(wide, None, y, pdl=True)
    gemv.gemv_sum((linear, x.to(dtype)), None, y, residual=x, other=x, pdl=True)
    gemv.gemv_sum((linear, x.to(dtype)), wide, y, residual=x, pdl=True)
    assert compiled == ["_norm_gemv", *3 * ["_gemv_sum"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "head_dim"), [(8, 64), (32, 80), (32, 128), (8, 256), (2048, 64)])
def test_attention_over_a_ring(heads, head_dim, dtype, compiled):
    layout = StreamLayout(StreamingConfig(4, 2044))
    state = attention.RingState(layout, Rotary(torch.ones(head_dim // 8, dtype=torch.float64)), torch.device("cpu"))
    ring = torch.zeros(1, dtype=dtype).expand(1, heads, layout.capacity, head_dim)  # its shape counts, not its memory
    qkv, out = torch.zeros(1, heads, 3 * head_dim), torch.zeros(1, heads, head_dim, dtype=dtype)
    tokens, table = torch.zeros(1, dtype=torch.int64), torch.zeros(3, 512, dtype=dtype)
    attention.begin_step(tokens, table, torch.zeros(1, 512), state)
    attention.RingAttention(ring, state, 0.1)(qkv, ring, ring, out, pdl=True)
    attention.rotate_and_store(qkv, out, ring, ring, ring[:, :, :4], state, pdl=True)
    assert compiled == ["_begin_step", "_ring_attention", "_rotate_and_store"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_over_blocks(dtype, compiled):
    x, norms = torch.zeros(2, 3, 512, dtype=dtype), tuple(norm_and_linear(512, 8, dtype)[0] for _ in range(2))
    elementwise.sum_and_norms(x, (x, x), norms)
    elementwise.gelu_(x)
    elementwise.rotate_qk_(torch.zeros(2, 3, 4, 3 * 80, dtype=dtype), *(torch.zeros(3, 10) for _ in range(2)))
    elementwise.cross_entropy(torch.zeros(3, 5000, dtype=dtype), torch.zeros(3, dtype=torch.int64))
    assert compiled == ["_sum_and_norms", "_gelu", "_rotate_in_place", "_cross_entropy"]


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
