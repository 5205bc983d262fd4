"""StreamingDecoder: losses and samples of the step by step loop, what is refused, and which engine is meant."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import make_ids, make_neox
from family_models import VOCAB, make_family
from reference import reference_logits
from torch.testing._internal.two_tensor import TwoTensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from streaming_llm import StreamingDecoder, resolve_block_engine, resolve_engine, score_stream
from streaming_llm.engines.base import Engine
from streaming_llm.fused import fused_forward, require_fused, why_not_fused
from streaming_llm.fused.refusals import why_not
from streaming_llm.placement import weight_addresses
from streaming_llm.sampling import Sampling

S, W = 4, 20
LENGTH = 120  # the ring turns more than four times
CONTROLS = [
    {},
    {"temperature": 0.6},
    {"top_k": 5},
    {"top_p": 0.7},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.6},
    {"temperature": 0},
]
"""Keywords of `generate`."""


@pytest.fixture
def decoder():
    with StreamingDecoder(make_neox(), S, W) as decoder:
        yield decoder


# ------------------------------------------------------------------------------------------------- losses and tokens


@pytest.mark.parametrize("prefilled", [1, 3, 30])
def test_losses_are_those_of_the_reference_and_of_score_stream(prefilled):
    model, ids = make_neox(torch.float64), make_ids(LENGTH, batch=2)
    with StreamingDecoder(model, S, W) as decoder:
        decoder.prefill(ids[:, :prefilled])
        parts = [decoder.score(part) for part in ids[:, prefilled:].split((1, 40, LENGTH - prefilled - 41), dim=1)]
        losses = torch.cat(parts, dim=1)
        last = decoder.generate(1, temperature=0)  # chosen from the logits after the last scored token
    logits = reference_logits(model, ids, S, W)
    expected = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")[:, prefilled - 1 :]
    assert losses.dtype == torch.float64
    assert (losses - expected).abs().max() < 1e-11
    assert (losses - score_stream(model, ids, S, W)[:, prefilled - 1 :]).abs().max() < 1e-6  # returns float32
    assert torch.equal(last[:, 0], logits[:, -1].argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_summed_in_float32(dtype):
    model, ids = make_neox(dtype), make_ids(40)
    with StreamingDecoder(model, S, W) as decoder:
        decoder.prefill(ids[:, :30])
        losses = decoder.score(ids[:, 30:])
        decoder.reset()
        logits = [decoder.prefill(ids[:, :30]), *(decoder.step(token) for token in ids[:, 30:-1].unbind(1))]
    assert losses.dtype == torch.float32
    expected = F.cross_entropy(torch.cat(logits).float(), ids[0, 30:], reduction="none")
    assert torch.equal(losses[0], expected)


@pytest.mark.parametrize("controls", CONTROLS, ids=str)
def test_what_is_generated_is_chosen_step_by_step(decoder, controls):
    prompt = make_ids(10, batch=3)
    decoder.prefill(prompt)
    tokens = decoder.generate(60, seed=7, **controls)
    assert tokens.shape == (3, 60)
    assert tokens.dtype == torch.int64

    decoder.reset()
    generator, logits, by_hand = torch.Generator().manual_seed(7), decoder.prefill(prompt), []
    for _ in range(60):
        by_hand.append(Sampling(**controls).choose(logits, generator))
        logits = decoder.step(by_hand[-1])
    assert torch.equal(tokens, torch.stack(by_hand, dim=1))


def test_a_seed_starts_the_random_numbers_anew_and_none_goes_on_with_them(decoder):
    def generated(*seeds: int | None) -> torch.Tensor:
        decoder.reset()
        decoder.prefill(make_ids(10))
        return torch.cat([decoder.generate(20, seed=seed) for seed in seeds], dim=1)

    assert torch.equal(generated(1, None), generated(1, None))
    assert torch.equal(generated(1)[:, :20], generated(1, 2)[:, :20])
    assert not torch.equal(generated(1, None), generated(1, 1))
    assert not torch.equal(generated(1), generated(2))
    assert not torch.equal(generated(None), generated(None))


@pytest.mark.parametrize("window_size", [1, 7, 60])
def test_what_was_generated_behind_a_stop_is_taken_back(window_size, monkeypatch):
    monkeypatch.setattr(Engine, "runs_alone", True)  # several tokens before a criterion is asked
    model, prompt = make_neox(torch.float64), make_ids(30)
    with StreamingDecoder(model, S, window_size) as decoder:
        decoder.prefill(prompt)
        whole = decoder.generate(60, seed=0)
        decoder.reset()
        decoder.prefill(prompt)
        stopped = decoder.generate(60, seed=0, stopping_criteria=lambda ids, scores: ids.shape[1] == 40)
        assert torch.equal(stopped, whole[:, :40])
        assert decoder.cache.n_seen == 70
        logits = decoder.logits
        decoder.reset()
        assert (decoder.prefill(torch.cat((prompt, stopped), dim=1)) - logits).abs().max() < 1e-11


def test_two_decoders_do_not_share_random_numbers_nor_use_pytorch_s(decoder):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    decoder.prefill(make_ids(10))
    decoder.generate(5, seed=0)
    with StreamingDecoder(decoder.model, S, W) as other:
        other.prefill(make_ids(10))
        first = other.generate(10, seed=3)
        other.reset()
        other.prefill(make_ids(10))
        parts = [other.generate(5, seed=3), decoder.generate(5, seed=0), other.generate(5)]
    assert torch.equal(torch.cat([parts[0], parts[2]], dim=1), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_reset_forgets_the_stream(decoder):
    ids = make_ids(60)
    first = decoder.prefill(ids)
    nbytes = decoder.cache_nbytes
    decoder.reset()
    assert decoder.cache_nbytes == 0
    assert decoder.cache.get_seq_length() == 0
    with pytest.raises(RuntimeError, match="nothing has been fed"):
        decoder.score(ids)
    assert torch.equal(decoder.prefill(ids), first)
    assert decoder.cache_nbytes == nbytes


def test_far_into_a_stream_losses_and_samples_are_the_same(decoder):
    ids, outputs = make_ids(60), []
    for position in (60, 10_000_000):
        decoder.reset()
        decoder.prefill(ids)
        decoder.move_to(position)
        outputs.append((decoder.score(ids[:, :30]), decoder.generate(30, seed=0)))
        assert decoder.cache.get_seq_length() == position + 60
    assert (outputs[0][0] - outputs[1][0]).abs().max() < 2e-5
    assert torch.equal(outputs[0][1], outputs[1][1])


# ----------------------------------------------------------------------------------------------------------- sampling


def warped(logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None):
    """Probabilities after Transformers' warpers, in the order in which its generation applies them."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers += [TopKLogitsWarper(top_k)] if top_k is not None else []
    warpers += [TopPLogitsWarper(top_p)] if top_p is not None else []
    return warpers(None, logits).softmax(-1)


