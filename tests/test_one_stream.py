"""A stream is one thing: whatever a model, a caller or a library does around it is right, or an error that says so."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from conftest import make_ids, make_neox
from family_models import HERE, POSITIONS, VOCAB, make_family
from reference import reference_logits
from transformers import AutoModelForCausalLM, Phi3Config

from personal_adapters.neox_flash import wrap_attention
from streaming_llm import StreamingDecoder, StreamingKVCache, StreamingLLMWrapper, score_stream

GREEDY = {"do_sample": False, "eos_token_id": None}


@pytest.fixture
def stream():
    with StreamingLLMWrapper(make_neox(), 4, 30) as stream:
        yield stream


# Every forward goes through the stream's cache


def test_phi3_generates_past_its_original_length_from_the_stream():
    """Its preparation of inputs drops the cache there (huggingface/transformers#33129 is of the kind)."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    lengths = {"max_position_embeddings": 64, "original_max_position_embeddings": 64}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = Phi3Config(vocab_size=300, num_key_value_heads=2, initializer_range=0.2, **sizes, **lengths, **ids)
    model, prompt = AutoModelForCausalLM.from_config(config).eval(), torch.randint(3, 300, (1, 30))
    with StreamingLLMWrapper(model, 4, 20) as stream:
        cache = stream.new_cache()
        out = stream.generate(
            prompt, past_key_values=cache, max_new_tokens=300, return_dict_in_generate=True, **GREEDY
        )
    assert cache.n_seen == 329
    assert out.past_key_values is cache
    with StreamingDecoder(model, 4, 20) as decoder:
        decoder.prefill(prompt)
        assert torch.equal(decoder.generate(300, temperature=0), out.sequences[:, 30:])


@pytest.mark.parametrize("case", HERE)
def test_every_token_passes_through_the_cache(case):
    """In all families and by all ways in, past the positions that a model was made for."""
    model, ids = make_family(case), torch.randint(VOCAB, (1, 30), generator=torch.Generator().manual_seed(1))
    with StreamingLLMWrapper(model, 4, 20) as stream:
        cache = stream.new_cache()
        out = stream.generate(
            ids, past_key_values=cache, max_new_tokens=POSITIONS, return_dict_in_generate=True, **GREEDY
        )
        assert out.past_key_values is cache
        assert cache.n_seen == 30 + POSITIONS - 1
        with torch.no_grad():
            stream(ids, past_key_values=cache, use_cache=False)
        assert cache.n_seen == 60 + POSITIONS - 1
        stream.prefill(ids, cache)
        assert cache.n_seen == 90 + POSITIONS - 1
    with StreamingDecoder(model, 4, 20) as decoder:
        decoder.prefill(ids)
        assert torch.equal(decoder.generate(POSITIONS, temperature=0), out.sequences[:, 30:])
        assert decoder.cache.n_seen == 30 + POSITIONS


def test_a_forward_without_the_cache_is_an_error(stream):
    """A decoder that leaves its cache out: what it computes would be of no stream."""
    cache, decoder = stream.new_cache(), stream.model.gpt_neox
    layers, decoder.layers = decoder.layers, torch.nn.ModuleList()
    with torch.no_grad(), pytest.raises(RuntimeError, match="without the stream's cache"):
        stream(make_ids(5), past_key_values=cache)
    decoder.layers = layers
    with torch.no_grad():
        assert stream(make_ids(5), past_key_values=cache).logits.isfinite().all()


def test_a_refused_call_leaves_the_cache_as_it_was(stream):
    prompt, cache = make_ids(120), stream.new_cache()
    for wrong in (
        {"attention_mask": torch.ones(1, 90)},
        {"max_new_tokens": 0},
        {"logits_processor": 3},
        {"generation_config": 7},
        {"no_such_argument": 1},
        {"penalty_alpha": 0.5, "top_k": 4},
    ):
        with pytest.raises((ValueError, TypeError, AttributeError)):
            stream.generate(prompt, past_key_values=cache, **({"max_new_tokens": 5} | wrong))
        assert cache.n_seen == 0
    out = stream.generate(prompt, past_key_values=cache, max_new_tokens=5, **GREEDY)
    assert torch.equal(out[0, 120:], reference_logits(stream.model, out, 4, 30).argmax(-1)[0, 119:-1])


def test_ids_of_padding_in_a_continued_prompt(stream):
    """A row that has ended is filled with padding, which is then of its stream: no mask is guessed from it."""
    cache = stream.new_cache()
    ids = torch.cat((make_ids(40, batch=2), torch.zeros(2, 5, dtype=torch.int64)), dim=1)
    out = stream.generate(ids, past_key_values=cache, max_new_tokens=5, pad_token_id=0, **GREEDY)
    longer = torch.cat((out, torch.zeros(2, 3, dtype=torch.int64)), dim=1)
    out = stream.generate(longer, past_key_values=cache, max_new_tokens=5, pad_token_id=0, **GREEDY)
    assert torch.equal(out[:, 53:], reference_logits(stream.model, out, 4, 30).argmax(-1)[:, 52:-1])


def test_leaving_out_the_token_that_was_not_fed_is_an_error(stream, tmp_path):
    cache, turn = stream.new_cache(), make_ids(10, seed=4)
    first = stream.generate(make_ids(50), past_key_values=cache, max_new_tokens=10, **GREEDY)
    turn[0, 0] = (first[0, -1] + 1) % 101
    cache.save(tmp_path / "stream.safetensors")
    for continued in (cache, StreamingKVCache.load(tmp_path / "stream.safetensors", stream.model)):
        with pytest.raises(ValueError, match="begin with the last token of the previous result"):
            stream.generate(turn, past_key_values=continued, continues=True, max_new_tokens=5)
        assert continued.n_seen == 59
    whole = torch.cat((first[:, -1:], turn), dim=1)
    out = stream.generate(whole, past_key_values=cache, continues=True, max_new_tokens=5, **GREEDY)
    everything = torch.cat((first, out[:, 1:]), dim=1)
    right = reference_logits(stream.model, everything, 4, 30).argmax(-1)
    assert torch.equal(everything[:, 70:], right[:, 69:-1])


# The decoder owns its stream


def test_a_decoder_whose_cache_was_changed_has_no_old_logits(tmp_path):
    model = make_neox()
    with StreamingDecoder(model, 4, 30) as decoder:
        decoder.prefill(make_ids(100))
        decoder.generate(20, seed=0)
        state = copy.deepcopy(decoder.cache.state())
        decoder.prefill(make_ids(50, seed=3))
        for change in (
            lambda: decoder.cache.restore(state, device="cpu"),
            decoder.cache.reset,
            lambda: decoder.cache.batch_repeat_interleave(2),
        ):
            change()
            for call in (
                lambda: decoder.generate(5),
                lambda: decoder.score(make_ids(5, decoder.cache.batch_size)),
                lambda: decoder.logits,
            ):
                with pytest.raises(RuntimeError, match="changed since the last token"):
                    call()
            decoder.reset()
            decoder.prefill(make_ids(50, seed=3))


@pytest.mark.parametrize("fed", [20, 200])
def test_a_saved_decoder_goes_on_with_the_same_bits(tmp_path, fed):
    model, path = make_neox(), tmp_path / "stream.safetensors"
    with StreamingDecoder(model, 4, 30) as decoder:
        decoder.prefill(make_ids(fed))
        decoder.generate(7, temperature=0.9, top_p=0.9, seed=5)
        decoder.save(path, {"who": "a test"})
        expected = decoder.generate(50, temperature=0.9, top_p=0.9)
        decoder.restore(decoder.state())  # where it is
        again = decoder.generate(3, temperature=0)
    with StreamingDecoder.load(path, model) as decoder:
        assert decoder.cache.n_seen == fed + 7
        assert torch.equal(decoder.generate(50, temperature=0.9, top_p=0.9), expected)
        assert torch.equal(decoder.generate(3, temperature=0), again)


def test_a_decoder_goes_on_with_a_saved_cache_after_a_token(tmp_path):
    model, ids, path = make_neox(), make_ids(60), tmp_path / "stream.safetensors"
    cache = StreamingKVCache.from_model(model, 4, 30)
    with StreamingLLMWrapper(model, 4, 30) as stream:
        stream.prefill(ids[:, :50], cache)
    cache.save(path)
    with StreamingDecoder.load(path, model) as decoder:
        with pytest.raises(RuntimeError, match="call prefill"):
            decoder.generate(5)
        logits = decoder.prefill(ids[:, 50:])
    assert (logits - reference_logits(model, ids, 4, 30)[:, -1]).abs().max() < 5e-6


def test_a_cache_kept_from_the_decoder_is_up_to_date(tmp_path):
    model = make_neox()
    with StreamingDecoder(model, 4, 30) as decoder:
        kept = decoder.cache
        decoder.prefill(make_ids(10))
        decoder.generate(1000, temperature=0)
        assert kept.get_seq_length() == kept.state().facts["n_seen"] == 1010


@pytest.mark.parametrize("case", [case for case in ("mistral", "gemma3", "llama") if case in HERE])
def test_the_rule_of_the_stream_outlives_every_change_of_rows(case):
    model, changes = make_family(case), {"sliding_window": 16} if case == "mistral" else {}
    model = make_family(case, **changes)
    ids = torch.randint(VOCAB, (2, 120), generator=torch.Generator().manual_seed(1))
    with StreamingLLMWrapper(model, 4, 16) as stream, torch.no_grad():
        one, other = stream.new_cache(), stream.new_cache()
        for cache in (one, other):
            stream.prefill(ids[:, :60], cache)
        for t in range(60, 120):
            if t % 20 == 0:
                other.batch_select_indices(torch.tensor([0, 1]))
                other.reorder_cache(torch.tensor([1, 0]))
                other.reorder_cache(torch.tensor([1, 0]))
            logits = [stream(ids[:, t : t + 1], past_key_values=cache).logits for cache in (one, other)]
            torch.testing.assert_close(*logits, rtol=0, atol=1e-6)


# What stands around the model


def test_a_copy_of_a_streaming_model_is_a_plain_one(stream):
    twin = copy.deepcopy(stream.model)
    assert twin.config._attn_implementation == "sdpa"
    assert type(twin.gpt_neox.rotary_emb) is type(make_neox().gpt_neox.rotary_emb)
    ids = make_ids(100)
    with StreamingLLMWrapper(twin, 4, 30) as other:
        right = stream.generate(ids, max_new_tokens=20, **GREEDY)
        assert torch.equal(other.generate(ids, max_new_tokens=20, **GREEDY), right)


def test_caches_that_are_none_are_named(stream):
    keys = torch.zeros(1, 4, 3, 16)
    for call in (
        lambda old: stream(make_ids(3), past_key_values=old),
        lambda old: stream.generate(make_ids(3), past_key_values=old),
    ):
        with pytest.raises(ValueError, match=r"past_key_values .*StreamingKVCache"):
            call(((keys, keys),))


def test_a_static_cache_in_the_models_settings_is_no_conflict(stream):
    plain = stream.generate(make_ids(20), max_new_tokens=5, **GREEDY)
    stream.model.generation_config.cache_implementation = "static"
    assert torch.equal(stream.generate(make_ids(20), max_new_tokens=5, **GREEDY), plain)
    with pytest.raises(ValueError, match="cache_implementation='static' asks for another cache"):
        stream.generate(make_ids(20), max_new_tokens=5, cache_implementation="static")


@pytest.mark.parametrize("first", [True, False])
def test_autocast_in_a_part_of_a_stream_is_named(stream, first):
    cache, ids = stream.new_cache(), make_ids(50)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16, enabled=first):
            stream(ids, past_key_values=cache)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=not first),
            pytest.raises(ValueError, match="under the same autocast"),
        ):
            stream(ids[:, :1], past_key_values=cache)
        assert cache.n_seen == 50
        with torch.autocast("cpu", torch.bfloat16, enabled=first):
            assert stream(ids[:, :1], past_key_values=cache).logits.isfinite().all()


