"""Every method against an independent float64 path, and the measured loop against arithmetic done by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_ids, make_neox
from family_models import VOCAB, make_family
from reference import reference_logits

from experiments import perplexity as perplexity_module
from experiments.methods import DEFAULT_METHODS, METHODS, MethodSettings
from experiments.perplexity import compute_perplexity, prompt_losses
from experiments.progress import LossDisplay
from personal_adapters.neox_flash import unwrap_attention, wrap_attention

pytestmark = pytest.mark.usefixtures("no_collection")
S, W, N = 2, 14, 60
C = S + W
CPU_METHODS = [name for name, cls in METHODS.items() if cls.unavailable() is None]


def baseline_reference(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits [N, vocab] after each token, from a fresh window for each: the definition of re-computation."""
    rows = []
    for t in range(ids.shape[1]):
        window = ids[:, max(0, t + 1 - C) : t + 1]
        rows.append(reference_logits(model, window, 0, window.shape[1])[0, -1])
    return torch.stack(rows)


REFERENCES: dict[str, Callable] = {
    "baseline": baseline_reference,
    "streaming": lambda model, ids: reference_logits(model, ids, S, W)[0],
    "kvpress": lambda model, ids: reference_logits(model, ids, S, W)[0],
    "window": lambda model, ids: reference_logits(model, ids, 0, C)[0],
    "dense": lambda model, ids: reference_logits(model, ids, 0, ids.shape[1])[0],
    "gapped": lambda model, ids: reference_logits(model, ids, S, W, gapped=True)[0],
    "rerotated": lambda model, ids: reference_logits(model, ids, S, W)[0],  # what rounding does to it: test_placements
}


def reference_nll(name: str, model, ids: torch.Tensor) -> np.ndarray:
    return F.cross_entropy(REFERENCES[name](model, ids)[:-1], ids[0, 1:], reduction="none").numpy()


def settings(**changes) -> MethodSettings:
    return MethodSettings(S, W, **changes)


def test_every_method_has_a_reference_here():
    assert set(REFERENCES) == set(METHODS)
    assert set(DEFAULT_METHODS) <= set(METHODS)
    assert all(cls.name == name for name, cls in METHODS.items())


@pytest.mark.parametrize("backend", [None, "math", "flash"])
@pytest.mark.parametrize("name", CPU_METHODS)
def test_logits_are_those_of_the_reference(name, backend):
    model, ids = make_neox(), make_ids(N)
    expected = REFERENCES[name](model, ids)
    if backend:
        wrap_attention(model, backend)
    with torch.inference_mode(), METHODS[name](model, settings()) as method:
        for _ in range(2):  # a second stream starts from nothing
            method.reset()
            rows = [method.prefill(ids[:, :C])] + [method.step(ids[:, t]) for t in range(C, N)]
            assert all(row.shape == (1, 101) for row in rows)
            assert (torch.cat(rows).double() - expected[C - 1 :]).abs().max() < 1e-5


@pytest.mark.parametrize("name", CPU_METHODS)
def test_the_measured_loop_gives_the_reference_perplexity(name):
    model, ids = make_neox(torch.float64), make_ids(N)
    result = compute_perplexity(model, ids, METHODS[name](model, settings()), warmup_steps=1)
    expected = reference_nll(name, model, ids)
    np.testing.assert_allclose(result.nll, expected, atol=1e-6)
    assert result.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-6)
    assert result.position.tolist() == list(range(1, N))
    assert result.decode_tokens == N - 1 - C
    assert result.prompt_tokens == C


@pytest.mark.parametrize("name", [name for name in CPU_METHODS if METHODS[name].parallel])
def test_parallel_scoring_gives_the_same_losses_and_a_sample_the_speed(name):
    model, ids = make_neox(), make_ids(N)
    result = compute_perplexity(
        model, ids, METHODS[name](model, settings()), scoring="parallel", decode_sample=5, warmup_steps=1
    )
    np.testing.assert_allclose(result.nll, reference_nll(name, model, ids), atol=1e-5)
    assert (result.decode_tokens, result.scored_tokens) == (5, N - 1)
    assert result.scoring_sec > 0


@pytest.mark.parametrize("name", [name for name in CPU_METHODS if not METHODS[name].parallel])
def test_a_method_without_parallel_scoring_has_no_perplexity_and_says_why(name):
    model, ids = make_neox(), make_ids(N)
    method = METHODS[name](model, settings())
    result = compute_perplexity(model, ids, method, scoring="parallel", decode_sample=3, warmup_steps=0)
    assert result.perplexity is None
    assert name in result.reasons["perplexity"]
    assert result.decode_tokens == 3
    with pytest.raises(NotImplementedError):
        method.score(ids)


@pytest.mark.parametrize("name", CPU_METHODS)
def test_the_model_is_restored_also_after_an_error(name):
    model, ids = make_neox(), make_ids(N)
    wrap_attention(model, "math")
    before = model(ids).logits
    modules = [type(module) for module in model.modules()]
    compute_perplexity(model, ids, METHODS[name](model, settings()), warmup_steps=0)

    def fail_while_attached():
        with METHODS[name](model, settings()) as method:
            method.reset()
            method.prefill(ids[:, :C])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_while_attached()
    assert model.config._attn_implementation == "sdpa"
    assert [type(module) for module in model.modules()] == modules
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model(ids).logits, before)
    unwrap_attention(model)


