"""The parts of a model: the Transformers model inside what other libraries put around it, its decoder, its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..placement import output_device
from .table import text_config


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


def base_of(model: Any) -> nn.Module:
    """The model without its output layer; of a multimodal one, with its towers for images or sound."""
    # Older Transformers calls Gemma 3's by the name that it has beside a vision tower.
    return model.model if model.base_model is model and hasattr(model, "model") else model.base_model


def decoder_of(model: nn.Module) -> nn.Module:
    """The language model without its output layer: ids or embeddings in, final hidden states out."""
    base, kind = base_of(model), type(text_config(model.config))
    if isinstance(base.config, kind):
        return base
    inner = (x for x in base.modules() if isinstance(x, PreTrainedModel) and isinstance(x.config, kind))
    return next(inner, base)


class _Given(nn.Module):
    """Stands where a model's decoder does, and returns final hidden states that are there already."""

    def __init__(self, replaced: nn.Module, hidden_states: Tensor) -> None:
        super().__init__()
        self.__dict__["given"] = replaced, hidden_states

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["given"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> _Output:
        return _Output(self.__dict__["given"][1])


class _Output(tuple[Any, ...]):
    """A decoder's output that holds final hidden states and nothing else."""

    def __new__(cls, hidden_states: Tensor) -> _Output:
        return super().__new__(cls, (hidden_states,))

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None


def lm_head(model: Any, hidden_states: Tensor) -> Tensor:
    """Logits ``[..., vocab]`` of final hidden states ``[..., hidden]``, in the model's dtype, as its forward's.

    It is the model's own forward, without its decoder: some families scale or cap their logits.
    """
    if model.get_output_embeddings() is None:
        raise ValueError(f"{type(model).__name__} has no output layer: use a causal language model")
    base = base_of(model)
    name = next(name for name, child in model._modules.items() if child is base)
    given = hidden_states.unsqueeze(1) if hidden_states.dim() == 2 else hidden_states
    # The model's own parts around another decoder; the model stays as it is.
    outside: Any = object.__new__(type(model))
    outside.__dict__.update(model.__dict__, _modules={**model._modules, name: _Given(base, given)})
    ids = torch.zeros(given.shape[:2], dtype=torch.int64, device=given.device)
    logits = type(model).forward(outside, input_ids=ids, use_cache=False, return_dict=True).logits
    return logits.reshape(*hidden_states.shape[:-1], -1).to(hidden_states.dtype)


def last_logits(model: nn.Module, hidden_states: Tensor) -> Tensor:
    """Logits ``[batch, vocab]`` of the last of ``hidden_states``, on the device on which its forward gives them."""
    return lm_head(model, hidden_states[:, -1]).to(output_device(model))
