"""Transformers' top-k followed by its top-p, without sorting the vocabulary."""

from __future__ import annotations

from torch import FloatTensor, LongTensor
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.logits_process import LogitsProcessor


class TopKTopPLogitsWarper(LogitsProcessor):
    """Does what the two do one after the other, on the largest ``top_k`` scores instead of all.

    The one difference: of tokens with the score at which the nucleus ends, all are kept, where Transformers keeps as
    many as reach ``top_p``, in the order that its sorting leaves them in.
    """

    def __init__(self, top_k: TopKLogitsWarper, top_p: TopPLogitsWarper) -> None:
        self.top_k, self.top_p = top_k.top_k, top_p.top_p
        self.min_tokens_to_keep, self.filter_value = top_p.min_tokens_to_keep, top_p.filter_value

    def __call__(self, input_ids: LongTensor, scores: FloatTensor) -> FloatTensor:
        """Scores ``[batch, vocab]`` with ``filter_value`` at what is not kept."""
        values = scores.topk(min(self.top_k, scores.shape[-1])).values  # in descending order
        weights = (values - values[:, :1]).exp()
        last = values[:, -1:]
        equal_to_last = (scores == last).sum(-1, keepdim=True) - (values == last).sum(-1, keepdim=True)
        total = weights.sum(-1, keepdim=True) + equal_to_last * weights[:, -1:]  # top-k keeps equal ones
        is_kept = weights.cumsum(-1) - weights < self.top_p * total
        n_kept = is_kept.sum(-1, keepdim=True).clamp(self.min_tokens_to_keep, values.shape[-1])
        return scores.masked_fill(scores < values.gather(-1, n_kept - 1), self.filter_value)


def joined(processors: LogitsProcessorList) -> LogitsProcessorList:
    """The same processors, with each top-p that follows a top-k done in one with it."""
    out = LogitsProcessorList()
    for processor in processors:
        if out and type(processor) is TopPLogitsWarper and type(out[-1]) is TopKLogitsWarper:
            out[-1] = TopKTopPLogitsWarper(out[-1], processor)
        else:
            out.append(processor)
    return out
