"""A conversation, or a text without end, over one stream."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.cli import EXIT_SIGNAL
from experiments.config import SetupError
from experiments.progress import StopRequest
from streaming_llm import StreamingDecoder

from .tokens import Place, ShownText, Turns, special_ids

BETWEEN_TEXTS = "\n\n"
AT_A_TIME = 1024
"""Tokens of an endless text in one call of `generate`."""


@dataclass
class Talk:
    """One stream of talk.

    Args:
        turns: of a conversation; ``None`` for a text without end.
        start: ids with which a text begins.
        ends: tokens that end an answer, or one of the texts of an endless stream.
        limit: tokens of an answer or of the endless text; ``None``: no end.
        sampling: keywords of `decoder.generate`; its ``seed`` is for the first call.
        place: where in a conversation the stream is.
        partial: ids that the next text of an endless stream depends on.
        at_rest: false while tokens are being fed; what an exception leaves then cannot be gone on with.
    """

    decoder: StreamingDecoder
    tokenizer: Any
    turns: Turns | None
    start: list[int]
    ends: list[int]
    limit: int | None
    sampling: dict[str, Any]
    place: Place = "beginning"
    partial: tuple = ((), ())
    at_rest: bool = True

    def converse(self, messages: Iterable[str]) -> int:
        """Answer messages; returns the exit code."""
        for message in filter(None, map(str.strip, messages)):
            signal_number = self._answer(message)
            if signal_number not in (None, signal.SIGINT):
                return exit_code(signal_number)
        return 0

    def _answer(self, message: str) -> int | None:
        """Answer one message; the signal that stopped the answer, if any."""
        shown = ShownText(self.tokenizer, self._say, self._no_text(""), self.turns.marker, strip=True)
        with self._feeding() as stop:
            self._feed(self.turns.ids(message, self.place))
            last = self._generate(self.limit, shown, self.ends)
            self.place = "marker" if shown.ended else "end" if last == self.turns.end_id else "answer"
            if self.place == "answer" and last in self.ends:
                # An end that is not the template's. The next turn closes the answer as the template does.
                with contextlib.suppress(ValueError):  # recurrent layers cannot go back: it stays
                    self.decoder.cache.crop(-1)
            shown.rest()
            self._say("\n")
        return stop.signal_number

    def endless(self, prompt: str) -> int:
        """Write on after ``prompt`` until the limit or a signal; returns the exit code.

        Raises:
            SetupError: there is nothing to go on from.
        """
        shown = ShownText(self.tokenizer, self._say, self._no_text(BETWEEN_TEXTS), state=self.partial)
        left, n_seen = self.limit, self.decoder.cache.n_seen
        begin = self.tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids if prompt else []
        begin = begin if n_seen else self.start + begin
        if not begin and not n_seen:
            raise SetupError("the tokenizer has no token that a text could begin with: give --prompt")
        with self._feeding() as stop:
            self._say(prompt)
            if begin:
                self._feed(begin)
            while left != 0 and stop.signal_number is None:
                n_tokens = AT_A_TIME if left is None else min(left, AT_A_TIME)
                self._generate(n_tokens, shown)
                left = None if left is None else left - n_tokens
            self.partial = shown.state()
            self._say("\n")
        return exit_code(stop.signal_number)

    def _say(self, text: str) -> None:
        try:
            say(text)
        except BrokenPipeError:  # whoever read the text has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self._stop.signal_number = signal.SIGPIPE

    def _no_text(self, at_end: str) -> dict[int, str]:
        return dict.fromkeys(special_ids(self.tokenizer), "") | dict.fromkeys(self.ends, at_end)

    @contextmanager
    def _feeding(self) -> Iterator[StopRequest]:
        self.at_rest, self._n_tokens, self._sec = False, 0, 0.0
        with StopRequest() as self._stop:
            yield self._stop
        self.at_rest = True
        size, n_seen = self.decoder.streaming_config.cache_size, self.decoder.cache.n_seen
        toks_per_sec = self._n_tokens / max(self._sec, 1e-9)
        note(
            f"{self._n_tokens:,} tokens, {toks_per_sec:,.0f} tokens/s | cache {min(n_seen, size):,} of "
            f"{size:,}, {self.decoder.cache_nbytes / 1e6:,.1f} MB | {n_seen:,} in the stream"
        )

    def _feed(self, ids: list[int]) -> None:
        embeddings = self.decoder.model.get_input_embeddings().weight
        if max(ids) >= len(embeddings):
            raise SetupError(f"token id {max(ids)} of the tokenizer is outside the model's vocabulary")
        require_numbers(self.decoder.prefill(torch.tensor([ids], device=embeddings.device)))

    def _generate(self, n_tokens: int, shown: ShownText, ends: list[int] | None = None) -> int:
        """Generate until there are enough, one of ``ends``, the marker or a signal; gives the last token."""
        marker = self.turns.marker if self.turns is not None else ""

        def stopped(ids: Tensor, scores: object) -> bool:
            last = ids[0, -len(marker.encode()) :]  # a token is a byte at least
            in_text = bool(marker) and marker in self.tokenizer.decode(last, skip_special_tokens=True)
            return in_text or self._stop.signal_number is not None

        start = time.perf_counter() - self.decoder.compile_sec
        tokens = self.decoder.generate(
            n_tokens, **self.sampling, eos_token_id=ends or None, stopping_criteria=stopped, streamer=shown
        )
        self._n_tokens += tokens.shape[1]
        self._sec += time.perf_counter() - self.decoder.compile_sec - start
        self.sampling["seed"] = None  # goes on with the random numbers
        require_numbers(self.decoder.logits)
        return int(tokens[0, -1])


def exit_code(signal_number: int | None) -> int:
    return 0 if signal_number in (None, signal.SIGPIPE) else EXIT_SIGNAL + signal_number


def require_numbers(logits: Tensor) -> None:
    """Raise FloatingPointError where no token can be drawn."""
    if logits.isnan().any():
        raise FloatingPointError("the model's logits are not numbers: try another --dtype")


def say(text: str) -> None:
    """Show text at once."""
    print(text, end="", flush=True)


def note(line: str) -> None:
    """A line beside the text, for a person who watches."""
    if sys.stderr.isatty():
        print(f"\x1b[2m{line}\x1b[0m", file=sys.stderr, flush=True)
