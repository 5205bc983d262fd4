"""The Transformers model itself, inside what other libraries put around it."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


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
