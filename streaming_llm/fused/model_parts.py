"""Single layers of a model as parts of a recipe; what these cannot say is refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .recipe import Linear, Norm
from .weights import NotCoveredError, stored

ACTIVATION_OF = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",  # before Transformers 5
    "ReLU": "relu",
}
"""Class of an activation in a model -> its name in recipes."""


def first_of(parent: nn.Module, names: tuple[str, ...]) -> Any:
    """The first of these attributes that is there and not ``None``; otherwise ``None``."""
    return next((found for name in names if (found := getattr(parent, name, None)) is not None), None)


def activation_of(mlp: nn.Module) -> str:
    """The name in :data:`.activations.ACTIVATIONS` of what an MLP of a model applies."""
    name = type(first_of(mlp, ("act_fn", "activation_fn", "act"))).__name__
    if name not in ACTIVATION_OF:
        raise NotCoveredError(f"no kernel computes its activation {name}")
    return ACTIVATION_OF[name]


def linear_of(module: nn.Module) -> Linear:
    """A linear layer of a model."""
    if not isinstance(module, nn.Linear):
        raise NotCoveredError(f"it holds a {type(module).__name__} in place of a plain layer")
    return Linear(stored(module.weight), module.bias)


def norm_of(module: nn.Module, plus_one: bool = False) -> Norm:
    """A norm of a model, by the last word of its class's name."""
    kind = type(module).__name__
    if not kind.endswith(("RMSNorm", "LayerNorm")):
        raise NotCoveredError(f"it has a norm of class {kind}")
    eps = first_of(module, ("variance_epsilon", "eps"))
    return Norm(
        weight=getattr(module, "weight", None),
        bias=getattr(module, "bias", None),
        eps=1e-5 if eps is None else eps,  # OLMo's has it in its forward
        centred=kind.endswith("LayerNorm"),
        plus_one=plus_one,
    )


def head_norm_of(module: Any, plus_one: bool) -> Norm:
    """A norm of queries or keys; one of StableLM, which has a module for each head, as one with a row for each."""
    if not hasattr(module, "norms"):
        return norm_of(module, plus_one)
    parts = [norm_of(norm, plus_one) for norm in module.norms]
    weights, biases = ([x for part in parts if (x := getattr(part, name)) is not None] for name in ("weight", "bias"))
    bias = torch.stack(biases) if biases else None
    return Norm(torch.stack(weights), bias, parts[0].eps, centred=True)
