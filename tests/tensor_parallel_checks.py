"""A model that Transformers splits over two processes: the same in each rank, by every path or refused by name.

Run by `test_gpu_devices.py`; by hand: `torchrun --nproc_per_node 2 tests/tensor_parallel_checks.py FOLDER`, with a
model saved in FOLDER.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM

from streaming_llm import ENGINES, StreamingDecoder, StreamingLLMWrapper, resolve_engine, score_stream
from streaming_llm.engines import why_not_engine

S, W, LENGTH = 4, 60, 200


@torch.no_grad()
def main(folder: str) -> None:
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, tp_plan="auto").eval()
    ids = torch.randint(exact.config.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    expected, device = score_stream(exact, ids, S, W), torch.device("cuda", torch.cuda.current_device())

    assert resolve_engine(model) == "eager"
    for name in set(ENGINES) - {"eager"}:
        assert "split over several processes" in why_not_engine(model, name), name
    losses = score_stream(model, ids, S, W)
    assert (losses - expected).abs().mean() < 0.03, (losses - expected).abs().mean()
    with StreamingDecoder(model, S, W) as decoder:
        decoder.prefill(ids[:, :100].to(device))
        losses = decoder.score(ids[:, 100:].to(device)).cpu()
    assert (losses - expected[:, 99:]).abs().mean() < 0.03
    with StreamingLLMWrapper(model, S, W) as stream:
        out = stream.generate(ids[:, :100].to(device), max_new_tokens=50, do_sample=False, eos_token_id=None)
    everywhere = [torch.empty_like(out) for _ in range(2)]
    torch.distributed.all_gather(everywhere, out)
    assert torch.equal(*everywhere)
    print("tensor parallel: right")


if __name__ == "__main__":
    main(sys.argv[1])
    torch.distributed.destroy_process_group()
