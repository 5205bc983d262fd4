"""Batches of unequal prompts: a row gives in a batch what it gives alone, whatever the padding and the other rows."""

from __future__ import annotations

import functools

import pytest
import torch
from every_model import tiny_model
from family_models import VOCAB, make_family
from family_reference import family_reference_logits
from streams import Ends, padded
from transformers import StoppingCriteriaList
from unequal_prompts import CASES, GREEDY, LENGTHS, LOGITS, SIDES, S, W, batch, check_ended_rows, each_alone, prompt

from streaming_llm import StreamingDecoder, StreamingKVCache, StreamingLLMWrapper, score_stream

NEW = 200
TOLERANCE = 2e-5


@functools.cache
def alone(case: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return each_alone(make_family(case), NEW)


@pytest.mark.parametrize("case", CASES)
def test_what_a_row_gives_alone_is_right(case):
    tokens, logits = alone(case)
    for row in range(len(LENGTHS)):
        ids = torch.cat((prompt(row), tokens[row][None]), dim=1)
        reference = family_reference_logits(make_family(case), ids, S, W)[0, LENGTHS[row] - 1 : -1]
        assert (logits[row] - reference).abs().max() < TOLERANCE


def test_a_prompt_shorter_than_the_sinks_beside_one_longer_than_the_cache():
    """The row's sinks come one by one, while those of the other row turn already."""
    model, lengths = make_family("gpt_neox"), (1, 100)
    ids = torch.randint(VOCAB, (2, 130), generator=torch.Generator().manual_seed(9))
    exact = family_reference_logits(model, ids, S, W)
    prompts, mask = padded([row[None, :n] for row, n in zip(ids, lengths, strict=True)], "right")
    with StreamingDecoder(model, S, W, "eager") as decoder:
        decoder.prefill(prompts, attention_mask=mask)
        for t in range(30):
            at = torch.tensor(lengths) + t
            assert (decoder.step(ids[[0, 1], at]) - exact[[0, 1], at]).abs().max() < TOLERANCE, t


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("case", CASES)
def test_generate(case, side):
    model, (ids, mask) = make_family(case), batch(side)
    with StreamingLLMWrapper(model, S, W) as stream:
        out = stream.generate(ids, attention_mask=mask, max_new_tokens=NEW, **LOGITS, **GREEDY)
    tokens, logits = alone(case)
    for row in range(len(LENGTHS)):
        given = torch.stack([step[row] for step in out.logits])
        assert (given - logits[row]).abs().max() < TOLERANCE
        assert torch.equal(out.sequences[row, ids.shape[1] :], tokens[row])
    assert isinstance(out.past_key_values, StreamingKVCache)
    assert out.past_key_values.progress.seen == tuple(n + NEW - 1 for n in LENGTHS)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("case", CASES)
def test_the_decoder_far_into_the_streams_and_saved(case, side, tmp_path):
    model, (ids, mask) = make_family(case), batch(side)
    tokens, logits = alone(case)
    with StreamingDecoder(model, S, W) as decoder:
        given = [decoder.prefill(ids, attention_mask=mask)]
        for t in range(100):
            given.append(decoder.step(torch.stack([row[t] for row in tokens])))
            if t == 30:
                decoder.move_to(10_000_000)
        decoder.save(tmp_path / "streams.safetensors")
    with StreamingDecoder.load(tmp_path / "streams.safetensors", model) as decoder:
        assert torch.equal(decoder.logits, given[-1])
        for t in range(100, NEW - 1):
            given.append(decoder.step(torch.stack([row[t] for row in tokens])))
        assert decoder.cache.get_seq_length() == 10_000_000 + NEW - 1 - 31
    for row in range(len(LENGTHS)):
        assert (torch.stack([step[row] for step in given]) - logits[row]).abs().max() < TOLERANCE


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("block_size", [None, 23])
def test_losses_and_zeros_at_padding(side, block_size):
    model, (ids, mask) = make_family("llama"), batch(side)
    losses = score_stream(model, ids, S, W, block_size, attention_mask=mask)
    assert losses.shape == (3, 299)
    for row in range(len(LENGTHS)):
        expected = score_stream(model, prompt(row), S, W)
        counted = mask[row, 1:].bool() & (mask[row].cumsum(0)[1:] > 1)
        assert (losses[row, counted] - expected[0]).abs().max() < TOLERANCE
        assert not losses[row, ~counted].any()


@pytest.mark.parametrize("given", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(5, 5, 5), (5, 3, 4)])
@pytest.mark.parametrize("case", ["llama", "lfm2"])
def test_other_rows_than_those_of_the_streams_are_refused(case, lengths, given):
    model = tiny_model("lfm2") if case == "lfm2" else make_family(case)
    ids, mask = padded([prompt(row)[:, :n] for row, n in enumerate(lengths)], "left")
    others, of_others = padded([prompt(0)[:, : 1 + (row != 1)] for row in range(given)], "right")
    with StreamingLLMWrapper(model, S, W) as stream, torch.no_grad():
        cache, expected = stream.new_cache(), stream.new_cache()
        for each in (cache, expected):
            stream.prefill(ids, each, attention_mask=mask)
        for feed in (
            lambda: stream.prefill(others, cache, attention_mask=of_others),
            lambda: stream.prefill(others, cache),
            lambda: stream(others[:, :1], past_key_values=cache),
            lambda: stream.generate(others, past_key_values=cache, continues=True, max_new_tokens=1),
        ):
            with pytest.raises(ValueError, match=f"holds 3 streams and was given .* of {given}"):
                feed()
        after = [stream(ids[:, :1], past_key_values=each).logits for each in (cache, expected)]
        assert torch.equal(*after)


