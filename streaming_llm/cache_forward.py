"""One forward of new tokens on its way through the layers of a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention.plan import Plan
from .positions import Progress, StreamLayout

BROKEN = (
    "an earlier forward with this cache ended before its last layer, so its layers hold different tokens: "
    "reset() it, or use a new cache"
)


class CacheForward:
    """Counts the layers of a forward, to notice an incomplete one, whose result would be silently wrong.

    Args:
        n_tokens: new tokens of each row.
        progress: of the cache, before these tokens.
        attached: the model streams: its angles are exact, and its attention takes plans.

    Attributes:
        layers_done: layers that have stored their tokens.
        state_changes: a recurrent layer may have gone on, which is before others store their tokens.
        taken: the plans that layers have taken, also for those that attend to the same keys.
    """

    def __init__(self, n_tokens: int, progress: Progress, attached: bool) -> None:
        self.n_tokens, self.attached = n_tokens, attached
        self.layers_done, self.state_changes = 0, False
        self.taken: dict[int, Plan] = {}
        self._progress = progress
        self._plan: Plan | None = None
        self._slots: dict[tuple[StreamLayout, torch.device], Tensor] = {}

    def require_turn(self, layer_idx: int, n_tokens: int) -> None:
        """Raise ``RuntimeError`` unless it is ``layer_idx``'s turn to store so many tokens."""
        if self._plan is not None:
            raise RuntimeError(
                "the attention function did not take the plan of its tokens, so its result is wrong: the cache "
                "was made for another model. reset() it, and use a cache of this model"
            )
        if self.layers_done != layer_idx or self.n_tokens != n_tokens:
            raise RuntimeError(BROKEN)

    def stored(self, plan: Plan) -> None:
        """A layer has stored its tokens; ``plan`` is for its attention, which comes next."""
        self.layers_done += 1
        self._plan = plan if self.attached else None

    def take_plan(self, layer_idx: int) -> Plan:
        """How the tokens that a layer has just stored attend.

        Raises:
            RuntimeError: the layer has stored none.
        """
        if self._plan is None or self.layers_done != layer_idx + 1:
            raise RuntimeError(f"layer {layer_idx} attends without having stored its keys in the stream's cache")
        plan, self._plan = self._plan, None
        self.taken[layer_idx] = plan
        return plan

    def slots(self, layout: StreamLayout, device: torch.device) -> Tensor | None:
        """Where each row's token goes, ``[batch]``; ``None`` where all rows are equally far."""
        if self._progress.together:
            return None
        key = layout, device
        if key not in self._slots:
            self._slots[key] = torch.tensor([layout.slot(seen) for seen in self._progress.seen], device=device)
        return self._slots[key]
