"""Who is compared: the evaluation's methods by each engine, and Transformers' cache. Imports no torch.

To add one: an entry of `CONTENDERS`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Contender:
    """One row of the comparison.

    `label`: how figures call it. `method`: a name of `experiments.methods.METHODS`, whose colour it has in figures,
    or `group` names another. `checked`: it computes StreamingLLM, so its logits have to be those of the eager decoder
    with math. `prefills`: its prefill differs from the others', and is measured where prefills are. `attention`: ""
    where SDPA computes its attention, with each backend in turn; else the name of what does, which then stands in the
    backend's place (SDPA only prefills). `compared_with`: the re-computation with the same engine, which its speedup
    is relative to. `at_once`: opening it takes so long (it compiles) that its runs follow each other instead of
    taking turns.
    """

    label: str
    method: str
    engine: str = "eager"
    group: str = ""
    checked: bool = False
    prefills: bool = False
    attention: str = ""
    compared_with: str = ""
    at_once: bool = False


def _decoder(label: str, engine: str, compared_with: str = "", **more) -> Contender:
    label = f"StreamingDecoder, {label}"
    return Contender(label, "streaming", engine, checked=True, compared_with=compared_with, **more)


def _recomputation(engine: str) -> Contender:
    return Contender(f"Re-computation, {engine}", "baseline", engine)


CONSTANT_DENSE = "dynamic-cache"
"""Transformers' own cache at a constant length: no method of the evaluation."""

CONTENDERS: dict[str, Contender] = {
    "recompute": _recomputation("eager"),
    "recompute-graph": _recomputation("graph"),
    "recompute-fused": _recomputation("fused"),
    CONSTANT_DENSE: Contender("DynamicCache", CONSTANT_DENSE, group="dense", prefills=True, compared_with="recompute"),
    "kvpress": Contender("KVPress", "kvpress", compared_with="recompute"),
    "eager": _decoder("eager", "eager", "recompute", prefills=True),
    "graph": _decoder("graph", "graph", "recompute-graph"),
    "graph+compile": _decoder("graph+compile", "graph+compile", at_once=True),
    "fused": _decoder("fused", "fused", "recompute-fused", prefills=True),
    "fused-triton": _decoder("fused, triton", "fused-triton", attention="triton"),
}


def backends_of(contender: str, backends: tuple[str, ...]) -> tuple[str, ...]:
    """What computes a contender's attention, in turn."""
    own = CONTENDERS[contender].attention
    return (own,) if own else backends
