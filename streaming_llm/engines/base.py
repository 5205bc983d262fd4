"""What an engine does, and how the plainest one does it: by the model call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kv_cache import StreamingKVCache
from ..losses import cross_entropy
from ..placement import input_device
from ..sampling import Choice


class Engine:
    """Feeds one token after the other to a model with a streaming cache: by the plain model call, others otherwise.

    Args:
        model: attached as long as the engine is used.
        cache: a cache of this model; up to date after every call.

    Attributes:
        name: what really runs.
        compile_sec: seconds spent on compiling, tuning and recording so far.
    """

    name = "eager"
    runs_alone = False
    """Whether several tokens are generated without the host."""

    def __init__(self, model: nn.Module, cache: StreamingKVCache) -> None:
        self.model, self.cache = model, cache
        self.compile_sec = 0.0

    def step(self, token_ids: Tensor) -> Tensor:
        """Feed ``[batch]``; logits ``[batch, vocab]``."""
        ids = token_ids.unsqueeze(1).to(input_device(self.model))
        return self.model(input_ids=ids, past_key_values=self.cache, use_cache=True).logits[:, -1]

    def score(self, logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of ``token_ids`` ``[batch, n]``, each fed after its loss is taken; and the last logits."""
        losses = []
        for token in token_ids.unbind(1):
            losses.append(cross_entropy(logits, token))
            logits = self.step(token)
        return torch.stack(losses, dim=1), logits

    def generate(self, logits: Tensor, n: int, choice: Choice) -> tuple[Tensor, Tensor]:
        """``n`` tokens ``[batch, n]``, each chosen from the logits before it and fed; and the last logits.

        Rows that have ended are given padding; their streams and logits stay where they ended.
        """
        tokens, ending = [], choice.ending
        for _ in range(n):
            token = choice.sampling.choose(logits, choice.generator)
            if ending is None:
                logits = self.step(token)
            else:
                token = torch.where(ending.active, token, ending.pad_token_id)
                ended = (~ending.active).int().tolist()
                put_back = self.cache.states_of([row for row, has_ended in enumerate(ended) if has_ended])
                logits = torch.where(ending.active[:, None], self.step(token), logits)
                self.cache.progress.take_back(ended)
                put_back()
                ending.active &= ~ending.ends(token)
            tokens.append(token)
        return torch.stack(tokens, dim=1), logits
