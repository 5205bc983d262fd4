"""generate() on a stream, in the wrapper and with a bare cache: every way of decoding, turn after turn."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from conftest import GPU, make_ids, make_neox
from reference import reference_logits
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from personal_adapters.neox_flash import wrap_attention
from streaming_llm import StreamingDecoder, StreamingKVCache, StreamingLLMWrapper
from streaming_llm.sinks import MAX_POSITIONS_AHEAD

SINKS, WINDOW = 4, 30
GREEDY = {"do_sample": False, "max_new_tokens": 40}
SAMPLE = {"do_sample": True, "top_k": 0, "max_new_tokens": 40}
PROMPTS = [1, 20, 34, 35, 36, 150]


def small(**changes):
    return make_neox(**{"num_hidden_layers": 2, **changes})


def reference_log_probs(model, ids: torch.Tensor) -> torch.Tensor:
    """Log probability of each id but the first, ``[batch, length - 1]``, float64."""
    log_probs = reference_logits(model, ids, SINKS, WINDOW)[:, :-1].log_softmax(-1)
    return log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1)


def is_greedy(model, ids: torch.Tensor, n_given: int) -> bool:
    """Whether every id from ``n_given`` on is the likeliest."""
    likeliest = reference_logits(model, ids, SINKS, WINDOW).argmax(-1)
    return torch.equal(ids[:, n_given:], likeliest[:, n_given - 1 : -1])


@pytest.fixture
def stream():
    with StreamingLLMWrapper(small(), SINKS, WINDOW) as stream:
        yield stream


# Ways of decoding


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy(stream, prompt):
    ids = make_ids(prompt, batch=2)
    assert is_greedy(stream.model, stream.generate(ids, **GREEDY), prompt)


@pytest.mark.parametrize("prompt", [20, 150])
@pytest.mark.parametrize("batch", [1, 3])
def test_sampling_gives_the_text_of_the_token_loop(stream, prompt, batch):
    ids = make_ids(prompt, batch)
    torch.manual_seed(5)
    out = stream.generate(ids, temperature=0.8, top_p=0.9, **SAMPLE)

    torch.manual_seed(5)
    looped = [ids]
    with StreamingDecoder(stream.model, SINKS, WINDOW) as decoder, torch.no_grad():
        for token in ids.T:
            logits = decoder.step(token)
        for _ in range(SAMPLE["max_new_tokens"]):
            probs, order = (logits / 0.8).softmax(-1).sort(-1)
            probs[probs.cumsum(-1) <= 1 - 0.9] = 0
            scattered = torch.zeros_like(probs).scatter(-1, order, probs)
            token = torch.multinomial(scattered / scattered.sum(-1, keepdim=True), 1)[:, 0]
            looped.append(token[:, None])
            logits = decoder.step(token)
    assert torch.equal(out, torch.cat(looped, dim=1))


@pytest.mark.parametrize("prompt", [20, 150])
def test_returned_logits_are_those_of_the_reference(stream, prompt):
    ids = make_ids(prompt)
    out = stream.generate(
        ids, num_return_sequences=3, output_logits=True, output_scores=True, return_dict_in_generate=True, **SAMPLE
    )
    assert out.sequences.shape == (3, prompt + 40)
    assert len(out.sequences.unique(dim=0)) == 3
    reference = reference_logits(stream.model, out.sequences, SINKS, WINDOW)[:, prompt - 1 : -1]
    assert (torch.stack(out.logits, dim=1) - reference).abs().max() < 5e-6
    assert torch.equal(torch.stack(out.scores), torch.stack(out.logits))
    assert type(out.past_key_values) is StreamingKVCache
    assert out.past_key_values.get_seq_length() == prompt + 39


BEAMS = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0, "top_k": 0, "max_new_tokens": 30}
SCORED = {"return_dict_in_generate": True, "output_scores": True}


@pytest.mark.parametrize("prompt", [20, 150])
@pytest.mark.parametrize("do_sample", [False, True])
def test_every_beam_is_a_stream_of_its_own(stream, prompt, do_sample):
    out = stream.generate(make_ids(prompt, batch=2), do_sample=do_sample, **BEAMS, **SCORED)
    assert out.sequences.shape == (4, prompt + 30)
    reference = reference_log_probs(stream.model, out.sequences)[:, prompt - 1 :].sum(-1)
    assert (out.sequences_scores - reference).abs().max() < 2e-4  # sums of 30 float32


def test_processors_and_criteria_see_the_ids(stream):
    class AtLength(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 160)

    seen = []

    def forbid_the_last(input_ids, scores):
        seen.append(input_ids.shape[1])
        return scores.scatter(-1, input_ids[:, -1:], -torch.inf)

    ids = make_ids(150)
    out = stream.generate(
        ids, logits_processor=[forbid_the_last], stopping_criteria=StoppingCriteriaList([AtLength()]), **GREEDY
    )
    assert seen == list(range(150, 160))
    assert out.shape == (1, 160)
    assert (out[:, 150:] != out[:, 149:-1]).all()
    assert stream.generate(ids, do_sample=False, max_length=155).shape == (1, 155)
    assert stream.generate(ids, generation_config=GenerationConfig(do_sample=False, max_new_tokens=7)).shape[1] == 157
    greedy = stream.generate(ids, **GREEDY)
    stopped = stream.generate(ids, eos_token_id=int(greedy[0, 160]), pad_token_id=0, **GREEDY)
    assert torch.equal(stopped, greedy[:, : stopped.shape[1]])
    assert stopped[0, -1] == greedy[0, 160]


class Collected(BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self):
        self.puts, self.ended = [], False

    def put(self, value):
        self.puts.append(value.flatten())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("prompt", [20, 150])
def test_streamers(stream, prompt):
    streamer = Collected()
    out = stream.generate(make_ids(prompt), streamer=streamer, **GREEDY)
    assert streamer.ended
    assert len(streamer.puts) == 41
    assert torch.equal(torch.cat(streamer.puts), out[0])


@pytest.mark.parametrize("prompt", [2, 20, 150])
def test_embeddings_instead_of_ids(stream, prompt):
    ids = make_ids(prompt, batch=2)
    embeddings = stream.model.get_input_embeddings()(ids)
    expected = stream.generate(ids, **GREEDY)[:, prompt:]
    assert torch.equal(stream.generate(inputs_embeds=embeddings, **GREEDY), expected)
    beams = {"num_beams": 2, **GREEDY}
    assert torch.equal(stream.generate(inputs_embeds=embeddings, **beams), stream.generate(ids, **beams)[:, prompt:])


def test_one_embedding_is_right_or_refused(stream):
    ids = make_ids(1)
    arguments = {"inputs_embeds": stream.model.get_input_embeddings()(ids), **GREEDY}
    if transformers.__version__ < "5":
        with pytest.raises(ValueError, match="two positions"):
            stream.generate(**arguments)
    else:
        assert torch.equal(stream.generate(**arguments), stream.generate(ids, **GREEDY)[:, 1:])


def test_nothing_to_start_from(stream):
    out = stream.generate(bos_token_id=3, **GREEDY)
    assert out[0, 0] == 3
    assert is_greedy(stream.model, out, 1)


def test_a_way_of_decoding_of_ones_own(stream):
    def every_second(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        cache = kwargs["past_key_values"]
        model(input_ids=input_ids[:, cache.get_seq_length() : -1], past_key_values=cache, use_cache=True)
        for _ in range(50):
            logits = model(input_ids=input_ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
            input_ids = torch.cat((input_ids, logits.topk(2).indices[:, 1:]), dim=1)
        return input_ids

    ids = make_ids(20)
    out = stream.generate(ids, custom_generate=every_second)
    reference = reference_logits(stream.model, out, SINKS, WINDOW).topk(2).indices[..., 1]
    assert torch.equal(out[:, 20:], reference[:, 19:-1])


# One stream, many calls


def test_many_turns_with_all_ids(stream):
    cache, ids, given = stream.new_cache(), make_ids(3), []
    for turn, length in enumerate((1, 50, 2, 100, 1, 1)):
        ids = torch.cat((ids, make_ids(length, seed=turn)), dim=1)
        given.append(ids.shape[1])
        ids = stream.generate(ids, past_key_values=cache, attention_mask=torch.ones_like(ids), **GREEDY)
        assert cache.get_seq_length() == ids.shape[1] - 1
    likeliest = reference_logits(stream.model, ids, SINKS, WINDOW).argmax(-1)
    for n in given:
        assert torch.equal(ids[:, n : n + 40], likeliest[:, n - 1 : n + 39])


@pytest.mark.parametrize("position", [None, 10_000_000])
@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("as_embeddings", [False, True])
def test_many_turns_with_new_ids_alone(stream, position, num_beams, as_embeddings):
    cache, parts = stream.new_cache(), []
    new = make_ids(3, batch=2)
    embed = stream.model.get_input_embeddings()
    lengths = []
    for turn, length in enumerate((1, 50, 2, 100, 1, 1, 0)[: 6 if as_embeddings else 7]):
        new = torch.cat((new, make_ids(length, batch=2, seed=turn)), dim=1)
        prompt = {"inputs_embeds": embed(new)} if as_embeddings else {"input_ids": new}
        out = stream.generate(**prompt, past_key_values=cache, continues=True, num_beams=num_beams, **GREEDY)
        if as_embeddings:
            out = torch.cat((new, out), dim=1)
        assert torch.equal(out[:, : new.shape[1]], new)
        lengths.append(new.shape[1])
        parts.append(out[:, :-1])
        new = out[:, -1:]
        assert cache.n_seen == sum(part.shape[1] for part in parts)
        if turn == 3 and position:
            cache.move_to(position)
    ids = torch.cat((*parts, new), dim=1)
    cut = 0
    reference = reference_logits(stream.model, ids, SINKS, WINDOW)
    for part, length in zip(parts, lengths, strict=True):
        if num_beams == 1:
            likeliest = reference[:, cut + length - 1 : cut + length + 39].argmax(-1)
            assert torch.equal(likeliest, ids[:, cut + length : cut + length + 40])
        cut += part.shape[1]
    with torch.no_grad():
        logits = stream(new, past_key_values=cache, use_cache=True).logits[:, -1]
    assert (logits - reference[:, -1]).abs().max() < 2e-5


def test_calls_in_pieces_are_one_long_call(stream):
    ids = make_ids(20, batch=2)
    whole = stream.generate(ids, do_sample=False, max_new_tokens=200)
    cache, pieces, new = stream.new_cache(), [], ids
    for _ in range(4):
        out = stream.generate(new, past_key_values=cache, continues=True, do_sample=False, max_new_tokens=50)
        pieces.append(out[:, new.shape[1] :])
        new = out[:, -1:]
    assert torch.equal(torch.cat((ids, *pieces), dim=1), whole)


@pytest.mark.parametrize("filled", [0, 25, 150])
@pytest.mark.parametrize("arguments", [{"num_beams": 3, **GREEDY}, {"num_return_sequences": 3, **SAMPLE}])
def test_a_cache_remains_that_of_the_prompt(stream, filled, arguments):
    cache, ids = stream.new_cache(), make_ids(filled + 60)
    if filled:
        stream.prefill(ids[:, :filled], cache)
    out = stream.generate(ids, past_key_values=cache, return_dict_in_generate=True, **arguments)
    assert out.past_key_values is not cache
    assert cache.get_seq_length() == filled + 59
    for chosen in out.sequences.split(1):
        branch = copy.deepcopy(cache)
        longer = stream.generate(chosen, past_key_values=branch, **GREEDY)
        assert is_greedy(stream.model, longer, chosen.shape[1])


# Drafted tokens

DRAFTS = {
    "prompt lookup": lambda: {"prompt_lookup_num_tokens": 5},
    "another model": lambda: {"assistant_model": small(seed=3, eos_token_id=100)},
    "a model like it": lambda: {"assistant_model": small(num_hidden_layers=1, eos_token_id=100)},
    "the same model": lambda: {"assistant_model": small(eos_token_id=100)},
}


@pytest.fixture
def drafting_stream():
    with StreamingLLMWrapper(small(eos_token_id=100), SINKS, WINDOW) as stream:  # Transformers asks for an end
        yield stream


@pytest.mark.parametrize("prompt", [1, 16, 32, 160])
@pytest.mark.parametrize("draft", DRAFTS)
def test_drafted_tokens_are_taken_back(drafting_stream, draft, prompt):
    stream, ids = drafting_stream, make_ids(8).repeat(1, 20)[:, :prompt]  # what follows a repetition is drafted
    arguments = {"do_sample": False, "max_new_tokens": 60}
    plain = stream.generate(ids, **arguments)
    cache = stream.new_cache()
    out = stream.generate(ids, past_key_values=cache, **arguments, **DRAFTS[draft]())
    n = plain.shape[1]
    assert torch.equal(out[:, :n], plain)
    assert out.shape[1] - n <= 1  # some versions add one
    assert cache.get_seq_length() == out.shape[1] - 1
    if draft == "prompt lookup":
        more = stream.generate(out[:, -1:], past_key_values=cache, continues=True, **arguments, **DRAFTS[draft]())
        assert torch.equal(more[:, :50], stream.generate(out, **arguments)[:, n - 1 :][:, :50])


def test_drafts_longer_than_the_window_are_refused(drafting_stream):
    stream, ids = drafting_stream, make_ids(8, vocab=100).repeat(1, 20)
    with pytest.raises(ValueError, match="window of 30"):
        stream.generate(ids, prompt_lookup_num_tokens=40, do_sample=False, max_new_tokens=100)
    embeddings = stream.model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="inputs_embeds"):
        stream.generate(inputs_embeds=embeddings, prompt_lookup_num_tokens=4, **GREEDY)


def test_sampling_with_drafts_keeps_to_the_model(drafting_stream):
    """At a temperature near zero, sampled drafts are judged as greedy ones are."""
    stream, ids = drafting_stream, make_ids(60)
    arguments = {"do_sample": True, "temperature": 1e-4, "top_k": 0, "max_new_tokens": 60}
    out = stream.generate(ids, assistant_model=small(seed=3, eos_token_id=100), **arguments)
    n = min(out.shape[1], 120)
    assert is_greedy(stream.model, out[:, :n], 60)


# What is refused


def test_ids_of_padding_are_tokens_where_no_mask_is_given(stream):
    ids = make_ids(20, batch=2).clamp(min=1)
    ids[0, :3] = 0
    out = stream.generate(ids, pad_token_id=0, **GREEDY)
    assert torch.equal(out, stream.generate(ids, pad_token_id=0, attention_mask=torch.ones_like(ids), **GREEDY))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="hides tokens"):
        stream.model.generate(
            ids, attention_mask=mask, past_key_values=StreamingKVCache(stream.model.config, SINKS, WINDOW), **GREEDY
        )


REFUSED = {
    "position_ids": ({"position_ids": torch.arange(50)[None]}, "position_ids"),
    "chunks": ({"prefill_chunk_size": 10}, "prefill_chunk_size=10"),
    "no cache": ({"generation_config": GenerationConfig(use_cache=False)}, "use_cache=False"),
    "no cache here": ({"use_cache": False}, "use_cache"),
    "a cache that forgets nothing": ({"past_key_values": DynamicCache()}, "DynamicCache"),
    "a longer mask": ({"attention_mask": torch.ones(1, 90)}, "covers 90 tokens"),
    "sequences": ({"continues": True, "num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2"),
    "contrastive search": ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
    "guidance": ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
    "another cache": ({"cache_implementation": "static"}, "cache_implementation"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_would_not_stream_are_refused(stream, case):
    arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        stream.generate(make_ids(50), **arguments)


def test_ids_that_do_not_go_on_are_refused(stream):
    cache, ids = stream.new_cache(), make_ids(50)
    out = stream.generate(ids, past_key_values=cache, **GREEDY)
    for arguments in ({}, {"continues": True}):
        with pytest.raises(ValueError, match="no ids were given"):
            stream.generate(past_key_values=cache, **arguments)
    with pytest.raises(ValueError, match="continues=True"):
        stream.generate(out[:, -1:], past_key_values=cache)
    with pytest.raises(ValueError, match="at least one"):
        stream.generate(ids[:, :0], past_key_values=cache, continues=True)
    with pytest.raises(ValueError, match="at least one more"):
        stream.generate(out[:, :-1], past_key_values=cache)
    with pytest.raises(ValueError, match="1 streams"):
        stream.generate(make_ids(5, batch=2), past_key_values=cache, continues=True, **GREEDY)


def test_an_error_leaves_no_hook_behind(stream):
    def fail(*args):
        raise ZeroDivisionError

    cache, ids = stream.new_cache(), make_ids(50)
    with pytest.raises(ZeroDivisionError):
        stream.generate(ids, past_key_values=cache, logits_processor=[fail], **GREEDY)
    assert not stream.model._forward_hooks
    assert not stream.model._forward_pre_hooks
    assert is_greedy(stream.model, stream.generate(torch.cat((ids, ids), 1), past_key_values=cache, **GREEDY), 100)


# A bare cache


def test_a_bare_cache_takes_drafts_back_while_it_fills():
    model, ids = small(eos_token_id=100), make_ids(8, vocab=100).repeat(1, 4)
    cache = StreamingKVCache(model.config, SINKS, 100)
    arguments = {**GREEDY, "prompt_lookup_num_tokens": 5}
    out = model.generate(ids, past_key_values=cache, **arguments)
    assert torch.equal(out[:, :72], model.generate(ids, **GREEDY))  # nothing has been evicted
    with pytest.raises(ValueError, match=r"has evicted|StreamingLLMWrapper"):
        model.generate(out, past_key_values=cache, **arguments | {"max_new_tokens": 100})


@pytest.mark.parametrize("arguments", [GREEDY, SAMPLE, {"do_sample": True, **BEAMS}, {"do_sample": False, **BEAMS}])
def test_a_bare_cache_generates_what_the_wrapper_does(stream, arguments):
    model, ids = small(), make_ids(30, batch=2)
    torch.manual_seed(0)
    bare = model.generate(ids, past_key_values=StreamingKVCache(model.config, SINKS, WINDOW), **arguments)
    torch.manual_seed(0)
    assert torch.equal(bare, stream.generate(ids, **arguments))


def test_a_bare_cache_goes_on_and_streams():
    model, streamer = small(), Collected()
    cache = StreamingKVCache(model.config, SINKS, WINDOW)
    out = model.generate(make_ids(30), past_key_values=cache, **GREEDY)
    out = model.generate(out, past_key_values=cache, streamer=streamer, **GREEDY)  # goes on with the one token unseen
    assert out.shape == (1, 110)
    assert is_greedy(model, out, 30)
    assert torch.equal(torch.cat(streamer.puts), out[0])
    with pytest.raises(ValueError, match="StreamingLLMWrapper"):
        model.generate(torch.cat((out, out), dim=1), past_key_values=cache, **GREEDY)


# CUDA


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "dtype"), [("math", torch.float32), ("flash", torch.bfloat16)])
@pytest.mark.parametrize("prompt", [20, 150])
def test_on_cuda_no_mask_reaches_the_kernel(backend, dtype, prompt):
    model = small(dtype=dtype, eos_token_id=100).to(GPU)
    wrap_attention(model, backend)
    ids = make_ids(prompt, vocab=100).to(GPU)
    with StreamingLLMWrapper(model, SINKS, WINDOW) as stream:
        greedy = stream.generate(ids, **GREEDY)
        if backend == "math":
            assert is_greedy(small(eos_token_id=100), greedy.cpu(), prompt)
        for arguments in (BEAMS, SAMPLE, {"prompt_lookup_num_tokens": 5, **GREEDY}):
            assert stream.generate(ids, **arguments).shape[1] > prompt
        cache = stream.new_cache()
        out = stream.generate(ids, past_key_values=cache, **GREEDY)
        out = stream.generate(torch.cat((out[:, -1:], ids), dim=1), past_key_values=cache, continues=True, **GREEDY)
        assert out.shape[1] > prompt + 1


# Memory


class Allocations(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes, and of all of them."""

    def __init__(self):
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                self.total += tensor.numel()
        return out


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_long_prompt_needs_no_memory_of_its_square(attention):
    model = small(attention=attention)
    largest = []
    for prompt in (1000, 4000):
        with StreamingLLMWrapper(model, SINKS, WINDOW) as stream, Allocations() as mode:
            stream.generate(make_ids(prompt), do_sample=False, max_new_tokens=3)
        largest.append(mode.largest)
    assert largest[0] == largest[1] < 4000 * 64


def test_a_stream_in_calls_of_one_length_costs_the_same_for_ever(stream):
    cache, costs = stream.new_cache(), []
    new = make_ids(1)
    call = {**GREEDY, "max_new_tokens": 2 * MAX_POSITIONS_AHEAD}  # sinks are moved for so many positions at a time
    for _ in range(5):
        with Allocations() as mode:
            out = stream.generate(new, past_key_values=cache, continues=True, **call)
        costs.append((mode.largest, mode.total))
        new = out[:, -1:]
    assert costs[0] != costs[2]  # the cache was filling
    assert costs[2] == costs[3] == costs[4]
