"""Checks of the fused kernels, one by one, against PyTorch in float64; `test_fused_kernels.py` runs them in a process
of their own, in Triton's interpreter on a CPU or compiled on a CUDA device.

`TRITON_INTERPRET=1 python -m pytest tests/kernel_checks.py` runs them by hand.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from called_recordings import Called, called  # noqa: F401 - a fixture
from family_models import SLIDING, VOCAB, available, make_family
from family_reference import family_reference_logits, rotated
from packed_weights import KINDS, quantise_, quantised, whole_groups
from transformers import DynamicCache
from triton.runtime import interpreter

from streaming_llm import StreamingDecoder, blockwise, fused, score_stream
from streaming_llm.attachment import maskless_attention
from streaming_llm.attention import band, kernel_choice, torch_kernels, triton_kernels
from streaming_llm.attention.math_kernel import Scores
from streaming_llm.cache_layer import StreamingLayer
from streaming_llm.config import StreamingConfig
from streaming_llm.engines.fused_step import FusedStep, FusedTritonStep
from streaming_llm.engines.recorded import RecordedEngine
from streaming_llm.fused import band_attention, block_heads, elementwise, ring_attention
from streaming_llm.fused.block import BlockForward
from streaming_llm.fused.family_recipes import recipe_of
from streaming_llm.fused.few_rows import are_few, few_rows
from streaming_llm.fused.full_ring import FullRing
from streaming_llm.fused.gemv_sum import TILE_OF_SUM, gemv_sum
from streaming_llm.fused.norm_gemv import TILE_OF_NORM, TILE_OF_SMALL, norm_gemv
from streaming_llm.fused.recipe import Attention, HeadPlaces, Linear, Norm
from streaming_llm.fused.ring_attention import RingAttention
from streaming_llm.fused.rings import Rings, begin_step
from streaming_llm.fused.sampling import HistogramSampler
from streaming_llm.fused.step import StepForward
from streaming_llm.fused.weights import stored
from streaming_llm.launch import launch
from streaming_llm.positions import Progress, StreamLayout
from streaming_llm.rope_utils import Rotary
from streaming_llm.sampling import Sampling
from streaming_llm.sinks import SinkRotation

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
HIDDEN = 72
SCALE = 0.3


@triton.jit
def _count(out_ptr, n):
    total = 0
    for _ in range(0, n, 2):
        total += 1
    tl.store(out_ptr, total)


@pytest.fixture
def loops() -> None:
    """For kernels that loop as often as an argument says: some interpreters cannot, with the NumPy that is there."""
    out = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    try:
        _count[(1,)](out, 5)
    except Exception as error:  # as this Triton wraps it
        if "0-dimensional arrays can be converted" not in str(error):
            raise
        pytest.skip(f"this Triton's interpreter and this NumPy do not go together: {error}")
    assert out.item() == 3


@pytest.fixture(autouse=True)
def _products_of_bfloat16(monkeypatch) -> None:
    """The interpreter holds such numbers as integers of 16 bits, and would multiply these."""
    if DEVICE.type == "cpu":
        builder = type(interpreter.interpreter_builder)
        product = builder.create_dot

        def create_dot(self, a, b, *others):
            return product(
                self, *(self.create_fp_ext(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b)), *others
            )

        monkeypatch.setattr(builder, "create_dot", create_dot)


@pytest.fixture(autouse=True)
def _no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def addresses(monkeypatch) -> None:
    """Kernels of a step read and write within their tensors, and whole words of memory: a CPU would not mind."""
    if DEVICE.type == "cuda":
        return
    builder, ranges = type(interpreter.interpreter_builder), []

    def check(pointers, mask) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        mask = mask if isinstance(mask, np.ndarray) else mask.data  # the former where a descriptor is read
        at = pointers.data[np.broadcast_to(mask.astype(bool), pointers.data.shape)].astype(np.int64)
        assert not (at % size).any(), f"words of {size} bytes are not aligned"
        within = [(at >= begin) & (at + size <= end) for begin, end in ranges]
        assert not ranges or np.any(within, axis=0).all(), f"words of {size} bytes are no tensor's"

    def masked_load(self, pointers, mask, *others, **named):
        check(pointers, mask)
        return load(self, pointers, mask, *others, **named)

    def masked_store(self, pointers, value, mask, *others, **named):
        check(pointers, mask)
        return store(self, pointers, value, mask, *others, **named)

    def launched(kernel, grid, *args, **meta):
        given = (getattr(x, "base", x) for x in args)  # of a descriptor its tensor
        of_tensors = [x.untyped_storage() for x in given if isinstance(x, torch.Tensor)]
        ranges[:] = [(x.data_ptr(), x.data_ptr() + x.nbytes()) for x in of_tensors]
        launch(kernel, grid, *args, **meta)
        ranges.clear()

    load, store = builder.create_masked_load, builder.create_masked_store
    monkeypatch.setattr(builder, "create_masked_load", masked_load)
    monkeypatch.setattr(builder, "create_masked_store", masked_store)
    for module in ("norm_gemv", "gemv_sum", "ring_attention", "band_attention"):
        monkeypatch.setattr(f"streaming_llm.fused.{module}.launch", launched)


TILES = [(4, 32, 2), (2, 128, 8)]
"""Rows, columns, and tiles ahead: sizes that divide nothing, and one that holds a whole row of plain weights. Of 4
bits 16 rows are the fewest, and a tile has whole groups."""


@pytest.fixture(params=TILES, ids=str)
def tiles(request, monkeypatch) -> None:
    """Every kernel with a small tile in place of its own."""
    rows, columns, ahead = request.param
    for tiles_of in (TILE_OF_NORM, TILE_OF_SMALL, TILE_OF_SUM):
        for bits in tiles_of:
            sizes = (max(16, rows), max(64, columns)) if bits == 4 else (rows, columns)
            small = {"BLOCK_R": sizes[0], "BLOCK_K": sizes[1], "AHEAD": ahead}
            monkeypatch.setitem(tiles_of, bits, tiles_of[bits] | small)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def linear(columns: int, rows: int, bias: bool = True) -> Linear:
    return Linear(randn(rows, columns) / columns**0.5, randn(rows) if bias else None)


def norm(kind: str = "layer", size: int = HIDDEN) -> Norm | None:
    """``none``, ``layer`` with a bias, ``bare`` without weights, ``rms``, or ``rms+1``."""
    if kind == "none":
        return None
    weight = None if kind == "bare" else randn(size)
    return Norm(weight, randn(size) if kind == "layer" else None, 1e-5, kind in ("layer", "bare"), kind == "rms+1")


def exact(module: Linear | Norm | None, x: torch.Tensor) -> torch.Tensor:
    """A matrix product or a norm in float64."""
    x = x.double()
    if module is None:
        return x
    weight, bias = (None if p is None else p.double() for p in (module.weight, module.bias))
    if isinstance(module, Linear):
        return F.linear(x, weight, bias)
    if module.centred:
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + module.eps).sqrt()
    x = x if weight is None else x * (weight + module.plus_one)
    return x if bias is None else x + bias


ACTIVATIONS = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert got.isfinite().all()
    assert (got.double() - expected.double()).abs().max() < tolerance


# ------------------------------------------------------------------------------------------- matrix-vector products


NORMS = ["none", "layer", "bare", "rms", "rms+1"]
PACKED = ["int8", "int4 by 32", "int4 by 64"]
COLUMNS = {"plain": HIDDEN} | dict.fromkeys(PACKED, 192)
"""By how weights are stored; 192 is no multiple of every tile, and three groups of 64."""


def stored_as(
    kind: str, columns: int, rows: int, bias: bool = True, factors: torch.dtype = torch.float32
) -> tuple[Linear, Linear]:
    """A matrix, packed unless it is ``plain``; and what it stands for."""
    if kind == "plain":
        return (linear(columns, rows, bias),) * 2
    weight, of_rows = (
        quantised((randn(rows, columns) / columns**0.5 + 0.01).to(factors), *KINDS[kind]),
        randn(rows) if bias else None,
    )
    return Linear(stored(weight), of_rows), Linear(weight.exact, of_rows)


@pytest.mark.usefixtures("tiles", "addresses")
@pytest.mark.parametrize(
    ("kind", "rows", "bias", "given"),
    [("plain", *rows, given) for rows in (((54,), True), ((33, 12, 9), False), ((20, 6, 6), True)) for given in NORMS]
    + [(kind, (34, 12, 10), True, given) for kind in PACKED for given in ("none", "layer", "rms")],
)
def test_norm_and_matrices(kind, rows, bias, given):
    x, first = randn(COLUMNS[kind]) * 3 + 1, norm(given, COLUMNS[kind])
    layers, plain = zip(*(stored_as(kind, COLUMNS[kind], n, bias) for n in rows), strict=True)
    out = torch.full((sum(rows),), torch.nan, device=DEVICE)
    norm_gemv(x, first, layers, out)
    close(out, torch.cat([exact(layer, exact(first, x)) for layer in plain]))


@pytest.mark.usefixtures("tiles", "addresses")
@pytest.mark.parametrize(
    ("kind", "gated", "together", "activation"),
    [("plain", gated, False, activation) for gated in (False, True) for activation in ACTIVATIONS]
    + [(kind, True, together, "silu") for kind in PACKED for together in (False, True)],
)
def test_the_first_half_of_an_mlp(kind, gated, together, activation):
    x, first = randn(COLUMNS[kind]) * 3 + 1, norm("rms", COLUMNS[kind])
    if together:
        layers, plain = (both.halves() for both in stored_as(kind, COLUMNS[kind], 28))
    else:
        layers, plain = zip(*(stored_as(kind, COLUMNS[kind], 14) for _ in range(1 + gated)), strict=True)
    outputs, act = [exact(layer, exact(first, x)) for layer in plain], ACTIVATIONS[activation]
    expected = act(outputs[0]) * outputs[1] if gated else act(outputs[0])
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float16, 2e-2)):
        out = torch.full((14,), torch.nan, device=DEVICE, dtype=dtype)
        norm_gemv(x, first, layers, out, activation=activation, gated=gated)
        close(out, expected, tolerance)


@pytest.mark.usefixtures("tiles", "addresses")
@pytest.mark.parametrize("kind", ["layer", "rms+1"])
def test_an_output_is_normed_and_added_by_the_kernel_that_reads_it(kind):
    x, output, new_x, y = randn(HIDDEN), randn(HIDDEN), randn(HIDDEN) * torch.nan, randn(54) * torch.nan
    first, of_output, layer = norm(kind), norm("rms+1" if kind == "rms+1" else "rms"), linear(HIDDEN, 54)
    total = x.double() + exact(of_output, output)
    norm_gemv(x, first, (layer,), y, pending=(output, of_output), new_x=new_x)
    close(new_x, total)
    close(y, exact(layer, exact(first, total)))


@pytest.mark.parametrize(
    ("how", "change"),
    [
        ({"clip": 0.5}, lambda y: y.clamp(-0.5, 0.5)),
        ({"scale": 0.3}, lambda y: y * 0.3),
        ({"scale": 2.0, "cap": 1.5}, lambda y: (y * 2.0 / 1.5).tanh() * 1.5),
    ],
    ids=str,
)
def test_outputs_are_limited(how, change):
    x, first, layer, y = randn(HIDDEN), norm("rms"), linear(HIDDEN, 54), randn(54) * torch.nan
    norm_gemv(x, first, (layer,), y, **how)
    close(y, change(exact(layer, exact(first, x))))


@pytest.mark.usefixtures("tiles", "addresses")
@pytest.mark.parametrize("two", [True, False])
@pytest.mark.parametrize(
    ("kind", "residuals", "multiplier"),
    [
        ("plain", 0, 1.0),
        ("plain", 1, 1.0),
        ("plain", 2, 1.0),
        ("plain", 2, 0.22),
        *((kind, 1, 0.22) for kind in PACKED),
    ],
)
def test_sum_of_products(kind, residuals, multiplier, two):
    columns = (40 if kind == "plain" else 64, COLUMNS[kind])[: 1 + two]
    made = [stored_as(kind, n, 54, i == 0 or residuals == 1) for i, n in enumerate(columns)]
    given, added = [randn(n) for n in columns], [randn(54) for _ in range(residuals)]
    pairs, out = [(layer, x) for (layer, _), x in zip(made, given, strict=True)], randn(54) * torch.nan
    gemv_sum(pairs[0], pairs[1] if two else None, out, *added, multiplier=multiplier)
    products = sum(exact(plain, x) for (_, plain), x in zip(made, given, strict=True))
    close(out, multiplier * products + sum(x.double() for x in added))


@pytest.mark.parametrize("few", [0, 12288])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "factors"),
    [("plain", torch.float32), ("int8", torch.float32), ("int4 by 128", torch.float32),
     ("int4 by 128", torch.bfloat16), ("int4 by 256", torch.float16), ("int4 by 32", torch.bfloat16)],
    ids=str,
)  # fmt: skip
@pytest.mark.usefixtures("addresses")
def test_products_by_the_tiles_that_are_used(monkeypatch, kind, factors, dtype, few):
    monkeypatch.setattr("streaming_llm.fused.norm_gemv.FEW_ROWS", few)
    # Whole tiles and a part of one, of plain weights and with groups of 256 those of the middle.
    columns = {"plain": 3200, "int4 by 256": 3328}.get(kind, 2176)
    (layer, plain), x = stored_as(kind, columns, 20, factors=factors), randn(columns, dtype=dtype)
    out = randn(20) * torch.nan
    gemv_sum((layer, x), None, out)
    close(out, exact(plain, x))
    gemv_sum((layer, x), (layer, x), out)  # a plain matrix alone may have a tile of its own
    close(out, 2 * exact(plain, x))
    norm_gemv(x.float(), None, (layer,), out)
    close(out, exact(plain, x))
    norm_gemv(x.float(), None, layer.halves(), out[:10], gated=True)
    gate, up = (exact(half, x) for half in plain.halves())
    close(out[:10], gate * up)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="ends the process")
@pytest.mark.usefixtures("addresses")
def test_addresses_that_a_gpu_refuses_are_seen():
    """Of halves with odd numbers of rows, which models are refused for."""
    both, _ = stored_as("int4 by 32", 64, 26, bias=False, factors=torch.bfloat16)
    with pytest.raises(Exception, match="not aligned"):
        norm_gemv(randn(64), None, both.halves(), randn(13), gated=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "outputs", "columns", "activation", "gated", "clip"),
    [
        ((3,), (150,), 300, "gelu", False, None),
        ((2, 8), (70, 20, 3), 128, "none", False, 0.5),
        ((16,), (150, 150), 100, "silu", True, None),
    ],
)
def test_products_of_a_few_rows(rows, outputs, columns, activation, gated, clip, dtype):
    for bias in (True, False):
        linears = [linear(columns, n, bias) for n in outputs]
        linears = [Linear(x.weight.to(dtype), None if x.bias is None else x.bias.to(dtype)) for x in linears]
        x = randn(*rows, columns, dtype=dtype)
        expected = [exact(layer, x) for layer in linears]
        act = ACTIVATIONS[activation]
        expected = act(expected[0]) * expected[1] if gated else act(torch.cat(expected, dim=-1))
        expected = expected if clip is None else expected.clamp(-clip, clip)
        tolerance = 1e-5 if dtype == torch.float32 else 2**-10 * expected.abs().max()  # of a rounded result
        close(few_rows(x, linears, activation=activation, gated=gated, clip=clip), expected, tolerance)


def test_which_rows_are_few():
    layer = linear(32, 8)
    half = Linear(layer.weight.bfloat16())
    on_gpu = DEVICE.type == "cuda"
    for shape, what, few in (((16, 32), half, on_gpu), ((17, 32), half, False), ((2, 9, 32), half, False)):
        assert are_few(randn(*shape, dtype=torch.bfloat16), what) is few
    assert not are_few(randn(2, 32), layer)
    assert not are_few(randn(32, 4, dtype=torch.bfloat16).T, half)
    assert not are_few(randn(2, 32, dtype=torch.bfloat16), stored_as("int8", 32, 8)[0])


# ------------------------------------------------------------------------------------------------------ elementwise


@pytest.mark.parametrize(("kind", "count"), [("layer", 2), ("bare", 1), ("rms", 1), ("rms+1", 1), ("none", 1)])
@pytest.mark.parametrize("adds", [0, 1, 2])
@pytest.mark.parametrize(("normed", "factor"), [(False, 1.0), (True, 1.0), (True, 0.22)])
def test_sum_and_norms(kind, count, adds, normed, factor):
    x, norms = randn(3, 5, HIDDEN), [norm(kind) for _ in range(count)]
    given = [randn(3, 5, HIDDEN) for _ in range(adds)]
    out_norm = norm("rms+1" if kind == "rms+1" else "rms") if normed and adds else None
    total = x.double() + factor * exact(out_norm, sum(y.double() for y in given)) if adds else x.double() * factor
    new_x, outs = elementwise.add_and_norm(x, given, norms, torch.float32, out_norm=out_norm, factor=factor)
    close(new_x, total)
    assert len(outs) == count
    for layer, out in zip(norms, outs, strict=True):
        close(out, exact(layer, total))


@pytest.mark.parametrize("activation", list(ACTIVATIONS)[1:])
@pytest.mark.parametrize("gated", [False, True])
def test_activations(activation, gated):
    both = randn(7, 2 * HIDDEN) * 4
    gate, up = both.chunk(2, dim=-1)
    act = ACTIVATIONS[activation]
    expected = act(gate.double()) * up.double() if gated else act(up.double())
    close(elementwise.activated(up, gate if gated else None, activation), expected, 1e-5)


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("vocab", [101, 5000])
def test_cross_entropy(vocab):
    logits = randn(7, vocab) * 5
    targets = torch.randint(vocab, (7, 3), device=DEVICE)[:, 1]  # the tokens at one place of seven streams
    expected = F.cross_entropy(logits.double(), targets, reduction="none")
    close(elementwise.cross_entropy(logits, targets), expected)


def frequencies(rotary_dim: int) -> torch.Tensor:
    return torch.logspace(0, -3, rotary_dim // 2, dtype=torch.float64, device=DEVICE)


def turned(x: torch.Tensor, positions: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """``x`` ``[batch, heads, n, head_dim]`` rotated to ``positions`` ``[n]``, in float64."""
    return rotated(x.double(), positions, rotary.inv_freq.to(x.device), rotary.interleaved)


HEAD_NORMS = ["none", "rms", "rms+1", "layer of each head", "bare", "all"]


def attention_of(
    head_dim: int, rotary_dim: int, heads: int, kv_heads: int, *, interleaved: bool = False, norms: str = "none",
    together: bool = False, softcap: float | None = None,
) -> Attention:  # fmt: skip
    """A layer with random norms, whose products are not needed: queries, keys and values come from the tests."""
    places = (HeadPlaces.by_kv_head if together else HeadPlaces.separate)(heads, kv_heads)
    rotary = Rotary(frequencies(rotary_dim).cpu(), interleaved)

    def head_norm(n: int) -> Norm | None:
        if norms == "all":
            return norm("rms", n * head_dim)
        if norms == "layer of each head":
            return Norm(randn(n, head_dim), randn(n, head_dim), 1e-5, centred=True)
        if norms == "bare":
            return Norm(randn(head_dim), None, 1e-5, centred=True)
        return norm(norms, head_dim)

    widths = [(heads + 2 * kv_heads) * head_dim] if together else [n * head_dim for n in (heads, kv_heads, kv_heads)]
    projections = tuple(Linear(torch.zeros(width, 1, device=DEVICE)) for width in widths)
    return Attention(
        torch.nn.Identity(), projections, places, projections[0], heads, kv_heads, head_dim, rotary,
        Scores(SCALE, softcap), query_norm=head_norm(heads), key_norm=head_norm(kv_heads),
        norms_all_heads=norms == "all",
    )  # fmt: skip


def normed_heads(x: torch.Tensor, given: Norm | None, *, together: bool) -> torch.Tensor:
    """``x`` ``[batch, heads, n, head_dim]`` normed in float64, each head or all together."""
    x = x.double().transpose(1, 2)
    if not together:
        return exact(given, x).transpose(1, 2)
    return exact(given, x.flatten(2)).unflatten(2, x.shape[2:]).transpose(1, 2)


@pytest.mark.parametrize("norms", HEAD_NORMS)
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim", "interleaved"), [(20, 6, False), (16, 16, True)])
def test_queries_and_keys_are_normed_and_rotated_in_place(head_dim, rotary_dim, interleaved, together, norms):
    attention = attention_of(
        head_dim, rotary_dim, 6, 3, interleaved=interleaved, norms=norms, together=together and norms != "all"
    )
    qkv, positions = randn(2, 9, attention.width), torch.arange(5, 14, device=DEVICE)
    split = attention.places.split(qkv.unflatten(-1, (-1, head_dim)), 3)
    query, key, value = (x.transpose(1, 2).clone() for x in split)
    expected = [
        turned(normed_heads(x, of, together=norms == "all"), positions, attention.rotary)
        for x, of in ((query, attention.query_norm), (key, attention.key_norm))
    ]
    angles = positions.double()[:, None] * attention.rotary.inv_freq.to(DEVICE)
    block_heads.norm_and_rotate_([qkv], attention, angles.cos().float(), angles.sin().float())
    got = attention.places.split(qkv.unflatten(-1, (-1, head_dim)), 3)
    for now, then in zip(got, (*expected, value), strict=True):
        close(now.transpose(1, 2), then)


# head_dim, rotary_dim, heads, of keys, sinks
SINKS = [(20, 6, 4, 4, 4), (16, 16, 6, 3, 3), (80, 20, 2, 2, 4), (64, 16, 4, 1, 17)]


def softmax_of_parts(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """In float64, from the attention and the log-sum-exp over each part of the keys."""
    weights = torch.stack([lse.double() for _, lse in parts]).softmax(0)
    return sum(weight.unsqueeze(-1) * out.double() for weight, (out, _) in zip(weights, parts, strict=True))


def in_order(x: torch.Tensor, blocks: int, *, backward: bool) -> torch.Tensor:
    """``[batch * blocks, heads, n, ...]`` as ``[batch, heads, blocks * n, ...]``."""
    x = x.flip(2) if backward else x
    return x.unflatten(0, (-1, blocks)).transpose(1, 2).flatten(2, 3)


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("blocks", [0, 1, 5])  # 0: one part, not cut
@pytest.mark.parametrize(("head_dim", "rotary_dim", "heads", "kv_heads", "n_sink"), SINKS)
def test_parts_and_sinks_are_merged(head_dim, rotary_dim, heads, kv_heads, n_sink, blocks, interleaved):
    length, n = 45, max(1, blocks)
    query = randn(2, length, heads, head_dim).transpose(1, 2)

    def part() -> tuple[torch.Tensor, torch.Tensor]:
        lse = randn(2 * n, heads, length // n + 7)[..., : length // n]  # not contiguous, as cut blocks leave it
        return randn(2 * n, length // n, heads, head_dim).transpose(1, 2), lse

    newer, older = part(), part() if blocks else None
    parts = [tuple(in_order(x, n, backward=False) for x in newer)]
    if blocks:
        parts.append(tuple(in_order(x, n, backward=True) for x in older))
    keys, values = (randn(2, kv_heads, n_sink, head_dim) for _ in range(2))
    turn, inv_freq = 60 - torch.arange(length, device=DEVICE), frequencies(rotary_dim)
    moved = turned(query, turn, Rotary(inv_freq, interleaved))
    for sink in range(n_sink):
        key, value = (x[:, :, sink, None].repeat_interleave(heads // kv_heads, dim=1) for x in (keys, values))
        parts.append((value.expand_as(query), (moved * key.double()).sum(-1) * SCALE))
    angles = turn.double()[:, None] * inv_freq
    sinks = triton_kernels.Sinks(keys, values, angles.cos().float(), angles.sin().float(), interleaved)
    for given, expected in ((sinks, parts), (None, parts[:-n_sink])):
        buffer = torch.zeros(2, length + 10, heads, head_dim, device=DEVICE)
        triton_kernels.merge_parts(query, newer, older, given, SCALE, buffer[:, 7 : 7 + length])
        close(buffer[:, 7 : 7 + length].transpose(1, 2), softmax_of_parts(expected))
        assert not buffer[:, :7].any()
        assert not buffer[:, 7 + length :].any()


BANDS = {
    "a block that goes on": (45, 45, 30),
    "a window of less than a tile": (40, 40, 3),
    "the end of the keys": (5, 60, 55),
    "all": (45, 45, None),
    "all, and earlier keys": (20, 70, None),
    "one query": (1, 33, None),
}
"""Queries, keys, and keys before its own that a query sees."""


@pytest.mark.usefixtures("loops", "addresses")
@pytest.mark.parametrize(("q_len", "kv_len", "window"), BANDS.values(), ids=BANDS)
@pytest.mark.parametrize(
    ("sizes", "interleaved", "softcap"),
    [((24, 6, 6, 2), False, None), ((16, 16, 3, 3), True, None), ((40, 0, 4, 1), False, 5.0)],
    ids=str,
)
@pytest.mark.parametrize("n_sink", [0, 4, 70])
def test_attention_over_sinks_and_a_band(monkeypatch, sizes, interleaved, softcap, n_sink, q_len, kv_len, window):
    head_dim, rotary_dim, heads, kv_heads = sizes
    tile = {"BLOCK_M": 32, "BLOCK_N": 16, "STAGES": 2, "num_warps": 1}
    monkeypatch.setattr(band_attention, "tile_for", lambda *_: tile)
    query = randn(2, q_len, heads, head_dim).transpose(1, 2)
    key, value = randn(2, kv_heads, kv_len, head_dim), randn(2, kv_len, kv_heads, head_dim).transpose(1, 2)
    sink_keys, sink_values = (randn(2, kv_heads, n_sink, head_dim) for _ in range(2))
    turn, inv_freq = 60 - torch.arange(q_len, device=DEVICE), frequencies(rotary_dim)
    moved = turned(query, turn, Rotary(inv_freq, interleaved)) if rotary_dim else query.double()
    repeated = (x.double().repeat_interleave(heads // kv_heads, 1) for x in (key, value, sink_keys, sink_values))
    keys, values, of_sinks, at_sinks = repeated
    scores = torch.cat([moved @ of_sinks.mT, query.double() @ keys.mT], -1) * SCALE
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    last = kv_len - q_len + torch.arange(q_len, device=DEVICE)[:, None]
    at = torch.arange(kv_len, device=DEVICE)
    seen = (at <= last) & (at >= last - (kv_len if window is None else window))
    scores[..., n_sink:].masked_fill_(~seen, float("-inf"))
    angles = turn.double()[:, None] * inv_freq
    sinks = triton_kernels.Sinks(sink_keys, sink_values, angles.cos().float(), angles.sin().float(), interleaved)
    buffer = torch.zeros(2, q_len + 10, heads, head_dim, device=DEVICE)
    out = buffer[:, 7 : 7 + q_len]
    given = sinks if n_sink else None
    band_attention.band_attention(query, key, value, out, window, Scores(SCALE, softcap), given)
    close(out.transpose(1, 2), scores.softmax(-1) @ torch.cat([at_sinks, values], 2))
    assert not buffer[:, :7].any()
    assert not buffer[:, 7 + q_len :].any()


@pytest.mark.parametrize("window", [45, 9, 1])
def test_blocks_are_reversed(window):
    x = randn(2, 45, 3, 3 * 20)[..., 20:40].transpose(1, 2)
    blocks = triton_kernels.reversed_blocks(x, window)
    assert torch.equal(in_order(blocks, 45 // window, backward=True), x)


def use_kernels(monkeypatch, kernel: str) -> None:
    """Have blocks on a CPU go the way that they go on a CUDA device; cuDNN's calls are made by another kernel."""
    if DEVICE.type == "cuda":
        pytest.skip("the tests marked gpu run the kernels themselves")
    monkeypatch.setattr(kernel_choice, "choose_kernel", lambda query, softcap=None: kernel)
    monkeypatch.setattr(triton_kernels, "available", lambda query: True)
    monkeypatch.setitem(torch_kernels.WITH_LSE, "cudnn", torch_kernels.flash)


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("case", ["llama", "gptj"])  # shared keys and values; neighbours rotated
@pytest.mark.parametrize("n_sink", [4, 0])
@pytest.mark.parametrize("block_size", [7, 28, 40, 150])
def test_a_stream_in_blocks_by_two_causal_calls(monkeypatch, n_sink, block_size, case):
    """The way of cuDNN, with its calls made by another kernel."""
    window, ids = 28, torch.randint(VOCAB, (2, 150))

    def continues(query, plan, kernel) -> bool:
        return plan.first_query > n_sink + window and query.shape[2] > window

    monkeypatch.setattr(band, "continues", continues)
    use_kernels(monkeypatch, "cudnn")
    model = make_family(case)
    nll = score_stream(model, ids, n_sink, window, block_size)
    logits = family_reference_logits(model, ids, n_sink, window)
    close(nll, F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none"), 1e-5)


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("kernel", ["flash", "cudnn"])
def test_a_sliding_window_of_the_models_own(monkeypatch, kernel):
    ids = torch.randint(VOCAB, (2, 3 * SLIDING))
    expected = make_family("mistral", attention="eager")(ids).logits
    use_kernels(monkeypatch, kernel)
    model, cache = make_family("mistral"), DynamicCache()  # without the configuration it keeps every key
    cuts = 0, SLIDING - 5, SLIDING + 5, ids.shape[1] - 1, ids.shape[1]
    with maskless_attention(model):
        whole = model(ids, use_cache=False).logits
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in itertools.pairwise(cuts)]
    close(whole, expected, 1e-5)
    close(torch.cat(parts, dim=1), expected, 1e-5)


