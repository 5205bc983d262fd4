"""`generate` on a CUDA device: the same tokens by every engine, for equal and unequal prompts, in constant memory."""

from __future__ import annotations

import functools
import gc

import pytest
import torch
import unequal_prompts
from conftest import GPU
from family_models import make_family
from streams import Ends
from transformers import StoppingCriteriaList
from unequal_prompts import CASES, GREEDY, LENGTHS, LOGITS, SIDES, S, W, batch, check_ended_rows, each_alone

from streaming_llm import ENGINES, StreamingDecoder, StreamingKVCache, StreamingLLMWrapper
from streaming_llm.engines import why_not_engine

pytestmark = pytest.mark.gpu

NEW, TOLERANCE = 150, 1e-4
RECORDED = [name for name in ENGINES if name not in ("eager", "graph+compile")]


@functools.cache
def model_of(case: str):
    return make_family(case).to(GPU)


def prompt(row: int) -> torch.Tensor:
    return unequal_prompts.prompt(row, GPU)


@functools.cache
def alone(case: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return each_alone(model_of(case), NEW, GPU)


@pytest.fixture(params=[(case, engine) for case in CASES for engine in RECORDED], ids=str)
def setting(request):
    case, engine = request.param
    reason = why_not_engine(model_of(case), engine)
    if reason is not None:
        pytest.skip(reason)
    return case, engine, model_of(case)


@pytest.mark.parametrize("row", range(3))
def test_the_tokens_of_the_plain_call(setting, row):
    case, engine, model = setting
    tokens, logits = alone(case)
    with StreamingLLMWrapper(model, S, W, engine) as stream:
        for _ in range(2):  # recorded, and again
            out = stream.generate(prompt(row), max_new_tokens=NEW, **LOGITS, **GREEDY)
            assert stream.engine_of_last_generate == engine
            assert torch.equal(out.sequences[0, LENGTHS[row] :], tokens[row])
            assert (torch.cat(out.logits) - logits[row]).abs().max() < TOLERANCE
            assert out.past_key_values.n_seen == LENGTHS[row] + NEW - 1


@pytest.mark.parametrize("side", SIDES)
def test_unequal_prompts(setting, side):
    case, engine, model = setting
    tokens, logits = alone(case)
    ids, mask = batch(side, GPU)
    with StreamingLLMWrapper(model, S, W, engine) as stream:
        out = stream.generate(ids, attention_mask=mask, max_new_tokens=NEW, **LOGITS, **GREEDY)
    with StreamingDecoder(model, S, W, engine) as decoder:
        decoder.prefill(ids, attention_mask=mask)
        decoder.move_to(10_000_000)
        far = decoder.generate(NEW, temperature=0)
    for row in range(3):
        assert (torch.stack([step[row] for step in out.logits]) - logits[row]).abs().max() < TOLERANCE
        assert torch.equal(out.sequences[row, ids.shape[1] :], tokens[row])
        assert torch.equal(far[row], tokens[row])


def test_rows_that_end_early_stay_where_they_ended(setting):
    case, engine, model = setting
    tokens, _ = alone(case)
    ids, mask = batch("left", GPU)
    eos, stops = tokens[0][60].item(), [100, 70, 90]
    first = [row.tolist().index(eos) + 1 if eos in row.tolist() else NEW for row in tokens]
    for criteria in (None, StoppingCriteriaList([Ends(stops)])):
        ends = first if criteria is None else [min(a, b) for a, b in zip(first, stops, strict=True)]
        with StreamingDecoder(model, S, W, engine) as decoder:
            decoder.prefill(ids, attention_mask=mask)
            controls = {"temperature": 0, "eos_token_id": eos, "pad_token_id": 1}
            if criteria:
                controls["stopping_criteria"] = criteria
            out = decoder.generate(NEW - 5, **controls)
            ends = [min(end, NEW - 5) for end in ends]
            assert out.shape[1] == max(ends)
            check_ended_rows(decoder, out, ends, alone(case), TOLERANCE)


def test_beams(setting):
    _, engine, model = setting
    asked = {"max_new_tokens": 40, "num_beams": 3, "length_penalty": 0.0}
    for row in range(3):
        with StreamingLLMWrapper(model, S, W, "eager") as stream:
            expected = stream.generate(prompt(row), **asked, **GREEDY)
        with StreamingLLMWrapper(model, S, W, engine) as stream:
            assert torch.equal(stream.generate(prompt(row), **asked, **GREEDY), expected)


def test_caches_take_turns_in_an_engines_buffers(setting):
    case, engine, model = setting
    tokens, _ = alone(case)
    with StreamingLLMWrapper(model, S, W, engine) as stream:
        caches, so_far = [stream.new_cache() for _ in range(3)], [prompt(row) for row in range(3)]
        for _ in range(5):
            for row in (0, 1, 2):
                so_far[row] = stream.generate(so_far[row], past_key_values=caches[row], max_new_tokens=20, **GREEDY)
        for row in range(3):
            assert torch.equal(so_far[row][0, LENGTHS[row] :], tokens[row][:100])
            assert isinstance(caches[row], StreamingKVCache)


def test_fifty_turns_in_constant_memory(setting):
    _, engine, model = setting
    gc.collect()
    memory = []
    with StreamingLLMWrapper(model, S, W, engine) as stream:
        cache, turn = stream.new_cache(), prompt(1)
        for _ in range(50):
            out = stream.generate(turn, past_key_values=cache, continues=True, max_new_tokens=30, **GREEDY)
            turn = torch.cat((out[:, -1:], prompt(0)), dim=1)
            memory.append(torch.cuda.memory_allocated(GPU))
    assert cache.n_seen == 61 + 49 * 8 + 50 * 29
    assert memory[-1] - memory[10] <= 2048  # what is alive of one call, in blocks of 512 bytes