@pytest.mark.parametrize(
    ("length", "steps", "has_first"),
    [(2, 0, False), (C, 0, False), (C + 1, 0, False), (C + 2, 1, True), (C + 3, 2, True)],
)
def test_short_texts_have_no_decode_steps_and_say_so(length, steps, has_first):
    model, ids = make_neox(torch.float64), make_ids(length)
    result = compute_perplexity(model, ids, METHODS["streaming"](model, settings()))
    np.testing.assert_allclose(result.nll, reference_nll("streaming", model, ids), atol=1e-6)
    assert result.decode_tokens == steps
    figures = {"first_token_latency_sec", "ttft_sec", "tpot_ms", "decode_toks_per_sec"}
    assert all((getattr(result, figure) is not None) == has_first for figure in figures)
    assert has_first or set(result.reasons) >= figures


def test_times_add_up():
    model, ids = make_neox(), make_ids(N)
    r = compute_perplexity(model, ids, METHODS["baseline"](model, settings()))
    assert r.runtime_sec == pytest.approx(r.prefill_sec + r.decode_sec)
    assert r.ttft_sec == pytest.approx(r.prefill_sec + r.first_token_latency_sec)
    assert r.tpot_ms == pytest.approx(1e3 * r.decode_sec / r.decode_tokens)
    assert r.decode_toks_per_sec == pytest.approx(1e3 / r.tpot_ms)
    assert 0 < r.first_token_latency_sec <= r.decode_sec


class Counting(METHODS["baseline"]):
    """The baseline, noting what it is fed."""

    def __init__(self, *args):
        super().__init__(*args)
        self.fed = []

    def reset(self):
        super().reset()
        self.fed.append([])

    def prefill(self, ids):
        self.fed[-1] += ids[0].tolist()
        return super().prefill(ids)

    def step(self, ids):
        self.fed[-1] += ids.tolist()
        return super().step(ids)


def test_each_token_is_fed_once_after_a_warm_up_that_does_not_count():
    model, ids = make_neox(), make_ids(N)
    method = Counting(model, settings())
    compute_perplexity(model, ids, method, warmup_steps=3)
    warm_up, measured = method.fed
    assert measured == ids[0, :-1].tolist()
    assert warm_up == ids[0, : C + 3].tolist()


def test_prompt_losses_do_not_depend_on_how_many_logits_fit(monkeypatch):
    model, ids = make_neox(torch.float64), make_ids(20)
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    whole = prompt_losses(model, ids)
    assert len(forwards) == 1
    monkeypatch.setattr(perplexity_module, "_LOGITS_NBYTES", 3 * 101 * 8)
    torch.testing.assert_close(prompt_losses(model, ids), whole, rtol=0, atol=1e-12)
    assert len(forwards) == 1 + 7  # 19 losses, three at a time
    np.testing.assert_allclose(whole.detach(), reference_nll("dense", model, ids), atol=1e-6)


@pytest.mark.parametrize("ids", [torch.zeros(1, 1, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int64)])
def test_streams_that_cannot_be_measured_are_refused(ids):
    model = make_neox()
    with pytest.raises(ValueError, match="input_ids"):
        compute_perplexity(model, ids, METHODS["dense"](model, settings()))


def test_losses_that_are_not_finite_are_an_error():
    model = make_neox()
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 0] = float("nan")
    with pytest.raises(RuntimeError, match="not finite"):
        compute_perplexity(model, make_ids(N), METHODS["streaming"](model, settings()))


def test_the_running_perplexity_is_that_of_the_losses_so_far():
    shown = []
    display = LossDisplay(lambda steps, perplexity: shown.append((steps, perplexity)))
    nll = torch.arange(100.0) / 50
    for n in range(1, 71):
        display.step(nll[:n])
    assert [steps for steps, _ in shown] == [32, 32]
    assert shown[1][1] == pytest.approx(math.exp(nll[:64].mean()))


@pytest.mark.parametrize("case", ["falcon", "falcon-new"])
def test_a_token_takes_as_many_bytes_in_a_stream_as_in_a_dense_cache(case):
    model, ids = make_family(case), make_ids(N) % VOCAB
    results = [compute_perplexity(model, ids, METHODS[name](model, settings())) for name in ("streaming", "dense")]
    assert results[0].kv_bytes_per_token == results[1].kv_bytes_per_token > 0


def test_held_bytes_are_those_of_keys_and_values():
    model, ids = make_neox(), make_ids(N)
    per_token = 2 * 4 * 64 * 4  # keys and values, layers, hidden size, bytes
    kept = {"baseline": 0, "dense": N - 1, "kvpress": C}
    for name in set(CPU_METHODS):
        result = compute_perplexity(model, ids, METHODS[name](model, settings()), warmup_steps=0)
        assert result.kv_bytes_per_token == (per_token if name != "baseline" else 0)
        if name in kept:
            assert result.kv_cache_mb * 1e6 == kept[name] * per_token
        else:
            assert C * per_token <= result.kv_cache_mb * 1e6 <= (C + 2 + S) * per_token
