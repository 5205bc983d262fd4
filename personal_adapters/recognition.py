"""Which module of a model is its attention layer, per model family."""

from __future__ import annotations

from torch import nn

ATTENTION_CLASSES: dict[str, tuple[str, ...]] = {
    "cohere": ("CohereAttention",),
    "cohere2": ("Cohere2Attention",),
    "falcon": ("FalconAttention",),
    "gemma": ("GemmaAttention",),
    "gemma2": ("Gemma2Attention",),
    "gemma3": ("Gemma3Attention",),
    "gemma3_text": ("Gemma3Attention",),
    "glm": ("GlmAttention",),
    "glm4": ("Glm4Attention",),
    "gpt_neox": ("GPTNeoXAttention",),
    "gptj": ("GPTJAttention",),
    "granite": ("GraniteAttention",),
    "llama": ("LlamaAttention",),
    "mistral": ("MistralAttention",),
    "mixtral": ("MixtralAttention",),
    "olmo": ("OlmoAttention",),
    "olmo2": ("Olmo2Attention",),
    "olmo3": ("Olmo3Attention",),
    "phi": ("PhiAttention",),
    "phi3": ("Phi3Attention",),
    "qwen2": ("Qwen2Attention",),
    "qwen2_moe": ("Qwen2MoeAttention", "Qwen2MoeSdpaAttention"),
    "qwen3": ("Qwen3Attention",),
    "qwen3_moe": ("Qwen3MoeAttention",),
    "smollm3": ("SmolLM3Attention",),
    "stablelm": ("StableLmAttention", "StableLmSdpaAttention"),
    "starcoder2": ("Starcoder2Attention",),
}
"""Transformers' ``model_type`` -> class names of its attention layers; older Transformers has some for SDPA alone."""


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
