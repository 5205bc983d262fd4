"""Top-k and top-p in one keep what Transformers' two keep one after the other."""

import pytest
import torch
from family_models import VOCAB, make_family
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from streaming_llm import StreamingLLMWrapper
from streaming_llm.warpers import TopKTopPLogitsWarper, joined


@pytest.mark.parametrize("top_k", [1, 5, 50, 1000])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("at_least", [1, 3])
def test_the_same_tokens_are_kept(top_k, top_p, at_least):
    scores = 4 * torch.randn(7, 1000, generator=torch.Generator().manual_seed(top_k))
    warpers = [
        TopKLogitsWarper(top_k, min_tokens_to_keep=at_least),
        TopPLogitsWarper(top_p, min_tokens_to_keep=at_least),
    ]
    together = joined(LogitsProcessorList(warpers))
    assert [type(warper) for warper in together] == [TopKTopPLogitsWarper]
    assert torch.equal(together(None, scores.clone()), LogitsProcessorList(warpers)(None, scores))


def test_equal_scores():
    """Top-k keeps all that equal its last; they count for the probability that top-p takes its share of."""
    scores = torch.tensor([[3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 0.0]])
    top_k, top_p = (
        TopKLogitsWarper(3),
        TopPLogitsWarper(0.6),
    )  # of 3, 2 and four times 1: 3 has 0.51, 3 and 2 have 0.70
    both = LogitsProcessorList([top_k, top_p])
    assert torch.equal(joined(both)(None, scores), both(None, scores))
    nucleus_ends_at_equal_ones = TopKTopPLogitsWarper(top_k, TopPLogitsWarper(0.8))(None, scores)
    assert nucleus_ends_at_equal_ones.isfinite().tolist() == [[True] * 6 + [False]]


def test_only_neighbours_are_joined():
    warpers = [TopPLogitsWarper(0.9), TopKLogitsWarper(5), TemperatureLogitsWarper(2.0), TopPLogitsWarper(0.9)]
    assert joined(LogitsProcessorList(warpers)) == warpers


def test_generate_draws_the_same_tokens():
    model = make_family("llama")
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 30, "do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9}
    torch.manual_seed(1)
    expected = model.generate(ids, eos_token_id=None, **settings)
    with StreamingLLMWrapper(model, n_sink=4, window_size=60) as stream:
        torch.manual_seed(1)
        assert torch.equal(stream.generate(ids, eos_token_id=None, **settings), expected)
