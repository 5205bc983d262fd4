"""Checks of the fused kernels, one by one, against PyTorch in float64; `test_fused_kernels.py` runs them in a process
of their own, in Triton's interpreter on a CPU or compiled on a CUDA device.

`TRITON_INTERPRET=1 python -m pytest tests/kernel_checks.py` runs them by hand.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from family_models import SLIDING, VOCAB, make_family
from family_reference import family_reference_logits
from reference import rotated
from transformers import DynamicCache

from streaming_llm import score_stream
from streaming_llm.attachment import maskless_attention
from streaming_llm.attention import band, torch_kernels, triton_kernels
from streaming_llm.config import StreamingConfig
from streaming_llm.fused import attention, elementwise, gemv
from streaming_llm.positions import StreamLayout
from streaming_llm.rope_utils import Rotary

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
def _no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


TILES = [(4, 32, 1), (4, 16, 3), (1, 128, 8)]
"""Rows, columns, and tiles ahead: sizes that divide nothing, and one that holds a whole row."""


@pytest.fixture(params=TILES, ids=str)
def tiles(request, monkeypatch) -> None:
    """Every kernel with a small tile in place of its own."""
    rows, columns, ahead = request.param
    for name in [name for name in vars(gemv) if name.startswith("TILE_OF_")]:
        monkeypatch.setitem(getattr(gemv, name), "BLOCK_R", rows)
        monkeypatch.setitem(getattr(gemv, name), "BLOCK_K", columns)
        monkeypatch.setitem(getattr(gemv, name), "AHEAD", ahead)


def linear(columns: int, rows: int, bias: bool = True) -> torch.nn.Linear:
    return torch.nn.Linear(columns, rows, bias=bias, device=DEVICE)


def norm(hidden: int = HIDDEN) -> torch.nn.LayerNorm:
    layer = torch.nn.LayerNorm(hidden, device=DEVICE)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def exact(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A linear layer or a norm in float64."""
    weight, bias = (None if p is None else p.double() for p in (module.weight, module.bias))
    if isinstance(module, torch.nn.Linear):
        return F.linear(x.double(), weight, bias)
    return F.layer_norm(x.double(), module.normalized_shape, weight, bias, module.eps)


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert got.isfinite().all()
    assert (got.double() - expected.double()).abs().max() < tolerance


# ------------------------------------------------------------------------------------------- matrix-vector products


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("with_gelu", [False, True])
@pytest.mark.parametrize(("rows", "bias"), [(54, True), (33, False)])
def test_norm_and_matrix(rows, bias, with_gelu):
    x, first, layer = randn(HIDDEN) * 3 + 1, norm(), linear(HIDDEN, rows, bias)
    expected = exact(layer, exact(first, x))
    expected = F.gelu(expected) if with_gelu else expected
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float16, 1e-2)):
        out = torch.full((rows,), torch.nan, device=DEVICE, dtype=dtype)
        gemv.norm_gemv(x, first, layer, out, with_gelu=with_gelu)
        close(out, expected, tolerance)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("two", [True, False])
@pytest.mark.parametrize("residuals", [0, 1, 2])
def test_sum_of_products(two, residuals):
    pairs = [(linear(40, 54), randn(40)), (linear(HIDDEN, 54, bias=residuals == 1), randn(HIDDEN))]
    added, out = [randn(54) for _ in range(residuals)], torch.full((54,), torch.nan, device=DEVICE)
    gemv.gemv_sum(pairs[0], pairs[1] if two else None, out, *added)
    used = pairs if two else pairs[:1]
    close(out, sum(exact(layer, x) for layer, x in used) + sum(x.double() for x in added))


