"""Wrapped attention with what people put around models: hooks, compilation, accelerate, PEFT, quantised weights."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from conftest import make_ids, make_neox
from reference import reference_logits
from streams import KERNEL_OPS, kernels_run
from torch import nn
from transformers import GPTNeoXForCausalLM

from personal_adapters.neox_flash import NeoXFlashAttentionAdapter, unwrap_attention, wrap_attention
from streaming_llm import StreamingDecoder, StreamingKVCache, StreamingLLMWrapper, score_stream
from streaming_llm.fused.refusals import why_not
from streaming_llm.placement import weight_addresses


def small(**changes):
    return make_neox(**{"num_hidden_layers": 2, **changes})


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits


def attention_of(model, layer: int = 1) -> nn.Module:
    return model.gpt_neox.layers[layer].attention


# Hooks and gradients


def test_hooks_run_once_whenever_they_were_registered():
    model, ids = small(), make_ids(10)
    calls: list[str] = []

    def register(when: str) -> list:
        layer = attention_of(model)
        return [
            layer.register_forward_pre_hook(lambda *args: calls.append(f"{when} pre")),
            layer.register_forward_hook(lambda *args, **kwargs: calls.append(f"{when} forward"), with_kwargs=True),
            layer.register_full_backward_hook(lambda *args: calls.append(f"{when} backward")),
        ]

    def run() -> list[str]:
        calls.clear()
        model(ids, labels=ids).loss.backward()
        return sorted(calls)

    def expected(*when: str) -> list[str]:
        return sorted(f"{w} {kind}" for w in when for kind in ("pre", "forward", "backward"))

    before = register("before")
    wrap_attention(model, "flash")
    assert run() == expected("before")
    register("wrapped")
    assert run() == expected("before", "wrapped")
    for handle in before:
        handle.remove()
    assert run() == expected("wrapped")
    unwrap_attention(model)
    assert run() == expected("wrapped")


def test_a_hook_may_change_the_output():
    model, ids = small(), make_ids(10)
    wrap_attention(model, "math")
    handle = attention_of(model).register_forward_hook(lambda module, args, output: (output[0] * 0, *output[1:]))
    changed = logits_of(model, ids)
    unwrap_attention(model)
    torch.testing.assert_close(logits_of(model, ids), changed, atol=1e-5, rtol=0)
    handle.remove()
    assert not torch.allclose(logits_of(model, ids), changed, atol=1e-2)


def gradients(model, ids) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("backend", KERNEL_OPS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_all_weights(backend, checkpointing):
    model, ids = small(dtype=torch.float64).train(), make_ids(20, batch=2)
    expected = gradients(model, ids)
    wrap_attention(model, backend)
    if checkpointing:
        model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(model, ids), expected)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    optimiser.step()
    unwrap_attention(model)
    changed = gradients(model, ids)
    assert not any(torch.allclose(changed[name], gradient) for name, gradient in expected.items())


# Compilation


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compilation_has_no_graph_break_and_follows_the_backend(compiler):
    torch._dynamo.reset()
    model, ids = small(), make_ids(30)
    expected = logits_of(model, ids)
    wrap_attention(model, "math")
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    for backend in ("math", "flash", "math"):
        wrap_attention(model, backend)
        torch.testing.assert_close(logits_of(compiled, ids), expected, atol=1e-5, rtol=0)
        ran = kernels_run(lambda: logits_of(compiled, ids))
        assert ("flash" in ran) == (backend == "flash")  # math may be taken apart by the compiler
    unwrap_attention(model)
    torch.testing.assert_close(logits_of(compiled, ids), expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_compiled_model_streams():
    torch._dynamo.reset()
    model, ids = small(), make_ids(120)
    reference = reference_logits(model, ids, 4, 30)
    wrap_attention(model, "flash")
    compiled = torch.compile(model, backend="eager")
    with StreamingLLMWrapper(compiled, 4, 30) as stream, torch.no_grad():
        cache = stream.new_cache()
        logits = [stream(ids[:, :50], past_key_values=cache, use_cache=True).logits]
        logits += [stream(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(50, 120)]
        out = stream.generate(ids, max_new_tokens=5, do_sample=False)
    assert (torch.cat(logits, dim=1) - reference).abs().max() < 5e-6
    assert out[0, 120] == reference[0, -1].argmax()


# Saving, copying


def test_a_whole_wrapped_model_is_saved_with_torch():
    model, ids = small(), make_ids(20)
    wrap_attention(model, "flash")
    attention_of(model).register_forward_hook(print_nothing)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))
    adapter = attention_of(loaded)
    assert adapter.backend == "flash"
    assert adapter._modules is adapter.wrapped._modules
    assert adapter._forward_hooks is adapter.wrapped._forward_hooks
    assert adapter.wrapped is not attention_of(model).wrapped


def print_nothing(*args) -> None:
    """A hook that can be pickled."""


def test_replaced_parameters_are_those_of_the_layer():
    model, ids = small(), make_ids(20)
    wrap_attention(model, "math")
    other = small(seed=4)
    model.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(logits_of(model, ids), logits_of(other, ids), atol=1e-5, rtol=0)
    unwrap_attention(model)
    assert torch.equal(logits_of(model, ids), logits_of(other, ids))


# accelerate


def dispatched(model, folder, where: str):
    accelerate = pytest.importorskip("accelerate")
    device_map = {"gpt_neox.layers.1": where} | dict.fromkeys(
        ["gpt_neox.embed_in", "gpt_neox.emb_dropout", "gpt_neox.layers.0", "gpt_neox.final_layer_norm"], "cpu"
    )
    head = "embed_out" if hasattr(model, "embed_out") else "lm_head"
    device_map |= {"gpt_neox.rotary_emb": "cpu", head: "cpu"}
    return accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("wrap_first", [True, False])
def test_dispatched_models(tmp_path, where, wrap_first):
    plain, model, ids = small(), small(), make_ids(120)
    expected = logits_of(plain, ids)
    if wrap_first:
        wrap_attention(model, "flash")
    model = dispatched(model, tmp_path, where)
    if not wrap_first:
        wrap_attention(model, "flash")
    assert torch.allclose(logits_of(model, ids), expected, atol=1e-5)
    assert kernels_run(lambda: logits_of(model, ids)) == {"flash"}
    reference = reference_logits(plain, ids, 4, 30)
    with StreamingDecoder(model, 4, 30) as decoder:
        assert (decoder.prefill(ids[:, :100]) - reference[:, 99]).abs().max() < 5e-6
        for t in range(100, 120):
            assert (decoder.step(ids[:, t]) - reference[:, t]).abs().max() < 5e-6
    unwrap_attention(model)
    assert torch.allclose(logits_of(model, ids), expected, atol=1e-5)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_loaded_with_a_device_map(tmp_path, device_map):
    pytest.importorskip("accelerate")
    model, ids = small(rotary_pct=0.25), make_ids(30)
    wrap_attention(model, "flash")
    model.save_pretrained(tmp_path)
    loaded = GPTNeoXForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    device = loaded.device
    wrap_attention(loaded, "math")
    assert torch.allclose(logits_of(loaded, ids.to(device)).cpu(), logits_of(model, ids), atol=1e-5)


# PEFT


def with_lora(model, **changes):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        **{"r": 4, "target_modules": ["query_key_value", "dense"], "task_type": "CAUSAL_LM", **changes}
    )
    torch.manual_seed(3)
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("wrap_first", [True, False])
def test_lora(wrap_first):
    ids = make_ids(20)
    expected = with_lora(small())
    model = small()
    if wrap_first:
        wrap_attention(model, "flash")
    model = with_lora(model)
    if not wrap_first:
        assert wrap_attention(model, "flash") == 2
    torch.testing.assert_close(logits_of(model, ids), logits_of(expected, ids), atol=1e-5, rtol=0)
    assert not torch.allclose(logits_of(model, ids), logits_of(small(), ids), atol=1e-2)
    assert kernels_run(lambda: logits_of(model, ids)) == {"flash"}
    for m in (model, expected):
        m(ids, labels=ids).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (ours.grad is not None) == ("lora_" in name)
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)
    assert list(model.state_dict()) == list(expected.state_dict())

    with model.disable_adapter():
        torch.testing.assert_close(logits_of(model, ids), logits_of(small(), ids), atol=1e-5, rtol=0)
    before = logits_of(model, ids)
    merged = model.merge_and_unload()
    assert isinstance(attention_of(merged), NeoXFlashAttentionAdapter)
    assert type(attention_of(merged).query_key_value) is nn.Linear
    torch.testing.assert_close(logits_of(merged, ids), before, atol=1e-5, rtol=0)
    assert unwrap_attention(merged) == 2
    torch.testing.assert_close(logits_of(merged, ids), before, atol=1e-5, rtol=0)


def test_lora_is_saved_and_loaded_while_wrapped(tmp_path):
    peft = pytest.importorskip("peft")
    base, ids = small(), make_ids(20)
    wrap_attention(base, "math")
    model = with_lora(base)
    expected = logits_of(model, ids)
    model.save_pretrained(tmp_path)
    fresh = small()
    wrap_attention(fresh, "math")
    assert torch.equal(logits_of(peft.PeftModel.from_pretrained(fresh, tmp_path), ids), expected)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_model_with_lora_streams(wrapped):
    model, ids = with_lora(small()), make_ids(150)
    merged = copy.deepcopy(model).merge_and_unload()
    if wrapped:
        wrap_attention(model, "flash")
    names = [name for name, _ in model.named_modules()]
    reference = reference_logits(merged, ids, 4, 30)
    with StreamingLLMWrapper(model, 4, 30) as stream:
        with torch.no_grad():
            logits = stream(input_ids=ids, past_key_values=stream.new_cache(), use_cache=True).logits
        out = stream.generate(input_ids=ids, max_new_tokens=40, do_sample=False)
        cache = stream.new_cache()
        first = stream.generate(ids, past_key_values=cache, max_new_tokens=10, do_sample=False)
        second = stream.generate(
            first[:, -1:], past_key_values=cache, continues=True, max_new_tokens=30, do_sample=False
        )
    assert (logits - reference).abs().max() < 2e-5
    assert torch.equal(out[:, 150:], reference_logits(merged, out, 4, 30).argmax(-1)[:, 149:-1])
    assert torch.equal(torch.cat((first, second[:, 1:]), dim=1), out)
    with StreamingDecoder(model, 4, 30) as decoder:
        assert (decoder.prefill(ids[:, :100]) - reference[:, 99]).abs().max() < 2e-5
        for t in range(100, 150):
            assert (decoder.step(ids[:, t]) - reference[:, t]).abs().max() < 2e-5
    nll = score_stream(model, ids, 4, 30)
    expected = -reference[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert (nll - expected).abs().max() < 5e-5
    cache = StreamingKVCache(model.config, 4, 30)
    with torch.no_grad():
        steps = [model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(60)]
    assert (torch.cat(steps, dim=1) - reference[:, :60]).abs().max() < 2e-5
    assert [name for name, _ in model.named_modules()] == names


def test_virtual_tokens_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(small(), config)
    for make in (StreamingLLMWrapper, StreamingDecoder):
        with pytest.raises(ValueError, match="PromptTuningConfig"):
            make(model, 4, 30)
    with pytest.raises(ValueError, match="PromptTuningConfig"):
        score_stream(model, make_ids(50), 4, 30)


# Quantised weights


class Int8Linear(nn.Module):
    """Stands for the linear layers that quantised loading puts in: integer weights, a scale as a buffer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def quantised(model):
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Int8Linear(module))
    return model


