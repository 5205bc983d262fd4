"""What a cache on an unmodified model has to check, since the model's own attention and angles stay in force."""

from __future__ import annotations

import math
from typing import Any

import torch

from .cache_layer import StreamingLayer
from .config import StreamingConfig
from .families import Family, bare_length, bare_refusal
from .positions import Progress


class BareChecks:
    """Refuses what would not be exact on the unmodified model.

    Copies share the model's configuration; pickled, they know of none.

    Args:
        model_config: the model's configuration.
        streaming: sinks and window of the cache.
        family: the model's.
    """

    def __init__(self, model_config: Any, streaming: StreamingConfig, family: Family) -> None:
        self._model_config = model_config
        self._streaming, self._family = streaming, family
        self._length = bare_length(model_config)
        self._exact_with: str | None = ""  # attention implementation last found exact
        self.forget_angles()

    def __deepcopy__(self, memo: dict[str, Any]) -> BareChecks:
        copied = object.__new__(BareChecks)
        vars(copied).update(vars(self))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model_config": None}

    def forget_angles(self) -> None:
        """Look at the model's angles again from the first eviction on."""
        self._next_angle_check: float = self._streaming.cache_size + 1

    def require_positions(self, progress: Progress, n_tokens: int) -> None:
        """Raise ``ValueError`` where the model's rotation ends, or changes, before these tokens do."""
        end = progress.position + n_tokens
        if self._length is not None and end > self._length:
            raise ValueError(
                f"position {end - 1} lies beyond the {self._length} up to which an unmodified model goes on alike: "
                "use `with StreamingLLMWrapper(model, ...) as stream:`, where a stream has no end"
            )

    def require_exact(self, progress: Progress, n_tokens: int) -> None:
        """Raise ``ValueError`` where the model's own attention computes otherwise than the stream's rule says."""
        self.require_positions(progress, n_tokens)
        if self._family.has_state:
            raise ValueError(
                "the model has recurrent layers, whose state this cache cannot hold on an unmodified model: use "
                "`with StreamingLLMWrapper(model, ...) as stream:`"
            )
        capacity, n_seen = self._streaming.cache_size + 1, progress.n_seen
        if n_tokens > 1 and n_seen + n_tokens > capacity:
            raise ValueError(
                f"{n_tokens} tokens at once do not fit: {n_seen} have been seen and the cache keeps {capacity - 1}. "
                "A cache sees neither queries nor mask, so this would be inexact. Feed them one by one, or inside "
                "`with StreamingLLMWrapper(model, ...) as stream:`, where blocks of any length are exact"
            )
        if not progress.together:
            raise ValueError(
                "rows that are not equally far need positions and masks of their own, which an unmodified model does "
                "not give them: use `with StreamingLLMWrapper(model, ...) as stream:`"
            )
        config = self._model_config
        implementation = getattr(config, "_attn_implementation", None)
        if config is not None and implementation != self._exact_with:
            reason = bare_refusal(config, self._streaming, self._family)
            if reason is not None:
                raise ValueError(f"this cache would not be exact on the unmodified model: {reason}")
            self._exact_with = implementation

    def require_angles(self, layer: StreamingLayer, cache_kwargs: dict[str, Any] | None) -> None:
        """From the first eviction on, whenever the stream has doubled: does the model rotate as configured?

        ``model.half()`` rounds the model's frequencies too, which a cache made from the configuration cannot know.
        Newer Transformers pass no cosine and sine, so that there is nothing to compare.

        Raises:
            ValueError: it does not.
        """
        n_seen, position = layer.progress.n_seen, layer.get_seq_length()
        if n_seen < self._next_angle_check:
            return
        found = [x.flatten(0, -2)[-1] for name in ("cos", "sin") if (x := (cache_kwargs or {}).get(name)) is not None]
        if len(found) < 2:
            self._next_angle_check = math.inf
            return
        cos, rotary = found[0], layer.rotation.on(found[0].device)
        if not rotary.rotary_dim:
            return
        expected = torch.stack(rotary.cos_sin(position)) * rotary.scaling
        # Models lay the same angles out in different ways, or give each once.
        expected = expected.sort(dim=-1).values[:, :: rotary.rotary_dim // cos.shape[-1]]
        error = (torch.stack(found).sort(dim=-1).values - expected).abs().max().item()
        if error > torch.finfo(cos.dtype).eps + 1e-6 * position:  # rounding of cosine and of angle
            raise ValueError(
                f"the model's rotary angles are {error:.1e} off those of its configuration: its frequencies were "
                "probably cast to half precision with the weights. Load it with dtype=..., or use "
                "StreamingLLMWrapper, which takes them from the model"
            )
        self._next_angle_check = 2 * n_seen
