"""Hidden states at chosen places of streams: what a model answers there, without logits of everything else.

The greedy completion of a prompt is an expected answer exactly where every token of the answer is the most likely one
behind the prompt and the answer's tokens before it. So one pass over a text that holds all answers tells at each of
them whether the model would have given it.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from streaming_llm import StreamingConfig, StreamingKVCache
from streaming_llm.attachment import attached
from streaming_llm.engines.blocks import BlockForward, default_block_size
from streaming_llm.families import lm_head, transformers_model
from streaming_llm.losses import LOGITS_BYTES, cross_entropy

MOST_AT_A_TIME = 1 << 15
"""Where nothing is evicted, the window is as long as the stream, and no measure."""


@torch.no_grad()
def states_at(
    model,
    forward: BlockForward,
    config: StreamingConfig,
    rows: Sequence[Sequence[int]],
    wanted: Sequence[Iterable[int]],
) -> list[Tensor]:
    """Final hidden states ``[n, hidden]`` of each row at its wanted places (ascending).

    Rows are ids, each a stream of its own. They begin together; what pads the shorter ones behind their ends is seen
    by nobody.
    """
    ids = pad_sequence([torch.as_tensor(row, dtype=torch.int64) for row in rows], batch_first=True)
    parts: list[list[Tensor]] = [[] for _ in rows]
    wanted = [torch.tensor(list(places), dtype=torch.int64) for places in wanted]
    device, start = model.get_input_embeddings().weight.device, 0
    with attached(model):
        cache = StreamingKVCache.from_model(model, config=config)
        for block in ids.split(block_size_for(len(rows), config, model), dim=1):
            hidden = forward(block.to(device), cache)
            for index, places in enumerate(wanted):
                inside = places[(places >= start) & (places < start + block.shape[1])] - start
                if len(inside):
                    parts[index].append(hidden[index, inside.to(hidden.device)])
            start += block.shape[1]
    return [torch.cat(part) if part else hidden.new_empty(0, hidden.shape[-1]) for part in parts]


def block_size_for(n_rows: int, config: StreamingConfig, model) -> int:
    """Tokens of each row at a time: as many in all rows together as the library takes of one."""
    window = config.window_size
    return min(window * max(1, default_block_size(window, model) // (window * n_rows)), MOST_AT_A_TIME)


def judged(model, hidden: Tensor, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Losses ``[n]`` in nats of the tokens that states ``[n, hidden]`` predict; whether each is the most likely."""
    targets = torch.tensor(tokens, device=hidden.device)
    step = max(1, LOGITS_BYTES // (4 * model.get_output_embeddings().weight.shape[0]))
    losses, greedy = [], []
    for states, these in zip(hidden.split(step), targets.split(step), strict=True):
        logits = lm_head(transformers_model(model), states)
        these = these.to(logits.device)
        losses.append(cross_entropy(logits, these))
        greedy.append(logits.argmax(-1) == these)
    return torch.cat(losses), torch.cat(greedy)