@pytest.mark.parametrize("wrap_first", [True, False])
def test_quantised_layers(wrap_first):
    ids = make_ids(100)
    expected, model = quantised(small()), small()
    if wrap_first:
        wrap_attention(model, "flash")
    model = quantised(model)
    if not wrap_first:
        wrap_attention(model, "flash")
    assert list(model.state_dict()) == list(expected.state_dict())
    assert attention_of(model).dense.weight.dtype == torch.int8
    torch.testing.assert_close(logits_of(model, ids), logits_of(expected, ids), atol=1e-5, rtol=0)
    with StreamingDecoder(expected, 4, 30) as one, StreamingDecoder(model, 4, 30) as other:
        torch.testing.assert_close(one.prefill(ids), other.prefill(ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    from transformers import BitsAndBytesConfig

    small(rotary_pct=0.25).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPTNeoXForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map=device)
    ids = make_ids(100).to(device)
    keys = list(model.state_dict())
    expected = logits_of(model, ids).float()
    assert type(attention_of(model).dense) is not nn.Linear
    wrap_attention(model, "math")
    torch.testing.assert_close(logits_of(model, ids).float(), expected, atol=2e-2, rtol=0)
    with StreamingLLMWrapper(model, 4, 200) as stream, torch.no_grad():
        logits = stream(ids, past_key_values=stream.new_cache(), use_cache=True).logits
        assert stream.generate(ids, max_new_tokens=150, do_sample=False).shape == (1, 250)
    torch.testing.assert_close(logits.float(), expected, atol=5e-2, rtol=0)
    # Last: on a CPU, bitsandbytes' 4-bit layers compute something else after state_dict().
    assert list(model.state_dict()) == keys


def test_torchao_weight_only():
    """A model quantised in place streams as it does de-quantised."""
    quantization = pytest.importorskip("torchao.quantization")
    model, ids = small(rotary_pct=0.25), make_ids(100)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    expected = copy.deepcopy(model)
    for linear in (m for m in expected.modules() if isinstance(m, nn.Linear)):
        linear.weight = nn.Parameter(linear.weight.dequantize())
    assert why_not(model) is None
    assert why_not(expected) is None
    assert 0 not in weight_addresses(model)
    with StreamingDecoder(expected, 4, 30) as one, StreamingDecoder(model, 4, 30) as other:
        torch.testing.assert_close(one.prefill(ids), other.prefill(ids), atol=1e-5, rtol=0)
        for token in ids[:, :40].unbind(1):
            torch.testing.assert_close(one.step(token), other.step(token), atol=1e-5, rtol=0)
