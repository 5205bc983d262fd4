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
    backend's place (in float32 SDPA prefills). `at_once`: opening it takes so long (it compiles) that its runs follow
    each other instead of taking turns.
    """

    label: str
    method: str
    engine: str = "eager"
    group: str = ""
    checked: bool = False
    prefills: bool = False
    attention: str = ""
    at_once: bool = False

    @property
    def compared_with(self) -> str | None:
        """The re-computation with the same engine, which its speedup is relative to; None where there is none."""
        for name, other in CONTENDERS.items():
            if (other.method, other.engine) == ("baseline", self.engine) and self.method != "baseline":
                return name
        return None


def _decoder(label: str, engine: str, **more) -> Contender:
    return Contender(f"StreamingDecoder, {label}", "streaming", engine, checked=True, **more)


def _recomputation(engine: str) -> Contender:
    return Contender(f"Re-computation, {engine}", "baseline", engine)


CONSTANT_DENSE = "dynamic-cache"
"""Transformers' own cache at a constant length: no method of the evaluation."""

CONTENDERS: dict[str, Contender] = {
    "recompute": _recomputation("eager"),
    "recompute-graph": _recomputation("graph"),
    "recompute-fused": _recomputation("fused"),
    CONSTANT_DENSE: Contender("DynamicCache", CONSTANT_DENSE, group="dense", prefills=True),
    "kvpress": Contender("KVPress", "kvpress"),
    "eager": _decoder("eager", "eager", prefills=True),
    "graph": _decoder("graph", "graph"),
    "graph+compile": _decoder("graph+compile", "graph+compile", at_once=True),
    "fused": _decoder("fused", "fused", prefills=True),
    "fused-triton": _decoder("fused, triton", "fused-triton", attention="triton"),
}