# -------------------------------------------------------------------------------------------- attention over a ring


class Ring:
    """Streams of random tokens, and what a layer of the cache holds of them before token ``now``.

    Args:
        attention: of the layer.
        layout: batch size, sinks, and window.
        score: added to every score, by a dimension that is not rotated.
    """

    def __init__(
        self, attention: Attention, layout: tuple[int, int, int], now: int, offset: int,
        dtype: torch.dtype = torch.float32, score: float | None = None,
    ) -> None:  # fmt: skip
        self.attention, self.now, self.offset, self.dtype = attention, now, offset, dtype
        self.batch, self.n_sink, self.window = layout
        progress = Progress()
        progress.set((now,), (offset,))
        config = StreamingConfig(self.n_sink, self.window)
        self.layer = StreamingLayer(StreamLayout(config), SinkRotation(attention.rotary), progress)
        self.rings = Rings([self.layer], self.batch, DEVICE)
        self.rings.set(progress)
        self.state = self.rings.states[0]
        self.qkv = randn(self.batch, now + 1, attention.width, dtype=dtype)
        heads = self.qkv.unflatten(-1, (-1, attention.head_dim))
        split = attention.places.split(heads, attention.num_kv_heads)
        if score is not None:
            split[0][..., -1], split[1][..., -1] = 10.0, score / SCALE / 10.0
        query, key, value = (x.transpose(1, 2) for x in split)
        together = attention.norms_all_heads
        self.query = normed_heads(query[:, :, -1:], attention.query_norm, together=together)
        key = normed_heads(key, attention.key_norm, together=together)
        positions = torch.arange(now + 1, device=DEVICE) + offset
        self.stream_keys, self.stream_values = turned(key, positions, attention.rotary).to(dtype), value
        self.layer.lazy_initialization(self.stream_keys, self.stream_values)
        self.layer.reserve(self.layer.layout.capacity)
        self.layer.keys.fill_(torch.nan)
        self.layer.values.fill_(torch.nan)
        for token in range(now):  # later tokens overwrite earlier ones
            self.layer.keys[:, :, self.slot(token)] = self.stream_keys[:, :, token]
            self.layer.values[:, :, self.slot(token)] = self.stream_values[:, :, token]
        self.layer.sinks.copy_(torch.nan_to_num(self.layer.keys[:, :, : self.n_sink]))

    def slot(self, token: int) -> int:
        return token if token < self.n_sink else self.n_sink + (token - self.n_sink) % (self.window + 1)

    def attend(self, kernel: RingAttention | FullRing) -> torch.Tensor:
        """What a kernel gives for the token at hand: ``[batch, heads, head_dim]``."""
        attention = self.attention
        if isinstance(kernel, RingAttention):
            kernel.out.fill_(torch.nan)
        out = kernel(attention, self.qkv[:, -1].contiguous(), self.layer)
        return out.unflatten(-1, (-1, attention.head_dim))

    def attended(self) -> torch.Tensor:
        """The same from the definition, in float64."""
        groups, softcap = self.attention.groups, self.attention.scores.softcap
        keys, values = (x.double().repeat_interleave(groups, 1) for x in (self.stream_keys, self.stream_values))
        in_cache = min(self.now, self.n_sink + self.window)
        by_distance, to_sinks = (
            (turned(self.query, torch.tensor([at], device=DEVICE), self.attention.rotary) * keys).sum(-1)
            for at in (self.now + self.offset, in_cache + self.offset)
        )
        token = torch.arange(self.now + 1, device=DEVICE)
        is_sink = token < self.n_sink
        scores = torch.where(is_sink, to_sinks, by_distance) * SCALE
        scores = scores if softcap is None else (scores / softcap).tanh() * softcap
        scores = scores.masked_fill(~is_sink & (token < self.now - self.window), -torch.inf)
        return (scores.softmax(-1).unsqueeze(-1) * values).sum(2)


