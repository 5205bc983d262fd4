"""How the re-computation baseline and block-parallel scoring run the engines of the library.

A speedup is then never a comparison of two engines.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from streaming_llm import score_stream
from streaming_llm.engines.recorder import Recording
from streaming_llm.fused import fused_forward, why_not_fused

Forward = Callable[[Tensor], Tensor]
"""Token ids [batch, length] -> logits of the last token [batch, vocab]."""


def recomputing_engine(engine: str) -> str:
    """The engine that re-computes a window, where methods run `engine`: it has no ring of kept keys to attend to."""
    return "fused" if engine == "fused-triton" else engine


def plain_forward(model) -> Forward:
    """The model's own forward over all tokens, without a cache."""
    return lambda ids: model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]


def forward_of(model, engine: str) -> Forward:
    """The forward over all tokens that the engine runs, not captured yet.

    Raises ValueError where the engine does not exist or cannot run on the model's device.
    """
    if engine not in ("eager", "graph", "graph+compile", "fused"):
        raise ValueError(f"no engine {engine!r} re-computes a window: choose eager, graph, graph+compile or fused")
    device = model.get_input_embeddings().weight.device
    if engine != "eager" and device.type != "cuda":
        raise ValueError(f"engine {engine!r} needs a CUDA device, and the model is on {device}: choose eager")
    if engine != "fused":
        return plain_forward(model)
    reason = why_not_fused(model)
    if reason is not None:
        raise ValueError(f"engine 'fused' cannot run: {reason}; choose graph or eager")
    return fused_forward(model)


def capture(forward: Forward, example: Tensor, engine: str) -> Forward:
    """`forward` as a CUDA graph for ids of the shape of `example`: each call overwrites the logits of the one before.

    It raises ValueError for ids of another shape.
    """
    call = torch.compile(forward) if engine == "graph+compile" else forward
    with torch.inference_mode(False):
        static = example.clone()
    made: list[Tensor] = []

    def run() -> None:
        made[:] = [call(static)]

    recording = Recording(run, static.device)

    def replayed(ids: Tensor) -> Tensor:
        if ids.shape != static.shape:
            raise ValueError(f"recorded for shape {list(static.shape)}, got {list(ids.shape)}")
        static.copy_(ids)
        recording.replay()
        return made[0]

    return replayed


def score(model, ids: Tensor, n_sink: int, window_size: int, engine: str) -> Tensor:
    """Losses [1, N - 1] in nats of ids [1, N], block-parallel; blocks have no graph, they run fused or eager."""
    blocks = "fused" if engine.startswith("fused") else "eager"
    return score_stream(model, ids, n_sink, window_size, engine=blocks)
