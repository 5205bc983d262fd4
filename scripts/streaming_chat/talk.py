"""A conversation, or a text without end, over one stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from experiments.config import SetupError
from experiments.stop_request import StopRequest

from .command_line import CHAT, ENDLESS
from .status import Speed, StatusLine
from .text import PartialText, UntilMarker
from .token_stream import TokenStream
from .turns import After, Turns

EXIT_SIGNAL = 128  # plus the signal's number: 130 for Ctrl-C
BETWEEN_TEXTS = "\n\n"


@dataclass
class Talk:
    """One stream of talk, and where it goes.

    Args:
        start: ids with which an endless text begins.
        stop_ids: tokens that end an answer, or one of the texts of an endless stream.
        limit: tokens of an answer or of the endless text; ``None``: no end.
        say: takes text to be shown at once.
        identity: JSON values that a saved stream has to share to be gone on with.
        after: where the next turn begins.
    """

    stream: TokenStream
    tokenizer: Any
    turns: Turns | None
    start: list[int]
    stop_ids: frozenset[int]
    limit: int | None
    say: Callable[[str], None]
    status: StatusLine
    identity: dict[str, Any]
    after: After = "nothing"
    partial: PartialText | None = None

    def converse(self, messages: Iterator[str]) -> int:
        """Answer messages; returns the exit code."""
        for message in messages:
            if message.strip():
                signal_number = self._answer(message.strip())
                if signal_number not in (None, 2):
                    return EXIT_SIGNAL + signal_number
        return 0

    def _answer(self, message: str) -> int | None:
        """Answer one message; the signal that stopped the answer, if any."""
        self.stream.pending += self.turns.ids(message, self.after)
        self.after, partial, until = "answer", PartialText(self.tokenizer), UntilMarker(self.turns.marker)
        beginning = True
        with StopRequest() as stop:
            for number, token in self._tokens():
                if token in self.stop_ids:
                    self.stream.pending = []  # the next turn closes the answer
                    break
                text = until.push(partial.push(token))
                text = text.lstrip() if beginning else text
                beginning = beginning and not text
                self.say(text)
                if until.found:
                    self.after = "marker"
                if until.found or number == self.limit or stop.signal_number is not None:
                    break
            self.say(until.rest() + "\n")
        return stop.signal_number

    def endless(self, begin: list[int]) -> int:
        """Go on from ``begin`` until the limit or a signal; returns the exit code."""
        self.stream.pending += begin
        self.partial = PartialText(self.tokenizer) if self.partial is None else self.partial
        with StopRequest() as stop:
            for number, token in self._tokens():
                self.say(self.partial.push(token) + (BETWEEN_TEXTS if token in self.stop_ids else ""))
                if number == self.limit:
                    return 0
                if stop.signal_number is not None:
                    return EXIT_SIGNAL + stop.signal_number
        raise AssertionError("tokens have no end")

    def _tokens(self) -> Iterator[tuple[int, int]]:
        """Tokens, numbered from 1, with the status kept up to date."""
        speed: Speed | None = None
        for number, token in enumerate(self.stream.tokens(), start=1):
            yield number, token
            if speed is None:
                speed = Speed()  # from the first token on: what came before is the prompt
            elif (figure := speed.count()) is not None:
                self.status.show(self._status(number, figure))

    def _status(self, number: int, toks_per_sec: float) -> str:
        decoder = self.stream.decoder
        size, fed = decoder.streaming_config.cache_size, self.stream.n_fed
        return (
            f"{number:,} tokens, {toks_per_sec:,.0f} tokens/s | cache {min(fed, size):,} of {size:,}, "
            f"{decoder.cache_nbytes / 1e6:,.1f} MB | {fed:,} in the stream"
        )

    # Saving

    def save(self, path: Path) -> None:
        """Save the stream; see :meth:`TokenStream.save`."""
        partial = self.partial.state() if self.partial is not None else None
        self.stream.save(path, {**self.identity, "after": self.after, "partial": partial})

    def resume(self, path: Path, notes: dict[str, Any]) -> None:
        """Go on with a saved stream.

        Raises:
            SetupError: it does not fit.
        """
        self.stream.resume(path)
        if notes["weights"] != self.identity["weights"]:
            raise SetupError(f"--resume {path}: the model's weights are not those that the stream was saved with")
        self.after = notes["after"]
        if notes["partial"] is not None:
            self.partial = PartialText(self.tokenizer, notes["partial"])


def read_messages(source: TextIO) -> Iterator[str]:
    """Messages from the terminal or a pipe, one a line.

    Raises:
        SetupError: the input is no UTF-8.
    """
    try:
        if not source.isatty():
            yield from source
            return
        while True:
            try:
                yield input("> ")
            except EOFError:
                print()
                return
    except UnicodeDecodeError as error:
        raise SetupError(f"the input is not UTF-8 text ({error.reason})") from None


def check_mode(path: Path, notes: dict[str, Any], mode: str) -> None:
    """Refuse to talk on in an endless text, or the other way round."""
    if notes["mode"] != mode:
        flag = {CHAT: "without --endless", ENDLESS: "with --endless"}[notes["mode"]]
        raise SetupError(f"--resume {path}: saved {flag}, and goes on {flag}")
