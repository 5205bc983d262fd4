"""What a step costs beside the model's forward: the eager decoder against the same model over keys that lie ready.

Three steps take turns, one at a time, each on a copy of the model that shares its weights: the eager decoder's; the
plain forward over as many keys, with a cache that stores nothing and gives out what lies there; and Transformers'
own growing cache, cropped to the same length after each step. What the first takes longer than the second is the
decoder's own: slot, sinks, rotation, attention's plumbing.
"""

import copy
import os
import statistics
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor
from transformers import DynamicCache

from experiments.benchmarks.decode import ConstantDense
from experiments.methods import MethodSettings, Streaming
from experiments.models import LoadedModel
from experiments.timing import seconds
from personal_adapters.neox_flash import wrap_attention

_WARM_UP = 10


class ReadyCache(DynamicCache):
    """A cache that gives out the keys and values it holds, whatever it is given, once it is `frozen`."""

    frozen = False

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        if not self.frozen:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        return layer.keys, layer.values


class ReadyForward(ConstantDense):
    """The model's forward of one token over as many keys as the decoder attends to, at no cost of a cache."""

    name, label = "forward", "the model's forward"

    def reset(self) -> None:
        self._cache = ReadyCache(config=self.model.config)

    def prefill(self, ids: Tensor) -> Tensor:
        logits = super().prefill(ids)
        self._forward(ids[:, -1:])  # the keys of a full cache and the new token
        self._cache.frozen = True
        return logits

    def step(self, ids: Tensor) -> Tensor:
        return self._forward(ids[:, None])


def twin(model):
    """A copy of a model with modules and configuration of its own and the same weights."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


_STEPS: dict[str, type] = {"decoder": Streaming, "forward": ReadyForward, "dynamic_cache": ConstantDense}


@torch.inference_mode()
def measure_overhead(loaded: LoadedModel, settings: MethodSettings, backend: str, rounds: int, seed: int = 0) -> dict:
    """Medians over `rounds` turns of one step each, in milliseconds, and the decoder's overhead in per cent."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(loaded.vocab_size, (1, settings.cache_size), generator=generator).to(loaded.device)
    with ExitStack() as stack:
        steps: dict[str, Callable[[Tensor], Tensor]] = {}
        for name, method_class in _STEPS.items():
            own = twin(loaded.model)
            wrap_attention(own, backend)
            method = stack.enter_context(method_class(own, settings))
            method.reset()
            method.prefill(ids)
            for _ in range(_WARM_UP):
                method.step(ids[:, 0])
            steps[name] = method.step
        times = _in_turns(steps, [ids[:, i % ids.shape[1]] for i in range(rounds)], loaded.device)
    medians = {f"{name}_step_ms": 1e3 * statistics.median(values) for name, values in times.items()}
    beside = statistics.median(own - plain for own, plain in zip(times["decoder"], times["forward"], strict=True))
    return {
        **medians,
        "overhead_ms": 1e3 * beside,
        "overhead_percent": 1e5 * beside / medians["decoder_step_ms"],
        "rounds": rounds,
        "backend": backend,
        "load_average": list(os.getloadavg()),
        "threads": torch.get_num_threads(),
    }


def _in_turns(steps: dict[str, Callable], tokens: list[Tensor], device: torch.device) -> dict[str, list[float]]:
    """Seconds of every step; the order of a round changes from one to the next."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for i, token in enumerate(tokens):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(seconds(lambda name=name, token=token: steps[name](token), device))
    return times
