"""The engine that replays a recorded step: one CUDA graph per token, or one after the other without the host.

What the step consists of is said by a :class:`RecordedStep`; the engine feeds it, and keeps the cache's progress. A
cache that was changed in any other way is taken over anew before the next replay.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.kernel_choice import Place, attention_places, kernels_in_force
from ..families import transformers_model
from ..fused import sampler_of
from ..kv_cache import StreamingKVCache
from ..losses import cross_entropy
from ..placement import output_device, weight_addresses
from ..sampling import Choice, Ending, Sampling
from .base import EagerEngine, Engine
from .recorded_step import CHUNK, RecordedStep, StaticTensors
from .recorder import Recording

MAX_RECORDINGS = 8
"""Recordings that are kept: a step, a scored token, and the latest sampled ones. In half precision one of these serves
all settings but greedy choice, and in others each setting has its own; each with slots masked and not."""


class RecordedEngine(Engine):
    """Replays a step; runs the plain model call until the cache is filled as far as the step needs it.

    Args:
        name: of the engine.
        make_step: a :class:`RecordedStep`.
    """

    def __init__(self, model: nn.Module, cache: StreamingKVCache, name: str, make_step: type[RecordedStep]) -> None:
        super().__init__(model, cache)
        self.name, self.runs_alone = name, True
        self._make_step = make_step
        self._eager = EagerEngine(model, cache)
        self._places: list[Place] = []
        self._bound: tuple[Any, ...] = ()  # version of the stream, and kernels in force, that the device knows
        self._built_for: tuple[Any, ...] = ()

    # What an engine does

    def step(self, token_ids: Tensor) -> Tensor:
        if not self._bind():
            return self._eager.step(token_ids)
        self._static.tokens.copy_(token_ids)
        self._replay("step", self._step.run)
        return self._static.logits.clone()

    def score(self, logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        losses: list[Tensor] = []
        while token_ids.shape[1]:
            score = self._score_part if self._bind() else super().score
            part = token_ids[:, : self._at_once(token_ids.shape[1])]
            loss, logits = score(logits, part)
            losses, token_ids = [*losses, loss], token_ids[:, part.shape[1] :]
        return torch.cat(losses, dim=1), logits

    def _score_part(self, logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        static, n = self._static, token_ids.shape[1]
        static.start(logits)
        static.chunk[:, :n] = token_ids
        self._replay("score", self._score_one, n)
        return static.losses[:, :n].clone(), static.logits.clone()

    def generate(self, logits: Tensor, n: int, choice: Choice) -> tuple[Tensor, Tensor]:
        tokens: list[Tensor] = []
        while n:
            generate = self._generate_part if self._bind() else super().generate
            part, logits = generate(logits, self._at_once(n), choice)
            tokens, n = [*tokens, part], n - part.shape[1]
        return torch.cat(tokens, dim=1), logits

    def _generate_part(self, logits: Tensor, n: int, choice: Choice) -> tuple[Tensor, Tensor]:
        static, generator, ending = self._static, choice.generator, choice.ending
        static.start(logits)
        if ending is not None:
            static.ending.copy_(ending)
        recorded, chooser = None if ending is None else static.ending, self._chooser(choice.sampling)
        key = ("generate", chooser, generator, ending is not None)
        self._replay(key, partial(self._generate_one, chooser, generator, recorded), n, generator)
        tokens = static.chunk[:, :n].clone()
        if ending is not None:
            self._hold_rows(ending.fed_of_each_row(tokens), n)
            ending.active.copy_(static.ending.active)
        return tokens, static.logits.clone()

    def _at_once(self, n: int) -> int:
        """Of ``n`` tokens those that go without the host: not more than until the cache is full and the step changes.

        Where rows are not equally far, one of them may have ended short of a full cache: they do not wait for it.
        """
        if not self._bound:
            return 1
        until_full = self.cache.n_until_full if self._step.masked and self.cache.progress.together else n
        return min(n, CHUNK, until_full)

    def _hold_rows(self, fed: list[int], count: int) -> None:
        """Take back on the host, too, those tokens of a chunk that rows were not fed because they had ended."""
        if min(fed) < count:
            self.cache.progress.take_back([count - n for n in fed])
            self._bound = self.cache.progress.version, self._bound[1]

    def _score_one(self) -> None:
        static = self._static
        static.tokens.copy_(static.next_of_chunk())
        static.losses.index_copy_(1, static.index, cross_entropy(static.logits, static.tokens).unsqueeze(1))
        static.index += 1
        self._step.run()

    def _chooser(self, sampling: Sampling) -> Any:
        """What chooses tokens as :meth:`.Sampling.choose`: with the settings on the device, where that is possible.

        Equal ones share a recording.
        """
        if self._sampler is None or sampling.temperature == 0:
            return sampling
        self._sampler.set(sampling)
        return self._sampler

    def _generate_one(self, chooser: Any, generator: torch.Generator | None, ending: Ending | None) -> None:
        static = self._static
        token = chooser.choose(static.logits, generator)
        if ending is not None:
            token = torch.where(ending.active, token, ending.pad_token_id)
        before = static.logits if ending is None else static.logits.clone()
        static.tokens.copy_(token)
        static.chunk.index_copy_(1, static.index, token.unsqueeze(1))
        static.index += 1
        self._step.run()
        if ending is not None:
            static.logits.copy_(torch.where(ending.active[:, None], static.logits, before))
            self._step.seen.sub_((~ending.active).long())
            ending.active &= ~ending.ends(token)

    # The recorded step and the stream

    def _bind(self) -> bool:
        """Make the recorded step continue the stream; whether it can."""
        progress = self.cache.progress
        known = self._bound == (progress.version, kernels_in_force(self._places))
        if known and not (self._step.masked and self.cache.is_full):
            return True
        self._bound = ()
        layers = self.cache.layers
        if not (layers[0].is_initialized and (self.cache.is_full or self._make_step.fills(self.model))):
            return False
        self.cache.require_whole()
        for layer in layers:
            layer.reserve(layer.layout.capacity)
        self._places = attention_places(self.model)
        with torch.inference_mode(False), torch.no_grad():
            built_for = self._fixed_by_recording()
            if built_for != self._built_for:
                self._build()
                self._built_for = built_for
            self._step.load()
        self.cache.forget_derived()  # a step writes the layers' tensors without the cache
        self._bound = progress.version, kernels_in_force(self._places)
        return True

    def _fixed_by_recording(self) -> tuple[Any, ...]:
        """Everything that is fixed in a recording: where tensors lie, and which kernels are allowed."""
        layers = self.cache.layers
        return (
            layers[0].batch_size,
            tuple(x.data_ptr() for layer in layers for x in (layer.keys, layer.values, layer.sinks)),
            weight_addresses(self.model),
            kernels_in_force(self._places),
        )

    def _build(self) -> None:
        model = transformers_model(self.model)
        vocab = model.get_output_embeddings().weight.shape[0]
        self._static = StaticTensors(self.cache.layers[0].batch_size, vocab, model.dtype, output_device(model))
        self._step = self._make_step(self.model, self.cache, self._static)
        self._sampler = sampler_of(self._static.logits)
        self._recordings: OrderedDict[object, Recording] = OrderedDict()

    def _replay(
        self, key: object, call: Callable[[], None], times: int = 1, generator: torch.Generator | None = None
    ) -> None:
        recordings, key = self._recordings, (key, self._step.masked)
        if key not in recordings:
            recordings[key] = self._record(call, generator)
            if len(recordings) > MAX_RECORDINGS:
                recordings.popitem(last=False)
        recordings.move_to_end(key)
        recordings[key].replay(times)
        self.cache.progress.advance(times)
        self._bound = self.cache.progress.version, self._bound[1]

    def _record(self, call: Callable[[], None], generator: torch.Generator | None) -> Recording:
        """Record ``call`` and put back what its trial runs have changed."""
        static, start = self._static, time.perf_counter()
        saved = [(x, x.clone()) for x in (static.tokens, static.logits, static.chunk, static.ending.active)]
        random_state = None if generator is None else generator.get_state()
        device = static.tokens.device

        def from_here() -> None:
            # Trial runs go back to the stream's position, so that they do not turn the ring: they write the slot of
            # the token at hand, which the first real step writes again. The recorded run takes nothing from the host.
            if not torch.cuda.is_current_stream_capturing():
                self._step.load()
            call()

        recording = Recording(from_here, device, generator=generator)
        with torch.inference_mode(False), torch.no_grad():
            for x, before in saved:
                x.copy_(before)
            static.index.zero_()
            self._step.load()
        if generator is not None and random_state is not None:
            generator.set_state(random_state)
        torch.cuda.synchronize(device)
        self.compile_sec += time.perf_counter() - start
        return recording
