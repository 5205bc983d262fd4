"""Where a model's parts are: on one device, spread over several, offloaded, or split into shards.

A model here is a Transformers model, or one within PEFT or ``torch.compile``, which passes its attributes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """Accelerate's hooks on a module, which bring tensors from device to device."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))  # one hook, or a sequence of them


def _device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its weights are, or, with Accelerate's offloading, where they are brought."""
    for device in (getattr(hook, "execution_device", None) for hook in _hooks(module)):
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    parameter = next(module.parameters(), None)
    if parameter is not None:
        return parameter.device
    return next(module.buffers()).device


def input_device(model: Any) -> torch.device:
    """Where a model's token ids go."""
    return _device_of(model.get_input_embeddings())


def output_device(model: Any) -> torch.device:
    """Where a model's logits come from: its output layer, or, spread by Accelerate, back where its ids were."""
    head = model.get_output_embeddings()
    brought_back = any(getattr(hook, "io_same_device", False) for hook in _hooks(model))
    return input_device(model) if head is None or brought_back else _device_of(head)


def layer_devices(model: Any, stores: Sequence[int]) -> list[torch.device]:
    """Where the keys of each decoder layer belong that stores some.

    Args:
        stores: their numbers.
    """
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    stacks = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    if not stacks:
        return [input_device(model)] * len(stores)
    attention = [next((m for m in layer.modules() if hasattr(m, "_hf_hook")), layer) for layer in stacks[0]]
    return [_device_of(attention[index]) for index in stores]


def weight_addresses(model: nn.Module) -> tuple[int, ...]:
    """Where the data of all parameters lie: a quantised weight has none of its own, only the tensors that it holds."""
    return tuple(x.data_ptr() for parameter in model.parameters() for x in _stored(parameter))


def stored_nbytes(tensor: Tensor) -> int:
    """Bytes that hold a tensor's data, quantised or not."""
    return sum(x.numel() * x.element_size() for x in _stored(tensor))


def _stored(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that hold a tensor's data."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _stored(getattr(tensor, name))


def why_not_one_cuda_device(model: Any) -> str | None:
    """Why a model's steps cannot be recorded as a CUDA graph, or run by kernels of this library; ``None`` if not."""
    kinds = {type(parameter.data) for parameter in model.parameters()} | set(map(type, model.parameters()))
    if any(kind.__name__ == "DTensor" for kind in kinds):
        return "the model is split over several processes (tp_plan)"
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    devices = {x.device for x in tensors} | {input_device(model)}
    if any(device.type == "meta" for device in devices):
        return "the model is offloaded"
    if len(devices) > 1:
        return f"the model is spread over {', '.join(sorted(map(str, devices)))}"
    device = next(iter(devices))
    return None if device.type == "cuda" else f"it needs a CUDA device, and the model is on {device}"