def begin(ring: Ring) -> None:
    """Run the kernel that opens a step, and check what it leaves."""
    table, tokens = randn(11, HIDDEN, dtype=ring.dtype), torch.randint(11, (ring.batch,), device=DEVICE)
    x = torch.full((ring.batch, HIDDEN), torch.nan, device=DEVICE)
    begin_step(tokens, table, x, ring.rings, 2.0)
    assert torch.equal(x, 2.0 * table[tokens].float())
    assert ring.rings.seen.tolist() == [ring.now + 1] * ring.batch
    assert ring.rings.offset.tolist() == [ring.offset] * ring.batch
    assert ring.state.counters.tolist() == [[ring.now, ring.slot(ring.now)]] * ring.batch


def short_tiles(monkeypatch) -> None:
    """Have programs take eight slots at a time, or as few as the matrix units do: small rings have several tiles."""
    monkeypatch.setattr(RingAttention, "MOST_ROWS", 8)


# head_dim, rotary_dim, heads, of keys; batch, n_sink, window_size
SIZES = [((20, 6, 4, 4), (2, 4, 21)), ((16, 16, 3, 3), (1, 0, 40)), ((80, 20, 2, 2), (1, 3, 70))]
OTHERS = [
    {"interleaved": True},
    {"norms": "rms", "together": True},
    {"norms": "rms+1", "softcap": 0.7},
    {"norms": "layer of each head"},
    {"norms": "bare"},
    {"norms": "all"},
]
MOMENTS = {
    "first": lambda s, w: 0,
    "among the sinks": lambda s, w: s // 2,
    "one to go": lambda s, w: s + w - 1,
    "full": lambda s, w: s + w,
    "evicting": lambda s, w: s + w + 1,
    "turned": lambda s, w: 3 * (s + w + 1) + 2,
}


