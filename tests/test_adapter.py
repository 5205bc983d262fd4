"""The kernel switch: NeoXFlashAttentionAdapter, backends, availability, dtype."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from conftest import make_ids, make_neox
from reference import reference_logits
from streams import KERNEL_OPS, kernels_run
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXForCausalLM

from personal_adapters import sdpa
from personal_adapters.neox_flash import NeoXFlashAttentionAdapter, unwrap_attention, wrap_attention
from personal_adapters.sdpa import (
    check_backend_available,
    check_sdpa_flash_available,
    resolve_attn_backend,
    select_dtype,
)
from streaming_llm import StreamingDecoder


@pytest.mark.parametrize("backend", KERNEL_OPS)
def test_exactly_the_named_kernel_runs(backend):
    model, ids = make_neox(), make_ids(100)
    assert wrap_attention(model, backend) == 4
    with torch.no_grad():
        assert kernels_run(lambda: model(ids)) == {backend}
        with StreamingDecoder(model, 4, 30) as decoder:
            assert kernels_run(lambda: decoder.prefill(ids)) == {backend}
            assert kernels_run(lambda: decoder.step(ids[:, 0])) == {backend}


def test_a_kernel_that_cannot_run_is_an_error_not_another_kernel():
    model, ids = make_neox(attention_dropout=0.1).train(), make_ids(10)
    wrap_attention(model, "flash")
    with pytest.raises(RuntimeError, match="No available kernel"):  # the CPU's flash kernel has no dropout
        model(ids)


@pytest.mark.parametrize("backend", KERNEL_OPS)
def test_every_backend_is_exact(backend):
    model, ids = make_neox(), make_ids(200)
    wrap_attention(model, backend)
    with StreamingDecoder(model, 4, 60) as decoder:
        decoder.prefill(ids[:, :64])
        logits = torch.stack([decoder.step(ids[:, t]) for t in range(64, 200)], dim=1)
    assert (logits - reference_logits(model, ids, 4, 60)[:, 64:]).abs().max() < 5e-6


def test_math_and_flash_agree_in_bfloat16_within_what_it_costs():
    ids = make_ids(200)
    model, exact = make_neox(torch.bfloat16), make_neox(torch.float64)
    exact.load_state_dict(model.state_dict())
    exact.gpt_neox.rotary_emb.inv_freq = model.gpt_neox.rotary_emb.inv_freq.double()
    with torch.no_grad():
        reference = exact(ids).logits
        error = {}
        for backend in KERNEL_OPS:
            wrap_attention(model, backend)
            error[backend] = (model(ids).logits - reference).pow(2).mean().sqrt().item()
    assert error["flash"] < 1.05 * error["math"]


def test_wrapping_is_idempotent_repointed_and_undone():
    model = make_neox()
    layers = [layer.attention for layer in model.gpt_neox.layers]
    keys = list(model.state_dict())
    names = [name for name, _ in model.named_parameters()]
    wrap_attention(model, "math")
    adapters = [layer.attention for layer in model.gpt_neox.layers]
    assert wrap_attention(model, "flash") == 4
    assert [layer.attention for layer in model.gpt_neox.layers] == adapters
    assert {adapter.backend for adapter in adapters} == {"flash"}
    assert not any(isinstance(adapter.wrapped, NeoXFlashAttentionAdapter) for adapter in adapters)
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == names
    assert unwrap_attention(model) == 4
    assert [layer.attention for layer in model.gpt_neox.layers] == layers
    assert unwrap_attention(model) == 0


def test_the_adapter_is_transparent():
    model = make_neox()
    attention = model.gpt_neox.layers[1].attention
    wrap_attention(model, "math")
    adapter = model.gpt_neox.layers[1].attention
    assert adapter.head_size == attention.head_size
    assert adapter.query_key_value is attention.query_key_value
    assert adapter.layer_idx == 1
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = adapter.no_such_thing
    adapter.query_key_value = torch.nn.Identity()  # as PEFT does
    assert isinstance(attention.query_key_value, torch.nn.Identity)
    adapter.scaling = 5.0
    assert attention.scaling == 5.0
    model.train()
    assert attention.training
    model.double()
    assert attention.dense.weight.dtype == torch.float64


def test_copies_and_pickles_of_a_wrapped_model_are_their_own():
    model, ids = make_neox(), make_ids(30)
    wrap_attention(model, "flash")
    with torch.no_grad():
        expected = model(ids).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(ids).logits, expected)
            other.gpt_neox.layers[0].attention.dense.weight.zero_()
            assert not torch.equal(other(ids).logits, expected)
            assert unwrap_attention(other) == 4
        assert torch.equal(model(ids).logits, expected)


def test_saving_and_loading_while_wrapped(tmp_path):
    # rotary_pct: Transformers 5.2 saves another and loads 0.25 again
    model, ids = make_neox(rotary_pct=0.25), make_ids(30)
    with torch.no_grad():
        expected = model(ids).logits
        wrap_attention(model, "math")
        model.save_pretrained(tmp_path)
        loaded = GPTNeoXForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(ids).logits, expected)
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        make_neox(seed=5, rotary_pct=0.25).load_state_dict(torch.load(buffer))


def test_models_that_cannot_be_wrapped():
    with pytest.raises(ValueError, match="gpt2"):
        wrap_attention(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11)), "math")
    with pytest.raises(ValueError, match="eager"):
        wrap_attention(make_neox(attention="eager"), "math")
    with pytest.raises(ValueError, match=r"unknown attention backend 'flsh'.*Did you mean 'flash'"):
        wrap_attention(make_neox(), "flsh")


def test_availability_runs_the_kernel_and_says_why_not():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert check_sdpa_flash_available(dtype, "cpu")
    if not torch.cuda.is_available():
        unavailable = check_sdpa_flash_available(torch.bfloat16, "cuda")
        assert not unavailable
        assert "CUDA" in unavailable.reason
    assert check_backend_available("math", torch.float32, "cpu")
    unavailable = check_sdpa_flash_available(torch.int32, "cpu")
    assert not unavailable
    assert "int32" in unavailable.reason


@pytest.mark.parametrize(
    ("requested", "environment", "expected"),
    [
        (None, None, "math"),
        (None, "", "math"),
        (None, "0", "math"),
        (None, "1", "flash"),
        ("math", "1", "math"),
        ("flash", "0", "flash"),
        ("auto", "0", "flash"),
    ],
)
def test_an_explicit_backend_wins_over_the_environment(monkeypatch, requested, environment, expected):
    monkeypatch.delenv("FLASH_SDPA", raising=False)
    if environment is not None:
        monkeypatch.setenv("FLASH_SDPA", environment)
    assert resolve_attn_backend(requested, device="cpu", dtype=torch.float32) == expected


def test_backends_that_cannot_be_resolved(monkeypatch):
    monkeypatch.setenv("FLASH_SDPA", "yes")
    with pytest.raises(ValueError, match="FLASH_SDPA must be 0 or 1"):
        resolve_attn_backend(device="cpu")
    monkeypatch.setenv("FLASH_SDPA", "1")
    no_flash = sdpa.Availability(False, "it is broken")
    monkeypatch.setattr(sdpa, "check_backend_available", lambda *args: no_flash)
    with pytest.raises(ValueError, match="FLASH_SDPA=1 cannot run here: it is broken"):
        resolve_attn_backend(device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match="'flash' cannot run here: it is broken"):
        resolve_attn_backend("flash", device="cpu", dtype=torch.float32)
    assert resolve_attn_backend("auto", device="cpu", dtype=torch.float32) == "math"


def test_dtype_on_a_cpu_is_float32():
    assert select_dtype("cpu") == torch.float32