@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_rows_are_reordered_selected_and_repeated(case):
    model, (ids, mask) = make_family(case), batch("left")
    tokens, logits = alone(case)
    with StreamingLLMWrapper(model, S, W) as stream, torch.no_grad():
        cache, rows = stream.new_cache(), [0, 1, 2]
        stream.prefill(ids, cache, attention_mask=mask)
        for t in range(90):
            for at, change, new in (
                (20, lambda: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
                (40, lambda: cache.batch_select_indices(torch.tensor([1, 2])), [0, 1]),
                (60, lambda: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
                (80, lambda: cache.batch_select_indices(torch.tensor([0])), [0]),
            ):
                if t == at:
                    change()
                    rows = new
            fed = torch.stack([tokens[row][t : t + 1] for row in rows])
            given = stream(fed, past_key_values=cache).logits[:, 0]
            assert (given - torch.stack([logits[row][t + 1] for row in rows])).abs().max() < TOLERANCE


def test_rows_go_on_with_unequal_turns():
    """By the ids so far, padded anew, and by new ids alone."""
    model, turns = make_family("llama"), [prompt(2)[:, :9], prompt(2)[:, :40], prompt(2)[:, :90]]
    ids, mask = batch("left")
    with StreamingLLMWrapper(model, S, W) as stream:
        cache = stream.new_cache()
        out = stream.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=20, **GREEDY)
        so_far = [torch.cat((prompt(row), out[row : row + 1, ids.shape[1] :], turns[row]), dim=1) for row in range(3)]
        expected = [stream.generate(row, max_new_tokens=20, **GREEDY)[0, row.shape[1] :] for row in so_far]
        again = StreamingKVCache.from_model(model, S, W)
        stream.generate(ids, attention_mask=mask, past_key_values=again, max_new_tokens=20, **GREEDY)
        longer, its_mask = padded(so_far, "right")
        whole = stream.generate(longer, attention_mask=its_mask, past_key_values=cache, max_new_tokens=20, **GREEDY)
        new, its_mask = padded([row[:, LENGTHS[index] + 19 :] for index, row in enumerate(so_far)], "left")
        part = stream.generate(
            new, attention_mask=its_mask, past_key_values=again, continues=True, max_new_tokens=20, **GREEDY
        )
    for row in range(3):
        assert torch.equal(whole[row, longer.shape[1] :], expected[row])
        assert torch.equal(part[row, new.shape[1] :], expected[row])


def test_beams_of_unequal_prompts():
    model, (ids, mask) = make_family("llama"), batch("left")
    asked = {"max_new_tokens": 30, "num_beams": 3, "length_penalty": 0.0}
    with StreamingLLMWrapper(model, S, W) as stream:
        together = stream.generate(ids, attention_mask=mask, **asked, **GREEDY)
        for row in range(3):
            single = stream.generate(prompt(row), **asked, **GREEDY)
            assert torch.equal(together[row, ids.shape[1] :], single[0, LENGTHS[row] :])


def test_streams_that_are_not_equally_far_go_on_with_their_best_beams():
    model, rows = make_family("llama"), [prompt(0), prompt(1)]
    ids, mask = padded(rows, "left")
    asked = {**GREEDY, "max_new_tokens": 20, "num_beams": 3}
    with StreamingLLMWrapper(model, S, W) as stream:
        cache = stream.new_cache()
        out = stream.generate(ids, attention_mask=mask, past_key_values=cache, continues=True, **asked)
        out = stream.generate(out[:, -1:], past_key_values=cache, continues=True, **asked)
        for index, row in enumerate(rows):
            single = stream.new_cache()
            alone = stream.generate(row, past_key_values=single, continues=True, **asked)
            alone = stream.generate(alone[:, -1:], past_key_values=single, continues=True, **asked)
            assert torch.equal(out[index], alone[0])
            assert cache.progress.of_rows(2)[index] == single.progress.of_rows(1)[0]


@pytest.mark.parametrize("case", ["gpt_neox", "llama"])
@pytest.mark.parametrize("asked", [{"num_beams": 3}, {"output_hidden_states": True}], ids=str)
def test_a_prompt_of_one_token_among_longer_ones(case, asked):
    """Nothing of it is fed ahead of the forward that gives what is asked for; LLaMA takes no block without a token."""
    model, rows = make_family(case), [prompt(0), prompt(0)[:, :1], prompt(1)]
    ids, mask = padded(rows, "left")
    asked = {**GREEDY, "max_new_tokens": 70, "return_dict_in_generate": True, **asked}
    with StreamingLLMWrapper(model, S, W) as stream:
        together = stream.generate(ids, attention_mask=mask, **asked).sequences
        for row, given in zip(rows, together, strict=True):
            expected = stream.generate(row, **asked).sequences[0, row.shape[1] :]
            assert torch.equal(given[ids.shape[1] :], expected)


@pytest.mark.parametrize("how", ["eos", "criteria", "both"])
def test_rows_that_end_early_stay_where_they_ended(how):
    model, (ids, mask) = make_family("llama"), batch("right")
    tokens, _ = alone("llama")
    ends = [tokens[row].tolist().index(tokens[0][40].item()) + 1 if how != "criteria" else n
            for row, n in enumerate((33, 64, 70))]  # fmt: skip
    controls = {"pad_token_id": 1, "temperature": 0}
    if how != "criteria":
        controls["eos_token_id"] = tokens[0][40].item()
    if how != "eos":
        stops = [50, 20, 65] if how == "both" else ends
        ends = [min(a, b) for a, b in zip(ends, stops, strict=True)]
        controls["stopping_criteria"] = StoppingCriteriaList([Ends(stops)])
    with StreamingDecoder(model, S, W) as decoder:
        decoder.prefill(ids, attention_mask=mask)
        out = decoder.generate(150, **controls)
        assert out.shape[1] == min(150, max(ends))
        check_ended_rows(decoder, out, ends, alone("llama"), TOLERANCE)


def test_what_cannot_be_right_is_named():
    model, (ids, mask) = make_family("llama"), batch("left")
    cache = StreamingKVCache.from_model(model, S, W)
    with StreamingLLMWrapper(model, S, W) as stream:
        stream.prefill(ids, cache, attention_mask=mask)
        with torch.no_grad(), pytest.raises(ValueError, match="rows that are not equally far"):
            stream(ids[:, :5], past_key_values=cache)
        with pytest.raises(ValueError, match="rows that are not equally far cannot be cropped"):
            cache.crop(-1)
        with pytest.raises(ValueError, match="hides every token of row 1"):
            stream.prefill(ids, stream.new_cache(), attention_mask=mask * torch.tensor([[1], [0], [1]]))
        with pytest.raises(ValueError, match=r"attention_mask is \[3, 299\], and the tokens are \[3, 300\]"):
            stream.prefill(ids, stream.new_cache(), attention_mask=mask[:, 1:])
    with torch.no_grad(), pytest.raises(ValueError, match="StreamingLLMWrapper"):
        model(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="two tokens"):
        score_stream(model, ids, S, W, attention_mask=mask * (mask.sum(1, keepdim=True) > 7) + (mask.cumsum(1) == 1))
