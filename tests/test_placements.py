"""Where kept tokens are placed: rounding of keys that are turned again and again, and who refuses what."""

from __future__ import annotations

import pytest
import torch
from conftest import GPU, make_ids, make_neox
from family_models import VOCAB, make_family

from experiments.methods import METHODS, MethodSettings

S, W, N = 2, 14, 60
C = S + W


def losses_of_the_loop(name: str, model, ids: torch.Tensor, engine: str = "eager") -> torch.Tensor:
    """Losses ``[1, N - 1 - C]`` of the tokens behind a full cache."""
    with torch.inference_mode(), METHODS[name](model, MethodSettings(S, W, engine)) as method:
        assert method.engine == engine
        method.reset()
        logits = [method.prefill(ids[:, :C])] + [method.step(ids[:, t]).clone() for t in range(C, N - 1)]
    return torch.nn.functional.cross_entropy(torch.cat(logits), ids[0, C:], reduction="none")[None]


def in_bfloat16(key: torch.Tensor, n_turns: int, inv_freq: torch.Tensor) -> torch.Tensor:
    """A key ``[..., head_dim]`` turned back so many times, by the definition: every operation is rounded."""
    half = len(inv_freq)
    cos, sin = inv_freq.double().cos().bfloat16(), inv_freq.double().sin().bfloat16()
    for _ in range(n_turns):
        a, b = key[..., :half], key[..., half : 2 * half]
        key = torch.cat((a * cos + b * sin, b * cos - a * sin, key[..., 2 * half :]), dim=-1)
    return key


def test_every_key_is_turned_at_every_step_in_the_model_s_dtype():
    model, ids = make_neox(torch.bfloat16), make_ids(N)
    inv_freq = model.gpt_neox.rotary_emb.inv_freq
    with torch.inference_mode(), METHODS["rerotated"](model, MethodSettings(S, W)) as method:
        method.reset()
        method.prefill(ids[:, :C])
        [layer] = method._cache.layers[:1]
        entered = {}
        for t in range(C, N):
            method.step(ids[:, t])
            entered[t] = layer.slots_of_keys[:, :, -1].clone()
        sinks = layer.slots_of_keys[:, :, :S]
        for back in range(W + 1):
            found = layer.slots_of_keys[:, :, C - back]
            assert torch.equal(found, in_bfloat16(entered[N - 1 - back], back, inv_freq))
        method.reset()
        method.prefill(ids[:, :C])
        assert torch.equal(layer.slots_of_keys[:, :, :S], sinks)


@pytest.mark.parametrize("case", ["llama", "glm", "qwen2", "cohere", "smollm3", "llama-yarn"])
def test_without_rounding_re_rotation_is_streaming_in_every_family(case):
    model, ids = make_family(case).double(), make_ids(N) % VOCAB
    settings = MethodSettings(S, W)
    exact = METHODS["streaming"](model, settings).score(ids)
    assert (METHODS["rerotated"](model, settings).score(ids) - exact).abs().max() < 1e-5
    assert (losses_of_the_loop("rerotated", model, ids) - exact[:, C - 1 :]).abs().max() < 1e-5
    gapped = METHODS["gapped"](model, settings).score(ids)
    assert (losses_of_the_loop("gapped", model, ids) - gapped[:, C - 1 :]).abs().max() < 1e-5
    assert (gapped - exact)[:, C:].abs().max() > 1e-4


def test_models_for_which_re_rotation_is_not_defined_are_refused():
    with pytest.raises(ValueError, match="sliding windows of the model's own"):
        METHODS["rerotated"](make_family("mistral"), MethodSettings(S, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gapped", "rerotated"])
def test_a_recorded_step_gives_what_the_plain_call_gives(name):
    model, ids = make_neox().to(GPU), make_ids(N).to(GPU)
    eager = losses_of_the_loop(name, model, ids)
    assert (losses_of_the_loop(name, model, ids, "graph") - eager).abs().max() < 1e-4
    parallel = METHODS[name](model, MethodSettings(S, W)).score(ids)[:, C - 1 :]
    assert (parallel - eager).abs().max() < 1e-4
