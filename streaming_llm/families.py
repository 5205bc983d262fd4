"""Which models can stream, and what of them the library has to know.

A model family outside this table is refused: its positions would otherwise be treated by guess.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .rope_utils import Rotary

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class ModelFamily:
    """One family of rotary models in Transformers.

    Args:
        rotary_class: ``module:class`` of its rotary embedding, relative to ``transformers.models``.
        interleaved: rotates neighbouring dimensions instead of halves.
    """

    rotary_class: str
    interleaved: bool = False

    def load_rotary_class(self) -> type[nn.Module]:
        """The rotary embedding's class in the installed Transformers."""
        module, name = self.rotary_class.split(":")
        return getattr(importlib.import_module(f"transformers.models.{module}"), name)


FAMILIES: dict[str, ModelFamily] = {
    "gpt_neox": ModelFamily("gpt_neox.modeling_gpt_neox:GPTNeoXRotaryEmbedding"),
}

LEARNED = "it has learned absolute positions, which end with its context length"
ALIBI = "it has ALiBi position biases instead of rotary positions"
REFUSED: dict[str, str] = {
    "gpt2": LEARNED,
    "gpt_bigcode": LEARNED,
    "gpt_neo": LEARNED,
    "opt": LEARNED,
    "biogpt": LEARNED,
    "xglm": "it has sinusoidal absolute positions",
    "bloom": ALIBI,
    "mpt": ALIBI,
}


def family_of(config) -> ModelFamily:
    """The family of a Transformers configuration.

    Raises:
        ValueError: the model has no rotary positions, or is not in the table.
    """
    model_type = getattr(config, "model_type", None)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    reason = REFUSED.get(model_type, "it is not in the table of models that are known to work")
    raise ValueError(
        f"model type {model_type!r} cannot stream: {reason}. Supported model types: {', '.join(sorted(FAMILIES))}"
    )


def _rotary_from_module(module: nn.Module, family: ModelFamily) -> Rotary:
    rope_type = getattr(module, "rope_type", "default")
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise ValueError(
            f"rotary scaling {rope_type!r} cannot stream: its frequencies depend on the length seen. "
            f"Supported: {', '.join(SUPPORTED_ROPE_TYPES)}"
        )
    inv_freq = module.inv_freq.detach().to(torch.float64)
    return Rotary(inv_freq, family.interleaved, float(getattr(module, "attention_scaling", 1.0)))


def rotary_from_config(config) -> Rotary:
    """The rotation of a freshly built model of this configuration, on the CPU.

    It is read off the family's own rotary module, so it has the float32-rounded frequencies that the model uses,
    under every version of Transformers.

    Raises:
        ValueError: the model cannot stream.
    """
    family = family_of(config)
    return _rotary_from_module(family.load_rotary_class()(config), family)


def rotary_modules(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Every rotary module of a model as ``(parent, attribute name, module)``.

    Raises:
        ValueError: the model cannot stream.
    """
    rotary_class = family_of(model.config).load_rotary_class()
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, rotary_class)
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no {rotary_class.__name__}: it cannot stream")
    return found


def rotary_from_model(model: nn.Module) -> Rotary:
    """The rotation of a loaded model, with the frequencies it holds (rounded too, if it was cast to half)."""
    family = family_of(model.config)
    return _rotary_from_module(rotary_modules(model)[0][2], family)


def lm_head(model: nn.Module, hidden_states: Tensor) -> Tensor:
    """Logits ``[..., vocab]`` of final hidden states ``[..., hidden]``, in the model's dtype."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output layer: use a causal language model")
    return head(hidden_states)
