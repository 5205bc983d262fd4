"""Fused forwards of every family with a recipe, on a CUDA device, against float64: steps, batches, and blocks."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from conftest import GPU
from family_models import CASES, VOCAB, available, make_family, takes_sdpa
from family_reference import family_reference_logits
from packed_weights import quantise_, unpacked, whole_groups
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.method_base import capture
from personal_adapters.neox_flash import wrap_attention
from streaming_llm import StreamingDecoder, resolve_block_engine, score_stream
from streaming_llm.fused import fused_forward, why_not_fused
from streaming_llm.fused.family_recipes import NAMES
from streaming_llm.fused.weights import stored

pytestmark = pytest.mark.gpu

W, LENGTH = 28, 110  # the ring turns more than twice
HALF = [torch.bfloat16, torch.float16]
BACKENDS = ["math", "flash"]
COVERED = [case for case in CASES if available(case)]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def ids_of(batch: int) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, LENGTH), generator=torch.Generator().manual_seed(1))


def model_of(case: str, dtype: torch.dtype, **sizes: int):
    """On the CPU, in the dtype, with attention written out: SDPA leaves soft-capping out."""
    return make_family(case, dtype, attention="sdpa" if takes_sdpa(case) else "eager", **sizes)


@functools.cache
def exact(case: str, dtype: torch.dtype, batch: int, n_sink: int) -> torch.Tensor:
    return family_reference_logits(model_of(case, dtype), ids_of(batch), n_sink, W)


def stepped(model, engine: str, batch: int, n_sink: int, prompt: int) -> torch.Tensor:
    """Logits ``[batch, LENGTH - prompt + 1, vocab]``: after the prompt, and after each token that follows it."""
    ids = ids_of(batch).to(GPU)
    with StreamingDecoder(model, n_sink, W, engine=engine) as decoder:
        logits = [decoder.prefill(ids[:, :prompt]), *(decoder.step(token) for token in ids[:, prompt:].unbind(1))]
        assert decoder.engine == engine
    return torch.stack(logits, dim=1).cpu()


def error(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (got.double() - expected).abs()


def require_covered(model, case: str) -> None:
    if model.config.model_type not in NAMES:
        assert "no recipe covers" in why_not_fused(model)
        pytest.skip("no recipe covers it")
    assert why_not_fused(model) is None


@pytest.mark.parametrize("engine", ["fused-triton", "fused"])
@pytest.mark.parametrize(("batch", "n_sink", "prompt"), [(1, 4, 2), (1, 0, 20), (3, 4, 50)])
@pytest.mark.parametrize("case", COVERED)
def test_steps_in_float32(case, batch, n_sink, prompt, engine):
    model = model_of(case, torch.float32).to(GPU)
    require_covered(model, case)
    logits = stepped(model, engine, batch, n_sink, prompt)
    assert error(logits, exact(case, torch.float32, batch, n_sink)[:, prompt - 1 :]).max() < 1e-4


def wrapped(case: str, dtype: torch.dtype, backend: str):
    model = model_of(case, dtype).to(GPU)
    require_covered(model, case)
    if backend == "flash":
        if dtype == torch.float32:
            pytest.skip("flash takes half precision alone")
        if getattr(model.config, "attn_logit_softcapping", None) is not None:
            pytest.skip("flash does not soft-cap scores")
    wrap_attention(model, backend)
    return model


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", HALF, ids=name_of)
@pytest.mark.parametrize("case", COVERED)
def test_steps_in_half_precision(case, dtype, batch, backend):
    model = wrapped(case, dtype, backend)
    expected = exact(case, dtype, batch, 4)[:, 9:]
    errors = {name: error(stepped(model, name, batch, 4, 10), expected).mean().item()
              for name in ("eager", "fused", "fused-triton")}  # fmt: skip
    assert max(errors.values()) < 1.1 * errors["eager"], errors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALF, ids=name_of)
@pytest.mark.parametrize("case", COVERED)
@torch.no_grad()
def test_re_computation(case, dtype, backend):
    """The last logits of dense forwards: no further from float64 than those of the model's own call."""
    lengths = range(5, W + 1)
    expected = family_reference_logits(model_of(case, dtype), ids_of(3)[:, :W], 0, W)
    own = model_of(case, dtype).to(GPU)
    forwards = {"own": lambda ids: own(ids).logits[:, -1], "fused": fused_forward(wrapped(case, dtype, backend))}
    errors = {}
    for name, forward in forwards.items():
        parts = [error(forward(ids_of(3)[:, :n].to(GPU)).cpu(), expected[:, n - 1]) for n in lengths]
        errors[name] = torch.stack(parts).mean().item()
    assert errors["fused"] < 1.1 * errors["own"], errors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=name_of)