@pytest.mark.parametrize(
    "controls",
    [
        *CONTROLS[:-1],
        {"top_k": 1},
        {"top_k": 12},  # all
        {"top_k": 50, "top_p": 0.5},  # more than all
        {"top_p": 1.0},
        {"top_p": 1e-6},
        {"temperature": 100.0},
    ],
    ids=str,
)
def test_tokens_are_drawn_with_the_probabilities_of_transformers_warpers(controls):
    draws, vocab = 100_000, 12
    logits = 2 * torch.randn(2, vocab, generator=torch.Generator().manual_seed(2))
    expected = warped(logits, **controls).double()
    choose, generator = Sampling(**controls).choose, torch.Generator().manual_seed(0)
    many = logits.repeat_interleave(draws, dim=0)
    tokens = choose(many, generator).view(2, draws)
    counts = torch.stack([row.bincount(minlength=vocab) for row in tokens]).double()
    assert counts[expected == 0].sum() == 0
    allowed = 4.5 * (draws * expected * (1 - expected)).sqrt() + 1
    assert ((counts - draws * expected).abs() < allowed).all()


def test_without_temperature_the_most_likely_token_is_taken():
    logits = torch.randn(50, 101, generator=torch.Generator().manual_seed(3))
    assert torch.equal(Sampling(temperature=0).choose(logits), logits.argmax(-1))
    assert torch.equal(Sampling(temperature=0, top_k=3, top_p=0.5).choose(logits), logits.argmax(-1))
    assert torch.equal(Sampling(top_k=1).choose(logits), logits.argmax(-1))
    assert torch.equal(Sampling(temperature=1e-6).choose(logits), logits.argmax(-1))


