"""How a decode step runs: one table of names, and which of them run a model here.

All engines advance the same :class:`~streaming_llm.StreamingKVCache`, which is up to date after every call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn

from ..attention.kernel_choice import adapters
from ..families import family_of_model, queries_scaled_from, transformers_model
from ..fused import has_own_attention, why_not_fused
from ..kv_cache import StreamingKVCache
from ..placement import why_not_one_cuda_device
from .base import Engine
from .fused_step import FusedStep, FusedTritonStep
from .model_call import CompiledModelCall, ModelCall
from .recorded import RecordedEngine
from .recorded_step import RecordedStep

__all__ = ["ENGINES", "Engine", "make_engine", "resolve_block_engine", "resolve_engine", "why_not_engine"]


@dataclass(frozen=True)
class EngineKind:
    """A row of the table.

    Args:
        make: ``(model, cache) -> engine``.
        why_not: ``model -> reason`` why it cannot run, or ``None``.
        blocks: how blocks of tokens run beside it, see :func:`.blocks.block_forward`.
    """

    make: Callable[[nn.Module, StreamingKVCache], Engine]
    why_not: Callable[[nn.Module], str | None]
    blocks: str


def _recorded(name: str, step: type[RecordedStep]) -> Callable[[nn.Module, StreamingKVCache], Engine]:
    return lambda model, cache: RecordedEngine(model, cache, name, step)


def _why_not_recorded(model: nn.Module) -> str | None:
    if family_of_model(model).has_state:
        return "the model has recurrent layers, whose state no recorded step holds"
    if queries_scaled_from(model.config) is not None:
        return "the model scales queries by their position"
    return why_not_one_cuda_device(model)


ENGINES = {
    "eager": EngineKind(Engine, lambda model: None, "eager"),
    # CUDA graphs of the model call, as it is and after torch.compile
    "graph": EngineKind(_recorded("graph", ModelCall), _why_not_recorded, "eager"),
    "graph+compile": EngineKind(_recorded("graph+compile", CompiledModelCall), _why_not_recorded, "eager"),
    # CUDA graphs of this library's kernels, with PyTorch's attention kernel that is allowed and with one of its own
    "fused": EngineKind(_recorded("fused", FusedStep), why_not_fused, "fused"),
    "fused-triton": EngineKind(_recorded("fused-triton", FusedTritonStep), why_not_fused, "fused-triton"),
}
"""Name -> how a step runs. Until the cache is full, all but ``fused-triton`` run the plain model call where the math
kernel, which takes a mask, is not allowed."""


def _kind(name: str) -> EngineKind:
    if name not in ENGINES:
        nearest = get_close_matches(str(name), [*ENGINES, "auto"], n=1)
        hint = f". Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"engine must be one of auto, {', '.join(ENGINES)}, got {name!r}{hint}")
    return ENGINES[name]


def why_not_engine(model: nn.Module, name: str) -> str | None:
    """Why ``model`` cannot run with an engine here; ``None`` if it can.

    Raises:
        ValueError: there is no engine of this name.
    """
    return _kind(name).why_not(transformers_model(model))


def _fused_for(model: nn.Module) -> str:
    """The fused engine that ``auto`` means: with the kernel that adapters name, or else the fastest."""
    return "fused" if adapters(model) else "fused-triton"


def resolve_engine(model: nn.Module, name: str = "auto") -> str:
    """The engine that runs ``model`` here: ``name`` itself, or for ``auto`` the fastest.

    Where the model's attention is wrapped in adapters, these name the kernel: ``auto`` is then none that has another.

    Raises:
        ValueError: there is no engine of this name, or it cannot run this model; says why.
    """
    if name == "auto":
        return next(n for n in (_fused_for(model), "graph", "eager") if why_not_engine(model, n) is None)
    reason = why_not_engine(model, name)
    if reason is not None:
        raise ValueError(f"engine {name!r} cannot run: {reason}. 'auto' takes the fastest that can")
    return name


def resolve_block_engine(model: nn.Module, name: str = "auto") -> str:
    """How blocks of tokens run with an engine: ``eager`` (the plain model call), ``fused`` or ``fused-triton``.

    The last is ``fused`` where its attention kernel is not for a model: in float32, and for heads of more than 256
    dimensions or no multiple of 8.

    Raises:
        ValueError: as :func:`resolve_engine`, but that blocks need no recording.
    """
    model = transformers_model(model)
    if name == "auto":
        name = "eager" if why_not_fused(model) else _fused_for(model)
    elif _kind(name).blocks != "eager":
        resolve_engine(model, name)
    blocks = _kind(name).blocks
    return "fused" if blocks == "fused-triton" and not has_own_attention(model) else blocks


def make_engine(model: nn.Module, cache: StreamingKVCache, name: str) -> Engine:
    """An engine for an attached model and a cache of it; see :func:`resolve_engine`."""
    return ENGINES[resolve_engine(model, name)].make(model, cache)
