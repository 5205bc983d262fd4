"""How a decode step runs: as the plain model call, or replayed from a CUDA graph.

`StreamingDecoder` has its engines built in; here is what the re-computation baseline needs to run the same ones, so
that a speedup is never a comparison of two engines. The pieces that need CUDA are imported where they are used.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import streaming_llm

Forward = Callable[[Tensor], Tensor]
"""Token ids [batch, length] -> logits of the last token [batch, vocab]."""


def plain_forward(model) -> Forward:
    """The model's own forward over all tokens, without a cache."""
    return lambda ids: model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]


def _fused_forward(model) -> Forward:
    from streaming_llm.fused import fused_forward, why_not_fused

    reason = why_not_fused(model)
    if reason is not None:
        raise ValueError(f"engine 'fused' cannot run: {reason}; choose graph or eager")
    return fused_forward(model)


_FORWARDS: dict[str, Callable[[torch.nn.Module], Forward]] = {
    "eager": plain_forward,
    "graph": plain_forward,
    "graph+compile": plain_forward,
    "fused": _fused_forward,
    "fused-triton": _fused_forward,
}


def forward_of(model, engine: str) -> Forward:
    """The forward that the engine runs, not captured yet.

    Raises ValueError where the engine does not exist or cannot run on the model's device.
    """
    if engine not in _FORWARDS:
        raise ValueError(f"engine must be one of {', '.join(_FORWARDS)}, got {engine!r}")
    if engine != "eager" and model.device.type != "cuda":
        raise ValueError(f"engine {engine!r} needs a CUDA device, and the model is on {model.device}: choose eager")
    return _FORWARDS[engine](model)


def capture(forward: Forward, example: Tensor) -> Forward:
    """`forward` as a CUDA graph for ids of the shape of `example`."""
    from streaming_llm.engines.recorder import GraphedCall

    return GraphedCall(forward, example)


def resolve_engine(model, asked: str, n_sink: int, window_size: int) -> str:
    """The engine that runs where `asked` is wanted: never "auto", which is what the decoder finds best here.

    Raises ValueError where it cannot run.
    """
    return streaming_llm.resolve_engine(model, asked)