# ------------------------------------------------------------------------------------------------------ elementwise


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("adds", [True, False])
def test_sum_and_norms(count, adds):
    x, norms = randn(3, 5, HIDDEN), tuple(norm() for _ in range(count))
    add = (randn(3, 5, HIDDEN), randn(3, 5, HIDDEN)) if adds else None
    total = x.double() + sum(y.double() for y in add or ())
    new_x, outs = elementwise.sum_and_norms(x, add, norms)
    close(new_x, total)
    assert len(outs) == count
    for layer, out in zip(norms, outs, strict=True):
        close(out, exact(layer, total))


def test_gelu():
    x = randn(1000) * 4
    close(elementwise.gelu_(x.clone()), F.gelu(x.double()), 1e-6)


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("vocab", [101, 5000])
def test_cross_entropy(vocab):
    logits = randn(7, vocab) * 5
    targets = torch.randint(vocab, (7,), device=DEVICE)
    expected = F.cross_entropy(logits.double(), targets, reduction="none")
    close(elementwise.cross_entropy(logits, targets), expected)


def frequencies(rotary_dim: int) -> torch.Tensor:
    return torch.logspace(0, -3, rotary_dim // 2, dtype=torch.float64, device=DEVICE)


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(20, 6), (16, 16)])
def test_queries_and_keys_are_rotated_in_place(head_dim, rotary_dim):
    qkv, positions, inv_freq = (
        randn(2, 9, 3, 3 * head_dim),
        torch.arange(5, 14, device=DEVICE),
        frequencies(rotary_dim),
    )
    by_head = qkv.transpose(1, 2).double().split(head_dim, dim=-1)
    turned = [*(rotated(x, positions, inv_freq) for x in by_head[:2]), by_head[2]]
    angles = positions.double()[:, None] * inv_freq
    elementwise.rotate_qk_(qkv, angles.cos().float(), angles.sin().float())
    close(qkv.transpose(1, 2), torch.cat(turned, dim=-1))


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
    pairs = [*range(0, rotary_dim, 2), *range(1, rotary_dim, 2)] if interleaved else [*range(rotary_dim)]
    order = [*pairs, *range(rotary_dim, head_dim)]  # of neighbours, as halves
    turned = torch.empty_like(query, dtype=torch.float64)
    turned[..., order] = rotated(query[..., order].double(), turn, inv_freq)
    for sink in range(n_sink):
        key, value = (x[:, :, sink, None].repeat_interleave(heads // kv_heads, dim=1) for x in (keys, values))
        parts.append((value.expand_as(query), (turned * key.double()).sum(-1) * SCALE))
    angles = turn.double()[:, None] * inv_freq
    sinks = triton_kernels.Sinks(keys, values, angles.cos().float(), angles.sin().float(), interleaved)
    for given, expected in ((sinks, parts), (None, parts[:-n_sink])):
        buffer = torch.zeros(2, length + 10, heads, head_dim, device=DEVICE)
        triton_kernels.merge_parts(query, newer, older, given, SCALE, buffer[:, 7 : 7 + length])
        close(buffer[:, 7 : 7 + length].transpose(1, 2), softmax_of_parts(expected))
        assert not buffer[:, :7].any()
        assert not buffer[:, 7 + length :].any()


@pytest.mark.parametrize("window", [45, 9, 1])
def test_blocks_are_reversed(window):
    x = randn(2, 45, 3, 3 * 20)[..., 20:40].transpose(1, 2)
    blocks = triton_kernels.reversed_blocks(x, window)
    assert torch.equal(in_order(blocks, 45 // window, backward=True), x)


def use_kernels(monkeypatch, kernel: str) -> None:
    """Have blocks on a CPU go the way that they go on a CUDA device; cuDNN's calls are made by another kernel."""
    if DEVICE.type == "cuda":
        pytest.skip("the tests marked gpu run the kernels themselves")
    monkeypatch.setattr(torch_kernels, "choose_kernel", lambda query: kernel)
    monkeypatch.setattr(triton_kernels, "available", lambda query: True)
    monkeypatch.setitem(torch_kernels.FUSED, "cudnn", torch_kernels.flash)


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("case", ["llama", "gptj"])  # shared keys and values; neighbours rotated
@pytest.mark.parametrize("n_sink", [4, 0])
@pytest.mark.parametrize("block_size", [7, 28, 40, 150])
def test_a_stream_in_blocks_by_two_causal_calls(monkeypatch, n_sink, block_size, case):
    """The way of cuDNN, with its calls made by another kernel."""
    window, ids = 28, torch.randint(VOCAB, (2, 150))

    def continues(query, plan, kernel) -> bool:
        return plan.first_query > n_sink + window and query.shape[2] > window

    monkeypatch.setattr(band, "_continues", continues)
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
    """A stream of random tokens, and what the cache holds of it before token ``now``.

    Args:
        score: added to every score, by a dimension that is not rotated.
    """

    def __init__(
        self, sizes: tuple[int, ...], now: int, offset: int, dtype: torch.dtype, score: float | None = None
    ) -> None:
        self.head_dim, rotary_dim, self.heads, self.batch, self.n_sink, self.window = sizes
        self.now, self.offset, self.dtype = now, offset, dtype
        self.layout = StreamLayout(StreamingConfig(self.n_sink, self.window))
        self.inv_freq = frequencies(rotary_dim)
        self.state = attention.RingState(self.layout, Rotary(self.inv_freq), DEVICE)
        self.state.set(now, offset)
        self.qkv = randn(self.batch, self.heads, now + 1, 3 * self.head_dim, dtype=dtype)
        if score is not None:
            self.qkv[..., self.head_dim - 1], self.qkv[..., 2 * self.head_dim - 1] = 10.0, score / SCALE / 10.0
        _, keys, self.stream_values = self.qkv.split(self.head_dim, dim=-1)
        positions = torch.arange(now + 1, device=DEVICE) + offset
        self.stream_keys = rotated(keys.double(), positions, self.inv_freq).to(dtype)
        ring = self.batch, self.heads, self.layout.capacity, self.head_dim
        self.keys, self.values = (torch.full(ring, torch.nan, dtype=dtype, device=DEVICE) for _ in range(2))
        for token in range(now):  # later tokens overwrite earlier ones
            self.keys[:, :, self.slot(token)] = self.stream_keys[:, :, token]
            self.values[:, :, self.slot(token)] = self.stream_values[:, :, token]

    def slot(self, token: int) -> int:
        return token if token < self.n_sink else self.n_sink + (token - self.n_sink) % (self.window + 1)

    @property
    def last(self) -> torch.Tensor:
        """What the projection gives for the token at hand."""
        return self.qkv[:, :, -1].contiguous()

    def attended(self) -> torch.Tensor:
        """From the definition, in float64: ``[batch, heads, head_dim]``."""
        query = self.qkv[:, :, -1:, : self.head_dim].double()
        in_cache = min(self.now, self.n_sink + self.window)
        by_distance, to_sinks = (
            (rotated(query, torch.tensor([at], device=DEVICE), self.inv_freq) * self.stream_keys.double()).sum(-1)
            for at in (self.now + self.offset, in_cache + self.offset)
        )
        token = torch.arange(self.now + 1, device=DEVICE)
        is_sink = token < self.n_sink
        scores = torch.where(is_sink, to_sinks, by_distance) * SCALE
        scores = scores.masked_fill(~is_sink & (token < self.now - self.window), -torch.inf)
        return (scores.softmax(-1).unsqueeze(-1) * self.stream_values.double()).sum(2)


def begin(ring: Ring) -> None:
    """Run the kernel that opens a step, and check what it leaves."""
    table, tokens = randn(11, HIDDEN, dtype=ring.dtype), torch.randint(11, (ring.batch,), device=DEVICE)
    x = torch.full((ring.batch, HIDDEN), torch.nan, device=DEVICE)
    attention.begin_step(tokens, table, x, ring.state)
    assert torch.equal(x, table[tokens].float())
    assert ring.state.counters.tolist() == [ring.now + 1, ring.offset, ring.now, ring.slot(ring.now)]


# head_dim, rotary_dim, heads, batch, n_sink, window_size
SIZES = [(20, 6, 4, 2, 4, 21), (16, 16, 3, 1, 0, 40), (80, 20, 2, 1, 3, 70)]
MOMENTS = {
    "first": lambda s, w: 0,
    "among the sinks": lambda s, w: s // 2,
    "one to go": lambda s, w: s + w - 1,
    "full": lambda s, w: s + w,
    "evicting": lambda s, w: s + w + 1,
    "turned": lambda s, w: 3 * (s + w + 1) + 2,
}


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_ring_attention(monkeypatch, sizes, moment, offset):
    monkeypatch.setattr(attention.RingAttention, "TILE", 8 * triton.next_power_of_2(sizes[0]))
    ring = Ring(sizes, moment(*sizes[-2:]), offset, torch.float32)
    begin(ring)
    attend = attention.RingAttention(ring.keys, ring.state, SCALE)
    assert attend.splits > 1
    for _ in range(2):  # nothing is left over from a call to the next
        out = torch.full((ring.batch, ring.heads, ring.head_dim), torch.nan, device=DEVICE)
        attend(ring.last, ring.keys, ring.values, out)
        close(out, ring.attended())
    slot = ring.slot(ring.now)
    close(ring.keys[:, :, slot], ring.stream_keys[:, :, -1])
    assert torch.equal(ring.values[:, :, slot], ring.stream_values[:, :, -1])


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("moment", ["among the sinks", "one to go", "turned"])
def test_ring_attention_over_scores_far_below_zero(monkeypatch, moment):
    """What has not been seen, by a part of the ring or by all of it, weighs nothing, not one."""
    sizes = SIZES[2]
    monkeypatch.setattr(attention.RingAttention, "TILE", 8 * triton.next_power_of_2(sizes[0]))
    monkeypatch.setattr(attention.RingAttention, "PARTIAL", 2 * triton.next_power_of_2(sizes[0]))
    ring = Ring(sizes, MOMENTS[moment](*sizes[-2:]), 0, torch.float32, score=-150.0)
    begin(ring)
    attend = attention.RingAttention(ring.keys, ring.state, SCALE)
    assert attend.splits > 2 * attend.parts
    out = torch.full((ring.batch, ring.heads, ring.head_dim), torch.nan, device=DEVICE)
    attend(ring.last, ring.keys, ring.values, out)
    close(out, ring.attended(), 1e-4)


@pytest.mark.usefixtures("loops")
def test_ring_attention_by_one_program_in_half_precision():
    ring = Ring(SIZES[0], 60, 0, torch.float16)
    begin(ring)
    attend = attention.RingAttention(ring.keys, ring.state, SCALE)
    assert attend.splits == 1
    out = randn(ring.batch, ring.heads, ring.head_dim, dtype=torch.float16)
    attend(ring.last.float(), ring.keys, ring.values, out)
    close(out, ring.attended(), 5e-3)


@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("moment", ["full", "evicting", "turned"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_full_ring_is_made_ready_for_pytorch_s_attention(sizes, moment, offset):
    ring = Ring(sizes, MOMENTS[moment](*sizes[-2:]), offset, torch.float32)
    begin(ring)
    sinks = ring.keys[:, :, : ring.n_sink].contiguous()
    query = torch.full((ring.batch, ring.heads, 1, ring.head_dim), torch.nan, device=DEVICE)
    for _ in range(2):
        attention.rotate_and_store(ring.last, query, ring.keys, ring.values, sinks, ring.state)
        out = F.scaled_dot_product_attention(query.double(), ring.keys.double(), ring.values.double(), scale=SCALE)
        close(out[:, :, 0], ring.attended())
