"""kvpress as a method: its presses, what it leaves behind, and how its absence is told."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import make_ids, make_neox
from family_models import VOCAB, make_family

from experiments import kvpress_support
from experiments.kvpress_support import PRESSES, import_adapter, kvpress_unavailable
from experiments.methods import METHODS, MethodSettings
from personal_adapters.neox_flash import wrap_attention

needs_kvpress = pytest.mark.skipif(kvpress_unavailable() is not None, reason=str(kvpress_unavailable()))
S, W, N = 2, 14, 60
C = S + W


def run(model, ids, press="streaming_llm", method="kvpress"):
    with torch.inference_mode(), METHODS[method](model, MethodSettings(S, W, kvpress_press=press)) as attached:
        attached.reset()
        rows = [attached.prefill(ids[:, :C])] + [attached.step(ids[:, t]) for t in range(C, ids.shape[1])]
    return torch.cat(rows)


@needs_kvpress
def test_importing_it_leaves_transformers_attention_functions_in_force():
    code = (
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions\n"
        "before = dict(functions.items())\n"
        "import sys, experiments.methods\n"
        "assert 'kvpress' not in sys.modules\n"
        "from experiments.kvpress_support import import_adapter, kvpress_attention_functions\n"
        "import_adapter()\n"
        "assert 'kvpress' in sys.modules\n"
        "assert all(functions[name] is f for name, f in before.items())\n"
        "with kvpress_attention_functions():\n"
        "    assert functions['sdpa'] is not before['sdpa']\n"
        "assert all(functions[name] is f for name, f in before.items())\n"
        "functions.register('sdpa', min)\n"
        "assert functions['sdpa'] is min\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_kvpress
@pytest.mark.parametrize("name", [name for name, entry in PRESSES.items() if not entry.cannot])
def test_a_press_runs_in_the_decode_loop_or_says_why_it_cannot_on_this_family(name):
    model, ids = make_neox(), make_ids(N)
    if PRESSES[name].needs_queries:
        with pytest.raises(ValueError, match=f"'{name}' cannot run on GPTNeoXForCausalLM"):
            run(model, ids, name)
        return
    logits = run(model, ids, name)
    assert logits.isfinite().all()
    assert torch.equal(logits, run(model, ids, name))  # also the one that draws random numbers
    dense = run(model, ids, method="dense")
    assert torch.equal(logits[:2], dense[:2])  # nothing is pruned before the third
    assert not torch.allclose(logits[10:], dense[10:])


@needs_kvpress
def test_a_press_that_cannot_run_is_no_scorer_or_fails_in_the_decode_loop():
    adapter = import_adapter()
    for name, entry in PRESSES.items():
        if not entry.cannot:
            continue
        with pytest.raises(ValueError, match=f"'{name}' cannot run"):
            adapter.build_press(name, C, S)
        is_scorer = issubclass(getattr(adapter.kvpress, entry.class_name), adapter.ScorerPress)
        assert is_scorer == (entry.cannot != kvpress_support._OTHER_KIND)


def llama_like(family, num_hidden_layers):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 64, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2}
    config = AutoConfig.for_model(family, **sizes, **heads, num_hidden_layers=num_hidden_layers)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@needs_kvpress
@pytest.mark.parametrize("press", ["streaming_llm", "tova", "expected_attention", "cap"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_families_that_kvpress_supports_run_as_they_are(family, press):
    model, ids = llama_like(family, 2), make_ids(N)
    logits, dense = run(model, ids, press), run(model, ids, method="dense")
    assert torch.equal(logits[:2], dense[:2])  # nothing is pruned before the third
    assert logits.isfinite().all()
    assert not torch.allclose(logits[10:], dense[10:])


@needs_kvpress
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_kept_keys_get_the_positions_of_their_slots(family):
    """With one layer, keys do not depend on what was pruned: a fresh forward over the kept tokens gives the same."""
    model, ids = llama_like(family, 1), make_ids(N)
    logits = run(model, ids)
    for row, t in ((2, C + 1), (N - C, N - 1)):
        kept = torch.cat([ids[:, :S], ids[:, t - W : t + 1]], dim=1)
        torch.testing.assert_close(logits[row], model(kept).logits[0, -1], atol=1e-5, rtol=0)


@needs_kvpress
def test_the_hook_sees_the_wrapped_layer_itself():
    model = make_neox()
    wrap_attention(model, "flash")
    adapter = import_adapter()
    view = adapter._ModelView(model).model.layers[0].self_attn
    inner = model.gpt_neox.layers[0].attention.wrapped
    assert isinstance(view, type(inner))
    assert view.layer_idx == 0
    assert view.head_dim == inner.head_size


def test_absence_and_versions_are_told_from_metadata(monkeypatch):
    import importlib.metadata

    def version(name):
        if name == "kvpress":
            raise importlib.metadata.PackageNotFoundError
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert "not installed" in kvpress_unavailable()
    versions = {"kvpress": "0.5.5", "transformers": "5.17.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name, "1.0"))
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: ["transformers<5.3,>=4.56", "nltk>9; extra == 'eval'"]
    )
    reason = kvpress_unavailable()
    assert reason.startswith("kvpress 0.5.5 needs transformers")
    assert "5.17.0" in reason
    versions["kvpress"] = "0.4.0"
    assert "0.5 or newer" in kvpress_unavailable()


@needs_kvpress
@pytest.mark.parametrize("case", ["llama", "phi", "qwen3_moe"])
def test_families_that_it_rerotates_rightly_give_what_the_stream_gives(case):
    model, ids = make_family(case), make_ids(N) % VOCAB
    assert (run(model, ids) - run(model, ids, method="streaming")).abs().max() < 2e-5


@needs_kvpress
@pytest.mark.parametrize(
    ("case", "reason"),
    [("glm", "pairs"), ("mistral", "sliding windows"), ("smollm3", "alike"), ("falcon", "no layers")],
)
def test_families_that_it_would_get_wrong_are_refused(case, reason):
    with pytest.raises(ValueError, match=reason):
        run(make_family(case), make_ids(N) % VOCAB)
