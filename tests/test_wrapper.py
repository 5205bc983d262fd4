"""StreamingLLMWrapper and StreamingDecoder: blocks of any length, any position, and a model left as it was."""

from __future__ import annotations

import gc

import pytest
import torch
from conftest import make_ids, make_neox
from family_models import make_family
from reference import reference_logits
from streams import CONFIGS, CUTS, decode, forward_in_blocks, snapshot
from transformers import DynamicCache

from streaming_llm import StreamingDecoder, StreamingKVCache, StreamingLLMWrapper


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("n_sink", "window_size"), CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-6)])
def test_blocks_and_tokens_are_exact(dtype, tolerance, n_sink, window_size, attention):
    model, ids = make_neox(dtype, attention), make_ids(CUTS[-1])
    reference = reference_logits(model, ids, n_sink, window_size)
    with StreamingLLMWrapper(model, n_sink, window_size) as stream:
        for cuts in (range(CUTS[-1] + 1), CUTS, (0, CUTS[-1])):
            logits = forward_in_blocks(model, stream.new_cache(), ids, cuts)
            assert (logits - reference).abs().max() < tolerance


@pytest.mark.parametrize("filled", [30, 300])
def test_outputs_do_not_depend_on_the_position(filled):
    model, ids = make_neox(), make_ids(filled + 500)
    outputs = []
    for position in (filled, 10_000_000):
        with StreamingDecoder(model, 4, 60) as decoder:
            decoder.prefill(ids[:, :filled])
            decoder.move_to(position)
            outputs.append(torch.stack([decoder.step(ids[:, t]) for t in range(filled, filled + 500)]))
    assert (outputs[0] - outputs[1]).abs().max() < 2e-5

    with StreamingLLMWrapper(model, 4, 60) as stream:
        cache = stream.new_cache()
        forward_in_blocks(model, cache, ids, (0, filled))
        cache.move_to(10_000_000)
        assert cache.get_seq_length() == 10_000_000
        logits = forward_in_blocks(model, cache, ids, (filled, filled + 1, filled + 200, filled + 500))
    assert (logits[0] - outputs[0][:, 0]).abs().max() < 2e-5


def test_a_position_before_the_kept_tokens_is_refused():
    model = make_neox()
    cache = StreamingKVCache(model.config, 4, 60)
    decode(model, cache, make_ids(50))
    with pytest.raises(ValueError, match="position"):
        cache.move_to(49)


def test_the_model_is_restored_also_after_an_error():
    model = make_neox()
    before, logits = snapshot(model), model(make_ids(50)).logits
    with StreamingLLMWrapper(model, 4, 60):
        assert snapshot(model) != before
    assert snapshot(model) == before

    with pytest.raises(ZeroDivisionError), StreamingLLMWrapper(model, 4, 60):
        raise ZeroDivisionError
    assert snapshot(model) == before

    decoder = StreamingDecoder(model, 4, 60)
    with StreamingLLMWrapper(model, 0, 10), StreamingLLMWrapper(model, 2, 20):
        decoder.close()
        assert snapshot(model) != before
    assert snapshot(model) == before
    decoder = StreamingDecoder(model, 4, 60)
    del decoder
    gc.collect()
    assert snapshot(model) == before
    assert torch.equal(model(make_ids(50)).logits, logits)


def test_a_cache_of_the_wrapper_is_a_bare_one_outside():
    model, ids = make_neox(), make_ids(200)
    with StreamingLLMWrapper(model, 4, 60) as stream:
        cache = stream.new_cache()
    with pytest.raises(ValueError, match="StreamingLLMWrapper"):
        model(ids, past_key_values=cache, use_cache=True)


def test_a_cache_of_another_model_is_noticed():
    model, other, ids = make_neox(), make_neox(seed=3), make_ids(200)
    with StreamingLLMWrapper(model, 4, 60) as stream, torch.no_grad(), pytest.raises((RuntimeError, ValueError)):
        other(ids, past_key_values=stream.new_cache(), use_cache=True)


def test_a_cache_of_another_kind_of_model_is_refused():
    model, ids = make_neox(), make_ids(30)
    fewer_heads, llama = make_neox(num_attention_heads=2), make_family("llama")
    others = (fewer_heads, "num_attention_heads: 2 there, 4 here"), (llama, "model_type: llama there, gpt_neox here")
    with StreamingLLMWrapper(model, 4, 60) as stream, torch.no_grad():
        for other, message in others:
            cache = StreamingKVCache.from_model(other, 4, 60)
            for feed in (
                lambda cache: stream.prefill(ids, cache),
                lambda cache: stream(ids, past_key_values=cache),
                lambda cache: stream.generate(ids, past_key_values=cache, max_new_tokens=2),
            ):
                with pytest.raises(ValueError, match=f"another model: .*{message}"):
                    feed(cache)
        for no_stream in (None, DynamicCache()):
            with pytest.raises(ValueError, match="must be a StreamingKVCache"):
                stream.prefill(ids, no_stream)


def test_plain_forwards_inside_the_wrapper_are_plain():
    model, ids = make_neox(torch.float64), make_ids(100)
    with torch.no_grad():
        expected = model(ids).logits
        with StreamingLLMWrapper(model, 4, 60):
            inside = model(ids).logits
    assert (inside - expected).abs().max() < 1e-6


@pytest.mark.parametrize("prompt", [20, 200])
def test_in_a_window_that_holds_everything_beams_are_those_of_the_model(prompt):
    model, ids = make_neox(), make_ids(prompt)
    asked = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 60, "do_sample": False}
    with StreamingLLMWrapper(model, 4, 600) as stream:
        assert torch.equal(stream.generate(ids, **asked), model.generate(ids, **asked))


@pytest.mark.parametrize("prompt", [20, 200])
def test_padding_in_a_forward_of_ones_own_is_refused(prompt):
    """A cache cannot see which rows it is for; `generate`, `prefill` and `score_stream` can."""
    model, ids = make_neox(), make_ids(prompt, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with StreamingLLMWrapper(model, 4, 60) as stream, pytest.raises(ValueError, match="attention_mask hides tokens"):
        stream(ids, attention_mask=mask, past_key_values=stream.new_cache())


def test_misuse_is_named():
    model = make_neox()
    stream = StreamingLLMWrapper(model, 4, 60)
    with pytest.raises(RuntimeError, match="enter it first"):
        stream.new_cache()
    with stream, pytest.raises(RuntimeError, match="entered already"):
        stream.__enter__()
    decoder = StreamingDecoder(model, 4, 60)
    with pytest.raises(ValueError, match="length >= 1"):
        decoder.prefill(make_ids(0))
    with pytest.raises(TypeError, match="as tokenizers give, got list"):
        decoder.prefill([[1, 2]])
    with stream, pytest.raises(ValueError, match=r"at least one token, got \[5\]"):
        stream.generate(make_ids(5)[0], max_new_tokens=1)
    decoder.close()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="flex_attention"):
        StreamingDecoder(model, 4, 60)


def test_decoder_prefill_step_and_reset():
    model, ids = make_neox(), make_ids(300, batch=2)
    reference = reference_logits(model, ids, 4, 60)
    with StreamingDecoder(model, 4, 60) as decoder:
        for block_size in (None, 7, 64, 1000):
            decoder.reset()
            assert (decoder.prefill(ids[:, :200], block_size) - reference[:, 199]).abs().max() < 5e-6
            for t in range(200, 300):
                assert (decoder.step(ids[:, t]) - reference[:, t]).abs().max() < 5e-6
        assert decoder.cache_nbytes == decoder.cache.nbytes > 0