def check_ring_attention(monkeypatch, ring: Ring) -> None:
    short_tiles(monkeypatch)
    begin(ring)
    kernel = RingAttention(ring.attention, ring.layer.keys, ring.state)
    assert kernel.splits > 1
    for _ in range(2):  # nothing is left over from a call to the next
        close(ring.attend(kernel), ring.attended())
    slot = ring.slot(ring.now)
    close(ring.layer.keys[:, :, slot], ring.stream_keys[:, :, -1])
    assert torch.equal(ring.layer.values[:, :, slot], ring.stream_values[:, :, -1])
    if slot < ring.n_sink:
        close(ring.layer.sinks[:, :, slot], ring.stream_keys[:, :, -1])


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
@pytest.mark.parametrize(("sizes", "layout"), SIZES, ids=str)
def test_ring_attention(monkeypatch, sizes, layout, moment, offset):
    attention = attention_of(*sizes, together=True)
    check_ring_attention(monkeypatch, Ring(attention, layout, moment(*layout[1:]), offset))


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("moment", ["among the sinks", "one to go", "turned"])
@pytest.mark.parametrize("how", OTHERS, ids=str)
def test_ring_attention_of_shared_keys(monkeypatch, how, moment):
    layout, attention = (2, 20, 29), attention_of(20, 12, 6, 2, **how)  # sinks in more than one tile
    check_ring_attention(monkeypatch, Ring(attention, layout, MOMENTS[moment](*layout[1:]), 5))


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("moment", ["among the sinks", "one to go", "turned"])
@pytest.mark.parametrize(("heads", "splits", "stages"), [(2, 2, 1), (6, 1, 3)])
def test_ring_attention_of_programs_with_many_tiles(monkeypatch, heads, splits, stages, moment):
    short_tiles(monkeypatch)
    monkeypatch.setattr(RingAttention, "WARPS_IN_ALL", 1)  # as where rows and heads are programs enough
    layout = (2, 20, 110)
    ring = Ring(attention_of(20, 12, heads, 2), layout, MOMENTS[moment](*layout[1:]), 5)
    begin(ring)
    kernel = RingAttention(ring.attention, ring.layer.keys, ring.state)
    assert (kernel.splits, kernel.stages) == (splits, stages)
    for _ in range(2):
        close(ring.attend(kernel), ring.attended())