def test_an_offloaded_model_streams():
    accelerate = pytest.importorskip("accelerate")
    model, ids = make_neox(), make_ids(100)
    with StreamingDecoder(model, 4, 30) as decoder:
        logits, tokens = decoder.prefill(ids), decoder.generate(20, temperature=0)
    losses = score_stream(model, ids, 4, 30)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    with StreamingDecoder(model, 4, 30) as decoder:
        assert decoder.engine == "eager"
        assert torch.equal(decoder.prefill(ids), logits)
        assert torch.equal(decoder.generate(20, temperature=0), tokens)
    with StreamingLLMWrapper(model, 4, 30) as stream:
        out = stream.generate(ids, max_new_tokens=20, **GREEDY)
    assert torch.equal(out[:, 100:], tokens)
    assert torch.equal(score_stream(model, ids, 4, 30), losses)


def test_threads_with_different_kernels_leave_all_kernels_allowed():
    flags = (
        torch.backends.cuda.math_sdp_enabled,
        torch.backends.cuda.flash_sdp_enabled,
        torch.backends.cuda.mem_efficient_sdp_enabled,
        torch.backends.cuda.cudnn_sdp_enabled,
    )
    before, ids, results = [flag() for flag in flags], make_ids(60), {}
    models = {kernel: make_neox(torch.bfloat16) for kernel in ("math", "flash")}

    def work(kernel: str) -> None:
        with StreamingLLMWrapper(models[kernel], 4, 30) as stream, torch.no_grad():
            losses = [stream(ids, past_key_values=stream.new_cache()).logits for _ in range(10)]
        results[kernel] = torch.stack(losses)

    for kernel, model in models.items():
        wrap_attention(model, kernel)
        work(kernel)
    alone, threads = dict(results), [threading.Thread(target=work, args=(kernel,)) for kernel in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [flag() for flag in flags] == before
    assert not torch.equal(alone["math"], alone["flash"])
    for kernel in models:
        assert torch.equal(results[kernel], alone[kernel]), kernel
