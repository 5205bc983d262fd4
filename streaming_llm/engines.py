"""How a decode step runs: the plain model call, or a CUDA graph of it, or a graph of fused kernels.

All engines advance the same :class:`StreamingKVCache`. While a graph runs, the stream's position lives on the device
and the cache's counters lag behind; :meth:`Engine.sync` brings them up to date, after which the cache can be used in
any other way and the graph goes on from there.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .device_cache import DeviceCache
from .families import rotary_from_model
from .fused import require_fused, why_not_fused
from .graphs import record
from .kv_cache import StreamingKVCache
from .sampling import Sampling

CHUNK = 1024
"""Tokens of a stream that a graph reads or writes without the host."""


class Engine(ABC):
    """Feeds one token after the other to a model with a streaming cache.

    Args:
        model: attached as long as the engine is used.
        cache: a cache of this model.

    Attributes:
        name: what really runs.
        compile_sec: seconds spent on compiling, tuning and recording so far.
    """

    name: str

    def __init__(self, model: nn.Module, cache: StreamingKVCache) -> None:
        self.model, self.cache = model, cache
        self.compile_sec = 0.0

    @abstractmethod
    def step(self, token_ids: Tensor) -> Tensor:
        """Feed ``[batch]``; logits ``[batch, vocab]``."""

    def sync(self) -> None:  # noqa: B027 - only those that run ahead have something to do
        """Bring the cache's counters up to date."""

    def score(self, logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of ``token_ids`` ``[batch, n]``, each fed after its loss is taken; and the last logits."""
        losses = []
        for token in token_ids.unbind(1):
            losses.append(_nll(logits, token))
            logits = self.step(token)
        return torch.stack(losses, dim=1), logits

    def generate(
        self, logits: Tensor, n: int, sampling: Sampling, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """``n`` tokens ``[batch, n]``, each chosen from the logits before it and fed; and the last logits."""
        tokens = []
        for _ in range(n):
            tokens.append(sampling.choose(logits, generator))
            logits = self.step(tokens[-1])
        return torch.stack(tokens, dim=1), logits


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return nn.functional.cross_entropy(logits.to(dtype), targets, reduction="none")


class EagerEngine(Engine):
    """The plain model call."""

    name = "eager"

    def step(self, token_ids: Tensor) -> Tensor:
        output = self.model(input_ids=token_ids.unsqueeze(1), past_key_values=self.cache, use_cache=True)
        return output.logits[:, -1]


class _Recorded:
    """One recorded step, with what feeds it and what it leaves: static tensors."""

    def __init__(self, batch: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.logits = torch.zeros(batch, vocab, dtype=dtype, device=device)
        self.chunk = torch.zeros(batch, CHUNK, dtype=torch.int64, device=device)
        self.losses = torch.zeros(batch, CHUNK, dtype=torch.promote_types(dtype, torch.float32), device=device)
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self.graphs: dict[object, torch.cuda.CUDAGraph] = {}


class GraphEngine(Engine):
    """One CUDA graph per step around the plain model call; eager until the cache is full.

    PyTorch's attention kernels take no device-side length, so that a cache that still fills up needs another launch
    at every step.

    Args:
        compiled: let ``torch.compile`` fuse the call before it is recorded.
    """

    def __init__(self, model: nn.Module, cache: StreamingKVCache, compiled: bool = False) -> None:
        super().__init__(model, cache)
        self.compiled = compiled
        if model.device.type != "cuda":
            raise ValueError(f"engine {self.name!r} needs a CUDA device, the model is on {model.device}: use 'eager'")
        self._eager = EagerEngine(model, cache)
        self._recorded: _Recorded | None = None
        self._key: tuple | None = None
        self._bound = False
        self._bound_kernels: tuple = ()
        self._adapters: list[nn.Module] = []
        self._ahead = 0

    @property
    def name(self) -> str:
        return "graph+compile" if self.compiled else "graph"

    # What a subclass does differently

    def _ready(self) -> bool:
        """Whether the recorded step can take the next token."""
        layer = self.cache.layers[0]
        return layer.is_initialized and layer.n_seen >= layer.layout.config.cache_size

    def _build(self) -> None:
        """Make what the step to record needs."""
        self._device_cache = DeviceCache(self.cache, self.model)
        self._call = torch.compile(self._model_call, dynamic=False) if self.compiled else self._model_call

    def _once(self) -> None:
        """The step to record, from static tokens to static logits: advances the device's counters."""
        self._recorded.logits.copy_(self._call(self._recorded.tokens))

    def _model_call(self, tokens: Tensor) -> Tensor:
        cache = self._device_cache
        cache.begin()
        position_ids = (cache.counters[0] + cache.counters[1]).view(1, 1).expand(tokens.shape[0], 1)
        logits = self.model(
            input_ids=tokens.unsqueeze(1), past_key_values=cache, use_cache=True, position_ids=position_ids
        ).logits[:, -1]
        cache.counters[0] += 1
        return logits

    def _load(self) -> None:
        """Copy the stream's state from the host to where the recorded step reads it."""
        self._device_cache.load()

    # Common

    def step(self, token_ids: Tensor) -> Tensor:
        if not self._bind():
            return self._eager.step(token_ids)
        self._recorded.tokens.copy_(token_ids)
        self._replay("step", self._once)
        return self._recorded.logits.clone()

    def score(self, logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        losses = []
        while token_ids.shape[1] and not self._bind():
            loss, logits = super().score(logits, token_ids[:, :1])
            losses, token_ids = [*losses, loss], token_ids[:, 1:]
        for part in token_ids.split(CHUNK, dim=1) if token_ids.shape[1] else ():
            state = self._recorded
            self._start(logits)
            state.chunk[:, : part.shape[1]] = part
            self._replay("score", self._score_one, part.shape[1])
            losses.append(state.losses[:, : part.shape[1]].clone())
            logits = state.logits.clone()
        return torch.cat(losses, dim=1), logits

    def generate(
        self, logits: Tensor, n: int, sampling: Sampling, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        tokens = []
        while n and not self._bind():
            token, logits = super().generate(logits, 1, sampling, generator)
            tokens, n = [*tokens, token], n - 1
        for start in range(0, n, CHUNK):
            count, state = min(CHUNK, n - start), self._recorded
            self._start(logits)
            key = ("generate", sampling, id(generator))
            self._replay(key, lambda: self._generate_one(sampling, generator), count, generator)
            tokens.append(state.chunk[:, :count].clone())
            logits = state.logits.clone()
        return torch.cat(tokens, dim=1), logits

    def sync(self) -> None:
        for layer in self.cache.layers if self._ahead else ():
            layer.n_seen += self._ahead
        self._ahead = 0
        self._bound = False

    def _bind(self) -> bool:
        """Make the recorded step continue the stream; whether it can."""
        if self._bound and self._kernels() == self._bound_kernels:
            return True
        self.sync()
        if not self._ready():
            return False
        layers = self.cache.layers
        for layer in layers:
            layer.reserve(layer.layout.capacity)
        self.cache._require_whole_forwards(0, 1)
        self._adapters = [m for m in self.model.modules() if hasattr(m, "kernel_context")]
        with torch.inference_mode(False), torch.no_grad():
            key = self._state_key()
            if key != self._key:
                self._key, batch = key, layers[0].batch_size
                vocab = self.model.get_output_embeddings().weight.shape[0]
                self._recorded = _Recorded(batch, vocab, self.model.dtype, self.model.device)
                self._build()
            self._load()
        self._bound, self._bound_kernels = True, self._kernels()
        return True

    def _state_key(self) -> tuple:
        """Everything that is fixed in a recording: where tensors lie, and which kernels are allowed."""
        layers = self.cache.layers
        return (
            layers[0].batch_size,
            tuple(x.data_ptr() for layer in layers for x in (layer.keys, layer.values)),
            tuple(p.data_ptr() for p in self.model.parameters()),
            self._kernels(),
        )

    def _kernels(self) -> tuple:
        """The SDPA kernels that are allowed, by the flags in force and by the adapters on the model's layers."""
        flags = torch.backends.cuda
        allowed = (flags.math_sdp_enabled(), flags.flash_sdp_enabled(), flags.cudnn_sdp_enabled())
        return (*allowed, *(adapter.backend for adapter in self._adapters))

    def _start(self, logits: Tensor) -> None:
        self._recorded.logits.copy_(logits)
        self._recorded.index.zero_()

    def _next_of_chunk(self) -> Tensor:
        state = self._recorded
        return state.chunk.index_select(1, state.index).squeeze(1)

    def _score_one(self) -> None:
        state = self._recorded
        state.tokens.copy_(self._next_of_chunk())
        state.losses.index_copy_(1, state.index, _nll(state.logits, state.tokens).unsqueeze(1))
        state.index += 1
        self._once()

    def _generate_one(self, sampling: Sampling, generator: torch.Generator | None) -> None:
        state = self._recorded
        state.tokens.copy_(sampling.choose(state.logits, generator))
        state.chunk.index_copy_(1, state.index, state.tokens.unsqueeze(1))
        state.index += 1
        self._once()

    def _replay(
        self, key: object, call: Callable[[], None], times: int = 1, generator: torch.Generator | None = None
    ) -> None:
        graphs = self._recorded.graphs
        if key not in graphs:
            graphs[key] = self._record(call, generator)
        graph = graphs[key]
        for _ in range(times):
            graph.replay()
        self._ahead += times

    def _record(self, call: Callable[[], None], generator: torch.Generator | None) -> torch.cuda.CUDAGraph:
        """Record ``call`` and put back what its trial runs have changed."""
        state, start = self._recorded, time.perf_counter()
        saved = [x.clone() for x in (state.tokens, state.logits, state.chunk)]
        random_state = None if generator is None else generator.get_state()
        self.sync()
        self._bound = True  # trial runs write the slot of the token at hand, which the first real step writes again
        with torch.inference_mode(False), torch.no_grad():
            graph = record(self._rewinding(call), generator=generator)
            for x, old in zip((state.tokens, state.logits, state.chunk), saved, strict=True):
                x.copy_(old)
            state.index.zero_()
            self._load()
        if random_state is not None:
            generator.set_state(random_state)
        torch.cuda.synchronize(self.model.device)
        self.compile_sec += time.perf_counter() - start
        return graph

    def _rewinding(self, call: Callable[[], None]) -> Callable[[], None]:
        """``call`` after going back to the stream's position, so that trial runs do not turn the ring.

        The last run is the recorded one: a copy between host and device must not be in it.
        """
        runs = iter(range(1 << 30))

        def trial() -> None:
            if not torch.cuda.is_current_stream_capturing() and next(runs):
                self._load()
            call()

        return trial


class FusedEngine(GraphEngine):
    """A CUDA graph of the family's fused kernels.

    Args:
        attention: ``sdpa``: the SDPA kernel that is allowed, for a full cache (eager until then); ``triton``: this
            library's kernel, for a cache filled to any degree.
    """

    name = "fused"

    def __init__(self, model: nn.Module, cache: StreamingKVCache, attention: str = "sdpa") -> None:
        self._module = require_fused(model)
        super().__init__(model, cache)
        self.attention = attention

    def _ready(self) -> bool:
        layer = self.cache.layers[0]
        return layer.is_initialized if self.attention == "triton" else super()._ready()

    def _build(self) -> None:
        self._forward = self._module.StepForward(
            self.model,
            self.cache,
            rotary_from_model(self.model),
            own_attention=self.attention == "triton",
            logits=self._recorded.logits,
        )

    def _once(self) -> None:
        self._forward(self._recorded.tokens)

    def _load(self) -> None:
        layer = self.cache.layers[0]
        self._forward.load(layer.n_seen, layer.position_offset)


def best_engine(model: nn.Module) -> str:
    """The fastest engine that runs ``model`` here."""
    if model.device.type != "cuda":
        return "eager"
    return "graph" if why_not_fused(model) else "fused"