@pytest.mark.usefixtures("loops", "addresses")
@pytest.mark.parametrize("moment", ["among the sinks", "one to go", "turned"])
@pytest.mark.parametrize(
    ("heads", "window", "partial", "splits", "parts"), [(6, 69, 64, 5, 2), (6, 95, 128, 7, 4), (2, 69, 64, 11, 2)]
)
def test_ring_attention_puts_parts_together_in_rounds(monkeypatch, heads, window, partial, splits, parts, moment):
    short_tiles(monkeypatch)
    monkeypatch.setattr(RingAttention, "PARTIAL", partial)
    ring = Ring(attention_of(20, 12, heads, 2), (3, 20, window), MOMENTS[moment](20, window), 5)
    begin(ring)
    kernel = RingAttention(ring.attention, ring.layer.keys, ring.state)
    assert (kernel.splits, kernel.parts) == (splits, parts)
    kernel.partial.fill_(torch.nan)
    close(ring.attend(kernel), ring.attended())


@pytest.mark.usefixtures("loops")
def test_ring_attention_of_more_query_heads_than_a_program_takes(monkeypatch):
    monkeypatch.setattr(ring_attention, "MOST_SHARED", 2)
    attention = attention_of(16, 16, 5, 1)
    check_ring_attention(monkeypatch, Ring(attention, (1, 4, 40), 97, 0))


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("moment", ["among the sinks", "one to go", "turned"])
@pytest.mark.parametrize("heads", [2, 6])
def test_ring_attention_over_scores_far_below_zero(monkeypatch, heads, moment):
    """What has not been seen, by a part of the ring or by all of it, weighs nothing, not one."""
    _, layout = SIZES[2]
    attention = attention_of(80, 20, heads, 2, together=True)
    short_tiles(monkeypatch)
    monkeypatch.setattr(RingAttention, "PARTIAL", 1)
    ring = Ring(attention, layout, MOMENTS[moment](*layout[1:]), 0, score=-150.0)
    begin(ring)
    kernel = RingAttention(attention, ring.layer.keys, ring.state)
    assert kernel.splits > 2 * kernel.parts
    close(ring.attend(kernel), ring.attended(), 1e-4)


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("heads", [4, 12])
def test_ring_attention_by_one_program_in_half_precision(heads):
    ring = Ring(attention_of(20, 6, heads, 4), SIZES[0][1], 60, 0, torch.float16)
    begin(ring)
    kernel = RingAttention(ring.attention, ring.layer.keys, ring.state)
    assert kernel.splits == 1
    close(ring.attend(kernel), ring.attended(), 5e-3)


