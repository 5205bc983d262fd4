"""Sliding windows and soft-capping of the model's own, and what a stream's rule does beside them."""

from __future__ import annotations

from typing import Any

from ..config import StreamingConfig
from ..positions import StreamLayout
from .family import Family, constant_up_to, queries_scaled_from
from .recognition import family_of
from .table import table_length, text_config


def layer_windows(config: Any, family: Family | None = None) -> tuple[int | None, ...]:
    """The own sliding window of each layer with keys, in tokens; ``None`` where it sees everything.

    Args:
        family: what is known of the model's family already.
    """
    text = text_config(config)
    stores = (family_of(config) if family is None else family).stores
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    types = getattr(text, "layer_types", None)
    if types is None:
        types = ["sliding_attention" if window else "full_attention"] * text.num_hidden_layers
    return tuple(window if types[index] == "sliding_attention" else None for index in stores)


def _keeps_windows(windows: tuple[int | None, ...], streaming: StreamingConfig) -> bool:
    """Whether layers with a window of their own stay as the model has them."""
    if streaming.sliding_layers == "auto":
        return any(windows) and not all(windows)
    return streaming.sliding_layers == "keep"


def layer_layouts(config: Any, streaming: StreamingConfig, family: Family | None = None) -> list[StreamLayout]:
    """Which tokens each layer with keys keeps.

    Where some layers see everything and others have a window, the latter keep their window as the model has it,
    without sinks, and the stream's rule concerns the others. Where all layers have one, the rule holds in all of them.
    ``streaming.sliding_layers`` can force either.

    Raises:
        ValueError: the rule would let a layer look further back among recent tokens than it was made for, or the
            cache is longer than the length up to which the model's rotation is constant (dynamic, longrope).
    """
    windows, rule = layer_windows(config, family), StreamLayout(streaming)
    constant = constant_up_to(config)
    if constant is not None and streaming.cache_size >= constant:
        raise ValueError(
            f"the rotary frequencies of this model change beyond {constant} tokens, so that keys stored earlier would "
            f"have to change: use n_sink + window_size < {constant}"
        )
    if _keeps_windows(windows, streaming):
        return [StreamLayout.of_window(window) if window else rule for window in windows]
    own = [window for window in windows if window]
    if own and streaming.window_size > min(own):
        remedy = f"use window_size <= {min(own)}"
        if len(own) < len(windows):
            remedy += ", or sliding_layers='keep'"
        raise ValueError(
            f"window_size {streaming.window_size} is larger than the sliding window {min(own)} of "
            f"{len(own)} of the model's {len(windows)} layers: {remedy}"
        )
    return [rule] * len(windows)


def bare_length(config: Any) -> int | None:
    """The position from which on an unmodified model does otherwise than before; ``None`` where there is none.

    Its rotation ends or changes there, or queries are scaled by their position, which in a stream is in the cache.
    """
    lengths = table_length(text_config(config)), constant_up_to(config), queries_scaled_from(config)
    return min((n for n in lengths if n is not None), default=None)


def bare_refusal(config: Any, streaming: StreamingConfig, family: Family) -> str | None:
    """Why a cache on an unmodified model of this configuration would not be exact, or ``None`` if it is.

    The model's own attention then applies its own mask and scores, which a cache cannot change.
    """
    windows = layer_windows(config, family)
    ruled = [] if _keeps_windows(windows, streaming) else [window for window in windows if window]
    if ruled and streaming.cache_size >= min(ruled):
        return (
            f"sliding layers of the model see {min(ruled)} tokens and hide the rest of the {streaming.cache_size} "
            "kept ones and the new one: use n_sink + window_size < "
            f"{min(ruled)}, or `with StreamingLLMWrapper(model, ...)`, where the stream's rule holds in every layer"
        )
    text = text_config(config)
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    if capped and getattr(text, "_attn_implementation", None) == "sdpa":
        return (
            "Transformers' sdpa attention leaves out the soft-capping of the model's scores: load it with "
            "attn_implementation='eager', or use `with StreamingLLMWrapper(model, ...)`"
        )
    return None
