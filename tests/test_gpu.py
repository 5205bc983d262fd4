"""The same promises on a CUDA device, where flash takes no mask and only half precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import GPU, make_ids, make_neox
from reference import reference_logits
from streams import nothing_waits

from personal_adapters.neox_flash import wrap_attention
from personal_adapters.sdpa import check_sdpa_flash_available, resolve_attn_backend, select_dtype
from streaming_llm import StreamingDecoder, StreamingLLMWrapper, score_stream

pytestmark = pytest.mark.gpu

FLASH_OP, MATH_OP = "aten::_flash_attention_forward", "aten::_scaled_dot_product_attention_math"
CONFIGS = [(4, 60), (0, 60), (1, 60), (4, 1), (4, 600)]


def on_gpu(dtype: torch.dtype, **changes):
    """A model on the GPU and its float64 twin with the same (rounded) weights on the CPU."""
    model, exact = make_neox(dtype, **changes), make_neox(torch.float64, **changes)
    exact.load_state_dict(model.state_dict())
    model.gpt_neox.rotary_emb = make_neox(**changes).gpt_neox.rotary_emb  # float32 frequencies, as when loaded
    return model.to(GPU), exact


def rms(x: torch.Tensor) -> float:
    return x.double().pow(2).mean().sqrt().item()


@torch.no_grad()
def stream_logits(model, ids: torch.Tensor, n_sink: int, window_size: int) -> dict[str, torch.Tensor]:
    """Logits token by token, and in one block."""
    ids = ids.to(GPU)
    with StreamingDecoder(model, n_sink, window_size, "eager") as decoder:
        loop = torch.stack([decoder.step(ids[:, t]) for t in range(ids.shape[1])], dim=1)
    with StreamingLLMWrapper(model, n_sink, window_size) as stream:
        block = model(ids, past_key_values=stream.new_cache(), use_cache=True).logits
    return {"loop": loop.cpu(), "block": block.cpu()}


@pytest.mark.parametrize(("n_sink", "window_size"), CONFIGS)
def test_float32_math_is_exact(n_sink, window_size):
    model, exact = on_gpu(torch.float32)
    wrap_attention(model, "math")
    ids = make_ids(400, batch=2)
    reference = reference_logits(exact, ids, n_sink, window_size)
    for logits in stream_logits(model, ids, n_sink, window_size).values():
        assert (logits - reference).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n_sink", "window_size"), CONFIGS)
@pytest.mark.parametrize("head_dim", [16, 20])  # 20 has to be padded for flash
def test_half_precision_costs_what_math_costs(n_sink, window_size, dtype, head_dim):
    model, exact = on_gpu(dtype, hidden_size=4 * head_dim)
    ids = make_ids(400, batch=2)
    reference = reference_logits(exact, ids, n_sink, window_size)
    errors = {}
    for backend in ("math", "flash"):
        wrap_attention(model, backend)
        for path, logits in stream_logits(model, ids, n_sink, window_size).items():
            errors[backend, path] = rms(logits - reference)
    print(errors)
    allowed = 1.05 * errors["math", "loop"]
    assert max(errors.values()) < allowed, errors


@pytest.mark.parametrize("backend", ["math", "flash"])
def test_scores_are_those_of_the_loop(backend):
    model, exact = on_gpu(torch.bfloat16)
    wrap_attention(model, backend)
    ids = make_ids(700)
    reference = reference_logits(exact, ids, 4, 60)
    expected = F.cross_entropy(reference[0, :-1], ids[0, 1:], reduction="none")
    loop = stream_logits(model, ids, 4, 60)["loop"]
    allowed = rms(F.cross_entropy(loop[0, :-1].float(), ids[0, 1:], reduction="none") - expected)
    for block_size in (None, 100, 33):
        nll = score_stream(model, ids, 4, 60, block_size)
        assert nll.device.type == "cpu"
        assert rms(nll[0] - expected) < 1.05 * allowed


def kernels_run(call) -> set[str]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("backend", ["math", "flash"])
def test_exactly_the_named_kernel_runs(backend):
    model, _ = on_gpu(torch.bfloat16)
    wrap_attention(model, backend)
    ids = make_ids(300).to(GPU)
    with StreamingDecoder(model, 4, 60) as decoder:
        for call in (
            lambda: decoder.prefill(ids),
            lambda: decoder.step(ids[:, 0]),
            lambda: score_stream(model, ids, 4, 60),
        ):
            names = kernels_run(call)
            assert (FLASH_OP in names, MATH_OP in names) == (backend == "flash", backend == "math")


def test_a_step_never_waits_for_the_device():
    model, _ = on_gpu(torch.bfloat16)
    wrap_attention(model, "flash")
    ids = make_ids(200).to(GPU)
    with StreamingDecoder(model, 4, 60) as decoder:
        decoder.prefill(ids[:, :100])
        decoder.step(ids[:, 100])
        with nothing_waits():
            for t in range(101, 200):
                decoder.step(ids[:, t])


def test_outputs_do_not_depend_on_the_position():
    model, _ = on_gpu(torch.float32)
    ids = make_ids(600).to(GPU)
    outputs = []
    for position in (100, 10_000_000):
        with StreamingDecoder(model, 4, 60) as decoder:
            decoder.prefill(ids[:, :100])
            decoder.move_to(position)
            outputs.append(torch.stack([decoder.step(ids[:, t]) for t in range(100, 600)]))
    assert (outputs[0] - outputs[1]).abs().max() < 2e-5


def test_flash_in_float32_is_refused_with_the_reason():
    unavailable = check_sdpa_flash_available(torch.float32, GPU)
    assert not unavailable
    assert "bfloat16 and float16" in unavailable.reason
    with pytest.raises(ValueError, match="bfloat16 and float16"):
        resolve_attn_backend("flash", device=GPU, dtype=torch.float32)
    assert resolve_attn_backend("auto", device=GPU, dtype=torch.float32) == "math"
    assert resolve_attn_backend("auto", device=GPU, dtype=torch.bfloat16) == "flash"
    assert select_dtype(GPU) == torch.bfloat16


def test_scoring_memory_does_not_grow_with_the_stream():
    model, _ = on_gpu(torch.bfloat16)
    wrap_attention(model, "flash")
    peaks = []
    for length in (20_000, 200_000):
        torch.cuda.reset_peak_memory_stats(GPU)
        score_stream(model, make_ids(length), 4, 1000, block_size=5000)
        peaks.append(torch.cuda.max_memory_allocated(GPU))
    assert abs(peaks[0] - peaks[1]) <= 2048  # of a gigabyte, over 180,000 tokens
