"""score_stream against the token loop of the float64 reference."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from conftest import make_ids, make_neox, make_rounded
from reference import reference_logits
from streams import decode
from torch.nn.attention import SDPBackend, sdpa_kernel

from streaming_llm import StreamingLLMWrapper, losses, score_stream
from streaming_llm.attention import band, math_kernel

KERNELS = {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}


LENGTH = 260


def reference_nll(model, ids, n_sink, window_size) -> torch.Tensor:
    logits = reference_logits(model, ids, n_sink, window_size)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(ids.shape[0], -1)


@functools.cache
def expected_nll(dtype: torch.dtype, n_sink: int, window_size: int) -> torch.Tensor:
    """What both kernels are held to."""
    return reference_nll(make_neox(dtype), make_ids(LENGTH, batch=3), n_sink, window_size)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("n_sink", "window_size"), [(4, 48), (0, 48), (4, 1), (0, 1), (4, 500)])
def test_every_block_size_gives_the_token_loop(n_sink, window_size, kernel):
    ids = make_ids(LENGTH, batch=3)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-6)):
        model = make_neox(dtype)
        expected = expected_nll(dtype, n_sink, window_size)
        for block_size in (None, 1, 20, 48, 49, 100, 133, LENGTH, 1000):
            with sdpa_kernel(KERNELS[kernel]):
                nll = score_stream(model, ids, n_sink, window_size, block_size)
            assert nll.dtype == torch.float32
            assert nll.shape == (3, LENGTH - 1)
            assert (nll - expected).abs().max() < tolerance


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_is_no_further_off_than_its_token_loop(kernel):
    (model, exact), ids = make_rounded(torch.bfloat16), make_ids(400)
    expected = reference_nll(exact, ids, 4, 48)
    with sdpa_kernel(KERNELS[kernel]):
        block = score_stream(model, ids, 4, 48)
        with StreamingLLMWrapper(model, 4, 48) as stream:
            logits = decode(model, stream.new_cache(), ids)
    loop = F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")
    error = {name: (nll - expected).pow(2).mean().sqrt().item() for name, nll in (("block", block), ("loop", loop))}
    assert error["block"] < 1.05 * error["loop"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernel_asked_for_runs_without_a_mask_in_flash(kernel):
    model, ids = make_neox(), make_ids(300)
    original = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile,
        sdpa_kernel(KERNELS[kernel]),
    ):
        score_stream(model, ids, 4, 60)
    names = {event.key for event in profile.key_averages()}
    flash, math = str(original).removesuffix(".default").replace(".", "::"), "aten::_scaled_dot_product_attention_math"
    assert (flash in names, math in names) == ((True, False) if kernel == "flash" else (False, True))
    if kernel == "flash":  # inputs: query, key, value, dropout, is_causal, attn_mask, scale
        masks = [
            event.input_shapes[5] for event in profile.key_averages(group_by_input_shape=True) if event.key == flash
        ]
        assert masks
        assert not any(masks)


def test_the_math_path_splits_large_scores(monkeypatch):
    model, ids = make_neox(), make_ids(300)
    expected = reference_nll(model, ids, 4, 60)
    monkeypatch.setattr(math_kernel, "MATH_SCORES_BYTES", 10_000)
    monkeypatch.setattr(losses, "LOGITS_BYTES", 4 * 101 * 17)
    with sdpa_kernel(SDPBackend.MATH):
        assert (score_stream(model, ids, 4, 60) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(("n_sink", "window_size"), [(4, 48), (0, 48), (3, 1)])
def test_blocks_longer_than_the_window_attend_where_their_keys_lie(n_sink, window_size, monkeypatch):
    """What CUDA's windowed kernel is used for, with the CPU's flash kernel in its place."""
    taken = []

    def continues(query, plan, kernel):
        config = plan.layout.config
        taken.append(plan.first_query > config.cache_size and query.shape[2] > config.window_size)
        return taken[-1]

    monkeypatch.setattr(band, "continues", continues)
    model, ids = make_neox(torch.float64), make_ids(400, batch=2)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        nll = score_stream(model, ids, n_sink, window_size, 100)
    assert any(taken)
    assert (nll - reference_nll(model, ids, n_sink, window_size)).abs().max() < 1e-6


@pytest.mark.parametrize("sizes", [[400], [1, 1, 398], [150, 7, 243], [133, 133, 134], [100] * 4])
def test_chunks_of_any_length(sizes):
    model, ids = make_neox(), make_ids(400)
    expected = score_stream(model, ids, 4, 48, block_size=100)
    assert torch.equal(score_stream(model, iter(ids.split(sizes, dim=1)), 4, 48, block_size=100), expected)


def test_hidden_states_and_callback():
    model, ids = make_neox(), make_ids(250)
    nll, hidden = score_stream(model, ids, 4, 48, block_size=60, return_hidden=True)
    assert hidden.shape == (1, 250, 64)
    logits = model.get_output_embeddings()(hidden)
    torch.testing.assert_close(F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none"), nll[0])
    seen = []
    assert score_stream(model, ids, 4, 48, 60, on_block=lambda *block: seen.append(block)) is None
    assert [start for start, _, _ in seen] == [1, 60, 120, 180, 240]
    torch.testing.assert_close(torch.cat([nll for _, nll, _ in seen], dim=1), nll)


@pytest.mark.parametrize(
    ("ids", "arguments", "message"),
    [
        (make_ids(1), {}, "two tokens"),
        (make_ids(10)[0], {}, r"\[batch, length\]"),
        (make_ids(10).float(), {}, "integer"),
        (make_ids(0), {}, "at least two tokens"),
        ("a text", {}, "tokenizer"),
        (make_ids(10), {"block_size": 0}, "block_size"),
        (make_ids(10), {"window_size": 0}, "window_size"),
        (make_ids(10), {"return_hidden": True, "on_block": print}, "exclude"),
    ],
)
def test_bad_input(ids, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        score_stream(make_neox(), ids, **arguments)


def test_the_model_is_restored():
    model = make_neox()
    rotary = model.gpt_neox.rotary_emb
    score_stream(model, make_ids(50), 4, 8)
    assert model.gpt_neox.rotary_emb is rotary
    assert model.config._attn_implementation == "sdpa"