@pytest.mark.parametrize("case", COVERED)
def test_blocks(case, dtype, backend):
    model = wrapped(case, dtype, backend)
    ids, errors = ids_of(3), {}
    expected = F.cross_entropy(exact(case, dtype, 3, 4)[:, :-1].mT, ids[:, 1:], reduction="none")
    for engine in ("eager", "fused", resolve_block_engine(model, "fused-triton")):
        nll = score_stream(model, ids, 4, W, block_size=37, engine=engine)
        errors[engine] = error(nll, expected).mean().item()
    assert max(errors.values()) < max(1.1 * errors["eager"], 1e-5), errors


@pytest.mark.parametrize("case", ["llama", "gpt_neox", "gemma3"])
def test_a_recorded_re_computation(case):
    """Nothing of it comes from the host, so that it can be recorded."""
    model, ids = wrapped(case, torch.bfloat16, "math"), ids_of(1)[:, :W].to(GPU)
    forward = fused_forward(model)
    with torch.no_grad():
        expected = forward(ids)
        assert torch.equal(capture(forward, ids.flip(1), "fused")(ids), expected)


QUANTISED = ["gpt_neox", "llama", "phi3", "gemma3"]


@pytest.mark.parametrize("engine", ["fused-triton", "fused"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["int8", "int4 by 32"])
@pytest.mark.parametrize("case", QUANTISED)
def test_steps_of_quantised_models(case, kind, batch, engine):
    model = model_of(case, torch.float32, **whole_groups(case)).to(GPU)
    plain = quantise_(model, kind).cpu()
    logits = stepped(model, engine, batch, 4, 10)
    expected = family_reference_logits(plain, ids_of(batch), 4, W)[:, 9:]
    assert error(logits, expected).max() < 1e-4


@pytest.mark.parametrize("kind", ["int8", "int4 by 32"])
@pytest.mark.parametrize("case", QUANTISED)
def test_steps_of_quantised_models_in_half_precision(case, kind):
    """They lose what the de-quantised models' own steps lose."""
    model = model_of(case, torch.bfloat16, **whole_groups(case)).to(GPU)
    plain = quantise_(model, kind)
    expected = family_reference_logits(copy.deepcopy(plain).cpu(), ids_of(1), 4, W)[:, 9:]
    own = error(stepped(plain, "eager", 1, 4, 10), expected).mean()
    for engine in ("fused", "fused-triton"):
        assert error(stepped(model, engine, 1, 4, 10), expected).mean() < 1.1 * own, engine


@pytest.mark.parametrize("kind", ["int8", "int4 by 32"])
@pytest.mark.parametrize("case", QUANTISED)
def test_blocks_of_quantised_models(case, kind):
    model = model_of(case, torch.float32, **whole_groups(case)).to(GPU)
    plain = quantise_(model, kind)
    one, other = (score_stream(m, ids_of(3), 4, W, block_size=37, engine="fused") for m in (plain, model))
    assert error(one, other).max() < 1e-5


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int4WeightOnlyConfig"])
def test_steps_of_models_that_torchao_quantised(kind):
    quantization = pytest.importorskip("torchao.quantization")
    if kind.startswith("Int4"):
        pytest.importorskip("mslk")
    sizes = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes)).to(torch.bfloat16).to(GPU).eval()
    plain = copy.deepcopy(model)
    quantization.quantize_(model, getattr(quantization, kind)())
    for layer, other in zip(model.modules(), plain.modules(), strict=True):
        if isinstance(layer, torch.nn.Linear):
            assert type(layer.weight).__name__ == kind[:4] + "Tensor"
            other.weight.data = unpacked(stored(layer.weight)).to(torch.bfloat16)
    expected = family_reference_logits(copy.deepcopy(plain).cpu(), ids_of(1), 4, W)[:, 9:]
    own = error(stepped(plain, "eager", 1, 4, 10), expected).mean()
    for engine in ("fused", "fused-triton"):
        assert error(stepped(model, engine, 1, 4, 10), expected).mean() < 1.1 * own, engine