@pytest.mark.parametrize("moment", ["full", "evicting", "turned"])
@pytest.mark.parametrize("how", [{"together": True}, *OTHERS], ids=str)
@pytest.mark.parametrize(("sizes", "layout"), [SIZES[0], ((16, 16, 6, 3), (1, 0, 40))], ids=str)
def test_a_full_ring_by_pytorch_s_attention(sizes, layout, moment, how):
    ring = Ring(attention_of(*sizes, **how), layout, MOMENTS[moment](*layout[1:]), 1000)
    begin(ring)
    kernel = FullRing(ring.attention, ring.layer.keys, ring.state)
    for _ in range(2):
        close(ring.attend(kernel), ring.attended())


# ------------------------------------------------------------------------------------------------------------ samples


def exact_intervals(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens in descending order, equal ones by their number, and where the probability of each ends, in float64."""
    values, ids = logits.double().sort(descending=True, stable=True)
    if sampling.temperature == 0:
        return ids[:1], torch.ones(1, dtype=torch.float64)
    p = (values / sampling.temperature).softmax(-1)
    if sampling.top_k is not None:
        p, ids = p[: sampling.top_k], ids[: sampling.top_k]
    p = p / p.sum()
    if sampling.top_p is not None:
        kept = p.cumsum(-1) - p < sampling.top_p
        p, ids = p[kept], ids[kept]
    return ids, (p / p.sum()).cumsum(-1)


SETTINGS = [
    Sampling(), Sampling(0.0), Sampling(0.7, top_k=1), Sampling(0.8, top_k=40), Sampling(1.3, top_p=0.9),
    Sampling(0.6, 50, 0.95), Sampling(0.5, top_p=1e-6), Sampling(2.0, top_k=10_000, top_p=1.0),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_draw_inverts_the_distribution_function(dtype):
    """Every setting on the same device tensors; a draw that falls near a border may go either way."""
    vocab, batch = 1500, 2
    sampler, tokens = HistogramSampler(batch, vocab, DEVICE), torch.full((batch,), -1, device=DEVICE)
    for sampling in SETTINGS:
        logits = randn(batch, vocab, dtype=dtype) * 2
        logits[:, :7] = logits[:, 7:8].clone()
        logits[0, ::2] = -torch.inf
        logits[1, :3], logits[1, 3:6] = 0.0, -0.0
        sampler.set(sampling)
        uniform = torch.rand(batch, dtype=torch.float64, device=DEVICE)
        sampler(logits, uniform, tokens)
        for row in range(batch):
            ids, ends = exact_intervals(logits[row].cpu(), sampling)
            place = (ids == tokens[row].item()).nonzero()
            assert place.numel() == 1, sampling
            start = ends[place - 1].item() if place else 0.0
            assert start - 1e-5 <= uniform[row].item() <= ends[place].item() + 1e-5 or sampling.temperature == 0


# -------------------------------------------------------------------------------------------------------- whole steps


STEPPED = [("gpt_neox", True, 1, 9, None), ("gemma3", True, 1, 9, None), ("llama", True, 2, 9, None),
           ("phi", False, 2, 11, None), ("phi", False, 1, 2, None), ("gemma2", False, 2, 1, None),
           ("llama", False, 2, 4, None)]  # fmt: skip
"""Case, own attention, batch, length of the prompt (with a cache of 10 that is full soon, or at once), weights."""
STEPPED += [
    (case, True, batch, 9, kind)
    for case in ("gpt_neox", "llama", "phi3", "gemma3")  # joined; three; halves of one; normed after
    for kind in ("int8", "int4 by 32")
    for batch in (1, 2)
]


def check_steps(model, expected: torch.Tensor, ids: torch.Tensor, config: StreamingConfig, prompt: int, own: bool):
    """The logits of steps that follow a prompt."""
    with StreamingDecoder(model, config=config, engine="eager") as decoder:
        decoder.prefill(ids[:, :prompt])
        for layer in decoder.cache.layers:
            layer.reserve(layer.layout.capacity)
        logits = torch.full((ids.shape[0], VOCAB), torch.nan, device=DEVICE)
        step = StepForward(recipe_of(model), decoder.cache, own_attention=own, logits=logits)
        step.load()
        for t in range(prompt, ids.shape[1]):
            step(ids[:, t])
            close(logits.cpu(), expected[:, t], 1e-4)
    left = weakref.ref(step)
    del step
    assert left() is None  # at once: its buffers are gigabytes


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize(("case", "own", "batch", "prompt", "kind"), STEPPED)
def test_steps_of_a_model(case, own, batch, prompt, kind):
    if not available(case):
        pytest.skip("not in the installed Transformers")
    sizes = whole_groups(case) if kind else {}
    ids, model = torch.randint(VOCAB, (batch, 12)), make_family(case, **sizes).to(DEVICE)
    plain = quantise_(model, kind).cpu() if kind else make_family(case)
    expected = family_reference_logits(plain, ids, 3, 7)
    check_steps(model, expected, ids.to(DEVICE), StreamingConfig(3, 7), prompt, own)


def test_whose_blocks_have_their_own_attention():
    """Those of no other model go through PyTorch's kernels, under the name of ``fused-triton``, unnoticed."""
    assert fused.has_own_attention(make_family("llama", torch.bfloat16))
    assert fused.has_own_attention(make_family("gpt_neox", torch.float16))
    assert not fused.has_own_attention(make_family("llama"))
    assert not fused.has_own_attention(make_family("qwen3", torch.bfloat16))  # heads of 12 dimensions


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize(
    ("case", "n_sink", "block_size"),
    [("gptj", 4, 7), ("gemma2", 4, 25), ("gemma3", 4, 7), ("smollm3", 4, 25), ("gpt_neox", 0, 25)],
)
def test_blocks_of_a_model_by_its_own_attention(monkeypatch, case, n_sink, block_size):
    """Rotated by halves and by neighbours, soft-capped, with windows of the model's own, and without positions."""
    if not available(case):
        pytest.skip("not in the installed Transformers")
    ids, model = torch.randint(VOCAB, (1, 50)), make_family(case)
    forward = BlockForward(model.to(DEVICE), own_attention=True)
    monkeypatch.setattr(blockwise, "block_forward", lambda *_: forward)
    monkeypatch.setattr(kernel_choice, "choose_kernel", lambda *_: pytest.fail("a kernel of PyTorch's is asked for"))
    nll = score_stream(model, ids, n_sink, 12, block_size, engine="eager")
    plain = make_family(case, attention="eager")  # which soft-caps scores
    expected = family_reference_logits(plain, ids, n_sink, 12)
    close(nll.cpu(), F.cross_entropy(expected[:, :-1].mT, ids[:, 1:], reduction="none"), 1e-5)
    monkeypatch.undo()
    close(forward(ids.to(DEVICE)).cpu(), plain.base_model(ids).last_hidden_state, 1e-4)


@pytest.fixture
def called_unwatched(monkeypatch, called):  # noqa: F811 - the fixture
    """Calls in place of recordings on a CPU, where a kernel's interpreter is no device to wait for."""
    if DEVICE.type == "cuda":
        pytest.skip("the tests marked gpu record")
    monkeypatch.setattr(fused, "require_fused", lambda model: None)
    monkeypatch.setattr(Called, "watch", contextlib.nullcontext)
    monkeypatch.setattr(Called, "warm_up", 1)


@pytest.mark.usefixtures("loops", "called_unwatched")
def test_one_recording_serves_all_settings():
    """The engine's own logic."""
    model = make_family("llama", torch.float16)
    with StreamingDecoder(model, 2, 5, engine="eager") as decoder:
        decoder._engine = RecordedEngine(model, decoder.cache, "fused-triton", FusedTritonStep)
        prompt, outputs = torch.randint(VOCAB, (1, 9)), []
        for controls in (
            {},
            {"temperature": 0.7, "top_k": 1},
            {"temperature": 0.5, "top_p": 1e-6},
            {"temperature": 0.0},
        ):
            decoder.reset()
            decoder.prefill(prompt)
            outputs.append(decoder.generate(2, seed=0, **controls))
        assert Called.made == 2
    assert torch.equal(outputs[1], outputs[3])
    assert torch.equal(outputs[2], outputs[3])
    assert not torch.equal(outputs[0], outputs[3])


@pytest.mark.usefixtures("loops", "called_unwatched")
def test_a_recorded_step_with_the_math_kernel_until_the_cache_is_full_and_after():
    model, n_sink, window, length = make_family("llama"), 2, 5, 11
    ids = torch.randint(VOCAB, (2, length))
    expected = family_reference_logits(model, ids, n_sink, window)
    with StreamingDecoder(model, n_sink, window, engine="eager") as decoder:
        decoder._engine = RecordedEngine(model, decoder.cache, "fused", FusedStep)
        for t, token in enumerate(ids.unbind(1)):
            close(decoder.step(token), expected[:, t], 1e-4)
            assert Called.made == (t > 0) + (t >= n_sink + window), t
