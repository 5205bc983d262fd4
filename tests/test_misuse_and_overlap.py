"""What would be wrong without a sign is refused, and overlapping uses of models and caches keep apart."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import make_ids, make_neox
from every_model import VOCAB, tiny_model
from reference import reference_logits
from streams import decode, forward_in_blocks, snapshot
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import StaticCache

from streaming_llm import StreamingDecoder, StreamingKVCache, StreamingLLMWrapper
from streaming_llm.attachment import maskless_attention
from streaming_llm.families import decoder_of


def test_a_moved_stream_leaves_nothing_behind():
    model, ids = make_neox(), make_ids(500)
    reference = reference_logits(model, ids, 4, 60)
    with StreamingDecoder(model, 4, 60) as decoder:
        for filled in (300, 100, 99):
            decoder.reset()
            decoder.prefill(ids[:, :filled])
            decoder.move_to(10_000_000)
            assert (decoder.step(ids[:, filled]) - reference[:, filled]).abs().max() < 2e-5
            decoder.move_to(filled + 1)
            assert (decoder.step(ids[:, filled + 1]) - reference[:, filled + 1]).abs().max() < 2e-5


@pytest.mark.parametrize("tokens", [1, 100])
def test_an_interrupted_forward_is_noticed(tokens):
    model, ids = make_neox(), make_ids(300)

    def fail(*args):
        raise MemoryError

    with StreamingLLMWrapper(model, 4, 60) as stream:
        cache = stream.new_cache()
        forward_in_blocks(model, cache, ids, (0, 100))
        handle = model.gpt_neox.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            forward_in_blocks(model, cache, ids, (100, 100 + tokens))
        handle.remove()
        for use in (
            lambda: decode(model, cache, ids[:, 100:101]),
            lambda: stream.prefill(ids[:, 100:], cache),
            lambda: cache.move_to(1000),
            lambda: cache.crop(-1),
            lambda: cache.batch_repeat_interleave(2),
            lambda: cache.take_rows([0], 1),
        ):
            with pytest.raises(RuntimeError, match="ended before its last layer"):
                use()
        cache.reset()
        assert (decode(model, cache, ids) - reference_logits(model, ids, 4, 60)).abs().max() < 5e-6


@pytest.mark.parametrize("case", ["jamba", "lfm2", "qwen3_next"])
def test_an_interruption_before_the_first_keys_is_noticed_where_layers_have_a_state(case):
    model, ids = tiny_model(case), make_ids(20, vocab=VOCAB)

    def fail(*args):
        raise KeyboardInterrupt

    with StreamingLLMWrapper(model, 4, 60) as stream:
        cache = stream.new_cache()
        stream.prefill(ids[:, :18], cache)
        with pytest.raises(ValueError, match="attention_mask hides"):  # before any layer
            model(ids[:, 18:19], past_key_values=cache, attention_mask=torch.tensor([[0] + [1] * 18]))
        expected = decode(model, copy.deepcopy(cache), ids[:, 18:])
        handle = decoder_of(model).layers[0].register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            decode(model, copied := copy.deepcopy(cache), ids[:, 18:])
        handle.remove()
        assert torch.equal(decode(model, cache, ids[:, 18:]), expected)
        with pytest.raises(RuntimeError, match="ended before its last layer"):
            decode(model, copied, ids[:, 18:])


def test_blocks_differentiate_with_math_and_refuse_with_flash():
    model, ids = make_neox(torch.float64), make_ids(200)
    weight = model.gpt_neox.layers[3].attention.query_key_value.weight  # the last layer: nothing cached depends on it
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction.view(4, 3, 16, 64)[:, 1:] = 0  # queries alone: keys and values are stored detached

    def loss():
        with StreamingLLMWrapper(model, 4, 60) as stream:
            return model(ids, past_key_values=stream.new_cache(), use_cache=True).logits.square().sum()

    loss().backward()
    slope = (weight.grad * direction).sum()
    with torch.no_grad():
        step = 1e-5
        weight += step * direction
        above = loss()
        weight -= 2 * step * direction
        below = loss()
    torch.testing.assert_close(slope, (above - below) / (2 * step), rtol=1e-5, atol=0)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(RuntimeError, match="no_grad"):
        loss()


def test_decoding_without_no_grad_keeps_no_graph():
    model, ids = make_neox(), make_ids(100)
    for n_sink in (0, 4):
        cache = StreamingKVCache(model.config, n_sink, 20)
        for t in range(100):
            logits = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits
        assert logits.requires_grad
        assert not cache.layers[0].keys.requires_grad


@pytest.mark.parametrize(
    "arguments",
    [
        {"attention_mask": torch.ones(1, 1, 50, 50, dtype=torch.bool).tril()},
        {"position_ids": torch.cat((torch.arange(20), torch.arange(30)))[None]},  # two documents in a row
    ],
)
def test_masks_that_attention_would_need_are_refused(arguments):
    model, ids = make_neox(), make_ids(50)
    model(ids, use_cache=False, **arguments)
    with StreamingLLMWrapper(model, 4, 60), pytest.raises(ValueError, match="mask"):
        model(ids, use_cache=False, **arguments)


def test_static_caches_are_refused():
    model, ids = make_neox(), make_ids(50)
    cache = StaticCache(config=model.config, max_cache_len=100)
    with StreamingLLMWrapper(model, 4, 60), pytest.raises(ValueError, match="static cache"):
        model(ids, past_key_values=cache, use_cache=True)


def test_maskless_forwards_never_look_at_values():
    model, ids = make_neox(), make_ids(50)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        with maskless_attention(model), torch.profiler.profile() as profile:
            logits = model(ids, use_cache=False).logits
    assert torch.equal(logits, expected)
    assert not {event.key for event in profile.key_averages()} & {"aten::is_nonzero", "aten::item"}


def test_a_bare_cache_inside_the_wrapper_is_exact_and_takes_blocks():
    model, ids = make_neox(), make_ids(500)
    reference = reference_logits(model, ids, 4, 60)
    cache = StreamingKVCache(model.config, 4, 60)
    decode(model, cache, ids[:, :100])
    with StreamingLLMWrapper(model, 4, 60):
        logits = forward_in_blocks(model, cache, ids, (100, 300))
        assert (logits - reference[:, 100:300]).abs().max() < 5e-6
        cache.move_to(10_000_000)
        assert (decode(model, cache, ids[:, 300:]) - reference[:, 300:]).abs().max() < 2e-5


def test_a_cache_outlives_the_wrapper_and_works_in_the_next():
    model, ids = make_neox(), make_ids(300)
    with StreamingLLMWrapper(model, 4, 60) as stream:
        cache = stream.new_cache()
        parts = [forward_in_blocks(model, cache, ids, (0, 120))]
    parts.append(decode(model, cache, ids[:, 120:140]))  # a bare cache meanwhile
    with StreamingLLMWrapper(model, 4, 60):
        parts.append(forward_in_blocks(model, cache, ids, (140, 300)))
    assert (torch.cat(parts, dim=1) - reference_logits(model, ids, 4, 60)).abs().max() < 5e-6


def test_copies_of_a_cache_go_their_own_ways():
    model, ids = make_neox(), make_ids(300)
    reference = reference_logits(model, ids, 4, 60)
    with StreamingLLMWrapper(model, 4, 60) as stream:
        cache = stream.new_cache()
        forward_in_blocks(model, cache, ids, (0, 200))
        other = copy.deepcopy(cache)
        decode(model, cache, make_ids(50, seed=8))
        logits = forward_in_blocks(model, other, ids, (200, 201, 300))
    assert (logits - reference[:, 200:]).abs().max() < 5e-6
    stored = StreamingKVCache(model.config, 4, 60)
    decode(model, stored, ids[:, :200])
    loaded = pickle.loads(pickle.dumps(stored))
    assert (decode(model, loaded, ids[:, 200:]) - reference[:, 200:]).abs().max() < 5e-6


def test_models_that_share_a_configuration_are_kept_apart():
    model = make_neox()
    other = type(model)(model.config).eval()
    ids, before = make_ids(200), snapshot(model)
    first, second = StreamingLLMWrapper(model, 4, 60), StreamingLLMWrapper(other, 4, 60)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    logits = forward_in_blocks(other, second.new_cache(), ids, (0, 200))
    assert (logits - reference_logits(other, ids, 4, 60)).abs().max() < 5e-6
    second.__exit__(None, None, None)
    assert snapshot(model) == before


def test_maskless_attention_may_end_before_a_decoder():
    model, ids = make_neox(), make_ids(200)
    before = snapshot(model)
    maskless = maskless_attention(model)
    maskless.__enter__()
    decoder = StreamingDecoder(model, 4, 60)
    maskless.__exit__(None, None, None)
    reference = reference_logits(model, ids, 4, 60)
    assert (decoder.prefill(ids) - reference[:, -1]).abs().max() < 5e-6
    decoder.close()
    assert snapshot(model) == before


def test_a_cache_filled_in_inference_mode_is_usable_outside():
    model, ids = make_neox(), make_ids(200)
    with StreamingDecoder(model, 4, 60) as decoder:
        with torch.inference_mode():
            decoder.prefill(ids[:, :100])
            decoder.step(ids[:, 100])
        reference = reference_logits(model, ids, 4, 60)
        for t in range(101, 200):
            assert (decoder.step(ids[:, t]) - reference[:, t]).abs().max() < 5e-6


def test_a_reset_decoder_takes_another_batch_size():
    model = make_neox()
    with StreamingDecoder(model, 4, 60) as decoder:
        decoder.prefill(make_ids(100))
        decoder.reset()
        assert decoder.prefill(make_ids(100, batch=3)).shape == (3, 101)
        with pytest.raises(ValueError, match=r"\[batch\]"):
            decoder.step(make_ids(1))


def test_the_switch_of_angles_is_noticed_again_and_again():
    model, ids = make_neox().bfloat16(), make_ids(400)
    cache = StreamingKVCache(model.config, 4, 60)
    if "cache_kwargs" not in type(model.gpt_neox.layers[0].attention).forward.__code__.co_varnames:
        pytest.skip("this Transformers hands a cache no angles")
    with pytest.raises(ValueError, match="half precision"):
        decode(model, cache, ids)
    seen = cache.get_seq_length()
    with pytest.raises(ValueError, match="half precision"):
        decode(model, cache, ids[:, seen : seen + 1])


def test_dropout_in_a_block_is_refused():
    model, ids = make_neox(attention="eager", attention_dropout=0.5).train(), make_ids(100)
    with StreamingLLMWrapper(model, 4, 60) as stream, torch.no_grad(), pytest.raises(ValueError, match="eval"):
        model(ids, past_key_values=stream.new_cache(), use_cache=True)
