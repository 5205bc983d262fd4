"""Three prompts of unequal length and what each gives by itself, for the tests on a CPU and on a GPU."""

from __future__ import annotations

import torch
from family_models import VOCAB, available
from streams import padded

from streaming_llm import StreamingDecoder

S, W = 4, 60
LENGTHS = (7, 61, 300)
CASES = [case for case in ("gpt_neox", "llama", "qwen3", "gemma3", "phi") if available(case)]
SIDES = ["left", "right"]
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
LOGITS = {"return_dict_in_generate": True, "output_logits": True}


def prompt(row: int, device="cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(row)
    return torch.randint(VOCAB, (1, LENGTHS[row]), generator=generator).to(device)


def batch(side: str, device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = padded([prompt(row) for row in range(len(LENGTHS))], side)
    return ids.to(device), mask.to(device)


def each_alone(model, n_new: int, device="cpu") -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Greedy tokens ``[n_new]`` of each prompt, and the logits that each was chosen from ``[n_new, vocab]``."""
    logits = []
    for row in range(len(LENGTHS)):
        with StreamingDecoder(model, S, W, "eager") as decoder:
            steps = [decoder.prefill(prompt(row, device))]
            for _ in range(n_new - 1):
                steps.append(decoder.step(steps[-1].argmax(-1)))
        logits.append(torch.cat(steps))
    return [row.argmax(-1) for row in logits], logits


def check_ended_rows(decoder, out: torch.Tensor, ends: list[int], alone, tolerance: float) -> None:
    """Rows that ended early are padded with 1, and go on from where they ended."""
    tokens, logits = alone
    for row, end in enumerate(ends):
        assert torch.equal(out[row, :end], tokens[row][:end])
        assert (out[row, end:] == 1).all()
        assert decoder.cache.progress.of_rows(3)[row][0] == LENGTHS[row] + end
        assert (decoder.logits[row] - logits[row][end]).abs().max() < tolerance
    given = decoder.step(torch.stack([row[end] for row, end in zip(tokens, ends, strict=True)]))
    for row, end in enumerate(ends):
        assert (given[row] - logits[row][end + 1]).abs().max() < tolerance
