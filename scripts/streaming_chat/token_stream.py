"""One stream of sampled tokens, which can be saved between two of them and gone on with, to the bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from experiments.config import SetupError
from streaming_llm import StreamingDecoder
from streaming_llm.saved_cache import require_dtype
from streaming_llm.saving import read, read_metadata

KEY = "stream_chat"


@dataclass(frozen=True)
class SamplingSettings:
    """As `model.generate` takes them. ``temperature`` 0: the most likely token; ``top_k`` 0 and ``top_p`` 1: off."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    seed: int = 0


class SamplingError(RuntimeError):
    """The model's output is no distribution of tokens."""


class Sampler:
    """Draws tokens with Transformers' own processors, in the order in which `generate` applies them."""

    def __init__(self, settings: SamplingSettings, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(settings.seed)
        self._greedy = settings.temperature == 0
        self._processors = LogitsProcessorList()
        if not self._greedy and settings.temperature != 1:
            self._processors.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k:
            self._processors.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            self._processors.append(TopPLogitsWarper(settings.top_p))

    def draw(self, logits: Tensor) -> int:
        """One token from logits ``[1, vocab]``.

        Raises:
            SamplingError: they are not finite.
        """
        probabilities = self._processors(None, logits.float()).softmax(-1)
        if probabilities.isnan().any():  # on a GPU drawing from them would end the process
            raise SamplingError("the model's logits are not finite: try another --dtype")
        if self._greedy:
            return int(probabilities.argmax(-1))
        return int(torch.multinomial(probabilities, 1, generator=self.generator))


class TokenStream:
    """A stream that is fed ids and continues them.

    Attributes:
        pending: ids that are known and have not been fed: what was given, or the token drawn last.
        n_fed: tokens fed.
        at_rest: false while tokens are being fed; what an exception leaves then cannot be gone on with.
    """

    def __init__(self, decoder: StreamingDecoder, sampler: Sampler) -> None:
        self.decoder, self.sampler = decoder, sampler
        self._vocab_size = decoder.model.get_input_embeddings().weight.shape[0]
        self.pending: list[int] = []
        self.n_fed = 0
        self.at_rest = True

    def tokens(self) -> Iterator[int]:
        """Feed what is pending, draw a token, which is pending then; and so on."""
        while True:
            self.at_rest = False
            logits = self._feed(self.pending)
            self.n_fed += len(self.pending)
            token = self.sampler.draw(logits)
            self.pending, self.at_rest = [token], True
            yield token

    def _feed(self, ids: list[int]) -> Tensor:
        device = self.sampler.generator.device
        if max(ids) >= self._vocab_size:
            raise SetupError(f"token id {max(ids)} of the tokenizer is outside the model's vocabulary")
        if len(ids) == 1 and self.n_fed:
            return self.decoder.step(torch.tensor(ids, device=device))
        return self.decoder.prefill(torch.tensor([ids], device=device))

    def save(self, path: Path, more: dict[str, Any]) -> None:
        """Write everything that the stream depends on, and ``more`` (JSON values).

        Raises:
            OSError: it cannot be written.
        """
        generator = self.sampler.generator
        drawn = {"device": generator.device.type, "state": generator.get_state().numpy().tobytes().hex()}
        value = {"pending": self.pending, "generator": drawn, **more}
        self.decoder.cache.save(path, {KEY: json.dumps(value)})

    def resume(self, path: Path) -> None:
        """Go on where the stream of a file was. On another kind of device random numbers start anew.

        Raises:
            SetupError: the file does not fit the model.
        """
        try:
            state = read(path)
            require_dtype(path, self.decoder.model, state.facts["dtype"], None)
            self.decoder.restore(state)
        except (ValueError, OSError) as error:
            raise SetupError(f"--resume: {error}") from None
        value = read_notes(path)
        self.pending, self.n_fed = value["pending"], self.decoder.cache.get_seq_length()
        if value["generator"]["device"] == self.sampler.generator.device.type:
            state = bytearray.fromhex(value["generator"]["state"])
            self.sampler.generator.set_state(torch.frombuffer(state, dtype=torch.uint8))


def read_notes(path: Path) -> dict[str, Any]:
    """What :meth:`TokenStream.save` wrote beside the cache.

    Raises:
        SetupError: it is no file of this program.
    """
    try:
        notes = read_metadata(path).get(KEY)
    except (ValueError, OSError) as error:
        raise SetupError(f"--resume: {error}") from None
    if notes is None:
        raise SetupError(f"--resume {path}: a saved stream, but none of this program")
    return json.loads(notes)