def test_every_row_of_a_batch_has_its_own_chance():
    logits = torch.zeros(1000, 10)
    tokens = Sampling().choose(logits, torch.Generator().manual_seed(0))
    assert tokens.bincount(minlength=10).min() > 50


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or at least 1e-30, got -0.1"),
        ({"temperature": math.nan}, "temperature must be 0 or at least 1e-30, got nan"),
        ({"temperature": 1e-40}, "temperature must be 0 or at least 1e-30, got 1e-40"),
        ({"top_k": 0}, "top_k must be an integer of at least 1, got 0"),
        ({"top_k": 2.0}, "top_k must be an integer of at least 1, got 2.0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, or None, got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, or None, got 1.1"),
        ({"top_p": math.nan}, "top_p must be above 0 and at most 1, or None, got nan"),
    ],
)
def test_sampling_out_of_range_is_refused_before_anything_is_fed(decoder, wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)
    decoder.prefill(make_ids(10))
    with pytest.raises(ValueError, match=message):
        decoder.generate(5, **wrong)
    assert decoder.cache.get_seq_length() == 10


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "warp"}, "one of auto, eager, graph, graph.compile, fused, fused-triton, got 'warp'"),
        ({"engine": "graph"}, "engine 'graph' cannot run: it needs a CUDA device, and the model is on cpu"),
        ({"engine": "graph+compile"}, "needs a CUDA device"),
        ({"engine": "fused"}, "it needs a CUDA device"),
        ({"engine": "fused-tritn"}, "Did you mean 'fused-triton'"),
        ({"n_sink": -1}, "n_sink"),
        ({"window_size": 0}, "window_size"),
    ],
)
def test_what_cannot_run_is_refused_and_leaves_the_model_as_it_was(arguments, message):
    model = make_neox()
    attention, modules = model.config._attn_implementation, [id(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        StreamingDecoder(model, **arguments)
    assert model.config._attn_implementation == attention
    assert [id(module) for module in model.modules()] == modules


def test_nothing_can_be_scored_or_generated_before_something_is_fed(decoder):
    for call in (lambda: decoder.score(make_ids(5)), lambda: decoder.generate(5)):
        with pytest.raises(RuntimeError, match="call prefill"):
            call()
    decoder.step(torch.tensor([3]))
    assert decoder.score(make_ids(5)).shape == (1, 5)


def test_shapes_are_checked(decoder):
    decoder.prefill(make_ids(10, batch=2))
    with pytest.raises(ValueError, match=r"token_ids must be \[batch\], got \[2, 1\]"):
        decoder.step(torch.ones(2, 1, dtype=torch.int64))
    for shape in ((5,), (2, 0)):
        with pytest.raises(ValueError, match=r"token_ids must be \[batch, n >= 1\]"):
            decoder.score(torch.ones(shape, dtype=torch.int64))
    for n in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="max_new_tokens must be an integer of at least 1"):
            decoder.generate(n)
    assert decoder.cache.get_seq_length() == 10
    with pytest.raises(ValueError, match="holds 2 streams"):
        decoder.step(torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("case", ["gpt_neox", "llama", "gemma3"])
def test_memory_comes_back_as_soon_as_a_decoder_and_its_model_go(case):
    gc.disable()
    try:
        model = make_family(case)
        decoder = StreamingDecoder(model, S, W)
        decoder.prefill(make_ids(30, vocab=VOCAB))
        decoder.generate(2)
        left = weakref.ref(decoder.cache), weakref.ref(model)
        decoder.close()
        del decoder, model
        assert [x() for x in left] == [None, None]
    finally:
        gc.enable()


def test_a_closed_decoder_feeds_nothing(decoder):
    decoder.prefill(make_ids(10))
    decoder.close()
    decoder.close()
    ids = make_ids(5)
    for call, given in (("prefill", ids), ("step", ids[:, 0]), ("score", ids), ("generate", 5)):
        with pytest.raises(RuntimeError, match="has been closed"):
            getattr(decoder, call)(given)


# ------------------------------------------------------------------------------------------------------------- engines


def test_on_a_cpu_the_plain_model_call_is_the_fastest_there_is():
    model = make_neox()
    assert resolve_engine(model) == "eager"
    with StreamingDecoder(model, S, W, "auto") as decoder:
        decoder.prefill(make_ids(5))
        assert decoder.engine == "eager"
        assert decoder.compile_sec == 0


def test_the_engine_of_blocks_is_resolved_or_refused():
    model = make_neox()
    assert resolve_block_engine(model) == resolve_block_engine(model, "auto") == "eager"
    assert resolve_block_engine(model, "eager") == "eager"
    assert resolve_block_engine(model, "graph") == "eager"
    with pytest.raises(ValueError, match="engine 'fused' cannot run: it needs a CUDA device"):
        resolve_block_engine(model, "fused")
    with pytest.raises(ValueError, match="engine must be one of auto, eager"):
        resolve_block_engine(model, "warp")
    with pytest.raises(ValueError, match="it needs a CUDA device"):
        score_stream(model, make_ids(30), S, W, engine="fused")


def test_fused_forwards_say_why_they_cannot_run():
    model = make_neox()
    assert why_not_fused(model) == "it needs a CUDA device, and the model is on cpu"
    assert fused_forward(model) is None
    with pytest.raises(ValueError, match="fused forwards cannot run: it needs a CUDA device"):
        require_fused(model)


class AdaptedLinear(torch.nn.Module):
    """What a fine-tuning library puts in a plain layer's place."""

    def __init__(self, base_layer: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer


def in_two(layer: torch.nn.Module) -> torch.nn.Parameter:
    """A weight that holds its data in other tensors, as torchao's do."""
    weight = layer.mlp.dense_h_to_4h.weight.detach()
    return torch.nn.Parameter(TwoTensor(weight, weight.clone()))


def changed(change):
    """Makes a model whose second layer has been changed."""

    def make():
        model = make_neox()
        change(model.gpt_neox.layers[1])
        return model

    return make


def with_product(module: torch.nn.Module):
    return changed(lambda layer: setattr(layer.mlp, "dense_h_to_4h", module))


UNFIT = {
    "a family without a recipe": (
        lambda: make_family("mixtral"),
        "no recipe covers model type 'mixtral' (only cohere",
    ),
    "another activation": (lambda: make_neox(hidden_act="mish"), "no kernel computes its activation MishActivation"),
    "in training": (lambda: make_neox().train(), "training mode"),
    "float64": (lambda: make_neox(torch.float64), "its weights are torch.float64"),
    "an adapter inside": (
        with_product(AdaptedLinear(torch.nn.Linear(1, 1))),
        "it holds a AdaptedLinear, whose forward would be left out",
    ),
    "another layer": (
        changed(lambda layer: setattr(layer, "mlp", torch.nn.Sequential(layer.mlp))),
        "a Sequential is in a layer",
    ),
    "another product": (with_product(torch.nn.Identity()), "it holds a Identity in place of a plain layer"),
    "a quantised weight": (  # it says of itself that it is of one of the dtypes, and contiguous
        changed(lambda layer: setattr(layer.mlp.dense_h_to_4h, "weight", in_two(layer))),
        "it has weights of class TwoTensor, which no kernel reads",
    ),
    "two dtypes": (changed(lambda layer: layer.mlp.half()), "not all of one of"),
    "a hook": (changed(lambda layer: layer.register_forward_hook(print)), "hooks are registered on it"),
    "a forward of somebody's": (
        changed(lambda layer: setattr(layer, "forward", str)),
        "the forward of a GPTNeoXLayer has been replaced",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_models_that_no_recipe_covers_are_refused_with_the_reason(case):
    make, message = UNFIT[case]
    assert message in why_not(make())


def test_quantised_weights_that_are_replaced_lie_elsewhere():
    model = make_neox()
    layer = model.gpt_neox.layers[1]
    plain = weight_addresses(model)
    layer.mlp.dense_h_to_4h.weight = in_two(layer)
    first = weight_addresses(model)
    assert len(first) == len(plain) + 1
    assert 0 not in first
    kept, layer.mlp.dense_h_to_4h.weight = layer.mlp.dense_h_to_4h.weight, in_two(make_neox().gpt_neox.layers[1])
    assert weight_addresses(model) != first
    layer.mlp.dense_h_to_4h.weight = kept
    assert weight_addresses(model) == first


@pytest.mark.parametrize("changes", [{}, {"use_parallel_residual": False}, {"hidden_act": "relu"}], ids=str)
def test_nothing_but_the_device_is_wrong_with_what_a_recipe_covers(changes):
    assert why_not(make_neox(**changes)) is None
