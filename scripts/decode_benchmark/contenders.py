"""Who is compared, behind one interface: the methods of the evaluation, and ways of running the decoder.

To add one: an entry of `CONTENDERS`, and where it is no method yet, a class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from experiments.methods import Baseline, Dense, KVPress, Method, MethodSettings, Streaming


class ConstantDense(Dense):
    """Transformers' own cache at a constant length: each step attends to all of it and is forgotten again."""

    name, label = "dynamic-cache", "DynamicCache"

    def prefill(self, ids: Tensor) -> Tensor:
        self._length = ids.shape[1]
        return super().prefill(ids)

    def step(self, ids: Tensor) -> Tensor:
        logits = super().step(ids)
        self._cache.crop(self._length)
        return logits


class Decoder(Streaming):
    """`StreamingDecoder` with options of its own."""

    def __init__(self, model, settings: MethodSettings, options: Mapping[str, object]):
        super().__init__(model, settings)
        self._options = options

    def _decoder_options(self) -> dict:
        return super()._decoder_options() | self._options


@dataclass(frozen=True)
class Contender:
    """One row of the comparison.

    Attributes:
        label: how figures call it.
        group: whose colour it has in figures: a method's name.
        method: its class; `Decoder` takes `options` too.
        engine: see `MethodSettings`.
        checked: it computes StreamingLLM, so its logits have to be those of the eager decoder with math.
        prefills: its prefill differs from the others', and is measured where prefills are.
        attention: "" where SDPA computes its attention, with each backend in turn; else the name of what does, which
            then stands in the backend's place (SDPA only prefills).
        compared_with: the re-computation with the same engine, which its speedup is relative to.
        at_once: opening it takes so long (it compiles) that its runs follow each other instead of taking turns.
    """

    label: str
    group: str
    method: Callable[..., Method] | None
    engine: str = "eager"
    options: Mapping[str, object] = field(default_factory=dict)
    checked: bool = False
    prefills: bool = False
    attention: str = ""
    compared_with: str = ""
    at_once: bool = False

    def open(self, model, settings: MethodSettings) -> Method:
        """The method object for a model; raises ValueError where it cannot run."""
        extra = (self.options,) if self.method is Decoder else ()
        reason = getattr(self.method, "unavailable", lambda: None)()
        if reason is not None:
            raise ValueError(reason)
        if self.at_once:
            torch.compiler.reset()  # past a number of recompilations PyTorch goes on uncompiled, and only warns
        return self.method(model, settings, *extra)


def _decoder(label: str, engine: str, partner: str, attention: str = "", prefills: bool = False, **options):
    return Contender(
        label=f"StreamingDecoder, {label}",
        group="streaming",
        method=Decoder,
        engine=engine,
        options=options,
        checked=True,
        prefills=prefills,
        attention=attention,
        compared_with=partner,
        at_once=engine == "graph+compile",
    )


def _recomputation(engine: str) -> Contender:
    return Contender(f"Re-computation, {engine}", "baseline", Baseline, engine)


CONTENDERS: dict[str, Contender] = {
    "recompute": _recomputation("eager"),
    "recompute-graph": _recomputation("graph"),
    "recompute-fused": _recomputation("fused"),
    "dynamic-cache": Contender("DynamicCache", "dense", ConstantDense, prefills=True, compared_with="recompute"),
    "kvpress": Contender("KVPress", "kvpress", KVPress, compared_with="recompute"),
    "attention-sinks": Contender("attention_sinks", "mit", None),
    "eager": _decoder("eager", "eager", "recompute", prefills=True),
    "graph": _decoder("graph", "graph", "recompute-graph"),
    "graph+compile": _decoder("graph+compile", "graph+compile", ""),
    "fused": _decoder("fused", "fused", "recompute-fused", prefills=True),
    "fused-triton": _decoder("fused, triton", "fused-triton", ""),
}
PEER = "attention-sinks"
"""Runs in a Python of its own."""

REFERENCE = CONTENDERS["eager"]
"""Whose logits, with math, the checked contenders have to have."""
