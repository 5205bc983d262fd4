"""Sliding windows and soft-capping of the model's own, and what a stream's rule does beside them."""

from __future__ import annotations

from ..config import StreamingConfig
from ..positions import StreamLayout
from .table import text_config


def layer_windows(config) -> tuple[int | None, ...]:
    """Each layer's own sliding window in tokens, the current one included; ``None`` where it sees everything."""
    text = text_config(config)
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    types = getattr(text, "layer_types", None)
    if types is None:
        types = ["sliding_attention" if window else "full_attention"] * text.num_hidden_layers
    return tuple(window if layer_type == "sliding_attention" else None for layer_type in types)


def _keeps_windows(windows: tuple[int | None, ...], streaming: StreamingConfig) -> bool:
    """Whether layers with a window of their own stay as the model has them."""
    if streaming.sliding_layers == "auto":
        return any(windows) and not all(windows)
    return streaming.sliding_layers == "keep"


def layer_layouts(config, streaming: StreamingConfig) -> list[StreamLayout]:
    """Which tokens each layer keeps.

    Where some layers see everything and others have a window, the latter keep their window as the model has it,
    without sinks, and the stream's rule concerns the others. Where all layers have one, the rule holds in all of them.
    ``streaming.sliding_layers`` can force either.

    Raises:
        ValueError: the rule would let a layer look further back among recent tokens than it was made for.
    """
    windows, rule = layer_windows(config), StreamLayout(streaming)
    if _keeps_windows(windows, streaming):
        return [StreamLayout(StreamingConfig(0, window - 1)) if window else rule for window in windows]
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


def bare_refusal(config, streaming: StreamingConfig) -> str | None:
    """Why a cache on an unmodified model of this configuration would not be exact, or ``None`` if it is.

    The model's own attention then applies its own mask and scores, which a cache cannot change.
    """
    windows = layer_windows(config)
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
