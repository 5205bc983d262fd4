"""Which module of a model is its attention layer, per model family."""

from __future__ import annotations

from torch import nn

ATTENTION_CLASSES: dict[str, tuple[str, ...]] = {
    "gpt_neox": ("GPTNeoXAttention",),
}
"""Transformers' ``model_type`` -> class names of its attention layers."""


def attention_layers(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Every attention layer of a Transformers model as ``(parent, attribute name, layer)``, in model order.

    Raises:
        ValueError: the model's family is not in the table, or the model has no such layer.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in ATTENTION_CLASSES:
        known = ", ".join(sorted(ATTENTION_CLASSES))
        raise ValueError(f"the attention of model type {model_type!r} is not known. Supported model types: {known}")
    names = ATTENTION_CLASSES[model_type]
    layers = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(getattr(child, "wrapped", child)).__name__ in names
    ]
    if not layers:
        raise ValueError(f"{type(model).__name__} of type {model_type!r} has no {' or '.join(names)}")
    return layers
