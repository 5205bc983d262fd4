"""The backend ``cudnn``: refused with a reason where it cannot run, and what a block does with no other kernel."""

from __future__ import annotations

import pytest
import torch
from conftest import GPU, make_ids, make_neox
from reference import reference_logits
from torch.nn.attention import SDPBackend, sdpa_kernel

from personal_adapters.neox_flash import wrap_attention
from personal_adapters.sdpa import ATTN_BACKENDS, check_backend_available, resolve_attn_backend
from streaming_llm import StreamingDecoder
from streaming_llm.attention import kernel_choice, torch_kernels

CUDNN = pytest.mark.skipif(
    not check_backend_available("cudnn", torch.bfloat16, "cuda"), reason="needs cuDNN attention on a CUDA device"
)


def test_on_a_cpu_it_is_refused_with_the_reason():
    for dtype in (torch.float32, torch.bfloat16):
        unavailable = check_backend_available("cudnn", dtype, "cpu")
        assert not unavailable
        assert "CUDA devices only" in unavailable.reason
    with pytest.raises(ValueError, match="'cudnn' cannot run here: cuDNN's attention runs on CUDA"):
        resolve_attn_backend("cudnn", device="cpu", dtype=torch.float32)
    assert resolve_attn_backend("auto", device="cpu", dtype=torch.float32) == "flash"


def test_it_allows_one_kernel_and_no_other():
    assert ATTN_BACKENDS["cudnn"] is SDPBackend.CUDNN_ATTENTION
    model = make_neox()
    wrap_attention(model, "cudnn")
    with pytest.raises(RuntimeError, match=r"No (viable backend|available kernel)"):
        model(make_ids(5))


def test_a_block_on_a_cpu_runs_no_other_kernel_instead():
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), pytest.raises(RuntimeError, match="no allowed attention kernel"):
        kernel_choice.choose_kernel(torch.zeros(1, 1, 4, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize(("n_sink", "window_size"), [(4, 28), (0, 28), (4, 3)])
@pytest.mark.parametrize("block_size", [7, 40, 150])
def test_blocks_of_causal_calls_alone_are_exact(monkeypatch, n_sink, window_size, block_size):
    """The path that cuDNN takes, with another kernel's causal calls in its place."""
    calls = []

    def causal_calls(query, key, value, scale, causal):
        calls.append(causal)
        return torch_kernels.flash(query, key, value, scale, causal)

    monkeypatch.setattr(kernel_choice, "choose_kernel", lambda query, softcap=None: "cudnn")
    monkeypatch.setitem(torch_kernels.WITH_LSE, "cudnn", causal_calls)
    model, ids = make_neox(), make_ids(150)
    with StreamingDecoder(model, n_sink, window_size) as decoder:
        logits = decoder.prefill(ids, block_size)
    expected = reference_logits(make_neox(torch.float64), ids, n_sink, window_size)[:, -1]
    assert (logits.double() - expected).abs().max() < 1e-5
    assert calls


@pytest.mark.gpu
@CUDNN
@pytest.mark.parametrize(("n_sink", "window_size"), [(4, 60), (0, 60), (4, 600)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_it_costs_what_math_costs(n_sink, window_size, dtype):
    ids = make_ids(400, batch=2)
    exact = make_neox(torch.float64)
    exact.load_state_dict(make_neox(dtype).state_dict())
    reference = reference_logits(exact, ids, n_sink, window_size)[:, 256:]
    error = {}
    for backend in ("math", "cudnn"):
        model = make_neox(dtype)
        model.gpt_neox.rotary_emb = make_neox().gpt_neox.rotary_emb  # float32 frequencies, as when loaded
        model = model.to(GPU)
        wrap_attention(model, backend)
        with StreamingDecoder(model, n_sink, window_size, "eager") as decoder:
            rows = [decoder.prefill(ids[:, :257].to(GPU))]
            rows += [decoder.step(ids[:, t].to(GPU)) for t in range(257, ids.shape[1])]
        logits = torch.stack(rows, dim=1)
        error[backend] = (logits.cpu().double() - reference).pow(2).mean().sqrt().item()
    assert error["cudnn"] < 1.1 * error["math"]
