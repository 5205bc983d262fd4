"""The parts of a model: the Transformers model inside what other libraries put around it, its decoder, its output."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..placement import output_device
from .table import family_of, text_config


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """The Transformers model in one of PEFT or ``torch.compile``; one that is none of these is returned as it is.

    Its ``base_model`` is the decoder without output layer. (PEFT's ``base_model`` is something else.)

    Raises:
        ValueError: there is none, or virtual tokens of PEFT's prompt learning would come before every block.
    """
    configs = getattr(model, "peft_config", None)
    for config in configs.values() if isinstance(configs, dict) else ():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(f"PEFT's {type(config).__name__} cannot stream: it puts virtual tokens before the input")
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        raise ValueError(f"{type(model).__name__} holds no Transformers model")
    return inner


def decoder_of(model: nn.Module) -> nn.Module:
    """The model without its output layer: embeddings in, final hidden states out."""
    # Older Transformers calls Gemma 3's by the name that it has beside a vision tower.
    return model.model if model.base_model is model else model.base_model


def lm_head(model: nn.Module, hidden_states: Tensor) -> Tensor:
    """Logits ``[..., vocab]`` of final hidden states ``[..., hidden]``, in the model's dtype, as its forward's."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output layer: use a causal language model")
    logits, family = head(hidden_states), family_of(model.config)
    return family.logits(text_config(model.config), logits) if family.logits else logits


def last_logits(model: nn.Module, hidden_states: Tensor) -> Tensor:
    """Logits ``[batch, vocab]`` of the last of ``hidden_states``, on the device on which its forward gives them."""
    return lm_head(model, hidden_states[:, -1]).to(output_device(model))
